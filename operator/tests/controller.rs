//! The controller against an API server in memory.

#[path = "support/api_server.rs"]
mod api_server;

use api_server::ApiServer;
use im_crds::{ImCluster, MapShard, ShardMapSpec};
use im_operator::control::{ClusterKey, Clusters, Leadership, Setup};
use im_operator::controller::accepted::Accepted;
use im_operator::controller::http::Metrics;
use im_operator::controller::keeper::Shared;
use im_operator::controller::pods::Surroundings;
use im_operator::controller::reconcile::{Context, key_of, reconcile};
use im_operator::platform::kubernetes::{KubernetesPlatform, World};
use im_operator::platform::{Platform, PlatformError, StoredMap, Tier};
use k8s_openapi::ByteString;
use kube::Client;
use kube::core::DeserializeGuard;
use kube::runtime::reflector::{self, store::Writer};
use kube::runtime::watcher::Event;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

const CLUSTER_PATH: &str = "/apis/imcluster.dev/v1alpha1/namespaces/talk/imclusters/chat";
const MAP_PATH: &str = "/apis/imcluster.dev/v1alpha1/namespaces/talk/shardmaps/chat";

fn object(name: &str, generation: i64, spec: &Value) -> Value {
    json!({
        "apiVersion": "imcluster.dev/v1alpha1", "kind": "ImCluster",
        "metadata": { "name": name, "namespace": "talk", "uid": format!("uid of {name}"), "generation": generation },
        "spec": spec,
    })
}

fn guard(object: &Value) -> DeserializeGuard<ImCluster> {
    serde_json::from_value(object.clone()).expect("metadata at least")
}

fn minimal() -> Value {
    json!({ "auth": { "insecure": {} }, "business": { "shards": 4 } })
}

fn world(client: Client) -> Arc<World> {
    let surroundings =
        Surroundings { image: "example/im:1".to_owned(), control_service: "operator.im.svc:7200".to_owned() };
    World::new(client, surroundings)
}

/// A leading operator.
struct Operator {
    context: Arc<Context>,
    shared: Arc<Shared>,
    clusters: Writer<DeserializeGuard<ImCluster>>,
    /// Keeps it leading.
    _leads: watch::Sender<Leadership>,
}

impl Operator {
    async fn start() -> (ApiServer, Self) {
        let (api, client) = ApiServer::start().await;
        (api, Self::at(client))
    }

    /// Another one leads from now on; it knows the Deployments that there are.
    async fn followed(self) -> Self {
        let next = Self::at(self.context.client().clone());
        drop(self);
        tokio::spawn(next.shared.world.clone().run(Some("talk".to_owned())));
        next.shared.world.ready().await;
        next
    }

    fn at(client: Client) -> Self {
        let (leads, leadership) = watch::channel(Leadership::Leading);
        let shared = Shared {
            world: world(client),
            clusters: Clusters::new(leadership),
            metrics: Metrics::default(),
            setup: Setup::default(),
            reporter: "operator-0".to_owned(),
        };
        shared.metrics.statuses.set_leading(true);
        let (shared, (store, clusters)) = (Arc::new(shared), reflector::store());
        let context = Arc::new(Context::new(shared.clone(), store));
        Self { context, shared, clusters, _leads: leads }
    }

    /// Sees that ImCluster, and looks at it.
    async fn reconcile(&mut self, object: &Value) {
        self.clusters.apply_watcher_event(&Event::Apply(guard(object)));
        self.look_at(object).await;
    }

    async fn look_at(&self, object: &Value) {
        reconcile(Arc::new(guard(object)), self.context.clone()).await.expect("what is there can be read");
    }
}

/// What Prometheus would scrape, line by line.
fn exported(registry: &Registry) -> Vec<String> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry).expect("written to memory");
    text.lines().map(str::to_owned).collect()
}

/// Waits until the server's state is as it should be.
async fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// `Ready=False SecretMissing` … of the status that is stored.
fn conditions(api: &ApiServer, path: &str) -> Vec<String> {
    let status = api.get(path).map(|object| object["status"]["conditions"].clone()).unwrap_or_default();
    let word = |condition: &Value| {
        let text = |key: &str| condition[key].as_str().unwrap_or_default().to_owned();
        format!("{}={} {}", text("type"), text("status"), text("reason"))
    };
    status.as_array().into_iter().flatten().map(word).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_reconcile_makes_everything_and_the_next_one_nothing() {
    let (api, mut operator) = Operator::start().await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    // Members and the map come from the loop that decides.
    let has_deployments = || {
        let names = api.names();
        let count = names.iter().filter(|name| name.starts_with("deployments/")).count();
        (count == 2 && names.iter().any(|name| name == "shardmaps/chat")).then_some(names)
    };
    let names = eventually("members are started", has_deployments).await;
    let plain: Vec<&str> = names
        .iter()
        .map(String::as_str)
        .filter(|name| !name.contains("-gateway-") && !name.contains("-business-") && !name.contains("chat-store-"))
        .collect();
    for expected in [
        "imclusters/chat",
        "networkpolicies/chat-business",
        "networkpolicies/chat-gateway",
        "networkpolicies/chat-store",
        "poddisruptionbudgets/chat-business",
        "poddisruptionbudgets/chat-gateway",
        "secrets/chat-tokens",
        "serviceaccounts/chat-business",
        "serviceaccounts/chat-gateway",
        "serviceaccounts/chat-store",
        "services/chat",
        "services/chat-business",
        "services/chat-store",
        "shardmaps/chat",
        "statefulsets/chat-store",
    ] {
        assert!(plain.contains(&expected), "{expected} is missing in {plain:#?}");
    }
    eventually("a status", || (!conditions(&api, CLUSTER_PATH).is_empty()).then_some(())).await;

    let of_reconcile = |write: &String| {
        !["deployments/", "configmaps/chat-gateway", "configmaps/chat-business", "shardmaps/", "imclusters/", "events/"]
            .iter()
            .any(|kind| write.contains(kind))
    };
    api.take_writes();
    operator.reconcile(&cluster).await;
    assert_eq!(api.take_writes().into_iter().filter(of_reconcile).collect::<Vec<_>>(), [""; 0]);

    // Somebody changes a child: just that one is put right.
    let path = "/api/v1/namespaces/talk/services/chat";
    let mut service = api.get(path).expect("the Service");
    service["spec"]["selector"] = json!({ "nobody": "x" });
    api.put(path, service);
    operator.reconcile(&cluster).await;
    assert_eq!(api.take_writes().into_iter().filter(of_reconcile).collect::<Vec<_>>(), ["PATCH services/chat"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn how_each_imcluster_is_can_be_scraped_while_it_is_there() {
    let (api, mut operator) = Operator::start().await;
    let registry = operator.shared.registry();
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    let of_chat = || exported(&registry).into_iter().filter(|line| line.contains(r#"imcluster="chat""#)).count();
    assert!(exported(&registry).contains(&"imcluster_leader 1.0".to_owned()));
    let shards = r#"imcluster_shards{namespace="talk",imcluster="chat"} 4.0"#.to_owned();
    eventually("its status", || exported(&registry).contains(&shards).then_some(())).await;
    operator.context.forget(&key_of(&guard(&cluster)));
    eventually("nothing of it", || (of_chat() == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_write_is_told_and_does_not_keep_the_others_back() {
    let (api, mut operator) = Operator::start().await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    api.fail_next("/apis/networking.k8s.io/v1/namespaces/talk/networkpolicies/chat-gateway", 403);
    operator.reconcile(&cluster).await;
    assert!(api.names().contains(&"statefulsets/chat-store".to_owned()), "what comes later is written");
    let told = || conditions(&api, CLUSTER_PATH).contains(&"Degraded=True ApplyFailed".to_owned()).then_some(());
    eventually("it is told", told).await;
    operator.reconcile(&cluster).await;
    let good = || (!conditions(&api, CLUSTER_PATH).contains(&"Degraded=True ApplyFailed".to_owned())).then_some(());
    eventually("it is put right", good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_can_not_be_read_is_told_of_itself_and_stops_nobody() {
    let (api, mut operator) = Operator::start().await;
    let mut spec = minimal();
    spec["gateway"] = json!({ "limits": { "maxConnections": "many" } });
    let poison = object("poison", 3, &spec);
    let path = "/apis/imcluster.dev/v1alpha1/namespaces/talk/imclusters/poison";
    api.put(path, poison.clone());
    operator.reconcile(&poison).await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;

    let told = || conditions(&api, path).contains(&"Ready=False Unreadable".to_owned()).then_some(());
    eventually("it is told", told).await;
    let status = api.get(path).expect("it is there")["status"].clone();
    assert_eq!(status["observedGeneration"], 3);
    assert!(status["conditions"][0]["message"].as_str().expect("words").contains("many"), "{status:#}");
    let event = || api.names().into_iter().find(|name| name.starts_with("events/poison."));
    eventually("an Event", event).await;
    assert!(api.names().contains(&"services/chat".to_owned()), "the other one is served");
    assert!(!api.names().contains(&"services/poison".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spec_that_can_not_run_here_and_a_missing_secret_are_told() {
    let (api, mut operator) = Operator::start().await;
    let mut spec = minimal();
    spec["serviceTokenFile"] = json!("/etc/token");
    let cluster = object("chat", 1, &spec);
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    let told = |words: &'static str| {
        let api = api.clone();
        move || conditions(&api, CLUSTER_PATH).contains(&words.to_owned()).then_some(())
    };
    eventually("the file is refused", told("Ready=False InvalidSpec")).await;

    let mut spec = minimal();
    spec["serviceTokenSecret"] = json!({ "name": "servers", "key": "token" });
    let cluster = object("chat", 2, &spec);
    operator.reconcile(&cluster).await;
    eventually("the Secret is missed", told("Ready=False SecretMissing")).await;
    assert!(!api.names().iter().any(|name| name.starts_with("deployments/")), "no pod waits for it");

    let secret = json!({ "metadata": { "name": "servers" }, "data": { "token": "eA==" } });
    api.put("/api/v1/namespaces/talk/secrets/servers", secret);
    operator.reconcile(&cluster).await;
    let started = || api.names().iter().any(|name| name.starts_with("deployments/")).then_some(());
    eventually("members are started", started).await;
}

fn deployments(api: &ApiServer) -> Vec<String> {
    api.names().into_iter().filter(|name| name.starts_with("deployments/")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_leader_leads_what_runs_while_what_is_asked_for_can_not_be_run() {
    let (api, mut operator) = Operator::start().await;
    let good = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, good.clone());
    operator.reconcile(&good).await;
    eventually("members are started", || (deployments(&api).len() == 2).then_some(())).await;
    let started = deployments(&api);
    let term = || api.get(MAP_PATH)?["spec"]["term"].as_u64();
    let mut led = eventually("it is led", term).await;

    let spec = |change: Value| {
        let mut spec = minimal();
        spec.as_object_mut().expect("an object").extend(change.as_object().expect("an object").clone());
        spec
    };
    let policy = "/apis/networking.k8s.io/v1/namespaces/talk/networkpolicies/chat-gateway";
    for (reason, change) in [
        ("InvalidSpec", json!({ "serviceTokenFile": "/etc/token" })),
        ("SecretMissing", json!({ "serviceTokenSecret": { "name": "servers", "key": "token" } })),
        ("Unreadable", json!({ "gateway": { "replicas": "many" } })),
        ("CannotRead", json!({ "gateway": { "replicas": 2 } })),
    ] {
        if reason == "CannotRead" {
            api.fail_reads(policy, 403);
        }
        operator = operator.followed().await;
        let bad = object("chat", 2, &spec(change));
        operator.clusters.apply_watcher_event(&Event::Apply(guard(&bad)));
        for _ in 0..2 {
            // What can't be read is the error of the look, too.
            let _ = reconcile(Arc::new(guard(&bad)), operator.context.clone()).await;
        }
        led = eventually(reason, || term().filter(|term| *term > led)).await;
        let told = || conditions(&api, CLUSTER_PATH).contains(&format!("Degraded=True {reason}")).then_some(());
        eventually(reason, told).await;
        assert_eq!(deployments(&api), started, "{reason}: nobody is started or replaced");
    }

    api.heal_reads(policy);
    let larger = object("chat", 3, &spec(json!({ "gateway": { "replicas": 2 } })));
    operator.reconcile(&larger).await;
    let gateways = format!("/apis/apps/v1/namespaces/talk/{}", started[1]);
    let grown = || api.get(&gateways).filter(|found| found["spec"]["replicas"] == 2);
    eventually("what can be run is run", grown).await;
    assert_eq!((deployments(&api), term()), (started, Some(led)), "by the same leader");
    let well = || (!conditions(&api, CLUSTER_PATH).iter().any(|word| word.starts_with("Degraded=True"))).then_some(());
    eventually("nothing is wrong", well).await;
}

#[tokio::test]
async fn as_it_runs_nobody_is_started_and_no_template_is_another_one() {
    let (api, client) = ApiServer::start().await;
    let deployment = |replicas: u32, template: &str| {
        let name = format!("chat-gateway-{template}");
        let labels = json!({
            "app.kubernetes.io/managed-by": "imcluster-operator", "imcluster.dev/cluster": "chat",
            "imcluster.dev/tier": "gateway", "imcluster.dev/template": template,
        });
        let metadata = json!({ "name": name, "namespace": "talk", "labels": labels });
        let spec = json!({ "replicas": replicas, "selector": {}, "template": {} });
        api.put(
            &format!("/apis/apps/v1/namespaces/talk/deployments/{name}"),
            json!({ "metadata": metadata, "spec": spec }),
        );
    };
    deployment(1, "old");
    deployment(3, "new");
    let world = world(client);
    tokio::spawn(world.clone().run(Some("talk".to_owned())));
    world.ready().await;
    assert_eq!(world.replicas(&ClusterKey("talk/chat".to_owned())), Some((4, 0)));

    let cluster: ImCluster = serde_json::from_value(object("chat", 1, &minimal())).expect("a cluster");
    let asked = Accepted::new(&cluster).expect("it can run");
    let platform = KubernetesPlatform::as_it_runs(world, asked.clone().as_it_runs(4, 0));
    let cluster = platform.cluster().expect("a cluster");
    assert_eq!(platform.template(&cluster, Tier::Gateway), "new", "that of most");
    let refused = platform.start(&cluster, Tier::Gateway, 1).await;
    assert!(matches!(refused, Err(PlatformError::Refused(_))), "{refused:?}");
    platform.set_cluster(asked);
    let cluster = platform.cluster().expect("a cluster");
    assert_ne!(platform.template(&cluster, Tier::Gateway), "new", "what is asked for can be run");
    platform.load_map().await.expect("answers");
    platform.save_map(&stored(1, 0)).await.expect("leads");
    platform.start(&cluster, Tier::Gateway, 1).await.expect("starts one");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_read_is_told_and_read_again() {
    let (api, mut operator) = Operator::start().await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    eventually("a status", || (!conditions(&api, CLUSTER_PATH).is_empty()).then_some(())).await;
    let path = "/api/v1/namespaces/talk/services/chat";
    api.fail_reads(path, 500);
    for _ in 0..2 {
        let look = reconcile(Arc::new(guard(&cluster)), operator.context.clone()).await;
        assert!(look.is_err(), "it is an error of the look, too");
    }
    let told = || {
        let words = api.get(CLUSTER_PATH)?["status"]["conditions"][2].clone();
        (words["reason"] == "CannotRead").then_some(words)
    };
    let told = eventually("it is told", told).await;
    let message = told["message"].as_str().expect("words").to_owned();
    assert!(message.contains("Service chat") && message.contains("500"), "{message}");
    api.heal_reads(path);
    operator.reconcile(&cluster).await;
    let good = || (!conditions(&api, CLUSTER_PATH).contains(&"Degraded=True CannotRead".to_owned())).then_some(());
    eventually("it is read again", good).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_that_somebody_deleted_comes_back_and_one_that_nobody_uses_goes() {
    let (api, mut operator) = Operator::start().await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    eventually("members are started", || (deployments(&api).len() == 2).then_some(())).await;
    for deployment in deployments(&api) {
        let config = deployment.replace("deployments/", "configmaps/");
        let path = format!("/api/v1/namespaces/talk/{config}");
        let made = api.get(&path).expect("the configuration")["data"].clone();
        assert!(made.is_object(), "{config}");
        api.remove(&path);
        operator.reconcile(&cluster).await;
        assert_eq!(api.get(&path).expect("it is back")["data"], made);
    }
    let unused = "/api/v1/namespaces/talk/configmaps/chat-gateway-0123abcd";
    api.put(unused, json!({ "metadata": { "name": "chat-gateway-0123abcd", "namespace": "talk" } }));
    operator.reconcile(&cluster).await;
    assert_eq!(api.get(unused), None);
}

/// A Secret with one key.
fn secret(name: &str, key: &str, value: &str) -> (String, Value) {
    let path = format!("/api/v1/namespaces/talk/secrets/{name}");
    (path, json!({ "metadata": { "name": name }, "data": { key: ByteString(value.into()) } }))
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_credentials_are_missed_without_keeping_anything_from_running() {
    let (api, mut operator) = Operator::start().await;
    let context = operator.context.clone();
    let mut spec = minimal();
    let key = |key: &str| json!({ "name": "monitoring", "key": key });
    let prometheus = json!({ "url": "https://p:9090", "tokenSecret": key("token"), "caSecret": key("ca.crt") });
    spec["metrics"] = json!({ "prometheus": prometheus });
    let cluster = object("chat", 1, &spec);
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    let told = || conditions(&api, CLUSTER_PATH).contains(&"Degraded=True SecretMissing".to_owned()).then_some(());
    eventually("the Secret is missed", told).await;
    let started = || api.names().iter().any(|name| name.starts_with("deployments/chat-gateway")).then_some(());
    eventually("members are started all the same", started).await;

    let (path, mut monitoring) = secret("monitoring", "token", "t");
    monitoring["data"]["ca.crt"] = json!(ByteString("PEM".into()));
    api.put(&path, monitoring);
    assert_eq!(context.secrets().changed(context.client()).await.len(), 1, "it is there now");
    operator.reconcile(&cluster).await;
    eventually("it is put right", || told().is_none().then_some(())).await;
    assert_eq!(context.secrets().changed(context.client()).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_secret_is_noticed_once() {
    let (api, mut operator) = Operator::start().await;
    let context = operator.context.clone();
    let mut spec = minimal();
    spec["serviceTokenSecret"] = json!({ "name": "servers", "key": "token" });
    spec["storage"] = json!({ "postgres": { "urlSecret": { "name": "database", "key": "url" } } });
    for (path, object) in [secret("servers", "token", "x"), secret("database", "url", "postgres://a@h/d")] {
        api.put(&path, object);
    }
    let cluster = object("chat", 1, &spec);
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    assert_eq!(context.secrets().changed(context.client()).await, []);

    for (path, object) in [secret("servers", "token", "y"), secret("database", "url", "postgres://b@h/d")] {
        api.put(&path, object);
        let changed = context.secrets().changed(context.client()).await;
        assert_eq!(changed.iter().map(ToString::to_string).collect::<Vec<_>>(), ["talk/chat"], "{path}");
        operator.reconcile(&cluster).await;
        assert_eq!(context.secrets().changed(context.client()).await, [], "{path}");
    }
    context.forget(&ClusterKey("talk/chat".to_owned()));
    api.remove("/api/v1/namespaces/talk/secrets/servers");
    assert_eq!(context.secrets().changed(context.client()).await, [], "of who is gone nothing is asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_tokens_come_back_as_they_were_and_damaged_ones_are_told() {
    let (api, mut operator) = Operator::start().await;
    let context = operator.context.clone();
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    let path = "/api/v1/namespaces/talk/secrets/chat-tokens";
    operator.reconcile(&cluster).await;
    let made = api.get(path).expect("the tokens")["data"].clone();
    api.remove(path);
    assert_eq!(context.secrets().changed(context.client()).await.len(), 1);
    operator.reconcile(&cluster).await;
    assert_eq!(api.get(path).expect("the tokens")["data"], made);

    let mut damaged = api.get(path).expect("the tokens");
    damaged["data"]["store-token"] = json!("");
    api.put(path, damaged);
    operator.reconcile(&cluster).await;
    let told = || conditions(&api, CLUSTER_PATH).contains(&"Degraded=True TokensDamaged".to_owned()).then_some(());
    eventually("it is told", told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_deleted_or_paused_is_not_written() {
    let (api, mut operator) = Operator::start().await;
    let mut spec = minimal();
    spec["paused"] = json!(true);
    let cluster = object("chat", 1, &spec);
    api.put(CLUSTER_PATH, cluster.clone());
    operator.reconcile(&cluster).await;
    let told = || conditions(&api, CLUSTER_PATH).contains(&"Progressing=False Paused".to_owned()).then_some(());
    eventually("it is told", told).await;
    assert_eq!(api.names().iter().filter(|name| !name.starts_with("events/")).count(), 1, "only itself");

    let mut cluster = object("chat", 2, &minimal());
    cluster["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    api.take_writes();
    operator.reconcile(&cluster).await;
    assert_eq!(api.take_writes(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_does_not_write_over_the_status_of_a_later_one() {
    let (api, mut operator) = Operator::start().await;
    api.put(CLUSTER_PATH, object("chat", 1, &minimal()));
    operator.reconcile(&api.get(CLUSTER_PATH).expect("the cluster")).await;
    let term = || api.get(CLUSTER_PATH)?["status"]["shards"]["term"].as_u64().filter(|term| *term > 0);
    let first = eventually("a leader's status", term).await;
    let mut cluster = api.get(CLUSTER_PATH).expect("the cluster");
    cluster["status"]["shards"]["term"] = json!(first + 1);
    cluster["status"]["conditions"] = json!([]);
    api.put(CLUSTER_PATH, cluster);

    // News for the one that slept: its spec can't be run any more.
    let mut spec = minimal();
    spec["serviceTokenFile"] = json!("/etc/token");
    api.take_writes();
    operator.reconcile(&object("chat", 2, &spec)).await;
    let tried = || api.take_writes().contains(&"PATCH imclusters/chat/status".to_owned()).then_some(());
    eventually("it tries to write", tried).await;
    eventually("it tries again at its next look", tried).await;
    assert_eq!((term(), conditions(&api, CLUSTER_PATH)), (Some(first + 1), vec![]), "what the later one wrote stands");

    // Whoever is no later leader only changed what the write was about.
    let mut cluster = api.get(CLUSTER_PATH).expect("the cluster");
    cluster["status"]["shards"]["term"] = json!(first);
    api.put(CLUSTER_PATH, cluster);
    let told = || conditions(&api, CLUSTER_PATH).contains(&"Degraded=True InvalidSpec".to_owned()).then_some(());
    eventually("its status is written", told).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_decides_for_an_imcluster_that_went_while_it_was_looked_at() {
    let (api, mut operator) = Operator::start().await;
    let cluster = object("chat", 1, &minimal());
    api.put(CLUSTER_PATH, cluster.clone());
    operator.look_at(&cluster).await;
    assert_eq!(operator.shared.metrics.clusters.get(), 0, "it is not among those that there are");
    // Another one has its name by now.
    let mut other = cluster.clone();
    other["metadata"]["uid"] = json!("another uid");
    operator.clusters.apply_watcher_event(&Event::Apply(guard(&other)));
    operator.look_at(&cluster).await;
    assert_eq!(operator.shared.metrics.clusters.get(), 0, "it is another one");
    operator.reconcile(&cluster).await;
    assert_eq!(operator.shared.metrics.clusters.get(), 1);
    operator.clusters.apply_watcher_event(&Event::Delete(guard(&cluster)));
    operator.context.forget(&key_of(&guard(&cluster)));
    assert_eq!(operator.shared.metrics.clusters.get(), 0);
}

fn stored(term: u64, number: u64) -> StoredMap {
    let shards = [MapShard { epoch: 3, owner: Some("business-0/00000000000000ab") }, MapShard::default()];
    let links = BTreeMap::from([("business-0/00000000000000ab".to_owned(), "10.0.0.1:7000".to_owned())]);
    StoredMap { map: ShardMapSpec::encode(term, number, &shards), links }
}

fn platform(client: Client) -> Arc<KubernetesPlatform> {
    let cluster: ImCluster = serde_json::from_value(object("chat", 1, &minimal())).expect("a cluster");
    KubernetesPlatform::new(world(client), Accepted::new(&cluster).expect("it can run"))
}

#[tokio::test]
async fn an_earlier_leader_can_not_write_the_map_any_more() {
    let (api, client) = ApiServer::start().await;
    let earlier = platform(client.clone());
    assert_eq!(earlier.load_map().await.expect("answers"), None);
    earlier.save_map(&stored(1, 0)).await.expect("creates it");
    earlier.save_map(&stored(1, 1)).await.expect("replaces it");

    let later = platform(client);
    let found = later.load_map().await.expect("answers").expect("it is there");
    assert_eq!((found.map.term, found.map.number, found.links), (1, 1, stored(1, 1).links));
    later.save_map(&stored(2, 0)).await.expect("replaces it");
    assert!(matches!(earlier.save_map(&stored(1, 2)).await, Err(PlatformError::Outranked)));

    // A person is not a leader.
    let mut map = api.get(MAP_PATH).expect("the map");
    map["metadata"]["annotations"]["note"] = json!("hello");
    api.put(MAP_PATH, map);
    later.save_map(&stored(2, 1)).await.expect("replaces it all the same");
    assert_eq!(api.get(MAP_PATH).expect("the map")["spec"]["number"], 1);
}

#[tokio::test]
async fn a_mark_meets_the_pod_that_it_is_meant_for_and_no_other_of_its_name() {
    let (api, client) = ApiServer::start().await;
    let path = "/api/v1/namespaces/talk/pods/chat-gateway-0";
    let pod = |uid: &str| {
        let labels = json!({ "imcluster.dev/cluster": "chat", "imcluster.dev/tier": "gateway" });
        json!({ "metadata": { "name": "chat-gateway-0", "namespace": "talk", "uid": uid, "labels": labels } })
    };
    let serving = || api.get(path).expect("the pod")["metadata"]["labels"]["imcluster.dev/serving"].clone();
    api.put(path, pod("a"));
    let world = world(client);
    let watches = tokio::spawn(world.clone().run(Some("talk".to_owned())));
    world.ready().await;
    // From here on nothing more is heard of pods.
    watches.abort();
    let _ = watches.await;
    let cluster: ImCluster = serde_json::from_value(object("chat", 1, &minimal())).expect("a cluster");
    let platform = KubernetesPlatform::new(world, Accepted::new(&cluster).expect("it can run"));
    api.put(path, pod("b"));
    let refused = platform.set_serving("chat-gateway-0", true).await;
    assert!(matches!(refused, Err(PlatformError::Refused(_))), "{refused:?}");
    assert_eq!(serving(), Value::Null);
    api.put(path, pod("a"));
    platform.set_serving("chat-gateway-0", true).await.expect("it is the one");
    assert_eq!(serving(), "true");
}

#[tokio::test]
async fn members_are_started_on_what_was_looked_at_only() {
    let (api, client) = ApiServer::start().await;
    let platform = platform(client);
    platform.load_map().await.expect("answers");
    platform.save_map(&stored(1, 0)).await.expect("leads");
    let cluster = platform.cluster().expect("a cluster");
    let ordered = || platform.watch().borrow().ordered.gateway;
    platform.start(&cluster, Tier::Gateway, 2).await.expect("creates the Deployment");
    assert_eq!(ordered(), 2, "shown at once");
    platform.start(&cluster, Tier::Gateway, 1).await.expect("one more");
    assert_eq!(ordered(), 3);

    let name = api.names().into_iter().find(|name| name.starts_with("deployments/")).expect("the Deployment");
    let path = format!("/apis/apps/v1/namespaces/talk/{name}");
    let mut deployment = api.get(&path).expect("the Deployment");
    assert_eq!(deployment["spec"]["replicas"], 3);
    assert_eq!(deployment["metadata"]["annotations"]["imcluster.dev/term"], "1");
    deployment["spec"]["replicas"] = json!(7);
    api.put(&path, deployment);
    let refused = platform.start(&cluster, Tier::Gateway, 1).await;
    assert!(matches!(refused, Err(PlatformError::Refused(_))), "{refused:?}");
    assert_eq!(ordered(), 7, "what is there is known now");
    platform.start(&cluster, Tier::Gateway, 1).await.expect("on what is there");
    assert_eq!(api.get(&path).expect("the Deployment")["spec"]["replicas"], 8);

    // A leader of a later term was here.
    let mut deployment = api.get(&path).expect("the Deployment");
    deployment["metadata"]["annotations"]["imcluster.dev/term"] = json!("2");
    api.put(&path, deployment);
    assert!(platform.start(&cluster, Tier::Gateway, 1).await.is_err(), "conflicts");
    let outranked = timeout(Duration::from_secs(10), platform.start(&cluster, Tier::Gateway, 1)).await;
    assert!(matches!(outranked, Ok(Err(PlatformError::Outranked))), "{outranked:?}");
}
