//! 100,000 adapters, a kill -9 in the middle of the uploads, and everything that was acknowledged is still there.

use std::{collections::HashSet, time::Instant};

use futures::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::TestApp;

const TOTAL: usize = 100_000;
const KILL_AFTER: usize = 60_000;

fn number(i: usize) -> f64 {
    (i % 251) as f64 / 256.0
}

fn line(i: usize) -> String {
    format!("{}\n", json!({"name": format!("user-{i:06}"), "numbers": vec![number(i); 13], "dtype": "bf16"}))
}

/// Sends the adapters of a range in one batch request and returns the names acknowledged before the answer ended or broke off.
async fn send(
    app: &TestApp,
    range: std::ops::Range<usize>,
    mut stop_after: Option<usize>,
    kill: impl FnOnce(),
) -> Vec<String> {
    let body: String = range.map(line).collect();
    let answer = app
        .request(Method::POST, "/adapters/batch")
        .header("content-type", "application/x-ndjson")
        .body(body)
        .send()
        .await;
    let Ok(answer) = answer else { return Vec::new() };
    assert_eq!(answer.status(), 200);
    let (mut acknowledged, mut rest, mut kill) = (Vec::new(), String::new(), Some(kill));
    let mut chunks = answer.bytes_stream();
    while let Some(Ok(chunk)) = chunks.next().await {
        rest.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
        while let Some(end) = rest.find('\n') {
            let answer: Value = serde_json::from_str(&rest[..end]).expect("JSON");
            rest.drain(..=end);
            assert!(answer.get("error").is_none(), "{answer}");
            acknowledged.push(answer["name"].as_str().expect("a name").to_owned());
        }
        if stop_after.is_some_and(|limit| acknowledged.len() >= limit) {
            stop_after = None;
            if let Some(kill) = kill.take() {
                kill();
            }
        }
    }
    acknowledged
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_thousand_adapters_survive_a_kill() {
    let data = tempfile::tempdir().expect("a folder");
    let mut app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    let empty = app.resident_mb();
    let pid = app.pid().to_string();
    let began = Instant::now();
    // What the client saw acknowledged is the log that decides.
    let mut acknowledged = send(&app, 0..KILL_AFTER / 2, None, || {}).await;
    assert_eq!(acknowledged.len(), KILL_AFTER / 2);
    let second = send(&app, KILL_AFTER / 2..TOTAL, Some(KILL_AFTER / 4), || {
        assert!(std::process::Command::new("kill").args(["-9", &pid]).status().expect("kill runs").success());
    })
    .await;
    assert!(
        second.len() >= KILL_AFTER / 4 && second.len() < TOTAL - KILL_AFTER / 2,
        "the kill came in the middle: {} lines",
        second.len()
    );
    acknowledged.extend(second);
    println!("{} acknowledged in {:?} before kill -9", acknowledged.len(), began.elapsed());
    app.kill();

    let app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    let listed = list(&app).await;
    let lost: Vec<&String> = acknowledged.iter().filter(|name| !listed.contains(*name)).collect();
    assert!(lost.is_empty(), "{} acknowledged adapters are gone, {:?} first", lost.len(), lost[0]);

    let missing: Vec<usize> = (0..TOTAL).filter(|i| !listed.contains(&format!("user-{i:06}"))).collect();
    let began = Instant::now();
    let first = *missing.first().expect("some were not uploaded");
    assert_eq!(missing, (first..TOTAL).collect::<Vec<_>>(), "lines are committed in order");
    let rest = send(&app, first..TOTAL, None, || {}).await;
    assert_eq!(rest.len(), missing.len());
    println!("{} uploaded in {:?}", rest.len(), began.elapsed());
    assert_eq!(list(&app).await.len(), TOTAL);
    drop(app);

    let app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    println!(
        "{TOTAL} adapters: start-up {:?}, resident {:.0} MiB (empty server: {empty:.0} MiB)",
        app.started_in,
        app.resident_mb()
    );
    // Adapters that share their numbers answer alike, others do not, and the stored bytes are the ones sent.
    let ask = async |i: usize| {
        app.ok("/v1/completions", &json!({"model": format!("user-{i:06}"), "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "logprobs": 2}))
            .await["choices"][0]["logprobs"]
            .clone()
    };
    assert_eq!(ask(251 * 7 + 5).await, ask(251 * 300 + 5).await);
    assert_ne!(ask(99_999).await, ask(1).await);
    for i in [0, 1, 31_415, 59_999, 99_999] {
        let weights = app.get(&format!("/adapters/user-{i:06}/weights?format=json")).await.1;
        assert_eq!(weights["numbers"], json!(vec![number(i); 13]), "user-{i:06}");
    }
}

/// All names, page by page; asserts that pages are sorted and do not overlap.
async fn list(app: &TestApp) -> HashSet<String> {
    let (mut names, mut after) = (HashSet::new(), String::new());
    loop {
        let page = app.get(&format!("/adapters?limit=1000&after={after}")).await.1;
        for adapter in page["data"].as_array().expect("a page") {
            let name = adapter["name"].as_str().expect("a name").to_owned();
            assert!(after < name, "{after} before {name}");
            after.clone_from(&name);
            assert!(names.insert(name));
        }
        if page["has_more"] == json!(false) {
            return names;
        }
    }
}
