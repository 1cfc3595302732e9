//! Several operators stand for election at an API server of a few lines that knows one Lease.
#![allow(clippy::unwrap_used)]

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use im_operator::control::Leadership;
use im_operator::leadership::{Identity, LeaseTiming, release, run_with};
use kube::{Client, Config};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

const TIMING: LeaseTiming = LeaseTiming {
    duration: Duration::from_secs(2),
    renew: Duration::from_millis(300),
    request: Duration::from_millis(500),
};
const DEADLINE: Duration = Duration::from_secs(30);

/// One Lease with a resourceVersion.
#[derive(Default)]
struct Server {
    lease: Mutex<Option<(u64, Value)>>,
    /// It answers nothing.
    away: AtomicBool,
}

type Answer = (StatusCode, Json<Value>);

fn failure(code: StatusCode, reason: &str) -> Answer {
    let status =
        json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code.as_u16() });
    (code, Json(status))
}

impl Server {
    async fn answers(&self) {
        if self.away.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
    }

    fn store(&self, version: u64, mut lease: Value) -> Answer {
        lease["metadata"]["resourceVersion"] = json!(version.to_string());
        *self.lease.lock() = Some((version, lease.clone()));
        (StatusCode::OK, Json(lease))
    }

    fn holder(&self) -> Option<String> {
        let lease = self.lease.lock();
        lease.as_ref()?.1["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }
}

async fn read(State(server): State<Arc<Server>>) -> Answer {
    server.answers().await;
    match &*server.lease.lock() {
        Some((_, lease)) => (StatusCode::OK, Json(lease.clone())),
        None => failure(StatusCode::NOT_FOUND, "NotFound"),
    }
}

async fn create(State(server): State<Arc<Server>>, Json(lease): Json<Value>) -> Answer {
    server.answers().await;
    if server.lease.lock().is_some() {
        return failure(StatusCode::CONFLICT, "AlreadyExists");
    }
    server.store(1, lease)
}

async fn replace(State(server): State<Arc<Server>>, Json(lease): Json<Value>) -> Answer {
    server.answers().await;
    let version = server.lease.lock().as_ref().map_or(0, |(version, _)| *version);
    if lease["metadata"]["resourceVersion"] != json!(version.to_string()) {
        return failure(StatusCode::CONFLICT, "Conflict");
    }
    server.store(version + 1, lease)
}

async fn server() -> (Arc<Server>, Client) {
    let server = Arc::new(Server::default());
    let leases = "/apis/coordination.k8s.io/v1/namespaces/im/leases";
    let router = Router::new()
        .route(leases, axum::routing::post(create))
        .route(&format!("{leases}/operator"), get(read).put(replace))
        .with_state(server.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    let client = Client::try_from(Config::new(url.parse().unwrap())).unwrap();
    (server, client)
}

struct Operator {
    me: Identity,
    leadership: watch::Receiver<Leadership>,
    task: JoinHandle<()>,
}

impl Operator {
    fn start(client: &Client, name: &str) -> Self {
        let me = Identity { name: name.into(), address: format!("{name}:7200") };
        let (sender, leadership) = watch::channel(Leadership::Following { leader: None });
        let task = tokio::spawn(run_with(TIMING, client.clone(), "im".into(), "operator".into(), me.clone(), sender));
        Self { me, leadership, task }
    }

    async fn becomes(&mut self, expected: &Leadership) {
        let found = tokio::time::timeout(DEADLINE, self.leadership.wait_for(|now| now == expected)).await;
        assert!(found.is_ok(), "{} never became {expected:?}", self.me);
    }
}

fn following(leader: &Operator) -> Leadership {
    Leadership::Following { leader: Some(leader.me.address.clone()) }
}

#[tokio::test]
async fn one_leads_the_others_know_where_and_the_next_takes_over() {
    let (server, client) = server().await;
    let mut a = Operator::start(&client, "a");
    a.becomes(&Leadership::Leading).await;
    let mut b = Operator::start(&client, "b");
    b.becomes(&following(&a)).await;

    // It dies without a word.
    let died = Instant::now();
    a.task.abort();
    b.becomes(&Leadership::Leading).await;
    let took = died.elapsed();
    assert!(took > TIMING.duration - TIMING.renew, "not before the Lease has ended: {took:?}");
    assert_eq!(server.holder(), Some(b.me.to_string()));

    // It gives up in order.
    let mut c = Operator::start(&client, "c");
    c.becomes(&following(&b)).await;
    b.task.abort();
    let _ = b.task.await;
    let released = Instant::now();
    release(client.clone(), "im", "operator", &b.me).await.unwrap();
    c.becomes(&Leadership::Leading).await;
    assert!(released.elapsed() < TIMING.duration, "at the next look, not at the Lease's end: {:?}", released.elapsed());
    // Whoever does not hold it releases nothing.
    release(client, "im", "operator", &b.me).await.unwrap();
    assert_eq!(server.holder(), Some(c.me.to_string()));
}

#[tokio::test]
async fn a_leader_that_cannot_renew_stops_before_its_lease_ends() {
    let (server, client) = server().await;
    let mut a = Operator::start(&client, "a");
    a.becomes(&Leadership::Leading).await;
    server.away.store(true, Ordering::Relaxed);
    let away = Instant::now();
    a.becomes(&Leadership::Following { leader: None }).await;
    assert!(away.elapsed() < TIMING.duration, "{:?}", away.elapsed());
    server.away.store(false, Ordering::Relaxed);
    a.becomes(&Leadership::Leading).await;
}
