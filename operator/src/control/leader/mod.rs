//! The one loop that decides. See [`Leader`].
//!
//! Here are its state, the loop and what goes out to members and the platform; beside it what comes in ([`heard`]), the
//! decisions of each round ([`rounds`], [`gateways`]) and what people see ([`show`]).

mod gateways;
mod heard;
mod rounds;
mod show;

use super::lasting::Lasting;
use super::proposal::{Change, Proposals};
use super::scaling::{Scaler, Wanted};
use super::service::{Incoming, Outbox, StreamId};
use super::status::{EVENTS_MAX, Event as Happening, Outage, Status, StoreAway, rfc3339};
use super::tiers::{Pace, Strain};
use super::{ClusterKey, ControlError};
use crate::metrics::round::Connector;
use crate::metrics::{self, Round, ScalingMetrics, Signals};
use crate::platform::{Platform, PlatformError, Process, ProcessState, StoredMap, Tier, View};
use crate::shards::{Action, Coordinator, Event, Ownership, ShardMap, Timing};
use im_crds::ImCluster;
use im_proto::control::{self as wire, Role as WireRole, command::Command};
use im_proto::ids::MemberId;
use im_proto::map_hint;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::ops::{Index, IndexMut};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
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
/// Between two writes of the map.
const SAVE_INTERVAL: Duration = Duration::from_secs(1);
/// Between two copies of the map for members that start.
const PUBLISH_INTERVAL: Duration = Duration::from_secs(5);
/// The platform does one thing within that time, or it is tried again.
const PLATFORM_TIMEOUT: Duration = Duration::from_secs(10);

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
    strain: Strain,
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
    /// Digest of what its members are to be configured with.
    template: String,
    scaler: Scaler,
    wanted: Wanted,
    /// Some metric can't be trusted.
    doubt: Lasting<()>,
    leaving: BTreeMap<String, Leaving>,
    /// Since when each member that does not serve does not.
    absent: BTreeMap<String, Duration>,
    /// The platform is at work for this tier: the next steps wait until its outcome is known.
    acting: bool,
    /// A change that was approved and is under way, and since when.
    approved: Option<(Change, Duration)>,
}

impl TierState {
    /// How long that member has not served.
    fn absent_for(&self, process: &Process, now: Duration) -> Duration {
        self.absent.get(&process.name).map_or(Duration::ZERO, |since| now.saturating_sub(*since))
    }
}

/// Both tiers, by [`Tier`].
#[derive(Default)]
struct PerTier {
    gateway: TierState,
    business: TierState,
}

impl Index<Tier> for PerTier {
    type Output = TierState;

    fn index(&self, tier: Tier) -> &TierState {
        match tier {
            Tier::Gateway => &self.gateway,
            Tier::Business => &self.business,
        }
    }
}

impl IndexMut<Tier> for PerTier {
    fn index_mut(&mut self, tier: Tier) -> &mut TierState {
        match tier {
            Tier::Gateway => &mut self.gateway,
            Tier::Business => &mut self.business,
        }
    }
}

/// What was done off the loop.
enum Done {
    /// The steps of a tier, what there is to tell of them, and whether the platform did them all.
    Steps { tier: Tier, told: Vec<String>, complete: bool },
    /// Connections are led to a gateway, or no longer.
    Spread { name: String, instance: String, serving: bool, outcome: Result<(), PlatformError> },
    /// The map of a term was stored.
    Saved { term: u64, outcome: Result<(), PlatformError> },
    /// The copy of the map was laid out for members that start.
    Published { outcome: Result<(), PlatformError> },
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
    tiers: PerTier,
    signals: Signals,
    measuring: metrics::Setup,
    /// Goes into each round of measuring and comes back after it.
    connector: Option<Connector>,
    counts: ScalingMetrics,
    spread: BTreeMap<String, Spread>,
    /// How fast gateways may shed, by what those that stay go through.
    pace: Pace,
    /// Holes ever told of, by who told.
    holes: BTreeMap<MemberId, u64>,
    proposals: Proposals,
    /// Why the last approval led to nothing.
    stale_approval: Option<String>,
    /// Why planned moves wait.
    waits: Option<String>,
    /// What of the store and of Prometheus is away.
    store_away: Lasting<StoreAway>,
    prometheus: Lasting<Outage>,
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
    /// The copy of the map that was laid out last; `None`: to be laid out.
    published: Option<Vec<u8>>,
    publishing: bool,
    publish_began: Option<Instant>,
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
            tiers: PerTier::default(),
            signals: Signals::default(),
            measuring: setup.metrics,
            connector: Some(Connector::default()),
            counts,
            spread: BTreeMap::new(),
            pace: Pace::full(Duration::ZERO),
            holes: BTreeMap::new(),
            proposals: Proposals::default(),
            stale_approval: None,
            waits: None,
            store_away: Lasting::default(),
            prometheus: Lasting::default(),
            gateway_came: Duration::ZERO,
            // What was stored is the best there is until the members were heard.
            map_changed: true,
            map_sent: began,
            stored_term: 0,
            unsaved: false,
            saving: false,
            save_began: None,
            published: None,
            publishing: false,
            publish_began: None,
            tasks: JoinSet::new(),
            round_due: true,
            happenings: VecDeque::new(),
            status,
        };
        leader.take_templates();
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
                    self.publish();
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
        let lives = |process: &&Process| process.state != ProcessState::Waiting;
        let members = || Tier::ALL.iter().flat_map(|tier| self.view.of_tier(*tier)).filter(lives);
        let all = members().next().is_some() && members().all(|process| self.live_link(process).is_some());
        let ordered = Tier::ALL.iter().any(|tier| self.view.ordered.of(*tier) > 0 || self.tiers[*tier].acting);
        if self.all_heard || !all || ordered {
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

    /// The link of this very process.
    fn link_of(&self, process: &Process) -> Option<(&MemberId, &Link)> {
        self.link(&process.name).filter(|(_, link)| is_of(process, link))
    }

    /// The link of a process that serves.
    fn live_link(&self, process: &Process) -> Option<(&MemberId, &Link)> {
        let live = |link: &Link| process.state != ProcessState::Waiting && self.is_live(link);
        self.link_of(process).filter(|(_, link)| live(link))
    }

    /// Whether the member was heard a moment ago.
    fn is_live(&self, link: &Link) -> bool {
        self.now().saturating_sub(link.heard) < HEARD_WITHIN
    }

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) -> Result<(), ControlError> {
        match done {
            Ok(Done::Steps { tier, told, complete }) => {
                for text in told {
                    self.tell(text);
                }
                self.tiers[tier].acting = false;
                // What the platform shows of it counts for the next steps; what it refused waits for its turn.
                let due = self.round_due;
                self.on_view();
                self.round_due = due || complete;
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
            Ok(Done::Published { outcome }) => {
                self.publishing = false;
                if let Err(error) = outcome {
                    self.published = None;
                    tracing::warn!(
                        "the copy of the shard map for members that start can't be written: {error}; tried again"
                    );
                }
            }
            Ok(Done::Described) => {}
            Ok(Done::Measured { round, connector }) => self.on_measured(round, connector),
            // Cancelled only with the loop itself; a panic is a fault of ours that must not go unseen.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
        Ok(())
    }

    /// Lets the coordinator take one event in, and does what it says.
    fn decide(&mut self, event: Event) {
        let actions = self.coordinator.handle(self.now(), event);
        // One message per member, however many shards it is to acquire.
        let mut acquires: BTreeMap<MemberId, Vec<wire::ShardRow>> = BTreeMap::new();
        for action in actions {
            match action {
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

    /// Lays a copy of the map out for members that start while nobody leads, now and then: it is a hint, and may be a little old.
    fn publish(&mut self) {
        if self.publishing || self.hears() || self.publish_began.is_some_and(|began| began.elapsed() < PUBLISH_INTERVAL)
        {
            return;
        }
        self.publish_began = Some(Instant::now());
        let hint = map_hint::encode(self.wire_map());
        if self.published.as_ref() != Some(&hint) {
            self.publishing = true;
            self.published = Some(hint.clone());
            let platform = self.platform.clone();
            self.tasks.spawn(async move { Done::Published { outcome: within(platform.publish_map(hint)).await } });
        }
    }

    fn key(&self) -> ClusterKey {
        ClusterKey::of(&self.cluster)
    }
}

/// Whether it is this process that dialled in.
fn is_of(process: &Process, link: &Link) -> bool {
    process.instance.as_ref() == Some(&link.instance)
}

/// Waits for the platform, but not for ever.
async fn within<T>(action: impl Future<Output = Result<T, PlatformError>>) -> Result<T, PlatformError> {
    timeout(PLATFORM_TIMEOUT, action).await.unwrap_or(Err(PlatformError::Timeout(PLATFORM_TIMEOUT)))
}
