//! x86-64 with AMX: tiles of bfloat16, sixteen rows by thirty-two inputs, beside AVX-512 with BF16 and FP16.
//!
//! A tile of activations is multiplied with a panel's next thirty-two inputs by one instruction, which adds to sixteen rows of sixteen f32 sums. Panels of
//! bfloat16 lie in memory as the instruction reads them. Those of integers are *widened* to the same form as they are multiplied, and kept for the rows that
//! follow: a weight is `scale q + min` in f16, 2^10 times as large, and then the nearest bfloat16. Nothing is scaled after a product, so that activations are
//! bfloat16 too and need no scales.
//!
//! The bits of an f16 without their last three are a bfloat16's, but for the exponent, which counts from 15 and not from 127: the number that they are read as is
//! 2^-112 times what it should be. Activations are 2^102 times as large for that, and nothing has to be done to exponents. The order of a panel's inputs is what
//! comes out of its bytes with the fewest shifts: the even ones of eight before the odd ones; activations are packed in that order.
//!
//! Which rows share a tile changes nothing in a row's bits: each sum is one chain over the groups of thirty-two inputs, and the instruction's own order
//! inside a group is fixed.
#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::*},
    sync::LazyLock,
};

use half::f16;

use super::{Kernels, Region, Tiling, WidenedGroup, avx512::Avx512, compile};
use crate::{
    cpu::{
        activations::Form,
        attention::SPAN_TOKENS,
        format::{self, Groups, WORD_LINE},
        lanes::LANES,
        tile::{Column, Left, Tiles, Values},
    },
    rounding::{GROUP, Layout},
};

/// Rows of a tile.
const ROWS: usize = 16;
/// Bytes of a tile: so many rows of a cache line.
const TILE: usize = ROWS * WORD_LINE;
/// Heights of what is multiplied at a time.
const HEIGHTS: [usize; 2] = [ROWS, 2 * ROWS];
/// Groups that are widened before they are multiplied, so that their lines have reached the cache; two took longer.
const EARLY: usize = 1;
/// So few rows are multiplied without tiles.
const FEW: usize = 2;
/// Widened groups of a panel that nobody keeps.
const RING: usize = 4;

/// The instruction set.
pub(super) struct Amx;

impl Tiling for Amx {
    type Lanes = Avx512<true>;
    const WIDE: bool = true;
    const FORM: Form = Form::Tiles;

    #[inline(always)]
    unsafe fn pack_line(layout: Layout, x: *const f32, line: *mut u32) {
        // SAFETY: AVX-512 F, BW and BF16, thirty-two numbers and sixteen words by contract.
        unsafe {
            let (mut low, mut high) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(LANES)));
            if layout == Layout::Bf16 {
                let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                return _mm512_storeu_si512(line.cast(), pairs);
            }
            let large = _mm512_set1_ps(f32::from_bits((127 + 102) << 23));
            (low, high) = (_mm512_mul_ps(without_dust(low), large), _mm512_mul_ps(without_dust(high), large));
            let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            // Of each eight numbers 0 2 4 6 1 3 5 7.
            let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            _mm512_storeu_si512(line.cast(), _mm512_shuffle_epi8(pairs, _mm512_broadcast_i32x4(order)));
        }
    }

    #[inline(always)]
    unsafe fn begin(region: Region) {
        let shapes = match region {
            Region::Products => &PRODUCTS,
            Region::Attention => &ATTENTION,
        };
        // SAFETY: the processor has tiles and the system lets us use them: `has_tiles`. The shapes are valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) shapes, options(nostack, preserves_flags, readonly)) }
    }

    #[inline(always)]
    unsafe fn end() {
        // SAFETY: as above. What the tiles held is nobody's any more.
        unsafe { asm!("tilerelease", options(nostack, preserves_flags, nomem)) }
    }
}

/// Zeros instead of numbers below 1e-20, so that no sum can be subnormal: see [`few`]. NaN stays NaN.
#[inline(always)]
unsafe fn without_dust(x: __m512) -> __m512 {
    // SAFETY: AVX-512 F by the caller's contract.
    unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(_mm512_abs_ps(x), _mm512_set1_ps(1e-20)), x) }
}

/// The shapes of all tiles, as the processor reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const fn shapes(row_bytes: [u16; 8], rows: [u8; 8]) -> Shapes {
    let mut shapes = Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        shapes.row_bytes[tile] = row_bytes[tile];
        shapes.rows[tile] = rows[tile];
        tile += 1;
    }
    shapes
}

/// Four tiles of sums, two of activations, two of weights.
static PRODUCTS: Shapes = shapes([64; 8], [16; 8]);
/// The second ones of activations and weights take the weights and values of sixteen tokens.
static ATTENTION: Shapes = shapes([64, 64, 64, 64, 64, 32, 64, 64], [16, 16, 16, 16, 16, 16, 16, 8]);

/// Has this processor tiles of bfloat16, and does the system let this process use them? It has to be asked once.
pub(super) fn has_tiles() -> bool {
    static ANSWER: LazyLock<bool> = LazyLock::new(|| {
        let tiles = 1 << 24 | 1 << 22; // AMX-TILE and AMX-BF16
        let leaves = __cpuid_count(0, 0).eax;
        leaves >= 7 && __cpuid_count(7, 0).edx & tiles == tiles && permitted()
    });
    *ANSWER
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes numbers only; it allows this process, and threads that it starts, to use tiles.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

// The tiles keep what they hold from one of these to the next: nothing else here is compiled for them, so that the compiler neither uses nor knows
// them. They read and write memory and are not moved across each other.

macro_rules! zero {
    ($tile:literal) => {
        asm!(concat!("tilezero tmm", $tile), options(nostack, preserves_flags))
    };
}

macro_rules! load {
    ($tile:literal, $from:expr, $stride:expr) => {
        asm!(
            concat!("tileloadd tmm", $tile, ", [{from} + {stride}*1]"),
            from = in(reg) $from,
            stride = in(reg) $stride,
            options(nostack, preserves_flags, readonly)
        )
    };
}

macro_rules! store {
    ($tile:literal, $to:expr) => {
        asm!(
            concat!("tilestored [{to} + {stride}*1], tmm", $tile),
            to = in(reg) $to,
            stride = in(reg) WORD_LINE,
            options(nostack, preserves_flags)
        )
    };
}

macro_rules! dot {
    ($sums:literal, $rows:literal, $weights:literal) => {
        asm!(concat!("tdpbf16ps tmm", $sums, ", tmm", $rows, ", tmm", $weights), options(nostack, preserves_flags))
    };
}

/// A layout of weights.
trait Source {
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

struct Bf16;
struct Q8;
struct Q4;

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

#[inline(always)]
fn prefetch(at: *const u8) {
    <Avx512<true> as crate::cpu::lanes::Lanes>::prefetch(at);
}

/// `out[p][i][j] = sum_k left[i][k] panels[p][k][j]`. Widened panels are left in [`Left::widened`], if there is room.
///
/// # Safety
/// As for [`crate::cpu::tile::multiply`], after [`Tiling::begin`] for products. `left` holds its rows and their inputs up to a multiple of thirty-two.
#[inline(always)]
unsafe fn multiply<S: Source>(left: Left, panels: &[*const u8], out: Tiles) {
    let bytes = left.inputs.div_ceil(GROUP) * TILE;
    for (i, panels) in panels.chunks(2).enumerate() {
        // SAFETY: the caller's contract; `out` and `widened` have room for every panel.
        unsafe {
            let kept = if left.widened.is_null() { left.widened } else { left.widened.add(2 * i * bytes) };
            let out = Tiles { data: out.data.add(2 * i * out.panel_stride), ..out };
            if S::WIDENS && left.widened.is_null() {
                match (left.rows, panels) {
                    (1, &[a, b]) => few::<S, 1, 2>(left, [a, b], out),
                    (1, &[a]) => few::<S, 1, 1>(left, [a], out),
                    (2, &[a, b]) => few::<S, 2, 2>(left, [a, b], out),
                    (2, &[a]) => few::<S, 2, 1>(left, [a], out),
                    _ => {}
                }
                if left.rows <= FEW {
                    continue;
                }
            }
            match (left.height, panels) {
                (ROWS, &[a, b]) => block::<S, 1, 2>(left, [a, b], kept, out),
                (ROWS, &[a]) => block::<S, 1, 1>(left, [a], kept, out),
                (_, &[a, b]) => block::<S, 2, 2>(left, [a, b], kept, out),
                (_, &[a]) => block::<S, 2, 1>(left, [a], kept, out),
                _ => {}
            }
        }
    }
}

/// Lines of tiles that the next instructions read.
#[repr(align(64))]
struct Room<const TILES: usize>(std::mem::MaybeUninit<[[u8; TILE]; TILES]>);

impl<const TILES: usize> Room<TILES> {
    #[inline(always)]
    const fn new() -> Self {
        Self(std::mem::MaybeUninit::uninit())
    }

    #[inline(always)]
    fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }
}

/// Writes the lines of a group of P panels, each from the next place on.
#[inline(always)]
unsafe fn widen<S: Source, const P: usize>(
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

/// See [`super::Widen`].
#[inline(always)]
unsafe fn widen_group(layout: Layout, panel: *const u8, inputs: usize, group: usize, to: &mut WidenedGroup) {
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

/// The lines of a group of bfloat16 that is the last and not whole: something else begins behind it.
#[inline(always)]
unsafe fn tail<'a>(panel: *const u8, inputs: usize, room: &'a mut Room<1>) -> *const u8 {
    // SAFETY: the panel has so many inputs; the room is a tile.
    unsafe {
        let group = inputs / GROUP;
        let bytes = inputs.div_ceil(2) * WORD_LINE - group * TILE;
        std::ptr::copy_nonoverlapping(panel.add(group * TILE), room.start(), bytes);
        room.start().add(bytes).write_bytes(0, TILE - bytes);
        room.start()
    }
}

/// R rows by P panels without tiles, which would have to be written first: the weights go from where they were widened into multiply-adds, in the order of
/// [the instruction](https://www.felixcloutier.com/x86/tdpbf16ps): the first numbers of pairs in one chain, the second in another, both from zero for each group;
/// then their sum is added. The instruction takes subnormal numbers for zeros, which these do not; there are none, since a weight is zero
/// or at least 2^-24 with eight bits, an activation likewise zero or at least 2^-67, and sums of their products are zero or at least 2^-105.
#[inline(always)]
unsafe fn few<S: Source, const R: usize, const P: usize>(left: Left, panels: [*const u8; P], out: Tiles) {
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        let zero = _mm512_setzero_ps();
        let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
        let mut sums = [[zero; P]; R];
        for group in 0..left.inputs.div_ceil(GROUP) {
            // The activations as f32, first and second numbers apart: a multiply-add takes one from memory for all lanes.
            let mut first = [[0f32; LANES]; R];
            let mut second = [[0f32; LANES]; R];
            for row in 0..R {
                let pairs = _mm512_loadu_si512(left.words.add((group * left.height + row) * LANES).cast());
                _mm512_storeu_si512(first[row].as_mut_ptr().cast(), _mm512_slli_epi32::<16>(pairs));
                _mm512_storeu_si512(second[row].as_mut_ptr().cast(), _mm512_and_si512(pairs, upper));
            }
            for panel in 0..P {
                if left.ahead > 0 {
                    S::prefetch(panels[panel].wrapping_add(left.ahead), left.inputs, group);
                }
                let scales = S::scales(panels[panel], group);
                let mut chains = [[zero; 2]; R];
                for eight in 0..GROUP / 8 {
                    let lines = S::lines(panels[panel], left.inputs, group, eight, scales);
                    for (line, pairs) in lines.into_iter().enumerate() {
                        let evens = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs));
                        let odds = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
                        for row in 0..R {
                            let x = |of: &[[f32; LANES]; R]| of[row][4 * eight + line];
                            chains[row][0] = _mm512_fmadd_ps(evens, _mm512_set1_ps(x(&first)), chains[row][0]);
                            chains[row][1] = _mm512_fmadd_ps(odds, _mm512_set1_ps(x(&second)), chains[row][1]);
                        }
                    }
                }
                for row in 0..R {
                    let both = _mm512_add_ps(chains[row][0], chains[row][1]);
                    sums[row][panel] = _mm512_add_ps(sums[row][panel], both);
                }
            }
        }
        for row in 0..R {
            for panel in 0..P {
                _mm512_storeu_ps(out.data.add(panel * out.panel_stride + row * LANES), sums[row][panel]);
            }
        }
    }
}

/// A times sixteen rows by P panels.
#[inline(always)]
unsafe fn block<S: Source, const A: usize, const P: usize>(
    left: Left,
    panels: [*const u8; P],
    kept: *mut u8,
    out: Tiles,
) {
    let groups = left.inputs.div_ceil(GROUP);
    let mut ring = Room::<{ 2 * RING }>::new();
    // Where widened groups lie: each at its own place, or at one of a few.
    let (room, stride, places) =
        if kept.is_null() { (ring.start(), RING * TILE, RING - 1) } else { (kept, groups * TILE, usize::MAX) };
    let mut tails = [const { Room::<1>::new() }; 2];
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        if S::WIDENS {
            for group in 0..EARLY.min(groups) {
                widen::<S, P>(left.inputs, panels, group, room.add((group & places) * TILE), stride);
            }
        }
        zero!(0);
        zero!(1);
        zero!(2);
        zero!(3);
        for group in 0..groups {
            let next = group + EARLY;
            if S::WIDENS && next < groups {
                widen::<S, P>(left.inputs, panels, next, room.add((next & places) * TILE), stride);
            }
            if left.ahead > 0 {
                S::prefetch(panels[0].wrapping_add(left.ahead), left.inputs, group);
                if P == 2 {
                    S::prefetch(panels[1].wrapping_add(left.ahead), left.inputs, group);
                }
            }
            let (mut first, mut second) = if S::WIDENS {
                let first = room.add((group & places) * TILE).cast_const();
                (first, first.wrapping_add(stride))
            } else {
                (panels[0].add(group * TILE), panels[P - 1].add(group * TILE))
            };
            if !S::WIDENS && (group + 1) * GROUP > left.inputs {
                let [a, b] = &mut tails;
                (first, second) = (tail(panels[0], left.inputs, a), tail(panels[P - 1], left.inputs, b));
            }
            let rows = left.words.add(group * left.height * LANES);
            load!(4, rows, WORD_LINE);
            load!(6, first, WORD_LINE);
            dot!(0, 4, 6);
            if P == 2 {
                load!(7, second, WORD_LINE);
                dot!(1, 4, 7);
            }
            if A == 2 {
                load!(5, rows.add(ROWS * LANES), WORD_LINE);
                dot!(2, 5, 6);
                if P == 2 {
                    dot!(3, 5, 7);
                }
            }
        }
        store!(0, out.data);
        if A == 2 {
            store!(2, out.data.add(ROWS * LANES));
        }
        if P == 2 {
            store!(1, out.data.add(out.panel_stride));
            if A == 2 {
                store!(3, out.data.add(out.panel_stride + ROWS * LANES));
            }
        }
    }
}

/// The same over panels of keys, after [`Tiling::begin`] for attention: with one tile of activations and one of weights.
///
/// # Safety
/// As for [`multiply`].
#[inline(always)]
unsafe fn scores(left: Left, panels: &[*const u8], out: Tiles) {
    let groups = left.inputs.div_ceil(GROUP);
    let mut room = Room::<1>::new();
    for (number, &panel) in panels.iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe {
            zero!(0);
            zero!(1);
            for group in 0..groups {
                if left.ahead > 0 {
                    Bf16::prefetch(panel.wrapping_add(left.ahead), left.inputs, group);
                }
                let whole = (group + 1) * GROUP <= left.inputs;
                let keys = if whole { panel.add(group * TILE) } else { tail(panel, left.inputs, &mut room) };
                let rows = left.words.add(group * left.height * LANES);
                load!(6, keys, WORD_LINE);
                load!(4, rows, WORD_LINE);
                dot!(0, 4, 6);
                if left.height > ROWS {
                    load!(4, rows.add(ROWS * LANES), WORD_LINE);
                    dot!(1, 4, 6);
                }
            }
            let out = out.data.add(number * out.panel_stride);
            store!(0, out);
            if left.height > ROWS {
                store!(1, out.add(ROWS * LANES));
            }
        }
    }
}

/// `out[p][i][j] += sum_t weights[i][t] values[t][16 p + j]`, after [`Tiling::begin`] for attention.
///
/// # Safety
/// As for [`crate::cpu::tile::accumulate`].
#[inline(always)]
unsafe fn accumulate(values: Values<'_>, out: Tiles) {
    // SAFETY: the caller's contract.
    unsafe {
        for first in (0..values.panels).step_by(4) {
            let panels = Values { panels: (values.panels - first).min(4), ..values };
            let out = Tiles { data: out.data.add(first * out.panel_stride), ..out };
            match panels.panels {
                1 => accumulate_panels::<1>(panels, first, out),
                2 => accumulate_panels::<2>(panels, first, out),
                3 => accumulate_panels::<3>(panels, first, out),
                _ => accumulate_panels::<4>(panels, first, out),
            }
        }
    }
}

/// The panels from `first` on, at most four.
#[inline(always)]
unsafe fn accumulate_panels<const P: usize>(values: Values<'_>, first: usize, out: Tiles) {
    /// Bytes of sixteen tokens' values in sixteen columns.
    const PANEL: usize = ROWS / 2 * WORD_LINE;
    let mut room = Room::<2>::new();
    // SAFETY: the contract of `accumulate`, of which this is a part. Of a block that is not full only the tokens are read that are there.
    unsafe {
        for rows in (0..values.height).step_by(ROWS) {
            let place = |panel: usize| out.data.wrapping_add(panel * out.panel_stride + rows * LANES);
            load!(0, place(0), WORD_LINE);
            if P > 1 {
                load!(1, place(1), WORD_LINE);
            }
            if P > 2 {
                load!(2, place(2), WORD_LINE);
            }
            if P > 3 {
                load!(3, place(3), WORD_LINE);
            }
            for (block, &start) in values.blocks.iter().enumerate() {
                let mut start = start.add(first * values.panel_bytes);
                if values.ahead > 0 && rows == 0 {
                    let lines = start.wrapping_add(values.ahead);
                    (0..P * PANEL).step_by(WORD_LINE).for_each(|line| prefetch(lines.wrapping_add(line)));
                }
                let tokens = values.tokens - block * LANES;
                if tokens < LANES {
                    let bytes = tokens.div_ceil(2) * WORD_LINE;
                    for panel in 0..P {
                        let to = room.start().add(panel * PANEL);
                        std::ptr::copy_nonoverlapping(start.add(panel * values.panel_bytes), to, bytes);
                        to.add(bytes).write_bytes(0, PANEL - bytes);
                    }
                    start = room.start();
                }
                let weights = values.weights.add(rows * SPAN_TOKENS + block * LANES / 2);
                load!(5, weights, SPAN_TOKENS * 4);
                load!(7, start, WORD_LINE);
                dot!(0, 5, 7);
                if P > 1 {
                    load!(7, start.add(PANEL), WORD_LINE);
                    dot!(1, 5, 7);
                }
                if P > 2 {
                    load!(7, start.add(2 * PANEL), WORD_LINE);
                    dot!(2, 5, 7);
                }
                if P > 3 {
                    load!(7, start.add(3 * PANEL), WORD_LINE);
                    dot!(3, 5, 7);
                }
            }
            store!(0, place(0));
            if P > 1 {
                store!(1, place(1));
            }
            if P > 2 {
                store!(2, place(2));
            }
            if P > 3 {
                store!(3, place(3));
            }
        }
    }
}

mod compiled {
    use std::ops::Range;

    use super::{Amx, Left, Tiles, Values, WidenedGroup};
    use crate::{
        cpu::{attention, product},
        rounding::Layout,
    };

    type Panels<'a> = &'a [*const u8];

    super::compile!(("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512fp16")
        multiply_bf16(left: Left, panels: Panels<'_>, out: Tiles) = super::multiply::<super::Bf16>;
        multiply_q8(left: Left, panels: Panels<'_>, out: Tiles) = super::multiply::<super::Q8>;
        multiply_q4(left: Left, panels: Panels<'_>, out: Tiles) = super::multiply::<super::Q4>;
        widen(layout: Layout, panel: *const u8, inputs: usize, group: usize, to: &mut WidenedGroup) = super::widen_group;
        scores(left: Left, panels: Panels<'_>, out: Tiles) = super::scores;
        accumulate(values: Values<'_>, out: Tiles) = super::accumulate;
        prepare(job: &product::PrepareJob<'_>, tiles: Range<usize>, scratch: &mut product::RowScratch)
            = product::prepare::<Amx>;
        product(job: &product::ProductJob<'_>, units: Range<usize>, scratch: &mut product::RowScratch)
            = product::product::<Amx>;
        append(job: &attention::AppendJob<'_>, rows: Range<usize>, heads: Range<usize>, scratch: &mut attention::Scratch)
            = attention::append::<Amx>;
        attend(job: &attention::AttendJob<'_>, items: Range<usize>, scratch: &mut attention::Scratch) = attention::attend::<Amx>;
    );
}

/// What the kernels without tiles are there for: see [`Kernels::plain`].
mod plain {
    use super::{Column, Left, Tiles, Values};

    pub(super) unsafe fn multiply(_: Left, _: &[*const u8], _: Tiles) {
        unreachable!("f32 has no tiles")
    }

    pub(super) unsafe fn turned(_: Left, _: &[Column], _: *mut f32) {
        unreachable!("tiles are not turned")
    }

    pub(super) unsafe fn accumulate(_: Values<'_>, _: Tiles) {
        unreachable!("f32 has no tiles")
    }
}

pub(super) static KERNELS: Kernels = Kernels {
    heights: &HEIGHTS,
    form: Form::Tiles,
    plain: Some(&super::avx512::vnni::KERNELS),
    widen: Some(compiled::widen),
    layouts: [plain::multiply, compiled::multiply_bf16, compiled::multiply_q8, compiled::multiply_q4],
    turned: [plain::turned; 3],
    scores: [plain::multiply, compiled::scores],
    values: [plain::accumulate, compiled::accumulate],
    prepare: compiled::prepare,
    product: compiled::product,
    append: compiled::append,
    attend: compiled::attend,
};

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
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
