//! `/v1/fine_tuning/alpha/graders`: is a grader right, and what does it say?

use axum::{Json, extract::State};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::{
    error::{ApiResult, BodyErrors, CommonErrors},
    extract::ApiJson,
    metered::Metered,
    schemas,
    state::AppState,
};
use crate::service::Error;

/// A grader to check.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct ValidateBody {
    /// As in a job.
    #[schema(value_type = schemas::Grader, required = true, nullable = false, example = json!({"type": "number", "reference": "{{item.answer}}"}))]
    grader: Option<Value>,
}

/// A grader that is right.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ValidatedGrader {
    /// As given.
    #[schema(value_type = schemas::Grader)]
    grader: Value,
}

/// A completion to grade.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct RunBody {
    /// As in a job.
    #[schema(value_type = schemas::Grader, required = true, nullable = false)]
    grader: Option<Value>,
    /// The completion: `sample.output_text` in templates.
    #[schema(required = true, nullable = false)]
    model_sample: Option<String>,
    /// The item: `item` in templates.
    #[schema(value_type = Option<Object>)]
    item: Option<Value>,
}

/// What a grader said.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct GraderResult {
    /// The score.
    reward: f32,
    /// The scores that a combined one was made of, by name.
    #[schema(value_type = Object)]
    sub_rewards: Map<String, Value>,
    /// The grader's type and name, how long it took, and its scores.
    #[schema(value_type = Object)]
    metadata: Value,
    /// Always empty: no grader of this server asks a model.
    #[schema(value_type = Object)]
    model_grader_token_usage_per_model: Map<String, Value>,
}

fn required(grader: Option<Value>) -> Result<Value, Error> {
    grader.filter(|grader| !grader.is_null()).ok_or_else(|| Error::invalid("grader", "'grader' is required."))
}

/// Check a grader
#[utoipa::path(
    post, path = "/v1/fine_tuning/alpha/graders/validate", tag = "openai", extensions(("x-metered" = json!(true))), request_body = ValidateBody,
    responses((status = 200, description = "It is right.", body = ValidatedGrader), BodyErrors, CommonErrors),
)]
pub(super) async fn validate_grader(
    State(state): State<AppState>,
    Metered(_caller, _place): Metered,
    ApiJson(body): ApiJson<ValidateBody>,
) -> ApiResult<Json<ValidatedGrader>> {
    let grader = required(body.grader)?;
    state.service.validate_grader(&grader)?;
    Ok(Json(ValidatedGrader { grader }))
}

/// Run a grader
#[utoipa::path(
    post, path = "/v1/fine_tuning/alpha/graders/run", tag = "openai", extensions(("x-metered" = json!(true))), request_body = RunBody,
    responses(
        (status = 200, description = "What it said.", body = GraderResult),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn run_grader(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiJson(body): ApiJson<RunBody>,
) -> ApiResult<Json<GraderResult>> {
    let grader = required(body.grader)?;
    let text = body.model_sample.ok_or_else(|| Error::invalid("model_sample", "'model_sample' is required."))?;
    let item = body.item.unwrap_or_else(|| json!({}));
    let (kind, name) = (grader["type"].clone(), grader["name"].clone());
    let graded = state.service.run_grader(&caller, grader, item, text).await?;
    let sub_rewards: Map<String, Value> =
        graded.parts.into_iter().map(|(name, reward)| (name, json!(reward))).collect();
    let metadata = json!({
        "name": name,
        "type": kind,
        "errors": {},
        "execution_time": graded.took.as_secs_f64(),
        "scores": sub_rewards,
        "token_usage": null,
        "sampled_model_name": null,
    });
    let model_grader_token_usage_per_model = Map::new();
    Ok(Json(GraderResult { reward: graded.reward, sub_rewards, metadata, model_grader_token_usage_per_model }))
}
