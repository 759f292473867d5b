//! A connection's clocks: for a head that does not end, for silence between requests, and for an answer that is not taken, or taken too slowly.
//!
//! An answer has `--write-timeout-s`, and a second more for each [`SLOWEST`] bytes that the client took, as a body on its way in: only the time counts in
//! which the server waits for the client. No single wait is longer than the first of the two.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep},
};

use super::ServerConfig;
use crate::http::drain::SLOWEST;
use crate::telemetry::{ConnectionMetrics, TimeoutLabels};

/// Where a connection stands: an odd number while a request runs. It only rises.
#[derive(Debug, Default)]
pub(super) struct Stage(AtomicU64);

impl Stage {
    /// The head of a request has been read.
    pub(super) fn begin(self: &Arc<Self>) -> Running {
        let now = self.number();
        let number = now + if now % 2 == 1 { 2 } else { 1 };
        self.0.store(number, SeqCst);
        Running { stage: self.clone(), number }
    }

    fn number(&self) -> u64 {
        self.0.load(SeqCst)
    }

    /// Which request of the connection runs, or was the last to.
    fn request(&self) -> u64 {
        self.number().div_ceil(2)
    }
}

/// A request that runs; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Running {
    stage: Arc<Stage>,
    number: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        // Not when the next request has begun already.
        let _ = self.stage.0.compare_exchange(self.number, self.number + 1, SeqCst, SeqCst);
    }
}

/// What the reading side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// The end of a head.
    Head,
    /// The next request.
    Next,
    /// Nothing that this clock measures: a request runs.
    Running,
}

/// How an answer is taken.
#[derive(Debug, Default)]
struct Taken {
    /// Of which request.
    request: u64,
    bytes: u64,
    /// Time that the client took for it.
    waited: Duration,
    /// Since when a write waits.
    since: Option<Instant>,
}

impl Taken {
    /// For how long a write may wait that begins to.
    fn left(&self, patience: Duration) -> Duration {
        let earned = Duration::from_secs_f64(self.bytes as f64 / SLOWEST);
        (patience + earned).saturating_sub(self.waited).min(patience)
    }

    fn wrote(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
        self.waited += self.since.take().map_or(Duration::ZERO, |since| since.elapsed());
    }
}

/// A stream that fails with `TimedOut` when its client is too slow.
pub(super) struct Clocked<S> {
    stream: S,
    stage: Arc<Stage>,
    waits: Waits,
    /// The stage up to which `waits` has been brought.
    seen: u64,
    header: Duration,
    idle: Duration,
    write: Duration,
    reading: Pin<Box<Sleep>>,
    writing: Pin<Box<Sleep>>,
    taken: Taken,
    metrics: Arc<ConnectionMetrics>,
}

impl<S> Clocked<S> {
    /// A new connection, of which a head is expected at once.
    pub(super) fn new(stream: S, stage: Arc<Stage>, config: &ServerConfig, metrics: Arc<ConnectionMetrics>) -> Self {
        Self {
            stream,
            stage,
            waits: Waits::Head,
            seen: 0,
            header: config.header_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
            reading: Box::pin(tokio::time::sleep(config.header_timeout)),
            writing: Box::pin(tokio::time::sleep(config.write_timeout)),
            taken: Taken::default(),
            metrics,
        }
    }

    /// Sets the reading side's clock when something else is waited for than before.
    fn follow(&mut self) {
        let number = self.stage.number();
        if number % 2 == 1 {
            self.waits = Waits::Running;
        } else if number != self.seen {
            // A request has ended, which may have begun since the last look.
            self.seen = number;
            self.waits = Waits::Next;
            self.reading.as_mut().reset(Instant::now() + self.idle);
        }
    }

    /// Bytes came.
    fn heard(&mut self) {
        if self.waits == Waits::Next {
            self.waits = Waits::Head;
            self.reading.as_mut().reset(Instant::now() + self.header);
        }
    }

    fn silent(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let what = match self.waits {
            Waits::Running => return Poll::Pending,
            Waits::Head => "header",
            Waits::Next => "idle",
        };
        ready!(self.reading.as_mut().poll(context));
        Poll::Ready(Err(self.timed_out(what)))
    }

    /// Watches a write: the clock runs from the first try that had to wait to the next that did not.
    fn watch(&mut self, context: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        let request = self.stage.request();
        if request != self.taken.request {
            self.taken = Taken { request, ..Taken::default() };
        }
        if let Poll::Ready(written) = written {
            self.taken.wrote(written.as_ref().map_or(0, |bytes| *bytes));
            return Poll::Ready(written);
        }
        if self.taken.since.is_none() {
            let now = Instant::now();
            self.taken.since = Some(now);
            self.writing.as_mut().reset(now + self.taken.left(self.write));
        }
        ready!(self.writing.as_mut().poll(context));
        Poll::Ready(Err(self.timed_out("write")))
    }

    fn timed_out(&self, what: &'static str) -> io::Error {
        self.metrics.timeouts.get_or_create(&TimeoutLabels { what }).inc();
        io::Error::new(io::ErrorKind::TimedOut, format!("{what} timeout"))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Clocked<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.follow();
        let read = Pin::new(&mut self.stream).poll_read(context, into);
        if read.is_pending() {
            return self.silent(context);
        }
        self.heard();
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Clocked<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.watch(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.watch(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;
    use crate::http::TrustedProxies;

    /// A client that is this slow is not given up: longer than all clocks together.
    const AGES: Duration = Duration::from_millis(600);

    const fn milliseconds(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    const CONFIG: ServerConfig = ServerConfig {
        max_connections: 1,
        max_connections_per_address: None,
        trusted: TrustedProxies(Vec::new()),
        header_timeout: milliseconds(60),
        idle_timeout: milliseconds(150),
        write_timeout: milliseconds(100),
        tls: None,
    };

    fn connection() -> (DuplexStream, Clocked<DuplexStream>, Arc<Stage>) {
        let (client, server) = duplex(64);
        let stage = Arc::new(Stage::default());
        (client, Clocked::new(server, stage.clone(), &CONFIG, Arc::default()), stage)
    }

    /// Which clock ends the stream; None if none does.
    async fn ends_by(stream: &mut Clocked<DuplexStream>) -> Option<String> {
        let read = async {
            let mut bytes = [0; 8];
            loop {
                if let Err(error) = stream.read(&mut bytes).await {
                    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
                    return error.to_string();
                }
            }
        };
        tokio::time::timeout(AGES, read).await.ok()
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_has_the_time_of_a_head() {
        let (_client, mut server, _) = connection();
        assert_eq!(ends_by(&mut server).await.unwrap(), "header timeout");
        assert_eq!(server.metrics.timeouts.get_or_create(&TimeoutLabels { what: "header" }).get(), 1);
    }

    /// One byte after the other does not help.
    #[tokio::test]
    async fn a_head_in_single_bytes_has_no_more_time() {
        let (mut client, mut server, _) = connection();
        tokio::spawn(async move {
            while client.write_all(b"x").await.is_ok() {
                tokio::time::sleep(milliseconds(5)).await;
            }
        });
        assert_eq!(ends_by(&mut server).await.unwrap(), "header timeout");
    }

    #[tokio::test]
    async fn a_running_request_has_any_time_and_then_the_connection_may_be_idle() {
        let (mut client, mut server, stage) = connection();
        let running = stage.begin();
        assert_eq!(ends_by(&mut server).await, None);
        drop(running);
        assert_eq!(ends_by(&mut server).await.unwrap(), "idle timeout");
        // The first byte of the next head starts the shorter clock, also after a request that the reading side did not see run.
        drop(stage.begin());
        client.write_all(b"G").await.unwrap();
        assert_eq!(ends_by(&mut server).await.unwrap(), "header timeout");
    }

    /// The end of an answer may be noticed after the next request has begun.
    #[tokio::test]
    async fn a_late_end_does_not_end_the_next_request() {
        let (_client, mut server, stage) = connection();
        let first = stage.begin();
        let second = stage.begin();
        drop(first);
        assert_eq!(ends_by(&mut server).await, None);
        drop(second);
        assert_eq!(ends_by(&mut server).await.unwrap(), "idle timeout");
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_given_up() {
        let (_client, mut server, stage) = connection();
        let _running = stage.begin();
        server.write_all(&[0; 64]).await.unwrap();
        assert_eq!(server.write_all(b"more").await.unwrap_err().to_string(), "write timeout");
    }

    #[tokio::test]
    async fn a_client_that_reads_slowly_is_not_given_up() {
        let (client, mut server, stage) = connection();
        let _running = stage.begin();
        // Each piece earns far more than it takes.
        read_slowly::<4096>(client);
        let began = Instant::now();
        server.write_all(&[0; 4096 * 16]).await.unwrap();
        assert!(began.elapsed() > CONFIG.write_timeout, "the whole takes longer than one wait may");
    }

    /// However short each wait is. The next answer has a time of its own.
    #[tokio::test]
    async fn a_client_that_takes_an_answer_in_single_bytes_is_given_up() {
        let (client, mut server, stage) = connection();
        read_slowly::<1>(client);
        server.write_all(&[0; 64]).await.unwrap();
        let began = Instant::now();
        for _ in 0..6 {
            let _running = stage.begin();
            server.write_all(&[0; 2]).await.unwrap();
        }
        assert!(began.elapsed() > CONFIG.write_timeout, "six answers take longer than one may");
        let _running = stage.begin();
        assert_eq!(server.write_all(&[0; 1000]).await.unwrap_err().to_string(), "write timeout");
        assert!(server.taken.bytes < 200, "{} bytes", server.taken.bytes);
    }

    /// Reads so many bytes every 15 ms.
    fn read_slowly<const N: usize>(mut client: DuplexStream) {
        tokio::spawn(async move {
            let mut bytes = [0; N];
            while client.read_exact(&mut bytes).await.is_ok() {
                tokio::time::sleep(milliseconds(15)).await;
            }
        });
    }
}
