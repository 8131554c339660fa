//! A replica's directory, for those outside the cluster: over the peer listener, where a caller has
//! shown a certificate of the cluster's authority if there are any.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tonic::{Request as Rpc, Response, Status};

use super::MAX_MESSAGE;
use crate::cluster::api::ClusterError;
use crate::codec;
use crate::ids::StreamId;
use crate::relay::directory::{Known, Taken};
use crate::relay::link::CLUSTER;
use crate::relay::link::proto::directory_server::{Directory as Asked, DirectoryServer};
use crate::relay::link::proto::{
    ChangeReply, ChangeRequest, CloseReply, CloseRequest, FindReply, FindRequest, LocateReply, LocateRequest,
    LookReply, LookRequest, Member,
};
use crate::state::streams::{Holder, StreamEnd, StreamRecord};

/// Longest model name in a record from outside, as replicas cut it: 128 characters of up to 4 bytes.
const MOST_MODEL: usize = 512;

/// What became of a change.
pub(super) const DONE: u32 = 1;
pub(super) const STANDS: u32 = 2;
pub(super) const NO_ROOM: u32 = 3;

/// The service over a replica's directory.
pub struct Service<D> {
    directory: Arc<OnceLock<Arc<D>>>,
}

impl<D: Known> Service<D> {
    /// The service, ready for a tonic server. The directory may come later.
    pub fn serve(directory: Arc<OnceLock<Arc<D>>>) -> DirectoryServer<Self> {
        DirectoryServer::new(Self { directory })
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    fn directory(&self) -> Result<&Arc<D>, Status> {
        let member = self.directory.get().filter(|directory| !directory.cluster().is_empty());
        member.ok_or_else(|| Status::unavailable("this replica is not a member yet"))
    }

    /// The directory, for who means this cluster.
    fn meant<T>(&self, request: &Rpc<T>) -> Result<&Arc<D>, Status> {
        let directory = self.directory()?;
        let theirs = request.metadata().get(CLUSTER).and_then(|value| value.to_str().ok());
        if theirs != Some(directory.cluster().as_str()) {
            return Err(Status::failed_precondition("this replica belongs to another cluster"));
        }
        Ok(directory)
    }
}

#[tonic::async_trait]
impl<D: Known> Asked for Service<D> {
    async fn look(&self, request: Rpc<LookRequest>) -> Result<Response<LookReply>, Status> {
        let directory = self.directory()?;
        let secret = if request.get_ref().secret { directory.secret() } else { None };
        let look = directory.look();
        let members = look.members.into_iter().map(|member| Member {
            id: member.peer.id.0,
            name: member.peer.name,
            peer: member.peer.address,
            http: member.http,
            admin: member.admin,
            alive: member.peer.alive,
            leads: member.peer.leads,
        });
        Ok(Response::new(LookReply {
            cluster: look.cluster,
            members: members.collect(),
            leader: look.leader,
            quorum: look.quorum,
            agents: look.agents,
            secret: secret.map(|secret| Bytes::copy_from_slice(&secret)).unwrap_or_default(),
        }))
    }

    async fn find(&self, request: Rpc<FindRequest>) -> Result<Response<FindReply>, Status> {
        let directory = self.meant(&request)?;
        let asked = request.get_ref();
        let id = stream_id(&asked.id)?;
        let record = match asked.surely {
            true => directory.find_surely(id).await.map_err(status)?,
            false => directory.find(id).await,
        };
        let record = record.map(|record| codec::encode(&record).into()).unwrap_or_default();
        Ok(Response::new(FindReply { record }))
    }

    async fn open(&self, request: Rpc<ChangeRequest>) -> Result<Response<ChangeReply>, Status> {
        let directory = self.meant(&request)?;
        let asked = request.get_ref();
        let listed = directory.open(stream_id(&asked.id)?, record(&asked.record)?);
        Ok(Response::new(match listed.await.map_err(status)? {
            None => ChangeReply { outcome: DONE, record: Bytes::new() },
            Some(stands) => ChangeReply { outcome: STANDS, record: codec::encode(&*stands).into() },
        }))
    }

    async fn take(&self, request: Rpc<ChangeRequest>) -> Result<Response<ChangeReply>, Status> {
        let directory = self.meant(&request)?;
        let asked = request.get_ref();
        let taken = directory.take(stream_id(&asked.id)?, asked.from_attempt, record(&asked.record)?);
        let (outcome, record) = match taken.await.map_err(status)? {
            Taken::Won => (DONE, Bytes::new()),
            Taken::Lost(stands) => (STANDS, codec::encode(&*stands).into()),
            Taken::Refused => (NO_ROOM, Bytes::new()),
        };
        Ok(Response::new(ChangeReply { outcome, record }))
    }

    async fn close(&self, request: Rpc<CloseRequest>) -> Result<Response<CloseReply>, Status> {
        let directory = self.meant(&request)?;
        let asked = request.get_ref();
        let id = stream_id(&asked.id)?;
        if asked.how.is_empty() {
            directory.purge(id);
        } else {
            let how = codec::decode::<StreamEnd>(&asked.how).map_err(|_| unreadable("end"))?;
            directory.end(id, asked.attempt, how, asked.keep_ms);
        }
        Ok(Response::new(CloseReply {}))
    }

    async fn locate(&self, request: Rpc<LocateRequest>) -> Result<Response<LocateReply>, Status> {
        let directory = self.meant(&request)?;
        let holder = codec::decode::<Holder>(&request.get_ref().holder).map_err(|_| unreadable("holder"))?;
        let (address, name) = directory.address(holder).await.unwrap_or_default();
        Ok(Response::new(LocateReply { address, name: name.unwrap_or_default() }))
    }
}

fn stream_id(bytes: &[u8]) -> Result<StreamId, Status> {
    let text = std::str::from_utf8(bytes).ok().map(|text| format!("st_{text}"));
    text.and_then(|text| StreamId::parse(&text)).ok_or_else(|| unreadable("stream id"))
}

fn record(bytes: &[u8]) -> Result<StreamRecord, Status> {
    let record = codec::decode::<StreamRecord>(bytes).map_err(|_| unreadable("record"))?;
    if record.model.len() > MOST_MODEL {
        return Err(Status::invalid_argument("the record's model name is too long"));
    }
    Ok(record)
}

fn unreadable(what: &str) -> Status {
    Status::invalid_argument(format!("the {what} cannot be read"))
}

fn status(error: ClusterError) -> Status {
    let text = error.to_string();
    match error {
        ClusterError::Unavailable { .. } | ClusterError::Down(_) => Status::unavailable(text),
        ClusterError::Overloaded { .. } => Status::resource_exhausted(text),
        ClusterError::Refused(_) => Status::failed_precondition(text),
    }
}
