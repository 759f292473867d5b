//! What happens around every request: its id, its time, its count, and panics.

use std::{any::Any, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use tracing::Instrument as _;

use super::{
    drain::{Patience, drained},
    edge,
    error::ApiError,
    peer::{ClientAddress, Socket},
    span,
    state::AppState,
};
use crate::{
    service::{Error, ErrorKind},
    telemetry::{RequestLabels, RouteLabels},
};

/// The header that names a request in logs, here and at the client.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");
const MAX_REQUEST_ID: usize = 128;
/// Answered to the end, so that whoever watches the server sees it leave.
const OPERATIONS: [&str; 3] = ["/healthz", "/readyz", "/metrics"];

/// The id of a request; handlers find it among the extensions.
#[derive(Debug, Clone)]
pub struct RequestId(pub String);

/// Outermost: id, span, time and count of every request, found or not.
pub(super) async fn observe(State(state): State<AppState>, mut request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request
        .headers()
        .get(&REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| is_sane(id))
        .map_or_else(new_request_id, str::to_owned);
    request.extensions_mut().insert(RequestId(id.clone()));
    if let Some(&Socket(peer)) = request.extensions().get() {
        let client = state.edge.trusted.client(peer.ip(), request.headers());
        request.extensions_mut().insert(ClientAddress(client));
    }
    let page = request.uri().path().starts_with("/docs");
    let patience = Patience { timeout: state.edge.body_timeout, metrics: state.service.metrics.connections.clone() };
    // The pattern and not the path: one series a route, however many adapters there are.
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched", MatchedPath::as_str).to_owned();
    let method = known_method(request.method());
    let span = span::of_request(method, &route, &id, request.headers());

    let request = request.map(|body| drained(body, patience));
    let mut response = if state.lifecycle.is_draining() && !OPERATIONS.contains(&route.as_str()) {
        draining().into_response()
    } else {
        next.run(request).instrument(span.clone()).await
    };

    let elapsed = started.elapsed();
    let status = response.status().as_u16();
    span.record("status", i64::from(status));
    tracing::debug!(parent: &span, ?elapsed, "answered");
    let route = RouteLabels { method, route };
    state.service.metrics.request_seconds.get_or_create(&route).observe(elapsed.as_secs_f64());
    state.service.metrics.requests.get_or_create(&RequestLabels { route, status }).inc();
    let headers = response.headers_mut();
    edge::secure(headers, page);
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(PROCESSING_MS, HeaderValue::from(elapsed.as_millis().try_into().unwrap_or(u64::MAX)));
    span::with_body(response, span)
}

/// The id of a request that came without a sane one.
pub(super) fn new_request_id() -> String {
    format!("req-{}", uuid::Uuid::now_v7().simple())
}

fn draining() -> ApiError {
    let error = Error::new(ErrorKind::Unavailable, "The server is shutting down.").with_code("draining");
    Error { retry_after: Some(1), ..error }.into()
}

/// The method as a label: anybody can send any word as one, and every label is a series for ever.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::PATCH => "PATCH",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

fn is_sane(id: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.bytes().all(allowed)
}

/// A panic in a handler is a 500 of this one request.
pub(super) fn panicked(payload: Box<dyn Any + Send + 'static>) -> Response {
    let words = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| payload.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without words");
    ApiError(Error::internal(format_args!("a handler panicked: {words}"))).into_response()
}

/// 404 for a path that no route has.
pub(super) async fn not_found(request: Request) -> ApiError {
    unknown_route(&request)
}

/// The pages of /docs answer a 404 without a body for what they do not have: the words are those of any other unknown path.
pub(super) async fn known_page(request: Request, next: Next) -> Response {
    let unknown = unknown_route(&request);
    let response = next.run(request).await;
    if response.status() == StatusCode::NOT_FOUND { unknown.into_response() } else { response }
}

fn unknown_route(request: &Request) -> ApiError {
    let message = format!("Unknown route: {} {}", request.method(), request.uri().path());
    Error::new(ErrorKind::NotFound, message).into()
}

/// 405 for a route that has other methods; the router adds `allow`.
pub(super) async fn method_not_allowed(request: Request) -> ApiError {
    let message = format!("The method {} is not allowed for {}.", request.method(), request.uri().path());
    Error::new(ErrorKind::MethodNotAllowed, message).into()
}

#[cfg(test)]
mod tests {
    use axum::{
        Router,
        body::{Body, to_bytes},
        extract::Path,
        routing::get,
    };
    use serde_json::{Value, json};
    use tower::ServiceExt as _;
    use tower_http::catch_panic::CatchPanicLayer;

    use super::*;

    async fn broken(Path(kind): Path<String>) -> Response {
        match kind.as_str() {
            "literal" => panic!("words for the log"),
            "formatted" => panic!("{kind} words for the log"),
            _ => std::panic::panic_any(7),
        }
    }

    #[tokio::test]
    async fn a_panic_is_a_500_of_its_own_request_and_the_next_is_answered() {
        let router: Router = Router::new()
            .route("/broken/{kind}", get(broken))
            .route("/fine", get(|| async { "fine" }))
            .layer(CatchPanicLayer::custom(panicked));
        let ask = async |path: &str| {
            let request = axum::http::Request::get(path).body(Body::empty()).unwrap();
            let response = router.clone().oneshot(request).await.unwrap();
            let status = response.status();
            (status, to_bytes(response.into_body(), usize::MAX).await.unwrap())
        };
        for path in ["/broken/literal", "/broken/formatted", "/broken/other"] {
            let (status, body) = ask(path).await;
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}");
            // What it panicked with is for the log.
            let body: Value = serde_json::from_slice(&body).unwrap();
            let words = "The server had an error while processing your request.";
            let expected = json!({"error": {"message": words, "type": "api_error", "param": null, "code": null}});
            assert_eq!(body, expected, "{path}");
            let (status, body) = ask("/fine").await;
            assert_eq!((status, &body[..]), (StatusCode::OK, &b"fine"[..]));
        }
    }

    #[test]
    fn an_id_is_taken_when_it_is_short_and_plain() {
        assert!(is_sane("abc-DEF_1.2"));
        assert!(is_sane(&"a".repeat(128)));
        for bad in ["", "a b", "a/b", "é", &"a".repeat(129)] {
            assert!(!is_sane(bad), "{bad}");
        }
    }
}
