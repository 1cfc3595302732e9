//! Durable appends per second at a business member's Link: no MQTT, one client that keeps a fixed number of messages under way.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::{FutureExt, Stream};
use im_proto::control::control_server::{Control, ControlServer};
use im_proto::control::{self, Command, Report, command, report};
use im_proto::ids::{MemberId, direct_conversation, shard_of};
use im_proto::link::reply::Outcome as Answer;
use im_proto::link::{Body, ClientFrame, Role, Send as SendMessage, body, client_frame, server_frame};
use im_proto::links::{LinkEvent, LinkPool};
use im_proto::router::{self, Router};
use im_proto::token::SharedToken;
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

use crate::postgres::PostgresServer;
use crate::system::{Bench, free_addresses, listens, recorded_transactions};
use crate::{Outcome, Table, Wanted, bare};

const SHARDS: u32 = 64;
const CONVERSATIONS: u64 = 256;
/// Messages under way.
const WINDOW: u64 = 4_096;
const PAYLOAD_BYTES: usize = 100;
const WARM_UP: Duration = Duration::from_secs(2);

/// With the store member.
pub async fn sqlite(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let folder = bench.folder("appends")?;
    let [store] = free_addresses()?;
    let config = folder.join("store.json");
    let data = folder.join("store");
    std::fs::write(&config, json!({"name": "store", "listen": store, "dataDir": data}).to_string())?;
    let member = bench.start_recording("im-business", &["store", "--config", &config.to_string_lossy()], &folder)?;
    listens(store).await?;
    let per_second = measure(bench, &folder, &format!("grpc://{store}"), seconds).await?;
    end(member).await?;
    let (recorded, copy) = (data.join("messages.sqlite"), folder.join("replayed.sqlite"));
    let transactions = recorded_transactions(&folder.join("im-business-store.log"))?;
    let beside = beside(&transactions);
    let peer = tokio::task::spawn_blocking(move || bare::replay_sqlite(&recorded, &copy, &transactions)).await??;
    table.add("durable appends at Link, embedded", "1/s", per_second, beside, peer, Wanted::AtLeast(0.5));
    Ok(())
}

/// With PostgreSQL.
pub async fn postgres(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let folder = bench.folder("appends-postgres")?;
    let server = tokio::task::spawn_blocking(PostgresServer::start).await??;
    let per_second = measure(bench, &folder, &server.url(), seconds).await?;
    let transactions = recorded_transactions(&folder.join("im-business-serve.log"))?;
    let peer = bare::replay_postgres(&server.url(), &transactions).await?;
    tokio::task::spawn_blocking(move || drop(server)).await?;
    let beside = beside(&transactions);
    table.add("durable appends at Link, PostgreSQL", "1/s", per_second, beside, peer, Wanted::AtLeast(0.5));
    Ok(())
}

/// Asks it to end, so that its file has what its journal has.
async fn end(mut member: tokio::process::Child) -> Outcome {
    let id = member.id().and_then(|id| Pid::from_raw(id.cast_signed())).ok_or("the store member ended by itself")?;
    kill_process(id, Signal::TERM)?;
    member.wait().await?;
    Ok(())
}

/// What the bare loop does: the transactions are those that the store made, one by one.
fn beside(transactions: &[usize]) -> String {
    let mean = transactions.iter().sum::<usize>() / transactions.len().max(1);
    format!("bare, same transactions (mean {mean})")
}

/// Starts a member on a store, gives it all shards and keeps it busy.
async fn measure(bench: &Bench, folder: &std::path::Path, store: &str, seconds: u64) -> Outcome<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let (joined, mut hello) = watch::channel(None);
    let service = tonic::transport::Server::builder().add_service(ControlServer::new(PlayedControl(joined)));
    let control = tokio::spawn(service.serve_with_incoming(TcpListenerStream::new(listener)));
    let config = folder.join("business.json");
    let listen = json!({"address": "127.0.0.1:0"});
    let text = json!({"name": "business-0", "control": [address], "link": listen, "admin": listen, "store": store});
    std::fs::write(&config, text.to_string())?;
    let member = bench.start_recording("im-business", &["serve", "--config", &config.to_string_lossy()], folder)?;
    let hello = timeout(Duration::from_secs(20), hello.wait_for(Option::is_some)).await;
    let hello: control::Hello =
        hello.map_err(|_| "the business member does not say Hello")??.clone().ok_or("no Hello")?;

    let driver = Driver::start(&hello)?;
    sleep(WARM_UP).await;
    let (start, stored) = (Instant::now(), driver.stored());
    sleep(Duration::from_secs(seconds)).await;
    let per_second = (driver.stored() - stored) as f64 / start.elapsed().as_secs_f64();
    driver.finish().await?;
    end(member).await?;
    control.abort();
    Ok(per_second)
}

/// A control service that gives whoever joins first all shards.
struct PlayedControl(watch::Sender<Option<control::Hello>>);

#[tonic::async_trait]
impl Control for PlayedControl {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<Command, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::JoinStream>, Status> {
        let mut reports = request.into_inner();
        let (commands, outbound) = mpsc::channel(16);
        let joined = self.0.clone();
        tokio::spawn(async move {
            while let Ok(Some(report)) = reports.message().await {
                let Some(report::Report::Hello(hello)) = report.report else { continue };
                let (role, member) = (control::Role::Business.into(), hello.member.clone());
                let members = vec![control::Member { member, role, link_address: hello.link_address.clone() }];
                let map = control::Map { number: 1, shards: SHARDS, members, owners: Vec::new(), epochs: Vec::new() };
                let row = |shard| control::ShardRow { shard, epoch: 0, owner: String::new() };
                let acquire = control::Acquire { expected: (0..SHARDS).map(row).collect() };
                for command in [command::Command::Map(map), command::Command::Acquire(acquire)] {
                    // A member that went away has no use for it.
                    let _ = commands.send(Ok(Command { term: 1, command: Some(command) })).await;
                }
                joined.send_replace(Some(hello));
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }
}

/// Keeps [`WINDOW`] messages under way: each answer makes the next one.
struct Driver {
    state: Mutex<Driven>,
    pool: OnceLock<Arc<LinkPool>>,
}

struct Driven {
    router: Router<u64>,
    stored: u64,
    refused: u64,
    sent: u64,
    finishing: bool,
}

impl Driver {
    fn start(hello: &control::Hello) -> Outcome<Arc<Self>> {
        let router = Router::new(SHARDS, router::Limits::default());
        let state = Mutex::new(Driven { router, stored: 0, refused: 0, sent: 0, finishing: false });
        let driver = Arc::new(Self { state, pool: OnceLock::new() });
        let weak = Arc::downgrade(&driver);
        let handler = Arc::new(move |event| {
            if let Some(driver) = weak.upgrade() {
                driver.on_event(event);
            }
            async {}.boxed()
        });
        let pool = LinkPool::new(MemberId::new("bench", rand::random())?, Role::Gateway, SharedToken::none(), handler);
        let pool = driver.pool.get_or_init(|| pool);
        {
            let mut state = driver.state.lock();
            for slot in 0..WINDOW {
                state.send(slot);
            }
        }
        pool.set_members(&[(MemberId::parse(&hello.member)?, hello.link_address.clone())]);
        Ok(driver)
    }

    fn stored(&self) -> u64 {
        self.state.lock().stored
    }

    fn on_event(&self, event: LinkEvent) {
        let mut state = self.state.lock();
        match event {
            LinkEvent::Up(member) => state.router.link_up(&member),
            LinkEvent::Down(member) => state.router.link_down(&member),
            LinkEvent::Frames(member, frames) => {
                for frame in frames {
                    match frame.frame {
                        Some(server_frame::Frame::Owned(owned)) => state.router.owned(&member, &owned),
                        Some(server_frame::Frame::Moved(moved)) => state.router.moved(&moved),
                        Some(server_frame::Frame::Reply(reply)) => state.router.reply(reply),
                        _ => {}
                    }
                }
            }
        }
        let mut frames = Vec::new();
        let mut to = None;
        // What is sent for an answer is an output of the next round.
        loop {
            let outputs = state.router.take_outputs();
            if outputs.is_empty() {
                break;
            }
            for output in outputs {
                match output {
                    router::Output::Send(member, request) => {
                        to = Some(member);
                        frames.push(ClientFrame { frame: Some(client_frame::Frame::Request(request.into())) });
                    }
                    router::Output::Done(slot, answer) => {
                        match answer {
                            Answer::Stored(_) => state.stored += 1,
                            _ => state.refused += 1,
                        }
                        if !state.finishing {
                            state.send(slot);
                        }
                    }
                    router::Output::Ready { .. } => {}
                }
            }
        }
        if let (Some(to), Some(pool)) = (to, self.pool.get()) {
            pool.send(&to, frames);
        }
    }

    /// Waits for the last answers; a refusal makes the whole measurement void.
    async fn finish(&self) -> Outcome {
        self.state.lock().finishing = true;
        let until = Instant::now() + Duration::from_secs(20);
        while self.state.lock().router.unanswered() > 0 {
            if Instant::now() > until {
                return Err("the business member leaves messages unanswered".into());
            }
            sleep(Duration::from_millis(10)).await;
        }
        let refused = self.state.lock().refused;
        if refused > 0 { Err(format!("{refused} appends were refused: see the members' logs").into()) } else { Ok(()) }
    }
}

impl Driven {
    fn send(&mut self, slot: u64) {
        self.sent += 1;
        let pair = slot % CONVERSATIONS;
        let (sender, peer) = (format!("a{pair}"), format!("b{pair}"));
        let conversation = direct_conversation(&sender, &peer);
        let shard = shard_of(&conversation, SHARDS);
        let send = SendMessage {
            conversation,
            sender,
            device: "phone".into(),
            client_id: format!("{:016x}", self.sent),
            payload: vec![b'x'; PAYLOAD_BYTES].into(),
            ..SendMessage::default()
        };
        // Each connection of a gateway is a group of its own.
        if self.router.request(shard, slot + 1, Body { body: Some(body::Body::Send(send)) }, slot).is_err() {
            self.refused += 1;
        }
    }
}
