//! One immutable generation of an adapter, small enough to keep a million of them.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;

use super::{CodecError, Frame, NumberType, Scheme, codec, fingerprint::hash_text};
use crate::types::{CacheSalt, Fingerprint, Generation, TenantId};

/// What an adapter's bytes mean. Interned: adapters with equal facts share one.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// How numbers become cores.
    pub scheme: Scheme,
    /// The singular vectors of the checkpoint it came from, in terms of ours; None: ours.
    pub frame: Option<Frame>,
    /// The base it was made for.
    pub fingerprint: Fingerprint,
    /// How the numbers are stored.
    pub dtype: NumberType,
    /// Accepted by force for a base of another fingerprint: its numbers mean nearly, not exactly, what they meant.
    pub approximate: bool,
}

impl Facts {
    /// A hash of everything but `approximate`, which is about this server and not about the adapter.
    fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hash_text(&mut hasher, "mote.adapter.1");
        hasher.update(&self.scheme.canonical_bytes());
        let frame = self.frame.as_ref().map(Frame::to_bytes).unwrap_or_default();
        hasher.update(&(frame.len() as u64).to_le_bytes());
        hasher.update(&frame);
        hasher.update(&self.fingerprint.0);
        hash_text(&mut hasher, self.dtype.name());
        *hasher.finalize().as_bytes()
    }
}

#[derive(Debug)]
struct Interned {
    facts: Facts,
    digest: [u8; 32],
}

/// The digest of facts, and whether they are approximate.
type InternKey = ([u8; 32], bool);

/// Where equal [`Facts`] become one. Adapters are made here.
#[derive(Debug, Default)]
pub struct Interner {
    known: Mutex<HashMap<InternKey, Weak<Interned>>>,
}

/// Entries of the interner below which dropped facts are not looked for.
const SWEEP_FROM: usize = 64;

impl Interner {
    /// An empty interner.
    pub fn new() -> Self {
        Self::default()
    }

    /// An adapter of these facts and raw bytes, `numbers` of them in the scheme on this model ([`Scheme::numbers`]).
    ///
    /// # Errors
    /// Bytes that are not so many finite numbers.
    pub fn adapter(&self, facts: Facts, bytes: &[u8], numbers: usize) -> Result<Arc<Adapter>, CodecError> {
        codec::check(bytes, facts.dtype, numbers)?;
        let facts = self.intern(facts);
        let generation = generation(&facts.digest, bytes);
        Ok(Arc::new(Adapter { bytes: bytes.into(), facts, generation }))
    }

    fn intern(&self, facts: Facts) -> Arc<Interned> {
        let digest = facts.digest();
        let mut known = self.known.lock();
        if let Some(shared) = known.get(&(digest, facts.approximate)).and_then(Weak::upgrade) {
            return shared;
        }
        // Swept only when the map is about to grow: the cost stays constant an insertion.
        if known.len() >= SWEEP_FROM && known.len() == known.capacity() {
            known.retain(|_, weak| weak.strong_count() > 0);
        }
        let key = (digest, facts.approximate);
        let shared = Arc::new(Interned { facts, digest });
        known.insert(key, Arc::downgrade(&shared));
        shared
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.known.lock().len()
    }
}

/// One generation of an adapter: its bytes and what they mean. Never changes; an `Arc` of it is a request's lease.
///
/// 40 bytes and the numbers themselves: about 110 bytes of heap for 13 numbers in bf16.
#[derive(Debug)]
pub struct Adapter {
    bytes: Box<[u8]>,
    facts: Arc<Interned>,
    generation: Generation,
}

impl Adapter {
    /// The numbers as they were uploaded, group-major, little endian.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The numbers.
    pub fn numbers(&self) -> impl Iterator<Item = f32> + '_ {
        codec::numbers_of(&self.bytes, self.facts.facts.dtype)
    }

    /// What the bytes mean.
    pub fn facts(&self) -> &Facts {
        &self.facts.facts
    }

    /// How numbers become cores.
    pub fn scheme(&self) -> &Scheme {
        &self.facts().scheme
    }

    /// The hash of bytes, dtype, scheme, frame and base.
    pub fn generation(&self) -> Generation {
        self.generation
    }
}

fn generation(facts_digest: &[u8; 32], bytes: &[u8]) -> Generation {
    let mut hasher = blake3::Hasher::new();
    hasher.update(facts_digest);
    hasher.update(bytes);
    let mut out = [0u8; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    Generation(out)
}

/// Under which hash a request's KV blocks may be shared: tenant, base, and each adapter's numbers and facts with its weight.
///
/// `base` names the weights in service (fingerprint, or the model's id where there is none). `parts` is what
/// [`super::Expander::expand`] is given: empty for the bare base, one part for an adapter with its scale, several for a mix.
pub fn cache_salt(tenant: TenantId, base: &str, parts: &[(&Adapter, f32)]) -> CacheSalt {
    let mut hasher = blake3::Hasher::new();
    hash_text(&mut hasher, "mote.kv.1");
    hasher.update(&tenant.0.to_le_bytes());
    hash_text(&mut hasher, base);
    hasher.update(&(parts.len() as u64).to_le_bytes());
    for (adapter, weight) in parts {
        // The bytes themselves, not the 16-byte generation: a collision of generations must not join two caches.
        hasher.update(&adapter.facts.digest);
        hasher.update(&(adapter.bytes.len() as u64).to_le_bytes());
        hasher.update(&adapter.bytes);
        hasher.update(&weight.to_bits().to_le_bytes());
    }
    CacheSalt(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::adapter::{SignMask, fixtures};

    fn facts() -> Facts {
        Facts {
            scheme: Scheme::tiny13(),
            frame: None,
            fingerprint: Fingerprint([7; 32]),
            dtype: NumberType::Bf16,
            approximate: false,
        }
    }

    #[test]
    fn equal_facts_are_shared_and_forgotten_when_unused() {
        let interner = Interner::new();
        let a = interner.adapter(facts(), &[0; 26], 13).unwrap();
        let b = interner.adapter(facts(), &[1; 26], 13).unwrap();
        assert!(Arc::ptr_eq(&a.facts, &b.facts));
        let forced = interner.adapter(Facts { approximate: true, ..facts() }, &[0; 26], 13).unwrap();
        assert!(!Arc::ptr_eq(&a.facts, &forced.facts));
        assert_eq!(a.generation(), forced.generation(), "approximate is not part of what an adapter is");
        for seed in 0..10_000 {
            let scheme = Scheme { seed, ..Scheme::tiny13() };
            interner.adapter(Facts { scheme, ..facts() }, &[0; 26], 13).unwrap();
        }
        assert!(interner.len() < 1000, "{} facts are kept", interner.len());
    }

    #[test]
    fn every_fact_changes_the_generation_and_the_salt() {
        let interner = Interner::new();
        let mask = |flip: usize| SignMask::new(21, 2, |site, k| site == flip && k == 1).map(Frame::Signs);
        let sites = fixtures::uniform_sites(3, 10, 8);
        let turn = |lean: f64| fixtures::turned(&Scheme::tiny13(), &sites, 4, lean);
        let variants = [
            (facts(), 0u8),
            (facts(), 1),
            (Facts { scheme: Scheme::u13_tied(), ..facts() }, 0),
            (Facts { scheme: Scheme { seed: 43, ..Scheme::tiny13() }, ..facts() }, 0),
            (Facts { frame: mask(3), ..facts() }, 0),
            (Facts { frame: mask(4), ..facts() }, 0),
            (Facts { frame: turn(1e-4), ..facts() }, 0),
            (Facts { frame: turn(1.1e-4), ..facts() }, 0),
            (Facts { fingerprint: Fingerprint([8; 32]), ..facts() }, 0),
        ];
        let adapters: Vec<_> =
            variants.into_iter().map(|(facts, byte)| interner.adapter(facts, &[byte; 26], 13).unwrap()).collect();
        let generations: HashSet<_> = adapters.iter().map(|adapter| adapter.generation()).collect();
        assert_eq!(generations.len(), adapters.len());
        let mut salts: HashSet<_> =
            adapters.iter().map(|adapter| cache_salt(TenantId(1), "b", &[(adapter, 1.0)])).collect();
        let (a, b) = (&*adapters[0], &*adapters[1]);
        type Parts<'a> = &'a [(&'a Adapter, f32)];
        let requests: [(i64, &str, Parts<'_>); 7] = [
            (1, "b", &[]),
            (2, "b", &[]),
            (1, "c", &[]),
            (2, "b", &[(a, 1.0)]),
            (1, "b", &[(a, 0.5)]),
            (1, "b", &[(a, 1.0), (b, 1.0)]),
            (1, "b", &[(b, 1.0), (a, 1.0)]),
        ];
        salts.extend(requests.iter().map(|(tenant, base, parts)| cache_salt(TenantId(*tenant), base, parts)));
        assert_eq!(salts.len(), adapters.len() + requests.len());
    }

    #[test]
    fn bytes_that_are_no_numbers_make_no_adapter() {
        let error = Interner::new().adapter(facts(), &[0; 25], 13).unwrap_err();
        assert_eq!(error.to_string(), "expected 26 bytes (13 numbers of bf16), got 25 bytes");
        assert_eq!(size_of::<Adapter>(), 40);
    }
}
