//! Files of `/v1/files`.

use sqlx::{AnyConnection, Row as _};

use super::{
    FileRecord, NewFile,
    decode::{self, signed},
};
use crate::{
    store::{
        Result, Store, StoreError,
        ask::{self, name},
        idempotency,
        writer::Tx,
    },
    types::TenantId,
};

/// A tenant's file, without what is in it.
async fn own_file(connection: &mut AnyConnection, tenant: TenantId, id: &str) -> Result<FileRecord> {
    let query = sqlx::query("SELECT id, filename, purpose, bytes, created_at FROM files WHERE id = $1 AND tenant = $2");
    let row = ask::row(connection, query.bind(id).bind(tenant.0)).await?;
    decode::file(&row.ok_or(StoreError::FileNotFound)?)
}

impl Tx<'_> {
    async fn put_file(&mut self, new: NewFile) -> Result<FileRecord> {
        self.living(new.tenant).await?;
        if let Some(key) = &new.key {
            let known =
                idempotency::answer(self.connection, new.tenant, key.route, &key.key, &key.request_hash).await?;
            if let Some(id) = known {
                return own_file(self.connection, new.tenant, &id).await;
            }
        }
        let row = sqlx::query("SELECT CAST(COALESCE(SUM(bytes), 0) AS BIGINT) FROM files WHERE tenant = $1")
            .bind(new.tenant.0)
            .fetch_one(&mut *self.connection)
            .await?;
        let size = new.data.len() as u64;
        if decode::count(&row, 0)?.saturating_add(size) > new.most_of_tenant {
            return Err(StoreError::FilesFull);
        }
        self.make_room(new.tenant, new.room, 0, signed(size)).await?;
        let change = self.next_seq();
        sqlx::query(
            "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, change_seq, data) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&*new.id)
        .bind(new.tenant.0)
        .bind(&*new.filename)
        .bind(&*new.purpose)
        .bind(signed(size))
        .bind(self.now)
        .bind(change)
        .bind(new.data)
        .execute(&mut *self.connection)
        .await?;
        if let Some(key) = &new.key {
            self.keep_answer(new.tenant, key.route, &key.key, &key.request_hash, new.id.clone()).await?;
        }
        Ok(FileRecord { id: new.id, filename: new.filename, purpose: new.purpose, bytes: size, created_at: self.now })
    }

    async fn delete_file(&mut self, tenant: TenantId, id: &str) -> Result<()> {
        let row = self
            .row(sqlx::query("SELECT bytes FROM files WHERE id = $1 AND tenant = $2").bind(id).bind(tenant.0))
            .await?
            .ok_or(StoreError::FileNotFound)?;
        sqlx::query("DELETE FROM files WHERE id = $1").bind(id).execute(&mut *self.connection).await?;
        match row.try_get::<i64, _>(0) {
            Ok(bytes) => self.totals.add(tenant, 0, -bytes),
            Err(_) => self.totals.forget(tenant),
        }
        self.erased = true;
        Ok(())
    }

    /// Fails for a tenant that is gone.
    pub(super) async fn living(&mut self, tenant: TenantId) -> Result<()> {
        let row = sqlx::query("SELECT id FROM tenants WHERE id = $1 AND deleted = 0")
            .bind(tenant.0)
            .fetch_optional(&mut *self.connection)
            .await?;
        row.map(|_| ()).ok_or(StoreError::TenantNotFound)
    }
}

impl Store {
    /// Keeps a file; gives the one that was kept before under the same key.
    ///
    /// # Errors
    /// [`StoreError::FilesFull`], [`StoreError::BytesFull`], [`StoreError::TenantNotFound`], [`StoreError::IdempotencyMismatch`].
    pub async fn put_file(&self, new: NewFile) -> Result<FileRecord> {
        let id = new.id.clone();
        self.audited(
            move |tx| Box::pin(tx.put_file(new)),
            move |actor, file| (file.id == id).then(|| actor.did("file.upload", id)),
        )
        .await
    }

    /// A tenant's files, newest first: at most `limit` of those older than `after`; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn files(&self, tenant: TenantId, after: Option<&str>, limit: u32) -> Result<Vec<FileRecord>> {
        // '~' is above every letter of an id.
        let query = |limit| {
            sqlx::query(
                "SELECT id, filename, purpose, bytes, created_at FROM files WHERE tenant = $1 AND id < $2 ORDER BY id DESC LIMIT $3",
            )
            .bind(tenant.0)
            .bind(after.unwrap_or("~"))
            .bind(limit)
        };
        self.page(limit, query, decode::file, |row| format!("file {}", name(row, 0))).await
    }

    /// A tenant's file.
    ///
    /// # Errors
    /// [`StoreError::FileNotFound`].
    pub async fn file(&self, tenant: TenantId, id: &str) -> Result<FileRecord> {
        let mut connection = self.pool.acquire().await?;
        own_file(&mut connection, tenant, id).await
    }

    /// What is in a tenant's file.
    ///
    /// # Errors
    /// [`StoreError::FileNotFound`].
    pub async fn file_data(&self, tenant: TenantId, id: &str) -> Result<Vec<u8>> {
        let query = sqlx::query("SELECT data FROM files WHERE id = $1 AND tenant = $2");
        let row = self.row(query.bind(id).bind(tenant.0)).await?;
        Ok(row.ok_or(StoreError::FileNotFound)?.try_get(0)?)
    }

    /// Erases a tenant's file. Jobs have their own copy.
    ///
    /// # Errors
    /// [`StoreError::FileNotFound`].
    pub async fn delete_file(&self, tenant: TenantId, id: &str) -> Result<()> {
        let id = id.to_owned();
        let target = id.clone();
        self.audited(
            move |tx| Box::pin(async move { tx.delete_file(tenant, &id).await }),
            |actor, ()| Some(actor.did("file.delete", target)),
        )
        .await
    }
}
