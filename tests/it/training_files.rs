//! OpenAI's shape: files, fine-tuning jobs, graders.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use mote::service::training::{DataLimits, TrainingConfig};
use serde_json::{Value, json};

use crate::{
    app::{Answer, KEY, MODEL, Options, TestApp},
    toy::Toy,
    training::toy_app,
};

const LINES: &str = concat!(
    r#"{"messages": [{"role": "user", "content": "Q1"}], "answer": "c"}"#,
    "\n",
    r#"{"messages": [{"role": "user", "content": "Q2"}], "answer": "c"}"#,
    "\n"
);
const DEMONSTRATIONS: &str = concat!(
    r#"{"messages": [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "hello"}]}"#,
    "\n",
    r#"{"messages": [{"role": "user", "content": "Q2"}, {"role": "assistant", "content": "hello"}]}"#
);

async fn upload(app: &TestApp, contents: &str, purpose: Option<&str>) -> Answer {
    let mut form = format!(
        "--edge\r\ncontent-disposition: form-data; name=\"file\"; filename=\"train.jsonl\"\r\ncontent-type: application/octet-stream\r\n\r\n{contents}\r\n"
    );
    if let Some(purpose) = purpose {
        form += &format!("--edge\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n");
    }
    form += "--edge--\r\n";
    let request = Request::builder()
        .method(Method::POST)
        .uri("/v1/files")
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, "multipart/form-data; boundary=edge")
        .body(Body::from(form))
        .unwrap();
    app.send(request).await
}

async fn uploaded(app: &TestApp, contents: &str) -> String {
    let answer = upload(app, contents, Some("fine-tune")).await;
    assert_eq!(answer.status.as_u16(), 200, "{}", answer.text);
    answer.json()["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_come_are_listed_read_and_go() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let file = upload(&app, LINES, Some("fine-tune")).await.json();
    assert_eq!(
        (&file["object"], &file["bytes"], &file["filename"], &file["purpose"], &file["status"]),
        (&json!("file"), &json!(LINES.len()), &json!("train.jsonl"), &json!("fine-tune"), &json!("processed"))
    );
    let id = file["id"].as_str().unwrap();
    let second = uploaded(&app, DEMONSTRATIONS).await;
    let list = app.get("/v1/files?limit=1").await.json();
    assert_eq!((&list["data"][0]["id"], &list["has_more"]), (&json!(second), &json!(true)));
    let rest = app.get(&format!("/v1/files?after={second}")).await.json();
    assert_eq!((&rest["data"][0]["id"], &rest["has_more"]), (&json!(id), &json!(false)));
    assert_eq!(app.get(&format!("/v1/files/{id}")).await.json(), file);
    assert_eq!(app.get(&format!("/v1/files/{id}/content")).await.text, LINES);
    let gone = app.delete(&format!("/v1/files/{id}")).await.json();
    assert_eq!(gone, json!({"id": id, "object": "file", "deleted": true}));
    for path in
        [format!("/v1/files/{id}"), format!("/v1/files/{id}/content"), "/v1/files/x".into(), "/v1/files/%00".into()]
    {
        let answer = app.get(&path).await;
        assert_eq!(
            answer.error(),
            (404, "invalid_request_error".into(), None, Some("file_not_found".into())),
            "{path}"
        );
    }
}

/// Under one key a file is kept once, whatever boundary its form has; another file is a conflict.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_sent_again_under_its_key_is_the_same_file() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let send = async |boundary: &str, key: &str, contents: &str| {
        let form = format!(
            "--{boundary}\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--{boundary}\r\n\
             content-disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\r\n\r\n{contents}\r\n--{boundary}--\r\n"
        );
        let request = Request::post("/v1/files")
            .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
            .header(header::CONTENT_TYPE, format!("multipart/form-data; boundary={boundary}"))
            .header("idempotency-key", key)
            .body(Body::from(form))
            .unwrap();
        app.send(request).await
    };
    let first = send("one", "k", LINES).await;
    assert_eq!(first.status.as_u16(), 200, "{}", first.text);
    assert_eq!(send("two", "k", LINES).await.json(), first.json());
    assert_eq!(app.get("/v1/files").await.json()["data"].as_array().unwrap().len(), 1);
    let other = send("one", "k", DEMONSTRATIONS).await;
    assert_eq!((other.error().0, other.error().3.as_deref()), (409, Some("idempotency_key_reused")));
    assert_ne!(send("one", "l", LINES).await.json()["id"], first.json()["id"]);
    assert_eq!(send("one", "", LINES).await.error().2.as_deref(), Some("Idempotency-Key"));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_checked_line_by_line_and_bounded() {
    let data = DataLimits { bytes: 20_000, line_bytes: 5000, items: 10 };
    let training = TrainingConfig { data, files_of_tenant: 1000, ..TrainingConfig::default() };
    let app = toy_app(&Arc::default(), Options { training, ..Options::default() }).await;
    for (contents, purpose, param, words) in [
        ("", Some("fine-tune"), "file", "holds no item"),
        ("{\"prompt\": \"a\"}\n{\"prompt\": ", Some("fine-tune"), "file", "line 2: is not JSON"),
        ("{\"prompt\": \"a\"}\n7", Some("fine-tune"), "file", "line 2: must be a JSON object"),
        ("{\"messages\": [{\"role\": \"wizard\", \"content\": \"a\"}]}", Some("fine-tune"), "file", "messages[0].role"),
        (LINES, Some("assistants"), "purpose", "fine-tune"),
        (LINES, None, "purpose", "required"),
    ] {
        let answer = upload(&app, contents, purpose).await;
        let (status, _, at, _) = answer.error();
        assert_eq!((status, at.as_deref()), (400, Some(param)), "{contents}: {}", answer.text);
        assert!(answer.text.contains(words), "{contents}: {}", answer.text);
    }
    let long = format!("{{\"prompt\": \"{}\"}}", "a".repeat(5000));
    assert!(
        upload(&app, &long, Some("fine-tune")).await.text.contains("line 1: holds 5014 bytes; a line has at most 5000")
    );
    let large = "{\"prompt\": \"a\"}\n".repeat(8000);
    assert_eq!(upload(&app, &large, Some("fine-tune")).await.status.as_u16(), 413);
    let many = "{\"prompt\": \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"}\n".repeat(9);
    uploaded(&app, &many).await;
    let answer = upload(&app, &many, Some("fine-tune")).await;
    assert_eq!(
        answer.error(),
        (429, "rate_limit_error".into(), Some("file".into()), Some("insufficient_quota".into()))
    );
    let json = app.post("/v1/files", json!({})).await;
    assert_eq!(json.status.as_u16(), 415);
}

#[tokio::test(flavor = "multi_thread")]
async fn reinforcement_as_openais_client_asks_for_it() {
    let app = toy_app(&Toy::slow(1), Options::default()).await;
    let (training, validation) = (uploaded(&app, LINES).await, uploaded(&app, LINES).await);
    let grader = json!({"type": "string_check", "name": "letter", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"});
    let job = app
        .ok(
            "/v1/fine_tuning/jobs",
            json!({
                "model": MODEL, "training_file": training, "validation_file": validation, "suffix": "letters", "seed": 3,
                "metadata": {"who": "me"},
                "method": {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": {
                    "n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 10, "compute_multiplier": "auto", "max_completion_tokens": 8, "flat_reward_steps": 0}}},
            }),
        )
        .await;
    assert_eq!(
        (&job["object"], &job["model"], &job["training_file"]),
        (&json!("fine_tuning.job"), &json!(MODEL), &json!(training))
    );
    assert_eq!(job["hyperparameters"], json!({"n_epochs": 10, "batch_size": 2, "learning_rate_multiplier": 10.0}));
    assert_eq!((&job["method"]["type"], &job["method"]["reinforcement"]["grader"]), (&json!("reinforcement"), &grader));
    assert_eq!((&job["fine_tuned_model"], &job["seed"]), (&Value::Null, &json!(3)));
    // The file may go: the job has its own copy.
    app.delete(&format!("/v1/files/{training}")).await;
    let id = job["id"].as_str().unwrap();
    app.ended(id).await;
    let done = app.get(&format!("/v1/fine_tuning/jobs/{id}")).await.json();
    assert_eq!(done["status"], "succeeded", "{done}");
    let model = done["fine_tuned_model"].as_str().unwrap();
    assert!(model.starts_with("letters-"), "{model}");
    assert!(done["trained_tokens"].as_u64().unwrap() > 0);
    app.ok("/v1/completions", json!({"model": model, "prompt": "Once", "max_tokens": 1})).await;

    let list = app.get("/v1/fine_tuning/jobs").await.json();
    assert_eq!(list["data"][0], done);
    let events = app.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=3")).await.json();
    assert_eq!((events["data"].as_array().unwrap().len(), &events["has_more"]), (3, &json!(true)));
    assert_eq!(events["data"][0]["object"], "fine_tuning.job.event");
    let after = events["data"][2]["id"].as_str().unwrap();
    let older = app.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=1000&after={after}")).await.json();
    let all = app.events(id).await.len();
    assert_eq!(older["data"].as_array().unwrap().len(), all - 3);
    assert!(older["data"].as_array().unwrap().iter().any(|event| event["type"] == "metrics"));
    let checkpoints = app.get(&format!("/v1/fine_tuning/jobs/{id}/checkpoints")).await.json();
    let first = &checkpoints["data"][0];
    assert_eq!((&first["object"], &first["step_number"]), (&json!("fine_tuning.job.checkpoint"), &json!(10)));
    let inline = first["fine_tuned_model_checkpoint"].as_str().unwrap();
    app.ok("/v1/completions", json!({"model": inline, "prompt": "Once", "max_tokens": 1})).await;
    assert_eq!(first["fine_tuning_job_id"], id);
}

#[tokio::test(flavor = "multi_thread")]
async fn supervised_as_openais_client_asks_for_it() {
    let app = toy_app(&Toy::slow(2), Options::default()).await;
    let file = uploaded(&app, DEMONSTRATIONS).await;
    let body = json!({
        "model": MODEL, "training_file": file, "validation_file": file,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 9, "batch_size": 1, "max_completion_tokens": 16}}},
    });
    let first = app.ok("/v1/fine_tuning/jobs", body.clone()).await;
    let id = first["id"].as_str().unwrap();
    for what in ["pause", "resume"] {
        app.ok(&format!("/v1/fine_tuning/jobs/{id}/{what}"), json!({})).await;
    }
    app.ended(id).await;
    let done = app.get(&format!("/v1/fine_tuning/jobs/{id}")).await.json();
    assert_eq!((&done["status"], &done["method"]["type"]), (&json!("succeeded"), &json!("supervised")), "{done}");
    let tuned = done["fine_tuned_model"].as_str().unwrap().to_owned();
    assert!(tuned.starts_with("ft-"));
    // Going on from it; and as older clients write it, without a method.
    let older =
        json!({"model": tuned, "training_file": file, "hyperparameters": {"n_epochs": 1, "max_completion_tokens": 16}});
    let next = app.ok("/v1/fine_tuning/jobs", older).await;
    let next = app.ended(next["id"].as_str().unwrap()).await;
    assert_eq!((&next["status"], &next["init_from"]), (&json!("succeeded"), &json!(tuned)), "{next}");
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named_as_openai_names_fields() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let file = uploaded(&app, LINES).await;
    let grader = json!({"type": "string_check", "reference": "c"});
    let reinforcement = |own: Value| json!({"model": MODEL, "training_file": file, "method": {"type": "reinforcement", "reinforcement": own}});
    for (body, status, param) in [
        (json!({"training_file": file}), 400, "model"),
        (json!({"model": "nobody", "training_file": file}), 404, "model"),
        (json!({"model": MODEL}), 400, "training_file"),
        (json!({"model": MODEL, "training_file": "file-none"}), 404, "training_file"),
        (json!({"model": MODEL, "training_file": file, "method": {"type": "dpo"}}), 400, "method.type"),
        (
            json!({"model": MODEL, "training_file": file, "method": {"type": "supervised", "dpo": {}}}),
            400,
            "method.dpo",
        ),
        (json!({"model": MODEL, "training_file": file, "method": []}), 400, "method"),
        (json!({"model": MODEL, "training_file": file, "integrations": [{"type": "wandb"}]}), 400, "integrations"),
        (json!({"model": MODEL, "training_file": file, "suffix": "a b"}), 400, "suffix"),
        (reinforcement(json!({})), 400, "method.reinforcement.grader"),
        (reinforcement(json!({"grader": {"type": "magic"}})), 400, "method.reinforcement.grader.type"),
        (reinforcement(json!({"grader": grader, "response_format": {}})), 400, "method.reinforcement.response_format"),
        (
            reinforcement(json!({"grader": grader, "hyperparameters": {"n_epochs": 0}})),
            400,
            "method.reinforcement.hyperparameters.n_epochs",
        ),
        (
            reinforcement(json!({"grader": grader, "hyperparameters": {"learnin_rate": 1}})),
            400,
            "method.reinforcement.hyperparameters.learnin_rate",
        ),
        (
            reinforcement(json!({"grader": grader, "hyperparameters": {"temperature": 9}})),
            400,
            "method.reinforcement.hyperparameters.temperature",
        ),
        (
            json!({"model": MODEL, "training_file": file, "method": {"type": "supervised", "supervised": {"hyperparameters": {"max_completion_tokens": 8}}}}),
            400,
            "training_file",
        ),
    ] {
        let answer = app.post("/v1/fine_tuning/jobs", body.clone()).await;
        let (code, _, at, _) = answer.error();
        assert_eq!((code, at.as_deref()), (status, Some(param)), "{body}: {}", answer.text);
    }
    assert_eq!(app.get("/v1/fine_tuning/jobs").await.json()["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn graders_run_and_are_checked_without_a_job() {
    let app = toy_app(&Arc::default(), Options::default()).await;
    let number = json!({"type": "number", "reference": "{{item.answer}}"});
    let run = |grader: &Value, text: &str| {
        app.post(
            "/v1/fine_tuning/alpha/graders/run",
            json!({"grader": grader, "model_sample": text, "item": {"answer": "#### 1,024"}}),
        )
    };
    assert_eq!(run(&number, "so it is 1024.").await.json()["reward"], 1.0);
    assert_eq!(run(&number, "so it is 7").await.json()["reward"], 0.0);
    let multi = json!({"type": "multi", "graders": {"n": number, "l": {"type": "string_check", "reference": "x", "operation": "like"}}, "calculate_output": "0.5 * n + l"});
    let answer = run(&multi, "1024").await.json();
    assert_eq!((&answer["reward"], &answer["sub_rewards"]), (&json!(0.5), &json!({"l": 0.0, "n": 1.0})));
    assert_eq!(answer["metadata"]["type"], "multi");
    let missing = json!({"type": "number", "reference": "{{item.other}}"});
    assert_eq!(run(&missing, "1").await.error().2.as_deref(), Some("item"));
    let valid = app.ok("/v1/fine_tuning/alpha/graders/validate", json!({"grader": number})).await;
    assert_eq!(valid, json!({"grader": number}));
    for (body, param) in [
        (json!({}), "grader"),
        (json!({"grader": {"type": "regex", "pattern": "("}}), "grader.pattern"),
        (json!({"grader": {"type": "number"}}), "grader"),
    ] {
        let answer = app.post("/v1/fine_tuning/alpha/graders/validate", body.clone()).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{body}: {}", answer.text);
    }
}
