//! Large answers have places, of which a tenant has a few: they lie in memory until their client has taken them.

use axum::{
    body::Body,
    http::{Method, Request, Response, StatusCode, header},
};
use futures::future::join_all;
use serde_json::json;
use tower::ServiceExt as _;

use crate::{
    app::{KEY, Options, TestApp},
    limits::{ADMIN, app_with, call},
};

/// Places of a tenant.
const PLACES: usize = 4;

/// A data set of about a megabyte, as a file of a tenant's.
async fn file(app: &TestApp, key: &str) -> (String, String) {
    let item = json!({"prompt": "x".repeat(500), "answer": 5}).to_string() + "\n";
    let text = item.repeat(2000);
    let form = format!(
        "--b\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n\
         --b\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.jsonl\"\r\n\r\n{text}\r\n--b--\r\n"
    );
    let request = Request::post("/v1/files")
        .header(header::AUTHORIZATION, format!("Bearer {key}"))
        .header(header::CONTENT_TYPE, "multipart/form-data; boundary=b");
    let answer = app.send(request.body(form.into()).unwrap()).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
    (answer.json()["id"].as_str().unwrap().to_owned(), text)
}

/// An answer that nobody reads yet.
async fn opened(app: &TestApp, key: &str, path: &str) -> Response<Body> {
    let request = Request::get(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
    app.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
}

#[tokio::test]
async fn large_answers_that_nobody_takes_are_few() {
    let app = app_with(Options::default()).await;
    let ((mine, text), (theirs, _)) = (file(&app, KEY).await, file(&app, ADMIN).await);
    let (mine, theirs) = (format!("/v1/files/{mine}/content"), format!("/v1/files/{theirs}/content"));
    let mut held = Vec::new();
    for _ in 0..PLACES {
        let answer = opened(&app, KEY, &mine).await;
        assert_eq!((answer.status(), &answer.headers()[header::CONTENT_LENGTH]), (StatusCode::OK, &text.len().into()));
        held.push(answer.into_body());
    }
    let others = [mine.as_str(), "/adapters/train", "/v1/fine_tuning/jobs", "/v1/files", "/adapters", "/v1/models"];
    for (path, refused) in others.iter().zip(join_all(others.map(|path| app.get(path))).await) {
        let (status, _, _, code) = refused.error();
        assert_eq!((status, code.as_deref()), (429, Some("rate_limit_exceeded")), "{path}");
        assert_eq!(refused.headers[header::RETRY_AFTER], "1");
    }
    assert_eq!(opened(&app, ADMIN, &theirs).await.status(), StatusCode::OK, "another tenant has its own");
    assert_eq!(app.get("/usage").await.status, StatusCode::OK, "what is small needs none");
    let read = axum::body::to_bytes(held.remove(0), usize::MAX).await.unwrap();
    assert!(read == text, "a place is free when the answer was taken, whole");
    assert_eq!(app.get(&mine).await.text, text);
}

/// Small answers of the same routes need a place only while they are made, and an export has one.
#[tokio::test]
async fn small_answers_hold_no_place() {
    let app = app_with(Options::default()).await;
    let upload = json!({"name": "a", "numbers": vec![0.5; 13], "scheme": "u13-tied"});
    assert_eq!(call(&app, KEY, Method::POST, "/adapters", Some(upload)).await.status, StatusCode::CREATED);
    let mut held = Vec::new();
    for path in ["/adapters", "/v1/files", "/v1/models", "/adapters/train", "/adapters/a/weights?format=peft"] {
        for _ in 0..2 * PLACES {
            let answer = opened(&app, KEY, path).await;
            assert_eq!(answer.status(), StatusCode::OK, "{path}");
            held.push(answer);
        }
    }
}
