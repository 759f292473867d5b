//! What would grow without end is dropped when it is old, or when a tenant has too much of it: in pieces, so that uploads do not wait for it.

use std::collections::HashMap;

use sqlx::Row as _;

use super::{Result, Store, ask::text, idempotency::KEEP, writer::Tx};
use crate::{tenant::DAY, types::clock::unix_now};

/// Rows that are dropped in one transaction at most.
const DROPPED_AT_ONCE: i64 = 1000;
/// Jobs, each of which may have thousands of events.
const JOBS_AT_ONCE: i64 = 4;

/// Entries of the audit log that are counted in one question: it sorts them by tenant.
const COUNTED_AT_ONCE: i64 = 1 << 18;

/// What is dropped when it is old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aged {
    /// Entries of the audit log.
    Audit,
    /// Jobs that ended so long ago, with their events, checkpoints and samples.
    Jobs,
    /// Keys that were revoked or expired so long ago.
    Keys,
    /// Tenants' usage of days that ended so long ago.
    Usage,
    /// Answers that are kept for retried requests: they have an age of their own.
    Answers,
}

impl Aged {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Audit => "the audit log",
            Self::Jobs => "ended jobs",
            Self::Keys => "ended keys",
            Self::Usage => "usage",
            Self::Answers => "answers kept for retries",
        }
    }

    /// Rows from before `$1`, or from so far ahead (`$2`) that a clock must have been wrong: at most `$3` of them.
    fn old(self) -> &'static str {
        match self {
            // By number, which rises with time: there is no index by time.
            Self::Audit => {
                "SELECT id FROM (SELECT id, at FROM audit ORDER BY id LIMIT $3) oldest WHERE at < $1 OR at > $2"
            }
            Self::Jobs => {
                "SELECT id FROM jobs WHERE (finished_at < $1 OR finished_at > $2) \
                 AND status IN ('succeeded', 'failed', 'cancelled') LIMIT $3"
            }
            // Not the newest: a store in which a key was ever made shows it.
            Self::Keys => {
                "SELECT id FROM keys WHERE (revoked_at < $1 OR revoked_at > $2 OR expires_at < $1) \
                 AND change_seq < (SELECT MAX(change_seq) FROM keys) LIMIT $3"
            }
            Self::Usage => "SELECT tenant, day FROM tenant_usage WHERE day < $1 OR day > $2 LIMIT $3",
            Self::Answers => {
                "SELECT tenant, route, key FROM idempotency WHERE created_at < $1 OR created_at > $2 LIMIT $3"
            }
        }
    }

    /// A statement that drops them.
    fn drop(self) -> Option<String> {
        let of = match self {
            Self::Audit => "audit WHERE id",
            Self::Keys => "keys WHERE id",
            Self::Usage => "tenant_usage WHERE (tenant, day)",
            Self::Answers => "idempotency WHERE (tenant, route, key)",
            Self::Jobs => return None,
        };
        Some(format!("DELETE FROM {of} IN ({})", self.old()))
    }
}

/// What time it is, as far as that can be believed: a clock that is wrong for a while, decades ahead or in 1970 again, must not make everything old.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    earliest: i64,
    latest: i64,
}

impl Now {
    /// Between what the clock says and a time that follows it slowly.
    fn between(clock: i64, follower: i64) -> Self {
        Self { earliest: clock.min(follower), latest: clock.max(follower) }
    }
}

/// Where the store keeps the time that follows the clock.
const FOLLOWER: &str = "retention_time";

/// From when on something is too old, from when on it cannot be true, and how much of it is dropped at once.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    before: i64,
    after: i64,
    most: i64,
}

impl Bounds {
    fn new(aged: Aged, days: u32, now: Now) -> Self {
        let keep = if aged == Aged::Answers { KEEP } else { i64::from(days) * DAY };
        let (before, after) = (now.earliest.saturating_sub(keep), now.latest.saturating_add(keep));
        match aged {
            Aged::Usage => Self { before: before.div_euclid(DAY), after: after.div_euclid(DAY), most: DROPPED_AT_ONCE },
            Aged::Jobs => Self { before, after, most: JOBS_AT_ONCE },
            _ => Self { before, after, most: DROPPED_AT_ONCE },
        }
    }
}

/// A tenant's oldest entries of the audit log, where it has too many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Excess {
    tenant: String,
    /// Those with numbers up to this one are gone.
    gone: i64,
    /// The newest that has to go.
    last: i64,
}

impl Tx<'_> {
    async fn drop_aged(&mut self, aged: Aged, bounds: Bounds) -> Result<u64> {
        let Bounds { before, after, most } = bounds;
        if let Some(sql) = aged.drop() {
            let query = sqlx::query(sqlx::AssertSqlSafe(sql)).bind(before).bind(after).bind(most);
            return Ok(query.execute(&mut *self.connection).await?.rows_affected());
        }
        let rows = self.rows(sqlx::query(aged.old()).bind(before).bind(after).bind(most)).await?;
        let mut dropped = 0;
        for row in &rows {
            // A job whose id cannot be read stays.
            let Ok(id) = text(row, 0) else { continue };
            self.erase_job(id).await?;
            dropped += 1;
        }
        self.erased |= dropped > 0;
        Ok(dropped)
    }
}

impl Store {
    /// What time it is. The time that follows the clock is kept in the store and comes nearer by `step` seconds with each call; the first call of all sets it.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn now(&self, step: i64) -> Result<Now> {
        let clock = unix_now();
        let kept = self.meta(FOLLOWER).await?.and_then(|kept| kept.parse().ok());
        let follower =
            kept.map_or(clock, |kept: i64| clock.clamp(kept.saturating_sub(step), kept.saturating_add(step)));
        if kept != Some(follower) {
            self.set_meta(FOLLOWER, follower.to_string()).await?;
        }
        Ok(Now::between(clock, follower))
    }

    /// Drops some of what is older than so many days. True: there may be more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn drop_aged(&self, aged: Aged, days: u32, now: Now) -> Result<bool> {
        let bounds = Bounds::new(aged, days, now);
        // Mostly there is nothing, which is no reason to write.
        let any = self.rows(sqlx::query(aged.old()).bind(bounds.before).bind(bounds.after).bind(bounds.most)).await?;
        if any.is_empty() {
            return Ok(false);
        }
        Ok(self.writer.job(move |tx| Box::pin(tx.drop_aged(aged, bounds))).await? > 0)
    }

    /// What each tenant has in the audit log beyond its `most` newest entries. Those without a tenant are the operator's, and not counted.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn excess(&self, most: u32) -> Result<Vec<Excess>> {
        let ends = sqlx::query("SELECT (SELECT MIN(id) FROM audit), (SELECT MAX(id) FROM audit)");
        let Some(ends) = self.row(ends).await? else { return Ok(Vec::new()) };
        let (Some(first), Some(newest)) = (ends.try_get::<Option<i64>, _>(0)?, ends.try_get::<Option<i64>, _>(1)?)
        else {
            return Ok(Vec::new());
        };
        // There are no more entries than numbers.
        if newest.saturating_sub(first) < i64::from(most) {
            return Ok(Vec::new());
        }
        let mut excess = Vec::new();
        for (tenant, _) in self.entries(first).await?.into_iter().filter(|&(_, entries)| entries > i64::from(most)) {
            let query = sqlx::query("SELECT id FROM audit WHERE tenant = $1 ORDER BY id DESC LIMIT 1 OFFSET $2");
            if let Some(row) = self.row(query.bind(&*tenant).bind(i64::from(most))).await? {
                excess.push(Excess { last: row.try_get(0)?, gone: first.saturating_sub(1), tenant });
            }
        }
        Ok(excess)
    }

    /// How many entries of the audit log each tenant has, of those from number `first` on.
    async fn entries(&self, mut first: i64) -> Result<HashMap<String, i64>> {
        let mut entries = HashMap::new();
        loop {
            let query = sqlx::query(
                "SELECT tenant, COUNT(*), MAX(id) FROM (SELECT id, tenant FROM audit WHERE id >= $1 ORDER BY id LIMIT $2) piece GROUP BY tenant",
            );
            let mut seen = 0;
            for row in self.rows(query.bind(first).bind(COUNTED_AT_ONCE)).await? {
                let (count, newest): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
                seen += count;
                first = first.max(newest.saturating_add(1));
                // A tenant that cannot be read is nobody's, as no tenant is.
                if let Ok(tenant) = text(&row, 0) {
                    *entries.entry(tenant.to_owned()).or_default() += count;
                }
            }
            if seen < COUNTED_AT_ONCE {
                return Ok(entries);
            }
        }
    }

    /// Drops some of a tenant's oldest entries of the audit log. True: there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn drop_excess(&self, excess: &mut Excess) -> Result<bool> {
        let query = sqlx::query(
            "SELECT MAX(id) FROM (SELECT id FROM audit WHERE tenant = $1 AND id > $2 AND id <= $3 ORDER BY id LIMIT $4) piece",
        );
        let query = query.bind(&*excess.tenant).bind(excess.gone).bind(excess.last).bind(DROPPED_AT_ONCE);
        let last: Option<i64> = self.row(query).await?.map(|row| row.try_get(0)).transpose()?.flatten();
        let Some(last) = last else { return Ok(false) };
        let Excess { tenant, gone, .. } = excess.clone();
        self.writer
            .job(move |tx| {
                Box::pin(async move {
                    let query = sqlx::query("DELETE FROM audit WHERE tenant = $1 AND id > $2 AND id <= $3");
                    query.bind(tenant).bind(gone).bind(last).execute(&mut *tx.connection).await?;
                    Ok(())
                })
            })
            .await?;
        excess.gone = last;
        Ok(last < excess.last)
    }
}
