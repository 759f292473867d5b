//! Sixteen lanes: the vocabulary in which every kernel is written once, for all instruction sets.
#![allow(unsafe_code)]

use crate::rounding::activation_scale;

/// Outputs of a panel, tokens of a KV block, columns of a vector: everything is cut into sixteens.
pub(super) const LANES: usize = 16;

/// `1.5 * 2^23`: adding it leaves the rounded integer in the low bits of the mantissa.
pub(super) const ROUND: f32 = 12_582_912.0;

/// Sixteen f32.
///
/// # Safety
/// Every method may use the instructions of its implementation: callers run on a processor that has them, and inside a function
/// compiled for them (the wrappers in [`super::isa`]), into which these inline. Pointers must be valid for sixteen numbers of their type
/// (`load_pairs`: thirty-two; `load_bytes` and `load_nibbles`: sixty-four bytes); no alignment is needed.
pub(super) trait Lanes: Copy {
    /// Sixteen pairs of bfloat16: two inputs of each output.
    type Pairs: Copy;
    /// Sixteen fours of unsigned bytes: four inputs of each output.
    type Bytes: Copy;
    /// Sixteen 32-bit sums.
    type Ints: Copy;
    /// Pairs of bfloat16 are multiplied by one instruction. Where there is none, activations of pairs are f32, a word each.
    const PAIRS: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, rounded once where the processor can.
    unsafe fn fma(self, factor: Self, addend: Self) -> Self;
    /// At least `floor`; NaN stays NaN.
    unsafe fn at_least(self, floor: Self) -> Self;
    /// At most `ceiling`; NaN stays NaN.
    unsafe fn at_most(self, ceiling: Self) -> Self;
    /// The first `count <= 16` lanes, and those of `rest` behind them.
    unsafe fn first(self, count: usize, rest: Self) -> Self;
    /// Zero where a lane is less than `floor`; NaN stays NaN.
    unsafe fn zero_below(self, floor: Self) -> Self;
    /// The largest lane, if none is NaN.
    unsafe fn largest(self) -> f32;
    /// The largest magnitude of both, or NaN if one of them is.
    unsafe fn largest_magnitude(self, other: Self) -> f32;
    /// The sum of lanes whose sums are exact in any order, as those of small integers are.
    #[inline(always)]
    unsafe fn exact_sum(self) -> f32 {
        // SAFETY: as for the trait.
        unsafe { sum(self) }
    }
    /// `2^n` where the low nine bits of each lane's representation hold n.
    unsafe fn power_of_two(self) -> Self;
    /// The low byte of each lane's representation.
    unsafe fn store_low_bytes(self, to: *mut u8);
    /// The nearest bfloat16, ties to even; NaN stays NaN.
    unsafe fn store_bf16(self, to: *mut u16);
    unsafe fn widen_f16(from: *const u16) -> Self;

    unsafe fn load_pairs(from: *const u16) -> Self::Pairs;
    /// `self + first * x.first + second * x.second`, where x is one pair of bfloat16. Only with [`Lanes::PAIRS`].
    unsafe fn dot_pairs(self, _weights: Self::Pairs, _x: u32) -> Self {
        unreachable!("no instruction for pairs")
    }
    /// The first and the second numbers of pairs.
    unsafe fn halves(pairs: Self::Pairs) -> (Self, Self);

    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    /// The low and the high halves of sixty-four bytes.
    unsafe fn load_nibbles(from: *const u8) -> (Self::Bytes, Self::Bytes);
    /// Sums of nothing.
    unsafe fn zero() -> Self::Ints;
    /// What sums of [`Lanes::dot_bytes`] start from, where `offset` is -128 times the sum of all x.
    unsafe fn start(offset: i32) -> Self::Ints;
    /// Adds (w - 128) x, where x is four signed bytes; `w >= 1`.
    unsafe fn dot_bytes(sums: Self::Ints, weights: Self::Bytes, x: u32) -> Self::Ints;
    /// What sums of [`Lanes::dot_each`] start from: [`Lanes::start`] with an offset for each lane.
    unsafe fn start_each(offsets: *const i32) -> Self::Ints;
    /// [`Lanes::dot_bytes`] turned around: one weight of four bytes, and four signed bytes for each lane.
    unsafe fn dot_each(sums: Self::Ints, weight: u32, x: Self::Bytes) -> Self::Ints;
    /// Adds w x, where `w <= 15`.
    unsafe fn dot_nibbles(sums: Self::Ints, weights: Self::Bytes, x: u32) -> Self::Ints;
    unsafe fn from_ints(sums: Self::Ints) -> Self;

    /// Asks for the cache line at an address, if the processor takes such wishes. Safe for any address.
    fn prefetch(_at: *const u8) {}
}

/// e^x within 2 ulp for -87 <= x <= 88; beyond, the value at the border. NaN stays NaN. (Cephes' expf: one reduction, one polynomial.)
///
/// It is one long chain, of which a processor keeps few under way at a time: several go step by step together.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes, const N: usize>(x: [L; N]) -> [L; N] {
    // SAFETY: only lane arithmetic; the caller vouches for the instruction set.
    unsafe {
        let (mut x, mut shifted, mut y) = (x, x, [L::splat(1.987_569_1e-4); N]);
        for x in &mut x {
            *x = x.at_least(L::splat(-87.0)).at_most(L::splat(88.0));
        }
        for i in 0..N {
            shifted[i] = x[i].fma(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND));
        }
        // ln 2 in two parts, the first with so few bits that n times it is exact
        for part in [-0.693_359_4, 2.121_944_4e-4] {
            for i in 0..N {
                x[i] = shifted[i].sub(L::splat(ROUND)).fma(L::splat(part), x[i]);
            }
        }
        for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            for i in 0..N {
                y[i] = y[i].fma(x[i], L::splat(coefficient));
            }
        }
        for i in 0..N {
            y[i] = y[i].fma(x[i].mul(x[i]), x[i]).add(L::splat(1.0));
        }
        for i in 0..N {
            y[i] = y[i].mul(shifted[i].power_of_two());
        }
        y
    }
}

/// The weight of a score that is `x <= 0` more than the largest: e^x, and zero below 1e-26, which no sum that has the largest in it would show. So small a
/// weight times a value can be a number without its leading bit, and sums of those take a hundred times as long on some processors.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn weight<L: Lanes>(x: L) -> L {
    // SAFETY: only lane arithmetic; the caller vouches for the instruction set.
    unsafe { exp([x])[0].zero_below(L::splat(1e-26)) }
}

/// `x / (1 + e^-x)`
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn silu<L: Lanes, const N: usize>(x: [L; N]) -> [L; N] {
    // SAFETY: only lane arithmetic; the caller vouches for the instruction set.
    unsafe {
        let mut y = x;
        for i in 0..N {
            y[i] = L::splat(0.0).sub(x[i]);
        }
        y = exp(y);
        for i in 0..N {
            y[i] = x[i].div(L::splat(1.0).add(y[i]));
        }
        y
    }
}

/// The sum of the lanes, always in the same tree.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn sum<L: Lanes>(x: L) -> f32 {
    let mut lanes = [0f32; LANES];
    // SAFETY: `lanes` holds sixteen numbers.
    unsafe { x.store(lanes.as_mut_ptr()) };
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
    }
    lanes[0]
}

/// Thirty-two numbers as 8-bit integers with one scale, and the sum of the integers.
///
/// # Safety
/// As for [`Lanes`], with `x` and `to` valid for thirty-two numbers.
#[inline(always)]
pub(super) unsafe fn quantize<L: Lanes>(x: *const f32, to: *mut u8) -> (f32, f32) {
    // SAFETY: thirty-two of each by contract.
    unsafe {
        let (low, high) = (L::load(x), L::load(x.add(LANES)));
        let (inverse, scale) = activation_scale(low.largest_magnitude(high));
        let (inverse, round) = (L::splat(inverse), L::splat(ROUND));
        // Not fused: the same integers on every instruction set.
        let (low, high) = (low.mul(inverse).add(round), high.mul(inverse).add(round));
        low.store_low_bytes(to);
        high.store_low_bytes(to.add(LANES));
        (scale, low.sub(round).add(high.sub(round)).exact_sum())
    }
}

/// `count <= 16` numbers, zeros behind them.
///
/// # Safety
/// As for [`Lanes`], but `from` need only be valid for `count` numbers.
#[inline(always)]
pub(super) unsafe fn load_partial<L: Lanes>(from: *const f32, count: usize) -> L {
    // SAFETY: `from` is valid for `count` numbers; the copy is bounded by both sides.
    unsafe {
        if count == LANES {
            return L::load(from);
        }
        let mut lanes = [0f32; LANES];
        std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), count.min(LANES));
        L::load(lanes.as_ptr())
    }
}

/// Stores the first `count <= 16` lanes.
///
/// # Safety
/// As for [`Lanes`], but `to` need only be valid for `count` numbers.
#[inline(always)]
pub(super) unsafe fn store_partial<L: Lanes>(x: L, to: *mut f32, count: usize) {
    // SAFETY: `to` is valid for `count` numbers; the copy is bounded by both sides.
    unsafe {
        if count == LANES {
            return x.store(to);
        }
        let mut lanes = [0f32; LANES];
        x.store(lanes.as_mut_ptr());
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, count.min(LANES));
    }
}
