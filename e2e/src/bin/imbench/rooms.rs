//! Live rooms: one publisher, many viewers; likes; what a viewer's connection costs. Beside brokers and a bare loop that writes the same
//! bytes to as many sockets. The server has one processor for itself; publisher, viewers and all else have the others.

use std::time::Duration;

use bytes::BytesMut;
use futures::{StreamExt, TryStreamExt, stream};
use hyper::Method;
use im_e2e::api::{Api, Credential};
use im_e2e::audience;
use im_e2e::wire::{self, Publish, Version};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, interval, sleep};

use crate::crowd::{Crowd, Highest, Step, Verdict};
use crate::peers::{BareLoop, Peer, beside_servers, give_servers_processor};
use crate::system::{Bench, Cluster, Shape, cpu_seconds, resident_kib};
use crate::{Outcome, Table, Wanted};

/// Viewers of the room.
pub const VIEWERS: usize = 1_000;
/// The rate at which CPU per delivery is compared, messages per second.
const RATE: f64 = 600.0;
/// What brokers are asked for: at 600 not all could keep up.
const PEER_RATE: f64 = 40.0;
/// The default, and the most that may be configured.
const COALESCE_MS: [u32; 2] = [5, 25];
const COST_TIME: Duration = Duration::from_secs(5);
const HALF_TIME: Duration = Duration::from_secs(3);
/// Allocators keep what logins needed for a while: ten seconds by jemalloc's defaults, and its own thread looks after them now and then.
const ALLOCATOR_PAUSE: Duration = Duration::from_secs(20);
const LOGINS_AT_A_TIME: usize = 32;
const PAUSE: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// The highest rate in time, and the delay at half of it.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn rates(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(async {
        let bare = BareLoop::start(VIEWERS, Duration::from_millis(5)).await?;
        let limit = Crowd::enter(bare.address, VIEWERS).await?.highest_rate().await?;
        bare.stop()?;
        let (cluster, _) = start(bench, COALESCE_MS[0]).await?;
        let mut crowd = Crowd::enter(cluster.mqtt, VIEWERS).await?;
        let ours = crowd.highest_rate().await?;
        let half = at_half(&mut crowd, ours).await?;
        drop(crowd);
        cluster.stop().await?;
        let bare = BareLoop::start(VIEWERS, Duration::from_millis(5)).await?;
        let bare_half = at_half(&mut Crowd::enter(bare.address, VIEWERS).await?, ours).await?;
        bare.stop()?;
        compare(table, ours, "bare loop, at most every 5 ms", limit, Wanted::Shown);
        for (peer, wanted) in [("mosquitto", 8.0), ("nats-server", 2.0), ("mochi", 1.0)] {
            match Peer::start(peer, bench).await {
                Ok(broker) => {
                    let theirs = Crowd::enter(broker.address, VIEWERS).await?.highest_rate().await?;
                    let wanted = if peer == "mochi" { Wanted::Shown } else { Wanted::AtLeast(wanted) };
                    compare(table, ours, peer, theirs, wanted);
                }
                Err(error) => println!("without {peer}: {error}"),
            }
        }
        let Step { p99_ms, p99_least_ms, .. } = half;
        let name = "delivery p99 at half of our rate";
        table.add(name, "ms", p99_ms, "the promise", 10.0, Wanted::AtMost(1.0));
        table.add(name, "ms", p99_ms, "bare loop at that rate", bare_half.p99_ms, Wanted::Shown);
        table.add("… at least: the rest is the reader's lag", "ms", p99_least_ms, "at most", p99_ms, Wanted::Shown);
        Ok(())
    })
    .await
}

/// The median of three steps at half of the highest rate.
async fn at_half(crowd: &mut Crowd, highest: Highest) -> Outcome<Step> {
    let mut halves = Vec::new();
    for _ in 0..3 {
        halves.push(crowd.step(highest.rate / 2.0, HALF_TIME).await?);
    }
    halves.sort_by(|one, other| one.p99_ms.total_cmp(&other.p99_ms));
    Ok(halves[1])
}

fn compare(table: &mut Table, ours: Highest, name: &str, theirs: Highest, wanted: Wanted) {
    let limited = |who: &str, highest: Highest| match highest.is_at_least {
        true => format!("; {who} ≥, limited by the client"),
        false => String::new(),
    };
    let beside = format!("{name}{}{}", limited("ours", ours), limited("theirs", theirs));
    let (ours, theirs) = (ours.deliveries_per_second, theirs.deliveries_per_second);
    table.add("most deliveries, p99 ≤ 100 ms", "/s", ours, beside, theirs, wanted);
}

/// CPU per delivery of the process that holds the viewers' sockets.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn cost(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(async {
        let mut theirs = Vec::new();
        for peer in ["mosquitto", "nats-server", "mochi"] {
            match Peer::start(peer, bench).await {
                Ok(broker) => {
                    let mut crowd = Crowd::enter(broker.address, VIEWERS).await?;
                    theirs.push((peer, cost_of(&mut crowd, PEER_RATE, || broker.cpu_seconds()).await?));
                }
                Err(error) => println!("without {peer}: {error}"),
            }
        }
        for coalesce_ms in COALESCE_MS {
            let bare = BareLoop::start(VIEWERS, Duration::from_millis(coalesce_ms.into())).await?;
            let mut crowd = Crowd::enter(bare.address, VIEWERS).await?;
            let limit = cost_of(&mut crowd, RATE, || bare.cpu_seconds()).await?;
            bare.stop()?;
            drop(crowd);
            let (cluster, gateway) = start(bench, coalesce_ms).await?;
            let mut crowd = Crowd::enter(cluster.mqtt, VIEWERS).await?;
            let ours = cost_of(&mut crowd, RATE, || cpu_seconds(gateway)).await?;
            drop(crowd);
            cluster.stop().await?;
            let name = format!("CPU per delivery at 600/s, {coalesce_ms} ms");
            table.add(&name, "µs", ours.micros, "bare loop that joins as long", limit.micros, Wanted::AtMost(1.5));
            let joined = "… messages that a write carries";
            table.add(joined, "", ours.joined, "bare loop that joins as long", limit.joined, Wanted::Shown);
            for (peer, cost) in &theirs {
                let wanted = if *peer == "mosquitto" { Wanted::AtMost(0.1) } else { Wanted::Shown };
                table.add(&name, "µs", ours.micros, format!("{peer} at 40/s"), cost.micros, wanted);
            }
        }
        Ok(())
    })
    .await
}

/// A system whose gateway has the server's processor; and that gateway's process.
async fn start(bench: &Bench, coalesce_ms: u32) -> Outcome<(Cluster, u32)> {
    let gateway = format!("rooms: {{coalesce: {coalesce_ms}ms}}");
    let shape = Shape { business: 1, gateways: 1, gateway: &gateway };
    let cluster = Cluster::start_with(bench, "rooms", shape).await?;
    let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway runs")?.pid;
    give_servers_processor(gateway).await?;
    Ok((cluster, gateway))
}

/// What a delivery costs.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// CPU time, microseconds.
    micros: f64,
    /// Messages that a write carries: on a busy machine timers are late and more are joined, which makes each cheaper.
    joined: f64,
}

/// The median of three, since other work on the machine shows in single ones.
async fn cost_of(crowd: &mut Crowd, per_second: f64, cpu_seconds: impl Fn() -> f64) -> Outcome<Cost> {
    let mut costs = Vec::new();
    for _ in 0..3 {
        let (before, delivered, joined) = (cpu_seconds(), crowd.delivered(), crowd.joined());
        let step = crowd.step(per_second, COST_TIME).await?;
        if step.verdict != Verdict::Carried {
            println!("  {per_second}/s were not carried: {step:?}");
        }
        let micros = (cpu_seconds() - before) * 1e6 / (crowd.delivered() - delivered).max(1) as f64;
        costs.push(Cost { micros, joined: crowd.joined().since(joined) });
    }
    costs.sort_by(|one, other| one.micros.total_cmp(&other.micros));
    Ok(costs[1])
}

/// Resident memory per idle connection beside the brokers', and what a viewer costs besides his connection.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn memory(bench: &Bench, table: &mut Table, connections: u32) -> Outcome {
    let cluster = Cluster::start(bench, "viewers", 1).await?;
    let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway runs")?.pid;
    let [ours, as_viewer] = resident_per_connection(cluster.mqtt, gateway, connections).await?;
    cluster.stop().await?;
    let name = format!("resident memory per connection ({connections})");
    table.add(&name, "B", ours, "the promise", 1_536.0, Wanted::AtMost(1.0));
    for peer in ["mosquitto", "nats-server", "mochi"] {
        match Peer::start(peer, bench).await {
            Ok(broker) => {
                let [theirs, viewer] = resident_per_connection(broker.address, broker.pid(), connections).await?;
                table.add(&name, "B", ours, peer, theirs, Wanted::Shown);
                table.add("… of a room's viewer besides it", "B", as_viewer, peer, viewer, Wanted::Shown);
            }
            Err(error) => println!("without {peer}: {error}"),
        }
    }
    table.add("… of a room's viewer besides it", "B", as_viewer, "the promise", 100.0, Wanted::AtMost(1.0));
    Ok(())
}

/// Bytes per connection that subscribes nothing, and how much more it is when all of them are in one room.
async fn resident_per_connection(server: std::net::SocketAddr, pid: u32, connections: u32) -> Outcome<[f64; 2]> {
    let before = resident_kib(pid);
    let logins = stream::iter(0..connections)
        .map(|number| async move { audience::enter(server, &format!("idle{number}"), None, None).await });
    let logins: Vec<std::net::TcpStream> = logins.buffer_unordered(LOGINS_AT_A_TIME).try_collect().await?;
    let mut idle = logins.into_iter().map(TcpStream::from_std).collect::<Result<Vec<_>, _>>()?;
    sleep(ALLOCATOR_PAUSE).await;
    let without = resident_kib(pid);
    for connection in &mut idle {
        audience::subscribe(connection, server, "r/stage").await?;
    }
    sleep(ALLOCATOR_PAUSE).await;
    let per_connection = |kib: f64| kib * 1_024.0 / f64::from(connections);
    Ok([per_connection(without - before), per_connection(resident_kib(pid) - without)])
}

/// 200,000 likes per second of a room's viewers into one counter.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn likes(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(count_likes(bench, table)).await
}

async fn count_likes(bench: &Bench, table: &mut Table) -> Outcome {
    const FANS: usize = 1_000;
    const PER_FAN: usize = 1_000;
    let cluster = Cluster::start(bench, "likes", 1).await?;
    let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway runs")?.pid;
    give_servers_processor(gateway).await?;
    let mut fans = Vec::new();
    for number in 0..FANS {
        let stream = audience::enter(cluster.mqtt, &format!("fan{number}"), None, Some("r/loved")).await?;
        fans.push(TcpStream::from_std(stream)?);
    }
    let topic = "r/loved/like";
    let mut packet = BytesMut::new();
    let publish = Publish { topic, payload: b"", qos: 0, retain: false, dup: false, packet_id: 0, id: None };
    // A fifth of a second's worth at a time.
    for _ in 0..40 {
        wire::encode_publish(Version::V311, &publish, &mut packet);
    }
    let packet = packet.freeze();
    let commits = async || -> Outcome<f64> {
        let business = cluster.members_of("business")?.into_iter().next().ok_or("no business member runs")?;
        let admin = business.addresses["admin"].as_str().ok_or("no admin address")?.parse()?;
        let Value::String(text) = Api::new(admin).get("/metrics").await? else { return Err("no metrics".into()) };
        let line = text.lines().find_map(|line| line.strip_prefix("im_commits_total "));
        Ok(line.and_then(|number| number.parse().ok()).ok_or("no im_commits_total")?)
    };
    let total = async || -> Outcome<u64> {
        let who = Credential::Insecure("watcher".to_owned());
        let room = Api::new(cluster.http()).request(Method::GET, "/v1/rooms/loved", &who, None).await?;
        Ok(room["likes"].as_u64().unwrap_or(0))
    };
    sleep(PAUSE).await; // what the logins had to write is written
    let (before, begun) = (commits().await?, Instant::now());
    let mut pace = interval(Duration::from_millis(200));
    for _ in 0..PER_FAN / 40 {
        pace.tick().await;
        for fan in &mut fans {
            fan.write_all(&packet).await?;
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    let sent = (FANS * PER_FAN) as u64;
    let until = Instant::now() + ANSWER_WITHIN;
    while total().await? < sent && Instant::now() < until {
        sleep(Duration::from_millis(50)).await;
    }
    let writes = (commits().await? - before) / begun.elapsed().as_secs_f64();
    let name = format!("likes miscounted, at {:.0}/s", sent as f64 / seconds);
    table.add(name, "", total().await?.abs_diff(sent) as f64, "likes sent", sent as f64, Wanted::AtMost(0.0));
    table.add("store writes for them", "/s", writes, "the promise", 2.0, Wanted::AtMost(1.0));
    cluster.stop().await
}
