//! Carries requests to whoever owns a shard, in order per shard, across moves, lost owners and broken links.
//!
//! Sans-I/O: events in, [`Output`]s out. The rules that keep order without forwarding:
//! * an epoch is learnt only from the map or from the owner that acquired it; a request is sent for exactly one epoch;
//! * on a higher epoch or a new link, all that is unanswered is sent again, in its original order, before anything newer;
//! * a late acknowledgement counts (what was stored is stored), a late refusal does not.
//!
//! A request waits in the form in which it is needed again: encoded where all of them go over links, as it is where most are answered
//! by the process that asks ([`Waiting`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use crate::ids::MemberId;
use crate::link::reply::Outcome;
use crate::link::{Body, Moved, Owned, Reply, Request};

/// The body of a request while it waits for its answer. Sent again, it is cloned.
pub trait Waiting: Clone {
    /// The form in which a body waits.
    fn of(body: Body) -> Self;
    /// How much memory it counts for, about: bytes.
    fn bytes(&self) -> usize;
}

impl Waiting for Bytes {
    fn of(body: Body) -> Self {
        body.encode_to_vec().into()
    }

    fn bytes(&self) -> usize {
        self.len()
    }
}

impl Waiting for Arc<Body> {
    fn of(body: Body) -> Self {
        Self::new(body)
    }

    fn bytes(&self) -> usize {
        self.encoded_len()
    }
}

/// A request on its way: see [`Request`] for the fields.
#[derive(Debug)]
#[expect(missing_docs, reason = "they are those of the contract")]
pub struct Sending<B> {
    pub id: u64,
    pub shard: u32,
    pub epoch: u64,
    pub body: B,
    pub again: bool,
    pub order: u64,
    pub oldest: u64,
}

impl From<Sending<Bytes>> for Request {
    fn from(sending: Sending<Bytes>) -> Self {
        let Sending { id, shard, epoch, body, again, order, oldest } = sending;
        Self { id, shard, epoch, body, again, order, oldest }
    }
}

/// What the router wants done, in this order.
#[derive(Debug)]
pub enum Output<T, B = Bytes> {
    /// Put this on the link to a member.
    Send(MemberId, Sending<B>),
    /// A request has its answer. Never [`Outcome::Moved`]: the router deals with that.
    Done(T, Outcome),
    /// From now on requests of this shard go to this owner at this epoch over this link; what the owner keeps only as long as a link or an
    /// epoch lasts (announced sessions) has to be told again.
    Ready { shard: u32, epoch: u64, owner: MemberId },
}

/// The router is full: the caller keeps its token and refuses for now.
#[derive(Debug, PartialEq, Eq)]
pub struct Full<T>(pub T);

/// Bounds of a router.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Unanswered requests of one shard.
    pub shard_requests_max: usize,
    /// Bodies of all unanswered requests, bytes.
    pub bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { shard_requests_max: 8_192, bytes_max: 64 << 20 }
    }
}

/// Unanswered requests per shard and the best knowledge of who owns it.
#[derive(Debug)]
pub struct Router<T, B = Bytes> {
    limits: Limits,
    routes: Vec<Route<T, B>>,
    shard_by_request: HashMap<u64, u32, foldhash::fast::RandomState>,
    linked: HashSet<MemberId, foldhash::fast::RandomState>,
    next_id: u64,
    bytes: usize,
    outputs: Vec<Output<T, B>>,
}

#[derive(Debug)]
struct Route<T, B> {
    /// The highest epoch heard of and who acquired it.
    epoch: u64,
    owner: Option<MemberId>,
    /// No epoch up to this one is served by anybody.
    ended: u64,
    /// In order; ids ascend.
    queue: VecDeque<Pending<T, B>>,
    /// How many of the queue's head were sent to the present owner over its present link.
    sent: usize,
}

#[derive(Debug)]
struct Pending<T, B> {
    id: u64,
    body: B,
    token: T,
    /// See [`Request::order`].
    order: u64,
    /// It went out before, perhaps to somebody else.
    again: bool,
}

impl<T, B: Waiting> Router<T, B> {
    /// A router for a cluster with this number of shards.
    pub fn new(shards: u32, limits: Limits) -> Self {
        let route = || Route { epoch: 0, owner: None, ended: 0, queue: VecDeque::new(), sent: 0 };
        Self {
            limits,
            routes: (0..shards).map(|_| route()).collect(),
            shard_by_request: HashMap::default(),
            linked: HashSet::default(),
            next_id: 1,
            bytes: 0,
            outputs: Vec::new(),
        }
    }

    /// The cluster's number of shards; 0 until the map came.
    pub fn shards(&self) -> u32 {
        self.routes.len() as u32
    }

    /// Unanswered requests.
    pub fn unanswered(&self) -> usize {
        self.shard_by_request.len()
    }

    /// Who is believed to own a shard, and at which epoch.
    pub fn owner(&self, shard: u32) -> Option<(&MemberId, u64)> {
        let route = self.routes.get(shard as usize)?;
        route.owner.as_ref().map(|owner| (owner, route.epoch))
    }

    /// Shards whose owner is known and linked.
    pub fn ready(&self) -> impl Iterator<Item = (u32, u64, &MemberId)> {
        self.routes.iter().enumerate().filter_map(|(shard, route)| {
            let owner = route.owner.as_ref().filter(|owner| self.linked.contains(owner))?;
            Some((shard as u32, route.epoch, owner))
        })
    }

    /// What there is to do since the last call.
    pub fn take_outputs(&mut self) -> Vec<Output<T, B>> {
        std::mem::take(&mut self.outputs)
    }

    /// Queues a request behind all earlier ones of its shard. Returns its id, by which it may be cancelled.
    /// `order` names the group that must keep its order; 0 = none.
    ///
    /// # Errors
    /// [`Full`] when the shard's queue or the byte bound is reached.
    pub fn request(&mut self, shard: u32, order: u64, body: Body, token: T) -> Result<u64, Full<T>> {
        let Some(route) = self.routes.get_mut(shard as usize) else { return Err(Full(token)) };
        let body = B::of(body);
        if route.queue.len() >= self.limits.shard_requests_max || self.bytes + body.bytes() > self.limits.bytes_max {
            return Err(Full(token));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.bytes += body.bytes();
        route.queue.push_back(Pending { id, body, token, order, again: false });
        self.shard_by_request.insert(id, shard);
        self.flush(shard);
        Ok(id)
    }

    /// Forgets a request: nobody waits for it any more.
    pub fn cancel(&mut self, id: u64) -> Option<T> {
        let shard = self.shard_by_request.remove(&id)?;
        self.remove(shard, id).map(|pending| pending.token)
    }

    /// A new link to a member is up: what its shards wait for goes out, and again what went over an older link that nobody saw end.
    pub fn link_up(&mut self, member: &MemberId) {
        self.linked.insert(member.clone());
        for shard in self.shards_of(member) {
            self.restart(shard);
        }
    }

    /// A link broke: what was sent over it counts as not sent.
    pub fn link_down(&mut self, member: &MemberId) {
        if !self.linked.remove(member) {
            return;
        }
        for shard in self.shards_of(member) {
            self.routes[shard as usize].sent = 0;
        }
    }

    /// Only these are linked any more, besides `me`.
    pub fn keep_links<'a>(&mut self, me: &MemberId, members: impl Iterator<Item = &'a MemberId> + Clone) {
        let is_gone = |linked: &&MemberId| *linked != me && !members.clone().any(|member| member == *linked);
        let gone: Vec<MemberId> = self.linked.iter().filter(is_gone).cloned().collect();
        for member in gone {
            self.link_down(&member);
        }
    }

    /// A member claims shards that it acquired.
    pub fn owned(&mut self, member: &MemberId, owned: &Owned) {
        for claim in &owned.shards {
            self.claim(claim.shard, claim.epoch, member);
        }
    }

    /// Somebody (the owner itself, or the map) says who acquired which epoch of a shard. An epoch has one owner, but whoever restarts at
    /// the same address may be linked under the name of its earlier boot: without that link, the other name counts.
    pub fn claim(&mut self, shard: u32, epoch: u64, owner: &MemberId) {
        let Some(route) = self.routes.get_mut(shard as usize) else { return };
        let is_known = |known: &MemberId| known == owner || self.linked.contains(known);
        if epoch <= route.ended
            || epoch < route.epoch
            || (epoch == route.epoch && route.owner.as_ref().is_some_and(is_known))
        {
            return;
        }
        route.epoch = epoch;
        route.owner = Some(owner.clone());
        self.restart(shard);
    }

    /// An owner gave a shard up.
    pub fn moved(&mut self, moved: &Moved) {
        let Some(route) = self.routes.get_mut(moved.shard as usize) else { return };
        route.ended = route.ended.max(moved.ended);
        if route.epoch <= route.ended && route.owner.take().is_some() {
            route.sent = 0;
        }
    }

    /// An owner's answer.
    pub fn reply(&mut self, reply: Reply) {
        let Some(outcome) = reply.outcome else { return };
        if let Outcome::Moved(moved) = &outcome {
            return self.moved(moved);
        }
        let Some(&shard) = self.shard_by_request.get(&reply.id) else { return };
        let is_ack = matches!(outcome, Outcome::Stored(_) | Outcome::Marked(_));
        if !is_ack && reply.epoch < self.routes[shard as usize].epoch {
            return;
        }
        self.shard_by_request.remove(&reply.id);
        if let Some(pending) = self.remove(shard, reply.id) {
            self.outputs.push(Output::Done(pending.token, outcome));
        }
    }

    fn shards_of(&self, member: &MemberId) -> Vec<u32> {
        let owned = |route: &Route<T, B>| route.owner.as_ref() == Some(member);
        (0..self.shards()).filter(|&shard| owned(&self.routes[shard as usize])).collect()
    }

    /// A new owner or a new link: everything unanswered goes out again, in order.
    fn restart(&mut self, shard: u32) {
        let route = &mut self.routes[shard as usize];
        route.sent = 0;
        let Some(owner) = route.owner.clone().filter(|owner| self.linked.contains(owner)) else { return };
        self.outputs.push(Output::Ready { shard, epoch: route.epoch, owner });
        self.flush(shard);
    }

    fn flush(&mut self, shard: u32) {
        let route = &mut self.routes[shard as usize];
        let Some(owner) = route.owner.as_ref().filter(|owner| self.linked.contains(*owner)) else { return };
        let oldest = route.queue.front().map_or(0, |pending| pending.id);
        for pending in route.queue.range_mut(route.sent..) {
            let (id, order, again) = (pending.id, pending.order, std::mem::replace(&mut pending.again, true));
            let (epoch, body) = (route.epoch, pending.body.clone());
            let sending = Sending { id, shard, epoch, body, again, order, oldest };
            self.outputs.push(Output::Send(owner.clone(), sending));
        }
        route.sent = route.queue.len();
    }

    fn remove(&mut self, shard: u32, id: u64) -> Option<Pending<T, B>> {
        let route = &mut self.routes[shard as usize];
        let index = route.queue.binary_search_by_key(&id, |pending| pending.id).ok()?;
        let pending = route.queue.remove(index)?;
        self.bytes -= pending.body.bytes();
        if index < route.sent {
            route.sent -= 1;
        }
        Some(pending)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::{Done, Refused, Stored, body};
    use proptest::prelude::*;

    fn member(name: &str) -> MemberId {
        MemberId::new(name, 1).expect("a good name")
    }

    fn body() -> Body {
        Body { body: Some(body::Body::Announced(crate::link::Announced {})) }
    }

    fn sent(outputs: Vec<Output<u32>>) -> Vec<(String, u64, u64)> {
        let sends = outputs.into_iter().filter_map(|output| match output {
            Output::Send(to, request) => Some((to.name().to_owned(), request.epoch, request.id)),
            _ => None,
        });
        sends.collect()
    }

    fn stored(id: u64, epoch: u64) -> Reply {
        Reply { id, epoch, outcome: Some(Outcome::Stored(Stored { seq: id, ts_ms: 0 })) }
    }

    #[test]
    fn a_move_resends_the_unanswered_in_order() {
        let (a, b) = (member("a"), member("b"));
        let mut router: Router<u32> = Router::new(1, Limits::default());
        router.link_up(&a);
        router.link_up(&b);
        for token in 1..=3 {
            router.request(0, 0, body(), token).expect("room");
        }
        assert!(sent(router.take_outputs()).is_empty(), "no owner is known");
        router.claim(0, 4, &a);
        let to =
            |name: &str, epoch, ids: &[u64]| ids.iter().map(|id| (name.to_owned(), epoch, *id)).collect::<Vec<_>>();
        assert_eq!(sent(router.take_outputs()), to("a", 4, &[1, 2, 3]));
        router.reply(stored(2, 4));
        router.moved(&Moved { shard: 0, ended: 4, to: b.to_string(), released: false });
        router.request(0, 0, body(), 4).expect("room");
        router.claim(0, 4, &a);
        assert!(sent(router.take_outputs()).is_empty(), "an ended epoch gets nothing");
        router.claim(0, 5, &b);
        assert_eq!(sent(router.take_outputs()), to("b", 5, &[1, 3, 4]));
        router.reply(Reply { id: 1, epoch: 4, outcome: Some(Outcome::Refused(Refused::default())) });
        assert_eq!(router.unanswered(), 3, "a late refusal does not count");
        router.reply(stored(1, 4));
        assert_eq!(router.unanswered(), 2, "a late acknowledgement does");
    }

    #[test]
    fn a_new_link_to_the_same_owner_resends_and_says_ready() {
        let a = member("a");
        let mut router: Router<u32> = Router::new(2, Limits::default());
        router.link_up(&a);
        router.claim(1, 1, &a);
        router.request(1, 0, body(), 7).expect("room");
        router.take_outputs();
        router.link_down(&a);
        router.link_up(&a);
        let outputs = router.take_outputs();
        assert!(matches!(outputs[0], Output::Ready { shard: 1, epoch: 1, .. }), "{outputs:?}");
        assert_eq!(sent(outputs).len(), 1);
    }

    #[test]
    fn a_request_says_whether_it_went_out_before_and_what_is_unanswered() {
        let (a, b) = (member("a"), member("b"));
        let mut router: Router<u32> = Router::new(1, Limits::default());
        router.link_up(&a);
        router.link_up(&b);
        router.claim(0, 1, &a);
        let marks = |outputs: Vec<Output<u32>>| {
            let sends = outputs.into_iter().filter_map(|output| match output {
                Output::Send(_, request) => Some((request.id, request.again, request.order, request.oldest)),
                _ => None,
            });
            sends.collect::<Vec<_>>()
        };
        for token in 1..=2 {
            router.request(0, 9, body(), token).expect("room");
        }
        assert_eq!(marks(router.take_outputs()), [(1, false, 9, 1), (2, false, 9, 1)]);
        router.reply(stored(1, 1));
        router.moved(&Moved { shard: 0, ended: 1, to: String::new(), released: false });
        router.request(0, 9, body(), 3).expect("room");
        router.take_outputs();
        router.claim(0, 2, &b);
        assert_eq!(marks(router.take_outputs()), [(2, true, 9, 2), (3, false, 9, 2)]);
    }

    #[test]
    fn who_was_linked_under_an_earlier_name_is_found_under_the_right_one() {
        let (earlier, now) = (member("a"), MemberId::new("a", 2).expect("a good name"));
        let mut router: Router<u32> = Router::new(1, Limits::default());
        router.link_up(&earlier);
        router.owned(&earlier, &Owned { shards: vec![crate::link::OwnedShard { shard: 0, epoch: 7 }] });
        router.request(0, 0, body(), 1).expect("room");
        assert_eq!(sent(router.take_outputs()).len(), 1);
        router.claim(0, 7, &member("b"));
        assert_eq!(router.owner(0), Some((&earlier, 7)), "an epoch has one owner");
        router.keep_links(&member("me"), [&now].into_iter());
        router.claim(0, 7, &now);
        router.link_up(&now);
        assert_eq!(sent(router.take_outputs()), [("a".to_owned(), 7, 1)]);
        assert_eq!(router.owner(0), Some((&now, 7)));
    }

    #[test]
    fn a_full_queue_refuses() {
        let mut router: Router<u32> = Router::new(1, Limits { shard_requests_max: 1, bytes_max: 1 << 20 });
        let id = router.request(0, 0, body(), 1).expect("room");
        assert_eq!(router.request(0, 0, body(), 2), Err(Full(2)));
        assert_eq!(router.cancel(id), Some(1));
        assert!(router.request(0, 0, body(), 3).is_ok());
    }

    proptest! {
        /// Whatever happens to links and owners, an owner that answers everything sees each shard's requests first in order, and all get answered.
        #[test]
        fn first_sightings_are_in_order(steps in proptest::collection::vec((0u8..6, 0u64..4), 1..200)) {
            let members = [member("a"), member("b")];
            let mut router: Router<u64> = Router::new(1, Limits::default());
            let (mut epoch, mut asked, mut answered) = (0, 0, 0);
            let mut seen = Vec::new();
            let mut inbox: VecDeque<(MemberId, Sending<Bytes>)> = VecDeque::new();
            let finish = [(0, 0), (1, 0), (4, 1)].into_iter().chain(std::iter::repeat_n((5, 0), 2_000));
            for (kind, pick) in steps.into_iter().chain(finish) {
                let who = &members[(pick % 2) as usize];
                match kind {
                    // A new link: what the old one still carried is gone.
                    0 => { inbox.retain(|(to, _)| to != who); router.link_up(who); }
                    1 => { inbox.clear(); router.link_up(&members[0]); router.link_up(&members[1]); }
                    2 => { router.link_down(who); inbox.retain(|(to, _)| to != who); }
                    3 => { asked += 1; prop_assert!(router.request(0, 1, body(), asked).is_ok()); }
                    4 => { epoch += pick; if epoch > 0 { router.claim(0, epoch, who); } }
                    _ => if let Some((to, request)) = inbox.pop_front() {
                        let reply = if request.epoch < epoch {
                            let moved = Moved { shard: 0, ended: request.epoch, to: String::new(), released: false };
                            Reply { id: request.id, epoch: request.epoch, outcome: Some(Outcome::Moved(moved)) }
                        } else {
                            if !seen.contains(&request.id) { seen.push(request.id); }
                            Reply { id: request.id, epoch: request.epoch, outcome: Some(Outcome::Done(Done {})) }
                        };
                        let _ = to;
                        router.reply(reply);
                    }
                }
                for output in router.take_outputs() {
                    match output {
                        Output::Send(to, request) => inbox.push_back((to, request)),
                        Output::Done(..) => answered += 1,
                        Output::Ready { .. } => {}
                    }
                }
            }
            prop_assert!(seen.is_sorted(), "{seen:?}");
            prop_assert_eq!(answered, asked);
        }
    }
}
