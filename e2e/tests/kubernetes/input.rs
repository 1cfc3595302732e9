//! What users get wrong, and what they may ask for: recommendations, approval, pause, deletion.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    process::Stdio,
    time::Duration,
};

use im_crds::{ConditionStatus, ProposalStatus};
use k8s_openapi::api::{
    core::v1::{Event, Secret},
    events::v1,
};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams, PostParams},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::Command,
    time::timeout,
};

use crate::{
    environment::Suite,
    scene::{CLUSTER, PATIENCE, Scene, ensure, prepared_scenario, scenario},
    support::{Access, TestResult, eventually},
    world::World,
};

/// How long nothing may happen that was not asked for.
const NOTHING_FOR: Duration = Duration::from_secs(10);
/// The annotation that approves what is proposed.
const APPROVE: &str = "imcluster.dev/approve";

fn business_pods(world: &World) -> usize {
    world.pods(CLUSTER, "business").len()
}

/// Texts of all events of the scenario's namespace, of the old and the new API alike.
async fn events(scene: &Scene) -> TestResult<Vec<String>> {
    let old = scene.api::<Event>().list(&ListParams::default()).await?.items;
    let new = scene.api::<v1::Event>().list(&ListParams::default()).await?.items;
    let texts = old.into_iter().map(|event| event.message).chain(new.into_iter().map(|event| event.note));
    Ok(texts.flatten().collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recommended_waits_for_approval() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        scene.edit(json!({"mode": "Recommend", "business": {"replicas": 2}})).await?;
        let proposals = |world: &World| world.status(CLUSTER).map(|status| status.proposals).unwrap_or_default();
        scene.wait("something is proposed", |world| !proposals(world).is_empty()).await?;
        println!("proposed: {:?}", proposals(&scene.world));
        scene.world.hold("nothing happens without approval", NOTHING_FOR, |world| business_pods(world) == 1).await?;

        scene.annotate(APPROVE, "0123456789abcdef").await?;
        eventually("the approval of another plan is called stale", PATIENCE, async || {
            let status = scene.world.cluster(CLUSTER)?.data["status"].to_string();
            let told = events(scene).await.ok()?.into_iter().chain([status]);
            told.into_iter().any(|text| text.contains("0123456789abcdef")).then_some(())
        })
        .await?;
        scene.world.hold("nothing happens on a stale approval", NOTHING_FOR, |world| business_pods(world) == 1).await?;

        let runs = |world: &World| world.ready_pods(CLUSTER, "business").len() == 2;
        approve_until(scene, "business: 2 members", "a second business member runs", runs).await?;
        let unmoved = |world: &World| world.shares(CLUSTER).is_some_and(|shares| shares.len() == 1);
        scene.world.hold("moves wait for an approval of their own", NOTHING_FOR, unmoved).await?;
        let shared = |world: &World| world.shards_are_shared_by(CLUSTER, 2);
        approve_until(scene, "shards move", "the shards are shared", shared).await?;
        scene.flow(100).await
    })
    .await
}

/// Approves what is shown in these words, and what is shown instead of it when the load has changed it meanwhile.
async fn approve_until(scene: &Scene, words: &str, what: &str, mut reached: impl FnMut(&World) -> bool) -> TestResult {
    let mut approved = String::new();
    eventually(what, PATIENCE, async || {
        if reached(&scene.world) {
            return Some(Ok(()));
        }
        let proposals = scene.world.status(CLUSTER)?.proposals;
        let fresh = |proposal: &ProposalStatus| proposal.hash != approved && proposal.what.contains(words);
        approved = proposals.into_iter().find(fresh)?.hash;
        scene.annotate(APPROVE, &approved).await.err().map(Err)
    })
    .await?
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_imcluster_stays_as_it_is_and_can_be_deleted() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        scene.edit(json!({"paused": true})).await?;
        scene.edit(json!({"business": {"replicas": 3}})).await?;
        // The status is about what was just written: `condition` compares the generations.
        scene.wait("the status is current", |world| world.condition(CLUSTER, "Ready").is_some()).await?;
        scene.world.hold("nothing is started while paused", NOTHING_FOR, |world| business_pods(world) == 1).await?;
        let gateway = scene.world.ready_pods(CLUSTER, "gateway").into_iter().next().ok_or("no gateway is ready")?;
        scene.delete_without_grace(&gateway).await?;
        let says_none = |world: &World| world.status(CLUSTER).is_some_and(|status| status.gateway.ready == 0);
        scene.wait("the status says that no gateway is ready", says_none).await?;
        scene.wait("the gateway is back", |world| world.ready_pods(CLUSTER, "gateway").len() == 1).await?;
        let is_ready = |world: &World| world.condition_is(CLUSTER, "Ready", ConditionStatus::True);
        scene.wait("the status says that the gateway is back", is_ready).await?;
        scene.flow(100).await?;
        scene.check().await?;
        scene.clusters().delete(CLUSTER, &DeleteParams::background()).await?;
        scene.wait("a paused ImCluster goes when it is deleted", |world| business_pods(world) == 0).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_in_words_that_help() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        let metric = |name: &str| {
            json!([{"type": "BuiltIn", "builtIn": {"name": name, "target": {"type": "AverageValue", "value": 1}}}])
        };
        let nonsense: [(Value, &str); 5] = [
            (
                json!({"gateway": {"replicas": null, "autoscaling": {"minReplicas": 3, "maxReplicas": 2}}}),
                "minReplicas must not be above maxReplicas",
            ),
            (json!({"business": {"shards": 128}}), "shards can't change"),
            (
                json!({"gateway": {"replicas": null, "autoscaling": {"maxReplicas": 2, "metrics": metric("Mood")}}}),
                "supported values",
            ),
            (json!({"auth": {"jwt": {"jwksFile": "/a"}}}), "set exactly one of"),
            (json!({"gateway": {"drain": {"notice": "soon"}}}), "notice"),
        ];
        for (change, words) in nonsense {
            match scene.edit(change.clone()).await {
                Err(kube::Error::Api(status)) if status.message.contains(words) => println!("{}", status.message),
                other => return Err(format!("{change} should be refused with `{words}`: {other:?}").into()),
            }
        }
        scene.flow(50).await
    })
    .await
}

/// The schema's pattern admits it, and no length of time is that long.
const POISON: &str = "999999999999d";

#[tokio::test(flavor = "multi_thread")]
async fn who_is_unreadable_or_incomplete_stops_nobody_else() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        scene.apply(&scene.imcluster("poison", json!({"gateway": {"drain": {"deadline": POISON}}}))).await?;
        let of_secret = json!({"insecure": null, "jwt": {"keysSecret": {"name": "keys", "key": "hmac"}}});
        scene.apply(&scene.imcluster("incomplete", json!({ "auth": of_secret }))).await?;
        let says = |world: &World, cluster: &str, words: &str| {
            let status = world.cluster(cluster).map(|object| object.data["status"]["conditions"].to_string());
            status.is_some_and(|conditions| conditions.contains(words))
        };
        scene.wait("the poison object is reported on itself", |world| says(world, "poison", POISON)).await?;
        scene.wait("the missing Secret is named", |world| says(world, "incomplete", "keys")).await?;
        ensure(!scene.world.condition_is("incomplete", "Ready", ConditionStatus::True), || {
            "an ImCluster without its keys says that it is Ready".to_owned()
        })?;

        scene.edit(json!({"business": {"replicas": 2}})).await?;
        scene.wait_shards_shared_by(2).await?;
        scene.flow(50).await?;

        let secret: Secret = serde_json::from_value(json!({
            "metadata": {"name": "keys"},
            "stringData": {"hmac": "a secret of enough length for HS256, which wants 32 bytes"},
        }))?;
        scene.api::<Secret>().create(&PostParams::default(), &secret).await?;
        scene
            .wait("it is Ready with its Secret", |world| {
                world.condition_is("incomplete", "Ready", ConditionStatus::True)
            })
            .await?;
        for name in ["poison", "incomplete"] {
            scene.clusters().delete(name, &DeleteParams::background()).await?;
        }
        scene
            .wait("both are gone", |world| ["poison", "incomplete"].iter().all(|name| world.cluster(name).is_none()))
            .await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_refused_with_the_name_of_the_secret_field() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        let auth = json!({"insecure": null, "jwt": {"jwksFile": "/etc/im/jwks.json"}});
        scene.apply(&scene.imcluster("files", json!({ "auth": auth }))).await?;
        let told = |world: &World| {
            let status = world.cluster("files").map(|object| object.data["status"]["conditions"].to_string());
            status.is_some_and(|conditions| conditions.contains("jwksSecret"))
        };
        scene.wait("the condition names the field to use", told).await?;
        ensure(scene.world.pods("files", "gateway").is_empty(), || {
            let pods: Vec<String> = scene.world.pods("files", "gateway").iter().map(ResourceExt::name_any).collect();
            format!("gateways run without their keys: {pods:?}")
        })
    })
    .await
}

/// The README's last commands, as they are written there but for the namespace and the ports of this machine.
#[tokio::test(flavor = "multi_thread")]
async fn the_example_of_the_readme_chats() -> TestResult {
    prepared_scenario(Suite::Ci, async |scene| {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/chat.yaml");
        kubectl(scene, &["apply", "-f", file]).await?;
        kubectl(scene, &["wait", "imc/chat", "--for=condition=Ready", "--timeout=3m"]).await?;
        let mut forward = kubectl_command(scene, &["port-forward", "service/chat", ":1883", ":8080"])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let mut lines = BufReader::new(forward.stdout.take().ok_or("no output")?).lines();
        let mut port_to = BTreeMap::new();
        while port_to.len() < 2 {
            // `Forwarding from 127.0.0.1:40123 -> 1883`, and the same of the other address family.
            let line = timeout(PATIENCE, lines.next_line()).await??.ok_or("kubectl port-forward ended")?;
            if let Some((from, to)) =
                line.strip_prefix("Forwarding from 127.0.0.1:").and_then(|on| on.split_once(" -> "))
            {
                port_to.insert(to.to_owned(), SocketAddr::from((Ipv4Addr::LOCALHOST, from.parse()?)));
            }
        }
        let port = |to: &str| port_to.get(to).copied().ok_or_else(|| format!("{to} is not forwarded: {port_to:?}"));
        scene.let_people_chat(Access { mqtt: port("1883")?, http: port("8080")? }).await?;
        scene.flow(300).await?;
        // While the ports are still forwarded.
        scene.check().await
    })
    .await
}

fn kubectl_command(scene: &Scene, arguments: &[&str]) -> Command {
    let mut command = Command::new("kubectl");
    command.arg("--namespace").arg(&scene.namespace).args(arguments);
    command
}

async fn kubectl(scene: &Scene, arguments: &[&str]) -> TestResult {
    let output = kubectl_command(scene, arguments).output().await?;
    ensure(output.status.success(), || format!("kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)))
}
