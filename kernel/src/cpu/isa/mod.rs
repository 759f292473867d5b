//! One file an instruction set, and the table of kernels that each fills. Chosen once, when a backend is made.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::{fmt, ops::Range};

use super::{
    activations::Form,
    attention::{AppendJob, AttendJob, Scratch},
    lanes::{LANES, Lanes},
    prepare::{PrepareJob, RowScratch},
    product::ProductJob,
    tile::{Column, Left, Tiles, Values},
};
use crate::{
    Precision,
    rounding::{GROUP, Layout},
};

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AMX's tiles of bfloat16, AVX-512 BF16 and AVX-512 FP16. Weights of 4 and 8 bits are widened as they are multiplied, and meet bfloat16.
    Amx,
    /// x86-64 with AVX-512 F, BW, VL, VNNI and BF16: dot products of bytes and of bfloat16. Not the best on Intel's processors, which take longer for the latter.
    Avx512Bf16,
    /// x86-64 with AVX-512 F, BW, VL and VNNI: dot products of bytes.
    Avx512,
    /// x86-64 with AVX2, FMA, F16C and AVX-VNNI: dot products of bytes.
    AvxVnni,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// Whatever the target guarantees.
    Portable,
}

/// So many rows are no faster on tiles.
const SMALL_BATCH: usize = 8;

/// How much larger activations are than they should be beside widened integers, and those smaller: see [`amx`].
const LARGE: f32 = f32::from_bits((127 + 102) << 23);

impl Isa {
    /// All there are, best first.
    pub const ALL: [Self; 6] = [Self::Amx, Self::Avx512Bf16, Self::Avx512, Self::AvxVnni, Self::Avx2, Self::Portable];

    /// The instruction sets that this processor has, best first.
    pub fn available() -> Vec<Self> {
        let mut all: Vec<Self> = Self::ALL.into_iter().filter(|isa| isa.is_available()).collect();
        if slow_pairs() {
            all.sort_by_key(|isa| match isa {
                Self::Amx => 0,
                Self::Avx512 => 1,
                Self::Avx512Bf16 => 2,
                _ => 3,
            });
        }
        all
    }

    /// The best that this processor has for weights of a precision and steps that decode up to so many sequences. Tiles have to widen integers first, which few
    /// rows do not make good; weights of 4 bits are for those.
    pub fn best_for(precision: Precision, most_rows: usize) -> Self {
        let tiles = precision != Precision::Q4 && most_rows > SMALL_BATCH;
        Self::available().into_iter().find(|isa| tiles || *isa != Self::Amx).unwrap_or(Self::Portable)
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = || {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
        };
        match self {
            Self::Amx => {
                avx512()
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("avx512fp16")
                    && amx::has_tiles()
            }
            Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512 => avx512(),
            Self::AvxVnni => avx2() && is_x86_feature_detected!("avxvnni"),
            Self::Avx2 => avx2(),
            Self::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// Its kernels; None when this processor does not have it.
    pub(super) fn kernels(self) -> Option<&'static Kernels> {
        self.is_available().then_some(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => &amx::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => &avx512::with_bf16::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &avx512::vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => &avx2::vnni::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &avx2::plain::KERNELS,
            _ => &portable::KERNELS,
        })
    }

    /// Its name, as a flag takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::AvxVnni => "avx-vnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Does the instruction for pairs of bfloat16 take longer than the two multiply-adds that it stands for? On Intel's processors: .85 ns, and .2 ns each.
#[cfg(target_arch = "x86_64")]
fn slow_pairs() -> bool {
    let id = std::arch::x86_64::__cpuid(0);
    [id.ebx, id.edx, id.ecx] == [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes)
}

#[cfg(not(target_arch = "x86_64"))]
fn slow_pairs() -> bool {
    false
}

/// How an instruction set cuts a product into register tiles.
pub(super) trait Tiling {
    type Lanes: Lanes;
    /// It has thirty-two registers of sixteen lanes; else sixteen of eight or fewer.
    const WIDE: bool;
    /// How its activations lie.
    const FORM: Form;

    /// Where [`Self::FORM`] is [`Form::Tiles`]: writes thirty-two numbers as one line of a tile, in the order of a layout's weights.
    ///
    /// # Safety
    /// The processor has the instruction set; `x` is valid for thirty-two numbers, `line` for sixteen words.
    unsafe fn pack_line(_layout: Layout, _x: *const f32, _line: *mut u32) {
        unreachable!("activations have no tiles")
    }

    /// Where there are tiles: makes them ready for the products of a region on this thread.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn begin(_region: Region) {}

    /// Gives the tiles back.
    ///
    /// # Safety
    /// The processor has the instruction set.
    unsafe fn end() {}
}

/// What tiles are made ready for.
#[derive(Clone, Copy)]
pub(super) enum Region {
    Products,
    /// Products with narrow panels of so many outputs.
    Down(#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] usize),
    Attention,
}

/// Heights of tiles where registers abound.
const WIDE: [usize; 7] = [1, 2, 3, 4, 6, 8, 12];
/// Heights of tiles elsewhere.
const NARROW: [usize; 5] = [1, 2, 3, 4, 6];

/// See [`super::tile::multiply`].
pub(super) type Multiply = unsafe fn(Left, &[*const u8], Tiles);

/// See [`super::tile::turned`].
pub(super) type Turned = unsafe fn(Left, &[Column], *mut f32);

/// See [`super::tile::accumulate`].
pub(super) type Accumulate = unsafe fn(Values<'_>, Tiles);

/// A group of integers of a panel as tiles take it.
///
/// # Safety
/// The processor has the instruction set; the panel has this layout, so many inputs and the group.
pub(super) type Widen = unsafe fn(Layout, *const u8, inputs: usize, group: usize, &mut WidenedGroup);

/// `V^T x` of a tile's rows, `[row][16]` of which a panel's `columns` are written: see [`super::linear::CpuLinear::narrow_down`].
pub(super) type SeeDown = unsafe fn(Left, *const u8, columns: usize, Tiles);

/// Thirty-two inputs of sixteen outputs as tiles take them: sixteen lines, each of a pair of inputs.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct WidenedGroup([u16; GROUP * LANES]);

impl Default for WidenedGroup {
    fn default() -> Self {
        Self([0; GROUP * LANES])
    }
}

impl WidenedGroup {
    /// A group that lies so in a panel, zeros behind it.
    pub(super) fn of_bf16(panel: &[u8], group: usize) -> Self {
        let mut lines = Self::default();
        let bytes = panel[group * GROUP * LANES * size_of::<u16>()..].chunks_exact(2);
        lines.0.iter_mut().zip(bytes).for_each(|(to, bytes)| *to = u16::from_ne_bytes([bytes[0], bytes[1]]));
        lines
    }

    /// Its lines, without what belongs to outputs from `columns` on.
    pub(super) fn narrow(&self, columns: usize) -> impl Iterator<Item = &[u16]> {
        self.0.chunks_exact(2 * LANES).map(move |line| &line[..2 * columns])
    }

    /// The weight of an output for input `k`.
    pub(super) fn weight(&self, output: usize, k: usize) -> f32 {
        // Of eight inputs the even ones come first; two are neighbours.
        let place = k / 8 * 8 + k % 2 * 4 + k % 8 / 2;
        let bits = self.0[(place / 2 * LANES + output) * 2 + place % 2];
        f32::from_bits(u32::from(bits) << 16) * LARGE
    }
}

/// What a thread runs inside a region of a step. The products of all others go through `multiply`, compiled once a layout.
///
/// # Safety
/// The processor has the instruction set (which [`Isa::kernels`] made sure of), and the job's pointers are as the job says.
pub(super) struct Kernels {
    /// Heights of register tiles, ascending.
    pub(super) heights: &'static [usize],
    /// As [`Tiling::FORM`].
    pub(super) form: Form,
    /// What takes the linears and caches that these kernels do not: see [`Kernels::of`].
    pub(super) plain: Option<&'static Kernels>,
    /// Where there are tiles.
    pub(super) widen: Option<Widen>,
    /// Likewise.
    pub(super) see_down: Option<SeeDown>,
    /// One a layout.
    pub(super) layouts: [Multiply; 4],
    /// Of f32, bfloat16 and 8 bits: what V may be in.
    pub(super) turned: [Turned; 3],
    /// Of queries and keys: of f32 and of bfloat16.
    pub(super) scores: [Multiply; 2],
    /// Of f32 and of bfloat16.
    pub(super) values: [Accumulate; 2],
    pub(super) prepare: unsafe fn(&PrepareJob<'_>, Range<usize>, &mut RowScratch),
    pub(super) product: unsafe fn(&ProductJob<'_>, Range<usize>, &mut RowScratch),
    pub(super) append: unsafe fn(&AppendJob<'_>, Range<usize>, Range<usize>, &mut Scratch),
    pub(super) attend: unsafe fn(&AttendJob<'_>, Range<usize>, &mut Scratch),
}

impl Kernels {
    /// The kernels for a linear or a cache of this layout: tiles take no f32, and no integers whose scales are `wide`.
    pub(super) fn of(&'static self, layout: Layout, wide: bool) -> &'static Self {
        self.plain.filter(|_| layout == Layout::F32 || wide).unwrap_or(self)
    }

    /// The matrix product over panels of this layout.
    pub(super) fn multiply(&self, layout: Layout) -> Multiply {
        self.layouts[match layout {
            Layout::F32 => 0,
            Layout::Bf16 => 1,
            Layout::Q8 => 2,
            Layout::Q4 => 3,
        }]
    }

    /// A few outputs of panels of a layout of factors.
    pub(super) fn turned(&self, layout: Layout) -> Turned {
        self.turned[match layout {
            Layout::F32 => 0,
            Layout::Bf16 => 1,
            Layout::Q8 | Layout::Q4 => 2, // factors are never in 4 bits: Layout::of_factors
        }]
    }

    /// The product of queries and keys of this layout: f32, else bfloat16.
    pub(super) fn scores(&self, layout: Layout) -> Multiply {
        self.scores[usize::from(layout != Layout::F32)]
    }

    /// The product of weights and values of this layout: f32, else bfloat16.
    pub(super) fn accumulate(&self, layout: Layout) -> Accumulate {
        self.values[usize::from(layout != Layout::F32)]
    }

    /// Heights of register tiles by their number.
    pub(super) const fn heights(wide: bool) -> &'static [usize] {
        if wide { &WIDE } else { &NARROW }
    }
}

/// Compiles every kernel for one instruction set and makes its table.
macro_rules! kernels {
    ($lanes:ty, wide: $wide:literal $(, $features:literal)?) => {
        impl $crate::cpu::isa::Tiling for $lanes {
            type Lanes = Self;
            const WIDE: bool = $wide;
            const FORM: $crate::cpu::activations::Form = if <Self as $crate::cpu::lanes::Lanes>::PAIRS {
                $crate::cpu::activations::Form::Pairs
            } else {
                $crate::cpu::activations::Form::Singles
            };
        }

        mod compiled {
            use std::ops::Range;
            use $crate::cpu::{attention, format, prepare, product, tile};

            #[allow(unused_imports)]
            use super::*;
            type Lanes = $lanes;
            type Panels<'a> = &'a [*const u8];

            $crate::cpu::isa::compile!(($($features)?)
                multiply_f32(left: tile::Left, panels: Panels<'_>, out: tile::Tiles)
                    = tile::multiply::<Lanes, tile::ByWords<format::F32, 1>>;
                multiply_bf16(left: tile::Left, panels: Panels<'_>, out: tile::Tiles)
                    = tile::multiply::<Lanes, tile::ByWords<format::Bf16, 2>>;
                multiply_q8(left: tile::Left, panels: Panels<'_>, out: tile::Tiles)
                    = tile::multiply::<Lanes, tile::ByGroups<format::Q8>>;
                multiply_q4(left: tile::Left, panels: Panels<'_>, out: tile::Tiles)
                    = tile::multiply::<Lanes, tile::ByGroups<format::Q4>>;
                turned_f32(left: tile::Left, columns: &[tile::Column], out: *mut f32)
                    = tile::turned::<Lanes, tile::ByWords<format::F32, 1>>;
                turned_bf16(left: tile::Left, columns: &[tile::Column], out: *mut f32)
                    = tile::turned::<Lanes, tile::ByWords<format::Bf16, 2>>;
                turned_q8(left: tile::Left, columns: &[tile::Column], out: *mut f32)
                    = tile::turned::<Lanes, tile::ByGroups<format::Q8>>;
                accumulate_f32(values: tile::Values<'_>, out: tile::Tiles) = tile::accumulate::<Lanes, format::F32, 1>;
                accumulate_bf16(values: tile::Values<'_>, out: tile::Tiles) = tile::accumulate::<Lanes, format::Bf16, 2>;
                prepare(job: &prepare::PrepareJob<'_>, tiles: Range<usize>, scratch: &mut prepare::RowScratch)
                    = prepare::prepare::<Lanes>;
                product(job: &product::ProductJob<'_>, units: Range<usize>, scratch: &mut prepare::RowScratch)
                    = product::product::<Lanes>;
                append(job: &attention::AppendJob<'_>, rows: Range<usize>, heads: Range<usize>, scratch: &mut attention::Scratch)
                    = attention::append::<Lanes>;
                attend(job: &attention::AttendJob<'_>, items: Range<usize>, scratch: &mut attention::Scratch) = attention::attend::<Lanes>;
            );
        }

        pub(in $crate::cpu::isa) static KERNELS: $crate::cpu::isa::Kernels = $crate::cpu::isa::Kernels {
            heights: $crate::cpu::isa::Kernels::heights($wide),
            form: <$lanes as $crate::cpu::isa::Tiling>::FORM,
            plain: None,
            widen: None,
            see_down: None,
            layouts: [compiled::multiply_f32, compiled::multiply_bf16, compiled::multiply_q8, compiled::multiply_q4],
            turned: [compiled::turned_f32, compiled::turned_bf16, compiled::turned_q8],
            scores: [compiled::multiply_f32, compiled::multiply_bf16],
            values: [compiled::accumulate_f32, compiled::accumulate_bf16],
            prepare: compiled::prepare,
            product: compiled::product,
            append: compiled::append,
            attend: compiled::attend,
        };
    };
}

macro_rules! compile {
    ($features:tt $($name:ident($($arg:ident: $type:ty),*) = $kernel:path;)*) => {
        $($crate::cpu::isa::compile!(@one $features, $name, ($($arg: $type),*), $kernel);)*
    };
    (@one (), $name:ident, ($($arg:ident: $type:ty),*), $kernel:path) => {
        pub(super) unsafe fn $name($($arg: $type),*) {
            // SAFETY: the caller keeps the contract of the kernel; every processor has these instructions.
            unsafe { $kernel($($arg),*) }
        }
    };
    (@one ($features:literal), $name:ident, ($($arg:ident: $type:ty),*), $kernel:path) => {
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $name($($arg: $type),*) {
            // SAFETY: the caller keeps the contract of the kernel; this function is compiled for the instruction set.
            unsafe { $kernel($($arg),*) }
        }
    };
}

use {compile, kernels};

/// Functions of lanes on every instruction set of this machine.
#[cfg(test)]
pub(super) mod lanes_for_tests {
    use super::*;
    use crate::cpu::lanes;

    /// Of one set.
    pub(in crate::cpu) struct Functions {
        pub(in crate::cpu) isa: Isa,
        pub(in crate::cpu) exp: fn([f32; 16]) -> [f32; 16],
        pub(in crate::cpu) weight: fn([f32; 16]) -> [f32; 16],
        pub(in crate::cpu) narrow: fn([f32; 16]) -> [u16; 16],
    }

    fn functions<L: Lanes>(isa: Isa) -> Functions {
        fn map<L: Lanes>(x: [f32; 16], f: unsafe fn(L) -> L) -> [f32; 16] {
            let mut out = [0f32; 16];
            // SAFETY: only called for instruction sets that are available; both arrays hold sixteen numbers.
            unsafe { f(L::load(x.as_ptr())).store(out.as_mut_ptr()) };
            out
        }
        unsafe fn one<L: Lanes>(x: L) -> L {
            // SAFETY: the caller's contract.
            unsafe { lanes::exp([x])[0] }
        }

        fn narrow<L: Lanes>(x: [f32; 16]) -> [u16; 16] {
            let mut out = [0u16; 16];
            // SAFETY: as above.
            unsafe { L::load(x.as_ptr()).store_bf16(out.as_mut_ptr()) };
            out
        }
        Functions { isa, exp: |x| map::<L>(x, one), weight: |x| map::<L>(x, lanes::weight), narrow: narrow::<L> }
    }

    /// One a set.
    pub(in crate::cpu) fn each() -> Vec<Functions> {
        let of = |isa| match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Avx512Bf16 => functions::<avx512::Avx512<true>>(isa),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => functions::<avx512::Avx512<false>>(isa),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni | Isa::Avx2 => functions::<avx2::Avx2<true>>(isa),
            _ => functions::<portable::Portable>(isa),
        };
        Isa::available().into_iter().map(of).collect()
    }
}
