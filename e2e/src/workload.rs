//! What load is made of: a schedule that does not wait for answers, whom people write to, and the journal in which their
//! clients write down all that happens to them.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rand::{Rng, RngExt};
use tokio::time::Instant;

use crate::{
    client::{self, Delivery, Inbox, Message, Observer, Outcome},
    history::{self, ConversationId, History, MessageId, Report, SessionId, UserId, fingerprint},
    wire::Version,
};

/// Remarkable events that the journal keeps for the live view.
const NOTES_MAX: usize = 6;

/// The load of an evening as a share of its peak, over the evening's time from 0 to 1: quiet, rise, peak, fall, quiet.
pub fn evening(time: f64) -> f64 {
    const QUIET: f64 = 0.1;
    let rise = |share: f64| (1.0 - (share.clamp(0.0, 1.0) * std::f64::consts::PI).cos()) / 2.0;
    QUIET + (1.0 - QUIET) * rise((time - 0.12) / 0.28) * (1.0 - rise((time - 0.62) / 0.2))
}

/// How the sends of a schedule lie in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// A Poisson process, as independent people make it.
    Poisson,
    /// All at the same distance (of a constant rate).
    Even,
}

/// An open-rate schedule: when to send, whatever became of the messages before. It is an iterator over the times since its
/// start and draws all its chance from `rng`.
#[derive(Debug)]
pub struct Schedule<R> {
    rng: R,
    spacing: Spacing,
    peak_per_second: f64,
    duration: Duration,
    shape: fn(f64) -> f64,
    now_seconds: f64,
}

impl<R: Rng> Schedule<R> {
    /// A schedule of this length; `shape` gives the share of the peak rate at a time from 0 to 1 (never above 1).
    pub fn new(rng: R, spacing: Spacing, peak_per_second: f64, duration: Duration, shape: fn(f64) -> f64) -> Self {
        Self { rng, spacing, peak_per_second, duration, shape, now_seconds: 0.0 }
    }
}

impl<R: Rng> Iterator for Schedule<R> {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        if self.peak_per_second <= 0.0 {
            return None;
        }
        loop {
            let gap = match self.spacing {
                Spacing::Even => 1.0,
                Spacing::Poisson => -(1.0 - self.rng.random::<f64>()).ln(),
            };
            let level = (self.shape)(self.now_seconds / self.duration.as_secs_f64());
            self.now_seconds += match self.spacing {
                Spacing::Even => gap / (self.peak_per_second * level.max(1e-6)),
                Spacing::Poisson => gap / self.peak_per_second,
            };
            if self.now_seconds >= self.duration.as_secs_f64() {
                return None;
            }
            // Thinning (Lewis and Shedler 1979): candidates come at the peak rate and are kept in proportion.
            let level = (self.shape)(self.now_seconds / self.duration.as_secs_f64());
            if self.spacing == Spacing::Even || self.rng.random::<f64>() < level {
                return Some(Duration::from_secs_f64(self.now_seconds));
            }
        }
    }
}

/// Zipf's law with exponent 1: rank k is drawn in proportion to 1 / (k + 1).
#[derive(Clone, Debug)]
pub struct Zipf {
    cumulative: Vec<f64>,
}

impl Zipf {
    /// A law over ranks 0 to `ranks` - 1; `ranks` must not be 0.
    pub fn new(ranks: usize) -> Self {
        let mut sum = 0.0;
        let cumulative = (0..ranks)
            .map(|rank| {
                sum += 1.0 / (rank + 1) as f64;
                sum
            })
            .collect();
        Self { cumulative }
    }

    /// Draws a rank.
    pub fn draw(&self, rng: &mut impl Rng) -> usize {
        let total = self.cumulative.last().copied().unwrap_or(0.0);
        let point = rng.random::<f64>() * total;
        self.cumulative.partition_point(|reached| *reached <= point).min(self.cumulative.len().saturating_sub(1))
    }
}

/// A payload that begins with the message's id, so that also an MQTT 3.1.1 client knows what it got.
pub fn payload(id: MessageId, bytes: usize) -> Bytes {
    let mut text = format!("{id} ").into_bytes();
    let filler = b"the quick brown fox jumps over the lazy dog ";
    text.extend(filler.iter().cycle().take(bytes.saturating_sub(text.len())));
    Bytes::from(text)
}

fn id_in_payload(payload: &[u8]) -> Option<MessageId> {
    std::str::from_utf8(payload.get(..16)?).ok().and_then(MessageId::parse)
}

/// Counters and latencies of the time since the last look.
#[derive(Debug)]
pub struct Meter {
    /// Messages handed to the network, resends included.
    pub sent: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Messages refused.
    pub refused: u64,
    /// Deliveries.
    pub delivered: u64,
    /// Scheduled → PUBACK, microseconds.
    pub ack_latency: Histogram<u64>,
    /// Scheduled → arrival, microseconds.
    pub delivery_latency: Histogram<u64>,
}

impl Default for Meter {
    fn default() -> Self {
        let histogram = history::new_latency_histogram();
        let (ack_latency, delivery_latency) = (histogram.clone(), histogram);
        Self { sent: 0, acked: 0, refused: 0, delivered: 0, ack_latency, delivery_latency }
    }
}

impl Meter {
    fn reset(&mut self) {
        (self.sent, self.acked, self.refused, self.delivered) = (0, 0, 0, 0);
        self.ack_latency.reset();
        self.delivery_latency.reset();
    }
}

#[derive(Debug, Default)]
struct Pages {
    history: History,
    meter: Meter,
    notes: VecDeque<(Duration, String)>,
}

/// Where all clients of a run write down what happens to them.
#[derive(Debug)]
pub struct Journal {
    start: Instant,
    next_id: AtomicU64,
    pages: Mutex<Pages>,
}

impl Journal {
    /// An empty journal that starts now. Ids of messages begin at a random place, so that runs do not collide.
    pub fn new() -> Arc<Self> {
        let next_id = AtomicU64::new(u64::from(rand::random::<u32>()) << 32);
        Arc::new(Self { start: Instant::now(), next_id, pages: Mutex::default() })
    }

    /// Time since the start.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// A message nobody has sent yet, to `u/{user}` or `g/{group}`.
    pub fn message(&self, topic: impl Into<String>, bytes: usize, scheduled: Instant) -> Message {
        let id = MessageId(self.next_id.fetch_add(1, Ordering::Relaxed));
        Message { scheduled, ..Message::new(id.to_string(), topic, payload(id, bytes)) }
    }

    /// The observer for a client of this user and device; everyone who may write to somebody should have one *before* the
    /// first message, so that the checker knows who is a stranger.
    pub fn recorder(self: &Arc<Self>, options: &client::Options) -> Arc<Recorder> {
        let mut pages = self.pages.lock();
        let session = pages.history.session(&options.user, &options.device);
        let user = pages.history.user(&options.user);
        Arc::new(Recorder { journal: self.clone(), session, user, idempotent: options.version == Version::V5 })
    }

    /// Group membership: record joins after they are done, leaves before they are asked for (see [`history::Event`]).
    pub fn joined(&self, group: &str, user: &str, seq: Option<u64>) {
        self.edit(|history| {
            let (group, user) = (history.group(group), history.user(user));
            history::Event::Joined { group, user, seq }
        });
    }

    /// See [`Journal::joined`].
    pub fn left(&self, group: &str, user: &str, seq: Option<u64>) {
        self.edit(|history| {
            let (group, user) = (history.group(group), history.user(user));
            history::Event::Left { group, user, seq }
        });
    }

    /// A session is about to be ended on purpose.
    pub fn ended(&self, user: &str, device: &str) {
        self.edit(|history| history::Event::Ended { session: history.session(user, device) });
    }

    fn edit(&self, event: impl FnOnce(&mut History) -> history::Event) {
        let mut pages = self.pages.lock();
        let event = event(&mut pages.history);
        pages.history.record(self.start.elapsed(), event);
    }

    /// Looks at the history.
    pub fn with<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&self.pages.lock().history)
    }

    /// Judges what is recorded so far.
    pub fn check(&self) -> Report {
        self.with(History::check)
    }

    /// Waits until every expected message was seen and every send has its answer, or until `deadline`; then judges.
    pub async fn settle(&self, deadline: Duration) -> Report {
        let until = Instant::now() + deadline;
        let mut pause = Duration::from_millis(50);
        loop {
            let report = self.check();
            if report.is_settled() || Instant::now() >= until {
                return report;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Moves the counters of the time since the last call into `meter`.
    pub fn take_meter(&self, meter: &mut Meter) {
        meter.reset();
        std::mem::swap(&mut self.pages.lock().meter, meter);
    }

    /// Keeps a remark for the live view.
    pub fn note(&self, text: impl Into<String>) {
        let at = self.now();
        let mut pages = self.pages.lock();
        pages.notes.push_back((at, text.into()));
        if pages.notes.len() > NOTES_MAX {
            pages.notes.pop_front();
        }
    }

    /// The latest remarks, oldest first.
    pub fn notes(&self) -> Vec<(Duration, String)> {
        self.pages.lock().notes.iter().cloned().collect()
    }
}

/// Writes one client's events into the journal.
#[derive(Debug)]
pub struct Recorder {
    journal: Arc<Journal>,
    session: SessionId,
    user: UserId,
    /// MQTT 3.1.1 carries no ids.
    idempotent: bool,
}

impl Recorder {
    fn sent_to(&self, history: &mut History, topic: &str) -> Option<ConversationId> {
        match topic.split_once('/')? {
            ("u", peer) => {
                let peer = history.user(peer);
                Some(history.pair(self.user, peer))
            }
            ("g", group) => Some(history.group(group)),
            _ => None,
        }
    }

    fn received(&self, history: &mut History, connection: u32, delivery: &Delivery) -> Option<history::Event> {
        let (conversation, from) = match &delivery.inbox {
            Inbox::Person { peer, from } => {
                let peer = history.user(peer);
                (history.pair(self.user, peer), from)
            }
            Inbox::Group { group, from } => (history.group(group), from),
            Inbox::Other => return None,
        };
        Some(history::Event::Received {
            session: self.session,
            connection,
            conversation,
            from: history.known_user(from),
            // A delivery must have a number; 0 is reported as one that can't be true.
            seq: delivery.seq.unwrap_or(0),
            id: delivery.id.as_deref().and_then(MessageId::parse).or_else(|| id_in_payload(&delivery.payload)),
            payload: fingerprint(&delivery.payload),
        })
    }
}

fn message_id(message: &Message) -> Option<MessageId> {
    message.id.as_deref().and_then(MessageId::parse).or_else(|| id_in_payload(&message.payload))
}

impl Observer for Recorder {
    fn observe(&self, event: client::Event<'_>) {
        let at = self.journal.start.elapsed();
        let session = self.session;
        let mut pages = self.journal.pages.lock();
        let Pages { history, meter, .. } = &mut *pages;
        match event {
            client::Event::Connected { connection, session_present } => {
                history.record(at, history::Event::Connected { session, connection, session_present });
            }
            client::Event::Subscribed { filter, code, .. } => {
                if filter == "inbox/#" && code < 0x80 {
                    history.record(at, history::Event::Subscribed { session });
                }
            }
            client::Event::Sending { connection, message } if message.qos == 1 => {
                let (Some(id), Some(conversation)) = (message_id(message), self.sent_to(history, &message.topic))
                else {
                    return;
                };
                meter.sent += 1;
                let scheduled = message.scheduled.saturating_duration_since(self.journal.start);
                let (payload, idempotent) = (fingerprint(&message.payload), self.idempotent);
                let event =
                    history::Event::Sent { id, session, connection, conversation, payload, idempotent, scheduled };
                history.record(at, event);
            }
            client::Event::Sending { .. } => {}
            client::Event::Answered { message, outcome, .. } => {
                let (Some(id), Some(_)) = (message_id(message), self.sent_to(history, &message.topic)) else { return };
                match outcome {
                    Outcome::Stored { seq, .. } => {
                        meter.acked += 1;
                        if let Some(latency) = history.record(at, history::Event::Acked { id, seq: *seq }) {
                            meter.ack_latency.saturating_record(history::micros(latency));
                        }
                    }
                    Outcome::Refused { code, reason } => {
                        meter.refused += 1;
                        history.record(at, history::Event::Refused { id });
                        let why = reason.as_deref().unwrap_or("no reason given");
                        let note = format!("send to {} refused: {code:#04x} {why}", message.topic);
                        drop(pages);
                        self.journal.note(note);
                    }
                }
            }
            client::Event::Received { connection, delivery } => {
                if let Some(event) = self.received(history, connection, delivery) {
                    meter.delivered += 1;
                    if let Some(latency) = history.record(at, event) {
                        meter.delivery_latency.saturating_record(history::micros(latency));
                    }
                }
            }
            client::Event::Disconnected { connection, why } => {
                if connection.is_some() {
                    history.record(at, history::Event::Disconnected { session });
                }
                if let Some(why) = why {
                    drop(pages);
                    self.journal.note(why.to_string());
                }
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::{SeedableRng, rngs::StdRng};

    #[test]
    fn an_evening_is_quiet_at_both_ends_and_full_in_the_middle() {
        assert!(evening(0.0) < 0.11 && evening(1.0) < 0.11);
        assert!(evening(0.5) > 0.999);
        assert!((0..=1000).all(|step| (0.0999..=1.0).contains(&evening(f64::from(step) / 1000.0))));
    }

    #[test]
    fn schedules_keep_their_rate_and_shape() {
        let duration = Duration::from_secs(100);
        let even: Vec<_> = Schedule::new(StdRng::seed_from_u64(1), Spacing::Even, 50.0, duration, |_| 1.0).collect();
        // Sums of floating-point gaps: the last one may fall on either side of the end.
        assert!((4999..=5000).contains(&even.len()), "{}", even.len());
        assert!(even[9].abs_diff(Duration::from_millis(200)) < Duration::from_micros(1));
        let poisson = Schedule::new(StdRng::seed_from_u64(1), Spacing::Poisson, 500.0, duration, evening);
        let times: Vec<_> = poisson.collect();
        assert!(times.is_sorted());
        let between = |from, to| times.iter().filter(|time| (from..to).contains(&time.as_secs())).count() as f64;
        let (quiet, peak) = (between(0, 10) / 10.0, between(45, 60) / 15.0);
        assert!((40.0..60.0).contains(&quiet), "{quiet} messages/s in the quiet part");
        assert!((470.0..530.0).contains(&peak), "{peak} messages/s at the peak");
    }

    #[test]
    fn zipf_prefers_low_ranks_in_proportion() {
        let (zipf, mut rng) = (Zipf::new(100), StdRng::seed_from_u64(7));
        let mut counts = vec![0u32; 100];
        for _ in 0..100_000 {
            counts[zipf.draw(&mut rng)] += 1;
        }
        let ratio = f64::from(counts[0]) / f64::from(counts[9]);
        assert!((8.0..12.5).contains(&ratio), "rank 0 to rank 9: {ratio}");
        assert!(counts.iter().all(|count| *count > 0));
    }

    #[test]
    fn payloads_carry_the_id_and_have_the_size_asked_for() {
        let id = MessageId(0x1234);
        assert_eq!(payload(id, 100).len(), 100);
        assert_eq!(id_in_payload(&payload(id, 100)), Some(id));
        assert_eq!(payload(id, 0).len(), 17);
        assert_eq!(id_in_payload(b"short"), None);
    }
}
