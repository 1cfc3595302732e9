//! What a process knows of itself, whatever its tier: who it is, the CPU time that it used, and when it had better end.

use std::net::SocketAddr;
use std::time::Duration;

/// What tells one member from another with the same configuration. What is given overrides the configuration.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Identity {
    /// The member's name.
    #[arg(long)]
    pub name: Option<String>,
    /// What tells this process from another one of its name [default: the process id]
    #[arg(long)]
    pub instance: Option<String>,
    /// The host at which other processes reach this one [default: the address listened on]
    #[arg(long)]
    pub advertise: Option<String>,
}

impl Identity {
    /// What tells this process from another one of its name.
    pub fn instance(&self) -> String {
        self.instance.clone().unwrap_or_else(|| std::process::id().to_string())
    }

    /// Where others reach what listens here, host:port.
    pub fn advertised(&self, listening: SocketAddr) -> String {
        match &self.advertise {
            // An IPv6 address needs its brackets.
            Some(host) if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{}", listening.port()),
            Some(host) => format!("{host}:{}", listening.port()),
            None => listening.to_string(),
        }
    }
}

/// Ends the process when a panic drops it: for a task or thread without which the process would live on and do half of its work, silently.
/// A new process does all of it.
#[derive(Debug)]
pub struct AbortOnPanic(/** What panicked, for the log. */ pub &'static str);

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("{} panicked: the process ends, a new one starts from what is durable", self.0);
            std::process::abort();
        }
    }
}

/// CPU time that this process has used so far, user and system; zero where there is no `/proc`.
pub fn cpu_time() -> Duration {
    ticks(&std::fs::read_to_string("/proc/self/stat").unwrap_or_default()).map_or(Duration::ZERO, |ticks| {
        // The kernel counts for user space in hundredths of a second (USER_HZ), whatever its own tick.
        Duration::from_millis(ticks * 10)
    })
}

/// `utime` and `stime` of `/proc/PID/stat`: the 12th and 13th fields after the command, which stands in parentheses and may hold spaces
/// and parentheses itself (proc_pid_stat(5)).
fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    Some(fields.next()?? + fields.next()??)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_panic_under_guard_ends_the_process() -> std::io::Result<()> {
        const INSIDE: &str = "IM_TEST_OF_A_PANIC";
        if std::env::var_os(INSIDE).is_some() {
            let _guard = AbortOnPanic("a test");
            panic!("of the test");
        }
        let mut again = Command::new(std::env::current_exe()?);
        again.args(["--exact", "process::tests::a_panic_under_guard_ends_the_process"]).env(INSIDE, "1");
        let status = again.stdout(Stdio::null()).stderr(Stdio::null()).status()?;
        assert_eq!(status.signal(), Some(6), "SIGABRT, not {status}");
        Ok(())
    }

    #[test]
    fn others_reach_it_at_the_advertised_host() {
        let listening = "0.0.0.0:9090".parse().expect("an address");
        for (advertise, expected) in
            [(None, "0.0.0.0:9090"), (Some("10.0.0.7"), "10.0.0.7:9090"), (Some("fd00::7"), "[fd00::7]:9090")]
        {
            let identity = Identity { advertise: advertise.map(str::to_owned), ..Identity::default() };
            assert_eq!(identity.advertised(listening), expected);
        }
    }

    #[test]
    fn the_fields_are_found_behind_any_command() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194304 500 0 0 0 120 30 0 0 20 0 8 0 100 1 1";
        assert_eq!(ticks(stat), Some(150));
        assert_eq!(ticks("7 (x) S 1 7"), None);
        assert_eq!(ticks(""), None);
        let before = cpu_time();
        let work = || std::hint::black_box((0..10_000_u64).map(std::hint::black_box).sum::<u64>());
        let is_seen = (0..1_000_000).any(|_| {
            work();
            cpu_time() > before
        });
        assert!(is_seen, "work takes time");
    }
}
