//! What a process knows of itself; for the metrics of all tiers.

use std::time::Duration;

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
    use super::*;

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
