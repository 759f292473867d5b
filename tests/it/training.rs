//! Jobs over a toy policy, through the router: from the request to the published adapter.

use std::{
    collections::BTreeSet,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Request, header},
};
use futures::StreamExt as _;
use mote::{service::training::TrainingConfig, tenant::ApiKey};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::{
    app::{KEY, MODEL, Options, TestApp},
    toy::{Toy, Toys},
};

/// A server whose jobs have toys for policies.
pub(crate) async fn toy_app(toy: &Arc<Toy>, options: Options) -> TestApp {
    TestApp::with(Options { policies: Some(Arc::new(Toys(toy.clone()))), ..options }).await
}

/// A job that learns to say the letter c.
pub(crate) fn letters(name: &str) -> Value {
    let items: Vec<Value> =
        (0..6).map(|n| json!({"messages": [{"role": "user", "content": format!("Q{n}")}], "answer": "c"})).collect();
    json!({
        "name": name,
        "method": "grpo",
        "dataset": items,
        "validation": &items[..4],
        "grader": {"type": "string_check", "reference": "{{item.answer}}"},
        "hyperparameters": {
            "steps": 12, "prompts_per_step": 3, "samples_per_prompt": 8, "max_completion_tokens": 8, "learning_rate": 0.3,
            "flat_reward_steps": 0,
        },
        "seed": 7,
    })
}

/// `letters` with other hyperparameters.
pub(crate) fn letters_with(name: &str, hyper: Value) -> Value {
    let mut job = letters(name);
    for (key, value) in hyper.as_object().unwrap() {
        job["hyperparameters"][key] = value.clone();
    }
    job
}

impl TestApp {
    /// Makes a job that is taken; gives its id.
    pub(crate) async fn train(&self, body: Value) -> String {
        let answer = self.post("/adapters/train", body).await;
        assert_eq!(answer.status.as_u16(), 202, "{}", answer.text);
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    /// A job as it is.
    pub(crate) async fn job(&self, id: &str) -> Value {
        let answer = self.get(&format!("/adapters/train/{id}")).await;
        assert_eq!(answer.status.as_u16(), 200, "{}", answer.text);
        answer.json()
    }

    /// Waits for a job to be so.
    pub(crate) async fn until(&self, id: &str, what: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let job = self.job(id).await;
            if what(&job) {
                return job;
            }
            assert!(Instant::now() < deadline, "{job}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits for a job's end.
    pub(crate) async fn ended(&self, id: &str) -> Value {
        self.until(id, |job| ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().unwrap())).await
    }

    /// All events of a job.
    pub(crate) async fn events(&self, id: &str) -> Vec<Value> {
        let answer = self.get(&format!("/adapters/train/{id}/events?limit=1000")).await.json();
        assert_eq!(answer["has_more"], false);
        answer["data"].as_array().unwrap().clone()
    }

    async fn do_to(&self, id: &str, what: &str) -> (u16, Value) {
        let answer = self.post(&format!("/adapters/train/{id}/{what}"), json!({})).await;
        (answer.status.as_u16(), answer.json())
    }
}

fn status(job: &Value) -> &str {
    job["status"].as_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_trains_measures_and_publishes() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let mut body = letters("alice");
    body["full_precision"] = json!(true);
    body["metadata"] = json!({"note": "mine"});
    let id = app.train(body).await;
    let job = app.ended(&id).await;
    assert_eq!(status(&job), "succeeded", "{job}");
    assert_eq!((&job["step"], &job["steps"], &job["name"]), (&json!(12), &json!(12), &json!("alice")));
    // Of all steps: the last ones may have nothing to learn from any more.
    let events = app.events(&id).await;
    let steps = events.iter().filter(|event| event["type"] == "step");
    let names: BTreeSet<&str> =
        steps.flat_map(|event| event["data"].as_object().unwrap().keys().map(String::as_str)).collect();
    assert_eq!(job["metrics"]["step"], 12);
    for name in [
        "step",
        "reward_mean",
        "reward_std",
        "zero_variance_groups",
        "kl",
        "entropy",
        "clip_fraction",
        "completion_tokens_mean",
        "completion_tokens_max",
        "truncated",
        "logprob_difference_mean",
        "logprob_difference_max",
        "importance_weight_mean",
        "importance_weight_min",
        "importance_weight_max",
        "gradient_norm",
        "learning_rate",
        "tokens_per_second",
    ] {
        assert!(names.contains(name), "{name} is not among {names:?}");
    }
    let result = &job["result"];
    for part in ["zero", "adapter", "full_precision"] {
        let measured = &result["validation"][part];
        assert_eq!(measured["n"], 4, "{result}");
        assert!(measured["interval"]["low"].as_f64().unwrap() <= measured["reward"].as_f64().unwrap());
        assert!(measured["sampled"].is_number());
    }
    assert_eq!(
        (&result["validation"]["zero"]["reward"], &result["validation"]["adapter"]["reward"]),
        (&json!(0.0), &json!(1.0))
    );
    assert_eq!(result["end"], json!({"kind": "steps"}));
    assert!(result["trained_tokens"].as_u64().unwrap() >= 12 * 3 * 8, "{result}");

    let adapter = app.get("/adapters/alice").await.json();
    assert_eq!((&adapter["generation"], &adapter["bytes"]), (&result["generation"], &json!(26)));
    assert_eq!(adapter["metadata"], json!({"note": "mine", "job": id}));
    let weights = app.get("/adapters/alice/weights?format=json").await.json();
    let numbers: Vec<f64> = serde_json::from_value(weights["numbers"].clone()).unwrap();
    assert!((0..13).all(|k| k == 2 || numbers[k] < numbers[2]), "c is the likeliest: {numbers:?}");
    // It is served under its name at once.
    let answer = app.ok("/v1/completions", json!({"model": "alice", "prompt": "Once", "max_tokens": 2})).await;
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1);

    let ids: Vec<u64> = events.iter().map(|event| event["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (1..=events.len() as u64).collect::<Vec<_>>());
    let steps: Vec<u64> = events
        .iter()
        .filter(|event| event["type"] == "step")
        .map(|event| event["data"]["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>());
    assert_eq!(events.last().unwrap()["data"]["status"], "succeeded");

    let checkpoints = app.get(&format!("/adapters/train/{id}/checkpoints")).await.json();
    let kept: Vec<u64> =
        checkpoints["data"].as_array().unwrap().iter().map(|it| it["step"].as_u64().unwrap()).collect();
    assert_eq!(kept, [12, 10, 5]);
    // The last checkpoint's numbers, rounded, are what was published; and they run inside a request.
    assert_eq!(checkpoints["data"][0]["data"], weights["data"]);
    let inline = checkpoints["data"][2]["model"].as_str().unwrap();
    app.ok("/v1/completions", json!({"model": inline, "prompt": "Once", "max_tokens": 2})).await;

    let samples = app.get(&format!("/adapters/train/{id}/samples?limit=4")).await.json();
    let phases: BTreeSet<&str> =
        samples["data"].as_array().unwrap().iter().map(|it| it["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, BTreeSet::from(["adapter", "full_precision", "training", "zero"]));
    assert_eq!(samples["has_more"], true);
    let first = &samples["data"].as_array().unwrap().iter().find(|it| it["phase"] == "training").unwrap()["samples"][0];
    assert!(first["text"].is_string() && first["reward"].is_number(), "{first}");

    let metrics = app.metrics();
    assert!(metrics.contains("mote_training_jobs_total{status=\"succeeded\"} 1"), "{metrics}");
    assert!(metrics.contains("mote_training_steps_total 12"));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_method_learns_and_the_same_seed_is_the_same_adapter() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let mut supervised = letters("sft");
    supervised["method"] = json!("sft");
    supervised["hyperparameters"] =
        json!({"steps": 12, "prompts_per_step": 3, "max_completion_tokens": 8, "learning_rate": 0.3});
    for item in supervised["dataset"].as_array_mut().unwrap() {
        item["completion"] = json!("hello");
    }
    supervised["validation"] = supervised["dataset"].clone();
    supervised.as_object_mut().unwrap().remove("grader");
    let mut evolved = letters("es");
    evolved["method"] = json!("es");
    evolved["hyperparameters"] = json!({
        "steps": 15, "prompts_per_step": 2, "samples_per_prompt": 4, "max_completion_tokens": 8, "population": 16, "learning_rate": 0.3, "sigma": 0.5,
    });
    for (body, kind) in [(letters("grpo"), "reward"), (evolved, "reward"), (supervised, "loss")] {
        let name = body["name"].as_str().unwrap().to_owned();
        let again = json!({"name": format!("{name}-again"), "on_conflict": "new_generation"});
        let mut second = body.clone();
        second.as_object_mut().unwrap().extend(again.as_object().unwrap().clone());
        let (first, second) = (app.train(body).await, app.train(second).await);
        let job = app.ended(&first).await;
        assert_eq!(status(&job), "succeeded", "{job}");
        let validation = &job["result"]["validation"];
        let (zero, adapter) =
            (validation["zero"][kind].as_f64().unwrap(), validation["adapter"][kind].as_f64().unwrap());
        let gain = if kind == "loss" { zero - adapter } else { adapter - zero };
        assert!(gain > 0.3, "{name}: {validation}");
        let again = app.ended(&second).await;
        assert_eq!(again["result"]["generation"], job["result"]["generation"], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_goes_on_from_an_adapter_and_adds_a_generation() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let first = app.ended(&app.train(letters_with("alice", json!({"steps": 3}))).await).await;
    let before = first["result"]["generation"].clone();
    let mut body = letters_with("alice", json!({"steps": 3}));
    assert_eq!(app.post("/adapters/train", body.clone()).await.error(), conflict("name"));
    body["on_conflict"] = json!("new_generation");
    body["init_from"] = json!("alice");
    let second = app.ended(&app.train(body).await).await;
    assert_eq!(status(&second), "succeeded", "{second}");
    assert_eq!(second["init_from"], "alice");
    let generations = app.get("/adapters/alice/generations").await.json();
    let all: Vec<&Value> = generations["data"].as_array().unwrap().iter().map(|it| &it["generation"]).collect();
    assert_eq!(all, [&second["result"]["generation"], &before]);
}

fn conflict(param: &str) -> (u16, String, Option<String>, Option<String>) {
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

/// A key of another tenant.
async fn second_tenant(app: &TestApp) -> String {
    let key = ApiKey::generate().unwrap();
    let new = mote::store::NewKey {
        key: key.clone(),
        tenant: "other".into(),
        create_tenant: true,
        role: mote::tenant::Role::Member,
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
async fn events_stream_until_the_end_and_again_from_where_a_client_was() {
    let app = toy_app(&Toy::slow(2), Options::default()).await;
    let id = app.train(letters("alice")).await;
    let path = format!("/adapters/train/{id}/events");
    let open = |last: Option<&str>| {
        let mut request = Request::get(&path)
            .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
            .header(header::ACCEPT, "text/event-stream");
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let (router, request) = (app.router.clone(), request.body(Body::empty()).unwrap());
        async move { router.oneshot(request).await.unwrap() }
    };
    // A client that loses its connection after the third event.
    let mut pieces = open(None).await.into_body().into_data_stream();
    let mut text = String::new();
    while text.matches("\nid: ").count() + usize::from(text.starts_with("id: ")) < 3 {
        text += std::str::from_utf8(&pieces.next().await.unwrap().unwrap()).unwrap();
    }
    drop(pieces);
    app.ended(&id).await;
    let rest = axum::body::to_bytes(open(Some("3")).await.into_body(), usize::MAX).await.unwrap();
    let rest = String::from_utf8(rest.to_vec()).unwrap();
    let all = app.events(&id).await;
    let ids: Vec<u64> = rest.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect();
    assert_eq!(ids, (4..=all.len() as u64).collect::<Vec<_>>());
    let data: Vec<&str> = rest.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"));
    assert_eq!(serde_json::from_str::<Value>(data[0]).unwrap(), all[3]);
    assert!(rest.contains("event: step\n"));

    let page = app.get(&format!("{path}?after=2&limit=2")).await.json();
    assert_eq!((page["data"][0]["id"].as_u64(), page["has_more"].as_bool()), (Some(3), Some(true)));
    let answer = app.get(&format!("{path}?limit=0")).await;
    assert_eq!(answer.error().2.as_deref(), Some("limit"));
    let answer = open(Some("three")).await;
    assert_eq!(answer.status().as_u16(), 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_say_why_and_publish_nothing() {
    let failing = json!({"type": "multi", "graders": {"a": {"type": "text_similarity", "reference": "cd", "evaluation_metric": "fuzzy_match"}},
        "calculate_output": "sqrt(a * (a - 1))"});
    for (what, job, code, words) in [
        ("grader", json!({"grader": failing}), "grader_failed", "not a finite number"),
        (
            "flat",
            json!({"grader": {"type": "string_check", "reference": "never"}, "hyper": {"flat_reward_steps": 3}}),
            "reward_never_varied",
            "never varied",
        ),
        ("model", json!({}), "model_failed", "the toy is out of order"),
        ("panic", json!({}), "internal_error", "The server had an error"),
    ] {
        let toy = Arc::new(Toy::default());
        match what {
            "model" => toy.fails_from.store(5, Ordering::SeqCst),
            "panic" => toy.panics_at.store(5, Ordering::SeqCst),
            _ => {}
        }
        let app = toy_app(&toy, Options::default()).await;
        let mut body = letters("alice");
        if let Some(hyper) = job.get("hyper") {
            body = letters_with("alice", hyper.clone());
        }
        if let Some(grader) = job.get("grader") {
            body["grader"] = grader.clone();
        }
        let id = app.train(body).await;
        let job = app.ended(&id).await;
        assert_eq!((status(&job), &job["result"]), ("failed", &Value::Null), "{what}: {job}");
        assert_eq!(job["error"]["code"], code, "{what}: {job}");
        assert!(job["error"]["message"].as_str().unwrap().contains(words), "{what}: {job}");
        assert_eq!(app.get("/adapters/alice").await.status.as_u16(), 404);
        let last = app.events(&id).await.pop().unwrap();
        assert_eq!((&last["level"], &last["data"]["status"]), (&json!("error"), &json!("failed")));
        // Serving goes on, and so does training.
        app.ok("/v1/completions", json!({"model": crate::app::MODEL, "prompt": "Once", "max_tokens": 2})).await;
        if what != "model" {
            let next = app.ended(&app.train(letters("next")).await).await;
            assert_eq!(status(&next), "succeeded", "{what}: {next}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn much_data_is_checked_while_the_job_is_validating() {
    let training = TrainingConfig { checked_at_once: 0, ..TrainingConfig::default() };
    let app = toy_app(&Arc::default(), Options { training, ..Options::default() }).await;
    let made = app.post("/adapters/train", letters("alice")).await;
    assert_eq!((made.status.as_u16(), &made.json()["status"]), (202, &json!("validating")));
    let job = app.ended(made.json()["id"].as_str().unwrap()).await;
    assert_eq!((status(&job), &job["steps"]), ("succeeded", &json!(12)));
    let mut bad = letters("bob");
    bad["dataset"][1].as_object_mut().unwrap().remove("answer");
    let job = app.ended(&app.train(bad).await).await;
    assert_eq!((status(&job), &job["error"]["param"]), ("failed", &json!("dataset")));
    assert!(job["error"]["message"].as_str().unwrap().contains("item 2"), "{job}");
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

#[tokio::test(flavor = "multi_thread")]
async fn rollouts_go_through_the_engine() {
    // The scripted model takes no notice of an adapter: all candidates answer alike, and the job says that nothing can be learnt.
    let app = TestApp::new().await;
    let body = json!({
        "name": "engine", "method": "es", "dataset": [{"prompt": "Once"}, {"prompt": "upon a time"}],
        "grader": {"type": "string_check", "reference": "!", "operation": "like"},
        "hyperparameters": {"steps": 5, "prompts_per_step": 2, "population": 4, "max_completion_tokens": 6, "flat_reward_steps": 2, "temperature": 0.7},
    });
    let id = app.train(body).await;
    let job = app.ended(&id).await;
    assert_eq!(job["error"]["code"], "reward_never_varied", "{job}");
    assert_eq!((&job["metrics"]["prompts"], &job["metrics"]["completion_tokens_max"]), (&json!(2), &json!(6)));
    assert!(job["metrics"]["entropy"].as_f64().unwrap() > 0.0, "{job}");
    let samples = app.get(&format!("/adapters/train/{id}/samples")).await.json();
    assert!(!samples["data"][0]["samples"][0]["text"].as_str().unwrap().is_empty(), "{samples}");
    // This model cannot be differentiated: a job that needs it fails and says so, and serving goes on.
    let body = json!({
        "name": "supervised", "method": "sft", "dataset": [{"prompt": "Once", "completion": " upon"}], "hyperparameters": {"steps": 2, "max_completion_tokens": 8},
    });
    let job = app.ended(&app.train(body).await).await;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("model_failed")), "{job}");
    assert!(job["error"]["message"].as_str().unwrap().contains("cannot be differentiated"), "{job}");
    assert_eq!(app.get("/adapters/supervised").await.status.as_u16(), 404);
    app.ok("/v1/completions", json!({"model": MODEL, "prompt": "Once", "max_tokens": 2})).await;
}
