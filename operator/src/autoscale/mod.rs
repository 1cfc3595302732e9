//! How many members a tier should have. Pure: readings, members and time in, a number with its reasons out.
//!
//! The arithmetic is that of the HorizontalPodAutoscaler (autoscaling/v2, `pkg/controller/podautoscaler` upstream):
//! tolerance, members that are not ready or have no reading, stabilization windows, policies, the metric that asks for
//! most wins. Four things differ, on purpose:
//!
//! - It computes from what runs (members that serve or start), not from a desired number that may never have come true.
//! - The fullest member counts too, not only the mean: long connections and heavy shards don't spread by themselves.
//! - A `Value` target counts members that start as well as those that serve, and never asks for a change against its
//!   own direction.
//! - Doubt never scales in. Whatever is not known from nearly all members, for the whole window, counts as "as many as
//!   now"; scaling out goes on from what is left.
//!
//! Architecture invariant: no I/O, no clock, no state; the [`History`] goes in and comes out.

mod replicas;

use im_crds::{Autoscaling, PolicyType, ScalingPolicy, ScalingRules, SelectPolicy};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

/// All that a decision depends on, besides the history.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// Time since any fixed moment.
    pub now: Duration,
    /// Bounds and rules.
    pub spec: &'a Autoscaling,
    /// What runs. Draining members are told, but count for nothing.
    pub members: &'a [Member],
    /// Members that were ordered and are not seen yet. The caller stops counting them when they don't come.
    pub ordered: u32,
    /// One for each of `spec.metrics`, in their order.
    pub readings: &'a [Reading],
}

/// One running member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// What readings call it.
    pub name: String,
    /// How far it is.
    pub state: MemberState,
}

/// How far a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// Not ready yet: it will carry load soon, its own readings mean nothing.
    Starting,
    /// It serves.
    Ready,
    /// It goes.
    Draining,
}

/// What a metric's source said.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// The values.
    pub values: Values,
    /// Whose words these are, for people: `from Prometheus`.
    pub origin: String,
    /// When the source itself started, if that is known: a young one may be empty without meaning it.
    pub source_started_at: Option<Duration>,
}

/// The values of a metric.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// One for each member, by its name.
    PerMember(BTreeMap<String, Sample>),
    /// One for the whole tier; `None` = the source answered, with nothing.
    Total(Option<Sample>),
    /// The source gave none; why.
    Failed(String),
}

/// A measured value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// In the unit of the target.
    pub value: f64,
    /// When it was measured.
    pub at: Duration,
}

/// How far a metric can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetricState {
    /// Nearly all members, all fresh.
    Fresh,
    /// No value at all.
    NoData,
    /// Only old values.
    Stale,
    /// No value, and the source started just now.
    EmptyAfterRestart,
    /// A value for the whole tier of a source that started just now: it may not have everything yet that is added up.
    Settling,
    /// Fresh values of some members only.
    Partial {
        /// Members with a fresh value.
        fresh: usize,
        /// Members that serve.
        ready: usize,
    },
}

impl MetricState {
    /// One word, for a label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fresh => "fresh",
            Self::NoData => "no data",
            Self::Stale => "stale",
            Self::EmptyAfterRestart => "empty after restart",
            Self::Settling => "settling",
            Self::Partial { .. } => "partial",
        }
    }
}

impl fmt::Display for MetricState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fresh => f.write_str("fresh"),
            Self::NoData => f.write_str("no data"),
            Self::Stale => f.write_str("only stale values"),
            Self::EmptyAfterRestart => f.write_str("the metrics source has just restarted and is empty"),
            Self::Settling => f.write_str("the metrics source has just restarted: its sum may be of a part only"),
            Self::Partial { fresh, ready } => write!(f, "values of {fresh} of {ready} members only"),
        }
    }
}

/// A value older than that is stale.
pub const SAMPLE_AGE_MAX: Duration = Duration::from_secs(30);
/// A source younger than two scrape intervals of the usual 30 s may be empty, or know of a part only, without meaning it.
pub const SOURCE_SETTLES: Duration = Duration::from_secs(60);
/// Decisions further apart than that don't make one window: nobody looked in between.
pub const DECISION_GAP_MAX: Duration = Duration::from_secs(60);
/// Fresh values of that part of the members are "nearly all".
pub const NEARLY_ALL: f64 = 0.9;
/// The fullest member may be that far above the target before it alone asks for one more.
pub const FULLEST_MAX: f64 = 1.25;

/// What is decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// So many members there should be.
    pub replicas: u32,
    /// So many run or start.
    pub current: u32,
    /// Why, for people, in the order of the reasoning.
    pub because: Vec<String>,
    /// What keeps it from what the metrics ask for.
    pub limited: Option<Limit>,
    /// Each metric's state, in the order of the spec.
    pub metrics: Vec<MetricState>,
}

/// What keeps a decision from what the metrics ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Limit {
    /// `minReplicas`.
    Min,
    /// `maxReplicas`.
    Max,
    /// The stabilization window.
    Stabilization,
    /// A policy of `behavior`, `Disabled` included.
    Policy,
    /// A metric that can't be trusted: no scale-in.
    Doubt,
}

/// What earlier decisions saw. Keep it between calls; a lost one only delays scaling in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct History {
    /// What the metrics asked for, oldest first.
    recommendations: VecDeque<(Duration, u32)>,
    /// Changes of the number of members as they were seen, oldest first: up positive, down negative.
    changes: VecDeque<(Duration, i64)>,
    /// Since when it is without gaps.
    began: Option<Duration>,
    last_seen: Option<(Duration, u32)>,
}

/// Entries kept of each kind; what is older than the longest window goes earlier.
const HISTORY_MAX: usize = 8_192;
/// The longest stabilization window and policy period that the type allows.
const HISTORY_AGE_MAX: Duration = Duration::from_secs(3_600);

impl History {
    /// Notes how many members are seen now.
    fn observe(&mut self, now: Duration, current: u32) {
        let gap = self.last_seen.is_none_or(|(at, _)| now.saturating_sub(at) > DECISION_GAP_MAX);
        if gap {
            self.began = Some(now);
        }
        if let Some((_, before)) = self.last_seen
            && before != current
        {
            self.changes.push_back((now, i64::from(current) - i64::from(before)));
        }
        self.last_seen = Some((now, current));
        let old = |at: &Duration| now.saturating_sub(*at) > HISTORY_AGE_MAX;
        while let Some((at, _)) = self.recommendations.front().copied()
            && (old(&at) || self.recommendations.len() >= HISTORY_MAX)
        {
            self.recommendations.pop_front();
            // Forgotten for want of room is not looked at.
            self.began = self.began.max((!old(&at)).then_some(at));
        }
        while self.changes.front().is_some_and(|(at, _)| old(at)) || self.changes.len() >= HISTORY_MAX {
            self.changes.pop_front();
        }
    }

    /// Whether every moment of the window was looked at.
    fn covers(&self, now: Duration, window: Duration) -> bool {
        self.began.is_some_and(|began| now.saturating_sub(began) >= window)
    }

    fn within(&self, now: Duration, window: Duration) -> impl Iterator<Item = u32> + '_ {
        let recent = move |(at, _): &&(Duration, u32)| now.saturating_sub(*at) <= window;
        self.recommendations.iter().filter(recent).map(|(_, replicas)| *replicas)
    }

    /// Members at the beginning of the period that ends now.
    fn at_period_start(&self, now: Duration, period: Duration, current: u32) -> i64 {
        let recent = self.changes.iter().filter(|(at, _)| now.saturating_sub(*at) < period);
        i64::from(current) - recent.map(|(_, change)| change).sum::<i64>()
    }
}

/// Says how many members there should be.
pub fn decide(input: &Input<'_>, mut history: History) -> (Decision, History) {
    let spec = input.spec;
    let serving = input.members.iter().filter(|member| member.state != MemberState::Draining).count() as u32;
    let current = serving + input.ordered;
    history.observe(input.now, current);

    let mut because = Vec::new();
    let mut metrics = Vec::new();
    let mut wanted: Option<u32> = None;
    for (i, metric) in spec.metrics.iter().enumerate() {
        let missing =
            Reading { values: Values::Failed("not read".into()), origin: String::new(), source_started_at: None };
        let proposal = replicas::propose(input, current, metric, input.readings.get(i).unwrap_or(&missing));
        because.extend(proposal.because);
        metrics.push(proposal.state);
        wanted = wanted.max(proposal.replicas);
    }

    // Doubt counts as "as many as now", also later, for as long as the window remembers it.
    let doubt = metrics.iter().any(|state| *state != MetricState::Fresh);
    let asked = wanted.unwrap_or(current);
    let trusted = if doubt { asked.max(current) } else { asked };
    history.recommendations.push_back((input.now, trusted));

    let mut chain = Chain { replicas: trusted, limited: None, because };
    if trusted != asked {
        chain.limited = Some(Limit::Doubt);
        chain.because.push(format!("not every metric can be trusted: no scale-in below {current}"));
    }
    if (spec.min_replicas..=spec.max_replicas).contains(&current) {
        stabilize(&mut chain, input, &history, current);
        apply_policies(&mut chain, input, &history, current);
    }
    // Outside its bounds, a tier goes back into them at once, whatever the windows say (as upstream).
    if chain.replicas < spec.min_replicas {
        chain.limit(spec.min_replicas, Limit::Min, format!("minReplicas is {}", spec.min_replicas));
    } else if chain.replicas > spec.max_replicas {
        chain.limit(spec.max_replicas, Limit::Max, format!("maxReplicas is {}", spec.max_replicas));
    }
    let Chain { replicas, limited, because } = chain;
    (Decision { replicas, current, because, limited, metrics }, history)
}

/// The number on its way through the rules, with the reasons so far.
struct Chain {
    replicas: u32,
    limited: Option<Limit>,
    because: Vec<String>,
}

impl Chain {
    fn limit(&mut self, replicas: u32, limit: Limit, why: String) {
        if self.replicas != replicas {
            self.because.push(format!("{why}: {replicas} instead of {}", self.replicas));
            self.replicas = replicas;
            self.limited = Some(limit);
        }
    }
}

/// The rules of one direction with the defaults of that direction filled in.
struct Rules {
    window: Duration,
    select: SelectPolicy,
    policies: Vec<ScalingPolicy>,
}

impl Rules {
    fn new(rules: &ScalingRules, default_window_secs: u32, default_policies: &[ScalingPolicy]) -> Self {
        let policies = if rules.policies.is_empty() { default_policies } else { &rules.policies };
        Self {
            window: Duration::from_secs(rules.stabilization_window_seconds.unwrap_or(default_window_secs).into()),
            select: rules.select_policy,
            policies: policies.to_vec(),
        }
    }

    fn up(spec: &Autoscaling) -> Self {
        let four = ScalingPolicy { kind: PolicyType::Pods, value: 4, period_seconds: 15 };
        let double = ScalingPolicy { kind: PolicyType::Percent, value: 100, period_seconds: 15 };
        Self::new(&spec.behavior.scale_up, 0, &[four, double])
    }

    fn down(spec: &Autoscaling) -> Self {
        let all = ScalingPolicy { kind: PolicyType::Percent, value: 100, period_seconds: 15 };
        Self::new(&spec.behavior.scale_down, 300, &[all])
    }
}

/// Within each direction's window the most cautious recommendation counts.
fn stabilize(chain: &mut Chain, input: &Input<'_>, history: &History, current: u32) {
    let (up, down) = (Rules::up(input.spec).window, Rules::down(input.spec).window);
    if chain.replicas > current {
        let lowest = history.within(input.now, up).min().unwrap_or(chain.replicas);
        let why = format!("the lowest recommendation of the last {} s counts", up.as_secs());
        chain.limit(lowest.clamp(current, chain.replicas), Limit::Stabilization, why);
    } else if chain.replicas < current {
        let mut highest = history.within(input.now, down).max().unwrap_or(chain.replicas);
        if !history.covers(input.now, down) {
            // Nobody has looked for that long yet.
            highest = highest.max(current);
        }
        let why = format!("the highest recommendation of the last {} s counts", down.as_secs());
        chain.limit(highest.clamp(chain.replicas, current), Limit::Stabilization, why);
    }
}

/// Policies allow so much change in so much time.
fn apply_policies(chain: &mut Chain, input: &Input<'_>, history: &History, current: u32) {
    let growing = chain.replicas > current;
    if chain.replicas == current {
        return;
    }
    let rules = if growing { Rules::up(input.spec) } else { Rules::down(input.spec) };
    if rules.select == SelectPolicy::Disabled {
        let direction = if growing { "scaleUp" } else { "scaleDown" };
        chain.limit(current, Limit::Policy, format!("{direction} is disabled"));
        return;
    }
    let bounds = rules.policies.iter().map(|policy| {
        let start = history.at_period_start(input.now, Duration::from_secs(policy.period_seconds.into()), current);
        let value = i64::from(policy.value);
        match (policy.kind, growing) {
            (PolicyType::Pods, true) => start + value,
            (PolicyType::Pods, false) => start - value,
            // Rounded so that some change is always possible.
            (PolicyType::Percent, true) => start + (start * value + 99).div_euclid(100),
            (PolicyType::Percent, false) => start * (100 - value).max(0) / 100,
        }
    });
    let largest_change = (rules.select == SelectPolicy::Max) == growing;
    let bound = if largest_change { bounds.max() } else { bounds.min() }.unwrap_or(i64::from(chain.replicas));
    let bound = u32::try_from(bound.max(0)).unwrap_or(u32::MAX);
    let allowed = if growing { chain.replicas.min(bound.max(current)) } else { chain.replicas.max(bound.min(current)) };
    chain.limit(allowed, Limit::Policy, "policies allow no more change now".into());
}

#[cfg(test)]
mod comparison;
#[cfg(test)]
mod tests;
