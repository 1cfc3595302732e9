//! The control service over real gRPC, with members that are a few lines each and a store that is one table.
#![allow(clippy::unwrap_used)]

use im_crds::ImCluster;
use im_operator::control::status::Status;
use im_operator::control::{ControlError, Setup, serve};
use im_operator::platform::{Platform, PlatformError, Process, ProcessState, Tier, View};
use im_operator::shards::Timing;
use im_proto::control::control_client::ControlClient;
use im_proto::control::{self as wire, Role as WireRole, command::Command, report::Report as Kind};
use im_proto::ids::MemberId;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

const SHARDS: u32 = 64;
/// Far above what anything here takes; only a failure waits for so long.
const DEADLINE: Duration = Duration::from_secs(30);

fn cluster(gateways: u32, business: u32) -> ImCluster {
    ImCluster::parse_yaml(&format!(
        "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {{name: chat}}\nspec:\n  auth: {{insecure: {{}}}}\n  \
         gateway: {{replicas: {gateways}, drain: {{rate: 7, notice: 0s}}}}\n  \
         business: {{replicas: {business}, shards: {SHARDS}, rebalance: {{cooldown: 0s}}}}\n"
    ))
    .unwrap()
}

/// The store's fencing rows: (epoch, owner), changed by compare-and-set alone.
#[derive(Default)]
struct Rows {
    rows: Mutex<BTreeMap<u32, (u64, String)>>,
    acquisitions: AtomicU64,
}

impl Rows {
    fn owners(&self) -> BTreeMap<String, u32> {
        let mut owners = BTreeMap::new();
        for (_, owner) in self.rows.lock().values() {
            let name = owner.split('/').next().unwrap_or_default().to_owned();
            *owners.entry(name).or_default() += 1;
        }
        owners
    }
}

/// A process of the test: what it was told, and how it behaves.
#[derive(Default)]
struct Behaviour {
    /// Says nothing more, like a stopped process.
    silent: AtomicBool,
    connections: AtomicU64,
    drain_rates: Mutex<Vec<f64>>,
    undrained: AtomicU64,
    terms: Mutex<BTreeSet<u64>>,
    map: Mutex<wire::Map>,
}

/// What stands for a process.
type Task = (Arc<Behaviour>, JoinHandle<()>);

/// A machine of tasks instead of processes.
struct Machine {
    cluster: Mutex<ImCluster>,
    view: watch::Sender<View>,
    control: SocketAddr,
    rows: Arc<Rows>,
    pids: AtomicU32,
    tasks: Mutex<BTreeMap<String, Task>>,
    /// Shards and connections that members still had when they were stopped.
    held_at_stop: Mutex<BTreeMap<String, u64>>,
}

impl Machine {
    async fn new(cluster: ImCluster) -> (Arc<Self>, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let machine = Self {
            cluster: Mutex::new(cluster),
            view: watch::channel(View { generation: 1, ..View::default() }).0,
            control: listener.local_addr().unwrap(),
            rows: Arc::default(),
            pids: AtomicU32::new(1000),
            tasks: Mutex::default(),
            held_at_stop: Mutex::default(),
        };
        (Arc::new(machine), listener)
    }

    fn edit(&self, cluster: ImCluster) {
        *self.cluster.lock() = cluster;
        self.view.send_modify(|view| view.generation += 1);
    }

    fn behaviour(&self, name: &str) -> Arc<Behaviour> {
        self.tasks.lock()[name].0.clone()
    }

    /// Its process ends, and the platform shows it.
    fn end(&self, name: &str) {
        if let Some((_, task)) = self.tasks.lock().remove(name) {
            task.abort();
        }
        self.view.send_modify(|view| view.processes.retain(|process| process.name != name));
    }
}

impl Platform for Machine {
    fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    fn cluster(&self) -> Result<ImCluster, PlatformError> {
        Ok(self.cluster.lock().clone())
    }

    fn template(&self, cluster: &ImCluster, _: Tier) -> String {
        cluster.spec.messages.catch_up.to_string()
    }

    async fn start(&self, cluster: &ImCluster, tier: Tier, name: &str) -> Result<(), PlatformError> {
        let pid = self.pids.fetch_add(1, Ordering::Relaxed);
        let behaviour = Arc::new(Behaviour::default());
        behaviour.connections.store(20, Ordering::Relaxed);
        let member = MemberId::new(name, pid.into()).unwrap();
        let task = tokio::spawn(live(self.control, tier, member, pid, self.rows.clone(), behaviour.clone()));
        self.tasks.lock().insert(name.to_owned(), (behaviour, task));
        let process = Process {
            name: name.to_owned(),
            role: tier.role(),
            state: ProcessState::Running,
            pid: Some(pid),
            starts: 1,
            template: self.template(cluster, tier),
            addresses: BTreeMap::new(),
        };
        self.view.send_modify(|view| view.processes.push(process));
        Ok(())
    }

    async fn stop(&self, name: &str, _: Duration) -> Result<(), PlatformError> {
        let held = match Tier::Business.index_of(name) {
            Some(_) => self.rows.owners().get(name).copied().unwrap_or(0).into(),
            None => self.behaviour(name).connections.load(Ordering::Relaxed),
        };
        self.held_at_stop.lock().insert(name.to_owned(), held);
        self.end(name);
        Ok(())
    }

    async fn describe(&self, _: &str, _: u32, _: BTreeMap<String, String>) -> Result<(), PlatformError> {
        Ok(())
    }
}

/// A member: joins again and again, obeys, and reports.
async fn live(control: SocketAddr, tier: Tier, me: MemberId, pid: u32, rows: Arc<Rows>, behaviour: Arc<Behaviour>) {
    loop {
        // Its errors are those of a control that is gone: it dials again.
        let _ = join(control, tier, &me, pid, &rows, &behaviour).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn join(
    control: SocketAddr,
    tier: Tier,
    me: &MemberId,
    pid: u32,
    rows: &Rows,
    behaviour: &Behaviour,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut client = ControlClient::connect(format!("http://{control}")).await?;
    let (reports, stream) = mpsc::channel(64);
    let report = |kind| wire::Report { report: Some(kind) };
    let held = || -> Vec<wire::ShardEpoch> {
        let rows = rows.rows.lock();
        let mine = rows.iter().filter(|(_, (_, owner))| owner == me.as_str());
        mine.map(|(shard, (epoch, _))| wire::ShardEpoch { shard: *shard, epoch: *epoch }).collect()
    };
    let role = if tier == Tier::Gateway { WireRole::Gateway } else { WireRole::Business };
    let highest = behaviour.terms.lock().last().copied().unwrap_or(0);
    let hello = wire::Hello {
        member: me.to_string(),
        role: role.into(),
        pid,
        link_address: format!("127.0.0.1:{pid}"),
        term: highest,
        held: held(),
        ..Default::default()
    };
    reports.send(report(Kind::Hello(hello))).await?;
    let mut commands = client.join(ReceiverStream::new(stream)).await?.into_inner();
    let mut beats = tokio::time::interval(Duration::from_millis(100));
    loop {
        let command = tokio::select! {
            command = commands.message() => command?.ok_or("the stream ended")?,
            _ = beats.tick() => {
                if behaviour.silent.load(Ordering::Relaxed) {
                    continue;
                }
                let draining = behaviour.drain_rates.lock().last().is_some_and(|rate| *rate > 0.0);
                if draining {
                    let _ = behaviour.connections.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |c| c.checked_sub(5));
                }
                let connections = behaviour.connections.load(Ordering::Relaxed);
                let beat = wire::Heartbeat {
                    held: held(),
                    store_ok: true,
                    connections,
                    drained: draining && connections == 0,
                    ..Default::default()
                };
                reports.send(report(Kind::Heartbeat(beat))).await?;
                continue;
            }
        };
        behaviour.terms.lock().insert(command.term);
        if behaviour.silent.load(Ordering::Relaxed) {
            continue;
        }
        match command.command.ok_or("an empty command")? {
            Command::Map(map) => *behaviour.map.lock() = map,
            Command::Acquire(acquire) => {
                let (mut won, mut lost) = (Vec::new(), Vec::new());
                for expected in acquire.expected {
                    let mut rows_now = rows.rows.lock();
                    let row = rows_now.entry(expected.shard).or_default();
                    if *row == (expected.epoch, expected.owner) {
                        *row = (expected.epoch + 1, me.to_string());
                        rows.acquisitions.fetch_add(1, Ordering::Relaxed);
                        won.push(wire::ShardEpoch { shard: expected.shard, epoch: row.0 });
                    } else {
                        lost.push(wire::ShardRow { shard: expected.shard, epoch: row.0, owner: row.1.clone() });
                    }
                }
                if !won.is_empty() {
                    reports.send(report(Kind::Acquired(wire::Acquired { shards: won }))).await?;
                }
                if !lost.is_empty() {
                    reports.send(report(Kind::AcquireLost(wire::AcquireLost { rows: lost }))).await?;
                }
            }
            Command::Release(release) => {
                let released = {
                    let mut rows_now = rows.rows.lock();
                    let row = rows_now.entry(release.shard).or_default();
                    let mine = *row == (release.epoch, me.to_string());
                    if mine {
                        row.1.clear();
                    }
                    mine
                };
                if released {
                    let shards = vec![wire::ShardEpoch { shard: release.shard, epoch: release.epoch }];
                    reports.send(report(Kind::Released(wire::Released { shards }))).await?;
                }
            }
            Command::Drain(drain) => behaviour.drain_rates.lock().push(drain.per_second),
            Command::Undrain(_) => {
                behaviour.drain_rates.lock().clear();
                behaviour.undrained.fetch_add(1, Ordering::Relaxed);
            }
            Command::Prepare(_) | Command::CancelRelease(_) | Command::NotLeader(_) => {}
        }
    }
}

/// A running control.
struct Control {
    status: watch::Receiver<Status>,
    task: JoinHandle<Result<(), ControlError>>,
}

impl Control {
    fn start(machine: &Arc<Machine>, listener: TcpListener, map_file: PathBuf) -> Self {
        let (sender, status) = watch::channel(Status::default());
        let timing = Timing { hearing: Duration::from_millis(600), ..Timing::default() };
        let task = tokio::spawn(serve(machine.clone(), listener, Setup { map_file, timing }, sender));
        Self { status, task }
    }

    async fn eventually(&mut self, what: &str, holds: impl FnMut(&Status) -> bool) -> Status {
        let found = tokio::time::timeout(DEADLINE, self.status.wait_for(holds)).await;
        let found = found.map(|status| status.expect("control runs").clone());
        match found {
            Ok(status) => status,
            Err(_) => panic!("not within {DEADLINE:?}: {what}\n{:#?}", self.status.borrow()),
        }
    }

    async fn end(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn map_file(test: &str) -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("control-{test}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir.join("shardmap.json")
}

fn settled(status: &Status) -> bool {
    !status.shards.hearing && status.shards.owned == SHARDS && status.shards.moving == 0 && status.shards.queued == 0
}

fn shares(status: &Status) -> Vec<u32> {
    status.shards.per_member.values().copied().filter(|count| *count > 0).collect()
}

async fn two_members(test: &str) -> (Arc<Machine>, Control, Status, PathBuf) {
    let (machine, listener) = Machine::new(cluster(1, 2)).await;
    let file = map_file(test);
    let mut control = Control::start(&machine, listener, file.clone());
    let status =
        control.eventually("all shards are owned", |status| settled(status) && shares(status) == [32, 32]).await;
    (machine, control, status, file)
}

#[tokio::test]
async fn shards_are_acquired_then_moved_to_a_newcomer_and_back_when_it_leaves() {
    let (machine, mut control, status, _) = two_members("moves").await;
    assert_eq!(status.no_message_lost.status, "True");
    assert_eq!(machine.rows.acquisitions.load(Ordering::Relaxed), u64::from(SHARDS), "each placed once");

    machine.edit(cluster(1, 3));
    let status = control
        .eventually("a third gets its share", |s| {
            settled(s) && shares(s).len() == 3 && shares(s).iter().all(|n| *n >= 18)
        })
        .await;
    let moved = machine.rows.acquisitions.load(Ordering::Relaxed) - u64::from(SHARDS);
    assert_eq!(moved, u64::from(status.shards.per_member["business-2"]), "only what the newcomer gets has moved");
    // The gateway knows it: every shard has an owner of the epoch in the store.
    let gateway = machine.behaviour("gateway-0");
    control
        .eventually("the gateway has the map", |_| {
            let map = gateway.map.lock();
            map.owners.len() == SHARDS as usize
                && map.members.len() == 4 // the owners and itself: who is offline is known when all gateways announced
                && machine.rows.rows.lock().iter().all(|(shard, (epoch, owner))| {
                    let member = (map.owners[*shard as usize] as usize).checked_sub(1).map(|i| &map.members[i]);
                    map.epochs[*shard as usize] == *epoch && member.is_some_and(|member| member.member == *owner)
                })
        })
        .await;

    machine.edit(cluster(1, 2));
    control.eventually("two again", |s| settled(s) && s.tiers.business.members.len() == 2).await;
    assert_eq!(machine.held_at_stop.lock().values().copied().collect::<Vec<_>>(), [0], "emptied before it was stopped");
    control.end().await;
}

#[tokio::test]
async fn a_silent_owner_loses_its_shards_after_three_seconds_and_an_ended_one_at_once() {
    let (machine, mut control, _, _) = two_members("silence").await;
    machine.behaviour("business-1").silent.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let others = |machine: &Machine| machine.rows.owners().get("business-0") == Some(&SHARDS);
    control.eventually("the other has them all", |_| others(&machine)).await;
    let took = began.elapsed();
    assert!(took > Duration::from_millis(2_500) && took < Duration::from_secs(5), "took over after {took:?}");

    // It wakes up: what it believed to hold is fenced, and it gets a share by a plan.
    machine.behaviour("business-1").silent.store(false, Ordering::Relaxed);
    control.eventually("both again", |s| settled(s) && shares(s) == [32, 32]).await;

    // Its successor has another boot id.
    let ended =
        machine.rows.rows.lock().values().find(|(_, owner)| owner.starts_with("business-1/")).unwrap().1.clone();
    let began = Instant::now();
    machine.end("business-1");
    control.eventually("at once", |_| machine.rows.rows.lock().values().all(|(_, owner)| *owner != ended)).await;
    assert!(began.elapsed() < Duration::from_millis(1_500), "confirmed by the platform: {:?}", began.elapsed());
    control.eventually("the tier is whole again", |s| settled(s) && shares(s) == [32, 32]).await;
    control.end().await;
}

#[tokio::test]
async fn a_new_control_keeps_the_map_under_a_higher_term() {
    let (machine, control, before, file) = two_members("restart").await;
    let acquisitions = machine.rows.acquisitions.load(Ordering::Relaxed);
    control.end().await;
    let listener = TcpListener::bind(machine.control).await.unwrap();
    let mut control = Control::start(&machine, listener, file.clone());
    let after = control.eventually("settled", settled).await;
    assert_eq!(after.shards.term, before.shards.term + 1);
    assert_eq!(after.shards.per_member, before.shards.per_member);
    control.end().await;

    // Even without its file: the members tell what is, and the term goes above what they know.
    std::fs::remove_file(&file).unwrap();
    let listener = TcpListener::bind(machine.control).await.unwrap();
    let mut control = Control::start(&machine, listener, file);
    let last = control.eventually("settled", settled).await;
    assert!(last.shards.term > after.shards.term, "{} after {}", last.shards.term, after.shards.term);
    assert_eq!(last.shards.per_member, before.shards.per_member);
    assert_eq!(machine.rows.acquisitions.load(Ordering::Relaxed), acquisitions, "nothing had to be acquired anew");
    control.end().await;
}

#[tokio::test]
async fn after_a_full_stop_all_shards_are_taken_over_without_waiting_for_the_dead() {
    let (machine, control, before, file) = two_members("stop").await;
    control.end().await;
    for name in ["gateway-0", "business-0", "business-1"] {
        machine.end(name);
    }
    let listener = TcpListener::bind(machine.control).await.unwrap();
    let began = Instant::now();
    let mut control = Control::start(&machine, listener, file);
    let after = control.eventually("settled", |status| settled(status) && shares(status) == [32, 32]).await;
    assert!(began.elapsed() < Duration::from_millis(2_500), "not after 3 s of silence: {:?}", began.elapsed());
    assert_eq!(after.shards.per_member, before.shards.per_member, "each name has its shards again");
    let once_more = machine.rows.rows.lock().values().all(|(epoch, _)| *epoch == 2);
    assert!(once_more, "each acquired once more");
    control.end().await;
}

#[tokio::test]
async fn a_gateway_is_drained_before_it_is_stopped_and_may_stay_after_all() {
    let (machine, listener) = Machine::new(cluster(3, 1)).await;
    let mut control = Control::start(&machine, listener, map_file("drain"));
    control.eventually("three gateways", |s| s.tiers.gateway.ready == 3 && settled(s)).await;
    machine.behaviour("gateway-1").connections.store(5_000, Ordering::Relaxed);
    machine.behaviour("gateway-2").connections.store(4_000, Ordering::Relaxed);
    machine.behaviour("gateway-0").connections.store(9_000, Ordering::Relaxed);
    let crowded = |s: &Status| s.tiers.gateway.members.iter().all(|m| m.connections >= Some(3_000));
    control.eventually("its connections are known", crowded).await;

    machine.edit(cluster(2, 1));
    let draining = |name: &'static str| {
        move |s: &Status| s.tiers.gateway.members.iter().any(|m| m.name == name && m.draining == Some(true))
    };
    control.eventually("the emptiest drains", draining("gateway-2")).await;
    let told = machine.behaviour("gateway-2");
    control.eventually("at the rate of the file", |_| told.drain_rates.lock().last() == Some(&7.0)).await;
    let undrained = told.undrained.load(Ordering::Relaxed);

    machine.edit(cluster(3, 1));
    control.eventually("it stays", |s| s.tiers.gateway.ready == 3).await;
    control.eventually("and knows", |_| told.undrained.load(Ordering::Relaxed) > undrained).await;
    assert!(machine.held_at_stop.lock().is_empty());

    told.connections.store(50, Ordering::Relaxed);
    machine.edit(cluster(2, 1));
    control.eventually("it is gone", |s| s.tiers.gateway.members.len() == 2).await;
    assert_eq!(machine.held_at_stop.lock().iter().collect::<Vec<_>>(), [(&"gateway-2".to_owned(), &0)]);
    control.end().await;
}

#[tokio::test]
async fn a_new_configuration_replaces_members_one_by_one() {
    let (machine, mut control, _, _) = two_members("roll").await;
    let mut edited = cluster(1, 2);
    edited.spec.messages.catch_up = 7;
    machine.edit(edited);
    let fresh = |machine: &Machine| {
        let view = machine.view.borrow();
        view.processes.len() == 3 && view.processes.iter().all(|process| process.template == "7")
    };
    control.eventually("all run with it", |s| fresh(&machine) && settled(s) && shares(s) == [32, 32]).await;
    let held: Vec<u64> = machine.held_at_stop.lock().values().copied().collect();
    assert_eq!(held, [0, 0, 0], "nobody was stopped who held anything");
    control.end().await;
}

#[tokio::test]
async fn paused_and_recommend_show_and_do_nothing_but_lost_shards_are_placed() {
    let (machine, mut control, _, _) = two_members("paused").await;
    let mut edited = cluster(2, 3);
    edited.spec.mode = im_crds::Mode::Recommend;
    machine.edit(edited.clone());
    let status =
        control.eventually("the recommendation", |s| s.tiers.business.desired == 3 && s.mode == "Recommend").await;
    assert_eq!((status.tiers.gateway.desired, status.tiers.gateway.replicas), (2, 1));

    edited.spec.mode = im_crds::Mode::Auto;
    edited.spec.paused = true;
    machine.edit(edited);
    control.eventually("paused", |s| s.paused).await;
    machine.end("business-1");
    control.eventually("the other has all", |s| settled(s) && shares(s) == [SHARDS]).await;
    let status = control.eventually("still", |s| s.tiers.business.desired == 3).await;
    assert_eq!(status.tiers.business.members.len(), 1, "nobody was started");
    control.end().await;
}

#[tokio::test]
async fn who_does_not_say_hello_is_refused() {
    let (machine, listener) = Machine::new(cluster(1, 1)).await;
    let mut control = Control::start(&machine, listener, map_file("hello"));
    control.eventually("control runs", |s| !s.at.is_empty()).await;
    let bad_hello = wire::Hello { member: "no boot id".into(), ..Default::default() };
    for first in [Kind::Heartbeat(wire::Heartbeat::default()), Kind::Hello(bad_hello)] {
        let mut client = ControlClient::connect(format!("http://{}", machine.control)).await.unwrap();
        let (reports, stream) = mpsc::channel(1);
        reports.send(wire::Report { report: Some(first) }).await.unwrap();
        let mut commands = client.join(ReceiverStream::new(stream)).await.unwrap().into_inner();
        assert!(commands.message().await.is_err(), "the stream is closed");
    }
    control.end().await;
}
