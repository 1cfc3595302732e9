//! The schema's bounds and CEL rules once more in Rust, for `imcluster up`.
//!
//! `tests/rules.rs` runs both over the same objects.

use crate::{
    Auth, Autoscaling, Behavior, BuiltIn, ImCluster, JwtAuth, Postgres, Scaling, ScalingRules, Storage, TargetType,
    Violation,
};
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
        checker.filled("spec.serviceTokenFile", spec.service_token_file.as_deref());
        check_access(&mut checker, self);
        match &spec.storage {
            Storage::Embedded(_) => {}
            Storage::Postgres(postgres) => check_postgres(&mut checker, postgres),
        }
        check_gateway(&mut checker, self);
        check_business(&mut checker, self);
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
        checker.violations
    }
}

fn check_jwt(checker: &mut Checker, jwt: &JwtAuth) {
    checker.filled("spec.auth.jwt.keysFile", jwt.keys_file.as_deref());
    checker.filled("spec.auth.jwt.jwksFile", jwt.jwks_file.as_deref());
    checker.filled("spec.auth.jwt.audience", jwt.audience.as_deref());
    checker.filled("spec.auth.jwt.issuer", jwt.issuer.as_deref());
    let one = jwt.keys_file.is_some() != jwt.jwks_file.is_some();
    checker.require(one, "spec.auth.jwt", "set exactly one of: jwksFile, keysFile");
}

fn check_postgres(checker: &mut Checker, postgres: &Postgres) {
    checker.filled("spec.storage.postgres.url", postgres.url.as_deref());
    checker.filled("spec.storage.postgres.urlFile", postgres.url_file.as_deref());
    let one = postgres.url.is_some() != postgres.url_file.is_some();
    checker.require(one, "spec.storage.postgres", "set exactly one of: url, urlFile");
}

fn check_access(checker: &mut Checker, cluster: &ImCluster) {
    let access = &cluster.spec.access;
    if let Some(mqtt) = &access.mqtt {
        checker.address("spec.access.mqtt.address", &mqtt.address);
    }
    if let Some(tls) = &access.tls {
        checker.address("spec.access.tls.address", &tls.address);
        checker.filled("spec.access.tls.certFile", Some(&tls.cert_file));
        checker.filled("spec.access.tls.keyFile", Some(&tls.key_file));
    }
    if let Some(web_socket) = &access.web_socket {
        checker.address("spec.access.webSocket.address", &web_socket.address);
    }
    checker.address("spec.access.http.address", &access.http.address);
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
}

fn check_business(checker: &mut Checker, cluster: &ImCluster) {
    let business = &cluster.spec.business;
    checker.within("spec.business.shards", business.shards, 1..=16_384);
    check_scaling(checker, "spec.business", business.replicas, business.scaling());
    let no_connections = match business.scaling() {
        Scaling::Fixed(_) => true,
        Scaling::Auto(auto) => auto.metrics.iter().all(|metric| metric.built_in.name != BuiltIn::Connections),
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
        let path = format!("{path}.metrics[{i}].builtIn");
        let target = metric.built_in.target;
        checker.within(format!("{path}.target.value"), target.value, 1..=u32::MAX);
        checker.require(
            (metric.built_in.name == BuiltIn::CpuUtilization) == (target.kind == TargetType::Utilization),
            &path,
            "CpuUtilization takes a target of type Utilization (percent), every other metric one of type AverageValue",
        );
    }
    let Behavior { scale_up, scale_down } = &autoscaling.behavior;
    check_rules(checker, &format!("{path}.behavior.scaleUp"), scale_up);
    check_rules(checker, &format!("{path}.behavior.scaleDown"), scale_down);
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
