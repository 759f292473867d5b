//! One GGUF file: sizes, weights, tokenizer and chat template.
//! Keys and tensor names: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::{
    collections::HashMap,
    fs::File,
    io::BufReader,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use candle_core::{
    Device,
    quantized::{
        QTensor,
        gguf_file::{Content, TensorInfo, Value},
    },
};

use super::{LoadedModel, SpecialTokens, cannot_read, gguf_tokenizer, name_of};
use crate::{
    kernel::Weight,
    model::{Architecture, LayerWeights, ModelError, ModelSpec, ModelWeights, RopeScaling, RopeSpec},
    types::TokenId,
};

/// Tensor names below a block, in the order of sites.
const SITES: [&str; 7] = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// Keys that change the arithmetic in ways that the forward pass does not know, below the architecture.
const UNKNOWN_ARITHMETIC: [&str; 5] =
    ["attention.scale", "logit_scale", "embedding_scale", "residual_scale", "expert_count"];

/// Control tokens that end a turn or a text in the families that we serve. A GGUF names one eos, and the others only
/// in generation_config.json, which it does not carry.
const ENDS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>"];

pub(super) fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    let file = File::open(path).map_err(|error| cannot_read(path, &error))?;
    let mut reader = BufReader::new(file);
    // candle divides by `general.alignment` unchecked, so a corrupt file can make it panic.
    let content = catch_unwind(AssertUnwindSafe(|| Content::read(&mut reader)))
        .map_err(|_| cannot_read(path, &"the GGUF header is broken"))?
        .map_err(|error| cannot_read(path, &format!("not a GGUF file that we can read: {error}")))?;
    let meta = Meta::new(content.metadata)?;
    let mut tensors = Tensors {
        reader,
        infos: content.tensor_infos,
        data: content.tensor_data_offset,
        shown: path.display().to_string(),
    };
    let parts = gguf_tokenizer::Parts::read(&meta)?;
    let spec = spec(&meta, &parts, &mut tensors)?;
    let weights = weights(&spec, &mut tensors)?;
    if let Some(name) = tensors.infos.keys().min() {
        let architecture = &meta.architecture;
        return Err(ModelError::Unsupported(format!(
            "tensor {name} is not known to {architecture} models: ignoring it would give another model's answers"
        )));
    }
    let text = |key: &str| meta.integer(key).and_then(|id| parts.tokens.get(id as usize)).cloned();
    Ok(LoadedModel {
        name: name_of(path),
        spec,
        weights,
        special_tokens: SpecialTokens {
            bos: text("tokenizer.ggml.bos_token_id"),
            eos: text("tokenizer.ggml.eos_token_id"),
            pad: text("tokenizer.ggml.padding_token_id"),
            unk: text("tokenizer.ggml.unknown_token_id"),
        },
        chat_template: meta.string("tokenizer.chat_template").map(str::to_owned),
        tokenizer: parts.build()?,
        add_bos_token: false,
        files: vec![path.to_owned()],
    })
}

/// The metadata, and the prefix of the model's own keys.
pub(super) struct Meta {
    values: HashMap<String, Value>,
    architecture: String,
}

impl Meta {
    fn new(values: HashMap<String, Value>) -> Result<Self, ModelError> {
        match values.get("general.architecture") {
            Some(Value::String(architecture)) => Ok(Self { architecture: architecture.clone(), values }),
            _ => Err(ModelError::Load("the GGUF file has no general.architecture".into())),
        }
    }

    #[cfg(test)]
    pub(super) fn of(values: impl IntoIterator<Item = (&'static str, Value)>) -> Self {
        let values = values.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        Self { values, architecture: "llama".into() }
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    pub(super) fn string(&self, key: &str) -> Option<&str> {
        match self.get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    pub(super) fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// A non-negative integer of any width.
    pub(super) fn integer(&self, key: &str) -> Option<u64> {
        integer(self.get(key)?)
    }

    fn own(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn own_float(&self, key: &str) -> Option<f64> {
        match self.get(&self.own(key)) {
            Some(Value::F32(value)) => Some((*value).into()),
            Some(Value::F64(value)) => Some(*value),
            _ => None,
        }
    }

    fn own_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let key = self.own(key);
        match self.get(&key) {
            None => Ok(None),
            Some(value) => match integer(value) {
                Some(size) => Ok(Some(size as usize)),
                None => Err(ModelError::Unsupported(format!("GGUF key {key} is not one size for all layers"))),
            },
        }
    }

    fn needed_size(&self, key: &str) -> Result<usize, ModelError> {
        self.own_size(key)?.ok_or_else(|| ModelError::Load(format!("GGUF key {} is missing", self.own(key))))
    }
}

/// Any width, not negative.
pub(super) fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::I8(value) => u64::try_from(*value).ok(),
        Value::I16(value) => u64::try_from(*value).ok(),
        Value::I32(value) => u64::try_from(*value).ok(),
        Value::I64(value) => u64::try_from(*value).ok(),
        Value::Bool(_) => None,
        other => other.to_u64().ok(),
    }
}

fn spec(meta: &Meta, parts: &gguf_tokenizer::Parts, tensors: &mut Tensors) -> Result<ModelSpec, ModelError> {
    let architecture = match meta.architecture.as_str() {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(ModelError::Unsupported(format!(
                "GGUF architecture {other} is not supported (supported: llama, qwen2, qwen3)"
            )));
        }
    };
    for key in UNKNOWN_ARITHMETIC.map(|key| meta.own(key)) {
        if meta.get(&key).is_some_and(|value| integer(value) != Some(0)) {
            return Err(ModelError::Unsupported(format!("GGUF key {key} is not supported")));
        }
    }
    let hidden = meta.needed_size("embedding_length")?;
    let heads = meta.needed_size("attention.head_count")?;
    let head_dim = meta.own_size("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = meta.own_size(key)?.filter(|size| *size != head_dim) {
            return Err(ModelError::Unsupported(format!(
                "GGUF key {} {other} differs from the head size {head_dim}",
                meta.own(key)
            )));
        }
    }
    let context = meta.needed_size("context_length")?;
    let mut spec = ModelSpec {
        architecture,
        hidden,
        intermediate: meta.needed_size("feed_forward_length")?,
        layers: meta.needed_size("block_count")?,
        heads,
        kv_heads: meta.own_size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab: tensors.shape("token_embd.weight")?.first().copied().unwrap_or(0),
        // A window of w equals full attention for contexts up to w.
        max_positions: meta.own_size("attention.sliding_window")?.map_or(context, |window| context.min(window)),
        rms_eps: meta.own_float("attention.layer_norm_rms_epsilon").unwrap_or(1e-6) as f32,
        rope: RopeSpec { theta: meta.own_float("rope.freq_base").unwrap_or(10_000.0), scaling: RopeScaling::Default },
        eos: eos(meta, parts),
        bos: meta.integer("tokenizer.ggml.bos_token_id").map(|id| id as TokenId),
    };
    spec.validate()?;
    spec.rope.scaling = rope_scaling(meta, &spec, tensors)?;
    spec.validate()?;
    Ok(spec)
}

fn rope_scaling(meta: &Meta, spec: &ModelSpec, tensors: &mut Tensors) -> Result<RopeScaling, ModelError> {
    let factors = match tensors.infos.contains_key("rope_freqs.weight") {
        true => Some(RopeScaling::Factors(tensors.vector("rope_freqs.weight", spec.head_dim / 2)?)),
        false => None,
    };
    let kind = meta.string(&meta.own("rope.scaling.type")).unwrap_or("none");
    let factor = meta.own_float("rope.scaling.factor").or(meta.own_float("rope.scale_linear")).unwrap_or(1.0);
    match (kind, factors) {
        ("none", factors) => Ok(match factors {
            Some(factors) => factors,
            // The older key carries no type.
            None if meta.own_float("rope.scale_linear").is_some_and(|factor| factor != 1.0) => {
                RopeScaling::Linear { factor }
            }
            None => RopeScaling::Default,
        }),
        ("linear", None) => Ok(RopeScaling::Linear { factor }),
        (kind, factors) => {
            let with = if factors.is_some() { " with rope_freqs.weight" } else { "" };
            Err(ModelError::Unsupported(format!(
                "rope scaling type {kind}{with} is not supported (supported: none, linear, rope_freqs.weight)"
            )))
        }
    }
}

fn eos(meta: &Meta, parts: &gguf_tokenizer::Parts) -> Vec<TokenId> {
    let mut ids: Vec<TokenId> = ["eos", "eot", "eom"]
        .into_iter()
        .filter_map(|key| meta.integer(&format!("tokenizer.ggml.{key}_token_id")))
        .map(|id| id as TokenId)
        .collect();
    ids.extend(parts.control_tokens().filter(|(_, token)| ENDS.contains(token)).map(|(id, _)| id));
    let mut seen = std::collections::HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// Tensors of the file; each can be taken once.
struct Tensors {
    reader: BufReader<File>,
    infos: HashMap<String, TensorInfo>,
    data: u64,
    shown: String,
}

impl Tensors {
    fn shape(&self, name: &str) -> Result<&[usize], ModelError> {
        match self.infos.get(name) {
            Some(info) => Ok(info.shape.dims()),
            None => Err(ModelError::Load(format!("tensor {name} is missing"))),
        }
    }

    /// Checks the shape before anything is computed from it: the file's own may overflow.
    fn take(&mut self, name: &str, shape: &[usize]) -> Result<QTensor, ModelError> {
        let found = self.shape(name)?;
        if found != shape {
            return Err(ModelError::Load(format!(
                "tensor {name} has shape {found:?}, the configuration says {shape:?}"
            )));
        }
        let Some(info) = self.infos.remove(name) else { unreachable!("its shape was just read") };
        info.read(&mut self.reader, self.data, &Device::Cpu)
            .map_err(|error| ModelError::Load(format!("cannot read tensor {name} of {}: {error}", self.shown)))
    }

    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Weight, ModelError> {
        Ok(Weight::from_quantized(Arc::new(self.take(name, &[rows, cols])?))?)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let widen = |tensor: QTensor| tensor.dequantize(&Device::Cpu)?.to_vec1::<f32>();
        widen(self.take(name, &[len])?).map_err(|error| ModelError::Load(format!("tensor {name}: {error}")))
    }
}

fn weights(spec: &ModelSpec, tensors: &mut Tensors) -> Result<ModelWeights, ModelError> {
    let embedding = tensors.matrix("token_embd.weight", spec.vocab, spec.hidden)?;
    let layers = (0..spec.layers).map(|layer| layer_weights(spec, layer, tensors)).collect::<Result<_, _>>()?;
    let final_norm = tensors.vector("output_norm.weight", spec.hidden)?;
    let head = match tensors.infos.contains_key("output.weight") {
        true => Some(tensors.matrix("output.weight", spec.vocab, spec.hidden)?),
        false => None,
    };
    Ok(ModelWeights { embedding, layers, final_norm, head })
}

fn layer_weights(spec: &ModelSpec, layer: usize, tensors: &mut Tensors) -> Result<LayerWeights, ModelError> {
    let mut sites = Vec::with_capacity(7);
    let mut biases = [const { None }; 7];
    for (kind, (site, (rows, cols))) in SITES.into_iter().zip(spec.sites().shapes).enumerate() {
        // llama.cpp's converter reorders the rows of q and k of `llama` for interleaved RoPE, biases included.
        let heads = match (spec.architecture, kind) {
            (Architecture::Llama, 0) => Some(spec.heads),
            (Architecture::Llama, 1) => Some(spec.kv_heads),
            _ => None,
        };
        let reorder = |weight: Weight| match heads {
            Some(heads) => weight.with_interleaved_heads(heads),
            None => weight,
        };
        sites.push(reorder(tensors.matrix(&format!("blk.{layer}.{site}.weight"), rows, cols)?));
        let name = format!("blk.{layer}.{site}.bias");
        let needed = spec.architecture == Architecture::Qwen2 && kind < 3;
        if needed || tensors.infos.contains_key(&name) {
            let bias = Weight::from_f32(rows, 1, tensors.vector(&name, rows)?)?;
            biases[kind] = Some(reorder(bias).to_f32()?);
        }
    }
    let Ok(sites) = sites.try_into() else { unreachable!("seven kinds were pushed") };
    let qwen3 = spec.architecture == Architecture::Qwen3;
    let mut head_norm = |which: &str| {
        qwen3.then(|| tensors.vector(&format!("blk.{layer}.attn_{which}_norm.weight"), spec.head_dim)).transpose()
    };
    let (q_norm, k_norm) = (head_norm("q")?, head_norm("k")?);
    Ok(LayerWeights {
        sites,
        biases,
        input_norm: tensors.vector(&format!("blk.{layer}.attn_norm.weight"), spec.hidden)?,
        post_norm: tensors.vector(&format!("blk.{layer}.ffn_norm.weight"), spec.hidden)?,
        q_norm,
        k_norm,
    })
}
