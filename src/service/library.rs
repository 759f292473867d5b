//! The adapters in memory: the registry that requests look into, and how it is filled from the store at start.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Weak},
    time::Instant,
};

use parking_lot::Mutex;
use prometheus_client::metrics::histogram::Histogram;

use super::{
    Error,
    salts::{Owned, Salts},
};
use crate::{
    adapter::{
        Adapter, Basis, Cores, Expander, Facts, Frame, Interner, NumberType, Registry, RegistryError, Scheme, Sites,
        cache_salt,
    },
    store::{Contents, CorruptAdapter, Facts as StoredFacts, LoadedAdapter, Store, StoreError},
    telemetry,
    types::{AdapterId, CacheSalt, Fingerprint, TenantId},
};

/// Entries of the table of live cores below which dead ones are not looked for.
const SWEEP_FROM: usize = 256;
/// Distinct facts whose translation is remembered; beyond this the memory starts anew.
const REMEMBERED: usize = 4096;

/// Every adapter, and what turns one into cores.
#[derive(Debug)]
pub struct Library {
    /// Names to generations.
    pub registry: Registry,
    /// Where equal facts become one.
    pub interner: Interner,
    /// Numbers to cores.
    pub expander: Expander,
    /// The base's fingerprint.
    pub fingerprint: Fingerprint,
    /// `mote_cores_expand_seconds`
    pub expand_seconds: Histogram,
    /// Cores of running requests: requests under one adapter share them, and so a slot of the batch.
    live: Mutex<HashMap<CacheSalt, Weak<Cores>>>,
    /// Under which salts a generation may have cached KV.
    salts: Mutex<Salts>,
    /// Names of adapters whose rows cannot be read: they mean an error, and not whatever else has the name.
    corrupt: Mutex<HashSet<(TenantId, String)>>,
    /// The store's facts in our terms, and ours in the store's: an upload or a row costs no JSON.
    read: Mutex<HashMap<Arc<StoredFacts>, OurFacts>>,
    written: Mutex<HashMap<FactsKey, Arc<StoredFacts>>>,
}

/// Facts, and how many numbers go with them if they are of this base.
pub(super) type OurFacts = (Facts, Option<usize>);

/// Everything that tells facts apart.
type FactsKey = ([u8; 44], NumberType, Option<Vec<u8>>, Fingerprint, bool);

/// An adapter as the store keeps it, which this program cannot have written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct BadContents(String);

impl Library {
    /// An empty library over a basis, of adapters of up to rank `served`.
    pub fn new(sites: Sites, basis: Arc<Basis>, served: usize) -> Self {
        Self {
            registry: Registry::new(),
            interner: Interner::new(),
            fingerprint: basis.fingerprint,
            expander: Expander::new(sites, basis, served),
            expand_seconds: telemetry::short_seconds(),
            live: Mutex::default(),
            salts: Mutex::default(),
            corrupt: Mutex::default(),
            read: Mutex::default(),
            written: Mutex::default(),
        }
    }

    /// Reads every adapter of the store into the registry. A row that cannot be read is logged and set apart.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn fill(&self, store: &Store) -> Result<u64, StoreError> {
        let read = |loaded: Result<LoadedAdapter, CorruptAdapter>| match loaded {
            Ok(loaded) => self.publish(loaded.id, loaded.tenant, &loaded.name, loaded.public, &loaded.contents),
            Err(corrupt) => self.set_apart(corrupt.id, corrupt.tenant, &corrupt.name, &corrupt.cause),
        };
        store.load_all(read).await
    }

    /// A name whose row cannot be read.
    fn set_apart(&self, id: AdapterId, tenant: TenantId, name: &str, error: &str) {
        tracing::error!(adapter = id.0, tenant = tenant.0, name, error, "an adapter in the store cannot be read");
        let _ = self.registry.remove(tenant, name, None);
        self.corrupt.lock().insert((tenant, name.to_owned()));
    }

    /// The name is gone, or means something again.
    pub fn mended(&self, tenant: TenantId, name: &str) {
        let mut corrupt = self.corrupt.lock();
        if !corrupt.is_empty() {
            corrupt.remove(&(tenant, name.to_owned()));
        }
    }

    /// Is this a name of the tenant's whose adapter cannot be read?
    pub fn is_corrupt(&self, tenant: TenantId, name: &str) -> bool {
        let corrupt = self.corrupt.lock();
        !corrupt.is_empty() && corrupt.contains(&(tenant, name.to_owned()))
    }

    /// Adapters that cannot be read.
    pub fn corrupt(&self) -> usize {
        self.corrupt.lock().len()
    }

    /// Points a name at what the store has for it now. What cannot be read is logged, and the name means an error.
    pub fn publish(&self, id: AdapterId, tenant: TenantId, name: &str, public: bool, contents: &Contents) {
        let published = self.adapter_of(contents).map_err(|error| error.to_string()).and_then(|adapter| {
            self.registry.put(tenant, name, adapter, public).map_err(|error: RegistryError| error.to_string())
        });
        match published {
            Ok(_) => self.mended(tenant, name),
            Err(error) => self.set_apart(id, tenant, name, &error),
        }
    }

    /// The adapter that stored contents describe, of this base or of another.
    ///
    /// # Errors
    /// Contents that are no adapter.
    pub fn adapter_of(&self, contents: &Contents) -> Result<Arc<Adapter>, BadContents> {
        let (facts, numbers) = self.facts_of(&contents.facts)?;
        // The site count of another base is unknown: its adapters are kept and listed, never expanded.
        let numbers = numbers.unwrap_or(contents.data.len() / facts.dtype.size());
        self.interner.adapter(facts, &contents.data, numbers).map_err(bad)
    }

    /// What stored facts say in terms of this base.
    ///
    /// # Errors
    /// Facts that no adapter has.
    pub(super) fn facts_of(&self, stored: &Arc<StoredFacts>) -> Result<OurFacts, BadContents> {
        if let Some(known) = self.read.lock().get(stored) {
            return Ok(known.clone());
        }
        let value = serde_json::from_str(&stored.scheme).map_err(bad)?;
        let scheme = Scheme::from_json(&value).map_err(bad)?;
        let dtype = NumberType::from_name(&stored.dtype).ok_or_else(|| bad("an unknown dtype"))?;
        let of_this_base = stored.fingerprint == self.fingerprint;
        let approximate = !of_this_base && stored.forced_onto == Some(self.fingerprint);
        let ours = of_this_base || approximate;
        let sites = self.expander.sites();
        let frame = match stored.frame.as_deref() {
            Some(bytes) if ours => Some(Frame::from_bytes(bytes, &scheme, sites).map_err(bad)?),
            _ => None,
        };
        let numbers = ours.then(|| scheme.numbers(sites));
        let facts = Facts { scheme, frame, fingerprint: stored.fingerprint, dtype, approximate };
        let mut read = self.read.lock();
        if read.len() >= REMEMBERED {
            read.clear();
        }
        read.insert(stored.clone(), (facts.clone(), numbers));
        Ok((facts, numbers))
    }

    /// An adapter's facts as the store keeps them.
    pub fn stored_facts(&self, facts: &Facts) -> Arc<StoredFacts> {
        let frame = facts.frame.as_ref().map(Frame::to_bytes);
        let key = (facts.scheme.canonical_bytes(), facts.dtype, frame, facts.fingerprint, facts.approximate);
        let mut written = self.written.lock();
        if let Some(known) = written.get(&key) {
            return known.clone();
        }
        let stored = Arc::new(StoredFacts {
            dtype: facts.dtype.name().to_owned(),
            scheme: facts.scheme.to_full_json().to_string(),
            frame: key.2.clone(),
            fingerprint: facts.fingerprint,
            forced_onto: facts.approximate.then_some(self.fingerprint),
        });
        if written.len() >= REMEMBERED {
            written.clear();
        }
        written.insert(key, stored.clone());
        stored
    }

    /// May requests of this server run under it?
    pub fn is_compatible(&self, adapter: &Adapter) -> bool {
        self.is_of_this_base(adapter.facts())
    }

    /// The same of an adapter of which only the facts are at hand.
    pub fn is_of_this_base(&self, facts: &Facts) -> bool {
        facts.approximate || facts.fingerprint == self.fingerprint
    }

    /// Under which hash a request of the tenant may share KV blocks.
    pub fn salt(&self, tenant: TenantId, parts: &[(&Adapter, f32)]) -> CacheSalt {
        cache_salt(tenant, &self.fingerprint.to_string(), parts)
    }

    /// Notes that requests of a generation may leave KV under a salt. Gives a salt that is no longer remembered: its KV is to be purged.
    #[must_use]
    pub fn note_salt(&self, salt: CacheSalt, generations: impl Iterator<Item = Owned>) -> Option<CacheSalt> {
        self.salts.lock().note(salt, generations)
    }

    /// The salts under which requests of a generation ran; forgets them.
    pub fn take_salts(&self, generation: Owned) -> Vec<CacheSalt> {
        self.salts.lock().take(generation)
    }

    /// Does a request run under the salt?
    pub fn is_live(&self, salt: CacheSalt) -> bool {
        self.live.lock().get(&salt).is_some_and(|cores| cores.strong_count() > 0)
    }

    /// Cores of a weighted sum; those of a running request with the same salt, if there is one.
    ///
    /// # Errors
    /// A scheme that this server does not serve, a mix of different schemes, weights that overflow.
    pub fn cores(&self, salt: CacheSalt, parts: &[(&Adapter, f32)]) -> Result<Arc<Cores>, Error> {
        if let Some(cores) = self.live.lock().get(&salt).and_then(Weak::upgrade) {
            return Ok(cores);
        }
        let began = Instant::now();
        let cores = self.expander.expand(parts).map_err(|error| Error::invalid("adapter", error.to_string()))?;
        self.expand_seconds.observe(began.elapsed().as_secs_f64());
        let mut live = self.live.lock();
        // Swept only when the map is about to grow: the cost stays constant an insertion.
        if live.len() >= SWEEP_FROM && live.len() == live.capacity() {
            live.retain(|_, cores| cores.strong_count() > 0);
        }
        // Another request may have been quicker; either result has the same bits.
        live.insert(salt, Arc::downgrade(&cores));
        Ok(cores)
    }
}

fn bad(cause: impl std::fmt::Display) -> BadContents {
    BadContents(cause.to_string())
}
