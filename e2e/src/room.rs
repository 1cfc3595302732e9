//! `imload room`: people enter a live room in a wave, listen to its star, like, leave, come back; some have slow links. Every message that
//! somebody missed, or got out of order, while he was in the room is counted.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use clap::Args;
use futures::{StreamExt, stream};
use hyper::Method;
use im_e2e::api::{Api, Credential};
use im_e2e::audience::{self, Attention, Clock, Delays, EnterError, Reader, Seat};
use im_e2e::client::{Client, Message, Options, Outcome};
use im_e2e::wire::{self, Publish, Version};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::{Instant, interval, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::{LoadError, Target, latency_json, latency_line, stop_on_ctrl_c};

/// So many, spread over all who enter, look at their sockets often, for the delays.
const ATTENTIVE: u32 = 100;
const ATTENTIVE_PAUSE: Duration = Duration::from_millis(1);
const OTHERS_PAUSE: Duration = Duration::from_millis(50);
/// What was published last has so long to reach everybody.
const UNDER_WAY_MAX: Duration = Duration::from_secs(10);
/// A message that is refused for now is sent again.
const AGAIN_AFTER: Duration = Duration::from_millis(20);
const LIKES_PAUSE: Duration = Duration::from_millis(50);
/// One viewer in so many stays to the end, however many leave: only who stays likes, so that each like is known to have arrived.
const FAN_EVERY: usize = 10;

#[derive(Args)]
pub(super) struct Room {
    #[command(flatten)]
    target: Target,
    /// HTTP address of a gateway: the room's likes are compared with those sent. Without it they are not.
    #[arg(long)]
    http: Option<SocketAddr>,
    /// Name of the room; one of its own without.
    #[arg(long)]
    room: Option<String>,
    /// People who enter.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=19_000))]
    viewers: u32,
    /// How many log in and enter per second.
    #[arg(long, default_value_t = 500.0)]
    enter_rate: f64,
    /// Logins under way at a time.
    #[arg(long, default_value_t = 200)]
    parallel: usize,
    /// Messages per second, from before the first enters until the end.
    #[arg(long, default_value_t = 10.0)]
    chat_rate: f64,
    /// Bytes of a message.
    #[arg(long, default_value_t = 128)]
    payload: usize,
    /// Likes per second of all viewers together.
    #[arg(long, default_value_t = 0.0)]
    likes: f64,
    /// Of the viewers, so many have slow links.
    #[arg(long, default_value_t = 0)]
    slow: u32,
    /// What a slow link carries, bytes per second.
    #[arg(long, default_value_t = 1_000)]
    slow_bytes: usize,
    /// People who leave per second while the others stay; as many come.
    #[arg(long, default_value_t = 0.0)]
    leave_rate: f64,
    /// After half of the time so many connections break at once, and all of them come back as fast as `--parallel` allows.
    #[arg(long, default_value_t = 0)]
    storm: u32,
    /// Seconds that the room goes on after all have entered.
    #[arg(long, default_value_t = 10)]
    duration: u64,
}

/// What is counted over the whole evening, of those who left, too.
#[derive(Debug, Default)]
struct Counts {
    received: u64,
    lost: u64,
    reordered: u64,
    /// Connections that ended without having been told to.
    broken: u64,
    slow_received: u64,
    slow_lost: u64,
    slow_reordered: u64,
}

/// Who sits where.
struct Place {
    seat: Seat,
    is_slow: bool,
}

struct Hall {
    command: Room,
    tag: String,
    topic: String,
    clock: Clock,
    attentive: Reader,
    others: Reader,
    places: Mutex<BTreeMap<u32, Place>>,
    counts: Mutex<Counts>,
    /// The number of the last message that was begun to be sent, and of the last one that was taken.
    begun: AtomicU64,
    taken: AtomicU64,
    refused: AtomicU64,
    likes_sent: AtomicU64,
    is_chat_over: AtomicBool,
}

pub(super) async fn run(command: Room) -> Result<bool, LoadError> {
    let stop = stop_on_ctrl_c();
    let clock = Clock::default();
    let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
    let name = command.room.clone().unwrap_or_else(|| format!("hall.{tag}"));
    let hall = Arc::new(Hall {
        topic: format!("r/{name}"),
        tag,
        clock,
        attentive: Reader::start(clock, ATTENTIVE_PAUSE),
        others: Reader::start(clock, OTHERS_PAUSE),
        places: Mutex::default(),
        counts: Mutex::default(),
        begun: AtomicU64::new(0),
        taken: AtomicU64::new(0),
        refused: AtomicU64::new(0),
        likes_sent: AtomicU64::new(0),
        is_chat_over: AtomicBool::new(false),
        command,
    });
    let (json, viewers) = (hall.command.target.json, hall.command.viewers);
    let chat = tokio::spawn(hall.clone().chat());
    let begun = Instant::now();
    hall.enter_all((0..viewers).collect(), Some(hall.command.enter_rate)).await?;
    let entering = Phase { seconds: begun.elapsed().as_secs_f64(), delays: hall.attentive.take_delays() };
    if !json {
        println!("{viewers} people are in after {:.1} s; chat meanwhile: {}", entering.seconds, entering.line());
    }

    let fans = AbortOnDropHandle::new(tokio::spawn(hall.clone().like()));
    let half = Duration::from_secs_f64(hall.command.duration as f64 / 2.0);
    let is_stopped = || stop.load(Ordering::Relaxed);
    let mut next = viewers;
    let first = hall.stay(half, &mut next, &is_stopped).await?;
    let storm = if hall.command.storm > 0 && !is_stopped() { Some(hall.storm().await?) } else { None };
    let second = hall.stay(half, &mut next, &is_stopped).await?;
    drop(fans);

    hall.is_chat_over.store(true, Ordering::Relaxed);
    if chat.await.is_err() {
        return Err(LoadError::Room("the star's task ended".to_owned()));
    }
    hall.all_heard().await;
    let liked = hall.likes_counted().await?;
    hall.close();
    let counts = hall.counts.lock();
    let likes_sent = hall.likes_sent.load(Ordering::Relaxed);
    let likes_agree = liked.is_none_or(|liked| liked == likes_sent);
    let published = hall.taken.load(Ordering::Relaxed);
    let is_silent = counts.received == 0 && published > 0;
    let is_good =
        counts.lost + counts.reordered + counts.broken + counts.slow_reordered == 0 && likes_agree && !is_silent;
    if json {
        println!(
            "{}",
            json!({
                "published": published, "refused": hall.refused.load(Ordering::Relaxed),
                "entered": next, "received": counts.received, "lost": counts.lost, "reordered": counts.reordered,
                "broken": counts.broken,
                "slow": { "received": counts.slow_received, "lost": counts.slow_lost, "reordered": counts.slow_reordered },
                "likes": { "sent": likes_sent, "counted": liked },
                "entering": entering.json(), "stay": [first.json(), second.json()],
                "storm": storm.as_ref().map(Phase::json), "clean": is_good,
            })
        );
        return Ok(is_good);
    }
    println!("first half   {}", first.line());
    if let Some(storm) = &storm {
        println!(
            "{} people are back after {:.1} s; chat meanwhile: {}",
            hall.command.storm,
            storm.seconds,
            storm.line()
        );
    }
    println!("second half  {}", second.line());
    println!(
        "published {published}, received {}, lost {}, out of order {}, connections broken {}",
        counts.received, counts.lost, counts.reordered, counts.broken
    );
    if hall.command.slow > 0 {
        println!(
            "slow links: received {}, lost {} (as they have to), out of order {}",
            counts.slow_received, counts.slow_lost, counts.slow_reordered
        );
    }
    if let Some(liked) = liked {
        println!("likes sent {likes_sent}, counted {liked}");
    }
    println!("{}", if is_good { "clean: nobody who kept up missed anything" } else { "NOT CLEAN" });
    Ok(is_good)
}

/// How late the chat was for those who looked at it often, in one part of the evening.
struct Phase {
    seconds: f64,
    delays: Delays,
}

impl Phase {
    fn json(&self) -> Value {
        json!({
            "seconds": self.seconds,
            "chatMillis": latency_json(&self.delays.most), "chatMillisAtLeast": latency_json(&self.delays.least),
        })
    }

    fn line(&self) -> String {
        latency_line(&self.delays.most)
    }
}

impl Hall {
    /// The star talks at an open rate; each message has the number after the last one that was taken.
    async fn chat(self: Arc<Self>) {
        if self.command.chat_rate <= 0.0 {
            return;
        }
        let name = format!("star.{}", self.tag);
        let mut options = Options::new(self.command.target.mqtt, name.clone(), name);
        options.password.clone_from(&self.command.target.password);
        options.session_expiry_seconds = 0;
        options.subscriptions.clear();
        let star = Client::start(options, Arc::new(()));
        let begun = Instant::now();
        for number in 1.. {
            let due = begun + Duration::from_secs_f64(number as f64 / self.command.chat_rate);
            sleep_until(due).await;
            if self.is_chat_over.load(Ordering::Relaxed) {
                break;
            }
            // Stamped when it is due: a server that keeps the star waiting is late for that, too.
            let late_us = u64::try_from(due.elapsed().as_micros()).unwrap_or(u64::MAX);
            let payload = audience::payload(number, self.clock.now_us().saturating_sub(late_us), self.command.payload);
            self.begun.store(number, Ordering::Relaxed);
            let mut message = Message::new("", self.topic.clone(), payload);
            message.id = None;
            loop {
                match star.publish(message.clone()).await {
                    Ok(Outcome::Stored { .. }) => break,
                    Ok(Outcome::Refused { .. }) => {
                        self.refused.fetch_add(1, Ordering::Relaxed);
                        sleep(AGAIN_AFTER).await;
                    }
                    Err(_) => return,
                }
            }
            self.taken.store(number, Ordering::Relaxed);
        }
        star.stop().await;
    }

    /// Lets people in, so many per second, or as fast as may be.
    async fn enter_all(&self, people: Vec<u32>, per_second: Option<f64>) -> Result<(), LoadError> {
        let begun = Instant::now();
        let entering = stream::iter(people.into_iter().enumerate()).map(|(at, person)| async move {
            if let Some(per_second) = per_second {
                sleep_until(begun + Duration::from_secs_f64(at as f64 / per_second)).await;
            }
            self.enter(person).await
        });
        let mut entering = entering.buffer_unordered(self.command.parallel.max(1));
        while let Some(entered) = entering.next().await {
            entered.map_err(|source| LoadError::Room(source.to_string()))?;
        }
        Ok(())
    }

    async fn enter(&self, person: u32) -> Result<(), EnterError> {
        let Target { mqtt, password, .. } = &self.command.target;
        let name = format!("v{person}.{}", self.tag);
        let stream = audience::enter(*mqtt, &name, password.as_deref(), Some(&self.topic)).await?;
        let entered_after = self.begun.load(Ordering::Relaxed);
        let is_slow = person < self.command.slow;
        let sweeps_per_second = 1_000 / OTHERS_PAUSE.as_millis() as usize;
        let seat = if is_slow {
            let bytes_per_sweep = (self.command.slow_bytes / sweeps_per_second).max(1);
            self.others.seat(stream, Attention::Slow { bytes_per_sweep }, entered_after)
        } else if person.is_multiple_of((self.command.viewers / ATTENTIVE).max(1)) {
            self.attentive.seat(stream, Attention::Full, entered_after)
        } else {
            self.others.seat(stream, Attention::Full, entered_after)
        };
        self.places.lock().insert(person, Place { seat, is_slow });
        Ok(())
    }

    /// Time passes; some leave, and others come in their places.
    async fn stay(&self, time: Duration, next: &mut u32, is_stopped: &impl Fn() -> bool) -> Result<Phase, LoadError> {
        self.attentive.take_delays();
        let (begun, mut left) = (Instant::now(), 0_u64);
        let mut tick = interval(Duration::from_millis(100));
        while begun.elapsed() < time && !is_stopped() {
            tick.tick().await;
            let due = (begun.elapsed().as_secs_f64() * self.command.leave_rate) as u64;
            for _ in left..due {
                let Some(person) = self.somebody_not_a_fan() else { break };
                self.goes(person, Seat::leave);
                self.enter_all(vec![*next], None).await?;
                *next += 1;
            }
            left = due;
        }
        Ok(Phase { seconds: begun.elapsed().as_secs_f64(), delays: self.attentive.take_delays() })
    }

    /// Who has been here longest and may leave.
    fn somebody_not_a_fan(&self) -> Option<u32> {
        let places = self.places.lock();
        places.iter().find(|(person, place)| !place.is_slow && !is_fan(**person)).map(|(person, _)| *person)
    }

    /// Connections break, and all of them come back at once.
    async fn storm(&self) -> Result<Phase, LoadError> {
        let people: Vec<u32> = {
            let places = self.places.lock();
            let leavers = places.iter().filter(|(person, place)| !place.is_slow && !is_fan(**person));
            leavers.map(|(person, _)| *person).take(self.command.storm as usize).collect()
        };
        self.attentive.take_delays();
        for person in &people {
            self.goes(*person, drop);
        }
        let begun = Instant::now();
        self.enter_all(people, None).await?;
        Ok(Phase { seconds: begun.elapsed().as_secs_f64(), delays: self.attentive.take_delays() })
    }

    fn goes(&self, person: u32, how: impl FnOnce(Seat)) {
        if let Some(place) = self.places.lock().remove(&person) {
            self.count(&place);
            how(place.seat);
        }
    }

    fn count(&self, place: &Place) {
        let seen = &place.seat.seen;
        let [received, lost, reordered] = [seen.of(|s| &s.messages), seen.of(|s| &s.lost), seen.of(|s| &s.reordered)];
        let mut counts = self.counts.lock();
        counts.broken += u64::from(seen.is_closed());
        if place.is_slow {
            counts.slow_received += received;
            counts.slow_lost += lost;
            counts.slow_reordered += reordered;
        } else {
            counts.received += received;
            counts.lost += lost;
            counts.reordered += reordered;
        }
    }

    /// Fans like in turn.
    async fn like(self: Arc<Self>) {
        let topic = format!("{}/like", self.topic);
        let publish =
            Publish { topic: &topic, payload: b"", qos: 0, retain: false, dup: false, packet_id: 0, id: None };
        let mut packet = BytesMut::new();
        wire::encode_publish(Version::V311, &publish, &mut packet);
        let (begun, mut liked) = (Instant::now(), 0_u64);
        let mut tick = interval(LIKES_PAUSE);
        loop {
            tick.tick().await;
            let due = (begun.elapsed().as_secs_f64() * self.command.likes) as u64;
            let places = self.places.lock();
            let fans: Vec<&Place> = places
                .iter()
                .filter(|(person, place)| !place.is_slow && is_fan(**person))
                .map(|(_, place)| place)
                .collect();
            for number in liked..due {
                let Some(fan) = fans.get((number % fans.len().max(1) as u64) as usize) else { break };
                if fan.seat.write(&packet) {
                    self.likes_sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            liked = due;
        }
    }

    /// Waits until the last message reached everybody who keeps up, for a while.
    async fn all_heard(&self) {
        let (last, until) = (self.taken.load(Ordering::Relaxed), Instant::now() + UNDER_WAY_MAX);
        let is_behind = |place: &Place| {
            let seen = &place.seat.seen;
            !place.is_slow && !seen.is_closed() && seen.of(|seen| &seen.last) < last
        };
        while Instant::now() < until && self.places.lock().values().any(is_behind) {
            sleep(Duration::from_millis(20)).await;
        }
        // What did not come by now is lost.
        let behind = |place: &Place| last.saturating_sub(place.seat.seen.of(|seen| &seen.last));
        let missing: u64 = self.places.lock().values().filter(|place| is_behind(place)).map(behind).sum();
        self.counts.lock().lost += missing;
    }

    /// The likes that the room says, once they are those sent, or after a while.
    async fn likes_counted(&self) -> Result<Option<u64>, LoadError> {
        let Some(http) = self.command.http else { return Ok(None) };
        let who = match &self.command.target.password {
            Some(token) => Credential::Bearer(token.clone()),
            None => Credential::Insecure(format!("star.{}", self.tag)),
        };
        let path = format!("/v1/rooms/{}", self.topic.trim_start_matches("r/"));
        let (until, sent) = (Instant::now() + UNDER_WAY_MAX, self.likes_sent.load(Ordering::Relaxed));
        loop {
            let answer = Api::new(http).request(Method::GET, &path, &who, None).await;
            let room = answer.map_err(|error| LoadError::Room(error.to_string()))?;
            let counted = room["likes"].as_u64().unwrap_or(0);
            if counted >= sent || Instant::now() > until {
                return Ok(Some(counted));
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn close(&self) {
        for place in std::mem::take(&mut *self.places.lock()).into_values() {
            self.count(&place);
            place.seat.leave();
        }
    }
}

fn is_fan(person: u32) -> bool {
    (person as usize).is_multiple_of(FAN_EVERY)
}
