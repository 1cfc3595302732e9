//! The processes under test: a whole system, single members, mosquitto; what they use of the machine.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use im_e2e::api::Api;
pub use im_e2e::machine::{cpu_seconds, cpu_seconds_of_thread, resident_kib};
use im_e2e::view::Member;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};

use crate::Outcome;

/// Until something that was started is ready.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// Attempts to remove the directory.
const REMOVALS_MAX: u32 = 100;

/// Where the programs are and where they may write; its files go when it is dropped.
pub struct Bench {
    programs: PathBuf,
    directory: PathBuf,
}

impl Bench {
    /// Programs of this directory.
    pub fn new(programs: &Path) -> Outcome<Self> {
        for name in ["imcluster", "im-business", "im-gateway", "imload"] {
            if !programs.join(name).is_file() {
                let programs = programs.display();
                return Err(format!("{name} is not in {programs}: cargo build --workspace --bins --release").into());
            }
        }
        let directory = std::env::temp_dir().join(format!("imbench-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        Ok(Self { programs: programs.to_owned(), directory })
    }

    /// A directory of that name, empty.
    pub fn folder(&self, name: &str) -> Outcome<PathBuf> {
        let folder = self.directory.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }

    /// Starts a program of ours; it ends with the handle. Its log goes to a file of `folder`.
    pub fn start(&self, name: &str, arguments: &[&str], folder: &Path) -> Outcome<Child> {
        self.start_logging("info", name, arguments, folder)
    }

    /// The same, with a log of which [`recorded_transactions`] reads what the store did.
    pub fn start_recording(&self, name: &str, arguments: &[&str], folder: &Path) -> Outcome<Child> {
        self.start_logging(&format!("info,{TRANSACTIONS}=trace"), name, arguments, folder)
    }

    fn start_logging(&self, filter: &str, name: &str, arguments: &[&str], folder: &Path) -> Outcome<Child> {
        let log = fs::File::create(folder.join(format!("{name}-{}.log", arguments.first().unwrap_or(&""))))?;
        let mut command = Command::new(self.programs.join(name));
        command.args(arguments).env("RUST_LOG", filter);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).kill_on_drop(true);
        Ok(command.spawn()?)
    }

    /// `imload` with a JSON document as its result.
    pub fn imload(&self, arguments: &[String]) -> Command {
        let mut command = Command::new(self.programs.join("imload"));
        command.args(arguments).arg("--json").stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// The same to its end.
    pub async fn imload_result(&self, arguments: &[String]) -> Outcome<Value> {
        let output = self.imload(arguments).stdin(Stdio::null()).output().await?;
        if !output.status.success() {
            return Err(format!("imload {arguments:?}: {}", output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // Processes that were just killed may still be making files.
        let mut removed = Ok(());
        for _ in 0..REMOVALS_MAX {
            removed = fs::remove_dir_all(&self.directory);
            match &removed {
                Err(error) if error.kind() == std::io::ErrorKind::DirectoryNotEmpty => {}
                _ => break,
            }
        }
        if let Err(error) = removed {
            eprintln!("imbench: removing {}: {error}", self.directory.display());
        }
    }
}

/// Rows stored and commits made so far by a business member, from its metrics.
pub async fn committed(metrics: &Api) -> Outcome<[f64; 2]> {
    let text = metrics.get("/metrics").await?;
    let text = text.as_str().ok_or("the metrics are no text")?;
    let read = |name: &str| {
        let value =
            text.lines().find_map(|line| line.strip_prefix(name)).ok_or_else(|| format!("no {name} in the metrics"))?;
        value.trim().parse::<f64>().map_err(|error| format!("{name}: {error}"))
    };
    Ok([read("im_committed_total ")?, read("im_commits_total ")?])
}

/// Polls until `condition` gives a value.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> Outcome<T> {
    let until = Instant::now() + READY_WITHIN;
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if Instant::now() >= until {
            return Err(format!("not within {READY_WITHIN:?}: {what}").into());
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// Waits until somebody listens.
pub async fn listens(address: SocketAddr) -> Outcome {
    eventually(&format!("somebody listens on {address}"), async || TcpStream::connect(address).await.ok().map(drop))
        .await
}

/// Addresses on loopback that nobody listens on, all different.
pub fn free_addresses<const N: usize>() -> Outcome<[SocketAddr; N]> {
    let mut addresses = [SocketAddr::from(([127, 0, 0, 1], 0)); N];
    let listeners = addresses.map(TcpListener::bind);
    for (address, listener) in addresses.iter_mut().zip(listeners) {
        *address = listener?.local_addr()?;
    }
    Ok(addresses)
}

/// How many members a system has, and what else its gateways are told.
#[derive(Debug, Clone, Copy)]
pub struct Shape<'a> {
    /// Business members.
    pub business: u32,
    /// Gateways.
    pub gateways: u32,
    /// A line more of `spec.gateway`.
    pub gateway: &'a str,
}

impl Shape<'_> {
    fn with_business(business: u32) -> Self {
        Self { business, gateways: 1, gateway: "" }
    }
}

/// A whole system: `imcluster up` with the embedded store.
pub struct Cluster {
    /// Where clients connect.
    pub mqtt: SocketAddr,
    web_socket: SocketAddr,
    http: SocketAddr,
    folder: PathBuf,
    supervisor: Child,
    gateways: u32,
}

impl Cluster {
    /// Starts one with a gateway and so many business members and waits until it is ready.
    pub async fn start(bench: &Bench, name: &str, business: u32) -> Outcome<Self> {
        Self::start_with(bench, name, Shape::with_business(business)).await
    }

    /// The same with another shape.
    pub async fn start_with(bench: &Bench, name: &str, shape: Shape<'_>) -> Outcome<Self> {
        let folder = bench.folder(name)?;
        let [mqtt, web_socket, http] = free_addresses()?;
        let (file, data) = (folder.join("cluster.yaml"), folder.join("data"));
        fs::write(&file, yaml([mqtt, web_socket, http], shape))?;
        let arguments = ["up", &file.to_string_lossy(), "--data-dir", &data.to_string_lossy(), "--console", "off"];
        let supervisor = bench.start("imcluster", &arguments, &folder)?;
        let cluster = Self { mqtt, web_socket, http, folder, supervisor, gateways: shape.gateways };
        cluster.settled(shape.business).await?;
        Ok(cluster)
    }

    /// Another number of business members, as a user would ask for it.
    pub fn scale_business(&self, business: u32) -> Outcome {
        let new = self.folder.join("cluster.yaml.new");
        fs::write(&new, yaml([self.mqtt, self.web_socket, self.http], Shape::with_business(business)))?;
        Ok(fs::rename(new, self.folder.join("cluster.yaml"))?)
    }

    /// Waits until so many business members run and the gateway is ready.
    pub async fn settled(&self, business: u32) -> Outcome {
        let api = Api::new(self.http);
        let what = format!("{business} business members and the gateways are ready; logs: {}", self.folder.display());
        eventually(&what, async || {
            let count = |role| self.members_of(role).map_or(0, |members| members.len());
            let enough = count("gateway") == self.gateways as usize && count("business") == business as usize;
            (enough && api.get("/readyz").await.is_ok()).then_some(())
        })
        .await
    }

    /// Where its HTTP API listens.
    pub fn http(&self) -> SocketAddr {
        self.http
    }

    /// Where its members keep their data.
    pub fn data_dir(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// Who runs, in one role; all for an empty one.
    pub fn members_of(&self, role: &str) -> Outcome<Vec<Member>> {
        let mut members: Vec<Member> = serde_json::from_slice(&fs::read(self.folder.join("data/members.json"))?)?;
        members.retain(|member| role.is_empty() || member.role == role);
        Ok(members)
    }

    /// The status document.
    pub async fn status(&self, bench: &Bench) -> Outcome<Value> {
        let mut command = Command::new(bench.programs.join("imcluster"));
        let output =
            command.args(["status", "-o", "json", "--data-dir"]).arg(self.folder.join("data")).output().await?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Role (the supervisor's is `control`) and process of each member.
    pub fn processes(&self) -> Outcome<Vec<(String, u32)>> {
        let supervisor = self.supervisor.id().ok_or("imcluster up ended")?;
        let members = self.members_of("")?.into_iter().map(|member| (member.role, member.pid));
        Ok(std::iter::once(("control".to_owned(), supervisor)).chain(members).collect())
    }

    /// CPU seconds used by each tier's processes; the supervisor counts as `control`.
    pub fn cpu_by_role(&self) -> Outcome<BTreeMap<String, f64>> {
        let mut used = BTreeMap::new();
        for (role, pid) in self.processes()? {
            *used.entry(role).or_default() += cpu_seconds(pid);
        }
        Ok(used)
    }

    /// Log entries stored and commits made so far by all business members.
    pub async fn commits(&self) -> Outcome<[f64; 2]> {
        let mut sum = [0.0; 2];
        for member in self.members_of("business")? {
            let admin = member.addresses.get("admin").and_then(Value::as_str);
            let admin = admin.ok_or_else(|| format!("members.json has no admin address of {}", member.name))?;
            let [rows, commits] = committed(&Api::new(admin.parse()?)).await?;
            sum = [sum[0] + rows, sum[1] + commits];
        }
        Ok(sum)
    }

    /// CPU seconds used by all processes of the system.
    pub fn cpu_seconds(&self) -> Outcome<f64> {
        Ok(self.cpu_by_role()?.values().sum())
    }

    /// Ends it.
    pub async fn stop(mut self) -> Outcome {
        let id =
            self.supervisor.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)).ok_or("imcluster up ended")?;
        kill_process(id, Signal::INT)?;
        timeout(READY_WITHIN, self.supervisor.wait()).await.map_err(|_| "imcluster up does not end")??;
        Ok(())
    }
}

fn yaml([mqtt, web_socket, http]: [SocketAddr; 3], shape: Shape<'_>) -> String {
    let Shape { business, gateways, gateway } = shape;
    format!(
        "apiVersion: imcluster.dev/v1alpha1
kind: ImCluster
metadata:
  name: bench
spec:
  auth: {{insecure: {{}}}}
  access:
    mqtt: {{address: \"{mqtt}\"}}
    webSocket: {{address: \"{web_socket}\"}}
    http: {{address: \"{http}\"}}
  storage: {{embedded: {{}}}}
  gateway:
    replicas: {gateways}
    limits: {{connectRate: 100000, maxHandshakes: 10000, messageRate: 100000}}
    {gateway}
  business:
    shards: 64
    replicas: {business}
    rebalance: {{movesInFlight: 8, cooldown: 1s}}
"
    )
}

/// mosquitto, nothing durable.
pub struct Mosquitto {
    /// Where clients connect.
    pub address: SocketAddr,
    child: Child,
}

impl Mosquitto {
    /// Starts it.
    pub async fn start(bench: &Bench) -> Outcome<Self> {
        let folder = bench.folder("mosquitto")?;
        let [address] = free_addresses()?;
        let port = address.port();
        let settings =
            "allow_anonymous true\nset_tcp_nodelay true\npersistence false\nlog_type error\nmax_queued_messages 0\n";
        fs::write(folder.join("mosquitto.conf"), format!("listener {port} 127.0.0.1\n{settings}"))?;
        let program = if Path::new("/usr/sbin/mosquitto").exists() { "/usr/sbin/mosquitto" } else { "mosquitto" };
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(folder.join("mosquitto.conf"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let child = command.spawn().map_err(|error| format!("mosquitto: {error}; install it (make setup)"))?;
        listens(address).await?;
        Ok(Self { address, child })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id().unwrap_or(0)
    }
}

/// Where stores log the size of each transaction.
const TRANSACTIONS: &str = "im_business::store::transactions";

/// The log rows of each transaction that a process logged, in their order.
pub fn recorded_transactions(log: &Path) -> Outcome<Vec<usize>> {
    let text = fs::read_to_string(log)?;
    let lines = text.lines().filter(|line| line.contains(TRANSACTIONS));
    let rows = lines.filter_map(|line| line.rsplit_once("rows=")?.1.split_whitespace().next()?.parse().ok());
    let transactions: Vec<usize> = rows.filter(|rows| *rows > 0).collect();
    if transactions.is_empty() {
        Err(format!("{} has no transactions", log.display()).into())
    } else {
        Ok(transactions)
    }
}
