//! Kubernetes: lists and watches, tokens and authorities that change, an API server that is away.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::super::NameService as _;
use super::super::kubernetes::{Kubernetes, KubernetesOptions};
use super::fake::{Asked, Fake, Says};
use super::{eventually, trouble, until_usable, usable};
use crate::tls::testing::Certs;

const NAME: &str = "vllm:http";

#[derive(Default)]
struct Cluster {
    /// What a list says.
    slices: Vec<Value>,
    version: u64,
    /// Watches that are open.
    watches: Vec<mpsc::UnboundedSender<String>>,
    /// The token that is good.
    token: String,
    /// Versions below this are not known any more.
    oldest: u64,
    forbidden: bool,
}

type Shared = Arc<Mutex<Cluster>>;

fn slice(version: u64, ips: &[&str]) -> Value {
    let endpoints: Vec<Value> = ips
        .iter()
        .map(|ip| json!({"addresses": [ip], "conditions": {"ready": true, "serving": true, "terminating": false}}))
        .collect();
    json!({
        "metadata": {"name": "vllm-abc", "namespace": "prod", "resourceVersion": version.to_string()},
        "addressType": "IPv4", "endpoints": endpoints, "ports": [{"name": "http", "port": 8000, "protocol": "TCP"}],
    })
}

fn status(code: u16, message: &str) -> Value {
    json!({"kind": "Status", "status": "Failure", "code": code, "message": message})
}

/// The API server's side.
fn answer(cluster: &Mutex<Cluster>, asked: &Asked) -> Says {
    let mut cluster = cluster.lock();
    if asked.header("authorization") != Some(&format!("Bearer {}", cluster.token)) {
        return Says::Whole(401, status(401, "Unauthorized").to_string());
    }
    if cluster.forbidden {
        return Says::Whole(403, status(403, "endpointslices.discovery.k8s.io is forbidden").to_string());
    }
    let path = asked.line.split(['?', ' ']).nth(1).unwrap_or_default();
    assert_eq!(path, "/apis/discovery.k8s.io/v1/namespaces/prod/endpointslices");
    assert_eq!(asked.query("labelSelector"), Some("kubernetes.io%2Fservice-name%3Dvllm"));
    if asked.query("watch").is_none() {
        let list = json!({
            "kind": "EndpointSliceList", "metadata": {"resourceVersion": cluster.version.to_string()},
            "items": cluster.slices,
        });
        return Says::Whole(200, list.to_string());
    }
    assert_eq!(asked.query("allowWatchBookmarks"), Some("true"));
    assert!(asked.query("timeoutSeconds").is_some_and(|seconds| seconds.parse::<u64>().is_ok()));
    let from: u64 = asked.query("resourceVersion").unwrap().parse().unwrap();
    if from < cluster.oldest {
        return Says::Whole(410, status(410, "too old resource version").to_string());
    }
    let (lines, receiver) = mpsc::unbounded_channel();
    cluster.watches.push(lines);
    Says::Lines(receiver)
}

fn says(cluster: &Shared, kind: &str, object: &Value) {
    let line = format!("{}\n", json!({"type": kind, "object": object}));
    for watch in &cluster.lock().watches {
        let _ = watch.send(line.clone());
    }
}

struct Setting {
    cluster: Shared,
    certs: Certs,
    token_file: PathBuf,
    stop: CancellationToken,
}

impl Drop for Setting {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn setting() -> Setting {
    let certs = Certs::new("kube");
    let token_file = certs.folder.path().join("token");
    fs::write(&token_file, "one\n").unwrap();
    let cluster = Cluster {
        slices: vec![slice(5, &["10.0.0.1"])],
        version: 7,
        token: "one".to_owned(),
        ..Cluster::default()
    };
    Setting { cluster: Arc::new(Mutex::new(cluster)), certs, token_file, stop: CancellationToken::new() }
}

impl Setting {
    async fn api(&self, at: Option<std::net::SocketAddr>) -> Fake {
        let files = self.certs.server("api");
        let read = |path: &PathBuf| fs::read(path).unwrap();
        let key = crate::tls::files::certified_key(
            (&files.cert, &read(&files.cert)),
            (&files.key, &read(&files.key)),
        )
        .unwrap();
        let config = rustls::ServerConfig::builder_with_provider(crate::tls::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        let cluster = Arc::clone(&self.cluster);
        Fake::start(at, Some(TlsAcceptor::from(Arc::new(config))), move |asked| answer(&cluster, asked)).await
    }

    fn follow(&self, api: &Fake, max_age: Duration) -> Arc<Kubernetes> {
        let options = KubernetesOptions {
            api: format!("https://{}", api.address),
            namespace: "prod".to_owned(),
            ca: Some(self.certs.ca_file()),
            token_file: Some(self.token_file.clone()),
            max_age,
        };
        Kubernetes::start(options, &[NAME.to_owned()], &self.stop).unwrap()
    }

    async fn watched(&self, times: usize) {
        eventually("it is watched", || self.cluster.lock().watches.len() >= times).await;
    }
}

const LONG: Duration = Duration::from_secs(3600);

fn is_list(asked: &Asked) -> bool {
    asked.query("watch").is_none()
}

#[tokio::test]
async fn a_service_is_listed_once_and_watched_from_there_on() {
    let here = setting();
    let api = here.api(None).await;
    let names = here.follow(&api, LONG);
    until_usable(&*names, NAME, &["10.0.0.1:8000"]).await;
    here.watched(1).await;
    assert_eq!(api.asked.lock()[1].query("resourceVersion"), Some("7"), "from the list on");

    says(&here.cluster, "MODIFIED", &slice(8, &["10.0.0.1", "10.0.0.2"]));
    until_usable(&*names, NAME, &["10.0.0.1:8000", "10.0.0.2:8000"]).await;
    let before = names.answer(NAME).unwrap();
    says(&here.cluster, "BOOKMARK", &json!({"kind": "EndpointSlice", "metadata": {"resourceVersion": "40"}}));
    // The watch ends, as it does by itself after a while.
    here.cluster.lock().watches.clear();
    here.watched(1).await;
    assert_eq!(api.asked.lock()[2].query("resourceVersion"), Some("40"), "from the bookmark on");
    assert!(Arc::ptr_eq(&before, &names.answer(NAME).unwrap()));

    says(&here.cluster, "DELETED", &slice(41, &[]));
    until_usable(&*names, NAME, &[]).await;
    assert_eq!(api.count(is_list), 1);
    let state = &names.states()[0];
    assert_eq!((state.failures, state.lists, state.changes, state.expired), (0, 1, 3, false));
}

#[tokio::test]
async fn what_is_not_known_any_more_is_listed_anew() {
    let here = setting();
    let api = here.api(None).await;
    let names = here.follow(&api, LONG);
    here.watched(1).await;
    // In answer to a watch.
    {
        let mut cluster = here.cluster.lock();
        (cluster.oldest, cluster.version, cluster.slices) = (50, 60, vec![slice(60, &["10.0.0.9"])]);
        cluster.watches.clear();
    }
    until_usable(&*names, NAME, &["10.0.0.9:8000"]).await;
    here.watched(1).await;
    // And in the middle of one.
    {
        let mut cluster = here.cluster.lock();
        (cluster.version, cluster.slices) = (70, vec![slice(70, &["10.0.0.8"])]);
    }
    says(&here.cluster, "ERROR", &status(410, "too old"));
    until_usable(&*names, NAME, &["10.0.0.8:8000"]).await;
    let state = &names.states()[0];
    assert_eq!((state.lists, state.failures), (3, 0), "that is no failure");
}

#[tokio::test]
async fn a_token_that_was_replaced_is_read_again() {
    let here = setting();
    let api = here.api(None).await;
    let names = here.follow(&api, LONG);
    here.watched(1).await;
    {
        let mut cluster = here.cluster.lock();
        cluster.token = "two".to_owned();
        cluster.watches.clear();
    }
    eventually("it is told why", || trouble(&*names).contains("401")).await;
    assert!(trouble(&*names).contains(&here.token_file.display().to_string()), "{}", trouble(&*names));
    assert_eq!(usable(&*names, NAME).unwrap(), ["10.0.0.1:8000"], "what was known holds");
    fs::write(&here.token_file, "two").unwrap();
    here.watched(1).await;
    eventually("all is well", || names.states()[0].trouble.is_none()).await;
}

#[tokio::test]
async fn an_api_server_that_is_away_leaves_the_last_answer_until_that_is_too_old() {
    let here = setting();
    let api = here.api(None).await;
    let address = api.address;
    let names = here.follow(&api, Duration::from_millis(1500));
    here.watched(1).await;
    api.stop();
    eventually("it is noticed", || !trouble(&*names).is_empty()).await;
    assert_eq!(usable(&*names, NAME).unwrap(), ["10.0.0.1:8000"]);
    eventually("it is too old", || names.states()[0].expired).await;
    assert_eq!(usable(&*names, NAME), None);

    here.cluster.lock().slices = vec![slice(9, &["10.0.0.3"])];
    let _back = here.api(Some(address)).await;
    until_usable(&*names, NAME, &["10.0.0.3:8000"]).await;
}

#[tokio::test]
async fn refusals_are_told_with_what_helps() {
    let here = setting();
    here.cluster.lock().forbidden = true;
    let api = here.api(None).await;
    let names = here.follow(&api, LONG);
    eventually("it is told", || !trouble(&*names).is_empty()).await;
    let text = trouble(&*names);
    assert!(text.contains("403") && text.contains("get, list and watch") && text.contains("prod"), "{text}");
    assert_eq!(usable(&*names, NAME), None);

    // Another authority than the one that is trusted.
    let other = Certs::new("other");
    let options = KubernetesOptions {
        api: format!("https://{}", api.address),
        namespace: "prod".to_owned(),
        ca: Some(other.ca_file()),
        token_file: None,
        max_age: LONG,
    };
    let names = Kubernetes::start(options, &[NAME.to_owned()], &here.stop).unwrap();
    eventually("it is told", || trouble(&*names).contains("certificate")).await;
}
