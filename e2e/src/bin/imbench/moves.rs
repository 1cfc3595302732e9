//! How long a conversation waits for an answer while its shard moves to another business member and back, under load.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use im_e2e::client::{Client, Event, Message, Observer, Options, Outcome as Answer};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::system::{Bench, Cluster, eventually};
use crate::{Outcome, Table, Wanted};

const PEOPLE: usize = 64;
const RATE: u64 = 2_000;
/// Each person writes to so many others: that many conversations a person.
const PEERS: usize = 4;
/// The limit of the pause.
const PAUSE_MS_MAX: f64 = 50.0;
/// Scalings out and in.
const ROUNDS: u32 = 2;

/// The longest wait of each conversation since the last look.
#[derive(Default)]
struct Waits {
    longest: Mutex<HashMap<String, Duration>>,
    refused: Mutex<u64>,
}

/// One person's view: conversations are named by who writes to whom.
struct Watcher {
    waits: Arc<Waits>,
    name: String,
}

impl Observer for Watcher {
    fn observe(&self, event: Event<'_>) {
        match event {
            Event::Answered { message, outcome: Answer::Stored { .. }, .. } => {
                let mut longest = self.waits.longest.lock();
                let wait = longest.entry(format!("{} {}", self.name, message.topic)).or_default();
                *wait = (*wait).max(message.scheduled.elapsed());
            }
            Event::Answered { .. } => *self.waits.refused.lock() += 1,
            _ => {}
        }
    }
}

/// Longest waits in a phase, milliseconds, sorted.
fn take(waits: &Waits) -> Vec<f64> {
    let mut longest: Vec<f64> = waits.longest.lock().drain().map(|(_, wait)| wait.as_secs_f64() * 1_000.0).collect();
    longest.sort_by(f64::total_cmp);
    longest
}

fn quantile(sorted: &[f64], at: f64) -> f64 {
    let index = ((sorted.len() as f64 * at).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// Scales business 1 → 2 → 1 under a steady load and compares each conversation's longest wait with the time before.
pub async fn moves(bench: &Bench, table: &mut Table, seconds: u64) -> Outcome {
    let cluster = Cluster::start(bench, "moves", 1).await?;
    let waits = Arc::new(Waits::default());
    let names: Vec<String> = (0..PEOPLE).map(|number| format!("m{number}")).collect();
    let start_client = |name: &String| {
        let observer = Arc::new(Watcher { waits: waits.clone(), name: name.clone() });
        Client::start(Options::new(cluster.mqtt, name.clone(), "phone"), observer)
    };
    let clients: Arc<Vec<Client>> = Arc::new(names.iter().map(start_client).collect());
    for client in clients.iter() {
        timeout(Duration::from_secs(30), client.online()).await.map_err(|_| "a client can't log in")?;
    }
    let sender = tokio::spawn(send(clients.clone(), names));
    sleep(Duration::from_secs(2)).await;
    take(&waits);
    let (mut quiet, mut moving) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        sleep(Duration::from_secs(seconds)).await;
        quiet.extend(take(&waits));
        for members in [2, 1] {
            cluster.scale_business(members)?;
            spread(bench, &cluster, members as usize).await?;
            moving.extend(take(&waits));
        }
    }
    sender.abort();
    let refused = *waits.refused.lock();
    cluster.stop().await?;
    if refused > 0 {
        return Err(format!("{refused} messages were refused while shards moved").into());
    }
    for list in [&mut quiet, &mut moving] {
        list.sort_by(f64::total_cmp);
    }
    let (quiet_p50, moving_p50) = (quantile(&quiet, 0.5), quantile(&moving, 0.5));
    let (quiet_p99, moving_p99) = (quantile(&quiet, 0.99), quantile(&moving, 0.99));
    table.add(
        "longest wait of a conversation, moves, p50",
        "ms",
        moving_p50,
        "the same without moves",
        quiet_p50,
        Wanted::Shown,
    );
    table.add(
        "longest wait of a conversation, moves, p99",
        "ms",
        moving_p99,
        "the same without moves",
        quiet_p99,
        Wanted::Shown,
    );
    table.add(
        "longest wait of a conversation, moves, p99",
        "ms",
        moving_p99,
        "limit",
        PAUSE_MS_MAX,
        Wanted::AtMost(1.0),
    );
    Ok(())
}

/// Everybody writes to his neighbours in turn, at a constant rate that waits for nobody.
async fn send(clients: Arc<Vec<Client>>, names: Vec<String>) {
    let start = Instant::now();
    let tag = rand::random::<u32>();
    for number in 0u64.. {
        let scheduled = start + Duration::from_nanos(number * 1_000_000_000 / RATE);
        sleep_until(scheduled).await;
        let from = number as usize % PEOPLE;
        let to = (from + 1 + (number as usize / PEOPLE) % PEERS) % PEOPLE;
        let mut message = Message::new(format!("{tag:08x}{number:08x}"), format!("u/{}", names[to]), vec![b'x'; 100]);
        message.scheduled = scheduled;
        // A queue that is full shows as a long wait.
        let _ = clients[from].try_publish(message);
    }
}

/// Waits until so many members share the shards and nothing moves.
async fn spread(bench: &Bench, cluster: &Cluster, members: usize) -> Outcome {
    eventually(&format!("{members} business members share the shards"), async || {
        let status = cluster.status(bench).await.ok()?;
        let shards = status.get("shards")?;
        let per_member: Vec<u64> = shards.get("perMember")?.as_object()?.values().filter_map(Value::as_u64).collect();
        let owners = per_member.iter().filter(|count| **count > 0).count();
        let moving = shards.get("moving")?.as_u64()? + shards.get("queued")?.as_u64()?;
        let even = per_member.iter().max()? * members as u64 <= shards.get("total")?.as_u64()? * 4 / 3;
        (owners == members && moving == 0 && even).then_some(())
    })
    .await?;
    cluster.settled(members as u32).await
}
