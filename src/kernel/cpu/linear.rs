//! Packing a group of frozen linears.

use super::{
    format::{Bf16, F32, Format, Q8},
    lanes::LANES,
    memory::Lines,
};
use crate::kernel::{KernelError, LinearPart, Precision, check::shape};

/// Panels of one matrix.
pub(super) struct Panels {
    data: Lines,
    panel_bytes: usize,
    count: usize,
}

impl Panels {
    /// Packs matrices `[rows, inputs]` one after another, each from a fresh panel.
    fn pack(matrices: &[Vec<f32>], inputs: usize, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::pack_as::<F32>(matrices, inputs),
            Precision::Bf16 => Self::pack_as::<Bf16>(matrices, inputs),
            Precision::Q8 => Self::pack_as::<Q8>(matrices, inputs),
        }
    }

    fn pack_as<F: Format>(matrices: &[Vec<f32>], inputs: usize) -> Self {
        let panel_bytes = F::panel_bytes(inputs);
        let count = matrices.iter().map(|matrix| (matrix.len() / inputs).div_ceil(LANES)).sum();
        let mut data = Lines::zeroed(count * panel_bytes);
        let panels = matrices.iter().flat_map(|matrix| matrix.chunks(inputs * LANES));
        for (rows, out) in panels.zip(data.bytes_mut().chunks_mut(panel_bytes)) {
            let rows: Vec<&[f32]> = rows.chunks(inputs).collect();
            F::pack(&rows, inputs, out);
        }
        Self { data, panel_bytes, count }
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// The first byte of a panel.
    pub(super) fn panel(&self, panel: usize) -> *const u8 {
        assert!(panel < self.count, "panel {panel} of {}", self.count);
        self.data.as_ptr().wrapping_add(panel * self.panel_bytes)
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
    /// Where its U begins: `[rank][16]`.
    pub(super) up: usize,
}

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
    pub(super) precision: Precision,
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
    /// Rows of `down`: the ranks' sum.
    pub(super) down_rows: usize,
    /// U, `[panel][rank][16]`.
    pub(super) up: Vec<f32>,
}

impl CpuLinear {
    /// Packs a group; see [`crate::kernel::Backend::linear`].
    pub(super) fn pack(parts: &[LinearPart<'_>], precision: Precision) -> Result<Self, KernelError> {
        let inputs = parts.first().map_or(0, |part| part.weight.cols);
        if inputs == 0 {
            return Err(shape("linear: a group without inputs"));
        }
        parts.iter().try_for_each(|part| part.check(inputs))?;
        let weights = parts.iter().map(|part| part.weight.to_f32()).collect::<Result<Vec<_>, _>>()?;
        let mut linear = Self {
            precision,
            inputs,
            outputs: parts.iter().map(|part| part.weight.rows).collect(),
            weights: Panels::pack(&weights, inputs, precision),
            info: Vec::new(),
            bias: Vec::new(),
            parts: Vec::new(),
            down: Panels::pack(&[], inputs, precision),
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
        linear.down = Panels::pack(&[down], inputs, precision);
        Ok(linear)
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
                    self.up.extend((0..LANES).map(u));
                }
            }
        }
    }
}
