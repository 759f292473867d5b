//! Large bodies on their way in. What they take of the memory is counted by the bytes that have come, for each tenant and for all together; and JSON
//! that takes more than a moment to read is read beside the runtime's threads, one body of a tenant at a time, so that nobody else's request waits for it.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, header, request::Parts},
};
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    auth::OfTenant,
    error::ApiError,
    extract::{parse_json, unreadable},
};
use crate::{
    service::{Error, ErrorKind},
    tenant::Places,
    types::TenantId,
};

/// What is counted at once; a body that is not larger is not counted.
pub(super) const PIECE: usize = 1 << 20;
/// Pieces of a tenant's bodies together.
const OF_TENANT: usize = 128;
/// Pieces of all bodies together.
const OF_ALL: usize = 512;
/// Pieces that a batch is counted as once it is larger than one: its longest line, and groups that are read, waiting and being stored.
pub(super) const BATCH: usize = 16;
/// Bytes of JSON that are read by whoever has them.
const QUICK: usize = 64 << 10;
/// For how long a body waits for room.
const PATIENCE: Duration = Duration::from_secs(1);

/// The room for large bodies, and the places of those that are being read.
#[derive(Debug)]
pub struct Incoming {
    of_all: Arc<Semaphore>,
    of_tenants: Places,
    readers: Arc<Semaphore>,
    readers_of_tenants: Places,
    patience: Duration,
}

impl Default for Incoming {
    fn default() -> Self {
        // The other half of the processors stays with everybody else.
        let readers = std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2));
        Self {
            of_all: Arc::new(Semaphore::new(OF_ALL)),
            of_tenants: Places::new(OF_TENANT),
            readers: Arc::new(Semaphore::new(readers)),
            readers_of_tenants: Places::new(1),
            patience: PATIENCE,
        }
    }
}

/// Room that a body has until this is dropped.
#[derive(Debug, Default)]
pub(super) struct Room {
    permits: Option<[OwnedSemaphorePermit; 2]>,
}

impl Room {
    fn pieces(&self) -> usize {
        self.permits.as_ref().map_or(0, |[of_tenant, _]| of_tenant.num_permits())
    }
}

/// A body that has come, with its room.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) bytes: Bytes,
    tenant: TenantId,
    _room: Room,
}

/// 413 for a body that says of itself that it is longer than `limit` bytes.
pub(super) fn refuse_announced(headers: &HeaderMap, limit: usize) -> Result<(), Error> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    match announced.is_some_and(|length: u64| length > limit as u64) {
        true => Err(too_large("The request body", limit)),
        false => Ok(()),
    }
}

/// 413 for a body or a line of one.
pub(super) fn too_large(what: &str, limit: usize) -> Error {
    Error::new(ErrorKind::TooLarge, format!("{what} is larger than the limit of {limit} bytes."))
}

impl Incoming {
    /// The whole body, or 413 as soon as it is known to be longer than `limit` bytes.
    ///
    /// # Errors
    /// That; 408 for a client that is too slow; 429 and 503 when a large body finds no room, its tenant's or everybody's.
    pub(super) async fn receive(&self, parts: &Parts, body: Body, limit: usize) -> Result<Received, ApiError> {
        refuse_announced(&parts.headers, limit)?;
        let tenant = OfTenant::of(parts);
        let mut chunks = body.into_data_stream();
        let (mut bytes, mut room) = (BytesMut::new(), Room::default());
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(|error| unreadable(&error))?;
            let length = bytes.len() + chunk.len();
            if length > limit {
                return Err(too_large("The request body", limit).into());
            }
            if length > PIECE {
                self.widen(&mut room, tenant, length.div_ceil(PIECE)).await?;
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(Received { bytes: bytes.freeze(), tenant, _room: room })
    }

    /// Makes the room one of so many pieces. A body that is larger than all the room of a tenant has that.
    ///
    /// # Errors
    /// 429 when the tenant's other bodies leave too little, 503 when everybody's do.
    pub(super) async fn widen(&self, room: &mut Room, tenant: TenantId, pieces: usize) -> Result<(), Error> {
        let more = pieces.min(OF_TENANT).saturating_sub(room.pieces());
        if more == 0 {
            return Ok(());
        }
        let more = u32::try_from(more).map_err(Error::internal)?;
        let of_tenant = self.of_tenants.of(tenant).acquire_many_owned(more);
        let Ok(Ok(of_tenant)) = tokio::time::timeout(self.patience, of_tenant).await else {
            let words =
                format!("You have {OF_TENANT} MiB of request bodies under way, as much as you may have at once.");
            return Err(Error::rate_limited(words, PATIENCE));
        };
        let of_all = self.of_all.clone().acquire_many_owned(more);
        let Ok(Ok(of_all)) = tokio::time::timeout(self.patience, of_all).await else {
            return Err(Error::overloaded(
                "The server has as many large request bodies under way as it may have at once.",
            ));
        };
        match &mut room.permits {
            Some([tenants, all]) => {
                tenants.merge(of_tenant);
                all.merge(of_all);
            }
            none => *none = Some([of_tenant, of_all]),
        }
        Ok(())
    }

    /// JSON to a type: see [`parse_json`].
    pub(super) async fn json<T: DeserializeOwned + Send + 'static>(&self, body: &Received) -> Result<T, ApiError> {
        let bytes = body.bytes.clone();
        self.aside(body.tenant, bytes.len(), move || parse_json(&bytes)).await?
    }

    /// Reads so many bytes of a tenant: at once if they are few, else beside the runtime's threads and after what the tenant has there already.
    pub(super) async fn aside<R: Send + 'static>(
        &self,
        tenant: TenantId,
        bytes: usize,
        read: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R, Error> {
        if bytes <= QUICK {
            return Ok(read());
        }
        // In turn: a tenant has one in the queue of all.
        let _of_tenant = self.readers_of_tenants.of(tenant).acquire_owned().await.map_err(Error::internal)?;
        let place = self.readers.clone().acquire_owned().await.map_err(Error::internal)?;
        let read = move || {
            // Until it is read, even if nobody waits for it any more.
            let _place = place;
            read()
        };
        tokio::task::spawn_blocking(read).await.map_err(Error::internal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn impatient() -> Incoming {
        Incoming { patience: Duration::from_millis(20), ..Incoming::default() }
    }

    fn parts(tenant: i64) -> Parts {
        let (mut parts, ()) = axum::http::Request::new(()).into_parts();
        parts.extensions.insert(OfTenant(TenantId(tenant)));
        parts
    }

    /// A body of so many MiB, in pieces.
    fn body(mebibytes: usize) -> Body {
        let chunks = (0..mebibytes * 4).map(|_| Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 256 << 10])));
        Body::from_stream(futures::stream::iter(chunks))
    }

    #[tokio::test]
    async fn a_tenant_has_room_for_some_and_it_comes_back() {
        let incoming = impatient();
        let receive = |tenant, mebibytes| {
            let incoming = &incoming;
            async move { incoming.receive(&parts(tenant), body(mebibytes), 64 << 20).await }
        };
        let held = [receive(1, 60).await.unwrap(), receive(1, 60).await.unwrap()];
        let ApiError(refused) = receive(1, 9).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::RateLimited, "{refused:?}");
        assert!(refused.retry_after.is_some());
        receive(1, 1).await.expect("small ones are not counted");
        receive(2, 64).await.expect("another tenant's room is its own");
        drop(held);
        let held = receive(1, 64).await.unwrap();
        assert_eq!((held.bytes.len(), held._room.pieces()), (64 << 20, 64));
    }

    #[tokio::test]
    async fn all_together_have_room_for_some() {
        let incoming = impatient();
        let mut rooms = Vec::new();
        for tenant in 0..4 {
            let mut room = Room::default();
            incoming
                .widen(&mut room, TenantId(tenant), OF_TENANT + 7)
                .await
                .expect("one body may be larger than the room");
            rooms.push(room);
        }
        let refused = incoming.widen(&mut Room::default(), TenantId(4), 2).await.unwrap_err();
        assert_eq!((refused.kind, refused.code), (ErrorKind::Unavailable, Some("overloaded")), "{refused:?}");
        rooms.pop();
        incoming.widen(&mut Room::default(), TenantId(4), 2).await.unwrap();
    }

    /// However many bodies one tenant has, another's is read next.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn readers_take_turns_by_tenant() {
        let incoming = Arc::new(Incoming { readers: Arc::new(Semaphore::new(1)), ..Incoming::default() });
        let (order, done) = std::sync::mpsc::channel();
        let (go, gate) = std::sync::mpsc::channel::<()>();
        let read = |tenant: i64, work: Box<dyn FnOnce() + Send>| {
            let incoming = incoming.clone();
            tokio::spawn(async move { incoming.aside(TenantId(tenant), QUICK + 1, work).await.unwrap() })
        };
        let mut tasks = vec![read(1, Box::new(move || gate.recv().unwrap()))];
        while incoming.readers.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        for tenant in [1, 1, 1, 2] {
            let order = order.clone();
            tasks.push(read(tenant, Box::new(move || order.send(tenant).unwrap())));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(done.try_recv().is_err());
        incoming.aside(TenantId(1), QUICK, || ()).await.expect("what is small is read at once");
        go.send(()).unwrap();
        for task in tasks {
            task.await.unwrap();
        }
        let first = done.try_iter().collect::<Vec<_>>();
        assert_eq!(first.len(), 4);
        assert_eq!(first[0], 2, "{first:?}");
    }

    #[tokio::test]
    async fn a_panic_of_a_reader_is_an_error() {
        let read: Result<(), _> = Incoming::default().aside(TenantId(1), QUICK + 1, || panic!("on purpose")).await;
        let error = read.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Internal);
    }
}
