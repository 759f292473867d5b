//! Owners and their jobs: pausing, resuming, cancelling, limits, retries, and what others see of them.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Request, header},
};
use mote::{
    service::training::TrainingConfig,
    tenant::{ApiKey, Role},
};
use serde_json::{Value, json};

use crate::{
    app::{KEY, Options, TestApp},
    toy::Toy,
    training::{letters, letters_with, status, toy_app},
};

pub(crate) fn conflict(param: &str) -> (u16, String, Option<String>, Option<String>) {
    (409, "conflict".into(), Some(param.into()), Some("name_taken".into()))
}

#[tokio::test(flavor = "multi_thread")]
async fn pausing_and_resuming_changes_nothing_in_the_end() {
    let toy = Toy::slow(3);
    let app = toy_app(&toy, Options::default()).await;
    let plain = app.ended(&app.train(letters("plain")).await).await;
    let id = app.train(letters("paused")).await;
    for at in [2, 5, 9] {
        app.until(&id, |job| job["step"].as_u64().unwrap() >= at).await;
        let (code, job) = app.do_to(&id, "pause").await;
        assert_eq!((code, status(&job)), (200, "paused"));
        assert_eq!(app.do_to(&id, "pause").await.0, 200, "again changes nothing");
        // At once: what the worker still does is not seen.
        let step = job["step"].clone();
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert_eq!(app.job(&id).await["step"], step);
        let (code, job) = app.do_to(&id, "resume").await;
        assert_eq!(code, 200);
        assert!(["queued", "running"].contains(&status(&job)));
    }
    let job = app.ended(&id).await;
    assert_eq!(status(&job), "succeeded", "{job}");
    assert_eq!(job["result"]["generation"], plain["result"]["generation"]);
    for what in ["pause", "resume", "cancel"] {
        let answer = app.post(&format!("/adapters/train/{id}/{what}"), json!({})).await;
        assert_eq!(answer.error(), (409, "conflict".into(), None, Some("job_status".into())));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_job_publishes_nothing_and_frees_its_name() {
    let toy = Toy::slow(5);
    let app = toy_app(&toy, Options::default()).await;
    let (running, queued) = (app.train(letters("first")).await, app.train(letters("second")).await);
    app.until(&running, |job| job["step"].as_u64().unwrap() >= 2).await;
    assert_eq!(status(&app.job(&queued).await), "queued", "one runs at a time");
    assert_eq!(app.post("/adapters/train", letters("first")).await.error(), conflict("name"));
    let upload = json!({"name": "first", "numbers": vec![0.5; 13]});
    assert_eq!(app.post("/adapters", upload.clone()).await.error(), conflict("name"));

    for id in [&running, &queued] {
        let (code, job) = app.do_to(id, "cancel").await;
        assert_eq!((code, status(&job)), (200, "cancelled"));
        assert_eq!(app.do_to(id, "cancel").await.0, 200, "again changes nothing");
    }
    assert_eq!(app.post("/adapters", upload).await.status.as_u16(), 201);
    let training = app.state.service.training().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while training.running() > 0 {
        assert!(Instant::now() < deadline, "the worker goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let seen = toy.calls.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(toy.calls.load(Ordering::SeqCst), seen);
    let job = app.job(&running).await;
    assert_eq!((status(&job), &job["result"], &job["error"]), ("cancelled", &Value::Null, &Value::Null));
    assert_eq!(app.get("/adapters/second").await.status.as_u16(), 404);
    let last = app.events(&running).await.pop().unwrap();
    assert_eq!(last["data"]["status"], "cancelled");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adapter_that_becomes_public_while_a_members_job_runs_stays_as_it_is() {
    let app = toy_app(&Toy::slow(20), Options::default()).await;
    let admin = new_key(&app, "acme", Role::Admin).await;
    let by_admin = |path: &str, body: Value| app.send(as_key(&admin, "POST", path, Some(body)));
    let again = |name: &str| {
        let mut body = letters(name);
        body["on_conflict"] = json!("new_generation");
        body
    };
    let house = |x: f64, public: bool| json!({"name": "house", "numbers": vec![x; 13], "public": public, "on_conflict": "new_generation"});
    assert_eq!(app.post("/adapters", house(0.5, false)).await.status.as_u16(), 201);
    let id = app.train(again("house")).await;
    app.until(&id, |job| job["step"].as_u64().unwrap() >= 1).await;
    let public = by_admin("/adapters", house(0.25, true)).await;
    assert!(public.status.is_success(), "{}", public.text);
    let job = app.ended(&id).await;
    assert_eq!(status(&job), "failed", "{job}");
    assert!(job["error"]["message"].as_str().unwrap().contains("'house' is public"), "{job}");
    assert_eq!(app.get("/adapters/house").await.json()["generation"], public.json()["generation"]);

    // Whoever may change it may train it.
    assert_eq!(app.post("/adapters/train", again("house")).await.status.as_u16(), 403);
    let made = by_admin("/adapters/train", again("house")).await;
    let job = app.ended(made.json()["id"].as_str().unwrap()).await;
    assert_eq!(status(&job), "succeeded", "{job}");
    assert_eq!(app.get("/adapters/house").await.json()["generation"], job["result"]["generation"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_are_limited_by_tenant_and_by_server() {
    let training =
        TrainingConfig { running: 2, running_of_tenant: 1, most_of_tenant: 3, most: 4, ..TrainingConfig::default() };
    let app = toy_app(&Toy::slow(20), Options { training, ..Options::default() }).await;
    let mut ids = Vec::new();
    for name in ["a", "b", "c"] {
        ids.push(app.train(letters_with(name, json!({"steps": 1000}))).await);
    }
    let answer = app.post("/adapters/train", letters("d")).await;
    assert_eq!(answer.error(), (429, "rate_limit_error".into(), None, Some("insufficient_quota".into())));
    assert_eq!(answer.headers["x-should-retry"], "false");

    let other = second_tenant(&app).await;
    let theirs = |name: &str| app.send(as_key(&other, "POST", "/adapters/train", Some(letters(name))));
    let made = theirs("a").await;
    assert_eq!(made.status.as_u16(), 202, "names are a tenant's own: {}", made.text);
    let answer = theirs("b").await;
    assert_eq!(answer.error(), (429, "rate_limit_error".into(), None, Some("queue_full".into())));
    assert!(answer.headers.contains_key("retry-after"));

    // One of each tenant runs, although two places are free for the first one's.
    app.until(&ids[0], |job| job["step"].as_u64().unwrap() >= 1).await;
    let id = made.json()["id"].as_str().unwrap().to_owned();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let job = app.send(as_key(&other, "GET", &format!("/adapters/train/{id}"), None)).await.json();
        if job["status"] == "running" {
            break;
        }
        assert!(Instant::now() < deadline, "{job}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(status(&app.job(&ids[1]).await), "queued");
    app.do_to(&ids[0], "cancel").await;
    app.until(&ids[1], |job| status(job) == "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_job_lets_another_tenants_have_its_turn() {
    let training = TrainingConfig { running: 1, turn: Duration::ZERO, ..TrainingConfig::default() };
    let app = toy_app(&Toy::slow(3), Options { training, ..Options::default() }).await;
    let steps = || json!({"steps": 60});
    let plain = app.ended(&app.train(letters_with("plain", steps())).await).await;
    let mine = app.train(letters_with("mine", steps())).await;
    let next = app.train(letters("next")).await;
    app.until(&mine, |job| job["step"].as_u64().unwrap() >= 2).await;

    let other = second_tenant(&app).await;
    let made = app.send(as_key(&other, "POST", "/adapters/train", Some(letters("theirs")))).await.json();
    let path = format!("/adapters/train/{}", made["id"].as_str().unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let job = app.send(as_key(&other, "GET", &path, None)).await.json();
        if status(&job) == "succeeded" {
            break;
        }
        assert!(Instant::now() < deadline && status(&job) != "failed", "{job}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(["queued", "running"].contains(&status(&app.job(&mine).await)), "it was not waited for");
    assert_eq!(app.job(&next).await["step"], 0, "one's own jobs wait for each other");

    let job = app.ended(&mine).await;
    assert_eq!(status(&job), "succeeded", "{job}");
    assert_eq!(job["result"]["generation"], plain["result"]["generation"], "turns change when, never what");
    let words = |event: &Value| event["message"] == "The job has had its turn and waits while others train.";
    assert!(app.events(&mine).await.iter().any(words));
}

/// A key of another tenant.
async fn second_tenant(app: &TestApp) -> String {
    new_key(app, "other", Role::Member).await
}

async fn new_key(app: &TestApp, tenant: &str, role: Role) -> String {
    let key = ApiKey::generate().unwrap();
    let new = mote::store::NewKey {
        key: key.clone(),
        tenant: tenant.into(),
        create_tenant: true,
        role,
        expires_at: None,
        only_first: false,
    };
    app.state.service.store.create_key(new).await.unwrap();
    key.secret().to_owned()
}

fn as_key(key: &str, method: &str, path: &str, body: Option<Value>) -> Request<Body> {
    let request = Request::builder().method(method).uri(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
    match body {
        None => request.body(Body::empty()).unwrap(),
        Some(body) => request.header(header::CONTENT_TYPE, "application/json").body(body.to_string().into()).unwrap(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_job_does_not_exist() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let id = app.train(letters("mine")).await;
    app.ended(&id).await;
    let other = second_tenant(&app).await;
    for (method, path) in [
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
        ("GET", "/samples"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
    ] {
        for (root, with) in [("/adapters/train", true), ("/v1/fine_tuning/jobs", path != "/samples")] {
            if with {
                let answer = app.send(as_key(&other, method, &format!("{root}/{id}{path}"), None)).await;
                assert_eq!(
                    answer.error(),
                    (404, "invalid_request_error".into(), None, Some("job_not_found".into())),
                    "{path}"
                );
            }
        }
    }
    assert_eq!(app.send(as_key(&other, "GET", "/adapters/train", None)).await.json()["data"], json!([]));
    for odd in ["x", "ftjob-", "ftjob-ZZ", "%00", "ftjob-0198c0ffee007000800000000000000%00"] {
        assert_eq!(app.get(&format!("/adapters/train/{odd}")).await.status.as_u16(), 404, "{odd}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retried_request_is_the_same_job() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let send = |key: &str, body: Value| {
        let mut request = as_key(KEY, "POST", "/adapters/train", Some(body));
        request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        app.send(request)
    };
    let first = send("k1", letters("alice")).await.json();
    let again = send("k1", letters("alice")).await;
    assert_eq!((again.status.as_u16(), &again.json()["id"]), (202, &first["id"]));
    assert_eq!(send("k1", letters("bob")).await.error().3.as_deref(), Some("idempotency_key_reused"));
    assert_eq!(app.get("/adapters/train").await.json()["data"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_end_is_the_end_of_its_jobs() {
    let app = toy_app(&Toy::slow(5), Options::default()).await;
    let id = app.train(letters_with("alice", json!({"steps": 1000}))).await;
    app.until(&id, |job| job["step"].as_u64().unwrap() >= 1).await;
    app.state.service.delete_tenant(&mote::tenant::Caller::built_in(), "acme").await.unwrap();
    let training = app.state.service.training().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while training.running() > 0 {
        assert!(Instant::now() < deadline, "the worker goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
