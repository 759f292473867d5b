//! A grader that lives elsewhere. This crate opens no connection: the server does, behind [`ConnectRemote`].

use serde::Deserialize;

use super::{Grader, GraderConfigError};

/// `{"type": "remote", "url": "https://grader.example.org/grade", "timeout_ms": 10000}`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteSpec {
    /// Where completions are sent; https only. Whether the host may be called is for the connector to say.
    pub url: String,
    /// How long one call may take, in milliseconds.
    #[serde(default = "default_timeout")]
    pub timeout_ms: u64,
    /// How often a failed call is tried again.
    #[serde(default = "default_retries")]
    pub retries: u32,
}

fn default_timeout() -> u64 {
    10_000
}

fn default_retries() -> u32 {
    2
}

impl RemoteSpec {
    pub(super) fn check(&self, at: &str) -> Result<(), GraderConfigError> {
        let fail = |field: &str, message: &str| Err(GraderConfigError::new(format!("{at}.{field}"), message));
        if !self.url.starts_with("https://") {
            return fail("url", "must begin with https://");
        }
        if self.url.len() > 2048 {
            return fail("url", "is longer than 2048 bytes");
        }
        if !(1..=120_000).contains(&self.timeout_ms) {
            return fail("timeout_ms", "must be from 1 to 120000");
        }
        if self.retries > 10 {
            return fail("retries", "must be at most 10");
        }
        Ok(())
    }
}

/// Makes graders that live elsewhere.
pub trait ConnectRemote {
    /// A grader for this description, or why there can be none (a host that is not on the list, say).
    fn connect(&self, spec: &RemoteSpec) -> Result<Box<dyn Grader>, String>;
}

/// Where nothing may be called.
#[derive(Debug, Clone, Copy)]
pub struct NoRemote;

impl ConnectRemote for NoRemote {
    fn connect(&self, _spec: &RemoteSpec) -> Result<Box<dyn Grader>, String> {
        Err("remote graders are not available here".to_owned())
    }
}
