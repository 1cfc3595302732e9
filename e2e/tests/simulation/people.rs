//! People and their connections: what they say, send and hear.

use super::*;

impl World {
    pub(super) fn person_arrival(&mut self, person: usize, direction: usize) -> Micros {
        let latency = self.latency();
        let arrivals = &mut self.people[person].arrivals;
        arrivals[direction] = (self.now + latency).max(arrivals[direction]);
        arrivals[direction]
    }

    pub(super) fn say(&mut self, person: usize, said: Said) {
        if let Some(connection) = self.people[person].connection {
            let at = self.person_arrival(person, 0);
            self.at(at, What::ToSession(person, connection, said));
        }
    }

    pub(super) fn connect(&mut self, person: usize) {
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

    pub(super) fn connection_ends(&mut self, person: usize, connection: u64) {
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

    pub(super) fn send(&mut self) {
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

    pub(super) fn sent(&mut self, person: usize, id: MessageId, conversation: ConversationId, payload: &str) {
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

    pub(super) fn session_hears(&mut self, person: usize, connection: u64, said: Said) {
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

    pub(super) fn person_hears(&mut self, person: usize, connection: u64, bytes: &[u8]) {
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

    pub(super) fn received(&mut self, person: usize, topic: &str, payload: &[u8], properties: &wire::Properties) {
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
