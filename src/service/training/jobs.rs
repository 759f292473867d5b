//! Jobs for their owners: make, look, pause, resume, cancel.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use mote_trainer::{Settings, data::PromptTemplate, round_to_bf16};
use serde_json::Value;

use super::{
    JobSpec, PolicySource, TrainRequest, Training, TrainingConfig, UNLIMITED,
    prepare::{build_described, check_sizes, inline_data, prepare},
    report::{self, event},
    spec::{Checked, damaged_job, hyper_error},
    worker::Saved,
};
use crate::{
    adapter::{NumberType, Scheme, codec},
    service::{Error, ErrorKind, Service, adapters::store_error, completion::blocking},
    store::{
        EventLevel, EventRecord, JobData, JobKey, JobRecord, JobStatus, JobStored, NewJob, SamplesRecord, StoreError,
    },
    tenant::Caller,
};

/// Longest key of a client.
const MAX_KEY: usize = 255;

/// Bytes of a job's prompt and grader together: they are kept with the job, and lists of jobs show them.
const MAX_DESCRIPTION: usize = 64 << 10;

/// A client's own key for a request, and the hash of what it asked.
#[derive(Debug, Clone)]
pub struct JobRetry {
    /// The route's name in the table of answers.
    pub route: &'static str,
    /// The header's value.
    pub key: String,
    /// Of the body.
    pub request_hash: [u8; 32],
}

/// A job as its owner sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// The name that the adapter gets.
    pub name: String,
    /// Where it stands.
    pub status: JobStatus,
    /// Steps reported.
    pub step: u64,
    /// Steps planned.
    pub steps: u64,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds of its first start.
    pub started_at: Option<i64>,
    /// Unix seconds of its end.
    pub finished_at: Option<i64>,
    /// Of the last step; null before.
    pub metrics: Value,
    /// Null until it has succeeded.
    pub result: Value,
    /// Null unless it has failed.
    pub error: Value,
    /// What it does; None when that cannot be read.
    pub spec: Option<JobSpec>,
}

/// A checkpoint as a job's owner sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckpointInfo {
    /// Steps done.
    pub step: u64,
    /// Of the step.
    pub metrics: Value,
    /// The numbers after it, rounded to bf16, in base64.
    pub data: String,
    /// How `model` names these numbers inside a request; None for a scheme other than the default one.
    pub model: Option<String>,
    /// Unix seconds.
    pub created_at: i64,
}

impl Service {
    /// Starts to train: takes jobs from the queue, first those that a former process left.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn start_training(
        self: &Arc<Self>,
        config: TrainingConfig,
        policies: Arc<dyn PolicySource>,
    ) -> Result<(), StoreError> {
        self.accounts.set_defaults(|limits| {
            let most = |most: u64| Some(most).filter(|most| *most != UNLIMITED);
            limits.running_jobs = most(config.running_of_tenant);
            limits.queued_jobs = most(config.most_of_tenant);
        });
        let training = Training::start(self, config, policies).await?;
        // A second call changes nothing but would leave two supervisors: the first one stays.
        if let Err(second) = self.training.set(training) {
            second.stop(std::time::Duration::ZERO).await;
        }
        Ok(())
    }

    /// What trains.
    ///
    /// # Errors
    /// 503 before it has started.
    pub fn training(&self) -> Result<&Training, Error> {
        self.training.get().ok_or_else(|| Error::new(ErrorKind::Unavailable, "Training has not started yet."))
    }

    /// Makes a job: everything that can be wrong with it is found now, or, with much data, while it is `validating`.
    ///
    /// # Errors
    /// 400 that names the field, 404, 409 name_taken, 422, 429.
    pub async fn train(
        self: &Arc<Self>,
        caller: &Caller,
        request: TrainRequest,
        retry: Option<JobRetry>,
    ) -> Result<JobInfo, Error> {
        self.train_as(caller, new_job_id(), request, retry).await
    }

    pub(super) async fn train_as(
        self: &Arc<Self>,
        caller: &Caller,
        id: String,
        request: TrainRequest,
        retry: Option<JobRetry>,
    ) -> Result<JobInfo, Error> {
        let training = self.training()?;
        let key = retry.map(job_key).transpose()?;
        if let Some(key) = &key {
            let known = self.store.kept_answer(caller.tenant, key.route, &key.key, &key.request_hash).await;
            if let Some(id) = known.map_err(|error| store_error(error, ""))? {
                return self.job(caller, &id).await;
            }
        }
        if training.is_stopping() {
            return Err(Error::new(ErrorKind::Unavailable, "The server is shutting down.").with_code("draining"));
        }
        let config = &training.inner.config;
        if config.running == 0 {
            return Err(Error::new(ErrorKind::Invalid, "This server does not train (--train-jobs 0)."));
        }
        let Checked { name, scheme, mut spec } = self.check_training(caller, &request)?;
        let supported = training.inner.policies.supports(spec.method);
        supported.map_err(|words| Error::invalid("method", format!("'method': {words}.")))?;
        check_cheap(&spec, config)?;
        // The form of what was sent is told before what is not there.
        let TrainRequest { training: learnt, validation: measured, .. } = request;
        let sent = inline_data(learnt.inline, "dataset", config.data)?;
        let sent_too = inline_data(measured.inline, "validation", config.data)?;
        self.begin_from(caller, scheme.as_ref(), &mut spec)?;
        let data = self.data_of(caller, sent, learnt.file, "training_file", config).await?;
        let data = data.ok_or_else(|| Error::invalid("dataset", "'dataset' is required."))?;
        let held_out = self.data_of(caller, sent_too, measured.file, "validation_file", config).await?;

        let at_once = data.len() + held_out.as_ref().map_or(0, Vec::len) <= config.checked_at_once;
        let mut parts = vec![(JobData::Training, data)];
        parts.extend(held_out.map(|data| (JobData::Validation, data)));
        let (status, steps, parts) = if at_once {
            let (base, config, checked) = (self.base.clone(), config.clone(), spec.clone());
            let check = move || {
                let validation = parts.get(1).map(|(_, bytes)| &bytes[..]);
                let prepared = prepare(&base, &config, &checked, &parts[0].1, validation)?;
                Ok((prepared.settings.steps, parts))
            };
            let (steps, parts) = blocking(check).await?;
            (JobStatus::Queued, steps, parts)
        } else {
            (JobStatus::Validating, spec.hyperparameters.steps.unwrap_or(0), parts)
        };
        let words = if at_once { "The job waits to start." } else { "The data is being checked." };
        let new = NewJob {
            id,
            tenant: caller.tenant,
            name: name.clone(),
            name_must_be_free: spec.name_must_be_free,
            status,
            spec: serde_json::to_string(&spec).map_err(Error::internal)?,
            steps,
            data: parts,
            limits: self.accounts.of(caller.tenant).limits(),
            most: config.most,
            key,
            event: event("status", EventLevel::Info, words, &serde_json::json!({"status": status.as_str()})),
        };
        let stored = self.store.by(caller.actor()).create_job(new).await.map_err(|error| job_error(error, &name))?;
        let job = match stored {
            JobStored::New(job) => {
                if job.status == JobStatus::Validating {
                    training.validate(job.clone());
                }
                training.changed();
                job
            }
            JobStored::Before(job) => job,
        };
        Ok(info(job))
    }

    /// The bytes of a data set, if there is one: what was sent, else what is in the file that was named.
    async fn data_of(
        &self,
        caller: &Caller,
        sent: Option<Vec<u8>>,
        file: Option<String>,
        param: &str,
        config: &TrainingConfig,
    ) -> Result<Option<Vec<u8>>, Error> {
        let (None, Some(id)) = (&sent, file) else { return Ok(sent) };
        let data = self.file_data(caller, &id).await.map_err(|error| error.with_param(param))?;
        check_sizes(param, &data, config.data)?;
        Ok(Some(data))
    }

    /// A job of the caller's.
    ///
    /// # Errors
    /// 404 job_not_found.
    pub async fn job(&self, caller: &Caller, id: &str) -> Result<JobInfo, Error> {
        Ok(info(self.own_job(caller, id).await?))
    }

    async fn own_job(&self, caller: &Caller, id: &str) -> Result<JobRecord, Error> {
        possible(id)?;
        self.store.job(caller.tenant, id).await.map_err(|error| job_error(error, id))
    }

    /// The caller's jobs, newest first: at most `limit` of those older than the job `after`; and whether there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn jobs(&self, caller: &Caller, after: Option<&str>, limit: u32) -> Result<(Vec<JobInfo>, bool), Error> {
        if after.is_some_and(|id| possible(id).is_err()) {
            return Ok((Vec::new(), false));
        }
        let mut jobs = self.store.jobs(caller.tenant, after, limit + 1).await.map_err(Error::store)?;
        let more = jobs.len() > limit as usize;
        jobs.truncate(limit as usize);
        Ok((jobs.into_iter().map(info).collect(), more))
    }

    /// Ends a job for good. It publishes nothing from then on.
    ///
    /// # Errors
    /// 404; 409 when it has ended otherwise.
    pub async fn cancel_job(&self, caller: &Caller, id: &str) -> Result<JobInfo, Error> {
        possible(id)?;
        let store = self.store.by(caller.actor());
        let job = store.cancel_job(caller.tenant, id).await.map_err(|error| job_error(error, id))?;
        self.training()?.interrupt(id);
        Ok(info(job))
    }

    /// Stops a job for now; it keeps where it stands.
    ///
    /// # Errors
    /// 404; 409 when it neither waits nor runs, or was paused too often.
    pub async fn pause_job(&self, caller: &Caller, id: &str) -> Result<JobInfo, Error> {
        possible(id)?;
        let store = self.store.by(caller.actor());
        let job = store.pause_job(caller.tenant, id).await.map_err(|error| job_error(error, id))?;
        self.training()?.interrupt(id);
        Ok(info(job))
    }

    /// Puts a paused job back into the queue.
    ///
    /// # Errors
    /// 404; 409 when it has ended.
    pub async fn resume_job(&self, caller: &Caller, id: &str) -> Result<JobInfo, Error> {
        if info(self.own_job(caller, id).await?).spec.is_none() {
            return Err(job_error(StoreError::JobStatus(JobStatus::Failed), id));
        }
        let store = self.store.by(caller.actor());
        let job = store.resume_job(caller.tenant, id).await.map_err(|error| job_error(error, id))?;
        self.training()?.changed();
        Ok(info(job))
    }

    /// At most `limit` events of a job after the one with number `after`, oldest first.
    ///
    /// # Errors
    /// 404.
    pub async fn job_events_after(
        &self,
        caller: &Caller,
        id: &str,
        after: u64,
        limit: u32,
    ) -> Result<Vec<EventRecord>, Error> {
        self.own_job(caller, id).await?;
        self.store.events_after(id, after, limit).await.map_err(Error::store)
    }

    /// At most `limit` events of a job before the one with number `before`, newest first.
    ///
    /// # Errors
    /// 404.
    pub async fn job_events_before(
        &self,
        caller: &Caller,
        id: &str,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Vec<EventRecord>, Error> {
        self.own_job(caller, id).await?;
        self.store.events_before(id, before.unwrap_or(u64::MAX), limit).await.map_err(Error::store)
    }

    /// A job's checkpoints, newest first; without damaged ones.
    ///
    /// # Errors
    /// 404.
    pub async fn job_checkpoints(&self, caller: &Caller, id: &str) -> Result<Vec<CheckpointInfo>, Error> {
        let spec = info(self.own_job(caller, id).await?).spec;
        let is_default = spec.is_some_and(|spec| spec.read_scheme().is_ok_and(|scheme| scheme == Scheme::default()));
        let (records, _) = self.store.checkpoints(id).await.map_err(Error::store)?;
        let shown = |record: &crate::store::CheckpointRecord| -> Result<CheckpointInfo, String> {
            let saved: Saved = serde_json::from_str(&record.state).map_err(|error| error.to_string())?;
            let numbers = round_to_bf16(&saved.run.state.numbers);
            let bytes = codec::encode(&numbers, NumberType::Bf16).map_err(|error| error.to_string())?;
            let inline = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&bytes);
            Ok(CheckpointInfo {
                step: record.step,
                metrics: serde_json::from_str(&record.metrics).map_err(|error| error.to_string())?,
                data: STANDARD.encode(bytes),
                model: is_default.then(|| format!("{}+{inline}", self.base.model_id)),
                created_at: record.created_at,
            })
        };
        let listed = records.iter().filter_map(|record| match shown(record) {
            Ok(info) => Some(info),
            Err(error) => {
                tracing::error!(
                    job = id,
                    step = record.step,
                    error,
                    "a checkpoint of a training job cannot be read: it is left out"
                );
                None
            }
        });
        Ok(listed.collect())
    }

    /// A job's samples, newest first: at most `limit` records of those before the step `before`.
    ///
    /// # Errors
    /// 404.
    pub async fn job_samples(
        &self,
        caller: &Caller,
        id: &str,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Vec<SamplesRecord>, Error> {
        self.own_job(caller, id).await?;
        self.store.samples(id, before, limit).await.map_err(Error::store)
    }
}

/// A new id; later ones are greater.
pub(super) fn new_job_id() -> String {
    format!("ftjob-{}", uuid::Uuid::now_v7().simple())
}

/// What needs no data: the first errors that a client should hear.
fn check_cheap(spec: &JobSpec, config: &TrainingConfig) -> Result<(), Error> {
    let settings =
        Settings::resolve(&spec.hyperparameters, spec.method, 1, spec.seed).map_err(|error| hyper_error(&error))?;
    if spec.hyperparameters.epochs.is_none() && settings.steps > config.steps {
        let message = format!("'hyperparameters.steps' is {}; this server takes {}.", settings.steps, config.steps);
        return Err(Error::invalid("hyperparameters.steps", message));
    }
    let size = |value: &Option<Value>| value.as_ref().map_or(0, |value| value.to_string().len());
    let (prompt, grader) = (size(&spec.prompt), size(&spec.grader));
    if prompt + grader > MAX_DESCRIPTION {
        let larger = if prompt > grader { "prompt" } else { "grader" };
        let message = format!(
            "'prompt' and 'grader' have {} bytes together; a job has at most {MAX_DESCRIPTION}.",
            prompt + grader
        );
        return Err(Error::invalid(larger, message));
    }
    if let Some(prompt) = &spec.prompt {
        PromptTemplate::from_json(prompt).map_err(|error| Error::invalid("prompt", format!("'prompt': {error}.")))?;
    }
    spec.grader.as_ref().map(|grader| build_described(grader, config)).transpose()?;
    Ok(())
}

pub(super) fn job_key(retry: JobRetry) -> Result<JobKey, Error> {
    if !(1..=MAX_KEY).contains(&retry.key.len()) {
        let message = format!("'Idempotency-Key' has 1 to {MAX_KEY} characters.");
        return Err(Error::invalid("Idempotency-Key", message));
    }
    Ok(JobKey { route: retry.route, key: retry.key, request_hash: retry.request_hash })
}

/// An id that cannot be is one that is not.
fn possible(id: &str) -> Result<(), Error> {
    let digits = id.strip_prefix("ftjob-").filter(|digits| digits.len() == 32);
    let fits = digits.is_some_and(|digits| digits.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
    if fits { Ok(()) } else { Err(job_not_found(id)) }
}

fn job_not_found(id: &str) -> Error {
    let shown: String = id.chars().filter(|c| !c.is_control()).take(64).collect();
    let message = format!("The job '{shown}' does not exist or you do not have access to it.");
    Error::new(ErrorKind::NotFound, message).with_code("job_not_found")
}

/// The store's error in the words of the API; `name` is the job's id, or the adapter's name when the job is made.
fn job_error(error: StoreError, name: &str) -> Error {
    match error {
        StoreError::JobNotFound => job_not_found(name),
        StoreError::JobStatus(status) => {
            let message = format!("The job is {status}; that cannot be done any more.");
            Error::new(ErrorKind::Conflict, message).with_code("job_status")
        }
        StoreError::PausedEnough(most) => {
            let message = format!("The job was paused {most} times; it runs on now, or is cancelled.");
            Error::new(ErrorKind::Conflict, message).with_code("job_status")
        }
        StoreError::TooManyJobs(most) => {
            let message = format!(
                "You have {most} jobs under way (queued, running or paused), as many as this server takes of one tenant."
            );
            Error::new(ErrorKind::RateLimited, message).with_code("insufficient_quota")
        }
        StoreError::JobsFull => {
            let mut error =
                Error::new(ErrorKind::RateLimited, "The queue of training jobs is full.").with_code("queue_full");
            error.retry_after = Some(30);
            error
        }
        other => store_error(other, name),
    }
}

/// What is JSON in a job's row: its spec; its metrics, result and error.
///
/// # Errors
/// What cannot be read.
pub(super) fn texts(record: &JobRecord) -> Result<(JobSpec, [Value; 3]), String> {
    if let Some(cause) = &record.damaged {
        return Err(cause.clone());
    }
    let value = |text: &Option<String>| match text {
        None => Ok(Value::Null),
        Some(text) => serde_json::from_str(text),
    };
    let read = || -> serde_json::Result<_> {
        let spec = serde_json::from_str(&record.spec)?;
        Ok((spec, [value(&record.metrics)?, value(&record.result)?, value(&record.error)?]))
    };
    read().map_err(|error| error.to_string())
}

/// A job as its owner sees it. One that cannot be read has failed, whatever its row says.
fn info(record: JobRecord) -> JobInfo {
    let (status, spec, [metrics, result, error]) = match texts(&record) {
        Ok((spec, texts)) => (record.status, Some(spec), texts),
        Err(_) => {
            let error = report::error_value(&damaged_job(), "job_damaged");
            (JobStatus::Failed, None, [Value::Null, Value::Null, error])
        }
    };
    JobInfo {
        id: record.id,
        name: record.name,
        status,
        step: record.step,
        steps: record.steps,
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: record.finished_at,
        metrics,
        result,
        error,
        spec,
    }
}
