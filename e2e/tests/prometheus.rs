//! The operator's eyes on a real Prometheus that scrapes small exporters once a second: values and their age, an exporter
//! that ends, one whose samples are old, a restart with nothing stored.

mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use im_crds::{BuiltIn, ImCluster, Scaling};
use im_operator::autoscale::{self, Decision, History, Member, MemberState, MetricState};
use im_operator::metrics::prometheus::Answer;
use im_operator::metrics::round::Connector;
use im_operator::metrics::{Endpoint, Prometheus, Request, Setup, Signals, Target, measure};
use im_operator::platform::Tier;
use support::{TestResult, eventually, free_ports};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// A scrape, an evaluation and a busy machine.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// Answers every request with the page; ends with its drop.
struct Exporter {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Exporter {
    async fn start(page: String) -> TestResult<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let mut read = 0;
                while read < request.len() && !request[..read].ends_with(b"\r\n\r\n") {
                    match stream.read(&mut request[read..]).await {
                        Ok(more) if more > 0 => read += more,
                        _ => break,
                    }
                }
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\nconnection: close";
                let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{page}", page.len());
                // Who hung up asks again.
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Ok(Self { address, task })
    }
}

impl Drop for Exporter {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A Prometheus of one's own; ends with its drop.
struct Server {
    child: Child,
    folder: temporary::Folder,
    port: u16,
}

/// A folder that goes with its owner.
mod temporary {
    use std::path::PathBuf;

    pub struct Folder(pub PathBuf);

    impl Folder {
        pub fn new(name: &str) -> std::io::Result<Self> {
            let path = std::env::temp_dir().join(format!("im-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path)?;
            Ok(Self(path))
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

impl Server {
    /// Scrapes each target as the pod of that name.
    fn start(pods: &[(&str, SocketAddr)]) -> TestResult<Self> {
        let folder = temporary::Folder::new("prometheus")?;
        let mut config =
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n- job_name: im\n  static_configs:\n"
                .to_owned();
        for (pod, address) in pods {
            writeln!(config, "  - {{targets: ['{address}'], labels: {{namespace: im, pod: {pod}}}}}")?;
        }
        std::fs::write(folder.0.join("prometheus.yml"), config)?;
        let [port, ..] = free_ports()?;
        let child = Self::spawn(&folder.0, port)?;
        Ok(Self { child, folder, port })
    }

    fn spawn(folder: &Path, port: u16) -> TestResult<Child> {
        let log = std::fs::File::create(folder.join("log"))?;
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        Ok(child
            .map_err(|error| format!("prometheus can't be started ({error}): run e2e/setup.sh, which installs it"))?)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    async fn wait_ready(&self) -> TestResult<Prometheus> {
        let client = Prometheus::new(&Endpoint::plain(self.url()))?;
        eventually("prometheus answers", SEEN_WITHIN, async || client.age().await.ok()).await?;
        Ok(client)
    }

    /// Ends it and starts it again with nothing stored.
    async fn restart_empty(&mut self) -> TestResult<Prometheus> {
        self.child.kill()?;
        self.child.wait()?;
        std::fs::remove_dir_all(self.folder.0.join("data"))?;
        self.child = Self::spawn(&self.folder.0, self.port)?;
        self.wait_ready().await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn page(connections: u32) -> String {
    format!("# TYPE im_connections gauge\nim_connections {connections}\n# TYPE im_cpu_cores gauge\nim_cpu_cores 0.5\n")
}

fn cluster(url: &str) -> TestResult<ImCluster> {
    let yaml = format!(
        "apiVersion: imcluster.dev/v1alpha1
kind: ImCluster
metadata: {{name: chat, namespace: im}}
spec:
  auth: {{insecure: {{}}}}
  metrics: {{prometheus: {{url: '{url}'}}}}
  gateway: {{autoscaling: {{maxReplicas: 9, metrics: [
    {{type: BuiltIn, builtIn: {{name: Connections, target: {{type: AverageValue, value: 100}}}}}},
    {{type: Prometheus, prometheus: {{query: 'sum(im_connections{{pod=~\"chat-.*\"}})', target: {{type: AverageValue, value: 100}}}}}}]}}}}"
    );
    Ok(ImCluster::parse_yaml(&yaml)?)
}

/// The operator's look at two gateways that it can't scrape itself.
async fn decide(cluster: &ImCluster) -> TestResult<Decision> {
    let names = ["chat-gateway-a", "chat-gateway-b"];
    let target = |name: &str| Target { name: name.into(), tier: Tier::Gateway, address: String::new() };
    let now = Duration::from_secs(100_000);
    let request = Request::of(cluster, names.map(target).into(), now);
    let endpoint = Endpoint::of(cluster, &Setup::default(), |_| None);
    let round = measure(&mut Connector::default(), endpoint, &request).await;
    let mut signals = Signals::default();
    signals.absorb("now", &names.map(String::from).into(), round);
    let Scaling::Auto(spec) = cluster.spec.gateway.scaling() else { return Err("it scales".into()) };
    let members = names.map(|name| Member { name: name.into(), state: MemberState::Ready });
    let readings: Vec<_> =
        spec.metrics.iter().map(|metric| signals.reading(Tier::Gateway, &members, metric, 1.0)).collect();
    let input = autoscale::Input { now, spec, members: &members, ordered: 0, readings: &readings };
    Ok(autoscale::decide(&input, History::default()).0)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_prometheus_says_and_when_it_is_not_to_be_believed() -> TestResult {
    let first = Exporter::start(page(250)).await?;
    let second = Exporter::start(page(150)).await?;
    // Samples with a time of their own get no staleness marker: only `timestamp()` shows that they are old.
    let long_ago = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)? - Duration::from_secs(60);
    let late = Exporter::start(format!("im_connections 7 {}\n", long_ago.as_millis())).await?;
    let pods =
        [("chat-gateway-a", first.address), ("chat-gateway-b", second.address), ("late-gateway-a", late.address)];
    let mut server = Server::start(&pods)?;
    let prometheus = server.wait_ready().await?;
    let cluster = cluster(&server.url())?;
    let gauge = async |prefix: &str| prometheus.gauge(BuiltIn::Connections, Some("im"), prefix).await;

    let both = eventually("both gateways were scraped", SEEN_WITHIN, async || {
        gauge("chat-gateway-").await.ok().filter(|pods| pods.len() == 2)
    });
    let both = both.await?;
    let values: BTreeMap<&str, f64> = both.iter().map(|(pod, aged)| (pod.as_str(), aged.value)).collect();
    assert_eq!(values, BTreeMap::from([("chat-gateway-a", 250.0), ("chat-gateway-b", 150.0)]));
    assert!(both.values().all(|aged| aged.age < autoscale::SAMPLE_AGE_MAX), "{both:?}");
    let cores = prometheus.gauge(BuiltIn::CpuUtilization, Some("im"), "chat-gateway-a").await?;
    assert_eq!(cores.values().map(|aged| aged.value).collect::<Vec<_>>(), [0.5]);
    assert!(prometheus.gauge(BuiltIn::Connections, Some("elsewhere"), "chat-").await?.is_empty());

    let late = eventually("the late one was scraped", SEEN_WITHIN, async || gauge("late-").await.ok()?.pop_first());
    let (_, aged) = late.await?;
    assert!(aged.value == 7.0 && aged.age >= Duration::from_secs(55), "{aged:?}");

    let total = prometheus.query("sum(im_connections{pod=~'chat-.*'})", false).await?;
    assert!(matches!(total, Answer::Total(Some(total)) if total.value == 400.0), "{total:?}");
    let Answer::PerPod(each) = prometheus.query("sum by (pod) (im_connections{pod=~'chat-.*'})", true).await? else {
        return Err("perPod gives a value for each".into());
    };
    assert_eq!(each.len(), 2);
    assert_eq!(prometheus.query("absent_metric", false).await?, Answer::Total(None));
    for (query, reason) in
        [("sum((", "query"), ("0/0", "result"), ("'text'", "result"), ("im_connections[1m]", "result")]
    {
        let error = prometheus.query(query, false).await.expect_err(query);
        assert_eq!(error.reason(), reason, "{error}");
    }

    let decision = decide(&cluster).await?;
    assert_eq!(decision.replicas, 4, "{decision:#?}");
    assert_eq!(decision.metrics, [MetricState::Fresh, MetricState::Settling], "this Prometheus is young");
    assert!(decision.because[0].ends_with("from Prometheus"), "{decision:#?}");

    // An exporter ends: its series ends with the next scrape, not five minutes later.
    drop(second);
    let gone = eventually("the one that ended has no value", SEEN_WITHIN, async || {
        gauge("chat-gateway-").await.ok().filter(|pods| pods.len() == 1)
    });
    assert!(gone.await?.contains_key("chat-gateway-a"));
    let decision = decide(&cluster).await?;
    assert_eq!(decision.metrics[0], MetricState::Partial { fresh: 1, ready: 2 }, "{decision:#?}");
    assert!(decision.replicas >= 2);

    // Prometheus comes back with nothing, and there is nothing to scrape.
    drop(first);
    let restarted = server.restart_empty().await?;
    let age = restarted.age().await?.ok_or("this one says when it started")?;
    assert!(age < SEEN_WITHIN, "{age:?}");
    let decision = decide(&cluster).await?;
    assert_eq!(decision.metrics[0], MetricState::EmptyAfterRestart, "{decision:#?}");
    assert_eq!(decision.replicas, 2, "{decision:#?}");

    // And away.
    drop(server);
    let decision = decide(&cluster).await?;
    assert_eq!((decision.replicas, &decision.metrics[..]), (2, &[MetricState::NoData; 2][..]));
    assert!(decision.because[1].contains("Prometheus can't be reached"), "{decision:#?}");
    Ok(())
}
