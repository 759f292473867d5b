//! Log-probs of completions under an adapter, and the derivative of their weighted sum by the adapter's cores, through the frozen base.
//!
//! A backward pass by hand over candle tensors in f32, on the backend's device; no weight of the base ever gets a gradient. The frozen matrices are the numbers that
//! serving multiplies with (dequantised a product or a chunk of the head at a time, see [`crate::kernel::Backend::dense`]), but activations, keys and values are *not*
//! rounded here, as they are beside weights that are not f32: a rounded function has no derivative worth the name. So these log-probs differ a little from the
//! sampler's; the trainer measures the difference and corrects for it by the importance weight.
//!
//! Memory: one `[rows, hidden]` input a layer is kept, everything else of a layer is computed once more on the way back. Logits exist for one tile of rows and one chunk
//! of the vocabulary at a time. A prompt has its rows once for all its completions.
//!
//! A [`GradientTask`] is a list of units (a product unpacked; a layer for a tile of rows; a chunk of the head for a tile), fixed when it is made. A caller that serves
//! between units says how much it can spend; where it pauses does not change a bit of the result.
//!
//! | file | holds |
//! |---|---|
//! | `plan` | rows, tiles and who sees whom: integers |
//! | `schedule` | the order of units and their costs: integers |
//! | `ops` | norms, rotation, SwiGLU and their ways back |
//! | `linear`, `attention`, `layer`, `head` | the pass |

mod attention;
mod head;
mod layer;
mod linear;
mod ops;
mod plan;
mod schedule;
mod task;

use std::sync::Arc;

pub(super) use schedule::Group;
pub use task::GradientTask;

use crate::{kernel::Cores, types::TokenId};

/// Rows of a tile where nobody says otherwise: a layer for so many takes half as long as a decode step of a few sequences, which waits for it, and the products run nearly at
/// their best speed (with 32 rows they take a quarter longer a row).
pub const TILE_ROWS: usize = 64;

/// A prompt with the completions that share it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GradientGroup {
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// At least one token each.
    pub completions: Vec<Vec<TokenId>>,
}

/// What to differentiate.
#[derive(Debug, Clone)]
pub struct GradientJob {
    /// Completions are numbered through all groups, in order.
    pub groups: Vec<GradientGroup>,
    /// The adapter. Its cores may be zero: then this is the base, and the derivative is that at the base.
    pub cores: Arc<Cores>,
    /// Log-probs are of logits / temperature; above 0.
    pub temperature: f32,
    /// False: log-probs are all that is wanted, and nothing is kept for a way back.
    pub differentiate: bool,
    /// Rows of a unit of work ([`TILE_ROWS`]). Another number gives other last bits.
    pub tile_rows: usize,
}

impl GradientJob {
    /// A job over (prompt, completion) pairs in their order: neighbours with equal prompts share them.
    pub fn new<'a>(
        sequences: impl IntoIterator<Item = (&'a [TokenId], &'a [TokenId])>,
        cores: Arc<Cores>,
        temperature: f32,
    ) -> Self {
        let mut groups: Vec<GradientGroup> = Vec::new();
        for (prompt, completion) in sequences {
            match groups.last_mut().filter(|group| group.prompt == prompt) {
                Some(group) => group.completions.push(completion.to_vec()),
                None => {
                    groups.push(GradientGroup { prompt: prompt.to_vec(), completions: vec![completion.to_vec()] });
                }
            }
        }
        Self { groups, cores, temperature, differentiate: true, tile_rows: TILE_ROWS }
    }

    /// Rows that go through the model: every prompt once, every completion but its last token. A task keeps `4 * hidden * layers` bytes a row on the way there;
    /// gradients add up, so a batch too large for the memory can be several jobs.
    pub fn rows(&self) -> usize {
        let completions =
            |group: &GradientGroup| group.completions.iter().map(|c| c.len().saturating_sub(1)).sum::<usize>();
        self.groups.iter().map(|group| group.prompt.len() + completions(group)).sum()
    }

    /// Without the derivative.
    pub fn only_logprobs(mut self) -> Self {
        self.differentiate = false;
        self
    }
}

/// The derivative by every entry of every core.
#[derive(Debug, Clone, PartialEq)]
pub struct CoreGradient {
    /// r: cores are r x r.
    pub rank: usize,
    /// `[sites, r, r]`, in the order of [`Cores::data`].
    pub data: Vec<f64>,
}

/// How far a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// On the way to the log-probs.
    Forward,
    /// The log-probs are there; [`GradientTask::set_weights`] lets it go on.
    Weights,
    /// On the way back.
    Backward,
    /// All is there.
    Done,
}

/// What one call did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Where it is now.
    pub stage: Stage,
    /// Multiply-adds done by this call.
    pub spent: u64,
    /// Multiply-adds to the end, the way back included.
    pub left: u64,
}

/// A gradient that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GradientError {
    /// This model has no backward pass.
    #[error("this model cannot be differentiated")]
    Unsupported,
    /// The model was loaded without U and V.
    #[error("the model was loaded without adapters: there is nothing to differentiate by")]
    NoFactors,
    /// A job that makes no sense; the message begins with the field.
    #[error("{0}")]
    Job(String),
    /// Weights that do not fit the completions.
    #[error("weights: {0}")]
    Weights(String),
    /// Numbers so large that the model's arithmetic overflows under them.
    #[error("the model's log-probs are not finite under these numbers")]
    NotFinite,
    /// A unit of work failed before: the task cannot go on.
    #[error("the gradient failed before and cannot go on")]
    Failed,
}
