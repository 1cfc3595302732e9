//! `imload`: the load generator. `evening` plays an evening peak and checks every message, `steady` measures latency at a
//! constant rate, `room` plays a live room, `idle` holds connections for memory measurements, `connects` measures logins.

mod room;

use std::{
    collections::{BTreeMap, VecDeque},
    io::{IsTerminal, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use futures::{StreamExt, stream};
use hdrhistogram::Histogram;
use im_e2e::{
    api::{Api, ApiError, Credential},
    client::{Client, ClientError, Connection, Event, Observer, Options, Outcome, PublishError, State},
    history::{Report, micros, new_latency_histogram},
    machine::cpu_seconds,
    view::{self, Member, Snapshot, Status},
    wire,
    workload::{Journal, Meter, Schedule, Spacing, Zipf, evening},
};
use parking_lot::Mutex;
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use thiserror::Error;
use tokio::time::{Instant, sleep_until, timeout};

/// Load for an instant-messaging system, over its public MQTT and HTTP ports.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Plays an evening: quiet, rise, peak, quiet; ends with the history checker's verdict (exit code 1 on a violation).
    Evening(Evening),
    /// A fixed set of clients sends 1:1 messages at a constant open rate; prints latencies.
    Steady(Steady),
    /// A live room: people enter in a wave, listen, like, leave, come back; exit code 1 if somebody who kept up missed a message.
    Room(room::Room),
    /// Opens idle connections and holds them until stdin ends.
    Idle(Idle),
    /// Logs in again and again; prints logins per second and their latency.
    Connects(Connects),
}

#[derive(Args)]
struct Target {
    /// MQTT address (TCP).
    #[arg(long, default_value = "127.0.0.1:1883")]
    mqtt: SocketAddr,
    /// Password of every user (a JWT); not needed with insecure authentication.
    #[arg(long)]
    password: Option<String>,
    /// Print a JSON document at the end.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Evening {
    #[command(flatten)]
    target: Target,
    /// HTTP address of a gateway; groups are created there.
    #[arg(long, default_value = "127.0.0.1:8080")]
    http: SocketAddr,
    /// How many people there are.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(2..=15_000))]
    people: u32,
    /// How many groups they have.
    #[arg(long, default_value_t = 30)]
    groups: u32,
    /// Messages per second at the peak.
    #[arg(long, default_value_t = 500.0)]
    peak: f64,
    /// Length of the evening in seconds.
    #[arg(long, default_value_t = 120)]
    duration: u64,
    /// Bytes of a message.
    #[arg(long, default_value_t = 100)]
    payload: usize,
    /// Logins per second at the beginning.
    #[arg(long, default_value_t = 200.0)]
    connect_rate: f64,
    /// Seconds to wait at the end until all is delivered.
    #[arg(long, default_value_t = 60)]
    patience: u64,
    /// Data directory of `imcluster up`: members.json tells how many members run.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    /// Address of the operator's status document (http://HOST:PORT/PATH).
    #[arg(long)]
    status_url: Option<String>,
    /// Seed of the schedule and of who writes to whom.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Args)]
struct Steady {
    #[command(flatten)]
    target: Target,
    /// Messages per second.
    #[arg(long)]
    rate: f64,
    /// Clients.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(2..=15_000))]
    clients: u32,
    /// Seconds, without the warm-up.
    #[arg(long, default_value_t = 10)]
    duration: u64,
    /// Seconds of load before measuring.
    #[arg(long, default_value_t = 2)]
    warmup: u64,
    /// How many others each client writes to: its next neighbours. 0 = anybody, so that many messages open a conversation.
    #[arg(long, default_value_t = 0)]
    peers: u32,
    /// Bytes of a message.
    #[arg(long, default_value_t = 100)]
    payload: usize,
    /// A Poisson process instead of even distances.
    #[arg(long)]
    poisson: bool,
    /// Against a general broker: clients subscribe to the topic `u/{user}` itself.
    #[arg(long)]
    broker: bool,
    /// Processes whose CPU time is measured as well, from the end of the warm-up until the last answer; --cpu-of PID,PID …
    #[arg(long, value_delimiter = ',')]
    cpu_of: Vec<u32>,
    /// Check every message with the history checker, too.
    #[arg(long, conflicts_with = "broker")]
    check: bool,
}

#[derive(Args)]
struct Idle {
    #[command(flatten)]
    target: Target,
    /// How many connections.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=19_000))]
    connections: u32,
    /// Spread over this many local addresses (127.0.0.1, 127.0.0.2 …).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=250))]
    source_addresses: u8,
    /// Logins under way at a time.
    #[arg(long, default_value_t = 50)]
    parallel: usize,
    /// Keep-alive in seconds.
    #[arg(long, default_value_t = 600)]
    keep_alive: u16,
    /// Filter that each one subscribes; empty = none.
    #[arg(long, default_value = "inbox/#")]
    subscribe: String,
}

#[derive(Args)]
struct Connects {
    #[command(flatten)]
    target: Target,
    /// How many logins.
    #[arg(short = 'n', long, default_value_t = 2000)]
    number: u32,
    /// Logins per second; 0 = as many as `--parallel` at a time allow.
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Logins under way at a time.
    #[arg(long, default_value_t = 16)]
    parallel: usize,
}

#[derive(Debug, Error)]
enum LoadError {
    #[error(
        "{online} of {wanted} clients are online after {seconds} s; last trouble: {trouble}. Is the system ready (GET /readyz), and are its connect-rate limits high enough for --connect-rate?"
    )]
    Login { online: usize, wanted: usize, seconds: u64, trouble: String },
    #[error("can't create the group {group}: {source}. Is --http the gateway's HTTP port? (--groups 0 does without)")]
    Group { group: String, source: ApiError },
    #[error("the connection {number} could not be opened: {source}")]
    Connect { number: u32, source: ClientError },
    #[error("the room: {0}")]
    Room(String),
    #[error("--status-url must look like http://127.0.0.1:9090/status: {0}")]
    StatusUrl(String),
    #[error("writing the result: {0}")]
    Output(#[from] std::io::Error),
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    raise_file_limit();
    let result = match cli.command {
        Command::Evening(command) => play_evening(command).await,
        Command::Steady(command) => run_steady(command).await,
        Command::Room(command) => room::run(command).await,
        Command::Idle(command) => run_idle(command).await,
        Command::Connects(command) => run_connects(command).await,
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("imload: {error}");
            ExitCode::from(2)
        }
    }
}

/// Thousands of connections need thousands of descriptors; shells often allow 1,024 softly.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        eprintln!("imload: the limit of open files stays at {:?}: {error}", limit.current);
    }
}

/// Says that all is over: the time came, or Ctrl-C.
async fn pause_until(when: Instant, stop: &AtomicBool) -> bool {
    sleep_until(when).await;
    !stop.load(Ordering::Relaxed)
}

fn stop_on_ctrl_c() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            set.store(true, Ordering::Relaxed);
            // The second one does not wait for the report.
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        }
    });
    stop
}

/// Starts clients at a rate and waits until all are online.
async fn log_in(
    all: impl ExactSizeIterator<Item = (Options, Arc<dyn Observer>)>,
    per_second: f64,
    trouble: impl Fn() -> Option<String>,
) -> Result<Vec<Client>, LoadError> {
    let (start, wanted) = (Instant::now(), all.len());
    let mut clients = Vec::with_capacity(wanted);
    for (number, (options, observer)) in all.enumerate() {
        sleep_until(start + Duration::from_secs_f64(number as f64 / per_second)).await;
        clients.push(Client::start(options, observer));
    }
    let everyone = async {
        for client in &clients {
            client.online().await;
        }
    };
    if timeout(Duration::from_secs(60), everyone).await.is_err() {
        let online = clients.iter().filter(|client| is_online(client)).count();
        let trouble = trouble().unwrap_or_else(|| "none".to_owned());
        return Err(LoadError::Login { online, wanted, seconds: start.elapsed().as_secs(), trouble });
    }
    Ok(clients)
}

fn is_online(client: &Client) -> bool {
    matches!(client.state(), State::Online { .. })
}

// --- evening --------------------------------------------------------------------------------------------------------------

/// The people of an evening, shared by those who move them.
struct Town {
    journal: Arc<Journal>,
    names: Vec<String>,
    clients: Vec<Client>,
    /// Whether a person may send: false some seconds before he leaves, so that nothing of his is left unsent.
    awake: Vec<AtomicBool>,
    groups: Vec<(String, Vec<usize>)>,
    shed: AtomicU64,
    stop: Arc<AtomicBool>,
}

async fn play_evening(command: Evening) -> Result<bool, LoadError> {
    let stop = stop_on_ctrl_c();
    let journal = Journal::new();
    let mut rng = StdRng::seed_from_u64(command.seed);
    // Every evening has its own people, so that numbers start at 1 and nobody else's messages are in the way.
    let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
    let names: Vec<String> = (0..command.people).map(|number| format!("p{number}.{tag}")).collect();
    let mut screen = Screen::open(&command)?;
    screen.say(&format!("{} people log in", names.len()));
    let observed = names.iter().map(|name| {
        let mut options = Options::new(command.target.mqtt, name.clone(), "phone");
        options.password.clone_from(&command.target.password);
        let recorder: Arc<dyn Observer> = journal.recorder(&options);
        (options, recorder)
    });
    let observed: Vec<_> = observed.collect();
    let last_trouble = || journal.notes().pop().map(|(_, note)| note);
    let clients = log_in(observed.into_iter(), command.connect_rate, last_trouble).await?;
    screen.say(&format!("they found {} groups", command.groups));
    let groups = found_groups(&command, &journal, &names, &tag, &mut rng).await?;
    let awake = names.iter().map(|_| AtomicBool::new(true)).collect();
    let shed = AtomicU64::new(0);
    let town = Arc::new(Town { journal, names, clients, awake, groups, shed, stop });

    let start = Instant::now();
    let duration = Duration::from_secs(command.duration);
    let seed = rng.random();
    let sender = tokio::spawn(send_messages(town.clone(), start, duration, command.peak, command.payload, seed));
    let mover = tokio::spawn(move_people(town.clone(), start, duration, rng.random()));
    let mut over = false;
    while !over {
        over = sender.is_finished();
        screen.show(&town, start, if over { "over" } else { "evening" }).await?;
    }
    mover.abort();
    let _ = mover.await;
    // Whoever is away comes once more and gets what he missed: only then is the history complete.
    for (place, client) in town.clients.iter().enumerate() {
        if !is_online(client) {
            sleep_until(Instant::now() + Duration::from_secs_f64(1.0 / command.connect_rate)).await;
            client.set_online(true);
        }
        town.awake[place].store(false, Ordering::Relaxed);
    }
    let everyone = async {
        for client in &town.clients {
            client.online().await;
        }
    };
    // Who can't come back is counted below; the checker can't judge what such a person would have got.
    let _ = timeout(Duration::from_secs(command.patience), everyone).await;
    let settle = town.journal.settle(Duration::from_secs(command.patience));
    tokio::pin!(settle);
    let report = loop {
        tokio::select! {
            report = &mut settle => break report,
            shown = screen.show(&town, start, "all catch up") => shown?,
        }
    };
    screen.close(&town, start).await?;
    let absent = town.clients.iter().filter(|client| !is_online(client)).count();
    let shed = town.shed.load(Ordering::Relaxed);
    for client in &town.clients {
        client.set_online(false);
    }
    let gone = async {
        for client in &town.clients {
            client.offline().await;
        }
    };
    let _ = timeout(Duration::from_secs(5), gone).await;
    let silent = report.acked > 0 && report.received == 0;
    let good = report.is_clean() && report.unanswered == 0 && absent == 0 && !silent;
    if command.target.json {
        println!(
            "{}",
            report_json(&report, &[("notTaken", json!(shed)), ("absent", json!(absent)), ("clean", json!(good))])
        );
    } else {
        println!("{report}");
        if shed > 0 {
            println!("{shed} messages of the schedule were not taken: their sender's queue was full");
        }
        if absent > 0 {
            println!("{absent} people could not come back within {} s: the history is not complete", command.patience);
        }
        println!(
            "{}",
            if good { "clean: no acknowledged message was lost, doubled or reordered" } else { "NOT CLEAN" }
        );
    }
    Ok(good)
}

/// Groups of 3 to 20 people, created over HTTP by their first member.
async fn found_groups(
    command: &Evening,
    journal: &Arc<Journal>,
    names: &[String],
    tag: &str,
    rng: &mut StdRng,
) -> Result<Vec<(String, Vec<usize>)>, LoadError> {
    let api = Api::new(command.http);
    let mut everyone: Vec<usize> = (0..names.len()).collect();
    let mut groups = Vec::new();
    for number in 0..command.groups {
        let size = rng.random_range(3..=20).min(names.len());
        let (chosen, _) = everyone.partial_shuffle(rng, size);
        groups.push((format!("team{number}.{tag}"), chosen.to_vec()));
    }
    let mut created = stream::iter(&groups)
        .map(|(group, members)| {
            let (api, people) = (&api, members.iter().map(|at| names[*at].clone()).collect::<Vec<_>>());
            async move {
                let owner = match &command.target.password {
                    Some(token) => Credential::Bearer(token.clone()),
                    None => Credential::Insecure(people[0].clone()),
                };
                let outcome = api.create_group(&owner, group, &people).await;
                outcome.map_err(|source| LoadError::Group { group: group.clone(), source })
            }
        })
        .buffer_unordered(8);
    while let Some(outcome) = created.next().await {
        outcome?;
    }
    drop(created);
    for (group, members) in &groups {
        for member in members {
            journal.joined(group, &names[*member], Some(0));
        }
    }
    Ok(groups)
}

/// Sends on schedule, whatever became of the messages before: three in ten to a group, the others to a person, popular
/// people and lively groups getting most.
async fn send_messages(town: Arc<Town>, start: Instant, duration: Duration, peak: f64, bytes: usize, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let schedule = Schedule::new(StdRng::seed_from_u64(seed + 1), Spacing::Poisson, peak, duration, evening);
    let (people, groups) = (Zipf::new(town.names.len()), Zipf::new(town.groups.len()));
    let mut popular: Vec<usize> = (0..town.names.len()).collect();
    popular.shuffle(&mut rng);
    for offset in schedule {
        let scheduled = start + offset;
        if !pause_until(scheduled, &town.stop).await {
            return;
        }
        let (from, topic) = if !town.groups.is_empty() && rng.random_bool(0.3) {
            let (name, members) = &town.groups[groups.draw(&mut rng)];
            let Some(from) = pick_awake(&town, &mut rng, |rng| members[rng.random_range(0..members.len())]) else {
                continue;
            };
            (from, format!("g/{name}"))
        } else {
            let Some(from) = pick_awake(&town, &mut rng, |rng| rng.random_range(0..town.names.len())) else { continue };
            let mut to = popular[people.draw(&mut rng)];
            while to == from {
                to = popular[people.draw(&mut rng)];
            }
            (from, format!("u/{}", town.names[to]))
        };
        let message = town.journal.message(topic, bytes, scheduled);
        if town.clients[from].try_publish(message) == Err(PublishError::Full) {
            town.shed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Somebody who is there; `None` if several tries found nobody.
fn pick_awake(town: &Town, rng: &mut StdRng, mut draw: impl FnMut(&mut StdRng) -> usize) -> Option<usize> {
    (0..50).map(|_| draw(rng)).find(|at| town.awake[*at].load(Ordering::Relaxed))
}

/// People come online and leave along the curve, from a third of them to nearly all.
async fn move_people(town: Arc<Town>, start: Instant, duration: Duration, seed: u64) {
    const STEP: Duration = Duration::from_millis(250);
    /// Between a person's last message and his good-bye.
    const LEAVE_AFTER: Duration = Duration::from_secs(2);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut away: Vec<usize> = Vec::new();
    let mut leaving: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut here: Vec<usize> = (0..town.names.len()).collect();
    here.shuffle(&mut rng);
    let mut next = start;
    while pause_until(next, &town.stop).await {
        next += STEP;
        while leaving.front().is_some_and(|(at, _)| *at <= Instant::now()) {
            let Some((_, person)) = leaving.pop_front() else { break };
            town.clients[person].set_online(false);
            away.push(person);
        }
        let share = start.elapsed().as_secs_f64() / duration.as_secs_f64();
        let wanted = ((0.3 + 0.65 * evening(share.min(1.0))) * town.names.len() as f64) as usize;
        // At most this many in one step; besides the curve some always come and go.
        let step = 1 + town.names.len() / 50;
        for _ in 0..step.min(here.len().saturating_sub(wanted)) + usize::from(rng.random_bool(0.5)) {
            let place = rng.random_range(0..here.len().max(1));
            if here.len() <= 2 {
                break;
            }
            let person = here.swap_remove(place);
            town.awake[person].store(false, Ordering::Relaxed);
            leaving.push_back((Instant::now() + LEAVE_AFTER, person));
        }
        for _ in 0..step.min(wanted.saturating_sub(here.len())) {
            if away.is_empty() {
                break;
            }
            let person = away.swap_remove(rng.random_range(0..away.len()));
            town.clients[person].set_online(true);
            town.awake[person].store(true, Ordering::Relaxed);
            here.push(person);
        }
    }
}

/// Draws the evening: a screen on a terminal, a line each second elsewhere.
struct Screen {
    terminal: bool,
    quiet: bool,
    duration: Duration,
    peak: f64,
    data_dir: Option<PathBuf>,
    status: Option<(Api, String)>,
    meter: Meter,
    last: Instant,
    last_line: Instant,
    refused: u64,
    latencies: Latencies,
    overdue: u64,
    next_scan: Instant,
}

/// Latest quantiles: a second without traffic does not wipe them out.
#[derive(Default)]
struct Latencies {
    ack: Option<(f64, f64)>,
    delivery: Option<(f64, f64)>,
}

impl Screen {
    const REDRAW: Duration = Duration::from_millis(500);

    fn open(command: &Evening) -> Result<Self, LoadError> {
        let status = command.status_url.as_deref().map(parse_status_url).transpose()?;
        let terminal = std::io::stdout().is_terminal() && !command.target.json;
        let now = Instant::now();
        Ok(Self {
            terminal,
            quiet: command.target.json,
            duration: Duration::from_secs(command.duration),
            peak: command.peak,
            data_dir: command.data_dir.clone(),
            status,
            meter: Meter::default(),
            last: now,
            last_line: now,
            refused: 0,
            latencies: Latencies::default(),
            overdue: 0,
            next_scan: now,
        })
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            println!("imload: {text}");
        }
    }

    /// Waits for the next redraw and draws.
    async fn show(&mut self, town: &Town, start: Instant, phase: &str) -> Result<(), LoadError> {
        if self.terminal && self.last < start {
            print!("\x1b[2J");
        }
        sleep_until(self.last + Self::REDRAW).await;
        self.draw(town, start, phase).await
    }

    async fn draw(&mut self, town: &Town, start: Instant, phase: &str) -> Result<(), LoadError> {
        let status = self.fetch_status().await;
        if self.quiet || (!self.terminal && self.last_line.elapsed() < Duration::from_secs(1)) {
            self.last = Instant::now();
            return Ok(());
        }
        let since = self.last_line.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.last_line = self.last;
        town.journal.take_meter(&mut self.meter);
        self.refused += self.meter.refused;
        self.latencies.ack = view::quantiles(&self.meter.ack_latency).or(self.latencies.ack);
        self.latencies.delivery = view::quantiles(&self.meter.delivery_latency).or(self.latencies.delivery);
        if Instant::now() >= self.next_scan {
            // The scan grows with the history; it may take some 2 % of the time.
            let begun = Instant::now();
            let now = town.journal.now();
            self.overdue = town.journal.with(|history| history.overdue(now, Duration::from_secs(10)));
            self.next_scan = Instant::now() + (begun.elapsed() * 50).max(Duration::from_secs(1));
        }
        let (sent, answered) = town.journal.with(|history| history.progress());
        let (duplicated, reordered, other) = town.journal.with(|history| history.live_violations());
        let snapshot = Snapshot {
            phase: phase.to_owned(),
            elapsed: start.elapsed(),
            duration: self.duration,
            curve: evening,
            peak_per_second: self.peak,
            acked_per_second: self.meter.acked as f64 / since,
            delivered_per_second: self.meter.delivered as f64 / since,
            in_flight: sent - answered,
            shed: town.shed.load(Ordering::Relaxed),
            online: town.clients.iter().filter(|client| is_online(client)).count(),
            people: town.names.len(),
            sent,
            refused: self.refused,
            ack_millis: self.latencies.ack,
            delivery_millis: self.latencies.delivery,
            violations: [self.overdue, duplicated, reordered, other],
            status,
            notes: town.journal.notes(),
        };
        let mut out = std::io::stdout().lock();
        if self.terminal {
            let columns = rustix::termios::tcgetwinsize(std::io::stdout()).map_or(100, |size| usize::from(size.ws_col));
            out.write_all(view::screen(&snapshot, columns.max(40)).as_bytes())?;
        } else {
            writeln!(out, "{}", view::line(&snapshot))?;
        }
        out.flush()?;
        Ok(())
    }

    async fn close(&mut self, town: &Town, start: Instant) -> Result<(), LoadError> {
        // The last drawing stays on the screen, above the report.
        self.draw(town, start, "over").await
    }

    /// The operator's status document, else what members.json tells.
    async fn fetch_status(&self) -> Option<Status> {
        if let Some((api, path)) = &self.status
            && let Ok(Ok(value)) = timeout(Duration::from_secs(1), api.get(path)).await
            && let Ok(status) = serde_json::from_value(value)
        {
            return Some(status);
        }
        let members = tokio::fs::read(self.data_dir.as_ref()?.join("members.json")).await.ok()?;
        let members: Vec<Member> = serde_json::from_slice(&members).ok()?;
        Some(Status::from_members(&members))
    }
}

fn parse_status_url(url: &str) -> Result<(Api, String), LoadError> {
    let wrong = || LoadError::StatusUrl(url.to_owned());
    let rest = url.strip_prefix("http://").ok_or_else(wrong)?;
    let (address, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let address: SocketAddr = address.replace("localhost", "127.0.0.1").parse().map_err(|_| wrong())?;
    Ok((Api::new(address), if path.is_empty() { "/".to_owned() } else { path.to_owned() }))
}

// --- steady ---------------------------------------------------------------------------------------------------------------

/// Latencies and nothing else; deliveries are recognised by the time of sending that their payload carries.
struct Stopwatch {
    start: Instant,
    measured: Mutex<Measured>,
}

struct Measured {
    sent: u64,
    acked: u64,
    refused: u64,
    delivered: u64,
    connections: u64,
    ack: Histogram<u64>,
    delivery: Histogram<u64>,
    trouble: Option<String>,
}

impl Measured {
    fn new() -> Self {
        let (ack, delivery) = (new_latency_histogram(), new_latency_histogram());
        Self { sent: 0, acked: 0, refused: 0, delivered: 0, connections: 0, ack, delivery, trouble: None }
    }
}

struct Timed {
    stopwatch: Arc<Stopwatch>,
    recorder: Option<Arc<dyn Observer>>,
}

impl Observer for Timed {
    fn observe(&self, event: Event<'_>) {
        {
            let mut measured = self.stopwatch.measured.lock();
            match &event {
                Event::Sending { .. } => measured.sent += 1,
                Event::Answered { message, outcome: Outcome::Stored { .. }, .. } => {
                    measured.acked += 1;
                    measured.ack.saturating_record(micros(message.scheduled.elapsed()));
                }
                Event::Answered { .. } => measured.refused += 1,
                Event::Received { delivery, .. } => {
                    measured.delivered += 1;
                    // "{id} {microseconds} …"
                    let scheduled = delivery.payload.get(17..33).and_then(|text| std::str::from_utf8(text).ok());
                    if let Some(scheduled) = scheduled.and_then(|text| u64::from_str_radix(text, 16).ok()) {
                        let latency = self.stopwatch.start.elapsed().saturating_sub(Duration::from_micros(scheduled));
                        measured.delivery.saturating_record(micros(latency));
                    }
                }
                Event::Connected { .. } => measured.connections += 1,
                Event::Disconnected { why: Some(why), .. } => measured.trouble = Some(why.to_string()),
                Event::Disconnected { .. } | Event::Subscribed { .. } => {}
            }
        }
        if let Some(recorder) = &self.recorder {
            recorder.observe(event);
        }
    }
}

async fn run_steady(command: Steady) -> Result<bool, LoadError> {
    let stop = stop_on_ctrl_c();
    let journal = Journal::new();
    let stopwatch = Arc::new(Stopwatch { start: Instant::now(), measured: Mutex::new(Measured::new()) });
    let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
    let names: Vec<String> = (0..command.clients).map(|number| format!("s{number}.{tag}")).collect();
    let observed: Vec<(Options, Arc<dyn Observer>)> = names
        .iter()
        .map(|name| {
            let mut options = Options::new(command.target.mqtt, name.clone(), format!("{name}.phone"));
            options.password.clone_from(&command.target.password);
            if command.broker {
                options.subscriptions = vec![format!("u/{name}")];
            }
            let recorder: Option<Arc<dyn Observer>> = command.check.then(|| journal.recorder(&options) as _);
            let observer: Arc<dyn Observer> = Arc::new(Timed { stopwatch: stopwatch.clone(), recorder });
            (options, observer)
        })
        .collect();
    let clients = log_in(observed.into_iter(), 500.0, || stopwatch.measured.lock().trouble.clone()).await?;
    let (warmup, measure) = (Duration::from_secs(command.warmup), Duration::from_secs(command.duration));
    let mut rng = StdRng::seed_from_u64(1);
    let others = names.len() - 1;
    let peers = if command.peers == 0 { others } else { others.min(command.peers as usize) };
    let spacing = if command.poisson { Spacing::Poisson } else { Spacing::Even };
    let schedule = Schedule::new(StdRng::seed_from_u64(2), spacing, command.rate, warmup + measure, |_| 1.0);
    let start = Instant::now();
    let (mut warm, mut offered, mut shed) = (false, 0u64, 0u64);
    let cpu_used = || -> BTreeMap<u32, f64> { command.cpu_of.iter().map(|pid| (*pid, cpu_seconds(*pid))).collect() };
    let mut cpu_before = cpu_used();
    for offset in schedule {
        if !warm && offset >= warmup {
            warm = true;
            (offered, shed) = (0, 0);
            cpu_before = cpu_used();
            *stopwatch.measured.lock() = Measured::new();
        }
        let scheduled = start + offset;
        if !pause_until(scheduled, &stop).await {
            break;
        }
        let from = rng.random_range(0..names.len());
        let to = (from + rng.random_range(1..=peers)) % names.len();
        let mut message = journal.message(format!("u/{}", names[to]), command.payload, scheduled);
        stamp(&mut message.payload, scheduled.saturating_duration_since(stopwatch.start));
        offered += 1;
        if clients[from].try_publish(message).is_err() {
            shed += 1;
        }
    }
    let elapsed = start.elapsed().saturating_sub(warmup).as_secs_f64();
    let at_end = stopwatch.measured.lock().acked;
    // What is under way has some time to come; the rate above does not count it.
    let until = Instant::now() + Duration::from_secs(10);
    let open = |measured: &Measured| measured.sent > measured.acked + measured.refused;
    while open(&stopwatch.measured.lock()) && Instant::now() < until {
        sleep_until(Instant::now() + Duration::from_millis(20)).await;
    }
    let mut cpu = cpu_used();
    for (pid, seconds) in &mut cpu {
        *seconds -= cpu_before[pid];
    }
    let report = if command.check { Some(journal.settle(Duration::from_secs(20)).await) } else { None };
    for client in clients {
        client.stop().await;
    }
    let measured = stopwatch.measured.lock();
    let clean = report.as_ref().is_none_or(|report| report.is_clean() && report.unanswered == 0);
    let achieved = at_end as f64 / elapsed;
    if command.target.json {
        println!(
            "{}",
            json!({
                "offeredPerSecond": offered as f64 / elapsed, "ackedPerSecond": achieved, "acked": measured.acked,
                "refused": measured.refused, "notTaken": shed, "delivered": measured.delivered, "cpuSeconds": cpu,
                "ackMillis": latency_json(&measured.ack), "deliveryMillis": latency_json(&measured.delivery),
                "check": report.as_ref().map(|report| report_json(report, &[("clean", json!(clean))])),
            })
        );
    } else {
        println!(
            "offered {:.0}/s, acknowledged {achieved:.0}/s, refused {}, not taken {shed}",
            offered as f64 / elapsed,
            measured.refused
        );
        for (name, histogram) in [("ack", &measured.ack), ("delivery", &measured.delivery)] {
            println!("{name:9} {}", latency_line(histogram));
        }
        if let Some(report) = report {
            println!("{report}");
        }
    }
    Ok(clean)
}

/// Writes the time of sending behind the id that the payload begins with.
fn stamp(payload: &mut bytes::Bytes, at: Duration) {
    let mut text = payload[..17].to_vec();
    text.extend(format!("{:016x} ", u64::try_from(at.as_micros()).unwrap_or(u64::MAX)).bytes());
    text.extend_from_slice(payload.get(text.len()..).unwrap_or_default());
    *payload = text.into();
}

// --- idle, connects -------------------------------------------------------------------------------------------------------

async fn run_idle(command: Idle) -> Result<bool, LoadError> {
    let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
    let start = Instant::now();
    let trouble = Arc::new(Stopwatch { start, measured: Mutex::new(Measured::new()) });
    let clients: Vec<Client> = stream::iter(0..command.connections)
        .map(|number| {
            let mut options = Options::new(command.target.mqtt, format!("i{number}.{tag}"), format!("i{number}.{tag}"));
            options.password.clone_from(&command.target.password);
            options.keep_alive_seconds = command.keep_alive;
            options.subscriptions =
                Some(command.subscribe.clone()).filter(|filter| !filter.is_empty()).into_iter().collect();
            let last = 1 + (number % u32::from(command.source_addresses)) as u8;
            options.source = (command.source_addresses > 1).then_some(IpAddr::V4(Ipv4Addr::new(127, 0, 0, last)));
            let observer = Arc::new(Timed { stopwatch: trouble.clone(), recorder: None });
            async move {
                let client = Client::start(options, observer);
                let _ = timeout(Duration::from_secs(60), client.online()).await;
                client
            }
        })
        .buffer_unordered(command.parallel.max(1))
        .collect()
        .await;
    let online = clients.iter().filter(|client| is_online(client)).count();
    let seconds = start.elapsed().as_secs_f64();
    if online < clients.len() {
        let trouble = trouble.measured.lock().trouble.clone().unwrap_or_else(|| "none".to_owned());
        return Err(LoadError::Login { online, wanted: clients.len(), seconds: seconds as u64, trouble });
    }
    if command.target.json {
        println!("{}", json!({ "connections": online, "seconds": seconds }));
    } else {
        println!("{online} connections are up after {seconds:.1} s; they stay until the end of stdin");
    }
    std::io::stdout().flush()?;
    let stdin = tokio::task::spawn_blocking(|| std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()));
    let _ = stdin.await;
    let left = clients.iter().filter(|client| is_online(client)).count();
    if left < online {
        eprintln!("imload: only {left} of {online} connections were still up at the end");
    }
    Ok(left == online)
}

async fn run_connects(command: Connects) -> Result<bool, LoadError> {
    let tag = format!("{:06x}", rand::random::<u32>() & 0xFF_FFFF);
    let (start, latency) = (Instant::now(), Mutex::new(new_latency_histogram()));
    let logins = stream::iter(0..command.number).map(|number| {
        let mut options = Options::new(command.target.mqtt, format!("c{number}.{tag}"), format!("c{number}.{tag}"));
        options.password.clone_from(&command.target.password);
        options.session_expiry_seconds = 0;
        let (rate, latency) = (command.rate, &latency);
        async move {
            let scheduled =
                if rate > 0.0 { start + Duration::from_secs_f64(f64::from(number) / rate) } else { Instant::now() };
            sleep_until(scheduled).await;
            let opened = Connection::open(&options, true).await;
            let (mut connection, _) = opened.map_err(|source| LoadError::Connect { number, source })?;
            latency.lock().saturating_record(micros(scheduled.elapsed()));
            wire::encode_disconnect(connection.write_buffer());
            // The login is what is measured; a server that closes first is no failure.
            let _ = connection.flush().await;
            Ok::<_, LoadError>(())
        }
    });
    let mut logins = logins.buffer_unordered(command.parallel.max(1));
    while let Some(outcome) = logins.next().await {
        outcome?;
    }
    let per_second = f64::from(command.number) / start.elapsed().as_secs_f64();
    let latency = latency.lock();
    if command.target.json {
        println!(
            "{}",
            json!({ "connects": command.number, "perSecond": per_second, "millis": latency_json(&latency) })
        );
    } else {
        println!("{per_second:.0} logins per second   {}", latency_line(&latency));
    }
    Ok(true)
}

// --- output ---------------------------------------------------------------------------------------------------------------

const QUANTILES: [(&str, f64); 5] = [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)];

fn latency_line(latency: &Histogram<u64>) -> String {
    let parts = QUANTILES.map(|(name, at)| format!("{name} {:.2} ms", latency.value_at_quantile(at) as f64 / 1000.0));
    parts.join("  ")
}

fn latency_json(latency: &Histogram<u64>) -> serde_json::Value {
    QUANTILES
        .iter()
        .map(|(name, at)| ((*name).to_owned(), json!(latency.value_at_quantile(*at) as f64 / 1000.0)))
        .collect()
}

fn report_json(report: &Report, more: &[(&str, serde_json::Value)]) -> serde_json::Value {
    let mut value = json!({
        "sent": report.sent, "acked": report.acked, "refused": report.refused, "unanswered": report.unanswered,
        "received": report.received, "redelivered": report.redelivered, "lost": report.lost,
        "duplicated": report.duplicated, "reordered": report.reordered, "gaps": report.gaps, "other": report.other,
        "violations": report.violations, "ackMillis": latency_json(&report.ack_latency),
        "deliveryMillis": latency_json(&report.delivery_latency),
    });
    for (name, more) in more {
        value[*name] = more.clone();
    }
    value
}
