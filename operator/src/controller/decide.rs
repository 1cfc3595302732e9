//! Second step of a reconcile: what is to be written. Pure.

use super::accepted::Accepted;
use super::children::tokens_of;
use super::members::{LINK_TOKEN, STORE_TOKEN};
use super::observe::{Child, Observation, Observed, SecretState};
use crate::platform::kubernetes::facts::DeploymentFacts;
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;
use kube::api::Preconditions;
use serde_json::Value;

/// What keeps an ImCluster from running, or from running as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One CamelCase word for machines.
    pub reason: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

/// What a reconcile writes, and what it can't.
#[derive(Debug, Default)]
pub struct Decision {
    /// Objects that are not as they should be, in this order.
    pub apply: Vec<Child>,
    /// The Secret of tokens has to be made.
    pub make_tokens: bool,
    /// Deployments to be deleted.
    pub spent: Vec<DeploymentFacts>,
    /// ConfigMaps to be deleted, as they were seen.
    pub unused_configs: Vec<(String, Preconditions)>,
    /// What stands in the way: what is asked for can't be run.
    pub problem: Option<Problem>,
    /// What is wrong and keeps nothing from running.
    pub complaint: Option<Problem>,
}

impl Decision {
    /// Nothing has to be written.
    pub fn is_empty(&self) -> bool {
        self.apply.is_empty() && !self.make_tokens && self.spent.is_empty() && self.unused_configs.is_empty()
    }
}

/// What to write so that what is becomes what should be. Nothing is taken from others: an object of a wanted name that
/// somebody else owns is a problem, not a target. `written` says whether just that was written before and led to just that
/// resource version.
pub fn decide(accepted: &Accepted, observed: Observed, written: impl Fn(&Child, Option<&str>) -> bool) -> Decision {
    let mut decision = Decision { make_tokens: observed.tokens.is_none(), ..Decision::default() };
    decision.spent = observed.spent;
    decision.unused_configs = observed.unused_configs;
    let lacks = |secret: &Secret| [LINK_TOKEN, STORE_TOKEN].into_iter().find(|key| tokens_of(secret, key).is_none());
    if let Some(key) = observed.tokens.as_ref().and_then(lacks) {
        let message = format!(
            "the Secret {} has no token under {key}: put one there, one per line, or delete the Secret to get it back",
            accepted.child("tokens")
        );
        decision.problem = Some(Problem { reason: "TokensDamaged", message });
    }
    for Observation { child, live } in observed.children {
        match &live {
            Some(live) if !live.owner_references().iter().any(|owner| owner.uid == accepted.owner().uid) => {
                let title = child.title();
                decision.problem.get_or_insert(Problem {
                    reason: "NameTaken",
                    message: format!(
                        "{title} exists and belongs to somebody else: delete or rename it, or give the ImCluster another name"
                    ),
                });
            }
            Some(live) if written(&child, live.metadata.resource_version.as_deref()) => {}
            Some(live) if covers(&serde_json::to_value(live).unwrap_or_default(), &child.wanted) => {}
            Some(_) | None => decision.apply.push(child),
        }
    }
    for (need, state) in observed.secrets {
        let message = match state {
            SecretState::Complete => continue,
            SecretState::Missing => format!("{}: there is no Secret {}: create it", need.field, need.name),
            SecretState::Lacks(keys) => {
                format!("{}: the Secret {} has no key {}: add it", need.field, need.name, keys.join(", "))
            }
        };
        let place = if need.essential { &mut decision.problem } else { &mut decision.complaint };
        place.get_or_insert(Problem { reason: "SecretMissing", message });
    }
    decision
}

/// Whether `live` has all that `wanted` asks for; what it has besides are defaults, and what others wrote.
///
/// Lists have to be of one length. An amount such as `1000m`, which the API server may write as `1`, does not count as
/// covered: then the write changes nothing, and its answer is remembered.
pub fn covers(live: &Value, wanted: &Value) -> bool {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted.iter().all(|(key, wanted)| match live.get(key) {
            Some(live) => covers(live, wanted),
            None => wanted.is_null() || wanted.as_object().is_some_and(serde_json::Map::is_empty),
        }),
        (Value::Array(live), Value::Array(wanted)) => {
            live.len() == wanted.len() && live.iter().zip(wanted).all(|(live, wanted)| covers(live, wanted))
        }
        (live, wanted) => live == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::children::{SecretNeed, tokens};
    use im_crds::ImCluster;
    use k8s_openapi::ByteString;
    use k8s_openapi::api::core::v1::ServiceAccount;
    use kube::api::{ApiResource, DynamicObject};
    use serde_json::json;
    use std::collections::BTreeMap;

    fn accepted() -> Accepted {
        let cluster = ImCluster::parse_yaml(
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat, namespace: talk, uid: u1}\nspec: {auth: {insecure: {}}}",
        );
        Accepted::new(&cluster.expect("a good file")).expect("runs on Kubernetes")
    }

    fn observed(live: Option<Value>) -> Observed {
        let child = Child {
            resource: ApiResource::erase::<ServiceAccount>(&()),
            name: "chat-gateway".into(),
            wanted: json!({ "automountServiceAccountToken": false }),
        };
        let live: Option<DynamicObject> = live.map(|live| serde_json::from_value(live).expect("an object"));
        Observed {
            children: vec![Observation { child, live }],
            tokens: Some(tokens(&accepted(), None, || 7)),
            secrets: Vec::new(),
            secret_versions: BTreeMap::new(),
            spent: Vec::new(),
            rolling: false,
            unused_configs: Vec::new(),
        }
    }

    fn live(owner: &str, automount: bool) -> Option<Value> {
        let owners = json!([{ "apiVersion": "x/v1", "kind": "X", "name": "chat", "uid": owner }]);
        Some(json!({ "metadata": { "ownerReferences": owners }, "automountServiceAccountToken": automount }))
    }

    #[test]
    fn only_what_differs_is_written_and_nothing_of_others() {
        let reason = |decision: &Decision| decision.problem.as_ref().map(|problem| problem.reason);
        for (found, writes, problem) in [
            (None, true, None),
            (live("u1", false), false, None),
            (live("u1", true), true, None),
            (live("u2", true), false, Some("NameTaken")),
            (Some(json!({ "metadata": {} })), false, Some("NameTaken")),
        ] {
            let decision = decide(&accepted(), observed(found.clone()), |_, _| false);
            assert_eq!((!decision.is_empty(), reason(&decision)), (writes, problem), "{found:?}");
        }
        let fresh = decide(&accepted(), Observed { tokens: None, ..observed(live("u1", false)) }, |_, _| false);
        assert!(fresh.make_tokens);
        assert!(
            decide(&accepted(), observed(live("u1", true)), |_, _| true).is_empty(),
            "written before, to no effect"
        );
    }

    #[test]
    fn a_missing_secret_is_named_with_its_field() {
        let need = SecretNeed {
            field: "spec.serviceTokenSecret",
            name: "servers".into(),
            keys: vec!["token".into()],
            essential: true,
        };
        for (state, words) in [
            (SecretState::Complete, None),
            (SecretState::Missing, Some("spec.serviceTokenSecret: there is no Secret servers: create it")),
            (
                SecretState::Lacks(vec!["token".into()]),
                Some("spec.serviceTokenSecret: the Secret servers has no key token: add it"),
            ),
        ] {
            for essential in [true, false] {
                let need = SecretNeed { essential, ..need.clone() };
                let observed = Observed { secrets: vec![(need, state.clone())], ..observed(live("u1", false)) };
                let Decision { problem, complaint, .. } = decide(&accepted(), observed, |_, _| false);
                let (told, silent) = if essential { (problem, complaint) } else { (complaint, problem) };
                assert_eq!(told.map(|told| told.message), words.map(str::to_owned));
                assert_eq!(silent, None);
            }
        }
    }

    #[test]
    fn tokens_that_nobody_can_show_are_a_problem() {
        let mut secret = tokens(&accepted(), None, || 7);
        for (value, problem) in [("a\nb", None), (" \n", Some("TokensDamaged"))] {
            let data = secret.data.get_or_insert_default();
            data.insert(STORE_TOKEN.to_owned(), ByteString(value.into()));
            let observed = Observed { tokens: Some(secret.clone()), ..observed(live("u1", false)) };
            let decision = decide(&accepted(), observed, |_, _| false);
            assert_eq!(decision.problem.map(|problem| problem.reason), problem, "{value:?}");
        }
    }

    #[test]
    fn defaults_and_the_work_of_others_are_no_difference() {
        let live = json!({ "a": 1, "b": { "c": [{ "d": 1, "default": true }], "x": 0 } });
        for (wanted, expected) in [
            (json!({}), true),
            (json!({ "a": 1 }), true),
            (json!({ "a": 2 }), false),
            (json!({ "b": { "c": [{ "d": 1 }] } }), true),
            (json!({ "b": { "c": [{ "d": 1 }, {}] } }), false),
            (json!({ "b": { "c": [] } }), false),
            (json!({ "z": 1 }), false),
            (json!({ "z": null, "y": {} }), true),
            (json!({ "a": "1" }), false),
        ] {
            assert_eq!(covers(&live, &wanted), expected, "{wanted}");
        }
    }
}
