//! Sessions at their owner: how they begin, go on and end, whatever becomes of their gateway. And what a new owner makes of requests for
//! sessions that were live at the one before.

// The other users of it take what they need, too.
#[allow(dead_code)]
#[path = "support/core.rs"]
mod support;

use im_business::core::calls::UserRows;
use im_business::core::{Core, Input, LinkId};
use im_proto::ids::MemberId;
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Announced, ClientFrame, Close, Kick, Presence, Refusal, Register, Registered, Request, Role, SessionNumber,
    Subscribe, Taken, body, client_frame, push,
};
use im_proto::state::{CursorRow, SessionRow};
use prost::Message;
use support::{Done, EPOCH, GATEWAY, ask, ask_over, at, at_ms, owner, run, stored};

/// Of the owner before.
const NUMBER: SessionNumber = SessionNumber { epoch: EPOCH - 1, counter: 7 };

/// Ann's telephone, as the owner before stored it.
fn ann(ended_ms: i64) -> UserRows {
    let row = SessionRow { connections: 3, subscribed: true, expiry_s: 600, ended_ms, ..SessionRow::default() };
    UserRows { sessions: vec![("phone".to_owned(), row.encode_to_vec().into())], ..UserRows::default() }
}

/// What the only commit writes of the session: the row, or that there is none any more.
fn put(done: &Done) -> Option<Option<SessionRow>> {
    let batch = &done.commits.first()?.1[0];
    let put = batch.puts.iter().rfind(|put| put.key == "s/ann/phone")?;
    Some(put.value.clone().map(|row| SessionRow::decode(row).expect("a row")))
}

fn written(done: &Done) -> Option<SessionRow> {
    put(done).flatten()
}

/// Whether the only commit takes the session's cursors away.
fn forgets_cursors(done: &Done) -> bool {
    let put =
        done.commits.first().and_then(|(_, batches)| batches[0].puts.iter().rfind(|put| put.key == "c/ann/phone"));
    put.is_some_and(|put| put.value.is_none())
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

/// Ann's telephone connects through a link of a gateway, and what it asks for is stored.
fn register(core: &mut Core, ms: u64, link: LinkId, register: Register, rows: &UserRows) -> (Done, Registered) {
    tick(core, ms);
    let register = Register { user: "ann".into(), device: "phone".into(), ..register };
    ask_over(core, at_ms(ms), link, body::Body::Register(register), Request { id: ms, ..Request::default() });
    let done = run(core, at_ms(ms), Some(rows));
    let mut replies = done.replies.clone();
    for (call, _) in &done.commits {
        stored(core, at_ms(ms), *call);
        replies.extend(run(core, at_ms(ms), Some(rows)).replies);
    }
    let Some(Outcome::Registered(registered)) = replies.pop().and_then(|reply| reply.outcome) else {
        panic!("it is not registered: {done:?}");
    };
    (done, registered)
}

/// Time passes; what it brings is stored.
fn tick(core: &mut Core, ms: u64) -> Done {
    core.handle(at_ms(ms), Input::Tick);
    let done = run(core, at_ms(ms), None);
    for (call, _) in &done.commits {
        stored(core, at_ms(ms), *call);
    }
    done
}

fn end(core: &mut Core, ms: u64, close: Close) -> Done {
    let close = Close { user: "ann".into(), device: "phone".into(), ..close };
    ask(core, at_ms(ms), ms, false, body::Body::Close(close));
    let done = run(core, at_ms(ms), None);
    for (call, _) in &done.commits {
        stored(core, at_ms(ms), *call);
    }
    done
}

fn ping(core: &mut Core, ms: u64, link: LinkId) {
    let ping = ClientFrame { frame: Some(client_frame::Frame::Ping(1)) };
    core.handle(at_ms(ms), Input::Frames { link, frames: vec![ping] });
}

/// Another gateway comes.
fn open_another(core: &mut Core, ms: u64) -> LinkId {
    let link = LinkId(100);
    let peer = MemberId::new("gateway-1", 1).expect("a good name");
    core.handle(at_ms(ms), Input::LinkOpened { link, peer, role: Role::Gateway });
    link
}

fn announcement() -> Register {
    Register { number: Some(NUMBER), connection: 4, subscribed: true, ..Register::default() }
}

#[test]
fn a_session_whose_gateway_was_given_up_and_came_back_has_not_ended() {
    let (mut core, rows) = (owner(), ann(0));
    register(&mut core, 0, GATEWAY, announcement(), &rows);
    core.handle(at_ms(1_000), Input::LinkClosed { link: GATEWAY });
    assert_eq!(written(&tick(&mut core, 4_000)).map(|row| row.ended_ms), Some(4_000), "it is given up");

    let link = LinkId(GATEWAY.0 + 1);
    support::open(&mut core, at_ms(5_000), link);
    let (back, _) = register(&mut core, 5_000, link, announcement(), &rows);
    assert_eq!(written(&back).map(|row| row.ended_ms), Some(0), "{back:?}");

    // Longer than the session would live without a connection, then the gateway dies and the client is back at once.
    ping(&mut core, 705_000, link);
    core.handle(at_ms(705_000), Input::LinkClosed { link });
    let other = open_another(&mut core, 705_000);
    let (_, again) = register(&mut core, 705_500, other, Register { expiry_s: 600, ..Register::default() }, &rows);
    assert!(again.session_present && again.subscribed, "{again:?}");
}

#[test]
fn a_session_whose_gateway_went_before_it_was_stored_is_not_there() {
    let mut core = owner();
    let phone = Register { user: "ann".into(), device: "phone".into(), expiry_s: 600, ..Register::default() };
    ask(&mut core, at_ms(0), 1, false, body::Body::Register(phone));
    let commits = run(&mut core, at_ms(0), Some(&UserRows::default())).commits;
    core.handle(at_ms(100), Input::LinkClosed { link: GATEWAY });
    tick(&mut core, 3_200);
    stored(&mut core, at_ms(3_200), commits[0].0);
    let done = run(&mut core, at_ms(3_200), None);
    assert_eq!(written(&done).map(|row| row.ended_ms), Some(3_200), "its time runs: {done:?}");
    let link = open_another(&mut core, 3_300);
    let presence = body::Body::Presence(Presence { user: "ann".into() });
    ask_over(&mut core, at_ms(3_300), link, presence, Request { id: 2, ..Request::default() });
    match run(&mut core, at_ms(3_300), None).replies.pop().and_then(|reply| reply.outcome) {
        Some(Outcome::Presence(presence)) => assert!(presence.sessions.is_empty(), "{presence:?}"),
        other => panic!("presence is answered: {other:?}"),
    }
}

#[test]
fn a_registration_that_is_repeated_is_answered_as_before() {
    let (mut core, rows) = (owner(), ann(0));
    for (ms, link, clean_start) in [(0, GATEWAY, true), (10, GATEWAY, false)] {
        let connect = Register { clean_start, expiry_s: 600, connection: ms, ..Register::default() };
        let (_, first) = register(&mut core, ms, link, connect.clone(), &rows);
        assert_eq!(first.session_present, !clean_start);
        let (done, repeated) = register(&mut core, ms + 1, link, connect, &rows);
        assert!(done.commits.is_empty());
        assert_eq!(repeated, first);
        let closed = end(&mut core, ms + 2, Close { number: first.number, ..Close::default() });
        assert_eq!(written(&closed).map(|row| row.ended_ms), Some(ms as i64 + 2));
    }
}

/// Ann's telephone with a cursor.
fn ann_with_a_cursor(ended_ms: i64) -> UserRows {
    let cursors = CursorRow { conversations: vec!["u/ann/bob".into()], seqs: vec![7] };
    UserRows { cursors: vec![("phone".to_owned(), cursors.encode_to_vec().into())], ..ann(ended_ms) }
}

#[test]
fn a_session_is_there_until_its_time_is_over() {
    let rows = ann_with_a_cursor(1_000);
    let connect = Register { expiry_s: 600, ..Register::default() };
    let (done, in_time) = register(&mut owner(), 601_000, GATEWAY, connect.clone(), &rows);
    assert!(in_time.session_present && in_time.subscribed && in_time.cursors.len() == 1, "{in_time:?}");
    assert!(written(&done).is_some_and(|row| row.subscribed && row.ended_ms == 0) && !forgets_cursors(&done));

    let (done, late) = register(&mut owner(), 601_001, GATEWAY, connect, &rows);
    assert!(!late.session_present && !late.subscribed && late.cursors.is_empty(), "{late:?}");
    assert!(written(&done).is_some_and(|row| !row.subscribed) && forgets_cursors(&done), "{done:?}");
}

#[test]
fn a_session_that_its_own_connection_began_was_not_there_before() {
    let row = SessionRow { expiry_s: 600, connections: 1, ..SessionRow::default() };
    let empty = UserRows { sessions: vec![("phone".to_owned(), row.encode_to_vec().into())], ..UserRows::default() };
    for (rows, again, is_present) in
        [(&empty, true, false), (&empty, false, true), (&ann_with_a_cursor(1_000), true, true)]
    {
        let mut core = owner();
        tick(&mut core, 2_000);
        let connect = Register { user: "ann".into(), device: "phone".into(), expiry_s: 600, ..Register::default() };
        ask(&mut core, at_ms(2_000), 1, again, body::Body::Register(connect));
        let done = run(&mut core, at_ms(2_000), Some(rows));
        stored(&mut core, at_ms(2_000), done.commits[0].0);
        let answered = run(&mut core, at_ms(2_000), Some(rows)).replies.pop().and_then(|reply| reply.outcome);
        let Some(Outcome::Registered(registered)) = &answered else { panic!("{answered:?}") };
        assert_eq!(registered.session_present, is_present, "asked again: {again}, {rows:?}");
    }
}

#[test]
fn a_clean_start_begins_with_nothing() {
    let rows = ann_with_a_cursor(1_000);
    let connect = Register { clean_start: true, expiry_s: 600, ..Register::default() };
    let (done, clean) = register(&mut owner(), 2_000, GATEWAY, connect, &rows);
    assert!(!clean.session_present && !clean.subscribed && clean.cursors.is_empty(), "{clean:?}");
    assert!(written(&done).is_some_and(|row| !row.subscribed) && forgets_cursors(&done), "{done:?}");

    let (done, gone) =
        register(&mut owner(), 2_000, GATEWAY, Register { clean_start: true, ..Register::default() }, &rows);
    assert!(!gone.session_present && put(&done) == Some(None), "of the old one nothing is left: {done:?}");
}

#[test]
fn a_session_without_expiry_leaves_nothing() {
    let mut core = owner();
    let (begun, new) = register(&mut core, 0, GATEWAY, Register::default(), &UserRows::default());
    let ended = end(&mut core, 10, Close { number: new.number, ..Close::default() });
    assert!(begun.commits.is_empty() && ended.commits.is_empty(), "{begun:?} {ended:?}");

    let (mut core, rows) = (owner(), ann_with_a_cursor(1_000));
    let (_, known) = register(&mut core, 2_000, GATEWAY, Register::default(), &rows);
    assert!(known.session_present, "it goes on with what there is");
    let ended = end(&mut core, 2_010, Close { number: known.number, ..Close::default() });
    assert!(put(&ended) == Some(None) && forgets_cursors(&ended), "{ended:?}");
}

#[test]
fn a_disconnect_may_say_how_long_the_session_lives_on() {
    let connect = Register { expiry_s: 600, ..Register::default() };
    for (expiry_s, ms, is_kept) in [(5, 5_010, true), (5, 5_011, false), (1_000, 900_000, true)] {
        let (mut core, rows) = (owner(), UserRows::default());
        let (_, new) = register(&mut core, 0, GATEWAY, connect.clone(), &rows);
        let close = Close { number: new.number, expiry_s: Some(expiry_s), ..Close::default() };
        assert_eq!(written(&end(&mut core, 10, close)).map(|row| row.expiry_s), Some(expiry_s));
        tick(&mut core, ms);
        let again = Register { connection: 1, ..connect.clone() };
        assert_eq!(register(&mut core, ms, GATEWAY, again, &rows).1.session_present, is_kept, "{expiry_s} s, {ms} ms");
    }
}

#[test]
fn a_row_whose_time_has_long_been_over_goes() {
    // Ended at 1 s, for 600 s; and an hour for a gateway that was stopped.
    const OVER_MS: u64 = 1_000 + 600_000 + 3_600_000;
    let (mut core, rows) = (owner(), ann_with_a_cursor(1_000));
    let look = |core: &mut Core, ms| {
        tick(core, ms);
        ask(core, at_ms(ms), ms, false, body::Body::Presence(Presence { user: "ann".into() }));
        run(core, at_ms(ms), Some(&rows))
    };
    let done = look(&mut core, OVER_MS);
    assert!(done.commits.is_empty(), "{done:?}");
    let swept = tick(&mut core, OVER_MS + 20_000);
    assert!(put(&swept) == Some(None) && forgets_cursors(&swept), "{swept:?}");
    let read = look(&mut owner(), OVER_MS + 1);
    assert!(put(&read) == Some(None) && forgets_cursors(&read), "{read:?}");
}

#[test]
fn a_kick_is_refused_while_nobody_knows_who_is_there() {
    let mut core = owner();
    let mut kick = |ms: u64, device: &str| {
        tick(&mut core, ms);
        if ms == 2_000 {
            register(&mut core, ms, GATEWAY, announcement(), &ann(0));
        }
        let kick = Kick { user: "ann".into(), device: device.into() };
        ask(&mut core, at_ms(ms), ms, false, body::Body::Kick(kick));
        let mut done = run(&mut core, at_ms(ms), Some(&ann(0)));
        let is_kicked = done.pushes.iter().any(|push| matches!(push.push, Some(push::Push::Kick(_))));
        match done.replies.pop().and_then(|reply| reply.outcome) {
            Some(Outcome::Refused(refused)) if refused.code() == Refusal::Busy => (false, is_kicked),
            Some(Outcome::Done(_)) => (true, is_kicked),
            other => panic!("a kick is done or not: {other:?}"),
        }
    };
    assert_eq!(kick(1_000, "phone"), (false, false), "it may still be announced");
    assert_eq!(kick(2_000, "phone"), (true, true));
    assert_eq!(kick(2_001, ""), (false, true), "of others nobody knows");
    assert_eq!(kick(3_001, "laptop"), (true, false), "there is no such session");
}

#[test]
fn sessions_end_three_seconds_after_their_gateway() {
    // (when the link is closed, when they are still there, when no more)
    for (closed_ms, before_ms, after_ms) in [(1_100, 3_090, 3_110), (2_500, 3_990, 4_010), (4_000, 4_000, 4_010)] {
        let mut core = owner();
        register(&mut core, 0, GATEWAY, announcement(), &ann(0));
        ping(&mut core, 1_000, GATEWAY);
        core.handle(at_ms(closed_ms), Input::LinkClosed { link: GATEWAY });
        if before_ms > closed_ms {
            assert!(put(&tick(&mut core, before_ms)).is_none(), "{closed_ms}");
        }
        assert!(written(&tick(&mut core, after_ms)).is_some_and(|row| row.ended_ms > 0), "{closed_ms}");
    }
}
