//! How a panel lies in memory: sixteen outputs (or tokens, or columns) side by side, input after input.
//!
//! Inputs come in *words* of 32 bits, of weights and of activations alike: one f32, two bfloat16, or four bytes. But for activations of bfloat16 on
//! processors without an instruction for pairs of them: those have a word each, an f32 that was rounded like the others.
//!
//! | layout | a panel of K inputs |
//! |---|---|
//! | f32 | `[K][16]` f32 |
//! | bf16 | `[K/2][16][2]` bfloat16, rounded up: two inputs of an output are neighbours, as dot-product instructions want them |
//! | q8 | `[K/32][16]` f16 scales, up to a cache line; then `[K/4][16][4]` unsigned bytes, 128 more than the integers |
//! | q4 | for each 32 inputs: `[16]` f16 scales, `[16]` f16 minima, `[4][16][4]` bytes whose low and high halves are two words |
//!
//! The dot-product instruction for bytes wants one unsigned factor: weights take that part, and what 128 adds to a sum depends on the
//! activations only. KV blocks use the same panels: keys are a panel with the head's dimensions as inputs and the sixteen tokens as
//! outputs, values are panels with the tokens as inputs.
#![allow(unsafe_code)]

use half::bf16;

use super::{
    activations::Form,
    lanes::{LANES, Lanes},
};
use crate::rounding::{GROUP, Layout, Q4Block, Q8Block};

/// Bytes of sixteen words.
pub(super) const WORD_LINE: usize = LANES * 4;
/// Words of a group of activations.
pub(super) const GROUP_WORDS: usize = GROUP / 4;

impl Layout {
    /// Inputs in a word.
    pub(super) fn inputs_a_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::Bf16 => 2,
            Self::Q8 | Self::Q4 => 4,
        }
    }

    /// Inputs rounded up to what a panel holds.
    pub(super) fn padded(self, inputs: usize) -> usize {
        match self {
            Self::F32 => inputs,
            Self::Bf16 => inputs.next_multiple_of(2),
            Self::Q8 | Self::Q4 => inputs.next_multiple_of(GROUP),
        }
    }

    /// Words of a row of activations.
    pub(super) fn activation_words(self, inputs: usize, form: Form) -> usize {
        match (self, form) {
            (_, Form::Tiles) => inputs.next_multiple_of(GROUP) / 2,
            (Self::Bf16, Form::Singles) => self.padded(inputs),
            _ => self.padded(inputs) / self.inputs_a_word(),
        }
    }

    /// Groups with a scale in a row of activations.
    pub(super) fn groups(self, inputs: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => 0,
            Self::Q8 | Self::Q4 => inputs.div_ceil(GROUP),
        }
    }

    /// Bytes of a panel with so many inputs: whole cache lines.
    pub(super) fn panel_bytes(self, inputs: usize) -> usize {
        match self {
            Self::F32 | Self::Bf16 => inputs.div_ceil(self.inputs_a_word()) * WORD_LINE,
            Self::Q8 => Q8::integers(inputs) + inputs.div_ceil(GROUP) * GROUP_WORDS * WORD_LINE,
            Self::Q4 => inputs.div_ceil(GROUP) * Q4::GROUP_BYTES,
        }
    }
}

/// Writes a panel of up to sixteen rows of f32; `out` is zeroed.
pub(super) fn pack_f32(rows: &[f32], inputs: usize, out: &mut [u8]) {
    for (output, row) in rows.chunks(inputs).enumerate() {
        for (k, weight) in row.iter().enumerate() {
            let at = 4 * (k * LANES + output);
            out[at..at + 4].copy_from_slice(&weight.to_ne_bytes());
        }
    }
}

/// Writes a panel of up to sixteen rows, rounded to bfloat16; `out` is zeroed.
pub(super) fn pack_bf16(rows: &[f32], inputs: usize, out: &mut [u8]) {
    for (output, row) in rows.chunks(inputs).enumerate() {
        for (k, weight) in row.iter().enumerate() {
            let at = 2 * ((k / 2 * LANES + output) * 2 + k % 2);
            out[at..at + 2].copy_from_slice(&bf16::from_f32(*weight).to_bits().to_ne_bytes());
        }
    }
}

/// Writes a panel of up to sixteen rows of 8-bit blocks; `out` is zeroed.
pub(super) fn pack_q8(rows: &[Q8Block], inputs: usize, out: &mut [u8]) {
    let (scales, integers) = out.split_at_mut(Q8::integers(inputs));
    integers.fill(128);
    for (output, row) in rows.chunks(inputs.div_ceil(GROUP)).enumerate() {
        for (group, block) in row.iter().enumerate() {
            let at = 2 * (group * LANES + output);
            scales[at..at + 2].copy_from_slice(&block.scale.to_bits().to_ne_bytes());
            for (k, int) in block.ints.iter().enumerate() {
                let word = group * GROUP_WORDS + k / 4;
                integers[word * WORD_LINE + 4 * output + k % 4] = int.wrapping_add(-128).to_ne_bytes()[0];
            }
        }
    }
}

/// Writes a panel of up to sixteen rows of 4-bit blocks; `out` is zeroed.
pub(super) fn pack_q4(rows: &[Q4Block], inputs: usize, out: &mut [u8]) {
    for (output, row) in rows.chunks(inputs.div_ceil(GROUP)).enumerate() {
        for (group, block) in row.iter().enumerate() {
            let out = &mut out[group * Q4::GROUP_BYTES..][..Q4::GROUP_BYTES];
            out[2 * output..2 * output + 2].copy_from_slice(&block.scale.to_bits().to_ne_bytes());
            let min = Q4::MINIMA + 2 * output;
            out[min..min + 2].copy_from_slice(&block.min.to_bits().to_ne_bytes());
            for (k, int) in block.ints.iter().enumerate() {
                let (line, high) = (k / 8, k / 4 % 2);
                out[Q4::INTEGERS + line * WORD_LINE + 4 * output + k % 4] |= int << (4 * high);
            }
        }
    }
}

/// Panels of f32.
pub(super) struct F32;
/// Panels of bfloat16.
pub(super) struct Bf16;
/// Panels of 8-bit integers.
pub(super) struct Q8;
/// Panels of 4-bit integers.
pub(super) struct Q4;

/// Panels whose inputs take part one word at a time.
pub(super) trait Words {
    /// Weights of one word of a panel.
    type Weights<L: Lanes>: Copy;

    /// The weights of sixteen outputs in word `k`.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the panel has word `k`.
    unsafe fn load<L: Lanes>(panel: *const u8, k: usize) -> Self::Weights<L>;

    /// Words of a row of activations that a word of weights takes.
    fn taken<L: Lanes>() -> usize;

    /// Adds the products with so many words of a row of activations, `stride` apart.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; these words are there.
    unsafe fn dot<L: Lanes>(sums: L, weights: Self::Weights<L>, x: *const u32, stride: usize) -> L;

    /// The same with one output's word of weights, and the words of sixteen rows side by side.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; sixteen words are there, or twice as many.
    unsafe fn dot_rows<L: Lanes>(sums: L, weight: u32, x: *const u32, stride: usize) -> L;
}

impl Words for F32 {
    type Weights<L: Lanes> = L;

    #[inline(always)]
    unsafe fn load<L: Lanes>(panel: *const u8, k: usize) -> L {
        // SAFETY: the word lies in the panel.
        unsafe { L::load(panel.add(k * WORD_LINE).cast()) }
    }

    #[inline(always)]
    fn taken<L: Lanes>() -> usize {
        1
    }

    #[inline(always)]
    unsafe fn dot<L: Lanes>(sums: L, weights: L, x: *const u32, _: usize) -> L {
        // SAFETY: the instruction set and the word, by contract.
        unsafe { L::splat(x.cast::<f32>().read()).fma(weights, sums) }
    }

    #[inline(always)]
    unsafe fn dot_rows<L: Lanes>(sums: L, weight: u32, x: *const u32, _: usize) -> L {
        // SAFETY: the instruction set and the words, by contract.
        unsafe { L::splat(f32::from_bits(weight)).fma(L::load(x.cast()), sums) }
    }
}

impl Words for Bf16 {
    type Weights<L: Lanes> = L::Pairs;

    #[inline(always)]
    unsafe fn load<L: Lanes>(panel: *const u8, k: usize) -> L::Pairs {
        // SAFETY: the word lies in the panel.
        unsafe { L::load_pairs(panel.add(k * WORD_LINE).cast()) }
    }

    #[inline(always)]
    fn taken<L: Lanes>() -> usize {
        if L::PAIRS { 1 } else { 2 }
    }

    #[inline(always)]
    unsafe fn dot<L: Lanes>(sums: L, weights: L::Pairs, x: *const u32, stride: usize) -> L {
        // SAFETY: the instruction set and the words, by contract.
        unsafe {
            if L::PAIRS {
                return sums.dot_pairs(weights, x.read());
            }
            let (first, second) = L::halves(weights);
            let sums = first.fma(L::splat(x.cast::<f32>().read()), sums);
            second.fma(L::splat(x.add(stride).cast::<f32>().read()), sums)
        }
    }

    #[inline(always)]
    unsafe fn dot_rows<L: Lanes>(sums: L, weight: u32, x: *const u32, stride: usize) -> L {
        // SAFETY: the instruction set and the words, by contract. Both factors of a product are of one kind, so that they may change places.
        unsafe {
            if L::PAIRS {
                return sums.dot_pairs(L::load_pairs(x.cast()), weight);
            }
            let (first, second) = (f32::from_bits(weight << 16), f32::from_bits(weight & 0xffff_0000));
            let sums = L::splat(first).fma(L::load(x.cast()), sums);
            L::splat(second).fma(L::load(x.add(stride).cast()), sums)
        }
    }
}

/// Panels whose inputs take part in groups of 32, with integer sums inside a group.
pub(super) trait Groups {
    /// There are minima: `w = scale q + min`.
    const MINIMA: bool;

    /// Sums before the first word of a group; `offset` is -128 times the sum of the group's activations.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn start<L: Lanes>(offset: *const i32) -> L::Ints;

    /// Words `2 pair` and `2 pair + 1` of a group.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the panel has this group, and `inputs` in all.
    unsafe fn load<L: Lanes>(panel: *const u8, inputs: usize, group: usize, pair: usize) -> (L::Bytes, L::Bytes);

    /// Adds the products with one word of activations.
    ///
    /// # Safety
    /// The processor has the instructions of `L`.
    unsafe fn dot<L: Lanes>(sums: L::Ints, weights: L::Bytes, x: u32) -> L::Ints;

    /// Asks for a group that will be read soon.
    fn prefetch<L: Lanes>(panel: *const u8, inputs: usize, group: usize);

    /// Scales and minima of a group.
    ///
    /// # Safety
    /// The processor has the instructions of `L`; the panel has this group.
    unsafe fn scales<L: Lanes>(panel: *const u8, group: usize) -> (L, L);
}

impl Q8 {
    /// Where the integers begin.
    #[inline(always)]
    pub(super) fn integers(inputs: usize) -> usize {
        (inputs.div_ceil(GROUP) * LANES * 2).next_multiple_of(WORD_LINE)
    }
}

impl Groups for Q8 {
    const MINIMA: bool = false;

    #[inline(always)]
    unsafe fn start<L: Lanes>(offset: *const i32) -> L::Ints {
        // SAFETY: the instruction set and the pointer, by contract.
        unsafe { L::start(*offset) }
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(panel: *const u8, inputs: usize, group: usize, pair: usize) -> (L::Bytes, L::Bytes) {
        // SAFETY: both words lie in the panel.
        unsafe {
            let from = panel.add(Self::integers(inputs) + (group * GROUP_WORDS + 2 * pair) * WORD_LINE);
            (L::load_bytes(from), L::load_bytes(from.add(WORD_LINE)))
        }
    }

    #[inline(always)]
    unsafe fn dot<L: Lanes>(sums: L::Ints, weights: L::Bytes, x: u32) -> L::Ints {
        // SAFETY: the instruction set, by contract; integers are -127..=127.
        unsafe { L::dot_bytes(sums, weights, x) }
    }

    #[inline(always)]
    fn prefetch<L: Lanes>(panel: *const u8, inputs: usize, group: usize) {
        let lines = panel.wrapping_add(Self::integers(inputs) + group * GROUP_WORDS * WORD_LINE);
        (0..GROUP_WORDS).for_each(|line| L::prefetch(lines.wrapping_add(line * WORD_LINE)));
        if group.is_multiple_of(2) {
            L::prefetch(panel.wrapping_add(group * LANES * 2));
        }
    }

    #[inline(always)]
    unsafe fn scales<L: Lanes>(panel: *const u8, group: usize) -> (L, L) {
        // SAFETY: the scales lie in the panel.
        unsafe { (L::widen_f16(panel.cast::<u16>().add(group * LANES)), L::splat(0.0)) }
    }
}

impl Q4 {
    /// Where the parts of a group begin.
    pub(super) const MINIMA: usize = LANES * 2;
    pub(super) const INTEGERS: usize = LANES * 4;
    pub(super) const GROUP_BYTES: usize = Self::INTEGERS + GROUP / 2 * LANES;
}

impl Groups for Q4 {
    const MINIMA: bool = true;

    #[inline(always)]
    unsafe fn start<L: Lanes>(_: *const i32) -> L::Ints {
        // SAFETY: the instruction set, by contract.
        unsafe { L::zero() }
    }

    #[inline(always)]
    unsafe fn load<L: Lanes>(panel: *const u8, _: usize, group: usize, pair: usize) -> (L::Bytes, L::Bytes) {
        // SAFETY: the line lies in the panel.
        unsafe { L::load_nibbles(panel.add(group * Self::GROUP_BYTES + Self::INTEGERS + pair * WORD_LINE)) }
    }

    #[inline(always)]
    unsafe fn dot<L: Lanes>(sums: L::Ints, weights: L::Bytes, x: u32) -> L::Ints {
        // SAFETY: the instruction set, by contract; a nibble is at most 15.
        unsafe { L::dot_nibbles(sums, weights, x) }
    }

    #[inline(always)]
    fn prefetch<L: Lanes>(panel: *const u8, _: usize, group: usize) {
        let lines = panel.wrapping_add(group * Self::GROUP_BYTES);
        (0..Self::GROUP_BYTES).step_by(WORD_LINE).for_each(|at| L::prefetch(lines.wrapping_add(at)));
    }

    #[inline(always)]
    unsafe fn scales<L: Lanes>(panel: *const u8, group: usize) -> (L, L) {
        // SAFETY: scales and minima lie in the panel.
        unsafe {
            let from = panel.add(group * Self::GROUP_BYTES);
            (L::widen_f16(from.cast()), L::widen_f16(from.add(<Self>::MINIMA).cast()))
        }
    }
}
