//! A Hugging Face folder: config.json, tokenizer.json, one or many safetensors; the rest is optional.

use std::{
    collections::{BTreeSet, HashMap},
    io::ErrorKind,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use super::{LoadedModel, SpecialTokens, cannot_read, name_of, no_panic, tensors::Tensors};
use crate::{
    adapter::SiteKind,
    model::{Architecture, LayerWeights, ModelError, ModelWeights, config::Config},
};

pub(super) fn load(folder: &Path) -> Result<LoadedModel, ModelError> {
    let config = required(folder, "config.json")?;
    let config = Config::parse(&config, optional(folder, "generation_config.json")?.as_deref())?;
    let tokenizer = tokenizer(&required(folder, "tokenizer.json")?)?;
    let settings = TokenizerConfig::read(folder)?;
    let mut special_tokens = settings.special_tokens();
    let spec = &config.spec;
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.id_to_token(id));
    special_tokens.bos = special_tokens.bos.or_else(|| text(spec.bos));
    special_tokens.eos = special_tokens.eos.or_else(|| text(spec.eos.first().copied()));
    let chat_template = match optional(folder, "chat_template.jinja")? {
        Some(bytes) => Some(utf8("chat_template.jinja", bytes)?),
        None => settings.chat_template()?,
    };

    let paths = weight_files(folder)?;
    let mut tensors = Tensors::open(paths.iter().map(PathBuf::as_path))?;
    let weights = weights(&config, &mut tensors)?;
    if let Some(name) = tensors.rest().into_iter().find(|name| !is_harmless(name, config.tied)) {
        return Err(ModelError::Unsupported(format!(
            "tensor {name} is not known to {:?} models: ignoring it would give another model's answers",
            spec.architecture
        )));
    }
    Ok(LoadedModel {
        name: name_of(folder),
        files: paths,
        spec: config.spec,
        weights,
        tokenizer,
        chat_template,
        special_tokens,
        add_bos_token: false,
    })
}

fn weights(config: &Config, tensors: &mut Tensors) -> Result<ModelWeights, ModelError> {
    let spec = &config.spec;
    let shapes = spec.sites().shapes;
    let qwen3 = spec.architecture == Architecture::Qwen3;
    let embedding = tensors.matrix("model.embed_tokens.weight", spec.vocab, spec.hidden)?;
    let mut layers = Vec::with_capacity(spec.layers);
    for layer in 0..spec.layers {
        let prefix = format!("model.layers.{layer}");
        let mut sites = Vec::with_capacity(7);
        let mut biases = [const { None }; 7];
        for ((kind, (rows, cols)), (bias, needed)) in
            SiteKind::ALL.into_iter().zip(shapes).zip(biases.iter_mut().zip(config.biases))
        {
            let module = format!("{prefix}.{}", kind.module());
            sites.push(tensors.matrix(&format!("{module}.weight"), rows, cols)?);
            let name = format!("{module}.bias");
            if needed || tensors.has(&name) {
                *bias = Some(tensors.vector(&name, rows)?);
            }
        }
        let Ok(sites) = sites.try_into() else { unreachable!("seven kinds were pushed") };
        let mut head_norm = |which: &str| {
            qwen3.then(|| tensors.vector(&format!("{prefix}.self_attn.{which}_norm.weight"), spec.head_dim)).transpose()
        };
        let (q_norm, k_norm) = (head_norm("q")?, head_norm("k")?);
        layers.push(LayerWeights {
            sites,
            biases,
            input_norm: tensors.vector(&format!("{prefix}.input_layernorm.weight"), spec.hidden)?,
            post_norm: tensors.vector(&format!("{prefix}.post_attention_layernorm.weight"), spec.hidden)?,
            q_norm,
            k_norm,
        });
    }
    let final_norm = tensors.vector("model.norm.weight", spec.hidden)?;
    let head = if config.tied { None } else { Some(tensors.matrix("lm_head.weight", spec.vocab, spec.hidden)?) };
    Ok(ModelWeights { embedding, layers, final_norm, head })
}

/// Buffers that old exports saved, and the copy of a tied head.
fn is_harmless(name: &str, tied: bool) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (tied && name == "lm_head.weight")
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
pub(in crate::model) struct ShardIndex {
    weight_map: HashMap<String, String>,
}

impl ShardIndex {
    /// The names of the shards, sorted.
    pub(in crate::model) fn shards(self) -> Result<Vec<String>, ModelError> {
        let shards: BTreeSet<String> = self.weight_map.into_values().collect();
        match shards.iter().find(|shard| shard.contains(['/', '\\'])) {
            Some(shard) => Err(ModelError::Load(format!("model.safetensors.index.json: {shard} is no file name"))),
            None => Ok(shards.into_iter().collect()),
        }
    }
}

/// `model.safetensors`, or the shards that the index names.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let single = folder.join("model.safetensors");
    if single.exists() {
        return Ok(vec![single]);
    }
    let Some(index) = optional(folder, "model.safetensors.index.json")? else {
        return Err(ModelError::Load(format!(
            "{} has neither model.safetensors nor model.safetensors.index.json",
            folder.display()
        )));
    };
    let index: ShardIndex = serde_json::from_slice(&index)
        .map_err(|error| ModelError::Load(format!("model.safetensors.index.json: {error}")))?;
    Ok(index.shards()?.into_iter().map(|shard| folder.join(shard)).collect())
}

fn tokenizer(bytes: &[u8]) -> Result<Tokenizer, ModelError> {
    let bad = |error: tokenizers::Error| ModelError::Load(format!("tokenizer.json: {error}"));
    let mut tokenizer = no_panic(|| Tokenizer::from_bytes(bytes)).map_err(bad)?;
    // Settings for batches of a training script that would cut or pad a prompt.
    tokenizer.with_truncation(None).map_err(bad)?;
    tokenizer.with_padding(None);
    Ok(tokenizer)
}

/// `tokenizer_config.json`, and `special_tokens_map.json` for what it leaves out.
struct TokenizerConfig {
    config: Value,
    map: Value,
}

impl TokenizerConfig {
    fn read(folder: &Path) -> Result<Self, ModelError> {
        let json = |name| match optional(folder, name)? {
            None => Ok(Value::Null),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| ModelError::Load(format!("{name}: {error}"))),
        };
        Ok(Self { config: json("tokenizer_config.json")?, map: json("special_tokens_map.json")? })
    }

    /// A token is a string, or an object with `content`.
    fn token(&self, key: &str) -> Option<String> {
        [&self.config, &self.map].into_iter().find_map(|source| {
            let value = source.get(key)?;
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        })
    }

    fn special_tokens(&self) -> SpecialTokens {
        SpecialTokens {
            bos: self.token("bos_token"),
            eos: self.token("eos_token"),
            pad: self.token("pad_token"),
            unk: self.token("unk_token"),
        }
    }

    /// A string, or a list of `{name, template}` of which "default" is ours.
    fn chat_template(&self) -> Result<Option<String>, ModelError> {
        match self.config.get("chat_template") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(template)) => Ok(Some(template.clone())),
            Some(Value::Array(templates)) => Ok(templates
                .iter()
                .find(|entry| entry["name"] == "default")
                .and_then(|entry| entry["template"].as_str())
                .map(str::to_owned)),
            Some(_) => Err(ModelError::Load("tokenizer_config.json: chat_template is neither text nor a list".into())),
        }
    }
}

fn optional(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, ModelError> {
    let path = folder.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(cannot_read(&path, &error)),
    }
}

fn required(folder: &Path, name: &str) -> Result<Vec<u8>, ModelError> {
    optional(folder, name)?.ok_or_else(|| ModelError::Load(format!("{} has no {name}", folder.display())))
}

fn utf8(name: &str, bytes: Vec<u8>) -> Result<String, ModelError> {
    String::from_utf8(bytes).map_err(|_| ModelError::Load(format!("{name} is not UTF-8")))
}
