//! Direct scrape: what a member exports, read from the member itself.

use http_body_util::{BodyExt, Empty, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use im_crds::BuiltIn;
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

impl Sample {
    /// The value of a metric, in the unit of its series.
    pub fn get(&self, metric: BuiltIn) -> Option<f64> {
        match metric {
            BuiltIn::Connections => self.connections,
            BuiltIn::MessagesPerSecond => self.messages_per_second,
            BuiltIn::CpuUtilization => self.cpu_cores,
        }
    }

    fn slot(&mut self, metric: BuiltIn) -> &mut Option<f64> {
        match metric {
            BuiltIn::Connections => &mut self.connections,
            BuiltIn::MessagesPerSecond => &mut self.messages_per_second,
            BuiltIn::CpuUtilization => &mut self.cpu_cores,
        }
    }
}

/// The series that members export for a metric.
pub const fn series(metric: BuiltIn) -> &'static str {
    match metric {
        BuiltIn::Connections => "im_connections",
        BuiltIn::MessagesPerSecond => "im_messages_per_second",
        BuiltIn::CpuUtilization => "im_cpu_cores",
    }
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
        let Some(metric) = BuiltIn::ALL.into_iter().find(|metric| series(*metric) == name) else { continue };
        let gauge = sample.slot(metric);
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
    fn an_empty_page_is_no_data_and_not_zero() {
        for page in ["", "\n", "im_connections", "im_connections x", "im_connections{", "}"] {
            assert_eq!(parse(page), Sample::default(), "{page:?}");
        }
    }
}
