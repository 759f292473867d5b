//! Tenants and what is set for them.

use sqlx::{Row as _, any::AnyRow};

use super::{Change, Damaged, DamagedRow, Result, Store, StoreError, ask, decode, decode::bound, writer::Tx};
use crate::{
    tenant::{Actor, BUILT_IN_TENANT, Deed, LimitChanges, Overrides, Tenant},
    types::TenantId,
};

/// What was set for a tenant, as [`overrides`] reads it.
macro_rules! limit_columns {
    () => {
        "t.max_adapters, t.max_stored_bytes, t.max_concurrent_requests, t.max_requests_per_minute, \
         t.max_tokens_per_minute, t.max_running_jobs, t.max_queued_jobs, t.max_trained_tokens_per_day, t.weight"
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
pub(super) use {limit_columns, select_tenants};

/// The columns of `limit_columns`, from a position on.
pub(super) fn overrides(row: &AnyRow, at: usize) -> Result<Overrides> {
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
pub(super) fn or_damaged<T>(read: Result<T>, kind: Damaged, row: &AnyRow, name: usize) -> Result<T> {
    read.map_err(|error| {
        let (name, cause) = (ask::name(row, name), error.to_string());
        StoreError::Damaged(DamagedRow { kind, name, cause })
    })
}

pub(super) fn tenant(row: &AnyRow) -> Result<Tenant> {
    or_damaged(overrides(row, 3).and_then(|limits| read_tenant(row, limits)), Damaged::Tenant, row, 1)
}

fn read_tenant(row: &AnyRow, limits: Overrides) -> Result<Tenant> {
    let name = ask::text(row, 1)?.to_owned();
    Ok(Tenant { id: TenantId(row.try_get(0)?), name, created_at: row.try_get(2)?, limits })
}

impl Tx<'_> {
    async fn tenant_row(&mut self, name: &str) -> Result<Option<AnyRow>> {
        self.row(sqlx::query(select_tenants!("t.name = $1")).bind(name)).await
    }

    pub(super) async fn living_tenant(&mut self, name: &str) -> Result<Option<Tenant>> {
        self.tenant_row(name).await?.as_ref().map(tenant).transpose()
    }

    pub(super) async fn create_tenant(&mut self, name: String) -> Result<Tenant> {
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
        let row = self.tenant_row(name).await?.ok_or(StoreError::TenantNotFound)?;
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
        let query = sqlx::query(
            "SELECT a.name, g.generation FROM adapters a LEFT JOIN generations g ON g.adapter = a.id \
             WHERE a.tenant = $1 AND a.deleted = 0 ORDER BY a.name",
        );
        let rows = self.rows(query.bind(id.0)).await?;
        // A damaged adapter was never served, so nothing of it is cached; its name is gone all the same.
        let pairs: Vec<_> = rows.iter().map(|row| (ask::name(row, 0), decode::generation(row, 1).ok())).collect();
        for sql in [
            "DELETE FROM generations WHERE adapter IN (SELECT id FROM adapters WHERE tenant = $1)",
            "DELETE FROM adapters WHERE tenant = $1",
        ] {
            sqlx::query(sql).bind(id.0).execute(&mut *self.connection).await?;
        }
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
            "DELETE FROM tenants WHERE id = $1",
        ] {
            sqlx::query(sql).bind(id.0).execute(&mut *self.connection).await?;
        }
        self.erased = true;
        Ok(id)
    }
}

/// A new tenant, for the audit log.
pub(super) fn tenant_created(actor: &Actor, tenant: &Tenant) -> Deed {
    actor.did("tenant.create", tenant.name.clone())
}

/// What was changed, for the audit log. Names and numbers: nothing in it needs escaping.
fn limits_text(changes: &LimitChanges) -> String {
    let shown = |number: Option<i64>| number.map_or("null".to_owned(), |number| number.to_string());
    let fields: Vec<String> =
        changes.named().into_iter().map(|(name, number)| format!("\"{name}\":{}", shown(number))).collect();
    format!("{{{}}}", fields.join(","))
}

impl Store {
    /// A new tenant with a checked name.
    ///
    /// # Errors
    /// [`StoreError::TenantExists`].
    pub async fn create_tenant(&self, name: &str) -> Result<Tenant> {
        let name = name.to_owned();
        self.audited(move |tx| Box::pin(tx.create_tenant(name)), |actor, tenant| Some(tenant_created(actor, tenant)))
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
        let row = self.row(sqlx::query(select_tenants!("t.name = $1")).bind(name)).await?;
        tenant(&row.ok_or(StoreError::TenantNotFound)?)
    }

    /// At most `limit` tenants in the order of their names, those after `after`. Damaged ones are left out.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn tenants(&self, after: Option<&str>, limit: u32) -> Result<Vec<Tenant>> {
        let query = |limit| {
            sqlx::query(select_tenants!("t.name > $1 ORDER BY t.name LIMIT $2")).bind(after.unwrap_or("")).bind(limit)
        };
        self.page(limit, query, tenant, |row| format!("tenant {}", ask::name(row, 1))).await
    }
}
