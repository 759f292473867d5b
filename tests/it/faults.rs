//! A disk that becomes read-only or slow under a whole server, and rows with text that is none.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mote::store::Faults;
use serde_json::{Value, json};

use crate::{
    app::{MODEL, Options, TestApp},
    durability::tamper,
};

fn upload(name: &str) -> Value {
    json!({"name": name, "numbers": vec![0.5; 13]})
}

fn complete(name: &str) -> Value {
    json!({"model": name, "prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0})
}

async fn faulty() -> (TestApp, Arc<Faults>) {
    let faults = Arc::<Faults>::default();
    let app = TestApp::with(Options { faults: Some(faults.clone()), ..Options::default() }).await;
    (app, faults)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_directory_serves_says_so_and_recovers() {
    let (app, faults) = faulty().await;
    assert_eq!(app.post("/adapters", upload("before")).await.status, 201);
    faults.set_read_only(true);
    for _ in 0..3 {
        let refused = app.post("/adapters", upload("meanwhile")).await;
        assert_eq!((refused.error().0, refused.error().3.as_deref()), (503, Some("storage_unavailable")));
        assert!(refused.text.contains("read-only"), "{}", refused.text);
        assert!(refused.headers.contains_key("retry-after"));
        let refused = app.delete("/adapters/before").await;
        assert_eq!((refused.error().0, refused.error().3.as_deref()), (503, Some("storage_unavailable")));
        app.ok("/v1/completions", complete("before")).await;
        app.ok("/v1/completions", complete(MODEL)).await;
        assert_eq!(app.get("/adapters").await.json()["data"].as_array().unwrap().len(), 1);
    }
    // What was used is kept until it can be written, and counts meanwhile.
    let used = app.get("/usage").await.json();
    assert_eq!(used["total"]["prompt_tokens"], 6 * 3, "{used}");
    faults.set_read_only(false);
    assert_eq!(app.post("/adapters", upload("meanwhile")).await.status, 201);
    assert_eq!(app.delete("/adapters/before").await.status, 204);
    app.ok("/v1/completions", complete("meanwhile")).await;
    let used = app.get("/usage").await.json();
    let tokens: u64 = used["data"].as_array().unwrap().iter().map(|day| day["prompt_tokens"].as_u64().unwrap()).sum();
    assert_eq!(tokens, 7 * 3, "{used}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_disk_slows_uploads_and_nothing_else() {
    let (app, faults) = faulty().await;
    assert_eq!(app.post("/adapters", upload("served")).await.status, 201);
    let median = async || {
        let mut times = Vec::new();
        for _ in 0..21 {
            let began = Instant::now();
            app.ok("/v1/completions", complete("served")).await;
            times.push(began.elapsed());
        }
        times.sort();
        times[10]
    };
    let before = median().await;
    let commit = Duration::from_secs(1);
    faults.set_slow(commit);
    let uploads = async {
        let all = (0..40).map(|number| {
            let app = &app;
            async move { app.post("/adapters", upload(&format!("a{number}"))).await.status }
        });
        futures::future::join_all(all).await
    };
    let served = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let during = median().await;
        assert_eq!(app.get("/adapters?limit=5").await.status, 200);
        during
    };
    let began = Instant::now();
    let (stored, during) = tokio::join!(uploads, served);
    assert!(stored.iter().all(|status| *status == 201), "{stored:?}");
    assert!(began.elapsed() >= commit, "the disk was not slow");
    // Far less than a commit: completions do not wait for one.
    assert!(during < before + commit / 2, "{during:?} a completion beside slow commits, {before:?} before");
    faults.set_slow(Duration::ZERO);
    let listed = app.get("/adapters?limit=100").await.json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 41, "none is lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn text_that_is_none_is_the_trouble_of_its_row() {
    let app = TestApp::new().await;
    for name in ["good", "hash", "words", "late"] {
        assert_eq!(app.post("/adapters", upload(name)).await.status, 201);
    }
    app.state.service.store.close().await;
    let row = |name: &str| format!("adapter = (SELECT id FROM adapters WHERE name = '{name}')");
    let damage = format!(
        "UPDATE generations SET generation = CAST(x'ff' AS TEXT) WHERE {}; \
         UPDATE adapters SET metadata = CAST(x'7bff' AS TEXT) WHERE name = 'words'",
        row("hash")
    );
    tamper(app.folder.path(), &damage).await;
    let app = TestApp::with(Options { folder: Some(app.folder.clone()), ..Options::default() }).await;
    // And while it runs.
    tamper(app.folder.path(), &format!("UPDATE generations SET data = CAST(x'ff' AS TEXT) WHERE {}", row("late")))
        .await;
    for name in ["good", "words", "late"] {
        app.ok("/v1/completions", complete(name)).await;
    }
    let damaged = app.post("/v1/completions", complete("hash")).await;
    assert_eq!((damaged.error().0, damaged.error().3.as_deref()), (500, Some("adapter_damaged")));
    for path in ["/adapters/hash", "/adapters/words", "/adapters/late", "/adapters/late/weights"] {
        let damaged = app.get(path).await.error();
        assert_eq!((damaged.0, damaged.3.as_deref()), (500, Some("adapter_damaged")), "{path}");
    }
    for path in ["/adapters", "/v1/models"] {
        assert_eq!(app.get(path).await.status, 200, "{path}");
    }
    let listed = app.get("/adapters").await.json();
    assert_eq!(listed["data"].as_array().unwrap().len(), 1, "{listed}");
    for name in ["hash", "words", "late"] {
        let mut body = upload(name);
        body["on_conflict"] = json!("new_generation");
        assert_eq!(app.post("/adapters", body).await.status, 201, "{name}");
        app.ok("/v1/completions", complete(name)).await;
    }
    assert_eq!(app.get("/adapters").await.json()["data"].as_array().unwrap().len(), 4);
}
