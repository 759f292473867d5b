//! Adapters over time, without a socket: generations, the way back, deletion, and lists by the page.

use axum::http::{Method, StatusCode, header};
use serde_json::{Value, json};

use crate::{
    adapters::{json_of, ok, request, send},
    app::{KEY, MODEL, TestApp},
};

#[tokio::test]
async fn a_generation_replaces_another_and_comes_back() {
    let app = TestApp::new().await;
    let first = ok(&app, Method::POST, "/adapters", json_of("a", 0.5)).await;
    let generation = |of: &Value| of["generation"].as_str().unwrap().to_owned();
    let used = async || {
        let answer = app.post("/v1/completions", json!({"model": "a", "prompt": "Hi", "max_tokens": 1})).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.headers["x-adapter-generation"].to_str().unwrap().to_owned()
    };
    assert_eq!(used().await, generation(&first));
    let put = async |tag: Option<&str>, number: f32| {
        let mut request = request(
            KEY,
            Method::PUT,
            "/adapters/a",
            "application/json",
            json!({"numbers": vec![number; 13]}).to_string(),
        );
        if let Some(tag) = tag {
            request.headers_mut().insert(header::IF_MATCH, tag.parse().unwrap());
        }
        app.send(request).await
    };
    let second = put(Some(&format!("\"{}\"", generation(&first))), 0.25).await.json();
    assert_eq!((&second["id"], &second["created_at"]), (&first["id"], &first["created_at"]));
    assert_eq!(used().await, generation(&second));
    let stale = put(Some(&generation(&first)), 0.125).await;
    let expected = (412, "generation_mismatch".into(), Some("If-Match".into()), Some("generation_mismatch".into()));
    assert_eq!(stale.error(), expected);
    assert!(stale.text.contains(&generation(&second)));
    assert_eq!(put(Some("nonsense"), 0.125).await.error().2.as_deref(), Some("If-Match"));
    assert_eq!(put(Some("*"), 0.125).await.status, 200);
    let renamed = json!({"name": "b", "numbers": vec![0.5; 13]});
    assert_eq!(send(&app, KEY, Method::PUT, "/adapters/a", renamed).await.error().2.as_deref(), Some("name"));

    let listed = app.get("/adapters/a/generations").await.json();
    let list: Vec<(String, bool)> =
        listed["data"].as_array().unwrap().iter().map(|each| (generation(each), each["current"] == true)).collect();
    assert_eq!(list.len(), 3);
    assert_eq!(list.iter().map(|each| each.1).collect::<Vec<_>>(), [true, false, false]);
    assert_eq!((&list[2].0, &list[1].0), (&generation(&first), &generation(&second)));
    let back = ok(&app, Method::POST, "/adapters/a/rollback", json!({"generation": generation(&first)})).await;
    assert_eq!(
        (back["generation"].as_str().unwrap(), used().await.as_str()),
        (&*generation(&first), &*generation(&first))
    );
    for (body, status, param) in [
        (json!({"generation": "0".repeat(32)}), 404, "generation"),
        (json!({"generation": "x"}), 400, "generation"),
        (json!({}), 400, "generation"),
    ] {
        let answer = send(&app, KEY, Method::POST, "/adapters/a/rollback", body).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (status, Some(param)));
    }

    assert_eq!(send(&app, KEY, Method::DELETE, "/adapters/a", json!({})).await.status, 204);
    let gone = app.post("/v1/completions", json!({"model": "a", "prompt": "Hi"})).await;
    assert_eq!(gone.error().0, 404, "never the base");
    for (method, path) in [
        (Method::GET, "/adapters/a"),
        (Method::PUT, "/adapters/a"),
        (Method::DELETE, "/adapters/a"),
        (Method::GET, "/adapters/a/weights"),
        (Method::GET, "/adapters/a/generations"),
        (Method::POST, "/adapters/a/rollback"),
    ] {
        let body = json!({"numbers": vec![0.5; 13], "generation": generation(&first)});
        let answer = send(&app, KEY, method, path, body).await;
        assert_eq!((answer.error().0, answer.error().3.as_deref()), (404, Some("adapter_not_found")), "{path}");
    }
    let again = ok(&app, Method::POST, "/adapters", json_of("a", 0.5)).await;
    assert_ne!(again["id"], first["id"]);
    assert_eq!(app.get("/adapters/a/generations").await.json()["data"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn deleting_an_adapter_erases_its_cached_blocks() {
    let app = TestApp::new().await;
    let prompt = app.script[..64].to_vec();
    let cached = async |adapter: Value| {
        let body = json!({"model": MODEL, "prompt": prompt, "max_tokens": 1, "adapter": adapter});
        app.ok("/v1/completions", body).await["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let uses = [
        json!({"name": "a"}),
        json!({"name": "a", "scale": 0.5}),
        json!({"mix": [{"name": "a", "weight": 1}, {"name": "b", "weight": 1}]}),
    ];
    ok(&app, Method::POST, "/adapters", json_of("b", 0.25)).await;
    ok(&app, Method::POST, "/adapters", json_of("a", 0.5)).await;
    for adapter in &uses {
        assert_eq!(cached(adapter.clone()).await, 0);
        assert!(cached(adapter.clone()).await >= 48, "{adapter}");
    }
    assert_eq!(send(&app, KEY, Method::DELETE, "/adapters/a", json!({})).await.status, 204);
    // The very same numbers again: nothing of the erased ones is left.
    ok(&app, Method::POST, "/adapters", json_of("a", 0.5)).await;
    for adapter in uses {
        assert_eq!(cached(adapter.clone()).await, 0, "{adapter}");
    }
}

#[tokio::test]
async fn pages_of_adapters() {
    let app = TestApp::new().await;
    for name in ["c", "a1", "b", "a2", "a3"] {
        ok(&app, Method::POST, "/adapters", json_of(name, 0.5)).await;
    }
    let page = async |query: &str| {
        let page = app.get(&format!("/adapters?{query}")).await.json();
        let names: Vec<String> =
            page["data"].as_array().unwrap().iter().map(|each| each["name"].as_str().unwrap().to_owned()).collect();
        (names.join(" "), page["has_more"].as_bool().unwrap())
    };
    assert_eq!(page("").await, ("a1 a2 a3 b c".into(), false));
    assert_eq!(page("limit=2").await, ("a1 a2".into(), true));
    assert_eq!(page("limit=2&after=a2").await, ("a3 b".into(), true));
    assert_eq!(page("limit=5").await, ("a1 a2 a3 b c".into(), false));
    assert_eq!(page("prefix=a&after=a1").await, ("a2 a3".into(), false));
    let id = app.get("/adapters/a3").await.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(page(&format!("after={id}")).await, ("b c".into(), false), "an id is a place too");
    for query in ["limit=0", "limit=1001", "limit=x"] {
        assert_eq!(app.get(&format!("/adapters?{query}")).await.error().2.as_deref(), Some("limit"));
    }
    let schemes = app.get("/adapters/schemes").await.json();
    assert_eq!((&schemes["base"], &schemes["sites"], &schemes["rank"]), (&json!(MODEL), &json!(7), &json!(2)));
    assert_eq!((&schemes["schemes"][0]["name"], &schemes["schemes"][0]["numbers"]), (&json!("tiny13"), &json!(13)));
}

#[tokio::test]
async fn a_page_of_generations_says_whether_there_are_more() {
    let app = TestApp::new().await;
    let mut made = Vec::new();
    for number in 1..=3 {
        let body = json!({"name": "a", "numbers": vec![f64::from(number); 13], "on_conflict": "new_generation"});
        made.insert(0, ok(&app, Method::POST, "/adapters", body).await["generation"].clone());
    }
    let page = async |query: &str| {
        let page = app.get(&format!("/adapters/a/generations{query}")).await.json();
        let found: Vec<Value> =
            page["data"].as_array().unwrap().iter().map(|each| each["generation"].clone()).collect();
        (found, page["has_more"] == true)
    };
    assert_eq!(page("").await, (made.clone(), false), "all of them, unless asked otherwise");
    assert_eq!(page("?limit=2").await, (made[..2].to_vec(), true));
    let after = made[1].as_str().unwrap();
    assert_eq!(page(&format!("?limit=2&after={after}")).await, (made[2..].to_vec(), false));
    assert_eq!(page(&format!("?after={}", "0".repeat(32))).await, (Vec::new(), false));
    for (query, param) in [("?limit=0", "limit"), ("?limit=1001", "limit"), ("?after=x", "after")] {
        let answer = app.get(&format!("/adapters/a/generations{query}")).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{query}");
    }
}
