//! Large answers: what is in a file, an export, a long list. Reads are not metered, so that a tenant at its limits can always look and make room; but an answer
//! of tens of megabytes lies in memory until its client has taken it. So whoever asks for one needs a place, of which a tenant and all together have a few,
//! and has it until the last byte was handed over. Small answers give it back as soon as they are made.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::{
    body::{Body, HttpBody},
    extract::FromRequestParts,
    http::request::Parts,
    response::{IntoResponse, Response},
};
use bytes::{Buf as _, Bytes};
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    auth::Auth,
    error::{ApiError, ApiResult},
    state::AppState,
};
use crate::{service::Error, tenant::Caller, types::TenantId};

/// Places of a tenant.
const OF_TENANT: usize = 4;
/// Places of all together.
const OF_ALL: usize = 16;
/// Of them those whose answers are being read from the store, which has twice as many connections for reading.
const READING: usize = 2;
/// For how long a request waits for a place: that of an answer which is just being made is soon free.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of an answer that needs no place once it is made.
const SMALL: u64 = 256 << 10;
/// Bytes that are handed over at once.
const PIECE: usize = 64 << 10;
/// Tenants beyond which those without a place are forgotten.
const SWEEP_AT: usize = 1024;

/// The places for large answers.
#[derive(Debug)]
pub(super) struct LargeAnswers {
    all: Arc<Semaphore>,
    reading: Arc<Semaphore>,
    of_tenants: Mutex<HashMap<TenantId, Arc<Semaphore>>>,
    patience: Duration,
}

impl Default for LargeAnswers {
    fn default() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self { all: places(OF_ALL), reading: places(READING), of_tenants: Mutex::default(), patience: PATIENCE }
    }
}

impl LargeAnswers {
    /// A place for an answer to a tenant.
    ///
    /// # Errors
    /// 429 rate_limit_exceeded when none is free for too long.
    pub(super) async fn place(&self, tenant: TenantId) -> Result<Place, Error> {
        let refused = |words: String| Error::rate_limited(words, PATIENCE);
        let too_many = format!("You have {OF_TENANT} large answers under way, as many as you may have at once.");
        let of_tenant = self.taken(self.of_tenant(tenant)).await.ok_or_else(|| refused(too_many))?;
        let busy = || refused("The server has as many large answers under way as it may have at once.".into());
        let of_all = self.taken(self.all.clone()).await.ok_or_else(busy)?;
        let reading = self.taken(self.reading.clone()).await.ok_or_else(busy)?;
        Ok(Place { held: Held { _of_tenant: of_tenant, _of_all: of_all }, reading })
    }

    fn of_tenant(&self, tenant: TenantId) -> Arc<Semaphore> {
        let mut tenants = self.of_tenants.lock();
        if tenants.len() >= SWEEP_AT {
            // A place holds its semaphore, as does whoever waits for one.
            tenants.retain(|_, places| Arc::strong_count(places) > 1);
        }
        tenants.entry(tenant).or_insert_with(|| Arc::new(Semaphore::new(OF_TENANT))).clone()
    }

    async fn taken(&self, places: Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
        tokio::time::timeout(self.patience, places.acquire_owned()).await.ok()?.ok()
    }
}

/// A place while the answer is made.
#[derive(Debug)]
pub(super) struct Place {
    held: Held,
    reading: OwnedSemaphorePermit,
}

/// A place until this is dropped.
#[derive(Debug)]
struct Held {
    _of_tenant: OwnedSemaphorePermit,
    _of_all: OwnedSemaphorePermit,
}

impl Place {
    /// The answer, which is made now. A large one keeps the place until it has been handed over.
    pub(super) fn send(self, answer: impl IntoResponse) -> Response {
        drop(self.reading);
        let answer = answer.into_response();
        if answer.body().size_hint().exact().is_some_and(|bytes| bytes <= SMALL) {
            return answer;
        }
        let held = self.held;
        answer.map(|body| Body::new(Pieces { body, rest: Bytes::new(), _held: held }))
    }
}

/// An authenticated caller with a place for a large answer.
pub(super) struct Large(pub(super) Caller, pub(super) Place);

impl FromRequestParts<AppState> for Large {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> ApiResult<Self> {
        let Auth(caller) = Auth::from_request_parts(parts, state).await?;
        let place = state.outgoing.large.place(caller.tenant).await?;
        Ok(Self(caller, place))
    }
}

/// A body in pieces. They are copies: given out whole it would end with the first look, and its memory live on in the connection's buffer.
struct Pieces {
    body: Body,
    rest: Bytes,
    _held: Held,
}

impl HttpBody for Pieces {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        while self.rest.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                end => return Poll::Ready(end),
            }
        }
        let piece = Bytes::copy_from_slice(&self.rest[..self.rest.len().min(PIECE)]);
        self.rest.advance(piece.len());
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (rest, body) = (self.rest.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        if let Some(upper) = body.upper() {
            hint.set_upper(rest + upper);
        }
        hint.set_lower(rest + body.lower());
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hasty() -> LargeAnswers {
        LargeAnswers { patience: Duration::from_millis(20), ..LargeAnswers::default() }
    }

    async fn hold(answers: &LargeAnswers, tenant: i64) -> Result<Held, Error> {
        Ok(answers.place(TenantId(tenant)).await?.held)
    }

    #[tokio::test]
    async fn a_tenant_has_a_few_places_and_all_together_some_more() {
        let answers = hasty();
        let mut held = Vec::new();
        for tenant in 0..OF_ALL / OF_TENANT {
            for _ in 0..OF_TENANT {
                held.push(hold(&answers, tenant as i64).await.unwrap());
            }
            let refused = hold(&answers, tenant as i64).await.unwrap_err();
            assert_eq!((refused.code, refused.retry_after), (Some("rate_limit_exceeded"), Some(1)));
            assert!(refused.message.starts_with("You have 4"), "{refused}");
        }
        assert!(hold(&answers, 99).await.unwrap_err().message.starts_with("The server has"));
        held.pop();
        held.push(hold(&answers, 99).await.unwrap());
        let answers = LargeAnswers { patience: Duration::from_secs(60), ..answers };
        let waits = async { hold(&answers, 0).await };
        let frees = async {
            tokio::task::yield_now().await;
            held.remove(0);
        };
        assert!(tokio::join!(waits, frees).0.is_ok(), "who comes a moment too early waits");
    }

    #[tokio::test]
    async fn two_large_answers_are_read_at_once() {
        let answers = hasty();
        let mut made = Vec::new();
        for tenant in 0..2 {
            made.push(answers.place(TenantId(tenant)).await.unwrap());
        }
        assert!(answers.place(TenantId(2)).await.is_err());
        let sent: Vec<_> = made.into_iter().map(|place| place.send(vec![0; 1 << 20])).collect();
        assert!(answers.place(TenantId(2)).await.is_ok(), "those are on their way");
        drop(sent);
    }

    #[tokio::test]
    async fn an_answer_has_its_place_to_its_last_byte_and_a_small_one_none() {
        let answers = LargeAnswers::default();
        let free = |answers: &LargeAnswers| answers.all.available_permits();
        let small = answers.place(TenantId(1)).await.unwrap().send(vec![1; SMALL as usize]);
        assert_eq!(free(&answers), OF_ALL);
        assert_eq!(small.into_body().size_hint().exact(), Some(SMALL));

        let whole: Vec<u8> = (0..1_000_000).map(|i| i as u8).collect();
        let mut body = answers.place(TenantId(1)).await.unwrap().send(whole.clone()).into_body();
        assert_eq!(free(&answers), OF_ALL - 1);
        let mut read = Vec::new();
        while !body.is_end_stream() {
            assert_eq!(body.size_hint().exact(), Some((whole.len() - read.len()) as u64));
            let next = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
            let piece = next.unwrap().unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE);
            read.extend_from_slice(&piece);
        }
        assert_eq!((read == whole, free(&answers)), (true, OF_ALL - 1));
        drop(body);
        assert_eq!(free(&answers), OF_ALL);
    }

    #[tokio::test]
    async fn tenants_without_a_place_are_forgotten() {
        let answers = LargeAnswers::default();
        let held = hold(&answers, 0).await.unwrap();
        for tenant in 1..=3 * SWEEP_AT as i64 {
            hold(&answers, tenant).await.unwrap();
        }
        assert!(answers.of_tenants.lock().len() <= SWEEP_AT);
        assert!(answers.of_tenants.lock().contains_key(&TenantId(0)));
        drop(held);
    }
}
