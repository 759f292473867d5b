//! Packing a group of frozen linears.
#![allow(unsafe_code)]

use super::{
    format::{pack_bf16, pack_f32, pack_q4, pack_q8},
    isa::{Kernels, Widen, WidenedGroup},
    lanes::LANES,
    memory::{Arena, Lines, Region},
};
use crate::{
    Epilogue, KernelError, LinearPart, Precision, Weight,
    check::shape,
    rounding::{GROUP, Layout, Q4Block, Q8Block, quantize_q8},
};

/// Panels of one matrix.
pub(super) struct Panels {
    pub(super) layout: Layout,
    data: Region,
    panel_bytes: usize,
    count: usize,
}

/// A matrix in the numbers of its layout, row after row.
enum Matrix {
    Floats(Vec<f32>),
    Q8(Vec<Q8Block>),
    Q4(Vec<Q4Block>),
}

impl Matrix {
    fn of(weight: &Weight, layout: Layout) -> Result<Self, KernelError> {
        Ok(match layout {
            Layout::F32 | Layout::Bf16 => Self::Floats(weight.to_f32()?),
            Layout::Q8 => Self::Q8(weight.to_q8()?),
            Layout::Q4 => Self::Q4(weight.to_q4()?),
        })
    }
}

/// Up to this a number times 2^10 is an f16.
const WIDE: f32 = 63.0;

impl Matrix {
    /// See [`CpuLinear::wide`].
    fn is_wide(&self) -> bool {
        match self {
            Self::Floats(_) => false,
            Self::Q8(blocks) => blocks.iter().any(|block| block.scale.to_f32() * 127.0 > WIDE),
            Self::Q4(blocks) => blocks.iter().any(|Q4Block { scale, min, .. }| {
                let (scale, min) = (scale.to_f32(), min.to_f32());
                16.0 * scale > WIDE || (min - 16.0 * scale).abs() > WIDE || (min + 16.0 * scale).abs() > WIDE
            }),
        }
    }
}

impl Panels {
    /// Packs matrices `[rows, inputs]` one after another, each from a fresh panel.
    fn pack(arena: &Arena, matrices: &[Matrix], inputs: usize, layout: Layout) -> Self {
        let panel_bytes = layout.panel_bytes(inputs);
        let blocks = inputs.div_ceil(GROUP);
        let panels_of = |matrix: &Matrix| match matrix {
            Matrix::Floats(values) => (values.len() / inputs).div_ceil(LANES),
            Matrix::Q8(values) => (values.len() / blocks).div_ceil(LANES),
            Matrix::Q4(values) => (values.len() / blocks).div_ceil(LANES),
        };
        let count = matrices.iter().map(panels_of).sum();
        let data = arena.take(count * panel_bytes, |bytes| {
            let mut rest = bytes;
            for matrix in matrices {
                let (out, after) = std::mem::take(&mut rest).split_at_mut(panels_of(matrix) * panel_bytes);
                rest = after;
                let out = out.chunks_mut(panel_bytes);
                let (floats, blocks) = (inputs * LANES, blocks * LANES);
                match matrix {
                    Matrix::Floats(values) => values.chunks(floats).zip(out).for_each(|(rows, out)| match layout {
                        Layout::Bf16 => pack_bf16(rows, inputs, out),
                        _ => pack_f32(rows, inputs, out),
                    }),
                    Matrix::Q8(rows) => rows.chunks(blocks).zip(out).for_each(|(rows, out)| pack_q8(rows, inputs, out)),
                    Matrix::Q4(rows) => rows.chunks(blocks).zip(out).for_each(|(rows, out)| pack_q4(rows, inputs, out)),
                }
            }
        });
        Self { layout, data, panel_bytes, count }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Bytes of each.
    pub(super) fn panel_bytes(&self) -> usize {
        self.panel_bytes
    }

    /// All bytes of a panel.
    pub(super) fn bytes(&self, panel: usize) -> &[u8] {
        // SAFETY: the region holds every panel, written when it was taken and only read since.
        unsafe { std::slice::from_raw_parts(self.panel(panel), self.panel_bytes) }
    }

    /// The first byte of a panel.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.count, "panel {panel} of {}", self.count);
        self.data.as_ptr().wrapping_add(panel * self.panel_bytes)
    }

    /// The groups of all panels as tiles take them, one after another, without what belongs to outputs from `columns` on.
    fn narrow(&self, inputs: usize, columns: usize, widen: Widen) -> Lines {
        let groups = inputs.div_ceil(GROUP);
        let numbers = GROUP * columns;
        let mut lines = Lines::zeroed(self.count * groups * numbers * size_of::<u16>());
        let to = lines.as_mut_ptr().cast::<u16>();
        let mut room = WidenedGroup::default();
        for at in 0..self.count * groups {
            let (panel, group) = (at / groups, at % groups);
            if self.layout == Layout::Bf16 {
                room = WidenedGroup::of_bf16(self.bytes(panel), group);
            } else {
                // SAFETY: panels have this layout and so many inputs, and the function is of an instruction set that this processor has.
                unsafe { widen(self.layout, self.panel(panel), inputs, group, &mut room) };
            }
            // SAFETY: the lines hold so many groups, all zero, and nobody else sees them.
            let to = unsafe { std::slice::from_raw_parts_mut(to.add(at * numbers), numbers) };
            to.chunks_exact_mut(2 * columns).zip(room.narrow(columns)).for_each(|(to, line)| to.copy_from_slice(line));
        }
        lines
    }
}

/// What the epilogue needs to know of a panel of outputs.
#[derive(Clone, Copy)]
pub(super) struct PanelInfo {
    /// First column of the group's result.
    pub(super) column: usize,
    /// Columns, at most sixteen.
    pub(super) columns: usize,
    /// Rank of its part's adapters; 0: none.
    pub(super) rank: usize,
    /// Where the part's numbers begin in a row of `U`'s input (the mixed V x).
    pub(super) mixed: usize,
    /// The first of its `rank` rows of U.
    pub(super) up: usize,
}

/// A row of U for the sixteen outputs of a panel, on one cache line: of a row on two, only the first would be asked for in time.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct UpRow(pub(super) [f32; LANES]);

/// The factors of one part.
#[derive(Clone, Copy)]
pub(super) struct PartInfo {
    /// Number of the site.
    pub(super) site: usize,
    /// r
    pub(super) rank: usize,
    /// First of its r numbers in a row of V x.
    pub(super) mixed: usize,
}

/// A packed group of linears.
pub struct CpuLinear {
    pub(super) layout: Layout,
    /// Integers with scales that would not fit an f16 if they were 2^10 times as large.
    pub(super) wide: bool,
    /// What its integers become as they are multiplied, if they are widened.
    pub(super) widen: Option<Widen>,
    pub(super) inputs: usize,
    /// Outputs of each linear.
    pub(super) outputs: Vec<usize>,
    /// W of all parts.
    pub(super) weights: Panels,
    /// One a panel of W.
    pub(super) info: Vec<PanelInfo>,
    /// One a panel of W, padded to sixteen; empty when no part has a bias.
    pub(super) bias: Vec<f32>,
    /// The adapted parts.
    pub(super) parts: Vec<PartInfo>,
    /// V^T of all adapted parts as further output rows.
    pub(super) down: Panels,
    /// The same where there are tiles: its outputs are few, and every tile of rows reads them all. `[panel][inputs / 32][16]` lines of [`Self::down_columns`] pairs.
    narrow_down: Option<Lines>,
    /// Rows of `down`: the ranks' sum.
    pub(super) down_rows: usize,
    /// U, `[panel][rank]`.
    pub(super) up: Vec<UpRow>,
}

impl CpuLinear {
    /// Packs a group; see [`crate::Backend::linear`].
    pub(super) fn pack(
        arena: &Arena,
        kernels: &'static Kernels,
        parts: &[LinearPart<'_>],
        precision: Precision,
    ) -> Result<Self, KernelError> {
        let inputs = parts.first().map_or(0, |part| part.weight.cols);
        if inputs == 0 {
            return Err(shape("linear: a group without inputs"));
        }
        parts.iter().try_for_each(|part| part.check(inputs))?;
        let layout = Layout::of(precision, parts);
        let matrices = parts.iter().map(|part| Matrix::of(part.weight, layout)).collect::<Result<Vec<_>, _>>()?;
        let mut linear = Self {
            layout,
            wide: matrices.iter().any(Matrix::is_wide),
            widen: None,
            inputs,
            outputs: parts.iter().map(|part| part.weight.rows).collect(),
            weights: Panels::pack(arena, &matrices, inputs, layout),
            info: Vec::new(),
            bias: Vec::new(),
            parts: Vec::new(),
            down: Panels::pack(arena, &[], inputs, layout.of_factors()),
            narrow_down: None,
            down_rows: 0,
            up: Vec::new(),
        };
        let has_bias = parts.iter().any(|part| part.bias.is_some());
        let mut down = Vec::new();
        let mut column = 0;
        for part in parts {
            linear.describe(part, column, has_bias);
            if let Some(factors) = part.factors.filter(|factors| factors.rank > 0) {
                let rank = factors.rank;
                linear.parts.push(PartInfo { site: factors.site, rank, mixed: linear.down_rows });
                linear.down_rows += rank;
                down.extend((0..rank * inputs).map(|i| factors.v[i % inputs * rank + i / inputs]));
            }
            column += part.weight.rows;
        }
        let down = match layout.of_factors() {
            Layout::Q8 => Matrix::Q8(quantize_q8(&down, inputs)),
            _ => Matrix::Floats(down),
        };
        linear.wide |= down.is_wide();
        linear.down = Panels::pack(arena, &[down], inputs, layout.of_factors());
        linear.widen = linear.kernels(kernels).widen;
        if let Some(widen) = linear.widen.filter(|_| linear.down.len() > 0) {
            linear.narrow_down = Some(linear.down.narrow(inputs, linear.down_columns(), widen));
        }
        Ok(linear)
    }

    /// Outputs of each panel of V^T that are somebody's, or sixteen if there are several panels.
    pub(super) fn down_columns(&self) -> usize {
        self.down_rows.min(LANES)
    }

    /// A panel of V^T as it is multiplied, and its bytes.
    pub(super) fn down_panel(&self, panel: usize) -> (*const u8, usize) {
        let Some(narrow) = &self.narrow_down else { return (self.down.panel(panel), self.down.panel_bytes()) };
        let bytes = self.inputs.div_ceil(GROUP) * GROUP * self.down_columns() * size_of::<u16>();
        (narrow.as_ptr().wrapping_add(panel * bytes), bytes)
    }

    /// Those of a backend's kernels that multiply it.
    pub(super) fn kernels(&self, kernels: &'static Kernels) -> &'static Kernels {
        kernels.of(self.layout, self.wide)
    }

    /// Columns of the result.
    pub(super) fn width(&self, epilogue: Epilogue) -> usize {
        if epilogue == Epilogue::SwiGlu { self.outputs[0] } else { self.outputs.iter().sum() }
    }

    /// Adds the panels of a part whose first output is `column` of the group.
    fn describe(&mut self, part: &LinearPart<'_>, column: usize, has_bias: bool) {
        for first in (0..part.weight.rows).step_by(LANES) {
            let columns = LANES.min(part.weight.rows - first);
            let rank = part.factors.map_or(0, |factors| factors.rank);
            self.info.push(PanelInfo {
                column: column + first,
                columns,
                rank,
                mixed: self.down_rows,
                up: self.up.len(),
            });
            if has_bias {
                let at = self.bias.len();
                self.bias.resize(at + LANES, 0.0);
                if let Some(bias) = part.bias {
                    self.bias[at..at + columns].copy_from_slice(&bias[first..first + columns]);
                }
            }
            if let Some(factors) = part.factors {
                for i in 0..rank {
                    let u = |lane: usize| if lane < columns { factors.u[(first + lane) * rank + i] } else { 0.0 };
                    self.up.push(UpRow(std::array::from_fn(u)));
                }
            }
        }
    }
}
