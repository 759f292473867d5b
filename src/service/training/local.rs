//! Training and evaluation in this process, without store, tenants and jobs: what `mote train` and `mote eval` are made of.

use std::sync::Arc;

use mote_trainer::{
    Hyperparameters, Method, Policy, PolicyError, Stop,
    data::{self, PromptTemplate, ReadOptions},
};
use serde_json::{Map, Value, json};

use super::{
    EnginePolicies, PolicyRequest, PolicySource, TrainingConfig,
    prepare::{Prepared, prepare},
    spec::{JobSpec, Origin, hyper_error},
};
use crate::{
    adapter::{Basis, NumberType, Scheme, codec},
    engine::Handle,
    service::{BaseInfo, Error, Library, resolve::scheme_error},
    types::TenantId,
};

/// What is to be trained, or measured.
#[derive(Debug, Clone)]
pub struct LocalTask {
    /// How it learns.
    pub method: Method,
    /// A scheme's name or description; None is the default.
    pub scheme: Option<Value>,
    /// A template for items without `messages`.
    pub prompt: Option<Value>,
    /// A grader's description, or only its type: then its reference is the answer of the item.
    pub grader: Option<Value>,
    /// By name.
    pub hyperparameters: Value,
    /// Of every random choice.
    pub seed: u64,
    /// The bytes of a data set.
    pub training: Vec<u8>,
    /// The bytes of another.
    pub validation: Option<Vec<u8>>,
}

/// A base in this process, for one user.
pub struct Local {
    base: Arc<BaseInfo>,
    policies: EnginePolicies,
    config: TrainingConfig,
}

impl Local {
    /// Over a base that runs. Within a runtime.
    pub fn new(base: BaseInfo, basis: Basis, engine: Handle, config: TrainingConfig) -> Self {
        let library = Arc::new(Library::new(base.sites.clone(), Arc::new(basis), base.rank));
        let base = Arc::new(base);
        let policies = EnginePolicies::new(engine, base.clone(), library, Arc::default());
        Self { base, policies, config }
    }

    /// What is fixed about the base.
    pub fn base(&self) -> &BaseInfo {
        &self.base
    }

    /// Checks and encodes everything of a task.
    ///
    /// # Errors
    /// 400 that names the field, and the line of a data set.
    pub fn prepare(&self, task: &LocalTask) -> Result<Prepared, Error> {
        self.policies.supports(task.method).map_err(|reason| Error::invalid("rank", reason))?;
        let scheme = match &task.scheme {
            None => Scheme::default(),
            Some(value) => Scheme::from_json(value).map_err(|error| scheme_error(&error, ""))?,
        };
        let checked = scheme.validate(&self.base.sites, self.base.rank);
        checked.map_err(|error| scheme_error(&error, ""))?;
        let hyperparameters = Hyperparameters::from_json(&task.hyperparameters).map_err(|error| hyper_error(&error))?;
        let spec = JobSpec {
            method: task.method,
            name_must_be_free: false,
            by_admin: false,
            scheme: scheme.to_full_json(),
            fingerprint: self.base.fingerprint.to_string(),
            init_from: None,
            init: None,
            training_file: None,
            validation_file: None,
            prompt: task.prompt.clone(),
            grader: self.grader(task)?,
            hyperparameters,
            seed: task.seed,
            full_precision: false,
            metadata: Map::new(),
            origin: Origin::Adapters,
            request: None,
        };
        prepare(&self.base, &self.config, &spec, &task.training, task.validation.as_deref())
    }

    /// A type alone becomes a grader of that type against the item's answer.
    fn grader(&self, task: &LocalTask) -> Result<Option<Value>, Error> {
        let Some(Value::String(kind)) = &task.grader else { return Ok(task.grader.clone()) };
        let template = task.prompt.as_ref().map(PromptTemplate::from_json).transpose();
        let template = template.map_err(|error| Error::invalid("prompt", format!("'prompt': {error}.")))?;
        let options =
            ReadOptions { supervised: task.method == Method::Sft, prompt: template.as_ref(), limits: self.config.data };
        let items = data::read_bytes(&task.training, &options)
            .map_err(|errors| Error::invalid("dataset", format!("'dataset': {errors}.")))?;
        let of_shape = items.first().and_then(|item| data::default_reference(&item.fields));
        Ok(Some(json!({"type": kind, "reference": of_shape.unwrap_or("{{item.answer}}")})))
    }

    /// The policy of a prepared task.
    ///
    /// # Errors
    /// The engine's.
    pub fn policy(&self, method: Method, prepared: &Prepared, stop: &Stop) -> Result<Box<dyn Policy>, PolicyError> {
        let (scheme, numbers) = (&prepared.scheme, prepared.numbers);
        self.policies.policy(&PolicyRequest { job: "local", tenant: TenantId(0), method, scheme, numbers, stop })
    }

    /// The numbers of a file: bf16 or f32 by its length.
    ///
    /// # Errors
    /// A length that fits no type, or numbers that are not finite.
    pub fn read_numbers(bytes: &[u8], numbers: usize) -> Result<Vec<f32>, Error> {
        let dtype = match bytes.len() {
            length if length == 2 * numbers => NumberType::Bf16,
            length if length == 4 * numbers => NumberType::F32,
            length => {
                let message = format!(
                    "the file has {length} bytes; {numbers} numbers take {} (bf16) or {} (f32)",
                    2 * numbers,
                    4 * numbers
                );
                return Err(Error::invalid("adapter", message));
            }
        };
        codec::decode(bytes, dtype, numbers).map_err(|error| Error::invalid("adapter", error.to_string()))
    }

    /// Numbers as the file of an adapter: bf16.
    ///
    /// # Errors
    /// Numbers that bf16 does not hold.
    pub fn write_numbers(numbers: &[f32]) -> Result<Vec<u8>, Error> {
        codec::encode(numbers, NumberType::Bf16).map_err(|error| Error::invalid("adapter", error.to_string()))
    }
}
