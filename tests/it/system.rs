//! Health, metrics, documents, and the headers of every answer.

use axum::{
    body::Body,
    http::{Request, header},
};
use serde_json::{Value, json};

use crate::app::{MODEL, TestApp, post};

async fn get(app: &TestApp, path: &str) -> crate::app::Answer {
    app.send(Request::get(path).body(Body::empty()).unwrap()).await
}

#[tokio::test]
async fn health_needs_no_key_and_readiness_ends_with_draining() {
    let app = TestApp::new().await;
    for path in ["/healthz", "/readyz"] {
        let answer = get(&app, path).await;
        assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({"status": "ok"})));
    }
    app.state.lifecycle.drain();
    let answer = get(&app, "/readyz").await;
    assert_eq!((answer.status.as_u16(), answer.json()), (503, json!({"status": "draining"})));
    assert_eq!(get(&app, "/healthz").await.status, 200);
}

#[tokio::test]
async fn a_dead_engine_is_not_ready() {
    let app = TestApp::new().await;
    let engine = app.state.service.engine.clone();
    tokio::task::spawn_blocking(move || engine.shutdown(std::time::Duration::ZERO)).await.unwrap();
    assert_eq!(get(&app, "/readyz").await.status, 503);
}

#[tokio::test]
async fn every_answer_has_an_id_and_a_time() {
    let app = TestApp::new().await;
    for (path, status) in [("/healthz", 200), ("/nothing", 404), ("/v1/completions", 405), ("/v1/models", 401)] {
        let answer = get(&app, path).await;
        assert_eq!(answer.status, status, "{path}");
        assert!(answer.headers["x-request-id"].to_str().unwrap().starts_with("req-"));
        assert!(answer.headers["openai-processing-ms"].to_str().unwrap().parse::<u64>().is_ok());
    }
    let id = |id: &str| Request::get("/healthz").header("x-request-id", id).body(Body::empty()).unwrap();
    assert_eq!(app.send(id("my-Request_1.2")).await.headers["x-request-id"], "my-Request_1.2");
    for odd in ["a b", "<script>", &"x".repeat(129)] {
        assert_ne!(app.send(id(odd)).await.headers["x-request-id"], odd);
    }
}

/// The value of a series, by its name with labels.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

#[tokio::test]
async fn metrics_count_requests_tokens_and_steps() {
    let app = TestApp::new().await;
    let body = json!({"model": MODEL, "prompt": vec![5; 40], "max_tokens": 3, "temperature": 0});
    for _ in 0..2 {
        app.ok("/v1/completions", body.clone()).await;
    }
    app.send(post("/v1/completions", "{")).await;
    get(&app, "/some/secret/path").await;
    let answer = app.get("/metrics").await;
    assert!(answer.headers[header::CONTENT_TYPE].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = &app.metrics();
    let route = |route: &str, method: &str, status: u16| {
        value(text, &format!("mote_http_requests_total{{method=\"{method}\",route=\"{route}\",status=\"{status}\"}}"))
    };
    assert_eq!(route("/v1/completions", "POST", 200), Some(2.0));
    assert_eq!(route("/v1/completions", "POST", 400), Some(1.0));
    assert_eq!(route("unmatched", "GET", 404), Some(1.0));
    assert!(!text.contains("secret"), "a path is no label");
    assert_eq!(value(text, "mote_tokens_total{kind=\"prompt\"}"), Some(80.0));
    assert_eq!(value(text, "mote_tokens_total{kind=\"completion\"}"), Some(6.0));
    assert_eq!(value(text, "mote_cached_prompt_tokens_total"), Some(32.0));
    assert_eq!(value(text, "mote_engine_steps_total"), Some(6.0));
    assert_eq!(value(text, "mote_engine_step_sequences_count"), Some(6.0));
    assert_eq!(value(text, "mote_engine_step_sequences_bucket{le=\"1.0\"}"), Some(6.0));
    assert_eq!(value(text, "mote_engine_step_adapters_bucket{le=\"0.0\"}"), Some(6.0));
    assert_eq!(value(text, "mote_engine_between_tokens_seconds_count"), Some(4.0));
    assert_eq!(value(text, "mote_engine_first_place_steps_bucket{le=\"1.0\"}"), Some(2.0));
    assert_eq!(value(text, "mote_engine_cached_share_bucket{le=\"0.0\"}"), Some(1.0), "the first prompt is new");
    assert_eq!(value(text, "mote_engine_cached_share_sum"), Some(32.0 / 40.0));
    assert_eq!(value(text, "mote_engine_step_kv_share_count"), Some(6.0));
    assert_eq!(value(text, "mote_engine_running"), Some(0.0));
    assert_eq!(value(text, "mote_adapters_resident"), Some(0.0));
    assert_eq!(value(text, "mote_engine_preemptions_total"), Some(0.0));
    let blocks = |state: &str| value(text, &format!("mote_engine_kv_blocks{{state=\"{state}\"}}")).unwrap();
    assert_eq!(blocks("free") + blocks("cached") + blocks("used"), 128.0);
    assert!(text.ends_with("# EOF\n"));
}

/// Is it a series of a metric that the text describes? Metrics without a value yet are described too.
fn is_printed(text: &str, series: &str) -> bool {
    let described = |name: &str, kind: &str| text.lines().any(|line| line == format!("# TYPE {name} {kind}"));
    let parts = [("_total", "counter"), ("_bucket", "histogram"), ("_sum", "histogram"), ("_count", "histogram")];
    described(series, "gauge")
        || parts.iter().any(|(end, kind)| series.strip_suffix(end).is_some_and(|name| described(name, kind)))
}

#[tokio::test]
async fn the_dashboard_asks_only_for_what_is_there() {
    let app = TestApp::new().await;
    // A family is described once it has a series.
    app.get("/healthz").await;
    let text = app.metrics();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/grafana.json");
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids: Vec<u64> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), panels.len());
    let mut asked = 0;
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().into_iter().flatten()) {
        let expression = target["expr"].as_str().unwrap();
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let ours = |word: &&str| word.starts_with("mote_") || word.starts_with("process_");
        let series: Vec<&str> = words.filter(ours).collect();
        assert!(!series.is_empty(), "{expression}");
        for series in series {
            // Of the process there is what /proc has.
            let is_known = series.starts_with("mote_") || cfg!(target_os = "linux");
            assert!(!is_known || is_printed(&text, series), "{series} of {expression}");
            asked += 1;
        }
    }
    assert!(asked > 40, "{asked}");
    assert!(!is_printed(&text, "mote_engine_running_total") && !is_printed(&text, "mote_engine_steps"));
}

/// The process under the names that every dashboard knows, with numbers that can be.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn the_process_is_shown_as_prometheus_names_it() {
    let app = TestApp::new().await;
    let text = app.metrics();
    let number = |name: &str| value(&text, name).unwrap_or_else(|| panic!("{name} in\n{text}"));
    assert!(number("process_resident_memory_bytes") > 4e6);
    assert!(number("process_open_fds") >= 3.0 && number("process_threads") >= 2.0);
    let began = number("process_start_time_seconds");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    // The system's own time of its start is whole seconds.
    assert!(began < now + 2.0 && now - began < 86_400.0, "{began} of {now}");
    assert!(number("process_cpu_seconds_total") > 0.0);
    assert!(text.contains("# TYPE process_cpu_seconds counter"), "{text}");
}

#[tokio::test]
async fn the_document_describes_every_route_and_its_ranges() {
    let app = TestApp::new().await;
    let served = get(&app, "/openapi.json").await.json();
    let built: Value = serde_json::from_str(&mote::http::openapi().to_json().unwrap()).unwrap();
    assert_eq!(served, built, "the document needs no server");
    for path in ["/v1/completions", "/v1/chat/completions", "/healthz", "/readyz", "/metrics"] {
        let operations = served["paths"][path].as_object().unwrap_or_else(|| panic!("{path} is missing"));
        for operation in operations.values() {
            assert!(operation["summary"].is_string() && operation["operationId"].is_string());
        }
    }
    let post = &served["paths"]["/v1/completions"]["post"];
    for status in ["200", "400", "401", "404", "413", "415", "422", "429", "500", "503"] {
        assert!(post["responses"][status]["content"].is_object(), "{status}");
    }
    let body = &served["components"]["schemas"]["CompletionBody"];
    assert_eq!(body["required"], json!(["model", "prompt"]));
    let temperature = &body["properties"]["temperature"];
    assert_eq!((&temperature["minimum"], &temperature["maximum"]), (&json!(0), &json!(2)));
    for (name, schema) in served["components"]["schemas"].as_object().unwrap() {
        for (field, property) in schema["properties"].as_object().into_iter().flatten() {
            assert!(
                property.to_string().contains("description") || property.to_string().contains("$ref"),
                "{name}.{field}"
            );
        }
    }
}

#[tokio::test]
async fn the_documents_page_needs_no_network() {
    let app = TestApp::new().await;
    let page = get(&app, "/docs/").await;
    assert_eq!(page.status, 200);
    assert!(!page.text.contains("https://"), "{}", page.text);
    for asset in ["swagger-ui-bundle.js", "swagger-ui.css", "swagger-initializer.js"] {
        assert_eq!(get(&app, &format!("/docs/{asset}")).await.status, 200, "{asset}");
    }
    assert!(get(&app, "/docs").await.status.is_redirection());
    let (status, kind, ..) = get(&app, "/docs/nothing.js").await.error();
    assert_eq!((status, &*kind), (404, "invalid_request_error"));
}
