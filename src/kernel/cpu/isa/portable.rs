//! Any processor: arrays of sixteen, which the compiler turns into whatever vectors the target has.
#![allow(unsafe_code)]

use crate::kernel::cpu::lanes::{LANES, Lanes};

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
    unsafe fn widen_bf16(from: *const u16) -> (Self, Self) {
        // SAFETY: valid for thirty-two numbers by contract.
        let pairs = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        let (mut first, mut second) = ([0f32; LANES], [0f32; LANES]);
        for i in 0..LANES {
            first[i] = f32::from_bits(u32::from(pairs[i][0]) << 16);
            second[i] = f32::from_bits(u32::from(pairs[i][1]) << 16);
        }
        (Self(first), Self(second))
    }
    #[inline(always)]
    unsafe fn widen_i8(from: *const i8) -> Self {
        // SAFETY: valid for sixteen numbers by contract.
        let ints = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        Self(ints.map(f32::from))
    }
}

super::kernels!(Portable, rows: 2, panels: 1, few_panels: 1);
