//! A PostgreSQL server of the test's own: fresh data directory, free port, fsync on, gone at the end. Included by `#[path]`.

use std::fmt::Display;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

/// Until a server that was started takes connections.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// A running server. Dropping it stops it and removes its data.
pub struct PostgresServer {
    directory: PathBuf,
    port: u16,
    running: Option<Running>,
}

struct Running {
    pid: u32,
    /// Started the process and reads its log until it ends. The process dies with this thread, whatever ends the test.
    keeper: JoinHandle<()>,
}

impl PostgresServer {
    /// Makes a data directory and starts a server on it.
    pub fn start() -> Result<Self, String> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("im-postgres-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).map_err(|e| failed("create the data directory", &e))?;
        let mut server = Self { directory, port: 0, running: None };
        if let Some(user) = other_user()? {
            run(Command::new("chown").arg(user).arg(&server.directory))?;
        }
        let data = server.directory.join("data");
        run(as_other_user(&binary("initdb")?)?
            .args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "--no-sync", "--pgdata"])
            .arg(&data))?;
        server.port = free_port()?;
        server.run()?;
        Ok(server)
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection URL of the superuser.
    pub fn url(&self) -> String {
        url_at(self.port)
    }

    /// Puts a certificate and its key, both PEM, where the server looks for them when `ssl` is on.
    pub fn take_certificate(&self, certificate: &str, key: &str) -> Result<(), String> {
        for (name, pem) in [("server.crt", certificate), ("server.key", key)] {
            let path = self.directory.join("data").join(name);
            std::fs::write(&path, pem).map_err(|e| failed("write a certificate", &e))?;
            run(Command::new("chmod").arg("600").arg(&path))?;
            if let Some(user) = other_user()? {
                run(Command::new("chown").arg(user).arg(&path))?;
            }
        }
        Ok(())
    }

    /// Stops the processes that serve connections: what is asked of them stays in flight until [`Self::stop`], which ends them so.
    pub fn freeze(&self) -> Result<(), String> {
        let Some(running) = &self.running else { return Err("PostgreSQL does not run".to_owned()) };
        run(Command::new("pkill").args(["-STOP", "-P", &running.pid.to_string()]))
    }

    /// Ends the server: `signal` is INT (a fast shutdown: connections are ended) or QUIT (at once, as a crash). [`Self::run`] starts it
    /// again on the same data and port.
    pub fn stop(&mut self, signal: &str) -> Result<(), String> {
        let Some(running) = self.running.take() else { return Ok(()) };
        let pid = running.pid.to_string();
        run(Command::new("kill").arg(format!("-{signal}")).arg(&pid))?;
        // The frozen hear of the end only once they go on. There may be none left.
        let _ = run(Command::new("pkill").args(["-CONT", "-P", &pid]));
        running.keeper.join().map_err(|_| "the thread that keeps PostgreSQL panicked".to_owned())
    }

    /// Starts the server and waits until it says that it takes connections.
    pub fn run(&mut self) -> Result<(), String> {
        let mut command = as_other_user(&binary("postgres")?)?;
        command
            .arg("-D")
            .arg(self.directory.join("data"))
            .arg("-k")
            .arg(&self.directory)
            .args(["-h", "127.0.0.1", "-p", &self.port.to_string()])
            .args(["-c", "fsync=on", "-c", "log_min_messages=log", "-c", "log_min_error_statement=panic"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let (say, heard) = mpsc::channel::<Result<u32, String>>();
        let keeper = std::thread::spawn(move || keep(command, &say));
        let hear = || heard.recv_timeout(START_TIMEOUT).map_err(|_| "PostgreSQL does not start".to_owned())?;
        let pid = hear()?;
        hear()?;
        self.running = Some(Running { pid, keeper });
        Ok(())
    }
}

impl Drop for PostgresServer {
    fn drop(&mut self) {
        if let Err(e) = self.stop("QUIT") {
            eprintln!("stopping PostgreSQL: {e}");
        }
        if let Err(e) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("removing {}: {e}", self.directory.display());
        }
    }
}

/// A port below those that the kernel hands out for outgoing connections: while the server is down none of them may take it, nor
/// may a client that looks for it there be connected to itself.
fn free_port() -> Result<u16, String> {
    static TRIED: AtomicU32 = AtomicU32::new(0);
    const PORTS: std::ops::Range<u32> = 30_000..32_700;
    let mut ports = PORTS.map(|_| {
        let offset = std::process::id().wrapping_mul(7) % 2_700 + TRIED.fetch_add(1, Ordering::Relaxed);
        (PORTS.start + offset % 2_700) as u16
    });
    ports
        .find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok())
        .ok_or_else(|| format!("no free port in {PORTS:?}"))
}

/// The URL of a server, or of something before it, on 127.0.0.1.
pub fn url_at(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

/// Says the pid, then that the server is ready (or how its log ended); then reads the log until the process ends.
fn keep(mut command: Command, say: &mpsc::Sender<Result<u32, String>>) {
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => return drop(say.send(Err(failed("start PostgreSQL", &e)))),
    };
    let pid = child.id();
    // Whoever listened may have given up: then the child is still reaped below.
    let _ = say.send(Ok(pid));
    let mut log = String::new();
    for line in child.stderr.take().into_iter().flat_map(|stderr| BufReader::new(stderr).lines()).map_while(Result::ok)
    {
        if line.contains("ready to accept connections") {
            let _ = say.send(Ok(pid));
        }
        if log.len() < 4096 {
            log.push_str(&line);
            log.push('\n');
        }
    }
    let _ = child.wait();
    let _ = say.send(Err(format!("PostgreSQL ended; its log begins:\n{log}")));
}

/// PostgreSQL refuses to run as root: then another user, or none when we are not root.
fn other_user() -> Result<Option<&'static str>, String> {
    let output = Command::new("id").arg("-u").output().map_err(|e| failed("run id", &e))?;
    if output.stdout.trim_ascii() != b"0" {
        return Ok(None);
    }
    let exists = |user: &str| Command::new("id").args(["-u", user]).output().is_ok_and(|o| o.status.success());
    match ["postgres", "nobody"].into_iter().find(|user| exists(user)) {
        Some(user) => Ok(Some(user)),
        None => Err("running as root, and there is no user postgres or nobody to run PostgreSQL as".to_owned()),
    }
}

fn as_other_user(program: &Path) -> Result<Command, String> {
    let Some(user) = other_user()? else { return Ok(Command::new(program)) };
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={user}")).arg("--clear-groups").args(["--pdeathsig", "KILL"]).arg("--").arg(program);
    command.current_dir(std::env::temp_dir());
    Ok(command)
}

/// The newest installed PostgreSQL's program.
fn binary(name: &str) -> Result<PathBuf, String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|version| {
            Some((version.file_name().to_str()?.parse().ok()?, version.path().join("bin").join(name)))
        })
        .filter(|(_, path)| path.exists())
        .collect();
    found.sort();
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|directory| directory.join(name)).find(|program| program.exists())
    };
    (found.pop().map(|(_, path)| path).or_else(in_path))
        .ok_or_else(|| format!("{name} is not installed: apt-get install postgresql"))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|e| failed(&format!("run {command:?}"), &e))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
}

fn failed(what: &str, error: &dyn Display) -> String {
    format!("cannot {what}: {error}")
}
