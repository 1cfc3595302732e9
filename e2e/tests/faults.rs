//! Whatever crashes, stops or moves, no acknowledged message is lost, repeated or put out of order: a whole system of real
//! processes under load, its members killed, stopped and scaled, every message of every client checked.

mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::Method;
use im_e2e::{
    api::{Api, Credential},
    client::{Client, Connection, Event, Inbox, Observer, Options, Outcome},
    view::Member,
    wire::{self, Packet, Version},
};
use parking_lot::Mutex as SyncMutex;
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::Signal;
use serde_json::Value;
use support::{Chat, Cluster, Template, TestResult, eventually, program};
use tokio::{
    process::Command,
    sync::Mutex,
    task::JoinSet,
    time::{Instant, sleep},
};

/// One system at a time: they would take the processor from each other, and what is measured would mean nothing.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Messages per second of the load.
const RATE: f64 = 300.0;
/// People who chat, each with each other, and groups of all of them: every shard gets messages.
const PEOPLE: usize = 20;
const GROUPS: usize = 2;
/// People who subscribe and unsubscribe all the time.
const CHANGING: usize = 40;
/// The promise: sends are acknowledged again within this time of an owner's SIGKILL or SIGSTOP.
const ACKED_AGAIN_WITHIN: Duration = Duration::from_secs(5);
/// The promise: presence forgets the sessions of a killed gateway within this time.
const GONE_WITHIN: Duration = Duration::from_secs(3);
/// No promise, only the point from which something hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// All is delivered and checked within this time after the last message.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// A system under load.
struct Scene {
    cluster: Cluster,
    chat: Chat,
}

impl Scene {
    /// People chat on the system already.
    async fn start(template: Template) -> TestResult<Self> {
        Self::start_with(template, &[]).await
    }

    async fn start_with(template: Template, environment: &[(&str, &str)]) -> TestResult<Self> {
        let shared_out = template.business.0 as usize;
        let cluster = Cluster::start_with(template, environment).await?;
        let chat = Chat::start(&cluster, PEOPLE, GROUPS).await?;
        let mut scene = Self { cluster, chat };
        scene.wait_shards_shared_by(shared_out).await?;
        scene.chat.send_at(RATE, 1);
        scene.flow(300).await?;
        Ok(scene)
    }

    /// Waits until so many more messages are acknowledged.
    async fn flow(&self, more: u64) -> TestResult {
        let now = self.chat.journal.with(|history| history.progress().1);
        self.chat.wait_acked(now + more, PATIENCE).await
    }

    /// What `imcluster status -o json` says.
    async fn status(&self) -> TestResult<Value> {
        status(&self.cluster).await
    }

    /// Waits until just so many business members run, all shards are theirs, each has some, and nothing moves.
    async fn wait_shards_shared_by(&self, members: usize) -> TestResult {
        let mut stale = None;
        let what = format!("all shards are shared by {members} business members");
        eventually(&what, PATIENCE * 2, async || {
            let running = self.cluster.members_of("business").ok()?.len();
            let status = self.status().await.ok()?;
            // The document is written anew five times a second; the first that comes may be from before the call.
            let is_stale = *stale.get_or_insert_with(|| status["at"].clone()) == status["at"];
            let shards = &status["shards"];
            let per_member = shards["perMember"].as_object()?;
            let owners = per_member.values().filter(|owned| owned.as_u64() > Some(0)).count();
            let settled = shards["owned"] == shards["total"] && shards["moving"] == 0 && shards["queued"] == 0;
            (!is_stale && settled && running == members && owners == members).then_some(())
        })
        .await
    }

    /// Kills a member and waits until it runs again.
    async fn kill(&self, member: &Member) -> TestResult<Member> {
        self.cluster.signal(member, Signal::KILL)?;
        self.cluster.wait_restarted(member, PATIENCE).await
    }

    /// The first member of a role.
    fn member(&self, role: &str) -> TestResult<Member> {
        Ok(self.cluster.members_of(role)?.into_iter().next().ok_or(format!("no {role} runs"))?)
    }

    /// Has a business member end as soon as it gets to that point.
    async fn arm(&self, member: &Member, point: &str) -> TestResult {
        let admin = admin(&self.cluster, member).await?;
        admin.request(Method::POST, &format!("/fail-points/{point}"), &Credential::None, None).await?;
        Ok(())
    }

    /// The end of each test: the history is clean, no send waited longer for its ack than `ack_max`, the store says that
    /// nothing is lost, and nobody runs any more.
    async fn finish(self, ack_max: Duration) -> TestResult {
        let Self { cluster, chat } = self;
        let report = chat.stop_and_check(SETTLED_WITHIN).await?;
        println!("{report}");
        let slowest = Duration::from_micros(report.ack_latency.max());
        if slowest > ack_max {
            return Err(format!("a send waited {slowest:?} for its ack, {ack_max:?} are allowed").into());
        }
        let verdict = async || {
            let status = status(&cluster).await.ok()?;
            (status["noMessageLost"]["status"] == "True").then_some(())
        };
        eventually("the store says that no message is lost", PATIENCE, verdict).await?;
        cluster.stop().await
    }
}

async fn status(cluster: &Cluster) -> TestResult<Value> {
    let mut command = Command::new(program("imcluster")?);
    command.arg("status").arg("--data-dir").arg(cluster.data_dir()).args(["-o", "json"]);
    let output = command.output().await?;
    if !output.status.success() {
        return Err(format!("imcluster status: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The admin port of a process, as soon as it is known.
async fn admin(cluster: &Cluster, member: &Member) -> TestResult<Api> {
    let address = eventually(&format!("the admin address of {} is known", member.name), PATIENCE, async || {
        let members = cluster.members().ok()?;
        let same = members.into_iter().find(|other| other.name == member.name && other.pid == member.pid)?;
        same.addresses["admin"].as_str()?.parse().ok()
    })
    .await?;
    Ok(Api::new(address))
}

/// A counter or gauge of a process.
async fn metric(admin: &Api, name: &str) -> TestResult<f64> {
    let Value::String(text) = admin.get("/metrics").await? else { return Err("metrics are no text".into()) };
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.ok_or_else(|| format!("no metric {name}").into())
}

// ---- without faults, and scaling ------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn people_chat_over_two_gateways_and_two_business_members() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    scene.flow(1_200).await?;
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn business_scales_from_one_to_four_and_back_while_every_shard_moves() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scene = Scene::start(Template::new()?).await?;
    for members in [4, 1] {
        scene.cluster.edit(|template| template.business = (members, members))?;
        scene.wait_shards_shared_by(members as usize).await?;
        scene.flow(300).await?;
    }
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_subscribes_while_his_shard_moves_stays_connected() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scene = Scene::start(Template::new()?).await?;
    let is_over = Arc::new(AtomicBool::new(false));
    let mut changing = JoinSet::new();
    for number in 0..CHANGING {
        let (mqtt, is_over) = (scene.cluster.mqtt(), is_over.clone());
        changing
            .spawn(async move { subscribe_and_unsubscribe(mqtt, number, &is_over).await.map_err(|e| e.to_string()) });
    }
    for members in [3, 1] {
        scene.cluster.edit(|template| template.business = (members, members))?;
        scene.wait_shards_shared_by(members as usize).await?;
    }
    is_over.store(true, Ordering::Relaxed);
    let mut count = 0;
    while let Some(changes) = changing.join_next().await {
        count += changes??;
    }
    println!("{count} subscriptions and unsubscriptions");
    scene.finish(ACKED_AGAIN_WITHIN).await
}

/// Somebody who subscribes and unsubscribes until it is over, each time with an answer. Says how often.
async fn subscribe_and_unsubscribe(mqtt: SocketAddr, number: usize, is_over: &AtomicBool) -> TestResult<u64> {
    let options = Options::new(mqtt, format!("fickle{number}"), "phone");
    let (mut connection, _) = Connection::open(&options, true).await?;
    let mut count = 0;
    while !is_over.load(Ordering::Relaxed) {
        let packet_id = (count % 60_000) as u16 + 1;
        match count % 2 {
            0 => wire::encode_subscribe(Version::V5, packet_id, "inbox/#", 1, connection.write_buffer()),
            _ => wire::encode_unsubscribe(Version::V5, packet_id, "inbox/#", connection.write_buffer()),
        }
        connection.flush().await?;
        match connection.next().await? {
            Packet::SubAck { packet_id: of, codes } if of == packet_id && codes == [1] => {}
            Packet::UnsubAck { packet_id: of, codes } if of == packet_id && codes == [0] => {}
            other => return Err(format!("fickle{number}, change {count}: {other:?}").into()),
        }
        count += 1;
    }
    Ok(count)
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_scale_from_one_to_three_and_back_while_clients_move() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scene = Scene::start(Template::new()?).await?;
    scene.cluster.edit(|template| template.gateways = (3, 3))?;
    let gateways = scene.cluster.wait_members("gateway", 3, PATIENCE).await?;
    // The kernel deals new connections out, so whoever comes back may find himself on a new gateway.
    eventually("each gateway has clients", PATIENCE, async || {
        for gateway in &gateways {
            let admin = admin(&scene.cluster, gateway).await.ok()?;
            if metric(&admin, "im_connections").await.ok()? == 0.0 {
                scene.chat.reconnect().await;
                return None;
            }
        }
        Some(())
    })
    .await?;
    scene.flow(300).await?;
    let before = scene.chat.connections();
    scene.cluster.edit(|template| template.gateways = (1, 1))?;
    scene.cluster.wait_members("gateway", 1, PATIENCE * 2).await?;
    for person in scene.chat.people() {
        person.client.online().await;
    }
    assert!(scene.chat.connections() > before, "two gateways went and nobody had to move");
    scene.flow(300).await?;
    scene.finish(ACKED_AGAIN_WITHIN).await
}

// ---- killed and stopped ---------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_is_followed_within_five_seconds() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    // Again and again: the supervisor waits longer each time, so the other member has to step in.
    let mut owner = scene.member("business")?;
    for _ in 0..4 {
        owner = scene.kill(&owner).await?;
        scene.flow(150).await?;
    }
    scene.wait_shards_shared_by(2).await?;
    scene.flow(300).await?;
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_owner_is_followed_within_five_seconds_and_fenced_when_it_wakes_up() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    let stopped = scene.member("business")?;
    let admin = admin(&scene.cluster, &stopped).await?;
    let fenced_before = metric(&admin, "im_shards_fenced_total").await?;
    scene.cluster.signal(&stopped, Signal::STOP)?;
    eventually("the other member has all shards", PATIENCE, async || {
        let status = scene.status().await.ok()?;
        let shards = &status["shards"];
        let others = shards["perMember"].as_object()?.iter().filter(|(name, _)| **name != stopped.name);
        let owned: u64 = others.filter_map(|(_, owned)| owned.as_u64()).sum();
        (Some(owned) == shards["total"].as_u64() && shards["moving"] == 0).then_some(())
    })
    .await?;
    scene.flow(600).await?;
    scene.cluster.signal(&stopped, Signal::CONT)?;
    eventually("the member that woke up is fenced", PATIENCE, async || {
        let fenced = metric(&admin, "im_shards_fenced_total").await.ok()?;
        (fenced > fenced_before).then_some(())
    })
    .await?;
    scene.wait_shards_shared_by(2).await?;
    scene.flow(300).await?;
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_gateway_loses_nothing() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    scene.kill(&scene.member("gateway")?).await?;
    scene.flow(900).await?;
    scene.finish(PATIENCE).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_is_not_missed_and_scales_again_when_it_is_back() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let mut scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    scene.kill(&scene.member("control")?).await?;
    scene.flow(300).await?;
    scene.cluster.edit(|template| template.business = (3, 3))?;
    scene.wait_shards_shared_by(3).await?;
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_store_loses_nothing() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    scene.kill(&scene.member("store")?).await?;
    scene.flow(900).await?;
    scene.finish(PATIENCE).await
}

/// How long the storm lasts.
const STORM: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_random_faults_loses_nothing() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let seed: u64 = rand::random();
    println!("storm of seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let cluster = Cluster::start(Template::new()?.with_members(2, 3)).await?;
    let people = (0..PEOPLE).map(|number| {
        let mut options = Options::new(cluster.mqtt(), format!("s{number}"), "phone");
        options.keep_alive_seconds = 3;
        match number % 4 {
            0 => options.version = Version::V311,
            1 => options.receive_maximum = Some(2),
            _ => {}
        }
        options
    });
    let chat = Chat::start_with(&cluster, people.collect(), GROUPS).await?;
    let mut scene = Scene { cluster, chat };
    scene.wait_shards_shared_by(3).await?;
    scene.chat.send_at(RATE, seed);
    let end = Instant::now() + STORM;
    // Who is stopped, and until when.
    let mut stopped: Vec<(Member, Instant)> = Vec::new();
    while Instant::now() < end || !stopped.is_empty() {
        sleep(Duration::from_millis(rng.random_range(100..1_500))).await;
        let now = Instant::now();
        stopped.retain(|(member, until)| {
            if now >= *until {
                // It may have been killed meanwhile.
                let _ = scene.cluster.signal(member, Signal::CONT);
            }
            now < *until
        });
        let members = scene.cluster.members()?;
        if now >= end || members.is_empty() {
            continue;
        }
        let member = members[rng.random_range(0..members.len())].clone();
        let signal = if rng.random_bool(0.7) { Signal::KILL } else { Signal::STOP };
        // It may have ended since it was listed.
        if scene.cluster.signal(&member, signal).is_ok() && signal == Signal::STOP {
            let until = now + Duration::from_millis(rng.random_range(500..6_000));
            stopped.push((member, until));
        }
    }
    scene.wait_shards_shared_by(3).await?;
    scene.flow(300).await?;
    scene.finish(Duration::MAX).await
}

// ---- fail points ----------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_may_end_between_commit_and_ack_and_between_ack_and_notification() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let template = Template::new()?.with_members(2, 2);
    let scene = Scene::start_with(template, &[("IMCLUSTER_FAIL_POINTS", "1")]).await?;
    for point in ["committed", "acked"] {
        for member in scene.cluster.members_of("business")? {
            scene.arm(&member, point).await?;
            scene.cluster.wait_restarted(&member, PATIENCE).await?;
            scene.flow(300).await?;
        }
    }
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_may_end_in_each_phase_of_a_move() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let template = Template::new()?.with_members(2, 2);
    let mut scene = Scene::start_with(template, &[("IMCLUSTER_FAIL_POINTS", "1")]).await?;
    // On the way in the one that stays acquires what the other one had; on the way out it releases the half of it.
    for (point, members) in [("Acquiring", 1), ("Releasing", 2), ("Acquired", 1), ("Released", 2)] {
        for member in scene.cluster.members_of("business")? {
            scene.arm(&member, &point.to_lowercase()).await?;
        }
        scene.cluster.edit(|template| template.business = (members, members))?;
        eventually(&format!("a member ends at `{point}`"), PATIENCE, async || {
            let logs = std::fs::read_dir(scene.cluster.data_dir().join("logs")).ok()?;
            let mut texts = logs.flatten().filter_map(|entry| std::fs::read_to_string(entry.path()).ok());
            texts.any(|text| text.contains(&format!("point={point}"))).then_some(())
        })
        .await?;
        scene.wait_shards_shared_by(members as usize).await?;
        scene.flow(150).await?;
    }
    scene.finish(PATIENCE).await
}

// ---- who is not there -----------------------------------------------------------------------------------------------------

/// What a client got, by conversation.
#[derive(Default)]
struct Seen(SyncMutex<Vec<Inbox>>);

impl Observer for Seen {
    fn observe(&self, event: Event<'_>) {
        if let Event::Received { delivery, .. } = event {
            self.0.lock().push(delivery.inbox.clone());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_message_to_somebody_offline_outlives_every_owner() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?.with_members(1, 2)).await?;
    let chat = Chat::start(&cluster, 6, 0).await?;
    let scene = Scene { cluster, chat };
    scene.wait_shards_shared_by(2).await?;
    let [away, others @ ..] = scene.chat.people() else { return Err("nobody there".into()) };
    away.client.set_online(false);
    away.client.offline().await;
    // He never logged in before, so nothing at all is known of him.
    let newcomer = format!("new.{}", away.name);
    for from in 1..=others.len() {
        for to in [&away.name, &newcomer] {
            let outcome = scene.chat.say(from, &format!("u/{to}")).await?;
            assert!(matches!(outcome, Outcome::Stored { .. }), "{outcome:?}");
        }
    }
    for owner in scene.cluster.members_of("business")? {
        scene.kill(&owner).await?;
    }
    let seen = Arc::new(Seen::default());
    let client = Client::start(Options::new(scene.cluster.mqtt(), newcomer, "phone"), seen.clone());
    // A connection that broke on the way gets some of them again, so it is not their number that counts.
    eventually("the newcomer gets what each of them wrote to him", PATIENCE, async || {
        let seen = seen.0.lock();
        let wrote = |name: &str| seen.iter().any(|inbox| matches!(inbox, Inbox::Person { peer, .. } if peer == name));
        others.iter().all(|person| wrote(&person.name)).then_some(())
    })
    .await?;
    client.stop().await;
    scene.finish(PATIENCE).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_left_a_group_while_offline_gets_all_up_to_then_and_nothing_after() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let cluster = Cluster::start(Template::new()?.with_members(1, 2)).await?;
    let chat = Chat::start(&cluster, 4, 1).await?;
    let scene = Scene { cluster, chat };
    let group = scene.chat.groups()[0].clone();
    // The first one made the group.
    let leaver = &scene.chat.people()[3];
    leaver.client.set_online(false);
    leaver.client.offline().await;
    let say = async |count: usize| -> TestResult<u64> {
        let mut last = 0;
        for number in 0..count {
            match scene.chat.say(number % 3, &format!("g/{group}")).await? {
                Outcome::Stored { seq: Some(seq), .. } => last = seq,
                outcome => return Err(format!("{outcome:?}").into()),
            }
        }
        Ok(last)
    };
    let before = say(20).await?;
    // Nobody else writes, so the next entry is the leave.
    scene.chat.journal.left(&group, &leaver.name, Some(before + 1));
    let himself = Credential::Insecure(leaver.name.clone());
    scene.cluster.api().leave_group(&himself, &group, &leaver.name).await?;
    let after = say(20).await?;
    assert_eq!(after, before + 21, "the leave is one entry of the log");
    for owner in scene.cluster.members_of("business")? {
        scene.kill(&owner).await?;
    }
    leaver.client.set_online(true);
    leaver.client.online().await;
    // Something that comes after all of the group, so that what should not come had its chance.
    scene.chat.say(0, &format!("u/{}", leaver.name)).await?;
    scene.finish(PATIENCE).await
}

// ---- presence -------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn people_stay_online_for_others_while_all_owners_restart_one_after_the_other() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    let names: Vec<String> = scene.chat.people().iter().map(|person| person.name.clone()).collect();
    let (api, done) = (scene.cluster.api(), Arc::new(AtomicBool::new(false)));
    // Asks for everybody in turns, all the while: an owner that does not know yet may say so, but never "offline".
    let watcher = tokio::spawn({
        let (api, names, done) = (api.clone(), names.clone(), done.clone());
        async move {
            let mut wrong = Vec::new();
            let start = Instant::now();
            while !done.load(Ordering::Relaxed) {
                for name in &names {
                    let himself = Credential::Insecure(name.clone());
                    if let Ok(answer) = api.presence(&himself, name).await
                        && answer["known"] == true
                        && answer["online"] == false
                    {
                        wrong.push(format!("{name} at {:?}: {answer}", start.elapsed()));
                    }
                }
                sleep(Duration::from_millis(20)).await;
            }
            wrong
        }
    });
    for owner in scene.cluster.members_of("business")? {
        scene.kill(&owner).await?;
        eventually("everybody is seen as online again", PATIENCE, async || {
            for name in &names {
                let answer = api.presence(&Credential::Insecure(name.clone()), name).await.ok()?;
                if answer["online"] != true {
                    return None;
                }
            }
            Some(())
        })
        .await?;
        scene.wait_shards_shared_by(2).await?;
    }
    done.store(true, Ordering::Relaxed);
    let wrong = watcher.await?;
    assert!(wrong.is_empty(), "connected people were called offline: {wrong:#?}");
    scene.finish(ACKED_AGAIN_WITHIN).await
}

#[tokio::test(flavor = "multi_thread")]
async fn presence_forgets_the_sessions_of_a_killed_gateway_within_three_seconds() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scene = Scene::start(Template::new()?.with_members(2, 2)).await?;
    let api = scene.cluster.api();
    // Connections that don't come back; the kernel deals them out over both gateways.
    let mut visitors = Vec::new();
    for number in 0..24 {
        let mut options = Options::new(scene.cluster.mqtt(), format!("visitor{number}"), "phone");
        options.keep_alive_seconds = 0;
        let (connection, _) = Connection::open(&options, true).await?;
        let answer = api.presence(&Credential::Insecure(options.user.clone()), &options.user).await?;
        assert_eq!(answer["online"], true, "{answer}");
        let gateway = answer["sessions"][0]["gateway"].as_str().ok_or("no gateway")?.to_owned();
        visitors.push((options.user, gateway, connection));
    }
    let killed = scene.member("gateway")?;
    let lost: Vec<&str> = visitors.iter().filter(|(_, at, _)| *at == killed.name).map(|(user, ..)| &**user).collect();
    assert!(!lost.is_empty() && lost.len() < visitors.len(), "all visitors are on one gateway");
    scene.cluster.signal(&killed, Signal::KILL)?;
    let start = Instant::now();
    eventually("the sessions of the killed gateway are gone", GONE_WITHIN, async || {
        for user in &lost {
            let answer = api.presence(&Credential::Insecure((*user).to_owned()), user).await.ok()?;
            if answer["online"] == true || answer["known"] == false {
                return None;
            }
        }
        Some(())
    })
    .await?;
    println!("{} sessions were gone after {:?}", lost.len(), start.elapsed());
    for (user, gateway, _) in &visitors {
        let answer = api.presence(&Credential::Insecure(user.clone()), user).await?;
        assert_eq!(answer["online"], *gateway != killed.name, "{user}: {answer}");
    }
    scene.finish(PATIENCE).await
}
