//! Writing adapters: uploads in bulk, deletion, rollback.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, LazyLock};

use sqlx::{Row as _, SqlStr, any::AnyRow};

use super::{
    AdapterRecord, Change, Contents, NewAdapter, OnConflict, Result, StoreError, Stored, ask, decode, idempotency,
    rows::{AnyQuery, RowsSql},
    training::under_way,
    writer::{PutResults, Tx},
};
use crate::types::{AdapterId, Generation, TenantId};

static EXISTING: RowsSql = RowsSql::new(
    "SELECT a.id, a.tenant, a.name, a.public, a.metadata, a.created_at, g.generation \
     FROM adapters a LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
     WHERE a.deleted = 0 AND (a.tenant, a.name) IN (VALUES",
    2,
    ")",
);
static TENANTS: RowsSql = RowsSql::new("SELECT id, name FROM tenants WHERE deleted = 0 AND id IN (VALUES", 1, ")");
static INSERT_ADAPTERS: RowsSql = RowsSql::new(
    "INSERT INTO adapters (id, tenant, name, seq, public, metadata, created_at, updated_at, change_seq) VALUES",
    9,
    "",
);
static INSERT_GENERATIONS: RowsSql =
    RowsSql::new("INSERT INTO generations (adapter, seq, generation, data, facts, created_at) VALUES", 6, "");

/// Both inserts of one adapter in one text, as SQLite takes them.
pub(super) static INSERT_ONE: LazyLock<SqlStr> =
    LazyLock::new(|| INSERT_ADAPTERS.one_then(INSERT_GENERATIONS.one().as_str()));

/// Generations that an adapter keeps, the current one among them.
pub const HISTORY: u32 = 1000;

/// The number of one of an adapter's generations. Two questions of an index each, however many there are: the second index leaves out the first generation,
/// which is the only one of most adapters.
macro_rules! seq_of_generation {
    () => {
        "COALESCE((SELECT seq FROM generations WHERE adapter = $1 AND seq = 1 AND generation = $2), \
         (SELECT seq FROM generations WHERE adapter = $1 AND generation = $2 AND seq > 1 ORDER BY seq DESC LIMIT 1))"
    };
}

/// That number alone.
pub(super) const SEQ_OF: &str = concat!("SELECT ", seq_of_generation!());

/// That number, and the one of the adapter's newest generation before it.
pub(super) const NEWEST_AND_SEQ_OF: &str = concat!(
    "SELECT (SELECT seq FROM generations WHERE adapter = $1 ORDER BY seq DESC LIMIT 1), ",
    seq_of_generation!()
);

/// The generation of a row in which none can be read. No hash of contents is this.
const DAMAGED: Generation = Generation([0; 16]);

/// An adapter that an upload's name points at.
struct Existing {
    id: AdapterId,
    public: bool,
    metadata: String,
    /// None: it cannot be read.
    created_at: Option<i64>,
    generation: Generation,
}

/// What the store knows about the names of some uploads.
#[derive(Default)]
pub(super) struct Known {
    tenants: HashMap<TenantId, Arc<str>>,
    existing: HashMap<Key, Existing>,
    reserved: HashSet<Key>,
}

/// All that is to be known of a single upload: see [`bind_known`] for its parameters and [`Known::of_one`] for its row.
pub(super) const KNOWN_OF_ONE: &str = concat!(
    "SELECT t.name, CASE WHEN j.id IS NULL THEN 0 ELSE 1 END, a.id, a.public, a.metadata, a.created_at, g.generation FROM tenants t \
     LEFT JOIN adapters a ON a.tenant = t.id AND a.name = $2 AND a.deleted = 0 \
     LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
     LEFT JOIN jobs j ON j.tenant = t.id AND j.name = $2 AND j.id <> $3 AND ",
    under_way!("j.status"),
    " WHERE t.id = $1 AND t.deleted = 0 LIMIT 1"
);

/// The parameters of [`KNOWN_OF_ONE`]; a name that `publisher` has reserved is free for it.
pub(super) fn bind_known<'q>(query: AnyQuery<'q>, item: &'q NewAdapter, publisher: Option<&'q str>) -> AnyQuery<'q> {
    query.bind(item.tenant.0).bind(&*item.name).bind(publisher.unwrap_or(""))
}

impl Known {
    /// Of a single upload, from the row of [`KNOWN_OF_ONE`].
    pub(super) fn of_one(item: &NewAdapter, row: Option<&AnyRow>) -> Result<Self> {
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

/// A generation on its way into the table.
struct NewGeneration {
    adapter: AdapterId,
    seq: i64,
    facts: i64,
    contents: Contents,
}

/// Generations that are too old to be kept.
#[derive(Default)]
struct Outdated {
    /// Up to this one.
    seq: i64,
    generations: Vec<Generation>,
    bytes: i64,
}

/// An adapter on its way into both tables.
pub(super) struct Created {
    record: AdapterRecord,
    generation: NewGeneration,
}

impl Created {
    /// The parameters of [`INSERT_ONE`].
    pub(super) fn bind<'q>(&'q self, query: AnyQuery<'q>, now: i64) -> AnyQuery<'q> {
        bind_generation(bind_adapter(query, &self.record), &self.generation, now)
    }
}

type Key = (TenantId, String);

impl Tx<'_> {
    /// Writes uploads in order; each succeeds or fails by itself.
    pub(super) async fn put_adapters(&mut self, items: Vec<NewAdapter>) -> Result<PutResults> {
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
    pub(super) async fn put_round(
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

    /// Names under which jobs will publish, but for `publisher`'s. They are few: jobs under way are limited.
    async fn reserved_names(&mut self, publisher: Option<&str>) -> Result<HashSet<Key>> {
        let query = sqlx::query(concat!("SELECT tenant, name FROM jobs WHERE ", under_way!("status"), " AND id <> $1"));
        let rows = self.rows(query.bind(publisher.unwrap_or(""))).await?;
        // A name that cannot be read is nobody's.
        let key = |row: &AnyRow| -> Result<Key> { Ok((TenantId(row.try_get(0)?), ask::text(row, 1)?.to_owned())) };
        Ok(rows.iter().filter_map(|row| key(row).ok()).collect())
    }

    async fn tenant_names(&mut self, items: &[NewAdapter]) -> Result<HashMap<TenantId, Arc<str>>> {
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

    async fn existing(&mut self, items: &[NewAdapter]) -> Result<HashMap<Key, Existing>> {
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

    async fn insert_generations(&mut self, generations: &[NewGeneration]) -> Result<()> {
        for (sql, piece) in INSERT_GENERATIONS.exact(self.dialect, generations) {
            let mut query = sqlx::query(sql);
            for new in piece {
                query = bind_generation(query, new, self.now);
            }
            query.execute(&mut *self.connection).await?;
        }
        Ok(())
    }

    /// Another generation for an adapter that exists. One that it had before is pointed at again.
    async fn replace(&mut self, item: NewAdapter, old: Existing, owner: Arc<str>) -> Result<AdapterRecord> {
        let query = sqlx::query(NEWEST_AND_SEQ_OF).bind(old.id.0).bind(&item.contents.generation.0[..]);
        let row = self.row(query).await?.ok_or(sqlx::Error::RowNotFound)?;
        let (newest, same): (Option<i64>, Option<i64>) = match (row.try_get(0), row.try_get(1)) {
            (Ok(newest), Ok(same)) => (newest, same),
            _ => return Err(StoreError::AdapterDamaged),
        };
        let seq = same.unwrap_or(newest.unwrap_or(0) + 1);
        let outdated = if same.is_some() { Outdated::default() } else { self.outdated(old.id, seq).await? };
        let text = item.metadata.as_ref().map_or(0, |new| new.len() as i64 - old.metadata.len() as i64);
        let data = if same.is_some() { 0 } else { item.contents.size() };
        self.make_room(item.tenant, item.room, 0, data + text - outdated.bytes).await?;
        let facts = self.intern(&item.contents.facts).await?;
        if same.is_none() {
            let contents = item.contents.clone();
            self.insert_generations(&[NewGeneration { adapter: old.id, seq, facts, contents }]).await?;
            self.prune(old.id, &outdated).await?;
        } else {
            // Equal but perhaps for the base that it is forced onto, or for what a damaged row holds.
            sqlx::query("UPDATE generations SET facts = $1, data = $2 WHERE adapter = $3 AND seq = $4")
                .bind(facts)
                .bind(&*item.contents.data)
                .bind(old.id.0)
                .bind(seq)
                .execute(&mut *self.connection)
                .await?;
        }
        let record = AdapterRecord {
            id: old.id,
            tenant: item.tenant,
            owner,
            name: item.name,
            public: item.public.unwrap_or(old.public),
            metadata: item.metadata.unwrap_or(old.metadata),
            created_at: old.created_at.unwrap_or(self.now),
            updated_at: self.now,
            contents: item.contents,
        };
        let change = self.next_seq();
        sqlx::query(
            "UPDATE adapters SET seq = $1, public = $2, metadata = $3, created_at = $4, updated_at = $5, change_seq = $6 \
             WHERE id = $7",
        )
        .bind(seq)
        .bind(i64::from(record.public))
        .bind(&*record.metadata)
        .bind(record.created_at)
        .bind(self.now)
        .bind(change)
        .bind(record.id.0)
        .execute(&mut *self.connection)
        .await?;
        self.changed(|| Change::Stored(record.clone()));
        let (tenant, generations) = (record.tenant, outdated.generations);
        if !generations.is_empty() {
            self.changed(|| Change::Pruned { tenant, generations });
        }
        Ok(record)
    }

    /// What an adapter's history is too long for when `seq` becomes its newest generation.
    async fn outdated(&mut self, adapter: AdapterId, seq: i64) -> Result<Outdated> {
        let last = seq - i64::from(HISTORY);
        if last < 1 {
            return Ok(Outdated::default());
        }
        let query = sqlx::query(decode::select_sizes!("g.adapter = $1 AND g.seq <= $2"));
        let rows = self.rows(query.bind(adapter.0).bind(last)).await?;
        // A damaged one was never served, and goes with the others.
        let generations = rows.iter().filter_map(|row| decode::generation(row, 0).ok()).collect();
        let bytes = rows.iter().map(|row| row.try_get::<i64, _>(1).unwrap_or(0)).sum();
        Ok(Outdated { seq: last, generations, bytes })
    }

    /// Erases generations as a deletion does. None of them is current: that is the newest.
    async fn prune(&mut self, adapter: AdapterId, outdated: &Outdated) -> Result<()> {
        if outdated.seq < 1 {
            return Ok(());
        }
        sqlx::query("DELETE FROM generations WHERE adapter = $1 AND seq <= $2")
            .bind(adapter.0)
            .bind(outdated.seq)
            .execute(&mut *self.connection)
            .await?;
        self.erased = true;
        Ok(())
    }

    /// Erases an adapter with its generations. Facts that nobody else has go with the next sweep.
    pub(super) async fn delete_adapter(&mut self, tenant: TenantId, name: &str, public_too: bool) -> Result<AdapterId> {
        let row = sqlx::query(
            "SELECT id, CAST(OCTET_LENGTH(metadata) AS BIGINT), public FROM adapters WHERE deleted = 0 AND tenant = $1 AND name = $2",
        )
        .bind(tenant.0)
        .bind(name)
        .fetch_optional(&mut *self.connection)
        .await?
        .ok_or(StoreError::AdapterNotFound)?;
        let (id, mut bytes): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
        if !public_too && row.try_get::<i64, _>(2).is_ok_and(|public| public != 0) {
            return Err(StoreError::PublicAdapter);
        }
        let rows = self.rows(sqlx::query(decode::select_sizes!("g.adapter = $1")).bind(id)).await?;
        // A damaged one was never served, so nothing of it is cached; and its owner must be able to be rid of it.
        let generations = rows.iter().filter_map(|row| decode::generation(row, 0).ok()).collect();
        for row in &rows {
            bytes += row.try_get::<i64, _>(1).unwrap_or(0);
        }
        self.totals.add(tenant, -1, -bytes);
        for sql in ["DELETE FROM generations WHERE adapter = $1", "DELETE FROM adapters WHERE id = $1"] {
            sqlx::query(sql).bind(id).execute(&mut *self.connection).await?;
        }
        self.erased = true;
        self.changed(|| Change::Deleted { tenant, name: name.to_owned(), generations });
        Ok(AdapterId(id))
    }

    /// Points a name at a generation that it had before; gives the adapter and the generation that was current.
    pub(super) async fn rollback(
        &mut self,
        tenant: TenantId,
        name: &str,
        generation: Generation,
        public_too: bool,
    ) -> Result<(AdapterRecord, Generation)> {
        let old = match decode::own_record(self.connection, tenant, name).await {
            // Nothing was written yet, and it is no trouble of the others in this transaction.
            Err(error) if error.is_damage() => return Err(StoreError::AdapterDamaged),
            Ok(None) if decode::has_name(self.connection, tenant, name).await? => {
                return Err(StoreError::AdapterDamaged);
            }
            old => old?.ok_or(StoreError::AdapterNotFound)?,
        };
        if old.public && !public_too {
            return Err(StoreError::PublicAdapter);
        }
        let query = sqlx::query(SEQ_OF).bind(old.id.0).bind(&generation.0[..]);
        let seq: Option<i64> = query.fetch_one(&mut *self.connection).await?.try_get(0)?;
        let seq = seq.ok_or(StoreError::GenerationNotFound)?;
        let change = self.next_seq();
        sqlx::query("UPDATE adapters SET seq = $1, updated_at = $2, change_seq = $3 WHERE id = $4")
            .bind(seq)
            .bind(self.now)
            .bind(change)
            .bind(old.id.0)
            .execute(&mut *self.connection)
            .await?;
        let record = decode::own_record(self.connection, tenant, name).await?.ok_or(StoreError::AdapterNotFound)?;
        self.changed(|| Change::Stored(record.clone()));
        Ok((record, old.contents.generation))
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
