//! A product: [`super::prepare`] has made its rows ready; each tile is multiplied, and ended while it is in the cache.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    activations::{Form, MAX_HEIGHT, Room, Tile, places},
    format::WORD_LINE,
    isa::{Kernels, Region, Tiling},
    lanes::{LANES, Lanes, load_partial, silu, store_partial},
    linear::{CpuLinear, UpRow},
    memory::Shared,
    prepare::RowScratch,
    tile::{Left, Tiles},
};
use crate::{Epilogue, rounding::Layout};

/// Panels that are ever handled together: with few rows it takes several to keep the multipliers and the memory busy.
const MAX_PANELS: usize = 4;
/// Activations that are walked over again and again for panel after panel: they should stay in the second-level cache.
const BLOCK_BYTES: usize = 384 << 10;
/// The same where panels are widened first, which should not happen often: so much of a cache of two MiB.
const TILED_BLOCK_BYTES: usize = 1 << 20;

/// A product whose rows are ready: see [`product`].
pub(super) struct ProductJob<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) linear: &'a CpuLinear,
    /// The rows, cut.
    pub(super) tiles: &'a [Tile],
    /// Where they have been packed.
    pub(super) room: Room,
    /// Of each tile `[down_rows][height]`; read for adapted rows only.
    pub(super) mixed: Shared<f32>,
    /// As in [`super::prepare::PrepareJob::active`].
    pub(super) active: &'a [u32],
    pub(super) epilogue: Epilogue,
    /// `[rows, width]`. Each unit's columns belong to one thread.
    pub(super) out: Shared<f32>,
    pub(super) width: usize,
}

impl ProductJob<'_> {
    /// Independent pieces of the result: a panel, or a panel of gate with its panel of up.
    pub(super) fn units(&self) -> usize {
        self.linear.weights.len() / self.panels_per_unit()
    }

    /// The panel of number `i` among those of units `first..`.
    fn panel(&self, first: usize, i: usize) -> usize {
        match self.epilogue {
            Epilogue::Store | Epilogue::Add => first + i,
            Epilogue::SwiGlu => first + i / 2 + i % 2 * self.units(),
        }
    }

    fn panels_per_unit(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 }
    }

    /// Units that are multiplied together: with few rows, several panels.
    pub(super) fn units_at_once(&self) -> usize {
        let panels = match self.tiles.first().map_or(0, |tile| tile.height) {
            0..=2 => MAX_PANELS,
            3..=6 => 2,
            _ if self.kernels.form == Form::Tiles => 2,
            _ => 1,
        };
        (panels / self.panels_per_unit()).max(1)
    }
}

/// Multiplies all rows with the panels of some units and ends them.
///
/// # Safety
/// The processor has the instructions of `T`; the rooms hold all tiles; the columns of these units in `out` are this thread's.
#[inline(always)]
pub(super) unsafe fn product<T: Tiling>(job: &ProductJob<'_>, units: Range<usize>, scratch: &mut RowScratch) {
    let weights = &job.linear.weights;
    let multiply = job.kernels.multiply(weights.layout);
    let at_once = job.units_at_once();
    let tiled = T::FORM == Form::Tiles;
    let tallest = job.kernels.heights.last().copied().unwrap_or(1);
    let block_bytes = if tiled { TILED_BLOCK_BYTES } else { BLOCK_BYTES };
    let block = (block_bytes / (job.room.row_words * 4 * tallest)).max(1);
    let tile_out = scratch.tile.at_least(MAX_PANELS * MAX_HEIGHT * WORD_LINE).cast::<f32>();
    // Panels of integers are widened for the first tile, and kept as panels of bfloat16 for the others.
    let widens = tiled && weights.layout != Layout::Bf16;
    let (again, inputs) =
        if widens { (Layout::Bf16, job.room.row_words * 2) } else { (weights.layout, job.linear.inputs) };
    let again = job.kernels.multiply(again);
    let widened_bytes = Layout::Bf16.panel_bytes(inputs);
    let widened = if widens { scratch.widened.at_least(MAX_PANELS * widened_bytes) } else { std::ptr::null_mut() };
    // SAFETY: the instruction set, by contract.
    unsafe { T::begin(Region::Products) };
    let mut pointers = [std::ptr::null(); MAX_PANELS];
    // Half of what the adapters see was written by other threads: it comes while the first tile is multiplied, and so does the first U.
    if !job.active.is_empty() {
        ask_for_u::<T::Lanes>(job, units.start..units.end.min(units.start + at_once));
        let mixed = job.mixed.get(0).cast_const();
        let numbers = places(job.tiles) * job.linear.down_rows;
        (0..numbers.min(MIXED_AHEAD)).step_by(LANES).for_each(|at| T::Lanes::prefetch(mixed.wrapping_add(at).cast()));
    }
    for tiles in job.tiles.chunks(block) {
        for first in units.clone().step_by(at_once) {
            let count = job.panels_per_unit() * at_once.min(units.end - first);
            for (i, pointer) in pointers[..count].iter_mut().enumerate() {
                *pointer = weights.panel(job.panel(first, i));
            }
            // The panels of the next units follow at once: the first tile asks for them while it reads these.
            let ahead = if first + at_once < units.end { at_once * weights.panel_bytes() } else { 0 };
            if ahead > 0 && !job.active.is_empty() {
                ask_for_u::<T::Lanes>(job, first + at_once..units.end.min(first + 2 * at_once));
            }
            for (number, &tile) in tiles.iter().enumerate() {
                let out = Tiles { data: tile_out, panel_stride: MAX_HEIGHT * LANES, add: false };
                let left = job.room.left(tile);
                // SAFETY: all panels by the highest tile fit `tile_out`, and `widened` if there are any; the epilogue stays in these units' columns.
                unsafe {
                    if number == 0 {
                        let widened = if tiles.len() > 1 { widened } else { std::ptr::null_mut() };
                        multiply(Left { ahead, widened, ..left }, &pointers[..count], out);
                        if !widened.is_null() {
                            for (i, pointer) in pointers[..count].iter_mut().enumerate() {
                                *pointer = widened.add(i * widened_bytes);
                            }
                        }
                    } else {
                        again(Left { inputs, ..left }, &pointers[..count], out);
                    }
                    end_tile::<T::Lanes>(job, first, count, tile, tile_out);
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe { T::end() };
}

/// Asks for the rows of U that the ends of some units begin with.
#[inline(always)]
fn ask_for_u<L: Lanes>(job: &ProductJob<'_>, units: Range<usize>) {
    for i in 0..job.panels_per_unit() * units.len() {
        let up = job.linear.up.as_ptr().wrapping_add(job.linear.info[job.panel(units.start, i)].up);
        (0..KEPT).for_each(|row| L::prefetch(up.wrapping_add(row).cast()));
    }
}

/// Bias, adapter and epilogue of a tile of `count` panels.
#[inline(always)]
unsafe fn end_tile<L: Lanes>(job: &ProductJob<'_>, first_unit: usize, count: usize, tile: Tile, products: *const f32) {
    for i in (0..count).step_by(job.panels_per_unit()) {
        // SAFETY: the contract of `product`: rows and columns of `out` exist and are this thread's; the tile has rows below MAX_HEIGHT.
        unsafe {
            let panel = job.panel(first_unit, i);
            let ending = Ending::<L>::of(job, panel, tile);
            let products = products.add(i * MAX_HEIGHT * LANES);
            // What a row does not have to ask is written out: beside the products the question would be seen.
            match tile.active {
                _ if !ending.adapted => end_panel::<L, NONE>(job, panel, &ending, tile, products),
                Some(0) => end_panel::<L, NONE>(job, panel, &ending, tile, products),
                Some(2) => end_panel::<L, TWO>(job, panel, &ending, tile, products),
                _ => end_panel::<L, ANY>(job, panel, &ending, tile, products),
            }
        }
    }
}

/// [`Ending::corrected`] of rows without adapters.
const NONE: usize = 0;
/// Of rows that all have two active numbers a site.
const TWO: usize = 2;
/// Of rows that each have to be asked.
const ANY: usize = usize::MAX;

/// The end of one panel, or of a panel of gate with its panel of up.
#[inline(always)]
unsafe fn end_panel<L: Lanes, const ACTIVE: usize>(
    job: &ProductJob<'_>,
    panel: usize,
    ending: &Ending<'_, L>,
    tile: Tile,
    products: *const f32,
) {
    // SAFETY: the contract of `end_tile`.
    unsafe {
        let info = &job.linear.info[panel];
        // No closures here or below: the compiler does not compile them for the instruction set, and then calls every instruction.
        let out = job.out.get(tile.first * job.width + info.column);
        match job.epilogue {
            Epilogue::Store => {
                for row in 0..tile.rows {
                    let value = ending.corrected::<ACTIVE>(row, L::load(products.add(row * LANES)));
                    store_partial(value, out.add(row * job.width), info.columns);
                }
            }
            Epilogue::Add => {
                for row in 0..tile.rows {
                    let value = ending.corrected::<ACTIVE>(row, L::load(products.add(row * LANES)));
                    let out = out.add(row * job.width);
                    store_partial(load_partial::<L>(out, info.columns).add(value), out, info.columns);
                }
            }
            Epilogue::SwiGlu => {
                let other = Ending::<L>::of(job, panel + job.units(), tile);
                // Rows of a panel that is not whole are stored number by number, and so one by one.
                let whole = if info.columns == LANES { tile.rows / GATED * GATED } else { 0 };
                for row in (0..whole).step_by(GATED) {
                    end_gated::<L, ACTIVE, GATED>(job, LANES, [ending, &other], row, products, out);
                }
                for row in whole..tile.rows {
                    end_gated::<L, ACTIVE, 1>(job, info.columns, [ending, &other], row, products, out);
                }
            }
        }
    }
}

/// Rows of gate and up that are ended together: see [`exp`](super::lanes::exp).
const GATED: usize = 4;

/// Some rows of a panel of gate with its panel of up.
#[inline(always)]
unsafe fn end_gated<L: Lanes, const ACTIVE: usize, const ROWS: usize>(
    job: &ProductJob<'_>,
    columns: usize,
    [gates, ups]: [&Ending<'_, L>; 2],
    first: usize,
    products: *const f32,
    out: *mut f32,
) {
    // SAFETY: the contract of `end_tile`.
    unsafe {
        let (mut gate, mut up) = ([L::splat(0.0); ROWS], [L::splat(0.0); ROWS]);
        for i in 0..ROWS {
            let product = products.add((first + i) * LANES);
            gate[i] = gates.corrected::<ACTIVE>(first + i, L::load(product));
            up[i] = L::load(product.add(MAX_HEIGHT * LANES));
            up[i] = if ups.adapted == gates.adapted {
                ups.corrected::<ACTIVE>(first + i, up[i])
            } else {
                ups.corrected::<ANY>(first + i, up[i])
            };
        }
        let gate = silu(gate);
        for i in 0..ROWS {
            store_partial(gate[i].mul(up[i]), out.add((first + i) * job.width), columns);
        }
    }
}

/// Numbers of the mixed V x that are asked for at once: those of 170 rows of q|k|v at rank 2.
const MIXED_AHEAD: usize = 1024;

/// Rows of U that are kept in registers: more than this an adapter seldom has.
const KEPT: usize = 2;

/// What ends a panel: its bias and its U.
struct Ending<'a, L> {
    biased: bool,
    bias: L,
    /// The part has factors, and some row an adapter.
    adapted: bool,
    /// [`crate::Cores::active`] of the tile's rows, if `adapted`.
    active: &'a [u32],
    kept: [L; KEPT],
    up: &'a [UpRow],
    /// The part's first number of the tile's first row in the mixed V x; the next row's follows, and the next number lies `stride` further.
    mixed: *const f32,
    stride: usize,
}

impl<'a, L: Lanes> Ending<'a, L> {
    /// # Safety
    /// The processor has the instructions of `L`.
    #[inline(always)]
    unsafe fn of(job: &ProductJob<'a>, panel: usize, tile: Tile) -> Self {
        let (linear, info) = (job.linear, &job.linear.info[panel]);
        // SAFETY: all loads are of sixteen numbers from slices that were cut to sixteen.
        unsafe {
            let up = &linear.up[info.up..info.up + info.rank];
            let mut kept = [L::splat(0.0); KEPT];
            // A step of the base alone does not touch U: a line that is not in the cache costs more than the panel's end.
            if !job.active.is_empty() {
                for (i, kept) in kept.iter_mut().enumerate() {
                    if i < info.rank {
                        *kept = L::load(up[i].0.as_ptr());
                    }
                }
            }
            let biased = !linear.bias.is_empty();
            let bias = if biased { &linear.bias[panel * LANES..(panel + 1) * LANES] } else { &[0.0; LANES] };
            Self {
                biased,
                bias: L::load(bias.as_ptr()),
                adapted: info.rank > 0 && !job.active.is_empty(),
                active: if job.active.is_empty() { &[] } else { &job.active[tile.first..] },
                kept,
                up,
                mixed: job.mixed.get(tile.place * linear.down_rows + info.mixed * tile.height).cast_const(),
                stride: tile.height,
            }
        }
    }

    /// `W x + b + U h` of one row of the tile, from `W x`. ACTIVE is [`NONE`], [`TWO`] or [`ANY`].
    ///
    /// # Safety
    /// The processor has the instructions of `L`; if the row is adapted, its mixed numbers have been written.
    #[inline(always)]
    unsafe fn corrected<const ACTIVE: usize>(&self, row: usize, product: L) -> L {
        // SAFETY: `mixed` has `active` numbers of this part in an adapted row, and `up` as many rows.
        unsafe {
            let mut value = product;
            if self.biased {
                value = value.add(self.bias);
            }
            if ACTIVE == NONE {
                return value;
            }
            let mixed = self.mixed.add(row);
            if ACTIVE == TWO {
                return L::splat(*mixed.add(self.stride)).fma(self.kept[1], L::splat(*mixed).fma(self.kept[0], value));
            }
            let active = if self.adapted { self.active[row] as usize } else { 0 };
            if active > 0 {
                value = L::splat(*mixed).fma(self.kept[0], value);
            }
            if active > 1 {
                value = L::splat(*mixed.add(self.stride)).fma(self.kept[1], value);
            }
            for i in KEPT..active {
                value = L::splat(*mixed.add(i * self.stride)).fma(L::load(self.up[i].0.as_ptr()), value);
            }
            value
        }
    }
}
