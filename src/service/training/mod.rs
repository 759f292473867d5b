//! Training while serving: jobs from their request to the published adapter. The arithmetic is `mote-trainer`'s; here are the checks, the queue, the workers, and the seams to the
//! engine and to remote graders.
//!
//! **Invariants.** The store knows where a job stands before anybody is told. A worker writes only under its own attempt, so a job that was cancelled, paused or taken over gets nothing more from it. An
//! adapter is published in the transaction that ends its job, or not at all.

mod address;
mod config;
mod encoder;
mod files;
mod graders;
mod jobs;
mod local;
mod openai;
mod policy;
mod prepare;
mod remote;
mod report;
mod rollouts;
mod spec;
mod supervisor;
mod validation;
mod worker;

pub use config::{TrainingConfig, UNLIMITED};
pub use files::MAX_FILENAME;
pub use graders::Graded;
pub(super) use graders::GraderPlaces;
pub use jobs::{CheckpointInfo, JobInfo, JobRetry};
pub use local::{Local, LocalTask};
pub use openai::FineTuningRequest;
pub use policy::{EnginePolicies, PolicyRequest, PolicySource};
pub use prepare::Prepared;
pub use remote::RemoteAccess;
pub use report::measured;
pub use spec::{DataSource, JobSpec, Origin, TrainRequest};
pub use supervisor::Training;
pub use validation::{Validation, validate};

pub use mote_trainer::{FIELDS as HYPERPARAMETERS, Field as Hyperparameter, Method, data::Limits as DataLimits};
