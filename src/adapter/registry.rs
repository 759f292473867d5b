//! Which generation a name means now. Everything is in memory; the store is the truth across restarts.

use std::{collections::HashMap, sync::Arc};

use dashmap::{DashMap, Entry};
use parking_lot::RwLock;

use super::Adapter;
use crate::types::{Generation, TenantId};

/// Longest name of an adapter.
pub const MAX_NAME: usize = 64;

/// A change that was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// Not 1..64 of `[A-Za-z0-9._-]`, or a word that the routes use.
    #[error("{0}")]
    Name(String),
    /// The tenant has an adapter of this name.
    #[error("the name is taken")]
    Taken,
    /// The tenant has no adapter of this name.
    #[error("there is no adapter of this name")]
    NotFound,
    /// Compare-and-swap: the name means another generation by now.
    #[error("the adapter is at generation {current}")]
    GenerationMismatch {
        /// What it means now.
        current: Generation,
    },
}

/// Checks the name of an adapter.
///
/// # Errors
/// [`RegistryError::Name`], in words for the client.
pub fn check_name(name: &str) -> Result<(), RegistryError> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
    if name.is_empty() || name.len() > MAX_NAME || !name.bytes().all(allowed) {
        return Err(RegistryError::Name(format!("a name is 1 to {MAX_NAME} of the characters A-Z a-z 0-9 . _ -")));
    }
    if matches!(name, "train" | "batch" | "schemes" | "." | "..") {
        return Err(RegistryError::Name(format!("'{name}' is reserved")));
    }
    Ok(())
}

/// Tenant (8 bytes) and name in one allocation: with a million entries, every pointer counts.
type Key = Box<[u8]>;

/// A key on the stack, for look-ups.
struct KeyBuffer {
    bytes: [u8; 8 + MAX_NAME],
    len: usize,
}

impl KeyBuffer {
    /// None for a name too long to exist.
    fn new(tenant: TenantId, name: &str) -> Option<Self> {
        let mut bytes = [0u8; 8 + MAX_NAME];
        let len = 8 + name.len();
        bytes[..8].copy_from_slice(&tenant.0.to_be_bytes());
        bytes.get_mut(8..len)?.copy_from_slice(name.as_bytes());
        Some(Self { bytes, len })
    }

    fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[derive(Debug)]
struct Slot {
    adapter: Arc<Adapter>,
    public: bool,
}

/// A name looked up: the `Arc` is the lease that a request holds until it ends.
#[derive(Debug, Clone)]
pub struct Lease {
    /// The generation the name means now.
    pub adapter: Arc<Adapter>,
    /// Whose it is.
    pub owner: TenantId,
    /// May other tenants use it?
    pub public: bool,
}

/// (tenant, name) -> the current generation. Never evicts: a million adapters are a few hundred megabytes.
///
/// Lock order: a shard of `slots`, then `counts` or `published`; readers of `published` hold nothing else.
#[derive(Debug, Default)]
pub struct Registry {
    slots: DashMap<Key, Slot>,
    counts: DashMap<TenantId, usize>,
    /// Name -> tenants that publish it, ascending. Few, so that one lock does.
    published: RwLock<HashMap<Box<str>, Vec<TenantId>>>,
}

impl Registry {
    /// An empty registry.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a name.
    ///
    /// # Errors
    /// A bad name, or one that the tenant has already.
    pub fn insert(
        &self,
        tenant: TenantId,
        name: &str,
        adapter: Arc<Adapter>,
        public: bool,
    ) -> Result<(), RegistryError> {
        check_name(name)?;
        match self.slots.entry(key(tenant, name)?.as_slice().into()) {
            Entry::Occupied(_) => Err(RegistryError::Taken),
            Entry::Vacant(vacant) => {
                let slot = vacant.insert(Slot { adapter, public });
                *self.counts.entry(tenant).or_default() += 1;
                self.set_published(tenant, name, public);
                drop(slot);
                Ok(())
            }
        }
    }

    /// Points a name at another generation, atomically; requests that hold a lease keep theirs. With `expected`, only if the name
    /// means that generation now. Returns the generation it meant before.
    ///
    /// # Errors
    /// No such name, or another generation than expected.
    pub fn replace(
        &self,
        tenant: TenantId,
        name: &str,
        adapter: Arc<Adapter>,
        expected: Option<Generation>,
    ) -> Result<Arc<Adapter>, RegistryError> {
        let mut slot = self.slots.get_mut(key(tenant, name)?.as_slice()).ok_or(RegistryError::NotFound)?;
        check_generation(&slot.adapter, expected)?;
        Ok(std::mem::replace(&mut slot.adapter, adapter))
    }

    /// Adds a name or points it at another generation, atomically; sets its visibility. Returns what it meant before.
    ///
    /// # Errors
    /// A bad name.
    pub fn put(
        &self,
        tenant: TenantId,
        name: &str,
        adapter: Arc<Adapter>,
        public: bool,
    ) -> Result<Option<Arc<Adapter>>, RegistryError> {
        check_name(name)?;
        let mut slot = match self.slots.entry(key(tenant, name)?.as_slice().into()) {
            Entry::Vacant(vacant) => {
                let slot = vacant.insert(Slot { adapter, public });
                *self.counts.entry(tenant).or_default() += 1;
                self.set_published(tenant, name, public);
                drop(slot);
                return Ok(None);
            }
            Entry::Occupied(occupied) => occupied.into_ref(),
        };
        slot.public = public;
        self.set_published(tenant, name, public);
        Ok(Some(std::mem::replace(&mut slot.adapter, adapter)))
    }

    /// Forgets a name; with `expected`, only if it means that generation. Requests that hold a lease keep theirs.
    ///
    /// # Errors
    /// No such name, or another generation than expected.
    pub fn remove(
        &self,
        tenant: TenantId,
        name: &str,
        expected: Option<Generation>,
    ) -> Result<Arc<Adapter>, RegistryError> {
        let Entry::Occupied(occupied) = self.slots.entry(key(tenant, name)?.as_slice().into()) else {
            return Err(RegistryError::NotFound);
        };
        check_generation(&occupied.get().adapter, expected)?;
        self.set_published(tenant, name, false);
        self.counts.remove_if_mut(&tenant, |_, count| {
            *count -= 1;
            *count == 0
        });
        Ok(occupied.remove().adapter)
    }

    /// Lets other tenants use a name, or no longer.
    ///
    /// # Errors
    /// No such name.
    pub fn set_public(&self, tenant: TenantId, name: &str, public: bool) -> Result<(), RegistryError> {
        let mut slot = self.slots.get_mut(key(tenant, name)?.as_slice()).ok_or(RegistryError::NotFound)?;
        slot.public = public;
        self.set_published(tenant, name, public);
        Ok(())
    }

    /// A tenant's own adapter.
    pub fn get(&self, tenant: TenantId, name: &str) -> Option<Lease> {
        let slot = self.slots.get(KeyBuffer::new(tenant, name)?.as_slice())?;
        Some(Lease { adapter: Arc::clone(&slot.adapter), owner: tenant, public: slot.public })
    }

    /// What a name means to a tenant: its own adapter, else a public one (of the lowest tenant number, if several publish it).
    pub fn resolve(&self, tenant: TenantId, name: &str) -> Option<Lease> {
        self.get(tenant, name).or_else(|| {
            let owners = self.published.read().get(name).cloned()?;
            owners.into_iter().filter_map(|owner| self.get(owner, name)).find(|lease| lease.public)
        })
    }

    /// Every public adapter, by name.
    pub fn published(&self) -> Vec<(String, Lease)> {
        let names: Vec<(Box<str>, Vec<TenantId>)> =
            self.published.read().iter().map(|(name, owners)| (name.clone(), owners.clone())).collect();
        let of_name = |(name, owners): (Box<str>, Vec<TenantId>)| {
            owners.into_iter().filter_map(|owner| Some((name.to_string(), self.get(owner, &name)?))).collect::<Vec<_>>()
        };
        let mut all: Vec<_> = names.into_iter().flat_map(of_name).filter(|(_, lease)| lease.public).collect();
        all.sort_by(|a, b| (&a.0, a.1.owner).cmp(&(&b.0, b.1.owner)));
        all
    }

    /// Adapters of all tenants.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Adapters of one tenant.
    pub fn count(&self, tenant: TenantId) -> usize {
        self.counts.get(&tenant).map_or(0, |count| *count)
    }

    /// Called under the lock of the slot, so that the index cannot fall behind it.
    fn set_published(&self, tenant: TenantId, name: &str, public: bool) {
        // Private adapters of names that nobody publishes, which is nearly all of them, only read.
        if !public && !self.published.read().contains_key(name) {
            return;
        }
        let mut published = self.published.write();
        let owners = published.entry(name.into()).or_default();
        match (owners.binary_search(&tenant), public) {
            (Err(at), true) => owners.insert(at, tenant),
            (Ok(at), false) => drop(owners.remove(at)),
            _ => {}
        }
        if owners.is_empty() {
            published.remove(name);
        }
    }
}

fn key(tenant: TenantId, name: &str) -> Result<KeyBuffer, RegistryError> {
    KeyBuffer::new(tenant, name).ok_or(RegistryError::NotFound)
}

fn check_generation(adapter: &Adapter, expected: Option<Generation>) -> Result<(), RegistryError> {
    let current = adapter.generation();
    match expected {
        Some(expected) if expected != current => Err(RegistryError::GenerationMismatch { current }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        adapter::{Facts, Interner, NumberType, Scheme},
        types::Fingerprint,
    };

    const ALICE: TenantId = TenantId(1);
    const BOB: TenantId = TenantId(2);

    fn facts() -> Facts {
        Facts {
            scheme: Scheme::tiny13(),
            frame: None,
            fingerprint: Fingerprint([0; 32]),
            dtype: NumberType::Bf16,
            approximate: false,
        }
    }

    fn adapter(byte: u8) -> Arc<Adapter> {
        Interner::new().adapter(facts(), &[byte; 26], 13).unwrap()
    }

    #[test]
    fn names_follow_the_rules() {
        for good in ["a", "A.b_c-9", &"x".repeat(64), "...", "trains"] {
            check_name(good).unwrap();
        }
        for bad in ["", "a b", "é", "a/b", &"x".repeat(65), "train", "batch", "schemes", ".", ".."] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_lease_outlives_replacement_and_removal() {
        let registry = Registry::new();
        registry.insert(ALICE, "a", adapter(1), false).unwrap();
        assert_eq!(registry.insert(ALICE, "a", adapter(2), false), Err(RegistryError::Taken));
        let lease = registry.get(ALICE, "a").unwrap();
        let stale = adapter(9).generation();
        let current = adapter(1).generation();
        let mismatch = RegistryError::GenerationMismatch { current };
        assert_eq!(registry.replace(ALICE, "a", adapter(2), Some(stale)).unwrap_err(), mismatch);
        registry.replace(ALICE, "a", adapter(2), Some(current)).unwrap();
        assert_eq!(registry.get(ALICE, "a").unwrap().adapter.bytes()[0], 2);
        assert!(registry.remove(ALICE, "a", Some(current)).is_err());
        registry.remove(ALICE, "a", None).unwrap();
        assert_eq!(lease.adapter.bytes()[0], 1, "the lease is what it was");
        assert!(registry.get(ALICE, "a").is_none());
        assert_eq!(registry.remove(ALICE, "a", None).unwrap_err(), RegistryError::NotFound);
        assert_eq!(registry.replace(ALICE, "a", adapter(2), None).unwrap_err(), RegistryError::NotFound);
        assert!(registry.is_empty() && registry.count(ALICE) == 0);
    }

    #[test]
    fn tenants_see_their_own_then_public_ones() {
        let registry = Registry::new();
        registry.insert(ALICE, "x", adapter(1), false).unwrap();
        let seen = |tenant| registry.resolve(tenant, "x").map(|lease| (lease.owner, lease.adapter.bytes()[0]));
        assert_eq!((seen(ALICE), seen(BOB)), (Some((ALICE, 1)), None));
        registry.set_public(ALICE, "x", true).unwrap();
        assert_eq!(seen(BOB), Some((ALICE, 1)));
        registry.insert(BOB, "x", adapter(2), false).unwrap();
        assert_eq!((seen(ALICE), seen(BOB)), (Some((ALICE, 1)), Some((BOB, 2))), "one's own comes first");
        assert_eq!(registry.published().len(), 1);
        registry.put(ALICE, "x", adapter(3), false).unwrap();
        registry.remove(BOB, "x", None).unwrap();
        assert_eq!((seen(ALICE), seen(BOB)), (Some((ALICE, 3)), None), "put made it private");
        registry.set_public(ALICE, "x", true).unwrap();
        registry.remove(ALICE, "x", None).unwrap();
        assert!(seen(BOB).is_none() && registry.published().is_empty() && registry.published.read().is_empty());
    }

    #[test]
    fn a_tenant_cannot_be_spelt_in_a_name() {
        let registry = Registry::new();
        registry.insert(TenantId(0), "a", adapter(1), false).unwrap();
        assert!(registry.get(TenantId(0), "\0a").is_none());
        assert!(registry.get(TenantId(0), &"a".repeat(100)).is_none());
        assert!(registry.resolve(TenantId(-1), "a").is_none());
    }

    #[test]
    fn concurrent_changes_keep_index_and_counts_right() {
        let registry = Registry::new();
        std::thread::scope(|scope| {
            for thread in 0..4u8 {
                let registry = &registry;
                scope.spawn(move || {
                    for round in 0..500u32 {
                        let name = format!("n{}", round % 7);
                        let tenant = TenantId(i64::from(round % 3));
                        match (round + u32::from(thread)) % 4 {
                            0 => drop(registry.remove(tenant, &name, None)),
                            1 => drop(registry.set_public(tenant, &name, round % 2 == 0)),
                            _ => drop(registry.put(tenant, &name, adapter(thread), round % 5 == 0)),
                        }
                        drop(registry.resolve(TenantId(9), &name));
                    }
                });
            }
        });
        let total: usize = (0..3).map(|tenant| registry.count(TenantId(tenant))).sum();
        assert_eq!(total, registry.len());
        let public = registry.slots.iter().filter(|slot| slot.public).count();
        assert_eq!(registry.published().len(), public);
    }

    /// Prints bytes an adapter. `cargo nextest run --lib --run-ignored only a_million_adapters --no-capture`
    #[test]
    #[ignore = "a measurement: 300 MB"]
    fn a_million_adapters() {
        let resident = || -> usize {
            let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
            statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let (registry, interner) = (Registry::new(), Interner::new());
        let (before, start) = (resident(), std::time::Instant::now());
        for i in 0..1_000_000u32 {
            let mut bytes = [0u8; 26];
            bytes[..4].copy_from_slice(&(i & 0x3fff_3fff).to_le_bytes());
            let adapter = interner.adapter(facts(), &bytes, 13).unwrap();
            registry.insert(TenantId(i64::from(i % 1000)), &format!("adapter-{i:07}"), adapter, false).unwrap();
        }
        let each = (resident() - before) as f64 / 1e6;
        println!("{each:.0} bytes an adapter, {:?} for a million", start.elapsed());
        assert!(each < 300.0);
    }
}
