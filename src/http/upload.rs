//! The three forms of an upload: raw bytes, JSON, multipart.

use axum::{
    body::Body,
    extract::{FromRequest as _, FromRequestParts as _, Multipart, Request, multipart::Field},
    http::request::Parts,
};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{
    error::{ApiError, ApiResult},
    extract::{ApiQuery, media_type, require_media_type},
    schemas,
    state::AppState,
};
use crate::service::{Content, Error, Upload};

const RAW: &str = "application/octet-stream";
const JSON: &str = "application/json";
const FORM: &str = "multipart/form-data";

/// An adapter as JSON. Unknown fields are ignored.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
pub(super) struct AdapterUpload {
    /// 1 to 64 characters of `A-Z a-z 0-9 . _ -`; not `train`, `batch`, `schemes`.
    #[schema(required = true, nullable = false, example = "alice")]
    pub name: Option<String>,
    /// The bytes in base64. Either this or `numbers`.
    #[schema(example = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=")]
    pub data: Option<String>,
    /// The numbers, rounded once to `dtype`: group-major, groups in numeric order.
    pub numbers: Option<Vec<f64>>,
    /// How the numbers are stored: `bf16` or `f32`.
    #[schema(default = "bf16")]
    pub dtype: Option<String>,
    /// A scheme's name, or its description with the keys `convention`, `rank`, `u`, `ties`, `seed`, `targets`.
    #[schema(value_type = Option<schemas::Scheme>, default = "tiny13")]
    pub scheme: Option<Value>,
    /// Any object; shown with the adapter. At most 16 KiB as JSON.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// Every tenant may use it. For admins.
    #[schema(default = false)]
    pub public: Option<bool>,
    /// The base that the numbers are for: 64 lower-case hexadecimal digits. Without it they are for this server's.
    pub fingerprint: Option<String>,
    /// Take the numbers although they are for another base. The adapter is marked `approximate`.
    #[schema(default = false)]
    pub force: Option<bool>,
    /// What to do when the name is taken: `error`, or `new_generation` to replace.
    #[schema(default = "error")]
    pub on_conflict: Option<String>,
}

impl AdapterUpload {
    /// # Errors
    /// 400 when both `data` and `numbers` are given.
    pub(super) fn into_upload(self) -> Result<Upload, Error> {
        let content = match (self.data, self.numbers) {
            (Some(_), Some(_)) => return Err(Error::invalid("data", "Give 'data' or 'numbers', not both.")),
            (Some(data), None) => Some(Content::Base64(data)),
            (None, numbers) => numbers.map(Content::Numbers),
        };
        Ok(Upload {
            name: self.name,
            content,
            dtype: self.dtype,
            scheme: self.scheme,
            metadata: self.metadata,
            public: self.public,
            fingerprint: self.fingerprint,
            force: self.force.unwrap_or(false),
            on_conflict: self.on_conflict,
        })
    }
}

/// An adapter as a form.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "describes the form in the OpenAPI document; parts are read as they come")]
pub(super) struct AdapterForm {
    /// As in the JSON form; may also be a query parameter.
    name: String,
    /// PEFT's `adapter_config.json`.
    #[schema(value_type = Option<String>, format = Binary)]
    adapter_config: Option<Bytes>,
    /// PEFT's `adapter_model.safetensors`.
    #[schema(value_type = Option<String>, format = Binary)]
    adapter_model: Option<Bytes>,
    /// Instead of the two: a .zip or .tar.gz of them.
    #[schema(value_type = Option<String>, format = Binary)]
    archive: Option<Bytes>,
    /// As in the JSON form.
    metadata: Option<String>,
    /// As in the JSON form.
    public: Option<bool>,
    /// As in the JSON form.
    fingerprint: Option<String>,
    /// As in the JSON form.
    #[schema(default = false)]
    force: Option<bool>,
    /// As in the JSON form.
    on_conflict: Option<String>,
}

/// The fields of an upload whose body is its bytes; of the other forms, what their body leaves out.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct UploadQuery {
    /// The adapter's name.
    #[param(example = "alice")]
    name: Option<String>,
    /// A scheme's name, or its description as JSON.
    #[param(example = "tiny13")]
    scheme: Option<String>,
    /// `bf16` or `f32`.
    #[param(default = "bf16")]
    dtype: Option<String>,
    /// The base that the numbers are for.
    fingerprint: Option<String>,
    /// Take numbers of another base.
    force: Option<bool>,
    /// `error` or `new_generation`.
    on_conflict: Option<String>,
    /// Every tenant may use it. For admins.
    public: Option<bool>,
}

impl UploadQuery {
    fn fill(self, upload: &mut Upload) -> Result<(), Error> {
        let scheme = self.scheme.map(|text| match text.starts_with('{') {
            true => serde_json::from_str(&text)
                .map_err(|error| Error::invalid("scheme", format!("Query parameter 'scheme': {error}."))),
            false => Ok(Value::String(text)),
        });
        upload.name = upload.name.take().or(self.name);
        upload.scheme = upload.scheme.take().or(scheme.transpose()?);
        upload.dtype = upload.dtype.take().or(self.dtype);
        upload.fingerprint = upload.fingerprint.take().or(self.fingerprint);
        upload.on_conflict = upload.on_conflict.take().or(self.on_conflict);
        upload.public = upload.public.or(self.public);
        upload.force |= self.force.unwrap_or(false);
        Ok(())
    }
}

fn is_upload(essence: &str) -> bool {
    [RAW, JSON, FORM].contains(&essence)
}

/// Reads an upload in any of its forms: media type, size, syntax, types, in this order.
pub(super) async fn read_upload(request: Request, state: &AppState) -> ApiResult<Upload> {
    require_media_type(
        request.headers(),
        is_upload,
        "application/octet-stream, application/json or multipart/form-data",
    )?;
    let form = media_type(request.headers());
    let limit = match form.as_deref() {
        Some(FORM) => state.limits.body.max(state.service.max_checkpoint()),
        _ => state.limits.body,
    };
    let (mut parts, body) = request.into_parts();
    let body = state.incoming.receive(&parts, body, limit).await?;
    let mut upload = match form.as_deref() {
        Some(JSON) => state.incoming.json::<AdapterUpload>(&body).await?.into_upload()?,
        Some(FORM) => read_form(&parts, body.bytes.clone(), state).await?,
        _ => Upload { content: Some(Content::Raw(body.bytes.clone())), ..empty() },
    };
    let ApiQuery(query) = ApiQuery::<UploadQuery>::from_request_parts(&mut parts, state).await?;
    query.fill(&mut upload)?;
    Ok(upload)
}

fn empty() -> Upload {
    Upload {
        name: None,
        content: None,
        dtype: None,
        scheme: None,
        metadata: None,
        public: None,
        fingerprint: None,
        force: false,
        on_conflict: None,
    }
}

async fn read_form(parts: &Parts, body: Bytes, state: &AppState) -> ApiResult<Upload> {
    let malformed = |words: String| ApiError(Error::invalid("body", format!("The form cannot be read: {words}.")));
    let mut request = Request::new(Body::from(body));
    *request.headers_mut() = parts.headers.clone();
    // With the router's `DefaultBodyLimit::disable()`, without which axum stops at 2 MiB: the size was checked above.
    *request.extensions_mut() = parts.extensions.clone();
    let mut form =
        Multipart::from_request(request, state).await.map_err(|rejection| malformed(rejection.body_text()))?;
    let mut upload = empty();
    let (mut config, mut model, mut archive) = (None, None, None);
    while let Some(field) = form.next_field().await.map_err(|error| malformed(error.body_text()))? {
        match field.name().unwrap_or_default() {
            "adapter_config" => config = Some(bytes_of(field, "adapter_config").await?),
            "adapter_model" => model = Some(bytes_of(field, "adapter_model").await?),
            "archive" => archive = Some(bytes_of(field, "archive").await?),
            "name" => upload.name = Some(text_of(field, "name").await?),
            "on_conflict" => upload.on_conflict = Some(text_of(field, "on_conflict").await?),
            "fingerprint" => upload.fingerprint = Some(text_of(field, "fingerprint").await?),
            "public" => upload.public = Some(json_of(field, "public").await?),
            "force" => upload.force = json_of(field, "force").await?,
            "metadata" => upload.metadata = Some(json_of(field, "metadata").await?),
            _ => {}
        }
    }
    let missing = |part: &str| Error::invalid(part, format!("The form has no part '{part}'."));
    upload.content = Some(match (config, model, archive) {
        (None, None, Some(archive)) => Content::Archive(archive),
        (_, _, Some(_)) => {
            let message = "Give 'archive', or 'adapter_config' and 'adapter_model', not both.";
            return Err(Error::invalid("archive", message).into());
        }
        (Some(config), Some(model), None) => Content::Peft { config, model },
        (None, _, None) => return Err(missing("adapter_config").into()),
        (_, None, None) => return Err(missing("adapter_model").into()),
    });
    Ok(upload)
}

async fn bytes_of(field: Field<'_>, part: &str) -> ApiResult<Bytes> {
    let unread = |words: String| Error::invalid(part, format!("The part '{part}' cannot be read: {words}."));
    Ok(field.bytes().await.map_err(|error| unread(error.body_text()))?)
}

async fn text_of(field: Field<'_>, part: &str) -> ApiResult<String> {
    let bytes = bytes_of(field, part).await?;
    Ok(String::from_utf8(bytes.into()).map_err(|_| Error::invalid(part, format!("The part '{part}' is not UTF-8.")))?)
}

async fn json_of<T: serde::de::DeserializeOwned>(field: Field<'_>, part: &str) -> ApiResult<T> {
    let bytes = bytes_of(field, part).await?;
    Ok(serde_json::from_slice(&bytes).map_err(|error| Error::invalid(part, format!("The part '{part}': {error}.")))?)
}
