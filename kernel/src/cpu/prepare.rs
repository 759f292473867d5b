//! The rows of a product: gathered, normalised and packed, with what their adapters see of them.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    activations::{Room, Tile, places},
    format::WORD_LINE,
    isa::{Kernels, Region, Tiling},
    lanes::{LANES, Lanes, load_partial, store_partial, sum},
    linear::{CpuLinear, PartInfo},
    memory::{Lines, Shared},
    step::Mixing,
    tile::{Column, Left, Tiles},
};

/// Bytes of a panel of V that are asked for at once, in a cache of 32 kB or more.
const V_AHEAD: usize = 14 << 10;

/// RMSNorm of a row, `x / sqrt(mean(x^2) + epsilon) * weight`: the squares are summed in sixteen chains, then in one tree.
///
/// # Safety
/// As for [`Lanes`]; `x` and `out` are valid for the weight's length, and may be the same.
#[inline(always)]
pub(super) unsafe fn rms_norm<L: Lanes>(x: *const f32, weight: &[f32], epsilon: f32, out: *mut f32) {
    let width = weight.len();
    // SAFETY: every access is to `width` numbers of each; the caller vouches for the rest.
    unsafe {
        let mut squares = L::splat(0.0);
        for k in (0..width).step_by(LANES) {
            let x = load_partial::<L>(x.add(k), LANES.min(width - k));
            squares = x.fma(x, squares);
        }
        let scale = L::splat(1.0 / (sum(squares) / width as f32 + epsilon).sqrt());
        for k in (0..width).step_by(LANES) {
            let count = LANES.min(width - k);
            let x = load_partial::<L>(x.add(k), count);
            let weight = load_partial::<L>(weight.as_ptr().add(k), count);
            store_partial(x.mul(scale).mul(weight), out.add(k), count);
        }
    }
}

/// What a thread needs to prepare rows and multiply them, kept from step to step.
#[derive(Default)]
pub(super) struct RowScratch {
    /// One row, normalised, with zeros behind it.
    row: Vec<f32>,
    /// `V^T x` of a tile; see [`Seen`].
    products: Lines,
    /// Panels of V^T.
    panels: Vec<*const u8>,
    /// Those of its rows that somebody looks through.
    columns: Vec<Column>,
    /// `[MAX_PANELS][MAX_HEIGHT][16]`: products that have not been ended.
    pub(super) tile: Lines,
    /// Where there are tiles: the panels at hand, widened.
    pub(super) widened: Lines,
}

// SAFETY: the pointers in `panels` and `columns` are only read inside the call that wrote them.
unsafe impl Send for RowScratch {}

/// The rows of a product, ready to be multiplied: see [`prepare`].
pub(super) struct PrepareJob<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) linear: &'a CpuLinear,
    /// All rows of the step, each `linear.inputs` wide.
    pub(super) x: &'a [f32],
    /// Rows of the step that take part; None: all.
    pub(super) chosen: Option<&'a [u32]>,
    /// Weight and epsilon.
    pub(super) norm: Option<(&'a [f32], f32)>,
    /// The rows, cut.
    pub(super) tiles: &'a [Tile],
    /// They are prepared sixteen by sixteen, for lack of tiles for all threads; else tile by tile.
    pub(super) halves: bool,
    /// Where they are packed. Each piece belongs to one thread.
    pub(super) room: Room,
    /// The cores of the step; None when no row has an adapter, or the linear none.
    pub(super) mixing: Option<&'a Mixing>,
    /// Slot of every row of the step.
    pub(super) slots: &'a [u32],
    /// How many numbers of each part of `mixed` a row has (see [`crate::Cores::active`]), 0 on the base; empty when no row has any.
    pub(super) active: &'a [u32],
    /// Of each tile `[down_rows][height]`: `C V^T x` of the adapted rows. Each piece belongs to one thread.
    pub(super) mixed: Shared<f32>,
}

impl PrepareJob<'_> {
    /// What [`prepare`] does at a time.
    pub(super) fn pieces(&self) -> usize {
        if self.halves { places(self.tiles) / LANES } else { self.tiles.len() }
    }

    /// The rows of a piece, counted in its tile. None has more than the tile has.
    fn piece(&self, number: usize) -> (Tile, Range<usize>) {
        if !self.halves {
            let tile = self.tiles[number];
            return (tile, 0..tile.rows);
        }
        // Only the last tile can be lower than the others, and none is higher than its rows ask for.
        let tile = self.tiles[number * LANES / self.tiles[0].height];
        let first = number * LANES - tile.place;
        (tile, first..tile.rows.min(first + LANES))
    }

    fn row_of_step(&self, row: usize) -> usize {
        self.chosen.map_or(row, |chosen| chosen[row] as usize)
    }

    fn slot(&self, row: usize) -> u32 {
        self.slots[self.row_of_step(row)]
    }
}

/// Gathers, normalises, packs and mixes the rows of some pieces.
///
/// # Safety
/// The processor has the instructions of `T`; the job's pointers are valid for all pieces in range, which no other thread touches.
#[inline(always)]
pub(super) unsafe fn prepare<T: Tiling>(job: &PrepareJob<'_>, pieces: Range<usize>, scratch: &mut RowScratch) {
    let width = job.linear.inputs;
    let padded = job.linear.layout.padded(width);
    scratch.row.clear();
    scratch.row.resize(padded, 0.0);
    let looks_down = job.mixing.is_some() && !pieces.is_empty();
    if looks_down {
        // SAFETY: the instruction set, by contract.
        unsafe { T::begin(Region::Down(job.linear.down_columns())) };
        // V comes while the first rows are packed.
        for panel in 0..job.linear.down.len() {
            let (lines, bytes) = job.linear.down_panel(panel);
            let bytes = bytes.min(V_AHEAD);
            (0..bytes).step_by(WORD_LINE).for_each(|at| T::Lanes::prefetch(lines.wrapping_add(at)));
        }
    }
    for piece in pieces {
        let (tile, rows) = job.piece(piece);
        for row in rows.clone() {
            let from = &job.x[job.row_of_step(tile.first + row) * width..][..width];
            // SAFETY: `from` was sliced to `width` and the scratch has `padded` numbers; the tile of the room is this thread's.
            unsafe {
                let x = match job.norm {
                    Some((weight, epsilon)) => {
                        let to = scratch.row.as_mut_ptr();
                        rms_norm::<T::Lanes>(from.as_ptr(), &weight[..width], epsilon, to);
                        to.cast_const()
                    }
                    None if padded == width => from.as_ptr(),
                    None => {
                        scratch.row[..width].copy_from_slice(from);
                        scratch.row.as_ptr()
                    }
                };
                job.room.pack::<T>(tile, row, x);
            }
        }
        if let Some(mixing) = job.mixing {
            // SAFETY: the piece was packed just now; its rows of `mixed` are this thread's.
            unsafe { look_down(job, mixing, tile, rows, scratch) };
        }
    }
    if looks_down {
        // SAFETY: as above.
        unsafe { T::end() };
    }
}

/// `C (V^T x)` of a piece's adapted rows.
#[inline(always)]
unsafe fn look_down(job: &PrepareJob<'_>, mixing: &Mixing, tile: Tile, rows: Range<usize>, scratch: &mut RowScratch) {
    let active = &job.active[tile.first..][rows.clone()];
    let Some(most) = active.iter().max().map(|&active| active as usize).filter(|&active| active > 0) else {
        return;
    };
    // SAFETY: the contract of `prepare`: the piece has been packed.
    let (seen, products) = unsafe { see(job, tile, rows.clone(), most, scratch) };
    let mixed = job.mixed.get(tile.place * job.linear.down_rows);
    for (i, row) in rows.enumerate() {
        let (slot, active) = (job.slot(tile.first + row), active[i] as usize);
        for (number, part) in job.linear.parts.iter().enumerate() {
            if active == 0 {
                break;
            }
            let (core, rank) = mixing.core(part.site, slot);
            // SAFETY: a place among those that `see` has written.
            let seen_at = |j: usize| unsafe { *products.add(seen.place(number, part, j, i)) };
            // SAFETY: the tile's numbers are `down_rows` for each of its height; those of this row are this thread's.
            let write = |i: usize, value: f32| unsafe { *mixed.add((part.mixed + i) * tile.height + row) = value };
            if active == 2 && rank == 2 {
                // Nearly every adapter: written out, since the loops below cost more than their products.
                let ([a, b, c, d], [x, y]) = ([core[0], core[1], core[2], core[3]], [seen_at(0), seen_at(1)]);
                write(0, 0.0 + a * x + b * y);
                write(1, 0.0 + c * x + d * y);
                continue;
            }
            for (i, core) in core.chunks_exact(rank).take(active).enumerate() {
                write(i, (0..active).fold(0.0, |sum, j| sum + core[j] * seen_at(j)));
            }
        }
    }
}

/// Where a piece's V^T x lie in the scratch.
enum Seen {
    /// All of V, panel by panel: `[panel][height][16]`, with so many numbers a panel.
    Panels(usize),
    /// So many numbers of each part: `[part][number][16]`, with the rows in the lanes.
    Turned(usize),
}

impl Seen {
    /// Of number `j` of part `number`, for a row of the piece.
    #[inline(always)]
    fn place(&self, number: usize, part: &PartInfo, j: usize, row: usize) -> usize {
        match self {
            Self::Panels(stride) => {
                let at = part.mixed + j;
                at / LANES * stride + row * LANES + at % LANES
            }
            Self::Turned(most) => (number * most + j) * LANES + row,
        }
    }
}

/// `V^T x` of a piece, at least the first `most` numbers of every part. Turned or not are the same bits; turned is faster where the numbers
/// are fewer than the rows.
#[inline(always)]
unsafe fn see(
    job: &PrepareJob<'_>,
    tile: Tile,
    rows: Range<usize>,
    most: usize,
    scratch: &mut RowScratch,
) -> (Seen, *const f32) {
    let (linear, panels, layout) = (job.linear, job.linear.down.len(), job.linear.down.layout);
    let numbers = linear.parts.len() * most;
    let see_down = job.kernels.see_down;
    let turned = numbers < tile.height && see_down.is_none();
    let stride = tile.height * LANES;
    let room = if turned { numbers * LANES } else { panels * stride };
    let left = job.room.left(tile);
    let out = scratch.products.at_least(room * size_of::<f32>()).cast::<f32>();
    // SAFETY: `products` has the room; behind every tile of the job's room lie sixteen numbers; the caller vouches for the rest.
    unsafe {
        let tiles = Tiles { data: out, panel_stride: stride, add: false };
        if let Some(see_down) = see_down {
            // A piece begins with a tile's rows or with its second sixteen.
            let left = Left { words: left.words.add(rows.start * LANES), rows: rows.len(), ..left };
            for panel in 0..panels {
                let out = Tiles { data: out.add(panel * stride), ..tiles };
                see_down(left, linear.down_panel(panel).0, linear.down_columns(), out);
            }
            (Seen::Panels(stride), out)
        } else if turned {
            scratch.columns.clear();
            scratch.columns.extend(
                linear
                    .parts
                    .iter()
                    .flat_map(|part| part.mixed..part.mixed + most)
                    .map(|at| Column { panel: linear.down.panel(at / LANES), lane: at % LANES }),
            );
            (job.kernels.turned(layout))(left, &scratch.columns, out);
            (Seen::Turned(most), out)
        } else {
            scratch.panels.clear();
            scratch.panels.extend((0..panels).map(|panel| linear.down.panel(panel)));
            (job.kernels.multiply(layout))(left, &scratch.panels, tiles);
            (Seen::Panels(stride), out)
        }
    }
}
