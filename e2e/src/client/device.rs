//! A person's device: it connects again, and sends again what was not acknowledged.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use thiserror::Error;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{ClientError, Connection, Delivery, Event, Message, Observer, Options, Outcome, Welcome};
use crate::wire::{self, Packet, Version};

/// Unwritten bytes above which a client stops reading, so that a peer that reads nothing can't make it grow.
const WRITE_BUFFER_BYTES_MAX: usize = 256 * 1024;
/// MQTT 3.1.1 has no Receive Maximum; this many of its messages are in flight at most.
const IN_FLIGHT_V311_MAX: u16 = 64;
/// Messages that wait in a client's queue before [`Client::try_publish`] says it is full.
const QUEUE_MESSAGES_MAX: usize = 1024;
/// First and longest back-off between two attempts to connect; the real one is drawn below it (full jitter).
const BACK_OFF_FIRST: Duration = Duration::from_millis(200);
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// A connection that lived this long resets the back-off.
const STABLE_AFTER: Duration = Duration::from_secs(2);

/// Where a client stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It was told to be offline, or the server gave its session to another connection (0x8E).
    Offline,
    /// It tries to connect.
    Connecting,
    /// It is connected and its subscriptions stand.
    Online {
        /// Connection number.
        connection: u32,
        /// The server had the session.
        session_present: bool,
    },
    /// Its task ended.
    Stopped,
}

/// A message could not be handed over.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum PublishError {
    /// The client's queue is full: the server answers more slowly than the schedule sends.
    #[error("the client's queue is full")]
    Full,
    /// The client was stopped.
    #[error("the client was stopped")]
    Stopped,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Online,
    Offline,
    Stop,
}

#[derive(Clone, Copy, Debug)]
struct Control {
    wish: Wish,
    acknowledge: bool,
}

enum Command {
    Publish(Outgoing),
    Subscribe(String, oneshot::Sender<u8>),
    Unsubscribe(String, oneshot::Sender<u8>),
}

struct Outgoing {
    message: Message,
    answer: Option<oneshot::Sender<Outcome>>,
}

/// The handle of one device's client. Dropping it ends the client without a DISCONNECT.
#[derive(Debug)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    control: watch::Sender<Control>,
    state: watch::Receiver<State>,
    task: JoinHandle<()>,
}

impl Client {
    /// Starts a client that goes online at once.
    pub fn start(options: Options, observer: Arc<dyn Observer>) -> Self {
        let (commands, receiver) = mpsc::channel(QUEUE_MESSAGES_MAX);
        let (control, control_seen) = watch::channel(Control { wish: Wish::Online, acknowledge: true });
        let (state_set, state) = watch::channel(State::Connecting);
        let device = Device {
            options,
            observer,
            commands: receiver,
            control: control_seen,
            state: state_set,
            connections: 0,
            last_packet_id: 0,
            in_flight: VecDeque::new(),
            backlog: VecDeque::new(),
        };
        Self { commands, control, state, task: tokio::spawn(device.run()) }
    }

    /// Where the client stands.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Waits until the client is online with its subscriptions; `false` = it was stopped.
    pub async fn online(&self) -> bool {
        let mut state = self.state.clone();
        state
            .wait_for(|state| matches!(state, State::Online { .. } | State::Stopped))
            .await
            .is_ok_and(|s| *s != State::Stopped)
    }

    /// Waits until the client is offline on purpose.
    pub async fn offline(&self) {
        let mut state = self.state.clone();
        let _ = state.wait_for(|state| matches!(state, State::Offline | State::Stopped)).await;
    }

    /// Says good-bye and stays away, or comes back. What waits to be sent is kept.
    pub fn set_online(&self, online: bool) {
        let wish = if online { Wish::Online } else { Wish::Offline };
        self.control.send_modify(|control| control.wish = wish);
    }

    /// A client that does not acknowledge what it gets is a slow one; switched on again, it acknowledges what it owes.
    pub fn set_acknowledging(&self, acknowledge: bool) {
        self.control.send_modify(|control| control.acknowledge = acknowledge);
    }

    /// Hands a message over without waiting.
    ///
    /// # Errors
    /// [`PublishError::Full`] when the client is behind, [`PublishError::Stopped`].
    pub fn try_publish(&self, message: Message) -> Result<(), PublishError> {
        self.commands.try_send(Command::Publish(Outgoing { message, answer: None })).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => PublishError::Full,
            mpsc::error::TrySendError::Closed(_) => PublishError::Stopped,
        })
    }

    /// Publishes a QoS 1 message and waits for what became of it, over as many connections as it takes.
    ///
    /// # Errors
    /// [`PublishError::Stopped`].
    pub async fn publish(&self, message: Message) -> Result<Outcome, PublishError> {
        let (answer, outcome) = oneshot::channel();
        let outgoing = Outgoing { message, answer: Some(answer) };
        self.commands.send(Command::Publish(outgoing)).await.map_err(|_| PublishError::Stopped)?;
        outcome.await.map_err(|_| PublishError::Stopped)
    }

    /// Subscribes one filter and gives the SUBACK's code. A connection that breaks meanwhile counts as 0x80.
    ///
    /// # Errors
    /// [`PublishError::Stopped`].
    pub async fn subscribe(&self, filter: impl Into<String>) -> Result<u8, PublishError> {
        let (answer, code) = oneshot::channel();
        self.commands.send(Command::Subscribe(filter.into(), answer)).await.map_err(|_| PublishError::Stopped)?;
        Ok(code.await.unwrap_or(0x80))
    }

    /// Unsubscribes one filter and gives the UNSUBACK's code (0 in 3.1.1).
    ///
    /// # Errors
    /// [`PublishError::Stopped`].
    pub async fn unsubscribe(&self, filter: impl Into<String>) -> Result<u8, PublishError> {
        let (answer, code) = oneshot::channel();
        self.commands.send(Command::Unsubscribe(filter.into(), answer)).await.map_err(|_| PublishError::Stopped)?;
        Ok(code.await.unwrap_or(0x80))
    }

    /// Says good-bye and ends the client.
    pub async fn stop(mut self) {
        self.control.send_modify(|control| control.wish = Wish::Stop);
        let _ = (&mut self.task).await;
    }

    /// Ends the client the hard way, as if its machine died: no DISCONNECT.
    pub fn kill(self) {
        self.task.abort();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The client's task.
struct Device {
    options: Options,
    observer: Arc<dyn Observer>,
    commands: mpsc::Receiver<Command>,
    control: watch::Receiver<Control>,
    state: watch::Sender<State>,
    connections: u32,
    last_packet_id: u16,
    /// Sent on this connection and not answered, in sending order.
    in_flight: VecDeque<(u16, Outgoing)>,
    /// To be sent before anything new: what an earlier connection left.
    backlog: VecDeque<Outgoing>,
}

/// Why [`Device::serve`] came back.
enum End {
    Wished,
    Broken(ClientError),
}

/// What a connection asked for and still waits for.
struct Asked {
    packet_id: u16,
    filter: String,
    answer: Option<oneshot::Sender<u8>>,
}

impl Device {
    async fn run(mut self) {
        let mut attempt = 0u32;
        loop {
            let Ok(control) = self.control.wait_for(|control| control.wish != Wish::Offline).await.map(|seen| *seen)
            else {
                break;
            };
            if control.wish == Wish::Stop {
                break;
            }
            self.state.send_replace(State::Connecting);
            let clean_start = self.options.clean_start && self.connections == 0;
            let opened = tokio::select! {
                opened = Connection::open(&self.options, clean_start) => opened,
                _ = self.control.wait_for(|control| control.wish != Wish::Online) => continue_offline(&self.state),
            };
            match opened {
                Ok((connection, welcome)) => {
                    let since = Instant::now();
                    self.connections += 1;
                    let end = self.serve(connection, &welcome).await;
                    self.take_back();
                    attempt = if since.elapsed() >= STABLE_AFTER { 0 } else { attempt + 1 };
                    let number = Some(self.connections);
                    match end {
                        End::Wished => {
                            attempt = 0;
                            self.observer.observe(Event::Disconnected { connection: number, why: None });
                            self.state.send_replace(State::Offline);
                            continue;
                        }
                        End::Broken(why) => {
                            self.observer.observe(Event::Disconnected { connection: number, why: Some(&why) });
                            if matches!(why, ClientError::Disconnected { code: 0x8E, .. }) {
                                // Coming back would take the session from whoever has it now, for ever in turns.
                                self.state.send_replace(State::Offline);
                                if self.control.changed().await.is_err() {
                                    break;
                                }
                                continue;
                            }
                        }
                    }
                }
                Err(_) if self.control.borrow().wish != Wish::Online => {
                    self.state.send_replace(State::Offline);
                    continue;
                }
                Err(why) => {
                    attempt += 1;
                    self.observer.observe(Event::Disconnected { connection: None, why: Some(&why) });
                }
            }
            self.state.send_replace(State::Connecting);
            tokio::select! {
                () = sleep_until(Instant::now() + back_off(attempt)) => {}
                _ = self.control.wait_for(|control| control.wish != Wish::Online) => {}
            }
        }
        self.state.send_replace(State::Stopped);
    }

    /// What a lost connection did not get answered is sent first on the next one, in the same order.
    fn take_back(&mut self) {
        while let Some((_, outgoing)) = self.in_flight.pop_back() {
            self.backlog.push_front(outgoing);
        }
    }

    async fn serve(&mut self, mut connection: Connection, welcome: &Welcome) -> End {
        let number = self.connections;
        let session_present = welcome.session_present;
        self.observer.observe(Event::Connected { connection: number, session_present });
        let window = match self.options.version {
            Version::V311 => IN_FLIGHT_V311_MAX,
            Version::V5 => welcome.properties.receive_maximum.unwrap_or(u16::MAX).min(1024),
        };
        let keep_alive = welcome.properties.server_keep_alive_seconds.unwrap_or(self.options.keep_alive_seconds);
        // A client without keep-alive still wakes up now and then, which costs nothing.
        let ping_every = Duration::from_secs(if keep_alive == 0 { 3600 } else { u64::from(keep_alive) });
        let silence_max = ping_every.mul_f64(1.5);
        let mut asked: Vec<Asked> = Vec::new();
        let mut owed: Vec<u16> = Vec::new();
        let mut refused_v311: Vec<(u16, Outcome)> = Vec::new();
        if !session_present {
            for filter in self.options.subscriptions.clone() {
                let packet_id = self.free_packet_id(&asked);
                wire::encode_subscribe(connection.version, packet_id, &filter, 1, &mut connection.write);
                asked.push(Asked { packet_id, filter, answer: None });
            }
        }
        if asked.is_empty() {
            self.state.send_replace(State::Online { connection: number, session_present });
        }
        let (mut last_heard, mut last_ping) = (Instant::now(), Instant::now());
        loop {
            while self.in_flight.len() < usize::from(window) {
                let Some(outgoing) = self.backlog.pop_front() else { break };
                self.send(outgoing, true, &asked, &mut connection);
            }
            loop {
                match connection.decoded() {
                    Ok(Some(packet)) => {
                        if let Some(error) =
                            self.take(packet, &mut connection, &mut asked, &mut owed, &mut refused_v311)
                        {
                            return End::Broken(error);
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return End::Broken(error),
                }
                if asked.is_empty() && !matches!(*self.state.borrow(), State::Online { .. }) {
                    self.state.send_replace(State::Online { connection: number, session_present });
                }
            }
            let control = *self.control.borrow_and_update();
            if control.wish != Wish::Online {
                wire::encode_disconnect(&mut connection.write);
                let _ = timeout(Duration::from_secs(1), connection.flush()).await;
                return End::Wished;
            }
            if control.acknowledge {
                for packet_id in owed.drain(..) {
                    wire::encode_puback(packet_id, &mut connection.write);
                }
            }
            let may_read = connection.write.len() < WRITE_BUFFER_BYTES_MAX;
            let may_send = may_read && self.backlog.is_empty() && self.in_flight.len() < usize::from(window);
            let next_look = (last_ping + ping_every).min(last_heard + silence_max);
            tokio::select! {
                _ = self.control.changed() => {}
                progress = connection.make_progress(may_read) => match progress {
                    Ok(()) => {
                        if !connection.read.is_empty() {
                            last_heard = Instant::now();
                        }
                    }
                    Err(error) => return End::Broken(error),
                },
                command = self.commands.recv(), if may_send => match command {
                    Some(Command::Publish(outgoing)) => self.send(outgoing, false, &asked, &mut connection),
                    Some(Command::Subscribe(filter, answer)) => {
                        let packet_id = self.free_packet_id(&asked);
                        wire::encode_subscribe(connection.version, packet_id, &filter, 1, &mut connection.write);
                        asked.push(Asked { packet_id, filter, answer: Some(answer) });
                    }
                    Some(Command::Unsubscribe(filter, answer)) => {
                        let packet_id = self.free_packet_id(&asked);
                        wire::encode_unsubscribe(connection.version, packet_id, &filter, &mut connection.write);
                        asked.push(Asked { packet_id, filter, answer: Some(answer) });
                    }
                    None => return End::Wished,
                },
                () = sleep_until(next_look) => {
                    let now = Instant::now();
                    if now >= last_heard + silence_max && keep_alive > 0 {
                        return End::Broken(ClientError::Silent);
                    }
                    last_ping = now;
                    if keep_alive > 0 {
                        wire::encode_ping(&mut connection.write);
                    } else {
                        last_heard = now;
                    }
                }
            }
        }
    }

    fn send(&mut self, outgoing: Outgoing, again: bool, asked: &[Asked], connection: &mut Connection) {
        let number = self.connections;
        self.observer.observe(Event::Sending { connection: number, message: &outgoing.message });
        let packet_id = self.free_packet_id(asked);
        let message = &outgoing.message;
        let publish = wire::Publish {
            topic: &message.topic,
            payload: &message.payload,
            qos: message.qos,
            retain: message.retain,
            dup: again && message.qos > 0,
            packet_id,
            id: message.id.as_deref(),
        };
        wire::encode_publish(connection.version, &publish, &mut connection.write);
        if message.qos > 0 {
            self.in_flight.push_back((packet_id, outgoing));
        }
    }

    /// Packet identifiers go round and round; one that is still in use is stepped over.
    fn free_packet_id(&mut self, asked: &[Asked]) -> u16 {
        loop {
            self.last_packet_id = self.last_packet_id.wrapping_add(1).max(1);
            let id = self.last_packet_id;
            let in_use =
                self.in_flight.iter().any(|(used, _)| *used == id) || asked.iter().any(|ask| ask.packet_id == id);
            if !in_use {
                return id;
            }
        }
    }

    /// Handles one packet; gives the reason if it ends the connection.
    fn take(
        &mut self,
        packet: Packet,
        connection: &mut Connection,
        asked: &mut Vec<Asked>,
        owed: &mut Vec<u16>,
        refused_v311: &mut Vec<(u16, Outcome)>,
    ) -> Option<ClientError> {
        let number = self.connections;
        match packet {
            Packet::Publish { topic, qos, dup, packet_id, payload, properties, .. } => {
                let delivery = Delivery::new(connection.version, topic, qos, dup, payload, &properties);
                if connection.version == Version::V311 && delivery.topic == "inbox/refused" {
                    refused_v311.extend(parse_refusal(&delivery.payload));
                }
                self.observer.observe(Event::Received { connection: number, delivery: &delivery });
                owed.extend(packet_id);
                if self.control.borrow().acknowledge {
                    for packet_id in owed.drain(..) {
                        wire::encode_puback(packet_id, &mut connection.write);
                    }
                }
            }
            Packet::PubAck { packet_id, code, properties } => {
                let position = self.in_flight.iter().position(|(used, _)| *used == packet_id)?;
                let (_, outgoing) = self.in_flight.remove(position)?;
                let told = refused_v311.iter().position(|(refused, _)| *refused == packet_id);
                let outcome = match told {
                    Some(told) => refused_v311.swap_remove(told).1,
                    None if code < 0x80 => Outcome::Stored {
                        seq: properties.user("seq").and_then(|text| text.parse().ok()),
                        timestamp: properties.user("ts").map(str::to_owned),
                    },
                    None => Outcome::Refused { code, reason: properties.reason },
                };
                let message = &outgoing.message;
                self.observer.observe(Event::Answered { connection: number, message, outcome: &outcome });
                if let Some(answer) = outgoing.answer {
                    let _ = answer.send(outcome);
                }
            }
            Packet::SubAck { packet_id, codes } | Packet::UnsubAck { packet_id, codes } => {
                let position = asked.iter().position(|ask| ask.packet_id == packet_id)?;
                let ask = asked.swap_remove(position);
                let code = codes.first().copied().unwrap_or(0);
                self.observer.observe(Event::Subscribed { connection: number, filter: &ask.filter, code });
                if let Some(answer) = ask.answer {
                    let _ = answer.send(code);
                }
            }
            Packet::Disconnect { code, properties } => {
                return Some(ClientError::Disconnected { code, reason: properties.reason });
            }
            Packet::ConnAck { .. } => return Some(ClientError::Protocol),
            Packet::Pong => {}
        }
        None
    }
}

/// The wish changed while connecting: not an error, the loop looks at the wish again.
fn continue_offline(state: &watch::Sender<State>) -> Result<(Connection, Welcome), ClientError> {
    state.send_replace(State::Offline);
    Err(ClientError::Closed)
}

/// Full jitter: a random time below a bound that doubles with each attempt.
fn back_off(attempt: u32) -> Duration {
    let bound = BACK_OFF_FIRST.saturating_mul(1 << attempt.min(8)).min(BACK_OFF_MAX);
    bound.mul_f64(rand::random_range(0.1..1.0))
}

/// The notice on `inbox/refused` names the packet id and a reason.
fn parse_refusal(payload: &[u8]) -> Option<(u16, Outcome)> {
    let notice: serde_json::Value = serde_json::from_slice(payload).ok()?;
    let packet_id = u16::try_from(notice.get("packetId")?.as_u64()?).ok()?;
    let reason = notice.get("reason").and_then(|reason| reason.as_str()).map(str::to_owned);
    Some((packet_id, Outcome::Refused { code: 0x80, reason }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use futures::{SinkExt, StreamExt};
    use rmqtt_codec::v5;
    use std::num::NonZeroU16;
    use tokio::net::{TcpListener, TcpStream};
    use tokio_util::codec::Framed;

    /// The server's end of one connection, spoken with another codec than the client's.
    struct Server(Framed<TcpStream, v5::Codec>);

    impl Server {
        async fn accept(listener: &TcpListener, session_present: bool, receive_maximum: u16) -> Self {
            let (stream, _) = listener.accept().await.unwrap();
            let mut server = Self(Framed::new(stream, v5::Codec::new(0, 0)));
            assert!(matches!(server.next().await, Some(v5::Packet::Connect(_))));
            let receive_max = NonZeroU16::new(receive_maximum).unwrap();
            server.send(v5::ConnectAck { session_present, receive_max, ..Default::default() }).await;
            server
        }

        async fn next(&mut self) -> Option<v5::Packet> {
            self.0.next().await.map(|packet| packet.unwrap().0)
        }

        async fn send(&mut self, packet: impl Into<v5::Packet>) {
            self.0.send(packet.into()).await.unwrap();
        }

        /// The next packet must be a PUBLISH: packet id, DUP, `id`.
        async fn published(&mut self) -> (NonZeroU16, bool, String) {
            let Some(v5::Packet::Publish(publish)) = self.next().await else { panic!("not a PUBLISH") };
            let id = publish.properties.unwrap().user_properties[0].1.to_string();
            (publish.packet_id.unwrap(), publish.dup, id)
        }

        async fn ack(&mut self, packet_id: NonZeroU16, seq: u64) {
            let properties = vec![("seq".into(), seq.to_string().into())];
            let reason_code = v5::PublishAckReason::Success;
            self.send(v5::PublishAck { packet_id, reason_code, properties, reason_string: None }).await;
        }
    }

    async fn start() -> (TcpListener, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut options = Options::new(listener.local_addr().unwrap(), "alice", "phone");
        options.subscriptions.clear();
        (listener, Client::start(options, Arc::new(())))
    }

    #[tokio::test]
    async fn what_was_not_acknowledged_is_sent_again_in_order_before_anything_new() {
        let (listener, client) = start().await;
        let mut server = Server::accept(&listener, false, 100).await;
        let outcomes = ["a", "b", "c"].map(|id| client.publish(Message::new(id, "u/bob", "hi")));
        let all = futures::future::join_all(outcomes);
        let script = async {
            for id in ["a", "b", "c"] {
                let (_, dup, seen) = server.published().await;
                assert_eq!((dup, seen.as_str()), (false, id));
            }
            drop(server);
            let mut server = Server::accept(&listener, true, 100).await;
            client.try_publish(Message::new("d", "u/bob", "new")).unwrap();
            for (seq, id) in [(1, "a"), (2, "b"), (3, "c"), (4, "d")] {
                let (packet_id, dup, seen) = server.published().await;
                assert_eq!((dup, seen.as_str()), (id != "d", id));
                server.ack(packet_id, seq).await;
            }
            server
        };
        let (outcomes, _server) = tokio::join!(all, script);
        let seqs: Vec<_> = outcomes.into_iter().map(Result::unwrap).collect();
        let stored = |seq| Outcome::Stored { seq: Some(seq), timestamp: None };
        assert_eq!(seqs, [stored(1), stored(2), stored(3)]);
    }

    #[tokio::test]
    async fn no_more_is_in_flight_than_the_server_allows() {
        let (listener, client) = start().await;
        let mut server = Server::accept(&listener, false, 2).await;
        for id in ["a", "b", "c"] {
            client.try_publish(Message::new(id, "u/bob", "hi")).unwrap();
        }
        let (first, ..) = server.published().await;
        server.published().await;
        // The third comes only after an answer: until then the line is silent.
        assert!(timeout(Duration::from_millis(100), server.next()).await.is_err());
        server.ack(first, 1).await;
        assert_eq!(server.published().await.2, "c");
    }

    #[tokio::test]
    async fn a_slow_client_acknowledges_later_what_it_owes() {
        let (listener, client) = start().await;
        let mut server = Server::accept(&listener, false, 10).await;
        assert!(client.online().await);
        client.set_acknowledging(false);
        for number in 1..=2 {
            let publish = rmqtt_codec::types::Publish {
                dup: false,
                retain: false,
                qos: rmqtt_codec::types::QoS::AtLeastOnce,
                topic: "inbox/u/bob/bob".into(),
                packet_id: NonZeroU16::new(number),
                payload: Bytes::from_static(b"x"),
                properties: Some(v5::PublishProperties::default()),
            };
            server.send(publish).await;
        }
        assert!(timeout(Duration::from_millis(100), server.next()).await.is_err());
        client.set_acknowledging(true);
        for number in 1..=2 {
            let Some(v5::Packet::PublishAck(ack)) = server.next().await else { panic!("not a PUBACK") };
            assert_eq!(ack.packet_id.get(), number);
        }
    }

    #[tokio::test]
    async fn a_session_taken_over_is_not_fought_for() {
        let (listener, client) = start().await;
        let mut server = Server::accept(&listener, false, 10).await;
        assert!(client.online().await);
        server
            .send(v5::Disconnect {
                reason_code: v5::DisconnectReasonCode::SessionTakenOver,
                session_expiry_interval_secs: None,
                server_reference: None,
                reason_string: None,
                user_properties: Vec::new(),
            })
            .await;
        client.offline().await;
        assert_eq!(client.state(), State::Offline);
        client.set_online(true);
        Server::accept(&listener, true, 10).await;
    }

    #[test]
    fn refusals_of_3_1_1_are_understood_and_other_notices_skipped() {
        let refused = parse_refusal(br#"{"packetId": 7, "topic": "g/x", "reason": "no member"}"#);
        let reason = Some("no member".to_owned());
        assert_eq!(refused, Some((7, Outcome::Refused { code: 0x80, reason })));
        assert_eq!(parse_refusal(b"{}"), None);
        assert_eq!(parse_refusal(b"\xff"), None);
    }
}
