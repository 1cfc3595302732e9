//! The HTTP side: health, metrics, and the JSON API, whose requests are carried to the owners of shards like those of MQTT clients.

mod chat;
mod problem;
mod rooms;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use axum::{Json, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use im_proto::ids::is_name;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use utoipa::OpenApi;

use self::problem::{Problem, as_problem};
use crate::hub::Hub;
use crate::listen::{Gateway, ListenError, SharedListener, bind_shared};

/// What each port holds its connections to.
const BOUNDS: Bounds = Bounds { connections_max: 1_024, header_wait: Duration::from_secs(30) };
/// For the rest of a request and its answer; an owner has 10 s of it.
const REQUEST_WAIT: Duration = Duration::from_secs(30);
/// Of a request: as much as the framework takes by itself, bytes, or more if a payload may be so large.
const BODY_BYTES_MIN: usize = 2 << 20;

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
        .route("/v1/groups/{group}", put(chat::create_group).get(chat::get_group))
        .route("/v1/groups/{group}/members", post(chat::change_members))
        .route("/v1/groups/{group}/members/{user}", delete(chat::remove_member))
        .route("/v1/groups/{group}/messages", post(chat::system_message))
        .route("/v1/messages", post(chat::send_message))
        .route("/v1/conversations", get(chat::list_conversations))
        .route("/v1/conversations/{kind}/{id}/messages", get(chat::history))
        .route("/v1/conversations/{kind}/{id}/read", put(chat::mark_read))
        .route("/v1/presence/{user}", get(chat::presence))
        .route("/v1/users/{user}/kick", post(chat::kick))
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

#[derive(OpenApi)]
#[openapi(
    info(
        title = "ImCluster",
        description = "Groups, history, unread, presence, live rooms. `Authorization: Bearer` a user's JWT or a service token."
    ),
    paths(
        chat::create_group,
        chat::get_group,
        chat::change_members,
        chat::remove_member,
        chat::system_message,
        chat::send_message,
        chat::list_conversations,
        chat::history,
        chat::mark_read,
        chat::presence,
        chat::kick,
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
    use axum::body::Bytes;
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
