//! A body read by a task of its own, so that somebody looks after it while its client does not
//! read: over HTTP/2 hyper does not touch a body while its stream has no window, and none of
//! the body's own time limits would pass. A client that takes nothing for too long loses its
//! stream, with all that was read for it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::abandon::H2Stream;
use super::body::BodyError;

/// Frames read ahead of the client; a full queue makes the worker wait.
const AHEAD: usize = 4;

/// One step of a body; none comes after its end.
enum Piece {
    Frame(Frame<Bytes>),
    End,
    Failed(BodyError),
}

/// The client's end of a body that a task reads. The task ends with the body, when this is
/// dropped, or when the client has taken nothing for the stall time; the body that it reads is
/// dropped with it. Made within an HTTP/2 stream's task, it has that stream reset then.
#[derive(Debug)]
pub(super) struct Pumped {
    pieces: mpsc::Receiver<Piece>,
    ended: bool,
    /// What the body said of its length before anything was read of it.
    size: SizeHint,
}

impl Pumped {
    /// Reads `body` for a client that may pause for `stall` between two frames.
    pub(super) fn new<B>(body: B, stall: Duration) -> Self
    where
        B: Body<Data = Bytes, Error = BodyError> + Unpin + Send + 'static,
    {
        let (sender, pieces) = mpsc::channel(AHEAD);
        let size = body.size_hint();
        let stream = H2Stream::this();
        tokio::spawn(async move {
            if pump(body, sender, stall).await == Left::Unread
                && let Some(stream) = stream
            {
                stream.give_up();
            }
        });
        Self { pieces, ended: false, size }
    }
}

/// How a client and its body parted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Left {
    /// All was taken, or the client has gone.
    Done,
    /// The client has taken nothing for too long.
    Unread,
}

async fn pump<B>(mut body: B, sender: mpsc::Sender<Piece>, stall: Duration) -> Left
where
    B: Body<Data = Bytes, Error = BodyError> + Unpin,
{
    loop {
        // Room first: what was read could not be taken back, and while there is none the worker
        // should notice.
        let room = match timeout(stall, sender.reserve()).await {
            Ok(Ok(room)) => room,
            Ok(Err(_)) => return Left::Done,
            Err(_) => return Left::Unread,
        };
        let next = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx));
        let piece = tokio::select! {
            next = next => match next {
                Some(Ok(frame)) => Piece::Frame(frame),
                Some(Err(error)) => Piece::Failed(error),
                None => Piece::End,
            },
            () = sender.closed() => return Left::Done,
        };
        let is_last = !matches!(piece, Piece::Frame(_));
        room.send(piece);
        if is_last {
            break;
        }
    }
    // The worker is let go of; what is left is for the client to take.
    drop(body);
    for free in 1..=AHEAD {
        match timeout(stall, sender.reserve_many(free)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Left::Done,
            Err(_) => return Left::Unread,
        }
    }
    Left::Done
}

impl Body for Pumped {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let piece = ready!(self.pieces.poll_recv(cx));
        self.size = SizeHint::default();
        self.ended = !matches!(piece, Some(Piece::Frame(_)));
        Poll::Ready(match piece {
            Some(Piece::Frame(frame)) => Some(Ok(frame)),
            Some(Piece::End) => None,
            Some(Piece::Failed(error)) => Some(Err(error)),
            // Gone without a last word: given up.
            None => Some(Err("the client did not read for too long".into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.size
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::abandon::Streams;
    use http_body_util::BodyExt;
    use hyper::rt::Executor as _;
    use std::collections::VecDeque;
    use tokio::sync::oneshot;

    /// Gives these, then nothing for ever; tells when it is dropped.
    struct Given {
        frames: VecDeque<Result<Frame<Bytes>, BodyError>>,
        ends: bool,
        _alive: oneshot::Sender<()>,
    }

    impl Body for Given {
        type Data = Bytes;
        type Error = BodyError;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
            match self.frames.pop_front() {
                Some(next) => Poll::Ready(Some(next)),
                None if self.ends => Poll::Ready(None),
                None => Poll::Pending,
            }
        }
    }

    fn given(frames: usize, ends: bool) -> (Given, oneshot::Receiver<()>) {
        let (alive, gone) = oneshot::channel();
        let frames = (0..frames).map(|n| Ok(Frame::data(Bytes::from(n.to_string()))));
        (Given { frames: frames.collect(), ends, _alive: alive }, gone)
    }

    const STALL: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn all_frames_come_in_order_and_then_the_end() {
        let (body, gone) = given(100, true);
        let whole = Pumped::new(body, STALL).collect().await.unwrap().to_bytes();
        assert_eq!(whole, (0..100).map(|n| n.to_string()).collect::<String>());
        assert!(gone.await.is_err(), "the body is dropped");
    }

    #[tokio::test]
    async fn an_error_comes_through() {
        let (mut body, _gone) = given(1, true);
        body.frames.push_back(Err("broken".into()));
        let mut pumped = Pumped::new(body, STALL);
        assert!(pumped.frame().await.unwrap().is_ok());
        assert_eq!(pumped.frame().await.unwrap().unwrap_err().to_string(), "broken");
        assert!(pumped.frame().await.is_none());
    }

    #[tokio::test]
    async fn a_stream_is_given_up_when_its_client_does_not_take_all_of_a_body_however_short() {
        for frames in [1, 100] {
            let (alive, gone) = oneshot::channel::<()>();
            let short = Duration::from_millis(50);
            Streams.execute(async move {
                let _held = (alive, Pumped::new(given(frames, true).0, short));
                std::future::pending::<()>().await;
            });
            assert!(timeout(STALL, gone).await.expect("it is given up").is_err(), "{frames}");
        }
        let (alive, gone) = oneshot::channel::<()>();
        Streams.execute(async move {
            let whole = Pumped::new(given(100, true).0, Duration::from_millis(50)).collect().await;
            tokio::time::sleep(Duration::from_millis(200)).await;
            let _ = alive.send(()).map(|()| assert_eq!(whole.unwrap().to_bytes().len(), 190));
        });
        assert!(gone.await.is_ok(), "one that was read to its end is left alone");
    }

    #[tokio::test]
    async fn the_body_is_dropped_when_the_client_leaves_or_does_not_read() {
        let (body, gone) = given(1, false);
        let mut pumped = Pumped::new(body, STALL);
        assert!(pumped.frame().await.unwrap().is_ok());
        drop(pumped);
        assert!(gone.await.is_err());

        let (body, gone) = given(100, true);
        let short = Duration::from_millis(50);
        let mut pumped = Pumped::new(body, short);
        let started = tokio::time::Instant::now();
        assert!(gone.await.is_err());
        assert!(started.elapsed() >= short);
        // Outside of a stream what was read ahead is still there; then it breaks off, visibly.
        for _ in 0..AHEAD {
            assert!(pumped.frame().await.unwrap().is_ok());
        }
        assert!(pumped.frame().await.unwrap().is_err());
    }
}
