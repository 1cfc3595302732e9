//! Which of several operators decides: the holder of a Lease (`coordination.k8s.io/v1`).
//!
//! As in client-go's leader election nobody compares the clocks of two machines: a follower takes the Lease over when it
//! saw it unchanged for its whole duration by its own monotonic clock, and the holder stops by its own, earlier. What an
//! operator still sends that does not know yet is refused or put right elsewhere (ARCHITECTURE.md, "Which operator").

use crate::control::Leadership;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use std::fmt;
use std::pin::pin;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::{sleep, sleep_until, timeout};

/// Attempts to give a Lease up that somebody else writes at the same time.
const RELEASE_ATTEMPTS: usize = 3;

/// Who an operator is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its pod's name.
    pub name: String,
    /// `host:port` of its control service.
    pub address: String,
}

impl fmt::Display for Identity {
    /// As the Lease's holderIdentity.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.address)
    }
}

/// How long a Lease lasts, and how often it is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTiming {
    /// From a renewal to the moment at which others may take the Lease; whole seconds.
    pub duration: Duration,
    /// Between two renewals, and between two looks of a follower.
    pub renew: Duration,
    /// For one request. The holder stops so long before its Lease ends.
    pub request: Duration,
}

impl Default for LeaseTiming {
    /// Somebody leads again within 15 s after a leader died.
    fn default() -> Self {
        Self { duration: Duration::from_secs(10), renew: Duration::from_secs(3), request: Duration::from_secs(2) }
    }
}

/// A Lease as it was seen, with the time of one's own clock at which this version was first seen.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    version: String,
    /// `None`: it was given up.
    holder: Option<String>,
    duration: Duration,
    since: Duration,
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// There is none: make it.
    Create,
    /// It is one's own: keep it.
    Renew,
    /// Nobody holds it any more: take it.
    Take,
    /// Somebody else holds it: look again after that time.
    Wait(Duration),
}

/// What to do at `now` about what was seen.
fn next_move(me: &str, seen: Option<&Seen>, now: Duration, renew: Duration) -> Move {
    let Some(seen) = seen else { return Move::Create };
    match &seen.holder {
        None => Move::Take,
        Some(holder) if holder == me => Move::Renew,
        Some(_) => match (seen.since + seen.duration).checked_sub(now) {
            None | Some(Duration::ZERO) => Move::Take,
            Some(left) => Move::Wait(left.min(renew)),
        },
    }
}

/// Takes what a look found; the same version keeps the time at which it was first seen.
fn observe(before: Option<Seen>, lease: &Lease, now: Duration, timing: LeaseTiming) -> Seen {
    let version = lease.metadata.resource_version.clone().unwrap_or_default();
    let since = before.filter(|before| before.version == version).map_or(now, |before| before.since);
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|seconds| u64::try_from(seconds).ok());
    Seen {
        version,
        holder: spec.holder_identity.filter(|holder| !holder.is_empty()),
        duration: seconds.map_or(timing.duration, Duration::from_secs),
        since,
    }
}

/// The Lease as its new or present holder writes it: on the version that was seen, so that of two who write one fails.
fn written(before: Option<&Lease>, me: &str, now: Timestamp, timing: LeaseTiming) -> Lease {
    let mut lease = before.cloned().unwrap_or_default();
    let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
    if spec.holder_identity.as_deref() != Some(me) {
        spec.holder_identity = Some(me.to_owned());
        spec.acquire_time = Some(MicroTime(now));
        spec.lease_transitions = Some(spec.lease_transitions.map_or(0, |transitions| transitions.saturating_add(1)));
    }
    spec.renew_time = Some(MicroTime(now));
    spec.lease_duration_seconds = i32::try_from(timing.duration.as_secs()).ok();
    lease
}

/// What one turn led to.
enum Turn {
    /// The Lease is held, as of the time before it was written.
    Held { as_of: Instant, seen: Seen },
    /// Another one holds it.
    Followed { seen: Seen, again: Duration },
}

struct Election {
    api: Api<Lease>,
    lease: String,
    me: String,
    timing: LeaseTiming,
    began: Instant,
}

impl Election {
    /// Looks at the Lease and does what is to be done about it.
    async fn turn(&self, before: Option<Seen>) -> Result<Turn, kube::Error> {
        let found = self.api.get_opt(&self.lease).await?;
        let now = self.began.elapsed();
        let seen = found.as_ref().map(|lease| observe(before, lease, now, self.timing));
        let as_of = Instant::now();
        let mut lease = written(found.as_ref(), &self.me, Timestamp::now(), self.timing);
        let params = PostParams::default();
        let outcome = match (next_move(&self.me, seen.as_ref(), now, self.timing.renew), seen) {
            (Move::Wait(again), Some(seen)) => return Ok(Turn::Followed { seen, again }),
            (Move::Create, _) | (_, None) => {
                lease.metadata = ObjectMeta { name: Some(self.lease.clone()), ..ObjectMeta::default() };
                self.api.create(&params, &lease).await
            }
            (Move::Renew | Move::Take, Some(_)) => self.api.replace(&self.lease, &params, &lease).await,
        };
        let lease = outcome?;
        Ok(Turn::Held { as_of, seen: observe(None, &lease, self.began.elapsed(), self.timing) })
    }
}

/// Stands for election until nobody listens to `leadership` any more, with the default timing. See [`run_with`].
pub async fn run(
    client: Client,
    namespace: String,
    lease: String,
    me: Identity,
    leadership: watch::Sender<Leadership>,
) {
    run_with(LeaseTiming::default(), client, namespace, lease, me, leadership).await;
}

/// Stands for election until nobody listens to `leadership` any more. It says `Leading` only while the Lease is held by
/// this process' own clock. Errors are logged and tried again: meanwhile a holder goes on until its Lease ends.
///
/// It gives nothing up at its end: see [`release`].
pub async fn run_with(
    timing: LeaseTiming,
    client: Client,
    namespace: String,
    lease: String,
    me: Identity,
    leadership: watch::Sender<Leadership>,
) {
    let election =
        Election { api: Api::namespaced(client, &namespace), lease, me: me.to_string(), timing, began: Instant::now() };
    let mut seen: Option<Seen> = None;
    let mut held_until: Option<Instant> = None;
    while !leadership.is_closed() {
        let mut turn = pin!(timeout(timing.request * 2, election.turn(seen.clone())));
        let turned = loop {
            tokio::select! {
                turned = &mut turn => break turned,
                // Whatever the API server does, a Lease that was not renewed ends on time.
                () = sleep_until(held_until.unwrap_or_else(Instant::now).into()), if held_until.is_some() => {
                    tracing::warn!("the Lease could not be renewed in time: no longer leading");
                    held_until = None;
                    say(&leadership, Leadership::Following { leader: None });
                }
            }
        };
        let mut pause = timing.renew;
        match turned {
            Ok(Ok(Turn::Held { as_of, seen: now_seen })) => {
                held_until = Some(as_of + timing.duration.saturating_sub(timing.request));
                seen = Some(now_seen);
                say(&leadership, Leadership::Leading);
            }
            Ok(Ok(Turn::Followed { seen: now_seen, again })) => {
                held_until = None;
                let leader = now_seen.holder.as_deref().and_then(address_of);
                say(&leadership, Leadership::Following { leader });
                (seen, pause) = (Some(now_seen), again);
            }
            // Somebody else was faster: look who.
            Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => {
                pause = Duration::ZERO;
            }
            Ok(Err(error)) => tracing::warn!(%error, "the Lease {}/{}", namespace, election.lease),
            Err(_) => tracing::warn!("no answer about the Lease {}/{}", namespace, election.lease),
        }
        let wake = sleep(pause);
        tokio::select! {
            () = wake => {}
            () = sleep_until(held_until.unwrap_or_else(Instant::now).into()), if held_until.is_some() => {}
            () = leadership.closed() => {}
        }
    }
}

/// Gives the Lease up if `me` holds it, so that another one leads at once. [`run`] must have ended before.
///
/// # Errors
/// What the API server says. Then the Lease ends by itself.
pub async fn release(client: Client, namespace: &str, lease: &str, me: &Identity) -> Result<(), kube::Error> {
    let api: Api<Lease> = Api::namespaced(client, namespace);
    let me = me.to_string();
    for attempt in 1.. {
        let Some(mut found) = api.get_opt(lease).await? else { return Ok(()) };
        let Some(spec) = &mut found.spec else { return Ok(()) };
        if spec.holder_identity.as_deref() != Some(&me) {
            return Ok(());
        }
        spec.holder_identity = None;
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        match api.replace(lease, &PostParams::default(), &found).await {
            // The last renewal was still under way.
            Err(kube::Error::Api(status)) if status.is_conflict() && attempt < RELEASE_ATTEMPTS => {}
            outcome => return outcome.map(|_| ()),
        }
    }
    Ok(())
}

fn say(leadership: &watch::Sender<Leadership>, now: Leadership) {
    leadership.send_if_modified(|shown| {
        let changed = *shown != now;
        if changed {
            tracing::info!("leadership: {now:?}");
            *shown = now;
        }
        changed
    });
}

/// Where the control service of a holder listens.
fn address_of(holder: &str) -> Option<String> {
    holder.split_once('/').map(|(_, address)| address.to_owned()).filter(|address| !address.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: &str = "operator-a/10.0.0.1:7200";
    const OTHER: &str = "operator-b/10.0.0.2:7200";
    const RENEW: Duration = Duration::from_secs(3);

    fn lease(version: u32, holder: Option<&str>) -> Lease {
        let mut lease = written(None, holder.unwrap_or_default(), Timestamp::UNIX_EPOCH, LeaseTiming::default());
        lease.metadata.resource_version = Some(version.to_string());
        lease
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn who_may_take_the_lease_and_when() {
        let seen = |holder: Option<&str>| Seen {
            version: "7".into(),
            holder: holder.map(str::to_owned),
            duration: seconds(10),
            since: seconds(100),
        };
        for (seen, now, expected) in [
            (None, 100, Move::Create),
            (Some(seen(None)), 100, Move::Take),
            (Some(seen(Some(ME))), 100, Move::Renew),
            // Its own, though it was asleep for a while: only the write tells whether somebody was faster.
            (Some(seen(Some(ME))), 200, Move::Renew),
            (Some(seen(Some(OTHER))), 100, Move::Wait(RENEW)),
            (Some(seen(Some(OTHER))), 108, Move::Wait(seconds(2))),
            (Some(seen(Some(OTHER))), 110, Move::Take),
            (Some(seen(Some(OTHER))), 500, Move::Take),
        ] {
            assert_eq!(next_move(ME, seen.as_ref(), seconds(now), RENEW), expected, "{seen:?} at {now}");
        }
    }

    #[test]
    fn only_a_change_proves_that_the_holder_lives() {
        let timing = LeaseTiming::default();
        let first = observe(None, &lease(7, Some(OTHER)), seconds(50), timing);
        let again = observe(Some(first.clone()), &lease(7, Some(OTHER)), seconds(55), timing);
        assert_eq!(again.since, seconds(50));
        let renewed = observe(Some(again), &lease(8, Some(OTHER)), seconds(58), timing);
        assert_eq!(renewed.since, seconds(58));
        assert_eq!(observe(None, &lease(9, None), seconds(60), timing).holder, None);
        let mut hasty = lease(9, Some(OTHER));
        hasty.spec.get_or_insert_default().lease_duration_seconds = Some(2);
        assert_eq!(observe(None, &hasty, seconds(60), timing).duration, seconds(2), "what its holder promised");
    }

    #[test]
    fn a_change_of_the_holder_is_counted_and_a_renewal_is_not() {
        let timing = LeaseTiming::default();
        let spec = |lease: &Lease| lease.spec.clone().unwrap_or_default();
        let theirs = written(None, OTHER, Timestamp::UNIX_EPOCH, timing);
        assert_eq!(spec(&theirs).lease_transitions, Some(0));
        let later = Timestamp::from_second(60).expect("a moment");
        let renewed = written(Some(&theirs), OTHER, later, timing);
        assert_eq!(
            (spec(&renewed).lease_transitions, spec(&renewed).acquire_time),
            (Some(0), spec(&theirs).acquire_time)
        );
        assert_eq!(spec(&renewed).renew_time, Some(MicroTime(later)));
        let mine = written(Some(&renewed), ME, later, timing);
        assert_eq!((spec(&mine).lease_transitions, spec(&mine).holder_identity.as_deref()), (Some(1), Some(ME)));
    }

    #[test]
    fn the_holder_says_where_it_is() {
        assert_eq!(address_of(OTHER).as_deref(), Some("10.0.0.2:7200"));
        for unknown in ["", "operator-b", "operator-b/"] {
            assert_eq!(address_of(unknown), None, "{unknown:?}");
        }
    }
}
