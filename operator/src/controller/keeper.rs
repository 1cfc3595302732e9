//! One task for each ImCluster while this replica leads: it holds the decisions' loop and is the only writer of the
//! status.

use super::accepted::{Accepted, MANAGER};
use super::act::namespace_ends;
use super::decide::Problem;
use super::events::{happenings, publish};
use super::http::Metrics;
use super::pause_after;
use super::status::{Situation, is_news, status};
use crate::control::{Clusters, ControlError, Led, Setup};
use crate::platform::kubernetes::{KubernetesPlatform, World};
use im_crds::{ImCluster, ImClusterStatus};
use im_proto::token::Tokens;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PatchParams};
use prometheus_client::registry::Registry;
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tokio_util::task::AbortOnDropHandle;

/// Between two looks at what control says; a status is written at most that often.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The first pause after the loop of a cluster ended; it doubles up to the longest.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// The longest pause.
const RETRY_LONGEST: Duration = Duration::from_secs(30);
/// How often a status is written on what was seen anew, before it waits for the next look.
const WRITE_ATTEMPTS: usize = 3;
/// After a loop that ran so long the pauses begin anew.
const RAN_WELL: Duration = Duration::from_secs(60);

/// What a reconcile makes of an ImCluster.
#[derive(Clone, Debug)]
pub struct Order {
    /// What the status is about.
    pub situation: Situation,
    /// What is to run.
    pub run: Run,
}

/// What is to run, with the tokens of its members.
#[derive(Clone, Debug)]
pub enum Run {
    /// What is asked for.
    Asked(Accepted, Tokens),
    /// What is asked for can't be: what runs goes on. Who begins to lead takes [what there is](super::observe::what_runs) for
    /// it, so that a member that dies is relieved all the same.
    AsBefore(Option<(Accepted, Tokens)>),
}

impl Run {
    /// What who begins to lead leads, and whether just that is asked for.
    fn begin(&self) -> Option<(&Accepted, &Tokens, bool)> {
        match self {
            Self::Asked(accepted, tokens) => Some((accepted, tokens, true)),
            Self::AsBefore(found) => found.as_ref().map(|(accepted, tokens)| (accepted, tokens, false)),
        }
    }
}

/// An ImCluster as it was seen, or written, last.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// A status is written over this version only: a leader that slept meanwhile knows only older ones.
    pub version: Option<String>,
    /// Its status; empty if it has none that can be read.
    pub status: ImClusterStatus,
}

/// What all keepers share.
pub struct Shared {
    /// The API, and what is known of all members.
    pub world: Arc<World>,
    /// Where members are taken to their cluster's loop.
    pub clusters: Arc<Clusters>,
    /// What is exported of all that.
    pub metrics: Metrics,
    /// How clusters are led.
    pub setup: Setup,
    /// Who tells events: this pod.
    pub reporter: String,
}

impl Shared {
    /// Everything that the operator exports.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::with_prefix("imcluster");
        self.metrics.register(&mut registry);
        self.world.register(&mut registry);
        self.clusters.register(&mut registry);
        registry
    }
}

/// The task of one ImCluster; it ends when this is dropped.
pub struct Keeper {
    uid: String,
    orders: watch::Sender<Order>,
    _task: AbortOnDropHandle<()>,
}

impl Keeper {
    /// Keeps the ImCluster that `regarding` names.
    pub fn start(shared: Arc<Shared>, regarding: ObjectReference, seen: Seen, order: Order) -> Self {
        let uid = regarding.uid.clone().unwrap_or_default();
        let (orders, received) = watch::channel(order);
        let keeping = Keeping { shared, regarding, seen, running: None, failures: 0, retry_at: Instant::now() };
        Self { uid, orders, _task: AbortOnDropHandle::new(tokio::spawn(keeping.run(received))) }
    }

    /// Whether this is the very object, not an earlier one of its name.
    pub fn is_of(&self, uid: Option<&str>) -> bool {
        uid == Some(self.uid.as_str())
    }

    /// What a later reconcile found.
    pub fn order(&self, order: Order) {
        self.orders.send_replace(order);
    }
}

struct Running {
    platform: Arc<KubernetesPlatform>,
    led: Led,
    /// What was asked for; `None` = what there was.
    accepted: Option<Accepted>,
    since: Instant,
}

struct Keeping {
    shared: Arc<Shared>,
    regarding: ObjectReference,
    seen: Seen,
    running: Option<Running>,
    failures: u32,
    retry_at: Instant,
}

/// Nobody is told about an ImCluster any more that nobody keeps.
impl Drop for Keeping {
    fn drop(&mut self) {
        if let (Some(namespace), Some(name)) = (&self.regarding.namespace, &self.regarding.name) {
            self.shared.metrics.statuses.remove(namespace, name);
        }
    }
}

impl Keeping {
    async fn run(mut self, mut orders: watch::Receiver<Order>) {
        let mut looks = interval(LOOK_INTERVAL);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failure: Option<Problem> = None;
        // An object that can't be read may have a status that can.
        if self.seen.status == ImClusterStatus::default()
            && let Ok(Some(found)) = self.look().await
        {
            self.seen = found;
        }
        loop {
            let mut order = orders.borrow_and_update().clone();
            self.follow(&order);
            if self.running.is_some() {
                failure = None;
            }
            if order.situation.problem.is_none() {
                order.situation.problem = failure.clone();
            }
            self.show(&order.situation).await;
            let waits = self.running.is_none() && order.run.begin().is_some();
            tokio::select! {
                changed = orders.changed() => if changed.is_err() { return },
                _ = looks.tick() => {}
                () = sleep_until(self.retry_at), if waits => {}
                ended = ended(&mut self.running) => failure = Some(self.on_ended(&ended)),
            }
        }
    }

    /// Begins to lead, or lets the loop know what changed.
    fn follow(&mut self, order: &Order) {
        let Some(running) = &mut self.running else {
            if let Some((accepted, tokens, asked)) = order.run.begin()
                && Instant::now() >= self.retry_at
            {
                self.running = Some(begin(&self.shared, accepted, tokens, asked));
            }
            return;
        };
        if let Some((_, tokens, _)) = order.run.begin() {
            running.led.set_tokens(tokens.clone());
        }
        match &order.run {
            Run::Asked(accepted, _) if !running.accepted.as_ref().is_some_and(|known| same(known, accepted)) => {
                running.platform.set_cluster(accepted.clone());
                running.accepted = Some(accepted.clone());
            }
            Run::Asked(..) => running.platform.set_problem(None),
            Run::AsBefore(_) => {
                let problem = order.situation.problem.as_ref();
                running.platform.set_problem(problem.map(|problem| problem.message.as_str()));
            }
        }
    }

    fn on_ended(&mut self, ended: &Result<(), ControlError>) -> Problem {
        let ran_well = self.running.take().is_some_and(|running| running.since.elapsed() >= RAN_WELL);
        self.failures = if ran_well { 1 } else { self.failures.saturating_add(1) };
        let pause = pause_after(self.failures, RETRY_FIRST, RETRY_LONGEST);
        self.retry_at = Instant::now() + pause;
        let why = match ended {
            Ok(()) => "its platform ended".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(cluster = ?self.regarding.name, "nobody decides for it: {why}; again in {pause:?}");
        Problem { reason: "ControlFailed", message: format!("nobody decides for this cluster: {why}; tried again") }
    }

    /// Writes the status if it means something else than before, and tells what changed.
    async fn show(&mut self, situation: &Situation) {
        let shown = self.running.as_ref().map(|running| running.led.status.borrow().clone());
        for _ in 0..WRITE_ATTEMPTS {
            let next = status(&self.seen.status, situation, shown.as_ref(), SystemTime::now());
            self.export(&next);
            if !is_news(&self.seen.status, &next) {
                return;
            }
            match self.write(&next).await {
                Ok(version) => {
                    let previous = std::mem::replace(&mut self.seen, Seen { version, status: next });
                    return self.tell(&previous.status).await;
                }
                // It changed since it was looked at: most often its spec, or whoever led before woke up.
                Err(kube::Error::Api(answer)) if answer.code == 409 => match self.look().await {
                    Ok(Some(found))
                        if found.status.shards.term > self.seen.status.shards.term.max(next.shards.term) =>
                    {
                        return tracing::info!(name = ?self.regarding.name, "a later leader wrote its status");
                    }
                    Ok(Some(found)) => self.seen = found,
                    // Whoever watches it ends this task.
                    Ok(None) => return,
                    Err(error) => return self.complain(&error),
                },
                Err(kube::Error::Api(answer)) if answer.code == 404 => return,
                Err(error) => return self.complain(&error),
            }
        }
    }

    fn export(&self, status: &ImClusterStatus) {
        if let (Some(namespace), Some(name)) = (&self.regarding.namespace, &self.regarding.name) {
            self.shared.metrics.statuses.set(namespace, name, status);
        }
    }

    /// The next look tries again.
    fn complain(&self, error: &kube::Error) {
        tracing::warn!(namespace = ?self.regarding.namespace, name = ?self.regarding.name, %error, "its status can't be written");
    }

    /// As an object of no particular type: one that can't be read has a status all the same.
    fn api(&self) -> Api<DynamicObject> {
        let namespace = self.regarding.namespace.as_deref().unwrap_or_default();
        let kind = ApiResource::erase::<ImCluster>(&());
        Api::namespaced_with(self.shared.world.client().clone(), namespace, &kind)
    }

    /// The object as it is; `None` = it is gone.
    async fn look(&self) -> Result<Option<Seen>, kube::Error> {
        let found = self.api().get_opt(self.regarding.name.as_deref().unwrap_or_default()).await?;
        let found = found.filter(|found| found.metadata.uid == self.regarding.uid);
        Ok(found.map(|found| {
            let status = found.data.get("status").cloned().map(serde_json::from_value);
            Seen { version: found.metadata.resource_version, status: status.and_then(Result::ok).unwrap_or_default() }
        }))
    }

    /// Writes a status over the state that was seen, and says which version the object has then.
    async fn write(&self, status: &ImClusterStatus) -> Result<Option<String>, kube::Error> {
        let Some(name) = &self.regarding.name else { return Ok(None) };
        let patch = json!({
            "apiVersion": self.regarding.api_version,
            "kind": self.regarding.kind,
            "metadata": { "name": name, "uid": self.regarding.uid, "resourceVersion": self.seen.version },
            "status": status,
        });
        self.shared.world.wrote("ImCluster/status");
        let params = PatchParams::apply(MANAGER).force();
        Ok(self.api().patch_status(name, &params, &Patch::Apply(&patch)).await?.metadata.resource_version)
    }

    /// Tells what changed since the previous status.
    async fn tell(&self, previous: &ImClusterStatus) {
        for happening in happenings(previous, &self.seen.status) {
            self.shared.world.wrote("Event");
            let written = publish(self.shared.world.client(), &self.shared.reporter, &self.regarding, happening).await;
            if let Err(error) = written
                && !namespace_ends(&error)
            {
                let (namespace, name) = (&self.regarding.namespace, &self.regarding.name);
                tracing::warn!(?namespace, ?name, %error, "an event can't be written");
            }
        }
    }
}

fn begin(shared: &Shared, accepted: &Accepted, tokens: &Tokens, asked: bool) -> Running {
    let make = if asked { KubernetesPlatform::new } else { KubernetesPlatform::as_it_runs };
    let platform = make(shared.world.clone(), accepted.clone());
    let led = shared.clusters.lead(accepted.key(), tokens.clone(), platform.clone(), shared.setup.clone());
    Running { platform, led, accepted: asked.then(|| accepted.clone()), since: Instant::now() }
}

/// Whether members would not notice the difference.
fn same(a: &Accepted, b: &Accepted) -> bool {
    let of = |accepted: &Accepted| (accepted.cluster().spec.clone(), accepted.cluster().metadata.annotations.clone());
    of(a) == of(b) && a.secrets() == b.secrets()
}

async fn ended(running: &mut Option<Running>) -> Result<(), ControlError> {
    match running {
        Some(running) => running.led.ended().await,
        None => std::future::pending().await,
    }
}
