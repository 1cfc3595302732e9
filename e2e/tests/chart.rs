//! The chart as its user gets it: rendered by Helm for several values files and held against snapshots, the schema, and what the
//! programs really export.
//!
//! Helm is `$HELM`, the `helm` on PATH, or the one that the end-to-end cluster built. Where there is none these tests are skipped,
//! loudly, unless `REQUIRE_HELM` is set. The same goes for promtool (Debian's package `prometheus`).

use im_operator::control::{Clusters, Leadership, Setup};
use im_operator::controller::http::Metrics;
use im_operator::controller::keeper::Shared;
use im_operator::controller::pods::Surroundings;
use im_operator::platform::kubernetes::World;
use prometheus_client::registry::Registry;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tokio::sync::watch;

type TestResult<T = ()> = Result<T, Box<dyn Error>>;

/// Values files below `ci/`; the defaults have none.
const VARIANTS: [&str; 3] = ["defaults", "everything", "namespaced"];
/// What `.Capabilities` says without a cluster.
const KUBE_VERSION: &str = "--kube-version=1.34.0";

// ---- Helm -------------------------------------------------------------------------------------------------------------------

fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/imcluster")
}

/// A program by its variable, on PATH or in the cache of the end-to-end cluster.
fn program(variable: &str, name: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let folders = std::env::split_paths(&on_path).chain(cache.map(|cache| cache.join("imcluster/bin")));
    folders.map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// Says on the terminal, past the test runner's capture, that a test proved nothing.
fn skipped(test: &str, name: &str) -> TestResult {
    let variable = name.to_uppercase();
    if std::env::var_os(format!("REQUIRE_{variable}")).is_some() {
        return Err(format!("{name} is required and not found: install it or set {variable}").into());
    }
    Ok(writeln!(std::io::stderr(), "SKIPPED {test}: no {name}; install it or set {variable}=PATH")?)
}

/// Ends the test, skipped, where there is no such program.
macro_rules! need {
    ($name:literal) => {
        match program(&$name.to_uppercase(), $name) {
            Some(path) => path,
            None => return skipped(std::thread::current().name().unwrap_or_default(), $name),
        }
    };
}

fn helm(helm: &Path, command: &str, args: &[&str]) -> TestResult<Output> {
    let mut helm = Command::new(helm);
    helm.arg(command);
    if command == "template" {
        helm.args(["imcluster", "--namespace=imcluster-system"]);
    }
    Ok(helm.arg(chart()).arg(KUBE_VERSION).args(args).output()?)
}

fn values_of(variant: &str) -> Vec<String> {
    match variant {
        "defaults" => Vec::new(),
        _ => vec![format!("--values={}", chart().join(format!("ci/{variant}-values.yaml")).display())],
    }
}

/// All objects of a variant, sorted by kind and name.
fn rendered(program: &Path, variant: &str) -> TestResult<Vec<Value>> {
    let values = values_of(variant);
    let args: Vec<&str> = values.iter().map(String::as_str).collect();
    let output = helm(program, "template", &args)?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    let mut objects = documents(&String::from_utf8(output.stdout)?)?;
    objects.sort_by_key(|object| (text(object, "/kind"), text(object, "/metadata/name")));
    Ok(objects)
}

fn documents(yaml: &str) -> TestResult<Vec<Value>> {
    use serde::Deserialize;
    let documents = serde_norway::Deserializer::from_str(yaml).map(Value::deserialize);
    Ok(documents.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|document| !document.is_null()).collect())
}

fn text(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

fn texts(array: &Value) -> BTreeSet<String> {
    array.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

fn read(path: &str) -> TestResult<String> {
    let path = chart().join(path);
    Ok(std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?)
}

// ---- The whole --------------------------------------------------------------------------------------------------------------

#[test]
fn helm_has_nothing_to_complain_about() -> TestResult {
    let program = need!("helm");
    for variant in VARIANTS {
        let values = values_of(variant);
        let args: Vec<&str> = ["--strict"].into_iter().chain(values.iter().map(String::as_str)).collect();
        let output = helm(&program, "lint", &args)?;
        assert!(output.status.success(), "{variant}: {}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

#[test]
fn every_object_is_as_reviewed() -> TestResult {
    let program = need!("helm");
    for variant in VARIANTS {
        let mut snapshot = String::new();
        for mut object in rendered(&program, variant)? {
            // What is a copy of a file in the repository is compared with that file elsewhere.
            for copied in ["/spec/versions", "/spec/groups/0/rules", "/data/imcluster.json"] {
                if let Some(value) = object.pointer_mut(copied) {
                    *value = "(copied)".into();
                }
            }
            snapshot += &format!("---\n{}", serde_norway::to_string(&object)?);
        }
        insta::assert_snapshot!(variant, snapshot);
    }
    Ok(())
}

// ---- Values -----------------------------------------------------------------------------------------------------------------

#[test]
fn bad_values_are_refused() -> TestResult {
    let program = need!("helm");
    let cases = [
        ("replcas=3", "'replcas' not allowed"),
        ("replicas=0", "/replicas"),
        ("replicas=two", "/replicas"),
        ("image.repository=", "/image/repository"),
        ("image.repository=imcluster:latest", "/image/repository"),
        ("image.tag=a b", "/image/tag"),
        ("image.digest=sha256:12", "/image/digest"),
        ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
        ("imagePullSecrets[0]=registry", "/imagePullSecrets/0"),
        ("watchNamespace=Chat", "/watchNamespace"),
        ("prometheusUrl=prometheus:9090", "/prometheusUrl"),
        ("crds.enabled=maybe", "/crds/enabled"),
        ("serviceAccount.name=Im_Operator", "/serviceAccount/name"),
        ("resources.limits.memory=lots", "/resources/limits/memory"),
        ("podLabels.team=3", "/podLabels/team"),
        ("env[0].value=x", "/env/0"),
        ("networkPolicy.metricsFrom[0]=monitoring", "/networkPolicy/metricsFrom/0"),
        ("monitoring.podMonitor.interval=often", "/monitoring/podMonitor/interval"),
        ("monitoring.prometheusRule.disabled[0]=ImClusterMessageLots", "/monitoring/prometheusRule/disabled/0"),
        ("monitoring.dashboards.enabled=true", "'dashboards' not allowed"),
    ];
    for (value, complaint) in cases {
        let output = helm(&program, "template", &["--set", value])?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{value} is taken");
        assert!(stderr.contains(complaint), "{value}: {complaint:?} is not in {stderr}");
    }
    Ok(())
}

/// Each value is in the schema, each property of the schema has its default, and each object of the chart's own is closed.
#[test]
fn values_and_schema_agree() -> TestResult {
    fn compare(path: &str, values: &Value, schema: &Value, root: &Value, problems: &mut Vec<String>) {
        let schema = schema["$ref"].as_str().and_then(|at| root.pointer(at.trim_start_matches('#'))).unwrap_or(schema);
        let Some(properties) = schema["properties"].as_object() else { return };
        if schema["additionalProperties"] != false {
            problems.push(format!("{path}: additionalProperties is not false"));
        }
        let known: BTreeSet<&String> = properties.keys().filter(|name| *name != "global").collect();
        let given: BTreeSet<&String> = values.as_object().into_iter().flat_map(|object| object.keys()).collect();
        problems.extend(known.symmetric_difference(&given).map(|name| format!("{path}.{name} is only in one of them")));
        for name in known.intersection(&given) {
            compare(&format!("{path}.{name}"), &values[*name], &properties[*name], root, problems);
        }
    }
    let schema: Value = serde_json::from_str(&read("values.schema.json")?)?;
    let values: Value = serde_norway::from_str(&read("values.yaml")?)?;
    let mut problems = Vec::new();
    compare("values", &values, &schema, &schema, &mut problems);
    assert!(problems.is_empty(), "{problems:#?}");

    let can_be_disabled = "/properties/monitoring/properties/prometheusRule/properties/disabled/items/enum";
    let can_be_disabled = texts(schema.pointer(can_be_disabled).unwrap_or(&Value::Null));
    assert_eq!(can_be_disabled, alerts()?.into_iter().map(|alert| text(&alert, "/alert")).collect());
    Ok(())
}

/// The values that the documentation tells people to write.
#[test]
fn the_documented_values_are_taken() -> TestResult {
    let program = need!("helm");
    let page = read("../../docs/production.md")?;
    let blocks = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
    let values = blocks.filter(|block| block.starts_with("# values.yaml")).collect::<Vec<_>>();
    let [values] = values.as_slice() else { return Err("docs/production.md has one values.yaml".into()) };
    let file = std::env::temp_dir().join(format!("imcluster-chart-{}.yaml", std::process::id()));
    std::fs::write(&file, values)?;
    let output = helm(&program, "template", &[&format!("--values={}", file.display())]);
    std::fs::remove_file(&file)?;
    let output = output?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn an_alert_can_be_left_out() -> TestResult {
    let program = need!("helm");
    let objects = rendered(&program, "everything")?;
    let rule = of_kind(&objects, "PrometheusRule");
    let rendered = rule.first().and_then(|rule| rule.pointer("/spec/groups/0/rules")).cloned().unwrap_or_default();
    let expected: Vec<Value> =
        alerts()?.into_iter().filter(|alert| alert["alert"] != "ImClusterScalingLimited").collect();
    assert_eq!(rendered, Value::from(expected));
    Ok(())
}

// ---- CustomResourceDefinitions ----------------------------------------------------------------------------------------------

/// Helm writes 1 where 1.0 was read.
fn same_numbers(value: &Value) -> Value {
    match value {
        Value::Number(number) => Value::from(number.as_f64()),
        Value::Array(array) => array.iter().map(same_numbers).collect(),
        Value::Object(object) => object.iter().map(|(name, value)| (name.clone(), same_numbers(value))).collect(),
        other => other.clone(),
    }
}

#[test]
fn the_definitions_are_those_of_the_types_and_stay() -> TestResult {
    let program = need!("helm");
    let objects = rendered(&program, "defaults")?;
    let definitions = of_kind(&objects, "CustomResourceDefinition");
    let mut expected = Vec::new();
    for name in ["imclusters", "shardmaps"] {
        let path = chart().join(format!("../../crds/yaml/{name}.yaml"));
        expected.extend(documents(&std::fs::read_to_string(path)?)?);
    }
    assert_eq!(definitions.len(), expected.len());
    for (definition, expected) in definitions.iter().zip(&expected) {
        let name = text(definition, "/metadata/name");
        assert_eq!(name, text(expected, "/metadata/name"));
        let same = same_numbers(&definition["spec"]) == same_numbers(&expected["spec"]);
        assert!(same, "{name} differs from crds/yaml: run `UPDATE_CRDS=1 cargo test -p im-crds`");
    }
    for definition in definitions {
        assert_eq!(text(definition, "/metadata/annotations/helm.sh~1resource-policy"), "keep");
    }
    assert!(
        of_kind(&rendered(&program, "namespaced")?, "CustomResourceDefinition").is_empty(),
        "crds.enabled is false"
    );
    Ok(())
}

// ---- Security ---------------------------------------------------------------------------------------------------------------

/// Kubernetes' Pod Security Standard `restricted`, and a file system that nobody writes to.
#[test]
fn the_operator_is_a_restricted_pod() -> TestResult {
    let program = need!("helm");
    for variant in VARIANTS {
        let objects = rendered(&program, variant)?;
        let deployments = of_kind(&objects, "Deployment");
        let [deployment] = deployments.as_slice() else { return Err("one Deployment is expected".into()) };
        let pod = &deployment["spec"]["template"]["spec"];
        assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
        assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
        for forbidden in ["hostNetwork", "hostPID", "hostIPC", "volumes", "initContainers"] {
            assert!(pod[forbidden].is_null(), "{forbidden}");
        }
        for container in pod["containers"].as_array().into_iter().flatten() {
            let context = &container["securityContext"];
            assert_eq!(context["allowPrivilegeEscalation"], false);
            assert_eq!(context["readOnlyRootFilesystem"], true);
            assert_eq!(context["capabilities"], serde_json::json!({"drop": ["ALL"]}));
            assert!(!container["resources"]["limits"]["memory"].is_null(), "no memory limit");
        }
    }
    Ok(())
}

/// Every call of the operator, by resource; `operator/tests/rights.rs` holds the same rules against what is really called.
const CALLS: [(&str, &str, &[&str]); 15] = [
    ("", "configmaps", &["create", "delete", "get", "list", "patch", "watch"]),
    ("", "pods", &["delete", "list", "patch", "watch"]),
    ("", "secrets", &["create", "get"]),
    ("", "serviceaccounts", &["create", "get", "list", "patch", "watch"]),
    ("", "services", &["create", "get", "list", "patch", "watch"]),
    ("apps", "deployments", &["create", "delete", "get", "list", "patch", "watch"]),
    ("apps", "statefulsets", &["create", "get", "list", "patch", "watch"]),
    ("coordination.k8s.io", "leases", &["create", "get", "update"]),
    ("events.k8s.io", "events", &["create"]),
    ("imcluster.dev", "imclusters", &["get", "list", "watch"]),
    ("imcluster.dev", "imclusters/finalizers", &["update"]),
    ("imcluster.dev", "imclusters/status", &["patch"]),
    ("imcluster.dev", "shardmaps", &["create", "get", "list", "update"]),
    ("networking.k8s.io", "networkpolicies", &["create", "get", "list", "patch", "watch"]),
    ("policy", "poddisruptionbudgets", &["create", "get", "list", "patch", "watch"]),
];

#[test]
fn the_operator_may_do_what_it_does_and_no_more() -> TestResult {
    let program = need!("helm");
    let wanted: BTreeMap<(String, String), BTreeSet<String>> = CALLS
        .iter()
        .map(|(group, resource, verbs)| {
            (((*group).to_owned(), (*resource).to_owned()), verbs.iter().map(|verb| (*verb).to_owned()).collect())
        })
        .collect();
    for (variant, kind) in [("defaults", "ClusterRole"), ("namespaced", "Role")] {
        let objects = rendered(&program, variant)?;
        let roles = of_kind(&objects, "ClusterRole").into_iter().chain(of_kind(&objects, "Role"));
        let mut granted: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for role in roles {
            // The lease is the operator's own; everything else is in the namespaces that it looks after.
            let leader = text(role, "/metadata/name").ends_with("-leader");
            let place = (text(role, "/kind"), text(role, "/metadata/namespace"));
            let expected = match (leader, kind) {
                (true, _) => ("Role", "imcluster-system"),
                (false, "Role") => ("Role", "chat"),
                (false, _) => ("ClusterRole", ""),
            };
            assert_eq!((place.0.as_str(), place.1.as_str()), expected, "{variant}");
            for rule in role["rules"].as_array().into_iter().flatten() {
                for group in texts(&rule["apiGroups"]) {
                    for resource in texts(&rule["resources"]) {
                        assert_eq!(leader, resource == "leases", "{variant}: {resource}");
                        granted.entry((group.clone(), resource)).or_default().extend(texts(&rule["verbs"]));
                    }
                }
            }
        }
        assert_eq!(granted, wanted, "{variant}");

        let account = of_kind(&objects, "ServiceAccount");
        let account = account.first().map(|account| text(account, "/metadata/name")).unwrap_or_default();
        let bindings = of_kind(&objects, &format!("{kind}Binding")).into_iter().chain(of_kind(&objects, "RoleBinding"));
        for binding in bindings {
            assert_eq!(text(binding, "/subjects/0/name"), account);
            assert_eq!(text(binding, "/roleRef/name"), text(binding, "/metadata/name"));
        }
    }
    Ok(())
}

// ---- Alerts and dashboard ---------------------------------------------------------------------------------------------------

fn alerts() -> TestResult<Vec<Value>> {
    let file: Value = serde_norway::from_str(&read("files/alerts.yaml")?)?;
    let groups = file["groups"].as_array().cloned().unwrap_or_default();
    let rules = groups.into_iter().flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default());
    let alerts: Vec<Value> = rules.collect();
    assert!(!alerts.is_empty(), "no alert");
    Ok(alerts)
}

fn dashboard() -> TestResult<Value> {
    Ok(serde_json::from_str(&read("files/dashboard.json")?)?)
}

/// All values of that name, wherever they are.
fn find<'a>(value: &'a Value, name: &str, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get(name).and_then(Value::as_str));
            object.values().for_each(|value| find(value, name, found));
        }
        Value::Array(array) => array.iter().for_each(|value| find(value, name, found)),
        _ => {}
    }
}

/// What an operator registers when it starts; nobody is asked anything.
fn operator_registry() -> TestResult<Registry> {
    let client = kube::Client::try_from(kube::Config::new("http://127.0.0.1:1".parse()?))?;
    let surroundings = Surroundings { image: String::new(), control_service: String::new() };
    let (_leads, leadership) = watch::channel(Leadership::Leading);
    let shared = Shared {
        world: World::new(client, surroundings),
        clusters: Clusters::new(leadership),
        metrics: Metrics::default(),
        setup: Setup::default(),
        reporter: String::new(),
    };
    Ok(shared.registry())
}

/// Every series that a gateway, a business member and an operator export, as they export it.
fn exported() -> TestResult<BTreeSet<String>> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(im_business::metrics::Metrics::default()));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    text += &im_gateway::metrics::Metrics::new().render();
    prometheus_client::encoding::text::encode(&mut text, &operator_registry()?)?;
    let mut names = BTreeSet::new();
    for line in text.lines() {
        let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) else { continue };
        names.insert(if kind == "counter" { format!("{name}_total") } else { name.to_owned() });
    }
    Ok(names)
}

/// The words of a PromQL expression that name a series of ours: outside of braces and quotes, with our prefix.
fn series_of(expression: &str) -> BTreeSet<String> {
    let mut depth = 0_u32;
    let outside: String = expression
        .chars()
        .map(|c| {
            match c {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            if depth > 0 { ' ' } else { c }
        })
        .collect();
    let words = outside.split(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != ':');
    words.filter(|word| word.starts_with("im_") || word.starts_with("imcluster_")).map(str::to_owned).collect()
}

#[tokio::test]
async fn alerts_and_dashboard_use_series_that_exist() -> TestResult {
    let exported = exported()?;
    let (alerts, dashboard) = (Value::from(alerts()?), dashboard()?);
    let mut expressions = Vec::new();
    find(&alerts, "expr", &mut expressions);
    find(&dashboard, "expr", &mut expressions);
    find(&dashboard["templating"], "query", &mut expressions);
    for expression in &expressions {
        let series = series_of(expression);
        assert!(!series.is_empty() || *expression == "prometheus", "no series of ours: {expression}");
        let unknown: Vec<&String> = series.difference(&exported).collect();
        assert!(unknown.is_empty(), "{unknown:?} in {expression}: exported are {exported:#?}");
    }
    // Runbooks name series too.
    let mut runbooks = Vec::new();
    find(&alerts, "description", &mut runbooks);
    for runbook in runbooks {
        let unknown: Vec<String> = series_of(runbook).difference(&exported).cloned().collect();
        assert!(unknown.is_empty(), "{unknown:?} in the runbook {runbook}");
    }
    Ok(())
}

#[test]
fn each_alert_tells_what_to_do() -> TestResult {
    for alert in alerts()? {
        let name = text(&alert, "/alert");
        assert!(["critical", "warning"].contains(&text(&alert, "/labels/severity").as_str()), "{name}: severity");
        assert!((20..=120).contains(&text(&alert, "/annotations/summary").len()), "{name}: summary");
        assert!(
            text(&alert, "/annotations/description").contains('`'),
            "{name}: the runbook names no command or series"
        );
    }
    Ok(())
}

#[test]
fn the_dashboard_is_whole() -> TestResult {
    let dashboard = dashboard()?;
    let panels = dashboard["panels"].as_array().cloned().unwrap_or_default();
    let ids: BTreeSet<String> = panels.iter().map(|panel| panel["id"].to_string()).collect();
    assert_eq!(ids.len(), panels.len(), "an id is used twice");
    let mut taken = BTreeSet::new();
    for panel in &panels {
        let title = text(panel, "/title");
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap_or(u64::MAX);
        assert!(!title.is_empty() && at("x").saturating_add(at("w")) <= 24, "{panel}");
        for cell in (at("x")..at("x") + at("w")).flat_map(|x| (at("y")..at("y") + at("h")).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title} lies on another panel");
        }
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
            let expression = text(target, "/expr");
            assert!(expression.contains(r#"namespace="$namespace", imcluster="$imcluster""#), "{title}: {expression}");
        }
    }
    Ok(())
}

/// The alerts as Prometheus itself evaluates them over time.
#[test]
fn alerts_fire_when_they_should() -> TestResult {
    let program = need!("promtool");
    let rules = chart().join("files/alerts.yaml");
    let check = Command::new(&program).args(["check", "rules"]).arg(&rules).output()?;
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/alerts.yaml");
    let test = Command::new(&program).args(["test", "rules"]).arg(cases).output()?;
    assert!(
        test.status.success(),
        "{}{}",
        String::from_utf8_lossy(&test.stdout),
        String::from_utf8_lossy(&test.stderr)
    );
    Ok(())
}
