//! What is refused, as problem documents (RFC 9457).

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use im_proto::link::Refusal;
use im_proto::link::reply::Outcome;
use serde::Serialize;
use utoipa::ToSchema;

use super::Shared;
use crate::hub::AskError;

const PROBLEM_JSON: &str = "application/problem+json";
/// Of an error text that the framework wrote.
const FOREIGN_TEXT_BYTES_MAX: usize = 4 << 10;

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
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Self { kind: "about:blank", title, status: status.as_u16(), detail: detail.into() }
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Self {
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
pub(super) async fn as_problem(State(api): Shared, response: Response) -> Response {
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
pub(super) fn problem_of(outcome: Outcome) -> Problem {
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
