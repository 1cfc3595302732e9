//! Another build is rolled out, and the chart is upgraded, under load.

use std::{fs, path::Path};

use k8s_openapi::{
    api::{networking::v1::NetworkPolicy, rbac::v1::ClusterRole},
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, CustomResourceExt, api::ListParams};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::{
    environment::Suite,
    operator,
    scene::{CLUSTER, PATIENCE, Scene, ensure, merge, scenario},
    support::{TestResult, eventually},
    world::World,
};

/// All pods of a tier run that image, and of a tier with Deployments there is only one.
fn runs_only(world: &World, tier: &str, image: &str) -> bool {
    let of_pod = |pod: &k8s_openapi::api::core::v1::Pod| {
        pod.spec.iter().flat_map(|spec| &spec.containers).all(|container| container.image.as_deref() == Some(image))
    };
    let pods = world.pods(CLUSTER, tier);
    let deployments = if tier == "store" { 0 } else { 1 };
    !pods.is_empty() && pods.iter().all(of_pod) && world.deployments(CLUSTER, tier).len() == deployments
}

async fn wait_rolled_out(scene: &Scene, image: &str, members: usize) -> TestResult {
    let start = Instant::now();
    let tiers = ["gateway", "business", "store"];
    let everywhere = |world: &World| tiers.into_iter().all(|tier| runs_only(world, tier, image));
    scene.wait(&format!("all members run {image}"), everywhere).await?;
    scene.wait_gateways(members).await?;
    scene.wait_shards_shared_by(members).await?;
    println!("rolled out to {image} after {:.1?}", start.elapsed());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn another_build_is_rolled_out_and_back() -> TestResult {
    scenario(Suite::Ci, json!({"gateway": {"replicas": 2}, "business": {"replicas": 2}}), async |scene| {
        let [first, second] = scene.environment.images.clone();
        for image in [second, first].map(|image| image.name()) {
            scene.edit(json!({ "image": image })).await?;
            wait_rolled_out(scene, &image, 2).await?;
            scene.flow(200).await?;
        }
        Ok(())
    })
    .await
}

/// A field that the upgraded CustomResourceDefinition has and the installed one has not.
const NEW_FIELD: &str = "e2eNewField";

#[tokio::test(flavor = "multi_thread")]
async fn the_chart_is_upgraded_with_a_changed_definition() -> TestResult {
    scenario(Suite::Ci, json!({}), async |scene| {
        let directory = std::env::temp_dir().join(&scene.namespace);
        copy(&scene.environment.chart, &directory)?;
        let file = directory.join("files/crds/imclusters.yaml");
        let mut definition: Value = serde_norway::from_str(&fs::read_to_string(&file)?)?;
        let properties = "/spec/versions/0/schema/openAPIV3Schema/properties/status/properties";
        let properties = definition.pointer_mut(properties).ok_or("the definition describes no status")?;
        merge(properties, json!({ NEW_FIELD: {"type": "string"} }));
        fs::write(&file, serde_norway::to_string(&definition)?)?;

        let [first, second] = scene.environment.images.clone();
        scene.operator.upgrade(&directory, &second, &[]).await?;
        ensure(definition_has_new_field(scene).await?, || "helm upgrade left the definition as it was".to_owned())?;
        // The clusters get the operator's image, as theirs says none.
        wait_rolled_out(scene, &second.name(), 1).await?;
        scene.flow(200).await?;
        scene.operator.restore().await?;
        ensure(!definition_has_new_field(scene).await?, || "the definition was not brought back".to_owned())?;
        wait_rolled_out(scene, &first.name(), 1).await?;
        fs::remove_dir_all(&directory)?;
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn people_chat_on_while_the_operator_is_uninstalled_and_put_into_one_namespace() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        scene.operator.uninstall().await?;
        eventually("no operator runs", PATIENCE, async || scene.operator.pods().await.ok()?.is_empty().then_some(()))
            .await?;
        for name in [im_crds::ImCluster::crd_name(), im_crds::ShardMap::crd_name()] {
            ensure(definitions(scene).get_opt(name).await?.is_some(), || format!("{name} went with the chart"))?;
        }
        scene.flow(200).await?;
        ensure(scene.world.cluster(CLUSTER).is_some(), || "the ImCluster went with the chart".to_owned())?;

        // The values that CI renders, for this namespace, without what needs the Prometheus operator.
        let chart = &scene.environment.chart;
        let [image, _] = &scene.environment.images;
        let arguments = [
            format!("--values={}", chart.join("ci/namespaced-values.yaml").display()),
            format!("--set-string=watchNamespace={}", scene.namespace),
            "--set=monitoring.podMonitor.enabled=false".to_owned(),
        ];
        scene.operator.upgrade(chart, image, &arguments).await?;
        let of_release = ListParams::default().labels("app.kubernetes.io/instance=imcluster");
        let cluster_wide = Api::<ClusterRole>::all(scene.client.clone()).list(&of_release).await?.items;
        ensure(cluster_wide.is_empty(), || format!("rights in all namespaces: {cluster_wide:?}"))?;
        let policies: Api<NetworkPolicy> = Api::namespaced(scene.client.clone(), operator::NAMESPACE);
        ensure(!policies.list(&of_release).await?.items.is_empty(), || "there is no NetworkPolicy".to_owned())?;
        scene.edit(json!({"business": {"replicas": 2}})).await?;
        scene.wait_shards_shared_by(2).await?;
        scene.flow(200).await?;

        // The whole chart takes the definitions over again that it left.
        scene.operator.restore().await?;
        scene.edit(json!({"business": {"replicas": 1}})).await?;
        scene.wait_shards_shared_by(1).await?;
        scene.flow(100).await
    })
    .await
}

fn definitions(scene: &Scene) -> Api<CustomResourceDefinition> {
    Api::all(scene.client.clone())
}

async fn definition_has_new_field(scene: &Scene) -> TestResult<bool> {
    let definition = definitions(scene).get(im_crds::ImCluster::crd_name()).await?;
    Ok(serde_json::to_string(&definition.spec)?.contains(NEW_FIELD))
}

fn copy(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let (source, target) = (entry?.path(), to.to_owned());
        let Some(name) = source.file_name() else { continue };
        if source.is_dir() {
            copy(&source, &target.join(name))?;
        } else {
            fs::copy(&source, target.join(name))?;
        }
    }
    Ok(())
}
