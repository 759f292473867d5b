//! Tenants and their keys.

use std::collections::HashSet;

use futures::{TryStreamExt as _, future::BoxFuture};
use sqlx::{Row as _, any::AnyRow};

use super::{Change, Damaged, DamagedRow, Result, Store, StoreError, decode, decode::bound, writer::Tx};
use crate::{
    tenant::{
        ApiKey, BUILT_IN_TENANT, KeyHash, KeyRecord, KeySource, KeySourceError, LimitChanges, Overrides, Role, Tenant,
    },
    types::TenantId,
};

/// What was set for a tenant, as [`overrides`] reads it.
macro_rules! limit_columns {
    () => {
        "t.max_adapters, t.max_stored_bytes, t.max_concurrent_requests, t.max_requests_per_minute, \
         t.max_tokens_per_minute, t.max_running_jobs, t.max_queued_jobs, t.max_trained_tokens_per_day, t.weight"
    };
}

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

/// Tenants, as [`tenant`] reads them.
macro_rules! select_tenants {
    ($condition:literal) => {
        concat!(
            "SELECT t.id, t.name, t.created_at, ",
            limit_columns!(),
            " FROM tenants t WHERE t.deleted = 0 AND ",
            $condition
        )
    };
}

/// The columns of `limit_columns`, from a position on.
fn overrides(row: &AnyRow, at: usize) -> Result<Overrides> {
    let mut bounds = [None; Overrides::NAMES.len()];
    for (column, slot) in bounds.iter_mut().enumerate() {
        *slot = bound(row, at + column)?;
    }
    let weight: Option<i64> = row.try_get(at + bounds.len())?;
    let weight = weight.map(u32::try_from).transpose().map_err(|_| StoreError::Corrupt("weight"))?;
    Ok(Overrides::new(bounds, weight))
}

/// As much of the columns of `limit_columns` as can be read; the rest counts as not set.
fn readable_overrides(row: &AnyRow, at: usize) -> Overrides {
    let mut bounds = [None; Overrides::NAMES.len()];
    for (column, slot) in bounds.iter_mut().enumerate() {
        *slot = bound(row, at + column).unwrap_or_default();
    }
    let weight: Option<i64> = row.try_get(at + bounds.len()).unwrap_or_default();
    Overrides::new(bounds, weight.and_then(|weight| u32::try_from(weight).ok()))
}

/// What was read of a row, whose name is in a column; whatever keeps it from being read is the trouble of that row alone.
fn or_damaged<T>(read: Result<T>, kind: Damaged, row: &AnyRow, name: usize) -> Result<T> {
    read.map_err(|error| {
        let (name, cause) = (row.try_get(name).unwrap_or_default(), error.to_string());
        StoreError::Damaged(DamagedRow { kind, name, cause })
    })
}

fn key_record(row: &AnyRow) -> Result<KeyRecord> {
    or_damaged(read_key(row), Damaged::Key, row, 0)
}

fn read_key(row: &AnyRow) -> Result<KeyRecord> {
    // No key of a tenant works of which anything cannot be read.
    row.try_get::<i64, _>(11 + Overrides::NAMES.len())?;
    Ok(KeyRecord {
        id: row.try_get(0)?,
        tenant: TenantId(row.try_get(1)?),
        tenant_name: row.try_get(2)?,
        hash: KeyHash(decode::array(row.try_get(3)?, "key hash")?),
        prefix: row.try_get(4)?,
        role: row.try_get::<&str, _>(5)?.parse().map_err(|_| StoreError::Corrupt("role"))?,
        created_at: row.try_get(6)?,
        expires_at: row.try_get(7)?,
        revoked_at: row.try_get(8)?,
        last_used_at: row.try_get(9)?,
        limits: overrides(row, 10)?,
    })
}

fn tenant(row: &AnyRow) -> Result<Tenant> {
    or_damaged(overrides(row, 3).and_then(|limits| read_tenant(row, limits)), Damaged::Tenant, row, 1)
}

fn read_tenant(row: &AnyRow, limits: Overrides) -> Result<Tenant> {
    Ok(Tenant { id: TenantId(row.try_get(0)?), name: row.try_get(1)?, created_at: row.try_get(2)?, limits })
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
    async fn living_tenant(&mut self, name: &str) -> Result<Option<Tenant>> {
        let row = sqlx::query(select_tenants!("t.name = $1")).bind(name).fetch_optional(&mut *self.connection).await?;
        row.as_ref().map(tenant).transpose()
    }

    async fn create_tenant(&mut self, name: String) -> Result<Tenant> {
        if self.living_tenant(&name).await?.is_some() {
            return Err(StoreError::TenantExists);
        }
        let id = self.next_seq();
        sqlx::query("INSERT INTO tenants (id, name, created_at, change_seq) VALUES ($1, $2, $3, $4)")
            .bind(id)
            .bind(&*name)
            .bind(self.now)
            .bind(id)
            .execute(&mut *self.connection)
            .await?;
        Ok(Tenant { id: TenantId(id), name, created_at: self.now, limits: Overrides::default() })
    }

    async fn set_limits(&mut self, name: &str, changes: &LimitChanges) -> Result<Tenant> {
        let row = sqlx::query(select_tenants!("t.name = $1")).bind(name).fetch_optional(&mut *self.connection).await?;
        let row = row.ok_or(StoreError::TenantNotFound)?;
        // Limits that cannot be read are what this mends: all of them are written anew.
        let mut tenant = or_damaged(read_tenant(&row, readable_overrides(&row, 3)), Damaged::Tenant, &row, 1)?;
        tenant.limits.change(changes);
        let change = self.next_seq();
        let mut update = sqlx::query(
            "UPDATE tenants SET max_adapters = $1, max_stored_bytes = $2, max_concurrent_requests = $3, \
             max_requests_per_minute = $4, max_tokens_per_minute = $5, max_running_jobs = $6, max_queued_jobs = $7, \
             max_trained_tokens_per_day = $8, weight = $9, change_seq = $10 WHERE id = $11",
        );
        for set in tenant.limits.bounds() {
            update = update.bind(set.map(|bound| bound.number()));
        }
        let update = update.bind(tenant.limits.weight.map(i64::from)).bind(change).bind(tenant.id.0);
        update.execute(&mut *self.connection).await?;
        Ok(tenant)
    }

    async fn delete_tenant(&mut self, name: &str) -> Result<TenantId> {
        // Not more than its number: a damaged one must be deletable too.
        let row = sqlx::query("SELECT id FROM tenants WHERE name = $1 AND deleted = 0")
            .bind(name)
            .fetch_optional(&mut *self.connection)
            .await?;
        let id = TenantId(row.ok_or(StoreError::TenantNotFound)?.try_get(0)?);
        if id == BUILT_IN_TENANT {
            return Err(StoreError::BuiltInTenant);
        }
        let rows = sqlx::query(
            "SELECT a.name, g.generation FROM adapters a LEFT JOIN generations g ON g.adapter = a.id \
             WHERE a.tenant = $1 AND a.deleted = 0 ORDER BY a.name",
        )
        .bind(id.0)
        .fetch_all(&mut *self.connection)
        .await?;
        // A damaged adapter was never served, so nothing of it is cached; its name is gone all the same.
        let pairs = rows.iter().map(|row| Ok((row.try_get::<String, _>(0)?, decode::generation(row, 1).ok())));
        let pairs = pairs.collect::<Result<Vec<_>>>()?;
        sqlx::query("DELETE FROM generations WHERE adapter IN (SELECT id FROM adapters WHERE tenant = $1)")
            .bind(id.0)
            .execute(&mut *self.connection)
            .await?;
        let (now, change) = (self.now, self.next_seq());
        sqlx::query(
            "UPDATE adapters SET deleted = 1, public = 0, metadata = '{}', updated_at = $1, change_seq = $2 \
             WHERE tenant = $3 AND deleted = 0",
        )
        .bind(now)
        .bind(change)
        .bind(id.0)
        .execute(&mut *self.connection)
        .await?;
        for of_name in pairs.chunk_by(|a, b| a.0 == b.0) {
            let generations = of_name.iter().filter_map(|(_, generation)| *generation).collect();
            self.changed(|| Change::Deleted { tenant: id, name: of_name[0].0.clone(), generations });
        }
        self.erase_training(id).await?;
        self.totals.forget(id);
        for sql in [
            "DELETE FROM idempotency WHERE tenant = $1",
            "DELETE FROM keys WHERE tenant = $1",
            "DELETE FROM tenant_usage WHERE tenant = $1",
        ] {
            sqlx::query(sql).bind(id.0).execute(&mut *self.connection).await?;
        }
        let change = self.next_seq();
        sqlx::query("UPDATE tenants SET deleted = 1, change_seq = $1 WHERE id = $2")
            .bind(change)
            .bind(id.0)
            .execute(&mut *self.connection)
            .await?;
        self.erased = true;
        Ok(id)
    }

    async fn create_key(&mut self, new: NewKey) -> Result<Option<KeyRecord>> {
        if new.only_first
            && sqlx::query("SELECT id FROM keys LIMIT 1").fetch_optional(&mut *self.connection).await?.is_some()
        {
            return Ok(None);
        }
        let tenant = match self.living_tenant(&new.tenant).await? {
            Some(tenant) => tenant,
            None if new.create_tenant => self.create_tenant(new.tenant).await?,
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
        let row = sqlx::query(select_keys!("k.id = $1")).bind(id).fetch_optional(&mut *self.connection).await?;
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

/// What was changed, for the audit log. Names and numbers: nothing in it needs escaping.
fn limits_text(changes: &LimitChanges) -> String {
    let shown = |number: Option<i64>| number.map_or("null".to_owned(), |number| number.to_string());
    let fields: Vec<String> =
        changes.named().into_iter().map(|(name, number)| format!("\"{name}\":{}", shown(number))).collect();
    format!("{{{}}}", fields.join(","))
}

/// Whose key and what it may do, for the audit log.
fn key_text(key: &KeyRecord) -> String {
    format!("{{\"tenant\":\"{}\",\"role\":\"{}\"}}", key.tenant_name, key.role)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Store {
    /// A new tenant with a checked name.
    ///
    /// # Errors
    /// [`StoreError::TenantExists`].
    pub async fn create_tenant(&self, name: &str) -> Result<Tenant> {
        let name = name.to_owned();
        self.audited(
            move |tx| Box::pin(tx.create_tenant(name)),
            |actor, tenant| Some(actor.did("tenant.create", tenant.name.clone())),
        )
        .await
    }

    /// Changes what is set for a tenant; gives it as it is then. What was set and cannot be read any more counts as not set, and is so from now on.
    ///
    /// # Errors
    /// [`StoreError::TenantNotFound`], [`StoreError::Damaged`] when there is more amiss than its limits.
    pub async fn set_limits(&self, name: &str, changes: LimitChanges) -> Result<Tenant> {
        let name = name.to_owned();
        self.audited(
            move |tx| Box::pin(async move { tx.set_limits(&name, &changes).await }),
            move |actor, tenant| Some(actor.did("tenant.limits", tenant.name.clone()).with(limits_text(&changes))),
        )
        .await
    }

    /// Erases a tenant with its keys, adapters, jobs and files; gives its number.
    ///
    /// # Errors
    /// [`StoreError::TenantNotFound`], [`StoreError::BuiltInTenant`].
    pub async fn delete_tenant(&self, name: &str) -> Result<TenantId> {
        let name = name.to_owned();
        let target = name.clone();
        self.audited(
            move |tx| Box::pin(async move { tx.delete_tenant(&name).await }),
            |actor, _| Some(actor.did("tenant.delete", target)),
        )
        .await
    }

    /// The tenant of a name.
    ///
    /// # Errors
    /// [`StoreError::TenantNotFound`], [`StoreError::Damaged`].
    pub async fn tenant(&self, name: &str) -> Result<Tenant> {
        let row = sqlx::query(select_tenants!("t.name = $1")).bind(name).fetch_optional(&self.pool).await?;
        tenant(&row.ok_or(StoreError::TenantNotFound)?)
    }

    /// At most `limit` tenants in the order of their names, those after `after`. Damaged ones are left out; the log named them at the start.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn tenants(&self, after: Option<&str>, limit: u32) -> Result<Vec<Tenant>> {
        let mut tenants: Vec<Tenant> = Vec::new();
        let mut after = after.unwrap_or("").to_owned();
        loop {
            let rows = sqlx::query(select_tenants!("t.name > $1 ORDER BY t.name LIMIT $2"))
                .bind(&*after)
                .bind(i64::from(limit))
                .fetch_all(&self.pool)
                .await?;
            tenants.extend(rows.iter().filter_map(|row| tenant(row).ok()));
            tenants.truncate(limit as usize);
            // A page that damaged rows left short would be taken for the last.
            let more = rows.len() >= limit as usize && tenants.len() < limit as usize;
            match rows.last().and_then(|row| row.try_get(1).ok()) {
                Some(last) if more => after = last,
                _ => return Ok(tenants),
            }
        }
    }

    /// Every row of a tenant or a key that cannot be read: at start. Keys of a damaged tenant are not named one by one.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn damaged_rows(&self) -> Result<Vec<DamagedRow>> {
        let mut damaged = Vec::new();
        let mut tenants: HashSet<i64> = HashSet::new();
        let mut rows = sqlx::query(select_tenants!("1 = 1 ORDER BY t.id")).fetch(&self.pool);
        while let Some(row) = rows.try_next().await? {
            if let Err(StoreError::Damaged(of_tenant)) = tenant(&row) {
                damaged.push(of_tenant);
                tenants.extend(row.try_get::<i64, _>(0));
            }
        }
        drop(rows);
        let mut rows = sqlx::query(select_keys!("1 = 1 ORDER BY k.id")).fetch(&self.pool);
        while let Some(row) = rows.try_next().await? {
            let named = row.try_get::<i64, _>(1).is_ok_and(|tenant| tenants.contains(&tenant));
            if let Err(StoreError::Damaged(of_key)) = key_record(&row)
                && !named
            {
                damaged.push(of_key);
            }
        }
        Ok(damaged)
    }

    /// Makes a key known. None: it was to be the first, and is not.
    ///
    /// # Errors
    /// [`StoreError::TenantNotFound`], [`StoreError::Damaged`].
    pub async fn create_key(&self, new: NewKey) -> Result<Option<KeyRecord>> {
        self.audited(
            move |tx| Box::pin(tx.create_key(new)),
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
        let row = sqlx::query(select_keys!("k.id = $1")).bind(id).fetch_optional(&self.pool).await?;
        key_record(&row.ok_or(StoreError::KeyNotFound)?)
    }

    /// The keys of a tenant, oldest first, revoked ones too; without damaged ones, which the log named at the start.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn keys(&self, tenant: TenantId) -> Result<Vec<KeyRecord>> {
        let rows = sqlx::query(select_keys!("k.tenant = $1 ORDER BY k.created_at, k.id"))
            .bind(tenant.0)
            .fetch_all(&self.pool)
            .await?;
        Ok(rows.iter().filter_map(|row| key_record(row).ok()).collect())
    }
}

impl KeySource for Store {
    fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, std::result::Result<Option<KeyRecord>, KeySourceError>> {
        Box::pin(async move {
            let row = sqlx::query(select_keys!("k.hash = $1")).bind(&hash.0[..]).fetch_optional(&self.pool).await;
            let record = row.map_err(StoreError::from).and_then(|row| row.as_ref().map(key_record).transpose());
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
