//! How the server shows itself to the network: who is believed about addresses, which web pages may call, how long a body may take, and the headers
//! that keep a browser from making more of an answer than it is.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::peer::TrustedProxies;

/// Headers of ours that a page may read.
const EXPOSED: [&str; 12] = [
    "x-request-id",
    "x-adapter-generation",
    "openai-processing-ms",
    "retry-after",
    "x-should-retry",
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
    "etag",
];
/// Browsers ask again after so long.
const CORS_AGE: Duration = Duration::from_secs(600);

/// The pages of /docs run their own scripts and talk to this server; nobody frames them. (Swagger UI sets styles of elements.)
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// Anything else is data.
pub(super) const DATA_POLICY: &str = "default-src 'none'; frame-ancestors 'none'";

/// The server's edge.
#[derive(Debug, Clone)]
pub struct Edge {
    /// How long a client may take to send a body, besides a second for each 16 KiB.
    pub body_timeout: Duration,
    /// Whose `x-forwarded-for` is believed.
    pub trusted: TrustedProxies,
    /// Origins whose pages may call; empty: none. `*` is any.
    pub cors_origins: Vec<HeaderValue>,
}

impl Default for Edge {
    fn default() -> Self {
        Self { body_timeout: Duration::from_secs(30), trusted: TrustedProxies::default(), cors_origins: Vec::new() }
    }
}

impl Edge {
    /// What answers a browser's questions; None when no page may call. Keys travel in a header that pages set, so cookies and the like are never
    /// allowed.
    pub(super) fn cors(&self) -> Option<CorsLayer> {
        let origins = match self.cors_origins.as_slice() {
            [] => return None,
            origins if origins.iter().any(|origin| origin == "*") => AllowOrigin::any(),
            origins => AllowOrigin::list(origins.iter().cloned()),
        };
        let layer = CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE])
            .allow_headers(AllowHeaders::mirror_request())
            .expose_headers(EXPOSED.map(HeaderName::from_static))
            .max_age(CORS_AGE);
        Some(layer)
    }
}

/// Adds what every answer has; `page` for those of /docs.
pub(super) fn secure(headers: &mut HeaderMap, page: bool) {
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let policy = HeaderValue::from_static(if page { PAGE_POLICY } else { DATA_POLICY });
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    if page {
        headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
        headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    }
}
