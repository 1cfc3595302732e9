//! When a process that ended is started again.

use std::time::Duration;

/// The delay before the second restart in a row; it doubles from there.
const DELAY_MIN: Duration = Duration::from_millis(100);
/// The longest delay.
const DELAY_MAX: Duration = Duration::from_secs(5);
/// A process that lived for so long was well: its next end counts as the first.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// The back-off of one process: at once, then 100 ms, doubling up to 5 s.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    ends_in_a_row: u32,
}

impl Backoff {
    /// The process ended after it had lived for `lived`: how long to wait before it is started again.
    pub fn ended(&mut self, lived: Duration) -> Duration {
        if lived >= WELL_AFTER {
            self.ends_in_a_row = 0;
        }
        let delay = match self.ends_in_a_row {
            0 => Duration::ZERO,
            n => DELAY_MIN.saturating_mul(1 << (n - 1).min(10)).min(DELAY_MAX),
        };
        self.ends_in_a_row = self.ends_in_a_row.saturating_add(1);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_at_once_then_doubling_to_five_seconds_and_reset_by_a_long_life() {
        let mut backoff = Backoff::default();
        let millis: Vec<u128> = (0..9).map(|_| backoff.ended(Duration::from_millis(5)).as_millis()).collect();
        assert_eq!(millis, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.ended(WELL_AFTER), Duration::ZERO);
        assert_eq!(backoff.ended(Duration::ZERO), DELAY_MIN);
        for _ in 0..100 {
            assert!(backoff.ended(Duration::ZERO) <= DELAY_MAX);
        }
    }
}
