//! Control: the map, moves, and what members report.

use super::*;

impl World {
    pub(super) fn control_returns(&mut self) {
        let now = Duration::from_micros(self.now);
        self.coordinator = Some(Coordinator::new(Timing::default(), Rebalance::default(), self.kept_map.clone(), now));
        self.after(0, What::ControlTick);
        self.after(4 * SECOND, What::Plan);
        for i in 0..self.business.len() {
            self.feed(i, Input::ControlUp(Hello { role: control::Role::Business.into(), ..Hello::default() }));
        }
        for i in 0..self.gateways.len() {
            if self.gateways[i].alive {
                self.gateway_hello(i);
            }
        }
    }

    pub(super) fn report(&mut self, member: MemberId, report: Report) {
        match report.report {
            Some(report::Report::Hello(hello)) if hello.role() == control::Role::Business => {
                self.tell_coordinator(Event::MemberJoined { member });
                self.publish_map();
            }
            Some(report::Report::Hello(_)) => self.publish_map(),
            Some(report::Report::Heartbeat(heartbeat)) => {
                let held = heartbeat.held.iter().map(|held| (held.shard, held.epoch)).collect();
                let loads = heartbeat.loads.iter().map(|load| (load.shard, load.per_second)).collect();
                let (store_ok, term) = (heartbeat.store_ok, heartbeat.term);
                self.tell_coordinator(Event::Heartbeat { member, held, loads, store_ok, term });
            }
            Some(report::Report::Acquired(acquired)) => {
                for shard in acquired.shards {
                    self.tell_coordinator(Event::Acquired {
                        shard: shard.shard,
                        epoch: shard.epoch,
                        by: member.clone(),
                    });
                }
            }
            Some(report::Report::Released(released)) => {
                for shard in released.shards {
                    self.tell_coordinator(Event::Released {
                        shard: shard.shard,
                        epoch: shard.epoch,
                        by: member.clone(),
                    });
                }
            }
            Some(report::Report::AcquireLost(lost)) => {
                for row in lost.rows {
                    let row_found = Ownership { epoch: row.epoch, owner: MemberId::parse(&row.owner).ok() };
                    self.tell_coordinator(Event::AcquireLost { shard: row.shard, row: row_found, by: member.clone() });
                }
            }
            None => {}
        }
    }

    pub(super) fn tell_coordinator(&mut self, event: Event) {
        let now = Duration::from_micros(self.now);
        let Some(coordinator) = &mut self.coordinator else { return };
        let actions = coordinator.handle(now, event);
        let term = coordinator.version().term;
        let row = |expected: &Ownership, shard| control::ShardRow {
            shard,
            epoch: expected.epoch,
            owner: expected.owner.as_ref().map_or_else(String::new, ToString::to_string),
        };
        for action in actions {
            let (to, command) = match action {
                Action::Release { by, shard, epoch, to } => {
                    (by, command::Command::Release(control::Release { shard, epoch, to: to.to_string() }))
                }
                Action::CancelRelease { by, shard, epoch } => {
                    (by, command::Command::CancelRelease(control::CancelRelease { shard, epoch }))
                }
                Action::Acquire { by, shard, expected } => {
                    let expected = vec![row(&expected, shard)];
                    (by, command::Command::Acquire(control::Acquire { expected }))
                }
                Action::MapChanged => {
                    self.publish_map();
                    continue;
                }
                Action::Outranked { term } => {
                    if let Some(coordinator) = &mut self.coordinator {
                        coordinator.begin_term(term);
                    }
                    continue;
                }
            };
            if self.chance(100) {
                continue; // lost
            }
            let delay = self.latency();
            self.after(delay, What::FromControl(to, Command { term, command: Some(command) }));
        }
    }

    pub(super) fn publish_map(&mut self) {
        let Some(coordinator) = &self.coordinator else { return };
        self.kept_map = coordinator.map().clone();
        let mut members = Vec::new();
        let mut push = |id: &MemberId, role: control::Role| {
            members.push(control::Member { member: id.to_string(), role: role.into(), link_address: String::new() });
        };
        self.business
            .iter()
            .filter(|member| member.core.is_some())
            .for_each(|member| push(&member.id, control::Role::Business));
        self.gateways
            .iter()
            .filter(|gateway| gateway.alive)
            .for_each(|gateway| push(&gateway.id, control::Role::Gateway));
        let index = |owner: &MemberId| {
            members.iter().position(|member| member.member == owner.as_str()).map_or(0, |i| i as u32 + 1)
        };
        let rows = coordinator.map().rows();
        let map = control::Map {
            number: coordinator.version().number,
            shards: SHARDS,
            owners: rows.iter().map(|row| row.owner.as_ref().map_or(0, &index)).collect(),
            epochs: rows.iter().map(|row| row.epoch).collect(),
            members,
        };
        let command = Command { term: coordinator.version().term, command: Some(command::Command::Map(map)) };
        let everybody: Vec<MemberId> = self
            .business
            .iter()
            .map(|member| member.id.clone())
            .chain(self.gateways.iter().map(|gateway| gateway.id.clone()))
            .collect();
        for member in everybody {
            let delay = self.latency();
            self.after(delay, What::FromControl(member, command.clone()));
        }
    }

    pub(super) fn command(&mut self, member: &MemberId, command: Command) {
        if let Some(i) = self.business.iter().position(|business| business.id == *member) {
            return self.feed(i, Input::Command(command));
        }
        let Some(i) = self.gateways.iter().position(|gateway| gateway.id == *member && gateway.alive) else { return };
        if let Some(command::Command::Map(map)) = command.command {
            if (command.term, map.number) < self.gateways[i].version {
                return;
            }
            self.gateways[i].version = (command.term, map.number);
            let business: BTreeMap<String, MemberId> =
                self.business.iter().map(|member| (member.id.to_string(), member.id.clone())).collect();
            let listed: Vec<Option<&MemberId>> =
                map.members.iter().map(|member| business.get(&member.member)).collect();
            for (shard, (owner, epoch)) in map.owners.iter().zip(&map.epochs).enumerate() {
                if let Some(Some(owner)) = (*owner as usize).checked_sub(1).and_then(|index| listed.get(index)) {
                    self.gateways[i].router.claim(shard as u32, *epoch, owner);
                }
            }
            let members: Vec<MemberId> = listed.into_iter().flatten().cloned().collect();
            self.dial_members(Process::Gateway(i), &members);
            self.gateways[i].members = members;
            self.pump(i);
        }
    }

    pub(super) fn plan(&mut self) {
        let now = Duration::from_micros(self.now);
        let Some(coordinator) = &self.coordinator else { return };
        if let Some(input) = coordinator.plan_input(now) {
            let proposed = plan(&input);
            let hash = proposed.hash();
            if let Ok(committed) = proposed.approve(hash).and_then(|approved| approved.commit(coordinator.map())) {
                self.tell_coordinator(Event::NewPlan(committed));
            }
        }
        self.after(SECOND, What::Plan);
    }

    /// A planned move of a random shard, whatever the loads say.
    pub(super) fn move_something(&mut self) {
        let shard = self.rng.random_range(0..SHARDS);
        let to = self.business[self.rng.random_range(0..BUSINESS)].id.clone();
        let Some(coordinator) = &self.coordinator else { return };
        let Some(row) = coordinator.map().get(shard) else { return };
        if row.owner.as_ref() == Some(&to) {
            return;
        }
        let proposed = Plan::new(vec![Move { shard, epoch: row.epoch, from: row.owner.clone(), to }]);
        let hash = proposed.hash();
        if let Ok(committed) = proposed.approve(hash).and_then(|approved| approved.commit(coordinator.map())) {
            self.tell_coordinator(Event::NewPlan(committed));
        }
    }
}
