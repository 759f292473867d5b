//! What can go wrong with a use case, in the words of the API; `http` alone knows the status codes.

use crate::store::{StoreError, Unwritable};

/// Seconds after which a write that found the disk full may be tried again.
const UNWRITABLE_RETRY: u64 = 30;

/// The kind decides status, `type` and default `code` of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// 400 invalid_request_error
    Invalid,
    /// 401 authentication_error, code invalid_api_key
    Unauthenticated,
    /// 403 permission_error
    Forbidden,
    /// 404 invalid_request_error
    NotFound,
    /// 405 invalid_request_error
    MethodNotAllowed,
    /// 408 invalid_request_error: the body did not come in time
    TimedOut,
    /// 409 conflict
    Conflict,
    /// 412 generation_mismatch
    PreconditionFailed,
    /// 413 invalid_request_error
    TooLarge,
    /// 415 invalid_request_error
    UnsupportedMediaType,
    /// 422 incompatible_adapter
    Incompatible,
    /// 429 rate_limit_error
    RateLimited,
    /// 500 api_error
    Internal,
    /// 503 api_error: overloaded or draining
    Unavailable,
}

/// When an overloaded server may be asked again.
const OVERLOADED_SECONDS: u64 = 5;

/// An error with the words a client sees.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What kind of failure.
    pub kind: ErrorKind,
    /// One sentence that says what is wrong and names the field.
    pub message: String,
    /// The offending field, when there is one.
    pub param: Option<String>,
    /// A stable code: model_not_found, name_taken, queue_full, ...
    pub code: Option<&'static str>,
    /// Seconds for `retry-after`.
    pub retry_after: Option<u64>,
}

impl Error {
    /// An error of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400 that names a field.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(ErrorKind::Invalid, message) }
    }

    /// 404 model_not_found with param `model`.
    pub fn model_not_found(model: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::new(
                ErrorKind::NotFound,
                format!("The model '{}' does not exist or you do not have access to it.", clipped(model)),
            )
        }
    }

    /// 404 adapter_not_found.
    pub fn adapter_not_found(name: &str, param: Option<&str>) -> Self {
        Self {
            param: param.map(str::to_owned),
            code: Some("adapter_not_found"),
            ..Self::new(
                ErrorKind::NotFound,
                format!("The adapter '{}' does not exist or you do not have access to it.", clipped(name)),
            )
        }
    }

    /// 500 adapter_damaged: the row of an adapter of the caller's cannot be read.
    pub fn adapter_damaged(name: &str) -> Self {
        let message = format!("Your adapter '{name}' is damaged in the server's store; upload it anew or delete it.");
        Self::new(ErrorKind::Internal, message).with_code("adapter_damaged")
    }

    /// 500; the cause goes to the log, not to the client.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "internal error");
        Self::new(ErrorKind::Internal, "The server had an error while processing your request.")
    }

    /// 503 overloaded: it may go better later.
    pub fn overloaded(message: impl Into<String>) -> Self {
        Self {
            code: Some("overloaded"),
            retry_after: Some(OVERLOADED_SECONDS),
            ..Self::new(ErrorKind::Unavailable, message)
        }
    }

    /// The database's failure. Where nothing can be written at the moment, the client is told: reading goes on, and another try may do.
    pub fn store(error: StoreError) -> Self {
        let why = match error.unwritable() {
            Some(Unwritable::Full) => "its disk is full",
            Some(Unwritable::ReadOnly) => "its data directory is read-only",
            Some(Unwritable::Broken) => "its disk fails",
            Some(Unwritable::Unreachable) => "its database does not answer",
            Some(Unwritable::Locked) => "another program has locked its database",
            None => return Self::internal(error),
        };
        tracing::error!(%error, "nothing can be written to the store");
        Self::storage_unavailable(format!("The server cannot store anything at the moment: {why}."))
    }

    /// The database did not say whose key was shown: nothing is wrong with the key, and another try may do. `words` are for the log.
    pub fn unanswered(words: &str) -> Self {
        tracing::error!(words, "a key cannot be looked up");
        Self::storage_unavailable("The server cannot look up keys at the moment: its database does not answer.".into())
    }

    fn storage_unavailable(message: String) -> Self {
        let error = Self::new(ErrorKind::Unavailable, message).with_code("storage_unavailable");
        Self { retry_after: Some(UNWRITABLE_RETRY), ..error }
    }

    /// The same error with a code.
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// The same error with a field.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
}

/// The beginning of what a client sent, for a message: long enough to recognise, too short to fill a log.
fn clipped(text: &str) -> String {
    const MOST: usize = 128;
    let beginning: String = text.chars().filter(|c| !c.is_control()).take(MOST).collect();
    if beginning.len() < text.len() { format!("{beginning}...") } else { beginning }
}
