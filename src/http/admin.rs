//! `/admin`: tenants and keys, for admins.

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Admin,
    error::{ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiJson, ApiPath, ApiQuery},
    state::AppState,
};
use crate::{
    service::Error,
    tenant::{KeyRecord, Role, Tenant},
};

const DEFAULT_LIMIT: u32 = 100;
const MAX_LIMIT: u32 = 1000;

/// An owner of keys, adapters, files and jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TenantObject {
    /// `tenant`
    object: &'static str,
    /// Its name.
    #[schema(example = "acme")]
    name: String,
    /// Unix seconds.
    created_at: i64,
}

impl From<Tenant> for TenantObject {
    fn from(tenant: Tenant) -> Self {
        Self { object: "tenant", name: tenant.name, created_at: tenant.created_at }
    }
}

/// A page of tenants.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct TenantList {
    /// `list`
    object: &'static str,
    /// In the order of names.
    data: Vec<TenantObject>,
    /// Are there more after the last one?
    has_more: bool,
}

/// A tenant to make.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct TenantBody {
    /// 1 to 64 characters of `A-Z a-z 0-9 . _ -`.
    #[schema(required = true, nullable = false, example = "acme")]
    name: Option<String>,
}

/// Everything about a key but the key.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyObject {
    /// What `/admin/keys/{id}` names.
    #[schema(example = "key_0123456789abcdef")]
    id: String,
    /// `key`
    object: &'static str,
    /// The owner.
    tenant: String,
    /// `member` or `admin`
    role: &'static str,
    /// The first characters of the key, to recognise it by.
    prefix: String,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds from which it no longer works.
    #[schema(required = true)]
    expires_at: Option<i64>,
    /// Unix seconds at which it was revoked.
    #[schema(required = true)]
    revoked_at: Option<i64>,
    /// Unix seconds of its last use, to the minute or so.
    #[schema(required = true)]
    last_used_at: Option<i64>,
}

impl From<KeyRecord> for KeyObject {
    fn from(record: KeyRecord) -> Self {
        Self {
            id: record.id,
            object: "key",
            tenant: record.tenant_name,
            role: record.role.as_str(),
            prefix: record.prefix,
            created_at: record.created_at,
            expires_at: record.expires_at,
            revoked_at: record.revoked_at,
            last_used_at: record.last_used_at,
        }
    }
}

/// A new key. The only time that it is shown.
#[derive(Serialize, ToSchema)]
pub(super) struct NewKeyObject {
    /// About it.
    #[serde(flatten)]
    about: KeyObject,
    /// The key itself.
    #[schema(example = "mote-sk-...")]
    key: String,
}

/// All keys of a tenant.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct KeyList {
    /// `list`
    object: &'static str,
    /// Oldest first.
    data: Vec<KeyObject>,
    /// Always false: the list is whole.
    has_more: bool,
}

/// A key to make.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct KeyBody {
    /// `member` or `admin`.
    #[schema(default = "member")]
    role: Option<String>,
    /// Unix seconds from which it shall no longer work.
    expires_at: Option<i64>,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// At most so many tenants.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only those after this name.
    after: Option<String>,
}

/// List tenants
#[utoipa::path(
    get, path = "/admin/tenants", tag = "admin", params(Page),
    responses(
        (status = 200, description = "A page.", body = TenantList),
        (status = 400, description = "A query parameter is out of range.", body = ErrorBody),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn list_tenants(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Json<TenantList>> {
    let limit = page.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=MAX_LIMIT).contains(&limit) {
        return Err(Error::invalid("limit", format!("'limit' must be between 1 and {MAX_LIMIT}.")).into());
    }
    let (tenants, has_more) = state.service.tenants(page.after.as_deref(), limit).await?;
    Ok(Json(TenantList { object: "list", data: tenants.into_iter().map(TenantObject::from).collect(), has_more }))
}

/// Make a tenant
#[utoipa::path(
    post, path = "/admin/tenants", tag = "admin", request_body = TenantBody,
    responses(
        (status = 201, description = "The tenant.", body = TenantObject),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 409, description = "The name is taken (code `name_taken`).", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn create_tenant(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiJson(body): ApiJson<TenantBody>,
) -> ApiResult<(StatusCode, Json<TenantObject>)> {
    let name = body.name.ok_or_else(|| Error::invalid("name", "'name' is required."))?;
    Ok((StatusCode::CREATED, Json(state.service.create_tenant(&name).await?.into())))
}

/// Show a tenant
#[utoipa::path(
    get, path = "/admin/tenants/{name}", tag = "admin", params(("name" = String, Path, description = "A tenant's name.")),
    responses(
        (status = 200, description = "The tenant.", body = TenantObject),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is none of that name (code `tenant_not_found`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn show_tenant(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<Json<TenantObject>> {
    Ok(Json(state.service.tenant(&name).await?.into()))
}

/// Delete a tenant
///
/// Erases its keys and adapters.
#[utoipa::path(
    delete, path = "/admin/tenants/{name}", tag = "admin", params(("name" = String, Path, description = "A tenant's name.")),
    responses(
        (status = 204, description = "Erased."),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is none of that name (code `tenant_not_found`).", body = ErrorBody),
        (status = 409, description = "It is the built-in tenant.", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn delete_tenant(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.delete_tenant(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// List a tenant's keys
///
/// Revoked ones too.
#[utoipa::path(
    get, path = "/admin/tenants/{name}/keys", tag = "admin", params(("name" = String, Path, description = "A tenant's name.")),
    responses(
        (status = 200, description = "All of them.", body = KeyList),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is no tenant of that name (code `tenant_not_found`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn list_keys(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<Json<KeyList>> {
    let keys = state.service.keys(&name).await?;
    Ok(Json(KeyList { object: "list", data: keys.into_iter().map(KeyObject::from).collect(), has_more: false }))
}

/// Make a key
///
/// The answer is the only place that shows it.
#[utoipa::path(
    post, path = "/admin/tenants/{name}/keys", tag = "admin", params(("name" = String, Path, description = "A tenant's name.")),
    request_body = KeyBody,
    responses(
        (status = 201, description = "The key.", body = NewKeyObject),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is no tenant of that name (code `tenant_not_found`).", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn create_key(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(name): ApiPath<String>,
    ApiJson(body): ApiJson<KeyBody>,
) -> ApiResult<(StatusCode, Json<NewKeyObject>)> {
    let role = match body.role.as_deref() {
        None => Role::Member,
        Some(text) => text.parse().map_err(|error| Error::invalid("role", format!("'role': {error}.")))?,
    };
    let (record, key) = state.service.create_key(&name, role, body.expires_at).await?;
    Ok((StatusCode::CREATED, Json(NewKeyObject { about: record.into(), key: key.secret().to_owned() })))
}

/// Show a key
#[utoipa::path(
    get, path = "/admin/keys/{id}", tag = "admin", params(("id" = String, Path, description = "A key's id.")),
    responses(
        (status = 200, description = "Everything but the key.", body = KeyObject),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is none of that id (code `key_not_found`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn show_key(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<KeyObject>> {
    Ok(Json(state.service.key(&id).await?.into()))
}

/// Revoke a key
///
/// At once; other processes on the same store honour it within a second.
#[utoipa::path(
    delete, path = "/admin/keys/{id}", tag = "admin", params(("id" = String, Path, description = "A key's id.")),
    responses(
        (status = 204, description = "Revoked, now or before."),
        (status = 403, description = "The key's role is not admin.", body = ErrorBody),
        (status = 404, description = "There is none of that id (code `key_not_found`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn revoke_key(
    State(state): State<AppState>,
    Admin(_admin): Admin,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.revoke_key(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
