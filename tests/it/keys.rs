//! Keys: their end, their replacement, and who guesses them.

use std::{net::SocketAddr, process::Command, sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use futures::StreamExt as _;
use mote::http::ClientAddress;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::{
    app::{KEY, Options, TestApp},
    limits::{ADMIN, app_with, call},
    support,
    toy::{Toy, Toys},
    training::letters,
};

/// A new key of the tenant `other`.
async fn make(app: &TestApp, body: Value) -> Value {
    let answer = call(app, ADMIN, Method::POST, "/admin/tenants/other/keys", Some(body)).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    answer.json()
}

/// The status that a key gets.
async fn works(app: &TestApp, key: &Value) -> u16 {
    call(app, key["key"].as_str().unwrap(), Method::GET, "/v1/models", None).await.status.as_u16()
}

#[tokio::test]
async fn a_key_may_have_an_end() {
    let app = app_with(Options::default()).await;
    let keys = "/admin/tenants/other/keys";
    let lasting = make(&app, json!({})).await;
    assert_eq!(lasting["expires_at"], json!(null));
    let hour = make(&app, json!({"expires_in": 3600})).await;
    assert_eq!(hour["expires_at"].as_i64().unwrap() - hour["created_at"].as_i64().unwrap(), 3600);
    let past = make(&app, json!({"expires_at": 1_700_000_000})).await;
    assert_eq!((works(&app, &lasting).await, works(&app, &hour).await, works(&app, &past).await), (200, 200, 401));
    for (body, param) in [
        (json!({"expires_in": 0}), "expires_in"),
        (json!({"expires_in": u64::MAX}), "expires_in"),
        (json!({"expires_in": -1}), "expires_in"),
        (json!({"expires_in": 60, "expires_at": 4_000_000_000_u64}), "expires_in"),
        (json!({"expires_at": -1}), "expires_at"),
        (json!({"expires": 60}), "expires"),
    ] {
        let answer = call(&app, ADMIN, Method::POST, keys, Some(body.clone())).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{body}: {}", answer.text);
    }
    // At once, also for one that was in use a moment ago.
    let id = lasting["id"].as_str().unwrap();
    assert_eq!(call(&app, ADMIN, Method::DELETE, &format!("/admin/keys/{id}"), None).await.status, 204);
    assert_eq!(works(&app, &lasting).await, 401);
}

#[tokio::test]
async fn rotation_leaves_no_moment_without_a_key() {
    let app = app_with(Options::default()).await;
    let old = make(&app, json!({"role": "member"})).await;
    assert_eq!(works(&app, &old).await, 200);
    let rotate = async |id: &Value, body: Value| {
        let path = format!("/admin/keys/{}/rotate", id.as_str().unwrap());
        call(&app, ADMIN, Method::POST, &path, Some(body)).await
    };
    let answer = rotate(&old["id"], json!({"grace": 600})).await;
    assert_eq!(answer.status, 201, "{}", answer.text);
    let new = answer.json();
    assert_ne!(new["id"], old["id"]);
    assert_eq!((&new["tenant"], &new["role"], &new["expires_at"]), (&json!("other"), &json!("member"), &json!(null)));
    assert_eq!((works(&app, &old).await, works(&app, &new).await), (200, 200));
    let path = format!("/admin/keys/{}", old["id"].as_str().unwrap());
    let shown = call(&app, ADMIN, Method::GET, &path, None).await.json();
    assert_eq!(shown["expires_at"].as_i64().unwrap() - new["created_at"].as_i64().unwrap(), 600);
    assert!(shown.get("key").is_none());

    let last = rotate(&new["id"], json!({"grace": 0, "expires_in": 60})).await.json();
    assert_eq!((works(&app, &new).await, works(&app, &last).await), (401, 200), "without grace it ends at once");
    assert_eq!(last["expires_at"].as_i64().unwrap() - last["created_at"].as_i64().unwrap(), 60);
    assert_eq!(rotate(&new["id"], json!({})).await.error().3.as_deref(), Some("key_not_live"));
    assert_eq!(rotate(&json!("key_none"), json!({})).await.error().3.as_deref(), Some("key_not_found"));
    let long = rotate(&last["id"], json!({"grace": u64::MAX})).await.error();
    assert_eq!((long.0, long.2.as_deref()), (400, Some("grace")));
    let path = format!("/admin/keys/{}/rotate", last["id"].as_str().unwrap());
    assert_eq!(call(&app, KEY, Method::POST, &path, Some(json!({}))).await.status, 403);
}

#[tokio::test]
async fn an_address_that_guesses_has_to_wait() {
    let app = app_with(Options::default()).await;
    app.state.service.directory.limit_failures(Some(3));
    let from = async |peer: &str, key: &str| {
        let peer: SocketAddr = peer.parse().unwrap();
        let request = Request::get("/v1/models").header(header::AUTHORIZATION, format!("Bearer {key}"));
        app.send(request.extension(ClientAddress(peer.ip())).body(Body::empty()).unwrap()).await
    };
    assert_eq!(from("10.0.0.1:1", KEY).await.status, 200);
    for port in 1..4 {
        let answer = from(&format!("10.0.0.1:{port}"), &format!("mote-sk-guess-{port}")).await;
        assert_eq!(answer.error().0, 401);
    }
    let refused = from("10.0.0.1:9", "mote-sk-guess-9").await;
    let (status, kind, _, code) = refused.error();
    assert_eq!((status, &*kind, code.as_deref()), (429, "rate_limit_error", Some("rate_limit_exceeded")));
    let wait: u64 = refused.headers["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    assert_eq!(from("10.0.0.1:1", KEY).await.status, 200, "a key that is in use passes");
    assert_eq!(from("10.0.0.2:1", "mote-sk-guess-1").await.error().0, 401, "another address has attempts of its own");
}

/// The commands work on the directory of a server that runs, which honours them within a second.
#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_reaches_a_running_server() {
    let app = support::TestApp::tiny("llama").start().await;
    let run = |args: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_mote"))
            .args(args)
            .arg("--data-dir")
            .arg(&app.data)
            .output()
            .expect("mote runs")
    };
    let mote = |args: &[&str]| {
        let output = run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    };
    mote(&["tenants", "create", "dora"]);
    assert!(!run(&["tenants", "create", "dora"]).status.success(), "the name is taken");
    let key = mote(&["keys", "create", "--tenant", "dora", "--expires-in", "90d"]);
    let ask = async |key: &str| {
        let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 1});
        app.as_key(key, Method::POST, "/v1/completions").json(&body).send().await.expect("an answer")
    };
    assert_eq!(ask(&key).await.status(), 200);
    let set =
        mote(&["tenants", "limits", "dora", "--requests-per-minute", "1", "--weight", "3", "--adapters", "unlimited"]);
    assert_eq!(set, "adapters=unlimited\nrequests_per_minute=1\nweight=3");
    assert!(!run(&["tenants", "limits", "dora", "--weight", "0"]).status.success());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (first, second) = (ask(&key).await, ask(&key).await);
    assert_eq!((first.status().as_u16(), second.status().as_u16()), (200, 429));
    assert_eq!(second.headers()["x-ratelimit-limit-requests"], "1");
    assert_eq!(
        mote(&["tenants", "limits", "dora", "--requests-per-minute", "default"]),
        "adapters=unlimited\nweight=3"
    );
    assert!(mote(&["tenants", "list"]).contains("adapters=unlimited weight=3"));

    let listed = mote(&["keys", "list", "--tenant", "dora"]);
    let id = listed.lines().last().and_then(|line| line.split_whitespace().next()).expect("an id").to_owned();
    let new = mote(&["keys", "rotate", &id, "--grace", "0s"]);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((ask(&key).await.status().as_u16(), ask(&new).await.status().as_u16()), (401, 200));
    assert!(mote(&["keys", "list", "--tenant", "dora"]).contains("expired"));

    let (_, log) = app.get("/admin/audit").await;
    let actions: Vec<(&str, &str)> = log["data"]
        .as_array()
        .expect("a list")
        .iter()
        .rev()
        .map(|entry| (entry["via"].as_str().expect("via"), entry["action"].as_str().expect("action")))
        .collect();
    let expected = [
        ("start", "key.create"),
        ("command_line", "tenant.create"),
        ("command_line", "key.create"),
        ("command_line", "tenant.limits"),
        ("command_line", "tenant.limits"),
        ("command_line", "key.rotate"),
    ];
    assert_eq!(actions, expected);
    for secret in [&key, &new] {
        assert!(!log.to_string().contains(secret.as_str()) && !app.log().contains(secret.as_str()));
    }
}

/// Whoever watches a job when the key is revoked sees no more of it, and is told why.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_events_ends_when_its_key_is_revoked() {
    let toy = Toy::slow(50);
    let app = app_with(Options { policies: Some(Arc::new(Toys(toy))), ..Options::default() }).await;
    let key = call(&app, ADMIN, Method::POST, "/admin/tenants/acme/keys", Some(json!({}))).await.json();
    let (secret, id) = (key["key"].as_str().unwrap(), key["id"].as_str().unwrap());
    let job = app.train(letters("watched")).await;
    let request = Request::get(format!("/adapters/train/{job}/events"))
        .header(header::AUTHORIZATION, format!("Bearer {secret}"))
        .header(header::ACCEPT, "text/event-stream");
    let response = app.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    let mut pieces = response.into_body().into_data_stream();
    assert!(pieces.next().await.unwrap().unwrap().starts_with(b"id: 1"));
    assert_eq!(call(&app, ADMIN, Method::DELETE, &format!("/admin/keys/{id}"), None).await.status, 204);
    let mut rest = String::new();
    let read = async {
        while let Some(piece) = pieces.next().await {
            rest += std::str::from_utf8(&piece.unwrap()).unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read).await.expect("the stream ends");
    let last = rest.lines().filter_map(|line| line.strip_prefix("data: ")).next_back().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "invalid_api_key", "{rest}");
    assert_ne!(app.ended(&job).await["status"], "cancelled", "the job goes on");
}
