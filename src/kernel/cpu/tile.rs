//! The register tile: rows of activations times panels of weights.
//!
//! **Invariant.** Each output is one chain of multiply-adds in the order of the inputs, from zero (or from what the tile held), whatever tile it
//! is computed in. That is all it takes for a row's bits not to depend on the batch, on chunks or on threads.
#![allow(unsafe_code)]

use super::{
    format::{Format, Sink},
    isa::Tiling,
    lanes::{LANES, Lanes},
};

/// Activations, f32, row after row.
#[derive(Clone, Copy)]
pub(super) struct Left {
    /// First number of the first row.
    pub(super) data: *const f32,
    /// Numbers from a row to the next.
    pub(super) stride: usize,
    /// Rows.
    pub(super) rows: usize,
    /// Inputs: numbers of a row that take part.
    pub(super) inputs: usize,
}

/// Where results go: `[panel][row][16]`.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    /// First number of the first row of the first panel.
    pub(super) data: *mut f32,
    /// Numbers from a panel to the next.
    pub(super) panel_stride: usize,
    /// Add to what is there; else replace it.
    pub(super) add: bool,
}

/// Repeats a statement for every row and panel of a tile, written out: the compiler leaves a loop over twelve rows a loop, and keeps the sums
/// of a loop in memory.
macro_rules! each {
    ($index:ident < $limit:ident: $body:block) => {
        each!(@unroll $index $limit $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@unroll $index:ident $limit:ident $body:block, $($number:literal)*) => {
        {
            $(if $number < $limit {
                let $index = $number;
                $body
            })*
        }
    };
}

struct Accumulators<L, const R: usize, const P: usize> {
    sums: [[L; P]; R],
    data: *const f32,
    stride: usize,
}

impl<L: Lanes, const R: usize, const P: usize> Sink<L, P> for Accumulators<L, R, P> {
    #[inline(always)]
    unsafe fn step(&mut self, k: usize, weights: [L; P]) {
        // SAFETY: the tile has R rows with input k, by the contract of `multiply`.
        unsafe {
            each!(row < R: {
                let x = L::splat(self.data.add(row * self.stride + k).read());
                each!(panel < P: { self.sums[row][panel] = x.fma(weights[panel], self.sums[row][panel]) });
            });
        }
    }
}

/// One tile of exactly R rows by P panels.
#[inline(always)]
unsafe fn tile<L: Lanes, F: Format, const R: usize, const P: usize>(left: Left, panels: &[*const u8], out: Tiles) {
    // SAFETY: the contract of `multiply`, of which this is a part.
    unsafe {
        let place = |row: usize, panel: usize| out.data.add(panel * out.panel_stride + row * LANES);
        let mut sums = [[L::splat(0.0); P]; R];
        if out.add {
            each!(row < R: { each!(panel < P: { sums[row][panel] = L::load(place(row, panel)) }) });
        }
        let mut accumulators = Accumulators { sums, data: left.data, stride: left.stride };
        let mut pointers = [std::ptr::null(); P];
        pointers.copy_from_slice(&panels[..P]);
        F::walk(pointers, left.inputs, &mut accumulators);
        each!(row < R: { each!(panel < P: { accumulators.sums[row][panel].store(place(row, panel)) }) });
    }
}

/// All rows by exactly P panels, in the largest tiles that fit.
#[inline(always)]
unsafe fn rows<T: Tiling, F: Format, const P: usize>(left: Left, panels: &[*const u8], out: Tiles) {
    let mut row = 0;
    while row < left.rows {
        // SAFETY: the contract of `multiply`; each arm is taken only when so many rows are left.
        unsafe {
            let left = Left { data: left.data.add(row * left.stride), rows: left.rows - row, ..left };
            let out = Tiles { data: out.data.add(row * LANES), ..out };
            row += match left.rows {
                12.. if T::ROWS >= 12 => {
                    tile::<T::Lanes, F, 12, P>(left, panels, out);
                    12
                }
                8.. if T::ROWS >= 8 => {
                    tile::<T::Lanes, F, 8, P>(left, panels, out);
                    8
                }
                6.. if T::ROWS >= 6 => {
                    tile::<T::Lanes, F, 6, P>(left, panels, out);
                    6
                }
                4.. if T::ROWS >= 4 => {
                    tile::<T::Lanes, F, 4, P>(left, panels, out);
                    4
                }
                3.. if T::ROWS >= 3 => {
                    tile::<T::Lanes, F, 3, P>(left, panels, out);
                    3
                }
                2.. => {
                    tile::<T::Lanes, F, 2, P>(left, panels, out);
                    2
                }
                _ => {
                    tile::<T::Lanes, F, 1, P>(left, panels, out);
                    1
                }
            };
        }
    }
}

/// `out[p][i][j] = sum_k left[i][k] panels[p][k][j]`; see [`Tiles::add`].
///
/// # Safety
/// The processor has the instructions of `T`, inside a function compiled for them. `left` is valid for its rows and inputs, every panel for so
/// many inputs in the format `F`, and `out` for as many panels and rows, touched by nobody else.
#[inline(always)]
pub(super) unsafe fn multiply<T: Tiling, F: Format>(left: Left, panels: &[*const u8], out: Tiles) {
    let few = left.rows <= 2;
    let mut rest = panels;
    let mut done = 0;
    while !rest.is_empty() {
        // SAFETY: the caller's contract; each arm is taken only when so many panels are left.
        unsafe {
            let out = Tiles { data: out.data.add(done * out.panel_stride), ..out };
            let taken = match rest.len() {
                4.. if few && T::FEW_PANELS >= 4 => {
                    rows::<T, F, 4>(left, rest, out);
                    4
                }
                2.. if T::PANELS >= 2 || (few && T::FEW_PANELS >= 2) => {
                    rows::<T, F, 2>(left, rest, out);
                    2
                }
                _ => {
                    rows::<T, F, 1>(left, rest, out);
                    1
                }
            };
            rest = &rest[taken..];
            done += taken;
        }
    }
}
