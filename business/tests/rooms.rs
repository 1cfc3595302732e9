//! Live rooms at their owner, without I/O: order and back-pressure, moderation, and counts that are in the totals once whatever is sent
//! again, refused or moved.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use im_business::core::calls::{RoomRows, StoreAnswer, StoreCall, keys};
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_business::store::{self, Acquired, StoreError, Tail};
use im_proto::control::{self, Command, command};
use im_proto::ids::MemberId;
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Announced, Body, ClientFrame, Count, Push, Refusal, Request, Role, RoomChange, RoomCount, RoomCounts, RoomGet,
    RoomJoin, RoomPublish, RoomTook, Sanction, body, client_frame, push, server_frame,
};
use prost::Message;

const ROOM: &str = "stage";
const GATEWAY: LinkId = LinkId(1);
const OTHER_GATEWAY: LinkId = LinkId(2);
/// Over which the test asks.
const WATCHER: LinkId = LinkId(9);
const GATEWAYS: [(&str, LinkId); 3] = [("gateway-0", GATEWAY), ("gateway-1", OTHER_GATEWAY), ("gateway-2", WATCHER)];
/// How long a new owner waits for gateways to announce what they have.
const ANNOUNCE_WAIT_MS: u64 = 3_000;

/// An owner of the only shard over a store of items, and what it says to gateways.
struct Owner {
    core: Core,
    now_ms: u64,
    items: BTreeMap<String, Bytes>,
    commits: u32,
    /// Rooms read, in order.
    loads: Vec<String>,
    store_refuses: bool,
    epoch: u64,
    next_request: u64,
    replies: BTreeMap<u64, Outcome>,
    pushes: Vec<(LinkId, push::Push)>,
}

impl Owner {
    fn new() -> Self {
        Self::with_items(BTreeMap::new(), 1)
    }

    /// The owner at this epoch of a shard with these items, some time after it acquired it.
    fn with_items(items: BTreeMap<String, Bytes>, epoch: u64) -> Self {
        let mut owner = Self::acquire(items, epoch);
        owner.pass(ANNOUNCE_WAIT_MS);
        owner
    }

    /// The same at once: nothing is announced to it yet.
    fn acquire(items: BTreeMap<String, Bytes>, epoch: u64) -> Self {
        let limits = Limits { room_history: 3, ..Limits::default() };
        let core = Core::new(MemberId::new("business-0", epoch).unwrap(), limits, Now::default());
        let mut owner = Self {
            core,
            now_ms: 0,
            items,
            commits: 0,
            loads: Vec::new(),
            store_refuses: false,
            epoch,
            next_request: 1,
            replies: BTreeMap::new(),
            pushes: Vec::new(),
        };
        let command = |command| Input::Command(Command { term: 1, command: Some(command) });
        let gateway = |(name, link): (&str, LinkId)| control::Member {
            member: gateway_on(link, name).to_string(),
            role: control::Role::Gateway.into(),
            ..control::Member::default()
        };
        let members = GATEWAYS.map(gateway).to_vec();
        let map = control::Map { number: 1, shards: 1, members, ..control::Map::default() };
        owner.handle(command(command::Command::Map(map)));
        let row = control::ShardRow { shard: 0, epoch: epoch - 1, owner: String::new() };
        owner.handle(command(command::Command::Acquire(control::Acquire { expected: vec![row] })));
        for (name, link) in GATEWAYS {
            owner.link(link, name);
        }
        owner
    }

    fn link(&mut self, link: LinkId, name: &str) {
        self.handle(Input::LinkOpened { link, peer: gateway_on(link, name), role: Role::Gateway });
    }

    fn now(&self) -> Now {
        Now { mono: Duration::from_millis(self.now_ms), wall_ms: 1_000_000 + self.now_ms as i64 }
    }

    /// Lets something happen, answers what is asked of the store, and gives commits their time.
    fn handle(&mut self, input: Input) {
        self.core.handle(self.now(), input);
        self.settle();
        self.pass(10);
    }

    fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
        self.core.handle(self.now(), Input::Tick);
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            let outputs = self.core.take_outputs();
            if outputs.is_empty() {
                return;
            }
            for output in outputs {
                match output {
                    Output::Call { call, request } => {
                        let answer = self.answer(request);
                        self.core.handle(self.now(), Input::Answered { call, answer });
                    }
                    Output::Frame { link, frame } => match frame.frame {
                        Some(server_frame::Frame::Reply(reply)) => {
                            self.replies.insert(reply.id, reply.outcome.unwrap());
                        }
                        Some(server_frame::Frame::Push(Push { push: Some(push), .. })) => {
                            self.pushes.push((link, push));
                        }
                        _ => {}
                    },
                    _ => {}
                }
            }
        }
    }

    fn answer(&mut self, request: StoreCall) -> Result<StoreAnswer, StoreError> {
        Ok(match request {
            StoreCall::Shards => StoreAnswer::Shards(Vec::new()),
            StoreCall::Acquire(_) => StoreAnswer::Acquire(vec![Acquired::Won(Tail {
                shard: 0,
                epoch: self.epoch,
                head_pos: 0,
                watermark: 0,
                hole: false,
            })]),
            // Names those that are somebody else's.
            StoreCall::Check(_) => StoreAnswer::Check(Vec::new()),
            StoreCall::LoadRoom { room, .. } => {
                self.loads.push(room.to_string());
                let get = |key: &str| self.items.get(key).cloned();
                StoreAnswer::LoadRoom(RoomRows {
                    settings: get(&keys::room(&room)),
                    totals: get(&keys::room_counts(&room)),
                    counted: get(keys::counted()),
                })
            }
            StoreCall::Scrub { .. } => StoreAnswer::Scrub(store::Scrubbed::default()),
            // A shard that leaves does not get away.
            StoreCall::Release(_) => return Err(StoreError::refused("for the test")),
            StoreCall::Commit(_) if self.store_refuses => {
                return Err(StoreError::refused("for the test"));
            }
            StoreCall::Commit(batches) => {
                self.commits += 1;
                for put in batches.iter().flat_map(|batch| &batch.puts) {
                    match &put.value {
                        Some(value) => drop(self.items.insert(put.key.clone(), value.clone())),
                        None => drop(self.items.remove(&put.key)),
                    }
                }
                StoreAnswer::Commit(batches.iter().map(|_| store::Outcome::Committed).collect())
            }
            other => panic!("not about rooms: {other:?}"),
        })
    }

    fn frame(&mut self, link: LinkId, frames: Vec<client_frame::Frame>) {
        let frames = frames.into_iter().map(|frame| ClientFrame { frame: Some(frame) }).collect();
        self.handle(Input::Frames { link, frames });
    }

    fn request(&mut self, body: body::Body, again: bool) -> (u64, client_frame::Frame) {
        let id = self.next_request;
        self.next_request += 1;
        let body = Body { body: Some(body) }.encode_to_vec().into();
        let request = Request { id, epoch: self.epoch, body, again, ..Request::default() };
        (id, client_frame::Frame::Request(request))
    }

    fn ask(&mut self, link: LinkId, body: body::Body) -> Option<Outcome> {
        let (id, frame) = self.request(body, false);
        self.frame(link, vec![frame]);
        self.replies.remove(&id)
    }

    fn join(&mut self, link: LinkId, viewers: u32) -> im_proto::link::RoomJoined {
        self.join_with(link, RoomJoin { viewers, ..RoomJoin::default() })
    }

    fn join_with(&mut self, link: LinkId, join: RoomJoin) -> im_proto::link::RoomJoined {
        match self.ask(link, body::Body::RoomJoin(RoomJoin { room: ROOM.into(), ..join })) {
            Some(Outcome::RoomJoined(joined)) => joined,
            other => panic!("{other:?}"),
        }
    }

    fn publish(&mut self, sender: &str, payload: &[u8]) -> Result<(), Refusal> {
        match self.ask(GATEWAY, publish(sender, payload)) {
            Some(Outcome::Done(_)) => Ok(()),
            Some(Outcome::Refused(refused)) => Err(refused.code()),
            other => panic!("{other:?}"),
        }
    }

    fn change(&mut self, change: RoomChange) -> Result<im_proto::link::Room, Refusal> {
        match self.ask(GATEWAY, body::Body::RoomChange(RoomChange { room: ROOM.into(), ..change })) {
            Some(Outcome::Room(room)) => Ok(room),
            Some(Outcome::Refused(refused)) => Err(refused.code()),
            other => panic!("{other:?}"),
        }
    }

    /// Viewers, likes and roses.
    fn totals(&mut self) -> (u64, u64, u64) {
        let get = RoomGet { room: ROOM.into(), actor: String::new() };
        let room = match self.ask(WATCHER, body::Body::RoomGet(get)) {
            Some(Outcome::Room(room)) => room,
            other => panic!("{other:?}"),
        };
        let stats = room.stats.unwrap();
        let total = |name: &str| stats.totals.iter().find(|total| total.name == name).map_or(0, |total| total.count);
        (stats.viewers, total("like"), total("gift/rose"))
    }

    /// Numbers of the room's messages pushed over a link since the last call.
    fn messages(&mut self, link: LinkId) -> Vec<u64> {
        let numbers = self.pushes.iter().filter(|(to, _)| *to == link).filter_map(|(_, push)| match push {
            push::Push::RoomMessage(message) => Some(message.number),
            _ => None,
        });
        let numbers = numbers.collect();
        self.pushes.retain(|(to, push)| *to != link || !matches!(push, push::Push::RoomMessage(_)));
        numbers
    }
}

fn gateway_on(link: LinkId, name: &str) -> MemberId {
    MemberId::new(name, 70 + link.0).unwrap()
}

fn publish(sender: &str, payload: &[u8]) -> body::Body {
    body::Body::RoomPublish(RoomPublish {
        room: ROOM.into(),
        sender: sender.into(),
        device: "phone".into(),
        payload: Bytes::copy_from_slice(payload),
    })
}

fn counts(number: u64, viewers: u32, counted: &[(&str, u64)]) -> body::Body {
    let counted = counted.iter().map(|(name, count)| Count { name: (*name).to_owned(), count: *count }).collect();
    body::Body::RoomCounts(RoomCounts { number, rooms: vec![RoomCount { room: ROOM.into(), viewers, counted }] })
}

#[test]
fn a_message_goes_once_to_each_gateway_in_the_room_and_to_no_other() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 2);
    assert_eq!(owner.publish("ann", b"one"), Ok(()));
    assert_eq!((owner.messages(GATEWAY), owner.messages(OTHER_GATEWAY)), (vec![1], vec![]));
    owner.join(OTHER_GATEWAY, 1);
    assert_eq!(owner.publish("ann", b"two"), Ok(()));
    assert_eq!((owner.messages(GATEWAY), owner.messages(OTHER_GATEWAY)), (vec![2], vec![2]));
    owner.handle(Input::LinkClosed { link: OTHER_GATEWAY });
    assert_eq!(owner.publish("ann", b"three"), Ok(()));
    assert_eq!(owner.messages(GATEWAY), [3]);
    assert_eq!(owner.totals().0, 2, "who came through the lost gateway is gone");
    assert_eq!(owner.commits, 0, "nothing of this is stored");
}

#[test]
fn late_comers_get_the_last_messages() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    for _ in 0..5 {
        assert_eq!(owner.publish("ann", b"la"), Ok(()));
    }
    let joined = owner.join(OTHER_GATEWAY, 1);
    let numbers: Vec<u64> = joined.history.iter().map(|message| message.number).collect();
    assert_eq!((numbers, joined.history_max), (vec![3, 4, 5], 3));
}

#[test]
fn publishers_are_refused_while_every_gateway_has_its_hands_full() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    let mut sent = 0;
    while owner.publish("ann", &[0; 10_000]).is_ok() {
        sent += 1;
        assert!(sent < 100, "what a gateway has in hand is bounded");
    }
    assert_eq!(owner.messages(GATEWAY).len(), sent);
    assert_eq!(owner.publish("ann", b"more"), Err(Refusal::Busy));
    owner.join(OTHER_GATEWAY, 1);
    assert_eq!(owner.publish("ann", b"more"), Ok(()), "the room is as fast as its fastest gateway");
    assert_eq!((owner.messages(GATEWAY).len(), owner.messages(OTHER_GATEWAY).len()), (0, 1));
    assert_eq!(owner.core.stats().room_dropped, 1, "the slower one loses");
    let took = RoomTook { room: ROOM.into(), bytes: 10_064 };
    owner.frame(GATEWAY, vec![client_frame::Frame::RoomTook(took)]);
    assert_eq!(owner.publish("ann", b"more"), Ok(()));
    assert_eq!(owner.messages(GATEWAY).len(), 1);
}

#[test]
fn counts_are_summed_and_told_once_per_interval() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 0);
    owner.join(OTHER_GATEWAY, 0);
    owner.join_with(WATCHER, RoomJoin { unwatched: true, ..RoomJoin::default() });
    owner.pass(5_000);
    owner.pushes.clear();
    let commits = owner.commits;
    let (first, one) = owner.request(counts(1, 3, &[("like", 10), ("gift/rose", 2)]), false);
    let (second, other) = owner.request(counts(1, 4, &[("like", 5)]), false);
    owner.frame(GATEWAY, vec![one]);
    owner.frame(OTHER_GATEWAY, vec![other]);
    for id in [first, second] {
        assert!(matches!(owner.replies[&id], Outcome::Done(_)), "{:?}", owner.replies[&id]);
    }
    assert_eq!(owner.totals(), (7, 15, 2));
    assert!(owner.commits - commits <= 2);
    for _ in 0..20 {
        owner.pass(100);
    }
    let told: Vec<_> = owner.pushes.iter().filter(|(_, push)| matches!(push, push::Push::RoomStats(_))).collect();
    assert!((2..=4).contains(&told.len()), "each gateway is told once or twice: {told:?}");
    assert!(told.iter().all(|(link, _)| *link != WATCHER), "where nobody watches nothing is told");
    let push::Push::RoomStats(stats) = &told.last().unwrap().1 else { unreachable!() };
    assert_eq!(stats.viewers, 7);
}

#[test]
fn what_is_sent_again_counts_once() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    // Twice in one batch.
    let (_, one) = owner.request(counts(1, 1, &[("like", 10)]), false);
    let (again, two) = owner.request(counts(1, 1, &[("like", 10)]), true);
    owner.frame(GATEWAY, vec![one, two]);
    owner.pass(10);
    assert!(matches!(owner.replies[&again], Outcome::Done(_)));
    assert_eq!(owner.totals().1, 10);
    // To the next owner, which knows the items alone.
    let mut next = Owner::with_items(owner.items.clone(), 2);
    next.join(GATEWAY, 1);
    let (again, frame) = next.request(counts(1, 1, &[("like", 10)]), true);
    next.frame(GATEWAY, vec![frame]);
    assert!(matches!(next.replies[&again], Outcome::Done(_)));
    assert_eq!((next.totals().1, next.commits), (10, 0));
    assert!(next.ask(GATEWAY, counts(2, 1, &[("like", 1)])).is_some());
    assert_eq!(next.totals().1, 11);
    // Another process of the same name begins at 1.
    next.handle(Input::LinkClosed { link: GATEWAY });
    next.handle(Input::LinkOpened {
        link: LinkId(3),
        peer: MemberId::new("gateway-0", 8).unwrap(),
        role: Role::Gateway,
    });
    assert!(next.ask(LinkId(3), counts(1, 1, &[("like", 1)])).is_some());
    assert_eq!(next.totals().1, 12);
}

#[test]
fn what_is_not_stored_leaves_no_trace() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    owner.store_refuses = true;
    let refused = owner.ask(GATEWAY, counts(1, 1, &[("like", 10)]));
    assert!(matches!(refused, Some(Outcome::Refused(refused)) if refused.code() == Refusal::StoreUnavailable));
    assert_eq!(owner.totals().1, 0);
    owner.store_refuses = false;
    owner.pass(1_000);
    let (id, frame) = owner.request(counts(1, 1, &[("like", 10)]), false);
    owner.frame(GATEWAY, vec![frame]);
    owner.pass(10);
    assert!(matches!(owner.replies[&id], Outcome::Done(_)), "{:?}", owner.replies[&id]);
    assert_eq!(owner.totals().1, 10);
}

#[test]
fn moderation_is_enforced_and_survives_the_owner() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    let sanction = |seconds| vec![Sanction { user: "eve".into(), seconds }];
    assert_eq!(
        owner.change(RoomChange { actor: "ann".into(), mute: sanction(60), ..RoomChange::default() }).unwrap_err(),
        Refusal::Forbidden
    );
    owner.change(RoomChange { owner: "ann".into(), ..RoomChange::default() }).unwrap();
    let room = owner
        .change(RoomChange { actor: "ann".into(), mute: sanction(60), ..RoomChange::default() })
        .expect("the owner may");
    assert_eq!((room.owner.as_str(), room.muted.len()), ("ann", 1));
    assert_eq!(owner.publish("eve", b"x"), Err(Refusal::Sanctioned));
    let mut next = Owner::with_items(owner.items.clone(), 2);
    next.join(GATEWAY, 1);
    assert_eq!(next.publish("eve", b"x"), Err(Refusal::Sanctioned));
    next.change(RoomChange {
        actor: "ann".into(),
        mute: sanction(0),
        slow_mode_ms: Some(30_000),
        ..RoomChange::default()
    })
    .expect("the owner may");
    assert_eq!(next.publish("eve", b"x"), Ok(()));
    assert_eq!(next.publish("eve", b"x"), Err(Refusal::TooSoon));
    assert_eq!(next.publish("ann", b"x"), Ok(()));
    assert_eq!(next.publish("ann", b"x"), Ok(()), "slow mode spares the owner");
    next.pushes.clear();
    next.change(RoomChange { actor: "ann".into(), kick: sanction(60), ..RoomChange::default() }).unwrap();
    assert!(
        next.pushes.iter().any(|(_, push)| matches!(push, push::Push::RoomKick(kick) if kick.user == "eve")),
        "gateways are told at once"
    );
    assert_eq!(next.join(OTHER_GATEWAY, 1).kicked.len(), 1, "and those that come later, too");
    assert_eq!(next.publish("eve", b"x"), Err(Refusal::Sanctioned));
}

/// What comes together when a shard moves: gateways resend what the last owner did not answer, and then say which rooms they are in.
#[test]
fn messages_wait_until_all_gateways_have_announced_their_rooms() {
    let mut owner = Owner::acquire(BTreeMap::new(), 2);
    let (resent, one) = owner.request(publish("ann", b"one"), true);
    let (new, two) = owner.request(publish("ann", b"two"), false);
    let join = |last| body::Body::RoomJoin(RoomJoin { room: ROOM.into(), viewers: 1, last, ..RoomJoin::default() });
    let (_, joins) = owner.request(join(6), true);
    let (_, announced) = owner.request(body::Body::Announced(Announced {}), false);
    owner.frame(GATEWAY, vec![one, two, joins, announced]);
    assert!(!owner.replies.contains_key(&resent) && !owner.replies.contains_key(&new), "others may be in the room");
    owner.ask(WATCHER, body::Body::Announced(Announced {})).unwrap();
    let (_, joins) = owner.request(join(7), false);
    let (_, announced) = owner.request(body::Body::Announced(Announced {}), false);
    owner.frame(OTHER_GATEWAY, vec![joins, announced]);
    for id in [resent, new] {
        assert!(matches!(owner.replies[&id], Outcome::Done(_)));
    }
    assert_eq!(owner.messages(GATEWAY), [8, 9], "numbers go on");
    assert_eq!(owner.messages(OTHER_GATEWAY), [8, 9]);
}

#[test]
fn messages_wait_for_a_gateway_that_says_nothing_only_so_long_and_only_so_many() {
    let mut owner = Owner::acquire(BTreeMap::new(), 2);
    owner.join(GATEWAY, 1);
    let mut waiting = Vec::new();
    for _ in 0..21 {
        let (id, frame) = owner.request(publish("ann", &vec![0; 200 << 10]), false);
        owner.frame(GATEWAY, vec![frame]);
        waiting.push(id);
    }
    assert_eq!(owner.publish("ann", b"more"), Err(Refusal::Busy));
    assert!(waiting.iter().all(|id| !owner.replies.contains_key(id)));
    owner.pass(ANNOUNCE_WAIT_MS);
    assert!(waiting.iter().all(|id| owner.replies.contains_key(id)));
    assert_eq!(owner.messages(GATEWAY)[0], 1);
    assert_eq!(owner.publish("ann", b"more"), Err(Refusal::Busy), "its hands are full");
}

#[test]
fn a_shard_that_leaves_and_a_link_that_ends_take_with_them_what_waits() {
    let mut owner = Owner::acquire(BTreeMap::new(), 2);
    owner.join(OTHER_GATEWAY, 1);
    let (_, frame) = owner.request(publish("ann", b"lost with the link"), false);
    owner.frame(GATEWAY, vec![frame]);
    owner.handle(Input::LinkClosed { link: GATEWAY });
    owner.pass(ANNOUNCE_WAIT_MS);
    assert!(owner.messages(OTHER_GATEWAY).is_empty(), "it comes again over the next link");

    let mut owner = Owner::acquire(BTreeMap::new(), 2);
    owner.join(GATEWAY, 1);
    let (id, frame) = owner.request(publish("ann", b"for the next owner"), false);
    owner.frame(GATEWAY, vec![frame]);
    owner.handle(Input::ReleaseAll);
    owner.pass(ANNOUNCE_WAIT_MS);
    assert!(owner.messages(GATEWAY).is_empty());
    assert!(!owner.replies.contains_key(&id));
}

#[test]
fn gateways_without_viewers_get_no_messages_and_do_not_make_room_for_them() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    owner.join(OTHER_GATEWAY, 0);
    while owner.publish("ann", &[0; 10_000]).is_ok() {
        assert!(owner.messages(GATEWAY).last().unwrap() < &100, "who only watches the statistics has no hands");
    }
    assert_eq!((owner.messages(OTHER_GATEWAY), owner.core.stats().room_dropped), (vec![], 0));
    owner.join(OTHER_GATEWAY, 1);
    assert_eq!(owner.publish("ann", b"more"), Ok(()));
    assert_eq!(owner.messages(OTHER_GATEWAY).len(), 1);
    owner.join(OTHER_GATEWAY, 0);
    assert_eq!(owner.publish("ann", b"more"), Err(Refusal::Busy), "to join again frees no hands");
}

#[test]
fn a_room_with_all_the_gifts_it_can_count_says_so_and_counts_likes() {
    let mut owner = Owner::new();
    owner.join(GATEWAY, 1);
    let names: Vec<String> = (0..65).map(|number| format!("gift/{number:02}")).collect();
    let gifts: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    let refused = |outcome: Option<Outcome>| match outcome {
        Some(Outcome::RoomCounted(counted)) => counted.refused.into_iter().map(|refused| refused.name).collect(),
        Some(Outcome::Done(_)) => Vec::new(),
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(owner.ask(GATEWAY, counts(1, 1, &gifts))), ["gift/64"]);
    assert_eq!(refused(owner.ask(GATEWAY, counts(1, 1, &gifts))), ["gift/64"], "the same when it is sent again");
    let all = [("gift/64", 1), ("gift/00", 1), ("like", 5)];
    assert_eq!(refused(owner.ask(GATEWAY, counts(2, 1, &all))), ["gift/64"]);
    assert_eq!(refused(owner.ask(GATEWAY, counts(3, 1, &[("like", 5)]))), Vec::<String>::new());
    assert_eq!(owner.totals().1, 10, "nothing takes the likes' place");
}

#[test]
fn rooms_that_nobody_needs_leave_memory_while_others_are_written() {
    let mut owner = Owner::new();
    owner.totals();
    owner.store_refuses = true;
    let counted = vec![Count { name: "like".into(), count: 3 }];
    let rooms = vec![RoomCount { room: "busy".into(), viewers: 0, counted }];
    let counts = |number| body::Body::RoomCounts(RoomCounts { number, rooms: rooms.clone() });
    let (id, frame) = owner.request(counts(1), true);
    owner.frame(GATEWAY, vec![frame]);
    for _ in 0..90 {
        owner.pass(1_000);
    }
    assert_eq!(owner.loads, [ROOM, "busy"]);
    assert!(!owner.replies.contains_key(&id), "what was sent before is not refused");
    owner.store_refuses = false;
    owner.pass(1_000);
    assert!(matches!(owner.replies[&id], Outcome::Done(_)));
    owner.totals();
    assert_eq!(owner.loads, [ROOM, "busy", ROOM], "the idle one was forgotten, the other not");
    assert!(owner.items.contains_key(&keys::room_counts("busy")), "it is stored");
}
