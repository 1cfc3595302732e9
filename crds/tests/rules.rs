//! What is refused, where and with which words: by `parse_yaml` and `validate`, and by the generated CRD's own CEL
//! rules, evaluated here as the API server would.

use im_crds::{ImCluster, ParseError, Place, Violation};
use kube::CustomResourceExt;
use serde_json::Value;

const MINIMAL: &str = "
apiVersion: imcluster.dev/v1alpha1
kind: ImCluster
metadata: {name: chat}
spec:
  auth: {insecure: {}}
";

/// The minimal cluster with further lines below `spec`.
fn with(lines: &str) -> String {
    let indented: String = lines.lines().map(|line| format!("  {line}\n")).collect();
    format!("{MINIMAL}{indented}")
}

/// The minimal cluster with another `auth`.
fn with_auth(auth: &str) -> String {
    MINIMAL.replace("{insecure: {}}", auth)
}

fn refused(yaml: &str) -> Vec<(String, String)> {
    match ImCluster::parse_yaml(yaml) {
        Ok(_) => Vec::new(),
        Err(ParseError::Field { path, reason }) => vec![(path, reason)],
        Err(ParseError::Rules(violations)) => violations.into_iter().map(|v| (v.path, v.reason)).collect(),
        Err(ParseError::Yaml(error)) => vec![("yaml".into(), error.to_string())],
    }
}

/// The messages of the CEL rules that the YAML breaks, with the schema's defaults filled in as the API server does.
fn refused_by_cel(yaml: &str, old: Option<&str>) -> Vec<String> {
    let object = |yaml: &str| -> Value { serde_norway::from_str(yaml).expect("test YAML") };
    let crd = serde_json::to_value(ImCluster::crd()).expect("serializes");
    let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    match kube_cel::validate(schema, &object(yaml), old.map(object).as_ref()) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.into_vec().into_iter().map(|error| error.message).collect(),
    }
}

#[test]
fn a_minimal_cluster_has_all_defaults() {
    let cluster = ImCluster::parse_yaml(MINIMAL).expect("minimal");
    assert_eq!(cluster.spec.business.shards, 1024);
    assert_eq!(cluster.spec.gateway.scaling().initial(), 1);
    assert_eq!(cluster.spec.messages.dedup_window.to_string(), "7d");
    assert_eq!(refused_by_cel(MINIMAL, None), Vec::<String>::new());
    let again = cluster.to_yaml().expect("serializes");
    assert_eq!(ImCluster::parse_yaml(&again).expect("own output"), cluster);
}

#[test]
fn unreadable_fields_are_named() {
    for (yaml, path, words) in [
        (with("busness: {}"), "spec.busness", "unknown field"),
        (with("gateway: {limits: {maxConnections: many}}"), "spec.gateway.limits.maxConnections", "u32"),
        (with("gateway: {limits: {keepAliveMax: 5 minutes}}"), "spec.gateway.limits.keepAliveMax", "for example 30s"),
        (with("access: {mqtt: {adress: 1}}"), "spec.access.mqtt.adress", "unknown field"),
        (with("mode: Automatic"), "spec.mode", "`Auto`"),
        (with("business: {autoscaling: {minReplicas: 1}}"), "spec.business.autoscaling", "maxReplicas"),
        (with_auth("{insecure: {}, jwt: {keysFile: a}}"), "spec.auth", "set exactly one of: insecure, jwt"),
        (with_auth("{}"), "spec.auth", "set exactly one of: insecure, jwt"),
        (with_auth("{password: x}"), "spec.auth", "`insecure`"),
        (with_auth("{insecure: {really: true}}"), "spec.auth.insecure.really", "unknown field"),
        (MINIMAL.replace("spec:", "spce:"), "spce", "unknown field"),
        (MINIMAL.replace("v1alpha1", "v2"), "apiVersion", "write `imcluster.dev/v1alpha1`"),
        (MINIMAL.replace("kind: ImCluster", "kind: Deployment"), "kind", "write `ImCluster`"),
        (MINIMAL.replace("{name: chat}", "{name: chat, lables: {}}"), "metadata.lables", "unknown field"),
        (MINIMAL.replace("{name: chat}", "{}"), "metadata.name", "give the cluster a name"),
        ("- a\n- b".to_owned(), ".", "expected an object"),
        (with("auth: {insecure: {}}"), "yaml", "duplicate"),
        ("a: [".to_owned(), "yaml", "line"),
    ] {
        let refused = refused(&yaml);
        assert_eq!(refused.len(), 1, "{yaml}\n{refused:?}");
        let (found, reason) = &refused[0];
        assert!(found.starts_with(path) && reason.contains(words), "{yaml}\nexpected {path}: {words}\n{refused:?}");
    }
}

#[test]
fn rust_and_cel_refuse_the_same_in_the_same_words() {
    let auto = |tier: &str, lines: &str| with(&format!("{tier}: {{autoscaling: {{{lines}}}}}"));
    let cases = [
        (with_auth("{jwt: {}}"), "spec.auth.jwt", "set exactly one of: jwksFile, jwksSecret, keysFile, keysSecret"),
        (
            with_auth("{jwt: {keysFile: a, jwksFile: b}}"),
            "spec.auth.jwt",
            "set exactly one of: jwksFile, jwksSecret, keysFile, keysSecret",
        ),
        (with("storage: {postgres: {}}"), "spec.storage.postgres", "set exactly one of: url, urlFile, urlSecret"),
        (
            with("storage: {postgres: {url: 'postgres://h', caFile: a, caSecret: {name: a, key: b}}}"),
            "spec.storage.postgres",
            "set at most one of: caFile, caSecret",
        ),
        (with("access: {}"), "spec.access", "no client could connect"),
        (with("access: {mqtt: {address: ''}}"), "spec.access.mqtt.address", "write IP:PORT"),
        (with("access: {mqtt: {address: 'localhost:1883'}}"), "spec.access.mqtt.address", "write IP:PORT"),
        (with("access: {mqtt: {address: '1.2.3.4:1'}, http: {address: '1.2.3.4:1'}}"), "spec.access", "two listeners"),
        (
            with("access: {mqtt: {address: '1.2.3.4:1'}, webSocket: {address: '1.2.3.4:1'}}"),
            "spec.access",
            "two listeners",
        ),
        (
            auto("gateway", "minReplicas: 3, maxReplicas: 2"),
            "spec.gateway.autoscaling",
            "minReplicas must not be above",
        ),
        (with("business: {replicas: 2, autoscaling: {maxReplicas: 2}}"), "spec.business", "exclude each other"),
        (with("gateway: {replicas: 2, autoscaling: {maxReplicas: 2}}"), "spec.gateway", "exclude each other"),
        (
            auto(
                "business",
                "maxReplicas: 2, metrics: [{type: BuiltIn, builtIn: {name: Connections, target: {type: AverageValue, value: 1}}}]",
            ),
            "spec.business",
            "hold no client connections",
        ),
        (
            auto(
                "gateway",
                "maxReplicas: 2, metrics: [{type: BuiltIn, builtIn: {name: CpuUtilization, target: {type: AverageValue, value: 1}}}]",
            ),
            "spec.gateway.autoscaling.metrics[0].builtIn",
            "CpuUtilization takes a target of type Utilization",
        ),
        (
            auto("gateway", "maxReplicas: 2, metrics: [{type: Prometheus}]"),
            "spec.gateway.autoscaling.metrics[0]",
            "set just the field that type names",
        ),
        (
            auto(
                "business",
                "maxReplicas: 2, metrics: [{type: BuiltIn, prometheus: {query: up, target: {type: Value, value: 1}}}]",
            ),
            "spec.business.autoscaling.metrics[0]",
            "set just the field that type names",
        ),
        (
            auto(
                "gateway",
                "maxReplicas: 2, metrics: [{type: Prometheus, prometheus: {query: up, perPod: true, target: {type: Value, value: 1}}}]",
            ),
            "spec.gateway.autoscaling.metrics[0].prometheus",
            "perPod takes a target of type AverageValue",
        ),
        (with("metrics: {prometheus: {url: 'prometheus:9090'}}"), "spec.metrics.prometheus.url", "write http://HOST"),
        (with("metrics: {prometheus: {url: 'http://p/?q=1'}}"), "spec.metrics.prometheus.url", "write http://HOST"),
        (with("messages: {maxPayload: 300000}"), "spec", "messages.maxPayload must be below"),
        (
            with("access: {mqtt: {address: '1.2.3.4:1'}, service: {vips: 2}}"),
            "spec.access.service",
            "needs load balancers",
        ),
        (
            with("access: {mqtt: {address: '1.2.3.4:1'}, service: {type: NodePort, loadBalancerClass: x}}"),
            "spec.access.service",
            "needs type LoadBalancer",
        ),
        (
            with("access: {tls: {address: '1.2.3.4:1', certFile: a}}"),
            "spec.access.tls",
            "set either certFile and keyFile, or secretName",
        ),
        (
            with("access: {tls: {address: '1.2.3.4:1', certFile: a, keyFile: b, secretName: c}}"),
            "spec.access.tls",
            "set either certFile and keyFile, or secretName",
        ),
        (
            with("serviceTokenFile: a\nserviceTokenSecret: {name: a, key: b}"),
            "spec",
            "set at most one of: serviceTokenFile, serviceTokenSecret",
        ),
    ];
    for (yaml, path, words) in cases {
        let refused = refused(&yaml);
        assert_eq!(refused.len(), 1, "{yaml}\n{refused:?}");
        assert!(refused[0].0 == path && refused[0].1.contains(words), "{yaml}\n{refused:?}");
        let by_cel = refused_by_cel(&yaml, None);
        assert_eq!(by_cel, [refused[0].1.as_str()], "{yaml}");
    }
    let two_ways = with_auth("{insecure: {}, jwt: {keysFile: a}}");
    assert_eq!(refused_by_cel(&two_ways, None), ["set exactly one of: insecure, jwt"]);
}

#[test]
fn own_queries_are_read_and_written() {
    let lines = "maxReplicas: 9, metrics: [
        {type: Prometheus, prometheus: {query: 'sum(rate(im_acked_total[30s]))', target: {type: AverageValue, value: 250}}},
        {type: Prometheus, prometheus: {query: 'max(ack_seconds)', target: {type: Value, value: 0.2}}},
        {type: BuiltIn, builtIn: {name: CpuUtilization, target: {type: Utilization, value: 70}}}]";
    let yaml = with(&format!(
        "metrics: {{prometheus: {{url: 'https://metrics:9090/tenant', tokenFile: /token, caFile: /ca.pem}}}}\n\
         business: {{autoscaling: {{{}}}}}",
        lines.replace('\n', " ")
    ));
    let cluster = ImCluster::parse_yaml(&yaml).expect("own queries");
    assert_eq!(refused_by_cel(&yaml, None), Vec::<String>::new());
    let again = cluster.to_yaml().expect("serializes");
    assert_eq!(ImCluster::parse_yaml(&again).expect("own output"), cluster);
}

#[test]
fn bounds_are_those_of_the_schema() {
    let crd = serde_json::to_value(ImCluster::crd()).expect("serializes");
    for (yaml, path) in [
        ("business: {shards: 0}", "spec.business.shards"),
        ("business: {shards: 16385}", "spec.business.shards"),
        ("business: {rebalance: {tolerance: 1.5}}", "spec.business.rebalance.tolerance"),
        ("business: {rebalance: {movesInFlight: 0}}", "spec.business.rebalance.movesInFlight"),
        ("gateway: {replicas: 0}", "spec.gateway.replicas"),
        ("gateway: {autoscaling: {maxReplicas: 1001}}", "spec.gateway.autoscaling.maxReplicas"),
        ("gateway: {limits: {receiveMaximum: 2000}}", "spec.gateway.limits.receiveMaximum"),
        ("gateway: {limits: {maxPacketSize: 16777217}}", "spec.gateway.limits.maxPacketSize"),
        ("gateway: {limits: {sendBufferBytes: 1}}", "spec.gateway.limits.sendBufferBytes"),
        ("gateway: {drain: {rate: 0}}", "spec.gateway.drain.rate"),
        ("gateway: {surge: 0}", "spec.gateway.surge"),
        ("business: {surge: 1001}", "spec.business.surge"),
        ("messages: {catchUp: 0}", "spec.messages.catchUp"),
    ] {
        let refused = refused(&with(yaml));
        let [(found, reason)] = refused.as_slice() else { panic!("{yaml}: {refused:?}") };
        assert_eq!(found, path, "{yaml}");
        let mut schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        for step in path.split('.') {
            schema = &schema["properties"][step];
        }
        for bound in ["minimum", "maximum"] {
            let bound = schema[bound].as_f64().unwrap_or_else(|| panic!("{path} has no {bound} in the schema"));
            assert!(reason.split([' ', ',']).any(|word| word.parse() == Ok(bound)), "{reason} does not name {bound}");
        }
    }
}

#[test]
fn shards_never_change() {
    let old = ImCluster::parse_yaml(MINIMAL).expect("minimal");
    let yaml = with("business: {shards: 512}");
    let new = ImCluster::parse_yaml(&yaml).expect("512 shards");
    let expected = Violation {
        path: "spec.business.shards".into(),
        reason: "shards can't change, every stored message lies by it: make a new ImCluster instead".into(),
    };
    assert_eq!(refused_by_cel(&yaml, Some(MINIMAL)), [expected.reason.as_str()]);
    assert_eq!(new.validate_update(&old), [expected]);
    assert_eq!(old.validate_update(&old), []);
}

#[test]
fn the_kind_of_storage_never_changes() {
    let old = ImCluster::parse_yaml(MINIMAL).expect("minimal");
    let yaml = with("storage: {postgres: {url: 'postgres://u@h/d'}}");
    let new = ImCluster::parse_yaml(&yaml).expect("postgres");
    let words = "storage can't change its kind, every stored message would stay behind: make a new ImCluster instead";
    assert_eq!(refused_by_cel(&yaml, Some(MINIMAL)), [words]);
    assert_eq!(new.validate_update(&old), [Violation { path: "spec".into(), reason: words.into() }]);
}

#[test]
fn the_volume_of_the_store_never_changes() {
    let yaml = with("storage: {embedded: {size: 1Gi}}");
    let words =
        "size and storageClassName of the store's volume can't change: resize its PersistentVolumeClaim instead";
    let old = ImCluster::parse_yaml(&yaml).expect("1 GiB");
    for changed in ["storage: {embedded: {size: 2Gi}}", "storage: {embedded: {size: 1Gi, storageClassName: fast}}"] {
        let changed = with(changed);
        assert_eq!(refused_by_cel(&changed, Some(&yaml)), [words]);
        let new = ImCluster::parse_yaml(&changed).expect("another volume");
        assert_eq!(
            new.validate_update(&old),
            [Violation { path: "spec.storage.embedded".into(), reason: words.into() }]
        );
    }
    let pod = with("storage: {embedded: {size: 1Gi, pod: {priorityClassName: high}}}");
    assert_eq!(refused_by_cel(&pod, Some(&yaml)), Vec::<String>::new());
}

#[test]
fn each_place_refuses_what_it_can_not_have() {
    let at = |yaml: &str, place: Place| -> Vec<String> {
        let cluster = ImCluster::parse_yaml(yaml).unwrap_or_else(|error| panic!("{yaml}: {error}"));
        cluster.validate_at(place).iter().map(Violation::to_string).collect()
    };
    let files = format!(
        "{}\n  serviceTokenFile: t\n  access: {{tls: {{address: '1.2.3.4:1', certFile: c, keyFile: k}}}}\n  storage: {{postgres: {{urlFile: u, caFile: a}}}}",
        with_auth("{jwt: {jwksFile: j}}").trim_end()
    );
    assert_eq!(at(&files, Place::Machine), [""; 0]);
    assert_eq!(
        at(&files, Place::Kubernetes),
        [
            "spec.serviceTokenFile: a pod does not have this file: put it into a Secret and use serviceTokenSecret",
            "spec.auth.jwt.jwksFile: a pod does not have this file: put it into a Secret and use jwksSecret",
            "spec.access.tls.certFile: a pod does not have this file: put it into a Secret and use secretName",
            "spec.storage.postgres.urlFile: a pod does not have this file: put it into a Secret and use urlSecret",
            "spec.storage.postgres.caFile: a pod does not have this file: put it into a Secret and use caSecret",
        ]
    );
    let secrets = files
        .replace("jwksFile: j", "jwksSecret: {name: j, key: k}")
        .replace("certFile: c, keyFile: k", "secretName: c")
        .replace("urlFile: u", "urlSecret: {name: u, key: k}")
        .replace("caFile: a", "caSecret: {name: a, key: k}")
        .replace("serviceTokenFile: t", "serviceTokenSecret: {name: t, key: k}");
    assert_eq!(at(&secrets, Place::Kubernetes), [""; 0]);
    assert_eq!(
        at(&secrets, Place::Machine),
        [
            "spec.serviceTokenSecret: there are no Secrets without Kubernetes: use serviceTokenFile",
            "spec.auth.jwt.jwksSecret: there are no Secrets without Kubernetes: use jwksFile",
            "spec.access.tls.secretName: there are no Secrets without Kubernetes: use certFile and keyFile",
            "spec.storage.postgres.urlSecret: there are no Secrets without Kubernetes: use urlFile",
            "spec.storage.postgres.caSecret: there are no Secrets without Kubernetes: use caFile",
        ]
    );
    for name in ["a-name-that-is-far-too-long-for-pods", "chat.room", "1chat", "chat-"] {
        let told = at(&MINIMAL.replace("{name: chat}", &format!("{{name: {name}}}")), Place::Kubernetes);
        assert!(told.len() == 1 && told[0].starts_with("metadata.name: use at most 28"), "{name}: {told:?}");
    }
    let ports = with("access: {mqtt: {address: '0.0.0.0:9090'}, http: {address: '1.2.3.4:9090'}}");
    assert_eq!(at(&ports, Place::Machine), [""; 0]);
    assert_eq!(
        at(&ports, Place::Kubernetes),
        [
            "spec.access.mqtt.address: port 9090 is that of the metrics: use another one",
            "spec.access.http.address: port 9090 is that of the metrics: use another one",
        ]
    );
}

#[test]
fn pods_are_checked() {
    for (pod, path, words) in [
        ("{resources: {requests: {cpu: many}}}", "spec.gateway.pod.resources.requests.cpu", "not an amount"),
        ("{affinity: {nodeAffinity: 7}}", "spec.gateway.pod.affinity", "not a pod's affinity"),
        ("{labels: {imcluster.dev/serving: no}}", "spec.gateway.pod.labels", "the operator's own"),
        ("{color: red}", "spec.gateway.pod.color", "unknown field"),
    ] {
        let refused = refused(&with(&format!("gateway: {{pod: {pod}}}")));
        assert_eq!(refused.len(), 1, "{pod}\n{refused:?}");
        assert!(refused[0].0 == path && refused[0].1.contains(words), "{pod}\n{refused:?}");
    }
}

#[test]
fn all_violations_are_told_at_once() {
    let refused = refused(&with("messages: {catchUp: 0}\nbusiness: {shards: 0}\nstorage: {postgres: {}}"));
    let paths: Vec<&str> = refused.iter().map(|(path, _)| path.as_str()).collect();
    assert_eq!(paths, ["spec.storage.postgres", "spec.business.shards", "spec.messages.catchUp"]);
}
