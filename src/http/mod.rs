//! HTTP: routes with their OpenAPI descriptions, who calls, and the error envelope. Handlers are thin; the work is in `service`.
//!
//! Nothing outside this folder knows a status code.

mod adapter_objects;
mod adapters;
mod admin;
mod answer;
mod audit;
pub mod auth;
mod batch;
mod body;
mod chat;
mod completions;
mod document;
mod drain;
mod edge;
pub mod error;
pub mod extract;
mod files;
mod fine_tuning;
mod fine_tuning_objects;
mod graders;
mod incoming;
mod job_events;
mod job_objects;
mod keys;
mod large;
mod limits;
mod messages;
pub mod metered;
mod middleware;
mod models;
mod peer;
mod schemas;
pub mod server;
mod span;
mod sse;
mod state;
mod system;
mod training;
mod unread;
mod upload;
mod usage;

use axum::{
    Router,
    extract::DefaultBodyLimit,
    middleware::{from_fn, from_fn_with_state},
};
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::{router::OpenApiRouter, routes};
use utoipa_swagger_ui::SwaggerUi;

pub use edge::Edge;
pub use middleware::{REQUEST_ID, RequestId};
pub use peer::{ClientAddress, TrustedProxies, client_address};
pub use state::{AppState, AuthMode, Lifecycle, Limits};

/// Every route, each registered with its description.
fn routes() -> OpenApiRouter<AppState> {
    OpenApiRouter::with_openapi(document::head())
        .routes(routes!(completions::completions))
        .routes(routes!(chat::chat_completions))
        .routes(routes!(models::list_models))
        .routes(routes!(models::show_model))
        .routes(routes!(adapters::list_adapters, adapters::upload_adapter))
        .routes(routes!(batch::upload_batch))
        .routes(routes!(adapters::list_schemes))
        .routes(routes!(adapters::show_adapter, adapters::replace_adapter, adapters::delete_adapter))
        .routes(routes!(adapters::read_weights))
        .routes(routes!(adapters::list_generations))
        .routes(routes!(adapters::rollback_adapter))
        .routes(routes!(training::list_jobs, training::train))
        .routes(routes!(training::show_job))
        .routes(routes!(training::cancel_job))
        .routes(routes!(training::pause_job))
        .routes(routes!(training::resume_job))
        .routes(routes!(training::list_events))
        .routes(routes!(training::list_checkpoints))
        .routes(routes!(training::list_samples))
        .routes(routes!(files::list_files, files::upload_file))
        .routes(routes!(files::show_file, files::delete_file))
        .routes(routes!(files::read_file))
        .routes(routes!(fine_tuning::list_jobs, fine_tuning::create_job))
        .routes(routes!(fine_tuning::show_job))
        .routes(routes!(fine_tuning::cancel_job))
        .routes(routes!(fine_tuning::pause_job))
        .routes(routes!(fine_tuning::resume_job))
        .routes(routes!(fine_tuning::list_events))
        .routes(routes!(fine_tuning::list_checkpoints))
        .routes(routes!(graders::run_grader))
        .routes(routes!(graders::validate_grader))
        .routes(routes!(admin::list_tenants, admin::create_tenant))
        .routes(routes!(admin::show_tenant, admin::change_tenant, admin::delete_tenant))
        .routes(routes!(keys::list_keys, keys::create_key))
        .routes(routes!(keys::show_key, keys::revoke_key))
        .routes(routes!(keys::rotate_key))
        .routes(routes!(usage::tenant_usage))
        .routes(routes!(audit::list_audit))
        .routes(routes!(usage::own_usage))
        .routes(routes!(system::healthz))
        .routes(routes!(system::readyz))
        .routes(routes!(system::metrics))
}

/// The OpenAPI document, without a model or a server.
pub fn openapi() -> utoipa::openapi::OpenApi {
    document::with_headers(routes().into_openapi())
}

/// The server: routes, documents at `/openapi.json` and `/docs`, and what happens around every request, outermost last.
pub fn router(state: AppState) -> Router {
    let (router, document) = routes().split_for_parts();
    let document = document::with_headers(document);
    let pages = Router::<()>::from(SwaggerUi::new("/docs").url("/openapi.json", document));
    let pages = pages.route_layer(from_fn(middleware::known_page));
    let cors = state.edge.cors();
    let router = router
        .with_state(state.clone())
        .merge(pages)
        .fallback(middleware::not_found)
        .method_not_allowed_fallback(middleware::method_not_allowed)
        .layer(from_fn(metered::rate_headers))
        .layer(DefaultBodyLimit::disable()) // every extractor of ours has its own limit
        .layer(CatchPanicLayer::custom(middleware::panicked));
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router.layer(from_fn_with_state(state, middleware::observe))
}
