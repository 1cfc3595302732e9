//! A core that owns the only shard and has a gateway's link; whoever drives it plays the store.

use std::time::Duration;

use im_business::core::calls::{ConversationRows, StoreAnswer, StoreCall, UserRows};
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_business::store::{self, Acquired, ShardBatch, Tail};
use im_proto::control::{self, Command, command};
use im_proto::ids::MemberId;
use im_proto::link::{Body, ClientFrame, Reply, Request, Role, ServerFrame, body, client_frame, server_frame};
use prost::Message;

pub const GATEWAY: LinkId = LinkId(1);
/// The epoch in which the core owns the shard.
pub const EPOCH: u64 = 2;

pub fn at(micros: u64) -> Now {
    Now { mono: Duration::from_micros(micros), wall_ms: 1 }
}

pub fn gateway() -> MemberId {
    MemberId::new("gateway-0", 1).expect("a good name")
}

pub fn command(core: &mut Core, now: Now, command: command::Command) {
    core.handle(now, Input::Command(Command { term: 1, command: Some(command) }));
}

/// What a core wants stored, each under its call, and what it answered.
#[derive(Debug, Default)]
pub struct Done {
    pub commits: Vec<(u64, Vec<ShardBatch>)>,
    pub replies: Vec<Reply>,
}

/// Answers what is asked of a store without messages, but for commits, which are given back. Without `user`, loads of people are left
/// without an answer.
pub fn run(core: &mut Core, now: Now, user: Option<&UserRows>) -> Done {
    let mut done = Done::default();
    loop {
        let outputs = core.take_outputs();
        if outputs.is_empty() {
            return done;
        }
        for output in outputs {
            let (call, request) = match output {
                Output::Call { call, request } => (call, request),
                Output::Frame { frame: ServerFrame { frame: Some(server_frame::Frame::Reply(reply)) }, .. } => {
                    done.replies.push(reply);
                    continue;
                }
                _ => continue,
            };
            let answer = match request {
                StoreCall::Commit(batches) => {
                    done.commits.push((call, batches));
                    continue;
                }
                StoreCall::Shards => StoreAnswer::Shards(Vec::new()),
                StoreCall::Acquire(_) => {
                    let tail = Tail { shard: 0, epoch: EPOCH, head_pos: 0, watermark: 0, hole: false };
                    StoreAnswer::Acquire(vec![Acquired::Won(tail)])
                }
                StoreCall::LoadConversation { .. } => StoreAnswer::LoadConversation(ConversationRows::default()),
                StoreCall::LoadUser { .. } => match user {
                    Some(rows) => StoreAnswer::LoadUser(rows.clone()),
                    None => continue,
                },
                _ => continue,
            };
            core.handle(now, Input::Answered { call, answer: Ok(answer) });
        }
    }
}

pub fn owner() -> Core {
    let limits = Limits { commit_spacing: Duration::from_millis(2), ..Limits::default() };
    let mut core = Core::new(MemberId::new("business-0", 1).expect("a good name"), limits, at(0));
    command(&mut core, at(0), command::Command::Map(control::Map { number: 1, shards: 1, ..Default::default() }));
    let row = control::ShardRow { shard: 0, epoch: EPOCH - 1, owner: String::new() };
    command(&mut core, at(0), command::Command::Acquire(control::Acquire { expected: vec![row] }));
    assert!(run(&mut core, at(0), None).commits.is_empty());
    core.handle(at(0), Input::LinkOpened { link: GATEWAY, peer: gateway(), role: Role::Gateway });
    core
}

/// A request of the gateway; `again`: it was sent before.
pub fn ask(core: &mut Core, now: Now, id: u64, again: bool, body: body::Body) {
    let body = Body { body: Some(body) }.encode_to_vec().into();
    let request = Request { id, shard: 0, epoch: EPOCH, body, again, ..Request::default() };
    let frame = ClientFrame { frame: Some(client_frame::Frame::Request(request)) };
    core.handle(now, Input::Frames { link: GATEWAY, frames: vec![frame] });
}

/// Says that a commit is stored.
pub fn stored(core: &mut Core, now: Now, call: u64) {
    core.handle(now, Input::Answered { call, answer: Ok(StoreAnswer::Commit(vec![store::Outcome::Committed])) });
}
