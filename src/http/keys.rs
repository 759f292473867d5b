//! Keys of tenants, for callers with the role admin.

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    auth::Admin,
    error::{AdminErrors, ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiJson, ApiPath},
    state::AppState,
};
use crate::{
    service::{DEFAULT_GRACE, Error, KeyLife, MAX_GRACE, MAX_LIFE},
    tenant::{KeyRecord, Role},
};

/// What a key may do.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum KeyRole {
    /// Its tenant's requests and adapters.
    #[default]
    Member,
    /// Tenants, keys, everything.
    Admin,
}

/// A key to make. Unknown fields are refused: a misspelt end must not pass.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewKeyBody {
    /// What it may do.
    #[schema(default = "member")]
    role: Option<KeyRole>,
    /// Unix seconds from which it no longer works; null: never.
    #[schema(minimum = 0)]
    expires_at: Option<i64>,
    /// The same as seconds from now.
    #[schema(minimum = 1, maximum = 3_162_240_000_u64)]
    expires_in: Option<u64>,
}

/// How a key is replaced. Unknown fields are refused: a misspelt end must not pass.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RotateBody {
    /// Seconds for which the old key still works.
    #[schema(minimum = 0, maximum = 31_622_400_u64, default = 86_400)]
    grace: Option<u64>,
    /// Unix seconds from which the new key no longer works; by default it lives as long as the old one was made to.
    #[schema(minimum = 0)]
    expires_at: Option<i64>,
    /// The same as seconds from now.
    #[schema(minimum = 1, maximum = 3_162_240_000_u64)]
    expires_in: Option<u64>,
}

fn life(expires_at: Option<i64>, expires_in: Option<u64>) -> Result<Option<KeyLife>, Error> {
    match (expires_at, expires_in) {
        (None, None) => Ok(None),
        (Some(_), Some(_)) => Err(Error::invalid("expires_in", "Give 'expires_at' or 'expires_in', not both.")),
        (Some(at), None) if at >= 0 => Ok(Some(KeyLife::Until(at))),
        (Some(_), None) => {
            Err(Error::invalid("expires_at", "'expires_at' must be a time after 1970, in Unix seconds."))
        }
        (None, Some(seconds)) if (1..=MAX_LIFE).contains(&seconds) => Ok(Some(KeyLife::For(seconds))),
        (None, Some(_)) => {
            Err(Error::invalid("expires_in", format!("'expires_in' must be from 1 to {MAX_LIFE} seconds.")))
        }
    }
}

/// What is known about a key, which is everything but the key.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyObject {
    /// Its public identifier.
    id: String,
    /// `api_key`
    object: &'static str,
    /// The owner's name.
    tenant: String,
    /// What it may do.
    role: KeyRole,
    /// The key's first characters.
    prefix: String,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds from which it no longer works.
    expires_at: Option<i64>,
    /// Unix seconds at which it was revoked.
    revoked_at: Option<i64>,
    /// Unix seconds of its last use, to the minute or so.
    last_used_at: Option<i64>,
    /// The key itself: only in the answer to its creation.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl KeyObject {
    fn of(record: KeyRecord, key: Option<String>) -> Self {
        let role = if record.role == Role::Admin { KeyRole::Admin } else { KeyRole::Member };
        Self {
            id: record.id,
            object: "api_key",
            tenant: record.tenant_name,
            role,
            prefix: record.prefix,
            created_at: record.created_at,
            expires_at: record.expires_at,
            revoked_at: record.revoked_at,
            last_used_at: record.last_used_at,
            key,
        }
    }
}

/// Keys of a tenant, revoked ones too.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyList {
    /// `list`
    object: &'static str,
    /// All of them.
    data: Vec<KeyObject>,
}

/// List a tenant's keys
#[utoipa::path(
    get, path = "/admin/tenants/{name}/keys", tag = "admin", params(("name" = String, Path, description = "The tenant.")),
    responses((status = 200, description = "Its keys; never the keys themselves.", body = KeyList), (status = 404, description = "There is no such tenant.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn list_keys(
    State(state): State<AppState>,
    _admin: Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<Json<KeyList>> {
    let keys = state.service.keys(&name).await?;
    Ok(Json(KeyList { object: "list", data: keys.into_iter().map(|record| KeyObject::of(record, None)).collect() }))
}

/// Create a key
///
/// The answer holds the key, this once.
#[utoipa::path(
    post, path = "/admin/tenants/{name}/keys", tag = "admin", params(("name" = String, Path, description = "The tenant.")), request_body = NewKeyBody,
    responses((status = 201, description = "The key.", body = KeyObject), (status = 404, description = "There is no such tenant.", body = ErrorBody), BodyErrors, CommonErrors, AdminErrors),
)]
pub(super) async fn create_key(
    State(state): State<AppState>,
    Admin(caller): Admin,
    ApiPath(name): ApiPath<String>,
    ApiJson(body): ApiJson<NewKeyBody>,
) -> ApiResult<(StatusCode, Json<KeyObject>)> {
    let life = life(body.expires_at, body.expires_in)?;
    let role = match body.role.unwrap_or_default() {
        KeyRole::Admin => Role::Admin,
        KeyRole::Member => Role::Member,
    };
    let (record, key) = state.service.create_key(&caller, &name, role, life).await?;
    Ok((StatusCode::CREATED, Json(KeyObject::of(record, Some(key.secret().to_owned())))))
}

/// Show a key
#[utoipa::path(
    get, path = "/admin/keys/{id}", tag = "admin", params(("id" = String, Path, description = "The key's public identifier.")),
    responses((status = 200, description = "What is known about it.", body = KeyObject), (status = 404, description = "There is no such key.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn show_key(
    State(state): State<AppState>,
    _admin: Admin,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<KeyObject>> {
    Ok(Json(KeyObject::of(state.service.key(&id).await?, None)))
}

/// Revoke a key
#[utoipa::path(
    delete, path = "/admin/keys/{id}", tag = "admin", params(("id" = String, Path, description = "The key's public identifier.")),
    responses((status = 204, description = "It no longer works."), (status = 404, description = "There is no such key.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn revoke_key(
    State(state): State<AppState>,
    Admin(caller): Admin,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.revoke_key(&caller, &id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Rotate a key
///
/// Makes a key with the same tenant and role, which the answer holds this once; the old one works for a grace period more, so that its users can change over.
#[utoipa::path(
    post, path = "/admin/keys/{id}/rotate", tag = "admin", params(("id" = String, Path, description = "The old key's public identifier.")), request_body = RotateBody,
    responses(
        (status = 201, description = "The new key.", body = KeyObject),
        (status = 404, description = "There is no such key.", body = ErrorBody),
        (status = 409, description = "It is revoked or has expired (code `key_not_live`).", body = ErrorBody),
        BodyErrors, CommonErrors, AdminErrors,
    ),
)]
pub(super) async fn rotate_key(
    State(state): State<AppState>,
    Admin(caller): Admin,
    ApiPath(id): ApiPath<String>,
    ApiJson(body): ApiJson<RotateBody>,
) -> ApiResult<(StatusCode, Json<KeyObject>)> {
    let life = life(body.expires_at, body.expires_in)?;
    let grace = body.grace.unwrap_or(DEFAULT_GRACE);
    if grace > MAX_GRACE {
        return Err(Error::invalid("grace", format!("'grace' must be at most {MAX_GRACE} seconds.")).into());
    }
    let (record, key) = state.service.rotate_key(&caller, &id, grace, life).await?;
    Ok((StatusCode::CREATED, Json(KeyObject::of(record, Some(key.secret().to_owned())))))
}
