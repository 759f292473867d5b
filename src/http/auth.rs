//! Who calls: the bearer token, and the extractor that handlers ask for.

use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, header, request::Parts},
};
use tracing::Span;

use super::{
    error::ApiError,
    middleware::RequestId,
    peer::client_address,
    state::{AppState, AuthMode},
};
use crate::{
    service::{Error, ErrorKind, Service},
    tenant::{AuthError, BUILT_IN_TENANT, Caller, KeyHash, Origin},
    types::TenantId,
};

/// The authenticated caller. A handler that takes it needs a key; put it before the body, so that 401 comes before 415.
pub struct Auth(pub Caller);

impl FromRequestParts<AppState> for Auth {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let caller = caller(parts, state).await?;
        Span::current().record("tenant", caller.tenant.0);
        parts.extensions.insert(OfTenant(caller.tenant));
        Ok(Self(caller))
    }
}

/// Whose request it is, for what reads its body after [`Auth`].
#[derive(Debug, Clone, Copy)]
pub(super) struct OfTenant(pub(super) TenantId);

impl OfTenant {
    /// The built-in tenant of a request that needs no key.
    pub(super) fn of(parts: &Parts) -> TenantId {
        parts.extensions.get().map_or(BUILT_IN_TENANT, |&Self(tenant)| tenant)
    }
}

async fn caller(parts: &Parts, state: &AppState) -> Result<Caller, ApiError> {
    let origin = origin(parts);
    if state.auth == AuthMode::Open {
        return Ok(Caller { origin, ..Caller::built_in() });
    }
    let token = bearer(&parts.headers).ok_or_else(|| {
        unauthenticated(
            "You didn't provide an API key. Send it in an Authorization header: 'Authorization: Bearer YOUR_KEY'.",
        )
    })?;
    let caller = state.service.directory.verify(token, origin.peer).await.map_err(refused)?;
    Ok(Caller { origin, ..caller })
}

/// Why there is no caller, in the words of the API.
fn refused(error: AuthError) -> Error {
    match error {
        AuthError::UnknownKey => unauthenticated(&error.to_string()),
        AuthError::TooManyFailures(wait) => Error::rate_limited(error.to_string(), wait),
        AuthError::Damaged(ref row) => {
            tracing::error!(row, "a key that was shown cannot be read");
            Error::new(ErrorKind::Unauthenticated, error.to_string()).with_code("key_damaged")
        }
        AuthError::Unavailable(words) => Error::unanswered(&words),
    }
}

/// What a request showed, for those that take long: to be asked about again while they do. The caller itself is [`Auth`]'s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shown(Option<KeyHash>);

impl FromRequestParts<AppState> for Shown {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, Self::Rejection> {
        let token = bearer(&parts.headers).filter(|_| state.auth == AuthMode::Keys);
        Ok(Self(token.map(KeyHash::of)))
    }
}

impl Shown {
    /// Passes as long as the key is good.
    ///
    /// # Errors
    /// 401 once it was revoked, has ended, or its tenant is gone.
    pub(super) async fn check(self, service: &Service) -> Result<(), Error> {
        match self.0 {
            None => Ok(()),
            Some(hash) => service.directory.still_good(hash).await.map_err(refused),
        }
    }
}

/// An authenticated caller with the role admin; 403 for others.
pub struct Admin(pub Caller);

impl FromRequestParts<AppState> for Admin {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        let Auth(caller) = Auth::from_request_parts(parts, state).await?;
        if !caller.is_admin() {
            return Err(Error::new(ErrorKind::Forbidden, "This needs a key with the role admin.").into());
        }
        Ok(Self(caller))
    }
}

fn origin(parts: &Parts) -> Origin {
    let request = parts.extensions.get::<RequestId>().map(|RequestId(id)| id.as_str().into());
    Origin { peer: client_address(&parts.extensions), request }
}

fn unauthenticated(message: &str) -> Error {
    Error::new(ErrorKind::Unauthenticated, message).with_code("invalid_api_key")
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_bearer_tokens_count() {
        let token = |value: &str| {
            let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
            bearer(&headers).map(str::to_owned)
        };
        assert_eq!(token("Bearer abc").as_deref(), Some("abc"));
        assert_eq!(token("bearer  abc ").as_deref(), Some("abc"));
        assert_eq!(token("Basic abc"), None);
        assert_eq!(token("Bearer"), None);
        assert_eq!(token("Bearer "), None);
        assert_eq!(bearer(&HeaderMap::new()), None);
    }

    #[test]
    fn a_store_that_does_not_answer_is_no_failure_of_the_server() {
        let error = refused(AuthError::Unavailable("connection refused by db.internal".into()));
        assert_eq!((error.kind, error.code), (crate::service::ErrorKind::Unavailable, Some("storage_unavailable")));
        assert!(error.retry_after.is_some() && !error.message.contains("db.internal"), "{error:?}");
    }
}
