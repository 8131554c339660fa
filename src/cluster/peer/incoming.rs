//! Connections of peers as they come in: plain, or after a handshake that says which member it is.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpIncoming};

use super::seldom::Seldom;
use crate::tls::peer::{PeerTls, explain};

/// How long a handshake may take; a peer gives up after half a second.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// Handshakes going on at once. One more is closed: whoever meant it tries again.
const HANDSHAKES: usize = 256;
/// ... and from one address, so that one stranger does not take the places of all peers.
const HANDSHAKES_PER_IP: usize = 32;
/// Connections that wait to be served.
const READY: usize = 32;
/// Pause after a failed accept (mostly: no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The member that a connection's certificate names; `None` without TLS.
#[derive(Clone, Debug)]
pub struct Caller(pub Option<Arc<str>>);

/// A peer's connection.
pub enum PeerIo {
    /// Anybody's.
    Plain(TcpStream),
    /// A member's of this cluster.
    Tls(Box<TlsStream<TcpStream>>, Arc<str>),
}

impl Connected for PeerIo {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        match self {
            PeerIo::Plain(_) => Caller(None),
            PeerIo::Tls(_, name) => Caller(Some(Arc::clone(name))),
        }
    }
}

/// Connections as they come in. Ends when `stop` is cancelled (with TLS) or its reader goes away.
pub fn incoming(
    listener: TcpListener,
    tls: Option<Arc<PeerTls>>,
    stop: CancellationToken,
) -> Pin<Box<dyn Stream<Item = io::Result<PeerIo>> + Send>> {
    let Some(tls) = tls else {
        let plain = TcpIncoming::from(listener).with_nodelay(Some(true));
        return Box::pin(plain.map(|accepted| accepted.map(PeerIo::Plain)));
    };
    let (ready, incoming) = mpsc::channel(READY);
    tokio::spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = accept(listener, tls, ready) => {}
        }
    });
    Box::pin(ReceiverStream::new(incoming).map(Ok))
}

async fn accept(listener: TcpListener, tls: Arc<PeerTls>, ready: mpsc::Sender<PeerIo>) {
    let going_on = Arc::new(GoingOn::default());
    while !ready.is_closed() {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accept failed on the peer listener");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = GoingOn::enter(&going_on, peer.ip()) else {
            going_on.say(peer.ip(), "too many handshakes at once");
            continue;
        };
        let (tls, ready) = (Arc::clone(&tls), ready.clone());
        // Ends with the handshake, or its time.
        tokio::spawn(async move {
            let shake = async {
                stream.set_nodelay(true)?;
                tls.accept(stream).await
            };
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, shake).await {
                Ok(Ok((stream, name))) => {
                    let io = PeerIo::Tls(Box::new(stream), name.member.into());
                    // Held while it waits: a queue that is full shows as too many handshakes.
                    let _ = ready.send(io).await;
                }
                Ok(Err(error)) => place.going_on.say(peer.ip(), &explain(&error)),
                Err(_) => place.going_on.say(peer.ip(), "no handshake in time"),
            }
        });
    }
}

/// Handshakes going on, by address.
#[derive(Default)]
struct GoingOn {
    by_ip: Mutex<HashMap<IpAddr, usize>>,
    refused: Seldom,
}

/// A place among them; given back when dropped.
struct Place {
    going_on: Arc<GoingOn>,
    ip: IpAddr,
}

impl GoingOn {
    fn enter(this: &Arc<Self>, ip: IpAddr) -> Option<Place> {
        let ip = ip.to_canonical();
        let mut by_ip = this.by_ip.lock();
        let all: usize = by_ip.values().sum();
        let here = by_ip.get(&ip).copied().unwrap_or_default();
        if all >= HANDSHAKES || here >= HANDSHAKES_PER_IP {
            return None;
        }
        by_ip.insert(ip, here + 1);
        Some(Place { going_on: Arc::clone(this), ip })
    }

    fn say(&self, peer: IpAddr, why: &str) {
        // One for all: strangers may have many addresses.
        if self.refused.is_time("") {
            tracing::warn!(%peer, why, "a connection to the peer listener was refused");
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_ip = self.going_on.by_ip.lock();
        if let Some(here) = by_ip.get_mut(&self.ip) {
            *here -= 1;
            if *here == 0 {
                by_ip.remove(&self.ip);
            }
        }
    }
}

/// Does the same with whichever stream it is.
macro_rules! either {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            PeerIo::Plain($io) => $call,
            PeerIo::Tls($io, _) => $call,
        }
    };
}

impl AsyncRead for PeerIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_read(cx, buf))
    }
}

impl AsyncWrite for PeerIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_shutdown(cx))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => Pin::new(io).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            PeerIo::Plain(io) => io.is_write_vectored(),
            PeerIo::Tls(io, _) => io.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handshakes_are_bounded_in_all_and_by_address() {
        let going_on = Arc::new(GoingOn::default());
        let enter = |last: u8| GoingOn::enter(&going_on, IpAddr::from([10, 0, 0, last]));
        let mut held: Vec<_> = (0..HANDSHAKES_PER_IP).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none(), "one address has its share");
        for last in 2.. {
            let before = held.len();
            held.extend(std::iter::from_fn(|| enter(last)));
            if held.len() == before {
                break;
            }
        }
        assert_eq!(held.len(), HANDSHAKES);
        held.clear();
        assert!(enter(1).is_some() && going_on.by_ip.lock().is_empty());
    }
}
