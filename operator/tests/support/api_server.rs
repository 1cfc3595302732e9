//! A small Kubernetes API server in memory: objects by their path, resource versions, conflicts, watches. It answers what
//! the controller asks; it validates nothing, and selectors select all of a kind.
// Each test file uses a part of it.
#![allow(dead_code)]

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use futures::stream;
use k8s_openapi::ByteString;
use kube::{Client, Config};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::broadcast;

/// A write that was asked for: `POST services/chat`.
pub type Write = String;

/// A right that a call needs: API group, resource, verb.
pub type Right = (String, String, String);

/// Changes that a slow watch may be behind.
const CHANGES_MAX: usize = 4_096;

struct Store {
    /// By path, `/api/v1/namespaces/talk/services/chat`.
    objects: BTreeMap<String, Value>,
    version: u64,
    writes: Vec<Write>,
    /// The next writes to these paths are answered with these codes.
    faults: HashMap<String, u16>,
    /// All reads of these paths are answered with these codes.
    unreadable: HashMap<String, u16>,
    called: BTreeSet<Right>,
    /// Each change: the path, and what a watch says of it.
    changes: broadcast::Sender<(String, Value)>,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            objects: BTreeMap::new(),
            version: 0,
            writes: Vec::new(),
            faults: HashMap::new(),
            unreadable: HashMap::new(),
            called: BTreeSet::new(),
            changes: broadcast::channel(CHANGES_MAX).0,
        }
    }
}

impl Store {
    fn set(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{}", self.version));
        }
        self.objects.insert(path.to_owned(), object.clone());
        // Nobody may be watching.
        let _ = self.changes.send((path.to_owned(), json!({ "type": "MODIFIED", "object": object })));
        object
    }

    fn unset(&mut self, path: &str) {
        self.version += 1;
        if let Some(mut object) = self.objects.remove(path) {
            object["metadata"]["resourceVersion"] = json!(self.version.to_string());
            let _ = self.changes.send((path.to_owned(), json!({ "type": "DELETED", "object": object })));
        }
    }
}

/// The server; it ends with the test's runtime.
#[derive(Clone, Default)]
pub struct ApiServer {
    store: Arc<Mutex<Store>>,
}

impl ApiServer {
    /// Starts one without objects.
    pub async fn start() -> (Self, Client) {
        let server = Self::default();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let router = Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        let config = Config::new(format!("http://{address}").parse().expect("a URL"));
        (server, Client::try_from(config).expect("a client"))
    }

    /// Puts an object there, as somebody else would.
    pub fn put(&self, path: &str, object: Value) {
        self.store.lock().set(path, object);
    }

    /// The object at that path.
    pub fn get(&self, path: &str) -> Option<Value> {
        self.store.lock().objects.get(path).cloned()
    }

    /// Takes the object away, as somebody else would.
    pub fn remove(&self, path: &str) {
        self.store.lock().unset(path);
    }

    /// The paths of all objects, without their common beginning.
    pub fn names(&self) -> Vec<String> {
        self.store.lock().objects.keys().map(|path| short(path)).collect()
    }

    /// Forgets and returns what was written since the last call.
    pub fn take_writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.store.lock().writes)
    }

    /// What was called since the start.
    pub fn called(&self) -> BTreeSet<Right> {
        self.store.lock().called.clone()
    }

    /// The next write to that path is answered with that code.
    pub fn fail_next(&self, path: &str, code: u16) {
        self.store.lock().faults.insert(path.to_owned(), code);
    }

    /// Each read of that path is answered with that code.
    pub fn fail_reads(&self, path: &str, code: u16) {
        self.store.lock().unreadable.insert(path.to_owned(), code);
    }

    /// That path is read as ever.
    pub fn heal_reads(&self, path: &str) {
        self.store.lock().unreadable.remove(path);
    }
}

/// `services/chat` of `/api/v1/namespaces/talk/services/chat`.
fn short(path: &str) -> String {
    path.split_once("/namespaces/").and_then(|(_, rest)| rest.split_once('/')).map_or(path, |(_, rest)| rest).to_owned()
}

/// What a path names: API group, resource and, if it is one object, its name.
fn parts(path: &str) -> (String, String, Option<String>) {
    let mut words = path.split('/').skip(1);
    let group = match words.next() {
        Some("apis") => words.next().unwrap_or_default(),
        _ => "",
    };
    let rest: Vec<&str> = words.skip(1).collect();
    let rest = match rest.as_slice() {
        ["namespaces", _, rest @ ..] => rest,
        rest => rest,
    };
    let word = |index: usize| rest.get(index).map(|word| (*word).to_owned());
    (group.to_owned(), word(0).unwrap_or_default(), word(1))
}

fn refuse(code: u16, reason: &str, message: &str) -> Response {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code,
    });
    (StatusCode::from_u16(code).expect("a code"), Json(status)).into_response()
}

/// RFC 7386; server-side apply by the only manager comes to the same here.
fn merge(target: &mut Value, patch: &Value) {
    match patch {
        Value::Object(patch) => {
            if !target.is_object() {
                *target = json!({});
            }
            for (key, value) in patch {
                if value.is_null() {
                    target.as_object_mut().expect("an object").remove(key);
                } else {
                    merge(&mut target[key], value);
                }
            }
        }
        other => *target = other.clone(),
    }
}

fn version_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().and_then(|version| version.parse().ok()).unwrap_or(0)
}

/// What changes below `prefix` after that version, for ever.
fn watch(store: &Store, prefix: String, after: u64) -> Response {
    let missed = store.objects.iter().filter(|(path, object)| path.starts_with(&prefix) && version_of(object) > after);
    let missed: VecDeque<Value> = missed.map(|(_, object)| json!({ "type": "MODIFIED", "object": object })).collect();
    let changes = store.changes.subscribe();
    let events = stream::unfold((missed, changes, prefix), |(mut missed, mut changes, prefix)| async move {
        let event = loop {
            if let Some(event) = missed.pop_front() {
                break event;
            }
            match changes.recv().await {
                Ok((path, event)) if path.starts_with(&prefix) => break event,
                Ok(_) => {}
                Err(_) => return None,
            }
        };
        Some((Ok::<_, Infallible>(format!("{event}\n")), (missed, changes, prefix)))
    });
    Body::from_stream(events).into_response()
}

fn read(store: &mut Store, path: &str, query: &HashMap<String, String>) -> Response {
    let (group, resource, name) = parts(path);
    let watches = query.get("watch").is_some_and(|watch| watch == "true");
    let verb = match (&name, watches) {
        (Some(_), _) => "get",
        (None, true) => "watch",
        (None, false) => "list",
    };
    store.called.insert((group, resource, verb.to_owned()));
    if let Some(code) = store.unreadable.get(path).copied() {
        let reason = if code == 404 { "NotFound" } else { "Fault" };
        return refuse(code, reason, "as the test wants it");
    }
    if name.is_some() {
        return match store.objects.get(path) {
            Some(known) => Json(known.clone()).into_response(),
            None => refuse(404, "NotFound", "there is none"),
        };
    }
    let prefix = format!("{path}/");
    if watches {
        let after = query.get("resourceVersion").and_then(|version| version.parse().ok()).unwrap_or(0);
        return watch(store, prefix, after);
    }
    let items: Vec<&Value> =
        store.objects.iter().filter(|(path, _)| path.starts_with(&prefix)).map(|(_, object)| object).collect();
    let metadata = json!({ "resourceVersion": store.version.to_string() });
    Json(json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items })).into_response()
}

async fn answer(
    State(server): State<ApiServer>,
    method: Method,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
    body: Bytes,
) -> Response {
    let mut store = server.store.lock();
    if method == Method::GET {
        return read(&mut store, uri.path(), &query);
    }
    let (path, status) = match uri.path().strip_suffix("/status") {
        Some(path) => (path.to_owned(), true),
        None => (uri.path().to_owned(), false),
    };
    let mut object: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let target = if method == Method::POST {
        format!("{path}/{}", object["metadata"]["name"].as_str().unwrap_or_default())
    } else {
        path.clone()
    };
    let what = if status { "/status" } else { "" };
    store.writes.push(format!("{method} {}{what}", short(&target)));
    let known = store.objects.get(&target).cloned();
    let (group, resource, _) = parts(&target);
    let mut verbs = match method.as_str() {
        "POST" => vec!["create"],
        "PUT" => vec!["update"],
        "PATCH" => vec!["patch"],
        _ => vec!["delete"],
    };
    // Server-side apply of what is not there.
    if method == Method::PATCH && known.is_none() && !status {
        verbs.push("create");
    }
    for verb in verbs {
        store.called.insert((group.clone(), format!("{resource}{what}"), verb.to_owned()));
    }
    if let Some(code) = store.faults.remove(&target) {
        return refuse(code, "Fault", "as the test wants it");
    }
    let as_seen = if method == Method::DELETE { &object["preconditions"] } else { &object["metadata"] };
    let wanted = as_seen["resourceVersion"].as_str();
    if let Some(known) = &known
        && ["uid", "resourceVersion"]
            .iter()
            .any(|key| !as_seen[key].is_null() && as_seen[key] != known["metadata"][key])
    {
        return refuse(409, "Conflict", "the object has been modified");
    }
    let stored = match (method.as_str(), known) {
        ("DELETE", Some(known)) => {
            store.unset(&target);
            return Json(known).into_response();
        }
        ("POST", Some(_)) => return refuse(409, "AlreadyExists", "it exists already"),
        ("PUT" | "DELETE", None) => return refuse(404, "NotFound", "there is none"),
        ("PATCH", None) if status || wanted.is_some() => return refuse(404, "NotFound", "there is none"),
        ("PATCH", known) => {
            let mut merged = known.unwrap_or_else(|| json!({}));
            merge(&mut merged, &object);
            merged
        }
        _ => {
            if let Some(texts) = object["stringData"].as_object().cloned() {
                for (key, text) in texts {
                    let bytes = ByteString(text.as_str().unwrap_or_default().as_bytes().to_vec());
                    object["data"][key] = serde_json::to_value(bytes).expect("base64");
                }
            }
            object
        }
    };
    Json(store.set(&target, stored)).into_response()
}
