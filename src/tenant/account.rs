//! What tenants use and may use while the server runs, in memory: places, buckets, and counts on their way to the store.
//!
//! A request is let in ([`Account::enter`]) before anything of it is read, and reserves its tokens ([`Admission::reserve`]) before the engine hears of it.
//! Both are given back by dropping, so that nothing is lost whatever way a request ends.

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use dashmap::DashMap;
use parking_lot::{Mutex, RwLock};

use super::{
    Limits, Overrides, Usage,
    bucket::{Bucket, Rate},
};
use crate::types::{TenantId, clock::unix_now};

/// Seconds of a day.
pub const DAY: i64 = 24 * 60 * 60;

/// Why a tenant's request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// As many are under way as may be.
    #[error("You have {0} requests under way, as many as you may have at once.")]
    Concurrent(u64),
    /// The requests of this minute are used up.
    #[error("You may make {limit} requests a minute.")]
    Requests {
        /// How many a minute.
        limit: u64,
        /// Until the next one passes.
        wait: Duration,
    },
    /// The tokens of this minute are used up.
    #[error(
        "You may use {limit} tokens a minute, and this request reserves {asked}: its prompt, and 'max_tokens' for each of its choices."
    )]
    Tokens {
        /// How many a minute.
        limit: u64,
        /// How many the request may come to.
        asked: u64,
        /// Until it passes.
        wait: Duration,
    },
    /// No wait makes room for it.
    #[error(
        "This request reserves {asked} tokens (its prompt, and 'max_tokens' for each of its choices), more than the {limit} that you may use in a minute. Ask for fewer."
    )]
    TooManyTokens {
        /// How many a minute.
        limit: u64,
        /// How many the request may come to.
        asked: u64,
    },
    /// The limit is zero.
    #[error("Your tenant may make no requests.")]
    Closed,
}

impl LimitError {
    /// Until the same request may pass; None: it never does.
    pub fn wait(&self) -> Option<Duration> {
        match self {
            Self::Concurrent(_) => Some(Duration::from_secs(1)),
            Self::Requests { wait, .. } | Self::Tokens { wait, .. } => Some(*wait),
            Self::TooManyTokens { .. } | Self::Closed => None,
        }
    }
}

/// What one tenant used on one day (days since 1970, UTC) and the store does not know yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsageOfDay {
    /// Whose.
    pub tenant: TenantId,
    /// When.
    pub day: i64,
    /// What.
    pub usage: Usage,
}

/// What a tenant used since the process started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Total {
    /// The tenant's name.
    pub name: Arc<str>,
    /// What.
    pub usage: Usage,
}

/// The buckets that are in force.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// Of requests.
    pub requests: Option<Rate>,
    /// Of tokens.
    pub tokens: Option<Rate>,
}

#[derive(Debug)]
struct State {
    overrides: Overrides,
    limits: Limits,
    /// Requests under way.
    running: u64,
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    /// Not written yet; one entry but around midnight.
    pending: Vec<(i64, Usage)>,
    /// All since the start of the process.
    total: Usage,
}

impl State {
    /// Takes new limits over: buckets keep what was used.
    fn limit(&mut self, limits: Limits, now: Instant) {
        self.limits = limits;
        for (bucket, limit) in
            [(&mut self.requests, limits.requests_per_minute), (&mut self.tokens, limits.tokens_per_minute)]
        {
            match (bucket.as_mut(), limit) {
                (_, None) => *bucket = None,
                (None, Some(limit)) => *bucket = Some(Bucket::new(limit, now)),
                (Some(old), Some(limit)) if old.limit() != limit => old.resize(limit, now),
                (Some(_), Some(_)) => {}
            }
        }
    }
}

/// Accounts that have something to write.
type Dirty = Mutex<Vec<Arc<Account>>>;

/// One tenant's.
#[derive(Debug)]
pub struct Account {
    tenant: TenantId,
    /// The tenant's name, once somebody came with one.
    name: OnceLock<Arc<str>>,
    state: Mutex<State>,
    /// Weak: an account in that list would hold the list.
    dirty: Weak<Dirty>,
}

impl Account {
    /// A place among the tenant's requests, and one of its requests a minute.
    ///
    /// # Errors
    /// When a limit is reached.
    pub fn enter(self: &Arc<Self>) -> Result<Admission, LimitError> {
        self.enter_at(Instant::now(), today())
    }

    fn enter_at(self: &Arc<Self>, now: Instant, day: i64) -> Result<Admission, LimitError> {
        let mut state = self.state.lock();
        match state.limits.concurrent_requests {
            Some(0) => return Err(LimitError::Closed),
            Some(most) if state.running >= most => return Err(LimitError::Concurrent(most)),
            _ => {}
        }
        if let Some(bucket) = &mut state.requests {
            let limit = bucket.limit();
            match bucket.take(1, now) {
                Err(_) if limit == 0 => return Err(LimitError::Closed),
                Err(wait) => return Err(LimitError::Requests { limit, wait }),
                Ok(()) => {}
            }
        }
        state.running += 1;
        self.note(state, day, Usage { requests: 1, ..Usage::default() });
        Ok(Admission { account: Arc::clone(self) })
    }

    /// What is in force now.
    pub fn limits(&self) -> Limits {
        self.state.lock().limits
    }

    /// What the buckets hold.
    pub fn rates(&self) -> Rates {
        let (now, mut state) = (Instant::now(), self.state.lock());
        Rates {
            requests: state.requests.as_mut().map(|bucket| bucket.rate(now)),
            tokens: state.tokens.as_mut().map(|bucket| bucket.rate(now)),
        }
    }

    /// The name under which the tenant's use is reported.
    pub fn set_name(&self, name: &Arc<str>) {
        self.name.get_or_init(|| Arc::clone(name));
    }

    /// What the tenant used since the process started; None while its name is not known.
    pub fn total(&self) -> Option<Total> {
        let usage = self.state.lock().total;
        Some(Total { name: Arc::clone(self.name.get()?), usage })
    }

    fn note(self: &Arc<Self>, mut state: parking_lot::MutexGuard<'_, State>, day: i64, usage: Usage) {
        state.total.add(&usage);
        self.keep(state, day, usage);
    }

    /// Adds to what is not written yet.
    fn keep(self: &Arc<Self>, mut state: parking_lot::MutexGuard<'_, State>, day: i64, usage: Usage) {
        let clean = state.pending.is_empty();
        match state.pending.last_mut() {
            Some((last, sum)) if *last == day => sum.add(&usage),
            _ => state.pending.push((day, usage)),
        }
        drop(state);
        if clean && let Some(dirty) = self.dirty.upgrade() {
            dirty.lock().push(Arc::clone(self));
        }
    }
}

/// A request that was let in: its place is free when this is dropped.
#[derive(Debug)]
pub struct Admission {
    account: Arc<Account>,
}

impl Admission {
    /// What is in force for its tenant.
    pub fn limits(&self) -> Limits {
        self.account.limits()
    }

    /// Reserves a request's prompt tokens, and the most completion tokens that it may have.
    ///
    /// # Errors
    /// When the tenant's tokens of this minute do not suffice.
    pub fn reserve(self, prompt: u64, completion: u64) -> Result<Charge, LimitError> {
        self.reserve_at(prompt, completion, Instant::now())
    }

    fn reserve_at(self, prompt: u64, completion: u64, now: Instant) -> Result<Charge, LimitError> {
        let asked = prompt.saturating_add(completion);
        let mut reserved = 0;
        if let Some(bucket) = &mut self.account.state.lock().tokens {
            let limit = bucket.limit();
            if asked > limit {
                return Err(LimitError::TooManyTokens { limit, asked });
            }
            bucket.take(asked, now).map_err(|wait| LimitError::Tokens { limit, asked, wait })?;
            reserved = asked;
        }
        Ok(Charge {
            admission: self,
            reserved,
            prompt,
            began: false,
            completion: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut state = self.account.state.lock();
        state.running = state.running.saturating_sub(1);
    }
}

/// Reserved tokens of a request. When it is dropped, what was used is counted and the rest goes back.
#[derive(Debug)]
pub struct Charge {
    admission: Admission,
    /// Taken out of the bucket; 0 when there was none.
    reserved: u64,
    prompt: u64,
    began: bool,
    completion: AtomicU64,
    unknown: AtomicU64,
}

impl Charge {
    /// The engine has the request: from now on its prompt is used.
    pub fn begin(&mut self) {
        self.began = true;
    }

    /// Counts sampled tokens.
    pub fn spend(&self, tokens: u64) {
        self.completion.fetch_add(tokens, Relaxed);
    }

    /// So many more may have been sampled, and nobody will know: they do not go back, so that leaving early is no way to compute for nothing. They are not
    /// counted as usage either.
    pub fn lose(&self, tokens: u64) {
        self.unknown.fetch_add(tokens, Relaxed);
    }

    fn settle_at(&mut self, now: Instant, day: i64) {
        let began = std::mem::take(&mut self.began);
        let prompt = if began { self.prompt } else { 0 };
        let completion = std::mem::take(self.completion.get_mut());
        let unknown = std::mem::take(self.unknown.get_mut());
        let reserved = std::mem::take(&mut self.reserved);
        let used = prompt.saturating_add(completion);
        let account = &self.admission.account;
        let mut state = account.state.lock();
        if let Some(bucket) = &mut state.tokens {
            bucket.give(reserved.saturating_sub(used.saturating_add(unknown)), now);
        }
        if used > 0 {
            let usage = Usage { prompt_tokens: prompt, completion_tokens: completion, ..Usage::default() };
            account.note(state, day, usage);
        }
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.settle_at(Instant::now(), today());
    }
}

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

/// Days since 1970, UTC.
pub fn today() -> i64 {
    unix_now().div_euclid(DAY)
}

/// Until the next day begins (UTC).
pub fn until_tomorrow() -> Duration {
    Duration::from_secs((DAY - unix_now().rem_euclid(DAY)) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::Bound;

    const ANN: TenantId = TenantId(7);

    fn limited(change: impl FnOnce(&mut Limits)) -> Accounts {
        let accounts = Accounts::default();
        accounts.set_defaults(change);
        accounts
    }

    fn minute(at: Instant, seconds: u64) -> Instant {
        at + Duration::from_secs(seconds)
    }

    #[test]
    fn places_are_free_again_when_requests_end() {
        let accounts = limited(|limits| limits.concurrent_requests = Some(2));
        let (one, two) = (accounts.of(ANN).enter().unwrap(), accounts.of(ANN).enter().unwrap());
        assert_eq!(accounts.of(ANN).enter().unwrap_err(), LimitError::Concurrent(2));
        assert!(accounts.of(TenantId(8)).enter().is_ok(), "another tenant has places of its own");
        drop(one);
        let charge = two.reserve(1, 1).unwrap();
        let _again = accounts.of(ANN).enter().unwrap();
        assert!(accounts.of(ANN).enter().is_err(), "a charge keeps the place of its request");
        drop(charge);
        assert!(accounts.of(ANN).enter().is_ok());
    }

    #[test]
    fn requests_a_minute_are_counted_when_they_come_in() {
        let accounts = limited(|limits| limits.requests_per_minute = Some(2));
        let (account, start) = (accounts.of(ANN), Instant::now());
        assert!(account.enter_at(start, 0).is_ok() && account.enter_at(start, 0).is_ok());
        let refused = account.enter_at(start, 0).unwrap_err();
        assert_eq!(refused.wait().map(|wait| wait.as_secs()), Some(30), "{refused:?}");
        assert!(account.enter_at(minute(start, 31), 0).is_ok());
        assert!(account.enter_at(minute(start, 31), 0).is_err());
    }

    #[test]
    fn reserved_tokens_are_settled_at_the_end() {
        let accounts = limited(|limits| limits.tokens_per_minute = Some(100));
        let account = accounts.of(ANN);
        let left = || account.rates().tokens.unwrap().remaining;
        let reserve = |prompt, completion| account.enter().unwrap().reserve(prompt, completion);

        let mut charge = reserve(10, 60).unwrap();
        assert_eq!(left(), 30);
        assert!(matches!(reserve(1, 40), Err(LimitError::Tokens { limit: 100, asked: 41, .. })));
        charge.begin();
        charge.spend(5);
        drop(charge);
        assert_eq!(left(), 85, "prompt and five tokens were used");

        drop(reserve(10, 60).unwrap());
        assert_eq!(left(), 85, "what the engine never had costs nothing");

        let mut left_early = reserve(5, 50).unwrap();
        left_early.begin();
        left_early.spend(3);
        left_early.lose(20);
        drop(left_early);
        assert_eq!(left(), 57, "what nobody knows does not come back");

        for (prompt, completion) in [(1, 100), (u64::MAX, 1), (u64::MAX, u64::MAX)] {
            let refused = reserve(prompt, completion).unwrap_err();
            assert!(matches!(refused, LimitError::TooManyTokens { limit: 100, .. }) && refused.wait().is_none());
        }
        assert_eq!(left(), 57);
    }

    #[test]
    fn usage_is_taken_once_and_can_be_put_back() {
        let accounts = Accounts::default();
        let (account, now) = (accounts.of(ANN), Instant::now());
        assert!(accounts.take_usage().is_empty());
        for day in [20_000, 20_000, 20_001] {
            let mut charge = account.enter_at(now, day).unwrap().reserve(4, 8).unwrap();
            charge.begin();
            charge.spend(6);
            charge.settle_at(now, day);
        }
        let taken = accounts.take_usage();
        let usage = |requests| Usage {
            requests,
            prompt_tokens: 4 * requests,
            completion_tokens: 6 * requests,
            trained_tokens: 0,
        };
        let expected = [(20_000, usage(2)), (20_001, usage(1))];
        assert_eq!(taken, expected.map(|(day, usage)| UsageOfDay { tenant: ANN, day, usage }));
        assert!(accounts.take_usage().is_empty());
        accounts.put_back(taken.clone());
        assert_eq!(accounts.take_usage(), taken);
    }

    #[test]
    fn limits_change_under_running_requests() {
        let accounts = Accounts::default();
        let account = accounts.of(ANN);
        let mut unlimited = account.enter().unwrap().reserve(50, 50).unwrap();
        let set = |requests, tokens| {
            let requests_per_minute = Some(requests);
            let tokens_per_minute = Some(tokens);
            accounts.set_overrides(ANN, Overrides { requests_per_minute, tokens_per_minute, ..Overrides::default() });
        };
        set(Bound::Most(1), Bound::Most(10));
        unlimited.begin();
        drop(unlimited);
        assert_eq!(account.rates().tokens.unwrap().remaining, 10, "what came in before the limit does not count");
        drop(account.enter().unwrap());
        assert!(matches!(account.enter().unwrap_err(), LimitError::Requests { limit: 1, .. }));
        set(Bound::Most(0), Bound::Unlimited);
        assert_eq!(account.enter().unwrap_err(), LimitError::Closed);
        set(Bound::Unlimited, Bound::Unlimited);
        assert!(account.enter().is_ok());
        assert_eq!(account.rates(), Rates::default());
    }
}
