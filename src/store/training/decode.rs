//! Jobs and files out of rows.

use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{FileRecord, JobRecord, JobStatus};
use crate::{
    store::{Result, StoreError},
    types::TenantId,
};

/// Jobs with their owners, as [`job`] reads them.
macro_rules! select_jobs {
    ($condition:literal) => {
        concat!(
            "SELECT j.id, j.tenant, t.name, j.name, j.status, j.attempt, j.step, j.steps, j.events, j.created_at, j.started_at, \
             j.finished_at, j.spec, j.metrics, j.result, j.error FROM jobs j JOIN tenants t ON t.id = j.tenant WHERE ",
            $condition
        )
    };
}
pub(super) use select_jobs;

/// A row of [`select_jobs`]. One that cannot be read is a job that has failed: no worker takes it and nobody resumes it, and its owner sees what has become of it.
pub(super) fn job(row: &AnyRow) -> JobRecord {
    read_job(row).unwrap_or_else(|error| JobRecord {
        id: row.try_get(0).unwrap_or_default(),
        tenant: TenantId(row.try_get(1).unwrap_or_default()),
        owner: row.try_get::<&str, _>(2).unwrap_or_default().into(),
        name: row.try_get(3).unwrap_or_default(),
        status: JobStatus::Failed,
        attempt: row.try_get(5).unwrap_or_default(),
        step: count(row, 6).unwrap_or_default(),
        steps: count(row, 7).unwrap_or_default(),
        events: count(row, 8).unwrap_or_default(),
        created_at: row.try_get(9).unwrap_or_default(),
        started_at: row.try_get(10).unwrap_or_default(),
        finished_at: row.try_get(11).unwrap_or_default(),
        spec: row.try_get(12).unwrap_or_default(),
        metrics: row.try_get(13).unwrap_or_default(),
        result: None,
        error: None,
        damaged: Some(error.to_string()),
    })
}

fn read_job(row: &AnyRow) -> Result<JobRecord> {
    Ok(JobRecord {
        id: row.try_get(0)?,
        tenant: TenantId(row.try_get(1)?),
        owner: row.try_get::<&str, _>(2)?.into(),
        name: row.try_get(3)?,
        status: row.try_get::<&str, _>(4)?.parse().map_err(|_| StoreError::Corrupt("job status"))?,
        attempt: row.try_get(5)?,
        step: count(row, 6)?,
        steps: count(row, 7)?,
        events: count(row, 8)?,
        created_at: row.try_get(9)?,
        started_at: row.try_get(10)?,
        finished_at: row.try_get(11)?,
        spec: row.try_get(12)?,
        metrics: row.try_get(13)?,
        result: row.try_get(14)?,
        error: row.try_get(15)?,
        damaged: None,
    })
}

/// A column that is never negative.
pub(in crate::store) fn count(row: &AnyRow, at: usize) -> Result<u64> {
    u64::try_from(row.try_get::<i64, _>(at)?).map_err(|_| StoreError::Corrupt("count"))
}

/// A count as the database has it.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A row of id, filename, purpose, bytes, created_at.
pub(super) fn file(row: &AnyRow) -> Result<FileRecord> {
    Ok(FileRecord {
        id: row.try_get(0)?,
        filename: row.try_get(1)?,
        purpose: row.try_get(2)?,
        bytes: count(row, 3)?,
        created_at: row.try_get(4)?,
    })
}

/// A tenant's job.
pub(super) async fn own_job(connection: &mut AnyConnection, tenant: TenantId, id: &str) -> Result<JobRecord> {
    let row = sqlx::query(select_jobs!("j.id = $1 AND j.tenant = $2"))
        .bind(id)
        .bind(tenant.0)
        .fetch_optional(connection)
        .await?;
    Ok(job(&row.ok_or(StoreError::JobNotFound)?))
}

/// A job, whoever owns it.
pub(super) async fn any_job(connection: &mut AnyConnection, id: &str) -> Result<JobRecord> {
    let row = sqlx::query(select_jobs!("j.id = $1")).bind(id).fetch_optional(connection).await?;
    Ok(job(&row.ok_or(StoreError::JobNotFound)?))
}
