//! When a core commits: what came together goes together, the first after a silence at once, the last of a shard too. And what it
//! answers when it does not know what it committed.

use std::time::Duration;

use im_business::core::calls::{ConversationRows, StoreAnswer, StoreCall};
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_business::store::{self, Acquired, ShardBatch, StoreError, Tail};
use im_proto::control::{self, Command, command};
use im_proto::ids::MemberId;
use im_proto::link::{Body, ClientFrame, Request, Role, Send, ServerFrame, body, client_frame, reply, server_frame};
use prost::Message;

const GATEWAY: LinkId = LinkId(1);

fn at(micros: u64) -> Now {
    Now { mono: Duration::from_micros(micros), wall_ms: 1 }
}

fn command(core: &mut Core, now: Now, command: command::Command) {
    core.handle(now, Input::Command(Command { term: 1, command: Some(command) }));
}

/// Answers what is asked of an empty store, but for commits, which are given back.
fn commits(core: &mut Core, now: Now) -> Vec<(u64, Vec<ShardBatch>)> {
    let mut commits = Vec::new();
    loop {
        let outputs = core.take_outputs();
        if outputs.is_empty() {
            return commits;
        }
        for output in outputs {
            let Output::Call { call, request } = output else { continue };
            let answer = match request {
                StoreCall::Commit(batches) => {
                    commits.push((call, batches));
                    continue;
                }
                StoreCall::Shards => StoreAnswer::Shards(Vec::new()),
                StoreCall::Acquire(_) => {
                    let tail = Tail { shard: 0, epoch: 1, head_pos: 0, watermark: 0, hole: false };
                    StoreAnswer::Acquire(vec![Acquired::Won(tail)])
                }
                StoreCall::LoadConversation { .. } => StoreAnswer::LoadConversation(ConversationRows::default()),
                // People's state has no part in this.
                _ => continue,
            };
            core.handle(now, Input::Answered { call, answer: Ok(answer) });
        }
    }
}

/// Owns the only shard and has a gateway's link.
fn owner() -> Core {
    let limits = Limits { commit_spacing: Duration::from_millis(2), ..Limits::default() };
    let mut core = Core::new(MemberId::new("business-0", 1).expect("a good name"), limits, at(0));
    command(&mut core, at(0), command::Command::Map(control::Map { number: 1, shards: 1, ..Default::default() }));
    let row = control::ShardRow { shard: 0, epoch: 0, owner: String::new() };
    command(&mut core, at(0), command::Command::Acquire(control::Acquire { expected: vec![row] }));
    assert!(commits(&mut core, at(0)).is_empty());
    let peer = MemberId::new("gateway-0", 1).expect("a good name");
    core.handle(at(0), Input::LinkOpened { link: GATEWAY, peer, role: Role::Gateway });
    core
}

fn send(core: &mut Core, now: Now, id: u64) -> Vec<(u64, Vec<ShardBatch>)> {
    ask(core, now, id, false);
    commits(core, now)
}

fn ask(core: &mut Core, now: Now, id: u64, again: bool) {
    let send = Send {
        conversation: "u/ann/bob".into(),
        sender: "ann".into(),
        device: "phone".into(),
        client_id: format!("{id}"),
        ..Send::default()
    };
    let body = Body { body: Some(body::Body::Send(send)) }.encode_to_vec().into();
    let request = Request { id, shard: 0, epoch: 1, body, again, ..Request::default() };
    let frame = ClientFrame { frame: Some(client_frame::Frame::Request(request)) };
    core.handle(now, Input::Frames { link: GATEWAY, frames: vec![frame] });
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

fn stored(core: &mut Core, now: Now, call: u64) {
    let answer = Ok(StoreAnswer::Commit(vec![store::Outcome::Committed]));
    core.handle(now, Input::Answered { call, answer });
    assert!(commits(core, now).is_empty());
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
    let second = commits(&mut core, at(2_000));
    assert_eq!(second[0].1[0].appends.len(), 2, "what came meanwhile goes together");
    assert!(!second[0].1[0].release);
    stored(&mut core, at(2_300), second[0].0);

    assert!(send(&mut core, at(2_400), 4).is_empty());
    let release = control::Release { shard: 0, epoch: 1, to: "business-1/0000000000000001".into() };
    command(&mut core, at(2_500), command::Command::Release(release));
    let last = commits(&mut core, at(2_500));
    assert!(last[0].1[0].release, "the last batch gives the shard back");
    core.take_outputs();
    core.handle(
        at(2_800),
        Input::Answered { call: last[0].0, answer: Ok(StoreAnswer::Commit(vec![store::Outcome::Committed])) },
    );
    assert_eq!(core.held().count(), 0);
}

#[test]
fn what_is_not_in_a_commit_of_unknown_outcome_is_refused_after_a_moment() {
    let mut core = owner();
    let commit = send(&mut core, at(0), 1)[0].0;
    core.handle(at(1_000), Input::Answered { call: commit, answer: Err(StoreError::unknown("connection closed")) });
    assert!(refused(&mut core, at(1_000)).is_empty(), "whether the first is stored, nobody knows");

    ask(&mut core, at(2_000), 1, true);
    ask(&mut core, at(2_000), 2, false);
    core.handle(at(500_000), Input::Tick);
    assert!(refused(&mut core, at(500_000)).is_empty(), "it may soon be over");
    // Control misses the shard among those held.
    let me = MemberId::new("business-0", 1).expect("a good name").to_string();
    let row = control::ShardRow { shard: 0, epoch: 1, owner: me };
    command(&mut core, at(900_000), command::Command::Acquire(control::Acquire { expected: vec![row] }));
    assert!(refused(&mut core, at(900_000)).is_empty());
    core.handle(at(1_100_000), Input::Tick);
    assert_eq!(refused(&mut core, at(1_100_000)), [2], "what may be in the commit still waits");
    ask(&mut core, at(1_200_000), 3, false);
    assert_eq!(refused(&mut core, at(1_200_000)), [3]);
}
