//! Command line and environment: one struct a concern, every flag also a variable `MOTE_*`.

mod bench;
mod edge;
mod limits;
mod retention;
mod secret;
mod state;
mod tenants;
mod traces;
mod train;

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};

pub use bench::{
    AdapterChoice, BenchArgs, BenchCommand, DecodeArgs, PrefillArgs, ProfileArgs, QualityArgs, ReportArgs, ServedArgs,
    UploadArgs,
};
pub use edge::EdgeArgs;
pub use limits::LimitArgs;
pub use retention::RetentionArgs;
pub use secret::{Secret, SecretFile};
pub use state::{BackupArgs, IntegrityCheck, RestoreArgs, StateArgs, SyncMode};
pub use tenants::{KeysArgs, KeysCommand, LimitChoice, RoleArg, SetLimits, TenantsArgs, TenantsCommand};
pub use traces::TraceArgs;
pub use train::{DataArgs, EvalArgs, MethodChoice, TaskArgs, TaskChoice, TrainArgs};

/// One frozen language model in memory, thousands of 26-byte adapters over it, every request under its own, all in one batch.
#[derive(Debug, Parser)]
#[command(name = "mote", version, about, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log filter, e.g. `info`, `mote=debug,tower_http=info`.
    #[arg(long, env = "MOTE_LOG", default_value = "info", global = true)]
    pub log: String,
    /// How log lines look on stderr.
    #[arg(long, env = "MOTE_LOG_FORMAT", value_enum, default_value_t = LogFormat::Text, global = true)]
    pub log_format: LogFormat,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model and its adapters over HTTP (OpenAI-style API; documentation at /docs). A flag given twice: the last counts.
    #[command(args_override_self = true)]
    Serve(Box<ServeArgs>),
    /// Train an adapter in this process and measure it.
    #[command(args_override_self = true)]
    Train(Box<TrainArgs>),
    /// Measure an adapter, and the base beside it, on items with checkable answers.
    #[command(args_override_self = true)]
    Eval(Box<EvalArgs>),
    /// Write a made-up task with checkable answers, to try training on.
    Task(TaskArgs),
    /// Fetch a model into the cache and print the path of its file.
    Pull(PullArgs),
    /// Create, list, rotate and revoke API keys, also while a server runs on the same data directory.
    Keys(KeysArgs),
    /// Copy the state of a data directory into one file, also while a server runs on it.
    Backup(BackupArgs),
    /// Make a data directory of a backup.
    Restore(RestoreArgs),
    /// Create and list tenants and set their limits, also while a server runs on the same data directory.
    Tenants(TenantsArgs),
    /// List and export adapters of a data directory.
    Adapters(AdaptersArgs),
    /// Print the OpenAPI document.
    Openapi,
    /// Measure this build on this machine: speed, latency, memory, precision.
    Bench(BenchArgs),
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Readable.
    Text,
    /// One JSON object a line.
    Json,
}

/// `mote serve`
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Addresses, keys and limits of the HTTP server.
    #[command(flatten)]
    pub http: HttpArgs,
    /// What connections and requests may take, and how the server shows itself.
    #[command(flatten)]
    pub edge: EdgeArgs,
    /// Batch, queue and memory of the engine.
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Where state lives.
    #[command(flatten)]
    pub state: StateArgs,
    /// Limits of training.
    #[command(flatten)]
    pub training: TrainingArgs,
    /// Limits of a tenant.
    #[command(flatten)]
    pub limits: LimitArgs,
    /// For how long things are kept.
    #[command(flatten)]
    pub retention: RetentionArgs,
    /// Where spans go.
    #[command(flatten)]
    pub traces: TraceArgs,
}

/// Limits of training.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Training")]
pub struct TrainingArgs {
    /// Training jobs that run at once; 0 turns training off.
    #[arg(long, env = "MOTE_TRAIN_JOBS", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub train_jobs: u32,
    /// Training jobs of one tenant that run at once.
    #[arg(long, env = "MOTE_TRAIN_JOBS_PER_TENANT", value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub train_jobs_per_tenant: u32,
    /// Seconds that a training job runs before it waits for the job of another tenant, where one waits and there is no place. It goes on from its checkpoint.
    #[arg(long, env = "MOTE_TRAIN_TURN_S", value_name = "N", default_value_t = 60)]
    pub train_turn_s: u32,
    /// Training jobs of one tenant under way (queued, running or paused); one more is answered 429.
    #[arg(long, env = "MOTE_TRAIN_QUEUE_PER_TENANT", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub train_queue_per_tenant: u32,
    /// Training jobs of all tenants under way; one more is answered 429 queue_full.
    #[arg(long, env = "MOTE_TRAIN_QUEUE", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub train_queue: u32,
    /// Steps of a training job at most.
    #[arg(long, env = "MOTE_TRAIN_MAX_STEPS", value_name = "N", default_value_t = 20_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub train_max_steps: u32,
    /// Checkpoints of a training job that are kept.
    #[arg(long, env = "MOTE_TRAIN_CHECKPOINTS", value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub train_checkpoints: u32,
    /// Largest data set (a file of /v1/files, or a job's own) in MiB; a line has at most 1 MiB.
    #[arg(long, env = "MOTE_MAX_FILE_MB", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub max_file_mb: u32,
    /// All files of a tenant together in MiB.
    #[arg(long, env = "MOTE_MAX_FILES_MB_PER_TENANT", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=1_048_576))]
    pub max_files_mb_per_tenant: u32,
    /// Hosts that remote graders may be on, separated by commas: `grader.example.org`, `*.example.org`, `grader.example.org:8443`. Only https, and never a private address [default: none].
    #[arg(long, env = "MOTE_GRADER_HOSTS", value_name = "HOSTS", value_delimiter = ',')]
    pub grader_hosts: Vec<String>,
    /// Calls of one job to a remote grader at once.
    #[arg(long, env = "MOTE_GRADER_CONCURRENCY", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub grader_concurrency: u16,
}

/// Which model, and on what.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// The base model: a .gguf file, a Hugging Face folder (config.json, tokenizer.json, *.safetensors), a hub name such as `Qwen/Qwen2.5-0.5B-Instruct` or
    /// `org/repo:file.gguf`, or `smollm2-135m` (fetched by `mote pull`).
    #[arg(long, env = "MOTE_MODEL", default_value = "smollm2-135m")]
    pub model: String,
    /// The id under which the base is served [default: the file's or folder's name].
    #[arg(long, env = "MOTE_MODEL_ID", value_name = "NAME")]
    pub model_id: Option<String>,
    /// How weights are held. `auto`: as the file suggests (f32 for f32, bf16 for bf16 and f16, q8 for quantised files). `f32` dequantises everything;
    /// `q8` leaves 4-bit files as they are; `q4` makes 4 bits of any file, which is faster at small batches and coarser.
    #[arg(long, env = "MOTE_DTYPE", value_enum, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Where to run: auto, cpu, cuda, cuda:N or metal. `auto` takes a GPU this build supports, else the CPU.
    #[arg(long, env = "MOTE_DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
    /// Largest adapter rank served; 0 turns adapters off.
    #[arg(long, env = "MOTE_RANK", value_name = "R", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=64))]
    pub rank: u8,
    /// Threads for the arithmetic [default: the machine's cores].
    #[arg(long, env = "MOTE_THREADS", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Instructions for the arithmetic on the CPU, to test or compare them.
    #[arg(long, env = "MOTE_ISA", value_enum, default_value_t = IsaChoice::Auto)]
    pub isa: IsaChoice,
    /// Where the basis of a model (the SVD of its weights) is cached [default: `basis` in Mote's cache folder].
    #[arg(long, env = "MOTE_BASIS_DIR", value_name = "DIR")]
    pub basis_dir: Option<PathBuf>,
    /// Compute the basis anew and compare it with the cached one.
    #[arg(long, env = "MOTE_RECOMPUTE_BASIS")]
    pub recompute_basis: bool,
}

/// Batch, queue and memory.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Engine")]
pub struct EngineArgs {
    /// Sequences that run at once.
    #[arg(long, env = "MOTE_MAX_BATCH", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub max_batch: u16,
    /// Requests that may wait; one more is answered 429 queue_full. A fourth more is kept for tenants that have next to nothing here.
    #[arg(long, env = "MOTE_MAX_QUEUE", value_name = "N", default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub max_queue: u32,
    /// Longest prompt plus completion, in tokens [default: the model's context].
    #[arg(long, env = "MOTE_MAX_MODEL_LEN", value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_model_len: Option<u32>,
    /// Memory for the KV cache in MiB [default: enough for max-batch sequences of up to 1024 tokens, at most a quarter of the memory].
    #[arg(long, env = "MOTE_KV_CACHE_MB", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub kv_cache_mb: Option<u32>,
    /// Prompt tokens computed in one step, besides the rows of decoding sequences: smaller keeps streams smoother, larger takes prompts in faster.
    #[arg(long, env = "MOTE_PREFILL_CHUNK", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub prefill_chunk: u32,
    /// The same for steps in which nothing decodes but background work; less than --prefill-chunk counts as that.
    #[arg(long, env = "MOTE_IDLE_PREFILL_CHUNK", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub idle_prefill_chunk: u32,
    /// Rows that background work (training) may add to a step that serves requests; 0: it waits until there are none.
    #[arg(long, env = "MOTE_BACKGROUND_ROWS", value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u32).range(0..=65_536))]
    pub background_rows: u32,
    /// Time that the gradients of training jobs may take while requests are answered, as a multiple of what these take; 0: they wait until there are none.
    #[arg(long, env = "MOTE_GRADIENT_SHARE", value_name = "X", default_value_t = 0.6, value_parser = share)]
    pub gradient_share: f64,
    /// Do not share the KV blocks of equal prompt beginnings between requests of the same tenant and adapter.
    #[arg(long, env = "MOTE_NO_PREFIX_CACHE")]
    pub no_prefix_cache: bool,
}

/// The HTTP server.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "HTTP")]
pub struct HttpArgs {
    /// Address and port to listen on; port 0 takes a free one and logs it.
    #[arg(long, env = "MOTE_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Serve one built-in tenant without keys or quotas. Refused on an address that is not loopback unless --force-no-auth is given.
    #[arg(long, env = "MOTE_NO_AUTH")]
    pub no_auth: bool,
    /// With --no-auth: listen on any address all the same.
    #[arg(long, env = "MOTE_FORCE_NO_AUTH", requires = "no_auth")]
    pub force_no_auth: bool,
    /// The admin key of an empty store, instead of a random one printed once. 8 to 256 characters; 24 or more to be safe.
    #[arg(long, env = "MOTE_ADMIN_KEY", value_name = "KEY", hide_env_values = true)]
    pub admin_key: Option<Secret>,
    /// The same in a file, as secret stores give it.
    #[arg(long, env = "MOTE_ADMIN_KEY_FILE", value_name = "FILE", conflicts_with = "admin_key")]
    pub admin_key_file: Option<SecretFile>,
    /// Largest JSON body in MiB.
    #[arg(long, env = "MOTE_MAX_BODY_MB", value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_body_mb: u32,
    /// Largest body of POST /adapters/batch in MiB.
    #[arg(long, env = "MOTE_MAX_BATCH_BODY_MB", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub max_batch_body_mb: u32,
    /// Seconds that a completion may take, its time in the queue included; then it ends with 503 overloaded, or a stream with an error. 0: as long as it takes.
    #[arg(long, env = "MOTE_REQUEST_TIMEOUT_S", value_name = "N", default_value_t = 600)]
    pub request_timeout_s: u64,
    /// Seconds that running requests have to finish after SIGTERM.
    #[arg(long, env = "MOTE_DRAIN_SECONDS", value_name = "N", default_value_t = 30)]
    pub drain_seconds: u64,
}

impl HttpArgs {
    /// How long a completion may take.
    pub fn request_timeout(&self) -> Option<Duration> {
        (self.request_timeout_s > 0).then(|| Duration::from_secs(self.request_timeout_s))
    }

    /// The admin key, if one is given.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn admin_key(&self) -> Result<Option<Secret>, String> {
        secret::given(self.admin_key.as_ref(), self.admin_key_file.as_ref())
    }

    /// The drain deadline.
    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// How weights are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    /// As the file suggests.
    Auto,
    /// 32-bit floats throughout.
    F32,
    /// bfloat16 weights and activations, f32 sums.
    Bf16,
    /// 8-bit integers, a scale for 32 of them; 4-bit files as they are.
    Q8,
    /// 4-bit integers, a scale and a minimum for 32 of them.
    Q4,
}

/// `--isa`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum IsaChoice {
    /// The best that the processor has: AMX where there is one, but not for small batches, that is, with `--dtype q4` or a `--max-batch` of 8 or less.
    Auto,
    /// AMX with bfloat16, AVX-512 with BF16 and FP16: the fastest from 20 rows at a time on; a few sequences decode faster without.
    Amx,
    /// AVX-512 with VNNI and BF16.
    Avx512Bf16,
    /// AVX-512 with VNNI.
    Avx512,
    /// AVX2 with AVX-VNNI.
    AvxVnni,
    /// AVX2 with FMA.
    Avx2,
    /// No more than the target guarantees.
    Portable,
}

/// `--device`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU that this build supports and the machine has, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU by number.
    Cuda(usize),
    /// The Apple GPU.
    Metal,
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            "metal" => Ok(Self::Metal),
            other => other
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("'{other}' is not one of auto, cpu, cuda, cuda:N, metal")),
        }
    }
}

/// `mote pull`
#[derive(Debug, Args)]
pub struct PullArgs {
    /// The model to fetch: `smollm2-135m` or a hub name.
    #[arg(default_value = "smollm2-135m")]
    pub model: String,
}

/// `mote adapters`
#[derive(Debug, Args)]
pub struct AdaptersArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: AdaptersCommand,
}

/// Adapters of a data directory, without a server.
#[derive(Debug, Subcommand)]
pub enum AdaptersCommand {
    /// List a tenant's adapters: name, generation, scheme, dtype, bytes.
    List {
        /// Whose adapters.
        #[arg(long, value_name = "NAME", default_value = "default")]
        tenant: String,
        /// Only names that begin so.
        #[arg(long, default_value = "")]
        prefix: String,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
    /// Write an adapter's raw bytes to a file.
    Export {
        /// The adapter.
        name: String,
        /// Whose adapter.
        #[arg(long, value_name = "NAME", default_value = "default")]
        tenant: String,
        /// The file to write.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Where state lives.
        #[command(flatten)]
        state: StateArgs,
    },
}

/// A multiple of something: at least 0.
fn share(value: &str) -> Result<f64, String> {
    let share: f64 = value.parse().map_err(|error| format!("{error}"))?;
    if (0.0..=1000.0).contains(&share) { Ok(share) } else { Err("must be from 0 to 1000".to_owned()) }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn devices_parse() {
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        assert!("cuda:x".parse::<DeviceChoice>().is_err());
        assert!("tpu".parse::<DeviceChoice>().is_err());
    }

    #[test]
    fn every_flag_has_a_variable() {
        for name in ["serve"] {
            let command = Cli::command();
            let serve = command.find_subcommand(name).unwrap();
            for arg in serve.get_arguments().filter(|arg| !arg.is_global_set() && arg.get_id() != "help") {
                let env = arg.get_env().map(|env| env.to_string_lossy().into_owned());
                assert!(env.is_some_and(|env| env.starts_with("MOTE_")), "{} has no variable", arg.get_id());
            }
        }
    }
}
