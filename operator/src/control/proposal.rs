//! What would be done in mode `Recommend`, and its approval: pure.
//!
//! What is shown has a number of its own, which is part of its hash. So an approval is for one showing of one leader: it
//! runs that content once, and whatever was shown before or after is another one.

use crate::platform::Tier;
use crate::shards::{Plan, Proposed};
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// The annotation of the ImCluster whose value is the hash of what is approved.
pub const APPROVE_ANNOTATION: &str = "imcluster.dev/approve";

/// Loads change all the time and a plan with them: what is shown stays that long while it still fits, so that there is
/// time to read and approve it.
const SHOWN_FOR: Duration = Duration::from_secs(300);

/// A change of a tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Which tier.
    pub tier: Tier,
    /// Members that serve, or will.
    pub from: u32,
    /// Members that there should be.
    pub to: u32,
    /// How many of those there are have an outdated configuration, and would be replaced.
    pub outdated: u32,
}

/// All that would be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Shards that would move.
    pub plan: Plan<Proposed>,
    /// Tiers that would change.
    pub changes: Vec<Change>,
}

impl Content {
    fn is_empty(&self) -> bool {
        self.plan.moves().is_empty() && self.changes.is_empty()
    }

    /// One sentence for each thing that would be done.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences = Vec::new();
        for Change { tier, from, to, outdated } in &self.changes {
            if from != to {
                sentences.push(format!("{tier}: {to} members instead of {from}"));
            }
            if *outdated > 0 {
                sentences.push(format!("{tier}: {outdated} members replaced by ones with the new configuration"));
            }
        }
        match self.plan.moves().len() {
            0 => {}
            moves => sentences.push(format!("{moves} shards move")),
        }
        sentences
    }

    fn hash(&self, term: u64, number: u64) -> u64 {
        let mut hasher = Xxh3::new();
        for number in [term, number, self.plan.hash()] {
            hasher.update(&number.to_le_bytes());
        }
        for Change { tier, from, to, outdated } in &self.changes {
            hasher.update(tier.to_string().as_bytes());
            for number in [from, to, outdated] {
                hasher.update(&number.to_le_bytes());
            }
        }
        hasher.digest()
    }
}

/// Something that is shown and waits for approval.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// What approves it.
    pub hash: String,
    /// What would be done.
    pub content: Content,
    since: Duration,
}

/// What an approval leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// There is none, or it was dealt with before.
    Nothing,
    /// Do this, once.
    Run(Content),
    /// It is for something else than what is shown; the reason, for people.
    Stale(String),
}

/// What is shown, and what became of the last approval.
#[derive(Debug, Default)]
pub struct Proposals {
    number: u64,
    shown: Option<Shown>,
    /// The last approval that was dealt with.
    handled: Option<String>,
}

impl Proposals {
    /// What is shown now.
    pub fn shown(&self) -> Option<&Shown> {
        self.shown.as_ref()
    }

    /// Shows `fresh`, unless what is shown already fits as well: the tiers would change in the same way, and `fits` says
    /// that its moves could still be made.
    pub fn show(&mut self, now: Duration, term: u64, fresh: Content, fits: impl FnOnce(&Plan<Proposed>) -> bool) {
        if fresh.is_empty() {
            self.shown = None;
            return;
        }
        if let Some(shown) = &self.shown {
            let same_moves = shown.content.plan == fresh.plan;
            let moves_fit = !shown.content.plan.moves().is_empty()
                && !fresh.plan.moves().is_empty()
                && now.saturating_sub(shown.since) < SHOWN_FOR
                && fits(&shown.content.plan);
            if shown.content.changes == fresh.changes && (same_moves || moves_fit) {
                return;
            }
        }
        self.number += 1;
        let hash = format!("{:016x}", fresh.hash(term, self.number));
        self.shown = Some(Shown { hash, content: fresh, since: now });
    }

    /// Shows nothing any more: decisions are carried out without approval.
    pub fn clear(&mut self) {
        self.shown = None;
    }

    /// Takes the approval that the ImCluster bears now.
    pub fn approve(&mut self, approval: Option<&str>) -> Verdict {
        let Some(approval) = approval.map(str::trim).filter(|approval| !approval.is_empty()) else {
            self.handled = None;
            return Verdict::Nothing;
        };
        if self.handled.as_deref() == Some(approval) {
            return Verdict::Nothing;
        }
        self.handled = Some(approval.to_owned());
        match self.shown.take_if(|shown| shown.hash == approval) {
            Some(shown) => Verdict::Run(shown.content),
            None => Verdict::Stale(match &self.shown {
                Some(shown) => format!(
                    "the approval {approval} is stale: what is shown now is {}; look at it and approve that one",
                    shown.hash
                ),
                None => format!("the approval {approval} is stale: nothing is proposed now; remove it"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shards::Move;
    use im_proto::ids::MemberId;

    const NOW: Duration = Duration::from_secs(1_000);

    fn content(shards: &[u32], replicas: Option<(u32, u32)>) -> Content {
        let to = MemberId::new("business-1", 1).expect("a name");
        let moves = shards.iter().map(|shard| Move { shard: *shard, epoch: 1, from: None, to: to.clone() }).collect();
        let change = |(from, to)| Change { tier: Tier::Gateway, from, to, outdated: 0 };
        Content { plan: Plan::new(moves), changes: replicas.map(change).into_iter().collect() }
    }

    fn hash(proposals: &Proposals) -> String {
        proposals.shown().expect("something is shown").hash.clone()
    }

    #[test]
    fn what_is_shown_stays_while_it_fits() {
        let mut proposals = Proposals::default();
        proposals.show(NOW, 1, content(&[1, 2], None), |_| true);
        let first = hash(&proposals);
        proposals.show(NOW + Duration::from_secs(60), 1, content(&[2, 3], None), |_| true);
        assert_eq!(hash(&proposals), first, "other loads, and the first plan is still a good one");
        for (fresh, fits, later) in [
            (content(&[2, 3], None), false, 61),
            (content(&[2, 3], Some((2, 3))), true, 61),
            (content(&[], Some((2, 3))), true, 61),
            (content(&[2, 3], None), true, 60 + 300),
        ] {
            let mut proposals = Proposals::default();
            proposals.show(NOW, 1, content(&[1, 2], None), |_| true);
            proposals.show(NOW + Duration::from_secs(later), 1, fresh.clone(), |_| fits);
            assert_eq!(proposals.shown().map(|shown| &shown.content), Some(&fresh));
            assert_ne!(hash(&proposals), first);
        }
        proposals.show(NOW, 1, content(&[], None), |_| true);
        assert_eq!(proposals.shown(), None);
    }

    #[test]
    fn an_approval_runs_what_was_shown_once() {
        let mut proposals = Proposals::default();
        proposals.show(NOW, 1, content(&[1], Some((1, 2))), |_| true);
        let approval = hash(&proposals);
        assert_eq!(proposals.approve(None), Verdict::Nothing);
        assert_eq!(proposals.approve(Some(&format!(" {approval}\n"))), Verdict::Run(content(&[1], Some((1, 2)))));
        assert_eq!(proposals.approve(Some(&approval)), Verdict::Nothing);
        // The same content again is another showing.
        proposals.show(NOW, 1, content(&[1], Some((1, 2))), |_| true);
        assert_ne!(hash(&proposals), approval);
        assert_eq!(proposals.approve(Some(&approval)), Verdict::Nothing, "it was dealt with");
        assert_eq!(proposals.approve(None), Verdict::Nothing);
        assert!(
            matches!(proposals.approve(Some(&approval)), Verdict::Stale(_)),
            "and is worth nothing when it comes back"
        );
        let shown = hash(&proposals);
        assert!(matches!(proposals.approve(Some(&shown)), Verdict::Run(_)));
    }

    #[test]
    fn an_approval_of_anything_else_is_stale() {
        let mut proposals = Proposals::default();
        proposals.show(NOW, 1, content(&[1], None), |_| true);
        let Verdict::Stale(reason) = proposals.approve(Some("0123456789abcdef")) else { panic!("not stale") };
        assert!(reason.contains("0123456789abcdef") && reason.contains(&hash(&proposals)), "{reason}");
        // Another leader shows the same under another hash.
        let mut next = Proposals::default();
        next.show(NOW, 2, content(&[1], None), |_| true);
        assert!(matches!(next.approve(Some(&hash(&proposals))), Verdict::Stale(_)));
        next.clear();
        let Verdict::Stale(reason) = next.approve(Some("f")) else { panic!("not stale") };
        assert!(reason.contains("nothing is proposed"), "{reason}");
    }

    #[test]
    fn sentences_say_what_would_be_done() {
        let mut all = content(&[1, 2], Some((1, 3)));
        all.changes.push(Change { tier: Tier::Business, from: 2, to: 2, outdated: 2 });
        assert_eq!(
            all.sentences(),
            [
                "gateway: 3 members instead of 1",
                "business: 2 members replaced by ones with the new configuration",
                "2 shards move",
            ]
        );
    }
}
