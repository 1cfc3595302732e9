//! Prometheus' HTTP API.
//!
//! Time is Prometheus' own. An instant query answers with the time of its evaluation, which says nothing about the age of
//! a sample: a series that nobody scrapes any more is answered for five minutes. So a gauge is asked for together with
//! `timestamp()` of it, in one query, and ages are differences of two times of Prometheus: no clock has to agree with
//! another. For a query of one's own there is no such time (after any operator, `timestamp()` is that of the
//! evaluation); there the look-back is asked to be as short as a value may be old (Prometheus from 2.43 on heeds it;
//! all write a staleness marker as soon as a target can't be scraped).
//!
//! When Prometheus itself started is asked of `/api/v1/status/runtimeinfo`: unlike `process_start_time_seconds` that
//! takes no job that scrapes Prometheus, and unlike `prometheus_tsdb_lowest_timestamp` it is no older after a restart
//! with an old volume. Systems that only speak the query API don't have it; then the start is not known.

use crate::autoscale::SAMPLE_AGE_MAX;
use im_crds::{BuiltIn, ImCluster, SecretKey};
use k8s_openapi::jiff::Timestamp;
use prometheus_http_query::Client;
use prometheus_http_query::response::{Data, InstantVector, PromqlResult};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::error::Error as _;
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// An answer that takes longer is none.
pub const TIMEOUT: Duration = Duration::from_secs(3);
/// The largest answer that is read.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Tells values from times in the answer about a gauge.
const WHAT: &str = "im_what";

/// How to reach Prometheus.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Base URL.
    pub url: String,
    /// Bearer token.
    pub token: Option<String>,
    /// PEM of the authorities that are trusted; `None` = the system's.
    pub ca_pem: Option<Vec<u8>>,
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, token, ca_pem } = self;
        let (token, ca) = (token.as_ref().map(|_| "…"), ca_pem.as_ref().map(Vec::len));
        f.debug_struct("Endpoint").field("url", url).field("token", &token).field("ca_pem", &ca).finish()
    }
}

impl Endpoint {
    /// One without credentials.
    pub fn plain(url: impl Into<String>) -> Self {
        Self { url: url.into(), token: None, ca_pem: None }
    }

    /// What an ImCluster asks for; where it asks for none, what `setup` has. `secret` is what a Secret holds, as of the last
    /// look; `None` = it is not there.
    ///
    /// # Errors
    /// [`PrometheusError::Setup`] when a file can't be read, or may not be, and when a Secret is missing.
    pub fn of(
        cluster: &ImCluster,
        setup: &super::Setup,
        secret: impl Fn(&SecretKey) -> Option<Vec<u8>>,
    ) -> Result<Option<Self>, PrometheusError> {
        let Some(asked) = &cluster.spec.metrics.prometheus else { return Ok(setup.prometheus.clone()) };
        let read = |field: &str, file: &Option<String>, key: &Option<SecretKey>| match (file, key) {
            (None, None) => Ok(None),
            (_, Some(key)) => secret(key).map(Some).ok_or_else(|| {
                let SecretKey { name, key } = key;
                PrometheusError::Setup(format!("{field}Secret: there is no Secret {name} with a key {key}: create it"))
            }),
            (Some(file), None) if setup.reads_files => {
                let text = std::fs::read(Path::new(file));
                text.map(Some).map_err(|error| PrometheusError::Setup(format!("{field}File {file}: {error}")))
            }
            (Some(_), None) => Err(PrometheusError::Setup(format!(
                "{field}File names a file, which is for `imcluster up`: put it into a Secret and use {field}Secret"
            ))),
        };
        let token = read("spec.metrics.prometheus.token", &asked.token_file, &asked.token_secret)?
            .map(|token| String::from_utf8_lossy(&token).trim().to_owned());
        let ca_pem = read("spec.metrics.prometheus.ca", &asked.ca_file, &asked.ca_secret)?;
        Ok(Some(Self { url: asked.url.clone(), token, ca_pem }))
    }
}

/// Why Prometheus said nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PrometheusError {
    /// The endpoint can't be used as it is written.
    #[error("Prometheus can't be asked: {0}")]
    Setup(String),
    /// No connection, or it broke.
    #[error("Prometheus can't be reached: {0}")]
    Unreachable(String),
    /// No answer in time.
    #[error("Prometheus did not answer within {} s", TIMEOUT.as_secs())]
    Timeout,
    /// Another status than 200, and not Prometheus' own words.
    #[error("Prometheus answers HTTP {0}{hint}", hint = match .0 {
        401 | 403 => ": give it another token",
        404 => ": check the path of the URL",
        _ => "",
    })]
    Status(u16),
    /// What came is not of Prometheus: a proxy's page, for one.
    #[error("what answers there is no Prometheus ({0}): check the URL")]
    NotPrometheus(String),
    /// The answer is too long.
    #[error("Prometheus' answer is longer than {} MiB: aggregate the query", ANSWER_BYTES_MAX >> 20)]
    TooLarge,
    /// Prometheus can't answer now.
    #[error("Prometheus can't answer now: {0}")]
    Unavailable(String),
    /// The query is wrong.
    #[error("Prometheus refuses the query: {0}")]
    Query(String),
    /// The query is right and its result is not what is wanted.
    #[error("the query's result can't be used: {0}")]
    Result(String),
}

impl PrometheusError {
    /// One word, for a metric's label.
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Setup(_) => "setup",
            Self::Unreachable(_) => "unreachable",
            Self::Timeout => "timeout",
            Self::Status(_) => "status",
            Self::NotPrometheus(_) => "not prometheus",
            Self::TooLarge => "too large",
            Self::Unavailable(_) => "unavailable",
            Self::Query(_) => "query",
            Self::Result(_) => "result",
        }
    }
}

/// A value and how old it was when it was asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Aged {
    /// In the unit of the series; finite.
    pub value: f64,
    /// Its age.
    pub age: Duration,
}

/// What a query of one's own says.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// A value for each pod.
    PerPod(BTreeMap<String, Aged>),
    /// One value; `None` = the result is empty.
    Total(Option<Aged>),
}

/// A client of one Prometheus.
#[derive(Clone)]
pub struct Prometheus {
    http: reqwest::Client,
    api: Client,
    base: String,
}

impl fmt::Debug for Prometheus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prometheus").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Prometheus {
    /// A client with bounded time and answers. It follows no redirects: what redirects is a login page.
    ///
    /// # Errors
    /// [`PrometheusError::Setup`] when URL, token or certificates can't be understood.
    pub fn new(endpoint: &Endpoint) -> Result<Self, PrometheusError> {
        let setup = |what: &str, error: &dyn fmt::Display| PrometheusError::Setup(format!("{what}: {error}"));
        // reqwest takes the process's provider; it is no harm if somebody was here before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut headers = HeaderMap::new();
        if let Some(token) = &endpoint.token {
            let value = HeaderValue::from_str(&format!("Bearer {token}"));
            let mut value = value.map_err(|error| setup("the bearer token", &error))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .default_headers(headers)
            .redirect(reqwest::redirect::Policy::none())
            .pool_max_idle_per_host(4);
        if let Some(pem) = &endpoint.ca_pem {
            let roots =
                reqwest::Certificate::from_pem_bundle(pem).map_err(|error| setup("the CA certificates", &error))?;
            if roots.is_empty() {
                return Err(setup("the CA certificates", &"there is none in the file: it has to be PEM"));
            }
            http = http.tls_certs_only(roots);
        } else if !endpoint.url.starts_with("https://") {
            // The system's certificates are not looked for where none are needed: there may be none.
            http = http.tls_certs_only([]);
        }
        let http = http.build().map_err(|error| setup("the HTTP client", &chain(&error)))?;
        let api = Client::from(http.clone(), &endpoint.url).map_err(|error| setup(&endpoint.url, &error))?;
        Ok(Self { http, api, base: endpoint.url.trim_end_matches('/').to_owned() })
    }

    /// The latest value of a metric of each pod whose name begins with `prefix`, with its age.
    ///
    /// # Errors
    /// [`PrometheusError`].
    pub async fn gauge(
        &self,
        metric: BuiltIn,
        namespace: Option<&str>,
        prefix: &str,
    ) -> Result<BTreeMap<String, Aged>, PrometheusError> {
        ages(&self.ask(&gauge_query(metric, namespace, prefix)).await?)
    }

    /// What a query says: the sum of its series, or of each pod's.
    ///
    /// # Errors
    /// [`PrometheusError`].
    pub async fn query(&self, query: &str, per_pod: bool) -> Result<Answer, PrometheusError> {
        answer(&self.ask(query).await?, per_pod)
    }

    /// For how long Prometheus has been running; `None` = it does not say.
    ///
    /// # Errors
    /// [`PrometheusError`] when it does not answer at all.
    pub async fn age(&self) -> Result<Option<Duration>, PrometheusError> {
        let now = match self.ask("time()").await? {
            Data::Scalar(now) => now.value(),
            _ => return Err(PrometheusError::NotPrometheus("time() is no number".into())),
        };
        let sent = self.http.get(format!("{}/api/v1/status/runtimeinfo", self.base)).send().await;
        let (status, body) = read(sent.map_err(|error| broken(&error))?).await?;
        // Who speaks the query API only says something else here.
        let info: Option<Envelope<RuntimeInfo>> = serde_json::from_slice(&body).ok().filter(|_| status == 200);
        let started_at = info.and_then(|info| info.data).map(|info| info.start_time.as_millisecond() as f64 / 1e3);
        Ok(started_at.map(|at| Duration::try_from_secs_f64((now - at).max(0.0)).unwrap_or(Duration::MAX)))
    }

    async fn ask(&self, query: &str) -> Result<Data, PrometheusError> {
        let sent = self
            .api
            .query(query)
            .timeout(i64::try_from(TIMEOUT.as_millis()).unwrap_or(i64::MAX))
            .query("lookback_delta", format!("{}s", SAMPLE_AGE_MAX.as_secs()))
            .post_raw();
        let response = sent.await.map_err(|error| match error {
            prometheus_http_query::Error::Client(error) => match error.inner() {
                Some(inner) => broken(inner),
                None => PrometheusError::Unreachable(error.to_string()),
            },
            other => PrometheusError::Unreachable(other.to_string()),
        })?;
        let (status, body) = read(response).await?;
        data(status, &body)
    }
}

/// Prometheus' frame around every answer.
#[derive(Deserialize)]
struct Envelope<T> {
    status: String,
    data: Option<T>,
    #[serde(rename = "errorType")]
    error_type: Option<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct RuntimeInfo {
    #[serde(rename = "startTime")]
    start_time: Timestamp,
}

/// An error with what is behind it: reqwest's own words leave the reason out.
fn chain(error: &reqwest::Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words = error.to_string();
        source = error.source();
    }
    words
}

fn broken(error: &reqwest::Error) -> PrometheusError {
    if error.is_timeout() { PrometheusError::Timeout } else { PrometheusError::Unreachable(chain(error)) }
}

/// Status and body, as far as it is of a bearable length.
async fn read(mut response: reqwest::Response) -> Result<(u16, Vec<u8>), PrometheusError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| broken(&error))? {
        if body.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(PrometheusError::TooLarge);
        }
        body.extend_from_slice(&chunk);
    }
    Ok((response.status().as_u16(), body))
}

/// The result in an answer to a query.
fn data(status: u16, body: &[u8]) -> Result<Data, PrometheusError> {
    // Only the frame first: what is in it can be of a kind that is not known here.
    let frame: Envelope<serde_json::Value> = match serde_json::from_slice(body) {
        Ok(frame) => frame,
        Err(_) if status != 200 => return Err(PrometheusError::Status(status)),
        Err(error) => return Err(PrometheusError::NotPrometheus(format!("its answer is no JSON, {error}"))),
    };
    match (frame.status.as_str(), frame.data) {
        ("success", Some(data)) => {
            let result: Result<PromqlResult, _> = serde_json::from_value(data);
            result.map(|result| result.into_inner().0).map_err(|error| PrometheusError::Result(error.to_string()))
        }
        ("error", _) => {
            let words = frame.error.unwrap_or_default();
            match frame.error_type.as_deref() {
                Some("bad_data" | "execution" | "not_found") => Err(PrometheusError::Query(words)),
                _ => Err(PrometheusError::Unavailable(words)),
            }
        }
        _ => Err(PrometheusError::NotPrometheus("its answer has no result".into())),
    }
}

/// Asks for a gauge and for the times of its samples.
fn gauge_query(metric: BuiltIn, namespace: Option<&str>, prefix: &str) -> String {
    let series = super::direct::series(metric);
    let quoted = |text: &str| text.replace('\\', r"\\").replace('"', "\\\"");
    let mut pattern = String::new();
    for character in prefix.chars() {
        if !character.is_ascii_alphanumeric() {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    let namespace = namespace.map(|namespace| format!("namespace=\"{}\",", quoted(namespace))).unwrap_or_default();
    let selector = format!("{series}{{{namespace}pod=~\"{}.*\"}}", quoted(&pattern));
    format!(
        "label_replace({selector}, \"{WHAT}\", \"value\", \"\", \"\") \
         or label_replace(timestamp({selector}), \"{WHAT}\", \"at\", \"\", \"\")"
    )
}

/// A pod, and what else tells its series from one another.
type Identity<'a> = (&'a str, BTreeMap<&'a str, &'a str>);

/// The two halves of a gauge's series.
#[derive(Default)]
struct Pair {
    value: Option<f64>,
    age: Option<Duration>,
}

/// Joins values and times of each pod's series. Several series of a pod are added up, the oldest sample's age counts.
fn ages(data: &Data) -> Result<BTreeMap<String, Aged>, PrometheusError> {
    let Data::Vector(vector) = data else { return Err(PrometheusError::NotPrometheus("a gauge is no vector".into())) };
    let mut pairs: BTreeMap<Identity<'_>, Pair> = BTreeMap::new();
    for series in vector {
        let labels = series.metric();
        let Some(pod) = labels.get("pod") else { continue };
        let identity = labels
            .iter()
            .filter(|(name, _)| !["__name__", WHAT].contains(&name.as_str()))
            .map(|(name, value)| (name.as_str(), value.as_str()));
        let pair = pairs.entry((pod, identity.collect())).or_default();
        let sample = series.sample();
        match labels.get(WHAT).map(String::as_str) {
            Some("value") => pair.value = Some(sample.value()),
            Some("at") => pair.age = Duration::try_from_secs_f64((sample.timestamp() - sample.value()).max(0.0)).ok(),
            _ => {}
        }
    }
    let mut pods: BTreeMap<String, Aged> = BTreeMap::new();
    let mut broken = Vec::new();
    for ((pod, _), pair) in pairs {
        match pair {
            Pair { value: Some(value), age: Some(age) } if value.is_finite() => {
                let known = pods.entry(pod.to_owned()).or_insert(Aged { value: 0.0, age });
                known.value += value;
                known.age = known.age.max(age);
            }
            // A part of a sum that is no number: there is no sum.
            _ => broken.push(pod),
        }
    }
    for pod in broken {
        pods.remove(pod);
    }
    Ok(pods)
}

/// Reads the result of a query of one's own.
fn answer(data: &Data, per_pod: bool) -> Result<Answer, PrometheusError> {
    let vector: &[InstantVector] = match data {
        Data::Vector(vector) => vector,
        Data::Scalar(sample) if !per_pod => {
            return total([sample.value()]).map(Answer::Total);
        }
        Data::Scalar(_) => return Err(PrometheusError::Result("it is one number, and perPod is set".into())),
        Data::Matrix(_) => {
            return Err(PrometheusError::Result(
                "it is a range: put an aggregation such as avg_over_time() around it".into(),
            ));
        }
    };
    if !per_pod {
        return total(vector.iter().map(|series| series.sample().value())).map(Answer::Total);
    }
    let mut pods: BTreeMap<String, f64> = BTreeMap::new();
    for series in vector {
        if let Some(pod) = series.metric().get("pod") {
            *pods.entry(pod.clone()).or_default() += series.sample().value();
        }
    }
    if pods.is_empty() && !vector.is_empty() {
        return Err(PrometheusError::Result("no series has the label pod: aggregate with `sum by (pod) (…)`".into()));
    }
    let finite = pods.into_iter().filter(|(_, value)| value.is_finite());
    Ok(Answer::PerPod(finite.map(|(pod, value)| (pod, Aged { value, age: Duration::ZERO })).collect()))
}

fn total(values: impl IntoIterator<Item = f64>) -> Result<Option<Aged>, PrometheusError> {
    let sum = values.into_iter().fold(None, |sum, value| Some(sum.unwrap_or(0.0) + value));
    match sum {
        // A division by zero, mostly: nothing is known, which is not the same as nothing to do.
        Some(sum) if !sum.is_finite() => Err(PrometheusError::Result(format!("it is {sum}, which is no amount"))),
        sum => Ok(sum.map(|value: f64| Aged { value, age: Duration::ZERO })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_for_a_gauge_is_quoted() {
        assert_eq!(
            gauge_query(BuiltIn::CpuUtilization, Some("im"), "chat.a-gateway-"),
            r#"label_replace(im_cpu_cores{namespace="im",pod=~"chat\\.a\\-gateway\\-.*"}, "im_what", "value", "", "") or label_replace(timestamp(im_cpu_cores{namespace="im",pod=~"chat\\.a\\-gateway\\-.*"}), "im_what", "at", "", "")"#
        );
        assert!(gauge_query(BuiltIn::Connections, Some("a\"b\\"), "").contains(r#"{namespace="a\"b\\",pod=~".*"}"#));
    }

    #[test]
    fn several_series_of_a_pod_are_added_up_and_a_half_one_is_none() {
        let series = |pod: &str, job: &str, what: &str, value: &str| serde_json::json!({"metric": {"pod": pod, "job": job, WHAT: what}, "value": [1000, value]});
        let result = [
            series("a", "x", "value", "1"),
            series("a", "x", "at", "999"),
            series("a", "y", "value", "2"),
            series("a", "y", "at", "990"),
            // The time of one is missing, another's is ahead of the evaluation.
            series("b", "x", "value", "1"),
            series("c", "x", "value", "5"),
            series("c", "x", "at", "1001"),
        ];
        let body = serde_json::json!({"status": "success", "data": {"resultType": "vector", "result": result}});
        let ages = ages(&data(200, body.to_string().as_bytes()).expect("a result")).expect("a vector");
        let expected = [
            ("a".to_owned(), Aged { value: 3.0, age: Duration::from_secs(10) }),
            ("c".to_owned(), Aged { value: 5.0, age: Duration::ZERO }),
        ];
        assert_eq!(ages, BTreeMap::from(expected));
    }
}
