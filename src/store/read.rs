//! Reading adapters.

use std::{collections::HashMap, sync::Arc};

use futures::TryStreamExt as _;
use sqlx::{AnyConnection, Connection as _, Row as _, any::AnyRow};

use super::{
    AdapterRecord, Contents, CorruptAdapter, Facts, GenerationRecord, LoadedAdapter, Result, Store, StoreError,
    decode::{self, select_records},
};
use crate::types::{AdapterId, TenantId};

/// Sorts after every name that begins with a prefix: names are ASCII.
const AFTER_ALL: char = '\u{7f}';

impl Store {
    /// A tenant's own adapter.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn own_adapter(&self, tenant: TenantId, name: &str) -> Result<Option<AdapterRecord>> {
        let mut connection = self.pool.acquire().await?;
        let record = decode::own_record(&mut connection, tenant, name).await?;
        self.writer.told().await;
        Ok(record)
    }

    /// What a name means to a tenant: its own adapter, or else a public one.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`].
    pub async fn adapter(&self, tenant: TenantId, name: &str) -> Result<AdapterRecord> {
        if let Some(own) = self.own_adapter(tenant, name).await? {
            return Ok(own);
        }
        let row =
            sqlx::query(select_records!("a.public = 1 AND a.name = $1")).bind(name).fetch_optional(&self.pool).await?;
        self.writer.told().await;
        decode::record(&row.ok_or(StoreError::AdapterNotFound)?)
    }

    /// What a tenant sees, in the order of names: at most `limit` adapters whose name begins with `prefix` and comes after
    /// `after`. A public adapter under the name of an own one is not seen.
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
            sqlx::query(sql)
                .bind(prefix.to_owned())
                .bind(end.clone())
                .bind(after.unwrap_or("").to_owned())
                .bind(i64::from(limit))
                .bind(tenant.0)
        };
        let own = page(select_records!(
            "a.tenant = $5 AND a.name >= $1 AND a.name < $2 AND a.name > $3 ORDER BY a.name LIMIT $4"
        ))
        .fetch_all(&self.pool)
        .await?;
        let public = page(select_records!(
            "a.public = 1 AND a.tenant <> $5 AND a.name >= $1 AND a.name < $2 AND a.name > $3 ORDER BY a.name LIMIT $4"
        ))
        .fetch_all(&self.pool)
        .await?;
        self.writer.told().await;
        let more = own.len() >= limit as usize || public.len() >= limit as usize;
        let rows = own.len() + public.len();
        // A row that cannot be read was named in the log at the start.
        let mut records: Vec<_> = own.iter().chain(&public).filter_map(|row| decode::record(row).ok()).collect();
        let corrupt = (rows - records.len()) as u32;
        // Stable: of one name the own comes first.
        records.sort_by(|a, b| a.name.cmp(&b.name));
        records.dedup_by(|public, own| public.name == own.name);
        records.truncate(limit as usize);
        Ok((records, corrupt, more))
    }

    /// The name of an adapter that a tenant sees, by its number.
    ///
    /// # Errors
    /// [`StoreError::AdapterNotFound`].
    pub async fn adapter_name(&self, tenant: TenantId, id: AdapterId) -> Result<String> {
        let row =
            sqlx::query("SELECT name FROM adapters WHERE id = $1 AND deleted = 0 AND (tenant = $2 OR public = 1)")
                .bind(id.0)
                .bind(tenant.0)
                .fetch_optional(&self.pool)
                .await?;
        Ok(row.ok_or(StoreError::AdapterNotFound)?.try_get(0)?)
    }

    /// Every generation of an adapter, newest upload first.
    ///
    /// # Errors
    /// Only the database's. An adapter that is gone has none.
    pub async fn generations(&self, adapter: AdapterId) -> Result<Vec<GenerationRecord>> {
        let rows = sqlx::query(
            "SELECT g.seq, CASE WHEN g.seq = a.seq THEN 1 ELSE 0 END, g.created_at, \
             g.generation, g.data, f.dtype, f.scheme, f.frame, f.fingerprint, f.forced_onto \
             FROM generations g JOIN adapters a ON a.id = g.adapter JOIN facts f ON f.id = g.facts \
             WHERE g.adapter = $1 AND a.deleted = 0 ORDER BY g.seq DESC",
        )
        .bind(adapter.0)
        .fetch_all(&self.pool)
        .await?;
        self.writer.told().await;
        rows.iter().map(generation_record).collect()
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
        let mut count = 0;
        let mut rows = sqlx::query(
            "SELECT a.id, a.tenant, a.name, a.public, g.generation, g.data, g.facts \
             FROM adapters a LEFT JOIN generations g ON g.adapter = a.id AND g.seq = a.seq WHERE a.deleted = 0",
        )
        .fetch(&mut *tx);
        while let Some(row) = rows.try_next().await? {
            match loaded(&row, &facts) {
                Ok(adapter) => {
                    each(Ok(adapter));
                    count += 1;
                }
                Err(error) => each(Err(corrupt(&row, &error))),
            }
        }
        drop(rows);
        tx.commit().await?;
        Ok(count)
    }

    /// A fact about the whole store, such as the base it was last opened on.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn meta(&self, name: &str) -> Result<Option<String>> {
        let row = sqlx::query("SELECT value FROM meta WHERE name = $1").bind(name).fetch_optional(&self.pool).await?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
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

async fn all_facts(connection: &mut AnyConnection) -> Result<HashMap<i64, Arc<Facts>>> {
    let rows = sqlx::query("SELECT id, dtype, scheme, frame, fingerprint, forced_onto FROM facts");
    let rows = rows.fetch_all(connection).await?;
    // Facts that cannot be read are missed by the adapters that name them.
    let read = |row: &AnyRow| -> Result<_> { Ok((row.try_get(0)?, Arc::new(decode::facts(row, 1)?))) };
    Ok(rows.iter().filter_map(|row| read(row).ok()).collect())
}

/// As much of a row as can be read.
fn corrupt(row: &AnyRow, error: &StoreError) -> CorruptAdapter {
    CorruptAdapter {
        id: AdapterId(row.try_get(0).unwrap_or_default()),
        tenant: TenantId(row.try_get(1).unwrap_or_default()),
        name: row.try_get(2).unwrap_or_default(),
        cause: error.to_string(),
    }
}

fn loaded(row: &AnyRow, facts: &HashMap<i64, Arc<Facts>>) -> Result<LoadedAdapter> {
    let facts = facts.get(&row.try_get(6)?).ok_or(StoreError::Corrupt("reference to facts"))?;
    Ok(LoadedAdapter {
        id: AdapterId(row.try_get(0)?),
        tenant: TenantId(row.try_get(1)?),
        name: row.try_get(2)?,
        public: row.try_get::<i64, _>(3)? != 0,
        contents: Contents { generation: decode::generation(row, 4)?, data: row.try_get(5)?, facts: facts.clone() },
    })
}

fn generation_record(row: &AnyRow) -> Result<GenerationRecord> {
    Ok(GenerationRecord {
        seq: row.try_get(0)?,
        current: row.try_get::<i64, _>(1)? != 0,
        created_at: row.try_get(2)?,
        contents: decode::contents(row, 3)?,
    })
}
