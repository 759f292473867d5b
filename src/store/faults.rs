//! What can go wrong below the writer, for tests: a real disk neither becomes read-only nor slow when asked to.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use sqlx::AnyConnection;

/// Faults of the writer's disk, which come and go while the store is open.
#[derive(Debug, Default)]
pub struct Faults {
    read_only: AtomicBool,
    commit_millis: AtomicU64,
}

impl Faults {
    /// Nothing can be written from now on, or can again (SQLite only).
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.store(read_only, Relaxed);
    }

    /// Every commit takes so long from now on.
    pub fn set_slow(&self, commit: Duration) {
        self.commit_millis.store(commit.as_millis() as u64, Relaxed);
    }

    pub(super) async fn before_begin(&self, connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
        let statement = if self.read_only.load(Relaxed) { "PRAGMA query_only = ON" } else { "PRAGMA query_only = OFF" };
        sqlx::raw_sql(statement).execute(connection).await.map(drop)
    }

    pub(super) async fn before_commit(&self) {
        tokio::time::sleep(Duration::from_millis(self.commit_millis.load(Relaxed))).await;
    }
}
