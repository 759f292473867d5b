//! The audit log: written in the transaction of the deed itself, and read by admins.

use futures::future::BoxFuture;
use sqlx::{AssertSqlSafe, Row as _, SqlSafeStr as _, SqlStr, any::AnyRow};
use std::sync::LazyLock;

use super::{
    Result, Store,
    adapters::INSERT_ONE,
    ask::{optional_text, shown, text},
    rows::{AnyQuery, Dialect, RowsSql},
    writer::Tx,
};
use crate::tenant::{AuditRecord, Deed};

static INSERT: RowsSql = RowsSql::new(
    "INSERT INTO audit (id, at, via, tenant, key_id, action, target, detail, peer, request_id) VALUES",
    10,
    "",
);

/// The ends of a transaction, by what is written with COMMIT: at most one adapter and one entry, SQLite only, in one question. Every question costs a
/// way to the connection's thread and back.
static ENDS: LazyLock<[[SqlStr; 2]; 2]> = LazyLock::new(|| {
    let text = |adapter: bool, entry: bool| {
        let (adapter_sql, entry_sql) = (INSERT_ONE.clone(), INSERT.one());
        let parts = [adapter.then_some(adapter_sql.as_str()), entry.then_some(entry_sql.as_str()), Some("COMMIT")];
        AssertSqlSafe(parts.into_iter().flatten().collect::<Vec<_>>().join("; ")).into_sql_str()
    };
    [false, true].map(|adapter| [false, true].map(|entry| text(adapter, entry)))
});

/// A deed with its number.
type Entry = (i64, Deed);

fn bind<'q>(query: AnyQuery<'q>, (id, deed): &'q Entry, now: i64) -> AnyQuery<'q> {
    let actor = &deed.actor;
    query
        .bind(*id)
        .bind(now)
        .bind(actor.via.as_str())
        .bind(actor.tenant.as_deref())
        .bind(actor.key.as_deref())
        .bind(deed.action)
        .bind(&*deed.target)
        .bind(deed.detail.as_deref())
        .bind(actor.origin.peer.map(|peer| peer.to_string()))
        .bind(actor.origin.request.as_deref())
}

fn record(row: &AnyRow) -> Result<AuditRecord> {
    Ok(AuditRecord {
        id: row.try_get(0)?,
        at: row.try_get(1)?,
        via: text(row, 2)?.to_owned(),
        tenant: optional_text(row, 3)?.map(str::to_owned),
        key: optional_text(row, 4)?.map(str::to_owned),
        action: text(row, 5)?.to_owned(),
        target: text(row, 6)?.to_owned(),
        detail: optional_text(row, 7)?.map(str::to_owned),
        peer: optional_text(row, 8)?.map(str::to_owned),
        request: optional_text(row, 9)?.map(str::to_owned),
    })
}

impl Tx<'_> {
    /// Has a deed written with the rest of the transaction. None: nobody asks who did it.
    pub(super) fn note(&mut self, deed: Option<Deed>) {
        if let Some(deed) = deed {
            let id = self.next_seq();
            self.deeds.push((id, deed));
        }
    }

    /// Writes what was noted and ends the transaction.
    pub(super) async fn commit(mut self) -> Result<()> {
        let (created, deeds, now) = (self.created.take(), std::mem::take(&mut self.deeds), self.now);
        let one = self.dialect == Dialect::Sqlite && deeds.len() == 1;
        let (before, with_end) = if one { (&[][..], &deeds[..]) } else { (&deeds[..], &[][..]) };
        for (sql, piece) in INSERT.exact(self.dialect, before) {
            let query = piece.iter().fold(sqlx::query(sql), |query, entry| bind(query, entry, now));
            query.execute(&mut *self.connection).await?;
        }
        let mut end = sqlx::query(ENDS[usize::from(created.is_some())][with_end.len()].clone());
        end = created.iter().fold(end, |query, created| created.bind(query, now));
        end = with_end.iter().fold(end, |query, entry| bind(query, entry, now));
        end.execute(&mut *self.connection).await?;
        Ok(())
    }
}

impl Store {
    /// A write that whoever this store acts for answers for: `did` makes the entry of the audit log out of the result.
    pub(super) async fn audited<T, W, D>(&self, work: W, did: D) -> Result<T>
    where
        T: Send + 'static,
        W: for<'t> FnOnce(&'t mut Tx<'_>) -> BoxFuture<'t, Result<T>> + Send + 'static,
        D: FnOnce(&crate::tenant::Actor, &T) -> Option<Deed> + Send + 'static,
    {
        let Some(actor) = self.actor.clone() else { return self.writer.job(work).await };
        self.writer
            .job(move |tx| {
                Box::pin(async move {
                    let done = work(tx).await?;
                    tx.note(did(&actor, &done));
                    Ok(done)
                })
            })
            .await
    }

    /// At most `limit` entries of the audit log, newest first, of those before the one with number `before`; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn audit(&self, before: Option<i64>, limit: u32) -> Result<Vec<AuditRecord>> {
        let query = |limit| {
            sqlx::query(
                "SELECT id, at, via, tenant, key_id, action, target, detail, peer, request_id FROM audit \
                 WHERE id < $1 ORDER BY id DESC LIMIT $2",
            )
            .bind(before.unwrap_or(i64::MAX))
            .bind(limit)
        };
        self.page(limit, query, record, |row| format!("audit entry {}", shown(row, 0))).await
    }
}
