//! Spans of a real server on their way to a collector, and collectors that are none.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing};
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest,
    common::v1::{KeyValue, any_value::Value as Any},
    trace::v1::Span,
};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};

use crate::support::{ADMIN_KEY, TestApp};

/// What a collector was sent.
#[derive(Debug, Default)]
struct Collected {
    headers: Vec<HeaderMap>,
    requests: Vec<ExportTraceServiceRequest>,
}

type Shared = Arc<Mutex<Collected>>;

async fn take(State(collected): State<Shared>, headers: HeaderMap, body: Bytes) {
    let request = ExportTraceServiceRequest::decode(body).expect("protobuf");
    let mut collected = collected.lock().unwrap();
    collected.headers.push(headers);
    collected.requests.push(request);
}

/// A collector on a port of its own, and its URL.
async fn collector() -> (Shared, String) {
    let collected = Shared::default();
    let router = Router::new().route("/v1/traces", routing::post(take)).with_state(collected.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (collected, url)
}

fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Any> {
    attributes.iter().find(|attribute| attribute.key == key)?.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> String {
    match attribute(attributes, key) {
        Some(Any::StringValue(text)) => text.clone(),
        other => panic!("{key}: {other:?} among {attributes:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reaches_the_collector_in_the_trace_of_its_caller() {
    let (collected, url) = collector().await;
    let mut app = TestApp::tiny("llama")
        .args(["--otlp-endpoint", &url, "--log", "mote=debug", "--log-format", "json", "--log-prompts"])
        .envs([("OTEL_EXPORTER_OTLP_HEADERS", "x-collector-key=opensesame")])
        .start()
        .await;
    let body = json!({"model": "tiny", "prompt": "xyzzy sesame", "max_tokens": 2, "temperature": 0});
    let request = app.request(reqwest::Method::POST, "/v1/completions").json(&body);
    let request = request.header("traceparent", format!("00-{TRACE}-{PARENT}-01"));
    let request = request.header("tracestate", "vendor=client-words").header("x-request-id", "traced-1");
    assert_eq!(request.send().await.unwrap().status(), 200);
    app.ok("/v1/completions", &json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 1})).await;
    // What is left is sent before the end.
    app.signal("TERM");
    assert_eq!(app.exit_code().await, Some(0), "{}", app.log());

    let collected = collected.lock().unwrap();
    let resources: Vec<_> = collected.requests.iter().flat_map(|request| &request.resource_spans).collect();
    for spans in &resources {
        assert_eq!(text(&spans.resource.as_ref().unwrap().attributes, "service.name"), "mote");
    }
    let scopes = resources.iter().flat_map(|spans| &spans.scope_spans);
    let spans: Vec<&Span> = scopes.flat_map(|scope| &scope.spans).collect();
    let mine: Vec<&&Span> = spans.iter().filter(|span| hex(&span.trace_id) == TRACE).collect();
    let [request, sequence] = ["POST /v1/completions", "sequence"].map(|name| {
        let mut found = mine.iter().filter(|span| span.name == name);
        let span = found.next().unwrap_or_else(|| panic!("no {name} among {mine:?}"));
        assert!(found.next().is_none());
        span
    });
    assert_eq!(hex(&request.parent_span_id), PARENT);
    assert_eq!(sequence.parent_span_id, request.span_id);
    assert_eq!(request.kind, 2, "a server's");
    assert_eq!(request.trace_state, "");
    assert_eq!(text(&request.attributes, "request_id"), "traced-1");
    assert_eq!(text(&request.attributes, "http.route"), "/v1/completions");
    assert_eq!(text(&request.attributes, "http.request.method"), "POST");
    assert_eq!(attribute(&request.attributes, "http.response.status_code"), Some(&Any::IntValue(200)));
    assert_eq!(attribute(&sequence.attributes, "completion_tokens"), Some(&Any::IntValue(2)));
    assert_eq!(text(&sequence.attributes, "finish"), "length");
    assert!(request.start_time_unix_nano <= sequence.start_time_unix_nano);
    assert!(sequence.start_time_unix_nano < sequence.end_time_unix_nano);
    // Who names no trace begins one.
    let others = spans.iter().filter(|span| span.name == "POST /v1/completions" && hex(&span.trace_id) != TRACE);
    assert_eq!(others.filter(|span| span.parent_span_id.is_empty()).count(), 1);

    // Events stay here, and with them the prompts that were to be logged.
    let sent = format!("{:?}", collected.requests);
    assert!(!sent.contains("sesame") && !sent.contains(ADMIN_KEY) && !sent.contains("client-words"), "{sent}");
    assert!(collected.headers.iter().all(|headers| headers["x-collector-key"] == "opensesame"));
    let log = app.log();
    assert!(log.contains("xyzzy sesame") && !log.contains("opensesame"), "{log}");
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let of_request = |words: &str| {
        let found =
            lines.iter().find(|line| line["fields"]["message"] == words && line["span"]["request_id"] == "traced-1");
        found.unwrap_or_else(|| panic!("no {words:?} of the request in\n{log}")).clone()
    };
    of_request("prompt");
    assert_eq!(of_request("answered")["span"]["status"], 200);
}

/// The log, once it has these words: what a server says last is read a moment after its end.
async fn until_logged(app: &TestApp, words: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let log = app.log();
        if log.contains(words) {
            return log;
        }
        assert!(Instant::now() < deadline, "no {words:?} in\n{log}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Nobody is there, or somebody who takes everything and says nothing: requests are answered, the server ends, and the log says it once.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_does_not_answer_delays_nobody() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let [silent_at, nobody_at] = [&silent, &nobody].map(|listener| listener.local_addr().unwrap());
    drop(nobody);
    for address in [silent_at, nobody_at] {
        let url = format!("http://{address}");
        // Batches at once, of which a few are more than there is room for.
        let small = [
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "8"),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "4"),
        ];
        let mut app = TestApp::tiny("llama").args(["--otlp-endpoint", &url]).envs(small).start().await;
        let ask =
            async || app.ok("/v1/completions", &json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 1})).await;
        ask().await;
        let held: Option<TcpStream> = match address == silent_at {
            true => Some(silent.accept().await.unwrap().0),
            false => None,
        };
        for _ in 0..50 {
            ask().await;
        }
        app.signal("TERM");
        assert_eq!(app.exit_code().await, Some(0), "{}", app.log());
        // With somebody who says nothing it ended under an export that waited.
        let words = if held.is_some() { "the last spans were not sent" } else { "spans do not reach the collector" };
        let log = until_logged(&app, words).await;
        assert_eq!(log.matches(words).count(), 1, "{log}");
    }
}
