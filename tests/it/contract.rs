//! openapi/openapi.json is what the code says, and the pages that need no key.

use std::{fs, path::Path, process::Command};

use mote_trainer::grader::{NoRemote, build};
use reqwest::Method;
use serde_json::{Value, json};

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

#[test]
fn fields_that_are_read_as_plain_json_have_types_and_defaults() {
    let document = serde_json::to_value(mote::http::openapi()).unwrap();
    let schemas = &document["components"]["schemas"];
    for (body, field, schema, default) in [
        ("TrainBody", "scheme", "Scheme", json!("tiny13")),
        ("AdapterUpload", "scheme", "Scheme", json!("tiny13")),
        ("AdapterBody", "scheme", "Scheme", json!("tiny13")),
        ("TrainBody", "dataset", "Items", json!(null)),
        ("TrainBody", "prompt", "PromptTemplate", json!(null)),
        ("TrainBody", "grader", "Grader", json!(null)),
        ("FineTuningBody", "method", "FineTuningMethod", json!({"type": "supervised"})),
    ] {
        let property = &schemas[body]["properties"][field];
        assert_eq!(property["oneOf"][0]["$ref"], format!("#/components/schemas/{schema}"), "{body}.{field}");
        assert_eq!(property["default"], default, "{body}.{field}");
        assert!(schemas[schema]["oneOf"].is_array(), "{schema}");
    }
}

/// The trainer takes every field that the document names of a grader, with its default.
#[test]
fn graders_are_described_as_they_are_read() {
    let document = serde_json::to_value(mote::http::openapi()).unwrap();
    let kinds = document["components"]["schemas"]["Grader"]["oneOf"].as_array().unwrap().clone();
    assert_eq!(kinds.len(), 8);
    let needed = json!({
        "reference": "1", "pattern": "(a)", "evaluation_metric": "bleu", "schema": {}, "max": 3, "url": "https://example.org",
        "graders": {"a": {"type": "length", "max": 3}}, "calculate_output": "a", "pass_threshold": 0.5, "min": 1,
    });
    for kind in kinds {
        let properties = kind["properties"].as_object().unwrap();
        let name = &properties["type"]["enum"][0];
        let mut grader = json!({"type": name});
        for (field, property) in properties.iter().filter(|(field, _)| *field != "type") {
            grader[field] =
                if property["default"].is_null() { needed[field].clone() } else { property["default"].clone() };
        }
        match build_grader(&grader) {
            Err(error) if name == "remote" => assert!(error.contains("not available"), "{error}"),
            outcome => assert_eq!(outcome, Ok(()), "{grader}"),
        }
    }
}

fn build_grader(described: &Value) -> Result<(), String> {
    build(described, &NoRemote).map(|_| ()).map_err(|error| error.to_string())
}
