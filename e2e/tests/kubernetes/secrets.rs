//! What ImClusters are given in Secrets: a database, keys of users' tokens; and both rotated while people chat.

use std::{
    env,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use im_e2e::client::{ClientError, Connection, Options};
use jsonwebtoken::{EncodingKey, Header};
use k8s_openapi::api::core::v1::Secret;
use kube::{
    ResourceExt,
    api::{Patch, PatchParams},
};
use rcgen::{CertificateParams, KeyPair};
use serde_json::{Value, json};
use tokio_postgres::NoTls;

use crate::{
    dependencies::{Data, Dependency},
    environment::Suite,
    scene::{CLUSTER, Scene, ensure, prepared_scenario, scenario},
    support::{TestResult, eventually},
    world::World,
};

/// A kubelet brings a changed Secret into pods once in a minute or so.
const SECRET_SEEN_WITHIN: Duration = Duration::from_secs(180);

/// Writes a Secret, of one key or another content of it.
async fn write_secret(scene: &Scene, name: &str, key: &str, content: &str) -> TestResult {
    let secret: Value = json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "stringData": {key: content},
    });
    scene.api::<Secret>().patch(name, &PatchParams::apply("e2e").force(), &Patch::Apply(&secret)).await?;
    Ok(())
}

/// The PostgreSQL of the cluster.
struct Postgres {
    /// As pods reach it.
    url: String,
    /// As this machine reaches it.
    from_here: String,
}

impl Postgres {
    async fn of(scene: &Scene) -> TestResult<Self> {
        let variable = |name: &str| env::var(name).map_err(|_| format!("{name} is not set; run this by `make e2e`"));
        let (url, port) = (variable("IM_E2E_POSTGRES")?, variable("IM_E2E_POSTGRES_NODE_PORT")?);
        let (credentials, rest) = url.split_once('@').ok_or("IM_E2E_POSTGRES has no credentials")?;
        let database = rest.split_once('/').ok_or("IM_E2E_POSTGRES names no database")?.1;
        let from_here = format!("{credentials}@{}:{port}/{database}", scene.node_address().await?);
        Ok(Self { url, from_here })
    }

    /// The URL for a role and its database of the same name.
    fn url_of(&self, role: &str, password: &str) -> TestResult<String> {
        let (_, rest) = self.url.split_once('@').ok_or("IM_E2E_POSTGRES has no credentials")?;
        let (host, _) = rest.split_once('/').ok_or("IM_E2E_POSTGRES names no database")?;
        Ok(format!("postgres://{role}:{password}@{host}/{role}"))
    }

    /// Has it speak TLS. Gives the certificate, which is its own authority.
    async fn with_tls(&self) -> TestResult<String> {
        let (_, rest) = self.url.split_once('@').ok_or("IM_E2E_POSTGRES has no credentials")?;
        let (host, _) = rest.split_once(':').ok_or("IM_E2E_POSTGRES has no port")?;
        let key = KeyPair::generate()?;
        let certificate = CertificateParams::new(vec![host.to_owned()])?.self_signed(&key)?.pem();
        let write = |file: &str, pem: &str| {
            let encoded = format!("translate(encode(convert_to('{pem}', 'UTF8'), 'base64'), e'\n', '')");
            format!("copy (select {encoded}) to program 'base64 -d >{file} && chmod 600 {file}'")
        };
        let on = ["alter system set ssl = on", "select pg_reload_conf()"].map(str::to_owned);
        self.execute(&[write("server.crt", &certificate), write("server.key", &key.serialize_pem())]).await?;
        self.execute(&on).await?;
        Ok(certificate)
    }

    /// Executes statements, each by itself: databases are not made in transactions.
    async fn execute(&self, statements: &[String]) -> TestResult {
        let (client, connection) = tokio_postgres::connect(&self.from_here, NoTls).await?;
        let connection = tokio::spawn(connection);
        for statement in statements {
            client.batch_execute(statement).await.map_err(|error| format!("{statement}: {error}"))?;
        }
        drop(client);
        Ok(connection.await??)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_over_tls_is_lost_and_its_password_rotated() -> TestResult {
    prepared_scenario(Suite::All, async |scene| {
        let postgres = Postgres::of(scene).await?;
        // A role and a database of this scenario's own.
        let name = scene.namespace.replace('-', "_");
        let create = format!("create role {name} login password 'first'");
        postgres.execute(&[create, format!("create database {name} owner {name}")]).await?;
        write_secret(scene, "database", "url", &postgres.url_of(&name, "first")?).await?;
        write_secret(scene, "database-ca", "ca.crt", &postgres.with_tls().await?).await?;
        let (url, ca) = (json!({"name": "database", "key": "url"}), json!({"name": "database-ca", "key": "ca.crt"}));
        let of_secret = json!({"embedded": null, "postgres": {"urlSecret": url, "caSecret": ca}});
        scene.bring_up(json!({"storage": of_secret, "business": {"replicas": 2}})).await?;
        scene.wait_shards_shared_by(2).await?;

        let database = Dependency::of(scene, "postgres");
        database.crash().await?;
        scene.flow(300).await?;
        database.stop().await?;
        let away = scene.wait_condition("Degraded", "StoreUnreachable").await;
        database.start(Data::Kept).await?;
        away?;
        scene.flow(300).await?;

        postgres.execute(&[format!("alter role {name} password 'second'")]).await?;
        write_secret(scene, "database", "url", &postgres.url_of(&name, "second")?).await?;
        let old: Vec<_> = scene.world.pods(CLUSTER, "business").iter().map(ResourceExt::uid).collect();
        let replaced = |world: &World| world.pods(CLUSTER, "business").iter().all(|pod| !old.contains(&pod.uid()));
        scene.wait("all business members have the new URL", replaced).await?;
        scene.wait_shards_shared_by(2).await?;
        scene.flow(300).await
    })
    .await
}

/// A token under a key that both sides have.
fn token(user: &str, key: &str) -> TestResult<String> {
    let end_s = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs() + 3_600;
    let claims = json!({"sub": user, "exp": end_s});
    Ok(jsonwebtoken::encode(&Header::default(), &claims, &EncodingKey::from_secret(key.as_bytes()))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_tokens_are_rotated_without_a_restart() -> TestResult {
    scenario(Suite::All, json!({}), async |scene| {
        let keys = ["the first of the two keys of this scenario", "and the second, to which it is rotated"];
        write_secret(scene, "keys", "hmac", keys[0]).await?;
        let of_secret = json!({"insecure": null, "jwt": {"keysSecret": {"name": "keys", "key": "hmac"}}});
        scene.apply(&scene.imcluster("closed", json!({ "auth": of_secret }))).await?;
        scene
            .wait("it is Ready", |world| world.condition_is("closed", "Ready", im_crds::ConditionStatus::True))
            .await?;
        let server = scene.access("closed").await?.mqtt;
        let login = async |key: &str| -> TestResult<Result<Connection, ClientError>> {
            let mut options = Options::new(server, "ann", "phone");
            options.password = Some(token("ann", key)?);
            Ok(Connection::open(&options, false).await.map(|(connection, _)| connection))
        };
        drop(login(keys[0]).await??);
        ensure(login(keys[1]).await?.is_err(), || "a token under a key that nobody gave is taken".to_owned())?;

        let before: Vec<_> = scene.world.pods("closed", "gateway").iter().map(ResourceExt::uid).collect();
        write_secret(scene, "keys", "hmac", keys[1]).await?;
        let connected = eventually("tokens under the new key are taken", SECRET_SEEN_WITHIN, async || {
            login(keys[1]).await.ok()?.ok()
        })
        .await?;
        drop(connected);
        match login(keys[0]).await? {
            Err(ClientError::Refused { .. }) => {}
            other => return Err(format!("a token under the old key: {other:?}").into()),
        }
        let after: Vec<_> = scene.world.pods("closed", "gateway").iter().map(ResourceExt::uid).collect();
        ensure(before == after, || "the gateway was replaced".to_owned())
    })
    .await
}
