//! The gateway as a member of its cluster: the control stream, draining, the end.

use std::sync::Arc;
use std::time::Duration;

use im_proto::control::control_client::ControlClient;
use im_proto::control::{Command, Heartbeat, Hello, Report, Role, command, report};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;

use crate::connection;
use crate::listen::Gateway;
use crate::mqtt::Reason;

const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// How often a drain sheds what its rate allows.
const SHED_INTERVAL: Duration = Duration::from_millis(50);

/// A gateway's membership.
pub struct Member {
    gateway: Arc<Gateway>,
    /// This process's own HTTP address.
    admin_address: String,
    token: Option<MetadataValue<Ascii>>,
    state: Mutex<MemberState>,
}

#[derive(Debug, Default)]
struct MemberState {
    /// The highest term heard: commands of lower ones are ignored.
    term: u64,
    /// Connections shed per second while draining.
    drain_per_second: Option<f64>,
}

/// How a control stream ended.
enum Ended {
    /// The leader is elsewhere.
    NotLeader(String),
    Broken(String),
}

impl Member {
    /// A member that reports `admin_address` as its own.
    pub fn new(gateway: Arc<Gateway>, admin_address: String, token: Option<&str>) -> Arc<Self> {
        let token = token.and_then(|token| MetadataValue::try_from(format!("Bearer {token}")).ok());
        Arc::new(Self { gateway, admin_address, token, state: Mutex::default() })
    }

    /// Starts to shed connections at this rate and to accept no new ones.
    pub fn drain(&self, per_second: f64) {
        let per_second = if per_second.is_finite() && per_second > 0.0 { per_second } else { 1.0 };
        tracing::info!(per_second, "draining");
        self.state.lock().drain_per_second = Some(per_second);
        self.gateway.set_serving(false);
    }

    /// Serves again.
    pub fn undrain(&self) {
        if self.state.lock().drain_per_second.take().is_some() {
            tracing::info!("no longer draining");
        }
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
            let Some(per_second) = self.state.lock().drain_per_second else {
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
    pub async fn stay_joined(self: Arc<Self>, addresses: Vec<String>) {
        if addresses.is_empty() {
            return tracing::warn!("no control address is configured: no shard map will come");
        }
        let (mut index, mut pause, mut redirect) = (0, Duration::from_millis(50), None::<String>);
        loop {
            let address = redirect.take().unwrap_or_else(|| addresses[index % addresses.len()].clone());
            let opened = Instant::now();
            match self.join(&address).await {
                Ended::NotLeader(leader) if !leader.is_empty() && leader != address => {
                    redirect = Some(leader);
                }
                Ended::NotLeader(_) => index += 1,
                Ended::Broken(error) => {
                    tracing::warn!(%address, %error, "control stream: the last map stays in force");
                    index += 1;
                }
            }
            pause = if opened.elapsed() > Duration::from_secs(3) {
                Duration::from_millis(50)
            } else {
                (pause * 2).min(Duration::from_secs(1))
            };
            sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        }
    }

    async fn join(&self, address: &str) -> Ended {
        match self.run_stream(address).await {
            Ok(ended) => ended,
            Err(status) => Ended::Broken(status.to_string()),
        }
    }

    async fn run_stream(&self, address: &str) -> Result<Ended, tonic::Status> {
        let unavailable = |error: tonic::transport::Error| tonic::Status::unavailable(error.to_string());
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(unavailable)?;
        let channel = endpoint.connect_timeout(CONNECT_MAX).tcp_nodelay(true).connect().await.map_err(unavailable)?;
        let mut client = ControlClient::new(channel).max_decoding_message_size(16 << 20);
        let (sender, receiver) = mpsc::channel(16);
        let overflow = |_| tonic::Status::resource_exhausted("the control service does not read");
        sender.try_send(self.hello()).map_err(overflow)?;
        let mut request = tonic::Request::new(ReceiverStream::new(receiver));
        if let Some(token) = &self.token {
            request.metadata_mut().insert("authorization", token.clone());
        }
        let answer = timeout(CONNECT_MAX * 3, client.join(request)).await;
        let mut commands = answer.map_err(|_| tonic::Status::deadline_exceeded("no answer to Hello"))??.into_inner();
        let mut beat = interval(HEARTBEAT_INTERVAL);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                command = commands.message() => match command? {
                    None => return Ok(Ended::Broken("the stream ended".to_owned())),
                    Some(command) => if let Some(ended) = self.on_command(command) {
                        return Ok(ended);
                    },
                },
                _ = beat.tick() => sender.try_send(self.heartbeat()).map_err(|_| tonic::Status::resource_exhausted("the control service does not read"))?,
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
            http_address: self.admin_address.clone(),
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
            drained: self.is_drained(),
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
        }
        match command? {
            command::Command::Map(map) => self.gateway.hub.on_map(term, &map),
            command::Command::Drain(drain) => self.drain(drain.per_second),
            command::Command::Undrain(_) => self.undrain(),
            // Commands to owners of shards.
            command::Command::Prepare(_)
            | command::Command::Release(_)
            | command::Command::CancelRelease(_)
            | command::Command::Acquire(_)
            | command::Command::NotLeader(_) => {}
        }
        None
    }

    /// Empties this gateway within `grace`: for a process that was told to end.
    pub async fn leave(&self, grace: Duration) {
        let deadline = Instant::now() + grace;
        let connections = self.gateway.hub.connections() as f64;
        self.drain((connections / grace.as_secs_f64().max(0.1) * 1.5).max(20.0));
        let mut ticks = interval(SHED_INTERVAL);
        while self.gateway.hub.connections() > 0 && Instant::now() < deadline {
            ticks.tick().await;
        }
        self.shed_some(usize::MAX);
        // Likes that were counted and not sent yet.
        self.gateway.hub.send_counts();
        // The last Close of each session has to reach its owner, and the clients their reason.
        let mut ticks = interval(SHED_INTERVAL);
        let last = Instant::now() + Duration::from_millis(500);
        while (self.gateway.hub.connections() > 0 || self.gateway.hub.unanswered() > 0) && Instant::now() < last {
            ticks.tick().await;
        }
    }
}
