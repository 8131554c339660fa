//! Connecting to a worker: allowed addresses only, in bounded time, without delay of small
//! writes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::SendError;
use super::endpoint::Endpoint;
use crate::http::allowed::{Allowed, Forbidden};

/// A socket to a worker.
#[derive(Debug)]
pub(super) enum Stream {
    /// In clear.
    Tcp(TcpStream),
}

/// Resolves and connects within `limit`.
pub(super) async fn connect(
    allowed: &Allowed,
    endpoint: &Endpoint,
    limit: Duration,
) -> Result<Stream, SendError> {
    let connected = timeout(limit, async {
        let stream = connect_tcp(allowed, endpoint).await?;
        Ok(Stream::Tcp(stream))
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
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Tcp(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut *self {
            Stream::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }
}
