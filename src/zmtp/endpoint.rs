//! Where a socket is: reading endpoints, connecting to them, listening on them.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::ZmtpError;

/// Addresses that are tried, of a name with many.
const MAX_ADDRESSES: usize = 16;

/// A peer whose host is gone is noticed after 10 s and three questions 5 s apart.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_RETRIES: u32 = 3;

/// A place where a socket listens.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Endpoint {
    /// `tcp://host:port`. The host may be a name, an address, or `*` to listen everywhere.
    Tcp {
        /// Host, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// `ipc://path`.
    Ipc(PathBuf),
}

impl Endpoint {
    /// Reads `tcp://host:port` or `ipc://path`.
    pub fn parse(text: &str) -> Result<Self, ZmtpError> {
        let wrong = |why: &str| ZmtpError::Endpoint(format!("{text:?} is no endpoint: {why}"));
        if let Some(path) = text.strip_prefix("ipc://") {
            if path.is_empty() || path.starts_with('@') {
                return Err(wrong("ipc:// needs the path of a file"));
            }
            return Ok(Self::Ipc(PathBuf::from(path)));
        }
        let rest = text
            .strip_prefix("tcp://")
            .ok_or_else(|| wrong("only tcp://host:port and ipc://path are understood"))?;
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong("the port is missing"))?;
        let port = port.parse().map_err(|_| wrong("the port is not a number from 0 to 65535"))?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() || host.contains(['/', '@', ' ', ';']) {
            return Err(wrong("the host is missing or not one"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }

    /// Whether it stands for all addresses of a host, so that somebody else needs the host's name.
    pub fn is_wildcard(&self) -> bool {
        matches!(self, Self::Tcp { host, .. } if matches!(host.as_str(), "*" | "0.0.0.0" | "::"))
    }

    /// The same port at `host`, if this stands for all addresses; itself otherwise.
    #[must_use]
    pub fn at_host(self, host: &str) -> Self {
        match self {
            Self::Tcp { port, .. } if self.is_wildcard() => Self::Tcp { host: host.to_owned(), port },
            other => other,
        }
    }

    /// Where rank `rank` is, if rank 0 is here. Files have no ranks.
    pub fn of_rank(&self, rank: u32) -> Option<Self> {
        match self {
            Self::Tcp { host, port } => {
                let port = u16::try_from(u32::from(*port).checked_add(rank)?).ok()?;
                Some(Self::Tcp { host: host.clone(), port })
            }
            Self::Ipc(_) => (rank == 0).then(|| self.clone()),
        }
    }

    /// Connects. The addresses of the host are those that `resolve` allows.
    pub(super) async fn connect(&self, resolve: &dyn Resolve) -> Result<Box<dyn Stream>, ZmtpError> {
        let Self::Tcp { host, port } = self else {
            let Self::Ipc(path) = self else { unreachable!("there are two kinds") };
            resolve.path(path)?;
            return Ok(Box::new(UnixStream::connect(path).await?));
        };
        let addresses = resolve.addresses(host, *port).await?;
        let mut last = None;
        for address in addresses.into_iter().take(MAX_ADDRESSES) {
            match TcpStream::connect(address).await {
                Ok(stream) => return tuned(stream),
                Err(error) => last = Some(error),
            }
        }
        let nothing = || io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
        Err(last.unwrap_or_else(nothing).into())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Ipc(path) => write!(f, "ipc://{}", path.display()),
        }
    }
}

/// A connected stream, of whatever kind.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Sync + Unpin> Stream for S {}

fn tuned(stream: TcpStream) -> Result<Box<dyn Stream>, ZmtpError> {
    stream.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_IDLE)
        .with_interval(KEEPALIVE_INTERVAL)
        .with_retries(KEEPALIVE_RETRIES);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(Box::new(stream))
}

/// The addresses of a name.
pub type Resolved = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Turns names into addresses that may be connected to, and says which files may be.
pub trait Resolve: Send + Sync {
    /// The allowed addresses of `host`, each with `port`; an error if there is none.
    fn addresses(&self, host: &str, port: u16) -> Resolved;

    /// Whether the socket at `path` may be connected to.
    fn path(&self, path: &Path) -> io::Result<()>;
}

/// Allows everything. For endpoints that come from nobody but the operator.
#[derive(Clone, Copy, Debug, Default)]
pub struct AnyAddress;

impl Resolve for AnyAddress {
    fn addresses(&self, host: &str, port: u16) -> Resolved {
        let host = host.to_owned();
        Box::pin(async move { Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect()) })
    }

    fn path(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

enum Bound {
    Tcp(TcpListener),
    Ipc(UnixListener),
}

/// Listens on an endpoint. The file of an `ipc://` one is removed with it.
pub struct Listener {
    bound: Bound,
    endpoint: Endpoint,
}

impl Listener {
    /// Listens; port 0 takes a free one. A file left over at an `ipc://` endpoint is replaced.
    pub async fn bind(endpoint: &Endpoint) -> Result<Self, ZmtpError> {
        match endpoint {
            Endpoint::Tcp { host, port } => {
                let everywhere = host == "*";
                let listener = if everywhere {
                    TcpListener::bind(("0.0.0.0", *port)).await?
                } else {
                    TcpListener::bind((host.as_str(), *port)).await?
                };
                let port = listener.local_addr()?.port();
                let endpoint = Endpoint::Tcp { host: host.clone(), port };
                Ok(Self { bound: Bound::Tcp(listener), endpoint })
            }
            Endpoint::Ipc(path) => {
                match std::fs::remove_file(path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
                    _ => {}
                }
                let bound = Bound::Ipc(UnixListener::bind(path)?);
                Ok(Self { bound, endpoint: endpoint.clone() })
            }
        }
    }

    /// Where it listens, with the port it got.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// A connection, and who made it, unless that is a process of this machine.
    pub(super) async fn accept(&self) -> Result<(Box<dyn Stream>, Option<IpAddr>), ZmtpError> {
        match &self.bound {
            Bound::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                Ok((tuned(stream)?, Some(peer.ip())))
            }
            Bound::Ipc(listener) => Ok((Box::new(listener.accept().await?.0), None)),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Endpoint::Ipc(path) = &self.endpoint {
            // Whoever binds next removes it otherwise.
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_and_written() {
        for text in ["tcp://*:5557", "tcp://10.0.0.1:0", "tcp://[::1]:5557", "tcp://worker:1", "ipc:///a/b"] {
            assert_eq!(Endpoint::parse(text).unwrap().to_string(), text);
        }
        for text in ["inproc://x", "tcp://x", "tcp://:1", "tcp://x:70000", "ipc://", "x:1", "tcp://a/b:1"] {
            let error = Endpoint::parse(text).unwrap_err().to_string();
            assert!(error.contains("is no endpoint"), "{error}");
        }
    }

    #[test]
    fn wildcards_take_the_workers_host_and_ranks_count_ports() {
        let endpoint = |text| Endpoint::parse(text).unwrap();
        for text in ["tcp://*:5557", "tcp://0.0.0.0:5557", "tcp://[::]:5557"] {
            assert_eq!(endpoint(text).at_host("10.1.1.1"), endpoint("tcp://10.1.1.1:5557"));
        }
        assert_eq!(endpoint("tcp://a:1").at_host("b"), endpoint("tcp://a:1"));
        assert_eq!(endpoint("tcp://a:5557").of_rank(3), Some(endpoint("tcp://a:5560")));
        assert_eq!(endpoint("tcp://a:65535").of_rank(1), None);
        assert_eq!(endpoint("ipc:///x").of_rank(1), None);
    }
}
