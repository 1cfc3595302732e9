//! The HTTP side: health, metrics, and the JSON API, whose requests are carried to the owners of shards like those of MQTT clients.

mod rooms;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use im_proto::ids::{self, Conversation, is_name, shard_of};
use im_proto::link::reply::Outcome;
use im_proto::link::{
    Conversations, Entry, EntryKind, Fetch, Group, GroupChange, GroupGet, GroupRole, Head, Heads, IndexRow, Kick,
    MarkRead, Presence, Refusal, RoleChange, Send, body,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use utoipa::{OpenApi, ToSchema};

use crate::hub::{AskError, Hub};
use crate::listen::{Gateway, ListenError, SharedListener, bind_shared};

const PROBLEM_JSON: &str = "application/problem+json";
/// What each port holds its connections to.
const BOUNDS: Bounds = Bounds { connections_max: 1_024, header_wait: Duration::from_secs(30) };
/// For the rest of a request and its answer; an owner has 10 s of it.
const REQUEST_WAIT: Duration = Duration::from_secs(30);
/// Of a request: as much as the framework takes by itself, bytes, or more if a payload may be so large.
const BODY_BYTES_MIN: usize = 2 << 20;
/// Of an error text that the framework wrote.
const FOREIGN_TEXT_BYTES_MAX: usize = 4 << 10;
const PAGE_DEFAULT: u32 = 50;
const PAGE_MAX: u32 = 200;
/// The device that messages sent over HTTP come from.
const HTTP_DEVICE: &str = "http";

/// What the handlers need.
pub struct Api {
    gateway: Arc<Gateway>,
}

impl Api {
    /// Over a gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        Self { gateway }
    }

    fn hub(&self) -> &Arc<Hub> {
        &self.gateway.hub
    }
}

type Shared = State<Arc<Api>>;

/// Serves `/healthz`, `/readyz` and `/metrics` on an address of this process alone.
///
/// # Errors
/// [`ListenError::Bind`].
pub fn spawn_admin(api: &Arc<Api>, address: SocketAddr) -> Result<SocketAddr, ListenError> {
    let failed = |error| ListenError::Bind { address, error };
    let listener = bind_shared(address)?;
    let bound = listener.local_addr().map_err(failed)?;
    serve(health(), api, tokio::net::TcpListener::from_std(listener).map_err(failed)?, BOUNDS);
    Ok(bound)
}

/// Serves the JSON API (and health and metrics) on the port that all gateways of a machine share. While the gateway drains it takes no new
/// connections there; requests over those that are open are answered, with `connection: close`.
///
/// # Errors
/// [`ListenError::Bind`].
pub fn spawn_public(api: &Arc<Api>, address: SocketAddr) -> Result<SocketAddr, ListenError> {
    let routes = Router::new()
        .route("/openapi.json", get(|| async { Json(ApiDocument::openapi()) }))
        .route("/v1/groups/{group}", put(create_group).get(get_group))
        .route("/v1/groups/{group}/members", post(change_members))
        .route("/v1/groups/{group}/members/{user}", delete(remove_member))
        .route("/v1/groups/{group}/messages", post(system_message))
        .route("/v1/messages", post(send_message))
        .route("/v1/conversations", get(list_conversations))
        .route("/v1/conversations/{kind}/{id}/messages", get(history))
        .route("/v1/conversations/{kind}/{id}/read", put(mark_read))
        .route("/v1/presence/{user}", get(presence))
        .route("/v1/users/{user}/kick", post(kick))
        .route("/v1/rooms/{room}", get(rooms::get_room).patch(rooms::set_room))
        .route("/v1/rooms/{room}/mute", post(rooms::mute))
        .route("/v1/rooms/{room}/kick", post(rooms::kick))
        .fallback(|| async { Problem::new(StatusCode::NOT_FOUND, "no such path: see /openapi.json") })
        .layer(DefaultBodyLimit::max(body_bytes_max(api.gateway.limits.max_payload)))
        .layer(axum::middleware::from_fn_with_state(REQUEST_WAIT, in_time))
        .layer(axum::middleware::map_response_with_state(api.clone(), as_problem))
        .merge(health())
        .layer(axum::middleware::map_response_with_state(api.clone(), close_while_draining));
    let listener = SharedListener::bind(&api.gateway, address)?;
    let bound = listener.address();
    serve(routes, api, listener, BOUNDS);
    Ok(bound)
}

/// Space for each payload that is taken: as base64 it grows by a third, what JSON escapes may double it; and for the words around it.
fn body_bytes_max(payload_max: u32) -> usize {
    (2 * payload_max as usize + (64 << 10)).max(BODY_BYTES_MIN)
}

fn health() -> Router<Arc<Api>> {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(|State(api): Shared| async move { api.hub().shared.metrics.render() }))
}

async fn ready(State(api): Shared) -> Response {
    // A gateway that still holds connections is needed, draining or not.
    let why = if api.hub().shards() == 0 {
        "no shard map yet\n"
    } else if !api.gateway.is_serving() && api.hub().connections() == 0 {
        "drained\n"
    } else {
        return "ready\n".into_response();
    };
    (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

/// What the connections of a port are held to: without it, whoever opens many and says nothing takes the descriptors of all others.
#[derive(Debug, Clone, Copy)]
struct Bounds {
    /// Open at a time; the newest is closed.
    connections_max: usize,
    /// For the next request's head, also on a connection that had one before.
    header_wait: Duration,
}

/// Serves `routes` on every connection that `listener` accepts, for ever.
fn serve<L>(routes: Router<Arc<Api>>, api: &Arc<Api>, mut listener: L, bounds: Bounds)
where
    L: axum::serve::Listener<Addr = SocketAddr, Io: AsyncRead + AsyncWrite>,
{
    let service = TowerToHyperService::new(routes.with_state(api.clone()));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(bounds.header_wait);
    let (slots, metrics) = (Arc::new(Semaphore::new(bounds.connections_max)), api.hub().shared.metrics.clone());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await;
            let Ok(slot) = slots.clone().try_acquire_owned() else {
                metrics.http_connections_refused.inc();
                continue;
            };
            let connection = http.serve_connection(TokioIo::new(stream), service.clone());
            let open = metrics.http_connections.clone();
            open.inc();
            tokio::spawn(async move {
                if let Err(error) = connection.await {
                    tracing::debug!(%error, "HTTP");
                }
                open.dec();
                drop(slot);
            });
        }
    });
}

/// Who sends a request too slowly does not hold his connection for ever.
async fn in_time(State(wait): State<Duration>, request: Request, next: Next) -> Response {
    let late = || Problem::new(StatusCode::REQUEST_TIMEOUT, "the request did not come as a whole in time");
    timeout(wait, next.run(request)).await.unwrap_or_else(|_| late().into_response())
}

/// A gateway that drains answers what still comes over its open connections, and asks each client to dial anew: it then reaches another
/// gateway, because this one has given the shared port up.
async fn close_while_draining(State(api): Shared, mut response: Response) -> Response {
    if !api.gateway.is_serving() {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

// ---- problems ---------------------------------------------------------------------------------------------------------

/// A problem document (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
pub struct Problem {
    /// A URI reference that names the kind of problem.
    #[serde(rename = "type")]
    kind: &'static str,
    /// The status in words.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What is wrong here and what to do about it.
    detail: String,
}

impl Problem {
    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { kind: "about:blank", title, status: status.as_u16(), detail: detail.into() }
    }

    fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(self)).into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Counts what is refused. What the framework refuses by itself (another method, a path that is not UTF-8) is a problem document, too.
async fn as_problem(State(api): Shared, response: Response) -> Response {
    let status = response.status();
    if !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    api.hub().shared.metrics.http_refused(status.as_u16());
    if response.headers().get(header::CONTENT_TYPE).is_some_and(|kind| kind == PROBLEM_JSON) {
        return response;
    }
    let (parts, body) = response.into_parts();
    let text = axum::body::to_bytes(body, FOREIGN_TEXT_BYTES_MAX).await.unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let detail = if text.is_empty() { "this is not how it is used: see /openapi.json".into() } else { text };
    let mut response = Problem::new(status, detail).into_response();
    if let Some(allow) = parts.headers.get(header::ALLOW) {
        response.headers_mut().insert(header::ALLOW, allow.clone());
    }
    response
}

impl From<AskError> for Problem {
    fn from(error: AskError) -> Self {
        let status = match error {
            AskError::Busy => StatusCode::SERVICE_UNAVAILABLE,
            AskError::NoOwner => StatusCode::GATEWAY_TIMEOUT,
        };
        Self::new(status, error.to_string())
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Self {
        let status = match rejection.status() {
            // JSON of another shape than asked for is as wrong as no JSON.
            StatusCode::UNPROCESSABLE_ENTITY => StatusCode::BAD_REQUEST,
            status => status,
        };
        Self::new(status, rejection.body_text())
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

/// What is no success of the expected kind.
fn problem_of(outcome: Outcome) -> Problem {
    let Outcome::Refused(refused) = outcome else {
        return Problem::new(StatusCode::BAD_GATEWAY, "the owner gave an answer of another kind");
    };
    let (status, text) = match refused.code() {
        Refusal::NotAMember => (StatusCode::FORBIDDEN, "not a member"),
        Refusal::Forbidden => (StatusCode::FORBIDDEN, "not allowed"),
        Refusal::Sanctioned => (StatusCode::FORBIDDEN, "muted in this room, or put out of it"),
        Refusal::TooSoon => (StatusCode::TOO_MANY_REQUESTS, "slow mode"),
        Refusal::NotFound => (StatusCode::NOT_FOUND, "not found"),
        Refusal::Invalid => (StatusCode::BAD_REQUEST, "invalid"),
        Refusal::IdReused => (StatusCode::CONFLICT, "this id was used for another payload"),
        Refusal::StaleSession => (StatusCode::CONFLICT, "the session is gone"),
        Refusal::Busy => (StatusCode::SERVICE_UNAVAILABLE, "a queue is full: try again"),
        Refusal::StoreUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "the message store is unavailable: try again"),
        Refusal::Unspecified => (StatusCode::BAD_GATEWAY, "refused without a reason"),
    };
    let detail = if refused.reason.is_empty() { text.to_owned() } else { format!("{text}: {}", refused.reason) };
    Problem::new(status, detail)
}

// ---- callers ----------------------------------------------------------------------------------------------------------

/// Who calls.
enum Caller {
    User(String),
    Service,
}

impl Caller {
    /// The actor that owners judge by; empty for a server.
    fn actor(&self) -> String {
        match self {
            Self::User(user) => user.clone(),
            Self::Service => String::new(),
        }
    }

    /// As whom a request is made: the user himself, or for a server whom it names.
    fn acting_for(self, named: Option<String>) -> Result<String, Problem> {
        match (self, named) {
            (Self::User(user), None) => Ok(user),
            (Self::User(user), Some(named)) if user == named => Ok(user),
            (Self::User(_), Some(_)) => {
                Err(Problem::new(StatusCode::FORBIDDEN, "only a server may act for somebody else"))
            }
            (Self::Service, Some(named)) if is_name(&named) => Ok(named),
            (Self::Service, _) => Err(Problem::invalid("a server has to name the user")),
        }
    }

    fn must_be_service(&self) -> Result<(), Problem> {
        match self {
            Self::Service => Ok(()),
            Self::User(_) => Err(Problem::new(StatusCode::FORBIDDEN, "this needs a service token")),
        }
    }
}

impl FromRequestParts<Arc<Api>> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, api: &Arc<Api>) -> Result<Self, Problem> {
        let unauthorized = |detail: &str| Problem::new(StatusCode::UNAUTHORIZED, detail);
        let value = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = value.and_then(|value| value.strip_prefix("Bearer "));
        let token = token.ok_or_else(|| unauthorized("send `Authorization: Bearer TOKEN`"))?;
        if api.gateway.auth.is_service(token) {
            return Ok(Self::Service);
        }
        let proof = api.gateway.auth.bearer_user(token).map_err(|text| unauthorized(&text))?;
        if is_name(&proof.user) {
            Ok(Self::User(proof.user))
        } else {
            Err(unauthorized("the token's sub is no user id"))
        }
    }
}

fn name(text: String) -> Result<String, Problem> {
    if is_name(&text) {
        Ok(text)
    } else {
        Err(Problem::invalid(format!("{text:?} is not an id: use 1 to 64 of A-Z a-z 0-9 . _ @ -")))
    }
}

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
struct NewGroup {
    #[serde(default)]
    members: Vec<String>,
}

/// Changes of a group.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct MemberChanges {
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
struct GroupView {
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
async fn create_group(
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
async fn get_group(State(api): Shared, caller: Caller, Path(group): Path<String>) -> Result<Json<GroupView>, Problem> {
    let conversation = ids::group_conversation(&name(group)?);
    let question = GroupGet { conversation: conversation.clone(), actor: caller.actor() };
    match api.hub().ask(&conversation, body::Body::GroupGet(question)).await? {
        Outcome::Group(group) => Ok(Json(group.into())),
        outcome => Err(problem_of(outcome)),
    }
}

/// Adds, removes, gives roles.
#[utoipa::path(post, path = "/v1/groups/{group}/members", request_body = MemberChanges, responses((status = 200, body = GroupView)), params(("group" = String, Path)))]
async fn change_members(
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
async fn remove_member(
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
struct SystemMessage {
    payload: Option<String>,
    payload_base64: Option<String>,
}

/// A message to a person or a group.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NewMessage {
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
struct StoredView {
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
async fn system_message(
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
async fn send_message(
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
struct Page {
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
struct ConversationPage {
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
async fn list_conversations(
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
struct History {
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
async fn history(
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
struct ReadMark {
    seq: u64,
}

/// Moves a user's read mark.
#[utoipa::path(put, path = "/v1/conversations/{kind}/{id}/read", request_body = ReadMark, responses((status = 200, body = ReadMark)),
    params(("kind" = String, Path), ("id" = String, Path), ("user" = Option<String>, Query)))]
async fn mark_read(
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
struct PresenceView {
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
async fn presence(State(api): Shared, caller: Caller, Path(user): Path<String>) -> Result<Json<PresenceView>, Problem> {
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
struct KickRequest {
    /// Absent = all devices.
    device: Option<String>,
}

/// Ends a user's connections (service token).
#[utoipa::path(post, path = "/v1/users/{user}/kick", request_body = KickRequest, responses((status = 204)), params(("user" = String, Path)))]
async fn kick(
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

#[derive(OpenApi)]
#[openapi(
    info(
        title = "ImCluster",
        description = "Groups, history, unread, presence, live rooms. `Authorization: Bearer` a user's JWT or a service token."
    ),
    paths(
        create_group,
        get_group,
        change_members,
        remove_member,
        system_message,
        send_message,
        list_conversations,
        history,
        mark_read,
        presence,
        kick,
        rooms::get_room,
        rooms::set_room,
        rooms::mute,
        rooms::kick
    ),
    components(schemas(Problem))
)]
struct ApiDocument;

#[cfg(test)]
mod tests {
    use im_proto::ids::MemberId;
    use im_proto::token::SharedToken;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::auth::Auth;
    use crate::config::{AuthConfig, Config};
    use crate::metrics::Metrics;
    use crate::session::Shared;

    fn api() -> Arc<Api> {
        let config = r#"{"name":"gateway-0","admin":{"address":"127.0.0.1:0"},"auth":{"insecure":{}}}"#;
        let config: Config = serde_json::from_str(config).expect("the smallest configuration");
        let shared = Shared::new(1, config.session_limits(), Metrics::new());
        let me = MemberId::new(&config.name, 1).expect("a name");
        let hub = Hub::new(me, shared, config.rooms_config(), SharedToken::none());
        let auth = Arc::new(Auth::new(&AuthConfig::Insecure {}, None).expect("no keys are needed"));
        Arc::new(Api::new(Gateway::new(hub, auth, config.limits.clone())))
    }

    #[tokio::test]
    async fn who_says_nothing_takes_a_bounded_number_of_connections_for_a_bounded_time() -> std::io::Result<()> {
        let api = api();
        let metrics = &api.hub().shared.metrics;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let bounds = Bounds { connections_max: 2, header_wait: Duration::from_millis(300) };
        serve(health(), &api, listener, bounds);
        let (mut silent, mut slow) = (TcpStream::connect(address).await?, TcpStream::connect(address).await?);
        slow.write_all(b"GET /healthz HTTP/1.1\r\nx").await?;
        let mut third = TcpStream::connect(address).await?;
        assert_eq!(third.read(&mut [0; 8]).await?, 0, "the newest is closed");
        assert_eq!((metrics.http_connections.get(), metrics.http_connections_refused.get()), (2, 1));
        for stream in [&mut silent, &mut slow] {
            let end = timeout(Duration::from_secs(10), stream.read_to_end(&mut Vec::new())).await;
            end.expect("closed after its time")?;
        }
        // The slots are given back right after the sockets are closed.
        let served = async {
            loop {
                let mut stream = TcpStream::connect(address).await?;
                let mut answer = [0; 12];
                stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n").await?;
                if stream.read_exact(&mut answer).await.is_ok() {
                    return std::io::Result::Ok(answer);
                }
            }
        };
        assert_eq!(&timeout(Duration::from_secs(10), served).await.expect("served")?, b"HTTP/1.1 200");
        Ok(())
    }

    #[tokio::test]
    async fn who_does_not_send_the_rest_of_a_request_is_told_so() -> std::io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let mut stream = TcpStream::connect(listener.local_addr()?).await?;
        let wait = axum::middleware::from_fn_with_state(Duration::from_millis(100), in_time);
        serve(Router::new().route("/", post(|_: Bytes| async {})).layer(wait), &api(), listener, BOUNDS);
        stream.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhell").await?;
        let mut answer = [0; 12];
        timeout(Duration::from_secs(10), stream.read_exact(&mut answer)).await.expect("answered")?;
        assert_eq!(&answer, b"HTTP/1.1 408");
        Ok(())
    }
}
