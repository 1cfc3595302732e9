//! What is known of the pods and Deployments of one ImCluster, and what follows from it. Pure.

use crate::control::ClusterKey;
use crate::controller::accepted::{CLUSTER_LABEL, SERVING_LABEL, TEMPLATE_LABEL, TERM_ANNOTATION, TIER_LABEL};
use crate::platform::{Ordered, Process, ProcessState, Role, Tier};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use std::collections::{BTreeMap, BTreeSet};

/// Annotation of a pod: the lower, the earlier it is taken when its ReplicaSet shrinks.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Between the deletion costs of those that stay and of those that go: so many pods may go at the same time.
const COST_STEP: i32 = 10_000;

/// What is kept of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// Tells it from another pod of the same name.
    pub uid: String,
    /// What it is for.
    pub role: Role,
    /// The template that it was made from.
    pub template: String,
    /// When it was made, seconds since 1970.
    pub created_s: i64,
    /// What its process is doing.
    pub state: ProcessState,
    /// What decides which pod a ReplicaSet takes when it shrinks.
    pub rank: Rank,
    /// How often its container was started again.
    pub restarts: u32,
    /// Whether new connections may come (gateways).
    pub serving: bool,
}

/// The order in which a ReplicaSet takes pods away: the lowest first. As far as it is documented for pod-deletion-cost
/// (kubernetes/kubernetes, `ActivePodsWithRanks`): not on a node, not running, not ready, cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// It has a node.
    pub scheduled: bool,
    /// It runs.
    pub running: bool,
    /// It is ready.
    pub ready: bool,
    /// Its [`DELETION_COST`].
    pub cost: i32,
}

/// What is kept of a Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeploymentFacts {
    /// Its name.
    pub name: String,
    /// Tells it from another one of the same name.
    pub uid: String,
    /// The tier that it runs.
    pub tier: Tier,
    /// The template of its pods.
    pub template: String,
    /// How many pods it is to have.
    pub replicas: u32,
    /// What a write must name, so that it meets what the decision was made on.
    pub resource_version: String,
    /// Term of the leader that wrote it last.
    pub term: u64,
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

/// The ImCluster that an object belongs to.
pub fn cluster_of(meta: &ObjectMeta) -> Option<ClusterKey> {
    Some(ClusterKey(format!("{}/{}", meta.namespace.as_deref()?, label(meta, CLUSTER_LABEL)?)))
}

fn role_of(meta: &ObjectMeta) -> Option<Role> {
    [Role::Gateway, Role::Business, Role::Store]
        .into_iter()
        .find(|role| label(meta, TIER_LABEL) == Some(&role.to_string()))
}

impl PodFacts {
    /// What a pod says of itself; `None` for one that is not a member, or has ended for good and is no longer counted.
    pub fn of(pod: &Pod) -> Option<Self> {
        let meta = &pod.metadata;
        let status = pod.status.as_ref();
        let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or("Pending");
        if matches!(phase, "Failed" | "Succeeded") {
            return None;
        }
        let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
        let ready = conditions.into_iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
        let containers: Vec<_> =
            status.and_then(|status| status.container_statuses.as_ref()).into_iter().flatten().collect();
        let runs = containers.iter().any(|c| c.state.as_ref().is_some_and(|state| state.running.is_some()));
        let state = match (meta.deletion_timestamp.is_some(), runs) {
            (true, _) => ProcessState::Stopping,
            (false, true) => ProcessState::Running,
            (false, false) => ProcessState::Waiting,
        };
        let cost = meta.annotations.as_ref().and_then(|annotations| annotations.get(DELETION_COST)?.parse().ok());
        let scheduled = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        Some(Self {
            uid: meta.uid.clone()?,
            role: role_of(meta)?,
            template: label(meta, TEMPLATE_LABEL).unwrap_or_default().to_owned(),
            created_s: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
            state,
            rank: Rank { scheduled, running: phase == "Running", ready, cost: cost.unwrap_or(0) },
            restarts: containers.iter().map(|c| u32::try_from(c.restart_count).unwrap_or(0)).sum(),
            serving: label(meta, SERVING_LABEL) == Some("true"),
        })
    }
}

impl DeploymentFacts {
    /// What a Deployment says of itself; `None` for one that does not run members.
    pub fn of(deployment: &Deployment) -> Option<Self> {
        let meta = &deployment.metadata;
        let replicas = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
        let term = meta.annotations.as_ref().and_then(|annotations| annotations.get(TERM_ANNOTATION)?.parse().ok());
        Some(Self {
            name: meta.name.clone()?,
            uid: meta.uid.clone()?,
            tier: Tier::of(role_of(meta)?)?,
            template: label(meta, TEMPLATE_LABEL)?.to_owned(),
            replicas: u32::try_from(replicas).unwrap_or(0),
            resource_version: meta.resource_version.clone()?,
            term: term.unwrap_or(0),
        })
    }

    /// Whether all that decisions look at is as it was.
    pub fn is_as_decided_on(&self, before: &Self) -> bool {
        let of = |facts: &Self| (facts.uid.clone(), facts.replicas, facts.template.clone(), facts.term);
        of(self) == of(before)
    }

    /// Whether this is an earlier state of the same object than `other`. Resource versions are numbers that only rise
    /// (KEP-5504); where they are not, what comes later counts as later.
    fn is_older_than(&self, other: &Self) -> bool {
        let number = |facts: &Self| facts.resource_version.parse::<u64>().ok();
        self.uid == other.uid
            && match (number(self), number(other)) {
                (Some(mine), Some(theirs)) => mine < theirs,
                _ => false,
            }
    }
}

/// How a member can be taken away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is gone, or on its way.
    Done,
    /// Not now: another pod would go instead.
    NotYet {
        /// Which one.
        instead: String,
    },
    /// Its Deployment is no more: the pod itself is deleted.
    Orphan {
        /// The pod's.
        uid: String,
    },
    /// Its Deployment gets one replica less.
    Shrink {
        /// Which.
        deployment: DeploymentFacts,
        /// The deletion cost that it needs first, so that it is the one that goes.
        cost: Option<i32>,
    },
}

/// All that is known of one ImCluster's members.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    pods: BTreeMap<String, PodFacts>,
    deployments: BTreeMap<String, DeploymentFacts>,
    /// Pods whose Deployment was made one smaller for their sake, until they are seen to end.
    going: BTreeSet<String>,
}

impl Facts {
    /// Nothing is known, so nothing has to be kept.
    pub fn is_empty(&self) -> bool {
        self.pods.is_empty() && self.deployments.is_empty()
    }

    /// A pod is, or is again, like this; `None`: it does not count any more.
    pub fn set_pod(&mut self, name: &str, facts: Option<PodFacts>) {
        match facts {
            Some(facts) => {
                let known = self.pods.insert(name.to_owned(), facts.clone());
                if known.is_some_and(|known| known.uid != facts.uid) {
                    self.going.remove(name);
                }
            }
            None => {
                self.pods.remove(name);
                self.going.remove(name);
            }
        }
    }

    /// A Deployment is like this. An earlier state that comes late is ignored.
    pub fn set_deployment(&mut self, facts: DeploymentFacts) {
        let known = self.deployments.get(&facts.name);
        if !known.is_some_and(|known| facts.is_older_than(known)) {
            self.deployments.insert(facts.name.clone(), facts);
        }
    }

    /// A Deployment is gone.
    pub fn remove_deployment(&mut self, name: &str, uid: Option<&str>) {
        if self.deployments.get(name).is_some_and(|known| Some(known.uid.as_str()) == uid) {
            self.deployments.remove(name);
        }
    }

    /// Forgets what a complete list did not name.
    pub fn keep_pods(&mut self, listed: impl Fn(&str) -> bool) {
        self.pods.retain(|name, _| listed(name));
        self.going.retain(|name| listed(name));
    }

    /// Forgets what a complete list did not name.
    pub fn keep_deployments(&mut self, listed: impl Fn(&str) -> bool) {
        self.deployments.retain(|name, _| listed(name));
    }

    /// The Deployment of that name.
    pub fn deployment(&self, name: &str) -> Option<&DeploymentFacts> {
        self.deployments.get(name)
    }

    /// All Deployments.
    pub fn deployments(&self) -> impl Iterator<Item = &DeploymentFacts> {
        self.deployments.values()
    }

    /// How many members of that tier its Deployments are to have.
    pub fn replicas(&self, tier: Tier) -> u32 {
        let deployments = self.deployments.values().filter(|deployment| deployment.tier == tier);
        deployments.map(|deployment| deployment.replicas).fold(0, u32::saturating_add)
    }

    /// The template of most members of that tier.
    pub fn main_template(&self, tier: Tier) -> Option<&str> {
        let deployments = self.deployments.values().filter(|deployment| deployment.tier == tier);
        let largest = deployments.max_by_key(|deployment| deployment.replicas);
        largest.map(|deployment| deployment.template.as_str())
    }

    /// The pod of that name.
    pub fn pod(&self, name: &str) -> Option<&PodFacts> {
        self.pods.get(name)
    }

    /// Deployments of other templates that run nothing any more.
    pub fn spent(&self, current: &[String]) -> Vec<DeploymentFacts> {
        let outdated = self.deployments.values().filter(|deployment| !current.contains(&deployment.template));
        let spent = outdated.filter(|deployment| deployment.replicas == 0 && self.pods_of(deployment).next().is_none());
        spent.cloned().collect()
    }

    /// Whether there are Deployments of other templates.
    pub fn has_outdated(&self, current: &[String]) -> bool {
        self.deployments.values().any(|deployment| !current.contains(&deployment.template))
    }

    fn pods_of(&self, deployment: &DeploymentFacts) -> impl Iterator<Item = (&String, &PodFacts)> {
        let (role, template) = (deployment.tier.role(), deployment.template.clone());
        self.pods.iter().filter(move |(_, pod)| pod.role == role && pod.template == template)
    }

    /// Pods that the Deployment's controller counts.
    fn live_pods_of(&self, deployment: &DeploymentFacts) -> impl Iterator<Item = (&String, &PodFacts)> {
        self.pods_of(deployment).filter(|(_, pod)| pod.state != ProcessState::Stopping)
    }

    /// Every pod as a process, of each tier the oldest first, and how many there will be besides.
    pub fn view(&self) -> (Vec<Process>, Ordered) {
        let mut pods: Vec<(&String, &PodFacts)> = self.pods.iter().collect();
        pods.sort_by_key(|(name, pod)| (pod.role, pod.created_s, *name));
        let process = |(name, pod): (&String, &PodFacts)| Process {
            name: name.clone(),
            role: pod.role,
            state: if self.going.contains(name) { ProcessState::Stopping } else { pod.state },
            instance: Some(pod.uid.clone()),
            pid: None,
            starts: pod.restarts + 1,
            template: pod.template.clone(),
            addresses: BTreeMap::new(),
        };
        let mut ordered = Ordered::default();
        for deployment in self.deployments.values() {
            let live = u32::try_from(self.live_pods_of(deployment).count()).unwrap_or(u32::MAX);
            let coming = deployment.replicas.saturating_sub(live);
            match deployment.tier {
                Tier::Gateway => ordered.gateway += coming,
                Tier::Business => ordered.business += coming,
            }
        }
        (pods.into_iter().map(process).collect(), ordered)
    }

    /// How that member can be taken away now.
    pub fn removal(&self, name: &str) -> Removal {
        let Some(pod) = self.pods.get(name) else { return Removal::Done };
        if pod.state == ProcessState::Stopping || self.going.contains(name) {
            return Removal::Done;
        }
        let of = |deployment: &&DeploymentFacts| {
            deployment.tier.role() == pod.role && deployment.template == pod.template && deployment.replicas > 0
        };
        let Some(deployment) = self.deployments.values().find(of) else {
            return Removal::Orphan { uid: pod.uid.clone() };
        };
        let (going, others): (Vec<_>, Vec<_>) = self
            .live_pods_of(deployment)
            .filter(|(other, _)| *other != name)
            .partition(|(other, _)| self.going.contains(*other));
        let lowest = others.iter().map(|(_, other)| other.rank.cost).min().unwrap_or(0).min(0);
        let highest = going.iter().map(|(_, other)| other.rank.cost).max();
        // Cheaper than all that stay, and dearer than all that are already to go: those have not been taken yet.
        let wanted = highest.map_or_else(|| lowest.saturating_sub(COST_STEP), |highest| highest.saturating_add(1));
        if let Some((first, _)) = going.first()
            && wanted >= lowest
        {
            return Removal::NotYet { instead: (*first).clone() };
        }
        let fits = pod.rank.cost < lowest && highest.is_none_or(|highest| highest < pod.rank.cost);
        let cost = (!fits).then_some(wanted);
        let rank = Rank { cost: cost.unwrap_or(pod.rank.cost), ..pod.rank };
        match others.into_iter().find(|(_, other)| other.rank <= rank) {
            Some((instead, _)) => Removal::NotYet { instead: instead.clone() },
            None => Removal::Shrink { deployment: deployment.clone(), cost },
        }
    }

    /// Notes that a Deployment was made smaller for this pod's sake.
    pub fn note_going(&mut self, name: &str) {
        if self.pods.contains_key(name) {
            self.going.insert(name.to_owned());
        }
    }

    /// Ends the waiting for pods that end by now, and names those that another one went for.
    pub fn verify_going(&mut self) -> Vec<String> {
        let mut spared = Vec::new();
        self.going.retain(|name| self.pods.get(name).is_some_and(|pod| pod.state != ProcessState::Stopping));
        for deployment in self.deployments.values() {
            let live: Vec<&String> = self.live_pods_of(deployment).map(|(name, _)| name).collect();
            // As few as there are to be, and one of those that were to go is still there.
            if live.len() <= deployment.replicas as usize {
                spared.extend(live.into_iter().filter(|name| self.going.contains(*name)).cloned());
            }
        }
        for name in &spared {
            self.going.remove(name);
        }
        spared
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(name: &str, changes: Value) -> (String, PodFacts) {
        let mut pod = json!({
            "metadata": {
                "name": name, "namespace": "talk", "uid": format!("uid of {name}"),
                "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {
                    "imcluster.dev/cluster": "chat", "imcluster.dev/tier": "gateway",
                    "imcluster.dev/template": "aa", "imcluster.dev/serving": "true",
                },
                "annotations": {},
            },
            "spec": { "containers": [], "nodeName": "node" },
            "status": {
                "phase": "Running",
                "conditions": [{ "type": "Ready", "status": "True" }],
                "containerStatuses": [{
                    "name": "gateway", "image": "", "imageID": "", "ready": true, "restartCount": 2,
                    "state": { "running": {} },
                }],
            },
        });
        for (pointer, value) in changes.as_object().expect("an object") {
            let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
            pod.pointer_mut(parent).expect("a parent")[key] = value.clone();
        }
        let pod: Pod = serde_json::from_value(pod).expect("a pod");
        (name.to_owned(), PodFacts::of(&pod).expect("a member"))
    }

    fn deployment(template: &str, replicas: u32, resource_version: u64) -> DeploymentFacts {
        let deployment: Deployment = serde_json::from_value(json!({
            "metadata": {
                "name": format!("chat-gateway-{template}"), "namespace": "talk", "uid": "d",
                "resourceVersion": resource_version.to_string(),
                "labels": { "imcluster.dev/tier": "gateway", "imcluster.dev/template": template },
                "annotations": { "imcluster.dev/term": "7" },
            },
            "spec": { "replicas": replicas, "selector": {}, "template": {} },
        }))
        .expect("a Deployment");
        DeploymentFacts::of(&deployment).expect("of members")
    }

    fn facts(replicas: u32, pods: impl IntoIterator<Item = (String, PodFacts)>) -> Facts {
        let mut facts = Facts::default();
        facts.set_deployment(deployment("aa", replicas, 10));
        for (name, pod) in pods {
            facts.set_pod(&name, Some(pod));
        }
        facts
    }

    fn states(facts: &Facts) -> Vec<(String, ProcessState)> {
        facts.view().0.into_iter().map(|process| (process.name, process.state)).collect()
    }

    const TERMINATING: &str = "/metadata/deletionTimestamp";

    #[test]
    fn pods_are_processes_and_what_is_missing_is_ordered() {
        let later = json!({ "/metadata/creationTimestamp": "2026-01-01T00:00:09Z" });
        let pending = json!({ "/status": {}, "/spec/nodeName": null });
        let facts = facts(
            4,
            [
                pod("a", later),
                pod("b", json!({})),
                pod("c", pending),
                pod("d", json!({ TERMINATING: "2026-01-01T00:00:00Z" })),
            ],
        );
        assert_eq!(
            states(&facts),
            [
                ("b".to_owned(), ProcessState::Running),
                ("c".to_owned(), ProcessState::Waiting),
                ("d".to_owned(), ProcessState::Stopping),
                ("a".to_owned(), ProcessState::Running),
            ]
        );
        let (processes, ordered) = facts.view();
        assert_eq!(ordered, Ordered { gateway: 1, business: 0 }, "four wanted, one of the four ends");
        let b = &processes[0];
        assert_eq!((b.instance.as_deref(), b.starts, b.template.as_str()), (Some("uid of b"), 3, "aa"));
    }

    #[test]
    fn a_crashed_container_waits_and_an_evicted_pod_does_not_count() {
        let crashed = json!({ "/status/containerStatuses/0/state": { "waiting": { "reason": "CrashLoopBackOff" } } });
        assert_eq!(pod("a", crashed).1.state, ProcessState::Waiting);
        let evicted: Pod = serde_json::from_value(json!({
            "metadata": { "uid": "u", "labels": { "imcluster.dev/tier": "gateway" } }, "status": { "phase": "Failed" },
        }))
        .expect("a pod");
        assert_eq!(PodFacts::of(&evicted), None);
    }

    #[test]
    fn a_late_event_does_not_undo_a_write() {
        let mut facts = facts(2, []);
        facts.set_deployment(deployment("aa", 3, 12));
        facts.set_deployment(deployment("aa", 2, 11));
        assert_eq!(facts.view().1.gateway, 3);
        facts.remove_deployment("chat-gateway-aa", Some("an earlier one"));
        assert_eq!(facts.view().1.gateway, 3);
        facts.remove_deployment("chat-gateway-aa", Some("d"));
        assert!(facts.is_empty());
    }

    #[test]
    fn a_member_is_taken_away_only_if_it_is_the_one_that_goes() {
        let not_ready = || json!({ "/status/conditions": [] });
        let cost = |cost: &str| json!({ "/metadata/annotations": { DELETION_COST: cost } });
        let shrink = |cost| Removal::Shrink { deployment: deployment("aa", 2, 10), cost };
        let not_yet = |instead: &str| Removal::NotYet { instead: instead.to_owned() };
        for (victim, other, expected) in [
            (json!({}), json!({}), shrink(Some(-10_000))),
            (cost("-1"), json!({}), shrink(None)),
            // Whoever was once to go and stayed after all must not go in its place.
            (json!({}), cost("-5"), shrink(Some(-10_005))),
            (json!({}), cost("5"), shrink(Some(-10_000))),
            (json!({}), not_ready(), not_yet("other")),
            (not_ready(), not_ready(), shrink(Some(-10_000))),
            (not_ready(), json!({}), shrink(Some(-10_000))),
            (json!({}), json!({ "/spec/nodeName": null, "/status": {} }), not_yet("other")),
            (
                json!({}),
                json!({ TERMINATING: "2026-01-01T00:00:00Z", "/status/conditions": [] }),
                shrink(Some(-10_000)),
            ),
            (json!({ TERMINATING: "2026-01-01T00:00:00Z" }), json!({}), Removal::Done),
        ] {
            let facts = facts(2, [pod("victim", victim.clone()), pod("other", other.clone())]);
            assert_eq!(facts.removal("victim"), expected, "{victim} beside {other}");
            assert_eq!(facts.removal("unknown"), Removal::Done);
        }
        let mut orphan = facts(0, [pod("victim", json!({}))]);
        assert_eq!(orphan.removal("victim"), Removal::Orphan { uid: "uid of victim".to_owned() });
        orphan.remove_deployment("chat-gateway-aa", Some("d"));
        assert_eq!(orphan.removal("victim"), Removal::Orphan { uid: "uid of victim".to_owned() });
    }

    #[test]
    fn who_goes_later_does_not_go_in_the_place_of_who_goes_first() {
        let cost =
            |name: &str, cost: i32| pod(name, json!({ "/metadata/annotations": { DELETION_COST: cost.to_string() } }));
        let mut facts = facts(3, [pod("a", json!({})), pod("b", json!({})), pod("c", json!({}))]);
        assert_eq!(facts.removal("a"), Removal::Shrink { deployment: deployment("aa", 3, 10), cost: Some(-10_000) });
        facts.set_pod("a", Some(cost("a", -10_000).1));
        assert_eq!(facts.removal("a"), Removal::Shrink { deployment: deployment("aa", 3, 10), cost: None });
        facts.note_going("a");
        facts.set_deployment(deployment("aa", 2, 11));
        assert_eq!(facts.removal("b"), Removal::Shrink { deployment: deployment("aa", 2, 11), cost: Some(-9_999) });
    }

    #[test]
    fn who_goes_is_verified() {
        let mut facts = facts(2, [pod("a", json!({})), pod("b", json!({}))]);
        facts.note_going("a");
        facts.set_deployment(deployment("aa", 1, 11));
        assert_eq!(facts.verify_going(), [""; 0], "the pod has not been told yet");
        assert_eq!(states(&facts)[0], ("a".to_owned(), ProcessState::Stopping));
        assert_eq!((facts.removal("a"), facts.view().1.gateway), (Removal::Done, 0));

        let mut wrong = facts.clone();
        wrong.set_pod("b", Some(pod("b", json!({ TERMINATING: "2026-01-01T00:00:00Z" })).1));
        assert_eq!(wrong.verify_going(), ["a"], "b went instead");
        assert_eq!(states(&wrong)[0], ("a".to_owned(), ProcessState::Running));

        facts.set_pod("a", Some(pod("a", json!({ TERMINATING: "2026-01-01T00:00:00Z" })).1));
        assert_eq!(facts.verify_going(), [""; 0]);
        facts.set_pod("a", None);
        assert_eq!(states(&facts), [("b".to_owned(), ProcessState::Running)]);
    }

    #[test]
    fn a_spent_deployment_is_one_of_another_template_without_replicas_and_pods() {
        let current = ["bb".to_owned()];
        let spent = |facts: &Facts, current: &[String]| facts.spent(current).len();
        assert_eq!(spent(&facts(0, []), &current), 1);
        assert_eq!(spent(&facts(0, []), &["aa".to_owned()]), 0);
        assert_eq!(spent(&facts(1, []), &current), 0);
        let ending = pod("a", json!({ TERMINATING: "2026-01-01T00:00:00Z" }));
        assert_eq!(spent(&facts(0, [ending]), &current), 0);
    }
}
