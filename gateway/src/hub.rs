//! What the connections of one process share: the router, the links, who is connected, and the live rooms.
//!
//! Locks are taken in the order session, rooms, router; never the other way round. The router's outputs for the links leave under its
//! lock (their order is what keeps messages in order), all others are carried to the sessions after it was let go.

mod rooms;

use std::collections::{HashMap, HashSet};
use std::io::IoSlice;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::FutureExt;
use futures::task::AtomicWaker;
use im_proto::control;
use im_proto::ids::{MemberId, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Announced, Body, ClientFrame, Deliver, Done, Push, Role, ServerFrame, body, client_frame, push, server_frame,
};
use im_proto::links::{LinkEvent, LinkHandler, LinkPool};
use im_proto::router::{Full, Limits, Output, Router};
use im_proto::token::SharedToken;
use parking_lot::Mutex;
use slab::Slab;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::sync::oneshot;

use crate::metrics::Clock;
use crate::session::{Answer, Batch, Effects, OUTCOME_WAIT_MS_MAX, RoomEffect, Sent, Session, Shared};

pub use self::rooms::RoomsConfig;
use self::rooms::{Entering, Rooms, kept_out};

/// Who waits for a request.
#[derive(Debug)]
enum Token {
    Session(Arc<Connection>, u32),
    Ask(oneshot::Sender<Answer>),
    RoomJoined(Arc<str>, u64),
    RoomCounts(u32),
    Nobody,
}

/// A connection as the others see it: its session, and how to wake the task that owns its socket.
#[derive(Debug)]
pub struct Connection {
    session: Mutex<Session>,
    /// Woken when there is something to write or the session ended.
    pub waker: AtomicWaker,
    slot: AtomicUsize,
    /// Its task does not read because the session takes nothing now.
    paused: AtomicBool,
    /// The writing end of a plain TCP connection, on which whole packets may be put while its task writes nothing; taken away when the
    /// task ends, which closes the socket.
    socket: Mutex<Option<OwnedWriteHalf>>,
}

impl Connection {
    fn slot(&self) -> u32 {
        self.slot.load(Ordering::Relaxed) as u32
    }

    /// Puts bytes on the socket and says how many it took: none if it takes nothing now, is not plain TCP or is broken. What is wrong
    /// with it is the task's business.
    fn try_write(&self, slices: &[IoSlice<'_>]) -> usize {
        let socket = self.socket.lock();
        let Some(end) = socket.as_ref() else { return 0 };
        // The kernel takes one piece with less ado.
        let written = if let [slice] = slices { end.try_write(slice) } else { end.try_write_vectored(slices) };
        written.unwrap_or(0)
    }

    /// Sends messages of a room at once, or leaves them to the task.
    fn send_batch(&self, batch: &Batch) -> Sent {
        let write = |bytes: &[u8]| self.try_write(&[IoSlice::new(bytes)]);
        let sent = self.session.lock().on_room_batch(batch, write);
        if sent.wakes {
            self.waker.wake();
        }
        sent
    }

    /// Says that the task does (not) read; to be called with the session in hand.
    pub fn pause(&self, paused: bool) {
        self.paused.store(paused, Ordering::Relaxed);
    }
}

/// Sockets that are written to for one message of a link before others have their turn; each write takes some microseconds.
const WRITES_AT_ONCE: usize = 256;

/// Connections that have something to write since links brought something for them.
type Touched = Vec<Arc<Connection>>;

/// Connections of each user of one shard.
type Users = Mutex<HashMap<Arc<str>, Vec<Arc<Connection>>>>;

#[derive(Debug)]
struct Routing {
    router: Router<Token>,
    /// Per shard the `Announced` that is not answered: void as soon as the shard has a new owner.
    announced: HashMap<u32, u64>,
    term: u64,
    number: u64,
}

/// Why a question to an owner has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// A queue is full or the shard map has not come yet.
    #[error("the gateway can't take the request now: try again later")]
    Busy,
    /// No owner answered within 10 s.
    #[error("no owner answered within 10 s: try again later")]
    NoOwner,
}

/// See the module.
pub struct Hub {
    /// This process.
    pub me: MemberId,
    /// What sessions share.
    pub shared: Arc<Shared>,
    /// The sessions' time.
    pub clock: Clock,
    routing: Mutex<Routing>,
    pool: OnceLock<Arc<LinkPool>>,
    users: OnceLock<Box<[Users]>>,
    rooms: Rooms,
    connections: Mutex<Slab<Arc<Connection>>>,
    next_connection: AtomicU64,
}

impl Hub {
    /// A hub without links; they come with the first map. `link_token` authenticates this tier to the owners.
    pub fn new(me: MemberId, shared: Arc<Shared>, rooms: RoomsConfig, link_token: SharedToken) -> Arc<Self> {
        let router = Router::new(0, Limits::default());
        let routing = Routing { router, announced: HashMap::new(), term: 0, number: 0 };
        let hub = Arc::new(Self {
            me: me.clone(),
            shared,
            clock: Clock::default(),
            routing: Mutex::new(routing),
            pool: OnceLock::new(),
            users: OnceLock::new(),
            rooms: Rooms::new(rooms),
            connections: Mutex::default(),
            next_connection: AtomicU64::new(1),
        });
        let weak = Arc::downgrade(&hub);
        let handler: LinkHandler = Arc::new(move |event| {
            if let Some(hub) = weak.upgrade() {
                hub.on_link(event);
            }
            futures::future::ready(()).boxed()
        });
        let pool = LinkPool::new(me, Role::Gateway, link_token, handler);
        // Nobody else has the hub yet, so the cell is empty.
        let _ = hub.pool.set(pool);
        hub
    }

    /// The cluster's number of shards; 0 until the map came, when no client can be served.
    pub fn shards(&self) -> u32 {
        self.users.get().map_or(0, |users| users.len() as u32)
    }

    /// Open connections.
    pub fn connections(&self) -> usize {
        self.connections.lock().len()
    }

    /// Requests without an answer.
    pub fn unanswered(&self) -> usize {
        self.routing.lock().router.unanswered()
    }

    /// A number for a new connection.
    pub fn connection_id(&self) -> u64 {
        self.next_connection.fetch_add(1, Ordering::Relaxed)
    }

    // ---- the map ------------------------------------------------------------------------------------------------------

    /// The version of the map that is held: term and number.
    pub fn map_version(&self) -> (u64, u64) {
        let routing = self.routing.lock();
        (routing.term, routing.number)
    }

    /// A shard map. Older ones, and maps of another number of shards, are ignored. Must be called within a tokio runtime.
    pub fn on_map(self: &Arc<Self>, term: u64, map: &control::Map) {
        let parsed: Vec<Option<MemberId>> =
            map.members.iter().map(|member| MemberId::parse(&member.member).ok()).collect();
        let is_business = |member: &control::Member| member.role() == control::Role::Business;
        let business: Vec<(MemberId, String)> = std::iter::zip(&map.members, &parsed)
            .filter(|(member, _)| is_business(member))
            .filter_map(|(member, id)| Some((id.clone()?, member.link_address.clone())))
            .collect();
        let later = {
            let mut routing = self.routing.lock();
            if map.shards == 0 || (term, map.number) < (routing.term, routing.number) {
                return;
            }
            if routing.router.shards() == 0 {
                routing.router = Router::new(map.shards, Limits::default());
                self.users.get_or_init(|| (0..map.shards).map(|_| Users::default()).collect());
            } else if routing.router.shards() != map.shards {
                tracing::error!(
                    have = routing.router.shards(),
                    got = map.shards,
                    "a map with another number of shards is ignored"
                );
                return;
            }
            (routing.term, routing.number) = (term, map.number);
            routing.router.keep_links(&self.me, business.iter().map(|(member, _)| member));
            for (shard, (owner, epoch)) in std::iter::zip(&map.owners, &map.epochs).enumerate() {
                if let Some(Some(owner)) = owner.checked_sub(1).and_then(|index| parsed.get(index as usize)) {
                    routing.router.claim(shard as u32, *epoch, owner);
                }
            }
            self.send_out(&mut routing)
        };
        if let Some(pool) = self.pool.get() {
            pool.set_members(&business);
        }
        let mut touched = Touched::new();
        self.carry(later, &mut touched);
        self.write_out(touched);
    }

    // ---- links --------------------------------------------------------------------------------------------------------

    fn on_link(self: &Arc<Self>, event: LinkEvent) {
        let mut touched = Touched::new();
        match event {
            LinkEvent::Up(member) => {
                tracing::info!(%member, "link up");
                self.route(&mut touched, |router| router.link_up(&member));
            }
            LinkEvent::Down(member) => {
                tracing::warn!(%member, "link down");
                self.route(&mut touched, |router| router.link_down(&member));
            }
            LinkEvent::Frames(member, frames) => self.on_frames(&member, frames, &mut touched),
        }
        self.write_out(touched);
    }

    /// Writes to the sockets themselves what a link brought for their connections: all of it at once, and without waking as many tasks.
    /// What a socket does not take, what is not plain TCP, and what would keep others waiting is left to the tasks.
    fn write_out(self: &Arc<Self>, touched: Touched) {
        for (index, connection) in touched.iter().enumerate() {
            let event = |session: &mut Session, now_ms, effects: &mut Effects| {
                if index < WRITES_AT_ONCE {
                    session.write_out(now_ms, effects, |slices| connection.try_write(slices));
                }
            };
            self.with(connection, event);
        }
    }

    fn on_frames(self: &Arc<Self>, member: &MemberId, frames: Vec<ServerFrame>, touched: &mut Touched) {
        let mut took = 0;
        let mut frames = frames.into_iter().filter_map(|frame| frame.frame).peekable();
        while frames.peek().is_some() {
            // Answers before the pushes that follow them: a push may need the registration that was just confirmed.
            self.route(touched, |router| {
                while let Some(frame) = frames.next_if(|frame| !matches!(frame, server_frame::Frame::Push(_))) {
                    match frame {
                        server_frame::Frame::Owned(owned) => router.owned(member, &owned),
                        server_frame::Frame::Reply(reply) => router.reply(reply),
                        server_frame::Frame::Moved(moved) => router.moved(&moved),
                        server_frame::Frame::Push(_) | server_frame::Frame::Pong(_) => {}
                    }
                }
            });
            while let Some(server_frame::Frame::Push(push)) =
                frames.next_if(|frame| matches!(frame, server_frame::Frame::Push(_)))
            {
                // The owner waits for no word on rooms' pushes; of their bytes it hears when they have gone out.
                let is_of_a_room = matches!(
                    push.push,
                    Some(push::Push::RoomMessage(_) | push::Push::RoomStats(_) | push::Push::RoomKick(_))
                );
                took = if is_of_a_room { took } else { took.max(push.id) };
                self.on_push(member, push, touched);
            }
        }
        if took != 0
            && let Some(pool) = self.pool.get()
        {
            pool.send(member, [ClientFrame { frame: Some(client_frame::Frame::Took(took)) }]);
        }
    }

    fn route(self: &Arc<Self>, touched: &mut Touched, event: impl FnOnce(&mut Router<Token>)) {
        let later = {
            let mut routing = self.routing.lock();
            event(&mut routing.router);
            self.send_out(&mut routing)
        };
        self.carry(later, touched);
    }

    /// Puts what is for the links on them, in order, and returns the rest.
    fn send_out(&self, routing: &mut Routing) -> Vec<Output<Token>> {
        let outputs = routing.router.take_outputs();
        if outputs.is_empty() {
            return outputs;
        }
        let Some(pool) = self.pool.get() else { return outputs };
        let mut later = Vec::new();
        let mut void = HashSet::new();
        let mut batch: Option<(MemberId, Vec<ClientFrame>)> = None;
        for output in outputs {
            match output {
                Output::Send(_, request) if void.contains(&request.id) => {}
                Output::Send(to, request) => {
                    let frame = ClientFrame { frame: Some(client_frame::Frame::Request(request.into())) };
                    match &mut batch {
                        Some((member, frames)) if *member == to => frames.push(frame),
                        _ => {
                            if let Some((member, frames)) = batch.replace((to, vec![frame])) {
                                pool.send(&member, frames);
                            }
                        }
                    }
                }
                Output::Ready { shard, .. } => {
                    // "All announced" must not reach the new owner before the announcements that this makes.
                    if let Some(id) = routing.announced.remove(&shard) {
                        routing.router.cancel(id);
                        void.insert(id);
                    }
                    later.push(output);
                }
                Output::Done(..) => later.push(output),
            }
        }
        if let Some((member, frames)) = batch {
            pool.send(&member, frames);
        }
        later
    }

    fn carry(self: &Arc<Self>, outputs: Vec<Output<Token>>, touched: &mut Touched) {
        for output in outputs {
            match output {
                Output::Done(token, outcome) => self.answer(token, Answer::Outcome(outcome), touched),
                Output::Ready { shard, .. } => self.announce(shard),
                Output::Send(..) => {}
            }
        }
    }

    fn answer(self: &Arc<Self>, token: Token, answer: Answer, touched: &mut Touched) {
        match token {
            Token::Session(connection, ticket) => {
                let event = |session: &mut Session, now_ms, effects: &mut Effects| {
                    session.on_answer(now_ms, ticket, answer, effects);
                };
                self.touch(&connection, event, touched);
            }
            // Who asked may have gone.
            Token::Ask(sender) => drop(sender.send(answer)),
            Token::RoomJoined(room, number) => self.room_joined(&room, number, &answer),
            Token::RoomCounts(shard) => self.counts_answered(shard, &answer),
            Token::Nobody => {}
        }
    }

    /// A shard has a new owner or a new link: it is told of all sessions of its users, then that these were all.
    fn announce(self: &Arc<Self>, shard: u32) {
        let Some(users) = self.users.get().and_then(|users| users.get(shard as usize)) else { return };
        let connections: Vec<Arc<Connection>> = users.lock().values().flatten().cloned().collect();
        for connection in connections {
            self.shared.metrics.announced.inc();
            self.with(&connection, |session, now_ms, effects| session.announce(now_ms, effects));
        }
        self.announce_rooms(shard);
        let body = Body { body: Some(body::Body::Announced(Announced {})) };
        let mut routing = self.routing.lock();
        match routing.router.request(shard, 0, body, Token::Nobody) {
            Ok(id) => drop(routing.announced.insert(shard, id)),
            // The owner waits 3 s for it at most.
            Err(Full(_)) => tracing::warn!(shard, "the shard's queue is full: its announcement is left out"),
        }
        self.send_out(&mut routing);
    }

    // ---- sessions -----------------------------------------------------------------------------------------------------

    /// Takes a session in that was just opened, with what it wants done, and the writing end of its socket if others may have that.
    pub fn add(
        self: &Arc<Self>,
        session: Session,
        mut effects: Effects,
        socket: Option<OwnedWriteHalf>,
    ) -> Arc<Connection> {
        let user = session.user().clone();
        let (waker, slot, paused) = (AtomicWaker::new(), AtomicUsize::new(0), AtomicBool::new(false));
        let (session, socket) = (Mutex::new(session), Mutex::new(socket));
        let connection = Arc::new(Connection { session, waker, slot, paused, socket });
        let slot = self.connections.lock().insert(connection.clone());
        connection.slot.store(slot, Ordering::Relaxed);
        if let Some(users) = self.users_of(&user) {
            // Most have one connection: the space that a vector begins with is for four.
            users.lock().entry(user).or_insert_with(|| Vec::with_capacity(1)).push(connection.clone());
        }
        self.shared.metrics.connections.inc();
        self.apply(&connection, &mut connection.session.lock(), self.clock.now_ms(), &mut effects);
        connection
    }

    /// Forgets a connection whose session ended and whose socket is closed.
    pub fn remove(&self, connection: &Arc<Connection>) {
        connection.socket.lock().take();
        let user = connection.session.lock().user().clone();
        if let Some(users) = self.users_of(&user) {
            let mut users = users.lock();
            if let Some(connections) = users.get_mut(&user) {
                connections.retain(|other| !Arc::ptr_eq(other, connection));
                if connections.is_empty() {
                    users.remove(&user);
                }
            }
        }
        self.connections.lock().try_remove(connection.slot.load(Ordering::Relaxed));
        self.shared.metrics.connections.dec();
    }

    /// Lets something happen to a session, does what it wants done, and wakes its task if it has to write or to end.
    pub fn with<R>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        event: impl FnOnce(&mut Session, u64, &mut Effects) -> R,
    ) -> R {
        let (result, wake) = self.with_quietly(connection, event);
        if wake {
            connection.waker.wake();
        }
        result
    }

    /// As [`Hub::with`], but what there is to write or to end waits for [`Hub::write_out`].
    fn touch(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        event: impl FnOnce(&mut Session, u64, &mut Effects),
        touched: &mut Touched,
    ) {
        let ((), wake) = self.with_quietly(connection, event);
        if wake && touched.last().is_none_or(|last| !Arc::ptr_eq(last, connection)) {
            touched.push(connection.clone());
        }
    }

    /// As [`Hub::with`], but for the connection's own task, which needs no waking.
    pub fn with_quietly<R>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        event: impl FnOnce(&mut Session, u64, &mut Effects) -> R,
    ) -> (R, bool) {
        let mut effects = Effects::default();
        let mut session = connection.session.lock();
        let now_ms = self.clock.now_ms();
        let result = event(&mut session, now_ms, &mut effects);
        self.apply(connection, &mut session, now_ms, &mut effects);
        let resume = connection.paused.load(Ordering::Relaxed) && session.wants_input();
        (result, resume || session.has_output() || session.is_ended())
    }

    fn apply(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        session: &mut Session,
        now_ms: u64,
        effects: &mut Effects,
    ) {
        while !effects.is_empty() {
            let Effects { cancel, requests, rooms } = std::mem::take(effects);
            let (mut answers, mut welcomes) = (Vec::new(), Vec::new());
            if !(cancel.is_empty() && requests.is_empty()) {
                let mut routing = self.routing.lock();
                for id in cancel {
                    routing.router.cancel(id);
                }
                for request in requests {
                    let token =
                        request.ticket.map_or(Token::Nobody, |ticket| Token::Session(connection.clone(), ticket));
                    let routed = routing.router.request(request.shard, request.order, request.body, token);
                    match (routed, request.ticket) {
                        (Ok(id), Some(ticket)) => session.routed(ticket, id),
                        (Err(Full(_)), Some(ticket)) => answers.push((ticket, Answer::Full)),
                        (Ok(_), None) => {}
                        (Err(Full(_)), None) => tracing::warn!(
                            shard = request.shard,
                            "the shard's queue is full: the end of a session is lost"
                        ),
                    }
                }
                self.send_out(&mut routing);
            }
            for room in rooms {
                match room {
                    RoomEffect::Enter { room, part, ticket } => {
                        let who = (&**session.user(), session.version());
                        let (name, entering) = self.enter_room(&room, part, connection, who, ticket);
                        session.share_room_name(&name);
                        match entering {
                            Entering::Waits => {}
                            Entering::KeptOut => answers.push((ticket, kept_out())),
                            Entering::In(welcome) => {
                                answers.push((ticket, Answer::Outcome(Outcome::Done(Done {}))));
                                welcomes.extend(welcome);
                            }
                        }
                    }
                    RoomEffect::Leave { room, part } => self.leave_room(&room, part, connection),
                    RoomEffect::Count { room, counter, count, ticket } => {
                        let waiter = ticket.map(|ticket| (connection, ticket));
                        answers.extend(self.count_in_room(&room, counter, count, session.user(), waiter));
                    }
                }
            }
            for (ticket, answer) in answers {
                session.on_answer(now_ms, ticket, answer, effects);
            }
            for welcome in welcomes {
                session.on_room_batch(&welcome, |_| 0);
            }
        }
    }

    fn users_of(&self, user: &str) -> Option<&Users> {
        let users = self.users.get()?;
        users.get(shard_of(user, users.len() as u32) as usize)
    }

    fn connections_of(&self, user: &str) -> Vec<Arc<Connection>> {
        self.users_of(user).and_then(|users| users.lock().get(user).cloned()).unwrap_or_default()
    }

    /// All connections now.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.connections.lock().iter().map(|(_, connection)| connection.clone()).collect()
    }

    /// What time brings to one of `parts` equal parts of the connections; to be called for each of them once a second. All at once would
    /// hold up everybody else.
    pub fn tick(self: &Arc<Self>, part: usize, parts: usize) {
        let connections: Vec<Arc<Connection>> = {
            let connections = self.connections.lock();
            let slots = (part..connections.capacity()).step_by(parts);
            slots.filter_map(|slot| connections.get(slot).cloned()).collect()
        };
        for connection in connections {
            self.with(&connection, |session, now_ms, effects| session.on_tick(now_ms, effects));
        }
    }

    fn on_push(self: &Arc<Self>, owner: &MemberId, push: Push, touched: &mut Touched) {
        match push.push {
            Some(push::Push::Deliver(deliver)) => self.on_deliver(&deliver, touched),
            Some(push::Push::Kick(kick)) => {
                for connection in self.connections_of(&kick.user) {
                    self.touch(&connection, |session, _, effects| session.on_kick(&kick, effects), touched);
                }
            }
            Some(push::Push::ReadState(state)) => {
                for connection in self.connections_of(&state.user) {
                    let event = |session: &mut Session, _, _: &mut Effects| {
                        session.on_read_state(&state.conversation, &state.reader, state.seq);
                    };
                    self.touch(&connection, event, touched);
                }
            }
            Some(push::Push::RoomMessage(message)) => self.on_room_message(owner, message),
            Some(push::Push::RoomStats(stats)) => self.on_room_stats(&stats),
            Some(push::Push::RoomKick(kick)) => self.on_room_kick(&kick),
            None => {}
        }
    }

    fn on_deliver(self: &Arc<Self>, deliver: &Deliver, touched: &mut Touched) {
        for recipient in &deliver.recipients {
            for connection in self.connections_of(&recipient.user) {
                let event = |session: &mut Session, now_ms, effects: &mut Effects| {
                    session.on_deliver(now_ms, deliver, recipient, effects);
                };
                self.touch(&connection, event, touched);
            }
        }
    }

    // ---- questions of the HTTP API ------------------------------------------------------------------------------------

    /// Asks the owner of `key`'s shard.
    ///
    /// # Errors
    /// [`AskError`] if it can't be asked or does not answer.
    pub async fn ask(self: &Arc<Self>, key: &str, body: body::Body) -> Result<Outcome, AskError> {
        let shards = self.shards();
        if shards == 0 {
            return Err(AskError::Busy);
        }
        let (sender, receiver) = oneshot::channel();
        let id = {
            let mut routing = self.routing.lock();
            let token = Token::Ask(sender);
            let id = routing
                .router
                .request(shard_of(key, shards), 0, Body { body: Some(body) }, token)
                .map_err(|_| AskError::Busy)?;
            self.send_out(&mut routing);
            id
        };
        match tokio::time::timeout(Duration::from_millis(OUTCOME_WAIT_MS_MAX), receiver).await {
            Ok(Ok(Answer::Outcome(outcome))) => Ok(outcome),
            Ok(_) => Err(AskError::Busy),
            Err(_) => {
                self.routing.lock().router.cancel(id);
                Err(AskError::NoOwner)
            }
        }
    }
}
