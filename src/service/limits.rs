//! Limits that were reached, in the words of the API.

use std::time::Duration;

use super::{Error, ErrorKind};
use crate::{
    store::StoreError,
    tenant::{LimitError, until_tomorrow},
};

impl From<LimitError> for Error {
    fn from(error: LimitError) -> Self {
        match error.wait() {
            Some(wait) => Error::rate_limited(error.to_string(), wait),
            None => Error::over_quota(error.to_string()),
        }
    }
}

impl Error {
    /// 429 rate_limit_exceeded: the same request may pass after a wait.
    pub fn rate_limited(message: impl Into<String>, wait: Duration) -> Self {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        Self {
            retry_after: Some(seconds.max(1)),
            ..Self::new(ErrorKind::RateLimited, message).with_code("rate_limit_exceeded")
        }
    }

    /// 429 insufficient_quota: waiting does not help.
    pub fn over_quota(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::RateLimited, message).with_code("insufficient_quota")
    }
}

/// What a tenant has stored or trained has come to its end; None for another error.
pub(super) fn exhausted(error: &StoreError) -> Option<Error> {
    match error {
        StoreError::AdaptersFull(most) => {
            Some(Error::over_quota(format!("You may have {most} adapters; delete some first.")))
        }
        StoreError::BytesFull(most) => Some(Error::over_quota(format!(
            "You may store {most} bytes; delete adapters or files first, or cancel jobs."
        ))),
        StoreError::TrainedEnough(most) => {
            let message = format!("Your jobs may train on {most} tokens a day (UTC), and have.");
            Some(Error::rate_limited(message, until_tomorrow()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_told_in_whole_seconds_and_what_never_passes_has_none() {
        let requests = |wait| Error::from(LimitError::Requests { limit: 3, wait });
        for (wait, told) in [(0, 1), (1, 1), (1_000, 1), (1_001, 2), (59_500, 60)] {
            let error = requests(Duration::from_millis(wait));
            assert_eq!((error.code, error.retry_after), (Some("rate_limit_exceeded"), Some(told)));
        }
        let error = Error::from(LimitError::TooManyTokens { limit: 5, asked: 6 });
        assert_eq!(
            (error.kind, error.code, error.retry_after),
            (ErrorKind::RateLimited, Some("insufficient_quota"), None)
        );
    }
}
