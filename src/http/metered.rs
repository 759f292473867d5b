//! Routes that count against a tenant's limits: the extractor that lets a request in, and the headers that say what is left.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use axum::{
    extract::{FromRequestParts, Request},
    http::{HeaderMap, HeaderName, HeaderValue, request::Parts},
    middleware::Next,
    response::Response,
};

use utoipa::openapi::Type;

use super::{auth::Auth, error::ApiError, state::AppState};
use crate::{
    service::Error,
    tenant::{Account, Admission, Caller, Rate},
};

/// An authenticated caller that has a place among its tenant's requests: before the body is read, and until the place is dropped.
pub struct Metered(pub Caller, pub Admission);

impl FromRequestParts<AppState> for Metered {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let Auth(caller) = Auth::from_request_parts(parts, state).await?;
        let account = state.service.accounts.of(caller.tenant);
        account.set_name(&caller.tenant_name);
        if let Some(Slot(slot)) = parts.extensions.get() {
            // Empty until now: a request has one handler.
            let _ = slot.set(Arc::clone(&account));
        }
        let admission = account.enter().map_err(Error::from)?;
        Ok(Self(caller, admission))
    }
}

/// Where the extractor leaves the account for whoever writes the headers.
#[derive(Debug, Clone, Default)]
struct Slot(Arc<OnceLock<Arc<Account>>>);

/// Writes `x-ratelimit-*` on answers of metered routes, refusals too, for the limits that are in force.
pub(super) async fn rate_headers(mut request: Request, next: Next) -> Response {
    let Slot(account) = Slot::default();
    request.extensions_mut().insert(Slot(Arc::clone(&account)));
    let mut response = next.run(request).await;
    if let Some(account) = account.get() {
        let rates = account.rates();
        write(response.headers_mut(), &REQUESTS, rates.requests);
        write(response.headers_mut(), &TOKENS, rates.tokens);
    }
    response
}

/// What marks an operation of the OpenAPI document whose handler takes [`Metered`].
pub(super) const METERED: &str = "x-metered";

/// The headers for the OpenAPI document: name, type, meaning.
pub(super) const RATE_HEADERS: [(&str, Type, &str); 6] = [
    (
        "x-ratelimit-limit-requests",
        Type::Integer,
        "Requests a minute. These three are there when that limit is in force.",
    ),
    ("x-ratelimit-remaining-requests", Type::Integer, "Those that are left."),
    ("x-ratelimit-reset-requests", Type::String, "Until all are back, as `6m0s`."),
    ("x-ratelimit-limit-tokens", Type::Integer, "Tokens a minute. These three are there when that limit is in force."),
    (
        "x-ratelimit-remaining-tokens",
        Type::Integer,
        "Those that are left; of a stream, with all that it may still use reserved.",
    ),
    ("x-ratelimit-reset-tokens", Type::String, "Until all are back, as `6m0s`."),
];

/// Limit, remaining, reset.
type Names = [HeaderName; 3];

const REQUESTS: Names = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: Names = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

fn write(headers: &mut HeaderMap, [limit, remaining, reset]: &Names, rate: Option<Rate>) {
    let Some(rate) = rate else { return };
    headers.insert(limit, rate.limit.into());
    headers.insert(remaining, rate.remaining.into());
    if let Ok(value) = HeaderValue::from_str(&shown(rate.reset)) {
        headers.insert(reset, value);
    }
}

/// As OpenAI writes durations: `0s`, `1s`, `6m0s`, `1h0m5s`. Rounded up: who waits so long finds everything there.
fn shown(duration: Duration) -> String {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{seconds}s"),
        (0, _) => format!("{minutes}m{seconds}s"),
        _ => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_look_as_the_official_clients_know_them() {
        for (millis, text) in
            [(0, "0s"), (1, "1s"), (1_000, "1s"), (59_001, "1m0s"), (360_000, "6m0s"), (3_605_000, "1h0m5s")]
        {
            assert_eq!(shown(Duration::from_millis(millis)), text);
        }
    }
}
