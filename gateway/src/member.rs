//! The gateway as a member of its cluster: the control stream, draining, the end.

use std::sync::Arc;
use std::time::Duration;

use im_proto::control::{Command, Heartbeat, Hello, Report, Role, command, report};
use im_proto::dial::ControlDialer;
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;

use crate::connection;
use crate::listen::Gateway;
use crate::mqtt::Reason;

const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// From a stream's beginning to its first answer.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Connections that an ending gateway sheds per second at least, once it does so by itself.
const LAST_RATE_MIN: f64 = 20.0;
/// How often a drain sheds what its rate allows.
const SHED_INTERVAL: Duration = Duration::from_millis(50);

/// What a gateway says of itself to the control service.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Tells this process from another one of its name.
    pub instance: String,
    /// Where its health and metrics are, host:port.
    pub admin_address: String,
}

/// A gateway's membership.
pub struct Member {
    gateway: Arc<Gateway>,
    identity: Identity,
    state: Mutex<MemberState>,
    /// There is something to report before the next heartbeat is due.
    news: Notify,
}

#[derive(Debug, Default)]
struct MemberState {
    /// The highest term heard: commands of lower ones are ignored.
    term: u64,
    /// A control stream is open.
    joined: bool,
    /// What control wants to be shed per second while no more is accepted; `None` = it wants it to serve.
    drain_per_second: Option<f64>,
    /// What it wants to be shed per second while it serves.
    shed_per_second: Option<f64>,
    /// This process was told to end.
    ending: Option<Ending>,
}

/// From SIGTERM on.
#[derive(Debug, Clone, Copy)]
struct Ending {
    since: Instant,
    grace: Duration,
}

/// How a control stream ended.
enum Ended {
    /// The leader is elsewhere.
    NotLeader(String),
    Broken(String),
}

impl Member {
    /// A member that nobody knows yet.
    pub fn new(gateway: Arc<Gateway>, identity: Identity) -> Arc<Self> {
        Arc::new(Self { gateway, identity, state: Mutex::default(), news: Notify::new() })
    }

    /// Accepts no new connections and sheds the ones there are at this rate; 0 = sheds none.
    pub fn drain(&self, per_second: f64) {
        let per_second = sane(per_second);
        tracing::info!(per_second, "draining");
        {
            let mut state = self.state.lock();
            (state.drain_per_second, state.shed_per_second) = (Some(per_second), None);
        }
        self.gateway.set_serving(false);
    }

    /// Serves, and sheds some of its connections: it has many more than others.
    pub fn shed_at(&self, per_second: f64) {
        let per_second = sane(per_second);
        tracing::info!(per_second, "shedding what is too much here");
        {
            let mut state = self.state.lock();
            (state.drain_per_second, state.shed_per_second) = (None, Some(per_second));
        }
        self.gateway.set_serving(true);
    }

    /// Serves again.
    pub fn undrain(&self) {
        let mut state = self.state.lock();
        if state.drain_per_second.take().is_some() | state.shed_per_second.take().is_some() {
            tracing::info!("no longer draining");
        }
        drop(state);
        self.gateway.set_serving(true);
    }

    /// Draining and nothing left.
    pub fn is_drained(&self) -> bool {
        self.state.lock().drain_per_second.is_some() && self.gateway.hub.connections() == 0
    }

    /// Sheds connections while a drain goes on; runs for ever.
    pub async fn shed(self: Arc<Self>) {
        let mut ticks = interval(SHED_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut last = Instant::now();
        let mut due = 0.0_f64;
        loop {
            let now = ticks.tick().await;
            let elapsed = now.duration_since(last);
            last = now;
            let Some(per_second) = self.rate(now) else {
                due = 0.0;
                continue;
            };
            // Jitter, so that gateways that drain together don't shed in step.
            due += per_second * elapsed.as_secs_f64() * rand::random_range(0.5..1.5);
            let count = due as usize;
            due -= count as f64;
            if count > 0 {
                self.shed_some(count);
            }
        }
    }

    /// Connections to shed per second, if any at all may be.
    fn rate(&self, now: Instant) -> Option<f64> {
        let state = self.state.lock();
        let Some(Ending { since, grace }) = state.ending else {
            return state.drain_per_second.or(state.shed_per_second);
        };
        let order = state.drain_per_second.filter(|_| state.joined);
        let rate = ending_rate(order, state.joined, self.gateway.hub.connections(), now - since, grace);
        drop(state);
        if rate.is_some() {
            self.gateway.set_serving(false);
        }
        rate
    }

    fn shed_some(&self, count: usize) {
        let hub = &self.gateway.hub;
        let mut connections = hub.all();
        for _ in 0..count.min(connections.len()) {
            let chosen = connections.swap_remove(rand::random_range(0..connections.len()));
            connection::end(hub, &chosen, Reason::UseAnotherServer, "this gateway is being emptied: connect again");
            hub.shared.metrics.shed.inc();
        }
    }

    /// Keeps a stream to the leading control service; runs for ever.
    pub async fn stay_joined(self: Arc<Self>, mut dialer: ControlDialer) {
        if dialer.is_empty() {
            return tracing::warn!("no control address is configured: no shard map will come");
        }
        loop {
            let opened = Instant::now();
            match self.join(&mut dialer).await {
                Ok(Ended::NotLeader(leader)) => tracing::debug!(leader, "not the leader's control service"),
                Ok(Ended::Broken(error)) => tracing::warn!(error, "control stream: the last map stays in force"),
                Err(error) => tracing::warn!(%error, "control stream: the last map stays in force"),
            }
            self.state.lock().joined = false;
            dialer.pause(opened.elapsed()).await;
        }
    }

    async fn join(&self, dialer: &mut ControlDialer) -> Result<Ended, tonic::Status> {
        let (address, mut client) = dialer.connect().await?;
        let (sender, receiver) = mpsc::channel(16);
        let overflow = |_| tonic::Status::resource_exhausted("the control service does not read");
        sender.try_send(self.hello()).map_err(overflow)?;
        let answer = timeout(ANSWER_MAX, client.join(dialer.request(ReceiverStream::new(receiver)))).await;
        let mut commands = answer.map_err(|_| tonic::Status::deadline_exceeded("no answer to Hello"))??.into_inner();
        let mut beat = interval(HEARTBEAT_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.message() => match command? {
                    None => return Ok(Ended::Broken("the stream ended".to_owned())),
                    Some(command) => {
                        if let Some(ended) = self.on_command(command) {
                            if let Ended::NotLeader(leader) = &ended {
                                dialer.redirected(&address, leader.clone());
                            }
                            return Ok(ended);
                        }
                    }
                },
                () = self.news.notified() => sender.try_send(self.heartbeat()).map_err(overflow)?,
                _ = beat.tick() => sender.try_send(self.heartbeat()).map_err(overflow)?,
            }
        }
    }

    fn hello(&self) -> Report {
        let (term, number) = self.gateway.hub.map_version();
        let hello = Hello {
            member: self.gateway.hub.me.to_string(),
            role: Role::Gateway.into(),
            pid: std::process::id(),
            link_address: String::new(),
            http_address: self.identity.admin_address.clone(),
            instance: self.identity.instance.clone(),
            term: term.max(self.state.lock().term),
            number,
            held: Vec::new(),
        };
        Report { report: Some(report::Report::Hello(hello)) }
    }

    fn heartbeat(&self) -> Report {
        let hub = &self.gateway.hub;
        let (term, number) = hub.map_version();
        let heartbeat = Heartbeat {
            term,
            number,
            store_ok: true,
            connections: hub.connections() as u64,
            messages_per_second: hub.shared.metrics.messages_per_second.get(),
            cpu_cores: hub.shared.metrics.cpu_cores.get(),
            connect_ms: hub.shared.metrics.connect_seconds.get() * 1_000.0,
            connects_refused_per_second: hub.shared.metrics.connects_refused_per_second.get(),
            drained: self.is_drained(),
            leaving: self.state.lock().ending.is_some(),
            ..Heartbeat::default()
        };
        Report { report: Some(report::Report::Heartbeat(heartbeat)) }
    }

    /// Does what the control service says; returns how the stream ends, if it does.
    fn on_command(&self, Command { term, command }: Command) -> Option<Ended> {
        if let Some(command::Command::NotLeader(not_leader)) = command {
            return Some(Ended::NotLeader(not_leader.address));
        }
        {
            let mut state = self.state.lock();
            if term < state.term {
                tracing::warn!(term, heard = state.term, "a command of an earlier term is ignored");
                return None;
            }
            state.term = term;
            state.joined = true;
        }
        match command? {
            command::Command::Map(map) => self.gateway.hub.on_map(term, &map),
            command::Command::Drain(drain) => self.drain(drain.per_second),
            command::Command::Undrain(_) => self.undrain(),
            command::Command::Shed(shed) => self.shed_at(shed.per_second),
            // Commands to owners of shards.
            command::Command::Release(_)
            | command::Command::CancelRelease(_)
            | command::Command::Acquire(_)
            | command::Command::NotLeader(_) => {}
        }
        None
    }

    /// Empties this gateway within `grace`, for a process that was told to end: at the rate that control allows, which
    /// knows the others' room, and by itself where there is no control.
    pub async fn leave(&self, grace: Duration) {
        let since = Instant::now();
        self.state.lock().ending = Some(Ending { since, grace });
        self.news.notify_one();
        let deadline = since + grace;
        let mut ticks = interval(SHED_INTERVAL);
        while self.gateway.hub.connections() > 0 && Instant::now() < deadline {
            ticks.tick().await;
        }
        self.gateway.set_serving(false);
        self.shed_some(usize::MAX);
        // The last Close of each session has to reach its owner, and the clients their reason; what was counted goes behind the counts
        // under way, or again.
        let mut ticks = interval(SHED_INTERVAL);
        let last = Instant::now() + Duration::from_millis(500);
        loop {
            self.gateway.hub.send_counts();
            let is_done = self.gateway.hub.connections() == 0 && self.gateway.hub.unanswered() == 0;
            if is_done || Instant::now() >= last {
                return;
            }
            ticks.tick().await;
        }
    }
}

/// A rate that came over the wire.
fn sane(per_second: f64) -> f64 {
    if per_second.is_finite() { per_second.max(0.0) } else { 0.0 }
}

/// Connections that a gateway sheds per second after it was told to end, `elapsed` of its `grace` ago; `None`: it waits for
/// the word of control (`order`), to which it is `joined` or not.
///
/// Control knows how many the others can take, so its word counts for the first half of the grace, or its silence for the
/// first quarter. In the rest at least that many go that none is left at the end: what is left then is cut at once, and
/// comes back at once.
fn ending_rate(
    order: Option<f64>,
    joined: bool,
    connections: usize,
    elapsed: Duration,
    grace: Duration,
) -> Option<f64> {
    let waits_until = match (order, joined) {
        (Some(_), _) => grace / 2,
        (None, true) => grace / 4,
        (None, false) => Duration::ZERO,
    };
    if elapsed < waits_until {
        return order;
    }
    // A tenth less than what is left, for the jitter.
    let left = grace.saturating_sub(elapsed).as_secs_f64() * 0.9;
    Some((connections as f64 / left.max(0.1)).max(LAST_RATE_MIN).max(order.unwrap_or(0.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ending_gateway_obeys_control_and_is_empty_in_time() {
        let seconds = Duration::from_secs;
        let grace = seconds(100);
        for (order, joined, connections, elapsed, expected) in [
            (Some(7.0), true, 9_000, 0, Some(7.0)),
            (Some(0.0), true, 9_000, 49, Some(0.0)),
            (Some(7.0), true, 9_000, 50, Some(200.0)),
            (Some(500.0), true, 9_000, 50, Some(500.0)),
            (None, true, 9_000, 24, None),
            (None, true, 9_000, 25, Some(9_000.0 / 67.5)),
            (None, false, 9_000, 0, Some(100.0)),
            (None, false, 1, 0, Some(LAST_RATE_MIN)),
            (None, false, 90, 100, Some(900.0)),
        ] {
            let rate = ending_rate(order, joined, connections, seconds(elapsed), grace);
            assert_eq!(rate, expected, "{order:?} {joined} {connections} after {elapsed} s");
        }
    }
}
