//! The state that survives: tenants, keys, adapters with their generations, training jobs and files, in SQLite or PostgreSQL.
//!
//! One connection writes ([`writer`]), a few read, two of them keys alone. A write is answered after its commit, and so survives kill -9 (with
//! [`Sync::Full`] the loss of power too). Every changed row takes a number of one rising sequence, in the order of commits.
//!
//! **Invariant.** Nothing else in the program does disk I/O for state.

mod adapters;
mod ask;
mod audit;
mod connect;
mod decode;
mod error;
mod faults;
mod idempotency;
mod intern;
mod keys;
mod read;
mod records;
mod retention;
mod rows;
mod tenants;
#[cfg(test)]
mod tests;
mod totals;
mod training;
mod upkeep;
mod usage;
mod writer;

pub use adapters::HISTORY;
pub use connect::{FILE_NAME, Location, StoreConfig, Sync};
pub use error::{Result, StoreError, Unwritable};
pub use faults::Faults;
pub use keys::{NewKey, Rotation};
pub use records::{
    AdapterRecord, Change, Contents, CorruptAdapter, Damaged, DamagedRow, Facts, GenerationRecord, Idempotency,
    LoadedAdapter, NewAdapter, Observer, OnConflict, Stored,
};
pub use retention::{Aged, Excess, Now};
pub use training::{
    CheckpointRecord, EventLevel, EventRecord, FileRecord, JobData, JobKey, JobRecord, JobStatus, JobStored,
    NewCheckpoint, NewEvent, NewFile, NewJob, Progress, Publication, SamplesRecord, StartLimits, Turns,
};
pub use upkeep::{Check, back_up, restore};

use std::sync::Arc;

use sqlx::AnyPool;

use crate::{
    tenant::Actor,
    types::{AdapterId, Generation, TenantId},
};
use connect::Connector;
use writer::Writer;

/// Connections that look up keys.
const KEY_READERS: u32 = 2;

/// The open database. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    writer: Writer,
    pool: AnyPool,
    /// For keys alone: whatever is read besides, nobody's key waits for it.
    keys: AnyPool,
    /// Who answers for what is written through this handle; None: nobody asks.
    actor: Option<Arc<Actor>>,
    named: Arc<ask::Named>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store")
    }
}

impl Store {
    /// Opens the database, makes it when there is none, and brings its tables up to date.
    ///
    /// # Errors
    /// [`StoreError::Open`] says what is wrong with the place, [`StoreError::NewerSchema`] that a newer program wrote it.
    pub async fn open(config: StoreConfig) -> Result<Self> {
        let connector = Connector::new(&config)?;
        let mut connection = connector.connect().await?;
        connector.migrate(&mut connection).await?;
        let (pool, keys) = (connector.pool(config.readers).await?, connector.pool(KEY_READERS).await?);
        let writer = Writer::start(connector, connection);
        Ok(Self { writer, pool, keys, actor: None, named: Arc::default() })
    }

    /// The same store for somebody: what is written through it goes into the audit log under that name, in the same transaction.
    pub fn by(&self, actor: Actor) -> Self {
        Self { actor: Some(Arc::new(actor)), ..self.clone() }
    }

    /// May whoever this store acts for change public adapters?
    fn may_change_public(&self) -> bool {
        self.actor.as_ref().is_none_or(|actor| actor.admin)
    }

    /// Sets who is told of changes. Once; a second call changes nothing.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        self.writer.observe(observer);
    }

    /// Writes what is queued and closes the database. Later calls fail with [`StoreError::Closed`].
    pub async fn close(&self) {
        self.writer.close().await;
        self.pool.close().await;
        self.keys.close().await;
    }

    /// Writes one upload; those that arrive together share a commit.
    ///
    /// # Errors
    /// [`StoreError::NameTaken`], [`StoreError::PublicNameTaken`], [`StoreError::AdapterNotFound`],
    /// [`StoreError::GenerationMismatch`], [`StoreError::TenantNotFound`], [`StoreError::IdempotencyMismatch`], [`StoreError::AdaptersFull`],
    /// [`StoreError::BytesFull`], [`StoreError::PublicAdapter`].
    pub async fn put_adapter(&self, new: NewAdapter) -> Result<Stored> {
        self.put_adapters(vec![new]).await?.pop().unwrap_or(Err(StoreError::Closed))
    }

    /// Writes uploads in order in one transaction. Each succeeds or fails by itself, with the errors of
    /// [`Self::put_adapter`]; the outer error is the database's, and then nothing was written.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn put_adapters(&self, new: Vec<NewAdapter>) -> Result<Vec<Result<Stored>>> {
        self.writer.put(new, self.actor.clone()).await
    }

    /// Erases an adapter with all its generations; gives its number.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`], [`StoreError::PublicAdapter`].
    pub async fn delete_adapter(&self, tenant: TenantId, name: &str) -> Result<AdapterId> {
        let name = name.to_owned();
        let (target, public_too) = (name.clone(), self.may_change_public());
        self.audited(
            move |tx| Box::pin(async move { tx.delete_adapter(tenant, &name, public_too).await }),
            |actor, _| Some(actor.did("adapter.delete", target)),
        )
        .await
    }

    /// Points a name at a generation it had before; gives the adapter as it is then, and the generation that was current.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`], [`StoreError::GenerationNotFound`], [`StoreError::PublicAdapter`].
    pub async fn rollback(
        &self,
        tenant: TenantId,
        name: &str,
        generation: Generation,
    ) -> Result<(AdapterRecord, Generation)> {
        let (name, public_too) = (name.to_owned(), self.may_change_public());
        self.audited(
            move |tx| Box::pin(async move { tx.rollback(tenant, &name, generation, public_too).await }),
            |actor, (record, _)| Some(actor.did("adapter.rollback", record.name.clone())),
        )
        .await
    }
}
