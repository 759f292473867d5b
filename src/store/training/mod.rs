//! Jobs, what they leave behind, and the files they are made of.

mod decode;
mod files;
mod owner;
mod read;
mod records;
mod worker;

pub(super) use decode::count;
#[cfg(test)]
pub(super) use owner::MOST_PAUSES;

pub use records::{
    CheckpointRecord, EventLevel, EventRecord, FileRecord, JobData, JobKey, JobRecord, JobStatus, JobStored,
    NewCheckpoint, NewEvent, NewFile, NewJob, Progress, Publication, SamplesRecord, StartLimits,
};
pub use worker::Turns;
#[cfg(test)]
pub(super) use worker::{QUEUED, RUNNING};
