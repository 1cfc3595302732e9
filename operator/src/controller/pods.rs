//! The pods of a tier: what runs in them, as whom, with what. Pure.
//!
//! Every pod passes the Pod Security level `restricted`: not root, a read-only root file system, no capability, no API
//! token.

use super::accepted::{Accepted, SERVING_LABEL, TEMPLATE_LABEL};
use super::members::{
    ADMIN_PORT, BUSINESS_GRACE_S, CONFIG_DIR, CONFIG_FILE, DATA_DIR, JWT_DIR, LINK_PORT, LINK_TOKEN, MAP_HINT_DIR,
    ONLY_FILE, SERVICE_TOKEN_DIR, STORE_CA_DIR, STORE_GRACE_S, STORE_PORT, STORE_TOKEN, STORE_URL_DIR, TLS_DIR,
    TOKENS_DIR, business_config, client_ports, gateway_config, gateway_grace_s, store_config,
};
use crate::platform::{Role, Tier};
use im_crds::{Auth, Embedded, PodSettings, Quantity as Amount, SecretKey, Storage};
use k8s_openapi::api::apps::v1::{
    Deployment, DeploymentSpec, StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec,
};
use k8s_openapi::api::core::v1::{
    Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction,
    KeyToPath, LocalObjectReference, ObjectFieldSelector, PersistentVolumeClaim, PersistentVolumeClaimSpec,
    PodSecurityContext, PodSpec, PodTemplateSpec, Probe, ResourceRequirements, SeccompProfile, SecretVolumeSource,
    SecurityContext, Sysctl, TCPSocketAction, Toleration, TopologySpreadConstraint, Volume, VolumeMount,
    VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::Value;
use std::collections::BTreeMap;

/// User and group that every container runs as: nobody's, as in distroless images.
const USER: i64 = 65_532;
/// Owner and group read, nobody writes.
const SECRET_MODE: i32 = 0o440;

/// What the operator adds to every ImCluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    /// The image where an ImCluster names none.
    pub image: String,
    /// Where members reach the control service, `HOST:PORT`.
    pub control_service: String,
}

/// A tier's members of one configuration: the ConfigMap and, for some number of replicas, the Deployment.
#[derive(Clone, Debug)]
pub struct MemberTemplate {
    /// Digest of all that is configured; part of both names.
    pub digest: String,
    /// The configuration, which never changes.
    pub config: ConfigMap,
    deployment: Deployment,
}

impl MemberTemplate {
    /// The template of that tier.
    pub fn new(accepted: &Accepted, surroundings: &Surroundings, tier: Tier) -> Self {
        let config = match tier {
            Tier::Gateway => gateway_config(accepted, &surroundings.control_service),
            Tier::Business => business_config(accepted, &surroundings.control_service),
        };
        let mut pod = member_pod(accepted, surroundings, tier);
        let digest = digest(&pod, &config, &read_once(accepted, tier));
        let name = accepted.of_template(tier, &digest);
        let mut labels = accepted.labels_of(tier.role());
        labels.insert(TEMPLATE_LABEL.to_owned(), digest.clone());
        let mut selector = accepted.selector(tier.role());
        selector.insert(TEMPLATE_LABEL.to_owned(), digest.clone());
        if let Some(metadata) = &mut pod.metadata {
            metadata.labels.get_or_insert_default().insert(TEMPLATE_LABEL.to_owned(), digest.clone());
        }
        if let Some(spec) = &mut pod.spec {
            spec.volumes.get_or_insert_default().insert(0, config_volume(&name));
        }
        let metadata = ObjectMeta {
            name: Some(name),
            namespace: Some(accepted.namespace().to_owned()),
            labels: Some(labels),
            owner_references: Some(vec![accepted.owner().clone()]),
            ..ObjectMeta::default()
        };
        let deployment = Deployment {
            metadata: metadata.clone(),
            spec: Some(DeploymentSpec {
                selector: LabelSelector { match_labels: Some(selector), ..LabelSelector::default() },
                template: pod,
                // Another template is another Deployment: there is nothing to go back to.
                revision_history_limit: Some(0),
                ..DeploymentSpec::default()
            }),
            ..Deployment::default()
        };
        Self { digest, config: config_map(metadata, &config), deployment }
    }

    /// The Deployment, as it is created. Later only its replicas change.
    pub fn deployment(&self, replicas: u32, term: u64) -> Deployment {
        let mut deployment = self.deployment.clone();
        let annotations = deployment.metadata.annotations.get_or_insert_default();
        annotations.insert(super::accepted::TERM_ANNOTATION.to_owned(), term.to_string());
        if let Some(spec) = &mut deployment.spec {
            spec.replicas = Some(i32::try_from(replicas).unwrap_or(i32::MAX));
        }
        deployment
    }
}

/// What a member reads from Secrets when it starts and never again: all else that Secrets hold is followed while it runs.
fn read_once(accepted: &Accepted, tier: Tier) -> Vec<&[u8]> {
    match (tier, &accepted.cluster().spec.storage) {
        (Tier::Business, Storage::Postgres(postgres)) => {
            let secrets = [&postgres.url_secret, &postgres.ca_secret].into_iter().flatten();
            secrets.filter_map(|secret| accepted.secrets().get(secret)).collect()
        }
        _ => Vec::new(),
    }
}

/// Eight hexadecimal digits that stand for a configuration, the pod around it and what is read from Secrets. They are public, and
/// too few to tell what a Secret holds.
fn digest(pod: &PodTemplateSpec, config: &Value, secrets: &[&[u8]]) -> String {
    let mut all = format!("{}{config}", serde_json::to_string(pod).unwrap_or_default()).into_bytes();
    all.extend(secrets.concat());
    format!("{:08x}", xxhash_rust::xxh3::xxh3_64(&all) >> 32)
}

fn config_map(metadata: ObjectMeta, config: &Value) -> ConfigMap {
    ConfigMap {
        metadata,
        immutable: Some(true),
        data: Some(BTreeMap::from([(CONFIG_FILE.to_owned(), format!("{config:#}\n"))])),
        ..ConfigMap::default()
    }
}

/// The embedded store: its configuration, and the StatefulSet of one.
pub fn store(accepted: &Accepted, surroundings: &Surroundings, embedded: &Embedded) -> (ConfigMap, StatefulSet) {
    let config = store_config();
    let mut pod = store_pod(accepted, surroundings, embedded);
    let config_name = format!("{}-{}", accepted.child("store"), digest(&PodTemplateSpec::default(), &config, &[]));
    if let Some(spec) = &mut pod.spec {
        spec.volumes.get_or_insert_default().insert(0, config_volume(&config_name));
    }
    let metadata = |name: String| ObjectMeta {
        name: Some(name),
        namespace: Some(accepted.namespace().to_owned()),
        labels: Some(accepted.labels_of(Role::Store)),
        owner_references: Some(vec![accepted.owner().clone()]),
        ..ObjectMeta::default()
    };
    let claim = PersistentVolumeClaim {
        metadata: ObjectMeta { name: Some("data".to_owned()), ..ObjectMeta::default() },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: embedded.storage_class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some(amounts(&BTreeMap::from([("storage".to_owned(), embedded.size.clone())]))),
                ..VolumeResourceRequirements::default()
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        ..PersistentVolumeClaim::default()
    };
    let stateful_set = StatefulSet {
        metadata: metadata(accepted.child("store")),
        spec: Some(StatefulSetSpec {
            replicas: Some(1),
            service_name: Some(accepted.child("store")),
            selector: LabelSelector { match_labels: Some(accepted.selector(Role::Store)), ..LabelSelector::default() },
            template: pod,
            volume_claim_templates: Some(vec![claim]),
            // Messages outlive the ImCluster: whoever wants them gone deletes the claim.
            persistent_volume_claim_retention_policy: Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
                when_deleted: Some("Retain".to_owned()),
                when_scaled: Some("Retain".to_owned()),
            }),
            revision_history_limit: Some(1),
            ..StatefulSetSpec::default()
        }),
        ..StatefulSet::default()
    };
    (config_map(metadata(config_name), &config), stateful_set)
}

fn member_pod(accepted: &Accepted, surroundings: &Surroundings, tier: Tier) -> PodTemplateSpec {
    let spec = &accepted.cluster().spec;
    let config = format!("--config={CONFIG_DIR}/{CONFIG_FILE}");
    let identity = ["--name=$(POD_NAME)", "--instance=$(POD_UID)", "--advertise=$(POD_IP)"].map(str::to_owned);
    let mut secrets = Secrets::default();
    secrets.volumes.push(map_hint_volume(&accepted.child("map")));
    secrets.mounts.push(read_only("map", MAP_HINT_DIR));
    match tier {
        Tier::Gateway => {
            secrets.tokens(accepted, &[LINK_TOKEN]);
            if let Auth::Jwt(jwt) = &spec.auth {
                secrets.one("jwt", JWT_DIR, jwt.jwks_secret.as_ref().or(jwt.keys_secret.as_ref()));
            }
            let certificate = spec.access.tls.as_ref().and_then(|tls| tls.secret_name.as_ref());
            if let Some(name) = certificate {
                secrets.add("tls", TLS_DIR, name, &[("tls.crt", "tls.crt"), ("tls.key", "tls.key")]);
            }
            secrets.one("service-token", SERVICE_TOKEN_DIR, spec.service_token_secret.as_ref());
            let ports = client_ports(accepted);
            let mut named: Vec<ContainerPort> = ports.iter().map(|port| port_of(port.name, port.number)).collect();
            named.push(port_of("admin", ADMIN_PORT));
            let low = ports.iter().any(|port| port.number < 1_024);
            let mut args = vec![config];
            args.extend(identity);
            let mut template = pod(
                accepted,
                surroundings,
                Role::Gateway,
                &spec.gateway.pod,
                Program { command: &["/im-gateway"], args, ports: named, grace_s: gateway_grace_s(accepted) },
                secrets,
            );
            if let Some(metadata) = &mut template.metadata {
                metadata.labels.get_or_insert_default().insert(SERVING_LABEL.to_owned(), "true".to_owned());
            }
            if low && let Some(security) = template.spec.as_mut().and_then(|spec| spec.security_context.as_mut()) {
                // The pod has its own network: there, low ports need no root.
                security.sysctls = Some(vec![Sysctl {
                    name: "net.ipv4.ip_unprivileged_port_start".to_owned(),
                    value: "0".to_owned(),
                }]);
            }
            template
        }
        Tier::Business => {
            match &spec.storage {
                Storage::Embedded(_) => secrets.tokens(accepted, &[LINK_TOKEN, STORE_TOKEN]),
                Storage::Postgres(postgres) => {
                    secrets.tokens(accepted, &[LINK_TOKEN]);
                    secrets.one("store-url", STORE_URL_DIR, postgres.url_secret.as_ref());
                    secrets.one("store-ca", STORE_CA_DIR, postgres.ca_secret.as_ref());
                }
            }
            let mut args = vec!["serve".to_owned(), config];
            args.extend(identity);
            let ports = vec![port_of("link", LINK_PORT), port_of("admin", ADMIN_PORT)];
            pod(
                accepted,
                surroundings,
                Role::Business,
                &spec.business.pod,
                Program { command: &["/im-business"], args, ports, grace_s: BUSINESS_GRACE_S },
                secrets,
            )
        }
    }
}

fn store_pod(accepted: &Accepted, surroundings: &Surroundings, embedded: &Embedded) -> PodTemplateSpec {
    let mut secrets = Secrets::default();
    secrets.tokens(accepted, &[STORE_TOKEN]);
    secrets.mounts.push(VolumeMount {
        name: "data".to_owned(),
        mount_path: DATA_DIR.to_owned(),
        ..VolumeMount::default()
    });
    let program = Program {
        command: &["/im-business"],
        args: vec!["store".to_owned(), format!("--config={CONFIG_DIR}/{CONFIG_FILE}")],
        ports: vec![port_of("store", STORE_PORT)],
        grace_s: STORE_GRACE_S,
    };
    pod(accepted, surroundings, Role::Store, &embedded.pod, program, secrets)
}

/// What runs in a pod.
struct Program<'a> {
    command: &'a [&'a str],
    args: Vec<String>,
    ports: Vec<ContainerPort>,
    grace_s: u64,
}

/// Secrets as files, read-only.
#[derive(Default)]
struct Secrets {
    volumes: Vec<Volume>,
    mounts: Vec<VolumeMount>,
}

impl Secrets {
    fn add(&mut self, volume: &str, directory: &str, secret: &str, files: &[(&str, &str)]) {
        let items = files.iter().map(|(key, path)| KeyToPath {
            key: (*key).to_owned(),
            path: (*path).to_owned(),
            ..KeyToPath::default()
        });
        self.volumes.push(Volume {
            name: volume.to_owned(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(secret.to_owned()),
                items: Some(items.collect()),
                default_mode: Some(SECRET_MODE),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
        });
        self.mounts.push(read_only(volume, directory));
    }

    fn one(&mut self, volume: &str, directory: &str, secret: Option<&SecretKey>) {
        if let Some(SecretKey { name, key }) = secret {
            self.add(volume, directory, name, &[(key, ONLY_FILE)]);
        }
    }

    /// Of the operator's own tokens those that this tier needs.
    fn tokens(&mut self, accepted: &Accepted, keys: &[&str]) {
        let files: Vec<(&str, &str)> = keys.iter().map(|key| (*key, *key)).collect();
        self.add("tokens", TOKENS_DIR, &accepted.child("tokens"), &files);
    }
}

fn read_only(volume: &str, directory: &str) -> VolumeMount {
    VolumeMount {
        name: volume.to_owned(),
        mount_path: directory.to_owned(),
        read_only: Some(true),
        ..VolumeMount::default()
    }
}

fn config_volume(name: &str) -> Volume {
    Volume {
        name: "config".to_owned(),
        config_map: Some(ConfigMapVolumeSource { name: name.to_owned(), ..ConfigMapVolumeSource::default() }),
        ..Volume::default()
    }
}

/// Optional: there is none before the first leader has a map, and a pod does not wait for it.
fn map_hint_volume(name: &str) -> Volume {
    Volume {
        name: "map".to_owned(),
        config_map: Some(ConfigMapVolumeSource {
            name: name.to_owned(),
            optional: Some(true),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    }
}

fn port_of(name: &str, number: u16) -> ContainerPort {
    ContainerPort { name: Some(name.to_owned()), container_port: number.into(), ..ContainerPort::default() }
}

/// A pod without the volume of its configuration, whose name depends on all the rest.
fn pod(
    accepted: &Accepted,
    surroundings: &Surroundings,
    role: Role,
    settings: &PodSettings,
    program: Program<'_>,
    secrets: Secrets,
) -> PodTemplateSpec {
    let spec = &accepted.cluster().spec;
    let mut labels = settings.labels.clone();
    labels.extend(accepted.labels_of(role));
    let mut annotations = settings.annotations.clone();
    if role != Role::Store {
        let scrape = [("scrape", "true".to_owned()), ("port", ADMIN_PORT.to_string()), ("path", "/metrics".to_owned())];
        for (key, value) in scrape {
            annotations.entry(format!("prometheus.io/{key}")).or_insert(value);
        }
    }
    let mut mounts = vec![read_only("config", CONFIG_DIR)];
    mounts.extend(secrets.mounts);
    let container = Container {
        name: role.to_string(),
        image: Some(spec.image.clone().unwrap_or_else(|| surroundings.image.clone())),
        image_pull_policy: Some(spec.image_pull_policy.as_str().to_owned()),
        command: Some(program.command.iter().map(|word| (*word).to_owned()).collect()),
        args: Some(program.args),
        env: Some(
            [("POD_NAME", "metadata.name"), ("POD_UID", "metadata.uid"), ("POD_IP", "status.podIP")]
                .map(|(name, path)| from_pod(name, path))
                .to_vec(),
        ),
        ports: Some(program.ports),
        volume_mounts: Some(mounts),
        resources: Some(resources(settings)),
        startup_probe: Some(Probe { period_seconds: Some(1), failure_threshold: Some(120), ..alive(role) }),
        liveness_probe: Some(Probe { period_seconds: Some(10), failure_threshold: Some(3), ..alive(role) }),
        readiness_probe: Some(Probe {
            period_seconds: Some(2),
            failure_threshold: Some(2),
            ..if role == Role::Store { alive(role) } else { probe("/readyz") }
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".to_owned()]), ..Capabilities::default() }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    };
    let pull = spec.image_pull_secrets.iter().map(|name| LocalObjectReference { name: name.clone() });
    let pod = PodSpec {
        service_account_name: Some(accepted.child(&role.to_string())),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        image_pull_secrets: (!spec.image_pull_secrets.is_empty()).then(|| pull.collect()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            fs_group_change_policy: Some("OnRootMismatch".to_owned()),
            seccomp_profile: Some(SeccompProfile { type_: "RuntimeDefault".to_owned(), ..SeccompProfile::default() }),
            ..PodSecurityContext::default()
        }),
        termination_grace_period_seconds: Some(i64::try_from(program.grace_s).unwrap_or(i64::MAX)),
        containers: vec![container],
        volumes: Some(secrets.volumes),
        node_selector: (!settings.node_selector.is_empty()).then(|| settings.node_selector.clone()),
        tolerations: (!settings.tolerations.is_empty()).then(|| settings.tolerations.iter().map(toleration).collect()),
        // It was read once when the ImCluster was accepted.
        affinity: settings.affinity.clone().and_then(|affinity| serde_json::from_value(affinity).ok()),
        topology_spread_constraints: (role != Role::Store).then(|| spread(accepted, role, settings)),
        priority_class_name: settings.priority_class_name.clone(),
        ..PodSpec::default()
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: (!annotations.is_empty()).then_some(annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(pod),
    }
}

fn from_pod(name: &str, path: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: path.to_owned(), ..ObjectFieldSelector::default() }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}

fn probe(path: &str) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("admin".to_owned()),
            ..HTTPGetAction::default()
        }),
        timeout_seconds: Some(3),
        ..Probe::default()
    }
}

/// Whether the process answers at all; the store member speaks gRPC only.
fn alive(role: Role) -> Probe {
    match role {
        Role::Store => Probe {
            tcp_socket: Some(TCPSocketAction {
                port: IntOrString::String("store".to_owned()),
                ..TCPSocketAction::default()
            }),
            timeout_seconds: Some(3),
            ..Probe::default()
        },
        Role::Gateway | Role::Business | Role::Control => probe("/healthz"),
    }
}

fn amounts(amounts: &BTreeMap<String, Amount>) -> BTreeMap<String, Quantity> {
    amounts.iter().map(|(name, amount)| (name.clone(), Quantity(amount.0.clone()))).collect()
}

/// What was asked for; else a small request, so that the scheduler knows of the pod, and no limit.
fn resources(settings: &PodSettings) -> ResourceRequirements {
    let some = |map: &BTreeMap<String, Amount>| (!map.is_empty()).then(|| amounts(map));
    match &settings.resources {
        Some(resources) => ResourceRequirements {
            requests: some(&resources.requests),
            limits: some(&resources.limits),
            ..ResourceRequirements::default()
        },
        None => {
            let small = [("cpu", "100m"), ("memory", "128Mi")];
            let small = small.map(|(name, amount)| (name.to_owned(), Quantity(amount.to_owned())));
            ResourceRequirements { requests: Some(BTreeMap::from(small)), ..ResourceRequirements::default() }
        }
    }
}

fn toleration(toleration: &im_crds::Toleration) -> Toleration {
    let im_crds::Toleration { key, operator, value, effect, toleration_seconds } = toleration.clone();
    Toleration { key, operator, value, effect, toleration_seconds }
}

fn spread(accepted: &Accepted, role: Role, settings: &PodSettings) -> Vec<TopologySpreadConstraint> {
    let over =
        |topology_key: &str, max_skew: u32, when_unsatisfiable: im_crds::WhenUnsatisfiable| TopologySpreadConstraint {
            topology_key: topology_key.to_owned(),
            max_skew: i32::try_from(max_skew).unwrap_or(i32::MAX),
            when_unsatisfiable: when_unsatisfiable.as_str().to_owned(),
            label_selector: Some(LabelSelector {
                match_labels: Some(accepted.selector(role)),
                ..LabelSelector::default()
            }),
            ..TopologySpreadConstraint::default()
        };
    match &settings.topology_spread {
        Some(spreads) => spreads.iter().map(|s| over(&s.topology_key, s.max_skew, s.when_unsatisfiable)).collect(),
        None => vec![over("kubernetes.io/hostname", 1, im_crds::WhenUnsatisfiable::ScheduleAnyway)],
    }
}
