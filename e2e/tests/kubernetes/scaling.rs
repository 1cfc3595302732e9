//! Applying an ImCluster, and scaling its tiers by hand while people chat.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use im_crds::ConditionStatus;
use im_proto::ids::{direct_conversation, shard_of};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{ConfigMap, Pod, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::json;
use tokio::time::Instant;

use crate::{
    environment::Suite,
    scene::{CLUSTER, PATIENCE, Scene, ensure, scenario},
    support::{TestResult, eventually},
    world::World,
};

/// How long nothing may be written about an ImCluster of which nothing changes.
const QUIET: Duration = Duration::from_secs(30);

#[tokio::test(flavor = "multi_thread")]
async fn an_applied_imcluster_chats_and_leaves_nothing_behind() -> TestResult {
    scenario(Suite::Ci, json!({}), async |scene| {
        scene.flow(300).await?;
        for pod in ["gateway", "business", "store"].into_iter().flat_map(|tier| scene.world.pods(CLUSTER, tier)) {
            let has_token = pod.spec.as_ref().and_then(|spec| spec.automount_service_account_token) != Some(false);
            ensure(!has_token, || format!("{} carries an API token", pod.name_any()))?;
        }
        // The history is complete before the cluster goes.
        scene.check().await?;
        unchanged_is_not_written(scene).await?;
        scene.clusters().delete(CLUSTER, &DeleteParams::foreground()).await?;
        scene.wait("all pods are gone", is_empty).await?;
        eventually("the ImCluster and its children are gone", PATIENCE, async || {
            let gone = scene.clusters().get_opt(CLUSTER).await.ok()?.is_none();
            (gone && versions(scene).await.ok()?.is_empty()).then_some(())
        })
        .await
    })
    .await
}

fn is_empty(world: &World) -> bool {
    ["gateway", "business", "store"].into_iter().all(|tier| world.pods(CLUSTER, tier).is_empty())
}

/// The operator's own count of its writes, all but those of the lease.
const WRITES: &str = "imcluster_kubernetes_writes_total";

/// While nothing happens the operator writes nothing but its lease; what it uses meanwhile is printed.
async fn unchanged_is_not_written(scene: &Scene) -> TestResult {
    let settled = |world: &World| {
        world.condition_is(CLUSTER, "Progressing", ConditionStatus::False) && world.shards_are_shared_by(CLUSTER, 1)
    };
    scene.wait("nothing is under way", settled).await?;
    // Only seen where the nodes are on this machine.
    let leader = scene.operator.process(&scene.operator.leader().await?.pod).ok();
    let usage = || leader.and_then(|leader| leader.usage().ok());
    // Versions tell what changed, the counter also a write that changed nothing. The last messages are still being counted: a
    // change within the first seconds is no surprise.
    let look = async || TestResult::Ok((versions(scene).await?, scene.operator.counter(WRITES).await?));
    let (mut versions, mut writes) = look().await?;
    let mut since = (Instant::now(), usage());
    eventually(&format!("nothing was written for {QUIET:?}"), QUIET * 3, async || {
        let now = look().await.ok()?;
        if now != (versions.clone(), writes) {
            let changed: Vec<_> = now.0.symmetric_difference(&versions).collect();
            let counted = now.1 - writes;
            println!("{counted} writes {:.1?} after the last one: {changed:?}", since.0.elapsed());
            ((versions, writes), since) = (now, (Instant::now(), usage()));
        }
        (since.0.elapsed() >= QUIET).then_some(())
    })
    .await?;
    println!("{writes} writes of the operator so far, none for {:.0?}", since.0.elapsed());
    if let (Some(before), Some(after)) = (since.1, usage()) {
        println!(
            "the leader meanwhile: {:.2} % of a core, {:.1} MiB",
            (after.cpu - before.cpu).as_secs_f64() / since.0.elapsed().as_secs_f64() * 100.0,
            after.resident_bytes as f64 / f64::from(1 << 20)
        );
    }
    Ok(())
}

/// Kind, name and version of everything that the operator made in the scenario's namespace; not what Kubernetes adds to it.
async fn versions(scene: &Scene) -> TestResult<BTreeSet<(String, String, String)>> {
    async fn of<K>(api: Api<K>, kind: &str, found: &mut BTreeSet<(String, String, String)>) -> TestResult
    where
        K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        for object in api.list(&ListParams::default()).await?.items {
            let ours = !["default", "kube-root-ca.crt"].contains(&object.name_any().as_str());
            if ours {
                found.insert((kind.to_owned(), object.name_any(), object.resource_version().unwrap_or_default()));
            }
        }
        Ok(())
    }
    let mut found = BTreeSet::new();
    of(scene.api::<im_crds::ImCluster>(), "ImCluster", &mut found).await?;
    of(scene.api::<im_crds::ShardMap>(), "ShardMap", &mut found).await?;
    of(scene.api::<Deployment>(), "Deployment", &mut found).await?;
    of(scene.api::<StatefulSet>(), "StatefulSet", &mut found).await?;
    of(scene.api::<Service>(), "Service", &mut found).await?;
    of(scene.api::<ConfigMap>(), "ConfigMap", &mut found).await?;
    of(scene.api::<Secret>(), "Secret", &mut found).await?;
    of(scene.api::<ServiceAccount>(), "ServiceAccount", &mut found).await?;
    of(scene.api::<PodDisruptionBudget>(), "PodDisruptionBudget", &mut found).await?;
    of(scene.api::<NetworkPolicy>(), "NetworkPolicy", &mut found).await?;
    of(scene.api::<Pod>(), "Pod", &mut found).await?;
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn business_scales_from_one_to_three_and_back() -> TestResult {
    scenario(Suite::Ci, json!({}), async |scene| {
        let start = Instant::now();
        scene.edit(json!({"business": {"replicas": 3}})).await?;
        scene.wait_shards_shared_by(3).await?;
        println!("shared by 3 after {:.1?}", start.elapsed());
        scene.flow(200).await?;
        let start = Instant::now();
        // Slow enough to watch.
        scene.edit(json!({"business": {"replicas": 1, "rebalance": {"movesInFlight": 1, "movesPerRound": 4}}})).await?;
        let shared = |world: &World| world.shards_are_shared_by(CLUSTER, 1);
        drains_are_told_until(scene, "all shards are with one member", shared).await?;
        println!("shared by 1 after {:.1?}", start.elapsed());
        scene.flow(200).await
    })
    .await
}

/// Waits until that holds, and demands that the status told meanwhile how far the drains are: of each member more and more,
/// of some that a part has gone and how long the rest takes.
async fn drains_are_told_until(scene: &Scene, what: &str, mut done: impl FnMut(&World) -> bool) -> TestResult {
    let mut told: BTreeMap<String, Vec<(u32, Option<u64>)>> = BTreeMap::new();
    let observe = |world: &World| {
        for drain in world.status(CLUSTER).map(|status| status.drains).unwrap_or_default() {
            let of_member = told.entry(drain.member).or_default();
            let now = (drain.percent_done, drain.seconds_left);
            if of_member.last() != Some(&now) {
                of_member.push(now);
            }
        }
        done(world)
    };
    scene.wait(what, observe).await?;
    println!("drains, percent done and seconds left: {told:?}");
    ensure(told.values().all(|told| told.is_sorted_by_key(|(percent, _)| *percent)), || {
        format!("a drain went backwards: {told:?}")
    })?;
    let on_the_way = |told: &(u32, Option<u64>)| matches!(told, (1..=99, Some(1..)));
    let grows = |told: &Vec<(u32, Option<u64>)>| {
        told.iter().any(on_the_way) && told.first().map(|told| told.0) < told.last().map(|told| told.0)
    };
    ensure(told.values().any(grows), || format!("nothing told how far the drains were: {told:?}"))
}

/// Shards in the scenario of the hot one; few, so that each of the others has some load too.
const FEW_SHARDS: u32 = 16;
/// Messages a second from each side of the one loud conversation.
const LOUD_PER_SECOND: u32 = 80;
/// Messages a second of all others meanwhile.
const OTHERS_PER_SECOND: f64 = 20.0;
/// Messages and notifications a second that all members have at least once it is loud: a message of two people counts when it is
/// stored, when it is with each of them, and in their shards. The others make less than a third of it.
const LOUD_LOAD: f64 = 500.0;
/// No member's load is further above the mean when the load is level. If nothing moved it would be more: the loud conversation
/// and both of its people are with one member at first, and so is two thirds of the load.
const LEVEL: f64 = 1.25;

#[tokio::test(flavor = "multi_thread")]
async fn a_hot_shard_and_its_neighbours_part() -> TestResult {
    let spec = json!({"business": {"replicas": 2, "shards": FEW_SHARDS}});
    scenario(Suite::All, spec, async |scene| {
        scene.wait_shards_shared_by(2).await?;
        let owners = scene.world.owners(CLUSTER).ok_or("there is no shard map")?;
        let owner = |key: &str| owners[shard_of(key, FEW_SHARDS) as usize].clone();
        let people: Vec<String> = scene.chat()?.people().iter().map(|person| person.name.clone()).collect();
        let pairs = (0..people.len()).flat_map(|one| (0..one).map(move |other| (one, other)));
        let with_one_member = |(one, other): &(usize, usize)| {
            let conversation = direct_conversation(&people[*one], &people[*other]);
            let owners = [&conversation, &people[*one], &people[*other]].map(|key| owner(key));
            owners.iter().all(|owner| owner.is_some() && *owner == owners[0])
        };
        let (one, other) =
            pairs.into_iter().find(with_one_member).ok_or("no two people have all shards in one place")?;
        let shard = shard_of(&direct_conversation(&people[one], &people[other]), FEW_SHARDS) as usize;
        let neighbours = |world: &World| {
            let owners = world.owners(CLUSTER)?;
            let hot = owners.get(shard)?.clone()?;
            let is_neighbour = |other: &usize| *other != shard && owners[*other].as_deref() == Some(&hot);
            Some((0..owners.len()).filter(is_neighbour).collect::<BTreeSet<usize>>())
        };
        let before = neighbours(&scene.world).ok_or("the loud conversation's shard has no owner")?;

        scene.chat()?.send_at(OTHERS_PER_SECOND, 2);
        let loud = [(one, other), (other, one)].map(|(from, to)| {
            scene.chat().map(|chat| chat.send_to_at(from, format!("u/{}", people[to]), LOUD_PER_SECOND))
        });
        let loads = eventually("the load is loud and level", PATIENCE, async || {
            let (sum, ratio) = business_loads(scene).await.ok()?;
            (sum >= LOUD_LOAD && ratio <= LEVEL).then_some((sum, ratio))
        })
        .await?;
        println!("all load, and the fullest member's beside the mean: {loads:.2?}");
        let after = neighbours(&scene.world).ok_or("the loud conversation's shard has no owner")?;
        println!("the loud conversation's shard {shard} had the neighbours {before:?}, it has {after:?} now");
        // Others may have come: what counts is that it parted from some of those whose load was too much beside its own.
        ensure(!before.is_subset(&after), || "the loud conversation's shard kept its neighbours".to_owned())?;
        drop(loud);
        scene.flow(200).await
    })
    .await
}

/// The business members' load in messages a second, and that of the fullest beside the mean.
async fn business_loads(scene: &Scene) -> TestResult<(f64, f64)> {
    let mut loads = Vec::new();
    for pod in scene.world.ready_pods(CLUSTER, "business") {
        loads.push(scene.gauge(&pod, "im_messages_per_second").await?);
    }
    let (sum, highest) = (loads.iter().sum::<f64>(), loads.iter().copied().fold(0.0, f64::max));
    Ok((sum, highest * loads.len() as f64 / sum.max(1.0)))
}

#[tokio::test(flavor = "multi_thread")]
async fn who_changes_his_mind_during_a_drain_keeps_his_gateways() -> TestResult {
    let autoscaling = |max: u32| json!({"minReplicas": max.min(3), "maxReplicas": max});
    // They could not be empty before the mind is changed.
    let spec = json!({
        "gateway": {
            "replicas": null, "autoscaling": autoscaling(3), "drain": {"notice": "20s"},
            "pod": {"resources": {"requests": {"cpu": "500m"}}},
        },
        "business": {"replicas": 3},
    });
    scenario(Suite::All, spec, async |scene| {
        scene.wait_gateways(3).await?;
        scene.wait_shards_shared_by(3).await?;
        let uids = |world: &World| -> BTreeSet<String> {
            world.pods(CLUSTER, "gateway").iter().filter_map(ResourceExt::uid).collect()
        };
        let before = uids(&scene.world);
        scene.edit(json!({"gateway": {"autoscaling": autoscaling(1)}, "business": {"replicas": 1}})).await?;
        scene.wait("gateways drain", |world| world.serving(CLUSTER).len() < 3).await?;
        let is_draining = |world: &World| world.condition_is(CLUSTER, "Draining", ConditionStatus::True);
        scene.wait("the status says that gateways drain", is_draining).await?;
        scene.edit(json!({"gateway": {"autoscaling": autoscaling(3)}, "business": {"replicas": 3}})).await?;
        scene.wait_gateways(3).await?;
        ensure(uids(&scene.world) == before, || "gateways that drained were replaced instead of kept".to_owned())?;
        scene.wait_shards_shared_by(3).await?;
        scene.flow(200).await?;
        // And now in earnest, slow enough to watch.
        scene.edit(json!({"gateway": {"autoscaling": autoscaling(1), "drain": {"notice": "1s", "rate": 1}}})).await?;
        let one = |world: &World| world.serving(CLUSTER).len() == 1 && world.pods(CLUSTER, "gateway").len() == 1;
        drains_are_told_until(scene, "one gateway is left", one).await
    })
    .await
}
