//! Live rooms: one publisher, many viewers, beside mosquitto, nats-server (where it is installed) and a bare loop that writes the same bytes
//! to as many sockets. The server has one core for itself; publisher and viewers are this process, on the others.

use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use hdrhistogram::Histogram;
use hyper::Method;
use im_e2e::api::{Api, Credential};
use im_e2e::client::{Connection, Options};
use im_e2e::wire::{self, Packet, Publish, Version};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::system::{
    Bench, Cluster, Mosquitto, cpu_seconds, free_addresses, listens, resident_kib, thread_cpu_seconds,
};
use crate::{Outcome, Table, Wanted};

const VIEWERS: usize = 1_000;
const PAYLOAD_BYTES: usize = 128;
const TOPIC: &str = "r/stage";
/// The first bytes of a payload: microseconds since the start, in decimal.
const STAMP_BYTES: usize = 16;
/// The rate at which CPU per delivery is compared, messages per second.
const RATE: f64 = 600.0;
/// What mosquitto is asked for: at 600 it could not keep up.
const PEER_RATE: f64 = 40.0;
/// A rate counts as carried while deliveries are no later than this, milliseconds.
const LATE_MS: f64 = 100.0;
const STEP: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// All of it.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn rooms(bench: &Bench, table: &mut Table) -> Outcome {
    let per_delivery = "CPU per delivery, 1,000 viewers";
    let (mosquitto, their_cpu) = {
        let mosquitto = Mosquitto::start(bench).await?;
        pin(mosquitto.pid()).await?;
        let mut crowd = Crowd::enter(mosquitto.address).await?;
        let cpu = cpu_per_delivery(&mut crowd, PEER_RATE, || cpu_seconds(mosquitto.pid())).await?;
        (crowd.highest_rate().await?, cpu)
    };
    let nats = match Nats::start(bench).await {
        Err(error) => {
            println!("without nats-server: {error}");
            None
        }
        Ok(nats) => {
            pin(nats.child.id().unwrap_or(0)).await?;
            Some(Crowd::enter(nats.address).await?.highest_rate().await?)
        }
    };
    for coalesce_ms in [5_u32, 25] {
        let cluster = Cluster::start_with(bench, "rooms", 1, &format!("rooms: {{coalesce: {coalesce_ms}ms}}")).await?;
        let gateway = cluster.members_of("gateway")?.into_iter().next().ok_or("no gateway runs")?.pid;
        pin(gateway).await?;
        let mut crowd = Crowd::enter(cluster.mqtt).await?;
        let cpu = cpu_per_delivery(&mut crowd, RATE, || cpu_seconds(gateway)).await?;
        let joined = (RATE * f64::from(coalesce_ms) / 1_000.0).max(1.0);
        let bare = bare_loop(joined as usize).await?;
        let beside = format!("bare loop that joins {joined}");
        table.add(format!("{per_delivery}, {coalesce_ms} ms"), "µs", cpu, beside, bare, Wanted::AtMost(1.5));
        let beside = "mosquitto at 40 messages/s";
        table.add(format!("{per_delivery}, {coalesce_ms} ms"), "µs", cpu, beside, their_cpu, Wanted::AtMost(0.1));
        if coalesce_ms == 5 {
            let rate = crowd.highest_rate().await?;
            table.add("most deliveries, p99 ≤ 100 ms", "/s", rate, "mosquitto", mosquitto, Wanted::AtLeast(8.0));
            if let Some(nats) = nats {
                table.add("most deliveries, p99 ≤ 100 ms", "/s", rate, "nats-server", nats, Wanted::AtLeast(2.0));
            }
            let half = crowd.step(rate / VIEWERS as f64 / 2.0).await?;
            table.add("delivery p99 at half of it", "ms", half.p99_ms, "the promise", 10.0, Wanted::AtMost(1.0));
            likes(&cluster, table).await?;
        }
        drop(crowd);
        cluster.stop().await?;
    }
    Ok(())
}

/// What a viewer costs a gateway besides its connection.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn memory(bench: &Bench, table: &mut Table, connections: u32) -> Outcome {
    let cluster = Cluster::start(bench, "viewers", 1).await?;
    let gateway = cluster.members_of("gateway")?.into_iter().next().ok_or("no gateway runs")?.pid;
    let mut idle = Vec::new();
    for number in 0..connections {
        let mut options = Options::new(cluster.mqtt, format!("idle{number}"), "tv");
        options.keep_alive_seconds = 0;
        idle.push(Connection::open(&options, true).await?.0);
    }
    sleep(STEP).await; // buffers of the logins are given back within a second
    let before = resident_kib(gateway);
    for connection in &mut idle {
        subscribe(connection, TOPIC).await?;
    }
    sleep(STEP).await;
    let bytes = (resident_kib(gateway) - before) * 1_024.0 / f64::from(connections);
    table.add("memory per viewer, besides its connection", "B", bytes, "the promise", 100.0, Wanted::AtMost(1.0));
    drop(idle);
    cluster.stop().await
}

/// Leaves one core to a process.
async fn pin(pid: u32) -> Outcome {
    let mut command = Command::new("taskset");
    command.args(["-a", "-p", "-c", "0", &pid.to_string()]).stdout(Stdio::null());
    if command.status().await?.success() { Ok(()) } else { Err("taskset failed; install util-linux".into()) }
}

async fn subscribe(connection: &mut Connection, filter: &str) -> Outcome {
    wire::encode_subscribe(Version::V5, 1, filter, 0, connection.write_buffer());
    connection.flush().await?;
    loop {
        if let Packet::SubAck { codes, .. } = timeout(ANSWER_WITHIN, connection.next()).await?? {
            return if codes.iter().all(|code| *code < 0x80) { Ok(()) } else { Err("SUBSCRIBE is refused".into()) };
        }
    }
}

/// Viewers and what they see.
struct Crowd {
    seen: Arc<Seen>,
    viewers: Vec<JoinHandle<()>>,
    publisher: TcpStream,
}

struct Seen {
    started: Instant,
    delivered: AtomicU64,
    /// Of one viewer in fifty, microseconds from the schedule to the viewer.
    late: parking_lot::Mutex<Histogram<u64>>,
}

/// What came of one rate.
struct Step {
    deliveries_per_second: f64,
    p99_ms: f64,
    is_carried: bool,
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.viewers.iter().for_each(JoinHandle::abort);
    }
}

impl Crowd {
    /// MQTT 3.1.1, so that every server sends the same bytes.
    async fn enter(server: SocketAddr) -> Outcome<Self> {
        let late = parking_lot::Mutex::new(Histogram::new_with_max(60_000_000, 3)?);
        let seen = Arc::new(Seen { started: Instant::now(), delivered: AtomicU64::new(0), late });
        let mut viewers = Vec::new();
        for number in 0..VIEWERS {
            let mut stream = login(server, &format!("viewer{number}")).await?;
            let mut request = BytesMut::new();
            wire::encode_subscribe(Version::V311, 1, TOPIC, 0, &mut request);
            stream.write_all(&request).await?;
            let mut answer = [0; 5];
            timeout(ANSWER_WITHIN, stream.read_exact(&mut answer)).await??;
            if answer[0] != 0x90 || answer[4] >= 0x80 {
                return Err(format!("{server} refuses SUBSCRIBE: {answer:x?}").into());
            }
            viewers.push(tokio::spawn(watch(stream, seen.clone(), number % 50 == 0)));
        }
        Ok(Self { seen, viewers, publisher: login(server, "star").await? })
    }

    /// Publishes at a rate for a while.
    async fn publish(&mut self, per_second: f64, time: Duration) -> Outcome<u64> {
        let begun = Instant::now();
        let (mut sent, mut packets) = (0_u64, BytesMut::new());
        let mut tick = interval(Duration::from_millis(1));
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        while begun.elapsed() < time {
            tick.tick().await;
            let due = (begun.elapsed().as_secs_f64() * per_second) as u64;
            while sent < due {
                let scheduled = begun + Duration::from_secs_f64(sent as f64 / per_second);
                let micros = scheduled.duration_since(self.seen.started).as_micros();
                let payload = format!("{micros:0STAMP_BYTES$}{:x<rest$}", "", rest = PAYLOAD_BYTES - STAMP_BYTES);
                let publish = Publish {
                    topic: TOPIC,
                    payload: payload.as_bytes(),
                    qos: 0,
                    retain: false,
                    dup: false,
                    packet_id: 0,
                    id: None,
                };
                wire::encode_publish(Version::V311, &publish, &mut packets);
                sent += 1;
            }
            self.publisher.write_all_buf(&mut packets).await?;
        }
        Ok(sent)
    }

    async fn step(&mut self, per_second: f64) -> Outcome<Step> {
        self.seen.late.lock().reset();
        let before = self.seen.delivered.load(Ordering::Relaxed);
        let sent = self.publish(per_second, STEP).await?;
        let wanted = sent * VIEWERS as u64;
        let until = Instant::now() + Duration::from_millis(LATE_MS as u64 * 3);
        let delivered = loop {
            let delivered = self.seen.delivered.load(Ordering::Relaxed) - before;
            if delivered >= wanted || Instant::now() > until {
                break delivered;
            }
            sleep(Duration::from_millis(5)).await;
        };
        let p99_ms = self.seen.late.lock().value_at_quantile(0.99) as f64 / 1_000.0;
        let is_carried = p99_ms <= LATE_MS && delivered as f64 >= 0.99 * wanted as f64;
        Ok(Step { deliveries_per_second: delivered as f64 / STEP.as_secs_f64(), p99_ms, is_carried })
    }

    /// The most deliveries per second that are in time.
    async fn highest_rate(&mut self) -> Outcome<f64> {
        let (mut rate, mut best) = (20.0, 0.0_f64);
        let mut failed = 0;
        while failed < 2 && rate < 100_000.0 {
            let step = self.step(rate).await?;
            if step.is_carried {
                (best, failed) = (best.max(step.deliveries_per_second), 0);
                rate *= 1.4;
            } else {
                failed += 1;
                // What is still under way must not count in the next step.
                sleep(STEP).await;
            }
        }
        Ok(best)
    }
}

async fn login(server: SocketAddr, name: &str) -> Outcome<TcpStream> {
    let mut stream = TcpStream::connect(server).await?;
    stream.set_nodelay(true)?;
    let mut request = BytesMut::new();
    let connect = wire::Connect {
        user: name,
        password: None,
        client_id: name,
        clean_start: true,
        keep_alive_seconds: 0,
        session_expiry_seconds: 0,
        receive_maximum: None,
    };
    wire::encode_connect(Version::V311, &connect, &mut request);
    stream.write_all(&request).await?;
    let mut answer = [0; 4];
    timeout(ANSWER_WITHIN, stream.read_exact(&mut answer)).await??;
    if answer[3] == 0 { Ok(stream) } else { Err(format!("{server} refuses CONNECT: {answer:x?}").into()) }
}

/// Counts what comes; all packets have one length.
async fn watch(mut stream: TcpStream, seen: Arc<Seen>, is_timed: bool) {
    let header = 3 + 2 + TOPIC.len();
    let packet = header + PAYLOAD_BYTES;
    let (mut buffer, mut filled) = (vec![0; 64 << 10], 0);
    while let Ok(read) = stream.read(&mut buffer[filled..]).await {
        if read == 0 {
            return;
        }
        filled += read;
        let whole = filled / packet;
        seen.delivered.fetch_add(whole as u64, Ordering::Relaxed);
        if is_timed && whole > 0 {
            let now = seen.started.elapsed().as_micros() as u64;
            let mut late = seen.late.lock();
            for stamp in buffer[..whole * packet].chunks(packet).map(|bytes| &bytes[header..header + STAMP_BYTES]) {
                let scheduled = std::str::from_utf8(stamp).ok().and_then(|text| text.parse::<u64>().ok());
                late.saturating_record(scheduled.map_or(u64::MAX, |scheduled| now.saturating_sub(scheduled)));
            }
        }
        buffer.copy_within(whole * packet..filled, 0);
        filled -= whole * packet;
    }
}

/// Microseconds.
async fn cpu_per_delivery(crowd: &mut Crowd, per_second: f64, cpu: impl Fn() -> f64) -> Outcome<f64> {
    let (before, delivered) = (cpu(), crowd.seen.delivered.load(Ordering::Relaxed));
    crowd.publish(per_second, STEP * 3).await?;
    sleep(Duration::from_millis(200)).await;
    let delivered = crowd.seen.delivered.load(Ordering::Relaxed) - delivered;
    Ok((cpu() - before) * 1e6 / delivered.max(1) as f64)
}

/// CPU per delivery of a thread that does nothing but write `joined` packets at a time to each socket, microseconds.
async fn bare_loop(joined: usize) -> Outcome<f64> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let is_over = Arc::new(AtomicBool::new(false));
    let over = is_over.clone();
    let writer = std::thread::spawn(move || -> std::io::Result<f64> {
        use std::io::Write;
        let mut sockets = Vec::new();
        for _ in 0..VIEWERS {
            let (socket, _) = listener.accept()?;
            socket.set_nodelay(true)?;
            sockets.push(socket);
        }
        let batch = vec![b'x'; joined * (5 + TOPIC.len() + PAYLOAD_BYTES)];
        let pause = Duration::from_secs_f64(joined as f64 / RATE);
        let (before, mut deliveries) = (thread_cpu_seconds(), 0);
        while !over.load(Ordering::Relaxed) {
            let next = std::time::Instant::now() + pause;
            for socket in &mut sockets {
                socket.write_all(&batch)?;
            }
            deliveries += sockets.len() * joined;
            std::thread::sleep(next.saturating_duration_since(std::time::Instant::now()));
        }
        Ok((thread_cpu_seconds() - before) * 1e6 / deliveries.max(1) as f64)
    });
    let mut readers = Vec::new();
    for _ in 0..VIEWERS {
        let mut stream = TcpStream::connect(address).await?;
        readers.push(tokio::spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while stream.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
        }));
    }
    sleep(STEP * 3).await;
    is_over.store(true, Ordering::Relaxed);
    let cost = tokio::task::spawn_blocking(move || writer.join()).await?.map_err(|_| "the bare loop's thread ended")?;
    readers.iter().for_each(JoinHandle::abort);
    Ok(cost?)
}

/// 200,000 likes per second into one counter.
async fn likes(cluster: &Cluster, table: &mut Table) -> Outcome {
    const FANS: usize = 1_000;
    const PER_FAN: usize = 1_000;
    let mut fans = Vec::new();
    for number in 0..FANS {
        fans.push(login(cluster.mqtt, &format!("fan{number}")).await?);
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
    sleep(STEP).await; // what the logins had to write is written
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
    let name = format!("likes counted, at {:.0}/s", sent as f64 / seconds);
    table.add(name, "", total().await? as f64, "likes sent", sent as f64, Wanted::Shown);
    table.add("store writes for them", "/s", writes, "the promise", 2.0, Wanted::AtMost(1.0));
    Ok(())
}

/// nats-server with its MQTT door.
struct Nats {
    address: SocketAddr,
    child: Child,
}

impl Nats {
    async fn start(bench: &Bench) -> Outcome<Self> {
        let folder = bench.folder("nats")?;
        let [address, client] = free_addresses()?;
        let text = format!(
            "server_name: bench\nlisten: \"{client}\"\njetstream {{store_dir: \"{}\"}}\nmqtt {{listen: \"{address}\"}}\n",
            folder.display()
        );
        let file = folder.join("nats.conf");
        std::fs::write(&file, text)?;
        let mut command = Command::new("nats-server");
        command.arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
        let child = command.spawn().map_err(|error| format!("{error}; install the package nats-server"))?;
        listens(address).await?;
        Ok(Self { address, child })
    }
}
