use super::*;
use crate::tenant::{
    Actor, ApiKey, AuditRecord, Bound, KeySource as _, LimitChanges, Limits, Origin, Overrides, Role, Usage,
    UsageOfDay, Via,
};

fn actor(tenant: &str) -> Actor {
    let origin = Origin { peer: Some("10.1.2.3".parse().unwrap()), request: Some("req-1".into()) };
    Actor { via: Via::Http, tenant: Some(tenant.into()), key: Some("key_1".into()), admin: false, origin }
}

fn file(number: u32, tenant: TenantId, size: usize, bytes: u64) -> NewFile {
    NewFile {
        id: format!("file-{number:032x}"),
        tenant,
        filename: "train.jsonl".into(),
        purpose: "fine-tune".into(),
        data: vec![b'x'; size],
        most_of_tenant: 1_000_000,
        room: Room { adapters: None, bytes: Some(bytes) },
        key: None,
    }
}

#[tokio::test]
async fn limits_are_set_one_by_one_and_come_with_tenant_and_key() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap();
        assert_eq!(ann.limits, Overrides::default());
        let first = LimitChanges {
            adapters: Some(Some(Bound::Most(5))),
            tokens_per_minute: Some(Some(Bound::Unlimited)),
            weight: Some(Some(7)),
            ..LimitChanges::default()
        };
        store.set_limits("ann", first).await.unwrap();
        let second =
            LimitChanges { adapters: Some(None), queued_jobs: Some(Some(Bound::Most(0))), ..LimitChanges::default() };
        let set = store.set_limits("ann", second).await.unwrap();
        let expected = Overrides {
            tokens_per_minute: Some(Bound::Unlimited),
            queued_jobs: Some(Bound::Most(0)),
            weight: Some(7),
            ..Overrides::default()
        };
        assert_eq!((set.limits, set.id), (expected, ann.id));
        assert_eq!(store.tenant("ann").await.unwrap(), set);
        assert_eq!(store.tenants(None, 10).await.unwrap()[0], set);
        assert!(matches!(store.set_limits("bob", second).await, Err(StoreError::TenantNotFound)));
        let key = ApiKey::generate().unwrap();
        let new = NewKey {
            key: key.clone(),
            tenant: "ann".into(),
            create_tenant: false,
            role: Role::Member,
            expires_at: None,
            only_first: false,
        };
        store.create_key(new).await.unwrap();
        assert_eq!(store.key_by_hash(key.hash()).await.unwrap().unwrap().limits, expected);
        assert_eq!(store.tenant("default").await.unwrap().limits, Overrides::default(), "nobody else's");
        store.close().await;
    }
}

#[tokio::test]
async fn a_tenant_has_room_for_so_many_adapters_whatever_comes_and_goes() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let room = Room { adapters: Some(3), bytes: None };
        let upload = |name: &str, number| NewAdapter { room, ..new(ann, name, number) };
        written(store.put_adapter(new(ann, "before", 1)).await);
        let many = ["a", "b", "c", "d"].map(|name| upload(name, 2)).to_vec();
        let many = store.put_adapters(many).await.unwrap();
        assert!(many[0].is_ok() && many[1].is_ok(), "what is there counts: {many:?}");
        assert!(many[2..].iter().all(|result| matches!(result, Err(StoreError::AdaptersFull(3)))), "{many:?}");
        let replaced = NewAdapter { on_conflict: OnConflict::NewGeneration, ..upload("a", 9) };
        written(store.put_adapter(replaced).await);
        assert!(matches!(store.put_adapter(upload("c", 3)).await, Err(StoreError::AdaptersFull(3))));
        written(store.put_adapter(new(BUILT_IN_TENANT, "c", 3)).await);
        store.delete_adapter(ann, "before").await.unwrap();
        written(store.put_adapter(upload("c", 3)).await);
        assert!(matches!(store.put_adapter(upload("d", 4)).await, Err(StoreError::AdaptersFull(3))));
        // Without a limit for a while: what came then counts afterwards.
        written(store.put_adapter(new(ann, "d", 4)).await);
        store.delete_adapter(ann, "a").await.unwrap();
        assert!(matches!(store.put_adapter(upload("e", 5)).await, Err(StoreError::AdaptersFull(3))));
        store.delete_adapter(ann, "b").await.unwrap();
        written(store.put_adapter(upload("e", 5)).await);
        store.close().await;
    }
}

#[tokio::test]
async fn bytes_are_those_of_all_generations_metadata_and_files() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        // 26 of numbers and 2 of an empty object.
        let one = 28;
        let room = |bytes| Room { adapters: None, bytes: Some(bytes) };
        let put = async |name: &str, number, bytes| {
            let on_conflict = OnConflict::NewGeneration;
            store.put_adapter(NewAdapter { room: room(bytes), on_conflict, ..new(ann, name, number) }).await
        };
        assert!(matches!(put("a", 1, one - 1).await, Err(StoreError::BytesFull(27))));
        written(put("a", 1, one).await);
        written(put("a", 1, one).await);
        assert!(matches!(put("a", 2, one + 25).await, Err(StoreError::BytesFull(_))), "a generation more is 26 bytes");
        written(put("a", 2, one + 26).await);
        let words = NewAdapter {
            metadata: Some(r#"{"n":"é"}"#.into()),
            on_conflict: OnConflict::NewGeneration,
            room: room(one + 26 + 7),
            ..new(ann, "a", 2)
        };
        assert!(matches!(store.put_adapter(words.clone()).await, Err(StoreError::BytesFull(_))), "8 bytes more");
        written(store.put_adapter(NewAdapter { room: room(one + 26 + 8), ..words }).await);

        let now = one + 26 + 8;
        assert!(matches!(store.put_file(file(1, ann, 10, now + 9)).await, Err(StoreError::BytesFull(_))));
        store.put_file(file(1, ann, 10, now + 10)).await.unwrap();
        assert!(put("b", 3, now + 10).await.is_err());
        store.delete_file(ann, &file(1, ann, 0, 0).id).await.unwrap();
        // Counted anew by a process that starts, to the same sum.
        let again = database.open().await;
        assert!(matches!(again.put_file(file(2, ann, 10, now + 9)).await, Err(StoreError::BytesFull(_))));
        again.put_file(file(2, ann, 10, now + 10)).await.unwrap();
        again.close().await;
        store.delete_adapter(ann, "a").await.unwrap();
        store.close().await;
    }
}

#[tokio::test]
async fn usage_adds_up_by_day_and_goes_with_its_tenant() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let usage =
            |n| Usage { requests: n, prompt_tokens: 10 * n, completion_tokens: 100 * n, trained_tokens: 1000 * n };
        let of = |tenant, day, n| UsageOfDay { tenant, day, usage: usage(n) };
        store.add_usage(vec![of(ann, 5, 1), of(ann, 6, 2), of(BUILT_IN_TENANT, 5, 9)]).await.unwrap();
        store.add_usage(vec![of(ann, 6, 3)]).await.unwrap();
        assert_eq!(store.usage(ann, 0, 100).await.unwrap(), [of(ann, 5, 1), of(ann, 6, 5)]);
        assert_eq!(store.usage(ann, 6, 6).await.unwrap(), [of(ann, 6, 5)]);
        assert!(store.usage(ann, 7, 9).await.unwrap().is_empty());
        store.delete_tenant("ann").await.unwrap();
        assert!(store.usage(ann, 0, 100).await.unwrap().is_empty());
        assert_eq!(store.usage(BUILT_IN_TENANT, 5, 5).await.unwrap(), [of(BUILT_IN_TENANT, 5, 9)]);
        store.close().await;
    }
}

/// Action, target and detail of every entry, oldest first.
async fn log(store: &Store) -> Vec<(String, String, Option<String>)> {
    let mut entries = store.audit(None, 1000).await.unwrap();
    entries.reverse();
    assert!(entries.is_sorted_by(|a, b| a.id < b.id), "{entries:?}");
    entries.into_iter().map(|entry| (entry.action, entry.target, entry.detail)).collect()
}

#[tokio::test]
async fn deeds_are_written_with_what_they_did_and_only_then() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        written(store.put_adapter(new(ann, "nobody", 1)).await);
        assert!(store.audit(None, 10).await.unwrap().is_empty(), "nobody was named");

        let by = store.by(actor("ann"));
        written(by.put_adapter(new(ann, "a", 1)).await);
        assert!(by.put_adapter(new(ann, "a", 1)).await.is_err());
        let batch = ["a", "b", "c", "d"].map(|name| new(ann, name, 2)).to_vec();
        assert!(by.put_adapters(batch).await.unwrap()[0].is_err());
        by.delete_adapter(ann, "a").await.unwrap();
        assert!(by.delete_adapter(ann, "a").await.is_err());
        by.set_limits(
            "ann",
            LimitChanges { adapters: Some(Some(Bound::Most(9))), weight: Some(None), ..LimitChanges::default() },
        )
        .await
        .unwrap();
        // Together: one transaction may have them all.
        let (file, tenant) = (file(1, ann, 5, 1_000_000), "bob");
        let (one, two, three) =
            tokio::join!(by.put_file(file.clone()), by.create_tenant(tenant), by.delete_tenant("carol"));
        assert!(one.is_ok() && two.is_ok() && three.is_err());

        let mut found = log(&store).await;
        found.sort();
        let entry = |action: &str, target: &str, detail: Option<&str>| {
            (action.to_owned(), target.to_owned(), detail.map(str::to_owned))
        };
        let expected = [
            entry("adapter.delete", "a", None),
            entry("adapter.upload", "a", None),
            entry("adapter.upload", "b", Some(r#"{"adapters":3}"#)),
            entry("file.upload", &file.id, None),
            entry("tenant.create", "bob", None),
            entry("tenant.limits", "ann", Some(r#"{"adapters":9,"weight":null}"#)),
        ];
        assert_eq!(found, expected);
        let newest = store.audit(None, 1).await.unwrap().remove(0);
        let AuditRecord { via, tenant, key, peer, request, .. } = newest.clone();
        let told = [Some(via), tenant, key, peer, request].map(Option::unwrap);
        assert_eq!(told, ["http", "ann", "key_1", "10.1.2.3", "req-1"]);
        assert_eq!(store.audit(Some(newest.id), 1000).await.unwrap().len(), 5);
        store.close().await;
    }
}

#[tokio::test]
async fn a_rotated_key_ends_after_its_grace_and_the_new_one_lives_as_long() {
    for database in Database::each().await {
        let store = database.open().await;
        let made = async |expires_at| {
            let key = ApiKey::generate().unwrap();
            let tenant = "ann".to_owned();
            let new = NewKey { key, tenant, create_tenant: true, role: Role::Admin, expires_at, only_first: false };
            store.create_key(new).await.unwrap().unwrap()
        };
        let rotate = async |id: &str, grace, expires_at| {
            let key = ApiKey::generate().unwrap();
            store.rotate_key(id, Rotation { key, grace, expires_at }).await
        };
        let first = made(None).await;
        let (second, old) = rotate(&first.id, 100, None).await.unwrap();
        let end = old.expires_at.unwrap();
        assert_eq!((second.role, &*second.tenant_name, second.expires_at), (Role::Admin, "ann", None));
        assert_eq!(end - second.created_at, 100);
        assert!(old.is_live(end - 1) && !old.is_live(end) && second.is_live(end));
        assert_eq!(store.key(&first.id).await.unwrap(), old);

        let short = made(Some(unix_now() + 50)).await;
        let (long, old) = rotate(&short.id, 100, None).await.unwrap();
        assert_eq!(old.expires_at, short.expires_at, "no grace beyond its own end");
        assert_eq!(long.expires_at.unwrap() - long.created_at, short.expires_at.unwrap() - short.created_at);
        assert_eq!(rotate(&long.id, 0, Some(4_000_000_000)).await.unwrap().0.expires_at, Some(4_000_000_000));
        assert!(matches!(rotate(&long.id, 0, None).await, Err(StoreError::KeyNotLive)), "it ended at once");
        assert!(matches!(rotate("key_none", 0, None).await, Err(StoreError::KeyNotFound)));
        store.close().await;
    }
}

#[tokio::test]
async fn what_was_set_for_a_tenant_counts_for_its_jobs() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let job = |number: u32, limits: Limits| NewJob {
            id: format!("ftjob-{number:032x}"),
            tenant: ann,
            name: format!("a{number}"),
            name_must_be_free: true,
            status: JobStatus::Queued,
            spec: "{}".into(),
            steps: 10,
            data: vec![],
            limits,
            most: 10,
            key: None,
            event: NewEvent { kind: "status", level: EventLevel::Info, message: "made".into(), data: "{}".into() },
        };
        let adapters = Limits { adapters: Some(3), ..Limits::default() };
        written(store.put_adapter(new(ann, "x", 1)).await);
        store.create_job(job(1, adapters)).await.unwrap();
        store.create_job(job(2, adapters)).await.unwrap();
        let third = store.create_job(job(3, adapters)).await;
        assert!(matches!(third, Err(StoreError::AdaptersFull(3))), "two jobs will publish too: {third:?}");

        let default = StartLimits { running: 9, running_of_tenant: 1, trained_tokens_per_day: Some(100) };
        let claim =
            async || store.claim_job(default, "here", vec![], Turns::default()).await.unwrap().map(|job| job.id);
        let (first, second) = (job(1, adapters).id, job(2, adapters).id);
        assert_eq!(claim().await, Some(first.clone()));
        assert_eq!(claim().await, None, "one at once by default");
        let two = LimitChanges { running_jobs: Some(Some(Bound::Most(2))), ..LimitChanges::default() };
        store.set_limits("ann", two).await.unwrap();
        assert_eq!(claim().await, Some(second));

        let step = |step, trained_tokens| Progress { step, trained_tokens, ..Progress::default() };
        let report = async |progress| store.report_progress(&first, 1, progress, Some(100)).await.unwrap();
        assert!(report(step(1, 60)).await);
        assert!(!report(step(2, 40)).await, "the day's tokens are used up");
        store.defer_job(&first, 1, "tomorrow").await.unwrap();
        assert_eq!(claim().await, None, "it waits for tomorrow");
        let spent = store.create_job(job(4, Limits { trained_tokens_per_day: Some(100), ..Limits::default() })).await;
        assert!(matches!(spent, Err(StoreError::TrainedEnough(100))), "{spent:?}");
        let more = LimitChanges { trained_tokens_per_day: Some(Some(Bound::Unlimited)), ..LimitChanges::default() };
        store.set_limits("ann", more).await.unwrap();
        assert_eq!(claim().await, Some(first.clone()));
        let again = store.report_progress(&first, 2, Progress { metrics: Some("{}".into()), ..step(2, 40) }, Some(100));
        assert!(again.await.unwrap());
        let today = crate::tenant::today();
        let used = store.usage(ann, today - 1, today).await.unwrap();
        let trained: u64 = used.iter().map(|day| day.usage.trained_tokens).sum();
        assert_eq!(trained, 100, "a step that was reported before does not count again");
        store.close().await;
    }
}

#[tokio::test]
async fn an_imported_frame_counts_with_every_generation_that_has_it() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        // 26 bytes of numbers, an object without fields, and the frame.
        let with_frame = |name: &str, number, bytes| {
            let mut upload = NewAdapter {
                on_conflict: OnConflict::NewGeneration,
                room: Room { adapters: None, bytes: Some(bytes) },
                ..new(ann, name, number)
            };
            upload.contents.facts = Arc::new(Facts { frame: Some(vec![7; 1000]), ..facts() });
            upload
        };
        let full = |stored: Result<Stored>| assert!(matches!(stored, Err(StoreError::BytesFull(_))), "{stored:?}");
        full(store.put_adapter(with_frame("a", 1, 1027)).await);
        written(store.put_adapter(with_frame("a", 1, 1028)).await);
        full(store.put_adapter(with_frame("a", 2, 2053)).await);
        written(store.put_adapter(with_frame("a", 2, 2054)).await);
        written(store.put_adapter(with_frame("a", 1, 2054)).await);
        // Counted anew by a process that starts, to the same sum.
        store.close().await;
        let store = database.open().await;
        full(store.put_adapter(with_frame("b", 1, 3081)).await);
        written(store.put_adapter(with_frame("b", 1, 3082)).await);
        store.delete_adapter(ann, "a").await.unwrap();
        full(store.put_adapter(with_frame("a", 3, 2055)).await);
        written(store.put_adapter(with_frame("a", 3, 2056)).await);
        store.close().await;
    }
}

#[tokio::test]
async fn bytes_of_jobs_count_until_they_are_gone() {
    for database in Database::each().await {
        let store = database.open().await;
        let ann = store.create_tenant("ann").await.unwrap().id;
        let job = |number: u32, bytes| NewJob {
            id: format!("ftjob-{number:032x}"),
            tenant: ann,
            name: format!("a{number}"),
            name_must_be_free: true,
            status: JobStatus::Queued,
            spec: format!("{:100}", "{}"),
            steps: 10,
            data: vec![(JobData::Training, vec![b'x'; 700]), (JobData::Validation, vec![b'x'; 300])],
            limits: Limits { stored_bytes: Some(bytes), ..Limits::default() },
            most: 10,
            key: None,
            event: NewEvent { kind: "status", level: EventLevel::Info, message: "made".into(), data: "{}".into() },
        };
        assert!(matches!(store.create_job(job(1, 1099)).await, Err(StoreError::BytesFull(1099))));
        store.create_job(job(1, 1100)).await.unwrap();
        store.create_job(job(2, 2200)).await.unwrap();
        assert!(matches!(store.create_job(job(3, 3299)).await, Err(StoreError::BytesFull(_))));
        assert!(matches!(store.put_file(file(1, ann, 10, 2209)).await, Err(StoreError::BytesFull(_))));
        // Its data goes with the end, what it was asked stays with its row.
        store.cancel_job(ann, &job(1, 0).id).await.unwrap();
        store.cancel_job(ann, &job(1, 0).id).await.unwrap();
        assert!(matches!(store.put_file(file(1, ann, 10, 1209)).await, Err(StoreError::BytesFull(_))));
        store.put_file(file(1, ann, 10, 1210)).await.unwrap();
        // Counted anew by a process that starts, to the same sum.
        let again = database.open().await;
        assert!(matches!(again.put_file(file(2, ann, 10, 1219)).await, Err(StoreError::BytesFull(_))));
        again.put_file(file(2, ann, 10, 1220)).await.unwrap();
        again.close().await;
        store.close().await;
    }
}

#[tokio::test]
async fn what_shares_a_transaction_is_told_apart_in_the_log() {
    for database in Database::each().await {
        let store = database.open().await;
        let by = store.by(actor("ann"));
        // A tenant that comes into being with its first key.
        for _ in 0..2 {
            let key = ApiKey::generate().unwrap();
            let tenant = "ann".to_owned();
            let role = Role::Member;
            let new = NewKey { key, tenant, create_tenant: true, role, expires_at: None, only_first: false };
            by.create_key(new).await.unwrap().unwrap();
        }
        let told = log(&store).await;
        let names: Vec<&str> = told.iter().map(|(action, ..)| &**action).collect();
        assert_eq!((&names[..], &*told[0].1), (&["tenant.create", "key.create", "key.create"][..], "ann"));

        // A batch of new adapters and of such as were there, the first of which replaces.
        let ann = store.tenant("ann").await.unwrap().id;
        written(store.put_adapter(new(ann, "a", 1)).await);
        written(store.put_adapter(new(ann, "b", 1)).await);
        let batch = ["a", "c", "b", "d", "e"]
            .map(|name| NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(ann, name, 2) });
        by.put_adapters(batch.to_vec()).await.unwrap().into_iter().for_each(|result| drop(written(result)));
        let entry =
            |action: &str, target: &str, detail: &str| (action.to_owned(), target.to_owned(), Some(detail.to_owned()));
        let expected =
            [entry("adapter.upload", "c", r#"{"adapters":3}"#), entry("adapter.replace", "a", r#"{"adapters":2}"#)];
        assert_eq!(log(&store).await[3..], expected);
        store.close().await;
    }
}
