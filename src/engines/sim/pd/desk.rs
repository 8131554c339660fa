//! What runs beside an engine's task so that requests can be handed over: the side channel, transfers under
//! way, heartbeats.

use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::Context;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::bootstrap::Directory;
use super::mooncake::Entry;
use super::nixl::{self, Client, Remote};
use super::rooms::{Missed, Rooms, Told, seconds};
use super::side::{self, Notice, Question, Shared};
use super::{Identity, Lender, Protocol, Source};
use crate::engines::sim::engine::Engine;
use crate::engines::sim::faults::FaultChange;
use crate::engines::sim::ksana::Node;
use crate::engines::sim::outbox::Failure;
use crate::engines::sim::scheduler::{Came, Contents, Handover, Happening, Meeting, Scheduler};
use crate::zmtp::{Endpoint, Router, ZmtpError};

/// vLLM's decode engines say six times in a lease that they will still come.
const HEARTBEATS_IN_A_LEASE: u32 = 6;
/// `waiting_timeout_in_ms` of KsanaLLM's example configurations.
const KSANA_PATIENCE: Duration = Duration::from_secs(3600);
/// How often is looked whether a group is set up; the engine does so every 5 s.
const KSANA_LOOK: Duration = Duration::from_millis(50);

/// Everything of a rank's hand-overs that has to do with other processes.
///
/// Bound of what runs: a task for each sequence that waits for another engine, and one for each engine that
/// heartbeats are due to.
pub struct Desk {
    protocol: Protocol,
    contents: Contents,
    identity: Identity,
    host: String,
    port: u16,
    lease: Duration,
    bootstrap_timeout: Duration,
    waiting_timeout: Duration,
    abort_timeout: Duration,
    client: Arc<Client>,
    directory: Arc<Directory>,
    rooms: Arc<Rooms>,
    node: Arc<OnceLock<Arc<Node>>>,
    side_host: IpAddr,
    /// Of what is being fetched, by ticket.
    fetches: Mutex<HashMap<u64, CancellationToken>>,
    stop: CancellationToken,
    _side: Router,
}

impl Desk {
    /// Opens the rank's side channel; nothing without `--pd`.
    pub async fn start(engine: &Arc<Engine>, host: IpAddr) -> anyhow::Result<Option<Arc<Self>>> {
        let args = &engine.args;
        let Some(protocol) = args.pd.protocol else { return Ok(None) };
        anyhow::ensure!(
            args.host_blocks == 0,
            "engine-sim has no --host-blocks with --pd; leave one of them out"
        );
        anyhow::ensure!(
            protocol.is_vllm() || args.pd.role.is_some(),
            "such an engine is one or the other: add --role prefill or --role decode"
        );
        let rank = u16::try_from(engine.rank).unwrap_or(u16::MAX);
        let port = match (protocol, args.pd.side_channel_port) {
            (Protocol::VllmNixl | Protocol::VllmNixlPush, first @ 1..) => {
                first.checked_add(rank).with_context(|| {
                    format!("there is no port for the side channel of rank {rank}; lower --side-channel-port")
                })?
            }
            // Other engines ask where it is.
            _ => 0,
        };
        let shared = Shared {
            identity: Identity::new(),
            contents: Contents::new(args.blocks),
            compatibility: nixl::compatibility(args),
            rooms: Arc::default(),
            node: Arc::default(),
        };
        let (host, port) = match (protocol, args.pd.ksana.coordinator_addr) {
            (Protocol::Ksana, Some(coordinator)) => (coordinator.ip(), coordinator.port()),
            _ => (host, port),
        };
        let endpoint = Endpoint::Tcp { host: host.to_string(), port };
        let (told, to_answer) = (Arc::downgrade(engine), shared.clone());
        let answer = move |link| {
            let (told, rooms) = (Weak::clone(&told), Arc::clone(&to_answer.rooms));
            side::answer(link, to_answer.clone(), move |notice| hand_on(protocol, &told, &rooms, notice))
        };
        let side = Router::bind_many(&endpoint, side::LIMITS, side::CONNECTIONS, answer).await;
        let side = side.with_context(|| {
            format!("engine-sim cannot have its side channel at {endpoint}; choose another --side-channel-port or --coordinator-addr")
        })?;
        let Endpoint::Tcp { port, .. } = *side.endpoint() else { anyhow::bail!("{endpoint} got no port") };
        Ok(Some(Arc::new(Self {
            protocol,
            contents: shared.contents,
            identity: shared.identity,
            host: args.pd.side_channel_host.clone(),
            port,
            lease: Duration::from_secs_f64(args.pd.kv_lease_seconds),
            bootstrap_timeout: Duration::from_secs_f64(args.pd.bootstrap_timeout),
            waiting_timeout: Duration::from_secs_f64(args.pd.waiting_timeout),
            abort_timeout: Duration::from_secs_f64(args.pd.mooncake_abort_timeout),
            client: Client::new(shared.compatibility),
            directory: Arc::default(),
            rooms: shared.rooms,
            node: shared.node,
            side_host: host,
            fetches: Mutex::default(),
            stop: CancellationToken::new(),
            _side: side,
        })))
    }

    /// The engine's name.
    pub fn engine_id(&self) -> String {
        self.identity.get()
    }

    /// What Mooncake's bootstrap server says of it.
    pub(super) fn entry(&self) -> Entry {
        Entry::of(self.engine_id(), format!("tcp://{}", self.side_channel()))
    }

    /// Port of the side channel.
    pub fn side_channel_port(&self) -> u16 {
        self.port
    }

    /// Has the engine be this node, and keeps it registered; once.
    pub fn be(&self, node: Arc<Node>) {
        if self.node.set(Arc::clone(&node)).is_ok() {
            self.spawn(node.run());
        }
    }

    /// The KsanaLLM node that it is.
    pub fn node(&self) -> Option<&Arc<Node>> {
        self.node.get()
    }

    /// Where other nodes reach it.
    pub fn side_channel(&self) -> SocketAddr {
        SocketAddr::new(self.side_host, self.port)
    }

    /// The scheduler's part.
    pub(in crate::engines::sim) fn handover(&self) -> Handover {
        let lender = Lender {
            identity: self.identity.clone(),
            host: self.host.clone(),
            port: self.port,
            lease: if self.protocol == Protocol::VllmMooncake { self.abort_timeout } else { self.lease },
        };
        Handover::new(self.contents.clone(), Some(lender))
    }

    /// How often heartbeats are due.
    pub(in crate::engines::sim) fn heartbeat_interval(&self) -> Duration {
        self.lease / HEARTBEATS_IN_A_LEASE
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = task => {}
                () = stop.cancelled() => {}
            }
        });
    }

    /// Does what the scheduler asks for.
    pub(in crate::engines::sim) fn react(self: &Arc<Self>, engine: &Arc<Engine>, happening: Happening) {
        match happening {
            Happening::Fetch { ticket, source, blocks } => self.fetch(engine, ticket, source, blocks),
            Happening::Abandoned(ticket) => {
                if let Some(fetch) = self.fetches.lock().remove(&ticket) {
                    fetch.cancel();
                }
            }
            Happening::Meet { ticket, meeting } => {
                let deadline = Instant::now() + self.bootstrap_timeout;
                if self.rooms.arrive(&meeting.key, ticket, &meeting.rid, deadline) {
                    engine.with_scheduler(move |scheduler, _| scheduler.met(ticket));
                }
            }
            Happening::Ready { meeting, came } => self.ready(engine, &meeting, came),
            Happening::Left(meeting) => close(&Arc::downgrade(engine), &self.rooms, &meeting.key),
            Happening::Died => die(engine),
        }
    }

    fn ready(&self, engine: &Arc<Engine>, meeting: &Arc<Meeting>, came: Came) {
        let told = Told::Kv { contents: came.contents, cached: came.cached.unwrap_or(0) };
        if self.rooms.ready(&meeting.key, told, meeting.eager) {
            return;
        }
        // The room was used twice, or the decode engine has gone meanwhile.
        let why = "Failed due to an unknown reason from another rank";
        let failure = transfer_failure("Prefill transfer", "req.rid", &meeting.rid, &meeting.key, why);
        let key = Arc::clone(&meeting.key);
        engine.with_scheduler(move |scheduler, _| scheduler.not_taken(&key, failure));
    }

    fn fetch(self: &Arc<Self>, engine: &Arc<Engine>, ticket: u64, source: Arc<Source>, blocks: usize) {
        if let Source::Nixl(remote) = &*source
            && blocks > remote.blocks.len()
        {
            // An assertion that vLLM makes in the engine's process.
            tracing::error!(wanted = blocks, told = remote.blocks.len(), "fewer blocks than the prompt has");
            die(engine);
            return;
        }
        let abandoned = CancellationToken::new();
        self.fetches.lock().insert(ticket, abandoned.clone());
        let (desk, engine) = (Arc::downgrade(self), Arc::downgrade(engine));
        let (client, directory, patience, abort) =
            (Arc::clone(&self.client), Arc::clone(&self.directory), self.waiting_timeout, self.abort_timeout);
        let node = self.node.get().cloned();
        self.spawn(async move {
            let fetching = async {
                match &*source {
                    Source::Nixl(remote) => fetch_kept(&client, remote, blocks).await,
                    Source::Pushed(pusher) => given(client.be_given(pusher).await, &pusher.key),
                    Source::Mooncake(transfer) => given(transfer.take(abort).await, &transfer.id),
                    Source::Room { bootstrap, room, rid } => {
                        meet(&directory, bootstrap, *room, rid, patience).await
                    }
                    Source::Comm { group, id } => join(node.as_deref(), group, *id).await,
                }
            };
            let came = tokio::select! {
                came = fetching => came,
                () = abandoned.cancelled() => return,
            };
            if let Some(desk) = desk.upgrade() {
                desk.fetches.lock().remove(&ticket);
            }
            with(&engine, move |scheduler, _| scheduler.fetched(ticket, came));
        });
    }

    /// Says of all that is awaited that it is.
    pub(in crate::engines::sim) fn heartbeat(&self, scheduler: &Scheduler) -> bool {
        let mut engines: HashMap<(String, u16), Vec<String>> = HashMap::new();
        for source in scheduler.awaited() {
            let (host, port, id) = match source {
                Source::Nixl(remote) => (&remote.host, remote.port, Some(&remote.request_id)),
                Source::Pushed(pusher) => (&pusher.host, pusher.port, pusher.request_id.as_ref()),
                _ => continue,
            };
            let Some(id) = id else { continue };
            engines.entry((host.clone(), port)).or_default().push(id.clone());
        }
        let any = !engines.is_empty();
        for ((host, port), ids) in engines {
            self.spawn(async move {
                if let Err(error) = Client::heartbeat(&host, port, ids).await {
                    tracing::debug!(%error, host, port, "a heartbeat did not arrive");
                }
            });
        }
        any
    }

    /// Gives up what no decode engine came for, and says when to look again.
    pub(in crate::engines::sim) fn give_up(&self, scheduler: &mut Scheduler) -> Option<Instant> {
        if self.protocol != Protocol::Sglang {
            return None;
        }
        for Missed { ticket, key, rid } in self.rooms.missed(Instant::now()) {
            let why = format!(
                "Request {key} timed out after {} in KVPoll.Bootstrapping",
                seconds(self.bootstrap_timeout)
            );
            let failure = transfer_failure("Prefill bootstrap", "req.rid", &rid, &key, &why);
            scheduler.not_met(Some(ticket), &key, failure);
        }
        self.rooms.next_deadline()
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn fetch_kept(client: &Client, remote: &Remote, blocks: usize) -> Result<Came, Failure> {
    match client.fetch(remote, blocks).await {
        Ok(contents) => Ok(Came { contents, cached: remote.cached_there }),
        Err(error) => {
            tracing::warn!(%error, request = remote.request_id, "the KV of a prompt did not come");
            Err(Failure::NoTransfer)
        }
    }
}

/// What another engine gave of its own, or did not.
fn given(came: Result<(Vec<u64>, usize), impl std::fmt::Display>, key: &str) -> Result<Came, Failure> {
    match came {
        Ok((contents, _)) => Ok(Came { contents, cached: None }),
        Err(error) => {
            tracing::warn!(%error, key, "the KV of a prompt did not come");
            Err(Failure::NoTransfer)
        }
    }
}

/// Waits for the KV of a prompt in a room, and says then that it is here.
async fn meet(
    directory: &Directory,
    bootstrap: &str,
    room: u64,
    rid: &str,
    patience: Duration,
) -> Result<Came, Failure> {
    let key = room.to_string();
    let failure = |what: &str, why: &str| transfer_failure(what, "decode_req.req.rid", rid, &key, why);
    let (host, port) = directory.find(bootstrap, room).await.map_err(|why| {
        tracing::warn!(room, why, "the prefill engine of a request was not found");
        match why.starts_with("Could not fetch prefill") {
            true => Failure::Aborted { status: 500, message: why },
            false => failure("Decode handshake", &why),
        }
    })?;
    let meeting = async {
        let mut link = side::connect(&host, port).await?;
        let told: Told = side::ask(&mut link, &Question::Join(key.clone())).await?;
        if matches!(told, Told::Kv { .. }) {
            side::say(&mut link, &Question::Done(key.clone())).await?;
        }
        Ok::<_, ZmtpError>(told)
    };
    match tokio::time::timeout(patience, meeting).await {
        Ok(Ok(Told::Kv { contents, cached })) => Ok(Came { contents, cached: Some(cached) }),
        Ok(other) => {
            tracing::warn!(room, ?other, "the KV of a prompt did not come");
            directory.forget(bootstrap);
            Err(failure("Decode transfer", "Failed to get kvcache from prefill instance, it might be dead"))
        }
        Err(_) => {
            let why =
                format!("Request {key} timed out after {} in KVPoll.WaitingForInput", seconds(patience));
            Err(failure("Decode transfer", &why))
        }
    }
}

/// Waits for the KV of a prompt as KsanaLLM's engine does: for as long as it may take, whatever goes wrong.
async fn join(node: Option<&Node>, group: &str, id: i32) -> Result<Came, Failure> {
    let joining = async {
        // The group may still be being set up.
        let prefill = loop {
            match node.and_then(|node| node.prefill_of(group)) {
                Some(prefill) => break prefill,
                None => tokio::time::sleep(KSANA_LOOK).await,
            }
        };
        let mut link = side::connect_to(&prefill).await?;
        let told: Told = side::ask(&mut link, &Question::Join(id.to_string())).await?;
        if matches!(told, Told::Kv { .. }) {
            side::say(&mut link, &Question::Done(id.to_string())).await?;
        }
        Ok::<_, ZmtpError>(told)
    };
    match tokio::time::timeout(KSANA_PATIENCE, joining).await {
        Ok(Ok(Told::Kv { contents, .. })) => return Ok(Came { contents, cached: None }),
        Ok(other) => tracing::warn!(id, group, ?other, "the KV of a prompt will not come"),
        Err(_) => return Err(Failure::NoTransfer),
    }
    tokio::time::sleep(KSANA_PATIENCE).await;
    Err(Failure::NoTransfer)
}

/// What SGLang ends a request with whose KV did not get where it should.
fn transfer_failure(what: &str, name: &str, rid: &str, room: &str, why: &str) -> Failure {
    let prefix = name.strip_suffix("rid").unwrap_or("");
    let message = format!(
        "{what} failed for request rank=0 {name}='{rid}' {prefix}bootstrap_room={room} with exception \
         KVTransferError(bootstrap_room={room}): {why}"
    );
    Failure::Aborted { status: 500, message }
}

fn die(engine: &Engine) {
    // The one switch cannot be wrong.
    let _ = engine.set_faults(&FaultChange::death());
}

fn with(engine: &Weak<Engine>, act: impl FnOnce(&mut Scheduler, Duration) + Send + 'static) {
    if let Some(engine) = engine.upgrade() {
        engine.with_scheduler(act);
    }
}

/// Nobody is to meet there any more, and what was to is failed.
fn close(engine: &Weak<Engine>, rooms: &Rooms, key: &str) {
    let waiting = rooms.close(key);
    let key = key.to_owned();
    with(engine, move |scheduler, _| {
        let why = "Failed due to an unknown reason from another rank";
        let failure = transfer_failure("Prefill transfer", "req.rid", "", &key, why);
        for ticket in waiting {
            scheduler.not_met(Some(ticket), &key, failure.clone());
        }
    });
}

fn hand_on(protocol: Protocol, engine: &Weak<Engine>, rooms: &Rooms, notice: Notice) {
    match notice {
        // Only SGLang's prefill engines notice; others wait for somebody to ask again, or for the lease's end.
        Notice::Lost(key) if protocol != Protocol::Sglang => drop(rooms.close(&key)),
        Notice::Done(key) => {
            let waiting = rooms.close(&key);
            with(engine, move |scheduler, _| {
                if !scheduler.taken(&key) {
                    tracing::error!(
                        request = key,
                        "blocks of a request that is not known were fetched; they may have held something else"
                    );
                }
                for ticket in waiting {
                    scheduler.met(ticket);
                }
            });
        }
        Notice::Heartbeat(ids) => {
            let is_push = protocol == Protocol::VllmNixlPush;
            with(engine, move |scheduler, now| {
                let names = ids.iter().map(|id| if is_push { nixl::shared_id(id) } else { id });
                scheduler.renew(names, now);
            });
        }
        Notice::Met(tickets) => {
            with(engine, move |scheduler, _| tickets.into_iter().for_each(|ticket| scheduler.met(ticket)));
        }
        Notice::Lost(key) => {
            let waiting = rooms.close(&key);
            with(engine, move |scheduler, _| {
                let why = "Decode instance could be dead, its session is not alive";
                let failure = transfer_failure("Prefill transfer", "req.rid", "", &key, why);
                for ticket in waiting {
                    scheduler.not_met(Some(ticket), &key, failure.clone());
                }
                scheduler.not_met(None, &key, failure);
            });
        }
    }
}
