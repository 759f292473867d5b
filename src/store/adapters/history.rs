//! An adapter after its first upload: new generations, as many as are kept, the way back to one of them, deletion.

use std::sync::Arc;

use sqlx::Row as _;

use super::{known::Existing, uploads::NewGeneration};
use crate::{
    store::{AdapterRecord, Change, NewAdapter, Result, StoreError, decode, writer::Tx},
    types::{AdapterId, Generation, TenantId},
};

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
pub(in crate::store) const SEQ_OF: &str = concat!("SELECT ", seq_of_generation!());

/// That number, and the one of the adapter's newest generation before it.
pub(in crate::store) const NEWEST_AND_SEQ_OF: &str = concat!(
    "SELECT (SELECT seq FROM generations WHERE adapter = $1 ORDER BY seq DESC LIMIT 1), ",
    seq_of_generation!()
);

/// Generations that are too old to be kept.
#[derive(Default)]
struct Outdated {
    /// Up to this one.
    seq: i64,
    generations: Vec<Generation>,
    bytes: i64,
}

impl Tx<'_> {
    /// Another generation for an adapter that exists. One that it had before is pointed at again.
    pub(super) async fn replace(&mut self, item: NewAdapter, old: Existing, owner: Arc<str>) -> Result<AdapterRecord> {
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
    pub(in crate::store) async fn delete_adapter(
        &mut self,
        tenant: TenantId,
        name: &str,
        public_too: bool,
    ) -> Result<AdapterId> {
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
    pub(in crate::store) async fn rollback(
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
