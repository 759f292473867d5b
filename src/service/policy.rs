//! What one completion may ask for, whoever sends it.

use std::time::Duration;

use super::{Error, completion::MAX_SEQUENCES, decoding::MAX_CHOICES, reader::Prompt};
use crate::types::TenantId;

/// Limits of a request, and whether prompts may be logged.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestPolicy {
    /// `n` and `best_of` at most.
    pub choices: usize,
    /// Sequences of a request at most: prompts times choices.
    pub sequences: usize,
    /// A request that would wait longer is refused at once; None: never.
    pub shed_after: Option<Duration>,
    /// Write every prompt to the log.
    pub log_prompts: bool,
}

impl Default for RequestPolicy {
    fn default() -> Self {
        Self { choices: MAX_CHOICES as usize, sequences: MAX_SEQUENCES, shed_after: None, log_prompts: false }
    }
}

impl RequestPolicy {
    /// `n`, or `best_of` where it is more.
    pub(super) fn check_choices(&self, n: usize, best_of: usize) -> Result<(), Error> {
        let most = self.choices;
        if best_of <= most {
            return Ok(());
        }
        let param = if n > most { "n" } else { "best_of" };
        Err(Error::invalid(param, format!("'{param}' must be at most {most} on this server.")))
    }

    /// The one place where prompts reach the log.
    pub(super) fn log(&self, tenant: TenantId, prompts: &[Prompt]) {
        if !self.log_prompts {
            return;
        }
        for prompt in prompts {
            match &prompt.text {
                Some(text) => tracing::info!(target: "mote::prompts", tenant = tenant.0, %text, "prompt"),
                None => tracing::info!(target: "mote::prompts", tenant = tenant.0, tokens = ?prompt.tokens, "prompt"),
            }
        }
    }
}
