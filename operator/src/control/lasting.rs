//! What comes and goes is no news; what lasts is. Pure, with time as a parameter.

use std::time::Duration;

/// What is there for that long lasts, and so does its absence. One scrape that fails, or one answer in an outage, is neither.
pub(super) const LASTS: Duration = Duration::from_secs(10);

/// What of something that comes and goes is shown.
#[derive(Debug)]
pub(super) struct Lasting<T> {
    shown: Option<T>,
    latest: Option<T>,
    /// Since when there is something, or nothing.
    since: Duration,
    /// Since when it is just this.
    unchanged_since: Duration,
}

impl<T> Default for Lasting<T> {
    fn default() -> Self {
        Self { shown: None, latest: None, since: Duration::ZERO, unchanged_since: Duration::ZERO }
    }
}

impl<T: Clone + PartialEq> Lasting<T> {
    /// Takes in what is there now, and says whether something else is to be shown from now on. Words that change all the time
    /// while something is there stay those that were shown first.
    pub(super) fn see(&mut self, now: Duration, found: Option<T>) -> bool {
        if found.is_some() != self.latest.is_some() {
            self.since = now;
        }
        if found != self.latest {
            self.unchanged_since = now;
            self.latest = found;
        }
        let same_kind = self.shown.is_some() == self.latest.is_some();
        let since = if same_kind { self.unchanged_since } else { self.since };
        let news = self.shown != self.latest && now.saturating_sub(since) >= LASTS;
        if news {
            self.shown.clone_from(&self.latest);
        }
        news
    }

    /// What is to be shown.
    pub(super) fn shown(&self) -> Option<&T> {
        self.shown.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown at each of these seconds, of what was found then.
    fn shown(found: &[(u64, Option<&'static str>)]) -> Vec<Option<&'static str>> {
        let mut lasting = Lasting::default();
        let see = |(second, found): &(u64, Option<&'static str>)| {
            let before = lasting.shown().copied();
            let news = lasting.see(Duration::from_secs(*second), *found);
            assert_eq!(news, before != lasting.shown().copied());
            lasting.shown().copied()
        };
        found.iter().map(see).collect()
    }

    #[test]
    fn what_lasts_is_shown_and_what_comes_and_goes_is_not() {
        let a = Some("a");
        assert_eq!(shown(&[(0, a), (9, a), (10, a)]), [None, None, a]);
        assert_eq!(shown(&[(0, a), (9, None), (10, a), (19, a), (20, a)]), [None, None, None, None, a]);
        assert_eq!(shown(&[(0, a), (10, a), (11, None), (12, a), (22, None), (32, None)]), [None, a, a, a, a, None]);
    }

    #[test]
    fn other_words_are_shown_when_they_last() {
        let (a, b) = (Some("a"), Some("b"));
        assert_eq!(shown(&[(0, a), (5, b), (10, b), (19, b)]), [None, None, b, b], "something was there all the time");
        assert_eq!(shown(&[(0, a), (10, a), (11, b), (20, b), (21, b)]), [None, a, a, a, b]);
        let flips = shown(&[(0, a), (10, a), (15, b), (20, a), (25, b), (30, a)]);
        assert_eq!(flips, [None, a, a, a, a, a], "words that change all the time are no news");
    }
}
