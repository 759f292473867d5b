//! Reading jobs.

use sqlx::{Row as _, any::AnyRow};

use super::{
    CheckpointRecord, EventRecord, JobData, JobRecord, JobStatus, SamplesRecord,
    decode::{self, select_jobs, signed},
};
use crate::{
    store::{
        Result, Store,
        ask::{shown, text},
    },
    types::TenantId,
};

impl Store {
    /// A tenant's job.
    ///
    /// # Errors
    /// [`crate::store::StoreError::JobNotFound`].
    pub async fn job(&self, tenant: TenantId, id: &str) -> Result<JobRecord> {
        let mut connection = self.pool.acquire().await?;
        let job = decode::own_job(&mut connection, tenant, id).await?;
        self.writer.told().await;
        Ok(job)
    }

    /// A tenant's jobs, newest first: at most `limit` of those older than `after`. Damaged ones are among them, as failed.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn jobs(&self, tenant: TenantId, after: Option<&str>, limit: u32) -> Result<Vec<JobRecord>> {
        let query = sqlx::query(select_jobs!("j.tenant = $1 AND j.id < $2 ORDER BY j.id DESC LIMIT $3"));
        let rows = self.rows(query.bind(tenant.0).bind(after.unwrap_or("~")).bind(i64::from(limit))).await?;
        self.writer.told().await;
        Ok(rows.iter().map(decode::job).collect())
    }

    /// Every job that has not ended, damaged ones among them: at start.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn unfinished_jobs(&self) -> Result<Vec<JobRecord>> {
        let query = sqlx::query(select_jobs!("j.status NOT IN ('succeeded', 'failed', 'cancelled') ORDER BY j.id"));
        let rows = self.rows(query).await?;
        Ok(rows.iter().map(decode::job).collect())
    }

    /// Where a job stands, whoever owns it, and under which attempt.
    ///
    /// # Errors
    /// [`crate::store::StoreError::JobNotFound`].
    pub async fn job_status(&self, id: &str) -> Result<(JobStatus, i64)> {
        let mut connection = self.pool.acquire().await?;
        let job = decode::any_job(&mut connection, id).await?;
        Ok((job.status, job.attempt))
    }

    /// One of a job's data sets; None when it has none, or has ended.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn job_data(&self, id: &str, part: JobData) -> Result<Option<Vec<u8>>> {
        let query = sqlx::query("SELECT data FROM job_data WHERE job = $1 AND part = $2");
        let row = self.row(query.bind(id).bind(part.as_str())).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    /// At most `limit` events of a job after the one with number `after`, oldest first; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn events_after(&self, id: &str, after: u64, limit: u32) -> Result<Vec<EventRecord>> {
        let sql = "SELECT seq, kind, level, message, data, created_at FROM job_events WHERE job = $1 AND seq > $2 ORDER BY seq LIMIT $3";
        self.events(sql, id, after, limit).await
    }

    /// At most `limit` events of a job before the one with number `before`, newest first; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn events_before(&self, id: &str, before: u64, limit: u32) -> Result<Vec<EventRecord>> {
        let sql = "SELECT seq, kind, level, message, data, created_at FROM job_events WHERE job = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3";
        self.events(sql, id, before, limit).await
    }

    /// A page of a job's events on one side of the number `from`.
    async fn events(&self, sql: &'static str, id: &str, from: u64, limit: u32) -> Result<Vec<EventRecord>> {
        let query = |limit| sqlx::query(sql).bind(id).bind(signed(from)).bind(limit);
        let events = self.page(limit, query, event, |row| format!("event {} of job {id}", shown(row, 0))).await?;
        self.writer.told().await;
        Ok(events)
    }

    /// A job's checkpoints that can be read, newest first, and how many there are.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn checkpoints(&self, id: &str) -> Result<(Vec<CheckpointRecord>, usize)> {
        let query = sqlx::query(
            "SELECT step, state, metrics, created_at FROM job_checkpoints WHERE job = $1 ORDER BY step DESC",
        );
        let rows = self.rows(query.bind(id)).await?;
        let record = |row: &AnyRow| {
            Ok(CheckpointRecord {
                step: decode::count(row, 0)?,
                state: text(row, 1)?.to_owned(),
                metrics: text(row, 2)?.to_owned(),
                created_at: row.try_get(3)?,
            })
        };
        let named = |row: &AnyRow| format!("checkpoint {} of job {id}", shown(row, 0));
        Ok((self.readable(&rows, record, named), rows.len()))
    }

    /// A job's samples, newest first: at most `limit` steps' of those before the step `before`; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn samples(&self, id: &str, before: Option<u64>, limit: u32) -> Result<Vec<SamplesRecord>> {
        let query = |limit| {
            sqlx::query(
                "SELECT step, phase, samples, created_at FROM job_samples WHERE job = $1 AND step < $2 ORDER BY step DESC, phase LIMIT $3",
            )
            .bind(id)
            .bind(before.map_or(i64::MAX, signed))
            .bind(limit)
        };
        let record = |row: &AnyRow| {
            Ok(SamplesRecord {
                step: decode::count(row, 0)?,
                phase: text(row, 1)?.to_owned(),
                samples: text(row, 2)?.to_owned(),
                created_at: row.try_get(3)?,
            })
        };
        self.page(limit, query, record, |row| format!("samples of step {} of job {id}", shown(row, 0))).await
    }
}

fn event(row: &AnyRow) -> Result<EventRecord> {
    Ok(EventRecord {
        seq: decode::count(row, 0)?,
        kind: text(row, 1)?.to_owned(),
        level: text(row, 2)?.to_owned(),
        message: text(row, 3)?.to_owned(),
        data: text(row, 4)?.to_owned(),
        created_at: row.try_get(5)?,
    })
}
