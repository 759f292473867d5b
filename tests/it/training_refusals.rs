//! Everything that can be wrong with a job is said before it exists: the status, the field, and where in the data.

use std::sync::Arc;

use mote::service::training::{RemoteAccess, TrainingConfig};
use serde_json::{Value, json};

use crate::{
    app::{Options, TestApp},
    training::{letters, letters_with, toy_app},
};

/// `letters` with these fields; null takes one away.
fn with(fields: Value) -> Value {
    let mut job = letters("alice");
    for (key, value) in fields.as_object().unwrap() {
        job[key] = value.clone();
    }
    job
}

async fn refused(app: &TestApp, body: Value, status: u16, param: &str, words: &str) {
    let shown = body.to_string().chars().take(300).collect::<String>();
    let answer = app.post("/adapters/train", body).await;
    assert_eq!(answer.status.as_u16(), status, "{shown}: {}", answer.text);
    let (_, _, at, _) = answer.error();
    assert_eq!(at.as_deref(), Some(param), "{shown}: {}", answer.text);
    assert!(answer.text.contains(words), "{shown}: {}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mistake_names_its_field() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    for (fields, status, param, words) in [
        (json!({"name": null}), 400, "name", "required"),
        (json!({"name": "a b"}), 400, "name", "characters"),
        (json!({"name": "train"}), 400, "name", "reserved"),
        (json!({"name": "scripted"}), 409, "name", "base"),
        (json!({"name": 3}), 400, "name", "string"),
        (json!({"method": "ppo"}), 400, "method", "grpo"),
        (json!({"on_conflict": "replace"}), 400, "on_conflict", "new_generation"),
        (json!({"scheme": "tiny99"}), 400, "scheme", "tiny99"),
        (json!({"scheme": {"rank": 2, "sede": 1}}), 400, "scheme.sede", "sede"),
        (json!({"scheme": {"rank": 9}}), 400, "scheme.rank", "rank"),
        (json!({"init_from": "nobody"}), 404, "init_from", "nobody"),
        // Names are looked up when all fields are right.
        (json!({"init_from": "nobody", "name": "a b"}), 400, "name", "characters"),
        (json!({"init_from": "nobody", "scheme": "tiny99"}), 400, "scheme", "tiny99"),
        (
            json!({"init_from": "nobody", "hyperparameters": {"learning_rate": -1}}),
            400,
            "hyperparameters.learning_rate",
            "learning_rate",
        ),
        (json!({"init_from": "nobody", "grader": {"type": "magic"}}), 400, "grader.type", "magic"),
        (json!({"init_from": "nobody", "dataset": 3}), 400, "dataset", "list"),
        (json!({"dataset": null}), 400, "dataset", "required"),
        (json!({"dataset": 3}), 400, "dataset", "list"),
        (json!({"training_file": "file-1"}), 400, "dataset", "not both"),
        (json!({"dataset": null, "training_file": "file-1"}), 404, "training_file", "file-1"),
        (
            json!({"validation": null, "validation_file": "file-0198c0ffee0070008000000000000001"}),
            404,
            "validation_file",
            "file-",
        ),
        (json!({"grader": null}), 400, "grader", "required"),
        (json!({"grader": "number"}), 400, "grader", "object"),
        (json!({"grader": {"type": "magic"}}), 400, "grader.type", "magic"),
        (json!({"grader": {"type": "number", "refrence": "1"}}), 400, "grader", "refrence"),
        (json!({"grader": {"type": "python", "source": "x"}}), 400, "grader.type", "not supported"),
        (
            json!({"grader": {"type": "string_check", "reference": "{{item.solution}}"}}),
            400,
            "dataset",
            "item 1: the grader cannot use it: the item has no `item.solution`",
        ),
        (
            json!({"grader": {"type": "string_check", "reference": "{{answer}}"}}),
            400,
            "grader",
            "unknown name `answer`",
        ),
        (json!({"grader": {"type": "string_check", "reference": "{{item.answer"}}), 400, "grader", "no closing"),
        (
            json!({"grader": {"type": "multi", "graders": {"a": {"type": "length", "max": 3}}, "calculate_output": "b"}}),
            400,
            "grader.calculate_output",
            "b",
        ),
        (json!({"prompt": "{{question}}"}), 400, "prompt", "unknown name `question`"),
        (json!({"prompt": "{{sample.output_text}}"}), 400, "prompt", "no completion yet"),
        (json!({"prompt": "{{item.q}}", "dataset": [{"question": "x"}]}), 400, "dataset", "item 1"),
        (json!({"hyperparameters": {"learnin_rate": 1}}), 400, "hyperparameters.learnin_rate", "unknown"),
        (json!({"hyperparameters": {"learning_rate": -1}}), 400, "hyperparameters.learning_rate", "must be from"),
        (json!({"hyperparameters": {"steps": 1, "epochs": 1}}), 400, "hyperparameters.epochs", "not both"),
        (json!({"hyperparameters": {"steps": 100_000}}), 400, "hyperparameters.steps", "20000"),
        (json!({"hyperparameters": {"epochs": 10_000, "prompts_per_step": 1}}), 400, "hyperparameters.epochs", "60000"),
        (json!({"hyperparameters": {"sigma": 0.1}}), 400, "hyperparameters.sigma", "grpo"),
        (json!({"hyperparameters": [1]}), 400, "hyperparameters", "object"),
        (json!({"hyperparameters": {"max_completion_tokens": 250}}), 400, "dataset", "beyond the context of 256"),
        (json!({"seed": -1}), 400, "seed", "seed"),
        (json!({"metadata": {"a": "x".repeat(20_000)}}), 400, "metadata", "16384"),
    ] {
        refused(&app, with(fields), status, param, words).await;
    }
    let mut missing = letters("alice");
    missing["dataset"][3].as_object_mut().unwrap().remove("messages");
    refused(&app, missing, 400, "dataset", "item 4, `messages`: is missing").await;
    let mut supervised = letters_with("alice", json!({"samples_per_prompt": null, "flat_reward_steps": null}));
    supervised["method"] = json!("sft");
    refused(&app, supervised, 400, "dataset", "no assistant's message to learn").await;
    assert_eq!(app.get("/adapters/train").await.json()["data"], json!([]), "no job was made");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_data_names_its_line() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let line = json!({"messages": [{"role": "user", "content": "Q"}], "answer": "c"}).to_string();
    let long = json!({"messages": [{"role": "user", "content": "Q".repeat(10 << 20)}], "answer": "c"});
    for (data, words) in [
        (json!(""), "holds no item"),
        (json!([]), "holds no item"),
        (json!("\n\n"), "holds no item"),
        (json!(format!("{line}\n{{\"messages\": ")), "line 2: is not JSON"),
        (json!(format!("{line}\n[1]")), "line 2: must be a JSON object"),
        (
            json!(format!("{line}\n\n{{\"messages\": [{{\"role\": \"user\"}}]}}")),
            "line 3, `messages[0].content`: is missing",
        ),
        (json!(format!("{line}\n{long}")), "line 2: holds 10485"),
        (json!([{"messages": [{"role": "user", "content": "Q"}], "answer": "c"}, long]), "item 2: holds 10485"),
        (json!([{"answer": "c"}]), "item 1, `messages`: is missing"),
        (json!([{"messages": [{"role": "user", "content": "Q"}]}]), "item 1: the grader cannot use it"),
    ] {
        refused(&app, with(json!({"dataset": data})), 400, "dataset", words).await;
        refused(&app, with(json!({"validation": data})), 400, "validation", words).await;
    }
    // What is a mistake in a template of a job's is one in the data where the template does not fit.
    let body =
        with(json!({"prompt": "{{item.question}}", "dataset": [{"question": "a", "answer": "c"}, {"answer": "c"}]}));
    refused(&app, body, 400, "dataset", "item 2, `prompt`: the item has no `item.question`").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn remote_graders_are_refused_unless_the_operator_listed_their_host() {
    let remote = |url: &str| with(json!({"grader": {"type": "remote", "url": url}}));
    let app = toy_app(&Arc::default(), Options::default()).await;
    refused(&app, remote("https://grader.example.org/"), 400, "grader", "--grader-hosts").await;

    let hosts = ["grader.example.org", "127.0.0.1", "169.254.169.254"].map(str::to_owned).into();
    let training = TrainingConfig { remote: RemoteAccess::new(hosts, 4), ..TrainingConfig::default() };
    let app = toy_app(&Arc::default(), Options { training, ..Options::default() }).await;
    for (url, param, words) in [
        ("http://grader.example.org/", "grader.url", "https://"),
        ("https://127.0.0.1/", "grader", "not a public address"),
        ("https://169.254.169.254/latest/meta-data", "grader", "not a public address"),
        ("https://[::1]/", "grader", "not a public address"),
        ("https://evil.example/", "grader", "not among the hosts"),
        ("https://grader.example.org@evil.example/", "grader", "user name"),
    ] {
        refused(&app, remote(url), 400, param, words).await;
    }
    let many = json!({"type": "multi", "graders": {"a": {"type": "remote", "url": "https://127.0.0.1/"}}, "calculate_output": "a"});
    refused(&app, with(json!({"grader": many})), 400, "grader.graders.a", "not a public address").await;
    // A run of it alone is held to the same.
    let body = json!({"grader": {"type": "remote", "url": "https://127.0.0.1/"}, "model_sample": "x", "item": {}});
    assert_eq!(app.post("/v1/fine_tuning/alpha/graders/run", body).await.error().2.as_deref(), Some("grader"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_may_not_train_at_all() {
    let training = TrainingConfig { running: 0, ..TrainingConfig::default() };
    let app = toy_app(&Arc::default(), Options { training, ..Options::default() }).await;
    let answer = app.post("/adapters/train", letters("alice")).await;
    assert_eq!(answer.error().0, 400);
    assert!(answer.text.contains("--train-jobs 0"), "{}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_no_requests() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let cases = [("[]", 400), ("{", 400), ("{\"name\": [}", 400)];
    for (body, status) in cases {
        let answer = app.send(crate::app::post("/adapters/train", body)).await;
        assert_eq!(answer.status.as_u16(), status, "{body}");
    }
    let limits = mote::http::Limits { body: 1000, batch: 1000 };
    let small = toy_app(&Arc::default(), Options { limits, ..Options::default() }).await;
    let body = with(json!({"metadata": {"a": "x".repeat(1000)}}));
    assert_eq!(small.post("/adapters/train", body).await.status.as_u16(), 413);
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptions_that_are_too_large_are_refused() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let words: Vec<String> = (0..9000).map(|number| format!("word{number}")).collect();
    let grader = json!({"type": "json_schema", "schema": {"enum": words}});
    refused(&app, with(json!({"grader": grader})), 400, "grader", "at most 65536").await;
    let prompt = "{{item.messages}} ".repeat(5000);
    refused(&app, with(json!({"prompt": prompt})), 400, "prompt", "at most 65536").await;
    assert_eq!(app.get("/adapters/train").await.json()["data"], json!([]));
}
