//! x86-64 with AVX2, FMA and F16C, and AVX-VNNI if there is: sixteen lanes are two registers.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::bf16;

use crate::cpu::lanes::{LANES, Lanes};

/// Sixteen f32 in two 256-bit registers; with or without dot products of bytes.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(__m256, __m256);

/// Two 256-bit registers of integers.
type Halves = (__m256i, __m256i);

/// Adds sums of four products of bytes, the weights below 128 in magnitude: pairs of products then fit 16 bits.
///
/// # Safety
/// AVX2.
#[inline(always)]
unsafe fn add_products(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: AVX2 by contract.
    unsafe {
        let pairs = _mm256_maddubs_epi16(unsigned, signed);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

impl<const VNNI: bool> Avx2<VNNI> {
    /// Adds (w - 128) x to eight sums; with VNNI w x, as the sums have started from what the 128 adds.
    ///
    /// # Safety
    /// AVX2, and AVX-VNNI if we say so.
    #[inline(always)]
    unsafe fn dot_half(sums: __m256i, weights: __m256i, x: __m256i) -> __m256i {
        // SAFETY: the caller's contract.
        unsafe {
            if VNNI {
                return _mm256_dpbusd_avx_epi32(sums, weights, x);
            }
            // The unsigned factor is the weight's magnitude, its sign goes to x.
            let weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
            add_products(sums, _mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))
        }
    }
}

// SAFETY of every block below: the trait's contract gives the instruction set and the pointers.
impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type Pairs = Halves;
    type Bytes = Halves;
    type Ints = Halves;
    const PAIRS: bool = false;

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
    unsafe fn first(self, count: usize, rest: Self) -> Self {
        // SAFETY: AVX2 by contract.
        unsafe {
            let count = _mm256_set1_epi32(count as i32);
            let half = |x: __m256, rest: __m256, lanes: __m256i| {
                _mm256_blendv_ps(rest, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(count, lanes)))
            };
            let low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let high = _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15);
            Self(half(self.0, rest.0, low), half(self.1, rest.1, high))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(self, floor: Self) -> Self {
        // SAFETY: AVX by contract.
        unsafe {
            let half = |x: __m256, floor: __m256| _mm256_and_ps(x, _mm256_cmp_ps::<_CMP_NLT_UQ>(x, floor));
            Self(half(self.0, floor.0), half(self.1, floor.1))
        }
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
    unsafe fn largest_magnitude(self, other: Self) -> f32 {
        // SAFETY: AVX2 by contract.
        unsafe {
            let magnitude = |x: __m256| _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(i32::MAX));
            // As integers, magnitudes order like the numbers, and NaN comes last.
            let both = |x: Self| _mm256_max_epi32(magnitude(x.0), magnitude(x.1));
            let eight = _mm256_max_epi32(both(self), both(other));
            let four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256::<1>(eight));
            let two = _mm_max_epi32(four, _mm_unpackhi_epi64(four, four));
            let one = _mm_max_epi32(two, _mm_shuffle_epi32::<1>(two));
            f32::from_bits(_mm_cvtsi128_si32(one).cast_unsigned())
        }
    }
    #[inline(always)]
    unsafe fn store_low_bytes(self, to: *mut u8) {
        // SAFETY: AVX2 and sixteen bytes by contract.
        unsafe {
            let low = |x: __m256| _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(255));
            let words = _mm256_packus_epi32(low(self.0), low(self.1));
            let bytes = _mm256_packus_epi16(words, words);
            let (low, high) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            _mm_storeu_si128(to.cast(), _mm_unpacklo_epi32(low, high));
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut u16) {
        let mut lanes = [0f32; LANES];
        // SAFETY: AVX2 and sixteen numbers by contract.
        unsafe {
            self.store(lanes.as_mut_ptr());
            for (i, lane) in lanes.iter().enumerate() {
                to.add(i).write_unaligned(bf16::from_f32(*lane).to_bits());
            }
        }
    }
    #[inline(always)]
    unsafe fn widen_f16(from: *const u16) -> Self {
        // SAFETY: F16C and sixteen numbers by contract.
        unsafe {
            let half = |from: *const u16| _mm256_cvtph_ps(_mm_loadu_si128(from.cast()));
            Self(half(from), half(from.add(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u16) -> Halves {
        // SAFETY: AVX2 and thirty-two numbers by contract.
        unsafe { Self::load_bytes(from.cast()) }
    }
    #[inline(always)]
    unsafe fn halves(pairs: Halves) -> (Self, Self) {
        // SAFETY: AVX2 by contract.
        unsafe {
            let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            let first = |pairs| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs));
            let second = |pairs| _mm256_castsi256_ps(_mm256_and_si256(pairs, upper));
            (Self(first(pairs.0), first(pairs.1)), Self(second(pairs.0), second(pairs.1)))
        }
    }
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Halves {
        // SAFETY: AVX2 and sixty-four bytes by contract.
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> (Halves, Halves) {
        // SAFETY: AVX2 and sixty-four bytes by contract.
        unsafe {
            let (both, mask) = (Self::load_bytes(from), _mm256_set1_epi8(15));
            let low = |x| _mm256_and_si256(x, mask);
            let high = |x| _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask);
            ((low(both.0), low(both.1)), (high(both.0), high(both.1)))
        }
    }
    #[inline(always)]
    unsafe fn zero() -> Halves {
        // SAFETY: AVX2 by contract.
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }
    #[inline(always)]
    unsafe fn start(offset: i32) -> Halves {
        // SAFETY: AVX2 by contract. Without VNNI dot_bytes takes the 128 from the weights itself.
        unsafe {
            let sums = _mm256_set1_epi32(if VNNI { offset } else { 0 });
            (sums, sums)
        }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: Halves, weights: Halves, x: u32) -> Halves {
        // SAFETY: AVX2, and AVX-VNNI if we say so, by contract.
        unsafe {
            let x = _mm256_set1_epi32(x.cast_signed());
            (Self::dot_half(sums.0, weights.0, x), Self::dot_half(sums.1, weights.1, x))
        }
    }
    #[inline(always)]
    unsafe fn start_each(offsets: *const i32) -> Halves {
        // SAFETY: AVX2 and sixteen numbers by contract.
        unsafe { if VNNI { Self::load_bytes(offsets.cast()) } else { Self::zero() } }
    }
    #[inline(always)]
    unsafe fn dot_each(sums: Halves, weight: u32, x: Halves) -> Halves {
        // SAFETY: AVX2, and AVX-VNNI if we say so, by contract.
        unsafe {
            let weight = _mm256_set1_epi32(weight.cast_signed());
            (Self::dot_half(sums.0, weight, x.0), Self::dot_half(sums.1, weight, x.1))
        }
    }
    #[inline(always)]
    unsafe fn dot_nibbles(sums: Halves, weights: Halves, x: u32) -> Halves {
        // SAFETY: AVX2, and AVX-VNNI if we say so, by contract.
        unsafe {
            if VNNI {
                return Self::dot_bytes(sums, weights, x);
            }
            let x = _mm256_set1_epi32(x.cast_signed());
            (add_products(sums.0, weights.0, x), add_products(sums.1, weights.1, x))
        }
    }
    #[inline(always)]
    unsafe fn from_ints(sums: Halves) -> Self {
        // SAFETY: AVX2 by contract.
        unsafe { Self(_mm256_cvtepi32_ps(sums.0), _mm256_cvtepi32_ps(sums.1)) }
    }
    #[inline(always)]
    fn prefetch(at: *const u8) {
        // SAFETY: SSE is part of every x86-64; a prefetch reads nothing that the program sees, and faults never.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

pub(super) mod plain {
    use super::Avx2;

    super::super::kernels!(Avx2<false>, wide: false, "avx,avx2,fma,f16c");
}

pub(super) mod vnni {
    use super::Avx2;

    super::super::kernels!(Avx2<true>, wide: false, "avx,avx2,fma,f16c,avxvnni");
}
