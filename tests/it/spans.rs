//! What is followed of a request and a job: their spans, as a subscriber sees them.
#![allow(clippy::await_holding_lock, reason = "the engine's thread waits for the lock, the runtime does not")]

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, LazyLock, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use axum::http::{HeaderValue, Request};
use futures::StreamExt as _;
use mote::http::REQUEST_ID;
use serde_json::{Value, json};
use tower::ServiceExt as _;
use tracing::{
    Event, Id, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Record},
};
use tracing_subscriber::{
    Layer, layer::Context, layer::SubscriberExt as _, registry::LookupSpan, util::SubscriberInitExt as _,
};

use crate::{
    app::{Answer, KEY, MODEL, Options, TestApp, post},
    script::FAILS,
    toy::Toy,
    training::{letters, letters_with, toy_app},
};

/// A span that was made.
#[derive(Debug, Clone, Default)]
struct Seen {
    name: &'static str,
    parent: Option<usize>,
    fields: BTreeMap<&'static str, String>,
    /// What was logged directly within.
    events: Vec<String>,
    closed: bool,
}

/// Keeps every span of the process.
#[derive(Clone, Default)]
struct Keeper(Arc<Mutex<Vec<Seen>>>);

/// The keeper of this process: jobs run on threads of their own, where a test's own subscriber would not be.
static KEEPER: LazyLock<Keeper> = LazyLock::new(|| {
    let keeper = Keeper::default();
    tracing_subscriber::registry().with(keeper.clone()).init();
    keeper
});

/// Where a span is in the list.
struct Place(usize);

struct Fields<'a>(&'a mut BTreeMap<&'static str, String>);

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Keeper {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        let parent = span.parent().and_then(|parent| parent.extensions().get::<Place>().map(|place| place.0));
        let mut seen = Seen { name: span.name(), parent, ..Seen::default() };
        attributes.record(&mut Fields(&mut seen.fields));
        let mut all = self.0.lock().unwrap();
        span.extensions_mut().insert(Place(all.len()));
        all.push(seen);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        self.at(id, &context, |seen| values.record(&mut Fields(&mut seen.fields)));
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Some(span) = context.event_span(event) else { return };
        let mut fields = BTreeMap::new();
        event.record(&mut Fields(&mut fields));
        self.at(&span.id(), &context, |seen| seen.events.push(format!("{fields:?}")));
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        self.at(&id, &context, |seen| seen.closed = true);
    }
}

impl Keeper {
    fn at<S: Subscriber + for<'a> LookupSpan<'a>>(
        &self,
        id: &Id,
        context: &Context<'_, S>,
        work: impl FnOnce(&mut Seen),
    ) {
        let span = context.span(id).unwrap();
        if let Some(Place(place)) = span.extensions().get() {
            work(&mut self.0.lock().unwrap()[*place]);
        }
    }

    /// The spans of this name that a request with this id is behind, with their places.
    fn of(&self, name: &str, id: &str) -> Vec<(usize, Seen)> {
        let all = self.0.lock().unwrap();
        let mine = |seen: &Seen| seen.name == name && seen.fields.get("request_id").is_some_and(|own| own == id);
        all.iter().enumerate().filter(|(_, seen)| mine(seen)).map(|(at, seen)| (at, seen.clone())).collect()
    }

    /// What is below a span, once all of it is closed.
    async fn below(&self, place: usize, name: &str) -> Vec<Seen> {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let all = self.0.lock().unwrap().clone();
            let mine: Vec<Seen> = all.into_iter().filter(|seen| seen.parent == Some(place)).collect();
            if mine.iter().all(|seen| seen.closed) {
                assert!(mine.iter().all(|seen| seen.name == name), "{mine:?}");
                return mine;
            }
            assert!(Instant::now() < deadline, "{mine:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The one request with this id.
    fn request(&self, id: &str) -> (usize, Seen) {
        let mut found = self.of("request", id);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }
}

fn named<B>(mut request: Request<B>, id: &'static str) -> Request<B> {
    request.headers_mut().insert(REQUEST_ID, HeaderValue::from_static(id));
    request
}

async fn send(app: &TestApp, id: &'static str, path: &str, body: &Value) -> Answer {
    app.send(named(post(path, body.to_string()), id)).await
}

fn number(seen: &Seen, field: &str) -> f64 {
    seen.fields.get(field).and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("{field}: {seen:?}"))
}

#[tokio::test]
async fn a_request_is_followed_to_its_sequences() {
    let keeper = &*KEEPER;
    let app = TestApp::new().await;
    let body = json!({"model": MODEL, "prompt": "xyzzy sesame opens the door to the cave", "max_tokens": 3, "n": 2, "temperature": 0});
    assert_eq!(send(&app, "follow-1", "/v1/completions", &body).await.status, 200);
    assert_eq!(send(&app, "follow-2", "/v1/completions", &body).await.status, 200);
    let (place, request) = keeper.request("follow-1");
    let field = |name: &str| request.fields.get(name).map(String::as_str);
    assert_eq!((field("method"), field("route")), (Some("POST"), Some("/v1/completions")));
    assert_eq!((field("status"), field("tenant")), (Some("200"), Some("2")));
    assert!(request.closed && request.parent.is_none());
    let sequences = keeper.below(place, "sequence").await;
    assert_eq!(sequences.len(), 2);
    for sequence in &sequences {
        assert_eq!((number(sequence, "completion_tokens"), number(sequence, "preemptions")), (3.0, 0.0));
        assert_eq!(sequence.fields["finish"], "length");
        assert!(number(sequence, "prompt_tokens") >= 16.0);
        assert!(0.0 <= number(sequence, "queue_seconds"));
        assert!(number(sequence, "queue_seconds") <= number(sequence, "first_token_seconds"));
    }
    // The same prompt again is in the cache, as its spans say.
    let (place, _) = keeper.request("follow-2");
    let again = keeper.below(place, "sequence").await;
    assert!(again.iter().all(|sequence| number(sequence, "cached_tokens") >= 16.0), "{again:?}");

    // Nothing of what clients write, but the id.
    app.get("/adapters/secret-name").await;
    app.get("/no/secret-name/route").await;
    let refused = post("/v1/models", "").map(|_| axum::body::Body::empty());
    app.send(named(refused, "follow-3")).await;
    let all = keeper.0.lock().unwrap().clone();
    assert!(all.iter().any(|seen| seen.fields.get("route").is_some_and(|route| route == "/adapters/{name}")));
    assert!(all.iter().any(|seen| seen.fields.get("route").is_some_and(|route| route == "unmatched")));
    for seen in all {
        let shown = format!("{seen:?}");
        assert!(!shown.contains("sesame") && !shown.contains("secret-name") && !shown.contains(KEY), "{shown}");
    }
}

#[tokio::test]
async fn what_goes_wrong_in_a_request_is_logged_within_it() {
    let keeper = &*KEEPER;
    let app = TestApp::new().await;
    let body = |stream: bool| json!({"model": MODEL, "prompt": [FAILS], "max_tokens": 1, "stream": stream});
    assert_eq!(send(&app, "wrong-1", "/v1/completions", &body(false)).await.status, 500);
    assert!(send(&app, "wrong-2", "/v1/completions", &body(true)).await.text.contains("api_error"));
    for (id, status) in [("wrong-1", "500"), ("wrong-2", "200")] {
        let (place, request) = keeper.request(id);
        assert_eq!(request.fields["status"], status);
        assert!(request.events.iter().any(|event| event.contains("internal error")), "{request:?}");
        assert_eq!(keeper.below(place, "sequence").await[0].fields["finish"], "failed");
    }
}

#[tokio::test]
async fn a_stream_is_followed_to_its_end() {
    let keeper = &*KEEPER;
    let app = TestApp::new().await;
    let body = json!({"model": MODEL, "prompt": [5, 6], "max_tokens": 20, "temperature": 0, "stream": true});
    for (id, finish) in [("stream-1", "length"), ("stream-2", "cancelled")] {
        let held = app.watch.hold.lock().unwrap();
        let response = app.router.clone().oneshot(named(post("/v1/completions", body.to_string()), id)).await.unwrap();
        let (place, request) = keeper.request(id);
        assert!(!request.closed && request.fields["status"] == "200");
        let mut pieces = response.into_body().into_data_stream();
        if finish == "length" {
            drop(held);
            while pieces.next().await.is_some() {}
            drop(pieces);
        } else {
            drop(pieces);
            drop(held);
        }
        assert_eq!(keeper.below(place, "sequence").await[0].fields["finish"], finish);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !keeper.request(id).1.closed {
            assert!(Instant::now() < deadline, "{id} is not closed");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_followed_step_by_step_under_the_request_that_made_it() {
    let keeper = &*KEEPER;
    let toy = Arc::<Toy>::default();
    let app = toy_app(&toy, Options::default()).await;
    let made = send(&app, "job-1", "/adapters/train", &letters_with("alice", json!({"steps": 4}))).await;
    let id = made.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(app.ended(&id).await["status"], "succeeded");
    let jobs = keeper.of("job", "job-1");
    let [(place, job)] = &jobs[..] else { panic!("{jobs:?}") };
    let field = |name: &str| job.fields.get(name).map(String::as_str);
    assert_eq!((field("job"), field("adapter")), (Some(id.as_str()), Some("alice")));
    assert_eq!((field("method"), field("tenant")), (Some("grpo"), Some("2")));
    assert_eq!((field("attempt"), job.parent), (Some("1"), None));
    let steps = keeper.below(*place, "step").await;
    let numbers: Vec<f64> = steps.iter().map(|step| number(step, "step")).collect();
    assert_eq!(numbers, [1.0, 2.0, 3.0, 4.0]);
    for part in ["rollout_seconds", "grading_seconds", "learning_seconds"] {
        assert!(steps.iter().all(|step| number(step, part) >= 0.0), "{steps:?}");
    }

    toy.fails_from.store(toy.calls.load(Ordering::SeqCst) + 3, Ordering::SeqCst);
    let made = send(&app, "job-2", "/adapters/train", &letters("bob")).await;
    let id = made.json()["id"].as_str().unwrap().to_owned();
    assert_eq!(app.ended(&id).await["status"], "failed");
    let deadline = Instant::now() + Duration::from_secs(10);
    let job = loop {
        let job = keeper.of("job", "job-2").remove(0).1;
        if job.closed {
            break job;
        }
        assert!(Instant::now() < deadline, "{job:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert_eq!((&job.fields["job"], job.fields["outcome"].as_str()), (&id, "failed"));
    let logged = job.events.iter().find(|event| event.contains("training job failed")).unwrap();
    assert!(logged.contains("out of order"), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_attempt_of_a_job_names_the_request_that_made_it() {
    let keeper = &*KEEPER;
    let app = toy_app(&Toy::slow(2), Options::default()).await;
    let made = send(&app, "attempts-1", "/adapters/train", &letters("alice")).await;
    let id = made.json()["id"].as_str().unwrap().to_owned();
    app.until(&id, |job| job["step"].as_u64().unwrap() >= 2).await;
    app.state.service.training().unwrap().play_dead().await;
    app.state.service.store.close().await;
    let app = toy_app(&Arc::default(), Options { folder: Some(app.folder.clone()), ..Options::default() }).await;
    assert_eq!(app.ended(&id).await["status"], "succeeded");
    let attempts = keeper.of("job", "attempts-1");
    let shown: Vec<(&str, &str)> =
        attempts.iter().map(|(_, job)| (job.fields["job"].as_str(), job.fields["attempt"].as_str())).collect();
    assert_eq!(shown, [(id.as_str(), "1"), (id.as_str(), "2")]);
    assert_eq!(attempts[0].1.fields["outcome"], "left");
}
