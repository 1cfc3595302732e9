//! Connections to PostgreSQL: a bounded number of them, each checked when it is made, over TLS as the URL asks.
//!
//! **TLS is asked for as in libpq**, by `sslmode` in the URL ([Protection Provided in Different Modes][modes]): `disable`, `prefer` (when it
//! is left out: TLS if the server has it) and `require` verify nothing, `verify-ca` the chain of certificates, `verify-full` the server's name,
//! too. A file of authorities takes the place of `sslrootcert`: it makes TLS a must and `verify-full` the default. Without one the system's count.
//!
//! **A database that takes no more connections** (too many clients, a password that has changed) is worked with over those that there
//! are: who finds none waits for one, as if the bound were their number. After [`MORE_AFTER`] more are tried again.
//!
//! [modes]: https://www.postgresql.org/docs/current/libpq-ssl.html#LIBPQ-SSL-PROTECTION

use std::fmt::Display;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::tokio_postgres as pg;
use deadpool_postgres::tokio_postgres::config::{SslMode, TargetSessionAttrs};
use deadpool_postgres::{
    ClientWrapper, Hook, HookError, Manager, ManagerConfig, Object, Pool, PoolError, RecyclingMethod, Runtime,
};
use parking_lot::Mutex;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{CALL_TIMEOUT, LOCK_TIMEOUT_MS, explain};
use crate::store::{OpenError, StoreError};

/// Connections of one member.
const CONNECTIONS_MAX: usize = 16;
/// How long anybody waits for a connection, and for each step of making one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// After a connection could not be made, so long none beyond those that there are is tried.
const MORE_AFTER: Duration = Duration::from_secs(5);

/// The connections of one member.
#[derive(Debug)]
pub(super) struct Connections {
    pool: Pool,
    /// One permit for each connection that may be in use.
    room: Arc<Semaphore>,
    /// Permits that were taken away, and since when.
    missing: Mutex<Option<(usize, Instant)>>,
}

/// A connection in use. It goes back when it is dropped.
pub(super) struct Connection {
    object: Object,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// Closes one that has not answered in time: whatever is under way on it, nobody else must wait behind it.
    pub(super) fn hangs(self) -> StoreError {
        drop(Object::take(self.object));
        StoreError::unknown(format_args!("no answer within {CALL_TIMEOUT:?}"))
    }
}

impl Deref for Connection {
    type Target = Object;

    fn deref(&self) -> &Object {
        &self.object
    }
}

impl DerefMut for Connection {
    fn deref_mut(&mut self) -> &mut Object {
        &mut self.object
    }
}

impl Connections {
    /// Makes the first one. `name`: as what the database is to know them; `ca_file`: the authorities that its certificate may be from.
    pub(super) async fn open(url: &str, ca_file: Option<&Path>, name: &str) -> Result<(Self, Connection), OpenError> {
        let failed = |e: &dyn Display| OpenError::Database { reason: e.to_string() };
        let (config, verified) = config(url, ca_file.is_some(), name)?;
        let tls = MakeRustlsConnect::new(tls(verified, ca_file)?);
        let manager = Manager::from_config(config, tls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS_MAX)
            .runtime(Runtime::Tokio1)
            .create_timeout(Some(CONNECT_TIMEOUT))
            .recycle_timeout(Some(CONNECT_TIMEOUT))
            .post_create(Hook::async_fn(|client: &mut ClientWrapper, _| {
                Box::pin(async move {
                    match is_durable(client).await {
                        Ok(true) => Ok(()),
                        Ok(false) => Err(HookError::message(OpenError::NotDurable.to_string())),
                        Err(e) => Err(HookError::Backend(e)),
                    }
                })
            }))
            .build()
            .map_err(|e| failed(&e))?;
        let connections = Self { pool, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)), missing: Mutex::default() };
        match connections.checked_out().await {
            Ok(first) => Ok((connections, first)),
            Err(GetError::Pool(PoolError::PostCreateHook(HookError::Message(_)))) => Err(OpenError::NotDurable),
            Err(e) => Err(failed(&e)),
        }
    }

    /// A connection; nothing was sent when there is none.
    pub(super) async fn get(&self) -> Result<Connection, StoreError> {
        self.checked_out().await.map_err(StoreError::refused)
    }

    async fn checked_out(&self) -> Result<Connection, GetError> {
        self.try_more();
        loop {
            let permit = timeout(CONNECT_TIMEOUT, self.room.clone().acquire_owned()).await;
            let permit = permit.map_err(|_| GetError::Busy)?.map_err(|_| GetError::Pool(PoolError::Closed))?;
            match self.pool.get().await {
                Ok(object) => return Ok(Connection { object, _permit: permit }),
                // There are others, in use: wait for one of them. Each pass takes a permit away, so this ends.
                Err(error) if self.pool.status().size > 0 => self.do_without(permit, &error),
                Err(error) => return Err(GetError::Pool(error)),
            }
        }
    }

    /// Goes on with one connection less.
    fn do_without(&self, permit: OwnedSemaphorePermit, error: &PoolError) {
        let mut missing = self.missing.lock();
        if missing.is_none() {
            let (connections, reason) = (self.pool.status().size, words(error));
            tracing::warn!(
                connections,
                reason,
                "the database takes no more connections: those that there are have to do"
            );
        }
        missing.get_or_insert_with(|| (0, Instant::now())).0 += 1;
        permit.forget();
    }

    fn try_more(&self) {
        let mut missing = self.missing.lock();
        if let Some((count, since)) = *missing
            && since.elapsed() >= MORE_AFTER
        {
            self.room.add_permits(count);
            *missing = None;
        }
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum GetError {
    #[error("all {CONNECTIONS_MAX} connections to the database are in use")]
    Busy,
    #[error("{}", words(.0))]
    Pool(PoolError),
}

fn words(error: &PoolError) -> String {
    match error {
        PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => explain(error),
        other => other.to_string(),
    }
}

async fn is_durable(client: &ClientWrapper) -> Result<bool, pg::Error> {
    let setting: String = client.query_one("SELECT current_setting('synchronous_commit')", &[]).await?.try_get(0)?;
    Ok(setting != "off")
}

/// What of a server's certificate has to be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verified {
    Nothing,
    Chain,
    ChainAndName,
}

/// What a URL asks for.
fn config(url: &str, with_ca: bool, name: &str) -> Result<(pg::Config, Verified), OpenError> {
    let failed = |reason: String| OpenError::Database { reason };
    let (server, parameters) = url.rsplit_once('?').unwrap_or((url, ""));
    let mut verified = if with_ca { Verified::ChainAndName } else { Verified::Nothing };
    let mut rest = Vec::new();
    for parameter in parameters.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=') {
            // The library knows neither.
            Some(("sslmode", "verify-ca")) => verified = Verified::Chain,
            Some(("sslmode", "verify-full")) => verified = Verified::ChainAndName,
            Some(("sslmode", "disable")) if with_ca => {
                return Err(failed("sslmode=disable, and a file of authorities: leave one of them out".to_owned()));
            }
            Some(("sslrootcert", _)) => {
                let instead = "storage.postgres.caFile or, on Kubernetes, caSecret";
                return Err(failed(format!("sslrootcert is no part of the URL here: use {instead}")));
            }
            _ => rest.push(parameter),
        }
    }
    let url = if rest.is_empty() { server.to_owned() } else { format!("{server}?{}", rest.join("&")) };
    let mut config: pg::Config = url.parse().map_err(|e: pg::Error| failed(explain(&e)))?;
    if verified != Verified::Nothing {
        config.ssl_mode(SslMode::Require);
    }
    let settings = format!(
        "-c lock_timeout={LOCK_TIMEOUT_MS} -c statement_timeout={} -c idle_in_transaction_session_timeout=2000",
        CALL_TIMEOUT.as_millis()
    );
    let options = config.get_options().map_or_else(|| settings.clone(), |own| format!("{own} {settings}"));
    config
        .options(options)
        .application_name(name)
        .target_session_attrs(TargetSessionAttrs::ReadWrite)
        .connect_timeout(Duration::from_secs(1))
        .keepalives(true)
        .keepalives_idle(Duration::from_secs(5))
        .keepalives_interval(Duration::from_secs(1))
        .keepalives_retries(3)
        .tcp_user_timeout(CALL_TIMEOUT);
    Ok((config, verified))
}

fn tls(verified: Verified, ca_file: Option<&Path>) -> Result<ClientConfig, OpenError> {
    let provider = Arc::new(ring::default_provider());
    let failed = |e: &dyn Display| OpenError::Authorities {
        of: ca_file.map_or_else(|| "the system".to_owned(), |path| path.display().to_string()),
        reason: e.to_string(),
    };
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| failed(&e))?;
    let chain = match verified {
        Verified::Nothing => None,
        Verified::Chain | Verified::ChainAndName => {
            let mut roots = RootCertStore::empty();
            match ca_file {
                Some(path) => {
                    for certificate in CertificateDer::pem_file_iter(path).map_err(|e| failed(&e))? {
                        roots.add(certificate.map_err(|e| failed(&e))?).map_err(|e| failed(&e))?;
                    }
                }
                None => {
                    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
                }
            }
            if roots.is_empty() {
                return Err(failed(&"there is no certificate in it"));
            }
            let chain = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone());
            Some(chain.build().map_err(|e| failed(&e))?)
        }
    };
    Ok(match (verified, chain) {
        (Verified::ChainAndName, Some(chain)) => builder.with_webpki_verifier(chain),
        (_, chain) => builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain, provider })),
    }
    .with_no_client_auth())
}

/// Verifies the chain, or nothing; never the name.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        // The name is what it looks at last.
        match chain.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVER: &str = "postgres://chat@db.example.com/chat";

    fn asked(parameters: &str, with_ca: bool) -> (SslMode, Verified) {
        let (config, verified) = config(&format!("{SERVER}{parameters}"), with_ca, "me").expect(parameters);
        assert_eq!(config.get_dbname(), Some("chat"), "{parameters}");
        (config.get_ssl_mode(), verified)
    }

    #[test]
    fn tls_is_asked_for_as_in_libpq() {
        for (parameters, without_ca, with_ca) in [
            ("", (SslMode::Prefer, Verified::Nothing), Verified::ChainAndName),
            ("?sslmode=prefer", (SslMode::Prefer, Verified::Nothing), Verified::ChainAndName),
            ("?sslmode=require", (SslMode::Require, Verified::Nothing), Verified::ChainAndName),
            ("?sslmode=verify-ca", (SslMode::Require, Verified::Chain), Verified::Chain),
            (
                "?sslmode=verify-full&connect_timeout=3",
                (SslMode::Require, Verified::ChainAndName),
                Verified::ChainAndName,
            ),
        ] {
            assert_eq!(asked(parameters, false), without_ca, "{parameters}");
            assert_eq!(asked(parameters, true), (SslMode::Require, with_ca), "{parameters} with authorities");
        }
        assert_eq!(asked("?sslmode=disable", false), (SslMode::Disable, Verified::Nothing));
    }

    #[test]
    fn what_can_not_be_meant_is_refused_in_words() {
        for (parameters, with_ca, words) in [
            ("?sslmode=disable", true, "leave one of them out"),
            ("?sslrootcert=/etc/ca.pem&sslmode=verify-full", false, "caSecret"),
            ("?sslmode=always", false, "sslmode"),
        ] {
            let error = config(&format!("{SERVER}{parameters}"), with_ca, "me").expect_err(parameters).to_string();
            assert!(error.contains(words), "{parameters}: {error}");
        }
    }
}
