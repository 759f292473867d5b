//! The adapters in memory: the registry that requests look into, and how it is filled from the store at start.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::Error;
use crate::{
    adapter::{
        Adapter, Basis, Expander, Facts, Frame, Interner, NumberType, Registry, RegistryError, Scheme, Sites,
        cache_salt,
    },
    kernel::Cores,
    store::{Contents, Store, StoreError},
    types::{CacheSalt, Fingerprint, TenantId},
};

/// Entries of the table of live cores below which dead ones are not looked for.
const SWEEP_FROM: usize = 256;

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
    /// Cores of running requests: requests under one adapter share them, and so a slot of the batch.
    live: Mutex<HashMap<CacheSalt, Weak<Cores>>>,
}

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
            live: Mutex::default(),
        }
    }

    /// Reads every adapter of the store into the registry. A row that cannot be read is logged and left out.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn fill(&self, store: &Store) -> Result<u64, StoreError> {
        // Schemes are interned in the store; most adapters share one.
        let mut schemes: HashMap<Arc<str>, Scheme> = HashMap::new();
        store
            .load_all(|loaded| {
                let adapter = self.adapter_of(&loaded.contents, &mut schemes);
                let result = adapter.map_err(|error| error.to_string()).and_then(|adapter| {
                    self.registry
                        .put(loaded.tenant, &loaded.name, adapter, loaded.public)
                        .map_err(|error: RegistryError| error.to_string())
                });
                if let Err(error) = result {
                    tracing::error!(
                        adapter = loaded.id.0,
                        tenant = loaded.tenant.0,
                        error,
                        "an adapter in the store cannot be read; it is left out"
                    );
                }
            })
            .await
    }

    /// The adapter that stored contents describe, of this base or of another.
    ///
    /// # Errors
    /// Contents that are no adapter.
    pub fn adapter_of(
        &self,
        contents: &Contents,
        schemes: &mut HashMap<Arc<str>, Scheme>,
    ) -> Result<Arc<Adapter>, BadContents> {
        let scheme = match schemes.get(&contents.scheme) {
            Some(scheme) => scheme.clone(),
            None => {
                let value = serde_json::from_str(&contents.scheme).map_err(bad)?;
                let scheme = Scheme::from_json(&value).map_err(bad)?;
                schemes.insert(contents.scheme.clone(), scheme.clone());
                scheme
            }
        };
        let dtype = NumberType::from_name(&contents.dtype).ok_or_else(|| bad("an unknown dtype"))?;
        let of_this_base = contents.fingerprint == self.fingerprint;
        let approximate = !of_this_base && contents.forced_onto == Some(self.fingerprint);
        // The site count of another base is unknown: its adapters are kept and listed, never expanded.
        let (numbers, frame) = if of_this_base || approximate {
            let sites = self.expander.sites();
            let frame = contents.signs.as_deref().map(|bytes| Frame::from_bytes(bytes, &scheme, sites));
            (scheme.numbers(sites), frame.transpose().map_err(bad)?)
        } else {
            (contents.data.len() / dtype.size(), None)
        };
        let facts = Facts { scheme, frame, fingerprint: contents.fingerprint, dtype, approximate };
        self.interner.adapter(facts, &contents.data, numbers).map_err(bad)
    }

    /// May requests of this server run under it?
    pub fn is_compatible(&self, adapter: &Adapter) -> bool {
        adapter.facts().approximate || adapter.facts().fingerprint == self.fingerprint
    }

    /// Under which hash a request of the tenant may share KV blocks.
    pub fn salt(&self, tenant: TenantId, parts: &[(&Adapter, f32)]) -> CacheSalt {
        cache_salt(tenant, &self.fingerprint.to_string(), parts)
    }

    /// Cores of a weighted sum; those of a running request with the same salt, if there is one.
    ///
    /// # Errors
    /// A scheme that this server does not serve, a mix of different schemes, weights that overflow.
    pub fn cores(&self, salt: CacheSalt, parts: &[(&Adapter, f32)]) -> Result<Arc<Cores>, Error> {
        if let Some(cores) = self.live.lock().get(&salt).and_then(Weak::upgrade) {
            return Ok(cores);
        }
        let cores = self.expander.expand(parts).map_err(|error| Error::invalid("adapter", error.to_string()))?;
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
