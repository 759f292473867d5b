//! What goes into the engine and what comes out.

use std::{num::NonZeroU32, sync::Arc, time::Instant};

use tracing::Span;

use crate::{
    kernel::Cores,
    types::{CacheSalt, TokenId},
};

/// How tokens are chosen. Log-probs are always of the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest.
    pub min_p: f32,
    /// Subtracted once from the logit of every token that the completion already holds.
    pub presence_penalty: f32,
    /// Subtracted for each time the completion holds the token.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or completion; 1 does nothing.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// The draw for the i-th completion token is a pure function of (seed, i).
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// Who goes first.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// Takes what interactive requests leave: it is admitted after them, loses its blocks before them, and adds a bounded number of rows to a step
    /// in which they have some.
    Background,
}

/// Whose sequences take turns with those of others. Opaque: the engine knows no tenants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShareKey(pub u64);

/// Whose a sequence is, and how much of the engine its key gets beside others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Whose.
    pub key: ShareKey,
    /// Keys that both have more to do than fits get tokens in proportion to their weights. Of the requests of a key the latest one's counts.
    pub weight: NonZeroU32,
}

impl Default for Share {
    fn default() -> Self {
        Self { key: ShareKey::default(), weight: NonZeroU32::MIN }
    }
}

/// One sequence to complete. A completion with n choices is n requests.
#[derive(Debug, Clone)]
pub struct Request {
    /// At least one token; `prompt.len() + max_tokens` fits the context (the caller checks; the engine refuses).
    pub prompt: Vec<TokenId>,
    /// At most so many completion tokens; 0 only scores the prompt.
    pub max_tokens: usize,
    /// Stop tokens are not sampled before so many completion tokens.
    pub min_tokens: usize,
    /// Sampling one of these ends the completion with [`FinishReason::Stop`]; the token itself is reported with `stop: true`.
    pub stop_tokens: Vec<TokenId>,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Report the log-prob of each completion token and of so many alternatives.
    pub logprobs: Option<usize>,
    /// The log-probs of completion tokens are of the logits over the temperature, as they are sampled from, and not of the raw ones.
    pub scaled_logprobs: bool,
    /// Report the same for each prompt token (the first has none), before any completion token.
    pub prompt_logprobs: Option<usize>,
    /// Also report the raw logits each completion token was sampled from (tests and the trainer's checks; costs a vocabulary of f32 a token).
    pub capture_logits: bool,
    /// The adapter's cores, or the bare base. The `Arc` is the lease: replacing an adapter never touches a running request.
    pub cores: Option<Arc<Cores>>,
    /// Under which hash blocks may be shared.
    pub salt: CacheSalt,
    /// May this request read and fill the prefix cache?
    pub use_cache: bool,
    /// Who goes first. It changes when the tokens come, never which.
    pub priority: Priority,
    /// Whose it is. This too changes when the tokens come, never which.
    pub share: Share,
    /// If it is not done by then, waiting or running, it ends with [`Event::Expired`] between two steps.
    pub deadline: Option<Instant>,
    /// The span of whoever asks: the sequence's own is below it. [`Span::none`]: it has none.
    pub span: Span,
}

/// The log-prob of a token and the likeliest alternatives at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct LogProbs {
    /// Of the chosen (or prompt) token.
    pub logprob: f32,
    /// (token, log-prob), likeliest first, ties by lower id.
    pub top: Vec<(TokenId, f32)>,
}

/// One entry a prompt token; the first is None.
pub type PromptLogProbs = Vec<Option<LogProbs>>;

/// A sampled token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOut {
    /// The token.
    pub token: TokenId,
    /// True for a stop token, which is not part of the text.
    pub stop: bool,
    /// When asked for.
    pub logprobs: Option<LogProbs>,
    /// When asked for: the raw logits, `[vocab]`.
    pub logits: Option<Box<[f32]>>,
}

/// Why a completion ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
}

impl FinishReason {
    /// Its word in traces.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a request cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Completion tokens, the stop token included.
    pub completion_tokens: usize,
    /// Prompt tokens whose KV came from the prefix cache.
    pub cached_tokens: usize,
    /// How often the sequence lost its blocks and was recomputed.
    pub preemptions: usize,
}

/// What a request's channel carries, in order: at most one `Prompt`, at most one `Began`, tokens, then exactly one `Finished`, `Failed`, `NotFinite` or `Expired`.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// Log-probs of the prompt, when asked for.
    Prompt(PromptLogProbs),
    /// The first token follows. Who cancels after it (a stop string was found) knows by this what the prompt cost.
    Began {
        /// Prompt tokens whose KV came from the prefix cache, as in [`Usage`].
        cached_tokens: usize,
    },
    /// A completion token.
    Token(TokenOut),
    /// The end.
    Finished(FinishReason, Usage),
    /// The engine could not go on with this request (a device error, a panic in the step); the message is for the operator's log.
    Failed(String),
    /// The end: the logits of this request are not finite, so there is nothing to choose from.
    NotFinite,
    /// The end: the request's deadline came first. What came before it stands.
    Expired,
}

/// The engine did not take a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// `--max-queue` requests of this priority wait already.
    #[error("the queue is full: {0} requests are waiting")]
    QueueFull(usize),
    /// The request cannot be run on this model (empty prompt, too long for the context, a token out of range, cores of another rank).
    #[error("{0}")]
    Invalid(String),
    /// The engine is stopping or dead.
    #[error("the engine has stopped")]
    Stopped,
}
