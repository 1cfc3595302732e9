// Sessions to test with, and what a client may send into one, byte for byte: used by the fuzz target and by the tests of the gateway.

use std::sync::Arc;

use bytes::Bytes;
use im_gateway::metrics::Metrics;
use im_gateway::mqtt::{self, Connect, Packet, Version};
use im_gateway::session::{Answer, Effects, End, Identity, RoomEffect, Session, SessionLimits, Shared};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Deliver, Done, Entry, Fetched, Head, HeadList, IndexRow, KickSession, Marked, Recipient, Refused, Registered,
    SessionNumber, Stored, body,
};

/// Small limits, so that they are met.
pub fn shared() -> Arc<Shared> {
    let limits = SessionLimits {
        receive_maximum: 4,
        packet_size_max: 65_536,
        keep_alive_s_max: 100,
        session_expiry_s_max: 1_000,
        catch_up: 1_000,
        send_buffer_bytes: 32_768,
    };
    Shared::new(0xB007, limits, Metrics::new())
}

/// What alice's phone says first.
pub fn connect(version: Version) -> Connect<'static> {
    Connect {
        version,
        clean_start: false,
        keep_alive_s: 60,
        session_expiry_s: (version == Version::V5).then_some(500),
        receive_maximum: 10,
        packet_size_max: None,
        problem_information: true,
        client_id: "phone",
        will: None,
        username: Some("alice"),
        password: None,
    }
}

/// Feeds `input` to a session of each version.
pub fn feed(input: &[u8]) {
    // A first packet of any kind.
    let _ = mqtt::decode(None, input, 65_536);
    for version in [Version::V5, Version::V311] {
        feed_one(version, input);
    }
}

/// What the client sends is read from the front of `input`; what else happens to the session, and what owners answer, from its back. The
/// out-buffer must stay in proportion.
pub fn feed_one(version: Version, input: &[u8]) {
    let mut choices = input.iter().rev().cycle();
    let mut effects = Effects::default();
    let identity = |_: &str, _: Option<&[u8]>| Ok(Identity { expires_at_ms: None });
    let shared = shared();
    let opened = Session::open(&shared, 8, 0, 1, &connect(version), identity, &mut effects);
    let Ok(session) = opened else { return };
    let choose = || choices.next().copied().unwrap_or_default();
    let mut world =
        World { session, effects, now_ms: 0, choose, unanswered: Vec::new(), heads: [3; 3], told: 0, written: 0 };
    world.answer_all();
    let mut rest = input;
    while !world.session.is_ended() {
        if !world.session.wants_input() {
            world.write();
            world.answer_all();
            if !world.session.wants_input() {
                break;
            }
        }
        match mqtt::decode(Some(version), rest, 65_536) {
            Ok(None) => break,
            Ok(Some((Packet::Connect(_), _))) => unreachable!("decode refuses a second CONNECT"),
            Ok(Some((packet, used))) => {
                world.session.on_packet(world.now_ms, packet, &mut world.effects);
                rest = &rest[used..];
            }
            Err(error) => world.session.on_bad_input(error, &mut world.effects),
        }
        world.happen();
    }
    world.session.end(End::Broken, &mut world.effects);
    world.answer_all();
    world.write();
    let delivered = shared.metrics.delivered.get() as usize;
    let allowed = 1_024 + 64 * input.len() + 200 * delivered + 100 * world.told;
    assert!(world.written <= allowed, "{} bytes out for {} in", world.written, input.len());
}

/// Alice's conversations.
const CONVERSATIONS: [&str; 3] = ["g/team", "u/alice/bob", "u/alice/carol"];

/// What a session has around it; `choose` gives the next byte that decides something.
struct World<C> {
    session: Session,
    effects: Effects,
    now_ms: u64,
    choose: C,
    /// Tickets, and what was asked; a room's owner is asked nothing by name.
    unanswered: Vec<(u32, Option<body::Body>)>,
    heads: [u64; 3],
    /// Read marks that may have been told.
    told: usize,
    written: usize,
}

impl<C: FnMut() -> u8> World<C> {
    fn happen(&mut self) {
        self.gather();
        let (what, which) = ((self.choose)(), usize::from((self.choose)()));
        let of = which % CONVERSATIONS.len();
        match what % 10 {
            0 | 1 if !self.unanswered.is_empty() => {
                let (ticket, asked) = self.unanswered.remove(which % self.unanswered.len());
                self.answer(ticket, asked);
            }
            0..=2 => self.answer_all(),
            3 => {
                self.heads[of] += 1;
                self.deliver(of, self.heads[of]);
            }
            // Pushes may be lost, and come twice.
            4 => {
                self.heads[of] += which as u64 % 3;
                self.deliver(of, self.heads[of].saturating_sub(which as u64 % 5));
            }
            5 => {
                self.told += 1;
                let reader = if which % 2 == 0 { "alice" } else { "bob" };
                self.session.on_read_state(CONVERSATIONS[of], reader, which as u64);
            }
            6 => {
                self.now_ms += 10 * which as u64;
                self.session.on_tick(self.now_ms, &mut self.effects);
            }
            7 => self.write(),
            8 => {
                let puback = Packet::PubAck { packet_id: 1 + which as u16 % 16 };
                self.session.on_packet(self.now_ms, puback, &mut self.effects);
            }
            _ if which < 16 => {
                let number = Some(SessionNumber { epoch: 1, counter: which as u64 % 3 });
                let (user, device) = ("alice".to_owned(), "phone".to_owned());
                let kick = KickSession { user, device, number, reason: which as i32 % 3 };
                self.session.on_kick(&kick, &mut self.effects);
            }
            _ => self.session.announce(self.now_ms, &mut self.effects),
        }
    }

    /// Takes over what the session wants done.
    fn gather(&mut self) {
        let Effects { cancel: _, requests, rooms } = std::mem::take(&mut self.effects);
        let asked = requests.into_iter().filter_map(|request| Some((request.ticket?, request.body.body)));
        self.unanswered.extend(asked);
        self.unanswered.extend(rooms.into_iter().filter_map(|effect| match effect {
            RoomEffect::Enter { ticket, .. } | RoomEffect::Count { ticket: Some(ticket), .. } => Some((ticket, None)),
            RoomEffect::Leave { .. } | RoomEffect::Count { ticket: None, .. } => None,
        }));
    }

    fn answer_all(&mut self) {
        self.gather();
        for (ticket, asked) in std::mem::take(&mut self.unanswered) {
            self.answer(ticket, asked);
        }
    }

    fn answer(&mut self, ticket: u32, asked: Option<body::Body>) {
        let outcome = match (self.choose)() {
            0..32 => None,
            choice @ 32..64 => {
                let code = i32::from(choice) % 12;
                Some(Outcome::Refused(Refused { code, reason: String::new() }))
            }
            choice => Some(self.outcome(choice, asked)),
        };
        let answer = outcome.map_or(Answer::Full, Answer::Outcome);
        self.session.on_answer(self.now_ms, ticket, answer, &mut self.effects);
    }

    /// What an owner says who has no reason to refuse.
    fn outcome(&mut self, choice: u8, asked: Option<body::Body>) -> Outcome {
        let head_of = |heads: &[u64; 3], conversation: &str| {
            CONVERSATIONS.iter().position(|id| *id == conversation).map_or(0, |of| heads[of])
        };
        match asked {
            Some(body::Body::Register(register)) => {
                let row = |id: &&str| IndexRow { conversation: (*id).to_owned(), from_seq: 1, to_seq: 0, as_of: 0 };
                Outcome::Registered(Registered {
                    number: register.number.or(Some(SessionNumber { epoch: 1, counter: 1 })),
                    session_present: choice.is_multiple_of(2),
                    subscribed: choice.is_multiple_of(4),
                    index: CONVERSATIONS.iter().take(usize::from(choice) % 4).map(row).collect(),
                    ..Registered::default()
                })
            }
            Some(body::Body::Send(send)) => Outcome::Stored(Stored {
                seq: head_of(&self.heads, &send.conversation) + u64::from(choice % 2),
                ts_ms: self.now_ms as i64,
            }),
            Some(body::Body::MarkRead(mark)) => Outcome::Marked(Marked { seq: mark.seq }),
            Some(body::Body::Heads(asked)) => {
                self.told += 2 * asked.conversations.len();
                let head = |conversation: String| {
                    let head = head_of(&self.heads, &conversation);
                    Head { conversation, head, own_mark: head / 2, peer_mark: u64::from(choice), ..Head::default() }
                };
                Outcome::Heads(HeadList { heads: asked.conversations.into_iter().map(head).collect() })
            }
            Some(body::Body::Fetch(fetch)) => {
                let head = head_of(&self.heads, &fetch.conversation);
                // An owner that was replaced may not know the last ones.
                let last =
                    head.saturating_sub(u64::from(choice % 2)).min(fetch.from + u64::from(fetch.limit.min(2)) - 1);
                let entries = (fetch.from..=last).map(entry).collect();
                Outcome::Fetched(Fetched { entries, next: fetch.from.max(last + 1), head: last })
            }
            _ => Outcome::Done(Done {}),
        }
    }

    fn deliver(&mut self, of: usize, seq: u64) {
        let recipient = Recipient { user: "alice".to_owned(), from_seq: 1, to_seq: 0, as_of: 0 };
        let (conversation, recipients) = (CONVERSATIONS[of].to_owned(), vec![recipient.clone()]);
        let deliver = Deliver { conversation, entry: Some(entry(seq)), recipients };
        self.session.on_deliver(self.now_ms, &deliver, &recipient, &mut self.effects);
    }

    fn write(&mut self) {
        self.written += self.session.take_output().len();
        self.session.on_written(self.now_ms, &mut self.effects);
    }
}

fn entry(seq: u64) -> Entry {
    Entry { seq, ts_ms: 1, sender: "bob".to_owned(), payload: Bytes::from_static(b"hello"), ..Entry::default() }
}
