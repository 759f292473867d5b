//! Use cases, one file each: resolve an adapter, complete, train, manage adapters and tenants.

mod adapters;
mod chat;
mod completion;
mod decoding;
mod error;
mod follow;
mod ids;
mod library;
mod limits;
mod metrics;
mod models;
mod policy;
mod popular;
mod reader;
mod resolve;
mod retention;
mod salts;
mod share;
mod shed;
mod target;
mod tenants;
pub mod training;
mod upload;
mod usage;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

pub use adapters::{AdapterInfo, GenerationInfo, Numbers, Retry, SchemeInfo, Uploaded};
pub use chat::{ChatRequest, MAX_TOP_LOGPROBS, Message};
pub use completion::{Choice, Completion, CompletionRequest, DEFAULT_MAX_TOKENS, MAX_LOGPROBS, Prompts, Usage};
pub use decoding::{Decoding, MAX_CHOICES, MAX_STOPS};
pub use error::{Error, ErrorKind};
pub use library::{BadContents, Library};
pub use models::Model;
pub use policy::RequestPolicy;
pub use reader::{Alternative, Delta, End, Prompt, TokenScore};
pub use resolve::MAX_MIX;
pub use retention::Retention;
pub use target::{AdapterField, Lease, Target};
pub use tenants::{DEFAULT_GRACE, KeyLife, MAX_GRACE, MAX_LIFE};
pub use training::Training;
pub use upload::{Content, Upload};
pub use usage::DayOfUsage;

pub use crate::{
    engine::FinishReason,
    store::{EventRecord, FileRecord, HISTORY, JobStatus, SamplesRecord},
};

use crate::{
    adapter::{Basis, Sites},
    engine::Handle,
    store::{DamagedRow, Store, StoreError},
    telemetry::{DamagedLabels, Metrics},
    tenant::{Accounts, Directory},
    text::{ChatTemplate, Tokenizer},
    types::{Fingerprint, TokenId},
};
use shed::Shedder;

/// What is fixed about the base model while a server runs.
#[derive(Debug)]
pub struct BaseInfo {
    /// The id that clients name in `model`.
    pub model_id: String,
    /// Unix seconds of the start, shown by `/v1/models`.
    pub created: u64,
    /// Longest prompt plus completion, in tokens.
    pub max_model_len: usize,
    /// Columns of the logits: a token id is below it. The tokenizer may know fewer.
    pub vocab: usize,
    /// Tokens that end a completion.
    pub eos: Vec<TokenId>,
    /// The adapted linears.
    pub sites: Sites,
    /// Largest adapter rank served; 0 serves no adapters.
    pub rank: usize,
    /// Names the weights that adapters are made for.
    pub fingerprint: Fingerprint,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// The model's own chat template; None answers chats with 400 `no_chat_template`.
    pub chat_template: Option<ChatTemplate>,
}

/// Everything that use cases work on. One a process; each file of this folder adds its `impl` block.
pub struct Service {
    /// The model that is served.
    pub base: Arc<BaseInfo>,
    /// The engine that runs it.
    pub engine: Handle,
    /// Counters of requests and tokens.
    pub metrics: Arc<Metrics>,
    /// Bearer tokens to callers.
    pub directory: Directory,
    /// What tenants may use, and what they have used that the store does not know yet.
    pub accounts: Arc<Accounts>,
    /// Held while that goes to the store.
    carrying: usage::Carrying,
    /// Adapters in memory.
    pub library: Arc<Library>,
    /// Everything that survives.
    pub store: Store,
    /// A completion that is not done after so long ends with an error; None: never.
    pub request_timeout: Option<Duration>,
    /// What a request may ask for.
    policy: RequestPolicy,
    /// Knows how long a newcomer would wait.
    shedder: Shedder,
    /// Adapters' public ids.
    ids: ids::AdapterIds,
    /// Which adapters are asked for most.
    popularity: popular::Popularity,
    /// Graders that run without a job.
    grader_places: training::GraderPlaces,
    /// Set once training has started.
    training: OnceLock<Training>,
}

impl Service {
    /// Puts the use cases together over an engine and a store, and reads all adapters into memory.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn open(base: BaseInfo, basis: Basis, engine: Handle, store: Store) -> Result<Self, StoreError> {
        let library = Arc::new(Library::new(base.sites.clone(), Arc::new(basis), base.rank));
        let ids = ids::AdapterIds::open(&store).await?;
        let began = Instant::now();
        let adapters = library.fill(&store).await?;
        store.observe(Arc::new(follow::Follower { library: library.clone(), engine: engine.clone() }));
        tracing::info!(adapters, seconds = began.elapsed().as_secs_f32(), "adapters loaded");
        let metrics = Arc::<Metrics>::default();
        for DamagedRow { kind, name, cause } in store.damaged_rows().await? {
            let kind = kind.as_str();
            tracing::error!(kind, name, cause, "a tenant or key in the store cannot be read: it does not work");
            metrics.damaged.get_or_create(&DamagedLabels { kind }).inc();
        }
        let accounts = Arc::<Accounts>::default();
        let carrying = usage::keep_writing(&accounts, &store);
        Ok(Self {
            base: Arc::new(base),
            engine,
            metrics,
            directory: Directory::new(Arc::new(store.clone()), accounts.clone()),
            accounts,
            carrying,
            library,
            store,
            request_timeout: None,
            policy: RequestPolicy::default(),
            shedder: Shedder::default(),
            ids,
            popularity: popular::Popularity::default(),
            grader_places: training::GraderPlaces::default(),
            training: OnceLock::new(),
        })
    }

    /// The same with other limits of a request.
    pub fn with_policy(mut self, policy: RequestPolicy) -> Self {
        self.shedder = Shedder::new(policy.shed_after);
        self.policy = policy;
        self
    }
}
