//! The engine: one loop on its own OS thread that turns requests into ragged steps and steps into tokens.
//!
//! It knows no HTTP, no tenant's name and no text. The scheduler, blocks and sequences are integers only.
//!
//! One step: `worker` receives commands, `scheduler` plans rows (over `sequence`, `shares`, `blocks` and `prefix`), `batch` writes the plan as a
//! ragged batch, the model runs it, `sampler` (over `logits`) chooses tokens on the model's threads, and the worker commits and sends them (`events`).
//! Between two steps `gradient` advances what training jobs have asked for. `trace` tells of each sequence when it has ended.
//!
//! **Invariants.** The tokens of a request depend on nothing but the request: not on its neighbours, on how its prompt is cut, on a cache hit, or on
//! losing its blocks in between. A block is published only after it was computed and never written again. The engine never waits for a client.

mod api;
mod batch;
mod blocks;
mod events;
mod gate;
mod gradient;
mod handle;
mod logits;
mod prefix;
mod sampler;
mod scheduler;
mod sequence;
mod shares;
mod stats;
#[cfg(test)]
mod tests;
mod trace;
mod worker;

pub use crate::model::{CoreGradient, GradientJob};
pub use api::{
    Event, FinishReason, LogProbs, Priority, PromptLogProbs, Request, Sampling, Share, ShareKey, SubmitError, TokenOut,
    Usage,
};
pub use events::Events;
pub use gate::Health;
pub use gradient::{Differentiated, GradientAnswer, GradientFailure, GradientRequest, Weigh};
pub use handle::{Engine, EngineConfig, Handle, StartError};
pub use stats::{Histogram, HistogramSnapshot, Phases, Reading, Seconds, Stats};
