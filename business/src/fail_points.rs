//! Points at which a test may have the process end as if it were killed, between two steps that must not need each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use im_proto::link::{reply, server_frame};

use crate::core::calls::{StoreAnswer, StoreCall};
use crate::core::{Input, Output};

/// Where to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FailPoint {
    /// A commit is stored, nobody was told.
    Committed = 1,
    /// Senders have their acknowledgement, recipients' owners were told nothing.
    Acked,
    /// A planned move: all is written, the release is not asked yet.
    Releasing,
    /// The shard is released, control does not know.
    Released,
    /// The acquire is not asked yet.
    Acquiring,
    /// The shard is acquired, nobody knows.
    Acquired,
}

impl FailPoint {
    /// By the name used in the admin API.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "committed" => Self::Committed,
            "acked" => Self::Acked,
            "releasing" => Self::Releasing,
            "released" => Self::Released,
            "acquiring" => Self::Acquiring,
            "acquired" => Self::Acquired,
            _ => return None,
        })
    }
}

/// The point that is armed, if any.
#[derive(Debug, Clone, Default)]
pub struct FailPoints {
    armed: Arc<AtomicU8>,
    /// The last commit that gives a shard back.
    releasing: Arc<AtomicU64>,
}

impl FailPoints {
    /// The process ends when it gets there the next time.
    pub fn arm(&self, point: FailPoint) {
        self.armed.store(point as u8, Ordering::Relaxed);
    }

    fn reach(&self, point: FailPoint) {
        if self.armed.load(Ordering::Relaxed) == point as u8 {
            tracing::warn!(?point, "fail point reached: the process ends");
            std::process::abort();
        }
    }

    /// Before the core learns of something.
    pub fn before_input(&self, input: &Input) {
        if self.armed.load(Ordering::Relaxed) == 0 {
            return;
        }
        if let Input::Answered { call, answer: Ok(answer) } = input {
            match answer {
                StoreAnswer::Commit(_) => {
                    self.reach(FailPoint::Committed);
                    if *call == self.releasing.load(Ordering::Relaxed) {
                        self.reach(FailPoint::Released);
                    }
                }
                StoreAnswer::Release(_) => self.reach(FailPoint::Released),
                StoreAnswer::Acquire(_) => self.reach(FailPoint::Acquired),
                _ => {}
            }
        }
    }

    /// Before what the core wants is done. `true`: put acknowledgements on their links, let them be written, then call [`Self::acked`].
    pub fn before_outputs(&self, outputs: &[Output]) -> bool {
        let armed = self.armed.load(Ordering::Relaxed);
        if armed == 0 {
            return false;
        }
        for output in outputs {
            match output {
                Output::Call { request: StoreCall::Release(_), .. } => self.reach(FailPoint::Releasing),
                Output::Call { call, request: StoreCall::Commit(batches) } if batches.iter().any(|b| b.release) => {
                    self.reach(FailPoint::Releasing);
                    self.releasing.store(*call, Ordering::Relaxed);
                }
                Output::Call { request: StoreCall::Acquire(_), .. } => self.reach(FailPoint::Acquiring),
                Output::Frame { frame, .. } if armed == FailPoint::Acked as u8 => {
                    if let Some(server_frame::Frame::Reply(reply)) = &frame.frame
                        && matches!(reply.outcome, Some(reply::Outcome::Stored(_)))
                    {
                        return true;
                    }
                }
                _ => {}
            }
        }
        false
    }

    /// The acknowledgements are out.
    pub fn acked(&self) {
        self.reach(FailPoint::Acked);
    }
}
