//! A job survives its server: whenever that dies, the curve and the numbers are those of a run that nobody disturbed.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    app::{Options, TestApp},
    durability::tamper,
    support::{self, parts},
    toy::{Toy, Toys},
    training::letters_with,
};

/// Metrics of every step, without the times.
fn curve(events: &[Value]) -> Vec<Value> {
    let mut steps: Vec<Value> =
        events.iter().filter(|event| event["type"] == "step").map(|event| event["data"].clone()).collect();
    for step in &mut steps {
        step.as_object_mut().unwrap().retain(|name, _| !name.ends_with("_seconds") && !name.ends_with("per_second"));
    }
    steps
}

/// What a job has come to.
async fn outcome(app: &TestApp, id: &str, name: &str) -> (Value, Vec<Value>, Value) {
    let job = app.ended(id).await;
    assert_eq!(job["status"], "succeeded", "{job}");
    let weights = app.get(&format!("/adapters/{name}/weights?format=json")).await.json();
    (job["result"].clone(), curve(&app.events(id).await), weights["numbers"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_is_killed_anywhere_ends_as_one_that_was_not() {
    let plans = [
        ("grpo", json!({"steps": 12, "checkpoint_every": 3, "updates_per_batch": 2, "beta": 0.01})),
        (
            "es",
            json!({"steps": 12, "prompts_per_step": 2, "samples_per_prompt": 2, "max_completion_tokens": 8, "population": 8, "sigma": 0.5, "learning_rate": 0.3, "checkpoint_every": 4}),
        ),
        (
            "sft",
            json!({"steps": 12, "prompts_per_step": 2, "max_completion_tokens": 8, "learning_rate": 0.3, "checkpoint_every": 5}),
        ),
    ];
    for (method, hyper) in plans {
        let mut body = letters_with("alice", json!({}));
        body["method"] = json!(method);
        if method == "grpo" {
            body = letters_with("alice", hyper);
        } else {
            body["hyperparameters"] = hyper;
        }
        if method == "sft" {
            for part in ["dataset", "validation"] {
                for item in body[part].as_array_mut().unwrap() {
                    item["completion"] = json!("hello");
                }
            }
        }
        let start = async |toy: &Arc<Toy>, folder| {
            TestApp::with(Options { policies: Some(Arc::new(Toys(toy.clone()))), folder, ..Options::default() }).await
        };
        let app = start(&Arc::default(), None).await;
        let id = app.train(body.clone()).await;
        let undisturbed = outcome(&app, &id, "alice").await;
        drop(app);

        let mut app = start(&Toy::slow(2), None).await;
        let id = app.train(body).await;
        // After so many calls of the policy: within steps, between them, before the first checkpoint, in the evaluation.
        let mut deaths = 0;
        for calls in [2, 7, 5, 11, 1, 9, 13, 3] {
            let toy = Toy::slow(2);
            let seen = app.job(&id).await;
            if seen["status"] == "succeeded" {
                break;
            }
            let folder = app.folder.clone();
            app.state.service.training().unwrap().play_dead().await;
            app.state.service.store.close().await;
            deaths += 1;
            app = start(&toy, Some(folder)).await;
            while toy.calls.load(Ordering::SeqCst) < calls {
                let job = app.job(&id).await;
                assert_ne!(job["status"], "failed", "{method}: {job}");
                if job["status"] == "succeeded" {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert!(deaths >= 3, "{method}: died only {deaths} times");
        let disturbed = outcome(&app, &id, "alice").await;
        assert_eq!(disturbed.1, undisturbed.1, "{method}: the curve");
        assert_eq!(disturbed.2, undisturbed.2, "{method}: the numbers");
        assert_eq!(disturbed.0, undisturbed.0, "{method}: the result");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_leaves_checkpoints_and_paused_jobs_stay_paused() {
    let toy = Toy::slow(3);
    let with =
        |toy: &Arc<Toy>, folder| Options { policies: Some(Arc::new(Toys(toy.clone()))), folder, ..Options::default() };
    let app = TestApp::with(with(&toy, None)).await;
    let running = app.train(letters_with("running", json!({"steps": 40, "checkpoint_every": 1000}))).await;
    let paused = app.train(letters_with("paused", json!({}))).await;
    assert_eq!(app.post(&format!("/adapters/train/{paused}/pause"), json!({})).await.json()["status"], "paused");
    app.until(&running, |job| job["step"].as_u64().unwrap() >= 5).await;
    assert!(app.state.service.training().unwrap().stop(Duration::from_secs(10)).await);
    let answer = app.post("/adapters/train", letters_with("late", json!({}))).await;
    assert_eq!((answer.error().0, answer.error().3.as_deref()), (503, Some("draining")));
    let checkpoints = app.get(&format!("/adapters/train/{running}/checkpoints")).await.json();
    let at = checkpoints["data"][0]["step"].as_u64().unwrap();
    assert!(at >= 5, "{checkpoints}");
    app.state.service.store.close().await;

    let app = TestApp::with(with(&Arc::default(), Some(app.folder.clone()))).await;
    let job = app.ended(&running).await;
    assert_eq!((&job["status"], &job["step"]), (&json!("succeeded"), &json!(40)));
    let messages: Vec<String> =
        app.events(&running).await.iter().map(|event| event["message"].as_str().unwrap().to_owned()).collect();
    assert!(messages.iter().any(|message| message.contains("restarted")), "{messages:?}");
    assert_eq!(app.job(&paused).await["status"], "paused");
    app.post(&format!("/adapters/train/{paused}/resume"), json!({})).await;
    assert_eq!(app.ended(&paused).await["status"], "succeeded");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_another_base_is_not_gone_on_with() {
    let app = TestApp::with(Options { policies: Some(Arc::new(Toys(Arc::default()))), ..Options::default() }).await;
    let id = app.train(letters_with("alice", json!({"steps": 2}))).await;
    app.ended(&id).await;
    // A job of that base, as its server left it.
    let tenant = app.state.service.store.tenant("acme").await.unwrap().id;
    let new = mote::store::NewJob {
        id: format!("ftjob-{:032x}", u128::MAX),
        tenant,
        name: "bob".into(),
        name_must_be_free: true,
        status: mote::store::JobStatus::Queued,
        spec: {
            let record = app.state.service.store.jobs(tenant, None, 1).await.unwrap().remove(0);
            let mut spec: Value = serde_json::from_str(&record.spec).unwrap();
            spec["fingerprint"] = json!("00".repeat(32));
            spec.to_string()
        },
        steps: 2,
        data: vec![(mote::store::JobData::Training, b"{}".to_vec())],
        limits: mote::tenant::Limits::default(),
        most: 10,
        key: None,
        event: mote::store::NewEvent {
            kind: "status",
            level: mote::store::EventLevel::Info,
            message: "made".into(),
            data: "{}".into(),
        },
    };
    app.state.service.store.create_job(new).await.unwrap();
    // Somebody makes the queue look.
    app.train(letters_with("next", json!({"steps": 1}))).await;
    let job = app.ended(&format!("ftjob-{:032x}", u128::MAX)).await;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("incompatible_adapter")), "{job}");
}

/// Jobs whose rows cannot be read have failed and say so, in the lists of both APIs; none is gone on with, their names are free, and the job beside them ends well.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_job_has_failed_and_is_never_resumed() {
    let with = |folder| Options { policies: Some(Arc::new(Toys(Toy::slow(2)))), folder, ..Options::default() };
    let app = TestApp::with(with(None)).await;
    app.ended(&app.train(letters_with("done", json!({"steps": 2}))).await).await;
    let mut ids = Vec::new();
    for name in ["whole", "status", "steps", "spec", "metrics"] {
        let id = app.train(letters_with(name, json!({"steps": 2000}))).await;
        app.post(&format!("/adapters/train/{id}/pause"), json!({})).await;
        ids.push(id);
    }
    app.state.service.training().unwrap().stop(Duration::from_secs(10)).await;
    app.state.service.store.close().await;
    let damage = [
        "status = 'pause'",
        "steps = 'many', status = 'running'",
        "spec = '{\"method\":', status = 'queued'",
        "metrics = '{'",
    ];
    for (id, damage) in ids[1..].iter().zip(damage) {
        tamper(app.folder.path(), &format!("UPDATE jobs SET {damage} WHERE id = '{id}'")).await;
    }
    tamper(app.folder.path(), "UPDATE jobs SET result = '{' WHERE name = 'done'").await;

    let app = TestApp::with(with(Some(app.folder.clone()))).await;
    let text = app.metrics();
    assert!(text.contains("mote_rows_damaged{kind=\"job\"} 4"), "{text}");
    for root in ["/adapters/train", "/v1/fine_tuning/jobs"] {
        let listed = app.get(root).await.json();
        let listed = listed["data"].as_array().unwrap();
        assert_eq!(listed.len(), 6);
        for job in listed.iter().filter(|job| job["id"] != *ids[0]) {
            assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("job_damaged")), "{job}");
        }
    }
    for id in &ids[1..] {
        let refused = app.post(&format!("/adapters/train/{id}/resume"), json!({})).await;
        assert_eq!((refused.error().0, refused.error().3.as_deref()), (409, Some("job_status")), "{id}");
        assert_eq!(app.get(&format!("/adapters/train/{id}/events")).await.status, 200);
        assert_eq!(app.get(&format!("/adapters/train/{id}/checkpoints")).await.status, 200);
    }
    let whole = &ids[0];
    assert_eq!(app.job(whole).await["status"], "paused");
    app.post(&format!("/adapters/train/{whole}/resume"), json!({})).await;
    app.until(whole, |job| job["status"] == "running").await;
    app.post(&format!("/adapters/train/{whole}/cancel"), json!({})).await;
    let again = app.train(letters_with("steps", json!({"steps": 2}))).await;
    assert_eq!(app.ended(&again).await["status"], "succeeded", "the name is free and the queue moves");
    for id in &ids[1..] {
        assert_eq!(app.job(id).await["status"], "failed");
    }
}

/// A job goes on from the newest checkpoint that can be used, to the numbers of one that nobody disturbed; without any it fails in words.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_costs_the_steps_since_the_one_before() {
    let hyper = json!({"steps": 30, "checkpoint_every": 2});
    let with =
        |toy: &Arc<Toy>, folder| Options { policies: Some(Arc::new(Toys(toy.clone()))), folder, ..Options::default() };
    let app = TestApp::with(with(&Arc::default(), None)).await;
    let id = app.train(letters_with("alice", hyper.clone())).await;
    let undisturbed = outcome(&app, &id, "alice").await;
    drop(app);

    let toy = Toy::slow(3);
    let app = TestApp::with(with(&toy, None)).await;
    let id = app.train(letters_with("alice", hyper.clone())).await;
    app.until(&id, |job| job["step"].as_u64().unwrap() >= 9).await;
    app.state.service.training().unwrap().play_dead().await;
    app.state.service.store.close().await;
    let newest = format!("job = '{id}' AND step = (SELECT MAX(step) FROM job_checkpoints WHERE job = '{id}'");
    let damage = [
        format!("UPDATE job_checkpoints SET state = '{{' WHERE {newest})"),
        format!("UPDATE job_checkpoints SET state = CAST(x'7bff' AS TEXT) WHERE {newest} - 2)"),
        format!("UPDATE job_events SET message = CAST(x'ff' AS TEXT) WHERE job = '{id}' AND seq = 1"),
        format!("UPDATE job_samples SET samples = CAST(x'ff' AS TEXT) WHERE job = '{id}' AND step = 1"),
    ];
    tamper(app.folder.path(), &damage.join(";")).await;
    let app = TestApp::with(with(&Arc::default(), Some(app.folder.clone()))).await;
    for part in ["events", "checkpoints", "samples"] {
        assert_eq!(app.get(&format!("/adapters/train/{id}/{part}")).await.status, 200, "{part}");
    }
    let disturbed = outcome(&app, &id, "alice").await;
    assert_eq!(disturbed, undisturbed);

    let lost = app.train(letters_with("bob", json!({"steps": 2000, "checkpoint_every": 1}))).await;
    app.until(&lost, |job| job["step"].as_u64().unwrap() >= 3).await;
    app.post(&format!("/adapters/train/{lost}/pause"), json!({})).await;
    app.state.service.training().unwrap().stop(Duration::from_secs(10)).await;
    app.state.service.store.close().await;
    tamper(app.folder.path(), &format!("UPDATE job_checkpoints SET state = '{{}}' WHERE job = '{lost}'")).await;
    let app = TestApp::with(with(&Arc::default(), Some(app.folder.clone()))).await;
    assert_eq!(app.get(&format!("/adapters/train/{lost}/checkpoints")).await.json()["data"], json!([]));
    app.post(&format!("/adapters/train/{lost}/resume"), json!({})).await;
    let job = app.ended(&lost).await;
    assert_eq!((&job["status"], &job["error"]["code"]), (&json!("failed"), &json!("checkpoint_unusable")), "{job}");
    assert!(job["error"]["message"].as_str().unwrap().contains("None of the job's"), "{job}");
}

/// All methods on the tiny golden model, in a real process that is killed with SIGKILL.
#[tokio::test(flavor = "multi_thread")]
async fn kill_9_changes_nothing() {
    let plans = [
        ("es", json!({"samples_per_prompt": 2, "population": 6, "sigma": 0.5, "learning_rate": 0.2})),
        (
            "grpo",
            json!({"samples_per_prompt": 4, "updates_per_batch": 2, "minibatches": 2, "beta": 0.01, "learning_rate": 0.1}),
        ),
        ("sft", json!({"learning_rate": 0.1})),
    ];
    for (method, own) in plans {
        let mut hyper = json!({"steps": 10, "prompts_per_step": 4, "max_completion_tokens": 12, "checkpoint_every": 2});
        hyper.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
        if method != "sft" {
            hyper["flat_reward_steps"] = json!(0);
        }
        let item = |text: String| json!({"prompt": text, "completion": " and so on"});
        let body = json!({
            "name": "trained", "method": method,
            "dataset": (0..8).map(|n| item(format!("The {n} little foxes"))).collect::<Vec<_>>(),
            "validation": [item("The end".into()), item("Once".into())],
            "grader": {"type": "string_check", "reference": "e", "operation": "like"},
            "hyperparameters": hyper,
        });
        survives(method, &body).await;
    }
}

async fn survives(method: &str, body: &Value) {
    let wait = async |app: &support::TestApp, id: &str, until: &dyn Fn(&Value) -> bool| loop {
        let (_, job) = app.get(&format!("/adapters/train/{id}")).await;
        assert_ne!(job["status"], "failed", "{job}");
        if until(&job) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    };
    let done = |job: &Value| job["status"] == "succeeded";
    let finish = async |app: &support::TestApp, id: &str| {
        let job = wait(app, id, &done).await;
        let (_, events) = app.get(&format!("/adapters/train/{id}/events?limit=1000")).await;
        let weights =
            parts(app.request(Method::GET, "/adapters/trained/weights?format=json").send().await.unwrap()).await.1;
        assert_eq!(weights["numbers"].as_array().map(Vec::len), Some(13), "{weights}");
        (job["result"].clone(), curve(events["data"].as_array().unwrap()), weights["numbers"].clone())
    };
    let app = support::TestApp::tiny("llama").start().await;
    let id = app.ok("/adapters/train", body).await["id"].as_str().unwrap().to_owned();
    let undisturbed = finish(&app, &id).await;
    drop(app);

    let folder = tempfile::tempdir().unwrap();
    let mut id = None;
    for at in [1, 3, 4, 6, 9] {
        let mut app = support::TestApp::tiny("llama").data_dir(folder.path()).start().await;
        let id = match &id {
            Some(id) => id,
            None => &*id.insert(app.ok("/adapters/train", body).await["id"].as_str().unwrap().to_owned()),
        };
        wait(&app, id, &|job| job["step"].as_u64().unwrap() >= at || done(job)).await;
        app.kill();
    }
    let app = support::TestApp::tiny("llama").data_dir(folder.path()).start().await;
    let disturbed = finish(&app, &id.unwrap()).await;
    assert_eq!(disturbed.1, undisturbed.1, "{method}: the curve");
    assert_eq!(disturbed.2, undisturbed.2, "{method}: the numbers");
    assert_eq!(disturbed.0, undisturbed.0, "{method}: the result");
    // And it changed something, or there was nothing to compare.
    let norm = |step: Option<&Value>| step.unwrap()["numbers_norm"].as_f64().unwrap();
    assert_ne!(norm(undisturbed.1.first()), norm(undisturbed.1.last()), "{method}");
}
