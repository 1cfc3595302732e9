//! Scenes of live rooms: ten thousand people enter while it chats, several gateways, a hot room beside a thousand cold ones.

use std::time::Duration;

use im_e2e::audience::{self, Attention, Clock, Programme, Reader, Seat};
use serde_json::Value;
use tokio::time::sleep;

use crate::crowd::{Crowd, PAYLOAD_BYTES};
use crate::peers::{beside_servers, give_servers_processor};
use crate::rooms::VIEWERS;
use crate::system::{Bench, Cluster, Shape, cpu_seconds};
use crate::{Outcome, Table, Wanted};

const ENTRANTS: u32 = 10_000;
const ENTRANTS_PER_SECOND: u32 = 2_000;
/// Messages per second into a room that people enter. Each goes to all of them.
const CHAT_RATE: u32 = 10;
/// With each gateway come so many viewers; messages per second into their room.
const VIEWERS_PER_GATEWAY: usize = 500;
const GATEWAYS_RATES: [f64; 2] = [40.0, 300.0];
const TIME: Duration = Duration::from_secs(5);
const COLD_ROOMS: usize = 1_000;
/// Messages per second into all cold rooms together. The hot one gets half of what it could carry.
const COLD_RATE: f64 = 500.0;
/// Rounds without and with the hot room, in turn.
const ROUNDS: usize = 3;

/// A wave of people enters one room while it chats.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn wave(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(async {
        let cluster = Cluster::start(bench, "wave", 1).await?;
        let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway runs")?.pid;
        give_servers_processor(gateway).await?;
        let text = format!(
            "room --mqtt {} --viewers {ENTRANTS} --enter-rate {ENTRANTS_PER_SECOND} --chat-rate {CHAT_RATE} --parallel 1000 --duration 10",
            cluster.mqtt
        );
        let arguments: Vec<String> = text.split(' ').map(str::to_owned).collect();
        let output = bench.imload(&arguments).stdin(std::process::Stdio::null()).output().await?;
        // Its exit code says that something was lost; the figures say how much.
        let result: Value = serde_json::from_slice(&output.stdout)?;
        cluster.stop().await?;
        let number = |path: &str| {
            result.pointer(path).and_then(Value::as_f64).ok_or_else(|| format!("imload's result has no {path}"))
        };
        let (entering, quiet) = (number("/entering/chatMillis/p99")?, number("/stay/1/chatMillis/p99")?);
        let rate = f64::from(ENTRANTS) / number("/entering/seconds")?;
        let asked = f64::from(ENTRANTS_PER_SECOND);
        table.add("people who entered one room", "/s", rate, "asked for", asked, Wanted::AtLeast(0.95));
        let name = "chat p99 while 10,000 enter";
        table.add(name, "ms", entering, "when all are in and quiet", quiet, Wanted::AtMost(2.0));
        let wrong = number("/lost")? + number("/reordered")? + number("/broken")?;
        table.add("… messages missed by somebody in the room", "", wrong, "received", number("/received")?, Wanted::AtMost(0.0));
        Ok(())
    })
    .await
}

/// What a delivery costs the gateways together when there are four, each with as many viewers as the one.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn gateways(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(async {
        let mut costs = Vec::new();
        for gateways in [1_u32, 4] {
            let cluster = Cluster::start_with(bench, "gateways", Shape { business: 1, gateways, gateway: "" }).await?;
            let mut crowd = Crowd::enter(cluster.mqtt, VIEWERS_PER_GATEWAY * gateways as usize).await?;
            let members = cluster.members_of("gateway")?;
            for member in &members {
                give_servers_processor(member.pid).await?;
            }
            let used = || -> f64 { members.iter().map(|member| cpu_seconds(member.pid)).sum() };
            for rate in GATEWAYS_RATES {
                let mut of_this = Vec::new();
                for _ in 0..ROUNDS {
                    let (before, delivered) = (used(), crowd.delivered());
                    let step = crowd.step(rate, TIME).await?;
                    eprintln!("  {gateways} gateways: {step:?}");
                    of_this.push((used() - before) * 1e6 / (crowd.delivered() - delivered).max(1) as f64);
                }
                costs.push(median(of_this));
            }
            drop(crowd);
            cluster.stop().await?;
        }
        let (one, four) = costs.split_at(GATEWAYS_RATES.len());
        for (rate, (one, four)) in GATEWAYS_RATES.into_iter().zip(one.iter().zip(four)) {
            let name = format!("CPU per delivery at {rate:.0}/s, 4 gateways, 500 viewers each");
            table.add(name, "µs", *four, "1 gateway", *one, Wanted::AtMost(1.1));
        }
        Ok(())
    })
    .await
}

/// How late messages of a thousand small rooms are beside one with a thousand viewers, on the same gateway.
///
/// # Errors
/// What could not be started or did not answer.
pub async fn hot_and_cold(bench: &Bench, table: &mut Table) -> Outcome {
    beside_servers(async {
        let cluster = Cluster::start(bench, "cold", 1).await?;
        let gateway = cluster.members_of("gateway")?.first().ok_or("no gateway runs")?.pid;
        give_servers_processor(gateway).await?;
        let mut cold = ColdRooms::enter(&cluster).await?;
        let mut hot = Crowd::enter(cluster.mqtt, VIEWERS).await?;
        let hot_rate = hot.highest_rate().await?.rate / 2.0;
        let (mut alone, mut beside) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            alone.push(cold.p99_ms().await?);
            let (step, p99_ms) = tokio::try_join!(hot.step(hot_rate, TIME), cold.p99_ms())?;
            eprintln!("  the hot room at {hot_rate:.0}/s: {step:?}");
            beside.push(p99_ms);
        }
        table.add(
            "delivery p99 of 1,000 cold rooms beside a hot one",
            "ms",
            median(beside),
            "alone",
            median(alone),
            Wanted::AtMost(2.0),
        );
        cold.all_came()?;
        drop((hot, cold));
        cluster.stop().await
    })
    .await
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Many rooms with a viewer each, and somebody who talks in all of them in turn.
struct ColdRooms {
    clock: Clock,
    reader: Reader,
    seats: Vec<Seat>,
    star: std::net::TcpStream,
    topics: Vec<String>,
    published: u64,
}

impl ColdRooms {
    async fn enter(cluster: &Cluster) -> Outcome<Self> {
        let clock = Clock::default();
        let reader = Reader::start(clock, Duration::from_millis(2));
        let topics: Vec<String> = (0..COLD_ROOMS).map(|number| format!("r/cold{number}")).collect();
        let mut seats = Vec::with_capacity(COLD_ROOMS);
        for (number, topic) in topics.iter().enumerate() {
            let stream = audience::enter(cluster.mqtt, &format!("cold{number}"), None, Some(topic)).await?;
            seats.push(reader.seat(stream, Attention::Full, 0));
        }
        let star = audience::enter(cluster.mqtt, "colds", None, None).await?;
        Ok(Self { clock, reader, seats, star, topics, published: 0 })
    }

    async fn p99_ms(&mut self) -> Outcome<f64> {
        self.reader.take_delays();
        let (star, clock, topics) = (self.star.try_clone()?, self.clock, self.topics.clone());
        // Whole rounds, so that each room's numbers go on.
        let first = self.published / COLD_ROOMS as u64 + 1;
        let rounds = (TIME.as_secs_f64() * COLD_RATE / COLD_ROOMS as f64).floor().max(1.0);
        let time = Duration::from_secs_f64(rounds * COLD_ROOMS as f64 / COLD_RATE);
        let publish = move || {
            let programme = Programme { topics: &topics, first, bytes: PAYLOAD_BYTES, per_second: COLD_RATE, time };
            audience::publish(&star, clock, &programme)
        };
        let published = tokio::task::spawn_blocking(publish).await??;
        self.published += published.due;
        sleep(Duration::from_millis(300)).await;
        Ok(self.reader.take_delays().most.value_at_quantile(0.99) as f64 / 1e3)
    }

    fn all_came(&self) -> Outcome {
        let came: u64 = self.seats.iter().map(|seat| seat.seen.of(|seen| &seen.messages)).sum();
        if came == self.published { Ok(()) } else { Err(format!("of {} messages {came} came", self.published).into()) }
    }
}
