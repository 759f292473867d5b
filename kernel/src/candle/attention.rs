//! Attention over the paged cache, one sequence after another.

use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor};

use super::step::{CandleStep, Rows, Sequence};
use crate::{
    AttentionSpec, BLOCK_TOKENS, KernelError, KvShape,
    check::{check_attend, ensure},
};

/// The frozen parts of a layer's attention.
pub struct CandleAttention {
    spec: AttentionSpec,
    /// Weight and epsilon.
    q_norm: Option<(Tensor, f32)>,
    k_norm: Option<(Tensor, f32)>,
    /// `[positions, head_dim / 2]`
    cos: Tensor,
    sin: Tensor,
}

/// Keys and values of every layer, `[blocks * BLOCK_TOKENS, kv_heads * head_dim]` each.
pub struct CandleKv {
    shape: KvShape,
    layers: Vec<(Tensor, Tensor)>,
}

impl CandleKv {
    /// An empty cache.
    pub(super) fn new(shape: KvShape, dtype: DType, device: &Device) -> Result<Self, KernelError> {
        shape.tokens()?;
        let slots = shape.blocks * BLOCK_TOKENS;
        ensure(u32::try_from(slots).is_ok(), || {
            format!("kv cache: {} blocks are more than 32 bits count", shape.blocks)
        })?;
        let size = (slots, shape.kv_heads * shape.head_dim);
        let layer = |_| Ok((Tensor::zeros(size, dtype, device)?, Tensor::zeros(size, dtype, device)?));
        Ok(Self { shape, layers: (0..shape.layers).map(layer).collect::<candle_core::Result<_>>()? })
    }
}

impl CandleAttention {
    /// Puts norms and the rotary table on a device.
    pub(super) fn new(spec: &AttentionSpec, device: &Device) -> Result<Self, KernelError> {
        spec.check()?;
        let norm = |norm: &Option<(Vec<f32>, f32)>| match norm {
            Some((weight, epsilon)) => Tensor::new(&weight[..], device).map(|weight| Some((weight, *epsilon))),
            None => Ok(None),
        };
        let table = |values: &Arc<Vec<f32>>| {
            let (positions, half) = (spec.positions(), spec.head_dim / 2);
            Tensor::from_slice(&values[..positions * half], (positions, half), device)
        };
        Ok(Self {
            q_norm: norm(&spec.q_norm)?,
            k_norm: norm(&spec.k_norm)?,
            cos: table(&spec.cos)?,
            sin: table(&spec.sin)?,
            spec: spec.clone(),
        })
    }

    /// Checks that a step fits this attention and the cache.
    pub(super) fn check(
        &self,
        step: &CandleStep,
        kv: &CandleKv,
        layer: usize,
        qkv: usize,
        out: usize,
    ) -> Result<(), KernelError> {
        check_attend(&step.facts, &self.spec, &kv.shape, layer, qkv, out)
    }

    /// Appends k and v of every row to the layer's cache; the result is f32 `[rows, heads * head_dim]`.
    pub(super) fn forward(
        &self,
        rows: &Rows,
        qkv: &Tensor,
        kv: &mut CandleKv,
        layer: usize,
    ) -> candle_core::Result<Tensor> {
        let (heads, kv_heads, head_dim) = (self.spec.heads, self.spec.kv_heads, self.spec.head_dim);
        let (keys, values) = &kv.layers[layer];
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let count = qkv.dims()[0];
        let cos = self.cos.index_select(&rows.positions, 0)?.unsqueeze(1)?;
        let sin = self.sin.index_select(&rows.positions, 0)?.unsqueeze(1)?;
        let turn = |first: usize, heads: usize, norm: &Option<(Tensor, f32)>| {
            let x = qkv.narrow(1, first, heads * head_dim)?.contiguous()?.reshape((count, heads, head_dim))?;
            let x = match norm {
                Some((weight, epsilon)) => candle_nn::ops::rms_norm(&x, weight, *epsilon)?,
                None => x,
            };
            let (a, b) = (x.narrow(2, 0, head_dim / 2)?, x.narrow(2, head_dim / 2, head_dim / 2)?);
            let first = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
            let second = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
            Tensor::cat(&[first, second], D::Minus1)
        };
        let q = turn(0, heads, &self.q_norm)?;
        let k = turn(q_width, kv_heads, &self.k_norm)?.reshape((count, kv_width))?;
        let v = qkv.narrow(1, q_width + kv_width, kv_width)?;
        let slots = rows.cache_slots.reshape((count, 1))?.broadcast_as((count, kv_width))?.contiguous()?;
        keys.scatter_set(&slots, &k.to_dtype(keys.dtype())?.contiguous()?, 0)?;
        values.scatter_set(&slots, &v.to_dtype(values.dtype())?.contiguous()?, 0)?;
        let attend = |sequence: &Sequence| self.attend(sequence, &q, keys, values);
        let results = rows.sequences.iter().map(attend).collect::<candle_core::Result<Vec<_>>>()?;
        Tensor::cat(&results, 0)
    }

    /// One sequence: `[rows, heads * head_dim]`.
    fn attend(&self, sequence: &Sequence, q: &Tensor, keys: &Tensor, values: &Tensor) -> candle_core::Result<Tensor> {
        let (heads, kv_heads, head_dim) = (self.spec.heads, self.spec.kv_heads, self.spec.head_dim);
        let (rows, group) = (sequence.rows, heads / kv_heads);
        let tokens = sequence.cache_slots.elem_count();
        // [kv_heads, rows * group, head_dim]
        let q = q.narrow(0, sequence.first_row, rows)?.reshape((rows, kv_heads, group, head_dim))?;
        let q = q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, rows * group, head_dim))?;
        // [kv_heads, tokens, head_dim]
        let cached = |cache: &Tensor| {
            let rows = cache.index_select(&sequence.cache_slots, 0)?.to_dtype(DType::F32)?;
            rows.reshape((tokens, kv_heads, head_dim))?.transpose(0, 1)?.contiguous()
        };
        let scores = (q.matmul(&cached(keys)?.t()?)? * (1.0 / (head_dim as f64).sqrt()))?;
        let scores = match &sequence.mask {
            Some(mask) => {
                let scores = scores.reshape((kv_heads, rows, group, tokens))?.broadcast_add(mask)?;
                scores.reshape((kv_heads, rows * group, tokens))?
            }
            None => scores,
        };
        let out = candle_nn::ops::softmax_last_dim(&scores.contiguous()?)?.matmul(&cached(values)?)?;
        let out = out.reshape((kv_heads, rows, group, head_dim))?.transpose(0, 1)?.contiguous()?;
        out.reshape((rows, heads * head_dim))
    }
}
