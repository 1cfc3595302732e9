//! Events on an ImCluster: told when its status came to mean something else.

use super::accepted::MANAGER;
use im_crds::{Condition, ConditionStatus, ImClusterStatus, TierStatus};
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};

/// The longest note that the API server takes, bytes.
const NOTE_BYTES_MAX: usize = 1_024;

/// Something worth telling.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Happening {
    /// Somebody should look.
    pub warning: bool,
    /// One CamelCase word for machines.
    pub reason: String,
    /// What was done: a verb.
    pub action: &'static str,
    /// A sentence for people, at most 1,024 bytes.
    pub note: String,
}

/// What is to be told about the way from one status to the next.
pub fn happenings(old: &ImClusterStatus, new: &ImClusterStatus) -> Vec<Happening> {
    let mut told = Vec::new();
    for condition in &new.conditions {
        let known = old.conditions.iter().find(|known| known.kind == condition.kind);
        let same = |known: &Condition| {
            // The words of Degraded change with what is wrong alone.
            let words = condition.kind != "Degraded" || known.message == condition.message;
            known.status == condition.status && known.reason == condition.reason && words
        };
        let silent = matches!(condition.reason.as_str(), "Starting" | "Listening") || known.is_some_and(same);
        let good = match condition.kind.as_str() {
            "Ready" | "NoMessageLost" => condition.status == ConditionStatus::True,
            "Degraded" | "ScalingLimited" => condition.status == ConditionStatus::False,
            _ => continue,
        };
        // As things begin nothing serves and nobody can say; what is good then is news only of Ready.
        let first = known.is_none_or(|known| matches!(known.reason.as_str(), "Starting" | "Listening"));
        let expected_at_first = match condition.kind.as_str() {
            "Ready" => !good,
            "NoMessageLost" => condition.status != ConditionStatus::False,
            _ => good,
        };
        if silent || (first && expected_at_first) {
            continue;
        }
        told.push(Happening {
            warning: !good,
            reason: condition.reason.clone(),
            action: "Observe",
            note: cut(format!("{} is {:?}: {}", condition.kind, condition.status, condition.message)),
        });
    }
    for (name, old, new) in
        [("gateways", &old.gateway, &new.gateway), ("business members", &old.business, &new.business)]
    {
        if let Some(note) = scaled(name, old, new) {
            told.push(Happening { warning: false, reason: "Scaled".to_owned(), action: "Scale", note: cut(note) });
        }
    }
    for proposal in new.proposals.iter().filter(|proposal| !old.proposals.contains(proposal)) {
        let note =
            format!("proposed: {}; annotate imcluster.dev/approve={} to have it done", proposal.what, proposal.hash);
        told.push(Happening { warning: false, reason: "Proposed".to_owned(), action: "Propose", note: cut(note) });
    }
    told
}

fn scaled(name: &str, old: &TierStatus, new: &TierStatus) -> Option<String> {
    let first = old.desired == 0;
    (new.desired != old.desired && new.desired > 0 && !first)
        .then(|| format!("{name}: {} instead of {}: {}", new.desired, old.desired, new.because.join("; ")))
}

fn cut(mut note: String) -> String {
    if note.len() > NOTE_BYTES_MAX {
        let mut end = NOTE_BYTES_MAX - '…'.len_utf8();
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
    note
}

/// Tells it.
///
/// # Errors
/// What the API server says.
pub async fn publish(
    client: &Client,
    reporter: &str,
    regarding: &ObjectReference,
    happening: Happening,
) -> Result<(), kube::Error> {
    let namespace = regarding.namespace.as_deref().unwrap_or("default");
    let now = Timestamp::now();
    let name = format!("{}.{:x}", regarding.name.as_deref().unwrap_or_default(), now.as_nanosecond());
    let event = Event {
        metadata: ObjectMeta { name: Some(name), namespace: Some(namespace.to_owned()), ..ObjectMeta::default() },
        event_time: Some(MicroTime(now)),
        type_: Some(if happening.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(happening.reason),
        action: Some(happening.action.to_owned()),
        note: Some(happening.note),
        regarding: Some(regarding.clone()),
        reporting_controller: Some(format!("imcluster.dev/{MANAGER}")),
        reporting_instance: Some(reporter.to_owned()),
        ..Event::default()
    };
    Api::<Event>::namespaced(client.clone(), namespace).create(&PostParams::default(), &event).await.map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use im_crds::ProposalStatus;

    fn with(kind: &str, status: ConditionStatus, reason: &str) -> ImClusterStatus {
        let condition = Condition {
            kind: kind.into(),
            status,
            observed_generation: 1,
            last_transition_time: String::new(),
            reason: reason.into(),
            message: "words".into(),
        };
        ImClusterStatus { conditions: vec![condition], ..ImClusterStatus::default() }
    }

    #[test]
    fn a_changed_condition_is_told_once() {
        use ConditionStatus::{False, True, Unknown};
        let none = ImClusterStatus::default();
        let told = |old: &ImClusterStatus, new: &ImClusterStatus| -> Vec<(bool, String)> {
            happenings(old, new).into_iter().map(|happening| (happening.warning, happening.note)).collect()
        };
        let serving = with("Ready", True, "Serving");
        let down = with("Ready", False, "NoGateway");
        assert_eq!(told(&none, &serving), [(false, "Ready is True: words".to_owned())]);
        assert_eq!(told(&serving, &serving), []);
        assert_eq!(told(&serving, &down), [(true, "Ready is False: words".to_owned())]);
        assert_eq!(told(&none, &with("Ready", False, "Starting")), []);
        assert_eq!(told(&none, &with("Degraded", False, "AsItShouldBe")), []);
        assert_eq!(told(&none, &with("Degraded", True, "SecretMissing")).len(), 1);
        assert_eq!(told(&with("Degraded", True, "SecretMissing"), &with("Degraded", False, "AsItShouldBe")).len(), 1);
        assert_eq!(told(&with("NoMessageLost", Unknown, "Starting"), &with("NoMessageLost", True, "LogsComplete")), []);
        assert_eq!(told(&none, &with("Rebalancing", True, "ShardsMove")), [], "a metric's business");
    }

    #[test]
    fn a_decision_is_told_with_its_reasons_and_a_proposal_with_its_hash() {
        let tier =
            |desired, because: &str| TierStatus { desired, because: vec![because.into()], ..TierStatus::default() };
        let status = |gateway| ImClusterStatus { gateway, ..ImClusterStatus::default() };
        let notes = |old: &ImClusterStatus, new: &ImClusterStatus| -> Vec<String> {
            happenings(old, new).into_iter().map(|happening| happening.note).collect()
        };
        let (one, three) = (status(tier(1, "low")), status(tier(3, "Connections: 300 of 100")));
        assert_eq!(notes(&one, &three), ["gateways: 3 instead of 1: Connections: 300 of 100"]);
        assert_eq!(notes(&status(tier(0, "")), &one), [""; 0]);
        let proposal = ProposalStatus { hash: "ab".into(), what: "move 3 shards".into() };
        let proposed = ImClusterStatus { proposals: vec![proposal], ..one.clone() };
        assert_eq!(
            notes(&one, &proposed),
            ["proposed: move 3 shards; annotate imcluster.dev/approve=ab to have it done"]
        );
        assert_eq!(notes(&proposed, &proposed), [""; 0]);
    }

    #[test]
    fn a_note_is_never_longer_than_the_api_server_takes() {
        let note = cut("ä".repeat(1_000));
        assert!(note.len() <= NOTE_BYTES_MAX && note.ends_with('…'), "{} bytes", note.len());
        assert_eq!(cut("short".into()), "short");
    }
}
