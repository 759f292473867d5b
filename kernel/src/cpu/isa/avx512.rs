//! x86-64 with AVX-512 F, BW, VL and VNNI, and BF16 if there is: sixteen lanes are one register.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::cpu::lanes::Lanes;

/// Sixteen f32 in one 512-bit register; with or without dot products of bfloat16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const BF16: bool>(__m512);

// SAFETY of every block below: the trait's contract gives the instruction set and the pointers.
impl<const BF16: bool> Lanes for Avx512<BF16> {
    type Pairs = __m512i;
    type Bytes = __m512i;
    type Ints = __m512i;
    const PAIRS: bool = BF16;

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
    unsafe fn first(self, count: usize, rest: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_mask_mov_ps(rest.0, ((1u32 << count) - 1) as u16, self.0) })
    }
    #[inline(always)]
    unsafe fn zero_below(self, floor: Self) -> Self {
        // SAFETY: AVX-512 F by contract.
        unsafe { Self(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(self.0, floor.0), self.0)) }
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
    unsafe fn exact_sum(self) -> f32 {
        // SAFETY: AVX-512 F by contract.
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn largest_magnitude(self, other: Self) -> f32 {
        // SAFETY: AVX-512 F by contract.
        unsafe {
            let magnitude = |x: __m512| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            // As integers, magnitudes order like the numbers, and NaN comes last.
            let largest = _mm512_reduce_max_epi32(_mm512_max_epi32(magnitude(self.0), magnitude(other.0)));
            f32::from_bits(largest.cast_unsigned())
        }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut u8) {
        // SAFETY: AVX-512 F and sixteen bytes by contract.
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(_mm512_castps_si512(self.0))) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        // SAFETY: AVX-512 F, BF16 if we say so, and sixteen numbers by contract.
        unsafe {
            let narrow = if BF16 {
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0))
            } else {
                // Half of the last bit that stays, less one where that bit is even; a NaN would overflow, and is made quiet instead.
                let bits = _mm512_castps_si512(self.0);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
                let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(self.0, self.0);
                let rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x0040_0000));
                _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded))
            };
            _mm256_storeu_si256(to.cast(), narrow);
        }
    }
    #[inline(always)]
    unsafe fn widen_f16(from: *const u16) -> Self {
        // SAFETY: AVX-512 F and sixteen numbers by contract.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> __m512i {
        // SAFETY: AVX-512 F and thirty-two numbers by contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, weights: __m512i, x: u32) -> Self {
        // SAFETY: AVX-512 BF16 by contract: it is only called if we say so.
        unsafe {
            let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x.cast_signed()));
            let weights = std::mem::transmute::<__m512i, __m512bh>(weights);
            Self(_mm512_dpbf16_ps(self.0, weights, x))
        }
    }
    #[inline(always)]
    unsafe fn halves(pairs: __m512i) -> (Self, Self) {
        // SAFETY: AVX-512 F by contract.
        unsafe {
            let second = _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff_0000_u32.cast_signed()));
            (Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs))), Self(_mm512_castsi512_ps(second)))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        // SAFETY: AVX-512 F and sixty-four bytes by contract.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> (__m512i, __m512i) {
        // SAFETY: AVX-512 BW and sixty-four bytes by contract.
        unsafe {
            let (both, low) = (_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(15));
            (_mm512_and_si512(both, low), _mm512_and_si512(_mm512_srli_epi16::<4>(both), low))
        }
    }
    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: AVX-512 F by contract.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn start(offset: i32) -> __m512i {
        // SAFETY: AVX-512 F by contract.
        unsafe { _mm512_set1_epi32(offset) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: __m512i, weights: __m512i, x: u32) -> __m512i {
        // SAFETY: AVX-512 VNNI by contract.
        unsafe { _mm512_dpbusd_epi32(sums, weights, _mm512_set1_epi32(x.cast_signed())) }
    }
    #[inline(always)]
    unsafe fn start_each(offsets: *const i32) -> __m512i {
        // SAFETY: AVX-512 F and sixteen numbers by contract.
        unsafe { _mm512_loadu_si512(offsets.cast()) }
    }
    #[inline(always)]
    unsafe fn dot_each(sums: __m512i, weight: u32, x: __m512i) -> __m512i {
        // SAFETY: AVX-512 VNNI by contract.
        unsafe { _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(weight.cast_signed()), x) }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: __m512i, weights: __m512i, x: u32) -> __m512i {
        // SAFETY: AVX-512 VNNI by contract.
        unsafe { Self::dot_bytes(sums, weights, x) }
    }
    #[inline(always)]
    unsafe fn from_ints(sums: __m512i) -> Self {
        // SAFETY: AVX-512 F by contract.
        Self(unsafe { _mm512_cvtepi32_ps(sums) })
    }
    #[inline(always)]
    fn prefetch(at: *const u8) {
        // SAFETY: SSE is part of every x86-64; a prefetch reads nothing that the program sees, and faults never.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

pub(super) mod vnni {
    use super::Avx512;

    super::super::kernels!(Avx512<false>, wide: true, "avx512f,avx512bw,avx512vl,avx512vnni");
}

pub(super) mod with_bf16 {
    use super::Avx512;

    super::super::kernels!(Avx512<true>, wide: true, "avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16");
}
