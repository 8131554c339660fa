//! The connection to one peer, and the book of all of them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};

use super::proto::Request;
use super::proto::peer_client::PeerClient;
use super::wire::{CLUSTER, Call, FROM, MAX_MESSAGE, Reply, TO};
use crate::codec;
use crate::ids::ReplicaId;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A peer that has vanished without a reset is noticed by HTTP/2 pings.
const PING_INTERVAL: Duration = Duration::from_millis(2000);
const PING_TIMEOUT: Duration = Duration::from_millis(1000);

/// Opens the connection lazily; it reconnects by itself.
pub fn channel(peer: &str) -> Result<Channel, String> {
    let endpoint = Endpoint::from_shared(format!("http://{peer}"))
        .map_err(|e| format!("peer address {peer:?}: {e}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT);
    Ok(endpoint.connect_lazy())
}

/// Asks a replica by address alone, before there are ids.
pub async fn call_address(peer: &str, call: &Call, within: Duration) -> Result<Reply, String> {
    let mut client = PeerClient::new(channel(peer)?);
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
        .map_err(|status| status.message().to_owned())?;
    codec::decode(&answer.into_inner().body).map_err(|e| e.to_string())
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
    cluster: u128,
    me: ReplicaId,
    links: Mutex<HashMap<(ReplicaId, String), Arc<Link>>>,
}

impl Links {
    /// No links yet.
    pub fn new(cluster: u128, me: ReplicaId) -> Self {
        Self { cluster, me, links: Mutex::default() }
    }

    /// The link to a member at an address.
    pub fn to(&self, id: ReplicaId, peer: &str) -> Result<Arc<Link>, String> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(&(id, peer.to_owned())) {
            return Ok(link.clone());
        }
        let link = Arc::new(Link { cluster: self.cluster, from: self.me, to: id, channel: channel(peer)? });
        // A member that moved leaves its old address behind.
        links.retain(|(other, _), _| *other != id);
        links.insert((id, peer.to_owned()), link.clone());
        Ok(link)
    }
}
