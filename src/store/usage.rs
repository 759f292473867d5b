//! What tenants used, by day.

use sqlx::{Row as _, any::AnyRow};

use super::{Result, Store, ask::shown, training::count, writer::Tx};
use crate::{
    tenant::{DAY, Usage, UsageOfDay},
    types::TenantId,
};

impl Tx<'_> {
    /// The day of this transaction: days since 1970, UTC.
    pub(super) fn day(&self) -> i64 {
        self.now.div_euclid(DAY)
    }

    /// Of a tenant that was deleted meanwhile nothing is kept.
    pub(super) async fn add_usage(&mut self, usage: &[UsageOfDay]) -> Result<()> {
        let signed = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
        for UsageOfDay { tenant, day, usage } in usage {
            sqlx::query(
                "INSERT INTO tenant_usage (tenant, day, requests, prompt_tokens, completion_tokens, trained_tokens) \
                 SELECT id, $2, $3, $4, $5, $6 FROM tenants WHERE id = $1 AND deleted = 0 ON CONFLICT (tenant, day) DO UPDATE SET \
                 requests = tenant_usage.requests + excluded.requests, \
                 prompt_tokens = tenant_usage.prompt_tokens + excluded.prompt_tokens, \
                 completion_tokens = tenant_usage.completion_tokens + excluded.completion_tokens, \
                 trained_tokens = tenant_usage.trained_tokens + excluded.trained_tokens",
            )
            .bind(tenant.0)
            .bind(*day)
            .bind(signed(usage.requests))
            .bind(signed(usage.prompt_tokens))
            .bind(signed(usage.completion_tokens))
            .bind(signed(usage.trained_tokens))
            .execute(&mut *self.connection)
            .await?;
        }
        Ok(())
    }
}

impl Store {
    /// Adds to what tenants used.
    ///
    /// # Errors
    /// Only the database's: then nothing was added.
    pub async fn add_usage(&self, usage: Vec<UsageOfDay>) -> Result<()> {
        self.writer.job(move |tx| Box::pin(async move { tx.add_usage(&usage).await })).await
    }

    /// What a tenant used on the days from one to another (days since 1970, both included), oldest first. Days without use are left out, and damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn usage(&self, tenant: TenantId, from: i64, to: i64) -> Result<Vec<UsageOfDay>> {
        let query = sqlx::query(
            "SELECT day, requests, prompt_tokens, completion_tokens, trained_tokens FROM tenant_usage \
             WHERE tenant = $1 AND day >= $2 AND day <= $3 ORDER BY day",
        );
        let rows = self.rows(query.bind(tenant.0).bind(from).bind(to)).await?;
        let usage = |row: &AnyRow| -> Result<UsageOfDay> {
            let usage = Usage {
                requests: count(row, 1)?,
                prompt_tokens: count(row, 2)?,
                completion_tokens: count(row, 3)?,
                trained_tokens: count(row, 4)?,
            };
            Ok(UsageOfDay { tenant, day: row.try_get(0)?, usage })
        };
        Ok(self.readable(&rows, usage, |row| format!("usage of tenant {}, day {}", tenant.0, shown(row, 0))))
    }
}
