//! One file an instruction set, and the table of kernels that each fills. Chosen once, when a backend is made.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use std::{fmt, ops::Range};

use super::{
    attention::{AppendJob, AttendJob, Scratch},
    lanes::Lanes,
    product::{PrepareJob, ProductJob},
    tile::{Left, Tiles},
};
use crate::kernel::Precision;

/// An instruction set that the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// x86-64 with AVX-512 F.
    Avx512,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// Whatever the target guarantees.
    Portable,
}

impl Isa {
    /// The instruction sets that this processor has, best first.
    pub fn available() -> Vec<Self> {
        [Self::Avx512, Self::Avx2, Self::Portable].into_iter().filter(|isa| isa.is_available()).collect()
    }

    fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Portable => true,
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Its kernels; None when this processor does not have it.
    pub(super) fn kernels(self) -> Option<&'static Kernels> {
        self.is_available().then_some(match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &avx2::KERNELS,
            _ => &portable::KERNELS,
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

/// How an instruction set cuts a product into register tiles.
pub(super) trait Tiling {
    type Lanes: Lanes;
    /// Rows of the largest tile.
    const ROWS: usize;
    /// Panels of sixteen outputs beside one another in a tile.
    const PANELS: usize;
    /// The same with one or two rows, where more panels are needed to keep the multipliers busy.
    const FEW_PANELS: usize;
}

/// See [`super::tile::multiply`].
pub(super) type Multiply = unsafe fn(Left, &[*const u8], Tiles);

/// What a thread runs inside a region of a step. The products of all others go through `multiply`, compiled once a format.
///
/// # Safety
/// The processor has the instruction set (which [`Isa::kernels`] made sure of), and the job's pointers are as the job says.
pub(super) struct Kernels {
    /// Rows of the largest tile: work is cut into multiples of it.
    pub(super) rows: usize,
    /// One a precision.
    pub(super) formats: [Multiply; 3],
    pub(super) prepare: unsafe fn(&PrepareJob<'_>, Range<usize>),
    pub(super) product: unsafe fn(&ProductJob<'_>, Range<usize>),
    pub(super) append: unsafe fn(&AppendJob<'_>, Range<usize>),
    pub(super) attend: unsafe fn(&AttendJob<'_>, usize, &mut Scratch),
}

impl Kernels {
    /// The matrix product over panels of this precision.
    pub(super) fn multiply(&self, precision: Precision) -> Multiply {
        self.formats[match precision {
            Precision::F32 => 0,
            Precision::Bf16 => 1,
            Precision::Q8 => 2,
        }]
    }
}

/// Compiles every kernel for one instruction set and makes its table.
macro_rules! kernels {
    ($lanes:ident, rows: $rows:literal, panels: $panels:literal, few_panels: $few:literal $(, $features:literal)?) => {
        impl $crate::kernel::cpu::isa::Tiling for $lanes {
            type Lanes = Self;
            const ROWS: usize = $rows;
            const PANELS: usize = $panels;
            const FEW_PANELS: usize = $few;
        }

        mod compiled {
            use super::$lanes as Lanes;
            use std::ops::Range;
            use $crate::kernel::cpu::{attention, format, product, tile};

            $crate::kernel::cpu::isa::compile!(($($features)?)
                multiply_f32(left: tile::Left, panels: &[*const u8], out: tile::Tiles) = tile::multiply::<Lanes, format::F32>;
                multiply_bf16(left: tile::Left, panels: &[*const u8], out: tile::Tiles) = tile::multiply::<Lanes, format::Bf16>;
                multiply_q8(left: tile::Left, panels: &[*const u8], out: tile::Tiles) = tile::multiply::<Lanes, format::Q8>;
                prepare(job: &product::PrepareJob<'_>, rows: Range<usize>) = product::prepare::<Lanes>;
                product(job: &product::ProductJob<'_>, units: Range<usize>) = product::product::<Lanes>;
                append(job: &attention::AppendJob<'_>, rows: Range<usize>) = attention::append::<Lanes>;
                attend(job: &attention::AttendJob<'_>, item: usize, scratch: &mut attention::Scratch) = attention::attend::<Lanes>;
            );
        }

        pub(super) static KERNELS: $crate::kernel::cpu::isa::Kernels = $crate::kernel::cpu::isa::Kernels {
            rows: $rows,
            formats: [compiled::multiply_f32, compiled::multiply_bf16, compiled::multiply_q8],
            prepare: compiled::prepare,
            product: compiled::product,
            append: compiled::append,
            attend: compiled::attend,
        };
    };
}

macro_rules! compile {
    ($features:tt $($name:ident($($arg:ident: $type:ty),*) = $kernel:path;)*) => {
        $($crate::kernel::cpu::isa::compile!(@one $features, $name, ($($arg: $type),*), $kernel);)*
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

/// exp on every instruction set of this machine.
#[cfg(test)]
pub(super) mod lanes_for_tests {
    use super::*;

    type Exp = fn([f32; 16]) -> [f32; 16];

    fn exp<L: Lanes>(x: [f32; 16]) -> [f32; 16] {
        let mut out = [0f32; 16];
        // SAFETY: only called for instruction sets that are available; both arrays hold sixteen numbers.
        unsafe { crate::kernel::cpu::lanes::exp(L::load(x.as_ptr())).store(out.as_mut_ptr()) };
        out
    }

    /// One a set.
    pub(in crate::kernel::cpu) fn each_exp() -> Vec<(Isa, Exp)> {
        let of = |isa| match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => exp::<avx512::Avx512> as Exp,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => exp::<avx2::Avx2> as Exp,
            _ => exp::<portable::Portable> as Exp,
        };
        Isa::available().into_iter().map(|isa| (isa, of(isa))).collect()
    }
}
