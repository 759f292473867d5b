//! `/adapters`, without a socket: every form of upload, replacement, deletion, batches.

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mote::{http::Limits, store::NewKey, tenant::ApiKey, tenant::Role};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::app::{Answer, KEY, MODEL, Options, TestApp};

const ADMIN: &str = "mote-sk-test-admin-0123456789abcdef";
const OTHER: &str = "mote-sk-test-other-0123456789abcdef";

/// Thirteen bf16 numbers.
pub(crate) fn raw(number: f32) -> Vec<u8> {
    number.to_le_bytes()[2..].repeat(13)
}

pub(crate) fn json_of(name: &str, number: f32) -> Value {
    json!({"name": name, "numbers": vec![number; 13]})
}

pub(crate) fn request(key: &str, method: Method, path: &str, media: &str, body: impl Into<Body>) -> Request<Body> {
    let builder = Request::builder().method(method).uri(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
    builder.header(header::CONTENT_TYPE, media).body(body.into()).unwrap()
}

pub(crate) async fn send(app: &TestApp, key: &str, method: Method, path: &str, body: Value) -> Answer {
    app.send(request(key, method, path, "application/json", body.to_string())).await
}

/// A 2xx's body.
pub(crate) async fn ok(app: &TestApp, method: Method, path: &str, body: Value) -> Value {
    let answer = send(app, KEY, method, path, body).await;
    assert!(answer.status.is_success(), "{path}: {}", answer.text);
    answer.json()
}

pub(crate) async fn with_keys() -> TestApp {
    let app = TestApp::new().await;
    for (key, tenant, role) in [(ADMIN, "default", Role::Admin), (OTHER, "other", Role::Member)] {
        let key = ApiKey::chosen(key).unwrap();
        let tenant = tenant.to_owned();
        let new = NewKey { key, tenant, create_tenant: true, role, expires_at: None, only_first: false };
        app.state.service.store.create_key(new).await.unwrap();
    }
    app
}

#[tokio::test]
async fn the_forms_of_an_upload_are_one_adapter() {
    let app = TestApp::new().await;
    let bytes = raw(0.5);
    let path = "/adapters?name=a&scheme=tiny13&dtype=bf16";
    let answer = app.send(request(KEY, Method::POST, path, "application/octet-stream", bytes.clone())).await;
    assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
    let first = answer.json();
    assert_eq!(answer.headers[header::ETAG], format!("\"{}\"", first["generation"].as_str().unwrap()));
    let keys: Vec<&str> = first.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "id",
            "object",
            "name",
            "generation",
            "bytes",
            "dtype",
            "scheme",
            "fingerprint",
            "owner",
            "public",
            "metadata",
            "created_at"
        ]
    );
    let fingerprint = app.state.service.base.fingerprint.to_string();
    for (key, value) in [
        ("object", json!("adapter")),
        ("name", json!("a")),
        ("bytes", json!(26)),
        ("dtype", json!("bf16")),
        ("scheme", json!("tiny13")),
        ("fingerprint", json!(fingerprint)),
        ("owner", json!("acme")),
        ("public", json!(false)),
        ("metadata", json!({})),
    ] {
        assert_eq!(first[key], value, "{key}");
    }
    let forms = [
        json!({"name": "b", "data": STANDARD.encode(&bytes), "metadata": {"who": "me"}}),
        json!({"name": "c", "numbers": vec![0.5; 13], "dtype": "bf16", "fingerprint": fingerprint, "extra": 1}),
        json!({"name": "d", "numbers": vec![0.5; 13], "scheme": {"convention": "peft", "rank": 2, "u": 1, "ties": {"kind": "groups", "count": 13}, "seed": 42}}),
    ];
    for form in forms {
        let made = ok(&app, Method::POST, "/adapters", form).await;
        assert_eq!(made["generation"], first["generation"]);
        assert_eq!(made["scheme"], "tiny13");
    }
    assert_eq!(app.get("/adapters/b").await.json()["metadata"], json!({"who": "me"}));
    let wide =
        ok(&app, Method::POST, "/adapters", json!({"name": "w", "numbers": vec![0.1; 13], "dtype": "f32"})).await;
    assert_eq!((&wide["bytes"], &wide["dtype"]), (&json!(52), &json!("f32")));

    let read = app.send(request(KEY, Method::GET, "/adapters/a/weights?format=raw", "", Body::empty())).await;
    assert_eq!((read.status, read.text.as_bytes()), (StatusCode::OK, &bytes[..]));
    assert_eq!(read.headers["x-adapter-generation"], first["generation"].as_str().unwrap());
    let read = app.get("/adapters/w/weights?format=json").await.json();
    assert_eq!(read["numbers"], json!(vec![f64::from(0.1f32); 13]), "exactly what is stored");
    assert_eq!(read["data"], STANDARD.encode(0.1f32.to_le_bytes().repeat(13)));
    assert_eq!(app.get("/adapters/a/weights?format=csv").await.error().2.as_deref(), Some("format"));
    // PEFT's rule gives no 13 groups on 7 sites, and one group for all.
    let none = app.get("/adapters/a/weights?format=peft").await;
    assert_eq!((none.error().0, none.error().2.as_deref()), (400, Some("format")));
    ok(&app, Method::POST, "/adapters", json!({"name": "tied", "numbers": vec![0.5; 13], "scheme": "u13-tied"})).await;
    let path = "/adapters/tied/weights?format=peft";
    let answer = app.router.clone().oneshot(request(KEY, Method::GET, path, "", Body::empty())).await.unwrap();
    assert_eq!(
        (answer.status(), &answer.headers()[header::CONTENT_TYPE]),
        (StatusCode::OK, &"application/zip".parse().unwrap())
    );
    let zip = axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap().to_vec();
    assert_eq!(app.get("/adapters/nobody/weights?format=peft").await.status, 404);

    // The same checkpoint back, as an archive and as two files.
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(&zip)).unwrap();
    let mut file = |name: &str| {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut archive.by_name(name).unwrap(), &mut bytes).unwrap();
        bytes
    };
    let (config, model) = (file("adapter_config.json"), file("adapter_model.safetensors"));
    for (name, parts) in [
        ("archived", vec![("archive", zip.clone())]),
        ("filed", vec![("adapter_config", config), ("adapter_model", model)]),
    ] {
        let (media, body) = form(&[&[("name", name.as_bytes().to_vec())], &parts[..]].concat());
        let answer = app.send(request(KEY, Method::POST, "/adapters", &media, body)).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{}", answer.text);
        let numbers = app.get(&format!("/adapters/{name}/weights?format=json")).await.json();
        assert_eq!(numbers["numbers"], json!(vec![0.5; 13]));
    }
}

fn form(parts: &[(&str, Vec<u8>)]) -> (String, Vec<u8>) {
    let mut body = Vec::new();
    for (name, bytes) in parts {
        body.extend(
            format!("--edge\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"f\"\r\n\r\n").bytes(),
        );
        body.extend(bytes);
        body.extend(b"\r\n");
    }
    body.extend(b"--edge--\r\n");
    ("multipart/form-data; boundary=edge".into(), body)
}

#[tokio::test]
async fn what_is_no_adapter_is_refused_and_named() {
    let app = TestApp::new().await;
    let taken = (409, "conflict".to_owned(), Some("name".to_owned()), Some("name_taken".to_owned()));
    assert_eq!(send(&app, KEY, Method::POST, "/adapters", json_of(MODEL, 0.5)).await.error(), taken);
    ok(&app, Method::POST, "/adapters", json_of("a", 0.5)).await;
    let again = send(&app, KEY, Method::POST, "/adapters", json_of("a", 0.25)).await;
    assert_eq!(again.error(), taken);
    assert_eq!(again.headers["x-should-retry"], "false");
    let zeros = vec![0; 13];
    let rows = [
        (json!({"numbers": zeros}), "name"),
        (json!({"name": null, "numbers": zeros}), "name"),
        (json!({"name": 5, "numbers": zeros}), "name"),
        (json!({"name": "", "numbers": zeros}), "name"),
        (json!({"name": "a/b", "numbers": zeros}), "name"),
        (json!({"name": "batch", "numbers": zeros}), "name"),
        (json!({"name": "x".repeat(65), "numbers": zeros}), "name"),
        (json!({"name": "x"}), "data"),
        (json!({"name": "x", "data": ""}), "data"),
        (json!({"name": "x", "data": "not base64!"}), "data"),
        (json!({"name": "x", "data": "AAAA"}), "data"),
        (json!({"name": "x", "data": STANDARD.encode([0; 52])}), "data"),
        (json!({"name": "x", "data": "AAAA", "numbers": zeros}), "data"),
        (json!({"name": "x", "numbers": []}), "numbers"),
        (json!({"name": "x", "numbers": [1, 2]}), "numbers"),
        (json!({"name": "x", "numbers": vec![1e39; 13]}), "numbers"),
        (json!({"name": "x", "numbers": ["1"]}), "numbers[0]"),
        (json!({"name": "x", "numbers": zeros, "dtype": "f16"}), "dtype"),
        (json!({"name": "x", "numbers": zeros, "scheme": "tiny14"}), "scheme"),
        (json!({"name": "x", "numbers": zeros, "scheme": {"rnak": 2}}), "scheme.rnak"),
        (json!({"name": "x", "numbers": zeros, "scheme": {"rank": 3}}), "scheme.rank"),
        (json!({"name": "x", "numbers": zeros, "metadata": [1]}), "metadata"),
        (json!({"name": "x", "numbers": zeros, "metadata": {"long": "x".repeat(20_000)}}), "metadata"),
        (json!({"name": "x", "numbers": zeros, "fingerprint": "AB"}), "fingerprint"),
        (json!({"name": "x", "numbers": zeros, "fingerprint": "A".repeat(64)}), "fingerprint"),
        (json!({"name": "x", "numbers": zeros, "on_conflict": "replace"}), "on_conflict"),
        (json!({"name": "x", "numbers": zeros, "force": "yes"}), "force"),
    ];
    for (body, param) in rows {
        let answer = send(&app, KEY, Method::POST, "/adapters", body.clone()).await;
        assert_eq!(answer.error(), (400, "invalid_request_error".into(), Some(param.into()), None), "{body}");
    }
    for bytes in
        [vec![], raw(0.5)[..25].to_vec(), [raw(0.5), vec![0]].concat(), raw(f32::NAN), raw(f32::INFINITY), vec![0; 52]]
    {
        let answer = app.send(request(KEY, Method::POST, "/adapters?name=x", "application/octet-stream", bytes)).await;
        assert_eq!(answer.error().2.as_deref(), Some("data"), "{}", answer.text);
    }
    let other = "ab".repeat(32);
    let body = json!({"name": "x", "numbers": zeros, "fingerprint": other});
    let answer = send(&app, KEY, Method::POST, "/adapters", body).await;
    assert_eq!((answer.error().0, answer.error().3.as_deref()), (422, Some("incompatible_adapter")));
    let ours = app.state.service.base.fingerprint.to_string();
    assert!(answer.text.contains(&other) && answer.text.contains(&ours), "{}", answer.text);
    let public = json!({"name": "x", "numbers": zeros, "public": true});
    assert_eq!(send(&app, KEY, Method::POST, "/adapters", public).await.error().0, 403);
    assert_eq!(app.get("/adapters").await.json()["data"].as_array().unwrap().len(), 1, "nothing of this was stored");

    // Forms of PEFT's files that are none.
    for (parts, param) in [
        (vec![("name", b"x".to_vec())], "adapter_config"),
        (vec![("name", b"x".to_vec()), ("adapter_config", b"{}".to_vec())], "adapter_model"),
        (vec![("name", b"x".to_vec()), ("archive", b"PK nothing".to_vec())], "archive"),
        (
            vec![("name", b"x".to_vec()), ("adapter_config", b"[]".to_vec()), ("adapter_model", b"x".to_vec())],
            "adapter_config",
        ),
        (vec![("archive", b"PK".to_vec()), ("adapter_config", b"{}".to_vec())], "archive"),
        (vec![("name", b"x".to_vec()), ("metadata", b"[1".to_vec())], "metadata"),
    ] {
        let (media, body) = form(&parts);
        let answer = app.send(request(KEY, Method::POST, "/adapters", &media, body)).await;
        assert_eq!((answer.error().0, answer.error().2.as_deref()), (400, Some(param)), "{}", answer.text);
    }
}

/// Each request has every later fault too, so only the order decides.
#[tokio::test]
async fn checks_run_in_the_stated_order() {
    let app = TestApp::with(Options { limits: Limits { body: 50, batch: 90 }, ..Options::default() }).await;
    let long = "{".repeat(91);
    let json = "application/json";
    let steps = [
        (request("none", Method::PATCH, "/adapters/a/b/c/d", "text/plain", long.clone()), 404),
        (request("none", Method::PATCH, "/adapters", "text/plain", long.clone()), 405),
        (request("none", Method::POST, "/adapters", "text/plain", long.clone()), 401),
        (request(KEY, Method::POST, "/adapters?force=maybe", "text/plain", long.clone()), 415),
        (request(KEY, Method::POST, "/adapters?force=maybe", json, long.clone()), 413),
        (request(KEY, Method::POST, "/adapters?force=maybe", json, "{"), 400),
        (request(KEY, Method::POST, "/adapters?force=maybe", json, "{}"), 400),
        (request(KEY, Method::PUT, "/adapters/none", json, "{}"), 400),
        (request(KEY, Method::PUT, "/adapters/none", json, r#"{"numbers":[0,0,0,0,0,0,0,0,0,0,0,0,0]}"#), 404),
        (request(KEY, Method::PUT, "/adapters/..", json, "{}"), 404),
        (request("none", Method::POST, "/adapters/batch", "text/plain", long.clone()), 401),
        (request(KEY, Method::POST, "/adapters/batch", "text/plain", long.clone()), 415),
        (request("none", Method::GET, "/admin/tenants", "", ""), 401),
        (request(KEY, Method::POST, "/admin/tenants", "text/plain", long), 403),
    ];
    for (at, (request, status)) in steps.into_iter().enumerate() {
        let answer = app.send(request).await;
        assert_eq!(answer.error().0, status, "step {at}: {}", answer.text);
    }
    let mut announced = request(KEY, Method::POST, "/adapters/batch", "application/x-ndjson", "");
    announced.headers_mut().insert(header::CONTENT_LENGTH, 91.into());
    assert_eq!(app.send(announced).await.error().0, 413);
}

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
async fn a_request_sent_again_is_the_same_upload() {
    let app = with_keys().await;
    let keyed = async |key: &str, idempotency: &str, body: Value| {
        let mut request = request(key, Method::POST, "/adapters", "application/json", body.to_string());
        request.headers_mut().insert("idempotency-key", idempotency.parse().unwrap());
        app.send(request).await
    };
    let first = keyed(KEY, "k1", json_of("a", 0.5)).await;
    let again = keyed(KEY, "k1", json_of("a", 0.5)).await;
    assert_eq!((first.status, again.status), (StatusCode::CREATED, StatusCode::CREATED));
    assert_eq!(first.json(), again.json());
    let differs = keyed(KEY, "k1", json_of("a", 0.25)).await;
    assert_eq!((differs.error().0, differs.error().3.as_deref()), (409, Some("idempotency_key_reused")));
    assert_eq!(keyed(KEY, "k2", json_of("a", 0.5)).await.error().3.as_deref(), Some("name_taken"));
    assert_eq!(keyed(OTHER, "k1", json_of("a", 0.25)).await.status, 201, "a key is its tenant's own");
    assert_eq!(keyed(KEY, &"k".repeat(256), json_of("b", 0.5)).await.error().2.as_deref(), Some("Idempotency-Key"));
    // Gone or not, the answer stays the same.
    send(&app, KEY, Method::DELETE, "/adapters/a", json!({})).await;
    assert_eq!(keyed(KEY, "k1", json_of("a", 0.5)).await.json(), first.json());
}

#[tokio::test]
async fn a_public_adapter_is_everybodys_to_use_and_nobodys_to_change() {
    let app = with_keys().await;
    let house = json!({"name": "house", "numbers": vec![0.5; 13], "public": true, "metadata": {"k": 1}});
    assert_eq!(send(&app, ADMIN, Method::POST, "/adapters", house).await.status, 201);
    let seen = app.get("/adapters/house").await.json();
    assert_eq!((&seen["public"], &seen["owner"]), (&json!(true), &json!("default")));
    app.ok("/v1/completions", json!({"model": "house", "prompt": "Hi", "max_tokens": 1})).await;
    for (method, path) in [
        (Method::DELETE, "/adapters/house"),
        (Method::PUT, "/adapters/house"),
        (Method::GET, "/adapters/house/generations"),
        (Method::POST, "/adapters/house/rollback"),
    ] {
        let body = json!({"numbers": vec![0.5; 13], "generation": "0".repeat(32)});
        assert_eq!(send(&app, KEY, method, path, body).await.error().0, 404, "{path}");
    }
    // An own one of that name comes first, for its owner alone.
    ok(&app, Method::POST, "/adapters", json_of("house", 0.25)).await;
    assert_eq!(app.get("/adapters/house").await.json()["owner"], "acme");
    assert_eq!(app.get("/adapters").await.json()["data"].as_array().unwrap().len(), 1);
    let of_other = send(&app, OTHER, Method::GET, "/adapters/house", json!({})).await.json();
    assert_eq!(of_other["owner"], "default");
    let rival = json!({"name": "house", "numbers": vec![0.25; 13], "public": false, "on_conflict": "new_generation"});
    assert_eq!(send(&app, ADMIN, Method::POST, "/adapters", rival).await.json()["public"], false);
    assert_eq!(send(&app, OTHER, Method::GET, "/adapters/house", json!({})).await.status, 404);
}

#[tokio::test]
async fn a_public_adapter_is_its_tenant_s_admins_to_change() {
    const MEMBER: &str = "a-member-of-the-house-0123456789";
    let app = with_keys().await;
    let key = ApiKey::chosen(MEMBER).unwrap();
    let tenant = "default".to_owned();
    let role = Role::Member;
    let new = NewKey { key, tenant, create_tenant: false, role, expires_at: None, only_first: false };
    app.state.service.store.create_key(new).await.unwrap();
    let house = |x: f64| json!({"name": "house", "numbers": vec![x; 13], "public": true});
    let first = send(&app, ADMIN, Method::POST, "/adapters", house(0.5)).await.json();
    assert_eq!(send(&app, ADMIN, Method::PUT, "/adapters/house", house(0.25)).await.status, 200);
    let before = app.get("/adapters/house").await.json();

    let again = json!({"name": "house", "numbers": vec![0.125; 13], "on_conflict": "new_generation"});
    let hidden = json!({"name": "house", "numbers": vec![0.125; 13], "on_conflict": "new_generation", "public": false});
    for (method, path, body) in [
        (Method::PUT, "/adapters/house", json!({"numbers": vec![0.125; 13]})),
        (Method::POST, "/adapters", again.clone()),
        (Method::POST, "/adapters", hidden),
        (Method::POST, "/adapters/house/rollback", json!({"generation": first["generation"]})),
        (Method::DELETE, "/adapters/house", json!({})),
    ] {
        let refused = send(&app, MEMBER, method.clone(), path, body).await;
        assert_eq!(refused.error(), (403, "permission_error".into(), None, None), "{method} {path}");
    }
    let lines = format!("{again}\n{}", json_of("mine", 0.5));
    let batch = app.send(request(MEMBER, Method::POST, "/adapters/batch", "application/x-ndjson", lines)).await;
    let (refused, stored) = batch.text.split_once('\n').unwrap();
    assert!(refused.contains("permission_error") && stored.contains("generation"), "{}", batch.text);
    assert_eq!(app.get("/adapters/house").await.json(), before);
    // A name that is taken is no secret to its owner, and what is not public is a member's.
    let taken = send(&app, MEMBER, Method::POST, "/adapters", json_of("house", 0.5)).await;
    assert_eq!(taken.error().3.as_deref(), Some("name_taken"));
    assert_eq!(send(&app, MEMBER, Method::DELETE, "/adapters/mine", json!({})).await.status, 204);
    assert_eq!(send(&app, ADMIN, Method::DELETE, "/adapters/house", json!({})).await.status, 204);
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

#[tokio::test]
async fn admins_manage_tenants_and_keys() {
    let app = with_keys().await;
    let admin = async |method: Method, path: &str, body: Value| send(&app, ADMIN, method, path, body).await;
    let made = admin(Method::POST, "/admin/tenants", json!({"name": "new"})).await;
    assert_eq!((made.status, &made.json()["name"]), (StatusCode::CREATED, &json!("new")));
    assert_eq!(
        admin(Method::POST, "/admin/tenants", json!({"name": "new"})).await.error().3.as_deref(),
        Some("name_taken")
    );
    for body in [json!({}), json!({"name": "a b"}), json!({"name": ".."}), json!({"name": 5})] {
        assert_eq!(admin(Method::POST, "/admin/tenants", body).await.error().2.as_deref(), Some("name"));
    }
    let names = async |query: &str| {
        let page = admin(Method::GET, &format!("/admin/tenants?{query}"), json!({})).await.json();
        let names: Vec<&str> =
            page["data"].as_array().unwrap().iter().map(|each| each["name"].as_str().unwrap()).collect();
        (names.join(" "), page["has_more"].as_bool().unwrap())
    };
    assert_eq!(names("").await, ("acme default new other".into(), false));
    assert_eq!(names("limit=1&after=default").await, ("new".into(), true));

    let key = admin(Method::POST, "/admin/tenants/new/keys", json!({"role": "member"})).await;
    assert_eq!(key.status, StatusCode::CREATED);
    let (key, secret) = (key.json(), key.json()["key"].as_str().unwrap().to_owned());
    assert!(secret.starts_with("mote-sk-") && secret.starts_with(key["prefix"].as_str().unwrap()));
    assert_eq!(send(&app, &secret, Method::POST, "/adapters", json_of("a", 0.5)).await.status, 201);
    assert_eq!(send(&app, &secret, Method::GET, "/admin/tenants", json!({})).await.error().0, 403);
    let listed = admin(Method::GET, "/admin/tenants/new/keys", json!({})).await;
    assert!(!listed.text.contains(&secret), "a key is shown once");
    assert_eq!(listed.json()["data"][0]["id"], key["id"]);
    let path = format!("/admin/keys/{}", key["id"].as_str().unwrap());
    assert_eq!(admin(Method::GET, &path, json!({})).await.json()["tenant"], "new");
    assert_eq!(admin(Method::DELETE, &path, json!({})).await.status, 204);
    assert_eq!(send(&app, &secret, Method::GET, "/adapters", json!({})).await.error().0, 401, "at once");
    assert!(admin(Method::GET, &path, json!({})).await.json()["revoked_at"].is_i64());

    for (method, path, code) in [
        (Method::GET, "/admin/tenants/none", "tenant_not_found"),
        (Method::DELETE, "/admin/tenants/none", "tenant_not_found"),
        (Method::GET, "/admin/tenants/none/keys", "tenant_not_found"),
        (Method::POST, "/admin/tenants/none/keys", "tenant_not_found"),
        (Method::GET, "/admin/keys/none", "key_not_found"),
        (Method::DELETE, "/admin/keys/none", "key_not_found"),
    ] {
        let answer = admin(method, path, json!({})).await;
        assert_eq!((answer.error().0, answer.error().3.as_deref()), (404, Some(code)), "{path}");
        let answer = app.get(path).await;
        assert!([403, 405].contains(&answer.error().0), "members learn nothing: {}", answer.text);
    }
    assert_eq!(
        admin(Method::POST, "/admin/tenants/new/keys", json!({"role": "root"})).await.error().2.as_deref(),
        Some("role")
    );
    let late = admin(Method::POST, "/admin/tenants/new/keys", json!({"expires_at": 1})).await.json();
    let expired = late["key"].as_str().unwrap();
    assert_eq!(send(&app, expired, Method::GET, "/adapters", json!({})).await.error().0, 401);

    assert_eq!(app.state.service.library.registry.len(), 1);
    assert_eq!(admin(Method::DELETE, "/admin/tenants/new", json!({})).await.status, 204);
    assert_eq!(app.state.service.library.registry.len(), 0, "its adapters went with it");
    assert_eq!(admin(Method::DELETE, "/admin/tenants/default", json!({})).await.error().0, 409);
}
