//! A conversation as its owner knows it: head, members, read marks. Pure; what is written down is decided in `log`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use im_proto::ids::Conversation as Parsed;
use im_proto::link::{GroupChange, GroupRole, Recipient, Refusal};
use im_proto::state::{GroupRow, Interval, MarkRow, MemberRow};
use prost::Message;

use super::Map;
use super::calls::ConversationRows;
use crate::store::LogEntry;

/// Entries of a conversation's end that are kept in memory, so that most fetches need no read.
const CACHED_ENTRIES_MAX: usize = 32;
/// And their payloads, bytes.
const CACHED_BYTES_MAX: usize = 16 << 10;
/// A sender's implied mark is written down before it falls so many entries behind the head; a load reads at least as many.
pub const MARK_LAG_MAX: u64 = 64;

/// What is committed of a conversation.
#[derive(Debug)]
pub struct Conversation {
    /// Its id.
    pub id: Arc<str>,
    /// The last seq, 0 = none.
    pub head: u64,
    /// When the last entry was stored.
    pub head_ts_ms: i64,
    /// Who takes part.
    pub members: Members,
    /// Read marks: what is known, and what of it is written.
    marks: Map<Arc<str>, Mark>,
    /// Senders whose implied mark is not written, by that mark.
    unwritten: BTreeMap<u64, Arc<str>>,
    cached: VecDeque<LogEntry>,
    cached_bytes: usize,
}

/// Who takes part in a conversation.
#[derive(Debug)]
pub enum Members {
    /// Two people, always.
    Direct(Arc<str>, Arc<str>),
    /// A group; `None` until it is created.
    Group(Option<Group>),
}

/// A group's members, past ones too.
#[derive(Debug, Clone, Default)]
pub struct Group {
    /// When it was created.
    pub created_ms: i64,
    /// By user, in order, so that what is made of it is the same each time.
    pub members: BTreeMap<Arc<str>, Member>,
}

/// One member's role and what he may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// `GroupRole` while he is in.
    pub role: GroupRole,
    /// Ascending; the last is open while he is in.
    pub intervals: Vec<Interval>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    seq: u64,
    written: u64,
}

impl Member {
    /// Whether he is in now.
    pub fn is_in(&self) -> bool {
        self.intervals.last().is_some_and(|interval| interval.to == 0)
    }

    fn sees(&self, seq: u64) -> bool {
        self.intervals.iter().any(|i| i.from <= seq && (i.to == 0 || seq <= i.to))
    }

    fn changed_at(&self) -> u64 {
        self.intervals.last().map_or(0, |interval| interval.from.max(interval.to))
    }

    /// As stored.
    pub fn encode(&self) -> Bytes {
        MemberRow { role: self.role as u32, intervals: self.intervals.clone() }.encode_to_vec().into()
    }
}

/// One log entry that a change of a group makes, and the members that it changes with it.
#[derive(Debug)]
pub struct GroupStep {
    /// The entry's JSON payload.
    pub payload: Bytes,
    /// The members after it.
    pub members: Vec<(Arc<str>, Member)>,
}

impl Conversation {
    /// From what is stored. `Err` names the row that can't be read.
    pub fn load(id: Arc<str>, rows: ConversationRows) -> Result<Self, String> {
        let unreadable = |what: &str, error: prost::DecodeError| format!("{what} of {id} can't be read: {error}");
        let members = match Parsed::parse(&id).map_err(|error| error.to_string())? {
            Parsed::Direct(a, b) => Members::Direct(a.into(), b.into()),
            Parsed::Group(_) => Members::Group(match rows.group {
                None => None,
                Some(row) => {
                    let row = GroupRow::decode(row).map_err(|error| unreadable("the group row", error))?;
                    let mut group = Group { created_ms: row.created_ms, members: BTreeMap::new() };
                    for (user, row) in rows.members {
                        let row = MemberRow::decode(row).map_err(|error| unreadable("a member", error))?;
                        let role = GroupRole::try_from(row.role as i32).unwrap_or(GroupRole::Member);
                        group.members.insert(user.into(), Member { role, intervals: row.intervals });
                    }
                    Some(group)
                }
            }),
        };
        let (head, head_ts_ms) = rows.head;
        let empty = (Map::default(), BTreeMap::new(), VecDeque::new());
        let (marks, unwritten, cached) = empty;
        let mut loaded = Self { id: id.clone(), head, head_ts_ms, members, marks, unwritten, cached, cached_bytes: 0 };
        for (user, row) in rows.marks {
            let seq = MarkRow::decode(row).map_err(|error| unreadable("a read mark", error))?.seq;
            loaded.marks.insert(user.into(), Mark { seq, written: seq });
        }
        for entry in rows.tail {
            loaded.raise_mark(&entry.sender.clone(), entry.seq);
            loaded.cache(entry);
        }
        Ok(loaded)
    }

    /// Takes over an entry that was just committed.
    pub fn committed(&mut self, entry: LogEntry) {
        debug_assert_eq!(entry.seq, self.head + 1, "the log of {} has no gaps", self.id);
        self.head = entry.seq;
        self.head_ts_ms = entry.ts_ms;
        self.raise_mark(&entry.sender.clone(), entry.seq);
        self.cache(entry);
    }

    fn cache(&mut self, mut entry: LogEntry) {
        // It came as a part of all that a link or the store said at once, and would keep all of that in memory.
        entry.payload = Bytes::copy_from_slice(&entry.payload);
        self.cached_bytes += entry.payload.len();
        self.cached.push_back(entry);
        while self.cached.len() > CACHED_ENTRIES_MAX || self.cached_bytes > CACHED_BYTES_MAX {
            let Some(oldest) = self.cached.pop_front() else { break };
            self.cached_bytes -= oldest.payload.len();
        }
    }

    /// Entries from `from` on out of memory, if all of them are there.
    pub fn cached_from(&self, from: u64) -> Option<impl Iterator<Item = &LogEntry>> {
        let first = self.cached.front()?.seq;
        (first..=self.head + 1).contains(&from).then(|| self.cached.range((from - first) as usize..))
    }

    /// A user's read mark: what he said, or his own last message.
    pub fn mark(&self, user: &str) -> u64 {
        self.marks.get(user).map_or(0, |mark| mark.seq)
    }

    /// Raises a mark that a message implies.
    fn raise_mark(&mut self, user: &Arc<str>, seq: u64) {
        if user.starts_with('$') {
            return;
        }
        let mark = self.marks.entry(user.clone()).or_default();
        if seq > mark.seq {
            if mark.seq > mark.written {
                self.unwritten.remove(&mark.seq);
            }
            mark.seq = seq;
            self.unwritten.insert(seq, user.clone());
        }
    }

    /// A mark was committed.
    pub fn mark_written(&mut self, user: &Arc<str>, seq: u64) {
        let mark = self.marks.entry(user.clone()).or_default();
        if mark.seq > mark.written && mark.seq <= seq {
            self.unwritten.remove(&mark.seq);
        }
        mark.seq = mark.seq.max(seq);
        mark.written = mark.written.max(seq);
    }

    /// Marks that must be written when the head reaches `head`: (user, seq).
    pub fn marks_due(&self, head: u64) -> Vec<(Arc<str>, u64)> {
        let due = self.unwritten.range(..=head.saturating_sub(MARK_LAG_MAX));
        due.map(|(seq, user)| (user.clone(), *seq)).collect()
    }

    /// Whether a user may send and read now.
    pub fn is_member(&self, user: &str) -> bool {
        match &self.members {
            Members::Direct(a, b) => **a == *user || **b == *user,
            Members::Group(group) => {
                group.as_ref().and_then(|group| group.members.get(user)).is_some_and(Member::is_in)
            }
        }
    }

    /// The intervals of seq that a user may see, the last cut at the head.
    pub fn visible(&self, user: &str) -> Vec<(u64, u64)> {
        match &self.members {
            Members::Direct(a, b) if **a == *user || **b == *user => vec![(1, self.head)],
            Members::Direct(..) => Vec::new(),
            Members::Group(group) => {
                let intervals =
                    group.as_ref().and_then(|group| group.members.get(user)).map(|member| &member.intervals);
                let cut = |i: &Interval| (i.from, if i.to == 0 { self.head } else { i.to.min(self.head) });
                intervals.into_iter().flatten().map(cut).collect()
            }
        }
    }

    /// The last seq that a user may see; 0 = none.
    pub fn visible_head(&self, user: &str) -> u64 {
        self.visible(user).last().map_or(0, |(from, to)| if from <= to { *to } else { 0 })
    }

    /// The other one of a 1:1.
    pub fn peer_of(&self, user: &str) -> Option<&Arc<str>> {
        match &self.members {
            Members::Direct(a, b) if **a == *user => Some(b),
            Members::Direct(a, b) if **b == *user => Some(a),
            _ => None,
        }
    }

    /// Who is told of the entry with this seq, with what their index row should say.
    pub fn recipients(&self, seq: u64) -> Vec<Recipient> {
        let always = |user: &Arc<str>| Recipient { user: user.to_string(), from_seq: 1, to_seq: 0, as_of: 0 };
        match &self.members {
            Members::Direct(a, b) if a == b => vec![always(a)],
            Members::Direct(a, b) => vec![always(a), always(b)],
            Members::Group(group) => {
                let told = group.iter().flat_map(|group| &group.members).filter(|(_, member)| member.sees(seq));
                told.map(|(user, member)| Recipient {
                    user: user.to_string(),
                    from_seq: member.intervals.first().map_or(seq, |interval| interval.from),
                    to_seq: member.intervals.last().map_or(0, |interval| interval.to),
                    as_of: member.changed_at(),
                })
                .collect()
            }
        }
    }

    /// What a change of the group writes, entry by entry; the first gets the seq after the head. Nothing to do is an empty list.
    ///
    /// # Errors
    /// The refusal and a reason for whoever may not do that.
    pub fn plan_change(&self, change: &GroupChange) -> Result<Vec<GroupStep>, (Refusal, String)> {
        let Members::Group(group) = &self.members else {
            return Err((Refusal::Invalid, "only groups have members to change".into()));
        };
        let refuse = |code, reason: &str| Err((code, reason.to_owned()));
        let is_service = change.actor.is_empty();
        let is_new = group.is_none();
        if is_new && !change.create {
            return refuse(Refusal::NotFound, "there is no such group: create it first");
        }
        let mut members = group.as_ref().map(|group| group.members.clone()).unwrap_or_default();
        let role = members.get(change.actor.as_str()).filter(|member| member.is_in()).map(|member| member.role);
        let may_manage = is_service || is_new || matches!(role, Some(GroupRole::Owner | GroupRole::Admin));
        if !is_new && !is_service && role.is_none() {
            return refuse(Refusal::NotAMember, "only members may change a group");
        }

        let mut steps = Vec::new();
        let mut seq = self.head;
        let mut step = |event: &str, changed: Vec<(Arc<str>, Member)>, members: &mut BTreeMap<Arc<str>, Member>| {
            let users: Vec<&str> = changed.iter().map(|(user, _)| &**user).collect();
            let payload = serde_json::json!({"event": event, "users": users, "by": change.actor});
            for (user, member) in &changed {
                members.insert(user.clone(), member.clone());
            }
            steps.push(GroupStep { payload: payload.to_string().into(), members: changed });
        };

        let creator = (is_new && !is_service).then_some(&change.actor);
        let mut joining: Vec<&String> = creator.into_iter().chain(&change.add).collect();
        joining.retain(|user| !members.get(user.as_str()).is_some_and(Member::is_in));
        joining.sort();
        joining.dedup();
        if !joining.is_empty() || is_new {
            if !may_manage {
                return refuse(Refusal::Forbidden, "only the owner and admins may add members");
            }
            seq += 1;
            let join = |user: &&String| {
                let mut member = members
                    .get(user.as_str())
                    .cloned()
                    .unwrap_or(Member { role: GroupRole::Member, intervals: Vec::new() });
                member.role = if Some(*user) == creator { GroupRole::Owner } else { GroupRole::Member };
                member.intervals.push(Interval { from: seq, to: 0 });
                (Arc::from(user.as_str()), member)
            };
            let joined = joining.iter().map(join).collect();
            step(if is_new { "created" } else { "joined" }, joined, &mut members);
        }

        let mut leaving: Vec<&String> =
            change.remove.iter().filter(|user| members.get(user.as_str()).is_some_and(Member::is_in)).collect();
        leaving.sort();
        leaving.dedup();
        if !leaving.is_empty() {
            if !may_manage && leaving != [&change.actor] {
                return refuse(Refusal::Forbidden, "only the owner and admins may remove others");
            }
            seq += 1;
            let leave = |user: &&String| {
                let mut member = members.get(user.as_str())?.clone();
                member.intervals.last_mut()?.to = seq;
                Some((Arc::from(user.as_str()), member))
            };
            let left: Vec<_> = leaving.iter().filter_map(leave).collect();
            let by_owner = role == Some(GroupRole::Owner) || is_service || leaving == [&change.actor];
            if !by_owner && left.iter().any(|(_, member)| member.role == GroupRole::Owner) {
                return refuse(Refusal::Forbidden, "nobody may remove the owner");
            }
            step("left", left, &mut members);
        }

        let mut promoted = Vec::new();
        for wanted in &change.roles {
            let role_wanted = GroupRole::try_from(wanted.role).unwrap_or(GroupRole::Unspecified);
            match members.get(wanted.user.as_str()).filter(|member| member.is_in()) {
                _ if role_wanted == GroupRole::Unspecified => {
                    return refuse(Refusal::Invalid, "a role is member, admin or owner");
                }
                None => return refuse(Refusal::NotFound, "a role is for a member: add the user first"),
                Some(member) if member.role == role_wanted => {}
                Some(member) => {
                    promoted.push((Arc::from(wanted.user.as_str()), Member { role: role_wanted, ..member.clone() }));
                }
            }
        }
        if !promoted.is_empty() {
            if !is_service && role != Some(GroupRole::Owner) && !is_new {
                return refuse(Refusal::Forbidden, "only the owner may give roles");
            }
            step("roles", promoted, &mut members);
        }

        if !change.system_message.is_empty() {
            if !is_service {
                return refuse(Refusal::Forbidden, "system messages need a service token");
            }
            steps.push(GroupStep { payload: change.system_message.clone(), members: Vec::new() });
        }
        Ok(steps)
    }

    /// Takes over the members that a committed step changed.
    pub fn apply_members(&mut self, changed: Vec<(Arc<str>, Member)>, now_ms: i64) {
        if let Members::Group(group) = &mut self.members {
            let group = group.get_or_insert_with(|| Group { created_ms: now_ms, members: BTreeMap::new() });
            group.members.extend(changed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group() -> Conversation {
        Conversation::load("g/team".into(), ConversationRows::default()).expect("an empty group")
    }

    fn change(actor: &str) -> GroupChange {
        GroupChange { conversation: "g/team".into(), actor: actor.into(), ..GroupChange::default() }
    }

    fn commit(conversation: &mut Conversation, change: &GroupChange) -> Result<usize, Refusal> {
        let steps = conversation.plan_change(change).map_err(|(code, _)| code)?;
        let count = steps.len();
        for step in steps {
            let seq = conversation.head + 1;
            conversation.committed(entry(conversation, seq, "$system"));
            conversation.apply_members(step.members, 1);
        }
        Ok(count)
    }

    fn entry(conversation: &Conversation, seq: u64, sender: &str) -> LogEntry {
        LogEntry {
            conversation: conversation.id.clone(),
            seq,
            pos: seq,
            key: Bytes::from(seq.to_string()),
            sender: sender.into(),
            device: "".into(),
            kind: 0,
            client_id: "".into(),
            ts_ms: 1,
            payload: Bytes::from_static(b"x"),
        }
    }

    #[test]
    fn members_see_what_was_said_while_they_were_in() {
        let mut team = group();
        assert_eq!(commit(&mut team, &change("alice")), Err(Refusal::NotFound));
        let create = GroupChange { create: true, add: vec!["bob".into()], ..change("alice") };
        assert_eq!(commit(&mut team, &create), Ok(1));
        assert_eq!(commit(&mut team, &create), Ok(0), "a retry changes nothing");
        team.committed(entry(&team, 2, "alice"));
        assert_eq!(commit(&mut team, &GroupChange { remove: vec!["bob".into()], ..change("bob") }), Ok(1));
        team.committed(entry(&team, 4, "alice"));
        assert_eq!(commit(&mut team, &GroupChange { add: vec!["bob".into()], ..change("alice") }), Ok(1));
        assert_eq!(team.visible("bob"), [(1, 3), (5, 5)]);
        assert_eq!(team.visible_head("bob"), 5);
        let told =
            |seq| team.recipients(seq).into_iter().map(|r| (r.user, r.from_seq, r.to_seq, r.as_of)).collect::<Vec<_>>();
        assert_eq!(told(4), [("alice".to_owned(), 1, 0, 1)]);
        assert_eq!(told(3), [("alice".to_owned(), 1, 0, 1), ("bob".to_owned(), 1, 0, 5)]);
    }

    #[test]
    fn roles_decide_who_may_do_what() {
        let mut team = group();
        let create = GroupChange { create: true, add: vec!["bob".into(), "carol".into()], ..change("alice") };
        assert_eq!(commit(&mut team, &create), Ok(1));
        let add = |actor: &str| GroupChange { add: vec!["dave".into()], ..change(actor) };
        let remove = |actor: &str, user: &str| GroupChange { remove: vec![user.into()], ..change(actor) };
        let role = |actor: &str, user: &str, role: GroupRole| GroupChange {
            roles: vec![im_proto::link::RoleChange { user: user.into(), role: role.into() }],
            ..change(actor)
        };
        let system = |actor: &str| GroupChange { system_message: Bytes::from_static(b"{}"), ..change(actor) };
        assert_eq!(commit(&mut team, &add("mallory")), Err(Refusal::NotAMember));
        assert_eq!(commit(&mut team, &add("bob")), Err(Refusal::Forbidden));
        assert_eq!(commit(&mut team, &remove("bob", "carol")), Err(Refusal::Forbidden));
        assert_eq!(commit(&mut team, &role("bob", "bob", GroupRole::Admin)), Err(Refusal::Forbidden));
        assert_eq!(commit(&mut team, &role("alice", "bob", GroupRole::Admin)), Ok(1));
        assert_eq!(commit(&mut team, &role("alice", "mallory", GroupRole::Admin)), Err(Refusal::NotFound));
        assert_eq!(commit(&mut team, &add("bob")), Ok(1));
        assert_eq!(commit(&mut team, &remove("bob", "alice")), Err(Refusal::Forbidden));
        assert_eq!(commit(&mut team, &system("alice")), Err(Refusal::Forbidden));
        assert_eq!(commit(&mut team, &system("")), Ok(1));
        assert_eq!(commit(&mut team, &remove("", "alice")), Ok(1));
        assert!(!team.is_member("alice") && team.is_member("dave"));
    }

    #[test]
    fn implied_marks_are_written_before_a_load_would_miss_them() {
        let mut chat = Conversation::load("u/alice/bob".into(), ConversationRows::default()).expect("empty");
        chat.committed(entry(&chat, 1, "alice"));
        for seq in 2..=MARK_LAG_MAX {
            chat.committed(entry(&chat, seq, "bob"));
            assert!(chat.marks_due(seq).is_empty());
        }
        assert_eq!(chat.marks_due(MARK_LAG_MAX + 1), [(Arc::from("alice"), 1)]);
        chat.mark_written(&"alice".into(), 1);
        assert!(chat.marks_due(MARK_LAG_MAX + 1).is_empty());
        assert_eq!((chat.mark("alice"), chat.mark("bob"), chat.mark("carol")), (1, MARK_LAG_MAX, 0));
    }

    #[test]
    fn the_end_is_served_from_memory() {
        let mut chat = Conversation::load("u/alice/bob".into(), ConversationRows::default()).expect("empty");
        for seq in 1..=100 {
            chat.committed(entry(&chat, seq, "bob"));
        }
        let seqs = |from| chat.cached_from(from).map(|entries| entries.map(|e| e.seq).collect::<Vec<_>>());
        assert_eq!(seqs(99), Some(vec![99, 100]));
        assert_eq!(seqs(50), None);
        assert_eq!(seqs(101), Some(vec![]));
        assert_eq!(seqs(102), None);
    }

    #[test]
    fn what_stays_in_memory_does_not_hold_what_it_came_with() {
        let mut chat = Conversation::load("u/alice/bob".into(), ConversationRows::default()).expect("empty");
        let message = Bytes::from(vec![0; 4_096]);
        chat.committed(LogEntry { payload: message.slice(..10), ..entry(&chat, 1, "bob") });
        assert!(message.is_unique());
    }
}
