//! The schema's bounds and CEL rules once more in Rust, for `imcluster up`.
//!
//! `tests/rules.rs` runs both over the same objects.

use crate::{
    Auth, Autoscaling, Behavior, BuiltIn, BuiltInMetric, ClientService, ImCluster, JwtAuth, Metric, PodSettings,
    Postgres, Prometheus, PrometheusMetric, Quantity, QueryTargetType, Scaling, ScalingRules, SecretKey, ServiceType,
    Storage, TargetType, TlsListener, Violation,
};
use k8s_openapi::api::core::v1::Affinity;
use std::net::SocketAddr;
use std::ops::RangeInclusive;

/// Collects violations, each at the path of its field.
#[derive(Default)]
struct Checker {
    violations: Vec<Violation>,
}

impl Checker {
    fn refuse(&mut self, path: impl Into<String>, reason: impl Into<String>) {
        self.violations.push(Violation { path: path.into(), reason: reason.into() });
    }

    fn require(&mut self, holds: bool, path: &str, reason: &str) {
        if !holds {
            self.refuse(path, reason);
        }
    }

    fn within<T: PartialOrd + std::fmt::Display>(
        &mut self,
        path: impl Into<String>,
        value: T,
        range: RangeInclusive<T>,
    ) {
        if !range.contains(&value) {
            self.refuse(path, format!("is {value}, must be from {} to {}", range.start(), range.end()));
        }
    }

    fn filled(&mut self, path: &str, value: Option<&str>) {
        if value == Some("") {
            self.refuse(path, "is empty: fill it in, or remove it");
        }
    }

    fn secret(&mut self, path: &str, secret: Option<&SecretKey>) {
        if let Some(SecretKey { name, key }) = secret {
            self.filled(&format!("{path}.name"), Some(name));
            self.filled(&format!("{path}.key"), Some(key));
        }
    }

    fn quantity(&mut self, path: &str, quantity: &Quantity) {
        if !quantity.is_valid() {
            self.refuse(path, format!("`{}` is not an amount: write for example 500m, 2 or 1Gi", quantity.0));
        }
    }

    fn address(&mut self, path: &str, value: &str) {
        if value.parse::<SocketAddr>().is_err() {
            self.refuse(path, "write IP:PORT, for example 127.0.0.1:1883 or [::1]:1883");
        }
    }
}

impl ImCluster {
    /// Every rule that this object breaks by itself; empty if it can be applied.
    pub fn validate(&self) -> Vec<Violation> {
        let mut checker = Checker::default();
        let spec = &self.spec;
        match &spec.auth {
            Auth::Insecure(_) => {}
            Auth::Jwt(jwt) => check_jwt(&mut checker, jwt),
        }
        checker.filled("spec.image", spec.image.as_deref());
        checker.filled("spec.serviceTokenFile", spec.service_token_file.as_deref());
        checker.secret("spec.serviceTokenSecret", spec.service_token_secret.as_ref());
        checker.require(
            spec.service_token_file.is_none() || spec.service_token_secret.is_none(),
            "spec",
            "set at most one of: serviceTokenFile, serviceTokenSecret",
        );
        check_access(&mut checker, self);
        match &spec.storage {
            Storage::Embedded(embedded) => {
                checker.quantity("spec.storage.embedded.size", &embedded.size);
                check_pod(&mut checker, "spec.storage.embedded.pod", &embedded.pod);
            }
            Storage::Postgres(postgres) => check_postgres(&mut checker, postgres),
        }
        check_gateway(&mut checker, self);
        check_business(&mut checker, self);
        if let Some(prometheus) = &spec.metrics.prometheus {
            check_prometheus(&mut checker, prometheus);
        }
        let messages = &spec.messages;
        checker.within("spec.messages.catchUp", messages.catch_up, 1..=100_000);
        checker.within("spec.messages.maxPayload", messages.max_payload, 1..=16_777_216);
        checker.within("spec.messages.rooms.history", messages.rooms.history, 0..=50);
        checker.require(
            messages.max_payload < spec.gateway.limits.max_packet_size,
            "spec",
            "messages.maxPayload must be below gateway.limits.maxPacketSize: raise maxPacketSize, or the largest message never fits into a packet",
        );
        checker.violations
    }

    /// Every rule that this object breaks as the successor of `old`: its own rules and those about change.
    pub fn validate_update(&self, old: &Self) -> Vec<Violation> {
        let mut checker = Checker { violations: self.validate() };
        checker.require(
            self.spec.business.shards == old.spec.business.shards,
            "spec.business.shards",
            "shards can't change, every stored message lies by it: make a new ImCluster instead",
        );
        let embedded = |cluster: &Self| matches!(cluster.spec.storage, Storage::Embedded(_));
        checker.require(
            embedded(self) == embedded(old),
            "spec",
            "storage can't change its kind, every stored message would stay behind: make a new ImCluster instead",
        );
        if let (Storage::Embedded(new), Storage::Embedded(old)) = (&self.spec.storage, &old.spec.storage) {
            checker.require(
                (&new.size, &new.storage_class_name) == (&old.size, &old.storage_class_name),
                "spec.storage.embedded",
                "size and storageClassName of the store's volume can't change: resize its PersistentVolumeClaim instead",
            );
        }
        checker.violations
    }

    /// Every rule that this object breaks only at that place; empty if it can run there.
    pub fn validate_at(&self, place: Place) -> Vec<Violation> {
        let mut checker = Checker::default();
        let spec = &self.spec;
        let mut fields: Vec<(&str, bool, &str)> = vec![
            ("spec.serviceTokenFile", spec.service_token_file.is_some(), "serviceTokenSecret"),
            ("spec.serviceTokenSecret", spec.service_token_secret.is_some(), "serviceTokenFile"),
        ];
        if let Auth::Jwt(jwt) = &spec.auth {
            fields.extend([
                ("spec.auth.jwt.keysFile", jwt.keys_file.is_some(), "keysSecret"),
                ("spec.auth.jwt.keysSecret", jwt.keys_secret.is_some(), "keysFile"),
                ("spec.auth.jwt.jwksFile", jwt.jwks_file.is_some(), "jwksSecret"),
                ("spec.auth.jwt.jwksSecret", jwt.jwks_secret.is_some(), "jwksFile"),
            ]);
        }
        if let Some(tls) = &spec.access.tls {
            fields.extend([
                ("spec.access.tls.certFile", tls.cert_file.is_some(), "secretName"),
                ("spec.access.tls.secretName", tls.secret_name.is_some(), "certFile and keyFile"),
            ]);
        }
        if let Storage::Postgres(postgres) = &spec.storage {
            fields.extend([
                ("spec.storage.postgres.urlFile", postgres.url_file.is_some(), "urlSecret"),
                ("spec.storage.postgres.urlSecret", postgres.url_secret.is_some(), "urlFile"),
                ("spec.storage.postgres.caFile", postgres.ca_file.is_some(), "caSecret"),
                ("spec.storage.postgres.caSecret", postgres.ca_secret.is_some(), "caFile"),
            ]);
        }
        for (path, present, instead) in fields.into_iter().filter(|(_, present, _)| *present) {
            let is_file = path.ends_with("File");
            match place {
                Place::Kubernetes if is_file && present => {
                    checker
                        .refuse(path, format!("a pod does not have this file: put it into a Secret and use {instead}"));
                }
                Place::Machine if !is_file && present => {
                    checker.refuse(path, format!("there are no Secrets without Kubernetes: use {instead}"));
                }
                Place::Kubernetes | Place::Machine => {}
            }
        }
        if let Some(prometheus) = &spec.metrics.prometheus {
            let path = "spec.metrics.prometheus";
            for (field, file, secret) in [
                ("token", prometheus.token_file.is_some(), prometheus.token_secret.is_some()),
                ("ca", prometheus.ca_file.is_some(), prometheus.ca_secret.is_some()),
            ] {
                if place == Place::Kubernetes && file {
                    let reason =
                        format!("the operator reads no files for others: put it into a Secret and use {field}Secret");
                    checker.refuse(format!("{path}.{field}File"), reason);
                }
                if place == Place::Machine && secret {
                    let reason = format!("there are no Secrets without Kubernetes: use {field}File");
                    checker.refuse(format!("{path}.{field}Secret"), reason);
                }
            }
        }
        if place == Place::Kubernetes {
            check_cpu_request(&mut checker, "spec.gateway", spec.gateway.scaling(), &spec.gateway.pod);
            check_cpu_request(&mut checker, "spec.business", spec.business.scaling(), &spec.business.pod);
            check_name(&mut checker, self);
            check_ports(&mut checker, self);
        }
        checker.violations
    }
}

/// Where an ImCluster is to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// As pods.
    Kubernetes,
    /// As processes of `imcluster up`.
    Machine,
}

/// The longest name of an ImCluster: with tier, template and what Kubernetes appends, a pod's name is then at most 63
/// characters long.
const NAME_CHARS_MAX: usize = 28;
/// What every member listens on for the operator, Prometheus and probes.
const ADMIN_PORT: u16 = 9090;

/// As for a HorizontalPodAutoscaler: utilization is a part of the request, so there has to be one.
fn check_cpu_request(checker: &mut Checker, tier: &str, scaling: Scaling<'_>, pod: &PodSettings) {
    let Scaling::Auto(autoscaling) = scaling else { return };
    let by_cpu = autoscaling
        .metrics
        .iter()
        .any(|metric| matches!(metric, Metric::BuiltIn(BuiltInMetric { name: BuiltIn::CpuUtilization, .. })));
    if by_cpu && !pod.cpu_request().is_some_and(|cores| cores > 0.0) {
        checker.refuse(
            format!("{tier}.autoscaling.metrics"),
            format!(
                "CpuUtilization, the default metric too, is a percentage of the CPU request, and there is none: set {tier}.pod.resources.requests.cpu, for example 500m, or use another metric"
            ),
        );
    }
}

fn check_name(checker: &mut Checker, cluster: &ImCluster) {
    let name = cluster.metadata.name.as_deref().unwrap_or_default();
    let label = name.starts_with(|c: char| c.is_ascii_lowercase())
        && !name.ends_with('-')
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if !label || name.len() > NAME_CHARS_MAX {
        checker.refuse(
            "metadata.name",
            format!(
                "use at most {NAME_CHARS_MAX} of a-z, 0-9 and -, a letter first and no - last: Services and pods are named by it"
            ),
        );
    }
}

/// In a pod every listener takes all addresses, so that only ports tell them apart.
fn check_ports(checker: &mut Checker, cluster: &ImCluster) {
    let access = &cluster.spec.access;
    let mut taken = vec![("the metrics".to_owned(), ADMIN_PORT)];
    for (field, address) in [
        ("mqtt", access.mqtt.as_ref().map(|listener| &listener.address)),
        ("tls", access.tls.as_ref().map(|listener| &listener.address)),
        ("webSocket", access.web_socket.as_ref().map(|listener| &listener.address)),
        ("http", Some(&access.http.address)),
    ] {
        let Some(address) = address.and_then(|address| address.parse::<SocketAddr>().ok()) else { continue };
        let path = format!("spec.access.{field}.address");
        let port = address.port();
        match taken.iter().find(|(_, other)| *other == port) {
            _ if port == 0 => checker.refuse(path, "port 0 can't be found from outside of the pod: choose one"),
            Some((other, _)) => checker.refuse(path, format!("port {port} is that of {other}: use another one")),
            None => taken.push((field.to_owned(), port)),
        }
    }
}

fn check_service(checker: &mut Checker, service: &ClientService) {
    let balanced = service.kind == ServiceType::LoadBalancer;
    checker.within("spec.access.service.vips", service.vips, 1..=16);
    checker.filled("spec.access.service.loadBalancerClass", service.load_balancer_class.as_deref());
    checker.require(
        balanced || service.vips == 1,
        "spec.access.service",
        "more than one address needs load balancers: set type to LoadBalancer, or vips to 1",
    );
    checker.require(
        balanced || service.load_balancer_class.is_none(),
        "spec.access.service",
        "loadBalancerClass needs type LoadBalancer: set it, or remove loadBalancerClass",
    );
}

fn check_pod(checker: &mut Checker, path: &str, pod: &PodSettings) {
    for (field, amounts) in pod.resources.iter().flat_map(|r| [("requests", &r.requests), ("limits", &r.limits)]) {
        for (name, amount) in amounts {
            checker.quantity(&format!("{path}.resources.{field}.{name}"), amount);
        }
    }
    if let Some(affinity) = &pod.affinity
        && let Err(error) = serde_json::from_value::<Affinity>(affinity.clone())
    {
        checker.refuse(format!("{path}.affinity"), format!("is not a pod's affinity: {error}"));
    }
    for (field, keys) in [("labels", &pod.labels), ("annotations", &pod.annotations)] {
        for key in keys.keys().filter(|key| key.starts_with("imcluster.dev/")) {
            checker.refuse(format!("{path}.{field}"), format!("`{key}` is the operator's own: remove it"));
        }
    }
}

fn check_jwt(checker: &mut Checker, jwt: &JwtAuth) {
    checker.filled("spec.auth.jwt.keysFile", jwt.keys_file.as_deref());
    checker.filled("spec.auth.jwt.jwksFile", jwt.jwks_file.as_deref());
    checker.filled("spec.auth.jwt.audience", jwt.audience.as_deref());
    checker.filled("spec.auth.jwt.issuer", jwt.issuer.as_deref());
    checker.secret("spec.auth.jwt.keysSecret", jwt.keys_secret.as_ref());
    checker.secret("spec.auth.jwt.jwksSecret", jwt.jwks_secret.as_ref());
    let ways = [jwt.keys_file.is_some(), jwt.jwks_file.is_some(), jwt.keys_secret.is_some(), jwt.jwks_secret.is_some()];
    let one = ways.into_iter().filter(|present| *present).count() == 1;
    checker.require(one, "spec.auth.jwt", "set exactly one of: jwksFile, jwksSecret, keysFile, keysSecret");
}

fn check_postgres(checker: &mut Checker, postgres: &Postgres) {
    checker.filled("spec.storage.postgres.url", postgres.url.as_deref());
    checker.filled("spec.storage.postgres.urlFile", postgres.url_file.as_deref());
    checker.secret("spec.storage.postgres.urlSecret", postgres.url_secret.as_ref());
    let ways = [postgres.url.is_some(), postgres.url_file.is_some(), postgres.url_secret.is_some()];
    let one = ways.into_iter().filter(|present| *present).count() == 1;
    checker.require(one, "spec.storage.postgres", "set exactly one of: url, urlFile, urlSecret");
    check_file_or_secret(checker, "spec.storage.postgres", "ca", &postgres.ca_file, &postgres.ca_secret);
}

fn check_access(checker: &mut Checker, cluster: &ImCluster) {
    let access = &cluster.spec.access;
    if let Some(mqtt) = &access.mqtt {
        checker.address("spec.access.mqtt.address", &mqtt.address);
    }
    if let Some(tls) = &access.tls {
        checker.address("spec.access.tls.address", &tls.address);
        check_certificate(checker, tls);
    }
    if let Some(web_socket) = &access.web_socket {
        checker.address("spec.access.webSocket.address", &web_socket.address);
    }
    checker.address("spec.access.http.address", &access.http.address);
    check_service(checker, &access.service);
    checker.require(
        access.mqtt.is_some() || access.tls.is_some() || access.web_socket.is_some(),
        "spec.access",
        "no client could connect: set at least one of mqtt, tls, webSocket",
    );
    let addresses = [
        access.mqtt.as_ref().map(|listener| &listener.address),
        access.tls.as_ref().map(|listener| &listener.address),
        access.web_socket.as_ref().map(|listener| &listener.address),
        Some(&access.http.address),
    ];
    let addresses: Vec<&String> = addresses.into_iter().flatten().collect();
    let distinct = addresses.iter().enumerate().all(|(i, address)| !addresses[..i].contains(address));
    checker.require(distinct, "spec.access", "two listeners have the same address: give each its own port");
}

fn check_certificate(checker: &mut Checker, tls: &TlsListener) {
    checker.filled("spec.access.tls.certFile", tls.cert_file.as_deref());
    checker.filled("spec.access.tls.keyFile", tls.key_file.as_deref());
    checker.filled("spec.access.tls.secretName", tls.secret_name.as_deref());
    let files = tls.cert_file.is_some();
    checker.require(
        files == tls.key_file.is_some() && files != tls.secret_name.is_some(),
        "spec.access.tls",
        "set either certFile and keyFile, or secretName",
    );
}

fn check_gateway(checker: &mut Checker, cluster: &ImCluster) {
    let gateway = &cluster.spec.gateway;
    check_scaling(checker, "spec.gateway", gateway.replicas, gateway.scaling());
    let limits = &gateway.limits;
    for (field, value, range) in [
        ("maxConnections", limits.max_connections, 1..=1_000_000),
        ("connectRate", limits.connect_rate, 1..=1_000_000),
        ("maxHandshakes", limits.max_handshakes, 1..=1_000_000),
        ("receiveMaximum", u32::from(limits.receive_maximum), 1..=1_024),
        ("maxPacketSize", limits.max_packet_size, 1_024..=16_777_216),
        ("messageRate", limits.message_rate, 1..=1_000_000),
        ("sendBufferBytes", limits.send_buffer_bytes, 4_096..=67_108_864),
    ] {
        checker.within(format!("spec.gateway.limits.{field}"), value, range);
    }
    checker.within("spec.gateway.drain.rate", gateway.drain.rate, 1..=1_000_000);
    checker.within("spec.gateway.surge", gateway.surge, 1..=1_000);
    check_pod(checker, "spec.gateway.pod", &gateway.pod);
}

fn check_business(checker: &mut Checker, cluster: &ImCluster) {
    let business = &cluster.spec.business;
    checker.within("spec.business.shards", business.shards, 1..=16_384);
    check_scaling(checker, "spec.business", business.replicas, business.scaling());
    let no_connections = match business.scaling() {
        Scaling::Fixed(_) => true,
        Scaling::Auto(auto) => auto
            .metrics
            .iter()
            .all(|metric| !matches!(metric, Metric::BuiltIn(BuiltInMetric { name: BuiltIn::Connections, .. }))),
    };
    checker.require(
        no_connections,
        "spec.business",
        "business members hold no client connections: use MessagesPerSecond or CpuUtilization",
    );
    let rebalance = &business.rebalance;
    checker.within("spec.business.rebalance.movesInFlight", rebalance.moves_in_flight, 1..=16_384);
    checker.within("spec.business.rebalance.movesPerRound", rebalance.moves_per_round, 1..=16_384);
    checker.within("spec.business.rebalance.tolerance", rebalance.tolerance, 0.0..=1.0);
    checker.within("spec.business.surge", business.surge, 1..=1_000);
    check_pod(checker, "spec.business.pod", &business.pod);
}

fn check_scaling(checker: &mut Checker, tier: &str, replicas: Option<u32>, scaling: Scaling<'_>) {
    if let Some(replicas) = replicas {
        checker.within(format!("{tier}.replicas"), replicas, 1..=1_000);
    }
    if let Scaling::Auto(autoscaling) = scaling {
        if replicas.is_some() {
            checker.refuse(tier, "replicas and autoscaling exclude each other: remove one of them");
        }
        check_autoscaling(checker, &format!("{tier}.autoscaling"), autoscaling);
    }
}

fn check_autoscaling(checker: &mut Checker, path: &str, autoscaling: &Autoscaling) {
    checker.within(format!("{path}.minReplicas"), autoscaling.min_replicas, 1..=1_000);
    checker.within(format!("{path}.maxReplicas"), autoscaling.max_replicas, 1..=1_000);
    checker.require(
        autoscaling.min_replicas <= autoscaling.max_replicas,
        path,
        "minReplicas must not be above maxReplicas: lower minReplicas or raise maxReplicas",
    );
    checker.within(format!("{path}.tolerance"), autoscaling.tolerance, 0.0..=1.0);
    let metrics = autoscaling.metrics.len();
    checker.require((1..=16).contains(&metrics), &format!("{path}.metrics"), "list from 1 to 16 metrics");
    for (i, metric) in autoscaling.metrics.iter().enumerate() {
        let path = format!("{path}.metrics[{i}]");
        match metric {
            Metric::BuiltIn(metric) => check_built_in(checker, &format!("{path}.builtIn"), metric),
            Metric::Prometheus(metric) => check_query(checker, &format!("{path}.prometheus"), metric),
        }
    }
    let Behavior { scale_up, scale_down } = &autoscaling.behavior;
    check_rules(checker, &format!("{path}.behavior.scaleUp"), scale_up);
    check_rules(checker, &format!("{path}.behavior.scaleDown"), scale_down);
}

fn check_built_in(checker: &mut Checker, path: &str, metric: &BuiltInMetric) {
    checker.within(format!("{path}.target.value"), metric.target.value, 1..=u32::MAX);
    checker.require(
        (metric.name == BuiltIn::CpuUtilization) == (metric.target.kind == TargetType::Utilization),
        path,
        "CpuUtilization takes a target of type Utilization (percent), every other metric one of type AverageValue",
    );
}

fn check_query(checker: &mut Checker, path: &str, metric: &PrometheusMetric) {
    checker.filled(&format!("{path}.query"), Some(&metric.query));
    let length = metric.query.chars().count();
    checker.require(
        length <= 4_096,
        &format!("{path}.query"),
        "is longer than 4096 characters: make it a recording rule",
    );
    checker.within(format!("{path}.target.value"), metric.target.value, 0.001..=1e15);
    checker.require(
        !metric.per_pod || metric.target.kind == QueryTargetType::AverageValue,
        path,
        "perPod takes a target of type AverageValue: Value is for one number of the whole tier",
    );
}

fn check_prometheus(checker: &mut Checker, prometheus: &Prometheus) {
    let path = "spec.metrics.prometheus";
    let rest = prometheus.url.strip_prefix("https://").or_else(|| prometheus.url.strip_prefix("http://"));
    checker.require(
        rest.is_some_and(|rest| !rest.starts_with('/') && !rest.is_empty() && !rest.contains([' ', '?', '#'])),
        &format!("{path}.url"),
        "write http://HOST[:PORT][/PATH] or https://…, for example http://prometheus.monitoring:9090",
    );
    checker.require(prometheus.url.chars().count() <= 2_048, &format!("{path}.url"), "is longer than 2048 characters");
    check_file_or_secret(checker, path, "token", &prometheus.token_file, &prometheus.token_secret);
    check_file_or_secret(checker, path, "ca", &prometheus.ca_file, &prometheus.ca_secret);
}

/// What is given as `{what}File` or, on Kubernetes, as `{what}Secret`, if at all.
fn check_file_or_secret(
    checker: &mut Checker,
    path: &str,
    what: &str,
    file: &Option<String>,
    secret: &Option<SecretKey>,
) {
    checker.filled(&format!("{path}.{what}File"), file.as_deref());
    checker.secret(&format!("{path}.{what}Secret"), secret.as_ref());
    let both = file.is_some() && secret.is_some();
    checker.require(!both, path, &format!("set at most one of: {what}File, {what}Secret"));
}

fn check_rules(checker: &mut Checker, path: &str, rules: &ScalingRules) {
    if let Some(window) = rules.stabilization_window_seconds {
        checker.within(format!("{path}.stabilizationWindowSeconds"), window, 0..=3_600);
    }
    checker.require(rules.policies.len() <= 16, &format!("{path}.policies"), "list at most 16 policies");
    for (i, policy) in rules.policies.iter().enumerate() {
        checker.within(format!("{path}.policies[{i}].value"), policy.value, 1..=1_000_000);
        checker.within(format!("{path}.policies[{i}].periodSeconds"), policy.period_seconds, 1..=1_800);
    }
}
