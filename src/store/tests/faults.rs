//! A disk that becomes read-only or slow, and a clock that jumps, while the store is open.

use std::time::{Duration, Instant};

use super::{upkeep::key_of, *};
use crate::{
    tenant::{AuthError, DAY, Directory, KeySource as _, Usage, UsageOfDay},
    types::clock::tests::jump,
};

const HOUR: i64 = 3600;

fn faulty() -> (Database, Arc<Faults>) {
    let (mut database, faults) = (Database::sqlite(), Arc::<Faults>::default());
    database.config.faults = Some(faults.clone());
    (database, faults)
}

#[tokio::test]
async fn a_directory_that_becomes_read_only_is_read_and_written_again_later() {
    let (database, faults) = faulty();
    let store = database.open().await;
    let (key, _) = key_of(&store, "ann").await;
    written(store.put_adapter(new(BUILT_IN_TENANT, "before", 1)).await);
    faults.set_read_only(true);
    for number in 0..3 {
        let error = store.put_adapter(new(BUILT_IN_TENANT, "meanwhile", number)).await.unwrap_err();
        assert_eq!(error.unwritable(), Some(Unwritable::ReadOnly), "{error}");
        let error = store.delete_adapter(BUILT_IN_TENANT, "before").await.unwrap_err();
        assert_eq!(error.unwritable(), Some(Unwritable::ReadOnly), "{error}");
        assert_eq!(all(&store).await.len(), 1);
        assert!(store.key_by_hash(key.hash()).await.unwrap().is_some());
    }
    faults.set_read_only(false);
    written(store.put_adapter(new(BUILT_IN_TENANT, "meanwhile", 9)).await);
    store.delete_adapter(BUILT_IN_TENANT, "before").await.unwrap();
    assert!(store.check(Check::Full).await.unwrap().is_empty());
    store.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_slow_disk_uploads_share_commits_and_reads_wait_for_one_at_most() {
    let (database, faults) = faulty();
    let store = database.open().await;
    let commit = Duration::from_millis(200);
    faults.set_slow(commit);
    let began = Instant::now();
    let writers: Vec<_> = (0..200u64)
        .map(|number| {
            let store = store.clone();
            tokio::spawn(async move {
                written(store.put_adapter(new(BUILT_IN_TENANT, &format!("a{number}"), number)).await);
            })
        })
        .collect();
    let mut slowest = Duration::ZERO;
    while writers.iter().any(|writer| !writer.is_finished()) {
        let asked = Instant::now();
        store.list_adapters(BUILT_IN_TENANT, "", None, 10).await.unwrap();
        slowest = slowest.max(asked.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(began.elapsed() < 100 * commit, "200 uploads took {:?}: they do not share commits", began.elapsed());
    assert!(slowest < 50 * commit, "a read waited {slowest:?}");
    faults.set_slow(Duration::ZERO);
    assert_eq!(all(&store).await.len(), 200, "none is lost");
    store.close().await;
}

#[tokio::test]
async fn a_clock_that_jumps_loses_and_locks_out_nothing() {
    let (database, _) = faulty();
    let store = database.open().await;
    let callers = Directory::new(Arc::new(store.clone()), Arc::default());
    let verify = async |key: &crate::tenant::ApiKey| {
        callers.forget_all();
        callers.verify(key.secret(), None).await.map(|_| ())
    };
    let (endless, _) = key_of(&store, "ann").await;
    let (revoked, revoked_id) = key_of(&store, "ann").await;
    let ending = crate::tenant::ApiKey::generate().unwrap();
    let expires_at = Some(unix_now() + 12 * HOUR);
    store.create_key(NewKey { expires_at, ..super::keys::key(&ending, "ann") }).await.unwrap();
    let keyed = |key: &str, name: &str| NewAdapter {
        idempotency: Some(Idempotency {
            route: "POST /adapters",
            key: key.into(),
            request_hash: [1; 32],
            respond: Arc::new(|record| record.name.clone()),
        }),
        ..new(BUILT_IN_TENANT, name, 1)
    };
    jump(2 * HOUR);
    written(store.put_adapter(keyed("k", "kept")).await);
    store.revoke_key(&revoked_id).await.unwrap();
    // Back by an hour, and more than what was just written is old.
    for hours in [1, -24] {
        jump(hours * HOUR);
        assert_eq!(verify(&endless).await, Ok(()));
        assert_eq!(verify(&ending).await, Ok(()));
        assert_eq!(verify(&revoked).await, Err(AuthError::UnknownKey), "revoked is revoked, whenever that was");
        assert!(matches!(store.put_adapter(keyed("k", "kept")).await, Ok(Stored::Replayed(_))), "the same upload");
        written(store.put_adapter(keyed(&format!("other{hours}"), &format!("a{hours}"))).await);
    }
    // A day ahead: what ends by then does not work, and works again when the clock is set right.
    jump(24 * HOUR);
    assert_eq!(verify(&endless).await, Ok(()));
    assert_eq!(verify(&ending).await, Err(AuthError::UnknownKey));
    let tomorrow = crate::tenant::today();
    let usage = Usage { requests: 1, ..Usage::default() };
    store.add_usage(vec![UsageOfDay { tenant: BUILT_IN_TENANT, day: tomorrow, usage }]).await.unwrap();
    let ids = all(&store).await.into_values().map(|adapter| adapter.id.0).max().unwrap();
    jump(0);
    assert_eq!(verify(&ending).await, Ok(()));
    let day = tomorrow - 1;
    store.add_usage(vec![UsageOfDay { tenant: BUILT_IN_TENANT, day, usage }]).await.unwrap();
    assert_eq!(store.usage(BUILT_IN_TENANT, day, tomorrow).await.unwrap().len(), 2);
    assert!(written(store.put_adapter(new(BUILT_IN_TENANT, "last", 5)).await).id.0 > ids, "numbers know no clock");
    // Before 1970 and beyond all days.
    for far in [-100_000 * DAY, 2_000_000 * DAY] {
        jump(far);
        written(store.put_adapter(keyed(&format!("far{far}"), &format!("f{}", far > 0))).await);
        assert_eq!(verify(&endless).await, Ok(()));
        assert!(crate::tenant::until_tomorrow() <= Duration::from_secs(DAY as u64));
    }
    store.close().await;
}
