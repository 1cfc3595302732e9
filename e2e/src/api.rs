//! The system's HTTP/JSON API as its clients see it: groups, recent contacts, history, presence.
//!
//! One connection for each request: this is for setting scenes and asking questions, not for load.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::{
    net::TcpStream,
    time::{Duration, timeout},
};

/// An answer is read up to this size.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A request that takes longer has failed.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// In whose name a request is made.
#[derive(Clone, Debug)]
pub enum Credential {
    /// Insecure authentication: act as this user.
    Insecure(String),
    /// A user's JWT or a service token.
    Bearer(String),
    /// No Authorization header.
    None,
}

/// A request failed.
#[derive(Debug, Error)]
pub enum ApiError {
    /// No connection, or it broke, or the answer was not HTTP.
    #[error("HTTP request to {server}{path}: {reason}")]
    Transport {
        /// The server.
        server: SocketAddr,
        /// The path asked for.
        path: String,
        /// What went wrong.
        reason: String,
    },
    /// The server answered with a problem document (RFC 9457), or with an error status and something else.
    #[error("{path}: HTTP {status}: {title}{}", detail.as_deref().map(|text| format!(" ({text})")).unwrap_or_default())]
    Problem {
        /// The path asked for.
        path: String,
        /// HTTP status.
        status: StatusCode,
        /// `title` of the problem document, else the start of the body.
        title: String,
        /// `detail` of the problem document.
        detail: Option<String>,
        /// The Content-Type said `application/problem+json`.
        is_problem_document: bool,
    },
}

/// A client of one gateway's HTTP port.
#[derive(Clone, Debug)]
pub struct Api {
    server: SocketAddr,
}

impl Api {
    /// A client of the HTTP port at this address.
    pub fn new(server: SocketAddr) -> Self {
        Self { server }
    }

    /// Any request; an empty answer is `Value::Null`, one that is not JSON a `Value::String`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        credential: &Credential,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let transport = |reason: String| ApiError::Transport { server: self.server, path: path.to_owned(), reason };
        timeout(REQUEST_TIMEOUT, self.exchange(method, path, credential, body))
            .await
            .unwrap_or_else(|_| Err(transport(format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()))))
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        credential: &Credential,
        body: Option<&Value>,
    ) -> Result<Value, ApiError> {
        let transport = |reason: String| ApiError::Transport { server: self.server, path: path.to_owned(), reason };
        let stream = TcpStream::connect(self.server).await.map_err(|error| transport(error.to_string()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| transport(error.to_string()))?;
        // Ends by itself when `sender` is dropped and the answer is read.
        let driver = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, self.server.to_string());
        let token = match credential {
            Credential::Insecure(user) => Some(format!("Bearer insecure:{user}")),
            Credential::Bearer(token) => Some(format!("Bearer {token}")),
            Credential::None => None,
        };
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, token);
        }
        let bytes = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Bytes::from(body.to_string())
            }
            None => Bytes::new(),
        };
        let request = request.body(Full::new(bytes)).map_err(|error| transport(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(|error| transport(error.to_string()))?;
        let status = response.status();
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let is_problem_document = content_type.is_some_and(|kind| kind.starts_with("application/problem+json"));
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let bytes = body.collect().await.map_err(|error| transport(error.to_string()))?.to_bytes();
        driver.abort();
        let value = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes)
                .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).chars().take(65_536).collect()))
        };
        if status.is_success() {
            return Ok(value);
        }
        let text = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let plain = value.as_str().unwrap_or_default().chars().take(200).collect();
        let (title, detail) = (text("title").unwrap_or(plain), text("detail"));
        Err(ApiError::Problem { path: path.to_owned(), status, title, detail, is_problem_document })
    }

    /// Creates a group; the caller is its owner.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn create_group(&self, owner: &Credential, group: &str, members: &[String]) -> Result<Value, ApiError> {
        let body = json!({ "members": members });
        self.request(Method::PUT, &format!("/v1/groups/{group}"), owner, Some(&body)).await
    }

    /// Adds and removes members of a group.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn change_members(
        &self,
        who: &Credential,
        group: &str,
        add: &[String],
        remove: &[String],
    ) -> Result<Value, ApiError> {
        let body = json!({ "add": add, "remove": remove });
        self.request(Method::POST, &format!("/v1/groups/{group}/members"), who, Some(&body)).await
    }

    /// A group and its members.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn group(&self, who: &Credential, group: &str) -> Result<Value, ApiError> {
        self.request(Method::GET, &format!("/v1/groups/{group}"), who, None).await
    }

    /// Takes somebody out of a group; oneself = leave.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn leave_group(&self, who: &Credential, group: &str, user: &str) -> Result<Value, ApiError> {
        self.request(Method::DELETE, &format!("/v1/groups/{group}/members/{user}"), who, None).await
    }

    /// Recent contacts with unread counts, heads and read marks.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn conversations(&self, who: &Credential, limit: u32) -> Result<Value, ApiError> {
        self.request(Method::GET, &format!("/v1/conversations?limit={limit}"), who, None).await
    }

    /// A page of a conversation's history; `conversation` is `u/{peer}` or `g/{group}`.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn messages(
        &self,
        who: &Credential,
        conversation: &str,
        before: Option<u64>,
        limit: u32,
    ) -> Result<Value, ApiError> {
        let before = before.map(|seq| format!("before={seq}&")).unwrap_or_default();
        let path = format!("/v1/conversations/{conversation}/messages?{before}limit={limit}");
        self.request(Method::GET, &path, who, None).await
    }

    /// Who is online, and where.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn presence(&self, who: &Credential, user: &str) -> Result<Value, ApiError> {
        self.request(Method::GET, &format!("/v1/presence/{user}"), who, None).await
    }

    /// `GET` without credentials: `/readyz`, `/healthz`, a status document.
    ///
    /// # Errors
    /// [`ApiError`].
    pub async fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.request(Method::GET, path, &Credential::None, None).await
    }
}
