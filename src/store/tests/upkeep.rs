//! Damaged rows, full disks, and copies of a database that is in use.

use std::path::{Path, PathBuf};

use super::*;
use crate::tenant::{ApiKey, AuthError, Directory, LimitChanges, Limits};

pub(super) fn directory(database: &Database) -> &Path {
    match &database.config.location {
        Location::Directory(path) => path,
        Location::Postgres(_) => unreachable!("these are tests of the embedded database"),
    }
}

/// Statements of somebody who is not the program.
pub(super) async fn tamper(directory: &Path, statements: &str) {
    let connector = Connector::new(&StoreConfig::new(Location::Directory(directory.into()))).unwrap();
    let mut connection = connector.connect().await.unwrap();
    let statements = format!("PRAGMA foreign_keys = OFF; {statements}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(statements)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

pub(super) async fn loaded(store: &Store) -> (Vec<String>, Vec<CorruptAdapter>) {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    let each = |row: std::result::Result<LoadedAdapter, CorruptAdapter>| match row {
        Ok(adapter) => good.push(adapter.name),
        Err(corrupt) => bad.push(corrupt),
    };
    store.load_all(each).await.unwrap();
    good.sort();
    bad.sort_by(|a, b| a.name.cmp(&b.name));
    (good, bad)
}

#[tokio::test]
async fn rows_that_cannot_be_read_are_named_and_stop_nobody() {
    let database = Database::sqlite();
    let store = database.open().await;
    let names = ["a", "b", "c", "d", "e", "f"];
    for (number, name) in names.iter().enumerate() {
        written(store.put_adapter(new(BUILT_IN_TENANT, name, number as u64)).await);
    }
    let row = |name: &str| format!("adapter = (SELECT id FROM adapters WHERE name = '{name}')");
    tamper(
        directory(&database),
        &format!(
            "UPDATE generations SET generation = x'0102' WHERE {}; DELETE FROM generations WHERE {}; UPDATE generations SET facts = 999 WHERE {};",
            row("b"),
            row("c"),
            row("d"),
        ),
    )
    .await;
    let (good, bad) = loaded(&store).await;
    assert_eq!(good, ["a", "e", "f"]);
    assert_eq!(bad.iter().map(|bad| &*bad.name).collect::<Vec<_>>(), ["b", "c", "d"]);
    assert!(bad.iter().all(|bad| bad.tenant == BUILT_IN_TENANT && bad.id.0 > 0 && !bad.cause.is_empty()), "{bad:?}");
    // Lists go on behind them, however short the pages are.
    let mut listed = Vec::new();
    while let Some(last) = {
        let after = listed.last().cloned();
        let page: Vec<AdapterRecord> = store.list_adapters(BUILT_IN_TENANT, "", after.as_deref(), 1).await.unwrap();
        page.into_iter().next()
    } {
        listed.push(last.name);
    }
    assert_eq!(listed, ["a", "e", "f"]);
    // Their owner mends or deletes them, and uploads beside theirs are not touched.
    let replace = |name: &str, number| NewAdapter {
        on_conflict: OnConflict::NewGeneration,
        ..new(BUILT_IN_TENANT, name, number)
    };
    let batch = vec![replace("b", 20), replace("c", 21), new(BUILT_IN_TENANT, "g", 22)];
    for result in store.put_adapters(batch).await.unwrap() {
        written(result);
    }
    written(store.put_adapter(replace("d", 23)).await);
    let (good, bad) = loaded(&store).await;
    assert_eq!((good.len(), bad.len()), (7, 0));
    tamper(directory(&database), &format!("UPDATE generations SET generation = x'0102' WHERE {}", row("e"))).await;
    store.delete_adapter(BUILT_IN_TENANT, "e").await.unwrap();
    assert_eq!(loaded(&store).await.0.len(), 6);
    store.close().await;
}

/// A new key of a tenant's, and its public identifier.
pub(super) async fn key_of(store: &Store, tenant: &str) -> (ApiKey, String) {
    let key = ApiKey::generate().unwrap();
    let record = store.create_key(super::keys::key(&key, tenant)).await.unwrap().unwrap();
    (key, record.id)
}

#[tokio::test]
async fn a_damaged_key_never_works_and_nobody_else_notices() {
    let database = Database::sqlite();
    let store = database.open().await;
    let good = key_of(&store, "alice").await;
    let damage = ["role = 'king'", "role = x'61'", "expires_at = 'soon'", "revoked_at = x'00'", "created_at = 'once'"];
    let mut bad = Vec::new();
    for damage in damage {
        let key = key_of(&store, "alice").await;
        tamper(directory(&database), &format!("UPDATE keys SET {damage} WHERE id = '{}'", key.1)).await;
        bad.push((damage, key));
    }
    let cut = key_of(&store, "alice").await;
    tamper(directory(&database), &format!("UPDATE keys SET hash = x'0102' WHERE id = '{}'", cut.1)).await;
    let callers = Directory::new(Arc::new(store.clone()), Arc::default());
    for (damage, (key, id)) in &bad {
        match callers.verify(key.secret(), None).await {
            Err(AuthError::Damaged(words)) => assert!(words.contains(&**id), "{words}"),
            other => panic!("{damage}: {other:?}"),
        }
    }
    assert_eq!(callers.verify(cut.0.secret(), None).await, Err(AuthError::UnknownKey), "nothing has its hash");
    assert!(callers.verify(good.0.secret(), None).await.is_ok());
    let listed = store.keys(store.tenant("alice").await.unwrap().id).await.unwrap();
    assert_eq!(listed.iter().map(|key| &*key.id).collect::<Vec<_>>(), [&*good.1]);
    let mut named: Vec<String> = store.damaged_rows().await.unwrap().into_iter().map(|row| row.name).collect();
    let mut expected: Vec<String> = bad.iter().map(|(_, (_, id))| id.clone()).chain([cut.1]).collect();
    named.sort();
    expected.sort();
    assert_eq!(named, expected);

    // An admin is rid of it; what does not work cannot be rotated into what does.
    let (key, id) = &bad[0].1;
    let rotation = Rotation { key: ApiKey::generate().unwrap(), grace: 0, expires_at: None };
    assert!(matches!(store.rotate_key(id, rotation).await, Err(StoreError::Damaged(_))));
    assert!(matches!(store.key(id).await, Err(StoreError::Damaged(_))));
    store.revoke_key(id).await.unwrap();
    assert!(callers.verify(key.secret(), None).await.is_err());
    store.close().await;
}

#[tokio::test]
async fn a_damaged_tenant_shuts_out_its_own_keys_and_nobody_else() {
    let database = Database::sqlite();
    let store = database.open().await;
    let mut keys = HashMap::new();
    for name in ["a", "b", "c", "d", "e"] {
        keys.insert(name, key_of(&store, name).await.0);
    }
    let tenant_c = store.tenant("c").await.unwrap().id;
    for (number, name) in ["whole", "spoilt", "bare"].into_iter().enumerate() {
        written(store.put_adapter(new(tenant_c, name, number as u64)).await);
    }
    let row = |name: &str| format!("adapter = (SELECT id FROM adapters WHERE name = '{name}')");
    tamper(
        directory(&database),
        &format!(
            "UPDATE tenants SET max_adapters = 'many' WHERE name = 'b'; UPDATE tenants SET weight = -1 WHERE name = 'c'; \
             UPDATE tenants SET created_at = x'00' WHERE name = 'd'; \
             UPDATE generations SET generation = x'0102' WHERE {}; DELETE FROM generations WHERE {}",
            row("spoilt"),
            row("bare")
        ),
    )
    .await;
    let callers = Directory::new(Arc::new(store.clone()), Arc::default());
    for (name, key) in &keys {
        let verified = callers.verify(key.secret(), None).await;
        match *name {
            "a" | "e" => assert_eq!(&*verified.unwrap().tenant_name, *name),
            _ => assert!(matches!(verified, Err(AuthError::Damaged(_))), "{name}: {verified:?}"),
        }
    }
    let named: Vec<DamagedRow> = store.damaged_rows().await.unwrap();
    let named: Vec<_> = named.iter().map(|row| (row.kind, &*row.name)).collect();
    assert_eq!(named, [(Damaged::Tenant, "b"), (Damaged::Tenant, "c"), (Damaged::Tenant, "d")], "and not their keys");
    // Lists go on behind them, however short the pages are.
    let mut listed: Vec<String> = Vec::new();
    while let Some(next) = store.tenants(listed.last().map(String::as_str), 1).await.unwrap().pop() {
        listed.push(next.name);
    }
    assert_eq!(listed, ["a", "default", "e"]);
    assert!(matches!(store.tenant("b").await, Err(StoreError::Damaged(_))));

    // An admin mends its limits, or deletes it, spoilt adapters and all.
    let changes = || LimitChanges { weight: Some(Some(3)), ..LimitChanges::default() };
    let mended = store.set_limits("b", changes()).await.unwrap();
    assert_eq!((mended.limits.adapters, mended.limits.weight), (None, Some(3)));
    assert_eq!(store.tenant("b").await.unwrap(), mended);
    assert!(callers.verify(keys["b"].secret(), None).await.is_ok());
    assert!(matches!(store.set_limits("d", changes()).await, Err(StoreError::Damaged(_))));
    for name in ["c", "d"] {
        store.delete_tenant(name).await.unwrap();
        assert_eq!(callers.verify(keys[name].secret(), None).await, Err(AuthError::UnknownKey));
    }
    assert!(store.damaged_rows().await.unwrap().is_empty());
    store.close().await;
}

#[tokio::test]
async fn a_damaged_job_has_failed_and_holds_up_nobody() {
    let database = Database::sqlite();
    let store = database.open().await;
    let bob = store.create_tenant("bob").await.unwrap().id;
    let job = |number: u32, tenant| NewJob {
        id: format!("ftjob-{number:032x}"),
        tenant,
        name: format!("name{number}"),
        name_must_be_free: true,
        status: JobStatus::Queued,
        spec: "{}".into(),
        steps: 10,
        data: vec![(JobData::Training, b"train".to_vec())],
        limits: Limits::default(),
        most: 10,
        key: None,
        event: NewEvent { kind: "status", level: EventLevel::Info, message: "made".into(), data: "{}".into() },
    };
    for number in 1..=5 {
        store.create_job(job(number, BUILT_IN_TENANT)).await.unwrap();
    }
    store.create_job(job(6, bob)).await.unwrap();
    let damage = ["steps = -10", "status = 'runing'", "attempt = 'first'", "spec = x'00ff'"];
    for (number, damage) in (1..).zip(damage) {
        tamper(directory(&database), &format!("UPDATE jobs SET {damage} WHERE id = 'ftjob-{number:032x}'")).await;
    }
    tamper(directory(&database), "UPDATE tenants SET max_running_jobs = 'some' WHERE name = 'bob'").await;
    let listed = store.jobs(BUILT_IN_TENANT, None, 10).await.unwrap();
    assert_eq!(listed.len(), 5);
    for job in &listed[1..] {
        assert!(job.status == JobStatus::Failed && job.damaged.is_some() && job.name.starts_with("name"), "{job:?}");
        assert!(matches!(
            store.resume_job(BUILT_IN_TENANT, &job.id).await,
            Err(StoreError::JobStatus(JobStatus::Failed))
        ));
    }
    let limits = StartLimits { running: 10, running_of_tenant: 10, trained_tokens_per_day: None };
    let claim = || store.claim_job(limits, "here", Vec::new(), Turns::default());
    assert_eq!(claim().await.unwrap().unwrap().name, "name5", "the only one whose row and tenant can be read");
    assert_eq!(claim().await.unwrap(), None);

    let unfinished = store.unfinished_jobs().await.unwrap();
    assert_eq!(unfinished.len(), 6);
    for job in unfinished.iter().filter(|job| job.damaged.is_some()) {
        store.set_job_apart(&job.id, "{\"code\":\"job_damaged\"}".into()).await.unwrap();
        assert_eq!(store.job(job.tenant, &job.id).await.unwrap().status, JobStatus::Failed);
        assert_eq!(store.job_data(&job.id, JobData::Training).await.unwrap(), None);
    }
    assert_eq!(store.unfinished_jobs().await.unwrap().len(), 2);
    let again = NewJob { name: "name1".into(), ..job(7, BUILT_IN_TENANT) };
    assert!(matches!(store.create_job(again).await.unwrap(), JobStored::New(_)), "the name is free");
    let mended = LimitChanges { running_jobs: Some(None), ..LimitChanges::default() };
    store.set_limits("bob", mended).await.unwrap();
    assert_eq!(claim().await.unwrap().unwrap().tenant, bob);
    store.close().await;
}

#[tokio::test]
async fn a_full_disk_fails_writes_and_not_reads() {
    let mut database = Database::sqlite();
    database.config.most_bytes = Some(400 << 10);
    let store = database.open().await;
    let mut stored = 0u64;
    let error = loop {
        let batch = (0..500).map(|i| new(BUILT_IN_TENANT, &format!("a{stored}-{i}"), stored << 16 | i)).collect();
        match store.put_adapters(batch).await {
            Ok(results) => results.into_iter().for_each(|result| drop(written(result))),
            Err(error) => break error,
        }
        stored += 1;
    };
    assert!(stored > 0, "something fits");
    assert_eq!(error.unwritable(), Some(Unwritable::Full), "{error}");
    assert_eq!(all(&store).await.len() as u64, stored * 500, "nothing of the failed batch, all of the others");
    store.delete_adapter(BUILT_IN_TENANT, "a0-0").await.unwrap();
    assert!(store.check(Check::Full).await.unwrap().is_empty());
    store.close().await;
    database.config.most_bytes = None;
    let store = database.open().await;
    written(store.put_adapter(new(BUILT_IN_TENANT, "later", 1)).await);
    store.close().await;
}

#[tokio::test]
async fn what_cannot_be_written_is_told_from_other_failures() {
    assert_eq!(StoreError::NameTaken.unwritable(), None);
    assert_eq!(StoreError::Closed.unwritable(), None);
    let gone = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
    assert_eq!(StoreError::from(sqlx::Error::Io(gone)).unwritable(), Some(Unwritable::Unreachable));
    assert_eq!(StoreError::from(sqlx::Error::PoolTimedOut).unwritable(), Some(Unwritable::Unreachable));
    assert_eq!(StoreError::from(sqlx::Error::RowNotFound).unwritable(), None);
    let database = Database::sqlite();
    let store = database.open().await;
    let refused = async |statement: &'static str| {
        let connector = Connector::new(&database.config).unwrap();
        let mut connection = connector.connect().await.unwrap();
        let error = sqlx::raw_sql(statement).execute(&mut connection).await.unwrap_err();
        StoreError::from(error).unwritable()
    };
    assert_eq!(
        refused("PRAGMA query_only = ON; UPDATE counter SET value = value + 1").await,
        Some(Unwritable::ReadOnly)
    );
    assert_eq!(refused("UPDATE no_such_table SET x = 1").await, None);
    store.close().await;
}

#[tokio::test]
async fn a_damaged_database_is_found_by_the_check() {
    let database = Database::sqlite();
    let store = database.open().await;
    let batch = (0..2000).map(|i| new(BUILT_IN_TENANT, &format!("a{i}"), i)).collect();
    store.put_adapters(batch).await.unwrap();
    assert!(store.check(Check::Quick).await.unwrap().is_empty());
    assert!(store.check(Check::Full).await.unwrap().is_empty());
    store.close().await;
    let file = directory(&database).join(FILE_NAME);
    let mut bytes = std::fs::read(&file).unwrap();
    // Pages in the middle, which are of the tables that adapters are in.
    let middle = bytes.len() / 2 / 4096 * 4096;
    bytes[middle..middle + 3 * 4096].fill(0xaa);
    std::fs::write(&file, bytes).unwrap();
    let store = database.open().await;
    for check in [Check::Quick, Check::Full] {
        assert!(!store.check(check).await.unwrap().is_empty());
    }
    store.close().await;
}

/// A folder beside the database, which goes with it.
fn beside(database: &Database, name: &str) -> PathBuf {
    directory(database).parent().unwrap().join(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_while_others_write_is_of_one_instant() {
    let database = Database::sqlite();
    let store = database.open().await;
    let (writing, source) = (store.clone(), directory(&database).to_owned());
    let (begun, first) = tokio::sync::oneshot::channel();
    let writer = tokio::spawn(async move {
        let mut begun = Some(begun);
        for turn in 0..200u64 {
            let batch = (0..50).map(|i| new(BUILT_IN_TENANT, &format!("t{turn}-{i}"), turn << 16 | i)).collect();
            writing.put_adapters(batch).await.unwrap();
            begun.take().map(|begun| begun.send(()));
        }
    });
    first.await.unwrap();
    let copy = beside(&database, "copy, 100% odd?#.db");
    let sum = back_up(&source, &copy).await.unwrap();
    writer.await.unwrap();
    let listed = std::fs::read_to_string(beside(&database, "copy, 100% odd?#.db.sha256")).unwrap();
    assert_eq!(listed, format!("{sum}  copy, 100% odd?#.db\n"));
    let again = back_up(&source, &copy).await.unwrap_err();
    assert!(again.to_string().contains("exists already"), "{again}");

    let target = beside(&database, "restored");
    restore(&copy, &target, false).await.unwrap();
    let restored = Store::open(StoreConfig::new(Location::Directory(target.clone()))).await.unwrap();
    let found = all(&restored).await;
    assert!(!found.is_empty() && found.len() % 50 == 0, "{} adapters: a batch is all or nothing", found.len());
    let original = all(&store).await;
    assert!(found.iter().all(|(name, adapter)| original.get(name) == Some(adapter)));
    restored.close().await;
    assert!(!target.join("restore.part").exists());
    store.close().await;
}

#[tokio::test]
async fn a_restore_refuses_what_would_lose_something() {
    let database = Database::sqlite();
    let store = database.open().await;
    written(store.put_adapter(new(BUILT_IN_TENANT, "kept", 1)).await);
    let copy = beside(&database, "copy.db");
    back_up(directory(&database), &copy).await.unwrap();
    written(store.put_adapter(new(BUILT_IN_TENANT, "later", 2)).await);
    let refused =
        async |from: &Path, force: bool| restore(from, directory(&database), force).await.unwrap_err().to_string();
    assert!(refused(&copy, false).await.contains("not empty"));
    assert!(refused(&copy, true).await.contains("has the database open"));
    assert_eq!(all(&store).await.len(), 2, "nothing was touched");
    store.close().await;

    let cut = beside(&database, "cut.db");
    let bytes = std::fs::read(&copy).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let words = refused(&cut, true).await;
    assert!(words.contains("damaged") || words.contains("malformed"), "{words}");
    std::fs::write(&cut, b"no database at all, but long enough to look at").unwrap();
    assert!(refused(&cut, true).await.contains("cut.db"));
    let mut changed = bytes.clone();
    changed[bytes.len() - 1] ^= 1;
    std::fs::write(&cut, changed).unwrap();
    std::fs::copy(beside(&database, "copy.db.sha256"), beside(&database, "cut.db.sha256")).unwrap();
    assert!(refused(&cut, true).await.contains("SHA-256"));
    let store = database.open().await;
    assert_eq!(all(&store).await.len(), 2, "still nothing was touched");
    store.close().await;

    restore(&copy, directory(&database), true).await.unwrap();
    let store = database.open().await;
    assert_eq!(all(&store).await.into_keys().map(|(_, name)| name).collect::<Vec<_>>(), ["kept"]);
    assert!(directory(&database).join("mote.db.replaced").exists());
    store.close().await;
}

#[tokio::test]
async fn a_backup_of_a_newer_program_is_refused() {
    let database = Database::sqlite();
    database.open().await.close().await;
    let later = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                 SELECT 999, 'later', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1";
    tamper(directory(&database), later).await;
    let copy = beside(&database, "copy.db");
    back_up(directory(&database), &copy).await.unwrap();
    let error = restore(&copy, &beside(&database, "restored"), false).await.unwrap_err();
    assert!(matches!(error, StoreError::NewerSchema { found: 999, .. }), "{error}");
    assert!(back_up(&beside(&database, "nothing here"), &copy).await.unwrap_err().to_string().contains("no such file"));
}

#[tokio::test]
async fn what_restores_replace_is_kept_each_under_its_own_name() {
    let database = Database::sqlite();
    let data = directory(&database).to_owned();
    let copies = ["first", "second", "third"].map(|name| (name, beside(&database, &format!("{name}.db"))));
    for (name, copy) in &copies {
        let store = database.open().await;
        written(store.put_adapter(new(BUILT_IN_TENANT, name, 1)).await);
        store.close().await;
        back_up(&data, copy).await.unwrap();
    }
    for (_, copy) in &copies {
        restore(copy, &data, true).await.unwrap();
    }
    // The original had all three; then came the copies in their order.
    for (file, adapters) in
        [("mote.db.replaced", 3), ("mote.db.replaced.2", 1), ("mote.db.replaced.3", 2), ("mote.db", 3)]
    {
        let opened = beside(&database, "opened");
        std::fs::create_dir(&opened).unwrap();
        std::fs::copy(data.join(file), opened.join("mote.db")).unwrap();
        let store = Store::open(StoreConfig::new(Location::Directory(opened.clone()))).await.unwrap();
        assert_eq!(all(&store).await.len(), adapters, "{file}");
        store.close().await;
        std::fs::remove_dir_all(&opened).unwrap();
    }
}

/// No start makes a new database where a restore was interrupted, and the restore can be made again.
#[tokio::test]
async fn an_interrupted_restore_is_not_taken_for_an_empty_directory() {
    let database = Database::sqlite();
    let data = directory(&database).to_owned();
    let store = database.open().await;
    written(store.put_adapter(new(BUILT_IN_TENANT, "kept", 1)).await);
    store.close().await;
    let copy = beside(&database, "copy.db");
    back_up(&data, &copy).await.unwrap();
    for left in ["mote.db.replaced", "mote.db.replaced.7", "restore.part"] {
        std::fs::rename(data.join("mote.db"), data.join(left)).unwrap();
        if left == "restore.part" {
            std::fs::remove_file(data.join(left)).unwrap();
            std::fs::create_dir(data.join(left)).unwrap();
            std::fs::write(data.join(left).join("mote.db"), "half of it").unwrap();
            std::fs::write(data.join(left).join("mote.db-wal"), "and its log").unwrap();
        }
        let words = Store::open(database.config.clone()).await.unwrap_err().to_string();
        assert!(words.contains(left) && words.contains("mote restore --force"), "{words}");
        assert!(!data.join("mote.db").exists(), "nothing was made");
        restore(&copy, &data, true).await.unwrap();
        let store = database.open().await;
        assert_eq!(all(&store).await.len(), 1, "{left}");
        store.close().await;
        assert!(!data.join("restore.part").exists());
        let _ = std::fs::remove_file(data.join(left));
    }
}
