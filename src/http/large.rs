//! Large answers: what is in a file, an export, a long list. Reads are not metered, so that a tenant at its limits can always look and make room; but an answer
//! of tens of megabytes lies in memory until its client has taken it. So whoever asks for one needs a place, of which a tenant and all together have a few,
//! and has it until the last byte was handed over. Small answers give it back as soon as they are made.

use std::{
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
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::{
    auth::Auth,
    error::{ApiError, ApiResult},
    state::AppState,
};
use crate::{
    service::Error,
    tenant::{Caller, Places},
    types::TenantId,
};

/// Places of a tenant.
const OF_TENANT: usize = 4;
/// Answers of all together that are large and on their way.
const OF_ALL: usize = 16;
/// Answers that are being made at once. The store has one connection more for reading.
const MADE: usize = 3;
/// For how long a request waits for one of its tenant's places: that of an answer which is just being made is soon free.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of an answer that needs no place once it is made, whoever has the others.
const SMALL: u64 = 256 << 10;
/// Bytes that are handed over at once.
const PIECE: usize = 64 << 10;

/// The places for large answers.
#[derive(Debug)]
pub(super) struct LargeAnswers {
    all: Arc<Semaphore>,
    made: Arc<Semaphore>,
    of_tenants: Places,
    patience: Duration,
}

impl Default for LargeAnswers {
    fn default() -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self { all: places(OF_ALL), made: places(MADE), of_tenants: Places::new(OF_TENANT), patience: PATIENCE }
    }
}

impl LargeAnswers {
    /// A place for an answer to a tenant, which is made next.
    ///
    /// # Errors
    /// 429 rate_limit_exceeded when the tenant has none free for too long.
    pub(super) async fn place(&self, tenant: TenantId) -> Result<Place, Error> {
        let of_tenant = tokio::time::timeout(self.patience, self.of_tenants.of(tenant).acquire_owned()).await;
        let Ok(Ok(of_tenant)) = of_tenant else {
            let words = format!("You have {OF_TENANT} large answers under way, as many as you may have at once.");
            return Err(Error::rate_limited(words, PATIENCE));
        };
        // In turn: a tenant has at most its places in this queue, and none of those before it waits for a client.
        let made = self.made.clone().acquire_owned().await.map_err(Error::internal)?;
        Ok(Place { all: self.all.clone(), of_tenant, made })
    }
}

/// A place while the answer is made.
#[derive(Debug)]
pub(super) struct Place {
    all: Arc<Semaphore>,
    of_tenant: OwnedSemaphorePermit,
    made: OwnedSemaphorePermit,
}

/// A place until this is dropped.
#[derive(Debug)]
struct Held {
    _of_all: OwnedSemaphorePermit,
    _of_tenant: OwnedSemaphorePermit,
}

impl Place {
    /// The answer, which is made now. A large one keeps the place until it has been handed over, or is a 429 if there are too many of all tenants.
    pub(super) fn send(self, answer: impl IntoResponse) -> Response {
        let answer = answer.into_response();
        drop(self.made);
        if answer.body().size_hint().exact().is_some_and(|bytes| bytes <= SMALL) {
            return answer;
        }
        let Ok(of_all) = self.all.try_acquire_owned() else {
            let words = "The server has as many large answers under way as it may have at once.";
            return ApiError(Error::rate_limited(words, PATIENCE)).into_response();
        };
        let held = Held { _of_all: of_all, _of_tenant: self.of_tenant };
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

    const LARGE: usize = 1_000_000;

    fn hasty() -> LargeAnswers {
        LargeAnswers { patience: Duration::from_millis(20), ..LargeAnswers::default() }
    }

    /// What a tenant gets that asks for so many bytes, on its way.
    async fn asked(answers: &LargeAnswers, tenant: i64, bytes: usize) -> Response {
        match answers.place(TenantId(tenant)).await {
            Ok(place) => place.send(vec![7; bytes]),
            Err(error) => ApiError(error).into_response(),
        }
    }

    async fn sent(answers: &LargeAnswers, tenant: i64, bytes: usize) -> Response {
        let answer = asked(answers, tenant, bytes).await;
        assert!(answer.status().is_success(), "{bytes} bytes to tenant {tenant}");
        answer
    }

    async fn refused(answers: &LargeAnswers, tenant: i64, bytes: usize) {
        let answer = asked(answers, tenant, bytes).await;
        assert_eq!((answer.status().as_u16(), &answer.headers()["retry-after"]), (429, &1.into()));
    }

    #[tokio::test]
    async fn a_tenant_has_a_few_places_and_all_together_some_more() {
        let answers = hasty();
        let mut held = Vec::new();
        for tenant in 0..(OF_ALL / OF_TENANT) as i64 {
            for _ in 0..OF_TENANT {
                held.push(sent(&answers, tenant, LARGE).await);
            }
            refused(&answers, tenant, 1).await;
        }
        refused(&answers, 99, LARGE).await;
        for _ in 0..2 * OF_TENANT {
            // Small answers are made whoever has the places.
            held.push(sent(&answers, 99, SMALL as usize).await);
        }
        held.remove(0);
        held.push(sent(&answers, 99, LARGE).await);
        let answers = LargeAnswers { patience: Duration::from_secs(60), ..answers };
        let waits = sent(&answers, 1, 1);
        let frees = async {
            tokio::task::yield_now().await;
            held.clear();
        };
        // Who comes a moment too early waits.
        tokio::join!(waits, frees);
    }

    #[tokio::test]
    async fn a_few_large_answers_are_made_at_once() {
        let answers = hasty();
        let mut places = Vec::new();
        for tenant in 0..MADE as i64 {
            places.push(answers.place(TenantId(tenant)).await.unwrap());
        }
        let another = || tokio::time::timeout(Duration::from_millis(100), answers.place(TenantId(99)));
        assert!(another().await.is_err(), "it waits");
        let sent = places.pop().unwrap().send(vec![7; LARGE]);
        assert!(another().await.unwrap().is_ok(), "that one is on its way");
        drop(sent);
    }

    #[tokio::test]
    async fn an_answer_has_its_place_to_its_last_byte_and_a_small_one_none() {
        let answers = LargeAnswers::default();
        let free = || (answers.all.available_permits(), answers.of_tenants.of(TenantId(1)).available_permits());
        let small = sent(&answers, 1, SMALL as usize).await;
        assert_eq!(free(), (OF_ALL, OF_TENANT));
        assert_eq!(small.into_body().size_hint().exact(), Some(SMALL));

        let whole: Vec<u8> = (0..LARGE).map(|i| i as u8).collect();
        let mut body = answers.place(TenantId(1)).await.unwrap().send(whole.clone()).into_body();
        let mut read = Vec::new();
        while !body.is_end_stream() {
            assert_eq!(free(), (OF_ALL - 1, OF_TENANT - 1));
            assert_eq!(body.size_hint().exact(), Some((whole.len() - read.len()) as u64));
            let next = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await;
            let piece = next.unwrap().unwrap().into_data().unwrap();
            assert!(piece.len() <= PIECE);
            read.extend_from_slice(&piece);
        }
        assert!(read == whole);
        drop(body);
        assert_eq!(free(), (OF_ALL, OF_TENANT));
    }
}
