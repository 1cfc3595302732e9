//! A proxy between the operator and the API server that makes the API server worse than it is: conflicts, errors before and
//! after the deed, requests that hang, watches that end. Everything is drawn from a seed.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt;
use http_body_util::{BodyExt, BodyStream, StreamBody, combinators::UnsyncBoxBody};
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{Client, Config, client::Body, config::AuthInfo};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio::{net::TcpListener, time::sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::support::TestResult;

/// How long a request hangs that is to time out.
const HANGS: Duration = Duration::from_secs(6);
/// A watch that is to end early does so within this time.
const WATCH_SECONDS_MAX: u64 = 30;

type Answer = Response<UnsyncBoxBody<Bytes, kube::Error>>;

/// What becomes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// It is passed on.
    None,
    /// 409 to a write that was not done.
    Conflict,
    /// 500, nothing was done.
    Error,
    /// 500, and it was done.
    LostAnswer,
    /// 504 after a long time, nothing was done.
    Timeout,
}

impl Fault {
    /// Draws a fate: about one write in seven goes wrong, and one read in twenty.
    fn draw(rng: &mut StdRng, is_write: bool) -> Self {
        match (rng.random_range(0..1_000), is_write) {
            (0..60, true) => Self::Conflict,
            (60..100, true) => Self::LostAnswer,
            (100..130, _) => Self::Error,
            (130..135, _) => Self::Timeout,
            _ => Self::None,
        }
    }
}

/// How often each fault was injected.
#[derive(Debug, Default)]
pub struct Counts {
    requests: AtomicU64,
    conflicts: AtomicU64,
    errors: AtomicU64,
    lost_answers: AtomicU64,
    timeouts: AtomicU64,
}

/// The proxy; it ends when it is dropped.
pub struct FaultProxy {
    /// Where pods reach it.
    pub url: String,
    /// What it did.
    pub counts: Arc<Counts>,
    _task: AbortOnDropHandle<()>,
}

impl FaultProxy {
    /// Starts it on the address of this machine that faces the node.
    pub async fn start(node: IpAddr, seed: u64) -> TestResult<Self> {
        let mut config = Config::infer().await?;
        // Who asks is known by the token that the request carries.
        config.auth_info = AuthInfo::default();
        // Every answer is passed on.
        config.default_retry = false;
        let client = Client::try_from(config)?;
        // Nothing is sent: the kernel only says which of our addresses it would send from.
        let facing = UdpSocket::bind(("0.0.0.0", 0))?;
        facing.connect((node, 9))?;
        let listener = TcpListener::bind((facing.local_addr()?.ip(), 0)).await?;
        let address: SocketAddr = listener.local_addr()?;
        let (rng, counts) = (Arc::new(Mutex::new(StdRng::seed_from_u64(seed))), Arc::<Counts>::default());
        let shared = counts.clone();
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (client, rng, counts) = (client.clone(), rng.clone(), shared.clone());
                let service = service_fn(move |request| {
                    let (client, rng, counts) = (client.clone(), rng.clone(), counts.clone());
                    async move { Ok::<_, Infallible>(answer(client, &rng, &counts, request).await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Ok(Self { url: format!("http://{address}"), counts, _task: AbortOnDropHandle::new(task) })
    }
}

impl Counts {
    /// Requests, and those that went wrong.
    pub fn injected(&self) -> (u64, u64) {
        let faults = [&self.conflicts, &self.errors, &self.lost_answers, &self.timeouts];
        (self.requests.load(Ordering::Relaxed), faults.iter().map(|count| count.load(Ordering::Relaxed)).sum())
    }
}

async fn answer(client: Client, rng: &Mutex<StdRng>, counts: &Counts, request: Request<Incoming>) -> Answer {
    let is_write = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH | Method::DELETE);
    let is_watch = request.uri().query().is_some_and(|query| query.contains("watch=true") || query.contains("watch=1"));
    let (fault, watch_seconds) = {
        let mut rng = rng.lock();
        (Fault::draw(&mut rng, is_write), rng.random_range(1..=WATCH_SECONDS_MAX))
    };
    counts.requests.fetch_add(1, Ordering::Relaxed);
    let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    match fault {
        Fault::None => {}
        Fault::Conflict => {
            count(&counts.conflicts);
            return problem(StatusCode::CONFLICT, "Conflict");
        }
        Fault::Error => {
            count(&counts.errors);
            return problem(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
        }
        Fault::LostAnswer => {
            count(&counts.lost_answers);
            let _ = pass_on(&client, request).await;
            return problem(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
        }
        Fault::Timeout => {
            count(&counts.timeouts);
            sleep(HANGS).await;
            return problem(StatusCode::GATEWAY_TIMEOUT, "Timeout");
        }
    }
    match pass_on(&client, request).await {
        Ok(response) if is_watch => response.map(|body| {
            let end = Box::pin(sleep(Duration::from_secs(watch_seconds)));
            StreamBody::new(BodyStream::new(body).take_until(end)).boxed_unsync()
        }),
        Ok(response) => response.map(BodyExt::boxed_unsync),
        Err(error) => {
            println!("proxy: {error}");
            problem(StatusCode::BAD_GATEWAY, "BadGateway")
        }
    }
}

async fn pass_on(client: &Client, request: Request<Incoming>) -> TestResult<Response<Body>> {
    let (mut head, body) = request.into_parts();
    for of_connection in [header::HOST, header::CONNECTION] {
        head.headers.remove(of_connection);
    }
    let body = body.collect().await?.to_bytes();
    Ok(client.send(Request::from_parts(head, Body::from(body))).await?)
}

/// An error as the API server words it.
fn problem(code: StatusCode, reason: &str) -> Answer {
    let body = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "injected by the test",
        "reason": reason,
        "code": code.as_u16(),
    });
    let mut response = Response::new(Body::from(body.to_string().into_bytes()).boxed_unsync());
    *response.status_mut() = code;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    response
}
