//! A small Kubernetes API server in memory: objects by their path, resource versions, conflicts. It answers what the
//! controller asks; it validates nothing, and it has no watches.

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Query, State};
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Json, Response};
use k8s_openapi::ByteString;
use kube::{Client, Config};
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use tokio::net::TcpListener;

/// A write that was asked for: `POST services/chat`.
pub type Write = String;

#[derive(Default)]
struct Store {
    /// By path, `/api/v1/namespaces/talk/services/chat`.
    objects: BTreeMap<String, Value>,
    version: u64,
    writes: Vec<Write>,
    /// The next writes to these paths are answered with these codes.
    faults: HashMap<String, u16>,
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
    pub fn put(&self, path: &str, mut object: Value) {
        let mut store = self.store.lock();
        store.version += 1;
        let version = store.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-{version}"));
        }
        store.objects.insert(path.to_owned(), object);
    }

    /// The object at that path.
    pub fn get(&self, path: &str) -> Option<Value> {
        self.store.lock().objects.get(path).cloned()
    }

    /// Takes the object away, as somebody else would.
    pub fn remove(&self, path: &str) {
        self.store.lock().objects.remove(path);
    }

    /// The paths of all objects, without their common beginning.
    pub fn names(&self) -> Vec<String> {
        self.store.lock().objects.keys().map(|path| short(path)).collect()
    }

    /// Forgets and returns what was written since the last call.
    pub fn take_writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.store.lock().writes)
    }

    /// The next write to that path is answered with that code.
    pub fn fail_next(&self, path: &str, code: u16) {
        self.store.lock().faults.insert(path.to_owned(), code);
    }
}

/// `services/chat` of `/api/v1/namespaces/talk/services/chat`.
fn short(path: &str) -> String {
    path.split_once("/namespaces/").and_then(|(_, rest)| rest.split_once('/')).map_or(path, |(_, rest)| rest).to_owned()
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

async fn answer(
    State(server): State<ApiServer>,
    method: Method,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
    body: Bytes,
) -> Response {
    let mut store = server.store.lock();
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
    if method != Method::GET {
        let what = if status { "/status" } else { "" };
        store.writes.push(format!("{method} {}{what}", short(&target)));
        if let Some(code) = store.faults.remove(&target) {
            return refuse(code, "Fault", "as the test wants it");
        }
    }
    let known = store.objects.get(&target).cloned();
    let wanted = object["metadata"]["resourceVersion"].as_str();
    if let (Some(wanted), Some(known)) = (wanted, &known)
        && known["metadata"]["resourceVersion"] != wanted
    {
        return refuse(409, "Conflict", "the object has been modified");
    }
    store.version += 1;
    let version = store.version;
    let stored = match (method.as_str(), known) {
        ("GET", Some(known)) => return Json(known).into_response(),
        ("GET", None) if query.contains_key("labelSelector") => {
            let prefix = format!("{path}/");
            let items: Vec<&Value> =
                store.objects.iter().filter(|(path, _)| path.starts_with(&prefix)).map(|(_, object)| object).collect();
            let list = json!({ "kind": "List", "apiVersion": "v1", "metadata": {}, "items": items });
            return Json(list).into_response();
        }
        ("DELETE", Some(known)) => {
            store.objects.remove(&target);
            return Json(known).into_response();
        }
        ("POST", Some(_)) => return refuse(409, "AlreadyExists", "it exists already"),
        ("PUT" | "DELETE", None) | ("GET", None) => return refuse(404, "NotFound", "there is none"),
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
    drop(store);
    server.put(&target, stored);
    let _ = version;
    Json(server.get(&target).expect("just stored")).into_response()
}
