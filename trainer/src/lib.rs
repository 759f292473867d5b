//! Training for adapters of a few numbers, without tensors and without HTTP.
//!
//! The crate owns the seam to the model ([`Policy`]) and to the reward ([`Grader`]) and the arithmetic between them. The server implements
//! [`Policy`] over its engine; the tests here implement it over toys whose optimum is known. Cargo forbids the server and the trainer to depend on each other, so the dependency points
//! this way: the server depends on the trainer.

mod advantage;
mod policy;

pub use advantage::{AdvantageKind, group_advantages};
pub use policy::{Grade, Grader, GraderError, Policy, PolicyError, Rollout, RolloutRequest, TokenWeight};
