//! What a business member does, without I/O: events in ([`Input`]), what is to be done out ([`Output`]), time as a parameter.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`ownership`] | acquiring, confirming, releasing and losing shards |
//! | [`log`] | an owned shard's open batch, its commits, and what clients ask of conversations |
//! | [`conversation`] | one conversation: head, members, marks |
//! | [`notify`] | telling the owners of recipients what was committed, until they have it |
//! | [`users`] | one user: sessions, index, cursors; and being told |
//! | [`rooms`] | live rooms: order, moderation, merged counts |
//! | [`scrub`] | looking for holes in the logs, slowly and always |
//! | [`calls`] | what is asked of the store |
//!
//! One core per process, driven by one task: an owner needs no locks, and a seeded loop can drive many cores through faults.

mod cache;
pub mod calls;
pub mod conversation;
mod notify;
mod ownership;
mod rooms;
mod scrub;
mod shard;
mod users;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use im_proto::control::{Command, Hello, Report, report};
use im_proto::ids::{MemberId, room_key, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Body, ClientFrame, Done, Moved, Owned, Push, Refusal, Refused, Register, Reply, Request, Role, ServerFrame, body,
    client_frame, push, server_frame,
};
use im_proto::links::LINK_SILENCE_MAX;
use im_proto::router::{self, Router, Sending};
use prost::Message;

use crate::store::StoreError;
use calls::{StoreAnswer, StoreCall};
use notify::PeerToken;
use ownership::Slot;
use shard::OwnedShard;

/// Hash maps whose order is the same in each run: a seed replays.
pub type Map<K, V> = std::collections::HashMap<K, V, foldhash::fast::FixedState>;

/// What may be held at once. Every bound refuses for now, or makes the sender wait.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Writes that wait in one shard.
    pub shard_ops_max: usize,
    /// Requests that wait for a load, in all.
    pub parked_max: usize,
    /// Log entries of one shard that are being notified; the rest is read from the log later.
    pub notify_window: usize,
    /// Commits under way at once. Two: while one is made durable the next one fills.
    pub commits_max: usize,
    /// Between the starts of two commits. A commit costs about the same whether it has one row or thirty (an fsync, a call, wake-ups in
    /// three processes), so a little patience under load saves most of it; the first write after a silence does not wait.
    pub commit_spacing: Duration,
    /// Rows and bytes of one commit.
    pub commit_ops_max: usize,
    /// Payload bytes of one commit.
    pub commit_bytes_max: usize,
    /// Conversations and users kept in memory, each.
    pub cached_max: usize,
    /// A message's payload, bytes.
    pub payload_max: usize,
    /// Log rows of a shard that the scrubber looks at in one go.
    pub scrub_rows: u32,
    /// Between two of its goes, whatever their shards.
    pub scrub_pause: Duration,
    /// After it came to a shard's end, until it begins anew with that shard.
    pub scrub_interval: Duration,
    /// Messages of a live room that are kept for late comers.
    pub room_history: usize,
    /// Between two statistics of a live room.
    pub room_stats_interval: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            shard_ops_max: 8_192,
            parked_max: 100_000,
            notify_window: 2_048,
            commits_max: 2,
            commit_spacing: Duration::from_millis(5),
            commit_ops_max: 4_096,
            commit_bytes_max: 4 << 20,
            cached_max: 200_000,
            payload_max: 256 << 10,
            scrub_rows: 512,
            scrub_pause: Duration::from_millis(250),
            scrub_interval: Duration::from_secs(600),
            room_history: 0,
            room_stats_interval: Duration::from_secs(1),
        }
    }
}

/// The time of an input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, since some start.
    pub mono: Duration,
    /// The wall clock, milliseconds since the Unix epoch.
    pub wall_ms: i64,
}

/// An incoming link. 0 is this member itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkId(pub u64);

/// This member's link to itself.
pub const LOCAL: LinkId = LinkId(0);

/// What happens to a core.
#[derive(Debug)]
#[allow(missing_docs)] // fields say what they are
pub enum Input {
    /// A gateway or another member opened a link.
    LinkOpened { link: LinkId, peer: MemberId, role: Role },
    /// It ended.
    LinkClosed { link: LinkId },
    /// Frames came over it; Hello has been taken off.
    Frames { link: LinkId, frames: Vec<ClientFrame> },
    /// The store answered.
    Answered { call: u64, answer: Result<StoreAnswer, StoreError> },
    /// A stream to the control service opens: what its Hello says but for this member's state.
    ControlUp(Hello),
    /// The control service commands.
    Command(Command),
    /// The member ends: every shard is given up, to nobody in particular.
    ReleaseAll,
    /// Our link to another business member is up.
    PeerUp(MemberId),
    /// It broke.
    PeerDown(MemberId),
    /// Frames came over it.
    PeerFrames { peer: MemberId, frames: Vec<ServerFrame> },
    /// Time passed; at least every 100 ms.
    Tick,
}

/// What a core wants done, in this order.
#[derive(Debug)]
#[allow(missing_docs)] // fields say what they are
pub enum Output {
    /// Put a frame on an incoming link.
    Frame { link: LinkId, frame: ServerFrame },
    /// Ask the store; answer with the same number.
    Call { call: u64, request: StoreCall },
    /// Tell the control service.
    Report(Report),
    /// Put a frame on our link to another member.
    Peer { to: MemberId, frame: ClientFrame },
    /// The business members to keep links to.
    Members(Vec<(MemberId, String)>),
    /// An incoming link is of no use any more.
    CloseLink(LinkId),
}

/// Counters, since the process started.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stats {
    /// Messages taken from links.
    pub accepted: u64,
    /// Log entries stored.
    pub committed: u64,
    /// Messages that were stored before.
    pub duplicates: u64,
    /// Log entries whose recipients all have them.
    pub notified: u64,
    /// Requests refused.
    pub refused: u64,
    /// Pushes to gateways.
    pub pushed: u64,
    /// Shards acquired.
    pub acquired: u64,
    /// Shards lost to a higher epoch.
    pub fenced: u64,
    /// Commits whose outcome was not learnt.
    pub unknown_outcomes: u64,
    /// Commits and the batches (shards) in them.
    pub commits: u64,
    /// See `commits`.
    pub batches: u64,
    /// Holes found in a log: any is a loss.
    pub holes: u64,
    /// Frames that could not be understood.
    pub malformed: u64,
    /// Room messages not sent to a gateway that has too many of that room in hand.
    pub room_dropped: u64,
}

/// Where an answer goes, and what it may be.
#[derive(Debug, Clone, Copy)]
struct ReplyTo {
    link: LinkId,
    id: u64,
    epoch: u64,
    /// It may have been done before: no refusal for now.
    again: bool,
    /// See `Request::order`, `Request::oldest`.
    order: u64,
    oldest: u64,
}

/// A request taken apart.
#[derive(Debug)]
struct Ask {
    to: ReplyTo,
    shard: u32,
    body: body::Body,
}

impl Ask {
    /// Whether "not now" is an answer: not to what may have been done before, and not to what a session says of its own life.
    fn may_be_refused(&self) -> bool {
        let is_announcement = |register: &Register| register.number.is_some();
        match &self.body {
            body::Body::Close(_) => false,
            body::Body::Register(register) if is_announcement(register) => false,
            _ => !self.to.again,
        }
    }
}

/// A gateway as known through its link; outlives a break of it for a while.
#[derive(Debug, Default)]
struct Gateway {
    link: Option<LinkId>,
    /// When it last said that it is there.
    heard_at: Duration,
    /// When its sessions count as gone, while it has no link.
    gone_at: Option<Duration>,
    next_push: u64,
    /// Pushed and not taken yet.
    outstanding: VecDeque<(u64, JobKey)>,
    /// Pushed over a link that broke: done when the gateway has announced that shard's sessions again (they compare heads then), or is gone.
    orphaned: Vec<JobKey>,
}

/// Something that waits for gateways: see `users`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct JobKey {
    shard: u32,
    epoch: u64,
    job: u64,
}

/// What a call to the store was for.
#[derive(Debug)]
enum Context {
    Shards,
    Acquire { claims: Vec<crate::store::Claim>, at: Duration },
    Release { shard: u32, epoch: u64 },
    Check { shards: Vec<(u32, u64)>, at: Duration },
    Commit { shards: Vec<(u32, u64)>, at: Duration },
    LoadConversation { shard: u32, epoch: u64, conversation: Arc<str> },
    LoadUser { shard: u32, epoch: u64, user: Arc<str> },
    LoadRoom { shard: u32, epoch: u64, room: Arc<str> },
    Range { shard: u32, epoch: u64, fetch: shard::PendingFetch },
    Find { shard: u32, epoch: u64, to: ReplyTo },
    Since { shard: u32, epoch: u64 },
    Scrub { shard: u32, epoch: u64 },
}

/// A request, whoever asks.
type Asked = Sending<Form>;

/// The body of a request as it came.
#[derive(Debug)]
enum Form {
    /// Over a link.
    Encoded(Bytes),
    /// From ourselves.
    Ours(Arc<Body>),
}

impl Form {
    fn read(self) -> Option<body::Body> {
        match self {
            Self::Encoded(bytes) => Body::decode(bytes).ok()?.body,
            Self::Ours(body) => Arc::unwrap_or_clone(body).body,
        }
    }
}

fn asked(request: Request) -> Asked {
    let Request { id, shard, epoch, body, again, order, oldest } = request;
    Sending { id, shard, epoch, body: Form::Encoded(body), again, order, oldest }
}

fn asked_by_us(sending: Sending<Arc<Body>>) -> Asked {
    let Sending { id, shard, epoch, body, again, order, oldest } = sending;
    Sending { id, shard, epoch, body: Form::Ours(body), again, order, oldest }
}

fn for_a_link(sending: Sending<Arc<Body>>) -> Request {
    let Sending { id, shard, epoch, body, again, order, oldest } = sending;
    Request { id, shard, epoch, body: body.encode_to_vec().into(), again, order, oldest }
}

enum Loop {
    Request(Asked),
    Reply(Reply),
}

/// All of a core but its shards: what a shard needs to act.
struct Env {
    me: MemberId,
    limits: Limits,
    now: Now,
    shards: u32,
    map_gateways: BTreeSet<MemberId>,
    links: BTreeMap<LinkId, MemberId>,
    gateways: BTreeMap<MemberId, Gateway>,
    /// Most of what owners ask is asked of themselves.
    router: Router<PeerToken, Arc<Body>>,
    calls: BTreeMap<u64, Context>,
    next_call: u64,
    next_job: u64,
    parked: usize,
    /// Jobs that a shard other than the one at work has finished waiting for.
    settled: Vec<JobKey>,
    loopback: VecDeque<Loop>,
    outputs: Vec<Output>,
    /// Somebody waits for the next commit who should not wait for its time.
    is_urgent: bool,
    stats: Stats,
}

impl Env {
    fn call(&mut self, request: StoreCall, context: Context) {
        let call = self.next_call;
        self.next_call += 1;
        self.calls.insert(call, context);
        self.outputs.push(Output::Call { call, request });
    }

    fn reply(&mut self, to: ReplyTo, outcome: Outcome) {
        let reply = Reply { id: to.id, epoch: to.epoch, outcome: Some(outcome) };
        if to.link == LOCAL {
            self.loopback.push_back(Loop::Reply(reply));
        } else {
            self.frame(to.link, server_frame::Frame::Reply(reply));
        }
    }

    fn done(&mut self, to: ReplyTo) {
        self.reply(to, Outcome::Done(Done {}));
    }

    fn refuse(&mut self, to: ReplyTo, code: Refusal, reason: impl Into<String>) {
        self.stats.refused += 1;
        self.reply(to, Outcome::Refused(Refused { code: code.into(), reason: reason.into() }));
    }

    fn frame(&mut self, link: LinkId, frame: server_frame::Frame) {
        if self.links.contains_key(&link) {
            self.outputs.push(Output::Frame { link, frame: ServerFrame { frame: Some(frame) } });
        }
    }

    fn broadcast(&mut self, frame: server_frame::Frame) {
        for link in self.links.keys().copied().collect::<Vec<_>>() {
            self.frame(link, frame.clone());
        }
    }

    /// Pushes to a gateway. With a job, the job waits until the gateway took it; `false` if there is no such gateway.
    fn push(&mut self, gateway: &MemberId, push: push::Push, job: Option<JobKey>) -> bool {
        let Some(known) = self.gateways.get_mut(gateway) else { return false };
        self.stats.pushed += 1;
        match known.link {
            None => known.orphaned.extend(job),
            Some(link) => {
                known.next_push += 1;
                let id = known.next_push;
                known.outstanding.extend(job.map(|job| (id, job)));
                self.frame(link, server_frame::Frame::Push(Push { id, push: Some(push) }));
            }
        }
        true
    }

    fn report(&mut self, report: report::Report) {
        self.outputs.push(Output::Report(Report { report: Some(report) }));
    }
}

/// A business member without I/O.
pub struct Core {
    env: Env,
    slots: BTreeMap<u32, Slot>,
    term: u64,
    number: u64,
    next: Schedule,
}

/// When what is done now and then is due.
#[derive(Debug, Default)]
struct Schedule {
    check: Duration,
    heartbeat: Duration,
    sweep: Duration,
    /// The next commit may start.
    commit: Duration,
    /// Something may wait for that.
    commit_waits: bool,
    /// The shard that it begins with.
    commit_from: u32,
    /// A check is under way.
    checking: bool,
    last_answer: Duration,
    /// When a write was refused, unless one succeeded since.
    refused_at: Option<Duration>,
    last_load: Duration,
    scrub: Duration,
    /// The shard that the scrubber looks at first.
    scrub_from: u32,
    /// It is at work.
    scrubbing: bool,
}

impl Core {
    /// A member that owns nothing yet. Once it has a map it asks the store which shards an earlier boot of its name held.
    pub fn new(me: MemberId, limits: Limits, now: Now) -> Self {
        let env = Env {
            me,
            limits,
            now,
            shards: 0,
            map_gateways: BTreeSet::new(),
            links: BTreeMap::new(),
            gateways: BTreeMap::new(),
            router: Router::new(0, router::Limits::default()),
            calls: BTreeMap::new(),
            next_call: 1,
            next_job: 1,
            parked: 0,
            settled: Vec::new(),
            loopback: VecDeque::new(),
            outputs: Vec::new(),
            is_urgent: false,
            stats: Stats::default(),
        };
        Self { env, slots: BTreeMap::new(), term: 0, number: 0, next: Schedule::default() }
    }

    /// Who this is.
    pub fn me(&self) -> &MemberId {
        &self.env.me
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.env.stats
    }

    /// The shards held and their epochs.
    pub fn held(&self) -> impl Iterator<Item = (u32, u64)> {
        self.slots.iter().filter_map(|(shard, slot)| match slot {
            Slot::Owned(owned) => Some((*shard, owned.epoch)),
            _ => None,
        })
    }

    /// What this member is to a shard, in a few words.
    pub fn describe(&self, shard: u32) -> String {
        match self.slots.get(&shard) {
            None | Some(Slot::Vacant) => "vacant".to_owned(),
            Some(Slot::Acquiring(acquiring)) => format!("acquiring {acquiring:?}"),
            Some(Slot::Owned(owned)) => owned.describe(),
        }
    }

    /// What there is to do since the last call.
    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.env.outputs)
    }

    /// Something happened.
    pub fn handle(&mut self, now: Now, input: Input) {
        self.take(now, input);
        self.commit(now);
    }

    /// Something happened, and more is about to be told at once: [`Core::commit`] comes behind the last of it, so that what came
    /// together is committed together.
    pub fn take(&mut self, now: Now, input: Input) {
        self.env.now = now;
        match input {
            Input::LinkOpened { link, peer, role } => self.link_opened(link, peer, role),
            Input::LinkClosed { link } => self.link_closed(link),
            Input::Frames { link, frames } => {
                for frame in frames {
                    self.client_frame(link, frame);
                }
            }
            Input::Answered { call, answer } => self.answered(call, answer),
            Input::ControlUp(hello) => {
                let hello = self.hello(hello);
                self.env.report(report::Report::Hello(hello));
            }
            Input::Command(command) => self.command(command),
            Input::ReleaseAll => self.release_all(),
            Input::PeerUp(peer) => self.env.router.link_up(&peer),
            Input::PeerDown(peer) => self.env.router.link_down(&peer),
            Input::PeerFrames { peer, frames } => {
                for frame in frames {
                    match frame.frame {
                        Some(server_frame::Frame::Owned(owned)) => self.env.router.owned(&peer, &owned),
                        Some(server_frame::Frame::Moved(moved)) => {
                            self.env.router.moved(&moved);
                            self.handed_over(&moved);
                        }
                        Some(server_frame::Frame::Reply(reply)) => self.env.router.reply(reply),
                        _ => {}
                    }
                }
            }
            Input::Tick => self.tick(),
        }
        self.settle();
    }

    /// Carries what members ask of themselves round until nothing is left.
    fn settle(&mut self) {
        loop {
            for output in self.env.router.take_outputs() {
                match output {
                    router::Output::Send(to, request) if to == self.env.me => {
                        self.env.loopback.push_back(Loop::Request(asked_by_us(request)))
                    }
                    router::Output::Send(to, request) => {
                        let frame = ClientFrame { frame: Some(client_frame::Frame::Request(for_a_link(request))) };
                        self.env.outputs.push(Output::Peer { to, frame });
                    }
                    router::Output::Done(token, outcome) => self.peer_answered(token, outcome),
                    router::Output::Ready { .. } => {}
                }
            }
            for key in std::mem::take(&mut self.env.settled) {
                if let Some(owned) = owned_at(&mut self.slots, key.shard, key.epoch) {
                    owned.job_step(&mut self.env, key.job);
                }
            }
            match self.env.loopback.pop_front() {
                Some(Loop::Request(request)) => self.request(LOCAL, request),
                Some(Loop::Reply(reply)) => self.env.router.reply(reply),
                None if self.env.settled.is_empty() => return,
                None => {}
            }
        }
    }

    fn link_opened(&mut self, link: LinkId, peer: MemberId, role: Role) {
        let is_gateway = role == Role::Gateway;
        if let Some(old) = self.env.gateways.get(&peer).filter(|_| is_gateway).and_then(|gateway| gateway.link) {
            // What it asked over that it asks again over the new one, which brings its rooms, too.
            self.env.outputs.push(Output::CloseLink(old));
            self.link_closed(old);
        }
        self.env.links.insert(link, peer.clone());
        let owned = self.held().map(|(shard, epoch)| im_proto::link::OwnedShard { shard, epoch }).collect();
        self.env.frame(link, server_frame::Frame::Owned(Owned { shards: owned }));
        if is_gateway {
            let gateway = self.env.gateways.entry(peer).or_default();
            (gateway.link, gateway.heard_at, gateway.gone_at) = (Some(link), self.env.now.mono, None);
        }
    }

    fn link_closed(&mut self, link: LinkId) {
        let Some(peer) = self.env.links.remove(&link) else { return };
        if let Some(gateway) = self.env.gateways.get_mut(&peer)
            && gateway.link == Some(link)
        {
            gateway.link = None;
            let silence_ends = gateway.heard_at + LINK_SILENCE_MAX;
            gateway.gone_at = Some(silence_ends.min(self.env.now.mono + users::GATEWAY_GRACE));
            let outstanding = std::mem::take(&mut gateway.outstanding);
            gateway.orphaned.extend(outstanding.into_iter().map(|(_, job)| job));
        }
        for slot in self.slots.values_mut() {
            if let Slot::Owned(owned) = slot {
                owned.link_closed(&mut self.env, link);
            }
        }
    }

    fn client_frame(&mut self, link: LinkId, frame: ClientFrame) {
        match frame.frame {
            Some(client_frame::Frame::Request(request)) => self.request(link, asked(request)),
            Some(client_frame::Frame::Took(through)) => {
                let Some(gateway) = self.env.links.get(&link).and_then(|peer| self.env.gateways.get_mut(peer)) else {
                    return;
                };
                while let Some((id, job)) = gateway.outstanding.front()
                    && *id <= through
                {
                    self.env.settled.push(*job);
                    gateway.outstanding.pop_front();
                }
            }
            Some(client_frame::Frame::RoomTook(took)) => {
                let shard = shard_of(&room_key(&took.room), self.env.shards);
                if let Some(Slot::Owned(owned)) = self.slots.get_mut(&shard) {
                    owned.rooms.took(link, &took.room, took.bytes);
                }
            }
            Some(client_frame::Frame::Ping(number)) => {
                if let Some(gateway) = self.env.links.get(&link).and_then(|peer| self.env.gateways.get_mut(peer)) {
                    gateway.heard_at = self.env.now.mono;
                }
                self.env.frame(link, server_frame::Frame::Pong(number));
            }
            Some(client_frame::Frame::Hello(_)) | None => self.env.stats.malformed += 1,
        }
    }

    fn request(&mut self, link: LinkId, request: Asked) {
        let Sending { id, shard, epoch, again, order, oldest, .. } = request;
        let to = ReplyTo { link, id, epoch, again, order, oldest };
        let moved = |destination: &str| {
            Outcome::Moved(Moved { shard, ended: epoch, to: destination.to_owned(), released: false })
        };
        match self.slots.get_mut(&shard) {
            Some(Slot::Owned(owned)) if owned.epoch == epoch && owned.leaving.is_none() => {
                // Most requests are notifications of our own for people in memory: those are not even copied.
                if let Form::Ours(body) = &request.body
                    && let Some(body::Body::Notify(notify)) = &body.body
                    && owned.notify_at_once(&mut self.env, to, notify)
                {
                    return;
                }
                let Some(body) = request.body.read() else {
                    self.env.stats.malformed += 1;
                    return self.env.refuse(to, Refusal::Invalid, "the request can't be decoded");
                };
                owned.ask(&mut self.env, Ask { to, shard, body });
            }
            Some(Slot::Owned(owned)) => {
                let destination = owned.leaving.as_ref().map_or("", |leaving| leaving.to.as_str());
                let outcome = moved(destination);
                self.env.reply(to, outcome);
            }
            Some(Slot::Acquiring(acquiring)) if acquiring.may_be_won(epoch) => {
                if acquiring.early.len() < self.env.limits.shard_ops_max {
                    acquiring.early.push((link, request));
                } else {
                    // Over the next link it is asked again.
                    self.env.outputs.push(Output::CloseLink(link));
                }
            }
            Some(Slot::Acquiring(acquiring)) if acquiring.recovering == Some(epoch) => {
                acquiring.ask_recovering(&mut self.env, to);
            }
            _ => {
                let outcome = moved("");
                self.env.reply(to, outcome);
            }
        }
    }

    /// When [`Core::commit`] is to be called again if nothing happens until then: something was asked sooner than the next commit may
    /// start.
    pub fn commit_at(&self) -> Option<Duration> {
        self.next.commit_waits.then_some(self.next.commit)
    }

    /// Forms commits of all shards that have something to write and nothing under way, as many as may be under way.
    pub fn commit(&mut self, now: Now) {
        self.env.now = now;
        // Whoever waits for a shard that leaves has waited enough.
        let is_urgent = std::mem::take(&mut self.env.is_urgent);
        self.next.commit_waits = now.mono < self.next.commit && !is_urgent;
        if self.next.commit_waits {
            return;
        }
        let commits = self.env.calls.values().filter(|context| matches!(context, Context::Commit { .. })).count();
        for _ in commits..self.env.limits.commits_max {
            let (mut batches, mut shards) = (Vec::new(), Vec::new());
            let (mut ops, mut bytes) = (self.env.limits.commit_ops_max, self.env.limits.commit_bytes_max);
            // Round and round: where the budget ended, the next commit begins.
            let from = self.next.commit_from;
            for turn in [(Bound::Included(from), Bound::Unbounded), (Bound::Unbounded, Bound::Excluded(from))] {
                for (shard, slot) in self.slots.range_mut(turn) {
                    let Slot::Owned(owned) = slot else { continue };
                    if ops == 0 || bytes == 0 {
                        break;
                    }
                    if let Some(batch) = owned.form_batch(&mut self.env, &mut ops, &mut bytes) {
                        self.next.commit_from = shard + 1;
                        shards.push((*shard, owned.epoch));
                        batches.push(batch);
                    }
                }
            }
            self.settle();
            if batches.is_empty() {
                return;
            }
            self.next.commit = now.mono + self.env.limits.commit_spacing;
            self.env.stats.commits += 1;
            self.env.stats.batches += batches.len() as u64;
            let at = self.env.now.mono;
            self.env.call(StoreCall::Commit(batches), Context::Commit { shards, at });
        }
    }

    fn answered(&mut self, call: u64, answer: Result<StoreAnswer, StoreError>) {
        let Some(context) = self.env.calls.remove(&call) else { return };
        if answer.is_ok() {
            self.next.last_answer = self.env.now.mono;
        }
        match (context, answer) {
            (Context::Shards, answer) => self.shards_read(answer),
            (Context::Acquire { claims, at }, answer) => self.acquire_answered(claims, at, answer),
            (Context::Release { shard, epoch }, answer) => self.release_answered(shard, epoch, answer),
            (Context::Check { shards, at }, answer) => self.check_answered(shards, at, answer),
            (Context::Commit { shards, at }, answer) => self.commit_answered(shards, at, answer),
            (Context::LoadConversation { shard, epoch, conversation }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.conversation_loaded(&mut self.env, conversation, answer);
                }
            }
            (Context::LoadUser { shard, epoch, user }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.user_loaded(&mut self.env, user, answer);
                }
            }
            (Context::LoadRoom { shard, epoch, room }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.room_loaded(&mut self.env, room, answer);
                }
            }
            (Context::Range { shard, epoch, fetch }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.range_read(&mut self.env, fetch, answer);
                }
            }
            (Context::Find { shard, epoch, to }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.looked_for(&mut self.env, to, answer);
                }
            }
            (Context::Since { shard, epoch }, answer) => {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.backlog_read(&mut self.env, answer);
                }
            }
            (Context::Scrub { shard, epoch }, answer) => {
                self.next.scrubbing = false;
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.scrubbed(&mut self.env, answer);
                }
            }
        }
    }
}

/// The shard, if it is owned in that very epoch.
fn owned_at(slots: &mut BTreeMap<u32, Slot>, shard: u32, epoch: u64) -> Option<&mut OwnedShard> {
    match slots.get_mut(&shard) {
        Some(Slot::Owned(owned)) if owned.epoch == epoch => Some(owned),
        _ => None,
    }
}
