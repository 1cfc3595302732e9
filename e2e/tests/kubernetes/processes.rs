//! The processes of pods, seen from the machine that the nodes run on: signals that Kubernetes has no word for (SIGSTOP, a
//! SIGKILL of which it learns later), and what a process really uses.

use std::{fs, time::Duration};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::TestResult;

/// A process of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodProcess(Pid);

/// What a process used.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Processor time since its start.
    pub cpu: Duration,
    /// Resident memory.
    pub resident_bytes: u64,
}

/// Clock ticks of `/proc/PID/stat` a second: 100 on every Linux that Rust runs on (`USER_HZ` is part of its ABI).
const TICKS_PER_SECOND: u64 = 100;

impl PodProcess {
    /// The process of that program in the pod of that UID.
    ///
    /// # Errors
    /// There is none on this machine, or nobody may see it.
    pub fn find(uid: &str, program: &str) -> TestResult<Self> {
        // The cgroup names the pod: `…/pod0a1b-…/…`, or with the systemd driver `…-pod0a1b_….slice/…`.
        let names = [format!("pod{uid}"), format!("pod{}", uid.replace('-', "_"))];
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw)
            else {
                continue;
            };
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            let in_pod = read("cgroup").lines().any(|line| names.iter().any(|name| line.contains(name.as_str())));
            if in_pod && read("comm").trim_end() == program {
                return Ok(Self(pid));
            }
        }
        let hint = "this needs nodes whose processes are on this machine (drivers kind and host), and root";
        Err(format!("no process {program} of pod {uid}: {hint}").into())
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process is gone.
    pub fn signal(self, signal: Signal) -> TestResult {
        Ok(kill_process(self.0, signal)?)
    }

    /// What it used so far.
    ///
    /// # Errors
    /// The process is gone.
    pub fn usage(self) -> TestResult<Usage> {
        let directory = format!("/proc/{}", self.0.as_raw_nonzero());
        let stat = fs::read_to_string(format!("{directory}/stat"))?;
        // The second field, the name, may hold anything but ends with the last parenthesis; utime and stime are fields 14, 15.
        let (_, fields) = stat.rsplit_once(')').ok_or("no name in stat")?;
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        let status = fs::read_to_string(format!("{directory}/status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        let kibibytes: u64 = resident.ok_or("no VmRSS in status")?.parse()?;
        Ok(Usage { cpu: Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND), resident_bytes: kibibytes * 1024 })
    }
}
