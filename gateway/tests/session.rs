//! The session's state machine: the table of what clients may do, for both versions, and delivery under random interleavings.
#![allow(clippy::unwrap_used)]

#[path = "../fuzz/harness.rs"]
#[allow(dead_code)] // the bytes are for others
mod harness;

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use harness::{connect, shared};
use im_gateway::mqtt::{Connect, Packet, Publish, Reason, Subscribe, Version, Will};
use im_gateway::session::{
    Answer, Counter, Effects, End, Identity, RoomEffect, RoomPart, Session, SessionRequest, Shared, Versions, Window,
};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Cursor, Deliver, Done, Entry, Fetched, Head, HeadList, IndexRow, KickReason, KickSession, Marked, Recipient,
    Refusal, Refused, Registered, RoomMessage, SessionNumber, Stored, Taken, body,
};
use mqtt_protocol_core::mqtt::packet::{v3_1_1, v5_0};
use proptest::prelude::*;

const NUMBER: SessionNumber = SessionNumber { epoch: 3, counter: 7 };

/// Conversations of alice.
const CONVERSATIONS: [&str; 2] = ["u/alice/bob", "u/alice/carol"];

/// A session and what it wants done.
struct Driven {
    session: Session,
    effects: Effects,
    shared: Arc<Shared>,
    now_ms: u64,
}

impl Driven {
    fn open(connect: &Connect<'_>) -> Result<Self, Reason> {
        let shared = shared();
        let mut effects = Effects::default();
        let authenticate = |_: &str, _: Option<&[u8]>| Ok(Identity { expires_at_ms: Some(500_000) });
        let session =
            Session::open(&shared, 16, 0, 1, connect, authenticate, &mut effects).map_err(|refused| refused.reason)?;
        Ok(Self { session, effects, shared, now_ms: 0 })
    }

    fn registered(connect: &Connect<'_>, registered: Registered) -> Self {
        let mut driven = Self::open(connect).unwrap();
        driven.answer_next(Outcome::Registered(Registered { number: Some(NUMBER), ..registered }));
        let packets = driven.packets();
        assert_eq!(packets[0].0, 0x20, "{packets:?}");
        driven
    }

    fn live(version: Version) -> Self {
        Self::registered(&connect(version), Registered::default())
    }

    /// With inbox/# subscribed and nothing in the index.
    fn subscribed(version: Version) -> Self {
        let mut driven = Self::live(version);
        driven.subscribe("inbox/#");
        driven.answer_next(Outcome::Done(Done {}));
        assert_eq!(driven.packets().last().unwrap().0, 0x90);
        driven
    }

    fn next_request(&mut self) -> SessionRequest {
        assert!(!self.effects.requests.is_empty(), "a request is expected");
        self.effects.requests.remove(0)
    }

    fn answer_next(&mut self, outcome: Outcome) -> body::Body {
        let request = self.next_request();
        let ticket = request.ticket.unwrap();
        self.session.on_answer(self.now_ms, ticket, Answer::Outcome(outcome), &mut self.effects);
        request.body.body.unwrap()
    }

    fn refuse_next(&mut self, code: Refusal) {
        self.answer_next(Outcome::Refused(Refused { code: code.into(), reason: String::new() }));
    }

    fn packet(&mut self, packet: Packet<'_>) {
        self.session.on_packet(self.now_ms, packet, &mut self.effects);
    }

    fn publish(&mut self, packet_id: u16, topic: &str, payload: &[u8]) {
        let qos = u8::from(packet_id != 0);
        self.packet(Packet::Publish(Publish {
            topic,
            payload,
            qos,
            dup: false,
            retain: false,
            packet_id,
            topic_alias: false,
            id: None,
        }));
    }

    fn subscribe(&mut self, filter: &str) {
        self.packet(Packet::Subscribe(Subscribe { packet_id: 1, has_identifier: false, filters: vec![(filter, 1)] }));
    }

    fn tick(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
        self.session.on_tick(now_ms, &mut self.effects);
    }

    fn deliver(&mut self, seq: u64) {
        self.deliver_in(CONVERSATIONS[0], entry(seq));
    }

    fn deliver_in(&mut self, conversation: &str, entry: Entry) {
        let recipient = Recipient { user: "alice".to_owned(), from_seq: 1, to_seq: 0, as_of: 0 };
        let (conversation, recipients) = (conversation.to_owned(), vec![recipient.clone()]);
        let deliver = Deliver { conversation, entry: Some(entry), recipients };
        self.session.on_deliver(self.now_ms, &deliver, &recipient, &mut self.effects);
    }

    /// First byte and body of all packets that wait.
    fn packets(&mut self) -> Vec<(u8, Vec<u8>)> {
        let mut bytes = self.session.take_output().take_bytes();
        self.session.on_written(self.now_ms, &mut self.effects);
        let mut packets = Vec::new();
        while !bytes.is_empty() {
            let (mut length, mut index) = (0, 1);
            loop {
                length |= usize::from(bytes[index] & 0x7F) << (7 * (index - 1));
                index += 1;
                if bytes[index - 1] & 0x80 == 0 {
                    break;
                }
            }
            packets.push((bytes[0], bytes[index..index + length].to_vec()));
            bytes = bytes.slice(index + length..);
        }
        packets
    }
}

fn entry(seq: u64) -> Entry {
    let payload = Bytes::from(seq.to_string());
    Entry {
        seq,
        ts_ms: 1,
        sender: "bob".to_owned(),
        device: "tablet".to_owned(),
        client_id: "c".to_owned(),
        kind: 0,
        payload,
    }
}

#[test]
fn what_a_connect_is_refused_for() {
    let v5 = || connect(Version::V5);
    let will = |topic, qos, retain| Some(Will { topic, payload: b"x", qos, retain });
    let cases = [
        (Connect { username: None, ..v5() }, Reason::BadCredentials),
        (Connect { username: Some("al ice"), ..v5() }, Reason::BadCredentials),
        (Connect { client_id: "a/b", ..v5() }, Reason::ClientIdNotValid),
        (Connect { client_id: "", ..connect(Version::V311) }, Reason::ClientIdNotValid),
        (Connect { will: will("u/bob", 0, false), ..v5() }, Reason::TopicNameInvalid),
        (Connect { will: will("r/stage", 2, false), ..v5() }, Reason::QosNotSupported),
        (Connect { will: will("r/stage", 0, true), ..v5() }, Reason::RetainNotSupported),
    ];
    for (connect, reason) in cases {
        assert_eq!(Driven::open(&connect).map(|_| ()), Err(reason), "{connect:?}");
    }
    assert!(Driven::open(&Connect { client_id: "", ..v5() }).is_ok(), "MQTT 5 assigns an id");
}

#[test]
fn connack_announces_the_limits() {
    let mut driven = Driven::open(&Connect {
        keep_alive_s: 0,
        session_expiry_s: Some(u32::MAX),
        client_id: "",
        ..connect(Version::V5)
    })
    .unwrap();
    assert!(driven.packets().is_empty(), "no CONNACK before the owner registered it");
    let registered = Registered { number: Some(NUMBER), session_present: true, ..Registered::default() };
    let body::Body::Register(register) = driven.answer_next(Outcome::Registered(registered)) else {
        panic!("not a Register")
    };
    assert_eq!(register.expiry_s, 1_000);
    let (connack, _) = v5_0::Connack::parse(&driven.packets()[0].1).unwrap();
    assert!(connack.session_present());
    let text = format!("{connack:?}");
    for property in [
        "ReceiveMaximum",
        "MaximumQos",
        "RetainAvailable",
        "AssignedClientIdentifier",
        "ServerKeepAlive",
        "MaximumPacketSize",
    ] {
        assert!(
            text.contains(property) || text.to_lowercase().contains(&property.to_lowercase()),
            "{property}: {text}"
        );
    }
    let mut silent = Driven::open(&connect(Version::V311)).unwrap();
    silent.tick(10_000);
    assert_eq!(silent.packets(), [(0x20, vec![0, 3])]);
    assert!(silent.session.is_ended());
    silent.answer_next(Outcome::Registered(Registered { number: Some(NUMBER), ..Registered::default() }));
    assert!(
        matches!(silent.next_request().body.body, Some(body::Body::Close(_))),
        "a late registration is closed again"
    );
}

#[test]
fn what_publishes_are_answered_in_mqtt_5() {
    let refused = |code: Refusal| Outcome::Refused(Refused { code: code.into(), reason: String::new() });
    let cases = [
        ("u/bob", "x", Some(Outcome::Stored(Stored { seq: 5, ts_ms: 9 })), Reason::Success),
        ("g/team", "x", Some(refused(Refusal::NotAMember)), Reason::NotAuthorized),
        ("g/team", "x", Some(refused(Refusal::IdReused)), Reason::ImplementationSpecific),
        ("g/team", "x", Some(refused(Refusal::NotFound)), Reason::TopicNameInvalid),
        ("g/team", "x", Some(refused(Refusal::Busy)), Reason::QuotaExceeded),
        ("g/team", "x", Some(refused(Refusal::StoreUnavailable)), Reason::Unspecified),
        ("r/stage", "x", Some(Outcome::Done(Done {})), Reason::Success),
        ("read/u/bob", "7", Some(Outcome::Marked(Marked { seq: 7 })), Reason::Success),
        ("read/g/team", "x", None, Reason::PayloadFormatInvalid),
        ("elsewhere", "x", None, Reason::TopicNameInvalid),
        ("r/stage/like", "x", None, Reason::PayloadFormatInvalid),
        ("r/stage/gift/rose", "0", None, Reason::PayloadFormatInvalid),
        ("r/stage", "x", Some(refused(Refusal::Sanctioned)), Reason::NotAuthorized),
        ("r/stage", "x", Some(refused(Refusal::TooSoon)), Reason::ImplementationSpecific),
    ];
    for (topic, payload, outcome, reason) in cases {
        let mut driven = Driven::live(Version::V5);
        driven.publish(3, topic, payload.as_bytes());
        if let Some(outcome) = outcome {
            assert!(driven.packets().is_empty(), "{topic}: no PUBACK before the owner's word");
            driven.answer_next(outcome);
        }
        let packets = driven.packets();
        let (puback, _) = v5_0::Puback::parse(&packets[0].1).unwrap();
        assert_eq!(
            (puback.packet_id(), puback.reason_code().map_or(0, |code| code as u8)),
            (3, reason.code()),
            "{topic}"
        );
        assert_eq!(driven.shared.metrics.refusals(reason), u64::from(reason != Reason::Success), "{topic}");
        assert!(!driven.session.is_ended());
    }
}

#[test]
fn what_ends_a_connection() {
    let publish = Publish {
        topic: "u/bob",
        payload: b"x",
        qos: 1,
        dup: false,
        retain: false,
        packet_id: 1,
        topic_alias: false,
        id: None,
    };
    let cases = [
        (Packet::Publish(Publish { qos: 2, ..publish }), Reason::QosNotSupported),
        (Packet::Publish(Publish { retain: true, ..publish }), Reason::RetainNotSupported),
        (Packet::Publish(Publish { topic_alias: true, ..publish }), Reason::TopicAliasInvalid),
        (
            Packet::Subscribe(Subscribe { packet_id: 1, has_identifier: true, filters: vec![("inbox/#", 1)] }),
            Reason::SubscriptionIdsNotSupported,
        ),
        (Packet::Connect(Box::new(connect(Version::V5))), Reason::ProtocolError),
    ];
    for version in [Version::V5, Version::V311] {
        for (packet, reason) in &cases {
            let mut driven = Driven::live(version);
            driven.packet(packet.clone());
            assert!(driven.session.is_ended(), "{packet:?}");
            let first = driven.packets().first().map(|(first, body)| (*first, body[0]));
            assert_eq!(first, (version == Version::V5).then_some((0xE0, reason.code())), "{packet:?}");
            assert!(
                matches!(driven.next_request().body.body, Some(body::Body::Close(close)) if close.number == Some(NUMBER))
            );
        }
    }
    let mut driven = Driven::live(Version::V5);
    (1..=5).for_each(|id| driven.publish(id, "u/bob", b"x"));
    assert_eq!(driven.packets()[0].1[0], Reason::ReceiveMaximumExceeded.code());
    let mut driven = Driven::live(Version::V5);
    driven.publish(1, "u/bob", b"x");
    driven.tick(10_000);
    assert_eq!(driven.packets()[0].1[0], Reason::ServerBusy.code(), "no outcome in 10 s");
    let mut driven = Driven::live(Version::V5);
    driven.tick(90_001);
    assert_eq!(driven.packets()[0].1[0], Reason::KeepAliveTimeout.code());
    let mut driven =
        Driven::registered(&Connect { keep_alive_s: 100, ..connect(Version::V311) }, Registered::default());
    driven.now_ms = 499_999;
    driven.packet(Packet::PingReq);
    driven.tick(500_000);
    assert!(driven.session.is_ended(), "the token expired");
}

#[test]
fn what_3_1_1_is_told_of_refusals() {
    let mut driven = Driven::subscribed(Version::V311);
    driven.publish(3, "g/team", b"x");
    driven.refuse_next(Refusal::NotAMember);
    let packets = driven.packets();
    assert_eq!(packets[1], (0x40, vec![0, 3]));
    let (notice, _) = v3_1_1::Publish::parse(packets[0].0 & 15, packets[0].1.clone().into()).unwrap();
    assert_eq!(notice.topic_name(), "inbox/refused");
    let json: serde_json::Value = serde_json::from_slice(notice.payload().as_slice()).unwrap();
    assert_eq!((&json["packetId"], &json["topic"]), (&3.into(), &"g/team".into()));
    driven.publish(4, "g/team", b"x");
    driven.refuse_next(Refusal::Busy);
    assert!(driven.session.is_ended() && driven.packets().is_empty(), "refused for now: no PUBACK, closed");
    let mut deaf = Driven::live(Version::V311);
    deaf.publish(3, "nowhere", b"x");
    assert!(deaf.session.is_ended() && deaf.packets().is_empty(), "nobody would read a notice");
}

#[test]
fn filters_are_granted_or_refused() {
    let cases = [
        ("inbox/u/bob/#", Reason::TopicFilterInvalid),
        ("u/bob", Reason::TopicFilterInvalid),
        ("$share/a/inbox/#", Reason::SharedSubscriptionsNotSupported),
    ];
    for (filter, reason) in cases {
        let mut driven = Driven::live(Version::V5);
        driven.subscribe(filter);
        assert_eq!(driven.packets()[0].1.last(), Some(&reason.code()), "{filter}");
        let mut driven = Driven::live(Version::V311);
        driven.subscribe(filter);
        assert_eq!(driven.packets(), [(0x90, vec![0, 1, 0x80])], "{filter}");
    }
}

#[test]
fn a_session_enters_counts_and_leaves() {
    let mut driven = Driven::live(Version::V5);
    driven.subscribe("r/stage");
    driven.subscribe("r/stage/stats");
    let entered = std::mem::take(&mut driven.effects.rooms);
    let parts: Vec<_> = entered
        .iter()
        .filter_map(|effect| match effect {
            RoomEffect::Enter { room, part, .. } => Some((&**room, *part)),
            _ => None,
        })
        .collect();
    assert_eq!(parts, [("stage", RoomPart::Messages), ("stage", RoomPart::Stats)]);
    for effect in &entered {
        if let RoomEffect::Enter { ticket, .. } = effect {
            driven.session.on_answer(0, *ticket, Answer::Outcome(Outcome::Done(Done {})), &mut driven.effects);
        }
    }
    assert_eq!(driven.packets().len(), 2, "two SUBACKs");
    for payload in ["", "3", ""] {
        driven.publish(0, "r/stage/like", payload.as_bytes());
    }
    driven.publish(7, "r/stage/like", b"");
    let stage = || Arc::from("stage");
    let ticket = match &driven.effects.rooms[..] {
        [
            RoomEffect::Count { counter: Counter::Like, count: 5, ticket: None, .. },
            RoomEffect::Count { count: 1, ticket: Some(ticket), .. },
        ] => *ticket,
        other => panic!("what nobody waits for is merged: {other:?}"),
    };
    assert!(driven.packets().is_empty(), "no PUBACK before it is stored");
    driven.session.on_answer(0, ticket, Answer::Outcome(Outcome::Done(Done {})), &mut driven.effects);
    assert_eq!(driven.packets(), [(0x40, vec![0, 7])]);
    driven.effects.rooms.clear();
    driven.packet(Packet::Unsubscribe { packet_id: 9, filters: vec!["r/stage", "r/other"] });
    assert_eq!(driven.effects.rooms, [RoomEffect::Leave { room: stage(), part: RoomPart::Messages }]);
    driven.effects.rooms.clear();
    driven.session.end(End::Broken, &mut driven.effects);
    assert_eq!(driven.effects.rooms, [RoomEffect::Leave { room: stage(), part: RoomPart::Stats }]);
}

#[test]
fn a_batch_goes_to_the_socket_when_nothing_waits_before_it() {
    let batch = |sizes: &[usize]| {
        let mut window = Window::default();
        for (index, size) in sizes.iter().enumerate() {
            let payload = vec![b'x'; *size].into();
            window.push(
                &RoomMessage { room: "r".into(), number: index as u64 + 1, payload, ..RoomMessage::default() },
                Versions::BOTH,
            );
        }
        window.cut(0)
    };
    for version in [Version::V5, Version::V311] {
        let mut driven = Driven::live(version);
        assert!(driven.packets().is_empty(), "CONNACK is written");
        let mut written = Vec::new();
        let sent = driven.session.on_room_batch(&batch(&[10, 20]), |bytes| {
            written.extend_from_slice(bytes);
            bytes.len()
        });
        assert_eq!((sent.delivered, sent.lost, sent.wakes), (2, 0, false));
        assert!(!driven.session.has_output());
        // The socket takes a part: the rest waits, and what follows waits behind it.
        let sent = driven.session.on_room_batch(&batch(&[10]), |_| 3);
        assert!(sent.wakes && driven.session.has_output());
        let sent = driven.session.on_room_batch(&batch(&[10]), |_| panic!("something waits before it"));
        assert_eq!((sent.delivered, sent.wakes), (1, false));
        let taken = driven.session.take_output();
        let sent = driven.session.on_room_batch(&batch(&[10]), |_| panic!("the task is writing"));
        assert_eq!(sent.delivered, 1);
        drop(taken);
    }
    let mut small =
        Driven::registered(&Connect { packet_size_max: Some(64), ..connect(Version::V5) }, Registered::default());
    let sent = small.session.on_room_batch(&batch(&[10, 100, 11]), |_| 0);
    assert_eq!((sent.delivered, sent.lost), (2, 1), "what the client can't take is left out");
    assert_eq!(small.packets().len(), 2);
}

#[test]
fn others_write_for_the_task_only_what_comes_next() {
    let mut driven = Driven::subscribed(Version::V5);
    assert!(driven.packets().is_empty(), "the task has written what it took");
    driven.deliver(1);
    driven.deliver(2);
    let mut written = Vec::new();
    // The socket takes a part, then the rest.
    for takes in [5, usize::MAX] {
        driven.session.write_out(0, &mut driven.effects, |slices| {
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            let taken = takes.min(bytes.len());
            written.extend_from_slice(&bytes[..taken]);
            taken
        });
    }
    assert!(!driven.session.has_output());
    let mut alone = Driven::subscribed(Version::V5);
    alone.deliver(1);
    alone.deliver(2);
    assert_eq!(written, alone.session.take_output().take_bytes());

    // The task has something in hand: what is behind that waits for it, as a room's messages do.
    alone.deliver(3);
    alone.session.write_out(0, &mut alone.effects, |_| panic!("the task is writing"));
    assert!(alone.session.has_output());
    driven.session.end(End::Server(Reason::UseAnotherServer, "over"), &mut driven.effects);
    driven.session.write_out(0, &mut driven.effects, |_| panic!("the last words are the task's"));
    assert!(driven.session.has_output());
}

#[test]
fn a_new_device_gets_what_is_unread_and_a_known_one_what_it_has_not_acknowledged() {
    let index = vec![IndexRow { conversation: "u/alice/bob".to_owned(), from_seq: 1, to_seq: 0, as_of: 0 }];
    let head = Head { conversation: "u/alice/bob".to_owned(), head: 5_000, own_mark: 10, ..Head::default() };
    let mut new =
        Driven::registered(&connect(Version::V5), Registered { index: index.clone(), ..Registered::default() });
    new.subscribe("inbox/#");
    new.answer_next(Outcome::Heads(HeadList { heads: vec![head.clone()] }));
    let body::Body::Subscribe(subscribe) = new.answer_next(Outcome::Done(Done {})) else { panic!("not a Subscribe") };
    assert_eq!(subscribe.cursors[0].seq, 4_000, "at most catchUp");
    assert!(matches!(new.next_request().body.body, Some(body::Body::Fetch(fetch)) if fetch.from == 4_001));

    let cursors = vec![Cursor { conversation: "u/alice/bob".to_owned(), seq: 4_990 }];
    let row = Registered { index, cursors, session_present: true, subscribed: true, ..Registered::default() };
    let mut known = Driven::registered(&connect(Version::V5), row);
    known.answer_next(Outcome::Heads(HeadList { heads: vec![head] }));
    assert!(matches!(known.next_request().body.body, Some(body::Body::Fetch(fetch)) if fetch.from == 4_991));
}

/// Alice with an index of two conversations, whose heads are asked of two owners.
fn with_an_index() -> Driven {
    let row = |id: &str| IndexRow { conversation: id.to_owned(), from_seq: 1, to_seq: 0, as_of: 0 };
    let index = CONVERSATIONS.map(row).to_vec();
    Driven::registered(&connect(Version::V5), Registered { index, ..Registered::default() })
}

fn no_heads() -> Outcome {
    Outcome::Heads(HeadList::default())
}

#[test]
fn heads_of_a_subscribe_that_was_refused_count_for_no_later_one() {
    let mut driven = with_an_index();
    driven.subscribe("inbox/#");
    let late = driven.effects.requests.remove(1).ticket.unwrap();
    driven.refuse_next(Refusal::StoreUnavailable);
    assert_eq!(driven.packets()[0].1.last(), Some(&Reason::Unspecified.code()));
    driven.subscribe("inbox/#");
    driven.session.on_answer(0, late, Answer::Outcome(no_heads()), &mut driven.effects);
    driven.answer_next(no_heads());
    assert_eq!(driven.effects.requests.len(), 1, "nothing is written before the second owner's heads");
    assert!(matches!(driven.answer_next(no_heads()), body::Body::Heads(_)));
    assert!(matches!(driven.answer_next(Outcome::Done(Done {})), body::Body::Subscribe(_)));
    assert_eq!(driven.packets()[0].1.last(), Some(&1));
}

#[test]
fn an_unsubscribe_right_behind_its_subscribe_undoes_it() {
    // While heads are asked for, and while the owner writes the subscription.
    for heads in [0, 2] {
        let mut driven = with_an_index();
        driven.subscribe("inbox/#");
        (0..heads).for_each(|_| drop(driven.answer_next(no_heads())));
        let late: Vec<_> = driven.effects.requests.drain(..).collect();
        driven.packet(Packet::Unsubscribe { packet_id: 2, filters: vec!["inbox/#"] });
        assert_eq!(driven.effects.cancel.len(), late.len());
        assert_eq!(driven.packets(), [(0x90, vec![0, 1, 0, 1])], "the SUBACK comes first");
        for request in late {
            let done = Answer::Outcome(Outcome::Done(Done {}));
            driven.session.on_answer(0, request.ticket.unwrap(), done, &mut driven.effects);
        }
        driven.deliver(1);
        let body::Body::Subscribe(subscribe) = driven.answer_next(Outcome::Done(Done {})) else { panic!("none") };
        assert!(!subscribe.subscribed);
        assert_eq!(driven.packets(), [(0xB0, vec![0, 2, 0, 0])], "and nothing is delivered");
        assert!(driven.effects.requests.is_empty());
    }
}

#[test]
fn who_could_not_unsubscribe_misses_nothing() {
    let mut driven = with_an_index();
    driven.subscribe("inbox/#");
    driven.answer_next(no_heads());
    driven.answer_next(no_heads());
    driven.answer_next(Outcome::Done(Done {}));
    driven.packet(Packet::Unsubscribe { packet_id: 2, filters: vec!["inbox/#"] });
    driven.deliver(1);
    driven.refuse_next(Refusal::StoreUnavailable);
    driven.tick(1_000);
    let asked: Vec<_> = driven.effects.requests.iter().map(|request| request.body.body.as_ref().unwrap()).collect();
    assert!(matches!(asked[..], [body::Body::Heads(_), body::Body::Heads(_)]), "{asked:?}");
}

#[test]
fn what_was_asked_of_the_last_owner_in_the_sessions_name_is_asked_behind_the_announcement() {
    let mut driven = Driven::live(Version::V5);
    driven.subscribe("inbox/#");
    let to_last = driven.next_request().ticket.unwrap();
    driven.session.announce(0, &mut driven.effects);
    assert_eq!(driven.effects.cancel.len(), 1);
    // The new owner has not heard of the session when that reaches it.
    let stale = Refused { code: Refusal::StaleSession.into(), reason: String::new() };
    driven.session.on_answer(0, to_last, Answer::Outcome(Outcome::Refused(stale)), &mut driven.effects);
    let announced =
        driven.answer_next(Outcome::Registered(Registered { number: Some(NUMBER), ..Registered::default() }));
    assert!(matches!(announced, body::Body::Register(register) if register.number == Some(NUMBER)));
    let body::Body::Subscribe(subscribe) = driven.answer_next(Outcome::Done(Done {})) else { panic!("no Subscribe") };
    assert!(subscribe.subscribed);
    assert_eq!(driven.packets().last().unwrap().0, 0x90, "SUBACK");

    driven.packet(Packet::Unsubscribe { packet_id: 2, filters: vec!["inbox/#"] });
    driven.next_request();
    driven.session.announce(0, &mut driven.effects);
    driven.answer_next(Outcome::Registered(Registered { number: Some(NUMBER), ..Registered::default() }));
    let body::Body::Subscribe(subscribe) = driven.answer_next(Outcome::Done(Done {})) else { panic!("no Subscribe") };
    assert!(!subscribe.subscribed);
    assert_eq!(driven.packets().last().unwrap().0, 0xB0, "UNSUBACK");
}

#[test]
fn a_dup_of_what_was_left_unanswered_goes_under_its_old_key() {
    let mut first = Driven::live(Version::V311);
    first.publish(9, "u/bob", b"x");
    first.session.end(End::Broken, &mut first.effects);
    let close = first.effects.requests.pop().unwrap().body.body;
    let Some(body::Body::Close(close)) = close else { panic!("{close:?}") };
    let mut taken: Vec<Taken> = close.taken;
    assert_eq!(taken.len(), 1);
    // Made by another process, whose keys are never ours.
    taken[0].key = Bytes::from_static(b"another boot's 1");
    for (payload, dup, same) in [(b"x", true, true), (b"y", true, false), (b"x", false, false)] {
        let mut next =
            Driven::registered(&connect(Version::V311), Registered { taken: taken.clone(), ..Registered::default() });
        let publish =
            Publish { topic: "u/bob", payload, qos: 1, dup, retain: false, packet_id: 9, topic_alias: false, id: None };
        next.packet(Packet::Publish(publish));
        let Some(body::Body::Send(send)) = next.next_request().body.body else { panic!("not a Send") };
        assert_eq!(send.key == taken[0].key, same, "{payload:?} {dup}");
    }
}

#[test]
fn what_was_left_unanswered_is_known_to_the_next_connection_alone() {
    let left = Taken { packet_id: 9, hash: 1, key: Bytes::from_static(b"another boot's 1") };
    let mut next =
        Driven::registered(&connect(Version::V311), Registered { taken: vec![left], ..Registered::default() });
    next.publish(7, "u/bob", b"x");
    next.next_request();
    next.session.end(End::Broken, &mut next.effects);
    let Some(body::Body::Close(close)) = next.next_request().body.body else { panic!("not a Close") };
    assert_eq!(close.taken.iter().map(|taken| taken.packet_id).collect::<Vec<_>>(), [7]);
}

#[test]
fn the_newer_session_wins() {
    let kick = |counter| KickSession {
        user: "alice".to_owned(),
        device: "phone".to_owned(),
        number: Some(SessionNumber { epoch: 3, counter }),
        reason: KickReason::TakenOver.into(),
    };
    let mut driven = Driven::live(Version::V5);
    driven.session.on_kick(&kick(6), &mut driven.effects);
    assert!(!driven.session.is_ended(), "an older one was meant");
    driven.session.on_kick(&kick(7), &mut driven.effects);
    assert_eq!(driven.packets()[0].1[0], Reason::SessionTakenOver.code());
    let mut driven = Driven::live(Version::V5);
    driven.session.announce(0, &mut driven.effects);
    driven.refuse_next(Refusal::StaleSession);
    assert_eq!(driven.packets()[0].1[0], Reason::SessionTakenOver.code());
}

#[test]
fn late_acknowledgements_acknowledge_nothing() {
    let registered = Registered { connections: 16, ..Registered::default() };
    let mut driven = Driven::registered(&connect(Version::V5), registered);
    driven.subscribe("inbox/#");
    driven.answer_next(Outcome::Done(Done {}));
    driven.packets();
    driven.deliver(1);
    let packets = driven.packets();
    let (publish, _) = v5_0::Publish::parse(packets[0].0 & 15, packets[0].1.clone().into()).unwrap();
    assert_eq!(publish.packet_id(), Some(4_097), "the second of fifteen blocks");
    driven.packet(Packet::PubAck { packet_id: 1 });
    assert_eq!(driven.shared.metrics.unknown_puback.get(), 1);
    driven.tick(1_000);
    let cursor = |driven: &mut Driven| match driven.answer_next(Outcome::Done(Done {})) {
        body::Body::Cursors(cursors) => cursors.cursors[0].seq,
        other => panic!("{other:?}"),
    };
    assert_eq!(cursor(&mut driven), 0);
    driven.packet(Packet::PubAck { packet_id: 4_097 });
    driven.tick(2_000);
    assert_eq!(cursor(&mut driven), 1);
}

#[test]
fn an_owner_that_was_replaced_and_does_not_know_it_makes_nobody_miss_anything() {
    let mut driven = Driven::subscribed(Version::V5);
    let is_fetch = |request: &SessionRequest| matches!(&request.body.body, Some(body::Body::Fetch(fetch)) if fetch.conversation == CONVERSATIONS[0]);
    // Seq 1 is lost on the way; who is asked for it has not heard of it.
    driven.deliver(2);
    driven.answer_next(Outcome::Fetched(Fetched { entries: Vec::new(), next: 1, head: 0 }));
    assert!(driven.effects.requests.is_empty(), "he is not asked again at once");
    driven.tick(1_000);
    assert!(is_fetch(&driven.effects.requests[0]));
    driven.answer_next(Outcome::Fetched(Fetched { entries: vec![entry(1), entry(2)], next: 3, head: 2 }));
    assert_eq!(driven.packets().len(), 2);
    // Nor of a join.
    driven.effects.requests.clear();
    driven.deliver(4);
    driven.refuse_next(Refusal::NotAMember);
    driven.tick(2_000);
    let heads = driven.effects.requests.iter().position(|it| matches!(it.body.body, Some(body::Body::Heads(_))));
    let heads = driven.effects.requests.swap_remove(heads.unwrap()).ticket.unwrap();
    let known = Head { conversation: CONVERSATIONS[0].to_owned(), head: 4, ..Head::default() };
    let known = Answer::Outcome(Outcome::Heads(HeadList { heads: vec![known] }));
    driven.session.on_answer(2_000, heads, known, &mut driven.effects);
    assert!(driven.effects.requests.iter().any(is_fetch));
}

#[test]
fn who_left_and_came_back_misses_nothing_when_he_hears_of_his_leaving_last() {
    let mut driven = Driven::subscribed(Version::V5);
    driven.deliver(3);
    // While he fetches from 1, it is told that he left with 1; he came back with 2.
    let left = Recipient { user: "alice".to_owned(), from_seq: 1, to_seq: 1, as_of: 1 };
    let conversation = CONVERSATIONS[0].to_owned();
    let deliver = Deliver { conversation, entry: Some(entry(1)), recipients: vec![left.clone()] };
    driven.session.on_deliver(driven.now_ms, &deliver, &left, &mut driven.effects);
    driven.answer_next(Outcome::Fetched(Fetched { entries: vec![entry(2), entry(3)], next: 4, head: 3 }));
    assert_eq!(driven.packets().len(), 2);
}

#[test]
fn who_does_not_read_hears_of_read_marks_later() {
    let mut driven = Driven::subscribed(Version::V5);
    for seq in 1..=3 {
        driven.deliver_in(CONVERSATIONS[0], Entry { payload: Bytes::from(vec![b'x'; 3_000]), ..entry(seq) });
    }
    driven.session.on_read_state(CONVERSATIONS[0], "bob", 2);
    driven.tick(1_000);
    driven.effects.requests.retain(|request| matches!(request.body.body, Some(body::Body::Heads(_))));
    assert!(driven.effects.requests.is_empty(), "nothing is asked that can't be told");
    assert_eq!(driven.packets().len(), 3);
    driven.tick(2_000);
    let marked = Head { conversation: CONVERSATIONS[0].to_owned(), head: 3, peer_mark: 2, ..Head::default() };
    driven.answer_next(Outcome::Heads(HeadList { heads: vec![marked] }));
    let (first, body) = driven.packets().remove(0);
    let (publish, _) = v5_0::Publish::parse(first & 15, body.into()).unwrap();
    assert_eq!((publish.topic_name(), publish.payload().as_slice()), ("inbox/read/u/bob", b"2".as_slice()));
}

#[test]
fn who_does_not_read_holds_up_only_himself_and_loses_no_chat() {
    let mut driven = Driven::subscribed(Version::V5);
    let large = |seq| Entry { payload: Bytes::from(vec![b'x'; 3_000]), ..entry(seq) };
    let buffered = driven.shared.limits.send_buffer_bytes;
    for seq in 1..=40 {
        driven.deliver_in(CONVERSATIONS[0], large(seq));
    }
    // The window is ten; only as many went out as the buffer's part for deliveries takes.
    assert!(driven.effects.requests.is_empty(), "nothing is fetched that can't be sent");
    assert_eq!(driven.shared.metrics.delivered.get(), 3);
    assert_eq!(driven.shared.metrics.send_buffer_full.get(), 37);
    let mut window = Window::default();
    window.push(&RoomMessage { room: "r".into(), ..RoomMessage::default() }, Versions::BOTH);
    let sent = driven.session.on_room_batch(&window.cut(0), |_| panic!("chat waits before it"));
    assert_eq!((sent.delivered, sent.lost), (0, 1), "a room's message is lost");
    assert!(driven.session.wants_input(), "he is still heard and answered");
    for _ in 0..buffered {
        driven.packet(Packet::PingReq);
        if !driven.session.wants_input() {
            break;
        }
    }
    assert!(!driven.session.wants_input(), "until the answers that he does not read fill the buffer");
    let waiting = driven.session.take_output();
    assert!(waiting.len() <= buffered / 2 + 2, "{} of {buffered} bytes, as many may be with the socket", waiting.len());
    driven.session.on_written(0, &mut driven.effects);
    let request = driven.next_request();
    assert!(matches!(request.body.body, Some(body::Body::Fetch(fetch)) if (fetch.from, fetch.limit) == (4, 7)));
}

proptest! {
    /// However messages come and are forgotten, what is cut at a place is all that came behind it, packet by packet.
    #[test]
    fn a_window_gives_what_is_behind_a_place(steps in proptest::collection::vec((0u8..3, 0usize..200), 1..60)) {
        let message = |number: u64, size: usize| RoomMessage {
            room: "r".into(), number, payload: vec![b'x'; size].into(), ..RoomMessage::default()
        };
        let mut window = Window::default();
        let (mut first, mut sizes) = (0, Vec::new());
        for (step, argument) in steps {
            match step {
                0 => {
                    window.push(&message(sizes.len() as u64, argument), Versions::BOTH);
                    sizes.push(argument);
                }
                1 => {
                    let count = argument % (sizes.len() - first + 1);
                    window.forget(count as u64);
                    first += count;
                }
                _ => {
                    let from = argument % (sizes.len() - first + 1);
                    let batch = window.cut(from as u64);
                    for version in [Version::V5, Version::V311] {
                        let mut driven = Driven::live(version);
                        driven.packets();
                        driven.session.on_room_batch(&batch, |_| 0);
                        let expected: Vec<_> = (first + from..sizes.len()).flat_map(|number| {
                            let mut alone = Window::default();
                            alone.push(&message(number as u64, sizes[number]), Versions::BOTH);
                            let mut other = Driven::live(version);
                            other.packets();
                            other.session.on_room_batch(&alone.cut(0), |_| 0);
                            other.packets()
                        }).collect();
                        prop_assert_eq!(driven.packets(), expected);
                    }
                    prop_assert_eq!(batch.len() as usize, sizes.len() - first - from);
                }
            }
        }
    }
}

proptest! {
    /// Whatever the order of pushes, answers, acknowledgements and lost hints, and however small the window: each seq of each
    /// conversation once, in order, and never more unacknowledged than the client takes.
    #[test]
    fn each_seq_is_delivered_once_and_in_order(steps in proptest::collection::vec((0u8..8, 0usize..8), 1..300), window in 1u16..8) {
        let mut driven = Driven::registered(&Connect { receive_maximum: window, ..connect(Version::V5) }, Registered::default());
        driven.subscribe("inbox/#");
        driven.answer_next(Outcome::Done(Done {}));
        driven.packets();
        let mut logs = [0; CONVERSATIONS.len()];
        let mut hints: VecDeque<(usize, u64)> = VecDeque::new();
        let mut requests: Vec<SessionRequest> = Vec::new();
        let mut unacked: Vec<u16> = Vec::new();
        let mut seen: [Vec<u64>; CONVERSATIONS.len()] = Default::default();
        // At the end all is delivered, answered and acknowledged, after one more hint in each that is not lost.
        let finish = [(0, 0), (0, 1)].into_iter().chain(std::iter::repeat_n([(1, 0), (3, 0), (4, 0), (6, 0)], 800).flatten());
        for (kind, pick) in steps.into_iter().chain(finish) {
            let of = pick % CONVERSATIONS.len();
            match kind {
                0 => { logs[of] += 1; hints.push_back((of, logs[of])); }
                1 => if !hints.is_empty() {
                    let (of, seq) = hints.remove(pick % hints.len()).unwrap();
                    driven.deliver_in(CONVERSATIONS[of], entry(seq));
                },
                2 => if !hints.is_empty() {
                    // Only a hint that another follows may get lost for good; the last one is repeated by the owner.
                    let lost = pick % hints.len();
                    let (of, seq) = hints[lost];
                    if seq != logs[of] { hints.remove(lost); }
                },
                3 => if !requests.is_empty() {
                    let request = requests.remove(pick % requests.len());
                    let outcome = match request.body.body {
                        Some(body::Body::Fetch(fetch)) => {
                            let of = CONVERSATIONS.iter().position(|id| *id == fetch.conversation).unwrap();
                            let last = logs[of].min(fetch.from + u64::from(fetch.limit) - 1);
                            let entries = (fetch.from..=last).map(entry).collect();
                            Outcome::Fetched(Fetched { entries, next: last + 1, head: logs[of] })
                        }
                        _ => Outcome::Done(Done {}),
                    };
                    driven.session.on_answer(driven.now_ms, request.ticket.unwrap(), Answer::Outcome(outcome), &mut driven.effects);
                },
                4 => if !unacked.is_empty() { let id = unacked.remove(pick % unacked.len()); driven.packet(Packet::PubAck { packet_id: id }); },
                5 => if !requests.is_empty() {
                    let request = requests.remove(pick % requests.len());
                    driven.session.on_answer(driven.now_ms, request.ticket.unwrap(), Answer::Full, &mut driven.effects);
                },
                6 => { driven.now_ms += 1; driven.tick(driven.now_ms); }
                _ => if logs[of] > 0 { driven.deliver_in(CONVERSATIONS[of], entry(1 + pick as u64 % logs[of])); },
            }
            for (first, body) in driven.packets() {
                let (publish, _) = v5_0::Publish::parse(first & 15, body.into()).unwrap();
                let of = CONVERSATIONS.iter().position(|id| id.ends_with(publish.topic_name().split('/').nth(2).unwrap())).unwrap();
                seen[of].push(std::str::from_utf8(publish.payload().as_slice()).unwrap().parse().unwrap());
                unacked.push(publish.packet_id().unwrap());
            }
            requests.append(&mut driven.effects.requests);
            prop_assert!(unacked.len() <= usize::from(window), "the client's Receive Maximum");
        }
        prop_assert!(!driven.session.is_ended());
        for (seen, log) in seen.into_iter().zip(logs) {
            prop_assert_eq!(seen, (1..=log).collect::<Vec<_>>());
        }
    }
}
