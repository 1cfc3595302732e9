//! A whole operator, but for its process, at an API server in memory: what it waits for, and what it calls.

#[path = "support/api_server.rs"]
mod api_server;

use api_server::{ApiServer, Right};
use im_crds::{ImCluster, MapShard, ShardMapSpec};
use im_operator::control::Setup;
use im_operator::controller::accepted::Accepted;
use im_operator::controller::pods::Surroundings;
use im_operator::controller::{Options, work};
use im_operator::leadership::Identity;
use im_operator::platform::kubernetes::{KubernetesPlatform, World};
use im_operator::platform::{Platform, StoredMap, Tier};
use kube::Client;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

const IMAGE: &str = "example/im:1";
const CONTROL: &str = "operator.im.svc:7200";

/// Runs an operator of the namespace `talk`; its health and metrics are at the address.
async fn operator(client: Client) -> (SocketAddr, AbortOnDropHandle<()>) {
    let http = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = http.local_addr().expect("bound");
    let anywhere: SocketAddr = ([127, 0, 0, 1], 0).into();
    let options = Options {
        image: IMAGE.to_owned(),
        control_address: anywhere,
        control_service: CONTROL.to_owned(),
        http_address: anywhere,
        namespace: Some("talk".to_owned()),
        lease_namespace: None,
        pod_name: "operator-0".to_owned(),
        pod_ip: "127.0.0.1".to_owned(),
        setup: Setup::default(),
    };
    let me = Identity { name: "operator-0".to_owned(), address: "127.0.0.1:7200".to_owned() };
    let running = async move {
        let ended = work(client, &options, "im".to_owned(), me, http).await;
        panic!("the operator ended: {ended:?}");
    };
    (address, AbortOnDropHandle::new(tokio::spawn(running)))
}

/// Looks again and again until it is as it should be, or for a minute; returns the last look.
async fn eventually<T>(mut look: impl AsyncFnMut() -> T, is_good: impl Fn(&T) -> bool) -> T {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let found = look().await;
        if is_good(&found) || Instant::now() > give_up {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readyz_names_what_it_waits_for() {
    let (api, client) = ApiServer::start().await;
    let kind = |kind: &str| format!("/apis/imcluster.dev/v1alpha1/namespaces/talk/{kind}");
    api.fail_reads(&kind("imclusters"), 404);
    api.fail_reads(&kind("shardmaps"), 403);
    let (address, _running) = operator(client).await;
    let get = async |path: &str| {
        let answer = reqwest::get(format!("http://{address}/{path}")).await.expect("it answers");
        (answer.status().as_u16(), answer.text().await.expect("words"))
    };
    let readyz = async |words: &str| {
        let found = eventually(async || get("readyz").await, |(_, found)| found.contains(words)).await;
        assert!(found.1.contains(words), "{found:?}");
        found.0
    };
    assert_eq!(readyz("imclusters.imcluster.dev: apply it").await, 503);
    api.heal_reads(&kind("imclusters"));
    assert_eq!(readyz("the right to list shardmaps.imcluster.dev").await, 503);
    assert_eq!(get("healthz").await.0, 200, "who waits lives");
    api.heal_reads(&kind("shardmaps"));
    assert_eq!(readyz("ok").await, 200);
    assert!(get("metrics").await.1.contains("imcluster_leader"));
}

/// What the chart grants: in the namespaces that are looked after, and in the operator's own.
fn granted() -> BTreeSet<Right> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/imcluster/templates/rbac.yaml");
    let file = std::fs::read_to_string(path).expect("the chart");
    let between = |from: &str, to: &str| {
        let (_, rest) = file.split_once(from).expect(from);
        rest.split_once(to).expect(to).0.to_owned()
    };
    let everywhere = between("{{- define \"imcluster.rules\" -}}\n", "{{- end }}");
    let own = between("-leader\n  namespace: {{ .Release.Namespace }}", "---");
    let own = own.split_once("rules:\n").expect("rules").1.to_owned();
    let mut rights = BTreeSet::new();
    for rules in [everywhere, own] {
        let rules: Vec<Value> = serde_norway::from_str(&rules).expect("a list of rules");
        let texts = |rule: &Value, key: &str| -> Vec<String> {
            let texts = rule[key].as_array().into_iter().flatten().filter_map(Value::as_str);
            texts.map(str::to_owned).collect()
        };
        for rule in &rules {
            for group in texts(rule, "apiGroups") {
                for resource in texts(rule, "resources") {
                    let verbs = texts(rule, "verbs").into_iter();
                    rights.extend(verbs.map(|verb| (group.clone(), resource.clone(), verb)));
                }
            }
        }
    }
    rights
}

fn labels(cluster: &str, template: &str) -> Value {
    json!({
        "app.kubernetes.io/managed-by": "imcluster-operator", "imcluster.dev/cluster": cluster,
        "imcluster.dev/tier": "gateway", "imcluster.dev/template": template,
    })
}

fn cluster(name: &str) -> Value {
    let secret = json!({ "name": "nobody", "key": "token" });
    json!({
        "apiVersion": "imcluster.dev/v1alpha1", "kind": "ImCluster",
        "metadata": { "name": name, "namespace": "talk", "uid": format!("uid of {name}"), "generation": 1 },
        "spec": {
            "auth": { "insecure": {} }, "business": { "shards": 2 },
            // A Secret that is missing is worth an Event.
            "metrics": { "prometheus": { "url": "http://127.0.0.1:1", "tokenSecret": secret } },
        },
    })
}

/// What whoever leads does with members that no test can start: the steps of a scale-out, a fail-over and a roll-out.
async fn lead(api: &ApiServer, client: Client) {
    let orphan =
        json!({ "metadata": { "name": "other-gateway-0", "namespace": "talk", "labels": labels("other", "x") } });
    api.put("/api/v1/namespaces/talk/pods/other-gateway-0", orphan);
    let surroundings = Surroundings { image: IMAGE.to_owned(), control_service: CONTROL.to_owned() };
    let world = World::new(client, surroundings);
    let _watches = AbortOnDropHandle::new(tokio::spawn(world.clone().run(Some("talk".to_owned()))));
    world.ready().await;
    let other: ImCluster = serde_json::from_value(cluster("other")).expect("a cluster");
    let platform = KubernetesPlatform::new(world, Accepted::new(&other).expect("it can run"));
    platform.load_map().await.expect("answers");
    for number in 0..2 {
        let map = ShardMapSpec::encode(1, number, &[MapShard::default(), MapShard::default()]);
        platform.save_map(&StoredMap { map, links: BTreeMap::new() }).await.expect("leads");
    }
    for _ in 0..2 {
        platform.start(&other, Tier::Gateway, 1).await.expect("starts one");
    }
    let name = api.names().into_iter().find(|name| name.starts_with("deployments/other-gateway-"));
    api.fail_next(&format!("/apis/apps/v1/namespaces/talk/{}", name.expect("a Deployment")), 409);
    platform.start(&other, Tier::Gateway, 1).await.expect("it did not change");
    platform.stop("other-gateway-0", Duration::ZERO).await.expect("nobody counts it");
    assert_eq!(api.get("/api/v1/namespaces/talk/pods/other-gateway-0"), None);
}

/// A right that is missing is a 403; one too many is a right for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_chart_grants_what_a_running_operator_calls_and_no_more() {
    let (api, client) = ApiServer::start().await;
    api.put("/apis/imcluster.dev/v1alpha1/namespaces/talk/imclusters/chat", cluster("chat"));
    let outdated = json!({
        "metadata": { "name": "chat-gateway-old", "namespace": "talk", "labels": labels("chat", "old") },
        "spec": { "replicas": 0, "selector": {}, "template": {} },
    });
    api.put("/apis/apps/v1/namespaces/talk/deployments/chat-gateway-old", outdated);
    let unused = json!({ "metadata": { "name": "chat-gateway-unused", "namespace": "talk" } });
    api.put("/api/v1/namespaces/talk/configmaps/chat-gateway-unused", unused);
    let gateway = json!({
        "metadata": { "name": "chat-gateway-0", "namespace": "talk", "labels": labels("chat", "x") },
        "status": { "phase": "Running", "containerStatuses": [{
            "name": "gateway", "image": IMAGE, "imageID": "", "ready": true, "restartCount": 0, "state": { "running": {} },
        }] },
    });
    api.put("/api/v1/namespaces/talk/pods/chat-gateway-0", gateway);
    let (_, _running) = operator(client.clone()).await;
    lead(&api, client).await;

    // Asked by the API server's admission, not by the operator.
    let of_admission = ("imcluster.dev".to_owned(), "imclusters/finalizers".to_owned(), "update".to_owned());
    let called = || -> BTreeSet<Right> { api.called().into_iter().chain([of_admission.clone()]).collect() };
    let granted = granted();
    let found = eventually(async || called(), |called| *called == granted).await;
    let missing: Vec<&Right> = found.difference(&granted).collect();
    let unused: Vec<&Right> = granted.difference(&found).collect();
    assert!(missing.is_empty() && unused.is_empty(), "not granted: {missing:?}; never called: {unused:?}");
}
