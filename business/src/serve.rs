//! The thin async shell of a business member: one task drives the core; links, the store, control and the admin port feed it.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use futures::{FutureExt, Stream, StreamExt};
use im_proto::control::{Command, Hello, Report, Role as ControlRole, command, report};
use im_proto::dial::ControlDialer;
use im_proto::ids::{IdError, MemberId};
use im_proto::link::link_server::{Link, LinkServer};
use im_proto::link::{ClientFrame, ClientFrames, Role, ServerFrame, ServerFrames, client_frame};
use im_proto::links::{self, LINK_SILENCE_MAX, LinkEvent, LinkPool, MESSAGE_BYTES_MAX, Outbox};
use im_proto::map_hint;
use im_proto::token::SharedToken;
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use crate::config::{ConfigError, ServeConfig};
use crate::core::calls::{StoreAnswer, StoreCall, TAIL_ENTRIES, execute, load_behind};
use crate::core::{Core, Input, Limits, LinkId, Map, Now, Output};
use crate::fail_points::{FailPoint, FailPoints};
use crate::metrics::{CpuAverage, Metrics};
use crate::store::{self, OpenError, Store, StoreError, StoreSpec};

/// Inputs that wait for the core; beyond, links are not read.
const INPUTS_MAX: usize = 1_024;
/// Inputs handled before their outputs are carried out.
const INPUTS_AT_ONCE: usize = 128;
/// Reads of the store under way at once.
const READS_MAX: usize = 64;
/// Conversations whose ends are asked for at once.
const LOADS_AT_ONCE: usize = 32;
/// Frames that wait for one link; beyond, it is closed and dialled anew.
const LINK_FRAMES_MAX: usize = 1 << 18;
/// For shards that nobody took over to be released.
const RELEASE_MAX: Duration = Duration::from_secs(5);
/// How often the core learns that time passed.
const TICK: Duration = Duration::from_millis(50);

/// Why a business member can't run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The name is no id.
    #[error("name, or --name: {0}")]
    Name(#[from] IdError),
    /// The configuration is incomplete.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The store can't be used.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// An address can't be listened on.
    #[error("cannot listen on {address}: {source}; is another process there?")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The link server ended.
    #[error("the link server ended: {0}")]
    Links(#[from] tonic::transport::Error),
    /// The core's task ended.
    #[error("the core ended, see the log above")]
    CoreEnded,
}

/// Runs a member until it fails, or until `stop` has come and its shards have gone elsewhere.
///
/// # Errors
/// See [`ServeError`].
pub async fn serve(config: ServeConfig, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
    let me = MemberId::new(&config.name, rand::random())?;
    let spec: StoreSpec = config.read_store_url()?.parse()?;
    let token = config.link_token()?;
    let store = store::open(&spec, config.store_token()?, config.store_ca_file.as_deref(), &me).await?;
    let links = listen(config.link.address).await?;
    let admin = listen(config.admin.address).await?;
    let address = |listener: &TcpListener| {
        listener.local_addr().map(|address| config.identity.advertised(address)).unwrap_or_default()
    };
    let hello = Hello {
        role: ControlRole::Business.into(),
        pid: std::process::id(),
        link_address: address(&links),
        http_address: address(&admin),
        instance: config.identity.instance(),
        ..Hello::default()
    };
    tracing::info!(%me, link = hello.link_address, admin = hello.http_address, "business member starts");

    let (inputs, inbox) = mpsc::channel(INPUTS_MAX);
    let shell = Arc::new(Shell {
        me: me.clone(),
        inputs,
        links: Mutex::default(),
        next_link: AtomicU64::new(1),
        control: Mutex::new(ControlStream::default()),
        reads: Arc::new(Semaphore::new(READS_MAX)),
        metrics: Metrics::default(),
        fail_points: FailPoints::default(),
        leaving: AtomicBool::new(false),
        held: watch::Sender::new(0),
        token: token.clone(),
    });
    let limits = Limits {
        payload_max: config.payload_max.unwrap_or(Limits::default().payload_max),
        room_history: config.rooms.history,
        room_stats_interval: Duration::from_millis(config.rooms.stats_interval_ms),
        ..Limits::default()
    };
    let core = tokio::spawn(run_core(shell.clone(), store, inbox, limits));
    let dialer = ControlDialer::new(config.control.clone(), config.cluster.as_deref(), token);
    if let Some(map) = config.map_hint_file.as_deref().and_then(map_hint::read) {
        let hint = Command { term: 0, command: Some(command::Command::Map(map)) };
        // Only a core that ended does not take it.
        let _ = shell.inputs.send(Input::Command(hint)).await;
    }
    tokio::spawn(keep_control(shell.clone(), dialer, hello));
    tokio::spawn(serve_admin(shell.clone(), admin, config.fail_points));
    let service = LinkServer::new(LinkService(shell.clone())).max_decoding_message_size(MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder()
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .add_service(service.max_encoding_message_size(MESSAGE_BYTES_MAX))
        .serve_with_incoming(TcpIncoming::from(links).with_nodelay(Some(true)));
    tokio::select! {
        ended = server => Ok(ended?),
        _ = core => Err(ServeError::CoreEnded),
        () = leave(&shell, stop, Duration::from_secs(config.termination_grace_seconds)) => Ok(()),
    }
}

/// Waits for `stop`, and then until control has moved the shards elsewhere. Without control, and when time runs out, they
/// are released to nobody: whoever is to have them need not wait for this member's silence.
async fn leave(shell: &Shell, stop: impl Future<Output = ()>, grace: Duration) {
    stop.await;
    shell.leaving.store(true, Ordering::Relaxed);
    let deadline = Instant::now() + grace;
    let release_at = deadline - (grace / 2).min(RELEASE_MAX);
    tracing::info!(?grace, "told to end: shards go elsewhere first");
    let mut held = shell.held.subscribe();
    // The count is that of the last tick, and shards may have come since.
    let _ = held.changed().await;
    let holds = || *held.borrow() > 0;
    let mut ticks = interval(TICK);
    while holds() && shell.control.lock().open.is_some() && Instant::now() < release_at {
        ticks.tick().await;
    }
    if holds() {
        let _ = shell.inputs.send(Input::ReleaseAll).await;
    }
    // With a store that does not answer there is nothing to wait for: what was acknowledged is stored, the rest is sent again.
    let released_by = deadline.min(Instant::now() + RELEASE_MAX);
    while holds() && Instant::now() < released_by {
        ticks.tick().await;
    }
    // The last words to clients of links are on their way.
    tokio::time::sleep(TICK).await;
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })
}

/// What the tasks of a member share.
struct Shell {
    me: MemberId,
    inputs: mpsc::Sender<Input>,
    links: Mutex<Map<LinkId, Arc<Outbox<ServerFrame>>>>,
    next_link: AtomicU64,
    control: Mutex<ControlStream>,
    reads: Arc<Semaphore>,
    metrics: Metrics,
    fail_points: FailPoints,
    /// It was told to end.
    leaving: AtomicBool,
    /// Shards held, as of each tick.
    held: watch::Sender<u64>,
    token: SharedToken,
}

impl Shell {
    async fn answered(&self, call: u64, answer: Result<StoreAnswer, StoreError>) {
        // Only a core that ended does not take it.
        let _ = self.inputs.send(Input::Answered { call, answer }).await;
    }
}

/// The stream to control: reports go out only behind its Hello.
#[derive(Default)]
struct ControlStream {
    opening: Option<Arc<Outbox<Report>>>,
    open: Option<Arc<Outbox<Report>>>,
}

// ---- the core's task ------------------------------------------------------------------------------------------------------

async fn run_core(shell: Arc<Shell>, store: Arc<dyn Store>, mut inbox: mpsc::Receiver<Input>, limits: Limits) {
    let started = Instant::now();
    let now = || Now {
        mono: started.elapsed(),
        wall_ms: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64),
    };
    let peers = peer_pool(&shell);
    let mut core = Core::new(shell.me.clone(), limits, now());
    let mut cpu = CpuAverage::default();
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut batch = Vec::with_capacity(INPUTS_AT_ONCE);
    let mut commit_timer = Box::pin(sleep(Duration::ZERO));
    loop {
        let commit_at = core.commit_at().map(|at| (started + at).into());
        if let Some(at) = commit_at
            && commit_timer.deadline() != at
        {
            commit_timer.as_mut().reset(at);
        }
        tokio::select! {
            received = inbox.recv_many(&mut batch, INPUTS_AT_ONCE) => {
                if received == 0 {
                    return;
                }
                for input in batch.drain(..) {
                    shell.fail_points.before_input(&input);
                    core.take(now(), input);
                }
                core.commit(now());
            }
            () = &mut commit_timer, if commit_at.is_some() => core.commit(now()),
            _ = tick.tick() => {
                core.handle(now(), Input::Tick);
                let mut snapshot = shell.metrics.0.lock();
                snapshot.stats = core.stats();
                snapshot.shards = core.held().count() as u64;
                shell.held.send_replace(snapshot.shards);
                snapshot.cpu_cores = cpu.sample();
                snapshot.links = shell.links.lock().len() as u64;
            }
        }
        let outputs = core.take_outputs();
        let ends_after_acks = shell.fail_points.before_outputs(&outputs);
        carry_out(&shell, &store, &peers, outputs, ends_after_acks);
        if ends_after_acks {
            tokio::time::sleep(TICK).await; // lets the link's task write
            shell.fail_points.acked();
        }
    }
}

/// Does what the core wants. With `only_frames` nothing but what goes to clients of links.
fn carry_out(
    shell: &Arc<Shell>,
    store: &Arc<dyn Store>,
    peers: &Arc<LinkPool>,
    outputs: Vec<Output>,
    only_frames: bool,
) {
    let mut frames: Map<LinkId, Vec<ServerFrame>> = Map::default();
    let mut to_peers: Map<MemberId, Vec<ClientFrame>> = Map::default();
    let mut loads: Vec<Load> = Vec::new();
    for output in outputs {
        match output {
            Output::Frame { link, frame } => frames.entry(link).or_default().push(frame),
            _ if only_frames => {}
            Output::Peer { to, frame } => to_peers.entry(to).or_default().push(frame),
            Output::Call { call, request: StoreCall::LoadConversation { shard, conversation } } => {
                loads.push(Load { call, shard, conversation });
            }
            Output::Call { call, request } => ask_store(shell, store, call, request),
            Output::Report(report) => tell_control(shell, report),
            Output::Members(members) => peers.set_members(&members),
            Output::CloseLink(link) => {
                if let Some(outbox) = shell.links.lock().remove(&link) {
                    outbox.close();
                }
            }
        }
    }
    while !loads.is_empty() {
        let rest = loads.split_off(loads.len().min(LOADS_AT_ONCE));
        tokio::spawn(load(shell.clone(), store.clone(), std::mem::replace(&mut loads, rest)));
    }
    for (link, frames) in frames {
        let outbox = shell.links.lock().get(&link).cloned();
        if let Some(outbox) = outbox
            && outbox.push(frames).is_err()
        {
            tracing::warn!(link = link.0, "a client of a link reads too slowly: the link is closed");
        }
    }
    for (to, frames) in to_peers {
        peers.send(&to, frames);
    }
}

fn ask_store(shell: &Arc<Shell>, store: &Arc<dyn Store>, call: u64, request: StoreCall) {
    let (shell, store) = (shell.clone(), store.clone());
    let is_read =
        !matches!(request, StoreCall::Acquire(_) | StoreCall::Release(_) | StoreCall::Check(_) | StoreCall::Commit(_));
    tokio::spawn(async move {
        let _permit = if is_read { shell.reads.clone().acquire_owned().await.ok() } else { None };
        let answer = execute(store.as_ref(), &shell.me, request).await;
        shell.answered(call, answer).await;
    });
}

/// A conversation to be loaded, and the number of that call.
struct Load {
    call: u64,
    shard: u32,
    conversation: Arc<str>,
}

/// Loads conversations: most of them are new, and one look tells so of all.
async fn load(shell: Arc<Shell>, store: Arc<dyn Store>, loads: Vec<Load>) {
    let tails = {
        let _permit = shell.reads.clone().acquire_owned().await.ok();
        let places = loads.iter().map(|load| (load.shard, load.conversation.clone())).collect();
        store.tails(places, TAIL_ENTRIES).await
    };
    let tails = match tails {
        Ok(tails) => tails,
        Err(error) => {
            for load in loads {
                shell.answered(load.call, Err(error.clone())).await;
            }
            return;
        }
    };
    for (Load { call, shard, conversation }, tail) in loads.into_iter().zip(tails) {
        let (shell, store) = (shell.clone(), store.clone());
        let is_new = tail.is_empty();
        let behind = async move {
            let _permit = if is_new { None } else { shell.reads.clone().acquire_owned().await.ok() };
            let answer = load_behind(store.as_ref(), shard, conversation, tail).await;
            shell.answered(call, answer).await;
        };
        if is_new {
            behind.await;
        } else {
            tokio::spawn(behind);
        }
    }
}

fn tell_control(shell: &Shell, report: Report) {
    let mut control = shell.control.lock();
    match &report.report {
        Some(report::Report::Hello(_)) => control.open = control.opening.take(),
        Some(report::Report::Heartbeat(heartbeat)) => {
            let mut snapshot = shell.metrics.0.lock();
            snapshot.messages_per_second = heartbeat.messages_per_second;
            snapshot.watermark_lag_s = heartbeat.watermark_lag_s;
        }
        _ => {}
    }
    let report = match report.report {
        Some(report::Report::Heartbeat(heartbeat)) => {
            let cpu_cores = shell.metrics.0.lock().cpu_cores;
            let leaving = shell.leaving.load(Ordering::Relaxed);
            let heartbeat = im_proto::control::Heartbeat { cpu_cores, leaving, ..heartbeat };
            Report { report: Some(report::Report::Heartbeat(heartbeat)) }
        }
        other => Report { report: other },
    };
    // Without control nobody listens: the next Hello says all that counts.
    if let Some(outbox) = &control.open
        && outbox.push([report]).is_err()
    {
        control.open = None;
    }
}

fn peer_pool(shell: &Arc<Shell>) -> Arc<LinkPool> {
    let inputs = shell.inputs.clone();
    let handler = Arc::new(move |event| {
        let inputs = inputs.clone();
        async move {
            let input = match event {
                LinkEvent::Up(peer) => Input::PeerUp(peer),
                LinkEvent::Down(peer) => Input::PeerDown(peer),
                LinkEvent::Frames(peer, frames) => Input::PeerFrames { peer, frames },
            };
            let _ = inputs.send(input).await;
        }
        .boxed()
    });
    LinkPool::new(shell.me.clone(), Role::Business, shell.token.clone(), handler)
}

// ---- incoming links -------------------------------------------------------------------------------------------------------

struct LinkService(Arc<Shell>);

type FrameStream = Pin<Box<dyn Stream<Item = Result<ServerFrames, Status>> + Send>>;

#[tonic::async_trait]
impl Link for LinkService {
    type OpenStream = FrameStream;

    async fn open(&self, request: Request<Streaming<ClientFrames>>) -> Result<Response<FrameStream>, Status> {
        let shell = self.0.clone();
        if !shell.token.admits(request.metadata()) {
            return Err(Status::unauthenticated("links need the cluster's token: check linkToken"));
        }
        let mut inbound = request.into_inner();
        let first = timeout(LINK_SILENCE_MAX, inbound.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 3 s"))??;
        let mut frames = first.map(|message| message.frames).unwrap_or_default().into_iter();
        let Some(client_frame::Frame::Hello(hello)) = frames.next().and_then(|frame| frame.frame) else {
            return Err(Status::invalid_argument("the first frame must be Hello"));
        };
        let peer = MemberId::parse(&hello.member).map_err(|error| Status::invalid_argument(error.to_string()))?;
        let link = LinkId(shell.next_link.fetch_add(1, Ordering::Relaxed));
        let outbox = Outbox::new(LINK_FRAMES_MAX);
        shell.links.lock().insert(link, outbox.clone());
        let opened =
            [Input::LinkOpened { link, peer, role: hello.role() }, Input::Frames { link, frames: frames.collect() }];
        tokio::spawn(read_link(shell, link, outbox.clone(), inbound, opened));
        let reader = outbox.reader().hurried_by(links::is_room_message);
        Ok(Response::new(Box::pin(reader.map(|frames| Ok(ServerFrames { frames })))))
    }
}

async fn read_link(
    shell: Arc<Shell>,
    link: LinkId,
    outbox: Arc<Outbox<ServerFrame>>,
    mut inbound: Streaming<ClientFrames>,
    opened: [Input; 2],
) {
    for input in opened {
        let _ = shell.inputs.send(input).await;
    }
    // A client pings each second: silence is the end, whatever TCP says.
    while let Ok(Ok(Some(message))) = timeout(LINK_SILENCE_MAX, inbound.message()).await {
        if shell.inputs.send(Input::Frames { link, frames: message.frames }).await.is_err() {
            break;
        }
        // Whoever reads his answers slowly asks slowly.
        outbox.has_room().await;
    }
    if let Some(outbox) = shell.links.lock().remove(&link) {
        outbox.close();
    }
    let _ = shell.inputs.send(Input::LinkClosed { link }).await;
}

// ---- control --------------------------------------------------------------------------------------------------------------

/// Keeps a stream to the control service that leads. Without one, messages flow all the same.
async fn keep_control(shell: Arc<Shell>, mut dialer: ControlDialer, hello: Hello) {
    if dialer.is_empty() {
        return tracing::warn!("no control address is configured: nobody will give this member shards");
    }
    loop {
        let began = Instant::now();
        if let Err(error) = follow_control(&shell, &mut dialer, &hello).await {
            tracing::debug!(%error, "control");
        }
        *shell.control.lock() = ControlStream::default();
        dialer.pause(began.elapsed()).await;
    }
}

/// Follows one stream to its end.
async fn follow_control(shell: &Arc<Shell>, dialer: &mut ControlDialer, hello: &Hello) -> Result<(), Status> {
    let (address, mut client) = dialer.connect().await?;
    let outbox = Outbox::new(4_096);
    shell.control.lock().opening = Some(outbox.clone());
    let reports = outbox.reader().flat_map(futures::stream::iter);
    if shell.inputs.send(Input::ControlUp(hello.clone())).await.is_err() {
        return Ok(());
    }
    let mut commands = client.join(dialer.request(reports)).await?.into_inner();
    while let Some(command) = commands.message().await? {
        if let Some(command::Command::NotLeader(leader)) = command.command {
            dialer.redirected(&address, leader.address);
            return Ok(());
        }
        if shell.inputs.send(Input::Command(command)).await.is_err() {
            break;
        }
    }
    Ok(())
}

// ---- admin ----------------------------------------------------------------------------------------------------------------

async fn serve_admin(shell: Arc<Shell>, listener: TcpListener, fail_points: bool) {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(shell.metrics.clone()));
    let registry = Arc::new(registry);
    let metrics = move || async move {
        let mut text = String::new();
        match prometheus_client::encoding::text::encode(&mut text, &registry) {
            Ok(()) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
        }
    };
    let mut app = axum::Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(|| async { "ok" }))
        .route("/metrics", get(metrics));
    if fail_points {
        tracing::warn!("fail points can be armed: this is for tests only");
        app = app.route("/fail-points/{name}", post(arm));
    }
    if let Err(error) = axum::serve(listener, app.with_state(shell)).await {
        tracing::error!(%error, "the admin port ended");
    }
}

async fn arm(State(shell): State<Arc<Shell>>, Path(name): Path<String>) -> (StatusCode, String) {
    match FailPoint::parse(&name) {
        Some(point) => {
            shell.fail_points.arm(point);
            (StatusCode::OK, format!("armed: {name}\n"))
        }
        None => (
            StatusCode::NOT_FOUND,
            format!("no fail point {name}: committed, acked, releasing, released, acquiring, acquired\n"),
        ),
    }
}
