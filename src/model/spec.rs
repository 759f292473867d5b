//! What a model is: sizes and conventions, independent of the file format.

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
