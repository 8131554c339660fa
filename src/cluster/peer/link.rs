//! The connection to one peer, and the book of all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use super::dial::Dialer;
use super::proto::Request;
use super::proto::peer_client::PeerClient;
use super::purpose::Purpose;
use super::wire::{CLUSTER, Call, FROM, MAX_MESSAGE, Reply, TO};
use crate::cluster::types::PeerNode;
use crate::codec;
use crate::ids::ReplicaId;

/// Asks a replica by address before there are ids; `member` is its name, where that is known.
pub async fn call_address(
    dialer: &Dialer,
    peer: &str,
    member: Option<&str>,
    call: &Call,
    within: Duration,
) -> Result<Reply, String> {
    let mut client = PeerClient::new(dialer.channel(peer, member, Purpose::Cluster)?);
    call_client(&mut client, tonic::Request::new(request(call)), within).await
}

fn request(call: &Call) -> Request {
    Request { kind: 0, body: codec::encode(call).into() }
}

async fn call_client(
    client: &mut PeerClient<Channel>,
    request: tonic::Request<Request>,
    within: Duration,
) -> Result<Reply, String> {
    let answer = tokio::time::timeout(within, client.call(request))
        .await
        .map_err(|_| format!("no answer within {} ms", within.as_millis()))?
        .map_err(|status| reason(&status))?;
    codec::decode(&answer.into_inner().body).map_err(|e| e.to_string())
}

/// The innermost cause: "transport error" helps nobody.
pub(super) fn reason(status: &tonic::Status) -> String {
    if crate::tls::cause(status).is_some() {
        return crate::tls::peer::explain(status);
    }
    let mut cause = std::error::Error::source(status);
    let mut text = status.message().to_owned();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    text
}

/// The connection to one member.
pub struct Link {
    cluster: u128,
    from: ReplicaId,
    to: ReplicaId,
    channel: Channel,
}

impl Link {
    /// A client on the connection.
    pub fn client(&self) -> PeerClient<Channel> {
        PeerClient::new(self.channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE)
    }

    /// Says who asks whom.
    pub fn address<T>(&self, mut request: tonic::Request<T>) -> tonic::Request<T> {
        let metadata = request.metadata_mut();
        // Invariant: digits and hexadecimal digits are valid metadata.
        for (key, text) in [
            (CLUSTER, format!("{:032x}", self.cluster)),
            (FROM, self.from.to_string()),
            (TO, self.to.to_string()),
        ] {
            if let Ok(value) = MetadataValue::try_from(text) {
                metadata.insert(key, value);
            }
        }
        request
    }

    /// Asks and waits.
    pub async fn call(&self, call: &Call, within: Duration) -> Result<Reply, String> {
        call_client(&mut self.client(), self.address(tonic::Request::new(request(call))), within).await
    }
}

/// All links of a replica, by member and address; at most one connection each.
pub struct Links {
    dialer: Dialer,
    cluster: u128,
    me: ReplicaId,
    links: Mutex<HashMap<(ReplicaId, String), Arc<Link>>>,
}

impl Links {
    /// No links yet.
    pub fn new(dialer: Dialer, cluster: u128, me: ReplicaId) -> Self {
        Self { dialer, cluster, me, links: Mutex::default() }
    }

    /// The link to a member.
    pub fn to(&self, id: ReplicaId, node: &PeerNode) -> Result<Arc<Link>, String> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(&(id, node.peer.clone())) {
            return Ok(link.clone());
        }
        // Members that Everline knows of have names; those of a test may not.
        let name = Some(node.name.as_str()).filter(|name| !name.is_empty());
        let channel = self.dialer.channel(&node.peer, name, Purpose::Cluster)?;
        let link = Arc::new(Link { cluster: self.cluster, from: self.me, to: id, channel });
        // A member that moved leaves its old address behind.
        links.retain(|(other, _), _| *other != id);
        links.insert((id, node.peer.clone()), link.clone());
        Ok(link)
    }
}
