//! Who asks for which adapters most, in bounded memory: the space-saving sketch of Metwally, Agrawal and El Abbadi (2005).

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use crate::types::TenantId;

/// Pairs of a tenant and an adapter that are counted at a time. Whatever has more than this part of all requests is among them.
const COUNTED: usize = 512;

/// A pair and its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Popular {
    pub(super) tenant_name: Arc<str>,
    pub(super) adapter: String,
    /// At least so many; exact while no more pairs than fit have come.
    pub(super) requests: u64,
}

/// The sketch.
#[derive(Debug, Default)]
pub(super) struct Popularity(Mutex<HashMap<(TenantId, String), Count>>);

#[derive(Debug)]
struct Count {
    tenant_name: Arc<str>,
    count: u64,
    /// What it took over from the pair whose place it has.
    inherited: u64,
}

impl Popularity {
    /// Counts a request of a tenant under an adapter.
    pub(super) fn count(&self, tenant: TenantId, tenant_name: &Arc<str>, adapter: &str) {
        let mut counts = self.0.lock();
        let key = (tenant, adapter.to_owned());
        if let Some(known) = counts.get_mut(&key) {
            known.count += 1;
            return;
        }
        let mut inherited = 0;
        if counts.len() >= COUNTED
            && let Some(least) = counts.iter().min_by_key(|(_, count)| count.count).map(|(key, _)| key.clone())
        {
            inherited = counts.remove(&least).map_or(0, |count| count.count);
        }
        counts.insert(key, Count { tenant_name: Arc::clone(tenant_name), count: inherited + 1, inherited });
    }

    /// The pairs with the most requests. Not for members: which of their own are counted depends on what others do.
    pub(super) fn top(&self, most: usize) -> Vec<Popular> {
        let mut all: Vec<_> = self
            .0
            .lock()
            .iter()
            .map(|((_, adapter), count)| Popular {
                tenant_name: Arc::clone(&count.tenant_name),
                adapter: adapter.clone(),
                requests: count.count - count.inherited,
            })
            .collect();
        all.sort_by(|a, b| b.requests.cmp(&a.requests).then_with(|| a.adapter.cmp(&b.adapter)));
        all.truncate(most);
        all
    }

    /// Forgets a tenant that is gone.
    pub(super) fn forget(&self, tenant: TenantId) {
        self.0.lock().retain(|(of, _), _| *of != tenant);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANN: TenantId = TenantId(7);
    const BOB: TenantId = TenantId(8);

    #[test]
    fn few_are_counted_exactly_and_each_tenant_s_apart() {
        let popularity = Popularity::default();
        let names: [(TenantId, Arc<str>); 2] = [(ANN, "ann".into()), (BOB, "bob".into())];
        for (times, (tenant, name)) in [3, 2].into_iter().zip(&names) {
            (0..times).for_each(|_| popularity.count(*tenant, name, "a"));
        }
        popularity.count(BOB, &names[1].1, "b");
        let found = || {
            let top = popularity.top(2);
            top.into_iter().map(|one| (one.tenant_name.to_string(), one.adapter, one.requests)).collect::<Vec<_>>()
        };
        assert_eq!(found(), [("ann".into(), "a".into(), 3), ("bob".into(), "a".into(), 2)]);
        popularity.forget(ANN);
        assert_eq!(found(), [("bob".into(), "a".into(), 2), ("bob".into(), "b".into(), 1)]);
    }

    #[test]
    fn memory_is_bounded_and_the_frequent_are_found_among_many() {
        let (popularity, name) = (Popularity::default(), Arc::from("ann"));
        for number in 0..20 * COUNTED {
            popularity.count(ANN, &name, &format!("rare-{number}"));
            if number % 10 == 0 {
                popularity.count(ANN, &name, "frequent");
            }
        }
        assert_eq!(popularity.0.lock().len(), COUNTED);
        let top = popularity.top(1);
        assert_eq!(top[0].adapter, "frequent");
        // Never more than the truth.
        assert!(top[0].requests <= 2 * COUNTED as u64 && top[0].requests > COUNTED as u64, "{top:?}");
    }
}
