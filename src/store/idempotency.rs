//! Answers kept under the key of the request they answered, so that a retried request is the same request.

use sqlx::{AnyConnection, Row as _};

use super::{Result, Store, StoreError, ask, decode, writer::Tx};
use crate::types::TenantId;

/// How long an answer is kept, in seconds.
pub(super) const KEEP: i64 = 24 * 60 * 60;

/// The answer kept for a key, unless it was to another request.
pub(super) async fn answer(
    connection: &mut AnyConnection,
    tenant: TenantId,
    route: &str,
    key: &str,
    request_hash: &[u8; 32],
) -> Result<Option<String>> {
    let query =
        sqlx::query("SELECT request_hash, response FROM idempotency WHERE tenant = $1 AND route = $2 AND key = $3");
    let row = ask::row(connection, query.bind(tenant.0).bind(route).bind(key)).await?;
    let Some(row) = row else { return Ok(None) };
    // An error of this request alone: others share its transaction.
    let hash = row.try_get(0).ok().and_then(|hash| decode::array::<32>(hash, "request hash").ok());
    if hash.ok_or(StoreError::AnswerDamaged)? != *request_hash {
        return Err(StoreError::IdempotencyMismatch);
    }
    ask::text(&row, 1).map(|answer| Some(answer.to_owned())).map_err(|_| StoreError::AnswerDamaged)
}

impl Tx<'_> {
    /// Keeps an answer, and drops those that are old or too many.
    pub(super) async fn keep_answer(
        &mut self,
        tenant: TenantId,
        route: &str,
        key: &str,
        request_hash: &[u8; 32],
        response: String,
    ) -> Result<()> {
        // What comes from far behind now was written by a clock that was wrong.
        sqlx::query("DELETE FROM idempotency WHERE created_at < $1 OR created_at > $2")
            .bind(self.now - KEEP)
            .bind(self.now + KEEP)
            .execute(&mut *self.connection)
            .await?;
        sqlx::query(
            "INSERT INTO idempotency (tenant, route, key, request_hash, response, created_at) \
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .bind(tenant.0)
        .bind(route)
        .bind(key)
        .bind(&request_hash[..])
        .bind(response)
        .bind(self.now)
        .execute(&mut *self.connection)
        .await?;
        self.keep_newest_answers(tenant).await
    }
}

impl Store {
    /// The answer kept for an idempotency key: asked before any work. The upload itself asks again in its transaction.
    ///
    /// # Errors
    /// [`StoreError::IdempotencyMismatch`] when the key came with another request.
    pub async fn kept_answer(
        &self,
        tenant: TenantId,
        route: &str,
        key: &str,
        request_hash: &[u8; 32],
    ) -> Result<Option<String>> {
        let mut connection = self.pool.acquire().await?;
        let kept = answer(&mut connection, tenant, route, key, request_hash).await?;
        self.writer.told().await;
        Ok(kept)
    }
}
