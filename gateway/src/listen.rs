//! Listening: TCP, TLS and WebSocket on shared ports, with limits before anything is spent on a client.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use parking_lot::Mutex;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::accept_hdr_async_with_config;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::auth::Auth;
use crate::config::{Limits, TlsListen};
use crate::connection::{Tcp, WebSocket, handshake};
use crate::hub::Hub;
use im_proto::reload::Reloaded;

const BACKLOG: i32 = 4_096;
/// Pause after an accept that failed for want of something (file descriptors).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why nothing is listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address can't be had.
    #[error("cannot listen on {address}: {error}: is it in use, or not this machine's?")]
    Bind {
        /// Which address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// The certificate or key can't be used.
    #[error("cannot use certificate or key {path}: {error}")]
    Certificate {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: String,
    },
}

/// A rate limit: so many a second, with one second's worth at once.
#[derive(Debug)]
pub struct RateLimit {
    per_second: f64,
    state: Mutex<(f64, u64)>,
}

impl RateLimit {
    /// A full bucket.
    pub fn new(per_second: u32) -> Self {
        Self { per_second: per_second.into(), state: Mutex::new((per_second.into(), 0)) }
    }

    /// Takes one, if there is one.
    pub fn take(&self, now_ms: u64) -> bool {
        let mut state = self.state.lock();
        let (tokens, at_ms) = *state;
        let tokens = (tokens + now_ms.saturating_sub(at_ms) as f64 * self.per_second / 1_000.0).min(self.per_second);
        let taken = tokens >= 1.0;
        *state = (if taken { tokens - 1.0 } else { tokens }, now_ms.max(at_ms));
        taken
    }
}

/// What the connections of a process are accepted with.
pub struct Gateway {
    /// What they share.
    pub hub: Arc<Hub>,
    /// Who may in.
    pub auth: Arc<Auth>,
    /// What they are held to.
    pub limits: Limits,
    /// CONNECTs a second.
    pub connect_rate: RateLimit,
    half_open: Arc<Semaphore>,
    serving: watch::Sender<bool>,
}

impl Gateway {
    /// A gateway that serves as soon as it listens.
    pub fn new(hub: Arc<Hub>, auth: Arc<Auth>, limits: Limits) -> Arc<Self> {
        let (connect_rate, half_open) =
            (RateLimit::new(limits.connect_rate), Arc::new(Semaphore::new(limits.half_open_max)));
        Arc::new(Self { hub, auth, limits, connect_rate, half_open, serving: watch::Sender::new(true) })
    }

    /// Whether new connections are accepted; a draining gateway gives its listeners up, so that the kernel spreads new clients over the others.
    pub fn set_serving(&self, serving: bool) {
        self.serving.send_if_modified(|old| std::mem::replace(old, serving) != serving);
    }

    /// Whether new connections are accepted.
    pub fn is_serving(&self) -> bool {
        *self.serving.borrow()
    }

    /// Follows [`Gateway::is_serving`].
    pub fn serving(&self) -> watch::Receiver<bool> {
        self.serving.subscribe()
    }
}

/// Held by a connection until its CONNECT is complete: it is counted, and has a deadline for TLS, WebSocket and CONNECT together.
pub struct HalfOpen {
    /// Until then all of it must be there.
    pub deadline: Instant,
    _counted: OwnedSemaphorePermit,
}

/// How the bytes of a listener's connections are wrapped.
#[derive(Clone)]
pub enum Wrap {
    /// Not at all.
    Plain,
    /// TLS.
    Tls(Arc<Reloaded<TlsAcceptor>>),
    /// WebSocket with the subprotocol `mqtt`.
    WebSocket,
}

/// A listening socket that several processes of a machine can have at the same address; the kernel spreads connections over them.
///
/// # Errors
/// [`ListenError::Bind`].
pub fn bind_shared(address: SocketAddr) -> Result<StdListener, ListenError> {
    let bind = || -> io::Result<StdListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    bind().map_err(|error| ListenError::Bind { address, error })
}

/// What TLS connections are accepted with; it follows its files, so that a renewed certificate is used for whoever connects next.
///
/// # Errors
/// [`ListenError::Certificate`].
pub fn tls_acceptor(listen: &TlsListen) -> Result<Arc<Reloaded<TlsAcceptor>>, ListenError> {
    let files = listen.clone();
    Ok(Arc::new(Reloaded::new(&[&listen.cert_file, &listen.key_file], move || read_certificate(&files))?))
}

/// Reads a certificate chain and its key.
fn read_certificate(listen: &TlsListen) -> Result<TlsAcceptor, ListenError> {
    let wrong = |path: &Path, error: String| ListenError::Certificate { path: path.to_owned(), error };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&listen.cert_file)
        .map_err(|error| wrong(&listen.cert_file, error.to_string()))?
        .collect();
    let chain = chain.map_err(|error| wrong(&listen.cert_file, error.to_string()))?;
    let key =
        PrivateKeyDer::from_pem_file(&listen.key_file).map_err(|error| wrong(&listen.key_file, error.to_string()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(&listen.cert_file, error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| wrong(&listen.cert_file, error.to_string()))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// A listener of an address that several gateways share. It gives the address up while its gateway drains, so that the kernel spreads
/// new connections over the others, and takes it again afterwards.
pub struct SharedListener {
    address: SocketAddr,
    serving: watch::Receiver<bool>,
    state: Listening,
}

enum Listening {
    /// Bound, but not known to a runtime yet.
    Bound(StdListener),
    Serving(TcpListener),
    /// Not serving any more: what the kernel completed already would be reset by closing the socket.
    Emptying(TcpListener),
    Away,
}

impl SharedListener {
    /// Binds the address; port 0 picks one.
    ///
    /// # Errors
    /// [`ListenError::Bind`].
    pub fn bind(gateway: &Gateway, address: SocketAddr) -> Result<Self, ListenError> {
        let listener = bind_shared(address)?;
        let address = listener.local_addr().map_err(|error| ListenError::Bind { address, error })?;
        Ok(Self { address, serving: gateway.serving(), state: Listening::Bound(listener) })
    }

    /// The address that is listened on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection; waits as long as the gateway drains. Safe to cancel.
    pub async fn accept(&mut self) -> TcpStream {
        loop {
            match &self.state {
                Listening::Bound(_) | Listening::Away => self.listen().await,
                Listening::Serving(listener) => tokio::select! {
                    accepted = listener.accept() => match accepted {
                        Ok((stream, _)) => return stream,
                        Err(error) => {
                            tracing::warn!(%error, "accept");
                            sleep(ACCEPT_PAUSE).await;
                        }
                    },
                    // The sender lives as long as the gateway, whose connections these are.
                    () = self.serving.wait_for(|serving| !*serving).map(drop) => {
                        if let Listening::Serving(listener) = std::mem::replace(&mut self.state, Listening::Away) {
                            self.state = Listening::Emptying(listener);
                        }
                    }
                },
                Listening::Emptying(listener) => match listener.accept().now_or_never() {
                    Some(Ok((stream, _))) => return stream,
                    _ => self.state = Listening::Away,
                },
            }
        }
    }

    /// Listens as soon as the gateway serves.
    async fn listen(&mut self) {
        if self.serving.wait_for(|serving| *serving).await.is_err() {
            return std::future::pending().await;
        }
        let listener = match std::mem::replace(&mut self.state, Listening::Away) {
            Listening::Bound(listener) => Ok(listener),
            _ => bind_shared(self.address),
        };
        let listening = listener.and_then(|listener| {
            TcpListener::from_std(listener).map_err(|error| ListenError::Bind { address: self.address, error })
        });
        match listening {
            Ok(listener) => self.state = Listening::Serving(listener),
            Err(error) => {
                tracing::error!(%error, "listening again");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl axum::serve::Listener for SharedListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        let stream = Self::accept(self).await;
        let peer = stream.peer_addr().unwrap_or(self.address);
        (stream, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Accepts MQTT connections while the gateway serves. Returns the address that is listened on.
///
/// # Errors
/// [`ListenError`] if it can't be bound.
pub fn spawn(gateway: &Arc<Gateway>, address: SocketAddr, wrap: Wrap) -> Result<SocketAddr, ListenError> {
    let mut listener = SharedListener::bind(gateway, address)?;
    let (gateway, address) = (gateway.clone(), listener.address());
    tokio::spawn(async move {
        loop {
            admit(&gateway, listener.accept().await, &wrap);
        }
    });
    Ok(address)
}

fn admit(gateway: &Arc<Gateway>, stream: TcpStream, wrap: &Wrap) {
    // Too many that have not said CONNECT yet: the newest is closed.
    let Ok(permit) = gateway.half_open.clone().try_acquire_owned() else {
        gateway.hub.shared.metrics.slow_handshakes.inc();
        gateway.hub.shared.metrics.connects_refused.inc();
        return;
    };
    // Neither is needed for correctness.
    let _ = stream.set_nodelay(true);
    let _ = socket2::SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(Duration::from_secs(60)));
    let gateway = gateway.clone();
    let deadline = Instant::now() + Duration::from_millis(gateway.limits.handshake_timeout_ms);
    let half_open = HalfOpen { deadline, _counted: permit };
    match wrap {
        Wrap::Plain => drop(tokio::spawn(handshake(gateway, Tcp::new(stream), half_open))),
        Wrap::Tls(acceptor) => drop(tokio::spawn(tls(gateway, stream, half_open, acceptor.get()))),
        Wrap::WebSocket => drop(tokio::spawn(web_socket(gateway, stream, half_open))),
    }
}

async fn tls(gateway: Arc<Gateway>, stream: TcpStream, half_open: HalfOpen, acceptor: TlsAcceptor) {
    let accept = acceptor.accept_with(stream, |connection| connection.set_buffer_limit(Some(64 << 10)));
    match timeout_at(half_open.deadline, accept).await {
        Ok(Ok(stream)) => handshake(gateway, stream, half_open).await,
        Ok(Err(error)) => {
            gateway.hub.shared.metrics.handshakes_failed.inc();
            tracing::debug!(%error, "TLS handshake");
        }
        Err(_) => drop(gateway.hub.shared.metrics.slow_handshakes.inc()),
    }
}

async fn web_socket(gateway: Arc<Gateway>, stream: TcpStream, half_open: HalfOpen) {
    let size_max = gateway.limits.max_packet_size as usize + 16;
    let config = WebSocketConfig::default()
        .read_buffer_size(1_024)
        .write_buffer_size(0)
        .max_write_buffer_size(1 << 20)
        .max_message_size(Some(size_max.max(256 << 10)))
        .max_frame_size(Some(size_max.max(256 << 10)));
    match timeout_at(half_open.deadline, accept_hdr_async_with_config(stream, subprotocol, Some(config))).await {
        Ok(Ok(frames)) => handshake(gateway, WebSocket::new(frames), half_open).await,
        Ok(Err(error)) => {
            gateway.hub.shared.metrics.handshakes_failed.inc();
            tracing::debug!(%error, "WebSocket handshake");
        }
        Err(_) => drop(gateway.hub.shared.metrics.slow_handshakes.inc()),
    }
}

/// MQTT 5, 6.0: the client must offer, the server must choose the subprotocol `mqtt`.
#[allow(clippy::result_large_err)] // the library's type
fn subprotocol(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    let offered =
        request.headers().get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    if offered.flat_map(|value| value.split(',')).any(|name| name.trim() == "mqtt") {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("mqtt"));
        return Ok(response);
    }
    let mut refusal = ErrorResponse::new(Some("offer the WebSocket subprotocol mqtt".to_owned()));
    *refusal.status_mut() = StatusCode::BAD_REQUEST;
    Err(refusal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_limit_refills() {
        let limit = RateLimit::new(10);
        assert_eq!((0..20).filter(|_| limit.take(1_000)).count(), 10);
        assert_eq!((0..20).filter(|_| limit.take(1_500)).count(), 5);
    }
}
