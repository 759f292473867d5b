//! Tenants and their keys, for admins. Whether the caller is one is checked where the request comes in.

use super::{Error, ErrorKind, Service};
use crate::{
    store::{Damaged, NewKey, Rotation, StoreError},
    tenant::{ApiKey, AuditRecord, Caller, KeyRecord, LimitChanges, Limits, Role, Tenant, check_tenant_name},
    types::clock::unix_now,
};

/// The longest life of a key that can be asked for, in seconds: a hundred years.
pub const MAX_LIFE: u64 = 100 * 366 * 24 * 60 * 60;
/// The longest time for which a key that was rotated may go on working, in seconds: a year.
pub const MAX_GRACE: u64 = 366 * 24 * 60 * 60;
/// For how long it does when nothing else is asked for, in seconds: a day.
pub const DEFAULT_GRACE: u64 = 24 * 60 * 60;

/// How long a key lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyLife {
    /// Up to a time, in Unix seconds.
    Until(i64),
    /// For so many seconds from now.
    For(u64),
}

impl KeyLife {
    /// The time of its end.
    fn end(self) -> i64 {
        match self {
            Self::Until(at) => at,
            Self::For(seconds) => unix_now().saturating_add_unsigned(seconds),
        }
    }
}

impl Service {
    /// A new tenant.
    ///
    /// # Errors
    /// 400 for a name that cannot be one, 409 for one that is taken.
    pub async fn create_tenant(&self, caller: &Caller, name: &str) -> Result<Tenant, Error> {
        check_tenant_name(name).map_err(|error| Error::invalid("name", format!("'name': {error}.")))?;
        self.store.by(caller.actor()).create_tenant(name).await.map_err(|error| words(error, name))
    }

    /// At most `limit` tenants by name, those after `after`; and whether there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn tenants(&self, after: Option<&str>, limit: u32) -> Result<(Vec<Tenant>, bool), Error> {
        let mut tenants = self.store.tenants(after, limit + 1).await.map_err(Error::store)?;
        let more = tenants.len() > limit as usize;
        tenants.truncate(limit as usize);
        Ok((tenants, more))
    }

    /// A tenant by its name.
    ///
    /// # Errors
    /// 404; 500 tenant_damaged.
    pub async fn tenant(&self, name: &str) -> Result<Tenant, Error> {
        self.store.tenant(name).await.map_err(|error| words(error, name))
    }

    /// Erases a tenant, its keys, adapters, jobs and files.
    ///
    /// # Errors
    /// 404; 409 for the built-in tenant.
    pub async fn delete_tenant(&self, caller: &Caller, name: &str) -> Result<(), Error> {
        let id = self.store.by(caller.actor()).delete_tenant(name).await.map_err(|error| words(error, name))?;
        self.directory.forget_all();
        self.accounts.forget(id);
        self.popularity.forget(id);
        if let Some(training) = self.training.get() {
            training.interrupt_tenant(id);
        }
        Ok(())
    }

    /// Changes what is set for a tenant, from now on. It mends a tenant whose limits cannot be read.
    ///
    /// # Errors
    /// 404.
    pub async fn set_limits(&self, caller: &Caller, name: &str, changes: LimitChanges) -> Result<Tenant, Error> {
        let store = self.store.by(caller.actor());
        let tenant = store.set_limits(name, changes).await.map_err(|error| words(error, name))?;
        self.accounts.set_overrides(tenant.id, tenant.limits);
        if let Some(training) = self.training.get() {
            training.changed();
        }
        Ok(tenant)
    }

    /// What holds for a tenant.
    pub fn limits_of(&self, tenant: &Tenant) -> Limits {
        self.accounts.defaults().under(&tenant.limits)
    }

    /// At most `limit` entries of the audit log, newest first, of those before the one with number `before`; and whether there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn audit(&self, before: Option<i64>, limit: u32) -> Result<(Vec<AuditRecord>, bool), Error> {
        let mut entries = self.store.audit(before, limit + 1).await.map_err(Error::store)?;
        let more = entries.len() > limit as usize;
        entries.truncate(limit as usize);
        Ok((entries, more))
    }

    /// A new key of a tenant, which is shown this once.
    ///
    /// # Errors
    /// 404 for the tenant.
    pub async fn create_key(
        &self,
        caller: &Caller,
        tenant: &str,
        role: Role,
        life: Option<KeyLife>,
    ) -> Result<(KeyRecord, ApiKey), Error> {
        let key = ApiKey::generate().map_err(Error::internal)?;
        let new = NewKey {
            key: key.clone(),
            tenant: tenant.to_owned(),
            create_tenant: false,
            role,
            expires_at: life.map(KeyLife::end),
            only_first: false,
        };
        let store = self.store.by(caller.actor());
        let record = store.create_key(new).await.map_err(|error| words(error, tenant))?;
        let record = record.ok_or_else(|| Error::internal("a key that need not be the first was not made"))?;
        Ok((record, key))
    }

    /// A tenant's keys, revoked ones too.
    ///
    /// # Errors
    /// 404 for the tenant.
    pub async fn keys(&self, tenant: &str) -> Result<Vec<KeyRecord>, Error> {
        let tenant = self.tenant(tenant).await?;
        self.store.keys(tenant.id).await.map_err(Error::store)
    }

    /// A key by its public identifier.
    ///
    /// # Errors
    /// 404; 500 key_damaged.
    pub async fn key(&self, id: &str) -> Result<KeyRecord, Error> {
        self.store.key(id).await.map_err(|error| words(error, id))
    }

    /// Makes a key to take another's place, which is shown this once; the old one works for `grace` seconds more. Without a life of its own the new one lives as
    /// long as the old one was made to.
    ///
    /// # Errors
    /// 404; 409 when the old one does not work any more.
    pub async fn rotate_key(
        &self,
        caller: &Caller,
        id: &str,
        grace: u64,
        life: Option<KeyLife>,
    ) -> Result<(KeyRecord, ApiKey), Error> {
        let key = ApiKey::generate().map_err(Error::internal)?;
        let new = Rotation {
            key: key.clone(),
            grace: i64::try_from(grace.min(MAX_GRACE)).unwrap_or(i64::MAX),
            expires_at: life.map(KeyLife::end),
        };
        let (made, _) = self.store.by(caller.actor()).rotate_key(id, new).await.map_err(|error| words(error, id))?;
        self.directory.forget_all();
        Ok((made, key))
    }

    /// Ends a key at once.
    ///
    /// # Errors
    /// 404.
    pub async fn revoke_key(&self, caller: &Caller, id: &str) -> Result<(), Error> {
        self.store.by(caller.actor()).revoke_key(id).await.map_err(|error| words(error, id))?;
        self.directory.forget_all();
        Ok(())
    }
}

fn words(error: StoreError, name: &str) -> Error {
    match error {
        StoreError::TenantNotFound => {
            Error::new(ErrorKind::NotFound, format!("There is no tenant named '{name}'.")).with_code("tenant_not_found")
        }
        StoreError::KeyNotFound => {
            Error::new(ErrorKind::NotFound, format!("There is no key '{name}'.")).with_code("key_not_found")
        }
        StoreError::KeyNotLive => {
            Error::new(ErrorKind::Conflict, format!("The key '{name}' is revoked or has expired."))
                .with_code("key_not_live")
        }
        StoreError::TenantExists => Error::new(ErrorKind::Conflict, format!("There is a tenant named '{name}'."))
            .with_code("name_taken")
            .with_param("name"),
        StoreError::BuiltInTenant => {
            Error::new(ErrorKind::Conflict, format!("'{name}' is the built-in tenant and cannot be deleted."))
        }
        StoreError::Damaged(row) => {
            let (what, code, remedy) = match row.kind {
                Damaged::Tenant => ("tenant", "tenant_damaged", "Set its limits anew, or delete it."),
                Damaged::Key => ("key", "key_damaged", "Revoke it, and make another."),
            };
            tracing::error!(%row, "what an admin asked for cannot be read");
            let message =
                format!("The {what} '{}' is damaged in the server's store and does not work. {remedy}", row.name);
            Error::new(ErrorKind::Internal, message).with_code(code)
        }
        other => Error::store(other),
    }
}
