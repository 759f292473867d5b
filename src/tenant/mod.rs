//! Who calls: tenants, their keys, and the directory that turns a bearer token into a caller.
//!
//! Keys are 256 random bits, shown once and stored as a hash. The [`Directory`] remembers a verified key for less than a
//! second, so that keys created or revoked by another process on the same store are honoured within that time. A key's record brings its tenant's limits along:
//! [`Accounts`] holds tenants to them, in memory.

mod account;
mod attempts;
mod audit;
mod bucket;
mod directory;
mod key;
mod limits;
mod names;
mod places;

pub use account::{
    Account, Accounts, Admission, Charge, DAY, LimitError, Rates, Total, UsageOfDay, today, until_tomorrow,
};
pub use attempts::network;
pub use audit::{Actor, AuditRecord, Deed, Origin, Via};
pub use bucket::Rate;
pub use directory::{AuthError, Directory, KeySource, KeySourceError};
pub use key::{ApiKey, KeyHash};
pub use limits::{Bound, BoundError, LimitChanges, Limits, MAX_BOUND, MAX_WEIGHT, Overrides, Room, Usage};
pub use names::{NameError, check_adapter_name, check_tenant_name};
pub use places::Places;

use std::{fmt, str::FromStr, sync::Arc};

use crate::types::TenantId;

/// The tenant that every store has: the one of `--no-auth` and of the first admin key.
pub const BUILT_IN_TENANT: TenantId = TenantId(1);

/// The name of [`BUILT_IN_TENANT`].
pub const BUILT_IN_TENANT_NAME: &str = "default";

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Everything a tenant does with its own adapters, files and jobs.
    Member,
    /// That, and tenants, keys and public adapters.
    Admin,
}

impl Role {
    /// The word of the API and of the store: member or admin.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Member => "member",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A role is spelt `member` or `admin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a role is 'member' or 'admin'")]
pub struct ParseRoleError;

impl FromStr for Role {
    type Err = ParseRoleError;
    fn from_str(text: &str) -> Result<Self, ParseRoleError> {
        match text {
            "member" => Ok(Role::Member),
            "admin" => Ok(Role::Admin),
            _ => Err(ParseRoleError),
        }
    }
}

/// An owner of keys, adapters, files and jobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its number in the store.
    pub id: TenantId,
    /// Its name, unique among the living.
    pub name: String,
    /// Unix seconds.
    pub created_at: i64,
    /// What an admin set for it.
    pub limits: Overrides,
}

/// What is known about a key, which is everything but the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// A public identifier, `key_` and 16 hexadecimal digits.
    pub id: String,
    /// The owner.
    pub tenant: TenantId,
    /// The owner's name.
    pub tenant_name: String,
    /// The hash of the key.
    pub hash: KeyHash,
    /// The first characters of the key, to recognise it by.
    pub prefix: String,
    /// What it may do.
    pub role: Role,
    /// Unix seconds.
    pub created_at: i64,
    /// Unix seconds from which it no longer works.
    pub expires_at: Option<i64>,
    /// Unix seconds at which it was revoked.
    pub revoked_at: Option<i64>,
    /// Unix seconds of its last use, to the minute or so.
    pub last_used_at: Option<i64>,
    /// What an admin set for the owner.
    pub limits: Overrides,
}

impl KeyRecord {
    /// Does the key work at a time (unix seconds)?
    pub fn is_live(&self, now: i64) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|at| now < at)
    }
}

/// Who makes a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The tenant.
    pub tenant: TenantId,
    /// The tenant's name.
    pub tenant_name: Arc<str>,
    /// What it may do.
    pub role: Role,
    /// The key's public identifier; None under `--no-auth`.
    pub key: Option<Arc<str>>,
    /// Where the request comes from.
    pub origin: Origin,
}

impl Caller {
    /// The caller of every request under `--no-auth`: the built-in tenant, allowed everything.
    pub fn built_in() -> Self {
        Self {
            tenant: BUILT_IN_TENANT,
            tenant_name: BUILT_IN_TENANT_NAME.into(),
            role: Role::Admin,
            key: None,
            origin: Origin::default(),
        }
    }

    /// May it manage tenants, keys and public adapters?
    pub fn is_admin(&self) -> bool {
        self.role == Role::Admin
    }
}
