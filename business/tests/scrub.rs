//! The scrubber: every shard in its turn, a part at a time, and nothing that is being written.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use im_business::core::calls::{StoreAnswer, StoreCall};
use im_business::core::{Core, Input, Limits};
use im_business::store::{ScrubAt, Scrubbed};
use im_proto::ids::{direct_conversation, shard_of};
use im_proto::link::{Request, Send, body};
use support::{GATEWAY, answer, ask_over, at_ms, owner_of, run};

const SHARDS: u32 = 2;

fn limits() -> Limits {
    Limits { scrub_pause: Default::default(), scrub_rows: 10, ..Limits::default() }
}

/// What is read in the next turn.
fn turn(core: &mut Core, ms: u64) -> Option<(u64, u32, ScrubAt)> {
    core.handle(at_ms(ms), Input::Tick);
    run(core, at_ms(ms), None).calls.into_iter().find_map(|(call, request)| match request {
        StoreCall::Scrub { shard, after, limit: 10 } => Some((call, shard, after)),
        _ => None,
    })
}

fn found(core: &mut Core, ms: u64, call: u64, holes: &[&str], next: Option<u64>) {
    let holes = holes.iter().map(ToString::to_string).collect();
    let next = next.map(|pos| ScrubAt { pos, ..ScrubAt::default() });
    answer(core, at_ms(ms), call, StoreAnswer::Scrub(Scrubbed { holes, next }));
}

#[test]
fn each_shard_is_read_in_parts_and_anew_after_a_while() {
    let mut core = owner_of(SHARDS, limits());
    let mut seen = Vec::new();
    for (ms, next) in [(0, Some(10)), (1, None), (2, Some(20)), (3, None)] {
        let (call, shard, after) = turn(&mut core, ms).expect("it is not at the end");
        assert_eq!(turn(&mut core, ms), None, "one at a time");
        seen.push((shard, after.pos));
        found(&mut core, ms, call, &[], next);
    }
    assert_eq!(seen, [(0, 0), (1, 0), (0, 10), (0, 20)]);
    assert_eq!(turn(&mut core, 10), None, "all is read");
    let (_, shard, after) = turn(&mut core, 600_001).expect("ten minutes later the other one is due");
    assert_eq!((shard, after), (1, ScrubAt::default()));
}

#[test]
fn holes_are_counted_once() {
    let mut core = owner_of(1, limits());
    let (call, ..) = turn(&mut core, 0).expect("the first part");
    found(&mut core, 0, call, &["pos 3 is missing"], Some(10));
    let (call, ..) = turn(&mut core, 1).expect("the rest is read, too");
    found(&mut core, 1, call, &["pos 12 is missing"], None);
    assert_eq!(core.stats().holes, 2);
    assert_eq!(turn(&mut core, 10_000_000), None);
}

#[test]
fn a_shard_that_is_being_written_waits() {
    let mut core = owner_of(SHARDS, limits());
    let mut peers = (0..).map(|i| direct_conversation("ann", &format!("peer{i}")));
    let conversation = peers.find(|id| shard_of(id, SHARDS) == 0).expect("there are enough");
    let (sender, device, client_id) = ("ann".into(), "phone".into(), "1".into());
    let message = Send { conversation, sender, device, client_id, ..Send::default() };
    ask_over(&mut core, at_ms(0), GATEWAY, body::Body::Send(message), Request { id: 1, ..Request::default() });
    assert_eq!(run(&mut core, at_ms(0), None).commits.len(), 1, "it is on its way to the store");
    for ms in [1, 2] {
        let (call, shard, _) = turn(&mut core, ms).expect("the other shard has nothing open");
        assert_eq!(shard, 1);
        found(&mut core, ms, call, &[], Some(ms));
    }
}
