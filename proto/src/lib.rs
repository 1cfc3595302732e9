//! The contracts between the tiers: gRPC messages, ids, the topic grammar, the shard hash, and the router that carries requests to
//! whoever owns a shard.
//!
//! Invariant of this crate: it decides nothing about chat. It knows how a request finds an owner, not what the request means.
#![allow(missing_docs)] // generated code; what is written by hand is documented

pub mod dial;
pub mod ids;
pub mod links;
pub mod map_hint;
pub mod process;
pub mod reload;
pub mod router;
pub mod token;
pub mod topic;

/// Gateway ↔ business and business ↔ business.
pub mod link {
    tonic::include_proto!("im.link.v1");

    impl RoomMessage {
        /// What it counts, in bytes, of what an owner lets a gateway have in hand; both sides count the same.
        pub fn bytes_in_hand(&self) -> u64 {
            const BESIDES_PAYLOAD: u64 = 64;
            self.payload.len() as u64 + BESIDES_PAYLOAD
        }

        /// A copy to keep: the payload of what came over a link is a part of all that the link said at once.
        pub fn detached(&self) -> Self {
            Self { payload: self.payload.to_vec().into(), ..self.clone() }
        }
    }
}

/// Members ↔ the control service.
pub mod control {
    tonic::include_proto!("im.control.v1");
}

/// Business ↔ the store member.
pub mod store {
    tonic::include_proto!("im.store.v1");
}

/// Values of the store's items.
pub mod state {
    tonic::include_proto!("im.state.v1");
}
