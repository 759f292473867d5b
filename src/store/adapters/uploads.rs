//! Uploads: each new adapter and its first generation, many in one statement.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use sqlx::SqlStr;

use super::known::{KNOWN_OF_ONE, Key, Known, bind_known};
use crate::{
    store::{
        AdapterRecord, Change, Contents, NewAdapter, OnConflict, Result, StoreError, Stored, idempotency,
        rows::{AnyQuery, RowsSql},
        writer::{PutResults, Tx},
    },
    types::{AdapterId, TenantId},
};

static INSERT_ADAPTERS: RowsSql = RowsSql::new(
    "INSERT INTO adapters (id, tenant, name, seq, public, metadata, created_at, updated_at, change_seq) VALUES",
    9,
    "",
);
static INSERT_GENERATIONS: RowsSql =
    RowsSql::new("INSERT INTO generations (adapter, seq, generation, data, facts, created_at) VALUES", 6, "");

/// Both inserts of one adapter in one text, as SQLite takes them.
pub(in crate::store) static INSERT_ONE: LazyLock<SqlStr> =
    LazyLock::new(|| INSERT_ADAPTERS.one_then(INSERT_GENERATIONS.one().as_str()));

/// A generation on its way into the table.
pub(super) struct NewGeneration {
    pub(super) adapter: AdapterId,
    pub(super) seq: i64,
    pub(super) facts: i64,
    pub(super) contents: Contents,
}

/// An adapter on its way into both tables.
pub(in crate::store) struct Created {
    record: AdapterRecord,
    generation: NewGeneration,
}

impl Created {
    /// The parameters of [`INSERT_ONE`].
    pub(in crate::store) fn bind<'q>(&'q self, query: AnyQuery<'q>, now: i64) -> AnyQuery<'q> {
        bind_generation(bind_adapter(query, &self.record), &self.generation, now)
    }
}

impl Tx<'_> {
    /// Writes uploads in order; each succeeds or fails by itself.
    pub(in crate::store) async fn put_adapters(&mut self, items: Vec<NewAdapter>) -> Result<PutResults> {
        let mut results = Vec::with_capacity(items.len());
        let mut round: Vec<NewAdapter> = Vec::new();
        let mut names: HashSet<Key> = HashSet::new();
        for item in items {
            // A round has each name once; what needs questions of its own is a round by itself.
            let special = item.is_special();
            let key = (item.tenant, item.name.clone());
            if special || names.contains(&key) {
                self.put_round(std::mem::take(&mut round), &mut results, None).await?;
                names.clear();
            }
            if special {
                results.push(self.put_special(item).await?);
            } else {
                names.insert(key);
                round.push(item);
            }
        }
        self.put_round(round, &mut results, None).await?;
        Ok(results)
    }

    /// An upload that may be a retry, or claims a public name.
    async fn put_special(&mut self, item: NewAdapter) -> Result<Result<Stored>> {
        let idempotency = item.idempotency.clone();
        let tenant = item.tenant;
        if let Some(known) = &idempotency {
            match idempotency::answer(self.connection, tenant, known.route, &known.key, &known.request_hash).await {
                Ok(Some(response)) => return Ok(Ok(Stored::Replayed(response))),
                Ok(None) => {}
                Err(error) if error.is_fatal() => return Err(error),
                Err(error) => return Ok(Err(error)),
            }
        }
        if item.public == Some(true) && self.public_name_is_taken(tenant, &item.name).await? {
            return Ok(Err(StoreError::PublicNameTaken));
        }
        let mut results = Vec::with_capacity(1);
        self.put_round(vec![item], &mut results, None).await?;
        let result = results.pop().unwrap_or(Err(StoreError::Closed));
        if let (Some(new), Ok(Stored::New { record, .. })) = (idempotency, &result) {
            let answer = (new.respond)(record);
            self.keep_answer(tenant, new.route, &new.key, &new.request_hash, answer).await?;
        }
        Ok(result)
    }

    async fn public_name_is_taken(&mut self, tenant: TenantId, name: &str) -> Result<bool> {
        let row =
            sqlx::query("SELECT id FROM adapters WHERE public = 1 AND deleted = 0 AND name = $1 AND tenant <> $2")
                .bind(name)
                .bind(tenant.0)
                .fetch_optional(&mut *self.connection)
                .await?;
        Ok(row.is_some())
    }

    /// Uploads of distinct names: the new ones are inserted together. A name that is reserved by a job other than `publisher` is taken.
    pub(in crate::store) async fn put_round(
        &mut self,
        items: Vec<NewAdapter>,
        results: &mut PutResults,
        publisher: Option<&str>,
    ) -> Result<()> {
        if items.is_empty() {
            return Ok(());
        }
        let known = self.known.take();
        let only = known.is_some();
        let Known { tenants, mut existing, reserved } = match (known, &items[..]) {
            (Some(known), _) => known,
            (None, [item]) => {
                let row = self.row(bind_known(sqlx::query(KNOWN_OF_ONE), item, publisher)).await?;
                Known::of_one(item, row.as_ref())?
            }
            (None, items) => Known {
                tenants: self.tenant_names(items).await?,
                existing: self.existing(items).await?,
                reserved: self.reserved_names(publisher).await?,
            },
        };
        let mut created: Vec<AdapterRecord> = Vec::new();
        let mut generations: Vec<NewGeneration> = Vec::new();
        for item in items {
            let key = (item.tenant, item.name.clone());
            let result = match (tenants.get(&item.tenant), existing.remove(&key), item.on_conflict) {
                (None, ..) => Err(StoreError::TenantNotFound),
                (_, Some(_), OnConflict::Error) => Err(StoreError::NameTaken),
                (_, Some(old), _) if old.public && !item.may_change_public => Err(StoreError::PublicAdapter),
                (_, None, OnConflict::Replace(_)) => Err(StoreError::AdapterNotFound),
                (_, None, _) if reserved.contains(&key) => Err(StoreError::NameReserved),
                (_, Some(old), OnConflict::Replace(Some(expected))) if old.generation != expected => {
                    Err(StoreError::GenerationMismatch { current: old.generation })
                }
                (Some(owner), Some(old), _) => {
                    let replaced = Some(old.generation);
                    let record = self.replace(item, old, owner.clone()).await;
                    record.map(|record| Stored::New { record, replaced })
                }
                (Some(owner), None, _) => match self.make_room(item.tenant, item.room, 1, size(&item)).await {
                    Err(error) => Err(error),
                    Ok(()) => {
                        let facts = self.intern(&item.contents.facts).await?;
                        let adapter = AdapterId(self.next_seq());
                        let record = self.new_record(adapter, item, owner.clone());
                        generations.push(NewGeneration { adapter, seq: 1, facts, contents: record.contents.clone() });
                        created.push(record.clone());
                        Ok(Stored::New { record, replaced: None })
                    }
                },
            };
            match result {
                Err(error) if error.is_fatal() => return Err(error),
                result => results.push(result),
            }
        }
        if only {
            // Nothing else happens in this transaction: it is written with the end.
            let both = created.first().cloned().zip(generations.pop());
            self.created = both.map(|(record, generation)| Created { record, generation });
        } else {
            self.insert_adapters(&created).await?;
            self.insert_generations(&generations).await?;
        }
        created.into_iter().for_each(|record| self.changed(|| Change::Stored(record)));
        Ok(())
    }

    fn new_record(&self, id: AdapterId, item: NewAdapter, owner: Arc<str>) -> AdapterRecord {
        AdapterRecord {
            id,
            tenant: item.tenant,
            owner,
            name: item.name,
            public: item.public.unwrap_or(false),
            metadata: item.metadata.unwrap_or_else(|| "{}".to_owned()),
            created_at: self.now,
            updated_at: self.now,
            contents: item.contents,
        }
    }

    async fn insert_adapters(&mut self, created: &[AdapterRecord]) -> Result<()> {
        for (sql, piece) in INSERT_ADAPTERS.exact(self.dialect, created) {
            let mut query = sqlx::query(sql);
            for record in piece {
                query = bind_adapter(query, record);
            }
            query.execute(&mut *self.connection).await?;
        }
        Ok(())
    }

    pub(super) async fn insert_generations(&mut self, generations: &[NewGeneration]) -> Result<()> {
        for (sql, piece) in INSERT_GENERATIONS.exact(self.dialect, generations) {
            let mut query = sqlx::query(sql);
            for new in piece {
                query = bind_generation(query, new, self.now);
            }
            query.execute(&mut *self.connection).await?;
        }
        Ok(())
    }
}

/// What a new adapter adds to its owner's bytes.
fn size(item: &NewAdapter) -> i64 {
    // Without metadata it has an empty object.
    item.contents.size() + item.metadata.as_ref().map_or(2, String::len) as i64
}

/// The columns of [`INSERT_ADAPTERS`] for a new adapter.
fn bind_adapter<'q>(query: AnyQuery<'q>, record: &'q AdapterRecord) -> AnyQuery<'q> {
    query
        .bind(record.id.0)
        .bind(record.tenant.0)
        .bind(&*record.name)
        .bind(1i64)
        .bind(i64::from(record.public))
        .bind(&*record.metadata)
        .bind(record.created_at)
        .bind(record.updated_at)
        .bind(record.id.0)
}

/// The columns of [`INSERT_GENERATIONS`].
fn bind_generation<'q>(query: AnyQuery<'q>, new: &'q NewGeneration, now: i64) -> AnyQuery<'q> {
    query
        .bind(new.adapter.0)
        .bind(new.seq)
        .bind(&new.contents.generation.0[..])
        .bind(&*new.contents.data)
        .bind(new.facts)
        .bind(now)
}
