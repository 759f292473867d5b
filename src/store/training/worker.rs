//! What workers do with jobs: take, report, end. A worker writes under the attempt that it took the job with; once the job is another's, ended or paused, it
//! writes nothing.

use std::collections::HashMap;

use sqlx::{Row as _, any::AnyRow};

use super::{
    JobRecord, JobStatus, NewCheckpoint, NewEvent, Progress, Publication, StartLimits,
    decode::{any_job, count, signed},
    owner::status_event,
};
use crate::{
    store::{Result, Store, StoreError, Stored, ask::text, decode::bound, writer::Tx},
    tenant::{Actor, Bound, Usage, UsageOfDay},
    types::TenantId,
};

/// Steps whose samples are kept.
const SAMPLE_STEPS: u64 = 64;

/// What holds for a tenant.
fn of_tenant(default: Option<u64>, set: Option<Bound>) -> Option<u64> {
    match set {
        None => default,
        Some(Bound::Unlimited) => None,
        Some(Bound::Most(most)) => Some(most),
    }
}

/// When each tenant's jobs were last taken: numbers that rise. A tenant that is not there has had no turn.
pub type Turns = HashMap<TenantId, u64>;

pub(in crate::store) const RUNNING: &str = concat!(
    "SELECT tenant, COUNT(*) FROM jobs WHERE status = 'running' AND ",
    under_way!("status"),
    " GROUP BY tenant"
);
/// Those that ran before go first, then the oldest.
pub(in crate::store) const QUEUED: &str = concat!(
    "SELECT j.id, j.tenant, j.started_at, t.max_running_jobs, t.max_trained_tokens_per_day, \
     COALESCE(u.trained_tokens, 0) FROM jobs j JOIN tenants t ON t.id = j.tenant \
     LEFT JOIN tenant_usage u ON u.tenant = j.tenant AND u.day = $1 WHERE j.status = 'queued' AND ",
    under_way!("j.status"),
    " ORDER BY CASE WHEN j.started_at IS NULL THEN 1 ELSE 0 END, j.id"
);

/// Jobs that run, by tenant.
fn running_jobs(rows: &[AnyRow]) -> Result<HashMap<i64, u64>> {
    // A job whose tenant cannot be read runs all the same.
    rows.iter().map(|row| Ok((row.try_get(0).unwrap_or_default(), count(row, 1)?))).collect()
}

/// A job that may start.
struct Candidate {
    id: String,
    tenant: TenantId,
    /// Jobs of its tenant that run.
    load: u64,
    /// When its tenant last had a turn.
    turn: u64,
    /// It ran before.
    again: bool,
}

/// The jobs of the queue that may start, the next one first: of the tenant of which the fewest run, then of the one whose turn is longest ago.
fn candidates(
    queued: &[AnyRow],
    running: &HashMap<i64, u64>,
    limits: StartLimits,
    busy: &[String],
    turns: &Turns,
) -> Vec<Candidate> {
    let allowed = |row: &AnyRow| -> Result<Option<Candidate>> {
        let (id, tenant): (String, i64) = (text(row, 0)?.to_owned(), row.try_get(1)?);
        let load = running.get(&tenant).copied().unwrap_or(0);
        let running = of_tenant(Some(limits.running_of_tenant), bound(row, 3)?);
        let trained = of_tenant(limits.trained_tokens_per_day, bound(row, 4)?);
        let allowed = running.is_none_or(|most| load < most)
            && count(row, 5).map(|today| trained.is_none_or(|most| today < most))?
            && !busy.contains(&id);
        let (tenant, again) = (TenantId(tenant), row.try_get::<Option<i64>, _>(2)?.is_some());
        let turn = turns.get(&tenant).copied().unwrap_or(0);
        Ok(allowed.then_some(Candidate { id, tenant, load, turn, again }))
    };
    // One that cannot be read, or whose tenant cannot, waits and holds up nobody.
    let mut candidates: Vec<Candidate> = queued.iter().filter_map(|row| allowed(row).ok().flatten()).collect();
    // Else whoever came first: the sort is stable.
    candidates.sort_by_key(|candidate| (candidate.load, candidate.turn));
    candidates
}

impl Tx<'_> {
    async fn claim_job(
        &mut self,
        limits: StartLimits,
        lease: &str,
        busy: &[String],
        turns: &Turns,
    ) -> Result<Option<JobRecord>> {
        let running = running_jobs(&self.rows(sqlx::query(RUNNING)).await?)?;
        if running.values().sum::<u64>() >= limits.running {
            return Ok(None);
        }
        let day = self.day();
        let queued = self.rows(sqlx::query(QUEUED).bind(day)).await?;
        let mut next = None;
        for Candidate { id, again, .. } in candidates(&queued, &running, limits, busy, turns) {
            if any_job(self.connection, &id).await?.damaged.is_none() {
                next = Some((id, again));
                break;
            }
        }
        let Some((id, again)) = next else { return Ok(None) };
        let now = self.now;
        sqlx::query(
            "UPDATE jobs SET attempt = attempt + 1, lease = $1, started_at = COALESCE(started_at, $2) WHERE id = $3",
        )
        .bind(lease)
        .bind(now)
        .bind(&*id)
        .execute(&mut *self.connection)
        .await?;
        let words = if again { "The job goes on." } else { "The job has started." };
        self.set_status(&id, JobStatus::Running, status_event(JobStatus::Running, words)).await.map(Some)
    }

    /// The job, if it is still this worker's.
    async fn held_job(&mut self, id: &str, attempt: i64) -> Result<JobRecord> {
        let job = match any_job(self.connection, id).await {
            Err(StoreError::JobNotFound) => return Err(StoreError::JobLost),
            other => other?,
        };
        if job.attempt == attempt && job.status == JobStatus::Running { Ok(job) } else { Err(StoreError::JobLost) }
    }

    async fn report_progress(
        &mut self,
        id: &str,
        attempt: i64,
        progress: Progress,
        trained_tokens_per_day: Option<u64>,
    ) -> Result<bool> {
        let job = self.held_job(id, attempt).await?;
        let news = progress.step > job.step || progress.metrics.is_none();
        if news {
            sqlx::query(
                "UPDATE jobs SET step = CASE WHEN step < $1 THEN $1 ELSE step END, metrics = COALESCE($2, metrics) WHERE id = $3",
            )
            .bind(signed(progress.step))
            .bind(progress.metrics)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
            self.append_events(id, progress.events).await?;
        }
        for (phase, samples) in progress.samples {
            self.put_samples(id, progress.step, phase, samples).await?;
        }
        if let Some(checkpoint) = progress.checkpoint {
            self.put_checkpoint(id, checkpoint).await?;
        }
        if progress.trained_tokens == 0 {
            return Ok(true);
        }
        if news {
            let usage = Usage { trained_tokens: progress.trained_tokens, ..Usage::default() };
            let usage = UsageOfDay { tenant: job.tenant, day: self.day(), usage };
            self.add_usage(&[usage]).await?;
        }
        self.may_train(job.tenant, trained_tokens_per_day).await
    }

    /// May a tenant's jobs go on today?
    async fn may_train(&mut self, tenant: TenantId, default: Option<u64>) -> Result<bool> {
        let query = sqlx::query("SELECT max_trained_tokens_per_day FROM tenants WHERE id = $1").bind(tenant.0);
        let row = self.row(query).await?;
        // Jobs of a tenant that cannot be read wait, as those in the queue do.
        let Some(set) = row.and_then(|row| bound(&row, 0).ok()) else { return Ok(false) };
        match of_tenant(default, set) {
            None => Ok(true),
            Some(most) => Ok(self.trained_today(tenant).await? < most),
        }
    }

    /// Puts a job back into the queue.
    async fn defer_job(&mut self, id: &str, attempt: i64, words: &str) -> Result<()> {
        self.held_job(id, attempt).await?;
        self.set_status(id, JobStatus::Queued, status_event(JobStatus::Queued, words)).await.map(drop)
    }

    async fn put_samples(&mut self, id: &str, step: u64, phase: &'static str, samples: String) -> Result<()> {
        sqlx::query("DELETE FROM job_samples WHERE job = $1 AND phase = $2 AND step <= $3")
            .bind(id)
            .bind(phase)
            .bind(signed(step) - signed(SAMPLE_STEPS))
            .execute(&mut *self.connection)
            .await?;
        sqlx::query(
            "INSERT INTO job_samples (job, step, phase, samples, created_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (job, step, phase) DO UPDATE SET samples = excluded.samples",
        )
        .bind(id)
        .bind(signed(step))
        .bind(phase)
        .bind(samples)
        .bind(self.now)
        .execute(&mut *self.connection)
        .await?;
        Ok(())
    }

    async fn put_checkpoint(&mut self, id: &str, new: NewCheckpoint) -> Result<()> {
        sqlx::query(
            "INSERT INTO job_checkpoints (job, step, state, metrics, created_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (job, step) DO UPDATE SET state = excluded.state, metrics = excluded.metrics",
        )
        .bind(id)
        .bind(signed(new.step))
        .bind(new.state)
        .bind(new.metrics)
        .bind(self.now)
        .execute(&mut *self.connection)
        .await?;
        sqlx::query(
            "DELETE FROM job_checkpoints WHERE job = $1 AND step NOT IN \
             (SELECT step FROM job_checkpoints WHERE job = $1 ORDER BY step DESC LIMIT $2)",
        )
        .bind(id)
        .bind(signed(new.keep.max(1)))
        .execute(&mut *self.connection)
        .await?;
        Ok(())
    }

    /// A checkpoint of a worker that lets go of its job: also when the owner has just paused it, or put it back into the queue.
    async fn leave_checkpoint(&mut self, id: &str, attempt: i64, checkpoint: NewCheckpoint) -> Result<()> {
        let job = any_job(self.connection, id).await?;
        if job.attempt != attempt || job.status.is_final() {
            return Err(StoreError::JobLost);
        }
        self.put_checkpoint(id, checkpoint).await
    }

    async fn fail_job(&mut self, id: &str, attempt: i64, error: String, events: Vec<NewEvent>) -> Result<JobRecord> {
        self.held_job(id, attempt).await?;
        self.end_job(id, JobStatus::Failed, None, Some(error), events).await
    }

    async fn publish_job(&mut self, id: &str, attempt: i64, publication: Publication) -> Result<JobRecord> {
        let job = self.held_job(id, attempt).await?;
        let mut results = Vec::with_capacity(1);
        self.put_round(vec![publication.adapter], &mut results, Some(id)).await?;
        match results.pop().unwrap_or(Err(StoreError::Closed))? {
            Stored::New { .. } | Stored::Replayed(_) => {
                let deed = Actor::job(job.owner).did("adapter.publish", job.name);
                self.note(Some(deed.with(format!("{{\"job\":\"{id}\"}}"))));
                self.end_job(id, JobStatus::Succeeded, Some(publication.result), None, publication.events).await
            }
        }
    }

    async fn end_validation(
        &mut self,
        id: &str,
        outcome: std::result::Result<u64, (String, Vec<NewEvent>)>,
    ) -> Result<JobRecord> {
        let job = any_job(self.connection, id).await?;
        if job.status != JobStatus::Validating {
            return Ok(job);
        }
        match outcome {
            Ok(steps) => {
                sqlx::query("UPDATE jobs SET steps = $1 WHERE id = $2")
                    .bind(signed(steps))
                    .bind(id)
                    .execute(&mut *self.connection)
                    .await?;
                let event = status_event(JobStatus::Queued, "The data is valid; the job waits to start.");
                self.set_status(id, JobStatus::Queued, event).await
            }
            Err((error, events)) => self.end_job(id, JobStatus::Failed, None, Some(error), events).await,
        }
    }

    async fn release_job(&mut self, id: &str, attempt: i64) -> Result<()> {
        if self.held_job(id, attempt).await.is_ok() {
            let event = status_event(JobStatus::Queued, "The job was interrupted and waits to go on.");
            self.set_status(id, JobStatus::Queued, event).await?;
        }
        Ok(())
    }

    async fn requeue_jobs(&mut self) -> Result<u64> {
        let query = sqlx::query(concat!(
            "SELECT id FROM jobs WHERE status = 'running' AND ",
            under_way!("status"),
            " ORDER BY id"
        ));
        let rows = self.rows(query).await?;
        let change = self.next_seq();
        for row in &rows {
            // A job whose id cannot be read has failed.
            let Ok(id) = text(row, 0) else { continue };
            sqlx::query("UPDATE jobs SET status = 'queued', lease = NULL, change_seq = $1 WHERE id = $2")
                .bind(change)
                .bind(id)
                .execute(&mut *self.connection)
                .await?;
            let event = status_event(JobStatus::Queued, "The server was restarted; the job waits to go on.");
            self.append_events(id, vec![event]).await?;
        }
        Ok(rows.len() as u64)
    }
}

impl Store {
    /// Takes the next job that may start, for a worker of the process `lease`; not one of `busy`. Of tenants of which equally many jobs run, the one whose turn is
    /// longest ago. None when there is none.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn claim_job(
        &self,
        limits: StartLimits,
        lease: &str,
        busy: Vec<String>,
        turns: Turns,
    ) -> Result<Option<JobRecord>> {
        let lease = lease.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.claim_job(limits, &lease, &busy, &turns).await })).await
    }

    /// If a running job of this tenant went back into the queue, would it be the turn of another tenant's?
    ///
    /// # Errors
    /// Only the database's.
    pub async fn another_waits(
        &self,
        limits: StartLimits,
        tenant: TenantId,
        busy: &[String],
        turns: &Turns,
    ) -> Result<bool> {
        let mut running = running_jobs(&self.rows(sqlx::query(RUNNING)).await?)?;
        if running.values().sum::<u64>() < limits.running {
            return Ok(false); // there is a place
        }
        let left = running.entry(tenant.0).or_default();
        *left = left.saturating_sub(1);
        let own = (*left, turns.get(&tenant).copied().unwrap_or(0));
        let queued = self.rows(sqlx::query(QUEUED).bind(crate::tenant::today())).await?;
        let waiting = candidates(&queued, &running, limits, busy, turns);
        Ok(waiting.iter().any(|other| other.tenant != tenant && (other.load, other.turn) < own))
    }

    /// Writes what a worker reports, together. False: the tenant's jobs have trained on as many tokens today as they may (`trained_tokens_per_day` unless something
    /// else was set for it).
    ///
    /// # Errors
    /// [`StoreError::JobLost`] when it is no longer this worker's.
    pub async fn report_progress(
        &self,
        id: &str,
        attempt: i64,
        progress: Progress,
        trained_tokens_per_day: Option<u64>,
    ) -> Result<bool> {
        let id = id.to_owned();
        self.writer
            .job(move |tx| {
                Box::pin(async move { tx.report_progress(&id, attempt, progress, trained_tokens_per_day).await })
            })
            .await
    }

    /// Puts a job back into the queue, where it stays until its tenant may train, and has its turn, again. The words are for its owner.
    ///
    /// # Errors
    /// [`StoreError::JobLost`] when it is no longer this worker's.
    pub async fn defer_job(&self, id: &str, attempt: i64, words: &'static str) -> Result<()> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.defer_job(&id, attempt, words).await })).await
    }

    /// Writes the checkpoint of a worker that lets go of its job.
    ///
    /// # Errors
    /// [`StoreError::JobLost`] when the job has ended or is another worker's.
    pub async fn leave_checkpoint(&self, id: &str, attempt: i64, checkpoint: NewCheckpoint) -> Result<()> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.leave_checkpoint(&id, attempt, checkpoint).await })).await
    }

    /// Ends a job without an adapter.
    ///
    /// # Errors
    /// [`StoreError::JobLost`].
    pub async fn fail_job(&self, id: &str, attempt: i64, error: String, events: Vec<NewEvent>) -> Result<JobRecord> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.fail_job(&id, attempt, error, events).await })).await
    }

    /// Ends a damaged job, whoever has it: its name is free, and no worker takes it. It gets no event: how many it has may be what cannot be read.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn set_job_apart(&self, id: &str, error: String) -> Result<()> {
        let id = id.to_owned();
        self.writer
            .job(move |tx| Box::pin(async move { tx.mark_ended(&id, JobStatus::Failed, None, Some(error)).await }))
            .await
    }

    /// Publishes a job's adapter and ends the job, both or neither.
    ///
    /// # Errors
    /// [`StoreError::JobLost`], and those of [`Store::put_adapter`]: then nothing was written.
    pub async fn publish_job(&self, id: &str, attempt: i64, publication: Publication) -> Result<JobRecord> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.publish_job(&id, attempt, publication).await })).await
    }

    /// What a validation found: the steps of a job that may wait for its start, or why it cannot. A job that was cancelled meanwhile stays so.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`].
    pub async fn end_validation(
        &self,
        id: &str,
        outcome: std::result::Result<u64, (String, Vec<NewEvent>)>,
    ) -> Result<JobRecord> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.end_validation(&id, outcome).await })).await
    }

    /// Puts a job back into the queue, if this worker still has it.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn release_job(&self, id: &str, attempt: i64) -> Result<()> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.release_job(&id, attempt).await })).await
    }

    /// Puts jobs whose worker died with its process back into the queue; gives their number. At start, before any job is taken.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn requeue_jobs(&self) -> Result<u64> {
        self.writer.job(move |tx| Box::pin(tx.requeue_jobs())).await
    }
}
