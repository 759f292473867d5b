//! A frozen matrix as the file holds it.

use std::sync::Arc;

use candle_core::{
    DType, Tensor,
    quantized::{GgmlDType, QTensor},
};
use half::f16;

use super::{
    KernelError,
    rounding::{GROUP, Q4Block, Q8Block, quantize_q4, quantize_q8},
};

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

    /// The format of the file's blocks; None for a tensor of floats.
    fn blocks(&self) -> Option<GgmlDType> {
        match &self.source {
            Source::Quantized(tensor) => Some(tensor.dtype()),
            Source::Tensor(_) => None,
        }
    }

    /// True when the file holds quantised blocks.
    pub fn is_quantized(&self) -> bool {
        !matches!(self.blocks(), None | Some(GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16))
    }

    /// True when the file holds 4-bit blocks that [`super::Precision::Q8`] takes as they are.
    pub fn is_four_bit(&self) -> bool {
        matches!(self.blocks(), Some(GgmlDType::Q4_0 | GgmlDType::Q4_1)) && self.cols.is_multiple_of(GROUP)
    }

    /// True when the file holds 32-bit floats.
    pub fn is_f32(&self) -> bool {
        match &self.source {
            Source::Tensor(tensor) => tensor.dtype() == DType::F32,
            Source::Quantized(tensor) => tensor.dtype() == GgmlDType::F32,
        }
    }

    /// In 8-bit blocks: the file's own if it is Q8_0, else quantised from [`Weight::to_f32`].
    pub(super) fn to_q8(&self) -> Result<Vec<Q8Block>, KernelError> {
        match (&self.source, self.blocks()) {
            (Source::Quantized(tensor), Some(GgmlDType::Q8_0)) if self.cols.is_multiple_of(GROUP) => {
                let block = |bytes: &[u8]| Q8Block {
                    scale: f16_at(bytes, 0),
                    // -128 is not on the symmetric grid; no writer of the format produces it
                    ints: std::array::from_fn(|k| i8::from_ne_bytes([bytes[2 + k]]).max(-127)),
                };
                Ok(self.in_order(tensor.data()?.chunks_exact(2 + GROUP).map(block).collect()))
            }
            _ => Ok(quantize_q8(&self.to_f32()?, self.cols)),
        }
    }

    /// In 4-bit blocks: the file's own if [`Weight::is_four_bit`], else quantised from [`Weight::to_f32`].
    pub(super) fn to_q4(&self) -> Result<Vec<Q4Block>, KernelError> {
        let Source::Quantized(tensor) = &self.source else { return Ok(quantize_q4(&self.to_f32()?, self.cols)) };
        if !self.is_four_bit() {
            return Ok(quantize_q4(&self.to_f32()?, self.cols));
        }
        // A byte holds inputs k and k + 16.
        let ints = |bytes: &[u8]| std::array::from_fn(|k| bytes[k % 16] >> (k / 16 * 4) & 15);
        let data = tensor.data()?;
        let blocks = if tensor.dtype() == GgmlDType::Q4_1 {
            let block = |b: &[u8]| Q4Block { scale: f16_at(b, 0), min: f16_at(b, 2), ints: ints(&b[4..]) };
            data.chunks_exact(4 + GROUP / 2).map(block).collect()
        } else {
            // (q - 8) scale; eight times an f16 is one, far below its largest
            let min = |scale: f16| f16::from_f32(-8.0 * scale.to_f32());
            let block = |b: &[u8]| Q4Block { scale: f16_at(b, 0), min: min(f16_at(b, 0)), ints: ints(&b[2..]) };
            data.chunks_exact(2 + GROUP / 2).map(block).collect()
        };
        Ok(self.in_order(blocks))
    }

    /// Rows of the file in the model's (half-split) order.
    fn in_order<T: Copy>(&self, values: Vec<T>) -> Vec<T> {
        match self.interleaved_heads {
            None => values,
            Some(heads) => half_split(&values, self.rows, heads),
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
        Ok(self.in_order(flat))
    }
}

/// The little-endian f16 at this byte.
fn f16_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Row 2i + j of a head (pair i, part j) moves to row j * d/2 + i.
fn half_split<T: Copy>(values: &[T], rows: usize, heads: usize) -> Vec<T> {
    let (width, head_dim) = (values.len() / rows, rows / heads);
    let mut out = values.to_vec();
    for head in 0..heads {
        for pair in 0..head_dim / 2 {
            for part in 0..2 {
                let from = (head * head_dim + 2 * pair + part) * width;
                let to = (head * head_dim + part * head_dim / 2 + pair) * width;
                out[to..to + width].copy_from_slice(&values[from..from + width]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::suite::Random;

    /// candle's own reading of a format is the witness: bytes, nibbles and blocks are where it finds them.
    #[test]
    fn blocks_of_a_file_mean_what_candle_reads_in_them() {
        let (rows, cols) = (6, 96);
        let values = Tensor::from_vec(Random(5).units(rows * cols), (rows, cols), &Device::Cpu).unwrap();
        for format in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0] {
            let weight = Weight::from_quantized(Arc::new(QTensor::quantize(&values, format).unwrap())).unwrap();
            for weight in [weight.clone(), weight.with_interleaved_heads(3)] {
                let read: Vec<f32> = if format == GgmlDType::Q8_0 {
                    let value = |block: &Q8Block, k: usize| block.scale.to_f32() * f32::from(block.ints[k]);
                    weight.to_q8().unwrap().iter().flat_map(|block| (0..GROUP).map(|k| value(block, k))).collect()
                } else {
                    assert!(weight.is_four_bit());
                    let value = |block: &Q4Block, k: usize| {
                        block.scale.to_f32().mul_add(f32::from(block.ints[k]), block.min.to_f32())
                    };
                    weight.to_q4().unwrap().iter().flat_map(|block| (0..GROUP).map(|k| value(block, k))).collect()
                };
                let want = weight.to_f32().unwrap();
                let furthest = read.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(read.len() == want.len() && furthest < 1e-6, "{format:?}: {furthest}");
            }
        }
    }
}
