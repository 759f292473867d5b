//! Jobs over the tiny golden model itself: rollouts and gradients through the engine that serves.

use std::time::Duration;

use serde_json::{Value, json};

use crate::support::TestApp;

/// A job over the tiny model. Its tokens are noise, and how many of them have an e in them is as good a reward as any.
fn job(name: &str, method: &str, hyper: &Value) -> Value {
    let item = |n: usize| json!({"prompt": format!("The {n} little foxes"), "completion": " and the end of it"});
    let mut all = json!({"steps": 6, "prompts_per_step": 4, "max_completion_tokens": 16, "learning_rate": 0.1});
    if method != "sft" {
        all["flat_reward_steps"] = json!(0);
    }
    all.as_object_mut().unwrap().extend(hyper.as_object().unwrap().clone());
    json!({
        "name": name, "method": method,
        "dataset": (0..12).map(item).collect::<Vec<_>>(),
        "validation": (12..16).map(item).collect::<Vec<_>>(),
        "grader": {"type": "string_check", "reference": "e", "operation": "like"},
        "hyperparameters": all,
    })
}

async fn begin(app: &TestApp, body: &Value) -> String {
    app.ok("/adapters/train", body).await["id"].as_str().unwrap().to_owned()
}

async fn ended(app: &TestApp, id: &str) -> Value {
    loop {
        let (_, job) = app.get(&format!("/adapters/train/{id}")).await;
        if ["succeeded", "failed", "cancelled"].contains(&job["status"].as_str().unwrap()) {
            return job;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn steps(app: &TestApp, id: &str) -> Vec<Value> {
    let (_, events) = app.get(&format!("/adapters/train/{id}/events?limit=1000")).await;
    let events = events["data"].as_array().unwrap();
    events.iter().filter(|event| event["type"] == "step").map(|event| event["data"].clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn demonstrations_become_likelier_at_every_precision() {
    for dtype in ["f32", "bf16", "q8"] {
        let app = TestApp::tiny("llama").args(["--dtype", dtype]).start().await;
        let hyper = json!({"steps": 30, "prompts_per_step": 6, "learning_rate": 0.3});
        let id = begin(&app, &job("alice", "sft", &hyper)).await;
        let job = ended(&app, &id).await;
        assert_eq!(job["status"], "succeeded", "{job}");
        let validation = &job["result"]["validation"];
        let loss = |part: &str| validation[part]["loss"].as_f64().unwrap();
        assert!(loss("adapter") < loss("zero") - 0.02, "{dtype}: {validation}");
        let curve = steps(&app, &id).await;
        assert!(curve[29]["loss"].as_f64().unwrap() < curve[0]["loss"].as_f64().unwrap(), "{dtype}: {curve:?}");
        app.ok("/v1/completions", &json!({"model": "alice", "prompt": "The", "max_tokens": 4})).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn reinforcement_moves_the_numbers_and_sampler_and_trainer_agree() {
    // Mean difference of log-probs: activations, keys and values are rounded beside bf16 and integers.
    for (dtype, bound) in [("f32", 1e-5), ("bf16", 0.02), ("q8", 0.04)] {
        let app = TestApp::tiny("llama").args(["--dtype", dtype]).start().await;
        for temperature in [1.0, 0.7] {
            let hyper = json!({"samples_per_prompt": 8, "temperature": temperature, "beta": 0.001});
            let id = begin(&app, &job(&format!("at-{temperature}"), "grpo", &hyper)).await;
            let job = ended(&app, &id).await;
            assert_eq!(job["status"], "succeeded", "{job}");
            let curve = steps(&app, &id).await;
            assert_eq!(curve.len(), 6);
            let learnt: Vec<&Value> = curve.iter().filter(|step| step["updates"] != 0).collect();
            assert!(!learnt.is_empty(), "{curve:?}");
            for step in learnt {
                assert!(step["gradient_norm"].as_f64().unwrap() > 0.0, "{step}");
                let difference = step["logprob_difference_mean"].as_f64().unwrap();
                assert!(difference < bound, "{dtype} at {temperature}: {difference}");
            }
            assert!(curve[5]["numbers_norm"].as_f64().unwrap() > 0.0);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_get_the_same_bits_while_a_job_runs() {
    let app = TestApp::tiny("llama").start().await;
    let asked = |n: usize| {
        json!({
            "model": "tiny", "prompt": format!("Once {n} foxes went"), "max_tokens": 40, "temperature": 1.0, "seed": n, "logprobs": 2,
        })
    };
    let ask = async |n: usize| app.ok("/v1/completions", &asked(n)).await["choices"].clone();
    let mut before = Vec::new();
    for n in 0..6 {
        before.push(ask(n).await);
    }
    let hyper = json!({"steps": 1000, "samples_per_prompt": 8, "checkpoint_every": 1000});
    let id = begin(&app, &job("alice", "grpo", &hyper)).await;
    let step = async || app.get(&format!("/adapters/train/{id}")).await.1["step"].as_u64().unwrap();
    while step().await < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (began, mut rounds) = (step().await, 0);
    // Everybody at once, until the job has made progress beside them.
    while rounds < 3 || step().await < began + 2 {
        let during = futures::future::join_all((0..6).map(ask)).await;
        assert_eq!(during, before);
        rounds += 1;
    }
    let (status, job) = app.post(&format!("/adapters/train/{id}/cancel"), &json!({})).await;
    assert_eq!((status, &job["status"]), (200, &json!("cancelled")), "{job}");
    assert_eq!(futures::future::join_all((0..6).map(ask)).await, before);
    assert_eq!(app.get("/adapters/alice").await.0, 404, "nothing is published");
}
