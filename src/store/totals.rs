//! What tenants have stored: counted once, and then kept in step by the one writer. Adapters and bytes of those that have a limit on them, and of all how many
//! ended jobs and kept answers there are, of which each has [`MOST_ENDED`] and [`MOST_ANSWERS`] at most, however fast it makes them.

use std::collections::HashMap;

use sqlx::Row as _;

use super::{Result, StoreError, ask::text, decode::select_sizes, writer::Tx};
use crate::{tenant::Room, types::TenantId};

/// Ended jobs that are kept of a tenant: the newest.
pub(super) const MOST_ENDED: i64 = 10_000;
/// Old jobs that go at most when one ends: each may have thousands of events.
const ENDED_AT_ONCE: i64 = 4;
/// Answers that are kept of a tenant for retried requests: the newest, and up to [`ANSWERS_AT_ONCE`] more.
pub(super) const MOST_ANSWERS: i64 = 10_000;
/// Old answers that go at once: all of a tenant's are read for it.
pub(super) const ANSWERS_AT_ONCE: i64 = 1_000;

/// A tenant's adapters, and the bytes of its adapters, files and jobs.
#[derive(Debug, Clone, Copy)]
struct Total {
    adapters: i64,
    bytes: i64,
}

const ENDED: &str = "SELECT COUNT(*) FROM jobs WHERE tenant = $1 AND status IN ('succeeded', 'failed', 'cancelled')";
const ANSWERS: &str = "SELECT COUNT(*) FROM idempotency WHERE tenant = $1";

/// The writer's memory of totals. Tenants without limits have none.
#[derive(Debug, Default)]
pub(super) struct Totals {
    of: HashMap<TenantId, Total>,
    ended: HashMap<TenantId, i64>,
    answers: HashMap<TenantId, i64>,
}

impl Totals {
    /// The next use counts anew.
    pub(super) fn forget(&mut self, tenant: TenantId) {
        self.of.remove(&tenant);
        self.ended.remove(&tenant);
        self.answers.remove(&tenant);
    }

    /// Something was added or taken away.
    pub(super) fn add(&mut self, tenant: TenantId, adapters: i64, bytes: i64) {
        if let Some(total) = self.of.get_mut(&tenant) {
            total.adapters += adapters;
            total.bytes += bytes;
        }
    }

    /// An ended job is gone.
    pub(super) fn ended_job_gone(&mut self, tenant: TenantId) {
        if let Some(ended) = self.ended.get_mut(&tenant) {
            *ended -= 1;
        }
    }
}

impl Tx<'_> {
    /// Takes so much more of a tenant's into account, if there is room for it. What takes nothing away may always stay.
    ///
    /// # Errors
    /// [`StoreError::AdaptersFull`], [`StoreError::BytesFull`]: nothing was changed.
    pub(super) async fn make_room(&mut self, tenant: TenantId, room: Room, adapters: i64, bytes: i64) -> Result<()> {
        if room == Room::default() {
            self.totals.of.remove(&tenant);
            return Ok(());
        }
        let total = self.total(tenant).await?;
        let beyond = |most: Option<u64>, now: i64, more: i64| {
            most.filter(|&most| more > 0 && u64::try_from(now + more).unwrap_or(0) > most)
        };
        if let Some(most) = beyond(room.adapters, total.adapters, adapters) {
            return Err(StoreError::AdaptersFull(most));
        }
        if let Some(most) = beyond(room.bytes, total.bytes, bytes) {
            return Err(StoreError::BytesFull(most));
        }
        self.totals.add(tenant, adapters, bytes);
        Ok(())
    }

    /// Is there room for so many adapters more? Nothing is taken into account.
    pub(super) async fn check_adapters(&mut self, tenant: TenantId, most: Option<u64>, more: u64) -> Result<()> {
        let Some(most) = most else { return Ok(()) };
        let now = u64::try_from(self.total(tenant).await?.adapters).unwrap_or(0);
        if now.saturating_add(more) > most { Err(StoreError::AdaptersFull(most)) } else { Ok(()) }
    }

    async fn total(&mut self, tenant: TenantId) -> Result<Total> {
        if let Some(total) = self.totals.of.get(&tenant) {
            return Ok(*total);
        }
        let row = sqlx::query(concat!(
            "SELECT (SELECT COUNT(*) FROM adapters WHERE tenant = $1 AND deleted = 0), \
             CAST(COALESCE((SELECT SUM(OCTET_LENGTH(metadata)) FROM adapters WHERE tenant = $1 AND deleted = 0), 0) \
             + COALESCE((SELECT SUM(sizes.bytes) FROM (",
            select_sizes!("g.adapter IN (SELECT id FROM adapters WHERE tenant = $1 AND deleted = 0)"),
            ") AS sizes), 0) \
             + COALESCE((SELECT SUM(bytes) FROM files WHERE tenant = $1), 0) \
             + COALESCE((SELECT SUM(OCTET_LENGTH(spec)) FROM jobs WHERE tenant = $1), 0) \
             + COALESCE((SELECT SUM(OCTET_LENGTH(d.data)) FROM job_data d JOIN jobs j ON j.id = d.job \
             WHERE j.tenant = $1), 0) AS BIGINT)",
        ))
        .bind(tenant.0)
        .fetch_one(&mut *self.connection)
        .await?;
        let total = Total { adapters: row.try_get(0)?, bytes: row.try_get(1)? };
        self.totals.of.insert(tenant, total);
        Ok(total)
    }

    /// A job of a tenant's has just ended: the oldest of its ended ones go where there are too many.
    pub(super) async fn keep_newest_jobs(&mut self, tenant: TenantId, just_ended: &str) -> Result<()> {
        let ended = match self.totals.ended.get(&tenant) {
            Some(ended) => ended + 1,
            None => self.count(ENDED, tenant).await?,
        };
        self.totals.ended.insert(tenant, ended);
        if ended <= MOST_ENDED {
            return Ok(());
        }
        let old = sqlx::query(
            "SELECT id FROM jobs WHERE tenant = $1 AND status IN ('succeeded', 'failed', 'cancelled') AND id <> $2 \
             ORDER BY id LIMIT $3",
        );
        let most = (ended - MOST_ENDED).min(ENDED_AT_ONCE);
        for row in self.rows(old.bind(tenant.0).bind(just_ended).bind(most)).await? {
            // A job whose id cannot be read stays.
            if let Ok(id) = text(&row, 0) {
                self.erase_job(id).await?;
                self.erased = true;
            }
        }
        Ok(())
    }

    /// An answer has just been kept for a tenant: its oldest go where there are too many.
    pub(super) async fn keep_newest_answers(&mut self, tenant: TenantId) -> Result<()> {
        if let Some(answers) = self.totals.answers.get_mut(&tenant) {
            *answers += 1;
            if *answers <= MOST_ANSWERS + ANSWERS_AT_ONCE {
                return Ok(());
            }
        }
        // Some have gone by their age since they were counted.
        let answers = self.count(ANSWERS, tenant).await?;
        self.totals.answers.insert(tenant, answers.min(MOST_ANSWERS));
        if answers <= MOST_ANSWERS {
            return Ok(());
        }
        sqlx::query(
            "DELETE FROM idempotency WHERE tenant = $1 AND (route, key) IN \
             (SELECT route, key FROM idempotency WHERE tenant = $1 ORDER BY created_at LIMIT $2)",
        )
        .bind(tenant.0)
        .bind(answers - MOST_ANSWERS)
        .execute(&mut *self.connection)
        .await?;
        Ok(())
    }

    async fn count(&mut self, sql: &'static str, tenant: TenantId) -> Result<i64> {
        Ok(sqlx::query(sql).bind(tenant.0).fetch_one(&mut *self.connection).await?.try_get(0)?)
    }
}
