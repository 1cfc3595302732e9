//! How a session begins and ends: CONNECT, registration with the owner of the user's shard, take-over, Close.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::{is_name, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Body, Close, KickReason, KickSession, Register, Registered, RoomPublish, SessionNumber, Taken, body,
};
use im_proto::topic::Publish as PublishTopic;

use super::delivery::Inbox;
use super::rooms::EnteredRoom;
use super::{
    Answer, ConnectRefused, Effects, End, Identity, InboxState, OwnedWill, Phase, RoomEffect, Session, SessionRequest,
    Shared, Waiting, What, refusal_of,
};
use crate::mqtt::{self, Connect, OutBuffer, Reason, Version, Welcome};

impl Session {
    /// Admits a CONNECT and asks the user shard's owner to register it: CONNACK follows in [`Session::on_answer`].
    /// `connection` distinguishes the connections of this process; `authenticate` proves a user by a password.
    ///
    /// # Errors
    /// The reason for the CONNACK that refuses it.
    pub fn open(
        shared: &Arc<Shared>,
        shards: u32,
        now_ms: u64,
        connection: u64,
        connect: &Connect<'_>,
        authenticate: impl FnOnce(&str, Option<&[u8]>) -> Result<Identity, ConnectRefused>,
        effects: &mut Effects,
    ) -> Result<Self, ConnectRefused> {
        let refuse = |reason, text: &str| Err(ConnectRefused { reason, text: text.to_owned() });
        let v5 = connect.version == Version::V5;
        let user = match connect.username {
            Some(user) if is_name(user) => user,
            _ => {
                return refuse(
                    Reason::BadCredentials,
                    "the user name must be a user id: 1 to 64 of A-Z a-z 0-9 . _ @ -",
                );
            }
        };
        let device_assigned = connect.client_id.is_empty();
        let device = match connect.client_id {
            "" if !v5 && !connect.clean_start => {
                return refuse(Reason::ClientIdNotValid, "an empty client id needs Clean Session 1");
            }
            "" => format!("auto-{:016x}-{connection}", shared.boot),
            id if is_name(id) => id.to_owned(),
            _ => {
                return refuse(
                    Reason::ClientIdNotValid,
                    "the client id must be a device id: 1 to 64 of A-Z a-z 0-9 . _ @ -",
                );
            }
        };
        let will = match &connect.will {
            None => None,
            Some(will) if will.qos == 2 => return refuse(Reason::QosNotSupported, "the will's QoS must be 0 or 1"),
            Some(will) if will.retain => {
                return refuse(Reason::RetainNotSupported, "retained messages are not supported");
            }
            Some(will) => match PublishTopic::parse(will.topic) {
                Ok(PublishTopic::ToRoom(room)) => {
                    Some(Box::new(OwnedWill { room: room.into(), payload: Bytes::copy_from_slice(will.payload) }))
                }
                _ => return refuse(Reason::TopicNameInvalid, "a will is taken for r/{room} only"),
            },
        };
        let identity = authenticate(user, connect.password)?;
        let limits = &shared.limits;
        let session_expiry_s = match connect.session_expiry_s {
            Some(asked) => asked.min(limits.session_expiry_s_max),
            None if connect.clean_start => 0,
            None => limits.session_expiry_s_max,
        };
        let cap_s = limits.keep_alive_s_max;
        let keep_alive_s_told = (v5 && (connect.keep_alive_s == 0 || connect.keep_alive_s > cap_s)).then_some(cap_s);
        let keep_alive_s = keep_alive_s_told.unwrap_or(connect.keep_alive_s);
        let mut session = Self {
            shared: shared.clone(),
            shards,
            version: connect.version,
            problem_information: connect.problem_information,
            phase: Phase::Registering { since_ms: now_ms },
            user: user.into(),
            device: device.into(),
            device_assigned,
            connection,
            number: None,
            out: OutBuffer::default(),
            is_writing: false,
            packet_size_max: connect.packet_size_max,
            session_expiry_s,
            keep_alive_s_told,
            silence_ms_max: u64::from(keep_alive_s) * 1_500,
            heard_ms: now_ms,
            expires_at_ms: identity.expires_at_ms,
            waiting: Vec::new(),
            next_ticket: 1,
            publishes_unanswered: 0,
            subscribes: Vec::new(),
            rooms: Vec::new(),
            resumable: Vec::new(),
            will,
            announce_again: false,
            inbox: Inbox::new(connect.version, connect.receive_maximum),
        };
        let register = Register {
            user: session.user.to_string(),
            device: session.device.to_string(),
            number: None,
            clean_start: connect.clean_start,
            expiry_s: session_expiry_s,
            connection,
            subscribed: false,
            cursors: Vec::new(),
        };
        session.ask_user(now_ms, What::Register, body::Body::Register(register), effects);
        Ok(session)
    }

    pub(super) fn on_registered(&mut self, now_ms: u64, answer: Answer, effects: &mut Effects) {
        let registered = match answer {
            Answer::Outcome(Outcome::Registered(registered)) => registered,
            answer => {
                let ((reason, text), _) = refusal_of(&answer);
                let reason = if reason == Reason::NotAuthorized { reason } else { Reason::ServerUnavailable };
                return self.refuse_connect(reason, text, effects);
            }
        };
        let Registered { number, session_present, subscribed, connections, index, cursors, taken } = registered;
        self.number = number;
        self.inbox.begin_ids(connections);
        for row in &index {
            self.inbox.merge(row);
        }
        for cursor in &cursors {
            self.inbox.resume_after(cursor);
        }
        // Copies: the keys are parts of all that the link said at once.
        let own = |taken: Taken| Taken { key: taken.key.to_vec().into(), ..taken };
        self.resumable = taken.into_iter().map(own).collect();
        if let Phase::Registering { since_ms } = std::mem::replace(&mut self.phase, Phase::Live) {
            self.shared.metrics.connected_after(now_ms.saturating_sub(since_ms));
        }
        let limits = &self.shared.limits;
        let welcome = Welcome {
            session_present,
            session_expiry_s: self.session_expiry_s,
            receive_maximum: limits.receive_maximum,
            packet_size_max: limits.packet_size_max,
            assigned_client_id: self.device_assigned.then_some(&self.device),
            server_keep_alive_s: self.keep_alive_s_told,
        };
        mqtt::connack(&mut self.out, self.version, &welcome);
        if session_present && subscribed {
            self.inbox.state = InboxState::Subscribed;
            self.compare_heads(now_ms, effects);
        }
    }

    pub(super) fn refuse_connect(&mut self, reason: Reason, text: &'static str, effects: &mut Effects) {
        self.shared.metrics.refused(reason);
        if reason == Reason::ServerUnavailable {
            self.shared.metrics.connects_refused.inc();
        }
        mqtt::connack_refused(&mut self.out, self.version, reason, text);
        self.will = None;
        self.end(End::Broken, effects);
    }

    /// The user's shard has a new owner or a new link: the session has to be told again.
    pub fn announce(&mut self, now_ms: u64, effects: &mut Effects) {
        if self.phase != Phase::Live {
            return; // its registration is sent again by the router
        }
        // What was asked in the session's name would reach an owner that has not heard of it: it is asked behind the announcement.
        let void = self.give_up(What::is_of_session, effects);
        let register = Register {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            clean_start: false,
            expiry_s: self.session_expiry_s,
            connection: self.connection,
            subscribed: matches!(self.inbox.state, InboxState::Subscribed),
            cursors: self.cursors(),
        };
        self.ask_user(now_ms, What::Announce, body::Body::Register(register), effects);
        for Waiting { what, since_ms, .. } in void {
            match what {
                What::SubscribeInbox => self.write_subscription(since_ms, effects),
                What::UnsubscribeInbox { .. } => self.write_unsubscription(since_ms, what, effects),
                // The announcement says it.
                _ => {}
            }
        }
    }

    /// The owner ends a session: ours, if it is the named one or an older one.
    pub fn on_kick(&mut self, kick: &KickSession, effects: &mut Effects) {
        let order = |number: Option<SessionNumber>| number.map(|number| (number.epoch, number.counter));
        if self.phase != Phase::Live || *self.device != *kick.device || order(self.number) > order(kick.number) {
            return;
        }
        match kick.reason() {
            KickReason::Administrative => {
                self.shared.metrics.kicked.inc();
                self.end(End::Server(Reason::AdministrativeAction, "ended by an administrator"), effects);
            }
            KickReason::TakenOver | KickReason::Unspecified => self.taken_over(effects),
        }
    }

    pub(super) fn taken_over(&mut self, effects: &mut Effects) {
        self.shared.metrics.kicked.inc();
        self.end(End::Server(Reason::SessionTakenOver, "the session goes on in another connection"), effects);
    }

    /// The connection ends: what was not answered is dropped, the owner learns how far the client got.
    pub fn end(&mut self, end: End, effects: &mut Effects) {
        if self.phase == Phase::Ended {
            return;
        }
        let registering = matches!(self.phase, Phase::Registering { .. });
        self.phase = Phase::Ended;
        let (will, session_expiry_s) = match end {
            End::Client { will, session_expiry_s } => (will, session_expiry_s),
            End::Broken => (true, None),
            End::Server(reason, text) => {
                if registering {
                    mqtt::connack_refused(&mut self.out, self.version, reason, text);
                } else {
                    mqtt::disconnect(&mut self.out, self.version, reason, text);
                }
                (!registering, None)
            }
        };
        for EnteredRoom { room, part } in self.rooms.drain(..) {
            effects.rooms.push(RoomEffect::Leave { room, part });
        }
        if let Some(number) = self.number {
            debug_assert!(!registering, "{number:?} before Registered");
            self.send_close(session_expiry_s, effects);
        }
        // A registration stays: its answer names the session that then has to be closed.
        self.give_up(|what| !matches!(what, What::Register), effects);
        if let Some(will) = self.will.take().filter(|_| will && self.number.is_some()) {
            let OwnedWill { room, payload } = *will;
            let (sender, device) = (self.user.to_string(), self.device.to_string());
            let shard = self.shard_of_room(&room);
            let body = body::Body::RoomPublish(RoomPublish { room: room.into(), sender, device, payload });
            effects.requests.push(SessionRequest { ticket: None, shard, order: 0, body: Body { body: Some(body) } });
        }
        self.inbox.forget();
    }

    pub(super) fn send_close(&mut self, expiry_s: Option<u32>, effects: &mut Effects) {
        // What the connection before left is no part of it: its packet ids may mean other messages by now.
        let mut taken = Vec::new();
        for waiting in &self.waiting {
            if let What::Publish(publish) = &waiting.what
                && let Some(key) = publish.key
                && publish.packet_id != 0
            {
                let key = Bytes::copy_from_slice(&key);
                taken.push(Taken { packet_id: publish.packet_id.into(), hash: publish.hash, key });
            }
        }
        let subscribed = matches!(self.inbox.state, InboxState::Subscribed);
        let close = Close {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            cursors: if subscribed { self.cursors() } else { Vec::new() },
            taken,
            expiry_s,
        };
        let shard = shard_of(&self.user, self.shards);
        effects.requests.push(SessionRequest {
            ticket: None,
            shard,
            order: 0,
            body: Body { body: Some(body::Body::Close(close)) },
        });
    }
}
