//! The gRPC service: one stream per member, reports up, commands down.
//!
//! Reports of all members of a cluster go through one bounded queue to the one loop that decides for it; commands go through a bounded outbox
//! per member, in which a newer map takes the place of one not yet sent.

use super::clusters::{Clusters, Refusal};
use futures::Stream;
use im_proto::control::control_server::Control;
use im_proto::control::{self as wire, Command, Report, command, report};
use im_proto::dial::CLUSTER_METADATA;
use im_proto::ids::MemberId;
use im_proto::token::bearer_of;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio_stream::StreamExt;
use tonic::{Request, Response, Status, Streaming};

/// Commands that wait for one member. One that falls behind by more is cut off, joins anew, and is told everything.
const COMMANDS_MAX: usize = 65_536;
/// From the stream's beginning to its first report.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Tells the streams apart that one member opens one after the other.
pub(super) type StreamId = u64;

/// What the service tells the loop.
pub(super) enum Incoming {
    /// A member dialled in.
    Joined { stream: StreamId, member: MemberId, hello: wire::Hello, outbox: Arc<Outbox> },
    /// It reports.
    Reported { stream: StreamId, member: MemberId, report: report::Report },
    /// Its stream ended.
    Left { stream: StreamId, member: MemberId },
}

/// Commands on their way to one member.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    state: Mutex<OutboxState>,
}

#[derive(Debug, Default)]
struct OutboxState {
    commands: VecDeque<Command>,
    /// The newest map not yet sent, and the term it goes out with. Sent before the commands: they are about that map.
    map: Option<(u64, Arc<wire::Map>)>,
    closed: bool,
    waker: Option<Waker>,
}

impl Outbox {
    /// Queues a command; a full outbox ends the stream.
    pub(super) fn send(&self, term: u64, command: command::Command) {
        self.change(|state| {
            if state.commands.len() >= COMMANDS_MAX {
                state.closed = true;
            } else {
                state.commands.push_back(Command { term, command: Some(command) });
            }
        });
    }

    /// Queues a map in place of an earlier one.
    pub(super) fn send_map(&self, term: u64, map: Arc<wire::Map>) {
        self.change(|state| state.map = Some((term, map)));
    }

    /// Ends the stream.
    pub(super) fn close(&self) {
        self.change(|state| state.closed = true);
    }

    fn change(&self, change: impl FnOnce(&mut OutboxState)) {
        let waker = {
            let mut state = self.state.lock();
            if state.closed {
                return;
            }
            change(&mut state);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// The member's side of an [`Outbox`].
struct Commands(Arc<Outbox>);

impl Stream for Commands {
    type Item = Result<Command, Status>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Poll::Ready(Some(Err(Status::resource_exhausted("join again: this stream is closed"))));
        }
        if let Some((term, map)) = state.map.take() {
            let map = Arc::unwrap_or_clone(map);
            return Poll::Ready(Some(Ok(Command { term, command: Some(command::Command::Map(map)) })));
        }
        match state.commands.pop_front() {
            Some(command) => Poll::Ready(Some(Ok(command))),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The service of all clusters; decisions are made by whoever reads the other end of a cluster's queue.
pub(super) struct ControlService {
    clusters: Arc<Clusters>,
    streams: AtomicU64,
}

impl ControlService {
    pub(super) fn new(clusters: Arc<Clusters>) -> Self {
        Self { clusters, streams: AtomicU64::new(0) }
    }
}

#[tonic::async_trait]
impl Control for ControlService {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<Command, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<Report>>) -> Result<Response<Self::JoinStream>, Status> {
        let text = |key| request.metadata().get(key).and_then(|value| value.to_str().ok());
        let incoming = match self.clusters.route(text(CLUSTER_METADATA), bearer_of(request.metadata())) {
            Ok(incoming) => incoming,
            Err(Refusal::NotLeader(leader)) => {
                let not_leader = wire::NotLeader { address: leader.unwrap_or_default() };
                let command = Command { term: 0, command: Some(command::Command::NotLeader(not_leader)) };
                return Ok(Response::new(Box::pin(tokio_stream::once(Ok(command)))));
            }
            Err(Refusal::UnknownCluster(key)) => {
                return Err(Status::not_found(format!("nobody decides for the cluster {key} here: join again")));
            }
            Err(Refusal::Unauthenticated) => {
                tracing::warn!(from = ?request.remote_addr(), "a member with a wrong token, or none, is refused");
                return Err(Status::unauthenticated("joining needs the cluster's token: check linkToken"));
            }
        };
        let mut reports = request.into_inner();
        let stream = self.streams.fetch_add(1, Ordering::Relaxed);
        let outbox = Arc::new(Outbox::default());
        let commands = Commands(outbox.clone());
        // The answer's headers must not wait for the first report: a client may wait for them before it sends anything.
        tokio::spawn(async move {
            let member = match hello(&mut reports).await {
                Ok((member, hello)) => {
                    let joined = Incoming::Joined { stream, member: member.clone(), hello, outbox: outbox.clone() };
                    if incoming.send(joined).await.is_err() {
                        return outbox.close();
                    }
                    member
                }
                Err(refusal) => {
                    tracing::warn!("a member is refused: {}", refusal.message());
                    return outbox.close();
                }
            };
            // Waiting for the loop here is the back-pressure: gRPC's flow control holds up the member.
            while let Some(Ok(Report { report: Some(report) })) = reports.next().await {
                if incoming.send(Incoming::Reported { stream, member: member.clone(), report }).await.is_err() {
                    break;
                }
            }
            outbox.close();
            let _ = incoming.send(Incoming::Left { stream, member }).await;
        });
        Ok(Response::new(Box::pin(commands)))
    }
}

/// The stream's first report, which says who it is.
async fn hello(reports: &mut Streaming<Report>) -> Result<(MemberId, wire::Hello), Status> {
    let first = tokio::time::timeout(HELLO_TIMEOUT, reports.next()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no Hello within 5 s"))?;
    let first = first.ok_or_else(|| Status::invalid_argument("the stream ended before its Hello"))??;
    let Some(report::Report::Hello(hello)) = first.report else {
        return Err(Status::invalid_argument("the first report must be a Hello"));
    };
    let member = MemberId::parse(&hello.member).map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok((member, hello))
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    fn acquire(shard: u32) -> command::Command {
        let row = wire::ShardRow { shard, epoch: 0, owner: String::new() };
        command::Command::Acquire(wire::Acquire { expected: vec![row] })
    }

    #[test]
    fn a_newer_map_takes_the_place_of_the_one_not_yet_sent() {
        let outbox = Arc::new(Outbox::default());
        let mut commands = Commands(outbox.clone());
        assert!(commands.next().now_or_never().is_none());
        outbox.send(1, acquire(7));
        for number in [1, 2, 3] {
            outbox.send_map(1, Arc::new(wire::Map { number, ..Default::default() }));
        }
        let sent: Vec<Command> = std::iter::from_fn(|| commands.next().now_or_never())
            .map(|item| item.expect("open").expect("a command"))
            .collect();
        assert_eq!(sent.len(), 2, "{sent:?}");
        assert!(matches!(&sent[0].command, Some(command::Command::Map(map)) if map.number == 3));
        assert_eq!(sent[1].command, Some(acquire(7)));
    }

    #[test]
    fn who_falls_too_far_behind_is_cut_off() {
        let outbox = Arc::new(Outbox::default());
        let mut commands = Commands(outbox.clone());
        for shard in 0..=COMMANDS_MAX as u32 {
            outbox.send(1, acquire(shard));
        }
        let refusal = commands.next().now_or_never().flatten().expect("an end").expect_err("cut off");
        assert_eq!(refusal.code(), tonic::Code::ResourceExhausted);
    }
}
