//! An MQTT client for load and for tests: one small task for each client, thousands of them in one process.
//!
//! [`Connection`] is one network connection and knows nothing of retries. [`Client`] keeps a person's device going on top
//! of it: keep-alive, reconnecting with back-off and jitter, and sending again, in the original order and with the same
//! `id`, whatever was not acknowledged. All that happens is told to an [`Observer`] from inside the client's task, in the
//! order in which it happened; that is what the history checker is fed with.

mod device;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use thiserror::Error;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};

pub use self::device::{Client, PublishError, State};

use crate::wire::{self, Packet, Properties, Version, WireError};

/// A server's answer to CONNECT is waited for this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Who connects, where to, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address of the MQTT listener (plain TCP).
    pub server: SocketAddr,
    /// Protocol version.
    pub version: Version,
    /// User name = the user's id.
    pub user: String,
    /// Password = JWT; `None` under insecure authentication.
    pub password: Option<String>,
    /// Client id = the device.
    pub device: String,
    /// Clean Start of the *first* connection; later ones resume.
    pub clean_start: bool,
    /// Session Expiry Interval in seconds (MQTT 5).
    pub session_expiry_seconds: u32,
    /// How many messages the server may have in flight to this client (MQTT 5).
    pub receive_maximum: Option<u16>,
    /// Keep-alive in seconds, 0 = none; a server that is silent for one and a half of it counts as gone.
    pub keep_alive_seconds: u16,
    /// Local address to connect from (127.0.0.x gives one process more than one range of ports).
    pub source: Option<IpAddr>,
    /// Filters subscribed after each connect that found no session.
    pub subscriptions: Vec<String>,
}

impl Options {
    /// MQTT 5, a session that lives for a day, `inbox/#` subscribed, keep-alive of 30 s.
    pub fn new(server: SocketAddr, user: impl Into<String>, device: impl Into<String>) -> Self {
        Self {
            server,
            version: Version::V5,
            user: user.into(),
            password: None,
            device: device.into(),
            clean_start: false,
            session_expiry_seconds: 86_400,
            receive_maximum: None,
            keep_alive_seconds: 30,
            source: None,
            subscriptions: vec!["inbox/#".to_owned()],
        }
    }
}

/// Why there is no connection (any more).
#[derive(Debug, Error)]
pub enum ClientError {
    /// TCP said no, or the connection broke.
    #[error("connection to {server}: {source}")]
    Io {
        /// The server's address.
        server: SocketAddr,
        /// What the operating system said.
        source: io::Error,
    },
    /// The server's bytes are not MQTT.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// CONNACK with a reason code.
    #[error("the server refused the login with code {code:#04x}{}", reason.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
    Refused {
        /// Reason code (5.0) or return code (3.1.1).
        code: u8,
        /// Reason String.
        reason: Option<String>,
    },
    /// Something else came instead of the CONNACK.
    #[error("the server answered CONNECT with something else than CONNACK")]
    Protocol,
    /// No CONNACK in time, or nothing at all for one and a half keep-alive intervals.
    #[error("the server was silent for too long")]
    Silent,
    /// The server sent DISCONNECT.
    #[error("the server ended the connection with code {code:#04x}{}", reason.as_deref().map(|text| format!(": {text}")).unwrap_or_default())]
    Disconnected {
        /// Reason code: 0x8E taken over, 0x98 administrative, 0x9C use another server …
        code: u8,
        /// Reason String.
        reason: Option<String>,
    },
    /// The server closed the TCP connection without a word.
    #[error("the server closed the connection")]
    Closed,
}

/// One message on its way out.
#[derive(Clone, Debug)]
pub struct Message {
    /// User property `id` (MQTT 5 only).
    pub id: Option<String>,
    /// Topic.
    pub topic: String,
    /// Payload.
    pub payload: Bytes,
    /// Quality of service.
    pub qos: u8,
    /// Retain flag; this system refuses it.
    pub retain: bool,
    /// When the schedule wanted it to be sent: latencies count from here, also if the client was busy.
    pub scheduled: Instant,
}

impl Message {
    /// A QoS 1 message scheduled now.
    pub fn new(id: impl Into<String>, topic: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Self {
            id: Some(id.into()),
            topic: topic.into(),
            payload: payload.into(),
            qos: 1,
            retain: false,
            scheduled: Instant::now(),
        }
    }
}

/// What became of a QoS 1 message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// PUBACK success: stored. 3.1.1 tells no `seq`.
    Stored {
        /// User property `seq`.
        seq: Option<u64>,
        /// User property `ts`, as sent.
        timestamp: Option<String>,
    },
    /// PUBACK with a reason code, or (3.1.1) a notice on `inbox/refused`: not stored.
    Refused {
        /// Reason code ≥ 0x80.
        code: u8,
        /// Reason String.
        reason: Option<String>,
    },
}

/// What a delivered topic means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Inbox {
    /// `inbox/u/{peer}/{from}`: a message of the 1:1 conversation with `peer`.
    Person {
        /// The other one, who names the conversation.
        peer: String,
        /// Who wrote it: the peer, or oneself on another device.
        from: String,
    },
    /// `inbox/g/{group}/{from}`.
    Group {
        /// The group.
        group: String,
        /// Who wrote it; `$system` for joins and leaves.
        from: String,
    },
    /// Anything else: read marks, refusals, rooms.
    Other,
}

/// One message that came in.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// The topic as sent.
    pub topic: String,
    /// The topic as understood.
    pub inbox: Inbox,
    /// `seq`: a user property in MQTT 5, the last level of the topic in 3.1.1.
    pub seq: Option<u64>,
    /// User property `id`.
    pub id: Option<String>,
    /// User property `ts`, as sent.
    pub timestamp: Option<String>,
    /// Payload.
    pub payload: Bytes,
    /// Quality of service.
    pub qos: u8,
    /// DUP flag.
    pub dup: bool,
}

impl Delivery {
    fn new(version: Version, topic: String, qos: u8, dup: bool, payload: Bytes, properties: &Properties) -> Self {
        let mut levels: Vec<&str> = topic.split('/').collect();
        let mut seq = properties.user("seq").and_then(|text| text.parse().ok());
        if version == Version::V311 && levels.len() == 5 {
            seq = levels.pop().and_then(|text| text.parse().ok());
        }
        let inbox = match levels.as_slice() {
            ["inbox", "u", peer, from] => Inbox::Person { peer: (*peer).to_owned(), from: (*from).to_owned() },
            ["inbox", "g", group, from] => Inbox::Group { group: (*group).to_owned(), from: (*from).to_owned() },
            _ => Inbox::Other,
        };
        let id = properties.user("id").map(str::to_owned);
        let timestamp = properties.user("ts").map(str::to_owned);
        Self { inbox, seq, id, timestamp, topic, payload, qos, dup }
    }
}

/// What happens to a client, in order.
#[derive(Debug)]
pub enum Event<'a> {
    /// CONNACK success.
    Connected {
        /// Number of this connection: 1, 2, 3 …
        connection: u32,
        /// The server had the session.
        session_present: bool,
    },
    /// SUBACK.
    Subscribed {
        /// Connection number.
        connection: u32,
        /// The filter asked for.
        filter: &'a str,
        /// Granted QoS, or a reason code ≥ 0x80.
        code: u8,
    },
    /// A message is about to be written; again for each resend. Comes before any byte of it leaves.
    Sending {
        /// Connection number.
        connection: u32,
        /// The message.
        message: &'a Message,
    },
    /// A QoS 1 message has its answer.
    Answered {
        /// Connection number.
        connection: u32,
        /// The message.
        message: &'a Message,
        /// Stored or refused.
        outcome: &'a Outcome,
    },
    /// A message came in; it is acknowledged after the observer returns.
    Received {
        /// Connection number.
        connection: u32,
        /// The message.
        delivery: &'a Delivery,
    },
    /// An attempt to connect failed, or a connection ended; `None` = the client itself said good-bye.
    Disconnected {
        /// Connection number, `None` = it never came up.
        connection: Option<u32>,
        /// Why.
        why: Option<&'a ClientError>,
    },
}

/// Is told all that happens to a client, from inside its task: it must not block.
pub trait Observer: Send + Sync + 'static {
    /// Something happened.
    fn observe(&self, event: Event<'_>);
}

/// An observer that looks away.
impl Observer for () {
    fn observe(&self, _: Event<'_>) {}
}

/// What CONNACK said.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// The server had the session.
    pub session_present: bool,
    /// Announced limits and more.
    pub properties: Box<Properties>,
}

/// One MQTT connection. Reading and writing are separate steps, both cancel-safe.
#[derive(Debug)]
pub struct Connection {
    server: SocketAddr,
    version: Version,
    stream: TcpStream,
    read: BytesMut,
    write: BytesMut,
}

impl Connection {
    /// Connects, sends CONNECT and waits for the CONNACK.
    ///
    /// # Errors
    /// [`ClientError`]: `Refused` carries the server's code.
    pub async fn open(options: &Options, clean_start: bool) -> Result<(Self, Welcome), ClientError> {
        timeout(CONNECT_TIMEOUT, Self::open_inner(options, clean_start)).await.unwrap_or(Err(ClientError::Silent))
    }

    async fn open_inner(options: &Options, clean_start: bool) -> Result<(Self, Welcome), ClientError> {
        let server = options.server;
        let stream = Self::dial(server, options.source).await.map_err(|source| ClientError::Io { server, source })?;
        let (read, write) = (BytesMut::new(), BytesMut::new());
        let mut connection = Self { server, version: options.version, stream, read, write };
        let connect = wire::Connect {
            user: &options.user,
            password: options.password.as_deref(),
            client_id: &options.device,
            clean_start,
            keep_alive_seconds: options.keep_alive_seconds,
            session_expiry_seconds: options.session_expiry_seconds,
            receive_maximum: options.receive_maximum,
        };
        wire::encode_connect(options.version, &connect, &mut connection.write);
        connection.flush().await?;
        match connection.next().await? {
            Packet::ConnAck { session_present, code: 0, properties } => {
                Ok((connection, Welcome { session_present, properties }))
            }
            Packet::ConnAck { code, properties, .. } => Err(ClientError::Refused { code, reason: properties.reason }),
            _ => Err(ClientError::Protocol),
        }
    }

    async fn dial(server: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
        let socket = if server.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        if let Some(source) = source {
            socket.bind(SocketAddr::new(source, 0))?;
        }
        let stream = socket.connect(server).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    /// Waits for the next packet, whatever it is.
    ///
    /// # Errors
    /// `Closed`, `Io` or `Wire`; the connection is then of no more use.
    pub async fn next(&mut self) -> Result<Packet, ClientError> {
        loop {
            if let Some(packet) = self.decoded()? {
                return Ok(packet);
            }
            self.read_some().await?;
        }
    }

    /// Bytes to be written by [`Connection::flush`]; tests put what they like here.
    pub fn write_buffer(&mut self) -> &mut BytesMut {
        &mut self.write
    }

    /// Writes all that is buffered.
    ///
    /// # Errors
    /// `Io` when the connection broke.
    pub async fn flush(&mut self) -> Result<(), ClientError> {
        let server = self.server;
        self.stream.write_all_buf(&mut self.write).await.map_err(|source| ClientError::Io { server, source })
    }

    fn decoded(&mut self) -> Result<Option<Packet>, ClientError> {
        Ok(wire::decode(self.version, &mut self.read)?)
    }

    async fn read_some(&mut self) -> Result<(), ClientError> {
        self.read.reserve(2048);
        match self.stream.read_buf(&mut self.read).await {
            Ok(0) => Err(ClientError::Closed),
            Ok(_) => Ok(()),
            Err(source) => Err(ClientError::Io { server: self.server, source }),
        }
    }

    /// Waits until bytes came in, buffered bytes went out, or both; reads only if `read`.
    async fn make_progress(&mut self, read: bool) -> Result<(), ClientError> {
        let server = self.server;
        if self.write.is_empty() {
            return self.read_some().await;
        }
        self.read.reserve(2048);
        let (mut reader, mut writer) = self.stream.split();
        let result = tokio::select! {
            count = writer.write_buf(&mut self.write) => count,
            count = reader.read_buf(&mut self.read), if read => count,
        };
        match result {
            Ok(0) => Err(ClientError::Closed),
            Ok(_) => Ok(()),
            Err(source) => Err(ClientError::Io { server, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn topics_and_numbers_of_both_versions_are_understood() {
        let none = Properties::default();
        let old = Delivery::new(Version::V311, "inbox/g/team/bob/12".to_owned(), 1, false, Bytes::new(), &none);
        assert_eq!(old.seq, Some(12));
        assert_eq!(old.inbox, Inbox::Group { group: "team".to_owned(), from: "bob".to_owned() });
        let properties = Properties { user: vec![("seq".to_owned(), "7".to_owned())], ..none };
        let new = Delivery::new(Version::V5, "inbox/u/bob/alice".to_owned(), 1, false, Bytes::new(), &properties);
        assert_eq!(new.seq, Some(7));
        assert_eq!(new.inbox, Inbox::Person { peer: "bob".to_owned(), from: "alice".to_owned() });
        let mark = Delivery::new(Version::V5, "inbox/read/u/bob".to_owned(), 1, false, Bytes::new(), &properties);
        assert_eq!(mark.inbox, Inbox::Other);
    }
}
