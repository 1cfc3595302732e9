//! `imcluster up` with real processes: the gateways, business members and the store are small shell scripts, control is the
//! real one.
#![allow(clippy::unwrap_used)]

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const IMCLUSTER: &str = env!("CARGO_BIN_EXE_imcluster");
/// Far above what anything here takes; only a failure waits for so long.
const DEADLINE: Duration = Duration::from_secs(30);

/// Runs until SIGTERM, notes in `ready` that it waits for that, and the end in `order`.
const OBEDIENT: &str =
    "trap 'echo ROLE >> DIR/order; exit 0' TERM\necho ROLE >> DIR/ready\nwhile :; do sleep 0.02; done\n";
/// Does not care for SIGTERM.
const STUBBORN: &str = "trap '' TERM\necho ROLE >> DIR/ready\nwhile :; do sleep 0.02; done\n";
/// Notes its start in `starts` and ends at once.
const CRASHING: &str = "date +%s%N >> DIR/starts\nexit 3\n";

fn yaml(gateways: u32) -> String {
    format!(
        "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {{name: chat}}\nspec:\n  auth: {{insecure: {{}}}}\n  \
         gateway: {{replicas: {gateways}}}\n  business: {{replicas: 1, shards: 16}}\n"
    )
}

/// A directory of its own for each test, with programs and FILE.
struct Place {
    dir: PathBuf,
}

impl Place {
    fn new(test: &str, gateway: &str, business: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{test}-{}-{number}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(dir.join("bin")).unwrap();
        let place = Self { dir };
        // `im-business store` and `im-business serve` are two roles of one program.
        let fill =
            |script: &str, role: &str| script.replace("ROLE", role).replace("DIR", &place.dir.display().to_string());
        place.program("im-gateway", &fill(gateway, "gateway"));
        let store = fill(if business == CRASHING { CRASHING } else { OBEDIENT }, "store");
        place.program("im-business", &format!("if [ $1 = store ]; then\n{store}fi\n{}", fill(OBEDIENT, "business")));
        place.write(&yaml(1));
        place
    }

    fn program(&self, name: &str, script: &str) {
        let path = self.dir.join("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn file(&self) -> PathBuf {
        self.dir.join("chat.yaml")
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// As an editor does it: beside, then renamed.
    fn write(&self, text: &str) {
        let beside = self.dir.join("chat.yaml.swp");
        fs::write(&beside, text).unwrap();
        fs::rename(beside, self.file()).unwrap();
    }

    fn command(&self) -> Command {
        let mut command = Command::new(IMCLUSTER);
        command.arg("up").arg(self.file()).arg("--data-dir").arg(self.data());
        command.args(["--console", "off", "--programs"]).arg(self.dir.join("bin")).stdin(Stdio::null());
        command
    }

    fn up(&self) -> Up<'_> {
        let stderr = fs::File::create(self.dir.join("stderr")).unwrap();
        let child = self.command().stderr(stderr).spawn().unwrap();
        Up { place: self, child, pids: Vec::new() }
    }

    fn stderr(&self) -> String {
        fs::read_to_string(self.dir.join("stderr")).unwrap_or_default()
    }

    /// Name → (role, pid, addresses).
    fn members(&self) -> BTreeMap<String, (String, i32, Value)> {
        let text = fs::read_to_string(self.data().join("members.json")).unwrap_or_else(|_| "[]".into());
        let list: Vec<Value> = serde_json::from_str(&text).expect("members.json is replaced whole");
        let entry = |member: &Value| {
            let text = |field: &str| member[field].as_str().unwrap().to_owned();
            (text("name"), (text("role"), member["pid"].as_i64().unwrap() as i32, member["addresses"].clone()))
        };
        list.iter().map(entry).collect()
    }

    fn pid(&self, name: &str) -> Option<i32> {
        self.members().get(name).map(|(_, pid, _)| *pid)
    }

    fn status(&self) -> Option<Value> {
        let output = self.status_command(&["-o", "json"]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("JSON"))
    }

    fn status_command(&self, args: &[&str]) -> Output {
        Command::new(IMCLUSTER).arg("status").arg("--data-dir").arg(self.data()).args(args).output().unwrap()
    }
}

/// A running `imcluster up`. What is left of it when a test fails is killed.
struct Up<'a> {
    place: &'a Place,
    child: Child,
    pids: Vec<i32>,
}

impl Up<'_> {
    fn eventually<T>(&mut self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.note_pids();
            if let Some(found) = look() {
                return found;
            }
            assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}\n{}", self.place.stderr());
            sleep(Duration::from_millis(20));
        }
    }

    fn note_pids(&mut self) {
        self.pids.extend(self.place.members().values().map(|(_, pid, _)| *pid));
        self.pids.sort_unstable();
        self.pids.dedup();
    }

    fn all_running(&mut self) -> BTreeMap<String, (String, i32, Value)> {
        let place = self.place;
        let names = ["business-0", "control", "gateway-0", "store-0"];
        self.eventually("all four processes", || {
            let members = place.members();
            // A shell that was just started dies of a signal that it will trap a moment later.
            let ready = fs::read_to_string(place.dir.join("ready")).unwrap_or_default();
            let are_ready = ["gateway", "business", "store"].iter().all(|role| ready.contains(role));
            (are_ready && members.keys().map(String::as_str).collect::<Vec<_>>() == names).then_some(members)
        })
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for the supervisor's end, and for that of everybody it ever listed.
    fn ended(&mut self) -> Option<i32> {
        let deadline = Instant::now() + DEADLINE;
        let code = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status.code(),
                None => assert!(Instant::now() < deadline, "the supervisor does not end\n{}", self.place.stderr()),
            }
            sleep(Duration::from_millis(20));
        };
        let pids = self.pids.clone();
        assert!(pids.len() >= 2);
        while let Some(pid) = pids.iter().find(|pid| alive(**pid)) {
            assert!(Instant::now() < deadline, "process {pid} outlives the supervisor");
            sleep(Duration::from_millis(20));
        }
        code
    }
}

impl Drop for Up<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.place.dir);
        }
    }
}

/// Whether a process runs; one that ended and waits for its parent does not.
fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| state != 'Z') && test_kill_process(Pid::from_raw(pid).unwrap()).is_ok()
}

fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn starts_all_lists_them_and_ends_them_in_order_on_ctrl_c() {
    let place = Place::new("order", OBEDIENT, OBEDIENT);
    let mut up = place.up();
    let members = up.all_running();
    for (name, (role, pid, addresses)) in &members {
        assert!(name.starts_with(role.as_str()), "{name} is a {role}");
        assert!(alive(*pid), "{name}");
        let expected: &[&str] = match role.as_str() {
            "gateway" => &["http", "mqtt"],
            "business" => &[],
            role => &[role],
        };
        let listed: Vec<&str> = addresses.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(listed, expected, "{name}");
    }
    let mode = fs::metadata(place.data().join("run/secrets.json")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "secrets are the owner's alone");

    up.signal(Signal::INT);
    assert_eq!(up.ended(), Some(0), "{}", place.stderr());
    assert_eq!(fs::read_to_string(place.dir.join("order")).unwrap(), "gateway\nbusiness\nstore\n");
    assert!(place.members().is_empty(), "nobody runs any more");
    let after = place.status_command(&[]);
    assert_eq!(after.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&after.stderr).contains("is `imcluster up` running"), "{after:?}");
}

#[test]
fn a_killed_supervisor_takes_all_children_with_it() {
    let place = Place::new("killed", OBEDIENT, OBEDIENT);
    let mut up = place.up();
    up.all_running();
    up.signal(Signal::KILL);
    assert_eq!(up.ended(), None, "by a signal");
}

#[test]
fn a_second_ctrl_c_ends_at_once_who_does_not_want_to() {
    let place = Place::new("stubborn", STUBBORN, OBEDIENT);
    let mut up = place.up();
    up.all_running();
    up.signal(Signal::INT);
    up.eventually("the end to begin", || place.stderr().contains("ending, in order").then_some(()));
    let began = Instant::now();
    up.signal(Signal::INT);
    assert_eq!(up.ended(), Some(0));
    assert!(began.elapsed() < Duration::from_secs(4), "not the whole grace period: {:?}", began.elapsed());
}

#[test]
fn who_dies_is_started_again_under_its_name() {
    let place = Place::new("restart", OBEDIENT, OBEDIENT);
    let mut up = place.up();
    let before = up.all_running();
    for name in ["gateway-0", "store-0", "control"] {
        let pid = before[name].1;
        kill(pid);
        up.eventually(name, || place.pid(name).filter(|now| *now != pid));
    }
    let after = up.all_running();
    assert_eq!(before["business-0"].1, after["business-0"].1, "nobody else was touched by control's death");
    // The new control serves, under a higher term.
    let term = up
        .eventually("status of the second control", || place.status()?["shards"]["term"].as_u64().filter(|t| *t == 2));
    assert_eq!(term, 2);
    up.signal(Signal::TERM);
    assert_eq!(up.ended(), Some(0));
}

#[test]
fn who_keeps_dying_is_started_at_once_and_then_ever_more_slowly() {
    let place = Place::new("backoff", OBEDIENT, CRASHING);
    let mut up = place.up();
    let starts = up.eventually("six starts", || {
        let text = fs::read_to_string(place.dir.join("starts")).ok()?;
        let starts: Vec<u128> = text.lines().filter_map(|line| line.parse().ok()).collect();
        (starts.len() >= 6).then_some(starts)
    });
    let gaps: Vec<u128> = starts.windows(2).map(|pair| (pair[1] - pair[0]) / 1_000_000).collect();
    for (gap, at_least) in gaps[1..].iter().zip([100, 200, 400, 800]) {
        assert!(*gap >= at_least, "gaps in ms: {gaps:?}");
    }
    assert!(place.stderr().contains("exit status: 3"), "{}", place.stderr());
}

#[test]
fn edits_are_followed_and_bad_ones_refused_with_path_and_reason() {
    let place = Place::new("edits", OBEDIENT, OBEDIENT);
    let mut up = place.up();
    let before = up.all_running();

    place.write(&yaml(0));
    up.eventually("the refusal on stderr", || place.stderr().contains("spec.gateway.replicas: is 0").then_some(()));
    let error =
        up.eventually("the refusal in the status", || place.status()?["file"]["error"].as_str().map(str::to_owned));
    assert!(error.starts_with("spec.gateway.replicas: is 0"), "{error}");
    let table = String::from_utf8(place.status_command(&[]).stdout).unwrap();
    assert!(table.contains("The file is refused") && table.contains("gateway-0"), "{table}");
    place.write(&yaml(1).replace("shards: 16", "shards: 8"));
    up.eventually("shards can't change", || {
        place.stderr().contains("spec.business.shards: shards can't").then_some(())
    });
    assert_eq!(up.all_running(), before, "what ran before goes on");

    place.write(&yaml(3));
    up.eventually("three gateways", || place.pid("gateway-1").and(place.pid("gateway-2")));
    assert_eq!(place.pid("gateway-0"), Some(before["gateway-0"].1));
    up.eventually("a good file in the status", || place.status()?["file"]["ok"].as_bool().filter(|ok| *ok));

    place.write(&yaml(1));
    up.eventually("one gateway again", || (place.members().len() == 4).then_some(()));
    up.signal(Signal::INT);
    assert_eq!(up.ended(), Some(0));
}

#[test]
fn one_supervisor_per_data_directory_and_no_other_cluster_in_it() {
    let place = Place::new("lock", OBEDIENT, OBEDIENT);
    let mut up = place.up();
    up.all_running();
    let second = place.command().output().unwrap();
    assert_eq!(second.status.code(), Some(2));
    let message = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(message.contains(&format!("(pid {})", up.child.id())) && message.contains("--data-dir"), "{message}");
    up.signal(Signal::INT);
    assert_eq!(up.ended(), Some(0));

    place.write(&yaml(1).replace("shards: 16", "shards: 8"));
    let other = place.command().output().unwrap();
    assert_eq!(other.status.code(), Some(2), "the messages in the directory lie by 16 shards");
    assert!(String::from_utf8_lossy(&other.stderr).contains("spec.business.shards"), "{other:?}");
}

#[test]
fn a_bad_file_at_the_start_starts_nothing() {
    let place = Place::new("bad", OBEDIENT, OBEDIENT);
    place.write(&yaml(1).replace("auth", "oauth"));
    let output = place.command().output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("spec.oauth"), "{output:?}");
    assert!(!place.data().exists());
    let _ = fs::remove_dir_all(&place.dir);
}
