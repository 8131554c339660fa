//! `[[name]]` and `[[discover]]`: names that stand here, and names whose endpoints become workers.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Role;
use super::environment::kubernetes_api;
use super::errors::ConfigError;
use super::schema::Config;
use super::values::check_host_port;
use crate::admin_types::{ModelEntry, RegisterRequest};
use crate::naming::answer::{MAX_WEIGHT, WEIGHT};
use crate::naming::slices::ServiceName;
use crate::state::worker::{Connector, EngineKind, WorkerRole, WorkerSource};

/// Where names are looked up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NameProvider {
    /// In the replicated registry.
    #[default]
    Auto,
    /// In the configuration.
    Static,
    /// In Kubernetes' EndpointSlices.
    Kubernetes,
    /// In Polaris.
    Polaris,
}

impl NameProvider {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["auto", "static", "kubernetes", "polaris"];
}

/// An entry of `[[name]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameEntry {
    /// The name. Several entries with the same one add up.
    pub name: String,
    /// `host:port` of each endpoint.
    pub addresses: Vec<String>,
    /// The share of each of these endpoints; 100 where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
}

impl NameEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &["name", "addresses", "weight"];

    /// Says what is wrong with it by itself.
    pub fn check(&self) -> Result<(), String> {
        if self.name.is_empty() {
            return Err("name is empty".to_owned());
        }
        if self.addresses.is_empty() {
            return Err("addresses is empty; name some, such as [\"10.0.0.7:8088\"]".to_owned());
        }
        if self.weight.is_some_and(|weight| !(1..=MAX_WEIGHT).contains(&weight)) {
            return Err(format!("weight must be 1 to {MAX_WEIGHT}"));
        }
        self.addresses
            .iter()
            .try_for_each(|address| check_host_port(address).map_err(|why| format!("{address}: {why}")))
    }

    /// Name, address and weight of each endpoint.
    pub fn endpoints(&self) -> impl Iterator<Item = (String, String, u32)> {
        let weight = self.weight.unwrap_or(WEIGHT);
        self.addresses.iter().map(move |address| (self.name.clone(), address.clone(), weight))
    }
}

/// An entry of `[[discover]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscoverEntry {
    /// The name whose endpoints become workers.
    pub name: String,
    /// Speak TLS to them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub https: Option<bool>,
    /// The dialect spoken there; what the engine says where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineKind>,
    /// Models served; asked of each engine where left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelEntry>,
    /// The part of a request they do; aggregated where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<WorkerRole>,
    /// How those that do a part of a request hand the KV cache on; as the engine ordinarily does where
    /// left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connector: Option<Connector>,
    /// Port at which decode workers find prefill workers (SGLang, Mooncake); their host is the endpoint's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bootstrap_port: Option<u16>,
    /// Data-parallel ranks of each; what the engine says where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dp_ranks: Option<u32>,
    /// Labels of each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Share of each; the name service's weight where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Speak HTTP/2 to them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http2: Option<bool>,
    /// Requests each should have at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_requests: Option<u32>,
}

impl DiscoverEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &[
        "name",
        "https",
        "engine",
        "models",
        "role",
        "connector",
        "bootstrap_port",
        "dp_ranks",
        "labels",
        "weight",
        "http2",
        "max_requests",
    ];

    /// The registration of the worker at an address. Its id is the address.
    pub fn worker(&self, address: &str, weight: u32) -> RegisterRequest {
        let scheme = if self.https == Some(true) { "https" } else { "http" };
        let mut request = RegisterRequest::new(format!("{scheme}://{address}"));
        request.engine = self.engine;
        request.models.clone_from(&self.models);
        request.role = self.role;
        request.connector = self.connector;
        request.bootstrap_port = self.bootstrap_port;
        request.dp_ranks = self.dp_ranks;
        request.labels.clone_from(&self.labels);
        request.weight = Some(self.weight.unwrap_or_else(|| weight.clamp(1, 1000)));
        request.http2 = self.http2;
        request.max_requests = self.max_requests;
        request
    }
}

impl Config {
    /// The names that are to be followed, each once.
    pub fn followed_names(&self) -> Vec<String> {
        let service = &self.name_service;
        let of_ksana = [&service.prefill_service, &service.decode_service];
        let of_ksana = of_ksana.into_iter().filter(|_| self.ksana.enabled).cloned();
        let mut names: Vec<String> =
            of_ksana.chain(self.discover.iter().map(|entry| entry.name.clone())).collect();
        names.sort();
        names.dedup();
        names
    }
}

/// Longest name.
const MAX_NAME: usize = 256;

/// What is wrong with the name service as a whole.
pub(super) fn check(config: &Config, role: Role, problems: &mut Vec<ConfigError>) {
    let service = &config.name_service;
    for (at, entry) in config.discover.iter().enumerate() {
        let key = format!("discover[{at}]");
        if role == Role::Edge {
            let error = ConfigError::about(&key, "is for replicas: an edge keeps no workers");
            problems.push(error.fix("take it out here, and have it at the replicas"));
        }
        if service.provider == NameProvider::Auto {
            let error = ConfigError::about(&key, "nobody is there to look names up");
            problems.push(error.fix("set name_service.provider to static, kubernetes or polaris"));
        }
        if let Err(message) = entry.worker("127.0.0.1:8000", WEIGHT).to_spec(WorkerSource::Name) {
            problems.push(ConfigError::about(&key, message));
        }
        if config.discover[..at].iter().any(|earlier| earlier.name == entry.name) {
            problems.push(ConfigError::about(&key, format!("{} is discovered twice", entry.name)));
        }
    }
    for name in config.followed_names() {
        let at = config.discover.iter().position(|entry| entry.name == name);
        let key = match at {
            Some(at) => format!("discover[{at}]"),
            None if name == service.prefill_service => "name_service.prefill_service".to_owned(),
            None => "name_service.decode_service".to_owned(),
        };
        let wrong = match service.provider {
            _ if !(1..=MAX_NAME).contains(&name.len()) => {
                Some((format!("a name is 1 to {MAX_NAME} bytes long"), String::new()))
            }
            NameProvider::Static if !config.name.iter().any(|entry| entry.name == name) => Some((
                format!("no [[name]] says what {name:?} stands for"),
                format!("add one: name = {name:?}, addresses = [\"10.0.0.7:8088\"]"),
            )),
            NameProvider::Kubernetes => {
                ServiceName::parse(&name).err().map(|why| (why, "such as prod/vllm:http".to_owned()))
            }
            _ => None,
        };
        if let Some((message, fix)) = wrong {
            let error = ConfigError::about(&key, message);
            problems.push(if fix.is_empty() { error } else { error.fix(fix) });
        }
    }
    if !config.name.is_empty() && service.provider != NameProvider::Static {
        let error = ConfigError::about("name[0]", "is read only where name_service.provider is static");
        problems.push(error.fix("set name_service.provider = \"static\", or take it out"));
    }
    urls(config, problems);
}

/// Addresses of name services.
fn urls(config: &Config, problems: &mut Vec<ConfigError>) {
    let service = &config.name_service;
    let is_url = |url: &str| {
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        rest.is_some_and(|rest| !rest.trim_end_matches('/').is_empty() && url.parse::<http::Uri>().is_ok())
    };
    let mut wrong = |key: &str, url: &str| {
        if !is_url(url) {
            let error = ConfigError::about(key, format!("{url:?} is no URL of a server"));
            problems.push(error.fix("write http://host:port or https://host:port"));
        }
    };
    if let Some(url) = &service.kubernetes_api {
        wrong("name_service.kubernetes_api", url);
    }
    service.polaris_servers.iter().for_each(|url| wrong("name_service.polaris_servers", url));
    if let Some(url) = &service.polaris_push_gateway {
        wrong("name_service.polaris_push_gateway", url);
    }
    if service.provider == NameProvider::Polaris && service.polaris_servers.is_empty() {
        let error = ConfigError::about("name_service.polaris_servers", "is empty: Polaris is to be asked");
        problems.push(error.fix("name its HTTP port: [\"http://10.0.0.1:8090\"]"));
    }
    let api = service.kubernetes_api.clone().or_else(kubernetes_api);
    if service.provider == NameProvider::Kubernetes && api.is_none() {
        let message = "is not given, and this process does not run in Kubernetes";
        let error = ConfigError::about("name_service.kubernetes_api", message);
        problems.push(error.fix("name the API server: https://host:port"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_say_what_is_wrong_with_them() {
        let read = |text: &str| toml::from_str::<NameEntry>(text).unwrap();
        let good = read("name = 'p'\naddresses = ['a:1', '[::1]:2']\nweight = 7");
        assert!(good.check().is_ok());
        assert_eq!(good.endpoints().nth(1), Some(("p".to_owned(), "[::1]:2".to_owned(), 7)));
        for wrong in [
            "name = ''\naddresses = ['a:1']",
            "name = 'p'\naddresses = []",
            "name = 'p'\naddresses = ['http://a:1']",
            "name = 'p'\naddresses = ['a:1']\nweight = 0",
        ] {
            assert!(read(wrong).check().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_worker_is_what_the_entry_says_at_the_endpoint() {
        let text = "name = 'vllm'\nhttps = true\nrole = 'decode'\nlabels = { zone = 'a' }";
        let entry: DiscoverEntry = toml::from_str(text).unwrap();
        let worker = entry.worker("10.0.0.1:8000", 5000);
        assert_eq!((worker.url.as_str(), worker.weight), ("https://10.0.0.1:8000", Some(1000)));
        assert_eq!((worker.role, worker.id, worker.probe), (Some(WorkerRole::Decode), None, None));
        assert_eq!(worker.labels["zone"], "a");
    }

    /// Everything that is wrong with a file.
    fn wrong_with(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("everline.toml");
        std::fs::write(&path, text).unwrap();
        match Config::load(Some(&path), &mut std::iter::empty(), &[]) {
            Ok(_) => String::new(),
            Err(errors) => errors.0.iter().map(|error| format!("{error}\n")).collect(),
        }
    }

    #[test]
    fn a_name_service_that_cannot_work_is_refused_with_the_remedy() {
        let kube = "[name_service]\nprovider = 'kubernetes'\nkubernetes_api = 'https://10.0.0.1:6443'\n";
        for (text, part) in [
            ("[[discover]]\nname = 'vllm'\n".to_owned(), "set name_service.provider to static"),
            (
                "[name_service]\nprovider = 'static'\n[[discover]]\nname = 'vllm'\n".to_owned(),
                "no [[name]] says what \"vllm\" stands for",
            ),
            (
                "[ksana]\nenabled = true\n[name_service]\nprovider = 'static'\n[[name]]\n\
                 name = 'prefill-service'\naddresses = ['a:1']\n"
                    .to_owned(),
                "name_service.decode_service",
            ),
            (format!("{kube}[[discover]]\nname = 'Vllm'\n"), "prod/vllm:http"),
            (format!("{kube}[[discover]]\nname = 'a'\n[[discover]]\nname = 'a'\n"), "a is discovered twice"),
            (format!("{kube}[[discover]]\nname = 'a'\ndp_ranks = 0\n"), "dp_ranks must be 1"),
            (format!("{kube}[[discover]]\nname = 'a'\nrule = 'b'\n"), "did you mean \"role\""),
            (format!("{kube}[[name]]\nname = 'a'\naddresses = ['a:1']\n"), "is read only where"),
            ("[name_service]\nprovider = 'polaris'\npolaris_servers = []\n".to_owned(), "name its HTTP port"),
            ("[name_service]\npolaris_servers = ['10.0.0.1:8090']\n".to_owned(), "write http://host:port"),
            ("[name_service]\npolaris_push_gateway = 'http://'\n".to_owned(), "is no URL of a server"),
            ("[name_service]\nmax_age_s = 5\n".to_owned(), "120"),
        ] {
            let wrong = wrong_with(&text);
            assert!(wrong.contains(part), "{text}\n{wrong}");
        }
        let good =
            format!("{kube}[[discover]]\nname = 'prod/vllm:http'\nrole = 'decode'\nlabels = {{ a = 'b' }}\n");
        assert_eq!(wrong_with(&good), "");
    }
}
