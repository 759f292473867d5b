//! Bodies that strangers send, spoilt: any answer but a failure of the server, always in the envelope. `PROPTEST_CASES=100000` lets them run long.

use std::sync::{Arc, LazyLock};

use axum::{
    body::Body,
    http::{Method, Request, header},
};
use mote::service::training::{self, PolicyRequest, PolicySource};
use mote_trainer::{Policy, PolicyError};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    app::{Answer, KEY, MODEL, Options, TestApp, post},
    limits::{ADMIN, app_with},
};

/// A server with something of each kind that a body may name: the adapters `kept` and `rolled`, the tenant `patched`.
struct Server {
    runtime: Runtime,
    app: TestApp,
    /// A generation that `rolled` can go back to.
    generation: String,
    /// A file to train on.
    file: String,
    /// A key of `patched`.
    key: String,
}

static SERVER: LazyLock<Server> = LazyLock::new(server);

/// Jobs are made and checked like any, and fail when they are to begin: what is spoilt here are bodies, and the engine is for the completions.
struct NoPolicies;

impl PolicySource for NoPolicies {
    fn supports(&self, _method: training::Method) -> Result<(), String> {
        Ok(())
    }

    fn policy(&self, _request: &PolicyRequest<'_>) -> Result<Box<dyn Policy>, PolicyError> {
        Err(PolicyError::Failed("nothing is trained here".to_owned()))
    }
}

fn server() -> Server {
    let runtime = Runtime::new().unwrap();
    let (app, generation, file, key) = runtime.block_on(async {
        let app = app_with(Options { policies: Some(Arc::new(NoPolicies)), ..Options::default() }).await;
        let field = async |request: Request<Body>, field: &str| {
            let answer = app.send(request).await;
            assert!(answer.status.is_success(), "{}", answer.text);
            answer.json()[field].as_str().unwrap().to_owned()
        };
        let upload = |name: &str, x: f64| {
            let body = json!({"name": name, "numbers": vec![x; 13], "on_conflict": "new_generation"});
            json_request(Method::POST, "/adapters", body.to_string())
        };
        field(upload("kept", 0.5), "generation").await;
        let generation = field(upload("rolled", 0.5), "generation").await;
        field(upload("rolled", 0.25), "generation").await;
        let tenant = json!({"name": "patched"}).to_string();
        field(json_request(Method::POST, "/admin/tenants", tenant), "name").await;
        let key = field(json_request(Method::POST, "/admin/tenants/patched/keys", "{}"), "id").await;
        let data = form(&[("purpose", None, b"fine-tune"), ("file", Some("train.jsonl"), SUMS.as_bytes())]);
        let file = field(form_request("/v1/files", "multipart/form-data; boundary=cut", data), "id").await;
        (app, generation, file, key)
    });
    Server { runtime, app, generation, file, key }
}

fn cases(usual: u32) -> ProptestConfig {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => ProptestConfig::default(),
        None => ProptestConfig::with_cases(usual),
    }
}

/// Valid bodies, with a bit of everything in them. Jobs are of one step, should anybody ever run them.
fn bodies(server: &Server) -> Vec<(Method, String, Value)> {
    let scheme = json!({"convention": "peft", "rank": 2, "u": 1, "ties": {"kind": "groups", "count": 13}, "seed": 42, "targets": ["q", "v"]});
    let grader = json!({"type": "multi", "graders": {
        "a": {"type": "number", "reference": "{{item.answer}}", "tolerance": 0.1},
        "b": {"type": "regex", "pattern": "a+b"},
        "c": {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "evaluation_metric": "bleu"},
        "d": {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }, "calculate_output": "a + 0.5 * b"});
    let steps = json!({"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2, "max_completion_tokens": 4, "temperature": 0.9, "learning_rate": 0.1,
        "schedule": "cosine", "warmup_steps": 1, "loss": "dapo", "clip_low": 0.1, "beta": 0.01, "updates_per_batch": 1, "minibatches": 1,
        "mask_truncated": true, "patience": 1, "target_reward": 1.0, "checkpoint_every": 1});
    let items = json!([{"messages": [{"role": "system", "content": "add"}, {"role": "user", "content": "2+2"}], "answer": "4"}, {"question": "1+2", "answer": 3}]);
    let rotate = format!("/admin/keys/{}/rotate", server.key);
    let posts = [
        (
            "/v1/completions",
            json!({"model": MODEL, "prompt": ["a", "b"], "max_tokens": 3, "n": 2, "best_of": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5,
                "logprobs": 2, "echo": true, "stop": ["x", "y"], "logit_bias": {"5": 1.5}, "seed": 7, "min_tokens": 1, "return_token_ids": true,
                "presence_penalty": 0.1, "stream_options": null, "adapter": {"data": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "scheme": "tiny13", "scale": 0.5}}),
        ),
        (
            "/v1/completions",
            json!({"model": format!("{MODEL}+AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "prompt": [[5, 6], [7]], "max_tokens": 2, "stream": true,
                "stream_options": {"include_usage": true}}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": MODEL, "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}],
                "max_completion_tokens": 2, "logprobs": true, "top_logprobs": 3, "n": 2, "response_format": {"type": "text"}}),
        ),
        (
            "/adapters",
            json!({"name": "fuzzed", "numbers": vec![0.5; 13], "dtype": "bf16", "scheme": scheme, "metadata": {"a": 1}, "on_conflict": "new_generation"}),
        ),
        (
            "/v1/fine_tuning/alpha/graders/run",
            json!({"grader": grader, "item": {"answer": "4"}, "model_sample": "it is 4"}),
        ),
        ("/v1/fine_tuning/alpha/graders/validate", json!({"grader": grader})),
        (
            "/v1/fine_tuning/jobs",
            json!({"model": MODEL, "training_file": server.file, "validation_file": server.file, "seed": 1, "suffix": "x", "metadata": {"a": "b"},
                "method": {"type": "reinforcement", "reinforcement": {"grader": grader, "hyperparameters": {"n_epochs": 1, "batch_size": 2,
                    "learning_rate_multiplier": 0.5, "compute_multiplier": "auto", "max_completion_tokens": 4}}}}),
        ),
        (
            "/adapters/train",
            json!({"name": "trained", "method": "grpo", "on_conflict": "new_generation", "scheme": "tiny13", "init_from": "rolled", "dataset": items,
                "validation": items, "prompt": "{{item.question}} =", "grader": grader, "hyperparameters": steps, "seed": 7, "full_precision": true,
                "metadata": {"a": {"b": [1, null]}}}),
        ),
        (
            "/adapters/train",
            json!({"name": "taught", "method": "sft", "on_conflict": "new_generation", "scheme": scheme, "dataset": "{\"prompt\": \"é\", \"completion\": \" x\"}\n",
                "hyperparameters": {"steps": 1, "prompts_per_step": 1, "max_completion_tokens": 4, "learning_rate": 0.01, "weight_decay": 0.1,
                    "adam_beta1": 0.5}}),
        ),
        (
            "/adapters/train",
            json!({"name": "evolved", "method": "es", "on_conflict": "new_generation", "training_file": server.file, "validation_file": server.file,
                "grader": {"type": "length", "max": 3, "falloff": 2},
                "hyperparameters": {"steps": 1, "prompts_per_step": 1, "population": 2, "sigma": 0.2, "max_completion_tokens": 4}}),
        ),
        ("/adapters/rolled/rollback", json!({"generation": server.generation})),
        ("/admin/tenants", json!({"name": "fuzzed"})),
        ("/admin/tenants/patched/keys", json!({"role": "member", "expires_in": 1000, "expires_at": null})),
        (&*rotate, json!({"grace": 1_000_000, "expires_at": 4_000_000_000_u64, "expires_in": null})),
    ];
    let others = [
        (
            Method::PUT,
            "/adapters/kept",
            json!({"name": "kept", "numbers": vec![0.25; 13], "dtype": "f32", "scheme": scheme, "metadata": {"a": 1}}),
        ),
        (
            Method::PATCH,
            "/admin/tenants/patched",
            json!({"limits": {"adapters": 10, "stored_bytes": 1_000_000, "concurrent_requests": 3, "requests_per_minute": null, "tokens_per_minute": -1,
                "running_jobs": 1, "queued_jobs": 2, "trained_tokens_per_day": 1000, "weight": 3}}),
        ),
    ];
    let posts = posts.into_iter().map(|(path, body)| (Method::POST, path.to_owned(), body));
    posts.chain(others.into_iter().map(|(method, path, body)| (method, path.to_owned(), body))).collect()
}

/// A value that nobody sends who means well.
fn hostile() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 53), Just(1 << 32)].prop_map(Value::from),
        prop_oneof![Just(0.0), Just(-1.0), Just(1e308), Just(-1e308), Just(5e-324), Just(0.5)]
            .prop_map(|x: f64| json!(x)),
        "\\PC{0,20}".prop_map(Value::from),
        prop_oneof![
            Just("\0"),
            Just("\r\nset-cookie: a"),
            Just("../../etc/passwd"),
            Just("{{item.x}}"),
            Just("(a+)+$")
        ]
        .prop_map(Value::from),
        Just(json!("x".repeat(70_000))),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[[[[[[[1]]]]]]]])),
        Just(json!({"a": {"a": {"a": 1}}})),
        Just(json!(vec![0; 5000])),
    ]
}

/// The places of all values in a document.
fn places(value: &Value, at: String, found: &mut Vec<String>) {
    found.push(at.clone());
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            let key = key.replace('~', "~0").replace('/', "~1");
            places(value, format!("{at}/{key}"), found);
        }),
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(i, value)| places(value, format!("{at}/{i}"), found))
        }
        _ => {}
    }
}

/// No failure of the server; a refusal is in the envelope.
fn check(answer: &Answer, sent: &str, failed_before: u64) {
    let status = answer.status.as_u16();
    // The scripted model fails at the end of its script, which long completions reach.
    if status == 500 && SERVER.app.state.service.engine.stats().failed.get() > failed_before {
        return;
    }
    let shown: String = sent.chars().take(2000).collect();
    assert!(status < 500, "{status} {} after {shown}", answer.text);
    if status >= 400 {
        answer.error();
    }
}

fn send(request: Request<Body>, sent: &str) {
    let failed = SERVER.app.state.service.engine.stats().failed.get();
    let answer = SERVER.runtime.block_on(SERVER.app.send(request));
    check(&answer, sent, failed);
}

fn form(parts: &[(&str, Option<&str>, &[u8])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (name, file, content) in parts {
        let file = file.map(|file| format!("; filename=\"{file}\"")).unwrap_or_default();
        body.extend(format!("--cut\r\ncontent-disposition: form-data; name=\"{name}\"{file}\r\n\r\n").into_bytes());
        body.extend_from_slice(content);
        body.extend(b"\r\n");
    }
    body.extend(b"--cut--\r\n");
    body
}

/// Under the key that may: who may do what is asked elsewhere.
fn json_request(method: Method, path: &str, body: impl Into<Body>) -> Request<Body> {
    let mut request = post(path, body);
    *request.method_mut() = method;
    if path.starts_with("/admin") {
        request.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {ADMIN}").parse().unwrap());
    }
    request
}

fn form_request(path: &str, kind: &str, body: Vec<u8>) -> Request<Body> {
    Request::post(path)
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, kind)
        .body(Body::from(body))
        .unwrap()
}

fn send_as(path: &str, kind: &str, body: Vec<u8>) {
    let sent = String::from_utf8_lossy(&body).into_owned();
    send(form_request(path, kind, body), &sent);
}

fn spoil(mut bytes: Vec<u8>, edits: &[(prop::sample::Index, u8)], keep: Option<prop::sample::Index>) -> Vec<u8> {
    for (at, byte) in edits {
        let at = at.index(bytes.len());
        bytes[at] = *byte;
    }
    if let Some(keep) = keep {
        bytes.truncate(keep.index(bytes.len()));
    }
    bytes
}

/// What a job can learn from, whose grader looks at the answers.
const SUMS: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"2+2\"}], \"answer\": \"4\"}\n{\"messages\": [{\"role\": \"user\", \"content\": \"1+2\"}], \"answer\": \"3\"}\n";
const LINES: &str = "{\"messages\": [{\"role\": \"user\", \"content\": \"2+2\"}], \"answer\": \"4\"}\n{\"prompt\": \"é\", \"completion\": \" x\", \"n\": 1.5}\n";

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn fuzz_values_of_json_bodies(which: prop::sample::Index, changes in prop::collection::vec((any::<prop::sample::Index>(), hostile()), 1..4)) {
        let mut bodies = bodies(&SERVER);
        let (method, path, mut body) = bodies.swap_remove(which.index(bodies.len()));
        for (at, value) in changes {
            let mut found = Vec::new();
            places(&body, String::new(), &mut found);
            let place = &found[at.index(found.len())];
            if let Some(old) = body.pointer_mut(place) {
                *old = value;
            }
        }
        let text = body.to_string();
        send(json_request(method, &path, text.clone()), &text);
    }

    #[test]
    fn fuzz_bytes_of_json_bodies(which: prop::sample::Index, edits: Vec<(prop::sample::Index, u8)>, keep: Option<prop::sample::Index>) {
        let mut bodies = bodies(&SERVER);
        let (method, path, body) = bodies.swap_remove(which.index(bodies.len()));
        let bytes = spoil(body.to_string().into_bytes(), &edits[..edits.len().min(6)], keep.filter(|_| edits.len() > 3));
        let sent = String::from_utf8_lossy(&bytes).into_owned();
        send(json_request(method, &path, bytes), &sent);
    }

    #[test]
    fn fuzz_raw_adapters(bytes in prop::collection::vec(any::<u8>(), 0..80), exact: bool, query in "[a-z0-9&=%._+-]{0,30}") {
        let mut bytes = bytes;
        if exact {
            bytes.resize(26, 0x3f);
        }
        send_as(&format!("/adapters?name=raw&on_conflict=new_generation&{query}"), "application/octet-stream", bytes);
    }

    #[test]
    fn fuzz_lines_of_a_batch(edits: Vec<(prop::sample::Index, u8)>, keep: Option<prop::sample::Index>) {
        let line = json!({"name": "line", "data": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "on_conflict": "new_generation"}).to_string();
        let bytes = spoil(format!("{line}\n{line}\n\n{line}").into_bytes(), &edits[..edits.len().min(8)], keep);
        send_as("/adapters/batch", "application/x-ndjson", bytes);
    }

    #[test]
    fn fuzz_files_and_their_forms(edits: Vec<(prop::sample::Index, u8)>, keep: Option<prop::sample::Index>, inside: bool) {
        let edits = &edits[..edits.len().min(6)];
        let keep = keep.filter(|_| edits.len() > 3);
        let lines = LINES.as_bytes().to_vec();
        let lines = if inside { spoil(lines, edits, keep) } else { lines };
        let body = form(&[("purpose", None, b"fine-tune"), ("file", Some("train.jsonl"), &lines)]);
        let body = if inside { body } else { spoil(body, edits, keep) };
        send_as("/v1/files", "multipart/form-data; boundary=cut", body.clone());
        send_as("/adapters", "multipart/form-data; boundary=cut", body);
    }
}

/// Or all that is done to them would meet the same refusal. (A server of its own: others take names and ends keys.)
#[test]
fn bodies_are_taken_before_they_are_spoilt() {
    let server = server();
    for (method, path, body) in bodies(&server) {
        let answer = server.runtime.block_on(server.app.send(json_request(method, &path, body.to_string())));
        assert!(answer.status.is_success(), "{path}: {} for {body}", answer.text);
    }
}

/// Every number that sizes something, at the edges of its type.
#[test]
fn no_number_overflows() {
    let numbers = [
        json!(u64::MAX),
        json!(i64::MAX),
        json!(i64::MIN),
        json!(1u64 << 32),
        json!(u32::MAX),
        json!(1e308),
        json!(-1),
        json!(0),
    ];
    for number in &numbers {
        for field in ["n", "best_of", "max_tokens", "min_tokens", "top_k", "logprobs", "seed", "temperature", "top_p"] {
            let mut body = json!({"model": MODEL, "prompt": [5], "max_tokens": 1});
            body[field] = number.clone();
            send(post("/v1/completions", body.to_string()), &body.to_string());
        }
        let body = json!({"model": MODEL, "prompt": [number], "max_tokens": 1}).to_string();
        send(post("/v1/completions", body.clone()), &body);
        for place in ["/rank", "/u", "/ties/count", "/ties/n_tie", "/ties/weight_tying", "/seed"] {
            for kind in ["groups", "tiled", "structured", "peft"] {
                let mut scheme = json!({"convention": "peft", "rank": 2, "u": 1, "ties": {"kind": kind}, "seed": 42, "targets": ["q"]});
                let ties = match kind {
                    "groups" => ("count", json!(1)),
                    "peft" => ("weight_tying", json!(0.5)),
                    _ => ("n_tie", json!(1)),
                };
                scheme["ties"][ties.0] = ties.1;
                match scheme.pointer_mut(place) {
                    Some(value) => *value = number.clone(),
                    None => continue,
                }
                let body = json!({"name": "x", "numbers": [0.5], "scheme": scheme, "on_conflict": "new_generation"})
                    .to_string();
                send(post("/adapters", body.clone()), &body);
            }
        }
    }
}

/// Nothing that a client names comes back as a header of its own, and no path out of an archive or a name is used.
#[tokio::test]
async fn names_make_no_headers_and_no_paths() {
    let app = TestApp::new().await;
    for name in ["a%0d%0aset-cookie:%20x=1", "..%2f..%2fetc%2fpasswd", "%00", "a%2fb", "%e2%80%ae"] {
        let request = Request::post(format!("/adapters?name={name}"))
            .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Body::from(vec![0; 26]))
            .unwrap();
        let answer = app.send(request).await;
        assert_eq!(answer.error().0, 400, "{name}");
        assert!(answer.headers.get("set-cookie").is_none());
    }
    let file = form(&[("purpose", None, b"fine-tune"), ("file", Some("..\\..\\x\";y=1.jsonl"), LINES.as_bytes())]);
    let request = Request::post("/v1/files")
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, "multipart/form-data; boundary=cut")
        .body(Body::from(file))
        .unwrap();
    let answer = app.send(request).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let id = answer.json()["id"].as_str().unwrap().to_owned();
    let content = app.get(&format!("/v1/files/{id}/content")).await;
    assert_eq!(content.status, 200);
    let listed = std::fs::read_dir(app.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    let others: Vec<_> = listed.filter(|name| !name.to_string_lossy().starts_with("mote.db")).collect();
    assert!(others.is_empty(), "{others:?}");
}
