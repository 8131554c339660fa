//! Connecting to a worker: allowed addresses only, in bounded time, without delay of small
//! writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::SendError;
use super::endpoint::Endpoint;
use crate::http::allowed::{Allowed, Forbidden};

/// How TLS is spoken to `https://` workers.
#[derive(Clone)]
pub struct WorkerTls {
    http1: TlsConnector,
    http2: TlsConnector,
}

impl std::fmt::Debug for WorkerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WorkerTls")
    }
}

impl WorkerTls {
    /// With the authorities of `config`, whatever protocols it names.
    pub fn new(config: ClientConfig) -> Self {
        let speaking = |protocol: &[u8]| {
            let mut config = config.clone();
            config.alpn_protocols = vec![protocol.to_vec()];
            TlsConnector::from(Arc::new(config))
        };
        Self { http1: speaking(b"http/1.1"), http2: speaking(b"h2") }
    }

    async fn connect(&self, endpoint: &Endpoint, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let connector = if endpoint.http2 { &self.http2 } else { &self.http1 };
        let name = ServerName::try_from(endpoint.host.clone()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "no certificate can have such a name")
        })?;
        let stream = connector.connect(name, stream).await?;
        if endpoint.http2 && stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("it does not speak HTTP/2 over TLS"));
        }
        Ok(stream)
    }
}

/// A socket to a worker.
#[derive(Debug)]
pub(super) enum Stream {
    /// In clear.
    Tcp(TcpStream),
    /// Encrypted.
    Tls(Box<TlsStream<TcpStream>>),
}

/// Resolves and connects within `limit`.
pub(super) async fn connect(
    allowed: &Allowed,
    tls: Option<&WorkerTls>,
    endpoint: &Endpoint,
    limit: Duration,
) -> Result<Stream, SendError> {
    let connected = timeout(limit, async {
        let stream = connect_tcp(allowed, endpoint).await?;
        match tls {
            _ if !endpoint.tls => Ok(Stream::Tcp(stream)),
            Some(tls) => Ok(Stream::Tls(Box::new(tls.connect(endpoint, stream).await?))),
            None => Err(io::Error::other("no authorities for https workers are configured")),
        }
    });
    match connected.await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(classify(&error)),
        Err(_) => Err(SendError::Connect(format!("no connection within {} ms", limit.as_millis()))),
    }
}

async fn connect_tcp(allowed: &Allowed, endpoint: &Endpoint) -> io::Result<TcpStream> {
    let mut last = None;
    for address in allowed.resolve(&endpoint.host, endpoint.port).await? {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the name has no address")))
}

fn classify(error: &io::Error) -> SendError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Forbidden>()) {
        Some(why) => SendError::Forbidden(why.to_string()),
        None => SendError::Connect(error.to_string()),
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Tcp(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }
}
