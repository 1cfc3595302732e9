//! Pods of an ImCluster are killed, deleted and evicted.

use kube::ResourceExt;
use rustix::process::Signal;
use serde_json::json;

use crate::{
    environment::Suite,
    scene::{CLUSTER, ensure, scenario, scenario_beside_nodes},
    support::TestResult,
};

#[tokio::test(flavor = "multi_thread")]
async fn an_owner_is_killed_while_its_shards_move() -> TestResult {
    // Two at a time: the moves take long enough to be in the middle of them.
    let spec = json!({"business": {"rebalance": {"movesInFlight": 2}}});
    scenario_beside_nodes(Suite::Ci, spec, async |scene| {
        let owner =
            scene.world.ready_pods(CLUSTER, "business").into_iter().next().ok_or("no business member is ready")?;
        scene.edit(json!({"business": {"replicas": 3}})).await?;
        let has_given = |world: &crate::world::World| {
            world.shares(CLUSTER).is_some_and(|shares| shares.len() > 1)
                || world.status(CLUSTER).is_some_and(|status| status.shards.moving > 0)
        };
        scene.wait("shards move", has_given).await?;
        scene.signal(&owner, "business", Signal::KILL)?;
        scene.flow(300).await?;
        scene.wait_shards_shared_by(3).await?;
        scene.flow(100).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_and_the_store_end_without_grace() -> TestResult {
    scenario(Suite::All, json!({"gateway": {"replicas": 2}, "business": {"replicas": 2}}), async |scene| {
        scene.wait_gateways(2).await?;
        for tier in ["gateway", "store", "business"] {
            let pod = scene.world.ready_pods(CLUSTER, tier).into_iter().next().ok_or("no pod is ready")?;
            scene.delete_without_grace(&pod).await?;
            scene
                .wait("the pod is replaced", |world| {
                    let pods = world.ready_pods(CLUSTER, tier);
                    !pods.is_empty() && pods.iter().all(|other| other.uid() != pod.uid())
                })
                .await?;
            scene.flow(300).await?;
        }
        scene.wait_gateways(2).await?;
        scene.wait_shards_shared_by(2).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn evictions_go_one_by_one_and_lose_nothing() -> TestResult {
    scenario(Suite::All, json!({"gateway": {"replicas": 2}, "business": {"replicas": 2}}), async |scene| {
        scene.wait_gateways(2).await?;
        scene.wait_shards_shared_by(2).await?;
        for tier in ["gateway", "business"] {
            scene.wait_disruption_allowed(tier).await?;
            let [first, second] = <[_; 2]>::try_from(scene.world.ready_pods(CLUSTER, tier))
                .map_err(|pods| format!("{} {tier} pods are ready instead of two", pods.len()))?;
            ensure(scene.evict(&first).await?, || format!("{} may not be evicted", first.name_any()))?;
            ensure(!scene.evict(&second).await?, || format!("two {tier} pods may be evicted at once"))?;
            scene
                .wait("the evicted pod is replaced", |world| {
                    let pods = world.pods(CLUSTER, tier);
                    pods.len() == 2 && pods.iter().all(|pod| crate::world::is_ready(pod) && pod.uid() != first.uid())
                })
                .await?;
            scene.flow(200).await?;
        }
        scene.wait_gateways(2).await?;
        scene.wait_shards_shared_by(2).await
    })
    .await
}
