//! The operator with a fleet of ImClusters on a real API server: what it costs to bring them up, and what it costs while nothing
//! happens. `e2e/cluster/fleet.sh` brings up the API server (etcd and kube-apiserver alone) and runs this; without it this does nothing.
//!
//! Simulated are pods, which are made ready by a few lines in place of controllers, scheduler and kubelets, and members, which speak the
//! control protocol as real ones do: one connection each, a heartbeat each 500 ms, and shards that are acquired by compare-and-set.

use futures::stream::{StreamExt, TryStreamExt};
use im_crds::{ConditionStatus, ImCluster, ShardMap};
use im_proto::control::{self as wire, command::Command, report::Report as Kind};
use im_proto::dial::ControlDialer;
use im_proto::ids::MemberId;
use im_proto::token::SharedToken;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Pod, Secret};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, CustomResourceExt, ResourceExt};
use parking_lot::Mutex;
use serde_json::json;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command as Program};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;

type AnyError = Box<dyn Error + Send + Sync>;
type TestResult<T = ()> = Result<T, AnyError>;

const NAMESPACE: &str = "fleet";
const SHARDS: u32 = 256;
/// Of the members of each ImCluster, so many of five are gateways.
const GATEWAYS_OF_FIVE: u32 = 2;
/// Requests to the API server that the simulation has under way at a time.
const REQUESTS_MAX: usize = 32;
/// Members that dial at a time: a fleet does not begin at one moment.
const DIALS_MAX: usize = 64;
const BEAT: Duration = Duration::from_millis(500);
/// Clock ticks of `/proc/PID/stat` a second, on every Linux that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

fn from_env(name: &str, default: u32) -> TestResult<u32> {
    match std::env::var(name) {
        Ok(text) => Ok(text.parse().map_err(|error| format!("{name}={text}: {error}"))?),
        Err(_) => Ok(default),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_at_rest_costs_little_and_writes_nothing() -> TestResult {
    let Ok(operator) = std::env::var("IM_FLEET_OPERATOR") else {
        println!("SKIPPED: it needs an API server of its own; run e2e/cluster/fleet.sh");
        return Ok(());
    };
    let (clusters, members) = (from_env("IM_FLEET_CLUSTERS", 200)?, from_env("IM_FLEET_MEMBERS", 50)?);
    let (settle, rest) = (from_env("IM_FLEET_SETTLE_S", 110)?, from_env("IM_FLEET_REST_S", 60)?);
    let client = Client::try_default().await?;
    install(&client).await?;

    // What the API server asks of itself is not the operator's.
    let own = requests(&client).await?;
    let (began, own_began) = (Instant::now(), own);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let own = Requests::between(&own_began, &requests(&client).await?).per_second(began.elapsed());

    let operator = Operator::start(&PathBuf::from(operator))?;
    let fleet = Fleet::new(client.clone(), operator.control);
    let _pods = AbortOnDropHandle::new(tokio::spawn(fleet.clone().follow_deployments()));
    let (began, counted) = (Instant::now(), requests(&client).await?);
    create_clusters(&client, clusters, members).await?;
    let ready = wait_ready(&client, clusters, &operator).await;
    let usage = operator.usage()?;
    println!(
        "{clusters} ImClusters x {members} members: all Ready {:.0?} after the first was created; until then the operator used {:.1} s of CPU",
        began.elapsed(),
        usage.cpu_s
    );
    Requests::between(&counted, &requests(&client).await?).print("requests until then, the simulation's own too", 12);
    ready?;

    // Shards that were given out while members were still coming move once more, after their cooldown of a minute.
    tokio::time::sleep(Duration::from_secs(settle.into())).await;
    let (before, usage_before, writes_before) = (requests(&client).await?, operator.usage()?, operator.writes().await?);
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(rest.into())).await;
    let elapsed = began.elapsed();
    let (usage, writes) = (operator.usage()?, operator.writes().await?);
    let at_rest = Requests::between(&before, &requests(&client).await?);
    println!("at rest, over {elapsed:.0?}:");
    println!(
        "  operator: {:.3} cores, {:.0} MiB resident; {} members connected",
        (usage.cpu_s - usage_before.cpu_s) / elapsed.as_secs_f64(),
        usage.resident_bytes as f64 / f64::from(1 << 20),
        fleet.connected.borrow().len(),
    );
    println!("  requests: {:.1}/s, of them the API server's own: {own:.1}/s", at_rest.per_second(elapsed));
    at_rest.print("by kind", 12);
    let wrote: BTreeMap<_, _> = writes
        .iter()
        .filter_map(|(kind, count)| {
            let more = count - writes_before.get(kind).copied().unwrap_or(0.0);
            (more > 0.0).then_some((kind.clone(), more))
        })
        .collect();
    println!("  the operator's writes besides its Lease: {wrote:?}");
    let lost = fleet.lost.lock().clone();
    if !lost.is_empty() {
        println!("  streams that ended: {lost:?}");
    }
    drop(operator);
    if !wrote.is_empty() {
        return Err(format!("nothing changes, and the operator writes: {wrote:?}").into());
    }
    Ok(())
}

// ---- the API server --------------------------------------------------------------------------------------------------------

/// The definitions, and an empty namespace.
async fn install(client: &Client) -> TestResult {
    let definitions: Api<CustomResourceDefinition> = Api::all(client.clone());
    let apply = PatchParams::apply("fleet").force();
    for definition in [ImCluster::crd(), ShardMap::crd()] {
        definitions.patch(&definition.name_any(), &apply, &Patch::Apply(&definition)).await?;
        let name = definition.name_any();
        loop {
            let established = definitions.get(&name).await?.status.and_then(|status| status.conditions);
            let mut conditions = established.into_iter().flatten();
            if conditions.any(|condition| condition.type_ == "Established" && condition.status == "True") {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    namespaces.patch(NAMESPACE, &apply, &Patch::Apply(&namespace)).await?;
    let clusters: Api<ImCluster> = Api::namespaced(client.clone(), NAMESPACE);
    if !clusters.list_metadata(&ListParams::default().limit(1)).await?.items.is_empty() {
        clusters.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        return Err("there were ImClusters of an earlier run: begin with a new API server".into());
    }
    Ok(())
}

async fn create_clusters(client: &Client, clusters: u32, members: u32) -> TestResult {
    let api: Api<ImCluster> = Api::namespaced(client.clone(), NAMESPACE);
    let gateways = (members * GATEWAYS_OF_FIVE / 5).max(1);
    for index in 0..clusters {
        let cluster = serde_json::from_value(json!({
            "apiVersion": "imcluster.dev/v1alpha1",
            "kind": "ImCluster",
            "metadata": {"name": format!("chat-{index}")},
            "spec": {
                "auth": {"insecure": {}},
                "gateway": {"replicas": gateways},
                "business": {"replicas": (members - gateways).max(1), "shards": SHARDS},
            },
        }))?;
        api.create(&PostParams::default(), &cluster).await?;
    }
    Ok(())
}

async fn wait_ready(client: &Client, clusters: u32, operator: &Operator) -> TestResult {
    let api: Api<ImCluster> = Api::namespaced(client.clone(), NAMESPACE);
    let give_up = Instant::now() + Duration::from_secs(300);
    loop {
        let all = api.list(&ListParams::default()).await?;
        let settled = |cluster: &&ImCluster| {
            cluster.status.as_ref().is_some_and(|status| {
                let is = |kind: &str, wanted: ConditionStatus| {
                    status.conditions.iter().any(|condition| condition.kind == kind && condition.status == wanted)
                };
                is("Ready", ConditionStatus::True)
                    && is("Progressing", ConditionStatus::False)
                    && is("Rebalancing", ConditionStatus::False)
            })
        };
        let ready = all.items.iter().filter(settled).count();
        if ready == clusters as usize {
            return Ok(());
        }
        if Instant::now() > give_up {
            return Err(
                format!("{ready} of {clusters} are ready; the operator's log: {}", operator.log.display()).into()
            );
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

/// Requests that the API server answered, by verb and resource.
struct Requests(BTreeMap<(String, String), f64>);

impl Requests {
    fn between(before: &Self, after: &Self) -> Self {
        let more = |(key, count): (&(String, String), &f64)| {
            let more = count - before.0.get(key).copied().unwrap_or(0.0);
            (more > 0.0).then(|| (key.clone(), more))
        };
        Self(after.0.iter().filter_map(more).collect())
    }

    fn per_second(&self, elapsed: Duration) -> f64 {
        self.0.values().sum::<f64>() / elapsed.as_secs_f64()
    }

    fn print(&self, title: &str, most: usize) {
        let mut rows: Vec<_> = self.0.iter().collect();
        rows.sort_by(|a, b| b.1.total_cmp(a.1));
        let rows: Vec<_> = rows.into_iter().take(most).map(|((verb, what), n)| format!("{verb} {what} {n}")).collect();
        println!("  {title}: {}", rows.join(", "));
    }
}

/// Counts of all requests but those for the counts themselves.
async fn requests(client: &Client) -> TestResult<Requests> {
    let page = client.request_text(hyper::Request::get("/metrics").body(Vec::new())?).await?;
    let mut counts = BTreeMap::new();
    for line in page.lines().filter(|line| line.starts_with("apiserver_request_total{")) {
        let label = |name: &str| {
            let (_, rest) = line.split_once(&format!("{name}=\""))?;
            Some(rest.split_once('"')?.0.to_owned())
        };
        let count = line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok());
        if let (Some(verb), Some(resource), Some(count)) = (label("verb"), label("resource"), count)
            && !resource.is_empty()
        {
            let part = label("subresource").filter(|part| !part.is_empty()).map(|part| format!("/{part}"));
            *counts.entry((verb, format!("{resource}{}", part.unwrap_or_default()))).or_insert(0.0) += count;
        }
    }
    Ok(Requests(counts))
}

// ---- the operator ----------------------------------------------------------------------------------------------------------

struct Operator {
    child: Child,
    control: SocketAddr,
    http: SocketAddr,
    log: PathBuf,
}

struct Usage {
    cpu_s: f64,
    resident_bytes: u64,
}

impl Operator {
    fn start(program: &PathBuf) -> TestResult<Self> {
        let free = || std::net::TcpListener::bind("127.0.0.1:0")?.local_addr();
        let (control, http) = (free()?, free()?);
        let log = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fleet-operator.log");
        let child = Program::new(program)
            .args(["operator", "--image=localhost/none", "--pod-name=operator-0", "--pod-ip=127.0.0.1"])
            .args([format!("--namespace={NAMESPACE}"), format!("--lease-namespace={NAMESPACE}")])
            .args([format!("--control-address={control}"), format!("--control-service={control}")])
            .arg(format!("--http-address={http}"))
            .env("RUST_LOG", "warn")
            .stderr(fs::File::create(&log)?)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { child, control, http, log })
    }

    fn usage(&self) -> TestResult<Usage> {
        let pid = self.child.id().ok_or("the operator ended")?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // utime and stime are the 12th and 13th fields after the name, which may hold anything but ends with the last parenthesis.
        let (_, fields) = stat.rsplit_once(')').ok_or("no name in stat")?;
        let ticks: f64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let kibibytes: u64 = resident.ok_or("no VmRSS in status")?.parse()?;
        Ok(Usage { cpu_s: ticks / TICKS_PER_SECOND, resident_bytes: kibibytes * 1_024 })
    }

    /// Its writes so far, by kind of object; the Lease is not among them.
    async fn writes(&self) -> TestResult<BTreeMap<String, f64>> {
        let stream = tokio::net::TcpStream::connect(self.http).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(hyper_util::rt::TokioIo::new(stream)).await?;
        let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
        let request = hyper::Request::get("/metrics").header("host", "operator");
        let answer = sender.send_request(request.body(http_body_util::Empty::<bytes::Bytes>::new())?).await?;
        let body = http_body_util::BodyExt::collect(answer.into_body()).await?.to_bytes();
        let page = String::from_utf8(body.to_vec())?;
        let count = |line: &str| {
            let (kind, count) = line.strip_prefix("imcluster_kubernetes_writes_total{kind=\"")?.split_once("\"} ")?;
            Some((kind.to_owned(), count.parse().ok()?))
        };
        Ok(page.lines().filter_map(count).collect())
    }
}

// ---- pods and members ------------------------------------------------------------------------------------------------------

/// The fencing rows of one ImCluster's store: epoch and owner of each shard.
type Rows = Arc<Mutex<Vec<(u64, String)>>>;

struct Fleet {
    client: Client,
    control: SocketAddr,
    requests: Semaphore,
    dials: Arc<Semaphore>,
    stores: Mutex<HashMap<String, Rows>>,
    connected: watch::Sender<HashSet<String>>,
    /// Why streams ended, and how often.
    lost: Mutex<BTreeMap<String, u32>>,
}

impl Fleet {
    fn new(client: Client, control: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            client,
            control,
            requests: Semaphore::new(REQUESTS_MAX),
            dials: Arc::new(Semaphore::new(DIALS_MAX)),
            stores: Mutex::default(),
            connected: watch::Sender::default(),
            lost: Mutex::default(),
        })
    }

    /// Makes each Deployment's pods, all of them ready, with a member in each. Nothing ever gets smaller here.
    async fn follow_deployments(self: Arc<Self>) {
        let api: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut changes = watcher(api, watcher::Config::default()).default_backoff().applied_objects().boxed();
        let (mut made, mut members) = (HashMap::<String, i32>::new(), JoinSet::new());
        loop {
            match changes.try_next().await {
                Ok(Some(deployment)) => {
                    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
                    let deployment = Arc::new(deployment);
                    let made = made.entry(deployment.name_any()).or_default();
                    for index in std::mem::replace(made, wanted.max(*made))..wanted {
                        members.spawn(self.clone().run_pod(deployment.clone(), index));
                    }
                }
                Ok(None) => return,
                Err(error) => eprintln!("the Deployments: {error}"),
            }
        }
    }

    async fn run_pod(self: Arc<Self>, deployment: Arc<Deployment>, index: i32) {
        if let Err(error) = self.clone().try_run_pod(&deployment, index).await {
            eprintln!("pod {index} of {}: {error}", deployment.name_any());
        }
    }

    async fn try_run_pod(self: Arc<Self>, deployment: &Deployment, index: i32) -> TestResult {
        let labels = deployment.labels();
        let label = |key: &str| labels.get(key).cloned().ok_or_else(|| format!("no label {key}"));
        let (cluster, tier) = (label("imcluster.dev/cluster")?, label("imcluster.dev/tier")?);
        let template = deployment.spec.as_ref().map(|spec| &spec.template).ok_or("no template")?;
        let name = format!("{}-{index}", deployment.name_any());
        let mut pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": template.metadata, "spec": template.spec});
        pod["metadata"]["name"] = json!(name);
        pod["spec"]["nodeName"] = json!("node-0");
        let api: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        let permit = self.requests.acquire().await?;
        let uid = api.create(&PostParams::default(), &serde_json::from_value(pod)?).await?.uid().ok_or("no UID")?;
        let now = "2026-01-01T00:00:00Z";
        let status = json!({"status": {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
            "containerStatuses": [{
                "name": tier, "image": "none", "imageID": "none", "ready": true, "restartCount": 0,
                "state": {"running": {"startedAt": now}},
            }],
        }});
        api.patch_status(&name, &PatchParams::default(), &Patch::Merge(&status)).await?;
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), NAMESPACE);
        let secret = secrets.get(&format!("{cluster}-tokens")).await?;
        drop(permit);
        let token = secret.data.as_ref().and_then(|data| data.get("link-token")).ok_or("no token")?;
        let token = SharedToken::fixed(std::str::from_utf8(&token.0)?)?;
        let fresh = || Arc::new(Mutex::new(vec![(0, String::new()); SHARDS as usize]));
        let rows = self.stores.lock().entry(cluster.clone()).or_insert_with(fresh).clone();
        let member = Member {
            me: MemberId::new(&name, rand::random())?,
            role: if tier == "gateway" { wire::Role::Gateway } else { wire::Role::Business },
            instance: uid,
            rows,
        };
        let key = format!("{NAMESPACE}/{cluster}");
        let mut dialer = ControlDialer::new(vec![self.control.to_string()], Some(&key), token);
        loop {
            let began = Instant::now();
            let ended = member.join(&mut dialer, &self).await;
            let left = self.connected.send_if_modified(|connected| connected.remove(&name));
            if left && let Err(error) = ended {
                *self.lost.lock().entry(error.to_string()).or_default() += 1;
            }
            dialer.pause(began.elapsed()).await;
        }
    }
}

struct Member {
    me: MemberId,
    role: wire::Role,
    instance: String,
    rows: Rows,
}

impl Member {
    fn held(&self) -> Vec<wire::ShardEpoch> {
        if self.role == wire::Role::Gateway {
            return Vec::new();
        }
        let rows = self.rows.lock();
        let mine = rows.iter().zip(0..).filter(|((_, owner), _)| owner == self.me.as_str());
        mine.map(|((epoch, _), shard)| wire::ShardEpoch { shard, epoch: *epoch }).collect()
    }

    async fn join(&self, dialer: &mut ControlDialer, fleet: &Fleet) -> TestResult {
        let permit = fleet.dials.clone().acquire_owned().await?;
        let (_, mut client) = dialer.connect().await?;
        let (reports, stream) = mpsc::channel(16);
        let report = |kind| wire::Report { report: Some(kind) };
        let hello = wire::Hello {
            member: self.me.to_string(),
            role: self.role.into(),
            pid: 1,
            link_address: "127.0.0.1:1".to_owned(),
            http_address: "127.0.0.1:1".to_owned(),
            instance: self.instance.clone(),
            held: self.held(),
            ..Default::default()
        };
        reports.send(report(Kind::Hello(hello))).await?;
        let mut commands = client.join(dialer.request(ReceiverStream::new(stream))).await?.into_inner();
        fleet.connected.send_if_modified(|connected| connected.insert(self.me.name().to_owned()));
        drop(permit);
        let (mut term, mut held) = (0, self.held());
        let mut beats = tokio::time::interval(BEAT);
        loop {
            let command = tokio::select! {
                command = commands.message() => command?.ok_or("the stream ended")?,
                _ = beats.tick() => {
                    let load = |held: &wire::ShardEpoch| wire::ShardLoad { shard: held.shard, per_second: 1.0 };
                    let beat = wire::Heartbeat {
                        loads: held.iter().map(load).collect(),
                        held: held.clone(),
                        store_ok: true,
                        term,
                        connections: 1_000,
                        ..Default::default()
                    };
                    reports.try_send(report(Kind::Heartbeat(beat)))?;
                    continue;
                }
            };
            term = term.max(command.term);
            let answers = self.obey(command.command.ok_or("an empty command")?);
            held = self.held();
            for answer in answers {
                reports.send(report(answer)).await?;
            }
        }
    }

    fn obey(&self, command: Command) -> Vec<Kind> {
        let mut rows = self.rows.lock();
        match command {
            Command::Acquire(acquire) => {
                let (mut won, mut lost) = (Vec::new(), Vec::new());
                for wire::ShardRow { shard, epoch, owner } in acquire.expected {
                    let Some(row) = rows.get_mut(shard as usize) else { continue };
                    if *row == (epoch, owner) {
                        *row = (epoch + 1, self.me.to_string());
                        won.push(wire::ShardEpoch { shard, epoch: row.0 });
                    } else {
                        lost.push(wire::ShardRow { shard, epoch: row.0, owner: row.1.clone() });
                    }
                }
                let won = (!won.is_empty()).then_some(Kind::Acquired(wire::Acquired { shards: won }));
                let lost = (!lost.is_empty()).then_some(Kind::AcquireLost(wire::AcquireLost { rows: lost }));
                won.into_iter().chain(lost).collect()
            }
            Command::Release(wire::Release { shard, epoch, .. }) => {
                let Some(row) = rows.get_mut(shard as usize).filter(|row| **row == (epoch, self.me.to_string())) else {
                    return Vec::new();
                };
                row.1.clear();
                vec![Kind::Released(wire::Released { shards: vec![wire::ShardEpoch { shard, epoch }] })]
            }
            _ => Vec::new(),
        }
    }
}
