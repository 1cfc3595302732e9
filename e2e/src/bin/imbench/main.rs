//! `imbench`: what the system costs, each figure beside a peer or a physical limit that was taken in the same run.
//!
//! | module | what it measures |
//! | --- | --- |
//! | [`appends`] | durable appends at a business member's Link, against one process that writes the same rows |
//! | [`traffic`] | 1:1 messages end to end, idle connections, logins: beside mosquitto and a bare group commit |
//! | [`moves`] | how long a conversation waits when its shard moves under load |
//! | [`rooms`] | live rooms: fan-out, likes, memory per connection: beside brokers and a bare loop |
//! | [`crowd`] | the viewers of a room, and how the highest rate is found |
//! | [`peers`] | the brokers, and the bare loop that copies to sockets |
//! | [`scenes`] | live rooms: a wave of people, several gateways, a hot room beside cold ones |
//! | [`soak`] | memory over minutes; only when it is asked for |
//! | [`bare`] | the bare loops: rows into SQLite, rows into PostgreSQL, a group commit behind a socket |
//! | [`system`] | the processes under test, their CPU time and memory |

mod appends;
mod bare;
mod crowd;
mod moves;
mod peers;
#[allow(dead_code)] // The store's tests use all of it.
#[path = "../../../../business/tests/support/postgres.rs"]
mod postgres;
mod rooms;
mod scenes;
mod soak;
mod system;
mod traffic;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

/// What goes wrong ends the run, with the text telling what to look at.
type Outcome<T = ()> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Measures the system beside its peers and prints one table.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory of the release build's programs.
    #[arg(long, default_value = "target/release")]
    programs: PathBuf,
    /// Where the table is written as JSON, too.
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
    /// Only these parts.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Part>,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 8)]
    seconds: u64,
    /// Idle connections.
    #[arg(long, default_value_t = 15_000)]
    connections: u32,
    /// Seconds of the soak.
    #[arg(long, default_value_t = 600)]
    soak_seconds: u64,
}

/// What can be measured by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Durable appends, embedded store.
    Sqlite,
    /// Durable appends, PostgreSQL.
    Postgres,
    /// 1:1 messages end to end.
    Steady,
    /// Moves of shards under load.
    Moves,
    /// Idle connections.
    Idle,
    /// Logins.
    Connects,
    /// Live rooms: the highest rate.
    Rooms,
    /// Live rooms: CPU per delivery.
    RoomCost,
    /// Likes.
    Likes,
    /// Memory per connection and per viewer.
    Viewers,
    /// A wave of people enters a room.
    Wave,
    /// Cost per delivery with one gateway and with four.
    Gateways,
    /// A hot room beside a thousand cold ones.
    Cold,
    /// Memory over `--soak-seconds`; never without being named.
    Soak,
}

/// What a ratio has to be.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wanted {
    /// So much of the peer's.
    AtLeast(f64),
    /// So much of the peer's, or of the limit.
    AtMost(f64),
    /// It is only shown.
    Shown,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    unit: &'static str,
    ours: f64,
    /// What `peer` is.
    beside: String,
    peer: f64,
    ratio: f64,
    wanted: String,
    /// `None` where nothing is demanded.
    met: Option<bool>,
}

/// All lines, printed as they come.
#[derive(Debug, Default)]
struct Table(Vec<Figure>);

impl Table {
    fn add(
        &mut self,
        name: impl Into<String>,
        unit: &'static str,
        ours: f64,
        beside: impl Into<String>,
        peer: f64,
        wanted: Wanted,
    ) {
        let ratio = ours / peer;
        let (wanted, met) = match wanted {
            Wanted::AtLeast(least) => (format!("≥ {least}x"), Some(ratio >= least)),
            Wanted::AtMost(most) => (format!("≤ {most}x"), Some(ratio <= most)),
            Wanted::Shown => (String::new(), None),
        };
        let figure = Figure { name: name.into(), unit, ours, beside: beside.into(), peer, ratio, wanted, met };
        println!("{}", line(&figure));
        self.0.push(figure);
    }
}

fn line(figure: &Figure) -> String {
    let Figure { name, unit, ours, beside, peer, ratio, wanted, met } = figure;
    let verdict = met.map_or("", |met| if met { "met" } else { "MISSED" });
    let (ours, peer) = (short(*ours), short(*peer));
    format!("{name:<42} {unit:<8} {ours:>9} {peer:>9}  {beside:<38} {ratio:>6.2} {wanted:>8} {verdict}")
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("imbench: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(async {
        // Whoever ends the run drops it, and with it the processes and files that it made.
        tokio::select! {
            outcome = run(&arguments) => outcome,
            name = interrupted() => Err(format!("ended by {name}").into()),
        }
    });
    // A bare loop that is still writing has no more use.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("imbench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Waits for a signal that asks the process to end, and gives its name.
async fn interrupted() -> &'static str {
    let signals = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()].map(signal);
    let [Ok(mut terminate), Ok(mut interrupt), Ok(mut hangup)] = signals else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
        _ = hangup.recv() => "SIGHUP",
    }
}

async fn run(arguments: &Arguments) -> Outcome {
    let wants = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let bench = system::Bench::new(&arguments.programs)?;
    let mut table = Table::default();
    println!(
        "{:<42} {:<8} {:>9} {:>9}  {:<38} {:>6} {:>8}",
        "figure", "unit", "ours", "beside", "beside what", "ratio", "wanted"
    );
    if wants(Part::Sqlite) {
        appends::sqlite(&bench, &mut table, arguments.seconds).await?;
    }
    if wants(Part::Postgres) {
        appends::postgres(&bench, &mut table, arguments.seconds).await?;
    }
    if wants(Part::Steady) {
        traffic::steady(&bench, &mut table, arguments.seconds).await?;
    }
    if wants(Part::Moves) {
        moves::moves(&bench, &mut table, arguments.seconds).await?;
    }
    if wants(Part::Idle) {
        traffic::idle(&bench, &mut table, arguments.connections).await?;
    }
    if wants(Part::Connects) {
        traffic::connects(&bench, &mut table).await?;
    }
    if wants(Part::Rooms) {
        rooms::rates(&bench, &mut table).await?;
    }
    if wants(Part::RoomCost) {
        rooms::cost(&bench, &mut table).await?;
    }
    if wants(Part::Likes) {
        rooms::likes(&bench, &mut table).await?;
    }
    if wants(Part::Viewers) {
        rooms::memory(&bench, &mut table, arguments.connections).await?;
    }
    if wants(Part::Wave) {
        scenes::wave(&bench, &mut table).await?;
    }
    if wants(Part::Gateways) {
        scenes::gateways(&bench, &mut table).await?;
    }
    if wants(Part::Cold) {
        scenes::hot_and_cold(&bench, &mut table).await?;
    }
    if arguments.only.contains(&Part::Soak) {
        soak::soak(&bench, &mut table, arguments.soak_seconds).await?;
    }
    if let Some(folder) = arguments.json.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&arguments.json, serde_json::to_vec_pretty(&table.0)?)?;
    println!("also as JSON: {}", arguments.json.display());
    Ok(())
}
