//! Moderation of live rooms.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use im_proto::ids::room_key;
use im_proto::link::reply::Outcome;
use im_proto::link::{Room, RoomChange, RoomGet, RoomKick, Sanction, body};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::problem::{Problem, problem_of};
use super::{Api, Caller, Shared, name};
use crate::session::Counter;

/// A live room.
#[derive(Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct RoomView {
    room: String,
    /// Absent while it is nobody's.
    #[serde(skip_serializing_if = "String::is_empty")]
    owner: String,
    moderators: Vec<String>,
    /// Least time between two messages of one person; 0 = off.
    slow_mode_milliseconds: u32,
    /// For the owner, moderators and servers.
    muted: Vec<SanctionView>,
    /// For the owner, moderators and servers.
    kicked: Vec<SanctionView>,
    viewers: u64,
    likes: u64,
    gifts: BTreeMap<String, u64>,
}

/// Somebody who may not speak, or not enter.
#[derive(Serialize, ToSchema)]
struct SanctionView {
    user: String,
    /// Unix milliseconds.
    until: i64,
}

impl From<Room> for RoomView {
    fn from(room: Room) -> Self {
        let views = |sanctions: Vec<RoomKick>| {
            let view = |sanction: RoomKick| SanctionView { user: sanction.user, until: sanction.until_ms };
            sanctions.into_iter().map(view).collect()
        };
        let stats = room.stats.unwrap_or_default();
        let (likes, gifts) = Counter::likes_and_gifts(&stats.totals);
        Self {
            room: room.room,
            owner: room.owner,
            moderators: room.moderators,
            slow_mode_milliseconds: room.slow_mode_ms,
            muted: views(room.muted),
            kicked: views(room.kicked),
            viewers: stats.viewers,
            likes,
            gifts,
        }
    }
}

/// What is to change; what is absent stays.
#[derive(Deserialize, ToSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RoomSettings {
    /// A server names the first one.
    owner: Option<String>,
    #[serde(default)]
    add_moderators: Vec<String>,
    #[serde(default)]
    remove_moderators: Vec<String>,
    /// Least time between two messages of one person; 0 = off.
    slow_mode_milliseconds: Option<u32>,
}

/// Whom to mute or kick.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SanctionRequest {
    user: String,
    /// For how long; 0 lifts it.
    seconds: u32,
}

impl SanctionRequest {
    fn checked(self) -> Result<Vec<Sanction>, Problem> {
        Ok(vec![Sanction { user: name(self.user)?, seconds: self.seconds }])
    }
}

async fn change_room(api: &Api, room: String, caller: &Caller, change: RoomChange) -> Result<Json<RoomView>, Problem> {
    let room = name(room)?;
    let change = RoomChange { room: room.clone(), actor: caller.actor(), ..change };
    match api.hub().ask(&room_key(&room), body::Body::RoomChange(change)).await? {
        Outcome::Room(room) => Ok(Json(room.into())),
        outcome => Err(problem_of(outcome)),
    }
}

/// A live room: roles, viewers, likes.
#[utoipa::path(get, path = "/v1/rooms/{room}", responses((status = 200, body = RoomView)), params(("room" = String, Path)))]
pub(super) async fn get_room(
    State(api): Shared,
    caller: Caller,
    Path(room): Path<String>,
) -> Result<Json<RoomView>, Problem> {
    let room = name(room)?;
    let question = RoomGet { room: room.clone(), actor: caller.actor() };
    match api.hub().ask(&room_key(&room), body::Body::RoomGet(question)).await? {
        Outcome::Room(room) => Ok(Json(room.into())),
        outcome => Err(problem_of(outcome)),
    }
}

/// Changes roles and slow mode.
#[utoipa::path(patch, path = "/v1/rooms/{room}", request_body = RoomSettings, responses((status = 200, body = RoomView)), params(("room" = String, Path)))]
pub(super) async fn set_room(
    State(api): Shared,
    caller: Caller,
    Path(room): Path<String>,
    input: Result<Json<RoomSettings>, JsonRejection>,
) -> Result<Json<RoomView>, Problem> {
    let Json(RoomSettings { owner, add_moderators, remove_moderators, slow_mode_milliseconds }) = input?;
    let names = |users: Vec<String>| users.into_iter().map(name).collect::<Result<Vec<_>, _>>();
    let change = RoomChange {
        owner: owner.map(name).transpose()?.unwrap_or_default(),
        add_moderators: names(add_moderators)?,
        remove_moderators: names(remove_moderators)?,
        slow_mode_ms: slow_mode_milliseconds,
        ..RoomChange::default()
    };
    change_room(&api, room, &caller, change).await
}

/// Lets somebody not speak in the room for a while.
#[utoipa::path(post, path = "/v1/rooms/{room}/mute", request_body = SanctionRequest, responses((status = 200, body = RoomView)), params(("room" = String, Path)))]
pub(super) async fn mute(
    State(api): Shared,
    caller: Caller,
    Path(room): Path<String>,
    input: Result<Json<SanctionRequest>, JsonRejection>,
) -> Result<Json<RoomView>, Problem> {
    let mute = input?.0.checked()?;
    change_room(&api, room, &caller, RoomChange { mute, ..RoomChange::default() }).await
}

/// Puts somebody out of the room and does not let him in again for a while.
#[utoipa::path(post, path = "/v1/rooms/{room}/kick", request_body = SanctionRequest, responses((status = 200, body = RoomView)), params(("room" = String, Path)))]
pub(super) async fn kick(
    State(api): Shared,
    caller: Caller,
    Path(room): Path<String>,
    input: Result<Json<SanctionRequest>, JsonRejection>,
) -> Result<Json<RoomView>, Problem> {
    let kick = input?.0.checked()?;
    change_room(&api, room, &caller, RoomChange { kick, ..RoomChange::default() }).await
}
