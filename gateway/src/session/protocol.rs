//! What a client may say and how it is answered: PUBLISH, SUBSCRIBE, UNSUBSCRIBE and the rest, for both versions.

use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::{self, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{MarkRead, RoomPublish, Send, Subscribe, Taken, body};
use im_proto::topic::{self, Publish as PublishTopic, Subscription, TopicError};
use xxhash_rust::xxh3::Xxh3Default;

use super::rooms::{EnteredRoom, count_of};
use super::{
    Answer, Counter, Digits, Effects, End, InboxState, PendingSubscribe, Phase, RoomEffect, RoomPart, Session,
    Subscribing, TakenPublish, What, refusal_of,
};
use crate::mqtt::{self, DecodeError, Delivery, Packet, Publish, Reason, Version};

const ROOMS_MAX: usize = 64;
const SUBSCRIBES_WAITING_MAX: usize = 16;
const FILTERS_MAX: usize = 64;
const CLIENT_MESSAGE_ID_BYTES_MAX: usize = 64;

/// A SUBACK code that is not known yet.
const UNANSWERED: u8 = 0xFF;

impl Session {
    /// A packet of the client. Only while [`Session::wants_input`].
    pub fn on_packet(&mut self, now_ms: u64, packet: Packet<'_>, effects: &mut Effects) {
        if self.phase != Phase::Live {
            return;
        }
        self.heard_ms = now_ms;
        match packet {
            Packet::Connect(_) => self.end(End::Server(Reason::ProtocolError, "a second CONNECT"), effects),
            Packet::Publish(publish) => self.on_publish(now_ms, &publish, effects),
            Packet::PubAck { packet_id } => {
                if self.inbox.acknowledged(packet_id) {
                    self.fetch(now_ms, effects);
                } else {
                    self.shared.metrics.unknown_puback.inc();
                }
            }
            Packet::Subscribe(subscribe) => self.on_subscribe(now_ms, &subscribe, effects),
            Packet::Unsubscribe { packet_id, filters } => self.on_unsubscribe(now_ms, packet_id, &filters, effects),
            Packet::PingReq => mqtt::pingresp(&mut self.out),
            Packet::Disconnect { session_expiry_s: Some(1..), .. }
                if self.version == Version::V5 && self.session_expiry_s == 0 =>
            {
                let text = "a session that ends with its connection can't be given an expiry in DISCONNECT";
                self.end(End::Server(Reason::ProtocolError, text), effects);
            }
            Packet::Disconnect { reason, session_expiry_s } => {
                let cap_s = self.shared.limits.session_expiry_s_max;
                let session_expiry_s = session_expiry_s.map(|asked| asked.min(cap_s));
                self.end(End::Client { will: reason != Reason::Success.code(), session_expiry_s }, effects);
            }
        }
    }

    /// Input that is no packet.
    pub fn on_bad_input(&mut self, error: DecodeError, effects: &mut Effects) {
        self.shared.metrics.refused(error.reason);
        self.end(End::Server(error.reason, error.what), effects);
    }

    // ---- PUBLISH ------------------------------------------------------------------------------------------------------

    fn on_publish(&mut self, now_ms: u64, publish: &Publish<'_>, effects: &mut Effects) {
        let fatal = if publish.qos == 2 {
            Some((Reason::QosNotSupported, "QoS 2 is not supported: use QoS 1 and the user property id"))
        } else if publish.retain {
            Some((Reason::RetainNotSupported, "retained messages are not supported"))
        } else if publish.topic_alias {
            Some((Reason::TopicAliasInvalid, "topic aliases are not supported"))
        } else if publish.qos == 1 && self.publishes_unanswered >= usize::from(self.shared.limits.receive_maximum) {
            Some((
                Reason::ReceiveMaximumExceeded,
                "more publishes without an answer than the announced Receive Maximum",
            ))
        } else {
            None
        };
        if let Some((reason, text)) = fatal {
            self.shared.metrics.refused(reason);
            return self.end(End::Server(reason, text), effects);
        }
        // Of QoS 0 nothing is sent again.
        let hash = if publish.qos == 1 { hash_of(publish) } else { 0 };
        let in_use = self.waiting.iter().find_map(|waiting| match &waiting.what {
            What::Publish(taken) if publish.qos == 1 && taken.packet_id == publish.packet_id => {
                Some(taken.hash == hash && publish.dup)
            }
            _ => None,
        });
        match in_use {
            Some(true) => return, // its answer is under way
            Some(false) => {
                return self.refuse(
                    publish.packet_id,
                    publish.topic,
                    Reason::PacketIdInUse,
                    "the packet id waits for its answer",
                    effects,
                );
            }
            None => {}
        }
        let topic = PublishTopic::parse(publish.topic);
        if let Ok(PublishTopic::Like(room) | PublishTopic::Gift { room, .. }) = topic {
            let counter = match topic {
                Ok(PublishTopic::Gift { gift, .. }) => Counter::Gift(gift.into()),
                _ => Counter::Like,
            };
            return self.on_count(now_ms, publish, hash, room, counter, effects);
        }
        let mut taken = Box::new(TakenPublish {
            packet_id: publish.packet_id,
            hash,
            key: None,
            topic: publish.topic.into(),
            mark: None,
        });
        let user = self.user.clone();
        let request = match topic {
            Ok(PublishTopic::ToUser(peer)) => self.send_to(ids::direct_conversation(&user, peer), publish, &mut taken),
            Ok(PublishTopic::ToGroup(group)) => self.send_to(ids::group_conversation(group), publish, &mut taken),
            Ok(PublishTopic::ReadUser(peer)) => {
                self.mark_read(ids::direct_conversation(&user, peer), publish, &mut taken)
            }
            Ok(PublishTopic::ReadGroup(group)) => self.mark_read(ids::group_conversation(group), publish, &mut taken),
            Ok(PublishTopic::ToRoom(room)) => {
                let shard = self.shard_of_room(room);
                let (sender, device) = (user.to_string(), self.device.to_string());
                let payload = Bytes::copy_from_slice(publish.payload);
                Ok((shard, 0, body::Body::RoomPublish(RoomPublish { room: room.to_owned(), sender, device, payload })))
            }
            // The counters were dealt with above.
            Ok(PublishTopic::Like(_) | PublishTopic::Gift { .. }) | Err(TopicError::Unknown | TopicError::Wildcard) => {
                Err((
                    Reason::TopicNameInvalid,
                    "unknown topic: use u/{user}, g/{group}, read/u/{peer}, read/g/{group}, r/{room} or r/{room}/like",
                ))
            }
        };
        match request {
            Ok((shard, order, body)) => {
                self.shared.metrics.accepted.inc();
                self.publishes_unanswered += usize::from(publish.qos == 1);
                self.ask(now_ms, What::Publish(taken), shard, order, body, effects);
            }
            Err((reason, text)) => self.refuse(publish.packet_id, publish.topic, reason, text, effects),
        }
    }

    /// A like or a gift.
    fn on_count(
        &mut self,
        now_ms: u64,
        publish: &Publish<'_>,
        hash: u64,
        room: &str,
        counter: Counter,
        effects: &mut Effects,
    ) {
        let count = match count_of(publish.payload) {
            Ok(count) => count,
            Err((reason, text)) => return self.refuse(publish.packet_id, publish.topic, reason, text, effects),
        };
        self.shared.metrics.accepted.inc();
        let ticket = (publish.qos == 1).then(|| {
            self.publishes_unanswered += 1;
            let (packet_id, topic) = (publish.packet_id, publish.topic.into());
            self.wait(now_ms, What::Publish(Box::new(TakenPublish { packet_id, hash, key: None, topic, mark: None })))
        });
        self.count(room, counter, count, ticket, effects);
    }

    #[allow(clippy::type_complexity)]
    fn send_to(
        &mut self,
        conversation: String,
        publish: &Publish<'_>,
        taken: &mut TakenPublish,
    ) -> Result<(u32, u64, body::Body), (Reason, &'static str)> {
        let client_id = match publish.id {
            Some(id) if id.is_empty() || id.len() > CLIENT_MESSAGE_ID_BYTES_MAX || id.chars().any(char::is_control) => {
                return Err((Reason::ImplementationSpecific, "the user property id must be 1 to 64 printable bytes"));
            }
            id => id.unwrap_or_default(),
        };
        if client_id.is_empty() {
            taken.key = Some(self.key_for(publish, taken.hash));
        }
        let order = order_group(self.connection, &conversation);
        let shard = shard_of(&conversation, self.shards);
        let send = Send {
            conversation,
            sender: self.user.to_string(),
            device: self.device.to_string(),
            client_id: client_id.to_owned(),
            key: taken.key.map(|key| Bytes::copy_from_slice(&key)).unwrap_or_default(),
            payload: Bytes::copy_from_slice(publish.payload),
        };
        Ok((shard, order, body::Body::Send(send)))
    }

    /// A DUP of what the last connection left unanswered goes under its old key, so that it is stored once.
    fn key_for(&mut self, publish: &Publish<'_>, hash: u64) -> [u8; 16] {
        let matches = |taken: &Taken| taken.packet_id == u32::from(publish.packet_id) && taken.hash == hash;
        if publish.dup
            && let Some(index) = self.resumable.iter().position(matches)
            && let Ok(key) = <[u8; 16]>::try_from(&self.resumable.swap_remove(index).key[..])
        {
            return key;
        }
        self.shared.key()
    }

    #[allow(clippy::type_complexity)]
    fn mark_read(
        &self,
        conversation: String,
        publish: &Publish<'_>,
        taken: &mut TakenPublish,
    ) -> Result<(u32, u64, body::Body), (Reason, &'static str)> {
        let seq =
            std::str::from_utf8(publish.payload).ok().and_then(|text| text.trim().parse().ok()).filter(|seq| *seq > 0);
        let seq: u64 =
            seq.ok_or((Reason::PayloadFormatInvalid, "the payload must be a seq: a decimal number from 1"))?;
        let shard = shard_of(&conversation, self.shards);
        taken.mark = Some((conversation.clone(), seq));
        Ok((shard, 0, body::Body::MarkRead(MarkRead { conversation, user: self.user.to_string(), seq })))
    }

    pub(super) fn on_publish_answered(&mut self, taken: TakenPublish, answer: Answer, effects: &mut Effects) {
        self.publishes_unanswered -= usize::from(taken.packet_id != 0);
        let acked: &[(&str, &str)] = match answer {
            Answer::Outcome(Outcome::Stored(stored)) => {
                self.shared.metrics.acked.inc();
                // A conversation that is not known yet becomes so by the owner's push, which says where it starts.
                if let Some(conversation) = conversation_of(&self.user, &taken.topic) {
                    self.inbox.own_stored(&conversation, stored.seq);
                }
                if taken.packet_id == 0 {
                    return;
                }
                let (seq, ts) = (Digits::new(stored.seq), Digits::new(stored.ts_ms.unsigned_abs()));
                return self.success(taken.packet_id, &[("seq", seq.as_str()), ("ts", ts.as_str())]);
            }
            Answer::Outcome(Outcome::Marked(marked)) => {
                if let Some((conversation, _)) = &taken.mark {
                    self.inbox.own_marked(conversation, marked.seq);
                }
                if taken.packet_id == 0 {
                    return;
                }
                let seq = Digits::new(marked.seq);
                return self.success(taken.packet_id, &[("seq", seq.as_str())]);
            }
            Answer::Outcome(Outcome::Done(_)) => &[],
            answer => {
                let ((reason, text), _) = refusal_of(&answer);
                return self.refuse(taken.packet_id, &taken.topic, reason, text, effects);
            }
        };
        if taken.packet_id != 0 {
            self.success(taken.packet_id, acked);
        }
    }

    fn success(&mut self, packet_id: u16, user_properties: &[(&str, &str)]) {
        let user_properties = if self.problem_information { user_properties } else { &[] };
        mqtt::puback(&mut self.out, self.version, packet_id, Reason::Success, "", user_properties);
    }

    /// Refuses a publish: MQTT 5 by the code; 3.1.1, which has no negative PUBACK, by a notice, or for now by ending.
    fn refuse(&mut self, packet_id: u16, topic: &str, reason: Reason, text: &'static str, effects: &mut Effects) {
        self.shared.metrics.refused(reason);
        if packet_id == 0 {
            return;
        }
        let for_now = matches!(reason, Reason::QuotaExceeded | Reason::Unspecified);
        match self.version {
            Version::V5 => {
                let text = if self.problem_information { text } else { "" };
                mqtt::puback(&mut self.out, self.version, packet_id, reason, text, &[]);
            }
            Version::V311 if for_now || !matches!(self.inbox.state, InboxState::Subscribed) => {
                self.end(End::Server(reason, text), effects);
            }
            Version::V311 => {
                let notice = serde_json::json!({ "packetId": packet_id, "topic": topic, "reason": reason.name() });
                let payload = Bytes::from(notice.to_string());
                let delivery =
                    Delivery { topic: &[topic::REFUSED_TOPIC], packet_id: 0, user_properties: &[], payload: &payload };
                delivery.encode(&mut self.out, self.version);
                mqtt::puback(&mut self.out, self.version, packet_id, Reason::Success, "", &[]);
            }
        }
    }

    // ---- SUBSCRIBE, UNSUBSCRIBE ---------------------------------------------------------------------------------------

    fn on_subscribe(&mut self, now_ms: u64, subscribe: &mqtt::Subscribe<'_>, effects: &mut Effects) {
        if subscribe.has_identifier {
            let reason = Reason::SubscriptionIdsNotSupported;
            self.shared.metrics.refused(reason);
            return self.end(End::Server(reason, "subscription identifiers are not supported"), effects);
        }
        if self.subscribes.len() >= SUBSCRIBES_WAITING_MAX {
            self.shared.metrics.refused(Reason::QuotaExceeded);
            let codes = vec![Reason::QuotaExceeded.code(); subscribe.filters.len()];
            return mqtt::suback(
                &mut self.out,
                self.version,
                subscribe.packet_id,
                &codes,
                "too many SUBSCRIBEs wait for their SUBACK",
            );
        }
        let packet_id = subscribe.packet_id;
        let count = subscribe.filters.len();
        self.subscribes.push(PendingSubscribe {
            packet_id,
            codes: vec![UNANSWERED; count],
            unanswered: count,
            reason: "",
        });
        for (index, (filter, _)) in subscribe.filters.iter().enumerate() {
            let refusal = match Subscription::parse(filter) {
                _ if index >= FILTERS_MAX => (Reason::QuotaExceeded, "at most 64 topic filters a SUBSCRIBE"),
                Ok(Subscription::Inbox) => {
                    self.subscribe_inbox(now_ms, packet_id, index, effects);
                    continue;
                }
                Ok(parsed @ (Subscription::Room(room) | Subscription::RoomStats(room))) => {
                    let is_stats = matches!(parsed, Subscription::RoomStats(_));
                    let part = if is_stats { RoomPart::Stats } else { RoomPart::Messages };
                    match self.enter(now_ms, packet_id, index, room, part, effects) {
                        Ok(()) => continue,
                        Err(refusal) => refusal,
                    }
                }
                Err(_) if filter.starts_with("$share/") => {
                    (Reason::SharedSubscriptionsNotSupported, "shared subscriptions are not supported")
                }
                Err(TopicError::Wildcard) => (Reason::TopicFilterInvalid, "of wildcards, only inbox/# is served"),
                Err(TopicError::Unknown) => {
                    (Reason::TopicFilterInvalid, "unknown topic filter: use inbox/# or r/{room}")
                }
            };
            self.not_granted(packet_id, index, refusal);
        }
    }

    /// Rooms are QoS 0, whatever was asked.
    fn enter(
        &mut self,
        now_ms: u64,
        packet_id: u16,
        filter: usize,
        room: &str,
        part: RoomPart,
        effects: &mut Effects,
    ) -> Result<(), (Reason, &'static str)> {
        if self.rooms.iter().any(|entered| entered.part == part && *entered.room == *room) {
            self.granted(packet_id, filter, 0);
            return Ok(());
        }
        if self.rooms.len() >= ROOMS_MAX {
            return Err((Reason::QuotaExceeded, "at most 64 rooms a connection"));
        }
        let room = Arc::<str>::from(room);
        // Most people are in one room: no space for more.
        self.rooms.reserve_exact(1);
        self.rooms.push(EnteredRoom { room: room.clone(), part });
        let ticket = self.wait(now_ms, What::EnterRoom { packet_id, filter, room: room.clone(), part });
        effects.rooms.push(RoomEffect::Enter { room, part, ticket });
        Ok(())
    }

    pub(super) fn granted(&mut self, packet_id: u16, filter: usize, code: u8) {
        let Some(position) = self.subscribes.iter().position(|pending| pending.packet_id == packet_id) else { return };
        let pending = &mut self.subscribes[position];
        if let Some(slot) = pending.codes.get_mut(filter)
            && std::mem::replace(slot, code) == UNANSWERED
        {
            pending.unanswered -= 1;
        }
        if pending.unanswered == 0 {
            let pending = self.subscribes.remove(position);
            if self.subscribes.is_empty() {
                self.subscribes = Vec::new();
            }
            let reason = if self.problem_information { pending.reason } else { "" };
            mqtt::suback(&mut self.out, self.version, packet_id, &pending.codes, reason);
        }
    }

    pub(super) fn not_granted(&mut self, packet_id: u16, filter: usize, (reason, text): (Reason, &'static str)) {
        self.shared.metrics.refused(reason);
        if let Some(pending) = self.subscribes.iter_mut().find(|pending| pending.packet_id == packet_id) {
            pending.reason = text;
        }
        self.granted(packet_id, filter, reason.code());
    }

    fn subscribe_inbox(&mut self, now_ms: u64, packet_id: u16, filter: usize, effects: &mut Effects) {
        match &mut self.inbox.state {
            InboxState::Subscribed => self.granted(packet_id, filter, 1),
            InboxState::Subscribing(subscribing) => subscribing.waiters.push((packet_id, filter)),
            InboxState::Unsubscribed => {
                let heads_left = self.ask_heads(now_ms, || What::HeadsToSubscribe, effects);
                self.inbox.state =
                    InboxState::Subscribing(Box::new(Subscribing { waiters: vec![(packet_id, filter)], heads_left }));
                if heads_left == 0 {
                    self.write_subscription(now_ms, effects);
                }
            }
        }
    }

    pub(super) fn write_subscription(&mut self, now_ms: u64, effects: &mut Effects) {
        let subscribe = Subscribe {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            subscribed: true,
            cursors: self.cursors(),
        };
        self.ask_user(now_ms, What::SubscribeInbox, body::Body::Subscribe(subscribe), effects);
    }

    pub(super) fn subscription_failed(&mut self, refusal: (Reason, &'static str), effects: &mut Effects) {
        // The heads that are still to come belong to no later SUBSCRIBE.
        self.give_up(|what| matches!(what, What::HeadsToSubscribe), effects);
        if let InboxState::Subscribing(subscribing) = std::mem::replace(&mut self.inbox.state, InboxState::Unsubscribed)
        {
            for (packet_id, filter) in subscribing.waiters {
                self.not_granted(packet_id, filter, refusal);
            }
        }
    }

    fn on_unsubscribe(&mut self, now_ms: u64, packet_id: u16, filters: &[&str], effects: &mut Effects) {
        let mut inbox = false;
        let mut codes = Vec::with_capacity(filters.len());
        for filter in filters {
            let existed = match Subscription::parse(filter) {
                Ok(Subscription::Inbox) if !matches!(self.inbox.state, InboxState::Unsubscribed) => {
                    inbox = true;
                    true
                }
                Ok(Subscription::Room(room)) => self.leave(room, RoomPart::Messages, effects),
                Ok(Subscription::RoomStats(room)) => self.leave(room, RoomPart::Stats, effects),
                _ => false,
            };
            codes.push(if existed { Reason::Success } else { Reason::NoSubscriptionExisted }.code());
        }
        if !inbox {
            return mqtt::unsuback(&mut self.out, self.version, packet_id, &codes);
        }
        let state = std::mem::replace(&mut self.inbox.state, InboxState::Unsubscribed);
        let was_subscribed = matches!(state, InboxState::Subscribed);
        if let InboxState::Subscribing(subscribing) = state {
            // What was asked of the owner for these is undone by what he is asked now.
            self.give_up(|what| matches!(what, What::HeadsToSubscribe | What::SubscribeInbox), effects);
            for (packet_id, filter) in subscribing.waiters {
                self.granted(packet_id, filter, 1);
            }
        }
        self.write_unsubscription(now_ms, What::UnsubscribeInbox { packet_id, codes, was_subscribed }, effects);
    }

    pub(super) fn write_unsubscription(&mut self, now_ms: u64, what: What, effects: &mut Effects) {
        let unsubscribe = Subscribe {
            user: self.user.to_string(),
            device: self.device.to_string(),
            number: self.number,
            subscribed: false,
            cursors: Vec::new(),
        };
        self.ask_user(now_ms, what, body::Body::Subscribe(unsubscribe), effects);
    }

    /// Whether the session was there.
    fn leave(&mut self, room: &str, part: RoomPart, effects: &mut Effects) -> bool {
        let is_it = |entered: &EnteredRoom| entered.part == part && *entered.room == *room;
        let Some(position) = self.rooms.iter().position(is_it) else { return false };
        let EnteredRoom { room, part } = self.rooms.swap_remove(position);
        effects.rooms.push(RoomEffect::Leave { room, part });
        true
    }
}

fn conversation_of(user: &str, topic: &str) -> Option<String> {
    match PublishTopic::parse(topic) {
        Ok(PublishTopic::ToUser(peer)) => Some(ids::direct_conversation(user, peer)),
        Ok(PublishTopic::ToGroup(group)) => Some(ids::group_conversation(group)),
        _ => None,
    }
}

/// By which a publish sent again is known: xxh3 of topic, a zero byte and payload.
fn hash_of(publish: &Publish<'_>) -> u64 {
    let mut hash = Xxh3Default::new();
    hash.update(publish.topic.as_bytes());
    hash.update(&[0]);
    hash.update(publish.payload);
    hash.digest()
}

fn order_group(connection: u64, conversation: &str) -> u64 {
    xxhash_rust::xxh3::xxh3_64_with_seed(conversation.as_bytes(), connection).max(1)
}
