//! The operator's leader is killed, stopped and resumed; all operators are gone.

use std::time::Duration;

use im_crds::ConditionStatus;
use k8s_openapi::api::apps::v1::Deployment;
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams},
};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    environment::Suite,
    operator::{self, LED_AGAIN_WITHIN},
    scene::{CLUSTER, PATIENCE, Scene, ensure, scenario_beside_nodes},
    support::{TestResult, eventually},
    world::World,
};

/// A new leader hears the members before it acts.
const MEMBERS_HEARD_WITHIN: Duration = Duration::from_secs(5);

/// Kills the leader's process, which gives nothing up then, and deletes its pod, so that nobody comes back under its name: the
/// other one has to take over when the Lease has run out.
async fn kill_leader(scene: &Scene) -> TestResult {
    let leader = scene.operator.leader().await?;
    let term = |world: &World| world.map_version(CLUSTER).map(|(term, _)| term);
    let before = term(&scene.world).ok_or("there is no shard map")?;
    scene.operator.signal(&leader.pod, Signal::KILL)?;
    let start = Instant::now();
    scene.operator.delete_without_grace(&leader.pod).await?;
    let next = scene.operator.wait_other_leader(&leader, LED_AGAIN_WITHIN).await?;
    println!("{} was killed; {} leads {:.1?} later", leader.holder, next.holder, start.elapsed());
    scene
        .world
        .wait("the next leader has its term", MEMBERS_HEARD_WITHIN, |world| term(world).filter(|term| *term > before))
        .await?;
    println!("its term is stamped after {:.1?}", start.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_during_a_move() -> TestResult {
    let spec = json!({"business": {"rebalance": {"movesInFlight": 2}}});
    scenario_beside_nodes(Suite::Ci, spec, async |scene| {
        scene.edit(json!({"business": {"replicas": 3}})).await?;
        let moves = |world: &World| world.shares(CLUSTER).is_some_and(|shares| shares.len() > 1);
        scene.wait("shards move", moves).await?;
        kill_leader(scene).await?;
        scene.flow(200).await?;
        scene.wait_shards_shared_by(3).await?;
        scene.flow(100).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_during_a_drain() -> TestResult {
    let spec = json!({"gateway": {"replicas": 3, "drain": {"notice": "5s", "rate": 2}}});
    scenario_beside_nodes(Suite::All, spec, async |scene| {
        scene.wait_gateways(3).await?;
        scene.chat()?.reconnect().await;
        scene.edit(json!({"gateway": {"replicas": 1}})).await?;
        scene.wait("gateways drain", |world| world.serving(CLUSTER).len() < 3).await?;
        kill_leader(scene).await?;
        scene.flow(200).await?;
        scene.wait_gateways(1).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_and_wakes_changes_nothing() -> TestResult {
    // Moves and drains take so long that the leader falls asleep in the middle of them.
    let spec = json!({
        "gateway": {"replicas": 3, "drain": {"notice": "5s", "rate": 1}},
        "business": {"rebalance": {"movesInFlight": 1, "movesPerRound": 1}},
    });
    scenario_beside_nodes(Suite::All, spec, async |scene| {
        scene.wait_gateways(3).await?;
        scene.chat()?.reconnect().await;
        scene.edit(json!({"gateway": {"replicas": 1}, "business": {"replicas": 3}})).await?;
        let under_way = |world: &World| {
            // Each newcomer has its first shards, and most of its share is still to come: one moves a second.
            let moving = world.shares(CLUSTER).is_some_and(|shares| shares.len() == 3);
            let drains = world.condition_is(CLUSTER, "Draining", ConditionStatus::True);
            moving && drains
        };
        scene.wait("shards move and gateways drain", under_way).await?;
        let term = |world: &World| world.map_version(CLUSTER).map_or(0, |(term, _)| term);
        let earlier = term(&scene.world);
        let old = scene.operator.leader().await?;
        scene.operator.signal(&old.pod, Signal::STOP)?;
        let start = Instant::now();
        let new = scene.operator.wait_other_leader(&old, LED_AGAIN_WITHIN).await;
        // It must not stay stopped, whatever else goes wrong. It wakes when the opposite of all it was about is asked for.
        let edited = async {
            println!("{} leads {:.1?} after {} was stopped", new?.holder, start.elapsed(), old.holder);
            scene.edit(json!({"gateway": {"replicas": 3}, "business": {"replicas": 1}})).await?;
            scene.wait("the new leader stamped its term", |world| term(world) > earlier).await
        }
        .await;
        scene.operator.signal(&old.pod, Signal::CONT)?;
        edited?;
        println!("{} wakes after {:.1?}", old.holder, start.elapsed());
        let now = term(&scene.world);
        scene.edit(json!({"business": {"rebalance": {"movesInFlight": 8, "movesPerRound": 64}}})).await?;
        scene.wait_shards_shared_by(1).await?;
        scene.wait_gateways(3).await?;
        let settled = |world: &World| world.condition_is(CLUSTER, "Progressing", ConditionStatus::False);
        scene.wait("nothing is under way", settled).await?;
        let done = scene.world.written_by_operator(CLUSTER);
        ensure(term(&scene.world) == now, || "somebody else stamped a term".to_owned())?;
        let stands = |world: &World| world.written_by_operator(CLUSTER) == done;
        scene.world.hold("what the new leader did stands", Duration::from_secs(15), stands).await?;
        let restarts = |pods: Vec<k8s_openapi::api::core::v1::Pod>| -> i32 {
            let statuses = pods.into_iter().filter(|pod| pod.name_any() == old.pod.name_any());
            statuses.filter_map(|pod| pod.status?.container_statuses).flatten().map(|one| one.restart_count).sum()
        };
        ensure(restarts(scene.operator.pods().await?) == restarts(vec![old.pod.clone()]), || {
            "the old leader was restarted, so it was not the sleeper that woke up: stop it for a shorter time"
                .to_owned()
        })?;
        scene.flow(200).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_flow_while_no_operator_runs() -> TestResult {
    scenario_beside_nodes(Suite::All, json!({"gateway": {"replicas": 2}, "business": {"replicas": 2}}), async |scene| {
        scene.wait_shards_shared_by(2).await?;
        let deployments: Api<Deployment> = Api::namespaced(scene.client.clone(), operator::NAMESPACE);
        let name = scene.operator.name().await?;
        let replicas = async |count: u32| {
            let change = Patch::Merge(json!({"spec": {"replicas": count}}));
            deployments.patch(&name, &PatchParams::default(), &change).await
        };
        let before = deployments.get(&name).await?.spec.and_then(|spec| spec.replicas).unwrap_or(1);
        replicas(0).await?;
        let away = async {
            eventually("no operator runs", PATIENCE, async || {
                scene.operator.pods().await.ok()?.is_empty().then_some(())
            })
            .await?;
            scene.flow(300).await?;
            // One gateway fails meanwhile: Kubernetes starts it again, and it finds its way alone.
            let gateway = scene.world.ready_pods(CLUSTER, "gateway").into_iter().next().ok_or("no gateway is ready")?;
            scene.signal(&gateway, "gateway", Signal::KILL)?;
            scene.flow(300).await
        }
        .await;
        replicas(before.unsigned_abs()).await?;
        scene.operator.wait_rolled_out().await?;
        away?;
        scene.edit(json!({"business": {"replicas": 1}})).await?;
        scene.wait_shards_shared_by(1).await?;
        scene.wait("it is Ready", |world| world.condition_is(CLUSTER, "Ready", ConditionStatus::True)).await
    })
    .await
}
