//! Connections of peers as they come in: plain, or after a handshake that says which member it is. Those
//! for streams are handed to the threads that generate them.

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
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_rustls::TlsStream;
use tokio_rustls::server::StartHandshake;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::purpose::Purpose;
use super::seldom::Seldom;
use crate::cluster::node::{CONNECTION_WINDOW, STREAM_WINDOW};
use crate::tls::peer::{PeerTls, explain};

/// How long a caller may take to say what for, handshake included; a peer gives up after half a second.
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

/// Requests that a peer may have given up before this process looked at them, waiting on one connection. One
/// that was frozen or busy for seconds finds as many as its peers gave up meanwhile, which is no attack:
/// with HTTP/2's usual bound of 20, every link to it would be closed at that moment. They are a few
/// hundred bytes each, and strangers do not get here where there are certificates.
const GIVEN_UP: usize = 4096;

/// A server for what comes in there: notices callers that have vanished.
pub fn server() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(5)))
        .http2_keepalive_timeout(Some(Duration::from_secs(2)))
        .http2_max_pending_accept_reset_streams(Some(GIVEN_UP))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}

/// Connections that are ready to be served.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<PeerIo>> + Send>>;

/// Connections as they come in, whatever for. Ends when `stop` is cancelled or its reader goes away.
pub fn incoming(listener: TcpListener, tls: Option<Arc<PeerTls>>, stop: CancellationToken) -> Incoming {
    let (door, incoming) = Door::new(Handle::current());
    tokio::spawn(accept(listener, tls, Doors { cluster: door, streams: None }, stop));
    incoming
}

/// The same, and, apart from them, those that are for streams, which are driven by the runtime `streams`.
pub fn incoming_apart(
    listener: TcpListener,
    tls: Option<Arc<PeerTls>>,
    streams: Handle,
    stop: CancellationToken,
) -> (Incoming, Incoming) {
    let (cluster, incoming) = Door::new(Handle::current());
    let (streams, incoming_streams) = Door::new(streams);
    tokio::spawn(accept(listener, tls, Doors { cluster, streams: Some(streams) }, stop));
    (incoming, incoming_streams)
}

/// Where connections of one kind go.
struct Door {
    ready: mpsc::Sender<PeerIo>,
    going_on: Arc<GoingOn>,
    runtime: Handle,
}

struct Doors {
    /// Whoever has not said what it is for counts here.
    cluster: Door,
    /// `None`: the same.
    streams: Option<Door>,
}

/// A caller who has said what the connection is for.
enum Begun {
    Plain(TcpStream),
    Tls(Arc<PeerTls>, Box<StartHandshake<TcpStream>>),
}

async fn accept(listener: TcpListener, tls: Option<Arc<PeerTls>>, doors: Doors, stop: CancellationToken) {
    let doors = Arc::new(doors);
    while !doors.cluster.ready.is_closed() {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "accept failed on the peer listener");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = doors.cluster.place(peer.ip()) else { continue };
        let (tls, doors) = (tls.clone(), Arc::clone(&doors));
        // Ends with the first words, or their time.
        tokio::spawn(async move {
            let until = Instant::now() + HANDSHAKE_TIMEOUT;
            if let Some((purpose, begun)) = place.within(until, hear(stream, tls)).await {
                doors.let_in(purpose, begun, until, place);
            }
        });
    }
}

/// Until a caller has said what for.
async fn hear(mut stream: TcpStream, tls: Option<Arc<PeerTls>>) -> io::Result<(Purpose, Begun)> {
    stream.set_nodelay(true)?;
    let Some(tls) = tls else {
        let purpose = Purpose::heard(&mut stream).await?;
        return Ok((purpose, Begun::Plain(stream)));
    };
    let (begun, streams) = PeerTls::hear(stream).await?;
    let purpose = if streams { Purpose::Streams } else { Purpose::Cluster };
    Ok((purpose, Begun::Tls(tls, Box::new(begun))))
}

impl Doors {
    /// The rest is done where the connection is served, and counts there: what is slow at one door keeps
    /// nobody from the other.
    fn let_in(&self, purpose: Purpose, begun: Begun, until: Instant, place: Place) {
        let (door, begun, place) = match (&self.streams, purpose) {
            (Some(streams), Purpose::Streams) => {
                let Some(there) = streams.place(place.ip) else { return };
                match begun.moved(&streams.runtime) {
                    Ok(begun) => (streams, begun, there),
                    Err(error) => return there.going_on.say(place.ip, &error.to_string()),
                }
            }
            _ => (&self.cluster, begun, place),
        };
        let ready = door.ready.clone();
        // Ends with the handshake, or its time; and when it is taken up.
        door.runtime.spawn(async move {
            if let Some(io) = place.within(until, begun.finish()).await {
                // Held while it waits: a queue that is full shows as too many handshakes.
                let _ = ready.send(io).await;
            }
        });
    }
}

impl Door {
    fn new(runtime: Handle) -> (Self, Incoming) {
        let (ready, incoming) = mpsc::channel(READY);
        let door = Self { ready, going_on: Arc::default(), runtime };
        (door, Box::pin(ReceiverStream::new(incoming).map(Ok)))
    }

    fn place(&self, ip: IpAddr) -> Option<Place> {
        let place = GoingOn::enter(&self.going_on, ip);
        if place.is_none() {
            self.going_on.say(ip, "too many handshakes at once");
        }
        place
    }
}

impl Begun {
    /// Driven by another runtime from now on.
    fn moved(self, to: &Handle) -> io::Result<Self> {
        let moved = |stream: TcpStream| {
            let stream = stream.into_std()?;
            let _entered = to.enter();
            TcpStream::from_std(stream)
        };
        Ok(match self {
            Begun::Plain(stream) => Begun::Plain(moved(stream)?),
            Begun::Tls(tls, begun) => {
                let begun = *begun;
                let stream = moved(begun.io)?;
                Begun::Tls(tls, Box::new(StartHandshake::from_parts(begun.accepted, stream)))
            }
        })
    }

    async fn finish(self) -> io::Result<PeerIo> {
        match self {
            Begun::Plain(stream) => Ok(PeerIo::Plain(stream)),
            Begun::Tls(tls, begun) => {
                let (stream, name) = tls.accept(*begun).await?;
                Ok(PeerIo::Tls(Box::new(stream), name.member.into()))
            }
        }
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

impl Place {
    /// Says why, where it is not done.
    async fn within<T>(&self, until: Instant, doing: impl Future<Output = io::Result<T>>) -> Option<T> {
        match tokio::time::timeout_at(until, doing).await {
            Ok(Ok(done)) => return Some(done),
            Ok(Err(error)) => self.going_on.say(self.ip, &explain(&error)),
            Err(_) => self.going_on.say(self.ip, "no handshake in time"),
        }
        None
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
mod tests;
