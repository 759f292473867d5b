//! Training for adapters of a few numbers, without tensors, without HTTP and without a disk.
//!
//! The crate owns the seams to the model ([`Policy`]), to the tokenizer ([`data::Encoder`]) and to the reward ([`grader::Grader`]), and the arithmetic between them: GRPO, evolution strategies and supervised fine-tuning as a [`Run`]
//! that goes step by step, held-out evaluation, and everything a job's description needs to be checked before it starts. The server implements the seams over its engine; the tests here implement them over toys whose
//! optimum is known. Cargo forbids the server and the trainer to depend on each other, so the dependency points this way: the server depends on the trainer.
//!
//! A job, in order: [`data::read_bytes`] or [`data::read_values`] (mistakes name line and field), [`Hyperparameters::from_json`] and [`Settings::resolve`], [`grader::build`], [`data::encode`], [`grader::check_dataset`], then [`Run::new`], [`Run::step`] until
//! [`StepReport::end`], with [`Run::checkpoint`] between steps and [`Run::resume`] after a crash, and [`final_report`] on held-out items.
//!
//! **Same seed, same numbers.** Every random draw is a function of (seed, purpose, counter), and the counters are in the checkpoint; a step that fails or is stopped changes nothing. So a run that was killed and resumed has the bits of one that was
//! not, as long as the policy and the grader are functions of their arguments.

mod advantage;
mod bits;
pub mod data;
mod error;
mod es;
mod eval;
pub mod grader;
mod hyper;
mod loss;
mod metrics;
pub mod openai;
mod optimizer;
mod policy;
mod rng;
mod run;
mod sampling;
mod settings;
mod stats;
pub mod tasks;
pub mod template;
#[cfg(test)]
mod toy;

pub use advantage::{RewardScale, advantages};
pub use error::TrainError;
pub use es::{candidates, centred_ranks, descent_direction, perturbations};
pub use eval::{
    EvalCompletion, EvalSettings, Evaluation, FinalReport, demonstration_loss, evaluate, final_report, round_to_bf16,
};
pub use hyper::{FIELDS, Field, HyperparameterError, Hyperparameters, Method};
pub use loss::{ClipSettings, CrossEntropy, GrpoLoss, GrpoSequence, GrpoTerms, LossKind, k3};
pub use metrics::{Metrics, Notice, Sample, Timing};
pub use optimizer::{Adam, AdamSettings, LearningRate, Schedule, clip_norm, norm};
pub use policy::{LossGradient, Policy, PolicyError, Rollout, RolloutRequest, Sequence, Stop, TokenLoss};
pub use run::{Checkpoint, CheckpointError, End, NoGrader, Run, State, StepReport};
pub use settings::{EsSettings, GrpoSettings, MethodSettings, Settings, Stopping};
pub use stats::{Estimate, Interval, IntervalKind, wilson};
