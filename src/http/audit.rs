//! `GET /admin/audit`: who did what, when, from where.

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Admin,
    error::{AdminErrors, ApiResult, CommonErrors, ErrorBody},
    extract::ApiQuery,
    state::AppState,
    training::page_size,
};
use crate::tenant::AuditRecord;

const DEFAULT_PAGE: u32 = 100;

/// Something that somebody did. It holds names and ids, never a key, a prompt or what is in a file.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AuditEntry {
    /// Later entries have greater ones.
    id: i64,
    /// `audit.entry`
    object: &'static str,
    /// Unix seconds.
    at: i64,
    /// `http`, `command_line` (`mote keys`, `mote tenants`), `start` (the first admin key) or `training` (what a job did).
    via: String,
    /// Whose key or job; null for an operator on the machine.
    #[schema(required = true)]
    tenant: Option<String>,
    /// The key's public identifier; null without keys.
    #[schema(required = true)]
    key: Option<String>,
    /// `tenant.create`, `tenant.limits`, `tenant.delete`, `key.create`, `key.rotate`, `key.revoke`, `adapter.upload`, `adapter.replace`, `adapter.rollback`,
    /// `adapter.publish` (by a job), `adapter.delete`, `file.upload`, `file.delete`, `job.create`, `job.pause`, `job.resume` or `job.cancel`. A batch is an entry for
    /// the new adapters and one for those that it replaced.
    #[schema(example = "adapter.upload")]
    action: String,
    /// The name or id of what it was done to; of a batch the first name.
    #[schema(example = "alice")]
    target: String,
    /// More about it.
    #[schema(required = true, value_type = Option<Object>)]
    detail: Option<Value>,
    /// The address that the request came from.
    #[schema(required = true)]
    peer: Option<String>,
    /// The request's `x-request-id`.
    #[schema(required = true)]
    request_id: Option<String>,
}

impl From<AuditRecord> for AuditEntry {
    fn from(record: AuditRecord) -> Self {
        let AuditRecord { id, at, via, tenant, key, action, target, detail, peer, request } = record;
        let detail = detail.and_then(|text| serde_json::from_str(&text).ok());
        Self { id, object: "audit.entry", at, via, tenant, key, action, target, detail, peer, request_id: request }
    }
}

/// A page of the audit log.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AuditList {
    /// `list`
    object: &'static str,
    /// The newest first.
    data: Vec<AuditEntry>,
    /// Are there older ones?
    has_more: bool,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct AuditPage {
    /// At most so many.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only entries older than the one with this id.
    after: Option<i64>,
}

/// Read the audit log
#[utoipa::path(
    get, path = "/admin/audit", tag = "admin", params(AuditPage),
    responses((status = 200, description = "Entries, the newest first.", body = AuditList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors, AdminErrors),
)]
pub(super) async fn list_audit(
    State(state): State<AppState>,
    _admin: Admin,
    ApiQuery(page): ApiQuery<AuditPage>,
) -> ApiResult<Json<AuditList>> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let (entries, has_more) = state.service.audit(page.after, limit).await?;
    Ok(Json(AuditList { object: "list", data: entries.into_iter().map(AuditEntry::from).collect(), has_more }))
}
