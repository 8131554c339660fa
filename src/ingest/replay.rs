//! Asking an engine for messages again: one connection, one question, its answers.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::live::message;
use crate::kv::feed::Message;
use crate::zmtp::{Endpoint, Limits, Link, Parts, Resolve, SocketType};

/// Longest pause before the first answer. Engines look at their replay socket ten times a second, if
/// they find the time.
pub const SILENCE: Duration = Duration::from_secs(3);

/// Longest pause between two answers: engines send them one after the other. What was dropped for
/// want of room, the end marker with it, is noticed by this, and asked for again: an engine with a
/// long past drops some of it each time.
pub const BETWEEN: Duration = Duration::from_millis(500);

/// Answers read ahead of the sink.
const AHEAD: usize = 1024;

/// ... and their bytes, in KiB.
const AHEAD_KIB: u32 = 32 << 10;

/// What is asked of whom.
pub(super) struct Question {
    pub(super) endpoint: Endpoint,
    pub(super) resolve: Arc<dyn Resolve>,
    pub(super) limits: Limits,
    /// The first number wanted.
    pub(super) from: u64,
    /// How long to wait before asking.
    pub(super) pause: Duration,
    /// How long to wait for the first answer.
    pub(super) silence: Duration,
}

/// What comes of a replay.
pub(super) enum Answer {
    /// A message; the permit is its share of the bytes read ahead.
    Message(Message<Bytes>, OwnedSemaphorePermit),
    /// A message that is none.
    Garbage,
    /// All were sent.
    End,
    /// No more will come.
    Failed(String),
}

/// A replay under way. Dropping it ends it.
pub(super) struct Replay {
    answers: mpsc::Receiver<Answer>,
    _task: AbortOnDropHandle<()>,
}

impl Replay {
    /// Asks.
    pub(super) fn start(question: Question) -> Self {
        let (sender, answers) = mpsc::channel(AHEAD);
        let task = tokio::spawn(async move {
            tokio::time::sleep(question.pause).await;
            if let Err(failed) = ask(&question, &sender).await {
                // The feed may have gone.
                let _ = sender.send(Answer::Failed(failed)).await;
            }
        });
        Self { answers, _task: AbortOnDropHandle::new(task) }
    }

    /// The next answer. Loses nothing if it is dropped.
    pub(super) async fn next(&mut self) -> Answer {
        let gone = || Answer::Failed("the replay ended without a word".into());
        self.answers.recv().await.unwrap_or_else(gone)
    }
}

async fn ask(question: &Question, sender: &mpsc::Sender<Answer>) -> Result<(), String> {
    let Question { endpoint, resolve, limits, from, silence, .. } = question;
    let said = |error: crate::zmtp::ZmtpError| error.to_string();
    let mut link =
        Link::connect(endpoint, SocketType::Dealer, *limits, resolve.as_ref()).await.map_err(said)?;
    link.send(&[Bytes::new(), Bytes::copy_from_slice(&from.to_be_bytes())]).await.map_err(said)?;
    let mut limit = *silence;
    let budget = Arc::new(Semaphore::new(AHEAD_KIB as usize));
    loop {
        let nothing = |_| format!("no answer within {} ms", limit.as_millis());
        let parts = timeout(limit, link.recv()).await.map_err(nothing)?.map_err(said)?;
        if is_end(&parts) {
            // The feed may have gone.
            let _ = sender.send(Answer::End).await;
            return Ok(());
        }
        limit = BETWEEN.min(*silence);
        let answer = match message(&parts) {
            Ok(message) => {
                let kib = u32::try_from(message.size >> 10).unwrap_or(AHEAD_KIB).clamp(1, AHEAD_KIB);
                let permit = budget.clone().acquire_many_owned(kib).await;
                Answer::Message(message, permit.map_err(|_| "the feed is gone".to_owned())?)
            }
            Err(_) => Answer::Garbage,
        };
        sender.send(answer).await.map_err(|_| "the feed is gone".to_owned())?;
    }
}

/// Whether this is the end marker: number −1 and no payload, with or without a topic before it.
pub(super) fn is_end(parts: &Parts) -> bool {
    matches!(parts.as_slice(), [.., seq, payload] if payload.is_empty() && seq.as_ref() == [0xff; 8])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_markers_are_known_in_both_layouts_and_messages_are_none() {
        let part = Bytes::copy_from_slice;
        let marker = part(&[0xff; 8]);
        assert!(is_end(&vec![part(b""), marker.clone(), part(b"")]));
        assert!(is_end(&vec![part(b""), part(b""), marker.clone(), part(b"")]));
        assert!(!is_end(&vec![part(b""), marker, part(b"x")]));
        assert!(!is_end(&vec![part(b""), part(&[0; 8]), part(b"")]));
        assert!(!is_end(&vec![part(b"")]));
    }
}
