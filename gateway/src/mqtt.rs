//! The wire: MQTT 5.0 and 3.1.1 packets in and out.
//!
//! Decoding borrows from the input and allocates nothing for what a chat sends all day; what the two versions say differently is
//! one version-neutral [`Packet`]. Encoding appends to an [`OutBuffer`], in which large payloads are shared, not copied.
//! Written by hand rather than over a codec crate because the refusals matter here: each malformed or forbidden input has the reason
//! code that the specification names, a client with an empty id and Clean Start 0 is legal in MQTT 5, and a half-received frame must not
//! reserve its announced size.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The protocol version of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1 (protocol level 4).
    V311,
    /// MQTT 5.0 (protocol level 5).
    V5,
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $text:literal;)*) => {
        /// MQTT 5 reason codes that this gateway uses.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Reason { $($(#[$doc])* $name = $code,)* }

        impl Reason {
            /// The name in metrics and logs, as in the specification.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

reasons! {
    /// It worked; a normal disconnection.
    Success = 0x00, "success";
    /// UNSUBSCRIBE of what was not subscribed.
    NoSubscriptionExisted = 0x11, "no subscription existed";
    /// Refused for now, for a reason without a code of its own.
    Unspecified = 0x80, "unspecified error";
    /// The bytes are no MQTT packet.
    Malformed = 0x81, "malformed packet";
    /// The packet is not allowed here.
    ProtocolError = 0x82, "protocol error";
    /// Valid, but this server does not do it.
    ImplementationSpecific = 0x83, "implementation specific error";
    /// Neither MQTT 5 nor 3.1.1.
    UnsupportedVersion = 0x84, "unsupported protocol version";
    /// A client id that is no id.
    ClientIdNotValid = 0x85, "client identifier not valid";
    /// A password that does not prove the user.
    BadCredentials = 0x86, "bad user name or password";
    /// Not a member, not allowed, token expired.
    NotAuthorized = 0x87, "not authorized";
    /// No owner, store away, not ready.
    ServerUnavailable = 0x88, "server unavailable";
    /// An outcome that did not come in time.
    ServerBusy = 0x89, "server busy";
    /// Enhanced authentication is not offered.
    BadAuthMethod = 0x8C, "bad authentication method";
    /// Silent for longer than 1.5 times its keep-alive.
    KeepAliveTimeout = 0x8D, "keep alive timeout";
    /// The session lives on in another connection.
    SessionTakenOver = 0x8E, "session taken over";
    /// A topic filter that is not served.
    TopicFilterInvalid = 0x8F, "topic filter invalid";
    /// A topic that is not served.
    TopicNameInvalid = 0x90, "topic name invalid";
    /// A packet id that still waits for its answer.
    PacketIdInUse = 0x91, "packet identifier in use";
    /// More unanswered publishes than announced.
    ReceiveMaximumExceeded = 0x93, "receive maximum exceeded";
    /// No aliases are announced.
    TopicAliasInvalid = 0x94, "topic alias invalid";
    /// Larger than announced.
    PacketTooLarge = 0x95, "packet too large";
    /// A queue is full.
    QuotaExceeded = 0x97, "quota exceeded";
    /// An operator or server ended it.
    AdministrativeAction = 0x98, "administrative action";
    /// A payload that is not what the topic takes.
    PayloadFormatInvalid = 0x99, "payload format invalid";
    /// Retained messages are refused.
    RetainNotSupported = 0x9A, "retain not supported";
    /// QoS 2 is refused.
    QosNotSupported = 0x9B, "qos not supported";
    /// This gateway is emptied; connect again.
    UseAnotherServer = 0x9C, "use another server";
    /// Shared subscriptions are refused.
    SharedSubscriptionsNotSupported = 0x9E, "shared subscriptions not supported";
    /// Too many connects a second.
    ConnectionRateExceeded = 0x9F, "connection rate exceeded";
    /// Subscription identifiers are refused.
    SubscriptionIdsNotSupported = 0xA1, "subscription identifiers not supported";
}

impl Reason {
    /// The byte on the wire.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The nearest CONNACK return code of MQTT 3.1.1.
    pub fn connack_v311(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::UnsupportedVersion => 1,
            Self::ClientIdNotValid => 2,
            Self::BadCredentials | Self::BadAuthMethod => 4,
            Self::NotAuthorized | Self::TopicNameInvalid | Self::RetainNotSupported | Self::QosNotSupported => 5,
            _ => 3,
        }
    }
}

/// Input that ends the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", .reason.name())]
pub struct DecodeError {
    /// What the client is told (MQTT 5).
    pub reason: Reason,
    /// What is wrong.
    pub what: &'static str,
}

fn malformed(what: &'static str) -> DecodeError {
    DecodeError { reason: Reason::Malformed, what }
}

fn protocol(what: &'static str) -> DecodeError {
    DecodeError { reason: Reason::ProtocolError, what }
}

/// A packet from a client.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)] // named after the packets
pub enum Packet<'a> {
    Connect(Box<Connect<'a>>),
    Publish(Publish<'a>),
    PubAck { packet_id: u16 },
    Subscribe(Subscribe<'a>),
    Unsubscribe { packet_id: u16, filters: Vec<&'a str> },
    PingReq,
    Disconnect { reason: u8, session_expiry_s: Option<u32> },
}

/// CONNECT; what MQTT 3.1.1 can't say has MQTT 5's default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect<'a> {
    /// The version that the client speaks.
    pub version: Version,
    /// Clean Start (MQTT 5), Clean Session (3.1.1).
    pub clean_start: bool,
    /// Seconds; 0 = off.
    pub keep_alive_s: u16,
    /// Seconds; `None` in 3.1.1, where Clean Session decides.
    pub session_expiry_s: Option<u32>,
    /// How many unacknowledged publishes the client takes.
    pub receive_maximum: u16,
    /// The largest packet that the client takes, bytes.
    pub packet_size_max: Option<u32>,
    /// Whether reason strings and user properties are welcome on acknowledgements.
    pub problem_information: bool,
    /// The device; may be empty.
    pub client_id: &'a str,
    /// Published when the connection ends abnormally.
    pub will: Option<Will<'a>>,
    /// The user.
    pub username: Option<&'a str>,
    /// His proof.
    pub password: Option<&'a [u8]>,
}

/// The will of a CONNECT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Will<'a> {
    /// Where to.
    pub topic: &'a str,
    /// What.
    pub payload: &'a [u8],
    /// 0 to 2.
    pub qos: u8,
    /// Asked to be retained.
    pub retain: bool,
}

/// PUBLISH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publish<'a> {
    /// Where to; empty if the client used an alias.
    pub topic: &'a str,
    /// What.
    pub payload: &'a [u8],
    /// 0 to 2.
    pub qos: u8,
    /// Perhaps sent before.
    pub dup: bool,
    /// Asked to be retained.
    pub retain: bool,
    /// 0 with QoS 0.
    pub packet_id: u16,
    /// The client used a topic alias.
    pub topic_alias: bool,
    /// The user property `id`.
    pub id: Option<&'a str>,
}

/// SUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe<'a> {
    /// Answered by a SUBACK with this id.
    pub packet_id: u16,
    /// The client gave a subscription identifier.
    pub has_identifier: bool,
    /// Topic filters and the QoS asked for.
    pub filters: Vec<(&'a str, u8)>,
}

/// Decodes the first packet of `input` and says how many bytes it took; `None` if it is not complete.
/// `version` is `None` until the CONNECT, which alone is taken then. `size_max` bounds a whole packet in bytes.
///
/// # Errors
/// The reason for which the connection must end.
pub fn decode(
    version: Option<Version>,
    input: &[u8],
    size_max: usize,
) -> Result<Option<(Packet<'_>, usize)>, DecodeError> {
    let Some(&first) = input.first() else { return Ok(None) };
    let (kind, flags) = (first >> 4, first & 0x0F);
    match (version, kind) {
        (None, 1) | (Some(_), 2..) => {}
        (None, _) => return Err(protocol("the first packet must be CONNECT")),
        (Some(_), 1) => return Err(protocol("a second CONNECT")),
        (Some(_), _) => return Err(malformed("packet type 0")),
    }
    let Some((length, length_bytes)) = variable_length(&input[1..])? else { return Ok(None) };
    let end = 1 + length_bytes + length;
    if end > size_max {
        return Err(DecodeError {
            reason: Reason::PacketTooLarge,
            what: "the packet is larger than the announced maximum",
        });
    }
    let Some(body) = input.get(1 + length_bytes..end) else { return Ok(None) };
    let mut reader = Reader(body);
    let packet = match version {
        None => connect(flags, &mut reader)?,
        Some(version) => packet(version, kind, flags, &mut reader)?,
    };
    if !reader.0.is_empty() {
        return Err(malformed("bytes after the packet's end"));
    }
    Ok(Some((packet, end)))
}

fn variable_length(input: &[u8]) -> Result<Option<(usize, usize)>, DecodeError> {
    let mut value = 0;
    for (index, byte) in input.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            if index > 0 && *byte == 0 {
                return Err(malformed("a variable byte integer that is longer than needed"));
            }
            return Ok(Some((value, index + 1)));
        }
    }
    if input.len() >= 4 { Err(malformed("a variable byte integer of more than four bytes")) } else { Ok(None) }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], DecodeError> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(malformed("the packet ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn variable(&mut self) -> Result<usize, DecodeError> {
        let (value, length) = variable_length(self.0)?.ok_or(malformed("the packet ends too early"))?;
        self.0 = &self.0[length..];
        Ok(value)
    }

    fn binary(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = self.u16()?;
        self.take(length.into())
    }

    fn string(&mut self) -> Result<&'a str, DecodeError> {
        let text = std::str::from_utf8(self.binary()?).map_err(|_| malformed("a string that is not UTF-8"))?;
        if text.contains('\0') { Err(malformed("a string with U+0000")) } else { Ok(text) }
    }

    fn packet_id(&mut self) -> Result<u16, DecodeError> {
        match self.u16()? {
            0 => Err(protocol("packet identifier 0")),
            id => Ok(id),
        }
    }

    fn properties(&mut self, allowed: u64) -> Result<Properties<'a>, DecodeError> {
        let length = self.variable()?;
        Ok(Properties { reader: Reader(self.take(length)?), allowed, seen: 0 })
    }

    /// Checks properties that nobody here needs.
    fn skip_properties(&mut self, allowed: u64) -> Result<(), DecodeError> {
        let mut properties = self.properties(allowed)?;
        while properties.next()?.is_some() {}
        Ok(())
    }
}

/// Property identifiers (MQTT 5, 2.2.2.2).
mod property {
    pub const SESSION_EXPIRY: u8 = 0x11;
    pub const ASSIGNED_CLIENT_ID: u8 = 0x12;
    pub const SERVER_KEEP_ALIVE: u8 = 0x13;
    pub const AUTH_METHOD: u8 = 0x15;
    pub const PROBLEM_INFORMATION: u8 = 0x17;
    pub const REASON_STRING: u8 = 0x1F;
    pub const RECEIVE_MAXIMUM: u8 = 0x21;
    pub const TOPIC_ALIAS: u8 = 0x23;
    pub const MAXIMUM_QOS: u8 = 0x24;
    pub const RETAIN_AVAILABLE: u8 = 0x25;
    pub const USER: u8 = 0x26;
    pub const PACKET_SIZE_MAX: u8 = 0x27;
    pub const SUBSCRIPTION_ID: u8 = 0x0B;
    pub const SUBSCRIPTION_ID_AVAILABLE: u8 = 0x29;
    pub const SHARED_AVAILABLE: u8 = 0x2A;

    const fn set(ids: &[u8]) -> u64 {
        let mut bits = 0;
        let mut index = 0;
        while index < ids.len() {
            bits |= 1 << ids[index];
            index += 1;
        }
        bits
    }

    pub const IN_CONNECT: u64 = set(&[0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x26, 0x27]);
    pub const IN_WILL: u64 = set(&[0x01, 0x02, 0x03, 0x08, 0x09, 0x18, 0x26]);
    pub const IN_PUBLISH: u64 = set(&[0x01, 0x02, 0x03, 0x08, 0x09, 0x23, 0x26]);
    pub const IN_PUBACK: u64 = set(&[0x1F, 0x26]);
    pub const IN_SUBSCRIBE: u64 = set(&[0x0B, 0x26]);
    pub const IN_UNSUBSCRIBE: u64 = set(&[0x26]);
    pub const IN_DISCONNECT: u64 = set(&[0x11, 0x1F, 0x26]);
}

enum Value<'a> {
    Number(u32),
    Text,
    Pair(&'a str, &'a str),
    Binary,
}

struct Properties<'a> {
    reader: Reader<'a>,
    allowed: u64,
    seen: u64,
}

impl<'a> Properties<'a> {
    fn next(&mut self) -> Result<Option<(u8, Value<'a>)>, DecodeError> {
        if self.reader.0.is_empty() {
            return Ok(None);
        }
        let id = self.reader.u8()?;
        let bit = 1_u64.checked_shl(id.into()).unwrap_or(0);
        if bit & self.allowed == 0 {
            return Err(malformed("a property that this packet can't have"));
        }
        if bit & self.seen != 0 && id != property::USER {
            return Err(protocol("a property that is given twice"));
        }
        self.seen |= bit;
        let value = match id {
            0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28..=0x2A => match self.reader.u8()? {
                value @ 0..=1 => Value::Number(value.into()),
                _ => return Err(protocol("a flag property that is neither 0 nor 1")),
            },
            0x13 | 0x21..=0x23 => Value::Number(self.reader.u16()?.into()),
            0x02 | 0x11 | 0x18 | 0x27 => Value::Number(self.reader.u32()?),
            0x0B => Value::Number(self.reader.variable()? as u32),
            0x09 | 0x16 => {
                self.reader.binary()?;
                Value::Binary
            }
            0x26 => Value::Pair(self.reader.string()?, self.reader.string()?),
            _ => {
                self.reader.string()?;
                Value::Text
            }
        };
        Ok(Some((id, value)))
    }
}

fn connect<'a>(header_flags: u8, reader: &mut Reader<'a>) -> Result<Packet<'a>, DecodeError> {
    if header_flags != 0 {
        return Err(malformed("reserved flags"));
    }
    let unsupported = DecodeError { reason: Reason::UnsupportedVersion, what: "only MQTT 5.0 and 3.1.1 are served" };
    let protocol_name = reader.string()?;
    let version = match (protocol_name, reader.u8()?) {
        ("MQTT", 4) => Version::V311,
        ("MQTT", 5) => Version::V5,
        _ => return Err(unsupported),
    };
    let flags = reader.u8()?;
    let has = |bit: u8| flags & bit != 0;
    let will_qos = flags >> 3 & 3;
    if has(0x01) || will_qos == 3 || !has(0x04) && (will_qos != 0 || has(0x20)) {
        return Err(malformed("connect flags"));
    }
    if version == Version::V311 && has(0x40) && !has(0x80) {
        return Err(malformed("a password without a user name"));
    }
    let mut connect = Connect {
        version,
        clean_start: has(0x02),
        keep_alive_s: reader.u16()?,
        session_expiry_s: None,
        receive_maximum: u16::MAX,
        packet_size_max: None,
        problem_information: true,
        client_id: "",
        will: None,
        username: None,
        password: None,
    };
    if version == Version::V5 {
        connect.session_expiry_s = Some(0);
        let mut properties = reader.properties(property::IN_CONNECT)?;
        while let Some(next) = properties.next()? {
            match next {
                (property::SESSION_EXPIRY, Value::Number(seconds)) => connect.session_expiry_s = Some(seconds),
                (property::RECEIVE_MAXIMUM | property::PACKET_SIZE_MAX, Value::Number(0)) => {
                    return Err(protocol("a maximum of 0"));
                }
                (property::RECEIVE_MAXIMUM, Value::Number(maximum)) => connect.receive_maximum = maximum as u16,
                (property::PACKET_SIZE_MAX, Value::Number(maximum)) => connect.packet_size_max = Some(maximum),
                (property::PROBLEM_INFORMATION, Value::Number(flag)) => connect.problem_information = flag == 1,
                (property::AUTH_METHOD, Value::Text) => {
                    let what = "enhanced authentication is not offered: put the token into the password";
                    return Err(DecodeError { reason: Reason::BadAuthMethod, what });
                }
                _ => {}
            }
        }
    }
    connect.client_id = reader.string()?;
    if has(0x04) {
        if version == Version::V5 {
            reader.skip_properties(property::IN_WILL)?;
        }
        let (topic, payload) = (reader.string()?, reader.binary()?);
        connect.will = Some(Will { topic, payload, qos: will_qos, retain: has(0x20) });
    }
    if has(0x80) {
        connect.username = Some(reader.string()?);
    }
    if has(0x40) {
        connect.password = Some(reader.binary()?);
    }
    Ok(Packet::Connect(Box::new(connect)))
}

fn packet<'a>(version: Version, kind: u8, flags: u8, reader: &mut Reader<'a>) -> Result<Packet<'a>, DecodeError> {
    let v5 = version == Version::V5;
    if kind != 3 && flags != if matches!(kind, 6 | 8 | 10) { 2 } else { 0 } {
        return Err(malformed("reserved flags"));
    }
    match kind {
        3 => publish(v5, flags, reader).map(Packet::Publish),
        4 => {
            let packet_id = reader.packet_id()?;
            if v5 && !reader.0.is_empty() {
                reader.u8()?;
                if !reader.0.is_empty() {
                    reader.skip_properties(property::IN_PUBACK)?;
                }
            }
            Ok(Packet::PubAck { packet_id })
        }
        8 => {
            let packet_id = reader.packet_id()?;
            let mut has_identifier = false;
            if v5 {
                let mut properties = reader.properties(property::IN_SUBSCRIBE)?;
                while let Some((id, value)) = properties.next()? {
                    match (id, value) {
                        (property::SUBSCRIPTION_ID, Value::Number(0)) => {
                            return Err(protocol("subscription identifier 0"));
                        }
                        (property::SUBSCRIPTION_ID, _) => has_identifier = true,
                        _ => {}
                    }
                }
            }
            let mut filters = Vec::new();
            while !reader.0.is_empty() {
                let (filter, options) = (reader.string()?, reader.u8()?);
                let reserved = if v5 { 0xC0 } else { 0xFC };
                if options & 3 == 3 || options & reserved != 0 || options & 0x30 == 0x30 {
                    return Err(malformed("subscription options"));
                }
                filters.push((filter, options & 3));
            }
            if filters.is_empty() {
                return Err(protocol("SUBSCRIBE without a topic filter"));
            }
            Ok(Packet::Subscribe(Subscribe { packet_id, has_identifier, filters }))
        }
        10 => {
            let packet_id = reader.packet_id()?;
            if v5 {
                reader.skip_properties(property::IN_UNSUBSCRIBE)?;
            }
            let mut filters = Vec::new();
            while !reader.0.is_empty() {
                filters.push(reader.string()?);
            }
            if filters.is_empty() {
                return Err(protocol("UNSUBSCRIBE without a topic filter"));
            }
            Ok(Packet::Unsubscribe { packet_id, filters })
        }
        12 => Ok(Packet::PingReq),
        14 => {
            let mut disconnect = (0, None);
            if v5 && !reader.0.is_empty() {
                disconnect.0 = reader.u8()?;
                if !reader.0.is_empty() {
                    let mut properties = reader.properties(property::IN_DISCONNECT)?;
                    while let Some(next) = properties.next()? {
                        if let (property::SESSION_EXPIRY, Value::Number(seconds)) = next {
                            disconnect.1 = Some(seconds);
                        }
                    }
                }
            }
            Ok(Packet::Disconnect { reason: disconnect.0, session_expiry_s: disconnect.1 })
        }
        _ => Err(protocol("a packet that clients of this server don't send")),
    }
}

fn publish<'a>(v5: bool, flags: u8, reader: &mut Reader<'a>) -> Result<Publish<'a>, DecodeError> {
    let qos = flags >> 1 & 3;
    let dup = flags & 8 != 0;
    if qos == 3 || qos == 0 && dup {
        return Err(malformed("publish flags"));
    }
    let topic = reader.string()?;
    let packet_id = if qos == 0 { 0 } else { reader.packet_id()? };
    let (mut topic_alias, mut id) = (false, None);
    if v5 {
        let mut properties = reader.properties(property::IN_PUBLISH)?;
        while let Some(next) = properties.next()? {
            match next {
                (property::TOPIC_ALIAS, _) => topic_alias = true,
                (property::USER, Value::Pair("id", value)) => id = Some(value),
                _ => {}
            }
        }
    }
    if topic.is_empty() && !topic_alias {
        return Err(protocol("PUBLISH without a topic"));
    }
    let payload = std::mem::take(&mut reader.0);
    Ok(Publish { topic, payload, qos, dup, retain: flags & 1 != 0, packet_id, topic_alias, id })
}

// ---- out --------------------------------------------------------------------------------------------------------------

/// From this size on a payload is shared with other connections rather than copied.
const SHARED_BYTES_MIN: usize = 1_024;

/// What waits to be written to a client: small packets side by side in one buffer, large payloads as they are. Nothing is allocated
/// while it is empty.
#[derive(Debug, Default)]
pub struct OutBuffer {
    full: VecDeque<Bytes>,
    open: BytesMut,
    length: usize,
}

impl OutBuffer {
    /// Pieces for one vectored write.
    pub const SLICES: usize = 16;

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends encoded bytes.
    pub fn put(&mut self, bytes: &Bytes) {
        if bytes.len() < SHARED_BYTES_MIN {
            self.put_slice(bytes);
        } else {
            self.seal();
            self.length += bytes.len();
            self.full.push_back(bytes.clone());
        }
    }

    fn put_slice(&mut self, bytes: &[u8]) {
        self.open.extend_from_slice(bytes);
        self.length += bytes.len();
    }

    fn seal(&mut self) {
        if !self.open.is_empty() {
            self.full.push_back(std::mem::take(&mut self.open).freeze());
        }
    }

    /// Fills `slices` for one vectored write and says how many there are.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let open = Some(&self.open[..]).filter(|open| !open.is_empty());
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(self.full.iter().map(|bytes| &bytes[..]).chain(open)) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        count
    }

    /// Forgets the first `written` bytes.
    pub fn advance(&mut self, mut written: usize) {
        self.length = self.length.saturating_sub(written);
        while let Some(front) = self.full.front_mut() {
            if written < front.len() {
                front.advance(written);
                return;
            }
            written -= front.len();
            self.full.pop_front();
        }
        self.open.advance(written.min(self.open.len()));
    }

    /// All that waits, in one piece.
    pub fn take_bytes(&mut self) -> Bytes {
        self.length = 0;
        if self.full.is_empty() {
            return std::mem::take(&mut self.open).freeze();
        }
        self.seal();
        let mut all = BytesMut::with_capacity(self.full.iter().map(Bytes::len).sum());
        for bytes in self.full.drain(..) {
            all.extend_from_slice(&bytes);
        }
        all.freeze()
    }

    fn header(&mut self, first: u8, length: usize) {
        let before = self.open.len();
        self.open.reserve(length.min(SHARED_BYTES_MIN) + 5);
        self.open.put_u8(first);
        put_variable(&mut self.open, length);
        self.length += self.open.len() - before;
    }

    fn packet(&mut self, first: u8, body: &[u8]) {
        self.header(first, body.len());
        self.put_slice(body);
    }
}

fn put_variable(out: &mut BytesMut, mut value: usize) {
    loop {
        let byte = (value & 0x7F) as u8;
        value >>= 7;
        if value == 0 {
            return out.put_u8(byte);
        }
        out.put_u8(byte | 0x80);
    }
}

fn variable_size(value: usize) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        _ => 4,
    }
}

/// Strings that we send are ids, numbers and texts of ours: cut to what the format can hold rather than refused.
fn put_string(out: &mut BytesMut, text: &str) {
    let text = &text.as_bytes()[..text.len().min(usize::from(u16::MAX))];
    out.put_u16(text.len() as u16);
    out.put_slice(text);
}

fn put_properties(out: &mut BytesMut, properties: &[u8]) {
    put_variable(out, properties.len());
    out.put_slice(properties);
}

/// A reason string and user properties.
fn explained(reason_string: &str, user: &[(&str, &str)]) -> BytesMut {
    let mut properties = BytesMut::new();
    if !reason_string.is_empty() {
        properties.put_u8(property::REASON_STRING);
        put_string(&mut properties, reason_string);
    }
    for (name, value) in user {
        properties.put_u8(property::USER);
        put_string(&mut properties, name);
        put_string(&mut properties, value);
    }
    properties
}

/// What a successful CONNACK announces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Welcome<'a> {
    /// A session row existed.
    pub session_present: bool,
    /// What is granted of the expiry asked for, seconds.
    pub session_expiry_s: u32,
    /// Unanswered publishes that the client may have.
    pub receive_maximum: u16,
    /// The largest packet that is taken, bytes.
    pub packet_size_max: u32,
    /// The device id that was assigned to a client without one.
    pub assigned_client_id: Option<&'a str>,
    /// Set when the keep-alive asked for is not granted, seconds.
    pub server_keep_alive_s: Option<u16>,
}

/// CONNACK of a client that is in.
pub fn connack(out: &mut OutBuffer, version: Version, welcome: &Welcome<'_>) {
    let mut body = BytesMut::with_capacity(128);
    body.put_u8(welcome.session_present.into());
    body.put_u8(Reason::Success.code());
    if version == Version::V5 {
        let mut properties = BytesMut::with_capacity(96);
        properties.put_u8(property::SESSION_EXPIRY);
        properties.put_u32(welcome.session_expiry_s);
        properties.put_u8(property::RECEIVE_MAXIMUM);
        properties.put_u16(welcome.receive_maximum);
        properties.put_u8(property::PACKET_SIZE_MAX);
        properties.put_u32(welcome.packet_size_max);
        for (flag, value) in [
            (property::MAXIMUM_QOS, 1),
            (property::RETAIN_AVAILABLE, 0),
            (property::SUBSCRIPTION_ID_AVAILABLE, 0),
            (property::SHARED_AVAILABLE, 0),
        ] {
            properties.put_u8(flag);
            properties.put_u8(value);
        }
        if let Some(id) = welcome.assigned_client_id {
            properties.put_u8(property::ASSIGNED_CLIENT_ID);
            put_string(&mut properties, id);
        }
        if let Some(seconds) = welcome.server_keep_alive_s {
            properties.put_u8(property::SERVER_KEEP_ALIVE);
            properties.put_u16(seconds);
        }
        put_properties(&mut body, &properties);
    }
    out.packet(0x20, &body);
}

/// CONNACK of a client that stays out; the connection ends after it.
pub fn connack_refused(out: &mut OutBuffer, version: Version, reason: Reason, reason_string: &str) {
    let mut body = BytesMut::new();
    body.put_u8(0);
    match version {
        Version::V311 => body.put_u8(reason.connack_v311()),
        Version::V5 => {
            body.put_u8(reason.code());
            put_properties(&mut body, &explained(reason_string, &[]));
        }
    }
    out.packet(0x20, &body);
}

/// PUBACK. MQTT 3.1.1 knows success only.
pub fn puback(
    out: &mut OutBuffer,
    version: Version,
    packet_id: u16,
    reason: Reason,
    reason_string: &str,
    user: &[(&str, &str)],
) {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    let properties = explained(reason_string, user);
    if version == Version::V5 && (reason != Reason::Success || !properties.is_empty()) {
        body.put_u8(reason.code());
        if !properties.is_empty() {
            put_properties(&mut body, &properties);
        }
    }
    out.packet(0x40, &body);
}

/// SUBACK with one code per filter; what is not granted is 0x80 in MQTT 3.1.1.
pub fn suback(out: &mut OutBuffer, version: Version, packet_id: u16, codes: &[u8], reason_string: &str) {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if version == Version::V5 {
        put_properties(&mut body, &explained(reason_string, &[]));
        body.put_slice(codes);
    } else {
        body.extend(codes.iter().map(|code| if *code >= 0x80 { 0x80 } else { *code }));
    }
    out.packet(0x90, &body);
}

/// UNSUBACK with one code per filter (MQTT 5).
pub fn unsuback(out: &mut OutBuffer, version: Version, packet_id: u16, codes: &[u8]) {
    let mut body = BytesMut::new();
    body.put_u16(packet_id);
    if version == Version::V5 {
        body.put_u8(0);
        body.put_slice(codes);
    }
    out.packet(0xB0, &body);
}

/// PINGRESP.
pub fn pingresp(out: &mut OutBuffer) {
    out.packet(0xD0, &[]);
}

/// DISCONNECT; in MQTT 3.1.1, where servers have none, nothing.
pub fn disconnect(out: &mut OutBuffer, version: Version, reason: Reason, reason_string: &str) {
    if version == Version::V5 {
        let mut body = BytesMut::new();
        body.put_u8(reason.code());
        put_properties(&mut body, &explained(reason_string, &[]));
        out.packet(0xE0, &body);
    }
}

/// A PUBLISH to a client. The payload is shared between all who get it.
#[derive(Debug, Clone, Copy)]
pub struct Delivery<'a> {
    /// The topic in pieces that are joined by `/`.
    pub topic: &'a [&'a str],
    /// 0 = QoS 0.
    pub packet_id: u16,
    /// Left out in MQTT 3.1.1.
    pub user_properties: &'a [(&'a str, &'a str)],
    /// What.
    pub payload: &'a Bytes,
}

impl Delivery<'_> {
    fn topic_size(&self) -> usize {
        self.topic.iter().map(|piece| piece.len() + 1).sum::<usize>().saturating_sub(1)
    }

    fn properties_size(&self) -> usize {
        self.user_properties.iter().map(|(name, value)| 5 + name.len() + value.len()).sum()
    }

    fn body_size(&self, version: Version) -> usize {
        let packet_id = if self.packet_id == 0 { 0 } else { 2 };
        let properties = match version {
            Version::V311 => 0,
            Version::V5 => variable_size(self.properties_size()) + self.properties_size(),
        };
        2 + self.topic_size() + packet_id + properties + self.payload.len()
    }

    /// The whole packet's size, bytes.
    pub fn size(&self, version: Version) -> usize {
        let body = self.body_size(version);
        1 + variable_size(body) + body
    }

    /// Appends the packet.
    pub fn encode(&self, out: &mut OutBuffer, version: Version) {
        out.header(if self.packet_id == 0 { 0x30 } else { 0x32 }, self.body_size(version));
        let before = out.open.len();
        out.open.put_u16(self.topic_size() as u16);
        for (index, piece) in self.topic.iter().enumerate() {
            if index > 0 {
                out.open.put_u8(b'/');
            }
            out.open.put_slice(piece.as_bytes());
        }
        if self.packet_id != 0 {
            out.open.put_u16(self.packet_id);
        }
        if version == Version::V5 {
            put_variable(&mut out.open, self.properties_size());
            for (name, value) in self.user_properties {
                out.open.put_u8(property::USER);
                put_string(&mut out.open, name);
                put_string(&mut out.open, value);
            }
        }
        out.length += out.open.len() - before;
        out.put(self.payload);
    }
}
