//! What clients are sent.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{Reason, Version, property};

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
