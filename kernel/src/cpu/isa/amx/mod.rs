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

mod attention;
mod product;
mod tile;
mod widen;

use std::{
    arch::{asm, x86_64::*},
    sync::LazyLock,
};

use super::{Kernels, LARGE, Region, Tiling, WidenedGroup, avx512::Avx512, compile};
use crate::{
    cpu::{
        activations::Form,
        format::WORD_LINE,
        lanes::LANES,
        tile::{Column, Left, Tiles, Values},
    },
    rounding::Layout,
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
            let large = _mm512_set1_ps(LARGE);
            (low, high) = (_mm512_mul_ps(without_dust(low), large), _mm512_mul_ps(without_dust(high), large));
            let pairs = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            // Of each eight numbers 0 2 4 6 1 3 5 7.
            let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
            _mm512_storeu_si512(line.cast(), _mm512_shuffle_epi8(pairs, _mm512_broadcast_i32x4(order)));
        }
    }

    #[inline(always)]
    unsafe fn begin(region: Region) {
        let down;
        let shapes = match region {
            Region::Products => &PRODUCTS,
            Region::Attention => &ATTENTION,
            Region::Down(columns) => {
                let bytes = (4 * columns) as u16;
                down = shapes([bytes, bytes, bytes, bytes, 64, 64, bytes, bytes], [16; 8]);
                &down
            }
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

/// Zeros instead of numbers below 1e-20, so that no sum can be subnormal: see [`product`]. NaN stays NaN.
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

mod compiled {
    use std::ops::Range;

    use super::{Amx, Left, Tiles, Values, WidenedGroup, product as tiles, widen};
    use crate::{
        cpu::{attention, prepare, product},
        rounding::Layout,
    };

    type Panels<'a> = &'a [*const u8];

    super::compile!(("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512fp16")
        multiply_bf16(left: Left, panels: Panels<'_>, out: Tiles) = tiles::multiply::<widen::Bf16>;
        multiply_q8(left: Left, panels: Panels<'_>, out: Tiles) = tiles::multiply::<widen::Q8>;
        multiply_q4(left: Left, panels: Panels<'_>, out: Tiles) = tiles::multiply::<widen::Q4>;
        widen(layout: Layout, panel: *const u8, inputs: usize, group: usize, to: &mut WidenedGroup) = widen::widen_group;
        see_down(left: Left, panel: *const u8, columns: usize, out: Tiles) = tiles::see_down;
        scores(left: Left, panels: Panels<'_>, out: Tiles) = super::attention::scores;
        accumulate(values: Values<'_>, out: Tiles) = super::attention::accumulate;
        prepare(job: &prepare::PrepareJob<'_>, tiles: Range<usize>, scratch: &mut prepare::RowScratch)
            = prepare::prepare::<Amx>;
        product(job: &product::ProductJob<'_>, units: Range<usize>, scratch: &mut prepare::RowScratch)
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
    see_down: Some(compiled::see_down),
    layouts: [plain::multiply, compiled::multiply_bf16, compiled::multiply_q8, compiled::multiply_q4],
    turned: [plain::turned; 3],
    scores: [plain::multiply, compiled::scores],
    values: [plain::accumulate, compiled::accumulate],
    prepare: compiled::prepare,
    product: compiled::product,
    append: compiled::append,
    attend: compiled::attend,
};
