//! Opening connections to peers, which are told what for: plain, or with both ends' certificates.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::purpose::Purpose;
use super::seldom::Seldom;
use crate::cluster::node::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::tls::peer::{PeerTls, explain};

/// For the connection, with the handshake where there is one.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// A peer that has vanished without a reset is noticed by HTTP/2 pings.
const PING_INTERVAL: Duration = Duration::from_millis(2000);
const PING_TIMEOUT: Duration = Duration::from_millis(1000);

/// How this replica connects to others.
#[derive(Clone, Debug, Default)]
pub struct Dialer {
    tls: Option<Arc<PeerTls>>,
    refused: Arc<Seldom>,
}

impl Dialer {
    /// With certificates, or in plain text.
    pub fn new(tls: Option<Arc<PeerTls>>) -> Self {
        Self { tls, refused: Arc::default() }
    }

    /// A channel that opens its connection when it is first used, and again when it breaks. With
    /// TLS, only `member` will do at the other end, or any member where no name is given.
    pub fn channel(&self, peer: &str, member: Option<&str>, purpose: Purpose) -> Result<Channel, String> {
        let endpoint = Endpoint::from_shared(format!("http://{peer}"))
            .map_err(|e| format!("peer address {peer:?}: {e}"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT);
        let Some(tls) = &self.tls else {
            return Ok(match purpose {
                Purpose::Cluster => endpoint.connect_lazy(),
                Purpose::Streams => {
                    endpoint.connect_with_connector_lazy(service_fn(move |uri: Uri| async move {
                        Ok::<_, io::Error>(TokioIo::new(plain(&uri, purpose).await?))
                    }))
                }
            });
        };
        let (tls, member, refused) = (Arc::clone(tls), member.map(str::to_owned), Arc::clone(&self.refused));
        // Certificates are read anew for each connection, so a channel outlives them.
        let connect = move |uri: Uri| {
            let (tls, member, refused) = (Arc::clone(&tls), member.clone(), Arc::clone(&refused));
            async move {
                let stream = connect(&tls, &uri, member.as_deref(), purpose, &refused).await?;
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        };
        Ok(endpoint.connect_with_connector_lazy(service_fn(connect)))
    }
}

async fn open(authority: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(authority).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}

async fn plain(uri: &Uri, purpose: Purpose) -> io::Result<TcpStream> {
    let mut stream = open(authority(uri)).await?;
    stream.write_all(purpose.preamble()).await?;
    Ok(stream)
}

async fn connect(
    tls: &PeerTls,
    uri: &Uri,
    member: Option<&str>,
    purpose: Purpose,
    refused: &Seldom,
) -> io::Result<TlsStream<TcpStream>> {
    let authority = authority(uri);
    let stream = open(authority).await?;
    let address: SocketAddr = stream.peer_addr()?;
    tls.connect(stream, address, member, purpose.alpn()).await.inspect_err(|error| {
        // Reached, but not who we mean. It is tried again for ever.
        if refused.is_time(authority) {
            tracing::warn!(peer = authority, member, why = explain(error), "peer refused");
        }
    })
}
