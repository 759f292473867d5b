//! How a precision rounds weights and activations. Shared by the packers and the reference, so that both hold exactly the same numbers.

use half::{bf16, f16};

use super::{LinearPart, Precision};

/// Consecutive inputs that share a scale, of weights and of activations.
pub(super) const GROUP: usize = 32;

/// Thirty-two inputs of one output: `scale * ints[k]`, as in GGUF's Q8_0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Q8Block {
    pub(super) scale: f16,
    /// -127..=127
    pub(super) ints: [i8; GROUP],
}

/// Thirty-two inputs of one output: `scale * ints[k] + min`, as in GGUF's Q4_1 (and Q4_0, whose min is -8 scale).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Q4Block {
    pub(super) scale: f16,
    pub(super) min: f16,
    /// 0..=15
    pub(super) ints: [u8; GROUP],
}

/// How the weights of a group of linears are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    F32,
    Bf16,
    Q8,
    Q4,
}

impl Layout {
    /// The layout of a group at a precision: 4-bit files keep their own integers and scales, which costs nothing and is exact.
    pub(super) fn of(precision: Precision, parts: &[LinearPart<'_>]) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
            Precision::Q8 if !parts.iter().all(|part| part.weight.is_four_bit()) => Self::Q8,
            Precision::Q8 | Precision::Q4 => Self::Q4,
        }
    }

    /// The layout of V^T beside such weights: it meets the same activations, and has few rows, so 4 bits would save nothing.
    pub(super) fn of_factors(self) -> Self {
        if self == Self::Q4 { Self::Q8 } else { self }
    }
}

/// The smallest f16 that is no smaller than a number >= 0, so that no integer has to be cut off at the end of its range.
fn round_up(value: f32) -> f16 {
    let nearest = f16::from_f32(value);
    if nearest.to_f32() >= value { nearest } else { f16::from_bits(nearest.to_bits() + 1) }
}

/// Values on `0..=top` steps of a scale, rounded.
fn steps(value: f32, scale: f16, top: f32) -> f32 {
    let scale = scale.to_f32();
    if scale > 0.0 { (value / scale).round_ties_even().clamp(-top, top) } else { 0.0 }
}

/// Rows of `inputs` weights in 8-bit blocks; the last block of a row is padded with zeros.
pub(super) fn quantize_q8(values: &[f32], inputs: usize) -> Vec<Q8Block> {
    let block = |group: &[f32]| {
        let largest = group.iter().fold(0f32, |largest, w| largest.max(w.abs()));
        let scale = round_up(largest / 127.0);
        let mut ints = [0; GROUP];
        ints.iter_mut().zip(group).for_each(|(int, w)| *int = steps(*w, scale, 127.0) as i8);
        Q8Block { scale, ints }
    };
    values.chunks(inputs).flat_map(|row| row.chunks(GROUP)).map(block).collect()
}

/// Rows of `inputs` weights in 4-bit blocks.
pub(super) fn quantize_q4(values: &[f32], inputs: usize) -> Vec<Q4Block> {
    let block = |group: &[f32]| {
        let min = f16::from_f32(group.iter().copied().fold(f32::INFINITY, f32::min));
        let above = |w: f32| (w - min.to_f32()).max(0.0);
        let scale = round_up(group.iter().fold(0f32, |largest, w| largest.max(above(*w))) / 15.0);
        let mut ints = [0; GROUP];
        ints.iter_mut().zip(group).for_each(|(int, w)| *int = steps(above(*w), scale, 15.0) as u8);
        Q4Block { scale, min, ints }
    };
    values.chunks(inputs).flat_map(|row| row.chunks(GROUP)).map(block).collect()
}

/// What blocks are worth: rows of `inputs` weights.
pub(super) fn from_q8(blocks: &[Q8Block], inputs: usize) -> Vec<f32> {
    let values = |(block, count): (&Q8Block, usize)| {
        let block = *block;
        (0..count).map(move |k| block.scale.to_f32() * f32::from(block.ints[k]))
    };
    rows_of(blocks, inputs).flat_map(values).collect()
}

/// What blocks are worth: rows of `inputs` weights.
pub(super) fn from_q4(blocks: &[Q4Block], inputs: usize) -> Vec<f32> {
    let values = |(block, count): (&Q4Block, usize)| {
        let block = *block;
        (0..count).map(move |k| block.scale.to_f32() * f32::from(block.ints[k]) + block.min.to_f32())
    };
    rows_of(blocks, inputs).flat_map(values).collect()
}

/// Every block with the inputs that it has.
fn rows_of<T>(blocks: &[T], inputs: usize) -> impl Iterator<Item = (&T, usize)> {
    let counts = move |(i, block)| (block, GROUP.min(inputs - i * GROUP));
    blocks.chunks(inputs.div_ceil(GROUP).max(1)).flat_map(move |row| row.iter().enumerate().map(counts))
}

/// The nearest bfloat16.
pub(super) fn round_bf16(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// What rows of `inputs` weights are worth after they have been stored in this layout.
pub(super) fn round_weights(values: Vec<f32>, inputs: usize, layout: Layout) -> Vec<f32> {
    match layout {
        Layout::F32 => values,
        Layout::Bf16 => values.into_iter().map(round_bf16).collect(),
        Layout::Q8 => from_q8(&quantize_q8(&values, inputs), inputs),
        Layout::Q4 => from_q4(&quantize_q4(&values, inputs), inputs),
    }
}

/// A group of activations in 8-bit integers with one scale, `max |x| / 127`. Not finite if one of them is not.
pub(super) fn quantize_activations(group: &[f32]) -> ([i8; GROUP], f32) {
    // As integers, magnitudes order like the numbers, and NaN comes last.
    let largest = f32::from_bits(group.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0));
    let (inverse, scale) = activation_scale(largest);
    let mut ints = [0; GROUP];
    ints.iter_mut().zip(group).for_each(|(int, x)| *int = (x * inverse).round_ties_even() as i8);
    (ints, scale)
}

/// What to multiply activations with to have integers, and the integers to have activations; from the largest magnitude of their group.
#[inline(always)]
pub(super) fn activation_scale(largest: f32) -> (f32, f32) {
    // Below this 127 / largest would overflow; such numbers are nothing beside any other.
    if largest < 1e-30 { (0.0, 0.0) } else { (127.0 / largest, largest * (1.0 / 127.0)) }
}

/// What a row of activations is worth to weights of this layout.
pub(super) fn round_activations(row: &mut [f32], layout: Layout) {
    match layout {
        Layout::F32 => {}
        Layout::Bf16 => row.iter_mut().for_each(|x| *x = round_bf16(*x)),
        Layout::Q8 | Layout::Q4 => {
            for group in row.chunks_mut(GROUP) {
                let (ints, scale) = quantize_activations(group);
                group.iter_mut().zip(ints).for_each(|(x, int)| *x = f32::from(int) * scale);
            }
        }
    }
}

/// What a number of the KV cache, or one that meets it, is worth: f32 beside f32 weights, else bfloat16.
pub(super) fn round_kv(value: f32, precision: Precision) -> f32 {
    if precision == Precision::F32 { value } else { round_bf16(value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Vec<f32> {
        (0..70).map(|k| ((k * 37 % 101) as f32 - 50.0) * 0.013).collect()
    }

    #[test]
    fn q8_is_within_half_a_step_and_idempotent() {
        let once = round_weights(row(), 70, Layout::Q8);
        for (group, rounded) in row().chunks(GROUP).zip(once.chunks(GROUP)) {
            let step = group.iter().fold(0f32, |m, w| m.max(w.abs())) / 127.0;
            for (w, r) in group.iter().zip(rounded) {
                assert!((w - r).abs() <= 0.5005 * step, "{w} became {r}");
            }
        }
        assert_eq!(round_weights(once.clone(), 70, Layout::Q8), once);
    }

    #[test]
    fn q4_is_within_half_a_step() {
        let rounded = round_weights(row(), 70, Layout::Q4);
        for (group, rounded) in row().chunks(GROUP).zip(rounded.chunks(GROUP)) {
            let (low, high) = group.iter().fold((f32::MAX, f32::MIN), |(low, high), w| (low.min(*w), high.max(*w)));
            for (w, r) in group.iter().zip(rounded) {
                // min is an f16 too, which costs up to 2^-11 of it
                assert!((w - r).abs() <= 0.502 * (high - low) / 15.0 + low.abs() / 2048.0, "{w} became {r}");
            }
        }
    }

    #[test]
    fn zeros_and_tiny_numbers_stay_harmless() {
        for layout in [Layout::Q8, Layout::Q4] {
            assert_eq!(round_weights(vec![0f32; 40], 40, layout), vec![0.0; 40]);
            let tiny = round_weights(vec![1e-9f32; 40], 40, layout);
            assert!(tiny.iter().all(|w| (w - 1e-9).abs() <= 6e-8), "{tiny:?}");
        }
        let mut row = vec![1e-38f32; 33];
        round_activations(&mut row, Layout::Q8);
        assert_eq!(row, vec![0.0; 33]);
    }

    #[test]
    fn activations_that_are_not_finite_stay_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = vec![1f32; 64];
            row[40] = bad;
            round_activations(&mut row, Layout::Q8);
            assert!(row[..32].iter().all(|x| *x == 1.0));
            assert!(!row[40].is_finite());
        }
    }
}
