//! Following edits of FILE, as a pure decision over what each look at it found.

use im_crds::{ImCluster, Place};
use std::io;
use std::time::Duration;

/// How often FILE is looked at.
pub const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// Looks in a row that find no file before that counts as an error: editors replace files, which leaves a gap.
const ABSENT_LOOKS_MAX: u32 = 5;

/// What a look at FILE led to.
#[derive(Debug, PartialEq)]
pub enum Verdict {
    /// It is good and new: run it.
    Adopt {
        /// FILE's text.
        text: String,
        /// What it says.
        cluster: Box<ImCluster>,
    },
    /// What runs goes on. One line per rule that is broken, each with the field's path and the reason.
    Refuse(String),
}

/// Remembers what was seen of FILE.
#[derive(Debug)]
pub struct Follower {
    running: ImCluster,
    /// The text that the last verdict was about.
    judged: Option<String>,
    /// A text seen once: it is judged when the next look finds it again, so that half a write is never judged.
    candidate: Option<String>,
    absent_looks: u32,
}

impl Follower {
    /// Starts from what runs.
    pub fn new(text: String, running: ImCluster) -> Self {
        Self { running, judged: Some(text), candidate: None, absent_looks: 0 }
    }

    /// Takes what one look found; tells what changed by it, if anything did.
    pub fn look(&mut self, found: io::Result<String>) -> Option<Verdict> {
        let text = match found {
            Ok(text) => text,
            Err(error) => {
                self.absent_looks += 1;
                self.candidate = None;
                if self.absent_looks != ABSENT_LOOKS_MAX {
                    return None;
                }
                self.judged = None;
                return Some(Verdict::Refuse(format!("can't be read: {error}")));
            }
        };
        self.absent_looks = 0;
        if self.judged.as_ref() == Some(&text) {
            self.candidate = None;
            return None;
        }
        if self.candidate.as_ref() != Some(&text) {
            self.candidate = Some(text);
            return None;
        }
        self.candidate = None;
        self.judged = Some(text.clone());
        match judge(&text, Some(&self.running)) {
            Ok(cluster) => {
                self.running = (*cluster).clone();
                Some(Verdict::Adopt { text, cluster })
            }
            Err(reasons) => Some(Verdict::Refuse(reasons)),
        }
    }
}

/// Reads `text` and checks it by itself and, if something runs or ran before in this data directory, as its successor.
///
/// # Errors
/// One line per rule that is broken, each with the field's path and the reason.
pub fn judge(text: &str, running: Option<&ImCluster>) -> Result<Box<ImCluster>, String> {
    let cluster = ImCluster::parse_yaml(text).map_err(|error| error.to_string())?;
    let mut violations = cluster.validate_at(Place::Machine);
    if let Some(running) = running {
        violations.extend(cluster.validate_update(running));
    }
    let reasons: Vec<String> = violations.iter().map(ToString::to_string).collect();
    if reasons.is_empty() { Ok(Box::new(cluster)) } else { Err(reasons.join("\n")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(shards: u32, gateways: u32) -> String {
        format!(
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {{name: chat}}\n\
             spec:\n  auth: {{insecure: {{}}}}\n  gateway: {{replicas: {gateways}}}\n  business: {{shards: {shards}}}\n"
        )
    }

    fn follower() -> Follower {
        let text = yaml(256, 1);
        let cluster = judge(&text, None).expect("a good file");
        Follower::new(text, *cluster)
    }

    #[test]
    fn a_change_counts_once_it_stays() {
        let mut follower = follower();
        assert_eq!(follower.look(Ok(yaml(256, 1))), None);
        assert_eq!(follower.look(Ok(yaml(256, 2))), None, "may be half a write");
        assert_eq!(follower.look(Ok(yaml(256, 3))), None, "it was");
        match follower.look(Ok(yaml(256, 3))) {
            Some(Verdict::Adopt { cluster, .. }) => assert_eq!(cluster.spec.gateway.replicas, Some(3)),
            other => panic!("{other:?}"),
        }
        assert_eq!(follower.look(Ok(yaml(256, 3))), None, "told once");
    }

    #[test]
    fn a_bad_file_is_refused_with_path_and_reason_and_a_return_to_what_runs_is_told() {
        let mut follower = follower();
        for (bad, expected) in [
            (yaml(128, 1), "spec.business.shards: shards can't change"),
            (yaml(256, 0), "spec.gateway.replicas: is 0"),
            (yaml(256, 1).replace("gateway:", "gatway:"), "spec.gatway"),
            (yaml(256, 1) + "  storage: {postgres: {url: 'postgres://x/y'}}\n", "storage can't change its kind"),
            ("}".to_owned(), "not valid YAML"),
        ] {
            assert_eq!(follower.look(Ok(bad.clone())), None);
            match follower.look(Ok(bad)) {
                Some(Verdict::Refuse(reasons)) => assert!(reasons.contains(expected), "{reasons}"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(follower.look(Ok(yaml(256, 1))), None);
        assert!(matches!(follower.look(Ok(yaml(256, 1))), Some(Verdict::Adopt { .. })), "the error is over");
    }

    #[test]
    fn a_file_that_is_being_replaced_is_not_an_error_and_one_that_stays_away_is() {
        let absent = || Err(io::Error::from(io::ErrorKind::NotFound));
        let mut follower = follower();
        for _ in 1..ABSENT_LOOKS_MAX {
            assert_eq!(follower.look(absent()), None);
        }
        assert!(matches!(follower.look(absent()), Some(Verdict::Refuse(_))));
        assert_eq!(follower.look(absent()), None, "told once");
        assert_eq!(follower.look(Ok(yaml(256, 1))), None);
        assert!(matches!(follower.look(Ok(yaml(256, 1))), Some(Verdict::Adopt { .. })));
    }
}
