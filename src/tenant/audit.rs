//! Who did what: what the audit log keeps. Names and numbers, never a key, a prompt or what is in a file.

use std::{net::IpAddr, sync::Arc};

use super::Caller;

/// By which way somebody acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// A request.
    Http,
    /// `mote keys` or `mote tenants` on the data directory.
    CommandLine,
    /// The server itself, when it starts.
    Start,
    /// A training job, for the tenant that made it.
    Training,
}

impl Via {
    /// The word of the API and of the store.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::CommandLine => "command_line",
            Self::Start => "start",
            Self::Training => "training",
        }
    }
}

/// Where a request comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// The address of the peer; None when there is no socket.
    pub peer: Option<IpAddr>,
    /// The request's id.
    pub request: Option<Arc<str>>,
}

/// Who acts, and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor {
    /// By which way.
    pub via: Via,
    /// The tenant's name; None for an operator on the machine.
    pub tenant: Option<Arc<str>>,
    /// The key's public identifier.
    pub key: Option<Arc<str>>,
    /// May it change public adapters?
    pub admin: bool,
    /// Where the request came from.
    pub origin: Origin,
}

impl Actor {
    /// Somebody on the machine itself.
    pub fn operator(via: Via) -> Self {
        Self { via, tenant: None, key: None, admin: true, origin: Origin::default() }
    }

    /// A job of a tenant's.
    pub fn job(tenant: Arc<str>) -> Self {
        Self { via: Via::Training, tenant: Some(tenant), key: None, admin: false, origin: Origin::default() }
    }

    /// It did something to something.
    pub fn did(&self, action: &'static str, target: impl Into<String>) -> Deed {
        Deed { actor: self.clone(), action, target: target.into(), detail: None }
    }
}

impl Caller {
    /// Who it is for the audit log.
    pub fn actor(&self) -> Actor {
        Actor {
            via: Via::Http,
            tenant: Some(self.tenant_name.clone()),
            key: self.key.clone(),
            admin: self.is_admin(),
            origin: self.origin.clone(),
        }
    }
}

/// An entry of the audit log that is to be written with the deed itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deed {
    /// Who.
    pub actor: Actor,
    /// What, as `adapter.delete`.
    pub action: &'static str,
    /// To what: a name or an id.
    pub target: String,
    /// More of it, a JSON object.
    pub detail: Option<String>,
}

impl Deed {
    /// The same with more of it.
    pub fn with(mut self, detail: String) -> Self {
        self.detail = Some(detail);
        self
    }
}

/// An entry of the audit log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuditRecord {
    /// Later ones are greater.
    pub id: i64,
    /// Unix seconds.
    pub at: i64,
    /// By which way: `http`, `command_line`, `start` or `training`.
    pub via: String,
    /// Whose key; None for an operator on the machine.
    pub tenant: Option<String>,
    /// The key's public identifier.
    pub key: Option<String>,
    /// What, as `adapter.delete`.
    pub action: String,
    /// To what: a name or an id.
    pub target: String,
    /// More of it, a JSON object.
    pub detail: Option<String>,
    /// The address that it came from.
    pub peer: Option<String>,
    /// The request's id.
    pub request: Option<String>,
}
