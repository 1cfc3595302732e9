//! What the API server says about one namespace, kept up to date by watches: a wait is a condition on it, looked at again
//! after each change.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::pin,
    time::Duration,
};

use futures::StreamExt;
use im_crds::{ConditionStatus, ImCluster, ImClusterStatus, ShardMap};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{Pod, Service},
};
use kube::{
    Api, Client, Resource, ResourceExt,
    api::{ApiResource, DynamicObject},
    runtime::{
        WatchStreamExt,
        reflector::{Store, store::Writer},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};

use crate::support::TestResult;

/// Label of a pod: the ImCluster that it belongs to.
pub const CLUSTER: &str = "imcluster.dev/cluster";
/// Label of a pod: `gateway`, `business` or `store`.
pub const TIER: &str = "imcluster.dev/tier";
/// Label of a gateway that the clients' Service sends connections to.
pub const SERVING: &str = "imcluster.dev/serving";

/// One namespace.
pub struct World {
    clusters: Store<DynamicObject>,
    maps: Store<ShardMap>,
    pods: Store<Pod>,
    deployments: Store<Deployment>,
    sets: Store<StatefulSet>,
    services: Store<Service>,
    changes: watch::Receiver<u64>,
    _watchers: JoinSet<()>,
}

impl World {
    /// Starts to watch.
    pub fn watch(client: &Client, namespace: &str) -> Self {
        let (changed, changes) = watch::channel(0);
        let mut watchers = JoinSet::new();
        let clusters = ApiResource::erase::<ImCluster>(&());
        Self {
            clusters: mirror(
                Api::namespaced_with(client.clone(), namespace, &clusters),
                clusters.clone(),
                &changed,
                &mut watchers,
            ),
            maps: mirror(Api::namespaced(client.clone(), namespace), (), &changed, &mut watchers),
            pods: mirror(Api::namespaced(client.clone(), namespace), (), &changed, &mut watchers),
            deployments: mirror(Api::namespaced(client.clone(), namespace), (), &changed, &mut watchers),
            sets: mirror(Api::namespaced(client.clone(), namespace), (), &changed, &mut watchers),
            services: mirror(Api::namespaced(client.clone(), namespace), (), &changed, &mut watchers),
            changes,
            _watchers: watchers,
        }
    }

    /// Waits until `condition` gives a value.
    ///
    /// # Errors
    /// It did not within `deadline`.
    pub async fn wait<T>(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&Self) -> Option<T>,
    ) -> TestResult<T> {
        let mut changes = self.changes.clone();
        let found = timeout(deadline, async {
            loop {
                if let Some(value) = condition(self) {
                    return Ok(value);
                }
                changes.changed().await.map_err(|_| "the watches ended")?;
            }
        });
        found.await.map_err(|_| format!("not within {deadline:?}: {what}; now: {}", self.summary()))?
    }

    /// Demands that something stays true for a while, whatever changes.
    ///
    /// # Errors
    /// It became false.
    pub async fn hold(&self, what: &str, time: Duration, mut holds: impl FnMut(&Self) -> bool) -> TestResult {
        let mut changes = self.changes.clone();
        let end = Instant::now() + time;
        loop {
            if !holds(self) {
                return Err(format!("no longer: {what}; now: {}", self.summary()).into());
            }
            match timeout_at(end, changes.changed()).await {
                Err(_) => return Ok(()),
                Ok(change) => change.map_err(|_| "the watches ended")?,
            }
        }
    }

    /// The ImCluster's status, as far as there is one.
    pub fn status(&self, cluster: &str) -> Option<ImClusterStatus> {
        let object = self.cluster(cluster)?;
        serde_json::from_value(object.data.get("status")?.clone()).ok()
    }

    /// The ImCluster as it is.
    pub fn cluster(&self, name: &str) -> Option<DynamicObject> {
        let object = self.clusters.state().into_iter().find(|object| object.name_any() == name)?;
        Some((*object).clone())
    }

    /// A condition of the ImCluster, if it is about the present spec.
    pub fn condition(&self, cluster: &str, kind: &str) -> Option<(ConditionStatus, String, String)> {
        let generation = self.cluster(cluster)?.metadata.generation?;
        let conditions = self.status(cluster)?.conditions;
        let condition = conditions.into_iter().find(|condition| condition.kind == kind)?;
        let current = condition.observed_generation == generation;
        current.then_some((condition.status, condition.reason, condition.message))
    }

    /// Whether a condition of the ImCluster has that status, for the present spec.
    pub fn condition_is(&self, cluster: &str, kind: &str, wanted: ConditionStatus) -> bool {
        self.condition(cluster, kind).is_some_and(|(status, ..)| status == wanted)
    }

    /// All pods of a tier, those that end too; the oldest first.
    pub fn pods(&self, cluster: &str, tier: &str) -> Vec<Pod> {
        let belongs = |pod: &Pod| {
            let label = |name: &str| pod.labels().get(name).map(String::as_str);
            label(CLUSTER) == Some(cluster) && label(TIER) == Some(tier)
        };
        let mut pods: Vec<Pod> =
            self.pods.state().iter().filter(|pod| belongs(pod)).map(|pod| (**pod).clone()).collect();
        pods.sort_by_key(|pod| (pod.creation_timestamp().map(|time| time.0), pod.name_any()));
        pods
    }

    /// The pods of a tier that are Ready and not asked to end.
    pub fn ready_pods(&self, cluster: &str, tier: &str) -> Vec<Pod> {
        let mut pods = self.pods(cluster, tier);
        pods.retain(is_ready);
        pods
    }

    /// Gateways that the Service sends new connections to.
    pub fn serving(&self, cluster: &str) -> Vec<Pod> {
        let mut pods = self.ready_pods(cluster, "gateway");
        pods.retain(|pod| pod.labels().get(SERVING).is_some_and(|serving| serving == "true"));
        pods
    }

    /// The Deployments of a tier.
    pub fn deployments(&self, cluster: &str, tier: &str) -> Vec<Deployment> {
        let prefix = format!("{cluster}-{tier}-");
        let deployments = self.deployments.state();
        let of_tier = deployments.iter().filter(|deployment| deployment.name_any().starts_with(&prefix));
        of_tier.map(|deployment| (**deployment).clone()).collect()
    }

    /// Replicas that a tier's Deployments are to have.
    pub fn replicas(&self, cluster: &str, tier: &str) -> i32 {
        let deployments = self.deployments(cluster, tier);
        deployments.iter().filter_map(|deployment| deployment.spec.as_ref()?.replicas).sum()
    }

    /// Term and number of the shard map.
    pub fn map_version(&self, cluster: &str) -> Option<(u64, u64)> {
        self.map(cluster).map(|map| (map.spec.term, map.spec.number))
    }

    fn map(&self, cluster: &str) -> Option<ShardMap> {
        let maps = self.maps.state();
        maps.iter().find(|map| map.name_any() == cluster).map(|map| (**map).clone())
    }

    /// Which pod owns each shard by the stored map.
    pub fn owners(&self, cluster: &str) -> Option<Vec<Option<String>>> {
        let map = self.map(cluster)?;
        let shards = map.spec.decode().ok()?;
        // An owner is written NAME/BOOT.
        let pod = |owner: &str| owner.split('/').next().unwrap_or(owner).to_owned();
        Some(shards.into_iter().map(|shard| shard.owner.map(pod)).collect())
    }

    /// How many shards each pod owns; `None` while any has no owner.
    pub fn shares(&self, cluster: &str) -> Option<BTreeMap<String, usize>> {
        let mut shares = BTreeMap::new();
        for owner in self.owners(cluster)? {
            *shares.entry(owner?).or_default() += 1;
        }
        Some(shares)
    }

    /// Just so many business members are there and all of them own shards, and nothing moves.
    pub fn shards_are_shared_by(&self, cluster: &str, members: usize) -> bool {
        let pods: BTreeSet<String> = self.pods(cluster, "business").iter().map(ResourceExt::name_any).collect();
        let ready = self.ready_pods(cluster, "business").len();
        let owners: Option<BTreeSet<String>> = self.shares(cluster).map(|shares| shares.into_keys().collect());
        let moving = self.status(cluster).is_none_or(|status| status.shards.moving > 0);
        pods.len() == members && ready == members && owners == Some(pods) && !moving
    }

    /// What the operator writes about an ImCluster, by kind and name: specifications and annotations of its objects, labels and
    /// annotations of its pods.
    pub fn written_by_operator(&self, cluster: &str) -> BTreeMap<String, Value> {
        fn of<K>(kind: &str, store: &Store<K>, content: impl Fn(&K) -> Value, found: &mut BTreeMap<String, Value>)
        where
            K: Resource<DynamicType = ()> + Clone + 'static,
        {
            for object in store.state() {
                let written = json!([content(&object), object.labels(), object.annotations()]);
                found.insert(format!("{kind} {}", object.name_any()), written);
            }
        }
        let mut found = BTreeMap::new();
        of("Deployment", &self.deployments, |one| json!(one.spec), &mut found);
        of("StatefulSet", &self.sets, |one| json!(one.spec), &mut found);
        of("Service", &self.services, |one| json!(one.spec), &mut found);
        of("Pod", &self.pods, |_| Value::Null, &mut found);
        found.insert(format!("ShardMap {cluster}"), json!(self.map(cluster).map(|map| map.spec)));
        found
    }

    /// One line for a failure's text.
    pub fn summary(&self) -> String {
        let pod = |pod: &Pod| {
            let state = match (pod.metadata.deletion_timestamp.is_some(), is_ready(pod)) {
                (true, _) => "ending",
                (false, true) => "ready",
                (false, false) => "not ready",
            };
            format!("{} {state}", pod.name_any())
        };
        let pods: Vec<String> = self.pods.state().iter().map(|one| pod(one)).collect();
        let clusters = self.clusters.state();
        let shares = clusters.iter().map(|cluster| (cluster.name_any(), self.shares(&cluster.name_any())));
        format!("pods {pods:?}, shards {:?}", shares.collect::<Vec<_>>())
    }
}

/// Ready and not asked to end.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
    ready && pod.metadata.deletion_timestamp.is_none()
}

fn mirror<K>(api: Api<K>, kind: K::DynamicType, changed: &watch::Sender<u64>, watchers: &mut JoinSet<()>) -> Store<K>
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: Eq + std::hash::Hash + Clone + Send + Sync,
{
    let writer = Writer::new(kind);
    let store = writer.as_reader();
    let changed = changed.clone();
    watchers.spawn(async move {
        let mut events = pin!(watcher(api, watcher::Config::default()).default_backoff().reflect(writer));
        while events.next().await.is_some() {
            changed.send_modify(|number| *number += 1);
        }
    });
    store
}
