//! What tenants use and may use while the server runs, in memory: places, buckets, and counts on their way to the store.
//!
//! A request is let in ([`Account::enter`]) before anything of it is read, and reserves its tokens ([`Admission::reserve`]) before the engine hears of it.
//! Both are given back by dropping, so that nothing is lost whatever way a request ends.

mod accounts;
mod error;
#[cfg(test)]
mod tests;

pub use accounts::Accounts;
pub use error::LimitError;

use std::{
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::{
    Limits, Overrides, Usage,
    bucket::{Bucket, Rate},
};
use crate::types::{TenantId, clock::unix_now};

/// Seconds of a day.
pub const DAY: i64 = 24 * 60 * 60;

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

    /// What the tenant used on which day and the store does not know yet.
    pub fn pending(&self) -> Vec<(i64, Usage)> {
        self.state.lock().pending.clone()
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

/// Days since 1970, UTC.
pub fn today() -> i64 {
    unix_now().div_euclid(DAY)
}

/// Until the next day begins (UTC).
pub fn until_tomorrow() -> Duration {
    Duration::from_secs((DAY - unix_now().rem_euclid(DAY)) as u64)
}
