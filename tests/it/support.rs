//! A real `mote serve` in a child process on a free loopback port, and a small client for it.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use reqwest::{Method, RequestBuilder, Response};
use serde_json::{Value, json};

/// The admin key of every test server.
pub(crate) const ADMIN_KEY: &str = "admin-key-of-the-tests-0123456789";

/// Folder of a golden model.
pub(crate) fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

/// What transformers + PEFT computed for a golden model.
pub(crate) fn expected(name: &str) -> Value {
    let text = fs::read_to_string(golden(name).join("expected.json")).expect("expected.json");
    serde_json::from_str(&text).expect("valid JSON")
}

/// Builds a [`TestApp`].
pub(crate) struct TestAppBuilder {
    args: Vec<String>,
    envs: Vec<(String, String)>,
    data: Option<PathBuf>,
    own_key: bool,
}

impl TestAppBuilder {
    /// Adds flags of `mote serve`.
    pub(crate) fn args<I: IntoIterator<Item = S>, S: Into<String>>(mut self, args: I) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds variables.
    pub(crate) fn envs<I: IntoIterator<Item = (S, S)>, S: Into<String>>(mut self, envs: I) -> Self {
        self.envs.extend(envs.into_iter().map(|(name, value)| (name.into(), value.into())));
        self
    }

    /// Serves a data directory that outlives the server.
    pub(crate) fn data_dir(mut self, path: &Path) -> Self {
        self.data = Some(path.to_owned());
        self
    }

    /// Lets an empty store make its own admin key.
    pub(crate) fn without_admin_key(mut self) -> Self {
        self.own_key = true;
        self
    }

    /// Starts the server and waits until it is ready.
    pub(crate) async fn start(self) -> TestApp {
        let own = tempfile::tempdir().expect("a temporary folder");
        let data = self.data.unwrap_or_else(|| own.path().to_owned());
        let began = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_mote"))
            .args(["serve", "--listen", "127.0.0.1:0", "--device", "cpu", "--data-dir"])
            .arg(&data)
            .args(&self.args)
            .envs(self.envs)
            .envs((!self.own_key).then_some(("MOTE_ADMIN_KEY", ADMIN_KEY)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("mote starts");
        let (url, log) = listening(&mut child);
        let app = TestApp {
            child,
            url,
            http: reqwest::Client::new(),
            key: ADMIN_KEY.into(),
            data,
            log,
            started_in: began.elapsed(),
            _own: own,
        };
        app.ready().await;
        app
    }
}

/// Reads the log until it names the address; a thread keeps what follows.
fn listening(child: &mut Child) -> (String, std::sync::Arc<std::sync::Mutex<String>>) {
    let mut lines = BufReader::new(child.stderr.take().expect("stderr is piped")).lines();
    let log = std::sync::Arc::new(std::sync::Mutex::new(String::new()));
    let mut url = None;
    for line in lines.by_ref().map_while(Result::ok) {
        let found = line.find("http://127.0.0.1:").map(|at| {
            let rest = &line[at..];
            rest[..rest["http://".len()..]
                .find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit())
                .map_or(rest.len(), |end| end + 7)]
                .to_owned()
        });
        let mut log = log.lock().expect("log");
        log.push_str(&line);
        log.push('\n');
        if found.is_some() {
            url = found;
            break;
        }
    }
    let Some(url) = url else { panic!("mote did not start:\n{}", log.lock().expect("log")) };
    let rest = log.clone();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let mut log = rest.lock().expect("log");
            log.push_str(&line);
            log.push('\n');
        }
    });
    (url, log)
}

/// A running server; it is killed when dropped.
pub(crate) struct TestApp {
    child: Child,
    /// `http://127.0.0.1:port`
    pub(crate) url: String,
    http: reqwest::Client,
    key: String,
    /// The data directory.
    pub(crate) data: PathBuf,
    log: std::sync::Arc<std::sync::Mutex<String>>,
    /// From the start of the process until it listened.
    pub(crate) started_in: Duration,
    _own: tempfile::TempDir,
}

impl TestApp {
    /// A server of the tiny golden model `name` in f32, served as `tiny`.
    pub(crate) fn tiny(name: &str) -> TestAppBuilder {
        let model = golden(name).join("model").to_string_lossy().into_owned();
        TestAppBuilder {
            args: ["--model", &model, "--model-id", "tiny", "--dtype", "f32"].map(String::from).into(),
            envs: Vec::new(),
            data: None,
            own_key: false,
        }
    }

    /// A server of SmolLM2-135M-Instruct, fetched when it is not in the cache.
    pub(crate) fn real() -> TestAppBuilder {
        TestAppBuilder { args: Vec::new(), envs: Vec::new(), data: None, own_key: false }
    }

    async fn ready(&self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            if let Ok(answer) = self.http.get(format!("{}/readyz", self.url)).send().await
                && answer.status().is_success()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        panic!("the server was not ready in time:\n{}", self.log());
    }

    /// A request under the admin key.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.as_key(&self.key, method, path)
    }

    /// A request under another key.
    pub(crate) fn as_key(&self, key: &str, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url)).bearer_auth(key)
    }

    /// A request without a key.
    pub(crate) fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url))
    }

    /// GET, status and JSON.
    pub(crate) async fn get(&self, path: &str) -> (u16, Value) {
        parts(self.request(Method::GET, path).send().await.expect("an answer")).await
    }

    /// POST JSON, status and JSON.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        parts(self.request(Method::POST, path).json(body).send().await.expect("an answer")).await
    }

    /// POST JSON that must succeed.
    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        let (status, answer) = self.post(path, body).await;
        assert!((200..300).contains(&status), "{path} answered {status}: {answer}");
        answer
    }

    /// A new tenant's member key.
    pub(crate) async fn tenant(&self, name: &str) -> String {
        self.ok("/admin/tenants", &json!({ "name": name })).await;
        let key = self.ok(&format!("/admin/tenants/{name}/keys"), &json!({ "role": "member" })).await;
        key["key"].as_str().expect("the key, shown once").to_owned()
    }

    /// The value of a metric without labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.request(Method::GET, "/metrics").send().await.expect("metrics").text().await.expect("text");
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
    }

    /// Process id, for kill -9 and for reading its memory.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Resident memory in MiB.
    pub(crate) fn resident_mb(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let kb = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok());
        kb.unwrap_or(f64::NAN) / 1024.0
    }

    /// What the server logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("log").clone()
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        let sent =
            Command::new("kill").args([&format!("-{name}"), &self.pid().to_string()]).status().expect("kill runs");
        assert!(sent.success());
    }

    /// The exit code, once the process has ended by itself. It has two minutes.
    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the server did not end:\n{}", self.log());
    }

    /// kill -9, and wait until it is gone.
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Status and JSON of an answer; an empty body is null.
pub(crate) async fn parts(answer: Response) -> (u16, Value) {
    let status = answer.status().as_u16();
    let text = answer.text().await.expect("a body");
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}
