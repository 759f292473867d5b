use super::*;
use crate::tenant::{ApiKey, KeySource as _, LimitChanges, Overrides, Role};

#[tokio::test]
async fn a_newer_schema_is_refused_in_a_sentence() {
    for database in Database::each().await {
        let store = database.open().await;
        store.close().await;
        let connector = Connector::new(&database.config).unwrap();
        let mut connection = connector.connect().await.unwrap();
        sqlx::query(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
             SELECT 999, 'later', success, checksum, 0 FROM _sqlx_migrations WHERE version = 1",
        )
        .execute(&mut connection)
        .await
        .unwrap();
        connection.close().await.unwrap();
        let error = Store::open(database.config.clone()).await.unwrap_err();
        assert!(matches!(error, StoreError::NewerSchema { found: 999, .. }), "{error}");
        assert!(error.to_string().contains("schema version 999"), "{error}");
    }
}

/// A database as the first program left it, in its tables and its words: a tenant with a key, an adapter of two generations, a public one, and the mark of
/// a deleted one.
async fn written_by_the_first_program(database: &Database, key: &ApiKey) {
    let connector = Connector::new(&database.config).unwrap();
    let mut connection = connector.connect().await.unwrap();
    connector.migrate_to(Some(1), &mut connection).await.unwrap();
    sqlx::raw_sql(
        "INSERT INTO meta (name, value) VALUES ('base', 'one'); \
         INSERT INTO tenants (id, name, created_at, change_seq) VALUES (2, 'ann', 1000, 2); \
         INSERT INTO adapters (id, tenant, name, seq, public, metadata, created_at, updated_at, deleted, change_seq) VALUES \
         (5, 2, 'mine', 2, 0, '{\"a\":1}', 1001, 1002, 0, 6), (7, 1, 'shared', 1, 1, '{}', 1003, 1003, 0, 7), \
         (8, 2, 'gone', 1, 0, '{}', 1004, 1005, 1, 9); \
         UPDATE counter SET value = 9 WHERE id = 1",
    )
    .execute(&mut connection)
    .await
    .unwrap();
    let hash = key.hash();
    sqlx::query(
        "INSERT INTO keys (id, tenant, hash, prefix, role, created_at, change_seq) \
         VALUES ('key_old', 2, $1, $2, 'member', 1000, 3)",
    )
    .bind(&hash.0[..])
    .bind(key.visible_prefix())
    .execute(&mut connection)
    .await
    .unwrap();
    let facts = facts();
    sqlx::query("INSERT INTO facts (id, hash, dtype, scheme, fingerprint) VALUES (4, $1, $2, $3, $4)")
        .bind(&[1u8; 32][..])
        .bind(&*facts.dtype)
        .bind(&*facts.scheme)
        .bind(&facts.fingerprint.0[..])
        .execute(&mut connection)
        .await
        .unwrap();
    for (adapter, seq, number) in [(5i64, 1i64, 1), (5, 2, 2), (7, 1, 3)] {
        let held = contents(number);
        sqlx::query(
            "INSERT INTO generations (adapter, seq, generation, data, facts, created_at) VALUES ($1, $2, $3, $4, 4, 1002)",
        )
        .bind(adapter)
        .bind(seq)
        .bind(&held.generation.0[..])
        .bind(&held.data[..])
        .execute(&mut connection)
        .await
        .unwrap();
    }
    connection.close().await.unwrap();
}

#[tokio::test]
async fn what_the_first_program_wrote_is_brought_up_to_date_and_goes_on() {
    for database in Database::each().await {
        let key = ApiKey::generate().unwrap();
        written_by_the_first_program(&database, &key).await;
        let store = database.open().await;
        assert_eq!(store.meta("base").await.unwrap().as_deref(), Some("one"));
        let ann = store.tenant("ann").await.unwrap();
        assert_eq!((ann.id, ann.created_at), (TenantId(2), 1000));
        assert_eq!(ann.limits, Overrides::default());
        let record = store.key_by_hash(key.hash()).await.unwrap().unwrap();
        assert_eq!((&*record.id, record.tenant, record.role), ("key_old", ann.id, Role::Member));
        assert!(record.is_live(unix_now()));
        let mine = store.adapter(ann.id, "mine").await.unwrap();
        assert_eq!((&*mine.metadata, mine.created_at), (r#"{"a":1}"#, 1001));
        assert_eq!(mine.contents, contents(2));
        assert_eq!(store.adapter(ann.id, "shared").await.unwrap().contents, contents(3));
        assert_eq!(all(&store).await.len(), 2);
        // Nobody reads the marks of deleted ones any more.
        let marks =
            sqlx::query("SELECT COUNT(*) FROM adapters WHERE deleted = 1").fetch_one(&store.pool).await.unwrap();
        assert_eq!(sqlx::Row::get::<i64, _>(&marks, 0), 0);
        assert!(store.damaged_rows().await.unwrap().is_empty());
        assert_eq!(store.check(Check::Full).await.unwrap(), Vec::<String>::new());

        let (back, _) = store.rollback(ann.id, "mine", contents(1).generation).await.unwrap();
        assert_eq!(back.contents, contents(1));
        let heavy = LimitChanges { weight: Some(Some(3)), ..LimitChanges::default() };
        assert_eq!(store.set_limits("ann", heavy).await.unwrap().limits.weight, Some(3));
        let free_again = written(store.put_adapter(new(ann.id, "gone", 4)).await);
        assert!(free_again.id.0 > 9, "no number is given twice: {:?}", free_again.id);
        let next = NewAdapter { on_conflict: OnConflict::NewGeneration, ..new(ann.id, "mine", 5) };
        assert_eq!(written(store.put_adapter(next).await).id, mine.id);
        store.close().await;

        let store = database.open().await;
        assert_eq!(all(&store).await.len(), 3);
        assert_eq!(store.adapter(ann.id, "mine").await.unwrap().contents, contents(5));
        assert_eq!(store.tenant("ann").await.unwrap().limits.weight, Some(3));
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn processes_may_open_a_new_database_at_once() {
    // Again and again: making a file a WAL one is the moment for which SQLite has no patience.
    for _ in 0..8 {
        for database in Database::each().await {
            let tasks: Vec<_> = (0..4).map(|_| tokio::spawn(Store::open(database.config.clone()))).collect();
            for task in tasks {
                let store = task.await.unwrap().unwrap();
                assert_eq!(store.tenants(None, 10).await.unwrap().len(), 1);
                store.close().await;
            }
        }
    }
}

#[tokio::test]
async fn facts_about_the_store_are_kept() {
    for database in Database::each().await {
        let store = database.open().await;
        assert_eq!(store.meta("base").await.unwrap(), None);
        store.set_meta("base", "one".into()).await.unwrap();
        store.set_meta("base", "two".into()).await.unwrap();
        assert_eq!(store.meta("base").await.unwrap().as_deref(), Some("two"));
        assert_eq!(store.meta_or_set("base", "three".into()).await.unwrap(), "two");
        assert_eq!(store.meta_or_set("other", "three".into()).await.unwrap(), "three");
        store.close().await;
    }
}

#[tokio::test]
async fn a_place_that_cannot_be_opened_is_named_without_secrets() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let error = Store::open(StoreConfig::new(Location::Directory(file.path().join("below")))).await.unwrap_err();
    assert!(error.to_string().contains(&*file.path().to_string_lossy()), "{error}");
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(FILE_NAME), b"this is no database, but a text of some length").unwrap();
    let error = Store::open(StoreConfig::new(Location::Directory(directory.path().into()))).await.unwrap_err();
    assert!(error.to_string().contains("not a database"), "{error}");
    let url = "postgres://user:secret@127.0.0.1:1/none";
    let error = Store::open(StoreConfig::new(Location::Postgres(url.into()))).await.unwrap_err();
    assert!(error.to_string().contains("127.0.0.1:1/none") && !error.to_string().contains("secret"), "{error}");
    let error = Store::open(StoreConfig::new(Location::Postgres("mysql://x".into()))).await.unwrap_err();
    assert!(error.to_string().contains("postgres://"), "{error}");
}

#[cfg(unix)]
#[tokio::test]
async fn a_new_file_is_for_its_owner_only() {
    use std::os::unix::fs::PermissionsExt as _;
    let database = Database::sqlite();
    let store = database.open().await;
    let Location::Directory(path) = &database.config.location else { unreachable!() };
    assert_eq!(std::fs::metadata(path.join(FILE_NAME)).unwrap().permissions().mode() & 0o777, 0o600);
    store.close().await;
}
