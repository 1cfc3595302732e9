//! The Prometheus client and a round of measuring against a fake of the HTTP API that gives every kind of answer. Each
//! kind is a path below which the API is served; `e2e/tests/prometheus.rs` has the real one.

use axum::Router;
use axum::body::Body;
use axum::extract::Path;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use im_crds::{BuiltIn, ImCluster, SecretKey};
use im_operator::metrics::prometheus::{ANSWER_BYTES_MAX, Answer};
use im_operator::metrics::round::Connector;
use im_operator::metrics::{Endpoint, Prometheus, PrometheusError, Request, Setup, Target, measure};
use im_operator::platform::Tier;
use std::time::Duration;
use tokio::net::TcpListener;

const JSON: (header::HeaderName, &str) = (header::CONTENT_TYPE, "application/json");

fn vector(series: &str) -> Response {
    let body = format!(r#"{{"status":"success","data":{{"resultType":"vector","result":[{series}]}}}}"#);
    ([JSON], body).into_response()
}

/// Two series of one gauge: the value and the time of its sample, asked for at 1000.
fn gauge(pod: &str, value: &str, at: &str) -> String {
    format!(
        r#"{{"metric":{{"__name__":"im_connections","pod":"{pod}","job":"im","im_what":"value"}},"value":[1000,"{value}"]}},
           {{"metric":{{"pod":"{pod}","job":"im","im_what":"at"}},"value":[1000,"{at}"]}}"#
    )
}

fn series(labels: &str, value: &str) -> String {
    format!(r#"{{"metric":{{{labels}}},"value":[1000.5,"{value}"]}}"#)
}

async fn api(Path((kind, path)): Path<(String, String)>, headers: HeaderMap, body: String) -> Response {
    let error = |status: StatusCode, kind: &str, words: &str| {
        let body = format!(r#"{{"status":"error","errorType":"{kind}","error":"{words}"}}"#);
        (status, [JSON], body).into_response()
    };
    if path == "api/v1/status/runtimeinfo" {
        return match kind.as_str() {
            "restarted" => {
                ([JSON], r#"{"status":"success","data":{"startTime":"1970-01-01T00:16:30Z"}}"#).into_response()
            }
            _ => StatusCode::NOT_FOUND.into_response(),
        };
    }
    if body.starts_with("query=time%28%29") {
        return ([JSON], r#"{"status":"success","data":{"resultType":"scalar","result":[1000,"1000"]}}"#)
            .into_response();
    }
    match kind.as_str() {
        "gauges" => {
            let pods = [gauge("g-1", "12", "998.5"), gauge("g-2", "7", "950"), gauge("g-3", "NaN", "999")];
            vector(&pods.join(","))
        }
        "pods" => vector(&[series(r#""pod":"a""#, "1"), series(r#""pod":"a","x":"y""#, "2.5")].join(",")),
        "unlabelled" => vector(&series(r#""job":"im""#, "3")),
        "nan" => vector(&[series("", "NaN"), series(r#""a":"b""#, "1")].join(",")),
        "infinite" => {
            ([JSON], r#"{"status":"success","data":{"resultType":"scalar","result":[1,"+Inf"]}}"#).into_response()
        }
        "scalar" => {
            ([JSON], r#"{"status":"success","data":{"resultType":"scalar","result":[1,"4.5"]}}"#).into_response()
        }
        "matrix" => ([JSON], r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#).into_response(),
        "string" => ([JSON], r#"{"status":"success","data":{"resultType":"string","result":[1,"a"]}}"#).into_response(),
        "empty" | "restarted" => vector(""),
        "wrong" => error(StatusCode::BAD_REQUEST, "bad_data", "parse error: unclosed left parenthesis"),
        "busy" => error(StatusCode::SERVICE_UNAVAILABLE, "timeout", "query timed out in expression evaluation"),
        "html" => ([(header::CONTENT_TYPE, "text/html")], "<html>Sign in</html>").into_response(),
        "gateway" => (StatusCode::BAD_GATEWAY, "<html>502</html>").into_response(),
        "login" => (StatusCode::FOUND, [(header::LOCATION, "/html/api/v1/query")]).into_response(),
        "other" => ([JSON], r#"{"status":"success"}"#).into_response(),
        "slow" => std::future::pending().await,
        "huge" => {
            let page = axum::body::Bytes::from(vec![b' '; 1 << 16]);
            let pages = std::iter::repeat_n(page, ANSWER_BYTES_MAX / (1 << 16) + 2);
            Body::from_stream(futures::stream::iter(pages.map(Ok::<_, std::io::Error>))).into_response()
        }
        "broken" => {
            let parts = [Ok("{"), Err(std::io::Error::other("the server dies"))];
            Body::from_stream(futures::stream::iter(parts)).into_response()
        }
        "token" => match headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()) {
            Some("Bearer open sesame") => vector(&series("", "1")),
            _ => StatusCode::UNAUTHORIZED.into_response(),
        },
        "asked" => {
            assert!(body.contains("lookback_delta=30s") && body.contains("timeout=3000ms"), "{body}");
            vector(&series("", "1"))
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn serve(router: Router) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move { axum::serve(listener, router).await });
    address.to_string()
}

async fn fake() -> String {
    format!("http://{}", serve(Router::new().route("/{kind}/{*path}", any(api))).await)
}

fn client(base: &str, kind: &str) -> Prometheus {
    Prometheus::new(&Endpoint::plain(format!("{base}/{kind}"))).expect("a client")
}

#[tokio::test]
async fn gauges_come_with_the_age_of_each_sample() {
    let base = fake().await;
    let gauges = client(&base, "gauges").gauge(BuiltIn::Connections, Some("im"), "g-").await.expect("an answer");
    let found: Vec<(&str, f64, Duration)> = gauges.iter().map(|(pod, v)| (pod.as_str(), v.value, v.age)).collect();
    // g-3 is no number, which is no data.
    assert_eq!(found, [("g-1", 12.0, Duration::from_millis(1_500)), ("g-2", 7.0, Duration::from_secs(50))]);
    let none = client(&base, "empty").gauge(BuiltIn::Connections, None, "g-").await.expect("an answer");
    assert!(none.is_empty());
}

#[tokio::test]
async fn a_query_is_a_sum_or_a_value_of_each_pod() {
    let base = fake().await;
    for (kind, expected) in
        [("pods", Some(3.5)), ("scalar", Some(4.5)), ("unlabelled", Some(3.0)), ("empty", None), ("asked", Some(1.0))]
    {
        let answer = client(&base, kind).query("work", false).await.expect(kind);
        let Answer::Total(total) = answer else { panic!("{kind}: {answer:?}") };
        assert_eq!(total.map(|total| total.value), expected, "{kind}");
    }
    let Answer::PerPod(pods) = client(&base, "pods").query("work", true).await.expect("pods") else {
        panic!("per pod")
    };
    assert_eq!(pods.iter().map(|(pod, v)| (pod.as_str(), v.value)).collect::<Vec<_>>(), [("a", 3.5)]);
}

#[tokio::test]
async fn every_failure_says_what_it_is() {
    let base = fake().await;
    let cases = [
        ("unlabelled", true, "result", "aggregate with `sum by (pod)"),
        ("scalar", true, "result", "perPod is set"),
        ("nan", false, "result", "which is no amount"),
        ("infinite", false, "result", "which is no amount"),
        ("matrix", false, "result", "avg_over_time"),
        ("string", false, "result", "can't be used"),
        ("wrong", false, "query", "unclosed left parenthesis"),
        ("busy", false, "unavailable", "query timed out"),
        ("html", false, "not prometheus", "check the URL"),
        ("other", false, "not prometheus", "has no result"),
        ("gateway", false, "status", "HTTP 502"),
        ("login", false, "status", "HTTP 302"),
        ("nowhere", false, "status", "check the path of the URL"),
        ("token", false, "status", "another token"),
        ("slow", false, "timeout", "within 3 s"),
        ("huge", false, "too large", "4 MiB"),
        ("broken", false, "unreachable", "can't be reached"),
    ];
    for (kind, per_pod, reason, words) in cases {
        let error = client(&base, kind).query("work", per_pod).await.expect_err(kind);
        assert!(error.reason() == reason && error.to_string().contains(words), "{kind}: {error} ({})", error.reason());
    }
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let error = client(&format!("http://{closed}"), "x").query("work", false).await.expect_err("nobody listens");
    assert!(error.reason() == "unreachable" && error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn the_start_of_prometheus_is_known_where_it_says_so() {
    let base = fake().await;
    assert_eq!(client(&base, "restarted").age().await, Ok(Some(Duration::from_secs(10))));
    assert_eq!(client(&base, "empty").age().await, Ok(None), "who speaks the query API only");
}

#[tokio::test]
async fn credentials_are_sent_and_nonsense_is_refused() {
    let base = fake().await;
    let endpoint = Endpoint { token: Some("open sesame".into()), ..Endpoint::plain(format!("{base}/token/")) };
    assert!(!format!("{endpoint:?}").contains("sesame"), "a token is not for logs");
    let answer = Prometheus::new(&endpoint).expect("a client").query("work", false).await;
    assert!(matches!(answer, Ok(Answer::Total(Some(_)))), "{answer:?}");
    for endpoint in [
        Endpoint { token: Some("two\nlines".into()), ..Endpoint::plain("http://p:9090") },
        Endpoint { ca_pem: Some(b"no PEM".to_vec()), ..Endpoint::plain("https://p:9090") },
        Endpoint::plain("http://[::1"),
    ] {
        let error = Prometheus::new(&endpoint).expect_err("nonsense");
        assert_eq!(error.reason(), "setup", "{error}");
    }
}

fn cluster(url: &str, token_file: Option<&str>) -> ImCluster {
    let token = token_file.map(|file| format!(", tokenFile: {file}")).unwrap_or_default();
    let yaml = format!(
        "apiVersion: imcluster.dev/v1alpha1
kind: ImCluster
metadata: {{name: chat, namespace: im}}
spec:
  auth: {{insecure: {{}}}}
  metrics: {{prometheus: {{url: '{url}'{token}}}}}
  gateway: {{autoscaling: {{maxReplicas: 9, metrics: [
    {{type: BuiltIn, builtIn: {{name: Connections, target: {{type: AverageValue, value: 100}}}}}},
    {{type: Prometheus, prometheus: {{query: work, target: {{type: Value, value: 1}}}}}}]}}}}"
    );
    ImCluster::parse_yaml(&yaml).expect("a good cluster")
}

#[tokio::test]
async fn files_are_read_where_they_are_the_users_own_only() {
    let file = std::env::temp_dir().join(format!("im-token-{}", std::process::id()));
    std::fs::write(&file, "open sesame\n").expect("a file");
    let cluster = cluster("http://p:9090", file.to_str());
    let none = |_: &SecretKey| None;
    let here = Setup { reads_files: true, ..Setup::default() };
    let endpoint = Endpoint::of(&cluster, &here, none).expect("readable").expect("one");
    assert_eq!((endpoint.url.as_str(), endpoint.token.as_deref()), ("http://p:9090", Some("open sesame")));
    let error = Endpoint::of(&cluster, &Setup::default(), none).expect_err("not in a cluster");
    assert!(error.to_string().contains("is for `imcluster up`"), "{error}");
    std::fs::remove_file(&file).expect("removable");
    let error = Endpoint::of(&cluster, &here, none).expect_err("it is gone");
    assert!(matches!(error, PrometheusError::Setup(_)) && error.to_string().contains("tokenFile"), "{error}");

    let mut plain = cluster;
    plain.spec.metrics.prometheus = None;
    let setup = Setup { prometheus: Some(Endpoint::plain("http://default:9090")), ..Setup::default() };
    assert_eq!(Endpoint::of(&plain, &setup, none), Ok(setup.prometheus.clone()));
}

#[test]
fn secrets_are_read_as_they_are_now_and_a_missing_one_is_named() {
    let mut cluster = cluster("https://p:9090", None);
    let key = |key: &str| SecretKey { name: "monitoring".into(), key: key.into() };
    if let Some(prometheus) = &mut cluster.spec.metrics.prometheus {
        (prometheus.token_secret, prometheus.ca_secret) = (Some(key("token")), Some(key("ca.crt")));
    }
    let setup = Setup::default();
    for token in ["first", "second"] {
        let known = |asked: &SecretKey| match asked.key.as_str() {
            "token" => Some(format!("{token}\n").into_bytes()),
            _ => Some(b"PEM".to_vec()),
        };
        let endpoint = Endpoint::of(&cluster, &setup, known).expect("readable").expect("one");
        assert_eq!((endpoint.token.as_deref(), endpoint.ca_pem.as_deref()), (Some(token), Some(&b"PEM"[..])));
    }
    for (lacks, field) in [("token", "tokenSecret"), ("ca.crt", "caSecret")] {
        let known = |asked: &SecretKey| (asked.key != lacks).then(Vec::new);
        let error = Endpoint::of(&cluster, &setup, known).expect_err("there is none").to_string();
        let words = format!("spec.metrics.prometheus.{field}: there is no Secret monitoring with a key {lacks}");
        assert!(error.contains(&words), "{error}");
    }
}

#[tokio::test]
async fn members_are_scraped_where_prometheus_has_nothing_fresh() {
    let base = fake().await;
    let page = Router::new().route("/metrics", any(|| async { "im_connections 33\n" }));
    let address = serve(page).await;
    let target = |name: &str| Target { name: name.into(), tier: Tier::Gateway, address: address.clone() };
    let targets: Vec<Target> = ["g-1", "g-2", "g-3", "g-4"].map(target).into();
    for (kind, scraped, gauge_is_ok) in [
        // g-1 is fresh, g-2's sample is 50 s old, g-3's is no number, g-4 is not known.
        ("gauges", &["g-2", "g-3", "g-4"][..], true),
        ("empty", &["g-1", "g-2", "g-3", "g-4"], true),
        ("html", &["g-1", "g-2", "g-3", "g-4"], false),
    ] {
        let cluster = cluster(&format!("{base}/{kind}"), None);
        let request = Request::of(&cluster, targets.clone(), Duration::from_secs(7));
        let endpoint = Endpoint::of(&cluster, &Setup::default(), |_| None);
        let round = measure(&mut Connector::default(), endpoint, &request).await;
        assert_eq!(round.direct.keys().map(String::as_str).collect::<Vec<_>>(), scraped, "{kind}");
        assert!(round.direct.values().all(|sample| sample.connections == Some(33.0)));
        let answers = round.prometheus.expect("it was asked");
        assert_eq!(answers.gauges[&(Tier::Gateway, BuiltIn::Connections)].is_ok(), gauge_is_ok, "{kind}");
        assert_eq!(answers.queries.len(), 1);
    }
    let mut direct = cluster(&base, None);
    direct.spec.metrics.prometheus = None;
    let request = Request::of(&direct, targets, Duration::ZERO);
    let round = measure(&mut Connector::default(), Ok(None), &request).await;
    assert!(round.prometheus.is_none() && round.direct.len() == 4, "{round:?}");
}
