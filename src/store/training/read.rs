//! Reading jobs.

use sqlx::{Row as _, any::AnyRow};

use super::{
    CheckpointRecord, EventRecord, JobData, JobRecord, JobStatus, SamplesRecord,
    decode::{self, select_jobs, signed},
};
use crate::{
    store::{Result, Store},
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
        let rows = sqlx::query(select_jobs!("j.tenant = $1 AND j.id < $2 ORDER BY j.id DESC LIMIT $3"))
            .bind(tenant.0)
            .bind(after.unwrap_or("~"))
            .bind(i64::from(limit))
            .fetch_all(&self.pool)
            .await?;
        self.writer.told().await;
        Ok(rows.iter().map(decode::job).collect())
    }

    /// Every job that has not ended, damaged ones among them: at start.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn unfinished_jobs(&self) -> Result<Vec<JobRecord>> {
        let rows = sqlx::query(select_jobs!("j.status NOT IN ('succeeded', 'failed', 'cancelled') ORDER BY j.id"))
            .fetch_all(&self.pool)
            .await?;
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
        let row = sqlx::query("SELECT data FROM job_data WHERE job = $1 AND part = $2")
            .bind(id)
            .bind(part.as_str())
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    /// At most `limit` events of a job after the one with number `after`, oldest first.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn events_after(&self, id: &str, after: u64, limit: u32) -> Result<Vec<EventRecord>> {
        let rows = sqlx::query(
            "SELECT seq, kind, level, message, data, created_at FROM job_events WHERE job = $1 AND seq > $2 ORDER BY seq LIMIT $3",
        )
        .bind(id)
        .bind(signed(after))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        self.writer.told().await;
        rows.iter().map(event).collect()
    }

    /// At most `limit` events of a job before the one with number `before`, newest first.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn events_before(&self, id: &str, before: u64, limit: u32) -> Result<Vec<EventRecord>> {
        let rows = sqlx::query(
            "SELECT seq, kind, level, message, data, created_at FROM job_events WHERE job = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3",
        )
        .bind(id)
        .bind(signed(before))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        self.writer.told().await;
        rows.iter().map(event).collect()
    }

    /// A job's checkpoints, newest first.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn checkpoints(&self, id: &str) -> Result<Vec<CheckpointRecord>> {
        let rows = sqlx::query(
            "SELECT step, state, metrics, created_at FROM job_checkpoints WHERE job = $1 ORDER BY step DESC",
        )
        .bind(id)
        .fetch_all(&self.pool)
        .await?;
        let record = |row: &AnyRow| {
            Ok(CheckpointRecord {
                step: decode::count(row, 0)?,
                state: row.try_get(1)?,
                metrics: row.try_get(2)?,
                created_at: row.try_get(3)?,
            })
        };
        rows.iter().map(record).collect()
    }

    /// A job's samples, newest first: at most `limit` steps' of those before the step `before`.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn samples(&self, id: &str, before: Option<u64>, limit: u32) -> Result<Vec<SamplesRecord>> {
        let rows = sqlx::query(
            "SELECT step, phase, samples, created_at FROM job_samples WHERE job = $1 AND step < $2 ORDER BY step DESC, phase LIMIT $3",
        )
        .bind(id)
        .bind(before.map_or(i64::MAX, signed))
        .bind(i64::from(limit))
        .fetch_all(&self.pool)
        .await?;
        let record = |row: &AnyRow| {
            Ok(SamplesRecord {
                step: decode::count(row, 0)?,
                phase: row.try_get(1)?,
                samples: row.try_get(2)?,
                created_at: row.try_get(3)?,
            })
        };
        rows.iter().map(record).collect()
    }
}

fn event(row: &AnyRow) -> Result<EventRecord> {
    Ok(EventRecord {
        seq: decode::count(row, 0)?,
        kind: row.try_get(1)?,
        level: row.try_get(2)?,
        message: row.try_get(3)?,
        data: row.try_get(4)?,
        created_at: row.try_get(5)?,
    })
}
