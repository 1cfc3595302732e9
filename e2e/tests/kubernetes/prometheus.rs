//! The gateways follow the load as Prometheus tells it; Prometheus goes away and comes back.

use std::time::Duration;

use im_operator::autoscale::SOURCE_SETTLES;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    dependencies::{Data, Dependency},
    environment::Suite,
    scene::{CLUSTER, PATIENCE, RATE, Scene, ensure, scenario},
    support::{TestResult, eventually},
    world::World,
};

/// As in `e2e/cluster/manifests/prometheus.yaml`.
const NAME: &str = "prometheus";
const URL: &str = "http://prometheus.e2e-dependencies:9090";
const SCRAPE_INTERVAL: Duration = Duration::from_secs(1);
/// Members export averages over this time.
const AVERAGED_OVER: Duration = Duration::from_secs(10);
/// The promise: replicas follow a step of the load within the averaging window, a scrape interval and this.
const DECIDED_WITHIN: Duration = Duration::from_secs(1);
/// The stabilization window.
const WINDOW: Duration = Duration::from_secs(10);
/// How long an outage lasts: several times the stabilization window and longer than a sample is fresh.
const OUTAGE: Duration = Duration::from_secs(25);

fn autoscaling(metric: &Value, max: u32) -> Value {
    json!({
        "minReplicas": 1,
        "maxReplicas": max,
        "metrics": [metric],
        "behavior": {
            "scaleUp": {"policies": [{"type": "Pods", "value": 4, "periodSeconds": 2}]},
            "scaleDown": {
                "stabilizationWindowSeconds": WINDOW.as_secs(),
                "policies": [{"type": "Pods", "value": 4, "periodSeconds": 2}],
            },
        },
    })
}

fn spec(metric: &Value) -> Value {
    json!({
        "metrics": {"prometheus": {"url": URL}},
        "gateway": {"replicas": null, "autoscaling": autoscaling(metric, 2)},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_follow_a_step_of_the_load() -> TestResult {
    // A message counts when it is taken and for each who gets it: at the usual rate some 250/s, at the high one 1,000/s.
    let target = json!({"type": "AverageValue", "value": 500});
    let metric = json!({"type": "BuiltIn", "builtIn": {"name": "MessagesPerSecond", "target": target}});
    scenario(Suite::Ci, spec(&metric), async |scene| {
        scene.world.hold("the usual load is no reason to grow", AVERAGED_OVER, |world| replicas(world) == 1).await?;
        scene.chat()?.send_at(RATE * 4.0, 2);
        let start = Instant::now();
        scene.wait("the gateways' Deployment is patched", |world| replicas(world) == 2).await?;
        let (took, allowed) = (start.elapsed(), AVERAGED_OVER + SCRAPE_INTERVAL + DECIDED_WITHIN);
        println!("load step to replicas patched: {took:.1?} (allowed {allowed:.1?})");
        let told = |world: &World| because(world).iter().any(|reason| reason.contains("from Prometheus"));
        scene.wait("the reason names Prometheus", told).await?;
        println!("because: {:?}", because(&scene.world));
        ensure(took <= allowed, || format!("it took {took:?}, {allowed:?} are allowed"))?;
        scene.wait_gateways(2).await?;
        // Connections stay where they are; who connects now is dealt to both, as soon as the nodes know of both.
        eventually("both gateways have connections", PATIENCE, async || {
            let scene = &mut *scene;
            scene.chat().ok()?.reconnect().await;
            scene.connections_are_everywhere().await.ok()?.then_some(())
        })
        .await?;
        scene.flow(500).await?;
        let connections = scene.chat()?.connections();
        scene.chat()?.send_at(RATE / 4.0, 3);
        scene.wait_gateways(1).await?;
        println!("because: {:?}", because(&scene.world));
        for person in scene.chat()?.people() {
            person.client.online().await;
        }
        let moved = scene.chat()?.connections() - connections;
        println!("{moved} clients were drained");
        ensure(moved > 0, || "a gateway went and nobody had to move".to_owned())?;
        scene.flow(50).await
    })
    .await
}

/// Why there are as many gateways.
fn because(world: &World) -> Vec<String> {
    world.status(CLUSTER).map(|status| status.gateway.because).unwrap_or_default()
}

fn replicas(world: &World) -> i32 {
    world.replicas(CLUSTER, "gateway")
}

/// Of the people, those who go and come in the scenarios below.
const COME_AND_GO: usize = 8;
/// Connections for which one gateway is meant: fewer than all people, more than those who stay.
const CONNECTIONS_EACH: u32 = 8;

/// How far back the query below looks: a Prometheus that lost its data has no answer for so long, twice the window.
const LOOKS_BACK: Duration = Duration::from_secs(20);

/// What only Prometheus can answer.
fn own_query(namespace: &str) -> Value {
    let query = format!("sum(im_connections{{namespace=\"{namespace}\"}} offset {}s)", LOOKS_BACK.as_secs());
    json!({"type": "Prometheus", "prometheus": {"query": query, "target": {"type": "AverageValue", "value": CONNECTIONS_EACH}}})
}

#[tokio::test(flavor = "multi_thread")]
async fn no_gateway_goes_on_doubt() -> TestResult {
    scenario(Suite::Ci, json!({"metrics": {"prometheus": {"url": URL}}}), async |scene| {
        let metric = own_query(&scene.namespace);
        scene.edit(json!({"gateway": {"replicas": null, "autoscaling": autoscaling(&metric, 2)}})).await?;
        let prometheus = Dependency::of(scene, NAME);
        let turns: &[Data] = match scene.environment.suite {
            Suite::Ci => &[Data::Lost],
            Suite::All => &[Data::Lost, Data::Kept],
        };
        for &comes_back in turns {
            go(scene, true).await?;
            scene.wait_gateways(2).await?;
            prometheus.stop().await?;
            let away = async {
                go(scene, false).await?;
                let what = "no gateway goes while Prometheus is away";
                scene.world.hold(what, OUTAGE, |world| replicas(world) == 2).await?;
                println!("because: {:?}", because(&scene.world));
                scene.wait_condition("Degraded", "PrometheusUnreachable").await?;
                scene.wait_condition("ScalingLimited", "MetricsInDoubt").await?;
                // Without data it has no answer at first. That no number is not a small number is seen with people there, for
                // whom two gateways are right.
                go(scene, comes_back == Data::Lost).await?;
                scene.flow(50).await
            }
            .await;
            prometheus.start(comes_back).await?;
            away?;
            if comes_back == Data::Lost {
                let what = "no gateway goes while Prometheus has nothing, or a part of it";
                scene.world.hold(what, SOURCE_SETTLES + WINDOW, |world| replicas(world) == 2).await?;
                println!("because: {:?}", because(&scene.world));
                go(scene, false).await?;
            }
            let start = Instant::now();
            scene.wait("a gateway goes, now that it is known to be idle", |world| replicas(world) == 1).await?;
            println!("Prometheus was back, data {comes_back:?}; {:.1?} later a gateway went", start.elapsed());
            scene.wait_gateways(1).await?;
        }
        scene.flow(100).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_prometheus_the_members_are_asked() -> TestResult {
    let target = json!({"type": "AverageValue", "value": CONNECTIONS_EACH});
    let metric = json!({"type": "BuiltIn", "builtIn": {"name": "Connections", "target": target}});
    scenario(Suite::All, spec(&metric), async |scene| {
        scene.wait_gateways(2).await?;
        let prometheus = Dependency::of(scene, NAME);
        prometheus.stop().await?;
        let away = async {
            go(scene, false).await?;
            scene.wait_gateways(1).await?;
            println!("because: {:?}", because(&scene.world));
            go(scene, true).await?;
            scene.wait_gateways(2).await
        }
        .await;
        prometheus.start(Data::Kept).await?;
        away?;
        scene.flow(100).await
    })
    .await
}

/// Some people go offline, or come back.
async fn go(scene: &mut Scene, online: bool) -> TestResult {
    for person in scene.chat()?.people().iter().take(COME_AND_GO) {
        person.client.set_online(online);
        if online {
            person.client.online().await;
        } else {
            person.client.offline().await;
        }
    }
    Ok(())
}
