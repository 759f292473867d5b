//! Evolution strategies on the numbers: antithetic Gaussian perturbations and rank-normalised fitness (Salimans et al., arXiv 1703.03864).

use crate::rng::{Purpose, Stream};

/// The perturbations of a step, `pairs` vectors of N(0, I): a pure function of seed and step.
pub fn perturbations(seed: u64, step: u64, pairs: usize, numbers: usize) -> Vec<Vec<f32>> {
    let mut stream = Stream::new(seed, Purpose::Noise, step);
    (0..pairs).map(|_| (0..numbers).map(|_| stream.normal() as f32).collect()).collect()
}

/// The candidates: for each perturbation `centre + sigma * e`, then `centre - sigma * e`.
pub fn candidates(centre: &[f32], perturbations: &[Vec<f32>], sigma: f64) -> Vec<Vec<f32>> {
    let moved = |sign: f64, e: &[f32]| {
        centre.iter().zip(e).map(|(&x, &e)| (f64::from(x) + sign * sigma * f64::from(e)) as f32).collect()
    };
    perturbations.iter().flat_map(|e| [moved(1.0, e), moved(-1.0, e)]).collect()
}

/// Ranks spread evenly over `[-0.5, 0.5]`; equal fitness gets the mean of its ranks, so that candidates who did equally well pull equally (rewards are often just 0 and 1). All zeros when all are equal.
pub fn centred_ranks(fitness: &[f64]) -> Vec<f64> {
    let n = fitness.len();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| fitness[a].total_cmp(&fitness[b]));
    let mut ranks = vec![0.0; n];
    let mut start = 0;
    while start < n {
        let value = fitness[order[start]];
        let end = start + order[start..].iter().take_while(|&&i| fitness[i] == value).count().max(1);
        let rank = (start + end - 1) as f64 / 2.0;
        for &i in &order[start..end] {
            ranks[i] = if n > 1 { rank / (n - 1) as f64 - 0.5 } else { 0.0 };
        }
        start = end;
    }
    ranks
}

/// The estimate of `d (-fitness) / d centre`, `[numbers]`: `-1 / (2 pairs sigma) * sum_k (F(+e_k) - F(-e_k)) e_k`. `fitness` is in the order of [`candidates`].
pub fn descent_direction(perturbations: &[Vec<f32>], fitness: &[f64], sigma: f64, numbers: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; numbers];
    for (e, pair) in perturbations.iter().zip(fitness.chunks(2)) {
        let gain = pair[0] - pair[1];
        for (sum, &e) in sum.iter_mut().zip(e) {
            *sum += gain * f64::from(e);
        }
    }
    let scale = -1.0 / (2.0 * perturbations.len().max(1) as f64 * sigma);
    sum.into_iter().map(|sum| (sum * scale) as f32).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ties_share_their_rank() {
        assert_eq!(centred_ranks(&[3.0, 1.0, 2.0]), [0.5, -0.5, 0.0]);
        assert_eq!(centred_ranks(&[0.0, 1.0, 0.0, 1.0, 1.0]), [-0.375, 0.25, -0.375, 0.25, 0.25]);
        assert_eq!(centred_ranks(&[2.0; 4]), [0.0; 4]);
        assert_eq!(centred_ranks(&[2.0]), [0.0]);
        assert!(centred_ranks(&[]).is_empty());
    }

    #[test]
    fn candidates_are_mirrored() {
        let noise = perturbations(3, 9, 4, 5);
        assert_eq!(noise, perturbations(3, 9, 4, 5));
        assert_ne!(noise, perturbations(3, 10, 4, 5));
        let centre = [0.5f32, 0.0, -1.0, 2.0, 0.25];
        let all = candidates(&centre, &noise, 0.1);
        assert_eq!(all.len(), 8);
        for pair in all.chunks(2) {
            for ((plus, minus), centre) in pair[0].iter().zip(&pair[1]).zip(&centre) {
                assert!(((plus + minus) / 2.0 - centre).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn the_direction_of_a_linear_fitness_is_its_slope() {
        // f(x) = a . x: with many pairs and raw fitness the estimate tends to -a.
        let a = [1.0f64, -2.0, 0.5];
        let noise = perturbations(1, 0, 4000, 3);
        let fitness: Vec<f64> = candidates(&[0.0; 3], &noise, 0.3)
            .iter()
            .map(|x| x.iter().zip(&a).map(|(&x, a)| f64::from(x) * a).sum())
            .collect();
        for (got, a) in descent_direction(&noise, &fitness, 0.3, 3).iter().zip(&a) {
            assert!((f64::from(*got) + a).abs() < 0.15, "{got} {a}");
        }
        assert_eq!(descent_direction(&noise, &vec![0.0; 8000], 0.3, 3), [0.0; 3]);
    }

    proptest! {
        #[test]
        fn ranks_sum_to_zero_keep_order_and_ignore_scale(fitness in prop::collection::vec(-4i32..4, 0..20)) {
            let values: Vec<f64> = fitness.iter().map(|&x| f64::from(x)).collect();
            let ranks = centred_ranks(&values);
            prop_assert!(ranks.iter().sum::<f64>().abs() < 1e-9);
            let stretched: Vec<f64> = values.iter().map(|x| 1000.0 * x.powi(3) + 5.0).collect();
            prop_assert_eq!(&ranks, &centred_ranks(&stretched));
            for i in 0..ranks.len() {
                for j in 0..ranks.len() {
                    prop_assert_eq!(values[i] < values[j], ranks[i] < ranks[j]);
                }
            }
        }
    }
}
