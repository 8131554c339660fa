//! A client connection's clock and first line of defence: timeouts while nobody is served, a
//! limit on stalled writes, and a look at raw heads for what hyper silently repairs.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use super::head::{HeadScanner, Verdict};

/// How long a connection may take over what.
#[derive(Clone, Copy, Debug)]
pub struct ConnTimeouts {
    /// From accept to the first byte.
    pub first_byte: Duration,
    /// From a head's first byte to its last.
    pub head: Duration,
    /// Between requests.
    pub idle: Duration,
    /// A write that makes no progress.
    pub write_stall: Duration,
}

/// Shared between a connection's socket and its service.
#[derive(Debug, Default)]
pub(super) struct ConnState {
    in_flight: AtomicU32,
    /// Counts requests ended, so that the socket notices even between two polls.
    ended: AtomicU32,
    verdict: AtomicU8,
}

impl ConnState {
    /// Marks a request as in flight until the returned mark is dropped.
    pub(super) fn begin(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        InFlight(Arc::clone(self))
    }

    /// What the scanner thought of the head just parsed.
    pub(super) fn take_verdict(&self) -> Verdict {
        Verdict::from_bits(self.verdict.swap(0, Ordering::AcqRel))
    }
}

/// A request in flight on a connection.
#[derive(Debug)]
pub(super) struct InFlight(Arc<ConnState>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::AcqRel);
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the connection waits for while no request is in flight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Waiting {
    FirstByte,
    Head,
    NextRequest,
}

/// A socket with the timeouts of [`ConnTimeouts`]. An expired one reads (or writes) as
/// [`io::ErrorKind::TimedOut`], which makes hyper drop the connection and all it serves.
#[derive(Debug)]
pub(super) struct GuardedIo<S> {
    io: S,
    state: Arc<ConnState>,
    timeouts: ConnTimeouts,
    waiting: Waiting,
    since: Instant,
    ended: u32,
    scanner: HeadScanner,
    is_h2: bool,
    read_timer: Option<Pin<Box<Sleep>>>,
    write_timer: Option<Pin<Box<Sleep>>>,
}

impl<S> GuardedIo<S> {
    /// Guards a socket just accepted.
    pub(super) fn new(io: S, state: Arc<ConnState>, timeouts: ConnTimeouts) -> Self {
        Self {
            io,
            state,
            timeouts,
            waiting: Waiting::FirstByte,
            since: Instant::now(),
            ended: 0,
            scanner: HeadScanner::default(),
            is_h2: false,
            read_timer: None,
            write_timer: None,
        }
    }

    fn busy(&self) -> bool {
        self.state.in_flight.load(Ordering::Acquire) > 0
    }

    /// Starts waiting anew when a request has ended since the last look.
    fn catch_up(&mut self) {
        let ended = self.state.ended.load(Ordering::Acquire);
        if ended != self.ended {
            self.ended = ended;
            self.waiting = Waiting::NextRequest;
            self.since = Instant::now();
            self.scanner = HeadScanner::default();
        }
    }

    fn observe(&mut self, bytes: &[u8]) {
        if bytes.is_empty() || self.is_h2 || self.busy() {
            return;
        }
        self.catch_up();
        if self.waiting == Waiting::FirstByte
            && bytes[0] == b'P'
            && b"PRI * HTTP/2.0".starts_with(&bytes[..bytes.len().min(14)])
        {
            // An h2 client has the idle time from its preface or its last response to the next
            // request; its pings do not count.
            self.is_h2 = bytes.len() > 1;
        }
        if self.is_h2 {
            self.waiting = Waiting::NextRequest;
            self.since = Instant::now();
            return;
        }
        if self.waiting != Waiting::Head {
            self.waiting = Waiting::Head;
            self.since = Instant::now();
        }
        if let Some(verdict) = self.scanner.feed(bytes) {
            self.state.verdict.store(verdict.bits(), Ordering::Release);
        }
    }

    fn check_read_deadline(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.busy() {
            return Ok(());
        }
        self.catch_up();
        let (allowed, what) = match self.waiting {
            Waiting::FirstByte => (self.timeouts.first_byte, "no first byte in time"),
            Waiting::Head => (self.timeouts.head, "no complete head in time"),
            Waiting::NextRequest => (self.timeouts.idle, "idle for too long"),
        };
        let deadline = self.since + allowed;
        if poll_deadline(&mut self.read_timer, deadline, cx) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        Ok(())
    }

    fn guard_write<T>(&mut self, outcome: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.write_timer = None;
            return outcome;
        }
        let timer = self
            .write_timer
            .get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + self.timeouts.write_stall)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client does not read")))
    }
}

/// Whether `deadline` has passed; else the task is woken by then. A timer set for an earlier
/// time is left alone (the early wake-up is harmless), which saves a re-arm per request.
fn poll_deadline(timer: &mut Option<Pin<Box<Sleep>>>, deadline: Instant, cx: &mut Context<'_>) -> bool {
    let timer = timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
    if timer.deadline() > deadline {
        timer.as_mut().reset(deadline);
    }
    while timer.as_mut().poll(cx).is_ready() {
        if Instant::now() >= deadline {
            return true;
        }
        timer.as_mut().reset(deadline);
    }
    false
}

impl<S: AsyncRead + Unpin> AsyncRead for GuardedIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        match Pin::new(&mut self.io).poll_read(cx, buf) {
            Poll::Ready(Ok(())) => {
                self.observe(&buf.filled()[before..]);
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => match self.check_read_deadline(cx) {
                Ok(()) => Poll::Pending,
                Err(error) => Poll::Ready(Err(error)),
            },
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for GuardedIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write(cx, buf);
        self.guard_write(outcome, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Of TCP it is done at once; TLS may still hold records that the client does not take.
        let outcome = Pin::new(&mut self.io).poll_flush(cx);
        self.guard_write(outcome, cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.io).poll_shutdown(cx);
        self.guard_write(outcome, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.io).poll_write_vectored(cx, bufs);
        self.guard_write(outcome, cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// Takes what is written and never gets rid of it, as TLS does when the client does not read.
    struct Held;

    impl AsyncWrite for Held {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncRead for Held {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn what_the_socket_holds_back_is_a_stalled_write_too() {
        let stall = Duration::from_millis(50);
        let timeouts = ConnTimeouts { first_byte: stall, head: stall, idle: stall, write_stall: stall };
        for shutting_down in [false, true] {
            let mut io = GuardedIo::new(Held, Arc::default(), timeouts);
            io.write_all(b"x").await.unwrap();
            let since = Instant::now();
            let outcome = if shutting_down { io.shutdown().await } else { io.flush().await };
            assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::TimedOut);
            assert!(since.elapsed() >= stall);
        }
    }
}
