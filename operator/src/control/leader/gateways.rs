//! Where clients go: which gateways new connections are led to, and who sheds those that it has.

use super::super::tiers::{Pace, Strain, drain_rate, level_rate};
use super::{Acts, Done, Leader, Leaving, Link, Order, Spread, within};
use crate::platform::{Platform, Process, ProcessState, Tier};
use im_proto::control::{self as wire, command::Command};
use im_proto::ids::MemberId;
use std::time::Duration;

/// So long after a gateway came others that have far more connections shed some.
const LEVEL_WINDOW: Duration = Duration::from_secs(900);
/// A drain rate is told anew when it changed by this part.
const RATE_CHANGE: f64 = 0.05;

impl Order {
    /// Whether that is news to somebody who was told `told`.
    fn is_news(self, told: Option<Self>) -> bool {
        match (self, told) {
            (Self::Drain(rate), Some(Self::Drain(told))) | (Self::Shed(rate), Some(Self::Shed(told))) => {
                (told - rate).abs() > RATE_CHANGE * told.max(1.0)
            }
            (order, told) => told != Some(order),
        }
    }
}

impl<P: Platform> Leader<P> {
    /// Has new connections led to the gateways that stay, and to no other.
    pub(super) fn spread_connections(&mut self) {
        let runs = |process: &&Process| process.state == ProcessState::Running;
        for process in self.view.of_tier(Tier::Gateway).filter(runs) {
            let Some(instance) = &process.instance else { continue };
            let serving = !self.tiers.gateway.leaving.contains_key(&process.name);
            let fresh = || Spread { instance: instance.clone(), confirmed: None, asked: false };
            let spread = self.spread.entry(process.name.clone()).or_insert_with(fresh);
            if spread.asked || spread.confirmed.is_some_and(|(confirmed, _)| confirmed == serving) {
                continue;
            }
            spread.asked = true;
            let (platform, name, instance) = (self.platform.clone(), process.name.clone(), instance.clone());
            self.tasks.spawn(async move {
                let outcome = within(platform.set_serving(&name, serving)).await;
                Done::Spread { name, instance, serving, outcome }
            });
        }
    }

    /// Since when new connections are led elsewhere.
    fn unserved_since(&self, process: &Process, leaving: &Leaving) -> Option<Duration> {
        // A platform that ends a process leads nobody to it.
        if process.state == ProcessState::Stopping {
            return Some(leaving.since);
        }
        let spread = self.spread.get(&process.name)?;
        spread.confirmed.and_then(|(serving, since)| (!serving).then_some(since))
    }

    /// Tells each gateway whether it drains and how fast, as the others' room changes. All that drain share one budget.
    pub(super) fn order_gateways(&mut self, acts: Acts) {
        // Who was told to drain by the leader before goes on until it is clear who drains.
        if !self.may_command() {
            return;
        }
        let gateway = &self.cluster.spec.gateway;
        let now = self.now();
        let mut live = Vec::new();
        for process in self.view.of_tier(Tier::Gateway) {
            if let Some((member, link)) = self.live_link(process) {
                live.push((process, member, link, self.tiers.gateway.leaving.get(&process.name)));
            }
        }
        let others: Vec<(&MemberId, u64)> = live
            .iter()
            .filter(|(.., leaving)| leaving.is_none())
            .map(|(_, member, link, _)| (*member, link.beat.connections))
            .collect();
        let draining = live.len() - others.len();
        let stay = live.iter().filter(|(.., leaving)| leaving.is_none()).map(|(_, _, link, _)| link.beat.strain);
        let strain = Strain::of(stay);
        let sheds = |link: &Link| matches!(link.told, Some(Order::Shed(_) | Order::Drain(_)));
        // What hurts while nobody sheds is not for a drain to mend.
        let pace = match live.iter().any(|(_, _, link, _)| sheds(link)) {
            true => self.pace.next(now, strain),
            false => Pace::full(now),
        };
        let limits = &gateway.limits;
        let held: Vec<u64> = others.iter().map(|(_, held)| *held).collect();
        let rate = drain_rate(gateway.drain.rate, limits.connect_rate, limits.max_connections, draining, &held);
        let rate = rate * pace.part();
        let mut orders = Vec::new();
        for (process, member, link, leaving) in live {
            let order = match leaving {
                None => {
                    let (held, sheds) = (link.beat.connections, matches!(link.told, Some(Order::Shed(_))));
                    let rest = others.iter().filter(|(other, _)| *other != member).map(|(_, held)| *held);
                    let levels = acts == Acts::Freely && now.saturating_sub(self.gateway_came) < LEVEL_WINDOW;
                    let (most, intake) = (gateway.drain.rate, limits.connect_rate);
                    let rest = rest.collect::<Vec<u64>>();
                    let rate = level_rate(held, sheds, most, intake, limits.max_connections, &rest);
                    // Drains can't wait, and their connections have to go somewhere too.
                    let rate = rate.filter(|_| levels && draining == 0).map(|rate| rate * pace.part());
                    rate.map_or(Order::Serve, Order::Shed)
                }
                // What is paused keeps what it has.
                Some(leaving) if acts == Acts::Never && !leaving.by_itself => Order::Drain(0.0),
                // Until load balancers noticed, who comes is let in.
                Some(leaving) => {
                    let unserved = self.unserved_since(process, leaving);
                    let noticed =
                        unserved.is_some_and(|since| now.saturating_sub(since) >= gateway.drain.notice.duration());
                    if noticed || link.beat.connections == 0 { Order::Drain(rate) } else { Order::Serve }
                }
            };
            if order.is_news(link.told) {
                orders.push((member.clone(), order));
            }
        }
        if (pace.part() < 1.0) != (self.pace.part() < 1.0) {
            let Strain { connect_ms, refused_per_second } = strain;
            self.tell(match pace.part() < 1.0 {
                true => format!(
                    "gateways shed more slowly: clients wait {connect_ms:.0} ms for a connection, {refused_per_second:.1} a second are refused"
                ),
                false => "gateways shed at their full rate again".to_owned(),
            });
        }
        self.pace = pace;
        for (member, order) in orders {
            self.send(
                &member,
                match order {
                    Order::Serve => Command::Undrain(wire::Undrain {}),
                    Order::Shed(per_second) => Command::Shed(wire::Shed { per_second }),
                    Order::Drain(per_second) => Command::Drain(wire::Drain { per_second }),
                },
            );
            if let Some(link) = self.links.get_mut(&member) {
                link.told = Some(order);
            }
        }
    }
}
