//! Clients that nobody here wrote log in, chat, go offline and come back, over each transport and with each way to prove who
//! one is: mosquitto, paho-mqtt and the npm package mqtt against a whole system of real processes.

mod support;

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use im_e2e::{
    api::{ApiError, Credential},
    client::{ClientError, Connection, Options},
    wire::{Packet, Version},
};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::{CertificateParams, KeyPair};
use rustix::process::Signal;
use serde_json::json;
use support::{Chat, Cluster, Template, TestResult, free_ports};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{ChildStdout, Command},
    sync::Mutex,
    time::{Instant, timeout},
};

/// One system at a time: they would take the processor from each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A client's whole conversation takes a second or two; the rest is for a busy machine.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(90);
/// Installing two packages from their registries.
const SETUP_TIMEOUT: Duration = Duration::from_secs(300);
/// A killed gateway runs again, and its clients are back, within this time.
const BACK_WITHIN: Duration = Duration::from_secs(20);
/// Acknowledged messages before each kill of a gateway.
const MESSAGES_BETWEEN_KILLS: usize = 30;

/// A directory of the test's own, gone at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> TestResult<Self> {
        let path =
            std::env::temp_dir().join(format!("im-e2e-clients-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, text: &str) -> TestResult<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, text)?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A leftover in the system's directory for temporary files harms nobody.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// Where the clients are installed; installs them if something is missing.
async fn installed() -> TestResult<PathBuf> {
    let mut setup = Command::new("sh");
    setup.arg(scripts().join("setup.sh"));
    let output = timeout(SETUP_TIMEOUT, setup.kill_on_drop(true).output()).await??;
    if !output.status.success() {
        return Err(format!("e2e/clients/setup.sh: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Runs a client to its end; it must end well and say `good`.
async fn good(mut command: Command) -> TestResult {
    let shown = format!("{:?}", command.as_std());
    let output = timeout(SCRIPT_TIMEOUT, command.kill_on_drop(true).output())
        .await
        .map_err(|_| format!("{shown} still runs after {SCRIPT_TIMEOUT:?}"))??;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || said.lines().last() != Some("good") {
        let complaint = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{shown}: {}\n{said}{complaint}", output.status).into());
    }
    Ok(())
}

fn mosquitto(cluster: &Cluster, version: &str) -> Command {
    let mut command = Command::new("sh");
    let (mqtt, http) = (cluster.mqtt(), cluster.http().port().to_string());
    command.arg(scripts().join("mosquitto_chat.sh")).args([&mqtt.ip().to_string(), &mqtt.port().to_string(), &http]);
    command.arg(version);
    command
}

fn paho(clients: &Path, cluster: &Cluster) -> Command {
    let mut command = Command::new(clients.join("venv/bin/python"));
    command.arg("-B").arg(scripts().join("paho_chat.py"));
    command.args(["--port", &cluster.mqtt().port().to_string(), "--http-port", &cluster.http().port().to_string()]);
    command
}

fn mqttjs(clients: &Path, cluster: &Cluster, web_socket: bool, level: &str) -> Command {
    let url =
        if web_socket { format!("ws://{}/mqtt", cluster.web_socket()) } else { format!("mqtt://{}", cluster.mqtt()) };
    let mut command = Command::new("node");
    command.arg(clients.join("mqttjs_chat.mjs")).arg(url).arg(format!("http://{}", cluster.http())).arg(level);
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn mosquitto_paho_and_mqttjs_chat() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let clients = installed().await?;
    let cluster = Cluster::start(Template::new()?.with_members(2, 2)).await?;
    for version in ["mqttv5", "mqttv311"] {
        good(mosquitto(&cluster, version)).await?;
    }
    good(paho(&clients, &cluster)).await?;
    for web_socket in [false, true] {
        for level in ["5", "4"] {
            good(mqttjs(&clients, &cluster, web_socket, level)).await?;
        }
    }
    cluster.stop().await
}

/// Reads what a client says until it says this.
async fn wait_for_line(lines: &mut Lines<BufReader<ChildStdout>>, said: &mut Vec<String>, wanted: &str) -> TestResult {
    while said.last().map(String::as_str) != Some(wanted) {
        let line =
            timeout(SCRIPT_TIMEOUT, lines.next_line()).await.map_err(|_| format!("the client never said {wanted}"))?;
        said.push(line?.ok_or_else(|| format!("the client ended before it said {wanted}: {said:?}"))?);
    }
    Ok(())
}

/// Kills each gateway in turn while a client's two people write to each other through them.
async fn survives_its_gateways(cluster: &Cluster, mut command: Command) -> TestResult {
    let shown = format!("{:?}", command.as_std());
    let mut client =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn()?;
    let mut stdin = client.stdin.take().ok_or("no stdin")?;
    let mut lines = BufReader::new(client.stdout.take().ok_or("no stdout")?).lines();
    let ready = timeout(SCRIPT_TIMEOUT, lines.next_line()).await??.unwrap_or_default();
    if !ready.starts_with("ready ") {
        return Err(format!("{shown} said {ready:?}").into());
    }
    let mut said = Vec::new();
    let mut sent = 0;
    for gateway in cluster.members_of("gateway")? {
        // Whoever was on the last one writes again over the other one or its successor, before the next one dies.
        sent += MESSAGES_BETWEEN_KILLS;
        wait_for_line(&mut lines, &mut said, &format!("sent {sent}")).await?;
        cluster.signal(&gateway, Signal::KILL)?;
        cluster.wait_restarted(&gateway, BACK_WITHIN).await?;
        sent = said.len();
    }
    sent += 2 * MESSAGES_BETWEEN_KILLS;
    wait_for_line(&mut lines, &mut said, &format!("sent {sent}")).await?;
    stdin.write_all(b"enough\n").await?;
    while let Some(line) = timeout(SCRIPT_TIMEOUT, lines.next_line()).await?? {
        said.push(line);
    }
    let output = timeout(SCRIPT_TIMEOUT, client.wait_with_output()).await??;
    println!("{shown}: {:?}", said.last_chunk::<2>());
    if !output.status.success() || said.last().map(String::as_str) != Some("good") {
        return Err(format!("{shown}: {}\n{said:?}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn real_clients_resume_when_their_gateways_are_killed() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let clients = installed().await?;
    let cluster = Cluster::start(Template::new()?.with_members(2, 2)).await?;
    for version in ["5", "3.1.1"] {
        let mut command = paho(&clients, &cluster);
        command.args(["--resume", version]);
        survives_its_gateways(&cluster, command).await?;
    }
    for version in ["mqttv5", "mqttv311"] {
        let mut command = mosquitto(&cluster, version);
        command.arg("resume");
        survives_its_gateways(&cluster, command).await?;
    }
    for (web_socket, level) in [(true, "5"), (false, "4")] {
        let mut command = mqttjs(&clients, &cluster, web_socket, level);
        command.arg("resume");
        survives_its_gateways(&cluster, command).await?;
    }
    cluster.stop().await
}

// ---- TLS --------------------------------------------------------------------------------------------------------------

/// Publishes with mosquitto over TLS and says whether that went well, and what it said.
async fn publish_over_tls(address: SocketAddr, authority: &Path, text: &str) -> TestResult<(bool, String)> {
    let mut command = Command::new("mosquitto_pub");
    command.args(["-h", "localhost", "-p", &address.port().to_string(), "-V", "mqttv5", "-q", "1", "-P", "any"]);
    command.args(["-u", "alice", "-i", "phone", "-t", "u/bob", "-m", text, "--cafile"]).arg(authority);
    let output = timeout(SCRIPT_TIMEOUT, command.kill_on_drop(true).output()).await??;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn mosquitto_publishes_over_tls_and_only_to_the_right_server() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scratch = Scratch::new()?;
    let key = KeyPair::generate()?;
    let certificate = CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&key)?;
    let certificate = scratch.write("server.pem", &certificate.pem())?;
    let key = scratch.write("server.key", &key.serialize_pem())?;
    let stranger = KeyPair::generate()?;
    let stranger = CertificateParams::new(vec!["localhost".to_owned()])?.self_signed(&stranger)?;
    let stranger = scratch.write("stranger.pem", &stranger.pem())?;

    let [port, ..] = free_ports()?;
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut template = Template::new()?.with_members(2, 1);
    let (certificate_path, key) = (certificate.display(), key.display());
    template.tls = Some(format!("{{address: \"{address}\", certFile: \"{certificate_path}\", keyFile: \"{key}\"}}"));
    let cluster = Cluster::start(template).await?;

    let (taken, said) = publish_over_tls(address, &certificate, "private").await?;
    assert!(taken, "the right authority, and yet: {said}");
    let (taken, said) = publish_over_tls(address, &stranger, "to nobody").await?;
    assert!(!taken, "a server that nobody vouches for was believed: {said}");
    let bob = Credential::Insecure("bob".to_owned());
    let page = cluster.api().messages(&bob, "u/alice", None, 10).await?;
    assert_eq!(page["messages"].as_array().map(Vec::len), Some(1), "{page}");
    assert_eq!(page["messages"][0]["payload"], "private", "{page}");

    // Plain MQTT on the TLS port is no TLS: closed, and TLS goes on.
    let plain = Connection::open(&Options::new(address, "alice", "phone"), false).await;
    assert!(matches!(plain, Err(ClientError::Closed | ClientError::Io { .. } | ClientError::Wire(_))), "{plain:?}");
    let (taken, said) = publish_over_tls(address, &certificate, "still private").await?;
    assert!(taken, "{said}");
    cluster.stop().await
}

// ---- JWT --------------------------------------------------------------------------------------------------------------

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A token of `subject` that ends at a Unix time.
fn token(key: &KeyPair, subject: &str, expires_s: u64) -> TestResult<String> {
    let claims = json!({ "sub": subject, "exp": expires_s });
    let key = EncodingKey::from_ec_pem(key.serialize_pem().as_bytes())?;
    Ok(jsonwebtoken::encode(&Header::new(Algorithm::ES256), &claims, &key)?)
}

fn refusal(opened: Result<(Connection, im_e2e::client::Welcome), ClientError>) -> TestResult<u8> {
    match opened {
        Err(ClientError::Refused { code, .. }) => Ok(code),
        other => Err(format!("no refusal: {other:?}").into()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_decide_who_gets_in_and_for_how_long() -> TestResult {
    let _alone = ONE_AT_A_TIME.lock().await;
    let scratch = Scratch::new()?;
    let (key, forger) = (KeyPair::generate()?, KeyPair::generate()?);
    let keys = scratch.write("keys.pem", &key.public_key_pem())?;
    let mut template = Template::new()?.with_members(2, 2);
    template.auth = format!("{{jwt: {{keysFile: \"{}\"}}}}", keys.display());
    let cluster = Cluster::start(template).await?;
    let hour = unix_s() + 3600;

    let login = |version: Version, user: &str, password: Option<String>| {
        let mut options = Options::new(cluster.mqtt(), user, "phone");
        (options.version, options.password) = (version, password);
        options
    };
    let right = token(&key, "alice", hour)?;
    // (password, reason code of MQTT 5, return code of MQTT 3.1.1)
    let wrong = [
        ("no token", None, 0x86, 4),
        ("no JSON Web Token", Some("secret".to_owned()), 0x86, 4),
        ("signed by somebody else", Some(token(&forger, "alice", hour)?), 0x86, 4),
        ("somebody else's", Some(token(&key, "bob", hour)?), 0x86, 4),
        ("expired", Some(token(&key, "alice", unix_s() - 10)?), 0x87, 5),
    ];
    for (what, password, code, code_v311) in wrong {
        for (version, code) in [(Version::V5, code), (Version::V311, code_v311)] {
            let opened = Connection::open(&login(version, "alice", password.clone()), false).await;
            assert_eq!(refusal(opened)?, code, "{what}, {version:?}");
        }
    }

    // The right ones chat.
    let people = ["alice", "bob"].into_iter().map(|user| {
        let password = token(&key, user, hour)?;
        Ok(login(Version::V5, user, Some(password)))
    });
    let mut chat = Chat::start_with(&cluster, people.collect::<TestResult<Vec<_>>>()?, 0).await?;
    chat.send_at(50.0, 7);
    chat.wait_acked(100, Duration::from_secs(20)).await?;

    // A connection ends when its token does: not before, and soon after.
    let expires = unix_s() + 3;
    let mut options = login(Version::V5, "carol", Some(token(&key, "carol", expires)?));
    let (mut connection, _) = Connection::open(&options, false).await?;
    let end =
        timeout(Duration::from_secs(10), connection.next()).await.map_err(|_| "the token's end ended nothing")??;
    assert!(matches!(end, Packet::Disconnect { code: 0x87, .. }), "{end:?}");
    let now = unix_s();
    assert!((expires..=expires + 3).contains(&now), "ended at {now}, the token at {expires}");
    assert_eq!(refusal(Connection::open(&options, false).await)?, 0x87);
    options.version = Version::V311;
    options.password = Some(token(&key, "carol", unix_s() + 2)?);
    let (mut connection, _) = Connection::open(&options, false).await?;
    let end = timeout(Duration::from_secs(10), connection.next()).await.map_err(|_| "the token's end ended nothing")?;
    assert!(matches!(end, Err(ClientError::Closed)), "3.1.1 has no DISCONNECT from the server: {end:?}");

    // HTTP takes the same tokens, and `insecure:` opens nothing here.
    let api = cluster.api();
    api.conversations(&Credential::Bearer(right), 10).await?;
    let insecure = [Credential::Insecure("alice".to_owned()), Credential::Bearer("insecure-service".to_owned())];
    let forged = Credential::Bearer(token(&forger, "alice", hour)?);
    for credential in insecure.iter().chain([&forged, &Credential::None]) {
        let start = Instant::now();
        match api.conversations(credential, 10).await {
            Err(ApiError::Problem { status, is_problem_document: true, .. }) if status == 401 => {}
            other => return Err(format!("{credential:?} after {:?}: {other:?}", start.elapsed()).into()),
        }
    }
    let report = chat.stop_and_check(Duration::from_secs(30)).await?;
    println!("{report}");
    cluster.stop().await
}
