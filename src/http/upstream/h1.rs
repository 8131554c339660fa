//! HTTP/1.1 to a worker: one request at a time on a connection, driven by whoever waits for the
//! answer. No task and no channel: a stream's bytes are read where they are handed on.
//!
//! A connection goes back to its pool only when the request was sent in full, the answer was
//! read to its framed end, and nothing came behind it. Dropping an exchange or a body closes
//! the socket, which is how engines learn that nobody listens; it is never closed by half.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::SizeHint;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::chunked::Decoder;
use super::connect::Stream;
use super::head::{Framing, Head, Parsed, parse};
use super::request::Outgoing;
use super::{SendError, Slot, Ticket};

/// Interim responses (1xx) read before one answer; more are a flood.
const MOST_INTERIM: u32 = 16;
/// A kept connection that breaks within this time was closed while nobody used it. If it takes
/// longer, the worker had the request and may have died of it.
const STALE_WITHIN: Duration = Duration::from_secs(1);
/// Most memory a connection keeps for its next head.
const KEPT_HEAD: usize = 8 * 1024;
/// Size of a read: first, and once reads come back full.
const READ: (usize, usize) = (4 * 1024, 64 * 1024);

/// A connection, between requests or in one.
#[derive(Debug)]
pub(super) struct Conn {
    stream: Stream,
    /// Read and not yet handed on.
    unread: BytesMut,
    read_size: usize,
    /// The head being sent; kept for its memory.
    head: Vec<u8>,
    max_head: usize,
    /// Answers it has brought.
    served: u32,
    /// Since when nobody uses it.
    pub(super) idle_since: Instant,
    _ticket: Ticket,
}

impl Conn {
    pub(super) fn new(stream: Stream, max_head: usize, ticket: Ticket) -> Box<Self> {
        Box::new(Self {
            stream,
            unread: BytesMut::new(),
            read_size: READ.0,
            head: Vec::new(),
            max_head,
            served: 0,
            idle_since: Instant::now(),
            _ticket: ticket,
        })
    }

    /// Whether an idle connection is still open and silent. What it says unasked (an end, an
    /// answer to nobody) makes it useless. Costs no system call while nothing has happened.
    pub(super) fn is_quiet(&mut self) -> bool {
        let mut byte = [0];
        let mut buffer = ReadBuf::new(&mut byte);
        // Nobody is to be woken: the next request registers itself.
        let mut cx = Context::from_waker(Waker::noop());
        let stream = &mut self.stream;
        // Whatever the task's budget: without any, everything would look quiet.
        let read = tokio::task::unconstrained(std::future::poll_fn(|cx| {
            Pin::new(&mut *stream).poll_read(cx, &mut buffer)
        }));
        std::pin::pin!(read).poll(&mut cx).is_pending()
    }

    /// Gives back the memory that a large exchange took: there may be many idle connections.
    fn shrink(&mut self) {
        if self.read_size > READ.0 {
            self.read_size = READ.0;
            self.unread = BytesMut::new();
        }
        if self.head.capacity() > KEPT_HEAD {
            self.head = Vec::new();
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.unread.capacity() - self.unread.len() < self.read_size / 2 {
            self.unread.reserve(self.read_size);
        }
        let room = self.unread.capacity() - self.unread.len();
        let read = poll_read_buf(Pin::new(&mut self.stream), cx, &mut self.unread);
        if let Poll::Ready(Ok(count)) = &read
            && *count == room
        {
            self.read_size = (self.read_size * 2).min(READ.1);
        }
        read
    }
}

/// What a connection's `head` and this body are written with.
#[derive(Debug)]
struct Sending {
    body: Bytes,
    /// Of head and body together.
    written: usize,
    /// The worker stopped reading; its answer may still say why.
    failed: bool,
}

impl Sending {
    /// Writes on; ready when all is written or nothing more can be.
    fn poll(&mut self, conn: &mut Conn, cx: &mut Context<'_>) -> Poll<()> {
        let head = conn.head.len();
        while !self.failed && self.written < head + self.body.len() {
            let rest_of_head = &conn.head[self.written.min(head)..];
            let rest_of_body = &self.body[self.written.saturating_sub(head)..];
            let slices = [IoSlice::new(rest_of_head), IoSlice::new(rest_of_body)];
            let from = usize::from(rest_of_head.is_empty());
            match Pin::new(&mut conn.stream).poll_write_vectored(cx, &slices[from..]) {
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => self.failed = true,
                Poll::Ready(Ok(count)) => self.written += count,
                Poll::Pending => return Poll::Pending,
            }
        }
        match Pin::new(&mut conn.stream).poll_flush(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(_)) => {
                self.failed = true;
                Poll::Ready(())
            }
        }
    }
}

/// A request being sent and its answer's head being awaited.
#[derive(Debug)]
pub(super) struct Exchange {
    /// Taken when the answer is there.
    conn: Option<Box<Conn>>,
    slot: Arc<Slot>,
    /// Taken when the answer is there.
    sending: Option<Sending>,
    began: Instant,
    is_head: bool,
    interim: u32,
}

impl Exchange {
    pub(super) fn new(mut conn: Box<Conn>, request: &Outgoing<'_>, slot: &Arc<Slot>) -> Self {
        request.write_head(&slot.endpoint, &mut conn.head);
        Self {
            conn: Some(conn),
            slot: Arc::clone(slot),
            sending: Some(Sending { body: request.body().clone(), written: 0, failed: false }),
            began: Instant::now(),
            is_head: request.is_head(),
            interim: 0,
        }
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<Head, SendError>> {
        let Some(conn) = &mut self.conn else { return Poll::Pending };
        loop {
            if !conn.unread.is_empty() {
                match parse(&mut conn.unread, self.is_head).map_err(SendError::Garbage)? {
                    Parsed::Final(head) => return Poll::Ready(Ok(head)),
                    Parsed::Interim => {
                        self.interim += 1;
                        if self.interim > MOST_INTERIM {
                            let text = format!("more than {MOST_INTERIM} interim responses");
                            return Poll::Ready(Err(SendError::Garbage(text)));
                        }
                        continue;
                    }
                    Parsed::Partial if conn.unread.len() > conn.max_head => {
                        let text = format!("a response head of more than {} bytes", conn.max_head);
                        return Poll::Ready(Err(SendError::Garbage(text)));
                    }
                    Parsed::Partial => {}
                }
            }
            let nothing_yet = conn.unread.is_empty() && self.interim == 0;
            match conn.poll_read(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0) | Err(_))
                    if nothing_yet && conn.served > 0 && self.began.elapsed() < STALE_WITHIN =>
                {
                    return Poll::Ready(Err(SendError::Stale));
                }
                Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(Err(SendError::Closed)),
            }
        }
    }
}

impl Future for Exchange {
    type Output = Result<(Head, H1Body), SendError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let (Some(conn), Some(sending)) = (&mut this.conn, &mut this.sending) else { return Poll::Pending };
        let all_written = sending.poll(conn, cx).is_ready();
        let failed = sending.failed;
        // Looked for before all is sent too: a worker may answer, or refuse, a large body early.
        let head = std::task::ready!(this.poll_head(cx))?;
        let Some(mut conn) = this.conn.take() else { return Poll::Pending };
        let is_kept_and_soon = conn.served > 0 && this.began.elapsed() < STALE_WITHIN;
        if head.status == StatusCode::REQUEST_TIMEOUT && !head.keep_alive && is_kept_and_soon {
            // No answer to this request: with it a server takes leave of an idle connection.
            return Poll::Ready(Err(SendError::Stale));
        }
        conn.served = conn.served.saturating_add(1);
        let left = match head.framing {
            Framing::Length(length) => Left::Length(length),
            Framing::Chunked => Left::Chunked(Decoder::new()),
            Framing::Close => Left::Close,
        };
        let home = (head.keep_alive && !failed).then(|| Arc::clone(&this.slot));
        let unsent = this.sending.take().filter(|_| !all_written);
        let mut body = H1Body { conn: Some(conn), left, home, unsent };
        if matches!(body.left, Left::Length(0)) {
            body.end();
        }
        Poll::Ready(Ok((head, body)))
    }
}

/// What is left of a body.
#[derive(Debug)]
enum Left {
    Length(u64),
    Chunked(Decoder),
    Close,
}

/// The body of an answer.
#[derive(Debug)]
pub(in crate::http) struct H1Body {
    /// Given up or given back at the end.
    conn: Option<Box<Conn>>,
    left: Left,
    /// Where the connection goes afterwards, if it may be kept.
    home: Option<Arc<Slot>>,
    /// The rest of the request, where the answer began before it was sent; goes on beside the
    /// reading, and is given up when the answer ends first.
    unsent: Option<Sending>,
}

impl H1Body {
    /// The body is read to its end.
    fn end(&mut self) {
        let Some(mut conn) = self.conn.take() else { return };
        self.left = Left::Length(0);
        if let Some(slot) = self.home.take()
            && conn.unread.is_empty()
            && self.unsent.is_none()
        {
            conn.shrink();
            conn.idle_since = Instant::now();
            slot.put(conn);
        }
    }

    /// Whether it comes in chunks.
    pub(super) fn is_chunked(&self) -> bool {
        matches!(self.left, Left::Chunked(_))
    }

    /// Whether nothing more comes.
    pub(super) fn is_end(&self) -> bool {
        self.conn.is_none()
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self.left {
            Left::Length(left) => SizeHint::with_exact(left),
            _ => SizeHint::default(),
        }
    }

    /// Writes what of the request is still to be sent. A worker that stops reading is no failure:
    /// its answer counts.
    fn send_on(&mut self, cx: &mut Context<'_>) {
        if let (Some(conn), Some(unsent)) = (&mut self.conn, &mut self.unsent)
            && unsent.poll(conn, cx).is_ready()
        {
            if unsent.failed {
                self.home = None;
            }
            self.unsent = None;
        }
    }

    /// The next bytes; `None` at the end.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        self.send_on(cx);
        // What the connection said when it was last asked for more.
        let mut said: Option<Poll<io::Error>> = None;
        loop {
            let Some(conn) = &mut self.conn else { return Poll::Ready(None) };
            let (data, ended) = match &mut self.left {
                Left::Length(left) => {
                    let taken = conn.unread.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    *left -= taken as u64;
                    (conn.unread.split_to(taken).freeze(), *left == 0)
                }
                // The beginning of a chunk must do when there is no more to be had.
                Left::Chunked(decoder) => match decoder.take(&mut conn.unread, said.is_none()) {
                    Ok(data) => (data, decoder.is_done()),
                    Err(error) => {
                        self.conn = None;
                        return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::InvalidData, error))));
                    }
                },
                Left::Close => (conn.unread.split().freeze(), false),
            };
            if ended {
                self.end();
            }
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(data)));
            }
            let Some(conn) = &mut self.conn else { return Poll::Ready(None) };
            match said {
                None => {}
                Some(Poll::Pending) => return Poll::Pending,
                Some(Poll::Ready(error)) => {
                    self.conn = None;
                    return Poll::Ready(Some(Err(error)));
                }
            }
            match conn.poll_read(cx) {
                Poll::Ready(Ok(1..)) => {}
                Poll::Ready(Ok(0)) if matches!(self.left, Left::Close) => self.conn = None,
                Poll::Ready(Ok(0)) => said = Some(Poll::Ready(io::ErrorKind::UnexpectedEof.into())),
                Poll::Ready(Err(error)) => said = Some(Poll::Ready(error)),
                Poll::Pending => said = Some(Poll::Pending),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::io::AsyncWriteExt;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    /// A connection and its other end.
    async fn pair() -> (Box<Conn>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        let ticket = Ticket(Arc::new(AtomicUsize::new(1)));
        (Conn::new(Stream::Tcp(near), 1024, ticket), far)
    }

    #[tokio::test]
    async fn a_connection_that_spoke_or_closed_is_not_quiet_however_busy_the_task_was() {
        for says in [&b"HTTP/1.1 200 OK\r\n\r\n"[..], b""] {
            let (mut conn, mut far) = pair().await;
            assert!(conn.is_quiet());
            far.write_all(says).await.unwrap();
            drop(far);
            let Stream::Tcp(stream) = &conn.stream else { panic!("not plain") };
            stream.readable().await.unwrap();
            // All that the task may do before it must yield is done.
            while futures_util::poll!(std::pin::pin!(tokio::task::consume_budget())).is_ready() {}
            assert!(!conn.is_quiet());
        }
    }
}
