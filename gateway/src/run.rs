//! Puts a gateway together from its configuration.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use im_proto::dial::ControlDialer;
use im_proto::ids::{IdError, MemberId};
use im_proto::map_hint;
use im_proto::process::cpu_time;
use tokio::time::{MissedTickBehavior, interval};

use crate::auth::{Auth, AuthError};
use crate::config::{Config, ConfigError};
use crate::http::{self, Api};
use crate::hub::Hub;
use crate::listen::{self, Gateway, ListenError, Wrap};
use crate::member::{Identity, Member};
use crate::metrics::Metrics;
use crate::session::Shared;

/// In how many parts the connections' time passes.
const TICKS_PER_SECOND: u32 = 20;

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its name.
    #[error(transparent)]
    Name(#[from] IdError),
    /// Its token.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its keys.
    #[error(transparent)]
    Auth(#[from] AuthError),
    /// Its addresses.
    #[error(transparent)]
    Listen(#[from] ListenError),
}

/// A running gateway and where it listens.
pub struct Running {
    /// Its parts.
    pub gateway: Arc<Gateway>,
    /// Its membership.
    pub member: Arc<Member>,
    /// MQTT over TCP.
    pub mqtt: Option<SocketAddr>,
    /// MQTT over TLS.
    pub tls: Option<SocketAddr>,
    /// MQTT over WebSocket.
    pub web_socket: Option<SocketAddr>,
    /// The JSON API.
    pub http: Option<SocketAddr>,
    /// Health and metrics.
    pub admin: SocketAddr,
}

/// Starts a gateway on the present runtime.
///
/// # Errors
/// [`StartError`] names what in the configuration can't be had.
pub fn start(config: &Config) -> Result<Running, StartError> {
    let boot = rand::random();
    let me = MemberId::new(&config.name, boot)?;
    let shared = Shared::new(boot, config.session_limits(), Metrics::new());
    let auth = Arc::new(Auth::new(&config.auth, config.service_tokens_file.as_deref())?);
    let token = config.shared_token()?;
    let hub = Hub::new(me, shared, config.rooms_config(), token.clone());
    if let Some(map) = config.map_hint_file.as_deref().and_then(map_hint::read) {
        hub.on_map(0, &map);
    }
    let gateway = Gateway::new(hub.clone(), auth, config.limits.clone());
    let listen = |address, wrap| listen::spawn(&gateway, address, wrap);
    let mqtt = config.mqtt.as_ref().map(|at| listen(at.address, Wrap::Plain)).transpose()?;
    let web_socket = config.web_socket.as_ref().map(|at| listen(at.address, Wrap::WebSocket)).transpose()?;
    let tls = match &config.tls {
        Some(at) => Some(listen(at.address, Wrap::Tls(listen::tls_acceptor(at)?))?),
        None => None,
    };
    let api = Arc::new(Api::new(gateway.clone()));
    let admin = http::spawn_admin(&api, config.admin.address)?;
    let http = config.http.as_ref().map(|at| http::spawn_public(&api, at.address)).transpose()?;
    let identity = Identity { instance: config.identity.instance(), admin_address: config.identity.advertised(admin) };
    let member = Member::new(gateway.clone(), identity);
    let dialer = ControlDialer::new(config.control.clone(), config.cluster.as_deref(), token);
    tokio::spawn(member.clone().stay_joined(dialer));
    tokio::spawn(member.clone().shed());
    tokio::spawn(keep_time(hub.clone()));
    tokio::spawn(hub.clone().keep_counting());
    tracing::info!(me = %hub.me, ?mqtt, ?tls, ?web_socket, ?http, %admin, "listening");
    Ok(Running { gateway, member, mqtt, tls, web_socket, http, admin })
}

async fn keep_time(hub: Arc<Hub>) {
    let mut ticks = interval(Duration::from_secs(1) / TICKS_PER_SECOND);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for part in (0..TICKS_PER_SECOND).cycle() {
        ticks.tick().await;
        hub.tick(part as usize, TICKS_PER_SECOND as usize);
        if part == 0 {
            hub.shared.metrics.sample(cpu_time());
        }
    }
}
