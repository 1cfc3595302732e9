//! Which clusters are led here, and the way of a member to the loop of its own. See [`Clusters`].

use super::ControlError;
use super::leader::{Leader, Setup};
use super::service::Incoming;
use super::status::Status;
use crate::metrics::ScalingMetrics;
use crate::platform::Platform;
use im_crds::ImCluster;
use im_proto::token::Tokens;
use parking_lot::RwLock;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// Reports of all members of a cluster that wait for its loop.
const INCOMING_MAX: usize = 4_096;

/// Names an ImCluster: `NAMESPACE/NAME`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClusterKey(pub String);

impl ClusterKey {
    /// The key of an ImCluster; outside of Kubernetes its namespace is `default`.
    pub fn of(cluster: &ImCluster) -> Self {
        let namespace = cluster.metadata.namespace.as_deref().unwrap_or("default");
        Self(format!("{namespace}/{}", cluster.metadata.name.as_deref().unwrap_or_default()))
    }
}

impl fmt::Display for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether this process decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leadership {
    /// It does.
    Leading,
    /// Another one does, or nobody.
    Following {
        /// `host:port` of the leader's control service, if there is a leader.
        leader: Option<String>,
    },
}

/// Why a member is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

/// Why a member is not taken to a cluster's loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// Ask there.
    NotLeader(Option<String>),
    /// Nobody decides for that cluster here (yet).
    UnknownCluster(String),
    /// The token is missing or wrong.
    Unauthenticated,
}

struct Route {
    id: u64,
    tokens: Tokens,
    incoming: mpsc::Sender<Incoming>,
}

/// The clusters that are led by this process: what the gRPC service routes by.
pub struct Clusters {
    leadership: watch::Receiver<Leadership>,
    routes: RwLock<HashMap<ClusterKey, Route>>,
    next_id: AtomicU64,
    refused: Family<Reason, Counter>,
    scaling: ScalingMetrics,
}

impl Clusters {
    /// No clusters yet. While `leadership` says that another one leads, members are sent there.
    pub fn new(leadership: watch::Receiver<Leadership>) -> Arc<Self> {
        Arc::new(Self {
            leadership,
            routes: RwLock::default(),
            next_id: AtomicU64::new(0),
            refused: Family::default(),
            scaling: ScalingMetrics::default(),
        })
    }

    /// Exports how many members were refused, and why; and what scaling did.
    pub fn register(&self, registry: &mut Registry) {
        let help = "Members that dialled in and were refused";
        registry.register("control_joins_refused", help, self.refused.clone());
        self.scaling.register(registry);
    }

    /// Decides for a cluster on a task of its own until the returned [`Led`] is dropped. Members that present one of `tokens`
    /// are taken to it from now on; they wait until the stored map is read and the new term is stored.
    ///
    /// An earlier one of the same key gets no more members.
    pub fn lead<P: Platform>(self: &Arc<Self>, key: ClusterKey, tokens: Tokens, platform: Arc<P>, setup: Setup) -> Led {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (incoming, inbox) = mpsc::channel(INCOMING_MAX);
        let (shown, status) = watch::channel(Status::default());
        self.routes.write().insert(key.clone(), Route { id, tokens, incoming });
        let scaling = self.scaling.clone();
        let task = tokio::spawn(async move { Leader::new(platform, setup, scaling, shown).await?.run(inbox).await });
        Led { status, task: Some(task), registration: Registration { clusters: self.clone(), key, id } }
    }

    /// Where the reports of a member go that says it belongs to the cluster `key` and presents `token`. Without a key it
    /// belongs to the only cluster there is.
    pub(super) fn route(&self, key: Option<&str>, token: Option<&str>) -> Result<mpsc::Sender<Incoming>, Refusal> {
        let found = self.find(key, token);
        if let Err(refusal) = &found {
            let reason = match refusal {
                // As it should be: it is not counted as a refusal.
                Refusal::NotLeader(_) => return found,
                Refusal::UnknownCluster(_) => "unknown_cluster",
                Refusal::Unauthenticated => "unauthenticated",
            };
            self.refused.get_or_create(&Reason { reason }).inc();
        }
        found
    }

    fn find(&self, key: Option<&str>, token: Option<&str>) -> Result<mpsc::Sender<Incoming>, Refusal> {
        if let Leadership::Following { leader } = &*self.leadership.borrow() {
            return Err(Refusal::NotLeader(leader.clone()));
        }
        let routes = self.routes.read();
        let route = match key {
            Some(key) => routes.get(&ClusterKey(key.to_owned())),
            None if routes.len() == 1 => routes.values().next(),
            None => None,
        };
        let route = route.ok_or_else(|| Refusal::UnknownCluster(key.unwrap_or("(none given)").to_owned()))?;
        if token.is_some_and(|token| route.tokens.accept(token)) {
            Ok(route.incoming.clone())
        } else {
            Err(Refusal::Unauthenticated)
        }
    }
}

/// A cluster that this process decides for. Dropping it ends that: its members are told to join anew.
pub struct Led {
    /// What is, and why.
    pub status: watch::Receiver<Status>,
    task: Option<JoinHandle<Result<(), ControlError>>>,
    registration: Registration,
}

impl Led {
    /// Takes members in that present one of these tokens, from now on.
    pub fn set_tokens(&self, tokens: Tokens) {
        let Registration { clusters, key, id } = &self.registration;
        if let Some(route) = clusters.routes.write().get_mut(key).filter(|route| route.id == *id) {
            route.tokens = tokens;
        }
    }

    /// Waits until nobody decides any more, and says why: `Ok` when the platform's watch ended. Cancel-safe; once it has
    /// told, it waits for ever.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn ended(&mut self) -> Result<(), ControlError> {
        let Some(task) = &mut self.task else { return std::future::pending().await };
        let ended = task.await;
        self.task = None;
        self.registration.remove();
        ended.unwrap_or_else(|error| {
            Err(ControlError::Broken { cluster: self.registration.key.clone(), reason: error.to_string() })
        })
    }
}

impl Drop for Led {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Registration {
    clusters: Arc<Clusters>,
    key: ClusterKey,
    id: u64,
}

impl Registration {
    fn remove(&self) {
        let mut routes = self.clusters.routes.write();
        if routes.get(&self.key).is_some_and(|route| route.id == self.id) {
            routes.remove(&self.key);
            self.clusters.scaling.forget(&self.key.0);
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use im_proto::ids::MemberId;

    fn clusters(leadership: Leadership) -> (Arc<Clusters>, watch::Sender<Leadership>) {
        let (sender, receiver) = watch::channel(leadership);
        (Clusters::new(receiver), sender)
    }

    fn add(clusters: &Arc<Clusters>, key: &str, token: &str) -> (Registration, mpsc::Receiver<Incoming>) {
        let id = clusters.next_id.fetch_add(1, Ordering::Relaxed);
        let (incoming, inbox) = mpsc::channel(1);
        let key = ClusterKey(key.to_owned());
        clusters
            .routes
            .write()
            .insert(key.clone(), Route { id, tokens: Tokens::parse(token).expect("a token"), incoming });
        (Registration { clusters: clusters.clone(), key, id }, inbox)
    }

    fn refused(clusters: &Clusters, reason: &'static str) -> u64 {
        clusters.refused.get_or_create(&Reason { reason }).get()
    }

    #[test]
    fn a_member_is_taken_to_its_cluster_by_key_and_token() {
        let (clusters, _leads) = clusters(Leadership::Leading);
        let refusal = |key, token| clusters.route(key, token).map(|_| ()).err();
        assert_eq!(refusal(None, Some("t")), Some(Refusal::UnknownCluster("(none given)".into())));
        let (a, mut inbox) = add(&clusters, "x/a", "secret a");
        assert_eq!(refusal(None, Some("secret a")), None, "the only one there is");
        assert_eq!(refusal(None, Some("secret b")), Some(Refusal::Unauthenticated));
        assert_eq!(refusal(None, Some("secret")), Some(Refusal::Unauthenticated));
        assert_eq!(refusal(Some("x/a"), None), Some(Refusal::Unauthenticated));
        assert_eq!(refusal(Some("x/b"), Some("secret a")), Some(Refusal::UnknownCluster("x/b".into())));
        let (_b, _inbox_b) = add(&clusters, "x/b", "secret b");
        assert!(refusal(None, Some("secret a")).is_some(), "which one?");
        assert_eq!(refusal(Some("x/b"), Some("secret b")), None);
        let to_a = clusters.route(Some("x/a"), Some("secret a")).expect("its own token");
        to_a.try_send(Incoming::Left { stream: 7, member: MemberId::new("m", 1).expect("a name") }).expect("room");
        assert!(matches!(inbox.try_recv(), Ok(Incoming::Left { stream: 7, .. })));
        drop(a);
        assert!(matches!(refusal(Some("x/a"), Some("secret a")), Some(Refusal::UnknownCluster(_))));
        assert_eq!((refused(&clusters, "unauthenticated"), refused(&clusters, "unknown_cluster")), (3, 4));
    }

    #[test]
    fn who_does_not_lead_says_who_does() {
        let (clusters, leads) = clusters(Leadership::Following { leader: Some("10.0.0.7:7200".into()) });
        let (_a, _inbox) = add(&clusters, "x/a", "t");
        let refusal = || clusters.route(Some("x/a"), Some("t")).map(|_| ()).err();
        assert_eq!(refusal(), Some(Refusal::NotLeader(Some("10.0.0.7:7200".into()))));
        leads.send_replace(Leadership::Leading);
        assert_eq!(refusal(), None);
    }

    #[test]
    fn the_end_of_an_earlier_one_leaves_its_successor_alone() {
        let (clusters, _leads) = clusters(Leadership::Leading);
        let (earlier, _inbox) = add(&clusters, "x/a", "old");
        let (_later, _inbox) = add(&clusters, "x/a", "new");
        drop(earlier);
        assert!(clusters.route(Some("x/a"), Some("new")).is_ok());
    }
}
