//! What waits to be sent on a link. Frames that wait together go out together.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::Stream;
use parking_lot::Mutex;

use super::proto::frame::What;
use super::proto::{Batch, Frame};

/// How long a frame may wait for another one to go with.
const LINGER: Duration = Duration::from_millis(2);
/// Most frames in a batch.
const FRAMES: usize = 256;
/// A batch is closed when it has so many bytes.
const BATCH: usize = 64 << 10;
/// Most bytes that may wait. Events are held back by their windows; whoever does not take this much
/// of them all is not worth waiting for.
const WAITING: usize = 128 << 20;

#[derive(Default)]
struct Inner {
    frames: VecDeque<Frame>,
    bytes: usize,
    closed: bool,
    /// A batch without frames is due.
    ping: bool,
    waker: Option<Waker>,
}

/// See the module.
#[derive(Default)]
pub struct Outbox {
    inner: Mutex<Inner>,
}

fn size(frame: &Frame) -> usize {
    let content = match &frame.what {
        Some(What::Open(open)) => {
            let past = open.past.as_ref();
            let events = past.and_then(|past| past.events.as_ref());
            let events: usize = events
                .map_or(0, |events| events.events.iter().map(|e| e.lines.len() + e.journal.len()).sum());
            open.order.len() + events + past.map_or(0, |past| past.journal.len() + past.head.len())
        }
        Some(What::Accepted(accepted)) => accepted.order.len() + accepted.journal.len() + accepted.head.len(),
        Some(What::Events(events)) => events.events.iter().map(|e| e.lines.len() + e.journal.len() + 8).sum(),
        Some(What::Head(head)) => head.len(),
        _ => 0,
    };
    content + 32
}

impl Outbox {
    /// Puts a frame at the end. False, and the link closes, when it is closed or too much waits.
    pub fn send(&self, frame: Frame) -> bool {
        let taken = self.put(frame);
        self.wake();
        taken
    }

    /// The same, for what is soon followed by something: it goes with that, or after 2 ms. On a
    /// tokio runtime.
    pub fn send_with_next(self: &Arc<Self>, frame: Frame) -> bool {
        let taken = self.put(frame);
        let outbox = Arc::downgrade(self);
        // Ends by itself.
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            if let Some(outbox) = outbox.upgrade() {
                outbox.wake();
            }
        });
        taken
    }

    fn put(&self, frame: Frame) -> bool {
        let mut inner = self.inner.lock();
        if inner.closed {
            return false;
        }
        inner.bytes += size(&frame);
        inner.frames.push_back(frame);
        inner.closed = inner.bytes > WAITING;
        true
    }

    fn wake(&self) {
        let waker = self.inner.lock().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Sends a sign of life, unless something waits anyway.
    pub fn ping(&self) {
        self.inner.lock().ping = true;
        self.wake();
    }

    /// Nothing more is sent.
    pub fn close(&self) {
        {
            let mut inner = self.inner.lock();
            inner.closed = true;
            inner.frames.clear();
        }
        self.wake();
    }

    /// Whether nothing more is sent.
    pub fn is_closed(&self) -> bool {
        self.inner.lock().closed
    }

    /// What goes out, until it is closed. Dropping it closes it.
    pub fn batches(self: &Arc<Self>) -> Batches {
        Batches(Arc::clone(self))
    }
}

/// See [`Outbox::batches`].
pub struct Batches(Arc<Outbox>);

impl Stream for Batches {
    type Item = Batch;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Batch>> {
        let mut inner = self.0.inner.lock();
        if inner.closed {
            return Poll::Ready(None);
        }
        if inner.frames.is_empty() && !inner.ping {
            inner.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        inner.ping = false;
        let (mut frames, mut bytes) = (Vec::new(), 0);
        while frames.len() < FRAMES && bytes < BATCH {
            let Some(frame) = inner.frames.pop_front() else { break };
            bytes += size(&frame);
            frames.push(frame);
        }
        inner.bytes = inner.bytes.saturating_sub(bytes);
        Poll::Ready(Some(Batch { frames }))
    }
}

impl Drop for Batches {
    fn drop(&mut self) {
        self.0.close();
    }
}
