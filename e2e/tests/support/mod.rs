//! The harness of the end-to-end tests: a whole system of real processes on loopback, started with `imcluster up`, and people
//! who chat on it while every message is written down.
//!
//! Nothing here sleeps to let something happen: each wait polls a condition and has a deadline.

#![allow(dead_code)] // Each test binary uses its part.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use im_e2e::{
    api::{Api, Credential},
    client::{Client, Message, Options, Outcome, PublishError, State},
    history::Report,
    view::Member,
    workload::{Journal, Schedule, Spacing},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::{
    process::{Child, Command},
    task::JoinHandle,
    time::{Instant, interval, sleep, sleep_until, timeout},
};
use tokio_util::task::AbortOnDropHandle;

/// What goes wrong in the harness ends the test, with the text telling what to look at.
pub type TestResult<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A system is ready within this time, also on a busy machine.
pub const READY_WITHIN: Duration = Duration::from_secs(60);
/// After Ctrl-C all processes are gone within this time.
pub const STOPPED_WITHIN: Duration = Duration::from_secs(30);
/// Lines of each log that a failure shows.
const LOG_LINES_SHOWN: usize = 40;

/// Polls until `condition` gives a value, with back-off, for at most `deadline`.
pub async fn eventually<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> TestResult<T> {
    let until = Instant::now() + deadline;
    let mut pause = Duration::from_millis(10);
    loop {
        if let Some(value) = condition().await {
            return Ok(value);
        }
        if Instant::now() >= until {
            return Err(format!("not within {deadline:?}: {what}").into());
        }
        sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

/// Where a program of this workspace was built: beside the test that runs, or where `CARGO_TARGET_DIR` says.
pub fn program(name: &str) -> TestResult<PathBuf> {
    let test = std::env::current_exe()?;
    let beside = test.parent().and_then(Path::parent).map(|profile| profile.join(name));
    let named = std::env::var_os("CARGO_TARGET_DIR").map(|target| Path::new(&target).join("debug").join(name));
    let found = beside.into_iter().chain(named).find(|path| path.is_file());
    found.ok_or_else(|| format!("{name} is not built; run `cargo build --workspace --bins` first").into())
}

/// What a test wants of its cluster; the rest is as in `examples/chat.yaml`.
#[derive(Clone, Debug)]
pub struct Template {
    /// Fewest and most gateways.
    pub gateways: (u32, u32),
    /// Fewest and most business members.
    pub business: (u32, u32),
    /// Shards.
    pub shards: u32,
    /// YAML of `storage`, in flow style.
    pub storage: String,
    /// YAML of `auth`, in flow style.
    pub auth: String,
    /// MQTT, WebSocket and HTTP ports.
    pub ports: [u16; 3],
    /// YAML of `access.tls`, in flow style, if TLS is listened for.
    pub tls: Option<String>,
    /// Where the data directory is to lie; else beside the cluster's file.
    pub data_dir: Option<PathBuf>,
    /// Neither scale nor rebalance.
    pub paused: bool,
}

impl Template {
    /// One gateway, one business member, 64 shards, insecure, embedded store, free ports.
    pub fn new() -> TestResult<Self> {
        Ok(Self {
            gateways: (1, 1),
            business: (1, 1),
            shards: 64,
            storage: "{embedded: {}}".to_owned(),
            auth: "{insecure: {}}".to_owned(),
            ports: free_ports()?,
            tls: None,
            data_dir: None,
            paused: false,
        })
    }

    /// A fixed number of each.
    pub fn with_members(mut self, gateways: u32, business: u32) -> Self {
        (self.gateways, self.business) = ((gateways, gateways), (business, business));
        self
    }

    /// The ImCluster as YAML.
    pub fn yaml(&self) -> String {
        let Self { gateways, business, shards, storage, auth, ports, tls, data_dir: _, paused } = self;
        let tls = tls.as_ref().map(|tls| format!("    tls: {tls}\n")).unwrap_or_default();
        let tier = |(minimum, maximum): (u32, u32), target: u32| {
            format!(
                "    autoscaling:
      minReplicas: {minimum}
      maxReplicas: {maximum}
      metrics:
        - type: BuiltIn
          builtIn: {{name: MessagesPerSecond, target: {{type: AverageValue, value: {target}}}}}
      behavior:
        scaleUp:
          policies: [{{type: Pods, value: 4, periodSeconds: 2}}]
        scaleDown:
          stabilizationWindowSeconds: 5
          policies: [{{type: Pods, value: 4, periodSeconds: 2}}]
"
            )
        };
        format!(
            "apiVersion: imcluster.dev/v1alpha1
kind: ImCluster
metadata:
  name: test
spec:
  paused: {paused}
  auth: {auth}
  access:
    mqtt: {{address: \"127.0.0.1:{}\"}}
    webSocket: {{address: \"127.0.0.1:{}\"}}
    http: {{address: \"127.0.0.1:{}\"}}
{tls}  storage: {storage}
  gateway:
{}    drain: {{rate: 200, notice: 1s, deadline: 60s}}
  business:
    shards: {shards}
{}    rebalance: {{movesInFlight: 32, cooldown: 1s}}
",
            ports[0],
            ports[1],
            ports[2],
            tier(*gateways, 1_000_000),
            tier(*business, 1_000_000)
        )
    }
}

/// Where ports of listeners are looked for: below what the kernel hands out for outgoing connections, so that none of those
/// takes the port of a gateway that is being restarted; and beside what `imcluster up` takes for control and store.
const PORTS: std::ops::Range<u16> = 10_000..15_000;

/// Three ports that nobody listens on. They are all held open together, so they differ; the members, which share a port
/// with SO_REUSEPORT, bind them right after.
pub fn free_ports() -> TestResult<[u16; 3]> {
    let mut random = rand::rng();
    let tried = (0..200).map(|_| TcpListener::bind(("127.0.0.1", random.random_range(PORTS))));
    let free: Vec<TcpListener> = tried.filter_map(Result::ok).take(3).collect();
    let ports = free.iter().map(|listener| Ok(listener.local_addr()?.port())).collect::<TestResult<Vec<u16>>>()?;
    ports.try_into().map_err(|_| format!("no three free ports in {PORTS:?}").into())
}

/// A running system. Dropped while a test fails, it shows its logs.
pub struct Cluster {
    template: Template,
    directory: PathBuf,
    supervisor: Child,
}

impl Cluster {
    /// Starts `imcluster up` in a fresh directory and waits until `/readyz` says yes.
    pub async fn start(template: Template) -> TestResult<Self> {
        Self::start_with(template, &[]).await
    }

    /// The same with environment variables (fail points).
    pub async fn start_with(template: Template, environment: &[(&str, &str)]) -> TestResult<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("im-e2e-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("cluster.yaml"), template.yaml())?;
        let output = fs::File::create(directory.join("up.log"))?;
        let supervisor = Command::new(program("imcluster")?)
            .arg("up")
            .arg(directory.join("cluster.yaml"))
            .arg("--data-dir")
            .arg(template.data_dir.clone().unwrap_or_else(|| directory.join("data")))
            // Its port is fixed by default, and tests of other programs may run beside this one.
            .args(["--console", "off"])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .kill_on_drop(true)
            .spawn()?;
        let mut cluster = Self { template, directory, supervisor };
        cluster.wait_ready().await?;
        Ok(cluster)
    }

    /// Waits until a gateway says that it is ready, and the wanted fewest members run.
    pub async fn wait_ready(&mut self) -> TestResult {
        let api = self.api();
        let (gateways, business) = (self.template.gateways.0 as usize, self.template.business.0 as usize);
        let data = self.data_dir();
        let supervisor = &mut self.supervisor;
        eventually("the cluster is ready", READY_WITHIN, async || {
            if let Ok(Some(status)) = supervisor.try_wait() {
                return Some(Err(format!("imcluster up ended with {status}; see its log above")));
            }
            let members = read_members(&data).unwrap_or_default();
            let count = |role: &str| members.iter().filter(|member| member.role == role).count();
            let enough = count("gateway") >= gateways && count("business") >= business;
            (enough && api.get("/readyz").await.is_ok()).then_some(Ok(()))
        })
        .await??;
        Ok(())
    }

    /// Where the members keep their data: `members.json`, `logs/`.
    pub fn data_dir(&self) -> PathBuf {
        self.template.data_dir.clone().unwrap_or_else(|| self.directory.join("data"))
    }

    /// The MQTT address.
    pub fn mqtt(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.template.ports[0]))
    }

    /// The WebSocket address.
    pub fn web_socket(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.template.ports[1]))
    }

    /// The HTTP address.
    pub fn http(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.template.ports[2]))
    }

    /// A client of the HTTP API.
    pub fn api(&self) -> Api {
        Api::new(self.http())
    }

    /// Who runs.
    pub fn members(&self) -> TestResult<Vec<Member>> {
        Ok(read_members(&self.data_dir())?)
    }

    /// Who runs in one role.
    pub fn members_of(&self, role: &str) -> TestResult<Vec<Member>> {
        let mut members = self.members()?;
        members.retain(|member| member.role == role);
        Ok(members)
    }

    /// Waits until exactly so many members of a role run.
    pub async fn wait_members(&self, role: &str, count: usize, deadline: Duration) -> TestResult<Vec<Member>> {
        eventually(&format!("{count} {role} members run"), deadline, async || {
            self.members_of(role).ok().filter(|members| members.len() == count)
        })
        .await
    }

    /// Sends a signal to a member: `Signal::KILL`, `Signal::STOP`, `Signal::CONT`.
    pub fn signal(&self, member: &Member, signal: Signal) -> TestResult {
        Ok(kill_process(pid(member.pid)?, signal)?)
    }

    /// Waits until a killed member runs again under another pid.
    pub async fn wait_restarted(&self, killed: &Member, deadline: Duration) -> TestResult<Member> {
        eventually(&format!("{} runs again", killed.name), deadline, async || {
            let members = self.members().ok()?;
            members.into_iter().find(|member| member.name == killed.name && member.pid != killed.pid)
        })
        .await
    }

    /// Edits the cluster's file, as a user would; it is replaced at once.
    pub fn edit(&mut self, change: impl FnOnce(&mut Template)) -> TestResult {
        change(&mut self.template);
        self.write_yaml(&self.template.yaml())
    }

    /// Replaces the cluster's file by any text, a bad one too.
    pub fn write_yaml(&self, yaml: &str) -> TestResult {
        let temporary = self.directory.join("cluster.yaml.new");
        fs::write(&temporary, yaml)?;
        fs::rename(temporary, self.directory.join("cluster.yaml"))?;
        Ok(())
    }

    /// The status document, as `imcluster status` gives it.
    pub async fn status(&self) -> TestResult<serde_json::Value> {
        let mut command = Command::new(program("imcluster")?);
        command.arg("status").arg("--data-dir").arg(self.data_dir()).args(["-o", "json"]).kill_on_drop(true);
        let output = timeout(Duration::from_secs(10), command.output()).await??;
        if !output.status.success() {
            return Err(format!("imcluster status: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What the supervisor printed.
    pub fn output(&self) -> String {
        fs::read_to_string(self.directory.join("up.log")).unwrap_or_default()
    }

    /// The end of each log.
    pub fn logs(&self) -> String {
        let mut files = vec![self.directory.join("up.log")];
        let logs = fs::read_dir(self.data_dir().join("logs")).into_iter().flatten().flatten();
        files.extend(logs.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|end| end == "log")));
        let mut text = String::new();
        for file in files {
            let lines = fs::read_to_string(&file).unwrap_or_default();
            let lines: Vec<&str> = lines.lines().collect();
            let shown = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
            text.push_str(&format!("--- {}\n{shown}\n", file.display()));
        }
        text
    }

    /// Ctrl-C: the supervisor ends well and leaves no child behind.
    pub async fn stop(mut self) -> TestResult {
        let members = self.members()?;
        let supervisor = self.supervisor.id().ok_or("imcluster up had already ended")?;
        kill_process(pid(supervisor)?, Signal::INT)?;
        let status = timeout(STOPPED_WITHIN, self.supervisor.wait())
            .await
            .map_err(|_| format!("imcluster up still runs {STOPPED_WITHIN:?} after SIGINT"))??;
        if !status.success() {
            return Err(format!("imcluster up ended with {status}").into());
        }
        self.assert_gone(&members).await?;
        fs::remove_dir_all(&self.directory)?;
        Ok(())
    }

    async fn assert_gone(&self, members: &[Member]) -> TestResult {
        for member in members {
            let (name, id) = (&member.name, pid(member.pid)?);
            let gone = async || test_kill_process(id).is_err().then_some(());
            eventually(&format!("{name} (pid {}) ends with its supervisor", member.pid), Duration::from_secs(10), gone)
                .await?;
        }
        Ok(())
    }
}

impl From<&Cluster> for Access {
    fn from(cluster: &Cluster) -> Self {
        Self { mqtt: cluster.mqtt(), http: cluster.http() }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // After `stop` the directory is gone; otherwise the test failed, and this tells why.
        if self.directory.exists() {
            eprintln!("{}", self.logs());
            eprintln!("the cluster's files are kept in {}", self.directory.display());
        }
    }
}

fn pid(raw: u32) -> TestResult<Pid> {
    Pid::from_raw(i32::try_from(raw)?).ok_or_else(|| "pid 0".into())
}

fn read_members(data: &Path) -> std::io::Result<Vec<Member>> {
    Ok(serde_json::from_slice(&fs::read(data.join("members.json"))?)?)
}

/// Where a system's clients connect to.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The MQTT listener (plain TCP).
    pub mqtt: SocketAddr,
    /// The HTTP listener.
    pub http: SocketAddr,
}

/// People who chat in the background, each message written down and checked at the end.
pub struct Chat {
    /// Where everything is written down.
    pub journal: Arc<Journal>,
    people: Arc<Vec<Person>>,
    groups: Arc<Vec<String>>,
    sender: Option<JoinHandle<()>>,
    not_taken: Arc<AtomicU64>,
}

/// Somebody with one device.
pub struct Person {
    /// User id.
    pub name: String,
    /// The device's client.
    pub client: Client,
}

impl Chat {
    /// `count` people log in and subscribe; all are in `groups` groups.
    pub async fn start(access: impl Into<Access>, count: usize, groups: usize) -> TestResult<Self> {
        let access = access.into();
        let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
        let options = (0..count).map(|number| {
            let mut options = Options::new(access.mqtt, format!("p{number}.{tag}"), "phone");
            // A stopped gateway keeps its connections; only silence tells.
            options.keep_alive_seconds = 3;
            options
        });
        Self::start_with(access, options.collect(), groups).await
    }

    /// The same with clients of any kind; the journal knows all of them before the first message.
    pub async fn start_with(access: impl Into<Access>, options: Vec<Options>, groups: usize) -> TestResult<Self> {
        let api = Api::new(access.into().http);
        let journal = Journal::new();
        let people: Vec<Person> = options
            .into_iter()
            .map(|options| {
                let recorder = journal.recorder(&options);
                Person { name: options.user.clone(), client: Client::start(options, recorder) }
            })
            .collect();
        for person in &people {
            let online = timeout(READY_WITHIN, person.client.online()).await;
            if !matches!(online, Ok(true)) {
                return Err(
                    format!("{} is not online after {READY_WITHIN:?}; {:?}", person.name, journal.notes()).into()
                );
            }
        }
        let mut names: Vec<String> = people.iter().map(|person| person.name.clone()).collect();
        names.sort();
        names.dedup();
        let mut created = Vec::new();
        for number in 0..groups {
            let group = format!("g{number}.{}", names[0]);
            api.create_group(&Credential::Insecure(names[0].clone()), &group, &names).await?;
            for name in &names {
                journal.joined(&group, name, Some(0));
            }
            created.push(group);
        }
        let not_taken = Arc::new(AtomicU64::new(0));
        Ok(Self { journal, people: Arc::new(people), groups: Arc::new(created), sender: None, not_taken })
    }

    /// The people.
    pub fn people(&self) -> &[Person] {
        &self.people
    }

    /// The groups.
    pub fn groups(&self) -> &[String] {
        &self.groups
    }

    /// Starts to send in the background at an open rate, until [`Chat::pause`] or [`Chat::stop_and_check`].
    pub fn send_at(&mut self, per_second: f64, seed: u64) {
        let (journal, people, groups) = (self.journal.clone(), self.people.clone(), self.groups.clone());
        let not_taken = self.not_taken.clone();
        let task = tokio::spawn(async move {
            let start = Instant::now();
            let mut rng = StdRng::seed_from_u64(seed);
            let endless = Duration::from_secs(24 * 3600);
            let times = Schedule::new(StdRng::seed_from_u64(seed), Spacing::Poisson, per_second, endless, |_| 1.0);
            for offset in times {
                let scheduled = start + offset;
                sleep_until(scheduled).await;
                let from = rng.random_range(0..people.len());
                let topic = if !groups.is_empty() && rng.random_bool(0.25) {
                    format!("g/{}", groups[rng.random_range(0..groups.len())])
                } else {
                    let to = (from + rng.random_range(1..people.len().max(2))) % people.len();
                    format!("u/{}", people[to].name)
                };
                let message = journal.message(topic, 64, scheduled);
                // Who is told to be offline sends nothing.
                let offline = people[from].client.state() == State::Offline;
                if !offline && people[from].client.try_publish(message) == Err(PublishError::Full) {
                    not_taken.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        if let Some(earlier) = self.sender.replace(task) {
            earlier.abort();
        }
    }

    /// Adds load to one topic, until the handle is dropped: a conversation that is louder than all others. A message that
    /// finds its sender's queue full is not sent.
    pub fn send_to_at(&self, from: usize, topic: String, per_second: u32) -> AbortOnDropHandle<()> {
        let (journal, people) = (self.journal.clone(), self.people.clone());
        AbortOnDropHandle::new(tokio::spawn(async move {
            let mut beat = interval(Duration::from_secs(1) / per_second.max(1));
            loop {
                let scheduled = beat.tick().await;
                let _ = people[from].client.try_publish(journal.message(topic.clone(), 64, scheduled));
            }
        }))
    }

    /// Everybody goes and comes back, one after the other: whoever deals out connections deals them anew.
    pub async fn reconnect(&self) {
        for person in self.people.iter() {
            person.client.set_online(false);
            person.client.offline().await;
            person.client.set_online(true);
            person.client.online().await;
        }
    }

    /// Connections that were made so far, of all people together.
    pub fn connections(&self) -> u32 {
        let number = |state| if let State::Online { connection, .. } = state { connection } else { 0 };
        self.people.iter().map(|person| number(person.client.state())).sum()
    }

    /// Ends the background sending; the people stay.
    pub async fn pause(&mut self) {
        if let Some(sender) = self.sender.take() {
            sender.abort();
            let _ = sender.await;
        }
    }

    /// Sends one message and waits for its answer.
    pub async fn say(&self, from: usize, topic: &str) -> TestResult<Outcome> {
        let message: Message = self.journal.message(topic, 64, Instant::now());
        Ok(self.people[from].client.publish(message).await?)
    }

    /// Waits until so many messages are acknowledged: load really flows.
    pub async fn wait_acked(&self, count: u64, deadline: Duration) -> TestResult {
        eventually(&format!("{count} messages are acknowledged"), deadline, async || {
            (self.journal.with(|history| history.progress().1) >= count).then_some(())
        })
        .await
    }

    /// How long sends to `topic` are without an ack from now on: the time until one that starts now is acknowledged.
    pub async fn time_to_ack(&self, from: usize, topic: &str, deadline: Duration) -> TestResult<Duration> {
        let start = Instant::now();
        while start.elapsed() < deadline {
            let left = deadline.saturating_sub(start.elapsed());
            match timeout(left, self.say(from, topic)).await {
                Ok(outcome) => {
                    if matches!(outcome?, Outcome::Stored { .. }) {
                        return Ok(start.elapsed());
                    }
                }
                Err(_) => break,
            }
        }
        Err(format!("nothing was acknowledged on {topic} within {deadline:?}").into())
    }

    /// Messages that a full client could not take.
    pub fn not_taken(&self) -> u64 {
        self.not_taken.load(Ordering::Relaxed)
    }

    /// Stops sending, brings everybody online, waits until all is delivered (or `deadline`), and demands that nothing is
    /// wrong and nothing unanswered.
    pub async fn stop_and_check(mut self, deadline: Duration) -> TestResult<Report> {
        self.pause().await;
        let until = Instant::now() + deadline;
        for person in self.people.iter() {
            person.client.set_online(true);
            person.client.set_acknowledging(true);
        }
        for person in self.people.iter() {
            let left = until.saturating_duration_since(Instant::now());
            if !matches!(timeout(left, person.client.online()).await, Ok(true)) {
                return Err(format!("{} could not come back: {:?}", person.name, self.journal.notes()).into());
            }
        }
        let report = self.journal.settle(until.saturating_duration_since(Instant::now())).await;
        if !report.is_clean() || report.unanswered > 0 || (report.acked > 0 && report.received == 0) {
            return Err(format!("the history is not clean:\n{report}\n{:?}", self.journal.notes()).into());
        }
        Ok(report)
    }
}
