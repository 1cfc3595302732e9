//! When a core commits: what came together goes together, the first after a silence at once, the last of a shard too. And what it
//! answers when it does not know what it committed.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use std::time::Duration;

use im_business::core::calls::StoreCall;
use im_business::core::{Core, Input, Now, Output};
use im_business::store::{ShardBatch, StoreError};
use im_proto::control::{self, command};
use im_proto::ids::MemberId;
use im_proto::link::{Send, ServerFrame, body, reply, server_frame};
use support::{EPOCH, at, command, owner, run};

fn message(id: u64) -> body::Body {
    body::Body::Send(Send {
        conversation: "u/ann/bob".into(),
        sender: "ann".into(),
        device: "phone".into(),
        client_id: format!("{id}"),
        ..Send::default()
    })
}

/// A message, and the commits that follow. People's state has no part in this.
fn send(core: &mut Core, now: Now, id: u64) -> Vec<(u64, Vec<ShardBatch>)> {
    support::ask(core, now, id, false, message(id));
    run(core, now, None).commits
}

fn stored(core: &mut Core, now: Now, call: u64) {
    support::stored(core, now, call);
    assert!(run(core, now, None).commits.is_empty());
}

/// What is answered while the store is away: the ids of the refused. Acquiring fails.
fn refused(core: &mut Core, now: Now) -> Vec<u64> {
    let mut refused = Vec::new();
    for output in core.take_outputs() {
        match output {
            Output::Call { call, request: StoreCall::Acquire(_) } => {
                core.handle(now, Input::Answered { call, answer: Err(StoreError::refused("connection refused")) });
            }
            Output::Frame { frame: ServerFrame { frame: Some(server_frame::Frame::Reply(reply)) }, .. } => {
                assert!(matches!(reply.outcome, Some(reply::Outcome::Refused(_))), "{reply:?}");
                refused.push(reply.id);
            }
            _ => {}
        }
    }
    refused
}

#[test]
fn a_commit_waits_for_its_time_unless_it_is_the_last_of_a_shard() {
    let mut core = owner();
    let first = send(&mut core, at(0), 1);
    assert_eq!(first.len(), 1, "after a silence nobody waits");
    stored(&mut core, at(300), first[0].0);

    assert!(send(&mut core, at(500), 2).is_empty());
    assert!(send(&mut core, at(900), 3).is_empty());
    assert_eq!(core.commit_at(), Some(Duration::from_millis(2)));
    core.commit(at(2_000));
    let second = run(&mut core, at(2_000), None).commits;
    assert_eq!(second[0].1[0].appends.len(), 2, "what came meanwhile goes together");
    assert!(!second[0].1[0].release);
    stored(&mut core, at(2_300), second[0].0);

    assert!(send(&mut core, at(2_400), 4).is_empty());
    let release = control::Release { shard: 0, epoch: EPOCH, to: "business-1/0000000000000001".into() };
    command(&mut core, at(2_500), command::Command::Release(release));
    let last = run(&mut core, at(2_500), None).commits;
    assert!(last[0].1[0].release, "the last batch gives the shard back");
    core.take_outputs();
    support::stored(&mut core, at(2_800), last[0].0);
    assert_eq!(core.held().count(), 0);
}

#[test]
fn what_is_not_in_a_commit_of_unknown_outcome_is_refused_after_a_moment() {
    let mut core = owner();
    let commit = send(&mut core, at(0), 1)[0].0;
    core.handle(at(1_000), Input::Answered { call: commit, answer: Err(StoreError::unknown("connection closed")) });
    assert!(refused(&mut core, at(1_000)).is_empty(), "whether the first is stored, nobody knows");

    support::ask(&mut core, at(2_000), 1, true, message(1));
    support::ask(&mut core, at(2_000), 2, false, message(2));
    core.handle(at(500_000), Input::Tick);
    assert!(refused(&mut core, at(500_000)).is_empty(), "it may soon be over");
    // Control misses the shard among those held.
    let me = MemberId::new("business-0", 1).expect("a good name").to_string();
    let row = control::ShardRow { shard: 0, epoch: EPOCH, owner: me };
    command(&mut core, at(900_000), command::Command::Acquire(control::Acquire { expected: vec![row] }));
    assert!(refused(&mut core, at(900_000)).is_empty());
    core.handle(at(1_100_000), Input::Tick);
    assert_eq!(refused(&mut core, at(1_100_000)), [2], "what may be in the commit still waits");
    support::ask(&mut core, at(1_200_000), 3, false, message(3));
    assert_eq!(refused(&mut core, at(1_200_000)), [3]);
}
