//! The base model: what it is (spec), its weights (loader), and one forward pass for the Llama and Qwen families.

mod config;
mod gradient;
mod loader;
mod pull;
mod rope;
mod source;
mod spec;
mod transformer;
mod weights;

pub use gradient::{CoreGradient, GradientError, GradientGroup, GradientJob, GradientTask, Progress, Stage, TILE_ROWS};
pub use loader::{LoadedModel, SpecialTokens, load};
pub use pull::{DEFAULT_MODEL, pull};
pub use source::{ResolvedModel, Sources};
pub use spec::{Architecture, ModelSpec, RopeScaling, RopeSpec};
pub use transformer::{Transformer, TransformerOptions, kv_blocks, kv_precision, site_factors};
pub use weights::{LayerWeights, ModelWeights};

use crate::kernel::{Floats, KernelError, StepBatch};

/// A model that cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The files describe something that we cannot serve; one sentence that names it.
    #[error("{0}")]
    Unsupported(String),
    /// The files are missing or broken.
    #[error("{0}")]
    Load(String),
    /// The arithmetic failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A gradient that cannot be had.
    #[error(transparent)]
    Gradient(#[from] GradientError),
}

/// What the engine needs of a model. Implemented by the transformer over any backend, and by the engine's tests.
pub trait Model: Send {
    /// Columns of the logits.
    fn vocab_size(&self) -> usize;
    /// Blocks in the KV cache.
    fn kv_blocks(&self) -> usize;
    /// Runs a step: writes K and V of every row into the cache, and the logits of `batch.logits_rows` to `logits`, `[logits_rows, vocab]` row-major, replacing what it held.
    fn forward(&mut self, batch: &StepBatch, logits: &mut Floats) -> Result<(), ModelError>;
    /// Begins a gradient ([`GradientTask`]): checks the job and cuts it into units of work.
    ///
    /// # Errors
    /// A job that does not fit the model, or a model without a backward pass.
    fn begin_gradient(&self, job: GradientJob) -> Result<GradientTask, ModelError> {
        let _ = job;
        Err(GradientError::Unsupported.into())
    }
    /// Does some of a gradient: units of work until the next would exceed the budget (multiply-adds), but at least one.
    ///
    /// # Errors
    /// What the arithmetic says; the task is lost then.
    fn advance_gradient(&mut self, task: &mut GradientTask, budget: u64) -> Result<Progress, ModelError> {
        let _ = (task, budget);
        Err(GradientError::Unsupported.into())
    }
    /// Runs `work(0)`, ..., `work(items - 1)` in any order, on the threads that the model's backend has (see [`crate::kernel::Backend::parallel`]).
    fn parallel(&mut self, items: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..items).for_each(work);
    }
}

#[cfg(test)]
mod tests;
