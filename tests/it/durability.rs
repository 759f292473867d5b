//! A real server over damaged rows, a full database and a damaged file; backup and restore from the command line while it runs.

use std::{
    path::Path,
    process::{Command, Output, Stdio},
};

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::{Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};

use crate::support::{TestApp, parts};

/// Statements of somebody who is not the program.
pub(crate) async fn tamper(data: &Path, statement: &str) {
    let options = SqliteConnectOptions::new().filename(data.join("mote.db")).foreign_keys(false);
    let mut connection = SqliteConnection::connect_with(&options).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement.to_owned())).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn upload(name: &str, number: f64) -> Value {
    json!({"name": name, "numbers": [number, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]})
}

fn complete(name: &str) -> Value {
    json!({"model": name, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0})
}

fn mote(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mote")).args(args).stdin(Stdio::null()).output().expect("mote runs")
}

/// Adapters that are damaged while somebody else has a public one of that name.
const OWN: [&str; 3] = ["shared", "lost", "factless"];

/// Every way in which a tenant can name an adapter: none gives it somebody else's.
async fn is_damaged_everywhere(app: &TestApp, key: &str, name: &str) {
    let example = json!([{"prompt": "a", "completion": "b"}]);
    let train = json!({"name": "new", "method": "sft", "init_from": name, "dataset": example});
    let line =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n";
    let form = reqwest::multipart::Form::new()
        .text("purpose", "fine-tune")
        .part("file", reqwest::multipart::Part::bytes(line.as_bytes()).file_name("lines.jsonl"));
    let file = parts(app.as_key(key, Method::POST, "/v1/files").multipart(form).send().await.unwrap()).await.1;
    let asked = [
        (Method::GET, format!("/adapters/{name}"), Value::Null),
        (Method::GET, format!("/adapters/{name}/weights"), Value::Null),
        (Method::GET, format!("/adapters/{name}/generations"), Value::Null),
        (Method::GET, format!("/v1/models/{name}"), Value::Null),
        (Method::GET, format!("/v1/models/tiny:{name}"), Value::Null),
        (Method::POST, "/v1/completions".into(), complete(name)),
        (Method::POST, "/adapters/train".into(), train),
        (Method::POST, "/v1/fine_tuning/jobs".into(), json!({"model": name, "training_file": file["id"]})),
    ];
    for (method, path, body) in asked {
        let request = app.as_key(key, method, &path);
        let request = if body.is_null() { request } else { request.json(&body) };
        let (status, answer) = parts(request.send().await.unwrap()).await;
        assert_eq!((status, &answer["error"]["code"]), (500, &json!("adapter_damaged")), "{path} {name}: {answer}");
    }
    for list in ["/adapters", "/v1/models"] {
        let (_, answer) = parts(app.as_key(key, Method::GET, list).send().await.unwrap()).await;
        let foreign = |item: &&Value| item["owner"] == "default" || item["owned_by"] == "default";
        let named = |item: &&Value| item["name"] == name || item["id"] == name;
        assert_eq!(answer["data"].as_array().unwrap().iter().filter(named).find(foreign), None, "{list}: {answer}");
    }
}

/// A damaged adapter answers 500 to its owner and 404 to everybody else, never as something else; all others serve.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_row_is_an_error_of_its_adapter_alone() {
    let data = tempfile::tempdir().unwrap();
    let mut app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    let member = app.tenant("other").await;
    for name in ["good", "hash", "bytes", "gone"] {
        app.ok("/adapters", &upload(name, 0.5)).await;
    }
    // Public adapters of the same names as private, damaged ones: they must not answer for them.
    for name in OWN {
        app.ok("/adapters", &json!({"name": name, "numbers": vec![0.25; 13], "public": true})).await;
        let own = app.as_key(&member, Method::POST, "/adapters").json(&upload(name, 0.5));
        assert_eq!(parts(own.send().await.unwrap()).await.0, 201);
    }
    app.kill();
    let row = |name: &str, tenant: &str| {
        format!(
            "adapter = (SELECT a.id FROM adapters a JOIN tenants t ON t.id = a.tenant WHERE a.name = '{name}' AND t.name = '{tenant}')"
        )
    };
    tamper(
        data.path(),
        &format!(
            "UPDATE generations SET generation = x'01' WHERE {}; UPDATE generations SET data = x'01' WHERE {}; DELETE FROM generations WHERE {}; UPDATE generations SET data = x'01' WHERE {}; DELETE FROM generations WHERE {}; UPDATE generations SET facts = 99 WHERE {};",
            row("hash", "default"),
            row("bytes", "default"),
            row("gone", "default"),
            row("shared", "other"),
            row("lost", "other"),
            row("factless", "other"),
        ),
    )
    .await;

    let app = TestApp::tiny("llama").data_dir(data.path()).args(["--integrity-check", "full"]).start().await;
    app.ok("/v1/completions", &complete("good")).await;
    for name in OWN {
        app.ok("/v1/completions", &complete(name)).await;
        is_damaged_everywhere(&app, &member, name).await;
    }
    for name in ["hash", "bytes", "gone"] {
        let (status, answer) = app.post("/v1/completions", &complete(name)).await;
        assert_eq!((status, &answer["error"]["code"]), (500, &json!("adapter_damaged")), "{name}: {answer}");
        let body = json!({"model": "tiny", "adapter": {"name": name}, "prompt": [5], "max_tokens": 1});
        assert_eq!(app.post("/v1/completions", &body).await.0, 500);
        assert!(app.log().lines().any(|line| line.contains("cannot be read") && line.contains(name)), "{}", app.log());
        let foreign = app.as_key(&member, Method::POST, "/v1/completions").json(&complete(name)).send().await.unwrap();
        assert_eq!(foreign.status(), 404, "{name}");
    }
    assert_eq!(app.metric("mote_adapters_damaged").await, 6.0);
    assert_eq!(app.get("/adapters").await.0, 200);
    assert_eq!(app.get("/v1/models").await.0, 200);

    // The owner mends it or is rid of it.
    for name in ["hash", "bytes"] {
        let body = json!({"name": name, "numbers": vec![0.5; 13], "on_conflict": "new_generation"});
        app.ok("/adapters", &body).await;
        app.ok("/v1/completions", &complete(name)).await;
    }
    for name in OWN {
        let put = app.as_key(&member, Method::PUT, &format!("/adapters/{name}"));
        let (status, answer) = parts(put.json(&json!({"numbers": vec![0.5; 13]})).send().await.unwrap()).await;
        assert_eq!((status, &answer["owner"]), (200, &json!("other")), "{answer}");
        let own = app.as_key(&member, Method::POST, "/v1/completions").json(&complete(name));
        assert_eq!(own.send().await.unwrap().status(), 200, "{name}");
    }
    let deleted = app.request(Method::DELETE, "/adapters/gone").send().await.unwrap();
    assert_eq!(deleted.status(), 204);
    assert_eq!(app.post("/v1/completions", &complete("gone")).await.0, 404);
    assert_eq!(app.metric("mote_adapters_damaged").await, 0.0);
}

/// A key that cannot be read, or whose tenant cannot, is a 401 that says so; an admin sees which, mends it or is rid of it, and everybody else is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_key_or_tenant_is_shut_out_alone() {
    let data = tempfile::tempdir().unwrap();
    let mut app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    let (good, bad_key, bad_tenant) =
        (app.tenant("good").await, app.tenant("spoilt").await, app.tenant("limits").await);
    let keys = app.get("/admin/tenants/spoilt/keys").await.1;
    let id = keys["data"][0]["id"].as_str().unwrap().to_owned();
    app.kill();
    tamper(
        data.path(),
        &format!(
            "UPDATE keys SET role = 'king' WHERE id = '{id}'; UPDATE tenants SET weight = 'heavy' WHERE name = 'limits'"
        ),
    )
    .await;

    let app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    let models = async |key: &str| parts(app.as_key(key, Method::GET, "/v1/models").send().await.unwrap()).await;
    for key in [&bad_key, &bad_tenant] {
        let (status, answer) = models(key).await;
        let error = (&answer["error"]["type"], &answer["error"]["code"]);
        assert_eq!((status, error), (401, (&json!("authentication_error"), &json!("key_damaged"))), "{answer}");
    }
    assert_eq!(models(&good).await.0, 200);
    assert_eq!(app.metric("mote_rows_damaged{kind=\"key\"}").await, 1.0);
    assert_eq!(app.metric("mote_rows_damaged{kind=\"tenant\"}").await, 1.0);
    let log = app.log();
    for name in [&*id, "limits"] {
        assert!(log.lines().any(|line| line.contains("cannot be read") && line.contains(name)), "{name}: {log}");
    }
    let listed = app.get("/admin/tenants").await;
    assert_eq!((listed.0, listed.1["data"].as_array().unwrap().len()), (200, 3), "{}", listed.1);
    for (path, code) in
        [("/admin/tenants/limits".to_owned(), "tenant_damaged"), (format!("/admin/keys/{id}"), "key_damaged")]
    {
        let (status, answer) = app.get(&path).await;
        assert_eq!((status, &answer["error"]["code"]), (500, &json!(code)), "{answer}");
    }

    let patch = app.request(Method::PATCH, "/admin/tenants/limits").json(&json!({"limits": {"weight": 2}}));
    assert_eq!(patch.send().await.unwrap().status(), 200);
    assert_eq!(models(&bad_tenant).await.0, 200);
    let revoked = app.request(Method::DELETE, &format!("/admin/keys/{id}")).send().await.unwrap();
    assert_eq!(revoked.status(), 204);
    assert_eq!(models(&bad_key).await.0, 401);
}

/// With no room left, writes are refused in words and everything that was there is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_database_serves_and_says_that_it_cannot_store() {
    let app = TestApp::tiny("llama").args(["--max-database-mb", "1"]).start().await;
    app.ok("/adapters", &upload("first", 0.5)).await;
    let metadata = json!({"padding": "x".repeat(15_000)});
    let mut last = (0, Value::Null);
    for number in 0..200 {
        let mut body = upload(&format!("a{number}"), 0.5);
        body["metadata"] = metadata.clone();
        last = app.post("/adapters", &body).await;
        if last.0 != 201 {
            break;
        }
    }
    let (status, answer) = last;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("storage_unavailable")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("full"), "{answer}");
    app.ok("/v1/completions", &complete("first")).await;
    app.ok("/v1/completions", &complete("a0")).await;
    assert_eq!(app.anonymous(Method::GET, "/readyz").send().await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_running_server_restores_to_the_same_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (data, copy, target) = (path("data"), path("backup.db"), path("restored"));
    let mut app = TestApp::tiny("llama").data_dir(Path::new(&data)).start().await;
    app.ok("/adapters", &upload("alice", 0.5)).await;
    let key = app.tenant("team").await;
    let answer = app.ok("/v1/completions", &complete("alice")).await["choices"][0]["text"].clone();

    let made = mote(&["backup", "--data-dir", &data, "--out", &copy]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let said = String::from_utf8(made.stdout).unwrap();
    assert_eq!(said.split_whitespace().next().unwrap().len(), 64, "{said}");
    app.ok("/adapters", &upload("later", 0.5)).await;

    let refused = mote(&["restore", "--from", &copy, "--data-dir", &data]);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--force"));
    let refused = mote(&["restore", "--from", &copy, "--data-dir", &data, "--force"]);
    assert!(!refused.status.success(), "a server runs on it");
    app.kill();

    let made = mote(&["restore", "--from", &copy, "--data-dir", &target]);
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let app = TestApp::tiny("llama").data_dir(Path::new(&target)).start().await;
    assert_eq!(app.ok("/v1/completions", &complete("alice")).await["choices"][0]["text"], answer);
    assert_eq!(app.post("/v1/completions", &complete("later")).await.0, 404);
    let models = app.as_key(&key, Method::GET, "/v1/models").send().await.unwrap();
    assert_eq!(models.status(), 200, "the key is in the backup");
}

/// A server refuses a database whose pages are damaged, and says what to do.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_not_served_by_accident() {
    let data = tempfile::tempdir().unwrap();
    let mut app = TestApp::tiny("llama").data_dir(data.path()).start().await;
    for number in 0..40 {
        let mut body = upload(&format!("a{number}"), 0.5);
        body["metadata"] = json!({"padding": "x".repeat(15_000)});
        app.ok("/adapters", &body).await;
    }
    app.signal("TERM");
    assert_eq!(app.exit_code().await, Some(0));
    let file = data.path().join("mote.db");
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.len() / 2 / 4096 * 4096;
    bytes[at..at + 16 * 4096].fill(0xaa);
    std::fs::write(&file, bytes).unwrap();
    let model = crate::support::golden("llama").join("model").to_string_lossy().into_owned();
    let folder = data.path().to_string_lossy().into_owned();
    let refused = mote(&["serve", "--listen", "127.0.0.1:0", "--no-auth", "--model", &model, "--data-dir", &folder]);
    assert!(!refused.status.success());
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(words.contains("mote restore") && words.contains("--integrity-check off"), "{words}");
}
