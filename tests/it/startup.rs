//! What the program says when it starts, and when it cannot.

use std::{
    fs,
    process::{Command, Output, Stdio},
};

use reqwest::Method;

use crate::support::{TestApp, golden};

/// Runs `mote serve`, which must not get as far as serving.
fn refused(args: &[&str]) -> (Option<i32>, String) {
    let data = tempfile::tempdir().expect("a folder");
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_mote"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data.path())
        .args(args)
        .stdout(Stdio::null())
        .output()
        .expect("mote runs");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn what_cannot_start_says_why() {
    let tiny = golden("llama").join("model").to_string_lossy().into_owned();
    let mut cases = vec![
        (vec!["--no-auth", "--listen", "0.0.0.0:0"], "--force-no-auth"),
        (vec!["--model", "no/such/folder/here"], "no/such/folder/here"),
        (vec!["--model", &tiny, "--max-model-len", "100000"], "--max-model-len 100000"),
        (vec!["--model", &tiny, "--rank", "100"], "--rank"),
        (vec!["--model", &tiny, "--device", "tpu"], "--device"),
        (vec!["--model", &tiny, "--otlp-endpoint", "127.0.0.1:4318"], "--otlp-endpoint"),
    ];
    if cfg!(not(feature = "cuda")) {
        cases.push((vec!["--model", &tiny, "--device", "cuda"], "--features cuda"));
    }
    if cfg!(not(feature = "metal")) {
        cases.push((vec!["--model", &tiny, "--device", "metal"], "--features metal"));
    }
    for (args, words) in cases {
        // A later --listen wins over the one of `refused`.
        let (code, stderr) = refused(&args);
        assert!(code.is_some_and(|code| code != 0), "{args:?} exited with {code:?}");
        assert!(stderr.contains(words), "{args:?} said: {stderr}");
        assert!(!stderr.contains("panicked"), "{args:?} said: {stderr}");
    }
}

/// A folder like the golden one but for some keys of its config.json.
fn changed(changes: &[(&str, serde_json::Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let source = golden("llama").join("model");
    for file in ["model.safetensors", "tokenizer.json"] {
        fs::copy(source.join(file), folder.path().join(file)).expect("a copy");
    }
    let text = fs::read_to_string(source.join("config.json")).expect("config.json");
    let mut config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    folder
}

#[test]
fn a_model_that_cannot_be_served_is_named_in_one_sentence() {
    for (changes, words) in [
        (vec![("architectures", serde_json::json!(["MambaForCausalLM"])), ("model_type", "mamba".into())], "amba"),
        (vec![("rope_parameters", serde_json::json!({"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}))], "yarn"),
        (vec![("hidden_act", "gelu".into())], "gelu"),
        (vec![("num_hidden_layers", 4.into())], "model.layers.3"),
    ] {
        let folder = changed(&changes);
        let (code, stderr) = refused(&["--model", &folder.path().to_string_lossy()]);
        assert!(code.is_some_and(|code| code != 0) && stderr.contains(words), "{changes:?}: {stderr}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

/// config.json, model.safetensors and tokenizer.json are enough.
#[tokio::test(flavor = "multi_thread")]
async fn three_files_serve() {
    let folder = changed(&[]);
    let path = folder.path().to_string_lossy().into_owned();
    let app = TestApp::tiny("llama").args(["--model", &path]).start().await;
    assert_eq!(app.get("/v1/models").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_store_prints_one_admin_key_once() {
    let data = tempfile::tempdir().expect("a folder");
    let printed =
        |log: &str| log.lines().find_map(|line| line.strip_prefix("admin key (shown once): ").map(str::to_owned));
    let mut first = TestApp::tiny("llama").data_dir(data.path()).without_admin_key().start().await;
    let key = printed(&first.log()).expect("the key on stderr");
    assert_eq!(first.as_key(&key, Method::GET, "/admin/tenants").send().await.expect("an answer").status(), 200);
    first.kill();
    let second = TestApp::tiny("llama").data_dir(data.path()).without_admin_key().start().await;
    assert_eq!(printed(&second.log()), None);
    assert_eq!(second.as_key(&key, Method::GET, "/admin/tenants").send().await.expect("an answer").status(), 200);
}

/// With --rank 0 the base answers and adapters are refused, never silently ignored.
#[tokio::test(flavor = "multi_thread")]
async fn rank_zero_turns_adapters_off() {
    let app = TestApp::tiny("llama").args(["--rank", "0"]).start().await;
    app.ok("/v1/completions", &serde_json::json!({"model": "tiny", "prompt": [5, 6], "max_tokens": 1})).await;
    let upload = app.post("/adapters", &serde_json::json!({"name": "a", "numbers": vec![0; 13]})).await;
    assert_eq!(upload.0, 400, "{}", upload.1);
    let inline = app
        .post(
            "/v1/completions",
            &serde_json::json!({"model": "tiny+AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "prompt": [5]}),
        )
        .await;
    assert_eq!(inline.0, 400, "{}", inline.1);
}
