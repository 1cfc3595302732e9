//! Gateways and their sessions, and what is asked in their name.

use super::*;

impl World {
    pub(super) fn gateway_hello(&mut self, i: usize) {
        let id = self.gateways[i].id.clone();
        let hello = Hello { member: id.to_string(), role: control::Role::Gateway.into(), ..Hello::default() };
        let delay = self.latency();
        self.after(delay, What::ToControl(id, Report { report: Some(report::Report::Hello(hello)) }));
    }

    pub(super) fn gateway_frames(&mut self, i: usize, peer: &MemberId, frames: Vec<ServerFrame>) {
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

    pub(super) fn pushed(&mut self, i: usize, pushed: Option<push::Push>) {
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
    pub(super) fn apply(&mut self, i: usize, connection: u64, effects: Effects) {
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

    pub(super) fn write_out(&mut self, i: usize, connection: u64) {
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
    pub(super) fn record_refusals(&mut self, person: usize, bytes: &[u8]) {
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

    pub(super) fn pump(&mut self, i: usize) {
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

    pub(super) fn answer(&mut self, i: usize, connection: u64, ticket: u32, answer: Answer) {
        let now_ms = self.now_ms();
        if let Some(session) = self.gateways[i].sessions.get_mut(&connection) {
            let mut effects = Effects::default();
            session.on_answer(now_ms, ticket, answer, &mut effects);
            self.apply(i, connection, effects);
        }
    }

    pub(super) fn gateway_tick(&mut self, i: usize) {
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
    pub(super) fn begin_change(&mut self) {
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

    pub(super) fn ask_for_change(&mut self, i: usize) {
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

    pub(super) fn change_answered(&mut self, outcome: &Outcome) {
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
}
