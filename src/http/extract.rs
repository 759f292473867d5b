//! Extractors whose rejections are our envelope, and whose checks run in the order the API states:
//! media type (415), size (413), JSON (400), field types (400, names `param`).

use axum::{
    extract::{FromRequest, FromRequestParts, Path, Query, Request},
    http::{HeaderMap, header, request::Parts},
};
use serde::de::DeserializeOwned;

use super::{drain::timed_out, error::ApiError, incoming::Received, state::AppState};
use crate::service::{Error, ErrorKind};

/// A JSON body. Unknown fields are ignored; a field of the wrong type is a 400 that names it.
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned + Send + 'static> FromRequest<AppState> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &AppState) -> Result<Self, ApiError> {
        let (_, body) = json_body(request, state).await?;
        Ok(Self(state.incoming.json(&body).await?))
    }
}

/// The body of a request that shall be JSON, unread, with the rest of the request.
pub(super) async fn json_body(request: Request, state: &AppState) -> Result<(Parts, Received), ApiError> {
    require_media_type(request.headers(), is_json, "application/json")?;
    let (parts, body) = request.into_parts();
    let body = state.incoming.receive(&parts, body, state.limits.body).await?;
    Ok((parts, body))
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

/// Why a body ended before its end: 408 when the client was too slow.
pub(super) fn unreadable(error: &axum::Error) -> Error {
    if timed_out(error) {
        return Error::new(ErrorKind::TimedOut, "The request body took too long to come.");
    }
    Error::new(ErrorKind::Invalid, "The request body could not be read to its end.")
}

/// Values of a document at most: read without knowing what they are, each takes some seventy bytes whatever it took in the text.
const MOST_VALUES: usize = 2_000_000;

/// How many values a document has, about: a key and its value are two.
fn values(document: &[u8]) -> usize {
    let (mut count, mut within, mut escaped) = (1, false, false);
    for &byte in document {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            b',' | b':' | b'[' | b'{' if !within => count += 1,
            _ => {}
        }
    }
    count
}

/// JSON to a type. A malformed document has no `param`; a wrong type names the path of the field.
pub fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let malformed = |error: serde_json::Error| {
        ApiError(Error::new(ErrorKind::Invalid, format!("The request body is not valid JSON: {error}.")))
    };
    // A value takes two bytes or more.
    if body.len() / 2 > MOST_VALUES && values(body) > MOST_VALUES {
        let message = format!("The request body has more than {MOST_VALUES} values.");
        return Err(Error::new(ErrorKind::TooLarge, message).into());
    }
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
    fn values_are_counted_outside_of_strings() {
        for (document, count) in
            [("3", 1), ("[1,2,[3]]", 5), (r#"{"a":1,"b":[]}"#, 6), (r#"["a,b:[{","\\\",,","\\"]"#, 4)]
        {
            assert_eq!(values(document.as_bytes()), count, "{document}");
        }
    }

    #[test]
    fn a_document_of_very_many_values_is_too_large_whatever_they_are() {
        let document = |item: &str, count: usize| format!("{{\"extra\": [{}0]}}", item.repeat(count));
        assert!(parse_json::<Body>(document("0,", MOST_VALUES - 10).as_bytes()).is_ok());
        for item in ["0,", "\"\",", "[],", "{\"\":0},"] {
            let ApiError(error) = parse_json::<Body>(document(item, MOST_VALUES).as_bytes()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::TooLarge, "{item}");
        }
        let text = format!("{{\"extra\": \"{}\"}}", ",".repeat(3 * MOST_VALUES));
        assert!(parse_json::<Body>(text.as_bytes()).is_ok());
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
