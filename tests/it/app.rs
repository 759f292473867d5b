//! A whole server without a socket.

use std::{collections::HashMap, path::Path, sync::Arc};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use futures::{StreamExt as _, future::BoxFuture};
use mote::{
    adapter::Sites,
    engine::{Engine, EngineConfig},
    http::{AppState, AuthMode, Limits},
    service::{BaseInfo, Service},
    tenant::{Directory, KeyHash, KeyRecord, KeySource, KeySourceError, Role},
    text::{ChatTemplate, Tokenizer},
    types::{Fingerprint, TenantId, TokenId},
};
use serde_json::Value;
use tower::ServiceExt as _;

use crate::script::{Script, VOCAB, Watch};

/// A key of tenant 2, a member.
pub const KEY: &str = "mote-sk-test-member-0123456789abcdef";
pub const MODEL: &str = "scripted";
pub const CONTEXT: usize = 256;

/// The script's text: multi-byte characters, and words to stop at.
const BEFORE_EOS: &str =
    "Once upon a time there was a little fox 🦊 who said: stop here, naïve friend! Then the END came, and more words followed";
const AFTER_EOS: &str = " after the story was over, for those who could not sleep, and they went on and on until the morning, when the \
                         sun rose over the hills and the birds began to sing about the fox and all of its friends in the wood near the river.";

pub struct Options {
    pub auth: AuthMode,
    pub limits: Limits,
    pub template: Option<&'static str>,
    pub max_queue: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            auth: AuthMode::Keys,
            limits: Limits::default(),
            template: Some("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"),
            max_queue: 64,
        }
    }
}

pub struct TestApp {
    pub router: Router,
    pub state: AppState,
    pub watch: Arc<Watch>,
    /// What the model says, from position 0.
    pub script: Arc<[TokenId]>,
    /// Where the script has the end-of-sequence token.
    pub eos_at: usize,
}

struct Keys(HashMap<KeyHash, KeyRecord>);

impl KeySource for Keys {
    fn key_by_hash(&self, hash: KeyHash) -> BoxFuture<'_, Result<Option<KeyRecord>, KeySourceError>> {
        let found = self.0.get(&hash).cloned();
        Box::pin(async move { Ok(found) })
    }

    fn touch_key(&self, _: String, _: i64) {}
}

impl TestApp {
    pub fn new() -> Self {
        Self::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/llama/model/tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        let before = tokenizer.encode(BEFORE_EOS, false).unwrap();
        let after = tokenizer.encode(AFTER_EOS, false).unwrap();
        let eos_at = before.len();
        let script: Arc<[TokenId]> = [&before[..], &[0], &after].concat().into();
        assert!(script.len() > CONTEXT / 2, "the script is too short for the tests: {}", script.len());
        let watch = Arc::new(Watch::default());
        let model = Script { tokens: script.clone(), watch: watch.clone() };
        let sites = Sites { layers: 1, shapes: [(4, 4); 7] };
        let config = EngineConfig {
            max_batch: 8,
            max_queue: options.max_queue,
            max_model_len: CONTEXT,
            prefill_chunk: 64,
            rank: 2,
            sites: sites.len(),
            prefix_cache: true,
        };
        let base = BaseInfo {
            model_id: MODEL.into(),
            created: 1_700_000_000,
            max_model_len: CONTEXT,
            vocab: VOCAB,
            eos: vec![0],
            sites,
            rank: 2,
            fingerprint: Fingerprint([7; 32]),
            tokenizer,
            chat_template: options.template.map(|source| ChatTemplate::new(source, "<bos>", "<eos>").unwrap()),
        };
        let service = Service {
            base: Arc::new(base),
            engine: Engine::start(Box::new(model), config).unwrap(),
            metrics: Arc::default(),
            directory: Directory::new(Arc::new(Keys(HashMap::from([(KeyHash::of(KEY), key_record())])))),
        };
        let state = AppState { auth: options.auth, limits: options.limits, ..AppState::new(Arc::new(service)) };
        let router = mote::http::router(state.clone());
        Self { router, state, watch, script, eos_at }
    }

    /// The text that follows a prompt of so many tokens.
    pub fn says(&self, from: usize, tokens: usize) -> String {
        self.state.service.base.tokenizer.decode(&self.script[from..from + tokens])
    }

    /// The script position at which a text begins.
    pub fn find(&self, text: &str) -> usize {
        let tokenizer = &self.state.service.base.tokenizer;
        (0..self.script.len())
            .find(|&at| tokenizer.decode(&self.script[at..]).starts_with(text))
            .unwrap_or_else(|| panic!("no token of the script begins with {text:?}"))
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).header(header::AUTHORIZATION, format!("Bearer {KEY}")).body(Body::empty()).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(post(path, body.to_string())).await
    }

    /// The body of a 200.
    pub async fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()
    }

    /// The chunks of a stream that ends as it should.
    pub async fn chunks(&self, path: &str, body: Value) -> Vec<Value> {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
        let mut lines = answer.data_lines();
        assert_eq!(lines.pop().as_deref(), Some("[DONE]"));
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// A response whose body has not been read yet.
    pub async fn open(&self, path: &str, body: Value) -> futures::stream::BoxStream<'static, String> {
        let response = self.router.clone().oneshot(post(path, body.to_string())).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let pieces = response.into_body().into_data_stream();
        pieces.map(|piece| String::from_utf8(piece.unwrap().to_vec()).unwrap()).boxed()
    }
}

pub fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .unwrap()
}

fn key_record() -> KeyRecord {
    KeyRecord {
        id: "key_0123456789abcdef".into(),
        tenant: TenantId(2),
        tenant_name: "acme".into(),
        hash: KeyHash::of(KEY),
        prefix: "mote-sk-test".into(),
        role: Role::Member,
        created_at: 0,
        expires_at: None,
        revoked_at: None,
        last_used_at: None,
    }
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub text: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Status, type, param and code of an envelope that is as it should be.
    pub fn error(&self) -> (u16, String, Option<String>, Option<String>) {
        let body = self.json();
        assert_eq!(self.headers[header::CONTENT_TYPE], "application/json");
        assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
        let error = body["error"].as_object().unwrap();
        let keys: Vec<&str> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(!error["message"].as_str().unwrap().is_empty());
        let text = |key: &str| error[key].as_str().map(str::to_owned);
        (self.status.as_u16(), text("type").unwrap(), text("param"), text("code"))
    }

    pub fn data_lines(&self) -> Vec<String> {
        self.text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}
