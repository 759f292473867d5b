//! Jobs and files out of rows.

use sqlx::{AnyConnection, Row as _, any::AnyRow};

use super::{FileRecord, JobRecord, JobStatus};
use crate::{
    store::{
        Result, StoreError,
        ask::{self, optional_text, text},
    },
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
        id: ask::name(row, 0),
        tenant: TenantId(row.try_get(1).unwrap_or_default()),
        owner: ask::name(row, 2).into(),
        name: ask::name(row, 3),
        status: JobStatus::Failed,
        attempt: row.try_get(5).unwrap_or_default(),
        step: count(row, 6).unwrap_or_default(),
        steps: count(row, 7).unwrap_or_default(),
        events: count(row, 8).unwrap_or_default(),
        created_at: row.try_get(9).unwrap_or_default(),
        started_at: row.try_get(10).unwrap_or_default(),
        finished_at: row.try_get(11).unwrap_or_default(),
        spec: text(row, 12).unwrap_or_default().to_owned(),
        metrics: optional_text(row, 13).unwrap_or_default().map(str::to_owned),
        result: None,
        error: None,
        damaged: Some(error.to_string()),
    })
}

fn read_job(row: &AnyRow) -> Result<JobRecord> {
    Ok(JobRecord {
        id: text(row, 0)?.to_owned(),
        tenant: TenantId(row.try_get(1)?),
        owner: text(row, 2)?.into(),
        name: text(row, 3)?.to_owned(),
        status: text(row, 4)?.parse().map_err(|_| StoreError::Corrupt("job status"))?,
        attempt: row.try_get(5)?,
        step: count(row, 6)?,
        steps: count(row, 7)?,
        events: count(row, 8)?,
        created_at: row.try_get(9)?,
        started_at: row.try_get(10)?,
        finished_at: row.try_get(11)?,
        spec: text(row, 12)?.to_owned(),
        metrics: optional_text(row, 13)?.map(str::to_owned),
        result: optional_text(row, 14)?.map(str::to_owned),
        error: optional_text(row, 15)?.map(str::to_owned),
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
        id: text(row, 0)?.to_owned(),
        filename: text(row, 1)?.to_owned(),
        purpose: text(row, 2)?.to_owned(),
        bytes: count(row, 3)?,
        created_at: row.try_get(4)?,
    })
}

/// A tenant's job.
pub(super) async fn own_job(connection: &mut AnyConnection, tenant: TenantId, id: &str) -> Result<JobRecord> {
    let row =
        ask::row(connection, sqlx::query(select_jobs!("j.id = $1 AND j.tenant = $2")).bind(id).bind(tenant.0)).await?;
    Ok(job(&row.ok_or(StoreError::JobNotFound)?))
}

/// A job, whoever owns it.
pub(super) async fn any_job(connection: &mut AnyConnection, id: &str) -> Result<JobRecord> {
    let row = ask::row(connection, sqlx::query(select_jobs!("j.id = $1")).bind(id)).await?;
    Ok(job(&row.ok_or(StoreError::JobNotFound)?))
}
