//! `imcluster`: runs an IM cluster on this machine, or many in Kubernetes; shows how one is; prints the Kubernetes types.

use clap::{Args, Parser, Subcommand};
use im_crds::{ImCluster, ShardMap};
use im_operator::metrics::{self, prometheus::Endpoint};
use im_operator::up::data_dir::DataDir;
use im_operator::{console, control, controller, up};
use kube::CustomResourceExt;
use std::io::{ErrorKind, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// Exit code for input that can't be used, as opposed to something that went wrong.
const EXIT_INPUT: u8 = 2;

/// An instant-messaging cluster whose tiers scale out and in by themselves.
#[derive(Parser)]
#[command(version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the ImCluster of FILE on this machine, until Ctrl-C.
    ///
    /// FILE is the YAML that `kubectl apply` takes. It is followed: what you save is what runs; a bad FILE is refused with
    /// the field's path and the reason, and what ran before goes on. Exit code 2: FILE or the data directory can't be used.
    Up {
        /// The ImCluster.
        file: PathBuf,
        #[command(flatten)]
        data: DataDirArg,
        /// Where the console (web page and /status) listens, IP:PORT, or `off`.
        #[arg(long, default_value = "127.0.0.1:8090", value_parser = console_address)]
        console: String,
        /// Directory of the im-gateway and im-business programs [default: where imcluster lies]
        #[arg(long, env = "IMCLUSTER_PROGRAMS", hide = true)]
        programs: Option<PathBuf>,
    },
    /// Show tiers, replicas and why, shards, moves, lag and whether a message was lost.
    ///
    /// Exit code 1: no `imcluster up` answers for that data directory.
    Status {
        #[command(flatten)]
        data: DataDirArg,
        /// Format of what is printed.
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
    },
    /// Run the ImClusters of a Kubernetes cluster. The chart starts it; KUBECONFIG works too.
    Operator(OperatorArgs),
    /// Print the CustomResourceDefinitions as YAML, for `kubectl apply -f -`.
    Crds,
    /// The control service. `imcluster up` starts it.
    #[command(hide = true)]
    Control {
        #[command(flatten)]
        data: DataDirArg,
        #[arg(long, default_value = "off")]
        console: String,
        #[arg(long, default_value = "")]
        paths_from: PathBuf,
    },
    /// Become PROGRAM, and die with the process PARENT. `imcluster up` starts its children through this.
    #[command(hide = true)]
    Child {
        #[arg(long)]
        parent: u32,
        #[arg(last = true, required = true)]
        program: Vec<String>,
    },
}

#[derive(Args)]
struct OperatorArgs {
    /// Image of the members where an ImCluster names none; it holds /im-gateway and /im-business.
    #[arg(long, env = "IMCLUSTER_IMAGE")]
    image: String,
    /// Where the control service listens, IP:PORT.
    #[arg(long, env = "IMCLUSTER_CONTROL_ADDRESS", default_value = "0.0.0.0:7200")]
    control_address: SocketAddr,
    /// Where members reach the control service of all replicas, HOST:PORT.
    #[arg(long, env = "IMCLUSTER_CONTROL_SERVICE")]
    control_service: String,
    /// Where /healthz, /readyz and /metrics listen, IP:PORT.
    #[arg(long, env = "IMCLUSTER_HTTP_ADDRESS", default_value = "0.0.0.0:8080")]
    http_address: SocketAddr,
    /// The only namespace to look at [default: all]
    #[arg(long, env = "IMCLUSTER_NAMESPACE")]
    namespace: Option<String>,
    /// Namespace of the Lease [default: the pod's own, or KUBECONFIG's]
    #[arg(long, env = "IMCLUSTER_LEASE_NAMESPACE")]
    lease_namespace: Option<String>,
    /// The Prometheus to ask where an ImCluster names none, for example http://prometheus.monitoring:9090 [default: members are asked directly]
    #[arg(long, env = "IMCLUSTER_PROMETHEUS_URL")]
    prometheus_url: Option<String>,
    /// Name of this replica.
    #[arg(long, env = "POD_NAME")]
    pod_name: String,
    /// Where members reach this very replica, an IP address.
    #[arg(long, env = "POD_IP")]
    pod_ip: String,
}

#[derive(Args)]
struct DataDirArg {
    /// Where messages, logs and members.json are kept.
    #[arg(long, env = "IMCLUSTER_DATA_DIR", default_value = "imcluster-data", value_name = "DIR")]
    data_dir: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// For people.
    Table,
    /// For programs: the console's document.
    Json,
}

fn console_address(text: &str) -> Result<String, String> {
    match text.parse::<std::net::SocketAddr>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) if text == "off" => Ok(text.to_owned()),
        Err(_) => Err("write IP:PORT, for example 127.0.0.1:8090, or `off`".to_owned()),
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Up { file, data, console, programs } => run_up(file, data.data_dir, console, programs),
        Command::Status { data, output } => on_runtime(run_status(data.data_dir, output)),
        Command::Operator(args) => run_operator(args),
        Command::Crds => print_crds(),
        Command::Control { data, console, paths_from } => run_control(data.data_dir, console, paths_from),
        Command::Child { parent, program } => {
            let Some((program, args)) = program.split_first() else { return ExitCode::from(EXIT_INPUT) };
            let error = up::become_child(parent, program.as_ref(), args);
            fail(format!("{program}: {error}"), 1)
        }
    }
}

fn fail(problem: impl std::fmt::Display, code: u8) -> ExitCode {
    eprintln!("imcluster: {problem}");
    ExitCode::from(code)
}

/// A runtime on this very thread: for `up` that matters, see its module.
fn on_runtime(work: impl Future<Output = ExitCode>) -> ExitCode {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(work),
        Err(error) => fail(format!("no runtime: {error}"), 1),
    }
}

fn run_up(file: PathBuf, data_dir: PathBuf, console: String, programs: Option<PathBuf>) -> ExitCode {
    let imcluster = match std::env::current_exe() {
        Ok(path) => path,
        Err(error) => return fail(format!("this program's own path is not known: {error}"), 1),
    };
    let beside = imcluster.parent().map(PathBuf::from).unwrap_or_default();
    let options = up::Options { file, data_dir, console, programs: programs.unwrap_or(beside), imcluster };
    on_runtime(async move {
        match up::run(options).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error @ (up::UpError::File { .. } | up::UpError::Refused { .. } | up::UpError::DataDir(_))) => {
                fail(error, EXIT_INPUT)
            }
            Err(error @ up::UpError::System { .. }) => fail(error, 1),
        }
    })
}

fn run_control(data_dir: PathBuf, console: String, paths_from: PathBuf) -> ExitCode {
    let options = control::Options { data_dir, console, paths_from };
    as_service(control::run(options))
}

fn run_operator(args: OperatorArgs) -> ExitCode {
    let OperatorArgs {
        image,
        control_address,
        control_service,
        http_address,
        namespace,
        lease_namespace,
        prometheus_url,
        pod_name,
        pod_ip,
    } = args;
    // Files that an ImCluster names would be the operator's own.
    let metrics = metrics::Setup { prometheus: prometheus_url.map(Endpoint::plain), reads_files: false };
    let setup = control::Setup { metrics, ..control::Setup::default() };
    as_service(controller::run(controller::Options {
        image,
        control_address,
        control_service,
        http_address,
        namespace,
        lease_namespace,
        pod_name,
        pod_ip,
        setup,
    }))
}

/// Runs what logs, on threads of its own.
fn as_service<E: std::fmt::Display>(work: impl Future<Output = Result<(), E>>) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    // A log that can't be written (disk full) must not end the process, as printing that to stderr would.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    log.log_internal_errors(false).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(format!("no runtime: {error}"), 1),
    };
    match runtime.block_on(work) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_status(data_dir: PathBuf, output: Format) -> ExitCode {
    let data = match DataDir::open(&data_dir) {
        Ok(data) => data,
        Err(error) => return fail(format!("{error}: is that the --data-dir of an `imcluster up`?"), 1),
    };
    let status = match console::fetch(&data.status_socket()).await {
        Ok(status) => status,
        Err(error) => return fail(error, 1),
    };
    match output {
        Format::Table => print(&console::table(&status)),
        Format::Json => match serde_json::to_string_pretty(&status) {
            Ok(json) => print(&(json + "\n")),
            Err(error) => fail(error, 1),
        },
    }
}

/// To stdout; a reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> ExitCode {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => fail(error, 1),
        Ok(()) | Err(_) => ExitCode::SUCCESS,
    }
}

fn print_crds() -> ExitCode {
    let mut text = String::new();
    for crd in [ImCluster::crd(), ShardMap::crd()] {
        match serde_norway::to_string(&crd) {
            Ok(yaml) => text += &format!("---\n{yaml}"),
            Err(error) => return fail(error, 1),
        }
    }
    print(&text)
}
