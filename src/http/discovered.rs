//! Workers that are endpoints of names: registered when they are there, drained while they go, removed
//! when they are gone.
//!
//! The leader of the control group does it, and a new leader goes on from the registry, where each such
//! worker has its name as a label. Only what was registered by name is touched: a worker with the same id
//! that somebody else registered is theirs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use tokio_util::sync::CancellationToken;

use super::front::{Front, Shard};
use super::register::register;
use crate::admin_types::RegisterRequest;
use crate::ids::WorkerId;
use crate::naming::{NameService, Standing};
use crate::routing::view::RegistryView;
use crate::state::command::ControlCommand;
use crate::state::worker::{NAME_LABEL, WorkerSource, WorkerSpec};

/// Time between two looks at the names.
const LOOK: Duration = Duration::from_secs(1);
/// Workers asked and registered at once.
const AT_ONCE: usize = 16;

/// Makes the registration of a worker of its address and weight.
pub type Registration = dyn Fn(&str, u32) -> RegisterRequest + Send + Sync;

/// A name whose endpoints are workers.
pub struct Discovery {
    /// The name.
    pub name: String,
    /// The registration of the worker at an address, with a weight.
    pub worker: Box<Registration>,
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What is to be done so that the registry has what a name stands for.
#[derive(Debug, Default)]
struct Todo {
    register: Vec<RegisterRequest>,
    drain: Vec<(WorkerId, bool)>,
    remove: Vec<WorkerId>,
}

/// Keeps the workers of these names until `shutdown`.
pub async fn keep_discovered_workers(
    front: Arc<Front>,
    discoveries: Vec<Discovery>,
    service: Arc<dyn NameService>,
    shutdown: CancellationToken,
) {
    let shard = Shard::new(front);
    let mut keeper = Keeper { discoveries, service, drained: BTreeSet::new(), said: BTreeMap::new() };
    let keeping = async {
        loop {
            if leads(&shard.front) {
                keeper.round(&shard).await;
            } else {
                // Whoever leads now knows what was drained and why.
                keeper.drained.clear();
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::select! {
        () = keeping => {}
        () = shutdown.cancelled() => {}
    }
}

fn leads(front: &Front) -> bool {
    let status = front.control.status();
    status.groups.iter().any(|group| group.group == "control" && group.role == "leader")
}

struct Keeper {
    discoveries: Vec<Discovery>,
    service: Arc<dyn NameService>,
    /// Workers that were drained here because they are going away.
    drained: BTreeSet<WorkerId>,
    /// What was last said of a worker that could not be registered; of no more than there are endpoints.
    said: BTreeMap<String, String>,
}

impl Keeper {
    async fn round(&mut self, shard: &Shard) {
        let view = shard.front.control.registry();
        let todo = self.todo(&view);
        for id in todo.remove {
            tracing::info!(worker = %id, "a discovered worker is gone");
            self.drained.remove(&id);
            let only_source = Some(WorkerSource::Name);
            self.propose(shard, ControlCommand::RemoveWorker { id, only_source, owner: None }).await;
        }
        for (id, drain) in todo.drain {
            match drain {
                true => self.drained.insert(id.clone()),
                false => self.drained.remove(&id),
            };
            self.propose(shard, ControlCommand::DrainWorker { id, drain }).await;
        }
        let urls: BTreeSet<String> = todo.register.iter().map(|request| request.url.clone()).collect();
        self.said.retain(|url, _| urls.contains(url));
        let results = stream::iter(todo.register).map(|request| async move {
            let url = request.url.clone();
            (url, register(shard, request, WorkerSource::Name, None).await)
        });
        let results: Vec<_> = results.buffer_unordered(AT_ONCE).collect().await;
        for (url, result) in results {
            match result {
                Ok(reply) => {
                    self.said.remove(&url);
                    tracing::info!(worker = %reply.id, "a discovered worker is registered");
                }
                Err(error) if self.said.get(&url).is_none_or(|said| *said != error.message) => {
                    tracing::warn!(url, why = %error.message, "a discovered worker is not registered yet");
                    self.said.insert(url, error.message.into_owned());
                }
                Err(_) => {}
            }
        }
    }

    async fn propose(&self, shard: &Shard, command: ControlCommand) {
        if let Err(why) = shard.front.control.propose(command).await {
            tracing::debug!(%why, "the next look tries again");
        }
    }

    /// Compares what names stand for with the registry.
    fn todo(&self, view: &RegistryView) -> Todo {
        let mut todo = Todo::default();
        let mut seen: BTreeSet<WorkerId> = BTreeSet::new();
        for discovery in &self.discoveries {
            let Some(answer) = self.service.answer(&discovery.name) else {
                // Nothing is known: nobody is gone for that.
                let ours = view.workers.iter().filter(|worker| is_of(&worker.record.spec, &discovery.name));
                seen.extend(ours.map(|worker| worker.id().clone()));
                continue;
            };
            for endpoint in answer.all() {
                let mut request = (discovery.worker)(&endpoint.address, endpoint.weight);
                request.labels.insert(NAME_LABEL.to_owned(), discovery.name.clone());
                let Ok(wanted) = request.to_spec(WorkerSource::Name) else { continue };
                if !seen.insert(wanted.id.clone()) {
                    continue;
                }
                let standing = view.worker(&wanted.id);
                let is_ready = endpoint.standing == Standing::Ready && endpoint.weight > 0;
                match standing.map(|worker| &worker.record) {
                    Some(record) if record.spec.source != WorkerSource::Name => {}
                    Some(record) => {
                        let (drained, ours) = (record.drain, self.drained.contains(&wanted.id));
                        if endpoint.standing == Standing::Leaving && !drained {
                            todo.drain.push((wanted.id.clone(), true));
                        } else if is_ready && drained && ours {
                            todo.drain.push((wanted.id.clone(), false));
                        }
                        if is_ready && !fits(&record.spec, &wanted, &request) {
                            todo.register.push(request);
                        }
                    }
                    None if is_ready => todo.register.push(request),
                    None => {}
                }
            }
        }
        let named = view.workers.iter().filter(|worker| worker.record.spec.source == WorkerSource::Name);
        todo.remove = named.map(|worker| worker.id().clone()).filter(|id| !seen.contains(id)).collect();
        todo
    }
}

fn is_of(spec: &WorkerSpec, name: &str) -> bool {
    spec.source == WorkerSource::Name && spec.labels.get(NAME_LABEL).is_some_and(|is| is == name)
}

/// Whether a worker is registered as it should be, as far as that was said and not asked of the engine.
fn fits(stands: &WorkerSpec, wanted: &WorkerSpec, request: &RegisterRequest) -> bool {
    stands.url == wanted.url
        && stands.role == wanted.role
        && stands.labels == wanted.labels
        && stands.weight == wanted.weight
        && stands.http2 == wanted.http2
        && stands.max_requests == wanted.max_requests
        && (request.engine.is_none() || stands.engine == wanted.engine)
        && (request.dp_ranks.is_none() || stands.dp_ranks == wanted.dp_ranks)
        && (request.connector.is_none() || stands.transfer.connector == wanted.transfer.connector)
        && (request.bootstrap_port.is_none()
            || stands.transfer.bootstrap_port == wanted.transfer.bootstrap_port)
        && (request.models.is_empty() || stands.models == wanted.models)
}
