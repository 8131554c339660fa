//! The directory of streams for a process that is no replica: asks any replica over its peer
//! listener, and the next one where that fails.

pub mod place;
pub mod places;
pub mod server;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request as Rpc, Response, Status};

use self::server::{DONE, NO_ROOM, STANDS};
use super::directory::{Address, Directory, Look, Member, Peer, Soon, Taken};
use super::link::CLUSTER;
use super::link::proto::directory_client::DirectoryClient;
use super::link::proto::{ChangeReply, ChangeRequest, CloseRequest, FindRequest, LocateRequest, LookRequest};
use crate::cluster::api::ClusterError;
use crate::cluster::peer::dial::Dialer;
use crate::cluster::peer::purpose::Purpose;
use crate::codec;
use crate::ids::{ReplicaId, StreamId};
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Largest message: the members of a large cluster take some KiB.
const MAX_MESSAGE: usize = 1 << 20;
/// How often the cluster is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long one replica may take to say what it knows.
const KNOWN_TIMEOUT: Duration = Duration::from_millis(300);
/// How long one replica may take over what it asks the others for; the next one is asked then, since
/// what is asked may be done twice.
const AGREED_TIMEOUT: Duration = Duration::from_millis(1000);
/// After this time without an answer no replica is within reach.
const REACH: Duration = Duration::from_millis(1500);
/// How long the directory is told of a stream's end, while no replica answers, and how often.
const CLOSING: Duration = Duration::from_secs(30);
const CLOSE_PAUSE: Duration = Duration::from_millis(500);
/// How long where an agent is stays known, and for how many.
const LOCATED: Duration = Duration::from_secs(1);
const MOST_LOCATED: usize = 4096;

type Desk = DirectoryClient<Channel>;

/// What was seen of the cluster last.
#[derive(Clone, Debug, Default)]
struct Seen {
    look: Look,
    at: Option<Instant>,
    /// Whether there ever was a leader.
    led: bool,
    secret: Option<[u8; 32]>,
}

/// See the module.
pub struct Remote {
    dialer: Dialer,
    runtime: Handle,
    seeds: Vec<Address>,
    seen: ArcSwap<Seen>,
    /// Of places that are known; those that are not any more are dropped.
    desks: Mutex<HashMap<Address, Desk>>,
    /// Who answered last.
    favourite: Mutex<Option<Address>>,
    located: Mutex<HashMap<Holder, (Instant, Option<Address>)>>,
    /// Connections for questions where streams go.
    place_channels: Mutex<HashMap<Address, Channel>>,
}

/// Whether requests can be served, and why not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// Some replica answered lately.
    pub replica: bool,
    /// A leader was known since the start.
    pub led: bool,
    /// A leader and a quorum are known now: without, streams run but nobody takes over any.
    pub quorum: bool,
}

impl Remote {
    /// Asks the replicas whose peer listeners are at `seeds`, and those that they name. Tasks run on
    /// `runtime`.
    pub fn new(dialer: Dialer, seeds: Vec<Address>, runtime: Handle) -> Arc<Self> {
        Arc::new(Self {
            dialer,
            runtime,
            seeds,
            seen: ArcSwap::default(),
            desks: Mutex::default(),
            favourite: Mutex::default(),
            located: Mutex::default(),
            place_channels: Mutex::default(),
        })
    }

    /// Looks after the cluster until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let looks = async {
            loop {
                self.look().await;
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = looks => {}
            () = stop.cancelled() => {}
        }
    }

    /// The cluster as it was seen last.
    pub fn seen(&self) -> Look {
        self.seen.load().look.clone()
    }

    /// All replicas, those first that are alive, as far as is known.
    pub fn replicas(&self) -> Vec<Member> {
        let mut members = self.seen.load().look.members.clone();
        members.sort_by_key(|member| !member.peer.alive);
        members
    }

    /// Whether the cluster does not hear this replica, or does not know it.
    pub fn misses(&self, id: ReplicaId) -> bool {
        let seen = self.seen.load();
        !seen.look.members.iter().any(|member| member.peer.id == id && member.peer.alive)
    }

    /// Whether requests can be served.
    pub fn reach(&self) -> Reach {
        let seen = self.seen.load();
        let replica = seen.at.is_some_and(|at| at.elapsed() < REACH);
        Reach { replica, led: seen.led, quorum: replica && seen.look.leader && seen.look.quorum }
    }

    /// Looks at the cluster now: by the eyes of a replica that has a quorum, if there is one.
    pub async fn look(&self) {
        let mut best = None;
        for place in self.places() {
            let Some(mut desk) = self.desk(&place) else { continue };
            let secret = self.seen.load().secret.is_none();
            let asked = timeout(KNOWN_TIMEOUT, desk.look(LookRequest { secret })).await;
            let reply = match asked {
                Ok(Ok(reply)) => reply.into_inner(),
                Ok(Err(status)) => {
                    self.failed(&place, status.message());
                    continue;
                }
                Err(_) => {
                    self.failed(&place, "no answer in time");
                    continue;
                }
            };
            let known = &self.seen.load().look.cluster;
            if !known.is_empty() && *known != reply.cluster {
                self.failed(&place, "belongs to another cluster");
                continue;
            }
            let members = reply.members.into_iter().map(|member| Member {
                http: member.http,
                admin: member.admin,
                peer: Peer {
                    id: ReplicaId(member.id),
                    name: member.name,
                    address: member.peer,
                    alive: member.alive,
                    leads: member.leads,
                },
            });
            let look = Look {
                cluster: reply.cluster,
                members: members.collect(),
                leader: reply.leader,
                quorum: reply.quorum,
                agents: reply.agents,
            };
            let secret = <[u8; 32]>::try_from(reply.secret.as_ref()).ok();
            let has_quorum = look.quorum && look.leader;
            if has_quorum || best.is_none() {
                best = Some((place, look, secret));
            }
            if has_quorum {
                break;
            }
        }
        let Some((place, look, secret)) = best else { return };
        *self.favourite.lock() = Some(place);
        let old = self.seen.load();
        let seen = Seen {
            led: old.led || (look.leader && look.quorum),
            secret: secret.or(old.secret),
            at: Some(Instant::now()),
            look,
        };
        self.seen.store(Arc::new(seen));
        let known = self.places();
        self.desks.lock().retain(|place, _| known.contains(place));
        self.place_channels.lock().retain(|place, _| known.contains(place));
    }

    /// Whom to ask, in this order.
    fn places(&self) -> Vec<Address> {
        let mut places: Vec<Address> = self.favourite.lock().iter().cloned().collect();
        let members = self.replicas().into_iter().map(|member| (member.peer.address, Some(member.peer.name)));
        for place in members.chain(self.seeds.iter().cloned()) {
            if !places.iter().any(|(address, _)| *address == place.0) {
                places.push(place);
            }
        }
        places
    }

    fn desk(&self, place: &Address) -> Option<Desk> {
        if let Some(desk) = self.desks.lock().get(place) {
            return Some(desk.clone());
        }
        match self.channel(place, Purpose::Cluster) {
            Ok(channel) => {
                let desk = DirectoryClient::new(channel)
                    .max_decoding_message_size(MAX_MESSAGE)
                    .max_encoding_message_size(MAX_MESSAGE);
                self.desks.lock().insert(place.clone(), desk.clone());
                Some(desk)
            }
            Err(error) => {
                tracing::debug!(address = place.0, %error, "no replica can be there");
                None
            }
        }
    }

    /// A connection that lives on our own runtime, whoever asks for it first.
    fn channel(&self, place: &Address, purpose: Purpose) -> Result<Channel, String> {
        let _entered = self.runtime.enter();
        self.dialer.channel(&place.0, place.1.as_deref(), purpose)
    }

    fn failed(&self, place: &Address, why: &str) {
        tracing::debug!(address = place.0, why, "replica not asked");
        let mut favourite = self.favourite.lock();
        if favourite.as_ref() == Some(place) {
            *favourite = None;
        }
    }

    /// Asks one replica after the other; the answer, and whether an earlier one may have done it, too.
    async fn ask<T, F>(
        &self,
        limit: Duration,
        call: impl Fn(Desk, Cluster) -> F,
    ) -> Result<(T, bool), ClusterError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let began = Instant::now();
        let cluster = Cluster(self.seen.load().look.cluster.clone());
        let mut again = false;
        for place in self.places() {
            let Some(desk) = self.desk(&place) else { continue };
            match timeout(limit, call(desk, cluster.clone())).await {
                Ok(Ok(answer)) => return Ok((answer.into_inner(), again)),
                Ok(Err(status)) => self.failed(&place, status.message()),
                Err(_) => self.failed(&place, "no answer in time"),
            }
            again = true;
        }
        Err(ClusterError::Unavailable { waited: began.elapsed() })
    }

    async fn find_by(&self, id: StreamId, surely: bool) -> Result<Option<StreamRecord>, ClusterError> {
        let limit = if surely { AGREED_TIMEOUT } else { KNOWN_TIMEOUT };
        let id = Bytes::copy_from_slice(id.chars());
        let asked = self.ask(limit, |mut desk, cluster| {
            let request = cluster.of(FindRequest { id: id.clone(), surely });
            async move { desk.find(request).await }
        });
        let (reply, _) = asked.await?;
        read_record(&reply.record)
    }

    async fn take_over(
        &self,
        id: StreamId,
        from_attempt: u32,
        record: StreamRecord,
    ) -> Result<Taken, ClusterError> {
        let change = ChangeRequest {
            id: Bytes::copy_from_slice(id.chars()),
            record: codec::encode(&record).into(),
            from_attempt,
        };
        let asked = self.ask(AGREED_TIMEOUT, |mut desk, cluster| {
            let request = cluster.of(change.clone());
            async move { desk.take(request).await }
        });
        let (reply, again) = asked.await?;
        match (reply.outcome, read_record(&reply.record)?) {
            (DONE, _) => Ok(Taken::Won),
            // Ours, by way of a replica that did not answer; or one just like it of somebody else: then
            // that holder has it already, and refuses a second order of the same attempt.
            (STANDS, Some(stands))
                if again && stands.attempt == from_attempt + 1 && stands.holder == record.holder =>
            {
                Ok(Taken::Won)
            }
            (STANDS, Some(stands)) => Ok(Taken::Lost(Box::new(stands))),
            (NO_ROOM, _) => Ok(Taken::Refused),
            _ => Err(not_understood()),
        }
    }

    fn close(self: &Arc<Self>, id: StreamId, how: Option<StreamEnd>, attempt: u32, keep_ms: u32) {
        let how: Bytes = how.map(|how| codec::encode(&how).into()).unwrap_or_default();
        let close = CloseRequest { id: Bytes::copy_from_slice(id.chars()), how, attempt, keep_ms };
        let this = Arc::clone(self);
        self.runtime.spawn(async move {
            let began = Instant::now();
            loop {
                let asked = this.ask(AGREED_TIMEOUT, |mut desk, cluster| {
                    let request = cluster.of(close.clone());
                    async move { desk.close(request).await }
                });
                let Err(error) = asked.await else { return };
                if began.elapsed() >= CLOSING {
                    // It is forgotten in time without that.
                    tracing::debug!(stream = %id, %error, "no replica was told of a stream's end");
                    return;
                }
                tokio::time::sleep(CLOSE_PAUSE).await;
            }
        });
    }

    async fn locate(&self, holder: Holder) -> Option<Address> {
        let known = self.located.lock().get(&holder).cloned();
        if let Some((at, place)) = &known
            && at.elapsed() < LOCATED
        {
            return place.clone();
        }
        let wire: Bytes = codec::encode(&holder).into();
        let asked = self.ask(KNOWN_TIMEOUT, |mut desk, cluster| {
            let request = cluster.of(LocateRequest { holder: wire.clone() });
            async move { desk.locate(request).await }
        });
        let Ok((reply, _)) = asked.await else {
            // Without any replica, it is most likely where it was.
            return known.and_then(|(_, place)| place);
        };
        let name = Some(reply.name).filter(|name| !name.is_empty());
        let place = Some((reply.address, name)).filter(|(address, _)| !address.is_empty());
        self.note_located(holder, place.clone());
        place
    }

    fn note_located(&self, holder: Holder, place: Option<Address>) {
        let mut located = self.located.lock();
        if located.len() >= MOST_LOCATED {
            located.clear();
        }
        located.insert(holder, (Instant::now(), place));
    }
}

/// The cluster that is meant.
#[derive(Clone)]
struct Cluster(String);

impl Cluster {
    fn of<T>(&self, message: T) -> Rpc<T> {
        let mut request = Rpc::new(message);
        // Hexadecimal; what is not is refused over there for want of it.
        if let Ok(cluster) = self.0.parse() {
            request.metadata_mut().insert(CLUSTER, cluster);
        }
        request
    }
}

fn read_record(bytes: &[u8]) -> Result<Option<StreamRecord>, ClusterError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    codec::decode(bytes).map(Some).map_err(|_| not_understood())
}

fn not_understood() -> ClusterError {
    ClusterError::Down("the replica's answer cannot be read; is it of another version?".to_owned())
}

/// The directory, as the hub wants it.
pub struct OfRemote(pub Arc<Remote>);

impl Directory for OfRemote {
    fn me(&self) -> Option<ReplicaId> {
        None
    }

    fn cluster(&self) -> String {
        self.0.seen.load().look.cluster.clone()
    }

    fn peers(&self) -> Vec<Peer> {
        self.0.seen.load().look.members.iter().map(|member| member.peer.clone()).collect()
    }

    fn is_elsewhere(&self) -> bool {
        true
    }

    fn find(&self, id: StreamId) -> Soon<Option<StreamRecord>> {
        let remote = Arc::clone(&self.0);
        Box::pin(async move { remote.find_by(id, false).await.ok().flatten() })
    }

    fn find_surely(&self, id: StreamId) -> Soon<Result<Option<StreamRecord>, ClusterError>> {
        let remote = Arc::clone(&self.0);
        Box::pin(async move { remote.find_by(id, true).await })
    }

    fn open(
        &self,
        id: StreamId,
        record: StreamRecord,
    ) -> Soon<Result<Option<Box<StreamRecord>>, ClusterError>> {
        let remote = Arc::clone(&self.0);
        Box::pin(async move {
            let change = ChangeRequest {
                id: Bytes::copy_from_slice(id.chars()),
                record: codec::encode(&record).into(),
                from_attempt: 0,
            };
            let asked = remote.ask(AGREED_TIMEOUT, |mut desk, cluster| {
                let request = cluster.of(change.clone());
                async move { desk.open(request).await }
            });
            let (ChangeReply { record, .. }, _) = asked.await?;
            Ok(read_record(&record)?.map(Box::new))
        })
    }

    fn take(
        &self,
        id: StreamId,
        from_attempt: u32,
        record: StreamRecord,
    ) -> Soon<Result<Taken, ClusterError>> {
        let remote = Arc::clone(&self.0);
        Box::pin(async move { remote.take_over(id, from_attempt, record).await })
    }

    fn mirror(&self, _: StreamId, _: u32) {
        // Nobody could come here for it.
    }

    fn end(&self, id: StreamId, attempt: u32, how: StreamEnd, keep_ms: u32) {
        self.0.close(id, Some(how), attempt, keep_ms);
    }

    fn purge(&self, id: StreamId) {
        self.0.close(id, None, 0, 0);
    }

    fn secret(&self) -> Option<[u8; 32]> {
        self.0.seen.load().secret
    }

    fn address(&self, holder: Holder) -> Soon<Option<Address>> {
        let remote = Arc::clone(&self.0);
        Box::pin(async move {
            if let Holder::Replica(id) = holder {
                let seen = remote.seen.load();
                let member = seen.look.members.iter().find(|member| member.peer.id == id)?;
                return Some((member.peer.address.clone(), Some(member.peer.name.clone())));
            }
            remote.locate(holder).await
        })
    }
}
