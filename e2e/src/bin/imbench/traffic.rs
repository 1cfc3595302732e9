//! What clients see and what it costs, with the load generator `imload`: the same traffic to this system and to mosquitto.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use im_e2e::history::new_latency_histogram;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::{sleep, timeout};

use crate::system::{Bench, Cluster, Mosquitto, cpu_seconds, resident_kib};
use crate::{Outcome, Table, Wanted, bare};

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
fn steady_arguments(address: SocketAddr, rate: f64, peers: u32, seconds: u64, broker: bool) -> Vec<String> {
    let load =
        format!("--rate {rate} --clients {CLIENTS} --peers {peers} --duration {seconds} --warmup {WARM_UP_SECONDS}");
    let text = format!("steady --mqtt {address} {load}");
    let broker = broker.then_some("--broker").into_iter();
    text.split(' ').chain(broker).map(str::to_owned).collect()
}

/// 1:1 messages, QoS 1: latency, CPU per message, and the highest rate.
pub async fn steady(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let messages = (RATE * (seconds + WARM_UP_SECONDS)) as f64;

    let cluster = Cluster::start(bench, "steady", 1).await?;
    let before = cluster.cpu_seconds()?;
    let ours = bench.imload_result(&steady_arguments(cluster.mqtt, RATE as f64, PEERS, seconds, false)).await?;
    let between = cluster.cpu_seconds()?;
    complete(&ours)?;
    complete(&bench.imload_result(&steady_arguments(cluster.mqtt, RATE as f64, 0, seconds, false)).await?)?;
    let after = cluster.cpu_seconds()?;
    let (our_cpu, our_cpu_cold) = ((between - before) / messages * 1e6, (after - between) / messages * 1e6);
    let our_highest = highest_rate(bench, cluster.mqtt, false).await?;
    let recorded =
        find(&cluster.data_dir(), "messages.sqlite").ok_or("the store's file is not in the data directory")?;
    cluster.stop().await?;

    let mosquitto = Mosquitto::start(bench).await?;
    let before = cpu_seconds(mosquitto.pid());
    let theirs = bench.imload_result(&steady_arguments(mosquitto.address, RATE as f64, PEERS, seconds, true)).await?;
    let their_cpu = (cpu_seconds(mosquitto.pid()) - before) / messages * 1e6;
    complete(&theirs)?;
    let their_highest = highest_rate(bench, mosquitto.address, true).await?;
    drop(mosquitto);

    let copy = bench.folder("bare")?.join("bare.sqlite");
    let length = Duration::from_secs(seconds);
    let bare =
        tokio::task::spawn_blocking(move || bare::group_commit_round_trip(&recorded, &copy, RATE, length)).await?;
    let bare = bare.unwrap_or_else(|error| {
        eprintln!("imbench: the bare group commit: {error}");
        new_latency_histogram()
    });
    for (name, quantile, path, wanted) in [
        ("ack p50 at 5,000/s, 200 clients", 0.5, "/ackMillis/p50", Wanted::Shown),
        ("ack p99 at 5,000/s, 200 clients", 0.99, "/ackMillis/p99", Wanted::AtMost(3.0)),
    ] {
        let peer = bare.value_at_quantile(quantile) as f64 / 1_000.0;
        table.add(name, "ms", number(&ours, path)?, "bare group commit, same rate", peer, wanted);
    }
    let (delivery, peer) = (number(&ours, "/deliveryMillis/p99")?, number(&theirs, "/deliveryMillis/p99")?);
    table.add("delivery p99 at 5,000/s", "ms", delivery, "mosquitto (not durable)", peer, Wanted::Shown);
    table.add("CPU per message, all tiers", "µs", our_cpu, "mosquitto (not durable)", their_cpu, Wanted::AtMost(3.0));
    let cold = "the same, anybody writes to anybody";
    table.add(cold, "µs", our_cpu_cold, "mosquitto (not durable)", their_cpu, Wanted::Shown);
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
        let result = bench.imload_result(&steady_arguments(address, rate, PEERS, 3, broker)).await?;
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
    table.add(&name, "KiB", ours, "limit", 4.0, Wanted::AtMost(1.0));
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
