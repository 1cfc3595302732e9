//! Reading an `ImCluster` from YAML, with errors that name the field.

use crate::{GROUP, ImCluster, VERSION};
use kube::CustomResourceExt;
use serde_json::Value;
use std::fmt;

/// Why a text is not an `ImCluster`.
#[derive(Debug, thiserror::Error)]
pub enum ParseError {
    /// It is not YAML, or more than one document. Says line and column.
    #[error("not valid YAML: {0}")]
    Yaml(#[from] serde_norway::Error),
    /// A field is missing, unknown or of the wrong type.
    #[error("{path}: {reason}")]
    Field {
        /// Path of the field, for example `spec.access.mqtt.address`; `.` is the document itself.
        path: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Every field can be read, but their values break rules.
    #[error("{}", join(.0))]
    Rules(Vec<Violation>),
}

fn join(violations: &[Violation]) -> String {
    violations.iter().map(Violation::to_string).collect::<Vec<_>>().join("\n")
}

/// One rule that an `ImCluster` breaks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Violation {
    /// Path of the field, for example `spec.business.shards`.
    pub path: String,
    /// What is wrong and what to do.
    pub reason: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.reason)
    }
}

fn refuse<T>(path: impl Into<String>, reason: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Field { path: path.into(), reason: reason.into() })
}

impl ImCluster {
    /// Reads one `ImCluster` from YAML and checks every rule that the API server would check at its creation. Unknown
    /// fields are refused.
    ///
    /// # Errors
    /// [`ParseError`], each with the field's path and the reason.
    pub fn parse_yaml(text: &str) -> Result<Self, ParseError> {
        // Through serde_norway's own Value: it refuses a key written twice.
        let yaml: serde_norway::Value = serde_norway::from_str(text)?;
        let value = match serde_json::to_value(&yaml) {
            Ok(Value::Object(object)) => object,
            Ok(_) | Err(_) => return refuse(".", "expected an object with apiVersion, kind, metadata and spec"),
        };
        for (key, expected) in [("apiVersion", format!("{GROUP}/{VERSION}")), ("kind", "ImCluster".to_owned())] {
            match value.get(key).and_then(Value::as_str) {
                Some(found) if found == expected => {}
                Some(found) => return refuse(key, format!("is `{found}`, write `{expected}`")),
                None => return refuse(key, format!("is missing, write `{key}: {expected}`")),
            }
        }
        if let Some(unknown) =
            value.keys().find(|key| !["apiVersion", "kind", "metadata", "spec", "status"].contains(&key.as_str()))
        {
            return refuse(unknown, "unknown field: remove it, or indent it below spec");
        }
        let mut value = value;
        let crd = serde_json::to_value(ImCluster::crd()).unwrap_or_default();
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        if let Some(spec) = value.get("spec")
            && let Some((path, known)) = unknown_field("spec".to_owned(), spec, &schema["properties"]["spec"])
        {
            return refuse(path, format!("unknown field, expected one of: `{}`", known.join("`, `")));
        }
        // The status is the operator's; one that came along with an export is not input.
        value.remove("status");
        let metadata = value.get("metadata").cloned();
        let cluster: Self = match serde_path_to_error::deserialize(Value::Object(value)) {
            Ok(cluster) => cluster,
            Err(error) => {
                let path = error.path().to_string();
                let reason = reason(&path, &error.into_inner().to_string());
                return refuse(path, reason);
            }
        };
        if let Some(unknown) = unknown_metadata(metadata.as_ref(), &cluster) {
            return refuse(format!("metadata.{unknown}"), "unknown field: remove it");
        }
        if cluster.metadata.name.as_deref().unwrap_or_default().is_empty() {
            return refuse("metadata.name", "is missing: give the cluster a name");
        }
        let violations = cluster.validate();
        if violations.is_empty() { Ok(cluster) } else { Err(ParseError::Rules(violations)) }
    }

    /// The YAML that [`ImCluster::parse_yaml`] reads, every default written out.
    ///
    /// # Errors
    /// Only if a string in it can't be YAML.
    pub fn to_yaml(&self) -> Result<String, ParseError> {
        // Through JSON: of an enum, YAML would make a tag (`!insecure {}`), which `kubectl` does not take.
        let value = serde_json::to_value(self).map_err(<serde_norway::Error as serde::ser::Error>::custom)?;
        Ok(serde_norway::to_string(&value)?)
    }
}

/// The path of the first field that the schema does not have, and which it has in its place. The types themselves take unknown
/// fields, as an operator has to whose successor's definition is already in force; people are told of their typing errors.
fn unknown_field(path: String, value: &Value, schema: &Value) -> Option<(String, Vec<String>)> {
    if schema["x-kubernetes-preserve-unknown-fields"] == true || schema["x-kubernetes-int-or-string"] == true {
        return None;
    }
    match value {
        Value::Object(fields) => fields.iter().find_map(|(name, value)| {
            let path = format!("{path}.{name}");
            let properties = schema["properties"].as_object();
            match properties.and_then(|properties| properties.get(name)) {
                Some(schema) => unknown_field(path, value, schema),
                None if schema["additionalProperties"].is_object() => {
                    unknown_field(path, value, &schema["additionalProperties"])
                }
                None => Some((path, properties.into_iter().flat_map(|known| known.keys().cloned()).collect())),
            }
        }),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .find_map(|(index, item)| unknown_field(format!("{path}[{index}]"), item, &schema["items"])),
        _ => None,
    }
}

/// The first metadata field that Kubernetes' own type does not know: it would be lost on the way there and back.
fn unknown_metadata(written: Option<&Value>, cluster: &ImCluster) -> Option<String> {
    let known = serde_json::to_value(&cluster.metadata).ok()?;
    let written = written?.as_object()?;
    written.iter().find(|(key, value)| !value.is_null() && known.get(key).is_none()).map(|(key, _)| key.clone())
}

/// Serde's words, except where they don't tell what to do.
fn reason(path: &str, message: &str) -> String {
    if message.contains("expected map with a single key") || message.contains("expected externally tagged enum") {
        return format!("set exactly one of: {}", alternatives(path).join(", "));
    }
    message.to_owned()
}

/// The fields that the CRD's schema has at that path.
fn alternatives(path: &str) -> Vec<String> {
    let crd = serde_json::to_value(ImCluster::crd()).unwrap_or_default();
    let mut schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
    for step in path.split('.') {
        schema = &schema["properties"][step];
    }
    schema["properties"].as_object().into_iter().flat_map(|fields| fields.keys().cloned()).collect()
}
