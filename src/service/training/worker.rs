//! A job from its claim to its end, on a thread of its own. What it has done is in the store before it goes on; what it loses when it dies, the next worker computes again to the same bits.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Instant,
};

use mote_trainer::{
    Checkpoint, EvalSettings, FinalReport, Metrics, NoGrader, Policy, PolicyError, Run, Settings, StepReport, Stop,
    TrainError, data::Dataset, grader::Grader,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tracing::{Span, field::Empty};

use super::{
    PolicyRequest,
    jobs::texts,
    prepare::{Prepared, prepare},
    report,
    spec::{JobSpec, damaged, published_metadata},
    supervisor::Inner,
    validation::{Validation, validate},
};
use crate::{
    adapter::{NumberType, codec},
    service::{Content, Error, ErrorKind, Upload},
    store::{JobData, JobRecord, JobStatus, NewAdapter, NewCheckpoint, OnConflict, Progress, Publication, StoreError},
    telemetry::JobLabels,
    tenant::{Caller, Origin, Role, Room},
};

/// Why a worker lets go of its job.
enum Leave {
    /// Paused, cancelled, deleted, or the server stops: the store knows, and the job is no longer this worker's to end.
    Lost,
    /// It has failed.
    Failed(Error),
}

impl From<Error> for Leave {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<PolicyError> for Leave {
    fn from(error: PolicyError) -> Self {
        TrainError::from(error).into()
    }
}

impl From<TrainError> for Leave {
    fn from(error: TrainError) -> Self {
        let code = match error {
            TrainError::Stopped => return Self::Lost,
            TrainError::Policy(_) => "model_failed",
            TrainError::Grader { .. } => "grader_failed",
            _ => "training_failed",
        };
        Self::Failed(Error::new(ErrorKind::Invalid, sentence(&error.to_string())).with_code(code))
    }
}

/// With a capital letter and a full stop.
fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    let first = letters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    let stop = if words.ends_with(['.', '?', '!']) { "" } else { "." };
    format!("{first}{}{stop}", letters.as_str())
}

/// A checkpoint as it is kept: the run, and what is counted over the whole job.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) run: Checkpoint,
    /// Tokens of completions and demonstrations.
    pub(super) tokens: u64,
}

/// A job in a worker's hands.
struct Worker {
    inner: Arc<Inner>,
    job: JobRecord,
    spec: JobSpec,
    stop: Stop,
    tokens: u64,
    /// When it was taken.
    began: Instant,
}

/// Why a job goes back into the queue, for its owner.
const TOMORROW: &str = "Your jobs have trained on as many tokens today as they may; this one goes on tomorrow (UTC).";
const OTHERS: &str = "The job has had its turn and waits while others train.";

/// The span of what is done for a job. It belongs to no request's trace, which ends long before, but names the one that made the job.
pub(super) fn span(job: &JobRecord) -> Span {
    let spec = texts(job).map(|(spec, _)| spec).ok();
    // Of the highest level: whatever a filter lets into the log then has the job's id.
    tracing::error_span!(
        parent: None,
        "job",
        job = job.id,
        tenant = job.tenant.0,
        adapter = job.name,
        attempt = job.attempt,
        method = spec.as_ref().map(|spec| spec.method.name()),
        request_id = spec.as_ref().and_then(|spec| spec.request.as_deref()),
        outcome = Empty,
    )
}

/// Runs a job that was claimed, as far as it goes.
pub(super) fn run(inner: &Arc<Inner>, job: JobRecord, stop: Stop) {
    let span = span(&job);
    let _within = span.enter();
    let (id, attempt) = (job.id.clone(), job.attempt);
    let outcome = catch_unwind(AssertUnwindSafe(|| attempt_job(inner, job, stop)));
    let leave = outcome.unwrap_or_else(|_| {
        tracing::error!("a training job panicked");
        Err(Leave::Failed(
            Error::new(ErrorKind::Internal, "The server had an error while training.").with_code("internal_error"),
        ))
    });
    match leave {
        Ok(()) => {
            span.record("outcome", "succeeded");
            tracing::info!("training job succeeded");
        }
        Err(Leave::Lost) => {
            span.record("outcome", "left");
            tracing::info!("training job left");
        }
        Err(Leave::Failed(error)) => {
            span.record("outcome", "failed");
            tracing::info!(%error, "training job failed");
            let value = report::error_value(&error, "training_failed");
            let events = vec![report::failed_event(&value)];
            let store = inner.store.clone();
            let failed = inner.write(async move { store.fail_job(&id, attempt, value.to_string(), events).await });
            if failed.is_ok() {
                inner.metrics.train_jobs.get_or_create(&JobLabels { status: "failed" }).inc();
            }
        }
    }
}

fn attempt_job(inner: &Arc<Inner>, job: JobRecord, stop: Stop) -> Result<(), Leave> {
    // An owner who stopped it between its claim and the worker's entry on the list found nobody to tell.
    still_ours(inner, &job)?;
    let (spec, _) = texts(&job).map_err(damaged)?;
    if spec.fingerprint != inner.base.fingerprint.to_string() {
        let message = format!(
            "The job was made for the base {}, but this server serves {}.",
            spec.fingerprint, inner.base.fingerprint
        );
        return Err(Leave::Failed(Error::new(ErrorKind::Incompatible, message).with_code("incompatible_adapter")));
    }
    let Some(prepared) = load(inner, &job, &spec)? else {
        // Whoever ended it meanwhile has deleted its data.
        still_ours(inner, &job)?;
        return Err(damaged("a job that has not ended has no data").into());
    };
    let mut worker = Worker { inner: inner.clone(), job, spec, stop, tokens: 0, began: Instant::now() };
    worker.train(prepared)
}

/// The job runs, and in this attempt.
fn still_ours(inner: &Inner, job: &JobRecord) -> Result<(), Leave> {
    let now = inner.runtime.block_on(inner.store.job_status(&job.id)).map_err(lost)?;
    if now == (JobStatus::Running, job.attempt) { Ok(()) } else { Err(Leave::Lost) }
}

/// Reads and checks a job's data; None when there is none.
pub(super) fn load(inner: &Inner, job: &JobRecord, spec: &JobSpec) -> Result<Option<Prepared>, Error> {
    let data = |part| inner.runtime.block_on(inner.store.job_data(&job.id, part)).map_err(Error::internal);
    let Some(training) = data(JobData::Training)? else { return Ok(None) };
    let validation = data(JobData::Validation)?;
    prepare(&inner.base, &inner.config, spec, &training, validation.as_deref()).map(Some)
}

impl Worker {
    fn train(&mut self, prepared: Prepared) -> Result<(), Leave> {
        let Prepared { settings, training, validation, grader, scheme, numbers } = prepared;
        let request = PolicyRequest {
            job: &self.job.id,
            tenant: self.job.tenant,
            method: self.spec.method,
            scheme: &scheme,
            numbers,
            stop: &self.stop,
        };
        let mut policy = self.inner.policies.policy(&request)?;
        let policy = policy.as_mut();
        let no_grader = NoGrader;
        let grading: &dyn Grader = grader.as_deref().unwrap_or(&no_grader);
        let mut run = match self.resumed(&settings, &training)? {
            Some(run) => run,
            None => Run::new(settings, training, self.spec.initial(numbers)?)?,
        };
        while run.end().is_none() {
            let span = tracing::debug_span!(
                "step",
                step = run.steps_done() as i64 + 1,
                rollout_seconds = Empty,
                grading_seconds = Empty,
                learning_seconds = Empty,
            );
            match span.in_scope(|| run.step(policy, grading, &self.stop)) {
                Ok(step) => {
                    tracing::record_all!(
                        span,
                        rollout_seconds = step.timing.rollout_seconds,
                        grading_seconds = step.timing.grading_seconds,
                        learning_seconds = step.timing.learning_seconds,
                    );
                    self.report(&run, &step)?;
                }
                Err(TrainError::Stopped) => return Err(self.leave(&run)),
                Err(error) => return Err(error.into()),
            }
        }
        if let Some(end) = run.end().filter(|end| end.is_failure()) {
            let error = Error::new(ErrorKind::Invalid, sentence(&end.to_string())).with_code("reward_never_varied");
            return Err(Leave::Failed(error));
        }
        let validation = match validation {
            None => Value::Null,
            Some(data) => match self.evaluate(&run, policy, grader.as_deref(), &data) {
                Err(Leave::Lost) => return Err(self.leave(&run)),
                other => other?,
            },
        };
        self.publish(&run, &validation)
    }

    /// The run as the newest checkpoint that can be used has it: steps after that are computed again, to the same bits. None: there is no checkpoint yet.
    fn resumed(&mut self, settings: &Settings, training: &Dataset) -> Result<Option<Run>, Error> {
        let id = &self.job.id;
        let found = self.inner.runtime.block_on(self.inner.store.checkpoints(id)).map_err(Error::internal)?;
        let (checkpoints, there_are) = found;
        let mut cause = "they cannot be read".to_owned();
        for checkpoint in &checkpoints {
            let saved = serde_json::from_str::<Saved>(&checkpoint.state).map_err(|error| error.to_string());
            let resumed = saved.and_then(|saved| {
                let run = Run::resume(saved.run, settings, training.clone()).map_err(|error| error.to_string())?;
                Ok((run, saved.tokens))
            });
            match resumed {
                Ok((run, tokens)) => {
                    self.tokens = tokens;
                    return Ok(Some(run));
                }
                Err(error) => {
                    tracing::error!(
                        job = id,
                        step = checkpoint.step,
                        error,
                        "a checkpoint of a training job cannot be used"
                    );
                    cause = error;
                }
            }
        }
        if there_are == 0 {
            return Ok(None);
        }
        let message = format!("None of the job's {there_are} checkpoints can be used: {cause}.");
        Err(Error::new(ErrorKind::Invalid, message).with_code("checkpoint_unusable"))
    }

    fn checkpoint(&self, run: &Run, metrics: String) -> Result<NewCheckpoint, Error> {
        let saved = Saved { run: run.checkpoint(), tokens: self.tokens };
        let state = serde_json::to_string(&saved).map_err(Error::internal)?;
        Ok(NewCheckpoint { step: run.steps_done(), state, metrics, keep: self.inner.config.checkpoints })
    }

    /// A step and, when it is due, a checkpoint: both or neither.
    fn report(&mut self, run: &Run, step: &StepReport) -> Result<(), Leave> {
        self.tokens += step.metrics.tokens;
        let metrics = report::step_metrics(step.step, &step.metrics, &step.timing);
        let mut events = report::step_events(step, run.settings().steps, &metrics);
        let checkpoint = match run.checkpoint_due() {
            true => {
                events.push(report::checkpoint_event(step.step));
                Some(self.checkpoint(run, metrics.to_string())?)
            }
            false => None,
        };
        let progress = Progress {
            step: step.step,
            metrics: Some(metrics.to_string()),
            events,
            samples: vec![("training", report::samples(&step.samples))],
            checkpoint,
            trained_tokens: step.metrics.tokens,
        };
        // Whoever paused it meanwhile gets the step in a checkpoint; whoever ended it has no use for one.
        let may_go_on = self.write_progress(progress).map_err(|error| match error {
            Leave::Lost => self.leave(run),
            error => error,
        })?;
        self.inner.metrics.train_steps.inc();
        self.inner.metrics.train_tokens.inc_by(step.metrics.tokens);
        let words = match may_go_on {
            _ if run.end().is_some() => return Ok(()),
            false => TOMORROW,
            true if self.turn_is_over() => OTHERS,
            true => return Ok(()),
        };
        let left = self.leave(run);
        let (store, id, attempt) = (self.inner.store.clone(), self.job.id.clone(), self.job.attempt);
        self.inner.write(async move { store.defer_job(&id, attempt, words).await }).map_err(lost)?;
        Err(left)
    }

    /// It has run long enough, and another tenant's job waits for the place.
    fn turn_is_over(&self) -> bool {
        self.began.elapsed() >= self.inner.config.turn && self.inner.another_waits(self.job.tenant)
    }

    /// False: the tenant's jobs may not go on today.
    fn write_progress(&self, progress: Progress) -> Result<bool, Leave> {
        let (store, id, attempt) = (self.inner.store.clone(), self.job.id.clone(), self.job.attempt);
        let service = self.inner.service.upgrade().ok_or(Leave::Lost)?;
        let a_day = service.accounts.defaults().trained_tokens_per_day;
        self.inner.write(async move { store.report_progress(&id, attempt, progress, a_day).await }).map_err(lost)
    }

    /// Keeps where the run stands for whoever goes on with it.
    fn leave(&self, run: &Run) -> Leave {
        let (store, id, attempt) = (self.inner.store.clone(), self.job.id.clone(), self.job.attempt);
        let empty = report::step_metrics(run.steps_done(), &Metrics::default(), &Default::default()).to_string();
        let metrics = self.inner.runtime.block_on(store.job(self.job.tenant, &id)).ok().and_then(|job| job.metrics);
        let written = self
            .checkpoint(run, metrics.unwrap_or(empty))
            .map(|checkpoint| self.inner.write(async move { store.leave_checkpoint(&id, attempt, checkpoint).await }));
        if let Ok(Err(error)) = written
            && !matches!(error, StoreError::JobLost | StoreError::JobNotFound | StoreError::Closed)
        {
            tracing::warn!(%error, "a job's last checkpoint was not written; it goes on from the one before");
        }
        Leave::Lost
    }

    /// Measures on held-out items: the base, the adapter as it will be published, and perhaps the one before rounding.
    fn evaluate(
        &self,
        run: &Run,
        policy: &mut dyn Policy,
        grader: Option<&dyn Grader>,
        data: &Dataset,
    ) -> Result<Value, Leave> {
        let end = run.end().cloned().unwrap_or(mote_trainer::End::Steps);
        let event = report::evaluation_event(&end, data.len());
        self.write_progress(Progress { step: run.steps_done(), events: vec![event], ..Progress::default() })?;
        let settings = EvalSettings::of(run.settings());
        let (full, stop) = (self.spec.full_precision, &self.stop);
        let Validation { parts, report } =
            validate(policy, grader, data, run.numbers(), full, &settings, stop, &mut |_| {})?;
        if let Some(FinalReport { zero, adapter, full_precision, .. }) = &report {
            let shown = [("zero", Some(zero)), ("adapter", Some(adapter)), ("full_precision", full_precision.as_ref())];
            let shown = shown.into_iter().filter_map(|(name, one)| Some((name, one?)));
            let samples = shown.map(|(name, one)| (name, report::evaluated(one, settings.temperature))).collect();
            self.write_progress(Progress { step: run.steps_done(), samples, ..Progress::default() })?;
        }
        Ok(Value::Object(parts))
    }

    /// Rounds once and publishes, through the checks of an upload.
    fn publish(&self, run: &Run, validation: &Value) -> Result<(), Leave> {
        let service = self.inner.service.upgrade().ok_or(Leave::Lost)?;
        let bytes = codec::encode(run.numbers(), NumberType::Bf16).map_err(|error| {
            Error::new(ErrorKind::Invalid, format!("The trained numbers cannot be published: {error}."))
                .with_code("training_failed")
        })?;
        let upload = Upload {
            name: Some(self.job.name.clone()),
            content: Some(Content::Raw(bytes.into())),
            dtype: Some(NumberType::Bf16.name().to_owned()),
            scheme: Some(self.spec.scheme.clone()),
            metadata: Some(published_metadata(&self.spec.metadata, &self.job.id)),
            public: None,
            fingerprint: Some(self.spec.fingerprint.clone()),
            force: false,
            on_conflict: None,
        };
        let caller = Caller {
            tenant: self.job.tenant,
            tenant_name: self.job.owner.clone(),
            role: Role::Member,
            key: None,
            origin: Origin::default(),
        };
        let conflict = if self.spec.name_must_be_free { OnConflict::Error } else { OnConflict::NewGeneration };
        // Its place among the tenant's adapters was looked for when the job was made.
        let adapter = NewAdapter {
            room: Room::default(),
            may_change_public: self.spec.by_admin,
            ..service.prepare(&caller, upload, Some(conflict))?
        };
        let result = json!({
            "adapter": self.job.name,
            "generation": adapter.contents.generation.to_string(),
            "steps": run.steps_done(),
            "end": run.end(),
            "trained_tokens": self.tokens,
            "validation": validation,
        });
        let events = report::succeeded_events(&self.job.name, &result);
        let publication = Publication { adapter, result: result.to_string(), events };
        let (store, id, attempt) = (self.inner.store.clone(), self.job.id.clone(), self.job.attempt);
        match self.inner.write(async move { store.publish_job(&id, attempt, publication).await }) {
            Ok(_) => {
                self.inner.metrics.train_jobs.get_or_create(&JobLabels { status: "succeeded" }).inc();
                Ok(())
            }
            Err(
                error @ (StoreError::NameTaken
                | StoreError::PublicNameTaken
                | StoreError::NameReserved
                | StoreError::PublicAdapter),
            ) => Err(Leave::Failed(crate::service::adapters::store_error(error, &self.job.name))),
            Err(error) => Err(lost(error)),
        }
    }
}

/// A write that failed: the job is another's, or the database does not answer (then the next start goes on from the last checkpoint).
fn lost(error: StoreError) -> Leave {
    if !matches!(error, StoreError::JobLost | StoreError::JobNotFound | StoreError::Closed) {
        tracing::error!(%error, "a training job could not write to the store");
    }
    Leave::Lost
}
