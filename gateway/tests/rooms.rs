//! Live rooms through a gateway with real sockets: joining, slow viewers, counting, moderation.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use common::{Client, FakeOwner, PLAIN, Received, eventually, gateway};
use im_gateway::mqtt::Reason;
use im_proto::link::{Count, RoomKick, RoomMessage, RoomStats, push};
use mqtt_protocol_core::mqtt::packet::{Qos, SubEntry, SubOpts, v3_1_1, v5_0};
use tokio::net::TcpStream;
use tokio::time::timeout;

type Tcp = Client<TcpStream>;

async fn enter(address: std::net::SocketAddr, user: &str, filter: &str) -> Tcp {
    let mut client = Client::connect(TcpStream::connect(address).await.unwrap(), user, "tv").await;
    assert_eq!(client.subscribe(filter).await, 0);
    client
}

fn message(number: u64, size: usize) -> push::Push {
    in_room("stage", number, size)
}

fn in_room(room: &str, number: u64, size: usize) -> push::Push {
    let payload = vec![b'x'; size].into();
    push::Push::RoomMessage(RoomMessage {
        room: room.into(),
        sender: "star".into(),
        device: "mic".into(),
        payload,
        number,
    })
}

fn number(received: &Received) -> u64 {
    let (_, after) = received.properties.split_once("\"n\"").or_else(|| received.properties.split_once("n")).unwrap();
    after
        .chars()
        .skip_while(|c| !c.is_ascii_digit())
        .take_while(char::is_ascii_digit)
        .collect::<String>()
        .parse()
        .unwrap()
}

async fn like(client: &mut Tcp, packet_id: u16, topic: &str, payload: &[u8]) {
    let publish = v5_0::Publish::builder().topic_name(topic).unwrap().payload(payload);
    let publish = match packet_id {
        0 => publish.qos(Qos::AtMostOnce).build(),
        id => publish.qos(Qos::AtLeastOnce).packet_id(id).build(),
    };
    client.send(&publish.unwrap().to_continuous_buffer()).await;
}

fn total(owner: &FakeOwner, name: &str) -> u64 {
    let counts = owner.counts();
    let rooms = counts.iter().flat_map(|counts| &counts.rooms);
    rooms.flat_map(|room| &room.counted).filter(|count| count.name == name).map(|count| count.count).sum()
}

#[tokio::test]
async fn all_viewers_get_all_messages_in_order() {
    let (running, owner) = gateway(PLAIN).await;
    let mut viewers = Vec::new();
    for index in 0..150 {
        viewers.push(enter(running.mqtt.unwrap(), &format!("viewer{index}"), "r/stage").await);
    }
    for next in 1..=300 {
        owner.push(message(next, 100));
    }
    for viewer in &mut viewers {
        for next in 1..=300 {
            let received = viewer.message().await;
            assert_eq!((received.topic.as_str(), number(&received)), ("r/stage", next));
        }
    }
    assert_eq!(running.gateway.hub.shared.metrics.room_dropped.get(), 0);
    eventually("the owner hears that all went out", || owner.room_took() == 300 * 164).await;
}

/// Counted in deliveries and not in time, so that it means the same on a busy machine: all tasks share one thread here, and if a room let
/// nobody pass, this one would see nothing of a round before its end.
#[tokio::test]
async fn a_hot_room_lets_others_pass_between_its_viewers() {
    const HOT_VIEWERS: u64 = 1_000;
    let (running, owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let mut hot = Vec::new();
    for index in 0..HOT_VIEWERS {
        hot.push(enter(address, &format!("hot{index}"), "r/stage").await);
    }
    let mut cold = enter(address, "cold", "r/corner").await;
    let delivered = || running.gateway.hub.shared.metrics.delivered.get();
    let mut seen_first = Vec::new();
    for next in 1..=21 {
        let before = delivered();
        owner.push(message(next, 100));
        let passed = async {
            while delivered() == before {
                tokio::task::yield_now().await;
            }
            delivered() - before
        };
        seen_first.push(timeout(Duration::from_secs(10), passed).await.unwrap());
        owner.push(in_room("corner", next, 100));
        assert_eq!(number(&cold.message().await), next);
        eventually("the round ends", || delivered() == before + HOT_VIEWERS + 1).await;
    }
    seen_first.sort_unstable();
    let median = seen_first[seen_first.len() / 2];
    assert!(median <= HOT_VIEWERS / 4, "others had their turn only after {median} of {HOT_VIEWERS} viewers");
    drop(hot);
}

#[tokio::test]
async fn who_does_not_read_loses_room_messages_and_no_chat_and_holds_up_nobody() {
    let config = PLAIN.replace("\"auth\"", r#""limits":{"sendBufferBytes":65536},"auth""#);
    let (running, owner) = gateway(&config).await;
    let address = running.mqtt.unwrap();
    let mut slow = Client::connect(TcpStream::connect(address).await.unwrap(), "slow", "tv").await;
    assert_eq!(slow.subscribe("inbox/#").await, 1);
    assert_eq!(slow.subscribe("r/stage").await, 0);
    let mut quick = enter(address, "quick", "r/stage").await;
    let metrics = &running.gateway.hub.shared.metrics;
    let mut last = 0;
    // Until the kernel's buffers and the session's are full.
    while metrics.room_dropped.get() < 50 {
        last += 1;
        assert!(last < 20_000, "what waits for a viewer is bounded");
        owner.push(message(last, 16_000));
        assert_eq!(number(&quick.message().await), last, "the other one gets each");
    }
    let mut friend = Client::connect(TcpStream::connect(address).await.unwrap(), "friend", "phone").await;
    for id in 1..=20 {
        assert_eq!(friend.publish(id, "u/slow", id.to_string().as_bytes()).await.0, 0);
    }
    let (mut chat, mut seen, mut jumps) = (0, 0, 0);
    while chat < 20 {
        let received = slow.message().await;
        if received.topic == "r/stage" {
            let next = number(&received);
            assert!(next > seen, "what comes, comes in order");
            jumps += u64::from(next > seen + 1);
            seen = next;
        } else {
            chat += 1;
            assert_eq!(received.payload, chat.to_string().into_bytes());
        }
    }
    owner.push(message(last + 1, 10));
    let after = loop {
        let received = timeout(Duration::from_secs(10), slow.message()).await.unwrap();
        let next = number(&received);
        jumps += u64::from(next > seen + 1);
        seen = next;
        if next == last + 1 {
            break next;
        }
    };
    assert!(after > 0 && jumps > 0, "a loss shows as a jump of n");
}

#[tokio::test]
async fn likes_are_merged_and_acknowledged_when_they_are_stored() {
    // As fast as the fan likes.
    let settings = r#""rooms":{"flushIntervalMs":100},"limits":{"messageRate":1000},"auth""#;
    let (running, owner) = gateway(&PLAIN.replace("\"auth\"", settings)).await;
    let mut fan = enter(running.mqtt.unwrap(), "fan", "r/stage").await;
    owner.refuse_counts(2);
    for _ in 0..500 {
        like(&mut fan, 0, "r/stage/like", b"").await;
    }
    like(&mut fan, 1, "r/stage/like", b"7").await;
    like(&mut fan, 2, "r/stage/gift/rose", b"").await;
    for id in [1, 2] {
        let (first, body) = fan.receive().await.unwrap();
        assert_eq!((first, &body[..2]), (0x40, &[0, id][..]));
    }
    assert_eq!((total(&owner, "like"), total(&owner, "gift/rose")), (507, 1));
    let (counts, refused) = (owner.counts(), owner.refused_counts());
    assert!(counts.len() <= 5, "five hundred likes are a few requests: {}", counts.len());
    assert_eq!(refused.len(), 2, "refused for now, twice");
    assert!(refused.iter().all(|counts| counts.number == refused[0].number && counts.rooms == refused[0].rooms));
    assert_eq!(refused[0].number, counts[0].number, "the same number, so that it counts once");
    assert_eq!(counts[0].rooms[0].viewers, 1);
    assert_eq!(fan.publish(3, "r/stage/like", b"1001").await.0, Reason::PayloadFormatInvalid.code());
}

#[tokio::test]
async fn statistics_reach_those_who_ask_for_them() {
    let (running, owner) = gateway(PLAIN).await;
    let mut watcher = enter(running.mqtt.unwrap(), "watcher", "r/stage/stats").await;
    let totals = vec![Count { name: "like".into(), count: 9 }, Count { name: "gift/rose".into(), count: 2 }];
    owner.push(push::Push::RoomStats(RoomStats { room: "stage".into(), viewers: 3, totals }));
    let received = watcher.message().await;
    assert_eq!(received.topic, "r/stage/stats");
    let json: serde_json::Value = serde_json::from_slice(&received.payload).unwrap();
    assert_eq!(json, serde_json::json!({ "viewers": 3, "likes": 9, "gifts": { "rose": 2 } }));
    // Who comes later hears the last ones at once.
    let mut late = enter(running.mqtt.unwrap(), "late", "r/stage/stats").await;
    assert_eq!(late.message().await.payload, received.payload);
}

#[tokio::test]
async fn late_comers_get_the_history_once() {
    let (running, owner) = gateway(PLAIN).await;
    owner.keep_history(2);
    let mut first = enter(running.mqtt.unwrap(), "first", "r/stage").await;
    for next in 1..=3 {
        owner.push(message(next, 10));
        assert_eq!(number(&first.message().await), next);
    }
    let mut late = enter(running.mqtt.unwrap(), "late", "r/stage").await;
    owner.push(message(4, 10));
    for next in 2..=4 {
        assert_eq!(number(&late.message().await), next);
    }
}

#[tokio::test]
async fn who_is_kicked_leaves_and_stays_out() {
    let (running, owner) = gateway(PLAIN).await;
    let mut eve = enter(running.mqtt.unwrap(), "eve", "r/stage").await;
    let mut bob = enter(running.mqtt.unwrap(), "bob", "r/stage").await;
    owner.push(push::Push::RoomKick(RoomKick { room: "stage".into(), user: "eve".into(), until_ms: i64::MAX }));
    assert_eq!(eve.message().await.payload, br#"{"kicked":true}"#);
    owner.push(message(1, 10));
    assert_eq!(number(&bob.message().await), 1);
    assert_eq!(eve.subscribe("r/stage").await, Reason::NotAuthorized.code(), "and no message came before");
    owner.push(push::Push::RoomKick(RoomKick { room: "stage".into(), user: "eve".into(), until_ms: 0 }));
    owner.push(message(2, 10));
    assert_eq!(number(&bob.message().await), 2);
    assert_eq!(eve.subscribe("r/stage").await, 0);
}

/// A viewer of the older version: what he is sent, byte by byte, is topic and payload alone.
async fn enter_v311(address: std::net::SocketAddr, user: &str, filter: &str) -> Tcp {
    let mut client = Client::new(TcpStream::connect(address).await.unwrap());
    let connect = v3_1_1::Connect::builder().client_id("tv").unwrap().user_name(user).unwrap();
    let connect = connect.password(b"x".to_vec()).unwrap().clean_session(true).build().unwrap();
    client.send(&connect.to_continuous_buffer()).await;
    assert_eq!(client.receive().await.unwrap(), (0x20, vec![0, 0]));
    let entry = SubEntry::new(filter, SubOpts::new()).unwrap();
    let subscribe = v3_1_1::Subscribe::builder().packet_id(9u16).entries(vec![entry]).build().unwrap();
    client.send(&subscribe.to_continuous_buffer()).await;
    assert_eq!(client.receive().await.unwrap().0, 0x90);
    client
}

#[tokio::test]
async fn messages_are_encoded_for_those_who_came_since_too() {
    let (running, owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    owner.keep_history(2);
    let mut new = enter(address, "new", "r/stage").await;
    owner.push(message(1, 10));
    assert_eq!(number(&new.message().await), 1);
    let mut old = enter_v311(address, "old", "r/stage").await;
    for size in [10, 11, 12] {
        if size > 10 {
            owner.push(message(size as u64 - 9, size));
            assert_eq!(number(&new.message().await), size as u64 - 9);
        }
        let (first, body) = old.receive().await.unwrap();
        let (publish, _) = v3_1_1::Publish::parse(first & 0x0F, body.into()).unwrap();
        assert_eq!((publish.topic_name(), publish.payload().len()), ("r/stage", size), "history, then what comes");
    }
    let delivered = &running.gateway.hub.shared.metrics.delivered;
    eventually("each delivery is counted", || delivered.get() == 5).await;
}

#[tokio::test]
async fn a_join_that_is_refused_is_said_again() {
    let config = PLAIN.replace("\"auth\"", r#""rooms":{"flushIntervalMs":50},"auth""#);
    let (running, owner) = gateway(&config).await;
    let mut fan = enter(running.mqtt.unwrap(), "fan", "r/stage").await;
    owner.push(message(41, 10));
    assert_eq!(number(&fan.message().await), 41);
    owner.refuse_joins(2);
    owner.acquire_again(2);
    eventually("the new owner knows of the room", || owner.joins().len() >= 4).await;
    let joins = owner.joins();
    assert!(joins[1..].iter().all(|join| (join.viewers, join.unwatched, join.last) == (1, true, 41)), "{joins:?}");
    // Nobody is told of it and nobody has to leave.
    owner.push(message(42, 10));
    assert_eq!(number(&fan.message().await), 42);
    timeout(Duration::from_millis(300), async {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        while owner.joins().len() == joins.len() {
            ticks.tick().await;
        }
    })
    .await
    .expect_err("once it is taken it is not said again");
}

#[tokio::test]
async fn the_owner_hears_whether_messages_or_statistics_are_wanted() {
    let (running, owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let said = || owner.joins().iter().map(|join| (join.viewers, !join.unwatched)).collect::<Vec<_>>();
    let mut watcher = enter(address, "watcher", "r/stage/stats").await;
    assert_eq!(said(), [(0, true)]);
    let mut viewer = enter(address, "viewer", "r/stage").await;
    assert_eq!(said()[1..], [(1, true)]);
    let _other = enter(address, "other", "r/stage").await;
    assert_eq!(said().len(), 2, "one more is told with the counts");
    watcher.unsubscribe("r/stage/stats").await;
    eventually("statistics are not wanted any more", || said()[2..] == [(2, false)]).await;
    owner.push(message(1, 10));
    assert_eq!(number(&viewer.message().await), 1);
}

#[tokio::test]
async fn a_gift_that_its_room_can_not_count_is_refused_and_likes_are_not() {
    let config = PLAIN.replace("\"auth\"", r#""rooms":{"flushIntervalMs":50},"auth""#);
    let (running, owner) = gateway(&config).await;
    let mut fan = enter(running.mqtt.unwrap(), "fan", "r/stage").await;
    owner.do_not_count("gift/rose");
    like(&mut fan, 1, "r/stage/like", b"").await;
    like(&mut fan, 2, "r/stage/gift/rose", b"").await;
    like(&mut fan, 3, "r/stage/gift/tulip", b"").await;
    for (id, code) in [(1, 0), (2, Reason::QuotaExceeded.code()), (3, 0)] {
        let (first, body) = fan.receive().await.unwrap();
        let (ack, _) = v5_0::Puback::parse(&body).unwrap();
        assert_eq!((first, ack.packet_id(), ack.reason_code().map_or(0, |code| code as u8)), (0x40, id, code));
    }
    // As many different ones as an interval takes.
    owner.hold_counts(true);
    for gift in 0..200 {
        like(&mut fan, 0, &format!("r/stage/gift/{gift}"), b"").await;
    }
    like(&mut fan, 4, "r/stage/like", b"10").await;
    eventually("gifts are refused", || running.gateway.hub.shared.metrics.room_counts_refused.get() >= 8).await;
    owner.hold_counts(false);
    let (_, body) = fan.receive().await.unwrap();
    assert_eq!(&body[..2], [0, 4], "a like has its place");
    eventually("the like is counted", || total(&owner, "like") == 11).await;
}

#[tokio::test]
async fn who_is_kept_out_does_not_like_either() {
    let (running, owner) = gateway(PLAIN).await;
    let mut eve = enter(running.mqtt.unwrap(), "eve", "r/stage").await;
    let _bob = enter(running.mqtt.unwrap(), "bob", "r/stage").await;
    owner.push(push::Push::RoomKick(RoomKick { room: "stage".into(), user: "eve".into(), until_ms: i64::MAX }));
    assert_eq!(eve.message().await.payload, br#"{"kicked":true}"#);
    assert_eq!(eve.publish(1, "r/stage/like", b"").await.0, Reason::NotAuthorized.code());
}

#[tokio::test]
async fn what_was_counted_behind_counts_under_way_is_sent_before_the_end() {
    let config = PLAIN.replace("\"auth\"", r#""rooms":{"flushIntervalMs":60000},"auth""#);
    let (running, owner) = gateway(&config).await;
    let mut fan = enter(running.mqtt.unwrap(), "fan", "r/stage").await;
    let hub = &running.gateway.hub;
    owner.hold_counts(true);
    like(&mut fan, 0, "r/stage/like", b"3").await;
    let accepted = |count| move || hub.shared.metrics.accepted.get() == count;
    eventually("the first is counted", accepted(1)).await;
    hub.send_counts();
    eventually("it is under way", || total(&owner, "like") == 3).await;
    like(&mut fan, 0, "r/stage/like", b"4").await;
    eventually("the second is counted", accepted(2)).await;
    let leaving = running.member.leave(Duration::ZERO);
    let answering = async {
        assert_eq!(fan.receive().await.unwrap().0, 0xE0, "the connection is shed");
        owner.hold_counts(false);
    };
    tokio::join!(leaving, answering);
    assert_eq!(total(&owner, "like"), 7);
}
