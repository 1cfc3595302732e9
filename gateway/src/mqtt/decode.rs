//! What clients send.

use super::{Reason, Version, property};

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
