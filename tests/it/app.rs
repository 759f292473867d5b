//! A whole server without a socket.

use std::{path::Path, sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    http::{HeaderMap, Method, Request, StatusCode, header},
};
use futures::StreamExt as _;
use mote::{
    adapter::{Basis, SiteBasis, Sites},
    engine::{Engine, EngineConfig},
    http::{AppState, AuthMode, Edge, Limits},
    service::{
        BaseInfo, RequestPolicy, Service,
        training::{EnginePolicies, PolicySource, TrainingConfig},
    },
    store::{Faults, Location, NewKey, Store, StoreConfig},
    tenant::{ApiKey, Caller, Role},
    text::{ChatTemplate, Tokenizer},
    types::{Fingerprint, TokenId},
};
use serde_json::Value;
use tempfile::TempDir;
use tower::ServiceExt as _;

use crate::script::{FAILS, Script, VOCAB, Watch};

/// A key of tenant 2, a member.
pub(crate) const KEY: &str = "mote-sk-test-member-0123456789abcdef";
pub(crate) const MODEL: &str = "scripted";
pub(crate) const CONTEXT: usize = 256;
const FINGERPRINT: Fingerprint = Fingerprint([7; 32]);

/// The script's text: multi-byte characters, and words to stop at.
const BEFORE_EOS: &str = "Once upon a time there was a little fox 🦊 who said: stop here, naïve friend! Then the END came, and more words followed";
const AFTER_EOS: &str = " after the story was over, for those who could not sleep, and they went on until the morning";

pub(crate) struct Options {
    pub(crate) auth: AuthMode,
    pub(crate) limits: Limits,
    pub(crate) template: Option<&'static str>,
    pub(crate) max_queue: usize,
    pub(crate) request_timeout: Option<Duration>,
    pub(crate) policy: RequestPolicy,
    pub(crate) edge: Edge,
    pub(crate) training: TrainingConfig,
    /// Where jobs get their policies; the engine when there is none.
    pub(crate) policies: Option<Arc<dyn PolicySource>>,
    /// The data directory of a server that was there before.
    pub(crate) folder: Option<Arc<TempDir>>,
    /// What goes wrong with the disk.
    pub(crate) faults: Option<Arc<Faults>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            auth: AuthMode::Keys,
            limits: Limits::default(),
            template: Some(
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if messages[0].content == 'refuse' %}{{ raise_exception('no') }}{% endif %}",
            ),
            max_queue: 64,
            request_timeout: None,
            policy: RequestPolicy::default(),
            edge: Edge::default(),
            training: TrainingConfig::default(),
            policies: None,
            folder: None,
            faults: None,
        }
    }
}

pub(crate) struct TestApp {
    pub(crate) router: Router,
    pub(crate) state: AppState,
    pub(crate) watch: Arc<Watch>,
    /// What the model says, from position 0.
    pub(crate) script: Arc<[TokenId]>,
    /// Where the script has the end-of-sequence token. Its last token breaks the model.
    pub(crate) eos_at: usize,
    /// The data directory; it goes with the last server on it.
    pub(crate) folder: Arc<TempDir>,
}

impl TestApp {
    pub(crate) async fn new() -> Self {
        Self::with(Options::default()).await
    }

    pub(crate) async fn with(options: Options) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden/llama/model/tokenizer.json");
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        let before = tokenizer.encode(BEFORE_EOS, false).unwrap();
        let after = tokenizer.encode(AFTER_EOS, false).unwrap();
        let eos_at = before.len();
        let script: Arc<[TokenId]> = [&before[..], &[0], &after, &[FAILS]].concat().into();
        assert!((120..200).contains(&script.len()), "the tests need another length than {}", script.len());
        let watch = Arc::new(Watch::default());
        let model = Script { tokens: script.clone(), watch: watch.clone() };
        let sites = Sites { layers: 1, shapes: [(4, 4); 7] };
        let config = EngineConfig {
            max_batch: 8,
            max_queue: options.max_queue,
            max_model_len: CONTEXT,
            prefill_chunk: 64,
            idle_prefill_chunk: 64,
            background_rows: 4,
            gradient_share: 1.0,
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
            fingerprint: FINGERPRINT,
            tokenizer,
            chat_template: options.template.map(|source| ChatTemplate::new(source, "<bos>", "<eos>").unwrap()),
        };
        let basis = basis(&base.sites);
        let engine = Engine::start(Box::new(model), config).unwrap();
        let folder = options.folder.unwrap_or_else(|| Arc::new(tempfile::tempdir().unwrap()));
        let service = Service::open(base, basis, engine, store(&folder, options.faults).await).await.unwrap();
        let mut service = service.with_policy(options.policy);
        service.request_timeout = options.request_timeout;
        let service = Arc::new(service);
        let policies = options.policies.unwrap_or_else(|| Arc::new(EnginePolicies::of(&service)));
        service.start_training(options.training, policies).await.unwrap();
        let edge = Arc::new(options.edge);
        let state = AppState { auth: options.auth, limits: options.limits, edge, ..AppState::new(service) };
        let router = mote::http::router(state.clone());
        Self { router, state, watch, script, eos_at, folder }
    }

    /// The text that follows a prompt of so many tokens.
    pub(crate) fn says(&self, from: usize, tokens: usize) -> String {
        self.state.service.base.tokenizer.decode(&self.script[from..from + tokens])
    }

    /// The script position at which a text begins.
    pub(crate) fn find(&self, text: &str) -> usize {
        let tokenizer = &self.state.service.base.tokenizer;
        (0..self.script.len())
            .find(|&at| tokenizer.decode(&self.script[at..]).starts_with(text))
            .unwrap_or_else(|| panic!("no token of the script begins with {text:?}"))
    }

    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(
            Request::get(path).header(header::AUTHORIZATION, format!("Bearer {KEY}")).body(Body::empty()).unwrap(),
        )
        .await
    }

    /// The metrics as an admin sees them; the tests' key is a member's.
    pub(crate) fn metrics(&self) -> String {
        self.state.service.metrics_text(&Caller::built_in()).unwrap()
    }

    pub(crate) async fn delete(&self, path: &str) -> Answer {
        let request = Request::delete(path).header(header::AUTHORIZATION, format!("Bearer {KEY}"));
        self.send(request.body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(post(path, body.to_string())).await
    }

    /// The body of a 200.
    pub(crate) async fn ok(&self, path: &str, body: Value) -> Value {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()
    }

    /// The chunks of a stream that ends as it should.
    pub(crate) async fn chunks(&self, path: &str, body: Value) -> Vec<Value> {
        let answer = self.post(path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(answer.headers[header::CONTENT_TYPE], "text/event-stream");
        let mut lines = answer.data_lines();
        assert_eq!(lines.pop().as_deref(), Some("[DONE]"));
        lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// A response whose body has not been read yet.
    pub(crate) async fn open(&self, path: &str, body: Value) -> futures::stream::BoxStream<'static, String> {
        let response = self.router.clone().oneshot(post(path, body.to_string())).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let pieces = response.into_body().into_data_stream();
        pieces.map(|piece| String::from_utf8(piece.unwrap().to_vec()).unwrap()).boxed()
    }
}

pub(crate) fn post(path: &str, body: impl Into<Body>) -> Request<Body> {
    Request::builder()
        .method(Method::POST)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {KEY}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(body.into())
        .unwrap()
}

/// Columns that are unit vectors, and falling singular values.
fn basis(sites: &Sites) -> Basis {
    let unit = || (0..4 * 2).map(|at| f32::from(at / 2 == at % 2)).collect::<Vec<f32>>();
    let site = SiteBasis { u: unit(), s: vec![2.0, 1.0], v: unit(), next_sigma: 0.5 };
    Basis { rank: 2, fingerprint: FINGERPRINT, sites: vec![site; sites.len()] }
}

async fn store(folder: &TempDir, faults: Option<Arc<Faults>>) -> Store {
    let config = StoreConfig { faults, ..StoreConfig::new(Location::Directory(folder.path().into())) };
    let store = Store::open(config).await.unwrap();
    if store.tenant("acme").await.is_ok() {
        return store;
    }
    let key = NewKey {
        key: ApiKey::chosen(KEY).unwrap(),
        tenant: "acme".into(),
        create_tenant: true,
        role: Role::Member,
        expires_at: None,
        only_first: false,
    };
    store.create_key(key).await.unwrap();
    store
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// Status, type, param and code of an envelope that is as it should be.
    pub(crate) fn error(&self) -> (u16, String, Option<String>, Option<String>) {
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

    pub(crate) fn data_lines(&self) -> Vec<String> {
        self.text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
    }
}
