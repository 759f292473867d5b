//! `/v1/fine_tuning/jobs`: the jobs of `/adapters/train` as OpenAI's clients know them.

use axum::{
    Json,
    extract::{Request, State},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Auth,
    body::refuse_unsupported,
    error::{ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery},
    state::AppState,
    training::{body_and_retry, page_size},
};
use crate::service::{
    EventRecord,
    training::{CheckpointInfo, FineTuningRequest, HYPERPARAMETERS, JobInfo, Method},
};

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
    #[schema(value_type = Option<Object>, default = json!({"type": "supervised"}))]
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
    #[schema(value_type = Option<Object>)]
    scheme: Option<Value>,
    /// Beyond OpenAI's fields: a prompt template for items without `messages`.
    #[schema(value_type = Option<Object>)]
    prompt: Option<Value>,
}

/// A job in OpenAI's words.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningJob {
    /// Its id.
    id: String,
    /// `fine_tuning.job`
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// Unix seconds of its end.
    #[schema(required = true)]
    finished_at: Option<i64>,
    /// `validating_files`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    status: &'static str,
    /// The base's id.
    model: String,
    /// The adapter, once it is published.
    #[schema(value_type = String, required = true, nullable = true)]
    fine_tuned_model: Value,
    /// Always empty: a job belongs to a tenant.
    organization_id: &'static str,
    /// Null for a job whose data came with its request.
    #[schema(required = true)]
    training_file: Option<String>,
    /// Held-out items.
    #[schema(required = true)]
    validation_file: Option<String>,
    /// Always empty: results are in the events.
    result_files: [String; 0],
    /// Of completions and demonstrations, once it has succeeded.
    #[schema(value_type = i64, required = true, nullable = true)]
    trained_tokens: Value,
    /// `{"code", "message", "param"}` when it has failed.
    #[schema(value_type = Object, required = true, nullable = true)]
    error: Value,
    /// `n_epochs`, `batch_size`, `learning_rate_multiplier`
    #[schema(value_type = Object)]
    hyperparameters: Value,
    /// As in the request.
    #[schema(value_type = Object)]
    method: Value,
    /// Of every random choice.
    seed: u64,
    /// Not known.
    #[schema(required = true)]
    estimated_finish: Option<i64>,
    /// Always empty.
    integrations: [String; 0],
    /// What the owner wrote.
    #[schema(value_type = Object)]
    metadata: Map<String, Value>,
}

impl FineTuningJob {
    fn of(info: JobInfo, base: &str) -> Self {
        let spec = info.spec;
        let status = match info.status.as_str() {
            "validating" => "validating_files",
            other => other,
        };
        let auto = |value: Option<Value>| value.unwrap_or_else(|| json!("auto"));
        let theirs = json!({
            "n_epochs": auto(spec.hyperparameters.epochs.map(|epochs| json!(epochs))),
            "batch_size": auto(spec.hyperparameters.prompts_per_step.map(|prompts| json!(prompts))),
            "learning_rate_multiplier": auto(multiplier(spec.hyperparameters.learning_rate, spec.method)),
        });
        let mut all = theirs.as_object().cloned().unwrap_or_default();
        // Ours beside them, as they may be given.
        if let Ok(Value::Object(ours)) = serde_json::to_value(&spec.hyperparameters) {
            all.extend(ours.into_iter().filter(|(name, _)| !["epochs", "prompts_per_step"].contains(&name.as_str())));
        }
        let method = match spec.method {
            Method::Sft => json!({"type": "supervised", "supervised": {"hyperparameters": all}}),
            _ => json!({"type": "reinforcement", "reinforcement": {"grader": spec.grader, "hyperparameters": all}}),
        };
        Self {
            id: info.id,
            object: "fine_tuning.job",
            created_at: info.created_at,
            finished_at: info.finished_at,
            status,
            model: base.to_owned(),
            fine_tuned_model: info.result["adapter"].clone(),
            organization_id: "",
            training_file: spec.training_file,
            validation_file: spec.validation_file,
            result_files: [],
            trained_tokens: info.result["trained_tokens"].clone(),
            error: info.error,
            hyperparameters: theirs,
            method,
            seed: spec.seed,
            estimated_finish: None,
            integrations: [],
            metadata: spec.metadata,
        }
    }
}

/// The learning rate in terms of the default one.
fn multiplier(rate: Option<f64>, method: Method) -> Option<Value> {
    let field = HYPERPARAMETERS.iter().find(|field| field.name == "learning_rate")?;
    let default = (field.default)(method).as_f64()?;
    rate.map(|rate| json!(rate / default))
}

/// A page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningJobList {
    /// `list`
    object: &'static str,
    /// The newest first.
    data: Vec<FineTuningJob>,
    /// Are there more after the last one?
    has_more: bool,
}

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningEvent {
    /// Names the event for `after`.
    id: String,
    /// `fine_tuning.job.event`
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// `info`, `warn` or `error`.
    level: String,
    /// In words.
    message: String,
    /// `metrics` for a step, else `message`.
    r#type: &'static str,
    /// In numbers.
    #[schema(value_type = Object)]
    data: Value,
}

impl FineTuningEvent {
    fn of(record: EventRecord, job: &str) -> Self {
        Self {
            id: format!("ftevent-{}-{}", job.trim_start_matches("ftjob-"), record.seq),
            object: "fine_tuning.job.event",
            created_at: record.created_at,
            level: record.level,
            message: record.message,
            r#type: if record.kind == "step" { "metrics" } else { "message" },
            data: serde_json::from_str(&record.data).unwrap_or_default(),
        }
    }
}

/// A page of events.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningEventList {
    /// `list`
    object: &'static str,
    /// The newest first.
    data: Vec<FineTuningEvent>,
    /// Are there more after the last one?
    has_more: bool,
}

/// A checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningCheckpoint {
    /// Its id.
    id: String,
    /// `fine_tuning.job.checkpoint`
    object: &'static str,
    /// Unix seconds.
    created_at: i64,
    /// What `model` names to run the checkpoint: its numbers travel in the name. Null for a scheme other than the default one.
    #[schema(required = true)]
    fine_tuned_model_checkpoint: Option<String>,
    /// The job.
    fine_tuning_job_id: String,
    /// Of the step.
    #[schema(value_type = Object)]
    metrics: Value,
    /// Steps done.
    step_number: u64,
}

/// A page of checkpoints.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningCheckpointList {
    /// `list`
    object: &'static str,
    /// The newest first.
    data: Vec<FineTuningCheckpoint>,
    /// Are there more after the last one?
    has_more: bool,
    /// The first one's id.
    #[schema(required = true)]
    first_id: Option<String>,
    /// The last one's id.
    #[schema(required = true)]
    last_id: Option<String>,
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
    post, path = "/v1/fine_tuning/jobs", tag = "openai", request_body = FineTuningBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "A request sent again under the same key is the same job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "`model` or a file is not the caller's.", body = ErrorBody),
        (status = 409, description = "The name is taken (code `name_taken`).", body = ErrorBody),
        (status = 422, description = "`model` is an adapter for another base (code `incompatible_adapter`).", body = ErrorBody),
        (status = 429, description = "The caller has as many jobs as it may (code `insufficient_quota`), or the server does (code `queue_full`).", body = ErrorBody),
        (status = 503, description = "The server is stopping.", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn create_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
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
    Auth(caller): Auth,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Json<FineTuningJobList>> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    let (jobs, has_more) = state.service.jobs(&caller, page.after.as_deref(), limit).await?;
    let base = &state.service.base.model_id;
    let data = jobs.into_iter().map(|info| FineTuningJob::of(info, base)).collect();
    Ok(Json(FineTuningJobList { object: "list", data, has_more }))
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
    post, path = "/v1/fine_tuning/jobs/{id}/cancel", tag = "openai", params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended otherwise (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn cancel_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.cancel_job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// Pause a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/pause", tag = "openai", params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It neither waits nor runs (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn pause_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FineTuningJob>> {
    let info = state.service.pause_job(&caller, &id).await?;
    Ok(job(&state, info))
}

/// Resume a fine-tuning job
#[utoipa::path(
    post, path = "/v1/fine_tuning/jobs/{id}/resume", tag = "openai", params(("id" = String, Path, description = "The job.")),
    responses(
        (status = 200, description = "The job.", body = FineTuningJob),
        (status = 404, description = "The caller has no such job (code `job_not_found`).", body = ErrorBody),
        (status = 409, description = "It has ended (code `job_status`).", body = ErrorBody), CommonErrors,
    ),
)]
pub(super) async fn resume_job(
    State(state): State<AppState>,
    Auth(caller): Auth,
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
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Json<FineTuningEventList>> {
    let limit = page_size(page.limit, DEFAULT_PAGE)?;
    // An event that cannot be has nothing before it.
    let number = |after: String| after.rsplit('-').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
    let before = page.after.map(number);
    let mut records = state.service.job_events_before(&caller, &id, before, limit + 1).await?;
    let has_more = records.len() > limit as usize;
    records.truncate(limit as usize);
    let data = records.into_iter().map(|record| FineTuningEvent::of(record, &id)).collect();
    Ok(Json(FineTuningEventList { object: "list", data, has_more }))
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
    let named = |step: u64| format!("ftckpt-{}-{step}", id.trim_start_matches("ftjob-"));
    let object = |info: CheckpointInfo| FineTuningCheckpoint {
        id: named(info.step),
        object: "fine_tuning.job.checkpoint",
        created_at: info.created_at,
        fine_tuned_model_checkpoint: info.model,
        fine_tuning_job_id: id.clone(),
        metrics: info.metrics,
        step_number: info.step,
    };
    let mut data: Vec<FineTuningCheckpoint> = infos.into_iter().map(object).collect();
    if let Some(after) = page.after {
        let at = data.iter().position(|checkpoint| checkpoint.id == after).map_or(data.len(), |at| at + 1);
        data.drain(..at);
    }
    let has_more = data.len() > limit;
    data.truncate(limit);
    let (first_id, last_id) = (data.first().map(|it| it.id.clone()), data.last().map(|it| it.id.clone()));
    Ok(Json(FineTuningCheckpointList { object: "list", data, has_more, first_id, last_id }))
}
