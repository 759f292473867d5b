//! What the store keeps about jobs and files.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    store::NewAdapter,
    tenant::{Limits, Room},
    types::TenantId,
};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// Its data is being checked.
    Validating,
    /// It waits for a worker.
    Queued,
    /// A worker has it.
    Running,
    /// Its owner stopped it for now.
    Paused,
    /// Its adapter is published.
    Succeeded,
    /// It ended without one; the error says why.
    Failed,
    /// Its owner ended it.
    Cancelled,
}

impl JobStatus {
    const ALL: [Self; 7] =
        [Self::Validating, Self::Queued, Self::Running, Self::Paused, Self::Succeeded, Self::Failed, Self::Cancelled];

    /// The word of the API and of the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Validating => "validating",
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Is nothing more to come?
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No status is spelt so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a job's status")]
pub struct ParseStatusError;

impl FromStr for JobStatus {
    type Err = ParseStatusError;
    fn from_str(text: &str) -> Result<Self, ParseStatusError> {
        Self::ALL.into_iter().find(|status| status.as_str() == text).ok_or(ParseStatusError)
    }
}

/// Which of a job's data sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobData {
    /// What it learns from.
    Training,
    /// What it is measured on.
    Validation,
}

impl JobData {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Validation => "validation",
        }
    }
}

/// Under which key of a client a job or a file is made once.
#[derive(Debug, Clone)]
pub struct JobKey {
    /// The route, method included.
    pub route: &'static str,
    /// The client's key.
    pub key: String,
    /// Another hash under the same key is an error.
    pub request_hash: [u8; 32],
}

/// A job to be made.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// `ftjob-` and 32 hexadecimal digits.
    pub id: String,
    /// The owner.
    pub tenant: TenantId,
    /// A checked name, which is reserved until the job ends.
    pub name: String,
    /// Must there be no adapter of that name?
    pub name_must_be_free: bool,
    /// Where it begins: validating or queued.
    pub status: JobStatus,
    /// What to do, JSON.
    pub spec: String,
    /// Steps planned.
    pub steps: u64,
    /// Its data sets.
    pub data: Vec<(JobData, Vec<u8>)>,
    /// Of the tenant: its jobs that may be under way (validating, queued, running, paused), this one included; its adapters, with this one; what it may train on
    /// in a day.
    pub limits: Limits,
    /// Jobs of all tenants that may be under way.
    pub most: u64,
    /// Makes a retried request the same job.
    pub key: Option<JobKey>,
    /// The first event.
    pub event: NewEvent,
}

/// What became of a request for a job.
#[derive(Debug, Clone, PartialEq)]
pub enum JobStored {
    /// It was made.
    New(JobRecord),
    /// It had been made before under the same key.
    Before(JobRecord),
}

/// A job.
#[derive(Debug, Clone, PartialEq)]
pub struct JobRecord {
    /// Its id.
    pub id: String,
    /// The owner.
    pub tenant: TenantId,
    /// The owner's name.
    pub owner: Arc<str>,
    /// The adapter's name.
    pub name: String,
    /// Where it stands.
    pub status: JobStatus,
    /// How often a worker took it: what a worker writes under.
    pub attempt: i64,
    /// The highest step that was reported.
    pub step: u64,
    /// Steps planned.
    pub steps: u64,
    /// The number of its last event.
    pub events: u64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds of the first start.
    pub started_at: Option<i64>,
    /// Unix seconds of the end.
    pub finished_at: Option<i64>,
    /// What to do, JSON.
    pub spec: String,
    /// Of the last step, JSON.
    pub metrics: Option<String>,
    /// Once it succeeded, JSON.
    pub result: Option<String>,
    /// Once it failed, JSON.
    pub error: Option<String>,
    /// Why its row cannot be read. Such a job counts as failed; of the rest there is what can be read.
    pub damaged: Option<String>,
}

/// How much an event matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventLevel {
    /// As planned.
    Info,
    /// The owner should look.
    Warn,
    /// The job has failed.
    Error,
}

impl EventLevel {
    /// The word of the API and of the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
        }
    }
}

/// Something that happened to a job.
#[derive(Debug, Clone, PartialEq)]
pub struct NewEvent {
    /// `status`, `step`, ...
    pub kind: &'static str,
    /// How much it matters.
    pub level: EventLevel,
    /// In words, without control characters.
    pub message: String,
    /// In JSON.
    pub data: String,
}

/// An event that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRecord {
    /// 1, 2, ... without gaps.
    pub seq: u64,
    /// `status`, `step`, ...
    pub kind: String,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// In words.
    pub message: String,
    /// In JSON.
    pub data: String,
    /// Unix seconds.
    pub created_at: i64,
}

/// Everything a run needs to go on from a step.
#[derive(Debug, Clone, PartialEq)]
pub struct NewCheckpoint {
    /// Steps done.
    pub step: u64,
    /// The run, JSON.
    pub state: String,
    /// The step's metrics, JSON.
    pub metrics: String,
    /// Older checkpoints than so many of the newest are dropped.
    pub keep: u64,
}

/// A checkpoint that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointRecord {
    /// Steps done.
    pub step: u64,
    /// The run, JSON.
    pub state: String,
    /// The step's metrics, JSON.
    pub metrics: String,
    /// Unix seconds.
    pub created_at: i64,
}

/// Graded completions to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplesRecord {
    /// After which step.
    pub step: u64,
    /// `training`, or which part of the evaluation.
    pub phase: String,
    /// A JSON list.
    pub samples: String,
    /// Unix seconds.
    pub created_at: i64,
}

/// What a worker has to report, written together or not at all.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Steps done. A step that was reported before (by a worker that died before its checkpoint) is not reported again.
    pub step: u64,
    /// Of the step, JSON.
    pub metrics: Option<String>,
    /// What happened.
    pub events: Vec<NewEvent>,
    /// Phase and a JSON list.
    pub samples: Vec<(&'static str, String)>,
    /// Where to go on from.
    pub checkpoint: Option<NewCheckpoint>,
    /// Tokens that the step trained on, which count for the tenant's day.
    pub trained_tokens: u64,
}

/// A job's end with an adapter.
#[derive(Debug, Clone)]
pub struct Publication {
    /// What is published.
    pub adapter: NewAdapter,
    /// What the job shows from then on, JSON.
    pub result: String,
    /// The last events.
    pub events: Vec<NewEvent>,
}

/// How many jobs may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartLimits {
    /// At once.
    pub running: u64,
    /// Of one tenant for which nothing else was set.
    pub running_of_tenant: u64,
    /// Tokens that the jobs of such a tenant may train on in a day, or go on the next day.
    pub trained_tokens_per_day: Option<u64>,
}

/// A file to be kept.
#[derive(Debug, Clone)]
pub struct NewFile {
    /// `file-` and 32 hexadecimal digits.
    pub id: String,
    /// The owner.
    pub tenant: TenantId,
    /// As the client calls it, without control characters.
    pub filename: String,
    /// `fine-tune`
    pub purpose: String,
    /// What is in it.
    pub data: Vec<u8>,
    /// Bytes that all files of the tenant may have.
    pub most_of_tenant: u64,
    /// What all its stored things may come to.
    pub room: Room,
    /// The client's own key for the request.
    pub key: Option<JobKey>,
}

/// A file, without what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRecord {
    /// Its id.
    pub id: String,
    /// As the client calls it.
    pub filename: String,
    /// `fine-tune`
    pub purpose: String,
    /// How large it is.
    pub bytes: u64,
    /// Unix seconds.
    pub created_at: i64,
}
