//! Schemes and sign masks are stored once and named by a number.

use std::{collections::HashMap, sync::Arc};

use sqlx::Row as _;

use super::{Result, writer::Tx};

/// Distinct schemes or masks remembered; beyond this the memory starts anew.
const CAPACITY: usize = 100_000;

/// The writer's memory of numbers already given. A row is never deleted, so a number never changes.
#[derive(Default)]
pub(super) struct Interner {
    schemes: HashMap<Arc<str>, i64>,
    signs: HashMap<Arc<[u8]>, i64>,
}

impl Tx<'_> {
    /// The number of a scheme.
    pub(super) async fn intern_scheme(&mut self, json: &Arc<str>) -> Result<i64> {
        if let Some(id) = self.interner.schemes.get(json) {
            return Ok(*id);
        }
        let id = self.next_seq();
        sqlx::query("INSERT INTO schemes (id, json) VALUES ($1, $2) ON CONFLICT (json) DO NOTHING")
            .bind(id)
            .bind(&**json)
            .execute(&mut *self.connection)
            .await?;
        let id = sqlx::query("SELECT id FROM schemes WHERE json = $1")
            .bind(&**json)
            .fetch_one(&mut *self.connection)
            .await?
            .try_get(0)?;
        if self.interner.schemes.len() >= CAPACITY {
            self.interner.schemes.clear();
        }
        self.interner.schemes.insert(json.clone(), id);
        Ok(id)
    }

    /// The number of a sign mask.
    pub(super) async fn intern_signs(&mut self, mask: &Arc<[u8]>) -> Result<i64> {
        if let Some(id) = self.interner.signs.get(mask) {
            return Ok(*id);
        }
        let id = self.next_seq();
        let hash = blake3::hash(mask);
        // By its hash: a mask of a large rank exceeds what PostgreSQL indexes.
        sqlx::query("INSERT INTO signs (id, hash, mask) VALUES ($1, $2, $3) ON CONFLICT (hash) DO NOTHING")
            .bind(id)
            .bind(&hash.as_bytes()[..])
            .bind(&**mask)
            .execute(&mut *self.connection)
            .await?;
        let id = sqlx::query("SELECT id FROM signs WHERE hash = $1")
            .bind(&hash.as_bytes()[..])
            .fetch_one(&mut *self.connection)
            .await?
            .try_get(0)?;
        if self.interner.signs.len() >= CAPACITY {
            self.interner.signs.clear();
        }
        self.interner.signs.insert(mask.clone(), id);
        Ok(id)
    }
}
