//! What is told of a sequence to whoever follows its request: one span, made when it is submitted and filled in when it ends. Nothing is done between the
//! two, so a step costs the same whether somebody follows or not.

use std::time::Duration;

use tracing::{Span, field::Empty};

use super::sequence::Sequence;

/// A sequence's span, and the times that will be written into it.
#[derive(Debug)]
pub(super) struct Trace {
    span: Span,
    /// From submission to admission.
    pub(super) queued: Option<Duration>,
    /// From submission to the first token.
    pub(super) first_token: Option<Duration>,
}

impl Trace {
    /// Of a sequence that is submitted within `parent`. Nobody follows one without a parent.
    pub(super) fn within(parent: &Span) -> Self {
        let span = if parent.is_disabled() {
            Span::none()
        } else {
            tracing::debug_span!(
                parent: parent,
                "sequence",
                queue_seconds = Empty,
                first_token_seconds = Empty,
                prompt_tokens = Empty,
                cached_tokens = Empty,
                completion_tokens = Empty,
                preemptions = Empty,
                finish = Empty,
            )
        };
        Self { span, queued: None, first_token: None }
    }

    /// The sequence has ended: how, and what it had come to.
    pub(super) fn end(self, finish: &'static str, sequence: Option<&Sequence>) {
        let Self { span, queued, first_token } = self;
        if span.is_disabled() {
            return;
        }
        // With a sign: an unsigned number would reach a collector as text.
        let count = |of: fn(&Sequence) -> usize| sequence.map(|sequence| of(sequence) as i64);
        tracing::record_all!(
            span,
            queue_seconds = queued.map(|time| time.as_secs_f64()),
            first_token_seconds = first_token.map(|time| time.as_secs_f64()),
            prompt_tokens = count(|sequence| sequence.prompt),
            cached_tokens = count(|sequence| sequence.cached.unwrap_or(0)),
            completion_tokens = count(Sequence::generated),
            preemptions = count(|sequence| sequence.preemptions),
            finish = finish,
        );
    }
}
