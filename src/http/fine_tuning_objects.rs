//! Training jobs in OpenAI's words.

use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use crate::service::{
    EventRecord,
    training::{CheckpointInfo, HYPERPARAMETERS, JobInfo, JobSpec, Method},
};

/// A job in OpenAI's words.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningJob {
    /// Its id.
    pub(super) id: String,
    /// `fine_tuning.job`
    pub(super) object: &'static str,
    /// Unix seconds.
    pub(super) created_at: i64,
    /// Unix seconds of its end.
    #[schema(required = true)]
    pub(super) finished_at: Option<i64>,
    /// `validating_files`, `queued`, `running`, `paused`, `succeeded`, `failed` or `cancelled`.
    pub(super) status: &'static str,
    /// The base's id.
    pub(super) model: String,
    /// The adapter, once it is published.
    #[schema(value_type = String, required = true, nullable = true)]
    pub(super) fine_tuned_model: Value,
    /// Always empty: a job belongs to a tenant.
    pub(super) organization_id: &'static str,
    /// Null for a job whose data came with its request.
    #[schema(required = true)]
    pub(super) training_file: Option<String>,
    /// Held-out items.
    #[schema(required = true)]
    pub(super) validation_file: Option<String>,
    /// Always empty: results are in the events.
    pub(super) result_files: [String; 0],
    /// Of completions and demonstrations, once it has succeeded.
    #[schema(value_type = i64, required = true, nullable = true)]
    pub(super) trained_tokens: Value,
    /// `{"code", "message", "param"}` when it has failed. Code `job_damaged`: it cannot be read from the store.
    #[schema(value_type = Object, required = true, nullable = true)]
    pub(super) error: Value,
    /// `n_epochs`, `batch_size`, `learning_rate_multiplier`
    #[schema(value_type = Object)]
    pub(super) hyperparameters: Value,
    /// As in the request; its type is `unknown` of a job that is damaged in the store.
    #[schema(value_type = Object)]
    pub(super) method: Value,
    /// Of every random choice.
    pub(super) seed: u64,
    /// Not known.
    #[schema(required = true)]
    pub(super) estimated_finish: Option<i64>,
    /// Always empty.
    pub(super) integrations: [String; 0],
    /// What the owner wrote.
    #[schema(value_type = Object)]
    pub(super) metadata: Map<String, Value>,
}

impl FineTuningJob {
    pub(super) fn of(info: JobInfo, base: &str) -> Self {
        let status = match info.status.as_str() {
            "validating" => "validating_files",
            other => other,
        };
        let mut object = Self {
            id: info.id,
            object: "fine_tuning.job",
            created_at: info.created_at,
            finished_at: info.finished_at,
            status,
            model: base.to_owned(),
            fine_tuned_model: info.result["adapter"].clone(),
            organization_id: "",
            training_file: None,
            validation_file: None,
            result_files: [],
            trained_tokens: info.result["trained_tokens"].clone(),
            error: info.error,
            hyperparameters: json!({}),
            // Of a job that is damaged in the store.
            method: json!({"type": "unknown"}),
            seed: 0,
            estimated_finish: None,
            integrations: [],
            metadata: Map::new(),
        };
        if let Some(spec) = info.spec {
            (object.method, object.hyperparameters) = method(&spec);
            object.training_file = spec.training_file;
            object.validation_file = spec.validation_file;
            object.seed = spec.seed;
            object.metadata = spec.metadata;
        }
        object
    }
}

/// `method`, and `hyperparameters` as they were before there were methods.
fn method(spec: &JobSpec) -> (Value, Value) {
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
    (method, theirs)
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
    pub(super) object: &'static str,
    /// The newest first.
    pub(super) data: Vec<FineTuningJob>,
    /// Are there more after the last one?
    pub(super) has_more: bool,
}

/// Something that happened to a job.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningEvent {
    /// Names the event for `after`.
    pub(super) id: String,
    /// `fine_tuning.job.event`
    pub(super) object: &'static str,
    /// Unix seconds.
    pub(super) created_at: i64,
    /// `info`, `warn` or `error`.
    pub(super) level: String,
    /// In words.
    pub(super) message: String,
    /// `metrics` for a step, else `message`.
    pub(super) r#type: &'static str,
    /// In numbers.
    #[schema(value_type = Object)]
    pub(super) data: Value,
}

impl FineTuningEvent {
    pub(super) fn of(record: EventRecord, job: &str) -> Self {
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
    pub(super) object: &'static str,
    /// The newest first.
    pub(super) data: Vec<FineTuningEvent>,
    /// Are there more after the last one?
    pub(super) has_more: bool,
}

/// A checkpoint.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningCheckpoint {
    /// Its id.
    pub(super) id: String,
    /// `fine_tuning.job.checkpoint`
    pub(super) object: &'static str,
    /// Unix seconds.
    pub(super) created_at: i64,
    /// What `model` names to run the checkpoint: its numbers travel in the name. Null for a scheme other than the default one.
    #[schema(required = true)]
    pub(super) fine_tuned_model_checkpoint: Option<String>,
    /// The job.
    pub(super) fine_tuning_job_id: String,
    /// Of the step.
    #[schema(value_type = Object)]
    pub(super) metrics: Value,
    /// Steps done.
    pub(super) step_number: u64,
}

/// A page of checkpoints.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FineTuningCheckpointList {
    /// `list`
    pub(super) object: &'static str,
    /// The newest first.
    pub(super) data: Vec<FineTuningCheckpoint>,
    /// Are there more after the last one?
    pub(super) has_more: bool,
    /// The first one's id.
    #[schema(required = true)]
    pub(super) first_id: Option<String>,
    /// The last one's id.
    #[schema(required = true)]
    pub(super) last_id: Option<String>,
}

impl FineTuningCheckpoint {
    pub(super) fn of(info: CheckpointInfo, job: &str) -> Self {
        Self {
            id: format!("ftckpt-{}-{}", job.trim_start_matches("ftjob-"), info.step),
            object: "fine_tuning.job.checkpoint",
            created_at: info.created_at,
            fine_tuned_model_checkpoint: info.model,
            fine_tuning_job_id: job.to_owned(),
            metrics: info.metrics,
            step_number: info.step,
        }
    }
}
