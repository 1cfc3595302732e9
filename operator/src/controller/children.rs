//! The children of an ImCluster that the controller keeps as they should be: a pure function of the ImCluster.
//!
//! Not among them: Deployments and their ConfigMaps, which the platform makes as members are started, the ShardMap, which
//! the leader writes, and the Secret of tokens, which is made once.

use super::accepted::{Accepted, SERVING_LABEL};
use super::members::{ADMIN_PORT, LINK_PORT, LINK_TOKEN, STORE_PORT, STORE_TOKEN, client_ports};
use super::pods::{self, Surroundings};
use crate::platform::Role;
use im_crds::{Auth, SecretKey, ServiceType, Storage};
use im_proto::token::Tokens;
use k8s_openapi::ByteString;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Secret, Service, ServiceAccount, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort, NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::collections::BTreeMap;

/// All that is applied for one ImCluster. Whoever applies it takes it apart without `..`, so that nothing is forgotten.
#[derive(Clone, Debug)]
pub struct Children {
    /// One for each kind of pod, without rights and without token.
    pub service_accounts: Vec<ServiceAccount>,
    /// For clients, between business members, of the store.
    pub services: Vec<Service>,
    /// How many pods an eviction may take at once.
    pub disruption_budgets: Vec<PodDisruptionBudget>,
    /// Who may connect to whom.
    pub network_policies: Vec<NetworkPolicy>,
    /// The embedded store's configuration.
    pub store_config: Option<ConfigMap>,
    /// The embedded store.
    pub store: Option<StatefulSet>,
}

impl Children {
    /// What that ImCluster needs.
    pub fn new(accepted: &Accepted, surroundings: &Surroundings) -> Self {
        let (store_config, store) = match &accepted.cluster().spec.storage {
            Storage::Embedded(embedded) => {
                let (config, stateful_set) = pods::store(accepted, surroundings, embedded);
                (Some(config), Some(stateful_set))
            }
            Storage::Postgres(_) => (None, None),
        };
        let mut roles = vec![Role::Gateway, Role::Business];
        roles.extend(store.as_ref().map(|_| Role::Store));
        let mut services = client_services(accepted);
        services.push(headless(accepted, Role::Business, "link", LINK_PORT));
        if store.is_some() {
            services.push(headless(accepted, Role::Store, "store", STORE_PORT));
        }
        Self {
            service_accounts: roles.iter().map(|role| service_account(accepted, *role)).collect(),
            services,
            disruption_budgets: vec![budget(accepted, Role::Gateway), budget(accepted, Role::Business)],
            network_policies: roles.iter().map(|role| network_policy(accepted, *role)).collect(),
            store_config,
            store,
        }
    }
}

fn metadata(accepted: &Accepted, name: String, labels: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(accepted.namespace().to_owned()),
        labels: Some(labels),
        owner_references: Some(vec![accepted.owner().clone()]),
        ..ObjectMeta::default()
    }
}

fn service_account(accepted: &Accepted, role: Role) -> ServiceAccount {
    ServiceAccount {
        metadata: metadata(accepted, accepted.child(&role.to_string()), accepted.labels_of(role)),
        automount_service_account_token: Some(false),
        ..ServiceAccount::default()
    }
}

fn service_port(name: &str, number: u16) -> ServicePort {
    ServicePort {
        name: Some(name.to_owned()),
        port: number.into(),
        target_port: Some(IntOrString::String(name.to_owned())),
        protocol: Some("TCP".to_owned()),
        ..ServicePort::default()
    }
}

/// `NAME`, and `NAME-vip-2` … for further load balancers. They lead to gateways that may get new connections.
fn client_services(accepted: &Accepted) -> Vec<Service> {
    let service = &accepted.cluster().spec.access.service;
    let mut selector = accepted.selector(Role::Gateway);
    selector.insert(SERVING_LABEL.to_owned(), "true".to_owned());
    let name = |vip: u32| match vip {
        1 => accepted.name().to_owned(),
        vip => accepted.child(&format!("vip-{vip}")),
    };
    (1..=service.vips)
        .map(|vip| Service {
            metadata: ObjectMeta {
                annotations: (!service.annotations.is_empty()).then(|| service.annotations.clone()),
                ..metadata(accepted, name(vip), accepted.labels_of(Role::Gateway))
            },
            spec: Some(ServiceSpec {
                type_: Some(service.kind.as_str().to_owned()),
                load_balancer_class: service.load_balancer_class.clone(),
                selector: Some(selector.clone()),
                ports: Some(client_ports(accepted).iter().map(|port| service_port(port.name, port.number)).collect()),
                // A fresh load balancer must not wait for a pod on its own node.
                external_traffic_policy: (service.kind != ServiceType::ClusterIP).then(|| "Cluster".to_owned()),
                ..ServiceSpec::default()
            }),
            ..Service::default()
        })
        .collect()
}

/// A name for the pods themselves; also for those that are not ready, which are found all the same.
fn headless(accepted: &Accepted, role: Role, port: &str, number: u16) -> Service {
    Service {
        metadata: metadata(accepted, accepted.child(&role.to_string()), accepted.labels_of(role)),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".to_owned()),
            cluster_ip: Some("None".to_owned()),
            publish_not_ready_addresses: Some(true),
            selector: Some(accepted.selector(role)),
            ports: Some(vec![service_port(port, number)]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn budget(accepted: &Accepted, role: Role) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: metadata(accepted, accepted.child(&role.to_string()), accepted.labels_of(role)),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            // A pod that does not serve anyway must not keep a node from being drained.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".to_owned()),
            selector: Some(LabelSelector { match_labels: Some(accepted.selector(role)), ..LabelSelector::default() }),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

/// Clients reach gateways, members each other, business members the store; metrics are for all.
fn network_policy(accepted: &Accepted, role: Role) -> NetworkPolicy {
    let port = |number: u16| NetworkPolicyPort {
        port: Some(IntOrString::Int(number.into())),
        protocol: Some("TCP".to_owned()),
        ..NetworkPolicyPort::default()
    };
    let pods_of = |role: Role| NetworkPolicyPeer {
        pod_selector: Some(LabelSelector { match_labels: Some(accepted.selector(role)), ..LabelSelector::default() }),
        ..NetworkPolicyPeer::default()
    };
    let anybody = |ports: Vec<NetworkPolicyPort>| NetworkPolicyIngressRule { from: None, ports: Some(ports) };
    let only = |from: Vec<NetworkPolicyPeer>, number: u16| NetworkPolicyIngressRule {
        from: Some(from),
        ports: Some(vec![port(number)]),
    };
    let ingress = match role {
        Role::Gateway => {
            let mut ports: Vec<NetworkPolicyPort> = client_ports(accepted).iter().map(|p| port(p.number)).collect();
            ports.push(port(ADMIN_PORT));
            vec![anybody(ports)]
        }
        Role::Business => {
            vec![
                only(vec![pods_of(Role::Gateway), pods_of(Role::Business)], LINK_PORT),
                anybody(vec![port(ADMIN_PORT)]),
            ]
        }
        Role::Store => vec![only(vec![pods_of(Role::Business)], STORE_PORT)],
        Role::Control => Vec::new(),
    };
    NetworkPolicy {
        metadata: metadata(accepted, accepted.child(&role.to_string()), accepted.labels_of(role)),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(LabelSelector {
                match_labels: Some(accepted.selector(role)),
                ..LabelSelector::default()
            }),
            policy_types: Some(vec!["Ingress".to_owned()]),
            ingress: Some(ingress),
            ..NetworkPolicySpec::default()
        }),
    }
}

/// The Secret with which the tiers prove to each other that they belong together. Made once, from `known` if it was deleted since:
/// members still show each other what it held.
pub fn tokens(
    accepted: &Accepted,
    known: Option<BTreeMap<String, ByteString>>,
    mut random: impl FnMut() -> u128,
) -> Secret {
    let mut token = || ByteString(format!("{:032x}", random()).into_bytes());
    let fresh = || BTreeMap::from([(LINK_TOKEN.to_owned(), token()), (STORE_TOKEN.to_owned(), token())]);
    Secret {
        metadata: metadata(accepted, accepted.child("tokens"), accepted.labels()),
        data: Some(known.unwrap_or_else(fresh)),
        type_: Some("Opaque".to_owned()),
        ..Secret::default()
    }
}

/// One kind of these tokens.
pub fn tokens_of(secret: &Secret, key: &str) -> Option<Tokens> {
    let text = &secret.data.as_ref()?.get(key)?.0;
    Tokens::parse(std::str::from_utf8(text).ok()?)
}

/// A Secret that the user names, and the keys that it must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretNeed {
    /// The field that names it.
    pub field: &'static str,
    /// Its name.
    pub name: String,
    /// Keys that must be there.
    pub keys: Vec<String>,
    /// Members can't be started without it.
    pub essential: bool,
}

/// Every Secret that the ImCluster refers to.
pub fn secret_needs(accepted: &Accepted) -> Vec<SecretNeed> {
    let spec = &accepted.cluster().spec;
    let mut needs: Vec<(&'static str, Option<&SecretKey>)> =
        vec![("spec.serviceTokenSecret", spec.service_token_secret.as_ref())];
    if let Auth::Jwt(jwt) = &spec.auth {
        needs.push(("spec.auth.jwt.keysSecret", jwt.keys_secret.as_ref()));
        needs.push(("spec.auth.jwt.jwksSecret", jwt.jwks_secret.as_ref()));
    }
    if let Storage::Postgres(postgres) = &spec.storage {
        needs.push(("spec.storage.postgres.urlSecret", postgres.url_secret.as_ref()));
        needs.push(("spec.storage.postgres.caSecret", postgres.ca_secret.as_ref()));
    }
    let essential = needs.len();
    if let Some(prometheus) = &spec.metrics.prometheus {
        needs.push(("spec.metrics.prometheus.tokenSecret", prometheus.token_secret.as_ref()));
        needs.push(("spec.metrics.prometheus.caSecret", prometheus.ca_secret.as_ref()));
    }
    let need = |(index, (field, secret)): (usize, (&'static str, Option<&SecretKey>))| {
        let SecretKey { name, key } = secret?;
        Some(SecretNeed { field, name: name.clone(), keys: vec![key.clone()], essential: index < essential })
    };
    let mut needs: Vec<SecretNeed> = needs.into_iter().enumerate().filter_map(need).collect();
    if let Some(name) = spec.access.tls.as_ref().and_then(|tls| tls.secret_name.clone()) {
        let keys = vec!["tls.crt".to_owned(), "tls.key".to_owned()];
        needs.push(SecretNeed { field: "spec.access.tls.secretName", name, keys, essential: true });
    }
    needs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::pods::MemberTemplate;
    use crate::controller::secrets::SecretValues;
    use crate::platform::Tier;
    use im_crds::ImCluster;
    use serde::Serialize;
    use serde_json::Value;

    const MINIMAL: &str = "{auth: {insecure: {}}}";
    const USUAL: &str = "
        auth: {jwt: {jwksSecret: {name: login, key: jwks.json}, audience: chat}}
        access:
          tls: {address: '0.0.0.0:8883', secretName: chat-tls}
          http: {address: '0.0.0.0:8080'}
        storage: {postgres: {urlSecret: {name: database, key: url}, caSecret: {name: database-ca, key: ca.crt}}}
        metrics:
          prometheus:
            url: https://prometheus:9090
            tokenSecret: {name: monitoring, key: token}
            caSecret: {name: monitoring, key: ca.crt}
        gateway:
          autoscaling: {minReplicas: 2, maxReplicas: 10}
          pod: {resources: {requests: {cpu: 500m}}}
        business: {replicas: 3}";
    const EVERYTHING: &str = "
        image: registry.example/im@sha256:0123
        imagePullPolicy: Always
        imagePullSecrets: [pull]
        auth: {jwt: {keysSecret: {name: login, key: key.pem}, issuer: us}}
        serviceTokenSecret: {name: servers, key: token}
        access:
          mqtt: {address: '0.0.0.0:1883'}
          tls: {address: '0.0.0.0:443', secretName: chat-tls}
          webSocket: {address: '0.0.0.0:8083'}
          http: {address: '0.0.0.0:8080'}
          service: {type: LoadBalancer, vips: 2, loadBalancerClass: example.com/lb, annotations: {dns: chat.example}}
        storage:
          embedded:
            size: 20Gi
            storageClassName: fast
            pod: {resources: {requests: {cpu: 1, memory: 1Gi}, limits: {memory: 2Gi}}}
        gateway:
          limits: {maxConnections: 7}
          drain: {notice: 7s, deadline: 90s}
          surge: 2
          pod:
            resources: {requests: {cpu: 500m}, limits: {cpu: 2, memory: 1Gi}}
            nodeSelector: {disk: ssd}
            tolerations: [{key: im, operator: Exists, effect: NoSchedule}]
            affinity: {podAntiAffinity: {preferredDuringSchedulingIgnoredDuringExecution: []}}
            topologySpread: [{topologyKey: topology.kubernetes.io/zone, whenUnsatisfiable: DoNotSchedule}]
            priorityClassName: high
            labels: {team: chat}
            annotations: {note: hello, prometheus.io/scrape: 'false'}
        business: {shards: 64, pod: {priorityClassName: high}}";

    fn accepted(spec: &str) -> Accepted {
        let head =
            "apiVersion: imcluster.dev/v1alpha1\nkind: ImCluster\nmetadata: {name: chat, namespace: talk, uid: '12'}";
        let cluster = ImCluster::parse_yaml(&format!("{head}\nspec: {spec}")).expect("a good file");
        Accepted::new(&cluster).unwrap_or_else(|violations| panic!("{violations:?}"))
    }

    fn surroundings() -> Surroundings {
        Surroundings {
            image: "example/imcluster:1".to_owned(),
            control_service: "imcluster-operator.im.svc:7200".to_owned(),
        }
    }

    /// Every object that an ImCluster leads to, in the order of its making.
    fn all(spec: &str) -> Vec<Value> {
        fn values<T: Serialize>(objects: impl IntoIterator<Item = T>) -> Vec<Value> {
            objects.into_iter().map(|object| serde_json::to_value(object).expect("serializes")).collect()
        }
        let accepted = accepted(spec);
        let Children { service_accounts, services, disruption_budgets, network_policies, store_config, store } =
            Children::new(&accepted, &surroundings());
        let mut objects = values([tokens(&accepted, None, || 7)]);
        objects.extend(values(service_accounts));
        objects.extend(values(services));
        objects.extend(values(disruption_budgets));
        objects.extend(values(network_policies));
        objects.extend(values(store_config));
        objects.extend(values(store));
        for tier in Tier::ALL {
            let template = MemberTemplate::new(&accepted, &surroundings(), tier);
            objects.extend(values([&template.config]));
            objects.extend(values([template.deployment(2, 5)]));
        }
        objects
    }

    #[test]
    fn the_children_of_a_minimal_cluster() {
        insta::assert_yaml_snapshot!(all(MINIMAL));
    }

    #[test]
    fn the_children_of_a_usual_cluster() {
        insta::assert_yaml_snapshot!(all(USUAL));
    }

    #[test]
    fn the_children_of_a_cluster_that_asks_for_everything() {
        insta::assert_yaml_snapshot!(all(EVERYTHING));
    }

    #[test]
    fn every_child_goes_with_its_cluster_and_is_found_by_its_label() {
        for object in [MINIMAL, USUAL, EVERYTHING].into_iter().flat_map(all) {
            let meta = &object["metadata"];
            assert_eq!(meta["ownerReferences"][0]["uid"], "12", "{object:#}");
            assert_eq!(meta["ownerReferences"][0]["controller"], true, "{object:#}");
            assert_eq!(meta["labels"]["imcluster.dev/cluster"], "chat", "{object:#}");
            assert_eq!(meta["namespace"], "talk");
        }
    }

    #[test]
    fn a_template_is_another_one_when_members_would_run_differently_and_only_then() {
        let digest = |spec: &str, tier| MemberTemplate::new(&accepted(spec), &surroundings(), tier).digest;
        let with = |lines: &str| format!("\n  auth: {{insecure: {{}}}}\n  {lines}");
        let [gateway, business] = Tier::ALL.map(|tier| digest(MINIMAL, tier));
        assert_ne!(gateway, business);
        for (lines, gateway_differs, business_differs) in [
            ("mode: Recommend", false, false),
            ("gateway: {replicas: 7, drain: {rate: 3}, surge: 9}", false, false),
            ("business: {rebalance: {cooldown: 3s}}", false, false),
            ("image: another", true, true),
            ("gateway: {limits: {messageRate: 3}}", true, false),
            ("gateway: {pod: {priorityClassName: high}}", true, false),
            ("messages: {maxPayload: 7}", true, true),
            ("messages: {dedupWindow: 8d}", false, false),
        ] {
            let spec = with(lines);
            assert_eq!(digest(&spec, Tier::Gateway) != gateway, gateway_differs, "gateway, {lines}");
            assert_eq!(digest(&spec, Tier::Business) != business, business_differs, "business, {lines}");
        }
    }

    #[test]
    fn a_database_with_another_url_or_authority_replaces_business_members_and_nobody_else() {
        let digests = |url: &str, authority: &str, others: &str| {
            let accepted = accepted(USUAL);
            let mut values = SecretValues::default();
            for need in secret_needs(&accepted) {
                let value = match need.name.as_str() {
                    "database" => url,
                    "database-ca" => authority,
                    _ => others,
                };
                let data = need.keys.iter().map(|key| (key.clone(), ByteString(value.into())));
                values.learn(&need, &Secret { data: Some(data.collect()), ..Secret::default() });
            }
            let accepted = accepted.with_secrets(values);
            Tier::ALL.map(|tier| MemberTemplate::new(&accepted, &surroundings(), tier).digest)
        };
        let [gateway, business] = digests("postgres://a", "one", "as it is");
        assert_eq!(
            digests("postgres://a", "one", "other"),
            [gateway.clone(), business.clone()],
            "the rest is read again"
        );
        for other in [digests("postgres://b", "one", "as it is"), digests("postgres://a", "two", "as it is")] {
            assert!(other[0] == gateway && other[1] != business);
        }
    }

    #[test]
    fn deleted_tokens_are_made_again_as_they_were() {
        let accepted = accepted(MINIMAL);
        let made = tokens(&accepted, None, || 7);
        let again = tokens(&accepted, made.data.clone(), || 8);
        assert_eq!(again, made);
        let other = tokens(&accepted, None, || 8);
        assert_ne!(tokens_of(&other, LINK_TOKEN), tokens_of(&made, LINK_TOKEN));
        assert!(tokens_of(&made, LINK_TOKEN).is_some_and(|tokens| tokens.accept(&format!("{:032x}", 7))));
    }

    #[test]
    fn every_secret_of_the_user_is_needed_with_its_keys() {
        let needs = |spec| -> Vec<String> {
            let needs = secret_needs(&accepted(spec));
            needs.iter().map(|need| format!("{} {} {}", need.field, need.name, need.keys.join(","))).collect()
        };
        assert_eq!(needs(MINIMAL), [""; 0]);
        assert_eq!(
            needs(USUAL),
            [
                "spec.auth.jwt.jwksSecret login jwks.json",
                "spec.storage.postgres.urlSecret database url",
                "spec.storage.postgres.caSecret database-ca ca.crt",
                "spec.metrics.prometheus.tokenSecret monitoring token",
                "spec.metrics.prometheus.caSecret monitoring ca.crt",
                "spec.access.tls.secretName chat-tls tls.crt,tls.key",
            ]
        );
        assert_eq!(needs(EVERYTHING).len(), 3);
        let essential = |need: &SecretNeed| need.name != "monitoring";
        assert!(secret_needs(&accepted(USUAL)).iter().all(|need| need.essential == essential(need)));
    }
}
