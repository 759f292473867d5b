//! From a bearer token to a caller, with a short memory of keys that were good.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use dashmap::DashMap;
use futures::future::BoxFuture;

use super::{Caller, KeyHash, KeyRecord};

/// When a verified key is looked up again. Until then, and until twice this while that look-up runs (or was lost with its
/// request), the key is believed: a change in the store is honoured within a second.
const REFRESH: Duration = Duration::from_millis(450);

/// How old a recorded last use may become before it is written anew, in seconds.
const TOUCH_AFTER: i64 = 60;

/// Remembered keys beyond which the memory is cleared of stale ones.
const SWEEP_AT: usize = 10_000;

/// Where keys are kept: the store, or a map in a test.
pub trait KeySource: Send + Sync {
    /// The key with this hash, live or not.
    fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, Result<Option<KeyRecord>, KeySourceError>>;

    /// Notes that a key was used at a time (unix seconds). May be lost: nothing but a display depends on it.
    fn touch_key(&self, id: String, at: i64);
}

/// The source of keys did not answer; the words are for the operator's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot look up a key: {0}")]
pub struct KeySourceError(pub String);

/// Why a request has no caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// There is no such key, or it is revoked or expired.
    #[error("Incorrect API key provided.")]
    UnknownKey,
    /// The key could not be checked.
    #[error(transparent)]
    Source(#[from] KeySourceError),
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
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("known", &self.known.len()).finish_non_exhaustive()
    }
}

impl Directory {
    /// A directory over a source of keys.
    pub fn new(source: Arc<dyn KeySource>) -> Self {
        Self { source, known: DashMap::new() }
    }

    /// The caller that a bearer token stands for.
    ///
    /// # Errors
    /// [`AuthError::UnknownKey`] for a token that is no live key, [`AuthError::Source`] when the store does not answer.
    pub async fn verify(&self, token: &str) -> Result<Caller, AuthError> {
        if !KeyHash::plausible(token) {
            return Err(AuthError::UnknownKey);
        }
        let hash = KeyHash::of(token);
        match self.remembered(hash) {
            Some(caller) => Ok(caller),
            None => self.look_up(hash).await,
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
                return Err(error.into());
            }
        };
        let Some(record) = live else {
            self.known.remove(&hash);
            return Err(AuthError::UnknownKey);
        };
        if record.last_used_at.is_none_or(|at| now - at >= TOUCH_AFTER) {
            self.source.touch_key(record.id.clone(), now);
        }
        let caller = Caller {
            tenant: record.tenant,
            tenant_name: record.tenant_name.into(),
            role: record.role,
            key: Some(record.id.into()),
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

fn unix_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use parking_lot::Mutex;

    use super::*;
    use crate::{
        tenant::{ApiKey, Role},
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
        }
    }

    #[tokio::test]
    async fn a_key_is_looked_up_once_a_period_and_a_revoked_one_is_refused_within_a_second() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone());
        let key = ApiKey::generate().unwrap();
        assert_eq!(directory.verify(key.secret()).await, Err(AuthError::UnknownKey));
        keys.records.lock().push(record(&key));
        for _ in 0..100 {
            let caller = directory.verify(key.secret()).await.unwrap();
            assert_eq!((caller.tenant, &*caller.tenant_name, caller.role), (TenantId(7), "alice", Role::Member));
        }
        assert_eq!(keys.look_ups.load(Relaxed), 2, "one in vain, one that was remembered");
        assert_eq!(keys.touched.load(Relaxed), 1);
        keys.records.lock()[0].revoked_at = Some(1);
        tokio::time::sleep(2 * REFRESH).await;
        assert_eq!(directory.verify(key.secret()).await, Err(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn an_expired_key_is_refused_even_while_remembered() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone());
        let key = ApiKey::generate().unwrap();
        keys.records.lock().push(KeyRecord { expires_at: Some(unix_now() + 1), ..record(&key) });
        assert!(directory.verify(key.secret()).await.is_ok());
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        assert_eq!(directory.verify(key.secret()).await, Err(AuthError::UnknownKey));
        assert_eq!(directory.verify("").await, Err(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn while_one_request_refreshes_the_others_go_on() {
        let keys = Arc::new(Keys::default());
        let directory = Directory::new(keys.clone());
        let key = ApiKey::generate().unwrap();
        keys.records.lock().push(record(&key));
        directory.verify(key.secret()).await.unwrap();
        tokio::time::sleep(REFRESH).await;
        // The one that notices is dropped before its look-up ends, as when its client goes away.
        assert!(directory.remembered(key.hash()).is_none());
        assert!(directory.remembered(key.hash()).is_some());
        tokio::time::sleep(REFRESH).await;
        assert!(directory.remembered(key.hash()).is_none(), "a lost refresh does not keep a key alive");
    }
}
