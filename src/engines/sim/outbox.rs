//! The channel from the engine to one request: what is not yet read is merged, so it stays bounded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

/// What made a sequence end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A token out of `stop_token_ids`.
    Token(u32),
}

/// Why a sequence ended, in the words of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End of sequence, stop string or stop token.
    Stop,
    /// Out of tokens.
    Length,
    /// Ended by the engine: shutdown or abort by id.
    Abort,
}

impl FinishReason {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
        }
    }
}

/// What came out for one choice since the reader last looked.
#[derive(Clone, Debug, Default)]
pub struct Delta {
    /// Index of the choice within the request.
    pub choice: usize,
    /// New text; may be empty.
    pub text: String,
    /// New ids; several if the reader was slow.
    pub token_ids: Vec<u32>,
    /// Prompt ids that came out of the prefix cache.
    pub cached_tokens: usize,
    /// Prompt ids that this request put into the prefix cache.
    pub created_tokens: usize,
    /// Set on the last delta of the choice.
    pub finish: Option<(FinishReason, Option<StopReason>)>,
}

/// What a reader gets.
#[derive(Debug)]
pub enum Output {
    /// Tokens, or an end.
    Delta(Delta),
    /// The engine died under the request.
    EngineDead,
}

/// One request's outbox, written by the engine task and read by the connection.
///
/// Bound: with merging at most one delta for each choice; without, at most `max_tokens` of them.
#[derive(Debug)]
pub struct Outbox {
    queue: Mutex<VecDeque<Delta>>,
    reader: AtomicWaker,
    dead: AtomicBool,
    cancelled: AtomicBool,
    cancellations: Arc<AtomicU64>,
    merge: bool,
}

impl Outbox {
    /// Empty. `cancellations` counts up when the reader goes away, so that the engine need not
    /// look at every request in every step.
    pub fn new(merge: bool, cancellations: Arc<AtomicU64>) -> Self {
        Self {
            queue: Mutex::default(),
            reader: AtomicWaker::new(),
            dead: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            cancellations,
            merge,
        }
    }

    /// Adds to what the reader has not yet taken and wakes it.
    pub fn push(
        &self,
        choice: usize,
        text: &str,
        token: Option<u32>,
        finish: Option<(FinishReason, Option<StopReason>)>,
        cached: usize,
        created: usize,
    ) {
        {
            let mut queue = self.queue.lock();
            let unread =
                if self.merge { queue.iter_mut().find(|delta| delta.choice == choice) } else { None };
            let delta = match unread {
                Some(delta) => delta,
                None => {
                    queue.push_back(Delta {
                        choice,
                        cached_tokens: cached,
                        created_tokens: created,
                        ..Delta::default()
                    });
                    let last = queue.len() - 1;
                    &mut queue[last]
                }
            };
            delta.text.push_str(text);
            delta.token_ids.extend(token);
            delta.finish = finish;
        }
        self.reader.wake();
    }

    /// Tells the reader that the engine is gone.
    pub fn fail(&self) {
        self.dead.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// Makes the reader look again, at the fault switches for instance.
    pub fn wake(&self) {
        self.reader.wake();
    }

    /// What came next; what was written before the engine died comes out first.
    pub fn poll_next(&self, context: &mut Context<'_>) -> Poll<Output> {
        self.reader.register(context.waker());
        if let Some(delta) = self.queue.lock().pop_front() {
            return Poll::Ready(Output::Delta(delta));
        }
        if self.dead.load(Ordering::Acquire) { Poll::Ready(Output::EngineDead) } else { Poll::Pending }
    }

    /// The client is gone: the engine drops the request in its next step.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.cancellations.fetch_add(1, Ordering::Release);
    }

    /// Whether the client is gone.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(outbox: &Outbox) -> Option<Delta> {
        match outbox.poll_next(&mut Context::from_waker(std::task::Waker::noop())) {
            Poll::Ready(Output::Delta(delta)) => Some(delta),
            _ => None,
        }
    }

    #[test]
    fn unread_tokens_are_merged_choice_by_choice() {
        for (merge, expected) in [(true, vec![vec![1, 3], vec![2]]), (false, vec![vec![1], vec![2], vec![3]])]
        {
            let outbox = Outbox::new(merge, Arc::default());
            outbox.push(0, "a", Some(1), None, 0, 0);
            outbox.push(1, "b", Some(2), None, 0, 0);
            outbox.push(0, "c", Some(3), Some((FinishReason::Length, None)), 0, 0);
            let read: Vec<_> = std::iter::from_fn(|| read(&outbox)).map(|delta| delta.token_ids).collect();
            assert_eq!(read, expected);
        }
    }

    #[test]
    fn what_was_written_before_the_engine_died_is_read_first() {
        let outbox = Outbox::new(true, Arc::default());
        outbox.push(0, "a", Some(1), None, 0, 0);
        outbox.fail();
        assert_eq!(read(&outbox).map(|delta| delta.text), Some("a".into()));
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(outbox.poll_next(&mut context), Poll::Ready(Output::EngineDead)));
    }
}
