//! One look at one ImCluster: observe → decide → act; the status is written by its [`Keeper`].

use super::CallError;
use super::accepted::Accepted;
use super::act::{Memory, act, namespace_ends};
use super::children::tokens_of;
use super::decide::{Problem, decide};
use super::keeper::{Keeper, Order, Run, Seen, Shared};
use super::members::LINK_TOKEN;
use super::observe::{observe, what_runs};
use super::pause_after;
use super::secrets::{SecretVersions, Version};
use super::status::Situation;
use crate::control::ClusterKey;
use im_crds::{ImCluster, ImClusterStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;
use kube::core::DeserializeGuard;
use kube::runtime::controller::Action;
use kube::runtime::reflector::{ObjectRef, Store};
use parking_lot::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

/// Between two looks at an ImCluster at which nothing happens.
const LOOK_AGAIN: Duration = Duration::from_secs(300);
/// Between two looks while a Deployment of another template is there.
const LOOK_WHILE_ROLLING: Duration = Duration::from_secs(5);
/// The first pause after something was in the way; it doubles up to the longest.
const RETRY_FIRST: Duration = Duration::from_secs(2);
/// The longest pause.
const RETRY_LONGEST: Duration = Duration::from_secs(60);

/// What reads and writes end with when the API server does not do its part.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// What is there can't be read.
    #[error("what is there can't be read: {0}")]
    Observe(#[source] CallError),
}

impl ReconcileError {
    /// For the metric's label.
    pub fn category(&self) -> &'static str {
        match self {
            Self::Observe(error) => category(&error.source),
        }
    }
}

/// One word for what the API server said.
pub fn category(error: &kube::Error) -> &'static str {
    match error {
        kube::Error::Api(status) => match status.code {
            403 => "forbidden",
            404 => "not_found",
            409 => "conflict",
            422 => "invalid",
            429 => "throttled",
            500.. => "server",
            _ => "refused",
        },
        kube::Error::SerdeError(_) => "unreadable",
        _ => "unreachable",
    }
}

/// What all reconciles share while this replica leads. Dropping it ends every [`Keeper`].
pub struct Context {
    shared: Arc<Shared>,
    /// Every ImCluster that there is.
    clusters: Store<DeserializeGuard<ImCluster>>,
    memory: Memory,
    keepers: Mutex<HashMap<ClusterKey, Keeper>>,
    secrets: SecretVersions,
    troubles: Mutex<HashMap<ClusterKey, Trouble>>,
}

/// What goes wrong with an ImCluster, look by look.
#[derive(Debug, Default)]
struct Trouble {
    /// How often in a row something was in the way.
    times: u32,
    /// How often in a row what is there could not be read.
    unread: u32,
}

impl Trouble {
    /// What is there was read, or once more not; says whether that lasts. One answer that fails is none to tell anybody.
    fn was_read(&mut self, read: bool) -> bool {
        self.unread = if read { 0 } else { self.unread.saturating_add(1) };
        self.unread > 1
    }
}

impl Context {
    /// Nobody decides for any of `clusters` yet.
    pub fn new(shared: Arc<Shared>, clusters: Store<DeserializeGuard<ImCluster>>) -> Self {
        Self {
            shared,
            clusters,
            memory: Memory::default(),
            keepers: Mutex::default(),
            secrets: SecretVersions::default(),
            troubles: Mutex::default(),
        }
    }

    /// The API.
    pub fn client(&self) -> &kube::Client {
        self.shared.world.client()
    }

    /// The Secrets that ImClusters name.
    pub fn secrets(&self) -> &SecretVersions {
        &self.secrets
    }

    /// That ImCluster is gone, and no longer among those that there are: nobody decides for it any more. Its children go by
    /// their owner references.
    pub fn forget(&self, key: &ClusterKey) {
        let mut keepers = self.keepers.lock();
        if keepers.remove(key).is_some() {
            tracing::info!("{key} is gone");
        }
        self.shared.metrics.clusters.set(i64::try_from(keepers.len()).unwrap_or(i64::MAX));
        drop(keepers);
        self.troubles.lock().remove(key);
        self.secrets.forget(key);
        self.memory.forget(&key.0);
    }

    /// Forgets all but those.
    pub fn keep_only(&self, exists: impl Fn(&ClusterKey) -> bool) {
        let gone: Vec<ClusterKey> = self.keepers.lock().keys().filter(|key| !exists(key)).cloned().collect();
        for key in gone {
            self.forget(&key);
        }
    }

    fn order(&self, key: &ClusterKey, regarding: ObjectReference, seen: Seen, order: Order) {
        let mut keepers = self.keepers.lock();
        // It may have gone while it was looked at. With the keepers locked, whoever goes after this is forgotten after it.
        if !self.is_there(&regarding) {
            return;
        }
        match keepers.get(key) {
            Some(keeper) if keeper.is_of(regarding.uid.as_deref()) => keeper.order(order),
            _ => {
                keepers.insert(key.clone(), Keeper::start(self.shared.clone(), regarding, seen, order));
            }
        }
        self.shared.metrics.clusters.set(i64::try_from(keepers.len()).unwrap_or(i64::MAX));
    }

    fn saw_secrets(&self, key: &ClusterKey, regarding: &ObjectReference, versions: BTreeMap<String, Version>) {
        // As for an order: who is forgotten stays so.
        let _keepers = self.keepers.lock();
        if self.is_there(regarding) {
            self.secrets.saw(key, versions);
        }
    }

    fn is_there(&self, regarding: &ObjectReference) -> bool {
        let name = ObjectRef::new(regarding.name.as_deref().unwrap_or_default());
        let found = self.clusters.get(&name.within(regarding.namespace.as_deref().unwrap_or_default()));
        found.is_some_and(|found| found.meta().uid == regarding.uid)
    }

    /// How long to wait after something was in the way once more.
    fn pause(&self, key: &ClusterKey) -> Duration {
        let mut troubles = self.troubles.lock();
        let trouble = troubles.entry(key.clone()).or_default();
        trouble.times = trouble.times.saturating_add(1);
        pause_after(trouble.times, RETRY_FIRST, RETRY_LONGEST)
    }

    fn was_read(&self, key: &ClusterKey, read: bool) -> bool {
        self.troubles.lock().entry(key.clone()).or_default().was_read(read)
    }
}

/// The key of an object of any state.
pub fn key_of(object: &DeserializeGuard<ImCluster>) -> ClusterKey {
    let meta = object.meta();
    let namespace = meta.namespace.as_deref().unwrap_or("default");
    ClusterKey(format!("{namespace}/{}", meta.name.as_deref().unwrap_or_default()))
}

/// Makes what is there what should be there, and says when to look again.
///
/// # Errors
/// [`ReconcileError`] when what is there can't be read.
pub async fn reconcile(
    object: Arc<DeserializeGuard<ImCluster>>,
    context: Arc<Context>,
) -> Result<Action, ReconcileError> {
    let key = key_of(&object);
    let meta = object.meta();
    if meta.deletion_timestamp.is_some() {
        context.forget(&key);
        return Ok(Action::await_change());
    }
    let generation = meta.generation.unwrap_or_default();
    let regarding = object.object_ref(&());
    let seen = |status: Option<&ImClusterStatus>| Seen {
        version: meta.resource_version.clone(),
        status: status.cloned().unwrap_or_default(),
    };
    let world = &context.shared.world;
    // What is asked for can't be run, and is told so.
    let as_before = |status: Option<&ImClusterStatus>, reason, message, found| {
        let problem = Some(Problem { reason, message });
        let situation = Situation { generation, problem, ..Situation::default() };
        context.order(&key, regarding.clone(), seen(status), Order { situation, run: Run::AsBefore(found) });
    };
    let usable = match &object.0 {
        Ok(cluster) => Accepted::new(cluster).map(|accepted| (cluster, accepted)).map_err(|violations| {
            let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
            (cluster.status.as_ref(), "InvalidSpec", lines.join("; "))
        }),
        Err(unreadable) => {
            let message =
                format!("this operator can't read it: {unreadable}; correct the field, or upgrade the operator");
            Err((None, "Unreadable", message))
        }
    };
    let (cluster, accepted) = match usable {
        Ok(usable) => usable,
        Err((status, reason, message)) => {
            let found = what_runs(world, meta, None).await;
            let action = match &found {
                Ok(_) => Action::await_change(),
                Err(error) => {
                    context.shared.metrics.failed(category(&error.source));
                    Action::requeue(context.pause(&key))
                }
            };
            as_before(status, reason, message, found.unwrap_or_default());
            context.shared.metrics.reconciled("refused");
            return Ok(action);
        }
    };

    let observed = observe(world, accepted.clone()).await;
    let lasts = context.was_read(&key, observed.is_ok());
    let (accepted, observed) = match observed {
        Ok(observed) => observed,
        Err(error) => {
            // Where nobody answers, nobody takes a status either.
            if lasts && category(&error.source) != "unreachable" {
                let message = format!("what is there can't be read: {error}; tried again");
                let found = what_runs(world, meta, Some(accepted)).await.unwrap_or_default();
                as_before(cluster.status.as_ref(), "CannotRead", message, found);
            }
            return Err(ReconcileError::Observe(error));
        }
    };
    let rolling = observed.rolling;
    let mut secret_versions = observed.secret_versions.clone();
    let mut tokens = observed.tokens.as_ref().and_then(|secret| tokens_of(secret, LINK_TOKEN));
    if let Some(secret) = observed.tokens.as_ref().filter(|_| tokens.is_some()) {
        context.memory.learn_tokens(&accepted, secret);
    }
    let decision = decide(&accepted, observed, |child, live| context.memory.knows(&accepted, child, live));
    let blocked = decision.problem.is_some();
    let mut situation = Situation {
        generation,
        problem: decision.problem.clone().or_else(|| decision.complaint.clone()),
        paused: cluster.spec.paused,
        held_back: decision.apply.len(),
    };
    // Paused is another way of applying, not another way of looking.
    if !situation.paused {
        let acted = act(world.client(), &accepted, decision, &context.memory, |kind| world.wrote(kind)).await;
        if acted.errors.iter().any(|error| namespace_ends(&error.source)) {
            context.shared.metrics.reconciled("waiting");
            tracing::debug!("{key}: its namespace ends, and it with it");
            return Ok(Action::await_change());
        }
        if let Some(made) = &acted.tokens {
            tokens = tokens_of(made, LINK_TOKEN);
            context.memory.learn_tokens(&accepted, made);
            secret_versions.insert(accepted.child("tokens"), made.metadata.resource_version.clone());
        }
        for error in &acted.errors {
            context.shared.metrics.failed(category(&error.source));
            tracing::warn!("{key}: {error}");
        }
        if let Some(error) = acted.errors.first() {
            let message = format!("{error}; tried again");
            situation.problem.get_or_insert(Problem { reason: "ApplyFailed", message });
        }
        situation.held_back = 0;
    }
    let trouble = situation.problem.is_some();
    let run = match (tokens, blocked) {
        (Some(tokens), false) => Run::Asked(accepted, tokens),
        (tokens, _) => {
            let running = world.replicas(&key).map(|(gateways, business)| accepted.as_it_runs(gateways, business));
            Run::AsBefore(running.zip(tokens))
        }
    };
    context.saw_secrets(&key, &regarding, secret_versions);
    context.order(&key, regarding, seen(cluster.status.as_ref()), Order { situation, run });
    if trouble {
        context.shared.metrics.reconciled("waiting");
        return Ok(Action::requeue(context.pause(&key)));
    }
    context.troubles.lock().remove(&key);
    context.shared.metrics.reconciled("done");
    Ok(Action::requeue(if rolling { LOOK_WHILE_ROLLING } else { LOOK_AGAIN }))
}

/// When to try again what failed.
pub fn on_error(object: Arc<DeserializeGuard<ImCluster>>, error: &ReconcileError, context: Arc<Context>) -> Action {
    context.shared.metrics.failed(error.category());
    context.shared.metrics.reconciled("failed");
    Action::requeue(context.pause(&key_of(&object)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_read_that_fails_is_none_to_tell() {
        let mut trouble = Trouble::default();
        let reads = [false, true, false, false, false, true, false];
        assert_eq!(reads.map(|read| trouble.was_read(read)), [false, false, false, true, true, false, false]);
    }
}
