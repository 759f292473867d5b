//! Sixteen f32 lanes: the vocabulary in which every kernel is written once, for all instruction sets.
#![allow(unsafe_code)]

/// Outputs of a panel, tokens of a KV block, columns of a vector: everything is cut into sixteens.
pub(super) const LANES: usize = 16;

/// `1.5 * 2^23`: adding it leaves the rounded integer in the low bits of the mantissa.
const ROUND: f32 = 12_582_912.0;

/// Sixteen f32.
///
/// # Safety
/// Every method may use the instructions of its implementation: callers run on a processor that has them, and inside a function
/// compiled for them (the wrappers in [`super::isa`]), into which these inline. Pointers must be valid for sixteen numbers of their type
/// (`widen_bf16`: thirty-two); no alignment is needed.
pub(super) trait Lanes: Copy {
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
    /// The largest lane, if none is NaN.
    unsafe fn largest(self) -> f32;
    /// `2^n` where the low nine bits of each lane's representation hold n.
    unsafe fn power_of_two(self) -> Self;
    /// Sixteen pairs of bfloat16: the first and the second of each.
    unsafe fn widen_bf16(from: *const u16) -> (Self, Self);
    /// Sixteen 8-bit integers.
    unsafe fn widen_i8(from: *const i8) -> Self;
}

/// e^x within 2 ulp for -87 <= x <= 88; beyond, the value at the border. NaN stays NaN. (Cephes' expf: one reduction, one polynomial.)
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: only lane arithmetic; the caller vouches for the instruction set.
    unsafe {
        let x = x.at_least(L::splat(-87.0)).at_most(L::splat(88.0));
        let shifted = x.fma(L::splat(std::f32::consts::LOG2_E), L::splat(ROUND));
        let n = shifted.sub(L::splat(ROUND));
        // ln 2 in two parts, the first with so few bits that n times it is exact
        let r = n.fma(L::splat(-0.693_359_4), x);
        let r = n.fma(L::splat(2.121_944_4e-4), r);
        let mut y = L::splat(1.987_569_1e-4);
        for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            y = y.fma(r, L::splat(coefficient));
        }
        let y = y.fma(r.mul(r), r).add(L::splat(1.0));
        y.mul(shifted.power_of_two())
    }
}

/// `x / (1 + e^-x)`
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub(super) unsafe fn silu<L: Lanes>(x: L) -> L {
    // SAFETY: only lane arithmetic; the caller vouches for the instruction set.
    unsafe { x.div(L::splat(1.0).add(exp(L::splat(0.0).sub(x)))) }
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
