//! openraft's network over the peer links: pipelined appends on one lane, heartbeats on
//! another, votes on a third, snapshots in chunks.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use openraft::OptionalSend;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use tokio_stream::wrappers::ReceiverStream;
use xxhash_rust::xxh3::xxh3_64;

use super::peer::lane::{Lane, LaneError};
use super::peer::link::{Link, Links};
use super::peer::proto::Chunk;
use super::peer::wire::{CHUNK, Kind};
use super::types::Image;
use super::types::{PeerNode, Snapshot, TypeConfig, Vote};
use crate::codec;
use crate::ids::{Group, ReplicaId};

/// Appends in flight to one follower.
const PIPELINE: usize = 64;
/// A follower that does not answer an append within this is given up and tried anew.
const APPEND_TIMEOUT: Duration = Duration::from_millis(1500);
/// Pause between attempts to reach a peer that cannot be reached.
const BACKOFF: Duration = Duration::from_millis(100);

type Rpc<T> = Result<T, RPCError<TypeConfig>>;

fn failed(error: &LaneError) -> RPCError<TypeConfig> {
    match error {
        LaneError::Unreachable(_) => RPCError::Unreachable(Unreachable::new(error)),
        _ => RPCError::Network(NetworkError::new(error)),
    }
}

fn garbled(error: &codec::CodecError) -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::new(error))
}

/// Makes one group's connections.
pub struct Network {
    group: Group,
    links: Arc<Links>,
}

impl Network {
    /// For `group`, over the replica's links.
    pub fn new(group: Group, links: Arc<Links>) -> Self {
        Self { group, links }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &PeerNode) -> Peer {
        let link = self.links.to(ReplicaId(target), node);
        if let Err(why) = &link {
            tracing::error!(%why, target, "cannot make a link");
        }
        Peer { group: self.group, target: link.ok().map(|link| (Lane::new(link.clone()), link)) }
    }
}

/// One group's connection to one peer, for one purpose of openraft's.
pub struct Peer {
    group: Group,
    /// `None` for an address that is no address: never reachable.
    target: Option<(Lane, Arc<Link>)>,
}

impl Peer {
    fn lane(&self) -> Rpc<&Lane> {
        let none = || failed(&LaneError::Unreachable("no valid address".to_owned()));
        self.target.as_ref().map(|(lane, _)| lane).ok_or_else(none)
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        kind: Kind,
        question: &impl serde::Serialize,
        option: &RPCOption,
    ) -> Rpc<T> {
        let body = codec::encode(question);
        let answer =
            self.lane()?.call(kind, self.group, body, option.soft_ttl()).await.map_err(|e| failed(&e))?;
        codec::decode(&answer).map_err(|e| garbled(&e))
    }
}

impl RaftNetworkV2<TypeConfig> for Peer {
    type SnapshotData = Image;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<TypeConfig>> {
        let result: StreamAppendResult<TypeConfig> = self.ask(Kind::Append, &rpc, &option).await?;
        Ok(result.into())
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Rpc<BoxStream<'s, Rpc<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            // The pause after a peer that could not be reached is taken where the next request is made, so that
            // comes before the connection: it would be tried again without any pause otherwise.
            let Some(first) = input.next().await else {
                return Ok(Box::pin(stream::empty()) as BoxStream<'s, _>);
            };
            let group = self.group;
            let lane = self.lane()?;
            let open = lane.open().await.map_err(|e| failed(&e))?;
            let answers = stream::once(std::future::ready(first))
                .chain(input)
                .map(move |request| {
                    // Asked here, where the stream is in order; only the answer is awaited later.
                    let asked = open.ask(Kind::Append, group, codec::encode(&request));
                    async move {
                        let answer = async { asked?.await.map_err(|_| LaneError::Closed) };
                        match tokio::time::timeout(APPEND_TIMEOUT, answer).await {
                            Ok(Ok(bytes)) => {
                                let result: StreamAppendResult<TypeConfig> =
                                    codec::decode(&bytes).map_err(|e| garbled(&e))?;
                                if result.is_err() {
                                    // The peer closes a lane on which it refused an append.
                                    lane.close().await;
                                }
                                Ok(result)
                            }
                            Ok(Err(error)) => {
                                lane.close().await;
                                Err(failed(&error))
                            }
                            Err(_) => {
                                lane.close().await;
                                Err(failed(&LaneError::Timeout(APPEND_TIMEOUT)))
                            }
                        }
                    }
                })
                .buffered(PIPELINE);
            Ok(Box::pin(answers) as BoxStream<'s, _>)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask(Kind::Vote, &rpc, &option).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<VoteResponse<TypeConfig>> {
        self.ask(Kind::PreVote, &rpc, &option).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let unreachable =
            |why: String| StreamingError::Unreachable(Unreachable::new(&LaneError::Unreachable(why)));
        let Some((_, link)) = &self.target else { return Err(unreachable("no valid address".to_owned())) };
        let head = codec::encode(&(vote, &snapshot.meta));
        let group = self.group;
        // Two chunks wait at most; the receiver's pace sets ours.
        let (tx, rx) = tokio::sync::mpsc::channel(2);
        let feed = async move {
            for chunk in chunks(group, head, &snapshot.snapshot) {
                if tx.send(chunk).await.is_err() {
                    break;
                }
            }
        };
        let mut client = link.client();
        let send = client.snapshot(link.address(tonic::Request::new(ReceiverStream::new(rx))));
        let transfer = async { tokio::join!(feed, tokio::time::timeout(option.hard_ttl(), send)).1 };
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            answer = transfer => match answer {
                Err(_) => Err(unreachable(format!("snapshot not taken within {} s", option.hard_ttl().as_secs()))),
                Ok(Err(status)) => Err(unreachable(status.message().to_owned())),
                Ok(Ok(answer)) => codec::decode(&answer.into_inner().body)
                    .map_err(|e| StreamingError::Network(NetworkError::new(&e))),
            },
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Rpc<TransferLeaderResponse<TypeConfig>> {
        self.ask(Kind::TransferLeader, &req, &option).await
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

/// Cuts a snapshot's records into chunks of about [`CHUNK`] bytes, the last one marked.
fn chunks(group: Group, head: Vec<u8>, records: &Image) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    let mut list = codec::ListEncoder::default();
    let mut cut = |list: &mut codec::ListEncoder, last: bool| {
        let body = bytes::Bytes::from(list.finish());
        let checksum = xxh3_64(&body);
        let head = if chunks.is_empty() { head.clone().into() } else { bytes::Bytes::new() };
        chunks.push(Chunk { group: group as u32, head, body, checksum, last });
    };
    for record in records.iter() {
        list.push(record);
        if list.len() >= CHUNK {
            cut(&mut list, false);
        }
    }
    cut(&mut list, true);
    chunks
}
