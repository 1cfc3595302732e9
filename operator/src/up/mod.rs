//! `imcluster up`: the supervisor of a cluster on one machine.
//!
//! It starts the store and control, starts and stops gateways and business members as control asks it to over a unix
//! socket, restarts who dies, follows edits of FILE, and takes all of them with it when it ends. It decides nothing about
//! chat, load or shards, so control may die and come back at any time.
//!
//! Everything happens in one loop on the main thread. That is more than taste: the kernel sends a child its parent-death
//! signal when the *thread* that spawned it ends.

pub mod data_dir;
pub mod follow;
pub mod restart;

use crate::platform::process::{Reply, Request, STOP_GRACE, index_of, store_config};
use crate::platform::{Ordered, Process, ProcessState, Role, Tier, View};
use data_dir::{DataDir, DataDirError, Endpoints, write_atomically};
use follow::{Follower, LOOK_INTERVAL, Verdict};
use im_crds::{Auth, ImCluster, Storage};
use restart::Backoff;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, sleep_until};

/// The longest request line.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Requests and exits that wait for the loop.
const EVENTS_MAX: usize = 256;
/// The order of the end: who asks for starts first, then who talks to clients, then who serves those.
const STOP_ORDER: [Role; 4] = [Role::Control, Role::Gateway, Role::Business, Role::Store];

/// What `imcluster up` was told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The ImCluster.
    pub file: PathBuf,
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where the console listens, `IP:PORT` or `off`.
    pub console: String,
    /// Where `im-gateway` and `im-business` lie.
    pub programs: PathBuf,
    /// This program.
    pub imcluster: PathBuf,
}

/// Why `imcluster up` does not start.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    /// FILE can't be read.
    #[error("{path}: {source}")]
    File {
        /// FILE.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// FILE is not an ImCluster that can be run.
    #[error("{path} can't be run:\n{reasons}")]
    Refused {
        /// FILE.
        path: PathBuf,
        /// One indented line per rule that is broken.
        reasons: String,
    },
    /// The data directory can't be used.
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    /// A socket or a signal handler can't be made.
    #[error("{what}: {source}")]
    System {
        /// Which.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// Becomes `program` in the wrapper process that the supervisor spawns: dies with `parent` from here on, whatever kills it.
///
/// Returns only what went wrong.
pub fn become_child(parent: u32, program: &Path, args: &[String]) -> std::io::Error {
    if let Err(errno) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return errno.into();
    }
    // The parent may have died before the line above.
    if getppid().map(|pid| pid.as_raw_nonzero().get() as u32) != Some(parent) {
        return std::io::Error::other("the supervisor is gone");
    }
    std::process::Command::new(program).args(args).exec()
}

/// What the loop hears.
enum Event {
    Exited { name: String, status: std::io::Result<ExitStatus> },
    Request { request: Request, reply: oneshot::Sender<Reply> },
}

enum Phase {
    Running { pid: u32, since: Instant, signals: mpsc::Sender<Signal>, stopping: Option<Stopping> },
    Waiting { until: Instant },
}

struct Stopping {
    kill_at: Instant,
    killed: bool,
}

/// A process that is to run.
struct Child {
    role: Role,
    program: PathBuf,
    args: Vec<String>,
    template: String,
    /// Where it listens whoever runs; what a running process adds is in `described`.
    addresses: BTreeMap<String, String>,
    described: BTreeMap<String, String>,
    backoff: Backoff,
    starts: u32,
    phase: Phase,
}

struct Supervisor {
    options: Options,
    data: DataDir,
    endpoints: Endpoints,
    cluster: ImCluster,
    children: BTreeMap<String, Child>,
    events: mpsc::Sender<Event>,
    view: watch::Sender<View>,
    generation: u64,
    file_error: Option<String>,
}

/// Runs the cluster of `options.file` until SIGINT, SIGTERM or SIGHUP, then ends it in order. Must be awaited on the main
/// thread's own runtime.
///
/// # Errors
/// [`UpError`] if it can't start. Once it runs, it goes on.
pub async fn run(options: Options) -> Result<(), UpError> {
    let text = std::fs::read_to_string(&options.file)
        .map_err(|source| UpError::File { path: options.file.clone(), source })?;
    let refused = |reasons: String| UpError::Refused { path: options.file.clone(), reasons: indent(&reasons) };
    follow::judge(&text, None).map_err(refused)?;
    let data = DataDir::create(&options.data_dir)?;
    let _lock = data.lock()?;
    // What lies in this directory was made by the ImCluster that ran here before.
    let cluster = *follow::judge(&text, data.last_good_cluster().as_ref()).map_err(refused)?;
    let at = |what| move |source| UpError::System { what, source };
    write_atomically(&data.cluster_yaml(), text.as_bytes()).map_err(at("run/imcluster.yaml"))?;
    let endpoints = data.choose_endpoints()?;
    let socket = data.supervisor_socket();
    for stale in [&socket, &data.status_socket(), &data.console_json()] {
        let _ = std::fs::remove_file(stale);
    }
    let listener = UnixListener::bind(&socket).map_err(at("run/supervisor.sock"))?;
    let mut interrupts = signal(SignalKind::interrupt()).map_err(at("SIGINT"))?;
    let mut terminations = signal(SignalKind::terminate()).map_err(at("SIGTERM"))?;
    let mut hangups = signal(SignalKind::hangup()).map_err(at("SIGHUP"))?;

    let (events, mut inbox) = mpsc::channel(EVENTS_MAX);
    let (view, _) = watch::channel(View::default());
    tokio::spawn(serve(listener, events.clone(), view.subscribe()));
    let mut follower = Follower::new(text, cluster.clone());
    let mut supervisor = Supervisor {
        options,
        data,
        endpoints,
        cluster,
        children: BTreeMap::new(),
        events,
        view,
        generation: 1,
        file_error: None,
    };
    supervisor.greet();
    supervisor.start_own()?;
    supervisor.announce();

    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let due = supervisor.next_due();
        tokio::select! {
            _ = interrupts.recv() => break,
            _ = terminations.recv() => break,
            _ = hangups.recv() => break,
            Some(event) = inbox.recv() => supervisor.on_event(event),
            () = sleep_until(due.into()) => supervisor.on_due(Instant::now()),
            _ = looks.tick() => {
                if let Some(verdict) = follower.look(std::fs::read_to_string(&supervisor.options.file)) {
                    supervisor.on_verdict(verdict);
                }
            }
        }
    }

    say("ending, in order; once more to end at once");
    for role in STOP_ORDER {
        supervisor.stop_all(role, Instant::now() + STOP_GRACE);
        while supervisor.children.values().any(|child| child.role == role) {
            let due = supervisor.next_due();
            tokio::select! {
                _ = interrupts.recv() => supervisor.kill_all(),
                _ = terminations.recv() => supervisor.kill_all(),
                Some(event) = inbox.recv() => match event {
                    Event::Request { reply, .. } => {
                        let _ = reply.send(Reply::Refused("the supervisor ends".to_owned()));
                    }
                    exited => supervisor.on_event(exited),
                },
                () = sleep_until(due.into()) => supervisor.on_due(Instant::now()),
            }
        }
    }
    let _ = std::fs::remove_file(socket);
    say("all processes have ended");
    Ok(())
}

impl Supervisor {
    /// Says where everything is.
    fn greet(&self) {
        let spec = &self.cluster.spec;
        let access = &spec.access;
        let name = self.cluster.metadata.name.as_deref().unwrap_or_default();
        say(&format!("{name} runs until Ctrl-C; data, logs and members.json in {}", self.data.root().display()));
        let listeners = [
            ("MQTT", access.mqtt.as_ref().map(|listener| &listener.address)),
            ("MQTT over TLS", access.tls.as_ref().map(|listener| &listener.address)),
            ("MQTT over WebSocket", access.web_socket.as_ref().map(|listener| &listener.address)),
            ("HTTP API", Some(&access.http.address)),
            ("console", Some(&self.options.console).filter(|console| *console != "off")),
        ];
        let listeners = listeners.iter().filter_map(|(what, address)| Some(format!("{what} {}", (*address)?)));
        say(&listeners.collect::<Vec<_>>().join(", "));
        if matches!(spec.auth, Auth::Insecure(_)) {
            say("WARNING: auth is insecure, whoever says a name has it: for trying out only");
        }
    }

    /// Starts the processes that nobody asks for: the store, if it is ours, and control.
    fn start_own(&mut self) -> Result<(), UpError> {
        let endpoints = self.endpoints;
        if matches!(self.cluster.spec.storage, Storage::Embedded(_)) {
            let name = "store-0";
            let secrets = self.data.secrets()?;
            let config = store_config(name, &endpoints.store.to_string(), &self.data.store(), &secrets);
            let path = self.data.config(name);
            write_atomically(&path, format!("{config:#}\n").as_bytes())
                .map_err(|source| UpError::System { what: "run/store-0.json", source })?;
            let args = vec!["store".to_owned(), "--config".to_owned(), path.display().to_string()];
            let addresses = BTreeMap::from([("store".to_owned(), endpoints.store.to_string())]);
            let program = self.options.programs.join("im-business");
            self.add(name.to_owned(), Role::Store, program, args, String::new(), addresses);
        }
        let base = self.options.file.canonicalize().ok().and_then(|file| file.parent().map(Path::to_owned));
        let args = [
            "control",
            "--data-dir",
            &self.data.root().display().to_string(),
            "--console",
            &self.options.console,
            "--paths-from",
            &base.unwrap_or_default().display().to_string(),
        ];
        let addresses = BTreeMap::from([("control".to_owned(), endpoints.control.to_string())]);
        let args = args.map(str::to_owned).to_vec();
        self.add("control".to_owned(), Role::Control, self.options.imcluster.clone(), args, String::new(), addresses);
        Ok(())
    }

    fn add(
        &mut self,
        name: String,
        role: Role,
        program: PathBuf,
        args: Vec<String>,
        template: String,
        addresses: BTreeMap<String, String>,
    ) {
        let child = Child {
            role,
            program,
            args,
            template,
            addresses,
            described: BTreeMap::new(),
            backoff: Backoff::default(),
            starts: 0,
            phase: Phase::Waiting { until: Instant::now() },
        };
        self.children.insert(name.clone(), child);
        self.spawn(&name);
    }

    /// Starts a process that is due. One that can't be started counts as one that ended at once.
    fn spawn(&mut self, name: &str) {
        let Some(child) = self.children.get_mut(name) else { return };
        let log = match self.data.open_log(name).and_then(|log| {
            let errors = log.try_clone().map_err(|source| DataDirError::Io { path: "logs".into(), source })?;
            Ok((log, errors))
        }) {
            Ok(log) => log,
            Err(error) => return self.ended(name, &error),
        };
        if !child.program.is_file() {
            let problem =
                format!("{} does not exist: build it, or install it beside imcluster", child.program.display());
            return self.ended(name, &problem);
        }
        let spawned = Command::new(&self.options.imcluster)
            .args(["child", "--parent", &std::process::id().to_string(), "--"])
            .arg(&child.program)
            .args(&child.args)
            .stdin(Stdio::null())
            .stdout(log.0)
            .stderr(log.1)
            // Ctrl-C on the terminal is for the supervisor alone: it ends the others in order.
            .process_group(0)
            .spawn();
        let mut process = match spawned {
            Ok(process) => process,
            Err(error) => return self.ended(name, &error),
        };
        let Some(pid) = process.id() else { return self.ended(name, &"ended at once") };
        // Owned by the task that reaps it: a signal can't reach a stranger who got the same pid.
        let (signals, mut orders) = mpsc::channel::<Signal>(4);
        let (events, own_name) = (self.events.clone(), name.to_owned());
        tokio::spawn(async move {
            let status = loop {
                tokio::select! {
                    status = process.wait() => break status,
                    Some(order) = orders.recv() => {
                        if let Some(pid) = process.id().and_then(|pid| Pid::from_raw(pid as i32)) {
                            let _ = rustix::process::kill_process(pid, order);
                        }
                    }
                }
            };
            let _ = events.send(Event::Exited { name: own_name, status }).await;
        });
        child.starts += 1;
        child.phase = Phase::Running { pid, since: Instant::now(), signals, stopping: None };
        if child.starts == 1 {
            say(&format!("{name} started, pid {pid}"));
        } else {
            say(&format!("{name} started again, pid {pid}"));
        }
    }

    /// A process ended, or could not be started: forgets it if it was to stop, else lets it wait for its next start.
    fn ended(&mut self, name: &str, how: &dyn Display) {
        let Some(child) = self.children.get_mut(name) else { return };
        let now = Instant::now();
        let lived = match &child.phase {
            Phase::Running { stopping: Some(_), .. } => {
                self.children.remove(name);
                say(&format!("{name} stopped"));
                return;
            }
            Phase::Running { since, .. } => now.duration_since(*since),
            Phase::Waiting { .. } => Duration::ZERO,
        };
        let delay = child.backoff.ended(lived);
        child.described.clear();
        child.phase = Phase::Waiting { until: now + delay };
        let log = self.data.root().join(format!("logs/{name}.log"));
        say(&format!("{name} ended ({how}), starting it again in {delay:?}; its log: {}", log.display()));
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Exited { name, status } => {
                match status {
                    Ok(status) => self.ended(&name, &status),
                    Err(error) => self.ended(&name, &error),
                }
                // "At once" means before anybody sees it gone for long.
                self.on_due(Instant::now());
            }
            Event::Request { request, reply } => {
                let answer = self.on_request(request);
                self.announce();
                let _ = reply.send(answer);
            }
        }
    }

    fn on_request(&mut self, request: Request) -> Reply {
        match request {
            Request::Start { role, name, config, template } => {
                if index_of(role, &name).is_none() {
                    return Reply::Refused(format!("{name} is not a name of the {role} tier: use {role}-N"));
                }
                if self.children.contains_key(&name) {
                    return Reply::Refused(format!("{name} is in use"));
                }
                let (program, mut args) = match role.role() {
                    Role::Gateway => ("im-gateway", vec![]),
                    _ => ("im-business", vec!["serve".to_owned()]),
                };
                args.extend(["--config".to_owned(), config.display().to_string()]);
                let addresses = self.shared_addresses(role.role());
                self.add(name, role.role(), self.options.programs.join(program), args, template, addresses);
                Reply::Done {}
            }
            Request::Stop { name, grace_seconds } => match self.children.get(&name).map(|child| child.role) {
                Some(Role::Gateway | Role::Business) => {
                    let grace = Duration::try_from_secs_f64(grace_seconds).unwrap_or(STOP_GRACE);
                    self.stop(&name, Instant::now() + grace.min(Duration::from_secs(3600)));
                    Reply::Done {}
                }
                Some(role) => Reply::Refused(format!("{name} is the {role}, it ends with the supervisor")),
                None => Reply::Done {},
            },
            Request::Describe { name, instance, addresses } => {
                if let Some(child) = self.children.get_mut(&name)
                    && matches!(child.phase, Phase::Running { pid, .. } if pid.to_string() == instance)
                {
                    child.described = addresses;
                }
                Reply::Done {}
            }
            Request::List {} | Request::Watch {} => Reply::View(self.view()),
        }
    }

    /// Where every gateway listens: all of this machine share the clients' ports.
    fn shared_addresses(&self, role: Role) -> BTreeMap<String, String> {
        if role != Role::Gateway {
            return BTreeMap::new();
        }
        let access = &self.cluster.spec.access;
        [
            ("mqtt", access.mqtt.as_ref().map(|listener| &listener.address)),
            ("tls", access.tls.as_ref().map(|listener| &listener.address)),
            ("webSocket", access.web_socket.as_ref().map(|listener| &listener.address)),
            ("http", Some(&access.http.address)),
        ]
        .into_iter()
        .filter_map(|(purpose, address)| Some((purpose.to_owned(), address?.clone())))
        .collect()
    }

    fn on_verdict(&mut self, verdict: Verdict) {
        let file = self.options.file.display().to_string();
        match verdict {
            Verdict::Adopt { text, cluster } => match write_atomically(&self.data.cluster_yaml(), text.as_bytes()) {
                Ok(()) => {
                    self.cluster = *cluster;
                    self.generation += 1;
                    self.file_error = None;
                    say(&format!("{file} changed and is followed"));
                }
                Err(error) => {
                    say(&format!("{file} changed, but can't be handed on: {error}; save it again"));
                    self.file_error = Some(error.to_string());
                }
            },
            Verdict::Refuse(reasons) => {
                say(&format!("{file} is refused, what ran before goes on:\n{}", indent(&reasons)));
                self.file_error = Some(reasons);
            }
        }
        self.announce();
    }

    fn next_due(&self) -> Instant {
        let dues = self.children.values().filter_map(|child| match &child.phase {
            Phase::Waiting { until } => Some(*until),
            Phase::Running { stopping: Some(Stopping { kill_at, killed: false }), .. } => Some(*kill_at),
            Phase::Running { .. } => None,
        });
        dues.min().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    fn on_due(&mut self, now: Instant) {
        let mut starts = Vec::new();
        for (name, child) in &mut self.children {
            match &mut child.phase {
                Phase::Waiting { until } if *until <= now => starts.push(name.clone()),
                Phase::Running { signals, stopping: Some(stopping), .. }
                    if !stopping.killed && stopping.kill_at <= now =>
                {
                    stopping.killed = true;
                    let _ = signals.try_send(Signal::KILL);
                    say(&format!("{name} did not end in time and is killed"));
                }
                Phase::Waiting { .. } | Phase::Running { .. } => {}
            }
        }
        for name in starts {
            self.spawn(&name);
        }
        self.announce();
    }

    fn stop(&mut self, name: &str, kill_at: Instant) {
        let Some(child) = self.children.get_mut(name) else { return };
        match &mut child.phase {
            Phase::Waiting { .. } => {
                self.children.remove(name);
            }
            Phase::Running { signals, stopping: stopping @ None, .. } => {
                *stopping = Some(Stopping { kill_at, killed: false });
                let _ = signals.try_send(Signal::TERM);
                // A stopped process (SIGSTOP) would not hear SIGTERM before its time is over.
                let _ = signals.try_send(Signal::CONT);
            }
            Phase::Running { .. } => {}
        }
    }

    fn stop_all(&mut self, role: Role, kill_at: Instant) {
        let names: Vec<String> =
            self.children.iter().filter(|(_, child)| child.role == role).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.stop(&name, kill_at);
        }
        self.announce();
    }

    fn kill_all(&mut self) {
        for role in STOP_ORDER {
            self.stop_all(role, Instant::now());
        }
        let now = Instant::now();
        for child in self.children.values_mut() {
            if let Phase::Running { stopping: Some(stopping), .. } = &mut child.phase {
                stopping.kill_at = now;
            }
        }
        self.on_due(now);
    }

    fn view(&self) -> View {
        // Names are given from the lowest free one up, so the highest is the youngest, near enough.
        let mut children: Vec<(&String, &Child)> = self.children.iter().collect();
        children.sort_by_key(|(name, child)| (child.role, Tier::of(child.role).and_then(|tier| index_of(tier, name))));
        let processes = children
            .into_iter()
            .map(|(name, child)| {
                let (state, pid) = match &child.phase {
                    Phase::Running { pid, stopping: None, .. } => (ProcessState::Running, Some(*pid)),
                    Phase::Running { pid, stopping: Some(_), .. } => (ProcessState::Stopping, Some(*pid)),
                    Phase::Waiting { .. } => (ProcessState::Waiting, None),
                };
                let mut addresses = child.addresses.clone();
                addresses.extend(child.described.clone());
                Process {
                    name: name.clone(),
                    role: child.role,
                    state,
                    instance: pid.map(|pid| pid.to_string()),
                    pid,
                    starts: child.starts,
                    template: child.template.clone(),
                    addresses,
                }
            })
            .collect();
        let ordered = Ordered::default();
        View { processes, ordered, generation: self.generation, file_error: self.file_error.clone() }
    }

    /// Shows what is now to everybody who watches, and in `members.json`, if anything changed.
    fn announce(&mut self) {
        let view = self.view();
        let changed = self.view.send_if_modified(|shown| {
            let changed = *shown != view;
            if changed {
                *shown = view.clone();
            }
            changed
        });
        if changed && let Err(error) = self.data.write_members(&view) {
            say(&error.to_string());
        }
    }
}

/// Tells the user. The supervisor has no log of its own: this is what the terminal is for.
fn say(text: &str) {
    // Nobody reads it, or its disk is full: that must not end the supervisor.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("imcluster: {text}\n"));
}

fn indent(lines: &str) -> String {
    lines.lines().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
}

/// Answers at the supervisor's socket. Only its owner can reach it: the directory is closed to others.
async fn serve(listener: UnixListener, events: mpsc::Sender<Event>, view: watch::Receiver<View>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(serve_one(stream, events.clone(), view.clone()));
            }
            Err(error) => {
                say(&format!("run/supervisor.sock: {error}"));
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_one(stream: UnixStream, events: mpsc::Sender<Event>, mut view: watch::Receiver<View>) {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader.take(REQUEST_BYTES_MAX));
    let mut line = String::new();
    loop {
        line.clear();
        reader.get_mut().set_limit(REQUEST_BYTES_MAX);
        match reader.read_line(&mut line).await {
            Ok(read) if read > 0 && line.ends_with('\n') => {}
            // The end, half a line, or a line without end.
            Ok(_) | Err(_) => return,
        }
        let (request, watches) = match serde_json::from_str::<Request>(&line) {
            Ok(request) => {
                let watches = request == Request::Watch {};
                (request, watches)
            }
            Err(error) => {
                let _ = write_reply(&mut writer, &Reply::Refused(format!("not a request: {error}"))).await;
                return;
            }
        };
        if watches {
            view.mark_changed();
            while view.changed().await.is_ok() {
                let now = view.borrow_and_update().clone();
                if write_reply(&mut writer, &Reply::View(now)).await.is_err() {
                    return;
                }
            }
            return;
        }
        let (reply, answer) = oneshot::channel();
        if events.send(Event::Request { request, reply }).await.is_err() {
            return;
        }
        let Ok(answer) = answer.await else { return };
        if write_reply(&mut writer, &answer).await.is_err() {
            return;
        }
    }
}

async fn write_reply(writer: &mut (impl AsyncWriteExt + Unpin), reply: &Reply) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(reply).map_err(std::io::Error::other)?;
    line.push(b'\n');
    writer.write_all(&line).await
}
