//! One suite for all stores, and what each of them must survive by itself.
#![allow(clippy::unwrap_used, missing_docs)]

// The tests of the whole system use all of it.
#[allow(dead_code)]
#[path = "support/postgres.rs"]
mod postgres_server;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{join_all, try_join_all};
use im_business::store::memory::MemoryStore;
use im_business::store::postgres::Postgres;
use im_business::store::remote::Remote;
use im_business::store::server::serve;
use im_business::store::sqlite::Sqlite;
use im_business::store::{
    Acquired, Claim, Duplicate, LogEntry, LogRange, OpenError, Outcome, POS_MAX, Put, Released, ScrubAt, ShardBatch,
    ShardRow, Store, StoreError, Tail,
};
use im_proto::ids::MemberId;
use im_proto::token::SharedToken;
use parking_lot::Mutex;
use postgres_server::PostgresServer;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

// ---------------------------------------------------------------------------------------------------------------------------------
// What the tests speak in
// ---------------------------------------------------------------------------------------------------------------------------------

/// A member and his way to the store.
#[derive(Clone)]
struct Party {
    me: MemberId,
    store: Arc<dyn Store>,
}

impl Party {
    fn new(me: &MemberId, store: Arc<dyn Store>) -> Self {
        Self { me: me.clone(), store }
    }

    /// Acquires a shard that must be as the row says.
    async fn take(&self, row: &ShardRow) -> Tail {
        match self.try_take(row).await.unwrap() {
            Acquired::Won(tail) => tail,
            Acquired::Lost(row) => panic!("lost against {row:?}"),
        }
    }

    async fn try_take(&self, row: &ShardRow) -> Result<Acquired, StoreError> {
        let claim = Claim { shard: row.shard, expected_epoch: row.epoch, expected_owner: row.owner.clone() };
        Ok(self.store.acquire(&self.me, vec![claim]).await?.remove(0))
    }

    async fn take_new(&self, shard: u32) -> Tail {
        self.take(&ShardRow::unowned(shard)).await
    }

    fn row(&self, shard: u32, epoch: u64) -> ShardRow {
        ShardRow { shard, epoch, owner: Some(self.me.clone()) }
    }

    async fn commit(&self, batches: Vec<ShardBatch>) -> Vec<Outcome> {
        self.store.commit(&self.me, batches).await.unwrap()
    }

    async fn commit_one(&self, batch: ShardBatch) -> Outcome {
        self.commit(vec![batch]).await.remove(0)
    }
}

/// The holes of a shard, looked for in parts.
async fn holes(store: &Arc<dyn Store>, shard: u32) -> Vec<String> {
    let mut next = Some(ScrubAt::default());
    let mut holes = Vec::new();
    while let Some(after) = next {
        let scrubbed = store.scrub(shard, after, 2).await.unwrap();
        holes.extend(scrubbed.holes);
        next = scrubbed.next;
    }
    holes
}

fn members() -> (MemberId, MemberId) {
    (MemberId::new("business-0", 0xa).unwrap(), MemberId::new("business-1", 0xb).unwrap())
}

fn entry(conversation: &str, seq: u64, pos: u64, key: &str, payload: &[u8]) -> LogEntry {
    LogEntry {
        conversation: conversation.into(),
        seq,
        pos,
        key: Bytes::copy_from_slice(key.as_bytes()),
        sender: "ann".into(),
        device: "phone".into(),
        kind: 7,
        client_id: "id-é".into(),
        ts_ms: 1_700_000_000_000 + pos as i64,
        payload: Bytes::copy_from_slice(payload),
    }
}

fn appends(shard: u32, epoch: u64, appends: Vec<LogEntry>) -> ShardBatch {
    ShardBatch { shard, epoch, appends, ..ShardBatch::default() }
}

fn puts(shard: u32, epoch: u64, puts: &[(&str, Option<&str>)]) -> ShardBatch {
    let put = |(k, v): &(&str, Option<&str>)| Put {
        key: (*k).to_owned(),
        value: v.map(|v| Bytes::copy_from_slice(v.as_bytes())),
    };
    ShardBatch { shard, epoch, puts: puts.iter().map(put).collect(), ..ShardBatch::default() }
}

fn range(shard: u32, conversation: &str, from: u64, limit: u32, max_bytes: u32, backward: bool) -> LogRange {
    LogRange { shard, conversation: conversation.into(), from, limit, max_bytes, backward }
}

fn seqs(entries: &[LogEntry]) -> Vec<u64> {
    entries.iter().map(|e| e.seq).collect()
}

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("im-store-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn sqlite(&self) -> Sqlite {
        Sqlite::open(&self.0.join("store.db")).unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Waits for a condition in another process or on another connection.
async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition().await {
        assert!(Instant::now() < deadline, "not within 20 s: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The suite
// ---------------------------------------------------------------------------------------------------------------------------------

/// Everything that holds for every store. Each case has shards of its own.
async fn suite(a: &Party, b: &Party) {
    a_batch_may_release(a, b, 31).await;
    what_is_appended_can_be_read(a, 1).await;
    who_loses_an_acquire_gets_the_row(a, b, 2).await;
    a_fenced_shard_does_not_hold_up_the_others(a, b, 3).await;
    duplicates_name_what_is_stored(a, 10).await;
    one_key_may_be_in_two_conversations(a, 13).await;
    a_taken_place_is_corrupt(a, 14).await;
    a_malformed_batch_is_corrupt(a, 15).await;
    a_release_ends_an_epoch(a, b, 16).await;
    the_watermark_only_grows(a, b, 17).await;
    items_are_ordered_by_bytes(a, 18).await;
    ranges_have_limits(a, 19).await;
    holes_are_seen(a, 20).await;
    check_names_what_was_lost(a, b, 24).await;
    many_shards_commit_at_once(a, 100).await;
    two_owners_race(a, b, 30).await;
    every_row_is_listed(a).await;
}

async fn what_is_appended_can_be_read(a: &Party, shard: u32) {
    let tail = a.take_new(shard).await;
    assert_eq!(tail, Tail { shard, epoch: 1, head_pos: 0, watermark: 0, hole: false });
    let rows = vec![
        entry("u/ann/bob", 1, 1, "k1", b"hello"),
        entry("g/x", 1, 2, "k2", b""),
        entry("u/ann/bob", 2, 3, "k3", &[0, 255]),
    ];
    assert_eq!(a.commit_one(appends(shard, 1, rows.clone())).await, Outcome::Committed);

    assert_eq!(a.store.since(shard, 0, 10).await.unwrap(), rows);
    assert_eq!(a.store.since(shard, 1, 1).await.unwrap(), rows[1..2]);
    assert_eq!(a.store.since(shard, 3, 10).await.unwrap(), []);
    assert_eq!(a.store.since(shard, u64::MAX, 10).await.unwrap(), []);
    let direct = a.store.range(range(shard, "u/ann/bob", 1, 10, 1000, false)).await.unwrap();
    assert_eq!(direct, [rows[0].clone(), rows[2].clone()]);
    for (place, conversation, key, found) in [
        (shard, "u/ann/bob", "k3", Some(&rows[2])),
        (shard, "g/x", "k2", Some(&rows[1])),
        (shard, "g/x", "k3", None),
        (shard, "g/none", "k2", None),
        (shard, "g/x", "", None),
        (shard + 1000, "g/x", "k2", None),
    ] {
        let answer = a.store.find(place, conversation.into(), Bytes::from_static(key.as_bytes())).await.unwrap();
        assert_eq!(answer.as_ref(), found, "{key} in {conversation} of shard {place}");
    }
    // Another shard has none of it.
    assert_eq!(a.store.since(shard + 1000, 0, 10).await.unwrap(), []);
    assert_eq!(a.take(&a.row(shard, 1)).await, Tail { shard, epoch: 2, head_pos: 3, watermark: 0, hole: false });
    // An empty commit is one too.
    assert_eq!(a.commit(vec![]).await, []);
}

async fn who_loses_an_acquire_gets_the_row(a: &Party, b: &Party, shard: u32) {
    a.take_new(shard).await;
    let row = a.row(shard, 1);
    for wrong in [
        ShardRow::unowned(shard),
        ShardRow { epoch: 2, ..row.clone() },
        ShardRow { owner: Some(b.me.clone()), ..row.clone() },
    ] {
        assert_eq!(b.try_take(&wrong).await.unwrap(), Acquired::Lost(row.clone()), "expecting {wrong:?}");
    }
    // A row that does not exist is epoch 0 without owner.
    let none = ShardRow { shard: shard + 1000, epoch: 5, owner: Some(a.me.clone()) };
    assert_eq!(b.try_take(&none).await.unwrap(), Acquired::Lost(ShardRow::unowned(shard + 1000)));
    assert_eq!(b.take(&row).await.epoch, 2);
    // Of two claims in one call each stands for itself.
    let claims = vec![
        Claim { shard, expected_epoch: 1, expected_owner: Some(a.me.clone()) },
        Claim { shard, expected_epoch: 2, expected_owner: Some(b.me.clone()) },
    ];
    let answers = a.store.acquire(&a.me, claims).await.unwrap();
    assert_eq!(answers[0], Acquired::Lost(b.row(shard, 2)));
    assert!(matches!(&answers[1], Acquired::Won(tail) if tail.epoch == 3), "{answers:?}");
}

async fn a_fenced_shard_does_not_hold_up_the_others(a: &Party, b: &Party, first: u32) {
    for shard in first..first + 3 {
        a.take_new(shard).await;
    }
    b.take(&a.row(first + 1, 1)).await;
    let batch = |shard| appends(shard, 1, vec![entry("g/x", 1, 1, "k", b"m")]);
    let outcomes = a.commit((first..first + 4).map(batch).collect()).await;
    let fenced = Outcome::Fenced(b.row(first + 1, 2));
    assert_eq!(
        outcomes,
        [Outcome::Committed, fenced, Outcome::Committed, Outcome::Fenced(ShardRow::unowned(first + 3))]
    );
    for (shard, stored) in [(first, 1), (first + 1, 0), (first + 2, 1), (first + 3, 0)] {
        assert_eq!(a.store.since(shard, 0, 10).await.unwrap().len(), stored, "shard {shard}");
    }
    // Puts and watermarks are fenced like appends, by owner as well as by epoch.
    let late = [
        puts(first + 1, 1, &[("k", Some("v"))]),
        ShardBatch { shard: first + 1, epoch: 2, watermark: Some(9), ..ShardBatch::default() },
    ];
    for late in late {
        assert_eq!(a.commit_one(late).await, Outcome::Fenced(b.row(first + 1, 2)));
    }
    assert_eq!(a.store.get(first + 1, vec!["k".to_owned()]).await.unwrap(), [None]);
    assert_eq!(b.take(&b.row(first + 1, 2)).await.watermark, 0);
}

async fn duplicates_name_what_is_stored(a: &Party, first: u32) {
    let other = first + 1;
    a.take_new(first).await;
    a.take_new(other).await;
    let stored = [entry("g/x", 1, 1, "k1", b"one"), entry("g/x", 2, 2, "k2", b"two")];
    assert_eq!(a.commit_one(appends(first, 1, stored.to_vec())).await, Outcome::Committed);

    let again =
        vec![entry("g/x", 3, 3, "new", b"new"), entry("g/x", 4, 4, "k2", b"two"), entry("g/x", 5, 5, "k1", b"one")];
    let mut resent = appends(first, 1, again);
    resent.puts = vec![Put { key: "mark".to_owned(), value: Some(Bytes::from_static(b"5")) }];
    resent.watermark = Some(5);
    let outcomes = a.commit(vec![resent, appends(other, 1, vec![entry("g/y", 1, 1, "k1", b"m")])]).await;
    let duplicates =
        vec![Duplicate { index: 1, stored: stored[1].clone() }, Duplicate { index: 2, stored: stored[0].clone() }];
    assert_eq!(outcomes, [Outcome::Duplicates(duplicates), Outcome::Committed]);

    // Of the one nothing was stored, of the other all.
    assert_eq!(a.store.since(first, 0, 10).await.unwrap(), stored);
    assert_eq!(a.store.get(first, vec!["mark".to_owned()]).await.unwrap(), [None]);
    assert_eq!(a.store.since(other, 0, 10).await.unwrap().len(), 1);
    // Without the duplicates and renumbered it goes.
    assert_eq!(a.commit_one(appends(first, 1, vec![entry("g/x", 3, 3, "new", b"new")])).await, Outcome::Committed);
    let tail = a.take(&a.row(first, 1)).await;
    assert_eq!((tail.head_pos, tail.watermark, tail.hole), (3, 0, false));
}

async fn one_key_may_be_in_two_conversations(a: &Party, shard: u32) {
    a.take_new(shard).await;
    let both = vec![entry("g/x", 1, 1, "k", b"x"), entry("g/y", 1, 2, "k", b"y")];
    assert_eq!(a.commit_one(appends(shard, 1, both)).await, Outcome::Committed);
    assert_eq!(a.commit_one(appends(shard, 1, vec![entry("g/z", 1, 3, "k", b"z")])).await, Outcome::Committed);
    assert_eq!(a.store.since(shard, 0, 10).await.unwrap().len(), 3);
}

async fn a_taken_place_is_corrupt(a: &Party, shard: u32) {
    a.take_new(shard).await;
    assert_eq!(a.commit_one(appends(shard, 1, vec![entry("g/x", 1, 1, "k1", b"m")])).await, Outcome::Committed);
    let wrong = [
        ("a stored seq", vec![entry("g/x", 2, 2, "k2", b"m"), entry("g/x", 1, 3, "k3", b"m")]),
        ("a stored pos", vec![entry("g/x", 2, 2, "k2", b"m"), entry("g/x", 3, 1, "k3", b"m")]),
        ("a seq twice", vec![entry("g/x", 2, 2, "k2", b"m"), entry("g/x", 2, 3, "k3", b"m")]),
        ("a pos twice", vec![entry("g/x", 2, 2, "k2", b"m"), entry("g/x", 3, 2, "k3", b"m")]),
        ("a key twice", vec![entry("g/x", 2, 2, "k2", b"m"), entry("g/x", 3, 3, "k2", b"m")]),
    ];
    for (what, batch) in wrong {
        let outcome = a.commit_one(appends(shard, 1, batch)).await;
        assert!(matches!(outcome, Outcome::Corrupt(_)), "{what}: {outcome:?}");
        assert_eq!(a.store.since(shard, 0, 10).await.unwrap().len(), 1, "{what}");
    }
}

async fn a_malformed_batch_is_corrupt(a: &Party, shard: u32) {
    a.take_new(shard).await;
    let good = || appends(shard, 1, vec![entry("g/x", 1, 1, "k", b"m")]);
    let outcomes = a.commit(vec![good(), good()]).await;
    assert_eq!(outcomes[0], Outcome::Committed);
    assert!(matches!(outcomes[1], Outcome::Corrupt(_)), "{outcomes:?}");
    for bad in [
        appends(shard, 1, vec![entry("g/\0", 2, 2, "k2", b"m")]),
        appends(shard, 1, vec![entry("g/x", 0, 2, "k2", b"m")]),
        appends(shard, 1, vec![entry("g/x", 2, POS_MAX + 1, "k2", b"m")]),
        puts(shard, 1, &[("a\0", Some("v"))]),
        appends(u32::MAX, 1, vec![]),
    ] {
        let outcome = a.commit_one(bad.clone()).await;
        assert!(matches!(outcome, Outcome::Corrupt(_)), "{bad:?}: {outcome:?}");
    }
    assert!(matches!(a.try_take(&ShardRow::unowned(u32::MAX)).await, Err(StoreError::Refused { .. })));
}

async fn a_release_ends_an_epoch(a: &Party, b: &Party, shard: u32) {
    a.take_new(shard).await;
    assert_eq!(a.commit_one(appends(shard, 1, vec![entry("g/x", 1, 1, "k", b"m")])).await, Outcome::Committed);
    let released = a.store.release(&a.me, vec![(shard, 2), (shard, 1), (shard, 1)]).await.unwrap();
    let free = ShardRow { shard, epoch: 1, owner: None };
    assert_eq!(released, [Released::Lost(a.row(shard, 1)), Released::Done, Released::Lost(free.clone())]);
    assert_eq!(a.commit_one(puts(shard, 1, &[("k", None)])).await, Outcome::Fenced(free.clone()));
    let tail = b.take(&free).await;
    assert_eq!((tail.epoch, tail.head_pos), (2, 1));
    assert_eq!(b.store.release(&a.me, vec![(shard, 2)]).await.unwrap(), [Released::Lost(b.row(shard, 2))]);
}

/// The last batch may give the shard back: with it or not at all.
async fn a_batch_may_release(a: &Party, b: &Party, shard: u32) {
    a.take_new(shard).await;
    let last = |key: &str, seq| ShardBatch {
        release: true,
        ..appends(shard, 1, vec![entry("g/release", seq, seq, key, b"last")])
    };
    assert_eq!(a.commit_one(last("one", 1)).await, Outcome::Committed);
    let nobodys = ShardRow { shard, epoch: 1, owner: None };
    assert_eq!(a.commit_one(last("two", 2)).await, Outcome::Fenced(nobodys.clone()));
    let tail = b.take(&nobodys).await;
    assert_eq!((tail.epoch, tail.head_pos), (2, 1));
    let refused = ShardBatch { epoch: 2, release: true, ..last("one", 2) };
    assert!(matches!(b.commit_one(refused).await, Outcome::Duplicates(_)));
    assert_eq!(b.commit_one(ShardBatch { epoch: 2, release: false, ..last("two", 2) }).await, Outcome::Committed);
}

async fn the_watermark_only_grows(a: &Party, b: &Party, shard: u32) {
    a.take_new(shard).await;
    let mut batch = appends(shard, 1, (1..=4).map(|i| entry("g/x", i, i, &format!("k{i}"), b"m")).collect());
    batch.watermark = Some(3);
    assert_eq!(a.commit_one(batch).await, Outcome::Committed);
    let lower = ShardBatch { shard, epoch: 1, watermark: Some(2), ..ShardBatch::default() };
    assert_eq!(a.commit_one(lower).await, Outcome::Committed);
    let tail = b.take(&a.row(shard, 1)).await;
    assert_eq!(tail, Tail { shard, epoch: 2, head_pos: 4, watermark: 3, hole: false });
}

async fn items_are_ordered_by_bytes(a: &Party, shard: u32) {
    a.take_new(shard).await;
    let all = [
        ("a", "0"),
        ("m/", "1"),
        ("m/A", "2"),
        ("m/Z", "3"),
        ("m/a", "4"),
        ("m/é", "5"),
        ("m/\u{10ffff}x", "6"),
        ("m0", "7"),
        ("n", "8"),
    ];
    let stored: Vec<(&str, Option<&str>)> = all.iter().rev().map(|(k, v)| (*k, Some(*v))).collect();
    assert_eq!(a.commit_one(puts(shard, 1, &stored)).await, Outcome::Committed);
    let scan = async |prefix: &str, after: Option<&str>, limit| {
        let items = a.store.items(shard, prefix.to_owned(), after.map(str::to_owned), limit).await.unwrap();
        items.iter().map(|(k, v)| format!("{k}={}", String::from_utf8_lossy(v))).collect::<Vec<_>>()
    };
    let print = |items: &[(&str, &str)]| items.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>();
    assert_eq!(scan("", None, 100).await, print(&all));
    assert_eq!(scan("m/", None, 100).await, print(&all[1..7]));
    assert_eq!(scan("m/", None, 2).await, print(&all[1..3]));
    assert_eq!(scan("m/", Some("m/A"), 2).await, print(&all[3..5]));
    assert_eq!(scan("m/", Some("m/\u{10ffff}x"), 2).await, [] as [String; 0]);
    assert_eq!(scan("m/", Some("a"), 1).await, print(&all[1..2]));
    assert_eq!(scan("x", None, 2).await, [] as [String; 0]);

    // The last of several writes of one key counts; deleting what is not there is fine.
    let changes = [("a", Some("x")), ("a", None), ("n", None), ("n", Some("y")), ("m/a", None), ("none", None)];
    assert_eq!(a.commit_one(puts(shard, 1, &changes)).await, Outcome::Committed);
    let keys = ["n", "a", "m/a", "m/A"].map(str::to_owned).to_vec();
    let values = a.store.get(shard, keys).await.unwrap();
    assert_eq!(values, [Some(Bytes::from_static(b"y")), None, None, Some(Bytes::from_static(b"2"))]);
    assert_eq!(a.store.get(shard + 1000, vec!["n".to_owned()]).await.unwrap(), [None]);
}

async fn ranges_have_limits(a: &Party, shard: u32) {
    a.take_new(shard).await;
    let rows = (1..=10).map(|i| entry("g/x", i, i, &format!("k{i}"), &[b'.'; 100])).collect();
    assert_eq!(a.commit_one(appends(shard, 1, rows)).await, Outcome::Committed);
    let cases: [(u64, u32, u32, bool, &[u64]); 10] = [
        (1, 3, 10_000, false, &[1, 2, 3]),
        (0, 2, 10_000, false, &[1, 2]),
        (9, 5, 10_000, false, &[9, 10]),
        (11, 5, 10_000, false, &[]),
        (u64::MAX, 5, 10_000, false, &[]),
        (0, 3, 10_000, true, &[10, 9, 8]),
        (4, 9, 10_000, true, &[4, 3, 2, 1]),
        (u64::MAX, 1, 10_000, true, &[10]),
        (2, 9, 250, false, &[2, 3]),
        (2, 9, 1, true, &[2]),
    ];
    for (from, limit, max_bytes, backward, expected) in cases {
        let found = a.store.range(range(shard, "g/x", from, limit, max_bytes, backward)).await.unwrap();
        assert_eq!(seqs(&found), expected, "from {from} limit {limit} max_bytes {max_bytes} backward {backward}");
    }
    let large = (1..=3).map(|i| entry("g/large", i, 10 + i, &format!("k{i}"), &[b'.'; 400 << 10])).collect();
    assert_eq!(a.commit_one(appends(shard, 1, large)).await, Outcome::Committed);
    let places = |all: &[(u32, &str)]| all.iter().map(|(shard, name)| (*shard, (*name).into())).collect::<Vec<_>>();
    let found =
        a.store.tails(places(&[(shard, "g/x"), (shard, "g/none"), (shard, "g/large"), (shard + 1_000, "g/x")]), 4);
    let found: Vec<Vec<u64>> = found.await.unwrap().iter().map(|tail| seqs(tail)).collect();
    assert_eq!(found, [vec![10, 9, 8, 7], vec![], vec![3, 2], vec![]], "1 MiB of each at most");
    // All of them together are one answer: none has more than its part of it, and each has one entry.
    let found = a.store.tails(places(&vec![(shard, "g/large"); 50]), 4).await.unwrap();
    assert!(found.len() == 50 && found.iter().all(|tail| seqs(tail) == [3]), "{:?}", found.iter().map(Vec::len));
}

async fn holes_are_seen(a: &Party, first: u32) {
    let (hole, behind, beyond, written) = (first, first + 1, first + 2, first + 3);
    for shard in [hole, behind, beyond, written] {
        a.take_new(shard).await;
    }
    let three = [1, 2, 3].map(|n| entry("g/x", n, n, &format!("k{n}"), b"m")).to_vec();
    assert_eq!(a.commit_one(appends(written, 1, three)).await, Outcome::Committed);
    let gap = |shard| {
        appends(
            shard,
            1,
            [(1, 1), (2, 2), (3, 5), (5, 6)].map(|(s, p)| entry("g/x", s, p, &format!("k{p}"), b"m")).to_vec(),
        )
    };
    assert_eq!(a.commit_one(gap(hole)).await, Outcome::Committed);
    assert!(a.take(&a.row(hole, 1)).await.hole);
    assert_eq!(
        holes(&a.store, hole).await,
        [format!("shard {hole}: pos 3 to 4 are missing"), format!("shard {hole}: conversation g/x: seq 4 is missing")]
    );

    // Below the watermark a hole is no news at an acquire; the scrubber still finds it.
    assert_eq!(a.commit_one(ShardBatch { watermark: Some(5), ..gap(behind) }).await, Outcome::Committed);
    assert!(!a.take(&a.row(behind, 1)).await.hole);
    assert_eq!(holes(&a.store, behind).await.len(), 2);

    // What is written between two looks is no hole: not behind the first one, and not where it has been.
    let begun = a.store.scrub(written, ScrubAt::default(), 2).await.unwrap();
    let more = [("g/a", 1, 4), ("g/x", 4, 5), ("g/y", 1, 6)].map(|(c, s, p)| entry(c, s, p, &format!("k{p}"), b"m"));
    let more = ShardBatch { watermark: Some(6), ..appends(written, 1, more.to_vec()) };
    assert_eq!(a.commit_one(more).await, Outcome::Committed);
    let mut next = begun.next.clone();
    while let Some(after) = next {
        let scrubbed = a.store.scrub(written, after, 2).await.unwrap();
        assert_eq!(scrubbed.holes, [] as [String; 0]);
        next = scrubbed.next;
    }
    assert!(begun.holes.is_empty() && begun.next.is_some(), "{begun:?}");

    // The log ends below its watermark: its end was lost.
    let lost = ShardBatch { shard: beyond, epoch: 1, watermark: Some(2), ..ShardBatch::default() };
    assert_eq!(a.commit_one(lost).await, Outcome::Committed);
    assert!(a.take(&a.row(beyond, 1)).await.hole);
    assert_eq!(holes(&a.store, beyond).await, [format!("shard {beyond}: pos 1 to 2 are missing")]);
}

async fn check_names_what_was_lost(a: &Party, b: &Party, first: u32) {
    a.take_new(first).await;
    a.take_new(first + 1).await;
    b.take(&a.row(first + 1, 1)).await;
    let lost = a.store.check(&a.me, vec![(first, 1), (first + 1, 1), (first + 2, 1), (first, 2)]).await.unwrap();
    assert_eq!(lost, [b.row(first + 1, 2), ShardRow::unowned(first + 2), a.row(first, 1)]);
}

async fn many_shards_commit_at_once(a: &Party, first: u32) {
    const SHARDS: u32 = 48;
    const ROUNDS: u64 = 6;
    let claims =
        (first..first + SHARDS).map(|shard| Claim { shard, expected_epoch: 0, expected_owner: None }).collect();
    let acquired = a.store.acquire(&a.me, claims).await.unwrap();
    assert!(acquired.iter().all(|acquired| matches!(acquired, Acquired::Won(_))), "{acquired:?}");
    // Three shards in a commit, all commits of a round at once.
    join_all((first..first + SHARDS).step_by(3).map(|shard| async move {
        for round in 0..ROUNDS {
            let batch = |shard| {
                let rows = (1..=2).map(|i| (round * 2 + i, format!("k{}", round * 2 + i)));
                let rows = rows.map(|(n, key)| entry("g/x", n, n, &key, format!("{shard}/{n}").as_bytes()));
                appends(shard, 1, rows.collect())
            };
            let outcomes = a.commit((shard..shard + 3).map(batch).collect()).await;
            assert_eq!(outcomes, [Outcome::Committed, Outcome::Committed, Outcome::Committed]);
        }
    }))
    .await;
    for shard in first..first + SHARDS {
        let rows = a.store.since(shard, 0, 100).await.unwrap();
        assert_eq!(seqs(&rows), (1..=ROUNDS * 2).collect::<Vec<_>>(), "shard {shard}");
        assert!(rows.iter().all(|e| e.payload == format!("{shard}/{}", e.seq)), "shard {shard}: {rows:?}");
        assert_eq!(holes(&a.store, shard).await, [] as [String; 0]);
    }
}

/// Two members take the shard from each other again and again, each writing as long as it can.
async fn two_owners_race(a: &Party, b: &Party, shard: u32) {
    let won = Mutex::new(Vec::<(u64, MemberId)>::new());
    let written = Mutex::new(BTreeSet::<u64>::new());
    let race = async |party: &Party| {
        let mut known = ShardRow::unowned(shard);
        let mut wins = 0;
        while wins < 12 {
            let tail = match party.try_take(&known).await.unwrap() {
                Acquired::Won(tail) => tail,
                Acquired::Lost(row) => {
                    assert!(row.epoch >= known.epoch, "epochs only grow: {known:?} then {row:?}");
                    known = row;
                    continue;
                }
            };
            assert!(tail.epoch > known.epoch && !tail.hole, "{tail:?} after {known:?}");
            known = party.row(shard, tail.epoch);
            won.lock().push((tail.epoch, party.me.clone()));
            wins += 1;
            for pos in tail.head_pos + 1..tail.head_pos + 8 {
                let payload = format!("{} {}", tail.epoch, party.me);
                let row = entry("g/x", pos, pos, &format!("{} {pos}", tail.epoch), payload.as_bytes());
                match party.commit_one(appends(shard, tail.epoch, vec![row])).await {
                    Outcome::Committed => assert!(written.lock().insert(pos), "pos {pos} was acknowledged twice"),
                    Outcome::Fenced(row) => {
                        assert!(row.epoch > tail.epoch, "fenced by {row:?} in epoch {}", tail.epoch);
                        known = row;
                        break;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    };
    tokio::join!(race(a), race(b));

    let won = won.into_inner();
    let epochs: BTreeSet<u64> = won.iter().map(|(epoch, _)| *epoch).collect();
    assert_eq!(epochs.len(), won.len(), "an epoch was won twice: {won:?}");
    let rows = a.store.since(shard, 0, 10_000).await.unwrap();
    assert_eq!(
        rows.iter().map(|e| e.pos).collect::<BTreeSet<_>>(),
        *written.lock(),
        "what was acknowledged is what is stored"
    );
    assert_eq!(holes(&a.store, shard).await, [] as [String; 0]);
    let mut last = 0;
    for row in rows {
        let text = String::from_utf8_lossy(&row.payload).into_owned();
        let (epoch, writer) = text.split_once(' ').unwrap();
        let epoch: u64 = epoch.parse().unwrap();
        assert!(epoch >= last, "epoch {epoch} wrote after {last}");
        assert!(won.iter().any(|(e, who)| *e == epoch && who.as_str() == writer), "{writer} wrote in epoch {epoch}");
        last = epoch;
    }
}

async fn every_row_is_listed(a: &Party) {
    let rows = a.store.shards().await.unwrap();
    let numbers: BTreeSet<u32> = rows.iter().map(|row| row.shard).collect();
    assert_eq!(numbers.len(), rows.len());
    assert!([1, 2, 3, 30, 100, 147].iter().all(|shard| numbers.contains(shard)), "{numbers:?}");
    let released = rows.iter().find(|row| row.shard == 24).unwrap();
    assert_eq!(*released, a.row(24, 1));
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Memory and SQLite
// ---------------------------------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn memory_passes_the_suite() {
    let (a, b) = members();
    let store = Arc::new(MemoryStore::default());
    suite(&Party::new(&a, store.clone()), &Party::new(&b, store)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_passes_the_suite() {
    let scratch = Scratch::new();
    let (a, b) = members();
    let store = Arc::new(scratch.sqlite());
    suite(&Party::new(&a, store.clone()), &Party::new(&b, store)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_keeps_what_it_stored_and_has_one_owner() {
    let scratch = Scratch::new();
    let (a, _) = members();
    let store = scratch.sqlite();
    assert!(matches!(Sqlite::open(&scratch.0.join("store.db")), Err(OpenError::InUse { .. })));
    let party = Party::new(&a, Arc::new(store));
    party.take_new(1).await;
    assert_eq!(party.commit_one(appends(1, 1, vec![entry("g/x", 1, 1, "k", b"m")])).await, Outcome::Committed);
    drop(party);

    let party = Party::new(&a, Arc::new(scratch.sqlite()));
    assert_eq!(party.take(&party.row(1, 1)).await, Tail { shard: 1, epoch: 2, head_pos: 1, watermark: 0, hole: false });
    let again = appends(1, 2, vec![entry("g/x", 2, 2, "k", b"m")]);
    assert!(matches!(party.commit_one(again).await, Outcome::Duplicates(_)));
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_refuses_when_the_disk_is_full_and_recovers() {
    let scratch = Scratch::new();
    let (a, _) = members();
    let store = Arc::new(scratch.sqlite());
    let party = Party::new(&a, store.clone());
    party.take_new(1).await;
    party.take_new(2).await;
    // SQLite takes no bound below the size of the file: 1 means what it has now, so the first page more is refused.
    store.set_pages_max(1).await.unwrap();
    let batch = |shard, n| appends(shard, 1, vec![entry("g/x", n, n, &format!("k{n}"), &[b'.'; 3000])]);
    let mut stored = 0;
    let refused = loop {
        match party.store.commit(&a, vec![batch(1, stored + 1), batch(2, stored + 1)]).await {
            Ok(outcomes) => assert_eq!(outcomes, [Outcome::Committed, Outcome::Committed]),
            Err(error) => break error,
        }
        stored += 1;
        assert!(stored < 100, "the bound has no effect");
    };
    assert!(matches!(refused, StoreError::Refused { .. }), "{refused:?}");
    // Reads go on, and what was refused is not there.
    for shard in [1, 2] {
        assert_eq!(seqs(&party.store.since(shard, 0, 1000).await.unwrap()), (1..=stored).collect::<Vec<_>>());
    }
    store.set_pages_max(1 << 20).await.unwrap();
    assert_eq!(party.commit_one(batch(1, stored + 1)).await, Outcome::Committed);
    assert_eq!(holes(&party.store, 1).await, [] as [String; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn sqlite_starts_its_log_over_under_load() {
    let scratch = Scratch::new();
    let (a, _) = members();
    let party = Party::new(&a, Arc::new(scratch.sqlite()));
    party.take_new(1).await;
    let payload = [b'.'; 2_000];
    // Some 400 MiB of pages, three times what the log may have before it starts over.
    for batch in 0..100 {
        let entries = (1..=1_000).map(|i| batch * 1_000 + i).map(|n| entry("g/x", n, n, &format!("k{n}"), &payload));
        assert_eq!(party.commit_one(appends(1, 1, entries.collect())).await, Outcome::Committed);
    }
    let bytes = std::fs::metadata(scratch.0.join("store.db-wal")).unwrap().len();
    assert!(bytes < 192 << 20, "the log has {} MiB", bytes >> 20);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// The store member
// ---------------------------------------------------------------------------------------------------------------------------------

/// Serves a store on a port of its own until the runtime ends.
async fn serve_store(store: Arc<dyn Store>, token: Option<&str>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = shared_token(token);
    tokio::spawn(async move { serve(listener, store, token).await.unwrap() });
    address
}

fn shared_token(token: Option<&str>) -> SharedToken {
    token.map_or_else(SharedToken::none, |token| SharedToken::fixed(token).unwrap())
}

fn remote(address: SocketAddr, token: Option<&str>) -> Arc<dyn Store> {
    Arc::new(Remote::new(&format!("http://{address}"), shared_token(token)).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_store_passes_the_suite() {
    let scratch = Scratch::new();
    let (a, b) = members();
    let address = serve_store(Arc::new(scratch.sqlite()), Some("secret")).await;
    suite(&Party::new(&a, remote(address, Some("secret"))), &Party::new(&b, remote(address, Some("secret")))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_store_refuses_strangers() {
    let address = serve_store(Arc::new(MemoryStore::default()), Some("secret")).await;
    for token in [None, Some("secre"), Some("secret2"), Some("x")] {
        let answer = remote(address, token).shards().await;
        assert!(matches!(answer, Err(StoreError::Refused { .. })), "{token:?}: {answer:?}");
    }
    assert_eq!(remote(address, Some("secret")).shards().await, Ok(vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_store_member_everything_is_refused_until_it_comes() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let (a, _) = members();
    let party = Party::new(&a, remote(address, None));
    assert!(matches!(party.try_take(&ShardRow::unowned(1)).await, Err(StoreError::Refused { .. })));
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move { serve(listener, Arc::new(MemoryStore::default()), SharedToken::none()).await.unwrap() });
    assert_eq!(party.take_new(1).await.epoch, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_commit_cut_off_is_of_unknown_outcome() {
    let (a, _) = members();
    let behind: Arc<dyn Store> = Arc::new(MemoryStore::default());
    let proxy = Proxy::before(serve_store(behind.clone(), None).await).await;
    cut_off_commits(&Party::new(&a, remote(proxy.address, None)), &behind, &proxy).await;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// PostgreSQL
// ---------------------------------------------------------------------------------------------------------------------------------

async fn postgres(url: &str, me: &MemberId) -> Party {
    Party::new(me, Arc::new(Postgres::open(url, None, me).await.unwrap()))
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_passes_the_suite() {
    let server = PostgresServer::start().unwrap();
    let (a, b) = members();
    // Both at once: the migrations are under a lock.
    let url = server.url();
    let (a, b) = tokio::join!(postgres(&url, &a), postgres(&url, &b));
    suite(&a, &b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_that_may_lose_commits_is_not_opened() {
    let server = PostgresServer::start().unwrap();
    let url = format!("{}?options=-c%20synchronous_commit%3Doff", server.url());
    assert!(matches!(Postgres::open(&url, None, &members().0).await, Err(OpenError::NotDurable)));
}

/// A certificate authority, and a server's certificate and key from it.
struct Issued {
    authority: String,
    certificate: String,
    key: String,
}

fn issued(server: &str) -> Issued {
    let mut authority = CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let (authority_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let authority = CertifiedIssuer::self_signed(authority, authority_key).unwrap();
    let certificate = CertificateParams::new(vec![server.to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
    Issued { authority: authority.pem(), certificate: certificate.pem(), key: key.serialize_pem() }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_is_reached_over_tls_as_its_url_asks() {
    let server = PostgresServer::start().unwrap();
    let (ours, strangers) = (issued("localhost"), issued("localhost"));
    server.take_certificate(&ours.certificate, &ours.key).unwrap();
    let (hand, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    hand.batch_execute("ALTER SYSTEM SET ssl = on").await.unwrap();
    hand.batch_execute("SELECT pg_reload_conf()").await.unwrap();
    until("it has TLS", async || {
        let url = format!("{}?sslmode=require", server.url());
        Postgres::open(&url, None, &members().0).await.is_ok()
    })
    .await;
    let directory = std::env::temp_dir().join(format!("im-authorities-{}", std::process::id()));
    std::fs::create_dir(&directory).unwrap();
    let files = [("ours", ours.authority), ("strangers", strangers.authority), ("nobodys", String::new())];
    let [ours, strangers, nobodys] = files.map(|(name, pem)| {
        let path = directory.join(name);
        std::fs::write(&path, pem).unwrap();
        path
    });

    // By its name the certificate is for localhost, and not for 127.0.0.1.
    let named = server.url().replace("127.0.0.1", "localhost");
    for (number, (url, authorities, expected)) in [
        (server.url(), None, Ok(true)),
        (format!("{}?sslmode=disable", server.url()), None, Ok(false)),
        (named.clone(), Some(&ours), Ok(true)),
        (format!("{named}?sslmode=verify-full"), Some(&ours), Ok(true)),
        (format!("{}?sslmode=verify-ca", server.url()), Some(&ours), Ok(true)),
        (server.url(), Some(&ours), Err("not valid for name")),
        (named.clone(), Some(&strangers), Err("invalid peer certificate")),
        (format!("{}?sslmode=verify-ca", server.url()), Some(&strangers), Err("invalid peer certificate")),
        (format!("{named}?sslmode=verify-full"), None, Err("certificate")),
        (named.clone(), Some(&nobodys), Err("there is no certificate in it")),
    ]
    .into_iter()
    .enumerate()
    {
        let me = MemberId::new("tls", number as u64).unwrap();
        let opened = Postgres::open(&url, authorities.map(PathBuf::as_path), &me).await;
        match (opened, expected) {
            (Ok(store), Ok(encrypted)) => {
                let party = Party::new(&me, Arc::new(store));
                party.take_new(number as u32 + 1).await;
                let of = "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE application_name = $1";
                let over_tls = hand.query_one(of, &[&me.as_str()]).await.unwrap().get::<_, bool>(0);
                assert_eq!(over_tls, encrypted, "{url}");
            }
            (Err(error), Err(words)) => {
                assert!(error.to_string().contains(words), "{url} with {authorities:?}: {error}");
            }
            (opened, _) => panic!("{url} with {authorities:?}: {:?}", opened.err()),
        }
    }
    std::fs::remove_dir_all(&directory).unwrap();
}

/// What needs another connection waits for one that there is, and more are made again when the database takes them.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_take_no_more_connections() {
    let server = PostgresServer::start().unwrap();
    let (hand, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    for statement in ["CREATE ROLE chat LOGIN CONNECTION LIMIT 2", "CREATE DATABASE chat OWNER chat"] {
        hand.batch_execute(statement).await.unwrap();
    }
    let (me, _) = members();
    let chat = postgres(&server.url().replace("postgres@", "chat@").replace("/postgres", "/chat"), &me).await;
    chat.take_new(1).await;
    let connections = async || {
        let of = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
        hand.query_one(of, &[&me.as_str()]).await.unwrap().get::<_, i64>(0)
    };
    let all_at_once = async || {
        let reads = (0..40).map(|_| chat.store.shards());
        try_join_all(reads).await.map(|rows| assert_eq!(rows.len(), 40))
    };
    all_at_once().await.expect("by two connections, one after the other");
    assert_eq!(connections().await, 2);
    let stored = chat.commit_one(appends(1, 1, vec![entry("g/x", 1, 1, "k", b"m")])).await;
    assert_eq!(stored, Outcome::Committed);

    hand.batch_execute("ALTER ROLE chat CONNECTION LIMIT 8").await.unwrap();
    until("more are made", async || {
        all_at_once().await.expect("all are answered meanwhile, too");
        connections().await > 4
    })
    .await;
}

/// A stopped process leaves its transaction open and its row locked.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_does_not_wait_for_a_stopped_owner() {
    let server = PostgresServer::start().unwrap();
    let (a, b) = members();
    let (a, b) = (postgres(&server.url(), &a).await, postgres(&server.url(), &b).await);
    a.take_new(1).await;
    let mut config: tokio_postgres::Config = server.url().parse().unwrap();
    let (stopped, connection) = config.application_name(a.me.as_str()).connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    stopped.batch_execute(&format!("BEGIN; SELECT 1 FROM owner WHERE owner = '{}' FOR SHARE", a.me)).await.unwrap();

    let started = Instant::now();
    assert_eq!(b.take(&a.row(1, 1)).await.epoch, 2);
    let took = started.elapsed();
    assert!(took < Duration::from_millis(1500), "took {took:?}");
    println!("take-over from a stopped owner: {took:?}");
    assert!(stopped.batch_execute("COMMIT").await.is_err(), "the stopped owner's transaction was ended");
    // The old owner comes back and is fenced.
    let late = appends(1, 1, vec![entry("g/x", 1, 1, "k", b"m")]);
    until("the old owner has a connection again", async || a.store.shards().await.is_ok()).await;
    assert_eq!(a.commit_one(late).await, Outcome::Fenced(b.row(1, 2)));
}

/// The two halves of the fence, each held in the middle by hand: a take-over waits for a running commit and sees what it stored; a
/// commit waits for a running take-over and is fenced by it.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_commits_and_take_overs_wait_for_each_other() {
    let server = PostgresServer::start().unwrap();
    let (a, b) = members();
    let (a, b) = (postgres(&server.url(), &a).await, postgres(&server.url(), &b).await);
    let (hand, connection) = tokio_postgres::connect(&server.url(), tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let waiting = async || {
        let count = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'";
        hand.query_one(count, &[]).await.unwrap().get::<_, i64>(0) == 1
    };

    a.take_new(1).await;
    let commit = "INSERT INTO log VALUES (1, 'g/x', 1, 1, 'k', 'ann', 'phone', 0, '', 0, 'm')";
    hand.batch_execute(&format!("BEGIN; SELECT FROM owner WHERE owner = '{}' FOR SHARE; {commit}", a.me))
        .await
        .unwrap();
    let take_over = tokio::spawn({
        let (b, row) = (b.clone(), a.row(1, 1));
        async move { b.take(&row).await }
    });
    until("the take-over waits", waiting).await;
    hand.batch_execute("COMMIT").await.unwrap();
    assert_eq!(take_over.await.unwrap(), Tail { shard: 1, epoch: 2, head_pos: 1, watermark: 0, hole: false });

    a.take_new(2).await;
    let take_over = format!(
        "BEGIN; SELECT FROM owner WHERE owner = '{}' FOR UPDATE; UPDATE shard SET epoch = 2, owner = '{}' WHERE shard = 2",
        a.me, b.me
    );
    hand.batch_execute(&take_over).await.unwrap();
    let commit = tokio::spawn({
        let a = a.clone();
        async move { a.commit_one(appends(2, 1, vec![entry("g/x", 1, 1, "k", b"m")])).await }
    });
    until("the commit waits", waiting).await;
    hand.batch_execute("COMMIT").await.unwrap();
    assert_eq!(commit.await.unwrap(), Outcome::Fenced(b.row(2, 2)));
    assert_eq!(a.store.since(2, 0, 10).await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn postgres_commit_cut_off_is_of_unknown_outcome() {
    let server = PostgresServer::start().unwrap();
    let (a, b) = members();
    let proxy = Proxy::before(SocketAddr::from(([127, 0, 0, 1], server.port()))).await;
    let behind = postgres(&server.url(), &b).await.store;
    cut_off_commits(&postgres(&postgres_server::url_at(proxy.address.port()), &a).await, &behind, &proxy).await;
}

/// Backends are ended and the whole server restarted under a writer: what was acknowledged is there, once, and the writer goes on.
#[tokio::test(flavor = "multi_thread")]
async fn postgres_may_lose_its_backends_and_restart_under_commits() {
    let mut server = PostgresServer::start().unwrap();
    let (a, b) = members();
    let (a, b) = (postgres(&server.url(), &a).await, postgres(&server.url(), &b).await);
    let (acknowledged, progress) = watch::channel(0_u64);
    let enough = Arc::new(Mutex::new(u64::MAX));
    let writer = tokio::spawn(write_through_trouble(a.clone(), acknowledged, enough.clone()));

    let mut config: tokio_postgres::Config = server.url().parse().unwrap();
    for round in 1..=5 {
        reached(&progress, round * 20).await;
        let (killer, connection) = config.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let kill = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1";
        killer.query(kill, &[&a.me.as_str()]).await.unwrap();
    }
    for signal in ["INT", "QUIT"] {
        let before = *progress.borrow();
        reached(&progress, before + 20).await;
        server.stop(signal).unwrap();
        server.run().unwrap();
    }
    config.application_name("checker");
    let before = *progress.borrow();
    reached(&progress, before + 20).await;
    let last = *progress.borrow() + 5;
    *enough.lock() = last;
    let unknown = writer.await.unwrap();
    println!("{} acknowledged, {unknown} of unknown outcome", *progress.borrow());

    let mut rows = Vec::new();
    loop {
        let next = b.store.since(1, rows.len() as u64, 1000).await.unwrap();
        if next.is_empty() {
            break;
        }
        rows.extend(next);
    }
    assert_eq!(rows.len() as u64, *progress.borrow(), "each acknowledged row is there, and no other");
    assert!(rows.iter().all(|e| e.payload == e.pos.to_string()));
    assert_eq!(holes(&b.store, 1).await, [] as [String; 0]);
}

async fn reached(progress: &watch::Receiver<u64>, count: u64) {
    let mut progress = progress.clone();
    let reached = tokio::time::timeout(Duration::from_secs(60), progress.wait_for(|n| *n >= count)).await;
    reached.unwrap_or_else(|_| panic!("the writer did not get to {count} within 60 s")).unwrap();
}

/// Commits row after row as an owner does: refused, it tries again; not knowing, it acquires anew and looks. Gives how often it did
/// not know.
async fn write_through_trouble(party: Party, acknowledged: watch::Sender<u64>, enough: Arc<Mutex<u64>>) -> u32 {
    let mut epoch = party.take_new(1).await.epoch;
    let (mut pos, mut unknown) = (1, 0);
    while *acknowledged.borrow() < *enough.lock() {
        let row = entry("g/x", pos, pos, &format!("k{pos}"), pos.to_string().as_bytes());
        let stored = match party.store.commit(&party.me, vec![appends(1, epoch, vec![row])]).await {
            Ok(outcomes) => {
                assert_eq!(outcomes, [Outcome::Committed]);
                true
            }
            Err(StoreError::Refused { .. }) => false,
            Err(StoreError::Unknown { .. }) => {
                unknown += 1;
                let tail = acquire_anew(&party, epoch).await;
                epoch = tail.epoch;
                assert!(!tail.hole && (tail.head_pos == pos || tail.head_pos == pos - 1), "at {pos}: {tail:?}");
                tail.head_pos == pos
            }
        };
        if stored {
            acknowledged.send_replace(pos);
            pos += 1;
        } else {
            tokio::task::yield_now().await;
        }
    }
    unknown
}

/// Until it is certain: an acquire may itself be of unknown outcome.
async fn acquire_anew(party: &Party, epoch: u64) -> Tail {
    let mut row = party.row(1, epoch);
    loop {
        match party.try_take(&row).await {
            Ok(Acquired::Won(tail)) => return tail,
            Ok(Acquired::Lost(found)) => {
                assert_eq!(found.owner.as_ref(), Some(&party.me), "nobody else takes it");
                row = found;
            }
            Err(_) => tokio::task::yield_now().await,
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Connections that break
// ---------------------------------------------------------------------------------------------------------------------------------

/// The way to a server, which can be disturbed.
struct Proxy {
    address: SocketAddr,
    /// How it is disturbed, and how often its connections were cut.
    state: watch::Sender<(Mode, u32)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Pass,
    /// What the server says is lost.
    Mute,
    /// What the client says is lost.
    Deaf,
}

impl Proxy {
    async fn before(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, states) = watch::channel((Mode::Pass, 0));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let mut states = states.clone();
                let cuts = states.borrow().1;
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect(server).await else { return };
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let (up, down) = (states.clone(), states.clone());
                    tokio::select! {
                        () = forward(&mut from_client, &mut to_server, up, Mode::Deaf) => {}
                        () = forward(&mut from_server, &mut to_client, down, Mode::Mute) => {}
                        _ = states.wait_for(|state| state.1 != cuts) => {}
                    }
                });
            }
        });
        Self { address, state }
    }

    fn set(&self, mode: Mode) {
        self.state.send_modify(|state| state.0 = mode);
    }

    /// Ends all connections; new ones pass.
    fn cut(&self) {
        self.state.send_modify(|state| *state = (Mode::Pass, state.1 + 1));
    }
}

/// Forwards, except what comes in the mode `lost`.
async fn forward(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    state: watch::Receiver<(Mode, u32)>,
    lost: Mode,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n) = from.read(&mut buffer).await
        && n > 0
    {
        let forwarded = state.borrow().0 != lost;
        if forwarded && to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

/// Commits that are cut off, before or after the server took them, are of unknown outcome; acquiring anew shows the truth.
async fn cut_off_commits(party: &Party, behind: &Arc<dyn Store>, proxy: &Proxy) {
    let batch = |epoch, n| appends(1, epoch, vec![entry("g/x", n, n, &format!("k{n}"), b"m")]);
    party.take_new(1).await;
    // Also has the statements prepared: from here on a commit needs no answer to go through.
    assert_eq!(party.commit_one(batch(1, 1)).await, Outcome::Committed);

    proxy.set(Mode::Mute);
    let commit = party.store.commit(&party.me, vec![batch(1, 2)]);
    let cut = async {
        until("the commit is stored", async || {
            behind.find(1, "g/x".into(), Bytes::from_static(b"k2")).await.unwrap().is_some()
        })
        .await;
        proxy.cut();
    };
    let (outcome, ()) = tokio::join!(commit, cut);
    assert!(matches!(outcome, Err(StoreError::Unknown { .. })), "stored: {outcome:?}");
    let tail = acquire_anew(party, 1).await;
    assert_eq!((tail.head_pos, tail.hole), (2, false), "it is there");
    let epoch = tail.epoch;
    assert_eq!(party.commit_one(batch(epoch, 3)).await, Outcome::Committed);

    proxy.set(Mode::Deaf);
    let started = Instant::now();
    let outcome = party.store.commit(&party.me, vec![batch(epoch, 4)]).await;
    assert!(matches!(outcome, Err(StoreError::Unknown { .. })), "not stored: {outcome:?}");
    assert!(started.elapsed() < Duration::from_secs(8), "took {:?}", started.elapsed());
    proxy.cut();
    let tail = acquire_anew(party, epoch).await;
    assert_eq!((tail.head_pos, tail.hole), (3, false), "it is not there");
    assert_eq!(party.commit_one(batch(tail.epoch, 4)).await, Outcome::Committed);
    assert_eq!(holes(behind, 1).await, [] as [String; 0]);
}
