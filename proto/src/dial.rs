//! How a member finds the control service that leads, and says whose member it is.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::lookup_host;
use tokio::time::{sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use crate::control::control_client::ControlClient;
use crate::links::LINK_SILENCE_MAX;
use crate::token::SharedToken;

/// The metadata of `Join` that names the member's cluster, `NAMESPACE/NAME`.
pub const CLUSTER_METADATA: &str = "im-cluster";

/// For a name to be resolved, and for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(1);
/// A leader that was stopped keeps its connections, and another one leads: only silence tells. Between two questions whether
/// it lives, and for the answer.
const PING_INTERVAL: Duration = Duration::from_secs(2);
const PONG_MAX: Duration = Duration::from_secs(3);
/// Pauses between two attempts.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// The largest command of the control service, bytes.
const COMMAND_BYTES_MAX: usize = 64 << 20;

/// Tries the control services in turn, and goes where one of them says that the leader is.
#[derive(Debug)]
pub struct ControlDialer {
    names: Vec<String>,
    cluster: Option<MetadataValue<Ascii>>,
    token: SharedToken,
    /// Named by the one asked last.
    leader: Option<String>,
    turn: usize,
    pause: Duration,
}

impl ControlDialer {
    /// Dials `names` (`host:port`, resolved anew each time, each of a host's addresses in turn) for a member of `cluster`.
    pub fn new(names: Vec<String>, cluster: Option<&str>, token: SharedToken) -> Self {
        Self {
            names,
            cluster: cluster.and_then(|cluster| cluster.try_into().ok()),
            token,
            leader: None,
            turn: 0,
            pause: PAUSE.0,
        }
    }

    /// Whether there is nobody to dial.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Connects to the next one; returns its address too.
    ///
    /// # Errors
    /// `Unavailable`, with who can't be reached.
    pub async fn connect(&mut self) -> Result<(String, ControlClient<Channel>), Status> {
        let address = match self.leader.take() {
            Some(leader) => leader,
            None => self.next_address().await?,
        };
        let unavailable = |error: tonic::transport::Error| Status::unavailable(format!("{address}: {error}"));
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(unavailable)?;
        let endpoint = endpoint
            .connect_timeout(CONNECT_MAX)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PONG_MAX)
            .keep_alive_while_idle(true);
        let channel = endpoint.connect().await.map_err(unavailable)?;
        Ok((address, ControlClient::new(channel).max_decoding_message_size(COMMAND_BYTES_MAX)))
    }

    async fn next_address(&mut self) -> Result<String, Status> {
        let mut found: Vec<SocketAddr> = Vec::new();
        for name in &self.names {
            match timeout(CONNECT_MAX, lookup_host(name)).await {
                Ok(Ok(addresses)) => found.extend(addresses),
                Ok(Err(error)) => tracing::debug!(name, %error, "a control service's name"),
                Err(_) => tracing::debug!(name, "no answer to a control service's name"),
            }
        }
        // Name servers shuffle.
        found.sort_unstable();
        found.dedup();
        self.turn = self.turn.wrapping_add(1);
        let address = found.get(self.turn % found.len().max(1));
        let nowhere = || Status::unavailable(format!("no address is known for {}", self.names.join(", ")));
        address.map(ToString::to_string).ok_or_else(nowhere)
    }

    /// The request that opens a stream of reports.
    pub fn request<T>(&self, reports: T) -> Request<T> {
        let mut request = Request::new(reports);
        let metadata = [("authorization", self.token.bearer()), (CLUSTER_METADATA, self.cluster.clone())];
        for (key, value) in metadata {
            if let Some(value) = value {
                request.metadata_mut().insert(key, value);
            }
        }
        request
    }

    /// The one at `asked` says that the leader is at `leader`; empty = it does not know.
    pub fn redirected(&mut self, asked: &str, leader: String) {
        self.leader = Some(leader).filter(|leader| !leader.is_empty() && leader != asked);
    }

    /// Waits before the next attempt, the longer the more of them failed at once; `lived` is how long the last one lasted.
    pub async fn pause(&mut self, lived: Duration) {
        let (least, most) = PAUSE;
        self.pause = if lived > LINK_SILENCE_MAX || self.leader.is_some() { least } else { (self.pause * 2).min(most) };
        sleep(self.pause.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_are_tried_in_turn_and_the_leader_first() {
        let names = vec!["127.0.0.1:1".to_owned(), "127.0.0.2:1".to_owned()];
        let mut dialer = ControlDialer::new(names, Some("chat/eu"), SharedToken::fixed("secret").expect("a token"));
        let first = dialer.next_address().await.expect("an address");
        let second = dialer.next_address().await.expect("an address");
        assert_ne!(first, second);
        assert_eq!(dialer.next_address().await.expect("an address"), first);
        dialer.redirected("127.0.0.1:1", "127.0.0.3:1".into());
        let error = dialer.connect().await.expect_err("nobody listens");
        assert!(error.message().starts_with("127.0.0.3:1"), "{error}");
        for nowhere in ["", "127.0.0.1:1"] {
            dialer.redirected("127.0.0.1:1", nowhere.into());
            assert_eq!(dialer.leader, None, "{nowhere:?}");
        }
        let request = dialer.request(());
        let said = |key| request.metadata().get(key).and_then(|value| value.to_str().ok());
        assert_eq!((said(CLUSTER_METADATA), said("authorization")), (Some("chat/eu"), Some("Bearer secret")));
    }
}
