//! The name service that the configuration asks for, and what goes by it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, NameProvider, kubernetes_api};
use crate::http::{Discovery, Front, FrontConfig, Names, keep_discovered_workers};
use crate::naming::NameService;
use crate::naming::fixed::FixedNames;
use crate::naming::kubernetes::{Kubernetes, KubernetesOptions};
use crate::naming::polaris::{Polaris, PolarisOptions};

/// Where Kubernetes tells a pod its namespace.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// Polaris' namespace where none is named, as KsanaLLM's router has it.
const POLARIS_NAMESPACE: &str = "Production";

/// Begins to follow the configured names, until `shutdown`; `None` where there are none to follow.
pub(super) fn start(
    config: &Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<Option<Arc<dyn NameService>>> {
    let service = &config.name_service;
    let names = config.followed_names();
    if names.is_empty() {
        return Ok(None);
    }
    let max_age = Duration::from_secs(service.max_age_s);
    let given = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    let started: Arc<dyn NameService> = match service.provider {
        NameProvider::Auto => return Ok(None),
        NameProvider::Static => {
            Arc::new(FixedNames::new(config.name.iter().flat_map(|entry| entry.endpoints())))
        }
        NameProvider::Kubernetes => {
            let api = service.kubernetes_api.clone().or_else(kubernetes_api);
            let options = KubernetesOptions {
                api: api.context("name_service.kubernetes_api is not given")?,
                namespace: service.namespace.clone().unwrap_or_else(own_namespace),
                ca: given(&service.kubernetes_ca),
                token_file: given(&service.kubernetes_token_file),
                max_age,
            };
            Kubernetes::start(options, &names, shutdown).map_err(anyhow::Error::msg)?
        }
        NameProvider::Polaris => {
            let options = PolarisOptions {
                servers: service.polaris_servers.clone(),
                namespace: service.namespace.clone().unwrap_or_else(|| POLARIS_NAMESPACE.to_owned()),
                ca: service.polaris_ca.clone(),
                token_file: service.polaris_token_file.clone(),
                refresh: Duration::from_millis(service.refresh_ms),
                max_age,
                push_gateway: service.polaris_push_gateway.clone(),
                caller: config.replica.name.clone(),
                report_every: None,
            };
            Polaris::start(options, &names, shutdown).map_err(anyhow::Error::msg)?
        }
    };
    tracing::info!(provider = started.provider(), names = names.join(", "), "following names");
    Ok(Some(started))
}

/// The namespace that this pod is in.
fn own_namespace() -> String {
    let text = std::fs::read_to_string(PathBuf::from(NAMESPACE_FILE)).unwrap_or_default();
    match text.trim() {
        "" => "default".to_owned(),
        namespace => namespace.to_owned(),
    }
}

/// Has a front go by it.
pub(super) fn use_in(front: &mut FrontConfig, config: &Config, service: Option<Arc<dyn NameService>>) {
    let named = &config.name_service;
    front.names = service
        .clone()
        .filter(|_| config.ksana.enabled)
        .map(|service| Names::new(service, named.prefill_service.clone(), named.decode_service.clone()));
    front.name_service = service;
}

/// Keeps the workers of `[[discover]]` until `shutdown`.
pub(super) fn discover(config: &Config, front: &Arc<Front>, shutdown: CancellationToken) {
    let Some(service) = front.config.name_service.clone().filter(|_| !config.discover.is_empty()) else {
        return;
    };
    let discovery = |entry: &crate::config::DiscoverEntry| {
        let entry = entry.clone();
        Discovery {
            name: entry.name.clone(),
            worker: Box::new(move |address, weight| entry.worker(address, weight)),
        }
    };
    let discoveries = config.discover.iter().map(discovery).collect();
    tokio::spawn(keep_discovered_workers(Arc::clone(front), discoveries, service, shutdown));
}
