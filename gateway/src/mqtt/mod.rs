//! The wire: MQTT 5.0 and 3.1.1 packets in and out.
//!
//! Decoding borrows from the input and allocates nothing for what a chat sends all day; what the two versions say differently is
//! one version-neutral [`Packet`]. Encoding appends to an [`OutBuffer`], in which large payloads are shared, not copied.
//! Written by hand rather than over a codec crate because the refusals matter here: each malformed or forbidden input has the reason
//! code that the specification names, a client with an empty id and Clean Start 0 is legal in MQTT 5, and a half-received frame must not
//! reserve its announced size.

mod decode;
mod encode;

pub use self::decode::{Connect, DecodeError, Packet, Publish, Subscribe, Will, decode};
pub use self::encode::{
    Delivery, OutBuffer, Welcome, connack, connack_refused, disconnect, pingresp, puback, suback, unsuback,
};

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
