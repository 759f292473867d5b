//! `POST /v1/completions`, whole answers.

use serde_json::{Value, json};

use crate::app::{CONTEXT, MODEL, TestApp};

const PATH: &str = "/v1/completions";

/// A greedy completion of a prompt of so many tokens.
fn body(prompt: usize, max_tokens: usize) -> Value {
    json!({"model": MODEL, "prompt": vec![5; prompt], "max_tokens": max_tokens, "temperature": 0})
}

fn with(mut body: Value, extra: Value) -> Value {
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

#[tokio::test]
async fn the_shape_is_openais() {
    let app = TestApp::new().await;
    let mut answer = app.ok(PATH, body(3, 4)).await;
    assert!(answer["id"].as_str().unwrap().starts_with("cmpl-"));
    assert!(answer["created"].as_u64().unwrap() > 1_700_000_000);
    for volatile in ["id", "created"] {
        answer.as_object_mut().unwrap().remove(volatile);
    }
    assert_eq!(
        answer,
        json!({
            "object": "text_completion",
            "model": MODEL,
            "system_fingerprint": "fp_070707070707",
            "choices": [{"index": 0, "text": app.says(3, 4), "logprobs": null, "finish_reason": "length"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 0}},
        })
    );
}

#[tokio::test]
async fn a_prompt_has_four_forms() {
    let app = TestApp::new().await;
    let texts = |answer: &Value| -> Vec<(u64, String)> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|c| (c["index"].as_u64().unwrap(), c["text"].as_str().unwrap().to_owned())).collect()
    };
    let tokens = |text: &str| app.state.service.base.tokenizer.encode(text, true).unwrap().len();
    let (hello, fox) = (tokens("Hello"), tokens("the fox"));
    let expect = |n: usize| app.says(n, 16);
    for (prompt, expected) in [
        (json!("Hello"), vec![expect(hello)]),
        (json!(["Hello", "the fox"]), vec![expect(hello), expect(fox)]),
        (json!([9, 8, 7]), vec![expect(3)]),
        (json!([[9], [9, 8]]), vec![expect(1), expect(2)]),
    ] {
        let answer = app.ok(PATH, json!({"model": MODEL, "prompt": prompt, "temperature": 0})).await;
        let expected: Vec<_> = expected.into_iter().enumerate().map(|(index, text)| (index as u64, text)).collect();
        assert_eq!(texts(&answer), expected);
        assert_eq!(answer["usage"]["completion_tokens"], 16 * expected.len(), "16 is the default");
    }
}

#[tokio::test]
async fn an_eos_token_ends_a_choice_unless_it_may_not() {
    let app = TestApp::new().await;
    let prompt = app.eos_at - 4;
    let choice = |answer: &Value| answer["choices"][0].clone();

    let answer = app.ok(PATH, with(body(prompt, 20), json!({"return_token_ids": true}))).await;
    assert_eq!(choice(&answer)["text"], app.says(prompt, 4));
    assert_eq!(choice(&answer)["finish_reason"], "stop");
    assert_eq!(choice(&answer)["token_ids"], json!(&app.script[prompt..prompt + 5]), "the stop token is among the ids");
    assert_eq!(choice(&answer)["prompt_token_ids"], json!(vec![5; prompt]));
    assert_eq!(answer["usage"]["completion_tokens"], 5);

    let answer = app.ok(PATH, with(body(prompt, 20), json!({"ignore_eos": true}))).await;
    assert_eq!(choice(&answer)["text"], app.says(prompt, 20));
    assert_eq!(choice(&answer)["finish_reason"], "length");

    let answer = app.ok(PATH, with(body(prompt, 20), json!({"min_tokens": 10}))).await;
    assert_eq!(answer["usage"]["completion_tokens"], 20, "the one place for the stop token was forbidden");
}

#[tokio::test]
async fn a_stop_string_ends_a_choice_and_is_not_shown() {
    let app = TestApp::new().await;
    let prompt = app.find(" Then");
    for (stop, left) in
        [(json!("END"), "END"), (json!(["more words", "END came"]), "END came"), (json!(["came, a"]), "came, a")]
    {
        let answer = app.ok(PATH, with(body(prompt, 40), json!({"stop": stop, "ignore_eos": true}))).await;
        let said = app.says(prompt, 40);
        let choice = &answer["choices"][0];
        assert_eq!(choice["text"], said[..said.find(left).unwrap()], "{stop}");
        assert_eq!(choice["finish_reason"], "stop");
        let used = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!((2..40).contains(&used), "{used}");
    }
    let answer = app.ok(PATH, with(body(prompt, 20), json!({"stop": "no such words", "ignore_eos": true}))).await;
    assert_eq!(answer["choices"][0]["text"], app.says(prompt, 20), "what was held back is shown at the end");
}

#[tokio::test]
async fn a_stop_string_waits_for_min_tokens() {
    let app = TestApp::new().await;
    let prompt = app.find(" Then");
    let first = app.says(prompt, 1);
    let stopped = app.ok(PATH, with(body(prompt, 30), json!({"stop": first}))).await;
    assert_eq!(stopped["choices"][0]["text"], "");
    let later = app.ok(PATH, with(body(prompt, 30), json!({"stop": first, "min_tokens": 2, "ignore_eos": true}))).await;
    assert!(later["choices"][0]["text"].as_str().unwrap().starts_with(&app.says(prompt, 2)));
}

#[tokio::test]
async fn logprobs_cover_every_token_of_the_text() {
    let app = TestApp::new().await;
    let prompt = app.find("little");
    let answer = app.ok(PATH, with(body(prompt, 24), json!({"logprobs": 2}))).await;
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let lists: Vec<&Vec<Value>> =
        ["tokens", "token_logprobs", "top_logprobs", "text_offset"].map(|key| logprobs[key].as_array().unwrap()).into();
    assert!(lists.iter().all(|list| list.len() == 24));
    let text: Vec<char> = choice["text"].as_str().unwrap().chars().collect();
    let entry = |list: usize, at: usize| &lists[list][at];
    let mut whole = 0;
    for at in 0..24 {
        let token = entry(0, at).as_str().unwrap();
        let offset = entry(3, at).as_u64().unwrap() as usize;
        if !token.contains('\u{fffd}') {
            let here: String = text[offset..offset + token.chars().count()].iter().collect();
            assert_eq!(here, token, "an offset counts characters of the text");
            whole += 1;
        }
        let own = entry(1, at).as_f64().unwrap();
        let top = entry(2, at).as_object().unwrap();
        assert!((2..=3).contains(&top.len()) || token.contains('\u{fffd}'), "{top:?}");
        assert_eq!(top[token].as_f64().unwrap(), own, "greedy: the chosen one is among the likeliest");
        assert!(top.values().all(|other| other.as_f64().unwrap() <= own));
        assert!(own < 0.0 && own > -0.5);
    }
    assert!(whole >= 18, "the crab is the exception");
    assert!(choice["text"].as_str().unwrap().contains("fox 🦊 who"));
}

#[tokio::test]
async fn logprobs_do_not_show_what_is_not_in_the_text() {
    let app = TestApp::new().await;
    let tokens = |answer: &Value| answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().len();
    let near_eos = body(app.eos_at - 3, 10);
    assert_eq!(tokens(&app.ok(PATH, with(near_eos.clone(), json!({"logprobs": 0}))).await), 3);
    let with_ids = app.ok(PATH, with(near_eos, json!({"logprobs": 0, "return_token_ids": true}))).await;
    assert_eq!(tokens(&with_ids), 4, "ids and log-probs go together");
    let prompt = app.find(" Then");
    let stop = json!({"logprobs": 0, "stop": "END"});
    let answer = app.ok(PATH, with(body(prompt, 30), stop)).await;
    let shown: String =
        answer["choices"][0]["logprobs"]["tokens"].as_array().unwrap().iter().map(|t| t.as_str().unwrap()).collect();
    assert_eq!(answer["choices"][0]["text"], shown);
}

#[tokio::test]
async fn echo_puts_the_prompt_first_and_scores_it() {
    let app = TestApp::new().await;
    let prompt = "the naïve fox 🦊 sat";
    let tokens = app.state.service.base.tokenizer.encode(prompt, true).unwrap();
    let n = tokens.len();
    let request = json!({"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0, "echo": true});
    let answer = app.ok(PATH, request.clone()).await;
    assert_eq!(answer["choices"][0]["text"], format!("{prompt}{}", app.says(n, 3)));
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);

    let scored = app.ok(PATH, with(request.clone(), json!({"logprobs": 1}))).await;
    let logprobs = &scored["choices"][0]["logprobs"];
    let values = logprobs["token_logprobs"].as_array().unwrap();
    assert_eq!(values.len(), n + 3);
    assert!(values[0].is_null() && logprobs["top_logprobs"][0].is_null(), "nothing comes before the first token");
    assert!(values[1..].iter().all(|value| value.as_f64().unwrap() < 0.0));
    let characters = prompt.chars().count() as u64;
    assert_eq!(logprobs["text_offset"][n], characters, "the completion begins where the prompt ends");

    let only = app.ok(PATH, with(request, json!({"logprobs": 1, "max_tokens": 0}))).await;
    let choice = &only["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(prompt), &json!("length")));
    assert_eq!(choice["logprobs"]["token_logprobs"].as_array().unwrap()[..], values[..n], "the same scores");
    assert_eq!(only["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn echo_spells_a_prompt_of_tokens() {
    let app = TestApp::new().await;
    let ids = app.state.service.base.tokenizer.encode("a 🦊", true).unwrap();
    let request = json!({"model": MODEL, "prompt": ([&[1], &ids[..]].concat()), "max_tokens": 0, "echo": true});
    assert_eq!(app.ok(PATH, request).await["choices"][0]["text"], "<bos>a 🦊");
}

#[tokio::test]
async fn a_seed_repeats_and_choices_differ() {
    let app = TestApp::new().await;
    let request = json!({"model": MODEL, "prompt": [5, 5], "temperature": 2, "max_tokens": 24, "n": 3, "seed": 11});
    let texts = |answer: Value| -> Vec<String> {
        answer["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let first = texts(app.ok(PATH, request.clone()).await);
    assert_eq!(first, texts(app.ok(PATH, request.clone()).await));
    assert!(first[0] != first[1] && first[1] != first[2] && first[0] != first[2], "{first:?}");
    let alone = texts(app.ok(PATH, with(request.clone(), json!({"n": 1}))).await);
    assert_eq!(alone[0], first[0], "choice 0 does not depend on how many there are");
    let unseeded = with(request, json!({"seed": null}));
    assert_ne!(texts(app.ok(PATH, unseeded.clone()).await), texts(app.ok(PATH, unseeded).await));
}

#[tokio::test]
async fn best_of_returns_the_likeliest() {
    let app = TestApp::new().await;
    let request = json!({"model": MODEL, "prompt": [[5, 5], [5, 5, 5]], "temperature": 1.5, "max_tokens": 12, "seed": 3, "logprobs": 0});
    let means = |answer: &Value| -> Vec<f64> {
        let mean = |choice: &Value| {
            let values = choice["logprobs"]["token_logprobs"].as_array().unwrap();
            values.iter().map(|value| value.as_f64().unwrap()).sum::<f64>() / values.len() as f64
        };
        answer["choices"].as_array().unwrap().iter().map(mean).collect()
    };
    let all = app.ok(PATH, with(request.clone(), json!({"n": 6, "ignore_eos": true}))).await;
    let best = app.ok(PATH, with(request, json!({"n": 2, "best_of": 6, "ignore_eos": true}))).await;
    assert_eq!(best["usage"]["completion_tokens"], 2 * 6 * 12, "all six were made");
    assert_eq!(best["usage"]["prompt_tokens"], 5);
    let mut expected = Vec::new();
    for group in means(&all).chunks(6) {
        let mut group = group.to_vec();
        group.sort_by(|a, b| b.total_cmp(a));
        expected.extend_from_slice(&group[..2]);
    }
    assert_eq!(means(&best), expected);
    let indices: Vec<u64> = best["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
}

#[tokio::test]
async fn usage_says_what_the_prefix_cache_saved() {
    let app = TestApp::new().await;
    let cached = |answer: Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(app.ok(PATH, body(40, 2)).await), 0);
    assert_eq!(cached(app.ok(PATH, body(40, 2)).await), 32, "whole blocks of 16, never the last token");
    let stopped = with(body(40, 30), json!({"stop": app.says(42, 1)}));
    assert_eq!(cached(app.ok(PATH, stopped).await), 32, "also when a stop string cuts the request off");
}

#[tokio::test]
async fn a_bias_and_the_ids_without_a_token() {
    let app = TestApp::new().await;
    let request = json!({"model": MODEL, "prompt": [5], "temperature": 0, "max_tokens": 3, "logit_bias": {"310": 100}, "return_token_ids": true, "logprobs": 1});
    let answer = app.ok(PATH, request).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["token_ids"], json!([310, 310, 310]));
    assert_eq!(choice["text"], "", "an id that the tokenizer does not have is no text");
    assert!(choice["logprobs"]["token_logprobs"][0].as_f64().unwrap() < -5.0, "log-probs are of the raw logits");
}

#[tokio::test]
async fn without_max_tokens_a_completion_ends_with_the_context() {
    let app = TestApp::new().await;
    let answer = app.ok(PATH, json!({"model": MODEL, "prompt": vec![5; CONTEXT - 7], "temperature": 0})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 7);
}
