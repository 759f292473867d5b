//! Answers of `/adapters/batch` that their clients have not read yet. Many a client sends all of its lines before it reads a single answer, so answers wait in
//! memory. Each batch has a little room of its own, and takes the rest from what all share: of that at most as much as it leaves, so that one cannot take all.
//! Without room the next lines wait to be read until the client has read answers.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// Bytes that all batches share: the answers to more than a million lines.
const SHARED: usize = 128 << 20;
/// Bytes of each batch.
const OWN: usize = 256 << 10;
/// What a piece takes besides its bytes.
const OVERHEAD: usize = 128;
/// How often who waits for its own room looks at that of all.
const LOOK: Duration = Duration::from_millis(100);

/// The room that all batches share.
#[derive(Debug)]
pub(super) struct Unread(Arc<Semaphore>);

impl Default for Unread {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(SHARED)))
    }
}

/// A piece of an answer with its room.
#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    _room: Room,
}

/// Room that is free again when this is dropped.
#[derive(Debug)]
struct Room {
    _permit: OwnedSemaphorePermit,
    /// Of the shared room: what the batch has of it, and this part.
    shared: Option<(Arc<AtomicUsize>, usize)>,
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some((taken, bytes)) = &self.shared {
            taken.fetch_sub(*bytes, Relaxed);
        }
    }
}

/// Where a batch puts its answers.
#[derive(Debug)]
pub(super) struct Answers {
    shared: Arc<Semaphore>,
    own: Arc<Semaphore>,
    /// Bytes of the shared room that this batch has.
    taken: Arc<AtomicUsize>,
    pieces: mpsc::UnboundedSender<Piece>,
}

impl Unread {
    /// Of a new batch: where answers are put, and where they come out.
    pub(super) fn batch(&self) -> (Answers, impl Stream<Item = Bytes> + Send + use<>) {
        let (pieces, received) = mpsc::unbounded_channel();
        let answers =
            Answers { shared: self.0.clone(), own: Arc::new(Semaphore::new(OWN)), taken: Arc::default(), pieces };
        (answers, UnboundedReceiverStream::new(received).map(|piece: Piece| piece.bytes))
    }
}

impl Answers {
    /// Puts a piece of the answer behind the others, once there is room for it. False: nobody reads any more.
    pub(super) async fn put(&self, bytes: Bytes) -> bool {
        let room = self.room(bytes.len() + OVERHEAD).await;
        self.pieces.send(Piece { bytes, _room: room }).is_ok()
    }

    async fn room(&self, bytes: usize) -> Room {
        // A piece larger than all the own room takes all of it.
        let own = u32::try_from(bytes.min(OWN)).unwrap_or(u32::MAX);
        loop {
            if let Ok(permit) = self.own.clone().try_acquire_many_owned(own) {
                return Room { _permit: permit, shared: None };
            }
            if let Some(room) = self.shared_room(bytes) {
                return room;
            }
            // The semaphores are never closed.
            if let Ok(Ok(permit)) = tokio::time::timeout(LOOK, self.own.clone().acquire_many_owned(own)).await {
                return Room { _permit: permit, shared: None };
            }
        }
    }

    /// Some of the shared room, if the batch leaves as much as it then has.
    fn shared_room(&self, bytes: usize) -> Option<Room> {
        if self.taken.load(Relaxed) + bytes > self.shared.available_permits().saturating_sub(bytes) {
            return None;
        }
        let permit = self.shared.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()?;
        self.taken.fetch_add(bytes, Relaxed);
        Some(Room { _permit: permit, shared: Some((self.taken.clone(), bytes)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = 100_000;

    fn piece() -> Bytes {
        vec![b'x'; PIECE - OVERHEAD].into()
    }

    /// Puts pieces until there is no room for a while; how many.
    async fn fill(answers: &Answers) -> usize {
        let mut put = 0;
        while let Ok(read) = tokio::time::timeout(2 * LOOK, answers.put(piece())).await {
            assert!(read);
            put += 1;
        }
        put
    }

    #[tokio::test]
    async fn what_nobody_reads_is_bounded_for_all_together_and_one_leaves_room() {
        let unread = Unread(Arc::new(Semaphore::new(100 * PIECE)));
        let own = OWN / PIECE;
        let (first, mut read) = unread.batch();
        assert_eq!(fill(&first).await, own + 50, "as much as it leaves");
        let (second, unread_second) = unread.batch();
        assert_eq!(fill(&second).await, own + 25);
        let others: Vec<_> = (0..10).map(|_| unread.batch()).collect();
        for (other, _) in &others {
            assert!(fill(other).await >= own, "each has room of its own");
        }
        // What is read makes room again, and gives the bytes in their order.
        assert_eq!(read.next().await.unwrap(), piece());
        assert!(first.put("last".into()).await);
        drop((unread_second, others));
        assert!(!second.put(piece()).await, "nobody reads");
        while let Some(bytes) = read.next().await {
            if bytes == "last" {
                break;
            }
        }
        drop((first, second, read));
        assert_eq!(unread.0.available_permits(), 100 * PIECE);
    }

    /// Larger than all of its own room, and than what is left of the shared one.
    #[tokio::test]
    async fn a_piece_of_any_size_passes_when_it_is_alone() {
        let unread = Unread(Arc::new(Semaphore::new(0)));
        let (answers, mut read) = unread.batch();
        let large = Bytes::from(vec![0; 3 * OWN]);
        for _ in 0..3 {
            assert!(answers.put(large.clone()).await);
            assert_eq!(read.next().await.unwrap().len(), large.len());
        }
    }
}
