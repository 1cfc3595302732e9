//! The one loop that decides. See [`Leader`].

use super::scaling::{Measured, Scaler, Wanted};
use super::service::{Incoming, Outbox, StreamId};
use super::status::{
    EVENTS_MAX, Event as Happening, FileStatus, MOVES_LISTED_MAX, MemberStatus, MoveStatus, Proposal, Shards, Status,
    TierStatus, Tiers, member_state, no_message_lost, rfc3339,
};
use super::tiers::{Stage, Step, TierMember, drain_rate, next_steps};
use super::{ControlError, StoredMap, io};
use crate::autoscale::MemberState;
use crate::metrics::{Sample, scrape};
use crate::platform::process::STOP_GRACE;
use crate::platform::{Platform, PlatformError, Process, ProcessState, Tier, View};
use crate::shards::moves::Phase;
use crate::shards::{Action, Coordinator, Event, Ownership, ShardMap, Snapshot, Timing, plan};
use futures::future::join_all;
use im_crds::{ImCluster, Mode, Scaling};
use im_proto::control::{self as wire, Role as WireRole, command::Command, report::Report};
use im_proto::ids::MemberId;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

/// A member that is silent for longer does not serve.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
/// Between two maps.
const MAP_INTERVAL: Duration = Duration::from_millis(20);
/// Between two looks at every shard's deadlines.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Between two statuses.
const SHOW_INTERVAL: Duration = Duration::from_millis(200);
/// Between two rounds of scaling and planning.
const ROUND_INTERVAL: Duration = Duration::from_secs(1);
/// The supervisor answers on a local socket: later is never.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(2);
/// A started member that the platform does not show by then was not started.
const START_SHOWN_WITHIN: Duration = Duration::from_secs(5);
/// A leaving business member that still owns shards after that stays.
const EMPTY_DEADLINE: Duration = Duration::from_secs(120);
/// An emptied business member stays that long, so that senders hear from itself who has its shards now.
const EMPTY_LINGER: Duration = Duration::from_secs(1);
/// A drain rate is told anew when it changed by this part.
const RATE_CHANGE: f64 = 0.05;

/// What the loop needs besides the platform.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where the map is kept.
    pub map_file: PathBuf,
    /// Deadlines of the shards' moves.
    pub timing: Timing,
}

/// One process that dialled in.
struct Link {
    tier: Tier,
    pid: u32,
    /// The platform showed this very process: that it shows it no longer means that it ended.
    shown: bool,
    /// Where its Link service listens (business).
    link_address: String,
    /// Where its own health and metrics are.
    admin_address: String,
    stream: Option<(StreamId, Arc<Outbox>)>,
    heard: Duration,
    beat: Beat,
    sample: Option<(Duration, Sample)>,
}

/// What of a heartbeat is kept.
#[derive(Clone, Copy, Default)]
struct Beat {
    connections: u64,
    messages_per_second: f64,
    cpu_cores: f64,
    drained: bool,
    watermark_lag_s: f64,
}

/// A member that is to go.
struct Leaving {
    since: Duration,
    /// Since when it holds nothing.
    empty_since: Option<Duration>,
    /// The drain rate that it was told, and on which stream.
    told: Option<(StreamId, f64)>,
}

/// One tier.
#[derive(Default)]
struct TierState {
    scaler: Scaler,
    wanted: Wanted,
    leaving: BTreeMap<String, Leaving>,
    /// Asked for, and not yet shown by the platform.
    started: BTreeMap<String, Duration>,
}

/// The loop's state: what is known of the world, and the decisions' memory.
pub struct Leader<P> {
    platform: Arc<P>,
    views: watch::Receiver<View>,
    view: View,
    cluster: ImCluster,
    /// Why the cluster that is to run could not be read, if so.
    cluster_error: Option<String>,
    began: Instant,
    setup: Setup,
    coordinator: Coordinator,
    /// Until then control is new and only listens.
    hearing_until: Duration,
    links: HashMap<MemberId, Link>,
    /// Where owners listened before control was started, until they dial in.
    remembered: BTreeMap<MemberId, String>,
    gateway: TierState,
    business: TierState,
    /// Holes ever told of, by who told.
    holes: BTreeMap<MemberId, u64>,
    proposal: Option<Proposal>,
    map_changed: bool,
    map_sent: Instant,
    unsaved: bool,
    saving: Option<tokio::task::JoinHandle<()>>,
    round_due: bool,
    happenings: VecDeque<Happening>,
    status: watch::Sender<Status>,
}

impl<P: Platform> Leader<P> {
    /// Reads what was stored and begins a new term, which is stored before anybody hears of it.
    ///
    /// # Errors
    /// [`ControlError`] when the cluster can't be read or the map can't be stored.
    pub fn new(platform: Arc<P>, setup: Setup, status: watch::Sender<Status>) -> Result<Self, ControlError> {
        let cluster = platform.cluster()?;
        let shards = cluster.spec.business.shards;
        let (map, remembered) =
            StoredMap::read(&setup.map_file, shards).unwrap_or_else(|| (ShardMap::new(shards), BTreeMap::new()));
        let rebalance = cluster.spec.business.rebalance.clone();
        let coordinator = Coordinator::new(setup.timing.clone(), rebalance, map, Duration::ZERO);
        let mut views = platform.watch();
        let view = views.borrow_and_update().clone();
        let began = Instant::now();
        let leader = Self {
            platform,
            views,
            view,
            cluster,
            cluster_error: None,
            began,
            coordinator,
            hearing_until: setup.timing.hearing,
            links: HashMap::new(),
            remembered,
            gateway: TierState::default(),
            business: TierState::default(),
            holes: BTreeMap::new(),
            proposal: None,
            // What was stored is the best there is until the members were heard.
            map_changed: true,
            map_sent: began,
            unsaved: false,
            saving: None,
            round_due: true,
            happenings: VecDeque::new(),
            status,
            setup,
        };
        leader.stored_map().write(&leader.setup.map_file).map_err(io(leader.setup.map_file.display().to_string()))?;
        Ok(leader)
    }

    /// Decides until the service or the platform is gone.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Incoming>) {
        let (samples, mut scraped) = mpsc::channel::<Vec<(MemberId, Option<Sample>)>>(1);
        let mut sweeps = interval(SWEEP_INTERVAL);
        let mut rounds = interval(ROUND_INTERVAL);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut shown = self.began;
        self.tell(format!("control began term {}", self.coordinator.version().term));
        loop {
            let map_due = self.map_sent + MAP_INTERVAL;
            tokio::select! {
                incoming = inbox.recv() => match incoming {
                    Some(incoming) => self.on_incoming(incoming),
                    None => return,
                },
                changed = self.views.changed() => match changed {
                    Ok(()) => self.on_view(),
                    Err(_) => return,
                },
                Some(measured) = scraped.recv() => self.on_samples(measured),
                () = sleep_until(map_due.into()), if self.map_changed && !self.hears() => self.send_map(),
                _ = sweeps.tick() => {
                    self.decide(Event::Tick);
                    if std::mem::take(&mut self.round_due) {
                        self.round().await;
                    }
                    self.end_hearing();
                    self.save();
                    if shown.elapsed() >= SHOW_INTERVAL {
                        shown = Instant::now();
                        self.show();
                    }
                }
                _ = rounds.tick() => {
                    self.round_due = true;
                    self.measure(&samples);
                }
            }
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether control is new and only listens.
    fn hears(&self) -> bool {
        self.now() < self.hearing_until
    }

    /// Stops listening as soon as every process of both tiers has dialled in: there is nobody left to wait for.
    fn end_hearing(&mut self) {
        let mut tiers = self.view.processes.iter().filter(|process| Tier::of(process.role).is_some()).peekable();
        let somebody = tiers.peek().is_some();
        let all = tiers.all(|process| self.live_link(process).is_some());
        if self.hears() && somebody && all && self.gateway.started.is_empty() && self.business.started.is_empty() {
            self.hearing_until = self.now();
            self.coordinator.end_hearing(self.hearing_until);
            self.map_changed = true;
            // The platform shows every process there is, and each has said who it is: other owners have ended.
            let owners = self.coordinator.map().rows().iter().filter_map(|row| row.owner.as_ref());
            let ended: BTreeSet<MemberId> = owners.filter(|owner| !self.links.contains_key(*owner)).cloned().collect();
            for member in ended {
                self.decide(Event::MemberGone { member, confirmed_dead: true });
            }
        }
    }

    fn tier(&mut self, tier: Tier) -> &mut TierState {
        match tier {
            Tier::Gateway => &mut self.gateway,
            Tier::Business => &mut self.business,
        }
    }

    /// Notes what happened, for the status and the log.
    fn tell(&mut self, text: String) {
        tracing::info!("{text}");
        if self.happenings.len() == EVENTS_MAX {
            self.happenings.pop_front();
        }
        self.happenings.push_back(Happening { at: rfc3339(SystemTime::now()), text });
    }

    /// The link of the process that has the name now: of several boots the one heard last.
    fn link(&self, name: &str) -> Option<(&MemberId, &Link)> {
        self.links
            .iter()
            .filter(|(member, _)| member.name() == name)
            .max_by_key(|(_, link)| (link.stream.is_some(), link.heard))
    }

    /// The link of a process that serves.
    fn live_link(&self, process: &Process) -> Option<(&MemberId, &Link)> {
        let now = self.now();
        self.link(&process.name).filter(|(_, link)| {
            process.state == ProcessState::Running
                && process.pid == Some(link.pid)
                && now.saturating_sub(link.heard) < HEARD_WITHIN
        })
    }

    // ---- what is heard ------------------------------------------------------------------------------------------------

    fn on_incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Joined { stream, member, hello, outbox } => self.on_joined(stream, member, hello, outbox),
            Incoming::Reported { stream, member, report } => {
                let current = self.links.get(&member).and_then(|link| link.stream.as_ref());
                if current.is_some_and(|(id, _)| *id == stream) {
                    self.on_report(member, report);
                }
            }
            Incoming::Left { stream, member } => {
                let Some(link) = self.links.get_mut(&member) else { return };
                if link.stream.as_ref().is_some_and(|(id, _)| *id == stream) {
                    link.stream = None;
                    if link.tier == Tier::Business {
                        self.decide(Event::MemberGone { member, confirmed_dead: false });
                    }
                }
            }
        }
    }

    fn on_joined(&mut self, stream: StreamId, member: MemberId, hello: wire::Hello, outbox: Arc<Outbox>) {
        let tier = match hello.role() {
            WireRole::Gateway => Tier::Gateway,
            WireRole::Business => Tier::Business,
            WireRole::Unspecified => {
                tracing::warn!(%member, "a member without a role is refused");
                return outbox.close();
            }
        };
        let now = self.now();
        let known = self.links.remove(&member);
        if let Some((_, earlier)) = known.as_ref().and_then(|link| link.stream.as_ref()) {
            earlier.close();
        }
        if known.is_none() {
            self.tell(format!("{} joined, pid {}", member.name(), hello.pid));
        }
        self.remembered.remove(&member);
        let link = Link {
            tier,
            pid: hello.pid,
            shown: self.view.process(member.name()).is_some_and(|process| process.pid == Some(hello.pid)),
            link_address: hello.link_address.clone(),
            admin_address: hello.http_address.clone(),
            stream: Some((stream, outbox.clone())),
            heard: now,
            beat: known.as_ref().map(|link| link.beat).unwrap_or_default(),
            sample: known.and_then(|link| link.sample),
        };
        self.links.insert(member.clone(), link);
        self.hear_term(hello.term);
        // The process before it of the same name has ended, whether or not that was seen.
        let ended: Vec<MemberId> =
            self.links.keys().filter(|other| other.name() == member.name() && **other != member).cloned().collect();
        for other in ended {
            if let Some((_, outbox)) = self.links.remove(&other).and_then(|link| link.stream) {
                outbox.close();
            }
        }
        let leaving = self.tier(tier).leaving.contains_key(member.name());
        match tier {
            Tier::Business => {
                self.decide(Event::MemberJoined { member: member.clone() });
                let held = hello.held.iter().map(|held| (held.shard, held.epoch)).collect();
                let heard =
                    Event::Heartbeat { member: member.clone(), held, loads: vec![], store_ok: true, term: hello.term };
                self.decide(heard);
                self.decide(Event::Leaving { member: member.clone(), leaving });
            }
            // It may have been told to drain by the control before this one.
            Tier::Gateway if !leaving => self.send(&member, Command::Undrain(wire::Undrain {})),
            Tier::Gateway => {}
        }
        self.map_changed = true;
        if !self.hears() {
            let map = Arc::new(self.wire_map());
            outbox.send_map(self.coordinator.version().term, map);
        }
        self.round_due = true;
        let mut addresses = BTreeMap::new();
        for (purpose, address) in [("link", hello.link_address), ("admin", hello.http_address)] {
            if !address.is_empty() {
                addresses.insert(purpose.to_owned(), address);
            }
        }
        // Off this loop: nothing waits for it.
        let (platform, pid) = (self.platform.clone(), hello.pid);
        tokio::spawn(async move {
            if let Err(error) = within(platform.describe(member.name(), pid, addresses)).await {
                tracing::warn!(%member, %error, "its addresses can't be made known");
            }
        });
    }

    fn on_report(&mut self, member: MemberId, report: Report) {
        let now = self.now();
        let Some(link) = self.links.get_mut(&member) else { return };
        link.heard = now;
        match report {
            Report::Hello(_) => tracing::warn!(%member, "a second Hello on one stream is ignored"),
            Report::Heartbeat(beat) => {
                link.beat = Beat {
                    connections: beat.connections,
                    messages_per_second: beat.messages_per_second,
                    cpu_cores: beat.cpu_cores,
                    drained: beat.drained,
                    watermark_lag_s: beat.watermark_lag_s,
                };
                let tier = link.tier;
                if beat.holes > 0 {
                    self.on_holes(&member, beat.holes);
                }
                match tier {
                    Tier::Gateway => self.hear_term(beat.term),
                    Tier::Business => {
                        let held = beat.held.iter().map(|held| (held.shard, held.epoch)).collect();
                        let loads = beat.loads.iter().map(|load| (load.shard, load.per_second)).collect();
                        self.decide(Event::Heartbeat { member, held, loads, store_ok: beat.store_ok, term: beat.term });
                    }
                }
            }
            Report::Acquired(acquired) => {
                for won in acquired.shards {
                    self.decide(Event::Acquired { shard: won.shard, epoch: won.epoch, by: member.clone() });
                }
            }
            Report::Released(released) => {
                for gone in released.shards {
                    self.decide(Event::Released { shard: gone.shard, epoch: gone.epoch, by: member.clone() });
                }
            }
            Report::AcquireLost(lost) => {
                for row in lost.rows {
                    let owner = match row.owner.as_str() {
                        "" => None,
                        owner => match MemberId::parse(owner) {
                            Ok(owner) => Some(owner),
                            Err(error) => {
                                tracing::error!(%member, shard = row.shard, %error, "a row that can't be read");
                                continue;
                            }
                        },
                    };
                    let row_found = Ownership { epoch: row.epoch, owner };
                    self.decide(Event::AcquireLost { shard: row.shard, row: row_found, by: member.clone() });
                }
            }
        }
    }

    fn on_holes(&mut self, member: &MemberId, holes: u64) {
        let known = self.holes.entry(member.clone()).or_default();
        if holes > *known {
            *known = holes;
            self.tell(format!("{} found {holes} holes in its logs: messages are missing", member.name()));
        }
    }

    /// There is one control only, so a higher term can but come from one before whose map file is gone: go above it.
    fn hear_term(&mut self, term: u64) {
        if term > self.coordinator.version().term {
            self.coordinator.begin_term(term);
            self.map_changed = true;
            self.unsaved = true;
            self.tell(format!("a member knows term {term}: control began term {}", self.coordinator.version().term));
        }
    }

    fn on_view(&mut self) {
        let view = self.views.borrow_and_update().clone();
        let ended: Vec<MemberId> = self
            .links
            .iter_mut()
            .filter_map(|(member, link)| {
                let same = view.process(member.name()).is_some_and(|process| process.pid == Some(link.pid));
                link.shown |= same;
                (link.shown && !same).then(|| member.clone())
            })
            .collect();
        for member in ended {
            let Some(link) = self.links.remove(&member) else { continue };
            if let Some((_, outbox)) = link.stream {
                outbox.close();
            }
            self.tell(format!("{} (pid {}) ended", member.name(), link.pid));
            self.map_changed = true;
            if link.tier == Tier::Business {
                self.decide(Event::MemberGone { member, confirmed_dead: true });
            }
        }
        for tier in Tier::ALL {
            let names: Vec<String> = view.processes.iter().map(|process| process.name.clone()).collect();
            let state = self.tier(tier);
            state.leaving.retain(|name, _| names.contains(name));
            state.started.retain(|name, _| !names.contains(name));
        }
        if view.generation != self.view.generation {
            match self.platform.cluster() {
                Ok(cluster) => {
                    self.coordinator.set_rebalance(cluster.spec.business.rebalance.clone());
                    self.cluster = cluster;
                    self.cluster_error = None;
                    self.tell("the ImCluster changed and is followed".to_owned());
                }
                Err(error) => {
                    self.tell(format!("the changed ImCluster can't be read: {error}"));
                    self.cluster_error = Some(error.to_string());
                }
            }
        }
        self.view = view;
        self.round_due = true;
    }

    // ---- shards -------------------------------------------------------------------------------------------------------

    /// Lets the coordinator take one event in, and does what it says.
    fn decide(&mut self, event: Event) {
        let actions = self.coordinator.handle(self.now(), event);
        // One message per member, however many shards it is to acquire.
        let mut acquires: BTreeMap<MemberId, Vec<wire::ShardRow>> = BTreeMap::new();
        for action in actions {
            match action {
                Action::Prepare { to, shard, from, epoch } => {
                    self.send(&to, Command::Prepare(wire::Prepare { shard, epoch, from: from.to_string() }));
                }
                Action::Release { by, shard, epoch, to } => {
                    self.send(&by, Command::Release(wire::Release { shard, epoch, to: to.to_string() }));
                }
                Action::CancelRelease { by, shard, epoch } => {
                    self.send(&by, Command::CancelRelease(wire::CancelRelease { shard, epoch }));
                }
                Action::Acquire { by, shard, expected } => {
                    let owner = expected.owner.map(|owner| owner.to_string()).unwrap_or_default();
                    acquires.entry(by).or_default().push(wire::ShardRow { shard, epoch: expected.epoch, owner });
                }
                Action::MapChanged => {
                    self.map_changed = true;
                    self.unsaved = true;
                }
                Action::Outranked { term } => self.hear_term(term),
            }
        }
        for (by, expected) in acquires {
            self.send(&by, Command::Acquire(wire::Acquire { expected }));
        }
    }

    /// Queues a command; without a stream it is dropped, and the deadlines of the decisions see to the rest.
    fn send(&self, to: &MemberId, command: Command) {
        if let Some((_, outbox)) = self.links.get(to).and_then(|link| link.stream.as_ref()) {
            outbox.send(self.coordinator.version().term, command);
        }
    }

    fn send_map(&mut self) {
        self.map_changed = false;
        self.map_sent = Instant::now();
        let term = self.coordinator.version().term;
        let map = Arc::new(self.wire_map());
        for (_, outbox) in self.links.values().filter_map(|link| link.stream.as_ref()) {
            outbox.send_map(term, map.clone());
        }
    }

    fn wire_map(&self) -> wire::Map {
        // Gateways too: a new owner of a shard knows who is offline as soon as all of them announced their sessions.
        let mut members: BTreeMap<&MemberId, (WireRole, &str)> = self
            .links
            .iter()
            .map(|(member, link)| match link.tier {
                Tier::Business => (member, (WireRole::Business, link.link_address.as_str())),
                Tier::Gateway => (member, (WireRole::Gateway, "")),
            })
            .collect();
        for (member, address) in &self.remembered {
            members.entry(member).or_insert((WireRole::Business, address));
        }
        let index: HashMap<&MemberId, u32> =
            members.keys().zip(1..).map(|(member, position)| (*member, position)).collect();
        let rows = self.coordinator.map().rows();
        // An owner that is known to have ended is none: requests wait for the next one.
        let owner = |row: &Ownership| row.owner.as_ref().and_then(|owner| index.get(owner).copied()).unwrap_or(0);
        wire::Map {
            number: self.coordinator.version().number,
            shards: self.coordinator.map().shards(),
            owners: rows.iter().map(owner).collect(),
            epochs: rows.iter().map(|row| row.epoch).collect(),
            members: members
                .iter()
                .map(|(member, (role, address))| wire::Member {
                    member: member.to_string(),
                    role: (*role).into(),
                    link_address: (*address).to_owned(),
                })
                .collect(),
        }
    }

    fn stored_map(&self) -> StoredMap {
        let mut links: BTreeMap<String, String> =
            self.remembered.iter().map(|(member, address)| (member.to_string(), address.clone())).collect();
        let business = self.links.iter().filter(|(_, link)| link.tier == Tier::Business);
        links.extend(business.map(|(member, link)| (member.to_string(), link.link_address.clone())));
        StoredMap { map: self.coordinator.map().to_spec(), links }
    }

    /// Stores the map if it changed, one write at a time and off this loop.
    fn save(&mut self) {
        if !self.unsaved || self.saving.as_ref().is_some_and(|saving| !saving.is_finished()) {
            return;
        }
        self.unsaved = false;
        let (stored, path) = (self.stored_map(), self.setup.map_file.clone());
        self.saving = Some(tokio::spawn(async move {
            let written = tokio::task::spawn_blocking(move || (stored.write(&path), path)).await;
            if let Ok((Err(error), path)) = written {
                tracing::error!("{}: {error}; the members keep the map meanwhile", path.display());
            }
            // At most one write a second.
            tokio::time::sleep(Duration::from_secs(1)).await;
        }));
    }

    // ---- rounds: scale and plan ---------------------------------------------------------------------------------------

    async fn round(&mut self) {
        let now = self.now();
        // Owners that did not dial in while control listened are nobody's address any more.
        if !self.hears() && !self.remembered.is_empty() {
            self.remembered.clear();
            self.map_changed = true;
        }
        for tier in Tier::ALL {
            self.tier(tier).started.retain(|_, at| now.saturating_sub(*at) < START_SHOWN_WITHIN);
        }
        let snapshot = self.coordinator.snapshot(now);
        let acts = self.cluster.spec.mode == Mode::Auto && !self.cluster.spec.paused;
        for tier in Tier::ALL {
            self.note_empty(tier, &snapshot);
            let members = self.tier_members(tier, &snapshot);
            let measured = self.measured(tier);
            let cluster = self.cluster.clone();
            let scaling = scaling(&cluster, tier);
            let rolling =
                members.iter().any(|member| member.outdated && matches!(member.stage, Stage::Starting | Stage::Ready));
            let state = self.tier(tier);
            let ordered = state.started.len() as u32;
            let wanted = state.scaler.decide(now, scaling, &measured, ordered, rolling);
            let changed = self.tier(tier).wanted.replicas != wanted.replicas;
            self.tier(tier).wanted = wanted.clone();
            if changed {
                let because = wanted.because.first().map(|reason| format!(": {reason}")).unwrap_or_default();
                self.tell(format!("{tier}: {} wanted{because}", wanted.replicas));
            }
            // Somebody has to be there before anything can be paused or recommended.
            let steps = match (acts, members.is_empty()) {
                (true, _) => next_steps(tier, wanted.replicas, &members),
                (false, true) => next_steps(tier, scaling.initial(), &[]),
                (false, false) => vec![],
            };
            for step in steps {
                self.take(tier, step).await;
            }
        }
        self.drain_gateways();
        self.plan(acts);
    }

    /// Notes since when each leaving member of the tier holds nothing.
    fn note_empty(&mut self, tier: Tier, snapshot: &Snapshot) {
        let now = self.now();
        let holds_nothing = |name: &String, leaving: &Leaving| {
            let Some(process) = self.view.process(name) else { return true };
            match (tier, self.live_link(process)) {
                (Tier::Gateway, Some((_, link))) => leaving.told.is_some() && link.beat.drained,
                (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member) == 0,
                // It ended by itself, or does not answer: only the first means that it holds nothing.
                (_, None) => process.pid.is_none(),
            }
        };
        let state = match tier {
            Tier::Gateway => &self.gateway,
            Tier::Business => &self.business,
        };
        let empty: Vec<bool> = state.leaving.iter().map(|(name, leaving)| holds_nothing(name, leaving)).collect();
        for (leaving, empty) in self.tier(tier).leaving.values_mut().zip(empty) {
            leaving.empty_since = if empty { leaving.empty_since.or(Some(now)) } else { None };
        }
    }

    fn tier_members(&self, tier: Tier, snapshot: &Snapshot) -> Vec<TierMember> {
        let now = self.now();
        let state = match tier {
            Tier::Gateway => &self.gateway,
            Tier::Business => &self.business,
        };
        let template = self.platform.template(&self.cluster, tier);
        let mut members = Vec::new();
        for process in self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier)) {
            let Some(index) = tier.index_of(&process.name) else { continue };
            let live = self.live_link(process);
            let cost = match (tier, live) {
                (Tier::Gateway, Some((_, link))) => link.beat.connections,
                (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member),
                (_, None) => 0,
            };
            let stage = match (process.state, state.leaving.get(&process.name)) {
                (ProcessState::Stopping, _) => Stage::Stopping,
                (_, Some(leaving)) => {
                    let deadline = match tier {
                        Tier::Gateway => self.cluster.spec.gateway.drain.deadline.duration(),
                        Tier::Business => EMPTY_DEADLINE,
                    };
                    let lingers = match tier {
                        Tier::Gateway => Duration::ZERO,
                        // With nobody there it lingers for nobody.
                        Tier::Business if process.pid.is_none() => Duration::ZERO,
                        Tier::Business => EMPTY_LINGER,
                    };
                    let empty = leaving.empty_since.is_some_and(|since| now.saturating_sub(since) >= lingers);
                    Stage::Leaving { empty, overdue: now.saturating_sub(leaving.since) >= deadline }
                }
                (_, None) if live.is_some() => Stage::Ready,
                (_, None) => Stage::Starting,
            };
            members.push(TierMember { index, stage, cost, outdated: process.template != template });
        }
        members.extend(state.started.keys().filter_map(|name| {
            Some(TierMember { index: tier.index_of(name)?, stage: Stage::Starting, cost: 0, outdated: false })
        }));
        members
    }

    async fn take(&mut self, tier: Tier, step: Step) {
        let now = self.now();
        let platform = self.platform.clone();
        match step {
            Step::Start(index) => {
                let name = tier.member_name(index);
                let cluster = self.cluster.clone();
                match within(platform.start(&cluster, tier, &name)).await {
                    Ok(()) => {
                        self.tell(format!("{name} is started"));
                        self.tier(tier).started.insert(name, now);
                    }
                    Err(error) => self.tell(format!("{name} can't be started: {error}")),
                }
            }
            Step::Stop(index) => {
                let name = tier.member_name(index);
                match within(platform.stop(&name, STOP_GRACE)).await {
                    Ok(()) => self.tell(format!("{name} is stopped")),
                    Err(error) => self.tell(format!("{name} can't be stopped: {error}")),
                }
            }
            Step::Leave(index) => {
                let name = tier.member_name(index);
                let how = if tier == Tier::Gateway { "sheds its connections" } else { "gives its shards away" };
                self.tell(format!("{name} leaves: it {how} first"));
                self.mark_leaving(tier, &name, true);
                self.tier(tier).leaving.insert(name, Leaving { since: now, empty_since: None, told: None });
                self.round_due = true;
            }
            Step::Return(index) => {
                let name = tier.member_name(index);
                self.tell(format!("{name} stays after all"));
                self.tier(tier).leaving.remove(&name);
                self.mark_leaving(tier, &name, false);
            }
        }
    }

    fn mark_leaving(&mut self, tier: Tier, name: &str, leaving: bool) {
        let Some(member) = self.link(name).map(|(member, _)| member.clone()) else { return };
        match tier {
            Tier::Business => self.decide(Event::Leaving { member, leaving }),
            Tier::Gateway if !leaving => self.send(&member, Command::Undrain(wire::Undrain {})),
            // Draining begins with a rate.
            Tier::Gateway => {}
        }
    }

    /// Tells each leaving gateway how fast it may shed its connections, as the others' room changes.
    fn drain_gateways(&mut self) {
        let gateway = &self.cluster.spec.gateway;
        let live = |name: &str| {
            let (member, link) = self.view.process(name).and_then(|process| self.live_link(process))?;
            Some((member.clone(), link.stream.as_ref()?.0, link.beat.connections))
        };
        let processes = self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(Tier::Gateway));
        let others: Vec<u64> = processes
            .filter(|process| !self.gateway.leaving.contains_key(&process.name))
            .filter_map(|process| Some(live(&process.name)?.2))
            .collect();
        let limits = &gateway.limits;
        let draining = self.gateway.leaving.len();
        let rate = drain_rate(gateway.drain.rate, limits.connect_rate, limits.max_connections, draining, &others);
        let now = self.now();
        let mut orders = Vec::new();
        for (name, leaving) in &self.gateway.leaving {
            let Some((member, stream, connections)) = live(name) else { continue };
            // All gateways share one port here, so nobody but the kernel has to notice; with connections to shed, a
            // moment for it.
            let noticed = connections == 0 || now.saturating_sub(leaving.since) >= gateway.drain.notice.duration();
            let rate = if noticed { rate } else { 0.0 };
            let news = match leaving.told {
                Some((told_on, told)) => told_on != stream || (told - rate).abs() > RATE_CHANGE * told.max(1.0),
                None => true,
            };
            if news {
                orders.push((name.clone(), member, stream, rate));
            }
        }
        for (name, member, stream, rate) in orders {
            self.send(&member, Command::Drain(wire::Drain { per_second: rate }));
            if let Some(leaving) = self.gateway.leaving.get_mut(&name) {
                leaving.told = Some((stream, rate));
            }
        }
    }

    fn plan(&mut self, acts: bool) {
        self.proposal = None;
        let Some(input) = self.coordinator.plan_input(self.now()) else { return };
        let proposed = plan(&input);
        if proposed.moves().is_empty() {
            return;
        }
        let (hash, moves) = (proposed.hash(), proposed.moves().len());
        if !acts {
            self.proposal = Some(Proposal { hash: format!("{hash:016x}"), moves });
            return;
        }
        // In mode Auto what is shown is approved as it is.
        match proposed.approve(hash).and_then(|approved| approved.commit(self.coordinator.map())) {
            Ok(committed) => {
                self.tell(format!("{moves} shards move, plan {hash:016x}"));
                self.decide(Event::NewPlan(committed));
            }
            Err(error) => tracing::info!("{error}"),
        }
    }

    // ---- measuring ----------------------------------------------------------------------------------------------------

    /// Scrapes every live member, off this loop; while one round of it is under way there is no second.
    fn measure(&self, samples: &mpsc::Sender<Vec<(MemberId, Option<Sample>)>>) {
        let Ok(permit) = samples.clone().try_reserve_owned() else { return };
        let now = self.now();
        let targets: Vec<(MemberId, String)> = self
            .links
            .iter()
            .filter(|(_, link)| !link.admin_address.is_empty() && now.saturating_sub(link.heard) < HEARD_WITHIN)
            .map(|(member, link)| (member.clone(), link.admin_address.clone()))
            .collect();
        tokio::spawn(async move {
            let measured = join_all(targets.into_iter().map(|(member, address)| async move {
                let sample = scrape(&address).await.inspect_err(|error| tracing::debug!(%member, %error, "scrape"));
                (member, sample.ok())
            }));
            permit.send(measured.await);
        });
    }

    fn on_samples(&mut self, measured: Vec<(MemberId, Option<Sample>)>) {
        let now = self.now();
        for (member, sample) in measured {
            if let (Some(link), Some(sample)) = (self.links.get_mut(&member), sample) {
                link.sample = Some((now, sample));
            }
        }
    }

    /// What the autoscaler sees.
    fn measured(&self, tier: Tier) -> Vec<Measured> {
        let leaving = match tier {
            Tier::Gateway => &self.gateway.leaving,
            Tier::Business => &self.business.leaving,
        };
        let processes = self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier));
        let measured = processes.map(|process| {
            let live = self.live_link(process);
            let goes = process.state == ProcessState::Stopping || leaving.contains_key(&process.name);
            let state = match (goes, live) {
                (true, _) => MemberState::Draining,
                (false, Some(_)) => MemberState::Ready,
                (false, None) => MemberState::Starting,
            };
            Measured { name: process.name.clone(), state, sample: live.and_then(|(_, link)| link.sample) }
        });
        measured.collect()
    }

    // ---- status -------------------------------------------------------------------------------------------------------

    fn show(&self) {
        let now = self.now();
        let snapshot = self.coordinator.snapshot(now);
        let spec = &self.cluster.spec;
        let fresh = self
            .links
            .values()
            .filter(|link| link.tier == Tier::Business && now.saturating_sub(link.heard) < HEARD_WITHIN);
        let lag = fresh.map(|link| link.beat.watermark_lag_s).reduce(f64::max);
        let file_error = self.view.file_error.clone().or_else(|| self.cluster_error.clone());
        let status = Status {
            cluster: self.cluster.metadata.name.clone().unwrap_or_default(),
            mode: format!("{:?}", spec.mode),
            paused: spec.paused,
            at: rfc3339(SystemTime::now()),
            tiers: Tiers {
                gateway: self.show_tier(Tier::Gateway, &self.gateway, &snapshot),
                business: self.show_tier(Tier::Business, &self.business, &snapshot),
            },
            no_message_lost: no_message_lost(self.holes.values().sum(), &snapshot, lag),
            shards: self.show_shards(&snapshot),
            watermark_lag_seconds: lag,
            events: self.happenings.clone(),
            file: FileStatus { ok: file_error.is_none(), error: file_error },
        };
        self.status.send_replace(status);
    }

    fn show_tier(&self, tier: Tier, state: &TierState, snapshot: &Snapshot) -> TierStatus {
        let (min, max) = match scaling(&self.cluster, tier) {
            Scaling::Fixed(replicas) => (replicas, replicas),
            Scaling::Auto(autoscaling) => (autoscaling.min_replicas, autoscaling.max_replicas),
        };
        let mut shown = TierStatus {
            desired: state.wanted.replicas,
            min,
            max,
            because: state.wanted.because.clone(),
            ..TierStatus::default()
        };
        let mut processes: Vec<&Process> =
            self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier)).collect();
        processes.sort_by_key(|process| tier.index_of(&process.name));
        let epochs = self.epochs();
        for process in processes {
            let leaves = state.leaving.contains_key(&process.name);
            let link = self.link(&process.name).filter(|(_, link)| process.pid == Some(link.pid));
            let heard = self.live_link(process).is_some();
            let leaving_word = match tier {
                Tier::Gateway => "draining",
                Tier::Business => "emptying",
            };
            let beat = link.map(|(_, link)| link.beat).unwrap_or_default();
            let mut member = MemberStatus {
                name: process.name.clone(),
                pid: process.pid,
                starts: process.starts,
                state: member_state(process.state, leaves.then_some(leaving_word), link.is_some(), heard),
                messages_per_second: beat.messages_per_second,
                cpu_cores: beat.cpu_cores,
                ..MemberStatus::default()
            };
            match tier {
                Tier::Gateway => {
                    member.connections = Some(beat.connections);
                    member.draining = Some(leaves);
                }
                Tier::Business => {
                    let held = link.and_then(|(id, _)| Some((id, snapshot.members.get(id)?)));
                    member.shards = Some(held.map_or(0, |(_, held)| held.shards));
                    member.load = Some(held.map_or(0.0, |(_, held)| held.load));
                    member.epochs = held.and_then(|(id, _)| epochs.get(id).copied());
                }
            }
            shown.replicas += u32::from(!leaves && process.state == ProcessState::Running);
            shown.ready += u32::from(!leaves && heard);
            shown.members.push(member);
        }
        shown
    }

    /// Lowest and highest epoch of each owner's shards.
    fn epochs(&self) -> HashMap<&MemberId, (u64, u64)> {
        let mut epochs: HashMap<&MemberId, (u64, u64)> = HashMap::new();
        for row in self.coordinator.map().rows() {
            if let Some(owner) = &row.owner {
                let (low, high) = epochs.entry(owner).or_insert((row.epoch, row.epoch));
                (*low, *high) = ((*low).min(row.epoch), (*high).max(row.epoch));
            }
        }
        epochs
    }

    fn show_shards(&self, snapshot: &Snapshot) -> Shards {
        let mut per_member: BTreeMap<String, u32> = BTreeMap::new();
        for (member, held) in &snapshot.members {
            *per_member.entry(member.name().to_owned()).or_default() += held.shards;
        }
        let name = |member: &Option<MemberId>| member.as_ref().map(|member| member.name().to_owned());
        let phase = |phase| match phase {
            Phase::Releasing => "releasing",
            Phase::TakingBack => "takingBack",
            Phase::Acquiring => "acquiring",
        };
        let moves = snapshot.moving.iter().take(MOVES_LISTED_MAX).map(|moving| MoveStatus {
            shard: moving.shard,
            from: name(&moving.from),
            to: name(&moving.to),
            phase: phase(moving.phase).to_owned(),
        });
        Shards {
            total: snapshot.shards,
            owned: snapshot.shards - snapshot.unowned,
            moving: snapshot.moving.len() as u32,
            queued: snapshot.queued as u32,
            term: snapshot.version.term,
            number: snapshot.version.number,
            per_member,
            moves: moves.collect(),
            degraded: snapshot.degraded,
            hearing: snapshot.hearing,
            proposal: self.proposal.clone(),
        }
    }
}

fn scaling(cluster: &ImCluster, tier: Tier) -> Scaling<'_> {
    match tier {
        Tier::Gateway => cluster.spec.gateway.scaling(),
        Tier::Business => cluster.spec.business.scaling(),
    }
}

/// Shards that a member holds or is about to get.
fn held_or_coming(snapshot: &Snapshot, member: &MemberId) -> u64 {
    let held = snapshot.members.get(member).map_or(0, |held| u64::from(held.shards));
    let coming = snapshot
        .moving
        .iter()
        .filter(|moving| moving.to.as_ref() == Some(member) && moving.from.as_ref() != Some(member));
    held + coming.count() as u64
}

/// Waits for the platform, but not for long.
async fn within(action: impl Future<Output = Result<(), PlatformError>>) -> Result<(), PlatformError> {
    match timeout(PLATFORM_TIMEOUT, action).await {
        Ok(outcome) => outcome,
        Err(_) => Err(PlatformError::Unreachable(std::io::ErrorKind::TimedOut.into())),
    }
}
