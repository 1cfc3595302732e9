//! One publisher and many viewers of a live room, at a server that may be anybody's: what it carries, and how late.
//!
//! The procedure. Messages are published at an open rate; each carries its number and the time at which it was due. A rate is *carried* in
//! a step if the publisher kept its schedule, every viewer got every byte, no number is missing or out of order, and the p99 of the delay
//! from due to read is at most [`LATE`]. A rate counts if it was carried in two steps of at most three. The highest is searched by
//! doubling until two rates in succession are not carried (one alone may be the machine's fault), then by bisection. Whatever rejects a step is blamed on the client if its own threads were late.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use im_e2e::audience::{self, Attention, Clock, Programme, Published, Reader, Seat, Seen};
use tokio::time::{Instant, sleep};

use crate::Outcome;

/// The room, and what is published into it.
pub const TOPIC: &str = "r/stage";
/// Bytes of a message's payload.
pub const PAYLOAD_BYTES: usize = 128;
/// A rate is carried while deliveries are no later than this.
pub const LATE: Duration = Duration::from_millis(100);

/// One viewer in so many looks at each message; the others count bytes.
const ATTENTIVE_EVERY: usize = 50;
const ATTENTIVE_PAUSE: Duration = Duration::from_millis(1);
const COUNTING_PAUSE: Duration = Duration::from_millis(10);
/// Viewers whose bytes nobody took for so long may have lost messages because of that.
const SWEEP_MAX: Duration = Duration::from_millis(60);
/// A publisher later than this is no measurement of a server.
const OWN_LAG_MAX: Duration = Duration::from_millis(50);
const DOUBLING_STEP: Duration = Duration::from_millis(700);
const BISECTION_STEP: Duration = Duration::from_millis(1_500);
/// How long messages may be under way after a step before they count as lost.
const UNDER_WAY_MAX: Duration = Duration::from_secs(15);
/// The search ends when the next rate that is not carried is no higher than this times the highest that is.
const PRECISION: f64 = 1.1;

/// Viewers, how they are read for, and their publisher.
pub struct Crowd {
    server: SocketAddr,
    clock: Clock,
    attentive: Reader,
    counting: Reader,
    seats: Vec<Seat>,
    star: TcpStream,
    /// Of the last message.
    number: u64,
}

/// How many messages came in how many pieces.
#[derive(Debug, Clone, Copy, Default)]
pub struct Joined {
    messages: u64,
    pieces: u64,
}

impl Joined {
    /// Messages in a piece, since an earlier time.
    pub fn since(self, earlier: Self) -> f64 {
        (self.messages - earlier.messages) as f64 / (self.pieces - earlier.pieces).max(1) as f64
    }
}

/// What came of one rate.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The p99 of the delay at most, milliseconds.
    pub p99_ms: f64,
    /// The same at least: what is between them is the reader's lag.
    pub p99_least_ms: f64,
    /// What is to be thought of it.
    pub verdict: Verdict,
}

/// What a step says of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// All arrived in time.
    Carried,
    /// Something was lost, out of order or late, or the publisher was held up.
    Rejected,
    /// The same, but the client's own threads may be the reason.
    ClientLimited,
}

/// The highest rate that was found.
#[derive(Debug, Clone, Copy)]
pub struct Highest {
    /// Messages per second.
    pub rate: f64,
    /// Deliveries per second.
    pub deliveries_per_second: f64,
    /// The server may carry more: what rejected the next rate was the client's limit.
    pub is_at_least: bool,
}

impl Crowd {
    /// Lets so many viewers in.
    pub async fn enter(server: SocketAddr, viewers: usize) -> Outcome<Self> {
        let clock = Clock::default();
        let (attentive, counting) = (Reader::start(clock, ATTENTIVE_PAUSE), Reader::start(clock, COUNTING_PAUSE));
        let star = audience::enter(server, "star", None, None).await?;
        let mut crowd = Self { server, clock, attentive, counting, seats: Vec::new(), star, number: 0 };
        for number in 0..viewers {
            let seat = crowd.seat(number).await?;
            crowd.seats.push(seat);
        }
        Ok(crowd)
    }

    async fn seat(&self, number: usize) -> Outcome<Seat> {
        let stream = audience::enter(self.server, &format!("viewer{number}"), None, Some(TOPIC)).await?;
        Ok(match number % ATTENTIVE_EVERY {
            0 => self.attentive.seat(stream, Attention::Full, self.number),
            _ => self.counting.seat(stream, Attention::Counts, self.number),
        })
    }

    /// Lets those in again whom an overloaded server put out.
    async fn return_all(&mut self) -> Outcome {
        for number in 0..self.seats.len() {
            if self.seats[number].seen.is_closed() {
                self.seats[number] = self.seat(number).await?;
            }
        }
        Ok(())
    }

    /// Messages that all viewers together got so far.
    pub fn delivered(&self) -> u64 {
        let packet = packet_bytes();
        self.seats.iter().map(|seat| seat.seen.of(|seen| &seen.bytes) / packet).sum()
    }

    /// Messages that a write carried so far, as the attentive saw it.
    pub fn joined(&self) -> Joined {
        let attentive = self.seats.iter().step_by(ATTENTIVE_EVERY);
        attentive.fold(Joined::default(), |sum, seat| Joined {
            messages: sum.messages + seat.seen.of(|seen| &seen.messages),
            pieces: sum.pieces + seat.seen.of(|seen| &seen.pieces),
        })
    }

    /// Publishes at a rate for a while and waits for what is under way.
    pub async fn step(&mut self, per_second: f64, time: Duration) -> Outcome<Step> {
        let bytes: Vec<u64> = self.seats.iter().map(|seat| seat.seen.of(|seen| &seen.bytes)).collect();
        let wrong = self.wrong();
        self.attentive.take_delays();
        for reader in [&self.attentive, &self.counting] {
            reader.take_longest_sweep();
        }
        let (star, clock, first) = (self.star.try_clone()?, self.clock, self.number + 1);
        let publish = move || {
            let topics = [TOPIC.to_owned()];
            audience::publish(
                &star,
                clock,
                &Programme { topics: &topics, first, bytes: PAYLOAD_BYTES, per_second, time },
            )
        };
        let published = tokio::task::spawn_blocking(publish).await??;
        self.number += published.due;
        let wanted = published.due * packet_bytes();
        let got = |crowd: &Self| -> u64 {
            let seats = std::iter::zip(&crowd.seats, &bytes);
            seats.map(|(seat, before)| seat.seen.of(|seen| &seen.bytes) - before).sum()
        };
        let all = wanted * self.seats.len() as u64;
        let (until, mut quiet) = (Instant::now() + UNDER_WAY_MAX, 0);
        let mut last = got(self);
        // What is lost does not come any more; what is late must not count in the next step.
        while last < all && quiet < 25 && Instant::now() < until {
            sleep(Duration::from_millis(10)).await;
            let now = got(self);
            quiet = if now == last { quiet + 1 } else { 0 };
            last = now;
        }
        let is_complete = std::iter::zip(&self.seats, &bytes)
            .all(|(seat, before)| seat.seen.of(|seen| &seen.bytes) - before == wanted);
        let delays = self.attentive.take_delays();
        let p99 = |delays: &hdrhistogram::Histogram<u64>| Duration::from_micros(delays.value_at_quantile(0.99));
        let observed = Observed {
            is_complete: is_complete && wrong == self.wrong(),
            least: p99(&delays.least),
            most: p99(&delays.most),
            longest_sweep: self.attentive.take_longest_sweep().max(self.counting.take_longest_sweep()),
            published,
        };
        self.return_all().await?;
        if !published.is_complete {
            self.star = audience::enter(self.server, "star", None, None).await?;
        }
        Ok(Step {
            p99_ms: observed.most.as_secs_f64() * 1e3,
            p99_least_ms: observed.least.as_secs_f64() * 1e3,
            verdict: observed.verdict(),
        })
    }

    /// Numbers that were missing or out of order so far, and connections that ended.
    fn wrong(&self) -> u64 {
        let wrong = |seen: &Seen| seen.of(|seen| &seen.lost) + seen.of(|seen| &seen.reordered);
        self.seats.iter().map(|seat| wrong(&seat.seen) + u64::from(seat.seen.is_closed())).sum()
    }

    /// The highest rate that is carried. At most some forty steps.
    pub async fn highest_rate(&mut self) -> Outcome<Highest> {
        let mut search = Search::from(50.0);
        let mut highest = Highest { rate: 0.0, deliveries_per_second: 0.0, is_at_least: false };
        while let Some(rate) = search.next() {
            let time = if search.is_doubling() { DOUBLING_STEP } else { BISECTION_STEP };
            let step = self.step(rate, time).await?;
            let Step { p99_ms, p99_least_ms, verdict } = step;
            eprintln!("  {rate:.0}/s: {verdict:?}, p99 {p99_least_ms:.1} to {p99_ms:.1} ms");
            match search.tell(step.verdict == Verdict::Carried) {
                Some(true) => (highest.rate, highest.deliveries_per_second) = (rate, rate * self.seats.len() as f64),
                Some(false) => highest.is_at_least = step.verdict == Verdict::ClientLimited,
                None => {}
            }
        }
        Ok(highest)
    }
}

/// Bytes of a PUBLISH as every server sends it.
fn packet_bytes() -> u64 {
    (1 + 2 + 2 + TOPIC.len() + PAYLOAD_BYTES) as u64
}

/// What was seen in a step.
struct Observed {
    is_complete: bool,
    least: Duration,
    most: Duration,
    longest_sweep: Duration,
    published: Published,
}

impl Observed {
    fn verdict(&self) -> Verdict {
        let is_held_up = !self.published.is_complete || self.published.held_up > LATE;
        let is_carried = self.is_complete && self.most <= LATE && !is_held_up && self.published.own_lag <= OWN_LAG_MAX;
        let is_ours = self.published.own_lag > OWN_LAG_MAX
            || (!self.is_complete && self.longest_sweep > SWEEP_MAX)
            || (self.is_complete && self.least <= LATE && !is_held_up);
        match (is_carried, is_ours) {
            (true, _) => Verdict::Carried,
            (false, true) => Verdict::ClientLimited,
            (false, false) => Verdict::Rejected,
        }
    }
}

/// Which rate is tried next: twice the last one until two in succession are not carried, then the (geometric) middle between the highest
/// that is and the lowest above it that is not. Each rate is tried until it was carried twice or rejected twice.
#[derive(Debug)]
struct Search {
    rate: f64,
    carried: u32,
    rejected: u32,
    low: Option<f64>,
    /// Rejected, but not believed before twice this rate is rejected, too.
    doubted: Option<f64>,
    high: Option<f64>,
}

impl Search {
    fn from(rate: f64) -> Self {
        Self { rate, carried: 0, rejected: 0, low: None, doubted: None, high: None }
    }

    fn is_doubling(&self) -> bool {
        self.high.is_none()
    }

    /// The rate to try; `None` when the search is over.
    fn next(&self) -> Option<f64> {
        let is_over = match (self.low, self.high) {
            (Some(low), Some(high)) => high <= low * PRECISION,
            // Not even a trickle.
            (None, Some(high)) => high < 1.0,
            _ => false,
        };
        (!is_over).then_some(self.rate)
    }

    /// What came of it; gives the judgement of the rate when there is one.
    fn tell(&mut self, is_carried: bool) -> Option<bool> {
        let count = if is_carried { &mut self.carried } else { &mut self.rejected };
        *count += 1;
        if *count < 2 {
            return None;
        }
        (self.carried, self.rejected) = (0, 0);
        match (is_carried, self.high, self.doubted) {
            (true, ..) => (self.low, self.doubted) = (Some(self.rate), None),
            (false, None, None) => self.doubted = Some(self.rate),
            (false, None, Some(doubted)) => self.high = Some(doubted),
            (false, Some(_), _) => self.high = Some(self.rate),
        }
        self.rate = match (self.low, self.high) {
            (Some(low), Some(high)) => (low * high).sqrt(),
            (None, Some(high)) => high / 2.0,
            (_, None) => self.rate * 2.0,
        };
        Some(is_carried)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(limit: f64, mut is_noise: impl FnMut(u32) -> bool) -> (f64, u32) {
        let (mut search, mut steps) = (Search::from(50.0), 0);
        while let Some(rate) = search.next() {
            steps += 1;
            search.tell((rate <= limit) != is_noise(steps));
            assert!(steps < 60, "the search ends");
        }
        (search.low.unwrap_or(0.0), steps)
    }

    #[test]
    fn the_search_finds_the_limit() {
        for limit in [3.0, 50.0, 107.0, 20_000.0] {
            let (rate, _) = found(limit, |_| false);
            assert!(rate <= limit && rate > limit / PRECISION / PRECISION, "{rate} for {limit}");
        }
        assert_eq!(found(0.0, |_| false).0, 0.0);
    }

    #[test]
    fn one_step_that_went_wrong_changes_nothing() {
        let undisturbed = found(9_000.0, |_| false).0;
        for wrong in 1..30 {
            assert_eq!(found(9_000.0, |step| step == wrong).0, undisturbed, "step {wrong}");
        }
    }

    #[test]
    fn a_machine_that_is_away_for_a_whole_rate_changes_nothing_while_rates_are_doubled() {
        let undisturbed = found(9_000.0, |_| false).0;
        for wrong in 1..12 {
            let rate = found(9_000.0, |step| step == wrong || step == wrong + 1).0;
            assert!((rate / undisturbed - 1.0).abs() < PRECISION - 1.0, "steps {wrong} and the next: {rate}");
        }
    }

    #[test]
    fn who_is_to_blame() {
        let ms = Duration::from_millis;
        let published = Published { due: 10, is_complete: true, own_lag: ms(2), held_up: ms(0) };
        let good = || Observed { is_complete: true, least: ms(4), most: ms(6), longest_sweep: ms(12), published };
        assert_eq!(good().verdict(), Verdict::Carried);
        assert_eq!(Observed { is_complete: false, ..good() }.verdict(), Verdict::Rejected);
        assert_eq!(Observed { is_complete: false, longest_sweep: ms(90), ..good() }.verdict(), Verdict::ClientLimited);
        assert_eq!(Observed { least: ms(120), most: ms(130), ..good() }.verdict(), Verdict::Rejected);
        assert_eq!(Observed { least: ms(80), most: ms(130), ..good() }.verdict(), Verdict::ClientLimited);
        let held_up = Published { held_up: ms(300), ..published };
        assert_eq!(Observed { published: held_up, ..good() }.verdict(), Verdict::Rejected);
        let late = Published { own_lag: ms(300), ..published };
        assert_eq!(Observed { published: late, ..good() }.verdict(), Verdict::ClientLimited);
    }
}
