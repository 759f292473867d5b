//! What adapters' numbers mean is stored once and named by a number.

use std::{collections::HashMap, sync::Arc};

use sqlx::{AnyConnection, Row as _};

use super::{Facts, Result, rows::Dialect, writer::Tx};

/// Distinct facts remembered; beyond this the memory starts anew.
const CAPACITY: usize = 100_000;

/// The writer's memory of numbers already given. A row is never changed, and all is forgotten when some are erased.
#[derive(Default)]
pub(super) struct Interner {
    facts: HashMap<Arc<Facts>, i64>,
}

impl Tx<'_> {
    /// The number of facts.
    pub(super) async fn intern(&mut self, facts: &Arc<Facts>) -> Result<i64> {
        if let Some(id) = self.interner.facts.get(facts) {
            return Ok(*id);
        }
        let (id, hash) = (self.next_seq(), hash(facts));
        sqlx::query(
            "INSERT INTO facts (id, hash, dtype, scheme, frame, fingerprint, forced_onto) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (hash) DO NOTHING",
        )
        .bind(id)
        .bind(&hash[..])
        .bind(&*facts.dtype)
        .bind(&*facts.scheme)
        .bind(facts.frame.as_deref())
        .bind(&facts.fingerprint.0[..])
        .bind(facts.forced_onto.as_ref().map(|base| &base.0[..]))
        .execute(&mut *self.connection)
        .await?;
        let row = sqlx::query("SELECT id FROM facts WHERE hash = $1").bind(&hash[..]).fetch_one(&mut *self.connection);
        let id = row.await?.try_get(0)?;
        if self.interner.facts.len() >= CAPACITY {
            self.interner.facts.clear();
        }
        self.interner.facts.insert(facts.clone(), id);
        Ok(id)
    }
}

/// Erases facts that no adapter has any more, in a transaction of its own: it reads every generation. Numbers are never given twice.
pub(super) async fn sweep(connection: &mut AnyConnection, dialect: Dialect) -> Result<()> {
    let statements = match dialect {
        // Its own check would read every generation for each of the facts: an index for it would cost every upload a page.
        Dialect::Sqlite => {
            "PRAGMA foreign_keys = OFF; BEGIN IMMEDIATE; UPDATE counter SET value = value + 1 WHERE id = 1; \
             DELETE FROM facts WHERE id NOT IN (SELECT facts FROM generations); COMMIT; PRAGMA foreign_keys = ON"
        }
        Dialect::Postgres => {
            "BEGIN; UPDATE counter SET value = value + 1 WHERE id = 1; \
             DELETE FROM facts WHERE NOT EXISTS (SELECT 1 FROM generations g WHERE g.facts = facts.id); COMMIT"
        }
    };
    sqlx::raw_sql(statements).execute(connection).await?;
    Ok(())
}

/// By a hash: a frame exceeds what PostgreSQL indexes.
fn hash(facts: &Facts) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let forced_onto = facts.forced_onto.as_ref().map(|base| &base.0[..]);
    let fields = [
        Some(facts.dtype.as_bytes()),
        Some(facts.scheme.as_bytes()),
        facts.frame.as_deref(),
        Some(&facts.fingerprint.0[..]),
        forced_onto,
    ];
    for field in fields {
        // Lengths keep neighbours apart, and nothing from what is empty.
        hasher.update(&field.map_or(u64::MAX, |bytes| bytes.len() as u64).to_le_bytes());
        hasher.update(field.unwrap_or_default());
    }
    *hasher.finalize().as_bytes()
}
