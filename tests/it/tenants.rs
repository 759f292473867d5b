//! Strangers on one server: nobody sees, uses, overwrites or deletes another's adapters.

use std::{process::Command, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{TestApp, parts};

#[tokio::test(flavor = "multi_thread")]
async fn two_tenants_do_not_meet() {
    let app = TestApp::tiny("llama").start().await;
    let (ann, bob) = (app.tenant("ann").await, app.tenant("bob").await);
    let send = async |key: &str, method: Method, path: &str, body: Value| {
        parts(app.as_key(key, method, path).json(&body).send().await.expect("an answer")).await
    };
    let of = |x: f64| json!({"name": "mine", "numbers": vec![x; 13]});
    assert_eq!(send(&ann, Method::POST, "/adapters", of(0.5)).await.0, 201);
    let ask = json!({"model": "mine", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "logprobs": 3});

    // Unknown to bob, in every way a name can be used; and a foreign adapter looks exactly like one that does not exist.
    for (method, path, body) in [
        (Method::POST, "/v1/completions", ask.clone()),
        (Method::GET, "/adapters/mine", json!({})),
        (Method::GET, "/adapters/mine/weights?format=raw", json!({})),
        (Method::GET, "/adapters/mine/generations", json!({})),
        (Method::DELETE, "/adapters/mine", json!({})),
        (Method::GET, "/v1/models/mine", json!({})),
        (Method::POST, "/v1/completions", json!({"model": "tiny", "prompt": "x", "adapter": {"name": "mine"}})),
        (
            Method::POST,
            "/v1/completions",
            json!({"model": "tiny", "prompt": "x", "adapter": {"mix": [{"name": "mine", "weight": 1}]}}),
        ),
    ] {
        let foreign = send(&bob, method.clone(), path, body.clone()).await;
        let absent: (u16, Value) = {
            let swap = |text: &str| text.replace("mine", "none");
            send(&bob, method, &swap(path), serde_json::from_str(&swap(&body.to_string())).expect("JSON")).await
        };
        assert_eq!(foreign.0, 404, "{path}");
        assert_eq!(foreign.1.to_string().replace("mine", "none"), absent.1.to_string(), "{path}");
    }
    assert_eq!(send(&bob, Method::GET, "/adapters", json!({})).await.1["data"], json!([]));

    // The same name is free for bob, and each keeps their own.
    let before = send(&ann, Method::POST, "/v1/completions", ask.clone()).await.1;
    assert_eq!(send(&bob, Method::POST, "/adapters", of(-0.5)).await.0, 201);
    let of_ann = send(&ann, Method::POST, "/v1/completions", ask.clone()).await.1;
    let of_bob = send(&bob, Method::POST, "/v1/completions", ask.clone()).await.1;
    assert_eq!(before["choices"], of_ann["choices"]);
    assert_ne!(of_ann["choices"][0]["logprobs"], of_bob["choices"][0]["logprobs"]);
    assert_eq!(send(&bob, Method::DELETE, "/adapters/mine", json!({})).await.0, 204);
    assert_eq!(send(&ann, Method::POST, "/v1/completions", ask.clone()).await.1["choices"], before["choices"]);

    // Equal numbers and prompts of two tenants never share cached blocks.
    let long = json!({"model": "shared", "prompt": vec![9; 64], "max_tokens": 1});
    for key in [&ann, &bob] {
        assert_eq!(
            send(key, Method::POST, "/adapters", json!({"name": "shared", "numbers": vec![0.25; 13]})).await.0,
            201
        );
        let used = send(key, Method::POST, "/v1/completions", long.clone()).await.1;
        assert_eq!(used["usage"]["prompt_tokens_details"]["cached_tokens"], 0, "{used}");
    }
    let again = send(&bob, Method::POST, "/v1/completions", long).await.1;
    assert!(
        again["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().is_some_and(|cached| cached >= 48),
        "{again}"
    );

    // Members manage nothing; a public adapter of an admin is everybody's to use and nobody's to change.
    assert_eq!(send(&bob, Method::GET, "/admin/tenants", json!({})).await.0, 403);
    assert_eq!(
        send(&bob, Method::POST, "/adapters", json!({"name": "p", "numbers": vec![0.5; 13], "public": true})).await.0,
        403
    );
    app.ok("/adapters", &json!({"name": "house", "numbers": vec![0.5; 13], "public": true})).await;
    let house = json!({"model": "house", "prompt": "x", "max_tokens": 1});
    assert_eq!(send(&bob, Method::POST, "/v1/completions", house).await.0, 200);
    assert_eq!(send(&bob, Method::DELETE, "/adapters/house", json!({})).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_made_and_revoked_while_the_server_runs() {
    let app = TestApp::tiny("llama").start().await;
    let mote = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_mote"))
            .args(args)
            .arg("--data-dir")
            .arg(&app.data)
            .output()
            .expect("mote runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    let key = mote(&["keys", "create", "--tenant", "carol"]);
    assert_eq!(key.lines().count(), 1, "the key stands alone on stdout");
    let key = key.trim();
    let models = async || app.as_key(key, Method::GET, "/v1/models").send().await.expect("an answer").status().as_u16();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(models().await, 200);
    let listed = mote(&["keys", "list", "--tenant", "carol"]);
    assert!(!listed.contains(key), "a list never shows a key");
    let id = listed.lines().last().and_then(|line| line.split_whitespace().next()).expect("an id").to_owned();
    mote(&["keys", "revoke", &id]);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(models().await, 401);
    assert!(!app.log().contains(key), "the log never shows a key");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_see_their_own_metrics_and_admins_everybody_s() {
    let app = TestApp::tiny("llama").start().await;
    let (ann, bob) = (app.tenant("ann").await, app.tenant("bob").await);
    for key in [&ann, &bob] {
        let upload = json!({"name": "mine", "numbers": vec![0.5; 13]});
        assert_eq!(
            app.as_key(key, Method::POST, "/adapters").json(&upload).send().await.expect("an answer").status(),
            201
        );
    }
    for (key, model) in [(&ann, "mine"), (&ann, "mine"), (&ann, "tiny"), (&bob, "mine")] {
        let body = json!({"model": model, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": true});
        let answer = app.as_key(key, Method::POST, "/v1/completions").json(&body).send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
    }
    let read = async |key: &str| {
        app.as_key(key, Method::GET, "/metrics").send().await.expect("metrics").text().await.expect("text")
    };
    // A charge is settled when its request is gone, a moment after its answer.
    let mut text = read(&ann).await;
    while !text.contains("mote_tenant_completion_tokens_total{tenant=\"ann\"} 12") {
        tokio::time::sleep(Duration::from_millis(10)).await;
        text = read(&ann).await;
    }
    let line = "mote_tenant_prompt_tokens_total{tenant=\"ann\"} 9";
    assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    // One table has the adapters of all tenants: what is in it of one tells of the others.
    assert!(!text.contains("mote_adapter"), "{text}");
    let own = |line: &str| line.starts_with('#') || line.contains("tenant=\"ann\"");
    assert!(text.lines().all(own), "something of others, or of all, in\n{text}");

    let all = app.request(Method::GET, "/metrics").send().await.expect("metrics").text().await.expect("text");
    for line in [
        "mote_adapter_requests_total{tenant=\"ann\",adapter=\"mine\"} 2",
        "mote_adapter_requests_total{tenant=\"bob\",adapter=\"mine\"} 1",
        "mote_adapters_resident 2",
    ] {
        assert!(all.lines().any(|found| found == line), "no {line} in\n{all}");
    }
}
