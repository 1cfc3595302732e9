//! Bad input and trouble: what is refused, with which words, what is closed, and what goes on meanwhile.

mod support;

use std::{
    fs::{self, File},
    io::Write as _,
    net::SocketAddr,
    path::PathBuf,
    time::Duration,
};

use bytes::{BufMut, BytesMut};
use futures::{StreamExt, stream};
use hyper::Method;
use im_e2e::{
    api::{Api, ApiError, Credential},
    client::{ClientError, Connection, Options, Outcome},
    view::Member,
    wire::{self, Packet, Version},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Chat, Cluster, Template, TestResult, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::Mutex,
    time::{Instant, timeout},
};

/// One system at a time: they would take the processor from each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// An answer that needs no waiting comes within this time, also on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(10);
/// All is delivered and checked within this time after the last message.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// One counter or gauge of a member's `/metrics`; 0 if it is not there yet.
async fn metric(member: &Member, line: &str) -> TestResult<f64> {
    let address: SocketAddr = member.addresses["admin"].as_str().ok_or("no admin address")?.parse()?;
    let text = Api::new(address).get("/metrics").await?;
    let text = text.as_str().ok_or("/metrics is no text")?;
    let value = text.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
    Ok(value.unwrap_or_default())
}

fn refused(reason: &str) -> String {
    format!("im_refused_total{{reason=\"{reason}\"}}")
}

// ---- what MQTT has words for --------------------------------------------------------------------------------------------

/// A connection, and a packet id for each question.
struct Dialog {
    connection: Connection,
    version: Version,
    packet_id: u16,
}

impl Dialog {
    async fn open(cluster: &Cluster, version: Version, user: &str) -> TestResult<Self> {
        let mut options = Options::new(cluster.mqtt(), user, "raw");
        options.version = version;
        let (connection, _) = Connection::open(&options, true).await?;
        Ok(Self::over(connection, version))
    }

    fn over(connection: Connection, version: Version) -> Self {
        Self { connection, version, packet_id: 0 }
    }

    /// The next packet that is no read mark: those come at any time, also before a SUBACK, and answer nothing.
    async fn next(&mut self) -> TestResult<Result<Packet, ClientError>> {
        self.connection.flush().await?;
        loop {
            match timeout(ANSWERED_WITHIN, self.connection.next()).await.map_err(|_| "no answer")? {
                Ok(Packet::Publish { topic, .. }) if topic.starts_with("inbox/read/") => {}
                next => return Ok(next),
            }
        }
    }

    /// Publishes and gives what comes next.
    async fn publish(&mut self, publish: &wire::Publish<'_>) -> TestResult<Result<Packet, ClientError>> {
        self.packet_id += 1;
        let publish = wire::Publish { packet_id: self.packet_id, ..publish.clone() };
        wire::encode_publish(self.version, &publish, self.connection.write_buffer());
        self.next().await
    }

    /// Subscribes one filter and gives the SUBACK's code.
    async fn subscribe(&mut self, filter: &str) -> TestResult<u8> {
        self.packet_id += 1;
        wire::encode_subscribe(self.version, self.packet_id, filter, 1, self.connection.write_buffer());
        match self.next().await?? {
            Packet::SubAck { packet_id, codes } if packet_id == self.packet_id && codes.len() == 1 => Ok(codes[0]),
            other => Err(format!("instead of a SUBACK for {filter}: {other:?}").into()),
        }
    }

    async fn is_alive(&mut self) -> TestResult {
        wire::encode_ping(self.connection.write_buffer());
        match self.next().await?? {
            Packet::Pong => Ok(()),
            other => Err(format!("instead of a PINGRESP: {other:?}").into()),
        }
    }
}

fn message<'a>(topic: &'a str, payload: &'a str) -> wire::Publish<'a> {
    wire::Publish { topic, payload: payload.as_bytes(), qos: 1, retain: false, dup: false, packet_id: 0, id: None }
}

fn is_closed(answer: &Result<Packet, ClientError>) -> bool {
    matches!(answer, Err(ClientError::Closed | ClientError::Io { .. }))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_has_its_reason() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?).await?;
    let api = cluster.api();
    let bob = Credential::Insecure("bob".to_owned());
    api.create_group(&bob, "foreign", &["bob".to_owned()]).await?;
    mqtt_5_names_the_reason(&cluster).await?;
    mqtt_3_1_1_has_notices_and_closes(&cluster).await?;
    // Of all that, two messages were right; of the rest nothing is stored.
    let page = api.messages(&bob, "u/alice", None, 100).await?;
    let payloads: Vec<_> = page["messages"].as_array().into_iter().flatten().map(|one| &one["payload"]).collect();
    assert_eq!(payloads, ["first", "right"], "{page}");
    let page = api.messages(&bob, "g/foreign", None, 100).await?;
    let strangers = page["messages"].as_array().into_iter().flatten().filter(|one| one["system"] != true).count();
    assert_eq!(strangers, 0, "{page}");
    cluster.stop().await
}

async fn mqtt_5_names_the_reason(cluster: &Cluster) -> TestResult {
    let gateway = cluster.members_of("gateway")?.remove(0);
    let mut alice = Dialog::open(cluster, Version::V5, "alice").await?;
    let first = wire::Publish { id: Some("one"), ..message("u/bob", "first") };
    let stored = alice.publish(&first).await??;
    assert!(
        matches!(&stored, Packet::PubAck { code: 0, properties, .. } if properties.user("seq") == Some("1")),
        "{stored:?}"
    );

    let (long, longest) = (format!("u/{}", "x".repeat(65)), format!("u/{}", "x".repeat(60_000)));
    let other_payload = wire::Publish { id: Some("one"), ..message("u/bob", "second") };
    let long_id = "i".repeat(65);
    let long_id = wire::Publish { id: Some(&long_id), ..message("u/bob", "long id") };
    for (publish, code, reason) in [
        (message("chat/bob", "unknown topic"), 0x90, "topic name invalid"),
        (message("u/bob/phone", "unknown topic"), 0x90, "topic name invalid"),
        (message("u/b ob", "no id"), 0x90, "topic name invalid"),
        (message(&long, "too long"), 0x90, "topic name invalid"),
        (message(&longest, "far too long"), 0x90, "topic name invalid"),
        (message("inbox/u/bob", "not for clients"), 0x90, "topic name invalid"),
        (message("g/foreign", "let me in"), 0x87, "not authorized"),
        (message("read/u/bob", "yes"), 0x99, "payload format invalid"),
        (other_payload, 0x83, "implementation specific error"),
        (long_id, 0x83, "implementation specific error"),
    ] {
        let before = metric(&gateway, &refused(reason)).await?;
        match alice.publish(&publish).await?? {
            Packet::PubAck { code: found, properties, packet_id } => {
                assert_eq!((found, packet_id), (code, alice.packet_id), "{}: {properties:?}", publish.topic);
                assert!(properties.reason.is_some(), "{} has no Reason String", publish.topic);
            }
            other => return Err(format!("{}: {other:?}", publish.topic).into()),
        }
        assert_eq!(
            metric(&gateway, &refused(reason)).await?,
            before + 1.0,
            "{}: {reason} is not counted",
            publish.topic
        );
        alice.is_alive().await?;
    }
    // The very same again is no reuse: it is stored once and answered with the same seq.
    let again = alice.publish(&first).await??;
    assert!(
        matches!(&again, Packet::PubAck { code: 0, properties, .. } if properties.user("seq") == Some("1")),
        "{again:?}"
    );
    let filters = [
        ("#", 0x8F),
        ("+/bob", 0x8F),
        ("u/bob", 0x8F),
        ("inbox/+", 0x8F),
        ("$share/all/inbox/#", 0x9E),
        ("inbox/#", 1),
    ];
    for (filter, code) in filters {
        assert_eq!(alice.subscribe(filter).await?, code, "{filter}");
    }

    // What CONNACK rules out ends the connection, with its own code.
    let welcome = Connection::open(&Options::new(cluster.mqtt(), "carol", "raw"), true).await?.1;
    assert_eq!((welcome.properties.maximum_qos, welcome.properties.retain_available), (Some(1), Some(false)));
    for (publish, code) in [
        (wire::Publish { qos: 2, ..message("u/bob", "exactly once") }, 0x9B),
        (wire::Publish { retain: true, ..message("u/bob", "for ever") }, 0x9A),
    ] {
        let mut carol = Dialog::open(cluster, Version::V5, "carol").await?;
        let end = carol.publish(&publish).await??;
        assert!(matches!(&end, Packet::Disconnect { code: found, .. } if *found == code), "{code:#04x}: {end:?}");
        let end = carol.next().await?;
        assert!(is_closed(&end), "{end:?}");
    }

    // CONNECT: who is no user, which device is none.
    for (user, device, code) in [("no body", "raw", 0x86), ("alice", "my phone", 0x85)] {
        let opened = Connection::open(&Options::new(cluster.mqtt(), user, device), true).await;
        assert!(
            matches!(&opened, Err(ClientError::Refused { code: found, reason: Some(_) }) if *found == code),
            "{opened:?}"
        );
    }
    Ok(())
}

async fn mqtt_3_1_1_has_notices_and_closes(cluster: &Cluster) -> TestResult {
    let mut alice = Dialog::open(cluster, Version::V311, "alice").await?;
    for filter in ["#", "u/bob", "+/bob"] {
        assert_eq!(alice.subscribe(filter).await?, 0x80, "{filter}");
    }
    assert_eq!(alice.subscribe("inbox/#").await?, 1);
    for (topic, reason) in [("chat/bob", "topic name invalid"), ("g/foreign", "not authorized")] {
        // First the notice that this one is not stored, then the PUBACK that 3.1.1 demands.
        let notice = match alice.publish(&message(topic, "no")).await?? {
            Packet::Publish { topic, payload, .. } if topic == "inbox/refused" => payload,
            other => return Err(format!("{topic}: {other:?} instead of a notice").into()),
        };
        let notice: Value = serde_json::from_slice(&notice)?;
        assert_eq!(notice, json!({ "packetId": alice.packet_id, "topic": topic, "reason": reason }));
        let acked = alice.next().await??;
        assert!(
            matches!(acked, Packet::PubAck { packet_id, .. } if packet_id == alice.packet_id),
            "{topic}: {acked:?}"
        );
    }
    let acked = alice.publish(&message("u/bob", "right")).await??;
    assert!(matches!(acked, Packet::PubAck { code: 0, .. }), "{acked:?}");

    // Who can't be told is closed.
    let mut carol = Dialog::open(cluster, Version::V311, "carol").await?;
    let end = carol.publish(&message("chat/bob", "no")).await?;
    assert!(is_closed(&end), "{end:?}");
    for publish in [
        wire::Publish { qos: 2, ..message("u/bob", "exactly once") },
        wire::Publish { retain: true, ..message("u/bob", "for ever") },
    ] {
        let mut carol = Dialog::open(cluster, Version::V311, "carol").await?;
        assert_eq!(carol.subscribe("inbox/#").await?, 1);
        let end = carol.publish(&publish).await?;
        assert!(is_closed(&end), "{end:?}");
    }
    Ok(())
}

// ---- bytes that are no MQTT ---------------------------------------------------------------------------------------------

/// Hostile connections of one round, and how many are made at once.
const ROUND: usize = 400;
const AT_ONCE: usize = 16;
/// What rounds may add to a gateway's memory: allocators keep some; 1,600 connections that leaked one buffer each would show.
const MEMORY_GROWTH_BYTES_MAX: u64 = 12 << 20;
/// A handshake may take 10 s; the rest is for a busy machine.
const SILENCE_ENDS_WITHIN: Duration = Duration::from_secs(20);

/// Resident memory of a process in bytes.
fn resident_bytes(member: &Member) -> TestResult<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", member.pid))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn connect_packet(version: Version) -> BytesMut {
    let mut bytes = BytesMut::new();
    let connect = wire::Connect {
        user: "mallory",
        password: None,
        client_id: "raw",
        clean_start: true,
        keep_alive_seconds: 30,
        session_expiry_seconds: 0,
        receive_maximum: None,
    };
    wire::encode_connect(version, &connect, &mut bytes);
    bytes
}

/// What somebody sends who means no good, or has a bug.
fn hostile_bytes(rng: &mut StdRng) -> BytesMut {
    let random = |rng: &mut StdRng, bytes_max: usize| -> Vec<u8> {
        (0..rng.random_range(1..bytes_max)).map(|_| rng.random()).collect()
    };
    let version = if rng.random() { Version::V5 } else { Version::V311 };
    let mut bytes = connect_packet(version);
    match rng.random_range(0..8) {
        0 => return BytesMut::from(&random(rng, 4096)[..]),
        1 => bytes.truncate(rng.random_range(1..bytes.len())),
        // A packet that announces 268,435,455 bytes, before and after CONNECT.
        2 => return BytesMut::from(&[0x10, 0xFF, 0xFF, 0xFF, 0x7F, 0, 4, b'M', b'Q', b'T', b'T'][..]),
        3 => {
            bytes.put_slice(&[0x32, 0xFF, 0xFF, 0xFF, 0x7F]);
            bytes.put_slice(&random(rng, 60_000));
        }
        4 => {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        5 => bytes.put_slice(&random(rng, 4096)),
        6 => bytes.put_slice(&connect_packet(version)),
        // A topic that is not UTF-8.
        _ => bytes.put_slice(&[0x30, 6, 0, 3, b'u', b'/', 0xFF, 0]),
    }
    bytes
}

/// Sends bytes, then nothing more, and waits for the end.
async fn send_and_end(server: SocketAddr, bytes: BytesMut) -> TestResult {
    let mut stream = TcpStream::connect(server).await?;
    // Either may fail because the other side has closed already, which is what is wanted.
    let _ = stream.write_all(&bytes).await;
    let _ = stream.shutdown().await;
    wait_for_end(&mut stream, &bytes).await
}

async fn wait_for_end(stream: &mut TcpStream, sent: &[u8]) -> TestResult {
    let mut rest = Vec::new();
    let end = timeout(SILENCE_ENDS_WITHIN, stream.read_to_end(&mut rest)).await;
    let shown = &sent[..sent.len().min(64)];
    end.map(drop)
        .map_err(|_| format!("still open after {SILENCE_ENDS_WITHIN:?}: {shown:02x?} …, it said {rest:02x?}").into())
}

async fn hostile_round(server: SocketAddr, rng: &mut StdRng) -> TestResult {
    let inputs: Vec<BytesMut> = (0..ROUND).map(|_| hostile_bytes(rng)).collect();
    let mut ends = stream::iter(inputs).map(|bytes| send_and_end(server, bytes)).buffer_unordered(AT_ONCE);
    while let Some(end) = ends.next().await {
        end?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_mqtt_are_closed_and_counted() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?).await?;
    let gateway = cluster.members_of("gateway")?.remove(0);
    let mut chat = Chat::start(&cluster, 6, 1).await?;
    chat.send_at(50.0, 31);
    let mut rng = StdRng::seed_from_u64(31);
    // The first rounds warm the allocator up.
    for _ in 0..2 {
        hostile_round(cluster.mqtt(), &mut rng).await?;
    }
    let before = resident_bytes(&gateway)?;
    for _ in 0..4 {
        hostile_round(cluster.mqtt(), &mut rng).await?;
    }

    // Half a CONNECT and then silence, or nothing at all: dropped, and counted as slow.
    let half = connect_packet(Version::V5).split_to(9);
    let server = cluster.mqtt();
    let silent = stream::iter(0..40).map(async |number| {
        let mut stream = TcpStream::connect(server).await?;
        if number % 2 == 0 {
            stream.write_all(&half).await?;
        }
        wait_for_end(&mut stream, &half).await
    });
    let mut silent = silent.buffer_unordered(40);
    while let Some(end) = silent.next().await {
        end?;
    }
    let slow = metric(&gateway, "im_slow_handshakes_total").await?;
    assert!(slow >= 40.0, "{slow} slow handshakes are counted");
    for reason in ["malformed packet", "protocol error", "packet too large"] {
        let counted = metric(&gateway, &refused(reason)).await?;
        assert!(counted >= 10.0, "{reason} is counted {counted} times");
    }
    let connections = eventually("only the people are connected", ANSWERED_WITHIN, async || {
        metric(&gateway, "im_connections").await.ok().filter(|count| *count <= 6.0)
    });
    connections.await?;
    let after = resident_bytes(&gateway)?;
    println!("resident: {} KiB before, {} KiB after {} hostile connections", before >> 10, after >> 10, 4 * ROUND + 40);
    assert!(after <= before + MEMORY_GROWTH_BYTES_MAX, "{before} bytes grew to {after}");
    assert_eq!(cluster.members_of("gateway")?, [gateway], "the gateway was restarted");
    println!("{}", chat.stop_and_check(SETTLED_WITHIN).await?);
    cluster.stop().await
}

// ---- HTTP -----------------------------------------------------------------------------------------------------------------

fn user(name: &str) -> Credential {
    Credential::Insecure(name.to_owned())
}

fn service() -> Credential {
    Credential::Bearer("insecure-service".to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_api_does_what_its_document_says() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?.with_members(2, 2)).await?;
    http_happy_path(&cluster).await?;
    http_problems(&cluster.api()).await?;
    cluster.stop().await
}

async fn http_happy_path(cluster: &Cluster) -> TestResult {
    let api = cluster.api();
    let document = api.get("/openapi.json").await?;
    // Each call is one that the document lists.
    let call = async |method: Method, template: &str, path: &str, who: Credential, body: Option<Value>| {
        let listed = &document["paths"][template][method.as_str().to_lowercase()];
        assert!(listed.is_object(), "{method} {template} is not in /openapi.json");
        api.request(method, path, &who, body.as_ref()).await
    };
    let (group, members, group_messages) =
        ("/v1/groups/{group}", "/v1/groups/{group}/members", "/v1/groups/{group}/messages");
    let (history, read) = ("/v1/conversations/{kind}/{id}/messages", "/v1/conversations/{kind}/{id}/read");

    // Groups: members and roles.
    let made = call(Method::PUT, group, "/v1/groups/team", user("alice"), Some(json!({ "members": ["alice", "bob"] })))
        .await?;
    assert_eq!(made["group"], "team", "{made}");
    let change = json!({ "add": ["carol"], "roles": { "bob": "admin" } });
    call(Method::POST, members, "/v1/groups/team/members", user("alice"), Some(change)).await?;
    let found = call(Method::GET, group, "/v1/groups/team", user("carol"), None).await?;
    let mut roles: Vec<(&str, &str)> = found["members"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|member| Some((member["user"].as_str()?, member["role"].as_str()?)))
        .collect();
    roles.sort_unstable();
    assert_eq!(roles, [("alice", "owner"), ("bob", "admin"), ("carol", "member")], "{found}");
    call(Method::POST, group_messages, "/v1/groups/team/messages", service(), Some(json!({ "payload": "welcome" })))
        .await?;

    // Messages, unread counts, read marks.
    for number in 1..=5 {
        let body = json!({ "to": "bob", "id": format!("m{number}"), "payload": format!("message {number}") });
        let stored = call(Method::POST, "/v1/messages", "/v1/messages", user("alice"), Some(body.clone())).await?;
        let again = call(Method::POST, "/v1/messages", "/v1/messages", user("alice"), Some(body)).await?;
        assert_eq!((&stored["seq"], &again["seq"]), (&json!(number), &json!(number)), "the same id is stored once");
    }
    let conversation = async |who: &str, wanted: &str| {
        let list = call(Method::GET, "/v1/conversations", "/v1/conversations?limit=10", user(who), None).await?;
        let found =
            list["conversations"].as_array().into_iter().flatten().find(|one| one["conversation"] == wanted).cloned();
        TestResult::Ok(found)
    };
    // A recipient's index row comes with the notification, soon after the sender's answer.
    let unread = eventually("bob sees his five messages", ANSWERED_WITHIN, async || {
        conversation("bob", "u/alice").await.ok().flatten().filter(|found| found["head"] == 5)
    });
    let unread = unread.await?;
    assert_eq!((&unread["unread"], &unread["ownMark"]), (&json!(5), &json!(0)), "{unread}");
    let mark =
        call(Method::PUT, read, "/v1/conversations/u/alice/read", user("bob"), Some(json!({ "seq": 3 }))).await?;
    assert_eq!(mark, json!({ "seq": 3 }));
    // Marks only grow, and end at the head.
    for (asked, wanted) in [(2, 3), (99, 5)] {
        let mark =
            call(Method::PUT, read, "/v1/conversations/u/alice/read", user("bob"), Some(json!({ "seq": asked })))
                .await?;
        assert_eq!(mark, json!({ "seq": wanted }));
    }
    let found = conversation("bob", "u/alice").await?.ok_or("gone")?;
    assert_eq!((&found["unread"], &found["ownMark"]), (&json!(0), &json!(5)), "{found}");
    let found = conversation("alice", "u/bob").await?.ok_or("the sender does not have it")?;
    assert_eq!((&found["unread"], &found["peerMark"]), (&json!(0), &json!(5)), "{found}");

    // History, the newest page first, ascending within a page.
    let mut seen = Vec::new();
    let mut before = None;
    loop {
        let query = before.map(|seq: u64| format!("&before={seq}")).unwrap_or_default();
        let path = format!("/v1/conversations/u/alice/messages?limit=2{query}");
        let page = call(Method::GET, history, &path, user("bob"), None).await?;
        let seqs: Vec<u64> =
            page["messages"].as_array().into_iter().flatten().filter_map(|one| one["seq"].as_u64()).collect();
        let Some(first) = seqs.first().copied() else { break };
        seen.splice(0..0, seqs);
        before = Some(first);
    }
    assert_eq!(seen, [1, 2, 3, 4, 5]);

    // Presence, and its end by a server.
    let (mut connection, _) = Connection::open(&Options::new(cluster.mqtt(), "carol", "phone"), true).await?;
    let presence = "/v1/presence/{user}";
    let online = call(Method::GET, presence, "/v1/presence/carol", service(), None).await?;
    assert_eq!((&online["known"], &online["online"]), (&json!(true), &json!(true)), "{online}");
    assert_eq!(online["sessions"][0]["device"], "phone", "{online}");
    assert!(online["sessions"][0]["gateway"].as_str().is_some_and(|name| name.starts_with("gateway-")), "{online}");
    let seen_by_others = call(Method::GET, presence, "/v1/presence/carol", user("alice"), None).await?;
    assert_eq!(
        (&seen_by_others["online"], &seen_by_others["sessions"]),
        (&json!(true), &json!([])),
        "{seen_by_others}"
    );
    call(Method::POST, "/v1/users/{user}/kick", "/v1/users/carol/kick", service(), Some(json!({}))).await?;
    let end = timeout(ANSWERED_WITHIN, connection.next()).await.map_err(|_| "the kick ended nothing")??;
    assert!(matches!(end, Packet::Disconnect { code: 0x98, .. }), "{end:?}");
    eventually("carol is offline", ANSWERED_WITHIN, async || {
        let found = call(Method::GET, presence, "/v1/presence/carol", service(), None).await.ok()?;
        (found["known"] == true && found["online"] == false).then_some(())
    })
    .await?;

    // Who has left reads what was said until then, and nothing after.
    call(Method::DELETE, "/v1/groups/{group}/members/{user}", "/v1/groups/team/members/carol", user("carol"), None)
        .await?;
    let secret = json!({ "group": "team", "payload": "carol is gone" });
    call(Method::POST, "/v1/messages", "/v1/messages", user("alice"), Some(secret)).await?;
    let left = call(Method::GET, history, "/v1/conversations/g/team/messages", user("carol"), None).await?;
    let payloads: Vec<&str> =
        left["messages"].as_array().into_iter().flatten().filter_map(|one| one["payload"].as_str()).collect();
    assert!(payloads.contains(&"welcome") && !payloads.contains(&"carol is gone"), "{left}");
    Ok(())
}

async fn http_problems(api: &Api) -> TestResult {
    api.create_group(&user("bob"), "foreign", &["bob".to_owned()]).await?;
    let nobody = Credential::None;
    let token = Credential::Bearer("no token at all".to_owned());
    let too_large = json!({ "to": "bob", "payload": "x".repeat(300_000) });
    for (method, path, who, body, status) in [
        (Method::GET, "/v1/conversations", nobody.clone(), None, 401),
        (Method::GET, "/v1/conversations", token, None, 401),
        (Method::POST, "/v1/messages", nobody, Some(json!({ "to": "bob", "payload": "hello" })), 401),
        (Method::GET, "/v1/groups/foreign", user("alice"), None, 403),
        (Method::GET, "/v1/conversations/g/foreign/messages", user("alice"), None, 403),
        (Method::GET, "/v1/conversations?user=bob", user("alice"), None, 403),
        (Method::POST, "/v1/messages", user("alice"), Some(json!({ "group": "foreign", "payload": "hello" })), 403),
        (Method::POST, "/v1/users/bob/kick", user("alice"), Some(json!({})), 403),
        (Method::POST, "/v1/groups/foreign/messages", user("bob"), Some(json!({ "payload": "I am the system" })), 403),
        (Method::GET, "/v1/no/such/path", user("alice"), None, 404),
        (Method::GET, "/v1/conversations/x/bob/messages", user("alice"), None, 404),
        (Method::GET, "/v1/groups/no-such-group", service(), None, 404),
        (Method::DELETE, "/v1/messages", user("alice"), None, 405),
        (Method::PUT, "/v1/groups/a%20b", user("alice"), Some(json!({})), 400),
        (Method::GET, "/v1/groups/%FF", user("alice"), None, 400),
        (Method::GET, "/v1/conversations?limit=many", user("alice"), None, 400),
        (Method::GET, "/v1/conversations", service(), None, 400),
        (Method::POST, "/v1/messages", user("alice"), Some(json!({ "to": "bob" })), 400),
        (Method::POST, "/v1/messages", user("alice"), Some(json!({ "to": "bob", "payload": 5 })), 400),
        (Method::POST, "/v1/messages", user("alice"), Some(json!({ "to": "bob", "text": "hello" })), 400),
        (Method::POST, "/v1/messages", user("alice"), Some(too_large), 413),
    ] {
        let what = format!("{method} {path} by {who:?}");
        match api.request(method, path, &who, body.as_ref()).await {
            Err(ApiError::Problem { status: found, title, detail, is_problem_document, .. }) => {
                assert_eq!(found.as_u16(), status, "{what}: {title}: {detail:?}");
                assert!(is_problem_document, "{what}: {found} is no problem document: {title}");
                assert!(detail.is_some_and(|text| !text.is_empty()), "{what}: no detail");
            }
            other => return Err(format!("{what}: {other:?} instead of {status}").into()),
        }
    }
    Ok(())
}

// ---- one device that connects twice ---------------------------------------------------------------------------------------

/// The seq of a chat message.
fn seq_of(packet: &Packet) -> Option<u64> {
    let Packet::Publish { properties, .. } = packet else { return None };
    properties.user("seq")?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_connection_of_a_device_takes_its_session_over_and_loses_nothing() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut template = Template::new()?.with_members(2, 1);
    template.paused = true;
    let cluster = Cluster::start(template).await?;
    let mut bob = Dialog::open(&cluster, Version::V5, "bob").await?;
    let mut first = Dialog::open(&cluster, Version::V5, "alice").await?;
    assert_eq!(first.subscribe("inbox/#").await?, 1);
    for seq in 1..=3 {
        let stored = bob.publish(&message("u/alice", "to alice")).await??;
        assert!(matches!(stored, Packet::PubAck { code: 0, .. }), "{stored:?}");
        let delivered = first.next().await??;
        assert_eq!(seq_of(&delivered), Some(seq), "{delivered:?}");
        // The last one is not acknowledged.
        if let Packet::Publish { packet_id: Some(id), .. } = delivered
            && seq < 3
        {
            wire::encode_puback(id, first.connection.write_buffer());
        }
    }
    first.is_alive().await?;

    // What she sends now is taken and has no answer when the second connection comes.
    let store = cluster.members_of("store")?.remove(0);
    cluster.signal(&store, Signal::STOP)?;
    let unanswered = wire::Publish { packet_id: 77, ..message("u/bob", "stored once") };
    wire::encode_publish(Version::V5, &unanswered, first.connection.write_buffer());
    first.is_alive().await?;
    let options = Options::new(cluster.mqtt(), "alice", "raw");
    let second = tokio::spawn(async move { Connection::open(&options, false).await });
    let end = first.next().await;
    cluster.signal(&store, Signal::CONT)?;
    assert!(matches!(end?, Ok(Packet::Disconnect { code: 0x8E, .. })), "the first is told who goes on");
    assert!(is_closed(&first.next().await?));

    let (connection, welcome) = second.await??;
    assert!(welcome.session_present);
    let mut second = Dialog::over(connection, Version::V5);
    let missed = second.next().await??;
    assert_eq!(seq_of(&missed), Some(3), "where the first one got to: {missed:?}");
    let again = wire::Publish { dup: true, ..unanswered };
    wire::encode_publish(Version::V5, &again, second.connection.write_buffer());
    let stored = second.next().await??;
    let Packet::PubAck { packet_id: 77, code: 0, properties } = &stored else {
        return Err(format!("{stored:?}").into());
    };
    assert_eq!(properties.user("seq"), Some("4"), "{properties:?}");
    second.is_alive().await?;
    let page = cluster.api().messages(&user("bob"), "u/alice", None, 10).await?;
    let payloads: Vec<_> = page["messages"].as_array().into_iter().flatten().map(|one| &one["payload"]).collect();
    assert_eq!(payloads, ["to alice", "to alice", "to alice", "stored once"], "{page}");
    cluster.stop().await
}

// ---- a disk that is full --------------------------------------------------------------------------------------------------

/// A small file system of the test's own.
struct SmallDisk(PathBuf);

impl SmallDisk {
    const BYTES: u64 = 48 << 20;

    /// `None`, with a word about it, where it can't be made and `REQUIRE_MOUNT` is not set.
    fn mount() -> TestResult<Option<Self>> {
        let path = std::env::temp_dir().join(format!("im-e2e-disk-{}", std::process::id()));
        fs::create_dir(&path)?;
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={}", Self::BYTES), "tmpfs"]).arg(&path);
        let why_not = match mount.output() {
            Ok(output) if output.status.success() => return Ok(Some(Self(path))),
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(error) => error.to_string(),
        };
        fs::remove_dir(&path)?;
        let why_not = format!("a full disk needs a small file system, and mounting one is not allowed here: {why_not}");
        if std::env::var_os("REQUIRE_MOUNT").is_some() {
            return Err(why_not.into());
        }
        eprintln!("SKIPPED: {why_not}");
        Ok(None)
    }

    /// Takes all the space that is left. Gives the file that holds it.
    fn fill(&self) -> TestResult<PathBuf> {
        let path = self.0.join("filler");
        let mut file = File::options().append(true).create(true).open(&path)?;
        for block in [1 << 20, 4096, 1] {
            let zeros = vec![0; block];
            while file.write_all(&zeros).is_ok() {}
        }
        Ok(path)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a process that a failed test left behind may still end on it.
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        if let Err(error) = unmounted.and_then(|_| fs::remove_dir(&self.0)) {
            eprintln!("{} is left: {error}", self.0.display());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_sends_and_not_reads() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let Some(disk) = SmallDisk::mount()? else { return Ok(()) };
    let mut template = Template::new()?.with_members(1, 2);
    template.data_dir = Some(disk.0.join("data"));
    // A shard that moves while nothing can be written has no owner until something can: that is another test's matter.
    template.paused = true;
    let cluster = Cluster::start(template).await?;
    let members = cluster.members()?;
    let mut chat = Chat::start(&cluster, 8, 1).await?;
    chat.send_at(60.0, 41);
    chat.wait_acked(150, Duration::from_secs(30)).await?;
    let (alice, bob) = (chat.people()[0].name.clone(), chat.people()[1].name.clone());
    assert!(matches!(chat.say(0, &format!("u/{bob}")).await?, Outcome::Stored { .. }));

    // The store may still have room in files that it made before; load uses that up.
    let filler = disk.fill()?;
    let refusal = eventually("a send is refused", Duration::from_secs(60), async || {
        disk.fill().ok()?;
        match chat.say(0, &format!("u/{bob}")).await.ok()? {
            Outcome::Refused { code, reason } => Some((code, reason)),
            Outcome::Stored { .. } => None,
        }
    });
    let (code, reason) = refusal.await?;
    println!("the disk is full: {code:#04x} {reason:?}");
    let (mut refusals, until) = (1, Instant::now() + Duration::from_secs(30));
    while refusals < 20 {
        assert!(Instant::now() < until, "only {refusals} sends were refused");
        disk.fill()?;
        let topic = format!("u/{bob}");
        let outcome = tokio::time::timeout(Duration::from_secs(15), chat.say(0, &topic)).await?;
        refusals += u32::from(matches!(outcome?, Outcome::Refused { code: 0x80, .. }));
    }
    match Connection::open(&Options::new(cluster.mqtt(), "new", "phone"), false).await {
        Err(ClientError::Refused { code: 0x88, .. }) => {}
        other => return Err(format!("a login, while no session can be stored: {other:?}").into()),
    }
    assert!(code == 0x80 && reason.is_some_and(|text| text.contains("store")), "{code:#04x}");
    let api = cluster.api();
    let page = api.messages(&user(&bob), &format!("u/{alice}"), None, 10).await?;
    assert!(page["messages"].as_array().is_some_and(|messages| !messages.is_empty()), "{page}");
    let list = api.conversations(&user(&bob), 10).await?;
    assert!(list["conversations"].as_array().is_some_and(|all| !all.is_empty()), "{list}");

    fs::remove_file(&filler)?;
    let recovered = chat.time_to_ack(0, &format!("u/{bob}"), Duration::from_secs(30)).await?;
    println!("space again: acknowledged after {recovered:?}");
    let so_far = chat.journal.with(|history| history.progress().1);
    chat.wait_acked(so_far + 150, Duration::from_secs(30)).await?;
    let report = chat.stop_and_check(SETTLED_WITHIN).await?;
    println!("{report}");
    assert!(report.refused >= 20);
    let same = |member: &Member| members.iter().any(|old| (&old.name, old.pid) == (&member.name, member.pid));
    assert!(cluster.members()?.iter().all(same), "a full disk ended a process");
    cluster.stop().await
}

// ---- a gateway without limits of its own ------------------------------------------------------------------------------

#[test]
fn a_gateway_by_itself_has_the_limits_of_an_imcluster() {
    let messages = im_crds::Messages::default();
    let im_crds::Limits {
        max_connections,
        connect_rate,
        max_handshakes,
        handshake_timeout,
        receive_maximum,
        max_packet_size,
        keep_alive_max,
        session_expiry_max,
        message_rate,
        send_buffer_bytes,
    } = im_crds::Limits::default();
    let theirs = im_gateway::config::Limits {
        max_connections: max_connections as usize,
        connect_rate,
        half_open_max: max_handshakes as usize,
        handshake_timeout_ms: handshake_timeout.duration().as_millis() as u64,
        receive_maximum,
        max_packet_size,
        keep_alive_max_seconds: keep_alive_max.duration().as_secs() as u16,
        session_expiry_max_seconds: session_expiry_max.duration().as_secs() as u32,
        message_rate,
        send_buffer_bytes,
        max_payload: messages.max_payload,
    };
    assert_eq!(im_gateway::config::Limits::default(), theirs);
    assert_eq!(im_gateway::config::Messages::default().catch_up, u64::from(messages.catch_up));
}

// ---- those who decide, away or misled -------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn messaging_goes_on_without_control_and_with_a_bad_file() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut cluster = Cluster::start(Template::new()?.with_members(1, 2)).await?;
    let mut chat = Chat::start(&cluster, 10, 1).await?;
    chat.send_at(80.0, 51);
    chat.wait_acked(100, Duration::from_secs(30)).await?;

    let copy = cluster.data_dir().join("run/map-hint");
    let is_there = async || copy.exists().then_some(());
    eventually("a copy of the map lies there", Duration::from_secs(10), is_there).await?;
    let control = cluster.members_of("control")?.remove(0);
    cluster.signal(&control, Signal::STOP)?;
    let (start, mut slowest) = (Instant::now(), Duration::ZERO);
    while start.elapsed() < Duration::from_secs(10) {
        for from in 0..chat.people().len() {
            let to = format!("u/{}", chat.people()[(from + 1) % chat.people().len()].name);
            slowest = slowest.max(chat.time_to_ack(from, &to, Duration::from_secs(5)).await?);
        }
    }
    // Somebody new gets in, too.
    Connection::open(&Options::new(cluster.mqtt(), "late", "phone"), true).await?;
    // The only gateway dies: the next one begins with a copy of the map.
    let gateway = cluster.members_of("gateway")?.remove(0);
    cluster.signal(&gateway, Signal::KILL)?;
    cluster.wait_restarted(&gateway, Duration::from_secs(10)).await?;
    let so_far = chat.journal.with(|history| history.progress().1);
    chat.wait_acked(so_far + 300, Duration::from_secs(30)).await?;
    cluster.signal(&control, Signal::CONT)?;
    println!("without control the slowest ack took {slowest:?}");
    assert!(slowest < Duration::from_secs(1), "without control a send took {slowest:?}");

    // Where a member listens is known a moment after it has joined.
    let running = |cluster: &Cluster| -> TestResult<Vec<(String, u32)>> {
        Ok(cluster.members()?.into_iter().map(|member| (member.name, member.pid)).collect())
    };
    let good = running(&cluster)?;
    // An unknown field, and one that can't change.
    for (bad, path) in
        [("  mode: Auto\n  gatway: {}\n", "gatway"), ("  business: {shards: 128}\n", "spec.business.shards")]
    {
        let yaml = format!(
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {{name: test}}\nspec:\n  auth: {{insecure: {{}}}}\n  \
             access: {{mqtt: {{address: \"{}\"}}, http: {{address: \"{}\"}}}}\n{bad}",
            cluster.mqtt(),
            cluster.http()
        );
        cluster.write_yaml(&yaml)?;
        eventually(&format!("{path} is named"), Duration::from_secs(20), async || {
            let output = cluster.output();
            let refusals = output.split("is refused, what ran before goes on").skip(1);
            refusals.into_iter().any(|refusal| refusal.contains(path)).then_some(())
        })
        .await?;
        let so_far = chat.journal.with(|history| history.progress().1);
        chat.wait_acked(so_far + 100, Duration::from_secs(20)).await?;
        assert_eq!(running(&cluster)?, good, "a bad file changed something");
    }
    // A good one is followed again.
    cluster.edit(|template| template.gateways = (2, 2))?;
    cluster.wait_members("gateway", 2, Duration::from_secs(30)).await?;
    println!("{}", chat.stop_and_check(SETTLED_WITHIN).await?);
    cluster.stop().await
}
