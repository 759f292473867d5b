//! x86-64 with AVX2 and FMA: sixteen lanes are two registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::kernel::cpu::lanes::Lanes;

/// Sixteen f32 in two 256-bit registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

// SAFETY of every block below: the trait's contract gives the instruction set and the pointers.
impl Lanes for Avx2 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: AVX by contract.
        let half = unsafe { _mm256_set1_ps(value) };
        Self(half, half)
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: AVX and sixteen numbers by contract.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: AVX and sixteen numbers by contract.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    unsafe fn fma(self, factor: Self, addend: Self) -> Self {
        // SAFETY: FMA by contract.
        unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, addend.0), _mm256_fmadd_ps(self.1, factor.1, addend.1)) }
    }
    // The instruction returns its second operand when either is NaN: hence the order.
    #[inline(always)]
    unsafe fn at_least(self, floor: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_max_ps(floor.0, self.0), _mm256_max_ps(floor.1, self.1)) }
    }
    #[inline(always)]
    unsafe fn at_most(self, ceiling: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe { Self(_mm256_min_ps(ceiling.0, self.0), _mm256_min_ps(ceiling.1, self.1)) }
    }
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: AVX by contract.
        unsafe {
            let eight = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: AVX2 by contract.
        unsafe {
            let power = |x: __m256| {
                let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(x));
                _mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3f80_0000)))
            };
            Self(power(self.0), power(self.1))
        }
    }
    #[inline(always)]
    unsafe fn widen_bf16(from: *const u16) -> (Self, Self) {
        // SAFETY: AVX2 and thirty-two numbers by contract.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(16).cast()));
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let first = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            let second = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
            (Self(first(low), first(high)), Self(second(low), second(high)))
        }
    }
    #[inline(always)]
    unsafe fn widen_i8(from: *const i8) -> Self {
        // SAFETY: AVX2 and sixteen numbers by contract.
        unsafe {
            let half = |from: *const i8| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())));
            Self(half(from), half(from.add(8)))
        }
    }
}

super::kernels!(Avx2, rows: 6, panels: 1, few_panels: 2, "avx,avx2,fma");
