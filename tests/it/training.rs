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
use mote::service::training::TrainingConfig;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::{
    app::{KEY, MODEL, Options, TestApp},
    toy::{Toy, Toys},
    training_owners::conflict,
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

    pub(crate) async fn do_to(&self, id: &str, what: &str) -> (u16, Value) {
        let answer = self.post(&format!("/adapters/train/{id}/{what}"), json!({})).await;
        (answer.status.as_u16(), answer.json())
    }
}

pub(crate) fn status(job: &Value) -> &str {
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
