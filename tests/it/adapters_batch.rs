//! `/adapters/batch`: many uploads in one request, line by line and as a stream.

use std::time::Duration;

use axum::{
    body::Body,
    http::{Method, StatusCode, header},
};
use futures::StreamExt as _;
use mote::http::Limits;
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::{
    adapters::{json_of, ok, request},
    app::{KEY, Options, TestApp},
    limits::{ADMIN, app_with, call},
};

#[tokio::test]
async fn a_batch_answers_every_line_in_order() {
    let app = TestApp::new().await;
    ok(&app, Method::POST, "/adapters", json_of("taken", 0.5)).await;
    let lines = [
        json_of("one", 0.5).to_string(),
        "{\"name\": \"broken\", ".into(),
        String::new(),
        "{\"name\": \"wrong\", \"numbers\": \"x\"}".into(),
        json_of("taken", 0.25).to_string(),
        json!({"name": "taken", "numbers": vec![0.25; 13], "on_conflict": "new_generation"}).to_string(),
        json!({"name": "long", "numbers": [1, 2]}).to_string(),
        "[]".into(),
        json_of("one", 0.5).to_string(),
        json!({"numbers": vec![0.5; 13]}).to_string(),
        json_of("last", 0.5).to_string(),
    ];
    let body = lines.join("\n");
    let answer = app.send(request(KEY, Method::POST, "/adapters/batch", "application/x-ndjson", body)).await;
    assert_eq!(
        (answer.status, &answer.headers[header::CONTENT_TYPE]),
        (StatusCode::OK, &"application/x-ndjson".parse().unwrap())
    );
    let answers: Vec<Value> = answer.text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let expected = [
        ("one", None),
        ("", Some((400, None, None))),
        ("wrong", Some((400, Some("numbers"), None))),
        ("taken", Some((409, Some("name"), Some("name_taken")))),
        ("taken", None),
        ("long", Some((400, Some("numbers"), None))),
        ("", Some((400, None, None))),
        ("one", Some((409, Some("name"), Some("name_taken")))),
        ("", Some((400, Some("name"), None))),
        ("last", None),
    ];
    assert_eq!(answers.len(), expected.len(), "{answers:#?}");
    for (answer, (name, error)) in answers.iter().zip(expected) {
        assert_eq!(answer["name"].as_str().unwrap_or(""), name, "{answer}");
        assert_eq!(answer.as_object().unwrap().len(), 2, "{answer}");
        match error {
            None => assert_eq!(answer["generation"].as_str().unwrap().len(), 32),
            Some((_, param, code)) => {
                let error = &answer["error"];
                assert_eq!((error["param"].as_str(), error["code"].as_str()), (param, code), "{answer}");
                assert_eq!(error.as_object().unwrap().len(), 4);
            }
        }
    }
    assert_eq!(app.get("/adapters/taken/weights?format=json").await.json()["numbers"], json!(vec![0.25; 13]));
}

/// Lines go in while answers come out, and what was answered can be used.
#[tokio::test]
async fn a_batch_streams_both_ways() {
    let app = TestApp::new().await;
    let (lines, body) = tokio::sync::mpsc::channel::<Result<String, std::convert::Infallible>>(1);
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(body));
    let request = request(KEY, Method::POST, "/adapters/batch", "application/x-ndjson", body);
    let response = app.router.clone().oneshot(request).await.unwrap();
    let mut answers = response.into_body().into_data_stream();
    for i in 0..5 {
        let line = json_of(&format!("n{i}"), 0.5).to_string();
        // In two pieces, one without an end.
        let (a, b) = line.split_at(10);
        lines.send(Ok(a.to_owned())).await.unwrap();
        lines.send(Ok(format!("{b}\n"))).await.unwrap();
        let answer =
            tokio::time::timeout(Duration::from_secs(10), answers.next()).await.expect("an answer while sending");
        let answer: Value = serde_json::from_slice(&answer.unwrap().unwrap()).unwrap();
        assert_eq!(answer["name"], format!("n{i}"));
        assert_eq!(app.get(&format!("/adapters/n{i}")).await.json()["generation"], answer["generation"]);
    }
    drop(lines);
    assert!(answers.next().await.is_none());
}

/// A client that sends everything before it reads anything is served too, and a body beyond the limit ends with the reason.
#[tokio::test]
async fn a_batch_is_bounded_and_does_not_wait_for_its_reader() {
    let line = json_of("a-name", 0.5).to_string();
    let limit = 3000 * (line.len() + 1);
    let app = TestApp::with(Options { limits: Limits { body: 1 << 20, batch: limit }, ..Options::default() }).await;
    let body = |count: usize| {
        let pieces =
            (0..count).map(|i| Ok::<_, std::convert::Infallible>(json_of(&format!("n{i:05}"), 0.5).to_string() + "\n"));
        // A pause after each line, as of a slow link: every line is a group of its own.
        Body::from_stream(futures::stream::iter(pieces).then(|piece| async {
            tokio::task::yield_now().await;
            piece
        }))
    };
    let post = |count| request(KEY, Method::POST, "/adapters/batch", "application/x-ndjson", body(count));
    let response = app.router.clone().oneshot(post(3000)).await.unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while app.state.service.library.registry.len() < 3000 {
        assert!(std::time::Instant::now() < deadline, "the batch waits for a reader");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 3000);

    let answer = app.send(post(3100)).await;
    let last: Value = serde_json::from_str(answer.text.lines().last().unwrap()).unwrap();
    assert!(last["error"]["message"].as_str().unwrap().contains(&limit.to_string()), "{last}");
    assert!(last["name"].is_null());
}

/// An upload that goes on while its key is revoked: what comes after that is not stored, and the client is told why.
#[tokio::test]
async fn a_batch_ends_when_its_key_is_revoked() {
    let app = app_with(Options::default()).await;
    let key = call(&app, ADMIN, Method::POST, "/admin/tenants/acme/keys", Some(json!({}))).await.json();
    let (secret, id) = (key["key"].as_str().unwrap(), key["id"].as_str().unwrap());
    let (lines, body) = tokio::sync::mpsc::channel::<Result<String, std::convert::Infallible>>(1);
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(body));
    let request = request(secret, Method::POST, "/adapters/batch", "application/x-ndjson", body);
    let response = app.router.clone().oneshot(request).await.unwrap();
    let mut answers = response.into_body().into_data_stream();
    let mut next = async |name: &str| {
        // It may have ended: then nobody takes the line.
        let _ = lines.send(Ok(json_of(name, 0.5).to_string() + "\n")).await;
        let answer = tokio::time::timeout(Duration::from_secs(10), answers.next()).await.expect("an answer");
        answer.map(|answer| serde_json::from_slice::<Value>(&answer.unwrap()).unwrap())
    };
    assert!(next("before").await.unwrap()["generation"].is_string());
    assert_eq!(call(&app, ADMIN, Method::DELETE, &format!("/admin/keys/{id}"), None).await.status, 204);
    let refused = next("after").await.unwrap();
    assert_eq!((&refused["name"], &refused["error"]["code"]), (&json!("after"), &json!("invalid_api_key")));
    assert!(next("more").await.is_none(), "the answer has ended");
    assert_eq!(app.get("/adapters/before").await.status, 200);
    for name in ["after", "more"] {
        assert_eq!(app.get(&format!("/adapters/{name}")).await.status, 404, "{name}");
    }
}

/// What is said of a line does not grow with the line.
#[tokio::test]
async fn a_long_wrong_value_is_not_sent_back() {
    let app = TestApp::new().await;
    let line = json!({"name": "a", "numbers": "x".repeat(100_000)}).to_string();
    let answer = app.send(request(KEY, Method::POST, "/adapters/batch", "application/x-ndjson", line)).await;
    assert!(answer.text.contains("'numbers'") && answer.text.len() < 1000, "{} bytes", answer.text.len());
}
