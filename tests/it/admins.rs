//! What is an admin's, without a socket: public adapters, tenants and their keys.

use axum::http::{Method, StatusCode};
use mote::{
    store::NewKey,
    tenant::{ApiKey, Role},
};
use serde_json::{Value, json};

use crate::{
    adapters::{ADMIN, OTHER, json_of, ok, request, send, with_keys},
    app::KEY,
};

#[tokio::test]
async fn a_public_adapter_is_everybodys_to_use_and_nobodys_to_change() {
    let app = with_keys().await;
    let house = json!({"name": "house", "numbers": vec![0.5; 13], "public": true, "metadata": {"k": 1}});
    assert_eq!(send(&app, ADMIN, Method::POST, "/adapters", house).await.status, 201);
    let seen = app.get("/adapters/house").await.json();
    assert_eq!((&seen["public"], &seen["owner"]), (&json!(true), &json!("default")));
    app.ok("/v1/completions", json!({"model": "house", "prompt": "Hi", "max_tokens": 1})).await;
    for (method, path) in [
        (Method::DELETE, "/adapters/house"),
        (Method::PUT, "/adapters/house"),
        (Method::GET, "/adapters/house/generations"),
        (Method::POST, "/adapters/house/rollback"),
    ] {
        let body = json!({"numbers": vec![0.5; 13], "generation": "0".repeat(32)});
        assert_eq!(send(&app, KEY, method, path, body).await.error().0, 404, "{path}");
    }
    // An own one of that name comes first, for its owner alone.
    ok(&app, Method::POST, "/adapters", json_of("house", 0.25)).await;
    assert_eq!(app.get("/adapters/house").await.json()["owner"], "acme");
    assert_eq!(app.get("/adapters").await.json()["data"].as_array().unwrap().len(), 1);
    let of_other = send(&app, OTHER, Method::GET, "/adapters/house", json!({})).await.json();
    assert_eq!(of_other["owner"], "default");
    let rival = json!({"name": "house", "numbers": vec![0.25; 13], "public": false, "on_conflict": "new_generation"});
    assert_eq!(send(&app, ADMIN, Method::POST, "/adapters", rival).await.json()["public"], false);
    assert_eq!(send(&app, OTHER, Method::GET, "/adapters/house", json!({})).await.status, 404);
}

#[tokio::test]
async fn a_public_adapter_is_its_tenant_s_admins_to_change() {
    const MEMBER: &str = "a-member-of-the-house-0123456789";
    let app = with_keys().await;
    let key = ApiKey::chosen(MEMBER).unwrap();
    let tenant = "default".to_owned();
    let role = Role::Member;
    let new = NewKey { key, tenant, create_tenant: false, role, expires_at: None, only_first: false };
    app.state.service.store.create_key(new).await.unwrap();
    let house = |x: f64| json!({"name": "house", "numbers": vec![x; 13], "public": true});
    let first = send(&app, ADMIN, Method::POST, "/adapters", house(0.5)).await.json();
    assert_eq!(send(&app, ADMIN, Method::PUT, "/adapters/house", house(0.25)).await.status, 200);
    let before = app.get("/adapters/house").await.json();

    let again = json!({"name": "house", "numbers": vec![0.125; 13], "on_conflict": "new_generation"});
    let hidden = json!({"name": "house", "numbers": vec![0.125; 13], "on_conflict": "new_generation", "public": false});
    for (method, path, body) in [
        (Method::PUT, "/adapters/house", json!({"numbers": vec![0.125; 13]})),
        (Method::POST, "/adapters", again.clone()),
        (Method::POST, "/adapters", hidden),
        (Method::POST, "/adapters/house/rollback", json!({"generation": first["generation"]})),
        (Method::DELETE, "/adapters/house", json!({})),
    ] {
        let refused = send(&app, MEMBER, method.clone(), path, body).await;
        assert_eq!(refused.error(), (403, "permission_error".into(), None, None), "{method} {path}");
    }
    let lines = format!("{again}\n{}", json_of("mine", 0.5));
    let batch = app.send(request(MEMBER, Method::POST, "/adapters/batch", "application/x-ndjson", lines)).await;
    let (refused, stored) = batch.text.split_once('\n').unwrap();
    assert!(refused.contains("permission_error") && stored.contains("generation"), "{}", batch.text);
    assert_eq!(app.get("/adapters/house").await.json(), before);
    // A name that is taken is no secret to its owner, and what is not public is a member's.
    let taken = send(&app, MEMBER, Method::POST, "/adapters", json_of("house", 0.5)).await;
    assert_eq!(taken.error().3.as_deref(), Some("name_taken"));
    assert_eq!(send(&app, MEMBER, Method::DELETE, "/adapters/mine", json!({})).await.status, 204);
    assert_eq!(send(&app, ADMIN, Method::DELETE, "/adapters/house", json!({})).await.status, 204);
}

#[tokio::test]
async fn admins_manage_tenants_and_keys() {
    let app = with_keys().await;
    let admin = async |method: Method, path: &str, body: Value| send(&app, ADMIN, method, path, body).await;
    let made = admin(Method::POST, "/admin/tenants", json!({"name": "new"})).await;
    assert_eq!((made.status, &made.json()["name"]), (StatusCode::CREATED, &json!("new")));
    assert_eq!(
        admin(Method::POST, "/admin/tenants", json!({"name": "new"})).await.error().3.as_deref(),
        Some("name_taken")
    );
    for body in [json!({}), json!({"name": "a b"}), json!({"name": ".."}), json!({"name": 5})] {
        assert_eq!(admin(Method::POST, "/admin/tenants", body).await.error().2.as_deref(), Some("name"));
    }
    let names = async |query: &str| {
        let page = admin(Method::GET, &format!("/admin/tenants?{query}"), json!({})).await.json();
        let names: Vec<&str> =
            page["data"].as_array().unwrap().iter().map(|each| each["name"].as_str().unwrap()).collect();
        (names.join(" "), page["has_more"].as_bool().unwrap())
    };
    assert_eq!(names("").await, ("acme default new other".into(), false));
    assert_eq!(names("limit=1&after=default").await, ("new".into(), true));

    let key = admin(Method::POST, "/admin/tenants/new/keys", json!({"role": "member"})).await;
    assert_eq!(key.status, StatusCode::CREATED);
    let (key, secret) = (key.json(), key.json()["key"].as_str().unwrap().to_owned());
    assert!(secret.starts_with("mote-sk-") && secret.starts_with(key["prefix"].as_str().unwrap()));
    assert_eq!(send(&app, &secret, Method::POST, "/adapters", json_of("a", 0.5)).await.status, 201);
    assert_eq!(send(&app, &secret, Method::GET, "/admin/tenants", json!({})).await.error().0, 403);
    let listed = admin(Method::GET, "/admin/tenants/new/keys", json!({})).await;
    assert!(!listed.text.contains(&secret), "a key is shown once");
    assert_eq!(listed.json()["data"][0]["id"], key["id"]);
    let path = format!("/admin/keys/{}", key["id"].as_str().unwrap());
    assert_eq!(admin(Method::GET, &path, json!({})).await.json()["tenant"], "new");
    assert_eq!(admin(Method::DELETE, &path, json!({})).await.status, 204);
    assert_eq!(send(&app, &secret, Method::GET, "/adapters", json!({})).await.error().0, 401, "at once");
    assert!(admin(Method::GET, &path, json!({})).await.json()["revoked_at"].is_i64());

    for (method, path, code) in [
        (Method::GET, "/admin/tenants/none", "tenant_not_found"),
        (Method::DELETE, "/admin/tenants/none", "tenant_not_found"),
        (Method::GET, "/admin/tenants/none/keys", "tenant_not_found"),
        (Method::POST, "/admin/tenants/none/keys", "tenant_not_found"),
        (Method::GET, "/admin/keys/none", "key_not_found"),
        (Method::DELETE, "/admin/keys/none", "key_not_found"),
    ] {
        let answer = admin(method, path, json!({})).await;
        assert_eq!((answer.error().0, answer.error().3.as_deref()), (404, Some(code)), "{path}");
        let answer = app.get(path).await;
        assert!([403, 405].contains(&answer.error().0), "members learn nothing: {}", answer.text);
    }
    assert_eq!(
        admin(Method::POST, "/admin/tenants/new/keys", json!({"role": "root"})).await.error().2.as_deref(),
        Some("role")
    );
    let late = admin(Method::POST, "/admin/tenants/new/keys", json!({"expires_at": 1})).await.json();
    let expired = late["key"].as_str().unwrap();
    assert_eq!(send(&app, expired, Method::GET, "/adapters", json!({})).await.error().0, 401);

    assert_eq!(app.state.service.library.registry.len(), 1);
    assert_eq!(admin(Method::DELETE, "/admin/tenants/new", json!({})).await.status, 204);
    assert_eq!(app.state.service.library.registry.len(), 0, "its adapters went with it");
    assert_eq!(admin(Method::DELETE, "/admin/tenants/default", json!({})).await.error().0, 409);
}
