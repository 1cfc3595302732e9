//! The operator as it is installed: who of its pods leads, what it counts, how its chart is upgraded.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use k8s_openapi::api::{
    apps::v1::Deployment,
    coordination::v1::Lease,
    core::v1::{ConfigMap, Pod},
};
use kube::{
    Api, Client, ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::{process::Command, sync::OnceCell};

use crate::{
    environment::{Environment, Image},
    processes::PodProcess,
    scene::PATIENCE,
    support::{TestResult, eventually},
};

/// The promise: somebody leads again this soon after a leader was killed or stopped.
pub const LED_AGAIN_WITHIN: Duration = Duration::from_secs(15);

/// The chart's release and its namespace.
const RELEASE: &str = "imcluster";
pub const NAMESPACE: &str = "imcluster-system";

/// The operator of a Helm release.
pub struct Operator {
    client: Client,
    environment: Environment,
    /// It is not as [`Self::install`] left it.
    changed: AtomicBool,
}

/// Who leads.
#[derive(Clone, Debug)]
pub struct Leader {
    /// The pod.
    pub pod: Pod,
    /// What the lease says.
    pub holder: String,
}

impl Operator {
    /// Installs the chart, unless it was done by an earlier scenario of this run.
    pub async fn install(client: Client, environment: &Environment) -> TestResult<Self> {
        static INSTALLED: OnceCell<()> = OnceCell::const_new();
        // An earlier run may have ended in the middle of a scenario.
        let operator = Self { client, environment: environment.clone(), changed: AtomicBool::new(true) };
        INSTALLED.get_or_try_init(|| operator.restore()).await?;
        operator.changed.store(false, Ordering::Relaxed);
        Ok(operator)
    }

    /// Puts back what was changed of the installation, if anything was.
    pub async fn restore(&self) -> TestResult {
        if !self.changed.load(Ordering::Relaxed) {
            return Ok(());
        }
        if self.deployment().await.is_ok() {
            self.reach_api_server_by(None).await?;
        }
        self.upgrade(&self.environment.chart, &self.environment.images[0], &[]).await?;
        self.changed.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// What selects its pods.
    pub fn pods_selector(&self) -> ListParams {
        ListParams::default()
            .labels(&format!("app.kubernetes.io/instance={RELEASE},app.kubernetes.io/component=operator"))
    }

    fn pods_api(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Its pods.
    pub async fn pods(&self) -> TestResult<Vec<Pod>> {
        Ok(self.pods_api().list(&self.pods_selector()).await?.items)
    }

    /// Who leads, by the lease.
    pub async fn leader(&self) -> TestResult<Leader> {
        let leases: Api<Lease> = Api::namespaced(self.client.clone(), NAMESPACE);
        let lease = leases.list(&ListParams::default()).await?.items.into_iter().find_map(|lease| lease.spec);
        let lease = lease.ok_or("there is no lease")?;
        let holder = lease.holder_identity.filter(|holder| !holder.is_empty()).ok_or("nobody holds the lease")?;
        let pod = holder.split('/').next().unwrap_or(&holder);
        let pod = self.pods_api().get(pod).await?;
        Ok(Leader { pod, holder })
    }

    /// Waits until somebody leads, and it is not that pod.
    pub async fn wait_other_leader(&self, than: &Leader, deadline: Duration) -> TestResult<Leader> {
        eventually("another pod of the operator leads", deadline, async || {
            self.leader().await.ok().filter(|leader| leader.pod.name_any() != than.pod.name_any())
        })
        .await
    }

    /// Sends a signal to an operator's process.
    pub fn signal(&self, pod: &Pod, signal: Signal) -> TestResult {
        self.process(pod)?.signal(signal)
    }

    /// Deletes an operator's pod without any grace.
    pub async fn delete_without_grace(&self, pod: &Pod) -> TestResult {
        let params = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        self.pods_api().delete(&pod.name_any(), &params).await?;
        Ok(())
    }

    /// An operator's process.
    pub fn process(&self, pod: &Pod) -> TestResult<PodProcess> {
        PodProcess::find(&pod.uid().unwrap_or_default(), "imcluster")
    }

    /// Sum of a counter's series over all of the operator's pods.
    pub async fn counter(&self, name: &str) -> TestResult<f64> {
        let mut sum = 0.0;
        for pod in self.pods().await? {
            let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}:8080/proxy/metrics", pod.name_any());
            let request = hyper::Request::get(path).body(Vec::new())?;
            let text = self.client.request_text(request).await?;
            let values = text.lines().filter(|line| {
                let rest = line.strip_prefix(name);
                rest.is_some_and(|rest| rest.starts_with('{') || rest.starts_with(' '))
            });
            sum += values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>();
        }
        Ok(sum)
    }

    /// `helm upgrade --install` with that image and these arguments; waits until it is rolled out.
    pub async fn upgrade(&self, chart: &Path, image: &Image, arguments: &[String]) -> TestResult {
        let mut all = vec!["upgrade".to_owned(), "--install".to_owned(), RELEASE.to_owned()];
        all.extend([chart.display().to_string(), "--create-namespace".to_owned()]);
        for (name, value) in [("image.repository", &image.repository), ("image.tag", &image.tag)] {
            all.extend(["--set-string".to_owned(), format!("{name}={value}")]);
        }
        all.extend_from_slice(arguments);
        self.helm(&all).await?;
        self.wait_rolled_out().await
    }

    /// `helm uninstall`.
    pub async fn uninstall(&self) -> TestResult {
        self.helm(&["uninstall".to_owned(), RELEASE.to_owned()]).await
    }

    /// Changes the release, and waits until that is done.
    async fn helm(&self, arguments: &[String]) -> TestResult {
        self.changed.store(true, Ordering::Relaxed);
        let mut command = Command::new(&self.environment.helm);
        command.args(arguments).args(["--namespace", NAMESPACE, "--wait", "--timeout", "120s"]).kill_on_drop(true);
        let output = command.output().await?;
        if !output.status.success() {
            return Err(format!("helm {}: {}", arguments[0], String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(())
    }

    /// Has the operator reach the API server by that URL; `None` = directly again.
    pub async fn reach_api_server_by(&self, url: Option<&str>) -> TestResult {
        const NAME: &str = "e2e-kubeconfig";
        const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let deployment = self.deployment().await?;
        let volumes = deployment.spec.iter().filter_map(|spec| spec.template.spec.as_ref()?.volumes.as_ref()).flatten();
        let is_direct = volumes.into_iter().all(|volume| volume.name != NAME);
        let deployment = deployment.name_any();
        self.changed.store(true, Ordering::Relaxed);
        let change = match url {
            None if is_direct => return Ok(()),
            Some(url) => {
                // The pod's own token, so that its rights stay what the chart gave it. The authority is not used, but looked for.
                let kubeconfig = json!({
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": NAME, "cluster": {"server": url, "certificate-authority": format!("{ACCOUNT}/ca.crt")}}],
                    "users": [{"name": NAME, "user": {"tokenFile": format!("{ACCOUNT}/token")}}],
                    "contexts": [{"name": NAME, "context": {"cluster": NAME, "user": NAME}}],
                    "current-context": NAME,
                });
                let maps: Api<ConfigMap> = Api::namespaced(self.client.clone(), NAMESPACE);
                let map = json!({
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": NAME},
                    "data": {"config": kubeconfig.to_string()},
                });
                maps.patch(NAME, &PatchParams::apply("e2e").force(), &Patch::Apply(&map)).await?;
                json!({
                    "containers": [{
                        "name": "operator",
                        "env": [{"name": "KUBECONFIG", "value": "/e2e/config"}],
                        "volumeMounts": [{"name": NAME, "mountPath": "/e2e"}],
                    }],
                    "volumes": [{"name": NAME, "configMap": {"name": NAME}}],
                })
            }
            None => json!({
                "containers": [{
                    "name": "operator",
                    "env": [{"name": "KUBECONFIG", "$patch": "delete"}],
                    "volumeMounts": [{"mountPath": "/e2e", "$patch": "delete"}],
                }],
                "volumes": [{"name": NAME, "$patch": "delete"}],
            }),
        };
        let change: Value = json!({"spec": {"template": {"spec": change}}});
        deployments.patch(&deployment, &PatchParams::default(), &Patch::Strategic(change)).await?;
        self.wait_rolled_out().await
    }

    /// Name of its Deployment.
    pub async fn name(&self) -> TestResult<String> {
        Ok(self.deployment().await?.name_any())
    }

    async fn deployment(&self) -> TestResult<Deployment> {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let found = deployments.list(&self.pods_selector()).await?.items.into_iter().next();
        Ok(found.ok_or("the operator's Deployment is not there")?)
    }

    /// Waits until all of its pods are of the latest template and ready, and one of them leads.
    pub async fn wait_rolled_out(&self) -> TestResult {
        eventually("the operator is rolled out and led", PATIENCE, async || {
            let deployment = self.deployment().await.ok()?;
            let (spec, status) = (deployment.spec?, deployment.status?);
            let wanted = spec.replicas?;
            let current = status.observed_generation >= deployment.metadata.generation;
            let counts = [status.replicas, status.updated_replicas, status.ready_replicas];
            let complete = current && counts.into_iter().all(|count| count == Some(wanted));
            (complete && self.leader().await.is_ok()).then_some(())
        })
        .await
    }
}
