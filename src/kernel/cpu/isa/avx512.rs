//! x86-64 with AVX-512 F: sixteen lanes are one register.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::kernel::cpu::lanes::Lanes;

/// Sixteen f32 in one 512-bit register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// SAFETY of every block below: the trait's contract gives the instruction set and the pointers.
impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: AVX-512 F and sixteen numbers by contract.
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: AVX-512 F and sixteen numbers by contract.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    // The instruction returns its second operand when either is NaN: hence the order.
    #[inline(always)]
    unsafe fn at_least(self, floor: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_max_ps(floor.0, self.0) })
    }
    #[inline(always)]
    unsafe fn at_most(self, ceiling: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_min_ps(ceiling.0, self.0) })
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: AVX-512 F by contract.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: AVX-512 F by contract.
        unsafe {
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3f80_0000))))
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(from: *const u16) -> (Self, Self) {
        // SAFETY: AVX-512 F and thirty-two numbers by contract.
        unsafe {
            let pairs = _mm512_loadu_si512(from.cast());
            let first = _mm512_slli_epi32::<16>(pairs);
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32 as i32));
            (Self(_mm512_castsi512_ps(first)), Self(_mm512_castsi512_ps(second)))
        }
    }
    #[inline(always)]
    unsafe fn widen_i8(from: *const i8) -> Self {
        // SAFETY: AVX-512 F and sixteen numbers by contract.
        Self(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) })
    }
}

super::kernels!(Avx512, rows: 12, panels: 2, few_panels: 4, "avx512f");
