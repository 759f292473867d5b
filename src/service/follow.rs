//! Keeps the adapters in memory equal to the store: what was committed is what names mean, before the writer has its answer.

use std::{sync::Arc, time::Duration};

use super::Library;
use crate::{
    engine::Handle,
    store::{Change, Observer},
    types::{CacheSalt, Generation, TenantId},
};

/// How often a request that outlives its adapter is looked after.
const PATIENCE: Duration = Duration::from_millis(250);

/// Applies the store's changes to the library, in the order of commits.
pub(super) struct Follower {
    pub(super) library: Arc<Library>,
    pub(super) engine: Handle,
}

impl Observer for Follower {
    fn committed(&self, change: Change) {
        match change {
            Change::Stored(record) => {
                self.library.publish(record.id, record.tenant, &record.name, record.public, &record.contents);
            }
            Change::Deleted { tenant, name, generations } => {
                // A name that could not be read at start is not there.
                let _ = self.library.registry.remove(tenant, &name, None);
                self.library.mended(tenant, &name);
                self.erase_all(tenant, generations);
            }
            Change::Pruned { tenant, generations } => self.erase_all(tenant, generations),
        }
    }
}

impl Follower {
    /// Erases the KV of a tenant's generations.
    fn erase_all(&self, tenant: TenantId, generations: Vec<Generation>) {
        for generation in generations {
            self.library.take_salts((tenant, generation)).into_iter().for_each(|salt| self.erase(salt));
        }
    }

    /// Erases the KV under a salt, now and once more when the last request under it has ended.
    fn erase(&self, salt: CacheSalt) {
        self.engine.purge(salt);
        if !self.library.is_live(salt) {
            return;
        }
        let (library, engine) = (self.library.clone(), self.engine.clone());
        tokio::spawn(async move {
            while library.is_live(salt) {
                tokio::time::sleep(PATIENCE).await;
            }
            engine.purge(salt);
        });
    }
}
