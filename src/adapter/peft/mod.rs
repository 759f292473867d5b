//! Checkpoints of Hugging Face PEFT's TinyLoRA (`peft.tuners.tinylora`, 0.21.2): reading them, writing them, unpacking them.
//!
//! A checkpoint is `adapter_config.json` and `adapter_model.safetensors` with the keys
//! `base_model.model.<module>.tinylora_A` `[r, in]` = sqrt(S) V^T, `.tinylora_B` `[out, r]` = U sqrt(S), `.tinylora_P` `[u, r, r]`
//! (only if `save_projection`), and `base_model.tinylora_v.<group>` `[u]`. Everything here comes from strangers: sizes are
//! bounded, nothing panics, and no path in an archive is ever used as one.

mod archive;
mod config;
mod export;
mod import;
#[cfg(test)]
mod tests;

pub use archive::read_archive;
pub use export::export;
pub use import::{Imported, import, size_limit};

use super::{CodecError, Sites};

/// Name of the configuration file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// Name of the tensors' file.
pub const MODEL_FILE: &str = "adapter_model.safetensors";

/// The two files of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeftFiles {
    /// `adapter_config.json`
    pub config: Vec<u8>,
    /// `adapter_model.safetensors`
    pub model: Vec<u8>,
}

/// A checkpoint that cannot be taken or made.
#[derive(Debug, thiserror::Error)]
pub enum PeftError {
    /// A field of the configuration.
    #[error("adapter_config.json: {field}: {message}")]
    Config {
        /// The field.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// The configuration is no JSON object.
    #[error("adapter_config.json: {0}")]
    ConfigFile(String),
    /// A tensor.
    #[error("adapter_model.safetensors: {name}: {message}")]
    Tensor {
        /// The key.
        name: String,
        /// What is wrong with it.
        message: String,
    },
    /// The tensors' file as a whole.
    #[error("adapter_model.safetensors: {0}")]
    ModelFile(String),
    /// The frozen factors are not those of our weights.
    #[error("the adapter was made for other weights: {detail} ({module})")]
    OtherWeights {
        /// The site.
        module: String,
        /// How it was noticed.
        detail: String,
    },
    /// Neither a zip nor a gzipped tar of the two files, or too large.
    #[error("archive: {0}")]
    Archive(String),
    /// The numbers.
    #[error("adapter_model.safetensors: {0}")]
    Numbers(#[from] CodecError),
    /// An adapter that PEFT has no words for.
    #[error("cannot be exported to PEFT: {0}")]
    NotExpressible(String),
    /// Writing failed, which is not the client's doing.
    #[error("cannot write the checkpoint: {0}")]
    Write(String),
}

impl PeftError {
    /// True when the checkpoint is sound but for another base.
    pub fn is_incompatible(&self) -> bool {
        matches!(self, Self::OtherWeights { .. })
    }

    /// The part of a multipart upload that is to blame.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Config { .. } | Self::ConfigFile(_) => "adapter_config",
            Self::Archive(_) => "archive",
            _ => "adapter_model",
        }
    }

    fn config(field: &str, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    fn tensor(name: &str, message: impl Into<String>) -> Self {
        Self::Tensor { name: clip(name), message: message.into() }
    }
}

/// The key of a site's `A`, `B` or `P`.
fn site_key(sites: &Sites, site: usize, part: char) -> String {
    format!("base_model.model.{}.tinylora_{part}", sites.module(site))
}

/// The key of a group's numbers.
fn group_key(group: usize) -> String {
    format!("base_model.tinylora_v.{group}")
}

/// What a stranger wrote, short enough for an error message.
fn clip(text: &str) -> String {
    text.chars().take(120).collect()
}
