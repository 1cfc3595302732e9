//! What runs beside us in the cluster, PostgreSQL and Prometheus (`e2e/cluster/manifests`): it goes away and comes back.

use k8s_openapi::api::{
    apps::v1::StatefulSet,
    core::v1::{PersistentVolumeClaim, Pod},
};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{
    scene::{PATIENCE, Scene},
    support::{TestResult, eventually},
    world::is_ready,
};

const NAMESPACE: &str = "e2e-dependencies";

/// How it comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Data {
    Kept,
    Lost,
}

/// A StatefulSet of one pod.
pub struct Dependency {
    name: &'static str,
    sets: Api<StatefulSet>,
    pods: Api<Pod>,
    claims: Api<PersistentVolumeClaim>,
}

impl Dependency {
    /// The one of that name.
    pub fn of(scene: &Scene, name: &'static str) -> Self {
        let client = || scene.client.clone();
        Self {
            name,
            sets: Api::namespaced(client(), NAMESPACE),
            pods: Api::namespaced(client(), NAMESPACE),
            claims: Api::namespaced(client(), NAMESPACE),
        }
    }

    fn pod_name(&self) -> String {
        format!("{}-0", self.name)
    }

    async fn scale(&self, replicas: u32) -> TestResult {
        let change = Patch::Merge(json!({"spec": {"replicas": replicas}}));
        self.sets.patch(self.name, &PatchParams::default(), &change).await?;
        Ok(())
    }

    /// Its pod is gone, until [`Self::start`].
    pub async fn stop(&self) -> TestResult {
        self.scale(0).await?;
        eventually(&format!("{} is gone", self.name), PATIENCE, async || {
            self.pods.get_opt(&self.pod_name()).await.ok()?.is_none().then_some(())
        })
        .await
    }

    /// Its pod is back.
    pub async fn start(&self, data: Data) -> TestResult {
        if data == Data::Lost {
            let claim = format!("data-{}", self.pod_name());
            let uid = self.claims.get(&claim).await?.uid();
            self.claims.delete(&claim, &DeleteParams::default()).await?;
            eventually("the old data is gone", PATIENCE, async || {
                let now = self.claims.get_opt(&claim).await.ok()?;
                now.is_none_or(|now| now.uid() != uid).then_some(())
            })
            .await?;
        }
        self.scale(1).await?;
        self.wait_ready(None).await
    }

    /// Its pod dies without grace, and another comes up with its data.
    pub async fn crash(&self) -> TestResult {
        let lost = self.pods.get(&self.pod_name()).await?;
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods.delete(&self.pod_name(), &at_once).await?;
        self.wait_ready(lost.uid()).await
    }

    async fn wait_ready(&self, but_not: Option<String>) -> TestResult {
        eventually(&format!("{} is back", self.name), PATIENCE, async || {
            let pod = self.pods.get_opt(&self.pod_name()).await.ok()??;
            (is_ready(&pod) && pod.uid() != but_not).then_some(())
        })
        .await
    }
}
