//! What tenants used: on its way from memory to the store, and back to those who ask.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{Error, Service};
use crate::{
    store::{Store, StoreError},
    tenant::{Accounts, Usage},
    types::TenantId,
};

/// How often what was used is written.
const EVERY: Duration = Duration::from_secs(1);

/// Held by whoever carries what was used from memory to the store: on its way it is in neither, and whoever asks meanwhile waits for it.
pub(super) type Carrying = Arc<tokio::sync::Mutex<()>>;

/// A day and what was used on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DayOfUsage {
    /// Days since 1970, UTC.
    pub day: i64,
    /// What.
    pub usage: Usage,
}

/// Writes what was used every second, as long as somebody has the accounts. Returns what is held meanwhile.
pub(super) fn keep_writing(accounts: &Arc<Accounts>, store: &Store) -> Carrying {
    let carrying = Carrying::default();
    let (accounts, store, turn) = (Arc::downgrade(accounts), store.clone(), carrying.clone());
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(EVERY).await;
            let Some(accounts) = accounts.upgrade() else { return };
            match write(&accounts, &store, &turn).await {
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::error!(%error, "what tenants used could not be written; it is kept for the next time")
                }
                Ok(()) => {}
            }
        }
    });
    carrying
}

/// Writes what was used since the last time. What fails is kept.
async fn write(accounts: &Accounts, store: &Store, carrying: &Carrying) -> Result<(), StoreError> {
    let _turn = carrying.lock().await;
    let used = accounts.take_usage();
    if used.is_empty() {
        return Ok(());
    }
    let written = store.add_usage(used.clone()).await;
    if written.is_err() {
        accounts.put_back(used);
    }
    written
}

impl Service {
    /// Writes what was used up to now: before the store is closed, and before it is asked.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn write_usage(&self) -> Result<(), StoreError> {
        let (accounts, store, carrying) = (self.accounts.clone(), self.store.clone(), self.carrying.clone());
        // On its own: a client that leaves must not take along what is between memory and store.
        let written = tokio::spawn(async move { write(&accounts, &store, &carrying).await });
        written.await.unwrap_or(Err(StoreError::Closed))
    }

    /// What a tenant used on the days from one to another (days since 1970, UTC, both included), oldest first; days without use are left out.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn usage(&self, tenant: TenantId, from: i64, to: i64) -> Result<Vec<DayOfUsage>, Error> {
        // What is shown shall survive; where it cannot be written, it is shown all the same.
        if let Err(error) = self.write_usage().await {
            tracing::error!(%error, "what tenants used could not be written before it was asked for");
        }
        // Nothing is on its way from memory to the store meanwhile: each count is in one of them.
        let _turn = self.carrying.lock().await;
        let stored = self.store.usage(tenant, from, to).await.map_err(Error::store)?;
        let mut days: BTreeMap<i64, Usage> = stored.into_iter().map(|of| (of.day, of.usage)).collect();
        let pending = self.accounts.of(tenant).pending();
        for (day, usage) in pending.iter().filter(|(day, _)| (from..=to).contains(day)) {
            days.entry(*day).or_default().add(usage);
        }
        Ok(days.into_iter().map(|(day, usage)| DayOfUsage { day, usage }).collect())
    }
}
