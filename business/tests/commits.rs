//! When a core commits: what came together goes together, the first after a silence at once, the last of a shard too, and every shard in
//! its turn. And what it answers when it does not know what it committed, or finds it stored.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use std::time::Duration;

use bytes::Bytes;
use im_business::core::calls::{StoreAnswer, StoreCall, UserRows};
use im_business::core::{Core, Input, Limits, Now, Output};
use im_business::store::{Duplicate, LogEntry, Outcome, ShardBatch, StoreError};
use im_proto::control::{self, command};
use im_proto::ids::{MemberId, direct_conversation, shard_of};
use im_proto::link::{GroupChange, Presence, Refusal, Request, Send, ServerFrame, body, reply, server_frame};
use support::{EPOCH, GATEWAY, answer, at, command, owner, owner_of, run};

fn message(id: u64) -> body::Body {
    message_in("u/ann/bob", id)
}

fn message_in(conversation: &str, id: u64) -> body::Body {
    body::Body::Send(Send {
        conversation: conversation.into(),
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

#[test]
fn a_busy_shard_does_not_keep_others_from_committing() {
    const SHARDS: u32 = 3;
    let mut core = owner_of(SHARDS, Limits { commit_ops_max: 1, commits_max: 1, ..Limits::default() });
    let conversation = |shard| {
        let mut peers = (0..).map(|i| direct_conversation("ann", &format!("peer{i}")));
        peers.find(|id| shard_of(id, SHARDS) == shard).expect("there are enough")
    };
    let mut under_way = Vec::new();
    for (id, shard) in [(1, 0), (2, 0), (3, 0), (4, 1), (5, 2)] {
        let message = message_in(&conversation(shard), id);
        support::ask_over(&mut core, at(0), GATEWAY, message, Request { id, shard, ..Request::default() });
        under_way.extend(run(&mut core, at(0), None).commits);
    }
    let mut turns = Vec::new();
    let mut now = 0;
    while let Some((call, batches)) = under_way.pop() {
        turns.extend(batches.iter().map(|batch| batch.shard));
        now += 10_000;
        support::stored(&mut core, at(now), call);
        under_way.extend(run(&mut core, at(now), None).commits);
    }
    assert_eq!(turns, [0, 1, 2, 0, 0]);
}

#[test]
fn an_acquire_that_was_answered_late_is_confirmed_before_anything_is_said() {
    let mut core = support::wanting(1, Limits::default());
    let acquire = core.take_outputs().into_iter().find_map(|output| match output {
        Output::Call { call, request: StoreCall::Acquire(claims) } => Some((call, claims)),
        _ => None,
    });
    let (call, claims) = acquire.expect("it asks for what it is told to");
    answer(&mut core, at(3_000_000), call, support::won(&claims));
    let rows = UserRows::default();
    support::ask(&mut core, at(3_000_000), 1, false, body::Body::Presence(Presence { user: "ann".into() }));
    assert!(run(&mut core, at(3_000_000), Some(&rows)).replies.is_empty(), "it may have a new owner for 2 s");
    core.handle(at(3_050_000), Input::Tick);
    let replies = run(&mut core, at(3_050_000), Some(&rows)).replies;
    assert!(matches!(replies[0].outcome, Some(reply::Outcome::Presence(_))), "{replies:?}");
}

#[test]
fn a_system_message_is_stored_once_and_answered_with_its_own_seq() {
    let mut core = owner();
    let mut now = 0;
    // A change, the entry that it wants stored, and the answer: to an entry that is stored already, where one is given.
    let mut change = |change: GroupChange, found: Option<&LogEntry>| {
        now += 10_000;
        let change = GroupChange { conversation: "g/team".into(), ..change };
        support::ask(&mut core, at(now), now, false, body::Body::GroupChange(change));
        let (call, batches) = run(&mut core, at(now), None).commits.remove(0);
        let outcome = match found {
            None => Outcome::Committed,
            Some(found) => Outcome::Duplicates(vec![Duplicate { index: 0, stored: found.clone() }]),
        };
        answer(&mut core, at(now), call, StoreAnswer::Commit(vec![outcome]));
        let mut replies = run(&mut core, at(now), None).replies;
        (batches[0].appends[0].clone(), replies.remove(0).outcome)
    };
    let message = |key: &str, text: &'static str| GroupChange {
        key: key.into(),
        system_message: Bytes::from_static(text.as_bytes()),
        ..GroupChange::default()
    };
    change(GroupChange { create: true, add: vec!["ann".into()], key: "new".into(), ..GroupChange::default() }, None);
    let (first, _) = change(message("1", "one"), None);
    change(message("2", "two"), None);
    let (_, repeated) = change(message("1", "one"), Some(&first));
    assert!(matches!(&repeated, Some(reply::Outcome::Group(group)) if group.head == first.seq), "{repeated:?}");
    let (_, other) = change(message("1", "another"), Some(&first));
    let is_refused = |code: Refusal| matches!(&other, Some(reply::Outcome::Refused(refused)) if refused.code() == code);
    assert!(is_refused(Refusal::IdReused), "{other:?}");
}
