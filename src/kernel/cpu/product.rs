//! A product in two regions: `prepare` gathers and normalises the rows and mixes what their adapters see of them, `product` multiplies
//! and ends each tile while it is in the cache.
#![allow(unsafe_code)]

use std::ops::Range;

use super::{
    isa::{Kernels, Tiling},
    lanes::{LANES, Lanes, load_partial, silu, store_partial, sum},
    linear::CpuLinear,
    memory::Shared,
    tile::{Left, Tiles},
};
use crate::kernel::{BASE_SLOT, Cores, Epilogue};

/// Rows of the largest tile of any instruction set.
pub(super) const MAX_ROWS: usize = 12;
/// Panels that are ever handled together: both halves of SwiGLU, with few rows.
const MAX_PANELS: usize = 4;
/// Activations that are walked over again and again for panel after panel: they should stay in the second-level cache.
const BLOCK_BYTES: usize = 384 << 10;

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
    /// `[rows, inputs]`, written only if there is something to gather or to normalise. Each row belongs to one thread.
    pub(super) prepared: Shared<f32>,
    /// The core of a row's adapter by its slot; empty when no row has an adapter, or the linear none.
    pub(super) cores: &'a [std::sync::Arc<Cores>],
    /// Slot of every row of the step.
    pub(super) slots: &'a [u32],
    /// `[rows, linear.down_rows]`: `C V^T x` of the adapted rows. Each row belongs to one thread.
    pub(super) mixed: Shared<f32>,
}

impl PrepareJob<'_> {
    fn row_of_step(&self, row: usize) -> usize {
        self.chosen.map_or(row, |chosen| chosen[row] as usize)
    }
}

/// Gathers, normalises, and mixes rows of a product.
///
/// # Safety
/// The processor has the instructions of `T`; the job's pointers are valid for all rows in range, which no other thread touches.
#[inline(always)]
pub(super) unsafe fn prepare<T: Tiling>(job: &PrepareJob<'_>, rows: Range<usize>) {
    let width = job.linear.inputs;
    let copies = job.norm.is_some() || job.chosen.is_some();
    if copies {
        for row in rows.clone() {
            let from = job.row_of_step(row) * width;
            let from = job.x[from..from + width].as_ptr();
            // SAFETY: `from` was sliced to `width`; row `row` of `prepared` is this thread's.
            unsafe {
                let to = job.prepared.0.add(row * width);
                match job.norm {
                    Some((weight, epsilon)) => rms_norm::<T::Lanes>(from, &weight[..width], epsilon, to),
                    None => std::ptr::copy_nonoverlapping(from, to, width),
                }
            }
        }
    }
    if job.cores.is_empty() {
        return;
    }
    let input = if copies { job.prepared.0.cast_const() } else { job.x.as_ptr() };
    let panels: Vec<*const u8> = (0..job.linear.down.len()).map(|panel| job.linear.down.panel(panel)).collect();
    let mut products = vec![0f32; panels.len() * T::ROWS * LANES];
    for first in rows.clone().step_by(T::ROWS) {
        let count = T::ROWS.min(rows.end - first);
        // SAFETY: rows first.. of the input are valid (all of x, or just prepared by this thread); `products` holds ROWS x 16 a panel.
        unsafe {
            let left = Left { data: input.add(first * width), stride: width, rows: count, inputs: width };
            let out = Tiles { data: products.as_mut_ptr(), panel_stride: T::ROWS * LANES, add: false };
            (job.kernels.multiply(job.linear.precision))(left, &panels, out);
        }
        for row in 0..count {
            mix(job, first + row, |j| products[(j / LANES * T::ROWS + row) * LANES + j % LANES]);
        }
    }
}

/// `mixed = C (V^T x)` of one row for every part; `down(j)` is the j-th of V^T x.
#[inline(always)]
fn mix(job: &PrepareJob<'_>, row: usize, down: impl Fn(usize) -> f32) {
    let slot = job.slots[job.row_of_step(row)];
    if slot == BASE_SLOT {
        return;
    }
    let cores = &job.cores[slot as usize];
    for part in &job.linear.parts {
        let core = cores.site(part.site);
        for i in 0..part.rank {
            let mut mixed = 0.0;
            for j in 0..part.rank {
                mixed += core[i * part.rank + j] * down(part.mixed + j);
            }
            // SAFETY: part.mixed + i is below down_rows; this row of `mixed` is this thread's.
            unsafe { *job.mixed.0.add(row * job.linear.down_rows + part.mixed + i) = mixed };
        }
    }
}

/// A product whose rows are ready: see [`product`].
pub(super) struct ProductJob<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) linear: &'a CpuLinear,
    /// `[rows, inputs]`
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    /// `[rows, down_rows]`; read for adapted rows only.
    pub(super) mixed: &'a [f32],
    /// Slot of every row of the product; empty when no row has an adapter, or the linear none.
    pub(super) slots: &'a [u32],
    pub(super) epilogue: Epilogue,
    /// `[rows, width]`. Each unit's columns belong to one thread.
    pub(super) out: Shared<f32>,
    pub(super) width: usize,
}

impl ProductJob<'_> {
    /// Independent pieces of the result: a panel, or a panel of gate with its panel of up.
    pub(super) fn units(&self) -> usize {
        match self.epilogue {
            Epilogue::Store | Epilogue::Add => self.linear.weights.len(),
            Epilogue::SwiGlu => self.linear.weights.len() / 2,
        }
    }

    /// How many panels a unit has, and the panel of number `i` among those of units `first..`.
    fn panel(&self, first: usize, i: usize) -> usize {
        match self.epilogue {
            Epilogue::Store | Epilogue::Add => first + i,
            Epilogue::SwiGlu => first + i / 2 + i % 2 * self.units(),
        }
    }

    fn panels_per_unit(&self) -> usize {
        if self.epilogue == Epilogue::SwiGlu { 2 } else { 1 }
    }
}

/// Multiplies all rows with the panels of some units and ends them.
///
/// # Safety
/// The processor has the instructions of `T`; `x` and `mixed` hold all rows; the columns of these units in `out` are this thread's.
#[inline(always)]
pub(super) unsafe fn product<T: Tiling>(job: &ProductJob<'_>, units: Range<usize>) {
    let width = job.linear.inputs;
    let multiply = job.kernels.multiply(job.linear.precision);
    let wanted = if job.rows <= 2 { T::FEW_PANELS } else { T::PANELS };
    let units_at_once = (wanted / job.panels_per_unit()).max(1);
    let block = (BLOCK_BYTES / (4 * width * T::ROWS)).max(1) * T::ROWS;
    let mut tile = [0f32; MAX_PANELS * MAX_ROWS * LANES];
    let mut pointers = [std::ptr::null(); MAX_PANELS];
    for block_start in (0..job.rows).step_by(block) {
        let block_end = job.rows.min(block_start + block);
        for first_unit in units.clone().step_by(units_at_once) {
            let count = job.panels_per_unit() * units_at_once.min(units.end - first_unit);
            for (i, pointer) in pointers[..count].iter_mut().enumerate() {
                *pointer = job.linear.weights.panel(job.panel(first_unit, i));
            }
            for first in (block_start..block_end).step_by(T::ROWS) {
                let rows = T::ROWS.min(block_end - first);
                let x = job.x[first * width..(first + rows) * width].as_ptr();
                let left = Left { data: x, stride: width, rows, inputs: width };
                let out = Tiles { data: tile.as_mut_ptr(), panel_stride: MAX_ROWS * LANES, add: false };
                // SAFETY: x was sliced to these rows; count <= 4 panels and rows <= 12 fit the tile; the epilogue stays in these units' columns.
                unsafe {
                    multiply(left, &pointers[..count], out);
                    end_tile::<T::Lanes>(job, first_unit, count, first, rows, &tile);
                }
            }
        }
    }
}

/// Bias, adapter and epilogue of a tile of `count` panels by `rows` rows.
#[inline(always)]
unsafe fn end_tile<L: Lanes>(
    job: &ProductJob<'_>,
    first_unit: usize,
    count: usize,
    first_row: usize,
    rows: usize,
    tile: &[f32; MAX_PANELS * MAX_ROWS * LANES],
) {
    for row in 0..rows {
        let mut i = 0;
        while i < count {
            // SAFETY: the contract of `product`: row and columns of `out` exist and are this thread's.
            unsafe {
                let panel = job.panel(first_unit, i);
                let info = &job.linear.info[panel];
                let value = corrected::<L>(job, panel, first_row + row, &tile[(i * MAX_ROWS + row) * LANES..]);
                let out = job.out.0.add((first_row + row) * job.width + info.column);
                match job.epilogue {
                    Epilogue::Store => store_partial(value, out, info.columns),
                    Epilogue::Add => {
                        store_partial(load_partial::<L>(out, info.columns).add(value), out, info.columns);
                    }
                    Epilogue::SwiGlu => {
                        let panel = job.panel(first_unit, i + 1);
                        let up =
                            corrected::<L>(job, panel, first_row + row, &tile[((i + 1) * MAX_ROWS + row) * LANES..]);
                        store_partial(silu(value).mul(up), out, info.columns);
                    }
                }
            }
            i += job.panels_per_unit();
        }
    }
}

/// `W x + b + U h` of one row and panel, from `W x`.
#[inline(always)]
unsafe fn corrected<L: Lanes>(job: &ProductJob<'_>, panel: usize, row: usize, product: &[f32]) -> L {
    let linear = job.linear;
    let info = &linear.info[panel];
    // SAFETY: all loads are of sixteen numbers from slices that were cut to sixteen at least.
    unsafe {
        let mut value = L::load(product[..LANES].as_ptr());
        if !linear.bias.is_empty() {
            value = value.add(L::load(linear.bias[panel * LANES..(panel + 1) * LANES].as_ptr()));
        }
        if info.rank > 0 && job.slots.get(row).is_some_and(|&slot| slot != BASE_SLOT) {
            let at = row * linear.down_rows + info.mixed;
            let up = &linear.up[info.up..info.up + info.rank * LANES];
            for (mixed, up) in job.mixed[at..at + info.rank].iter().zip(up.chunks_exact(LANES)) {
                value = L::splat(*mixed).fma(L::load(up.as_ptr()), value);
            }
        }
        value
    }
}
