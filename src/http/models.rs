//! `GET /v1/models` and `GET /v1/models/{model}`.

use axum::{Json, extract::State, response::Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Auth,
    error::{ApiResult, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery},
    large::Large,
    state::AppState,
};
use crate::service::{BaseInfo, Error, Model};

const DEFAULT_LIMIT: usize = 10_000;

/// Something that `model` may name.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelObject {
    /// The base's id, or an adapter's name.
    #[schema(example = "SmolLM2-135M-Instruct")]
    pub id: String,
    /// `model`
    pub object: &'static str,
    /// Unix seconds: the start of the server, or the upload of the adapter.
    pub created: u64,
    /// `mote`, or the tenant that owns the adapter.
    pub owned_by: String,
    /// The base's id.
    pub root: String,
    /// The base's id for an adapter, null for the base.
    #[schema(required = true)]
    pub parent: Option<String>,
    /// Longest prompt plus completion, in tokens.
    pub max_model_len: usize,
}

impl ModelObject {
    fn of(model: Model, base: &BaseInfo) -> Self {
        let root = base.model_id.clone();
        let (id, created, owned_by, parent) = match model {
            Model::Base => (root.clone(), base.created, "mote".to_owned(), None),
            Model::Adapter { name, owner, created_at } => {
                (name, created_at.try_into().unwrap_or(0), owner, Some(root.clone()))
            }
        };
        Self { id, object: "model", created, owned_by, root, parent, max_model_len: base.max_model_len }
    }
}

/// The models that a caller may name.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ModelList {
    /// `list`
    pub object: &'static str,
    /// The base, then adapters in the order of names.
    pub data: Vec<ModelObject>,
    /// Are there more after the last one?
    pub has_more: bool,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// At most so many models.
    #[param(minimum = 1, maximum = 10_000, default = 10_000)]
    limit: Option<usize>,
    /// Only those after this id.
    after: Option<String>,
}

/// List models
///
/// The base and the adapters that the caller may use: its own and public ones.
#[utoipa::path(
    get, path = "/v1/models", tag = "openai", params(Page),
    responses((status = 200, description = "The models.", body = ModelList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_models(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Response> {
    let limit = page.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=DEFAULT_LIMIT).contains(&limit) {
        return Err(Error::invalid("limit", format!("'limit' must be between 1 and {DEFAULT_LIMIT}.")).into());
    }
    let (models, has_more) = state.service.models(&caller, page.after.as_deref(), limit).await?;
    let data = models.into_iter().map(|model| ModelObject::of(model, &state.service.base)).collect();
    Ok(place.send(Json(ModelList { object: "list", data, has_more })))
}

/// Show a model
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "openai",
    params(("model" = String, Path, description = "The base's id, an adapter's name, or `base:name`.")),
    responses(
        (status = 200, description = "The model.", body = ModelObject),
        (status = 404, description = "There is no such model, or it is not the caller's (code `model_not_found`).", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn show_model(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<ModelObject>> {
    let model = state.service.model(&caller, &id).await?;
    Ok(Json(ModelObject::of(model, &state.service.base)))
}
