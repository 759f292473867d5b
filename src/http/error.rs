//! The error envelope, and the only place that knows a status code for a failure.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::{IntoResponses, ToSchema};

use crate::service::{Error, ErrorKind};

/// What every failed request answers.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorBody {
    /// The failure.
    pub error: ErrorObject,
}

/// The four keys, always present.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ErrorObject {
    /// One sentence that says what is wrong.
    pub message: String,
    /// The class of failure.
    #[schema(example = "invalid_request_error")]
    pub r#type: &'static str,
    /// The offending field, when there is one.
    #[schema(required = true, example = "temperature")]
    pub param: Option<String>,
    /// A stable code, when there is one.
    #[schema(required = true, example = "model_not_found")]
    pub code: Option<&'static str>,
}

/// A failure on its way out.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError(pub Error);

/// The result of a handler.
pub type ApiResult<T> = Result<T, ApiError>;

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl ApiError {
    /// The envelope: what a response carries, and what a stream carries when it fails half-way.
    pub fn body(&self) -> ErrorBody {
        let (_, r#type, code) = row(self.0.kind);
        let Error { message, param, .. } = self.0.clone();
        ErrorBody { error: ErrorObject { message, r#type, param, code: self.0.code.or(code) } }
    }

    /// The status of the answer.
    pub fn status(&self) -> StatusCode {
        row(self.0.kind).0
    }

    /// Will the same request fail again whatever the client waits for? The official clients retry 409 and 429 unless told so.
    fn permanent(&self) -> bool {
        match self.0.kind {
            ErrorKind::Conflict => true,
            ErrorKind::RateLimited => self.0.code == Some("insufficient_quota"),
            _ => false,
        }
    }
}

/// Status, type and default code of a kind.
fn row(kind: ErrorKind) -> (StatusCode, &'static str, Option<&'static str>) {
    match kind {
        ErrorKind::Invalid => (StatusCode::BAD_REQUEST, "invalid_request_error", None),
        ErrorKind::Unauthenticated => (StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key")),
        ErrorKind::Forbidden => (StatusCode::FORBIDDEN, "permission_error", None),
        ErrorKind::NotFound => (StatusCode::NOT_FOUND, "invalid_request_error", None),
        ErrorKind::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", None),
        ErrorKind::TimedOut => (StatusCode::REQUEST_TIMEOUT, "invalid_request_error", Some("request_timeout")),
        ErrorKind::Conflict => (StatusCode::CONFLICT, "conflict", None),
        ErrorKind::PreconditionFailed => {
            (StatusCode::PRECONDITION_FAILED, "generation_mismatch", Some("generation_mismatch"))
        }
        ErrorKind::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", None),
        ErrorKind::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "invalid_request_error", None),
        ErrorKind::Incompatible => {
            (StatusCode::UNPROCESSABLE_ENTITY, "incompatible_adapter", Some("incompatible_adapter"))
        }
        ErrorKind::RateLimited => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", None),
        ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "api_error", None),
        ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "api_error", None),
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.0.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.permanent() {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.0.kind == ErrorKind::TimedOut {
            // The rest of the body would be read as the next request.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        if self.0.kind == ErrorKind::Unauthenticated {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// What any route behind a key may answer, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum CommonErrors {
    /// No key, or one that is unknown or revoked (code `invalid_api_key`); or one that is damaged in the store, or whose tenant is (`key_damaged`).
    #[response(status = 401)]
    Unauthenticated(ErrorBody),
    /// A limit of the caller's tenant is reached (code `rate_limit_exceeded` with `retry-after`; or `insufficient_quota`, which no wait ends), the server has too many
    /// requests or jobs waiting (code `queue_full`), or too many wrong keys came from this address (code `rate_limit_exceeded`).
    #[response(status = 429)]
    RateLimited(ErrorBody),
    /// The server failed; the message says no more than that. Codes `adapter_damaged`, `tenant_damaged`, `key_damaged`: it cannot be read from the store.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// The server is stopping (code `draining`), or cannot store anything at the moment (`storage_unavailable`); `retry-after` says when to come again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

/// What a route for admins may answer besides, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum AdminErrors {
    /// The key has not the role admin.
    #[response(status = 403)]
    Forbidden(ErrorBody),
}

/// What a route with a JSON body may answer besides, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum BodyErrors {
    /// The body is not JSON, or a field is missing, of the wrong type, out of range or not supported; `param` names it.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// The body did not come in time (code `request_timeout`).
    #[response(status = 408)]
    TimedOut(ErrorBody),
    /// The body is larger than the server takes (32 MiB unless configured), or has more than 2,000,000 JSON values.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// The media type is not `application/json`.
    #[response(status = 415)]
    UnsupportedMediaType(ErrorBody),
}

/// What a route that runs the model may answer besides, for the OpenAPI document.
#[derive(IntoResponses)]
pub enum ModelErrors {
    /// `model` or `adapter` does not resolve to anything the caller may see (code `model_not_found` or `adapter_not_found`).
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The adapter was made for another base; the message names both fingerprints.
    #[response(status = 422)]
    Incompatible(ErrorBody),
    /// The server is stopping (code `draining`), or the request would wait too long for its turn (`overloaded`); `retry-after` says when to come again.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_always_there() {
        let body = ApiError(Error::new(ErrorKind::Internal, "x")).body();
        assert_eq!(
            serde_json::to_value(body).unwrap(),
            serde_json::json!({"error": {"message": "x", "type": "api_error", "param": null, "code": null}})
        );
    }

    #[test]
    fn only_permanent_failures_say_not_to_retry() {
        let retry = |error: Error| ApiError(error).into_response().headers().get("x-should-retry").cloned();
        let limited = |code| Error::new(ErrorKind::RateLimited, "x").with_code(code);
        assert_eq!(retry(Error::new(ErrorKind::Conflict, "x").with_code("name_taken")).unwrap(), "false");
        assert_eq!(retry(limited("insufficient_quota")).unwrap(), "false");
        assert_eq!(retry(limited("queue_full")), None);
        assert_eq!(retry(Error::new(ErrorKind::Invalid, "x")), None);
    }

    #[test]
    fn a_wait_is_a_header() {
        let mut error = Error::new(ErrorKind::RateLimited, "x");
        error.retry_after = Some(7);
        assert_eq!(ApiError(error).into_response().headers()[header::RETRY_AFTER], "7");
    }
}
