//! A full queue refuses, and nothing overtakes what was refused.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use im_business::core::calls::{ConversationRows, StoreAnswer, StoreCall};
use im_business::core::{Core, Input, Limits, LinkId, Now, Output};
use im_proto::link::reply::Outcome;
use im_proto::link::{Refusal, Reply, Request, Send, ServerFrame, body, server_frame};
use support::{Done, GATEWAY, answer, ask_over, at, at_ms, owner_of, run, stored};

/// A message of ann's connection to her conversation with bob. `oldest`: what came before it is answered, and she knows.
fn say(core: &mut Core, now: Now, id: u64, oldest: u64) {
    say_over(core, now, GATEWAY, Request { id, oldest, ..Request::default() });
}

fn say_over(core: &mut Core, now: Now, link: LinkId, request: Request) {
    let message = Send {
        conversation: "u/ann/bob".into(),
        sender: "ann".into(),
        device: "phone".into(),
        client_id: format!("{}", request.id),
        ..Send::default()
    };
    ask_over(core, now, link, body::Body::Send(message), Request { order: 7, ..request });
}

/// The ids of messages in the commits.
fn ids(done: &Done) -> Vec<String> {
    let appends = done.commits.iter().flat_map(|(_, batches)| batches).flat_map(|batch| &batch.appends);
    appends.map(|entry| entry.client_id.to_string()).collect()
}

fn busy(replies: &[Reply]) -> Vec<u64> {
    let is_busy =
        |reply: &&Reply| matches!(&reply.outcome, Some(Outcome::Refused(refused)) if refused.code() == Refusal::Busy);
    replies.iter().filter(is_busy).map(|reply| reply.id).collect()
}

/// Message 1 is on its way to the store, 2 was refused: 3 must not overtake it, until the sender knows.
fn expect_order(core: &mut Core, now: u64, first: &Done) {
    assert_eq!(ids(first), ["1"], "{first:?}");
    say(core, at_ms(now), 3, 1);
    stored(core, at_ms(now + 10), first.commits[0].0);
    let behind = run(core, at_ms(now + 10), None);
    assert!(behind.commits.is_empty(), "3 overtakes 2: {behind:?}");
    assert_eq!(busy(&behind.replies), [3]);
    say(core, at_ms(now + 20), 4, 4);
    assert_eq!(ids(&run(core, at_ms(now + 20), None)), ["4"], "the sender knows of both refusals");
}

#[test]
fn a_full_queue_refuses_what_was_not_asked_before() {
    let mut core = owner_of(1, Limits { shard_ops_max: 1, ..Limits::default() });
    say(&mut core, at(0), 1, 1);
    let first = run(&mut core, at(0), None);
    say(&mut core, at(0), 2, 1);
    say(&mut core, at(0), 3, 1);
    say_over(&mut core, at(0), GATEWAY, Request { id: 4, oldest: 1, again: true, ..Request::default() });
    assert_eq!(busy(&run(&mut core, at(0), None).replies), [3]);
    stored(&mut core, at_ms(10), first.commits[0].0);
    assert_eq!(ids(&run(&mut core, at_ms(10), None)), ["2", "4"], "what waited, and what may have been stored before");
}

#[test]
fn nothing_overtakes_what_an_unconfirmed_owner_refused() {
    let mut core = owner_of(1, Limits { shard_ops_max: 1, ..Limits::default() });
    say(&mut core, at_ms(3_000), 1, 1);
    say(&mut core, at_ms(3_000), 2, 1);
    let early = run(&mut core, at_ms(3_000), None);
    assert!(early.commits.is_empty() && busy(&early.replies) == [2], "{early:?}");
    core.handle(at_ms(3_050), Input::Tick);
    let first = run(&mut core, at_ms(3_050), None);
    expect_order(&mut core, 3_100, &first);
}

#[test]
fn nothing_overtakes_what_was_refused_while_the_store_reads() {
    let mut core = owner_of(1, Limits { parked_max: 1, ..Limits::default() });
    say(&mut core, at(0), 1, 1);
    say(&mut core, at(0), 2, 1);
    let (mut loads, mut refused) = (Vec::new(), Vec::new());
    for output in core.take_outputs() {
        match output {
            Output::Call { call, request: StoreCall::LoadConversation { .. } } => loads.push(call),
            Output::Frame { frame: ServerFrame { frame: Some(server_frame::Frame::Reply(reply)) }, .. } => {
                refused.push(reply);
            }
            _ => {}
        }
    }
    assert_eq!(busy(&refused), [2]);
    answer(&mut core, at(0), loads[0], StoreAnswer::LoadConversation(ConversationRows::default()));
    let first = run(&mut core, at(0), None);
    expect_order(&mut core, 100, &first);
}

#[test]
fn what_came_over_a_link_that_was_replaced_is_not_stored() {
    let mut core = owner_of(1, Limits::default());
    say(&mut core, at(0), 1, 1);
    let first = run(&mut core, at(0), None);
    say(&mut core, at(0), 2, 1);
    let next = LinkId(GATEWAY.0 + 1);
    support::open(&mut core, at_ms(10), next);
    core.handle(at_ms(10), Input::LinkClosed { link: GATEWAY });
    stored(&mut core, at_ms(20), first.commits[0].0);
    assert!(run(&mut core, at_ms(20), None).commits.is_empty(), "it is asked again over the new link");
    say_over(&mut core, at_ms(30), next, Request { id: 2, oldest: 2, again: true, ..Request::default() });
    assert_eq!(ids(&run(&mut core, at_ms(30), None)), ["2"]);
}
