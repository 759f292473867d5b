//! How long is kept what would else grow without end.

use std::{sync::Arc, time::Duration};

use super::Service;
use crate::store::{Aged, Store, StoreError};

/// How often old rows are looked for, and how long uploads have the writer for themselves between two pieces that are dropped.
const BETWEEN_LOOKS: Duration = Duration::from_secs(3600);
const BETWEEN_PIECES: Duration = Duration::from_millis(100);
/// By how much the time that things are measured by may follow the clock, at the first look of a process and at each later one. After a month without a
/// server old things go within two days; a clock that is ten years ahead for an hour makes nothing older than a day or two.
const FIRST_STEP: i64 = 3600;
const STEP: i64 = 24 * 3600;

/// For how long things are kept, and how many of some. None: for ever, and all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Retention {
    /// Entries of the audit log.
    pub audit: Option<u32>,
    /// Entries of the audit log of each tenant: this many, the newest.
    pub audit_entries: Option<u32>,
    /// Jobs, after their end.
    pub jobs: Option<u32>,
    /// Keys, after their end.
    pub keys: Option<u32>,
    /// Tenants' usage.
    pub usage: Option<u32>,
}

impl Retention {
    fn each(&self) -> impl Iterator<Item = (Aged, u32)> {
        let kept =
            [(Aged::Audit, self.audit), (Aged::Jobs, self.jobs), (Aged::Keys, self.keys), (Aged::Usage, self.usage)];
        let own = (Aged::Answers, Some(0));
        kept.into_iter().chain([own]).filter_map(|(aged, days)| Some((aged, days?)))
    }
}

impl Service {
    /// From now on what is older than that is dropped.
    pub fn keep_for(&self, retention: Retention) {
        let (store, alive) = (self.store.clone(), Arc::downgrade(&self.accounts));
        tokio::spawn(async move {
            let mut step = FIRST_STEP;
            while alive.strong_count() > 0 {
                match look(&store, retention, step).await {
                    Ok(()) => {}
                    Err(StoreError::Closed) => return,
                    Err(error) => tracing::error!(%error, "old rows of the store cannot be dropped"),
                }
                step = STEP;
                tokio::time::sleep(BETWEEN_LOOKS).await;
            }
        });
    }
}

/// Drops what is old now. What fails does not keep the rest.
async fn look(store: &Store, retention: Retention, step: i64) -> Result<(), StoreError> {
    let now = store.now(step).await?;
    for (aged, days) in retention.each() {
        loop {
            match store.drop_aged(aged, days, now).await {
                Ok(true) => tokio::time::sleep(BETWEEN_PIECES).await,
                Ok(false) => break,
                Err(StoreError::Closed) => return Err(StoreError::Closed),
                Err(error) => {
                    tracing::error!(%error, what = aged.as_str(), "old rows of the store cannot be dropped");
                    break;
                }
            }
        }
    }
    if let Some(most) = retention.audit_entries {
        match drop_excess(store, most).await {
            Err(error) if !matches!(error, StoreError::Closed) => {
                tracing::error!(%error, "the audit log cannot be shortened");
            }
            done => done?,
        }
    }
    Ok(())
}

/// Drops what tenants have in the audit log beyond their newest entries.
async fn drop_excess(store: &Store, most: u32) -> Result<(), StoreError> {
    for mut excess in store.excess(most).await? {
        while store.drop_excess(&mut excess).await? {
            tokio::time::sleep(BETWEEN_PIECES).await;
        }
    }
    Ok(())
}
