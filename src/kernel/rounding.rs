//! How a precision rounds a weight. Shared by the packers and the reference, so that both hold exactly the same numbers.

use half::bf16;

use super::Precision;

/// Consecutive inputs of one output that share a scale in [`Precision::Q8`].
pub(super) const Q8_GROUP: usize = 32;

/// One output row in 8-bit integers: `value[k] = ints[k] * scales[k / 32]`.
///
/// The scale is `max |w| / 127` of its group, as in GGUF's Q8_0, so that rows which come from Q8_0 blocks keep their integers.
pub(super) fn quantize_q8(row: &[f32]) -> (Vec<i8>, Vec<f32>) {
    let mut ints = Vec::with_capacity(row.len());
    let mut scales = Vec::with_capacity(row.len().div_ceil(Q8_GROUP));
    for group in row.chunks(Q8_GROUP) {
        let largest = group.iter().fold(0f32, |largest, w| largest.max(w.abs()));
        let scale = largest / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        ints.extend(group.iter().map(|w| (w * inverse).round().clamp(-127.0, 127.0) as i8));
        scales.push(scale);
    }
    (ints, scales)
}

/// The nearest bfloat16.
pub(super) fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// What a row of weights is worth after it has been stored in this precision.
pub(super) fn round_row(row: &mut [f32], precision: Precision) {
    match precision {
        Precision::F32 => {}
        Precision::Bf16 => row.iter_mut().for_each(|w| *w = round_bf16(*w)),
        Precision::Q8 => {
            let (ints, scales) = quantize_q8(row);
            for (k, w) in row.iter_mut().enumerate() {
                *w = f32::from(ints[k]) * scales[k / Q8_GROUP];
            }
        }
    }
}

/// What a number of the KV cache is worth after it has been stored: f32 beside f32 weights, else bfloat16.
pub(super) fn round_kv(value: f32, precision: Precision) -> f32 {
    if precision == Precision::F32 { value } else { round_bf16(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q8_is_within_half_a_step_and_idempotent() {
        let row: Vec<f32> = (0..70).map(|k| ((k * 37 % 101) as f32 - 50.0) * 0.013).collect();
        let mut once = row.clone();
        round_row(&mut once, Precision::Q8);
        for (group, (want, got)) in row.chunks(Q8_GROUP).zip(once.chunks(Q8_GROUP)).enumerate() {
            let step = want.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
            for (w, g) in want.iter().zip(got) {
                assert!((w - g).abs() <= 0.5001 * step, "group {group}: {w} became {g}");
            }
        }
        let mut twice = once.clone();
        round_row(&mut twice, Precision::Q8);
        for (a, b) in once.iter().zip(&twice) {
            assert!((a - b).abs() <= 1e-6 * a.abs(), "{a} became {b} when quantised again");
        }
    }

    #[test]
    fn q8_of_zeros_is_zero() {
        let mut row = vec![0f32; 40];
        round_row(&mut row, Precision::Q8);
        assert_eq!(row, vec![0f32; 40]);
    }
}
