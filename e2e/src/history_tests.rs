//! A checker that can't fail is worthless: each violation is shown to be found, in hand-made histories and in mutations of
//! valid ones.

#![allow(clippy::unwrap_used)]

use proptest::{prelude::*, test_runner::TestCaseError};

use super::*;

const PAYLOAD: u32 = 7;

/// Alice with a phone and a laptop, Bob with a phone; all subscribed before anything is sent.
struct Scene {
    history: History,
    alice: UserId,
    bob: UserId,
    phone: SessionId,
    laptop: SessionId,
    bobs: SessionId,
    pair: ConversationId,
    clock: u64,
}

impl Scene {
    fn new() -> Self {
        let mut history = History::new();
        let (alice, bob) = (history.user("alice"), history.user("bob"));
        let (phone, laptop) = (history.session("alice", "phone"), history.session("alice", "laptop"));
        let bobs = history.session("bob", "phone");
        let pair = history.pair(alice, bob);
        let mut scene = Self { history, alice, bob, phone, laptop, bobs, pair, clock: 0 };
        for session in [phone, laptop, bobs] {
            scene.connect(session, 1, false);
            scene.record(Event::Subscribed { session });
        }
        scene
    }

    fn record(&mut self, event: Event) -> Option<Duration> {
        self.clock += 1;
        self.history.record(Duration::from_millis(self.clock), event)
    }

    fn connect(&mut self, session: SessionId, connection: u32, session_present: bool) {
        self.record(Event::Connected { session, connection, session_present });
    }

    fn send(&mut self, id: u64, session: SessionId, conversation: ConversationId) {
        let scheduled = Duration::from_millis(self.clock);
        let (id, connection, idempotent) = (MessageId(id), 1, true);
        self.record(Event::Sent { id, session, connection, conversation, payload: PAYLOAD, idempotent, scheduled });
    }

    fn ack(&mut self, id: u64, seq: u64) {
        self.record(Event::Acked { id: MessageId(id), seq: Some(seq) });
    }

    fn receive(&mut self, session: SessionId, connection: u32, from: UserId, seq: u64, id: u64) {
        self.receive_in(self.pair, session, connection, from, seq, id);
    }

    fn receive_in(
        &mut self,
        conversation: ConversationId,
        session: SessionId,
        connection: u32,
        from: UserId,
        seq: u64,
        id: u64,
    ) {
        let (from, id) = (Some(from), Some(MessageId(id)));
        self.record(Event::Received { session, connection, conversation, from, seq, id, payload: PAYLOAD });
    }

    /// Alice's phone says 1, 2, 3 to Bob; all acknowledged, nothing delivered yet.
    fn three_sent() -> Self {
        let mut scene = Self::new();
        for id in 1..=3 {
            scene.send(id, scene.phone, scene.pair);
            scene.ack(id, id);
        }
        scene
    }

    fn deliver_all_to(&mut self, session: SessionId) {
        for seq in 1..=3 {
            self.receive(session, 1, self.alice, seq, seq);
        }
    }

    fn counts(&self) -> [u64; 5] {
        let report = self.history.check();
        [report.lost, report.duplicated, report.reordered, report.gaps, report.other]
    }

    fn other(&self, kind: &str) {
        let report = self.history.check();
        assert!(report.other > 0 && report.violations.iter().any(|text| text.starts_with(kind)), "{report}");
    }
}

#[test]
fn a_complete_history_is_clean_and_has_latencies() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.bobs);
    scene.deliver_all_to(scene.laptop);
    let report = scene.history.check();
    assert!(report.is_clean() && report.is_settled(), "{report}");
    assert_eq!((report.sent, report.acked, report.received, report.redelivered), (3, 3, 6, 0));
    assert_eq!((report.ack_latency.len(), report.delivery_latency.len()), (3, 6));
}

#[test]
fn an_acknowledged_message_that_a_session_never_got_is_lost() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.bobs);
    assert_eq!(scene.counts(), [3, 0, 0, 0, 0], "the sender's other device gets nothing");
    scene.receive(scene.laptop, 1, scene.alice, 1, 1);
    scene.receive(scene.laptop, 1, scene.alice, 2, 2);
    assert_eq!(scene.counts(), [1, 0, 0, 0, 0]);
}

#[test]
fn overdue_counts_online_sessions_only() {
    let mut scene = Scene::three_sent();
    let (now, grace) = (Duration::from_secs(60), Duration::from_secs(5));
    assert_eq!(scene.history.overdue(now, grace), 6);
    scene.record(Event::Disconnected { session: scene.bobs });
    assert_eq!(scene.history.overdue(now, grace), 3);
    assert_eq!(scene.history.overdue(Duration::from_secs(1), grace), 0);
}

#[test]
fn twice_within_a_connection_is_duplicated_but_again_on_the_next_is_allowed() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.bobs);
    scene.deliver_all_to(scene.laptop);
    scene.connect(scene.bobs, 2, true);
    scene.receive(scene.bobs, 2, scene.alice, 3, 3);
    let report = scene.history.check();
    assert!(report.is_clean(), "{report}");
    assert_eq!(report.redelivered, 1);
    scene.receive(scene.bobs, 2, scene.alice, 3, 3);
    assert_eq!(scene.counts(), [0, 1, 0, 0, 0]);
}

#[test]
fn stored_under_two_numbers_is_duplicated() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.bobs);
    scene.deliver_all_to(scene.laptop);
    for session in [scene.bobs, scene.laptop] {
        scene.receive(session, 1, scene.alice, 4, 3);
    }
    let [lost, duplicated, ..] = scene.counts();
    assert_eq!((lost, duplicated), (0, 2));
}

#[test]
fn an_own_message_that_comes_back_is_duplicated() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.bobs);
    scene.deliver_all_to(scene.laptop);
    scene.receive(scene.phone, 1, scene.alice, 1, 1);
    assert_eq!(scene.counts(), [0, 1, 0, 0, 0]);
}

#[test]
fn a_lower_number_after_a_higher_one_is_reordered() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.laptop);
    for seq in [1, 3, 2] {
        scene.receive(scene.bobs, 1, scene.alice, seq, seq);
    }
    let [lost, duplicated, reordered, ..] = scene.counts();
    assert_eq!((lost, duplicated), (0, 0));
    assert!(reordered > 0);
}

#[test]
fn skipped_and_delivered_on_the_next_connection_is_reordered() {
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.laptop);
    scene.receive(scene.bobs, 1, scene.alice, 1, 1);
    scene.receive(scene.bobs, 1, scene.alice, 3, 3);
    scene.connect(scene.bobs, 2, true);
    scene.receive(scene.bobs, 2, scene.alice, 2, 2);
    assert_eq!(scene.counts(), [0, 0, 1, 0, 0]);
}

#[test]
fn numbers_against_the_order_of_sending_are_reordered() {
    let mut scene = Scene::new();
    scene.send(1, scene.phone, scene.pair);
    scene.send(2, scene.phone, scene.pair);
    scene.ack(2, 1);
    scene.ack(1, 2);
    for session in [scene.bobs, scene.laptop] {
        scene.receive(session, 1, scene.alice, 1, 2);
        scene.receive(session, 1, scene.alice, 2, 1);
    }
    assert_eq!(scene.counts(), [0, 0, 1, 0, 0]);
}

#[test]
fn own_messages_leave_holes_that_are_none() {
    let mut scene = Scene::new();
    for id in 1..=4 {
        let (session, other, from) =
            if id % 2 == 1 { (scene.phone, scene.bobs, scene.alice) } else { (scene.bobs, scene.phone, scene.bob) };
        scene.send(id, session, scene.pair);
        // The other one may see it before the sender has his ack.
        scene.receive(other, 1, from, id, id);
        scene.receive(scene.laptop, 1, from, id, id);
        scene.ack(id, id);
    }
    assert_eq!(scene.counts(), [0; 5]);
}

#[test]
fn a_number_nobody_saw_is_a_gap_unless_an_unanswered_message_may_fill_it() {
    let build = |unanswered: bool| {
        let mut scene = Scene::new();
        scene.send(1, scene.phone, scene.pair);
        if unanswered {
            scene.send(2, scene.phone, scene.pair);
        }
        scene.ack(1, 2);
        scene.receive(scene.bobs, 1, scene.alice, 2, 1);
        scene.receive(scene.laptop, 1, scene.alice, 2, 1);
        scene.counts()
    };
    assert_eq!(build(false), [0, 0, 0, 1, 0]);
    assert_eq!(build(true), [0; 5]);
}

#[test]
fn stored_without_ack_and_seen_by_one_session_only_is_a_gap() {
    let mut scene = Scene::new();
    scene.send(1, scene.phone, scene.pair);
    scene.receive(scene.bobs, 1, scene.alice, 1, 1);
    assert_eq!(scene.counts(), [0, 0, 0, 1, 0]);
}

#[test]
fn impossible_numbers_are_reported_and_not_allocated() {
    let mut scene = Scene::new();
    scene.send(1, scene.phone, scene.pair);
    scene.ack(1, 1 << 40);
    scene.receive(scene.bobs, 1, scene.alice, 0, 1);
    let report = scene.history.check();
    assert_eq!(report.gaps, 2, "{report}");
}

#[test]
fn one_number_for_two_messages_is_a_collision() {
    let mut scene = Scene::new();
    scene.send(1, scene.phone, scene.pair);
    scene.send(2, scene.bobs, scene.pair);
    scene.ack(1, 1);
    scene.ack(2, 1);
    scene.other("Collision");
}

#[test]
fn changed_payload_sender_or_conversation_is_corrupted() {
    for what in 0..3 {
        let mut scene = Scene::new();
        let elsewhere = scene.history.group("team");
        scene.send(1, scene.phone, scene.pair);
        let (session, connection, seq, id) = (scene.bobs, 1, 1, Some(MessageId(1)));
        let conversation = if what == 0 { elsewhere } else { scene.pair };
        let from = Some(if what == 1 { scene.bob } else { scene.alice });
        let payload = if what == 2 { PAYLOAD + 1 } else { PAYLOAD };
        scene.record(Event::Received { session, connection, conversation, from, seq, id, payload });
        scene.other("Corrupted");
    }
}

#[test]
fn what_nobody_sent_is_invented_but_strangers_may_write() {
    let mut scene = Scene::new();
    scene.receive(scene.bobs, 1, scene.alice, 1, 99);
    scene.other("Invented");
    let mut scene = Scene::new();
    let stranger = scene.history.user("mosquitto");
    let talk = scene.history.pair(scene.bob, stranger);
    scene.receive_in(talk, scene.bobs, 1, stranger, 1, 99);
    assert_eq!(scene.counts(), [0; 5]);
    let mut scene = Scene::new();
    scene.ack(5, 1);
    scene.other("Invented");
}

#[test]
fn refused_and_yet_delivered_is_a_violation_unless_it_was_sent_twice() {
    for sends in 1..=2 {
        let mut scene = Scene::new();
        for _ in 0..sends {
            scene.send(1, scene.phone, scene.pair);
        }
        scene.record(Event::Refused { id: MessageId(1) });
        scene.receive(scene.bobs, 1, scene.alice, 1, 1);
        scene.receive(scene.laptop, 1, scene.alice, 1, 1);
        if sends == 1 {
            scene.other("Refused");
        } else {
            assert_eq!(scene.counts(), [0; 5]);
        }
    }
}

#[test]
fn a_forgotten_session_is_reported_and_an_ended_one_is_not() {
    let mut scene = Scene::new();
    scene.connect(scene.bobs, 2, false);
    scene.other("SessionLost");
    let mut scene = Scene::three_sent();
    scene.deliver_all_to(scene.laptop);
    scene.record(Event::Ended { session: scene.bobs });
    scene.connect(scene.bobs, 2, false);
    scene.record(Event::Subscribed { session: scene.bobs });
    assert_eq!(scene.counts(), [0; 5], "a new session is not owed what was sent before it");
    scene.send(4, scene.laptop, scene.pair);
    scene.ack(4, 4);
    scene.receive(scene.phone, 1, scene.alice, 4, 4);
    assert_eq!(scene.counts(), [1, 0, 0, 0, 0], "but what comes after");
}

#[test]
fn membership_decides_who_is_owed_a_group_message() {
    let mut scene = Scene::new();
    let group = scene.history.group("team");
    let (alice, bob) = (scene.alice, scene.bob);
    scene.record(Event::Joined { group, user: alice, seq: Some(0) });
    scene.record(Event::Joined { group, user: bob, seq: Some(2) });
    scene.record(Event::Left { group, user: bob, seq: Some(4) });
    for (id, seq) in [(1, 1), (3, 3), (5, 5)] {
        scene.send(id, scene.phone, group);
        scene.ack(id, seq);
        scene.receive_in(group, scene.laptop, 1, alice, seq, id);
    }
    // The join #2 and the leave #4 are entries of the system.
    for seq in [2, 4] {
        let (session, conversation, payload) = (scene.phone, group, u32::try_from(seq).unwrap());
        scene.record(Event::Received { session, connection: 1, conversation, from: None, seq, id: None, payload });
    }
    let report = scene.history.check();
    assert_eq!(report.lost, 1, "only #3 is owed to Bob: {report}");
    scene.receive_in(group, scene.bobs, 1, alice, 5, 5);
    scene.other("Trespass");
}

#[test]
fn membership_without_numbers_goes_by_the_order_of_events() {
    let mut scene = Scene::new();
    let group = scene.history.group("team");
    let (alice, bob) = (scene.alice, scene.bob);
    scene.record(Event::Joined { group, user: alice, seq: None });
    scene.send(1, scene.phone, group);
    scene.ack(1, 1);
    scene.record(Event::Joined { group, user: bob, seq: None });
    scene.send(2, scene.phone, group);
    scene.ack(2, 2);
    scene.record(Event::Left { group, user: bob, seq: None });
    scene.send(3, scene.phone, group);
    scene.ack(3, 3);
    for id in 1..=3 {
        scene.receive_in(group, scene.laptop, 1, alice, id, id);
    }
    assert_eq!(scene.counts(), [1, 0, 0, 0, 0], "Bob is owed #2");
    scene.receive_in(group, scene.bobs, 1, alice, 2, 2);
    assert_eq!(scene.counts(), [0; 5]);
}

#[test]
fn an_ack_without_number_is_lost_when_nobody_sees_it() {
    let mut scene = Scene::new();
    scene.send(1, scene.phone, scene.pair);
    scene.record(Event::Acked { id: MessageId(1), seq: None });
    assert_eq!(scene.counts(), [2, 0, 0, 0, 0]);
    scene.receive(scene.bobs, 1, scene.alice, 1, 1);
    scene.receive(scene.laptop, 1, scene.alice, 1, 1);
    assert_eq!(scene.counts(), [0; 5]);
}

#[test]
fn without_ids_a_resend_may_be_stored_twice() {
    let mut scene = Scene::new();
    let (session, conversation, payload) = (scene.phone, scene.pair, PAYLOAD);
    for connection in 1..=2 {
        let (id, idempotent, scheduled) = (MessageId(1), false, Duration::ZERO);
        scene.record(Event::Sent { id, session, connection, conversation, payload, idempotent, scheduled });
    }
    scene.record(Event::Acked { id: MessageId(1), seq: None });
    for seq in 1..=2 {
        scene.receive(scene.bobs, 1, scene.alice, seq, 1);
        scene.receive(scene.laptop, 1, scene.alice, seq, 1);
    }
    assert_eq!(scene.counts(), [0; 5]);
}

/// A million messages, each to two sessions, must be checkable within 1 GiB: run with `--ignored` and look at VmHWM.
#[test]
#[ignore = "a measurement; prints peak memory and time"]
fn a_million_messages_fit_into_a_gibibyte() {
    let mut scene = Scene::new();
    let begun = std::time::Instant::now();
    for id in 1..=1_000_000 {
        scene.send(id, scene.phone, scene.pair);
        scene.ack(id, id);
        scene.receive(scene.bobs, 1, scene.alice, id, id);
        scene.receive(scene.laptop, 1, scene.alice, id, id);
    }
    let recorded = begun.elapsed();
    assert_eq!(scene.counts(), [0; 5]);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap().trim();
    let kibibytes: u64 = peak.trim_end_matches(" kB").parse().unwrap();
    println!("recorded in {recorded:?}, checked in {:?}, peak memory {peak}", begun.elapsed() - recorded);
    assert!(kibibytes < 1024 * 1024, "{peak}");
}

// --- valid histories by a model of a perfect system, and what is left of them after one mutation -------------------------

#[derive(Clone, Copy, Debug)]
enum Step {
    Send { who: usize, group: bool, ack_lost: bool },
    Deliver { who: usize, group: bool },
    Reconnect { who: usize, rewind: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let who = 0..4usize;
    let step = prop_oneof![
        4 => (who.clone(), any::<bool>(), prop::bool::weighted(0.1))
            .prop_map(|(who, group, ack_lost)| Step::Send { who, group, ack_lost }),
        6 => (who.clone(), any::<bool>()).prop_map(|(who, group)| Step::Deliver { who, group }),
        1 => (who, 0..3usize).prop_map(|(who, rewind)| Step::Reconnect { who, rewind }),
    ];
    prop::collection::vec(step, 20..120)
}

/// Four sessions of three people, one 1:1 and one group, and a log for each, as a perfect system would keep it.
struct Model {
    blank: History,
    events: Vec<Event>,
    sessions: [(SessionId, UserId); 4],
    conversations: [ConversationId; 2],
    logs: [Vec<(MessageId, usize)>; 2],
    cursors: [[usize; 2]; 4],
    connections: [u32; 4],
}

impl Model {
    fn play(steps: &[Step]) -> Self {
        let mut blank = History::new();
        let users = ["alice", "alice", "bob", "carol"].map(|name| blank.user(name));
        let sessions = [0, 1, 2, 3].map(|at: usize| {
            let name = ["alice", "alice", "bob", "carol"][at];
            (blank.session(name, ["phone", "laptop", "phone", "phone"][at]), users[at])
        });
        let conversations = [blank.pair(users[0], users[2]), blank.group("team")];
        let mut events = Vec::new();
        for (session, user) in sessions {
            events.push(Event::Connected { session, connection: 1, session_present: false });
            events.push(Event::Subscribed { session });
            events.push(Event::Joined { group: conversations[1], user, seq: Some(0) });
        }
        let logs = [Vec::new(), Vec::new()];
        let mut model =
            Self { blank, events, sessions, conversations, logs, cursors: [[0; 2]; 4], connections: [1; 4] };
        for step in steps {
            model.step(*step);
        }
        for who in 0..4 {
            for room in 0..2 {
                while model.cursors[who][room] < model.logs[room].len() {
                    model.deliver(who, room);
                }
            }
        }
        model
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Send { who, group, ack_lost } => {
                let room = usize::from(group || who == 3);
                let (session, connection) = (self.sessions[who].0, self.connections[who]);
                let id = MessageId(self.logs.iter().map(Vec::len).sum::<usize>() as u64 + 1);
                let conversation = self.conversations[room];
                let sent = |connection| Event::Sent {
                    id,
                    session,
                    connection,
                    conversation,
                    payload: PAYLOAD,
                    idempotent: true,
                    scheduled: Duration::ZERO,
                };
                self.events.push(sent(connection));
                self.logs[room].push((id, who));
                let seq = Some(self.logs[room].len() as u64);
                if ack_lost {
                    self.step(Step::Reconnect { who, rewind: 0 });
                    self.events.push(sent(self.connections[who]));
                }
                self.events.push(Event::Acked { id, seq });
            }
            Step::Deliver { who, group } => self.deliver(who, usize::from(group || who == 3)),
            Step::Reconnect { who, rewind } => {
                let session = self.sessions[who].0;
                self.connections[who] += 1;
                self.events.push(Event::Disconnected { session });
                self.events.push(Event::Connected {
                    session,
                    connection: self.connections[who],
                    session_present: true,
                });
                for cursor in &mut self.cursors[who] {
                    *cursor = cursor.saturating_sub(rewind);
                }
            }
        }
    }

    /// The next entry for a session; its own ones are passed over, Carol is in the group only.
    fn deliver(&mut self, who: usize, room: usize) {
        let cursor = self.cursors[who][room];
        let Some((id, sender)) = self.logs[room].get(cursor).copied() else { return };
        self.cursors[who][room] += 1;
        if sender == who || (room == 0 && who == 3) {
            return;
        }
        self.events.push(Event::Received {
            session: self.sessions[who].0,
            connection: self.connections[who],
            conversation: self.conversations[room],
            from: Some(self.sessions[sender].1),
            seq: cursor as u64 + 1,
            id: Some(id),
            payload: PAYLOAD,
        });
    }

    fn report(&self) -> Report {
        let mut history = self.blank.clone();
        for (at, event) in self.events.iter().enumerate() {
            history.record(Duration::from_millis(at as u64), event.clone());
        }
        history.check()
    }

    fn positions(&self, wanted: impl Fn(&Event) -> bool) -> Vec<usize> {
        (0..self.events.len()).filter(|at| wanted(&self.events[*at])).collect()
    }
}

fn received(event: &Event) -> Option<(SessionId, ConversationId, u32, u64)> {
    match event {
        Event::Received { session, conversation, connection, seq, .. } => {
            Some((*session, *conversation, *connection, *seq))
        }
        _ => None,
    }
}

fn is_received(event: &Event) -> bool {
    received(event).is_some()
}

proptest! {
    #[test]
    fn valid_histories_pass(steps in steps()) {
        let report = Model::play(&steps).report();
        prop_assert!(report.is_clean() && report.is_settled(), "{report}");
    }

    #[test]
    fn a_mutated_history_fails(steps in steps(), mutation in 0..7usize, choice in any::<prop::sample::Index>()) {
        let mut model = Model::play(&steps);
        let deliveries = model.positions(is_received);
        prop_assume!(deliveries.len() >= 2);
        let at = deliveries[choice.index(deliveries.len())];
        let (session, conversation, connection, seq) =
            received(&model.events[at]).ok_or_else(|| TestCaseError::fail("no delivery"))?;
        match mutation {
            // It never came.
            0 => model.events.retain(|event| {
                received(event).is_none_or(|(s, c, _, n)| (s, c, n) != (session, conversation, seq))
            }),
            // It came twice.
            1 => model.events.insert(at, model.events[at].clone()),
            // It came after the next one.
            2 => {
                let next = deliveries.iter().copied().find(|next| {
                    *next > at && received(&model.events[*next]).is_some_and(|(s, c, n, _)| (s, c, n) == (session, conversation, connection))
                });
                let Some(next) = next else { return Err(TestCaseError::reject("the last delivery")) };
                model.events.swap(at, next);
            }
            // It is not what was sent.
            3 => if let Event::Received { payload, .. } = &mut model.events[at] { *payload += 1 },
            // The ack tells another number.
            4 => {
                let acks = model.positions(|event| matches!(event, Event::Acked { .. }));
                if let Event::Acked { seq: Some(seq), .. } = &mut model.events[acks[choice.index(acks.len())]] { *seq += 1 }
            }
            // It is stored once more.
            5 => {
                let mut again = model.events[at].clone();
                let room = usize::from(conversation == model.conversations[1]);
                if let Event::Received { seq, .. } = &mut again { *seq = model.logs[room].len() as u64 + 1 }
                model.events.push(again);
            }
            // Nobody sent it.
            _ => {
                let Event::Received { id: Some(wanted), .. } = model.events[at].clone() else { return Ok(()) };
                model.events.retain(|event| !matches!(event, Event::Sent { id, .. } if *id == wanted));
            }
        }
        let report = model.report();
        prop_assert!(!report.is_clean(), "mutation {mutation} of {session:?} #{seq} was not noticed: {report}");
    }
}
