//! Who has no business with a stream: guesses ids, shows a capability that is none any more, or uses
//! somebody's idempotency key for something else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use futures_util::future::join_all;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::streams::*;
use super::support::*;
use crate::cluster::api::ClusterError;
use crate::http::auth::digest_of;
use crate::http::{ClientKey, Metrics, Rate};
use crate::ids::{ReplicaId, StreamId};
use crate::relay::Options;
use crate::relay::directory::{Address, Directory, OfReplica, Peer, Soon, Taken};
use crate::relay::secret;
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

#[tokio::test]
async fn guessing_ids_finds_nothing_and_costs_next_to_nothing() {
    let mut config = with_keys();
    config.streams.guesses = Rate::new(50.0, 100);
    let front = keeping(config);
    let (id, _) = ended(&front, &key_of("a")).await;
    let began = Instant::now();
    let before = front.cluster.barriers.load(Ordering::Relaxed);
    let address = front.address;
    let guesser = |n: u64| async move {
        let mut statuses = BTreeSet::new();
        let mut stream = TcpStream::connect(address).await.unwrap();
        for at in 0..5_000_u64 {
            let mut bits = [0; 17];
            bits[..8].copy_from_slice(&(n * 5_000 + at).to_be_bytes());
            let guess = StreamId::from_bits(bits);
            let ask = format!(
                "GET /v1/streams/{guess} HTTP/1.1\r\nhost: front\r\nauthorization: Bearer secret-b\r\n\r\n"
            );
            stream.write_all(ask.as_bytes()).await.unwrap();
            let (head, _) = read_message(&mut stream).await.unwrap();
            statuses.insert(status(&head));
        }
        statuses
    };
    let found = futures_util::future::join_all((0..4).map(guesser)).await;
    let statuses: BTreeSet<u16> = found.into_iter().flatten().collect();
    assert_eq!(statuses, BTreeSet::from([404, 429]));
    // A look for each place under the limit at most, whatever was asked.
    let looks = front.cluster.barriers.load(Ordering::Relaxed) - before;
    let most = 101 + 50 * (began.elapsed().as_secs() as usize + 1);
    assert!(looks <= most, "{looks} looks, {most} allowed");
    let relays = front.front.streams.get().unwrap();
    assert_eq!(
        (relays.all().len(), front.cluster.streams.lock().len()),
        (1, 1),
        "nothing is kept of guesses"
    );
    // Who guesses is held up, and nobody else; not even he, where he asks for what is his.
    assert_eq!(status(&get(&front, &format!("/v1/streams/{id}"), &key_of("a")).await), 200);
    let (his, _) = ended(&front, &key_of("b")).await;
    assert_eq!(status(&get(&front, &format!("/v1/streams/{his}"), &key_of("b")).await), 200);
}

/// A directory at another process, as edges have it.
struct Far {
    there: Arc<OfReplica>,
    /// How often it was asked.
    asked: AtomicUsize,
    knows_cluster: AtomicBool,
    /// Nothing that was listed lately is found.
    is_late: AtomicBool,
}

impl Far {
    fn of(front: &Running) -> Arc<Self> {
        let there = OfReplica::new(front.cluster.clone());
        Arc::new(Self {
            there,
            asked: AtomicUsize::new(0),
            knows_cluster: AtomicBool::new(true),
            is_late: AtomicBool::new(false),
        })
    }
}

impl Directory for Far {
    fn me(&self) -> Option<ReplicaId> {
        self.there.me()
    }
    fn cluster(&self) -> String {
        self.there.cluster()
    }
    fn peers(&self) -> Vec<Peer> {
        self.there.peers()
    }
    fn is_elsewhere(&self) -> bool {
        true
    }
    fn find(&self, id: StreamId) -> Soon<Option<StreamRecord>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let found = self.there.find(id);
        Box::pin(async move {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            found.await
        })
    }
    fn find_surely(&self, id: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let found = self.there.find_surely(id);
        let is_late = self.is_late.load(Ordering::Relaxed);
        Box::pin(async move {
            let found = found.await;
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            found.map(|found| found.filter(|_| !is_late))
        })
    }
    fn open(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        self.there.open(id, record)
    }
    fn take(&self, id: StreamId, from: u32, record: StreamRecord) -> Soon<Result<Taken, ClusterError>> {
        self.there.take(id, from, record)
    }
    fn mirror(&self, _: StreamId, _: u32) {}
    fn end(&self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32) {
        self.there.end(id, attempt, how, keep_ms);
    }
    fn purge(&self, id: StreamId) {
        self.there.purge(id);
    }
    fn secret(&self) -> Option<[u8; 32]> {
        self.there.secret().filter(|_| self.knows_cluster.load(Ordering::Relaxed))
    }
    fn address(&self, holder: Holder) -> Soon<Option<Address>> {
        self.there.address(holder)
    }
}

fn listed(key: &str) -> StreamRecord {
    StreamRecord {
        principal: secret::principal(Some(key)),
        request: [0; 16],
        holder: Holder::Replica(ReplicaId(9)),
        mirror: None,
        attempt: 1,
        model: "m".into(),
        opened_ms: 0,
        lasts_ms: 60_000,
        ended: None,
    }
}

#[tokio::test]
async fn at_an_edge_guesses_cost_replicas_no_more_than_the_limit_and_ones_own_streams_are_no_guesses() {
    let mut config = with_keys();
    config.streams.guesses = Rate::new(0.001, 20);
    let front = start_with(config, MemoryCluster::new(), Metrics::default());
    let far = Far::of(&front);
    keep_in(&front, Options::default(), far.clone());
    let (id, front) = (secret::random_id(), &front);
    front.cluster.streams.lock().insert(id, listed("a"));
    let ask = |key: &'static str, id: StreamId| async move {
        let headers = format!("accept: application/json\r\n{}", key_of(key));
        status(&get(front, &format!("/v1/streams/{id}"), &headers).await)
    };
    // All at once, as when another edge has died: many more than the limit has places.
    let own = join_all((0..200).map(|_| ask("a", id))).await;
    assert!(own.iter().all(|status| *status == 200), "{own:?}");
    let before = far.asked.load(Ordering::Relaxed);
    for somebodys in [true, false] {
        let guess = || if somebodys { id } else { secret::random_id() };
        let guesses = join_all((0..200).map(|_| ask("b", guess()))).await;
        let statuses: BTreeSet<u16> = guesses.into_iter().collect();
        assert!(statuses.is_subset(&BTreeSet::from([404, 429])), "{statuses:?}");
    }
    // What is known there, and what is known for certain.
    let asked = far.asked.load(Ordering::Relaxed) - before;
    assert!((2..=2 * 20).contains(&asked), "{asked}");
    assert_eq!(ask("a", id).await, 200, "another key's guesses are not this one's");
}

#[tokio::test]
async fn a_capability_is_good_no_longer_than_the_key_that_it_was_made_with() {
    let config = with_keys();
    let ring = Arc::clone(&config.keys);
    let front = keeping(config);
    let (id, _) = ended(&front, &key_of("a")).await;
    let path = format!("/v1/streams/{id}");
    let granted = exchange(front.address, request("POST", &format!("{path}/token"), &key_of("a"), "")).await;
    let path = format!("{path}?cap={}", body(&granted)["cap"].as_str().unwrap());
    assert_eq!(status(&get(&front, &path, "").await), 200);
    let other = ClientKey {
        id: "b".into(),
        digest: digest_of(b"secret-b"),
        models: None,
        rate: None,
        max_concurrent: None,
        expires: None,
    };
    ring.replace(vec![other]);
    let refused = get(&front, &path, "").await;
    assert_eq!((status(&refused), code(&refused).as_str()), (401, "bad_capability"));
}

#[tokio::test]
async fn a_capability_is_not_called_bad_by_who_cannot_know() {
    let front = start_with(with_keys(), MemoryCluster::new(), Metrics::default());
    let far = Far::of(&front);
    keep_in(&front, Options::default(), far.clone());
    let id = secret::random_id();
    let cap = secret::capability(&far.secret().unwrap(), id, 60);
    far.knows_cluster.store(false, Ordering::Relaxed);
    let path = format!("/v1/streams/{id}?cap={cap}");
    let accept = "accept: text/event-stream\r\n";
    for headers in ["", "accept: */*\r\n", &format!("{accept}everline-resume: 1\r\n")] {
        let answer = get(&front, &path, headers).await;
        assert_eq!((status(&answer), code(&answer).as_str()), (503, "replica_down"));
    }
    // An `EventSource` would be closed for good.
    let answer = get(&front, &path, accept).await;
    assert_eq!(
        (status(&answer), header(&answer, "content-type")),
        (200, Some("text/event-stream; charset=utf-8"))
    );
    assert!(answer.ends_with("\r\n\r\n: 503 Service Unavailable\nretry: 1000\n\n"), "{answer}");
    far.knows_cluster.store(true, Ordering::Relaxed);
    let answer = get(&front, &path, accept).await;
    assert_eq!((status(&answer), code(&answer).as_str()), (404, "stream_not_found"));
}

#[tokio::test]
async fn of_two_requests_at_once_under_one_idempotency_key_one_is_answered() {
    let front = start_with(with_keys(), MemoryCluster::new(), Metrics::default());
    // Both look before either is listed.
    let far = Far::of(&front);
    far.is_late.store(true, Ordering::Relaxed);
    keep_in(&front, Options::default(), far);
    let engine = engine(chat_events(3)).await;
    engine.permits.add_permits(10_000);
    front.cluster.add("w", engine.address);
    for turn in 0..20 {
        let ask = |text: &str| {
            let body =
                format!(r#"{{"model":"m","stream":true,"messages":[{{"role":"user","content":"{text}"}}]}}"#);
            let headers = format!("{}idempotency-key: turn-{turn}\r\n", key_of("a"));
            exchange(front.address, request("POST", "/v1/chat/completions", &headers, &body))
        };
        let (one, other) = tokio::join!(ask("one"), ask("other"));
        let mut statuses = [status(&one), status(&other)];
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 422], "{one}\n{other}");
    }
}
