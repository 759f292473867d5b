//! Streams of both routes: pieces, ends, failures, and clients that go away.
#![allow(clippy::await_holding_lock, reason = "the engine's thread waits for the lock, the runtime does not")]

use std::{
    collections::BTreeSet,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::app::{MODEL, TestApp};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

fn body(prompt: usize, max_tokens: usize, extra: Value) -> Value {
    let mut body =
        json!({"model": MODEL, "prompt": vec![5; prompt], "max_tokens": max_tokens, "temperature": 0, "stream": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn chat(content: &str, extra: Value) -> Value {
    let mut body = json!({"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0, "stream": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

/// Everything that a choice said, and its finish reasons.
fn told(chunks: &[Value], index: u64) -> (String, Vec<Value>) {
    let mine = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).filter(|c| c["index"] == index);
    let text = |c: &Value| c["text"].as_str().or(c["delta"]["content"].as_str()).unwrap_or_default().to_owned();
    let (texts, ends): (Vec<String>, Vec<Value>) = mine.map(|c| (text(c), c["finish_reason"].clone())).unzip();
    (texts.concat(), ends)
}

async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_stream_is_the_same_completion_in_pieces() {
    let app = TestApp::new().await;
    let prompt = app.find("little");
    let chunks = app.chunks(COMPLETIONS, body(prompt, 24, json!({}))).await;
    let (text, ends) = told(&chunks, 0);
    assert_eq!(text, app.says(prompt, 24));
    assert!(text.contains('🦊'));
    assert!(chunks.len() > 10, "pieces come one by one");
    assert!(ends.iter().rev().skip(1).all(Value::is_null) && *ends.last().unwrap() == "length", "{ends:?}");
    for chunk in &chunks {
        assert_eq!(chunk["object"], "text_completion");
        assert_eq!((&chunk["id"], &chunk["created"]), (&chunks[0]["id"], &chunks[0]["created"]));
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
        assert!(chunk.get("usage").is_none());
        assert!(!chunk["choices"][0]["text"].as_str().unwrap().contains('\u{fffd}'));
    }
}

#[tokio::test]
async fn usage_comes_once_on_request_before_done() {
    let app = TestApp::new().await;
    let extra = json!({"stream_options": {"include_usage": true}, "n": 2});
    for (path, body) in [(COMPLETIONS, body(3, 4, extra.clone())), (CHAT, chat("hi", extra))] {
        let mut chunks = app.chunks(path, body).await;
        let last = chunks.pop().unwrap();
        assert_eq!(last["choices"], json!([]));
        let usage = &last["usage"];
        assert_eq!(usage["completion_tokens"], if path == CHAT { 24 } else { 8 });
        let sum = usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap();
        assert_eq!(usage["total_tokens"], sum);
        assert!(usage["prompt_tokens_details"]["cached_tokens"].is_u64());
        assert!(chunks.iter().all(|chunk| chunk["usage"].is_null() && chunk.get("usage").is_some()));
    }
}

#[tokio::test]
async fn choices_come_interleaved_each_in_order() {
    let app = TestApp::new().await;
    let request =
        json!({"model": MODEL, "prompt": [[5], [5, 5]], "n": 2, "max_tokens": 12, "temperature": 0, "stream": true});
    let chunks = app.chunks(COMPLETIONS, request).await;
    for index in 0..4 {
        let (text, ends) = told(&chunks, index);
        assert_eq!(text, app.says(1 + index as usize / 2, 12));
        assert_eq!(ends.iter().filter(|end| !end.is_null()).count(), 1);
    }
    let first_end = chunks.iter().position(|chunk| !chunk["choices"][0]["finish_reason"].is_null()).unwrap();
    let begun: BTreeSet<u64> = chunks[..first_end].iter().map(|c| c["choices"][0]["index"].as_u64().unwrap()).collect();
    assert_eq!(begun.len(), 4, "all choices run side by side");
}

#[tokio::test]
async fn logprobs_and_ids_stream_to_the_same_lists() {
    let app = TestApp::new().await;
    let prompt = app.find("little");
    let extra = json!({"logprobs": 1, "return_token_ids": true, "echo": true});
    let mut request = body(prompt, 24, extra);
    let chunks = app.chunks(COMPLETIONS, request.clone()).await;
    request["stream"] = json!(false);
    let whole = app.ok(COMPLETIONS, request).await["choices"][0].clone();
    let joined = |path: &str| -> Vec<Value> {
        let lists = chunks.iter().map(|chunk| chunk["choices"][0].pointer(path).unwrap().as_array().unwrap().clone());
        lists.flatten().collect()
    };
    for list in [
        "/logprobs/tokens",
        "/logprobs/token_logprobs",
        "/logprobs/top_logprobs",
        "/logprobs/text_offset",
        "/token_ids",
    ] {
        assert_eq!(json!(joined(list)), *whole.pointer(list).unwrap(), "{list}");
    }
    assert_eq!(chunks[0]["choices"][0]["prompt_token_ids"], json!(vec![5; prompt]));
    assert!(chunks[1..].iter().all(|chunk| chunk["choices"][0].get("prompt_token_ids").is_none()));
    assert_eq!(told(&chunks, 0).0, whole["text"]);
}

#[tokio::test]
async fn a_stop_string_ends_a_stream_and_frees_the_engine() {
    let app = TestApp::new().await;
    let prompt = app.find(" Then");
    let chunks = app.chunks(COMPLETIONS, body(prompt, 100, json!({"stop": "END"}))).await;
    let (text, ends) = told(&chunks, 0);
    assert_eq!(text, " Then the ");
    assert_eq!(*ends.last().unwrap(), "stop");
    let stats = app.state.service.engine.stats().clone();
    eventually("the cancellation", || stats.cancelled.get() + stats.finished.get() == 1 && stats.running.get() == 0)
        .await;
    assert!(stats.generated_tokens.get() < 40, "the rest of the completion was not made");
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_a_line_and_the_end() {
    let app = TestApp::new().await;
    let prompt = app.script.len() - 4;
    let answer = app.post(COMPLETIONS, body(prompt, 20, json!({}))).await;
    let lines = answer.data_lines();
    let (last, before) = lines.split_last().unwrap();
    let error: Value = serde_json::from_str(last).unwrap();
    let message = "The server had an error while processing your request.";
    assert_eq!(error, json!({"error": {"message": message, "type": "api_error", "param": null, "code": null}}));
    let chunks: Vec<Value> = before.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(told(&chunks, 0).0, app.says(prompt, 3));
    let mut request = body(prompt, 20, json!({}));
    request["stream"] = json!(false);
    assert_eq!(app.post(COMPLETIONS, request).await.error(), (500, "api_error".into(), None, None));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_its_request() {
    let app = TestApp::new().await;
    let stats = app.state.service.engine.stats().clone();
    for whole in [false, true] {
        let (cancelled, running) = (stats.cancelled.get(), app.watch.steps.load(Ordering::SeqCst));
        let hold = app.watch.hold.lock().unwrap();
        let mut request = body(4, 100, json!({"n": 3, "ignore_eos": true}));
        if whole {
            request["stream"] = json!(false);
            let answer = tokio::time::timeout(Duration::from_millis(50), app.post(COMPLETIONS, request)).await;
            assert!(answer.is_err(), "the model is held");
        } else {
            drop(app.open(COMPLETIONS, request).await);
        }
        drop(hold);
        eventually("the cancellation", || stats.cancelled.get() == cancelled + 3 && stats.running.get() == 0).await;
        assert!(app.watch.steps.load(Ordering::SeqCst) < running + 20, "not all of the 100 tokens were made");
    }
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_everything_and_slows_nobody() {
    let app = TestApp::new().await;
    let mut slow = app.open(COMPLETIONS, body(1, 100, json!({"ignore_eos": true}))).await;
    let mut text = slow.next().await.unwrap();
    let other = app
        .ok(
            COMPLETIONS,
            json!({"model": MODEL, "prompt": [5], "max_tokens": 100, "temperature": 0, "ignore_eos": true}),
        )
        .await;
    assert_eq!(other["choices"][0]["text"], app.says(1, 100));
    while let Some(piece) = slow.next().await {
        text += &piece;
    }
    assert!(text.ends_with("data: [DONE]\n\n"));
    let chunks: Vec<Value> =
        text.lines().filter_map(|line| serde_json::from_str(line.strip_prefix("data: ")?).ok()).collect();
    assert_eq!(told(&chunks, 0).0, app.says(1, 100));
}

#[tokio::test]
async fn a_chat_stream_has_a_role_then_text_then_an_empty_end() {
    let app = TestApp::new().await;
    let chunks = app.chunks(CHAT, chat("Hello there", json!({}))).await;
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"][0]).collect();
    assert_eq!(
        *choices[0],
        json!({"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": null, "finish_reason": null})
    );
    let (last, middle) = choices[1..].split_last().unwrap();
    assert_eq!(**last, json!({"index": 0, "delta": {}, "logprobs": null, "finish_reason": "length"}));
    assert!(middle.len() > 5);
    for choice in middle {
        assert_eq!(choice["delta"].as_object().unwrap().keys().collect::<Vec<_>>(), ["content"]);
        assert!(choice["finish_reason"].is_null());
    }
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["model"], MODEL);
    }
    let mut whole = chat("Hello there", json!({}));
    whole["stream"] = json!(false);
    assert_eq!(told(&chunks, 0).0, app.ok(CHAT, whole).await["choices"][0]["message"]["content"]);
}

#[tokio::test]
async fn chat_logprobs_stream_to_the_same_list() {
    let app = TestApp::new().await;
    let mut request = chat("Hello", json!({"logprobs": true, "top_logprobs": 3, "return_token_ids": true}));
    let chunks = app.chunks(CHAT, request.clone()).await;
    request["stream"] = json!(false);
    let whole = app.ok(CHAT, request).await;
    let lists = |path: &str| -> Vec<Value> {
        let mine = chunks.iter().filter_map(|chunk| chunk["choices"][0].pointer(path)?.as_array().cloned());
        mine.flatten().collect()
    };
    assert_eq!(json!(lists("/logprobs/content")), whole["choices"][0]["logprobs"]["content"]);
    assert_eq!(json!(lists("/token_ids")), whole["choices"][0]["token_ids"]);
    assert_eq!(chunks[0]["prompt_token_ids"], whole["prompt_token_ids"]);
}
