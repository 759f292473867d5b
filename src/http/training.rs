//! `/adapters/train`: jobs, their events, checkpoints and samples.

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::{Auth, Shown},
    error::{ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery, idempotency_key, json_body},
    job_events,
    job_objects::{
        CheckpointList, CheckpointObject, EventList, EventObject, HyperparametersSchema, JobList, JobObject,
        SamplesList, SamplesObject,
    },
    large::Large,
    metered::Metered,
    schemas,
    state::AppState,
};
use crate::service::{
    Error,
    training::{DataSource, JobRetry, Origin, TrainRequest},
};

/// Largest page, and what a page has when no size is asked for.
const MAX_PAGE: u32 = 1000;
const DEFAULT_PAGE: u32 = 100;

/// A job to be made. Unknown top-level fields are ignored; unknown names inside `hyperparameters`, `scheme` and `grader` are refused.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub(super) struct TrainBody {
    /// The adapter's name, which is reserved until the job ends.
    #[schema(required = true, nullable = false, example = "alice")]
    name: Option<String>,
    /// `grpo` (reinforcement with group-relative advantages), `es` (evolution strategies) or `sft` (supervised).
    #[schema(default = "grpo")]
    method: Option<String>,
    /// When there is an adapter of that name: `error`, or `new_generation` of it.
    #[schema(default = "error")]
    on_conflict: Option<String>,
    /// A scheme's name, or its description. By default that of `init_from`.
    #[schema(value_type = Option<schemas::Scheme>, default = "tiny13")]
    scheme: Option<Value>,
    /// An adapter to go on from; null begins at the base.
    init_from: Option<String>,
    /// A list of items, `{"messages": [..]}` or `{"prompt": ".."}` with any fields that the grader names (for sft also `completion`), or a string of such JSON
    /// lines. GSM8K and SVAMP are taken as they are published. This or `training_file` is required.
    #[schema(value_type = Option<schemas::Items>)]
    dataset: Option<Value>,
    /// A file of `/v1/files`, instead of `dataset`.
    training_file: Option<String>,
    /// Held-out items, to measure the base and the adapter on at the end. They choose nothing.
    #[schema(value_type = Option<schemas::Items>)]
    validation: Option<Value>,
    /// A file of `/v1/files`, instead of `validation`.
    validation_file: Option<String>,
    /// The prompt of items without `messages`: a text or a list of messages with placeholders such as `{{item.question}}`.
    #[schema(value_type = Option<schemas::PromptTemplate>, example = "Q: {{item.question}}\nA:")]
    prompt: Option<Value>,
    /// What gives a completion its reward: `number`, `string_check`, `regex`, `text_similarity`, `json_schema`, `length`, `multi` or `remote`. Required but for sft
    /// and for items of GSM8K and SVAMP.
    #[schema(value_type = Option<schemas::Grader>, example = json!({"type": "number", "reference": "{{item.answer}}"}))]
    grader: Option<Value>,
    /// How to learn.
    #[schema(value_type = Option<HyperparametersSchema>)]
    hyperparameters: Option<Value>,
    /// Of every random choice: the same job with the same seed gives the same numbers.
    #[schema(default = 0)]
    seed: Option<u64>,
    /// Also measure the adapter before its numbers are rounded to bf16.
    #[schema(default = false)]
    full_precision: Option<bool>,
    /// Shown with the job and the adapter. At most 16 KiB as JSON.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
}

impl From<TrainBody> for TrainRequest {
    fn from(body: TrainBody) -> Self {
        Self {
            name: body.name,
            method: body.method,
            on_conflict: body.on_conflict,
            scheme: body.scheme,
            init_from: body.init_from,
            training: DataSource { inline: body.dataset, file: body.training_file },
            validation: DataSource { inline: body.validation, file: body.validation_file },
            prompt: body.prompt,
            grader: body.grader,
            hyperparameters: body.hyperparameters,
            seed: body.seed,
            full_precision: body.full_precision.unwrap_or(false),
            metadata: body.metadata,
            origin: Origin::Adapters,
        }
    }
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct JobPage {
    /// At most so many.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only jobs older than this one.
    after: Option<String>,
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct EventPage {
    /// At most so many; a stream has no such limit.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only events after this number.
    #[param(minimum = 0, default = 0)]
    after: Option<u64>,
}

/// Which samples.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct SamplesPage {
    /// Records at most.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only steps before this one.
    #[param(minimum = 0)]
    before: Option<u64>,
}

/// A page's size.
pub(super) fn page_size(limit: Option<u32>, default: u32) -> Result<u32, Error> {
    let limit = limit.unwrap_or(default);
    if (1..=MAX_PAGE).contains(&limit) {
        return Ok(limit);
    }
    Err(Error::invalid("limit", format!("'limit' must be between 1 and {MAX_PAGE}.")))
}

/// A JSON body, and the client's key for it when it has one.
pub(super) async fn body_and_retry<T: serde::de::DeserializeOwned + Send + 'static>(
    request: Request,
    state: &AppState,
    route: &'static str,
) -> ApiResult<(T, Option<JobRetry>)> {
    let (parts, body) = json_body(request, state).await?;
    let parsed = state.incoming.json(&body).await?;
    let key = idempotency_key(&parts.headers)?;
    let retry = key.map(|key| JobRetry { route, key, request_hash: *blake3::hash(&body.bytes).as_bytes() });
    Ok((parsed, retry))
}

/// Train an adapter
///
/// Prompts with checkable answers go in, a live adapter comes out; serving goes on meanwhile. Everything that is wrong with the request or its data is said at once, or, with more than 2 MiB of data, while the
/// job is `validating`.
#[utoipa::path(
    post, path = "/adapters/train", tag = "training", extensions(("x-metered" = json!(true))), request_body = TrainBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "A request sent again under the same key is the same job.")),
    responses(
        (status = 202, description = "The job.", body = JobObject),
        (status = 403, description = "The adapter of that name is public, and only an admin can change it.", body = ErrorBody),
        (status = 404, description = "`init_from` or a file is not the caller's (codes `adapter_not_found`, `file_not_found`).", body = ErrorBody),
        (status = 409, description = "The name is taken, or reserved by another job (code `name_taken`).", body = ErrorBody),
        (status = 422, description = "`init_from` is for another base (code `incompatible_adapter`).", body = ErrorBody),
        (status = 503, description = "The server is stopping.", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn train(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    request: Request,
) -> ApiResult<Response> {
    let (body, retry) = body_and_retry::<TrainBody>(request, &state, "POST /adapters/train").await?;
    let job = state.service.train(&caller, body.into(), retry).await?;
    Ok((StatusCode::ACCEPTED, Json(JobObject::from(job))).into_response())
}

/// List training jobs
#[utoipa::path(
    get, path = "/adapters/train", tag = "training", params(JobPage),
    responses((status = 200, description = "The caller's jobs.", body = JobList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_jobs(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiQuery(page): ApiQuery<JobPage>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let (jobs, has_more) = state.service.jobs(&caller, page.after.as_deref(), limit).await?;
    Ok(place.send(Json(JobList { object: "list", data: jobs.into_iter().map(JobObject::from).collect(), has_more })))
}

/// Show a training job
#[utoipa::path(
    get, path = "/adapters/train/{id}", tag = "training", params(("id" = String, Path, description = "The job.")),
    responses((status = 200, description = "The job.", body = JobObject), (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn show_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<JobObject>> {
    Ok(Json(state.service.job(&caller, &id).await?.into()))
}

/// Cancel a training job
///
/// It ends at once and publishes nothing. Cancelling again changes nothing.
#[utoipa::path(
    post, path = "/adapters/train/{id}/cancel", tag = "training", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = JobObject),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended otherwise (code `job_status`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn cancel_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<JobObject>> {
    Ok(Json(state.service.cancel_job(&caller, &id).await?.into()))
}

/// Pause a training job
///
/// It keeps where it stands. Pausing again changes nothing.
#[utoipa::path(
    post, path = "/adapters/train/{id}/pause", tag = "training", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = JobObject),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It neither waits nor runs, or was paused 100 times (code `job_status`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn pause_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<JobObject>> {
    Ok(Json(state.service.pause_job(&caller, &id).await?.into()))
}

/// Resume a training job
///
/// It goes on where it stood, to the same numbers as if it had never been paused. Resuming one that is not paused changes nothing.
#[utoipa::path(
    post, path = "/adapters/train/{id}/resume", tag = "training", extensions(("x-metered" = json!(true))), params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = JobObject),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended (code `job_status`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn resume_job(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<JobObject>> {
    Ok(Json(state.service.resume_job(&caller, &id).await?.into()))
}

/// Read a training job's events
///
/// A page of JSON; or, with `Accept: text/event-stream`, a stream that goes on until the job has ended. A client that lost its connection sends the number of the last event it has
/// seen as `Last-Event-ID` and misses nothing.
#[utoipa::path(
    get, path = "/adapters/train/{id}/events", tag = "training",
    params(
        ("id" = String, Path, description = "The job."), EventPage,
        ("Last-Event-ID" = Option<u64>, Header, description = "Only events after this number; it counts more than `after`."),
    ),
    responses(
        (status = 200, description = "Events, oldest first.", content((EventList = "application/json"), (String = "text/event-stream"))),
        (status = 400, description = "A parameter is out of range.", body = ErrorBody),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn list_events(
    State(state): State<AppState>,
    Auth(caller): Auth,
    shown: Shown,
    ApiPath(id): ApiPath<String>,
    ApiQuery(page): ApiQuery<EventPage>,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let after = match headers.get("last-event-id") {
        None => page.after.unwrap_or(0),
        Some(value) => value
            .to_str()
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .ok_or_else(|| Error::invalid("Last-Event-ID", "'Last-Event-ID' must be the number of an event."))?,
    };
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if accept.contains("text/event-stream") {
        // Also the 404 of a stream is an answer and not an event.
        state.service.job(&caller, &id).await?;
        return Ok(job_events::follow(state.service, caller, shown, id, after));
    }
    let place = state.outgoing.large.place(caller.tenant).await?;
    let mut events = state.service.job_events_after(&caller, &id, after, limit + 1).await?;
    let has_more = events.len() > limit as usize;
    events.truncate(limit as usize);
    let data = events.into_iter().map(EventObject::from).collect();
    Ok(place.send(Json(EventList { object: "list", data, has_more })))
}

/// List a training job's checkpoints
#[utoipa::path(
    get, path = "/adapters/train/{id}/checkpoints", tag = "training", params(("id" = String, Path, description = "The job.")),
    responses((status = 200, description = "The newest checkpoints.", body = CheckpointList), (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_checkpoints(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<CheckpointList>> {
    let infos = state.service.job_checkpoints(&caller, &id).await?;
    let data = infos.into_iter().map(CheckpointObject::from).collect();
    Ok(Json(CheckpointList { object: "list", data, has_more: false }))
}

/// Look at a training job's samples
///
/// Some graded completions of the latest steps and of the evaluation.
#[utoipa::path(
    get, path = "/adapters/train/{id}/samples", tag = "training", params(("id" = String, Path, description = "The job."), SamplesPage),
    responses(
        (status = 200, description = "Samples, the newest step first.", body = SamplesList),
        (status = 400, description = "A query parameter is out of range.", body = ErrorBody),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn list_samples(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiPath(id): ApiPath<String>,
    ApiQuery(page): ApiQuery<SamplesPage>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let mut records = state.service.job_samples(&caller, &id, page.before, limit + 1).await?;
    let has_more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let data = records.into_iter().map(SamplesObject::from).collect();
    Ok(place.send(Json(SamplesList { object: "list", data, has_more })))
}
