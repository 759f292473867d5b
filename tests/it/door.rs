//! The listener and what it takes of strangers: slow ones, silent ones, too many, and web pages.
#![allow(clippy::await_holding_lock, reason = "the engine's thread waits for the lock, the runtime does not")]

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::SeqCst},
    time::{Duration, Instant},
};

use axum::{
    body::Body,
    http::{Request, header},
};
use mote::{
    http::{
        Edge,
        server::{ServerConfig, serve, tls_config},
    },
    service::RequestPolicy,
    telemetry::{RefusalLabels, TimeoutLabels},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::{
    app::{KEY, MODEL, Options, TestApp, post},
    support,
};

/// Clocks that a test waits for; the others are long.
const SHORT: Duration = Duration::from_millis(150);
const LONG: Duration = Duration::from_secs(60);

fn patient() -> ServerConfig {
    ServerConfig { header_timeout: LONG, idle_timeout: LONG, write_timeout: LONG, ..ServerConfig::default() }
}

/// The app behind a socket, as long as the test runs.
async fn listen(app: &TestApp, config: ServerConfig) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let metrics = app.state.service.metrics.connections.clone();
    tokio::spawn(serve(listener, app.router.clone(), config, metrics, std::future::pending()));
    address
}

fn timeouts(app: &TestApp, what: &'static str) -> u64 {
    app.state.service.metrics.connections.timeouts.get_or_create(&TimeoutLabels { what }).get()
}

fn refused(app: &TestApp, cap: &'static str) -> u64 {
    app.state.service.metrics.connections.refused.get_or_create(&RefusalLabels { cap }).get()
}

/// Everything until the server closes. A reset counts as the end.
async fn until_closed(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    let read = stream.read_to_end(&mut all);
    let _ = tokio::time::timeout(LONG, read).await.expect("the server closes the connection");
    String::from_utf8_lossy(&all).into_owned()
}

/// One answer with a content-length, whose connection stays open.
async fn answer(stream: &mut (impl AsyncRead + Unpin)) -> String {
    let mut all = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&all);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if body.len() >= length {
                return text.into_owned();
            }
        }
        let mut piece = [0; 1024];
        let read = stream.read(&mut piece).await.unwrap();
        assert!(read > 0, "closed after {:?}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&piece[..read]);
    }
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), text: &str) {
    stream.write_all(text.as_bytes()).await.unwrap();
    stream.flush().await.unwrap();
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_and_a_silent_connection_are_closed() {
    let app = TestApp::new().await;
    let address = listen(&app, ServerConfig { header_timeout: SHORT, ..patient() }).await;
    for beginning in ["", "GET /healthz HTTP/1.1\r\nhost: te"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        say(&mut stream, beginning).await;
        assert_eq!(until_closed(&mut stream).await, "", "after {beginning:?}");
    }
    assert_eq!(timeouts(&app, "header"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_closed_after_its_answers() {
    let app = TestApp::new().await;
    let address = listen(&app, ServerConfig { idle_timeout: SHORT, ..patient() }).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    for _ in 0..3 {
        say(&mut stream, HEALTH).await;
        assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200"));
    }
    assert_eq!(until_closed(&mut stream).await, "");
    assert_eq!(timeouts(&app, "idle"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_in_single_bytes_is_a_408_and_the_end() {
    let edge = Edge { body_timeout: SHORT, ..Edge::default() };
    let app = TestApp::with(Options { edge, ..Options::default() }).await;
    let address = listen(&app, patient()).await;
    for path in ["/v1/completions", "/adapters"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"
        );
        say(&mut stream, &head).await;
        let (mut reading, mut writing) = stream.split();
        let trickle = async {
            while writing.write_all(b" ").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let text = tokio::select! { text = until_closed(&mut reading) => text, () = trickle => panic!("not closed") };
        assert!(text.starts_with("HTTP/1.1 408") && text.contains("request_timeout"), "{text}");
        assert!(text.contains("connection: close"), "{text}");
    }
    assert_eq!(timeouts(&app, "body"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_told_so_at_once() {
    let app = TestApp::new().await;
    let address = listen(&app, ServerConfig { max_connections: 2, ..patient() }).await;
    let mut first = TcpStream::connect(address).await.unwrap();
    let mut second = TcpStream::connect(address).await.unwrap();
    for stream in [&mut first, &mut second] {
        say(stream, HEALTH).await;
        assert!(answer(stream).await.starts_with("HTTP/1.1 200"));
    }
    let mut third = TcpStream::connect(address).await.unwrap();
    say(&mut third, HEALTH).await;
    let text = until_closed(&mut third).await;
    assert!(text.starts_with("HTTP/1.1 503") && text.contains("retry-after: 1"), "{text}");
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    for header in ["x-request-id: req-", "openai-processing-ms: 0", "x-content-type-options: nosniff"] {
        assert!(head.contains(header), "{header} is on every answer: {head}");
    }
    let error: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&error["error"]["code"], &error["error"]["type"]), (&json!("overloaded"), &json!("api_error")));
    assert_eq!(refused(&app, "all"), 1);
    drop(first);
    let open = app.state.service.metrics.connections.open.clone();
    eventually("the place", || open.get() == 1).await;
    let mut fourth = TcpStream::connect(address).await.unwrap();
    say(&mut fourth, HEALTH).await;
    assert!(answer(&mut fourth).await.starts_with("HTTP/1.1 200"));
}

/// One address takes all that it may have and more; another one connects as if nothing were.
#[cfg(target_os = "linux")] // where all of 127.0.0.0/8 is this machine
#[tokio::test(flavor = "multi_thread")]
async fn an_address_at_its_cap_does_not_keep_another_out() {
    let app = TestApp::new().await;
    let config = ServerConfig { max_connections: 4, max_connections_per_address: Some(2), ..patient() };
    let address = listen(&app, config).await;
    let from = async |host: &str| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(host.parse().unwrap(), 0)).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        say(&mut stream, HEALTH).await;
        stream
    };
    let mut held = [from("127.0.0.1").await, from("127.0.0.1").await];
    for stream in &mut held {
        assert!(answer(stream).await.starts_with("HTTP/1.1 200"));
    }
    for _ in 0..10 {
        let text = until_closed(&mut from("127.0.0.1").await).await;
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("retry-after: 1"), "{text}");
        let error: Value = serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert_eq!(error["error"]["code"], "overloaded");
        assert!(error["error"]["message"].as_str().unwrap().contains("Your address"), "{text}");
    }
    assert_eq!((refused(&app, "address"), refused(&app, "all")), (10, 0));
    let mut other = from("127.0.0.2").await;
    assert!(answer(&mut other).await.starts_with("HTTP/1.1 200"));
    drop(held);
    let open = app.state.service.metrics.connections.open.clone();
    eventually("the place", || open.get() == 1).await;
    assert!(answer(&mut from("127.0.0.1").await).await.starts_with("HTTP/1.1 200"));
}

/// A client that never reads its stream: its connection ends, its sequences are cancelled and their blocks are free, while others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_client_that_never_reads_loses_its_stream() {
    let app = TestApp::new().await;
    let address = listen(&app, ServerConfig { write_timeout: SHORT, ..patient() }).await;
    // So slow that the completions are far from done when the buffers are full and the time for writing is over, whatever else the machine does.
    app.watch.step_ms.store(10, SeqCst);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut deaf = socket.connect(address).await.unwrap();
    // As long as the script is: its end fails.
    let tokens = app.script.len() - 4;
    let body = json!({"model": MODEL, "prompt": [5], "n": 48, "max_tokens": tokens, "logprobs": 5, "ignore_eos": true, "temperature": 0, "stream": true}).to_string();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {KEY}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    say(&mut deaf, &head).await;
    let engine = app.state.service.engine.clone();
    eventually("the beginning", || engine.in_flight() > 0).await;
    eventually("the end", || engine.in_flight() == 0).await;
    let stats = engine.stats();
    eventually("free blocks", || stats.blocks_used.get() == 0 && stats.running.get() == 0).await;
    eventually("the cancellation", || stats.cancelled.get() > 0).await;
    assert!(stats.finished.get() < 48, "it was cut off, not finished");
    let connections = &app.state.service.metrics.connections;
    eventually("the connection's end", || connections.open.get() == 0).await;
    let other =
        app.ok("/v1/completions", json!({"model": MODEL, "prompt": [5], "max_tokens": 2, "temperature": 0})).await;
    assert_eq!(other["usage"]["completion_tokens"], 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_would_wait_too_long_is_refused_at_once() {
    let after = Duration::from_millis(200);
    let policy = RequestPolicy { shed_after: Some(after), ..RequestPolicy::default() };
    let app = TestApp::with(Options { policy, ..Options::default() }).await;
    let body = |n: usize| json!({"model": MODEL, "prompt": [5], "n": n, "max_tokens": 100, "ignore_eos": true, "temperature": 0});
    let hold = app.watch.hold.lock().unwrap();
    let engine = app.state.service.engine.clone();
    let flood = tokio::spawn(app.router.clone().call_all_of(post("/v1/completions", body(20).to_string())));
    // Held in their first step; what runs is counted when a step ends, so all of them still count as waiting.
    eventually("the flood", || engine.in_flight() == 20).await;
    let second = tokio::spawn(app.router.clone().call_all_of(post("/v1/completions", body(1).to_string())));
    eventually("the second", || engine.in_flight() == 21).await;
    tokio::time::sleep(after).await;
    let refused = app.post("/v1/completions", body(1)).await;
    assert_eq!(refused.error(), (503, "api_error".into(), None, Some("overloaded".into())));
    let seconds: u64 = refused.headers[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((1..=60).contains(&seconds));
    assert_eq!(engine.in_flight(), 21, "the engine did not hear of it");
    assert_eq!(app.state.service.metrics.shed.get(), 1);
    drop(hold);
    assert_eq!(flood.await.unwrap(), 200);
    assert_eq!(second.await.unwrap(), 200);
    assert_eq!(app.post("/v1/completions", body(1)).await.status, 200, "the queue is gone");
}

/// Sends a request on a task of its own.
trait CallAllOf {
    fn call_all_of(self, request: Request<Body>) -> impl Future<Output = u16> + Send + 'static;
}

impl CallAllOf for axum::Router {
    async fn call_all_of(self, request: Request<Body>) -> u16 {
        use tower::ServiceExt as _;
        let response = self.oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
        status
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_when_there_is_a_certificate() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls");
    let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let app = TestApp::new().await;
    let tls = Some(tls_config(&certificate, &key).unwrap());
    let address = listen(&app, ServerConfig { tls, header_timeout: SHORT * 10, ..patient() }).await;

    use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject as _};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&certificate).unwrap()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let stream = TcpStream::connect(address).await.unwrap();
    let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap();
    for _ in 0..2 {
        say(&mut stream, HEALTH).await;
        assert!(answer(&mut stream).await.starts_with("HTTP/1.1 200"));
    }
    let mut plain = TcpStream::connect(address).await.unwrap();
    say(&mut plain, HEALTH).await;
    assert!(!until_closed(&mut plain).await.contains("HTTP/1.1 200"), "no plain HTTP beside TLS");
    let mut silent = TcpStream::connect(address).await.unwrap();
    assert_eq!(until_closed(&mut silent).await, "", "a handshake has the time of a head");

    let wrong = tls_config(&certificate, &certificate).unwrap_err().to_string();
    assert!(wrong.contains("cert.pem"), "{wrong}");
    assert!(tls_config(&key, &key).unwrap_err().to_string().contains("no certificate"));
}

#[tokio::test]
async fn limits_of_choices_and_sequences_are_named() {
    let policy = RequestPolicy { choices: 2, sequences: 4, ..RequestPolicy::default() };
    let app = TestApp::with(Options { policy, ..Options::default() }).await;
    let error = async |extra: Value| {
        let mut body = json!({"model": MODEL, "prompt": [5], "max_tokens": 1});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = app.post("/v1/completions", body).await;
        if answer.status == 200 { None } else { answer.error().2 }
    };
    assert_eq!(error(json!({"n": 2})).await, None);
    assert_eq!(error(json!({"n": 3})).await.as_deref(), Some("n"));
    assert_eq!(error(json!({"best_of": 3})).await.as_deref(), Some("best_of"));
    assert_eq!(error(json!({"n": u64::MAX})).await.as_deref(), Some("n"));
    assert_eq!(error(json!({"prompt": [[5], [5], [5]], "n": 2})).await.as_deref(), Some("prompt"));
    assert_eq!(error(json!({"prompt": [[5], [5]], "n": 2})).await, None);
    let chat = json!({"model": MODEL, "messages": [{"role": "user", "content": "a"}], "n": 3});
    assert_eq!(app.post("/v1/chat/completions", chat).await.error().2.as_deref(), Some("n"));
}

fn preflight(origin: &str) -> Request<Body> {
    Request::options("/v1/completions")
        .header(header::ORIGIN, origin)
        .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
        .header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type")
        .body(Body::empty())
        .unwrap()
}

#[tokio::test]
async fn web_pages_may_call_only_from_origins_that_are_named() {
    let app = TestApp::new().await;
    let answer = app.send(preflight("https://app.example.org")).await;
    assert_eq!(answer.status, 405);
    assert!(answer.headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).is_none());
    let edge = Edge { cors_origins: vec!["https://app.example.org".parse().unwrap()], ..Edge::default() };
    let app = TestApp::with(Options { edge, ..Options::default() }).await;
    let answer = app.send(preflight("https://app.example.org")).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example.org");
    assert!(answer.headers.get(header::ACCESS_CONTROL_ALLOW_CREDENTIALS).is_none());
    let methods = answer.headers[header::ACCESS_CONTROL_ALLOW_METHODS].to_str().unwrap();
    for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
        assert!(methods.split(',').any(|allowed| allowed == method), "{methods}");
    }
    let read = Request::get("/healthz").header(header::ORIGIN, "https://app.example.org").body(Body::empty()).unwrap();
    let answer = app.send(read).await;
    let exposed = answer.headers[header::ACCESS_CONTROL_EXPOSE_HEADERS].to_str().unwrap();
    for limit in ["requests", "tokens"] {
        for part in ["limit", "remaining", "reset"] {
            assert!(exposed.contains(&format!("x-ratelimit-{part}-{limit}")), "{exposed}");
        }
    }
    for origin in ["https://evil.example.org", "null", "http://app.example.org"] {
        let answer = app.send(preflight(origin)).await;
        assert!(answer.headers.get(header::ACCESS_CONTROL_ALLOW_ORIGIN).is_none(), "{origin}");
    }
}

#[tokio::test]
async fn every_answer_keeps_browsers_from_guessing() {
    let app = TestApp::new().await;
    for path in ["/healthz", "/nothing", "/v1/models", "/openapi.json", "/docs/", "/docs/swagger-ui.css"] {
        let answer = app.send(Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(answer.headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff", "{path}");
        let policy = answer.headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{path}: {policy}");
        assert_eq!(policy.contains("script-src 'self'"), path.starts_with("/docs"), "{path}");
    }
}

/// The page runs under its own policy: no script in the page itself, nothing from elsewhere.
#[tokio::test]
async fn the_documents_page_needs_no_inline_script() {
    let app = TestApp::new().await;
    let page = app.send(Request::get("/docs/").body(Body::empty()).unwrap()).await.text;
    for (at, _) in page.match_indices("<script") {
        let tag = &page[at..at + page[at..].find("</script>").unwrap()];
        assert!(tag.contains("src=") && tag.trim_end().ends_with('>'), "{tag}");
    }
    assert!(!page.contains("onload=") && !page.contains("javascript:"));
}

/// Neither prompts nor keys are in the log, whatever its level, unless prompts are asked for.
#[tokio::test(flavor = "multi_thread")]
async fn prompts_and_keys_stay_out_of_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin-key");
    std::fs::write(&file, format!("{}\n", support::ADMIN_KEY)).unwrap();
    for asked in [false, true] {
        let file = file.to_string_lossy().into_owned();
        let mut args = vec!["--log", "trace", "--admin-key-file", &file];
        args.extend(asked.then_some("--log-prompts"));
        let app = support::TestApp::tiny("llama").without_admin_key().args(args).start().await;
        let body = json!({"model": "tiny", "prompt": "xyzzy sesame", "max_tokens": 2});
        app.ok("/v1/completions", &body).await;
        app.post("/v1/completions", &json!({"model": "tiny", "prompt": "xyzzy sesame", "n": 1000})).await;
        app.post("/v1/completions", &json!({"model": "xyzzy", "prompt": 7})).await;
        let log = app.log();
        assert_eq!(log.contains("xyzzy sesame"), asked, "{log}");
        assert!(!log.contains(support::ADMIN_KEY) && !log.contains("admin key (shown once)"), "{log}");
    }
}
