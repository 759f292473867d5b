//! A job's events as they come: what the store has after the last one sent, then whatever is added, until the job has ended.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    http::HeaderValue,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures::stream;
use tokio::sync::watch;

use super::{auth::Shown, error::ApiError, job_objects::EventObject};
use crate::{
    service::{Error, Service},
    tenant::Caller,
};

/// A comment line so often, for proxies that drop silent connections.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// How long nothing may be heard before the store is asked: another process may have written.
const LOOK: Duration = Duration::from_secs(2);
/// Events read at once.
const PAGE: u32 = 200;

/// A reader on its way through a job's events.
struct Reader {
    service: Arc<Service>,
    caller: Caller,
    shown: Shown,
    id: String,
    after: u64,
    ready: VecDeque<Event>,
    changes: watch::Receiver<u64>,
    ended: bool,
}

/// The events after a number, then new ones, then `data: [DONE]`. When the server stops the stream ends without that, and a client comes back with the last number.
/// When the key is revoked, it ends with that as an error.
pub(super) fn follow(service: Arc<Service>, caller: Caller, shown: Shown, id: String, after: u64) -> Response {
    let changes = match service.training() {
        Ok(training) => training.watch(),
        Err(error) => return ApiError(error).into_response(),
    };
    let reader = Reader { service, caller, shown, id, after, ready: VecDeque::new(), changes, ended: false };
    let events = stream::unfold(reader, |mut reader| async {
        let event = reader.next().await?;
        Some((Ok::<_, Infallible>(event), reader))
    });
    let mut response = Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response();
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl Reader {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            if let Err(error) = self.read().await {
                self.ended = true;
                return Some(data(&ApiError(error).body()));
            }
        }
    }

    /// Reads what is new, or waits for it.
    async fn read(&mut self) -> Result<(), Error> {
        self.changes.mark_unchanged();
        self.shown.check(&self.service).await?;
        // The status first: events that come after it are read at the latest the next time.
        let is_final = self.service.job(&self.caller, &self.id).await?.status.is_final();
        let records = self.service.job_events_after(&self.caller, &self.id, self.after, PAGE).await?;
        if let Some(last) = records.last() {
            self.after = last.seq;
            self.ready.extend(records.into_iter().map(|record| {
                let object = EventObject::from(record);
                let event = Event::default().id(object.id.to_string()).event(object.r#type.clone());
                event.data(serde_json::to_string(&object).unwrap_or_default())
            }));
        } else if is_final {
            self.ready.push_back(Event::default().data("[DONE]"));
            self.ended = true;
        } else if self.service.training()?.is_stopping() {
            self.ended = true;
        } else {
            let _ = tokio::time::timeout(LOOK, self.changes.changed()).await;
        }
        Ok(())
    }
}

fn data<T: serde::Serialize>(body: &T) -> Event {
    Event::default().data(serde_json::to_string(body).unwrap_or_default())
}
