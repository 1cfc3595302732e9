//! Users: their sessions (which are their presence), the index of their conversations, cursors; and being told of new entries.
//!
//! A notification is acknowledged when the recipient's index row is durable and every gateway with a live session of his took the push.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Close, ConversationList, Conversations, Cursor, Cursors, Deliver, IndexRow, Kick, KickReason, KickSession,
    LiveSession, Notify, PresenceInfo, Recipient, Refusal, Register, Registered, SessionNumber, Subscribe, Taken, body,
    push,
};
use im_proto::state::{CursorRow, IndexRow as StoredIndexRow, SessionRow, TakenRow};
use prost::Message;

use super::cache::Cache;
use super::calls::{StoreAnswer, StoreCall, UserRows, keys};
use super::ownership::{Slot, store_refusal};
use super::shard::OwnedShard;
use super::{Context, Core, Env, JobKey, LOCAL, ReplyTo};
use crate::store::{Put, StoreError};

/// How long a gateway's sessions live on without its link; less if it was silent before: they end within 3 s of the gateway.
pub(super) const GATEWAY_GRACE: Duration = Duration::from_secs(2);
/// How long a new owner waits for gateways to announce their sessions.
const ANNOUNCE_WAIT: Duration = Duration::from_secs(3);
/// How long a registration waits for the session that it takes over to close.
const TAKEOVER_WAIT: Duration = Duration::from_secs(1);
/// How often cursors in memory are written.
const CURSOR_INTERVAL: Duration = Duration::from_secs(60);
/// How long a session that expired is kept for a gateway that was stopped and says that it lives after all.
const EXPIRED_KEPT: Duration = Duration::from_secs(3_600);
/// Index rows of one answer.
const LIST_ROWS_MAX: u32 = 1_000;

/// The users of one shard.
pub(super) struct Users {
    users: Cache<User>,
    /// Gateways that announced all their sessions.
    announced: BTreeSet<MemberId>,
    /// Until then nobody without a session is known to be offline.
    acquired_at: Duration,
    is_known: bool,
    /// Notifications for people whose sessions may still be announced.
    held: Vec<u64>,
    jobs: BTreeMap<u64, Job>,
    sessions_counted: u64,
    takeovers: Vec<(Duration, Arc<str>, Arc<str>)>,
    dirty: BTreeSet<(Arc<str>, Arc<str>)>,
    write_cursors_at: Duration,
}

/// A notification that waits for index rows and gateways.
struct Job {
    to: ReplyTo,
    waits_for: u32,
}

#[derive(Default)]
struct User {
    index: BTreeMap<Arc<str>, Index>,
    /// Boxed: a map makes space for eleven of them at once, and nearly everybody has one or two.
    devices: BTreeMap<Arc<str>, Box<Device>>,
}

struct Index {
    row: StoredIndexRow,
    is_durable: bool,
    waiting: Vec<u64>,
}

#[derive(Default)]
struct Device {
    /// As stored; a session that ends with its connection has none.
    row: Option<SessionRow>,
    connections: u64,
    cursors: BTreeMap<Arc<str>, u64>,
    live: Option<Live>,
    registering: Option<Registering>,
}

struct Live {
    number: SessionNumber,
    gateway: MemberId,
    connection: u64,
    since_ms: i64,
    /// What its registration was answered: there was a session before it.
    was_present: bool,
}

struct Registering {
    to: ReplyTo,
    gateway: MemberId,
    register: Register,
    /// Set once it is being written: the new row, and whether a session was there.
    written: Option<(Option<SessionRow>, bool)>,
}

/// A write of user state.
pub(super) struct UserWrite {
    pub(super) puts: Vec<Put>,
    then: Then,
}

/// What follows when it is durable.
enum Then {
    /// Nothing; but it must be written in the end.
    Nothing,
    /// The index row is there; written in the end.
    Indexed { user: Arc<str>, conversation: Arc<str> },
    /// A session is closed; written in the end.
    Closed { to: ReplyTo },
    /// A registration is recorded.
    Registered { user: Arc<str>, device: Arc<str> },
    /// A subscription is recorded.
    Subscribed { to: ReplyTo, user: Arc<str>, device: Arc<str>, subscribed: bool },
}

impl Users {
    pub(super) fn new(now: Duration) -> Self {
        Self {
            users: Cache::default(),
            announced: BTreeSet::new(),
            acquired_at: now,
            is_known: false,
            held: Vec::new(),
            jobs: BTreeMap::new(),
            sessions_counted: 0,
            takeovers: Vec::new(),
            dirty: BTreeSet::new(),
            write_cursors_at: now + CURSOR_INTERVAL,
        }
    }

    fn get(&mut self, user: &str) -> Option<&mut User> {
        self.users.get_mut(user)
    }

    fn device(&mut self, user: &str, device: &str) -> Option<&mut Device> {
        self.get(user)?.devices.get_mut(device).map(Box::as_mut)
    }

    pub(super) fn forget_waiter(&mut self, waiter: u64) {
        self.users.forget_waiter(waiter);
    }
}

impl User {
    fn load(rows: UserRows) -> Result<Self, prost::DecodeError> {
        let mut user = Self::default();
        for (conversation, row) in rows.index {
            let row = StoredIndexRow::decode(row)?;
            user.index.insert(conversation.into(), Index { row, is_durable: true, waiting: Vec::new() });
        }
        for (device, row) in rows.sessions {
            let row = SessionRow::decode(row)?;
            let connections = row.connections;
            let device_state = Device { row: Some(row), connections, ..Device::default() };
            user.devices.insert(device.into(), Box::new(device_state));
        }
        for (device, row) in rows.cursors {
            let row = CursorRow::decode(row)?;
            let device = user.devices.entry(device.into()).or_default();
            device.cursors = row.conversations.into_iter().map(Arc::from).zip(row.seqs).collect();
        }
        Ok(user)
    }

    /// Sessions whose time has been over for a while go.
    fn forget_expired(&mut self, user: &str, now_ms: i64, puts: &mut Vec<Put>) {
        let kept_from_ms = now_ms.saturating_sub(EXPIRED_KEPT.as_millis() as i64);
        self.devices.retain(|id, device| {
            let is_over = |row: &SessionRow| row.ended_ms != 0 && is_expired(row, kept_from_ms);
            let is_connected = device.live.is_some() || device.registering.is_some();
            let is_kept = is_connected || !device.row.as_ref().is_some_and(is_over);
            if !is_kept {
                puts.push(Put { key: keys::session(user, id), value: None });
                puts.push(Put { key: keys::cursors(user, id), value: None });
            }
            is_kept
        });
    }

    fn is_stored(&self) -> bool {
        !self.index.is_empty() || self.devices.values().any(|device| device.row.is_some() || !device.cursors.is_empty())
    }

    fn is_connected(&self) -> bool {
        self.devices.values().any(|device| device.live.is_some() || device.registering.is_some())
    }

    fn index_rows(&self) -> Vec<IndexRow> {
        self.index.iter().map(|(conversation, index)| index.as_link(conversation)).collect()
    }
}

impl Index {
    fn as_link(&self, conversation: &str) -> IndexRow {
        let StoredIndexRow { from_seq, to_seq, as_of } = self.row;
        IndexRow { conversation: conversation.to_owned(), from_seq, to_seq, as_of }
    }
}

impl Device {
    /// Takes over what was acknowledged; says whether anything moved.
    fn merge(&mut self, cursors: &[Cursor]) -> bool {
        let mut moved = false;
        for cursor in cursors {
            match self.cursors.get_mut(cursor.conversation.as_str()) {
                Some(seq) if *seq >= cursor.seq => {}
                Some(seq) => {
                    *seq = cursor.seq;
                    moved = true;
                }
                None => {
                    self.cursors.insert(cursor.conversation.as_str().into(), cursor.seq);
                    moved = true;
                }
            }
        }
        moved
    }

    fn cursor_row(&self) -> Bytes {
        let conversations = self.cursors.keys().map(ToString::to_string).collect();
        CursorRow { conversations, seqs: self.cursors.values().copied().collect() }.encode_to_vec().into()
    }

    /// Its gateway is gone for good.
    fn end(&mut self, user: &str, device: &str, now_ms: i64, puts: &mut Vec<Put>) {
        self.live = None;
        if let Some(row) = &mut self.row {
            row.ended_ms = now_ms;
            puts.push(Put { key: keys::session(user, device), value: Some(row.encode_to_vec().into()) });
            puts.push(Put { key: keys::cursors(user, device), value: Some(self.cursor_row()) });
        }
    }

    fn is_live(&self, number: Option<SessionNumber>) -> bool {
        self.live.as_ref().is_some_and(|live| Some(live.number) == number)
    }
}

/// Whether a session of this row is none any more: it ended with its connection, or its time is over.
fn is_expired(row: &SessionRow, now_ms: i64) -> bool {
    row.expiry_s == 0 || (row.ended_ms != 0 && row.ended_ms.saturating_add(i64::from(row.expiry_s) * 1_000) < now_ms)
}

fn is_higher(a: SessionNumber, b: SessionNumber) -> bool {
    (a.epoch, a.counter) > (b.epoch, b.counter)
}

impl OwnedShard {
    // ---- loads ----------------------------------------------------------------------------------------------------------

    pub(super) fn load_missing_users(&mut self, env: &mut Env, body: &body::Body, waiter: u64) -> usize {
        let mut missing = 0;
        let (number, epoch, now) = (self.number, self.epoch, env.now.mono);
        let mut need = |user: &str| {
            let load = |user| ask_for_user(env, number, epoch, user);
            missing += usize::from(self.users.users.need(now, user, Some(waiter), load));
        };
        match body {
            body::Body::Register(Register { user, .. })
            | body::Body::Close(Close { user, .. })
            | body::Body::Subscribe(Subscribe { user, .. })
            | body::Body::Cursors(Cursors { user, .. })
            | body::Body::Conversations(Conversations { user, .. })
            | body::Body::Presence(im_proto::link::Presence { user })
            | body::Body::Kick(Kick { user, .. }) => need(user),
            body::Body::Notify(notify) => {
                let users = notify.recipients.iter().map(|recipient| &recipient.user);
                users.chain(notify.read_states.iter().map(|state| &state.user)).for_each(|user| need(user));
            }
            // All is announced only when the announcements before it are through.
            body::Body::Announced(_) => missing += self.users.users.need_all_loads(waiter),
            _ => {}
        }
        missing
    }

    pub(super) fn user_loaded(&mut self, env: &mut Env, id: Arc<str>, answer: Result<StoreAnswer, StoreError>) {
        let loaded = match answer {
            Ok(StoreAnswer::LoadUser(rows)) => {
                User::load(rows).map_err(|error| (Refusal::StoreUnavailable, error.to_string()))
            }
            Ok(_) => Err((Refusal::StoreUnavailable, "the store answered something else".to_owned())),
            Err(error) => Err(store_refusal(&error)),
        };
        match loaded {
            Ok(mut value) => {
                let mut puts = Vec::new();
                value.forget_expired(&id, env.now.wall_ms, &mut puts);
                self.write_puts(env, puts);
                let waiters = self.users.users.loaded(env.now.mono, id, value);
                self.wake(env, waiters);
            }
            Err((code, reason)) => {
                let waiters = self.users.users.failed(&id);
                let patient = self.refuse_waiters(env, waiters, code, &reason);
                self.users.users.try_again(env.now.mono, id, patient);
            }
        }
    }

    // ---- requests -------------------------------------------------------------------------------------------------------

    pub(super) fn ask_users(&mut self, env: &mut Env, to: ReplyTo, body: body::Body) {
        match body {
            body::Body::Register(register) => self.register(env, to, register),
            body::Body::Close(close) => self.close(env, to, close),
            body::Body::Subscribe(subscribe) => self.subscribe(env, to, subscribe),
            body::Body::Cursors(cursors) => {
                if let Some(device) =
                    self.users.device(&cursors.user, &cursors.device).filter(|device| device.is_live(cursors.number))
                    && device.merge(&cursors.cursors)
                {
                    self.users.dirty.insert((cursors.user.into(), cursors.device.into()));
                }
                env.done(to);
            }
            body::Body::Notify(notify) => self.notify(env, to, &notify),
            body::Body::Conversations(list) => {
                let Some(user) = self.users.get(&list.user) else { return };
                let limit = list.limit.clamp(1, LIST_ROWS_MAX) as usize;
                let after = (std::ops::Bound::Excluded(list.after.as_str()), std::ops::Bound::Unbounded);
                let mut rows: Vec<IndexRow> =
                    user.index.range::<str, _>(after).take(limit + 1).map(|(id, row)| row.as_link(id)).collect();
                let more = rows.len() > limit;
                rows.truncate(limit);
                env.reply(to, Outcome::Conversations(ConversationList { rows, more }));
            }
            body::Body::Presence(presence) => {
                let known = self.presence_known(env);
                let Some(user) = self.users.get(&presence.user) else { return };
                let live = user.devices.iter().filter_map(|(device, state)| Some((device, state.live.as_ref()?)));
                let session = |(device, live): (&Arc<str>, &Live)| LiveSession {
                    device: device.to_string(),
                    gateway: live.gateway.name().to_owned(),
                    since_ms: live.since_ms,
                };
                let sessions: Vec<_> = live.map(session).collect();
                env.reply(to, Outcome::Presence(PresenceInfo { known: known || !sessions.is_empty(), sessions }));
            }
            body::Body::Kick(kick) => {
                let are_all_known = self.presence_known(env);
                let Some(user) = self.users.get(&kick.user) else { return };
                let mut was_kicked = false;
                for (device, state) in &user.devices {
                    if let Some(live) = &state.live
                        && (kick.device.is_empty() || kick.device == **device)
                    {
                        let kicked = kick_session(&kick.user, device, live.number, KickReason::Administrative);
                        env.push(&live.gateway, kicked, None);
                        was_kicked = true;
                    }
                }
                if are_all_known || (was_kicked && !kick.device.is_empty()) {
                    env.done(to);
                } else {
                    env.refuse(to, Refusal::Busy, "gateways still say who is there: try again in a moment");
                }
            }
            body::Body::Announced(_) => {
                if let Some(gateway) = env.links.get(&to.link).cloned() {
                    if let Some(known) = env.gateways.get_mut(&gateway) {
                        let (ours, others) = known.orphaned.drain(..).partition(|job| job.shard == self.number);
                        known.orphaned = others;
                        let ours: Vec<JobKey> = ours;
                        env.settled.extend(ours);
                    }
                    self.users.announced.insert(gateway);
                }
                self.release_held(env);
                env.done(to);
            }
            _ => env.refuse(to, Refusal::Invalid, "not a request to an owner"),
        }
    }

    fn register(&mut self, env: &mut Env, to: ReplyTo, register: Register) {
        let Some(gateway) = env.links.get(&to.link).filter(|_| to.link != LOCAL).cloned() else {
            return env.refuse(to, Refusal::Invalid, "sessions are registered by gateways");
        };
        if register.number.is_some() {
            return self.announce(env, to, gateway, register);
        }
        let now = env.now.mono;
        let Some(user) = self.users.get(&register.user) else { return };
        let device = user.devices.entry(register.device.as_str().into()).or_default();
        let is_same = |other: &MemberId, connection| *other == gateway && connection == register.connection;
        if let Some(registering) = &mut device.registering {
            if is_same(&registering.gateway, registering.register.connection) {
                registering.to = to;
                return;
            }
            if registering.written.is_some() {
                // It will be live in a moment: this one then takes it over.
                return env.refuse(to, Refusal::Busy, "another connection of this device is being registered");
            }
            let superseded = registering.to;
            (registering.to, registering.gateway, registering.register) = (to, gateway, register);
            return env.refuse(superseded, Refusal::StaleSession, "another connection of this device came later");
        }
        let (user_id, device_id) = (Arc::from(register.user.as_str()), Arc::from(register.device.as_str()));
        let mut waits = false;
        if let Some(live) = &device.live {
            if is_same(&live.gateway, live.connection) {
                // Its answer was lost with a link.
                let (number, was_present) = (live.number, live.was_present);
                return self.answer_registered(env, to, &user_id, &device_id, number, was_present);
            }
            let kicked = kick_session(&user_id, &device_id, live.number, KickReason::TakenOver);
            env.push(&live.gateway, kicked, None);
            // A gateway without a link has most likely ended: no Close comes, and its clients are on their way back.
            waits = env.gateways.get(&live.gateway).is_some_and(|known| known.link.is_some());
        }
        device.registering = Some(Registering { to, gateway, register, written: None });
        if waits {
            self.users.takeovers.push((now + TAKEOVER_WAIT, user_id, device_id));
        } else {
            self.write_registration(env, &user_id, &device_id);
        }
    }

    /// Nothing is left of the session taken over: the new one is recorded.
    fn write_registration(&mut self, env: &mut Env, user: &Arc<str>, device_id: &Arc<str>) {
        let now_ms = env.now.wall_ms;
        let Some(device) = self.users.device(user, device_id) else { return };
        let Some(registering) = device.registering.as_mut().filter(|registering| registering.written.is_none()) else {
            return;
        };
        device.live = None;
        let register = &registering.register;
        let had_row = device.row.is_some();
        // What was asked of the last owner may be stored: an empty session may be this very one, which the client then knows nothing of.
        let may_be_own = |row: &SessionRow| {
            registering.to.again && !row.subscribed && row.taken.is_empty() && device.cursors.is_empty()
        };
        let kept = device.row.as_ref();
        let kept = kept.filter(|row| !register.clean_start && !is_expired(row, now_ms) && !may_be_own(row));
        device.connections += 1;
        let row = SessionRow {
            connections: device.connections,
            subscribed: kept.is_some_and(|row| row.subscribed),
            expiry_s: register.expiry_s,
            ended_ms: 0,
            taken: kept.map(|row| row.taken.clone()).unwrap_or_default(),
        };
        let is_present = kept.is_some();
        let mut puts = Vec::new();
        if !is_present {
            device.cursors.clear();
            if had_row {
                puts.push(Put { key: keys::cursors(user, device_id), value: None });
            }
        }
        let row = (is_present || register.expiry_s > 0).then_some(row);
        if row.is_some() || had_row {
            let value = row.as_ref().map(|row| row.encode_to_vec().into());
            puts.push(Put { key: keys::session(user, device_id), value });
        }
        registering.written = Some((row, is_present));
        if puts.is_empty() {
            self.registered(env, user, device_id);
        } else {
            let then = Then::Registered { user: user.clone(), device: device_id.clone() };
            self.write_user(env, UserWrite { puts, then });
        }
    }

    fn registered(&mut self, env: &mut Env, user: &Arc<str>, device_id: &Arc<str>) {
        self.users.sessions_counted += 1;
        let number = SessionNumber { epoch: self.epoch, counter: self.users.sessions_counted };
        let Some(device) = self.users.device(user, device_id) else { return };
        let Some(Registering { to, gateway, register, written: Some((row, is_present)) }) = device.registering.take()
        else {
            return;
        };
        device.row = row;
        if !env.gateways.contains_key(&gateway) {
            // It went while this was being written: nobody would ever end the session.
            let mut puts = Vec::new();
            device.end(user, device_id, env.now.wall_ms, &mut puts);
            return self.write_puts(env, puts);
        }
        let (connection, since_ms) = (register.connection, env.now.wall_ms);
        device.live = Some(Live { number, gateway, connection, since_ms, was_present: is_present });
        self.answer_registered(env, to, user, device_id, number, is_present);
    }

    fn answer_registered(
        &mut self,
        env: &mut Env,
        to: ReplyTo,
        user: &str,
        device_id: &str,
        number: SessionNumber,
        session_present: bool,
    ) {
        let Some(user) = self.users.get(user) else { return };
        let index = user.index_rows();
        let Some(device) = user.devices.get(device_id) else { return };
        let row = device.row.as_ref();
        let taken = |taken: &TakenRow| Taken { packet_id: taken.packet_id, hash: taken.hash, key: taken.key.clone() };
        let registered = Registered {
            number: Some(number),
            session_present,
            subscribed: row.is_some_and(|row| row.subscribed),
            connections: device.connections,
            index,
            cursors: device
                .cursors
                .iter()
                .map(|(id, seq)| Cursor { conversation: id.to_string(), seq: *seq })
                .collect(),
            taken: row.map(|row| row.taken.iter().map(taken).collect()).unwrap_or_default(),
        };
        env.reply(to, Outcome::Registered(registered));
    }

    /// A living session tells a new owner, or the same one over a new link, that it is there.
    fn announce(&mut self, env: &mut Env, to: ReplyTo, gateway: MemberId, register: Register) {
        let Some(number) = register.number else { return };
        let Some(user) = self.users.get(&register.user) else { return };
        let index = user.index_rows();
        let device = user.devices.entry(register.device.as_str().into()).or_default();
        if let Some(live) = &device.live {
            if is_higher(live.number, number) {
                return env.refuse(to, Refusal::StaleSession, "another connection of this device came later");
            }
            if live.number != number {
                env.push(
                    &live.gateway,
                    kick_session(&register.user, &register.device, live.number, KickReason::TakenOver),
                    None,
                );
            }
        }
        let before = device.live.as_ref().filter(|live| live.number == number);
        let (since_ms, was_present) = before.map_or((env.now.wall_ms, true), |live| (live.since_ms, live.was_present));
        device.live = Some(Live { number, gateway, connection: register.connection, since_ms, was_present });
        // Its gateway was given up and came back: the session has not ended, and its time does not run. A registration that is being
        // written writes that, too.
        let is_written = device.registering.as_ref().is_some_and(|registering| registering.written.is_some());
        let revived = device.row.as_mut().filter(|row| row.ended_ms != 0 && !is_written).map(|row| {
            row.ended_ms = 0;
            let value = Some(row.encode_to_vec().into());
            Put { key: keys::session(&register.user, &register.device), value }
        });
        let connections = device.connections;
        if device.merge(&register.cursors) {
            self.users.dirty.insert((register.user.into(), register.device.into()));
        }
        self.write_puts(env, revived.into_iter().collect());
        let registered = Registered {
            number: Some(number),
            session_present: true,
            subscribed: register.subscribed,
            connections,
            index,
            ..Registered::default()
        };
        env.reply(to, Outcome::Registered(registered));
    }

    fn close(&mut self, env: &mut Env, to: ReplyTo, close: Close) {
        let epoch = self.epoch;
        let is_current = |device: &&mut Device| {
            // It may have been live at an owner before us: its gateway had nothing left to announce.
            let is_of_before = device.live.is_none() && device.registering.is_none();
            let is_open = device.row.as_ref().is_some_and(|row| row.ended_ms == 0);
            device.is_live(close.number)
                || (is_of_before && is_open && close.number.is_some_and(|number| number.epoch < epoch))
        };
        let Some(device) = self.users.device(&close.user, &close.device).filter(is_current) else {
            // Taken over, or closed before.
            return env.done(to);
        };
        device.live = None;
        device.merge(&close.cursors);
        let (user, device_id): (Arc<str>, Arc<str>) = (close.user.as_str().into(), close.device.as_str().into());
        let is_taken_over = device.registering.is_some();
        let mut puts = Vec::new();
        let had_row = device.row.is_some();
        let row = device.row.take();
        let expiry_s = close.expiry_s.or(row.as_ref().map(|row| row.expiry_s)).unwrap_or(0);
        if expiry_s > 0 {
            let taken = |taken: Taken| TakenRow { packet_id: taken.packet_id, hash: taken.hash, key: taken.key };
            let row = SessionRow {
                connections: device.connections,
                expiry_s,
                ended_ms: env.now.wall_ms,
                taken: close.taken.into_iter().map(taken).collect(),
                ..row.unwrap_or_default()
            };
            puts.push(Put { key: keys::session(&user, &device_id), value: Some(row.encode_to_vec().into()) });
            puts.push(Put { key: keys::cursors(&user, &device_id), value: Some(device.cursor_row()) });
            device.row = Some(row);
        } else {
            device.cursors.clear();
            if had_row {
                puts.push(Put { key: keys::session(&user, &device_id), value: None });
                puts.push(Put { key: keys::cursors(&user, &device_id), value: None });
            }
        }
        self.users.dirty.remove(&(user.clone(), device_id.clone()));
        if puts.is_empty() {
            env.done(to);
        } else {
            self.write_user(env, UserWrite { puts, then: Then::Closed { to } });
        }
        if is_taken_over {
            self.write_registration(env, &user, &device_id);
        }
    }

    fn subscribe(&mut self, env: &mut Env, to: ReplyTo, subscribe: Subscribe) {
        let (user, device_id): (Arc<str>, Arc<str>) =
            (subscribe.user.as_str().into(), subscribe.device.as_str().into());
        let is_announced = env.links.get(&to.link).is_some_and(|gateway| self.users.announced.contains(gateway));
        let Some(device) = self.users.device(&user, &device_id).filter(|device| device.is_live(subscribe.number))
        else {
            // It was under way when we acquired the shard: the gateway announces the session, and asks for this again.
            if !is_announced {
                return;
            }
            return env.refuse(to, Refusal::StaleSession, "this connection is not the device's latest");
        };
        device.merge(&subscribe.cursors);
        let Some(row) = &device.row else { return env.done(to) };
        let row = SessionRow { subscribed: subscribe.subscribed, ..row.clone() };
        let puts = vec![
            Put { key: keys::session(&user, &device_id), value: Some(row.encode_to_vec().into()) },
            Put { key: keys::cursors(&user, &device_id), value: Some(device.cursor_row()) },
        ];
        let then = Then::Subscribed { to, user, device: device_id, subscribed: subscribe.subscribed };
        self.write_user(env, UserWrite { puts, then });
    }

    // ---- being told -----------------------------------------------------------------------------------------------------

    /// Takes a notification of this member's own if nothing has to be confirmed or read for it, and says whether it did.
    pub(super) fn notify_at_once(&mut self, env: &mut Env, to: ReplyTo, notify: &Notify) -> bool {
        let told = || {
            let users = notify.recipients.iter().map(|recipient| &recipient.user);
            users.chain(notify.read_states.iter().map(|state| &state.user))
        };
        let is_here = |user: &String| self.users.users.get(user).is_some();
        if !self.is_confirmed(env.now.mono) || !told().all(is_here) {
            return false;
        }
        for user in told() {
            self.users.users.touch(env.now.mono, user);
        }
        self.notify(env, to, notify);
        true
    }

    fn notify(&mut self, env: &mut Env, to: ReplyTo, notify: &Notify) {
        for state in &notify.read_states {
            let Some(user) = self.users.get(&state.user) else { continue };
            let gateways: BTreeSet<MemberId> =
                user.devices.values().filter_map(|device| Some(device.live.as_ref()?.gateway.clone())).collect();
            for gateway in gateways {
                env.push(&gateway, push::Push::ReadState(state.clone()), None);
            }
        }
        let Some(entry) = &notify.entry else { return env.done(to) };
        self.load_count += 1;
        let job = env.next_job;
        env.next_job += 1;
        let key = JobKey { shard: self.number, epoch: self.epoch, job };
        let is_known = self.presence_known(env);
        let mut waits_for = 0;
        let mut is_held = false;
        // A person has one or two gateways, most notifications one person.
        let mut by_gateway: Vec<(MemberId, Vec<Recipient>)> = Vec::new();
        for recipient in &notify.recipients {
            let Some(user) = self.users.get(&recipient.user) else { continue };
            let mut write = None;
            match user.index.get_mut(notify.conversation.as_str()) {
                Some(index) if index.row.as_of >= recipient.as_of => {
                    if !index.is_durable {
                        index.waiting.push(job);
                        waits_for += 1;
                    }
                }
                known => {
                    let row = StoredIndexRow {
                        from_seq: recipient.from_seq,
                        to_seq: recipient.to_seq,
                        as_of: recipient.as_of,
                    };
                    let mut waiting = known.map(|index| std::mem::take(&mut index.waiting)).unwrap_or_default();
                    waiting.push(job);
                    waits_for += 1;
                    user.index.insert(notify.conversation.as_str().into(), Index { row, is_durable: false, waiting });
                    write = Some(row);
                }
            }
            let mut is_online = false;
            for (device, state) in &user.devices {
                let Some(live) = &state.live else { continue };
                is_online = true;
                // A session never gets back what it sent itself.
                if entry.sender == recipient.user && entry.device == **device {
                    continue;
                }
                let found = by_gateway.iter().position(|(gateway, _)| *gateway == live.gateway);
                let index = found.unwrap_or_else(|| {
                    by_gateway.push((live.gateway.clone(), Vec::new()));
                    by_gateway.len() - 1
                });
                let recipients = &mut by_gateway[index].1;
                if recipients.last().is_none_or(|last| last.user != recipient.user) {
                    recipients.push(recipient.clone());
                }
            }
            is_held |= !is_online && !is_known;
            if let Some(row) = write {
                let puts = vec![Put {
                    key: keys::index(&recipient.user, &notify.conversation),
                    value: Some(row.encode_to_vec().into()),
                }];
                let (user, conversation) = (recipient.user.as_str().into(), notify.conversation.as_str().into());
                self.write_user(env, UserWrite { puts, then: Then::Indexed { user, conversation } });
            }
        }
        for (gateway, recipients) in by_gateway {
            let deliver = Deliver { conversation: notify.conversation.clone(), entry: Some(entry.clone()), recipients };
            waits_for += u32::from(env.push(&gateway, push::Push::Deliver(deliver), Some(key)));
        }
        if is_held {
            self.users.held.push(job);
            waits_for += 1;
        }
        if waits_for == 0 {
            return env.done(to);
        }
        self.users.jobs.insert(job, Job { to, waits_for });
    }

    /// One thing less that a notification waits for.
    pub(super) fn job_step(&mut self, env: &mut Env, job: u64) {
        let Some(waiting) = self.users.jobs.get_mut(&job) else { return };
        waiting.waits_for -= 1;
        if waiting.waits_for == 0
            && let Some(Job { to, .. }) = self.users.jobs.remove(&job)
        {
            env.done(to);
        }
    }

    pub(super) fn presence_known(&mut self, env: &Env) -> bool {
        let users = &mut self.users;
        if !users.is_known {
            // The map may not know a gateway yet whose link is here.
            let linked = env.gateways.iter().filter(|(_, gateway)| gateway.link.is_some()).map(|(id, _)| id);
            let mut there = env.map_gateways.iter().chain(linked);
            let all_announced = !env.map_gateways.is_empty() && there.all(|gateway| users.announced.contains(gateway));
            users.is_known = all_announced || env.now.mono >= users.acquired_at + ANNOUNCE_WAIT;
        }
        users.is_known
    }

    fn release_held(&mut self, env: &mut Env) {
        if self.presence_known(env) {
            for job in std::mem::take(&mut self.users.held) {
                self.job_step(env, job);
            }
            self.publish_held(env);
        }
    }

    // ---- writes ---------------------------------------------------------------------------------------------------------

    pub(super) fn user_written(&mut self, env: &mut Env, write: UserWrite) {
        match write.then {
            Then::Nothing => {}
            Then::Closed { to } => env.done(to),
            Then::Registered { user, device } => self.registered(env, &user, &device),
            Then::Subscribed { to, user, device, subscribed } => {
                if let Some(row) = self.users.device(&user, &device).and_then(|device| device.row.as_mut()) {
                    row.subscribed = subscribed;
                }
                env.done(to);
            }
            Then::Indexed { user, conversation } => {
                let Some(index) = self.users.get(&user).and_then(|user| user.index.get_mut(&conversation)) else {
                    return;
                };
                index.is_durable = true;
                for job in std::mem::take(&mut index.waiting) {
                    self.job_step(env, job);
                }
            }
        }
    }

    /// A write of user state was refused for now: the client is told, or it is written again.
    pub(super) fn user_write_refused(&mut self, env: &mut Env, write: UserWrite, reason: &str) -> Option<UserWrite> {
        match write.then {
            Then::Nothing | Then::Indexed { .. } | Then::Closed { .. } => Some(write),
            Then::Registered { user, device } => {
                let registering = self.users.device(&user, &device)?.registering.take()?;
                env.refuse(registering.to, Refusal::StoreUnavailable, reason);
                None
            }
            Then::Subscribed { to, .. } => {
                env.refuse(to, Refusal::StoreUnavailable, reason);
                None
            }
        }
    }

    /// Writes the cursors that moved since they were written last.
    pub(super) fn write_cursors(&mut self, env: &mut Env) {
        let mut puts = Vec::new();
        for (user, device_id) in std::mem::take(&mut self.users.dirty) {
            if let Some(device) = self.users.device(&user, &device_id)
                && device.row.is_some()
            {
                puts.push(Put { key: keys::cursors(&user, &device_id), value: Some(device.cursor_row()) });
            }
        }
        self.write_puts(env, puts);
    }

    /// Writes what nobody waits for.
    fn write_puts(&mut self, env: &mut Env, puts: Vec<Put>) {
        if !puts.is_empty() {
            self.write_user(env, UserWrite { puts, then: Then::Nothing });
        }
    }

    // ---- now and then ---------------------------------------------------------------------------------------------------

    pub(super) fn tick_users(&mut self, env: &mut Env) {
        let now = env.now.mono;
        self.release_held(env);
        for user in self.users.users.due(now) {
            ask_for_user(env, self.number, self.epoch, user);
        }
        if !self.users.takeovers.is_empty() {
            let (due, later) =
                std::mem::take(&mut self.users.takeovers).into_iter().partition(|(deadline, ..)| *deadline <= now);
            self.users.takeovers = later;
            let due: Vec<(Duration, Arc<str>, Arc<str>)> = due;
            for (_, user, device) in due {
                self.write_registration(env, &user, &device);
            }
        }
        if now >= self.users.write_cursors_at && self.leaving.is_none() {
            self.users.write_cursors_at = now + CURSOR_INTERVAL;
            self.write_cursors(env);
        }
    }

    /// Forgets who was not asked about for a while: those of whom nothing is stored, and, if there are more than `max`, the others. And
    /// sessions whose time is over.
    pub(super) fn sweep_users(&mut self, env: &mut Env, max: usize) {
        let now = env.now.mono;
        let is_full = self.users.users.len() > max;
        let dirty: BTreeSet<Arc<str>> = self.users.dirty.iter().map(|(user, _)| user.clone()).collect();
        let mut puts = Vec::new();
        self.users.users.retain(now, |id, user, is_idle| {
            user.forget_expired(id, env.now.wall_ms, &mut puts);
            let is_worth_it = !is_full && user.is_stored();
            is_worth_it || !is_idle || user.is_connected() || dirty.contains(id)
        });
        self.write_puts(env, puts);
    }

    /// A gateway is gone for good: its sessions have ended.
    fn gateway_gone(&mut self, env: &mut Env, gateway: &MemberId) {
        let mut puts = Vec::new();
        let mut ended = Vec::new();
        for (user_id, user) in self.users.users.iter_mut() {
            for (device_id, device) in &mut user.devices {
                if device.live.as_ref().is_none_or(|live| live.gateway != *gateway) {
                    continue;
                }
                device.end(user_id, device_id, env.now.wall_ms, &mut puts);
                if device.registering.is_some() {
                    ended.push((user_id.clone(), device_id.clone()));
                }
            }
        }
        self.write_puts(env, puts);
        for (user, device) in ended {
            self.write_registration(env, &user, &device);
        }
    }
}

impl Core {
    /// Ends the sessions of gateways whose links stayed away.
    pub(super) fn gateways_gone(&mut self) {
        let now = self.env.now.mono;
        let gone: Vec<MemberId> = self
            .env
            .gateways
            .iter()
            .filter(|(_, gateway)| gateway.gone_at.is_some_and(|at| at <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some(gateway) = self.env.gateways.remove(&id) {
                self.env.settled.extend(gateway.orphaned);
            }
            for slot in self.slots.values_mut() {
                if let Slot::Owned(owned) = slot {
                    owned.gateway_gone(&mut self.env, &id);
                }
            }
        }
    }
}

fn ask_for_user(env: &mut Env, shard: u32, epoch: u64, user: Arc<str>) {
    env.call(StoreCall::LoadUser { shard, user: user.clone() }, Context::LoadUser { shard, epoch, user });
}

fn kick_session(user: &str, device: &str, number: SessionNumber, reason: KickReason) -> push::Push {
    push::Push::Kick(KickSession {
        user: user.to_owned(),
        device: device.to_owned(),
        number: Some(number),
        reason: reason.into(),
    })
}
