//! A gateway with real sockets against a fake owner.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use common::{Client, PLAIN, connect_packet, eventually, gateway};
use futures::{SinkExt, StreamExt};
use im_gateway::connection::WebSocket;
use im_gateway::mqtt::Reason;
use im_gateway::run::Running;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;

async fn chat<S: AsyncRead + AsyncWrite + Unpin>(alice: S, bob: S) {
    let mut alice = Client::connect(alice, "alice", "phone").await;
    let mut bob = Client::connect(bob, "bob", "tablet").await;
    assert_eq!(bob.subscribe("inbox/#").await, 1);
    let large = vec![b'x'; 5_000];
    for (id, payload) in [(1, b"hello".as_slice()), (2, &large)] {
        let (code, properties) = alice.publish(id, "u/bob", payload).await;
        assert_eq!(code, 0);
        assert!(properties.contains(&id.to_string()), "{properties}");
        let message = bob.message().await;
        assert_eq!((message.topic.as_str(), message.payload.as_slice()), ("inbox/u/alice/alice", payload));
    }
    assert_eq!(alice.publish(3, "g/closed", b"x").await.0, Reason::NotAuthorized.code());
    assert_eq!(alice.publish(4, "nowhere", b"x").await.0, Reason::TopicNameInvalid.code());
    assert_eq!(alice.publish(5, "read/u/bob", b"2").await.0, 0);
}

#[tokio::test]
async fn chat_over_tcp() {
    let (running, owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    eventually("the link is up", || running.gateway.hub.shards() > 0).await;
    chat(TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()).await;
    eventually("both sessions are closed at their owner", || owner.closes() == 2).await;
    eventually("the pushes are acknowledged", || owner.took() == 2).await;
    eventually("no connection is left", || running.gateway.hub.connections() == 0).await;
}

async fn dial_web_socket(address: SocketAddr) -> tokio_tungstenite::WebSocketStream<TcpStream> {
    let mut request = format!("ws://{address}/mqtt").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("mqtt"));
    let (stream, response) =
        tokio_tungstenite::client_async(request, TcpStream::connect(address).await.unwrap()).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "mqtt");
    stream
}

#[tokio::test]
async fn chat_over_web_socket() {
    let (running, _owner) = gateway(PLAIN).await;
    let address = running.web_socket.unwrap();
    let metrics = &running.gateway.hub.shared.metrics;
    let dial = || async { WebSocket::new(dial_web_socket(address).await) };
    chat(dial().await, dial().await).await;
    assert_eq!((metrics.handshakes_failed.get(), metrics.refusals(Reason::Malformed)), (0, 0), "who left did no wrong");
    let plain = format!("ws://{address}/mqtt").into_client_request().unwrap();
    let refused = tokio_tungstenite::client_async(plain, TcpStream::connect(address).await.unwrap()).await;
    assert!(refused.is_err(), "without the subprotocol");
    eventually("it is counted", || metrics.handshakes_failed.get() == 1).await;
    // Text is no MQTT, before CONNECT and after it.
    for (count, before) in [(1, None), (2, Some(connect_packet("alice", "phone", b"x")))] {
        let mut frames = dial_web_socket(address).await;
        if let Some(connect) = before {
            frames.send(Message::binary(connect)).await.unwrap();
            assert_eq!(frames.next().await.unwrap().unwrap().into_data()[0], 0x20);
        }
        frames.send(Message::text("hello")).await.unwrap();
        while let Some(Ok(_)) = frames.next().await {}
        eventually("it is counted", || metrics.refusals(Reason::Malformed) == count).await;
    }
}

#[tokio::test]
async fn large_messages_go_over_a_web_socket() {
    let limits = r#""limits":{"maxPacketSize":4000000,"sendBufferBytes":16000000},"auth""#;
    let (running, _owner) = gateway(&PLAIN.replace("\"auth\"", limits)).await;
    let dial = || async { WebSocket::new(dial_web_socket(running.web_socket.unwrap()).await) };
    let mut alice = Client::connect(dial().await, "alice", "phone").await;
    let mut bob = Client::connect(dial().await, "bob", "tablet").await;
    assert_eq!(bob.subscribe("inbox/#").await, 1);
    let large: Vec<u8> = (0..3_000_000_u32).map(|index| (index % 251) as u8).collect();
    assert_eq!(alice.publish(1, "u/bob", &large).await.0, 0);
    assert!(bob.message().await.payload == large);
}

/// A gateway with limits, and how to dial it.
async fn limited(limits: &str) -> (Running, impl AsyncFn() -> Client<TcpStream>) {
    let (running, _owner) = gateway(&PLAIN.replace("\"auth\"", &format!("\"limits\":{limits},\"auth\""))).await;
    let address = running.mqtt.unwrap();
    (running, async move || Client::new(TcpStream::connect(address).await.unwrap()))
}

fn refused_for_want_of_room(running: &Running) -> u64 {
    running.gateway.hub.shared.metrics.connects_refused.get()
}

#[tokio::test]
async fn only_so_many_connects_a_second_are_taken() {
    let (running, dial) = limited(r#"{"connectRate":1}"#).await;
    let mut codes = Vec::new();
    // They come within less than nine seconds, however busy the machine is.
    for _ in 0..10 {
        codes.push(dial().await.login("alice", "phone").await);
    }
    assert!(codes.contains(&Some(Reason::ConnectionRateExceeded.code())), "{codes:?}");
    let refused = codes.iter().filter(|code| **code != Some(0)).count() as u64;
    assert_eq!(refused_for_want_of_room(&running), refused);
}

#[tokio::test]
async fn only_so_many_connections_before_their_connect_are_taken() {
    let (running, dial) = limited(r#"{"halfOpenMax":1}"#).await;
    let mut silent = dial().await;
    assert_eq!(dial().await.login("bob", "phone").await, None, "closed without an answer");
    assert_eq!(refused_for_want_of_room(&running), 1);
    assert_eq!(silent.login("alice", "phone").await, Some(0));
    assert_eq!(dial().await.login("bob", "phone").await, Some(0), "there is room again");
}

#[tokio::test]
async fn only_so_many_connections_are_taken() {
    let (running, dial) = limited(r#"{"maxConnections":1}"#).await;
    let mut alice = dial().await;
    assert_eq!(alice.login("alice", "phone").await, Some(0));
    assert_eq!(dial().await.login("bob", "phone").await, Some(Reason::QuotaExceeded.code()));
    assert_eq!(refused_for_want_of_room(&running), 1);
    drop(alice);
    eventually("she is gone", || running.gateway.hub.connections() == 0).await;
    assert_eq!(dial().await.login("bob", "phone").await, Some(0));
}

#[tokio::test]
async fn who_sends_too_fast_is_read_more_slowly() {
    let (running, dial) = limited(r#"{"messageRate":20}"#).await;
    let mut alice = dial().await;
    assert_eq!(alice.login("alice", "phone").await, Some(0));
    let start = std::time::Instant::now();
    alice.send(&[0xC0, 0].repeat(50)).await;
    for _ in 0..50 {
        assert_eq!(alice.receive().await, Some((0xD0, Vec::new())), "each PINGREQ is answered");
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(1_400), "20 at once, the other 30 within 1.5 s: {took:?}");
    assert_ne!(running.gateway.hub.shared.metrics.throttled.get(), 0);
}

#[tokio::test]
async fn chat_over_tls() {
    let folder = std::env::temp_dir().join(format!("im-gateway-tls-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = format!(r#""tls":{{"address":"127.0.0.1:0","certFile":{cert:?},"keyFile":{key:?}}},"auth""#);
    let (running, _owner) = gateway(&PLAIN.replace("\"auth\"", &tls)).await;
    let address = running.tls.unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from(made.cert.der().to_vec())).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let connector =
        tokio_rustls::TlsConnector::from(Arc::new(config.with_root_certificates(roots).with_no_client_auth()));
    let dial = || async {
        let stream = TcpStream::connect(address).await.unwrap();
        connector.connect(ServerName::try_from("localhost").unwrap(), stream).await.unwrap()
    };
    chat(dial().await, dial().await).await;
    std::fs::remove_dir_all(&folder).unwrap();
}

#[tokio::test]
async fn who_was_away_gets_what_was_missed_in_order() {
    let (running, _owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let mut alice = Client::connect(TcpStream::connect(address).await.unwrap(), "alice", "phone").await;
    for id in 1..=200 {
        assert_eq!(alice.publish(id, "u/bob", id.to_string().as_bytes()).await.0, 0);
    }
    let mut bob = Client::connect(TcpStream::connect(address).await.unwrap(), "bob", "tablet").await;
    assert_eq!(bob.subscribe("inbox/#").await, 1);
    for id in 1..=200 {
        assert_eq!(bob.message().await.payload, id.to_string().into_bytes());
    }
}

#[tokio::test]
async fn rooms_fan_out() {
    let (running, _owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let mut viewers = Vec::new();
    for index in 0..5 {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut viewer = Client::connect(stream, &format!("viewer{index}"), "tv").await;
        assert_eq!(viewer.subscribe("r/stage").await, 0);
        viewers.push(viewer);
    }
    assert_eq!(viewers[0].subscribe("r/+").await, Reason::TopicFilterInvalid.code());
    let mut star = Client::connect(TcpStream::connect(address).await.unwrap(), "star", "mic").await;
    assert_eq!(star.publish(1, "r/stage", b"la la").await.0, 0);
    for viewer in &mut viewers {
        let message = viewer.message().await;
        assert_eq!((message.topic.as_str(), message.payload.as_slice()), ("r/stage", b"la la".as_slice()));
    }
}

#[tokio::test]
async fn a_drained_gateway_sends_its_clients_elsewhere_and_comes_back() {
    let (running, owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let mut client = Client::connect(TcpStream::connect(address).await.unwrap(), "alice", "phone").await;
    running.member.drain(100.0);
    let (first, body) = client.receive().await.expect("DISCONNECT");
    assert_eq!((first, body[0]), (0xE0, Reason::UseAnotherServer.code()));
    assert!(client.receive().await.is_none(), "and the socket closes");
    drop(client);
    eventually("drained", || running.member.is_drained()).await;
    eventually("the session is closed", || owner.closes() == 1).await;
    running.member.undrain();
    Client::connect(dial_until_taken(address).await, "alice", "phone").await;
}

async fn dial_until_taken(address: SocketAddr) -> TcpStream {
    let dial = async {
        loop {
            if let Ok(stream) = TcpStream::connect(address).await {
                return stream;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), dial).await.unwrap()
}

/// One answer over a connection that may stay open: its head in lower case, and its body.
async fn http_answer(stream: &mut TcpStream) -> (String, Vec<u8>) {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
            let length =
                head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
            if bytes.len() >= end + 4 + length {
                return (head, bytes[end + 4..end + 4 + length].to_vec());
            }
        }
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_buf(&mut bytes)).await.unwrap().unwrap();
        assert_ne!(read, 0, "the connection ended within an answer");
    }
}

#[tokio::test]
async fn a_drained_gateway_answers_http_and_asks_its_clients_to_dial_anew() {
    let (running, _owner) = gateway(PLAIN).await;
    let address = running.http.unwrap();
    let ask = "GET /v1/presence/bob HTTP/1.1\r\nhost: x\r\nauthorization: Bearer insecure:alice\r\n\r\n".as_bytes();
    let mut idle = TcpStream::connect(address).await.unwrap();
    let mut asking = TcpStream::connect(address).await.unwrap();
    for stream in [&mut idle, &mut asking] {
        stream.write_all(ask).await.unwrap();
        let (head, _) = http_answer(stream).await;
        assert!(!head.contains("connection: close"), "{head}");
    }
    // A request under way when the drain begins.
    asking.write_all(&ask[..20]).await.unwrap();
    running.member.drain(100.0);
    let refused = async {
        // The port is given up a moment after the flag.
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), refused).await.expect("nobody listens: others on this port would");
    asking.write_all(&ask[20..]).await.unwrap();
    idle.write_all(ask).await.unwrap();
    for stream in [&mut idle, &mut asking] {
        let (head, _) = http_answer(stream).await;
        assert!(head.contains("connection: close"), "{head}");
        assert_eq!(stream.read(&mut [0; 8]).await.unwrap(), 0, "and it is closed");
    }
    let mut admin = TcpStream::connect(running.admin).await.unwrap();
    admin.write_all(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let (head, body) = http_answer(&mut admin).await;
    assert!(head.contains(" 503 ") && body == b"drained\n", "{head}: its health is told all the while");
    running.member.undrain();
    let mut again = dial_until_taken(address).await;
    again.write_all(ask).await.unwrap();
    assert!(!http_answer(&mut again).await.0.contains("connection: close"));
}

#[tokio::test]
async fn a_connection_ends_with_its_token() {
    let path = std::env::temp_dir().join(format!("im-gateway-secret-{}", std::process::id()));
    let secret = "a secret of some length for the test";
    std::fs::write(&path, secret).unwrap();
    let auth = format!(r#""auth":{{"jwt":{{"keysFile":{path:?}}}}}"#);
    let (running, owner) = gateway(&PLAIN.replace(r#""auth":{"insecure":{}}"#, &auth)).await;
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let token = |exp: u64| {
        let claims = serde_json::json!({ "sub": "alice", "exp": exp });
        let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
        jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key).unwrap()
    };
    let dial = async |device: &str, exp: u64| {
        let stream = TcpStream::connect(running.mqtt.unwrap()).await.unwrap();
        Client::connect_with(stream, "alice", device, token(exp).as_bytes()).await
    };
    let mut lasting = dial("lasting", now_s + 600).await;
    let mut ending = dial("ending", now_s + 3).await;
    let (first, body) = ending.receive().await.expect("DISCONNECT");
    assert_eq!((first, body[0]), (0xE0, Reason::NotAuthorized.code()));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    assert!(now >= Duration::from_secs(now_s + 3), "not before its time");
    assert!(ending.receive().await.is_none(), "and the socket closes");
    eventually("the session is closed at its owner", || owner.closes() == 1).await;
    assert_eq!(lasting.publish(1, "u/bob", b"still here").await.0, 0);
    std::fs::remove_file(path).unwrap();
}

#[tokio::test]
async fn bytes_that_are_no_mqtt_end_in_a_reason_or_a_close() {
    let (running, _owner) = gateway(PLAIN).await;
    let address = running.mqtt.unwrap();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for _ in 0..200 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut bytes: Vec<u8> = (0..next() % 200 + 1).map(|_| next() as u8).collect();
        if next() % 2 == 0 {
            bytes[0] = 0x10;
        }
        // The gateway may close while we still write.
        let _ = stream.write_all(&bytes).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.expect("an end");
    }
    for packet in [[0x32, 0x02, 0x00, 0x01].as_slice(), &[0x00, 0x00], &[0xF0, 0x00], &[0x30, 0xFF, 0xFF, 0xFF, 0x7F]] {
        let mut client = Client::connect(TcpStream::connect(address).await.unwrap(), "alice", "phone").await;
        client.send(packet).await;
        let (first, body) = client.receive().await.expect("DISCONNECT");
        assert!(first == 0xE0 && body[0] >= 0x80, "{packet:?} {body:?}");
    }
    chat(TcpStream::connect(address).await.unwrap(), TcpStream::connect(address).await.unwrap()).await;
}

async fn ask_http(address: SocketAddr, method: &str, path: &str, token: &str, body: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer {token}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn the_json_api_takes_each_payload_that_the_limits_allow() {
    let limits = r#""limits":{"maxPayload":3000000},"auth""#;
    let (running, _owner) = gateway(&PLAIN.replace("\"auth\"", limits)).await;
    let body = format!(r#"{{"to":"bob","payloadBase64":"{}"}}"#, "AAAA".repeat(1_000_000));
    let answer = ask_http(running.http.unwrap(), "POST", "/v1/messages", "insecure:alice", &body).await;
    assert!(answer.contains("200 OK") && answer.contains("\"seq\":1"), "{answer}");
}

#[tokio::test]
async fn the_json_api_answers_and_refuses_in_problem_documents() {
    let (running, _owner) = gateway(&PLAIN.replace("\"auth\"", "\"limits\":{\"maxPayload\":1000},\"auth\"")).await;
    let ask = |method, path, token, body| ask_http(running.http.unwrap(), method, path, token, body);
    let sent = ask("POST", "/v1/messages", "insecure:alice", r#"{"to":"bob","payload":"hi","id":"m1"}"#).await;
    assert!(sent.contains("200 OK") && sent.contains("\"seq\":1"), "{sent}");
    // messages.maxPayload is below limits.maxPacketSize here, as it is everywhere.
    let post = |bytes: usize| format!(r#"{{"to":"bob","payload":"{}"}}"#, "x".repeat(bytes));
    let (largest, larger) = (post(1_000), post(1_001));
    assert!(ask("POST", "/v1/messages", "insecure:alice", &largest).await.contains("200 OK"));
    let large = ask("POST", "/v1/messages", "insecure:alice", &larger).await;
    assert!(large.contains("413 ") && large.contains("messages.maxPayload is 1000"), "{large}");
    let history = ask("GET", "/v1/conversations/u/alice/messages", "insecure:bob", "").await;
    assert!(history.contains("\"payload\":\"hi\"") && history.contains("\"from\":\"alice\""), "{history}");
    let denied = ask("POST", "/v1/messages", "insecure:alice", r#"{"group":"closed","payload":"hi"}"#).await;
    assert!(denied.contains("403 ") && denied.contains("application/problem+json"), "{denied}");
    let kick = ask("POST", "/v1/users/bob/kick", "insecure:alice", "{}").await;
    assert!(kick.contains("403 ") && kick.contains("service token"), "{kick}");
    assert!(ask("POST", "/v1/users/bob/kick", "insecure-service", "{}").await.contains("204 "));
    assert!(ask("GET", "/v1/conversations", "nonsense", "").await.contains("401 "));
    assert!(ask("POST", "/v1/messages", "insecure:alice", "{").await.contains("400 "));
    assert!(ask("GET", "/nowhere", "x", "").await.contains("404 "));
    assert!(ask("GET", "/openapi.json", "x", "").await.contains("/v1/presence/{user}"));
    assert!(ask("GET", "/readyz", "x", "").await.contains("200 OK"));
    let metrics = ask("GET", "/metrics", "x", "").await;
    assert!(metrics.contains("im_connections 0"), "{metrics}");
    for (status, count) in [(400, 1), (401, 1), (403, 2), (404, 1), (413, 1)] {
        let line = format!("im_http_refused_total{{status=\"{status}\"}} {count}\n");
        assert!(metrics.contains(&line), "no {line}{metrics}");
    }
}
