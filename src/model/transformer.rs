//! One forward pass for the Llama and Qwen families, in terms of a [`Backend`].

use std::{ops::Range, sync::Arc};

use candle_core::{Device, Tensor};

use super::{
    GradientJob, GradientTask, LayerWeights, Model, ModelError, ModelSpec, ModelWeights, Progress, gradient::Group,
    rope,
};
use crate::{
    adapter::Basis,
    kernel::{
        AttentionSpec, BLOCK_TOKENS, Backend, Cores, DensePart, Epilogue, Floats, KernelError, KvShape, LinearPart,
        Precision, Rows, SiteFactors, StepBatch, Weight,
    },
    types::TokenId,
};

/// How to run a model.
#[derive(Debug, Clone, Copy)]
pub struct TransformerOptions {
    /// How frozen weights are held (see [`ModelWeights::natural_precision`]).
    pub precision: Precision,
    /// Longest sequence served; at most [`ModelSpec::max_positions`].
    pub max_positions: usize,
    /// Blocks of the KV cache (see [`kv_blocks`]).
    pub kv_blocks: usize,
}

/// How keys and values are held: as exactly as f32 weights, or in half the memory beside any other.
pub fn kv_precision(weights: Precision) -> Precision {
    match weights {
        Precision::F32 => Precision::F32,
        Precision::Bf16 | Precision::Q8 | Precision::Q4 => Precision::Bf16,
    }
}

/// KV blocks that fit into so many MiB, at the precision that [`kv_precision`] gives.
pub fn kv_blocks(spec: &ModelSpec, precision: Precision, mebibytes: usize) -> usize {
    let bytes = if kv_precision(precision) == Precision::F32 { 4 } else { 2 };
    let block = 2 * bytes * spec.layers * spec.kv_heads * spec.head_dim * BLOCK_TOKENS;
    mebibytes.saturating_mul(1 << 20) / block.max(1)
}

/// U and V of every site of a basis, as [`Transformer::new`] takes them.
pub fn site_factors(basis: &Basis) -> Vec<SiteFactors<'_>> {
    let sites = basis.sites.iter().enumerate();
    sites.map(|(site, factors)| SiteFactors { site, u: &factors.u, v: &factors.v, rank: basis.rank }).collect()
}

impl ModelWeights {
    /// The precision of `--dtype auto`: f32 files stay f32, bf16 and f16 files are held as bf16, quantised ones as 8-bit integers, or as the 4-bit
    /// ones that they are.
    pub fn natural_precision(&self) -> Precision {
        let all = || self.layers.iter().flat_map(|layer| &layer.sites).chain([&self.embedding]).chain(&self.head);
        if all().any(Weight::is_quantized) {
            Precision::Q8
        } else if all().all(Weight::is_f32) {
            Precision::F32
        } else {
            Precision::Bf16
        }
    }
}

/// A model on a backend, with its KV cache.
pub struct Transformer<B: Backend> {
    backend: B,
    spec: ModelSpec,
    kv_blocks: usize,
    max_positions: usize,
    adaptable: bool,
    table: B::Table,
    layers: Vec<Layer<B>>,
    final_norm: B::Norm,
    /// The same, for the gradient.
    final_norm_values: Vec<f32>,
    head: B::Linear,
    kv: B::Kv,
    buffers: Buffers<B>,
}

struct Layer<B: Backend> {
    input_norm: B::Norm,
    qkv: B::Linear,
    attention: B::Attention,
    o: B::Linear,
    post_norm: B::Norm,
    gate_up: B::Linear,
    down: B::Linear,
    /// Norms and attention as they were given: the gradient's own pass needs them.
    norms: [Vec<f32>; 2],
    attention_spec: AttentionSpec,
}

/// Activations of a step, reused.
struct Buffers<B: Backend> {
    /// `[rows, hidden]`: the residual stream.
    residual: B::Buffer,
    /// `[rows, (heads + 2 kv_heads) head_dim]`
    qkv: B::Buffer,
    /// `[rows, heads head_dim]`
    mixed: B::Buffer,
    /// `[rows, intermediate]`
    inner: B::Buffer,
    /// `[logits rows, vocab]`
    logits: B::Buffer,
}

impl<B: Backend> Transformer<B> {
    /// Packs the weights; each layer's are freed when it is packed. `factors` holds U and V of every site in order, or
    /// is empty: then no adapter can be used.
    pub fn new(
        backend: B,
        spec: ModelSpec,
        weights: ModelWeights,
        factors: &[SiteFactors<'_>],
        options: TransformerOptions,
    ) -> Result<Self, ModelError> {
        let TransformerOptions { precision, max_positions, kv_blocks } = options;
        check(&spec, &weights, factors, options)?;
        let (cos, sin) = rope::tables(&spec, max_positions);
        let tables = (Arc::new(cos), Arc::new(sin));
        let ModelWeights { embedding, layers, final_norm, head } = weights;
        let table = backend.table(&embedding, precision)?;
        let plain = LinearPart { weight: head.as_ref().unwrap_or(&embedding), bias: None, factors: None };
        let packed_head = backend.linear(&[plain], precision)?;
        drop((embedding, head));
        let mut packed = Vec::with_capacity(layers.len());
        for (layer, weights) in layers.into_iter().enumerate() {
            let factors = factors.get(7 * layer..7 * layer + 7);
            packed.push(Layer::pack(&backend, &spec, weights, factors, &tables, precision)?);
        }
        let shape =
            KvShape { layers: spec.layers, blocks: kv_blocks, kv_heads: spec.kv_heads, head_dim: spec.head_dim };
        let mixed = spec.heads * spec.head_dim;
        let buffers = Buffers {
            residual: backend.buffer(spec.hidden)?,
            qkv: backend.buffer(mixed + 2 * spec.kv_heads * spec.head_dim)?,
            mixed: backend.buffer(mixed)?,
            inner: backend.buffer(spec.intermediate)?,
            logits: backend.buffer(spec.vocab)?,
        };
        Ok(Self {
            kv: backend.kv(shape, kv_precision(precision))?,
            final_norm: backend.norm(&final_norm, spec.rms_eps)?,
            final_norm_values: final_norm,
            adaptable: factors.first().is_some_and(|factors| factors.rank > 0),
            max_positions,
            head: packed_head,
            layers: packed,
            table,
            buffers,
            kv_blocks,
            spec,
            backend,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }
}

/// Sizes that the backend cannot see.
fn check(
    spec: &ModelSpec,
    weights: &ModelWeights,
    factors: &[SiteFactors<'_>],
    options: TransformerOptions,
) -> Result<(), ModelError> {
    let shape = |message: String| Err(ModelError::Kernel(KernelError::Shape(message)));
    let TransformerOptions { max_positions, kv_blocks, .. } = options;
    if max_positions == 0 || max_positions > spec.max_positions {
        return shape(format!("a context of {max_positions} tokens; the model has {}", spec.max_positions));
    }
    if kv_blocks == 0 {
        return shape("the KV cache is smaller than one block".into());
    }
    if weights.layers.len() != spec.layers {
        return shape(format!("{} layers of weights, the model has {}", weights.layers.len(), spec.layers));
    }
    let sites = spec.sites();
    let in_order = factors.iter().enumerate().all(|(site, factors)| factors.site == site);
    if !factors.is_empty() && (factors.len() != sites.len() || !in_order) {
        return shape(format!("factors of {} sites, not of {} in order", factors.len(), sites.len()));
    }
    Ok(())
}

impl<B: Backend> Layer<B> {
    fn pack(
        backend: &B,
        spec: &ModelSpec,
        weights: LayerWeights,
        factors: Option<&[SiteFactors<'_>]>,
        (cos, sin): &(Arc<Vec<f32>>, Arc<Vec<f32>>),
        precision: Precision,
    ) -> Result<Self, KernelError> {
        let group = |kinds: std::ops::Range<usize>| {
            let parts: Vec<LinearPart<'_>> = kinds
                .map(|kind| LinearPart {
                    weight: &weights.sites[kind],
                    bias: weights.biases[kind].as_deref(),
                    factors: factors.map(|factors| factors[kind]),
                })
                .collect();
            backend.linear(&parts, precision)
        };
        let head_norm = |norm: &Option<Vec<f32>>| norm.as_ref().map(|norm| (norm.clone(), spec.rms_eps));
        let attention = AttentionSpec {
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            q_norm: head_norm(&weights.q_norm),
            k_norm: head_norm(&weights.k_norm),
            cos: cos.clone(),
            sin: sin.clone(),
        };
        Ok(Self {
            input_norm: backend.norm(&weights.input_norm, spec.rms_eps)?,
            qkv: group(0..3)?,
            attention: backend.attention(&attention)?,
            o: group(3..4)?,
            post_norm: backend.norm(&weights.post_norm, spec.rms_eps)?,
            gate_up: group(4..6)?,
            down: group(6..7)?,
            attention_spec: attention,
            norms: [weights.input_norm, weights.post_norm],
        })
    }
}

impl<B: Backend> Model for Transformer<B> {
    fn vocab_size(&self) -> usize {
        self.spec.vocab
    }

    fn kv_blocks(&self) -> usize {
        self.kv_blocks
    }

    fn forward(&mut self, batch: &StepBatch, logits: &mut Floats) -> Result<(), ModelError> {
        let Self { backend, buffers, kv, .. } = self;
        let Buffers { residual, qkv, mixed, inner, logits: head_out } = buffers;
        let all = Rows::All;
        let step = backend.begin(batch)?;
        backend.embed(&step, &self.table, residual)?;
        for (number, layer) in self.layers.iter().enumerate() {
            backend.product(&step, &layer.qkv, all, Some(&layer.input_norm), residual, Epilogue::Store, qkv)?;
            backend.attend(&step, &layer.attention, number, qkv, kv, mixed)?;
            backend.product(&step, &layer.o, all, None, mixed, Epilogue::Add, residual)?;
            backend.product(&step, &layer.gate_up, all, Some(&layer.post_norm), residual, Epilogue::SwiGlu, inner)?;
            backend.product(&step, &layer.down, all, None, inner, Epilogue::Add, residual)?;
        }
        if batch.logits_rows.is_empty() {
            logits.resize(0); // a prefill chunk that is not its prompt's last
            return Ok(());
        }
        let norm = Some(&self.final_norm);
        backend.product(&step, &self.head, Rows::Logits, norm, residual, Epilogue::Store, head_out)?;
        backend.read(head_out, logits)?;
        Ok(())
    }

    fn begin_gradient(&self, job: GradientJob) -> Result<GradientTask, ModelError> {
        GradientTask::new(self, job, self.max_positions)
    }

    fn advance_gradient(&mut self, task: &mut GradientTask, budget: u64) -> Result<Progress, ModelError> {
        task.advance(self, budget)
    }

    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.backend.parallel(items, work);
    }
}

/// The frozen numbers of a model, as the gradient's pass reads them; tensors are f32 on its device.
pub(super) trait Frozen {
    fn spec(&self) -> &ModelSpec;
    fn device(&self) -> Device;
    /// There are sites with U and V.
    fn is_adaptable(&self) -> bool;
    /// The norms before attention and before the MLP, and attention.
    fn layer(&self, layer: usize) -> (&[f32], &[f32], &AttentionSpec);
    /// A product's weights under an adapter, `[outputs, inputs]`, and its linears.
    fn product(&self, layer: usize, group: Group, cores: &Cores) -> Result<(Tensor, Vec<DensePart>), KernelError>;
    fn embedding(&self, tokens: &[TokenId]) -> Result<Tensor, KernelError>;
    fn final_norm(&self) -> &[f32];
    /// Rows of the head, `[rows, hidden]`.
    fn head(&self, rows: Range<usize>) -> Result<Tensor, KernelError>;
}

impl<B: Backend> Frozen for Transformer<B> {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn device(&self) -> Device {
        self.backend.device()
    }

    fn is_adaptable(&self) -> bool {
        self.adaptable
    }

    fn layer(&self, layer: usize) -> (&[f32], &[f32], &AttentionSpec) {
        let Layer { norms: [input, post], attention_spec, .. } = &self.layers[layer];
        (input, post, attention_spec)
    }

    fn product(&self, layer: usize, group: Group, cores: &Cores) -> Result<(Tensor, Vec<DensePart>), KernelError> {
        let layer = &self.layers[layer];
        let linear = match group {
            Group::Qkv => &layer.qkv,
            Group::O => &layer.o,
            Group::GateUp => &layer.gate_up,
            Group::Down => &layer.down,
        };
        let parts = self.backend.parts(linear)?;
        let outputs = parts.iter().map(|part| part.outputs).sum();
        let cores = self.adaptable.then_some(cores);
        Ok((self.backend.dense(linear, 0..outputs, cores)?, parts))
    }

    fn embedding(&self, tokens: &[TokenId]) -> Result<Tensor, KernelError> {
        self.backend.embedding(&self.table, tokens)
    }

    fn final_norm(&self) -> &[f32] {
        &self.final_norm_values
    }

    fn head(&self, rows: Range<usize>) -> Result<Tensor, KernelError> {
        self.backend.dense(&self.head, rows, None)
    }
}
