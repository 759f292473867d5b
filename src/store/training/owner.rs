//! What owners do with jobs: make, pause, resume, cancel. Each takes effect with its commit, whatever a worker is doing: a worker that lost its job finds
//! out at its next write, and can write nothing.

use futures::future::BoxFuture;
use sqlx::Row as _;

use super::{
    EventLevel, JobRecord, JobStatus, JobStored, NewEvent, NewJob,
    decode::{any_job, count, own_job, signed},
};
use crate::{
    store::{Result, Store, StoreError, decode, idempotency, writer::Tx},
    tenant::Actor,
    types::TenantId,
};

/// How often a job can be paused. Each time writes a few events, which are kept as long as the job.
pub(in crate::store) const MOST_PAUSES: i64 = 100;

/// A job, and whether it was changed.
type Changed = (JobRecord, bool);

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
    async fn create_job(&mut self, new: NewJob, public_too: bool) -> Result<JobStored> {
        if let Some(key) = &new.key {
            let known =
                idempotency::answer(self.connection, new.tenant, key.route, &key.key, &key.request_hash).await?;
            if let Some(id) = known {
                return own_job(self.connection, new.tenant, &id).await.map(JobStored::Before);
            }
        }
        self.living(new.tenant).await?;
        self.check_room(&new).await?;
        let taken =
            sqlx::query(concat!("SELECT id FROM jobs WHERE tenant = $1 AND name = $2 AND ", under_way!("status")))
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
        if !public_too && self.is_public(new.tenant, &new.name).await? {
            return Err(StoreError::PublicAdapter);
        }
        let bytes = new.spec.len() + new.data.iter().map(|(_, data)| data.len()).sum::<usize>();
        self.make_room(new.tenant, new.limits.room(), 0, signed(bytes as u64)).await?;
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

    /// Has the tenant a public adapter of that name?
    async fn is_public(&mut self, tenant: TenantId, name: &str) -> Result<bool> {
        let query =
            sqlx::query("SELECT id FROM adapters WHERE tenant = $1 AND name = $2 AND public = 1 AND deleted = 0");
        Ok(query.bind(tenant.0).bind(name).fetch_optional(&mut *self.connection).await?.is_some())
    }

    async fn check_room(&mut self, new: &NewJob) -> Result<()> {
        let row = sqlx::query(
            concat!(
                "SELECT COUNT(*), CAST(COALESCE(SUM(CASE WHEN tenant = $1 THEN 1 ELSE 0 END), 0) AS BIGINT) FROM jobs WHERE ",
                under_way!("status")
            ),
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
        let row = sqlx::query(
            "UPDATE jobs SET status = $1, result = COALESCE($2, result), error = $3, finished_at = $4, lease = NULL, \
             change_seq = $5 WHERE id = $6 RETURNING tenant",
        )
        .bind(status.as_str())
        .bind(result)
        .bind(error)
        .bind(now)
        .bind(change)
        .bind(id)
        .fetch_optional(&mut *self.connection)
        .await?;
        let data = self.erase_data(id).await?;
        // Nothing is counted of a job whose owner cannot be read.
        if let Some(tenant) = row.and_then(|row| row.try_get(0).ok()).map(TenantId) {
            self.totals.add(tenant, 0, -data);
            self.keep_newest_jobs(tenant, id).await?;
        }
        Ok(())
    }

    /// Erases a job's data sets; how many bytes they had.
    async fn erase_data(&mut self, id: &str) -> Result<i64> {
        let gone = sqlx::query("DELETE FROM job_data WHERE job = $1 RETURNING CAST(OCTET_LENGTH(data) AS BIGINT)");
        let rows = gone.bind(id).fetch_all(&mut *self.connection).await?;
        Ok(rows.iter().map(|row| row.try_get::<i64, _>(0).unwrap_or_default()).sum())
    }

    async fn cancel_job(&mut self, tenant: TenantId, id: &str) -> Result<Changed> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Cancelled => Ok((job, false)),
            status if status.is_final() => Err(StoreError::JobStatus(status)),
            _ => {
                let event = status_event(JobStatus::Cancelled, "The job was cancelled.");
                let job = self.end_job(id, JobStatus::Cancelled, None, None, vec![event]).await?;
                Ok((job, true))
            }
        }
    }

    async fn pause_job(&mut self, tenant: TenantId, id: &str) -> Result<Changed> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Paused => Ok((job, false)),
            JobStatus::Queued | JobStatus::Running => {
                self.count_pause(id).await?;
                let event = status_event(JobStatus::Paused, "The job was paused.");
                Ok((self.set_status(id, JobStatus::Paused, event).await?, true))
            }
            status => Err(StoreError::JobStatus(status)),
        }
    }

    /// One pause more, if the job may have one. Nothing is written when it may not.
    async fn count_pause(&mut self, id: &str) -> Result<()> {
        let counted = sqlx::query("UPDATE jobs SET pauses = pauses + 1 WHERE id = $1 AND pauses < $2")
            .bind(id)
            .bind(MOST_PAUSES)
            .execute(&mut *self.connection)
            .await?;
        if counted.rows_affected() == 0 { Err(StoreError::PausedEnough(MOST_PAUSES as u64)) } else { Ok(()) }
    }

    async fn resume_job(&mut self, tenant: TenantId, id: &str) -> Result<Changed> {
        let job = own_job(self.connection, tenant, id).await?;
        match job.status {
            JobStatus::Paused => {
                let event = status_event(JobStatus::Queued, "The job waits to go on.");
                Ok((self.set_status(id, JobStatus::Queued, event).await?, true))
            }
            status if status.is_final() => Err(StoreError::JobStatus(status)),
            _ => Ok((job, false)),
        }
    }

    /// Erases an ended job with all that it left behind.
    pub(in crate::store) async fn erase_job(&mut self, id: &str) -> Result<()> {
        let data = self.erase_data(id).await?;
        for sql in [
            "DELETE FROM job_events WHERE job = $1",
            "DELETE FROM job_checkpoints WHERE job = $1",
            "DELETE FROM job_samples WHERE job = $1",
        ] {
            sqlx::query(sql).bind(id).execute(&mut *self.connection).await?;
        }
        let gone = sqlx::query("DELETE FROM jobs WHERE id = $1 RETURNING tenant, CAST(OCTET_LENGTH(spec) AS BIGINT)");
        let row = gone.bind(id).fetch_optional(&mut *self.connection).await?;
        if let Some(tenant) = row.as_ref().and_then(|row| row.try_get(0).ok()).map(TenantId) {
            let spec = row.and_then(|row| row.try_get::<i64, _>(1).ok()).unwrap_or_default();
            self.totals.add(tenant, 0, -data - spec);
            self.totals.ended_job_gone(tenant);
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
    /// [`StoreError::TenantNotFound`], [`StoreError::AdaptersFull`], [`StoreError::BytesFull`], [`StoreError::TrainedEnough`], [`StoreError::PublicAdapter`].
    pub async fn create_job(&self, new: NewJob) -> Result<JobStored> {
        let public_too = self.may_change_public();
        self.audited(
            move |tx| Box::pin(tx.create_job(new, public_too)),
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
        self.change_job("job.cancel", move |tx| Box::pin(async move { tx.cancel_job(tenant, &id).await })).await
    }

    /// Stops a tenant's job for now.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`]; [`StoreError::JobStatus`] when it neither waits nor runs; [`StoreError::PausedEnough`].
    pub async fn pause_job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        self.change_job("job.pause", move |tx| Box::pin(async move { tx.pause_job(tenant, &id).await })).await
    }

    /// Puts a paused job of a tenant's back into the queue.
    ///
    /// # Errors
    /// [`StoreError::JobNotFound`]; [`StoreError::JobStatus`] when it has ended.
    pub async fn resume_job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let id = id.to_owned();
        self.change_job("job.resume", move |tx| Box::pin(async move { tx.resume_job(tenant, &id).await })).await
    }

    /// What an owner does to a job. Where it changes nothing it leaves no entry in the audit log.
    async fn change_job<W>(&self, action: &'static str, work: W) -> Result<JobRecord>
    where
        W: for<'t> FnOnce(&'t mut Tx<'_>) -> BoxFuture<'t, Result<Changed>> + Send + 'static,
    {
        let did = move |actor: &Actor, (job, changed): &Changed| changed.then(|| actor.did(action, job.id.clone()));
        Ok(self.audited(work, did).await?.0)
    }
}
