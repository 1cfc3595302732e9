//! Acquiring, confirming, releasing and losing shards. The store is the judge; nothing here trusts a clock to be the owner.

use std::collections::BTreeSet;
use std::time::Duration;

use im_proto::control::{self, Command, Role as ControlRole, ShardEpoch, ShardLoad, command, report};
use im_proto::ids::MemberId;
use im_proto::link::{Moved, Owned, OwnedShard as OwnedClaim, Refusal, server_frame};
use im_proto::router::{self, Router};

use super::calls::{StoreAnswer, StoreCall};
use super::shard::OwnedShard;
use super::{Asked, Context, Core, Env, LinkId, Output, ReplyTo, owned_at};
use crate::store::{Acquired, Claim, Outcome, Released, ShardRow, StoreError};

/// An owner that the store has not confirmed for so long answers nothing until it has.
pub(super) const CONFIRMED_FOR: Duration = Duration::from_secs(2);
/// A store that refused a write does so still, until one succeeds or nobody has tried for so long.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// How often held shards are confirmed when no commit does it.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// How often control hears what is held.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// How long after an unknown outcome new requests wait for it, rather than being refused.
const RECOVERY_SILENCE: Duration = Duration::from_secs(1);
/// Pause before a store that failed is asked again.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How often caches are swept and averages taken.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// What a member is to a shard.
pub(super) enum Slot {
    /// Nothing.
    Vacant,
    /// It wants it.
    Acquiring(Acquiring),
    /// It owns it.
    Owned(Box<OwnedShard>),
}

/// A shard on its way to us.
#[derive(Debug)]
pub(super) struct Acquiring {
    claim: Claim,
    since: Duration,
    /// The epoch that we held and whose last commit has an unknown outcome.
    pub(super) recovering: Option<u64>,
    /// Ask (again) at this time; `None` while asked.
    ask_at: Option<Duration>,
    /// Requests of those who learnt from the store's row, by way of the map, that we own it before its answer reached us.
    pub(super) early: Vec<(LinkId, Asked)>,
    /// First sightings of requests to the epoch with the unknown outcome: none of them is in that commit, so they may be refused.
    unasked: Vec<ReplyTo>,
}

impl Acquiring {
    fn new(claim: Claim, recovering: Option<u64>, now: Duration) -> Self {
        Self { claim, since: now, recovering, ask_at: Some(now), early: Vec::new(), unasked: Vec::new() }
    }

    /// A request to the epoch whose last commit has an unknown outcome. What went out before may be in that commit: it is sent again
    /// once the outcome is known. The rest waits for a short recovery, and is refused while the store is away for longer.
    pub(super) fn ask_recovering(&mut self, env: &mut Env, to: ReplyTo) {
        if to.again {
            return;
        }
        self.unasked.push(to);
        if self.unasked.len() > env.limits.shard_ops_max {
            self.refuse_unasked(env);
        } else {
            self.tick(env);
        }
    }

    fn tick(&mut self, env: &mut Env) {
        if env.now.mono >= self.since + RECOVERY_SILENCE {
            self.refuse_unasked(env);
        }
    }

    fn refuse_unasked(&mut self, env: &mut Env) {
        for to in self.unasked.drain(..) {
            env.refuse(to, Refusal::StoreUnavailable, "the store does not answer");
        }
    }

    /// Whether this may be the epoch that we have already won.
    pub(super) fn may_be_won(&self, epoch: u64) -> bool {
        epoch > self.claim.expected_epoch
    }
}

/// A shard on its way from us.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) to: String,
    /// The release is asked.
    pub(super) releasing: bool,
    /// Ask (again) at this time.
    pub(super) ask_at: Duration,
    /// Control wants us to keep it after all.
    pub(super) cancelled: bool,
}

impl Core {
    pub(super) fn command(&mut self, command: Command) {
        if command.term < self.term {
            return;
        }
        if command.term > self.term {
            self.term = command.term;
            self.number = 0;
        }
        match command.command {
            Some(command::Command::Map(map)) => self.map(map),
            Some(command::Command::Acquire(acquire)) => {
                for row in acquire.expected {
                    let owner = MemberId::parse(&row.owner).ok();
                    if owner.is_none() && !row.owner.is_empty() {
                        self.env.stats.malformed += 1;
                        continue;
                    }
                    self.want(Claim { shard: row.shard, expected_epoch: row.epoch, expected_owner: owner }, None);
                }
                self.ask_for_wanted();
            }
            Some(command::Command::Release(release)) => {
                if let Some(owned) = owned_at(&mut self.slots, release.shard, release.epoch) {
                    owned.leave(&mut self.env, release.to);
                }
                self.release_what_is_empty();
            }
            Some(command::Command::CancelRelease(cancel)) => match self.slots.get_mut(&cancel.shard) {
                Some(Slot::Owned(owned)) if owned.epoch == cancel.epoch => {
                    if let Some(leaving) = &mut owned.leaving {
                        leaving.cancelled = true;
                    }
                    self.release_what_is_empty();
                }
                Some(Slot::Vacant) | None => {
                    self.want(Claim { shard: cancel.shard, expected_epoch: cancel.epoch, expected_owner: None }, None);
                    self.ask_for_wanted();
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// Gives up every shard, to whoever comes.
    pub(super) fn release_all(&mut self) {
        for slot in self.slots.values_mut() {
            if let Slot::Owned(owned) = slot
                && owned.leaving.is_none()
            {
                owned.leave(&mut self.env, String::new());
            }
        }
        self.release_what_is_empty();
    }

    fn map(&mut self, map: control::Map) {
        if map.number < self.number {
            return;
        }
        self.number = map.number;
        if self.env.shards == 0 && map.shards > 0 {
            self.env.shards = map.shards;
            self.env.router = Router::new(map.shards, router::Limits::default());
            self.env.router.link_up(&self.env.me.clone());
            for (shard, epoch) in self.held().collect::<Vec<_>>() {
                self.env.router.claim(shard, epoch, &self.env.me.clone());
            }
            self.env.call(StoreCall::Shards, Context::Shards);
        }
        let mut members = Vec::new();
        self.env.map_gateways = BTreeSet::new();
        for member in &map.members {
            let Ok(id) = MemberId::parse(&member.member) else { continue };
            match member.role() {
                ControlRole::Gateway => {
                    self.env.map_gateways.insert(id.clone());
                }
                ControlRole::Business => members.push((id.clone(), member.link_address.clone())),
                ControlRole::Unspecified => {}
            }
        }
        self.env.router.keep_links(&self.env.me, members.iter().map(|(member, _)| member));
        for (shard, (owner, epoch)) in map.owners.iter().zip(&map.epochs).enumerate() {
            let owner = (*owner as usize).checked_sub(1).and_then(|index| map.members.get(index));
            if let Some(owner) =
                owner.and_then(|owner| MemberId::parse(&owner.member).ok()).filter(|owner| *owner != self.env.me)
            {
                self.env.router.claim(shard as u32, *epoch, &owner);
            }
        }
        self.env.outputs.push(Output::Members(members));
    }

    /// A restarted member takes back by itself what an earlier boot of its name held.
    pub(super) fn shards_read(&mut self, answer: Result<StoreAnswer, StoreError>) {
        match answer {
            Ok(StoreAnswer::Shards(rows)) => {
                for row in rows {
                    let is_ours = |owner: &MemberId| owner.name() == self.env.me.name() && *owner != self.env.me;
                    if row.owner.as_ref().is_some_and(is_ours) {
                        self.want(
                            Claim { shard: row.shard, expected_epoch: row.epoch, expected_owner: row.owner },
                            None,
                        );
                    }
                }
                self.ask_for_wanted();
            }
            // Control assigns them if the store stays away.
            _ => tracing::warn!("the store did not say which shards this member held: control will assign them"),
        }
    }

    fn want(&mut self, claim: Claim, recovering: Option<u64>) {
        let now = self.env.now.mono;
        match self.slots.get_mut(&claim.shard) {
            Some(Slot::Owned(_)) if recovering.is_none() => {}
            // Whoever waits for it goes on waiting, whatever it takes to get it.
            Some(Slot::Acquiring(acquiring)) => {
                if acquiring.ask_at.is_some() {
                    (acquiring.claim, acquiring.ask_at) = (claim, Some(now));
                }
            }
            _ => {
                self.slots.insert(claim.shard, Slot::Acquiring(Acquiring::new(claim, recovering, now)));
            }
        }
    }

    /// Asks for all shards whose time it is, in one call.
    fn ask_for_wanted(&mut self) {
        let now = self.env.now.mono;
        let mut claims = Vec::new();
        for slot in self.slots.values_mut() {
            if let Slot::Acquiring(acquiring) = slot
                && acquiring.ask_at.is_some_and(|at| at <= now)
            {
                acquiring.ask_at = None;
                claims.push(acquiring.claim.clone());
            }
        }
        if !claims.is_empty() {
            self.env.call(StoreCall::Acquire(claims.clone()), Context::Acquire { claims, at: now });
        }
    }

    pub(super) fn acquire_answered(
        &mut self,
        claims: Vec<Claim>,
        at: Duration,
        answer: Result<StoreAnswer, StoreError>,
    ) {
        let Ok(StoreAnswer::Acquire(outcomes)) = answer else {
            let again = self.env.now.mono + RETRY_PAUSE;
            for claim in claims {
                if let Some(Slot::Acquiring(acquiring)) = self.slots.get_mut(&claim.shard) {
                    acquiring.ask_at = Some(again);
                }
            }
            return;
        };
        let (mut won, mut lost, mut early) = (Vec::new(), Vec::new(), Vec::new());
        for (claim, outcome) in claims.into_iter().zip(outcomes) {
            let Some(Slot::Acquiring(acquiring)) = self.slots.get_mut(&claim.shard) else { continue };
            match outcome {
                Acquired::Won(tail) => {
                    if tail.hole {
                        self.env.stats.holes += 1;
                        tracing::error!(shard = tail.shard, "a hole in the shard's log: a stored message was lost");
                    }
                    if let Some(ended) = acquiring.recovering {
                        let to = self.env.me.to_string();
                        let moved = Moved { shard: tail.shard, ended, to, released: false };
                        self.env.broadcast(server_frame::Frame::Moved(moved));
                    }
                    self.env.stats.acquired += 1;
                    early.append(&mut acquiring.early);
                    let owned = OwnedShard::new(tail, at, self.env.now.mono);
                    self.slots.insert(tail.shard, Slot::Owned(Box::new(owned)));
                    self.env.router.claim(tail.shard, tail.epoch, &self.env.me.clone());
                    won.push((tail.shard, tail.epoch));
                }
                // An earlier ask of ours won and we never heard: the next epoch is as good.
                Acquired::Lost(row) if row.owner.as_ref() == Some(&self.env.me) => {
                    acquiring.claim = Claim { shard: row.shard, expected_epoch: row.epoch, expected_owner: row.owner };
                    acquiring.ask_at = Some(self.env.now.mono);
                }
                Acquired::Lost(row) => {
                    let ended = acquiring.recovering;
                    early.append(&mut acquiring.early);
                    self.slots.insert(row.shard, Slot::Vacant);
                    if let Some(ended) = ended {
                        let to = row.owner.as_ref().map_or_else(String::new, ToString::to_string);
                        let moved = Moved { shard: row.shard, ended, to, released: false };
                        self.env.broadcast(server_frame::Frame::Moved(moved));
                    }
                    lost.push(row);
                }
            }
        }
        if !won.is_empty() {
            let shards = won.iter().map(|&(shard, epoch)| OwnedClaim { shard, epoch }).collect();
            self.env.broadcast(server_frame::Frame::Owned(Owned { shards }));
            let shards = won.iter().map(|&(shard, epoch)| ShardEpoch { shard, epoch }).collect();
            self.env.report(report::Report::Acquired(control::Acquired { shards }));
            for (shard, epoch) in won {
                if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                    owned.read_backlog(&mut self.env);
                }
            }
        }
        self.report_lost(&lost);
        self.ask_for_wanted();
        for (link, request) in early {
            self.request(link, request);
        }
    }

    fn report_lost(&mut self, rows: &[ShardRow]) {
        if !rows.is_empty() {
            let owner = |row: &ShardRow| row.owner.as_ref().map_or_else(String::new, ToString::to_string);
            let rows = rows
                .iter()
                .map(|row| control::ShardRow { shard: row.shard, epoch: row.epoch, owner: owner(row) })
                .collect();
            self.env.report(report::Report::AcquireLost(control::AcquireLost { rows }));
        }
    }

    /// The store named a higher epoch: what we thought of the shard is void.
    fn fenced(&mut self, row: &ShardRow) {
        let Some(Slot::Owned(owned)) = self.slots.get_mut(&row.shard) else { return };
        let ended = owned.epoch;
        owned.abandon(&mut self.env);
        self.slots.insert(row.shard, Slot::Vacant);
        self.env.stats.fenced += 1;
        let to = row.owner.as_ref().map_or_else(String::new, ToString::to_string);
        let moved = Moved { shard: row.shard, ended, to, released: false };
        self.env.router.moved(&moved);
        self.env.broadcast(server_frame::Frame::Moved(moved));
    }

    /// What was stored last is not known: the next epoch waits for it or fences it off, and whoever waits for an answer asks again then.
    fn recover(&mut self, shard: u32, epoch: u64) {
        if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
            owned.abandon(&mut self.env);
            self.env.stats.unknown_outcomes += 1;
            self.env.router.moved(&Moved { shard, ended: epoch, to: String::new(), released: false });
            let claim = Claim { shard, expected_epoch: epoch, expected_owner: Some(self.env.me.clone()) };
            self.want(claim, Some(epoch));
        }
    }

    pub(super) fn commit_answered(
        &mut self,
        shards: Vec<(u32, u64)>,
        at: Duration,
        answer: Result<StoreAnswer, StoreError>,
    ) {
        match answer {
            Ok(StoreAnswer::Commit(outcomes)) if outcomes.len() == shards.len() => {
                self.next.refused_at = None;
                for ((shard, epoch), outcome) in shards.into_iter().zip(outcomes) {
                    let Some(owned) = owned_at(&mut self.slots, shard, epoch) else { continue };
                    match outcome {
                        Outcome::Committed => {
                            owned.committed(&mut self.env, at);
                            // Nothing but a release can be under way in a shard whose batch has just ended.
                            if owned.leaving.as_ref().is_some_and(|leaving| leaving.releasing) {
                                self.released(shard, epoch);
                            }
                        }
                        Outcome::Duplicates(duplicates) => owned.duplicates(&mut self.env, duplicates),
                        Outcome::Fenced(row) => {
                            self.fenced(&row);
                            self.report_lost(&[row]);
                        }
                        Outcome::Corrupt(what) => {
                            tracing::error!(
                                shard,
                                epoch,
                                what,
                                "the store contradicts this owner: it acquires the shard anew"
                            );
                            self.recover(shard, epoch);
                        }
                    }
                }
            }
            Err(StoreError::Refused { reason }) => {
                tracing::warn!(reason, "the store refuses writes");
                self.next.refused_at = Some(self.env.now.mono);
                for (shard, epoch) in shards {
                    if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                        owned.refused(&mut self.env, &reason);
                    }
                }
            }
            _ => {
                tracing::warn!(
                    shards = shards.len(),
                    "the outcome of a commit is unknown: its shards are acquired anew"
                );
                for (shard, epoch) in shards {
                    self.recover(shard, epoch);
                }
                self.ask_for_wanted();
            }
        }
        self.release_what_is_empty();
    }

    pub(super) fn check_answered(
        &mut self,
        shards: Vec<(u32, u64)>,
        at: Duration,
        answer: Result<StoreAnswer, StoreError>,
    ) {
        self.next.checking = false;
        let Ok(StoreAnswer::Check(rows)) = answer else { return };
        for row in &rows {
            if shards
                .iter()
                .any(|&(shard, epoch)| shard == row.shard && owned_at(&mut self.slots, shard, epoch).is_some())
            {
                self.fenced(row);
            }
        }
        self.report_lost(&rows);
        for (shard, epoch) in shards {
            if let Some(owned) = owned_at(&mut self.slots, shard, epoch) {
                owned.confirmed(&mut self.env, at);
            }
        }
    }

    /// Releases shards that leave and have nothing open.
    pub(super) fn release_what_is_empty(&mut self) {
        let now = self.env.now.mono;
        for (shard, slot) in &mut self.slots {
            let Slot::Owned(owned) = slot else { continue };
            let (epoch, is_empty) = (owned.epoch, owned.nothing_open());
            if let Some(leaving) = &mut owned.leaving
                && is_empty
                && !leaving.releasing
                && leaving.ask_at <= now
            {
                leaving.releasing = true;
                self.env.call(StoreCall::Release(vec![(*shard, epoch)]), Context::Release { shard: *shard, epoch });
            }
        }
    }

    pub(super) fn release_answered(&mut self, shard: u32, epoch: u64, answer: Result<StoreAnswer, StoreError>) {
        let again = self.env.now.mono + RETRY_PAUSE;
        let Some(owned) = owned_at(&mut self.slots, shard, epoch) else { return };
        let Some(leaving) = &mut owned.leaving else { return };
        let Ok(StoreAnswer::Release(outcomes)) = answer else {
            (leaving.releasing, leaving.ask_at) = (false, again);
            return;
        };
        match outcomes.into_iter().next() {
            Some(Released::Lost(row)) => {
                owned.abandon(&mut self.env);
                self.slots.insert(shard, Slot::Vacant);
                self.report_lost(&[row]);
            }
            _ => self.released(shard, epoch),
        }
    }

    /// The store's row has no owner any more: whom it goes to, and control, hear of it.
    fn released(&mut self, shard: u32, epoch: u64) {
        let Some(owned) = owned_at(&mut self.slots, shard, epoch) else { return };
        let leaving = owned.leaving.take();
        owned.abandon(&mut self.env);
        self.slots.insert(shard, Slot::Vacant);
        let Some(Leaving { to, cancelled: false, .. }) = leaving else {
            self.want(Claim { shard, expected_epoch: epoch, expected_owner: None }, None);
            return self.ask_for_wanted();
        };
        let moved = Moved { shard, ended: epoch, to, released: true };
        let link = self.env.links.iter().find(|(_, peer)| *peer.as_str() == *moved.to).map(|(link, _)| *link);
        if let Some(link) = link {
            self.env.frame(link, server_frame::Frame::Moved(moved));
        }
        let shards = vec![ShardEpoch { shard, epoch }];
        self.env.report(report::Report::Released(control::Released { shards }));
    }

    /// Another member gave a shard back so that we take it. Control will ask for the same; whoever is told first acquires it.
    pub(super) fn handed_over(&mut self, moved: &Moved) {
        if moved.released && *moved.to == *self.env.me.as_str() {
            self.want(Claim { shard: moved.shard, expected_epoch: moved.ended, expected_owner: None }, None);
            self.ask_for_wanted();
        }
    }

    pub(super) fn tick(&mut self) {
        let now = self.env.now.mono;
        self.ask_for_wanted();
        self.release_what_is_empty();
        self.gateways_gone();
        for slot in self.slots.values_mut() {
            match slot {
                Slot::Owned(owned) => owned.tick(&mut self.env),
                Slot::Acquiring(acquiring) => acquiring.tick(&mut self.env),
                Slot::Vacant => {}
            }
        }
        if now >= self.next.check && !self.next.checking {
            self.next.check = now + CHECK_INTERVAL;
            let shards: Vec<_> = self.held().collect();
            if !shards.is_empty() {
                self.next.checking = true;
                self.env.call(StoreCall::Check(shards.clone()), Context::Check { shards, at: now });
            } else if !self.env.calls.values().any(|context| matches!(context, Context::Check { .. })) {
                // Says whether the store answers, also while nothing is held.
                self.next.checking = true;
                self.env.call(StoreCall::Check(Vec::new()), Context::Check { shards, at: now });
            }
        }
        self.scrub();
        if now >= self.next.heartbeat {
            self.next.heartbeat = now + HEARTBEAT_INTERVAL;
            self.heartbeat();
        }
        if now >= self.next.sweep {
            self.next.sweep = now + SWEEP_INTERVAL;
            let max = self.env.limits.cached_max / self.slots.len().max(1);
            for slot in self.slots.values_mut() {
                if let Slot::Owned(owned) = slot {
                    owned.sweep(&mut self.env, max);
                }
            }
        }
    }

    fn heartbeat(&mut self) {
        let now = self.env.now.mono;
        let passed = (now - self.next.last_load).as_secs_f64().max(0.1);
        self.next.last_load = now;
        let (mut held, mut loads) = (Vec::new(), Vec::new());
        let (mut lag, mut rate) = (Duration::ZERO, 0.0);
        for (shard, slot) in &mut self.slots {
            let Slot::Owned(owned) = slot else { continue };
            held.push(ShardEpoch { shard: *shard, epoch: owned.epoch });
            let per_second = owned.load_average(passed);
            if per_second > 0.01 {
                loads.push(ShardLoad { shard: *shard, per_second });
            }
            rate += per_second;
            lag = lag.max(owned.watermark_lag(now));
        }
        let heartbeat = control::Heartbeat {
            held,
            loads,
            store_ok: now - self.next.last_answer < CONFIRMED_FOR,
            store_refuses: self.next.refused_at.is_some_and(|at| now - at < REFUSED_FOR),
            term: self.term,
            number: self.number,
            messages_per_second: rate,
            watermark_lag_s: lag.as_secs_f64(),
            holes: self.env.stats.holes,
            ..control::Heartbeat::default()
        };
        self.env.report(report::Report::Heartbeat(heartbeat));
    }

    /// What the first report on a control stream says of this member's shards and map.
    pub(super) fn hello(&self, hello: control::Hello) -> control::Hello {
        let held = self.held().map(|(shard, epoch)| ShardEpoch { shard, epoch }).collect();
        control::Hello { member: self.env.me.to_string(), term: self.term, number: self.number, held, ..hello }
    }
}

/// The reason that clients see while the store is away.
pub(super) fn store_refusal(error: &StoreError) -> (Refusal, String) {
    (Refusal::StoreUnavailable, error.to_string())
}
