//! `/adapters`, without a socket: every form of upload, what is refused, and requests sent again.

use axum::{
    body::Body,
    http::{Method, Request, StatusCode, header},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use mote::{http::Limits, store::NewKey, tenant::ApiKey, tenant::Role};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use crate::app::{Answer, KEY, MODEL, Options, TestApp};

pub(crate) const ADMIN: &str = "mote-sk-test-admin-0123456789abcdef";
pub(crate) const OTHER: &str = "mote-sk-test-other-0123456789abcdef";

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
