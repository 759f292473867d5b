use super::*;
use crate::tenant::{ApiKey, Caller, Directory, KeySource as _, Origin, Role};

/// A member's key of a tenant, which is made if it is not there.
pub(super) fn key(key: &ApiKey, tenant: &str) -> NewKey {
    NewKey {
        key: key.clone(),
        tenant: tenant.into(),
        create_tenant: true,
        role: Role::Member,
        expires_at: None,
        only_first: false,
    }
}

#[tokio::test]
async fn tenants_are_made_listed_and_erased() {
    for database in Database::each().await {
        let store = database.open().await;
        let alice = store.create_tenant("alice").await.unwrap();
        assert!(matches!(store.create_tenant("alice").await, Err(StoreError::TenantExists)));
        assert_eq!(store.tenant("alice").await.unwrap(), alice);
        let names: Vec<_> =
            store.tenants(None, 10).await.unwrap().into_iter().map(|tenant| (tenant.id, tenant.name)).collect();
        assert_eq!(names, [(alice.id, "alice".to_owned()), (BUILT_IN_TENANT, "default".to_owned())]);
        assert_eq!(store.tenants(Some("alice"), 10).await.unwrap().len(), 1);
        assert!(matches!(store.delete_tenant("bob").await, Err(StoreError::TenantNotFound)));
        assert!(matches!(store.delete_tenant("default").await, Err(StoreError::BuiltInTenant)));

        let secret = ApiKey::generate().unwrap();
        store.create_key(key(&secret, "alice")).await.unwrap().unwrap();
        written(store.put_adapter(NewAdapter { public: Some(true), ..new(alice.id, "a", 1) }).await);
        assert_eq!(store.delete_tenant("alice").await.unwrap(), alice.id);
        assert!(all(&store).await.is_empty());
        assert_eq!(store.key_by_hash(secret.hash()).await.unwrap(), None);
        assert!(matches!(store.put_adapter(new(alice.id, "b", 1)).await, Err(StoreError::TenantNotFound)));
        assert!(matches!(store.adapter(BUILT_IN_TENANT, "a").await, Err(StoreError::AdapterNotFound)));
        assert_ne!(store.create_tenant("alice").await.unwrap().id, alice.id, "the name is free again");
        store.close().await;
    }
}

#[tokio::test]
async fn keys_are_found_by_hash_until_revoked() {
    for database in Database::each().await {
        let store = database.open().await;
        let secret = ApiKey::generate().unwrap();
        let strict = NewKey { create_tenant: false, ..key(&secret, "alice") };
        assert!(matches!(store.create_key(strict).await, Err(StoreError::TenantNotFound)));
        let expiring = NewKey { expires_at: Some(4_000_000_000), role: Role::Admin, ..key(&secret, "alice") };
        let record = store.create_key(expiring).await.unwrap().unwrap();
        assert_eq!(store.key_by_hash(secret.hash()).await.unwrap().as_ref(), Some(&record));
        assert_eq!(store.key(&record.id).await.unwrap(), record);
        assert_eq!((&*record.tenant_name, record.role, record.expires_at), ("alice", Role::Admin, Some(4_000_000_000)));
        assert!(secret.secret().starts_with(&record.prefix));
        assert!(record.is_live(3_999_999_999) && !record.is_live(4_000_000_000));

        store.touch_key(record.id.clone(), 1234);
        store.revoke_key(&record.id).await.unwrap();
        store.revoke_key(&record.id).await.unwrap();
        assert!(matches!(store.revoke_key("key_none").await, Err(StoreError::KeyNotFound)));
        let listed = store.keys(record.tenant).await.unwrap();
        assert_eq!(listed.len(), 1);
        assert!(!listed[0].is_live(0));
        assert_eq!(listed[0].last_used_at, Some(1234));
        store.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_first_keys_one_is_made() {
    for database in Database::each().await {
        let stores = [database.open().await, database.open().await];
        let first = |store: &Store| {
            let store = store.clone();
            tokio::spawn(async move {
                let secret = ApiKey::generate().unwrap();
                let first = NewKey { only_first: true, role: Role::Admin, ..key(&secret, "default") };
                store.create_key(first).await.unwrap().is_some()
            })
        };
        let (a, b) = tokio::join!(first(&stores[0]), first(&stores[1]));
        assert_eq!(u8::from(a.unwrap()) + u8::from(b.unwrap()), 1);
        for store in stores {
            store.close().await;
        }
    }
}

#[tokio::test]
async fn a_key_made_or_revoked_by_another_process_counts_within_a_second() {
    for database in Database::each().await {
        let (server, tool) = (database.open().await, database.open().await);
        let directory = Directory::new(Arc::new(server.clone()), Arc::default());
        let secret = ApiKey::generate().unwrap();
        assert!(directory.verify(secret.secret(), None).await.is_err());
        let record = tool.create_key(key(&secret, "alice")).await.unwrap().unwrap();
        let caller = directory.verify(secret.secret(), None).await.unwrap();
        let expected = Caller {
            tenant: record.tenant,
            tenant_name: "alice".into(),
            role: Role::Member,
            key: Some(record.id.as_str().into()),
            origin: Origin::default(),
        };
        assert_eq!(caller, expected);
        tool.revoke_key(&record.id).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert!(directory.verify(secret.secret(), None).await.is_err());
        server.close().await;
        tool.close().await;
    }
}

/// Whatever is being read: all connections for that are taken.
#[tokio::test]
async fn a_key_is_looked_up_while_everything_else_is_read() {
    for database in Database::each().await {
        let store = database.open().await;
        let (key, _) = super::upkeep::key_of(&store, "alice").await;
        let mut held = Vec::new();
        for _ in 0..database.config.readers {
            held.push(store.pool.acquire().await.unwrap());
        }
        let callers = Directory::new(Arc::new(store.clone()), Arc::default());
        let found = tokio::time::timeout(std::time::Duration::from_secs(5), callers.verify(key.secret(), None)).await;
        assert!(found.expect("it does not wait").is_ok());
        drop(held);
        store.close().await;
    }
}
