//! Every row of the error table, over HTTP, with all four keys of the envelope.

use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::support::{TestApp, parts};

/// Status, type, param and code of an error answer; asserts the envelope.
fn envelope(answer: &(u16, Value)) -> (u16, String, Value, Value) {
    let error = answer.1["error"].as_object().unwrap_or_else(|| panic!("no error in {answer:?}"));
    let mut keys: Vec<&str> = error.keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["code", "message", "param", "type"], "{answer:?}");
    assert!(error["message"].as_str().is_some_and(|message| message.len() > 5), "{answer:?}");
    (answer.0, error["type"].as_str().expect("a type").to_owned(), error["param"].clone(), error["code"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_completions() {
    let app = TestApp::tiny("llama").start().await;
    let cases = [
        (json!({"prompt": "x"}), "model"),
        (json!({"model": null, "prompt": "x"}), "model"),
        (json!({"model": 3, "prompt": "x"}), "model"),
        (json!({"model": "tiny"}), "prompt"),
        (json!({"model": "tiny", "prompt": null}), "prompt"),
        (json!({"model": "tiny", "prompt": {}}), "prompt"),
        (json!({"model": "tiny", "prompt": ["a", 3]}), "prompt"),
        (json!({"model": "tiny", "prompt": []}), "prompt"),
        (json!({"model": "tiny", "prompt": [5, 100_000]}), "prompt"),
        (json!({"model": "tiny", "prompt": [-1]}), "prompt"),
        (json!({"model": "tiny", "prompt": "x", "temperature": 2.5}), "temperature"),
        (json!({"model": "tiny", "prompt": "x", "temperature": "hot"}), "temperature"),
        (json!({"model": "tiny", "prompt": "x", "top_p": 1.5}), "top_p"),
        (json!({"model": "tiny", "prompt": "x", "top_k": -3}), "top_k"),
        (json!({"model": "tiny", "prompt": "x", "min_p": -0.1}), "min_p"),
        (json!({"model": "tiny", "prompt": "x", "n": 0}), "n"),
        (json!({"model": "tiny", "prompt": "x", "n": 100_000}), "n"),
        (json!({"model": "tiny", "prompt": "x", "n": 3, "best_of": 2}), "best_of"),
        (json!({"model": "tiny", "prompt": "x", "best_of": 2, "stream": true}), "best_of"),
        (json!({"model": "tiny", "prompt": "x", "logprobs": 6}), "logprobs"),
        (json!({"model": "tiny", "prompt": "x", "max_tokens": -1}), "max_tokens"),
        (json!({"model": "tiny", "prompt": "x", "max_tokens": 1e30}), "max_tokens"),
        (json!({"model": "tiny", "prompt": "x", "stop": ["a", "b", "c", "d", "e"]}), "stop"),
        (json!({"model": "tiny", "prompt": "x", "presence_penalty": 3}), "presence_penalty"),
        (json!({"model": "tiny", "prompt": "x", "frequency_penalty": -3}), "frequency_penalty"),
        (json!({"model": "tiny", "prompt": "x", "repetition_penalty": 0}), "repetition_penalty"),
        (json!({"model": "tiny", "prompt": "x", "logit_bias": {"7": 101}}), "logit_bias"),
        (json!({"model": "tiny", "prompt": "x", "logit_bias": {"seven": 1}}), "logit_bias"),
        (json!({"model": "tiny", "prompt": "x", "suffix": "end"}), "suffix"),
        (json!({"model": "tiny", "prompt": "x", "stream": "yes"}), "stream"),
        (json!({"model": "tiny", "prompt": "x", "adapter": {"nmae": "a"}}), "adapter"),
        (json!({"model": "tiny", "prompt": "x", "adapter": {"data": "AAAA"}}), "adapter"),
    ];
    for (body, param) in cases {
        let (status, kind, got, _) = envelope(&app.post("/v1/completions", &body).await);
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"), "{body}");
        assert!(
            got.as_str().is_some_and(|got| got == param || got.starts_with(&format!("{param}."))),
            "{body}: param {got}"
        );
    }
    for (body, param) in [
        (json!({"model": "tiny"}), "messages"),
        (json!({"model": "tiny", "messages": []}), "messages"),
        (
            json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}),
            "tools",
        ),
        (
            json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}),
            "response_format",
        ),
        (json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}), "top_logprobs"),
        (
            json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 0}),
            "max_completion_tokens",
        ),
    ] {
        let (status, _, got, _) = envelope(&app.post("/v1/chat/completions", &body).await);
        assert_eq!(status, 400, "{body}");
        assert!(got.as_str().is_some_and(|got| got.starts_with(param)), "{body}: param {got}");
    }
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "x"}]});
    assert_eq!(envelope(&app.post("/v1/chat/completions", &chat).await).3, "no_chat_template");
    // Unknown top-level fields pass; null means the default.
    app.ok(
        "/v1/completions",
        &json!({"model": "tiny", "prompt": "x", "max_tokens": 1, "temperature": null, "nonsense": 1, "user": "u"}),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_is_checked_before_any_work() {
    let app = TestApp::tiny("llama").args(["--max-model-len", "64"]).start().await;
    let steps = app.metric("mote_engine_steps_total").await;
    let long: Vec<u32> = vec![5; 60];
    for body in [
        json!({"model": "tiny", "prompt": long, "max_tokens": 5}),
        json!({"model": "tiny", "prompt": vec![5; 65], "max_tokens": 0, "echo": true}),
    ] {
        let (status, kind, ..) = envelope(&app.post("/v1/completions", &body).await);
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"));
    }
    assert_eq!(app.metric("mote_engine_steps_total").await, steps);
    app.ok("/v1/completions", &json!({"model": "tiny", "prompt": long, "max_tokens": 4})).await;
}

/// Each would take some seventy bytes of memory, whatever it took of the body.
#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_millions_of_values_is_too_large_wherever_they_stand() {
    let app = TestApp::tiny("llama").start().await;
    let send = async |path: &str, kind: &str, body: String| {
        let request = app.request(Method::POST, path).header(header::CONTENT_TYPE, kind).body(body);
        parts(request.send().await.expect("an answer")).await
    };
    let many = format!("[{}0]", "0,".repeat(2_000_000));
    for (path, start) in [
        ("/v1/completions", r#"{"model": "tiny", "prompt": "a", "suffix": "#),
        ("/v1/completions", r#"{"model": "tiny", "prompt": "a", "unknown": "#),
        ("/v1/completions", r#"{"model": "tiny", "prompt": "#),
        ("/v1/chat/completions", r#"{"model": "tiny", "messages": [], "tools": "#),
        ("/adapters", r#"{"name": "a", "metadata": {"x": "#),
        ("/adapters/train", r#"{"name": "a", "dataset": "#),
    ] {
        let end = if start.contains("metadata") { "}}" } else { "}" };
        let refused = envelope(&send(path, "application/json", format!("{start}{many}{end}")).await);
        assert_eq!((refused.0, refused.1.as_str()), (413, "invalid_request_error"), "{path} {start}");
    }
    // A line alone, the others are stored.
    let good = json!({"name": "b", "numbers": vec![0.5; 13]});
    let lines = format!("{{\"name\": \"a\", \"scheme\": {many}}}\n{good}\n");
    let (status, answer) = send("/adapters/batch", "application/x-ndjson", lines).await;
    let answers: Vec<Value> =
        answer.as_str().expect("lines").lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert_eq!((status, answers.len()), (200, 2));
    assert!(answers[0]["error"]["message"].as_str().is_some_and(|words| words.contains("values")), "{}", answers[0]);
    assert!(answers[1]["generation"].is_string(), "{}", answers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn transport_errors_come_in_order() {
    let app = TestApp::tiny("llama").args(["--max-body-mb", "1"]).start().await;
    let send = async |request: reqwest::RequestBuilder| parts(request.send().await.expect("an answer")).await;

    assert_eq!(envelope(&send(app.anonymous(Method::GET, "/v1/nothing")).await).0, 404);
    // Method before key: a GET without a key on a POST route is a 405.
    assert_eq!(envelope(&send(app.anonymous(Method::GET, "/v1/completions")).await).0, 405);
    // Key before media type and body.
    let no_key = envelope(&send(app.anonymous(Method::POST, "/v1/completions").body("{")).await);
    assert_eq!((no_key.0, no_key.1.as_str(), no_key.3), (401, "authentication_error", json!("invalid_api_key")));
    let wrong_key = envelope(&send(app.as_key("mote-sk-wrong", Method::GET, "/v1/models")).await);
    assert_eq!((wrong_key.0, wrong_key.3), (401, json!("invalid_api_key")));
    // Media type before size, size before JSON.
    let text = app
        .request(Method::POST, "/v1/completions")
        .header(header::CONTENT_TYPE, "text/plain")
        .body("x".repeat(2 << 20));
    assert_eq!(envelope(&send(text).await).0, 415);
    let large = app
        .request(Method::POST, "/v1/completions")
        .header(header::CONTENT_TYPE, "application/json")
        .body("x".repeat(2 << 20));
    assert_eq!(envelope(&send(large).await).0, 413);
    let broken = app
        .request(Method::POST, "/v1/completions")
        .header(header::CONTENT_TYPE, "application/json")
        .body("{\"model\": ");
    assert_eq!(envelope(&send(broken).await).0, 400);
    // Types before resolution.
    let typed =
        envelope(&app.post("/v1/completions", &json!({"model": "nobody", "prompt": "x", "temperature": 9})).await);
    assert_eq!((typed.0, typed.2), (400, json!("temperature")));
    let unknown = envelope(&app.post("/v1/completions", &json!({"model": "nobody", "prompt": "x"})).await);
    assert_eq!((unknown.0, unknown.2, unknown.3), (404, json!("model"), json!("model_not_found")));
    // Resolution before the chat template and the context.
    let chat = envelope(
        &app.post("/v1/chat/completions", &json!({"model": "nobody", "messages": [{"role": "user", "content": "x"}]}))
            .await,
    );
    assert_eq!(chat.0, 404);

    let answer =
        app.request(Method::GET, "/v1/models").header("x-request-id", "mine-1").send().await.expect("an answer");
    assert_eq!(answer.headers()["x-request-id"], "mine-1");
    assert!(answer.headers().contains_key("openai-processing-ms"));
    let answer = app
        .request(Method::GET, "/v1/models")
        .header("x-request-id", "not sane \u{7f}?".replace('\u{7f}', "~"))
        .send()
        .await
        .expect("an answer");
    assert_ne!(answer.headers()["x-request-id"], "not sane ~?");
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_are_not_adapters() {
    let app = TestApp::tiny("llama").start().await;
    let raw = async |query: &str, bytes: Vec<u8>| {
        let request = app
            .request(Method::POST, &format!("/adapters?{query}"))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(bytes);
        parts(request.send().await.expect("an answer")).await
    };
    let nan: Vec<u8> = [[0xc0, 0x7f]; 13].concat();
    let infinite: Vec<u8> = [[0x80, 0xff]; 13].concat();
    for bytes in [vec![], vec![0; 25], vec![0; 27], vec![0; 52], nan, infinite] {
        let length = bytes.len();
        assert_eq!(envelope(&raw("name=a&scheme=tiny13&dtype=bf16", bytes).await).0, 400, "{length} bytes");
    }
    assert_eq!(envelope(&raw("scheme=tiny13", vec![0; 26]).await).2, "name");
    for name in ["", "train", "batch", "schemes", ".", "..", "a/b", "ä", &"x".repeat(65)] {
        let (status, _, param, _) =
            envelope(&app.post("/adapters", &json!({"name": name, "numbers": vec![0; 13]})).await);
        assert_eq!((status, param), (400, json!("name")), "{name}");
    }
    assert_eq!(envelope(&app.post("/adapters", &json!({"name": "tiny", "numbers": vec![0; 13]})).await).0, 409);
    for (body, param) in [
        (json!({"name": "a"}), "data"),
        (json!({"name": "a", "data": "!!"}), "data"),
        (json!({"name": "a", "data": "AAAA", "numbers": vec![0; 13]}), "data"),
        (json!({"name": "a", "numbers": vec![0; 12]}), "numbers"),
        (json!({"name": "a", "numbers": ["x"]}), "numbers"),
        (json!({"name": "a", "numbers": vec![1e39; 13]}), "numbers"),
        (json!({"name": "a", "numbers": vec![0; 13], "dtype": "f16"}), "dtype"),
        (json!({"name": "a", "numbers": vec![0; 13], "scheme": "tiny14"}), "scheme"),
        (json!({"name": "a", "numbers": vec![0; 13], "scheme": {"rnak": 2}}), "scheme"),
        (
            json!({"name": "a", "numbers": vec![0; 13], "scheme": {"convention": "peft", "rank": 64, "u": 1, "ties": {"kind": "groups", "count": 13}}}),
            "scheme",
        ),
        (
            json!({"name": "a", "numbers": vec![0; 13], "scheme": {"convention": "peft", "rank": 2, "u": 4_000_000_000u32, "ties": {"kind": "groups", "count": 4_000_000_000u32}}}),
            "scheme",
        ),
        (json!({"name": "a", "numbers": vec![0; 13], "fingerprint": "ABC"}), "fingerprint"),
        (json!({"name": "a", "numbers": vec![0; 13], "metadata": 3}), "metadata"),
    ] {
        let (status, _, got, _) = envelope(&app.post("/adapters", &body).await);
        assert_eq!(status, 400, "{body}");
        assert!(got.as_str().is_some_and(|got| got.starts_with(param)), "{body}: param {got}");
    }
    let other = "0".repeat(64);
    let (status, _, _, code) =
        envelope(&app.post("/adapters", &json!({"name": "a", "numbers": vec![0; 13], "fingerprint": other})).await);
    assert_eq!((status, code), (422, json!("incompatible_adapter")));
    let forced =
        app.ok("/adapters", &json!({"name": "a", "numbers": vec![0; 13], "fingerprint": other, "force": true})).await;
    assert_eq!(forced["approximate"], true);

    app.ok("/adapters", &json!({"name": "b", "numbers": vec![0; 13]})).await;
    let taken = app
        .request(Method::POST, "/adapters")
        .json(&json!({"name": "b", "numbers": vec![0; 13]}))
        .send()
        .await
        .expect("an answer");
    assert_eq!(taken.headers()["x-should-retry"], "false");
    let taken = envelope(&parts(taken).await);
    assert_eq!((taken.0, taken.1.as_str(), taken.3), (409, "conflict", json!("name_taken")));
    let stale = app
        .request(Method::PUT, "/adapters/b")
        .header(header::IF_MATCH, "\"00000000000000000000000000000000\"")
        .json(&json!({"numbers": vec![0; 13]}));
    let stale = envelope(&parts(stale.send().await.expect("an answer")).await);
    assert_eq!((stale.0, stale.1.as_str()), (412, "generation_mismatch"));
    for (method, path) in [
        (Method::GET, "/adapters/zzz"),
        (Method::DELETE, "/adapters/zzz"),
        (Method::GET, "/adapters/zzz/weights"),
        (Method::GET, "/adapters/zzz/generations"),
    ] {
        let gone = envelope(&parts(app.request(method, path).send().await.expect("an answer")).await);
        assert_eq!((gone.0, gone.3), (404, json!("adapter_not_found")), "{path}");
    }
    let unknown = envelope(
        &app.post("/v1/completions", &json!({"model": "tiny", "prompt": "x", "adapter": {"name": "zzz"}})).await,
    );
    assert_eq!((unknown.0, unknown.3), (404, json!("adapter_not_found")));
    for model in ["tiny+AAAA", "tiny+!", "tiny:zzz", "tiny+"] {
        let status = app.post("/v1/completions", &json!({"model": model, "prompt": "x"})).await.0;
        assert!(status == 400 || status == 404, "{model} answered {status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_a_429() {
    let app = TestApp::tiny("llama").args(["--max-batch", "1", "--max-queue", "1"]).start().await;
    let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 200, "ignore_eos": true});
    let answers =
        futures::future::join_all((0..12).map(|_| async {
            app.request(Method::POST, "/v1/completions").json(&body).send().await.expect("an answer")
        }))
        .await;
    let full: Vec<_> = answers.into_iter().filter(|answer| answer.status() == 429).collect();
    assert!(!full.is_empty(), "nobody was turned away");
    for answer in full {
        assert!(answer.headers().contains_key("retry-after"));
        let error = envelope(&parts(answer).await);
        assert_eq!((error.1.as_str(), error.3), ("rate_limit_error", json!("queue_full")));
    }
}

/// Finite numbers whose cores are not, or whose logits are not, are the client's fault: a 400 that names the adapter, no 5xx.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_too_large_for_the_model() {
    let app = TestApp::tiny("llama").start().await;
    app.ok("/adapters", &json!({"name": "a", "numbers": vec![1.0; 13]})).await;
    let huge = app
        .post(
            "/v1/completions",
            &json!({"model": "tiny", "prompt": [5, 6, 7], "adapter": {"name": "a", "scale": 1e20}}),
        )
        .await;
    let (status, _, param, _) = envelope(&huge);
    assert_eq!(status, 400, "{}", huge.1);
    assert!(param.as_str().is_some_and(|param| param.starts_with("adapter")), "{param}");
    app.ok("/v1/completions", &json!({"model": "a", "prompt": [5, 6, 7]})).await;
}

/// serde would take a list for a struct, field by field; a label a request method would be a series for ever.
#[tokio::test(flavor = "multi_thread")]
async fn lists_are_no_objects_and_methods_no_series() {
    let app = TestApp::tiny("llama").start().await;
    for (path, body) in
        [("/v1/completions", json!(["tiny", "x"])), ("/admin/tenants", json!(["ann"])), ("/adapters", json!([]))]
    {
        assert_eq!(envelope(&app.post(path, &body).await).0, 400, "{path}");
    }
    for i in 0..20 {
        let method = Method::from_bytes(format!("WORD{i}").as_bytes()).expect("a method");
        let _ = app.request(method, "/v1/models").send().await.expect("an answer");
    }
    let metrics = app.request(Method::GET, "/metrics").send().await.expect("metrics").text().await.expect("text");
    assert!(!metrics.contains("WORD") && metrics.contains("method=\"other\""));
    assert_eq!(app.anonymous(Method::GET, "/metrics").send().await.expect("an answer").status(), 401);
    let long = json!({"model": "tiny", "prompt": "x", "stop": "s".repeat(2000)});
    assert_eq!(envelope(&app.post("/v1/completions", &long).await).2, "stop");
    let tools = json!({"model": "tiny", "prompt": "x", "tools": [{"type": "function"}]});
    assert_eq!(envelope(&app.post("/v1/completions", &tools).await).2, "tools");
}

/// A data directory opened on another base: its adapters are listed as incompatible and are 422 on use.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_of_another_base() {
    let data = tempfile::tempdir().expect("a folder");
    let mut first = TestApp::tiny("llama").data_dir(data.path()).start().await;
    first.ok("/adapters", &json!({"name": "mine", "numbers": vec![0.5; 13]})).await;
    first.kill();
    let second = TestApp::tiny("qwen2").data_dir(data.path()).start().await;
    let listed = second.get("/adapters").await.1;
    assert_eq!(listed["data"][0]["name"], "mine");
    assert_eq!(listed["data"][0]["incompatible"], true, "{listed}");
    let (status, _, _, code) =
        envelope(&second.post("/v1/completions", &json!({"model": "mine", "prompt": "x"})).await);
    assert_eq!((status, code), (422, json!("incompatible_adapter")));
}
