//! A request's body: how long it may take, and what is left of one that nobody reads.
//!
//! A body has `--body-timeout-s`, and a second more for each [`SLOWEST`] bytes that came: an upload over a slow line is taken, one byte a second is
//! not. Only the time counts in which the server waits for the client.
//!
//! A request that is refused early (415, 413, 401) is answered while its client still sends. Were the body just dropped, the connection would be
//! closed under the client, which then sees a broken pipe and never the answer. So the rest is read and thrown away, within bounds.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, BodyDataStream, HttpBody};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::time::{Instant, Sleep};

use crate::telemetry::{ConnectionMetrics, TimeoutLabels};

/// Bytes a second of the slowest client that is waited for, in both directions.
pub(super) const SLOWEST: f64 = 16_384.0;
/// Most bytes that are thrown away for a client.
const MOST: usize = 64 << 20;
/// And for so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long bodies may take, and who counts those that take longer.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    /// For a body of no bytes.
    pub(super) timeout: Duration,
    pub(super) metrics: Arc<ConnectionMetrics>,
}

/// A body whose rest is read when it is dropped.
struct Drained {
    body: Option<BodyDataStream>,
    clock: Clock,
}

/// Time that the client took.
struct Clock {
    patience: Patience,
    received: usize,
    waited: Duration,
    /// Since when the client is waited for, and until when.
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl Clock {
    fn came(&mut self, bytes: usize) {
        self.received += bytes;
        self.waited += self.waiting.take().map_or(Duration::ZERO, |(since, _)| since.elapsed());
    }

    /// Ready when the client had its time.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let (_, end) = self.waiting.get_or_insert_with(|| {
            let earned = Duration::from_secs_f64(self.received as f64 / SLOWEST);
            let left = (self.patience.timeout + earned).saturating_sub(self.waited);
            (Instant::now(), Box::pin(tokio::time::sleep(left)))
        });
        end.as_mut().poll(context)
    }
}

/// Wraps a body that has not ended yet.
pub(super) fn drained(body: Body, patience: Patience) -> Body {
    if body.is_end_stream() {
        return body;
    }
    let clock = Clock { patience, received: 0, waited: Duration::ZERO, waiting: None };
    Body::from_stream(Drained { body: Some(body.into_data_stream()), clock })
}

/// Did the client's time run out?
pub(super) fn timed_out(error: &axum::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = cause {
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::TimedOut) {
            return true;
        }
        cause = error.source();
    }
    false
}

impl Stream for Drained {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        match body.poll_next_unpin(context) {
            Poll::Ready(Some(Ok(piece))) => {
                this.clock.came(piece.len());
                Poll::Ready(Some(Ok(piece)))
            }
            Poll::Pending => {
                if this.clock.poll(context).is_pending() {
                    return Poll::Pending;
                }
                this.body = None;
                this.clock.patience.metrics.timeouts.get_or_create(&TimeoutLabels { what: "body" }).inc();
                let error = io::Error::new(io::ErrorKind::TimedOut, "the body took too long");
                Poll::Ready(Some(Err(axum::Error::new(error))))
            }
            // At its end, or broken: there is nothing left to read.
            end => {
                this.body = None;
                end
            }
        }
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        let (Some(mut body), Ok(runtime)) = (self.body.take(), tokio::runtime::Handle::try_current()) else { return };
        let rest = async move {
            let mut read = 0;
            while let Some(Ok(piece)) = body.next().await {
                read += piece.len();
                if read > MOST {
                    return;
                }
            }
        };
        runtime.spawn(tokio::time::timeout(PATIENCE, rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn milliseconds(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn patience() -> Patience {
        Patience { timeout: milliseconds(60), metrics: Arc::default() }
    }

    /// A body of pieces of a size, one every so many milliseconds: how many of its bytes came, or None if it was given up.
    async fn read(piece: usize, pause: u64, pieces: usize) -> Option<usize> {
        let source = futures::stream::unfold(0, move |sent| async move {
            tokio::time::sleep(milliseconds(pause)).await;
            (sent < pieces).then(|| (Ok::<_, io::Error>(Bytes::from(vec![0; piece])), sent + 1))
        });
        let patience = patience();
        let mut body = drained(Body::from_stream(source), patience.clone()).into_data_stream();
        let mut read = 0;
        while let Some(piece) = body.next().await {
            match piece {
                Ok(piece) => read += piece.len(),
                Err(error) => {
                    assert!(timed_out(&error));
                    assert_eq!(patience.metrics.timeouts.get_or_create(&TimeoutLabels { what: "body" }).get(), 1);
                    return None;
                }
            }
        }
        Some(read)
    }

    #[tokio::test]
    async fn a_byte_at_a_time_is_given_up_and_a_slow_line_is_not() {
        assert_eq!(read(1, 5, 100_000).await, None);
        assert_eq!(read(1000, 1000, 1).await, None);
        assert_eq!(read(4096, 5, 50).await, Some(50 * 4096), "each piece earns more than it takes");
        assert_eq!(read(1, 1, 2).await, Some(2));
    }

    /// The time in which nobody reads is the server's own.
    #[tokio::test]
    async fn a_reader_that_takes_its_time_costs_the_client_nothing() {
        let pieces = futures::stream::iter(0..5).map(|_| Ok::<_, io::Error>(Bytes::from_static(b"x")));
        let mut body = drained(Body::from_stream(pieces), patience()).into_data_stream();
        let mut read = 0;
        while let Some(piece) = body.next().await {
            read += piece.unwrap().len();
            tokio::time::sleep(milliseconds(40)).await;
        }
        assert_eq!(read, 5);
    }
}
