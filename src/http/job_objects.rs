//! Training jobs as `/adapters/train` shows them.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{
        RefOr,
        schema::{AdditionalProperties, ObjectBuilder, Schema, Type},
    },
};

use super::schemas;
use crate::service::{
    EventRecord, SamplesRecord,
    training::{CheckpointInfo, HYPERPARAMETERS, Hyperparameter, JobInfo, Method},
};

/// Hyperparameters, as the table of the trainer describes them.
pub(super) struct HyperparametersSchema;

impl PartialSchema for HyperparametersSchema {
    fn schema() -> RefOr<Schema> {
        let mut object = ObjectBuilder::new().schema_type(Type::Object);
        for field in HYPERPARAMETERS {
            object = object.property(field.name, hyperparameter(field));
        }
        let words = "All optional. Unknown names are refused, and so are those that mean nothing to the method.";
        object
            .description(Some(words))
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)))
            .into()
    }
}

impl ToSchema for HyperparametersSchema {
    fn name() -> std::borrow::Cow<'static, str> {
        "Hyperparameters".into()
    }
}

fn hyperparameter(field: &Hyperparameter) -> Schema {
    let default = |method: Method| match field.name {
        // Steps are given unless epochs are.
        "epochs" => Value::Null,
        _ => (field.default)(method),
    };
    let first = field.methods.first().copied().unwrap_or(Method::Grpo);
    let value = (field.default)(first);
    let kind = match &value {
        Value::Bool(_) => Type::Boolean,
        Value::String(_) => Type::String,
        Value::Number(number) if number.is_u64() => Type::Integer,
        _ => Type::Number,
    };
    let mut words = field.about.to_owned();
    for &method in field.methods.iter().filter(|method| default(**method) != default(first)) {
        words += &format!(" For {} the default is {}.", method.name(), default(method));
    }
    let methods: Vec<&str> = field.methods.iter().map(|method| method.name()).collect();
    if methods.len() < 3 {
        words += &format!(" Only for {}.", methods.join(" and "));
    }
    let mut object = ObjectBuilder::new().schema_type(kind).description(Some(words));
    if field.maximum > field.minimum {
        object = object.minimum(Some(field.minimum)).maximum(Some(field.maximum));
    }
    if !default(first).is_null() {
        object = object.default(Some(default(first)));
    }
    object.into()
}

/// A training job.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobObject {
    /// Its id.
    #[schema(example = "ftjob-0198c0ffee0070008000000000000001")]
    pub(super) id: String,
    /// `adapter.training_job`
    pub(super) object: &'static str,
    /// The name that the adapter gets.
    pub(super) name: String,
    /// `validating`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    pub(super) status: &'static str,
    /// `grpo`, `es` or `sft`; `unknown` of a job that is damaged in the store.
    pub(super) method: &'static str,
    /// Steps reported.
    pub(super) step: u64,
    /// Steps planned; 0 while that is not known.
    pub(super) steps: u64,
    /// Unix seconds.
    pub(super) created_at: i64,
    /// Unix seconds of its first start.
    #[schema(required = true)]
    pub(super) started_at: Option<i64>,
    /// Unix seconds of its end.
    #[schema(required = true)]
    pub(super) finished_at: Option<i64>,
    /// Of the last step: rewards, KL, entropy, lengths, differences of log-probs, gradient, learning rate, tokens a second.
    #[schema(value_type = Object, required = true, nullable = true)]
    pub(super) metrics: Value,
    /// `{"adapter", "generation", "steps", "end", "trained_tokens", "validation": {"zero": {"reward", "interval", "sampled", "n"}, "adapter": {..}, "gain": {..}}}` once it has
    /// succeeded.
    #[schema(value_type = Object, required = true, nullable = true)]
    pub(super) result: Value,
    /// `{"code", "message", "param"}` when it has failed. Code `job_damaged`: it cannot be read from the store.
    #[schema(value_type = Object, required = true, nullable = true)]
    pub(super) error: Value,
    /// As given; what is missing has its default.
    #[schema(value_type = HyperparametersSchema)]
    pub(super) hyperparameters: Value,
    /// The scheme's description.
    #[schema(value_type = schemas::SchemeDescription)]
    pub(super) scheme: Value,
    /// The grader's description.
    #[schema(value_type = Option<schemas::Grader>, required = true)]
    pub(super) grader: Value,
    /// The adapter that it began with.
    #[schema(required = true)]
    pub(super) init_from: Option<String>,
    /// The file that the data came from.
    #[schema(required = true)]
    pub(super) training_file: Option<String>,
    /// The file that the validation data came from.
    #[schema(required = true)]
    pub(super) validation_file: Option<String>,
    /// Of every random choice.
    pub(super) seed: u64,
    /// What the owner wrote.
    #[schema(value_type = Object)]
    pub(super) metadata: Map<String, Value>,
}

impl From<JobInfo> for JobObject {
    fn from(info: JobInfo) -> Self {
        let JobInfo {
            id,
            name,
            status,
            step,
            steps,
            created_at,
            started_at,
            finished_at,
            metrics,
            result,
            error,
            spec,
        } = info;
        let mut object = Self {
            id,
            object: "adapter.training_job",
            name,
            status: status.as_str(),
            method: "unknown",
            step,
            steps,
            created_at,
            started_at,
            finished_at,
            metrics,
            result,
            error,
            hyperparameters: Value::Object(Map::new()),
            scheme: Value::Object(Map::new()),
            grader: Value::Null,
            init_from: None,
            training_file: None,
            validation_file: None,
            seed: 0,
            metadata: Map::new(),
        };
        if let Some(spec) = spec {
            object.method = spec.method.name();
            // A struct of plain fields: it can be written.
            object.hyperparameters = serde_json::to_value(&spec.hyperparameters).unwrap_or_default();
            object.scheme = spec.scheme;
            object.grader = spec.grader.unwrap_or_default();
            object.init_from = spec.init_from;
            object.training_file = spec.training_file;
            object.validation_file = spec.validation_file;
            object.seed = spec.seed;
            object.metadata = spec.metadata;
        }
        object
    }
}

/// A page of jobs.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct JobList {
    /// `list`
    pub(super) object: &'static str,
    /// The newest first.
    pub(super) data: Vec<JobObject>,
    /// Are there more after the last one?
    pub(super) has_more: bool,
}

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventObject {
    /// 1, 2, ... without gaps; what `Last-Event-ID` and `after` name.
    pub(super) id: u64,
    /// `adapter.training_event`
    pub(super) object: &'static str,
    /// `status`, `step`, `checkpoint`, `notice`, `evaluation` or `result`.
    pub(super) r#type: String,
    /// `info`, `warn` or `error`.
    pub(super) level: String,
    /// In words.
    pub(super) message: String,
    /// In numbers: the metrics of a step, the new status, the result.
    #[schema(value_type = Object)]
    pub(super) data: Value,
    /// Unix seconds.
    pub(super) created_at: i64,
}

impl From<EventRecord> for EventObject {
    fn from(record: EventRecord) -> Self {
        Self {
            id: record.seq,
            object: "adapter.training_event",
            r#type: record.kind,
            level: record.level,
            message: record.message,
            data: serde_json::from_str(&record.data).unwrap_or_default(),
            created_at: record.created_at,
        }
    }
}

/// A page of events.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct EventList {
    /// `list`
    pub(super) object: &'static str,
    /// The oldest first.
    pub(super) data: Vec<EventObject>,
    /// Are there more after the last one, by now?
    pub(super) has_more: bool,
}

/// Where a run can go on from.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CheckpointObject {
    /// `adapter.training_checkpoint`
    pub(super) object: &'static str,
    /// Steps done.
    pub(super) step: u64,
    /// Of the step.
    #[schema(value_type = Object)]
    pub(super) metrics: Value,
    /// The numbers after it, rounded to bf16, in base64: they can be uploaded.
    pub(super) data: String,
    /// What `model` names to run these numbers inside a request; null for a scheme other than the default one.
    #[schema(required = true)]
    pub(super) model: Option<String>,
    /// Unix seconds.
    pub(super) created_at: i64,
}

impl From<CheckpointInfo> for CheckpointObject {
    fn from(info: CheckpointInfo) -> Self {
        let CheckpointInfo { step, metrics, data, model, created_at } = info;
        Self { object: "adapter.training_checkpoint", step, metrics, data, model, created_at }
    }
}

/// The checkpoints that are kept.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CheckpointList {
    /// `list`
    pub(super) object: &'static str,
    /// The newest first.
    pub(super) data: Vec<CheckpointObject>,
    /// Always false: the list is whole.
    pub(super) has_more: bool,
}

/// Graded completions to look at.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SamplesObject {
    /// `adapter.training_samples`
    pub(super) object: &'static str,
    /// After which step.
    pub(super) step: u64,
    /// `training`, or of the evaluation: `zero`, `adapter`, `full_precision`.
    pub(super) phase: String,
    /// `{"item", "line", "text", "reward", "parts", "tokens", "finished"}` each; in an evaluation `temperature` says which completions are greedy (0).
    #[schema(value_type = Vec<Object>)]
    pub(super) samples: Value,
    /// Unix seconds.
    pub(super) created_at: i64,
}

impl From<SamplesRecord> for SamplesObject {
    fn from(record: SamplesRecord) -> Self {
        Self {
            object: "adapter.training_samples",
            step: record.step,
            phase: record.phase,
            samples: serde_json::from_str(&record.samples).unwrap_or_default(),
            created_at: record.created_at,
        }
    }
}

/// Samples of steps.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct SamplesList {
    /// `list`
    pub(super) object: &'static str,
    /// The newest step first.
    pub(super) data: Vec<SamplesObject>,
    /// Are there more before the last one?
    pub(super) has_more: bool,
}
