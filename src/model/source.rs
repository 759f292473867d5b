//! What `--model` means: a path, a name of the hub, or the default model.

use std::{
    env,
    path::{Path, PathBuf},
};

use hf_hub::{
    Cache,
    api::sync::{ApiBuilder, ApiError, ApiRepo},
};

use super::{
    ModelError,
    loader::name_of,
    pull::{DEFAULT_MODEL, pull},
};

/// Files of a repository besides the weights, those that need not be there last.
const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 4] =
    ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// Where models come from.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Our own cache folder.
    pub cache: PathBuf,
    /// The hub's cache folder.
    pub hub_cache: PathBuf,
    /// The hub's address; None: huggingface.co.
    pub hub_endpoint: Option<String>,
    /// Token for gated repositories; None: the one that `hf auth login` left in the hub's cache.
    pub hub_token: Option<String>,
}

/// A model's files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// A .gguf file or a Hugging Face folder, for [`super::load`].
    pub path: PathBuf,
    /// The served id where none is given: the name of the file or folder, of the repository, or `smollm2-135m`.
    pub name: String,
}

impl Sources {
    /// From MOTE_CACHE_DIR, XDG_CACHE_HOME, HF_HOME, HF_ENDPOINT and HF_TOKEN.
    pub fn from_env() -> Self {
        let variable = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let cache = variable("MOTE_CACHE_DIR")
            .map(PathBuf::from)
            .or_else(|| variable("XDG_CACHE_HOME").map(|base| Path::new(&base).join("mote")))
            .or_else(|| env::home_dir().map(|home| home.join(".cache/mote")))
            .unwrap_or_else(|| env::temp_dir().join("mote"));
        Self {
            cache,
            hub_cache: Cache::from_env().path().clone(),
            hub_endpoint: variable("HF_ENDPOINT"),
            hub_token: variable("HF_TOKEN"),
        }
    }

    /// Finds the files of `model`, fetching them if need be: `smollm2-135m`, a path, `org/repo`, or
    /// `org/repo:file.gguf`. Blocks while it downloads.
    pub fn resolve(&self, model: &str) -> Result<ResolvedModel, ModelError> {
        let path = Path::new(model);
        if path.exists() {
            return Ok(ResolvedModel { path: path.to_owned(), name: name_of(path) });
        }
        if model == DEFAULT_MODEL {
            return Ok(ResolvedModel { path: pull(&self.cache)?, name: DEFAULT_MODEL.to_owned() });
        }
        match hub_name(model) {
            Some((repository, file)) => self.fetch(repository, file),
            None => Err(ModelError::Load(format!(
                "--model {model}: no such file or folder, and not a name either ({DEFAULT_MODEL}, org/repo, or org/repo:file.gguf)"
            ))),
        }
    }

    fn fetch(&self, repository: &str, file: Option<&str>) -> Result<ResolvedModel, ModelError> {
        let cached = Cache::new(self.hub_cache.clone()).model(repository.to_owned());
        let mut builder = ApiBuilder::from_cache(Cache::new(self.hub_cache.clone()));
        if let Some(endpoint) = &self.hub_endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        if let Some(token) = &self.hub_token {
            builder = builder.with_token(Some(token.clone()));
        }
        let explain = |error: ApiError| self.explain(repository, &error);
        let hub = builder.build().map_err(explain)?.model(repository.to_owned());
        let name = repository.rsplit('/').next().unwrap_or(repository).to_owned();
        if let Some(file) = file {
            let path = hub.get(file).map_err(explain)?;
            return Ok(ResolvedModel { name: name_of(Path::new(file)), path });
        }
        // The weights are fetched last: where they are complete, everything else is too, and no network is needed.
        let shards = |index: PathBuf| shards_of(&index);
        let complete = match cached.get(INDEX) {
            Some(index) => shards(index)?.iter().all(|shard| cached.get(shard).is_some()),
            None => cached.get(SINGLE).is_some(),
        };
        let config = match cached.get("config.json") {
            Some(config) if complete => config,
            _ => download(&hub, repository, &explain)?,
        };
        let path = config.parent().map(Path::to_owned).unwrap_or_default();
        Ok(ResolvedModel { path, name })
    }

    fn explain(&self, repository: &str, error: &ApiError) -> ModelError {
        let endpoint = self.hub_endpoint.as_deref().unwrap_or("https://huggingface.co");
        let said = error.to_string();
        let advice = if ["401", "403"].iter().any(|code| said.contains(code)) {
            "it is private or gated: set HF_TOKEN"
        } else if said.contains("404") {
            "there is no such repository or file (or it is private: set HF_TOKEN)"
        } else {
            "check the network, set HF_ENDPOINT to a mirror, or give --model a local folder or .gguf file"
        };
        ModelError::Load(format!("cannot fetch {repository} from {endpoint}: {said}; {advice}"))
    }
}

/// Downloads what serving needs; returns the path of config.json.
fn download(hub: &ApiRepo, repository: &str, explain: &dyn Fn(ApiError) -> ModelError) -> Result<PathBuf, ModelError> {
    let listed: Vec<String> =
        hub.info().map_err(explain)?.siblings.into_iter().map(|sibling| sibling.rfilename).collect();
    let has = |name: &str| listed.iter().any(|listed| listed == name);
    for name in REQUIRED {
        if !has(name) {
            return Err(ModelError::Load(format!(
                "{repository} has no {name}; if it holds GGUF files, name one: {repository}:FILE.gguf"
            )));
        }
    }
    let mut paths = Vec::new();
    for name in REQUIRED.into_iter().chain(OPTIONAL).filter(|name| has(name)) {
        paths.push(hub.get(name).map_err(explain)?);
    }
    if has(SINGLE) {
        paths.push(hub.get(SINGLE).map_err(explain)?);
    } else if has(INDEX) {
        let index = hub.get(INDEX).map_err(explain)?;
        for shard in shards_of(&index)? {
            paths.push(hub.get(&shard).map_err(explain)?);
        }
    } else {
        return Err(ModelError::Load(format!("{repository} has neither {SINGLE} nor {INDEX}")));
    }
    let Some(config) = paths.first().cloned() else { unreachable!("config.json is required") };
    if paths.iter().any(|path| path.parent() != config.parent()) {
        return Err(ModelError::Load(format!("{repository} changed during the download: start again")));
    }
    Ok(config)
}

fn shards_of(index: &Path) -> Result<Vec<String>, ModelError> {
    let broken = |error: &dyn std::fmt::Display| ModelError::Load(format!("{}: {error}", index.display()));
    let bytes = std::fs::read(index).map_err(|error| broken(&error))?;
    let index: super::loader::ShardIndex = serde_json::from_slice(&bytes).map_err(|error| broken(&error))?;
    index.shards()
}

/// `org/repo` or `org/repo:file.gguf`, with nothing that could leave a folder.
fn hub_name(model: &str) -> Option<(&str, Option<&str>)> {
    let (repository, file) = match model.split_once(':') {
        Some((repository, file)) => (repository, Some(file)),
        None => (model, None),
    };
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    let (organisation, name) = repository.split_once('/')?;
    let good_file = file.is_none_or(|file| file.ends_with(".gguf") && file.split('/').all(plain));
    // A name that ends like a file is a mistyped path.
    let path_like = file.is_none() && name.ends_with(".gguf");
    (plain(organisation) && plain(name) && good_file && !path_like).then_some((repository, file))
}
