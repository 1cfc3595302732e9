//! The whole data path in virtual time: real owners, sessions, routers and the real coordinator, driven by one seeded loop through
//! drops, delays, crashes, pauses, a store that fails, and moves. Some people speak MQTT 3.1.1, some have a second device. Nothing
//! sleeps; the same seed gives the same history.
//!
//! `SIM_SEED=7 SIM_SEEDS=1 cargo test -p im-e2e --test simulation seeds` replays one; `SIM_SEEDS=500` runs more.
#![allow(missing_docs)]

mod gateways;
mod leader;
mod members;
mod people;

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
