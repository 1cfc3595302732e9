//! A core that owns every shard and has a gateway's link; whoever drives it plays the store.

use std::time::Duration;

use im_business::core::calls::{ConversationRows, StoreAnswer, StoreCall, UserRows};
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_business::store::{self, Acquired, Claim, ShardBatch, Tail};
use im_proto::control::{self, Command, command};
use im_proto::ids::MemberId;
use im_proto::link::{Body, ClientFrame, Push, Reply, Request, Role, ServerFrame, body, client_frame, server_frame};
use prost::Message;

pub const GATEWAY: LinkId = LinkId(1);
/// The epoch in which the core owns the shard.
pub const EPOCH: u64 = 2;

pub fn at(micros: u64) -> Now {
    Now { mono: Duration::from_micros(micros), wall_ms: 1 }
}

/// At the same time by both clocks.
pub fn at_ms(ms: u64) -> Now {
    Now { mono: Duration::from_millis(ms), wall_ms: ms as i64 }
}

pub fn gateway() -> MemberId {
    MemberId::new("gateway-0", 1).expect("a good name")
}

pub fn command(core: &mut Core, now: Now, command: command::Command) {
    core.handle(now, Input::Command(Command { term: 1, command: Some(command) }));
}

/// What a core wants stored and what else it asks of the store, each under its call, what it answered, and what it pushed.
#[derive(Debug, Default)]
pub struct Done {
    pub commits: Vec<(u64, Vec<ShardBatch>)>,
    pub calls: Vec<(u64, StoreCall)>,
    pub replies: Vec<Reply>,
    pub pushes: Vec<Push>,
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
                Output::Frame { frame: ServerFrame { frame: Some(server_frame::Frame::Push(push)) }, .. } => {
                    done.pushes.push(push);
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
                StoreCall::Acquire(claims) => won(&claims),
                StoreCall::Check(_) => StoreAnswer::Check(Vec::new()),
                StoreCall::LoadConversation { .. } => StoreAnswer::LoadConversation(ConversationRows::default()),
                StoreCall::LoadUser { .. } => match user {
                    Some(rows) => StoreAnswer::LoadUser(rows.clone()),
                    None => continue,
                },
                _ => {
                    done.calls.push((call, request));
                    continue;
                }
            };
            core.handle(now, Input::Answered { call, answer: Ok(answer) });
        }
    }
}

/// Shards without messages are ours.
pub fn won(claims: &[Claim]) -> StoreAnswer {
    let tail = |claim: &Claim| Tail { shard: claim.shard, epoch: EPOCH, head_pos: 0, watermark: 0, hole: false };
    StoreAnswer::Acquire(claims.iter().map(|claim| Acquired::Won(tail(claim))).collect())
}

pub fn owner() -> Core {
    owner_of(1, Limits::default())
}

/// It commits each 2 ms.
pub fn owner_of(shards: u32, limits: Limits) -> Core {
    let mut core = wanting(shards, limits);
    let done = run(&mut core, at(0), None);
    assert!(done.commits.is_empty() && core.held().count() == shards as usize);
    core
}

/// It is about to ask for the shards.
pub fn wanting(shards: u32, limits: Limits) -> Core {
    let limits = Limits { commit_spacing: Duration::from_millis(2), ..limits };
    let mut core = Core::new(MemberId::new("business-0", 1).expect("a good name"), limits, at(0));
    command(&mut core, at(0), command::Command::Map(control::Map { number: 1, shards, ..Default::default() }));
    let row = |shard| control::ShardRow { shard, epoch: EPOCH - 1, owner: String::new() };
    command(&mut core, at(0), command::Command::Acquire(control::Acquire { expected: (0..shards).map(row).collect() }));
    open(&mut core, at(0), GATEWAY);
    core
}

/// The gateway opens a link.
pub fn open(core: &mut Core, now: Now, link: LinkId) {
    core.handle(now, Input::LinkOpened { link, peer: gateway(), role: Role::Gateway });
}

/// A request of the gateway; `again`: it was sent before.
pub fn ask(core: &mut Core, now: Now, id: u64, again: bool, body: body::Body) {
    ask_over(core, now, GATEWAY, body, Request { id, again, ..Request::default() });
}

/// A request over a link, to the owner of this epoch.
pub fn ask_over(core: &mut Core, now: Now, link: LinkId, body: body::Body, request: Request) {
    let body = Body { body: Some(body) }.encode_to_vec().into();
    let request = Request { epoch: EPOCH, body, ..request };
    let frame = ClientFrame { frame: Some(client_frame::Frame::Request(request)) };
    core.handle(now, Input::Frames { link, frames: vec![frame] });
}

/// Says that a commit is stored.
pub fn stored(core: &mut Core, now: Now, call: u64) {
    answer(core, now, call, StoreAnswer::Commit(vec![store::Outcome::Committed]));
}

pub fn answer(core: &mut Core, now: Now, call: u64, answer: StoreAnswer) {
    core.handle(now, Input::Answered { call, answer: Ok(answer) });
}
