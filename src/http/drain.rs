//! What is left of a body that nobody reads.
//!
//! A request that is refused early (415, 413, 401) is answered while its client still sends. Were the body just dropped, the connection would be
//! closed under the client, which then sees a broken pipe and never the answer. So the rest is read and thrown away, within bounds.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::body::{Body, BodyDataStream, HttpBody};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};

/// Most bytes that are thrown away for a client.
const MOST: usize = 64 << 20;
/// And for so long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A body whose rest is read when it is dropped.
struct Drained {
    body: Option<BodyDataStream>,
}

/// Wraps a body that has not ended yet.
pub(super) fn drained(body: Body) -> Body {
    if body.is_end_stream() {
        return body;
    }
    Body::from_stream(Drained { body: Some(body.into_data_stream()) })
}

impl Stream for Drained {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let next = body.poll_next_unpin(context);
        // At its end, or broken: there is nothing left to read.
        if matches!(next, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        next
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
