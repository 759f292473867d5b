//! The fixed random matrices P of a site, bit for bit as torch draws them on a CPU.
//!
//! `P = normal(mean 0, std 1/sqrt(r), shape [u, r, r])` from a fresh generator seeded `seed + layer_idx`. Torch has two
//! routines: from 16 values on an AVX one in f32 over blocks of 16 (its polynomials for log and sincos are those of
//! Cephes), below that Box-Muller in f64. Both are reproduced operation by operation; PEFT's saved `tinylora_P` are the tests.

use half::bf16;

use super::scheme::ProjectionDtype;

/// Projections of one site, `[u, r, r]` row-major. `layer_idx` counts the targeted sites.
pub fn projection(seed: u64, layer_idx: usize, u: usize, rank: usize, dtype: ProjectionDtype) -> Vec<f32> {
    let mut generator = Mt19937::new(seed.wrapping_add(layer_idx as u64) as u32);
    let mut values = normal(&mut generator, u * rank * rank, 1.0 / (rank as f64).sqrt());
    if dtype == ProjectionDtype::Bf16 {
        values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    values
}

/// The Mersenne Twister of Matsumoto and Nishimura (1998), 32-bit.
struct Mt19937 {
    state: [u32; Self::N],
    next: usize,
}

impl Mt19937 {
    const N: usize = 624;
    const M: usize = 397;

    fn new(seed: u32) -> Self {
        let mut state = [0u32; Self::N];
        state[0] = seed;
        for i in 1..Self::N {
            let previous = state[i - 1];
            state[i] = (previous ^ previous >> 30).wrapping_mul(1_812_433_253).wrapping_add(i as u32);
        }
        Self { state, next: Self::N }
    }

    fn twist(&mut self) {
        for i in 0..Self::N {
            let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % Self::N] & 0x7fff_ffff);
            let magic = if y & 1 == 0 { 0 } else { 0x9908_b0df };
            self.state[i] = self.state[(i + Self::M) % Self::N] ^ (y >> 1) ^ magic;
        }
        self.next = 0;
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == Self::N {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ y >> 18
    }

    /// Uniform in [0, 1) with 24 bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() & 0x00ff_ffff) as f32 * (1.0 / (1u32 << 24) as f32)
    }

    /// Uniform in [0, 1) with 53 bits, the high word drawn first.
    fn uniform_f64(&mut self) -> f64 {
        let high = u64::from(self.next_u32());
        let low = u64::from(self.next_u32());
        ((high << 32 | low) & ((1 << 53) - 1)) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

fn normal(generator: &mut Mt19937, n: usize, std: f64) -> Vec<f32> {
    if n < 16 {
        return normal_small(generator, n, std);
    }
    let mut values: Vec<f32> = (0..n).map(|_| generator.uniform_f32()).collect();
    let std = std as f32;
    let (blocks, rest) = values.as_chunks_mut::<16>();
    blocks.iter_mut().for_each(|block| transform(block, std));
    if !rest.is_empty() {
        // Torch draws the *last 16* again, over what the block before had already made.
        let mut tail: [f32; 16] = std::array::from_fn(|_| generator.uniform_f32());
        transform(&mut tail, std);
        values[n - 16..].copy_from_slice(&tail);
    }
    values
}

/// Box-Muller in f64, two values a pair of draws.
fn normal_small(generator: &mut Mt19937, n: usize, std: f64) -> Vec<f32> {
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        let u1 = generator.uniform_f64();
        let u2 = generator.uniform_f64();
        let radius = (-2.0 * (-u2).ln_1p()).sqrt();
        let theta = 2.0 * std::f64::consts::PI * u1;
        values.push((radius * theta.cos() * std) as f32);
        values.push((radius * theta.sin() * std) as f32);
    }
    values.truncate(n);
    values
}

/// Sixteen uniforms to sixteen normals: 0..8 are radii, 8..16 angles.
fn transform(block: &mut [f32; 16], std: f32) {
    for j in 0..8 {
        let radius = (-2.0 * log(1.0 - block[j])).sqrt();
        let (sin, cos) = sin_cos(std::f32::consts::TAU * block[j + 8]);
        block[j] = radius * cos * std;
        block[j + 8] = radius * sin * std;
    }
}

/// Horner's scheme by fused multiply-add.
fn horner(x: f32, coefficients: &[f32]) -> f32 {
    coefficients.iter().copied().reduce(|sum, coefficient| sum.mul_add(x, coefficient)).unwrap_or(0.0)
}

#[allow(clippy::approx_constant, clippy::excessive_precision)] // Cephes' constants, as torch spells them
fn log(x: f32) -> f32 {
    const P: [f32; 9] = [
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ];
    let bits = x.max(f32::MIN_POSITIVE).to_bits();
    let mut exponent = ((bits >> 23) as i32 - 127) as f32 + 1.0;
    let mantissa = f32::from_bits((bits & !0x7f80_0000) | 0x3f00_0000);
    let mut extra = 0.0;
    if mantissa < 0.707_106_78 {
        extra = mantissa;
        exponent -= 1.0;
    }
    let x = (mantissa - 1.0) + extra;
    let z = x * x;
    let mut y = horner(x, &P) * x;
    y = y.mul_add(z, exponent * -2.12194440e-4);
    y = (-z).mul_add(0.5, y);
    exponent.mul_add(0.693359375, x + y)
}

#[allow(clippy::approx_constant, clippy::excessive_precision)] // Cephes' constants, as torch spells them
fn sin_cos(theta: f32) -> (f32, f32) {
    let octant = ((theta * 1.27323954473516) as i32 + 1) & !1;
    let j = octant as f32;
    let mut x = j.mul_add(-0.78515625, theta);
    x = j.mul_add(-2.4187564849853515625e-4, x);
    x = j.mul_add(-3.77489497744594108e-8, x);
    let z = x * x;
    let mut cos = horner(z, &[2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2]) * z;
    cos = cos.mul_add(z, -(z * 0.5)) + 1.0;
    let mut sin = horner(z, &[-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1]) * z;
    sin = sin.mul_add(x, x);
    if octant & 2 != 0 {
        std::mem::swap(&mut sin, &mut cos);
    }
    if octant & 4 != 0 {
        sin = -sin;
    }
    if !(octant - 2) & 4 != 0 {
        cos = -cos;
    }
    (sin, cos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::fixtures::{self, golden};

    /// Every `tinylora_P` that PEFT saved, both torch routines (u r r of 4 to 52), 0 differing bits.
    #[test]
    fn equals_every_projection_that_peft_saved() {
        let mut compared = 0;
        for (model, name) in fixtures::cases() {
            let case = golden(model, name);
            let config = case.config();
            let (u, rank) = (config["u"].as_u64().unwrap() as usize, config["r"].as_u64().unwrap() as usize);
            let seed = config["projection_seed"].as_u64().unwrap();
            for site in 0..case.sites.len() {
                let Some(saved) = case.tensor(&format!("base_model.model.{}.tinylora_P", case.sites.module(site)))
                else {
                    assert_eq!(name, "v-only");
                    continue;
                };
                let ours = projection(seed, site, u, rank, ProjectionDtype::F32);
                let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&ours), bits(&saved), "{model}/{name} site {site}");
                compared += saved.len();
            }
        }
        assert_eq!(compared, (21 + 28) * (4 + 52 + 52 + 48));
    }

    #[test]
    fn the_twister_is_the_standard_one() {
        let mut generator = Mt19937::new(5489);
        let last = (0..10_000).map(|_| generator.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995), "the 10,000th output for the default seed, as C++'s standard fixes it");
    }

    #[test]
    fn a_tail_is_drawn_again_and_bf16_is_rounded() {
        let exact = projection(1, 0, 5, 2, ProjectionDtype::F32);
        let rounded = projection(1, 0, 5, 2, ProjectionDtype::Bf16);
        assert_eq!(exact.len(), 20);
        assert!(exact.iter().zip(&rounded).all(|(a, b)| (a - b).abs() <= a.abs() / 256.0));
        assert!(rounded.iter().all(|value| value.to_bits() & 0xffff == 0));
        assert_ne!(exact, rounded);
    }
}
