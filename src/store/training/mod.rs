//! Jobs, what they leave behind, and the files they are made of.

/// A job under way, as a condition on a column of its status. A query repeats it word for word, even beside `status = 'running'`: SQLite takes the index of jobs
/// under way only then, and else reads every job that ever ended.
macro_rules! under_way {
    ($column:literal) => {
        concat!($column, " IN ('validating', 'queued', 'running', 'paused')")
    };
}
pub(super) use under_way;

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
