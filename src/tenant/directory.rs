//! From a bearer token to a caller, with a short memory of keys that were good.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use dashmap::DashMap;
use futures::future::BoxFuture;

use super::{Accounts, Caller, KeyHash, KeyRecord, Origin, attempts::Attempts};
use crate::types::clock::unix_now;

/// When a verified key is looked up again. Until then, and until twice this while that look-up runs (or was lost with its
/// request), the key is believed: a change in the store is honoured within a second.
const REFRESH: Duration = Duration::from_millis(450);

/// How old a recorded last use may become before it is written anew, in seconds.
const TOUCH_AFTER: i64 = 60;

/// Remembered keys beyond which the memory is cleared of stale ones.
const SWEEP_AT: usize = 10_000;

/// Failed attempts that an address has a minute.
pub(super) const FAILURES: u64 = 60;

/// Where keys are kept: the store, or a map in a test.
pub trait KeySource: Send + Sync {
    /// The key with this hash, live or not.
    fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, Result<Option<KeyRecord>, KeySourceError>>;

    /// Notes that a key was used at a time (unix seconds). May be lost: nothing but a display depends on it.
    fn touch_key(&self, id: String, at: i64);
}

/// A key could not be looked up; the words are for the operator's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeySourceError {
    /// The source did not answer.
    #[error("cannot look up a key: {0}")]
    Unavailable(String),
    /// The key is there, but what is kept of it or of its tenant cannot be read.
    #[error("{0}")]
    Damaged(String),
}

/// Why a request has no caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is no such key, or it is revoked or expired.
    #[error("Incorrect API key provided.")]
    UnknownKey,
    /// Too many attempts from this address failed; so long it has to wait.
    #[error("Too many failed attempts to authenticate from your address.")]
    TooManyFailures(Duration),
    /// The key is there, but what is kept of it or of its tenant cannot be read; the words are for the operator's log.
    #[error(
        "Your API key, or the tenant that it belongs to, is damaged in the server's store and does not work. Ask an admin."
    )]
    Damaged(String),
    /// The key could not be checked; the words are for the operator's log.
    #[error("{0}")]
    Unavailable(String),
}

struct Remembered {
    caller: Caller,
    expires_at: Option<i64>,
    verified: Instant,
    /// Somebody is looking it up again.
    claimed: bool,
}

/// Verifies bearer tokens against a [`KeySource`].
pub struct Directory {
    source: Arc<dyn KeySource>,
    // Only keys that were good when last looked up: a flood of wrong tokens cannot fill it.
    known: DashMap<KeyHash, Remembered>,
    /// Whose limits come with their keys.
    accounts: Arc<Accounts>,
    attempts: Attempts,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("known", &self.known.len()).finish_non_exhaustive()
    }
}

impl Directory {
    /// A directory over a source of keys, which tells `accounts` what limits come with them.
    pub fn new(source: Arc<dyn KeySource>, accounts: Arc<Accounts>) -> Self {
        Self { source, known: DashMap::new(), accounts, attempts: Attempts::new(Some(FAILURES)) }
    }

    /// How many attempts of one address may fail in a minute; None: any number.
    pub fn limit_failures(&self, a_minute: Option<u64>) {
        self.attempts.set_limit(a_minute);
    }

    /// The caller that a bearer token from an address stands for.
    ///
    /// # Errors
    /// [`AuthError::UnknownKey`] for a token that is no live key, [`AuthError::TooManyFailures`] when the address has shown too many such,
    /// [`AuthError::Damaged`] for a key that cannot be read, [`AuthError::Unavailable`] when the store does not answer.
    pub async fn verify(&self, token: &str, peer: Option<IpAddr>) -> Result<Caller, AuthError> {
        if !KeyHash::plausible(token) {
            return Err(self.failed(peer));
        }
        let hash = KeyHash::of(token);
        if let Some(caller) = self.remembered(hash) {
            return Ok(caller);
        }
        // A key that was good a while ago passes whatever its neighbours at the same address do.
        if let Some(peer) = peer
            && !self.known.contains_key(&hash)
        {
            self.attempts.check(peer, Instant::now()).map_err(AuthError::TooManyFailures)?;
        }
        match self.look_up(hash).await {
            Err(AuthError::UnknownKey) => Err(self.failed(peer)),
            other => other,
        }
    }

    /// Is a key still good that was so when a request of it began? For requests that take long.
    ///
    /// # Errors
    /// Those of [`Self::verify`], but for [`AuthError::TooManyFailures`].
    pub async fn still_good(&self, hash: KeyHash) -> Result<(), AuthError> {
        match self.remembered(hash) {
            Some(_) => Ok(()),
            None => self.look_up(hash).await.map(drop),
        }
    }

    fn failed(&self, peer: Option<IpAddr>) -> AuthError {
        let Some(peer) = peer else { return AuthError::UnknownKey };
        let now = Instant::now();
        match self.attempts.check(peer, now) {
            Ok(()) => {
                self.attempts.failed(peer, now);
                AuthError::UnknownKey
            }
            Err(wait) => AuthError::TooManyFailures(wait),
        }
    }

    /// Forgets everything: the next request of every key asks the source.
    pub fn forget_all(&self) {
        self.known.clear();
    }

    /// The caller, when the key was good a moment ago. The first who finds it due takes the refresh on itself (gets None) and
    /// the others go on with what is known, so that a busy key costs one look-up a period.
    fn remembered(&self, hash: KeyHash) -> Option<Caller> {
        let mut known = self.known.get_mut(&hash)?;
        let age = known.verified.elapsed();
        let over = age >= 2 * REFRESH || known.expires_at.is_some_and(|at| unix_now() >= at);
        let due = age >= REFRESH && !std::mem::replace(&mut known.claimed, age >= REFRESH);
        (!over && !due).then(|| known.caller.clone())
    }

    async fn look_up(&self, hash: KeyHash) -> Result<Caller, AuthError> {
        let now = unix_now();
        let found = self.source.key_by_hash(hash).await;
        // `KeyHash` compares in constant time; the source's index already found an equal one.
        let live = match found {
            Ok(record) => record.filter(|record| record.hash == hash && record.is_live(now)),
            Err(error) => {
                self.known.remove(&hash);
                return Err(match error {
                    KeySourceError::Damaged(words) => AuthError::Damaged(words),
                    unavailable @ KeySourceError::Unavailable(_) => AuthError::Unavailable(unavailable.to_string()),
                });
            }
        };
        let Some(record) = live else {
            self.known.remove(&hash);
            return Err(AuthError::UnknownKey);
        };
        if record.last_used_at.is_none_or(|at| now - at >= TOUCH_AFTER) {
            self.source.touch_key(record.id.clone(), now);
        }
        self.accounts.set_overrides(record.tenant, record.limits);
        let caller = Caller {
            tenant: record.tenant,
            tenant_name: record.tenant_name.into(),
            role: record.role,
            key: Some(record.id.into()),
            origin: Origin::default(),
        };
        self.remember(hash, caller.clone(), record.expires_at);
        Ok(caller)
    }

    fn remember(&self, hash: KeyHash, caller: Caller, expires_at: Option<i64>) {
        if self.known.len() >= SWEEP_AT {
            self.known.retain(|_, known| known.verified.elapsed() < 2 * REFRESH);
        }
        self.known.insert(hash, Remembered { caller, expires_at, verified: Instant::now(), claimed: false });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use parking_lot::Mutex;

    use super::*;
    use crate::{
        tenant::{ApiKey, Bound, Overrides, Role},
        types::TenantId,
    };

    #[derive(Default)]
    struct Keys {
        records: Mutex<Vec<KeyRecord>>,
        look_ups: AtomicUsize,
        touched: AtomicUsize,
    }

    impl KeySource for Keys {
        fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, Result<Option<KeyRecord>, KeySourceError>> {
            self.look_ups.fetch_add(1, Relaxed);
            Box::pin(async move { Ok(self.records.lock().iter().find(|record| record.hash == hash).cloned()) })
        }
        fn touch_key(&self, _: String, at: i64) {
            self.touched.fetch_add(1, Relaxed);
            self.records.lock().iter_mut().for_each(|record| record.last_used_at = Some(at));
        }
    }

    fn record(key: &ApiKey) -> KeyRecord {
        KeyRecord {
            id: "key_1".into(),
            tenant: TenantId(7),
            tenant_name: "alice".into(),
            hash: key.hash(),
            prefix: key.visible_prefix().into(),
            role: Role::Member,
            created_at: 0,
            expires_at: None,
            revoked_at: None,
            last_used_at: None,
            limits: Overrides::default(),
        }
    }

    #[tokio::test]
    async fn a_key_is_looked_up_once_a_period_and_a_revoked_one_is_refused_within_a_second() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone(), Arc::default());
        let key = ApiKey::generate().unwrap();
        assert_eq!(directory.verify(key.secret(), None).await, Err(AuthError::UnknownKey));
        keys.records.lock().push(record(&key));
        for _ in 0..100 {
            let caller = directory.verify(key.secret(), None).await.unwrap();
            assert_eq!((caller.tenant, &*caller.tenant_name, caller.role), (TenantId(7), "alice", Role::Member));
        }
        assert_eq!(keys.look_ups.load(Relaxed), 2, "one in vain, one that was remembered");
        assert_eq!(keys.touched.load(Relaxed), 1);
        keys.records.lock()[0].revoked_at = Some(1);
        assert_eq!(directory.still_good(key.hash()).await, Ok(()), "believed for a moment, as by any other request");
        tokio::time::sleep(2 * REFRESH).await;
        assert_eq!(directory.still_good(key.hash()).await, Err(AuthError::UnknownKey));
        assert_eq!(directory.verify(key.secret(), None).await, Err(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn an_expired_key_is_refused_even_while_remembered() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone(), Arc::default());
        let key = ApiKey::generate().unwrap();
        keys.records.lock().push(KeyRecord { expires_at: Some(unix_now() + 1), ..record(&key) });
        assert!(directory.verify(key.secret(), None).await.is_ok());
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        assert_eq!(directory.verify(key.secret(), None).await, Err(AuthError::UnknownKey));
        assert_eq!(directory.verify("", None).await, Err(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn while_one_request_refreshes_the_others_go_on() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone(), Arc::default());
        let key = ApiKey::generate().unwrap();
        keys.records.lock().push(record(&key));
        directory.verify(key.secret(), None).await.unwrap();
        tokio::time::sleep(REFRESH).await;
        // The one that notices is dropped before its look-up ends, as when its client goes away.
        assert!(directory.remembered(key.hash()).is_none());
        assert!(directory.remembered(key.hash()).is_some());
        tokio::time::sleep(REFRESH).await;
        assert!(directory.remembered(key.hash()).is_none(), "a lost refresh does not keep a key alive");
    }

    #[tokio::test]
    async fn an_address_that_guesses_waits_while_known_keys_pass() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone(), Arc::default());
        directory.limit_failures(Some(3));
        let (key, peer) = (ApiKey::generate().unwrap(), Some("10.0.0.1".parse().unwrap()));
        keys.records.lock().push(record(&key));
        directory.verify(key.secret(), peer).await.unwrap();
        for guess in ["mote-sk-wrong-1", "short", "mote-sk-wrong-2"] {
            assert_eq!(directory.verify(guess, peer).await, Err(AuthError::UnknownKey), "{guess}");
        }
        let look_ups = keys.look_ups.load(Relaxed);
        for guess in ["mote-sk-wrong-3", "short"] {
            let refused = directory.verify(guess, peer).await;
            assert!(matches!(refused, Err(AuthError::TooManyFailures(_))), "{refused:?}");
        }
        assert_eq!(keys.look_ups.load(Relaxed), look_ups, "the store is not asked");
        tokio::time::sleep(2 * REFRESH).await;
        assert!(
            directory.verify(key.secret(), peer).await.is_ok(),
            "a key that was good before is looked up all the same"
        );
        let elsewhere = Some("10.0.0.2".parse().unwrap());
        assert_eq!(directory.verify("mote-sk-wrong-4", elsewhere).await, Err(AuthError::UnknownKey));
        directory.limit_failures(None);
        assert_eq!(directory.verify("mote-sk-wrong-5", peer).await, Err(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn limits_come_with_the_key() {
        let (keys, accounts) = (Arc::new(Keys::default()), Arc::new(Accounts::default()));
        let directory = Directory::new(keys.clone(), accounts.clone());
        let key = ApiKey::generate().unwrap();
        let limits = Overrides { requests_per_minute: Some(Bound::Most(3)), weight: Some(9), ..Overrides::default() };
        keys.records.lock().push(KeyRecord { limits, ..record(&key) });
        directory.verify(key.secret(), None).await.unwrap();
        let limits = accounts.of(TenantId(7)).limits();
        assert_eq!((limits.requests_per_minute, limits.weight), (Some(3), 9));
    }
}
