//! First step of a reconcile: what is there. Reads, and nothing else.

use super::CallError;
use super::accepted::{Accepted, CLUSTER_LABEL, TIER_LABEL};
use super::children::{Children, SecretNeed, secret_needs, tokens_of};
use super::members::LINK_TOKEN;
use super::pods::MemberTemplate;
use super::secrets::SecretValues;
use crate::control::ClusterKey;
use crate::platform::Tier;
use crate::platform::kubernetes::World;
use crate::platform::kubernetes::facts::DeploymentFacts;
use im_crds::ShardMap;
use im_proto::token::Tokens;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{ApiResource, DynamicObject, ListParams, Preconditions};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::{Api, Resource, ResourceExt};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// One object as it should be, of whatever kind.
#[derive(Clone, Debug, PartialEq)]
pub struct Child {
    /// Its kind.
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// All that is wanted of it.
    pub wanted: Value,
}

impl Child {
    fn new<K>(object: &K) -> Result<Self, serde_json::Error>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Serialize,
    {
        let resource = ApiResource::erase::<K>(&());
        Ok(Self { resource, name: object.name_any(), wanted: serde_json::to_value(object)? })
    }

    /// For people: `Service chat`.
    pub fn title(&self) -> String {
        format!("{} {}", self.resource.kind, self.name)
    }
}

impl Children {
    /// Every child, in the order in which they are applied: what is referred to comes first.
    ///
    /// # Errors
    /// Only if an object can't be JSON.
    pub fn into_list(self) -> Result<Vec<Child>, serde_json::Error> {
        // Without `..`: a child that is not applied does not compile.
        let Self { service_accounts, services, disruption_budgets, network_policies, store_config, store } = self;
        let mut list = Vec::new();
        for object in &service_accounts {
            list.push(Child::new(object)?);
        }
        for object in &network_policies {
            list.push(Child::new(object)?);
        }
        for object in &services {
            list.push(Child::new(object)?);
        }
        for object in &disruption_budgets {
            list.push(Child::new(object)?);
        }
        if let Some(object) = &store_config {
            list.push(Child::new(object)?);
        }
        if let Some(object) = &store {
            list.push(Child::new(object)?);
        }
        Ok(list)
    }
}

/// A child beside what is there in its place.
#[derive(Clone, Debug)]
pub struct Observation {
    /// As it should be.
    pub child: Child,
    /// As it is, if it is.
    pub live: Option<DynamicObject>,
}

/// How a Secret of the user is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretState {
    /// It has all that is needed.
    Complete,
    /// There is none.
    Missing,
    /// It lacks these keys.
    Lacks(Vec<String>),
}

/// All that a reconcile decides on.
#[derive(Debug)]
pub struct Observed {
    /// Every child.
    pub children: Vec<Observation>,
    /// The Secret of tokens, if it was made.
    pub tokens: Option<Secret>,
    /// Every Secret that the user names.
    pub secrets: Vec<(SecretNeed, SecretState)>,
    /// The version of each Secret, that of tokens too; `None` = there is none.
    pub secret_versions: BTreeMap<String, Option<String>>,
    /// Deployments that run nothing any more.
    pub spent: Vec<DeploymentFacts>,
    /// There are Deployments of other templates.
    pub rolling: bool,
    /// ConfigMaps that nobody is started with any more, as they were seen.
    pub unused_configs: Vec<(String, Preconditions)>,
}

fn reading(what: impl Into<String>) -> impl FnOnce(kube::Error) -> CallError {
    let what = what.into();
    move |source| CallError { what, source }
}

fn unwritable(error: serde_json::Error) -> CallError {
    CallError { what: "its children".to_owned(), source: kube::Error::SerdeError(error) }
}

/// Reads a Secret, if it is there.
async fn secret(api: &Api<Secret>, name: &str) -> Result<Option<Secret>, CallError> {
    api.get_opt(name).await.map_err(reading(format!("Secret {name}")))
}

/// What runs of an ImCluster, with the tokens of its members, for who begins to lead it while what is asked for can't be run.
/// `asked` is what is asked for, where that can be read. `None` = nothing runs, or it can't be led.
///
/// # Errors
/// What the API server says.
pub async fn what_runs(
    world: &World,
    meta: &ObjectMeta,
    asked: Option<Accepted>,
) -> Result<Option<(Accepted, Tokens)>, CallError> {
    let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else { return Ok(None) };
    let Some((gateways, business)) = world.replicas(&ClusterKey(format!("{namespace}/{name}"))) else {
        return Ok(None);
    };
    let client = || world.client().clone();
    let accepted = match asked {
        Some(accepted) => accepted,
        None => {
            let api: Api<DeserializeGuard<ShardMap>> = Api::namespaced(client(), namespace);
            let map = api.get_opt(name).await.map_err(reading(format!("ShardMap {name}")))?;
            let shards = map.and_then(|map| Some(map.0.ok()?.spec.shards));
            match shards.and_then(|shards| Accepted::stand_in(meta, shards).ok()) {
                Some(accepted) => accepted,
                None => return Ok(None),
            }
        }
    };
    let found = secret(&Api::namespaced(client(), namespace), &accepted.child("tokens")).await?;
    let tokens = found.and_then(|found| tokens_of(&found, LINK_TOKEN));
    Ok(tokens.map(|tokens| (accepted.as_it_runs(gateways, business), tokens)))
}

/// Looks at everything that belongs to that ImCluster, and returns it with what its Secrets hold.
///
/// # Errors
/// What the API server says.
pub async fn observe(world: &World, accepted: Accepted) -> Result<(Accepted, Observed), CallError> {
    let client = world.client();
    let namespace = accepted.namespace().to_owned();
    let list = Children::new(&accepted, world.surroundings()).into_list().map_err(unwritable)?;
    let mut children = Vec::with_capacity(list.len());
    for child in list {
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), &namespace, &child.resource);
        let live = api.get_opt(&child.name).await.map_err(reading(child.title()))?;
        children.push(Observation { child, live });
    }

    let api: Api<Secret> = Api::namespaced(client.clone(), &namespace);
    let version = |secret: &Secret| secret.metadata.resource_version.clone();
    let tokens = secret(&api, &accepted.child("tokens")).await?;
    let mut secret_versions = BTreeMap::from([(accepted.child("tokens"), tokens.as_ref().and_then(version))]);
    let (mut secrets, mut values) = (Vec::new(), SecretValues::default());
    for need in secret_needs(&accepted) {
        let found = secret(&api, &need.name).await?;
        secret_versions.insert(need.name.clone(), found.as_ref().and_then(version));
        if let Some(found) = &found {
            values.learn(&need, found);
        }
        let state = secret_state(&need, found.as_ref());
        secrets.push((need, state));
    }
    let accepted = accepted.with_secrets(values);

    let templates = Tier::ALL.map(|tier| MemberTemplate::new(&accepted, world.surroundings(), tier));
    let digests = templates.each_ref().map(|template| template.digest.clone());
    let (spent, rolling) = world.outdated(&accepted.key(), &digests);
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), &namespace);
    let ours = format!("{CLUSTER_LABEL}={},{TIER_LABEL}", accepted.name());
    let configs = api.list_metadata(&ListParams::default().labels(&ours)).await;
    let configs = configs.map_err(reading("ConfigMaps"))?;
    let deployments = world.deployment_names(&accepted.key());
    let mut used: BTreeSet<String> = children.iter().map(|observation| observation.child.name.clone()).collect();
    for template in &templates {
        let child = Child::new(&template.config).map_err(unwritable)?;
        used.insert(child.name.clone());
        // Somebody deleted it: without it no pod of that Deployment starts. Those of other templates only have pods that go.
        if deployments.contains(&child.name) && !configs.iter().any(|config| config.name_any() == child.name) {
            children.push(Observation { child, live: None });
        }
    }
    used.extend(deployments);
    let unused = configs.iter().filter(|config| !used.contains(&config.name_any()));
    let as_seen = |config: &PartialObjectMeta<ConfigMap>| {
        let (uid, resource_version) = (config.uid(), config.resource_version());
        (config.name_any(), Preconditions { uid, resource_version })
    };
    let unused_configs = unused.map(as_seen).collect();
    Ok((accepted, Observed { children, tokens, secrets, secret_versions, spent, rolling, unused_configs }))
}

/// Whether a Secret has what is needed of it.
pub fn secret_state(need: &SecretNeed, found: Option<&Secret>) -> SecretState {
    let Some(secret) = found else { return SecretState::Missing };
    let has = |key: &String| secret.data.as_ref().is_some_and(|data| data.contains_key(key));
    let lacks: Vec<String> = need.keys.iter().filter(|key| !has(key)).cloned().collect();
    if lacks.is_empty() { SecretState::Complete } else { SecretState::Lacks(lacks) }
}
