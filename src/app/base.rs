//! From flags to a running base: resolve the files, load, find the basis, pack for the backend, start the engine.

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use candle_core::Device;

use super::AppError;
use crate::{
    adapter::{Basis, BasisCache, Loaded, ModelFiles, Origin, fingerprint_of_weights, internal_rank},
    config::{DeviceChoice, Dtype, EngineArgs, IsaChoice, ModelArgs},
    engine::{Engine, EngineConfig, Handle},
    kernel::{
        Backend, Clock, Precision, Timed,
        candle::CandleBackend,
        cpu::{CpuBackend, Isa},
    },
    model::{
        LoadedModel, Model, ModelSpec, ModelWeights, Sources, Transformer, TransformerOptions, kv_blocks, load,
        site_factors,
    },
    service::BaseInfo,
    text::{ChatTemplate, Tokenizer},
};

/// Tokens a sequence for which the default KV cache has room, at the full batch.
const DEFAULT_KV_TOKENS: usize = 1024;

/// A base that runs.
pub struct Base {
    /// What is fixed about it.
    pub info: BaseInfo,
    /// The basis of its adapters; of rank 0 (no vectors) when adapters are off.
    pub basis: Basis,
    /// Its engine.
    pub engine: Handle,
}

/// A model and its basis, before anything is packed.
pub(super) struct Prepared {
    /// What the flag resolved to: the served id where none is given.
    pub(super) name: String,
    /// The files' contents.
    pub(super) loaded: LoadedModel,
    /// The basis of its adapters; of rank 0 when adapters are off.
    pub(super) basis: Basis,
}

/// Resolves and loads the files, and finds the basis.
pub(super) fn prepare(model: &ModelArgs) -> Result<Prepared, AppError> {
    if let Some(threads) = model.threads {
        // The basis, fingerprints and gradients run on rayon's threads, which are as many as the kernels'. An error: somebody made them before, and they stay.
        let _ = rayon::ThreadPoolBuilder::new().num_threads(usize::from(threads)).build_global();
    }
    let sources = Sources::from_env();
    let resolved = sources.resolve(&model.model)?;
    let loaded = load(&resolved.path)?;
    let folder = model.basis_dir.clone().unwrap_or_else(|| sources.cache.join("basis"));
    let rank = usize::from(model.rank);
    let basis = find_basis(&loaded.spec, &loaded.weights, rank, &loaded.files, folder, model.recompute_basis)?;
    Ok(Prepared { name: resolved.name, loaded, basis })
}

/// Does everything up to the engine's first idle moment. Blocks: downloads, reads and computes.
pub fn start(model: &ModelArgs, engine: &EngineArgs) -> Result<Base, AppError> {
    let began = Instant::now();
    let Prepared { name, loaded, basis } = prepare(model)?;
    let LoadedModel { spec, weights, tokenizer, chat_template, special_tokens, .. } = loaded;
    let sites = spec.sites();
    let rank = usize::from(model.rank);

    let precision = precision(model.dtype, &weights);
    let max_model_len = match engine.max_model_len {
        None => spec.max_positions,
        Some(wanted) if wanted as usize <= spec.max_positions => wanted as usize,
        Some(wanted) => {
            return Err(AppError::Flag(format!(
                "--max-model-len {wanted}: the model was made for at most {} tokens",
                spec.max_positions
            )));
        }
    };
    let blocks = blocks(&spec, precision, max_model_len, engine)?;
    let options = TransformerOptions { precision, max_positions: max_model_len, kv_blocks: blocks };
    let (vocab, eos) = (spec.vocab, spec.eos.clone());
    let transformer = pack(model, usize::from(engine.max_batch), spec, weights, &basis, options, None)?;
    let handle = Engine::start(
        transformer,
        EngineConfig {
            max_batch: usize::from(engine.max_batch),
            max_queue: engine.max_queue as usize,
            max_model_len,
            prefill_chunk: engine.prefill_chunk as usize,
            idle_prefill_chunk: engine.idle_prefill_chunk as usize,
            background_rows: engine.background_rows as usize,
            gradient_share: engine.gradient_share,
            rank: basis.rank,
            sites: sites.len(),
            prefix_cache: !engine.no_prefix_cache,
        },
    )?;
    let model_id = model.model_id.clone().unwrap_or(name);
    tracing::info!(model = %model_id, ?precision, kv_blocks = blocks, seconds = began.elapsed().as_secs_f32(), "model loaded");
    let chat_template = chat_template
        .map(|source| {
            let text = |token: Option<String>| token.unwrap_or_default();
            ChatTemplate::new(&source, &text(special_tokens.bos), &text(special_tokens.eos))
        })
        .transpose()?;
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let info = BaseInfo {
        model_id,
        created,
        max_model_len,
        vocab,
        eos,
        sites,
        rank,
        fingerprint: basis.fingerprint,
        tokenizer: Tokenizer::new(tokenizer)?,
        chat_template,
    };
    Ok(Base { info, basis, engine: handle })
}

/// The basis from the cache, or computed now; says what an operator should know about it.
fn find_basis(
    spec: &ModelSpec,
    weights: &ModelWeights,
    rank: usize,
    files: &[PathBuf],
    folder: PathBuf,
    recompute: bool,
) -> Result<Basis, AppError> {
    let sites = spec.sites();
    let values = |site: usize| weights.site(site).to_f32();
    if rank == 0 {
        let fingerprint = fingerprint_of_weights(&sites, values)?;
        return Ok(Basis { rank: 0, fingerprint, sites: Vec::new() });
    }
    let began = Instant::now();
    let files =
        ModelFiles::of(files).inspect_err(|error| tracing::warn!(%error, "the model's files cannot be looked at")).ok();
    let cache = BasisCache::new(folder);
    let internal = internal_rank(rank, &sites);
    let Loaded { basis, origin, agreement } =
        cache.load_or_compute(&sites, internal, files.as_ref(), recompute, values)?;
    if let Some(agreement) = agreement.filter(|agreement| !agreement.holds()) {
        tracing::warn!(
            ?agreement,
            "a recomputed basis differs from the cached one, which stays: adapters were made for it"
        );
    }
    if origin == Origin::Computed {
        // The vectors beyond the rank served only say how others' checkpoints lean to them.
        let unstable: Vec<_> = basis.unstable().into_iter().filter(|pair| pair.k < rank).collect();
        if let Some(worst) = unstable.iter().min_by(|a, b| a.ratio.total_cmp(&b.ratio)) {
            tracing::warn!(
                pairs = unstable.len(),
                site = %sites.module(worst.site),
                ratio = worst.ratio,
                "neighbouring singular values are close: these vectors may differ between machines"
            );
        }
    }
    tracing::info!(?origin, fingerprint = %basis.fingerprint, rank, seconds = began.elapsed().as_secs_f32(), "basis ready");
    Ok(basis)
}

/// What `--dtype` means for these weights.
pub(super) fn precision(dtype: Dtype, weights: &ModelWeights) -> Precision {
    match dtype {
        Dtype::Auto => weights.natural_precision(),
        Dtype::F32 => Precision::F32,
        Dtype::Bf16 => Precision::Bf16,
        Dtype::Q8 => Precision::Q8,
        Dtype::Q4 => Precision::Q4,
    }
}

fn isa(choice: IsaChoice, precision: Precision, most_rows: usize) -> Option<Isa> {
    match choice {
        IsaChoice::Auto => Some(Isa::best_for(precision, most_rows)),
        IsaChoice::Amx => Some(Isa::Amx),
        IsaChoice::Avx512Bf16 => Some(Isa::Avx512Bf16),
        IsaChoice::Avx512 => Some(Isa::Avx512),
        IsaChoice::AvxVnni => Some(Isa::AvxVnni),
        IsaChoice::Avx2 => Some(Isa::Avx2),
        IsaChoice::Portable => Some(Isa::Portable),
    }
}

/// How many KV blocks the flags or the machine allow.
fn blocks(
    spec: &ModelSpec,
    precision: Precision,
    max_model_len: usize,
    engine: &EngineArgs,
) -> Result<usize, AppError> {
    if let Some(mebibytes) = engine.kv_cache_mb {
        let blocks = kv_blocks(spec, precision, mebibytes as usize);
        return match blocks {
            0 => Err(AppError::Flag(format!("--kv-cache-mb {mebibytes}: less than one block of this model"))),
            blocks => Ok(blocks),
        };
    }
    let tokens = usize::from(engine.max_batch) * max_model_len.min(DEFAULT_KV_TOKENS);
    let wanted = tokens.max(max_model_len).div_ceil(crate::kernel::BLOCK_TOKENS);
    let quarter = memory_mebibytes().map_or(usize::MAX, |all| kv_blocks(spec, precision, all / 4));
    Ok(wanted.min(quarter).max(1))
}

/// The machine's memory in MiB, where the system says it.
fn memory_mebibytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib / 1024)
}

/// Packs the model for the chosen device, for steps that decode up to so many sequences; with a clock, every part of its steps is timed.
pub(super) fn pack(
    args: &ModelArgs,
    most_rows: usize,
    spec: ModelSpec,
    weights: ModelWeights,
    basis: &Basis,
    options: TransformerOptions,
    clock: Option<Arc<Clock>>,
) -> Result<Box<dyn Model>, AppError> {
    let device = match args.device {
        DeviceChoice::Cpu => None,
        DeviceChoice::Auto if cfg!(feature = "cuda") => Device::new_cuda(0).ok(),
        DeviceChoice::Auto if cfg!(feature = "metal") => Device::new_metal(0).ok(),
        DeviceChoice::Auto => None,
        DeviceChoice::Cuda(_) if !cfg!(feature = "cuda") => {
            return Err(AppError::Flag(
                "--device cuda: this build has no CUDA; build with `cargo build --release --features cuda`, or take --device cpu".into(),
            ));
        }
        DeviceChoice::Metal if !cfg!(feature = "metal") => {
            return Err(AppError::Flag(
                "--device metal: this build has no Metal; build with `cargo build --release --features metal`, or take --device cpu".into(),
            ));
        }
        DeviceChoice::Cuda(number) => Some(Device::new_cuda(number).map_err(|error| {
            AppError::Flag(format!("--device cuda:{number}: {error}; is there a GPU of that number, and its driver?"))
        })?),
        DeviceChoice::Metal => {
            Some(Device::new_metal(0).map_err(|error| {
                AppError::Flag(format!("--device metal: {error}; is there a GPU that Metal knows?"))
            })?)
        }
    };
    match device {
        Some(device) => packed(CandleBackend::new(device), spec, weights, basis, options, clock),
        None => {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let threads = args.threads.map_or(cores, usize::from);
            packed(
                CpuBackend::new(threads, isa(args.isa, options.precision, most_rows))?,
                spec,
                weights,
                basis,
                options,
                clock,
            )
        }
    }
}

fn packed<B: Backend + 'static>(
    backend: B,
    spec: ModelSpec,
    weights: ModelWeights,
    basis: &Basis,
    options: TransformerOptions,
    clock: Option<Arc<Clock>>,
) -> Result<Box<dyn Model>, AppError> {
    let factors = site_factors(basis);
    Ok(match clock {
        None => Box::new(Transformer::new(backend, spec, weights, &factors, options)?),
        Some(clock) => Box::new(Transformer::new(Timed::new(backend, clock), spec, weights, &factors, options)?),
    })
}
