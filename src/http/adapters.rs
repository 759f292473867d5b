//! `/adapters`: upload, read, replace, delete.

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use utoipa::{IntoParams, ToSchema};

use super::{
    adapter_objects::{
        AdapterList, AdapterObject, GenerationList, GenerationObject, SchemeList, SchemeObject, WeightsObject,
    },
    answer::with_generation,
    auth::Auth,
    error::{ApiResult, BodyErrors, CommonErrors, ErrorBody},
    extract::{ApiJson, ApiPath, ApiQuery, idempotency_key},
    large::Large,
    metered::Metered,
    state::AppState,
    training::page_size,
    upload::{AdapterForm, AdapterUpload, UploadQuery, read_upload},
};
use crate::{
    service::{AdapterInfo, Error, HISTORY, Retry, Uploaded},
    types::Generation,
};

const DEFAULT_LIMIT: u32 = 100;

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Page {
    /// At most so many adapters.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<u32>,
    /// Only those after this name (or id).
    after: Option<String>,
    /// Only those whose name begins so.
    prefix: Option<String>,
}

/// Which generations.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct GenerationsPage {
    /// At most so many generations.
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    limit: Option<u32>,
    /// Only those uploaded before this generation.
    after: Option<String>,
}

/// How to write the numbers.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct WeightsQuery {
    /// `raw` bytes, `json`, or a zip of a `peft` checkpoint.
    #[param(default = "raw")]
    format: Option<String>,
}

/// Where to go back to.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct RollbackBody {
    /// One of the adapter's generations.
    #[schema(required = true, nullable = false)]
    generation: Option<String>,
}

/// The body of 201, which a retried request gets again.
fn render(info: AdapterInfo) -> String {
    // String keys and finite numbers: it can be written.
    serde_json::to_string(&AdapterObject::from(info)).unwrap_or_default()
}

fn adapter_answer(info: AdapterInfo) -> Response {
    let generation = info.numbers.generation;
    with_etag(Json(AdapterObject::from(info)).into_response(), generation)
}

/// The generation as an entity tag, for `If-Match`.
fn with_etag(mut response: Response, generation: Generation) -> Response {
    if let Ok(tag) = HeaderValue::from_str(&format!("\"{generation}\"")) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    response
}

/// Upload an adapter
///
/// Raw bytes with query parameters, JSON, or PEFT's two files as a form.
#[utoipa::path(
    post, path = "/adapters", tag = "adapters", extensions(("x-metered" = json!(true))),
    params(UploadQuery, ("Idempotency-Key" = Option<String>, Header, description = "A request sent again under the same key gets the first answer.")),
    request_body(content((AdapterUpload = "application/json"), (Vec<u8> = "application/octet-stream"), (AdapterForm = "multipart/form-data"))),
    responses(
        (status = 201, description = "Stored: it survives the end of the process.", body = AdapterObject),
        (status = 403, description = "Only an admin can make an adapter public, or change one that is.", body = ErrorBody),
        (status = 409, description = "The name is taken (code `name_taken`).", body = ErrorBody),
        (status = 422, description = "The numbers are for another base (code `incompatible_adapter`).", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn upload_adapter(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    request: Request,
) -> ApiResult<Response> {
    let key = idempotency_key(request.headers());
    let upload = read_upload(request, &state).await?;
    let retry = key?.map(|key| Retry { key, render });
    Ok(match state.service.upload(&caller, upload, retry).await? {
        Uploaded::New(info) => (StatusCode::CREATED, adapter_answer(*info)).into_response(),
        Uploaded::Before(body) => {
            (StatusCode::CREATED, [(header::CONTENT_TYPE, "application/json")], body).into_response()
        }
    })
}

/// List adapters
///
/// The caller's own and public ones.
#[utoipa::path(
    get, path = "/adapters", tag = "adapters", params(Page),
    responses((status = 200, description = "A page.", body = AdapterList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_adapters(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiQuery(page): ApiQuery<Page>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, DEFAULT_LIMIT)?;
    let prefix = page.prefix.as_deref().unwrap_or("");
    let (infos, has_more) = state.service.adapters(&caller, prefix, page.after.as_deref(), limit).await?;
    let data = infos.into_iter().map(AdapterObject::from).collect();
    Ok(place.send(Json(AdapterList { object: "list", data, has_more })))
}

/// Show an adapter
#[utoipa::path(
    get, path = "/adapters/{name}", tag = "adapters", params(("name" = String, Path, description = "An adapter's name.")),
    responses((status = 200, description = "The adapter.", body = AdapterObject), (status = 404, description = "The caller has none of that name (code `adapter_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn show_adapter(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<Response> {
    Ok(adapter_answer(state.service.adapter(&caller, &name).await?))
}

/// Replace an adapter
///
/// A new generation of an adapter that exists. Requests that run under the old one end under it.
#[utoipa::path(
    put, path = "/adapters/{name}", tag = "adapters", extensions(("x-metered" = json!(true))),
    params(
        ("name" = String, Path, description = "An adapter's name."), UploadQuery,
        ("If-Match" = Option<String>, Header, description = "Only if this is the current generation."),
    ),
    request_body(content((AdapterUpload = "application/json"), (Vec<u8> = "application/octet-stream"), (AdapterForm = "multipart/form-data"))),
    responses(
        (status = 200, description = "The adapter with its new generation.", body = AdapterObject),
        (status = 403, description = "Only an admin can make an adapter public, or change one that is.", body = ErrorBody),
        (status = 404, description = "The caller has none of that name (code `adapter_not_found`).", body = ErrorBody),
        (status = 409, description = "Another tenant has a public adapter of that name.", body = ErrorBody),
        (status = 412, description = "The current generation is another (code `generation_mismatch`).", body = ErrorBody),
        (status = 422, description = "The numbers are for another base (code `incompatible_adapter`).", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn replace_adapter(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(name): ApiPath<String>,
    request: Request,
) -> ApiResult<Response> {
    let headers = request.headers().clone();
    let upload = read_upload(request, &state).await?;
    let expected = if_match(&headers)?;
    Ok(adapter_answer(state.service.replace(&caller, &name, upload, expected).await?))
}

/// The generation that `If-Match` asks for; None for any.
fn if_match(headers: &HeaderMap) -> Result<Option<Generation>, Error> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(None);
    }
    let tag = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    tag.parse()
        .map(Some)
        .map_err(|error| Error::invalid("If-Match", format!("'If-Match' names one generation: {error}.")))
}

/// A generation that a request names in `field`.
fn generation_of(field: &'static str, text: &str) -> Result<Generation, Error> {
    text.parse().map_err(|error| Error::invalid(field, format!("'{field}': {error}.")))
}

/// Delete an adapter
///
/// Erases its generations and their cached keys and values. Requests that run under it end as they began.
#[utoipa::path(
    delete, path = "/adapters/{name}", tag = "adapters", params(("name" = String, Path, description = "An adapter's name.")),
    responses((status = 204, description = "Erased."), (status = 403, description = "It is public, and only an admin can delete it.", body = ErrorBody), (status = 404, description = "The caller has none of that name (code `adapter_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn delete_adapter(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(name): ApiPath<String>,
) -> ApiResult<StatusCode> {
    state.service.delete_adapter(&caller, &name).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Read an adapter's numbers
///
/// As raw bytes, as JSON, or as a PEFT checkpoint that gives the same logits wherever PEFT runs.
#[utoipa::path(
    get, path = "/adapters/{name}/weights", tag = "adapters",
    params(("name" = String, Path, description = "An adapter's name."), WeightsQuery),
    responses(
        (status = 200, description = "The numbers.", content((Vec<u8> = "application/octet-stream"), (WeightsObject = "application/json"), (Vec<u8> = "application/zip"))),
        (status = 400, description = "There is no such format, or PEFT has no words for the adapter's scheme.", body = ErrorBody),
        (status = 404, description = "The caller has none of that name (code `adapter_not_found`).", body = ErrorBody),
        (status = 422, description = "`peft`, and the adapter is for another base.", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn read_weights(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(name): ApiPath<String>,
    ApiQuery(query): ApiQuery<WeightsQuery>,
) -> ApiResult<Response> {
    let format = query.format.as_deref().unwrap_or("raw");
    if !["raw", "json", "peft"].contains(&format) {
        return Err(Error::invalid("format", "'format' is 'raw', 'json' or 'peft'.").into());
    }
    let (info, adapter) = state.service.weights(&caller, &name).await?;
    let generation = info.numbers.generation;
    let body = match format {
        "json" => Json(WeightsObject {
            name: info.name,
            generation: generation.to_string(),
            dtype: info.numbers.dtype,
            scheme: info.numbers.scheme,
            fingerprint: info.numbers.fingerprint.to_string(),
            numbers: adapter.numbers().map(f64::from).collect(),
            data: STANDARD.encode(adapter.bytes()),
        })
        .into_response(),
        "peft" => {
            let place = state.outgoing.large.place(caller.tenant).await?;
            let zip = state.service.export(adapter).await?;
            let attachment = format!("attachment; filename=\"{name}.zip\"");
            let headers =
                [(header::CONTENT_TYPE, "application/zip".to_owned()), (header::CONTENT_DISPOSITION, attachment)];
            place.send((headers, zip))
        }
        _ => ([(header::CONTENT_TYPE, "application/octet-stream")], adapter.bytes().to_vec()).into_response(),
    };
    Ok(with_etag(with_generation(body, Some(generation)), generation))
}

/// List an adapter's generations
///
/// An adapter keeps its 1,000 newest generations, which is also the default `limit`.
#[utoipa::path(
    get, path = "/adapters/{name}/generations", tag = "adapters", params(("name" = String, Path, description = "An adapter's name."), GenerationsPage),
    responses((status = 200, description = "The newest upload first.", body = GenerationList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), (status = 404, description = "The caller owns none of that name (code `adapter_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_generations(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiPath(name): ApiPath<String>,
    ApiQuery(page): ApiQuery<GenerationsPage>,
) -> ApiResult<Response> {
    let limit = page_size(page.limit, HISTORY)?;
    let after = page.after.as_deref().map(|text| generation_of("after", text)).transpose()?;
    let (infos, has_more) = state.service.generations(&caller, &name, after, limit).await?;
    let data = infos.into_iter().map(GenerationObject::from).collect();
    Ok(place.send(Json(GenerationList { object: "list", data, has_more })))
}

/// Go back to a generation
#[utoipa::path(
    post, path = "/adapters/{name}/rollback", tag = "adapters", extensions(("x-metered" = json!(true))), params(("name" = String, Path, description = "An adapter's name.")),
    request_body = RollbackBody,
    responses(
        (status = 200, description = "The adapter, at that generation.", body = AdapterObject),
        (status = 403, description = "It is public, and only an admin can change it.", body = ErrorBody),
        (status = 404, description = "The caller owns no adapter of that name, or it does not have that generation, any more or at all (code `adapter_not_found`).", body = ErrorBody),
        BodyErrors, CommonErrors,
    ),
)]
pub(super) async fn rollback_adapter(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    ApiPath(name): ApiPath<String>,
    ApiJson(body): ApiJson<RollbackBody>,
) -> ApiResult<Response> {
    let text = body.generation.ok_or_else(|| Error::invalid("generation", "'generation' is required."))?;
    let generation = generation_of("generation", &text)?;
    Ok(adapter_answer(state.service.rollback(&caller, &name, generation).await?))
}

/// List schemes
///
/// The base, and each named scheme with its count of numbers.
#[utoipa::path(
    get, path = "/adapters/schemes", tag = "adapters",
    responses((status = 200, description = "All that a client needs to make an adapter's bytes.", body = SchemeList), CommonErrors),
)]
pub(super) async fn list_schemes(State(state): State<AppState>, Auth(_caller): Auth) -> Json<SchemeList> {
    let base = &state.service.base;
    let schemes = state.service.schemes().into_iter().map(|scheme| SchemeObject {
        name: scheme.name,
        scheme: scheme.scheme,
        numbers: scheme.numbers,
        served: scheme.served,
    });
    Json(SchemeList {
        base: base.model_id.clone(),
        fingerprint: base.fingerprint.to_string(),
        sites: base.sites.len(),
        rank: base.rank,
        schemes: schemes.collect(),
    })
}
