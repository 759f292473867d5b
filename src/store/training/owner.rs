//! What owners do with jobs: make, pause, resume, cancel. Each takes effect with its commit, whatever a worker is doing: a worker that lost its job finds
//! out at its next write, and can write nothing.

use sqlx::Row as _;

use super::{
    EventLevel, JobRecord, JobStatus, JobStored, NewEvent, NewJob,
    decode::{any_job, count, own_job, signed},
};
use crate::{
    store::{Result, Store, StoreError, decode, idempotency, writer::Tx},
    types::TenantId,
};

/// A job's change of status as an event.
pub(super) fn status_event(status: JobStatus, message: &str) -> NewEvent {
    NewEvent {
        kind: "status",
        level: EventLevel::Info,
        message: message.to_owned(),
        data: format!("{{\"status\":\"{status}\"}}"),
    }
}

impl Tx<'_> {
    async fn create_job(&mut self, new: NewJob) -> Result<JobStored> {
        if let Some(key) = &new.key {
            let known =
                idempotency::answer(self.connection, new.tenant, key.route, &key.key, &key.request_hash).await?;
            if let Some(id) = known {
                return own_job(self.connection, new.tenant, &id).await.map(JobStored::Before);
            }
        }
        self.living(new.tenant).await?;
        self.check_room(&new).await?;
        let taken = sqlx::query(
            "SELECT id FROM jobs WHERE tenant = $1 AND name = $2 AND status IN ('validating', 'queued', 'running', 'paused')",
        )
        .bind(new.tenant.0)
        .bind(&*new.name)
        .fetch_optional(&mut *self.connection)
        .await?;
        if taken.is_some() {
            return Err(StoreError::NameReserved);
        }
        if new.name_must_be_free && decode::has_name(self.connection, new.tenant, &new.name).await? {
            return Err(StoreError::NameTaken);
        }
        let change = self.next_seq();
        sqlx::query(
            "INSERT INTO jobs (id, tenant, name, status, steps, created_at, change_seq, spec) VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&*new.id)
        .bind(new.tenant.0)
        .bind(&*new.name)
        .bind(new.status.as_str())
        .bind(signed(new.steps))
        .bind(self.now)
        .bind(change)
        .bind(&*new.spec)
        .execute(&mut *self.connection)
        .await?;
        for (part, data) in new.data {
            sqlx::query("INSERT INTO job_data (job, part, data) VALUES ($1, $2, $3)")
                .bind(&*new.id)
                .bind(part.as_str())
                .bind(data)
                .execute(&mut *self.connection)
                .await?;
        }
        self.append_events(&new.id, vec![new.event]).await?;
        if let Some(key) = &new.key {
            self.keep_answer(new.tenant, key.route, &key.key, &key.request_hash, new.id.clone()).await?;
        }
        any_job(self.connection, &new.id).await.map(JobStored::New)
    }

    async fn check_room(&mut self, new: &NewJob) -> Result<()> {
        let row = sqlx::query(
            "SELECT COUNT(*), CAST(COALESCE(SUM(CASE WHEN tenant = $1 THEN 1 ELSE 0 END), 0) AS BIGINT) FROM jobs \
             WHERE status IN ('validating', 'queued', 'running', 'paused')",
        )
        .bind(new.tenant.0)
        .fetch_one(&mut *self.connection)
        .await?;
        let own = count(&row, 1)?;
        if let Some(most) = new.limits.queued_jobs.filter(|most| own >= *most) {
            return Err(StoreError::TooManyJobs(most));
        }
        if count(&row, 0)? >= new.most {
            return Err(StoreError::JobsFull);
        }
        if let Some(most) = new.limits.trained_tokens_per_day
            && self.trained_today(new.tenant).await? >= most
        {
            return Err(StoreError::TrainedEnough(most));
        }
        if new.name_must_be_free {
            // The jobs under way will publish too.
            self.check_adapters(new.tenant, new.limits.adapters, own + 1).await?;
        }
        Ok(())
    }

    /// Tokens that a tenant's jobs have trained on today.
    pub(super) async fn trained_today(&mut self, tenant: TenantId) -> Result<u64> {
        let day = self.day();
        let query = sqlx::query("SELECT trained_tokens FROM tenant_usage WHERE tenant = $1 AND day = $2");
        let row = self.row(query.bind(tenant.0).bind(day)).await?;
        // A count that cannot be read has come to any limit: it ends with the day.
        Ok(row.map_or(0, |row| count(&row, 0).unwrap_or(u64::MAX)))
    }

    /// Writes events behind those that there are.
    pub(super) async fn append_events(&mut self, job: &str, events: Vec<NewEvent>) -> Result<()> {
        if events.is_empty() {
            return Ok(());
        }
        let last: i64 = sqlx::query("UPDATE jobs SET events = events + $1 WHERE id = $2 RETURNING events")
            .bind(events.len() as i64)
            .bind(job)
            .fetch_one(&mut *self.connection)
            .await?
            .try_get(0)?;
        let first = last - events.len() as i64 + 1;
        for (seq, event) in (first..).zip(events) {
            sqlx::query(
                "INSERT INTO job_events (job, seq, kind, level, message, data, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7)",
            )
            .bind(job)
            .bind(seq)
            .bind(event.kind)
            .bind(event.level.as_str())
            .bind(event.message)
            .bind(event.data)
            .bind(self.now)
            .execute(&mut *self.connection)
            .await?;
        }
        Ok(())
    }

    /// Points a job at a status that is not its last.
    pub(super) async fn set_status(&mut self, id: &str, status: JobStatus, event: NewEvent) -> Result<JobRecord> {
        let change = self.next_seq();
        sqlx::query("UPDATE jobs SET status = $1, change_seq = $2 WHERE id = $3")
            .bind(status.as_str())
            .bind(change)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        self.append_events(id, vec![event]).await?;
        any_job(self.connection, id).await
    }

    /// Ends a job; its data is dropped and its name is free.
    pub(super) async fn end_job(
        &mut self,
        id: &str,
        status: JobStatus,
        result: Option<String>,
        error: Option<String>,
        events: Vec<NewEvent>,
    ) -> Result<JobRecord> {
        self.mark_ended(id, status, result, error).await?;
        self.append_events(id, events).await?;
        any_job(self.connection, id).await
    }

    /// The row of a job that ends, and nothing that must be read for it. Until then a job has no result.
    pub(super) async fn mark_ended(
        &mut self,
        id: &str,
        status: JobStatus,
        result: Option<String>,
        error: Option<String>,
    ) -> Result<()> {
        let (now, change) = (self.now, self.next_seq());
        sqlx::query(
            "UPDATE jobs SET status = $1, result = COALESCE($2, result), error = $3, finished_at = $4, lease = NULL, \
             change_seq = $5 WHERE id = $6",
        )
        .bind(status.as_str())
        .bind(result)
        .bind(error)
        .bind(now)
        .bind(change)
        .bind(id)
        .execute(&mut *self.connection)
        .await?;
        sqlx::query("DELETE FROM job_data WHERE job = $1").bind(id).execute(&mut *self.connection).await?;
        Ok(())
    }

    async fn cancel_job(&mut self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Cancelled => Ok(job),
            status if status.is_final() => Err(StoreError::JobStatus(status)),
            _ => {
                let event = status_event(JobStatus::Cancelled, "The job was cancelled.");
                self.end_job(id, JobStatus::Cancelled, None, None, vec![event]).await
            }
        }
    }

    async fn pause_job(&mut self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Paused => Ok(job),
            JobStatus::Queued | JobStatus::Running => {
                self.set_status(id, JobStatus::Paused, status_event(JobStatus::Paused, "The job was paused.")).await
            }
            status => Err(StoreError::JobStatus(status)),
        }
    }

    async fn resume_job(&mut self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Paused => {
                let event = status_event(JobStatus::Queued, "The job waits to go on.");
                self.set_status(id, JobStatus::Queued, event).await
            }
            status if status.is_final() => Err(StoreError::JobStatus(status)),
            _ => Ok(job),
        }
    }

    /// Erases a job with all that it left behind.
    pub(in crate::store) async fn erase_job(&mut self, id: &str) -> Result<()> {
        for sql in [
            "DELETE FROM job_data WHERE job = $1",
            "DELETE FROM job_events WHERE job = $1",
            "DELETE FROM job_checkpoints WHERE job = $1",
            "DELETE FROM job_samples WHERE job = $1",
            "DELETE FROM jobs WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id).execute(&mut *self.connection).await?;
        }
        Ok(())
    }

    /// Erases everything of a tenant's training.
    pub(in crate::store) async fn erase_training(&mut self, tenant: TenantId) -> Result<()> {
        for sql in [
            "DELETE FROM job_data WHERE job IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM job_events WHERE job IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM job_checkpoints WHERE job IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM job_samples WHERE job IN (SELECT id FROM jobs WHERE tenant = $1)",
            "DELETE FROM jobs WHERE tenant = $1",
            "DELETE FROM files WHERE tenant = $1",
        ] {
            sqlx::query(sql).bind(tenant.0).execute(&mut *self.connection).await?;
        }
        Ok(())
    }
}

impl Store {
    /// Makes a job, all of it or nothing.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::NameReserved`], [`StoreError::TooManyJobs`], [`StoreError::JobsFull`], [`StoreError::IdempotencyMismatch`],
    /// [`StoreError::TenantNotFound`], [`StoreError::AdaptersFull`], [`StoreError::TrainedEnough`].
    pub async fn create_job(&self, new: NewJob) -> Result<JobStored> {
        self.audited(
            move |tx| Box::pin(tx.create_job(new)),
            |actor, stored| match stored {
                JobStored::New(job) => {
                    Some(actor.did("job.create", job.id.clone()).with(format!("{{\"name\":\"{}\"}}", job.name)))
                }
                JobStored::Before(_) => None,
            },
        )
        .await
    }

    /// Ends a tenant's job. It publishes nothing from then on. Cancelling again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`]; [`StoreError::JobStatus`] when it has ended otherwise.
    pub async fn cancel_job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        self.audited(
            move |tx| Box::pin(async move { tx.cancel_job(tenant, &id).await }),
            |actor, job| Some(actor.did("job.cancel", job.id.clone())),
        )
        .await
    }

    /// Stops a tenant's job for now.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`]; [`StoreError::JobStatus`] when it neither waits nor runs.
    pub async fn pause_job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.pause_job(tenant, &id).await })).await
    }

    /// Puts a paused job of a tenant's back into the queue.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`]; [`StoreError::JobStatus`] when it has ended.
    pub async fn resume_job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        self.writer.job(move |tx| Box::pin(async move { tx.resume_job(tenant, &id).await })).await
    }
}
