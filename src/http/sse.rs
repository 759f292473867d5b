//! Server-sent events as OpenAI's clients read them.

use std::{convert::Infallible, future::ready, time::Duration};

use axum::{
    http::HeaderValue,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::{Stream, StreamExt as _, stream};
use serde::Serialize;

use super::error::ApiError;
use crate::service::Error;

/// A comment line so often, for proxies that drop silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Each chunk a `data:` line, then `data: [DONE]`. A failure is a `data: {"error": ..}` line and the end.
///
/// When the client goes away the stream is dropped, and with it the engine's requests.
pub(super) fn respond<T, S>(pieces: S) -> Response
where
    T: Serialize + Send + 'static,
    S: Stream<Item = Result<Vec<T>, Error>> + Send + 'static,
{
    let events = pieces
        .map(Some)
        .chain(stream::once(ready(None)))
        .scan(false, |failed, piece| {
            if *failed {
                return ready(None);
            }
            let events = match piece {
                Some(Ok(chunks)) => chunks.iter().map(data).collect(),
                Some(Err(error)) => {
                    *failed = true;
                    vec![data(&ApiError(error).body())]
                }
                None => vec![Event::default().data("[DONE]")],
            };
            ready(Some(stream::iter(events)))
        })
        .flatten()
        .map(Ok::<_, Infallible>);
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

fn data<T: Serialize>(chunk: &T) -> Event {
    match Event::default().json_data(chunk) {
        Ok(event) => event,
        // Our own types have string keys and finite numbers; if one ever does not, the stream says so.
        Err(error) => data(&ApiError(Error::internal(error)).body()),
    }
}
