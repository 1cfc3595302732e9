//! A fake owner of all shards, and a client made of packets by an independent codec.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use im_gateway::config::Config;
use im_gateway::run::{self, Running};
use im_proto::control::{self, Map};
use im_proto::ids::MemberId;
use im_proto::link::link_server::{Link, LinkServer};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Body, ClientFrame, ClientFrames, Deliver, Done, Entry, Fetched, Head, HeadList, IndexRow, Marked, Owned,
    OwnedShard, PresenceInfo, Push, Recipient, Refusal, Refused, Registered, Reply, RoomCounted, RoomCounter,
    RoomCounts, RoomJoin, RoomJoined, RoomMessage, ServerFrame, ServerFrames, SessionNumber, Stored, body,
    client_frame, push, server_frame,
};
use im_proto::links::Outbox;
use mqtt_protocol_core::mqtt::packet::{Qos, SubEntry, SubOpts, v5_0};
use parking_lot::Mutex;
use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

pub const SHARDS: u32 = 8;

/// One process that owns everything and forgets everything.
#[derive(Default)]
pub struct FakeOwner {
    state: Mutex<OwnerState>,
}

#[derive(Default)]
struct OwnerState {
    logs: HashMap<String, Vec<Entry>>,
    counter: u64,
    push_id: u64,
    pub closes: Vec<im_proto::link::Close>,
    took: u64,
    links: Vec<Arc<Outbox<ServerFrame>>>,
    counts: Vec<RoomCounts>,
    refused_counts: Vec<RoomCounts>,
    counts_to_refuse: u32,
    holds_counts: bool,
    held_counts: Vec<u64>,
    uncounted: Option<String>,
    joins: Vec<RoomJoin>,
    joins_to_refuse: u32,
    room_took: u64,
    history_max: u32,
}

impl FakeOwner {
    pub async fn start() -> (Arc<Self>, SocketAddr) {
        let owner = Arc::new(Self::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let service = LinkServer::new(Handler(owner.clone()));
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener)),
        );
        (owner, address)
    }

    pub fn closes(&self) -> usize {
        self.state.lock().closes.len()
    }

    pub fn took(&self) -> u64 {
        self.state.lock().took
    }

    /// Pushes over all links.
    pub fn push(&self, push: push::Push) {
        let mut state = self.state.lock();
        state.push_id += 1;
        let frame = server_frame::Frame::Push(Push { id: state.push_id, push: Some(push) });
        say(&state, frame);
    }

    /// Counts that were taken.
    pub fn counts(&self) -> Vec<RoomCounts> {
        self.state.lock().counts.clone()
    }

    /// Counts that were refused.
    pub fn refused_counts(&self) -> Vec<RoomCounts> {
        self.state.lock().refused_counts.clone()
    }

    /// Refuses the next counts for now.
    pub fn refuse_counts(&self, times: u32) {
        self.state.lock().counts_to_refuse = times;
    }

    /// Answers no counts from now on, or those that wait and all that come.
    pub fn hold_counts(&self, holds: bool) {
        let mut state = self.state.lock();
        state.holds_counts = holds;
        let held = if holds { Vec::new() } else { std::mem::take(&mut state.held_counts) };
        for id in held {
            let reply = Reply { id, epoch: 1, outcome: Some(Outcome::Done(Done {})) };
            say(&state, server_frame::Frame::Reply(reply));
        }
    }

    /// Says of this counter that its room has no space for it.
    pub fn do_not_count(&self, counter: &str) {
        self.state.lock().uncounted = Some(counter.to_owned());
    }

    /// What was said of who is in rooms.
    pub fn joins(&self) -> Vec<RoomJoin> {
        self.state.lock().joins.clone()
    }

    /// Refuses the next joins for now.
    pub fn refuse_joins(&self, times: u32) {
        self.state.lock().joins_to_refuse = times;
    }

    /// Another epoch of all shards begins.
    pub fn acquire_again(&self, epoch: u64) {
        let shards = (0..SHARDS).map(|shard| OwnedShard { shard, epoch }).collect();
        say(&self.state.lock(), server_frame::Frame::Owned(Owned { shards }));
    }

    /// Bytes of room messages that went out.
    pub fn room_took(&self) -> u64 {
        self.state.lock().room_took
    }

    /// Gateways keep so many messages of rooms.
    pub fn keep_history(&self, history_max: u32) {
        self.state.lock().history_max = history_max;
    }

    fn answer(&self, body: body::Body, pushes: &mut Vec<push::Push>) -> Outcome {
        let mut state = self.state.lock();
        match body {
            body::Body::Register(register) => {
                state.counter += 1;
                let number = register.number.unwrap_or(SessionNumber { epoch: 1, counter: state.counter });
                let mine = |id: &String| id.split('/').skip(1).any(|name| name == register.user);
                let row = |id: &String| IndexRow { conversation: id.clone(), from_seq: 1, to_seq: 0, as_of: 0 };
                let index = state.logs.keys().filter(|id| mine(id)).map(row).collect();
                Outcome::Registered(Registered {
                    number: Some(number),
                    connections: state.counter,
                    index,
                    ..Registered::default()
                })
            }
            body::Body::Send(send) if send.conversation == "g/closed" => {
                Outcome::Refused(Refused { code: Refusal::NotAMember.into(), reason: String::new() })
            }
            body::Body::Send(send) => {
                let log = state.logs.entry(send.conversation.clone()).or_default();
                let seq = log.len() as u64 + 1;
                let entry = Entry {
                    seq,
                    ts_ms: 1_000 + seq as i64,
                    sender: send.sender,
                    device: send.device,
                    client_id: send.client_id,
                    kind: 0,
                    payload: send.payload,
                };
                log.push(entry.clone());
                let users = send.conversation.split('/').skip(1).map(str::to_owned);
                let recipient = |user| Recipient { user, from_seq: 1, to_seq: 0, as_of: 0 };
                let recipients = users.map(recipient).collect();
                pushes.push(push::Push::Deliver(Deliver {
                    conversation: send.conversation,
                    entry: Some(entry),
                    recipients,
                }));
                Outcome::Stored(Stored { seq, ts_ms: 1_000 + seq as i64 })
            }
            body::Body::Heads(heads) => {
                let head = |conversation: String| {
                    let head = state.logs.get(&conversation).map_or(0, |log| log.len() as u64);
                    Head { conversation, head, ..Head::default() }
                };
                Outcome::Heads(HeadList { heads: heads.conversations.into_iter().map(head).collect() })
            }
            body::Body::Fetch(fetch) => {
                let log = state.logs.get(&fetch.conversation).cloned().unwrap_or_default();
                let head = log.len() as u64;
                let entries: Vec<Entry> =
                    log.into_iter().filter(|entry| entry.seq >= fetch.from).take(fetch.limit as usize).collect();
                let next = entries.last().map_or(fetch.from, |entry| entry.seq + 1);
                Outcome::Fetched(Fetched { entries, next, head })
            }
            body::Body::Presence(_) => Outcome::Presence(PresenceInfo { known: true, ..PresenceInfo::default() }),
            body::Body::MarkRead(mark) => Outcome::Marked(Marked { seq: mark.seq }),
            body::Body::RoomPublish(publish) => {
                let (room, sender, device, payload) = (publish.room, publish.sender, publish.device, publish.payload);
                pushes.push(push::Push::RoomMessage(RoomMessage { room, sender, device, payload, number: 1 }));
                Outcome::Done(Done {})
            }
            body::Body::RoomJoin(join) => {
                state.joins.push(join);
                if state.joins_to_refuse > 0 {
                    state.joins_to_refuse -= 1;
                    return Outcome::Refused(Refused { code: Refusal::Busy.into(), reason: String::new() });
                }
                Outcome::RoomJoined(RoomJoined { history_max: state.history_max, ..RoomJoined::default() })
            }
            body::Body::RoomCounts(counts) if state.counts_to_refuse > 0 && has_counted(&counts) => {
                state.counts_to_refuse -= 1;
                state.refused_counts.push(counts);
                Outcome::Refused(Refused { code: Refusal::StoreUnavailable.into(), reason: String::new() })
            }
            body::Body::RoomCounts(counts) => {
                let is_uncounted = |name: &String| state.uncounted.as_ref() == Some(name);
                let mut refused = Vec::new();
                for room in &counts.rooms {
                    let names = room.counted.iter().map(|count| count.name.clone()).filter(is_uncounted);
                    refused.extend(names.map(|name| RoomCounter { room: room.room.clone(), name }));
                }
                if has_counted(&counts) {
                    state.counts.push(counts);
                }
                match refused.is_empty() {
                    true => Outcome::Done(Done {}),
                    false => Outcome::RoomCounted(RoomCounted { refused }),
                }
            }
            body::Body::Close(close) => {
                state.closes.push(close);
                Outcome::Done(Done {})
            }
            _ => Outcome::Done(Done {}),
        }
    }

    fn on_frame(&self, frame: client_frame::Frame) -> Vec<ServerFrame> {
        let frame = match frame {
            client_frame::Frame::Ping(number) => vec![server_frame::Frame::Pong(number)],
            client_frame::Frame::Hello(_) => {
                let shards = (0..SHARDS).map(|shard| OwnedShard { shard, epoch: 1 }).collect();
                vec![server_frame::Frame::Owned(Owned { shards })]
            }
            client_frame::Frame::RoomTook(took) => {
                self.state.lock().room_took += took.bytes;
                Vec::new()
            }
            client_frame::Frame::Took(id) => {
                self.state.lock().took = id;
                Vec::new()
            }
            client_frame::Frame::Request(request) => {
                let body = Body::decode(request.body).unwrap().body.unwrap();
                let mut pushes = Vec::new();
                let is_counts = matches!(body, body::Body::RoomCounts(_));
                let outcome = self.answer(body, &mut pushes);
                let mut state = self.state.lock();
                if is_counts && state.holds_counts {
                    state.held_counts.push(request.id);
                    return Vec::new();
                }
                drop(state);
                let reply = Reply { id: request.id, epoch: request.epoch, outcome: Some(outcome) };
                let mut frames = vec![server_frame::Frame::Reply(reply)];
                for push in pushes {
                    let mut state = self.state.lock();
                    state.push_id += 1;
                    frames.push(server_frame::Frame::Push(Push { id: state.push_id, push: Some(push) }));
                }
                frames
            }
        };
        frame.into_iter().map(|frame| ServerFrame { frame: Some(frame) }).collect()
    }
}

fn say(state: &OwnerState, frame: server_frame::Frame) {
    for link in &state.links {
        link.push([ServerFrame { frame: Some(frame.clone()) }]).unwrap();
    }
}

fn has_counted(counts: &RoomCounts) -> bool {
    counts.rooms.iter().any(|room| !room.counted.is_empty())
}

struct Handler(Arc<FakeOwner>);

#[tonic::async_trait]
impl Link for Handler {
    type OpenStream = Pin<Box<dyn Stream<Item = Result<ServerFrames, Status>> + Send>>;

    async fn open(&self, request: Request<Streaming<ClientFrames>>) -> Result<Response<Self::OpenStream>, Status> {
        let mut frames = request.into_inner();
        let outbox = Outbox::<ServerFrame>::new(100_000);
        let (owner, writer) = (self.0.clone(), outbox.clone());
        owner.state.lock().links.push(outbox.clone());
        tokio::spawn(async move {
            while let Ok(Some(message)) = frames.message().await {
                for ClientFrame { frame } in message.frames {
                    writer.push(owner.on_frame(frame.unwrap())).unwrap();
                }
            }
            writer.close();
        });
        Ok(Response::new(Box::pin(outbox.reader().map(|frames| Ok(ServerFrames { frames })))))
    }
}

/// A gateway that serves from one fake owner.
pub async fn gateway(config: &str) -> (Running, Arc<FakeOwner>) {
    let (owner, address) = FakeOwner::start().await;
    let config: Config = serde_json::from_str(config).unwrap();
    let running = run::start(&config).unwrap();
    let business = MemberId::new("business-0", 7).unwrap();
    let member = control::Member {
        member: business.to_string(),
        role: control::Role::Business.into(),
        link_address: address.to_string(),
    };
    let owners = vec![1; SHARDS as usize];
    let map = Map { number: 1, shards: SHARDS, members: vec![member], owners, epochs: vec![1; SHARDS as usize] };
    running.gateway.hub.on_map(1, &map);
    (running, owner)
}

pub const PLAIN: &str = r#"{"name":"gateway-0","mqtt":{"address":"127.0.0.1:0"},"admin":{"address":"127.0.0.1:0"},
    "http":{"address":"127.0.0.1:0"},"webSocket":{"address":"127.0.0.1:0"},"auth":{"insecure":{}}}"#;

/// Waits until something holds, by looking often; fails after 10 s.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let looking = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        while !holds() {
            ticks.tick().await;
        }
    };
    timeout(Duration::from_secs(10), looking).await.unwrap_or_else(|_| panic!("not within 10 s: {what}"));
}

/// An MQTT 5 client; packets out and in by an independent codec.
pub struct Client<S> {
    pub stream: S,
    input: Vec<u8>,
}

#[derive(Debug)]
pub struct Received {
    pub topic: String,
    pub payload: Vec<u8>,
    pub packet_id: Option<u16>,
    pub properties: String,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, input: Vec::new() }
    }

    pub async fn connect(stream: S, user: &str, device: &str) -> Self {
        Self::connect_with(stream, user, device, b"x").await
    }

    pub async fn connect_with(stream: S, user: &str, device: &str, password: &[u8]) -> Self {
        let mut client = Self::new(stream);
        assert_eq!(client.login_with(user, device, password).await, Some(0));
        client
    }

    pub async fn login(&mut self, user: &str, device: &str) -> Option<u8> {
        self.login_with(user, device, b"x").await
    }

    /// The CONNACK's code; `None` if the connection was closed without one.
    pub async fn login_with(&mut self, user: &str, device: &str, password: &[u8]) -> Option<u8> {
        // Who is refused before his CONNECT may find the socket closed.
        self.stream.write_all(&connect_packet(user, device, password)).await.ok()?;
        self.stream.flush().await.ok()?;
        let (first, body) = self.receive().await?;
        assert_eq!(first, 0x20, "{body:?}");
        v5_0::Connack::parse(&body).expect("a CONNACK that others read too");
        Some(body[1])
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// First byte and body of the next packet; `None` at the end of the stream.
    pub async fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            if let Some((packet, used)) = split(&self.input) {
                self.input.drain(..used);
                return Some(packet);
            }
            let read = timeout(Duration::from_secs(10), self.stream.read_buf(&mut self.input))
                .await
                .expect("a packet within 10 s");
            if read.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    pub async fn subscribe(&mut self, filter: &str) -> u8 {
        let entry = SubEntry::new(filter, SubOpts::new().set_qos(Qos::AtLeastOnce)).unwrap();
        let packet = v5_0::Subscribe::builder().packet_id(9u16).entries(vec![entry]).build().unwrap();
        self.send(&packet.to_continuous_buffer()).await;
        let (first, body) = self.receive().await.expect("SUBACK");
        assert_eq!(first, 0x90);
        v5_0::Suback::parse(&body).expect("a SUBACK that others read too");
        *body.last().unwrap()
    }

    pub async fn unsubscribe(&mut self, filter: &str) {
        let packet = v5_0::Unsubscribe::builder().packet_id(9u16).entries(vec![filter]).unwrap().build().unwrap();
        self.send(&packet.to_continuous_buffer()).await;
        assert_eq!(self.receive().await.expect("UNSUBACK").0, 0xB0);
    }

    /// Publishes with QoS 1; returns the PUBACK's code and its properties as text.
    pub async fn publish(&mut self, packet_id: u16, topic: &str, payload: &[u8]) -> (u8, String) {
        let packet = v5_0::Publish::builder()
            .topic_name(topic)
            .unwrap()
            .qos(Qos::AtLeastOnce)
            .packet_id(packet_id)
            .payload(payload);
        self.send(&packet.build().unwrap().to_continuous_buffer()).await;
        loop {
            let (first, body) = self.receive().await.expect("PUBACK");
            if first == 0x40 {
                let (ack, _) = v5_0::Puback::parse(&body).expect("a PUBACK that others read too");
                assert_eq!(ack.packet_id(), packet_id);
                return (ack.reason_code().map_or(0, |code| code as u8), format!("{ack:?}"));
            }
        }
    }

    /// The next PUBLISH, acknowledged.
    pub async fn message(&mut self) -> Received {
        let (first, body) = self.receive().await.expect("PUBLISH");
        assert_eq!(first & 0xF0, 0x30, "{first:x} {body:?}");
        let (publish, _) = v5_0::Publish::parse(first & 0x0F, body.into()).expect("a PUBLISH that others read too");
        if let Some(id) = publish.packet_id() {
            self.send(&v5_0::Puback::builder().packet_id(id).build().unwrap().to_continuous_buffer()).await;
        }
        Received {
            topic: publish.topic_name().to_owned(),
            payload: publish.payload().as_slice().to_vec(),
            packet_id: publish.packet_id(),
            properties: format!("{publish:?}"),
        }
    }
}

pub fn connect_packet(user: &str, device: &str, password: &[u8]) -> Vec<u8> {
    let connect = v5_0::Connect::builder().client_id(device).unwrap().user_name(user).unwrap();
    let connect = connect.password(password.to_vec()).unwrap().clean_start(true).build().unwrap();
    connect.to_continuous_buffer()
}

fn split(input: &[u8]) -> Option<((u8, Vec<u8>), usize)> {
    let (mut length, mut index) = (0usize, 1);
    loop {
        let byte = *input.get(index)?;
        length |= usize::from(byte & 0x7F) << (7 * (index - 1));
        index += 1;
        if byte & 0x80 == 0 {
            break;
        }
    }
    let body = input.get(index..index + length)?;
    Some(((input[0], body.to_vec()), index + length))
}
