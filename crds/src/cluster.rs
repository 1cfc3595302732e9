//! `ImCluster`: what a user asks for.
//!
//! Every field has its default in the schema, so that `spec: {auth: {insecure: {}}}` is a whole cluster. The CEL rules
//! sit beside the fields they are about; [`crate::ImCluster::validate`] says the same in Rust.

use crate::kubernetes::{ClientService, Embedded, ImagePullPolicy, PodSettings, SecretKey};
use crate::status::ImClusterStatus;
use crate::units::{Empty, TimeSpan};
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What an IM cluster is to be.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "imcluster.dev",
    version = "v1alpha1",
    kind = "ImCluster",
    plural = "imclusters",
    shortname = "imc",
    namespaced,
    status = "ImClusterStatus",
    derive = "PartialEq",
    doc = "An instant-messaging cluster whose tiers scale out and in by themselves.",
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "Whether clients can connect and send"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        description = "Why it is ready, or not"
    ),
    printcolumn(
        name = "Gateways",
        type_ = "integer",
        json_path = ".status.gateway.ready",
        description = "Gateways that take connections"
    ),
    printcolumn(
        name = "GatewaysWanted",
        type_ = "integer",
        json_path = ".status.gateway.desired",
        description = "Gateways that there should be"
    ),
    printcolumn(
        name = "Business",
        type_ = "integer",
        json_path = ".status.business.ready",
        description = "Business members that can own shards"
    ),
    printcolumn(
        name = "BusinessWanted",
        type_ = "integer",
        json_path = ".status.business.desired",
        description = "Business members that there should be"
    ),
    printcolumn(
        name = "Moving",
        type_ = "integer",
        json_path = ".status.shards.moving",
        description = "Shards on their way to another owner"
    ),
    printcolumn(
        name = "NoneLost",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"NoMessageLost\")].status",
        description = "Whether every acknowledged message is still there, as the store says"
    ),
    printcolumn(
        name = "Lag",
        type_ = "number",
        json_path = ".status.watermarkLagSeconds",
        description = "Age of the oldest message whose recipients were not all notified, in seconds",
        priority = 1
    ),
    printcolumn(
        name = "Unowned",
        type_ = "integer",
        json_path = ".status.shards.unowned",
        description = "Shards without an owner",
        priority = 1
    ),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode", priority = 1),
    printcolumn(name = "Paused", type_ = "boolean", json_path = ".spec.paused", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "self.messages.maxPayload < self.gateway.limits.maxPacketSize",
        "message": "messages.maxPayload must be below gateway.limits.maxPacketSize: raise maxPacketSize, or the largest message never fits into a packet"
    },
    {
        "rule": "!(has(self.serviceTokenFile) && has(self.serviceTokenSecret))",
        "message": "set at most one of: serviceTokenFile, serviceTokenSecret"
    },
    {
        "rule": "has(self.storage.embedded) == has(oldSelf.storage.embedded)",
        "message": "storage can't change its kind, every stored message would stay behind: make a new ImCluster instead"
    }
]))]
pub struct ImClusterSpec {
    /// `Auto`: decisions are carried out. `Recommend`: they are shown and wait for approval.
    #[serde(default)]
    pub mode: Mode,
    /// Stops every change by the operator; messaging goes on and the status stays true.
    #[serde(default)]
    pub paused: bool,
    /// Image with the programs `/im-gateway` and `/im-business`; left out: the operator's own. On Kubernetes only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// When nodes fetch the image. On Kubernetes only.
    #[serde(default)]
    pub image_pull_policy: ImagePullPolicy,
    /// Names of Secrets with which nodes fetch the image. On Kubernetes only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<String>,
    /// Who may log in. Exactly one way.
    pub auth: Auth,
    /// File with the bearer token that servers use on the HTTP API. Without it there is no server access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub service_token_file: Option<String>,
    /// Secret with that token, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_token_secret: Option<SecretKey>,
    /// Where clients connect to.
    #[serde(default)]
    pub access: Access,
    /// Where messages are stored. Exactly one way.
    #[serde(default)]
    pub storage: Storage,
    /// The tier that holds client connections.
    #[serde(default)]
    pub gateway: Gateway,
    /// The tier that owns shards: orders, stores and notifies.
    #[serde(default)]
    pub business: Business,
    /// What holds for every message.
    #[serde(default)]
    pub messages: Messages,
    /// Where the autoscaler's metrics come from.
    #[serde(default)]
    pub metrics: Metrics,
}

/// Whether decisions are carried out or only shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// Decisions are carried out.
    #[default]
    Auto,
    /// Decisions are shown in the status and wait for approval by their hash.
    Recommend,
}

/// Turns the `oneOf` that schemars makes of an enum with payloads into optional properties and one CEL rule, because
/// the API server's own words for a `oneOf` don't tell the user what to do.
fn exactly_one_of(schema: &mut schemars::Schema) {
    let Some(variants) = schema.remove("oneOf") else { return };
    let mut properties = serde_json::Map::new();
    for variant in variants.as_array().into_iter().flatten() {
        for (name, property) in variant["properties"].as_object().into_iter().flatten() {
            let mut property = property.clone();
            if let (Some(description), Some(object)) = (variant.get("description"), property.as_object_mut()) {
                object.insert("description".into(), description.clone());
            }
            properties.insert(name.clone(), property);
        }
    }
    let names: Vec<&str> = properties.keys().map(String::as_str).collect();
    let present: Vec<String> = names.iter().map(|name| format!("has(self.{name})")).collect();
    let rule = serde_json::json!([{
        "rule": format!("[{}].filter(present, present).size() == 1", present.join(", ")),
        "message": format!("set exactly one of: {}", names.join(", ")),
    }]);
    schema.insert("type".into(), "object".into());
    schema.insert("properties".into(), properties.into());
    schema.insert("x-kubernetes-validations".into(), rule);
}

/// How a client proves who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = exactly_one_of)]
pub enum Auth {
    /// Nobody proves anything: whoever says a name has it. For trying out on one machine only.
    Insecure(Empty),
    /// The MQTT password, or the HTTP bearer token, is a JWT whose `sub` is the user id.
    Jwt(JwtAuth),
}

/// Which tokens are accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "[has(self.jwksFile), has(self.jwksSecret), has(self.keysFile), has(self.keysSecret)].filter(present, present).size() == 1",
    "message": "set exactly one of: jwksFile, jwksSecret, keysFile, keysSecret"
}]))]
pub struct JwtAuth {
    /// PEM file with public keys, or a file with one shared secret for HS256.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub keys_file: Option<String>,
    /// File with a JSON Web Key Set (RFC 7517).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub jwks_file: Option<String>,
    /// Secret with what `keysFile` would hold, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys_secret: Option<SecretKey>,
    /// Secret with what `jwksFile` would hold, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_secret: Option<SecretKey>,
    /// What `aud` must contain, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub audience: Option<String>,
    /// What `iss` must be, if given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub issuer: Option<String>,
}

/// The listeners of each gateway. What is left out does not listen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "has(self.mqtt) || has(self.tls) || has(self.webSocket)",
        "message": "no client could connect: set at least one of mqtt, tls, webSocket"
    },
    {
        "rule": "(!has(self.mqtt) || self.mqtt.address != self.http.address) && (!has(self.tls) || self.tls.address != self.http.address) && (!has(self.webSocket) || self.webSocket.address != self.http.address) && (!has(self.mqtt) || !has(self.tls) || self.mqtt.address != self.tls.address) && (!has(self.mqtt) || !has(self.webSocket) || self.mqtt.address != self.webSocket.address) && (!has(self.tls) || !has(self.webSocket) || self.tls.address != self.webSocket.address)",
        "message": "two listeners have the same address: give each its own port"
    }
]))]
pub struct Access {
    /// MQTT over plain TCP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mqtt: Option<Listener>,
    /// MQTT over TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsListener>,
    /// MQTT over WebSocket, path `/mqtt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub web_socket: Option<Listener>,
    /// HTTP API.
    #[serde(default = "default_http")]
    pub http: Listener,
    /// The Service in front of the gateways. On Kubernetes only; there, of the addresses only the ports count.
    #[serde(default)]
    pub service: ClientService,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            mqtt: Some(Listener { address: "0.0.0.0:1883".into() }),
            tls: None,
            web_socket: None,
            http: default_http(),
            service: ClientService::default(),
        }
    }
}

fn default_http() -> Listener {
    Listener { address: "0.0.0.0:8080".into() }
}

/// One listening socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Listener {
    /// `IP:PORT`, an IPv6 address in brackets.
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('^([0-9]{1,3}([.][0-9]{1,3}){3}|\\\\[[0-9a-fA-F:.]+\\\\]):[0-9]{1,5}$')",
            "message": "write IP:PORT, for example 127.0.0.1:1883 or [::1]:1883"
        }])
    )]
    pub address: String,
}

/// One listening socket with TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.certFile) == has(self.keyFile) && has(self.certFile) != has(self.secretName)",
    "message": "set either certFile and keyFile, or secretName"
}]))]
pub struct TlsListener {
    /// `IP:PORT`, an IPv6 address in brackets.
    #[schemars(
        length(max = 64),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('^([0-9]{1,3}([.][0-9]{1,3}){3}|\\\\[[0-9a-fA-F:.]+\\\\]):[0-9]{1,5}$')",
            "message": "write IP:PORT, for example 127.0.0.1:1883 or [::1]:1883"
        }])
    )]
    pub address: String,
    /// PEM file with the certificate chain, the server's own first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub cert_file: Option<String>,
    /// PEM file with the private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub key_file: Option<String>,
    /// Secret of type kubernetes.io/tls with both, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub secret_name: Option<String>,
}

/// Where messages are stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = exactly_one_of)]
pub enum Storage {
    /// One store member with an embedded database file and a volume.
    Embedded(Embedded),
    /// A server that speaks the PostgreSQL wire protocol.
    Postgres(Postgres),
}

impl Default for Storage {
    fn default() -> Self {
        Self::Embedded(Embedded::default())
    }
}

/// How to reach PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "[has(self.url), has(self.urlFile), has(self.urlSecret)].filter(present, present).size() == 1",
        "message": "set exactly one of: url, urlFile, urlSecret"
    },
    {
        "rule": "!(has(self.caFile) && has(self.caSecret))",
        "message": "set at most one of: caFile, caSecret"
    }
]))]
pub struct Postgres {
    /// Connection URL, `postgres://user@host/database`. Keep passwords out of it: use `urlFile` or `urlSecret`. `sslmode` in it
    /// means what it means to libpq: `disable`, `prefer` (the default) and `require` verify nothing, `verify-ca` the chain of
    /// certificates, `verify-full` the host's name, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub url: Option<String>,
    /// File that holds the connection URL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub url_file: Option<String>,
    /// Secret that holds the connection URL, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_secret: Option<SecretKey>,
    /// PEM file with the certificates of the authorities that the server's own certificate may be from. With it TLS is a must and
    /// `sslmode=verify-full` the default. Left out: the system's, for the modes that verify.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub ca_file: Option<String>,
    /// Secret with what `caFile` would hold, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret: Option<SecretKey>,
}

/// The tier that holds client connections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!(has(self.replicas) && has(self.autoscaling))",
    "message": "replicas and autoscaling exclude each other: remove one of them"
}]))]
pub struct Gateway {
    /// A fixed number of gateways; without it and without `autoscaling`: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub replicas: Option<u32>,
    /// Bounds and rules by which the number of gateways follows the load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// What one gateway and one connection may use.
    pub limits: Limits,
    /// How connections leave a gateway that goes.
    pub drain: Drain,
    /// How many members more than wanted there may be while outdated ones are replaced.
    #[schemars(range(min = 1, max = 1000))]
    pub surge: u32,
    /// Its pods. On Kubernetes only.
    pub pod: PodSettings,
    /// How live rooms are served.
    pub rooms: Rooms,
}

impl Default for Gateway {
    fn default() -> Self {
        Self {
            replicas: None,
            autoscaling: None,
            limits: Limits::default(),
            drain: Drain::default(),
            surge: 1,
            pod: PodSettings::default(),
            rooms: Rooms::default(),
        }
    }
}

/// What one gateway and one connection may use. Announced in CONNACK where MQTT has a word for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Limits {
    /// Connections of one gateway.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: u32,
    /// New connections a second of one gateway.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub connect_rate: u32,
    /// Connections of one gateway that have not finished logging in.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_handshakes: u32,
    /// Time from accept to a complete CONNECT.
    pub handshake_timeout: TimeSpan,
    /// Unacknowledged QoS 1 messages in flight to and from one connection (MQTT: Receive Maximum).
    #[schemars(range(min = 1, max = 1024))]
    pub receive_maximum: u16,
    /// Bytes of one MQTT packet (MQTT: Maximum Packet Size).
    #[schemars(range(min = 1024, max = 16_777_216))]
    pub max_packet_size: u32,
    /// The longest keep-alive that is granted (MQTT: Server Keep Alive).
    pub keep_alive_max: TimeSpan,
    /// The longest life of a session without connection (MQTT: Session Expiry Interval).
    pub session_expiry_max: TimeSpan,
    /// Messages a second that one connection may publish; more are held back by not reading.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub message_rate: u32,
    /// Bytes that may wait for one connection that reads slowly.
    #[schemars(range(min = 4096, max = 67_108_864))]
    pub send_buffer_bytes: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 50_000,
            connect_rate: 1_000,
            max_handshakes: 2_000,
            handshake_timeout: TimeSpan::from_secs(10),
            receive_maximum: 1_024,
            max_packet_size: 262_144,
            keep_alive_max: TimeSpan::from_secs(20 * 60),
            session_expiry_max: TimeSpan::from_secs(30 * 86_400),
            message_rate: 200,
            send_buffer_bytes: 1_048_576,
        }
    }
}

/// How gateways serve live rooms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Rooms {
    /// Least time between two batches of a room's messages, from 1ms to 25ms; what comes after a longer silence goes out at once.
    pub coalesce: TimeSpan,
    /// How often viewers, likes and gifts are summed, stored and told; from 100ms to 1m.
    pub flush_interval: TimeSpan,
}

impl Default for Rooms {
    fn default() -> Self {
        Self { coalesce: TimeSpan::from_millis(5), flush_interval: TimeSpan::from_secs(1) }
    }
}

/// How connections leave a gateway that goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Drain {
    /// Connections a second that are asked to go elsewhere, at most; the measured headroom of the others may ask for less.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub rate: u32,
    /// From the moment that new connections go elsewhere to the first one being shed: load balancers need to notice.
    pub notice: TimeSpan,
    /// After that time the rest is closed at once.
    pub deadline: TimeSpan,
}

impl Default for Drain {
    fn default() -> Self {
        Self { rate: 500, notice: TimeSpan::from_secs(5), deadline: TimeSpan::from_secs(600) }
    }
}

/// The tier that owns shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!(has(self.replicas) && has(self.autoscaling))",
        "message": "replicas and autoscaling exclude each other: remove one of them"
    },
    {
        "rule": "!has(self.autoscaling) || self.autoscaling.metrics.all(metric, !has(metric.builtIn) || metric.builtIn.name != 'Connections')",
        "message": "business members hold no client connections: use MessagesPerSecond or CpuUtilization"
    }
]))]
pub struct Business {
    /// Number of shards. It decides where every message lies, so it can never change.
    #[schemars(
        range(min = 1, max = 16_384),
        extend("x-kubernetes-validations" = [{
            "rule": "self == oldSelf",
            "message": "shards can't change, every stored message lies by it: make a new ImCluster instead"
        }])
    )]
    pub shards: u32,
    /// A fixed number of business members; without it and without `autoscaling`: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub replicas: Option<u32>,
    /// Bounds and rules by which the number of business members follows the load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// How shards follow the load.
    pub rebalance: Rebalance,
    /// How many members more than wanted there may be while outdated ones are replaced.
    #[schemars(range(min = 1, max = 1000))]
    pub surge: u32,
    /// Its pods. On Kubernetes only.
    pub pod: PodSettings,
}

impl Default for Business {
    fn default() -> Self {
        Self {
            shards: 1_024,
            replicas: None,
            autoscaling: None,
            rebalance: Rebalance::default(),
            surge: 1,
            pod: PodSettings::default(),
        }
    }
}

/// How shards follow the load from one business member to another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Rebalance {
    /// Moves under way at the same time.
    #[schemars(range(min = 1, max = 16_384))]
    pub moves_in_flight: u32,
    /// Moves of one plan.
    #[schemars(range(min = 1, max = 16_384))]
    pub moves_per_round: u32,
    /// How long a shard rests after a move, unless its owner leaves.
    pub cooldown: TimeSpan,
    /// How far above its fair share a member's load may be before shards move, as a fraction.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub tolerance: f64,
}

impl Default for Rebalance {
    fn default() -> Self {
        Self { moves_in_flight: 32, moves_per_round: 1_024, cooldown: TimeSpan::from_secs(60), tolerance: 0.1 }
    }
}

/// What holds for every message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Messages {
    /// How long at least the same message id of one sender's device stands for the same message. Today ids are kept as long as the
    /// messages.
    pub dedup_window: TimeSpan,
    /// Messages of one conversation that a new device gets; older ones come by the HTTP API.
    #[schemars(range(min = 1, max = 100_000))]
    pub catch_up: u32,
    /// Bytes of one message's payload.
    #[schemars(range(min = 1, max = 16_777_216))]
    pub max_payload: u32,
    /// What holds for live rooms.
    pub rooms: RoomMessages,
}

impl Default for Messages {
    fn default() -> Self {
        Self {
            dedup_window: TimeSpan::from_secs(7 * 86_400),
            catch_up: 1_000,
            max_payload: 65_536,
            rooms: RoomMessages::default(),
        }
    }
}

/// What holds for the messages of live rooms.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RoomMessages {
    /// Messages that late comers get. They are kept in memory only (at most 64 KiB a room) and go with the room's owner.
    #[schemars(range(min = 0, max = 50))]
    pub history: u32,
}

/// Bounds and rules by which a tier follows its load. Mirrors `spec` of a HorizontalPodAutoscaler (autoscaling/v2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.minReplicas <= self.maxReplicas",
    "message": "minReplicas must not be above maxReplicas: lower minReplicas or raise maxReplicas"
}]))]
pub struct Autoscaling {
    /// Never fewer members.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub min_replicas: u32,
    /// Never more members.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: u32,
    /// What is looked at; the metric that asks for most members wins.
    #[serde(default = "default_metrics")]
    #[schemars(length(min = 1, max = 16))]
    pub metrics: Vec<Metric>,
    /// How fast the tier grows and shrinks.
    #[serde(default)]
    pub behavior: Behavior,
    /// How far a metric may be from its target without a change, as a fraction.
    #[serde(default = "default_tolerance")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub tolerance: f64,
}

fn one() -> u32 {
    1
}

fn default_tolerance() -> f64 {
    0.1
}

fn default_metrics() -> Vec<Metric> {
    let target = Target { kind: TargetType::Utilization, value: 70 };
    vec![BuiltInMetric { name: BuiltIn::CpuUtilization, target }.into()]
}

/// One thing that the autoscaler looks at: HPA's discriminated union, written as `type` and the field that it names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "WrittenMetric", into = "WrittenMetric")]
pub enum Metric {
    /// A metric that every member of the tier exports.
    BuiltIn(BuiltInMetric),
    /// What a query of one's own says.
    Prometheus(PrometheusMetric),
}

impl From<BuiltInMetric> for Metric {
    fn from(built_in: BuiltInMetric) -> Self {
        Self::BuiltIn(built_in)
    }
}

/// What `type` of a [`Metric`] can say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum MetricType {
    /// A metric that every member of the tier exports.
    BuiltIn,
    /// What a query of one's own says.
    Prometheus,
}

/// A [`Metric`] as it is written.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "has(self.builtIn) == (self.type == 'BuiltIn') && has(self.prometheus) == (self.type == 'Prometheus')",
    "message": "set just the field that type names: builtIn for type BuiltIn, prometheus for type Prometheus"
}]))]
struct WrittenMetric {
    /// Which of the fields beside it is set.
    #[serde(rename = "type")]
    kind: MetricType,
    /// A metric that every member of the tier exports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    built_in: Option<BuiltInMetric>,
    /// What a query of one's own says; it needs a Prometheus, see `spec.metrics`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prometheus: Option<PrometheusMetric>,
}

impl TryFrom<WrittenMetric> for Metric {
    type Error = &'static str;

    fn try_from(written: WrittenMetric) -> Result<Self, Self::Error> {
        match written {
            WrittenMetric { kind: MetricType::BuiltIn, built_in: Some(built_in), prometheus: None } => {
                Ok(Self::BuiltIn(built_in))
            }
            WrittenMetric { kind: MetricType::Prometheus, built_in: None, prometheus: Some(prometheus) } => {
                Ok(Self::Prometheus(prometheus))
            }
            _ => Err("set just the field that type names: builtIn for type BuiltIn, prometheus for type Prometheus"),
        }
    }
}

impl From<Metric> for WrittenMetric {
    fn from(metric: Metric) -> Self {
        match metric {
            Metric::BuiltIn(built_in) => Self { kind: MetricType::BuiltIn, built_in: Some(built_in), prometheus: None },
            Metric::Prometheus(prometheus) => {
                Self { kind: MetricType::Prometheus, built_in: None, prometheus: Some(prometheus) }
            }
        }
    }
}

/// A metric that every member of the tier exports, with its target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "(self.name == 'CpuUtilization') == (self.target.type == 'Utilization')",
    "message": "CpuUtilization takes a target of type Utilization (percent), every other metric one of type AverageValue"
}]))]
pub struct BuiltInMetric {
    /// Which metric.
    pub name: BuiltIn,
    /// Where it should be.
    pub target: Target,
}

/// The metrics that members export, all of them averages over 10 s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum BuiltIn {
    /// Client connections of a gateway.
    Connections,
    /// Messages a second: taken and delivered by a gateway, stored by a business member.
    MessagesPerSecond,
    /// CPU time used, in percent of the CPU that its pod requests; without Kubernetes in percent of one core.
    CpuUtilization,
}

impl BuiltIn {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Connections, Self::MessagesPerSecond, Self::CpuUtilization];
}

/// Where a metric should be, for each member on average.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Target {
    /// What `value` means.
    #[serde(rename = "type")]
    pub kind: TargetType,
    /// Units of the metric (`AverageValue`), or percent (`Utilization`).
    #[schemars(range(min = 1))]
    pub value: u32,
}

/// What a target's value means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TargetType {
    /// The value that each member should have on average.
    AverageValue,
    /// The percentage of what a member's pod requests.
    Utilization,
}

/// What a query of one's own says, with its target.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "!self.perPod || self.target.type == 'AverageValue'",
    "message": "perPod takes a target of type AverageValue: Value is for one number of the whole tier"
}]))]
pub struct PrometheusMetric {
    /// PromQL. Without `perPod` all series of the result are added up. Keep its ranges short: an average over five
    /// minutes is five minutes late.
    #[schemars(length(min = 1, max = 4096))]
    pub query: String,
    /// Where it should be.
    pub target: QueryTarget,
    /// The result has one series for each member, labelled `pod` with the member's name.
    #[serde(default)]
    pub per_pod: bool,
}

/// Where the result of a query should be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct QueryTarget {
    /// What `value` means.
    #[serde(rename = "type")]
    pub kind: QueryTargetType,
    /// In the unit of the query.
    #[schemars(range(min = 0.001, max = 1e15))]
    pub value: f64,
}

/// What a query's target means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum QueryTargetType {
    /// What the result itself should be, however many members there are: twice of it asks for twice the members. For what
    /// falls as members are added, such as a delay.
    Value,
    /// What each member's share should be: of the result without `perPod`, on average with it.
    AverageValue,
}

/// Where the autoscaler's metrics come from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Metrics {
    /// The Prometheus to ask. Left out: the one that the operator was started with, if any; else the members themselves
    /// are asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prometheus: Option<Prometheus>,
}

/// How to reach Prometheus, or what speaks its HTTP API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "!(has(self.tokenFile) && has(self.tokenSecret))",
        "message": "set at most one of: tokenFile, tokenSecret"
    },
    {
        "rule": "!(has(self.caFile) && has(self.caSecret))",
        "message": "set at most one of: caFile, caSecret"
    }
]))]
pub struct Prometheus {
    /// Base URL, for example `http://prometheus.monitoring:9090`; `/api/v1/…` is added. Members have to be scraped at
    /// least each 15 s, with the labels `namespace` and `pod`, as a PodMonitor does.
    #[schemars(
        length(max = 2048),
        extend("x-kubernetes-validations" = [{
            "rule": "self.matches('^https?://[^/ ?#]+(/[^ ?#]*)?$')",
            "message": "write http://HOST[:PORT][/PATH] or https://…, for example http://prometheus.monitoring:9090"
        }])
    )]
    pub url: String,
    /// File with the bearer token that it wants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub token_file: Option<String>,
    /// PEM file with the certificates of the authorities that its own certificate may be from. Left out: the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub ca_file: Option<String>,
    /// Secret with what `tokenFile` would hold, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_secret: Option<SecretKey>,
    /// Secret with what `caFile` would hold, on Kubernetes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_secret: Option<SecretKey>,
}

/// How fast a tier grows and shrinks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Behavior {
    /// Rules for growing. Left out: at once, by the larger of 4 members or 100 % in 15 s.
    pub scale_up: ScalingRules,
    /// Rules for shrinking. Left out: after 300 s, by up to 100 % in 15 s.
    pub scale_down: ScalingRules,
}

/// Rules for one direction; what is left out has the default of that direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScalingRules {
    /// For how long the most cautious recommendation counts (growing: the lowest, shrinking: the highest).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 3600))]
    pub stabilization_window_seconds: Option<u32>,
    /// Which policy counts when several are given.
    pub select_policy: SelectPolicy,
    /// How much change is allowed in which time.
    #[schemars(length(max = 16))]
    pub policies: Vec<ScalingPolicy>,
}

/// Which of several policies counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SelectPolicy {
    /// The one that allows the largest change.
    #[default]
    Max,
    /// The one that allows the smallest change.
    Min,
    /// No change in this direction.
    Disabled,
}

/// How much change is allowed in which time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingPolicy {
    /// What `value` counts.
    #[serde(rename = "type")]
    pub kind: PolicyType,
    /// Members, or percent of the members at the period's start.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub value: u32,
    /// The period in seconds.
    #[schemars(range(min = 1, max = 1800))]
    pub period_seconds: u32,
}

/// What a policy's value counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PolicyType {
    /// Members (upstream's word is kept).
    Pods,
    /// Percent of the members at the period's start.
    Percent,
}

/// How many members a tier is to have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling<'a> {
    /// That many.
    Fixed(u32),
    /// As many as the load asks for.
    Auto(&'a Autoscaling),
}

impl<'a> Scaling<'a> {
    fn of(replicas: Option<u32>, autoscaling: Option<&'a Autoscaling>) -> Self {
        match autoscaling {
            Some(autoscaling) => Self::Auto(autoscaling),
            None => Self::Fixed(replicas.unwrap_or(1)),
        }
    }

    /// The number to start with, before anything is known about the load.
    pub fn initial(self) -> u32 {
        match self {
            Self::Fixed(replicas) => replicas,
            Self::Auto(autoscaling) => autoscaling.min_replicas,
        }
    }
}

impl Gateway {
    /// How many gateways there are to be.
    pub fn scaling(&self) -> Scaling<'_> {
        Scaling::of(self.replicas, self.autoscaling.as_ref())
    }
}

impl Business {
    /// How many business members there are to be.
    pub fn scaling(&self) -> Scaling<'_> {
        Scaling::of(self.replicas, self.autoscaling.as_ref())
    }
}
