//! `mote tenants` and `mote keys`: tenants and keys of a data directory, also while a server runs on it.

use std::fmt::Write;

use super::{AppError, state::open_store};
use crate::{
    config::{LimitChoice, RoleArg, SetLimits, StateArgs},
    store::{NewKey, Rotation, Store},
    tenant::{Actor, ApiKey, Bound, KeyRecord, LimitChanges, Overrides, Role, Tenant, Via, check_tenant_name},
    types::clock::unix_now,
};

/// Rows a page when a command lists everything.
const PAGE: u32 = 1000;

/// The store, for the operator who types the command.
async fn open(state: &StateArgs) -> Result<Store, AppError> {
    Ok(open_store(state).await?.by(Actor::operator(Via::CommandLine)))
}

fn ends(expires_in: Option<u64>) -> Option<i64> {
    expires_in.map(|seconds| unix_now().saturating_add_unsigned(seconds))
}

fn checked(name: &str) -> Result<(), AppError> {
    check_tenant_name(name).map_err(|error| AppError::Flag(format!("'{name}': {error}")))
}

/// `mote keys create`: the new key.
///
/// # Errors
/// The store cannot be used, or the tenant's name is not one.
pub async fn create_key(
    state: &StateArgs,
    tenant: &str,
    role: RoleArg,
    expires_in: Option<u64>,
) -> Result<String, AppError> {
    checked(tenant)?;
    let store = open(state).await?;
    let key = ApiKey::generate()?;
    let secret = key.secret().to_owned();
    let role = match role {
        RoleArg::Member => Role::Member,
        RoleArg::Admin => Role::Admin,
    };
    let expires_at = ends(expires_in);
    store
        .create_key(NewKey { key, tenant: tenant.into(), create_tenant: true, role, expires_at, only_first: false })
        .await?;
    store.close().await;
    Ok(secret)
}

/// `mote keys rotate`: the key in the other's place.
///
/// # Errors
/// The store cannot be used, or has no such key, or it does not work any more.
pub async fn rotate_key(state: &StateArgs, id: &str, grace: u64, expires_in: Option<u64>) -> Result<String, AppError> {
    let store = open(state).await?;
    let key = ApiKey::generate()?;
    let secret = key.secret().to_owned();
    let grace = i64::try_from(grace).unwrap_or(i64::MAX);
    store.rotate_key(id, Rotation { key, grace, expires_at: ends(expires_in) }).await?;
    store.close().await;
    Ok(secret)
}

/// `mote keys list`: a table, newest last. Times are Unix seconds.
///
/// # Errors
/// The store cannot be used, or has no such tenant.
pub async fn list_keys(state: &StateArgs, tenant: Option<&str>) -> Result<String, AppError> {
    let store = open(state).await?;
    let tenants = match tenant {
        Some(name) => vec![store.tenant(name).await?],
        None => all_tenants(&store).await?,
    };
    let mut table = format!(
        "{:<36}  {:<20}  {:<6}  {:<16}  {:<7}  {:>11}  {:>11}",
        "id", "tenant", "role", "key begins", "state", "expires at", "last used"
    );
    let time = |at: Option<i64>| at.map_or("-".to_owned(), |at| at.to_string());
    for tenant in tenants {
        for key in store.keys(tenant.id).await? {
            let (role, state) = (key.role.as_str(), state_of(&key));
            let _ = write!(
                table,
                "\n{:<36}  {:<20}  {role:<6}  {:<16}  {state:<7}  {:>11}  {:>11}",
                key.id,
                tenant.name,
                key.prefix,
                time(key.expires_at),
                time(key.last_used_at)
            );
        }
    }
    store.close().await;
    Ok(table)
}

fn state_of(key: &KeyRecord) -> &'static str {
    match key.revoked_at {
        Some(_) => "revoked",
        None if key.is_live(unix_now()) => "live",
        None => "expired",
    }
}

/// `mote keys revoke`
///
/// # Errors
/// The store cannot be used, or has no such key.
pub async fn revoke_key(state: &StateArgs, id: &str) -> Result<(), AppError> {
    let store = open(state).await?;
    store.revoke_key(id).await?;
    store.close().await;
    Ok(())
}

async fn all_tenants(store: &Store) -> Result<Vec<Tenant>, AppError> {
    let mut all: Vec<Tenant> = Vec::new();
    loop {
        let after = all.last().map(|tenant| tenant.name.clone());
        let page = store.tenants(after.as_deref(), PAGE).await?;
        if page.is_empty() {
            return Ok(all);
        }
        all.extend(page);
    }
}

/// `mote tenants list`: a table, by name.
///
/// # Errors
/// The store cannot be used.
pub async fn list_tenants(state: &StateArgs) -> Result<String, AppError> {
    let store = open(state).await?;
    let mut table = format!("{:<32}  {:>11}  limits that were set", "tenant", "created at");
    for tenant in all_tenants(&store).await? {
        let _ = write!(table, "\n{:<32}  {:>11}  {}", tenant.name, tenant.created_at, shown(&tenant.limits).join(" "));
    }
    store.close().await;
    Ok(table)
}

/// `mote tenants create`
///
/// # Errors
/// The store cannot be used, there is a tenant of that name, or it cannot be one.
pub async fn create_tenant(state: &StateArgs, name: &str) -> Result<(), AppError> {
    checked(name)?;
    let store = open(state).await?;
    store.create_tenant(name).await?;
    store.close().await;
    Ok(())
}

/// `mote tenants limits`: sets those that are given, and shows all that were set for the tenant, one a line.
///
/// # Errors
/// The store cannot be used, or has no such tenant.
pub async fn set_limits(state: &StateArgs, name: &str, limits: &SetLimits) -> Result<String, AppError> {
    let store = open(state).await?;
    let changes = changes(limits);
    let tenant = match changes == LimitChanges::default() {
        true => store.tenant(name).await?,
        false => store.set_limits(name, changes).await?,
    };
    store.close().await;
    let set = shown(&tenant.limits);
    Ok(if set.is_empty() { "nothing is set: the server's defaults hold".to_owned() } else { set.join("\n") })
}

/// `name=number` of each limit that was set.
fn shown(limits: &Overrides) -> Vec<String> {
    let bounds = Overrides::NAMES.iter().zip(limits.bounds());
    let mut set: Vec<String> = bounds
        .filter_map(|(name, bound)| {
            Some(match bound? {
                Bound::Unlimited => format!("{name}=unlimited"),
                Bound::Most(most) => format!("{name}={most}"),
            })
        })
        .collect();
    set.extend(limits.weight.map(|weight| format!("weight={weight}")));
    set
}

fn changes(limits: &SetLimits) -> LimitChanges {
    let bound = |choice: Option<LimitChoice>| {
        choice.map(|choice| match choice {
            LimitChoice::Default => None,
            LimitChoice::Unlimited => Some(Bound::Unlimited),
            LimitChoice::Most(most) => Some(Bound::Most(most)),
        })
    };
    let weight = limits.weight.map(|choice| match choice {
        LimitChoice::Most(weight) => u32::try_from(weight).ok(),
        LimitChoice::Default | LimitChoice::Unlimited => None,
    });
    LimitChanges {
        adapters: bound(limits.adapters),
        stored_bytes: bound(limits.stored_bytes),
        concurrent_requests: bound(limits.concurrent_requests),
        requests_per_minute: bound(limits.requests_per_minute),
        tokens_per_minute: bound(limits.tokens_per_minute),
        running_jobs: bound(limits.running_jobs),
        queued_jobs: bound(limits.queued_jobs),
        trained_tokens_per_day: bound(limits.trained_tokens_per_day),
        weight,
    }
}
