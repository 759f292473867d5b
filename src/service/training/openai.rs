//! `fine_tuning.jobs.create` in our own terms: the same jobs under OpenAI's names.

use std::sync::Arc;

use mote_trainer::{FIELDS, HyperparameterError, Hyperparameters, Method, openai};
use serde_json::{Map, Value};

use super::{DataSource, JobInfo, JobRetry, Origin, TrainRequest, jobs::new_job_id};
use crate::{
    service::{Error, ErrorKind, Service},
    tenant::Caller,
};

/// What OpenAI's client sends. Nothing is checked yet.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct FineTuningRequest {
    /// The base's id, or an adapter to go on from.
    pub model: Option<String>,
    /// A file of `/v1/files`.
    pub training_file: Option<String>,
    /// Another.
    pub validation_file: Option<String>,
    /// `{"type": "supervised" | "reinforcement", ..}`; supervised by default.
    pub method: Option<Value>,
    /// Of supervised jobs, as older clients send them.
    pub hyperparameters: Option<Value>,
    /// Begins the adapter's name.
    pub suffix: Option<String>,
    /// Of every random choice.
    pub seed: Option<u64>,
    /// Kept with job and adapter.
    pub metadata: Option<Map<String, Value>>,
    /// Our own: the adapter's whole name.
    pub name: Option<String>,
    /// Our own.
    pub scheme: Option<Value>,
    /// Our own: a template for items without `messages`.
    pub prompt: Option<Value>,
}

/// OpenAI's own names of hyperparameters; ours may stand beside them.
const THEIRS: [&str; 7] = [
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "compute_multiplier",
    "eval_interval",
    "eval_samples",
    "reasoning_effort",
];

/// `method`, read.
struct Read {
    /// `supervised` or `reinforcement`.
    kind: &'static str,
    method: Method,
    grader: Option<Value>,
    hyperparameters: Value,
}

impl Service {
    /// Makes a job as OpenAI's client asks for it.
    ///
    /// # Errors
    /// Those of [`Service::train`], under OpenAI's names of the fields.
    pub async fn fine_tune(
        self: &Arc<Self>,
        caller: &Caller,
        request: FineTuningRequest,
        retry: Option<JobRetry>,
    ) -> Result<JobInfo, Error> {
        let model = &*request.model.ok_or_else(|| Error::invalid("model", "'model' is required."))?;
        let init_from = self.model_to_train(model);
        if request.training_file.is_none() {
            return Err(Error::invalid("training_file", "'training_file' is required."));
        }
        let read = read_method(request.method.as_ref(), request.hyperparameters.as_ref())?;
        let kind = read.kind;
        let hyperparameters = serde_json::to_value(hyperparameters(&read)?).map_err(Error::internal)?;
        let id = new_job_id();
        let own_name = request.name.is_some();
        let name = request
            .name
            .unwrap_or_else(|| format!("{}-{}", request.suffix.as_deref().unwrap_or("ft"), &id[id.len() - 8..]));
        let request = TrainRequest {
            name: Some(name),
            method: Some(read.method.name().to_owned()),
            on_conflict: None,
            scheme: request.scheme,
            init_from,
            training: DataSource { inline: None, file: request.training_file },
            validation: DataSource { inline: None, file: request.validation_file },
            prompt: request.prompt,
            grader: read.grader,
            hyperparameters: Some(hyperparameters),
            seed: request.seed,
            full_precision: false,
            metadata: request.metadata,
            origin: Origin::FineTuning,
        };
        self.train_as(caller, id, request, retry).await.map_err(|error| match (error.kind, error.param.as_deref()) {
            (ErrorKind::NotFound, Some("init_from")) => Error::model_not_found(model),
            _ => renamed(error, kind, own_name),
        })
    }

    /// None for the base, else the name of the adapter to go on from.
    fn model_to_train(&self, model: &str) -> Option<String> {
        let base = &self.base.model_id;
        let name = model.strip_prefix(base.as_str()).and_then(|rest| rest.strip_prefix(':')).unwrap_or(model);
        (model != base).then(|| name.to_owned())
    }
}

fn read_method(method: Option<&Value>, older: Option<&Value>) -> Result<Read, Error> {
    let older = older.cloned().unwrap_or_default();
    let Some(method) = method.filter(|method| !method.is_null()) else {
        return Ok(Read { kind: "supervised", method: Method::Sft, grader: None, hyperparameters: older });
    };
    let object = method.as_object().ok_or_else(|| Error::invalid("method", "'method' must be an object."))?;
    let kind = match object.get("type").and_then(Value::as_str) {
        Some("supervised") => "supervised",
        Some("reinforcement") => "reinforcement",
        Some(other) => {
            let message = format!("'method.type' is 'supervised' or 'reinforcement'; '{other}' is not supported.");
            return Err(Error::invalid("method.type", message));
        }
        None => return Err(Error::invalid("method.type", "'method.type' is required.")),
    };
    known_keys("method", object, &["type", kind])?;
    let empty = Map::new();
    let own = match object.get(kind) {
        None | Some(Value::Null) => &empty,
        Some(Value::Object(own)) => own,
        Some(_) => return Err(Error::invalid(format!("method.{kind}"), format!("'method.{kind}' must be an object."))),
    };
    let path = format!("method.{kind}");
    let supervised = kind == "supervised";
    let known: &[&str] =
        if supervised { &["hyperparameters"] } else { &["hyperparameters", "grader", "response_format"] };
    known_keys(&path, own, known)?;
    if own.get("response_format").is_some_and(|format| !format.is_null()) {
        let field = "method.reinforcement.response_format";
        return Err(Error::invalid(field, format!("'{field}' is not supported by this server.")));
    }
    Ok(Read {
        kind,
        method: if supervised { Method::Sft } else { Method::Grpo },
        grader: own.get("grader").filter(|grader| !grader.is_null()).cloned(),
        hyperparameters: own.get("hyperparameters").cloned().unwrap_or(older),
    })
}

fn known_keys(path: &str, object: &Map<String, Value>, known: &[&str]) -> Result<(), Error> {
    match object.iter().find(|(key, value)| !value.is_null() && !known.contains(&key.as_str())) {
        None => Ok(()),
        Some((key, _)) => {
            let shown: String = key.chars().take(64).collect();
            let message = format!("'{path}.{shown}' is unknown; known are {}.", known.join(", "));
            Err(Error::invalid(format!("{path}.{shown}"), message))
        }
    }
}

/// OpenAI's names are translated, ours taken as they are.
fn hyperparameters(read: &Read) -> Result<Hyperparameters, Error> {
    let failed = |error: HyperparameterError| {
        let error = super::spec::hyper_error(&error);
        renamed(error, read.kind, false)
    };
    let Value::Object(object) = &read.hyperparameters else {
        return openai::hyperparameters(read.method, &read.hyperparameters).map_err(failed);
    };
    let ours = |name: &str| !THEIRS.contains(&name) && FIELDS.iter().any(|field| field.name == name);
    let (own, theirs): (Map<_, _>, Map<_, _>) = object.clone().into_iter().partition(|(name, _)| ours(name));
    let translated = openai::hyperparameters(read.method, &Value::Object(theirs)).map_err(failed)?;
    let mut all = match serde_json::to_value(translated) {
        Ok(Value::Object(all)) => all,
        _ => Map::new(),
    };
    all.extend(own.into_iter().filter(|(_, value)| !value.is_null()));
    Hyperparameters::from_json(&Value::Object(all)).map_err(failed)
}

/// An error under the path of OpenAI's field.
fn renamed(mut error: Error, kind: &str, own_name: bool) -> Error {
    let Some(param) = error.param.take() else { return error };
    let field = if param.starts_with("hyperparameters") {
        format!("method.{kind}.{param}")
    } else if param.starts_with("grader") {
        format!("method.reinforcement.{param}")
    } else if param == "init_from" {
        "model".to_owned()
    } else if param == "name" && !own_name {
        "suffix".to_owned()
    } else {
        param.clone()
    };
    error.message = error.message.replace(&format!("'{param}'"), &format!("'{field}'"));
    error.param = Some(field);
    error
}
