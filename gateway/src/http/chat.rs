//! Groups, messages, conversations, presence.

use std::collections::{BTreeMap, HashMap};

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use im_proto::ids::{self, Conversation, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Conversations, Entry, EntryKind, Fetch, Group, GroupChange, GroupGet, GroupRole, Head, Heads, IndexRow, Kick,
    MarkRead, Presence, RoleChange, Send, body,
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Problem, problem_of};
use super::{Api, Caller, Shared, name};

const PAGE_DEFAULT: u32 = 50;
const PAGE_MAX: u32 = 200;
/// The device that messages sent over HTTP come from.
const HTTP_DEVICE: &str = "http";

fn conversation_of(kind: &str, id: String, user: &str) -> Result<String, Problem> {
    match kind {
        "u" => Ok(ids::direct_conversation(user, &name(id)?)),
        "g" => Ok(ids::group_conversation(&name(id)?)),
        _ => Err(Problem::new(StatusCode::NOT_FOUND, "conversations are u/{user} or g/{group}")),
    }
}

/// A key for a change that the client gave none for.
fn random_key() -> String {
    format!("http-{:032x}", rand::random::<u128>())
}

// ---- groups -----------------------------------------------------------------------------------------------------------

/// Who a new group begins with.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewGroup {
    #[serde(default)]
    members: Vec<String>,
}

/// Changes of a group.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct MemberChanges {
    #[serde(default)]
    add: Vec<String>,
    #[serde(default)]
    remove: Vec<String>,
    /// User → role.
    #[serde(default)]
    roles: BTreeMap<String, Role>,
}

/// What a member may do.
#[derive(Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum Role {
    Member,
    Admin,
    Owner,
}

/// A group.
#[derive(Serialize, ToSchema)]
pub(super) struct GroupView {
    group: String,
    head: u64,
    created: i64,
    members: Vec<MemberView>,
}

/// A member of a group.
#[derive(Serialize, ToSchema)]
struct MemberView {
    user: String,
    role: Role,
    #[serde(rename = "fromSeq")]
    from_seq: u64,
}

impl From<Group> for GroupView {
    fn from(group: Group) -> Self {
        let member = |member: im_proto::link::GroupMember| MemberView {
            role: match member.role() {
                GroupRole::Owner => Role::Owner,
                GroupRole::Admin => Role::Admin,
                GroupRole::Member | GroupRole::Unspecified => Role::Member,
            },
            user: member.user,
            from_seq: member.from_seq,
        };
        let name = group.conversation.strip_prefix("g/").unwrap_or(&group.conversation).to_owned();
        let members = group.members.into_iter().map(member).collect();
        Self { group: name, head: group.head, created: group.created_ms, members }
    }
}

async fn change_group(
    api: &Api,
    group: String,
    caller: &Caller,
    change: GroupChange,
) -> Result<Json<GroupView>, Problem> {
    let conversation = ids::group_conversation(&name(group)?);
    for user in change.add.iter().chain(&change.remove).chain(change.roles.iter().map(|role| &role.user)) {
        name(user.clone())?;
    }
    let change = GroupChange { conversation: conversation.clone(), actor: caller.actor(), key: random_key(), ..change };
    match api.hub().ask(&conversation, body::Body::GroupChange(change)).await? {
        Outcome::Group(group) => Ok(Json(group.into())),
        outcome => Err(problem_of(outcome)),
    }
}

/// Creates a group, or adds to one that exists.
#[utoipa::path(put, path = "/v1/groups/{group}", request_body = NewGroup, responses((status = 200, body = GroupView)), params(("group" = String, Path)))]
pub(super) async fn create_group(
    State(api): Shared,
    caller: Caller,
    Path(group): Path<String>,
    input: Result<Json<NewGroup>, JsonRejection>,
) -> Result<Json<GroupView>, Problem> {
    let Json(NewGroup { members }) = input?;
    change_group(&api, group, &caller, GroupChange { create: true, add: members, ..GroupChange::default() }).await
}

/// A group and its members.
#[utoipa::path(get, path = "/v1/groups/{group}", responses((status = 200, body = GroupView)), params(("group" = String, Path)))]
pub(super) async fn get_group(
    State(api): Shared,
    caller: Caller,
    Path(group): Path<String>,
) -> Result<Json<GroupView>, Problem> {
    let conversation = ids::group_conversation(&name(group)?);
    let question = GroupGet { conversation: conversation.clone(), actor: caller.actor() };
    match api.hub().ask(&conversation, body::Body::GroupGet(question)).await? {
        Outcome::Group(group) => Ok(Json(group.into())),
        outcome => Err(problem_of(outcome)),
    }
}

/// Adds, removes, gives roles.
#[utoipa::path(post, path = "/v1/groups/{group}/members", request_body = MemberChanges, responses((status = 200, body = GroupView)), params(("group" = String, Path)))]
pub(super) async fn change_members(
    State(api): Shared,
    caller: Caller,
    Path(group): Path<String>,
    input: Result<Json<MemberChanges>, JsonRejection>,
) -> Result<Json<GroupView>, Problem> {
    let Json(MemberChanges { add, remove, roles }) = input?;
    let role = |(user, role): (String, Role)| {
        let role = match role {
            Role::Member => GroupRole::Member,
            Role::Admin => GroupRole::Admin,
            Role::Owner => GroupRole::Owner,
        };
        RoleChange { user, role: role.into() }
    };
    let roles = roles.into_iter().map(role).collect();
    change_group(&api, group, &caller, GroupChange { add, remove, roles, ..GroupChange::default() }).await
}

/// Removes a member (or oneself: leaves).
#[utoipa::path(delete, path = "/v1/groups/{group}/members/{user}", responses((status = 204)), params(("group" = String, Path), ("user" = String, Path)))]
pub(super) async fn remove_member(
    State(api): Shared,
    caller: Caller,
    Path((group, user)): Path<(String, String)>,
) -> Result<StatusCode, Problem> {
    let _view =
        change_group(&api, group, &caller, GroupChange { remove: vec![user], ..GroupChange::default() }).await?;
    Ok(StatusCode::NO_CONTENT)
}

// ---- messages ---------------------------------------------------------------------------------------------------------

/// What a message carries: one of the two.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SystemMessage {
    payload: Option<String>,
    payload_base64: Option<String>,
}

/// A message to a person or a group.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NewMessage {
    /// With a service token: as whom it is sent; absent = a system message (groups only).
    from: Option<String>,
    to: Option<String>,
    group: Option<String>,
    /// The client's message id: the same one is stored once.
    id: Option<String>,
    payload: Option<String>,
    payload_base64: Option<String>,
}

/// Where a message was stored.
#[derive(Serialize, ToSchema)]
pub(super) struct StoredView {
    seq: u64,
    /// Unix milliseconds; absent for a system message.
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<i64>,
}

fn payload_of(api: &Api, text: Option<String>, base64: Option<String>) -> Result<Bytes, Problem> {
    let payload = match (text, base64) {
        (Some(text), None) => Bytes::from(text),
        (None, Some(encoded)) => {
            Bytes::from(BASE64.decode(encoded).map_err(|error| Problem::invalid(format!("payloadBase64: {error}")))?)
        }
        _ => return Err(Problem::invalid("give one of payload and payloadBase64")),
    };
    let max = api.gateway.limits.max_payload;
    if payload.len() > max as usize {
        let detail = format!("the payload has {} bytes, messages.maxPayload is {max}: send less", payload.len());
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail));
    }
    Ok(payload)
}

async fn post_system(
    api: &Api,
    group: String,
    caller: &Caller,
    key: String,
    payload: Bytes,
) -> Result<Json<StoredView>, Problem> {
    caller.must_be_service()?;
    let conversation = ids::group_conversation(&name(group)?);
    let change =
        GroupChange { conversation: conversation.clone(), key, system_message: payload, ..GroupChange::default() };
    match api.hub().ask(&conversation, body::Body::GroupChange(change)).await? {
        Outcome::Group(group) => Ok(Json(StoredView { seq: group.head, ts: None })),
        outcome => Err(problem_of(outcome)),
    }
}

/// Posts a system message to a group (service token).
#[utoipa::path(post, path = "/v1/groups/{group}/messages", request_body = SystemMessage, responses((status = 200, body = StoredView)), params(("group" = String, Path)))]
pub(super) async fn system_message(
    State(api): Shared,
    caller: Caller,
    Path(group): Path<String>,
    input: Result<Json<SystemMessage>, JsonRejection>,
) -> Result<Json<StoredView>, Problem> {
    let Json(SystemMessage { payload, payload_base64 }) = input?;
    let payload = payload_of(&api, payload, payload_base64)?;
    post_system(&api, group, &caller, random_key(), payload).await
}

/// Sends a message.
#[utoipa::path(post, path = "/v1/messages", request_body = NewMessage, responses((status = 200, body = StoredView)))]
pub(super) async fn send_message(
    State(api): Shared,
    caller: Caller,
    input: Result<Json<NewMessage>, JsonRejection>,
) -> Result<Json<StoredView>, Problem> {
    let Json(message) = input?;
    let payload = payload_of(&api, message.payload, message.payload_base64)?;
    if message.id.as_ref().is_some_and(|id| id.is_empty() || id.len() > 64 || id.chars().any(char::is_control)) {
        return Err(Problem::invalid("id must be 1 to 64 printable bytes"));
    }
    if let (Caller::Service, None, Some(group), None) = (&caller, &message.from, &message.group, &message.to) {
        let key = message.id.unwrap_or_else(random_key);
        return post_system(&api, group.clone(), &caller, key, payload).await;
    }
    let sender = caller.acting_for(message.from)?;
    let conversation = match (message.to, message.group) {
        (Some(to), None) => ids::direct_conversation(&sender, &name(to)?),
        (None, Some(group)) => ids::group_conversation(&name(group)?),
        _ => return Err(Problem::invalid("give one of to and group")),
    };
    let send = Send {
        conversation: conversation.clone(),
        sender,
        device: HTTP_DEVICE.to_owned(),
        client_id: message.id.unwrap_or_default(),
        key: Bytes::copy_from_slice(&rand::random::<u128>().to_be_bytes()),
        payload,
    };
    match api.hub().ask(&conversation, body::Body::Send(send)).await? {
        Outcome::Stored(stored) => Ok(Json(StoredView { seq: stored.seq, ts: Some(stored.ts_ms) })),
        outcome => Err(problem_of(outcome)),
    }
}

// ---- conversations ----------------------------------------------------------------------------------------------------

/// A page of a list.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Page {
    after: Option<String>,
    before: Option<u64>,
    limit: Option<u32>,
    user: Option<String>,
}

impl Page {
    fn limit(&self) -> u32 {
        self.limit.unwrap_or(PAGE_DEFAULT).clamp(1, PAGE_MAX)
    }
}

/// Recent contacts.
#[derive(Serialize, ToSchema)]
pub(super) struct ConversationPage {
    /// The most recently active first, within the page.
    conversations: Vec<ConversationView>,
    /// Ask again with `after` = this; absent at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// One of a user's conversations.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct ConversationView {
    /// `u/{peer}` or `g/{group}`.
    conversation: String,
    head: u64,
    /// Of the last message, Unix milliseconds.
    ts: i64,
    own_mark: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_mark: Option<u64>,
    unread: u64,
}

/// Recent contacts with unread counts.
///
/// Pages go by the conversations' ids, and only within a page are the most recent first: whoever wants the most recent of all reads every
/// page, of up to 200, and keeps what hears of later messages up to date.
#[utoipa::path(get, path = "/v1/conversations", responses((status = 200, body = ConversationPage)),
    params(("after" = Option<String>, Query), ("limit" = Option<u32>, Query), ("user" = Option<String>, Query)))]
pub(super) async fn list_conversations(
    State(api): Shared,
    caller: Caller,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<ConversationPage>, Problem> {
    let Query(page) = page?;
    let limit = page.limit();
    let user = caller.acting_for(page.user)?;
    let question = Conversations { user: user.clone(), after: page.after.unwrap_or_default(), limit };
    let list = match api.hub().ask(&user, body::Body::Conversations(question)).await? {
        Outcome::Conversations(list) => list,
        outcome => return Err(problem_of(outcome)),
    };
    let next = list.rows.last().filter(|_| list.more).map(|row| row.conversation.clone());
    let heads = heads_of(&api, &user, &list.rows).await?;
    let view = |row: &IndexRow| {
        let head = heads.get(&row.conversation).cloned().unwrap_or_default();
        let (conversation, peer_mark) = match Conversation::parse(&row.conversation).ok()? {
            Conversation::Group(group) => (format!("g/{group}"), None),
            direct => (format!("u/{}", direct.peer_of(&user)?), Some(head.peer_mark)),
        };
        let unread = head.head.saturating_sub(head.own_mark.max(row.from_seq.saturating_sub(1)));
        Some(ConversationView {
            conversation,
            head: head.head,
            ts: head.ts_ms,
            own_mark: head.own_mark,
            peer_mark,
            unread,
        })
    };
    let mut conversations: Vec<ConversationView> = list.rows.iter().filter_map(view).collect();
    conversations.sort_by_key(|view| std::cmp::Reverse(view.ts));
    Ok(Json(ConversationPage { conversations, next }))
}

async fn heads_of(api: &Api, user: &str, rows: &[IndexRow]) -> Result<HashMap<String, Head>, Problem> {
    let mut batches = BTreeMap::<u32, Vec<String>>::new();
    for row in rows {
        batches.entry(shard_of(&row.conversation, api.hub().shards())).or_default().push(row.conversation.clone());
    }
    let questions = batches.into_values().map(|conversations| async move {
        let key = conversations[0].clone();
        let question = Heads { user: user.to_owned(), conversations };
        match api.hub().ask(&key, body::Body::Heads(question)).await? {
            Outcome::Heads(list) => Ok::<_, Problem>(list.heads),
            outcome => Err(problem_of(outcome)),
        }
    });
    let heads = futures::future::try_join_all(questions).await?;
    Ok(heads.into_iter().flatten().map(|head| (head.conversation.clone(), head)).collect())
}

/// A page of history.
#[derive(Serialize, ToSchema)]
pub(super) struct History {
    /// Ascending.
    messages: Vec<MessageView>,
    head: u64,
}

/// A stored message.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
struct MessageView {
    seq: u64,
    ts: i64,
    from: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    id: String,
    system: bool,
    /// If it is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<String>,
    /// If it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
}

impl From<Entry> for MessageView {
    fn from(entry: Entry) -> Self {
        let system = entry.kind() == EntryKind::System;
        let (payload, payload_base64) = match String::from_utf8(entry.payload.to_vec()) {
            Ok(text) => (Some(text), None),
            Err(_) => (None, Some(BASE64.encode(&entry.payload))),
        };
        let from = if system { im_proto::topic::SYSTEM_SENDER.to_owned() } else { entry.sender };
        Self { seq: entry.seq, ts: entry.ts_ms, from, id: entry.client_id, system, payload, payload_base64 }
    }
}

/// What was said, the newest page first.
#[utoipa::path(get, path = "/v1/conversations/{kind}/{id}/messages", responses((status = 200, body = History)),
    params(("kind" = String, Path), ("id" = String, Path), ("before" = Option<u64>, Query), ("limit" = Option<u32>, Query), ("user" = Option<String>, Query)))]
pub(super) async fn history(
    State(api): Shared,
    caller: Caller,
    Path((kind, id)): Path<(String, String)>,
    page: Result<Query<Page>, QueryRejection>,
) -> Result<Json<History>, Problem> {
    let Query(page) = page?;
    let (limit, before) = (page.limit(), page.before);
    let user = caller.acting_for(page.user)?;
    let conversation = conversation_of(&kind, id, &user)?;
    let from = match before {
        Some(0 | 1) => return Ok(Json(History { messages: Vec::new(), head: 0 })),
        Some(before) => before - 1,
        None => 0,
    };
    let question = Fetch { conversation: conversation.clone(), user, from, limit, bytes_max: 4 << 20, backward: true };
    match api.hub().ask(&conversation, body::Body::Fetch(question)).await? {
        Outcome::Fetched(fetched) => {
            let mut messages: Vec<MessageView> = fetched.entries.into_iter().map(MessageView::from).collect();
            messages.sort_by_key(|message| message.seq);
            Ok(Json(History { messages, head: fetched.head }))
        }
        outcome => Err(problem_of(outcome)),
    }
}

/// Read up to here.
#[derive(Serialize, Deserialize, ToSchema)]
pub(super) struct ReadMark {
    seq: u64,
}

/// Moves a user's read mark.
#[utoipa::path(put, path = "/v1/conversations/{kind}/{id}/read", request_body = ReadMark, responses((status = 200, body = ReadMark)),
    params(("kind" = String, Path), ("id" = String, Path), ("user" = Option<String>, Query)))]
pub(super) async fn mark_read(
    State(api): Shared,
    caller: Caller,
    Path((kind, id)): Path<(String, String)>,
    page: Result<Query<Page>, QueryRejection>,
    input: Result<Json<ReadMark>, JsonRejection>,
) -> Result<Json<ReadMark>, Problem> {
    let (Query(page), Json(ReadMark { seq })) = (page?, input?);
    let user = caller.acting_for(page.user)?;
    let conversation = conversation_of(&kind, id, &user)?;
    match api
        .hub()
        .ask(&conversation, body::Body::MarkRead(MarkRead { conversation: conversation.clone(), user, seq }))
        .await?
    {
        Outcome::Marked(marked) => Ok(Json(ReadMark { seq: marked.seq })),
        outcome => Err(problem_of(outcome)),
    }
}

// ---- presence ---------------------------------------------------------------------------------------------------------

/// Whether somebody is online.
#[derive(Serialize, ToSchema)]
pub(super) struct PresenceView {
    /// False for seconds after the user's shard moved: neither online nor offline.
    known: bool,
    online: bool,
    /// For servers and the user himself.
    sessions: Vec<SessionView>,
}

/// A live session.
#[derive(Serialize, ToSchema)]
struct SessionView {
    device: String,
    gateway: String,
    since: i64,
}

/// Who is online where.
#[utoipa::path(get, path = "/v1/presence/{user}", responses((status = 200, body = PresenceView)), params(("user" = String, Path)))]
pub(super) async fn presence(
    State(api): Shared,
    caller: Caller,
    Path(user): Path<String>,
) -> Result<Json<PresenceView>, Problem> {
    let user = name(user)?;
    let in_detail = match &caller {
        Caller::Service => true,
        Caller::User(himself) => *himself == user,
    };
    match api.hub().ask(&user, body::Body::Presence(Presence { user: user.clone() })).await? {
        Outcome::Presence(info) => {
            let online = !info.sessions.is_empty();
            let view = |session: im_proto::link::LiveSession| SessionView {
                device: session.device,
                gateway: session.gateway,
                since: session.since_ms,
            };
            let sessions = info.sessions.into_iter().filter(|_| in_detail).map(view).collect();
            Ok(Json(PresenceView { known: info.known, online, sessions }))
        }
        outcome => Err(problem_of(outcome)),
    }
}

/// Whom to end.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct KickRequest {
    /// Absent = all devices.
    device: Option<String>,
}

/// Ends a user's connections (service token).
#[utoipa::path(post, path = "/v1/users/{user}/kick", request_body = KickRequest, responses((status = 204)), params(("user" = String, Path)))]
pub(super) async fn kick(
    State(api): Shared,
    caller: Caller,
    Path(user): Path<String>,
    input: Result<Option<Json<KickRequest>>, JsonRejection>,
) -> Result<StatusCode, Problem> {
    caller.must_be_service()?;
    let user = name(user)?;
    let device = match input?.unwrap_or_default().0.device {
        Some(device) => name(device)?,
        None => String::new(),
    };
    match api.hub().ask(&user, body::Body::Kick(Kick { user: user.clone(), device })).await? {
        Outcome::Done(_) => Ok(StatusCode::NO_CONTENT),
        outcome => Err(problem_of(outcome)),
    }
}
