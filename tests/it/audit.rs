//! The audit log: who did what, when, from where, and nothing that is secret.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::http::Method;
use serde_json::{Value, json};

use crate::{
    app::{KEY, MODEL, Options, TestApp},
    limits::{ADMIN, OTHER, app_with, call, request},
    toy::{Toy, Toys},
    training::letters,
};

async fn log(app: &TestApp, query: &str) -> Value {
    let answer = call(app, ADMIN, Method::GET, &format!("/admin/audit{query}"), None).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_done_is_there_with_who_when_and_where() {
    let toys = Arc::new(Toys(Arc::<Toy>::default()));
    let app = app_with(Options { policies: Some(toys), ..Options::default() }).await;
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let send = async |key: &str, method: Method, path: &str, body: Value| {
        let answer = call(&app, key, method, path, Some(body)).await;
        assert!(answer.status.is_success(), "{path}: {}", answer.text);
        answer
    };
    let upload = |x: f64| json!({"name": "mine", "numbers": vec![x; 13], "metadata": {"secret": "metadata-words"}});
    let mut secrets = vec![KEY.to_owned(), ADMIN.to_owned(), "metadata-words".to_owned(), "prompt-words".to_owned()];

    send(ADMIN, Method::POST, "/admin/tenants", json!({"name": "ann"})).await;
    send(ADMIN, Method::PATCH, "/admin/tenants/ann", json!({"limits": {"adapters": 5}})).await;
    let key = send(ADMIN, Method::POST, "/admin/tenants/ann/keys", json!({})).await.json();
    let path = format!("/admin/keys/{}", key["id"].as_str().unwrap());
    let next = send(ADMIN, Method::POST, &format!("{path}/rotate"), json!({})).await.json();
    call(&app, ADMIN, Method::DELETE, &path, None).await;
    secrets.extend([&key, &next].map(|key| key["key"].as_str().unwrap().to_owned()));
    let first = send(KEY, Method::POST, "/adapters", upload(0.5)).await.json();
    send(KEY, Method::PUT, "/adapters/mine", json!({"numbers": vec![0.25; 13]})).await;
    send(KEY, Method::POST, "/adapters/mine/rollback", json!({"generation": first["generation"]})).await;
    call(&app, KEY, Method::DELETE, "/adapters/mine", None).await;
    let mut upload_of_file = request(KEY, Method::POST, "/v1/files", Some(json!(null)));
    let item = json!({"messages": [{"role": "user", "content": "prompt-words"}], "answer": "c"});
    let part = |head: &str, body: &str| format!("--edge\r\ncontent-disposition: form-data; {head}\r\n\r\n{body}\r\n");
    let purpose = part("name=\"purpose\"", "fine-tune");
    let contents = part("name=\"file\"; filename=\"a.jsonl\"", &item.to_string());
    *upload_of_file.body_mut() = format!("{purpose}{contents}--edge--\r\n").into();
    let form = "multipart/form-data; boundary=edge".parse().unwrap();
    upload_of_file.headers_mut().insert("content-type", form);
    let file = app.send(upload_of_file).await;
    assert_eq!(file.status, 200, "{}", file.text);
    let file = file.json()["id"].as_str().unwrap().to_owned();
    let gone = call(&app, KEY, Method::DELETE, &format!("/v1/files/{file}"), None).await;
    assert_eq!(gone.status, 200, "{}", gone.text);
    let mut job = letters("trained");
    job["dataset"][0]["messages"][0]["content"] = json!("prompt-words");
    let id = send(KEY, Method::POST, "/adapters/train", job).await.json()["id"].as_str().unwrap().to_owned();
    app.ended(&id).await;
    call(&app, ADMIN, Method::DELETE, "/admin/tenants/ann", None).await;

    // What only reads or fails leaves nothing.
    call(&app, KEY, Method::POST, "/v1/completions", Some(json!({"model": MODEL, "prompt": "prompt-words"}))).await;
    call(&app, KEY, Method::DELETE, "/adapters/mine", None).await;
    call(&app, KEY, Method::POST, "/admin/tenants", Some(json!({"name": "bob"}))).await;
    call(&app, ADMIN, Method::POST, "/admin/tenants", Some(json!({"name": "acme"}))).await;
    call(&app, "mote-sk-nobody-knows", Method::POST, "/adapters", Some(upload(0.5))).await;

    let page = log(&app, "").await;
    let mut entries = page["data"].as_array().unwrap().clone();
    entries.reverse();
    let text = |entry: &Value, field: &str| entry[field].as_str().unwrap_or_default().to_owned();
    let told: Vec<(String, String, String)> =
        entries.iter().map(|entry| (text(entry, "tenant"), text(entry, "action"), text(entry, "target"))).collect();
    let key_id = text(&key, "id");
    let expected = [
        ("default", "tenant.create", "ann"),
        ("default", "tenant.limits", "ann"),
        ("default", "key.create", &key_id),
        ("default", "key.rotate", &key_id),
        ("default", "key.revoke", &key_id),
        ("acme", "adapter.upload", "mine"),
        ("acme", "adapter.replace", "mine"),
        ("acme", "adapter.rollback", "mine"),
        ("acme", "adapter.delete", "mine"),
        ("acme", "file.upload", &file),
        ("acme", "file.delete", &file),
        ("acme", "job.create", &id),
        ("acme", "adapter.publish", "trained"),
        ("default", "tenant.delete", "ann"),
    ];
    let expected = expected.map(|(who, what, target)| (who.to_owned(), what.to_owned(), target.to_owned()));
    assert_eq!(told, expected);
    let published = entries.remove(12);
    assert_eq!((&published["via"], &published["detail"]), (&json!("training"), &json!({"job": id})));
    for entry in &entries {
        assert_eq!((&entry["via"], &entry["peer"]), (&json!("http"), &json!("10.9.8.7")), "{entry}");
        assert!(text(entry, "key").starts_with("key_") && text(entry, "request_id").starts_with("req-"), "{entry}");
        assert!((began..began + 600).contains(&entry["at"].as_i64().unwrap()), "{entry}");
    }
    assert_eq!(entries[1]["detail"], json!({"adapters": 5}));
    assert_eq!(entries[2]["detail"], json!({"tenant": "ann", "role": "member"}));
    for secret in secrets {
        assert!(!page.to_string().contains(&secret), "{secret}");
    }
}

#[tokio::test]
async fn a_batch_is_one_entry_and_pages_join_up() {
    let app = app_with(Options::default()).await;
    let lines: Vec<String> =
        (0..50).map(|n| json!({"name": format!("a{n}"), "numbers": vec![0.5; 13]}).to_string()).collect();
    let mut batch = request(KEY, Method::POST, "/adapters/batch", Some(json!(null)));
    *batch.body_mut() = lines.join("\n").into();
    batch.headers_mut().insert("content-type", "application/x-ndjson".parse().unwrap());
    batch.headers_mut().insert("x-request-id", "my-request".parse().unwrap());
    app.send(batch).await;
    let whole = log(&app, "").await["data"].as_array().unwrap().clone();
    assert_eq!(whole.len(), 1, "{whole:?}");
    assert_eq!((&whole[0]["target"], &whole[0]["detail"]), (&json!("a0"), &json!({"adapters": 50})));
    assert_eq!(whole[0]["request_id"], "my-request");

    for n in 0..5 {
        call(&app, OTHER, Method::POST, "/adapters", Some(json!({"name": format!("b{n}"), "numbers": vec![0.5; 13]})))
            .await;
    }
    let (mut after, mut seen) = (String::new(), BTreeSet::new());
    loop {
        let page = log(&app, &format!("?limit=4{after}")).await;
        let entries = page["data"].as_array().unwrap();
        for entry in entries {
            assert!(seen.insert(entry["id"].as_i64().unwrap()), "twice: {entry}");
        }
        let Some(last) = entries.last().filter(|_| page["has_more"] == true) else { break };
        after = format!("&after={}", last["id"]);
    }
    assert_eq!(seen.len(), 6);
    for key in [KEY, OTHER] {
        assert_eq!(call(&app, key, Method::GET, "/admin/audit", None).await.status, 403);
    }
    for query in ["?limit=0", "?limit=1001", "?after=x"] {
        assert_eq!(call(&app, ADMIN, Method::GET, &format!("/admin/audit{query}"), None).await.status, 400, "{query}");
    }
}
