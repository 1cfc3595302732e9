//! What a member reads in its pod: its configuration, and where that lies. Pure.

use super::accepted::Accepted;
use crate::platform::process::{business_rooms, gateway_limits, gateway_rooms};
use im_crds::{Auth, Storage};
use serde_json::{Map, Value, json};
use std::net::SocketAddr;

/// Directory of the configuration.
pub const CONFIG_DIR: &str = "/etc/imcluster/config";
/// File of the configuration in its ConfigMap and directory.
pub const CONFIG_FILE: &str = "config.json";
/// Directory of the tokens that the tiers prove themselves to each other with.
pub const TOKENS_DIR: &str = "/etc/imcluster/tokens";
/// Key and file of the token of Links and of the control service.
pub const LINK_TOKEN: &str = "link-token";
/// Key and file of the store member's token.
pub const STORE_TOKEN: &str = "store-token";
/// Directory of the copy of the shard map.
pub const MAP_HINT_DIR: &str = "/etc/imcluster/map";
/// Directory of what JWTs are checked with.
pub const JWT_DIR: &str = "/etc/imcluster/jwt";
/// Directory of the certificate and its key.
pub const TLS_DIR: &str = "/etc/imcluster/tls";
/// Directory of the token that servers use.
pub const SERVICE_TOKEN_DIR: &str = "/etc/imcluster/service-token";
/// Directory of the store's URL.
pub const STORE_URL_DIR: &str = "/etc/imcluster/store-url";
/// Directory of the authorities that the store's certificate may be from.
pub const STORE_CA_DIR: &str = "/etc/imcluster/store-ca";
/// The one file of a directory that holds one.
pub const ONLY_FILE: &str = "value";
/// Where the store member keeps its file.
pub const DATA_DIR: &str = "/var/lib/imcluster";

/// Health and metrics of every member.
pub const ADMIN_PORT: u16 = 9090;
/// Links of a business member.
pub const LINK_PORT: u16 = 7000;
/// The store member.
pub const STORE_PORT: u16 = 7100;

/// A gateway's pod may end that long after its last connection should have been shed, seconds.
const GATEWAY_MARGIN_S: u64 = 10;
/// A business member has that long from SIGTERM until its shards are elsewhere, seconds.
pub const BUSINESS_GRACE_S: u64 = 150;
/// The store member has that long to end what it writes, seconds.
pub const STORE_GRACE_S: u64 = 30;

/// A socket of a gateway that clients reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientPort {
    /// What it is called in Services and pods.
    pub name: &'static str,
    /// Its number, the same in both.
    pub number: u16,
}

/// The sockets that clients reach, as the ImCluster asks for them.
pub fn client_ports(accepted: &Accepted) -> Vec<ClientPort> {
    let access = &accepted.cluster().spec.access;
    let listeners = [
        ("mqtt", access.mqtt.as_ref().map(|listener| &listener.address)),
        ("mqtts", access.tls.as_ref().map(|listener| &listener.address)),
        ("ws", access.web_socket.as_ref().map(|listener| &listener.address)),
        ("http", Some(&access.http.address)),
    ];
    let port = |address: &String| address.parse::<SocketAddr>().ok().map(|address| address.port());
    listeners.into_iter().filter_map(|(name, address)| Some(ClientPort { name, number: port(address?)? })).collect()
}

/// How long a gateway's pod has from SIGTERM to SIGKILL, seconds: long enough to shed its connections.
pub fn gateway_grace_s(accepted: &Accepted) -> u64 {
    shed_s(accepted) + GATEWAY_MARGIN_S
}

fn shed_s(accepted: &Accepted) -> u64 {
    let drain = &accepted.cluster().spec.gateway.drain;
    (drain.notice.duration() + drain.deadline.duration()).as_secs()
}

/// The copy of the shard map: under the ImCluster's own id, so that what an earlier one of the same name left is not taken for it.
fn map_hint_file(accepted: &Accepted) -> String {
    format!("{MAP_HINT_DIR}/{}", accepted.owner().uid)
}

fn listen(port: u16) -> Value {
    json!({ "address": format!("0.0.0.0:{port}") })
}

/// What `im-gateway --config` reads; its name, instance and address come as flags.
pub fn gateway_config(accepted: &Accepted, control: &str) -> Value {
    let spec = &accepted.cluster().spec;
    let auth = match &spec.auth {
        Auth::Insecure(_) => json!({ "insecure": {} }),
        Auth::Jwt(jwt) => {
            let file = if jwt.jwks_secret.is_some() { "jwksFile" } else { "keysFile" };
            let mut fields = Map::from_iter([(file.to_owned(), json!(format!("{JWT_DIR}/{ONLY_FILE}")))]);
            for (field, value) in [("audience", &jwt.audience), ("issuer", &jwt.issuer)] {
                if let Some(value) = value {
                    fields.insert(field.to_owned(), json!(value));
                }
            }
            json!({ "jwt": fields })
        }
    };
    let mut config = json!({
        "name": "gateway",
        "cluster": accepted.key().0,
        "control": [control],
        "linkTokenFile": format!("{TOKENS_DIR}/{LINK_TOKEN}"),
        "mapHintFile": map_hint_file(accepted),
        "admin": listen(ADMIN_PORT),
        "auth": auth,
        "limits": gateway_limits(spec),
        "messages": { "catchUp": spec.messages.catch_up },
        "terminationGraceSeconds": shed_s(accepted),
    });
    for ClientPort { name, number } in client_ports(accepted) {
        match name {
            "mqtts" => {
                config["tls"] = listen(number);
                config["tls"]["certFile"] = json!(format!("{TLS_DIR}/tls.crt"));
                config["tls"]["keyFile"] = json!(format!("{TLS_DIR}/tls.key"));
            }
            "ws" => config["webSocket"] = listen(number),
            name => config[name] = listen(number),
        }
    }
    if spec.service_token_secret.is_some() {
        config["serviceTokensFile"] = json!(format!("{SERVICE_TOKEN_DIR}/{ONLY_FILE}"));
    }
    if let Some(rooms) = gateway_rooms(spec) {
        config["rooms"] = rooms;
    }
    config
}

/// What `im-business serve --config` reads; its name, instance and address come as flags.
pub fn business_config(accepted: &Accepted, control: &str) -> Value {
    let spec = &accepted.cluster().spec;
    let mut config = json!({
        "name": "business",
        "cluster": accepted.key().0,
        "control": [control],
        "link": listen(LINK_PORT),
        "admin": listen(ADMIN_PORT),
        "linkTokenFile": format!("{TOKENS_DIR}/{LINK_TOKEN}"),
        "mapHintFile": map_hint_file(accepted),
        "payloadMax": spec.messages.max_payload,
        "terminationGraceSeconds": BUSINESS_GRACE_S - 10,
    });
    if let Some(rooms) = business_rooms(spec) {
        config["rooms"] = rooms;
    }
    match &spec.storage {
        Storage::Embedded(_) => {
            let store = format!("{}.{}.svc", accepted.child("store"), accepted.namespace());
            config["store"] = json!(format!("grpc://{store}:{STORE_PORT}"));
            config["storeTokenFile"] = json!(format!("{TOKENS_DIR}/{STORE_TOKEN}"));
        }
        Storage::Postgres(postgres) => {
            match &postgres.url {
                Some(url) => config["store"] = json!(url),
                None => config["storeUrlFile"] = json!(format!("{STORE_URL_DIR}/{ONLY_FILE}")),
            }
            if postgres.ca_secret.is_some() {
                config["storeCaFile"] = json!(format!("{STORE_CA_DIR}/{ONLY_FILE}"));
            }
        }
    }
    config
}

/// What `im-business store --config` reads.
pub fn store_config() -> Value {
    json!({
        "name": "store",
        "listen": format!("0.0.0.0:{STORE_PORT}"),
        "dataDir": DATA_DIR,
        "tokenFile": format!("{TOKENS_DIR}/{STORE_TOKEN}"),
    })
}
