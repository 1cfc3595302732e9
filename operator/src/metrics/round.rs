//! One round of measuring a cluster: Prometheus where there is one, and the members themselves where it does not answer.

use super::direct::{Sample, scrape};
use super::prometheus::{Aged, Answer, Endpoint, Prometheus, PrometheusError};
use crate::autoscale::SAMPLE_AGE_MAX;
use crate::platform::Tier;
use futures::StreamExt;
use futures::future::join_all;
use im_crds::{BuiltIn, ImCluster, Metric, Scaling};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Members that are scraped at the same time.
const SCRAPES_AT_ONCE: usize = 64;

/// A member that can be measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name; what Prometheus calls `pod`.
    pub name: String,
    /// Its tier.
    pub tier: Tier,
    /// Where it is scraped; empty = nowhere.
    pub address: String,
}

/// What a round is to find out.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// On the caller's clock.
    pub asked_at: Duration,
    /// Where the members are, if there is such a thing.
    pub namespace: Option<String>,
    /// The members.
    pub targets: Vec<Target>,
    /// The gauges of members.
    pub gauges: BTreeSet<(Tier, BuiltIn)>,
    /// Queries of one's own, and whether they are per pod.
    pub queries: BTreeSet<(String, bool)>,
}

impl Request {
    /// What the autoscaler of `cluster` needs to know about the `targets`.
    pub fn of(cluster: &ImCluster, targets: Vec<Target>, asked_at: Duration) -> Self {
        let mut request = Self { asked_at, namespace: cluster.metadata.namespace.clone(), targets, ..Self::default() };
        for tier in Tier::ALL {
            let Scaling::Auto(autoscaling) = tier.scaling(cluster) else { continue };
            for metric in &autoscaling.metrics {
                match metric {
                    Metric::BuiltIn(metric) => {
                        request.gauges.insert((tier, metric.name));
                    }
                    Metric::Prometheus(metric) => {
                        request.queries.insert((metric.query.clone(), metric.per_pod));
                    }
                }
            }
        }
        request
    }

    fn of_tier(&self, tier: Tier) -> impl Iterator<Item = &Target> {
        self.targets.iter().filter(move |target| target.tier == tier)
    }

    /// What all names of a tier's members begin with.
    fn prefix(&self, tier: Tier) -> &str {
        let names = self.of_tier(tier).map(|target| target.name.as_str());
        let common = names.reduce(|prefix, name| {
            let same = prefix.bytes().zip(name.bytes()).take_while(|(a, b)| a == b).count();
            // Names are ASCII; if one is not, the other's end is a place to cut, too.
            prefix.get(..same).unwrap_or_default()
        });
        common.unwrap_or_default()
    }
}

/// What a round found.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// When it was asked for, on the caller's clock.
    pub asked_at: Duration,
    /// What Prometheus says; `None` = there is none to ask.
    pub prometheus: Option<Answers>,
    /// What the members that were scraped directly say.
    pub direct: BTreeMap<String, Sample>,
}

/// What Prometheus says.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// The members' gauges, each pod's with its age.
    pub gauges: BTreeMap<(Tier, BuiltIn), Result<BTreeMap<String, Aged>, PrometheusError>>,
    /// Queries of one's own.
    pub queries: BTreeMap<(String, bool), Result<Answer, PrometheusError>>,
    /// For how long Prometheus has been running, if it says so.
    pub source_age: Option<Duration>,
}

impl Answers {
    /// All that was asked for failed in the same way.
    fn failed(request: &Request, error: &PrometheusError) -> Self {
        Self {
            gauges: request.gauges.iter().map(|key| (*key, Err(error.clone()))).collect(),
            queries: request.queries.iter().map(|key| (key.clone(), Err(error.clone()))).collect(),
            source_age: None,
        }
    }

    /// Each failure.
    pub fn errors(&self) -> impl Iterator<Item = &PrometheusError> {
        let gauges = self.gauges.values().filter_map(|answer| answer.as_ref().err());
        gauges.chain(self.queries.values().filter_map(|answer| answer.as_ref().err()))
    }
}

/// Keeps the connection to Prometheus from round to round, as long as it is the same.
#[derive(Debug, Default)]
pub struct Connector {
    connected: Option<Box<(Endpoint, Prometheus)>>,
}

impl Connector {
    fn connect(&mut self, endpoint: Endpoint) -> Result<&Prometheus, PrometheusError> {
        let connected = match self.connected.take() {
            Some(connected) if connected.0 == endpoint => connected,
            _ => {
                let client = Prometheus::new(&endpoint)?;
                Box::new((endpoint, client))
            }
        };
        Ok(&self.connected.insert(connected).1)
    }
}

/// Measures once. `endpoint` is where Prometheus is, if there is one, or why it can't be asked.
pub async fn measure(
    connector: &mut Connector,
    endpoint: Result<Option<Endpoint>, PrometheusError>,
    request: &Request,
) -> Round {
    let prometheus = match endpoint {
        Ok(None) => None,
        Ok(Some(endpoint)) => Some(match connector.connect(endpoint) {
            Ok(client) => ask(client, request).await,
            Err(error) => Answers::failed(request, &error),
        }),
        Err(error) => Some(Answers::failed(request, &error)),
    };
    let unanswered = unanswered(request, prometheus.as_ref());
    let scrapes = unanswered.into_iter().map(|target| async move {
        let sample = scrape(&target.address).await;
        let sample = sample.inspect_err(|error| tracing::debug!(member = target.name, %error, "scrape"));
        Some((target.name, sample.ok()?))
    });
    let direct = futures::stream::iter(scrapes).buffer_unordered(SCRAPES_AT_ONCE).filter_map(std::future::ready);
    Round { asked_at: request.asked_at, prometheus, direct: direct.collect().await }
}

async fn ask(client: &Prometheus, request: &Request) -> Answers {
    let namespace = request.namespace.as_deref();
    let gauges = join_all(request.gauges.iter().map(|(tier, metric)| async move {
        let answer = match request.prefix(*tier) {
            // Nobody is there, so nobody is asked about.
            "" => Ok(BTreeMap::new()),
            prefix => client.gauge(*metric, namespace, prefix).await,
        };
        ((*tier, *metric), answer)
    }));
    let queries = join_all(
        request
            .queries
            .iter()
            .map(|(query, per_pod)| async move { ((query.clone(), *per_pod), client.query(query, *per_pod).await) }),
    );
    let (gauges, queries) = futures::join!(gauges, queries);
    // Asked last: a restart before any of the answers above is seen.
    let answered = gauges.iter().any(|(_, answer)| answer.is_ok()) || queries.iter().any(|(_, answer)| answer.is_ok());
    let source_age = match answered {
        // One that broke off just now may as well be starting.
        true => client.age().await.unwrap_or(Some(Duration::ZERO)),
        false => None,
    };
    Answers { gauges: gauges.into_iter().collect(), queries: queries.into_iter().collect(), source_age }
}

/// Members to be scraped directly: those of which a gauge is wanted and Prometheus has no fresh value.
fn unanswered(request: &Request, answers: Option<&Answers>) -> Vec<Target> {
    let is_answered = |target: &Target, gauge: &(Tier, BuiltIn)| {
        let Some(Ok(values)) = answers.and_then(|answers| answers.gauges.get(gauge)) else { return false };
        values.get(&target.name).is_some_and(|value| value.age <= SAMPLE_AGE_MAX)
    };
    let wants = |target: &&Target| {
        let mut gauges = request.gauges.iter().filter(|(tier, _)| *tier == target.tier);
        !target.address.is_empty() && gauges.any(|gauge| !is_answered(target, gauge))
    };
    request.targets.iter().filter(wants).cloned().collect()
}
