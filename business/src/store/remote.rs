//! The store member, called over gRPC. [`super::server`] is the other end.
//!
//! Every call is one request on one HTTP/2 connection, which opens itself again when it broke. What matters is how a failure reads:
//! a status that the store marked, or no connection, is a refusal; anything else happened with the call under way, so its outcome is
//! unknown.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use im_proto::store as pb;
use im_proto::store::store_client::StoreClient;
use im_proto::token::SharedToken;
use prost::Message;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::server::{CONNECTION_WINDOW_BYTES, ERROR_METADATA, MESSAGE_BYTES_MAX, REFUSED, STREAM_WINDOW_BYTES, wire};
use super::{
    Acquired, Answer, Claim, LogEntry, LogRange, OpenError, Outcome, Released, ScrubAt, Scrubbed, ShardBatch, ShardRow,
    Store, StoreError,
};

/// Until a call's outcome counts as unknown.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

type Client = StoreClient<InterceptedService<Channel, Bearer>>;

/// The store member at an address.
#[derive(Debug, Clone)]
pub struct Remote {
    client: Client,
}

/// Puts the token on each call.
#[derive(Debug, Clone)]
struct Bearer(SharedToken);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = self.0.bearer() {
            request.metadata_mut().insert("authorization", bearer);
        }
        Ok(request)
    }
}

impl Remote {
    /// `endpoint`: `http://host:port`. Connects with the first call, so the store member may start later. Must be called within a tokio
    /// runtime.
    pub fn new(endpoint: &str, token: SharedToken) -> Result<Self, OpenError> {
        let unusable = |e: &dyn std::fmt::Display| OpenError::Endpoint { reason: e.to_string() };
        let channel = Endpoint::from_shared(endpoint.to_owned())
            .map_err(|e| unusable(&e))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(3))
            .keep_alive_while_idle(true)
            .connect_lazy();
        let client = StoreClient::with_interceptor(channel, Bearer(token))
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Ok(Self { client })
    }
}

/// Sends one request within `timeout` and takes the answer apart; `$read` may refuse what is not of the contract.
macro_rules! call {
    ($self:ident . $method:ident ( $request:expr ), $timeout:expr, $read:expr) => {{
        let mut client = $self.client.clone();
        let request = $request;
        Box::pin(async move {
            // Longer ones fail in the middle of the stream, which would read as an unknown outcome.
            if request.encoded_len() > MESSAGE_BYTES_MAX {
                return Err(StoreError::refused(format_args!(
                    "a request above {MESSAGE_BYTES_MAX} bytes; send smaller batches"
                )));
            }
            let reply = tokio::time::timeout($timeout, client.$method(request)).await;
            let reply = reply.map_err(|_| StoreError::unknown(format_args!("no answer within {:?}", $timeout)))?;
            let read = $read;
            // An answer that can't be read says nothing about what was done.
            read(reply.map_err(error)?.into_inner()).map_err(|status: Status| StoreError::unknown(status.message()))
        })
    }};
}

fn error(status: Status) -> StoreError {
    let marked = status.metadata().get(ERROR_METADATA).is_some_and(|value| value == REFUSED);
    if marked || never_connected(&status) {
        StoreError::refused(status.message())
    } else {
        StoreError::unknown(format_args!("{:?}: {}", status.code(), status.message()))
    }
}

fn never_connected(status: &Status) -> bool {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn all<P, T>(parts: Vec<P>, read: impl Fn(P) -> Result<T, Status>) -> Result<Vec<T>, Status> {
    parts.into_iter().map(read).collect()
}

fn entries(reply: pb::Entries) -> Result<Vec<LogEntry>, Status> {
    all(reply.entries, wire::entry)
}

fn rows(reply: pb::ShardRows) -> Result<Vec<ShardRow>, Status> {
    all(reply.rows, wire::row)
}

impl Store for Remote {
    fn acquire(&self, me: &MemberId, claims: Vec<Claim>) -> Answer<'_, Vec<Acquired>> {
        let claims = claims.into_iter().map(wire::claim_to).collect();
        let request = pb::AcquireRequest { me: me.to_string(), claims };
        call!(self.acquire(request), CALL_TIMEOUT, |reply: pb::AcquireReply| all(reply.acquired, wire::acquired))
    }

    fn release(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<Released>> {
        let request = pb::ReleaseRequest { me: me.to_string(), shards: wire::held_to(shards) };
        let released = |released: pb::release_reply::Released| {
            Ok(released.lost.map(wire::row).transpose()?.map_or(Released::Done, Released::Lost))
        };
        call!(self.release(request), CALL_TIMEOUT, move |reply: pb::ReleaseReply| all(reply.released, released))
    }

    fn check(&self, me: &MemberId, shards: Vec<(u32, u64)>) -> Answer<'_, Vec<ShardRow>> {
        let request = pb::CheckRequest { me: me.to_string(), shards: wire::held_to(shards) };
        call!(self.check(request), CALL_TIMEOUT, rows)
    }

    fn commit(&self, me: &MemberId, batches: Vec<ShardBatch>) -> Answer<'_, Vec<Outcome>> {
        let batches = batches.into_iter().map(wire::batch_to).collect();
        let request = pb::CommitRequest { me: me.to_string(), batches };
        call!(self.commit(request), CALL_TIMEOUT, |reply: pb::CommitReply| all(reply.outcomes, wire::outcome))
    }

    fn find(&self, shard: u32, conversation: Arc<str>, key: Bytes) -> Answer<'_, Option<LogEntry>> {
        let request = pb::FindRequest { shard, conversation: conversation.to_string(), key };
        call!(self.find(request), CALL_TIMEOUT, |reply: pb::FindReply| reply.entry.map(wire::entry).transpose())
    }

    fn range(&self, range: LogRange) -> Answer<'_, Vec<LogEntry>> {
        let LogRange { shard, conversation, from, limit, max_bytes, backward } = range;
        let request =
            pb::RangeRequest { shard, conversation: conversation.to_string(), from, limit, max_bytes, backward };
        call!(self.range(request), CALL_TIMEOUT, entries)
    }

    fn tails(&self, conversations: Vec<(u32, Arc<str>)>, limit: u32) -> Answer<'_, Vec<Vec<LogEntry>>> {
        let asked = conversations.len();
        let place = |(shard, conversation): (u32, Arc<str>)| pb::tails_request::Place {
            shard,
            conversation: conversation.to_string(),
        };
        let request = pb::TailsRequest { places: conversations.into_iter().map(place).collect(), limit };
        call!(self.tails(request), CALL_TIMEOUT, move |reply: pb::TailsReply| match reply.tails.len() {
            answered if answered == asked => all(reply.tails, entries),
            answered => Err(Status::internal(format!("{answered} tails of {asked} conversations"))),
        })
    }

    fn since(&self, shard: u32, after_pos: u64, limit: u32) -> Answer<'_, Vec<LogEntry>> {
        call!(self.since(pb::SinceRequest { shard, after_pos, limit }), CALL_TIMEOUT, entries)
    }

    fn items(&self, shard: u32, prefix: String, after: Option<String>, limit: u32) -> Answer<'_, Vec<(String, Bytes)>> {
        let request = pb::ItemsRequest { shard, prefix, after, limit };
        call!(self.items(request), CALL_TIMEOUT, |reply: pb::ItemsReply| Ok(wire::items(reply.items)))
    }

    fn get(&self, shard: u32, keys: Vec<String>) -> Answer<'_, Vec<Option<Bytes>>> {
        let values = |reply: pb::GetReply| Ok(reply.values.into_iter().map(|value| value.value).collect());
        call!(self.get(pb::GetRequest { shard, keys }), CALL_TIMEOUT, values)
    }

    fn shards(&self) -> Answer<'_, Vec<ShardRow>> {
        call!(self.shards(pb::ShardsRequest {}), CALL_TIMEOUT, rows)
    }

    fn scrub(&self, shard: u32, after: ScrubAt, limit: u32) -> Answer<'_, Scrubbed> {
        let request = pb::ScrubRequest { shard, after: Some(wire::scrub_at_to(after)), limit };
        let scrubbed =
            |reply: pb::ScrubReply| Ok(Scrubbed { holes: reply.holes, next: reply.next.map(wire::scrub_at) });
        call!(self.scrub(request), CALL_TIMEOUT, scrubbed)
    }
}
