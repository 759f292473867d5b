//! The span of a request: from its head to the last byte of its answer. What clients write is in it only as far as it is an id: neither paths (they
//! hold names) nor keys, prompts and bodies.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use axum::{
    body::{Body, HttpBody},
    http::HeaderMap,
    response::Response,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tracing::{Span, field::Empty};

use crate::telemetry;

/// Where callers say which trace a request belongs to (W3C Trace Context).
const TRACEPARENT: &str = "traceparent";

/// A request's span; `tenant` and `status` are recorded when they are known.
pub(super) fn of_request(method: &'static str, route: &str, id: &str, headers: &HeaderMap) -> Span {
    // Of the highest level: whatever a filter lets into the log then has the request's id.
    let span = tracing::error_span!("request", method, route, request_id = id, tenant = Empty, status = Empty);
    if let Some(parent) = headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()) {
        telemetry::adopt(&span, parent);
    }
    span
}

/// Keeps the span for a body that is still being made, and makes it within.
pub(super) fn with_body(response: Response, span: Span) -> Response {
    if span.is_disabled() || response.body().size_hint().exact().is_some() {
        return response;
    }
    response.map(|body| Body::new(Spanned { body, span }))
}

/// A body that is made within a span.
struct Spanned {
    body: Body,
    span: Span,
}

impl HttpBody for Spanned {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Self { body, span } = &mut *self;
        let _within = span.enter();
        Pin::new(body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tracing_subscriber::{EnvFilter, Layer as _, fmt, layer::SubscriberExt as _};

    use super::*;
    use crate::telemetry::SpanSink;

    /// `cargo nextest run --lib --run-ignored only cost_of_a_span --no-capture`
    #[test]
    #[ignore = "measures"]
    fn cost_of_a_span() {
        let log = |filter: &str| fmt::layer().with_writer(std::io::sink).with_filter(EnvFilter::new(filter));
        let sink = SpanSink::start(&"http://127.0.0.1:9".parse().unwrap()).unwrap();
        let once = || {
            let began = Instant::now();
            let span = of_request("POST", "/v1/completions", "req-019bd2f1c1d27c3f8f1a8c4be4a6e0f1", &HeaderMap::new());
            span.in_scope(|| {
                Span::current().record("tenant", 2);
            });
            span.record("status", 200);
            drop(span);
            began.elapsed()
        };
        let measure = |name: &str| {
            let mut times: Vec<Duration> = (0..20_000).map(|_| once()).collect();
            times.sort();
            println!("{name}: {:?}", times[times.len() / 2]);
        };
        measure("nobody");
        let registry = tracing_subscriber::registry;
        tracing::subscriber::with_default(registry().with(log("off")), || measure("a log that shows nothing"));
        tracing::subscriber::with_default(registry().with(log("info")), || measure("the log"));
        let both = registry().with(log("info")).with(sink.layer());
        tracing::subscriber::with_default(both, || measure("the log and a collector"));
        sink.flush();
    }
}
