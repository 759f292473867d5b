//! transformers + PEFT, over HTTP: checkpoints go in through the API, log-probs and greedy tokens come out, checkpoints come back.

use std::{fs, io::Read};

use reqwest::{Method, multipart};
use serde_json::{Value, json};

use crate::support::{TestApp, expected, golden, parts};

const TOLERANCE: f64 = 2e-4;

#[tokio::test(flavor = "multi_thread")]
async fn llama_and_its_adapters() {
    model("llama").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn qwen2_and_its_adapters() {
    model("qwen2").await;
}

async fn model(name: &str) {
    let app = TestApp::tiny(name).args(["--rank", "4"]).start().await;
    let want = expected(name);
    holds(&app, "tiny", &want, &want["base"]).await;
    let adapters = want["adapters"].as_object().expect("adapters");
    assert_eq!(adapters.len(), 5);
    for (adapter, of_adapter) in adapters {
        let uploaded = upload(&app, name, adapter).await;
        assert_eq!(uploaded["name"], *adapter);
        holds(&app, adapter, &want, of_adapter).await;
        comes_back(&app, name, adapter, of_adapter).await;
    }
    // All adapters are still themselves now that all of them are resident.
    for (adapter, of_adapter) in adapters {
        holds(&app, adapter, &want, of_adapter).await;
    }
}

/// Uploads a golden checkpoint as PEFT wrote it.
pub(crate) async fn upload(app: &TestApp, model: &str, adapter: &str) -> Value {
    let folder = golden(model).join("adapters").join(adapter);
    let file = |name: &str| fs::read(folder.join(name)).expect("a checkpoint file");
    let form = multipart::Form::new()
        .text("name", adapter.to_owned())
        .part("adapter_config", multipart::Part::bytes(file("adapter_config.json")))
        .part("adapter_model", multipart::Part::bytes(file("adapter_model.safetensors")));
    let (status, answer) =
        parts(app.request(Method::POST, "/adapters").multipart(form).send().await.expect("an answer")).await;
    assert_eq!(status, 201, "{answer}");
    answer
}

/// axum's own limit of 2 MiB is not ours: an export of a real model is larger.
#[tokio::test(flavor = "multi_thread")]
async fn a_form_may_be_as_large_as_a_checkpoint() {
    let app = TestApp::tiny("llama").args(["--max-body-mb", "1"]).start().await;
    let folder = golden("llama").join("adapters/u13-tied");
    let file = |name: &str| multipart::Part::bytes(fs::read(folder.join(name)).expect("a checkpoint file"));
    // A form may hold the largest checkpoint of the model, whatever the limit of JSON bodies.
    for (megabytes, want) in [(5, 201), (64, 413)] {
        let form = multipart::Form::new()
            .text("name", format!("large-{megabytes}"))
            .part("padding", multipart::Part::bytes(vec![7; megabytes << 20]))
            .part("adapter_config", file("adapter_config.json"))
            .part("adapter_model", file("adapter_model.safetensors"));
        let answer = app.request(Method::POST, "/adapters").multipart(form).send().await;
        // The server may close the connection of a body that it refuses before all of it is sent.
        let status = answer.map_or(413, |answer| answer.status().as_u16());
        assert_eq!(status, want, "{megabytes} MiB");
    }
}

/// Greedy tokens and the log-probs of the fixed continuation, for every prompt.
async fn holds(app: &TestApp, model: &str, want: &Value, of: &Value) {
    let continuation = ids(&want["continuation"]);
    for (i, prompt) in want["prompts"].as_array().expect("prompts").iter().enumerate() {
        let prompt = ids(prompt);
        let greedy = app
            .ok("/v1/completions", &json!({"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true, "return_token_ids": true}))
            .await;
        assert_eq!(
            ids(&greedy["choices"][0]["token_ids"]),
            ids(&of["greedy"][i]),
            "greedy tokens of {model}, prompt {i}"
        );

        let scored = [prompt.clone(), continuation.clone()].concat();
        let got = app
            .ok(
                "/v1/completions",
                &json!({"model": model, "prompt": scored, "max_tokens": 0, "echo": true, "logprobs": 0}),
            )
            .await;
        let logprobs = got["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("log-probs");
        assert_eq!(logprobs.len(), scored.len());
        assert!(logprobs[0].is_null(), "the first token has no log-prob");
        for (k, logprob) in of["continuation_logprobs"][i].as_array().expect("log-probs").iter().enumerate() {
            let (got, want) =
                (logprobs[prompt.len() + k].as_f64().expect("a number"), logprob.as_f64().expect("a number"));
            assert!((got - want).abs() <= TOLERANCE, "{model}, prompt {i}, token {k}: {got} is not {want}");
        }
        // The same with one generated token, as some clients ask.
        let one = app
            .ok("/v1/completions", &json!({"model": model, "prompt": scored, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 0, "ignore_eos": true}))
            .await;
        let with_one = one["choices"][0]["logprobs"]["token_logprobs"].as_array().expect("log-probs");
        assert_eq!(with_one[..scored.len()], logprobs[..], "scoring does not depend on max_tokens");
    }
}

/// The export holds the same numbers, and importing it gives the same generation's behaviour.
async fn comes_back(app: &TestApp, model: &str, adapter: &str, of: &Value) {
    let zip =
        app.request(Method::GET, &format!("/adapters/{adapter}/weights?format=peft")).send().await.expect("an answer");
    assert_eq!(zip.status(), 200);
    let bytes = zip.bytes().await.expect("a body");
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&bytes)).expect("a zip");
    let mut config = String::new();
    archive.by_name("adapter_config.json").expect("the config").read_to_string(&mut config).expect("text");
    assert_eq!(serde_json::from_str::<Value>(&config).expect("JSON")["peft_type"], "TINYLORA");

    let copy = format!("{adapter}-{model}-copy");
    let form = multipart::Form::new()
        .text("name", copy.clone())
        .part("archive", multipart::Part::bytes(bytes.to_vec()).file_name("a.zip"));
    let (status, answer) =
        parts(app.request(Method::POST, "/adapters").multipart(form).send().await.expect("an answer")).await;
    assert_eq!(status, 201, "{answer}");
    let numbers = app.get(&format!("/adapters/{copy}/weights?format=json")).await.1;
    let got: Vec<f64> = numbers["numbers"].as_array().expect("numbers").iter().filter_map(Value::as_f64).collect();
    let groups = of["v"].as_object().expect("groups");
    let mut want: Vec<(usize, Vec<f64>)> = groups
        .iter()
        .map(|(group, v)| {
            (
                group.parse().expect("a number"),
                v.as_array().expect("numbers").iter().filter_map(Value::as_f64).collect(),
            )
        })
        .collect();
    want.sort_by_key(|(group, _)| *group);
    assert_eq!(got, want.into_iter().flat_map(|(_, v)| v).collect::<Vec<_>>(), "group-major numbers of {adapter}");
    let same = |name: &str| json!({"model": name, "prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "logprobs": 5, "ignore_eos": true});
    let (a, b) = (app.ok("/v1/completions", &same(adapter)).await, app.ok("/v1/completions", &same(&copy)).await);
    assert_eq!(a["choices"][0]["logprobs"]["top_logprobs"], b["choices"][0]["logprobs"]["top_logprobs"]);
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().expect("token ids").iter().map(|id| id.as_u64().expect("a token id")).collect()
}
