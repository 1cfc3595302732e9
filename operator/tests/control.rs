//! The control service over real gRPC, with members that are a few lines each and a store that is one table.
#![allow(clippy::unwrap_used)]

use im_crds::ImCluster;
use im_operator::control::proposal::APPROVE_ANNOTATION;
use im_operator::control::status::Status;
use im_operator::control::{ClusterKey, Clusters, ControlError, Leadership, Led, Setup, serve};
use im_operator::platform::{Platform, PlatformError, Process, ProcessState, StoredMap, Tier, View};
use im_operator::shards::Timing;
use im_proto::control::{self as wire, Role as WireRole, command::Command, report::Report as Kind};
use im_proto::dial::ControlDialer;
use im_proto::ids::MemberId;
use im_proto::map_hint;
use im_proto::token::{SharedToken, Tokens};
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;

const SHARDS: u32 = 64;
const TOKEN: &str = "a token";
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
    /// Was told to end.
    leaving: AtomicBool,
    connections: AtomicU64,
    /// Does not find control.
    hidden: AtomicBool,
    /// The store refuses its writes.
    refused: AtomicBool,
    /// The store does not answer it.
    cut_off: AtomicBool,
    drain_rates: Mutex<Vec<f64>>,
    shed_rates: Mutex<Vec<f64>>,
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
    /// Where members dial.
    control: watch::Sender<SocketAddr>,
    rows: Rows,
    pids: AtomicU32,
    tasks: Mutex<BTreeMap<String, Task>>,
    /// The stored map, and how often one was stored.
    stored: Mutex<(u64, Option<StoredMap>)>,
    /// Copies of the map for members that start.
    published: Mutex<Vec<Vec<u8>>>,
    /// Gateways that new connections are led to.
    serving: Mutex<BTreeSet<String>>,
    /// Shards and connections that members still had when they were stopped.
    held_at_stop: Mutex<BTreeMap<String, u64>>,
    /// Nobody is started any more.
    full: AtomicBool,
    /// When somebody was to be started all the same.
    refused_starts: Mutex<Vec<Instant>>,
}

impl Machine {
    async fn new(cluster: ImCluster) -> (Arc<Self>, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let machine = Self {
            cluster: Mutex::new(cluster),
            view: watch::channel(View { generation: 1, ..View::default() }).0,
            control: watch::Sender::new(listener.local_addr().unwrap()),
            rows: Rows::default(),
            pids: AtomicU32::new(1000),
            tasks: Mutex::default(),
            stored: Mutex::default(),
            published: Mutex::default(),
            serving: Mutex::default(),
            held_at_stop: Mutex::default(),
            full: AtomicBool::new(false),
            refused_starts: Mutex::default(),
        };
        (Arc::new(machine), listener)
    }

    fn address(&self) -> SocketAddr {
        *self.control.borrow()
    }

    fn edit(&self, cluster: ImCluster) {
        *self.cluster.lock() = cluster;
        self.view.send_modify(|view| view.generation += 1);
    }

    fn behaviour(&self, name: &str) -> Arc<Behaviour> {
        self.tasks.lock()[name].0.clone()
    }

    /// The platform was told by somebody else to end it.
    fn show_stopping(&self, name: &str) {
        self.view.send_modify(|view| {
            let process = view.processes.iter_mut().find(|process| process.name == name).unwrap();
            process.state = ProcessState::Stopping;
        });
    }

    /// Its process ends, and the platform shows it.
    fn end(&self, name: &str) {
        if let Some((_, task)) = self.tasks.lock().remove(name) {
            task.abort();
        }
        self.view.send_modify(|view| view.processes.retain(|process| process.name != name));
    }
}

/// The machine as one leader sees it.
struct Eyes {
    machine: Arc<Machine>,
    /// Of the stored map that it loaded or stored last.
    version: AtomicU64,
}

impl Platform for Eyes {
    fn watch(&self) -> watch::Receiver<View> {
        self.machine.view.subscribe()
    }

    fn cluster(&self) -> Result<ImCluster, PlatformError> {
        Ok(self.machine.cluster.lock().clone())
    }

    fn template(&self, cluster: &ImCluster, _: Tier) -> String {
        cluster.spec.messages.catch_up.to_string()
    }

    async fn start(&self, cluster: &ImCluster, tier: Tier, count: u32) -> Result<(), PlatformError> {
        if self.machine.full.load(Ordering::Relaxed) {
            self.machine.refused_starts.lock().push(Instant::now());
            return Err(PlatformError::Refused("there is no room".to_owned()));
        }
        let names = (0..).map(|index| format!("{tier}-{index}"));
        let free = names.filter(|name| self.machine.view.borrow().process(name).is_none()).take(count as usize);
        for name in free.collect::<Vec<_>>() {
            let pid = self.machine.pids.fetch_add(1, Ordering::Relaxed);
            let behaviour = Arc::new(Behaviour::default());
            behaviour.connections.store(20, Ordering::Relaxed);
            let member = MemberId::new(&name, pid.into()).unwrap();
            let task = tokio::spawn(live(self.machine.clone(), tier, member, pid, behaviour.clone()));
            self.machine.tasks.lock().insert(name.clone(), (behaviour, task));
            let process = Process {
                name,
                role: tier.role(),
                state: ProcessState::Running,
                instance: Some(pid.to_string()),
                pid: Some(pid),
                starts: 1,
                template: self.template(cluster, tier),
                addresses: BTreeMap::new(),
            };
            self.machine.view.send_modify(|view| view.processes.push(process));
        }
        Ok(())
    }

    async fn stop(&self, name: &str, _: Duration) -> Result<(), PlatformError> {
        let held = match name.starts_with("business") {
            true => self.machine.rows.owners().get(name).copied().unwrap_or(0).into(),
            false => self.machine.behaviour(name).connections.load(Ordering::Relaxed),
        };
        self.machine.held_at_stop.lock().insert(name.to_owned(), held);
        self.machine.end(name);
        Ok(())
    }

    async fn set_serving(&self, name: &str, serving: bool) -> Result<(), PlatformError> {
        let mut names = self.machine.serving.lock();
        let _ = if serving { names.insert(name.to_owned()) } else { names.remove(name) };
        Ok(())
    }

    async fn describe(&self, _: &str, _: &str, _: BTreeMap<String, String>) -> Result<(), PlatformError> {
        Ok(())
    }

    async fn load_map(&self) -> Result<Option<StoredMap>, PlatformError> {
        let (version, stored) = self.machine.stored.lock().clone();
        self.version.store(version, Ordering::Relaxed);
        Ok(stored)
    }

    async fn save_map(&self, map: &StoredMap) -> Result<(), PlatformError> {
        let mut stored = self.machine.stored.lock();
        if stored.0 != self.version.load(Ordering::Relaxed) {
            return Err(PlatformError::Outranked);
        }
        *stored = (stored.0 + 1, Some(map.clone()));
        self.version.store(stored.0, Ordering::Relaxed);
        Ok(())
    }

    async fn publish_map(&self, hint: Vec<u8>) -> Result<(), PlatformError> {
        self.machine.published.lock().push(hint);
        Ok(())
    }
}

/// A member: joins again and again, obeys, and reports.
async fn live(machine: Arc<Machine>, tier: Tier, me: MemberId, pid: u32, behaviour: Arc<Behaviour>) {
    let mut controls = machine.control.subscribe();
    loop {
        let control = *controls.borrow_and_update();
        if !behaviour.hidden.load(Ordering::Relaxed) {
            tokio::select! {
                // Its errors are those of a control that is gone: it dials again.
                _ = join(control, tier, &me, pid, &machine.rows, &behaviour) => {}
                _ = controls.changed() => {}
            }
        }
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
    let mut dialer =
        ControlDialer::new(vec![control.to_string()], Some("default/chat"), SharedToken::fixed(TOKEN).unwrap());
    let (_, mut client) = dialer.connect().await?;
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
        instance: pid.to_string(),
        ..Default::default()
    };
    reports.send(report(Kind::Hello(hello))).await?;
    let mut commands = client.join(dialer.request(ReceiverStream::new(stream))).await?.into_inner();
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
                    store_ok: !behaviour.cut_off.load(Ordering::Relaxed),
                    connections,
                    drained: draining && connections == 0,
                    store_refuses: behaviour.refused.load(Ordering::Relaxed),
                    leaving: behaviour.leaving.load(Ordering::Relaxed),
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
            Command::Shed(shed) => behaviour.shed_rates.lock().push(shed.per_second),
            Command::Undrain(_) => {
                behaviour.drain_rates.lock().clear();
                behaviour.undrained.fetch_add(1, Ordering::Relaxed);
            }
            Command::CancelRelease(_) | Command::NotLeader(_) => {}
        }
    }
}

/// A running control: the decisions for one cluster, and the service that its members dial.
struct Control {
    status: watch::Receiver<Status>,
    led: Led,
    leadership: watch::Sender<Leadership>,
    clusters: Arc<Clusters>,
    service: JoinHandle<Result<(), ControlError>>,
}

impl Control {
    fn start(machine: &Arc<Machine>, listener: TcpListener) -> Self {
        let timing = Timing { hearing: Duration::from_millis(600), ..Timing::default() };
        let (leadership, leads) = watch::channel(Leadership::Leading);
        let clusters = Clusters::new(leads);
        let platform = Arc::new(Eyes { machine: machine.clone(), version: AtomicU64::new(0) });
        let led = clusters.lead(
            ClusterKey("default/chat".into()),
            Tokens::parse(TOKEN).unwrap(),
            platform,
            Setup { timing, ..Setup::default() },
        );
        let service = tokio::spawn(serve(clusters.clone(), listener));
        Self { status: led.status.clone(), led, leadership, clusters, service }
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
        drop(self.led);
        self.service.abort();
        let _ = self.service.await;
    }
}

fn settled(status: &Status) -> bool {
    !status.shards.hearing && status.shards.owned == SHARDS && status.shards.moving == 0 && status.shards.queued == 0
}

fn shares(status: &Status) -> Vec<u32> {
    status.shards.per_member.values().copied().filter(|count| *count > 0).collect()
}

async fn two_members() -> (Arc<Machine>, Control, Status) {
    let (machine, listener) = Machine::new(cluster(1, 2)).await;
    let mut control = Control::start(&machine, listener);
    let status =
        control.eventually("all shards are owned", |status| settled(status) && shares(status) == [32, 32]).await;
    (machine, control, status)
}

#[tokio::test]
async fn shards_are_acquired_then_moved_to_a_newcomer_and_back_when_it_leaves() {
    let (machine, mut control, status) = two_members().await;
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
    let copied = || machine.published.lock().last().cloned().unwrap_or_default();
    let as_it_is = || map_hint::encode(gateway.map.lock().clone());
    control.eventually("members that start find a copy of it", |_| copied() == as_it_is()).await;
    let copies = machine.published.lock().len();
    assert!(copies <= 4, "{copies} copies for a start and one more member: each is a write");

    machine.edit(cluster(1, 2));
    control.eventually("two again", |s| settled(s) && s.tiers.business.members.len() == 2).await;
    assert_eq!(machine.held_at_stop.lock().values().copied().collect::<Vec<_>>(), [0], "emptied before it was stopped");
    control.end().await;
}

#[tokio::test]
async fn a_silent_owner_loses_its_shards_after_three_seconds_and_an_ended_one_at_once() {
    let (machine, mut control, _) = two_members().await;
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
    let (machine, control, before) = two_members().await;
    let acquisitions = machine.rows.acquisitions.load(Ordering::Relaxed);
    control.end().await;
    let listener = TcpListener::bind(machine.address()).await.unwrap();
    let mut control = Control::start(&machine, listener);
    let after = control.eventually("settled", |s| settled(s) && shares(s) == [32, 32]).await;
    assert_eq!(after.shards.term, before.shards.term + 1);
    assert_eq!(after.shards.per_member, before.shards.per_member);
    control.end().await;

    // Even without the stored map: the members tell what is, and the term goes above what they know.
    machine.stored.lock().1 = None;
    let listener = TcpListener::bind(machine.address()).await.unwrap();
    let mut control = Control::start(&machine, listener);
    let last = control.eventually("settled", |s| settled(s) && shares(s) == [32, 32]).await;
    assert!(last.shards.term > after.shards.term, "{} after {}", last.shards.term, after.shards.term);
    assert_eq!(last.shards.per_member, before.shards.per_member);
    assert_eq!(machine.rows.acquisitions.load(Ordering::Relaxed), acquisitions, "nothing had to be acquired anew");
    control.end().await;
}

#[tokio::test]
async fn after_a_full_stop_all_shards_are_taken_over_without_waiting_for_the_dead() {
    let (machine, control, before) = two_members().await;
    control.end().await;
    for name in ["gateway-0", "business-0", "business-1"] {
        machine.end(name);
    }
    let listener = TcpListener::bind(machine.address()).await.unwrap();
    let began = Instant::now();
    let mut control = Control::start(&machine, listener);
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
    let mut control = Control::start(&machine, listener);
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
    assert!(!machine.serving.lock().contains("gateway-2"), "nobody is led to it");
    let undrained = told.undrained.load(Ordering::Relaxed);

    machine.edit(cluster(3, 1));
    control.eventually("it stays", |s| s.tiers.gateway.ready == 3).await;
    control.eventually("and knows", |_| told.undrained.load(Ordering::Relaxed) > undrained).await;
    control.eventually("new connections come", |_| machine.serving.lock().len() == 3).await;
    assert!(machine.held_at_stop.lock().is_empty());

    told.connections.store(50, Ordering::Relaxed);
    machine.edit(cluster(2, 1));
    control.eventually("it is gone", |s| s.tiers.gateway.members.len() == 2).await;
    assert_eq!(machine.held_at_stop.lock().iter().collect::<Vec<_>>(), [(&"gateway-2".to_owned(), &0)]);
    control.end().await;
}

#[tokio::test]
async fn a_new_configuration_replaces_members_one_by_one() {
    let (machine, mut control, _) = two_members().await;
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
    let (machine, mut control, _) = two_members().await;
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
    let mut control = Control::start(&machine, listener);
    control.eventually("control runs", |s| !s.at.is_empty()).await;
    let bad_hello = wire::Hello { member: "no boot id".into(), ..Default::default() };
    for first in [Kind::Heartbeat(wire::Heartbeat::default()), Kind::Hello(bad_hello)] {
        let mut dialer =
            ControlDialer::new(vec![machine.address().to_string()], None, SharedToken::fixed(TOKEN).unwrap());
        let (_, mut client) = dialer.connect().await.unwrap();
        let (reports, stream) = mpsc::channel(1);
        reports.send(wire::Report { report: Some(first) }).await.unwrap();
        let request = dialer.request(ReceiverStream::new(stream));
        let mut commands = client.join(request).await.unwrap().into_inner();
        assert!(commands.message().await.is_err(), "the stream is closed");
    }
    control.end().await;
}

#[tokio::test]
async fn who_has_another_token_is_refused_and_who_asks_a_follower_is_sent_to_the_leader() {
    let (machine, control, _) = two_members().await;
    let join = async |token: Option<&str>| {
        let token = token.map_or_else(SharedToken::none, |token| SharedToken::fixed(token).unwrap());
        let mut dialer = ControlDialer::new(vec![machine.address().to_string()], Some("default/chat"), token);
        let (_, mut client) = dialer.connect().await.unwrap();
        let (_reports, stream) = mpsc::channel::<wire::Report>(1);
        client.join(dialer.request(ReceiverStream::new(stream))).await.map(tonic::Response::into_inner)
    };
    for wrong in [None, Some("a toke"), Some("another")] {
        assert_eq!(join(wrong).await.unwrap_err().code(), tonic::Code::Unauthenticated, "{wrong:?}");
    }
    assert!(join(Some(TOKEN)).await.is_ok());
    control.leadership.send_replace(Leadership::Following { leader: Some("10.0.0.7:7200".into()) });
    let command = join(Some(TOKEN)).await.unwrap().message().await.unwrap().unwrap();
    let leader = wire::NotLeader { address: "10.0.0.7:7200".into() };
    assert_eq!(command.command, Some(Command::NotLeader(leader)));
    control.end().await;
}

#[tokio::test]
async fn members_that_were_told_to_end_are_emptied_first() {
    let (machine, listener) = Machine::new(cluster(3, 3)).await;
    let mut control = Control::start(&machine, listener);
    control.eventually("all serve", |s| s.tiers.gateway.ready == 3 && settled(s) && shares(s).len() == 3).await;

    // By a signal: the member says so.
    machine.behaviour("business-2").leaving.store(true, Ordering::Relaxed);
    let shards = |s: &Status, name: &str| s.shards.per_member.get(name).copied().unwrap_or(0);
    control.eventually("its shards are elsewhere", |s| settled(s) && shards(s, "business-2") == 0).await;
    // By an eviction: the platform says so, and another one is started in its place.
    machine.show_stopping("business-1");
    let moved = |s: &Status| settled(s) && shards(s, "business-1") == 0 && shards(s, "business-3") > 0;
    control.eventually("its shards are elsewhere too", moved).await;

    // Gateways that go share the rate, however each came to go.
    for gateway in ["gateway-1", "gateway-2"] {
        machine.behaviour(gateway).connections.store(9_000, Ordering::Relaxed);
    }
    machine.behaviour("gateway-1").leaving.store(true, Ordering::Relaxed);
    machine.show_stopping("gateway-2");
    for gateway in ["gateway-1", "gateway-2"] {
        let told = machine.behaviour(gateway);
        control.eventually("half of the rate for each", |_| told.drain_rates.lock().last() == Some(&3.5)).await;
    }
    let held = machine.held_at_stop.lock().clone();
    assert!(held.values().all(|held| *held == 0), "nobody was stopped who held something: {held:?}");

    // The one that had the signal is started again under its name.
    machine.behaviour("business-2").leaving.store(false, Ordering::Relaxed);
    control.eventually("it gets its share", |s| settled(s) && shards(s, "business-2") > 0).await;
    control.end().await;
}

#[tokio::test]
async fn of_two_leaders_the_one_before_ends_and_commands_nobody() {
    let (machine, mut first, before) = two_members().await;
    // The first one loses its members and its leadership without noticing, as a process that was stopped.
    let first_address = machine.address();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    machine.control.send_replace(listener.local_addr().unwrap());
    first.service.abort();
    let _ = (&mut first.service).await;
    let mut second = Control::start(&machine, listener);
    let after = second.eventually("the second leads", |s| settled(s) && shares(s) == [32, 32]).await;
    assert_eq!(after.shards.term, before.shards.term + 1);
    assert_eq!(after.shards.per_member, before.shards.per_member);

    // Resumed, it hears from a member of the term after its own.
    let listener = TcpListener::bind(first_address).await.unwrap();
    let resumed = tokio::spawn(serve(first.clusters.clone(), listener));
    let stray = Arc::new(Behaviour::default());
    stray.terms.lock().insert(after.shards.term);
    let me = MemberId::new("business-9", 9).unwrap();
    let joined = {
        let (machine, stray) = (machine.clone(), stray.clone());
        tokio::spawn(async move { join(first_address, Tier::Business, &me, 9, &machine.rows, &stray).await.is_err() })
    };
    let ended = tokio::time::timeout(DEADLINE, first.led.ended()).await.expect("it ends");
    assert!(matches!(ended, Err(ControlError::Platform(PlatformError::Outranked))), "{ended:?}");
    assert!(joined.await.unwrap(), "its members are sent away");
    assert_eq!(
        stray.terms.lock().iter().copied().collect::<Vec<_>>(),
        [after.shards.term],
        "no command of another term"
    );
    let last = second.eventually("the second still leads", settled).await;
    assert_eq!((last.shards.term, last.shards.per_member), (after.shards.term, before.shards.per_member));
    resumed.abort();
    second.end().await;
}

fn approve(cluster: &ImCluster, hash: &str) -> ImCluster {
    let mut cluster = cluster.clone();
    let annotations = cluster.metadata.annotations.get_or_insert_default();
    annotations.insert(APPROVE_ANNOTATION.to_owned(), hash.to_owned());
    cluster
}

#[tokio::test]
async fn what_is_recommended_runs_when_it_is_approved_and_only_that() {
    let (machine, mut control, _) = two_members().await;
    let mut edited = cluster(1, 3);
    edited.spec.mode = im_crds::Mode::Recommend;
    machine.edit(edited.clone());
    let shown = |s: &Status| s.shards.proposal.clone().unwrap_or_else(|| panic!("nothing is shown"));
    let status = control.eventually("a proposal", |s| s.shards.proposal.is_some()).await;
    let first = shown(&status);
    assert_eq!(first.what, ["business: 3 members instead of 2"]);

    machine.edit(approve(&edited, "0123456789abcdef"));
    let status = control.eventually("it is stale", |s| s.shards.stale_approval.is_some()).await;
    assert_eq!((status.tiers.business.members.len(), shown(&status)), (2, first.clone()), "nothing was done");

    machine.edit(approve(&edited, &first.hash));
    let moves = |s: &Status| s.shards.proposal.as_ref().is_some_and(|proposal| proposal.moves > 0);
    let status = control.eventually("it is done, and the next step is shown", moves).await;
    assert_eq!((status.tiers.business.ready, shares(&status)), (3, vec![32, 32]), "no shard moves by that approval");
    let acquisitions = machine.rows.acquisitions.load(Ordering::Relaxed);

    let second = shown(&status);
    machine.edit(approve(&edited, &second.hash));
    let status = control.eventually("the shards move", |s| settled(s) && shares(s).len() == 3).await;
    let moved = machine.rows.acquisitions.load(Ordering::Relaxed) - acquisitions;
    assert_eq!(moved, second.moves as u64, "those of the plan that was shown");
    assert_eq!(status.shards.stale_approval, None);
    control.end().await;
}

#[tokio::test]
async fn what_the_platform_refuses_is_tried_again_once_a_round() {
    let (machine, mut control, _) = two_members().await;
    machine.full.store(true, Ordering::Relaxed);
    machine.edit(cluster(2, 2));
    let refused = || machine.refused_starts.lock().clone();
    control.eventually("it is tried some times", |_| refused().len() >= 4).await;
    // The first one follows the edit, whenever that was between two rounds.
    let attempts = refused().split_off(1);
    let pauses: Vec<Duration> = attempts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses.iter().all(|pause| *pause > Duration::from_millis(500)), "{pauses:?}");
    machine.full.store(false, Ordering::Relaxed);
    control.eventually("there is room again", |status| status.tiers.gateway.ready == 2).await;
    control.end().await;
}

#[tokio::test]
async fn planned_moves_wait_while_the_store_refuses_writes() {
    let (machine, mut control, _) = two_members().await;
    machine.behaviour("business-0").refused.store(true, Ordering::Relaxed);
    control.eventually("that is shown", |s| s.shards.waits.is_some()).await;
    machine.edit(cluster(1, 3));
    let rounds = Arc::new(AtomicU64::new(0));
    let ready = |s: &Status| s.tiers.business.ready == 3 && rounds.fetch_add(1, Ordering::Relaxed) > 10;
    let status = control.eventually("a third serves for ten looks", ready).await;
    assert_eq!(shares(&status), [32, 32], "and gets nothing yet");
    machine.behaviour("business-0").refused.store(false, Ordering::Relaxed);
    control.eventually("now it does", |s| settled(s) && shares(s).len() == 3 && s.shards.waits.is_none()).await;
    control.end().await;
}

/// Answers every query with one number.
async fn one_number() -> ([(axum::http::HeaderName, &'static str); 1], &'static str) {
    let body = r#"{"status":"success","data":{"resultType":"scalar","result":[1000,"1"]}}"#;
    ([(axum::http::header::CONTENT_TYPE, "application/json")], body)
}

#[tokio::test]
async fn a_store_and_a_prometheus_that_stay_away_are_told_until_they_are_back() {
    let prometheus = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let cluster = ImCluster::parse_yaml(&format!(
        "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {{name: chat}}\nspec:\n  auth: {{insecure: {{}}}}\n  \
         metrics: {{prometheus: {{url: 'http://{prometheus}'}}}}\n  business: {{replicas: 2, shards: {SHARDS}}}\n  \
         gateway: {{autoscaling: {{maxReplicas: 2, metrics: [\
         {{type: Prometheus, prometheus: {{query: work, target: {{type: Value, value: 100}}}}}}]}}}}\n"
    ));
    let (machine, listener) = Machine::new(cluster.unwrap()).await;
    let mut control = Control::start(&machine, listener);
    control.eventually("all serve", |s| settled(s) && s.tiers.gateway.ready == 1 && shares(s).len() == 2).await;
    let began = Instant::now();
    let cut_off = |is: bool| {
        for member in ["business-0", "business-1"] {
            machine.behaviour(member).cut_off.store(is, Ordering::Relaxed);
        }
    };
    cut_off(true);
    let away = control.eventually("the store is away", |s| s.shards.store_away.is_some()).await;
    assert!(began.elapsed() > Duration::from_secs(9), "not at once, but after {:?}", began.elapsed());
    let store = away.shards.store_away.unwrap();
    assert_eq!((store.members, store.all), (vec!["business-0".to_owned(), "business-1".to_owned()], true));
    let in_doubt = |s: &Status| s.prometheus.is_some() && s.tiers.gateway.in_doubt;
    let away = control.eventually("Prometheus is away", in_doubt).await;
    assert_eq!(away.prometheus.unwrap().reason, "PrometheusUnreachable");
    assert!(!away.tiers.business.in_doubt, "its number is fixed");

    cut_off(false);
    let listener = TcpListener::bind(prometheus).await.unwrap();
    let router = axum::Router::new().route("/api/v1/query", axum::routing::any(one_number));
    let _prometheus = tokio::spawn(async move { axum::serve(listener, router).await });
    let well = |s: &Status| s.shards.store_away.is_none() && s.prometheus.is_none() && !s.tiers.gateway.in_doubt;
    control.eventually("all is well", well).await;
    control.end().await;
}

#[tokio::test]
async fn after_a_scale_out_a_crowded_gateway_sheds_slowly() {
    let (machine, mut control, _) = two_members().await;
    machine.behaviour("gateway-0").connections.store(9_000, Ordering::Relaxed);
    machine.edit(cluster(3, 2));
    let crowded = machine.behaviour("gateway-0");
    // A quarter of what a drain may shed.
    control.eventually("it sheds", |_| crowded.shed_rates.lock().last() == Some(&1.75)).await;
    assert!(crowded.drain_rates.lock().is_empty(), "and goes on accepting");
    let undrained = crowded.undrained.load(Ordering::Relaxed);
    crowded.connections.store(30, Ordering::Relaxed);
    control.eventually("it is level", |_| crowded.undrained.load(Ordering::Relaxed) > undrained).await;
    control.end().await;
}

#[tokio::test]
async fn a_new_leader_stops_nobody_before_it_knows_what_he_holds() {
    let (machine, control, _) = two_members().await;
    control.end().await;
    // A scale-in was asked for while nobody led, and one of the members is slow to find the new leader.
    let slow = machine.behaviour("business-1");
    slow.hidden.store(true, Ordering::Relaxed);
    machine.edit(cluster(1, 1));
    let listener = TcpListener::bind(machine.address()).await.unwrap();
    let mut control = Control::start(&machine, listener);
    control.eventually("control has listened", |s| !s.at.is_empty() && !s.shards.hearing).await;
    let rounds = AtomicU64::new(0);
    control.eventually("ten looks later", |_| rounds.fetch_add(1, Ordering::Relaxed) > 10).await;
    assert!(machine.held_at_stop.lock().is_empty(), "{:?}", machine.held_at_stop.lock());
    slow.hidden.store(false, Ordering::Relaxed);
    control.eventually("one is left", |s| settled(s) && s.tiers.business.members.len() == 1).await;
    assert_eq!(machine.held_at_stop.lock().values().copied().collect::<Vec<_>>(), [0], "emptied before it was stopped");
    control.end().await;
}
