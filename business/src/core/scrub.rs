//! Looks for holes in the logs of the shards held: a few rows at a time, one shard after the other, while nothing of the shard is being
//! written. What an acquire sees is only the end of a log; this sees all of it.

use std::time::Duration;

use super::calls::{StoreAnswer, StoreCall};
use super::ownership::Slot;
use super::shard::OwnedShard;
use super::{Context, Core, Env};
use crate::store::{ScrubAt, Scrubbed, StoreError};

/// How far the scrubber has come with one shard.
#[derive(Debug)]
pub(super) struct Scrub {
    at: ScrubAt,
    /// When it goes on; `None`: never, as what it found would be counted again.
    due: Option<Duration>,
    has_holes: bool,
}

impl Scrub {
    pub(super) fn new(now: Duration) -> Self {
        Self { at: ScrubAt::default(), due: Some(now), has_holes: false }
    }
}

impl OwnedShard {
    fn may_be_scrubbed(&self, now: Duration) -> bool {
        self.leaving.is_none() && self.nothing_open() && self.scrub.due.is_some_and(|due| due <= now)
    }

    pub(super) fn scrubbed(&mut self, env: &mut Env, answer: Result<StoreAnswer, StoreError>) {
        // What could not be read is read in its next turn.
        let Ok(StoreAnswer::Scrub(Scrubbed { holes, next })) = answer else { return };
        env.stats.holes += holes.len() as u64;
        for hole in &holes {
            tracing::error!(hole, "a hole in the log: a stored message was lost");
        }
        let scrub = &mut self.scrub;
        scrub.has_holes |= !holes.is_empty();
        if next.is_none() {
            scrub.due = (!scrub.has_holes).then(|| env.now.mono + env.limits.scrub_interval);
        }
        scrub.at = next.unwrap_or_default();
    }
}

impl Core {
    /// Looks at a part of the next shard whose turn it is, if it is time.
    pub(super) fn scrub(&mut self) {
        let now = self.env.now.mono;
        if self.next.scrubbing || now < self.next.scrub {
            return;
        }
        self.next.scrub = now + self.env.limits.scrub_pause;
        let from = self.next.scrub_from;
        let turn = self.slots.range(from..).chain(self.slots.range(..from)).find_map(|(shard, slot)| match slot {
            Slot::Owned(owned) if owned.may_be_scrubbed(now) => Some((*shard, owned)),
            _ => None,
        });
        let Some((shard, owned)) = turn else { return };
        let (epoch, after, limit) = (owned.epoch, owned.scrub.at.clone(), self.env.limits.scrub_rows);
        (self.next.scrub_from, self.next.scrubbing) = (shard + 1, true);
        self.env.call(StoreCall::Scrub { shard, after, limit }, Context::Scrub { shard, epoch });
    }
}
