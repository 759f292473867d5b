//! A group of linears as one product, and its adapters as three small ones.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::{step::CandleStep, upload};
use crate::{
    Cores, DenseFactors, DensePart, KernelError, LinearPart, Precision,
    check::{check_dense, check_factors, shape},
};

/// A packed group of linears.
pub struct CandleLinear {
    pub(super) inputs: usize,
    /// Outputs of each linear.
    pub(super) outputs: Vec<usize>,
    /// `[outputs, inputs]` of all parts after one another.
    weight: Tensor,
    /// `[outputs]`, f32.
    bias: Option<Tensor>,
    /// V of the adapted parts side by side, f32 `[inputs, sum of ranks]`.
    down: Option<Tensor>,
    parts: Vec<Part>,
}

struct Part {
    outputs: usize,
    factors: Option<Factors>,
}

struct Factors {
    site: usize,
    rank: usize,
    /// First of its columns in `down`.
    first: usize,
    /// U^T, f32 `[rank, outputs]`.
    up: Tensor,
}

impl CandleLinear {
    /// Puts a group on a device; see [`crate::Backend::linear`].
    pub(super) fn new(parts: &[LinearPart<'_>], precision: Precision, device: &Device) -> Result<Self, KernelError> {
        let inputs = parts.first().map_or(0, |part| part.weight.cols);
        if inputs == 0 {
            return Err(shape("linear: a group without inputs"));
        }
        parts.iter().try_for_each(|part| part.check(inputs))?;
        let weights = parts.iter().map(|part| upload(part.weight, precision, device)).collect::<Result<Vec<_>, _>>()?;
        let bias = if parts.iter().any(|part| part.bias.is_some()) {
            let of = |part: &LinearPart<'_>| part.bias.map_or(vec![0.0; part.weight.rows], <[f32]>::to_vec);
            let bias: Vec<f32> = parts.iter().flat_map(of).collect();
            Some(Tensor::new(bias, device)?)
        } else {
            None
        };
        let (mut down, mut first, mut packed) = (Vec::new(), 0, Vec::new());
        for part in parts {
            let outputs = part.weight.rows;
            let factors = match part.factors.filter(|factors| factors.rank > 0) {
                Some(factors) => {
                    let rank = factors.rank;
                    down.push(Tensor::from_slice(factors.v, (inputs, rank), device)?);
                    let up = Tensor::from_slice(factors.u, (outputs, rank), device)?.t()?.contiguous()?;
                    first += rank;
                    Some(Factors { site: factors.site, rank, first: first - rank, up })
                }
                None => None,
            };
            packed.push(Part { outputs, factors });
        }
        Ok(Self {
            inputs,
            outputs: packed.iter().map(|part| part.outputs).collect(),
            weight: Tensor::cat(&weights, 0)?,
            bias,
            down: if down.is_empty() { None } else { Some(Tensor::cat(&down, 1)?.contiguous()?) },
            parts: packed,
        })
    }

    /// Checks that a step's cores fit.
    pub(super) fn check(&self, step: &CandleStep) -> Result<(), KernelError> {
        let mut factors = self.parts.iter().filter_map(|part| part.factors.as_ref());
        factors.try_for_each(|factors| check_factors(&step.facts, factors.rank, factors.site))
    }

    /// `W x + b + U (C_row (V^T x))`, f32 `[rows, outputs]`, for x f32 `[rows, inputs]`, cores `[slots, sites, r * r]` and the slot of every row.
    pub(super) fn forward(&self, x: &Tensor, cores: Option<(&Tensor, &Tensor)>) -> candle_core::Result<Tensor> {
        let mut y = x.to_dtype(self.weight.dtype())?.matmul(&self.weight.t()?)?.to_dtype(DType::F32)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        let (Some(down), Some((cores, slots))) = (&self.down, cores) else { return Ok(y) };
        let seen = x.matmul(down)?;
        let rows = seen.dims()[0];
        let mut deltas = Vec::with_capacity(self.parts.len());
        for part in &self.parts {
            deltas.push(match &part.factors {
                Some(factors) => {
                    let rank = factors.rank;
                    let core = cores.narrow(1, factors.site, 1)?.squeeze(1)?.contiguous()?;
                    let core = core.index_select(slots, 0)?.reshape((rows, rank, rank))?;
                    let seen = seen.narrow(1, factors.first, rank)?.contiguous()?.reshape((rows, rank, 1))?;
                    core.matmul(&seen)?.reshape((rows, rank))?.matmul(&factors.up)?
                }
                None => Tensor::zeros((rows, part.outputs), DType::F32, y.device())?,
            });
        }
        y + Tensor::cat(&deltas, 1)?
    }

    /// See [`crate::Backend::dense`].
    pub(super) fn dense(&self, outputs: Range<usize>, cores: Option<&Cores>) -> Result<Tensor, KernelError> {
        let factors = self.parts.iter().filter_map(|part| part.factors.as_ref());
        check_dense(self.outputs.iter().sum(), &outputs, cores, factors.map(|factors| (factors.site, factors.rank)))?;
        let (mut pieces, mut first) = (Vec::new(), 0);
        for part in &self.parts {
            let range = outputs.start.max(first)..outputs.end.min(first + part.outputs);
            if !range.is_empty() {
                let weight = self.weight.narrow(0, range.start, range.len())?.to_dtype(DType::F32)?;
                pieces.push(match (&part.factors, &self.down, cores) {
                    (Some(factors), Some(down), Some(cores)) => {
                        let rank = factors.rank;
                        let core = Tensor::from_slice(cores.site(factors.site), (rank, rank), weight.device())?;
                        let u = factors.up.narrow(1, range.start - first, range.len())?.t()?.contiguous()?;
                        let v = down.narrow(1, factors.first, rank)?.t()?.contiguous()?;
                        (weight + u.matmul(&core)?.matmul(&v)?)?
                    }
                    _ => weight,
                });
            }
            first += part.outputs;
        }
        if pieces.is_empty() {
            return Ok(Tensor::zeros((0, self.inputs), DType::F32, self.weight.device())?);
        }
        Ok(Tensor::cat(&pieces, 0)?)
    }

    /// See [`crate::Backend::parts`].
    pub(super) fn dense_parts(&self) -> Result<Vec<DensePart>, KernelError> {
        let mut first = 0;
        let of = |part: &Part| {
            let outputs = part.outputs;
            let bias = self.bias.as_ref().map(|bias| bias.narrow(0, first, outputs)).transpose()?;
            let factors = match (&part.factors, &self.down) {
                (Some(factors), Some(down)) => Some(DenseFactors {
                    site: factors.site,
                    u: factors.up.t()?.contiguous()?,
                    v: down.narrow(1, factors.first, factors.rank)?.contiguous()?,
                }),
                _ => None,
            };
            first += outputs;
            Ok(DensePart { outputs, bias, factors })
        };
        self.parts.iter().map(of).collect()
    }
}
