//! From files to a [`LoadedModel`]: a Hugging Face folder, or one GGUF file.

mod gguf;
mod gguf_tokenizer;
mod huggingface;
mod tensors;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

pub(super) use huggingface::ShardIndex;
use tokenizers::Tokenizer;

use super::{ModelError, ModelSpec, ModelWeights};

/// Everything that serving needs of a model's files.
pub struct LoadedModel {
    /// Name of the file or folder: the served id where none is given.
    pub name: String,
    /// Sizes and conventions.
    pub spec: ModelSpec,
    /// The frozen weights, as the files hold them.
    pub weights: ModelWeights,
    /// Text to ids and back. `encode(text, true)` adds what the model wants around plain text (a bos, for many).
    pub tokenizer: Tokenizer,
    /// The model's own Jinja template for chats.
    pub chat_template: Option<String>,
    /// The strings that templates call `bos_token`, `eos_token`, ...
    pub special_tokens: SpecialTokens,
    /// True when `tokenizer.encode(text, true)` starts with the bos token. Text from a chat template has it already.
    pub add_bos_token: bool,
    /// The files that the weights came from, for [`crate::adapter::ModelFiles`].
    pub files: Vec<PathBuf>,
}

/// Special tokens as text, for chat templates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `bos_token`
    pub bos: Option<String>,
    /// `eos_token`
    pub eos: Option<String>,
    /// `pad_token`
    pub pad: Option<String>,
    /// `unk_token`
    pub unk: Option<String>,
}

/// Loads a `.gguf` file or a Hugging Face folder.
pub fn load(path: &Path) -> Result<LoadedModel, ModelError> {
    let kind = std::fs::metadata(path).map_err(|error| cannot_read(path, &error))?;
    let mut model = if kind.is_dir() { huggingface::load(path)? } else { gguf::load(path)? };
    model.add_bos_token = starts_with_bos(&model.tokenizer, model.special_tokens.bos.as_deref());
    Ok(model)
}

/// The served id of a path: the name of its folder, or of its file without `.gguf`.
pub(super) fn name_of(path: &Path) -> String {
    // Not what a link points at: in the hub's cache that is a hash. Only `.` and `..` have no name of their own.
    let own = path.file_name().map(|name| name.to_owned());
    let name = own.or_else(|| path.canonicalize().ok()?.file_name().map(|name| name.to_owned()));
    let name = name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").map(str::to_owned).unwrap_or(name)
}

fn starts_with_bos(tokenizer: &Tokenizer, bos: Option<&str>) -> bool {
    let Some(bos) = bos.and_then(|bos| tokenizer.token_to_id(bos)) else { return false };
    tokenizer.encode("a", true).is_ok_and(|encoding| encoding.get_ids().first() == Some(&bos))
}

/// A tokenizer that the library makes of a file's words: it unwraps some of what it reads, and cuts slices by lengths that a
/// broken file has wrong.
fn no_panic(make: impl FnOnce() -> Result<Tokenizer, tokenizers::Error>) -> Result<Tokenizer, tokenizers::Error> {
    // What was half made is gone with the closure.
    catch_unwind(AssertUnwindSafe(make)).unwrap_or_else(|_| Err("it is broken and cannot be read".into()))
}

fn cannot_read(path: &Path, error: &dyn std::fmt::Display) -> ModelError {
    ModelError::Load(format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
type Metadata = Vec<(&'static str, candle_core::quantized::gguf_file::Value)>;

#[cfg(test)]
pub(super) fn tokenizer_from_gguf(metadata: Metadata) -> Result<Tokenizer, ModelError> {
    gguf_tokenizer::Parts::read(&gguf::Meta::of(metadata))?.build()
}

#[cfg(test)]
pub(super) fn tokenizer_refusal(metadata: Metadata) -> String {
    match tokenizer_from_gguf(metadata) {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.to_string(),
    }
}
