//! The one loop that decides. See [`Leader`].

use super::proposal::{APPROVE_ANNOTATION, Change, Content, Proposals, Verdict};
use super::scaling::{Observed, Scaler, Wanted, clock};
use super::service::{Incoming, Outbox, StreamId};
use super::status::{
    DrainStatus, EVENTS_MAX, Event as Happening, FileStatus, MOVES_LISTED_MAX, MemberStatus, MoveStatus, Proposal,
    Shards, Status, TierStatus, Tiers, member_state, no_message_lost, rfc3339,
};
use super::tiers::{Stage, Step, TierMember, drain_rate, level_rate, next_steps};
use super::{ClusterKey, ControlError};
use crate::autoscale::{Member, MemberState};
use crate::metrics::round::Connector;
use crate::metrics::{self, Endpoint, Request, Round, ScalingMetrics, Signals, Target, measure};
use crate::platform::process::STOP_GRACE;
use crate::platform::{Platform, PlatformError, Process, ProcessState, Role, StoredMap, Tier, View};
use crate::shards::moves::Phase;
use crate::shards::{Action, Coordinator, Event, Ownership, Plan, Proposed, ShardMap, Snapshot, Timing, plan};
use im_crds::{ImCluster, Mode, Scaling};
use im_proto::control::{self as wire, Role as WireRole, command::Command, report::Report};
use im_proto::ids::MemberId;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};

/// A member that is silent for longer does not serve.
const HEARD_WITHIN: Duration = Duration::from_secs(3);
/// A member that is silent for longer holds nothing that would keep it from being stopped.
const SILENT_HOLDS: Duration = Duration::from_secs(60);
/// Between two maps.
const MAP_INTERVAL: Duration = Duration::from_millis(20);
/// Between two looks at every shard's deadlines.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// Between two statuses.
const SHOW_INTERVAL: Duration = Duration::from_millis(200);
/// Between two rounds of scaling and planning.
const ROUND_INTERVAL: Duration = Duration::from_secs(1);
/// Between two writes of the map.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// The platform does one thing within that time, or it is tried again.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(10);
/// A leaving business member that still owns shards after that stays.
const EMPTY_DEADLINE: Duration = Duration::from_secs(120);
/// An emptied business member stays that long, so that senders hear from itself who has its shards now.
const EMPTY_LINGER: Duration = Duration::from_secs(1);
/// So long after a gateway came others that have far more connections shed some.
const LEVEL_WINDOW: Duration = Duration::from_secs(900);
/// An approved change of a tier that is not done by then is given up.
const APPROVED_FOR: Duration = Duration::from_secs(1_800);
/// A drain rate is told anew when it changed by this part.
const RATE_CHANGE: f64 = 0.05;

/// What the loop needs besides the platform.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Deadlines of the shards' moves.
    pub timing: Timing,
    /// Where the load is measured.
    pub metrics: metrics::Setup,
}

/// One process that dialled in.
struct Link {
    tier: Tier,
    /// What tells it from another process of its name.
    instance: String,
    /// The platform showed this very process: that it shows it no longer means that it ended.
    shown: bool,
    /// Where its Link service listens (business).
    link_address: String,
    /// Where its own health and metrics are.
    admin_address: String,
    stream: Option<(StreamId, Arc<Outbox>)>,
    /// What a gateway was told last on this stream.
    told: Option<Order>,
    heard: Duration,
    beat: Beat,
}

/// What may be done without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Acts {
    /// Everything: mode `Auto`.
    Freely,
    /// What somebody approved: mode `Recommend`.
    Approved,
    /// Nothing: paused.
    Never,
}

/// What a gateway is to do with its connections.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    /// Take what comes.
    Serve,
    /// Take what comes, and shed so many a second of what is there.
    Shed(f64),
    /// Accept no more, and shed so many a second.
    Drain(f64),
}

impl Order {
    /// Whether that is news to somebody who was told `told`.
    fn is_news(self, told: Option<Self>) -> bool {
        match (self, told) {
            (Self::Drain(rate), Some(Self::Drain(told))) | (Self::Shed(rate), Some(Self::Shed(told))) => {
                (told - rate).abs() > RATE_CHANGE * told.max(1.0)
            }
            (order, told) => told != Some(order),
        }
    }
}

/// What of a heartbeat is kept.
#[derive(Clone, Copy, Default)]
struct Beat {
    connections: u64,
    messages_per_second: f64,
    cpu_cores: f64,
    drained: bool,
    leaving: bool,
    store_refuses: bool,
    watermark_lag_s: f64,
}

/// A member that goes.
struct Leaving {
    since: Duration,
    /// It was told to end by somebody else, and will: there is no way back.
    by_itself: bool,
    /// What it held when it began to leave.
    held_first: u64,
    /// Since when it holds nothing.
    empty_since: Option<Duration>,
}

/// Whether new connections are led to a gateway, as far as the platform confirmed it.
struct Spread {
    instance: String,
    /// The last word, and since when.
    confirmed: Option<(bool, Duration)>,
    /// A change is under way.
    asked: bool,
}

/// One tier.
#[derive(Default)]
struct TierState {
    scaler: Scaler,
    wanted: Wanted,
    leaving: BTreeMap<String, Leaving>,
    /// The platform is at work for this tier: the next steps wait until its outcome is known.
    acting: bool,
    /// A change that was approved and is under way, and since when.
    approved: Option<(Change, Duration)>,
}

/// What was done off the loop.
enum Done {
    /// The steps of a tier, and what there is to tell of them.
    Steps { tier: Tier, told: Vec<String> },
    /// Connections are led to a gateway, or no longer.
    Spread { name: String, instance: String, serving: bool, outcome: Result<(), PlatformError> },
    /// The map of a term was stored.
    Saved { term: u64, outcome: Result<(), PlatformError> },
    /// A member's addresses are known.
    Described,
    /// A round of measuring ended.
    Measured { round: Round, connector: Connector },
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
    coordinator: Coordinator,
    /// Until then control is new and only listens.
    hearing_until: Duration,
    /// Since control began, every process that there was had dialled in once.
    all_heard: bool,
    links: HashMap<MemberId, Link>,
    /// Processes (by instance) that ran before this leader and have not dialled in yet.
    inherited: BTreeSet<String>,
    /// Where owners listened before control was started, until they dial in.
    remembered: BTreeMap<MemberId, String>,
    gateway: TierState,
    business: TierState,
    signals: Signals,
    measuring: metrics::Setup,
    /// Goes into each round of measuring and comes back after it.
    connector: Option<Connector>,
    counts: ScalingMetrics,
    spread: BTreeMap<String, Spread>,
    /// Holes ever told of, by who told.
    holes: BTreeMap<MemberId, u64>,
    proposals: Proposals,
    /// Why the last approval led to nothing.
    stale_approval: Option<String>,
    /// Why planned moves wait.
    waits: Option<String>,
    /// When a gateway began to serve last: connections are levelled for a while after that.
    gateway_came: Duration,
    map_changed: bool,
    map_sent: Instant,
    /// The last term that was stored. Nobody hears of another one: who can't store it does not lead.
    stored_term: u64,
    unsaved: bool,
    saving: bool,
    /// When a map was stored last, the first one of this leader aside.
    save_began: Option<Instant>,
    /// What the platform does meanwhile.
    tasks: JoinSet<Done>,
    round_due: bool,
    happenings: VecDeque<Happening>,
    status: watch::Sender<Status>,
}

/// Its end ends the members' streams: they look for who decides then.
impl<P> Drop for Leader<P> {
    fn drop(&mut self) {
        for (_, outbox) in self.links.values().filter_map(|link| link.stream.as_ref()) {
            outbox.close();
        }
    }
}

impl<P: Platform> Leader<P> {
    /// Reads what was stored and begins a new term, which is stored before anybody hears of it.
    ///
    /// # Errors
    /// [`ControlError`] when the cluster can't be read or the map can't be read or stored.
    pub(super) async fn new(
        platform: Arc<P>,
        setup: Setup,
        counts: ScalingMetrics,
        status: watch::Sender<Status>,
    ) -> Result<Self, ControlError> {
        let cluster = platform.cluster()?;
        let shards = cluster.spec.business.shards;
        let stored = within(platform.load_map()).await?.and_then(|stored| stored.decode(shards));
        let (map, remembered) = stored.unwrap_or_else(|| (ShardMap::new(shards), BTreeMap::new()));
        let rebalance = cluster.spec.business.rebalance.clone();
        let coordinator = Coordinator::new(setup.timing.clone(), rebalance, map, Duration::ZERO);
        let mut views = platform.watch();
        let view = views.borrow_and_update().clone();
        let runs = |process: &&Process| process.state != ProcessState::Waiting;
        let inherited = view.processes.iter().filter(runs).filter_map(|process| process.instance.clone()).collect();
        let began = Instant::now();
        let mut leader = Self {
            platform,
            views,
            view,
            cluster,
            cluster_error: None,
            began,
            coordinator,
            hearing_until: setup.timing.hearing,
            all_heard: false,
            links: HashMap::new(),
            inherited,
            remembered,
            gateway: TierState::default(),
            business: TierState::default(),
            signals: Signals::default(),
            measuring: setup.metrics,
            connector: Some(Connector::default()),
            counts,
            spread: BTreeMap::new(),
            holes: BTreeMap::new(),
            proposals: Proposals::default(),
            stale_approval: None,
            waits: None,
            gateway_came: Duration::ZERO,
            // What was stored is the best there is until the members were heard.
            map_changed: true,
            map_sent: began,
            stored_term: 0,
            unsaved: false,
            saving: false,
            save_began: None,
            tasks: JoinSet::new(),
            round_due: true,
            happenings: VecDeque::new(),
            status,
        };
        within(leader.platform.save_map(&leader.stored_map())).await?;
        leader.stored_term = leader.coordinator.version().term;
        Ok(leader)
    }

    /// Decides until the service or the platform's watch is gone.
    ///
    /// # Errors
    /// [`PlatformError::Outranked`] when somebody else leads the cluster by now.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Incoming>) -> Result<(), ControlError> {
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
                    None => return Ok(()),
                },
                changed = self.views.changed() => match changed {
                    Ok(()) => self.on_view(),
                    Err(_) => return Ok(()),
                },
                Some(done) = self.tasks.join_next() => self.on_done(done)?,
                () = sleep_until(map_due.into()), if self.map_changed && self.may_command() => self.send_map(),
                _ = sweeps.tick() => {
                    self.decide(Event::Tick);
                    if std::mem::take(&mut self.round_due) {
                        self.round();
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
                    self.measure();
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

    /// Whether members may hear of the present map: what they said was listened to, and its term is stored.
    fn may_command(&self) -> bool {
        !self.hears() && self.stored_term == self.coordinator.version().term
    }

    /// Once every process of both tiers has dialled in there is nobody left to listen for, and owners that are not among
    /// them have ended.
    fn end_hearing(&mut self) {
        let lives = |process: &&Process| Tier::of(process.role).is_some() && process.state != ProcessState::Waiting;
        let mut tiers = self.view.processes.iter().filter(lives).peekable();
        let somebody = tiers.peek().is_some();
        let all = tiers.all(|process| self.live_link(process).is_some());
        let ordered = Tier::ALL.iter().any(|tier| self.view.ordered.of(*tier) > 0 || self.tier_state(*tier).acting);
        if self.all_heard || !somebody || !all || ordered {
            return;
        }
        self.all_heard = true;
        if self.hears() {
            self.hearing_until = self.now();
            self.coordinator.end_hearing(self.hearing_until);
            self.map_changed = true;
        }
        // The platform shows every process there is, and each has said who it is.
        let owners = self.coordinator.map().rows().iter().filter_map(|row| row.owner.as_ref());
        let ended: BTreeSet<MemberId> = owners.filter(|owner| !self.links.contains_key(*owner)).cloned().collect();
        for member in ended {
            self.decide(Event::MemberGone { member, confirmed_dead: true });
        }
    }

    fn tier(&mut self, tier: Tier) -> &mut TierState {
        match tier {
            Tier::Gateway => &mut self.gateway,
            Tier::Business => &mut self.business,
        }
    }

    fn tier_state(&self, tier: Tier) -> &TierState {
        match tier {
            Tier::Gateway => &self.gateway,
            Tier::Business => &self.business,
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
            process.state != ProcessState::Waiting
                && is_of(process, link)
                && now.saturating_sub(link.heard) < HEARD_WITHIN
        })
    }

    // ---- what was done ------------------------------------------------------------------------------------------------

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) -> Result<(), ControlError> {
        match done {
            Ok(Done::Steps { tier, told }) => {
                for text in told {
                    self.tell(text);
                }
                self.tier(tier).acting = false;
                // What the platform shows of it counts for the next steps.
                self.on_view();
            }
            Ok(Done::Spread { name, instance, serving, outcome }) => {
                let now = self.now();
                if let Some(spread) = self.spread.get_mut(&name).filter(|spread| spread.instance == instance) {
                    spread.asked = false;
                    if outcome.is_ok() {
                        spread.confirmed = Some((serving, now));
                    }
                }
                self.round_due |= outcome.is_ok();
                if let Err(error) = outcome {
                    let what = if serving { "be led to" } else { "be kept from" };
                    self.tell(format!("new connections can't {what} {name}, tried again: {error}"));
                }
            }
            Ok(Done::Saved { term, outcome }) => {
                self.saving = false;
                match outcome {
                    Ok(()) if term > self.stored_term => {
                        self.stored_term = term;
                        self.map_changed = true;
                    }
                    Ok(()) => {}
                    Err(outranked @ PlatformError::Outranked) => return Err(outranked.into()),
                    Err(error) => {
                        self.unsaved = true;
                        tracing::error!("the shard map can't be stored: {error}; the members keep it meanwhile");
                    }
                }
            }
            Ok(Done::Described) => {}
            Ok(Done::Measured { round, connector }) => self.on_measured(round, connector),
            // Cancelled only with the loop itself; a panic is a fault of ours that must not go unseen.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
        Ok(())
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
            // Who was told to end has ended, and this is the one after it.
            if tier == Tier::Gateway {
                self.gateway_came = now;
            }
            let leaving = &mut self.tier(tier).leaving;
            if leaving.get(member.name()).is_some_and(|leaving| leaving.by_itself) {
                leaving.remove(member.name());
            }
        }
        self.remembered.remove(&member);
        self.inherited.remove(&hello.instance);
        let link = Link {
            tier,
            shown: self
                .view
                .process(member.name())
                .is_some_and(|process| process.instance.as_ref() == Some(&hello.instance)),
            instance: hello.instance.clone(),
            link_address: hello.link_address.clone(),
            admin_address: hello.http_address.clone(),
            stream: Some((stream, outbox.clone())),
            told: None,
            heard: now,
            beat: known.as_ref().map(|link| link.beat).unwrap_or_default(),
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
        if tier == Tier::Business {
            let leaving = self.business.leaving.contains_key(member.name());
            self.decide(Event::MemberJoined { member: member.clone() });
            let held = hello.held.iter().map(|held| (held.shard, held.epoch)).collect();
            let heard =
                Event::Heartbeat { member: member.clone(), held, loads: vec![], store_ok: true, term: hello.term };
            self.decide(heard);
            self.decide(Event::Leaving { member: member.clone(), leaving });
        }
        self.map_changed = true;
        if self.may_command() {
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
        // Nothing waits for it.
        let (platform, instance) = (self.platform.clone(), hello.instance);
        self.tasks.spawn(async move {
            if let Err(error) = within(platform.describe(member.name(), &instance, addresses)).await {
                tracing::warn!(%member, %error, "its addresses can't be made known");
            }
            Done::Described
        });
    }

    fn on_report(&mut self, member: MemberId, report: Report) {
        let now = self.now();
        let Some(link) = self.links.get_mut(&member) else { return };
        link.heard = now;
        match report {
            Report::Hello(_) => tracing::warn!(%member, "a second Hello on one stream is ignored"),
            Report::Heartbeat(beat) => {
                self.round_due |= beat.leaving && !link.beat.leaving;
                link.beat = Beat {
                    connections: beat.connections,
                    messages_per_second: beat.messages_per_second,
                    cpu_cores: beat.cpu_cores,
                    drained: beat.drained,
                    leaving: beat.leaving,
                    store_refuses: beat.store_refuses,
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

    /// A higher term comes from a leader before this one whose map was lost, or from one after it. Storing a term above it
    /// tells which: until then nobody hears anything.
    fn hear_term(&mut self, term: u64) {
        if term > self.coordinator.version().term {
            self.coordinator.begin_term(term);
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
                let same = view.process(member.name()).is_some_and(|process| is_of(process, link));
                link.shown |= same;
                (link.shown && !same).then(|| member.clone())
            })
            .collect();
        for member in ended {
            let Some(link) = self.links.remove(&member) else { continue };
            if let Some((_, outbox)) = link.stream {
                outbox.close();
            }
            self.tell(format!("{} ({}) ended", member.name(), link.instance));
            self.map_changed = true;
            if link.tier == Tier::Business {
                self.decide(Event::MemberGone { member, confirmed_dead: true });
            }
        }
        for tier in Tier::ALL {
            self.tier(tier).leaving.retain(|name, _| view.process(name).is_some());
        }
        self.spread.retain(|name, spread| {
            view.process(name).is_some_and(|process| process.instance.as_ref() == Some(&spread.instance))
        });
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

    /// Queues a command; without a stream, or before its term is stored, it is dropped, and the deadlines of the decisions
    /// see to the rest.
    fn send(&self, to: &MemberId, command: Command) {
        if self.stored_term != self.coordinator.version().term {
            return;
        }
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
        if !self.unsaved || self.saving || self.save_began.is_some_and(|began| began.elapsed() < SAVE_INTERVAL) {
            return;
        }
        (self.unsaved, self.saving, self.save_began) = (false, true, Some(Instant::now()));
        let (platform, stored, term) = (self.platform.clone(), self.stored_map(), self.coordinator.version().term);
        self.tasks.spawn(async move { Done::Saved { term, outcome: within(platform.save_map(&stored)).await } });
    }

    // ---- rounds: scale and plan ---------------------------------------------------------------------------------------

    fn round(&mut self) {
        let now = self.now();
        // Owners that did not dial in while control listened are nobody's address any more.
        if !self.hears() && !self.remembered.is_empty() {
            self.remembered.clear();
            self.map_changed = true;
        }
        self.note_refusals();
        let snapshot = self.coordinator.snapshot(now);
        let acts = self.acts();
        let mut changes = Vec::new();
        for tier in Tier::ALL {
            self.note_leaving(tier, &snapshot);
            self.note_empty(tier, &snapshot);
            let members = self.tier_members(tier, &snapshot);
            let observed = self.observed(tier);
            let cluster = self.cluster.clone();
            let scaling = scaling(&cluster, tier);
            let rolling =
                members.iter().any(|member| member.outdated && matches!(member.stage, Stage::Starting | Stage::Ready));
            let ordered = self.view.ordered.of(tier);
            let mut scaler = std::mem::take(&mut self.tier(tier).scaler);
            let observed = Observed { tier, members: &observed, ordered, rolling, signals: &self.signals };
            let wanted = scaler.decide(now, scaling, &observed);
            self.tier(tier).scaler = scaler;
            self.counts.decided(&self.key().0, tier, wanted.replicas, &wanted.metrics);
            let changed = self.tier(tier).wanted.replicas != wanted.replicas;
            self.tier(tier).wanted = wanted.clone();
            if changed {
                let because = wanted.because.first().map(|reason| format!(": {reason}")).unwrap_or_default();
                self.tell(format!("{tier}: {} wanted{because}", wanted.replicas));
            }
            let change = proposed_change(tier, wanted.replicas, &members, ordered);
            // Somebody has to be there before anything can be paused or recommended.
            let steps = match acts {
                _ if self.tier(tier).acting => vec![],
                // Who holds what is not known before the members have been heard.
                _ if self.hears() && !members.is_empty() => vec![],
                _ if members.is_empty() && acts != Acts::Freely => next_steps(tier, scaling.initial(), &[], ordered),
                Acts::Freely => next_steps(tier, wanted.replicas, &members, ordered),
                Acts::Approved => self.approved_steps(tier, &members, ordered),
                Acts::Never => vec![],
            };
            // What was approved, or is on its way, is not proposed again.
            if !members.is_empty() && self.tier(tier).approved.is_none() && !self.tier(tier).acting {
                changes.extend(change);
            }
            self.take(tier, steps, &snapshot);
        }
        self.spread_connections();
        self.order_gateways(acts);
        self.plan(acts, changes);
    }

    fn acts(&self) -> Acts {
        match (self.cluster.spec.paused, self.cluster.spec.mode) {
            (true, _) => Acts::Never,
            (false, Mode::Recommend) => Acts::Approved,
            (false, Mode::Auto) => Acts::Freely,
        }
    }

    /// The steps of a tier that may only do what was approved, and may finish what it began.
    fn approved_steps(&mut self, tier: Tier, members: &[TierMember], ordered: u32) -> Vec<Step> {
        let now = self.now();
        let approved = self.tier(tier).approved;
        let replaces = approved.is_some_and(|(change, _)| change.outdated > 0);
        let relevant = |member: &TierMember| TierMember { outdated: member.outdated && replaces, ..member.clone() };
        let members: Vec<TierMember> = members.iter().map(relevant).collect();
        let serves = |member: &&TierMember| matches!(member.stage, Stage::Starting | Stage::Ready);
        let count = members.iter().filter(serves).count() as u32 + ordered;
        let target = approved.map_or(count, |(change, _)| change.to);
        let settled = members.iter().all(|member| member.stage == Stage::Ready && !member.outdated);
        if let Some((_, since)) = approved {
            let done = ordered == 0 && count == target && settled;
            if done || now.saturating_sub(since) >= APPROVED_FOR {
                self.tier(tier).approved = None;
                let how = if done { "is done" } else { "could not be done in time; what is missing is proposed anew" };
                self.tell(format!("{tier}: what was approved {how}"));
            }
        }
        next_steps(tier, target, &members, ordered)
    }

    /// Lets planned moves wait while the store refuses writes: each begins and ends with one.
    fn note_refusals(&mut self) {
        let now = self.now();
        let refuses = |(member, link): (&MemberId, &Link)| {
            let fresh = now.saturating_sub(link.heard) < HEARD_WITHIN;
            (fresh && link.beat.store_refuses).then(|| member.name().to_owned())
        };
        let waits = self.links.iter().find_map(refuses);
        let waits = waits.map(|name| format!("planned moves wait: the store refuses the writes of {name}"));
        if waits.is_some() != self.waits.is_some() {
            self.tell(waits.clone().unwrap_or_else(|| "the store takes writes again: planned moves go on".to_owned()));
        }
        self.coordinator.hold_planned(waits.is_some());
        self.waits = waits;
    }

    /// Notes who goes by itself: it was told to end by somebody else (an eviction, a signal) and lives until it is empty.
    fn note_leaving(&mut self, tier: Tier, snapshot: &Snapshot) {
        let now = self.now();
        let mut going = Vec::new();
        let mut stays = Vec::new();
        for process in self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier)) {
            let link = self.link(&process.name).filter(|(_, link)| is_of(process, link));
            let says_so = link.is_some_and(|(_, link)| link.beat.leaving);
            let known = self.tier_state(tier).leaving.get(&process.name).map(|leaving| leaving.by_itself);
            if process.state == ProcessState::Stopping || says_so {
                if known != Some(true) {
                    going.push((process.name.clone(), self.holds(tier, process, snapshot), says_so));
                }
            } else if known == Some(true) {
                stays.push(process.name.clone());
            }
        }
        for name in stays {
            self.tier(tier).leaving.remove(&name);
            self.mark_leaving(&name, false);
        }
        for (name, held_first, says_so) in going {
            if says_so {
                self.tell(format!("{name} was told to end: what it holds goes elsewhere first"));
            }
            let fresh = Leaving { since: now, by_itself: true, held_first, empty_since: None };
            self.tier(tier).leaving.entry(name.clone()).or_insert(fresh).by_itself = true;
            self.mark_leaving(&name, true);
        }
    }

    /// What a member holds, as it said last, not too long ago: connections, or shards that it has or is about to get.
    fn holds(&self, tier: Tier, process: &Process, snapshot: &Snapshot) -> u64 {
        let now = self.now();
        let link = self.link(&process.name).filter(|(_, link)| is_of(process, link));
        match (tier, link) {
            (Tier::Gateway, Some((_, link))) if now.saturating_sub(link.heard) >= SILENT_HOLDS => 0,
            (Tier::Gateway, Some((_, link))) => link.beat.connections,
            (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member),
            (_, None) if now >= SILENT_HOLDS => 0,
            // It was there before this leader, and has not said yet what it holds: something.
            (_, None) => process.instance.as_ref().is_some_and(|instance| self.inherited.contains(instance)).into(),
        }
    }

    /// Notes since when each leaving member of the tier holds nothing.
    fn note_empty(&mut self, tier: Tier, snapshot: &Snapshot) {
        let now = self.now();
        let holds_nothing = |name: &String, leaving: &Leaving| {
            let Some(process) = self.view.process(name) else { return true };
            match (tier, self.live_link(process)) {
                (Tier::Gateway, Some((_, link))) => {
                    leaving.since < link.heard && matches!(link.told, Some(Order::Drain(_))) && link.beat.drained
                }
                (Tier::Business, Some((member, _))) => held_or_coming(snapshot, member) == 0,
                // It ended by itself, or does not answer: only the first means that it holds nothing.
                (_, None) => process.state == ProcessState::Waiting,
            }
        };
        let state = self.tier_state(tier);
        let empty: Vec<bool> = state.leaving.iter().map(|(name, leaving)| holds_nothing(name, leaving)).collect();
        for (leaving, empty) in self.tier(tier).leaving.values_mut().zip(empty) {
            leaving.empty_since = if empty { leaving.empty_since.or(Some(now)) } else { None };
        }
    }

    fn tier_members(&self, tier: Tier, snapshot: &Snapshot) -> Vec<TierMember> {
        let now = self.now();
        let state = self.tier_state(tier);
        let template = self.platform.template(&self.cluster, tier);
        let processes = self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier));
        let member = |process: &Process| {
            let stage = match (process.state, state.leaving.get(&process.name)) {
                (ProcessState::Stopping, _) => Stage::Stopping,
                // Told to end where the platform does not know: it comes back under its name.
                (_, Some(Leaving { by_itself: true, .. })) => Stage::Starting,
                (_, Some(leaving)) => {
                    let deadline = match tier {
                        Tier::Gateway => self.cluster.spec.gateway.drain.deadline.duration(),
                        Tier::Business => EMPTY_DEADLINE,
                    };
                    let lingers = match (tier, process.state) {
                        // With nobody there it lingers for nobody.
                        (Tier::Gateway, _) | (_, ProcessState::Waiting) => Duration::ZERO,
                        (Tier::Business, _) => EMPTY_LINGER,
                    };
                    let empty = leaving.empty_since.is_some_and(|since| now.saturating_sub(since) >= lingers);
                    Stage::Leaving { empty, overdue: now.saturating_sub(leaving.since) >= deadline }
                }
                (_, None) if self.live_link(process).is_some() => Stage::Ready,
                (_, None) => Stage::Starting,
            };
            let cost = self.holds(tier, process, snapshot);
            TierMember { name: process.name.clone(), stage, cost, outdated: process.template != template }
        };
        processes.map(member).collect()
    }

    fn take(&mut self, tier: Tier, steps: Vec<Step>, snapshot: &Snapshot) {
        let now = self.now();
        let (mut count, mut stops) = (0, Vec::new());
        for step in steps {
            match step {
                Step::Start(more) => count += more,
                Step::Stop(name) => stops.push(name),
                Step::Leave(name) => {
                    let how = if tier == Tier::Gateway { "sheds its connections" } else { "gives its shards away" };
                    self.tell(format!("{name} leaves: it {how} first"));
                    let held_first = self.view.process(&name).map_or(0, |process| self.holds(tier, process, snapshot));
                    let leaving = Leaving { since: now, by_itself: false, held_first, empty_since: None };
                    self.tier(tier).leaving.insert(name.clone(), leaving);
                    self.mark_leaving(&name, true);
                    self.round_due = true;
                }
                Step::Return(name) => {
                    self.tell(format!("{name} stays after all"));
                    self.tier(tier).leaving.remove(&name);
                    self.mark_leaving(&name, false);
                }
            }
        }
        if count == 0 && stops.is_empty() {
            return;
        }
        self.tier(tier).acting = true;
        let (platform, cluster) = (self.platform.clone(), self.cluster.clone());
        self.tasks.spawn(async move {
            let mut told = Vec::new();
            if count > 0 {
                told.push(match within(platform.start(&cluster, tier, count)).await {
                    Ok(()) => format!("{tier}: {count} more are started"),
                    Err(error) => format!("{tier}: {count} more can't be started: {error}"),
                });
            }
            for name in stops {
                told.push(match within(platform.stop(&name, STOP_GRACE)).await {
                    Ok(()) => format!("{name} is stopped"),
                    Err(error) => format!("{name} can't be stopped: {error}"),
                });
            }
            Done::Steps { tier, told }
        });
    }

    /// Tells the coordinator; a gateway is told by its orders.
    fn mark_leaving(&mut self, name: &str, leaving: bool) {
        let business = self.link(name).filter(|(_, link)| link.tier == Tier::Business);
        if let Some(member) = business.map(|(member, _)| member.clone()) {
            self.decide(Event::Leaving { member, leaving });
        }
    }

    /// Has new connections led to the gateways that stay, and to no other.
    fn spread_connections(&mut self) {
        let runs = |process: &&Process| process.role == Role::Gateway && process.state == ProcessState::Running;
        for process in self.view.processes.iter().filter(runs) {
            let Some(instance) = &process.instance else { continue };
            let serving = !self.gateway.leaving.contains_key(&process.name);
            let fresh = || Spread { instance: instance.clone(), confirmed: None, asked: false };
            let spread = self.spread.entry(process.name.clone()).or_insert_with(fresh);
            if spread.asked || spread.confirmed.is_some_and(|(confirmed, _)| confirmed == serving) {
                continue;
            }
            spread.asked = true;
            let (platform, name, instance) = (self.platform.clone(), process.name.clone(), instance.clone());
            self.tasks.spawn(async move {
                let outcome = within(platform.set_serving(&name, serving)).await;
                Done::Spread { name, instance, serving, outcome }
            });
        }
    }

    /// Since when new connections are led elsewhere.
    fn unserved_since(&self, process: &Process, leaving: &Leaving) -> Option<Duration> {
        // A platform that ends a process leads nobody to it.
        if process.state == ProcessState::Stopping {
            return Some(leaving.since);
        }
        let spread = self.spread.get(&process.name)?;
        spread.confirmed.and_then(|(serving, since)| (!serving).then_some(since))
    }

    /// Tells each gateway whether it drains and how fast, as the others' room changes. All that drain share one budget.
    fn order_gateways(&mut self, acts: Acts) {
        // Who was told to drain by the leader before goes on until it is clear who drains.
        if !self.may_command() {
            return;
        }
        let gateway = &self.cluster.spec.gateway;
        let now = self.now();
        let mut live = Vec::new();
        for process in self.view.processes.iter().filter(|process| process.role == Role::Gateway) {
            if let Some((member, link)) = self.live_link(process) {
                live.push((process, member, link, self.gateway.leaving.get(&process.name)));
            }
        }
        let others: Vec<(&MemberId, u64)> = live
            .iter()
            .filter(|(.., leaving)| leaving.is_none())
            .map(|(_, member, link, _)| (*member, link.beat.connections))
            .collect();
        let draining = live.len() - others.len();
        let limits = &gateway.limits;
        let held: Vec<u64> = others.iter().map(|(_, held)| *held).collect();
        let rate = drain_rate(gateway.drain.rate, limits.connect_rate, limits.max_connections, draining, &held);
        let mut orders = Vec::new();
        for (process, member, link, leaving) in live {
            let order = match leaving {
                None => {
                    let (held, sheds) = (link.beat.connections, matches!(link.told, Some(Order::Shed(_))));
                    let rest = others.iter().filter(|(other, _)| *other != member).map(|(_, held)| *held);
                    let levels = acts == Acts::Freely && now.saturating_sub(self.gateway_came) < LEVEL_WINDOW;
                    let (most, intake) = (gateway.drain.rate, limits.connect_rate);
                    let rest = rest.collect::<Vec<u64>>();
                    let rate = level_rate(held, sheds, most, intake, limits.max_connections, &rest);
                    // Drains can't wait, and their connections have to go somewhere too.
                    rate.filter(|_| levels && draining == 0).map_or(Order::Serve, Order::Shed)
                }
                // What is paused keeps what it has.
                Some(leaving) if acts == Acts::Never && !leaving.by_itself => Order::Drain(0.0),
                // Until load balancers noticed, who comes is let in.
                Some(leaving) => {
                    let unserved = self.unserved_since(process, leaving);
                    let noticed =
                        unserved.is_some_and(|since| now.saturating_sub(since) >= gateway.drain.notice.duration());
                    if noticed || link.beat.connections == 0 { Order::Drain(rate) } else { Order::Serve }
                }
            };
            if order.is_news(link.told) {
                orders.push((member.clone(), order));
            }
        }
        for (member, order) in orders {
            self.send(
                &member,
                match order {
                    Order::Serve => Command::Undrain(wire::Undrain {}),
                    Order::Shed(per_second) => Command::Shed(wire::Shed { per_second }),
                    Order::Drain(per_second) => Command::Drain(wire::Drain { per_second }),
                },
            );
            if let Some(link) = self.links.get_mut(&member) {
                link.told = Some(order);
            }
        }
    }

    /// Plans the shards' moves, and runs what may be run.
    fn plan(&mut self, acts: Acts, changes: Vec<Change>) {
        let proposed = self.coordinator.plan_input(self.now()).map(|input| plan(&input));
        if acts == Acts::Freely {
            self.proposals.clear();
            self.stale_approval = None;
            self.gateway.approved = None;
            self.business.approved = None;
            if let Some(proposed) = proposed.filter(|proposed| !proposed.moves().is_empty()) {
                self.begin(proposed);
            }
            return;
        }
        // Who goes by itself takes its shards with it whether or not anybody says yes, and what was approved to leave has
        // to be emptied.
        let goes = |name: &str| {
            let leaving = self.business.leaving.get(name);
            leaving.is_some_and(|leaving| leaving.by_itself || acts == Acts::Approved)
        };
        let moves = proposed.map(|proposed| proposed.moves().to_vec()).unwrap_or_default();
        let (due, optional): (Vec<_>, Vec<_>) =
            moves.into_iter().partition(|planned| planned.from.as_ref().is_some_and(|from| goes(from.name())));
        if !due.is_empty() {
            return self.begin(Plan::new(due));
        }
        let fresh = Content { plan: Plan::new(optional), changes };
        let (now, term) = (self.now(), self.coordinator.version().term);
        let coordinator = &self.coordinator;
        let fits = |shown: &Plan<Proposed>| {
            let able = |planned: &crate::shards::Move| coordinator.is_usable(now, &planned.to);
            shown.moves().iter().all(able)
                && shown.clone().approve(shown.hash()).is_ok_and(|approved| approved.commit(coordinator.map()).is_ok())
        };
        self.proposals.show(now, term, fresh, fits);
        if acts == Acts::Approved {
            self.approve();
        }
    }

    /// Runs a plan just as it is.
    fn begin(&mut self, proposed: Plan<Proposed>) {
        let (hash, moves) = (proposed.hash(), proposed.moves().len());
        match proposed.approve(hash).and_then(|approved| approved.commit(self.coordinator.map())) {
            Ok(committed) => {
                self.tell(format!("{moves} shards move, plan {hash:016x}"));
                self.decide(Event::NewPlan(committed));
            }
            Err(error) => tracing::info!("{error}"),
        }
    }

    /// Does what the ImCluster's annotation approves, if that is what is shown.
    fn approve(&mut self) {
        let now = self.now();
        let annotations = self.cluster.metadata.annotations.as_ref();
        let approval = annotations.and_then(|annotations| annotations.get(APPROVE_ANNOTATION)).cloned();
        match self.proposals.approve(approval.as_deref()) {
            Verdict::Nothing if approval.is_none() => self.stale_approval = None,
            Verdict::Nothing => {}
            Verdict::Stale(reason) => {
                self.tell(reason.clone());
                self.stale_approval = Some(reason);
            }
            Verdict::Run(content) => {
                self.stale_approval = None;
                self.tell(format!("approved: {}", content.sentences().join("; ")));
                for change in content.changes {
                    self.tier(change.tier).approved = Some((change, now));
                }
                if !content.plan.moves().is_empty() {
                    self.begin(content.plan);
                }
                self.round_due = true;
            }
        }
    }

    // ---- measuring ----------------------------------------------------------------------------------------------------

    /// Measures every live member, off this loop; while one round of it is under way there is no second.
    fn measure(&mut self) {
        let Some(mut connector) = self.connector.take() else { return };
        let live = self.links.iter().filter(|(_, link)| self.now().saturating_sub(link.heard) < HEARD_WITHIN);
        let targets = live.map(|(member, link)| Target {
            name: member.name().to_owned(),
            tier: link.tier,
            address: link.admin_address.clone(),
        });
        let request = Request::of(&self.cluster, targets.collect(), clock(self.now()));
        // Reads files: small ones, and anew, since tokens change.
        let endpoint = Endpoint::of(&self.cluster, &self.measuring);
        self.tasks.spawn(async move {
            let round = measure(&mut connector, endpoint, &request).await;
            Done::Measured { round, connector }
        });
    }

    fn on_measured(&mut self, round: Round, connector: Connector) {
        self.connector = Some(connector);
        for error in round.prometheus.iter().flat_map(metrics::round::Answers::errors) {
            self.counts.failed(&self.key().0, error.reason());
        }
        let members = self.view.processes.iter().map(|process| process.name.clone()).collect();
        self.signals.absorb(&rfc3339(SystemTime::now()), &members, round);
    }

    /// What the autoscaler sees.
    fn observed(&self, tier: Tier) -> Vec<Member> {
        let leaving = &self.tier_state(tier).leaving;
        let processes = self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier));
        let observed = processes.map(|process| {
            let goes = process.state == ProcessState::Stopping || leaving.contains_key(&process.name);
            let state = match (goes, self.live_link(process)) {
                (true, _) => MemberState::Draining,
                (false, Some(_)) => MemberState::Ready,
                (false, None) => MemberState::Starting,
            };
            Member { name: process.name.clone(), state }
        });
        observed.collect()
    }

    fn key(&self) -> ClusterKey {
        ClusterKey::of(&self.cluster)
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
        let processes = self.view.processes.iter().filter(|process| Tier::of(process.role) == Some(tier));
        let epochs = self.epochs();
        for process in processes {
            let leaving = state.leaving.get(&process.name);
            let leaves = leaving.is_some();
            let link = self.link(&process.name).filter(|(_, link)| is_of(process, link));
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
                drain: leaving.map(|leaving| {
                    let since = self.now().saturating_sub(leaving.since);
                    DrainStatus::new(leaving.held_first, self.holds(tier, process, snapshot), since)
                }),
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
            proposal: self.proposals.shown().map(|shown| Proposal {
                hash: shown.hash.clone(),
                moves: shown.content.plan.moves().len(),
                what: shown.content.sentences(),
            }),
            stale_approval: self.stale_approval.clone(),
            waits: self.waits.clone(),
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

/// What would have to be done with a tier, if anything.
fn proposed_change(tier: Tier, wanted: u32, members: &[TierMember], ordered: u32) -> Option<Change> {
    let serves = |member: &&TierMember| matches!(member.stage, Stage::Starting | Stage::Ready);
    let from = members.iter().filter(serves).count() as u32 + ordered;
    let outdated = members.iter().filter(serves).filter(|member| member.outdated).count() as u32;
    (from != wanted || outdated > 0).then_some(Change { tier, from, to: wanted, outdated })
}

/// Whether it is this process that dialled in.
fn is_of(process: &Process, link: &Link) -> bool {
    process.instance.as_ref() == Some(&link.instance)
}

/// Waits for the platform, but not for ever.
async fn within<T>(action: impl Future<Output = Result<T, PlatformError>>) -> Result<T, PlatformError> {
    timeout(PLATFORM_TIMEOUT, action).await.unwrap_or(Err(PlatformError::Timeout(PLATFORM_TIMEOUT)))
}
