//! Whole members over loopback: gRPC links, a store member, a control service that a test plays.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use im_business::config::ServeConfig;
use im_business::serve::serve;
use im_business::store::{Store, memory::MemoryStore, server, sqlite::Sqlite};
use im_proto::control::control_server::{Control, ControlServer};
use im_proto::control::{self, Command, Report, command, report};
use im_proto::ids::{MemberId, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{Body, ClientFrame, Role, Send, body, client_frame, server_frame};
use im_proto::links::{LinkEvent, LinkPool};
use im_proto::router::{self, Router};
use im_proto::token::SharedToken;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

const SHARDS: u32 = 8;
const PATIENCE: Duration = Duration::from_secs(20);

/// A control service whose decisions are the test's.
#[derive(Clone, Default)]
struct PlayedControl(Arc<Mutex<Played>>);

#[derive(Default)]
struct Played {
    members: BTreeMap<String, (control::Hello, mpsc::Sender<Result<Command, Status>>)>,
    owners: BTreeMap<u32, (String, u64)>,
    released: Vec<(u32, u64)>,
    /// Who was told to end, and in what order with releases.
    leaving: Vec<(String, usize)>,
}

#[tonic::async_trait]
impl Control for PlayedControl {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<Command, Status>> + std::marker::Send>>;

    async fn join(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut reports = request.into_inner();
        let (commands, outbound) = mpsc::channel(1_024);
        let played = self.0.clone();
        tokio::spawn(async move {
            let mut name = String::new();
            while let Ok(Some(report)) = reports.message().await {
                let mut played = played.lock();
                match report.report {
                    Some(report::Report::Hello(hello)) => {
                        name = MemberId::parse(&hello.member).map(|id| id.name().to_owned()).unwrap_or_default();
                        played.members.insert(name.clone(), (hello, commands.clone()));
                    }
                    Some(report::Report::Acquired(acquired)) => {
                        for shard in acquired.shards {
                            played.owners.insert(shard.shard, (name.clone(), shard.epoch));
                        }
                    }
                    Some(report::Report::Released(released)) => {
                        played.released.extend(released.shards.iter().map(|shard| (shard.shard, shard.epoch)));
                    }
                    Some(report::Report::Heartbeat(beat)) if beat.leaving => {
                        let released = played.released.len();
                        played.leaving.push((name.clone(), released));
                    }
                    _ => {}
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}

impl PlayedControl {
    fn tell(&self, name: &str, command: command::Command) {
        let played = self.0.lock();
        let (_, commands) = &played.members[name];
        commands.try_send(Ok(Command { term: 1, command: Some(command) })).expect("the member listens");
    }

    fn publish_map(&self) {
        let played = self.0.lock();
        let member = |hello: &control::Hello| control::Member {
            member: hello.member.clone(),
            role: control::Role::Business.into(),
            link_address: hello.link_address.clone(),
        };
        let members = played.members.values().map(|(hello, _)| member(hello)).collect();
        let map = control::Map { number: 1, shards: SHARDS, members, owners: Vec::new(), epochs: Vec::new() };
        for (_, commands) in played.members.values() {
            let command = Command { term: 1, command: Some(command::Command::Map(map.clone())) };
            commands.try_send(Ok(command)).expect("the member listens");
        }
    }
}

/// What a gateway does with links, in small.
struct Client {
    router: Mutex<Router<oneshot::Sender<Outcome>>>,
    pool: Mutex<Option<Arc<LinkPool>>>,
}

impl Client {
    fn start(members: Vec<(MemberId, String)>) -> Arc<Self> {
        let client = Arc::new(Self {
            router: Mutex::new(Router::new(SHARDS, router::Limits::default())),
            pool: Mutex::new(None),
        });
        let weak = Arc::downgrade(&client);
        let handler = Arc::new(move |event| {
            if let Some(client) = weak.upgrade() {
                client.on_event(event);
            }
            async {}.boxed()
        });
        let me = MemberId::new("gateway-0", 7).expect("a good name");
        let pool = LinkPool::new(me, Role::Gateway, SharedToken::fixed("link").expect("a token"), handler);
        *client.pool.lock() = Some(pool.clone());
        pool.set_members(&members);
        client
    }

    fn on_event(&self, event: LinkEvent) {
        let mut router = self.router.lock();
        match event {
            LinkEvent::Up(member) => router.link_up(&member),
            LinkEvent::Down(member) => router.link_down(&member),
            LinkEvent::Frames(member, frames) => {
                for frame in frames {
                    match frame.frame {
                        Some(server_frame::Frame::Owned(owned)) => router.owned(&member, &owned),
                        Some(server_frame::Frame::Moved(moved)) => router.moved(&moved),
                        Some(server_frame::Frame::Reply(reply)) => router.reply(reply),
                        _ => {}
                    }
                }
            }
        }
        drop(router);
        self.carry_out();
    }

    fn carry_out(&self) {
        let outputs = self.router.lock().take_outputs();
        let pool = self.pool.lock().clone();
        for output in outputs {
            match output {
                router::Output::Send(to, request) => {
                    let frame = ClientFrame { frame: Some(client_frame::Frame::Request(request.into())) };
                    pool.iter().for_each(|pool| pool.send(&to, [frame.clone()]));
                }
                router::Output::Done(waiter, outcome) => drop(waiter.send(outcome)),
                _ => {}
            }
        }
    }

    async fn ask(&self, shard: u32, body: body::Body) -> Outcome {
        let (waiter, answer) = oneshot::channel();
        let asked = self.router.lock().request(shard, 0, Body { body: Some(body) }, waiter);
        assert!(asked.is_ok(), "the router has room");
        self.carry_out();
        tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time").expect("the router keeps its tokens")
    }

    async fn send(&self, conversation: &str, sender: &str, id: &str) -> u64 {
        let send = Send {
            conversation: conversation.into(),
            sender: sender.into(),
            device: "phone".into(),
            client_id: id.into(),
            payload: id.as_bytes().to_vec().into(),
            ..Send::default()
        };
        match self.ask(shard_of(conversation, SHARDS), body::Body::Send(send)).await {
            Outcome::Stored(stored) => stored.seq,
            other => panic!("{id} was not stored: {other:?}"),
        }
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut poll = tokio::time::interval(Duration::from_millis(5));
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain until {what}");
        poll.tick().await;
    }
}

fn config(name: &str, control: &str, store: &str) -> ServeConfig {
    let loopback = serde_json::json!({ "address": "127.0.0.1:0" });
    let config = serde_json::json!({
        "name": name, "cluster": "default/chat", "control": [control], "link": loopback, "admin": loopback,
        "store": store, "linkToken": "link", "storeToken": "store", "terminationGraceSeconds": 2,
    });
    serde_json::from_value(config).expect("a configuration")
}

/// A store member and a control service that is played, with their addresses.
async fn surroundings(store: Arc<dyn Store>) -> (PlayedControl, String, String) {
    let listen = || async { TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
    let address = |listener: &TcpListener| listener.local_addr().expect("bound").to_string();
    let store_listener = listen().await;
    let store_address = address(&store_listener);
    tokio::spawn(server::serve(store_listener, store, SharedToken::fixed("store").expect("a token")));
    let control = PlayedControl::default();
    let listener = listen().await;
    let control_address = address(&listener);
    let service = tonic::transport::Server::builder().add_service(ControlServer::new(control.clone()));
    tokio::spawn(service.serve_with_incoming(TcpListenerStream::new(listener)));
    (control, control_address, format!("grpc://{store_address}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_is_told_to_end_waits_for_control_and_then_releases() {
    let store = Arc::new(MemoryStore::default());
    let (control, control_address, store_url) = surroundings(store.clone()).await;
    let (stop, stopped) = oneshot::channel::<()>();
    let member = tokio::spawn(serve(config("business-0", &control_address, &store_url), stopped.map(|_| ())));
    until("it said Hello", || control.0.lock().members.len() == 1).await;
    assert_eq!(control.0.lock().members["business-0"].0.instance, std::process::id().to_string());
    control.publish_map();
    let everything = (0..SHARDS).map(|shard| control::ShardRow { shard, epoch: 0, owner: String::new() }).collect();
    control.tell("business-0", command::Command::Acquire(control::Acquire { expected: everything }));
    until("all shards have an owner", || control.0.lock().owners.len() == SHARDS as usize).await;

    stop.send(()).expect("it runs");
    until("it says so", || !control.0.lock().leaving.is_empty()).await;
    assert_eq!(control.0.lock().leaving[0], ("business-0".to_owned(), 0), "before it gives anything up by itself");
    // Control moves one away, and has nobody for the others.
    control.tell("business-0", command::Command::Release(control::Release { shard: 3, epoch: 1, to: String::new() }));
    let ended = tokio::time::timeout(PATIENCE, member).await.expect("in time").expect("no panic");
    ended.expect("an orderly end");
    let rows = store.shards().await.expect("memory answers");
    assert_eq!(rows.len(), SHARDS as usize);
    assert!(rows.iter().all(|row| row.epoch == 1 && row.owner.is_none()), "{rows:?}");
    assert_eq!(control.0.lock().released.first(), Some(&(3, 1)), "what control asked for went first");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_store_order_move_and_take_over() {
    let folder = std::env::temp_dir().join(format!("im-member-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let store: Arc<dyn Store> = Arc::new(Sqlite::open(&folder.join("messages.sqlite")).expect("a fresh database"));
    let (control, control_address, store_url) = surroundings(store).await;

    let mut processes = Vec::new();
    for name in ["business-0", "business-1"] {
        let config = config(name, &control_address, &store_url);
        processes.push(tokio::spawn(serve(config, std::future::pending())));
    }
    until("both members said Hello", || control.0.lock().members.len() == 2).await;
    control.publish_map();
    let everything = (0..SHARDS).map(|shard| control::ShardRow { shard, epoch: 0, owner: String::new() }).collect();
    control.tell("business-0", command::Command::Acquire(control::Acquire { expected: everything }));
    until("all shards have an owner", || control.0.lock().owners.len() == SHARDS as usize).await;

    let hellos: Vec<control::Hello> = control.0.lock().members.values().map(|(hello, _)| hello.clone()).collect();
    let member =
        |hello: &control::Hello| (MemberId::parse(&hello.member).expect("a member"), hello.link_address.clone());
    let members: Vec<(MemberId, String)> = hellos.iter().map(member).collect();
    let client = Client::start(members.clone());

    let conversation = "u/alice/bob";
    let shard = shard_of(conversation, SHARDS);
    for turn in 1..=20 {
        assert_eq!(client.send(conversation, "alice", &format!("a{turn}")).await, turn);
    }
    assert_eq!(client.send(conversation, "alice", "a7").await, 7, "a resend is answered with what is stored");

    // A planned move in the middle of the stream.
    let (_, epoch) = control.0.lock().owners[&shard].clone();
    let sending = {
        let client = client.clone();
        tokio::spawn(async move {
            let turns = (1..=200).map(|turn| {
                let client = client.clone();
                async move { client.send(conversation, "bob", &format!("b{turn}")).await }
            });
            futures::stream::iter(turns).buffered(16).collect::<Vec<u64>>().await
        })
    };
    let to = members[1].0.to_string();
    control.tell("business-0", command::Command::Release(control::Release { shard, epoch, to: to.clone() }));
    until("the shard is released", || control.0.lock().released.contains(&(shard, epoch))).await;
    let expected = vec![control::ShardRow { shard, epoch, owner: String::new() }];
    control.tell("business-1", command::Command::Acquire(control::Acquire { expected }));
    let seqs = sending.await.expect("all are sent");
    assert_eq!(seqs, (21..=220).collect::<Vec<u64>>(), "in order, without gaps, across the move");
    assert_eq!(control.0.lock().owners[&shard], ("business-1".to_owned(), epoch + 1));

    // The other member ends without a word: its shards are taken from it.
    processes.remove(0).abort();
    let rows: Vec<control::ShardRow> = {
        let played = control.0.lock();
        let theirs = played.owners.iter().filter(|(_, (owner, _))| owner == "business-0");
        theirs
            .map(|(shard, (_, epoch))| control::ShardRow {
                shard: *shard,
                epoch: *epoch,
                owner: members[0].0.to_string(),
            })
            .collect()
    };
    assert_eq!(rows.len(), SHARDS as usize - 1);
    control.tell("business-1", command::Command::Acquire(control::Acquire { expected: rows }));
    for group in 0..SHARDS {
        let conversation = format!("u/p{group}/q{group}");
        assert_eq!(client.send(&conversation, &format!("p{group}"), "first").await, 1);
    }
    std::fs::remove_dir_all(&folder).expect("the folder goes");
}
