//! Extractors whose rejections are our envelope, and whose checks run in the order the API states:
//! media type (415), size (413), JSON (400), field types (400, names `param`).

use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::de::DeserializeOwned;

use super::{drain::timed_out, error::ApiError, state::AppState};
use crate::service::{Error, ErrorKind};

/// A JSON body. Unknown fields are ignored; a field of the wrong type is a 400 that names it.
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        require_media_type(request.headers(), is_json, "application/json")?;
        let body = read_body(request, state.limits.body).await?;
        Ok(Self(parse_json(&body)?))
    }
}

/// 415 unless the content type satisfies `accepts`; `expected` is what the message asks for.
pub fn require_media_type(headers: &HeaderMap, accepts: fn(&str) -> bool, expected: &str) -> Result<(), ApiError> {
    let essence = media_type(headers);
    if essence.as_deref().is_some_and(accepts) {
        return Ok(());
    }
    let found = essence.map_or_else(|| "none".to_owned(), |found| format!("'{found}'"));
    let message = format!("The content type must be {expected}; it is {found}.");
    Err(Error::new(ErrorKind::UnsupportedMediaType, message).into())
}

/// The client's own key for a request that may be sent again. An error in it is said after those in the body's form.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let key = headers.get("idempotency-key").map(|value| value.to_str().map(str::to_owned));
    let malformed = |_| Error::invalid("Idempotency-Key", "'Idempotency-Key' is not plain text.");
    Ok(key.transpose().map_err(malformed)?)
}

/// The media type in lower case, without parameters.
pub fn media_type(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

fn is_json(essence: &str) -> bool {
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

/// The whole body, or 413 as soon as it is known to be longer than `limit` bytes.
pub async fn read_body(request: Request, limit: usize) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("The request body is larger than the limit of {limit} bytes.");
        ApiError(Error::new(ErrorKind::TooLarge, message))
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > limit as u64) {
        return Err(too_large());
    }
    let mut chunks = request.into_body().into_data_stream();
    let mut body = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| unreadable(&error))?;
        if body.len() + chunk.len() > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// Why a body ended before its end: 408 when the client was too slow.
pub(super) fn unreadable(error: &axum::Error) -> Error {
    if timed_out(error) {
        return Error::new(ErrorKind::TimedOut, "The request body took too long to come.");
    }
    Error::new(ErrorKind::Invalid, "The request body could not be read to its end.")
}

/// JSON to a type. A malformed document has no `param`; a wrong type names the path of the field.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let malformed = |error: serde_json::Error| {
        ApiError(Error::new(ErrorKind::Invalid, format!("The request body is not valid JSON: {error}.")))
    };
    // serde takes a list for a struct, field by field: a request is an object.
    if body.trim_ascii_start().first() == Some(&b'[') {
        serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(malformed)?;
        return Err(Error::new(ErrorKind::Invalid, "The request body must be a JSON object; it is a list.").into());
    }
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = match serde_path_to_error::deserialize(&mut deserializer) {
        Ok(value) => value,
        Err(error) => {
            let path = error.path().to_string();
            let error = error.into_inner();
            // A wrong type may stand before a syntax error: the document comes first.
            serde_json::from_slice::<serde::de::IgnoredAny>(body).map_err(malformed)?;
            if !error.is_data() {
                // Some wrong types (null for an enum) are called syntax errors; true ones in strings pass unread above.
                serde_json::from_slice::<serde_json::Value>(body).map_err(malformed)?;
            }
            return Err(wrong_type(&path, &error).into());
        }
    };
    deserializer.end().map_err(malformed)?;
    Ok(value)
}

fn wrong_type(path: &str, error: &serde_json::Error) -> Error {
    let words = error.to_string();
    // serde_json adds where in the document it happened; the path says it better.
    let words = words.rsplit_once(" at line ").map_or(words.as_str(), |(words, _)| words);
    match path {
        "." | "?" => Error::new(ErrorKind::Invalid, format!("The request body does not fit: {words}.")),
        path => Error::invalid(path, format!("'{path}': {words}.")),
    }
}

/// Query parameters; a wrong one is a 400 that names it.
pub struct ApiQuery<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<AppState> for ApiQuery<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let Query(value) = Query::<T>::from_request_parts(parts, state).await.map_err(|rejection| {
            // The source reads "limit: invalid digit found in string".
            let words = std::error::Error::source(&rejection).map(ToString::to_string).unwrap_or_default();
            match words.split_once(": ") {
                Some((param, words)) if !param.contains(' ') => {
                    Error::invalid(param, format!("Query parameter '{param}': {words}."))
                }
                _ => Error::new(ErrorKind::Invalid, format!("The query string does not fit: {words}.")),
            }
        })?;
        Ok(Self(value))
    }
}

/// Path parameters; one that is not UTF-8 is a 400.
pub struct ApiPath<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<AppState> for ApiPath<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let Path(value) = Path::<T>::from_request_parts(parts, state)
            .await
            .map_err(|rejection| Error::new(ErrorKind::Invalid, format!("The path does not fit: {rejection}.")))?;
        Ok(Self(value))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Body {
        temperature: Option<f32>,
        messages: Option<Vec<Message>>,
    }

    #[derive(Debug, Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Message {
        role: String,
    }

    fn param(body: &str) -> Option<String> {
        let ApiError(error) = parse_json::<Body>(body.as_bytes()).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        error.param
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        assert_eq!(param(r#"{"temperature": "warm"}"#).as_deref(), Some("temperature"));
        assert_eq!(param(r#"{"messages": [{"role": "user"}, {"role": 1}]}"#).as_deref(), Some("messages[1].role"));
    }

    #[test]
    fn what_is_no_json_names_none_even_after_a_wrong_type() {
        for body in ["", "{", "[1, 2", r#"{"temperature": "warm""#, "{} {}", "\u{1}", "nul"] {
            assert_eq!(param(body), None, "{body}");
        }
        assert_eq!(param("3"), None);
        assert_eq!(param(&"[".repeat(100_000)), None);
    }

    #[test]
    fn unknown_fields_are_ignored() {
        assert!(parse_json::<Body>(br#"{"extra": {"a": [1]}, "temperature": null}"#).is_ok());
    }

    #[test]
    fn json_media_types() {
        let headers = |value: &str| HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().unwrap())]);
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"] {
            assert!(require_media_type(&headers(good), is_json, "application/json").is_ok(), "{good}");
        }
        for bad in ["text/plain", "application/x-www-form-urlencoded", "json", ""] {
            assert!(require_media_type(&headers(bad), is_json, "application/json").is_err(), "{bad}");
        }
        assert!(require_media_type(&HeaderMap::new(), is_json, "application/json").is_err());
    }
}
