//! Every test runs on SQLite in a fresh directory and, when `MOTE_TEST_POSTGRES_URL` is set, on PostgreSQL in a fresh schema.

mod adapters;
mod durability;
mod faults;
mod growth;
mod keys;
mod limits;
mod measure;
mod opening;
mod text;
mod training;
mod upkeep;

use std::{collections::HashMap, sync::Arc};

use sqlx::{AnyConnection, Connection as _};
use tempfile::TempDir;

use super::*;
use crate::{
    tenant::{BUILT_IN_TENANT, Room},
    types::{Fingerprint, Generation, clock::unix_now},
};

/// A database of its own for a test.
struct Database {
    config: StoreConfig,
    _directory: Option<TempDir>,
}

impl Database {
    async fn open(&self) -> Store {
        Store::open(self.config.clone()).await.unwrap()
    }

    fn sqlite() -> Self {
        let directory = tempfile::Builder::new().prefix("mote test, 100% odd?#").tempdir().unwrap();
        let config = StoreConfig::new(Location::Directory(directory.path().join("data")));
        Self { config, _directory: Some(directory) }
    }

    async fn postgres(url: &str) -> Self {
        sqlx::any::install_default_drivers();
        let schema = format!("test_{}", uuid::Uuid::now_v7().simple());
        let mut connection = AnyConnection::connect(url).await.unwrap();
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("CREATE SCHEMA {schema}"))).execute(&mut connection).await.unwrap();
        let separator = if url.contains('?') { '&' } else { '?' };
        let url = format!("{url}{separator}options[search_path]={schema}");
        Self { config: StoreConfig::new(Location::Postgres(url)), _directory: None }
    }

    async fn each() -> Vec<Self> {
        let mut all = vec![Self::sqlite()];
        if let Ok(url) = std::env::var("MOTE_TEST_POSTGRES_URL") {
            all.push(Self::postgres(&url).await);
        }
        all
    }
}

/// Contents that differ by a number.
fn contents(number: u64) -> Contents {
    let mut generation = [0u8; 16];
    generation[..8].copy_from_slice(&number.to_le_bytes());
    Contents {
        generation: Generation(generation),
        data: [number.to_le_bytes().as_slice(), &[0x5a; 18]].concat(),
        facts: facts().into(),
    }
}

fn facts() -> Facts {
    Facts {
        dtype: "bf16".into(),
        scheme: r#"{"convention":"peft"}"#.into(),
        frame: None,
        fingerprint: Fingerprint([9; 32]),
        forced_onto: None,
    }
}

fn new(tenant: TenantId, name: &str, number: u64) -> NewAdapter {
    NewAdapter {
        tenant,
        name: name.into(),
        public: None,
        metadata: None,
        contents: contents(number),
        on_conflict: OnConflict::Error,
        may_change_public: true,
        room: Room::default(),
        idempotency: None,
    }
}

fn written(stored: Result<Stored>) -> AdapterRecord {
    match stored.unwrap() {
        Stored::New { record, .. } => record,
        Stored::Replayed(response) => panic!("replayed {response}"),
    }
}

async fn all(store: &Store) -> HashMap<(TenantId, String), LoadedAdapter> {
    let mut found = HashMap::new();
    let count = store
        .load_all(|loaded| {
            let loaded = loaded.unwrap();
            found.insert((loaded.tenant, loaded.name.clone()), loaded);
        })
        .await
        .unwrap();
    assert_eq!(count as usize, found.len());
    found
}
