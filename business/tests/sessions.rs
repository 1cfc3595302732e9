//! What a new owner makes of requests for sessions that were live at the one before.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use im_business::core::Core;
use im_business::core::calls::UserRows;
use im_proto::link::reply::Outcome;
use im_proto::link::{Announced, Close, Register, SessionNumber, Subscribe, Taken, body};
use im_proto::state::SessionRow;
use prost::Message;
use support::{Done, EPOCH, ask, at, owner, run, stored};

/// Of the owner before.
const NUMBER: SessionNumber = SessionNumber { epoch: EPOCH - 1, counter: 7 };

/// Ann's telephone, as the owner before stored it.
fn ann(ended_ms: i64) -> UserRows {
    let row = SessionRow { connections: 3, subscribed: true, expiry_s: 600, ended_ms, ..SessionRow::default() };
    UserRows { sessions: vec![("phone".to_owned(), row.encode_to_vec().into())], ..UserRows::default() }
}

/// The row that the only commit writes of the session.
fn written(done: &Done) -> Option<SessionRow> {
    let batch = &done.commits.first()?.1[0];
    let put = batch.puts.iter().find(|put| put.key.contains("ann") && put.key.contains("phone"))?;
    SessionRow::decode(put.value.clone()?).ok()
}

fn close(core: &mut Core, rows: &UserRows) -> Done {
    let taken = vec![Taken { packet_id: 5, hash: 9, key: vec![1; 16].into() }];
    let (user, device) = ("ann".to_owned(), "phone".to_owned());
    let close = Close { user, device, number: Some(NUMBER), taken, ..Close::default() };
    ask(core, at(10), 1, true, body::Body::Close(close));
    run(core, at(10), Some(rows))
}

#[test]
fn a_close_that_was_under_way_ends_the_session_at_the_new_owner() {
    let (mut core, rows) = (owner(), ann(0));
    let done = close(&mut core, &rows);
    let row = written(&done).expect("the session's end is written");
    assert!(row.ended_ms > 0, "{row:?}");
    assert_eq!((row.connections, row.taken.len()), (3, 1), "what was taken and not answered is remembered");
    stored(&mut core, at(20), done.commits[0].0);
    let answered = run(&mut core, at(20), Some(&rows)).replies;
    assert!(matches!(answered[0].outcome, Some(Outcome::Done(_))), "{answered:?}");
}

#[test]
fn a_close_that_was_stored_before_changes_nothing() {
    let done = close(&mut owner(), &ann(1_000));
    assert!(done.commits.is_empty() && done.replies.len() == 1, "{done:?}");
}

#[test]
fn a_subscribe_before_the_announcement_is_not_called_stale() {
    let (mut core, rows) = (owner(), ann(0));
    let (user, device) = ("ann".to_owned(), "phone".to_owned());
    let subscribe = Subscribe {
        user: user.clone(),
        device: device.clone(),
        number: Some(NUMBER),
        subscribed: true,
        ..Subscribe::default()
    };
    ask(&mut core, at(10), 1, true, body::Body::Subscribe(subscribe.clone()));
    let early = run(&mut core, at(10), Some(&rows));
    assert!(early.replies.is_empty() && early.commits.is_empty(), "{early:?}");

    let announcement = Register { user, device, number: Some(NUMBER), connection: 4, ..Register::default() };
    ask(&mut core, at(20), 2, false, body::Body::Register(announcement));
    ask(&mut core, at(20), 3, false, body::Body::Announced(Announced {}));
    ask(&mut core, at(20), 4, false, body::Body::Subscribe(subscribe.clone()));
    let known = run(&mut core, at(20), Some(&rows));
    assert!(matches!(known.replies[0].outcome, Some(Outcome::Registered(_))), "{known:?}");
    assert!(written(&known).expect("the subscription is written").subscribed);

    let other = SessionNumber { counter: NUMBER.counter - 1, ..NUMBER };
    ask(&mut core, at(30), 5, false, body::Body::Subscribe(Subscribe { number: Some(other), ..subscribe }));
    let stale = run(&mut core, at(30), Some(&rows)).replies;
    assert!(matches!(stale[0].outcome, Some(Outcome::Refused(_))), "{stale:?}");
}
