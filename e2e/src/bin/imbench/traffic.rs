//! What clients see and what it costs, with the load generator `imload`: the same traffic to this system and to mosquitto.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::{sleep, timeout};

use crate::system::{Bench, Cluster, Mosquitto, cpu_seconds, resident_kib};
use crate::{Outcome, Table, Wanted, bare};

/// Messages per second; the limits are set for it.
const RATE: u64 = 5_000;
const CLIENTS: u32 = 200;
/// Whom each client writes to.
const PEERS: u32 = 8;
const WARM_UP_SECONDS: u64 = 2;
/// Rates that are tried to find the highest one, each so much above the one before.
const STEP: f64 = 1.3;
/// Logins of one measurement.
const LOGINS: u32 = 5_000;

fn number(value: &Value, path: &str) -> Outcome<f64> {
    value.pointer(path).and_then(Value::as_f64).ok_or_else(|| format!("imload's result has no {path}").into())
}

/// Each client writes to `peers` others, 0 = to anybody.
fn steady_arguments(
    address: SocketAddr,
    rate: f64,
    peers: u32,
    seconds: u64,
    broker: bool,
    cpu_of: &[u32],
) -> Vec<String> {
    let load =
        format!("--rate {rate} --clients {CLIENTS} --peers {peers} --duration {seconds} --warmup {WARM_UP_SECONDS}");
    let text = format!("steady --mqtt {address} {load}");
    let mut arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
    arguments.extend(broker.then(|| "--broker".to_owned()));
    arguments.extend(cpu_of.iter().map(|pid| format!("--cpu-of={pid}")));
    arguments
}

/// A load on the system, and what it cost.
struct Loaded {
    result: Value,
    /// CPU per message by tier, µs.
    cpu: BTreeMap<String, f64>,
    /// Messages in a commit.
    rows_per_commit: f64,
    /// When it was, milliseconds since the Unix epoch.
    ran_ms: Range<i64>,
}

impl Loaded {
    fn cpu_of_all(&self) -> f64 {
        self.cpu.values().sum()
    }
}

/// Loads the system at [`RATE`].
async fn load(bench: &Bench, cluster: &Cluster, peers: u32, seconds: u64) -> Outcome<Loaded> {
    let (start, processes, [rows, commits]) = (now_ms(), cluster.processes()?, cluster.commits().await?);
    let pids: Vec<u32> = processes.iter().map(|(_, pid)| *pid).collect();
    let arguments = steady_arguments(cluster.mqtt, RATE as f64, peers, seconds, false, &pids);
    let result = bench.imload_result(&arguments).await?;
    complete(&result)?;
    let [rows_after, commits_after] = cluster.commits().await?;
    let mut cpu = BTreeMap::new();
    for (role, pid) in processes {
        *cpu.entry(role).or_default() += micros_per_message(&result, pid)?;
    }
    let rows_per_commit = (rows_after - rows) / (commits_after - commits).max(1.0);
    Ok(Loaded { result, cpu, rows_per_commit, ran_ms: start..now_ms() })
}

/// CPU time that a process used per message.
fn micros_per_message(result: &Value, pid: u32) -> Outcome<f64> {
    Ok(number(result, &format!("/cpuSeconds/{pid}"))? * 1e6 / number(result, "/acked")?)
}

fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

/// 1:1 messages, QoS 1: latency, CPU per message, and the highest rate. Twice: people who write to a few others again and again, and
/// anybody to anybody, where a quarter of the messages open a conversation.
pub async fn steady(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let cluster = Cluster::start(bench, "steady", 1).await?;
    let with_peers = load(bench, &cluster, PEERS, seconds).await?;
    let random_pairs = load(bench, &cluster, 0, seconds).await?;
    let our_highest = highest_rate(bench, cluster.mqtt, false).await?;
    let recorded =
        find(&cluster.data_dir(), "messages.sqlite").ok_or("the store's file is not in the data directory")?;
    cluster.stop().await?;

    let mosquitto = Mosquitto::start(bench).await?;
    let pid = mosquitto.pid();
    let arguments = steady_arguments(mosquitto.address, RATE as f64, PEERS, seconds, true, &[pid]);
    let theirs = bench.imload_result(&arguments).await?;
    complete(&theirs)?;
    let their_cpu = micros_per_message(&theirs, pid)?;
    let their_highest = highest_rate(bench, mosquitto.address, true).await?;
    drop(mosquitto);

    let folder = bench.folder("bare")?;
    for (name, ours, cpu_wanted) in [
        (format!("{PEERS} peers each"), &with_peers, Wanted::AtMost(3.0)),
        ("random pairs".to_owned(), &random_pairs, Wanted::Shown),
    ] {
        let copy = folder.join(format!("{name}.sqlite"));
        let rows = bare::rows_of(&recorded, ours.ran_ms.clone())?;
        let bare = tokio::task::spawn_blocking(move || bare::group_commit_round_trip(rows, &copy, RATE)).await??;
        for (at, quantile, path, wanted) in
            [("p50", 0.5, "/ackMillis/p50", Wanted::Shown), ("p99", 0.99, "/ackMillis/p99", Wanted::AtMost(3.0))]
        {
            let peer = bare.value_at_quantile(quantile) as f64 / 1_000.0;
            let ack = number(&ours.result, path)?;
            table.add(format!("ack {at}, {name}"), "ms", ack, "bare group commit of the same rows", peer, wanted);
        }
        let all = ours.cpu_of_all();
        table.add(format!("CPU per message, {name}"), "µs", all, "mosquitto (not durable)", their_cpu, cpu_wanted);
        for (role, cpu) in &ours.cpu {
            table.add(format!("… {role}"), "µs", *cpu, "mosquitto (not durable)", their_cpu, Wanted::Shown);
        }
        let one = "one message a commit";
        table.add(format!("messages per commit, {name}"), "", ours.rows_per_commit, one, 1.0, Wanted::Shown);
    }
    let (delivery, peer) =
        (number(&with_peers.result, "/deliveryMillis/p99")?, number(&theirs, "/deliveryMillis/p99")?);
    table.add("delivery p99 at 5,000/s", "ms", delivery, "mosquitto (not durable)", peer, Wanted::Shown);
    table.add(
        "saturating rate, same machine as the load",
        "1/s",
        our_highest,
        "mosquitto (not durable)",
        their_highest,
        Wanted::Shown,
    );
    Ok(())
}

/// A measurement in which messages were refused or never answered measures nothing.
fn complete(result: &Value) -> Outcome {
    let (refused, shed) = (number(result, "/refused")?, number(result, "/notTaken")?);
    if refused + shed > 0.0 {
        return Err(format!("at {RATE}/s {refused} messages were refused and {shed} not taken").into());
    }
    Ok(())
}

/// Raises the rate until not all of it is acknowledged; gives the most that was.
async fn highest_rate(bench: &Bench, address: SocketAddr, broker: bool) -> Outcome<f64> {
    let (mut rate, mut highest) = (RATE as f64, 0.0f64);
    loop {
        rate = (rate * STEP).round();
        let result = bench.imload_result(&steady_arguments(address, rate, PEERS, 3, broker, &[])).await?;
        let acked = number(&result, "/ackedPerSecond")?;
        highest = highest.max(acked);
        if acked < 0.95 * rate {
            return Ok(highest);
        }
    }
}

fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    let (folders, files): (Vec<_>, Vec<_>) = entries.partition(|path| path.is_dir());
    let found = files.into_iter().find(|path| path.file_name().is_some_and(|file| file == name));
    found.or_else(|| folders.iter().find_map(|folder| find(folder, name)))
}

/// Resident memory of the process that holds the sockets, per idle connection.
pub async fn idle(bench: &Bench, table: &mut Table, connections: u32) -> Outcome {
    let cluster = Cluster::start(bench, "idle", 1).await?;
    let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway")?.pid;
    let ours = idle_kib(bench, cluster.mqtt, gateway, connections, "inbox/#").await?;
    cluster.stop().await?;
    let mosquitto = Mosquitto::start(bench).await?;
    let theirs = idle_kib(bench, mosquitto.address, mosquitto.pid(), connections, "inbox/#").await?;
    let name = format!("resident memory per idle connection ({connections})");
    table.add(&name, "KiB", ours, "the promise", 1.5, Wanted::AtMost(1.0));
    table.add(&name, "KiB", ours, "mosquitto", theirs, Wanted::Shown);
    Ok(())
}

async fn idle_kib(bench: &Bench, address: SocketAddr, server: u32, connections: u32, filter: &str) -> Outcome<f64> {
    let before = resident_kib(server);
    let text = format!("idle --mqtt {address} --connections {connections} --subscribe {filter}");
    let arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
    let mut load = bench.imload(&arguments).stderr(Stdio::inherit()).spawn()?;
    let mut line = String::new();
    let output = load.stdout.take().ok_or("imload has no output")?;
    timeout(Duration::from_secs(180), BufReader::new(output).read_line(&mut line)).await??;
    if number(&serde_json::from_str(&line)?, "/connections")? < f64::from(connections) {
        return Err(format!("not all connections are up: {line}").into());
    }
    // An idle connection is one whose login is some seconds ago.
    sleep(Duration::from_secs(3)).await;
    let after = resident_kib(server);
    drop(load.stdin.take());
    load.wait().await?;
    Ok((after - before) / f64::from(connections))
}

/// Logins: how many a second, and how many one core's worth of CPU time makes.
pub async fn connects(bench: &Bench, table: &mut Table) -> Outcome {
    let cluster = Cluster::start(bench, "connects", 1).await?;
    let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway")?.pid;
    let (before, before_gateway) = (cluster.cpu_seconds()?, cpu_seconds(gateway));
    let ours = logins(bench, cluster.mqtt).await?;
    let our_cpu = cluster.cpu_seconds()? - before;
    let gateway_cpu = cpu_seconds(gateway) - before_gateway;
    cluster.stop().await?;
    let mosquitto = Mosquitto::start(bench).await?;
    let before = cpu_seconds(mosquitto.pid());
    let theirs = logins(bench, mosquitto.address).await?;
    let their_cpu = cpu_seconds(mosquitto.pid()) - before;
    let per_core = |cpu: f64| f64::from(LOGINS) / cpu.max(0.01);
    let (our_core, their_core) = (per_core(our_cpu), per_core(their_cpu));
    table.add("connects per second, load beside it", "1/s", ours, "mosquitto", theirs, Wanted::Shown);
    table.add("connects per second and core, all tiers", "1/s", our_core, "mosquitto", their_core, Wanted::Shown);
    table.add(
        "connects per second and core, gateway",
        "1/s",
        per_core(gateway_cpu),
        "mosquitto",
        their_core,
        Wanted::Shown,
    );
    Ok(())
}

async fn logins(bench: &Bench, address: SocketAddr) -> Outcome<f64> {
    let text = format!("connects --mqtt {address} -n {LOGINS} --parallel 32");
    let arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
    number(&bench.imload_result(&arguments).await?, "/perSecond")
}
