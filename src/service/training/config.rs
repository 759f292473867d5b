//! What training may use.

use std::time::Duration;

use mote_trainer::data::Limits;

use super::remote::RemoteAccess;

/// A limit of one tenant that is none.
pub const UNLIMITED: u64 = u64::MAX;

/// Limits of training, with the defaults of the flags.
#[derive(Debug, Clone)]
pub struct TrainingConfig {
    /// Jobs that run at once; 0 turns training off.
    pub running: u64,
    /// Jobs of one tenant that run at once.
    pub running_of_tenant: u64,
    /// How long a job runs before it lets another tenant's go on, if one waits and there is no place.
    pub turn: Duration,
    /// Jobs of one tenant under way: validating, queued, running or paused.
    pub most_of_tenant: u64,
    /// Jobs of all tenants under way.
    pub most: u64,
    /// Steps of a job at most.
    pub steps: u64,
    /// Checkpoints of a job that are kept.
    pub checkpoints: u64,
    /// Bytes, lines and items of a data set.
    pub data: Limits,
    /// Bytes of all files of a tenant.
    pub files_of_tenant: u64,
    /// Data of up to so many bytes is checked while the request for the job waits; more in the background, while the job is `validating`.
    pub checked_at_once: usize,
    /// Which remote graders may be called, and how.
    pub remote: RemoteAccess,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        Self {
            running: 1,
            running_of_tenant: 1,
            turn: Duration::from_secs(60),
            most_of_tenant: 16,
            most: 1024,
            steps: 20_000,
            checkpoints: 3,
            data: Limits { bytes: 64 << 20, ..Limits::default() },
            files_of_tenant: 512 << 20,
            checked_at_once: 2 << 20,
            remote: RemoteAccess::default(),
        }
    }
}
