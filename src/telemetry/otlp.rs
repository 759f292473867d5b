//! Spans on their way to an OpenTelemetry collector: OTLP over HTTP (protobuf), in batches, by a thread of its own.
//!
//! Only spans go there, and only ours. Events do not: they have words of errors in them, and prompts under `--log-prompts`.
//! Nobody waits for the collector. What it does not take in time is lost: spans wait in a queue of bounded length, and one for which there is no place is dropped.
//! The standard's variables count as far as they are not said here: `OTEL_EXPORTER_OTLP_HEADERS` (a key for the collector), `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`,
//! `OTEL_RESOURCE_ATTRIBUTES`.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, Instant},
};

use opentelemetry::{
    KeyValue,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanKind, Status, TraceContextExt as _, TracerProvider as _},
};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{ExporterBuildError, Protocol, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{BatchSpanProcessor, SdkTracerProvider, SpanData, SpanExporter},
};
use parking_lot::Mutex;
use tracing::{Level, Span, Subscriber, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::{Layer, filter::filter_fn, registry::LookupSpan};
use ureq::{Agent, http::Uri};

/// Where collectors take traces, below the URL that names them.
const TRACES: &str = "/v1/traces";
/// How long the collector has to take a batch.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it has for the last one, when the server ends.
const LAST_PATIENCE: Duration = Duration::from_secs(2);
/// That it does not take them is said so often.
const SAY: Duration = Duration::from_secs(60);
/// Longest answer that is read.
const MAX_ANSWER: u64 = 1 << 20;

/// A collector's URL: `http://127.0.0.1:4318`, with or without `/v1/traces`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtlpEndpoint(String);

impl FromStr for OtlpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri: Uri = text.trim().parse().map_err(|error| format!("{error}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) {
            return Err("the URL must begin with http:// or https://".to_owned());
        }
        let authority = uri.authority().ok_or("the URL names no host")?;
        if authority.as_str().contains('@') {
            return Err("the URL must not hold a user name or password: see OTEL_EXPORTER_OTLP_HEADERS".to_owned());
        }
        if authority.host().is_empty() {
            return Err("the URL names no host".to_owned());
        }
        if uri.query().is_some() {
            return Err("the URL must not have a query".to_owned());
        }
        let scheme = uri.scheme_str().unwrap_or_default();
        let path = uri.path().trim_end_matches('/');
        let path = path.strip_suffix(TRACES).unwrap_or(path);
        Ok(Self(format!("{scheme}://{authority}{path}{TRACES}")))
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What sends spans could not be made; most likely a variable `OTEL_*` says what cannot be.
#[derive(Debug, thiserror::Error)]
#[error("--otlp-endpoint: {0}")]
pub struct OtlpError(#[from] ExporterBuildError);

/// What takes spans to the collector.
#[derive(Debug)]
pub struct SpanSink {
    provider: SdkTracerProvider,
}

impl SpanSink {
    /// Starts the thread that sends. The collector need not be there.
    ///
    /// # Errors
    /// Variables of the standard that say what cannot be.
    pub fn start(endpoint: &OtlpEndpoint) -> Result<Self, OtlpError> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_http()
            .with_http_client(Collector::new())
            .with_endpoint(endpoint.to_string())
            .with_protocol(Protocol::HttpBinary)
            .with_timeout(PATIENCE)
            .build()?;
        let resource = Resource::builder()
            .with_service_name("mote")
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .build();
        let processor = BatchSpanProcessor::builder(Translated(exporter)).build();
        let provider = SdkTracerProvider::builder().with_resource(resource).with_span_processor(processor).build();
        Ok(Self { provider })
    }

    /// Hands it the spans of this program, whatever the log shows.
    pub fn layer<S: Subscriber + for<'a> LookupSpan<'a>>(&self) -> impl Layer<S> + use<S> {
        let own = |target: &str| target == "mote" || target.starts_with("mote::");
        let filter = filter_fn(move |metadata| {
            metadata.is_span() && *metadata.level() <= Level::DEBUG && own(metadata.target())
        });
        tracing_opentelemetry::layer()
            .with_tracer(self.provider.tracer("mote"))
            .with_context_activation(false)
            .with_tracked_inactivity(false)
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_filter(filter.with_max_level_hint(LevelFilter::DEBUG))
    }

    /// Sends what is left, within two seconds.
    pub fn flush(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST_PATIENCE) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// Makes a span a part of the trace that a W3C `traceparent` names, where spans are sent anywhere. What is no `traceparent` is passed over.
pub fn adopt(span: &Span, traceparent: &str) {
    let parent = TraceContextPropagator::new().extract(&Traceparent(traceparent));
    if parent.span().span_context().is_valid() {
        // Fails where no spans are sent.
        let _ = span.set_parent(parent);
    }
}

/// The one header that is believed: `tracestate` would take a client's own words to the collector.
struct Traceparent<'a>(&'a str);

impl Extractor for Traceparent<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        (key == "traceparent").then_some(self.0)
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent"]
    }
}

/// Sends spans under the names that OpenTelemetry's conventions have for what is in them.
#[derive(Debug)]
struct Translated<E>(E);

impl<E: SpanExporter> SpanExporter for Translated<E> {
    fn export(&self, mut batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        batch.iter_mut().for_each(translate);
        self.0.export(batch)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.0.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.0.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.0.set_resource(resource);
    }
}

/// Our words are short, for the log; a collector knows requests by the names of the HTTP conventions.
fn translate(span: &mut SpanData) {
    let text = |span: &SpanData, key: &str| {
        let found = span.attributes.iter().find(|attribute| attribute.key.as_str() == key);
        found.map(|attribute| attribute.value.as_str().into_owned())
    };
    let mut failed = ["finish", "outcome"].iter().any(|key| text(span, key).is_some_and(|end| end == "failed"));
    if span.name == "request" {
        let status: Option<u16> = text(span, "status").and_then(|status| status.parse().ok());
        failed |= status.is_some_and(|status| status >= 500);
        if let (Some(method), Some(route)) = (text(span, "method"), text(span, "route")) {
            span.name = format!("{method} {route}").into();
        }
        span.span_kind = SpanKind::Server;
        for attribute in &mut span.attributes {
            let name = match attribute.key.as_str() {
                "method" => "http.request.method",
                "route" => "http.route",
                "status" => "http.response.status_code",
                _ => continue,
            };
            attribute.key = name.into();
        }
    }
    if failed {
        span.status = Status::error("");
    }
}

/// The collector, by the HTTP client that the project has.
#[derive(Debug)]
struct Collector {
    agent: Agent,
    /// When it was last said that it takes nothing.
    said: Mutex<Option<Instant>>,
}

impl Collector {
    fn new() -> Self {
        let config = Agent::config_builder()
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .user_agent(concat!("mote/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), said: Mutex::default() }
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, ureq::Error> {
        let (head, body) = request.into_parts();
        let mut answer = self.agent.run(Request::from_parts(head, &body[..]))?;
        let body = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_vec()?;
        Ok(answer.map(|_| body.into()))
    }

    /// Once in a while, however many batches it is about.
    fn say(&self, cause: &dyn fmt::Display) {
        let mut said = self.said.lock();
        if said.is_none_or(|at| at.elapsed() >= SAY) {
            *said = Some(Instant::now());
            tracing::warn!(%cause, "spans do not reach the collector of --otlp-endpoint and are lost");
        }
    }
}

#[async_trait::async_trait]
impl HttpClient for Collector {
    /// Waits: the thread that calls has nothing else to do.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let answer = self.send(request).inspect_err(|error| self.say(error))?;
        if !answer.status().is_success() {
            self.say(&format_args!("it answered {}", answer.status()));
        }
        Ok(answer)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use opentelemetry_sdk::trace::SimpleSpanProcessor;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// Keeps what it is to send.
    #[derive(Debug, Clone, Default)]
    struct Probe(Arc<Mutex<Vec<SpanData>>>);

    impl SpanExporter for Probe {
        async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
            self.0.lock().extend(batch);
            Ok(())
        }
    }

    #[test]
    fn spans_are_sent_under_the_names_that_collectors_know_and_nothing_else_is() {
        let probe = Probe::default();
        let processor = SimpleSpanProcessor::new(Translated(probe.clone()));
        let sink = SpanSink { provider: SdkTracerProvider::builder().with_span_processor(processor).build() };
        tracing::subscriber::with_default(tracing_subscriber::registry().with(sink.layer()), || {
            for status in [200, 404, 503] {
                let request = tracing::error_span!("request", method = "POST", route = "/x/{name}", status);
                adopt(&request, "no trace at all");
                request.in_scope(|| tracing::error!("words"));
            }
            drop(tracing::debug_span!("sequence", finish = "failed"));
            drop(tracing::debug_span!("job", method = "grpo", outcome = "succeeded"));
            drop(tracing::trace_span!("detail"));
            drop(tracing::error_span!(target: "hyper", "theirs"));
        });
        let sent = probe.0.lock();
        let names: Vec<&str> = sent.iter().map(|span| span.name.as_ref()).collect();
        assert_eq!(names, ["POST /x/{name}", "POST /x/{name}", "POST /x/{name}", "sequence", "job"]);
        let failed: Vec<bool> = sent.iter().map(|span| span.status != Status::Unset).collect();
        assert_eq!(failed, [false, false, true, true, false]);
        let keys = |span: &SpanData| -> Vec<String> {
            span.attributes.iter().map(|attribute| attribute.key.to_string()).collect()
        };
        assert_eq!(keys(&sent[0]), ["http.request.method", "http.route", "http.response.status_code"]);
        assert_eq!(keys(&sent[4]), ["method", "outcome"]);
        assert_eq!((&sent[0].span_kind, &sent[4].span_kind), (&SpanKind::Server, &SpanKind::Internal));
        assert!(sent.iter().all(|span| span.events.is_empty()));
    }

    #[test]
    fn a_collector_is_named_by_its_url() {
        let read = |text: &str| text.parse::<OtlpEndpoint>().map(|endpoint| endpoint.to_string());
        for same in ["http://127.0.0.1:4318", "http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"] {
            assert_eq!(read(same).unwrap(), "http://127.0.0.1:4318/v1/traces");
        }
        assert_eq!(read("https://otel.example.org/mote").unwrap(), "https://otel.example.org/mote/v1/traces");
        for (bad, word) in [
            ("127.0.0.1:4318", "http://"),
            ("/v1/traces", "http://"),
            ("ftp://example.org", "http://"),
            ("http://me:secret@example.org", "password"),
            ("http://example.org/?key=1", "query"),
            ("http://", ""),
            ("a collector", ""),
            ("", ""),
        ] {
            assert!(read(bad).unwrap_err().contains(word), "{bad}");
        }
    }
}
