//! Metrics both ways: direct scrape, what each member exports, read from the member itself; and what control exports.

use crate::control::status::Status;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use tokio::net::TcpStream;

/// The largest page that is read.
const PAGE_BYTES_MAX: usize = 4 << 20;
/// A member that takes longer is not measured this time.
pub const SCRAPE_TIMEOUT: Duration = Duration::from_millis(800);

/// What a member says of itself, 10 s averages; `None` = it does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// Open client connections.
    pub connections: Option<f64>,
    /// Messages per second.
    pub messages_per_second: Option<f64>,
    /// CPU used, in cores.
    pub cpu_cores: Option<f64>,
}

/// Why a member could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeError {
    /// No connection.
    #[error("{0}")]
    Connect(#[from] std::io::Error),
    /// No HTTP.
    #[error("{0}")]
    Http(#[from] hyper::Error),
    /// Another answer than 200, or a body that breaks off or is too large.
    #[error("{0}")]
    Answer(String),
    /// No answer in time.
    #[error("no answer within {SCRAPE_TIMEOUT:?}")]
    Timeout,
}

/// Reads `http://ADDRESS/metrics`.
///
/// # Errors
/// [`ScrapeError`].
pub async fn scrape(address: &str) -> Result<Sample, ScrapeError> {
    let page = async {
        let stream = TcpStream::connect(address).await?;
        get(TokioIo::new(stream), "/metrics").await
    };
    let page = tokio::time::timeout(SCRAPE_TIMEOUT, page).await.map_err(|_| ScrapeError::Timeout)??;
    Ok(parse(&String::from_utf8_lossy(&page)))
}

/// One GET over a connection that is then closed.
///
/// # Errors
/// [`ScrapeError`], also when the status is not 200.
pub async fn get<I>(io: I, path: &str) -> Result<Bytes, ScrapeError>
where
    I: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path).header("host", "imcluster").header("connection", "close");
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| ScrapeError::Answer(error.to_string()))?;
    let answer = sender.send_request(request).await?;
    if !answer.status().is_success() {
        return Err(ScrapeError::Answer(format!("{path}: {}", answer.status())));
    }
    let body = Limited::new(answer.into_body(), PAGE_BYTES_MAX).collect().await;
    driver.abort();
    body.map(http_body_util::Collected::to_bytes).map_err(|error| ScrapeError::Answer(error.to_string()))
}

/// Reads the gauges out of Prometheus' text format; several series of one name are added up.
pub fn parse(page: &str) -> Sample {
    let mut sample = Sample::default();
    for line in page.lines() {
        let name = line.split(['{', ' ', '\t']).next().unwrap_or_default();
        let gauge = match name {
            "im_connections" => &mut sample.connections,
            "im_messages_per_second" => &mut sample.messages_per_second,
            "im_cpu_cores" => &mut sample.cpu_cores,
            _ => continue,
        };
        // A label's value may hold blanks, so the value is what follows the labels' end.
        let rest = match line.rfind('}') {
            Some(end) => &line[end + 1..],
            None => &line[name.len()..],
        };
        let value = rest.split_ascii_whitespace().next().and_then(|value| value.parse::<f64>().ok());
        if let Some(value) = value.filter(|value| value.is_finite()) {
            *gauge = Some(gauge.unwrap_or(0.0) + value);
        }
    }
    sample
}

/// What control exports, in Prometheus' text format: the numbers of the status, and what `register` adds.
///
/// # Errors
/// None that can happen: it is written to memory.
pub fn export(status: &Status, register: impl FnOnce(&mut Registry)) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("im");
    register(&mut registry);
    let members = Family::<[(&str, &str); 2], Gauge>::default();
    for (tier, shown) in [("gateway", &status.tiers.gateway), ("business", &status.tiers.business)] {
        for (count, value) in [("running", shown.replicas), ("ready", shown.ready), ("desired", shown.desired)] {
            members.get_or_create(&[("tier", tier), ("count", count)]).set(value.into());
        }
    }
    registry.register("tier_members", "Members of a tier: that run, that serve, that there should be", members);
    let shards = Family::<[(&str, &str); 1], Gauge>::default();
    let shown = &status.shards;
    for (count, value) in
        [("total", shown.total), ("owned", shown.owned), ("moving", shown.moving), ("queued", shown.queued)]
    {
        shards.get_or_create(&[("count", count)]).set(value.into());
    }
    registry.register("shards", "Shards: all, with an owner that lives, under way, about to move", shards);
    let term = Gauge::<i64>::default();
    term.set(i64::try_from(shown.term).unwrap_or(i64::MAX));
    registry.register("map_term", "Term of the shard map", term);
    let verdicts = Family::<[(&str, &str); 1], Gauge>::default();
    for verdict in ["True", "False", "Unknown"] {
        verdicts.get_or_create(&[("status", verdict)]).set((status.no_message_lost.status == verdict).into());
    }
    registry.register("no_message_lost", "1 at what the store says about acknowledged messages", verdicts);
    if let Some(lag) = status.watermark_lag_seconds {
        let gauge = Gauge::<f64, AtomicU64>::default();
        gauge.set(lag);
        registry.register("watermark_lag_seconds", "Age of the oldest message not notified to all", gauge);
    }
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_are_read_and_the_rest_is_not() {
        let page = "# HELP im_connections Open.\n# TYPE im_connections gauge\nim_connections 12\n\
                    im_connections_total 99\nim_messages_per_second{kind=\"a } b\"} 1.5\n\
                    im_messages_per_second{kind=\"c\"} 2 1700000000000\nim_cpu_cores NaN\n# EOF\n";
        let expected = Sample { connections: Some(12.0), messages_per_second: Some(3.5), cpu_cores: None };
        assert_eq!(parse(page), expected);
    }

    #[test]
    fn the_numbers_of_the_status_are_exported() {
        let mut status = Status { watermark_lag_seconds: Some(1.5), ..Status::default() };
        status.tiers.gateway.desired = 3;
        status.shards.total = 256;
        status.no_message_lost.status = "True".into();
        let page = export(&status, |_| ()).expect("written to memory");
        for line in [
            "im_tier_members{tier=\"gateway\",count=\"desired\"} 3",
            "im_shards{count=\"total\"} 256",
            "im_no_message_lost{status=\"True\"} 1",
            "im_no_message_lost{status=\"False\"} 0",
            "im_watermark_lag_seconds 1.5",
        ] {
            assert!(page.lines().any(|found| found == line), "no `{line}` in\n{page}");
        }
        let silent = export(&Status::default(), |_| ()).expect("written to memory");
        assert!(!silent.contains("im_watermark_lag_seconds"), "unknown is not zero");
    }

    #[test]
    fn an_empty_page_is_no_data_and_not_zero() {
        for page in ["", "\n", "im_connections", "im_connections x", "im_connections{", "}"] {
            assert_eq!(parse(page), Sample::default(), "{page:?}");
        }
    }
}
