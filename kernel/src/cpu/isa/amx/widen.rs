//! Weights as tiles take them: see [`super`] for how.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::f16;

use super::{Avx512, ROWS, TILE};
use crate::{
    cpu::{
        format::{self, Groups, WORD_LINE},
        isa::WidenedGroup,
        lanes::{LANES, Lanes},
    },
    rounding::{GROUP, Layout},
};

/// A layout of weights.
pub(super) trait Source {
    /// Its groups have to be widened.
    const WIDENS: bool;
    /// Scales and minima of a group, each twice.
    type Scales: Copy;

    /// Of a group.
    ///
    /// # Safety
    /// The processor has the instruction set; the panel has the group.
    unsafe fn scales(panel: *const u8, group: usize) -> Self::Scales;

    /// Four lines of a group: pairs of inputs `8 eight` + (0, 2), (4, 6), (1, 3) and (5, 7).
    ///
    /// # Safety
    /// As for [`Self::scales`], of `inputs` in all.
    unsafe fn lines(panel: *const u8, inputs: usize, group: usize, eight: usize, scales: Self::Scales) -> [__m512i; 4];

    /// Asks for a group that will be read soon.
    fn prefetch(panel: *const u8, inputs: usize, group: usize);
}

/// Panels that lie as tiles do.
pub(super) struct Bf16;
/// 8-bit integers with scales.
pub(super) struct Q8;
/// 4-bit integers with scales and minima.
pub(super) struct Q4;

impl Source for Bf16 {
    const WIDENS: bool = false;
    type Scales = ();

    #[inline(always)]
    unsafe fn scales(_: *const u8, _: usize) {}

    #[inline(always)]
    unsafe fn lines(_: *const u8, _: usize, _: usize, _: usize, (): ()) -> [__m512i; 4] {
        unreachable!("panels of bfloat16 lie as tiles do")
    }

    #[inline(always)]
    fn prefetch(panel: *const u8, _: usize, group: usize) {
        let lines = panel.wrapping_add(group * TILE);
        (0..ROWS).for_each(|line| prefetch(lines.wrapping_add(line * WORD_LINE)));
    }
}

impl Source for Q8 {
    const WIDENS: bool = true;
    type Scales = __m512h;

    #[inline(always)]
    unsafe fn scales(panel: *const u8, group: usize) -> __m512h {
        // SAFETY: the caller's contract.
        unsafe {
            let scales = _mm256_loadu_si256(panel.cast::<u16>().add(group * LANES).cast());
            _mm512_mul_ph(twice(_mm512_castsi256_si512(scales), 0), splat(1024.0))
        }
    }

    #[inline(always)]
    unsafe fn lines(panel: *const u8, inputs: usize, group: usize, eight: usize, scale: __m512h) -> [__m512i; 4] {
        // SAFETY: the caller's contract.
        unsafe {
            let words = panel.add(format::Q8::integers(inputs) + (group * (GROUP / 4) + 2 * eight) * WORD_LINE);
            let (low, high) = (_mm512_loadu_si512(words.cast()), _mm512_loadu_si512(words.add(WORD_LINE).cast()));
            [
                Self::numbers(low, scale),
                Self::numbers(high, scale),
                Self::numbers(_mm512_srli_epi16::<8>(low), scale),
                Self::numbers(_mm512_srli_epi16::<8>(high), scale),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(panel: *const u8, inputs: usize, group: usize) {
        <format::Q8 as Groups>::prefetch::<Avx512<true>>(panel, inputs, group);
    }
}

impl Q8 {
    /// Of the low byte of each sixteen bits: `1024 + (int + 128)`, exactly, and what is left of it.
    #[inline(always)]
    unsafe fn numbers(bytes: __m512i, scale: __m512h) -> __m512i {
        // SAFETY: AVX-512 F and FP16 by the caller's contract.
        unsafe {
            let (byte, above) = (_mm512_set1_epi16(0xff), _mm512_set1_epi16(0x6400));
            let shifted = _mm512_castsi512_ph(_mm512_ternarylogic_epi64::<AND_OR>(bytes, byte, above));
            narrow(_mm512_mul_ph(_mm512_sub_ph(shifted, splat(1152.0)), scale))
        }
    }
}

impl Source for Q4 {
    const WIDENS: bool = true;
    type Scales = (__m512h, __m512h);

    #[inline(always)]
    unsafe fn scales(panel: *const u8, group: usize) -> Self::Scales {
        // SAFETY: the caller's contract.
        unsafe {
            let both = _mm512_loadu_si512(panel.add(group * format::Q4::GROUP_BYTES).cast());
            let (scale, min) = (twice(both, 0), twice(both, LANES as i16));
            // What `numbers` has too much is taken from the minimum.
            let min = _mm512_mul_ph(_mm512_fnmadd_ph(scale, splat(16.0), min), splat(1024.0));
            (_mm512_mul_ph(scale, splat(16_384.0)), min)
        }
    }

    #[inline(always)]
    unsafe fn lines(panel: *const u8, _: usize, group: usize, eight: usize, scales: Self::Scales) -> [__m512i; 4] {
        // SAFETY: the caller's contract.
        unsafe {
            let from = panel.add(group * format::Q4::GROUP_BYTES + format::Q4::INTEGERS + eight * WORD_LINE);
            let words = _mm512_loadu_si512(from.cast());
            [
                Self::numbers(_mm512_slli_epi16::<6>(words), scales),
                Self::numbers(_mm512_slli_epi16::<2>(words), scales),
                Self::numbers(_mm512_srli_epi16::<2>(words), scales),
                Self::numbers(_mm512_srli_epi16::<6>(words), scales),
            ]
        }
    }

    #[inline(always)]
    fn prefetch(panel: *const u8, inputs: usize, group: usize) {
        <format::Q4 as Groups>::prefetch::<Avx512<true>>(panel, inputs, group);
    }
}

impl Q4 {
    /// Of nibbles in the upper bits of a mantissa: `(1 + q / 16) scale + min`.
    #[inline(always)]
    unsafe fn numbers(nibbles: __m512i, (scale, min): (__m512h, __m512h)) -> __m512i {
        // SAFETY: AVX-512 F and FP16 by the caller's contract.
        unsafe {
            let (nibble, one) = (_mm512_set1_epi16(0x03c0), _mm512_set1_epi16(0x3c00));
            let mantissa = _mm512_castsi512_ph(_mm512_ternarylogic_epi64::<AND_OR>(nibbles, nibble, one));
            narrow(_mm512_fmadd_ph(mantissa, scale, min))
        }
    }
}

/// `a & b | c`, as a table of three inputs.
const AND_OR: i32 = 0xea;

/// Thirty-two times a number that is a whole f16.
#[inline(always)]
unsafe fn splat(number: f32) -> __m512h {
    // SAFETY: AVX-512 F and BW by the caller's contract.
    unsafe { _mm512_castsi512_ph(_mm512_set1_epi16(f16::from_f32_const(number).to_bits().cast_signed())) }
}

/// Sixteen f16 from the `first` on, each twice.
#[inline(always)]
unsafe fn twice(numbers: __m512i, first: i16) -> __m512h {
    // SAFETY: AVX-512 F and BW by the caller's contract.
    unsafe {
        // Pair i reads number i.
        let pairs = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let pairs = _mm512_add_epi16(_mm512_or_si512(pairs, _mm512_slli_epi32::<16>(pairs)), _mm512_set1_epi16(first));
        _mm512_castsi512_ph(_mm512_permutexvar_epi16(pairs, numbers))
    }
}

/// The nearest bfloat16, ties away from zero, with the exponents of f16.
#[inline(always)]
unsafe fn narrow(numbers: __m512h) -> __m512i {
    // SAFETY: AVX-512 F and BW by the caller's contract.
    unsafe {
        let bits = _mm512_add_epi16(_mm512_castph_si512(numbers), _mm512_set1_epi16(4));
        _mm512_and_si512(_mm512_srai_epi16::<3>(bits), _mm512_set1_epi16(0x8fff_u16.cast_signed()))
    }
}

/// Asks for a cache line.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    <Avx512<true> as Lanes>::prefetch(at);
}

/// Writes the lines of a group of P panels, each from the next place on.
#[inline(always)]
pub(super) unsafe fn widen<S: Source, const P: usize>(
    inputs: usize,
    panels: [*const u8; P],
    group: usize,
    to: *mut u8,
    stride: usize,
) {
    for (number, panel) in panels.into_iter().enumerate() {
        // SAFETY: the contract of `multiply`, of which this is a part; places are tiles on cache lines.
        unsafe {
            let (scales, to) = (S::scales(panel, group), to.add(number * stride));
            for eight in 0..GROUP / 8 {
                let lines = S::lines(panel, inputs, group, eight, scales);
                for (line, numbers) in lines.into_iter().enumerate() {
                    _mm512_store_si512(to.add((4 * eight + line) * WORD_LINE).cast(), numbers);
                }
            }
        }
    }
}

/// See [`crate::cpu::isa::Widen`].
#[inline(always)]
pub(super) unsafe fn widen_group(layout: Layout, panel: *const u8, inputs: usize, group: usize, to: &mut WidenedGroup) {
    let to = std::ptr::from_mut(to).cast::<u8>();
    // SAFETY: the caller's contract; `to` is a tile on a cache line.
    unsafe {
        if layout == Layout::Q4 {
            widen::<Q4, 1>(inputs, [panel], group, to, 0);
        } else {
            widen::<Q8, 1>(inputs, [panel], group, to, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{super::KERNELS, *};
    use crate::{
        cpu::{
            Isa,
            format::{pack_q4, pack_q8},
        },
        rounding::{Q4Block, Q8Block},
        suite::Random,
    };

    /// The nearest f16, ties to even: by way of an f32 that was rounded to odd, since `f16::from_f64` may round twice.
    fn round_f16(value: f64) -> f16 {
        let nearest = value as f32;
        if f64::from(nearest) == value {
            return f16::from_f32(nearest);
        }
        let too_large = f64::from(nearest).abs() > value.abs();
        f16::from_f32(f32::from_bits((nearest.to_bits() - u32::from(too_large)) | 1))
    }

    /// The weight of an f16 that is 2^10 times as large: the nearest bfloat16, ties away from zero.
    fn nearest(large: f16) -> f32 {
        let bits = (u32::from(large.to_bits() & 0x7fff) + 4) >> 3 | u32::from(large.to_bits() >> 15) << 15;
        bf16::from_bits(bits as u16).to_f32() * f32::from_bits((127 + 112 - 10) << 23)
    }

    fn widened(layout: Layout, panel: &[u8], inputs: usize) -> Vec<f32> {
        let mut group = WidenedGroup::default();
        let mut weights = vec![0f32; LANES * inputs];
        for first in (0..inputs).step_by(GROUP) {
            // SAFETY: this processor has tiles; the panel was packed with so many inputs.
            unsafe { (KERNELS.widen.unwrap())(layout, panel.as_ptr(), inputs, first / GROUP, &mut group) };
            for (output, row) in weights.chunks_mut(inputs).enumerate() {
                (0..GROUP).for_each(|k| row[first + k] = group.weight(output, k));
            }
        }
        weights
    }

    /// Scales from the smallest f16 to a quarter.
    fn scale(random: &mut Random) -> f16 {
        f16::from_bits(1 + random.below(13_000) as u16)
    }

    #[test]
    fn integers_become_the_nearest_bfloat16_of_an_f16() {
        if !Isa::available().contains(&Isa::Amx) {
            return;
        }
        let (mut random, inputs) = (Random(1), 64);
        for _ in 0..200 {
            let blocks: Vec<Q8Block> = (0..LANES * inputs / GROUP)
                .map(|_| Q8Block { scale: scale(&mut random), ints: std::array::from_fn(|_| random.below(255) as i8) })
                .map(|block| Q8Block { ints: block.ints.map(|int| int.max(-127)), ..block })
                .collect();
            let mut panel = vec![0; Layout::Q8.panel_bytes(inputs)];
            pack_q8(&blocks, inputs, &mut panel);
            let got = widened(Layout::Q8, &panel, inputs);
            for (i, got) in got.iter().enumerate() {
                let (block, k) = (&blocks[i / GROUP], i % GROUP);
                let exact = block.scale.to_f64() * f64::from(block.ints[k]);
                assert_eq!(*got, nearest(round_f16(1024.0 * exact)), "{block:?} {k}");
                assert!((f64::from(*got) - exact).abs() <= exact.abs() * (1.0 / 256.0 + 1.0 / 2048.0), "{block:?} {k}");
            }
        }
    }

    #[test]
    fn nibbles_become_the_nearest_bfloat16_of_an_f16() {
        if !Isa::available().contains(&Isa::Amx) {
            return;
        }
        let (mut random, inputs) = (Random(2), 64);
        for _ in 0..200 {
            let block = |random: &mut Random| {
                let scale = scale(random);
                let min = f16::from_f32(scale.to_f32() * 17.0 * random.unit());
                Q4Block { scale, min, ints: std::array::from_fn(|_| random.below(16) as u8) }
            };
            let blocks: Vec<Q4Block> = (0..LANES * inputs / GROUP).map(|_| block(&mut random)).collect();
            let mut panel = vec![0; Layout::Q4.panel_bytes(inputs)];
            pack_q4(&blocks, inputs, &mut panel);
            let got = widened(Layout::Q4, &panel, inputs);
            for (i, got) in got.iter().enumerate() {
                let (Q4Block { scale, min, ints }, k) = (&blocks[i / GROUP], i % GROUP);
                let (scale, min, int) = (scale.to_f64(), min.to_f64(), f64::from(ints[k]));
                let below = round_f16(min - 16.0 * scale).to_f64();
                let want = nearest(round_f16(1024.0 * ((16.0 + int) * scale + below)));
                assert_eq!(*got, want, "{scale} {min} {int}");
                // Half of a bfloat16's last bit and half of an f16's, and what the minimum lost, whose factor is up to 33.
                let exact = scale * int + min;
                let most = exact.abs() * (1.0 / 256.0 + 1.0 / 2048.0) + 33.0 * scale / 2048.0;
                assert!((f64::from(*got) - exact).abs() <= most, "{scale} {min} {int}: {got}");
            }
        }
    }
}
