use super::*;

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
