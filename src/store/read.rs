//! Reading adapters.

use std::{collections::HashMap, sync::Arc};

use futures::TryStreamExt as _;
use sqlx::{AnyConnection, Connection as _, Row as _, any::AnyRow};

use super::{
    AdapterRecord, Contents, CorruptAdapter, Facts, GenerationRecord, LoadedAdapter, Result, Store, StoreError,
    adapters::SEQ_OF,
    ask::{self, shown, text},
    decode::{self, select_records},
    rows::AnyQuery,
};
use crate::types::{AdapterId, Generation, TenantId};

/// Adapters that are read in the way that costs more, where one of them cannot be read otherwise.
const PIECE: i64 = 100;

/// Sorts after every name that begins with a prefix: names are ASCII.
const AFTER_ALL: char = '\u{7f}';

impl Store {
    /// A tenant's own adapter.
    ///
    /// # Errors
    /// [`StoreError::AdapterDamaged`] when the name is there and what belongs to it cannot be read.
    pub async fn own_adapter(&self, tenant: TenantId, name: &str) -> Result<Option<AdapterRecord>> {
        let mut connection = self.pool.acquire().await?;
        let mut seen = None;
        let record = loop {
            match decode::own_record(&mut connection, tenant, name).await {
                Err(error) if error.is_damage() => {
                    self.name_damaged(format!("adapter {name} of tenant {}", tenant.0), &error);
                    break Err(StoreError::AdapterDamaged);
                }
                Ok(None) => {}
                read => break read,
            }
            // A name without the row of its generation, if the same adapter has the name before and after a look: else it came, or went, between two looks.
            let id = decode::id_of(&mut connection, tenant, name).await?;
            if id.is_none() || id == seen {
                break id.map_or(Ok(None), |_| Err(StoreError::AdapterDamaged));
            }
            seen = id;
        };
        self.writer.told().await;
        record
    }

    /// What a name means to a tenant: its own adapter, or else a public one. A damaged own one is an error, a damaged public one is none.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`], [`StoreError::AdapterDamaged`].
    pub async fn adapter(&self, tenant: TenantId, name: &str) -> Result<AdapterRecord> {
        if let Some(own) = self.own_adapter(tenant, name).await? {
            return Ok(own);
        }
        let row = self.row(sqlx::query(select_records!("a.public = 1 AND a.name = $1")).bind(name)).await?;
        self.writer.told().await;
        match decode::record(&row.ok_or(StoreError::AdapterNotFound)?) {
            Err(error) if error.is_damage() => {
                self.name_damaged(format!("public adapter {name}"), &error);
                Err(StoreError::AdapterNotFound)
            }
            read => read,
        }
    }

    /// What a tenant sees, in the order of names: at most `limit` adapters whose name begins with `prefix` and comes after
    /// `after`. A public adapter under the name of an own one, damaged or not, is not seen.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn list_adapters(
        &self,
        tenant: TenantId,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<Vec<AdapterRecord>> {
        let mut room = limit;
        loop {
            let (records, corrupt, more) = self.page_of_adapters(tenant, prefix, after, room).await?;
            if records.len() >= limit as usize || corrupt == 0 || !more {
                return Ok(records.into_iter().take(limit as usize).collect());
            }
            // Rows that cannot be read took places: a page that is short would be taken for the last.
            room = room.saturating_add(corrupt);
        }
    }

    /// A page with the rows that can be read, the number of those that cannot, and whether there may be more.
    async fn page_of_adapters(
        &self,
        tenant: TenantId,
        prefix: &str,
        after: Option<&str>,
        limit: u32,
    ) -> Result<(Vec<AdapterRecord>, u32, bool)> {
        let end = format!("{prefix}{AFTER_ALL}");
        let page = |sql: &'static str| {
            sqlx::query(sql).bind(prefix).bind(&*end).bind(after.unwrap_or("")).bind(i64::from(limit)).bind(tenant.0)
        };
        let own = page(select_records!(
            "a.tenant = $5 AND a.name >= $1 AND a.name < $2 AND a.name > $3 ORDER BY a.name LIMIT $4"
        ));
        let own = self.rows(own).await?;
        let public = page(select_records!(
            "a.public = 1 AND a.tenant <> $5 AND a.name >= $1 AND a.name < $2 AND a.name > $3 AND NOT EXISTS \
             (SELECT 1 FROM adapters own WHERE own.tenant = $5 AND own.name = a.name AND own.deleted = 0) \
             ORDER BY a.name LIMIT $4"
        ));
        let public = self.rows(public).await?;
        self.writer.told().await;
        let more = own.len() >= limit as usize || public.len() >= limit as usize;
        let rows = own.len() + public.len();
        let named = |row: &AnyRow| format!("adapter {} ({})", shown(row, 0), ask::name(row, 3));
        let mut records = self.readable(&own, decode::record, named);
        records.extend(self.readable(&public, decode::record, named));
        let corrupt = (rows - records.len()) as u32;
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records.truncate(limit as usize);
        Ok((records, corrupt, more))
    }

    /// The name of an adapter that a tenant sees, by its number.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`].
    pub async fn adapter_name(&self, tenant: TenantId, id: AdapterId) -> Result<String> {
        let query =
            sqlx::query("SELECT name FROM adapters WHERE id = $1 AND deleted = 0 AND (tenant = $2 OR public = 1)");
        let row = self.row(query.bind(id.0).bind(tenant.0)).await?;
        Ok(text(&row.ok_or(StoreError::AdapterNotFound)?, 0)?.to_owned())
    }

    /// At most `limit` generations of an adapter, newest upload first, of those uploaded before the generation `after`; without damaged ones.
    ///
    /// # Errors
    /// Only the database's. An adapter that is gone has none, and before one that it does not have there is none.
    pub async fn generations(
        &self,
        adapter: AdapterId,
        after: Option<Generation>,
        limit: u32,
    ) -> Result<Vec<GenerationRecord>> {
        let before = match after {
            None => i64::MAX,
            Some(after) => {
                let row = self.row(sqlx::query(SEQ_OF).bind(adapter.0).bind(&after.0[..])).await?;
                row.map(|row| row.try_get::<Option<i64>, _>(0)).transpose()?.flatten().unwrap_or(0)
            }
        };
        // Neither numbers nor frames: a page of large ones would be a gigabyte.
        let query = |limit| {
            sqlx::query(
                "SELECT g.seq, CASE WHEN g.seq = a.seq THEN 1 ELSE 0 END, g.created_at, g.generation, \
                 CAST(OCTET_LENGTH(g.data) AS BIGINT), f.dtype, f.scheme, f.fingerprint, f.forced_onto \
                 FROM generations g JOIN adapters a ON a.id = g.adapter JOIN facts f ON f.id = g.facts \
                 WHERE g.adapter = $1 AND a.deleted = 0 AND g.seq < $2 ORDER BY g.seq DESC LIMIT $3",
            )
            .bind(adapter.0)
            .bind(before)
            .bind(limit)
        };
        let named = |row: &AnyRow| format!("generation {} of adapter {}", shown(row, 0), adapter.0);
        let page = self.page(limit, query, generation_record, named).await?;
        self.writer.told().await;
        Ok(page)
    }

    /// Gives every adapter to `each`, in no order; at start. What is interned in the database is shared in memory. A row that cannot be read is given as
    /// such, and stops nobody.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn load_all(
        &self,
        mut each: impl FnMut(std::result::Result<LoadedAdapter, CorruptAdapter>),
    ) -> Result<u64> {
        let mut connection = self.pool.acquire().await?;
        // One snapshot: the facts are those of the adapters read after them.
        let begin = match connection.backend_name() {
            "PostgreSQL" => "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY",
            _ => "BEGIN",
        };
        let mut tx = connection.begin_with(begin).await?;
        let facts = all_facts(&mut tx).await?;
        let (mut count, mut last) = (0, i64::MIN);
        let mut read = |row: &AnyRow| -> Result<i64> {
            match loaded(row, &facts) {
                Ok(adapter) => {
                    each(Ok(adapter));
                    count += 1;
                }
                Err(error) => each(Err(corrupt(row, &error))),
            }
            Ok(row.try_get(0)?)
        };
        loop {
            let mut rows = adapters_after(last, i64::MAX).fetch(&mut *tx);
            let end = loop {
                match rows.try_next().await {
                    Ok(Some(row)) => last = read(&row)?,
                    end => break end,
                }
            };
            drop(rows);
            match end {
                Err(error) if ask::is_unreadable(&error) => {}
                end => break end.map(drop)?,
            }
            // A row stopped the stream: it and some after it are read in the way that costs more.
            for row in ask::rows(&mut tx, adapters_after(last, PIECE)).await? {
                last = read(&row)?;
            }
        }
        tx.commit().await?;
        Ok(count)
    }

    /// A fact about the whole store, such as the base it was last opened on.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn meta(&self, name: &str) -> Result<Option<String>> {
        let row = self.row(sqlx::query("SELECT value FROM meta WHERE name = $1").bind(name)).await?;
        row.map(|row| text(&row, 0).map(str::to_owned)).transpose()
    }

    /// A fact about the whole store; if there is none, this one from now on.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn meta_or_set(&self, name: &'static str, value: String) -> Result<String> {
        self.writer
            .job(move |tx| {
                Box::pin(async move {
                    sqlx::query("INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING")
                        .bind(name)
                        .bind(value)
                        .execute(&mut *tx.connection)
                        .await?;
                    let row = sqlx::query("SELECT value FROM meta WHERE name = $1").bind(name);
                    Ok(row.fetch_one(&mut *tx.connection).await?.try_get(0)?)
                })
            })
            .await
    }

    /// Notes a fact about the whole store.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn set_meta(&self, name: &'static str, value: String) -> Result<()> {
        self.writer
            .job(move |tx| {
                Box::pin(async move {
                    sqlx::query(
                        "INSERT INTO meta (name, value) VALUES ($1, $2) \
                         ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                    )
                    .bind(name)
                    .bind(value)
                    .execute(&mut *tx.connection)
                    .await?;
                    Ok(())
                })
            })
            .await
    }
}

/// Rows as [`loaded`] reads them, in the order of their numbers.
fn adapters_after(last: i64, most: i64) -> AnyQuery<'static> {
    sqlx::query(
        "SELECT a.id, a.tenant, a.name, a.public, g.generation, g.data, g.facts \
         FROM adapters a LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq \
         WHERE a.deleted = 0 AND a.id > $1 ORDER BY a.id LIMIT $2",
    )
    .bind(last)
    .bind(most)
}

async fn all_facts(connection: &mut AnyConnection) -> Result<HashMap<i64, Arc<Facts>>> {
    let rows = sqlx::query("SELECT id, dtype, scheme, frame, fingerprint, forced_onto FROM facts");
    let rows = ask::rows(connection, rows).await?;
    // Facts that cannot be read are missed by the adapters that name them.
    let read = |row: &AnyRow| -> Result<_> { Ok((row.try_get(0)?, Arc::new(decode::facts(row, 1)?))) };
    Ok(rows.iter().filter_map(|row| read(row).ok()).collect())
}

/// As much of a row as can be read.
fn corrupt(row: &AnyRow, error: &StoreError) -> CorruptAdapter {
    CorruptAdapter {
        id: AdapterId(row.try_get(0).unwrap_or_default()),
        tenant: TenantId(row.try_get(1).unwrap_or_default()),
        name: ask::name(row, 2),
        cause: error.to_string(),
    }
}

fn loaded(row: &AnyRow, facts: &HashMap<i64, Arc<Facts>>) -> Result<LoadedAdapter> {
    let facts = facts.get(&row.try_get(6)?).ok_or(StoreError::Corrupt("reference to facts"))?;
    Ok(LoadedAdapter {
        id: AdapterId(row.try_get(0)?),
        tenant: TenantId(row.try_get(1)?),
        name: text(row, 2)?.to_owned(),
        public: row.try_get::<i64, _>(3)? != 0,
        contents: Contents { generation: decode::generation(row, 4)?, data: row.try_get(5)?, facts: facts.clone() },
    })
}

fn generation_record(row: &AnyRow) -> Result<GenerationRecord> {
    Ok(GenerationRecord {
        seq: row.try_get(0)?,
        current: row.try_get::<i64, _>(1)? != 0,
        created_at: row.try_get(2)?,
        generation: decode::generation(row, 3)?,
        bytes: row.try_get::<i64, _>(4)?.try_into().map_err(|_| StoreError::Corrupt("length"))?,
        facts: Arc::new(decode::facts_without_frame(row, 5, 7)?),
    })
}
