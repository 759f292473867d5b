//! `/v1/files`.

use axum::{
    Json,
    body::Body,
    extract::{FromRequest as _, Multipart, Request, State},
    http::header,
    response::Response,
};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    auth::Auth,
    error::{ApiError, ApiResult, CommonErrors, ErrorBody},
    extract::{ApiPath, ApiQuery, idempotency_key, require_media_type},
    large::Large,
    metered::Metered,
    state::AppState,
};
use crate::service::{Error, FileRecord};

/// What a form has around its file.
const FORM_OVERHEAD: usize = 64 << 10;
const MAX_PAGE: u32 = 10_000;

/// A file, without what is in it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileObject {
    /// Its id.
    #[schema(example = "file-0198c0ffee0070008000000000000001")]
    id: String,
    /// `file`
    object: &'static str,
    /// Its size.
    bytes: u64,
    /// Unix seconds.
    created_at: i64,
    /// As the client called it.
    filename: String,
    /// `fine-tune`
    purpose: String,
    /// Always `processed`: it was checked when it came.
    status: &'static str,
}

impl From<FileRecord> for FileObject {
    fn from(record: FileRecord) -> Self {
        let FileRecord { id, filename, purpose, bytes, created_at } = record;
        Self { id, object: "file", bytes, created_at, filename, purpose, status: "processed" }
    }
}

/// A page of files.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileList {
    /// `list`
    object: &'static str,
    /// The newest first.
    data: Vec<FileObject>,
    /// Are there more after the last one?
    has_more: bool,
    /// The first one's id.
    #[schema(required = true)]
    first_id: Option<String>,
    /// The last one's id.
    #[schema(required = true)]
    last_id: Option<String>,
}

/// That a file is gone.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct DeletedFile {
    /// Its id.
    id: String,
    /// `file`
    object: &'static str,
    /// Always true.
    deleted: bool,
}

/// A file as a form.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the form in the OpenAPI document; parts are read as they come")]
pub(super) struct FileForm {
    /// JSON lines, one item each; or one JSON list.
    #[schema(value_type = String, format = Binary)]
    file: Vec<u8>,
    /// `fine-tune`
    #[schema(example = "fine-tune")]
    purpose: String,
}

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct FilePage {
    /// At most so many.
    #[param(minimum = 1, maximum = 10_000, default = 10_000)]
    limit: Option<u32>,
    /// Only files older than this one.
    after: Option<String>,
    /// Only files of this purpose.
    purpose: Option<String>,
    /// `desc`: the newest first. There is no other order.
    order: Option<String>,
}

fn is_form(essence: &str) -> bool {
    essence == "multipart/form-data"
}

/// Upload a file
///
/// A data set for training: every line is checked.
#[utoipa::path(
    post, path = "/v1/files", tag = "openai", extensions(("x-metered" = json!(true))), request_body(content = FileForm, content_type = "multipart/form-data"),
    params(("Idempotency-Key" = Option<String>, Header, description = "A file sent again under the same key is the same file.")),
    responses(
        (status = 200, description = "The file.", body = FileObject),
        (status = 400, description = "A line is no item, or a part of the form is missing; `param` names it.", body = ErrorBody),
        (status = 408, description = "The body did not come in time (code `request_timeout`).", body = ErrorBody),
        (status = 409, description = "The `Idempotency-Key` came before with another file (code `idempotency_key_reused`).", body = ErrorBody),
        (status = 413, description = "The file is larger than this server takes.", body = ErrorBody),
        (status = 415, description = "The media type is not `multipart/form-data`.", body = ErrorBody),
        CommonErrors,
    ),
)]
pub(super) async fn upload_file(
    State(state): State<AppState>,
    Metered(caller, _place): Metered,
    request: Request,
) -> ApiResult<Json<FileObject>> {
    require_media_type(request.headers(), is_form, "multipart/form-data")?;
    let limit = state.service.training()?.config().data.bytes + FORM_OVERHEAD;
    let key = idempotency_key(request.headers());
    let (parts, body) = request.into_parts();
    let body = state.incoming.receive(&parts, body, limit).await?;

    let malformed = |words: String| ApiError(Error::invalid("body", format!("The form cannot be read: {words}.")));
    let mut whole = Request::new(Body::from(body.bytes.clone()));
    *whole.headers_mut() = parts.headers;
    *whole.extensions_mut() = parts.extensions;
    let mut form =
        Multipart::from_request(whole, &state).await.map_err(|rejection| malformed(rejection.body_text()))?;
    let (mut file, mut purpose) = (None, None);
    while let Some(field) = form.next_field().await.map_err(|error| malformed(error.body_text()))? {
        let name = field.name().unwrap_or_default().to_owned();
        let filename = field.file_name().unwrap_or("file.jsonl").to_owned();
        if name.starts_with("expires_after") {
            return Err(Error::invalid("expires_after", "'expires_after' is not supported by this server.").into());
        }
        if !["file", "purpose"].contains(&name.as_str()) {
            continue;
        }
        let bytes = field.bytes().await.map_err(|error| malformed(error.body_text()))?;
        if name == "file" {
            file = Some((filename, bytes));
        } else {
            let text = String::from_utf8(bytes.into());
            purpose = Some(text.map_err(|_| Error::invalid("purpose", "'purpose' is not UTF-8."))?);
        }
    }
    let key = key?;
    let purpose = purpose.ok_or_else(|| Error::invalid("purpose", "'purpose' is required."))?;
    let (filename, bytes) = file.ok_or_else(|| Error::invalid("file", "'file' is required."))?;
    Ok(Json(state.service.upload_file(&caller, &filename, &purpose, bytes.into(), key).await?.into()))
}

/// List files
#[utoipa::path(
    get, path = "/v1/files", tag = "openai", params(FilePage),
    responses((status = 200, description = "The caller's files.", body = FileList), (status = 400, description = "A query parameter is out of range.", body = ErrorBody), CommonErrors),
)]
pub(super) async fn list_files(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiQuery(page): ApiQuery<FilePage>,
) -> ApiResult<Response> {
    let limit = page.limit.unwrap_or(MAX_PAGE);
    if !(1..=MAX_PAGE).contains(&limit) {
        return Err(Error::invalid("limit", format!("'limit' must be between 1 and {MAX_PAGE}.")).into());
    }
    if page.order.is_some_and(|order| order != "desc") {
        return Err(Error::invalid("order", "'order' must be 'desc'.").into());
    }
    let none = page.purpose.is_some_and(|purpose| purpose != "fine-tune");
    let (files, has_more) = match none {
        true => (Vec::new(), false),
        false => state.service.files(&caller, page.after.as_deref(), limit).await?,
    };
    let data: Vec<FileObject> = files.into_iter().map(FileObject::from).collect();
    let (first_id, last_id) = (data.first().map(|file| file.id.clone()), data.last().map(|file| file.id.clone()));
    Ok(place.send(Json(FileList { object: "list", data, has_more, first_id, last_id })))
}

/// Show a file
#[utoipa::path(
    get, path = "/v1/files/{id}", tag = "openai", params(("id" = String, Path, description = "The file.")),
    responses((status = 200, description = "The file.", body = FileObject), (status = 404, description = "The caller has no such file (code `file_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn show_file(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<FileObject>> {
    Ok(Json(state.service.file(&caller, &id).await?.into()))
}

/// Read a file
#[utoipa::path(
    get, path = "/v1/files/{id}/content", tag = "openai", params(("id" = String, Path, description = "The file.")),
    responses((status = 200, description = "What is in it.", body = String, content_type = "application/octet-stream"), (status = 404, description = "The caller has no such file (code `file_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn read_file(
    State(state): State<AppState>,
    Large(caller, place): Large,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Response> {
    let bytes = state.service.file_data(&caller, &id).await?;
    Ok(place.send(([(header::CONTENT_TYPE, "application/octet-stream")], bytes)))
}

/// Delete a file
///
/// Jobs that were made of it have their own copy until they end.
#[utoipa::path(
    delete, path = "/v1/files/{id}", tag = "openai", params(("id" = String, Path, description = "The file.")),
    responses((status = 200, description = "It is gone.", body = DeletedFile), (status = 404, description = "The caller has no such file (code `file_not_found`).", body = ErrorBody), CommonErrors),
)]
pub(super) async fn delete_file(
    State(state): State<AppState>,
    Auth(caller): Auth,
    ApiPath(id): ApiPath<String>,
) -> ApiResult<Json<DeletedFile>> {
    state.service.delete_file(&caller, &id).await?;
    Ok(Json(DeletedFile { id, object: "file", deleted: true }))
}
