//! TLS for clients and operators: a server certificate that is read again when it changes,
//! HTTP/2 or HTTP/1.1, and a bound on the handshake. TLS 1.2 and 1.3.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::sign::SingleCertAndKey;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::reload::{Look, Reloading, Source};
use super::{TlsError, files, provider};

/// The files of a listener.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ListenerFiles {
    /// The certificate, with intermediate ones after it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A listener's side of TLS.
#[derive(Debug)]
pub struct ListenerTls {
    material: Arc<Reloading<Material>>,
    handshake: Duration,
}

/// What is made of one state of the files.
#[derive(Debug)]
struct Material {
    config: Arc<ServerConfig>,
    expires: i64,
}

impl ListenerTls {
    /// Reads the files. `what` is the listener, for the log; a handshake may take `handshake`.
    pub fn open(what: &'static str, files: &ListenerFiles, handshake: Duration) -> Result<Self, TlsError> {
        let sources = vec![Source::public(&files.cert), Source::secret(&files.key)];
        let paths = files.clone();
        let material = Reloading::open(what, sources, move |contents| material(&paths, contents))?;
        Ok(Self { material: Arc::new(material), handshake })
    }

    /// Keeps the certificate current; drop the future to stop.
    pub async fn watch(&self) {
        Arc::clone(&self.material).watch().await;
    }

    /// Looks at the files once.
    pub fn look(&self) -> Look {
        self.material.look()
    }

    /// When the certificate in use expires, in seconds since 1970.
    pub fn expires(&self) -> i64 {
        self.material.get().expires
    }

    /// Answers a client that has connected, within the time for the handshake and `within`.
    pub async fn accept(&self, stream: TcpStream, within: Duration) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = TlsAcceptor::from(Arc::clone(&self.material.get().config));
        let limit = self.handshake.min(within);
        tokio::time::timeout(limit, acceptor.accept(stream))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))?
    }
}

/// A client's connection, after the handshake where there is one.
#[derive(Debug)]
pub enum ListenerIo {
    /// In plain text.
    Plain(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Does the handshake, if the listener speaks TLS.
pub async fn secure(
    tls: Option<&ListenerTls>,
    stream: TcpStream,
    within: Duration,
) -> io::Result<ListenerIo> {
    match tls {
        None => Ok(ListenerIo::Plain(stream)),
        Some(tls) => Ok(ListenerIo::Tls(Box::new(tls.accept(stream, within).await?))),
    }
}

/// Does the same with whichever stream it is.
macro_rules! either {
    ($self:ident, $io:ident => $call:expr) => {
        match $self.get_mut() {
            ListenerIo::Plain($io) => $call,
            ListenerIo::Tls($io) => $call,
        }
    };
}

impl AsyncRead for ListenerIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, io => Pin::new(io).poll_read(cx, buf))
    }
}

impl AsyncWrite for ListenerIo {
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
            ListenerIo::Plain(io) => io.is_write_vectored(),
            ListenerIo::Tls(io) => io.is_write_vectored(),
        }
    }
}

fn material(paths: &ListenerFiles, contents: &[Vec<u8>]) -> Result<Material, TlsError> {
    let [cert, key] = contents else {
        return Err(TlsError::content(&paths.cert, "two files are needed"));
    };
    let key = files::certified_key((&paths.cert, cert), (&paths.key, key))?;
    let expires = files::expires(&paths.cert, &key.cert)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(|e| TlsError::content(&paths.cert, e))?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Material { config: Arc::new(config), expires })
}
