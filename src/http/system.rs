//! Health and readiness, which need no key, and metrics, which do.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{
    auth::Auth,
    error::{ApiResult, CommonErrors},
    state::AppState,
};
use crate::service::Error;

/// A word of health.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Health {
    /// `ok`, or what keeps the server from being ready.
    #[schema(example = "ok")]
    pub(super) status: &'static str,
}

/// The process runs.
#[utoipa::path(get, path = "/healthz", tag = "operations", security(()), responses((status = 200, description = "The process runs.", body = Health)))]
pub(super) async fn healthz() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// The model is loaded, the store is open, and the server is not draining.
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(()),
    responses((status = 200, description = "Requests are served.", body = Health), (status = 503, description = "Draining or failed.", body = Health)),
)]
pub(super) async fn readyz(State(state): State<AppState>) -> Response {
    if state.lifecycle.is_draining() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(Health { status: "draining" })).into_response();
    }
    if !state.service.is_ready() {
        return (StatusCode::SERVICE_UNAVAILABLE, Json(Health { status: "the engine has stopped" })).into_response();
    }
    Json(Health { status: "ok" }).into_response()
}

/// Counters for Prometheus, in the OpenMetrics text format: an admin's key sees everything, another what its tenant did.
#[utoipa::path(get, path = "/metrics", tag = "operations", responses((status = 200, description = "OpenMetrics text.", body = String, content_type = "application/openmetrics-text"), CommonErrors))]
pub(super) async fn metrics(State(state): State<AppState>, Auth(caller): Auth) -> ApiResult<Response> {
    let text = state.service.metrics_text(&caller).map_err(Error::internal)?;
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, content_type)], text).into_response())
}
