//! A frozen matrix as the file holds it.

use std::sync::Arc;

use candle_core::{DType, Tensor, quantized::QTensor};

use super::KernelError;

/// A frozen matrix `[rows, cols]` (outputs by inputs) in the dtype of its file; widened to f32 when a backend packs it.
#[derive(Clone)]
pub struct Weight {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    source: Source,
    /// GGUF `llama` files store the rows of q and k for interleaved RoPE: heads to un-permute by.
    interleaved_heads: Option<usize>,
}

#[derive(Clone)]
enum Source {
    Tensor(Tensor),
    Quantized(Arc<QTensor>),
}

impl Weight {
    /// From a two-dimensional tensor of any float dtype.
    pub fn from_tensor(tensor: Tensor) -> Result<Self, KernelError> {
        let (rows, cols) = tensor.dims2()?;
        Ok(Self { rows, cols, source: Source::Tensor(tensor), interleaved_heads: None })
    }

    /// From a GGUF tensor in any format candle reads.
    pub fn from_quantized(tensor: Arc<QTensor>) -> Result<Self, KernelError> {
        let (rows, cols) = tensor.shape().dims2()?;
        Ok(Self { rows, cols, source: Source::Quantized(tensor), interleaved_heads: None })
    }

    /// From f32 values, row-major.
    pub fn from_f32(rows: usize, cols: usize, values: Vec<f32>) -> Result<Self, KernelError> {
        Self::from_tensor(Tensor::from_vec(values, (rows, cols), &candle_core::Device::Cpu)?)
    }

    /// Marks the rows as stored for interleaved RoPE over so many heads; [`Weight::to_f32`] returns them half-split.
    pub fn with_interleaved_heads(mut self, heads: usize) -> Self {
        self.interleaved_heads = Some(heads);
        self
    }

    /// True when the file holds quantised blocks.
    pub fn is_quantized(&self) -> bool {
        matches!(&self.source, Source::Quantized(tensor) if !matches!(tensor.dtype(), candle_core::quantized::GgmlDType::F32 | candle_core::quantized::GgmlDType::F16 | candle_core::quantized::GgmlDType::BF16))
    }

    /// True when the file holds 32-bit floats.
    pub fn is_f32(&self) -> bool {
        match &self.source {
            Source::Tensor(tensor) => tensor.dtype() == DType::F32,
            Source::Quantized(tensor) => tensor.dtype() == candle_core::quantized::GgmlDType::F32,
        }
    }

    /// All values as f32, row-major `[rows, cols]`, in the model's (half-split) row order.
    pub fn to_f32(&self) -> Result<Vec<f32>, KernelError> {
        let flat = match &self.source {
            Source::Tensor(tensor) => tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?,
            Source::Quantized(tensor) => {
                tensor.dequantize(&candle_core::Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?
            }
        };
        match self.interleaved_heads {
            None => Ok(flat),
            Some(heads) => Ok(half_split(&flat, self.rows, self.cols, heads)),
        }
    }
}

/// Row 2i + j of a head (pair i, part j) moves to row j * d/2 + i.
fn half_split(values: &[f32], rows: usize, cols: usize, heads: usize) -> Vec<f32> {
    let head_dim = rows / heads;
    let mut out = vec![0f32; values.len()];
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for part in 0..2 {
                let from = (head * head_dim + 2 * pair + part) * cols;
                let to = (head * head_dim + part * head_dim / 2 + pair) * cols;
                out[to..to + cols].copy_from_slice(&values[from..from + cols]);
            }
        }
    }
    out
}
