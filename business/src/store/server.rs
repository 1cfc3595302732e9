//! Serves any [`Store`] over gRPC (`im.store.v1`): what the store member does. [`super::remote`] is the other end.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use im_proto::ids::MemberId;
use im_proto::store as pb;
use im_proto::store::store_server::StoreServer;
use im_proto::token::SharedToken;
use tokio::net::TcpListener;
use tonic::metadata::MetadataValue;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::{
    Acquired, Claim, Duplicate, LogEntry, LogRange, Outcome, Put, Released, ScrubAt, Scrubbed, ShardBatch, ShardRow,
    Store, StoreError, Tail,
};

/// A message of the contract may take so much, both ways.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The metadata that marks a status as ours: what is `refused` was certainly not stored.
pub(super) const ERROR_METADATA: &str = "im-store-error";
pub(super) const REFUSED: &str = "refused";

/// Calls that one member may have open.
const CALLS_PER_CONNECTION_MAX: u32 = 1024;
/// HTTP/2 windows: a batch of a busy member fits in without waiting for an update.
pub(super) const STREAM_WINDOW_BYTES: u32 = 4 << 20;
pub(super) const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// Serves `store` to whoever `token` admits until the future is dropped.
pub async fn serve(
    listener: TcpListener,
    store: Arc<dyn Store>,
    token: SharedToken,
) -> Result<(), tonic::transport::Error> {
    let service = StoreServer::new(Service(store))
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let authorize = move |request: Request<()>| match token.admits(request.metadata()) {
        true => Ok(request),
        false => Err(mark_refused(Status::unauthenticated(
            "the store asks for its bearer token; give the member the store's token",
        ))),
    };
    Server::builder()
        .max_concurrent_streams(CALLS_PER_CONNECTION_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(5)))
        .layer(InterceptorLayer::new(authorize))
        .add_service(service)
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
}

fn mark_refused(mut status: Status) -> Status {
    status.metadata_mut().insert(ERROR_METADATA, MetadataValue::from_static(REFUSED));
    status
}

fn status(error: StoreError) -> Status {
    match error {
        StoreError::Refused { reason } => mark_refused(Status::unavailable(reason)),
        StoreError::Unknown { reason } => Status::unknown(reason),
    }
}

/// A request that is not of the contract: nothing of it was done.
fn malformed(what: impl std::fmt::Display) -> Status {
    mark_refused(Status::invalid_argument(what.to_string()))
}

struct Service(Arc<dyn Store>);

type Reply<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl pb::store_server::Store for Service {
    async fn acquire(&self, request: Request<pb::AcquireRequest>) -> Reply<pb::AcquireReply> {
        let request = request.into_inner();
        let claims = request.claims.into_iter().map(wire::claim).collect::<Result<_, _>>()?;
        let acquired = self.0.acquire(&wire::member(&request.me)?, claims).await.map_err(status)?;
        Ok(Response::new(pb::AcquireReply { acquired: acquired.into_iter().map(wire::acquired_to).collect() }))
    }

    async fn release(&self, request: Request<pb::ReleaseRequest>) -> Reply<pb::ReleaseReply> {
        let request = request.into_inner();
        let released = self.0.release(&wire::member(&request.me)?, wire::held(request.shards)).await.map_err(status)?;
        let released = released.into_iter().map(|released| pb::release_reply::Released {
            lost: match released {
                Released::Done => None,
                Released::Lost(row) => Some(wire::row_to(row)),
            },
        });
        Ok(Response::new(pb::ReleaseReply { released: released.collect() }))
    }

    async fn check(&self, request: Request<pb::CheckRequest>) -> Reply<pb::ShardRows> {
        let request = request.into_inner();
        let lost = self.0.check(&wire::member(&request.me)?, wire::held(request.shards)).await.map_err(status)?;
        Ok(Response::new(pb::ShardRows { rows: lost.into_iter().map(wire::row_to).collect() }))
    }

    async fn commit(&self, request: Request<pb::CommitRequest>) -> Reply<pb::CommitReply> {
        let request = request.into_inner();
        let batches = request.batches.into_iter().map(wire::batch).collect::<Result<_, _>>()?;
        let outcomes = self.0.commit(&wire::member(&request.me)?, batches).await.map_err(status)?;
        Ok(Response::new(pb::CommitReply { outcomes: outcomes.into_iter().map(wire::outcome_to).collect() }))
    }

    async fn find(&self, request: Request<pb::FindRequest>) -> Reply<pb::FindReply> {
        let pb::FindRequest { shard, conversation, key } = request.into_inner();
        let entry = self.0.find(shard, conversation.into(), key).await.map_err(status)?;
        Ok(Response::new(pb::FindReply { entry: entry.map(wire::entry_to) }))
    }

    async fn range(&self, request: Request<pb::RangeRequest>) -> Reply<pb::Entries> {
        let pb::RangeRequest { shard, conversation, from, limit, max_bytes, backward } = request.into_inner();
        let range = LogRange { shard, conversation: conversation.into(), from, limit, max_bytes, backward };
        let entries = self.0.range(range).await.map_err(status)?;
        Ok(Response::new(pb::Entries { entries: entries.into_iter().map(wire::entry_to).collect() }))
    }

    async fn tails(&self, request: Request<pb::TailsRequest>) -> Reply<pb::TailsReply> {
        let pb::TailsRequest { places, limit } = request.into_inner();
        let places = places.into_iter().map(|place| (place.shard, place.conversation.into())).collect();
        let tails = self.0.tails(places, limit).await.map_err(status)?;
        let entries = |tail: Vec<LogEntry>| pb::Entries { entries: tail.into_iter().map(wire::entry_to).collect() };
        Ok(Response::new(pb::TailsReply { tails: tails.into_iter().map(entries).collect() }))
    }

    async fn since(&self, request: Request<pb::SinceRequest>) -> Reply<pb::Entries> {
        let pb::SinceRequest { shard, after_pos, limit } = request.into_inner();
        let entries = self.0.since(shard, after_pos, limit).await.map_err(status)?;
        Ok(Response::new(pb::Entries { entries: entries.into_iter().map(wire::entry_to).collect() }))
    }

    async fn items(&self, request: Request<pb::ItemsRequest>) -> Reply<pb::ItemsReply> {
        let pb::ItemsRequest { shard, prefix, after, limit } = request.into_inner();
        let items = self.0.items(shard, prefix, after, limit).await.map_err(status)?;
        let items = items.into_iter().map(|(key, value)| pb::items_reply::Item { key, value }).collect();
        Ok(Response::new(pb::ItemsReply { items }))
    }

    async fn get(&self, request: Request<pb::GetRequest>) -> Reply<pb::GetReply> {
        let pb::GetRequest { shard, keys } = request.into_inner();
        let values = self.0.get(shard, keys).await.map_err(status)?;
        let values = values.into_iter().map(|value| pb::get_reply::Value { value }).collect();
        Ok(Response::new(pb::GetReply { values }))
    }

    async fn shards(&self, _: Request<pb::ShardsRequest>) -> Reply<pb::ShardRows> {
        let rows = self.0.shards().await.map_err(status)?;
        Ok(Response::new(pb::ShardRows { rows: rows.into_iter().map(wire::row_to).collect() }))
    }

    async fn scrub(&self, request: Request<pb::ScrubRequest>) -> Reply<pb::ScrubReply> {
        let pb::ScrubRequest { shard, after, limit } = request.into_inner();
        let after = after.map(wire::scrub_at).unwrap_or_default();
        let Scrubbed { holes, next } = self.0.scrub(shard, after, limit).await.map_err(status)?;
        Ok(Response::new(pb::ScrubReply { holes, next: next.map(wire::scrub_at_to) }))
    }
}

/// The contract's messages as our types and back, for both ends. `x` reads a message, `x_to` makes one.
pub(super) mod wire {
    use super::*;

    pub(in super::super) fn member(text: &str) -> Result<MemberId, Status> {
        MemberId::parse(text).map_err(malformed)
    }

    pub(in super::super) fn held(shards: Vec<pb::Held>) -> Vec<(u32, u64)> {
        shards.into_iter().map(|held| (held.shard, held.epoch)).collect()
    }

    pub(in super::super) fn held_to(shards: Vec<(u32, u64)>) -> Vec<pb::Held> {
        shards.into_iter().map(|(shard, epoch)| pb::Held { shard, epoch }).collect()
    }

    pub(in super::super) fn row(row: pb::ShardRow) -> Result<ShardRow, Status> {
        let owner = row.owner.as_deref().map(member).transpose()?;
        Ok(ShardRow { shard: row.shard, epoch: row.epoch, owner })
    }

    pub(in super::super) fn row_to(row: ShardRow) -> pb::ShardRow {
        pb::ShardRow { shard: row.shard, epoch: row.epoch, owner: row.owner.map(|owner| owner.to_string()) }
    }

    pub(in super::super) fn claim(claim: pb::Claim) -> Result<Claim, Status> {
        let expected_owner = claim.expected_owner.as_deref().map(member).transpose()?;
        Ok(Claim { shard: claim.shard, expected_epoch: claim.expected_epoch, expected_owner })
    }

    pub(in super::super) fn claim_to(claim: Claim) -> pb::Claim {
        let expected_owner = claim.expected_owner.map(|owner| owner.to_string());
        pb::Claim { shard: claim.shard, expected_epoch: claim.expected_epoch, expected_owner }
    }

    pub(in super::super) fn acquired(acquired: pb::Acquired) -> Result<Acquired, Status> {
        match acquired.result.ok_or_else(|| malformed("an acquire without result"))? {
            pb::acquired::Result::Won(pb::Tail { shard, epoch, head_pos, watermark, hole }) => {
                Ok(Acquired::Won(Tail { shard, epoch, head_pos, watermark, hole }))
            }
            pb::acquired::Result::Lost(lost) => Ok(Acquired::Lost(row(lost)?)),
        }
    }

    pub(in super::super) fn acquired_to(acquired: Acquired) -> pb::Acquired {
        let result = match acquired {
            Acquired::Won(Tail { shard, epoch, head_pos, watermark, hole }) => {
                pb::acquired::Result::Won(pb::Tail { shard, epoch, head_pos, watermark, hole })
            }
            Acquired::Lost(row) => pb::acquired::Result::Lost(row_to(row)),
        };
        pb::Acquired { result: Some(result) }
    }

    pub(in super::super) fn entry(entry: pb::Entry) -> Result<LogEntry, Status> {
        let pb::Entry { conversation, seq, pos, key, sender, device, kind, client_id, ts_ms, payload } = entry;
        Ok(LogEntry {
            conversation: conversation.into(),
            seq,
            pos,
            key,
            sender: sender.into(),
            device: device.into(),
            kind: u8::try_from(kind).map_err(|_| malformed(format_args!("kind {kind} is above 255")))?,
            client_id: client_id.into(),
            ts_ms,
            payload,
        })
    }

    pub(in super::super) fn entry_to(entry: LogEntry) -> pb::Entry {
        let LogEntry { conversation, seq, pos, key, sender, device, kind, client_id, ts_ms, payload } = entry;
        pb::Entry {
            conversation: conversation.to_string(),
            seq,
            pos,
            key,
            sender: sender.to_string(),
            device: device.to_string(),
            kind: kind.into(),
            client_id: client_id.to_string(),
            ts_ms,
            payload,
        }
    }

    pub(in super::super) fn batch(batch: pb::ShardBatch) -> Result<ShardBatch, Status> {
        Ok(ShardBatch {
            shard: batch.shard,
            epoch: batch.epoch,
            appends: batch.appends.into_iter().map(entry).collect::<Result<_, _>>()?,
            puts: batch.puts.into_iter().map(|put| Put { key: put.key, value: put.value }).collect(),
            watermark: batch.watermark,
            release: batch.release,
        })
    }

    pub(in super::super) fn batch_to(batch: ShardBatch) -> pb::ShardBatch {
        pb::ShardBatch {
            shard: batch.shard,
            epoch: batch.epoch,
            appends: batch.appends.into_iter().map(entry_to).collect(),
            puts: batch.puts.into_iter().map(|put| pb::Put { key: put.key, value: put.value }).collect(),
            watermark: batch.watermark,
            release: batch.release,
        }
    }

    pub(in super::super) fn outcome(outcome: pb::Outcome) -> Result<Outcome, Status> {
        use pb::outcome::Result as R;
        let duplicate = |duplicate: pb::Duplicate| {
            let stored = duplicate.stored.ok_or_else(|| malformed("a duplicate without entry"))?;
            Ok::<_, Status>(Duplicate { index: duplicate.index as usize, stored: entry(stored)? })
        };
        Ok(match outcome.result.ok_or_else(|| malformed("an outcome without result"))? {
            R::Committed(_) => Outcome::Committed,
            R::Fenced(fenced) => Outcome::Fenced(row(fenced)?),
            R::Duplicates(found) => {
                Outcome::Duplicates(found.duplicates.into_iter().map(duplicate).collect::<Result<_, _>>()?)
            }
            R::Corrupt(why) => Outcome::Corrupt(why),
        })
    }

    pub(in super::super) fn outcome_to(outcome: Outcome) -> pb::Outcome {
        use pb::outcome::Result as R;
        let duplicate = |duplicate: Duplicate| pb::Duplicate {
            index: duplicate.index as u32,
            stored: Some(entry_to(duplicate.stored)),
        };
        let result = match outcome {
            Outcome::Committed => R::Committed(pb::outcome::Committed {}),
            Outcome::Fenced(row) => R::Fenced(row_to(row)),
            Outcome::Duplicates(found) => {
                R::Duplicates(pb::outcome::Duplicates { duplicates: found.into_iter().map(duplicate).collect() })
            }
            Outcome::Corrupt(why) => R::Corrupt(why),
        };
        pb::Outcome { result: Some(result) }
    }

    pub(in super::super) fn scrub_at(pb::ScrubAt { pos, conversation, seq }: pb::ScrubAt) -> ScrubAt {
        ScrubAt { pos, conversation: conversation.into(), seq }
    }

    pub(in super::super) fn scrub_at_to(ScrubAt { pos, conversation, seq }: ScrubAt) -> pb::ScrubAt {
        pb::ScrubAt { pos, conversation: conversation.to_string(), seq }
    }

    pub(in super::super) fn items(items: Vec<pb::items_reply::Item>) -> Vec<(String, Bytes)> {
        items.into_iter().map(|item| (item.key, item.value)).collect()
    }
}
