//! The asking side of a lane: questions go out in the order they are asked, answers are matched
//! by number. A lane that fails is opened anew by the next question.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;

use super::link::{Link, reason};
use super::proto::Frame;
use super::wire::Kind;
use crate::ids::Group;

/// Questions that may wait for the connection; one more is an error. openraft keeps at most 64
/// appends in flight, the proposer 8 segments.
const WAITING: usize = 256;
/// How long opening may take.
const OPEN_TIMEOUT: Duration = Duration::from_millis(1000);

/// Why a question was not answered.
#[derive(thiserror::Error, Debug, Clone)]
pub enum LaneError {
    /// The peer cannot be reached, or is not who we mean.
    #[error("peer unreachable: {0}")]
    Unreachable(String),
    /// The lane closed before the answer.
    #[error("lane closed")]
    Closed,
    /// More questions wait than a lane holds.
    #[error("{WAITING} questions wait for the peer")]
    Full,
    /// No answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
}

type Pending = Arc<Mutex<Option<HashMap<u64, oneshot::Sender<Bytes>>>>>;

/// An open lane.
pub struct Open {
    frames: mpsc::Sender<Frame>,
    /// `None` once the lane has failed, so that nobody waits for an answer that cannot come.
    pending: Pending,
    next: Mutex<u64>,
}

impl Open {
    /// Asks, at once and in order; the answer comes through the receiver, which fails when the
    /// lane does.
    pub fn ask(
        &self,
        kind: Kind,
        group: Group,
        body: Vec<u8>,
    ) -> Result<oneshot::Receiver<Bytes>, LaneError> {
        let (tx, rx) = oneshot::channel();
        // Held over both steps, so that numbers go out in order.
        let mut next = self.next.lock();
        *next += 1;
        let id = *next;
        match self.pending.lock().as_mut() {
            Some(pending) => pending.insert(id, tx),
            None => return Err(LaneError::Closed),
        };
        let frame = Frame { id, kind: kind as u32, group: group as u32, body: body.into() };
        self.frames.try_send(frame).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => LaneError::Full,
            mpsc::error::TrySendError::Closed(_) => LaneError::Closed,
        })?;
        Ok(rx)
    }

    fn is_open(&self) -> bool {
        self.pending.lock().is_some() && !self.frames.is_closed()
    }
}

/// A lane to one peer.
pub struct Lane {
    link: Arc<Link>,
    open: tokio::sync::Mutex<Option<Arc<Open>>>,
}

impl Lane {
    /// A lane on `link`, opened when first used.
    pub fn new(link: Arc<Link>) -> Self {
        Self { link, open: tokio::sync::Mutex::new(None) }
    }

    /// The open lane, opening it if need be.
    pub async fn open(&self) -> Result<Arc<Open>, LaneError> {
        let mut slot = self.open.lock().await;
        if let Some(open) = slot.as_ref().filter(|open| open.is_open()) {
            return Ok(open.clone());
        }
        let open = tokio::time::timeout(OPEN_TIMEOUT, self.connect())
            .await
            .map_err(|_| LaneError::Timeout(OPEN_TIMEOUT))??;
        *slot = Some(open.clone());
        Ok(open)
    }

    async fn connect(&self) -> Result<Arc<Open>, LaneError> {
        let (frames, outgoing) = mpsc::channel(WAITING);
        let request = self.link.address(tonic::Request::new(ReceiverStream::new(outgoing)));
        let mut answers = self
            .link
            .client()
            .lane(request)
            .await
            .map_err(|status| LaneError::Unreachable(reason(&status)))?
            .into_inner();
        let pending: Pending = Arc::new(Mutex::new(Some(HashMap::new())));
        let open = Arc::new(Open { frames, pending: pending.clone(), next: Mutex::new(0) });
        // Owned by the lane's connection: ends when the peer or we close it.
        tokio::spawn(async move {
            while let Ok(Some(frame)) = answers.message().await {
                let waiter = pending.lock().as_mut().and_then(|p| p.remove(&frame.id));
                if let Some(waiter) = waiter {
                    let _ = waiter.send(frame.body);
                }
            }
            // Dropping the senders fails all who wait.
            pending.lock().take();
        });
        Ok(open)
    }

    /// Closes the lane: what waits fails, the next question opens a new one.
    pub async fn close(&self) {
        if let Some(open) = self.open.lock().await.take() {
            open.pending.lock().take();
        }
    }

    /// Asks and waits for the answer. An answer that does not come in time closes the lane,
    /// because a peer that is frozen answers nothing else on it either.
    pub async fn call(
        &self,
        kind: Kind,
        group: Group,
        body: Vec<u8>,
        within: Duration,
    ) -> Result<Bytes, LaneError> {
        let answer = async {
            let open = self.open().await?;
            open.ask(kind, group, body)?.await.map_err(|_| LaneError::Closed)
        };
        match tokio::time::timeout(within, answer).await {
            Ok(Err(error)) => Err(error),
            Ok(Ok(bytes)) => Ok(bytes),
            Err(_) => {
                self.close().await;
                Err(LaneError::Timeout(within))
            }
        }
    }
}
