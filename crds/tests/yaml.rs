//! The generated YAML is fresh, and the examples are what the type says.

use im_crds::{ImCluster, Place, Scaling, ShardMap, Storage};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use std::error::Error;
use std::path::Path;

const HEADER: &str = "# Generated from crds/src; run `UPDATE_CRDS=1 cargo test -p im-crds` to write it anew.\n";

fn generated(crd: &CustomResourceDefinition) -> Result<String, Box<dyn Error>> {
    Ok(format!("{HEADER}{}", serde_norway::to_string(crd)?))
}

#[test]
fn the_yaml_is_fresh() -> Result<(), Box<dyn Error>> {
    // The chart has a copy: Helm reads nothing outside of a chart's folder.
    let folders = ["yaml", "../charts/imcluster/files/crds"];
    for (name, crd) in [("imclusters.yaml", ImCluster::crd()), ("shardmaps.yaml", ShardMap::crd())] {
        let fresh = generated(&crd)?;
        for path in folders.map(|folder| Path::new(env!("CARGO_MANIFEST_DIR")).join(folder).join(name)) {
            if std::env::var_os("UPDATE_CRDS").is_some() {
                std::fs::write(&path, &fresh)?;
            }
            let stored = std::fs::read_to_string(&path).unwrap_or_default();
            let path = path.display();
            assert!(stored == fresh, "{path} is stale: run `UPDATE_CRDS=1 cargo test -p im-crds`");
        }
    }
    Ok(())
}

/// What the API server demands of a schema, as far as the generator could get it wrong.
#[test]
fn the_schemas_are_structural() -> Result<(), Box<dyn Error>> {
    fn walk(path: &str, schema: &serde_json::Value, problems: &mut Vec<String>) {
        let Some(object) = schema.as_object() else { return };
        for forbidden in ["$ref", "definitions", "oneOf", "anyOf", "const", "uniqueItems", "patternProperties"] {
            if object.contains_key(forbidden) {
                problems.push(format!("{path}: {forbidden}"));
            }
        }
        if object.get("additionalProperties") == Some(&false.into()) {
            problems.push(format!("{path}: additionalProperties: false"));
        }
        // An amount is a number or a text.
        if !object.contains_key("type") && object.get("x-kubernetes-int-or-string") != Some(&true.into()) {
            problems.push(format!("{path}: no type"));
        }
        for (name, property) in object.get("properties").and_then(|p| p.as_object()).into_iter().flatten() {
            walk(&format!("{path}.{name}"), property, problems);
        }
        if let Some(items) = object.get("items") {
            walk(&format!("{path}[]"), items, problems);
        }
    }
    let mut problems = Vec::new();
    for crd in [ImCluster::crd(), ShardMap::crd()] {
        let crd = serde_json::to_value(crd)?;
        walk("", &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"], &mut problems);
    }
    assert!(problems.is_empty(), "{problems:#?}");
    Ok(())
}

#[test]
fn the_example_is_a_cluster() -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/chat.yaml"))?;
    let cluster = ImCluster::parse_yaml(&text)?;
    let access = &cluster.spec.access;
    assert_eq!(access.mqtt.as_ref().map(|l| l.address.as_str()), Some("127.0.0.1:1883"));
    assert_eq!(access.web_socket.as_ref().map(|l| l.address.as_str()), Some("127.0.0.1:8083"));
    assert_eq!(access.http.address, "127.0.0.1:8080");
    assert!(matches!(cluster.spec.storage, Storage::Embedded(_)));
    for scaling in [cluster.spec.gateway.scaling(), cluster.spec.business.scaling()] {
        let Scaling::Auto(autoscaling) = scaling else { return Err("both tiers of the example scale".into()) };
        assert_eq!((autoscaling.min_replicas, autoscaling.max_replicas), (1, 4));
    }
    Ok(())
}

#[test]
fn the_examples_run_where_they_say() -> Result<(), Box<dyn Error>> {
    // The README has the first one applied to Kubernetes, too.
    let places =
        [("chat.yaml", Place::Machine), ("chat.yaml", Place::Kubernetes), ("kubernetes.yaml", Place::Kubernetes)];
    for (name, place) in places {
        let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name))?;
        assert_eq!(ImCluster::parse_yaml(&text)?.validate_at(place), [], "{name}");
    }
    Ok(())
}
