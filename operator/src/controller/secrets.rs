//! What is known of the Secrets that ImClusters name.
//!
//! The operator may read a Secret by its name and neither list nor watch Secrets. So it asks now and then whether one is another
//! one by now; only then its ImCluster is reconciled and the content read.
//!
//! What becomes of a change: gateways read keys, certificates and service tokens again from their files; all tiers do the same
//! with the tokens that they show each other (`im_proto::token`); Prometheus' token and authorities are used from the next round
//! of measuring on; the database's URL is a part of the business members' template, so that they are replaced one by one.

use super::children::SecretNeed;
use crate::control::ClusterKey;
use im_crds::SecretKey;
use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::time::Duration;

/// Between two looks at every Secret.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// What the keys hold that an ImCluster names, as of the last look.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretValues(BTreeMap<(String, String), Vec<u8>>);

impl fmt::Debug for SecretValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl SecretValues {
    /// Takes in what is needed of a Secret.
    pub fn learn(&mut self, need: &SecretNeed, found: &Secret) {
        let data = found.data.iter().flatten();
        for (key, value) in data.filter(|(key, _)| need.keys.contains(key)) {
            self.0.insert((need.name.clone(), key.clone()), value.0.clone());
        }
    }

    /// What a key holds.
    pub fn get(&self, key: &SecretKey) -> Option<&[u8]> {
        self.0.get(&(key.name.clone(), key.key.clone())).map(Vec::as_slice)
    }
}

/// Which version of a Secret was seen; `None` = there was none.
pub(super) type Version = Option<String>;

/// The Secrets of all ImClusters, with the versions that were seen last.
#[derive(Debug, Default)]
pub struct SecretVersions {
    seen: Mutex<HashMap<ClusterKey, BTreeMap<String, Version>>>,
}

impl SecretVersions {
    /// What a reconcile of that ImCluster saw.
    pub fn saw(&self, key: &ClusterKey, versions: BTreeMap<String, Version>) {
        self.seen.lock().insert(key.clone(), versions);
    }

    /// That ImCluster is gone.
    pub fn forget(&self, key: &ClusterKey) {
        self.seen.lock().remove(key);
    }

    /// Looks once, and returns the ImClusters of which a Secret is another one than was seen. What can't be asked is asked the
    /// next time.
    pub async fn changed(&self, client: &Client) -> Vec<ClusterKey> {
        let seen = self.seen.lock().clone();
        let mut changed = Vec::new();
        for (key, versions) in seen {
            let Some((namespace, _)) = key.0.split_once('/') else { continue };
            let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
            for (name, version) in versions {
                match api.get_metadata_opt(&name).await {
                    Ok(found)
                        if found.as_ref().and_then(|found| found.metadata.resource_version.clone()) != version =>
                    {
                        tracing::info!(cluster = %key, secret = name, "a Secret changed");
                        changed.push(key);
                        break;
                    }
                    Ok(_) => {}
                    Err(error) => tracing::warn!(cluster = %key, secret = name, %error, "a Secret can't be looked at"),
                }
            }
        }
        changed
    }
}
