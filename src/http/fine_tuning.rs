//! `/v1/fine_tuning/jobs`: the jobs of `/adapters/train` as OpenAI's clients know them.

use axum::{
    Json,
    extract::{Request, State},
    response::Response,
};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Auth,
    body::refuse_unsupported,
    error::{ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery},
    fine_tuning_objects::{
        FineTuningCheckpoint, FineTuningCheckpointList, FineTuningEvent, FineTuningEventList, FineTuningJob,
        FineTuningJobList,
    },
    large::Large,
    metered::Metered,
    schemas,
    state::AppState,
    training::{body_and_retry, page_size},
};
use crate::service::training::{FineTuningRequest, JobInfo};

const DEFAULT_PAGE: u32 = 20;

/// A job to be made.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct FineTuningBody {
    /// The base's id, or an adapter to go on from.
    #[schema(required = true, nullable = false)]
    model: Option<String>,
    /// A file of `/v1/files`.
    #[schema(required = true, nullable = false)]
    training_file: Option<String>,
    /// Held-out items, to measure the base and the adapter on at the end.
    validation_file: Option<String>,
    /// `{"type": "reinforcement", "reinforcement": {"grader": {..}, "hyperparameters": {..}}}` or `{"type": "supervised", "supervised": {"hyperparameters": {..}}}`. Beside OpenAI's hyperparameters (`n_epochs`,
    /// `batch_size`, `learning_rate_multiplier`, `compute_multiplier`) those of `/adapters/train` may be given.
    #[schema(value_type = Option<schemas::FineTuningMethod>, default = json!({"type": "supervised"}))]
    method: Option<Value>,
    /// Of supervised jobs, as older clients send them.
    #[schema(value_type = Option<Object>)]
    hyperparameters: Option<Value>,
    /// Begins the adapter's name; the rest of it is the job's.
    #[schema(max_length = 55)]
    suffix: Option<String>,
    /// Of every random choice.
    #[schema(default = 0)]
    seed: Option<u64>,
    /// Shown with the job and the adapter.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// Not supported.
    #[schema(value_type = Option<Vec<Object>>)]
    integrations: Option<Value>,
    /// Beyond OpenAI's fields: the adapter's whole name.
    name: Option<String>,
    /// Beyond OpenAI's fields: a scheme's name or description.
    #[schema(value_type = Option<schemas::Scheme>, default = "tiny13")]
    scheme: Option<Value>,
    /// Beyond OpenAI's fields: a prompt template for items without `messages`.
    #[schema(value_type = Option<schemas::PromptTemplate>)]
    prompt: Option<Value>,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// At most so many.
    #[param(minimum = 1, maximum = 1000, default = 20)]
    limit: Option<u32>,
    /// Only what is older than this.
    after: Option<String>,
}

fn job(state: &AppState, info: JobInfo) -> Json<FineTuningJob> {
    Json(FineTuningJob::of(info, &state.service.base.model_id))
}

/// Create a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs", tag = "openai", extensions(("x-metered" = json!(true))), request_body = FineTuningBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "A request sent again under the same key is the same job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "`model` or a file is not the caller's.", body = ErrorBody),
        (status = 409, description = "The name is taken (code `name_taken`).", body = ErrorBody),
        (status = 422, description = "`model` is an adapter for another base (code `incompatible_adapter`).", body = ErrorBody),
        (status = 503, description = "The server is stopping.", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn create_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    request: Request,
) -> ApiResult<Json<FineTuningJob>> {
    let (body, retry) = body_and_retry::<FineTuningBody>(request, &state, "POST /v1/fine_tuning/jobs").await?;
    refuse_unsupported(&[("integrations", &body.integrations)])?;
    let request = FineTuningRequest {
        model: body.model,
        training_file: body.training_file,
        validation_file: body.validation_file,
        method: body.method,
        hyperparameters: body.hyperparameters,
        suffix: body.suffix,
        seed: body.seed,
        metadata: body.metadata,
        name: body.name,
        scheme: body.scheme,
        prompt: body.prompt,
    };
    let info = state.service.fine_tune(&caller, request, retry).await?;
    Ok(job(&state, info))
}

/// List fine-tuning jobs
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs", tag = "openai", params(Page),
    responses((status = 200, description = "The caller's jobs.", body = FineTuningJobList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_jobs(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let (jobs, has_more) = state.service.jobs(&caller, page.after.as_deref(), limit).await?;
    let base = &state.service.base.model_id;
    let data = jobs.into_iter().map(|info| FineTuningJob::of(info, base)).collect();
    Ok(place.send(Json(FineTuningJobList { object: "list", data, has_more })))
}

/// Show a fine-tuning job
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}", tag = "openai", params(("id" = String, Path, description = "The job.")),
    responses((status = 200, description = "The job.", body = FineTuningJob), (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn show_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// Cancel a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/cancel", tag = "openai", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended otherwise (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn cancel_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.cancel_job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// Pause a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/pause", tag = "openai", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It neither waits nor runs, or was paused 100 times (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn pause_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.pause_job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// Resume a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/resume", tag = "openai", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn resume_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.resume_job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// List a fine-tuning job's events
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}/events", tag = "openai", params(("id" = String, Path, description = "The job."), Page),
    responses(
        (status = 200, description = "Events, newest first.", body = FineTuningEventList),
        (status = 400, description = "A query parameter is out of range.", body = ErrorBody),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn list_events(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiPath(id): ApiPath<String>,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    // An event that cannot be has nothing before it.
    let number = |after: String| after.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
    let before = page.after.map(number);
    let mut records = state.service.job_events_before(&caller, &id, before, limit + 1).await?;
    let has_more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let data = records.into_iter().map(|record| FineTuningEvent::of(record, &id)).collect();
    Ok(place.send(Json(FineTuningEventList { object: "list", data, has_more })))
}

/// List a fine-tuning job's checkpoints
#[utoipa::path(
    get, path = "/v1/fine_tuning/jobs/{id}/checkpoints", tag = "openai", params(("id" = String, Path, description = "The job."), Page),
    responses(
        (status = 200, description = "The newest checkpoints.", body = FineTuningCheckpointList),
        (status = 400, description = "A query parameter is out of range.", body = ErrorBody),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn list_checkpoints(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Json<FineTuningCheckpointList>> {
    let limit = page_size(page.limit, DEFAULT_PAGE)? as usize;
    let infos = state.service.job_checkpoints(&caller, &id).await?;
    let mut data: Vec<FineTuningCheckpoint> =
        infos.into_iter().map(|info| FineTuningCheckpoint::of(info, &id)).collect();
    if let Some(after) = page.after {
        let at = data.iter().position(|checkpoint| checkpoint.id == after).map_or(data.len(), |at| at + 1);
        data.drain(..at);
    }
    let has_more = data.len() > limit;
    data.truncate(limit);
    let (first_id, last_id) = (data.first().map(|it| it.id.clone()), data.last().map(|it| it.id.clone()));
    Ok(Json(FineTuningCheckpointList { object: "list", data, has_more, first_id, last_id }))
}
