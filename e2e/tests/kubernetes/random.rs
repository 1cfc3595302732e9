//! Random operations by users and by fate, while the API server answers the operator with conflicts, errors and silence.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use rustix::process::Signal;
use serde_json::json;
use tokio::time::Instant;

use crate::{
    environment::{Image, Suite},
    proxy::FaultProxy,
    scene::{CLUSTER, Scene, scenario_beside_nodes},
    support::TestResult,
};

/// Operations, by suite.
const OPERATIONS_CI: usize = 20;
const OPERATIONS_ALL: usize = 200;
/// A container that ends more often is started again only after a long time; its pod is deleted instead.
const RESTARTS_MAX: i32 = 1;
/// Messages that are acknowledged between two operations, at most.
const MESSAGES_BETWEEN_MAX: u64 = 200;

/// What happens next.
#[derive(Clone, Debug)]
enum Operation {
    /// The number of members of a tier is edited.
    Scale(&'static str, u32),
    /// A member's process is killed.
    Kill(&'static str),
    /// A pod is deleted, with or without grace.
    Delete(&'static str, bool),
    /// Somebody asks for a pod's eviction.
    Evict(&'static str),
    /// The operator's leader is deleted without grace.
    DeleteLeader,
    /// The other build is rolled out, or the first one again.
    RollOut,
    /// The speed of moves and drains is edited.
    Tune(u32),
    /// Everything is paused, until the next operation.
    Pause,
}

impl Operation {
    fn draw(rng: &mut impl Rng) -> Self {
        let tier = ["gateway", "business"].choose(rng).copied().unwrap_or("gateway");
        match rng.random_range(0..100) {
            0..30 => Self::Scale(tier, rng.random_range(1..=3)),
            30..50 => Self::Kill(tier),
            50..55 => Self::Kill("store"),
            55..70 => Self::Delete(tier, rng.random_bool(0.5)),
            70..80 => Self::Evict(tier),
            80..84 => Self::DeleteLeader,
            84..88 => Self::RollOut,
            88..95 => Self::Tune(rng.random_range(1..=16)),
            _ => Self::Pause,
        }
    }

    async fn run(&self, scene: &Scene, rng: &mut impl Rng) -> TestResult {
        match *self {
            Self::Scale(tier, replicas) => scene.edit(json!({ tier: {"replicas": replicas} })).await.map(drop)?,
            Self::Kill(tier) => {
                let Some(pod) = any_pod(scene, tier, rng) else { return Ok(()) };
                if restarts(&pod) > RESTARTS_MAX {
                    return gone_is_fine(scene.delete_without_grace(&pod).await);
                }
                // Between the look and the deed it may have ended by itself.
                if let Err(error) = scene.signal(&pod, tier, Signal::KILL) {
                    println!("  {error}");
                }
            }
            Self::Delete(tier, with_grace) => {
                let Some(pod) = any_pod(scene, tier, rng) else { return Ok(()) };
                if with_grace {
                    let deleted = scene.api::<Pod>().delete(&pod.name_any(), &Default::default()).await;
                    gone_is_fine(deleted.map(drop).map_err(Into::into))?;
                } else {
                    gone_is_fine(scene.delete_without_grace(&pod).await)?;
                }
            }
            Self::Evict(tier) => {
                let Some(pod) = any_pod(scene, tier, rng) else { return Ok(()) };
                gone_is_fine(scene.evict(&pod).await.map(drop))?;
            }
            Self::DeleteLeader => match scene.operator.leader().await {
                Ok(leader) => gone_is_fine(scene.operator.delete_without_grace(&leader.pod).await)?,
                Err(error) => println!("  {error}"),
            },
            Self::RollOut => {
                let image = scene.environment.images.choose(rng).map(Image::name);
                scene.edit(json!({ "image": image })).await?;
            }
            Self::Tune(speed) => {
                let drain = json!({"rate": speed * 10, "notice": format!("{}ms", speed * 100)});
                let rebalance = json!({"movesInFlight": speed});
                scene.edit(json!({"gateway": {"drain": drain}, "business": {"rebalance": rebalance}})).await?;
            }
            Self::Pause => scene.edit(json!({"paused": true})).await.map(drop)?,
        }
        Ok(())
    }
}

fn any_pod(scene: &Scene, tier: &str, rng: &mut impl Rng) -> Option<Pod> {
    scene.world.ready_pods(CLUSTER, tier).choose(rng).cloned()
}

fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
    statuses.iter().map(|status| status.restart_count).sum()
}

/// Somebody else may have been faster.
fn gone_is_fine(result: TestResult) -> TestResult {
    match result {
        Err(error) if matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if status.code == 404) => Ok(()),
        other => other,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_operations_lose_nothing() -> TestResult {
    let seed = match std::env::var("E2E_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => rand::random(),
    };
    scenario_beside_nodes(Suite::Ci, json!({"gateway": {"replicas": 2}, "business": {"replicas": 2}}), async |scene| {
        println!("E2E_SEED={seed} repeats these operations");
        let proxy = FaultProxy::start(scene.node_address().await?, seed).await?;
        let done = async {
            scene.operator.reach_api_server_by(Some(&proxy.url)).await?;
            storm(scene, seed).await
        }
        .await;
        let (requests, faults) = proxy.counts.injected();
        println!("{faults} of {requests} requests of the operator went wrong: {:?}", proxy.counts);
        // The last part is about what is right again once the API server is.
        scene.operator.restore().await?;
        done?;
        if faults == 0 {
            return Err("no fault was injected: nothing was tested".into());
        }
        scene.edit(json!({"paused": false, "gateway": {"replicas": 2}, "business": {"replicas": 2}})).await?;
        let start = Instant::now();
        scene.wait_gateways(2).await?;
        scene.wait_shards_shared_by(2).await?;
        println!("all is as asked {:.1?} after the last operation", start.elapsed());
        scene.flow(100).await
    })
    .await
}

async fn storm(scene: &Scene, seed: u64) -> TestResult {
    let mut rng = StdRng::seed_from_u64(seed);
    let operations = if scene.environment.suite == Suite::Ci { OPERATIONS_CI } else { OPERATIONS_ALL };
    let start = Instant::now();
    for number in 1..=operations {
        let operation = Operation::draw(&mut rng);
        println!("{number:3} {:5.1} s {operation:?}", start.elapsed().as_secs_f64());
        operation.run(scene, &mut rng).await?;
        scene.flow(rng.random_range(1..=MESSAGES_BETWEEN_MAX)).await?;
        if matches!(operation, Operation::Pause) {
            scene.edit(json!({"paused": false})).await?;
        }
    }
    println!("{operations} operations took {:.0?}", Duration::from_secs(start.elapsed().as_secs()));
    Ok(())
}
