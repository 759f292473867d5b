//! Any processor: arrays of sixteen, which the compiler turns into whatever vectors the target has.
#![allow(unsafe_code)]

use half::{bf16, f16};

use crate::cpu::lanes::{LANES, Lanes};

/// Sixteen f32 as an array.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] = f(self.0[i], other.0[i]);
        }
        out
    }
}

/// Fused only where that is one instruction: elsewhere `mul_add` is a slow call.
#[inline(always)]
fn multiply_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

// SAFETY of the pointer reads and writes below: the trait's contract.
impl Lanes for Portable {
    type Pairs = [u32; LANES];
    type Bytes = [u8; 4 * LANES];
    type Ints = [i32; LANES];
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: valid for sixteen numbers by contract.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: valid for sixteen numbers by contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        let mut out = self;
        for i in 0..LANES {
            out.0[i] = multiply_add(self.0[i], factor.0[i], addend.0[i]);
        }
        out
    }
    #[inline(always)]
    unsafe fn at_least(self, floor: Self) -> Self {
        self.zip(floor, |x, floor| if floor > x { floor } else { x })
    }
    #[inline(always)]
    unsafe fn at_most(self, ceiling: Self) -> Self {
        self.zip(ceiling, |x, ceiling| if ceiling < x { ceiling } else { x })
    }
    #[inline(always)]
    unsafe fn first(self, count: usize, rest: Self) -> Self {
        Self(std::array::from_fn(|i| if i < count { self.0[i] } else { rest.0[i] }))
    }
    #[inline(always)]
    unsafe fn zero_below(self, floor: Self) -> Self {
        self.zip(floor, |x, floor| if x < floor { 0.0 } else { x })
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, |largest, x| if x > largest { x } else { largest })
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        let mut out = self;
        for x in &mut out.0 {
            *x = f32::from_bits((x.to_bits() << 23).wrapping_add(0x3f80_0000));
        }
        out
    }
    #[inline(always)]
    unsafe fn largest_magnitude(self, other: Self) -> f32 {
        // As integers, magnitudes order like the numbers, and NaN comes last.
        let lanes = self.0.into_iter().chain(other.0);
        f32::from_bits(lanes.fold(0, |largest, x| largest.max(x.abs().to_bits())))
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut u8) {
        // SAFETY: valid for sixteen bytes by contract.
        unsafe { to.cast::<[u8; LANES]>().write_unaligned(self.0.map(|x| x.to_bits() as u8)) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: valid for sixteen numbers by contract.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(self.0.map(|x| bf16::from_f32(x).to_bits())) }
    }
    #[inline(always)]
    unsafe fn widen_f16(from: *const u16) -> Self {
        // SAFETY: valid for sixteen numbers by contract.
        Self(unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(|bits| f16::from_bits(bits).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> [u32; LANES] {
        // SAFETY: valid for thirty-two numbers by contract. The first of a pair lies in the low half, as in activations.
        let pairs = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        pairs.map(|[first, second]| u32::from(first) | u32::from(second) << 16)
    }
    #[inline(always)]
    unsafe fn halves(pairs: [u32; LANES]) -> (Self, Self) {
        (Self(pairs.map(|pair| f32::from_bits(pair << 16))), Self(pairs.map(|pair| f32::from_bits(pair & 0xffff_0000))))
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [u8; 4 * LANES] {
        // SAFETY: valid for sixty-four bytes by contract.
        unsafe { from.cast::<[u8; 4 * LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> ([u8; 4 * LANES], [u8; 4 * LANES]) {
        // SAFETY: valid for sixty-four bytes by contract.
        let both = unsafe { Self::load_bytes(from) };
        let (mut low, mut high) = (both, both);
        for i in 0..4 * LANES {
            low[i] &= 15;
            high[i] >>= 4;
        }
        (low, high)
    }
    #[inline(always)]
    unsafe fn zero() -> [i32; LANES] {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn start(offset: i32) -> [i32; LANES] {
        [offset; LANES]
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: [i32; LANES], weights: [u8; 4 * LANES], x: u32) -> [i32; LANES] {
        let x = x.to_ne_bytes().map(u8::cast_signed);
        let mut out = sums;
        for i in 0..LANES {
            for k in 0..4 {
                out[i] += i32::from(weights[4 * i + k]) * i32::from(x[k]);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn start_each(offsets: *const i32) -> [i32; LANES] {
        // SAFETY: valid for sixteen numbers by contract.
        unsafe { offsets.cast::<[i32; LANES]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn dot_each(sums: [i32; LANES], weight: u32, x: [u8; 4 * LANES]) -> [i32; LANES] {
        let (weight, x) = (weight.to_ne_bytes(), x.map(u8::cast_signed));
        let mut out = sums;
        for i in 0..LANES {
            for k in 0..4 {
                out[i] += i32::from(weight[k]) * i32::from(x[4 * i + k]);
            }
        }
        out
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: [i32; LANES], weights: [u8; 4 * LANES], x: u32) -> [i32; LANES] {
        // SAFETY: no instructions beyond the target's.
        unsafe { Self::dot_bytes(sums, weights, x) }
    }
    #[inline(always)]
    unsafe fn from_ints(sums: [i32; LANES]) -> Self {
        Self(sums.map(|sum| sum as f32))
    }
}

super::kernels!(Portable, wide: false);
