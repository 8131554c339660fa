//! Workers that are endpoints of a name: they come, change, go, and are nobody else's.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::support::*;
use crate::admin_types::{ModelEntry, RegisterRequest};
use crate::http::{Discovery, FrontConfig, keep_discovered_workers};
use crate::naming::{Answer, Endpoint, NameService, NameState, Standing};
use crate::state::worker::{NAME_LABEL, WorkerSource};

#[derive(Debug, Default)]
struct Told(Mutex<BTreeMap<String, Arc<Answer>>>);

impl Told {
    fn say(&self, name: &str, endpoints: &[(SocketAddr, Standing)]) {
        let endpoint = |(address, standing): &(SocketAddr, Standing)| Endpoint {
            address: address.to_string(),
            weight: 100,
            standing: *standing,
        };
        self.0.lock().insert(name.to_owned(), Arc::new(Answer::new(endpoints.iter().map(endpoint))));
    }
}

impl NameService for Told {
    fn provider(&self) -> &'static str {
        "static"
    }

    fn answer(&self, name: &str) -> Option<Arc<Answer>> {
        self.0.lock().get(name).cloned()
    }

    fn states(&self) -> Vec<NameState> {
        Vec::new()
    }
}

struct Keeping {
    front: Running,
    told: Arc<Told>,
    stop: CancellationToken,
}

impl Drop for Keeping {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn keeping(names: &[&str]) -> Keeping {
    let front = start(FrontConfig::default());
    let (told, stop) = (Arc::<Told>::default(), CancellationToken::new());
    let discovery = |name: &&str| Discovery {
        name: (*name).to_owned(),
        worker: Box::new(|address, weight| {
            let mut request = RegisterRequest::new(format!("http://{address}"));
            request.weight = Some(weight);
            request.models = vec![ModelEntry::Name("m".to_owned())];
            request
        }),
    };
    let discoveries = names.iter().map(discovery).collect();
    tokio::spawn(keep_discovered_workers(front.front.clone(), discoveries, told.clone(), stop.clone()));
    Keeping { front, told, stop }
}

fn source(front: &Running, at: SocketAddr) -> Option<WorkerSource> {
    front.cluster.worker(&at.to_string()).map(|worker| worker.record.spec.source)
}

#[tokio::test]
async fn endpoints_become_workers_get_requests_and_go_again() {
    let here = keeping(&["vllm"]);
    let (front, told) = (&here.front, &here.told);
    let one = answering(ok("application/json", r#"{"said":"one"}"#)).await;
    let two = answering(ok("application/json", r#"{"said":"two"}"#)).await;
    told.say("vllm", &[(one, Standing::Ready), (two, Standing::Out)]);
    // Somebody else's, with the id that it would have.
    let theirs = answering(ok("application/json", "{}")).await;
    front.cluster.add(&theirs.to_string(), theirs);
    front.cluster.leads.store(true, Ordering::Relaxed);

    eventually("it is registered", || source(front, one) == Some(WorkerSource::Name)).await;
    let labels = front.cluster.worker(&one.to_string()).unwrap().record.spec.labels.clone();
    assert_eq!(labels[NAME_LABEL], "vllm");
    assert_eq!(source(front, two), None, "who is not up is none");
    assert_eq!(status(&exchange(front.address, chat()).await), 200);

    // One goes, the other comes, and a third that is somebody else's stays what it is.
    told.say("vllm", &[(one, Standing::Leaving), (two, Standing::Ready), (theirs, Standing::Ready)]);
    eventually("it is drained", || front.cluster.worker(&one.to_string()).unwrap().record.drain).await;
    eventually("the other is there", || source(front, two) == Some(WorkerSource::Name)).await;
    assert_eq!(source(front, theirs), Some(WorkerSource::Admin));
    told.say("vllm", &[(two, Standing::Ready)]);
    eventually("it is removed", || source(front, one).is_none()).await;
    assert_eq!(source(front, theirs), Some(WorkerSource::Admin), "not ours to remove");

    // Back at the same address.
    told.say("vllm", &[(one, Standing::Ready), (two, Standing::Ready)]);
    eventually("it is back", || front.cluster.worker(&one.to_string()).is_some_and(|w| !w.record.drain))
        .await;
}

#[tokio::test]
async fn a_name_of_which_nothing_is_known_removes_nobody_and_one_that_is_not_followed_does() {
    let here = keeping(&["vllm", "sglang"]);
    let (front, told) = (&here.front, &here.told);
    let one = answering(ok("application/json", "{}")).await;
    let two = answering(ok("application/json", "{}")).await;
    told.say("vllm", &[(one, Standing::Ready)]);
    told.say("sglang", &[(two, Standing::Ready)]);
    front.cluster.leads.store(true, Ordering::Relaxed);
    eventually("both are there", || source(front, one).is_some() && source(front, two).is_some()).await;
    // Of a name that was followed once.
    front.cluster.change(&two.to_string(), |record| {
        record.spec.labels.insert(NAME_LABEL.to_owned(), "earlier".to_owned());
    });
    told.0.lock().clear();
    eventually("that one is removed", || source(front, two).is_none()).await;
    assert_eq!(source(front, one), Some(WorkerSource::Name), "the name service is away, that is all");
}

#[tokio::test]
async fn who_does_not_lead_changes_nothing() {
    let here = keeping(&["vllm"]);
    let one = answering(ok("application/json", "{}")).await;
    here.told.say("vllm", &[(one, Standing::Ready)]);
    tokio::time::sleep(std::time::Duration::from_millis(1200)).await;
    assert_eq!(source(&here.front, one), None);
    here.front.cluster.leads.store(true, Ordering::Relaxed);
    eventually("now it does", || source(&here.front, one).is_some()).await;
}
