//! The listener: our own accept loop over hyper, because what protects it lives below HTTP. Every connection has clocks ([`clock`]), a bounded send
//! buffer and a place ([`places`]); it may be TLS ([`tls`]).
//!
//! HTTP/1.1 only: one request at a time on a connection, so a connection is at most one running request, and the cap bounds them too.

mod clock;
mod guard;
mod places;
mod tls;

use std::{convert::Infallible, future::Future, io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::ServiceExt as _;

pub use tls::{TlsError, tls_config};

use super::{TrustedProxies, edge::DATA_POLICY, middleware::new_request_id, peer::Socket};
use crate::telemetry::{ConnectionMetrics, RefusalLabels};
use clock::{Clocked, Stage};
use guard::Guarded;
use places::{Cap, Place, Places};

/// Bytes of an answer that wait in the program for a client, besides those in the system's send buffer.
const WRITE_BUFFER: usize = 128 << 10;
/// Bytes of an answer that the system holds for a client. (Linux doubles it.)
const SEND_BUFFER: usize = 256 << 10;
/// After so long without a byte the system asks whether the peer is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// Refusals that are being written at once; beyond them connections are only closed.
const REFUSALS: usize = 64;
/// For how long a refused client may take its answer.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);
/// Between two tries when the system gives no connection, because there are too many open files for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection may take.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Connections at once.
    pub max_connections: usize,
    /// Of them those of one address, an IPv6 address by its /64; None: as many as there are.
    pub max_connections_per_address: Option<usize>,
    /// Addresses that many clients are behind: their connections count only in all.
    pub trusted: TrustedProxies,
    /// From the first byte of a request to the end of its head; for a new connection from its beginning, TLS included.
    pub header_timeout: Duration,
    /// Between two requests.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of an answer that waits for it, and in all, besides a second for each 16 KiB that it took.
    pub write_timeout: Duration,
    /// Certificates and keys; None for plain HTTP.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            max_connections: 900,
            max_connections_per_address: Some(450),
            trusted: TrustedProxies::default(),
            header_timeout: seconds(10),
            idle_timeout: seconds(75),
            write_timeout: seconds(30),
            tls: None,
        }
    }
}

/// What all connections share.
#[derive(Clone)]
struct Server {
    router: Router,
    config: Arc<ServerConfig>,
    metrics: Arc<ConnectionMetrics>,
    stop: CancellationToken,
}

/// Serves until `stop` resolves, then until the requests that run have ended. As long as they do, new connections are still taken, for one request each:
/// whoever asks `/readyz` shall read that the server is leaving, and not guess. Dropping the future cuts nothing off: the connections are tasks.
///
/// # Errors
/// The listener cannot be set up.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    config: ServerConfig,
    metrics: Arc<ConnectionMetrics>,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    // Connections inherit it. It turns the system's own sizing off, under which a client that never reads may have megabytes.
    SockRef::from(&listener).set_send_buffer_size(SEND_BUFFER)?;
    let places = Places::new(&config);
    let refusals = Arc::new(Semaphore::new(REFUSALS));
    let server = Server { router, config: Arc::new(config), metrics, stop: CancellationToken::new() };
    let running = TaskTracker::new();
    let mut tasks = running.clone();
    let ended = async {
        stop.await;
        server.stop.cancel();
        running.close();
        running.wait().await;
    };
    let mut ended = pin!(ended);
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = &mut ended => return Ok(()),
        };
        if running.is_closed() {
            // What comes now is not waited for.
            tasks = TaskTracker::new();
        }
        match places.take(peer.ip()) {
            Ok(place) => tasks.spawn(server.clone().connection(stream, peer, place)),
            Err(cap) => {
                server.metrics.refused.get_or_create(&RefusalLabels { cap: cap.label() }).inc();
                let Ok(place) = refusals.clone().try_acquire_owned() else { continue };
                let plain = server.config.tls.is_none();
                tasks.spawn(async move {
                    if plain {
                        refuse(stream, cap, place).await
                    }
                })
            }
        };
    }
}

/// The next connection. A failure of one is not the listener's.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "no connection can be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Beyond a cap: an answer at once is better than a wait in the backlog, which no client can tell from a dead server.
async fn refuse(mut stream: TcpStream, cap: Cap, _place: OwnedSemaphorePermit) {
    let body =
        format!(r#"{{"error":{{"message":"{}","type":"api_error","param":null,"code":"overloaded"}}}}"#, cap.words());
    // What every answer has, though the request was not read.
    let common = format!(
        "x-request-id: {}\r\nopenai-processing-ms: 0\r\nx-content-type-options: nosniff\r\ncontent-security-policy: {DATA_POLICY}\r\n",
        new_request_id()
    );
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\nretry-after: 1\r\nconnection: close\r\n{common}\r\n{body}",
        body.len()
    );
    let say = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await?;
        // Closing with bytes unread would reset the connection, and the client may lose the answer.
        let mut rest = [0; 4096];
        while stream.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // A client that does not take it is closed like the others.
    let _ = tokio::time::timeout(REFUSAL_PATIENCE, say).await;
}

impl Server {
    async fn connection(self, stream: TcpStream, peer: SocketAddr, _place: Place) {
        self.metrics.open.inc();
        if let Err(error) = set_up(&stream, self.config.write_timeout) {
            tracing::debug!(%error, "a connection keeps the system's settings");
        }
        let stage = Arc::new(Stage::default());
        let stream = Clocked::new(stream, stage.clone(), &self.config, self.metrics.clone());
        match &self.config.tls {
            None => self.converse(stream, peer, stage).await,
            Some(tls) => match tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await {
                Ok(stream) => self.converse(stream, peer, stage).await,
                Err(error) => tracing::debug!(%error, %peer, "no TLS connection came about"),
            },
        }
        self.metrics.open.dec();
    }

    /// Requests of a connection, until either side has had enough.
    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S, peer: SocketAddr, stage: Arc<Stage>) {
        let service = hyper::service::service_fn(|mut request: hyper::Request<Incoming>| {
            let running = stage.begin();
            request.extensions_mut().insert(Socket(peer));
            let router = self.router.clone();
            async move {
                let Ok(response) = router.oneshot(Request::map(request, Body::new)).await;
                Ok::<_, Infallible>(response.map(|body| Guarded::new(body, running)))
            }
        });
        // Asked to end gracefully, hyper would close a connection that has said nothing yet.
        let late = self.stop.is_cancelled();
        let connection = hyper::server::conn::http1::Builder::new()
            .keep_alive(!late)
            .timer(TokioTimer::new())
            // Our clocks run out before; with this one hyper looks at the connection again when a request has ended, and so starts ours.
            .header_read_timeout(self.config.idle_timeout + self.config.header_timeout)
            .max_buf_size(WRITE_BUFFER)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.stop.cancelled(), if !late => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, %peer, "a connection ended early");
        }
    }
}

fn set_up(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    // Without this the first token of a stream waits for the client to acknowledge the headers: 40 ms on Linux.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE))?;
    // A peer that acknowledges nothing, or whose window stays shut, while a few bytes wait for it: the send buffer would not fill for a long time.
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(Some(patience))?;
    #[cfg(not(target_os = "linux"))]
    let _ = patience;
    Ok(())
}
