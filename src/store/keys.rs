//! Keys and their owners.

use std::collections::HashSet;

use futures::future::BoxFuture;
use sqlx::{Row as _, any::AnyRow};

use super::{
    Damaged, DamagedRow, Result, Store, StoreError,
    ask::{self, text},
    decode,
    tenants::{limit_columns, or_damaged, overrides, select_tenants, tenant, tenant_created},
    writer::Tx,
};
use crate::{
    tenant::{Actor, ApiKey, KeyHash, KeyRecord, KeySource, KeySourceError, Overrides, Role, Tenant},
    types::TenantId,
};

/// Keys with their owners, as [`key_record`] reads them.
macro_rules! select_keys {
    ($condition:literal) => {
        concat!(
            "SELECT k.id, k.tenant, t.name, k.hash, k.prefix, k.role, k.created_at, k.expires_at, k.revoked_at, \
             k.last_used_at, ",
            limit_columns!(),
            ", t.created_at FROM keys k JOIN tenants t ON t.id = k.tenant WHERE t.deleted = 0 AND ",
            $condition
        )
    };
}

fn key_record(row: &AnyRow) -> Result<KeyRecord> {
    or_damaged(read_key(row), Damaged::Key, row, 0)
}

fn read_key(row: &AnyRow) -> Result<KeyRecord> {
    // No key of a tenant works of which anything cannot be read.
    row.try_get::<i64, _>(11 + Overrides::NAMES.len())?;
    Ok(KeyRecord {
        id: text(row, 0)?.to_owned(),
        tenant: TenantId(row.try_get(1)?),
        tenant_name: text(row, 2)?.to_owned(),
        hash: KeyHash(decode::array(row.try_get(3)?, "key hash")?),
        prefix: text(row, 4)?.to_owned(),
        role: text(row, 5)?.parse().map_err(|_| StoreError::Corrupt("role"))?,
        created_at: row.try_get(6)?,
        expires_at: row.try_get(7)?,
        revoked_at: row.try_get(8)?,
        last_used_at: row.try_get(9)?,
        limits: overrides(row, 10)?,
    })
}

/// A key to be made known.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Its hash and its first characters are kept.
    pub key: ApiKey,
    /// The owner's name.
    pub tenant: String,
    /// Make the tenant when there is none of that name?
    pub create_tenant: bool,
    /// What it may do.
    pub role: Role,
    /// Unix seconds from which it no longer works.
    pub expires_at: Option<i64>,
    /// Only if no key was ever made: for the first admin key, of which two starts at once must make one.
    pub only_first: bool,
}

/// A key to take another's place.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// The new key.
    pub key: ApiKey,
    /// Seconds for which the old one still works, unless it ends before.
    pub grace: i64,
    /// Unix seconds from which the new one no longer works. None: it lives as long as the old one was made to.
    pub expires_at: Option<i64>,
}

impl Tx<'_> {
    /// `actor` is who answers for a tenant that is made with the key.
    async fn create_key(&mut self, new: NewKey, actor: Option<&Actor>) -> Result<Option<KeyRecord>> {
        if new.only_first
            && sqlx::query("SELECT 1 FROM keys LIMIT 1").fetch_optional(&mut *self.connection).await?.is_some()
        {
            return Ok(None);
        }
        let tenant = match self.living_tenant(&new.tenant).await? {
            Some(tenant) => tenant,
            None if new.create_tenant => {
                let tenant = self.create_tenant(new.tenant).await?;
                self.note(actor.map(|actor| tenant_created(actor, &tenant)));
                tenant
            }
            None => return Err(StoreError::TenantNotFound),
        };
        self.insert_key(&new.key, tenant, new.role, new.expires_at).await.map(Some)
    }

    async fn insert_key(
        &mut self,
        key: &ApiKey,
        tenant: Tenant,
        role: Role,
        expires_at: Option<i64>,
    ) -> Result<KeyRecord> {
        let change = self.next_seq();
        let record = KeyRecord {
            // Of the hash: unique, and tells nothing about the key.
            id: format!("key_{}", hex(&key.hash().0[..8])),
            tenant: tenant.id,
            tenant_name: tenant.name,
            hash: key.hash(),
            prefix: key.visible_prefix().to_owned(),
            role,
            created_at: self.now,
            expires_at,
            revoked_at: None,
            last_used_at: None,
            limits: tenant.limits,
        };
        sqlx::query(
            "INSERT INTO keys (id, tenant, hash, prefix, role, created_at, expires_at, change_seq) \
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&*record.id)
        .bind(record.tenant.0)
        .bind(&record.hash.0[..])
        .bind(&*record.prefix)
        .bind(record.role.as_str())
        .bind(record.created_at)
        .bind(record.expires_at)
        .bind(change)
        .execute(&mut *self.connection)
        .await?;
        Ok(record)
    }

    async fn rotate_key(&mut self, id: &str, new: Rotation) -> Result<(KeyRecord, KeyRecord)> {
        let row = self.row(sqlx::query(select_keys!("k.id = $1")).bind(id)).await?;
        let mut old = key_record(&row.ok_or(StoreError::KeyNotFound)?)?;
        if !old.is_live(self.now) {
            return Err(StoreError::KeyNotLive);
        }
        let lifetime = old.expires_at.map(|at| self.now.saturating_add(at.saturating_sub(old.created_at)));
        let end = self.now.saturating_add(new.grace);
        old.expires_at = Some(old.expires_at.map_or(end, |at| at.min(end)));
        let change = self.next_seq();
        sqlx::query("UPDATE keys SET expires_at = $1, change_seq = $2 WHERE id = $3")
            .bind(old.expires_at)
            .bind(change)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        let owner = self.living_tenant(&old.tenant_name).await?.ok_or(StoreError::TenantNotFound)?;
        let made = self.insert_key(&new.key, owner, old.role, new.expires_at.or(lifetime)).await?;
        Ok((made, old))
    }

    async fn revoke_key(&mut self, id: &str) -> Result<()> {
        let (now, change) = (self.now, self.next_seq());
        let done = sqlx::query("UPDATE keys SET revoked_at = COALESCE(revoked_at, $1), change_seq = $2 WHERE id = $3")
            .bind(now)
            .bind(change)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        if done.rows_affected() == 0 { Err(StoreError::KeyNotFound) } else { Ok(()) }
    }

    async fn touch_key(&mut self, id: &str, at: i64) -> Result<()> {
        let change = self.next_seq();
        sqlx::query("UPDATE keys SET last_used_at = $1, change_seq = $2 WHERE id = $3")
            .bind(at)
            .bind(change)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        Ok(())
    }
}

/// Whose key and what it may do, for the audit log.
fn key_text(key: &KeyRecord) -> String {
    format!("{{\"tenant\":\"{}\",\"role\":\"{}\"}}", key.tenant_name, key.role)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Store {
    /// Makes a key known. None: it was to be the first, and is not.
    ///
    /// # Errors
    /// [`StoreError::TenantNotFound`], [`StoreError::Damaged`].
    pub async fn create_key(&self, new: NewKey) -> Result<Option<KeyRecord>> {
        let actor = self.actor.clone();
        self.audited(
            move |tx| Box::pin(async move { tx.create_key(new, actor.as_deref()).await }),
            |actor, made| made.as_ref().map(|key| actor.did("key.create", key.id.clone()).with(key_text(key))),
        )
        .await
    }

    /// Makes a key with the owner and the role of another, which then ends after a grace period; the new one, and the old one as it is then.
    ///
    /// # Errors
    /// [`StoreError::KeyNotFound`], [`StoreError::KeyNotLive`], [`StoreError::Damaged`].
    pub async fn rotate_key(&self, id: &str, new: Rotation) -> Result<(KeyRecord, KeyRecord)> {
        let (id, target) = (id.to_owned(), id.to_owned());
        self.audited(
            move |tx| Box::pin(async move { tx.rotate_key(&id, new).await }),
            |actor, (made, _)| Some(actor.did("key.rotate", target).with(format!("{{\"new\":\"{}\"}}", made.id))),
        )
        .await
    }

    /// Ends a key; it stays listed. Revoking again changes nothing.
    ///
    /// # Errors
    /// [`StoreError::KeyNotFound`].
    pub async fn revoke_key(&self, id: &str) -> Result<()> {
        let id = id.to_owned();
        let target = id.clone();
        self.audited(
            move |tx| Box::pin(async move { tx.revoke_key(&id).await }),
            |actor, ()| Some(actor.did("key.revoke", target)),
        )
        .await
    }

    /// A key by its public identifier.
    ///
    /// # Errors
    /// [`StoreError::KeyNotFound`], [`StoreError::Damaged`].
    pub async fn key(&self, id: &str) -> Result<KeyRecord> {
        let row = self.row(sqlx::query(select_keys!("k.id = $1")).bind(id)).await?;
        key_record(&row.ok_or(StoreError::KeyNotFound)?)
    }

    /// The keys of a tenant, oldest first, revoked ones too; without damaged ones.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn keys(&self, tenant: TenantId) -> Result<Vec<KeyRecord>> {
        let rows =
            self.rows(sqlx::query(select_keys!("k.tenant = $1 ORDER BY k.created_at, k.id")).bind(tenant.0)).await?;
        Ok(self.readable(&rows, key_record, |row| format!("key {}", ask::name(row, 0))))
    }

    /// Every row of a tenant or a key that cannot be read: at start. Keys of a damaged tenant are not named one by one.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn damaged_rows(&self) -> Result<Vec<DamagedRow>> {
        let mut damaged = Vec::new();
        let mut tenants: HashSet<i64> = HashSet::new();
        for row in self.rows(sqlx::query(select_tenants!("1 = 1 ORDER BY t.id"))).await? {
            if let Err(StoreError::Damaged(of_tenant)) = tenant(&row) {
                damaged.push(of_tenant);
                tenants.extend(row.try_get::<i64, _>(0));
            }
        }
        for row in self.rows(sqlx::query(select_keys!("1 = 1 ORDER BY k.id"))).await? {
            let named = row.try_get::<i64, _>(1).is_ok_and(|tenant| tenants.contains(&tenant));
            if let Err(StoreError::Damaged(of_key)) = key_record(&row)
                && !named
            {
                damaged.push(of_key);
            }
        }
        Ok(damaged)
    }
}

impl KeySource for Store {
    fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, std::result::Result<Option<KeyRecord>, KeySourceError>> {
        Box::pin(async move {
            let row = self.key_row(sqlx::query(select_keys!("k.hash = $1")).bind(&hash.0[..])).await;
            let record = row.and_then(|row| row.as_ref().map(key_record).transpose());
            record.map_err(|error| match error {
                StoreError::Damaged(row) => KeySourceError::Damaged(row.to_string()),
                other => KeySourceError::Unavailable(other.to_string()),
            })
        })
    }

    fn touch_key(&self, id: String, at: i64) {
        self.writer.try_job(move |tx| Box::pin(async move { tx.touch_key(&id, at).await }));
    }
}
