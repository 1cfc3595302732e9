//! Third step of a reconcile: writes what was decided. No decision here.

use super::CallError;
use super::accepted::{Accepted, MANAGER};
use super::children::tokens;
use super::decide::Decision;
use super::observe::Child;
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};

/// Which object, and what was wanted of it.
type Applied = HashMap<(String, String), (u64, String)>;

/// What came of earlier writes: an object that the API server stores in other words than it was written in is not written
/// again and again.
#[derive(Debug, Default)]
pub struct Memory {
    applied: Mutex<Applied>,
    /// What the Secret of tokens held, for the case that it is deleted.
    tokens: Mutex<HashMap<String, BTreeMap<String, ByteString>>>,
}

impl Memory {
    fn key(accepted: &Accepted, child: &Child) -> (String, String) {
        (accepted.key().0, child.title())
    }

    fn digest(child: &Child) -> u64 {
        xxhash_rust::xxh3::xxh3_64(child.wanted.to_string().as_bytes())
    }

    /// Whether just that was written before, and led to just that state.
    pub fn knows(&self, accepted: &Accepted, child: &Child, live_version: Option<&str>) -> bool {
        let applied = self.applied.lock();
        applied
            .get(&Self::key(accepted, child))
            .is_some_and(|(digest, version)| *digest == Self::digest(child) && Some(version.as_str()) == live_version)
    }

    fn remember(&self, accepted: &Accepted, child: &Child, version: String) {
        self.applied.lock().insert(Self::key(accepted, child), (Self::digest(child), version));
    }

    /// Keeps what the Secret of tokens holds.
    pub fn learn_tokens(&self, accepted: &Accepted, secret: &Secret) {
        if let Some(data) = &secret.data {
            self.tokens.lock().insert(accepted.key().0, data.clone());
        }
    }

    /// An ImCluster is gone.
    pub fn forget(&self, key: &str) {
        self.tokens.lock().remove(key);
        self.applied.lock().retain(|(cluster, _), _| cluster != key);
    }
}

/// What came of a decision.
#[derive(Debug, Default)]
pub struct Acted {
    /// The Secret of tokens, if it was made just now.
    pub tokens: Option<Secret>,
    /// Every write that failed.
    pub errors: Vec<CallError>,
}

/// Carries a decision out, as far as it goes: one object that is refused does not keep the others from being written.
/// `wrote` is told of every write.
pub async fn act(
    client: &Client,
    accepted: &Accepted,
    decision: Decision,
    memory: &Memory,
    wrote: impl Fn(&str),
) -> Acted {
    let Decision { apply, make_tokens, spent, unused_configs, problem: _, complaint: _ } = decision;
    let namespace = accepted.namespace();
    let mut acted = Acted::default();
    let errors = &mut acted.errors;
    if make_tokens {
        wrote("Secret");
        let known = memory.tokens.lock().get(&accepted.key().0).cloned();
        let secret = tokens(accepted, known, rand::random);
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let posts = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
        match api.create(&posts, &secret).await {
            Ok(made) => acted.tokens = Some(made),
            Err(source) => errors.push(CallError { what: format!("Secret {}", accepted.child("tokens")), source }),
        }
    }
    for child in apply {
        wrote(&child.resource.kind);
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &child.resource);
        let params = PatchParams::apply(MANAGER).force();
        match api.patch(&child.name, &params, &Patch::Apply(&child.wanted)).await {
            Ok(written) => {
                if let Some(version) = written.metadata.resource_version {
                    memory.remember(accepted, &child, version);
                }
            }
            Err(source) => errors.push(CallError { what: child.title(), source }),
        }
    }
    let configs: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let deployments: Api<Deployment> = Api::namespaced(client.clone(), namespace);
    for deployment in spent {
        wrote("Deployment");
        // Only as it was looked at: whoever made it larger meanwhile wants it.
        let as_seen = Preconditions {
            uid: Some(deployment.uid.clone()),
            resource_version: Some(deployment.resource_version.clone()),
        };
        let params = DeleteParams { preconditions: Some(as_seen), ..DeleteParams::background() };
        match deployments.delete(&deployment.name, &params).await {
            // Its ConfigMap is found to be unused at the next look.
            Ok(_) => {}
            Err(error) if is_past(&error) => {}
            Err(source) => errors.push(CallError { what: format!("Deployment {}", deployment.name), source }),
        }
    }
    for (name, as_seen) in unused_configs {
        wrote("ConfigMap");
        let params = DeleteParams { preconditions: Some(as_seen), ..DeleteParams::default() };
        match configs.delete(&name, &params).await {
            Ok(_) => {}
            Err(error) if is_past(&error) => {}
            Err(source) => errors.push(CallError { what: format!("ConfigMap {name}"), source }),
        }
    }
    acted
}

/// Whether a write was refused because the namespace is being deleted: everything in it goes, in whatever order.
pub fn namespace_ends(error: &kube::Error) -> bool {
    let kube::Error::Api(status) = error else { return false };
    let causes = status.details.iter().flat_map(|details| &details.causes);
    causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// It is gone, or no longer what it was.
fn is_past(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if matches!(status.code, 404 | 409))
}
