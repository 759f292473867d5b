//! `/v1/models`, and adapters that `model` names.

use std::sync::Arc;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use mote::{
    store::{Contents, NewAdapter, OnConflict},
    types::{Generation, TenantId},
};
use serde_json::{Value, json};

use crate::app::{CONTEXT, MODEL, TestApp};

/// Puts an adapter of zeros into the store.
async fn put(app: &TestApp, tenant: TenantId, name: &str, public: bool) {
    let base = &app.state.service.base;
    let contents = Contents {
        generation: Generation([5; 16]),
        data: vec![0; 26],
        facts: Arc::new(mote::store::Facts {
            dtype: "bf16".into(),
            scheme: mote::adapter::Scheme::tiny13().to_full_json().to_string(),
            frame: None,
            fingerprint: base.fingerprint,
            forced_onto: None,
        }),
    };
    let new = NewAdapter {
        tenant,
        name: name.into(),
        public: Some(public),
        metadata: None,
        contents,
        on_conflict: OnConflict::Error,
        may_change_public: true,
        room: mote::tenant::Room::default(),
        idempotency: None,
    };
    app.state.service.store.put_adapter(new).await.unwrap();
}

#[tokio::test]
async fn models_are_the_base_and_what_the_caller_sees() {
    let app = TestApp::new().await;
    let store = &app.state.service.store;
    let (acme, rival) = (store.tenant("acme").await.unwrap().id, store.create_tenant("rival").await.unwrap().id);
    for (tenant, name, public) in
        [(acme, "zoe", false), (acme, "alice", false), (rival, "mine", false), (rival, "shared", true)]
    {
        put(&app, tenant, name, public).await;
    }
    let base = json!({
        "id": MODEL, "object": "model", "created": 1_700_000_000, "owned_by": "mote", "root": MODEL, "parent": null, "max_model_len": CONTEXT,
    });
    let list = app.get("/v1/models").await.json();
    assert_eq!((&list["object"], &list["has_more"], &list["data"][0]), (&json!("list"), &json!(false), &base));
    let ids = |list: &Value| -> Vec<String> {
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&list), [MODEL, "alice", "shared", "zoe"]);
    assert_eq!(list["data"][1]["parent"], MODEL);
    assert_eq!((&list["data"][1]["owned_by"], &list["data"][2]["owned_by"]), (&json!("acme"), &json!("rival")));

    let first = app.get("/v1/models?limit=2").await.json();
    assert_eq!((ids(&first), &first["has_more"]), (vec![MODEL.to_owned(), "alice".into()], &json!(true)));
    let second = app.get("/v1/models?limit=2&after=alice").await.json();
    assert_eq!((ids(&second), &second["has_more"]), (vec!["shared".to_owned(), "zoe".into()], &json!(false)));
    assert_eq!(ids(&app.get(&format!("/v1/models?after={MODEL}")).await.json()), ["alice", "shared", "zoe"]);

    assert_eq!(app.get(&format!("/v1/models/{MODEL}")).await.json(), base);
    for id in ["alice", "scripted:alice", "scripted%3Aalice"] {
        assert_eq!(app.get(&format!("/v1/models/{id}")).await.json(), list["data"][1]);
    }
    for id in ["mine", "nobody", "scripted:mine"] {
        let answer = app.get(&format!("/v1/models/{id}")).await;
        let expected = (404, "invalid_request_error".into(), Some("model".into()), Some("model_not_found".into()));
        assert_eq!(answer.error(), expected, "{id}");
    }
    for query in ["limit=0", "limit=x", "limit=10001"] {
        let (status, _, param, _) = app.get(&format!("/v1/models?{query}")).await.error();
        assert_eq!((status, param.as_deref()), (400, Some("limit")));
    }
}

#[tokio::test]
async fn an_adapter_inside_the_request_answers_with_its_generation() {
    let app = TestApp::new().await;
    let adapter = |byte: u8| format!("{MODEL}+{}", URL_SAFE_NO_PAD.encode([byte; 26]));
    let body = |model: &str| json!({"model": model, "prompt": [5], "max_tokens": 2, "temperature": 0});
    let mut seen = std::collections::BTreeSet::new();
    for byte in [1, 2] {
        let answer = app.post("/v1/completions", body(&adapter(byte))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        assert_eq!(answer.json()["model"], adapter(byte));
        let generation = answer.headers["x-adapter-generation"].to_str().unwrap().to_owned();
        assert!(generation.parse::<Generation>().is_ok());
        seen.insert(generation);
        let mut chat = json!({"model": adapter(byte), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": true});
        let streamed = app.post("/v1/chat/completions", chat.take()).await;
        assert!(seen.contains(streamed.headers["x-adapter-generation"].to_str().unwrap()));
    }
    assert_eq!(seen.len(), 2);
    let base = app.post("/v1/completions", body(MODEL)).await;
    assert!(base.headers.get("x-adapter-generation").is_none());
    assert!(app.metrics().contains("mote_engine_step_adapters_bucket{le=\"1.0\"}"));
}
