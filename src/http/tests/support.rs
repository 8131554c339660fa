//! A cluster in memory, workers made of raw sockets, and a client that sends any bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cluster::api::{
    Answer, ClusterError, ClusterStats, ClusterStatus, ControlPlane, GroupStatus, LogStats, MemberOp,
    MemberStatus,
};
use crate::cluster::stats::GroupCounters;
use crate::http::{Front, FrontConfig, Metrics, bind, serve_admin, serve_client};
use crate::ids::{Group, Incarnation, ReplicaId, StreamId, WorkerId, WorkerIx};
use crate::kv::feed::Cursor;
use crate::routing::blocks::Blocks;
use crate::routing::book::{Booking, Bookings, Tentative};
use crate::routing::groups::Groups;
use crate::routing::view::{RegistryView, WorkerLive, WorkerView};
use crate::state::command::{CacheCommand, CacheOutcome, ControlCommand, ControlOutcome, ReplicaInfo};
use crate::state::control::ControlState;
use crate::state::ksana::{KsanaCommand, KsanaState, Rules};
use crate::state::ranks::{RankKey, Ranks};
use crate::state::replicated::State as _;
use crate::state::streams::StreamRecord;
use crate::state::worker::{Liveness, ServedModel, WorkerRecord, WorkerSource, WorkerSpec};

/// Applies commands to a map and publishes views, as the real cluster does after a commit.
pub(super) struct MemoryCluster {
    records: Mutex<BTreeMap<WorkerId, (WorkerRecord, Arc<WorkerLive>)>>,
    view: ArcSwap<RegistryView>,
    bookings: Bookings,
    blocks: Blocks,
    ranks: watch::Sender<Arc<Ranks>>,
    pub(super) told: Mutex<Vec<CacheCommand>>,
    index: AtomicUsize,
    pub(super) heartbeats: Mutex<Vec<WorkerId>>,
    pub(super) probes: Mutex<Vec<(WorkerId, bool)>>,
    pub(super) barriers: AtomicUsize,
    pub(super) without_quorum: AtomicBool,
    /// It has not applied yet what was committed before it started.
    pub(super) is_behind: AtomicBool,
    /// Nothing is decided, and nobody says so.
    pub(super) leaderless: AtomicBool,
    /// This replica leads.
    pub(super) leads: AtomicBool,
    pub(super) joined: AtomicBool,
    /// The stream directory.
    pub(super) streams: Mutex<BTreeMap<StreamId, StreamRecord>>,
    /// Reservations that somebody else was faster than, from now on.
    pub(super) too_late: AtomicUsize,
    /// Reservations are never decided about.
    pub(super) undecided: AtomicBool,
    /// KsanaLLM's tables.
    pub(super) control: Mutex<ControlState>,
    /// KsanaLLM's groups, as last looked at.
    groups: Mutex<Arc<Groups>>,
    group_lives: Mutex<BTreeMap<WorkerIx, Arc<WorkerLive>>>,
    /// Heartbeats of KsanaLLM's nodes that changed nothing.
    pub(super) ksana_heard: Mutex<Vec<String>>,
}

impl MemoryCluster {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            records: Mutex::default(),
            view: ArcSwap::from_pointee(RegistryView::new(1, Vec::new())),
            bookings: Bookings::new(|| {}),
            blocks: Blocks::default(),
            ranks: watch::Sender::default(),
            told: Mutex::default(),
            index: AtomicUsize::new(1),
            heartbeats: Mutex::default(),
            probes: Mutex::default(),
            barriers: AtomicUsize::new(0),
            without_quorum: AtomicBool::new(false),
            is_behind: AtomicBool::new(false),
            leaderless: AtomicBool::new(false),
            leads: AtomicBool::new(false),
            joined: AtomicBool::new(true),
            streams: Mutex::default(),
            too_late: AtomicUsize::new(0),
            undecided: AtomicBool::new(false),
            control: Mutex::default(),
            groups: Mutex::default(),
            group_lives: Mutex::default(),
            ksana_heard: Mutex::default(),
        })
    }

    fn publish(&self, records: &BTreeMap<WorkerId, (WorkerRecord, Arc<WorkerLive>)>) {
        let index = self.index.fetch_add(1, Ordering::Relaxed) as u64 + 1;
        let workers = records
            .values()
            .map(|(record, live)| Arc::new(WorkerView { record: record.clone(), live: Arc::clone(live) }))
            .collect();
        self.view.store(Arc::new(RegistryView::new(index, workers)));
    }

    pub(super) fn apply(&self, command: ControlCommand) -> ControlOutcome {
        if matches!(command, ControlCommand::Ksana(_) | ControlCommand::Tick { .. }) {
            return self.control.lock().apply(ReplicaId(1), command);
        }
        let mut records = self.records.lock();
        let outcome = match command {
            ControlCommand::RegisterWorker { spec, heartbeats } => {
                let id = spec.id.clone();
                let generation = records.get(&id).map_or(1, |(record, _)| record.generation + 1);
                let liveness = if heartbeats { Liveness::Heartbeat } else { Liveness::Probe };
                let record = WorkerRecord {
                    spec,
                    ix: crate::ids::WorkerIx(records.len() as u32 + 1),
                    drain: false,
                    online: true,
                    liveness,
                    last_heard_ms: 0,
                    generation,
                    failed_by: Default::default(),
                };
                let replaced = records.insert(id, (record, Arc::default())).is_some();
                ControlOutcome::Registered { replaced, generation }
            }
            ControlCommand::RemoveWorker { id, only_source, .. } => match records.get(&id) {
                None => ControlOutcome::UnknownWorker,
                Some((record, _)) if only_source.is_some_and(|source| source != record.spec.source) => {
                    ControlOutcome::Refused(format!("worker {id} was registered by another source"))
                }
                Some(_) => {
                    records.remove(&id);
                    ControlOutcome::Done
                }
            },
            ControlCommand::DrainWorker { id, drain } => match records.get_mut(&id) {
                None => ControlOutcome::UnknownWorker,
                Some((record, _)) => {
                    record.drain = drain;
                    ControlOutcome::Done
                }
            },
            _ => ControlOutcome::Done,
        };
        self.publish(&records);
        outcome
    }

    fn apply_to_streams(&self, command: &CacheCommand) -> CacheOutcome {
        let mut streams = self.streams.lock();
        match command {
            CacheCommand::OpenStream { id, record } => {
                if let Some(stands) = streams.get(id) {
                    return CacheOutcome::Stream(Box::new(stands.clone()));
                }
                streams.insert(*id, record.clone());
            }
            CacheCommand::EndStream { id, how, .. } => {
                if let Some(record) = streams.get_mut(id) {
                    record.ended = Some(*how);
                }
            }
            CacheCommand::PurgeStream { id } => drop(streams.remove(id)),
            _ => {}
        }
        CacheOutcome::Done
    }

    /// Registers a worker that serves `m`.
    pub(super) fn add(&self, id: &str, address: SocketAddr) {
        let model = ServedModel { name: "m".into(), lora_of: None, max_model_len: Some(2048) };
        let adapter = ServedModel { name: "m-lora".into(), lora_of: Some("m".into()), max_model_len: None };
        let spec = WorkerSpec {
            id: WorkerId(id.into()),
            url: format!("http://{address}"),
            engine: Default::default(),
            models: vec![model, adapter],
            role: Default::default(),
            transfer: Default::default(),
            dp_ranks: 1,
            block_size: Some(16),
            capacity_blocks: None,
            labels: Default::default(),
            weight: 100,
            http2: false,
            max_requests: None,
            owner: None,
            source: WorkerSource::Admin,
        };
        self.apply(ControlCommand::RegisterWorker { spec, heartbeats: false });
    }

    /// Changes a record, as a commit would.
    pub(super) fn change(&self, id: &str, change: impl FnOnce(&mut WorkerRecord)) {
        let mut records = self.records.lock();
        change(&mut records.get_mut(&WorkerId(id.into())).unwrap().0);
        self.publish(&records);
    }

    /// Takes a worker out of the registry.
    pub(super) fn forget(&self, id: &str) {
        self.apply(ControlCommand::RemoveWorker { id: WorkerId(id.into()), only_source: None, owner: None });
    }

    pub(super) fn worker(&self, id: &str) -> Option<Arc<WorkerView>> {
        self.view.load().worker(&WorkerId(id.into())).cloned()
    }
}

impl ControlPlane for MemoryCluster {
    fn propose(&self, command: ControlCommand) -> Answer<ControlOutcome> {
        if self.leaderless.load(Ordering::Relaxed) {
            return Box::pin(std::future::pending());
        }
        let answer = if self.without_quorum.load(Ordering::Relaxed) {
            Err(ClusterError::Unavailable { waited: Duration::from_secs(3) })
        } else {
            Ok(self.apply(command))
        };
        Box::pin(async move { answer })
    }

    fn read_barrier(&self, _: Group) -> Answer<()> {
        self.barriers.fetch_add(1, Ordering::Relaxed);
        if self.leaderless.load(Ordering::Relaxed) {
            return Box::pin(std::future::pending());
        }
        Box::pin(async { Ok(()) })
    }

    fn ksana(&self, look: &mut dyn FnMut(&KsanaState, u64)) -> bool {
        let control = self.control.lock();
        look(control.ksana(), control.now_ms());
        true
    }

    fn ksana_groups(&self) -> Arc<Groups> {
        let (control, mut groups) = (self.control.lock(), self.groups.lock());
        if !groups.are_of(control.ksana()) {
            let mut lives = self.group_lives.lock();
            let live = |ix| Arc::clone(lives.entry(ix).or_default());
            *groups = Arc::new(Groups::of(control.ksana(), live));
        }
        Arc::clone(&groups)
    }

    fn ksana_heard(&self, node: &str, rules: Rules) {
        self.ksana_heard.lock().push(node.to_owned());
        let nodes = vec![(node.to_owned(), 0)];
        self.apply(ControlCommand::Ksana(KsanaCommand::Heard { nodes, rules }));
    }

    fn heartbeat(&self, worker: &WorkerId) -> bool {
        self.heartbeats.lock().push(worker.clone());
        self.view.load().worker(worker).is_some()
    }

    fn probed(&self, worker: &WorkerId, healthy: bool) {
        self.probes.lock().push((worker.clone(), healthy));
    }

    fn registry(&self) -> Arc<RegistryView> {
        self.view.load_full()
    }

    fn bookings(&self) -> &Bookings {
        &self.bookings
    }

    fn reserve(&self, tentative: Tentative) -> Answer<Option<Booking>> {
        if self.undecided.load(Ordering::Relaxed) {
            return Box::pin(async move {
                let _kept = tentative;
                std::future::pending().await
            });
        }
        self.told.lock().extend(tentative.command());
        let late = self.too_late.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        let answer = match late {
            Ok(_) => {
                tentative.refused();
                None
            }
            Err(_) => tentative.confirmed(),
        };
        Box::pin(async move { Ok(answer) })
    }

    fn propose_cache(&self, command: CacheCommand) -> Answer<CacheOutcome> {
        let outcome = self.apply_to_streams(&command);
        self.told.lock().push(command);
        Box::pin(async { Ok(outcome) })
    }

    fn tell_cache(&self, command: CacheCommand) {
        self.told.lock().push(command);
    }

    fn stream(&self, id: StreamId) -> Option<StreamRecord> {
        self.streams.lock().get(&id).cloned()
    }

    fn streams(
        &self,
        wanted: &mut dyn FnMut(StreamId, &StreamRecord) -> bool,
        most: usize,
    ) -> Vec<(StreamId, StreamRecord)> {
        let streams = self.streams.lock();
        let found = streams.iter().filter(|(id, record)| wanted(**id, record));
        found.take(most).map(|(id, record)| (*id, record.clone())).collect()
    }

    fn stream_secret(&self) -> Option<[u8; 32]> {
        Some([7; 32])
    }

    fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    fn ranks(&self) -> watch::Receiver<Arc<Ranks>> {
        self.ranks.subscribe()
    }

    fn feed_cursor(&self, _: RankKey) -> Option<Cursor> {
        None
    }

    fn session(&self, session: u64) -> Option<(WorkerIx, bool)> {
        // As the state would: the first binding from where it is wins.
        let told = self.told.lock();
        let binds = told.iter().filter_map(|command| match command {
            CacheCommand::Bind { session: of, worker, from } if *of == session => Some((*worker, *from)),
            _ => None,
        });
        let now = binds.fold(None, |now, (worker, from)| if now == from { Some(worker) } else { now });
        now.map(|worker| (worker, false))
    }

    fn view_age_ms(&self) -> u64 {
        0
    }

    fn member(&self, op: MemberOp) -> Answer<String> {
        Box::pin(async move {
            match op {
                MemberOp::Promote { .. } => Err(ClusterError::Refused("no such member".into())),
                _ => Ok("done".to_owned()),
            }
        })
    }

    fn status(&self) -> ClusterStatus {
        let joined = self.joined.load(Ordering::Relaxed);
        ClusterStatus {
            cluster_id: if joined { "c0ffee".into() } else { String::new() },
            me: ReplicaId(1),
            name: "r1".into(),
            incarnation: Incarnation(1),
            quorum: !self.without_quorum.load(Ordering::Relaxed),
            current: !self.is_behind.load(Ordering::Relaxed),
            down: None,
            groups: match self.leads.load(Ordering::Relaxed) {
                true => {
                    vec![GroupStatus { group: "control".into(), role: "leader".into(), ..Default::default() }]
                }
                false => vec![GroupStatus { quorum_age_ms: Some(5), ..Default::default() }],
            },
            members: vec![MemberStatus {
                id: ReplicaId(2),
                info: ReplicaInfo { name: "r2".into(), ..Default::default() },
                incarnation: None,
                membership: "voter".into(),
                alive: true,
                lag: Some(3),
                leads_control: false,
                leads_cache: false,
                requests: 4,
                view_age_ms: Some(120),
            }],
        }
    }

    fn stats(&self) -> ClusterStats {
        let groups = Group::ALL.map(|group| GroupCounters::default().read(group, 0)).to_vec();
        ClusterStats { groups, log: Some(LogStats::from(&Default::default())) }
    }
}

/// A running front; stops when dropped.
pub(super) struct Running {
    pub(super) cluster: Arc<MemoryCluster>,
    pub(super) front: Arc<Front>,
    pub(super) address: SocketAddr,
    pub(super) stop: CancellationToken,
    pub(super) served: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub(super) fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// A worker that keeps the heads and bodies of its requests.
pub(super) async fn remembering() -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let kept = seen.clone();
    let address = worker(move |mut stream| {
        let kept = kept.clone();
        async move {
            while let Some((head, body)) = read_message(&mut stream).await {
                kept.lock().push(format!("{head}{}", String::from_utf8_lossy(&body)));
                let _ = stream.write_all(ok("application/json", "{}").as_bytes()).await;
            }
        }
    })
    .await;
    (address, seen)
}

/// Starts a client listener on a free port.
pub(super) fn start(config: FrontConfig) -> Running {
    start_with(config, MemoryCluster::new(), Metrics::default())
}

pub(super) fn start_with(config: FrontConfig, cluster: Arc<MemoryCluster>, metrics: Metrics) -> Running {
    let front = Front::new(config, cluster.clone(), Arc::new(metrics));
    let listener = bind(loopback(), false).unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let served = Some(tokio::spawn(serve_client(listener, front.clone(), stop.clone())));
    Running { cluster, front, address, stop, served }
}

/// Adds an admin listener to a running front.
pub(super) fn admin_of(front: &Running) -> SocketAddr {
    let listener = bind(loopback(), true).unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve_admin(listener, front.front.clone(), front.stop.clone()));
    address
}

/// A worker whose every connection is handed to `script`.
pub(super) async fn worker<F>(script: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(script(stream));
        }
    });
    address
}

/// A worker that answers every request with the same bytes and keeps the connection.
pub(super) async fn answering(bytes: impl Into<Vec<u8>>) -> SocketAddr {
    let bytes = bytes.into();
    worker(move |mut stream| {
        let bytes = bytes.clone();
        async move {
            while read_message(&mut stream).await.is_some() {
                if stream.write_all(&bytes).await.is_err() {
                    break;
                }
            }
        }
    })
    .await
}

/// An address where nobody listens.
pub(super) async fn refusing() -> SocketAddr {
    TcpListener::bind(loopback()).await.unwrap().local_addr().unwrap()
}

/// A response with a body of known length.
pub(super) fn ok(content_type: &str, body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
}

/// Reads one message with a Content-Length (or none); `None` at the end of the connection.
pub(super) async fn read_message(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).unwrap();
    let length = header(&head, "content-length").map_or(0, |value| value.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    Some((head, body))
}

/// A header's value in a raw head.
pub(super) fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().filter_map(|line| line.split_once(':')).find_map(|(is, value)| {
        let value = value.trim();
        is.eq_ignore_ascii_case(name).then_some(value)
    })
}

/// Sends bytes and reads until the front closes the connection.
pub(super) async fn exchange(address: SocketAddr, bytes: impl AsRef<[u8]>) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(bytes.as_ref()).await;
    read_to_close(&mut stream).await
}

/// Reads until the connection ends, in whatever way.
pub(super) async fn read_to_close(stream: &mut TcpStream) -> String {
    let mut all = Vec::new();
    let mut chunk = [0; 4096];
    let reading = async {
        while let Ok(count @ 1..) = stream.read(&mut chunk).await {
            all.extend_from_slice(&chunk[..count]);
        }
    };
    tokio::time::timeout(Duration::from_secs(10), reading).await.expect("the connection stayed open");
    String::from_utf8_lossy(&all).into_owned()
}

/// A request that asks for the connection to be closed.
pub(super) fn request(method: &str, path: &str, extra: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: front\r\nconnection: close\r\ncontent-length: {}\r\n{extra}\r\n{body}",
        body.len()
    )
}

pub(super) fn post(path: &str, body: &str) -> String {
    request("POST", path, "", body)
}

pub(super) fn chat() -> String {
    post("/v1/chat/completions", r#"{"model":"m","messages":[{"role":"user","content":"hello"}]}"#)
}

pub(super) fn status(response: &str) -> u16 {
    response.get(9..12).and_then(|code| code.parse().ok()).unwrap_or(0)
}

/// The `code` of an OpenAI error, checking that all four members are there.
pub(super) fn code(response: &str) -> String {
    let body = response.split_once("\r\n\r\n").expect(response).1;
    let error: serde_json::Value = serde_json::from_str(body).expect(response);
    for member in ["message", "type", "param", "code"] {
        assert!(error["error"].get(member).is_some(), "{response}");
    }
    error["error"]["code"].as_str().expect(response).to_owned()
}

/// The JSON body of a response.
pub(super) fn body(response: &str) -> serde_json::Value {
    serde_json::from_str(response.split_once("\r\n\r\n").expect(response).1).expect(response)
}

/// Waits until something holds; the condition is polled, nothing else is assumed about time.
pub(super) async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    panic!("never came true: {what}");
}
