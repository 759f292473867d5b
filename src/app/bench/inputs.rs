//! What is put into a measurement: numbers that look random and are the same every time.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use half::bf16;

use crate::types::TokenId;

/// SplitMix64 (Steele, Lea and Flood 2014).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0.
    pub(super) fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}

/// The 26 bytes of adapter number `n`: 13 numbers within +-0.1, as training leaves them. No two adapters have the same.
pub(super) fn adapter_bytes(n: u64) -> [u8; 26] {
    let mut random = Random(n ^ 0xADA9);
    let mut bytes = [0; 26];
    for place in bytes.chunks_exact_mut(2) {
        let unit = (random.next() >> 40) as f32 / (1u32 << 24) as f32;
        place.copy_from_slice(&bf16::from_f32((unit - 0.5) * 0.2).to_le_bytes());
    }
    bytes
}

/// The name of adapter number `n`.
pub(super) fn adapter_name(n: u64) -> String {
    format!("bench-{n:07}")
}

/// Adapter number `n` as a line for the batch route.
pub(super) fn adapter_line(n: u64) -> String {
    let data = STANDARD.encode(adapter_bytes(n));
    format!("{{\"name\":\"{}\",\"scheme\":\"tiny13\",\"dtype\":\"bf16\",\"data\":\"{data}\"}}\n", adapter_name(n))
}

/// A prompt of so many tokens drawn from `pool`; another number, another prompt.
pub(super) fn prompt(number: u64, tokens: usize, pool: &[TokenId]) -> Vec<TokenId> {
    let mut random = Random(number.wrapping_mul(0x5851_F42D_4C95_7F2D));
    (0..tokens).map(|_| pool[random.below(pool.len())]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn adapters_are_distinct_finite_and_small() {
        let all: HashSet<_> = (0..10_000).map(adapter_bytes).collect();
        assert_eq!(all.len(), 10_000);
        let numbers = all.iter().flatten().copied().collect::<Vec<u8>>();
        let largest = numbers
            .chunks_exact(2)
            .map(|pair| bf16::from_le_bytes([pair[0], pair[1]]).to_f32().abs())
            .fold(0f32, f32::max);
        assert!((0.09..=0.1001).contains(&largest), "{largest}");
    }

    #[test]
    fn prompts_are_distinct_and_of_the_pool() {
        let pool: Vec<TokenId> = (40..80).collect();
        let all: HashSet<_> = (0..1000).map(|number| prompt(number, 21, &pool)).collect();
        assert_eq!(all.len(), 1000);
        assert!(all.iter().flatten().all(|token| pool.contains(token)));
    }

    #[test]
    fn a_line_is_json_that_names_its_adapter() {
        let line: serde_json::Value = serde_json::from_str(&adapter_line(7)).unwrap();
        assert_eq!(line["name"], "bench-0000007");
        assert_eq!(STANDARD.decode(line["data"].as_str().unwrap()).unwrap(), adapter_bytes(7));
    }
}
