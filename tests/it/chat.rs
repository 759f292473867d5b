//! `POST /v1/chat/completions`, whole answers.

use serde_json::{Value, json};

use crate::app::{CONTEXT, MODEL, TestApp};

const PATH: &str = "/v1/chat/completions";

fn request(messages: Value) -> Value {
    json!({"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0})
}

/// What the template of the tests makes of the messages has so many tokens.
fn tokens(app: &TestApp, rendered: &str) -> usize {
    app.state.service.base.tokenizer.encode(rendered, false).unwrap().len()
}

#[tokio::test]
async fn the_shape_is_openais() {
    let app = TestApp::new().await;
    let mut answer = app.ok(PATH, request(json!([{"role": "user", "content": "Hi"}]))).await;
    let prompt = tokens(&app, "user: Hi\n");
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    for volatile in ["id", "created"] {
        assert!(answer.as_object_mut().unwrap().remove(volatile).is_some());
    }
    assert_eq!(
        answer,
        json!({
            "object": "chat.completion",
            "model": MODEL,
            "system_fingerprint": "fp_070707070707",
            "choices": [{
                "index": 0,
                "message": {"role": "assistant", "content": app.says(prompt, 8), "refusal": null},
                "logprobs": null,
                "finish_reason": "length",
            }],
            "usage": {
                "prompt_tokens": prompt, "completion_tokens": 8, "total_tokens": prompt + 8,
                "prompt_tokens_details": {"cached_tokens": 0},
            },
        })
    );
}

#[tokio::test]
async fn messages_reach_the_template_as_they_are_meant() {
    let app = TestApp::new().await;
    let prompt = |answer: Value| answer["usage"]["prompt_tokens"].as_u64().unwrap() as usize;
    for (messages, rendered) in [
        (
            json!([{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]),
            "system: Be brief\nuser: Hi\n",
        ),
        (json!([{"role": "developer", "content": "Be brief"}]), "system: Be brief\n"),
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]),
            "user: one\ntwo\n",
        ),
        (
            json!([{"role": "user", "content": "a", "name": "bob"}, {"role": "assistant", "content": "b", "tool_calls": []}]),
            "user: a\nassistant: b\n",
        ),
    ] {
        let mut body = request(messages);
        body["return_token_ids"] = json!(true);
        let answer = app.ok(PATH, body).await;
        let expected = app.state.service.base.tokenizer.encode(rendered, false).unwrap();
        assert_eq!(answer["prompt_token_ids"], json!(expected));
        assert_eq!(prompt(answer), expected.len());
    }
}

#[tokio::test]
async fn without_max_tokens_a_chat_may_use_the_rest_of_the_context() {
    let app = TestApp::new().await;
    let mut body = request(json!([{"role": "user", "content": "Hi"}]));
    body.as_object_mut().unwrap().remove("max_tokens");
    body["ignore_eos"] = json!(true);
    body["stop"] = json!(["sleep, and"]);
    let stopped = app.ok(PATH, body.clone()).await;
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    // Past the end of the script the model would fail: bias it to one token instead.
    body["logit_bias"] = json!({"20": 100});
    body["stop"] = Value::Null;
    let answer = app.ok(PATH, body).await;
    assert_eq!(answer["usage"]["total_tokens"], CONTEXT);
}

#[tokio::test]
async fn both_names_of_the_limit_work_and_the_newer_wins() {
    let app = TestApp::new().await;
    let mut body = request(json!([{"role": "user", "content": "Hi"}]));
    body["max_completion_tokens"] = json!(3);
    assert_eq!(app.ok(PATH, body).await["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn logprobs_have_bytes_and_alternatives() {
    let app = TestApp::new().await;
    let mut body = request(json!([{"role": "user", "content": "Hi"}]));
    body["logprobs"] = json!(true);
    body["max_tokens"] = json!(60);
    let plain = app.ok(PATH, body.clone()).await;
    let content = plain["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(content.iter().all(|entry| entry["top_logprobs"] == json!([])));
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap().iter().map(|byte| byte.as_u64().unwrap() as u8))
        .collect();
    assert_eq!(String::from_utf8(bytes).unwrap(), plain["choices"][0]["message"]["content"].as_str().unwrap());
    assert!(plain["choices"][0]["message"]["content"].as_str().unwrap().contains('🦊'));

    body["top_logprobs"] = json!(5);
    let top = app.ok(PATH, body).await;
    for entry in top["choices"][0]["logprobs"]["content"].as_array().unwrap() {
        let alternatives = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(alternatives.len(), 5);
        assert_eq!(alternatives[0]["token"], entry["token"]);
        assert_eq!(alternatives[0]["logprob"], entry["logprob"]);
        let values: Vec<f64> = alternatives.iter().map(|other| other["logprob"].as_f64().unwrap()).collect();
        assert!(values.windows(2).all(|pair| pair[0] >= pair[1]));
    }
}

#[tokio::test]
async fn what_asks_for_nothing_is_no_error() {
    let app = TestApp::new().await;
    let mut body = request(json!([{"role": "user", "content": "Hi"}]));
    let harmless = json!({
        "tools": [], "tool_choice": "none", "functions": null, "response_format": {"type": "text"}, "modalities": ["text"],
        "store": false, "audio": null, "user": "me", "metadata": {"a": "b"}, "stop": null, "n": null, "seed": null,
        "logprobs": false, "stream": false, "some_future_field": {"x": 1},
    });
    body.as_object_mut().unwrap().extend(harmless.as_object().unwrap().clone());
    app.ok(PATH, body).await;
}
