//! What a model is: sizes and conventions, independent of the file format.

use super::ModelError;
use crate::{adapter::Sites, types::TokenId};

/// The families one forward pass covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2, Mistral without sliding windows.
    Llama,
    /// Qwen2 and Qwen2.5: biases on q, k, v.
    Qwen2,
    /// Qwen3: RMSNorm on each query and key head.
    Qwen3,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched.
    pub scaling: RopeScaling,
}

/// Frequency scaling of RoPE.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None (`rope_type` "default").
    Default,
    /// Every frequency divided by the factor (`rope_type` "linear").
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3's band-wise scaling.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are scaled fully.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context the model was first trained with.
        original_max_position_embeddings: f64,
    },
    /// Explicit divisors a frequency, `[head_dim / 2]` (GGUF `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Sizes and conventions of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// Family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the MLP.
    pub intermediate: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Size of a head (not always hidden / heads).
    pub head_dim: usize,
    /// Rows of the embedding, columns of the logits; may exceed the tokenizer's vocabulary.
    pub vocab: usize,
    /// Longest context the model was made for.
    pub max_positions: usize,
    /// Epsilon of every RMSNorm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeSpec,
    /// Tokens that end a completion, from config.json, generation_config.json or the GGUF.
    pub eos: Vec<TokenId>,
    /// First token of a sequence, where the tokenizer does not say.
    pub bos: Option<TokenId>,
}

impl ModelSpec {
    /// Refuses sizes that no model has or that the forward pass cannot take. A loader calls this before it allocates
    /// anything, so that products of sizes cannot overflow. Names are those of config.json.
    pub(super) fn validate(&self) -> Result<(), ModelError> {
        let bad = |what: String| Err(ModelError::Unsupported(format!("the model's configuration has {what}")));
        for (name, size, most) in [
            ("hidden_size", self.hidden, 1 << 20),
            ("intermediate_size", self.intermediate, 1 << 22),
            ("num_hidden_layers", self.layers, 1 << 12),
            ("num_attention_heads", self.heads, 1 << 12),
            ("num_key_value_heads", self.kv_heads, 1 << 12),
            ("head_dim", self.head_dim, 1 << 12),
            ("vocab_size", self.vocab, 1 << 24),
            ("max_position_embeddings", self.max_positions, 1 << 31),
        ] {
            if size == 0 || size > most {
                return bad(format!("{name} {size}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return bad(format!("num_key_value_heads {}, which does not divide {} heads", self.kv_heads, self.heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return bad(format!("an odd head_dim {}", self.head_dim));
        }
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(self.rope.theta) {
            return bad(format!("rope_theta {}", self.rope.theta));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return bad(format!("rms_norm_eps {}", self.rms_eps));
        }
        let sane = match &self.rope.scaling {
            RopeScaling::Default => true,
            RopeScaling::Linear { factor } => positive(*factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings]
                    .into_iter()
                    .all(|value| positive(*value))
            }
            RopeScaling::Factors(factors) => {
                factors.len() == self.head_dim / 2 && factors.iter().all(|factor| positive((*factor).into()))
            }
        };
        if sane { Ok(()) } else { bad(format!("a rope scaling factor out of range: {:?}", self.rope.scaling)) }
    }

    /// The adapted linears.
    pub fn sites(&self) -> Sites {
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let (hidden, inter) = (self.hidden, self.intermediate);
        Sites {
            layers: self.layers,
            shapes: [
                (q, hidden),
                (kv, hidden),
                (kv, hidden),
                (hidden, q),
                (inter, hidden),
                (inter, hidden),
                (hidden, inter),
            ],
        }
    }
}
