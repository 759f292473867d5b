//! `/admin/*`: tenants and their keys, for callers with the role admin.

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Admin,
    error::{AdminErrors, ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiJson, ApiPath, ApiQuery},
    state::AppState,
};
use crate::{
    service::Error,
    tenant::{KeyRecord, Role, Tenant},
};

const MAX_PAGE: u32 = 1000;

/// An owner of keys and adapters.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TenantObject {
    /// `tenant`
    object: &'static str,
    /// Its name.
    name: String,
    /// Unix seconds.
    created_at: i64,
}

impl From<Tenant> for TenantObject {
    fn from(tenant: Tenant) -> Self {
        Self { object: "tenant", name: tenant.name, created_at: tenant.created_at }
    }
}

/// Tenants by name.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TenantList {
    /// `list`
    object: &'static str,
    /// The page.
    data: Vec<TenantObject>,
    /// Are there more after the last one?
    has_more: bool,
}

/// A tenant to make.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct NewTenant {
    /// 1..64 of `[A-Za-z0-9._-]`.
    #[schema(required = true, nullable = false, example = "ann")]
    name: Option<String>,
}

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

/// A key to make.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewKeyBody {
    /// What it may do.
    #[schema(default = "member")]
    role: Option<KeyRole>,
    /// Unix seconds from which it no longer works; null: never.
    #[schema(minimum = 0)]
    expires_at: Option<i64>,
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

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct TenantPage {
    /// At most so many.
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    limit: Option<u32>,
    /// Only names after this one.
    after: Option<String>,
}

/// List tenants
#[utoipa::path(
    get, path = "/admin/tenants", tag = "admin", params(TenantPage),
    responses((status = 200, description = "Tenants by name.", body = TenantList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn list_tenants(
    State(state): State<AppState>,
    _admin: Admin,
    ApiQuery(page): ApiQuery<TenantPage>,
) -> ApiResult<Json<TenantList>> {
    let limit = page.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Error::invalid("limit", format!("'limit' must be between 1 and {MAX_PAGE}.")).into());
    }
    let (tenants, has_more) = state.service.tenants(page.after.as_deref(), limit).await?;
    Ok(Json(TenantList { object: "list", data: tenants.into_iter().map(TenantObject::from).collect(), has_more }))
}

/// Create a tenant
#[utoipa::path(
    post, path = "/admin/tenants", tag = "admin", request_body = NewTenant,
    responses(
        (status = 201, description = "The new tenant.", body = TenantObject),
        (status = 409, description = "There is a tenant of that name (code `name_taken`).", body = ErrorBody),
        BodyErrors, CommonErrors, AdminErrors,
    ),
)]
pub(super) async fn create_tenant(
    State(state): State<AppState>,
    _admin: Admin,
    ApiJson(body): ApiJson<NewTenant>,
) -> ApiResult<(StatusCode, Json<TenantObject>)> {
    let name = body.name.ok_or_else(|| Error::invalid("name", "'name' is required."))?;
    let tenant = state.service.create_tenant(&name).await?;
    Ok((StatusCode::CREATED, Json(tenant.into())))
}

/// Show a tenant
#[utoipa::path(
    get, path = "/admin/tenants/{name}", tag = "admin", params(("name" = String, Path, description = "The tenant.")),
    responses((status = 200, description = "The tenant.", body = TenantObject), (status = 404, description = "There is none of that name.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn show_tenant(
    State(state): State<AppState>,
    _admin: Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<Json<TenantObject>> {
    Ok(Json(state.service.tenant(&name).await?.into()))
}

/// Delete a tenant
///
/// Its keys stop working at once; its adapters and their generations are erased.
#[utoipa::path(
    delete, path = "/admin/tenants/{name}", tag = "admin", params(("name" = String, Path, description = "The tenant.")),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = "There is none of that name.", body = ErrorBody),
        (status = 409, description = "The built-in tenant cannot be deleted.", body = ErrorBody),
        CommonErrors, AdminErrors,
    ),
)]
pub(super) async fn delete_tenant(
    State(state): State<AppState>,
    _admin: Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.delete_tenant(&name).await?;
    Ok(StatusCode::NO_CONTENT)
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
    _admin: Admin,
    ApiPath(name): ApiPath<String>,
    ApiJson(body): ApiJson<NewKeyBody>,
) -> ApiResult<(StatusCode, Json<KeyObject>)> {
    if body.expires_at.is_some_and(|at| at < 0) {
        return Err(Error::invalid("expires_at", "'expires_at' must be a time after 1970, in Unix seconds.").into());
    }
    let role = match body.role.unwrap_or_default() {
        KeyRole::Admin => Role::Admin,
        KeyRole::Member => Role::Member,
    };
    let (record, key) = state.service.create_key(&name, role, body.expires_at).await?;
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
    _admin: Admin,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.revoke_key(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
