//! The database of a data directory, for the server and for the commands that work without one.

use std::{fmt::Write, time::Instant};

use super::AppError;
use crate::{
    config::{IntegrityCheck, StateArgs, SyncMode},
    store::{Check, Location, NewKey, Store, StoreConfig, Sync},
    tenant::{Actor, ApiKey, Role, Via},
    types::TenantId,
};

/// The tenant of the first admin key and of `--no-auth`.
const DEFAULT_TENANT: &str = "default";
/// Rows a page when a command lists everything.
const PAGE: u32 = 1000;

/// Opens the store that the flags name.
///
/// # Errors
/// The place cannot be used, or a newer program wrote it.
pub async fn open_store(state: &StateArgs) -> Result<Store, AppError> {
    let location = match state.url().map_err(|words| AppError::Flag(format!("--database-url-file {words}")))? {
        Some(url) => Location::Postgres(url.expose().to_owned()),
        None => Location::Directory(state.data_dir.clone()),
    };
    let sync = match state.sync {
        SyncMode::Normal => Sync::Process,
        SyncMode::Full => Sync::Full,
    };
    let most_bytes = state.max_database_mb.map(|mebibytes| mebibytes << 20);
    Ok(Store::open(StoreConfig { sync, most_bytes, ..StoreConfig::new(location) }).await?)
}

/// Refuses a damaged database: every write would damage it more. A row that no program of ours wrote is another matter, and found when it is read.
pub(super) async fn check_integrity(store: &Store, check: IntegrityCheck) -> Result<(), AppError> {
    let check = match check {
        IntegrityCheck::Off => return Ok(()),
        IntegrityCheck::Quick => Check::Quick,
        IntegrityCheck::Full => Check::Full,
    };
    let began = Instant::now();
    let found = store.check(check).await?;
    tracing::info!(seconds = began.elapsed().as_secs_f32(), findings = found.len(), "database checked");
    let Some(first) = found.first() else { return Ok(()) };
    found.iter().for_each(|line| tracing::error!(finding = line, "the database is damaged"));
    Err(AppError::Flag(format!(
        "the database is damaged ({first}): restore a backup with `mote restore --force`, or start with --integrity-check off to save what can be read"
    )))
}

/// The admin key that an operator chose.
pub(super) fn chosen_key(text: &str) -> Result<ApiKey, AppError> {
    let words = "MOTE_ADMIN_KEY: this cannot be a key: use 8 to 256 printable characters without spaces (24 or more to be safe)";
    ApiKey::chosen(text).ok_or_else(|| AppError::Flag(words.into()))
}

/// On an empty store: takes the given admin key, or makes one and prints it, once, to stderr.
pub(super) async fn first_admin_key(store: &Store, chosen: Option<&str>) -> Result<(), AppError> {
    let key = match chosen {
        Some(text) => chosen_key(text)?,
        None => ApiKey::generate()?,
    };
    let secret = key.secret().to_owned();
    let new = NewKey {
        key,
        tenant: DEFAULT_TENANT.into(),
        create_tenant: true,
        role: Role::Admin,
        expires_at: None,
        only_first: true,
    };
    if store.by(Actor::operator(Via::Start)).create_key(new).await?.is_some() && chosen.is_none() {
        // Not through the log: logs are kept and shipped.
        eprintln!("admin key (shown once): {secret}");
    }
    Ok(())
}

/// `mote adapters list`: a table, by name.
///
/// # Errors
/// The store cannot be used, or has no such tenant.
pub async fn list_adapters(state: &StateArgs, tenant: &str, prefix: &str) -> Result<String, AppError> {
    let store = open_store(state).await?;
    let tenant = store.tenant(tenant).await?.id;
    let mut table = format!("{:<32}  {:<32}  {:<5}  {:>5}  scheme", "name", "generation", "dtype", "bytes");
    let mut after: Option<String> = None;
    loop {
        let page = store.list_adapters(tenant, prefix, after.as_deref(), PAGE).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.name.clone());
        for adapter in &page {
            let contents = &adapter.contents;
            let _ = write!(
                table,
                "\n{:<32}  {:<32}  {:<5}  {:>5}  {}",
                adapter.name,
                contents.generation.to_string(),
                contents.facts.dtype,
                contents.data.len(),
                contents.facts.scheme
            );
        }
    }
    store.close().await;
    Ok(table)
}

/// `mote adapters export`: the raw bytes.
///
/// # Errors
/// The store cannot be used, or has no such adapter.
pub async fn export_adapter(state: &StateArgs, tenant: &str, name: &str) -> Result<Vec<u8>, AppError> {
    let store = open_store(state).await?;
    let tenant: TenantId = store.tenant(tenant).await?.id;
    let adapter = store.own_adapter(tenant, name).await?;
    store.close().await;
    adapter.map(|adapter| adapter.contents.data).ok_or_else(|| AppError::Flag(format!("there is no adapter '{name}'")))
}
