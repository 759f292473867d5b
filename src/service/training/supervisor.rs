//! Who runs which job when: takes jobs from the queue as places become free, stops them when their owners say so, and leaves them in order when the server stops.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mote_trainer::Stop;
use parking_lot::Mutex;
use tokio::{
    runtime,
    sync::{Notify, Semaphore, watch},
};

use super::{
    PolicySource, TrainingConfig,
    jobs::texts,
    report,
    spec::{damaged, damaged_job},
    worker,
};
use crate::{
    service::{BaseInfo, Error, Service},
    store::{JobRecord, JobStatus, StartLimits, Store, StoreError, Turns},
    telemetry::{DamagedLabels, JobLabels, Metrics},
    types::TenantId,
};

/// How often the queue is looked at when nobody says that it changed: another process may have.
const LOOK: Duration = Duration::from_secs(5);
/// How long a job waits whose worker could not write.
const BACK_OFF: Duration = Duration::from_secs(5);
/// Data sets that are checked at once in the background: each takes a processor, and memory.
const VALIDATIONS: usize = 1;

/// A job in a worker's hands.
struct Active {
    tenant: TenantId,
    stop: Stop,
}

/// What supervisor and workers share.
pub(super) struct Inner {
    pub(super) config: TrainingConfig,
    pub(super) policies: Arc<dyn PolicySource>,
    pub(super) store: Store,
    pub(super) base: Arc<BaseInfo>,
    pub(super) service: Weak<Service>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) runtime: runtime::Handle,
    active: Mutex<HashMap<String, Active>>,
    turns: Mutex<Turns>,
    /// Names this process in the store.
    lease: String,
    /// A job may be taken, or a place is free.
    wake: Notify,
    /// Rises with every change of a job in this process.
    version: watch::Sender<u64>,
    stopping: AtomicBool,
    killed: AtomicBool,
    validations: Semaphore,
}

impl Inner {
    /// Writes to the store from a worker's thread, unless this process only plays dead.
    pub(super) fn write<T>(&self, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        if self.killed.load(Ordering::Acquire) {
            return Err(StoreError::JobLost);
        }
        let outcome = self.runtime.block_on(work);
        self.changed();
        outcome
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    fn limits(&self, service: &Service) -> StartLimits {
        StartLimits {
            running: self.config.running,
            running_of_tenant: self.config.running_of_tenant.max(1),
            trained_tokens_per_day: service.accounts.defaults().trained_tokens_per_day,
        }
    }

    fn busy(&self) -> Vec<String> {
        self.active.lock().keys().cloned().collect()
    }

    /// Should a tenant's job, which has run for its turn, go back into the queue for another's?
    pub(super) fn another_waits(&self, tenant: TenantId) -> bool {
        let Some(service) = self.service.upgrade() else { return false };
        let (busy, turns) = (self.busy(), self.turns.lock().clone());
        let waits = self.store.another_waits(self.limits(&service), tenant, &busy, &turns);
        self.runtime.block_on(waits).unwrap_or_else(|error| {
            tracing::warn!(%error, "the queue of training jobs cannot be read; the job goes on");
            false
        })
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }
}

/// The training of a server.
pub struct Training {
    pub(super) inner: Arc<Inner>,
}

impl std::fmt::Debug for Training {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Training").field("running", &self.running()).finish_non_exhaustive()
    }
}

impl Training {
    /// Puts jobs of a former process back into the queue, sets damaged ones apart, and begins to take jobs.
    ///
    /// # Errors
    /// Only the database's.
    pub(super) async fn start(
        service: &Arc<Service>,
        config: TrainingConfig,
        policies: Arc<dyn PolicySource>,
    ) -> Result<Self, StoreError> {
        let inner = Arc::new(Inner {
            config,
            policies,
            store: service.store.clone(),
            base: service.base.clone(),
            service: Arc::downgrade(service),
            metrics: service.metrics.clone(),
            runtime: runtime::Handle::current(),
            active: Mutex::default(),
            turns: Mutex::default(),
            lease: uuid::Uuid::now_v7().simple().to_string(),
            wake: Notify::new(),
            version: watch::Sender::new(0),
            stopping: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            validations: Semaphore::new(VALIDATIONS),
        });
        let validating = look_through(&inner).await?;
        let waiting = inner.store.requeue_jobs().await?;
        if waiting > 0 {
            tracing::info!(jobs = waiting, "training jobs go on from their last checkpoints");
        }
        let training = Self { inner };
        for job in validating {
            training.validate(job);
        }
        tokio::spawn(take_jobs(training.inner.clone()));
        Ok(training)
    }

    /// Limits.
    pub fn config(&self) -> &TrainingConfig {
        &self.inner.config
    }

    /// Jobs in workers' hands.
    pub fn running(&self) -> usize {
        self.inner.active.lock().len()
    }

    /// Hears of every change of a job in this process.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.version.subscribe()
    }

    /// Does it take no more jobs?
    pub fn is_stopping(&self) -> bool {
        self.inner.is_stopping()
    }

    /// A job's place in the store has changed: workers and readers should look.
    pub(crate) fn changed(&self) {
        self.inner.changed();
        self.inner.wake.notify_one();
    }

    /// Stops the worker of a job, if it has one, at its next chunk.
    pub(super) fn interrupt(&self, id: &str) {
        if let Some(active) = self.inner.active.lock().get(id) {
            active.stop.stop();
        }
        self.changed();
    }

    /// Stops the workers of a tenant that is gone.
    pub(crate) fn interrupt_tenant(&self, tenant: TenantId) {
        for active in self.inner.active.lock().values().filter(|active| active.tenant == tenant) {
            active.stop.stop();
        }
        self.changed();
    }

    /// Checks a job's data in the background; the job is queued or failed then.
    pub(super) fn validate(&self, job: JobRecord) {
        let inner = self.inner.clone();
        tokio::spawn(async move {
            // Never closed.
            let Ok(_permit) = inner.validations.acquire().await else { return };
            if inner.is_stopping() {
                return; // the next start finds it validating
            }
            let (id, apart) = (job.id.clone(), inner.clone());
            let span = worker::span(&job);
            let check = move || {
                let (spec, _) = texts(&job).map_err(damaged)?;
                // The end of a job deletes its data; of one that has ended nobody hears this.
                Ok(worker::load(&apart, &job, &spec)?.ok_or_else(damaged_job)?.settings.steps)
            };
            let checked = tokio::task::spawn_blocking(move || span.in_scope(check));
            let outcome = checked.await.unwrap_or_else(|error| Err(Error::internal(error)));
            let outcome = outcome.map_err(|error| {
                let value = report::error_value(&error, "invalid_data");
                (value.to_string(), vec![report::failed_event(&value)])
            });
            if let Err(error) = inner.store.end_validation(&id, outcome).await {
                tracing::error!(job = id, %error, "what a validation found could not be written");
            }
            inner.changed();
            inner.wake.notify_one();
        });
    }

    /// Takes no more jobs, lets running ones write a checkpoint, and waits for that. They go on at the next start. True if all did within `patience`.
    pub async fn stop(&self, patience: Duration) -> bool {
        self.inner.stopping.store(true, Ordering::Release);
        self.interrupt_all();
        self.wait_until_idle(patience).await
    }

    /// Ends all workers as if the process had died: from now on they write nothing. For tests of what a crash leaves.
    pub async fn play_dead(&self) {
        self.inner.killed.store(true, Ordering::Release);
        self.stop(Duration::from_secs(60)).await;
    }

    fn interrupt_all(&self) {
        self.inner.active.lock().values().for_each(|active| active.stop.stop());
        self.changed();
    }

    async fn wait_until_idle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while self.running() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            self.interrupt_all();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        true
    }
}

/// Looks at every job that has not ended: damaged ones fail, so that none is taken and their names are free. Gives those that are being validated.
async fn look_through(inner: &Inner) -> Result<Vec<JobRecord>, StoreError> {
    let mut validating = Vec::new();
    for job in inner.store.unfinished_jobs().await? {
        let Err(cause) = texts(&job) else {
            validating.extend((job.status == JobStatus::Validating).then_some(job));
            continue;
        };
        tracing::error!(
            job = job.id,
            tenant = job.tenant.0,
            name = job.name,
            cause,
            "a training job cannot be read: it has failed"
        );
        inner.metrics.damaged.get_or_create(&DamagedLabels { kind: "job" }).inc();
        let error = report::error_value(&damaged_job(), "job_damaged").to_string();
        inner.store.set_job_apart(&job.id, error).await?;
    }
    Ok(validating)
}

/// Takes jobs as long as there are places and jobs; then waits for either.
async fn take_jobs(inner: Arc<Inner>) {
    while !inner.is_stopping()
        && let Some(service) = inner.service.upgrade()
    {
        let limits = inner.limits(&service);
        drop(service);
        let (busy, turns) = (inner.busy(), inner.turns.lock().clone());
        let taken = match (busy.len() as u64) < limits.running {
            true => inner.store.claim_job(limits, &inner.lease, busy, turns).await,
            false => Ok(None),
        };
        match taken {
            Ok(Some(job)) => begin(&inner, job),
            Ok(None) => {
                let _ = tokio::time::timeout(LOOK, inner.wake.notified()).await;
            }
            Err(StoreError::Closed) => return,
            Err(error) => {
                tracing::error!(%error, "the queue of training jobs cannot be read");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

/// Gives a job to a thread of its own.
fn begin(inner: &Arc<Inner>, job: JobRecord) {
    let stop = Stop::default();
    let (id, attempt) = (job.id.clone(), job.attempt);
    inner.active.lock().insert(id.clone(), Active { tenant: job.tenant, stop: stop.clone() });
    let mut turns = inner.turns.lock();
    let turn = 1 + turns.values().max().copied().unwrap_or(0);
    turns.insert(job.tenant, turn);
    drop(turns);
    inner.changed();
    // Whoever stopped everything may have done so before this job was on the list.
    if inner.is_stopping() {
        stop.stop();
    }
    tracing::info!(job = id, tenant = job.tenant.0, attempt, "training job taken");
    let (apart, own) = (inner.clone(), id.clone());
    let work = move || {
        worker::run(&apart, job, stop);
        if !apart.is_stopping() {
            release(&apart, &own, attempt);
        }
        apart.active.lock().remove(&own);
        apart.changed();
        apart.wake.notify_one();
    };
    if let Err(error) = thread::Builder::new().name("training".into()).spawn(work) {
        tracing::error!(%error, "the system gave no thread for a training job");
        inner.active.lock().remove(&id);
        let inner = inner.clone();
        tokio::spawn(async move {
            tokio::time::sleep(BACK_OFF).await;
            let _ = inner.store.release_job(&id, attempt).await;
            inner.wake.notify_one();
        });
    }
}

/// A job that its worker left running could not be written to: it waits a little and goes on from its last checkpoint.
fn release(inner: &Inner, id: &str, attempt: i64) {
    match inner.runtime.block_on(inner.store.job_status(id)) {
        Ok((JobStatus::Running, current)) if current == attempt => {}
        Ok((JobStatus::Cancelled, current)) if current == attempt => {
            inner.metrics.train_jobs.get_or_create(&JobLabels { status: "cancelled" }).inc();
            return;
        }
        Ok(_) | Err(StoreError::JobNotFound | StoreError::Closed) => return,
        Err(_) => {}
    }
    thread::sleep(BACK_OFF);
    let released = inner.write(inner.store.release_job(id, attempt));
    if let Err(error) = released {
        tracing::error!(job = id, %error, "a training job stays behind until the next start");
    }
}
