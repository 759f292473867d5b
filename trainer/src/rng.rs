//! Random numbers as pure functions of (seed, purpose, position): the position in every stream is a counter that the run already keeps (step, prompts drawn), so a checkpoint holds it as an integer and a resumed run draws what the
//! uninterrupted one would have drawn.

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

/// What numbers are drawn for. Streams of different purposes never overlap: the purpose is a part of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Purpose {
    /// The order of the items in an epoch; position = epoch.
    Shuffle = 1,
    /// Seeds of rollouts; position = prompts drawn before this one.
    Rollout = 2,
    /// Perturbations of evolution strategies; position = step.
    Noise = 3,
    /// The order of minibatches; position = step.
    Minibatch = 4,
    /// Seeds of evaluation rollouts; position = item.
    Evaluation = 5,
    /// Resampling for intervals; position = 0.
    Bootstrap = 6,
    /// Generated examples; position = the task.
    Task = 7,
}

/// A stream of random numbers: ChaCha8 with (seed, purpose) as key and the position as stream.
#[derive(Debug, Clone)]
pub(crate) struct Stream(ChaCha8Rng);

impl Stream {
    /// The stream of a purpose at a position.
    pub(crate) fn new(seed: u64, purpose: Purpose, position: u64) -> Self {
        let mut key = [0u8; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
        key[16..28].copy_from_slice(b"mote-trainer");
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(position);
        Self(rng)
    }

    /// 64 random bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// Uniform in `[0, 1)`: 53 bits.
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `0..n`; `n` is above zero. By multiplication (Lemire, arXiv 1805.10941) with rejection, so exactly uniform.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        let threshold = n.wrapping_neg() % n;
        loop {
            let product = u128::from(self.bits()) * u128::from(n);
            if product as u64 >= threshold {
                return (product >> 64) as usize;
            }
        }
    }

    /// Standard normal (Box-Muller).
    pub(crate) fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// `0..n` in random order (Fisher-Yates).
    pub(crate) fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_a_function_of_seed_purpose_and_position() {
        let first = |seed, purpose, position| Stream::new(seed, purpose, position).bits();
        let here = first(7, Purpose::Rollout, 3);
        assert_eq!(here, first(7, Purpose::Rollout, 3));
        for other in [first(8, Purpose::Rollout, 3), first(7, Purpose::Noise, 3), first(7, Purpose::Rollout, 4)] {
            assert_ne!(here, other);
        }
    }

    #[test]
    fn the_numbers_have_the_moments_they_should() {
        let mut stream = Stream::new(1, Purpose::Noise, 0);
        let n = 40_000;
        let normals: Vec<f64> = (0..n).map(|_| stream.normal()).collect();
        let mean = normals.iter().sum::<f64>() / n as f64;
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / n as f64 - mean * mean;
        assert!(mean.abs() < 0.02, "{mean}");
        assert!((variance - 1.0).abs() < 0.03, "{variance}");
        let mut counts = [0usize; 7];
        for _ in 0..70_000 {
            counts[stream.below(7)] += 1;
        }
        assert!(counts.iter().all(|&count| (9_500..10_500).contains(&count)), "{counts:?}");
        assert!((0..1000).map(|_| stream.uniform()).all(|x| (0.0..1.0).contains(&x)));
    }

    #[test]
    fn permutations_hold_every_index_once() {
        for n in [0, 1, 2, 17] {
            let mut order = Stream::new(5, Purpose::Shuffle, n as u64).permutation(n);
            order.sort_unstable();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
    }
}
