//! The answering side of the links: lanes, snapshots and calls, for whichever groups this
//! replica runs.

use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult, TransferLeaderRequest, VoteRequest};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request as Rpc, Response, Status, Streaming};
use xxhash_rust::xxh3::xxh3_64;

use super::incoming::Caller;
use super::proto::peer_server::{Peer, PeerServer};
use super::proto::{Answer, Chunk, Frame, Request};
use super::wire::{CLUSTER, Call, FROM, Kind, MAX_MESSAGE, ProposeReply, Reply, TO};
use crate::cluster::machine::Raft;
use crate::cluster::membership::Members;
use crate::cluster::pacemaker::Heard;
use crate::cluster::read_index::{ReadIndex, vouch};
use crate::cluster::types::{Segment, Snapshot, SnapshotMeta, TypeConfig, Vote};
use crate::codec;
use crate::ids::{Group, ReplicaId};

/// Appends taken from a lane before the first is answered.
const APPENDS: usize = 64;
/// Answers waiting for the connection.
const ANSWERS: usize = 256;
/// Most bytes of one snapshot taken.
const MAX_SNAPSHOT: usize = 4 << 30;

/// What the links serve: the running groups of a member.
pub struct Served {
    /// The cluster.
    pub cluster: u128,
    /// This member.
    pub me: ReplicaId,
    /// Both groups.
    pub rafts: [Raft; 2],
    /// Both groups' intakes.
    pub intakes: [mpsc::Sender<Segment>; 2],
    /// When leaders were last heard.
    pub heard: Heard,
    /// Answers linearizable readers while this replica leads.
    pub reads: ReadIndex,
}

/// Answers calls; and knows what is served, once there is something.
pub trait Host: Send + Sync + 'static {
    /// The running groups; `None` before the replica belongs to a cluster.
    fn served(&self) -> Option<Arc<Served>>;
    /// Answers a call.
    fn call(self: Arc<Self>, call: Call) -> Pin<Box<dyn Future<Output = Reply> + Send>>;
}

impl Served {
    /// The name of a member, as far as this replica knows the members.
    fn name_of(&self, id: ReplicaId) -> Option<String> {
        let name = |raft| Members::of(raft).node(id).map(|node| node.name.clone());
        self.rafts.iter().find_map(name)
    }
}

/// The gRPC service over a host.
pub struct Service<H> {
    host: Arc<H>,
}

impl<H: Host> Service<H> {
    /// The service, ready for a tonic server.
    pub fn serve(host: Arc<H>) -> PeerServer<Self> {
        PeerServer::new(Self { host })
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Checks that the caller means this member of this cluster; and, where it has shown a
    /// certificate, that it is who it says. Then it may speak for that member only.
    ///
    /// A member that is not known here yet is taken at its word: whoever was away learns of new
    /// members from those members. It has the certificate of *a* member in any case.
    fn served_for<T>(&self, request: &Rpc<T>) -> Result<(Arc<Served>, Speaker), Status> {
        let served =
            self.host.served().ok_or_else(|| Status::unavailable("this replica is not a member yet"))?;
        let text = |key| request.metadata().get(key).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if text(CLUSTER) != format!("{:032x}", served.cluster) {
            return Err(Status::failed_precondition("this replica belongs to another cluster"));
        }
        if text(TO) != served.me.to_string() {
            return Err(Status::failed_precondition(format!(
                "this is member {}, not {}",
                served.me,
                text(TO)
            )));
        }
        let Some(shown) = shown(request) else { return Ok((served, Speaker(None))) };
        let from = text(FROM)
            .parse()
            .map(ReplicaId)
            .map_err(|_| Status::invalid_argument("the caller does not say which member it is"))?;
        match served.name_of(from) {
            Some(name) if name != *shown => Err(Status::permission_denied(format!(
                "the certificate is of {shown}, but member {from} is {name}"
            ))),
            _ => Ok((served, Speaker(Some(from)))),
        }
    }
}

/// The name in the caller's certificate; `None` where it has shown none.
fn shown<T>(request: &Rpc<T>) -> Option<Arc<str>> {
    request.extensions().get::<Caller>().and_then(|caller| caller.0.clone())
}

/// The only member that a connection may speak for; any, where there are no certificates.
#[derive(Clone, Copy)]
struct Speaker(Option<ReplicaId>);

impl Speaker {
    fn is(self, id: ReplicaId) -> bool {
        self.0.is_none_or(|speaker| speaker == id)
    }

    /// Whether it may vote so: candidates and leaders speak for themselves.
    fn votes(self, vote: &Vote) -> bool {
        self.is(ReplicaId(vote.leader_id().node_id))
    }
}

#[tonic::async_trait]
impl<H: Host> Peer for Service<H> {
    type LaneStream = Pin<Box<dyn Stream<Item = Result<Frame, Status>> + Send>>;

    async fn lane(&self, request: Rpc<Streaming<Frame>>) -> Result<Response<Self::LaneStream>, Status> {
        let (served, speaker) = self.served_for(&request)?;
        let (answers, outgoing) = mpsc::channel(ANSWERS);
        // Ends when the caller closes the lane.
        tokio::spawn(serve_lane(served, speaker, request.into_inner(), answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing).map(Ok))))
    }

    async fn snapshot(&self, request: Rpc<Streaming<Chunk>>) -> Result<Response<Answer>, Status> {
        let (served, speaker) = self.served_for(&request)?;
        let mut chunks = request.into_inner();
        let bad = |e: codec::CodecError| Status::invalid_argument(e.to_string());
        let mut head: Option<(Group, Vote, SnapshotMeta)> = None;
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut complete = false;
        while let Some(chunk) = chunks.message().await? {
            if xxh3_64(&chunk.body) != chunk.checksum {
                return Err(Status::data_loss("a chunk's checksum does not match"));
            }
            bytes += chunk.body.len();
            if bytes > MAX_SNAPSHOT {
                return Err(Status::resource_exhausted("snapshot too large"));
            }
            if head.is_none() {
                let group =
                    Group::from_wire(chunk.group).ok_or_else(|| Status::invalid_argument("no such group"))?;
                let (vote, meta) = codec::decode(&chunk.head).map_err(bad)?;
                head = Some((group, vote, meta));
            }
            let mut part: Vec<(Vec<u8>, Vec<u8>)> = codec::decode(&chunk.body).map_err(bad)?;
            records.append(&mut part);
            complete = chunk.last;
        }
        let (true, Some((group, vote, meta))) = (complete, head) else {
            return Err(Status::data_loss("the snapshot ended before its last chunk"));
        };
        if !speaker.votes(&vote) {
            return Err(Status::permission_denied("the snapshot is not of the leader it names"));
        }
        let snapshot = Snapshot { meta, snapshot: Arc::new(records) };
        let answer = served.rafts[group.index()]
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(|fatal| Status::internal(fatal.to_string()))?;
        Ok(Response::new(Answer { body: codec::encode(&answer).into() }))
    }

    async fn call(&self, request: Rpc<Request>) -> Result<Response<Answer>, Status> {
        let shown = shown(&request);
        let call: Call =
            codec::decode(&request.into_inner().body).map_err(|e| Status::invalid_argument(e.to_string()))?;
        if let (Some(shown), Some(claimed)) = (shown, call.claims())
            && *shown != *claimed
        {
            return Err(Status::permission_denied(format!(
                "the certificate is of {shown}, not of {claimed}"
            )));
        }
        let reply = self.host.clone().call(call).await;
        Ok(Response::new(Answer { body: codec::encode(&reply).into() }))
    }
}

/// An append and the number of its frame.
type Numbered = (u64, AppendEntriesRequest<TypeConfig>);

/// One lane: appends go to openraft in order and pipelined, everything else on its own.
async fn serve_lane(
    served: Arc<Served>,
    speaker: Speaker,
    mut frames: Streaming<Frame>,
    answers: mpsc::Sender<Frame>,
) {
    let mut appends: [Option<mpsc::Sender<Numbered>>; 2] = [None, None];
    let closed = CancellationToken::new();
    loop {
        let message = tokio::select! {
            message = frames.message() => message,
            () = closed.cancelled() => return,
        };
        let Ok(Some(frame)) = message else { return };
        let (Some(group), Some(kind)) = (Group::from_wire(frame.group), Kind::from_wire(frame.kind)) else {
            tracing::warn!(group = frame.group, kind = frame.kind, "frame of an unknown kind; lane closed");
            return;
        };
        match kind {
            Kind::Append => {
                let request: AppendEntriesRequest<TypeConfig> = match codec::decode(&frame.body) {
                    Ok(request) => request,
                    Err(error) => {
                        tracing::warn!(%group, %error, "append that cannot be read; lane closed");
                        return;
                    }
                };
                if !speaker.votes(&request.vote) {
                    return spoke_for_another(speaker);
                }
                let slot = &mut appends[group.index()];
                let sender = slot.get_or_insert_with(|| {
                    let (tx, rx) = mpsc::channel(APPENDS);
                    let (served, guard) = (served.clone(), closed.clone().drop_guard());
                    tokio::spawn(serve_appends(served, group, rx, answers.clone(), guard));
                    tx
                });
                if sender.send((frame.id, request)).await.is_err() {
                    return;
                }
            }
            Kind::Propose => {
                let Ok(segment) = codec::decode::<Segment>(&frame.body) else { return };
                if !speaker.is(segment.origin) {
                    return spoke_for_another(speaker);
                }
                let reply = propose(&served, group, segment);
                if answer(&answers, frame.id, &reply).await.is_err() {
                    return;
                }
            }
            Kind::Vote | Kind::PreVote | Kind::TransferLeader | Kind::ReadIndex | Kind::Vouch => {
                let (served, answers) = (served.clone(), answers.clone());
                tokio::spawn(async move {
                    if let Some(body) = ask_raft(&served, speaker, group, kind, &frame.body).await {
                        let _ =
                            answers.send(Frame { id: frame.id, kind: 0, group: 0, body: body.into() }).await;
                    }
                });
            }
        }
    }
}

fn spoke_for_another(speaker: Speaker) {
    tracing::warn!(caller = ?speaker.0, "a member spoke for another; lane closed");
}

async fn answer(answers: &mpsc::Sender<Frame>, id: u64, reply: &impl serde::Serialize) -> Result<(), ()> {
    let frame = Frame { id, kind: 0, group: 0, body: codec::encode(reply).into() };
    answers.send(frame).await.map_err(|_| ())
}

fn propose(served: &Served, group: Group, segment: Segment) -> ProposeReply {
    if !served.rafts[group.index()].is_leader() {
        return ProposeReply::NotLeader;
    }
    match served.intakes[group.index()].try_send(segment) {
        Ok(()) => ProposeReply::Taken,
        Err(mpsc::error::TrySendError::Full(_)) => ProposeReply::Busy,
        Err(mpsc::error::TrySendError::Closed(_)) => ProposeReply::NotLeader,
    }
}

/// Feeds appends to openraft's pipeline and answers in order. The first that is refused closes
/// the lane: whatever is on its way behind it is refused with it, and the leader begins anew.
async fn serve_appends(
    served: Arc<Served>,
    group: Group,
    requests: mpsc::Receiver<Numbered>,
    answers: mpsc::Sender<Frame>,
    _closes_lane: DropGuard,
) {
    // openraft takes at most its pipeline (64) and a few more before it answers the first.
    let (ids_tx, mut ids) = mpsc::channel::<u64>(4 * APPENDS);
    let input = ReceiverStream::new(requests).map(move |(id, request)| {
        if ids_tx.try_send(id).is_err() {
            tracing::error!("more appends in openraft's pipeline than it says");
        }
        request
    });
    let mut results = Box::pin(served.rafts[group.index()].stream_append(input));
    while let Some(result) = results.next().await {
        let Ok(result): Result<StreamAppendResult<TypeConfig>, _> = result else { return };
        let Some(id) = ids.recv().await else { return };
        if result.is_ok() {
            served.heard.note(group);
        }
        if answer(&answers, id, &result).await.is_err() {
            return;
        }
    }
}

async fn ask_raft(
    served: &Served,
    speaker: Speaker,
    group: Group,
    kind: Kind,
    body: &Bytes,
) -> Option<Vec<u8>> {
    let raft = &served.rafts[group.index()];
    let voting = || {
        let request: VoteRequest<TypeConfig> = codec::decode(body).ok()?;
        speaker.votes(&request.vote).then_some(request)
    };
    match kind {
        Kind::Vote => raft.vote(voting()?).await.ok().map(|answer| codec::encode(&answer)),
        Kind::PreVote => raft.pre_vote(voting()?).await.ok().map(|answer| codec::encode(&answer)),
        Kind::TransferLeader => {
            let request: TransferLeaderRequest<TypeConfig> = codec::decode(body).ok()?;
            if !speaker.votes(request.from_leader()) {
                return None;
            }
            raft.handle_transfer_leader(request).await.ok().map(|answer| codec::encode(&answer))
        }
        Kind::ReadIndex => Some(codec::encode(&served.reads.ask(raft, group).await)),
        Kind::Vouch => {
            let vote: Vote = codec::decode(body).ok()?;
            if !speaker.votes(&vote) {
                return None;
            }
            Some(codec::encode(&vouch(raft, vote).await))
        }
        Kind::Append | Kind::Propose => None,
    }
}
