//! What goes into the store and what comes out.

use std::sync::Arc;

use crate::{
    tenant::Room,
    types::{AdapterId, Fingerprint, Generation, TenantId},
};

/// What an adapter's numbers mean. Interned: many adapters share one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Facts {
    /// How the numbers are written: bf16 or f32.
    pub dtype: String,
    /// The full scheme, canonical JSON.
    pub scheme: String,
    /// How the singular vectors of an imported checkpoint lie in the base's; opaque here.
    pub frame: Option<Vec<u8>>,
    /// The base under which the numbers were made.
    pub fingerprint: Fingerprint,
    /// The other base for which it was accepted by force: there it means nearly what it meant.
    pub forced_onto: Option<Fingerprint>,
}

/// What an adapter holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    /// The hash of numbers, full scheme, frame and base.
    pub generation: Generation,
    /// The numbers as uploaded.
    pub data: Vec<u8>,
    /// What they mean.
    pub facts: Arc<Facts>,
}

impl Contents {
    /// Bytes that the owner is charged, as `decode::select_sizes` has them of a row.
    pub(super) fn size(&self) -> i64 {
        (self.data.len() + self.facts.frame.as_ref().map_or(0, Vec::len)) as i64
    }
}

/// What to do about a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    /// The name must be free.
    Error,
    /// A new adapter, or a new generation of the one there is.
    NewGeneration,
    /// A new generation of an adapter that must exist, and have this current generation if one is named.
    Replace(Option<Generation>),
}

/// An upload.
#[derive(Debug, Clone)]
pub struct NewAdapter {
    /// The owner.
    pub tenant: TenantId,
    /// A checked name.
    pub name: String,
    /// Visible to every tenant? None leaves an adapter that exists as it is.
    pub public: Option<bool>,
    /// A JSON object. None leaves that of an adapter that exists.
    pub metadata: Option<String>,
    /// The numbers.
    pub contents: Contents,
    /// What to do when the name is taken.
    pub on_conflict: OnConflict,
    /// May an adapter of that name be changed that is public? Admins may.
    pub may_change_public: bool,
    /// What the owner's stored things may come to.
    pub room: Room,
    /// Makes a retried upload the same upload.
    pub idempotency: Option<Idempotency>,
}

impl NewAdapter {
    /// Does more have to be asked than who owns the name? It may be a retry, or claim a public name.
    pub(super) fn is_special(&self) -> bool {
        self.idempotency.is_some() || self.public == Some(true)
    }
}

/// Under which key an upload happens once, and what to answer when it comes again.
#[derive(Clone)]
pub struct Idempotency {
    /// The route, method included.
    pub route: &'static str,
    /// The client's key.
    pub key: String,
    /// Another hash under the same key is an error.
    pub request_hash: [u8; 32],
    /// The answer to keep, made of what was stored.
    pub respond: Arc<dyn Fn(&AdapterRecord) -> String + Send + Sync>,
}

impl std::fmt::Debug for Idempotency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Idempotency").field("route", &self.route).finish_non_exhaustive()
    }
}

/// What became of an upload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// It was written.
    New {
        /// The adapter as it is now.
        record: AdapterRecord,
        /// The generation that was current before, of an adapter that existed.
        replaced: Option<Generation>,
    },
    /// It had been written before under the same idempotency key, and this was the answer.
    Replayed(String),
}

/// An adapter and its current generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterRecord {
    /// Its number; a name deleted and uploaded again has a new one.
    pub id: AdapterId,
    /// The owner.
    pub tenant: TenantId,
    /// The owner's name.
    pub owner: Arc<str>,
    /// Its name.
    pub name: String,
    /// Visible to every tenant?
    pub public: bool,
    /// A JSON object.
    pub metadata: String,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds.
    pub updated_at: i64,
    /// The current generation.
    pub contents: Contents,
}

/// An adapter as the registry needs it at start: without what only a display shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedAdapter {
    /// Its number.
    pub id: AdapterId,
    /// The owner.
    pub tenant: TenantId,
    /// Its name.
    pub name: String,
    /// Visible to every tenant?
    pub public: bool,
    /// The current generation.
    pub contents: Contents,
}

/// A row of an adapter that cannot be read. It is left alone: only a new upload or a deletion by its owner changes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorruptAdapter {
    /// Its number.
    pub id: AdapterId,
    /// The owner.
    pub tenant: TenantId,
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub cause: String,
}

/// Whose row it is that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damaged {
    /// A tenant's.
    Tenant,
    /// A key's, or that of the tenant that it belongs to.
    Key,
}

impl Damaged {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tenant => "tenant",
            Self::Key => "key",
        }
    }
}

/// A row of a tenant or a key that cannot be read. It is left alone until an admin mends it or is rid of it, and does not work; no other row is touched by it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the {} '{name}' is damaged in the database: {cause}", kind.as_str())]
pub struct DamagedRow {
    /// Whose.
    pub kind: Damaged,
    /// The tenant's name or the key's public identifier, if that can be read.
    pub name: String,
    /// What is wrong.
    pub cause: String,
}

/// One of the generations that an adapter has had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationRecord {
    /// 1, 2, ... in the order of uploads.
    pub seq: i64,
    /// Is it the one that the name points at?
    pub current: bool,
    /// Unix seconds.
    pub created_at: i64,
    /// The hash of its contents.
    pub generation: Generation,
    /// How many bytes its numbers have.
    pub bytes: usize,
    /// What they mean, but for the frame, which no list shows.
    pub facts: Arc<Facts>,
}

/// A committed change of what names mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// A name is new, or points at another generation.
    Stored(AdapterRecord),
    /// A name is gone, and these generations with it.
    Deleted {
        /// The owner.
        tenant: TenantId,
        /// The name.
        name: String,
        /// Every generation that it had.
        generations: Vec<Generation>,
    },
    /// Generations of an adapter that lives were too old to be kept.
    Pruned {
        /// The owner.
        tenant: TenantId,
        /// Which.
        generations: Vec<Generation>,
    },
}

/// Told of every change of this process after its commit, in the order of commits, before the writer is answered: whoever has
/// an answer finds its effect. Must not wait.
pub trait Observer: Send + Sync {
    /// A change was committed.
    fn committed(&self, change: Change);
}
