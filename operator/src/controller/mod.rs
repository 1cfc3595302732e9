//! The controller: ImClusters in, running IM clusters out.
//!
//! ```text
//! ImCluster ──▶ observe ──▶ decide ──▶ act          children that are always there   (reconcile)
//!                  │
//!                  └──▶ Keeper ──▶ Led ──▶ KubernetesPlatform     members, shards, drains   (control)
//!                          └──▶ status, Events
//! ```
//!
//! Of the operator's replicas the one that holds the Lease does this; all serve the control port, so that a member that
//! asks the wrong one is told the right one.
//!
//! Architecture invariant: `accepted`, `members`, `pods`, `children`, `decide`, `status` do no I/O and read no clock.

pub mod accepted;
pub mod act;
pub mod children;
pub mod cluster_metrics;
pub mod decide;
pub mod events;
pub mod http;
pub mod keeper;
pub mod members;
pub mod observe;
pub mod pods;
pub mod reconcile;
pub mod secrets;
pub mod status;

use crate::control::{ClusterKey, Clusters, ControlError, Leadership, Setup, serve};
use crate::leadership::{self, Identity};
use crate::platform::kubernetes::{World, scoped};
use accepted::{CLUSTER_LABEL, MANAGED_SELECTOR, TIER_LABEL};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt, select_all};
use http::Metrics;
use im_crds::{ImCluster, ShardMap};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use keeper::Shared;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::core::{DeserializeGuard, PartialObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::{self, ReconcileRequest, applier};
use kube::runtime::reflector::store::Writer;
use kube::runtime::reflector::{self, ObjectRef, Store, reflector};
use kube::runtime::utils::PredicateConfig;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, CustomResourceExt, Resource, ResourceExt};
use pods::Surroundings;
use reconcile::{Context, key_of, on_error, reconcile};
use serde::de::DeserializeOwned;
use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

/// Name of the Lease that the leading replica holds.
const LEASE: &str = "imcluster-operator";
/// ImClusters that are looked at side by side.
const CONCURRENCY: u16 = 8;
/// A change is waited on for a moment: it often does not come alone.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Between two looks for a custom resource that is not there yet.
const CRD_RETRY: Duration = Duration::from_secs(2);

/// What `imcluster operator` is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image of members where an ImCluster names none.
    pub image: String,
    /// Where the control service listens.
    pub control_address: SocketAddr,
    /// Where members reach the control service of all replicas, `HOST:PORT`.
    pub control_service: String,
    /// Where health and metrics listen.
    pub http_address: SocketAddr,
    /// The one namespace to look at; all if `None`.
    pub namespace: Option<String>,
    /// Where the Lease lies; the one of the Kubernetes configuration if `None`.
    pub lease_namespace: Option<String>,
    /// This pod's name.
    pub pod_name: String,
    /// Where members reach this very replica, an IP address.
    pub pod_ip: String,
    /// How clusters are led.
    pub setup: Setup,
}

/// Why the operator ends.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// There is no configuration for the Kubernetes API, or it can't be used.
    #[error("no Kubernetes to talk to: {0}; run in a pod with a service account, or set KUBECONFIG")]
    Client(#[from] kube::Error),
    /// An address is taken, or a signal can't be listened to.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The control service ended.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// A loop ended that never does.
    #[error("{0} ended, by a fault that the log above names")]
    Ended(&'static str),
}

/// A call to the Kubernetes API that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {}", said(source))]
pub struct CallError {
    /// What was to be read or written.
    pub what: String,
    /// What the API server said.
    pub source: kube::Error,
}

/// What the API server said, in its own words where it answered.
fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({} {})", status.message, status.code, status.reason),
        other => other.to_string(),
    }
}

/// How long to wait after so many failures in a row: the pause doubles from the first to the longest.
fn pause_after(failures: u32, first: Duration, longest: Duration) -> Duration {
    first.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(longest)
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> OperatorError {
    let what = what.into();
    move |source| OperatorError::Io { what, source }
}

/// Runs the operator until SIGTERM, and gives the Lease up.
///
/// # Errors
/// [`OperatorError`].
pub async fn run(options: Options) -> Result<(), OperatorError> {
    let mut terminations = signal(SignalKind::terminate()).map_err(io("SIGTERM"))?;
    let mut interrupts = signal(SignalKind::interrupt()).map_err(io("SIGINT"))?;
    let client = Client::try_default().await?;
    let lease_namespace = options.lease_namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
    let port = options.control_address.port();
    let me = Identity {
        name: options.pod_name.clone(),
        address: match options.pod_ip.parse() {
            Ok(ip) => SocketAddr::new(ip, port).to_string(),
            Err(_) => format!("{}:{port}", options.pod_ip),
        },
    };
    let http = TcpListener::bind(options.http_address).await.map_err(io(options.http_address.to_string()))?;
    let working = work(client.clone(), &options, lease_namespace.clone(), me.clone(), http);
    let outcome = tokio::select! {
        ended = working => ended,
        _ = terminations.recv() => Ok(()),
        _ = interrupts.recv() => Ok(()),
    };
    // Whatever led is dropped by now.
    if let Err(error) = leadership::release(client, &lease_namespace, LEASE, &me).await {
        tracing::warn!(%error, "the Lease could not be given up and ends by itself");
    }
    outcome
}

/// What [`run`] does until it is told to end; health and metrics are served at `http`.
///
/// # Errors
/// [`OperatorError`].
pub async fn work(
    client: Client,
    options: &Options,
    lease_namespace: String,
    me: Identity,
    http: TcpListener,
) -> Result<(), OperatorError> {
    let surroundings = Surroundings { image: options.image.clone(), control_service: options.control_service.clone() };
    let world = World::new(client.clone(), surroundings);
    let (leads, leadership) = watch::channel(Leadership::Following { leader: None });
    let clusters = Clusters::new(leadership.clone());
    let (setup, reporter) = (options.setup.clone(), options.pod_name.clone());
    let shared = Arc::new(Shared { world, clusters, metrics: Metrics::default(), setup, reporter });

    let (waits_for, waits) = watch::channel("the Kubernetes API".to_owned());
    let router = http::router(shared.registry(), waits);
    let http = AbortOnDropHandle::new(tokio::spawn(async move { axum::serve(http, router).await }));
    wait_for::<ImCluster>(&client, options.namespace.as_deref(), &waits_for).await;
    wait_for::<ShardMap>(&client, options.namespace.as_deref(), &waits_for).await;
    waits_for.send_replace("the list of pods and Deployments".to_owned());
    let members = AbortOnDropHandle::new(tokio::spawn(shared.world.clone().run(options.namespace.clone())));
    shared.world.ready().await;
    waits_for.send_replace(String::new());

    let listener = TcpListener::bind(options.control_address).await.map_err(io(options.control_address.to_string()))?;
    let control = serve(shared.clusters.clone(), listener);
    let election = leadership::run(client.clone(), lease_namespace, LEASE.to_owned(), me, leads);
    let election = AbortOnDropHandle::new(tokio::spawn(election));
    tokio::select! {
        ended = control => Ok(ended?),
        () = lead_when_it_is_ours(leadership, shared, options.namespace.clone()) => Ok(()),
        // Another process does better.
        _ = http => Err(OperatorError::Ended("the server of health and metrics")),
        _ = members => Err(OperatorError::Ended("the watch of members")),
        _ = election => Err(OperatorError::Ended("the election")),
    }
}

/// Waits until a kind of object exists and may be read.
async fn wait_for<K>(client: &Client, namespace: Option<&str>, waits_for: &watch::Sender<String>)
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + CustomResourceExt
        + Clone
        + DeserializeOwned
        + Debug,
{
    let api: Api<DeserializeGuard<K>> = scoped(client, namespace);
    loop {
        let name = K::crd_name();
        let waits = match api.list_metadata(&ListParams::default().limit(1)).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if status.code == 404 => {
                format!("the CustomResourceDefinition {name}: apply it (`imcluster crds` prints it)")
            }
            Err(kube::Error::Api(status)) if status.code == 403 => {
                format!("the right to list {name}: {}", status.message)
            }
            Err(error) => format!("the Kubernetes API: {error}"),
        };
        if waits_for.send_if_modified(|shown| std::mem::replace(shown, waits.clone()) != waits) {
            tracing::warn!("waits for {waits}");
        }
        tokio::time::sleep(CRD_RETRY).await;
    }
}

/// Reconciles whenever, and only while, this replica holds the Lease.
async fn lead_when_it_is_ours(
    mut leadership: watch::Receiver<Leadership>,
    shared: Arc<Shared>,
    namespace: Option<String>,
) {
    let metrics = &shared.metrics;
    loop {
        metrics.statuses.set_leading(false);
        if leadership.wait_for(|leadership| *leadership == Leadership::Leading).await.is_err() {
            return;
        }
        metrics.statuses.set_leading(true);
        let (clusters, writer) = reflector::store();
        let context = Arc::new(Context::new(shared.clone(), clusters.clone()));
        tokio::select! {
            // With the context every keeper, and with it every loop that decides, is dropped.
            () = reconcile_all(context, clusters, writer, namespace.clone()) => return,
            lost = leadership.wait_for(|leadership| *leadership != Leadership::Leading) => if lost.is_err() { return },
        }
        metrics.clusters.set(0);
    }
}

/// What a change of an ImCluster is looked at for: not its status, which is our own.
fn meaning(object: &DeserializeGuard<ImCluster>) -> Option<u64> {
    let meta = object.meta();
    let mut hasher = DefaultHasher::new();
    (meta.generation, &meta.annotations, meta.deletion_timestamp.is_some()).hash(&mut hasher);
    Some(hasher.finish())
}

type Request = ReconcileRequest<DeserializeGuard<ImCluster>>;

/// Follows all ImClusters and their children, for ever; `writer` keeps `store`.
async fn reconcile_all(
    context: Arc<Context>,
    store: Store<DeserializeGuard<ImCluster>>,
    writer: Writer<DeserializeGuard<ImCluster>>,
    namespace: Option<String>,
) {
    let client = context.client().clone();
    let (seen, forgets) = (store.clone(), context.clone());
    let clusters = reflector(writer, watcher(scoped(&client, namespace.as_deref()), watcher::Config::default()))
        .default_backoff()
        .inspect_ok(move |event| match event {
            Event::Delete(object) => forgets.forget(&key_of(object)),
            // Who went while nobody watched.
            Event::InitDone => {
                let there: HashSet<_> = seen.state().iter().map(|object| key_of(object)).collect();
                forgets.keep_only(|key| there.contains(key));
            }
            Event::Apply(_) | Event::Init | Event::InitApply(_) => {}
        })
        .applied_objects()
        .predicate_filter(meaning, PredicateConfig::default())
        .map_ok(|object| Request::from(ObjectRef::from_obj(&object)));
    let requests = select_all([
        clusters.boxed(),
        children::<Service>(&client, namespace.as_deref(), CLUSTER_LABEL),
        children::<ServiceAccount>(&client, namespace.as_deref(), CLUSTER_LABEL),
        children::<StatefulSet>(&client, namespace.as_deref(), CLUSTER_LABEL),
        children::<PodDisruptionBudget>(&client, namespace.as_deref(), CLUSTER_LABEL),
        children::<NetworkPolicy>(&client, namespace.as_deref(), CLUSTER_LABEL),
        // Those that pods are configured with.
        children::<ConfigMap>(&client, namespace.as_deref(), TIER_LABEL),
        secrets(context.clone()),
    ]);
    let config = controller::Config::default().concurrency(CONCURRENCY).debounce(DEBOUNCE);
    let look = |object, context| Box::pin(reconcile(object, context));
    applier(look, on_error, context, store, requests, config)
        .for_each(|outcome| async move {
            match outcome {
                Ok((object, _)) => tracing::debug!(%object, "looked at"),
                // It went meanwhile.
                Err(controller::Error::ObjectNotFound(_)) => {}
                Err(error) => tracing::warn!("{error}"),
            }
        })
        .await;
}

/// Each ImCluster of which a Secret changes.
fn secrets(context: Arc<Context>) -> BoxStream<'static, Result<Request, watcher::Error>> {
    let mut looks = interval(secrets::LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let changes = stream::unfold((context, looks), |(context, mut looks)| async move {
        looks.tick().await;
        let changed = context.secrets().changed(context.client()).await;
        Some((stream::iter(changed), (context, looks)))
    });
    let request = |ClusterKey(key): ClusterKey| {
        let (namespace, name) = key.split_once('/')?;
        Some(Ok(Request::from(ObjectRef::new(name).within(namespace))))
    };
    changes.flatten().filter_map(move |key| std::future::ready(request(key))).boxed()
}

/// The ImCluster of each child of that kind, with that label, that changes, or goes.
fn children<K>(
    client: &Client,
    namespace: Option<&str>,
    label: &str,
) -> BoxStream<'static, Result<Request, watcher::Error>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    let ours = watcher::Config::default().labels(&format!("{MANAGED_SELECTOR},{label}"));
    let kind = ApiResource::erase::<K>(&());
    let api: Api<PartialObjectMeta<DynamicObject>> = match namespace {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &kind),
        None => Api::all_with(client.clone(), &kind),
    };
    watcher(api, ours)
        .default_backoff()
        .touched_objects()
        .try_filter_map(|child| async move {
            let owner = child.owner_references().iter().find(|owner| owner.kind == ImCluster::kind(&()));
            let namespace = child.namespace();
            Ok(owner
                .zip(namespace)
                .map(|(owner, namespace)| Request::from(ObjectRef::new(&owner.name).within(&namespace))))
        })
        .boxed()
}
