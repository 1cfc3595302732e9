//! The platform of `imcluster operator`: members are pods, a tier is one Deployment for each template.
//!
//! A Deployment is created once and never changed but in its replicas; another template is another Deployment, so that a
//! roll-out is a scale-out of one and a scale-in of the other. Every write to it names the resource version that it was
//! decided on, so that what an earlier leader still sends conflicts.

pub mod facts;

use super::{Platform, PlatformError, StoredMap, Tier, View};
use crate::control::ClusterKey;
use crate::controller::accepted::{Accepted, CLUSTER_LABEL, MANAGED_SELECTOR, MANAGER, SERVING_LABEL, TERM_ANNOTATION};
use crate::controller::pods::{MemberTemplate, Surroundings};
use facts::{DELETION_COST, DeploymentFacts, Facts, PodFacts, Removal, cluster_of};
use futures::stream::{Stream, StreamExt};
use im_crds::{ImCluster, SecretKey, ShardMap, ShardMapSpec};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::{ByteString, NamespaceResourceScope};
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::core::DeserializeGuard;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use parking_lot::{Mutex, RwLock};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;

/// How often a write is tried while only the object's status changes.
const WRITE_ATTEMPTS: usize = 3;

/// What all ImClusters of one operator share: the API, what the operator adds to each, and what is known of all members.
pub struct World {
    client: Client,
    surroundings: Surroundings,
    clusters: Mutex<HashMap<ClusterKey, Known>>,
    /// How many of the two watches have listed everything.
    listed: watch::Sender<u32>,
    /// Writes that were sent, by kind of object.
    writes: Family<Kind, Counter>,
    /// Members that stayed because another one went in their place.
    spared: Counter,
}

/// Kind of an object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: String,
}

/// One ImCluster.
#[derive(Default)]
struct Known {
    facts: Facts,
    /// Whoever decides for it looks at this.
    view: Option<watch::Sender<View>>,
}

impl Known {
    fn publish(&mut self) -> Vec<String> {
        let spared = self.facts.verify_going();
        if let Some(view) = &self.view {
            let (processes, ordered) = self.facts.view();
            view.send_if_modified(|view| {
                let news = view.processes != processes || view.ordered != ordered;
                view.processes = processes;
                view.ordered = ordered;
                news
            });
        }
        spared
    }
}

impl World {
    /// Knows nothing yet; [`World::run`] fills it.
    pub fn new(client: Client, surroundings: Surroundings) -> Arc<Self> {
        Arc::new(Self {
            client,
            surroundings,
            clusters: Mutex::default(),
            listed: watch::channel(0).0,
            writes: Family::default(),
            spared: Counter::default(),
        })
    }

    /// The API.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What the operator adds to every ImCluster.
    pub fn surroundings(&self) -> &Surroundings {
        &self.surroundings
    }

    /// Exports how much is written, and how often Kubernetes took another pod than it was meant to.
    pub fn register(&self, registry: &mut Registry) {
        registry.register("kubernetes_writes", "Writes to the Kubernetes API, by kind", self.writes.clone());
        let help = "Members that stayed because another pod of their ReplicaSet went in their place";
        registry.register("members_spared", help, self.spared.clone());
    }

    /// Notes a write to an object of that kind.
    pub fn wrote(&self, kind: &str) {
        self.writes.get_or_create(&Kind { kind: kind.to_owned() }).inc();
    }

    /// Watches all members of one namespace, or of all, for ever.
    pub async fn run(self: Arc<Self>, namespace: Option<String>) {
        let pods = watcher(scoped::<Pod>(&self.client, namespace.as_deref()), selected()).default_backoff();
        let deployments =
            watcher(scoped::<Deployment>(&self.client, namespace.as_deref()), selected()).default_backoff();
        let on_pod = |key: Option<&ClusterKey>, change: Change<'_, Pod>| match (key, change) {
            (Some(key), Change::Is(name, pod)) => self.change(key, |facts| facts.set_pod(name, PodFacts::of(pod))),
            (Some(key), Change::Gone(name, _)) => self.change(key, |facts| facts.set_pod(name, None)),
            (_, Change::Listed(listed)) => {
                self.change_all(|key, facts| facts.keep_pods(|name| listed.contains(&(key.clone(), name.to_owned()))));
            }
            (None, _) => {}
        };
        let on_deployment = |key: Option<&ClusterKey>, change: Change<'_, Deployment>| match (key, change) {
            (Some(key), Change::Is(_, deployment)) => self.learn(key, deployment),
            (Some(key), Change::Gone(name, uid)) => self.change(key, |facts| facts.remove_deployment(name, uid)),
            (_, Change::Listed(listed)) => self.change_all(|key, facts| {
                facts.keep_deployments(|name| listed.contains(&(key.clone(), name.to_owned())));
            }),
            (None, _) => {}
        };
        tokio::join!(self.follow("pods", pods, on_pod), self.follow("Deployments", deployments, on_deployment));
    }

    /// Reads one watch.
    async fn follow<K>(
        &self,
        what: &str,
        events: impl Stream<Item = watcher::Result<Event<K>>>,
        on: impl Fn(Option<&ClusterKey>, Change<'_, K>),
    ) where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
    {
        let mut events = pin!(events);
        let mut first = true;
        let mut listing: HashSet<(ClusterKey, String)> = HashSet::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listing.clear(),
                Ok(Event::InitApply(object)) => {
                    if let (Some(key), Some(name)) = (cluster_of(object.meta()), object.meta().name.as_deref()) {
                        on(Some(&key), Change::Is(name, &object));
                        listing.insert((key, name.to_owned()));
                    }
                }
                Ok(Event::InitDone) => {
                    on(None, Change::Listed(&listing));
                    listing = HashSet::new();
                    if std::mem::take(&mut first) {
                        self.listed.send_modify(|listed| *listed += 1);
                    }
                }
                Ok(Event::Apply(object)) => {
                    if let (Some(key), Some(name)) = (cluster_of(object.meta()), object.meta().name.as_deref()) {
                        on(Some(&key), Change::Is(name, &object));
                    }
                }
                Ok(Event::Delete(object)) => {
                    if let (Some(key), Some(name)) = (cluster_of(object.meta()), object.meta().name.as_deref()) {
                        on(Some(&key), Change::Gone(name, object.meta().uid.as_deref()));
                    }
                }
                Err(error) => tracing::warn!(%error, "the watch of {what} broke and is begun anew"),
            }
        }
    }

    /// Returns once all members that there are are known.
    pub async fn ready(&self) {
        // The sender lives as long as this.
        let _ = self.listed.subscribe().wait_for(|listed| *listed >= 2).await;
    }

    /// Takes in what a write answered, or a watch says.
    fn learn(&self, key: &ClusterKey, deployment: &Deployment) {
        if let Some(facts) = DeploymentFacts::of(deployment) {
            self.change(key, |known| known.set_deployment(facts));
        }
    }

    fn change(&self, key: &ClusterKey, change: impl FnOnce(&mut Facts)) {
        let mut clusters = self.clusters.lock();
        let known = clusters.entry(key.clone()).or_default();
        change(&mut known.facts);
        self.tell_spared(known.publish());
        if known.facts.is_empty() && known.view.is_none() {
            clusters.remove(key);
        }
    }

    fn change_all(&self, change: impl Fn(&ClusterKey, &mut Facts)) {
        let mut clusters = self.clusters.lock();
        for (key, known) in clusters.iter_mut() {
            change(key, &mut known.facts);
            self.tell_spared(known.publish());
        }
        clusters.retain(|_, known| !known.facts.is_empty() || known.view.is_some());
    }

    fn tell_spared(&self, spared: Vec<String>) {
        for name in spared {
            self.spared.inc();
            tracing::warn!("{name} was to go, but its ReplicaSet took another pod");
        }
    }

    fn read<T>(&self, key: &ClusterKey, read: impl FnOnce(&Facts) -> T) -> T {
        match self.clusters.lock().get(key) {
            Some(known) => read(&known.facts),
            None => read(&Facts::default()),
        }
    }

    /// Deployments of that ImCluster that run nothing any more, and whether there are any of other templates than these.
    pub fn outdated(&self, key: &ClusterKey, current: &[String]) -> (Vec<DeploymentFacts>, bool) {
        self.read(key, |facts| (facts.spent(current), facts.has_outdated(current)))
    }

    /// How many gateways and business members the Deployments of that ImCluster are to have; `None` = there are none.
    pub fn replicas(&self, key: &ClusterKey) -> Option<(u32, u32)> {
        self.read(key, |facts| {
            let replicas = (facts.replicas(Tier::Gateway), facts.replicas(Tier::Business));
            facts.deployments().next().map(|_| replicas)
        })
    }

    /// Names of the Deployments of that ImCluster.
    pub fn deployment_names(&self, key: &ClusterKey) -> BTreeSet<String> {
        self.read(key, |facts| facts.deployments().map(|deployment| deployment.name.clone()).collect())
    }
}

/// Objects of one kind in one namespace, or in all.
pub fn scoped<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn selected() -> watcher::Config {
    watcher::Config::default().labels(&format!("{MANAGED_SELECTOR},{CLUSTER_LABEL}"))
}

/// What a watch says of one object, or of all.
enum Change<'a, K> {
    Is(&'a str, &'a K),
    Gone(&'a str, Option<&'a str>),
    Listed(&'a HashSet<(ClusterKey, String)>),
}

/// The platform of one ImCluster, for one leader.
pub struct KubernetesPlatform {
    world: Arc<World>,
    key: ClusterKey,
    accepted: RwLock<Accepted>,
    /// What is asked for can't be run, and never was by this leader: members stay as they are.
    as_it_runs: AtomicBool,
    view: watch::Sender<View>,
    /// Resource version of the stored map, if there is one.
    stored: tokio::sync::Mutex<Option<String>>,
    /// The term that this leader stamps on what it writes; 0 = none yet.
    term: AtomicU64,
}

/// What a write is answered with when another one came before it.
fn conflicts(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

fn changed_meanwhile(what: &str) -> PlatformError {
    PlatformError::Refused(format!("{what} changed meanwhile; it is looked at again"))
}

impl KubernetesPlatform {
    /// The platform of that ImCluster; from now on its view follows the pods.
    pub fn new(world: Arc<World>, accepted: Accepted) -> Arc<Self> {
        let key = accepted.key();
        let view = watch::channel(View { generation: 1, ..View::default() }).0;
        {
            let mut clusters = world.clusters.lock();
            let known = clusters.entry(key.clone()).or_default();
            known.view = Some(view.clone());
            known.publish();
        }
        let (accepted, as_it_runs) = (RwLock::new(accepted), AtomicBool::new(false));
        let (stored, term) = (tokio::sync::Mutex::new(None), AtomicU64::new(0));
        Arc::new(Self { world, key, accepted, as_it_runs, view, stored, term })
    }

    /// The platform of an ImCluster [as it runs](Accepted::as_it_runs), until there is one that can be run.
    pub fn as_it_runs(world: Arc<World>, accepted: Accepted) -> Arc<Self> {
        let platform = Self::new(world, accepted);
        platform.as_it_runs.store(true, Ordering::Relaxed);
        platform
    }

    /// Follows another state of the ImCluster.
    pub fn set_cluster(&self, accepted: Accepted) {
        *self.accepted.write() = accepted;
        self.as_it_runs.store(false, Ordering::Relaxed);
        self.view.send_modify(|view| {
            view.generation += 1;
            view.file_error = None;
        });
    }

    /// Why what was written last can't be run: what ran before goes on. `None` = it is what runs.
    pub fn set_problem(&self, problem: Option<&str>) {
        self.view.send_if_modified(|view| {
            let news = view.file_error.as_deref() != problem;
            view.file_error = problem.map(str::to_owned);
            news
        });
    }

    fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.world.client.clone(), self.accepted.read().namespace())
    }

    fn member_template(&self, cluster: &ImCluster, tier: Tier) -> Result<MemberTemplate, PlatformError> {
        let accepted = Accepted::new(cluster).map_err(|violations| {
            let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
            PlatformError::Config(lines.join("; "))
        })?;
        let accepted = accepted.with_secrets(self.accepted.read().secrets().clone());
        Ok(MemberTemplate::new(&accepted, &self.world.surroundings, tier))
    }

    fn patches(&self) -> PatchParams {
        PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() }
    }

    fn posts(&self) -> PostParams {
        PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() }
    }

    /// Changes a Deployment, if nobody did since it was looked at.
    async fn write(&self, deployment: &DeploymentFacts, replicas: Option<u32>) -> Result<(), PlatformError> {
        let term = self.term.load(Ordering::Relaxed);
        if deployment.term > term {
            return Err(PlatformError::Outranked);
        }
        let mut patch = json!({ "metadata": {
            "resourceVersion": deployment.resource_version,
            "annotations": { TERM_ANNOTATION: term.to_string() },
        } });
        if let Some(replicas) = replicas {
            patch["spec"] = json!({ "replicas": replicas });
        }
        let api = self.api::<Deployment>();
        for _ in 0..WRITE_ATTEMPTS {
            self.world.wrote("Deployment");
            let error = match api.patch(&deployment.name, &self.patches(), &Patch::Merge(&patch)).await {
                Ok(written) => {
                    // The watch may have seen its end before this answer came.
                    if self.world.read(&self.key, |facts| facts.deployment(&deployment.name).is_some()) {
                        self.world.learn(&self.key, &written);
                    }
                    return Ok(());
                }
                Err(error) => error,
            };
            let found = match error {
                error if not_found(&error) => None,
                error if conflicts(&error) => api.get_opt(&deployment.name).await?,
                error => return Err(error.into()),
            };
            let Some(found) = found else {
                self.world.change(&self.key, |facts| {
                    facts.remove_deployment(&deployment.name, Some(&deployment.uid));
                });
                break;
            };
            self.world.learn(&self.key, &found);
            match DeploymentFacts::of(&found) {
                // Only its status went on, which nothing was decided on.
                Some(now) if now.is_as_decided_on(deployment) => {
                    patch["metadata"]["resourceVersion"] = json!(now.resource_version);
                }
                _ => break,
            }
        }
        Err(changed_meanwhile(&deployment.name))
    }

    async fn create(&self, template: &MemberTemplate, count: u32) -> Result<(), PlatformError> {
        self.world.wrote("ConfigMap");
        match self.api::<ConfigMap>().create(&self.posts(), &template.config).await {
            Ok(_) => {}
            // Its name says what is in it.
            Err(error) if conflicts(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let api = self.api::<Deployment>();
        let deployment = template.deployment(count, self.term.load(Ordering::Relaxed));
        self.world.wrote("Deployment");
        match api.create(&self.posts(), &deployment).await {
            Ok(created) => {
                self.world.learn(&self.key, &created);
                Ok(())
            }
            Err(error) if conflicts(&error) => {
                let name = deployment.metadata.name.unwrap_or_default();
                if let Some(found) = api.get_opt(&name).await? {
                    self.world.learn(&self.key, &found);
                }
                Err(changed_meanwhile(&name))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Marks a pod: the very one that is known, not another one of its name.
    async fn patch_pod(&self, name: &str, mut patch: Value) -> Result<(), PlatformError> {
        let Some(uid) = self.world.read(&self.key, |facts| facts.pod(name).map(|pod| pod.uid.clone())) else {
            return Ok(());
        };
        patch["metadata"]["uid"] = json!(uid);
        self.world.wrote("Pod");
        match self.api::<Pod>().patch(name, &self.patches(), &Patch::Merge(&patch)).await {
            Ok(pod) => {
                self.world.change(&self.key, |facts| {
                    // The watch may have seen its end before this answer came.
                    if facts.pod(name).is_some() {
                        facts.set_pod(name, PodFacts::of(&pod));
                    }
                });
                Ok(())
            }
            // It went by itself.
            Err(error) if not_found(&error) => Ok(()),
            Err(error) if conflicts(&error) => Err(changed_meanwhile(name)),
            Err(error) => Err(error.into()),
        }
    }

    /// The ShardMap as it is stored, read or unreadable.
    async fn fetch_map(&self) -> Result<Option<DeserializeGuard<ShardMap>>, PlatformError> {
        let name = self.accepted.read().name().to_owned();
        Ok(self.api::<DeserializeGuard<ShardMap>>().get_opt(&name).await?)
    }

    fn shard_map(&self, stored: &StoredMap, resource_version: Option<String>) -> ShardMap {
        let accepted = self.accepted.read();
        let spec = ShardMapSpec { links: stored.links.clone(), ..stored.map.clone() };
        let mut map = ShardMap::new(accepted.name(), spec);
        map.metadata = ObjectMeta {
            name: Some(accepted.name().to_owned()),
            namespace: Some(accepted.namespace().to_owned()),
            labels: Some(accepted.labels()),
            annotations: Some(BTreeMap::from([(TERM_ANNOTATION.to_owned(), stored.map.term.to_string())])),
            owner_references: Some(vec![accepted.owner().clone()]),
            resource_version,
            ..ObjectMeta::default()
        };
        map
    }

    /// Writes the map over the state that is known, and says which one it is now; `None` = somebody wrote before.
    async fn store(&self, stored: &StoredMap, known: Option<String>) -> Result<Option<String>, PlatformError> {
        let api = self.api::<ShardMap>();
        let map = self.shard_map(stored, known.clone());
        let name = map.metadata.name.clone().unwrap_or_default();
        self.world.wrote("ShardMap");
        let written = match known {
            Some(_) => api.replace(&name, &self.posts(), &map).await,
            None => api.create(&self.posts(), &map).await,
        };
        match written {
            Ok(written) => Ok(written.metadata.resource_version),
            Err(error) if conflicts(&error) || not_found(&error) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Puts this leader's term on every Deployment, so that writes of an earlier leader conflict.
    async fn stamp(&self, term: u64) -> Result<(), PlatformError> {
        self.term.store(term, Ordering::Relaxed);
        let of_earlier = |facts: &Facts| -> Vec<DeploymentFacts> {
            facts.deployments().filter(|deployment| deployment.term < term).cloned().collect()
        };
        for deployment in self.world.read(&self.key, of_earlier) {
            match self.write(&deployment, None).await {
                // It changed and is known as it is now; the next write to it carries the term.
                Err(PlatformError::Refused(reason)) => tracing::info!("{reason}"),
                outcome => outcome?,
            }
        }
        Ok(())
    }
}

impl Drop for KubernetesPlatform {
    fn drop(&mut self) {
        let mut clusters = self.world.clusters.lock();
        if let Some(known) = clusters.get_mut(&self.key)
            && known.view.as_ref().is_some_and(|view| view.same_channel(&self.view))
        {
            known.view = None;
        }
    }
}

impl Platform for KubernetesPlatform {
    fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    fn cluster(&self) -> Result<ImCluster, PlatformError> {
        Ok(self.accepted.read().cluster().clone())
    }

    fn template(&self, cluster: &ImCluster, tier: Tier) -> String {
        if self.as_it_runs.load(Ordering::Relaxed) {
            let main = |facts: &Facts| facts.main_template(tier).unwrap_or_default().to_owned();
            return self.world.read(&self.key, main);
        }
        // A configuration that can't be made has a digest of its own: nothing runs with it.
        self.member_template(cluster, tier).map(|template| template.digest).unwrap_or_default()
    }

    fn cores(&self, cluster: &ImCluster, tier: Tier) -> f64 {
        let pod = match tier {
            Tier::Gateway => &cluster.spec.gateway.pod,
            Tier::Business => &cluster.spec.business.pod,
        };
        // An ImCluster that needs it and has none was refused.
        pod.cpu_request().filter(|cores| *cores > 0.0).unwrap_or(1.0)
    }

    fn secret(&self, key: &SecretKey) -> Option<Vec<u8>> {
        self.accepted.read().secrets().get(key).map(<[u8]>::to_vec)
    }

    async fn start(&self, cluster: &ImCluster, tier: Tier, count: u32) -> Result<(), PlatformError> {
        if self.as_it_runs.load(Ordering::Relaxed) {
            return Err(PlatformError::Refused("nobody is started while what is asked for can't be run".to_owned()));
        }
        let template = self.member_template(cluster, tier)?;
        let name = self.accepted.read().of_template(tier, &template.digest);
        match self.world.read(&self.key, |facts| facts.deployment(&name).cloned()) {
            Some(deployment) => self.write(&deployment, Some(deployment.replicas.saturating_add(count))).await,
            None => self.create(&template, count).await,
        }
    }

    async fn stop(&self, name: &str, _grace: Duration) -> Result<(), PlatformError> {
        let mut removal = self.world.read(&self.key, |facts| facts.removal(name));
        if let Removal::Shrink { cost: Some(cost), .. } = removal {
            let cost = json!({ DELETION_COST: cost.to_string() });
            self.patch_pod(name, json!({ "metadata": { "annotations": cost } })).await?;
            removal = self.world.read(&self.key, |facts| facts.removal(name));
        }
        match removal {
            Removal::Done => Ok(()),
            Removal::NotYet { instead } => {
                Err(PlatformError::Refused(format!("{instead} would go instead: {name} waits until that one is ready")))
            }
            Removal::Orphan { uid } => {
                let only_this = Preconditions { uid: Some(uid), ..Preconditions::default() };
                let params = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                self.world.wrote("Pod");
                match self.api::<Pod>().delete(name, &params).await {
                    Ok(_) => {}
                    Err(error) if not_found(&error) || conflicts(&error) => {}
                    Err(error) => return Err(error.into()),
                }
                self.world.change(&self.key, |facts| facts.note_going(name));
                Ok(())
            }
            Removal::Shrink { deployment, .. } => {
                self.write(&deployment, Some(deployment.replicas.saturating_sub(1))).await?;
                self.world.change(&self.key, |facts| facts.note_going(name));
                Ok(())
            }
        }
    }

    async fn set_serving(&self, name: &str, serving: bool) -> Result<(), PlatformError> {
        let as_it_should = |facts: &Facts| facts.pod(name).is_none_or(|pod| pod.serving == serving);
        if self.world.read(&self.key, as_it_should) {
            return Ok(());
        }
        let label = json!({ SERVING_LABEL: serving.to_string() });
        self.patch_pod(name, json!({ "metadata": { "labels": label } })).await
    }

    async fn describe(&self, _: &str, _: &str, _: BTreeMap<String, String>) -> Result<(), PlatformError> {
        // Kubernetes knows where its pods are.
        Ok(())
    }

    async fn load_map(&self) -> Result<Option<StoredMap>, PlatformError> {
        let found = self.fetch_map().await?;
        let mut stored = self.stored.lock().await;
        *stored = found.as_ref().and_then(|guard| guard.meta().resource_version.clone());
        Ok(found.and_then(|guard| match guard.0 {
            Ok(map) => Some(StoredMap { links: map.spec.links.clone(), map: map.spec }),
            Err(error) => {
                tracing::warn!(cluster = %self.key, %error, "the stored ShardMap can't be read and counts as none");
                None
            }
        }))
    }

    async fn save_map(&self, map: &StoredMap) -> Result<(), PlatformError> {
        let mut stored = self.stored.lock().await;
        let mut written = self.store(map, stored.clone()).await?;
        if written.is_none() {
            // Another leader, or a person: only the former is a reason to end.
            let found = self.fetch_map().await?;
            let ours = (map.map.term, map.map.number);
            if let Some(Ok(other)) = found.as_ref().map(|guard| guard.0.as_ref())
                && (other.spec.term, other.spec.number) > ours
            {
                return Err(PlatformError::Outranked);
            }
            *stored = found.and_then(|guard| guard.meta().resource_version.clone());
            written = self.store(map, stored.clone()).await?;
        }
        let Some(version) = written else { return Err(changed_meanwhile("the ShardMap")) };
        *stored = Some(version);
        if self.term.load(Ordering::Relaxed) != map.map.term {
            self.stamp(map.map.term).await?;
        }
        Ok(())
    }

    async fn publish_map(&self, hint: Vec<u8>) -> Result<(), PlatformError> {
        let accepted = self.accepted.read().clone();
        let config = ConfigMap {
            metadata: ObjectMeta {
                name: Some(accepted.child("map")),
                namespace: Some(accepted.namespace().to_owned()),
                labels: Some(accepted.labels()),
                owner_references: Some(vec![accepted.owner().clone()]),
                ..ObjectMeta::default()
            },
            binary_data: Some(BTreeMap::from([(accepted.owner().uid.clone(), ByteString(hint))])),
            ..ConfigMap::default()
        };
        self.world.wrote("ConfigMap");
        let params = PatchParams::apply(MANAGER).force();
        self.api::<ConfigMap>().patch(&accepted.child("map"), &params, &Patch::Apply(&config)).await?;
        Ok(())
    }
}
