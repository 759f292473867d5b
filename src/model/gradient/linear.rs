//! A frozen product in f32 under one adapter, forward and back.

use candle_core::{DType, Device, Tensor};

use super::{CoreGradient, ops::add};
use crate::kernel::{DensePart, KernelError, Threads, matmul};

/// A group of linears that share their input, unpacked for a while.
pub(super) struct Dense {
    /// `W + U C V^T`, `[outputs, inputs]`.
    weight: Tensor,
    /// `[1, outputs]`.
    bias: Option<Tensor>,
    adapted: Option<Adapted>,
}

/// U and V of all parts.
struct Adapted {
    /// In the order of their columns.
    sites: Vec<usize>,
    rank: usize,
    /// `[outputs, sites r]`, zero where a column is another part's.
    u: Tensor,
    /// `[inputs, sites r]`.
    v: Tensor,
}

impl Dense {
    /// `weight` is what [`crate::kernel::Backend::dense`] gave for all outputs of these parts.
    pub(super) fn new(weight: Tensor, parts: &[DensePart]) -> Result<Self, KernelError> {
        let device = weight.device().clone();
        let bias = if parts.iter().any(|part| part.bias.is_some()) {
            let of = |part: &DensePart| match &part.bias {
                Some(bias) => Ok(bias.clone()),
                None => Tensor::zeros(part.outputs, DType::F32, &device),
            };
            let biases = parts.iter().map(of).collect::<candle_core::Result<Vec<_>>>()?;
            Some(Tensor::cat(&biases, 0)?.unsqueeze(0)?)
        } else {
            None
        };
        Ok(Self { weight, bias, adapted: Adapted::new(parts, &device)? })
    }

    /// `(W + U C V^T) x + b` of rows.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, KernelError> {
        let y = matmul(x, &self.weight.t()?, Threads::All)?;
        Ok(match &self.bias {
            Some(bias) => add(&y, bias)?,
            None => y,
        })
    }

    /// The derivative by the input, from the one by the result.
    pub(super) fn back(&self, dy: &Tensor) -> Result<Tensor, KernelError> {
        Ok(matmul(dy, &self.weight, Threads::All)?)
    }

    /// Adds the derivative by the cores: `(U^T dy) (V^T x)^T` a site, summed over rows.
    pub(super) fn add_core_gradient(&self, x: &Tensor, dy: &Tensor, sum: &mut CoreGradient) -> Result<(), KernelError> {
        let Some(Adapted { sites, rank, u, v }) = &self.adapted else { return Ok(()) };
        let (up, down) = (matmul(dy, u, Threads::All)?, matmul(x, v, Threads::All)?);
        let all = matmul(&up.t()?.contiguous()?, &down, Threads::One)?.to_vec2::<f32>()?;
        for (number, &site) in sites.iter().enumerate() {
            let own = number * rank..(number + 1) * rank;
            for (i, row) in all[own.clone()].iter().enumerate() {
                for (j, value) in row[own.clone()].iter().enumerate() {
                    sum.data[(site * rank + i) * rank + j] += f64::from(*value);
                }
            }
        }
        Ok(())
    }
}

impl Adapted {
    fn new(parts: &[DensePart], device: &Device) -> Result<Option<Self>, KernelError> {
        let (mut sites, mut v) = (Vec::new(), Vec::new());
        let columns: usize = parts.iter().flat_map(|part| &part.factors).map(|factors| factors.u.dims()[1]).sum();
        let (mut rank, mut u) = (0, Vec::new());
        for part in parts {
            let zeros = |columns: usize| Tensor::zeros((part.outputs, columns), DType::F32, device);
            let Some(factors) = &part.factors else {
                u.push(zeros(columns)?);
                continue;
            };
            rank = factors.u.dims()[1];
            let before = sites.len() * rank;
            u.push(Tensor::cat(&[zeros(before)?, factors.u.clone(), zeros(columns - before - rank)?], 1)?);
            sites.push(factors.site);
            v.push(factors.v.clone());
        }
        if sites.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self { sites, rank, u: Tensor::cat(&u, 0)?, v: Tensor::cat(&v, 1)?.contiguous()? }))
    }
}
