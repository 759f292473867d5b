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
