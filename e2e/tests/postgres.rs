//! The whole system on a real PostgreSQL: it is restarted in the middle of commits, owners are killed and stopped, the tier of
//! owners is scaled, and every message of every client is checked.

mod support;

// The store's own tests use all of it.
#[allow(dead_code, clippy::duplicate_mod)]
#[path = "../../business/tests/support/postgres.rs"]
mod server;

use std::time::Duration;

use futures::future::try_join_all;
use hyper::Method;
use im_e2e::{
    api::{ApiError, Credential},
    client::{ClientError, Connection, Options, Outcome},
    view::Member,
    wire::{self, Packet, Version},
};
use rustix::process::Signal;
use serde_json::json;
use server::PostgresServer;
use support::{Chat, Cluster, Template, TestResult, eventually};
use tokio::{
    sync::Mutex,
    task::block_in_place,
    time::{Instant, timeout},
};

/// One system at a time: they would take the processor from each other, and what is measured would mean nothing.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Messages per second.
const RATE: f64 = 150.0;
/// Load flows, also on a busy machine.
const FLOWS_WITHIN: Duration = Duration::from_secs(40);
/// Members are started or emptied, and shards moved, within this time.
const SCALED_WITHIN: Duration = Duration::from_secs(60);
/// All is delivered and checked within this time after the last message.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);
/// The promise: sends are acknowledged again this soon after an owner was killed or stopped.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(5);
/// A send that has no outcome ends its connection after 10 s; the rest is for a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(15);

async fn start(server: &PostgresServer, gateways: u32, business: u32) -> TestResult<Cluster> {
    let mut template = Template::new()?.with_members(gateways, business);
    template.storage = format!("{{postgres: {{url: \"{}\"}}}}", server.url());
    Cluster::start(template).await
}

async fn wait_more_acks(chat: &Chat, count: u64) -> TestResult {
    let so_far = chat.journal.with(|history| history.progress().1);
    chat.wait_acked(so_far + count, FLOWS_WITHIN).await
}

/// One message of everybody to his neighbour and to each group: so many conversations touch every owner. Gives the time until
/// the last of them is stored; what is refused for now is said again.
async fn time_until_all_are_acked(chat: &Chat) -> TestResult<Duration> {
    let start = Instant::now();
    let people = chat.people();
    let topics = (0..people.len()).map(|number| (number, format!("u/{}", people[(number + 1) % people.len()].name)));
    let groups = chat.groups().iter().map(|group| (0, format!("g/{group}")));
    try_join_all(topics.chain(groups).map(async |(from, topic)| {
        loop {
            if let Outcome::Stored { .. } = chat.say(from, &topic).await? {
                return TestResult::Ok(());
            }
        }
    }))
    .await?;
    Ok(start.elapsed())
}

/// Waits until so many business members share the shards. How many each gets follows its load, which is drawn; all are owned, and
/// nobody is left out.
async fn wait_spread(cluster: &Cluster, count: usize) -> TestResult {
    let members = cluster.wait_members("business", count, SCALED_WITHIN).await?;
    eventually(&format!("the shards lie on {count} members"), SCALED_WITHIN, async || {
        let status = cluster.status().await.ok()?;
        let shards = &status["shards"];
        let owns_some = |member: &Member| shards["perMember"][member.name.as_str()].as_u64().unwrap_or_default() > 0;
        (members.iter().all(owns_some) && shards["owned"] == 64 && shards["moving"] == 0).then_some(())
    })
    .await
}

/// Sends one message over a connection of its own. `None` = the connection ended without an answer.
async fn probe(connection: &mut Connection, packet_id: u16, text: &str) -> TestResult<Option<(u8, Option<String>)>> {
    let id = format!("probe-{text}");
    let publish = wire::Publish {
        topic: "u/probed",
        payload: text.as_bytes(),
        qos: 1,
        retain: false,
        dup: false,
        packet_id,
        id: Some(&id),
    };
    wire::encode_publish(Version::V5, &publish, connection.write_buffer());
    let answer = async {
        connection.flush().await?;
        loop {
            if let Packet::PubAck { code, properties, .. } = connection.next().await? {
                return Ok::<_, ClientError>((code, properties.reason));
            }
        }
    };
    let answer = timeout(ANSWERED_WITHIN, answer).await;
    Ok(answer.map_err(|_| format!("{text} has neither answer nor end after {ANSWERED_WITHIN:?}"))?.ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_restarts_in_the_middle_of_commits() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut server = block_in_place(PostgresServer::start)?;
    let cluster = start(&server, 2, 2).await?;
    let mut chat = Chat::start(&cluster, 16, 2).await?;
    chat.send_at(RATE, 21);
    let prober = Options::new(cluster.mqtt(), "prober", "phone");
    let mut not_stored = Vec::new();
    // A fast shutdown ends the sessions in order; an immediate one is a crash, the next start recovers from the log. With commits in
    // flight their outcome is unknown as long as the server is away.
    for (round, signal, in_flight) in
        [("in-order", "INT", false), ("crash", "QUIT", false), ("in-flight", "QUIT", true)]
    {
        wait_more_acks(&chat, 300).await?;
        let (mut connection, _) = Connection::open(&prober, true).await?;
        if in_flight {
            block_in_place(|| server.freeze())?;
            let asked = || chat.journal.with(|history| history.progress().0);
            let before = asked();
            eventually("commits in flight", FLOWS_WITHIN, async || (asked() > before + 50).then_some(())).await?;
        }
        block_in_place(|| server.stop(signal))?;
        for packet_id in 1..=3 {
            let text = format!("{round}-{packet_id}");
            match probe(&mut connection, packet_id, &text).await? {
                None => break,
                Some((0x80.., None)) => return Err(format!("{text} was refused without a Reason String").into()),
                Some((code @ 0x80.., Some(reason))) => {
                    println!("PostgreSQL is down: {code:#04x} {reason}");
                    not_stored.push(text);
                }
                Some((code, _)) => {
                    return Err(format!("{text} was answered with {code:#04x}, and nobody stored it").into());
                }
            }
        }
        let body = json!({ "to": "probed", "id": round, "payload": format!("HTTP-{round}") });
        let sender = Credential::Insecure("prober".to_owned());
        match cluster.api().request(Method::POST, "/v1/messages", &sender, Some(&body)).await {
            Err(ApiError::Problem { status, is_problem_document: true, .. }) if status == 503 => {
                not_stored.push(format!("HTTP-{round}"));
            }
            other => return Err(format!("over HTTP, instead of a problem document with 503: {other:?}").into()),
        }
        // Nobody new gets in: the row of his session could not be written.
        match Connection::open(&Options::new(cluster.mqtt(), format!("new.{round}"), "phone"), false).await {
            Err(ClientError::Refused { code: 0x88, .. }) => {}
            other => return Err(format!("a login, while no session can be stored: {other:?}").into()),
        }
        block_in_place(|| server.run())?;
        let start = Instant::now();
        time_until_all_are_acked(&chat).await?;
        println!("{round}: all conversations are acknowledged {:?} after PostgreSQL is back", start.elapsed());
    }
    wait_more_acks(&chat, 300).await?;
    assert!(not_stored.len() > 2, "nothing was refused while PostgreSQL was down: nothing was tested");
    let probed = Credential::Insecure("probed".to_owned());
    let page = cluster.api().messages(&probed, "u/prober", None, 100).await?;
    for text in &not_stored {
        let stored = page["messages"].as_array().is_some_and(|all| all.iter().any(|one| one["payload"] == **text));
        assert!(!stored, "{text} was refused, and is stored: {page}");
    }
    let report = chat.stop_and_check(SETTLED_WITHIN).await?;
    println!("{report}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_are_killed_and_stopped() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let server = block_in_place(PostgresServer::start)?;
    let cluster = start(&server, 2, 3).await?;
    let mut chat = Chat::start(&cluster, 16, 2).await?;
    chat.send_at(RATE, 22);
    wait_spread(&cluster, 3).await?;
    wait_more_acks(&chat, 300).await?;
    let victim = cluster.members_of("business")?.into_iter().next().ok_or("no business member")?;
    cluster.signal(&victim, Signal::KILL)?;
    let pause = time_until_all_are_acked(&chat).await?;
    println!("killed: acknowledged again after {pause:?}");
    assert!(pause <= TAKEN_OVER_WITHIN, "sends were acknowledged only {pause:?} after SIGKILL of {}", victim.name);
    cluster.wait_restarted(&victim, Duration::from_secs(30)).await?;
    wait_more_acks(&chat, 300).await?;

    // Stopped, it may hold a transaction open; and when it goes on it still thinks that it owns its shards.
    let victim = cluster.members_of("business")?.into_iter().nth(1).ok_or("one business member")?;
    cluster.signal(&victim, Signal::STOP)?;
    let pause = time_until_all_are_acked(&chat).await?;
    println!("stopped: acknowledged again after {pause:?}");
    assert!(pause <= TAKEN_OVER_WITHIN, "sends were acknowledged only {pause:?} after SIGSTOP of {}", victim.name);
    wait_more_acks(&chat, 300).await?;
    cluster.signal(&victim, Signal::CONT)?;
    wait_more_acks(&chat, 600).await?;
    let same = cluster.members()?.into_iter().any(|member| (&member.name, member.pid) == (&victim.name, victim.pid));
    assert!(same, "{} did not survive its stop", victim.name);
    let report = chat.stop_and_check(SETTLED_WITHIN).await?;
    println!("{report}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn owners_scale_out_and_in() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let server = block_in_place(PostgresServer::start)?;
    let mut cluster = start(&server, 1, 1).await?;
    let mut chat = Chat::start(&cluster, 16, 2).await?;
    chat.send_at(RATE, 23);
    wait_more_acks(&chat, 200).await?;
    for count in [3, 1] {
        cluster.edit(|template| template.business = (count, count))?;
        wait_spread(&cluster, count as usize).await?;
        wait_more_acks(&chat, 300).await?;
    }
    let report = chat.stop_and_check(SETTLED_WITHIN).await?;
    println!("{report}");
    assert_eq!(report.refused, 0, "a planned move refuses nothing");
    cluster.stop().await
}
