//! The few MQTT packets that a chat client speaks, as bytes: encode what a client sends, decode what a server sends.
//!
//! This is written apart from the codec that the gateway uses on purpose: a mistake in that codec must not cancel itself
//! out in the tests. Sections in brackets are those of the OASIS standards MQTT 5.0 and MQTT 3.1.1.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

/// Largest packet (bytes after the fixed header) that the client accepts; more is taken for a broken stream.
pub const PACKET_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The protocol version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// MQTT 3.1.1 (protocol level 4): no properties, no reason codes.
    V311,
    /// MQTT 5.0 (protocol level 5).
    V5,
}

/// Bytes from the server that are not MQTT; the connection can only be closed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum WireError {
    /// A packet is longer than [`PACKET_BYTES_MAX`], or its length field is not a valid variable byte integer.
    #[error("the server sent a packet of an impossible length; is this address an MQTT listener?")]
    Length,
    /// A packet ends before its fields do.
    #[error("the server sent a truncated {packet} packet")]
    Truncated {
        /// Name of the packet or field.
        packet: &'static str,
    },
    /// A text is not UTF-8.
    #[error("the server sent a text that is not UTF-8")]
    Text,
    /// A packet type that a server never sends.
    #[error("the server sent a packet with the unexpected first byte {0:#04x}")]
    Unexpected(u8),
    /// A property identifier that the standard does not know [5.0, 2.2.2.2].
    #[error("the server sent the unknown property {0:#04x}")]
    Property(u32),
}

/// What a client says of itself in CONNECT.
#[derive(Clone, Debug)]
pub struct Connect<'a> {
    /// User name, the user's id.
    pub user: &'a str,
    /// Password: the JWT; without one the flag is not set.
    pub password: Option<&'a str>,
    /// Client id, the device.
    pub client_id: &'a str,
    /// Clean Start (5) or Clean Session (3.1.1).
    pub clean_start: bool,
    /// Keep-alive in seconds, 0 = none.
    pub keep_alive_seconds: u16,
    /// Session Expiry Interval in seconds; 3.1.1 has none.
    pub session_expiry_seconds: u32,
    /// Receive Maximum; 3.1.1 has none.
    pub receive_maximum: Option<u16>,
}

/// What a client publishes.
#[derive(Clone, Debug)]
pub struct Publish<'a> {
    /// Topic name.
    pub topic: &'a str,
    /// Application message.
    pub payload: &'a [u8],
    /// Quality of service 0, 1 or 2.
    pub qos: u8,
    /// Retain flag.
    pub retain: bool,
    /// DUP flag: the packet was sent before.
    pub dup: bool,
    /// Packet identifier, ignored with QoS 0.
    pub packet_id: u16,
    /// User property `id` (5.0 only).
    pub id: Option<&'a str>,
}

/// The properties of a server's packet that a client looks at; all others are checked and skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Properties {
    /// User properties in order of appearance.
    pub user: Vec<(String, String)>,
    /// Reason String.
    pub reason: Option<String>,
    /// Server Reference.
    pub server_reference: Option<String>,
    /// Assigned Client Identifier.
    pub assigned_client_id: Option<String>,
    /// Session Expiry Interval in seconds.
    pub session_expiry_seconds: Option<u32>,
    /// Receive Maximum.
    pub receive_maximum: Option<u16>,
    /// Maximum Packet Size in bytes.
    pub maximum_packet_bytes: Option<u32>,
    /// Server Keep Alive in seconds.
    pub server_keep_alive_seconds: Option<u16>,
    /// Maximum QoS.
    pub maximum_qos: Option<u8>,
    /// Retain Available.
    pub retain_available: Option<bool>,
}

impl Properties {
    /// The value of the first user property called `name`.
    pub fn user(&self, name: &str) -> Option<&str> {
        self.user.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// A packet from a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Packet {
    /// Answer to CONNECT.
    ConnAck {
        /// The server had the session.
        session_present: bool,
        /// 0, or why not (the return code in 3.1.1).
        code: u8,
        /// Announced limits and more.
        properties: Box<Properties>,
    },
    /// A message.
    Publish {
        /// Topic name.
        topic: String,
        /// Quality of service.
        qos: u8,
        /// DUP flag.
        dup: bool,
        /// Retain flag.
        retain: bool,
        /// Packet identifier, absent with QoS 0.
        packet_id: Option<u16>,
        /// Application message.
        payload: Bytes,
        /// `seq`, `id`, `ts` are user properties.
        properties: Box<Properties>,
    },
    /// Answer to a QoS 1 PUBLISH, and PUBREC as the (refusing) answer to QoS 2.
    PubAck {
        /// Packet identifier.
        packet_id: u16,
        /// Reason code, 0 in 3.1.1.
        code: u8,
        /// `seq` and `ts` are user properties.
        properties: Box<Properties>,
    },
    /// Answer to SUBSCRIBE.
    SubAck {
        /// Packet identifier.
        packet_id: u16,
        /// One reason code for each filter.
        codes: Vec<u8>,
    },
    /// Answer to UNSUBSCRIBE.
    UnsubAck {
        /// Packet identifier.
        packet_id: u16,
        /// One reason code for each filter; none in 3.1.1.
        codes: Vec<u8>,
    },
    /// Answer to PINGREQ.
    Pong,
    /// The server ends the connection (5.0 only).
    Disconnect {
        /// Reason code.
        code: u8,
        /// Reason String, Server Reference.
        properties: Box<Properties>,
    },
}

/// Appends a CONNECT packet [5.0, 3.1; 3.1.1, 3.1].
pub fn encode_connect(version: Version, connect: &Connect<'_>, out: &mut BytesMut) {
    frame(out, 0x10, |body| {
        put_text(body, "MQTT");
        body.put_u8(if version == Version::V5 { 5 } else { 4 });
        let password = if connect.password.is_some() { 0x40 } else { 0 };
        let clean = if connect.clean_start { 0x02 } else { 0 };
        body.put_u8(0x80 | password | clean);
        body.put_u16(connect.keep_alive_seconds);
        if version == Version::V5 {
            let mut properties = BytesMut::new();
            if connect.session_expiry_seconds > 0 {
                properties.put_u8(0x11);
                properties.put_u32(connect.session_expiry_seconds);
            }
            if let Some(maximum) = connect.receive_maximum {
                properties.put_u8(0x21);
                properties.put_u16(maximum);
            }
            put_length(body, properties.len());
            body.put_slice(&properties);
        }
        put_text(body, connect.client_id);
        put_text(body, connect.user);
        if let Some(password) = connect.password {
            put_text(body, password);
        }
    });
}

/// Appends a PUBLISH packet [3.3].
pub fn encode_publish(version: Version, publish: &Publish<'_>, out: &mut BytesMut) {
    let flags = (u8::from(publish.dup) << 3) | (publish.qos << 1) | u8::from(publish.retain);
    frame(out, 0x30 | flags, |body| {
        put_text(body, publish.topic);
        if publish.qos > 0 {
            body.put_u16(publish.packet_id);
        }
        if version == Version::V5 {
            match publish.id {
                Some(id) => {
                    put_length(body, 1 + 2 + 2 + 2 + id.len());
                    body.put_u8(0x26);
                    put_text(body, "id");
                    put_text(body, id);
                }
                None => body.put_u8(0),
            }
        }
        body.put_slice(publish.payload);
    });
}

/// Appends a PUBACK packet with reason code success [3.4].
pub fn encode_puback(packet_id: u16, out: &mut BytesMut) {
    out.put_u8(0x40);
    out.put_u8(2);
    out.put_u16(packet_id);
}

/// Appends a SUBSCRIBE packet for one filter [3.8].
pub fn encode_subscribe(version: Version, packet_id: u16, filter: &str, qos: u8, out: &mut BytesMut) {
    frame(out, 0x82, |body| {
        body.put_u16(packet_id);
        if version == Version::V5 {
            body.put_u8(0);
        }
        put_text(body, filter);
        body.put_u8(qos);
    });
}

/// Appends an UNSUBSCRIBE packet for one filter [3.10].
pub fn encode_unsubscribe(version: Version, packet_id: u16, filter: &str, out: &mut BytesMut) {
    frame(out, 0xA2, |body| {
        body.put_u16(packet_id);
        if version == Version::V5 {
            body.put_u8(0);
        }
        put_text(body, filter);
    });
}

/// Appends a PINGREQ packet [3.12].
pub fn encode_ping(out: &mut BytesMut) {
    out.put_slice(&[0xC0, 0]);
}

/// Appends a DISCONNECT packet, normal disconnection [3.14].
pub fn encode_disconnect(out: &mut BytesMut) {
    out.put_slice(&[0xE0, 0]);
}

/// Takes the next whole packet out of `buffer`; `None` = more bytes are needed.
///
/// # Errors
/// [`WireError`] when the bytes are not what a server may send; the stream is then unusable.
pub fn decode(version: Version, buffer: &mut BytesMut) -> Result<Option<Packet>, WireError> {
    let Some(first) = buffer.first().copied() else { return Ok(None) };
    let Some((length, length_bytes)) = peek_length(&buffer[1..])? else { return Ok(None) };
    if length > PACKET_BYTES_MAX {
        return Err(WireError::Length);
    }
    let whole = 1 + length_bytes + length;
    if buffer.len() < whole {
        buffer.reserve(whole - buffer.len());
        return Ok(None);
    }
    let mut body = buffer.split_to(whole).freeze();
    body.advance(1 + length_bytes);
    decode_body(version, first, body).map(Some)
}

fn decode_body(version: Version, first: u8, mut body: Bytes) -> Result<Packet, WireError> {
    let v5 = version == Version::V5;
    match first {
        0x20 => {
            let flags = get_u8(&mut body, "CONNACK")?;
            let code = get_u8(&mut body, "CONNACK")?;
            let properties = get_properties(v5, &mut body)?;
            Ok(Packet::ConnAck { session_present: flags & 1 == 1, code, properties })
        }
        0x30..=0x3F => {
            let qos = (first >> 1) & 3;
            let topic = get_text(&mut body)?;
            let packet_id = if qos > 0 { Some(get_u16(&mut body, "PUBLISH")?) } else { None };
            let properties = get_properties(v5, &mut body)?;
            let (dup, retain) = (first & 8 != 0, first & 1 != 0);
            Ok(Packet::Publish { topic, qos, dup, retain, packet_id, payload: body, properties })
        }
        0x40 | 0x50 => {
            let packet_id = get_u16(&mut body, "PUBACK")?;
            let code = if body.has_remaining() { get_u8(&mut body, "PUBACK")? } else { 0 };
            let properties = get_properties(v5, &mut body)?;
            Ok(Packet::PubAck { packet_id, code, properties })
        }
        0x90 | 0xB0 => {
            let packet_id = get_u16(&mut body, "SUBACK")?;
            get_properties(v5, &mut body)?;
            let codes = body.to_vec();
            Ok(if first == 0x90 { Packet::SubAck { packet_id, codes } } else { Packet::UnsubAck { packet_id, codes } })
        }
        0xD0 => Ok(Packet::Pong),
        0xE0 if v5 => {
            let code = if body.has_remaining() { get_u8(&mut body, "DISCONNECT")? } else { 0 };
            Ok(Packet::Disconnect { code, properties: get_properties(v5, &mut body)? })
        }
        other => Err(WireError::Unexpected(other)),
    }
}

/// Reads the property section; packets that may leave it out simply end before it.
fn get_properties(v5: bool, body: &mut Bytes) -> Result<Box<Properties>, WireError> {
    let mut properties = Box::<Properties>::default();
    if !v5 || !body.has_remaining() {
        return Ok(properties);
    }
    let length = get_length(body)?;
    if body.len() < length {
        return Err(WireError::Truncated { packet: "properties" });
    }
    let mut section = body.split_to(length);
    while section.has_remaining() {
        let identifier = get_length(&mut section)?;
        match identifier {
            0x11 => properties.session_expiry_seconds = Some(get_u32(&mut section)?),
            0x12 => properties.assigned_client_id = Some(get_text(&mut section)?),
            0x13 => properties.server_keep_alive_seconds = Some(get_u16(&mut section, "properties")?),
            0x1C => properties.server_reference = Some(get_text(&mut section)?),
            0x1F => properties.reason = Some(get_text(&mut section)?),
            0x21 => properties.receive_maximum = Some(get_u16(&mut section, "properties")?),
            0x24 => properties.maximum_qos = Some(get_u8(&mut section, "properties")?),
            0x25 => properties.retain_available = Some(get_u8(&mut section, "properties")? != 0),
            0x26 => properties.user.push((get_text(&mut section)?, get_text(&mut section)?)),
            0x27 => properties.maximum_packet_bytes = Some(get_u32(&mut section)?),
            // Known to the standard, of no use to this client: one byte, two, four, text or binary, variable.
            0x01 | 0x17 | 0x19 | 0x28 | 0x29 | 0x2A => drop(get_u8(&mut section, "properties")?),
            0x22 | 0x23 => drop(get_u16(&mut section, "properties")?),
            0x02 | 0x18 => drop(get_u32(&mut section)?),
            0x03 | 0x08 | 0x09 | 0x15 | 0x16 | 0x1A => drop(get_block(&mut section)?),
            0x0B => drop(get_length(&mut section)?),
            unknown => return Err(WireError::Property(u32::try_from(unknown).unwrap_or(u32::MAX))),
        }
    }
    Ok(properties)
}

fn frame(out: &mut BytesMut, first: u8, fill: impl FnOnce(&mut BytesMut)) {
    let mut body = BytesMut::with_capacity(128);
    fill(&mut body);
    out.reserve(5 + body.len());
    out.put_u8(first);
    put_length(out, body.len());
    out.put_slice(&body);
}

/// Variable byte integer [5.0, 1.5.5].
fn put_length(out: &mut BytesMut, mut length: usize) {
    loop {
        let byte = (length & 0x7F) as u8;
        length >>= 7;
        out.put_u8(if length > 0 { byte | 0x80 } else { byte });
        if length == 0 {
            return;
        }
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    // A text longer than its length field can only come from a caller's mistake; cut, the server then refuses it.
    let bytes = &text.as_bytes()[..text.len().min(usize::from(u16::MAX))];
    out.put_u16(u16::try_from(bytes.len()).unwrap_or(u16::MAX));
    out.put_slice(bytes);
}

/// A variable byte integer at the start of `bytes`: its value and how many bytes it took.
fn peek_length(bytes: &[u8]) -> Result<Option<(usize, usize)>, WireError> {
    let mut value = 0usize;
    for (index, byte) in bytes.iter().enumerate().take(4) {
        value |= usize::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= 4 { Err(WireError::Length) } else { Ok(None) }
}

fn get_length(bytes: &mut Bytes) -> Result<usize, WireError> {
    let (value, taken) = peek_length(bytes)?.ok_or(WireError::Truncated { packet: "length" })?;
    bytes.advance(taken);
    Ok(value)
}

fn get_u8(bytes: &mut Bytes, packet: &'static str) -> Result<u8, WireError> {
    bytes.try_get_u8().map_err(|_| WireError::Truncated { packet })
}

fn get_u16(bytes: &mut Bytes, packet: &'static str) -> Result<u16, WireError> {
    bytes.try_get_u16().map_err(|_| WireError::Truncated { packet })
}

fn get_u32(bytes: &mut Bytes) -> Result<u32, WireError> {
    bytes.try_get_u32().map_err(|_| WireError::Truncated { packet: "properties" })
}

fn get_block(bytes: &mut Bytes) -> Result<Bytes, WireError> {
    let length = usize::from(get_u16(bytes, "text")?);
    if bytes.len() < length {
        return Err(WireError::Truncated { packet: "text" });
    }
    Ok(bytes.split_to(length))
}

fn get_text(bytes: &mut Bytes) -> Result<String, WireError> {
    let block = get_block(bytes)?;
    std::str::from_utf8(&block).map(str::to_owned).map_err(|_| WireError::Text)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rmqtt_codec::{v3, v5};
    use tokio_util::codec::{Decoder, Encoder};

    fn connect() -> Connect<'static> {
        Connect {
            user: "alice",
            password: Some("secret"),
            client_id: "phone",
            clean_start: true,
            keep_alive_seconds: 30,
            session_expiry_seconds: 3600,
            receive_maximum: Some(50),
        }
    }

    fn publish() -> Publish<'static> {
        let (topic, payload) = ("u/bob", b"hi".as_slice());
        Publish { topic, payload, qos: 1, retain: false, dup: true, packet_id: 7, id: Some("a1") }
    }

    /// Another codec understands what we write, field by field.
    #[test]
    fn v5_packets_are_read_by_another_codec() {
        let mut bytes = BytesMut::new();
        encode_connect(Version::V5, &connect(), &mut bytes);
        encode_publish(Version::V5, &publish(), &mut bytes);
        encode_puback(9, &mut bytes);
        encode_subscribe(Version::V5, 3, "inbox/#", 1, &mut bytes);
        encode_unsubscribe(Version::V5, 4, "r/live", &mut bytes);
        encode_ping(&mut bytes);
        encode_disconnect(&mut bytes);
        let mut codec = v5::Codec::new(0, 0);
        let mut next = || codec.decode(&mut bytes).unwrap().unwrap().0;
        let v5::Packet::Connect(read) = next() else { panic!("not a CONNECT") };
        assert_eq!((read.client_id.as_ref() as &str, read.keep_alive, read.clean_start), ("phone", 30, true));
        assert_eq!(read.session_expiry_interval_secs, 3600);
        assert_eq!(read.receive_max.unwrap().get(), 50);
        assert_eq!(read.password.unwrap().as_ref(), b"secret");
        let v5::Packet::Publish(read) = next() else { panic!("not a PUBLISH") };
        assert_eq!((read.dup, read.packet_id.unwrap().get(), read.payload.as_ref()), (true, 7, b"hi".as_slice()));
        let properties = read.properties.unwrap().user_properties;
        assert_eq!((properties[0].0.as_ref() as &str, properties[0].1.as_ref() as &str), ("id", "a1"));
        let v5::Packet::PublishAck(read) = next() else { panic!("not a PUBACK") };
        assert_eq!(read.packet_id.get(), 9);
        let v5::Packet::Subscribe(read) = next() else { panic!("not a SUBSCRIBE") };
        assert_eq!(read.topic_filters[0].0.as_ref() as &str, "inbox/#");
        assert!(matches!(next(), v5::Packet::Unsubscribe(_)));
        assert_eq!(next(), v5::Packet::PingRequest);
        assert!(matches!(next(), v5::Packet::Disconnect(_)));
    }

    #[test]
    fn v311_packets_are_read_by_another_codec() {
        let mut bytes = BytesMut::new();
        encode_connect(Version::V311, &connect(), &mut bytes);
        encode_publish(Version::V311, &publish(), &mut bytes);
        encode_subscribe(Version::V311, 3, "inbox/#", 1, &mut bytes);
        let mut codec = v3::Codec::new(0);
        let mut next = || codec.decode(&mut bytes).unwrap().unwrap().0;
        let v3::Packet::Connect(read) = next() else { panic!("not a CONNECT") };
        assert_eq!((read.client_id.as_ref() as &str, read.protocol.level()), ("phone", 4));
        let v3::Packet::Publish(read) = next() else { panic!("not a PUBLISH") };
        assert_eq!((read.topic.as_ref() as &str, read.payload.as_ref()), ("u/bob", b"hi".as_slice()));
        assert!(matches!(next(), v3::Packet::Subscribe { .. }));
    }

    /// We understand what another codec writes, also when it comes byte by byte.
    #[test]
    fn v5_answers_of_another_codec_are_read() {
        let mut codec = v5::Codec::new(0, 0);
        let mut bytes = BytesMut::new();
        let connack = v5::ConnectAck {
            session_present: true,
            receive_max: 100.try_into().unwrap(),
            server_keepalive_sec: Some(20),
            assigned_client_id: Some("auto".into()),
            ..Default::default()
        };
        codec.encode(v5::Packet::from(connack), &mut bytes).unwrap();
        let puback = v5::PublishAck {
            packet_id: 7.try_into().unwrap(),
            reason_code: v5::PublishAckReason::QuotaExceeded,
            properties: vec![("seq".into(), "12".into())],
            reason_string: Some("later".into()),
        };
        codec.encode(v5::Packet::from(puback), &mut bytes).unwrap();
        let mut fed = BytesMut::new();
        let mut packets = Vec::new();
        for byte in bytes {
            fed.put_u8(byte);
            packets.extend(decode(Version::V5, &mut fed).unwrap());
        }
        let [
            Packet::ConnAck { session_present, code, properties },
            Packet::PubAck { packet_id, code: refused, properties: why },
        ] = packets.as_slice()
        else {
            panic!("unexpected {packets:?}")
        };
        assert_eq!((*session_present, *code, properties.receive_maximum), (true, 0, Some(100)));
        assert_eq!(
            (properties.server_keep_alive_seconds, properties.assigned_client_id.as_deref()),
            (Some(20), Some("auto"))
        );
        assert_eq!(
            (*packet_id, *refused, why.user("seq"), why.reason.as_deref()),
            (7, 0x97, Some("12"), Some("later"))
        );
    }

    #[test]
    fn broken_streams_are_errors_and_never_panics() {
        for bytes in [
            &[0x20, 0xFF, 0xFF, 0xFF, 0xFF][..],
            &[0x20, 0xFF, 0xFF, 0xFF, 0x7F],
            &[0x20, 0x01, 0x00],
            &[0x30, 0x03, 0x00, 0x05, b'a'],
            &[0x30, 0x04, 0x00, 0x01, 0xFF, 0x00],
            &[0x40, 0x06, 0x00, 0x01, 0x00, 0x02, 0x7E, 0x00],
            &[0x10, 0x00],
        ] {
            let mut buffer = BytesMut::from(bytes);
            assert!(decode(Version::V5, &mut buffer).is_err(), "{bytes:02x?}");
        }
    }
}
