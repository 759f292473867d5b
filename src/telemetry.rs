//! Metric names, the counters that more than one room writes to, and the way of spans to a collector.
//!
//! Labels are bounded: routes, statuses and kinds, never a key or a path. (What is told of single tenants and adapters is counted in `service`.)

mod otlp;
mod process;

use std::sync::Arc;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

pub use otlp::{OtlpEndpoint, OtlpError, SpanSink, adopt};
pub use process::ProcessCollector;

/// Upper bounds of the buckets for durations, in seconds.
const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];

/// The same for what takes less than a request.
const SHORT_SECONDS: [f64; 12] =
    [0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.1, 1.0];

/// A route, by its pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RouteLabels {
    /// GET, POST, ..., or `other`.
    pub method: &'static str,
    /// `/adapters/{name}`, or `unmatched`.
    pub route: String,
}

/// A route and how it went.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// The route.
    #[prometheus(flatten)]
    pub route: RouteLabels,
    /// HTTP status.
    pub status: u16,
}

/// Prompt or completion.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TokenLabels {
    /// `prompt` or `completion`.
    pub kind: &'static str,
}

/// How a training job ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct JobLabels {
    /// `succeeded`, `failed` or `cancelled`.
    pub status: &'static str,
}

/// Which clock of a connection ran out.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct TimeoutLabels {
    /// `header`, `idle`, `body` or `write`.
    pub what: &'static str,
}

/// What cannot be read from the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct DamagedLabels {
    /// `tenant`, `key` or `job`.
    pub kind: &'static str,
}

/// Which cap a connection was beyond.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabels {
    /// `all` for `--max-connections`, `address` for `--max-connections-per-address`.
    pub cap: &'static str,
}

/// What the listener counts.
#[derive(Debug, Default)]
pub struct ConnectionMetrics {
    /// `mote_connections`
    pub open: Gauge,
    /// `mote_connections_refused_total`
    pub refused: Family<RefusalLabels, Counter>,
    /// `mote_connection_timeouts_total`
    pub timeouts: Family<TimeoutLabels, Counter>,
}

impl ConnectionMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register("mote_connections", "Open connections", self.open.clone());
        registry.register(
            "mote_connections_refused",
            "Connections refused because there were as many, of all or of one address, as there may be",
            self.refused.clone(),
        );
        for cap in ["all", "address"] {
            drop(self.refused.get_or_create(&RefusalLabels { cap }));
        }
        registry.register(
            "mote_connection_timeouts",
            "Connections and bodies given up, by the clock that ran out",
            self.timeouts.clone(),
        );
    }
}

/// Counters of the server; the engine keeps its own and is asked on each scrape.
#[derive(Debug)]
pub struct Metrics {
    /// `mote_http_requests_total`
    pub requests: Family<RequestLabels, Counter>,
    /// `mote_http_request_seconds`: until the response headers are ready, so to the first byte of a stream.
    pub request_seconds: Family<RouteLabels, Histogram>,
    /// `mote_tokens_total`: of finished requests, as billed.
    pub tokens: Family<TokenLabels, Counter>,
    /// `mote_cached_prompt_tokens_total`
    pub cached_tokens: Counter,
    /// `mote_time_to_first_text_seconds`
    pub first_text_seconds: Histogram,
    /// `mote_training_jobs_total`: of jobs that a worker brought to their end.
    pub train_jobs: Family<JobLabels, Counter>,
    /// `mote_training_steps_total`
    pub train_steps: Counter,
    /// `mote_training_tokens_total`: of completions and demonstrations.
    pub train_tokens: Counter,
    /// Of the listener.
    pub connections: Arc<ConnectionMetrics>,
    /// `mote_rows_damaged`: as the start found them. Adapters are counted apart, as they come and go.
    pub damaged: Family<DamagedLabels, Gauge>,
    /// `mote_requests_shed_total`: answered 503 because the queue's expected wait was beyond `--shed-after-s`.
    pub shed: Counter,
}

fn seconds() -> Histogram {
    Histogram::new(SECONDS)
}

/// Durations of what takes less than a request.
pub fn short_seconds() -> Histogram {
    Histogram::new(SHORT_SECONDS)
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            request_seconds: Family::new_with_constructor(seconds),
            tokens: Family::default(),
            cached_tokens: Counter::default(),
            first_text_seconds: seconds(),
            train_jobs: Family::default(),
            train_steps: Counter::default(),
            train_tokens: Counter::default(),
            connections: Arc::default(),
            damaged: Family::default(),
            shed: Counter::default(),
        }
    }
}

impl Metrics {
    /// Registers everything under its name (the encoder adds `_total` to counters).
    pub fn register(&self, registry: &mut Registry) {
        registry.register("mote_http_requests", "Requests by route and status", self.requests.clone());
        registry.register(
            "mote_http_request_seconds",
            "Time until the response headers are ready",
            self.request_seconds.clone(),
        );
        registry.register("mote_tokens", "Tokens of finished requests", self.tokens.clone());
        registry.register(
            "mote_cached_prompt_tokens",
            "Prompt tokens of finished requests whose KV came from the prefix cache",
            self.cached_tokens.clone(),
        );
        registry.register(
            "mote_time_to_first_text_seconds",
            "Time from the arrival of a completion to the first text for its client; without a stream that is all of it",
            self.first_text_seconds.clone(),
        );
        registry.register("mote_training_jobs", "Training jobs by how they ended", self.train_jobs.clone());
        registry.register("mote_training_steps", "Steps of training jobs", self.train_steps.clone());
        registry.register(
            "mote_training_tokens",
            "Tokens of completions and demonstrations in training",
            self.train_tokens.clone(),
        );
        self.connections.register(registry);
        let help = "Tenants, keys and unfinished jobs that could not be read when the server started";
        registry.register("mote_rows_damaged", help, self.damaged.clone());
        // All are there from the beginning: an alert cannot be made on a series that comes with its first case.
        for kind in ["tenant", "key", "job"] {
            drop(self.damaged.get_or_create(&DamagedLabels { kind }));
        }
        registry.register(
            "mote_requests_shed",
            "Completions refused because they would have waited too long",
            self.shed.clone(),
        );
    }
}
