//! How a server ends: signals, drains, and an engine that dies.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use mote::{app::AppError, http::server::ServerConfig};
use reqwest::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use crate::{
    app,
    support::{ADMIN_KEY, TestApp, golden},
};

/// A request that runs until its body is sent to the end.
struct HalfSent {
    stream: TcpStream,
    rest: String,
}

impl HalfSent {
    async fn begin(app: &TestApp) -> Self {
        let body = json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 2}).to_string();
        let (first, rest) = body.split_at(10);
        let mut stream = TcpStream::connect(app.url.strip_prefix("http://").unwrap()).await.unwrap();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {ADMIN_KEY}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nexpect: 100-continue\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        // Says that the handler reads the body.
        let mut go_on = [0; 25];
        stream.read_exact(&mut go_on).await.unwrap();
        assert!(go_on.starts_with(b"HTTP/1.1 100"));
        stream.write_all(first.as_bytes()).await.unwrap();
        Self { stream, rest: rest.to_owned() }
    }

    async fn end(mut self) -> String {
        self.stream.write_all(self.rest.as_bytes()).await.unwrap();
        self.answer().await
    }

    async fn answer(&mut self) -> String {
        let mut text = Vec::new();
        let _ = self.stream.read_to_end(&mut text).await;
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// None when the connection was closed under the question: one that was idle when the signal came.
async fn readiness(app: &TestApp) -> Option<u16> {
    app.anonymous(Method::GET, "/readyz").send().await.ok().map(|answer| answer.status().as_u16())
}

async fn until_draining(app: &TestApp) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while readiness(app).await != Some(503) {
        assert!(Instant::now() < deadline, "{}", app.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_ends_at_once() {
    for signal in ["TERM", "INT"] {
        let mut app = TestApp::tiny("llama").start().await;
        app.signal(signal);
        assert_eq!(app.exit_code().await, Some(0), "{}", app.log());
    }
}

/// Readiness goes first, new work is refused, what runs is finished, and then the server ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_running_request_is_finished_and_seen_to_be() {
    let mut app = TestApp::tiny("llama").start().await;
    let running = HalfSent::begin(&app).await;
    app.signal("TERM");
    until_draining(&app).await;
    let (status, refused) = app.post("/v1/completions", &json!({"model": "tiny", "prompt": [5]})).await;
    assert_eq!((status, &refused["error"]["code"]), (503, &json!("draining")));
    assert_eq!(app.anonymous(Method::GET, "/healthz").send().await.unwrap().status(), 200);
    let answer = running.end().await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("text_completion"), "{answer}");
    assert_eq!(app.exit_code().await, Some(0), "{}", app.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_the_server_at_once() {
    let mut app = TestApp::tiny("llama").args(["--drain-seconds", "1000"]).start().await;
    let mut running = HalfSent::begin(&app).await;
    app.signal("TERM");
    until_draining(&app).await;
    app.signal("TERM");
    assert_eq!(app.exit_code().await, Some(130), "{}", app.log());
    assert_eq!(running.answer().await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_does_not_end_is_cut_off_at_the_deadline() {
    let mut app = TestApp::tiny("llama").args(["--drain-seconds", "1", "--body-timeout-s", "1000"]).start().await;
    let mut running = HalfSent::begin(&app).await;
    app.signal("TERM");
    assert_eq!(app.exit_code().await, Some(0), "{}", app.log());
    assert_eq!(running.answer().await, "");
    assert!(app.log().contains("the drain deadline is over"), "{}", app.log());
}

/// The weights are a pipe that nobody writes to: the model loads for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_still_loads_ends_at_once() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "tokenizer.json"] {
        fs::copy(golden("llama").join("model").join(file), folder.path().join(file)).unwrap();
    }
    let made = Command::new("mkfifo").arg(folder.path().join("model.safetensors")).status().unwrap();
    assert!(made.success());
    let data = folder.path().join("data");
    let mut child = Command::new(env!("CARGO_BIN_EXE_mote"))
        .args(["serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--dtype", "f32", "--no-auth", "--model"])
        .arg(folder.path())
        .arg("--data-dir")
        .arg(&data)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    // The database is opened before the model.
    while !data.join("mote.db-wal").exists() {
        assert!(child.try_wait().unwrap().is_none() && Instant::now() < deadline, "it does not load");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(child.try_wait().unwrap().is_none(), "it waits for the model");
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("it did not end");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(status.code(), Some(0));
}

/// An engine that fails step after step gives up: the server is not ready any more and ends with an error, for its supervisor to start it anew.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_engine_ends_the_server_with_an_error() {
    let app = app::TestApp::new().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let state = app.state.clone();
    let ended = tokio::spawn(async move {
        let config = ServerConfig::default();
        mote::app::until_stopped(listener, state, config, std::future::pending(), Duration::from_secs(60)).await
    });
    let prompt = vec![crate::script::FAILS; 2];
    for _ in 0..16 {
        let body = json!({"model": app::MODEL, "prompt": prompt, "max_tokens": 1});
        let status = app.post("/v1/completions", body).await.status.as_u16();
        assert!(status == 500 || status == 503, "{status}");
    }
    let outcome = tokio::time::timeout(Duration::from_secs(60), ended).await.expect("it ends").unwrap();
    assert!(matches!(outcome, Err(AppError::EngineDead)), "{outcome:?}");
    let ready = axum::http::Request::get("/readyz").body(axum::body::Body::empty()).unwrap();
    assert_eq!(app.send(ready).await.status, 503);
}
