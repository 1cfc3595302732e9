//! The whole data path in virtual time: real owners, sessions, routers and the real coordinator, driven by one seeded loop through
//! drops, delays, crashes, pauses, a store that fails, and moves. Some people speak MQTT 3.1.1, some have a second device. Nothing
//! sleeps; the same seed gives the same history.
//!
//! `SIM_SEED=7 SIM_SEEDS=1 cargo test -p im-e2e --test simulation seeds` replays one; `SIM_SEEDS=500` runs more.
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt;
use im_business::core::calls::execute;
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_business::store::memory::MemoryStore;
use im_business::store::{ScrubAt, Scrubbed, Store, StoreError};
use im_crds::Rebalance;
use im_e2e::history::{ConversationId, Event as Seen, History, MessageId, SessionId, fingerprint};
use im_e2e::wire;
use im_gateway::metrics::Metrics;
use im_gateway::mqtt::{Connect, Packet, Publish, Subscribe, Version};
use im_gateway::session::{Answer, Effects, End, Identity, Session, SessionLimits, Shared};
use im_operator::shards::map::{Ownership, ShardMap};
use im_operator::shards::moves::{Action, Coordinator, Event, Timing};
use im_operator::shards::planner::{Move, Plan, plan};
use im_proto::control::{self, Command, Hello, Report, command, report};
use im_proto::ids::{MemberId, direct_conversation, group_conversation, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Announced, Body, ClientFrame, GroupChange, Role, ServerFrame, body, client_frame, push, server_frame,
};
use im_proto::router::{self, Router};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

const SHARDS: u32 = 16;
const BUSINESS: usize = 3;
const GATEWAYS: usize = 2;
const PEOPLE: usize = 8;
/// Those who have a second device.
const TWO_DEVICES: std::ops::Range<usize> = 1..4;
const GROUP: &str = "team";
/// Virtual time, microseconds.
type Micros = u64;
const MS: Micros = 1_000;
const SECOND: Micros = 1_000 * MS;

/// How much goes wrong.
#[derive(Debug, Clone, Copy)]
struct Weather {
    /// Time under faults; then everything heals.
    storm: Micros,
    /// Mean time between faults.
    fault_every: Micros,
    /// Mean time between messages, all people together.
    send_every: Micros,
}

#[test]
fn seeds_hold_the_invariants() {
    let count = std::env::var("SIM_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(120);
    let first = std::env::var("SIM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let mut totals = (0, 0, 0);
    for seed in first..first + count {
        let weather = Weather { storm: 30 * SECOND, fault_every: 700 * MS, send_every: 20 * MS };
        let world = World::run(seed, weather);
        let report = world.history.check();
        totals = (totals.0 + report.acked, totals.1 + report.received, totals.2 + world.faults);
    }
    println!("{count} seeds: {} messages acknowledged, {} received, {} faults", totals.0, totals.1, totals.2);
    assert!(totals.0 > count * 100, "the storms must not keep everybody from talking: {totals:?}");
}

#[test]
fn calm_weather_loses_and_repeats_nothing() {
    let world = World::run(1, Weather { storm: 20 * SECOND, fault_every: u64::MAX / 4, send_every: 5 * MS });
    let report = world.history.check();
    assert_eq!((report.refused, report.unanswered, report.redelivered), (0, 0, 0), "{report}");
    assert!(report.acked > 3_000, "{report}");
}

#[test]
fn a_seed_replays() {
    let weather = Weather { storm: 10 * SECOND, fault_every: 300 * MS, send_every: 20 * MS };
    let run = |seed| World::run(seed, weather).history.check().to_string();
    assert_eq!(run(5), run(5));
}

// ---- the world ------------------------------------------------------------------------------------------------------------

/// Something that happens at a time.
enum What {
    BusinessTick(usize, u64),
    /// The next commit may start.
    BusinessCommit(usize, u64),
    GatewayTick(usize, u64),
    ControlTick,
    Plan,
    /// Frames of a client of a link reach its owner.
    ToServer(u64, Vec<ClientFrame>),
    /// Frames of an owner reach the client of a link.
    ToClient(u64, Vec<ServerFrame>),
    ServerNotices(u64),
    Dial(Process, usize),
    AskStore(usize, u64, u64, Box<im_business::core::calls::StoreCall>),
    StoreAnswers(usize, u64, u64, Box<Result<im_business::core::calls::StoreAnswer, StoreError>>),
    ToControl(MemberId, Report),
    FromControl(MemberId, Command),
    Restart(Process),
    Resume(usize),
    ResumeGateway(usize, u64),
    /// An owner heard nothing over a link for 3 s, if that gateway is stopped still.
    Silence(u64),
    Ends(Process, u64),
    ControlReturns,
    StoreReturns,
    Fault,
    Send,
    /// A packet of a person reaches his session.
    ToSession(usize, u64, Said),
    /// Bytes of a session reach the person.
    ToPerson(usize, u64, bytes::Bytes),
    Connect(usize),
    ConnectionEnds(usize, u64),
    /// A person's network breaks, or he waits for his gateway no longer.
    PersonLeaves(usize, u64),
    /// A gateway learns that a connection broke.
    ConnectionBroke(u64),
}

/// What a person says on a connection.
#[derive(Clone, Debug)]
enum Said {
    Subscribe,
    Publish { packet_id: u16, topic: String, id: String, payload: String, again: bool },
    Ack(u16),
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Process {
    Business(usize),
    Gateway(usize),
}

struct Business {
    id: MemberId,
    core: Option<Core>,
    boot: u64,
    paused: bool,
    backlog: Vec<Input>,
    members: Vec<MemberId>,
}

struct Gateway {
    id: MemberId,
    alive: bool,
    boot: u64,
    router: Router<Token>,
    shared: Arc<Shared>,
    sessions: BTreeMap<u64, Session>,
    members: Vec<MemberId>,
    version: (u64, u64),
    ticks: u64,
    paused: bool,
    /// What a stopped gateway will find when it goes on.
    backlog: Vec<What>,
}

#[derive(Debug, Clone, Copy)]
enum Token {
    Session(u64, u32),
    Nobody,
    CreateGroup,
    ChangeGroup,
}

/// A person at one of his devices.
struct Person {
    name: String,
    device: &'static str,
    version: wire::Version,
    session: SessionId,
    gateway: usize,
    connection: Option<u64>,
    connections: u32,
    subscribed: bool,
    next_packet: u16,
    /// Said and not answered: sent again after a reconnect, with the same id.
    unanswered: Vec<(u16, MessageId, ConversationId, String, String)>,
    /// MQTT 3.1.1: packet ids whose PUBACK will mean that they were refused.
    refused: Vec<u16>,
    arrivals: [Micros; 2],
    incoming: BytesMut,
}

/// A link between two processes; frames of each direction arrive in order or not at all.
struct Pipe {
    client: (Process, u64),
    server: (usize, u64),
    open: bool,
    arrivals: [Micros; 2],
}

struct World {
    rng: StdRng,
    now: Micros,
    queue: BTreeMap<(Micros, u64), What>,
    counter: u64,
    weather: Weather,
    store: MemoryStore,
    store_away: bool,
    /// While it is away it does half of what it is asked, and nobody hears of it.
    store_silent: bool,
    business: Vec<Business>,
    gateways: Vec<Gateway>,
    people: Vec<Person>,
    pipes: BTreeMap<u64, Pipe>,
    coordinator: Option<Coordinator>,
    kept_map: ShardMap,
    history: History,
    team: ConversationId,
    messages: u64,
    faults: u64,
    group_created: bool,
    /// Who joins or leaves the group just now; asked again of another gateway when one dies.
    change: Option<Change>,
    members: [bool; PEOPLE],
    changes: u64,
}

/// A change of the group under way.
struct Change {
    person: usize,
    joins: bool,
    /// The gateway and its boot that was asked.
    asked: Option<(usize, u64)>,
}

impl World {
    fn run(seed: u64, weather: Weather) -> Self {
        let mut history = History::new();
        let team = history.group(GROUP);
        let devices = (0..PEOPLE).map(|i| (i, "phone")).chain(TWO_DEVICES.map(|i| (i, "laptop")));
        let people = devices.map(|(i, device)| {
            let name = format!("p{i}");
            let session = history.session(&name, device);
            let is_old = i % 4 == 3 && device == "phone";
            Person {
                name,
                device,
                version: if is_old { wire::Version::V311 } else { wire::Version::V5 },
                session,
                gateway: i % GATEWAYS,
                connection: None,
                connections: 0,
                subscribed: false,
                next_packet: 1,
                unanswered: Vec::new(),
                refused: Vec::new(),
                arrivals: [0; 2],
                incoming: BytesMut::new(),
            }
        });
        let mut world = Self {
            people: people.collect(),
            rng: StdRng::seed_from_u64(seed),
            now: 0,
            queue: BTreeMap::new(),
            counter: 0,
            weather,
            store: MemoryStore::default(),
            store_away: false,
            store_silent: false,
            business: Vec::new(),
            gateways: Vec::new(),
            pipes: BTreeMap::new(),
            coordinator: None,
            kept_map: ShardMap::new(SHARDS),
            history,
            team,
            messages: 0,
            faults: 0,
            group_created: false,
            change: None,
            members: [true; PEOPLE],
            changes: 0,
        };
        for i in 0..PEOPLE {
            let user = world.history.user(&format!("p{i}"));
            world.history.record(Duration::ZERO, Seen::Joined { group: team, user, seq: Some(0) });
        }
        world.at(0, What::ControlReturns);
        for i in 0..BUSINESS {
            let id = world.member_id(&format!("business-{i}"));
            world.business.push(Business {
                id,
                core: None,
                boot: 0,
                paused: false,
                backlog: Vec::new(),
                members: Vec::new(),
            });
            world.at(1, What::Restart(Process::Business(i)));
        }
        for i in 0..GATEWAYS {
            let id = world.member_id(&format!("gateway-{i}"));
            world.gateways.push(Gateway {
                id,
                alive: false,
                boot: 0,
                router: Router::new(0, router::Limits::default()),
                shared: shared(0),
                sessions: BTreeMap::new(),
                members: Vec::new(),
                version: (0, 0),
                ticks: 0,
                paused: false,
                backlog: Vec::new(),
            });
            world.at(1, What::Restart(Process::Gateway(i)));
        }
        for i in 0..world.people.len() {
            world.at(4 * SECOND, What::Connect(i));
        }
        let start = 7 * SECOND;
        world.at(start, What::Send);
        world.at(start, What::Fault);
        let (storm_ends, end) = (start + weather.storm, start + weather.storm + 60 * SECOND);
        while let Some(((at, _), what)) = world.queue.pop_first() {
            world.now = at;
            let in_storm = at < storm_ends;
            match what {
                What::Send | What::Fault | What::Plan if !in_storm => {}
                what => world.happen(what),
            }
            if at > end || (at > storm_ends + 20 * SECOND && world.is_quiet()) {
                break;
            }
        }
        world.judge(seed);
        world
    }

    fn is_quiet(&self) -> bool {
        self.counter.is_multiple_of(512)
            && self.people.iter().all(|person| person.subscribed && person.unanswered.is_empty())
            && {
                let report = self.history.check();
                report.is_settled()
            }
    }

    fn judge(&self, seed: u64) {
        let report = self.history.check();
        let state = |person: &Person| {
            let session = person.connection.and_then(|connection| {
                let (i, gateway) =
                    self.gateways.iter().enumerate().find(|(_, gateway)| gateway.sessions.contains_key(&connection))?;
                Some(format!("on {} {:?}", gateway.id, self.gateways[i].sessions[&connection]))
            });
            let (name, device, unanswered) = (&person.name, person.device, person.unanswered.len());
            format!(
                "{name}/{device}: connection {:?}, subscribed {}, unanswered {unanswered}, {session:?}",
                person.connection, person.subscribed
            )
        };
        let problem = |what: &str| {
            let people: Vec<String> = self.people.iter().map(state).collect();
            let routers: Vec<String> =
                self.gateways.iter().map(|gateway| format!("{}: {:?}", gateway.id, gateway.router)).collect();
            let cores = self.business.iter().filter_map(|member| member.core.as_ref());
            let slots: Vec<String> = cores
                .flat_map(|core| {
                    (0..SHARDS).map(move |shard| format!("{} shard {shard}: {}", core.me(), core.describe(shard)))
                })
                .collect();
            let now = Duration::from_micros(self.now);
            let control = self.coordinator.as_ref().map(|coordinator| coordinator.snapshot(now));
            let violations = &report.violations;
            let (people, routers, slots) = (people.join("\n"), routers.join("\n"), slots.join("\n"));
            panic!("SIM_SEED={seed}: {what}\n{report}\n{violations:#?}\n{people}\n{routers}\n{slots}\n{control:?}")
        };
        if !report.is_clean() {
            problem("an invariant is violated");
        }
        if !report.is_settled() {
            problem("not all was answered and delivered in the end");
        }
        let mut owners = BTreeMap::new();
        for member in &self.business {
            let Some(core) = &member.core else { problem("a member is down") };
            if core.stats().holes > 0 {
                problem("an owner found a hole");
            }
            for (shard, epoch) in core.held() {
                if let Some(other) = owners.insert(shard, (member.id.clone(), epoch)) {
                    problem(&format!("shard {shard} has two owners in the end: {other:?}, {}", member.id));
                }
            }
        }
        if owners.len() != SHARDS as usize {
            problem(&format!("only {} shards have an owner in the end", owners.len()));
        }
        for shard in 0..SHARDS {
            let scrubbed = self.store.scrub(shard, ScrubAt::default(), u32::MAX).now_or_never();
            let scrubbed = scrubbed.expect("memory answers at once").expect("memory does not fail");
            if scrubbed != Scrubbed::default() {
                problem(&format!("the store has holes, or more than one reading of it shows: {scrubbed:?}"));
            }
        }
    }

    // ---- time and chance ---------------------------------------------------------------------------------------------------

    fn at(&mut self, at: Micros, what: What) {
        self.counter += 1;
        self.queue.insert((at.max(self.now), self.counter), what);
    }

    fn after(&mut self, delay: Micros, what: What) {
        self.at(self.now + delay, what);
    }

    fn latency(&mut self) -> Micros {
        match self.rng.random_range(0..100) {
            0 => self.rng.random_range(10 * MS..400 * MS),
            1..5 => self.rng.random_range(2 * MS..20 * MS),
            _ => self.rng.random_range(100..2 * MS),
        }
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.weather.fault_every < u64::MAX / 8 && self.rng.random_range(0..one_in) == 0
    }

    fn member_id(&mut self, name: &str) -> MemberId {
        MemberId::new(name, self.rng.random()).expect("a good name")
    }

    fn time(&self) -> Now {
        Now { mono: Duration::from_micros(self.now), wall_ms: 1_700_000_000_000 + (self.now / MS) as i64 }
    }

    fn now_ms(&self) -> u64 {
        self.now / MS
    }

    // ---- what happens ------------------------------------------------------------------------------------------------------

    fn happen(&mut self, what: What) {
        if let Ok(traced) = std::env::var("SIM_TRACE") {
            self.trace(&traced, &what);
        }
        if let Some(i) = self.gateway_of(&what)
            && self.gateways[i].paused
        {
            return self.gateways[i].backlog.push(what);
        }
        match what {
            What::BusinessTick(i, boot) if self.business[i].boot == boot && self.business[i].core.is_some() => {
                self.after(50 * MS, What::BusinessTick(i, boot));
                if self.rng.random_range(0..20) == 0 && !self.business[i].paused {
                    self.dial_members(Process::Business(i), &self.business[i].members.clone());
                }
                self.feed(i, Input::Tick);
            }
            What::GatewayTick(i, boot) if self.gateways[i].boot == boot && self.gateways[i].alive => {
                self.after(250 * MS, What::GatewayTick(i, boot));
                self.gateway_tick(i);
            }
            What::BusinessCommit(i, boot) => {
                let now = self.time();
                let member = &mut self.business[i];
                if member.boot == boot
                    && !member.paused
                    && let Some(core) = &mut member.core
                {
                    core.commit(now);
                    self.carry_out(i);
                }
            }
            What::BusinessTick(..) | What::GatewayTick(..) => {}
            What::ControlTick => {
                if self.coordinator.is_some() {
                    self.after(200 * MS, What::ControlTick);
                    self.tell_coordinator(Event::Tick);
                }
            }
            What::Plan => self.plan(),
            What::ToServer(pipe, frames) => {
                if let Some(i) = self.server_of(pipe) {
                    self.feed(i, Input::Frames { link: LinkId(pipe), frames });
                }
            }
            What::ToClient(pipe, frames) => self.frames_to_client(pipe, frames),
            What::ServerNotices(pipe) => {
                let (i, boot) = self.pipes[&pipe].server;
                if self.business[i].boot == boot {
                    self.feed(i, Input::LinkClosed { link: LinkId(pipe) });
                }
            }
            What::Dial(client, server) => self.dial(client, server),
            What::AskStore(i, boot, call, request) => {
                let me = self.business[i].id.clone();
                let answer = if self.store_away && self.store_silent {
                    if self.rng.random() {
                        let _ = execute(&self.store, &me, *request).now_or_never().expect("memory answers at once");
                    }
                    Err(StoreError::unknown("no answer"))
                } else if self.store_away {
                    Err(StoreError::refused("the store is away"))
                } else if self.business[i].boot != boot {
                    return; // of a process that ended: half of them still arrive
                } else {
                    execute(&self.store, &me, *request).now_or_never().expect("memory answers at once")
                };
                let answer = if self.chance(2_000) { Err(StoreError::unknown("the answer was lost")) } else { answer };
                let delay = self.latency();
                self.after(delay, What::StoreAnswers(i, boot, call, Box::new(answer)));
            }
            What::StoreAnswers(i, boot, call, answer) => {
                if self.business[i].boot == boot {
                    self.feed(i, Input::Answered { call, answer: *answer });
                }
            }
            What::ToControl(member, report) => self.report(member, report),
            What::FromControl(member, command) => self.command(&member, command),
            What::Restart(process) => self.restart(process),
            What::Resume(i) => {
                self.business[i].paused = false;
                for input in std::mem::take(&mut self.business[i].backlog) {
                    self.feed(i, input);
                }
            }
            What::ResumeGateway(i, boot) => {
                if self.gateways[i].boot == boot {
                    self.gateways[i].paused = false;
                    for what in std::mem::take(&mut self.gateways[i].backlog) {
                        self.happen(what);
                    }
                }
            }
            What::Silence(pipe) => {
                if let Process::Gateway(i) = self.pipes[&pipe].client.0
                    && self.gateways[i].paused
                {
                    self.break_pipe(pipe);
                    self.happen(What::ServerNotices(pipe));
                }
            }
            What::Ends(process, boot) => {
                if self.boot_of(process) == Some(boot) {
                    self.crash(process);
                }
            }
            What::ControlReturns => self.control_returns(),
            What::StoreReturns => self.store_away = false,
            What::Fault => {
                let pause = self.rng.random_range(1..2 * self.weather.fault_every.min(u64::MAX / 4));
                self.after(pause, What::Fault);
                if self.weather.fault_every < u64::MAX / 8 {
                    self.fault();
                }
            }
            What::Send => {
                let pause = self.rng.random_range(1..2 * self.weather.send_every);
                self.after(pause, What::Send);
                self.send();
            }
            What::ToSession(person, connection, said) => self.session_hears(person, connection, said),
            What::ToPerson(person, connection, bytes) => self.person_hears(person, connection, &bytes),
            What::Connect(person) => self.connect(person),
            What::ConnectionEnds(person, connection) => self.connection_ends(person, connection),
            What::PersonLeaves(person, connection) => {
                if self.people[person].connection == Some(connection) {
                    self.people[person].gateway = self.rng.random_range(0..GATEWAYS);
                    self.connection_ends(person, connection);
                    self.happen(What::ConnectionBroke(connection));
                }
            }
            What::ConnectionBroke(connection) => {
                let Some(i) = self.gateway_with(connection) else { return };
                let Some(session) = self.gateways[i].sessions.get_mut(&connection) else { return };
                let mut effects = Effects::default();
                session.end(End::Broken, &mut effects);
                self.apply(i, connection, effects);
            }
        }
    }

    /// The gateway to which something happens.
    fn gateway_of(&self, what: &What) -> Option<usize> {
        match what {
            What::GatewayTick(i, boot) if self.gateways[*i].boot == *boot => Some(*i),
            What::Dial(Process::Gateway(i), _) => Some(*i),
            What::ToClient(pipe, _) => match self.pipes.get(pipe)?.client.0 {
                Process::Gateway(i) => Some(i),
                Process::Business(_) => None,
            },
            What::FromControl(member, _) => self.gateways.iter().position(|gateway| gateway.id == *member),
            What::ToSession(_, connection, _) | What::ConnectionBroke(connection) => self.gateway_with(*connection),
            _ => None,
        }
    }

    fn gateway_with(&self, connection: u64) -> Option<usize> {
        (0..GATEWAYS).find(|i| self.gateways[*i].sessions.contains_key(&connection))
    }

    /// Prints what concerns messages whose ids are in `traced`.
    fn trace(&self, traced: &str, what: &What) {
        let concerns = |text: &str| traced.split(',').any(|id| text.contains(id));
        let ms = self.now / MS;
        match what {
            What::ToSession(person, connection, said @ Said::Publish { id, .. }) if concerns(id) => {
                println!("{ms} p{person} on {connection} says {said:?}");
            }
            What::ToPerson(person, connection, bytes) => {
                let mut bytes = BytesMut::from(&bytes[..]);
                while let Ok(Some(packet)) = wire::decode(self.people[*person].version, &mut bytes) {
                    let text = format!("{packet:?}");
                    if concerns(&text) || traced.contains(&format!("p{person}!")) {
                        println!("{ms} p{person} on {connection} hears {text}");
                    }
                }
            }
            What::AskStore(i, boot, call, request) if concerns(&format!("{request:?}")) => {
                println!("{ms} business-{i}.{boot} call {call} {request:?}");
            }
            What::StoreAnswers(i, boot, call, answer) if traced.contains("store") => {
                println!("{ms} business-{i}.{boot} answer {call} {answer:?}");
            }
            What::ToServer(pipe, frames) => {
                for frame in frames {
                    if let Some(client_frame::Frame::Request(request)) = &frame.frame
                        && concerns(&String::from_utf8_lossy(&request.body))
                    {
                        let pipe_of = &self.pipes[pipe];
                        let (id, shard, epoch, again, oldest) =
                            (request.id, request.shard, request.epoch, request.again, request.oldest);
                        println!(
                            "{ms} {:?} -> {:?} request {id} shard {shard} epoch {epoch} again {again} oldest {oldest} open {}",
                            pipe_of.client, pipe_of.server, pipe_of.open
                        );
                    }
                }
            }
            What::ToClient(pipe, frames) => {
                for frame in frames {
                    let text = format!("{frame:?}");
                    if concerns(&text) {
                        let pipe = &self.pipes[pipe];
                        println!("{ms} {:?} <- {:?} open {}: {text}", pipe.client, pipe.server, pipe.open);
                    }
                }
            }
            What::FromControl(member, command) if concerns(&format!("{:?}", command.command)) => {
                println!("{ms} control tells {member} {:?}", command.command)
            }
            What::ToControl(member, report) if concerns(&format!("{report:?}")) => {
                println!("{ms} {member} reports {report:?}")
            }
            What::Restart(process) => println!("{ms} {process:?} restarts"),
            What::ControlReturns | What::StoreReturns | What::Resume(_) => println!("{ms} something returns"),
            _ => {}
        }
    }

    fn fault(&mut self) {
        self.faults += 1;
        let member = self.rng.random_range(0..BUSINESS);
        match self.rng.random_range(0..16) {
            12 => self.begin_change(),
            13 | 14 => self.pause_gateway(),
            15 => {
                // It was told to end, and is given some time for it.
                self.feed(member, Input::ReleaseAll);
                let pause = self.rng.random_range(10 * MS..3 * SECOND);
                self.after(pause, What::Ends(Process::Business(member), self.business[member].boot));
            }
            0..2 => self.crash(Process::Business(member)),
            2 => {
                let gateway = self.rng.random_range(0..GATEWAYS);
                self.crash(Process::Gateway(gateway));
            }
            3 => {
                if self.business[member].core.is_some() && !self.business[member].paused {
                    self.business[member].paused = true;
                    let pause = self.rng.random_range(500 * MS..8 * SECOND);
                    self.after(pause, What::Resume(member));
                }
            }
            4..7 => {
                let open: Vec<u64> = self.pipes.iter().filter(|(_, pipe)| pipe.open).map(|(id, _)| *id).collect();
                if !open.is_empty() {
                    let pick = self.rng.random_range(0..open.len());
                    self.break_pipe(open[pick]);
                }
            }
            7 => {
                let person = self.rng.random_range(0..self.people.len());
                if let Some(connection) = self.people[person].connection {
                    self.happen(What::PersonLeaves(person, connection));
                }
            }
            8 => {
                if self.coordinator.take().is_some() {
                    let pause = self.rng.random_range(100 * MS..5 * SECOND);
                    self.after(pause, What::ControlReturns);
                }
            }
            9 => {
                (self.store_away, self.store_silent) = (true, self.rng.random());
                let pause = self.rng.random_range(50 * MS..3 * SECOND);
                self.after(pause, What::StoreReturns);
            }
            _ => self.move_something(),
        }
    }

    /// A gateway is stopped for a while. Some of its people wait for it.
    fn pause_gateway(&mut self) {
        let i = self.rng.random_range(0..GATEWAYS);
        if !self.gateways[i].alive || std::mem::replace(&mut self.gateways[i].paused, true) {
            return;
        }
        let pause = self.rng.random_range(500 * MS..10 * SECOND);
        self.after(pause, What::ResumeGateway(i, self.gateways[i].boot));
        let is_its = |pipe: &Pipe| pipe.open && pipe.client.0 == Process::Gateway(i);
        let pipes: Vec<u64> = self.pipes.iter().filter(|(_, pipe)| is_its(pipe)).map(|(id, _)| *id).collect();
        if pause > 3 * SECOND {
            for pipe in pipes {
                self.after(3 * SECOND, What::Silence(pipe));
            }
        }
        for person in 0..self.people.len() {
            if let Some(connection) = self.people[person].connection.filter(|_| self.people[person].gateway == i)
                && self.rng.random()
            {
                let patience = self.rng.random_range(SECOND..8 * SECOND);
                self.after(patience, What::PersonLeaves(person, connection));
            }
        }
    }

    // ---- business members --------------------------------------------------------------------------------------------------

    fn feed(&mut self, i: usize, input: Input) {
        let now = self.time();
        let member = &mut self.business[i];
        if member.paused {
            // A stopped process; what it would have ticked is lost, what it was sent waits in its sockets.
            if !matches!(input, Input::Tick) {
                member.backlog.push(input);
            }
            return;
        }
        let Some(core) = &mut member.core else { return };
        core.handle(now, input);
        self.carry_out(i);
    }

    /// Does what a member wants done, and calls it again for the commit that waits for its time.
    fn carry_out(&mut self, i: usize) {
        let member = &mut self.business[i];
        let Some(core) = &mut member.core else { return };
        let (outputs, boot) = (core.take_outputs(), member.boot);
        if let Some(at) = core.commit_at() {
            self.at(at.as_micros() as u64, What::BusinessCommit(i, boot));
        }
        for output in outputs {
            match output {
                Output::Frame { link, frame } => self.send_to_client(link.0, frame),
                Output::Call { call, request } => {
                    let delay = self.latency();
                    self.after(delay, What::AskStore(i, boot, call, Box::new(request)));
                }
                Output::Report(report) => {
                    let (id, delay) = (self.business[i].id.clone(), self.latency());
                    self.after(delay, What::ToControl(id, report));
                }
                Output::Peer { to, frame } => self.send_to_server(Process::Business(i), &to, frame),
                Output::Members(members) => {
                    let members: Vec<MemberId> = members.into_iter().map(|(id, _)| id).collect();
                    self.dial_members(Process::Business(i), &members);
                    self.business[i].members = members;
                }
                Output::CloseLink(link) => self.break_pipe(link.0),
            }
        }
    }

    fn crash(&mut self, process: Process) {
        let id = match process {
            Process::Business(i) => {
                let member = &mut self.business[i];
                if member.core.take().is_none() {
                    return;
                }
                member.backlog.clear();
                member.paused = false;
                member.id.clone()
            }
            Process::Gateway(i) => {
                if !std::mem::replace(&mut self.gateways[i].alive, false) {
                    return;
                }
                self.gateways[i].paused = false;
                self.gateways[i].backlog.clear();
                for person in 0..self.people.len() {
                    if self.people[person].gateway == i
                        && let Some(connection) = self.people[person].connection
                    {
                        self.people[person].gateway = self.rng.random_range(0..GATEWAYS);
                        self.connection_ends(person, connection);
                    }
                }
                self.gateways[i].id.clone()
            }
        };
        let ours: Vec<u64> =
            self.pipes.iter().filter(|(_, pipe)| pipe.open && self.ends_at(pipe, process)).map(|(id, _)| *id).collect();
        for pipe in ours {
            self.break_pipe(pipe);
        }
        if self.rng.random() {
            self.tell_coordinator(Event::MemberGone { member: id, confirmed_dead: true });
        }
        let pause = self.rng.random_range(50 * MS..6 * SECOND);
        self.after(pause, What::Restart(process));
    }

    fn ends_at(&self, pipe: &Pipe, process: Process) -> bool {
        pipe.client.0 == process || Process::Business(pipe.server.0) == process
    }

    fn restart(&mut self, process: Process) {
        match process {
            Process::Business(i) => {
                let name = self.business[i].id.name().to_owned();
                let id = self.member_id(&name);
                let now = self.time();
                let member = &mut self.business[i];
                member.id = id.clone();
                member.boot += 1;
                member.members.clear();
                member.core = Some(Core::new(id, Limits { notify_window: 64, ..Limits::default() }, now));
                let boot = member.boot;
                self.after(0, What::BusinessTick(i, boot));
                self.feed(i, Input::ControlUp(Hello { role: control::Role::Business.into(), ..Hello::default() }));
            }
            Process::Gateway(i) => {
                let name = self.gateways[i].id.name().to_owned();
                let id = self.member_id(&name);
                let gateway = &mut self.gateways[i];
                gateway.shared = shared(id.boot());
                gateway.id = id;
                gateway.alive = true;
                gateway.boot += 1;
                gateway.router = Router::new(SHARDS, router::Limits::default());
                gateway.sessions.clear();
                gateway.members.clear();
                gateway.version = (0, 0);
                let boot = gateway.boot;
                self.after(0, What::GatewayTick(i, boot));
                self.gateway_hello(i);
            }
        }
    }

    // ---- links -------------------------------------------------------------------------------------------------------------

    fn dial_members(&mut self, client: Process, members: &[MemberId]) {
        for server in 0..BUSINESS {
            let is_self = client == Process::Business(server);
            if !is_self && members.contains(&self.business[server].id) && self.pipe_to(client, server).is_none() {
                let delay = self.latency();
                self.after(delay, What::Dial(client, server));
            }
        }
    }

    fn boot_of(&self, process: Process) -> Option<u64> {
        match process {
            Process::Business(i) => self.business[i].core.as_ref().map(|_| self.business[i].boot),
            Process::Gateway(i) => self.gateways[i].alive.then_some(self.gateways[i].boot),
        }
    }

    /// The open pipe of two processes.
    fn pipe_to(&self, client: Process, server: usize) -> Option<u64> {
        let boots = (self.boot_of(client)?, self.boot_of(Process::Business(server))?);
        let is_it = |pipe: &Pipe| pipe.open && pipe.client == (client, boots.0) && pipe.server == (server, boots.1);
        self.pipes.iter().find(|(_, pipe)| is_it(pipe)).map(|(id, _)| *id)
    }

    fn dial(&mut self, client: Process, server: usize) {
        let (Some(client_boot), Some(server_boot)) = (self.boot_of(client), self.boot_of(Process::Business(server)))
        else {
            return;
        };
        let known = match client {
            Process::Business(i) => &self.business[i].members,
            Process::Gateway(i) => &self.gateways[i].members,
        };
        let server_id = self.business[server].id.clone();
        if self.pipe_to(client, server).is_some() || !known.contains(&server_id) {
            return;
        }
        self.counter += 1;
        let id = self.counter;
        self.pipes.insert(
            id,
            Pipe { client: (client, client_boot), server: (server, server_boot), open: true, arrivals: [0; 2] },
        );
        let (peer, role) = match client {
            Process::Business(i) => (self.business[i].id.clone(), Role::Business),
            Process::Gateway(i) => (self.gateways[i].id.clone(), Role::Gateway),
        };
        self.feed(server, Input::LinkOpened { link: LinkId(id), peer, role });
        match client {
            Process::Business(i) => self.feed(i, Input::PeerUp(server_id)),
            Process::Gateway(i) => {
                self.gateways[i].router.link_up(&server_id);
                self.pump(i);
            }
        }
    }

    fn break_pipe(&mut self, id: u64) {
        let Some(pipe) = self.pipes.get_mut(&id).filter(|pipe| pipe.open) else { return };
        pipe.open = false;
        let (client, server) = (pipe.client, pipe.server);
        let noticed = self.rng.random_range(0..2_900 * MS);
        self.after(noticed, What::ServerNotices(id));
        let server_id = self.business[server.0].id.clone();
        if self.boot_of(client.0) == Some(client.1) {
            match client.0 {
                Process::Business(i) => self.feed(i, Input::PeerDown(server_id)),
                Process::Gateway(i) => self.gateways[i].router.link_down(&server_id),
            }
            let pause = self.rng.random_range(20 * MS..800 * MS);
            self.after(pause, What::Dial(client.0, server.0));
        }
    }

    fn arrival(&mut self, id: u64, direction: usize) -> Option<Micros> {
        let latency = self.latency();
        let pipe = self.pipes.get_mut(&id).filter(|pipe| pipe.open)?;
        pipe.arrivals[direction] = (self.now + latency).max(pipe.arrivals[direction]);
        Some(pipe.arrivals[direction])
    }

    fn send_to_server(&mut self, client: Process, to: &MemberId, frame: ClientFrame) {
        let Some(server) = self.business.iter().position(|member| member.id == *to) else { return };
        let Some(pipe) = self.pipe_to(client, server) else { return };
        if let Some(at) = self.arrival(pipe, 0) {
            self.at(at, What::ToServer(pipe, vec![frame]));
        }
    }

    fn send_to_client(&mut self, pipe: u64, frame: ServerFrame) {
        if let Some(at) = self.arrival(pipe, 1) {
            self.at(at, What::ToClient(pipe, vec![frame]));
        }
    }

    fn server_of(&self, pipe: u64) -> Option<usize> {
        let pipe = self.pipes.get(&pipe).filter(|pipe| pipe.open)?;
        (self.boot_of(Process::Business(pipe.server.0)) == Some(pipe.server.1)).then_some(pipe.server.0)
    }

    fn frames_to_client(&mut self, id: u64, frames: Vec<ServerFrame>) {
        let Some(pipe) = self.pipes.get(&id).filter(|pipe| pipe.open) else { return };
        let (client, server) = (pipe.client, pipe.server.0);
        let peer = self.business[server].id.clone();
        match client.0 {
            Process::Business(i) => self.feed(i, Input::PeerFrames { peer, frames }),
            Process::Gateway(i) => self.gateway_frames(i, &peer, frames),
        }
    }

    // ---- gateways ----------------------------------------------------------------------------------------------------------

    fn gateway_hello(&mut self, i: usize) {
        let id = self.gateways[i].id.clone();
        let hello = Hello { member: id.to_string(), role: control::Role::Gateway.into(), ..Hello::default() };
        let delay = self.latency();
        self.after(delay, What::ToControl(id, Report { report: Some(report::Report::Hello(hello)) }));
    }

    fn gateway_frames(&mut self, i: usize, peer: &MemberId, frames: Vec<ServerFrame>) {
        let mut took = None;
        for frame in frames {
            let router = &mut self.gateways[i].router;
            match frame.frame {
                Some(server_frame::Frame::Owned(owned)) => router.owned(peer, &owned),
                Some(server_frame::Frame::Moved(moved)) => router.moved(&moved),
                Some(server_frame::Frame::Reply(reply)) => router.reply(reply),
                Some(server_frame::Frame::Push(pushed)) => {
                    took = Some(pushed.id);
                    self.pushed(i, pushed.push);
                }
                _ => {}
            }
            self.pump(i);
        }
        if let Some(took) = took {
            self.send_to_server(
                Process::Gateway(i),
                peer,
                ClientFrame { frame: Some(client_frame::Frame::Took(took)) },
            );
        }
    }

    fn pushed(&mut self, i: usize, pushed: Option<push::Push>) {
        let now_ms = self.now_ms();
        let connections: Vec<u64> = self.gateways[i].sessions.keys().copied().collect();
        for connection in connections {
            let Some(session) = self.gateways[i].sessions.get_mut(&connection) else { continue };
            let mut effects = Effects::default();
            match &pushed {
                Some(push::Push::Deliver(deliver)) => {
                    let user = session.user().clone();
                    for recipient in deliver.recipients.iter().filter(|recipient| *recipient.user == *user) {
                        session.on_deliver(now_ms, deliver, recipient, &mut effects);
                    }
                }
                Some(push::Push::Kick(kick)) if *kick.user == **session.user() => session.on_kick(kick, &mut effects),
                Some(push::Push::ReadState(state)) if *state.user == **session.user() => {
                    session.on_read_state(&state.conversation, &state.reader, state.seq);
                }
                _ => {}
            }
            self.apply(i, connection, effects);
        }
    }

    /// Carries out what a session wants, and writes what it has to say.
    fn apply(&mut self, i: usize, connection: u64, effects: Effects) {
        let now_ms = self.now_ms();
        let gateway = &mut self.gateways[i];
        let mut more = Effects::default();
        for request in effects.cancel {
            gateway.router.cancel(request);
        }
        for request in effects.requests {
            let token = request.ticket.map_or(Token::Nobody, |ticket| Token::Session(connection, ticket));
            let outcome = gateway.router.request(request.shard, request.order, request.body, token);
            let Some(session) = gateway.sessions.get_mut(&connection) else { continue };
            match (outcome, request.ticket) {
                (Ok(id), Some(ticket)) => session.routed(ticket, id),
                (Err(_), Some(ticket)) => session.on_answer(now_ms, ticket, Answer::Full, &mut more),
                _ => {}
            }
        }
        self.write_out(i, connection);
        if !more.is_empty() {
            self.apply(i, connection, more);
        }
        self.pump(i);
    }

    fn write_out(&mut self, i: usize, connection: u64) {
        let now_ms = self.now_ms();
        let Some(session) = self.gateways[i].sessions.get_mut(&connection) else { return };
        let Some(person) = self.people.iter().position(|person| person.connection == Some(connection)) else {
            session.take_output();
            return;
        };
        if session.has_output() {
            let bytes = session.take_output().take_bytes();
            let mut effects = Effects::default();
            session.on_written(now_ms, &mut effects);
            self.record_refusals(person, &bytes);
            let at = self.person_arrival(person, 1);
            self.at(at, What::ToPerson(person, connection, bytes));
            self.apply(i, connection, effects);
        }
        if self.gateways[i].sessions.get(&connection).is_some_and(Session::is_ended) {
            let at = self.person_arrival(person, 1);
            self.at(at, What::ConnectionEnds(person, connection));
        }
    }

    /// A refusal counts from when it is said: the connection may end before it is heard.
    fn record_refusals(&mut self, person: usize, bytes: &[u8]) {
        let mut bytes = BytesMut::from(bytes);
        while let Ok(Some(packet)) = wire::decode(self.people[person].version, &mut bytes) {
            let refused = match &packet {
                wire::Packet::PubAck { packet_id, code: 0x80.., .. } => Some(*packet_id),
                wire::Packet::Publish { topic, payload, .. } if topic == "inbox/refused" => refused_packet(payload),
                _ => None,
            };
            let unanswered = &self.people[person].unanswered;
            if let Some((_, id, ..)) = unanswered.iter().find(|(packet_id, ..)| Some(*packet_id) == refused) {
                self.history.record(Duration::from_micros(self.now), Seen::Refused { id: *id });
            }
        }
    }

    fn pump(&mut self, i: usize) {
        let now_ms = self.now_ms();
        for output in self.gateways[i].router.take_outputs() {
            match output {
                router::Output::Send(to, request) => {
                    self.send_to_server(
                        Process::Gateway(i),
                        &to,
                        ClientFrame { frame: Some(client_frame::Frame::Request(request.into())) },
                    );
                }
                router::Output::Done(Token::Session(connection, ticket), outcome) => {
                    self.answer(i, connection, ticket, Answer::Outcome(outcome));
                }
                router::Output::Done(Token::CreateGroup, outcome) => {
                    self.group_created |= matches!(outcome, Outcome::Group(_))
                }
                router::Output::Done(Token::ChangeGroup, outcome) => self.change_answered(&outcome),
                router::Output::Done(..) => {}
                router::Output::Ready { shard, .. } => {
                    let connections: Vec<u64> = self.gateways[i].sessions.keys().copied().collect();
                    for connection in connections {
                        let session = self.gateways[i].sessions.get_mut(&connection);
                        if let Some(session) = session.filter(|session| shard_of(session.user(), SHARDS) == shard) {
                            let mut effects = Effects::default();
                            session.announce(now_ms, &mut effects);
                            self.apply(i, connection, effects);
                        }
                    }
                    let body = Body { body: Some(body::Body::Announced(Announced {})) };
                    let _ = self.gateways[i].router.request(shard, 0, body, Token::Nobody);
                    self.pump(i);
                }
            }
        }
    }

    fn answer(&mut self, i: usize, connection: u64, ticket: u32, answer: Answer) {
        let now_ms = self.now_ms();
        if let Some(session) = self.gateways[i].sessions.get_mut(&connection) {
            let mut effects = Effects::default();
            session.on_answer(now_ms, ticket, answer, &mut effects);
            self.apply(i, connection, effects);
        }
    }

    fn gateway_tick(&mut self, i: usize) {
        let now_ms = self.now_ms();
        self.gateways[i].ticks += 1;
        if self.gateways[i].ticks.is_multiple_of(4) {
            for server in 0..BUSINESS {
                let (to, ping) = (self.business[server].id.clone(), client_frame::Frame::Ping(self.gateways[i].ticks));
                self.send_to_server(Process::Gateway(i), &to, ClientFrame { frame: Some(ping) });
            }
        }
        self.dial_members(Process::Gateway(i), &self.gateways[i].members.clone());
        let connections: Vec<u64> = self.gateways[i].sessions.keys().copied().collect();
        for connection in connections {
            let Some(session) = self.gateways[i].sessions.get_mut(&connection) else { continue };
            let mut effects = Effects::default();
            session.on_tick(now_ms, &mut effects);
            self.apply(i, connection, effects);
        }
        self.ask_for_change(i);
        if !self.group_created && self.gateways[i].router.ready().count() == SHARDS as usize {
            let conversation = group_conversation(GROUP);
            let add = self.people.iter().take(PEOPLE).map(|person| person.name.clone()).collect();
            let change =
                GroupChange { conversation, create: true, add, key: "create".into(), ..GroupChange::default() };
            let shard = shard_of(&change.conversation, SHARDS);
            let body = Body { body: Some(body::Body::GroupChange(change)) };
            let _ = self.gateways[i].router.request(shard, 0, body, Token::CreateGroup);
        }
        self.pump(i);
    }

    /// Somebody leaves the group, or comes back.
    fn begin_change(&mut self) {
        if !self.group_created || self.change.is_some() {
            return;
        }
        let person = self.rng.random_range(0..PEOPLE);
        let joins = !self.members[person];
        if !joins {
            // From here on he may miss what is said, and may still hear it.
            let user = self.history.user(&self.people[person].name);
            self.history.record(Duration::from_micros(self.now), Seen::Left { group: self.team, user, seq: None });
        }
        self.changes += 1;
        self.change = Some(Change { person, joins, asked: None });
    }

    fn ask_for_change(&mut self, i: usize) {
        let boots: Vec<Option<u64>> = (0..GATEWAYS).map(|i| self.boot_of(Process::Gateway(i))).collect();
        let Some(change) = &mut self.change else { return };
        let is_asked = change.asked.is_some_and(|(gateway, boot)| boots[gateway] == Some(boot));
        let Some(boot) = boots[i].filter(|_| !is_asked) else { return };
        let name = vec![self.people[change.person].name.clone()];
        let (add, remove) = if change.joins { (name, Vec::new()) } else { (Vec::new(), name) };
        let conversation = group_conversation(GROUP);
        let shard = shard_of(&conversation, SHARDS);
        let key = format!("change {}", self.changes);
        let body = body::Body::GroupChange(GroupChange { conversation, add, remove, key, ..GroupChange::default() });
        if self.gateways[i].router.request(shard, 0, Body { body: Some(body) }, Token::ChangeGroup).is_ok() {
            change.asked = Some((i, boot));
        }
    }

    fn change_answered(&mut self, outcome: &Outcome) {
        let Some(Change { person, joins, .. }) = self.change else { return };
        let Outcome::Group(info) = outcome else {
            // Not now: asked again.
            self.change = self.change.take().map(|change| Change { asked: None, ..change });
            return;
        };
        let name = &self.people[person].name;
        let member = info.members.iter().find(|member| member.user == *name);
        if let Some(member) = member.filter(|_| joins) {
            let user = self.history.user(name);
            let joined = Seen::Joined { group: self.team, user, seq: Some(member.from_seq) };
            self.history.record(Duration::from_micros(self.now), joined);
        }
        self.members[person] = joins;
        self.change = None;
    }

    // ---- control -----------------------------------------------------------------------------------------------------------

    fn control_returns(&mut self) {
        let now = Duration::from_micros(self.now);
        self.coordinator = Some(Coordinator::new(Timing::default(), Rebalance::default(), self.kept_map.clone(), now));
        self.after(0, What::ControlTick);
        self.after(4 * SECOND, What::Plan);
        for i in 0..self.business.len() {
            self.feed(i, Input::ControlUp(Hello { role: control::Role::Business.into(), ..Hello::default() }));
        }
        for i in 0..self.gateways.len() {
            if self.gateways[i].alive {
                self.gateway_hello(i);
            }
        }
    }

    fn report(&mut self, member: MemberId, report: Report) {
        match report.report {
            Some(report::Report::Hello(hello)) if hello.role() == control::Role::Business => {
                self.tell_coordinator(Event::MemberJoined { member });
                self.publish_map();
            }
            Some(report::Report::Hello(_)) => self.publish_map(),
            Some(report::Report::Heartbeat(heartbeat)) => {
                let held = heartbeat.held.iter().map(|held| (held.shard, held.epoch)).collect();
                let loads = heartbeat.loads.iter().map(|load| (load.shard, load.per_second)).collect();
                let (store_ok, term) = (heartbeat.store_ok, heartbeat.term);
                self.tell_coordinator(Event::Heartbeat { member, held, loads, store_ok, term });
            }
            Some(report::Report::Acquired(acquired)) => {
                for shard in acquired.shards {
                    self.tell_coordinator(Event::Acquired {
                        shard: shard.shard,
                        epoch: shard.epoch,
                        by: member.clone(),
                    });
                }
            }
            Some(report::Report::Released(released)) => {
                for shard in released.shards {
                    self.tell_coordinator(Event::Released {
                        shard: shard.shard,
                        epoch: shard.epoch,
                        by: member.clone(),
                    });
                }
            }
            Some(report::Report::AcquireLost(lost)) => {
                for row in lost.rows {
                    let row_found = Ownership { epoch: row.epoch, owner: MemberId::parse(&row.owner).ok() };
                    self.tell_coordinator(Event::AcquireLost { shard: row.shard, row: row_found, by: member.clone() });
                }
            }
            None => {}
        }
    }

    fn tell_coordinator(&mut self, event: Event) {
        let now = Duration::from_micros(self.now);
        let Some(coordinator) = &mut self.coordinator else { return };
        let actions = coordinator.handle(now, event);
        let term = coordinator.version().term;
        let row = |expected: &Ownership, shard| control::ShardRow {
            shard,
            epoch: expected.epoch,
            owner: expected.owner.as_ref().map_or_else(String::new, ToString::to_string),
        };
        for action in actions {
            let (to, command) = match action {
                Action::Release { by, shard, epoch, to } => {
                    (by, command::Command::Release(control::Release { shard, epoch, to: to.to_string() }))
                }
                Action::CancelRelease { by, shard, epoch } => {
                    (by, command::Command::CancelRelease(control::CancelRelease { shard, epoch }))
                }
                Action::Acquire { by, shard, expected } => {
                    let expected = vec![row(&expected, shard)];
                    (by, command::Command::Acquire(control::Acquire { expected }))
                }
                Action::MapChanged => {
                    self.publish_map();
                    continue;
                }
                Action::Outranked { term } => {
                    if let Some(coordinator) = &mut self.coordinator {
                        coordinator.begin_term(term);
                    }
                    continue;
                }
            };
            if self.chance(100) {
                continue; // lost
            }
            let delay = self.latency();
            self.after(delay, What::FromControl(to, Command { term, command: Some(command) }));
        }
    }

    fn publish_map(&mut self) {
        let Some(coordinator) = &self.coordinator else { return };
        self.kept_map = coordinator.map().clone();
        let mut members = Vec::new();
        let mut push = |id: &MemberId, role: control::Role| {
            members.push(control::Member { member: id.to_string(), role: role.into(), link_address: String::new() });
        };
        self.business
            .iter()
            .filter(|member| member.core.is_some())
            .for_each(|member| push(&member.id, control::Role::Business));
        self.gateways
            .iter()
            .filter(|gateway| gateway.alive)
            .for_each(|gateway| push(&gateway.id, control::Role::Gateway));
        let index = |owner: &MemberId| {
            members.iter().position(|member| member.member == owner.as_str()).map_or(0, |i| i as u32 + 1)
        };
        let rows = coordinator.map().rows();
        let map = control::Map {
            number: coordinator.version().number,
            shards: SHARDS,
            owners: rows.iter().map(|row| row.owner.as_ref().map_or(0, &index)).collect(),
            epochs: rows.iter().map(|row| row.epoch).collect(),
            members,
        };
        let command = Command { term: coordinator.version().term, command: Some(command::Command::Map(map)) };
        let everybody: Vec<MemberId> = self
            .business
            .iter()
            .map(|member| member.id.clone())
            .chain(self.gateways.iter().map(|gateway| gateway.id.clone()))
            .collect();
        for member in everybody {
            let delay = self.latency();
            self.after(delay, What::FromControl(member, command.clone()));
        }
    }

    fn command(&mut self, member: &MemberId, command: Command) {
        if let Some(i) = self.business.iter().position(|business| business.id == *member) {
            return self.feed(i, Input::Command(command));
        }
        let Some(i) = self.gateways.iter().position(|gateway| gateway.id == *member && gateway.alive) else { return };
        if let Some(command::Command::Map(map)) = command.command {
            if (command.term, map.number) < self.gateways[i].version {
                return;
            }
            self.gateways[i].version = (command.term, map.number);
            let business: BTreeMap<String, MemberId> =
                self.business.iter().map(|member| (member.id.to_string(), member.id.clone())).collect();
            let listed: Vec<Option<&MemberId>> =
                map.members.iter().map(|member| business.get(&member.member)).collect();
            for (shard, (owner, epoch)) in map.owners.iter().zip(&map.epochs).enumerate() {
                if let Some(Some(owner)) = (*owner as usize).checked_sub(1).and_then(|index| listed.get(index)) {
                    self.gateways[i].router.claim(shard as u32, *epoch, owner);
                }
            }
            let members: Vec<MemberId> = listed.into_iter().flatten().cloned().collect();
            self.dial_members(Process::Gateway(i), &members);
            self.gateways[i].members = members;
            self.pump(i);
        }
    }

    fn plan(&mut self) {
        let now = Duration::from_micros(self.now);
        let Some(coordinator) = &self.coordinator else { return };
        if let Some(input) = coordinator.plan_input(now) {
            let proposed = plan(&input);
            let hash = proposed.hash();
            if let Ok(committed) = proposed.approve(hash).and_then(|approved| approved.commit(coordinator.map())) {
                self.tell_coordinator(Event::NewPlan(committed));
            }
        }
        self.after(SECOND, What::Plan);
    }

    /// A planned move of a random shard, whatever the loads say.
    fn move_something(&mut self) {
        let shard = self.rng.random_range(0..SHARDS);
        let to = self.business[self.rng.random_range(0..BUSINESS)].id.clone();
        let Some(coordinator) = &self.coordinator else { return };
        let Some(row) = coordinator.map().get(shard) else { return };
        if row.owner.as_ref() == Some(&to) {
            return;
        }
        let proposed = Plan::new(vec![Move { shard, epoch: row.epoch, from: row.owner.clone(), to }]);
        let hash = proposed.hash();
        if let Ok(committed) = proposed.approve(hash).and_then(|approved| approved.commit(coordinator.map())) {
            self.tell_coordinator(Event::NewPlan(committed));
        }
    }

    // ---- people ------------------------------------------------------------------------------------------------------------

    fn person_arrival(&mut self, person: usize, direction: usize) -> Micros {
        let latency = self.latency();
        let arrivals = &mut self.people[person].arrivals;
        arrivals[direction] = (self.now + latency).max(arrivals[direction]);
        arrivals[direction]
    }

    fn say(&mut self, person: usize, said: Said) {
        if let Some(connection) = self.people[person].connection {
            let at = self.person_arrival(person, 0);
            self.at(at, What::ToSession(person, connection, said));
        }
    }

    fn connect(&mut self, person: usize) {
        let now_ms = self.now_ms();
        if self.people[person].connection.is_some() {
            return;
        }
        let i = self.people[person].gateway;
        if !self.gateways[i].alive || self.gateways[i].paused || self.gateways[i].router.ready().count() == 0 {
            self.people[person].gateway = self.rng.random_range(0..GATEWAYS);
            return self.after(200 * MS, What::Connect(person));
        }
        self.counter += 1;
        let connection = self.counter;
        let name = self.people[person].name.clone();
        let is_v5 = self.people[person].version == wire::Version::V5;
        let connect = Connect {
            version: if is_v5 { Version::V5 } else { Version::V311 },
            clean_start: false,
            keep_alive_s: 0,
            session_expiry_s: is_v5.then_some(3_600),
            receive_maximum: 8,
            packet_size_max: None,
            problem_information: true,
            client_id: self.people[person].device,
            will: None,
            username: Some(&name),
            password: None,
        };
        let mut effects = Effects::default();
        let admit = |_: &str, _: Option<&[u8]>| Ok(Identity { expires_at_ms: None });
        let shared = self.gateways[i].shared.clone();
        let session =
            Session::open(&shared, SHARDS, now_ms, connection, &connect, admit, &mut effects).expect("a good CONNECT");
        self.gateways[i].sessions.insert(connection, session);
        let state = &mut self.people[person];
        state.connection = Some(connection);
        state.subscribed = false;
        state.arrivals = [self.now; 2];
        state.incoming.clear();
        state.refused.clear();
        self.apply(i, connection, effects);
    }

    fn connection_ends(&mut self, person: usize, connection: u64) {
        if self.people[person].connection != Some(connection) {
            return;
        }
        let state = &mut self.people[person];
        state.connection = None;
        if state.subscribed {
            state.subscribed = false;
            self.history.record(Duration::from_micros(self.now), Seen::Disconnected { session: state.session });
        }
        let pause = self.rng.random_range(10 * MS..1_500 * MS);
        self.after(pause, What::Connect(person));
    }

    fn send(&mut self) {
        let person = self.rng.random_range(0..self.people.len());
        if !self.people[person].subscribed || self.people[person].unanswered.len() >= 16 {
            return;
        }
        self.messages += 1;
        let id = MessageId(self.messages);
        let name = self.people[person].name.clone();
        let (topic, conversation) = if self.group_created && self.rng.random_range(0..4) == 0 {
            (format!("g/{GROUP}"), self.team)
        } else {
            let peer = format!("p{}", self.rng.random_range(0..PEOPLE));
            debug_assert!(!direct_conversation(&name, &peer).is_empty());
            let (one, other) = (self.history.user(&name), self.history.user(&peer));
            (format!("u/{peer}"), self.history.pair(one, other))
        };
        // MQTT 3.1.1 has no other place for the id.
        let payload = format!("{id} of {name}");
        let state = &mut self.people[person];
        let packet_id = state.next_packet;
        state.next_packet = state.next_packet % 60_000 + 1;
        state.unanswered.push((packet_id, id, conversation, topic.clone(), payload.clone()));
        self.sent(person, id, conversation, &payload);
        self.say(person, Said::Publish { packet_id, topic, id: id.to_string(), payload, again: false });
    }

    fn sent(&mut self, person: usize, id: MessageId, conversation: ConversationId, payload: &str) {
        let state = &self.people[person];
        let scheduled = Duration::from_micros(self.now);
        let sent = Seen::Sent {
            id,
            session: state.session,
            connection: state.connections,
            conversation,
            payload: fingerprint(payload.as_bytes()),
            idempotent: state.version == wire::Version::V5,
            scheduled,
        };
        self.history.record(scheduled, sent);
    }

    fn session_hears(&mut self, person: usize, connection: u64, said: Said) {
        let now_ms = self.now_ms();
        if self.people[person].connection != Some(connection) {
            return;
        }
        let Some(i) = self.gateway_with(connection) else { return };
        let Some(session) = self.gateways[i].sessions.get_mut(&connection) else { return };
        if !session.wants_input() {
            if !session.is_ended() {
                let at = self.people[person].arrivals[0].max(self.now + MS);
                self.people[person].arrivals[0] = at;
                self.at(at, What::ToSession(person, connection, said));
            }
            return;
        }
        let mut effects = Effects::default();
        match &said {
            Said::Subscribe => {
                let subscribe = Subscribe { packet_id: 65_000, has_identifier: false, filters: vec![("inbox/#", 1)] };
                session.on_packet(now_ms, Packet::Subscribe(subscribe), &mut effects);
            }
            Said::Publish { packet_id, topic, id, payload, again } => {
                let is_v5 = self.people[person].version == wire::Version::V5;
                let publish = Publish {
                    topic,
                    payload: payload.as_bytes(),
                    qos: 1,
                    dup: *again,
                    retain: false,
                    packet_id: *packet_id,
                    topic_alias: false,
                    id: is_v5.then_some(id.as_str()),
                };
                session.on_packet(now_ms, Packet::Publish(publish), &mut effects);
            }
            Said::Ack(packet_id) => session.on_packet(now_ms, Packet::PubAck { packet_id: *packet_id }, &mut effects),
        }
        self.apply(i, connection, effects);
    }

    fn person_hears(&mut self, person: usize, connection: u64, bytes: &[u8]) {
        if self.people[person].connection != Some(connection) {
            return;
        }
        let at = Duration::from_micros(self.now);
        self.people[person].incoming.extend_from_slice(bytes);
        loop {
            let packet = wire::decode(self.people[person].version, &mut self.people[person].incoming);
            let Some(packet) = packet.expect("a session speaks MQTT") else { return };
            let session = self.people[person].session;
            match packet {
                wire::Packet::ConnAck { session_present, code: 0, .. } => {
                    let state = &mut self.people[person];
                    state.connections += 1;
                    let connected = Seen::Connected { session, connection: state.connections, session_present };
                    self.history.record(at, connected);
                    self.say(person, Said::Subscribe);
                }
                wire::Packet::ConnAck { .. } | wire::Packet::Disconnect { .. } => {
                    return self.connection_ends(person, connection);
                }
                wire::Packet::SubAck { codes, .. } => {
                    if codes != [1] {
                        return self.happen(What::PersonLeaves(person, connection));
                    }
                    self.people[person].subscribed = true;
                    self.history.record(at, Seen::Subscribed { session });
                    for (packet_id, id, conversation, topic, payload) in self.people[person].unanswered.clone() {
                        self.sent(person, id, conversation, &payload);
                        self.say(person, Said::Publish { packet_id, topic, id: id.to_string(), payload, again: true });
                    }
                }
                wire::Packet::PubAck { packet_id, code, properties } => {
                    let state = &mut self.people[person];
                    let Some(index) = state.unanswered.iter().position(|(id, ..)| *id == packet_id) else { continue };
                    let (_, id, ..) = state.unanswered.remove(index);
                    let seq = properties.user("seq").and_then(|seq| seq.parse().ok());
                    let was_refused = code != 0 || state.refused.contains(&packet_id);
                    state.refused.retain(|refused| *refused != packet_id);
                    let seen = if was_refused { Seen::Refused { id } } else { Seen::Acked { id, seq } };
                    self.history.record(at, seen);
                }
                wire::Packet::Publish { topic, packet_id, payload, properties, .. } => {
                    if let Some(packet_id) = packet_id {
                        self.say(person, Said::Ack(packet_id));
                    }
                    self.received(person, &topic, &payload, &properties);
                }
                wire::Packet::UnsubAck { .. } | wire::Packet::Pong => {}
            }
        }
    }

    fn received(&mut self, person: usize, topic: &str, payload: &[u8], properties: &wire::Properties) {
        let parts: Vec<&str> = topic.split('/').collect();
        let is_old = self.people[person].version == wire::Version::V311;
        let (conversation, from, seq) = match parts[..] {
            ["inbox", "refused"] if is_old => {
                self.people[person].refused.extend(refused_packet(payload));
                return;
            }
            ["inbox", "u", peer, from, ref seq @ ..] => {
                let (one, other) = (self.history.user(&self.people[person].name), self.history.user(peer));
                (self.history.pair(one, other), from, seq)
            }
            ["inbox", "g", GROUP, from, ref seq @ ..] => (self.team, from, seq),
            _ => return,
        };
        let seq = if is_old { seq.first().copied() } else { properties.user("seq") };
        let seq = seq.and_then(|seq| seq.parse().ok()).expect("every message has a seq");
        let id_in_payload = || std::str::from_utf8(payload.get(..16)?).ok().and_then(MessageId::parse);
        let state = &self.people[person];
        let received = Seen::Received {
            session: state.session,
            connection: state.connections,
            conversation,
            from: self.history.known_user(from),
            seq,
            id: properties.user("id").and_then(MessageId::parse).or_else(id_in_payload),
            payload: fingerprint(payload),
        };
        self.history.record(Duration::from_micros(self.now), received);
    }
}

/// The packet that a notice on `inbox/refused` speaks of.
fn refused_packet(payload: &[u8]) -> Option<u16> {
    serde_json::from_slice::<serde_json::Value>(payload).ok()?.get("packetId")?.as_u64()?.try_into().ok()
}

fn shared(boot: u64) -> Arc<Shared> {
    let limits = SessionLimits {
        receive_maximum: 64,
        packet_size_max: 65_536,
        keep_alive_s_max: 1_200,
        session_expiry_s_max: 86_400,
        catch_up: 1_000,
        send_buffer_bytes: 1 << 18,
    };
    Shared::new(boot, limits, Metrics::default())
}
