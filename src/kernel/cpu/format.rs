//! How a panel lies in memory: sixteen outputs (or tokens, or columns) side by side, input after input.
//!
//! | format | a panel of K inputs |
//! |---|---|
//! | [`F32`] | `[K][16]` f32 |
//! | [`Bf16`] | `[K/2][16][2]` bfloat16, rounded up: two inputs of an output are neighbours, as dot-product instructions want them |
//! | [`Q8`] | for each 32 inputs: `[16]` f32 scales, then `[32][16]` signed bytes |
//!
//! KV blocks use the same panels: keys are a panel with the head's dimensions as inputs and the sixteen tokens as outputs, values are
//! panels with the tokens as inputs.
#![allow(unsafe_code)]

use half::bf16;

use super::lanes::{LANES, Lanes};
use crate::kernel::rounding::{Q8_GROUP, quantize_q8};

/// Takes the widened weights of input `k` of each panel.
pub(super) trait Sink<L: Lanes, const P: usize> {
    /// # Safety
    /// As for [`Format::walk`].
    unsafe fn step(&mut self, k: usize, weights: [L; P]);
}

/// A layout of panels.
pub(super) trait Format {
    /// Bytes of a panel with so many inputs: whole cache lines.
    fn panel_bytes(inputs: usize) -> usize;

    /// Writes one panel from up to sixteen rows of `inputs` weights; `out` is zeroed, and `panel_bytes` long.
    fn pack(rows: &[&[f32]], inputs: usize, out: &mut [u8]);

    /// Hands the weights of inputs `0..inputs` to the sink, in that order.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; each panel holds at least so many inputs.
    unsafe fn walk<L: Lanes, const P: usize, S: Sink<L, P>>(panels: [*const u8; P], inputs: usize, sink: &mut S);
}

/// A format that single numbers can be written to: what the KV cache needs.
pub(super) trait Store: Format {
    /// Writes input `k` of an output of a panel.
    ///
    /// # Safety
    /// The panel holds input `k`, `output` is below sixteen, and nobody else touches that number meanwhile.
    unsafe fn put(panel: *mut u8, k: usize, output: usize, value: f32);
}

/// See the module.
pub(super) struct F32;
/// See the module.
pub(super) struct Bf16;
/// See the module.
pub(super) struct Q8;

impl Format for F32 {
    fn panel_bytes(inputs: usize) -> usize {
        inputs * LANES * 4
    }

    fn pack(rows: &[&[f32]], inputs: usize, out: &mut [u8]) {
        for (output, row) in rows.iter().enumerate() {
            for (k, weight) in row[..inputs].iter().enumerate() {
                let at = 4 * (k * LANES + output);
                out[at..at + 4].copy_from_slice(&weight.to_ne_bytes());
            }
        }
    }

    #[inline(always)]
    unsafe fn walk<L: Lanes, const P: usize, S: Sink<L, P>>(panels: [*const u8; P], inputs: usize, sink: &mut S) {
        // SAFETY: input k lies inside each panel; the caller vouches for the instruction set.
        unsafe {
            let mut weights = [L::splat(0.0); P];
            for k in 0..inputs {
                for p in 0..P {
                    weights[p] = L::load(panels[p].cast::<f32>().add(k * LANES));
                }
                sink.step(k, weights);
            }
        }
    }
}

impl Store for F32 {
    #[inline(always)]
    unsafe fn put(panel: *mut u8, k: usize, output: usize, value: f32) {
        // SAFETY: inside the panel and ours alone, by contract; panels start on cache lines, so it is aligned.
        unsafe { *panel.cast::<f32>().add(k * LANES + output) = value }
    }
}

impl Format for Bf16 {
    fn panel_bytes(inputs: usize) -> usize {
        inputs.div_ceil(2) * LANES * 4
    }

    fn pack(rows: &[&[f32]], inputs: usize, out: &mut [u8]) {
        for (output, row) in rows.iter().enumerate() {
            for (k, weight) in row[..inputs].iter().enumerate() {
                let at = 2 * ((k / 2 * LANES + output) * 2 + k % 2);
                out[at..at + 2].copy_from_slice(&bf16::from_f32(*weight).to_bits().to_ne_bytes());
            }
        }
    }

    #[inline(always)]
    unsafe fn walk<L: Lanes, const P: usize, S: Sink<L, P>>(panels: [*const u8; P], inputs: usize, sink: &mut S) {
        // SAFETY: pair k lies inside each panel, an odd last input has a pair too; the caller vouches for the instruction set.
        unsafe {
            let (mut first, mut second) = ([L::splat(0.0); P], [L::splat(0.0); P]);
            for pair in 0..inputs.div_ceil(2) {
                for p in 0..P {
                    (first[p], second[p]) = L::widen_bf16(panels[p].cast::<u16>().add(pair * 2 * LANES));
                }
                sink.step(2 * pair, first);
                if 2 * pair + 1 < inputs {
                    sink.step(2 * pair + 1, second);
                }
            }
        }
    }
}

impl Store for Bf16 {
    #[inline(always)]
    unsafe fn put(panel: *mut u8, k: usize, output: usize, value: f32) {
        // SAFETY: inside the panel and ours alone, by contract; panels start on cache lines, so it is aligned.
        unsafe { *panel.cast::<u16>().add((k / 2 * LANES + output) * 2 + k % 2) = bf16::from_f32(value).to_bits() }
    }
}

impl Q8 {
    /// Sixteen scales and 32 x 16 integers.
    const GROUP_BYTES: usize = LANES * 4 + Q8_GROUP * LANES;
}

impl Format for Q8 {
    fn panel_bytes(inputs: usize) -> usize {
        inputs.div_ceil(Q8_GROUP) * Self::GROUP_BYTES
    }

    fn pack(rows: &[&[f32]], inputs: usize, out: &mut [u8]) {
        for (output, row) in rows.iter().enumerate() {
            let (ints, scales) = quantize_q8(&row[..inputs]);
            for (group, scale) in scales.iter().enumerate() {
                let at = group * Self::GROUP_BYTES + 4 * output;
                out[at..at + 4].copy_from_slice(&scale.to_ne_bytes());
            }
            for (k, int) in ints.iter().enumerate() {
                let ints_of_group = k / Q8_GROUP * Self::GROUP_BYTES + LANES * 4;
                out[ints_of_group + k % Q8_GROUP * LANES + output] = int.to_ne_bytes()[0];
            }
        }
    }

    #[inline(always)]
    unsafe fn walk<L: Lanes, const P: usize, S: Sink<L, P>>(panels: [*const u8; P], inputs: usize, sink: &mut S) {
        // SAFETY: every group that is read lies inside each panel; the caller vouches for the instruction set.
        unsafe {
            let (mut groups, mut scales, mut weights) = (panels, [L::splat(0.0); P], [L::splat(0.0); P]);
            let mut first = 0;
            while first < inputs {
                for p in 0..P {
                    groups[p] = panels[p].add(first / Q8_GROUP * Self::GROUP_BYTES);
                    scales[p] = L::load(groups[p].cast());
                }
                for k in 0..Q8_GROUP.min(inputs - first) {
                    for p in 0..P {
                        weights[p] = L::widen_i8(groups[p].add(LANES * 4 + k * LANES).cast()).mul(scales[p]);
                    }
                    sink.step(first + k, weights);
                }
                first += Q8_GROUP;
            }
        }
    }
}
