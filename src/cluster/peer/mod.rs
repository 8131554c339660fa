//! Links between replicas: one HTTP/2 connection per pair and direction, on it one ordered lane
//! per purpose, snapshots and calls. Streams have connections of their own to the same listener.

pub mod dial;
pub mod incoming;
pub mod lane;
pub mod link;
pub mod purpose;
mod seldom;
pub mod server;
pub mod wire;

/// The generated protocol.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("everline.peer.v1");
}
