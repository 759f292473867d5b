//! The engine: one loop on its own OS thread that turns requests into ragged steps and steps into tokens.
//!
//! It knows no HTTP, no tenant's name and no text. The scheduler, blocks and sequences are integers only.

mod api;

pub use api::{Event, Events, FinishReason, LogProbs, PromptLogProbs, Request, Sampling, SubmitError, TokenOut, Usage};
