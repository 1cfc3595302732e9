//! What the loop hears: members and the platform.

use super::super::service::{Incoming, Outbox, StreamId};
use super::super::tiers::Strain;
use super::{Beat, Done, Leader, Link, is_of, within};
use crate::platform::{Platform, Tier};
use crate::shards::{Event, Ownership};
use im_proto::control::{self as wire, Role as WireRole, report::Report};
use im_proto::ids::MemberId;
use std::collections::BTreeMap;
use std::sync::Arc;

impl<P: Platform> Leader<P> {
    pub(super) fn on_incoming(&mut self, incoming: Incoming) {
        match incoming {
            Incoming::Joined { stream, member, hello, outbox } => self.on_joined(stream, member, hello, outbox),
            Incoming::Reported { stream, member, report } => {
                let current = self.links.get(&member).and_then(|link| link.stream.as_ref());
                if current.is_some_and(|(id, _)| *id == stream) {
                    self.on_report(member, report);
                }
            }
            Incoming::Left { stream, member } => {
                let Some(link) = self.links.get_mut(&member) else { return };
                if link.stream.as_ref().is_some_and(|(id, _)| *id == stream) {
                    link.stream = None;
                    if link.tier == Tier::Business {
                        self.decide(Event::MemberGone { member, confirmed_dead: false });
                    }
                }
            }
        }
    }

    fn on_joined(&mut self, stream: StreamId, member: MemberId, hello: wire::Hello, outbox: Arc<Outbox>) {
        let tier = match hello.role() {
            WireRole::Gateway => Tier::Gateway,
            WireRole::Business => Tier::Business,
            WireRole::Unspecified => {
                tracing::warn!(%member, "a member without a role is refused");
                return outbox.close();
            }
        };
        let now = self.now();
        let known = self.links.remove(&member);
        if let Some((_, earlier)) = known.as_ref().and_then(|link| link.stream.as_ref()) {
            earlier.close();
        }
        if known.is_none() {
            self.tell(format!("{} joined, pid {}", member.name(), hello.pid));
            // Who was told to end has ended, and this is the one after it.
            if tier == Tier::Gateway {
                self.gateway_came = now;
            }
            let leaving = &mut self.tiers[tier].leaving;
            if leaving.get(member.name()).is_some_and(|leaving| leaving.by_itself) {
                leaving.remove(member.name());
            }
        }
        self.remembered.remove(&member);
        self.inherited.remove(&hello.instance);
        let link = Link {
            tier,
            shown: self
                .view
                .process(member.name())
                .is_some_and(|process| process.instance.as_ref() == Some(&hello.instance)),
            instance: hello.instance.clone(),
            link_address: hello.link_address.clone(),
            admin_address: hello.http_address.clone(),
            stream: Some((stream, outbox.clone())),
            told: None,
            heard: now,
            beat: known.as_ref().map(|link| link.beat).unwrap_or_default(),
        };
        self.links.insert(member.clone(), link);
        self.hear_term(hello.term);
        // The process before it of the same name has ended, whether or not that was seen.
        let ended: Vec<MemberId> =
            self.links.keys().filter(|other| other.name() == member.name() && **other != member).cloned().collect();
        for other in ended {
            if let Some((_, outbox)) = self.links.remove(&other).and_then(|link| link.stream) {
                outbox.close();
            }
        }
        if tier == Tier::Business {
            let leaving = self.tiers.business.leaving.contains_key(member.name());
            self.decide(Event::MemberJoined { member: member.clone() });
            let held = hello.held.iter().map(|held| (held.shard, held.epoch)).collect();
            let heard =
                Event::Heartbeat { member: member.clone(), held, loads: vec![], store_ok: true, term: hello.term };
            self.decide(heard);
            self.decide(Event::Leaving { member: member.clone(), leaving });
        }
        self.map_changed = true;
        if self.may_command() {
            let map = Arc::new(self.wire_map());
            outbox.send_map(self.coordinator.version().term, map);
        }
        self.round_due = true;
        let mut addresses = BTreeMap::new();
        for (purpose, address) in [("link", hello.link_address), ("admin", hello.http_address)] {
            if !address.is_empty() {
                addresses.insert(purpose.to_owned(), address);
            }
        }
        // Nothing waits for it.
        let (platform, instance) = (self.platform.clone(), hello.instance);
        self.tasks.spawn(async move {
            if let Err(error) = within(platform.describe(member.name(), &instance, addresses)).await {
                tracing::warn!(%member, %error, "its addresses can't be made known");
            }
            Done::Described
        });
    }

    fn on_report(&mut self, member: MemberId, report: Report) {
        let now = self.now();
        let Some(link) = self.links.get_mut(&member) else { return };
        link.heard = now;
        match report {
            Report::Hello(_) => tracing::warn!(%member, "a second Hello on one stream is ignored"),
            Report::Heartbeat(beat) => {
                self.round_due |= beat.leaving && !link.beat.leaving;
                link.beat = Beat {
                    connections: beat.connections,
                    messages_per_second: beat.messages_per_second,
                    cpu_cores: beat.cpu_cores,
                    drained: beat.drained,
                    leaving: beat.leaving,
                    store_refuses: beat.store_refuses,
                    watermark_lag_s: beat.watermark_lag_s,
                    strain: Strain {
                        connect_ms: beat.connect_ms,
                        refused_per_second: beat.connects_refused_per_second,
                    },
                };
                let tier = link.tier;
                if beat.holes > 0 {
                    self.on_holes(&member, beat.holes);
                }
                match tier {
                    Tier::Gateway => self.hear_term(beat.term),
                    Tier::Business => {
                        let held = beat.held.iter().map(|held| (held.shard, held.epoch)).collect();
                        let loads = beat.loads.iter().map(|load| (load.shard, load.per_second)).collect();
                        self.decide(Event::Heartbeat { member, held, loads, store_ok: beat.store_ok, term: beat.term });
                    }
                }
            }
            Report::Acquired(acquired) => {
                for won in acquired.shards {
                    self.decide(Event::Acquired { shard: won.shard, epoch: won.epoch, by: member.clone() });
                }
            }
            Report::Released(released) => {
                for gone in released.shards {
                    self.decide(Event::Released { shard: gone.shard, epoch: gone.epoch, by: member.clone() });
                }
            }
            Report::AcquireLost(lost) => {
                for row in lost.rows {
                    let owner = match row.owner.as_str() {
                        "" => None,
                        owner => match MemberId::parse(owner) {
                            Ok(owner) => Some(owner),
                            Err(error) => {
                                tracing::error!(%member, shard = row.shard, %error, "a row that can't be read");
                                continue;
                            }
                        },
                    };
                    let row_found = Ownership { epoch: row.epoch, owner };
                    self.decide(Event::AcquireLost { shard: row.shard, row: row_found, by: member.clone() });
                }
            }
        }
    }

    fn on_holes(&mut self, member: &MemberId, holes: u64) {
        let known = self.holes.entry(member.clone()).or_default();
        if holes > *known {
            *known = holes;
            self.tell(format!("{} found {holes} holes in its logs: messages are missing", member.name()));
        }
    }

    /// A higher term comes from a leader before this one whose map was lost, or from one after it. Storing a term above it
    /// tells which: until then nobody hears anything.
    pub(super) fn hear_term(&mut self, term: u64) {
        if term > self.coordinator.version().term {
            self.coordinator.begin_term(term);
            self.unsaved = true;
            self.tell(format!("a member knows term {term}: control began term {}", self.coordinator.version().term));
        }
    }

    pub(super) fn on_view(&mut self) {
        let view = self.views.borrow_and_update().clone();
        let ended: Vec<MemberId> = self
            .links
            .iter_mut()
            .filter_map(|(member, link)| {
                let same = view.process(member.name()).is_some_and(|process| is_of(process, link));
                link.shown |= same;
                (link.shown && !same).then(|| member.clone())
            })
            .collect();
        for member in ended {
            let Some(link) = self.links.remove(&member) else { continue };
            if let Some((_, outbox)) = link.stream {
                outbox.close();
            }
            self.tell(format!("{} ({}) ended", member.name(), link.instance));
            self.map_changed = true;
            if link.tier == Tier::Business {
                self.decide(Event::MemberGone { member, confirmed_dead: true });
            }
        }
        for tier in Tier::ALL {
            self.tiers[tier].leaving.retain(|name, _| view.process(name).is_some());
        }
        self.spread.retain(|name, spread| {
            view.process(name).is_some_and(|process| process.instance.as_ref() == Some(&spread.instance))
        });
        if view.generation != self.view.generation {
            match self.platform.cluster() {
                Ok(cluster) => {
                    self.coordinator.set_rebalance(cluster.spec.business.rebalance.clone());
                    self.cluster = cluster;
                    self.cluster_error = None;
                    self.take_templates();
                    self.tell("the ImCluster changed and is followed".to_owned());
                }
                Err(error) => {
                    self.tell(format!("the changed ImCluster can't be read: {error}"));
                    self.cluster_error = Some(error.to_string());
                }
            }
        }
        self.view = view;
        self.round_due = true;
    }

    /// To be called with each change of the ImCluster.
    pub(super) fn take_templates(&mut self) {
        for tier in Tier::ALL {
            self.tiers[tier].template = self.platform.template(&self.cluster, tier);
        }
    }
}
