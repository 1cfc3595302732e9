//! Members as processes of this machine: their configurations, and the supervisor's socket by which they are started.
//!
//! One line of JSON asks, one line answers; after `watch` a line follows each change.

use super::{Platform, PlatformError, ProcessState, StoredMap, Tier, View};
use crate::control::ClusterKey;
use crate::up::data_dir::{DataDir, Secrets, write_atomically};
use im_crds::{Auth, ImCluster, ImClusterSpec, Postgres, Storage};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Mutex, watch};

/// What control asks of the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", deny_unknown_fields)]
pub enum Request {
    /// Start a member and keep it running.
    Start {
        /// Its tier.
        role: Tier,
        /// Its name; `TIER-N`, see [`member_name`].
        name: String,
        /// Its configuration file.
        config: PathBuf,
        /// Shown in the view.
        template: String,
    },
    /// End a member for good.
    Stop {
        /// Its name.
        name: String,
        /// Seconds from SIGTERM to SIGKILL.
        grace_seconds: f64,
    },
    /// Make known where a process listens; dropped if another process has the name by now.
    Describe {
        /// Its name.
        name: String,
        /// Its [`Process::instance`](super::Process::instance).
        instance: String,
        /// Where it listens, by what for.
        addresses: BTreeMap<String, String>,
    },
    /// Who runs?
    List {},
    /// Who runs, now and after each change?
    Watch {},
}

/// What the supervisor answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    /// It is under way.
    Done {},
    /// It is not, and why.
    Refused(String),
    /// To `list` and `watch`.
    View(View),
}

/// The name of a tier's member number `index`.
pub fn member_name(tier: Tier, index: u32) -> String {
    format!("{tier}-{index}")
}

/// The inverse of [`member_name`].
pub fn index_of(tier: Tier, name: &str) -> Option<u32> {
    name.strip_prefix(&format!("{tier}-"))?.parse().ok()
}

/// The `count` lowest names of the tier that no process has.
fn free_names(view: &View, tier: Tier, count: u32) -> Vec<String> {
    let names = (0..).map(|index| member_name(tier, index));
    names.filter(|name| view.process(name).is_none()).take(count as usize).collect()
}

/// One connection to the supervisor.
struct Connection {
    replies: Lines<BufReader<OwnedReadHalf>>,
    requests: OwnedWriteHalf,
}

impl Connection {
    async fn open(socket: &Path) -> Result<Self, PlatformError> {
        let (reader, requests) = UnixStream::connect(socket).await?.into_split();
        Ok(Self { replies: BufReader::new(reader).lines(), requests })
    }

    async fn send(&mut self, request: &Request) -> Result<(), PlatformError> {
        let mut line = serde_json::to_vec(request).map_err(|error| PlatformError::Nonsense(error.to_string()))?;
        line.push(b'\n');
        Ok(self.requests.write_all(&line).await?)
    }

    async fn receive(&mut self) -> Result<Reply, PlatformError> {
        let line = self.replies.next_line().await?;
        let line = line.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::UnexpectedEof))?;
        serde_json::from_str(&line).map_err(|error| PlatformError::Nonsense(error.to_string()))
    }
}

/// Set in the environment of `imcluster up`, it lets tests end business members at chosen points.
const FAIL_POINTS_VARIABLE: &str = "IMCLUSTER_FAIL_POINTS";

/// The platform of `imcluster up`.
pub struct ProcessPlatform {
    data: DataDir,
    secrets: Secrets,
    control: String,
    store: String,
    map_file: PathBuf,
    /// Paths in the ImCluster are relative to this directory.
    base: PathBuf,
    view: watch::Receiver<View>,
    /// For tests: business members may be told to end at chosen points.
    fail_points: bool,
    /// Taken out while a question is open: one that is given up takes its connection, and the late answer, with it.
    connection: Mutex<Option<Connection>>,
}

impl ProcessPlatform {
    /// Connects to the supervisor of `data`; relative paths in the ImCluster are taken from `base`.
    ///
    /// # Errors
    /// [`PlatformError`] when there is no supervisor, or the data directory is not one.
    pub async fn connect(data: DataDir, base: PathBuf) -> Result<Self, PlatformError> {
        let config = |error: crate::up::data_dir::DataDirError| PlatformError::Config(error.to_string());
        let endpoints = data.endpoints().map_err(config)?;
        let secrets = data.secrets().map_err(config)?;
        let socket = data.supervisor_socket();
        let mut watching = Connection::open(&socket).await?;
        watching.send(&Request::Watch {}).await?;
        let Reply::View(first) = watching.receive().await? else {
            return Err(PlatformError::Nonsense("no view after `watch`".to_owned()));
        };
        let (views, view) = watch::channel(first);
        tokio::spawn(async move {
            // Ends with the supervisor, and all of us with it.
            while let Ok(Reply::View(next)) = watching.receive().await {
                if views.send(next).is_err() {
                    break;
                }
            }
        });
        let connection = Mutex::new(Some(Connection::open(&socket).await?));
        let (control, store) = (endpoints.control.to_string(), endpoints.store.to_string());
        let fail_points = std::env::var_os(FAIL_POINTS_VARIABLE).is_some();
        let map_file = data.shard_map();
        Ok(Self { data, secrets, control, store, map_file, base, view, fail_points, connection })
    }

    async fn ask(&self, request: &Request) -> Result<(), PlatformError> {
        let mut slot = self.connection.lock().await;
        let mut connection = match slot.take() {
            Some(connection) => connection,
            None => Connection::open(&self.data.supervisor_socket()).await?,
        };
        connection.send(request).await?;
        let reply = connection.receive().await?;
        *slot = Some(connection);
        match reply {
            Reply::Done {} => Ok(()),
            Reply::Refused(reason) => Err(PlatformError::Refused(reason)),
            Reply::View(_) => Err(PlatformError::Nonsense("a view".to_owned())),
        }
    }

    /// Waits until the watch shows what the supervisor has done.
    async fn shown(&self, shows: impl FnMut(&View) -> bool + Send) -> Result<(), PlatformError> {
        match self.view.clone().wait_for(shows).await {
            Ok(_) => Ok(()),
            Err(_) => Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
        }
    }

    fn config(&self, cluster: &ImCluster, tier: Tier, name: &str) -> Result<Value, PlatformError> {
        let mut config = match tier {
            Tier::Gateway => gateway_config(cluster, name, &self.control, &self.secrets, &self.base),
            Tier::Business => business_config(cluster, name, &self.control, &self.store, &self.secrets, &self.base)?,
        };
        config["mapHintFile"] = json!(self.data.map_hint());
        if self.fail_points && tier == Tier::Business {
            config["failPoints"] = json!(true);
        }
        Ok(config)
    }
}

impl Platform for ProcessPlatform {
    fn watch(&self) -> watch::Receiver<View> {
        self.view.clone()
    }

    fn cluster(&self) -> Result<ImCluster, PlatformError> {
        let path = self.data.cluster_yaml();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| PlatformError::Config(format!("{}: {error}", path.display())))?;
        ImCluster::parse_yaml(&text).map_err(|error| PlatformError::Config(error.to_string()))
    }

    fn template(&self, cluster: &ImCluster, tier: Tier) -> String {
        // A configuration that can't be made has its own digest: nothing runs with it.
        let config = self.config(cluster, tier, "").map(|config| config.to_string()).unwrap_or_default();
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(config.as_bytes()))
    }

    async fn start(&self, cluster: &ImCluster, tier: Tier, count: u32) -> Result<(), PlatformError> {
        let template = self.template(cluster, tier);
        let names = free_names(&self.view.borrow(), tier, count);
        for name in &names {
            let config = self.config(cluster, tier, name)?;
            let path = self.data.config(name);
            write_atomically(&path, format!("{config:#}\n").as_bytes())?;
            let start = Request::Start { role: tier, name: name.clone(), config: path, template: template.clone() };
            self.ask(&start).await?;
        }
        self.shown(|view| names.iter().all(|name| view.process(name).is_some())).await
    }

    async fn stop(&self, name: &str, grace: Duration) -> Result<(), PlatformError> {
        self.ask(&Request::Stop { name: name.to_owned(), grace_seconds: grace.as_secs_f64() }).await?;
        self.shown(|view| view.process(name).is_none_or(|process| process.state == ProcessState::Stopping)).await
    }

    /// The gateways of one machine share their ports: who drains gives them up by itself.
    async fn set_serving(&self, _: &str, _: bool) -> Result<(), PlatformError> {
        Ok(())
    }

    async fn describe(
        &self,
        name: &str,
        instance: &str,
        addresses: BTreeMap<String, String>,
    ) -> Result<(), PlatformError> {
        self.ask(&Request::Describe { name: name.to_owned(), instance: instance.to_owned(), addresses }).await
    }

    async fn load_map(&self) -> Result<Option<StoredMap>, PlatformError> {
        let bytes = match tokio::fs::read(&self.map_file).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at(&self.map_file, &error)),
        };
        let damaged = |error| tracing::warn!("{} is not used: {error}", self.map_file.display());
        Ok(serde_json::from_slice(&bytes).map_err(damaged).ok())
    }

    /// There is one control per data directory, so nobody else writes.
    async fn save_map(&self, map: &StoredMap) -> Result<(), PlatformError> {
        let bytes = serde_json::to_vec(map).map_err(std::io::Error::other)?;
        write_in_background(self.map_file.clone(), bytes).await
    }

    async fn publish_map(&self, hint: Vec<u8>) -> Result<(), PlatformError> {
        write_in_background(self.data.map_hint(), hint).await
    }
}

async fn write_in_background(path: PathBuf, bytes: Vec<u8>) -> Result<(), PlatformError> {
    let written =
        tokio::task::spawn_blocking(move || write_atomically(&path, &bytes).map_err(|error| at(&path, &error)));
    written.await.map_err(std::io::Error::other)?
}

fn at(path: &Path, error: &std::io::Error) -> PlatformError {
    PlatformError::Config(format!("{}: {error}", path.display()))
}

fn absolute(base: &Path, path: &str) -> Value {
    json!(base.join(path))
}

/// What `im-gateway --config` reads.
fn gateway_config(cluster: &ImCluster, name: &str, control: &str, secrets: &Secrets, base: &Path) -> Value {
    let spec = &cluster.spec;
    let access = &spec.access;
    let auth = match &spec.auth {
        Auth::Insecure(_) => json!({ "insecure": {} }),
        Auth::Jwt(jwt) => {
            let mut fields = serde_json::Map::new();
            for (field, path) in [("keysFile", &jwt.keys_file), ("jwksFile", &jwt.jwks_file)] {
                if let Some(path) = path {
                    fields.insert(field.to_owned(), absolute(base, path));
                }
            }
            for (field, value) in [("audience", &jwt.audience), ("issuer", &jwt.issuer)] {
                if let Some(value) = value {
                    fields.insert(field.to_owned(), json!(value));
                }
            }
            json!({ "jwt": fields })
        }
    };
    let mut config = json!({
        "name": name,
        "cluster": ClusterKey::of(cluster).0,
        "control": [control],
        "linkToken": secrets.link_token,
        "mqtt": access.mqtt.as_ref().map(|listener| json!({ "address": listener.address })),
        "tls": access.tls.as_ref().map(|tls| json!({
            "address": tls.address,
            "certFile": tls.cert_file.as_deref().map(|path| absolute(base, path)),
            "keyFile": tls.key_file.as_deref().map(|path| absolute(base, path)),
        })),
        "webSocket": access.web_socket.as_ref().map(|listener| json!({ "address": listener.address })),
        "http": { "address": access.http.address },
        "admin": { "address": "127.0.0.1:0" },
        "auth": auth,
        "limits": gateway_limits(spec),
        "messages": { "catchUp": spec.messages.catch_up },
        "terminationGraceSeconds": STOP_GRACE.as_secs(),
    });
    if let (Some(path), Some(fields)) = (&spec.service_token_file, config.as_object_mut()) {
        fields.insert("serviceTokensFile".to_owned(), absolute(base, path));
    }
    if let Some(rooms) = gateway_rooms(spec) {
        config["rooms"] = rooms;
    }
    config
}

/// How a gateway serves live rooms. Left out where the program's default is meant: a template that changes replaces members.
pub(crate) fn gateway_rooms(spec: &ImClusterSpec) -> Option<Value> {
    let rooms = &spec.gateway.rooms;
    (*rooms != Default::default()).then(|| {
        json!({
            "coalesceMs": rooms.coalesce.duration().as_millis().clamp(1, 25) as u64,
            "flushIntervalMs": rooms.flush_interval.duration().as_millis().clamp(100, 60_000) as u64,
        })
    })
}

/// How a business member serves live rooms; see [`gateway_rooms`].
pub(crate) fn business_rooms(spec: &ImClusterSpec) -> Option<Value> {
    let (rooms, interval) = (&spec.messages.rooms, spec.gateway.rooms.flush_interval);
    let is_default = *rooms == Default::default() && spec.gateway.rooms == Default::default();
    (!is_default).then(|| {
        json!({
            "history": rooms.history.min(50),
            "statsIntervalMs": interval.duration().as_millis().clamp(100, 60_000) as u64,
        })
    })
}

/// What a gateway holds its clients to, as its configuration says it.
pub(crate) fn gateway_limits(spec: &ImClusterSpec) -> Value {
    let limits = &spec.gateway.limits;
    json!({
        "maxConnections": limits.max_connections,
        "connectRate": limits.connect_rate,
        "halfOpenMax": limits.max_handshakes,
        "handshakeTimeoutMs": limits.handshake_timeout.duration().as_millis().clamp(1, 3_600_000) as u64,
        "receiveMaximum": limits.receive_maximum,
        "maxPacketSize": limits.max_packet_size,
        // As wide as the fields of MQTT that announce them.
        "keepAliveMaxSeconds": limits.keep_alive_max.duration().as_secs().clamp(1, u16::MAX.into()),
        "sessionExpiryMaxSeconds": limits.session_expiry_max.duration().as_secs().min(u32::MAX.into()),
        "messageRate": limits.message_rate,
        "sendBufferBytes": limits.send_buffer_bytes,
        "maxPayload": spec.messages.max_payload,
    })
}

/// From SIGTERM to SIGKILL of a member that is stopped; it sheds or releases in this time what it still holds.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// What `im-business serve --config` reads.
fn business_config(
    cluster: &ImCluster,
    name: &str,
    control: &str,
    store: &str,
    secrets: &Secrets,
    base: &Path,
) -> Result<Value, PlatformError> {
    let store = match &cluster.spec.storage {
        Storage::Embedded(_) => format!("grpc://{store}"),
        Storage::Postgres(postgres) => match (&postgres.url, &postgres.url_file) {
            (Some(url), _) => url.clone(),
            (None, Some(file)) => {
                let path = base.join(file);
                let refuse = |error| PlatformError::Config(format!("{}: {error}", path.display()));
                std::fs::read_to_string(&path).map_err(refuse)?.trim().to_owned()
            }
            (None, None) => {
                return Err(PlatformError::Config("spec.storage.postgres: set exactly one of: url, urlFile".into()));
            }
        },
    };
    let mut config = json!({
        "name": name,
        "cluster": ClusterKey::of(cluster).0,
        "control": [control],
        "link": { "address": "127.0.0.1:0" },
        "admin": { "address": "127.0.0.1:0" },
        "store": store,
        "storeToken": secrets.store_token,
        "linkToken": secrets.link_token,
        "payloadMax": cluster.spec.messages.max_payload,
        "terminationGraceSeconds": STOP_GRACE.as_secs(),
    });
    if let Storage::Postgres(Postgres { ca_file: Some(file), .. }) = &cluster.spec.storage {
        config["storeCaFile"] = json!(base.join(file));
    }
    if let Some(rooms) = business_rooms(&cluster.spec) {
        config["rooms"] = rooms;
    }
    Ok(config)
}

/// What `im-business store --config` reads.
pub(crate) fn store_config(name: &str, listen: &str, directory: &Path, secrets: &Secrets) -> Value {
    json!({ "name": name, "listen": listen, "dataDir": directory, "token": secrets.store_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(spec: &str) -> ImCluster {
        let head = "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat}\n";
        ImCluster::parse_yaml(&format!("{head}spec: {spec}")).expect("a good file")
    }

    fn secrets() -> Secrets {
        Secrets { link_token: "link".into(), store_token: "store".into() }
    }

    #[test]
    fn a_gateway_gets_what_the_cluster_says_with_paths_made_absolute() {
        let cluster = cluster(
            "{auth: {jwt: {jwksFile: keys/jwks.json, audience: chat}}, serviceTokenFile: /etc/token,
              access: {tls: {address: '127.0.0.1:8883', certFile: a.pem, keyFile: /b.pem}},
              gateway: {limits: {maxConnections: 7, keepAliveMax: 1m}}}",
        );
        let config = gateway_config(&cluster, "gateway-3", "127.0.0.1:7", &secrets(), Path::new("/home/x"));
        assert_eq!(config["name"], "gateway-3");
        assert_eq!(config["control"], json!(["127.0.0.1:7"]));
        assert_eq!(config["auth"], json!({ "jwt": { "jwksFile": "/home/x/keys/jwks.json", "audience": "chat" } }));
        assert_eq!(config["tls"]["certFile"], "/home/x/a.pem");
        assert_eq!(config["tls"]["keyFile"], "/b.pem");
        assert_eq!(config["mqtt"], Value::Null);
        assert_eq!(config["serviceTokensFile"], "/etc/token");
        assert_eq!(config["limits"]["maxConnections"], 7);
        assert_eq!(config["limits"]["keepAliveMaxSeconds"], 60);
    }

    #[test]
    fn a_business_member_gets_its_store() {
        let of = |spec: &str| {
            business_config(&cluster(spec), "business-0", "c", "127.0.0.1:9", &secrets(), Path::new("/nowhere"))
        };
        assert_eq!(of("{auth: {insecure: {}}}").expect("embedded")["store"], "grpc://127.0.0.1:9");
        let url =
            of("{auth: {insecure: {}}, storage: {postgres: {url: 'postgres://u@h/d', caFile: ca.pem}}}").expect("url");
        assert_eq!((&url["store"], &url["storeCaFile"]), (&json!("postgres://u@h/d"), &json!("/nowhere/ca.pem")));
        let absent = of("{auth: {insecure: {}}, storage: {postgres: {urlFile: pg}}}").expect_err("no such file");
        assert!(absent.to_string().starts_with("/nowhere/pg: "), "{absent}");
    }

    #[test]
    fn new_members_get_the_lowest_free_names() {
        let named = |name: &str| super::super::Process {
            name: name.into(),
            role: super::super::Role::Gateway,
            state: ProcessState::Stopping,
            instance: None,
            pid: None,
            starts: 1,
            template: String::new(),
            addresses: BTreeMap::new(),
        };
        let view = View { processes: vec![named("gateway-0"), named("gateway-2")], ..View::default() };
        assert_eq!(free_names(&view, Tier::Gateway, 2), ["gateway-1", "gateway-3"]);
        assert_eq!(free_names(&view, Tier::Business, 1), ["business-0"]);
        assert_eq!(index_of(Tier::Gateway, "gateway-12"), Some(12));
        assert_eq!(index_of(Tier::Gateway, "business-1"), None);
    }

    #[test]
    fn requests_are_the_documented_lines() {
        let stop = Request::Stop { name: "gateway-1".into(), grace_seconds: 5.0 };
        assert_eq!(serde_json::to_string(&stop).expect("json"), r#"{"stop":{"name":"gateway-1","graceSeconds":5.0}}"#);
        assert_eq!(serde_json::from_str::<Request>(r#"{"list":{}}"#).expect("json"), Request::List {});
        assert!(serde_json::from_str::<Request>(r#"{"list":{},"x":1}"#).is_err());
    }
}
