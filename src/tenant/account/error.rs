//! Why a tenant has to wait, or to ask for less.

use std::time::Duration;

/// Why a tenant's request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// As many are under way as may be.
    #[error("You have {0} requests under way, as many as you may have at once.")]
    Concurrent(u64),
    /// The requests of this minute are used up.
    #[error("You may make {limit} requests a minute.")]
    Requests {
        /// How many a minute.
        limit: u64,
        /// Until the next one passes.
        wait: Duration,
    },
    /// The tokens of this minute are used up.
    #[error(
        "You may use {limit} tokens a minute, and this request reserves {asked}: its prompt, and 'max_tokens' for each of its choices."
    )]
    Tokens {
        /// How many a minute.
        limit: u64,
        /// How many the request may come to.
        asked: u64,
        /// Until it passes.
        wait: Duration,
    },
    /// No wait makes room for it.
    #[error(
        "This request reserves {asked} tokens (its prompt, and 'max_tokens' for each of its choices), more than the {limit} that you may use in a minute. Ask for fewer."
    )]
    TooManyTokens {
        /// How many a minute.
        limit: u64,
        /// How many the request may come to.
        asked: u64,
    },
    /// The limit is zero.
    #[error("Your tenant may make no requests.")]
    Closed,
}

impl LimitError {
    /// Until the same request may pass; None: it never does.
    pub fn wait(&self) -> Option<Duration> {
        match self {
            Self::Concurrent(_) => Some(Duration::from_secs(1)),
            Self::Requests { wait, .. } | Self::Tokens { wait, .. } => Some(*wait),
            Self::TooManyTokens { .. } | Self::Closed => None,
        }
    }
}
