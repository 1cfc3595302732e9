//! Tables after the cases of upstream's `replica_calculator_test.go` and `horizontal_test.go`, and properties.

use super::*;
use im_crds::{Behavior, BuiltIn, BuiltInMetric, PrometheusMetric, QueryTarget, QueryTargetType, Target, TargetType};
use proptest::prelude::*;

const NOW: Duration = Duration::from_secs(10_000);

fn metric(name: BuiltIn, value: u32) -> im_crds::Metric {
    let kind = if name == BuiltIn::CpuUtilization { TargetType::Utilization } else { TargetType::AverageValue };
    BuiltInMetric { name, target: Target { kind, value } }.into()
}

/// Any change is allowed at once.
fn free(metrics: Vec<im_crds::Metric>) -> Autoscaling {
    let any = ScalingPolicy { kind: PolicyType::Pods, value: 1_000, period_seconds: 15 };
    let rules =
        ScalingRules { stabilization_window_seconds: Some(0), select_policy: SelectPolicy::Max, policies: vec![any] };
    let behavior = Behavior { scale_up: rules.clone(), scale_down: rules };
    Autoscaling { min_replicas: 1, max_replicas: 1_000, metrics, behavior, tolerance: 0.1 }
}

fn members(ready: usize, starting: usize) -> Vec<Member> {
    let state = |i| if i < ready { MemberState::Ready } else { MemberState::Starting };
    (0..ready + starting).map(|i| Member { name: format!("m{i}"), state: state(i) }).collect()
}

/// Values of m0, m1 …; `None` = no value of that member.
fn per_member(now: Duration, values: &[Option<f64>]) -> Reading {
    let named =
        values.iter().enumerate().filter_map(|(i, v)| v.map(|value| (format!("m{i}"), Sample { value, at: now })));
    Reading { values: Values::PerMember(named.collect()), origin: String::new(), source_started_at: None }
}

fn all(now: Duration, values: &[f64]) -> Reading {
    per_member(now, &values.iter().copied().map(Some).collect::<Vec<_>>())
}

fn once(spec: &Autoscaling, members: &[Member], readings: &[Reading]) -> Decision {
    decide(&Input { now: NOW, spec, members, ordered: 0, readings }, History::default()).0
}

/// The mean decides: values that are all alike, so that the fullest is no other.
#[test]
fn replicas_follow_the_mean_as_upstream() {
    use BuiltIn::{CpuUtilization as Cpu, MessagesPerSecond as Rate};
    // metric, target, values of members that serve, members that start, expected
    let cases: &[(BuiltIn, u32, &[f64], usize, u32)] = &[
        (Cpu, 30, &[30.0, 50.0, 70.0], 0, 5),
        (Rate, 15_000, &[20_000.0, 10_000.0, 30_000.0], 0, 4),
        (Rate, 20_000, &[12_000.0; 5], 0, 3),
        (Cpu, 50, &[10.0, 30.0, 50.0, 25.0, 25.0], 0, 3),
        // Within 10 % nothing changes, in both directions; just outside it does.
        (Cpu, 100, &[101.0, 103.0, 102.0], 0, 3),
        (Rate, 100, &[110.0; 3], 0, 3),
        (Rate, 100, &[111.0; 3], 0, 4),
        (Rate, 100, &[90.0; 10], 0, 10),
        (Rate, 100, &[89.0; 10], 0, 9),
        // Members that start count as empty when going out …
        (Cpu, 30, &[50.0, 70.0], 1, 4),
        (Cpu, 30, &[40.0], 2, 3),
        // … and not at all when going in.
        (Cpu, 50, &[10.0, 30.0, 50.0], 2, 2),
        (Cpu, 50, &[10.0], 4, 1),
        (Rate, 100, &[0.0; 4], 0, 1),
    ];
    for (name, target, values, starting, expected) in cases {
        let spec = free(vec![metric(*name, *target)]);
        let decision = once(&spec, &members(values.len(), *starting), &[all(NOW, values)]);
        assert_eq!(decision.replicas, *expected, "{name:?} {target} {values:?} + {starting} starting\n{decision:#?}");
    }
}

#[test]
fn members_without_value_speak_against_the_change() {
    // target, values, expected from the arithmetic alone (upstream's cases), state
    let cases: &[(u32, &[Option<f64>], u32)] = &[
        // Low, missing taken as 100 %: (40 + 9.5 + 2 x 100) / 4 = 62 % → 3, but doubt keeps 4.
        (100, &[Some(40.0), Some(9.5), None, None], 4),
        // High, missing taken as empty: 200 % of two is 133 % of three.
        (50, &[Some(100.0), Some(100.0), None], 4),
        // High, and with the missing as empty it would turn round: nothing.
        (100, &[Some(120.0), None, None, None], 4),
    ];
    for (target, values, expected) in cases {
        let spec = free(vec![metric(BuiltIn::CpuUtilization, *target)]);
        let decision = once(&spec, &members(values.len(), 0), &[per_member(NOW, values)]);
        assert_eq!(decision.replicas, *expected, "{values:?}\n{decision:#?}");
        assert!(matches!(decision.metrics[0], MetricState::Partial { .. }));
    }
    // One of twenty is nearly all: the arithmetic stands, the missing one taken as at the target.
    let spec = free(vec![metric(BuiltIn::MessagesPerSecond, 100)]);
    let mut values = vec![Some(50.0); 20];
    values[3] = None;
    let decision = once(&spec, &members(20, 0), &[per_member(NOW, &values)]);
    assert_eq!((decision.replicas, decision.metrics[0]), (11, MetricState::Fresh));
}

#[test]
fn the_metric_that_asks_for_most_wins() {
    let spec = free(vec![metric(BuiltIn::Connections, 100), metric(BuiltIn::MessagesPerSecond, 100)]);
    let decision = once(&spec, &members(2, 0), &[all(NOW, &[50.0, 50.0]), all(NOW, &[300.0, 300.0])]);
    assert_eq!(decision.replicas, 6);
    assert!(decision.because.iter().any(|why| why.contains("MessagesPerSecond: 300.0 per member")), "{decision:#?}");
}

#[test]
fn one_value_for_the_whole_tier_of_which_each_has_a_share() {
    for (total, running, expected) in
        [(8_600.0, 1, 4), (8_600.0, 3, 4), (6_000.0, 5, 3), (8_000.0, 4, 4), (9_900.0, 5, 5)]
    {
        let spec = free(vec![metric(BuiltIn::MessagesPerSecond, 2_150)]);
        let reading = Reading {
            values: Values::Total(Some(Sample { value: total, at: NOW })),
            origin: String::new(),
            source_started_at: None,
        };
        assert_eq!(once(&spec, &members(running, 0), &[reading]).replicas, expected, "{total} over {running}");
    }
}

fn query(kind: QueryTargetType, value: f64, per_pod: bool) -> im_crds::Metric {
    im_crds::Metric::Prometheus(PrometheusMetric {
        query: "sum(work)".into(),
        target: QueryTarget { kind, value },
        per_pod,
    })
}

fn total(value: f64) -> Reading {
    let sample = Sample { value, at: NOW };
    Reading { values: Values::Total(Some(sample)), origin: "from Prometheus".into(), source_started_at: None }
}

/// Upstream's `TestReplicaCalcScaleUpExternal…`, and what starts is not forgotten.
#[test]
fn a_value_that_is_to_stay_where_it_is_however_many_members() {
    // value, target, serve, start, expected
    let cases: &[(f64, f64, usize, usize, u32)] = &[
        (8_600.0, 4_400.0, 1, 0, 2),
        (8_600.0, 8_800.0, 3, 0, 3),
        (8_600.0, 2_867.0, 3, 0, 9),
        (6_000.0, 9_000.0, 5, 0, 4),
        (0.5, 0.2, 2, 0, 5),
        (0.22, 0.2, 2, 0, 2),
        // 1.3 times of two are three, but four run already: the value has not heard of them yet.
        (1.3, 1.0, 2, 2, 4),
        (0.5, 1.0, 2, 2, 1),
        (0.0, 1.0, 3, 0, 1),
        (9.0, 1.0, 0, 2, 2),
    ];
    for (value, target, serve, start, expected) in cases {
        let spec = free(vec![query(QueryTargetType::Value, *target, false)]);
        let decision = once(&spec, &members(*serve, *start), &[total(*value)]);
        assert_eq!(decision.replicas, *expected, "{value} of {target}, {serve} + {start}\n{decision:#?}");
    }
}

#[test]
fn own_queries_have_shares_of_a_sum_or_a_value_each() {
    let spec = free(vec![query(QueryTargetType::AverageValue, 250.5, false)]);
    let decision = once(&spec, &members(2, 0), &[total(1_002.0)]);
    assert_eq!(decision.replicas, 4);
    assert_eq!(decision.because, ["`sum(work)`: 1002.0 in all, target 250.5 each: 4, from Prometheus"]);
    let spec = free(vec![query(QueryTargetType::AverageValue, 100.0, true)]);
    assert_eq!(once(&spec, &members(3, 0), &[all(NOW, &[150.0; 3])]).replicas, 5);
    assert_eq!(once(&spec, &members(3, 0), &[all(NOW, &[150.0, 30.0, 30.0])]).replicas, 4, "the fullest counts");
}

#[test]
fn a_sum_is_doubted_where_it_can_be_of_a_part() {
    let spec = free(vec![query(QueryTargetType::AverageValue, 100.0, false)]);
    let running = members(4, 0);
    let young = Some(NOW - Duration::from_secs(50));
    let settled = Some(NOW - SOURCE_SETTLES);
    let state = |values: Values, source_started_at| {
        let reading = Reading { values, origin: String::new(), source_started_at };
        let decision = once(&spec, &running, &[reading]);
        (decision.replicas, decision.metrics[0])
    };
    let at = |value, age| Values::Total(Some(Sample { value, at: NOW - Duration::from_secs(age) }));
    assert_eq!(state(at(100.0, 0), settled), (1, MetricState::Fresh));
    assert_eq!(state(at(100.0, 0), young), (4, MetricState::Settling));
    assert_eq!(state(at(900.0, 0), young), (9, MetricState::Settling), "out on what is there");
    assert_eq!(state(at(900.0, 31), settled), (4, MetricState::Stale));
    assert_eq!(state(at(f64::NAN, 0), settled), (4, MetricState::NoData));
    assert_eq!(state(Values::Total(None), settled), (4, MetricState::NoData));
    assert_eq!(state(Values::Total(None), young), (4, MetricState::EmptyAfterRestart));
}

#[test]
fn the_fullest_member_counts() {
    let spec = free(vec![metric(BuiltIn::Connections, 100)]);
    let asks = |values: &[f64]| once(&spec, &members(values.len(), 0), &[all(NOW, values)]);
    // Mean at the target: 3. One far above: one more, and it is named.
    let decision = asks(&[50.0, 190.0, 60.0]);
    assert_eq!(decision.replicas, 4);
    assert!(decision.because.iter().any(|why| why.contains("m1 is the fullest")), "{decision:#?}");
    // The mean would go in from 4 to 3; the fullest at 120 keeps 4, at 105 does not.
    assert_eq!(asks(&[120.0, 60.0, 60.0, 60.0]).replicas, 4);
    assert_eq!(asks(&[105.0, 60.0, 60.0, 60.0]).replicas, 3);
    // One hot member can't hold a tier that has nothing to do.
    assert_eq!(asks(&[130.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]).replicas, 4);
}

#[test]
fn what_drains_or_is_gone_counts_for_nothing_and_what_was_ordered_counts_as_starting() {
    let spec = free(vec![metric(BuiltIn::Connections, 100)]);
    let mut running = members(3, 0);
    running[2].state = MemberState::Draining;
    let readings = [all(NOW, &[100.0, 100.0, 900.0, 900.0])];
    let decision = once(&spec, &running, &readings);
    assert_eq!((decision.current, decision.replicas), (2, 2));
    let readings = [all(NOW, &[150.0, 150.0])];
    let input = Input { now: NOW, spec: &spec, members: &running, ordered: 1, readings: &readings };
    let (decision, _) = decide(&input, History::default());
    assert_eq!((decision.current, decision.replicas), (3, 3), "the third is on its way");
}

#[test]
fn each_metric_state_is_told_apart_and_never_scales_in() {
    let spec = free(vec![metric(BuiltIn::Connections, 100)]);
    let running = members(4, 0);
    let young = Some(NOW - Duration::from_secs(10));
    let stale = NOW - SAMPLE_AGE_MAX - Duration::from_secs(1);
    let none = || Values::PerMember(BTreeMap::new());
    for (reading, state) in [
        (
            Reading { values: Values::Failed("timeout".into()), origin: String::new(), source_started_at: None },
            MetricState::NoData,
        ),
        (Reading { values: none(), origin: String::new(), source_started_at: None }, MetricState::NoData),
        (Reading { values: none(), origin: String::new(), source_started_at: young }, MetricState::EmptyAfterRestart),
        (all(stale, &[1.0; 4]), MetricState::Stale),
        (all(NOW, &[f64::NAN, -1.0, f64::INFINITY]), MetricState::NoData),
        (all(NOW, &[1.0, 1.0]), MetricState::Partial { fresh: 2, ready: 4 }),
    ] {
        let decision = once(&spec, &running, std::slice::from_ref(&reading));
        assert_eq!((decision.replicas, decision.metrics[0]), (4, state), "{reading:?}\n{decision:#?}");
    }
    let decision = once(&spec, &running, &[]);
    assert_eq!((decision.replicas, decision.metrics[0]), (4, MetricState::NoData), "a metric nobody read");

    // Out on what is left: one metric is away, the other asks for more; or for less.
    let spec = free(vec![metric(BuiltIn::Connections, 100), metric(BuiltIn::MessagesPerSecond, 100)]);
    let away = || Reading { values: Values::Failed("timeout".into()), origin: String::new(), source_started_at: None };
    assert_eq!(once(&spec, &running, &[away(), all(NOW, &[200.0; 4])]).replicas, 8);
    let held = once(&spec, &running, &[away(), all(NOW, &[10.0; 4])]);
    assert_eq!((held.replicas, held.limited), (4, Some(Limit::Doubt)));
}

#[test]
fn outside_its_bounds_a_tier_goes_back_at_once() {
    let mut spec = free(vec![metric(BuiltIn::Connections, 100)]);
    (spec.min_replicas, spec.max_replicas) = (2, 5);
    spec.behavior.scale_down.stabilization_window_seconds = Some(300);
    let at = |running: usize, value: f64| once(&spec, &members(running, 0), &[all(NOW, &vec![value; running])]);
    assert_eq!(at(9, 100.0).replicas, 5);
    assert_eq!((at(3, 900.0).replicas, at(3, 900.0).limited), (5, Some(Limit::Max)));
    assert_eq!(once(&spec, &[], &[all(NOW, &[])]).replicas, 2, "from nothing");
    spec.behavior.scale_down.stabilization_window_seconds = Some(0);
    let idle = once(&spec, &members(3, 0), &[all(NOW, &[0.0; 3])]);
    assert_eq!((idle.replicas, idle.limited), (2, Some(Limit::Min)));
}

/// Runs decisions each 15 s, as if each were carried out at once; `load(t)` is the total.
fn play(spec: &Autoscaling, start: usize, seconds: u64, load: impl Fn(u64) -> Option<f64>) -> Vec<u32> {
    let mut history = History::default();
    let mut running = start;
    let mut seen = Vec::new();
    for t in (0..=seconds).step_by(15) {
        let now = NOW + Duration::from_secs(t);
        let reading = match load(t) {
            Some(total) => all(now, &vec![total / running as f64; running]),
            None => Reading { values: Values::Failed("away".into()), origin: String::new(), source_started_at: None },
        };
        let members = members(running, 0);
        let input = Input { now, spec, members: &members, ordered: 0, readings: std::slice::from_ref(&reading) };
        let (decision, next) = decide(&input, history);
        history = next;
        running = decision.replicas as usize;
        seen.push(decision.replicas);
    }
    seen
}

#[test]
fn the_window_is_waited_for() {
    let mut spec = free(vec![metric(BuiltIn::Connections, 100)]);
    spec.behavior.scale_down.stabilization_window_seconds = Some(60);
    // From a new start the window has to be seen whole: 0, 15, 30, 45 s keep 4.
    assert_eq!(play(&spec, 4, 75, |_| Some(100.0)), [4, 4, 4, 4, 1, 1]);
    // A peak within the window keeps it up.
    let peak = |t| Some(if t == 45 { 400.0 } else { 100.0 });
    assert_eq!(play(&spec, 4, 120, peak), [4, 4, 4, 4, 4, 4, 4, 4, 1]);
    // So does a gap in the data: it counts as "as many as now" for a whole window.
    let gap = |t| (t != 45).then_some(100.0);
    assert_eq!(play(&spec, 4, 120, gap), [4, 4, 4, 4, 4, 4, 4, 4, 1]);
    // Growing with a window: the lowest recommendation counts.
    spec.behavior.scale_up.stabilization_window_seconds = Some(30);
    let rise = |t| Some(if t == 0 { 100.0 } else { 500.0 });
    assert_eq!(play(&spec, 1, 60, rise), [1, 1, 1, 5, 5]);
}

#[test]
fn nobody_looked_for_a_while_is_a_new_window() {
    let mut spec = free(vec![metric(BuiltIn::Connections, 100)]);
    spec.behavior.scale_down.stabilization_window_seconds = Some(60);
    let members = members(4, 0);
    let mut history = History::default();
    let mut at = |t: u64| {
        let now = NOW + Duration::from_secs(t);
        let reading = [all(now, &[25.0; 4])];
        let input = Input { now, spec: &spec, members: &members, ordered: 0, readings: &reading };
        let (decision, next) = decide(&input, std::mem::take(&mut history));
        history = next;
        decision.replicas
    };
    assert_eq!([at(0), at(30), at(60)], [4, 4, 1]);
    assert_eq!([at(600), at(630), at(660)], [4, 4, 1]);
}

#[test]
fn policies_bound_the_pace() {
    let policy = |kind, value, period_seconds| ScalingPolicy { kind, value, period_seconds };
    let mut spec = free(vec![metric(BuiltIn::Connections, 100)]);
    let up = |spec: &mut Autoscaling, select, policies: &[ScalingPolicy]| {
        spec.behavior.scale_up.select_policy = select;
        spec.behavior.scale_up.policies = policies.to_vec();
    };
    let (pods, percent) = (PolicyType::Pods, PolicyType::Percent);
    let heavy = |_| Some(10_000.0);
    up(&mut spec, SelectPolicy::Max, &[policy(pods, 2, 60)]);
    assert_eq!(play(&spec, 2, 120, heavy), [4, 4, 4, 4, 4, 6, 6, 6, 6]);
    up(&mut spec, SelectPolicy::Max, &[policy(pods, 1, 15), policy(percent, 100, 15)]);
    assert_eq!(play(&spec, 2, 45, heavy), [4, 4, 8, 8]);
    up(&mut spec, SelectPolicy::Min, &[policy(pods, 1, 15), policy(percent, 100, 15)]);
    assert_eq!(play(&spec, 2, 45, heavy), [3, 3, 4, 4]);
    up(&mut spec, SelectPolicy::Disabled, &[policy(pods, 1, 15)]);
    assert_eq!(play(&spec, 2, 45, heavy), [2; 4]);
    up(&mut spec, SelectPolicy::Max, &[]);
    assert_eq!(play(&spec, 1, 30, heavy)[0], 5, "the default: the larger of 4 and 100 %");

    let idle = |_| Some(0.0);
    spec.behavior.scale_down.policies = vec![policy(percent, 50, 15)];
    assert_eq!(play(&spec, 9, 45, idle), [4, 4, 2, 2]);
    spec.behavior.scale_down.select_policy = SelectPolicy::Disabled;
    assert_eq!(play(&spec, 9, 45, idle), [9; 4]);
    spec.behavior.scale_down = ScalingRules::default();
    let waited = play(&spec, 9, 315, idle);
    assert!(
        waited[..20].iter().all(|replicas| *replicas == 9) && waited[20] == 1,
        "default: 300 s, then all: {waited:?}"
    );
}

fn any_reading() -> impl Strategy<Value = Vec<Option<(f64, u64)>>> {
    prop::collection::vec(prop::option::weighted(0.9, (0.0..400.0, 0_u64..40)), 12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_outside_the_bounds_and_never_in_on_doubt(
        rounds in prop::collection::vec((any_reading(), any_reading(), 0_usize..3, any::<bool>()), 1..60),
        start in 0_usize..12,
        min in 1_u32..5,
        more in 0_u32..7,
        window in 0_u32..120,
    ) {
        let mut spec = free(vec![metric(BuiltIn::Connections, 100), metric(BuiltIn::MessagesPerSecond, 100)]);
        (spec.min_replicas, spec.max_replicas) = (min, min + more);
        spec.behavior.scale_down.stabilization_window_seconds = Some(window);
        let mut history = History::default();
        let mut running = start;
        // Replicas recommended and trusted since the window began, to hold the decision against.
        let mut trail: Vec<(u64, u32, u32)> = Vec::new();
        for (round, (first, second, starting, one_fails)) in rounds.into_iter().enumerate() {
            let t = round as u64 * 15;
            let now = NOW + Duration::from_secs(t);
            let reading = |values: Vec<Option<(f64, u64)>>| {
                let named = values.into_iter().enumerate().filter_map(|(i, sample)| {
                    sample.map(|(value, age)| (format!("m{i}"), Sample { value, at: now - Duration::from_secs(age) }))
                });
                Reading { values: Values::PerMember(named.collect()), origin: String::new(), source_started_at: None }
            };
            let failed = Reading { values: Values::Failed("away".into()), origin: String::new(), source_started_at: None };
            let readings = [reading(first), if one_fails && round % 4 == 0 { failed } else { reading(second) }];
            let starting = starting.min(running);
            let members = members(running - starting, starting);
            let input = Input { now, spec: &spec, members: &members, ordered: 0, readings: &readings };
            let (decision, next) = decide(&input, history.clone());
            prop_assert_eq!(&(decision.clone(), next.clone()), &decide(&input, history), "not a function of its input");
            history = next;
            prop_assert!((spec.min_replicas..=spec.max_replicas).contains(&decision.replicas), "{decision:?}");
            let current = decision.current;
            let inside = (spec.min_replicas..=spec.max_replicas).contains(&current);
            if inside && decision.metrics.iter().any(|state| *state != MetricState::Fresh) {
                prop_assert!(decision.replicas >= current, "in on doubt: {decision:?}");
            }
            if inside && decision.replicas < current {
                prop_assert!(t >= u64::from(window), "in before the window was seen: {decision:?}");
                let doubted = trail.iter().filter(|(at, _, _)| t - at <= u64::from(window));
                let doubted = doubted.map(|(_, _, floor)| *floor).max().unwrap_or(0);
                prop_assert!(decision.replicas >= doubted.min(current), "in on doubt within the window: {decision:?}");
            }
            let floor = if decision.metrics.iter().all(|state| *state == MetricState::Fresh) { 0 } else { current };
            trail.push((t, current, floor));
            running = decision.replicas as usize;
        }
    }

    #[test]
    fn more_load_never_asks_for_fewer(values in prop::collection::vec(0.0..500.0_f64, 1..10), plus in 0.0..200.0_f64) {
        let spec = free(vec![metric(BuiltIn::Connections, 100)]);
        let asked = |add: f64| {
            let values: Vec<f64> = values.iter().map(|value| value + add).collect();
            once(&spec, &members(values.len(), 0), &[all(NOW, &values)]).replicas
        };
        prop_assert!(asked(plus) >= asked(0.0));
    }
}
