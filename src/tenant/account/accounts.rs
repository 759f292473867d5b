//! The accounts of all tenants, and their way to the store.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use dashmap::DashMap;
use parking_lot::{Mutex, RwLock};

use super::{Account, Dirty, State, Total, UsageOfDay};
use crate::{
    tenant::{Limits, Overrides, Usage},
    types::TenantId,
};

/// Everybody's.
#[derive(Debug, Default)]
pub struct Accounts {
    defaults: RwLock<Limits>,
    accounts: DashMap<TenantId, Arc<Account>>,
    dirty: Arc<Dirty>,
}

impl Accounts {
    /// Changes the limits of tenants for whom nothing else was set.
    pub fn set_defaults(&self, change: impl FnOnce(&mut Limits)) {
        let mut defaults = self.defaults.write();
        change(&mut defaults);
        let now = Instant::now();
        for account in &self.accounts {
            let mut state = account.state.lock();
            let limits = defaults.under(&state.overrides);
            state.limit(limits, now);
        }
    }

    /// The limits of tenants for whom nothing else was set.
    pub fn defaults(&self) -> Limits {
        *self.defaults.read()
    }

    /// A tenant's account.
    pub fn of(&self, tenant: TenantId) -> Arc<Account> {
        if let Some(account) = self.accounts.get(&tenant) {
            return Arc::clone(&account);
        }
        let new = || {
            let state = State {
                overrides: Overrides::default(),
                limits: Limits::default(),
                running: 0,
                requests: None,
                tokens: None,
                pending: Vec::new(),
                total: Usage::default(),
            };
            let (name, state) = (OnceLock::new(), Mutex::new(state));
            Arc::new(Account { tenant, name, state, dirty: Arc::downgrade(&self.dirty) })
        };
        let defaults = self.defaults();
        let account = Arc::clone(&self.accounts.entry(tenant).or_insert_with(new));
        let mut state = account.state.lock();
        let limits = defaults.under(&state.overrides);
        state.limit(limits, Instant::now());
        drop(state);
        account
    }

    /// Takes over what the store says was set for a tenant.
    pub fn set_overrides(&self, tenant: TenantId, overrides: Overrides) {
        let (account, defaults) = (self.of(tenant), self.defaults());
        let mut state = account.state.lock();
        if state.overrides != overrides {
            state.overrides = overrides;
            state.limit(defaults.under(&overrides), Instant::now());
        }
    }

    /// Forgets a tenant that is gone.
    pub fn forget(&self, tenant: TenantId) {
        self.accounts.remove(&tenant);
    }

    /// What was used since the last call, for the store.
    pub fn take_usage(&self) -> Vec<UsageOfDay> {
        let dirty = std::mem::take(&mut *self.dirty.lock());
        let taken = |account: Arc<Account>| {
            let tenant = account.tenant;
            let pending = std::mem::take(&mut account.state.lock().pending);
            pending.into_iter().map(move |(day, usage)| UsageOfDay { tenant, day, usage })
        };
        dirty.into_iter().flat_map(taken).collect()
    }

    /// What could not be written is kept for the next time.
    pub fn put_back(&self, usage: Vec<UsageOfDay>) {
        for UsageOfDay { tenant, day, usage } in usage {
            let account = self.of(tenant);
            let state = account.state.lock();
            account.keep(state, day, usage);
        }
    }

    /// What every tenant used since the process started.
    pub fn totals(&self) -> Vec<Total> {
        self.accounts.iter().filter_map(|account| account.total()).collect()
    }
}
