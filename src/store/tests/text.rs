//! Rows with text that is no UTF-8 (SQLite keeps any bytes): each is its own trouble, at a start and while the server runs.

use super::{
    upkeep::{directory, key_of, loaded, tamper},
    *,
};
use crate::tenant::{AuthError, Directory, Limits};

/// A text that is none.
const SPOILT: &str = "CAST(x'61ff62' AS TEXT)";

fn of(name: &str) -> String {
    format!("adapter = (SELECT id FROM adapters WHERE name = '{name}')")
}

async fn listed(store: &Store) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    while let Some(next) =
        store.list_adapters(BUILT_IN_TENANT, "", names.last().map(String::as_str), 1).await.unwrap().pop()
    {
        names.push(next.name);
    }
    names
}

#[tokio::test]
async fn adapters_with_spoilt_text_stop_nobody() {
    let database = Database::sqlite();
    let store = database.open().await;
    for (number, name) in ["a", "b", "c", "d", "e", "f", "g"].into_iter().enumerate() {
        let mut upload = new(BUILT_IN_TENANT, name, number as u64);
        if name == "e" {
            upload.contents.facts = Arc::new(Facts { scheme: "{\"u\":7}".into(), ..facts() });
        }
        written(store.put_adapter(upload).await);
    }
    let damage = [
        format!("UPDATE generations SET generation = {SPOILT} WHERE {}", of("b")),
        format!("UPDATE adapters SET metadata = {SPOILT} WHERE name = 'c'"),
        format!("UPDATE facts SET scheme = {SPOILT} WHERE scheme = '{{\"u\":7}}'"),
        format!("UPDATE adapters SET metadata = {SPOILT}, created_at = {SPOILT} WHERE name = 'f'"),
        format!("UPDATE adapters SET name = {SPOILT} WHERE name = 'd'"),
    ];
    tamper(directory(&database), &damage.join(";")).await;
    let (good, bad) = loaded(&store).await;
    assert_eq!(good, ["a", "c", "f", "g"], "metadata is not needed to serve");
    assert_eq!(bad.iter().map(|bad| &*bad.name).collect::<Vec<_>>(), ["a\u{fffd}b", "b", "e"]);
    assert!(bad[0].cause.contains("'name'") && bad[0].id.0 > 0, "{bad:?}");
    assert_eq!(listed(&store).await, ["a", "g"]);
    assert!(matches!(store.own_adapter(BUILT_IN_TENANT, "c").await, Err(StoreError::AdapterDamaged)));
    assert!(matches!(store.own_adapter(BUILT_IN_TENANT, "a").await, Ok(Some(_))));
    let back = store.rollback(BUILT_IN_TENANT, "c", contents(2).generation).await;
    assert!(matches!(back, Err(StoreError::AdapterDamaged)), "{back:?}");

    // Replaced alone, in a batch and beside others, each is whole again, and so are its neighbours.
    let replace = |name: &str, number| NewAdapter {
        on_conflict: OnConflict::NewGeneration,
        ..new(BUILT_IN_TENANT, name, number)
    };
    assert_eq!(written(store.put_adapter(replace("c", 30)).await).metadata, "{}");
    let batch = vec![replace("b", 31), replace("f", 32), new(BUILT_IN_TENANT, "h", 33)];
    store.put_adapters(batch).await.unwrap().into_iter().for_each(|result| drop(written(result)));
    assert_eq!(listed(&store).await, ["a", "b", "c", "f", "g", "h"]);
    store.delete_adapter(BUILT_IN_TENANT, "e").await.unwrap();
    assert_eq!(loaded(&store).await.1.len(), 1, "the one whose name nobody can say");
    store.close().await;
}

#[tokio::test]
async fn a_start_reads_all_that_can_be_read_wherever_the_damage_is() {
    let database = Database::sqlite();
    let store = database.open().await;
    let batch = (0..1000).map(|i| new(BUILT_IN_TENANT, &format!("a{i:04}"), i)).collect();
    store.put_adapters(batch).await.unwrap();
    let spoilt = [0, 1, 99, 100, 101, 350, 998, 999].map(|i| format!("'a{i:04}'")).join(", ");
    let statement = format!(
        "UPDATE generations SET data = {SPOILT} WHERE adapter IN (SELECT id FROM adapters WHERE name IN ({spoilt})); \
         UPDATE generations SET generation = {SPOILT} WHERE adapter IN (SELECT id FROM adapters WHERE name = 'a0500')"
    );
    tamper(directory(&database), &statement).await;
    let (good, bad) = loaded(&store).await;
    assert_eq!(bad.iter().map(|bad| &*bad.name).collect::<Vec<_>>(), ["a0500"]);
    assert_eq!(good.len(), 999, "data is bytes to the store, whatever they are");
    let mut once = good.clone();
    once.dedup();
    assert_eq!(good, once, "each of them once");
    store.close().await;
}

#[tokio::test]
async fn keys_and_tenants_with_spoilt_text_are_shut_out_alone() {
    let database = Database::sqlite();
    let store = database.open().await;
    let (good, _) = key_of(&store, "alice").await;
    let (prefix, prefix_id) = key_of(&store, "alice").await;
    let (limit, _) = key_of(&store, "bob").await;
    let (lost, _) = key_of(&store, "carol").await;
    let damage = [
        format!("UPDATE keys SET prefix = {SPOILT} WHERE id = '{prefix_id}'"),
        format!("UPDATE tenants SET weight = {SPOILT} WHERE name = 'bob'"),
        format!("UPDATE tenants SET name = {SPOILT} WHERE name = 'carol'"),
    ];
    tamper(directory(&database), &damage.join(";")).await;
    let callers = Directory::new(Arc::new(store.clone()), Arc::default());
    assert!(callers.verify(good.secret(), None).await.is_ok());
    for key in [&prefix, &limit, &lost] {
        let verified = callers.verify(key.secret(), None).await;
        assert!(matches!(verified, Err(AuthError::Damaged(_))), "{verified:?}");
    }
    let named: Vec<_> = store.damaged_rows().await.unwrap().into_iter().map(|row| (row.kind, row.name)).collect();
    let expected = [(Damaged::Tenant, "bob"), (Damaged::Tenant, "a\u{fffd}b"), (Damaged::Key, &*prefix_id)];
    assert_eq!(named, expected.map(|(kind, name)| (kind, name.to_owned())));
    let names = |page: Vec<crate::tenant::Tenant>| page.into_iter().map(|tenant| tenant.name).collect::<Vec<_>>();
    assert_eq!(names(store.tenants(None, 2).await.unwrap()), ["alice", "default"], "short of nothing");
    let alice = store.tenant("alice").await.unwrap().id;
    assert_eq!(store.keys(alice).await.unwrap().len(), 1);
    store.close().await;
}

#[tokio::test]
async fn jobs_and_what_they_left_behind_are_read_as_far_as_they_can_be() {
    let database = Database::sqlite();
    let store = database.open().await;
    let job = |number: u32| NewJob {
        id: format!("ftjob-{number:032x}"),
        tenant: BUILT_IN_TENANT,
        name: format!("name{number}"),
        name_must_be_free: true,
        status: JobStatus::Queued,
        spec: "{}".into(),
        steps: 10,
        data: Vec::new(),
        limits: Limits::default(),
        most: 10,
        key: None,
        event: NewEvent { kind: "status", level: EventLevel::Info, message: "made".into(), data: "{}".into() },
    };
    for number in 1..=3 {
        store.create_job(job(number)).await.unwrap();
    }
    let limits = StartLimits { running: 10, running_of_tenant: 10, trained_tokens_per_day: None };
    let running = store.claim_job(limits, "here", Vec::new(), Turns::default()).await.unwrap().unwrap();
    for step in 1..=6 {
        let event = NewEvent { kind: "step", level: EventLevel::Info, message: format!("{step}"), data: "{}".into() };
        let state = format!("state {step}");
        let checkpoint = Some(NewCheckpoint { step, state, metrics: "{}".into(), keep: 3 });
        let samples = vec![("training", "[]".to_owned())];
        let progress = Progress { step, events: vec![event], samples, checkpoint, ..Progress::default() };
        store.report_progress(&running.id, 1, progress, None).await.unwrap();
    }
    let damage = [
        format!("UPDATE job_events SET message = {SPOILT} WHERE seq IN (4, 5)"),
        "UPDATE job_events SET created_at = 'then' WHERE seq = 7".to_owned(),
        format!("UPDATE job_checkpoints SET state = {SPOILT} WHERE step = 6"),
        format!("UPDATE job_samples SET samples = {SPOILT} WHERE step = 5"),
        format!("UPDATE jobs SET spec = {SPOILT} WHERE id = '{}'", job(2).id),
    ];
    tamper(directory(&database), &damage.join(";")).await;
    let events = |records: Vec<EventRecord>| records.into_iter().map(|event| event.seq).collect::<Vec<_>>();
    assert_eq!(events(store.events_after(&running.id, 0, 100).await.unwrap()), [1, 2, 3, 6, 8]);
    assert_eq!(events(store.events_after(&running.id, 3, 2).await.unwrap()), [6, 8], "a full page");
    assert_eq!(events(store.events_before(&running.id, 9, 3).await.unwrap()), [8, 6, 3]);
    let (checkpoints, there_are) = store.checkpoints(&running.id).await.unwrap();
    assert_eq!((checkpoints.iter().map(|it| it.step).collect::<Vec<_>>(), there_are), (vec![5, 4], 3));
    let samples = store.samples(&running.id, None, 3).await.unwrap();
    assert_eq!(samples.iter().map(|it| it.step).collect::<Vec<_>>(), [6, 4, 3]);

    let listed = store.jobs(BUILT_IN_TENANT, None, 10).await.unwrap();
    assert_eq!(listed.len(), 3);
    let spoilt = listed.iter().find(|job| job.damaged.is_some()).unwrap();
    assert_eq!((&*spoilt.name, spoilt.status), ("name2", JobStatus::Failed));
    assert!(spoilt.damaged.as_ref().unwrap().contains("'spec'"), "{spoilt:?}");
    let next = store.claim_job(limits, "here", Vec::new(), Turns::default()).await.unwrap().unwrap();
    assert_eq!(next.name, "name3", "the queue moves");
    store.close().await;
}
