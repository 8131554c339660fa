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
use std::time::Instant;

use bytes::{Bytes, BytesMut};
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
        Pin::new(&mut self.stream).poll_read(&mut cx, &mut buffer).is_pending()
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

/// A request being sent and its answer's head being awaited.
#[derive(Debug)]
pub(super) struct Exchange {
    /// Taken when the answer is there.
    conn: Option<Box<Conn>>,
    slot: Arc<Slot>,
    body: Bytes,
    /// Of head and body together.
    written: usize,
    /// The worker stopped reading; its answer may still say why.
    write_failed: bool,
    is_head: bool,
    interim: u32,
}

impl Exchange {
    pub(super) fn new(mut conn: Box<Conn>, request: &Outgoing<'_>, slot: &Arc<Slot>) -> Self {
        request.write_head(&slot.endpoint, &mut conn.head);
        Self {
            conn: Some(conn),
            slot: Arc::clone(slot),
            body: request.body().clone(),
            written: 0,
            write_failed: false,
            is_head: request.is_head(),
            interim: 0,
        }
    }

    /// Writes on; ready when all is written or nothing more can be.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(conn) = &mut self.conn else { return Poll::Ready(()) };
        let head = conn.head.len();
        while !self.write_failed && self.written < head + self.body.len() {
            let rest_of_head = &conn.head[self.written.min(head)..];
            let rest_of_body = &self.body[self.written.saturating_sub(head)..];
            let slices = [IoSlice::new(rest_of_head), IoSlice::new(rest_of_body)];
            let from = usize::from(rest_of_head.is_empty());
            match Pin::new(&mut conn.stream).poll_write_vectored(cx, &slices[from..]) {
                Poll::Ready(Ok(0)) | Poll::Ready(Err(_)) => self.write_failed = true,
                Poll::Ready(Ok(count)) => self.written += count,
                Poll::Pending => return Poll::Pending,
            }
        }
        match Pin::new(&mut conn.stream).poll_flush(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(_)) => {
                self.write_failed = true;
                Poll::Ready(())
            }
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
                Poll::Ready(Ok(0) | Err(_)) if nothing_yet && conn.served > 0 => {
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
        let sent = this.poll_write(cx).is_ready() && !this.write_failed;
        // Looked for before all is sent too: a worker may refuse a large body early.
        let head = std::task::ready!(this.poll_head(cx))?;
        let Some(mut conn) = this.conn.take() else { return Poll::Pending };
        conn.served = conn.served.saturating_add(1);
        let left = match head.framing {
            Framing::Length(length) => Left::Length(length),
            Framing::Chunked => Left::Chunked(Decoder::new()),
            Framing::Close => Left::Close,
        };
        let home = (sent && head.keep_alive).then(|| Arc::clone(&this.slot));
        let mut body = H1Body { conn: Some(conn), left, home };
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
}

impl H1Body {
    /// The body is read to its end.
    fn end(&mut self) {
        let Some(mut conn) = self.conn.take() else { return };
        self.left = Left::Length(0);
        if let Some(slot) = self.home.take()
            && conn.unread.is_empty()
        {
            conn.idle_since = Instant::now();
            slot.put(conn);
        }
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

    /// The next bytes; `None` at the end.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
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
