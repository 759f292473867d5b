//! One batch, many adapters: what a request returns does not depend on its company.

use std::time::Instant;

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::TestApp;

/// Long enough that requests which arrive one after another meet in the batch.
const TINY_TOKENS: usize = 100;
const REAL_TOKENS: usize = 24;

/// Deterministic small numbers for adapter i; exactly representable in bf16.
fn numbers(i: usize, count: usize) -> Vec<f64> {
    (0..count).map(|k| ((i * 31 + k * 17) % 67) as f64 / 64.0 - 0.515625).collect()
}

async fn upload(app: &TestApp, count: usize) -> Vec<String> {
    let lines: Vec<String> = (0..count)
        .map(|i| json!({"name": format!("a{i:02}"), "numbers": numbers(i, 13), "dtype": "bf16"}).to_string())
        .collect();
    let answer = app
        .request(Method::POST, "/adapters/batch")
        .header("content-type", "application/x-ndjson")
        .body(lines.join("\n"))
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.status(), 200);
    let text = answer.text().await.expect("a body");
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        assert!(line.get("generation").is_some() && line.get("error").is_none(), "{line}");
    }
    (0..count).map(|i| format!("a{i:02}")).collect()
}

/// Tokens and the bits of the log-probs (chosen and top 5) of a completion.
async fn ask(app: &TestApp, model: &str, prompt: &[u32], tokens: usize, temperature: f64) -> Value {
    let answer = app
        .ok(
            "/v1/completions",
            &json!({"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "seed": 11, "logprobs": 5, "ignore_eos": true, "return_token_ids": true}),
        )
        .await;
    let choice = &answer["choices"][0];
    json!([choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]])
}

fn prompt(i: usize, vocabulary: u32) -> Vec<u32> {
    let length = 3 + (i * 7) % 40;
    (0..length as u32).map(|k| 2 + (k * 37 + i as u32 * 101) % (vocabulary - 2)).collect()
}

/// Every request alone on one server, then all at once on servers that are hard on them: small prefill chunks, few KV blocks, no prefix cache, one thread.
#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_adapters_together_equal_each_alone() {
    let quiet = TestApp::tiny("llama").args(["--threads", "2"]).start().await;
    let names = upload(&quiet, 64).await;
    let mut alone = Vec::new();
    for (i, name) in names.iter().enumerate() {
        alone.push(ask(&quiet, name, &prompt(i, 290), TINY_TOKENS, (i % 2) as f64).await);
    }
    assert!(
        alone.iter().map(Value::to_string).collect::<std::collections::HashSet<_>>().len() > 60,
        "the adapters differ"
    );

    // 64 sequences of up to 142 tokens want some 500 blocks; one MiB of f32 KV is far less, so sequences are preempted.
    for flags in [
        vec!["--max-batch", "64"],
        vec!["--prefill-chunk", "5", "--idle-prefill-chunk", "5", "--threads", "1"],
        vec!["--kv-cache-mb", "1", "--no-prefix-cache"],
    ] {
        let busy = TestApp::tiny("llama").args(flags.clone()).start().await;
        upload(&busy, 64).await;
        let prompts: Vec<Vec<u32>> = (0..64).map(|i| prompt(i, 290)).collect();
        let together = join_all(
            names.iter().enumerate().map(|(i, name)| ask(&busy, name, &prompts[i], TINY_TOKENS, (i % 2) as f64)),
        )
        .await;
        for (i, (got, want)) in together.iter().zip(&alone).enumerate() {
            assert_eq!(got, want, "request {i} under {flags:?}");
        }
        if flags.contains(&"--kv-cache-mb") {
            assert!(busy.metric("mote_engine_preemptions_total").await > 0.0, "the small cache preempted nobody");
        } else {
            assert!(busy.metric("mote_engine_peak_adapters").await > 8.0, "the requests did not share steps");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_cache_hit_gives_the_same_bits() {
    let app = TestApp::tiny("qwen2").start().await;
    let names = upload(&app, 2).await;
    let prompt = prompt(5, 290);
    assert!(prompt.len() > 32);
    for name in &names {
        let first = ask(&app, name, &prompt, 8, 0.0).await;
        let before = app.metric("mote_engine_cached_tokens_total").await;
        let second = ask(&app, name, &prompt, 8, 0.0).await;
        let cached = app.metric("mote_engine_cached_tokens_total").await - before;
        assert!(cached >= 32.0, "only {cached} prompt tokens came from the cache");
        assert_eq!(first, second);
    }
    // Another adapter's blocks and the base's are never read.
    let before = app.metric("mote_engine_cached_tokens_total").await;
    ask(&app, "tiny", &prompt, 2, 0.0).await;
    assert_eq!(app.metric("mote_engine_cached_tokens_total").await, before);
}

/// The real model: 64 users at once, against 64 in turn.
#[tokio::test(flavor = "multi_thread")]
async fn the_real_model_serves_sixty_four_adapters_in_one_step() {
    let app = TestApp::real().args(["--no-prefix-cache"]).start().await;
    let names = upload(&app, 64).await;
    let prompts: Vec<Vec<u32>> = (0..64).map(|i| (0..8).map(|k| 1000 + 613 * k + 97 * i).collect()).collect();
    let began = Instant::now();
    let mut alone = Vec::new();
    for (name, prompt) in names.iter().zip(&prompts) {
        alone.push(ask(&app, name, prompt, REAL_TOKENS, 0.0).await);
    }
    let in_turn = began.elapsed();
    let began = Instant::now();
    let together =
        join_all(names.iter().zip(&prompts).map(|(name, prompt)| ask(&app, name, prompt, REAL_TOKENS, 0.0))).await;
    let at_once = began.elapsed();
    for (i, (got, want)) in together.iter().zip(&alone).enumerate() {
        assert_eq!(got, want, "request {i}");
    }
    println!(
        "64 in turn {in_turn:?}, together {at_once:?}: {:.2} times",
        in_turn.as_secs_f64() / at_once.as_secs_f64()
    );
    assert_eq!(app.metric("mote_engine_peak_sequences").await, 64.0);
    assert_eq!(app.metric("mote_engine_peak_adapters").await, 64.0);
}

/// A request ends as it began, whatever happens to its adapter's name.
#[tokio::test(flavor = "multi_thread")]
async fn replacing_or_deleting_an_adapter_does_not_touch_its_running_requests() {
    let app = TestApp::tiny("llama").start().await;
    upload(&app, 2).await;
    let prompt = prompt(3, 290);
    let want = ask(&app, "a00", &prompt, 150, 0.0).await;
    let other = ask(&app, "a01", &prompt, 150, 0.0).await;
    assert_ne!(want, other);

    let body = json!({"model": "a00", "prompt": prompt, "max_tokens": 150, "temperature": 0, "seed": 11, "logprobs": 5, "ignore_eos": true, "return_token_ids": true, "stream": true});
    let mut stream = app.request(Method::POST, "/v1/completions").json(&body).send().await.expect("a stream");
    let mut text = String::from_utf8(stream.chunk().await.expect("a chunk").expect("a chunk").to_vec()).expect("UTF-8");
    let replaced = app
        .post(
            "/adapters",
            &json!({"name": "a00", "numbers": numbers(1, 13), "dtype": "bf16", "on_conflict": "new_generation"}),
        )
        .await;
    assert_eq!(replaced.0, 201, "{}", replaced.1);
    assert_eq!(ask(&app, "a00", &prompt, 150, 0.0).await, other, "a new request takes the new generation");
    let deleted = app.request(Method::DELETE, "/adapters/a00").send().await.expect("an answer");
    assert_eq!(deleted.status(), 204);
    while let Some(chunk) = stream.chunk().await.expect("a chunk") {
        text.push_str(std::str::from_utf8(&chunk).expect("UTF-8"));
    }
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    let streamed: Vec<u64> = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok())
        .flat_map(|chunk| chunk["choices"][0]["token_ids"].as_array().cloned().unwrap_or_default())
        .filter_map(|id| id.as_u64())
        .collect();
    assert_eq!(json!(streamed), want[0]);
    let gone = app.post("/v1/completions", &json!({"model": "a00", "prompt": "x"})).await;
    assert_eq!((gone.0, gone.1["error"]["code"].as_str()), (404, Some("model_not_found")));
}
