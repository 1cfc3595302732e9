//! Live rooms with real processes: what is counted stays exact when members die and shards move, slow viewers cost nobody but themselves,
//! and chat on the same connections keeps its guarantees.

mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::select_ok;
use hyper::Method;
use im_e2e::{
    api::{ApiError, Credential},
    client::{Connection, Options},
    wire::{self, Packet, Publish, Version},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Cluster, Template, TestResult, eventually};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::{Instant, interval, timeout},
};

/// One system at a time: they would take the processor from each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// No promise, only the point from which something hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// The promise: the viewers of a killed gateway are out of the room's statistics within this time.
const GONE_WITHIN: Duration = Duration::from_secs(3);
const VIEWERS: u64 = 24;
const ROOM: &str = "stage";

/// What viewers did and saw.
#[derive(Default)]
struct Tally {
    /// Likes written to a socket.
    liked: AtomicU64,
    /// Of these, acknowledged.
    acked: AtomicU64,
    /// Room messages received.
    received: AtomicU64,
    /// Messages that came twice or in the wrong order on one connection.
    out_of_order: AtomicU64,
    /// In the room now.
    inside: AtomicU64,
}

impl Tally {
    fn of(&self, counter: impl Fn(&Self) -> &AtomicU64) -> u64 {
        counter(self).load(Ordering::Relaxed)
    }
}

/// One connection, in the room, that likes while it is told to.
struct Viewer {
    task: JoinHandle<()>,
}

impl Viewer {
    async fn enter(
        server: SocketAddr,
        name: String,
        tally: Arc<Tally>,
        mut likes: watch::Receiver<bool>,
    ) -> TestResult<Self> {
        let mut options = Options::new(server, name, "tv");
        options.clean_start = true;
        let (mut connection, _) = Connection::open(&options, true).await?;
        subscribe(&mut connection, &format!("r/{ROOM}")).await?;
        tally.inside.fetch_add(1, Ordering::Relaxed);
        let task = tokio::spawn(async move {
            let mut pace = interval(Duration::from_millis(20));
            let (mut next_id, mut last, mut open) = (1_u16, 0, 0);
            loop {
                let may_like = *likes.borrow_and_update() && open < 16;
                tokio::select! {
                    packet = connection.next() => match packet {
                        Ok(Packet::PubAck { code, .. }) => {
                            open -= 1;
                            tally.acked.fetch_add(u64::from(code == 0), Ordering::Relaxed);
                        }
                        Ok(Packet::Publish { payload, .. }) => {
                            let number = std::str::from_utf8(&payload).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
                            tally.received.fetch_add(1, Ordering::Relaxed);
                            tally.out_of_order.fetch_add(u64::from(number <= last), Ordering::Relaxed);
                            last = number;
                        }
                        Ok(_) => {}
                        Err(_) => break,
                    },
                    _ = pace.tick(), if may_like => {
                        let topic = format!("r/{ROOM}/like");
                        publish(&mut connection, &topic, b"", next_id);
                        next_id = next_id % 60_000 + 1;
                        open += 1;
                        tally.liked.fetch_add(1, Ordering::Relaxed);
                        if connection.flush().await.is_err() {
                            break;
                        }
                    }
                    changed = likes.changed() => if changed.is_err() { break },
                }
            }
            tally.inside.fetch_sub(1, Ordering::Relaxed);
        });
        Ok(Self { task })
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn publish(connection: &mut Connection, topic: &str, payload: &[u8], packet_id: u16) {
    let qos = u8::from(packet_id != 0);
    let publish = Publish { topic, payload, qos, retain: false, dup: false, packet_id, id: None };
    wire::encode_publish(Version::V5, &publish, connection.write_buffer());
}

async fn subscribe(connection: &mut Connection, filter: &str) -> TestResult {
    wire::encode_subscribe(Version::V5, 1, filter, 0, connection.write_buffer());
    connection.flush().await?;
    loop {
        match timeout(PATIENCE, connection.next()).await?? {
            Packet::SubAck { codes, .. } if codes.iter().all(|code| *code < 0x80) => return Ok(()),
            Packet::SubAck { codes, .. } => return Err(format!("{filter} is refused: {codes:x?}").into()),
            _ => {}
        }
    }
}

/// Publishes and waits for the PUBACK's code.
async fn say(connection: &mut Connection, topic: &str, payload: &[u8], packet_id: u16) -> TestResult<u8> {
    publish(connection, topic, payload, packet_id);
    connection.flush().await?;
    loop {
        if let Packet::PubAck { packet_id: answered, code, .. } = timeout(PATIENCE, connection.next()).await??
            && answered == packet_id
        {
            return Ok(code);
        }
    }
}

async fn room(cluster: &Cluster) -> TestResult<Value> {
    let who = Credential::Insecure("watcher".to_owned());
    Ok(cluster.api().request(Method::GET, &format!("/v1/rooms/{ROOM}"), &who, None).await?)
}

/// Waits until the room says so many viewers and, at least, likes.
async fn room_says(cluster: &Cluster, viewers: u64, likes: u64, within: Duration) -> TestResult<u64> {
    let mut last = Value::Null;
    let says = eventually("the room's statistics", within, async || {
        last = room(cluster).await.ok()?;
        let total = last["likes"].as_u64()?;
        (last["viewers"] == viewers && total >= likes).then_some(total)
    })
    .await;
    says.map_err(|error| format!("{error}: {viewers} viewers and {likes} likes are expected, it says {last}").into())
}

async fn enter_all(cluster: &Cluster, tally: &Arc<Tally>, likes: &watch::Sender<bool>) -> TestResult<Vec<Viewer>> {
    let mut viewers = Vec::new();
    for number in 0..VIEWERS {
        let name = format!("viewer{number}");
        viewers.push(Viewer::enter(cluster.mqtt(), name, tally.clone(), likes.subscribe()).await?);
    }
    Ok(viewers)
}

/// Somebody who talks all the time; a number counts up, so that each viewer can see the order.
fn talk(server: SocketAddr) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut number = 0_u64;
        let mut pace = interval(Duration::from_millis(10));
        loop {
            let Ok((mut connection, _)) = Connection::open(&Options::new(server, "star", "mic"), true).await else {
                pace.tick().await;
                continue;
            };
            loop {
                pace.tick().await;
                number += 1;
                publish(&mut connection, &format!("r/{ROOM}"), number.to_string().as_bytes(), 0);
                if connection.flush().await.is_err() {
                    break;
                }
            }
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn likes_are_exact_when_owners_die_and_shards_move() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start(Template::new()?.with_members(2, 2)).await?;
    let (tally, likes) = (Arc::new(Tally::default()), watch::Sender::new(true));
    let viewers = enter_all(&cluster, &tally, &likes).await?;
    let talking = talk(cluster.mqtt());
    room_says(&cluster, VIEWERS, 50, PATIENCE).await?;
    // Every owner dies once, then all shards move to a third and back.
    for member in cluster.members_of("business")? {
        cluster.signal(&member, Signal::KILL)?;
        let before = tally.of(|tally| &tally.acked);
        cluster.wait_restarted(&member, PATIENCE).await?;
        eventually("likes are acknowledged again", PATIENCE, async || {
            (tally.of(|tally| &tally.acked) > before + 50).then_some(())
        })
        .await?;
    }
    for count in [1, 2] {
        cluster.edit(|template| template.business = (count, count))?;
        cluster.wait_members("business", count as usize, PATIENCE * 2).await?;
    }
    likes.send_replace(false);
    eventually("every like is acknowledged", PATIENCE, async || {
        (tally.of(|tally| &tally.acked) == tally.of(|tally| &tally.liked)).then_some(())
    })
    .await?;
    let liked = tally.of(|tally| &tally.liked);
    let total = room_says(&cluster, VIEWERS, liked, PATIENCE).await?;
    assert_eq!(total, liked, "each like counts once");
    assert_eq!(tally.of(|tally| &tally.inside), VIEWERS, "nobody was cut off");
    // The room itself came along: it is heard by all.
    let heard = tally.of(|tally| &tally.received);
    eventually("the room is heard by all", PATIENCE, async || {
        (tally.of(|tally| &tally.received) > heard + 5 * VIEWERS).then_some(())
    })
    .await?;
    assert_eq!(tally.of(|tally| &tally.out_of_order), 0);
    talking.abort();
    drop(viewers);
    room_says(&cluster, 0, liked, PATIENCE).await?;
    cluster.stop().await
}

/// Rooms enough for some of them to be in shards that move.
const MOVED_ROOMS: u64 = 8;
const UNANSWERED_MAX: usize = 64;

/// Enters all those rooms and remembers which numbers came.
async fn hear(server: SocketAddr, name: String, heard: Arc<Mutex<BTreeSet<u64>>>) -> TestResult<JoinHandle<()>> {
    let (mut connection, _) = Connection::open(&Options::new(server, name, "tv"), true).await?;
    for room in 0..MOVED_ROOMS {
        subscribe(&mut connection, &format!("r/moved{room}")).await?;
    }
    Ok(tokio::spawn(async move {
        while let Ok(packet) = connection.next().await {
            if let Packet::Publish { payload, .. } = packet {
                let number: Option<u64> = std::str::from_utf8(&payload).ok().and_then(|text| text.parse().ok());
                heard.lock().await.extend(number);
            }
        }
    }))
}

/// Talks in all those rooms in turn, without waiting for answers, until it is told to stop; gives the numbers that were acknowledged.
async fn talk_in_all(server: SocketAddr, mut stop: watch::Receiver<bool>) -> TestResult<BTreeSet<u64>> {
    let (mut connection, _) = Connection::open(&Options::new(server, "star", "mic"), true).await?;
    let mut pace = interval(Duration::from_millis(3));
    let (mut number, mut open, mut acked) = (0_u64, BTreeMap::new(), BTreeSet::new());
    loop {
        let is_over = *stop.borrow_and_update();
        if is_over && open.is_empty() {
            return Ok(acked);
        }
        tokio::select! {
            packet = connection.next() => {
                if let Packet::PubAck { packet_id, code, .. } = packet?
                    && let Some(number) = open.remove(&packet_id)
                    && code == 0
                {
                    acked.insert(number);
                }
            }
            _ = pace.tick(), if !is_over && open.len() < UNANSWERED_MAX => {
                number += 1;
                let packet_id = (number % 60_000 + 1) as u16;
                open.insert(packet_id, number);
                let topic = format!("r/moved{}", number % MOVED_ROOMS);
                publish(&mut connection, &topic, number.to_string().as_bytes(), packet_id);
                connection.flush().await?;
            }
            _ = stop.changed() => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_owner_took_is_heard_while_shards_move() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start(Template::new()?.with_members(2, 2)).await?;
    let mut listeners = Vec::new();
    for number in 0..6 {
        let heard = Arc::new(Mutex::new(BTreeSet::new()));
        let task = hear(cluster.mqtt(), format!("listener{number}"), heard.clone()).await?;
        listeners.push((heard, task));
    }
    let stop = watch::Sender::new(false);
    let talking = tokio::spawn(talk_in_all(cluster.mqtt(), stop.subscribe()));
    for count in [1, 2, 1] {
        cluster.edit(|template| template.business = (count, count))?;
        cluster.wait_members("business", count as usize, PATIENCE * 2).await?;
    }
    stop.send_replace(true);
    let acked = timeout(PATIENCE, talking).await???;
    println!("{} messages were acknowledged", acked.len());
    assert!(acked.len() > 500);
    for (heard, task) in listeners {
        let missing = async || acked.difference(&*heard.lock().await).copied().collect::<Vec<_>>();
        let all = eventually("everybody hears all", PATIENCE, async || missing().await.is_empty().then_some(())).await;
        let missing = missing().await;
        all.map_err(|error| format!("{error}: {} are missing, from {:?} on", missing.len(), missing.first()))?;
        task.abort();
    }
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_takes_its_viewers_with_it_and_only_what_it_had_not_sent() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?.with_members(2, 1)).await?;
    let (tally, likes) = (Arc::new(Tally::default()), watch::Sender::new(true));
    let viewers = enter_all(&cluster, &tally, &likes).await?;
    room_says(&cluster, VIEWERS, 200, PATIENCE).await?;
    let gateway = cluster.members_of("gateway")?.into_iter().next().ok_or("no gateway runs")?;
    cluster.signal(&gateway, Signal::KILL)?;
    let killed = Instant::now();
    let left = eventually("its connections broke", PATIENCE, async || {
        let inside = tally.of(|tally| &tally.inside);
        (inside < VIEWERS).then_some(inside)
    })
    .await?;
    // The kernel ends all its connections at once; a moment later the number stands.
    let left = eventually("the rest stays", PATIENCE, async || {
        let now = room(&cluster).await.ok()?["viewers"].as_u64()?;
        let inside = tally.of(|tally| &tally.inside);
        (now == inside && now <= left).then_some(inside)
    })
    .await?;
    let took = killed.elapsed();
    println!("{} of {VIEWERS} viewers were gone {took:?} after their gateway", VIEWERS - left);
    assert!(took <= GONE_WITHIN, "{took:?}");
    likes.send_replace(false);
    let (liked, acked) = (tally.of(|tally| &tally.liked), tally.of(|tally| &tally.acked));
    let total = room_says(&cluster, left, acked, PATIENCE).await?;
    assert!((acked..=liked).contains(&total), "{acked} acknowledged ≤ {total} counted ≤ {liked} sent");
    drop(viewers);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_gateway_takes_its_viewers_with_it_until_it_goes_on() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?.with_members(2, 1)).await?;
    let (tally, likes) = (Arc::new(Tally::default()), watch::Sender::new(false));
    let viewers = enter_all(&cluster, &tally, &likes).await?;
    room_says(&cluster, VIEWERS, 0, PATIENCE).await?;
    let gateways = cluster.members_of("gateway")?;
    let gateway = gateways.first().ok_or("no gateway runs")?;
    cluster.signal(gateway, Signal::STOP)?;
    let stopped = Instant::now();
    let left = eventually("its viewers are gone", PATIENCE, async || {
        // Behind the HTTP port, too, only the other one answers from now on. Of so many connections hardly all come to the stopped one,
        // which would cost more time than the bound below leaves.
        let connections = (0..8).map(|_| Box::pin(room(&cluster)));
        let answer = timeout(Duration::from_millis(200), select_ok(connections)).await;
        let (says, _) = answer.ok()?.ok()?;
        let viewers = says["viewers"].as_u64()?;
        (viewers < VIEWERS).then_some(viewers)
    })
    .await;
    let took = stopped.elapsed();
    cluster.signal(gateway, Signal::CONT)?;
    println!("{} of {VIEWERS} viewers were gone {took:?} after their gateway had stopped", VIEWERS - left?);
    assert!(took <= GONE_WITHIN + Duration::from_millis(500), "{took:?}");
    room_says(&cluster, VIEWERS, 0, PATIENCE).await?;
    assert_eq!(tally.of(|tally| &tally.inside), VIEWERS, "nobody was cut off");
    drop(viewers);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_holds_up_nobody_and_keeps_his_chat() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?).await?;
    let (tally, likes) = (Arc::new(Tally::default()), watch::Sender::new(false));
    let viewers = enter_all(&cluster, &tally, &likes).await?;
    let (mut slow, _) = Connection::open(&Options::new(cluster.mqtt(), "slow", "tv"), true).await?;
    subscribe(&mut slow, "inbox/#").await?;
    subscribe(&mut slow, &format!("r/{ROOM}")).await?;
    let (mut star, _) = Connection::open(&Options::new(cluster.mqtt(), "star", "mic"), true).await?;
    let (mut friend, _) = Connection::open(&Options::new(cluster.mqtt(), "friend", "phone"), true).await?;
    let gateway = cluster.members_of("gateway")?.into_iter().next().ok_or("no gateway runs")?;
    let before = resident_bytes(gateway.pid)?;
    // Ten megabytes, more than the buffers of a connection hold; the text is the number, padded in front.
    let mut refused = 0;
    for number in 1..=1_000_u64 {
        let text = format!("{number:010240}");
        while say(&mut star, &format!("r/{ROOM}"), text.as_bytes(), 7).await? != 0 {
            refused += 1;
        }
        if number % 50 == 0 {
            let code = say(&mut friend, "u/slow", number.to_string().as_bytes(), 9).await?;
            assert_eq!(code, 0, "chat goes on");
        }
    }
    eventually("everybody else gets all", PATIENCE, async || {
        (tally.of(|tally| &tally.received) == 1_000 * VIEWERS).then_some(())
    })
    .await?;
    assert_eq!(tally.of(|tally| &tally.out_of_order), 0);
    let grown = resident_bytes(gateway.pid)?.saturating_sub(before);
    println!("the gateway grew by {} KiB, {refused} messages were put off", grown >> 10);
    assert!(grown < 48 << 20, "{grown} bytes more");
    // He reads at last.
    let (mut chat, mut last) = (BTreeMap::new(), 0_u64);
    while chat.len() < 20 {
        if let Packet::Publish { topic, payload, packet_id, .. } = timeout(PATIENCE, slow.next()).await?? {
            let number: u64 = std::str::from_utf8(&payload)?.parse()?;
            if topic.starts_with("inbox/") {
                chat.insert(number, topic);
                wire::encode_puback(packet_id.unwrap_or(0), slow.write_buffer());
                slow.flush().await?;
            } else {
                assert!(number > last, "what comes of the room is in order");
                last = number;
            }
        }
    }
    assert!(chat.keys().copied().eq((1..=20).map(|part| part * 50)), "{chat:?}");
    drop(viewers);
    cluster.stop().await
}

/// Publishers with QoS 0, whom nobody answers, and viewers none of whom reads: what does not fit is lost, and it is lost by them.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_nobody_reads_fills_no_memory_and_holds_up_nobody() -> TestResult {
    const FLOOD_TIME: Duration = Duration::from_secs(12);
    /// A gateway's requests without an answer alone may be 64 MiB.
    const GROWN_MAX: u64 = 128 << 20;
    let _turn = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?).await?;
    let mut deaf = Vec::new();
    for number in 0..16 {
        let (mut connection, _) =
            Connection::open(&Options::new(cluster.mqtt(), format!("deaf{number}"), "tv"), true).await?;
        subscribe(&mut connection, &format!("r/{ROOM}")).await?;
        deaf.push(connection);
    }
    let (mut listener, _) = Connection::open(&Options::new(cluster.mqtt(), "listener", "tv"), true).await?;
    subscribe(&mut listener, "r/corner").await?;
    let (mut speaker, _) = Connection::open(&Options::new(cluster.mqtt(), "speaker", "mic"), true).await?;
    let members = cluster.members()?;
    let pids: Vec<(String, u32)> = members
        .iter()
        .filter(|member| ["gateway", "business"].contains(&member.role.as_str()))
        .map(|member| (member.name.clone(), member.pid))
        .collect();
    let mut before = Vec::new();
    for (_, pid) in &pids {
        before.push(resident_bytes(*pid)?);
    }
    let flooded = Arc::new(AtomicU64::new(0));
    let floods: Vec<JoinHandle<()>> = (0..16)
        .map(|number| {
            let (server, flooded) = (cluster.mqtt(), flooded.clone());
            tokio::spawn(async move {
                let Ok((mut connection, _)) =
                    Connection::open(&Options::new(server, format!("flood{number}"), "mic"), true).await
                else {
                    return;
                };
                let payload = vec![b'x'; 8 << 10];
                loop {
                    publish(&mut connection, &format!("r/{ROOM}"), &payload, 0);
                    if connection.flush().await.is_err() {
                        return;
                    }
                    flooded.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let (begun, mut delays, mut grown) = (Instant::now(), Vec::new(), vec![0; pids.len()]);
    let mut pace = interval(Duration::from_millis(20));
    while begun.elapsed() < FLOOD_TIME {
        pace.tick().await;
        let said = Instant::now();
        publish(&mut speaker, "r/corner", b"1", 0);
        speaker.flush().await?;
        while !matches!(timeout(PATIENCE, listener.next()).await??, Packet::Publish { .. }) {}
        delays.push(said.elapsed());
        for ((grown, before), (_, pid)) in grown.iter_mut().zip(&before).zip(&pids) {
            *grown = resident_bytes(*pid)?.saturating_sub(*before).max(*grown);
        }
    }
    delays.sort();
    let p99 = delays[delays.len() * 99 / 100];
    println!("{} messages of a flood; p99 of another room {p99:?}", flooded.load(Ordering::Relaxed));
    for ((name, _), grown) in pids.iter().zip(grown) {
        println!("{name} grew by {} KiB", grown >> 10);
        assert!(grown < GROWN_MAX, "{name} grew by {grown} bytes");
    }
    assert!(flooded.load(Ordering::Relaxed) * (8 << 10) > 2 * GROWN_MAX, "the flood is more than may be kept");
    assert!(p99 < Duration::from_secs(1), "{p99:?}");
    floods.iter().for_each(JoinHandle::abort);
    drop(deaf);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn moderators_rule_their_room() -> TestResult {
    let _turn = ONE_AT_A_TIME.lock().await;
    let tokens = std::env::temp_dir().join(format!("im-e2e-tokens-{}", std::process::id()));
    std::fs::write(&tokens, "a-service-token\n")?;
    let mut template = Template::new()?;
    template.auth.push_str(&format!("\n  serviceTokenFile: {}", tokens.display()));
    let cluster = Cluster::start(template).await?;
    let (service, ann) = (Credential::Bearer("a-service-token".to_owned()), Credential::Insecure("ann".to_owned()));
    let api = cluster.api();
    let ask = async |method: Method, path: &str, who: &Credential, body: Value| {
        api.request(method, &format!("/v1/rooms/{ROOM}{path}"), who, Some(&body)).await
    };
    let code = |result: Result<Value, ApiError>| result.err().map(|error| error.to_string()).unwrap_or_default();
    let forbidden = code(ask(Method::POST, "/mute", &ann, json!({"user": "eve", "seconds": 60})).await);
    assert!(forbidden.contains("403"), "{forbidden}");
    ask(Method::PATCH, "", &service, json!({"owner": "ann"})).await?;
    let view = ask(Method::PATCH, "", &ann, json!({"addModerators": ["mo"], "slowModeMilliseconds": 60_000})).await?;
    assert_eq!((&view["owner"], &view["moderators"]), (&json!("ann"), &json!(["mo"])));

    let topic = format!("r/{ROOM}");
    let (mut eve, _) = Connection::open(&Options::new(cluster.mqtt(), "eve", "tv"), true).await?;
    subscribe(&mut eve, &topic).await?;
    assert_eq!(say(&mut eve, &topic, b"1", 1).await?, 0);
    assert_eq!(say(&mut eve, &topic, b"2", 2).await?, 0x83, "slow mode");
    ask(Method::PATCH, "", &ann, json!({"slowModeMilliseconds": 0})).await?;
    assert_eq!(say(&mut eve, &topic, b"3", 3).await?, 0);
    let mo = Credential::Insecure("mo".to_owned());
    ask(Method::POST, "/mute", &mo, json!({"user": "eve", "seconds": 60})).await?;
    assert_eq!(say(&mut eve, &topic, b"4", 4).await?, 0x87, "muted");
    let forbidden = code(ask(Method::POST, "/mute", &mo, json!({"user": "ann", "seconds": 60})).await);
    assert!(forbidden.contains("403"), "{forbidden}");
    ask(Method::POST, "/mute", &ann, json!({"user": "eve", "seconds": 0})).await?;
    assert_eq!(say(&mut eve, &topic, b"5", 5).await?, 0);
    ask(Method::POST, "/kick", &mo, json!({"user": "eve", "seconds": 60})).await?;
    room_says(&cluster, 0, 0, PATIENCE).await?;
    assert!(subscribe(&mut eve, &topic).await.is_err(), "he is kept out");
    let kicked = ask(Method::GET, "", &mo, Value::Null).await?["kicked"].clone();
    assert_eq!(kicked[0]["user"], "eve");
    cluster.stop().await?;
    std::fs::remove_file(tokens)?;
    Ok(())
}

fn resident_bytes(pid: u32) -> TestResult<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}
