//! `/admin/tenants`: tenants and their limits, for callers with the role admin.

use axum::{Json, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Admin,
    error::{AdminErrors, ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiJson, ApiPath, ApiQuery},
    limits::{LimitsObject, LimitsPatch, OverridesObject},
    state::AppState,
};
use crate::{
    service::{Error, Service},
    tenant::Tenant,
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
    /// What holds for it now.
    limits: LimitsObject,
    /// What was set for it; where nothing was, the server's defaults hold.
    overrides: OverridesObject,
}

impl TenantObject {
    fn of(service: &Service, tenant: Tenant) -> Self {
        Self {
            object: "tenant",
            limits: service.limits_of(&tenant).into(),
            overrides: tenant.limits.into(),
            name: tenant.name,
            created_at: tenant.created_at,
        }
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

/// What to change of a tenant. Unknown fields are refused: a misspelt limit must not pass.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TenantPatch {
    /// Its limits.
    limits: Option<LimitsPatch>,
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
    let data = tenants.into_iter().map(|tenant| TenantObject::of(&state.service, tenant)).collect();
    Ok(Json(TenantList { object: "list", data, has_more }))
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
    Admin(caller): Admin,
    ApiJson(body): ApiJson<NewTenant>,
) -> ApiResult<(StatusCode, Json<TenantObject>)> {
    let name = body.name.ok_or_else(|| Error::invalid("name", "'name' is required."))?;
    let tenant = state.service.create_tenant(&caller, &name).await?;
    Ok((StatusCode::CREATED, Json(TenantObject::of(&state.service, tenant))))
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
    let tenant = state.service.tenant(&name).await?;
    Ok(Json(TenantObject::of(&state.service, tenant)))
}

/// Change a tenant's limits
///
/// From now on, for requests that come. What is left out stays.
#[utoipa::path(
    patch, path = "/admin/tenants/{name}", tag = "admin", params(("name" = String, Path, description = "The tenant.")), request_body = TenantPatch,
    responses(
        (status = 200, description = "The tenant as it is now.", body = TenantObject),
        (status = 404, description = "There is none of that name.", body = ErrorBody),
        BodyErrors, CommonErrors, AdminErrors,
    ),
)]
pub(super) async fn change_tenant(
    State(state): State<AppState>,
    Admin(caller): Admin,
    ApiPath(name): ApiPath<String>,
    ApiJson(body): ApiJson<TenantPatch>,
) -> ApiResult<Json<TenantObject>> {
    let tenant = match body.limits {
        None => state.service.tenant(&name).await?,
        Some(limits) => state.service.set_limits(&caller, &name, limits.into_changes()?).await?,
    };
    Ok(Json(TenantObject::of(&state.service, tenant)))
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
    Admin(caller): Admin,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.delete_tenant(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}
