//! Numbers as large as JSON has them: each is a 400 that names its field, and none overflows.

use serde_json::{Value, json};

use crate::app::{CONTEXT, MODEL, TestApp};

/// Whole numbers beyond every bound, at the edges of every type, and what is no whole number at all.
fn huge() -> Vec<Value> {
    let whole = [
        u64::MAX.to_string(),
        (u64::MAX - 1).to_string(),
        i64::MAX.to_string(),
        (i64::MAX as u64 + 1).to_string(),
        u32::MAX.to_string(),
        (u64::from(u32::MAX) + 1).to_string(),
        "18446744073709551616".to_owned(),
        "340282366920938463463374607431768211456".to_owned(),
        "1e19".to_owned(),
        "1e308".to_owned(),
    ];
    whole.iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

async fn refused(app: &TestApp, path: &str, body: Value, field: &str) {
    let answer = app.post(path, body.clone()).await;
    let (status, _, param, _) = answer.error();
    assert_eq!(status, 400, "{body}: {}", answer.text);
    assert!(param.as_deref().is_some_and(|param| param.starts_with(field)), "{body}: param {param:?}");
}

#[tokio::test]
async fn choices_and_tokens() {
    let app = TestApp::new().await;
    for value in huge() {
        for field in ["n", "best_of", "min_tokens"] {
            let mut body = json!({"model": MODEL, "prompt": "Hi"});
            body[field] = value.clone();
            refused(&app, "/v1/completions", body, field).await;
        }
        // All of these fit together in no sum of 64 bits.
        let body = json!({"model": MODEL, "prompt": "Hi", "n": 128, "best_of": 128, "max_tokens": value});
        let answer = app.post("/v1/completions", body.clone()).await;
        assert_eq!(answer.error().0, 400, "{body}");
        for field in ["max_tokens", "max_completion_tokens", "n", "top_logprobs"] {
            let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "logprobs": true});
            body[field] = value.clone();
            let answer = app.post("/v1/chat/completions", body.clone()).await;
            assert_eq!(answer.error().0, 400, "{body}: {}", answer.text);
        }
    }
    // The largest that there are, on the most prompts that a request may have.
    let prompts = vec!["x"; 32];
    let body = json!({"model": MODEL, "prompt": prompts, "n": 128, "max_tokens": CONTEXT - 10});
    assert_eq!(app.post("/v1/completions", body).await.error().0, 400);
}

#[tokio::test]
async fn schemes() {
    let app = TestApp::new().await;
    let groups = json!({"kind": "groups", "count": 13});
    for value in huge() {
        for (scheme, field) in [
            (json!({"u": value}), "scheme.u"),
            (json!({"rank": value}), "scheme.rank"),
            (json!({"rank": value, "u": value, "ties": groups}), "scheme.rank"),
            (json!({"ties": {"kind": "groups", "count": value}}), "scheme.ties.count"),
            (json!({"ties": {"kind": "tiled", "n_tie": value}}), "scheme.ties.n_tie"),
            (json!({"ties": {"kind": "structured", "n_tie": value}}), "scheme.ties.n_tie"),
            (json!({"ties": {"kind": "peft", "weight_tying": value}}), "scheme.ties.weight_tying"),
            (json!({"convention": "lora-xs", "rank": value}), "scheme.rank"),
        ] {
            let upload = json!({"name": "a", "numbers": vec![0; 13], "scheme": scheme});
            refused(&app, "/adapters", upload, field).await;
            let inline = json!({"model": MODEL, "prompt": "x", "adapter": {"data": "AAAA", "scheme": scheme}});
            refused(&app, "/v1/completions", inline, "adapter.scheme").await;
        }
    }
    // Each within its own bound, and too much together.
    for scheme in [
        json!({"u": 4096, "ties": {"kind": "groups", "count": 262_144}}),
        json!({"u": 4096, "ties": {"kind": "tiled", "n_tie": 1}, "rank": 256}),
    ] {
        refused(&app, "/adapters", json!({"name": "a", "numbers": [0], "scheme": scheme}), "scheme").await;
    }
    assert_eq!(app.get("/adapters/a").await.status, 404);
}

#[tokio::test]
async fn queries() {
    let app = TestApp::new().await;
    for value in huge() {
        for path in ["/adapters", "/adapters/train", "/v1/files", "/v1/fine_tuning/jobs"] {
            let answer = app.get(&format!("{path}?limit={value}")).await;
            assert_eq!(answer.error().0, 400, "{path} {value}: {}", answer.text);
        }
    }
}
