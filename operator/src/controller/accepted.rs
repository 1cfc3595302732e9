//! An ImCluster that can run on Kubernetes, and what its children are called.

use super::secrets::SecretValues;
use crate::control::ClusterKey;
use crate::platform::{Role, Tier};
use im_crds::{ImCluster, Place, Violation};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use serde_json::json;
use std::collections::BTreeMap;

/// Label: name of the ImCluster that an object belongs to.
pub const CLUSTER_LABEL: &str = "imcluster.dev/cluster";
/// Label: what a pod is for: gateway, business or store.
pub const TIER_LABEL: &str = "imcluster.dev/tier";
/// Label: digest of all that a member is configured with.
pub const TEMPLATE_LABEL: &str = "imcluster.dev/template";
/// Label of a gateway's pod: `true` while new connections may come.
pub const SERVING_LABEL: &str = "imcluster.dev/serving";
/// Annotation: term of the leader that wrote an object last.
pub const TERM_ANNOTATION: &str = "imcluster.dev/term";
/// Who all objects say they are managed by; also the field manager of server-side apply.
pub const MANAGER: &str = "imcluster-operator";
/// What the operator's watches select.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=imcluster-operator";

/// An ImCluster that breaks no rule and has all that the API server gives an object.
#[derive(Clone, Debug)]
pub struct Accepted {
    cluster: ImCluster,
    namespace: String,
    name: String,
    owner: OwnerReference,
    secrets: SecretValues,
}

impl Accepted {
    /// Checks every rule, those of Kubernetes included.
    ///
    /// # Errors
    /// All rules that are broken.
    pub fn new(cluster: &ImCluster) -> Result<Self, Vec<Violation>> {
        let mut violations = cluster.validate();
        violations.extend(cluster.validate_at(Place::Kubernetes));
        if !violations.is_empty() {
            return Err(violations);
        }
        let meta = &cluster.metadata;
        match (meta.namespace.clone(), meta.name.clone(), cluster.controller_owner_ref(&())) {
            (Some(namespace), Some(name), Some(owner)) => {
                Ok(Self { cluster: cluster.clone(), namespace, name, owner, secrets: SecretValues::default() })
            }
            _ => Err(vec![Violation {
                path: "metadata".to_owned(),
                reason: "has no namespace, name or uid: the API server gives them to every object".to_owned(),
            }]),
        }
    }

    /// What stands for an ImCluster whose spec can't be used: little more than its name is known.
    ///
    /// # Errors
    /// What the API server did not give it.
    pub fn stand_in(meta: &ObjectMeta, shards: u32) -> Result<Self, Vec<Violation>> {
        let spec = json!({ "auth": { "insecure": {} }, "business": { "shards": shards } });
        let unusable = |error: serde_json::Error| Violation { path: "spec".to_owned(), reason: error.to_string() };
        let spec = serde_json::from_value(spec).map_err(|error| vec![unusable(error)])?;
        Self::new(&ImCluster { metadata: meta.clone(), spec, status: None })
    }

    /// The same as it runs, with so many members: nobody is started, replaced or told to go.
    pub fn as_it_runs(mut self, gateways: u32, business: u32) -> Self {
        let spec = &mut self.cluster.spec;
        spec.paused = true;
        (spec.gateway.autoscaling, spec.gateway.replicas) = (None, Some(gateways));
        (spec.business.autoscaling, spec.business.replicas) = (None, Some(business));
        self
    }

    /// The object.
    pub fn cluster(&self) -> &ImCluster {
        &self.cluster
    }

    /// The same with what its Secrets hold.
    pub fn with_secrets(self, secrets: SecretValues) -> Self {
        Self { secrets, ..self }
    }

    /// What its Secrets held when they were read last.
    pub fn secrets(&self) -> &SecretValues {
        &self.secrets
    }

    /// Its namespace, where all children live too.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How control and members call it.
    pub fn key(&self) -> ClusterKey {
        ClusterKey::of(&self.cluster)
    }

    /// What makes an object go when this one goes.
    pub fn owner(&self) -> &OwnerReference {
        &self.owner
    }

    /// Name of a child; `suffix` has no `-`, so that children of two clusters never have one name, except for those
    /// that have no suffix.
    pub fn child(&self, suffix: &str) -> String {
        format!("{}-{suffix}", self.name)
    }

    /// Name of the Deployment, and of the ConfigMap, of that tier's members of one template.
    pub fn of_template(&self, tier: Tier, template: &str) -> String {
        format!("{}-{tier}-{template}", self.name)
    }

    /// What a Service, a budget or a policy selects a tier's pods by.
    pub fn selector(&self, role: Role) -> BTreeMap<String, String> {
        BTreeMap::from([(CLUSTER_LABEL.to_owned(), self.name.clone()), (TIER_LABEL.to_owned(), role.to_string())])
    }

    /// The labels of an object that belongs to no tier.
    pub fn labels(&self) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("app.kubernetes.io/name".to_owned(), "imcluster".to_owned()),
            ("app.kubernetes.io/instance".to_owned(), self.name.clone()),
            ("app.kubernetes.io/managed-by".to_owned(), MANAGER.to_owned()),
            (CLUSTER_LABEL.to_owned(), self.name.clone()),
        ])
    }

    /// The labels of an object of a tier.
    pub fn labels_of(&self, role: Role) -> BTreeMap<String, String> {
        let mut labels = self.labels();
        labels.insert("app.kubernetes.io/component".to_owned(), role.to_string());
        labels.insert(TIER_LABEL.to_owned(), role.to_string());
        labels
    }
}
