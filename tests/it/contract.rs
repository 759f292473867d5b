//! openapi/openapi.json is what the code says, and the pages that need no key.

use std::{fs, path::Path, process::Command};

use reqwest::Method;

use crate::support::TestApp;

#[test]
fn the_committed_openapi_document_is_the_codes() {
    let output = Command::new(env!("CARGO_BIN_EXE_mote")).arg("openapi").output().expect("mote runs");
    assert!(output.status.success());
    let committed =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi/openapi.json")).expect("openapi.json");
    assert!(
        String::from_utf8_lossy(&output.stdout) == committed,
        "openapi/openapi.json has drifted: cargo run -- openapi > openapi/openapi.json"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_documents_need_no_key() {
    let app = TestApp::tiny("llama").start().await;
    for path in ["/healthz", "/readyz", "/openapi.json", "/docs/"] {
        let answer = app.anonymous(Method::GET, path).send().await.expect("an answer");
        assert_eq!(answer.status(), 200, "{path}");
    }
    let docs = app.anonymous(Method::GET, "/docs/").send().await.expect("an answer").text().await.expect("a page");
    assert!(!docs.contains("https://"), "the page works offline");
    assert_eq!(app.anonymous(Method::GET, "/adapters").send().await.expect("an answer").status(), 401);
}
