use super::*;

#[tokio::test]
async fn what_is_uploaded_is_read_back_listed_and_loaded() {
    for database in Database::each().await {
        let store = database.open().await;
        let mut upload = new(BUILT_IN_TENANT, "alice", 1);
        upload.metadata = Some(r#"{"who":"Ålice"}"#.into());
        let (frame, forced_onto) = (Some(vec![1, 2, 3]), Some(Fingerprint([4; 32])));
        upload.contents.facts = Facts { frame, forced_onto, ..facts() }.into();
        let record = written(store.put_adapter(upload.clone()).await);
        assert_eq!((&*record.owner, &*record.name, record.public), ("default", "alice", false));
        assert_eq!(record.contents, upload.contents);
        assert!(record.created_at > 1_700_000_000);
        assert_eq!(store.adapter(BUILT_IN_TENANT, "alice").await.unwrap(), record);
        let bob = NewAdapter { name: "bob".into(), ..upload };
        written(store.put_adapter(bob).await);
        store.close().await;
        assert!(matches!(store.put_adapter(new(BUILT_IN_TENANT, "x", 2)).await, Err(StoreError::Closed)));

        let store = database.open().await;
        assert_eq!(store.adapter(BUILT_IN_TENANT, "alice").await.unwrap(), record);
        let loaded = all(&store).await;
        assert_eq!(loaded.len(), 2);
        let (alice, bob) =
            (&loaded[&(BUILT_IN_TENANT, "alice".to_owned())], &loaded[&(BUILT_IN_TENANT, "bob".to_owned())]);
        assert_eq!((&alice.contents, alice.id), (&record.contents, record.id));
        assert!(Arc::ptr_eq(&alice.contents.facts, &bob.contents.facts), "facts are shared in memory");
        store.close().await;
    }
}

#[tokio::test]
async fn pages_follow_the_names() {
    for database in Database::each().await {
        let store = database.open().await;
        let other = store.create_tenant("other").await.unwrap().id;
        for (index, name) in ["b", "B", "a", "a-1", "a.1", "a_1", "a1"].iter().enumerate() {
            written(store.put_adapter(new(BUILT_IN_TENANT, name, index as u64)).await);
        }
        for (name, public) in [("a", true), ("aa", true), ("hidden", false)] {
            written(store.put_adapter(NewAdapter { public: Some(public), ..new(other, name, 99) }).await);
        }
        let page = async |tenant, prefix: &str, after: Option<&str>, limit| -> Vec<String> {
            let records = store.list_adapters(tenant, prefix, after, limit).await.unwrap();
            records.into_iter().map(|record| format!("{}/{}", record.owner, record.name)).collect()
        };
        let everything = page(BUILT_IN_TENANT, "", None, 100).await;
        assert_eq!(
            everything,
            [
                "default/B",
                "default/a",
                "default/a-1",
                "default/a.1",
                "default/a1",
                "default/a_1",
                "other/aa",
                "default/b"
            ]
        );
        assert_eq!(page(BUILT_IN_TENANT, "a", None, 2).await, ["default/a", "default/a-1"]);
        assert_eq!(page(BUILT_IN_TENANT, "a", Some("a-1"), 2).await, ["default/a.1", "default/a1"]);
        assert_eq!(page(BUILT_IN_TENANT, "a", Some("a_1"), 9).await, ["other/aa"]);
        assert_eq!(page(other, "", None, 9).await, ["other/a", "other/aa", "other/hidden"]);
        assert_eq!(page(other, "zz", None, 9).await, [""; 0]);
        store.close().await;
    }
}

#[tokio::test]
async fn generations_are_kept_compared_and_pointed_at_again() {
    for database in Database::each().await {
        let store = database.open().await;
        let put = async |number: u64, on_conflict| {
            store.put_adapter(NewAdapter { on_conflict, ..new(BUILT_IN_TENANT, "a", number) }).await
        };
        assert!(matches!(put(1, OnConflict::Replace(None)).await, Err(StoreError::AdapterNotFound)));
        let first = written(put(1, OnConflict::NewGeneration).await);
        assert!(matches!(put(2, OnConflict::Error).await, Err(StoreError::NameTaken)));
        let generation = |number| contents(number).generation;
        match put(2, OnConflict::Replace(Some(generation(1)))).await.unwrap() {
            Stored::New { record, replaced } => {
                assert_eq!((record.id, replaced), (first.id, Some(generation(1))));
            }
            other => panic!("{other:?}"),
        }
        match put(3, OnConflict::Replace(Some(generation(1)))).await {
            Err(StoreError::GenerationMismatch { current }) => assert_eq!(current, generation(2)),
            other => panic!("{other:?}"),
        }
        written(put(3, OnConflict::NewGeneration).await);
        // The first again: the same generation, not another.
        written(put(1, OnConflict::NewGeneration).await);
        let history = async || -> Vec<(i64, Generation, bool)> {
            let generations = store.generations(first.id, None, 10).await.unwrap();
            assert!(generations.iter().all(|each| each.bytes == 26 && *each.facts == facts()));
            generations.iter().map(|each| (each.seq, each.generation, each.current)).collect()
        };
        assert_eq!(history().await, [(3, generation(3), false), (2, generation(2), false), (1, generation(1), true)]);
        let (record, before) = store.rollback(BUILT_IN_TENANT, "a", generation(2)).await.unwrap();
        assert_eq!((record.contents, before), (contents(2), generation(1)));
        assert_eq!(history().await[1], (2, generation(2), true));
        assert!(matches!(
            store.rollback(BUILT_IN_TENANT, "a", generation(9)).await,
            Err(StoreError::GenerationNotFound)
        ));
        assert!(matches!(store.rollback(BUILT_IN_TENANT, "b", generation(1)).await, Err(StoreError::AdapterNotFound)));
        assert_eq!(all(&store).await.into_values().next().unwrap().contents, contents(2));
        store.close().await;
    }
}

/// Notes the generations that were pruned.
#[derive(Default)]
struct Pruned(parking_lot::Mutex<Vec<Generation>>);

impl Observer for Pruned {
    fn committed(&self, change: Change) {
        if let Change::Pruned { generations, .. } = change {
            self.0.lock().extend(generations);
        }
    }
}

#[tokio::test]
async fn a_history_has_an_end_and_is_read_in_pages() {
    const MORE: u64 = 3;
    let most = u64::from(HISTORY);
    let generation = |number| contents(number).generation;
    for database in Database::each().await {
        let store = database.open().await;
        let pruned = Arc::new(Pruned::default());
        store.observe(pruned.clone());
        let put = async |numbers: std::ops::Range<u64>| {
            // What is stored may come to a whole history and no byte more.
            let room = Room { adapters: None, bytes: Some(most * 26 + 2) };
            let items = numbers.map(|number| NewAdapter {
                on_conflict: OnConflict::NewGeneration,
                room,
                ..new(BUILT_IN_TENANT, "a", number)
            });
            store.put_adapters(items.collect()).await.unwrap().into_iter().map(written).next_back().unwrap()
        };
        let id = put(0..most).await.id;
        // The oldest is current, and stays until another is.
        store.rollback(BUILT_IN_TENANT, "a", generation(0)).await.unwrap();
        assert_eq!(store.adapter(BUILT_IN_TENANT, "a").await.unwrap().contents, contents(0));
        assert!(pruned.0.lock().is_empty());
        let last = put(most..most + MORE).await;
        assert_eq!(last.contents, contents(most + MORE - 1));
        assert_eq!(*pruned.0.lock(), (0..MORE).map(generation).collect::<Vec<_>>(), "what is cached of them goes too");

        let page = async |after: Option<u64>, limit| -> Vec<Generation> {
            let page = store.generations(id, after.map(generation), limit).await.unwrap();
            page.into_iter().map(|each| each.generation).collect()
        };
        let whole: Vec<Generation> = (MORE..most + MORE).rev().map(generation).collect();
        assert_eq!(page(None, HISTORY + 1).await, whole);
        assert_eq!(page(None, 2).await, whole[..2]);
        assert_eq!(page(Some(most), 2).await, [generation(most - 1), generation(most - 2)]);
        assert_eq!(page(Some(MORE), 2).await, []);
        assert_eq!(page(Some(0), 2).await, [], "before one that is gone there is none");
        for gone in 0..MORE {
            let back = store.rollback(BUILT_IN_TENANT, "a", generation(gone)).await;
            assert!(matches!(back, Err(StoreError::GenerationNotFound)), "{back:?}");
        }
        store.rollback(BUILT_IN_TENANT, "a", generation(MORE)).await.unwrap();
        // One that it has is pointed at again, and none goes for it.
        put(most..most + 1).await;
        assert_eq!(page(None, HISTORY + 1).await, whole);
        store.close().await;
    }
}

#[tokio::test]
async fn a_generation_is_found_without_reading_the_others() {
    let database = Database::sqlite();
    let store = database.open().await;
    for sql in [crate::store::adapters::SEQ_OF, crate::store::adapters::NEWEST_AND_SEQ_OF] {
        let explain = sqlx::AssertSqlSafe(format!("EXPLAIN QUERY PLAN {sql}"));
        let query = sqlx::query(explain).bind(1i64).bind(&[0u8; 16][..]);
        let rows = query.fetch_all(&store.pool).await.unwrap();
        let plan: Vec<String> = rows.iter().map(|row| sqlx::Row::get(row, 3)).collect();
        let steps: Vec<&String> = plan.iter().filter(|step| step.contains("generations")).collect();
        let by = |key: &str| steps.iter().any(|step| step.ends_with(key));
        assert!(by("PRIMARY KEY (adapter=? AND seq=?)"), "{plan:?}");
        assert!(by("generations_again (adapter=? AND generation=? AND seq>?)"), "{plan:?}");
        // The newest of all is the first of that key, backwards.
        assert!(steps.iter().all(|step| step.contains("SEARCH")) && steps.len() <= 3, "{plan:?}");
    }
    store.close().await;
}

#[tokio::test]
async fn metadata_and_visibility_stay_unless_given() {
    for database in Database::each().await {
        let store = database.open().await;
        let base = NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(BUILT_IN_TENANT, "a", 1) };
        let first = NewAdapter { public: Some(true), metadata: Some(r#"{"n":1}"#.into()), ..base.clone() };
        written(store.put_adapter(first).await);
        let record = written(store.put_adapter(NewAdapter { contents: contents(2), ..base.clone() }).await);
        assert_eq!((record.public, &*record.metadata), (true, r#"{"n":1}"#));
        let next = NewAdapter { public: Some(false), metadata: Some("{}".into()), contents: contents(3), ..base };
        let record = written(store.put_adapter(next).await);
        assert_eq!((record.public, &*record.metadata), (false, "{}"));
        assert_eq!(store.adapter(BUILT_IN_TENANT, "a").await.unwrap(), record);
        store.close().await;
    }
}

#[tokio::test]
async fn tenants_do_not_see_or_touch_each_other() {
    for database in Database::each().await {
        let store = database.open().await;
        let (a, b) = (store.create_tenant("a").await.unwrap().id, store.create_tenant("b").await.unwrap().id);
        written(store.put_adapter(new(a, "x", 1)).await);
        written(store.put_adapter(new(b, "x", 2)).await);
        written(store.put_adapter(new(a, "only-a", 3)).await);
        assert!(matches!(store.adapter(b, "only-a").await, Err(StoreError::AdapterNotFound)));
        assert!(matches!(store.delete_adapter(b, "only-a").await, Err(StoreError::AdapterNotFound)));
        assert_eq!(store.adapter(a, "x").await.unwrap().contents, contents(1));
        let share = NewAdapter { public: Some(true), on_conflict: OnConflict::NewGeneration, ..new(a, "only-a", 3) };
        written(store.put_adapter(share).await);
        let seen = store.adapter(b, "only-a").await.unwrap();
        assert_eq!((&*seen.owner, seen.public), ("a", true));
        assert_eq!(store.adapter_name(b, seen.id).await.unwrap(), "only-a");
        let rival = NewAdapter { public: Some(true), ..new(b, "only-a", 4) };
        assert!(matches!(store.put_adapter(rival).await, Err(StoreError::PublicNameTaken)));
        written(store.put_adapter(new(b, "only-a", 4)).await);
        assert_eq!(store.adapter(b, "only-a").await.unwrap().contents, contents(4), "the own one comes first");
        assert!(matches!(store.put_adapter(new(TenantId(999), "x", 1)).await, Err(StoreError::TenantNotFound)));
        store.close().await;
    }
}

#[tokio::test]
async fn a_batch_answers_each_item_in_order() {
    for database in Database::each().await {
        let store = database.open().await;
        written(store.put_adapter(new(BUILT_IN_TENANT, "n7", 7)).await);
        // Across several statements of every size, with names that come twice, one of them to replace.
        let mut items: Vec<_> = (0..1500).map(|i| new(BUILT_IN_TENANT, &format!("n{i}"), i)).collect();
        items.push(new(BUILT_IN_TENANT, "n3", 9000));
        items.push(NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(BUILT_IN_TENANT, "n4", 9001) });
        items.push(new(TenantId(77), "n5", 9002));
        items.push(new(BUILT_IN_TENANT, "last", 9003));
        let results = store.put_adapters(items).await.unwrap();
        assert_eq!(results.len(), 1504);
        for (index, result) in results.iter().enumerate() {
            match (index, result) {
                (7 | 1500, Err(StoreError::NameTaken)) | (1502, Err(StoreError::TenantNotFound)) => {}
                (1501, Ok(Stored::New { replaced: Some(old), .. })) => assert_eq!(*old, contents(4).generation),
                (_, Ok(Stored::New { replaced: None, .. })) if ![7, 1500, 1501, 1502].contains(&index) => {}
                other => panic!("{other:?}"),
            }
        }
        let loaded = all(&store).await;
        assert_eq!(loaded.len(), 1501);
        assert_eq!(loaded[&(BUILT_IN_TENANT, "n4".to_owned())].contents, contents(9001));
        assert_eq!(loaded[&(BUILT_IN_TENANT, "n1499".to_owned())].contents, contents(1499));
        assert!(store.put_adapters(Vec::new()).await.unwrap().is_empty());
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_at_the_same_time_are_all_written_once() {
    for database in Database::each().await {
        let store = database.open().await;
        // 40 writers race for each of 25 names.
        let tasks: Vec<_> = (0..1000u64)
            .map(|i| {
                let store = store.clone();
                tokio::spawn(async move { store.put_adapter(new(BUILT_IN_TENANT, &format!("n{}", i % 25), i)).await })
            })
            .collect();
        let mut winners = HashMap::new();
        for task in tasks {
            match task.await.unwrap() {
                Ok(Stored::New { record, .. }) => {
                    assert!(
                        winners.insert(record.name.clone(), record).is_none(),
                        "two were told that they have the name"
                    );
                }
                Err(StoreError::NameTaken) => {}
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(winners.len(), 25);
        for (name, record) in winners {
            assert_eq!(store.adapter(BUILT_IN_TENANT, &name).await.unwrap(), record);
        }
        store.close().await;
    }
}

#[tokio::test]
async fn deletion_erases_the_numbers_and_frees_the_name() {
    for database in Database::each().await {
        let store = database.open().await;
        let secret = b"these numbers are to be gone";
        let mut upload =
            NewAdapter { metadata: Some(r#"{"secret":"metadata"}"#.into()), ..new(BUILT_IN_TENANT, "a", 1) };
        upload.contents.data = secret.to_vec();
        let old = written(store.put_adapter(upload).await);
        written(store.put_adapter(new(BUILT_IN_TENANT, "b", 2)).await);
        assert_eq!(store.delete_adapter(BUILT_IN_TENANT, "a").await.unwrap(), old.id);
        assert!(matches!(store.delete_adapter(BUILT_IN_TENANT, "a").await, Err(StoreError::AdapterNotFound)));
        assert!(matches!(store.adapter(BUILT_IN_TENANT, "a").await, Err(StoreError::AdapterNotFound)));
        assert!(store.generations(old.id, None, 10).await.unwrap().is_empty());
        assert_eq!(all(&store).await.len(), 1);
        if let Location::Directory(path) = &database.config.location {
            // Within seconds it is in no file, while the store is open.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while holds(path, secret) || holds(path, b"metadata\"}") {
                assert!(std::time::Instant::now() < deadline, "deleted bytes are still on disk");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
        let again = written(store.put_adapter(new(BUILT_IN_TENANT, "a", 3)).await);
        assert_ne!(again.id, old.id);
        store.close().await;
    }
}

fn holds(directory: &std::path::Path, bytes: &[u8]) -> bool {
    let files = std::fs::read_dir(directory).unwrap();
    files.into_iter().any(|file| {
        let text = std::fs::read(file.unwrap().path()).unwrap();
        text.windows(bytes.len()).any(|window| window == bytes)
    })
}

#[tokio::test]
async fn an_idempotency_key_makes_one_upload() {
    for database in Database::each().await {
        let store = database.open().await;
        let keyed = |name: &str, request: u8, key: &str| NewAdapter {
            idempotency: Some(Idempotency {
                route: "POST /adapters",
                key: key.into(),
                request_hash: [request; 32],
                respond: Arc::new(|record| format!("made {} {}", record.name, record.id.0)),
            }),
            ..new(BUILT_IN_TENANT, name, 1)
        };
        let kept = async |request: u8| store.kept_answer(BUILT_IN_TENANT, "POST /adapters", "k", &[request; 32]).await;
        assert_eq!(kept(1).await.unwrap(), None);
        // All in one batch: the retries are seen in the same transaction.
        let results = store
            .put_adapters(vec![keyed("a", 1, "k"), keyed("a", 1, "k"), keyed("b", 2, "k"), keyed("a", 1, "l")])
            .await
            .unwrap();
        let id = match &results[0] {
            Ok(Stored::New { record, .. }) => record.id.0,
            other => panic!("{other:?}"),
        };
        let answer = format!("made a {id}");
        assert!(matches!(&results[1], Ok(Stored::Replayed(text)) if *text == answer), "{:?}", results[1]);
        assert!(matches!(&results[2], Err(StoreError::IdempotencyMismatch)));
        assert!(
            matches!(&results[3], Err(StoreError::NameTaken)),
            "another key is another upload, and no answer is kept"
        );
        assert_eq!(kept(1).await.unwrap(), Some(answer));
        assert!(matches!(kept(2).await, Err(StoreError::IdempotencyMismatch)));
        let other = store.create_tenant("other").await.unwrap().id;
        assert_eq!(store.kept_answer(other, "POST /adapters", "k", &[1; 32]).await.unwrap(), None);
        written(store.put_adapter(keyed("c", 3, "l")).await);
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_numbered_in_the_order_of_commits() {
    for database in Database::each().await {
        // Two writers, as of two processes.
        let stores = [database.open().await, database.open().await];
        let tasks: Vec<_> = (0..200u64)
            .map(|i| {
                let store = stores[i as usize % 2].clone();
                tokio::spawn(async move {
                    let first = written(store.put_adapter(new(BUILT_IN_TENANT, &format!("n{i}"), i)).await);
                    // What begins after an acknowledged write has a larger number.
                    let second = written(store.put_adapter(new(BUILT_IN_TENANT, &format!("m{i}"), i)).await);
                    assert!(second.id.0 > first.id.0);
                    [first.id.0, second.id.0]
                })
            })
            .collect();
        let mut seen = std::collections::HashSet::new();
        for task in tasks {
            for id in task.await.unwrap() {
                assert!(seen.insert(id), "{id} was given twice");
            }
        }
        for store in &stores {
            assert_eq!(all(store).await.len(), 400);
            store.close().await;
        }
    }
}

/// Is slow, and then remembers that it was told.
#[derive(Default)]
struct Slow(std::sync::atomic::AtomicBool);

impl Observer for Slow {
    fn committed(&self, _: Change) {
        std::thread::sleep(std::time::Duration::from_millis(200));
        self.0.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn who_reads_a_change_comes_after_whoever_is_told_of_it() {
    for database in Database::each().await {
        let store = database.open().await;
        let slow = Arc::new(Slow::default());
        store.observe(slow.clone());
        let writing = {
            let store = store.clone();
            tokio::spawn(async move { store.put_adapter(new(BUILT_IN_TENANT, "a", 1)).await })
        };
        while store.own_adapter(BUILT_IN_TENANT, "a").await.unwrap().is_none() {
            tokio::task::yield_now().await;
        }
        assert!(slow.0.load(std::sync::atomic::Ordering::SeqCst), "the store shows what the memory has not");
        writing.await.unwrap().unwrap();
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_comes_and_goes_is_never_taken_for_damaged() {
    for database in Database::each().await {
        let store = database.open().await;
        let changing = {
            let store = store.clone();
            tokio::spawn(async move {
                for number in 0..300 {
                    written(store.put_adapter(new(BUILT_IN_TENANT, "a", number)).await);
                    store.delete_adapter(BUILT_IN_TENANT, "a").await.unwrap();
                }
            })
        };
        while !changing.is_finished() {
            store.own_adapter(BUILT_IN_TENANT, "a").await.unwrap();
        }
        changing.await.unwrap();
        store.close().await;
    }
}
