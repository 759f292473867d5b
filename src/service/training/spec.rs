//! What a client asks for, and what of it is kept with the job.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mote_trainer::{HyperparameterError, Hyperparameters, Method};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{
    adapter::{NumberType, Scheme, codec},
    service::{
        Error, ErrorKind, Service,
        resolve::scheme_error,
        upload::{conflict_of, metadata_text},
    },
    store::OnConflict,
    tenant::Caller,
};

/// Which API a job was made with: the one whose words it speaks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// `POST /adapters/train`
    #[default]
    Adapters,
    /// `POST /v1/fine_tuning/jobs`
    FineTuning,
}

/// A data set as a client gives it: at most one of the two.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DataSource {
    /// A list of items, or a string of JSON lines.
    pub inline: Option<Value>,
    /// A file of `/v1/files`.
    pub file: Option<String>,
}

/// What a client wants trained. Nothing is checked yet.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainRequest {
    /// The adapter's name; None when the client gave none.
    pub name: Option<String>,
    /// `grpo` (the default), `es` or `sft`.
    pub method: Option<String>,
    /// `error` (the default) or `new_generation`.
    pub on_conflict: Option<String>,
    /// A scheme's name or description; None is that of `init_from`, or the default.
    pub scheme: Option<Value>,
    /// An adapter to go on from; None begins at the base.
    pub init_from: Option<String>,
    /// What to learn from.
    pub training: DataSource,
    /// What to measure on.
    pub validation: DataSource,
    /// A template for items without `messages`.
    pub prompt: Option<Value>,
    /// What gives a completion its reward.
    pub grader: Option<Value>,
    /// In our own names.
    pub hyperparameters: Option<Value>,
    /// Of every random choice; 0 by default.
    pub seed: Option<u64>,
    /// Also measure the adapter before it is rounded.
    pub full_precision: bool,
    /// Kept with job and adapter.
    pub metadata: Option<Map<String, Value>>,
    /// The API that it came by.
    pub origin: Origin,
}

/// What is kept of a request: everything that a worker needs but the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobSpec {
    /// How it learns.
    pub method: Method,
    /// Must the name be free when the adapter is published?
    pub name_must_be_free: bool,
    /// May the result replace an adapter that is public by then? Only an admin's may.
    #[serde(default)]
    pub by_admin: bool,
    /// The scheme's full description.
    pub scheme: Value,
    /// The base that the numbers are for; another base cannot go on with them.
    pub fingerprint: String,
    /// The adapter that it began with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_from: Option<String>,
    /// That adapter's numbers when the job was made: f32 in base64. None: zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// The file that the data came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training_file: Option<String>,
    /// The file that the validation data came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub validation_file: Option<String>,
    /// A template for items without `messages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<Value>,
    /// What gives a completion its reward.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grader: Option<Value>,
    /// As given.
    pub hyperparameters: Hyperparameters,
    /// Of every random choice.
    pub seed: u64,
    /// Also measure the adapter before it is rounded.
    pub full_precision: bool,
    /// Kept with the adapter.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub metadata: Map<String, Value>,
    /// The API that it came by.
    pub origin: Origin,
    /// The id of the request that made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request: Option<String>,
}

/// What is told of a job that is not in the store as this program wrote it.
pub(super) fn damaged_job() -> Error {
    let message = "The job is damaged in the server's store and does not go on; not all that is shown of it may be right. Make it anew.";
    Error::new(ErrorKind::Internal, message).with_code("job_damaged")
}

/// The same for a worker that found it so; the cause goes to the log.
pub(super) fn damaged(cause: impl std::fmt::Display) -> Error {
    tracing::error!(%cause, "a training job is damaged in the store");
    damaged_job()
}

impl JobSpec {
    /// The scheme.
    ///
    /// # Errors
    /// A description that this program cannot have written.
    pub(super) fn read_scheme(&self) -> Result<Scheme, Error> {
        Scheme::from_json(&self.scheme).map_err(damaged)
    }

    /// The numbers to begin with, so many.
    ///
    /// # Errors
    /// Bytes that this program cannot have written.
    pub(super) fn initial(&self, numbers: usize) -> Result<Vec<f32>, Error> {
        let Some(text) = &self.init else { return Ok(vec![0.0; numbers]) };
        let bytes = STANDARD.decode(text).map_err(damaged)?;
        codec::decode(&bytes, NumberType::F32, numbers).map_err(damaged)
    }
}

/// A request whose fields are right.
pub(super) struct Checked {
    pub(super) name: String,
    /// The scheme that it asks for.
    pub(super) scheme: Option<Scheme>,
    pub(super) spec: JobSpec,
}

impl Service {
    /// Checks everything of a request but its data and the adapter to go on from, which is looked up when all fields are right.
    ///
    /// # Errors
    /// 400 or 409, each naming the field.
    pub(super) fn check_training(&self, caller: &Caller, request: &TrainRequest) -> Result<Checked, Error> {
        let method = method(request.method.as_deref())?;
        let given = match &request.scheme {
            None | Some(Value::Null) => None,
            Some(value) => Some(Scheme::from_json(value).map_err(|error| scheme_error(&error, ""))?),
        };
        if given.is_some() || request.init_from.is_none() {
            self.check_scheme(given.as_ref().unwrap_or(&Scheme::default()), "")?;
        }
        // What the upload of the result will be checked for.
        let name = self.name_of(request.name.as_deref())?;
        let name_must_be_free = conflict_of(request.on_conflict.as_deref())? == OnConflict::Error;
        metadata_text(&published_metadata(&request.metadata.clone().unwrap_or_default(), &"0".repeat(38)))?;
        let hyperparameters = match &request.hyperparameters {
            None | Some(Value::Null) => Hyperparameters::default(),
            Some(value) => Hyperparameters::from_json(value).map_err(|error| hyper_error(&error))?,
        };
        for (source, inline, file) in
            [(&request.training, "dataset", "training_file"), (&request.validation, "validation", "validation_file")]
        {
            if source.inline.is_some() && source.file.is_some() {
                return Err(Error::invalid(inline, format!("Give '{inline}' or '{file}', not both.")));
            }
        }
        if request.training == DataSource::default() {
            return Err(Error::invalid("dataset", "'dataset' (or 'training_file') is required."));
        }
        let spec = JobSpec {
            method,
            name_must_be_free,
            by_admin: caller.is_admin(),
            scheme: given.clone().unwrap_or_default().to_full_json(),
            fingerprint: self.base.fingerprint.to_string(),
            init_from: request.init_from.clone(),
            init: None,
            training_file: request.training.file.clone(),
            validation_file: request.validation.file.clone(),
            prompt: request.prompt.clone().filter(|prompt| !prompt.is_null()),
            grader: request.grader.clone().filter(|grader| !grader.is_null()),
            hyperparameters,
            seed: request.seed.unwrap_or(0),
            full_precision: request.full_precision,
            metadata: request.metadata.clone().unwrap_or_default(),
            origin: request.origin,
            request: caller.origin.request.as_deref().map(str::to_owned),
        };
        Ok(Checked { name, scheme: given, spec })
    }

    /// Looks up the adapter to go on from, if there is one: its scheme is trained, from its numbers on.
    ///
    /// # Errors
    /// 404, 422, 400; 500 adapter_damaged.
    pub(super) fn begin_from(&self, caller: &Caller, given: Option<&Scheme>, spec: &mut JobSpec) -> Result<(), Error> {
        let Some(name) = &spec.init_from else { return Ok(()) };
        let found = self.find(caller, name)?;
        let adapter = found.ok_or_else(|| Error::adapter_not_found(name, Some("init_from")))?.adapter;
        if !self.library.is_compatible(&adapter) {
            let (theirs, ours) = (adapter.facts().fingerprint, self.library.fingerprint);
            return Err(crate::service::resolve::incompatible(theirs, ours).with_param("init_from"));
        }
        let facts = adapter.facts();
        if facts.frame.is_some() || facts.approximate {
            let message = format!(
                "'init_from': '{name}' was imported with singular vectors of its own, or is for another base; only adapters of this server's basis can be trained further."
            );
            return Err(Error::invalid("init_from", message));
        }
        if given.is_some_and(|given| *given != facts.scheme) {
            let message = format!("'scheme' is not that of '{name}'; leave it out to go on from that adapter.");
            return Err(Error::invalid("scheme", message));
        }
        self.check_scheme(&facts.scheme, "")?;
        let numbers: Vec<f32> = adapter.numbers().collect();
        let bytes = codec::encode(&numbers, NumberType::F32).map_err(Error::internal)?;
        spec.init = Some(STANDARD.encode(bytes));
        spec.scheme = facts.scheme.to_full_json();
        Ok(())
    }
}

/// What the published adapter shows: the owner's words, and the job that made it.
pub(super) fn published_metadata(own: &Map<String, Value>, job: &str) -> Map<String, Value> {
    let mut metadata = own.clone();
    metadata.insert("job".to_owned(), Value::String(job.to_owned()));
    metadata
}

fn method(name: Option<&str>) -> Result<Method, Error> {
    let Some(name) = name else { return Ok(Method::Grpo) };
    let known = [Method::Grpo, Method::Es, Method::Sft].into_iter().find(|method| method.name() == name);
    known.ok_or_else(|| Error::invalid("method", "'method' is 'grpo', 'es' or 'sft'."))
}

/// The trainer's words under the field's path.
pub(super) fn hyper_error(error: &HyperparameterError) -> Error {
    let param =
        if error.field.is_empty() { "hyperparameters".to_owned() } else { format!("hyperparameters.{}", error.field) };
    let message = format!("'{param}': {}.", error.message.trim_end_matches('.'));
    Error::invalid(param, message)
}
