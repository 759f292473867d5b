//! What can go wrong with the store.

use std::sync::Arc;

use super::DamagedRow;
use crate::types::Generation;

/// A result of the store.
pub type Result<T> = std::result::Result<T, StoreError>;

/// Why the store did not do as asked. Clonable, since one failed transaction answers many writers.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The tenant has an adapter of that name.
    #[error("the name is taken")]
    NameTaken,
    /// Somebody's public adapter has that name.
    #[error("a public adapter has that name")]
    PublicNameTaken,
    /// The adapter is public, and whoever asks is no admin.
    #[error("the adapter is public")]
    PublicAdapter,
    /// The tenant has no such adapter.
    #[error("no such adapter")]
    AdapterNotFound,
    /// The adapter never had that generation.
    #[error("no such generation")]
    GenerationNotFound,
    /// The adapter's current generation is not the expected one.
    #[error("the current generation is {current}")]
    GenerationMismatch {
        /// What it is.
        current: Generation,
    },
    /// There is a tenant of that name.
    #[error("the tenant exists")]
    TenantExists,
    /// There is no such tenant.
    #[error("no such tenant")]
    TenantNotFound,
    /// The built-in tenant cannot be deleted.
    #[error("the built-in tenant cannot be deleted")]
    BuiltInTenant,
    /// There is no such key.
    #[error("no such key")]
    KeyNotFound,
    /// A job of the tenant's will publish under that name.
    #[error("a job has reserved the name")]
    NameReserved,
    /// The tenant has no such job.
    #[error("no such job")]
    JobNotFound,
    /// The job is no longer the worker's that writes: it ended, was paused, or another worker has it.
    #[error("the job is no longer this worker's")]
    JobLost,
    /// A job in this status cannot do what was asked.
    #[error("the job is {0}")]
    JobStatus(super::JobStatus),
    /// The job was paused as often as a job can be.
    #[error("the job was paused {0} times")]
    PausedEnough(u64),
    /// The tenant has as many jobs under way as it may.
    #[error("the tenant has {0} jobs under way")]
    TooManyJobs(u64),
    /// All tenants together have as many jobs under way as the server takes.
    #[error("the queue of jobs is full")]
    JobsFull,
    /// The tenant has no such file.
    #[error("no such file")]
    FileNotFound,
    /// The tenant's files may not be larger together.
    #[error("the tenant's files are as large as they may be")]
    FilesFull,
    /// The tenant has as many adapters as it may.
    #[error("the tenant may have {0} adapters")]
    AdaptersFull(u64),
    /// The tenant has stored as many bytes as it may.
    #[error("the tenant may store {0} bytes")]
    BytesFull(u64),
    /// The tenant's jobs have trained on as many tokens today as they may.
    #[error("the tenant may train on {0} tokens a day")]
    TrainedEnough(u64),
    /// The key is revoked or has expired.
    #[error("the key no longer works")]
    KeyNotLive,
    /// The idempotency key came before with another request.
    #[error("the idempotency key was used with another request")]
    IdempotencyMismatch,
    /// The database was written by a newer program.
    #[error(
        "the database is at schema version {found}, and this program knows versions up to {known}: \
         run the program that wrote it, or a newer one"
    )]
    NewerSchema {
        /// The version found.
        found: i64,
        /// The newest version known here.
        known: i64,
    },
    /// The database cannot be opened.
    #[error("cannot open the database {location}: {cause}")]
    Open {
        /// Where it is, without secrets.
        location: String,
        /// Why.
        cause: String,
    },
    /// A file of a backup or of a data directory cannot be used.
    #[error("{path}: {cause}")]
    File {
        /// Which.
        path: String,
        /// Why.
        cause: String,
    },
    /// The database refused a statement or went away.
    #[error("database: {0}")]
    Database(Arc<sqlx::Error>),
    /// A row holds what the program never writes.
    #[error("the database holds an invalid {0}")]
    Corrupt(&'static str),
    /// A text of a row is no UTF-8; the column's name.
    #[error("the database holds a text that is not UTF-8 in the column '{0}'")]
    NotUtf8(String),
    /// The row of the adapter that was to be changed cannot be read.
    #[error("the adapter is damaged in the database")]
    AdapterDamaged,
    /// The answer that was kept for an idempotency key cannot be read.
    #[error("the answer kept for the idempotency key is damaged in the database")]
    AnswerDamaged,
    /// The row of the tenant or key that was asked for cannot be read.
    #[error(transparent)]
    Damaged(DamagedRow),
    /// The store is closed.
    #[error("the store is closed")]
    Closed,
}

/// Why nothing can be written, while reading goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unwritable {
    /// The disk, or what the database may take of it, is full.
    Full,
    /// The files or the database are read-only.
    ReadOnly,
    /// The disk fails.
    Broken,
    /// The database cannot be opened again, or its server is away.
    Unreachable,
    /// Another process holds the database's lock.
    Locked,
}

impl StoreError {
    /// Is it that nothing can be written at the moment?
    pub fn unwritable(&self) -> Option<Unwritable> {
        let error = match self {
            Self::Database(error) => error,
            Self::Open { .. } => return Some(Unwritable::Unreachable),
            _ => return None,
        };
        if matches!(**error, sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::PoolTimedOut) {
            return Some(Unwritable::Unreachable);
        }
        let code = error.as_database_error()?.code()?;
        match (code.as_ref(), sqlite_kind(error)) {
            ("53100", _) | (_, Some(13)) => Some(Unwritable::Full),
            ("25006", _) | (_, Some(8)) => Some(Unwritable::ReadOnly),
            (_, Some(10)) => Some(Unwritable::Broken),
            (_, Some(5)) => Some(Unwritable::Locked),
            _ => None,
        }
    }

    /// Is it that a row cannot be read?
    pub(super) fn is_damage(&self) -> bool {
        match self {
            Self::Corrupt(_) | Self::NotUtf8(_) => true,
            Self::Database(error) => matches!(**error, sqlx::Error::ColumnDecode { .. }),
            _ => false,
        }
    }

    /// Did the transaction fail, and not just the request in it?
    pub(super) fn is_fatal(&self) -> bool {
        matches!(self, Self::Database(_) | Self::Corrupt(_) | Self::NotUtf8(_) | Self::Closed)
    }
}

/// What kind of error SQLite's is: the last byte of its code. PostgreSQL's codes have five characters and are none.
pub(super) fn sqlite_kind(error: &sqlx::Error) -> Option<u32> {
    let code = error.as_database_error()?.code()?;
    code.parse::<u32>().ok().filter(|_| code.len() < 5).map(|code| code & 0xff)
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}
