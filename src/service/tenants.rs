//! Tenants and their keys, for admins. Whether the caller is one is checked where the request comes in.

use super::{Error, ErrorKind, Service};
use crate::{
    store::{NewKey, StoreError},
    tenant::{ApiKey, KeyRecord, Role, Tenant, check_tenant_name},
};

impl Service {
    /// A new tenant.
    ///
    /// # Errors
    /// 400 for a name that cannot be one, 409 for one that is taken.
    pub async fn create_tenant(&self, name: &str) -> Result<Tenant, Error> {
        check_tenant_name(name).map_err(|error| Error::invalid("name", format!("'name': {error}.")))?;
        self.store.create_tenant(name).await.map_err(|error| words(error, name))
    }

    /// At most `limit` tenants by name, those after `after`; and whether there are more.
    ///
    /// # Errors
    /// Only the database's.
    pub async fn tenants(&self, after: Option<&str>, limit: u32) -> Result<(Vec<Tenant>, bool), Error> {
        let mut tenants = self.store.tenants(after, limit + 1).await.map_err(Error::internal)?;
        let more = tenants.len() > limit as usize;
        tenants.truncate(limit as usize);
        Ok((tenants, more))
    }

    /// A tenant by its name.
    ///
    /// # Errors
    /// 404.
    pub async fn tenant(&self, name: &str) -> Result<Tenant, Error> {
        self.store.tenant(name).await.map_err(|error| words(error, name))
    }

    /// Erases a tenant, its keys, adapters, jobs and files.
    ///
    /// # Errors
    /// 404; 409 for the built-in tenant.
    pub async fn delete_tenant(&self, name: &str) -> Result<(), Error> {
        let id = self.store.delete_tenant(name).await.map_err(|error| words(error, name))?;
        self.directory.forget_all();
        if let Some(training) = self.training.get() {
            training.interrupt_tenant(id);
        }
        Ok(())
    }

    /// A new key of a tenant, which is shown this once.
    ///
    /// # Errors
    /// 404 for the tenant.
    pub async fn create_key(
        &self,
        tenant: &str,
        role: Role,
        expires_at: Option<i64>,
    ) -> Result<(KeyRecord, ApiKey), Error> {
        let key = ApiKey::generate().map_err(Error::internal)?;
        let new = NewKey {
            key: key.clone(),
            tenant: tenant.to_owned(),
            create_tenant: false,
            role,
            expires_at,
            only_first: false,
        };
        let record = self.store.create_key(new).await.map_err(|error| words(error, tenant))?;
        let record = record.ok_or_else(|| Error::internal("a key that need not be the first was not made"))?;
        Ok((record, key))
    }

    /// A tenant's keys, revoked ones too.
    ///
    /// # Errors
    /// 404 for the tenant.
    pub async fn keys(&self, tenant: &str) -> Result<Vec<KeyRecord>, Error> {
        let tenant = self.tenant(tenant).await?;
        self.store.keys(tenant.id).await.map_err(Error::internal)
    }

    /// A key by its public identifier.
    ///
    /// # Errors
    /// 404.
    pub async fn key(&self, id: &str) -> Result<KeyRecord, Error> {
        self.store.key(id).await.map_err(|error| words(error, id))
    }

    /// Ends a key at once.
    ///
    /// # Errors
    /// 404.
    pub async fn revoke_key(&self, id: &str) -> Result<(), Error> {
        self.store.revoke_key(id).await.map_err(|error| words(error, id))?;
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
        StoreError::TenantExists => Error::new(ErrorKind::Conflict, format!("There is a tenant named '{name}'."))
            .with_code("name_taken")
            .with_param("name"),
        StoreError::BuiltInTenant => {
            Error::new(ErrorKind::Conflict, format!("'{name}' is the built-in tenant and cannot be deleted."))
        }
        other => Error::store(other),
    }
}
