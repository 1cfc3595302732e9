//! What of an `ImCluster` only matters on Kubernetes: images, pods, Services, Secrets. `imcluster up` ignores it, except
//! for references to Secrets, which it refuses.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// One key of a Secret in the ImCluster's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// When a node fetches an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImagePullPolicy {
    /// Each time a pod starts.
    Always,
    /// When the node does not have it.
    #[default]
    IfNotPresent,
    /// Never: the node has it.
    Never,
}

impl ImagePullPolicy {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// How clients reach the gateways from outside their pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [
    {
        "rule": "self.type == 'LoadBalancer' || self.vips == 1",
        "message": "more than one address needs load balancers: set type to LoadBalancer, or vips to 1"
    },
    {
        "rule": "self.type == 'LoadBalancer' || !has(self.loadBalancerClass)",
        "message": "loadBalancerClass needs type LoadBalancer: set it, or remove loadBalancerClass"
    }
]))]
pub struct ClientService {
    /// Type of the Service.
    #[serde(rename = "type")]
    pub kind: ServiceType,
    /// Annotations of the Service, for the load balancer's controller.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Which load balancer serves it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub load_balancer_class: Option<String>,
    /// How many such Services there are: one load balancer carries only so many connections. One DNS name may stand for
    /// all of them.
    #[schemars(range(min = 1, max = 16))]
    pub vips: u32,
}

impl Default for ClientService {
    fn default() -> Self {
        Self { kind: ServiceType::ClusterIP, annotations: BTreeMap::new(), load_balancer_class: None, vips: 1 }
    }
}

/// Types of the clients' Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// Reachable inside of the Kubernetes cluster.
    #[default]
    ClusterIP,
    /// Also on a port of every node.
    NodePort,
    /// Also through an external load balancer.
    LoadBalancer,
}

impl ServiceType {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}

/// One store member with an embedded database file and a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{
    "rule": "self.size == oldSelf.size && has(self.storageClassName) == has(oldSelf.storageClassName) && (!has(self.storageClassName) || self.storageClassName == oldSelf.storageClassName)",
    "message": "size and storageClassName of the store's volume can't change: resize its PersistentVolumeClaim instead"
}]))]
pub struct Embedded {
    /// Size of its volume. On Kubernetes only.
    pub size: Quantity,
    /// Class of its volume; without it the Kubernetes cluster's default. On Kubernetes only.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
    /// Its pod. On Kubernetes only.
    pub pod: PodSettings,
}

impl Default for Embedded {
    fn default() -> Self {
        Self { size: Quantity("10Gi".to_owned()), storage_class_name: None, pod: PodSettings::default() }
    }
}

/// What a tier's pods ask of Kubernetes; every field means what it means in a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSettings {
    /// CPU and memory. Left out: a small request and no limit. `CpuUtilization` is a percentage of `requests.cpu`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Labels that a node must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that a node may have.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub tolerations: Vec<Toleration>,
    /// A pod's `affinity`, as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "any_object")]
    pub affinity: Option<serde_json::Value>,
    /// How the pods of the tier spread. Left out: over nodes as far as possible.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8))]
    pub topology_spread: Option<Vec<TopologySpread>>,
    /// Name of a PriorityClass.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// Further labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Further annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl PodSettings {
    /// Cores that are set aside for the pod, as far as the user says; a limit alone is a request too, as in Kubernetes.
    pub fn cpu_request(&self) -> Option<f64> {
        let Resources { requests, limits } = self.resources.as_ref()?;
        requests.get("cpu").or_else(|| limits.get("cpu"))?.amount()
    }
}

fn any_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "nullable": true, "x-kubernetes-preserve-unknown-fields": true })
}

/// CPU and memory of a container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// What is set aside for it.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub requests: BTreeMap<String, Quantity>,
    /// What it can't use more of.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub limits: BTreeMap<String, Quantity>,
}

/// A taint that a pod does not mind.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Toleration {
    /// The taint's key; none = all taints.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `Exists` or `Equal`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<String>,
    /// The taint's value.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`; none = all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub effect: Option<String>,
    /// For how long a `NoExecute` is not minded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub toleration_seconds: Option<i64>,
}

/// How evenly the pods of the tier are spread over one kind of place.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TopologySpread {
    /// The node label whose values are the places.
    #[schemars(length(min = 1))]
    pub topology_key: String,
    /// How many more pods one place may have than another.
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    pub max_skew: u32,
    /// What happens to a pod that does not fit.
    #[serde(default)]
    pub when_unsatisfiable: WhenUnsatisfiable,
}

fn one() -> u32 {
    1
}

/// What happens to a pod that would make the spread uneven.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WhenUnsatisfiable {
    /// It waits.
    DoNotSchedule,
    /// It runs all the same.
    #[default]
    ScheduleAnyway,
}

impl WhenUnsatisfiable {
    /// As Kubernetes writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::DoNotSchedule => "DoNotSchedule",
            Self::ScheduleAnyway => "ScheduleAnyway",
        }
    }
}

/// An amount as Kubernetes writes it, for example `500m`, `2`, `1Gi`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Quantity(pub String);

/// What a [`Quantity`] looks like; of Kubernetes' own forms only signs are left out.
const QUANTITY_PATTERN: &str = "^[0-9]+([.][0-9]+)?([numkMGTPE]|[KMGTPE]i|[eE][0-9]{1,2})?$";

impl Quantity {
    /// The amount as a number; `None` if Kubernetes can't read it.
    pub fn amount(&self) -> Option<f64> {
        if !self.is_valid() {
            return None;
        }
        let text = self.0.as_str();
        // `1e3` is a number as it is.
        if let Ok(number) = text.parse::<f64>() {
            return Some(number);
        }
        let (number, suffix) = text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.')?);
        let factor = match suffix {
            "n" => 1e-9,
            "u" => 1e-6,
            "m" => 1e-3,
            "k" => 1e3,
            "M" => 1e6,
            "G" => 1e9,
            "T" => 1e12,
            "P" => 1e15,
            "E" => 1e18,
            "Ki" => f64::from(1 << 10),
            "Mi" => f64::from(1 << 20),
            "Gi" => f64::from(1 << 30),
            "Ti" => 2_f64.powi(40),
            "Pi" => 2_f64.powi(50),
            "Ei" => 2_f64.powi(60),
            _ => return None,
        };
        Some(number.parse::<f64>().ok()? * factor)
    }

    /// Whether Kubernetes can read it.
    pub fn is_valid(&self) -> bool {
        let text = self.0.as_str();
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let number_ok = match number.split_once('.') {
            Some((whole, fraction)) => digits(whole) && digits(fraction),
            None => digits(number),
        };
        let exponent = |suffix: &str| suffix.len() <= 3 && suffix.strip_prefix(['e', 'E']).is_some_and(digits);
        let suffixes = ["", "n", "u", "m", "k", "M", "G", "T", "P", "E", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        number_ok && (suffixes.contains(&suffix) || exponent(suffix))
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // YAML's `cpu: 2` is a number.
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected an amount, for example 500m, 2 or 1Gi")]
        enum Written {
            Text(String),
            Whole(u64),
        }
        Ok(Self(match Written::deserialize(deserializer)? {
            Written::Text(text) => text,
            Written::Whole(number) => number.to_string(),
        }))
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "x-kubernetes-int-or-string": true, "pattern": QUANTITY_PATTERN })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_those_of_kubernetes() {
        for text in ["0", "500m", "2", "1.5", "1Gi", "100M", "1e3", "12E", "3Ki"] {
            assert!(Quantity(text.into()).is_valid(), "{text}");
        }
        for text in ["", "m", "1.", ".5", "1gi", "1 Gi", "-1", "1Gib", "e3", "1e", "1e1234", "1.2.3"] {
            assert!(!Quantity(text.into()).is_valid(), "{text}");
        }
        for (text, amount) in [
            ("500m", Some(0.5)),
            ("2", Some(2.0)),
            ("1.5", Some(1.5)),
            ("1e3", Some(1e3)),
            ("12E", Some(12e18)),
            ("250000u", Some(0.25)),
            ("2Gi", Some(2_147_483_648.0)),
            ("x", None),
        ] {
            assert_eq!(Quantity(text.into()).amount(), amount, "{text}");
        }
        let read: Vec<Quantity> = serde_json::from_str(r#"[2, "2"]"#).expect("number and text");
        assert_eq!(read[0], read[1]);
        assert!(serde_json::from_str::<Quantity>("{}").is_err());
    }
}
