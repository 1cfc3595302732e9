//! A scenario: a namespace of its own, an `ImCluster` in it, and people who chat on it from outside of the cluster.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use im_crds::ConditionStatus;
use k8s_openapi::api::{
    core::v1::{Event, Namespace, Node, Pod, Service},
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, Client, Config, ResourceExt,
    api::{
        ApiResource, DeleteParams, DynamicObject, EvictParams, ListParams, LogParams, Patch, PatchParams, PostParams,
    },
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, timeout},
};

use crate::{
    environment::{Environment, Nodes, Suite},
    operator::{self, Operator},
    processes::PodProcess,
    support::{Access, Chat, TestResult, eventually},
    world::{World, is_ready},
};

/// One scenario at a time: they would take the processor from each other, and what is measured would mean nothing.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Name of the ImCluster of each scenario.
pub const CLUSTER: &str = "chat";
/// People who chat, each with each other, and groups of all of them: every shard gets messages.
const PEOPLE: usize = 12;
const GROUPS: usize = 2;
/// Shards of the cluster, unless the scenario says another number.
pub const SHARDS: usize = 64;
/// Messages a second.
pub const RATE: f64 = 60.0;
/// Pods are scheduled, started, emptied and ended, and shards moved, within this time. No promise, only the point from which
/// something hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Load flows again within this time, whatever happened.
const FLOWS_WITHIN: Duration = Duration::from_secs(60);
/// All is delivered and checked within this time after the last message.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);
/// No scenario takes longer.
const SCENARIO_WITHIN: Duration = Duration::from_secs(20 * 60);
/// What a failure shows.
const LOG_LINES_SHOWN: i64 = 60;
const EVENTS_SHOWN: usize = 40;
const FIELD_MANAGER: &str = "e2e";

/// Runs a scenario: brings up an ImCluster whose spec is the usual one with `spec` merged over it, lets people chat on it,
/// and does `body`; then the history must be clean and the operator must say that no message is lost. A failure shows
/// what the API server and the pods know.
pub async fn scenario(suite: Suite, spec: Value, body: impl AsyncFnOnce(&mut Scene) -> TestResult) -> TestResult {
    let name = name_of(&body);
    run(suite, Nodes::Anywhere, &name, async |scene: &mut Scene| {
        scene.bring_up(spec).await?;
        body(scene).await
    })
    .await
}

/// The same, where `body` needs the nodes to be on this machine; elsewhere it is skipped.
pub async fn scenario_beside_nodes(
    suite: Suite,
    spec: Value,
    body: impl AsyncFnOnce(&mut Scene) -> TestResult,
) -> TestResult {
    let name = name_of(&body);
    run(suite, Nodes::Here, &name, async |scene: &mut Scene| {
        scene.bring_up(spec).await?;
        body(scene).await
    })
    .await
}

/// The same, but `body` brings up the ImCluster, after what it has to prepare.
pub async fn prepared_scenario(suite: Suite, body: impl AsyncFnOnce(&mut Scene) -> TestResult) -> TestResult {
    let name = name_of(&body);
    run(suite, Nodes::Anywhere, &name, body).await
}

/// A closure is called after the function that it is in: the test.
fn name_of<T>(body: &T) -> String {
    let path = std::any::type_name_of_val(body);
    path.rsplit("::").find(|part| !part.starts_with('{')).unwrap_or("scenario").to_owned()
}

async fn run(suite: Suite, nodes: Nodes, name: &str, body: impl AsyncFnOnce(&mut Scene) -> TestResult) -> TestResult {
    let Some(environment) = Environment::read(suite, nodes)? else { return Ok(()) };
    let mut scene = Scene::enter(environment, name).await?;
    let start = Instant::now();
    let outcome = timeout(SCENARIO_WITHIN, async {
        body(&mut scene).await?;
        scene.check().await
    })
    .await;
    let outcome = outcome.unwrap_or_else(|_| Err(format!("it takes longer than {SCENARIO_WITHIN:?}").into()));
    match &outcome {
        Ok(()) => println!("{name}: passed after {:.0?}", start.elapsed()),
        Err(error) => {
            println!("{name}: FAILED after {:.0?}: {error}", start.elapsed());
            scene.show().await;
        }
    }
    scene.leave(outcome.is_err()).await?;
    outcome
}

/// Fails with that text unless the condition holds.
pub fn ensure(condition: bool, what: impl FnOnce() -> String) -> TestResult {
    if condition { Ok(()) } else { Err(what().into()) }
}

/// `change` merged over `value`, as in a JSON merge patch (RFC 7396).
pub fn merge(value: &mut Value, change: Value) {
    match (value, change) {
        (Value::Object(fields), Value::Object(changes)) => {
            for (name, change) in changes {
                if change.is_null() {
                    fields.remove(&name);
                } else {
                    merge(fields.entry(name).or_insert(Value::Null), change);
                }
            }
        }
        (value, change) => *value = change,
    }
}

/// What a scenario works with.
pub struct Scene {
    /// What is installed, and where.
    pub environment: Environment,
    /// The operator that is installed.
    pub operator: Operator,
    /// An administrator's client.
    pub client: Client,
    /// The scenario's namespace.
    pub namespace: String,
    /// What is in it.
    pub world: World,
    chat: Option<Chat>,
    _alone: MutexGuard<'static, ()>,
}

impl Scene {
    async fn enter(environment: Environment, name: &str) -> TestResult<Self> {
        let alone = ONE_AT_A_TIME.lock().await;
        // It tries nothing again by itself: what the API server answers is what the scenarios are about.
        let mut config = Config::infer().await?;
        config.default_retry = false;
        let client = Client::try_from(config)?;
        let operator = Operator::install(client.clone(), &environment).await?;
        let short: String = name.replace('_', "-").chars().take(40).collect();
        let namespace = format!("{}-{:04x}", short.trim_matches('-'), rand::random::<u16>());
        println!("\n{name}: begins, in namespace {namespace}");
        let object: Namespace = serde_json::from_value(json!({
            "metadata": {
                "name": namespace,
                "labels": {"imcluster.dev/e2e": "true", "pod-security.kubernetes.io/enforce": "restricted"},
            },
        }))?;
        Api::all(client.clone()).create(&PostParams::default(), &object).await?;
        let world = World::watch(&client, &namespace);
        Ok(Self { environment, operator, client, namespace, world, chat: None, _alone: alone })
    }

    async fn leave(&mut self, failed: bool) -> TestResult {
        self.chat = None;
        // A scenario that was cut short did not put back what it changed.
        let restored = self.operator.restore().await;
        if failed && self.environment.keep {
            println!("namespace {} is kept", self.namespace);
            return restored;
        }
        Api::<Namespace>::all(self.client.clone()).delete(&self.namespace, &DeleteParams::background()).await?;
        // Nobody waits for their orderly end, and the next scenario wants the processor.
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.api::<Pod>().delete_collection(&at_once, &ListParams::default()).await?;
        restored
    }

    // ---- the ImCluster -----------------------------------------------------------------------------------------------------

    /// ImClusters of the scenario's namespace.
    pub fn clusters(&self) -> Api<DynamicObject> {
        let kind = ApiResource::erase::<im_crds::ImCluster>(&());
        Api::namespaced_with(self.client.clone(), &self.namespace, &kind)
    }

    /// An API of the scenario's namespace.
    pub fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// The usual ImCluster with `spec` merged over its spec: one gateway, one business member, an embedded store, reachable
    /// on a node's port, everything quick.
    pub fn imcluster(&self, name: &str, spec: Value) -> Value {
        let mut usual = json!({
            "auth": {"insecure": {}},
            "access": {
                "mqtt": {"address": "0.0.0.0:1883"},
                "http": {"address": "0.0.0.0:8080"},
                "service": {"type": "NodePort"},
            },
            "storage": {"embedded": {"size": "64Mi"}},
            "gateway": {"replicas": 1, "drain": {"rate": 200, "notice": "1s", "deadline": "60s"}},
            "business": {"replicas": 1, "shards": SHARDS, "rebalance": {"movesInFlight": 8, "cooldown": "1s"}},
        });
        merge(&mut usual, spec);
        json!({
            "apiVersion": "imcluster.dev/v1alpha1",
            "kind": "ImCluster",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": usual,
        })
    }

    /// What `kubectl apply --server-side` does.
    pub async fn apply(&self, object: &Value) -> kube::Result<DynamicObject> {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        self.clusters().patch(name, &PatchParams::apply(FIELD_MANAGER), &Patch::Apply(object)).await
    }

    /// Changes the spec, as `kubectl patch --type merge` does.
    pub async fn edit(&self, spec: Value) -> kube::Result<DynamicObject> {
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        self.clusters().patch(CLUSTER, &params, &Patch::Merge(json!({ "spec": spec }))).await
    }

    /// Sets an annotation of the ImCluster.
    pub async fn annotate(&self, name: &str, value: &str) -> TestResult {
        let change = json!({"metadata": {"annotations": {name: value}}});
        self.clusters().patch(CLUSTER, &PatchParams::default(), &Patch::Merge(change)).await?;
        Ok(())
    }

    /// Applies the ImCluster, waits until it is Ready, and lets people chat on it.
    pub async fn bring_up(&mut self, spec: Value) -> TestResult {
        let start = Instant::now();
        self.apply(&self.imcluster(CLUSTER, spec)).await?;
        self.wait("it is Ready", |world| world.condition_is(CLUSTER, "Ready", ConditionStatus::True)).await?;
        println!("Ready {:.1?} after it was applied", start.elapsed());
        let access = self.access(CLUSTER).await?;
        self.let_people_chat(access).await
    }

    /// People log in there and chat.
    pub async fn let_people_chat(&mut self, access: Access) -> TestResult {
        let mut chat = Chat::start(access, PEOPLE, GROUPS).await?;
        chat.send_at(RATE, 1);
        self.chat = Some(chat);
        self.flow(100).await
    }

    /// Where clients reach an ImCluster from this machine: its Service's node ports.
    pub async fn access(&self, cluster: &str) -> TestResult<Access> {
        let node = self.node_address().await?;
        let services = self.api::<Service>().list(&ListParams::default()).await?;
        let of_clients = services.items.into_iter().find(|service| {
            let kind = service.spec.as_ref().and_then(|spec| spec.type_.as_deref());
            service.name_any().starts_with(cluster) && kind == Some("NodePort")
        });
        let ports = of_clients.and_then(|service| service.spec?.ports).ok_or("no Service of type NodePort")?;
        let port = |name: &str| -> TestResult<SocketAddr> {
            let found = ports.iter().find(|port| port.name.as_deref() == Some(name));
            let number =
                found.and_then(|port| port.node_port).ok_or_else(|| format!("the Service has no port {name}"))?;
            Ok(SocketAddr::from((node, u16::try_from(number)?)))
        };
        Ok(Access { mqtt: port("mqtt")?, http: port("http")? })
    }

    /// An address at which this machine reaches node ports.
    pub async fn node_address(&self) -> TestResult<IpAddr> {
        if let Some(address) = self.environment.node {
            return Ok(address);
        }
        let nodes = Api::<Node>::all(self.client.clone()).list(&ListParams::default()).await?;
        let mut addresses = nodes.items.into_iter().filter_map(|node| node.status?.addresses).flatten();
        let internal = addresses.find(|address| address.type_ == "InternalIP");
        Ok(internal.ok_or("no node has an InternalIP")?.address.parse()?)
    }

    // ---- waiting -----------------------------------------------------------------------------------------------------------

    /// Waits until that holds, [`PATIENCE`] long.
    pub async fn wait(&self, what: &str, mut condition: impl FnMut(&World) -> bool) -> TestResult {
        self.world.wait(what, PATIENCE, |world| condition(world).then_some(())).await
    }

    /// Waits until a condition of the ImCluster is True for that reason.
    pub async fn wait_condition(&self, kind: &str, wanted: &str) -> TestResult {
        let is_true = |world: &World| {
            let condition = world.condition(CLUSTER, kind);
            condition.is_some_and(|(status, reason, _)| status == ConditionStatus::True && reason == wanted)
        };
        self.wait(&format!("{kind} is True: {wanted}"), is_true).await
    }

    /// Waits until just so many business members run and own all shards, each some, and nothing moves.
    pub async fn wait_shards_shared_by(&self, members: usize) -> TestResult {
        let what = format!("all shards are shared by {members} business members");
        self.wait(&what, |world| world.shards_are_shared_by(CLUSTER, members)).await
    }

    /// Waits until there are just so many gateways, and all of them serve.
    pub async fn wait_gateways(&self, count: usize) -> TestResult {
        let serve =
            |world: &World| world.serving(CLUSTER).len() == count && world.pods(CLUSTER, "gateway").len() == count;
        self.wait(&format!("{count} gateways serve"), serve).await
    }

    // ---- people ------------------------------------------------------------------------------------------------------------

    /// The people who chat.
    pub fn chat(&mut self) -> TestResult<&mut Chat> {
        Ok(self.chat.as_mut().ok_or("nobody chats")?)
    }

    /// Whether each gateway that serves has client connections, as it says itself.
    pub async fn connections_are_everywhere(&self) -> TestResult<bool> {
        for pod in self.world.serving(CLUSTER) {
            if self.gauge(&pod, "im_connections").await? == 0.0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What a member exports under that name, without labels; 0 if it does not.
    pub async fn gauge(&self, pod: &Pod, name: &str) -> TestResult<f64> {
        let path = format!("/api/v1/namespaces/{}/pods/{}:9090/proxy/metrics", self.namespace, pod.name_any());
        let metrics = self.client.request_text(hyper::Request::get(path).body(Vec::new())?).await?;
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        Ok(value.unwrap_or_default())
    }

    /// Waits until so many more messages are acknowledged.
    pub async fn flow(&self, more: u64) -> TestResult {
        let chat = self.chat.as_ref().ok_or("nobody chats")?;
        let now = chat.journal.with(|history| history.progress().1);
        chat.wait_acked(now + more, FLOWS_WITHIN).await
    }

    /// Nobody sends any more, and all that was sent is accounted for. The operator says so too.
    pub async fn check(&mut self) -> TestResult {
        let Some(chat) = self.chat.take() else { return Ok(()) };
        println!("{}", chat.stop_and_check(SETTLED_WITHIN).await?);
        self.wait("no message is lost, says the store", |world| {
            world.condition_is(CLUSTER, "NoMessageLost", ConditionStatus::True)
        })
        .await
    }

    // ---- pods --------------------------------------------------------------------------------------------------------------

    /// Sends a signal to the process of a member, behind Kubernetes' back.
    pub fn signal(&self, pod: &Pod, tier: &str, signal: Signal) -> TestResult {
        let program = match tier {
            "gateway" => "im-gateway",
            _ => "im-business",
        };
        PodProcess::find(&pod.uid().unwrap_or_default(), program)?.signal(signal)
    }

    /// Deletes a pod without any grace: for Kubernetes it is gone at once, and its processes are killed.
    pub async fn delete_without_grace(&self, pod: &Pod) -> TestResult {
        let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.api::<Pod>().delete(&pod.name_any(), &params).await?;
        Ok(())
    }

    /// Asks for a pod's eviction; `false` = its disruption budget does not allow it now.
    pub async fn evict(&self, pod: &Pod) -> TestResult<bool> {
        match self.api::<Pod>().evict(&pod.name_any(), &EvictParams::default()).await {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 429 => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until a tier's disruption budget allows one eviction: the disruption controller has counted.
    pub async fn wait_disruption_allowed(&self, tier: &str) -> TestResult {
        eventually(&format!("the disruption budget of {tier} allows an eviction"), PATIENCE, async || {
            let budgets = self.api::<PodDisruptionBudget>().list(&ListParams::default()).await.ok()?;
            let budget = budgets.items.into_iter().find(|budget| budget.name_any().contains(tier))?;
            (budget.status?.disruptions_allowed > 0).then_some(())
        })
        .await
    }

    // ---- failures ----------------------------------------------------------------------------------------------------------

    /// Shows what a failure can be understood from: pods, the ImCluster's status, events, logs of pods and operators.
    pub async fn show(&self) {
        println!("--- {}", self.world.summary());
        if let Some(chat) = &self.chat {
            println!("--- remarks of clients: {:?}", chat.journal.notes());
        }
        let clusters = self.clusters().list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        for cluster in clusters {
            let shown = json!({"spec": cluster.data["spec"], "status": cluster.data["status"]});
            println!("--- ImCluster {}: {shown:#}", cluster.name_any());
        }
        for (tier, deployment) in ["gateway", "business"]
            .into_iter()
            .flat_map(|tier| self.world.deployments(CLUSTER, tier).into_iter().map(move |one| (tier, one)))
        {
            let asked = deployment.spec.as_ref().and_then(|spec| spec.replicas);
            println!("--- Deployment {} ({tier}): replicas {asked:?}", deployment.name_any());
        }
        let events = self.api::<Event>().list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        for event in events.iter().rev().take(EVENTS_SHOWN).rev() {
            let about = event.involved_object.name.as_deref().unwrap_or_default();
            let reason = event.reason.as_deref().unwrap_or_default();
            println!("event of {about}: {reason}: {}", event.message.as_deref().unwrap_or_default());
        }
        show_pods(&self.client, &self.namespace, &ListParams::default()).await;
        show_pods(&self.client, operator::NAMESPACE, &self.operator.pods_selector()).await;
    }
}

async fn show_pods(client: &Client, namespace: &str, selector: &ListParams) {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    for pod in api.list(selector).await.map(|list| list.items).unwrap_or_default() {
        let status = pod.status.clone().unwrap_or_default();
        let containers = status.container_statuses.unwrap_or_default();
        let restarts: i32 = containers.iter().map(|container| container.restart_count).sum();
        let states: Vec<String> = containers.iter().map(|one| json!([one.state, one.last_state]).to_string()).collect();
        println!(
            "--- pod {}: {}, {}, {restarts} restarts, {states:?}",
            pod.name_any(),
            status.phase.unwrap_or_default(),
            if is_ready(&pod) { "ready" } else { "not ready" },
        );
        for previous in [true, false] {
            if previous && restarts == 0 {
                continue;
            }
            let params = LogParams { previous, tail_lines: Some(LOG_LINES_SHOWN), ..LogParams::default() };
            let which = if previous { "before its restart" } else { "now" };
            match api.logs(&pod.name_any(), &params).await {
                Ok(log) => println!("log of {} {which}:\n{log}", pod.name_any()),
                Err(error) => println!("log of {} {which}: {error}", pod.name_any()),
            }
        }
    }
}
