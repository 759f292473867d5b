//! Places that each tenant has a few of: for work that is not metered, or that waits for strangers.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::types::TenantId;

/// Tenants beyond which those without a place in use are forgotten.
const SWEEP_AT: usize = 1024;

/// So many places for each tenant.
#[derive(Debug)]
pub struct Places {
    of_each: usize,
    tenants: Mutex<HashMap<TenantId, Arc<Semaphore>>>,
}

impl Places {
    /// So many for each.
    pub fn new(of_each: usize) -> Self {
        Self { of_each, tenants: Mutex::default() }
    }

    /// Those of a tenant: a permit of it (an owned one) is a place.
    pub fn of(&self, tenant: TenantId) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock();
        if tenants.len() >= SWEEP_AT {
            // A place holds its semaphore, as does whoever waits for one.
            tenants.retain(|_, places| Arc::strong_count(places) > 1);
        }
        tenants.entry(tenant).or_insert_with(|| Arc::new(Semaphore::new(self.of_each))).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_has_a_few_and_those_in_use_are_remembered() {
        let places = Places::new(2);
        let [ann, bob] = [1, 2].map(TenantId);
        let held: Vec<_> = std::iter::from_fn(|| places.of(ann).try_acquire_owned().ok()).collect();
        assert_eq!(held.len(), 2);
        assert!(places.of(bob).try_acquire_owned().is_ok());
        for tenant in 3..3 + 3 * SWEEP_AT as i64 {
            assert!(places.of(TenantId(tenant)).try_acquire_owned().is_ok());
            assert!(places.of(ann).try_acquire_owned().is_err(), "after {tenant}");
        }
        assert!(places.tenants.lock().len() <= SWEEP_AT);
        drop(held);
        assert!(places.of(ann).try_acquire_owned().is_ok());
    }
}
