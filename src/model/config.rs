//! `config.json` of Hugging Face models, in both layouts (`rope_parameters`, or `rope_theta` with `rope_scaling`).

use candle_transformers::models::llama::{Llama3RopeConfig, LlamaEosToks};
use serde::Deserialize;
use serde_json::Value;

use super::{Architecture, ModelError, ModelSpec, RopeScaling, RopeSpec};
use crate::types::TokenId;

/// What a config says beyond the [`ModelSpec`]: which tensors to expect.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Config {
    pub(super) spec: ModelSpec,
    /// The head is the embedding.
    pub(super) tied: bool,
    /// q, k, v, o, gate, up, down: a bias must be there. (One that is there anyway is used too.)
    pub(super) biases: [bool; 7],
}

/// The keys that we read. candle-transformers' own config types do not fit: they do not know `rope_parameters` (and
/// then take theta 10,000 without a word), an explicit head_dim, or the keys that must be refused.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    rope_parameters: Option<Value>,
    rope_scaling: Option<Value>,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    bos_token_id: Option<LlamaEosToks>,
    eos_token_id: Option<LlamaEosToks>,
}

/// The one key of `generation_config.json` that we read.
#[derive(Deserialize)]
struct RawGeneration {
    eos_token_id: Option<LlamaEosToks>,
}

fn unsupported<T>(message: impl Into<String>) -> Result<T, ModelError> {
    Err(ModelError::Unsupported(message.into()))
}

impl Config {
    /// Reads `config.json` and, where there is one, `generation_config.json` (its eos ids are added).
    pub(super) fn parse(config: &[u8], generation: Option<&[u8]>) -> Result<Self, ModelError> {
        let raw: Raw =
            serde_json::from_slice(config).map_err(|error| ModelError::Load(format!("config.json: {error}")))?;
        let generation: Option<RawGeneration> = generation
            .map(serde_json::from_slice)
            .transpose()
            .map_err(|error| ModelError::Load(format!("generation_config.json: {error}")))?;
        let family = Family::of(&raw)?;
        refuse_what_we_cannot_run(&raw)?;
        let max_positions = max_positions(&raw, family)?;
        let head_dim = match (raw.head_dim, family) {
            (Some(head_dim), _) => head_dim,
            (None, Family::Qwen3) => 128, // transformers' default for this family alone
            (None, _) => raw.hidden_size / raw.num_attention_heads.max(1),
        };
        let mut eos = ids(raw.eos_token_id.as_ref());
        for id in ids(generation.and_then(|generation| generation.eos_token_id).as_ref()) {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let spec = ModelSpec {
            architecture: family.architecture(),
            hidden: raw.hidden_size,
            intermediate: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads: raw.num_attention_heads,
            kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim,
            vocab: raw.vocab_size,
            max_positions,
            rms_eps: raw.rms_norm_eps.unwrap_or(1e-6) as f32,
            rope: rope(&raw)?,
            eos,
            bos: ids(raw.bos_token_id.as_ref()).first().copied(),
        };
        spec.validate()?;
        let qkv = family == Family::Qwen2 || raw.attention_bias == Some(true);
        let o = family != Family::Qwen2 && raw.attention_bias == Some(true);
        let mlp = raw.mlp_bias == Some(true);
        // All three families default to an untied head.
        let tied = raw.tie_word_embeddings.unwrap_or(false);
        Ok(Self { spec, tied, biases: [qkv, qkv, qkv, o, mlp, mlp, mlp] })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

impl Family {
    fn of(raw: &Raw) -> Result<Self, ModelError> {
        let named = raw.architectures.as_ref().and_then(|names| names.first()).or(raw.model_type.as_ref());
        match named.map(String::as_str) {
            Some("LlamaForCausalLM" | "llama") => Ok(Self::Llama),
            Some("MistralForCausalLM" | "mistral") => Ok(Self::Mistral),
            Some("Qwen2ForCausalLM" | "qwen2") => Ok(Self::Qwen2),
            Some("Qwen3ForCausalLM" | "qwen3") => Ok(Self::Qwen3),
            Some(name) => unsupported(format!(
                "architecture {name} is not supported (supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)"
            )),
            None => Err(ModelError::Load("config.json names no architecture (key `architectures`)".into())),
        }
    }

    fn architecture(self) -> Architecture {
        match self {
            Self::Llama | Self::Mistral => Architecture::Llama,
            Self::Qwen2 => Architecture::Qwen2,
            Self::Qwen3 => Architecture::Qwen3,
        }
    }
}

fn ids(tokens: Option<&LlamaEosToks>) -> Vec<TokenId> {
    match tokens {
        None => Vec::new(),
        Some(LlamaEosToks::Single(id)) => vec![*id],
        Some(LlamaEosToks::Multiple(ids)) => ids.clone(),
    }
}

fn refuse_what_we_cannot_run(raw: &Raw) -> Result<(), ModelError> {
    match raw.hidden_act.as_deref() {
        None | Some("silu") => {}
        Some(other) => return unsupported(format!("hidden_act {other} is not supported (supported: silu)")),
    }
    if let Some(quantization) = raw.quantization_config.as_ref().filter(|value| !value.is_null()) {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("of an unnamed method");
        return unsupported(format!(
            "quantization_config {method} is not supported; use the unquantised weights or a GGUF file"
        ));
    }
    if let Some(kind) = raw.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
        return unsupported(format!("layer_types with {kind} is not supported (supported: full_attention)"));
    }
    Ok(())
}

/// The longest context that we serve exactly. A window of w tokens equals full attention for contexts up to w, so a
/// Mistral model with a window (it is always on there) is served up to it. Qwen models ship the key but switch it off;
/// one that switches it on was made for longer contexts than we would give it, and is refused.
fn max_positions(raw: &Raw, family: Family) -> Result<usize, ModelError> {
    let default = match family {
        Family::Llama => 2048,
        Family::Mistral => 131_072,
        Family::Qwen2 | Family::Qwen3 => 32_768,
    };
    let positions = raw.max_position_embeddings.unwrap_or(default);
    match (family, raw.sliding_window) {
        (Family::Mistral, Some(window)) => Ok(positions.min(window)),
        (_, window) if raw.use_sliding_window == Some(true) && window.unwrap_or(4096) < positions => {
            unsupported("use_sliding_window true is not supported")
        }
        _ => Ok(positions),
    }
}

fn rope(raw: &Raw) -> Result<RopeSpec, ModelError> {
    let null = Value::Null;
    let parameters = raw
        .rope_parameters
        .as_ref()
        .filter(|value| !value.is_null())
        .or(raw.rope_scaling.as_ref().filter(|value| !value.is_null()))
        .unwrap_or(&null);
    if parameters.as_object().is_some_and(|map| map.values().any(Value::is_object)) {
        return unsupported("rope_parameters that differ by layer type are not supported");
    }
    let number = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let partial = number("partial_rotary_factor").or(raw.partial_rotary_factor).unwrap_or(1.0);
    if partial != 1.0 {
        return unsupported(format!("partial_rotary_factor {partial} is not supported (supported: 1)"));
    }
    let theta = number("rope_theta").or(raw.rope_theta).unwrap_or(10_000.0);
    let rope_type = parameters.get("rope_type").or(parameters.get("type")).and_then(Value::as_str);
    let scaling = match rope_type.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: number("factor")
                .ok_or_else(|| ModelError::Load("config.json: linear rope without factor".into()))?,
        },
        "llama3" => llama3(parameters, raw)?,
        other => {
            return unsupported(format!("rope_type {other} is not supported (supported: default, linear, llama3)"));
        }
    };
    Ok(RopeSpec { theta, scaling })
}

fn llama3(parameters: &Value, raw: &Raw) -> Result<RopeScaling, ModelError> {
    let mut parameters = parameters.clone();
    if let Some(map) = parameters.as_object_mut() {
        map.insert("rope_type".into(), "llama3".into()); // older files say `type`
        if let (None, Some(positions)) = (map.get("original_max_position_embeddings"), raw.max_position_embeddings) {
            map.insert("original_max_position_embeddings".into(), positions.into());
        }
    }
    let rope: Llama3RopeConfig = serde_json::from_value(parameters)
        .map_err(|error| ModelError::Load(format!("config.json: llama3 rope: {error}")))?;
    Ok(RopeScaling::Llama3 {
        factor: rope.factor.into(),
        low_freq_factor: rope.low_freq_factor.into(),
        high_freq_factor: rope.high_freq_factor.into(),
        original_max_position_embeddings: rope.original_max_position_embeddings as f64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 160,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
            "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "hidden_act": "silu"})
    }

    fn parse(changes: Value) -> Result<Config, ModelError> {
        let mut config = base();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        Config::parse(&serde_json::to_vec(&config).unwrap(), None)
    }

    fn refusal(changes: Value) -> String {
        parse(changes).unwrap_err().to_string()
    }

    #[test]
    fn both_layouts_of_rope_are_read() {
        let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64});
        let mut with_theta = llama3.clone();
        with_theta["rope_theta"] = 5e5.into();
        let new = parse(json!({"rope_parameters": with_theta})).unwrap().spec.rope;
        let old = parse(json!({"rope_scaling": llama3, "rope_theta": 5e5})).unwrap().spec.rope;
        assert_eq!(new, old);
        assert_eq!(new.theta, 5e5);
        assert!(
            matches!(new.scaling, RopeScaling::Llama3 { factor, original_max_position_embeddings, .. } if factor == 8.0 && original_max_position_embeddings == 64.0)
        );
        let linear = parse(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap().spec.rope;
        assert_eq!(linear, RopeSpec { theta: 1e4, scaling: RopeScaling::Linear { factor: 2.0 } });
        assert_eq!(parse(json!({"rope_scaling": null})).unwrap().spec.rope.scaling, RopeScaling::Default);
        // A null in the new key does not hide the old one.
        let spec = parse(json!({"rope_parameters": null, "rope_theta": 7.0})).unwrap().spec;
        assert_eq!(spec.rope.theta, 7.0);
    }

    #[test]
    fn refusals_name_their_reason() {
        for (changes, word) in [
            (json!({"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel"),
            (json!({"architectures": null, "model_type": "mamba"}), "mamba"),
            (json!({"hidden_act": "gelu"}), "gelu"),
            (json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}), "yarn"),
            (json!({"rope_scaling": {"type": "dynamic", "factor": 4.0}}), "dynamic"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"quantization_config": {"quant_method": "awq"}}), "awq"),
            (json!({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}), "sliding_attention"),
            (
                json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": true, "sliding_window": 64}),
                "use_sliding_window",
            ),
            (json!({"num_key_value_heads": 3}), "num_key_value_heads"),
            (json!({"head_dim": 15}), "head_dim"),
            (json!({"num_attention_heads": 0}), "num_attention_heads"),
            (json!({"vocab_size": 1u64 << 40}), "vocab_size"),
            (json!({"rope_theta": -1.0}), "rope_theta"),
            (json!({"rope_scaling": {"type": "linear"}}), "factor"),
            (json!({"rope_scaling": {"type": "linear", "factor": 0}}), "factor"),
            (json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "low_freq_factor"),
        ] {
            let message = refusal(changes);
            assert!(message.contains(word), "{word}: {message}");
        }
        let missing = Config::parse(br#"{"architectures": ["LlamaForCausalLM"]}"#, None).unwrap_err();
        assert!(missing.to_string().contains("hidden_size"), "{missing}");
    }

    #[test]
    fn windows_heads_and_eos() {
        let mistral = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 100});
        assert_eq!(parse(mistral).unwrap().spec.max_positions, 100);
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": false, "sliding_window": 100});
        assert_eq!(parse(qwen).unwrap().spec.max_positions, 256);
        assert_eq!(parse(json!({"head_dim": 32})).unwrap().spec.head_dim, 32);
        assert_eq!(parse(json!({"head_dim": null})).unwrap().spec.head_dim, 16);
        assert_eq!(parse(json!({"architectures": ["Qwen3ForCausalLM"]})).unwrap().spec.head_dim, 128);
        let config = serde_json::to_vec(&base()).unwrap();
        let generation = br#"{"eos_token_id": [5, 6]}"#;
        assert_eq!(Config::parse(&config, Some(generation)).unwrap().spec.eos, [5, 6]);
        assert_eq!(parse(json!({"eos_token_id": 5})).unwrap().spec.eos, [5]);
    }

    #[test]
    fn biases_follow_the_family() {
        assert_eq!(parse(json!({})).unwrap().biases, [false; 7]);
        let qwen = parse(json!({"architectures": ["Qwen2ForCausalLM"]})).unwrap().biases;
        assert_eq!(qwen, [true, true, true, false, false, false, false]);
        assert_eq!(parse(json!({"attention_bias": true, "mlp_bias": true})).unwrap().biases, [true; 7]);
    }
}
