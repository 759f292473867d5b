//! What is known of names before anything is written under them: their owners, adapters that they point at, jobs that have reserved them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use sqlx::{Row as _, any::AnyRow};

use crate::{
    store::{
        NewAdapter, Result, ask, decode,
        rows::{AnyQuery, RowsSql},
        training::under_way,
        writer::Tx,
    },
    types::{AdapterId, Generation, TenantId},
};

static EXISTING: RowsSql = RowsSql::new(
    "SELECT a.id, a.tenant, a.name, a.public, a.metadata, a.created_at, g.generation \
     FROM adapters a LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
     WHERE a.deleted = 0 AND (a.tenant, a.name) IN (VALUES",
    2,
    ")",
);
static TENANTS: RowsSql = RowsSql::new("SELECT id, name FROM tenants WHERE deleted = 0 AND id IN (VALUES", 1, ")");

/// The generation of a row in which none can be read. No hash of contents is this.
const DAMAGED: Generation = Generation([0; 16]);

/// An adapter that an upload's name points at.
pub(super) struct Existing {
    pub(super) id: AdapterId,
    pub(super) public: bool,
    pub(super) metadata: String,
    /// None: it cannot be read.
    pub(super) created_at: Option<i64>,
    pub(super) generation: Generation,
}

/// What the store knows about the names of some uploads.
#[derive(Default)]
pub(in crate::store) struct Known {
    pub(super) tenants: HashMap<TenantId, Arc<str>>,
    pub(super) existing: HashMap<Key, Existing>,
    pub(super) reserved: HashSet<Key>,
}

/// All that is to be known of a single upload: see [`bind_known`] for its parameters and [`Known::of_one`] for its row.
pub(in crate::store) const KNOWN_OF_ONE: &str = concat!(
    "SELECT t.name, CASE WHEN j.id IS NULL THEN 0 ELSE 1 END, a.id, a.public, a.metadata, a.created_at, g.generation FROM tenants t \
     LEFT JOIN adapters a ON a.tenant = t.id AND a.name = $2 AND a.deleted = 0 \
     LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
     LEFT JOIN jobs j ON j.tenant = t.id AND j.name = $2 AND j.id <> $3 AND ",
    under_way!("j.status"),
    " WHERE t.id = $1 AND t.deleted = 0 LIMIT 1"
);

/// The parameters of [`KNOWN_OF_ONE`]; a name that `publisher` has reserved is free for it.
pub(in crate::store) fn bind_known<'q>(
    query: AnyQuery<'q>,
    item: &'q NewAdapter,
    publisher: Option<&'q str>,
) -> AnyQuery<'q> {
    query.bind(item.tenant.0).bind(&*item.name).bind(publisher.unwrap_or(""))
}

impl Known {
    /// Of a single upload, from the row of [`KNOWN_OF_ONE`].
    pub(in crate::store) fn of_one(item: &NewAdapter, row: Option<&AnyRow>) -> Result<Self> {
        let mut known = Self::default();
        let Some(row) = row else { return Ok(known) };
        let key = (item.tenant, item.name.clone());
        // Of a tenant that cannot be read nothing is known: the upload fails, and no other.
        let Ok(owner) = ask::text(row, 0) else { return Ok(known) };
        known.tenants.insert(item.tenant, owner.into());
        if row.try_get::<i64, _>(1)? != 0 {
            known.reserved.insert(key.clone());
        }
        if let Some(id) = row.try_get::<Option<i64>, _>(2)? {
            known.existing.insert(key, decode_existing(row, AdapterId(id), 3));
        }
        Ok(known)
    }
}

pub(super) type Key = (TenantId, String);

impl Tx<'_> {
    /// Names under which jobs will publish, but for `publisher`'s. They are few: jobs under way are limited.
    pub(super) async fn reserved_names(&mut self, publisher: Option<&str>) -> Result<HashSet<Key>> {
        let query = sqlx::query(concat!("SELECT tenant, name FROM jobs WHERE ", under_way!("status"), " AND id <> $1"));
        let rows = self.rows(query.bind(publisher.unwrap_or(""))).await?;
        // A name that cannot be read is nobody's.
        let key = |row: &AnyRow| -> Result<Key> { Ok((TenantId(row.try_get(0)?), ask::text(row, 1)?.to_owned())) };
        Ok(rows.iter().filter_map(|row| key(row).ok()).collect())
    }

    pub(super) async fn tenant_names(&mut self, items: &[NewAdapter]) -> Result<HashMap<TenantId, Arc<str>>> {
        let mut ids: Vec<TenantId> = items.iter().map(|item| item.tenant).collect();
        ids.sort_unstable();
        ids.dedup();
        let mut names = HashMap::with_capacity(ids.len());
        for (sql, size, piece) in TENANTS.padded(self.dialect, &ids) {
            let mut query = sqlx::query(sql);
            for id in fill(piece, size) {
                query = query.bind(id.0);
            }
            for row in self.rows(query).await? {
                // One that cannot be read is left out: its uploads fail, and no others.
                if let Ok(name) = ask::text(&row, 1) {
                    names.insert(TenantId(row.try_get(0)?), name.into());
                }
            }
        }
        Ok(names)
    }

    pub(super) async fn existing(&mut self, items: &[NewAdapter]) -> Result<HashMap<Key, Existing>> {
        let mut found = HashMap::new();
        for (sql, size, piece) in EXISTING.padded(self.dialect, items) {
            let mut query = sqlx::query(sql);
            for item in fill(piece, size) {
                query = query.bind(item.tenant.0).bind(&*item.name);
            }
            for row in self.rows(query).await? {
                // The name is one that was asked for, and so can be read.
                let key = (TenantId(row.try_get(1)?), ask::text(&row, 2)?.to_owned());
                found.insert(key, decode_existing(&row, AdapterId(row.try_get(0)?), 3));
            }
        }
        Ok(found)
    }
}

/// A piece's items, and then its last one until there are `size`.
fn fill<T>(piece: &[T], size: usize) -> impl Iterator<Item = &T> {
    let last = piece.last();
    piece.iter().chain(std::iter::repeat_with(move || last).flatten()).take(size)
}

/// An adapter whose visibility, metadata, date and generation are in the columns from `first`.
///
/// A damaged one is replaced like any other, and what cannot be read of it is written anew: an error here would fail every upload of the group.
fn decode_existing(row: &AnyRow, id: AdapterId, first: usize) -> Existing {
    Existing {
        id,
        public: row.try_get::<i64, _>(first).is_ok_and(|public| public != 0),
        metadata: ask::text(row, first + 1).unwrap_or("{}").to_owned(),
        created_at: row.try_get(first + 2).ok(),
        generation: decode::generation(row, first + 3).unwrap_or(DAMAGED),
    }
}
