//! The seam between the model and the machine.

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Tensor};

use super::{Cores, StepBatch, weight::Weight};
use crate::{Floats, TokenId};

/// Something the backend could not do: out of memory, a device error, a shape that does not fit.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The device or a library refused.
    #[error("{0}")]
    Device(#[from] candle_core::Error),
    /// Two sizes that must agree do not.
    #[error("{0}")]
    Shape(String),
}

/// How a frozen linear's weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// 32-bit floats; activations f32.
    F32,
    /// bfloat16 weights and activations, f32 sums.
    Bf16,
    /// 8-bit integers with one scale for 32 consecutive inputs, of weights and of activations; f32 sums of exact integer ones. Weights that
    /// come from 4-bit blocks stay as they are: fewer bytes, and no second rounding.
    Q8,
    /// As [`Precision::Q8`], with every weight on 16 steps between the smallest and the largest of 32: half the bytes, and coarser.
    Q4,
}

/// U and V of one adapted site, orthonormal columns, shared by every adapter.
#[derive(Debug, Clone, Copy)]
pub struct SiteFactors<'a> {
    /// Number of the site: 7 * layer + (q, k, v, o, gate, up, down).
    pub site: usize,
    /// `[out, r]` row-major.
    pub u: &'a [f32],
    /// `[in, r]` row-major.
    pub v: &'a [f32],
    /// r
    pub rank: usize,
}

/// One linear of a group: its rows follow those of the part before it.
#[derive(Clone, Copy)]
pub struct LinearPart<'a> {
    /// `[out, in]`.
    pub weight: &'a Weight,
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
    /// None: no adapter touches this linear (the head; everything at rank 0).
    pub factors: Option<SiteFactors<'a>>,
}

/// What happens to a product before it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = y`
    Store,
    /// `out += y` (the residual stream)
    Add,
    /// The group is gate|up of equal widths n: `out[..n] = silu(y[..n]) * y[n..2n]`
    SwiGlu,
}

/// Which rows of the input a product reads; the output has as many rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// All rows of the step.
    All,
    /// `StepBatch::logits_rows` only.
    Logits,
}

/// Attention of one layer, everything that is frozen about it.
#[derive(Debug, Clone)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
    /// RMSNorm of each query head before RoPE (Qwen3): weight `[head_dim]` and epsilon.
    pub q_norm: Option<(Vec<f32>, f32)>,
    /// RMSNorm of each key head before RoPE.
    pub k_norm: Option<(Vec<f32>, f32)>,
    /// Half-split rotary table: for position p and pair i the cosine is `cos[p * head_dim/2 + i]`.
    pub cos: Arc<Vec<f32>>,
    /// The sines, in the same order.
    pub sin: Arc<Vec<f32>>,
}

/// Shape of the paged KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// Blocks of [`super::BLOCK_TOKENS`] tokens.
    pub blocks: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Size of a head.
    pub head_dim: usize,
}

/// One linear of a group as the gradient needs it, beside its weights ([`Backend::dense`]). Tensors are f32 on [`Backend::device`].
#[derive(Debug, Clone)]
pub struct DensePart {
    /// Outputs.
    pub outputs: usize,
    /// `[outputs]`.
    pub bias: Option<Tensor>,
    /// None: no adapter touches this linear.
    pub factors: Option<DenseFactors>,
}

/// U and V of a site, with the numbers that [`Backend::product`] multiplies with.
#[derive(Debug, Clone)]
pub struct DenseFactors {
    /// Number of the site.
    pub site: usize,
    /// `[outputs, r]`.
    pub u: Tensor,
    /// `[inputs, r]`.
    pub v: Tensor,
}

/// A machine that runs the parts of a step. Associated types are the backend's own layouts; the model never looks inside.
pub trait Backend: Send {
    /// A packed group of frozen linears that share their input: q|k|v, o, gate|up, down, head.
    type Linear: Send;
    /// An RMSNorm weight.
    type Norm: Send;
    /// The embedding table.
    type Table: Send;
    /// Frozen parts of a layer's attention.
    type Attention: Send;
    /// The paged KV cache of all layers.
    type Kv: Send;
    /// Activations, `[rows, width]` f32. Reused from step to step; grows to the largest step.
    type Buffer: Send;
    /// What `begin` prepares from a batch (slots, cores, positions, block tables where the machine wants them).
    type Step: Send;

    /// Packs a group. All parts have the same number of inputs.
    fn linear(&self, parts: &[LinearPart<'_>], precision: Precision) -> Result<Self::Linear, KernelError>;
    /// An RMSNorm weight `[width]`.
    fn norm(&self, weight: &[f32], epsilon: f32) -> Result<Self::Norm, KernelError>;
    /// The embedding table `[vocab, hidden]`.
    fn table(&self, weight: &Weight, precision: Precision) -> Result<Self::Table, KernelError>;
    /// The frozen parts of a layer's attention.
    fn attention(&self, spec: &AttentionSpec) -> Result<Self::Attention, KernelError>;
    /// An empty KV cache.
    fn kv(&self, shape: KvShape, precision: Precision) -> Result<Self::Kv, KernelError>;
    /// An empty activation buffer of this width.
    fn buffer(&self, width: usize) -> Result<Self::Buffer, KernelError>;

    /// Prepares a step. Cores of the batch must have the rank the linears were packed with.
    fn begin(&mut self, batch: &StepBatch) -> Result<Self::Step, KernelError>;
    /// `out[row] = table[token of row]`
    fn embed(&mut self, step: &Self::Step, table: &Self::Table, out: &mut Self::Buffer) -> Result<(), KernelError>;
    /// `out = epilogue(W norm(x) + b + U (C_row (V^T norm(x))))` for the chosen rows.
    #[allow(clippy::too_many_arguments)]
    fn product(
        &mut self,
        step: &Self::Step,
        linear: &Self::Linear,
        rows: Rows,
        norm: Option<&Self::Norm>,
        x: &Self::Buffer,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// Normalises and rotates q and k of `qkv` `[rows, (heads + 2 kv_heads) head_dim]`, appends k and v of every row to the cache, and lets every row
    /// attend to the positions `0..=position` of its sequence. `out` is `[rows, heads head_dim]`.
    fn attend(
        &mut self,
        step: &Self::Step,
        attention: &Self::Attention,
        layer: usize,
        qkv: &Self::Buffer,
        kv: &mut Self::Kv,
        out: &mut Self::Buffer,
    ) -> Result<(), KernelError>;
    /// Brings a buffer's rows (as many as the last operation wrote) to the host, row-major, replacing what `out` held. What the buffer
    /// holds afterwards is unspecified: a backend on the host exchanges the two instead of copying megabytes of logits.
    fn read(&mut self, buffer: &mut Self::Buffer, out: &mut Floats) -> Result<(), KernelError>;
    /// Where the tensors of [`Backend::dense`] and its like live, and so where a gradient is computed.
    fn device(&self) -> Device {
        Device::Cpu
    }
    /// Rows `outputs` of a group's weights (its parts after one another) as [`Backend::product`] multiplies with them, in f32: `[outputs, inputs]`. Under `cores`
    /// the update is in them: `W + U C V^T`, added in f32.
    ///
    /// # Errors
    /// Rows that the group does not have, cores of another rank or of too few sites.
    fn dense(&self, linear: &Self::Linear, outputs: Range<usize>, cores: Option<&Cores>)
    -> Result<Tensor, KernelError>;
    /// The linears of a group, in order.
    fn parts(&self, linear: &Self::Linear) -> Result<Vec<DensePart>, KernelError>;
    /// What [`Backend::embed`] gives these tokens: f32 `[tokens, width]`.
    ///
    /// # Errors
    /// A token that the table does not have.
    fn embedding(&self, table: &Self::Table, tokens: &[TokenId]) -> Result<Tensor, KernelError>;
    /// Runs `work(0)`, ..., `work(items - 1)` in any order, on the backend's threads if it has any: work on the host between steps, such as
    /// sampling, without a second pool that fights for the same processors.
    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..items).for_each(work);
    }
}
