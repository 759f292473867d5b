//! What a tenant may use: each limit, its error, its headers, and that it is nobody else's.
#![allow(clippy::await_holding_lock, reason = "the engine's thread waits for the lock, the runtime does not")]

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use futures::StreamExt as _;
use mote::http::ClientAddress;
use mote::{
    service::training::TrainingConfig,
    store::NewKey,
    tenant::{ApiKey, Role},
};
use serde_json::{Value, json};

use crate::{
    app::{Answer, KEY, MODEL, Options, TestApp},
    toy::{Toy, Toys},
    training::{letters, letters_with},
};

pub(crate) const ADMIN: &str = "mote-sk-test-admin-0123456789abcdef";
pub(crate) const OTHER: &str = "mote-sk-test-other-0123456789abcdef";

/// A server with an admin, and a second tenant `other`.
pub(crate) async fn app_with(options: Options) -> TestApp {
    let app = TestApp::with(options).await;
    for (key, tenant, role) in [(ADMIN, "default", Role::Admin), (OTHER, "other", Role::Member)] {
        let key = ApiKey::chosen(key).unwrap();
        let tenant = tenant.to_owned();
        let new = NewKey { key, tenant, create_tenant: true, role, expires_at: None, only_first: false };
        app.state.service.store.create_key(new).await.unwrap();
    }
    app
}

/// A request from an address, under a key.
pub(crate) fn request(key: &str, method: Method, path: &str, body: Option<Value>) -> Request<Body> {
    let peer: SocketAddr = "10.9.8.7:4321".parse().unwrap();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {key}"))
        .extension(ClientAddress(peer.ip()));
    match body {
        None => request.body(Body::empty()).unwrap(),
        Some(body) => request.header(header::CONTENT_TYPE, "application/json").body(body.to_string().into()).unwrap(),
    }
}

pub(crate) async fn call(app: &TestApp, key: &str, method: Method, path: &str, body: Option<Value>) -> Answer {
    app.send(request(key, method, path, body)).await
}

/// Sets limits of the tenant of [`KEY`].
async fn limit(app: &TestApp, limits: Value) -> Value {
    let answer = call(app, ADMIN, Method::PATCH, "/admin/tenants/acme", Some(json!({"limits": limits}))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

fn completion(prompt: usize, extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "prompt": vec![5; prompt], "max_tokens": 4, "temperature": 0});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

async fn complete(app: &TestApp, key: &str, body: Value) -> Answer {
    call(app, key, Method::POST, "/v1/completions", Some(body)).await
}

fn number(answer: &Answer, name: &str) -> Option<u64> {
    answer.headers.get(name).map(|value| value.to_str().unwrap().parse().unwrap())
}

/// A 429 that a wait ends.
fn assert_wait(answer: &Answer, most: u64) {
    let (status, kind, _, code) = answer.error();
    assert_eq!((status, &*kind, code.as_deref()), (429, "rate_limit_error", Some("rate_limit_exceeded")));
    let wait = number(answer, "retry-after").unwrap();
    assert!((1..=most).contains(&wait), "retry-after {wait}");
    assert!(!answer.headers.contains_key("x-should-retry"));
}

/// A 429 that no wait ends.
fn assert_quota(answer: &Answer) {
    let (status, kind, _, code) = answer.error();
    assert_eq!((status, &*kind, code.as_deref()), (429, "rate_limit_error", Some("insufficient_quota")));
    assert_eq!(answer.headers["x-should-retry"], "false");
    assert!(!answer.headers.contains_key("retry-after"));
}

#[tokio::test]
async fn requests_a_minute() {
    let app = app_with(Options::default()).await;
    let free = complete(&app, KEY, completion(3, json!({}))).await;
    assert_eq!(free.status, 200);
    assert!(!free.headers.keys().any(|name| name.as_str().starts_with("x-ratelimit")), "no limit, no header");

    limit(&app, json!({"requests_per_minute": 3})).await;
    let first = complete(&app, KEY, completion(3, json!({}))).await;
    assert_eq!(first.status, 200, "{}", first.text);
    assert_eq!(number(&first, "x-ratelimit-limit-requests"), Some(3));
    assert_eq!(number(&first, "x-ratelimit-remaining-requests"), Some(2));
    let reset = first.headers["x-ratelimit-reset-requests"].to_str().unwrap().strip_suffix('s').unwrap();
    assert!((10..=20).contains(&reset.parse::<u64>().unwrap()), "{reset}");
    assert!(!first.headers.contains_key("x-ratelimit-limit-tokens"));
    // One that is wrong counts too, and so does another route.
    let wrong = complete(&app, KEY, json!({"model": MODEL})).await;
    assert_eq!((wrong.status.as_u16(), number(&wrong, "x-ratelimit-remaining-requests")), (400, Some(1)));
    let upload = json!({"name": "a", "numbers": vec![0.5; 13]});
    assert_eq!(call(&app, KEY, Method::POST, "/adapters", Some(upload.clone())).await.status, 201);
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1});
    for (path, body) in [
        ("/v1/completions", completion(3, json!({}))),
        ("/v1/chat/completions", chat),
        ("/adapters", upload.clone()),
        ("/adapters/train", letters("b")),
        ("/v1/fine_tuning/jobs", json!({})),
        ("/adapters/a/rollback", json!({})),
        ("/v1/fine_tuning/alpha/graders/run", json!({})),
        ("/adapters/train/ftjob-0/pause", json!({})),
        ("/adapters/train/ftjob-0/resume", json!({})),
        ("/adapters/train/ftjob-0/cancel", json!({})),
        ("/v1/fine_tuning/jobs/ftjob-0/pause", json!({})),
        ("/v1/fine_tuning/jobs/ftjob-0/resume", json!({})),
        ("/v1/fine_tuning/jobs/ftjob-0/cancel", json!({})),
    ] {
        let refused = call(&app, KEY, Method::POST, path, Some(body)).await;
        assert_wait(&refused, 20);
        assert_eq!(number(&refused, "x-ratelimit-remaining-requests"), Some(0), "{path}");
    }
    // What is read or deleted is not metered, nor is another tenant.
    assert_eq!(app.get("/v1/models").await.status, 200);
    assert_eq!(app.delete("/adapters/a").await.status, 204);
    let other = complete(&app, OTHER, completion(3, json!({}))).await;
    assert_eq!(other.status, 200);
    assert!(!other.headers.contains_key("x-ratelimit-limit-requests"));

    limit(&app, json!({"requests_per_minute": 0})).await;
    assert_quota(&complete(&app, KEY, completion(3, json!({}))).await);
    limit(&app, json!({"requests_per_minute": null})).await;
    assert_eq!(complete(&app, KEY, completion(3, json!({}))).await.status, 200);
}

#[tokio::test]
async fn tokens_a_minute_are_reserved_for_every_choice_and_settled_at_the_end() {
    let app = app_with(Options::default()).await;
    limit(&app, json!({"tokens_per_minute": 6000})).await;
    let remaining = |answer: &Answer| number(answer, "x-ratelimit-remaining-tokens").unwrap();
    let done = complete(&app, KEY, completion(40, json!({"max_tokens": 10, "n": 3, "ignore_eos": true}))).await;
    assert_eq!(done.status, 200, "{}", done.text);
    assert_eq!(number(&done, "x-ratelimit-limit-tokens"), Some(6000));
    // 70 were used. A hundred come back in a second.
    assert!((5930..=6000).contains(&remaining(&done)), "{}", remaining(&done));

    limit(&app, json!({"tokens_per_minute": 100})).await;
    for body in [
        completion(11, json!({"max_tokens": 90})),
        completion(10, json!({"max_tokens": 23, "n": 4})),
        completion(10, json!({"max_tokens": 23, "best_of": 4})),
        json!({"model": MODEL, "prompt": [[5, 5], [6, 6]], "max_tokens": 49}),
    ] {
        let refused = complete(&app, KEY, body.clone()).await;
        assert_quota(&refused);
        assert!(refused.text.contains("max_tokens"), "{body}: {}", refused.text);
    }
    // A chat without max_tokens may use the rest of the context.
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]});
    assert_quota(&call(&app, KEY, Method::POST, "/v1/chat/completions", Some(chat)).await);
    assert_eq!(complete(&app, OTHER, completion(11, json!({"max_tokens": 90}))).await.status, 200);

    // Of a stream everything is reserved until it ends. (The bucket was shrunk: it has what the larger one had left, capped.)
    limit(&app, json!({"tokens_per_minute": null})).await;
    limit(&app, json!({"tokens_per_minute": 100})).await;
    let held = app.watch.hold.lock().unwrap();
    let stream = app.open("/v1/completions", completion(10, json!({"max_tokens": 80, "stream": true}))).await;
    let second = complete(&app, KEY, completion(10, json!({"max_tokens": 20}))).await;
    assert_wait(&second, 60);
    assert!(remaining(&second) < 30);
    drop(held);
    stream.collect::<Vec<_>>().await;
    // It ended at the script's end of sequence or after 80 tokens; a short one leaves room.
    limit(&app, json!({"tokens_per_minute": null})).await;
    limit(&app, json!({"tokens_per_minute": 100})).await;
    let short = completion(10, json!({"max_tokens": 80, "stop": ["e"]}));
    let answer = complete(&app, KEY, short.clone()).await;
    let used = answer.json()["usage"]["total_tokens"].as_u64().unwrap();
    assert!(used < 45 && remaining(&answer) >= 100 - used, "{used} used, {} left", remaining(&answer));
    // A request that is refused later gives everything back.
    let before = remaining(&complete(&app, KEY, completion(1, json!({"model": "nobody"}))).await);
    assert!(before >= 100 - used);
}

#[tokio::test]
async fn requests_at_once_end_with_their_streams() {
    let app = app_with(Options::default()).await;
    limit(&app, json!({"concurrent_requests": 1})).await;
    let held = app.watch.hold.lock().unwrap();
    let stream = app.open("/v1/completions", completion(3, json!({"stream": true}))).await;
    assert_wait(&complete(&app, KEY, completion(3, json!({}))).await, 1);
    let upload = json!({"name": "a", "numbers": vec![0.5; 13]});
    assert_wait(&call(&app, KEY, Method::POST, "/adapters", Some(upload.clone())).await, 1);
    assert_eq!(call(&app, OTHER, Method::POST, "/adapters", Some(upload.clone())).await.status, 201);
    drop(held);
    // A client that leaves frees its place as well as one that reads to the end.
    drop(stream);
    assert_eq!(call(&app, KEY, Method::POST, "/adapters", Some(upload)).await.status, 201);
    let chunks = app.chunks("/v1/completions", completion(3, json!({"stream": true}))).await;
    assert!(!chunks.is_empty());
    assert_eq!(complete(&app, KEY, completion(3, json!({}))).await.status, 200);
    limit(&app, json!({"concurrent_requests": 0})).await;
    assert_quota(&complete(&app, KEY, completion(3, json!({}))).await);
}

#[tokio::test]
async fn adapters_and_stored_bytes() {
    let app = app_with(Options::default()).await;
    limit(&app, json!({"adapters": 2})).await;
    let upload = |name: &str| json!({"name": name, "numbers": vec![0.5; 13]});
    let put = async |name: &str| call(&app, KEY, Method::POST, "/adapters", Some(upload(name))).await;
    assert!(put("a").await.status == 201 && put("b").await.status == 201);
    assert_quota(&put("c").await);
    assert!(app.get("/adapters/c").await.status == 404, "nothing of it is there");
    let lines = ["c", "a"].map(|name| {
        let mut line = upload(name);
        line["on_conflict"] = json!("new_generation");
        line.to_string()
    });
    let mut batch = request(KEY, Method::POST, "/adapters/batch", Some(json!(null)));
    *batch.body_mut() = lines.join("\n").into();
    batch.headers_mut().insert(header::CONTENT_TYPE, "application/x-ndjson".parse().unwrap());
    let answers: Vec<Value> =
        app.send(batch).await.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers[0]["error"]["code"], "insufficient_quota", "{answers:?}");
    assert!(answers[1]["generation"].is_string(), "{answers:?}");
    assert_eq!(call(&app, OTHER, Method::POST, "/adapters", Some(upload("c"))).await.status, 201);
    assert_eq!(app.delete("/adapters/a").await.status, 204);
    assert_eq!(put("c").await.status, 201);

    // Two adapters of 26 bytes and an empty object each.
    limit(&app, json!({"adapters": -1, "stored_bytes": 83})).await;
    assert_quota(&put("d").await);
    limit(&app, json!({"stored_bytes": 84})).await;
    assert_eq!(put("d").await.status, 201);
    assert_quota(&put("e").await);
}

/// Jobs over a toy, three of which may run at once.
fn trainer(toy: Arc<Toy>) -> Options {
    let training = TrainingConfig { running: 3, ..TrainingConfig::default() };
    Options { policies: Some(Arc::new(Toys(toy))), training, ..Options::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_under_way() {
    let app = app_with(trainer(Toy::slow(20))).await;
    limit(&app, json!({"queued_jobs": 1})).await;
    let long = |name: &str| letters_with(name, json!({"steps": 1000}));
    let first = app.train(long("a")).await;
    assert_quota(&app.post("/adapters/train", long("b")).await);
    assert_eq!(call(&app, OTHER, Method::POST, "/adapters/train", Some(long("b"))).await.status, 202);
    limit(&app, json!({"queued_jobs": null})).await;
    let second = app.train(long("b")).await;
    // One of a tenant runs at once, until more may.
    app.until(&first, |job| job["status"] == "running" && job["step"].as_u64().unwrap() > 0).await;
    assert_eq!(app.job(&second).await["status"], "queued");
    limit(&app, json!({"running_jobs": 2})).await;
    app.until(&second, |job| job["status"] == "running").await;
    assert_eq!(app.job(&first).await["status"], "running");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_to_train_on_in_a_day() {
    let app = app_with(trainer(Arc::default())).await;
    limit(&app, json!({"trained_tokens_per_day": 1})).await;
    let id = app.train(letters("alice")).await;
    let waiting = app.until(&id, |job| job["status"] == "queued" && job["step"] == 1).await;
    assert_eq!(waiting["steps"], 12);
    let events = app.events(&id).await;
    assert!(events.iter().any(|event| event["message"].as_str().unwrap().contains("tomorrow")), "{events:?}");
    let refused = app.post("/adapters/train", letters("bob")).await;
    assert_wait(&refused, 24 * 60 * 60);
    // With room again the job goes on by itself, from where it stood, to the same numbers as one that nobody stopped.
    limit(&app, json!({"trained_tokens_per_day": -1})).await;
    let done = app.ended(&id).await;
    assert_eq!((&done["status"], &done["step"]), (&json!("succeeded"), &json!(12)), "{done}");
    let undisturbed = app.ended(&app.train(letters("twin")).await).await;
    assert_eq!(done["result"]["generation"], undisturbed["result"]["generation"]);
    let usage = app.get("/usage").await.json();
    let trained = |job: &Value| job["result"]["trained_tokens"].as_u64().unwrap();
    assert_eq!(usage["total"]["trained_tokens"], trained(&done) + trained(&undisturbed), "{usage}");
}

#[tokio::test]
async fn what_was_used_is_counted_by_day_to_the_token() {
    let app = app_with(Options::default()).await;
    let mut expected = (0, 0);
    for (prompt, n) in [(10, 1), (7, 3)] {
        let answer = complete(&app, KEY, completion(prompt, json!({"n": n}))).await.json();
        expected.0 += answer["usage"]["prompt_tokens"].as_u64().unwrap();
        expected.1 += answer["usage"]["completion_tokens"].as_u64().unwrap();
    }
    // A stream that is cut: what was read of it counts.
    let mut stream = app.open("/v1/completions", completion(9, json!({"max_tokens": 60, "stream": true}))).await;
    stream.next().await.unwrap();
    drop(stream);
    complete(&app, OTHER, completion(100, json!({}))).await;
    assert_eq!(complete(&app, KEY, json!({"model": MODEL})).await.status, 400);

    let deadline = Instant::now() + Duration::from_secs(10);
    let usage = loop {
        let usage = app.get("/usage").await.json();
        if usage["total"]["prompt_tokens"] == expected.0 + 9 {
            break usage;
        }
        assert!(Instant::now() < deadline, "{usage}");
    };
    let total = &usage["total"];
    assert_eq!((&usage["tenant"], &total["requests"]), (&json!("acme"), &json!(4)));
    let completion = total["completion_tokens"].as_u64().unwrap();
    assert!((expected.1 + 1..=expected.1 + 60).contains(&completion), "{usage}");
    let days = usage["data"].as_array().unwrap();
    assert!((1..=2).contains(&days.len()) && days[0]["day"].as_str().unwrap().len() == 10, "{usage}");

    let path = "/admin/tenants/acme/usage";
    assert_eq!(call(&app, ADMIN, Method::GET, path, None).await.json(), usage);
    assert_eq!(call(&app, OTHER, Method::GET, path, None).await.status, 403);
    assert_eq!(call(&app, ADMIN, Method::GET, "/admin/tenants/nobody/usage", None).await.status, 404);
    assert_eq!(app.get("/usage?from=2001-01-01&to=2001-02-01").await.json()["data"], json!([]));
    for query in ["from=yesterday", "to=2026-02-30", "from=2026-11-02&to=2026-11-01", "from=1000-01-01"] {
        assert_eq!(app.get(&format!("/usage?{query}")).await.status, 400, "{query}");
    }
    // It is in the store, and not in this process alone.
    let restarted = TestApp::with(Options { folder: Some(app.folder.clone()), ..Options::default() }).await;
    assert_eq!(restarted.get("/usage").await.json(), usage);
}

#[tokio::test]
async fn limits_are_shown_set_and_checked() {
    let app = app_with(Options::default()).await;
    app.state.service.accounts.set_defaults(|limits| limits.adapters = Some(50));
    let shown = call(&app, ADMIN, Method::GET, "/admin/tenants/acme", None).await.json();
    assert_eq!((&shown["limits"]["adapters"], &shown["overrides"]["adapters"]), (&json!(50), &json!(null)));
    assert_eq!((&shown["limits"]["queued_jobs"], &shown["limits"]["weight"]), (&json!(16), &json!(1)));
    let names: Vec<&String> = shown["limits"].as_object().unwrap().keys().collect();
    assert_eq!(names, shown["overrides"].as_object().unwrap().keys().collect::<Vec<_>>());

    let set = limit(&app, json!({"adapters": 9_007_199_254_740_991_u64, "stored_bytes": 0, "weight": 1000})).await;
    assert_eq!(set["limits"]["adapters"], 9_007_199_254_740_991_u64);
    let set = limit(&app, json!({"adapters": -1, "weight": null})).await;
    assert_eq!((&set["limits"]["adapters"], &set["overrides"]["adapters"]), (&json!(null), &json!(-1)));
    assert_eq!((&set["limits"]["stored_bytes"], &set["limits"]["weight"]), (&json!(0), &json!(1)));
    assert_eq!(call(&app, ADMIN, Method::GET, "/admin/tenants/acme", None).await.json(), set);
    let listed = call(&app, ADMIN, Method::GET, "/admin/tenants", None).await.json();
    assert_eq!(listed["data"][0], set);
    assert_eq!(listed["data"][2]["limits"]["adapters"], 50, "another tenant has what it had");

    for (limits, param) in [
        (json!({"adapters": -2}), "limits.adapters"),
        (json!({"stored_bytes": 9_007_199_254_740_992_u64}), "limits.stored_bytes"),
        (json!({"requests_per_minute": i64::MIN}), "limits.requests_per_minute"),
        (json!({"tokens_per_minute": u64::MAX}), "limits.tokens_per_minute"),
        (json!({"tokens_per_minute": 1.5}), "limits.tokens_per_minute"),
        (json!({"concurrent_requests": "many"}), "limits.concurrent_requests"),
        (json!({"weight": 0}), "limits.weight"),
        (json!({"weight": -1}), "limits.weight"),
        (json!({"weight": 1001}), "limits.weight"),
        (json!({"adaptors": 1}), "limits.adaptors"),
    ] {
        let body = json!({"limits": limits});
        let answer = call(&app, ADMIN, Method::PATCH, "/admin/tenants/acme", Some(body.clone())).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{body}: {}", answer.text);
    }
    let none = json!({"limits": {}});
    assert_eq!(call(&app, ADMIN, Method::PATCH, "/admin/tenants/nobody", Some(none.clone())).await.status, 404);
    assert_eq!(call(&app, KEY, Method::PATCH, "/admin/tenants/acme", Some(none)).await.status, 403);
    assert_eq!(call(&app, ADMIN, Method::GET, "/admin/tenants/acme", None).await.json(), set, "nothing was changed");
}
