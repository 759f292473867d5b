//! What tenants with a limit on it have stored: counted once, and then kept in step by the one writer.

use std::collections::HashMap;

use sqlx::Row as _;

use super::{Result, StoreError, writer::Tx};
use crate::{tenant::Room, types::TenantId};

/// A tenant's adapters, and the bytes of its adapters and files.
#[derive(Debug, Clone, Copy)]
struct Total {
    adapters: i64,
    bytes: i64,
}

/// The writer's memory of totals. Tenants without limits are not in it.
#[derive(Debug, Default)]
pub(super) struct Totals(HashMap<TenantId, Total>);

impl Totals {
    /// The next use counts anew.
    pub(super) fn forget(&mut self, tenant: TenantId) {
        self.0.remove(&tenant);
    }

    /// Something was added or taken away.
    pub(super) fn add(&mut self, tenant: TenantId, adapters: i64, bytes: i64) {
        if let Some(total) = self.0.get_mut(&tenant) {
            total.adapters += adapters;
            total.bytes += bytes;
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
            self.totals.forget(tenant);
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
        if let Some(total) = self.totals.0.get(&tenant) {
            return Ok(*total);
        }
        let row = sqlx::query(
            "SELECT (SELECT COUNT(*) FROM adapters WHERE tenant = $1 AND deleted = 0), \
             CAST(COALESCE((SELECT SUM(OCTET_LENGTH(metadata)) FROM adapters WHERE tenant = $1 AND deleted = 0), 0) \
             + COALESCE((SELECT SUM(OCTET_LENGTH(g.data)) FROM generations g JOIN adapters a ON a.id = g.adapter \
             WHERE a.tenant = $1 AND a.deleted = 0), 0) \
             + COALESCE((SELECT SUM(bytes) FROM files WHERE tenant = $1), 0) AS BIGINT)",
        )
        .bind(tenant.0)
        .fetch_one(&mut *self.connection)
        .await?;
        let total = Total { adapters: row.try_get(0)?, bytes: row.try_get(1)? };
        self.totals.0.insert(tenant, total);
        Ok(total)
    }
}
