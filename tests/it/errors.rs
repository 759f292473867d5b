//! Every refusal that these routes make, and the order of the checks.
#![allow(clippy::await_holding_lock, reason = "the engine's thread waits for the lock, the runtime does not")]

use std::sync::Arc;

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use futures::StreamExt as _;
use mote::http::{AuthMode, Limits};
use serde_json::{Value, json};

use crate::app::{CONTEXT, KEY, MODEL, Options, TestApp, post};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn completion(extra: Value) -> Value {
    with(json!({"model": MODEL, "prompt": "Hi"}), extra)
}

fn chat(extra: Value) -> Value {
    with(json!({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}), extra)
}

fn row(
    status: u16,
    r#type: &str,
    param: Option<&str>,
    code: Option<&str>,
) -> (u16, String, Option<String>, Option<String>) {
    (status, r#type.into(), param.map(str::to_owned), code.map(str::to_owned))
}

fn invalid(param: &str) -> (u16, String, Option<String>, Option<String>) {
    row(400, "invalid_request_error", Some(param), None)
}

#[tokio::test]
async fn a_field_of_the_wrong_type_or_out_of_range_is_named() {
    let app = TestApp::new().await;
    // For both routes: the field and values that it cannot have.
    let shared = [
        ("temperature", vec![json!("warm"), json!(-0.1), json!(2.1), json!([1]), json!(true)]),
        ("top_p", vec![json!(1.5), json!(-1), json!("x")]),
        ("top_k", vec![json!(-2), json!(1.5), json!("x")]),
        ("min_p", vec![json!(2), json!(-0.1)]),
        ("presence_penalty", vec![json!(2.5), json!(-2.5), json!("x")]),
        ("frequency_penalty", vec![json!(2.5), json!(-2.5), json!({})]),
        ("repetition_penalty", vec![json!(0), json!(-1), json!(11), json!(1e-60)]),
        ("logit_bias", vec![json!({"x": 1}), json!({"320": 1}), json!({"-1": 1}), json!({"5": 101}), json!([5])]),
        ("seed", vec![json!("x"), json!(1.5), json!(u64::MAX)]),
        ("n", vec![json!(0), json!(129), json!(-1), json!("2"), json!(1.0)]),
        ("stop", vec![json!(["a", "b", "c", "d", "e"]), json!(""), json!(["a", ""]), json!(5), json!([5])]),
        ("max_tokens", vec![json!(-1), json!("x"), json!(1.5)]),
        ("min_tokens", vec![json!(-1), json!("x"), json!(CONTEXT)]),
        ("ignore_eos", vec![json!("yes"), json!(1)]),
        ("return_token_ids", vec![json!("yes")]),
        ("stream", vec![json!("yes"), json!(1)]),
        ("stream_options", vec![json!({"include_usage": true}), json!({}), json!("x")]),
        ("user", vec![json!(5)]),
        ("model", vec![json!(null), json!(5), json!([])]),
        (
            "adapter",
            vec![json!("alice"), json!({}), json!({"name": "a", "data": "AA"}), json!({"mix": [], "name": "a"})],
        ),
    ];
    for (param, values) in shared {
        for value in values {
            for (path, base) in [(COMPLETIONS, completion(json!({}))), (CHAT, chat(json!({})))] {
                let answer = app.post(path, with(base, json!({param: value}))).await;
                assert_eq!(answer.error(), invalid(param), "{path} {param} {value}: {}", answer.text);
            }
        }
    }
}

#[tokio::test]
async fn completions_refuse_what_they_cannot_do() {
    let app = TestApp::new().await;
    let rows = [
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": ""}), "prompt"),
        (json!({"prompt": [""]}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [[1], []]}), "prompt"),
        (json!({"prompt": 5}), "prompt"),
        (json!({"prompt": {"text": "x"}}), "prompt"),
        (json!({"prompt": [1, "a"]}), "prompt"),
        (json!({"prompt": [-1]}), "prompt"),
        (json!({"prompt": [1.5]}), "prompt"),
        (json!({"prompt": [320]}), "prompt"),
        (json!({"prompt": [4_294_967_296_u64 + 5]}), "prompt"),
        (json!({"prompt": vec!["x"; 4097]}), "prompt"),
        (json!({"logprobs": 6}), "logprobs"),
        (json!({"logprobs": true}), "logprobs"),
        (json!({"logprobs": -1}), "logprobs"),
        (json!({"echo": "yes"}), "echo"),
        (json!({"suffix": "the end"}), "suffix"),
        (json!({"best_of": 1, "n": 2}), "best_of"),
        (json!({"best_of": 0}), "best_of"),
        (json!({"best_of": 129}), "best_of"),
        (json!({"best_of": 2, "stream": true}), "best_of"),
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (json!({"min_tokens": 17}), "min_tokens"),
        (json!({"adapter": {"name": "a", "colour": "red"}}), "adapter.colour"),
        (json!({"adapter": {"name": "a", "scale": "x"}}), "adapter.scale"),
        (json!({"adapter": {"name": "a", "scheme": "tiny13"}}), "adapter.scheme"),
        (json!({"adapter": {"mix": []}}), "adapter.mix"),
        (json!({"adapter": {"mix": [{"name": "a"}]}}), "adapter.mix[0]"),
        (json!({"adapter": {"mix": [{"name": "a", "weight": 1}], "scale": 2}}), "adapter.scale"),
    ];
    for (extra, param) in rows {
        let answer = app.post(COMPLETIONS, completion(extra.clone())).await;
        assert_eq!(answer.error(), invalid(param), "{extra}: {}", answer.text);
    }
    let missing = app.post(COMPLETIONS, json!({"model": MODEL})).await;
    assert_eq!(missing.error(), invalid("prompt"));
    let missing = app.post(COMPLETIONS, json!({"prompt": "x"})).await;
    assert_eq!(missing.error(), invalid("model"));
    app.ok(COMPLETIONS, completion(json!({"suffix": "", "best_of": null, "user": "me", "unknown": [1]}))).await;
}

#[tokio::test]
async fn chats_refuse_what_they_cannot_do() {
    let app = TestApp::new().await;
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let rows = [
        (json!({"messages": null}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": "Hi"}), "messages"),
        (json!({"messages": [{"content": "x"}]}), "messages[0]"),
        (
            json!({"messages": [{"role": "user", "content": "x"}, {"role": "robot", "content": "x"}]}),
            "messages[1].role",
        ),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
        (
            json!({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "a"}]}]}),
            "messages[0].tool_calls",
        ),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (user(json!(null)), "messages[0].content"),
        (user(json!(5)), "messages[0].content"),
        (user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "messages[0].content[0]"),
        (user(json!([{"type": "text", "text": "x"}, {"type": "text"}])), "messages[0].content[1]"),
        (user(json!("refuse")), "messages"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens"),
        (json!({"logprobs": 3}), "logprobs"),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"modalities": ["text", "audio"]}), "modalities"),
        (json!({"tools": [{"type": "function"}]}), "tools"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"functions": [{}]}), "functions"),
        (json!({"function_call": {"name": "f"}}), "function_call"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"prediction": {"type": "content"}}), "prediction"),
        (json!({"web_search_options": {"a": 1}}), "web_search_options"),
        (json!({"reasoning_effort": "high"}), "reasoning_effort"),
        (json!({"store": true}), "store"),
    ];
    for (extra, param) in rows {
        let answer = app.post(CHAT, chat(extra.clone())).await;
        assert_eq!(answer.error(), invalid(param), "{extra}: {}", answer.text);
    }
}

#[tokio::test]
async fn a_model_that_does_not_exist_is_404_and_never_the_base() {
    let app = TestApp::new().await;
    for model in ["gpt-4", "", "scripted:nobody", "SCRIPTED"] {
        let answer = app.post(COMPLETIONS, completion(json!({"model": model}))).await;
        assert_eq!(
            answer.error(),
            row(404, "invalid_request_error", Some("model"), Some("model_not_found")),
            "{model}"
        );
    }
}

#[tokio::test]
async fn a_prompt_that_does_not_fit_is_refused_before_any_work() {
    let app = TestApp::new().await;
    let overflow = |param| row(400, "invalid_request_error", Some(param), Some("context_length_exceeded"));
    let rows = [
        json!({"prompt": vec![5; CONTEXT]}),
        json!({"prompt": vec![5; CONTEXT + 1], "max_tokens": 0, "echo": true}),
        json!({"prompt": vec![5; 10], "max_tokens": CONTEXT - 9}),
        json!({"prompt": [[5], vec![5; CONTEXT]]}),
        json!({"prompt": "word ".repeat(CONTEXT)}),
        json!({"prompt": "word ".repeat(1 << 20)}),
        json!({"max_tokens": u64::MAX}),
    ];
    for extra in rows {
        assert_eq!(app.post(COMPLETIONS, completion(extra)).await.error(), overflow("prompt"));
    }
    let long = json!({"messages": [{"role": "user", "content": "word ".repeat(CONTEXT)}]});
    assert_eq!(app.post(CHAT, chat(long)).await.error(), overflow("messages"));
    assert_eq!(app.post(CHAT, chat(json!({"max_tokens": CONTEXT}))).await.error(), overflow("messages"));
    assert_eq!(app.state.service.engine.stats().accepted.get(), 0);
    app.ok(COMPLETIONS, completion(json!({"prompt": vec![5; CONTEXT], "max_tokens": 0}))).await;
}

#[tokio::test]
async fn a_base_without_a_template_says_so() {
    let app = TestApp::with(Options { template: None, ..Options::default() }).await;
    let expected = row(400, "invalid_request_error", Some("messages"), Some("no_chat_template"));
    assert_eq!(app.post(CHAT, chat(json!({}))).await.error(), expected);
    app.ok(COMPLETIONS, completion(json!({}))).await;
}

#[tokio::test]
async fn a_full_queue_is_429_and_worth_a_retry() {
    let app = Arc::new(TestApp::with(Options { max_queue: 0, ..Options::default() }).await);
    let busy = completion(json!({"n": 8, "max_tokens": 100, "stream": true, "ignore_eos": true}));
    let hold = app.watch.hold.lock().unwrap();
    let streams = app.open(COMPLETIONS, busy).await;
    let answer = app.post(COMPLETIONS, completion(json!({}))).await;
    drop(hold);
    assert_eq!(answer.error(), row(429, "rate_limit_error", None, Some("queue_full")));
    assert_eq!(answer.headers[header::RETRY_AFTER], "1");
    assert!(answer.headers.get("x-should-retry").is_none());
    assert!(streams.collect::<String>().await.ends_with("data: [DONE]\n\n"), "those inside are served to the end");
    let never = app.post(COMPLETIONS, completion(json!({"n": 9}))).await;
    assert_eq!(
        never.error(),
        row(400, "invalid_request_error", Some("n"), None),
        "more than there can ever be is no matter of waiting"
    );
}

#[tokio::test]
async fn a_stopped_engine_is_503() {
    let app = TestApp::new().await;
    let engine = app.state.service.engine.clone();
    tokio::task::spawn_blocking(move || engine.shutdown(std::time::Duration::ZERO)).await.unwrap();
    let answer = app.post(COMPLETIONS, completion(json!({}))).await;
    assert_eq!(answer.error(), row(503, "api_error", None, Some("draining")));
    assert!(answer.headers.contains_key(header::RETRY_AFTER));
}

#[tokio::test]
async fn a_completion_whose_time_is_over_is_a_503_and_in_a_stream_an_error_and_the_end() {
    let app = TestApp::with(Options { request_timeout: Some(std::time::Duration::ZERO), ..Options::default() }).await;
    let mut body = completion(json!({"prompt": [5, 5], "max_tokens": 9, "n": 3}));
    for _ in 0..2 {
        let answer = app.post(COMPLETIONS, body.clone()).await;
        assert_eq!(answer.error(), row(503, "api_error", None, Some("overloaded")));
        assert_eq!(answer.headers[header::RETRY_AFTER], "5");
    }
    body["stream"] = json!(true);
    let answer = app.post(COMPLETIONS, body).await;
    assert_eq!(answer.status, 200);
    let lines = answer.data_lines();
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!((lines.len(), &last["error"]["code"]), (1, &json!("overloaded")), "no [DONE]");
    // The engine has forgotten them.
    let stats = app.state.service.engine.stats();
    assert_eq!((stats.finished.get(), stats.running.get(), stats.waiting.get()), (0, 0, 0));
}

#[tokio::test]
async fn a_key_is_needed_and_must_be_right() {
    let app = TestApp::new().await;
    let expected = row(401, "authentication_error", None, Some("invalid_api_key"));
    for value in [None, Some("Bearer mote-sk-wrong"), Some("Bearer "), Some("Basic eDp5"), Some(KEY)] {
        for path in [COMPLETIONS, CHAT] {
            let mut request = post(path, completion(json!({})).to_string());
            request.headers_mut().remove(header::AUTHORIZATION);
            if let Some(value) = value {
                request.headers_mut().insert(header::AUTHORIZATION, value.parse().unwrap());
            }
            let answer = app.send(request).await;
            assert_eq!(answer.error(), expected, "{value:?}");
            assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
        }
    }
    let open = TestApp::with(Options { auth: AuthMode::Open, ..Options::default() }).await;
    let mut request = post(COMPLETIONS, completion(json!({})).to_string());
    request.headers_mut().remove(header::AUTHORIZATION);
    assert_eq!(open.send(request).await.status, 200);
}

#[tokio::test]
async fn fields_are_checked_before_names_are_looked_up() {
    let app = TestApp::new().await;
    let adapter = |model: &str, adapter: Value| completion(json!({"model": model, "adapter": adapter}));
    let part = |weight: f64| json!({"name": "nobody", "weight": weight});
    for (path, body, param) in [
        (COMPLETIONS, adapter(MODEL, json!({"name": "nobody", "scale": 1e300})), "adapter.scale"),
        (COMPLETIONS, adapter("nobody", json!({"name": "nobody", "scale": 1e300})), "adapter.scale"),
        (COMPLETIONS, adapter(MODEL, json!({"mix": [part(1.0), part(1e300)]})), "adapter.mix[1].weight"),
        (COMPLETIONS, adapter("nobody", json!({"data": "AA=="})), "adapter.data"),
        ("/v1/fine_tuning/jobs", json!({"model": "nobody"}), "training_file"),
        (
            "/v1/fine_tuning/jobs",
            json!({"model": "nobody", "training_file": "x", "method": {"type": "dpo"}}),
            "method.type",
        ),
    ] {
        let answer = app.post(path, body).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{}", answer.text);
    }
    let answer = app.post(COMPLETIONS, adapter(MODEL, json!({"mix": [part(1.0)]}))).await;
    assert_eq!(
        answer.error(),
        row(404, "invalid_request_error", Some("adapter.mix[0].name"), Some("adapter_not_found"))
    );
    let unknown = json!({"model": "nobody", "training_file": "file-1"});
    let answer = app.post("/v1/fine_tuning/jobs", unknown).await;
    assert_eq!(answer.error(), row(404, "invalid_request_error", Some("model"), Some("model_not_found")));
}

/// Each request has every later fault too, so only the order decides.
#[tokio::test]
async fn checks_run_in_the_stated_order() {
    let limits = Limits { body: 100, ..Limits::default() };
    let app = TestApp::with(Options { limits, ..Options::default() }).await;
    let request = |method: Method, path: &str, key: bool, media: &str, body: String| {
        let mut builder = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, media);
        if key {
            builder = builder.header(header::AUTHORIZATION, format!("Bearer {KEY}"));
        }
        builder.body(Body::from(body)).unwrap()
    };
    let (json, text, large) = ("application/json", "text/plain", "{".repeat(101));
    let short = |body: Value| body.to_string();
    let steps = [
        (request(Method::PUT, "/v2/nothing", false, text, large.clone()), 404, None),
        (request(Method::PUT, COMPLETIONS, false, text, large.clone()), 405, None),
        (request(Method::POST, COMPLETIONS, false, text, large.clone()), 401, None),
        (request(Method::POST, COMPLETIONS, true, text, large.clone()), 415, None),
        (request(Method::POST, COMPLETIONS, true, json, large), 413, None),
        (request(Method::POST, COMPLETIONS, true, json, r#"{"model": 5, "n": 0"#.into()), 400, None),
        (
            request(Method::POST, COMPLETIONS, true, json, short(json!({"model": "x", "prompt": [999], "n": 0}))),
            400,
            Some("n"),
        ),
        (
            request(Method::POST, COMPLETIONS, true, json, short(json!({"model": "x", "prompt": [999]}))),
            404,
            Some("model"),
        ),
        (
            request(
                Method::POST,
                COMPLETIONS,
                true,
                json,
                short(json!({"model": MODEL, "prompt": [999], "max_tokens": 999})),
            ),
            400,
            Some("prompt"),
        ),
    ];
    for (at, (request, status, param)) in steps.into_iter().enumerate() {
        let answer = app.send(request).await;
        let (found, _, named, code) = answer.error();
        assert_eq!((found, named.as_deref()), (status, param), "step {at}: {}", answer.text);
        assert_ne!(code.as_deref(), Some("context_length_exceeded"), "token ids come before the context length");
    }
}

#[tokio::test]
async fn a_body_is_cut_off_at_the_limit_whatever_it_announces() {
    let limits = Limits { body: 100, ..Limits::default() };
    let app = TestApp::with(Options { limits, ..Options::default() }).await;
    let chunks = futures::stream::repeat_with(|| Ok::<_, std::io::Error>("x".repeat(40))).take(1000);
    let answer = app.send(post(COMPLETIONS, Body::from_stream(chunks))).await;
    assert_eq!(answer.error(), row(413, "invalid_request_error", None, None));
}

#[tokio::test]
async fn what_is_no_json_is_400_without_a_field() {
    let app = TestApp::new().await;
    let endless = "[".repeat(1000);
    for body in ["", "{", "null x", "[]", "5", "\"text\"", r#"{"prompt": "x",}"#, r#"{"model": "\ud800"}"#, &endless] {
        let answer = app.send(post(COMPLETIONS, body.to_owned())).await;
        assert_eq!(answer.error(), row(400, "invalid_request_error", None, None), "{body}: {}", answer.text);
    }
    let answer = app.send(post(COMPLETIONS, vec![b'{', b'"', 0xff, b'"', b'}'])).await;
    assert_eq!(answer.error(), row(400, "invalid_request_error", None, None));
}

#[tokio::test]
async fn unknown_routes_and_methods_are_in_the_envelope() {
    let app = TestApp::new().await;
    for path in ["/", "/v1", "/v1/completions/", "/v1/embeddings", "/..", "/v1/%ff"] {
        let answer = app.get(path).await;
        assert_eq!(answer.error(), row(404, "invalid_request_error", None, None), "{path}");
    }
    for (method, path, allow) in [
        (Method::GET, COMPLETIONS, "POST"),
        (Method::DELETE, CHAT, "POST"),
        (Method::POST, "/healthz", "GET,HEAD"),
        (Method::OPTIONS, COMPLETIONS, "POST"),
    ] {
        let answer = app.send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.error(), row(405, "invalid_request_error", None, None));
        assert_eq!(answer.headers[header::ALLOW], allow);
    }
}
