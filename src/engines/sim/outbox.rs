//! The channel from the engine to one request: what is not yet read is merged, so it stays bounded.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use super::pd::Told;

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
    /// On the last delta of a prefill leg: what the decode engine is to be told.
    pub transfer: Option<Arc<Told>>,
}

/// Why a request came to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The engine process is gone.
    EngineDead,
    /// The KV that it was to have from elsewhere did not come, in vLLM.
    NoTransfer,
    /// SGLang ended it, with this status and these words.
    Aborted {
        /// HTTP status, where none was sent yet.
        status: u16,
        /// What it says.
        message: String,
    },
}

/// What a reader gets.
#[derive(Debug)]
pub enum Output {
    /// Tokens, or an end.
    Delta(Delta),
    /// There is no more to come.
    Failed(Failure),
}

/// One request's outbox, written by the engine task and read by the connection.
///
/// Bound: with merging at most one delta for each choice; without, at most `max_tokens` of them.
#[derive(Debug)]
pub struct Outbox {
    queue: Mutex<VecDeque<Delta>>,
    reader: AtomicWaker,
    /// What is ready to be attached to the last delta of a choice.
    transfers: Mutex<Vec<(usize, Arc<Told>)>>,
    failed: AtomicBool,
    failure: Mutex<Option<Failure>>,
    /// Choices whose words are not to be read before something else happened.
    held: AtomicUsize,
    /// Choices that have said all but are not to end yet.
    lingering: AtomicUsize,
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
            transfers: Mutex::default(),
            failed: AtomicBool::new(false),
            failure: Mutex::default(),
            held: AtomicUsize::new(0),
            lingering: AtomicUsize::new(0),
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

    /// Tells the reader that no more comes, and why; the first reason stands.
    pub fn fail(&self, failure: Failure) {
        self.failure.lock().get_or_insert(failure);
        self.failed.store(true, Ordering::Release);
        self.reader.wake();
    }

    /// Says what the last delta of a choice, which is still to be pushed, goes with.
    pub fn attach(&self, choice: usize, transfer: Arc<Told>) {
        self.transfers.lock().push((choice, transfer));
    }

    /// Keeps everything from the reader until [`Outbox::let_go`] was called as often.
    pub fn hold(&self) {
        self.held.fetch_add(1, Ordering::AcqRel);
    }

    /// Undoes one [`Outbox::hold`].
    pub fn let_go(&self) {
        self.held.fetch_sub(1, Ordering::AcqRel);
        self.reader.wake();
    }

    /// Has the reader wait at its end until [`Outbox::part`] was called as often.
    pub fn linger(&self) {
        self.lingering.fetch_add(1, Ordering::AcqRel);
    }

    /// Undoes one [`Outbox::linger`].
    pub fn part(&self) {
        self.lingering.fetch_sub(1, Ordering::AcqRel);
        self.reader.wake();
    }

    /// Whether whoever has read everything may end. Nobody waits for what has failed.
    pub fn poll_parted(&self, context: &mut Context<'_>) -> Poll<()> {
        self.reader.register(context.waker());
        let is_over = self.lingering.load(Ordering::Acquire) == 0 || self.failed.load(Ordering::Acquire);
        if is_over { Poll::Ready(()) } else { Poll::Pending }
    }

    /// Makes the reader look again, at the fault switches for instance.
    pub fn wake(&self) {
        self.reader.wake();
    }

    /// What came next; what was written before the engine died comes out first.
    pub fn poll_next(&self, context: &mut Context<'_>) -> Poll<Output> {
        self.reader.register(context.waker());
        let is_held = self.held.load(Ordering::Acquire) > 0;
        if !is_held && let Some(mut delta) = self.queue.lock().pop_front() {
            if delta.finish.is_some() {
                let mut transfers = self.transfers.lock();
                let at = transfers.iter().position(|(choice, _)| *choice == delta.choice);
                delta.transfer = at.map(|at| transfers.swap_remove(at).1);
            }
            return Poll::Ready(Output::Delta(delta));
        }
        if self.failed.load(Ordering::Acquire) {
            let failure = self.failure.lock().clone();
            return Poll::Ready(Output::Failed(failure.unwrap_or(Failure::EngineDead)));
        }
        Poll::Pending
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
    use super::super::pd::{Lender, Mode};
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
    fn what_is_held_back_is_read_once_it_is_let_go_and_never_if_it_fails() {
        let outbox = Outbox::new(true, Arc::default());
        outbox.hold();
        let (identity, lease) = (Default::default(), std::time::Duration::ZERO);
        let told = Arc::new(Lender { identity, host: "h".into(), port: 1, lease }.params(
            Mode::Pull,
            "r",
            &[0],
            1,
            0,
        ));
        outbox.attach(0, Arc::clone(&told));
        outbox.push(0, "a", Some(1), Some((FinishReason::Length, None)), 0, 0);
        assert!(read(&outbox).is_none());
        outbox.let_go();
        let delta = read(&outbox).unwrap();
        assert_eq!((delta.text.as_str(), delta.transfer), ("a", Some(told)));
        outbox.hold();
        outbox.push(0, "b", Some(2), None, 0, 0);
        outbox.fail(Failure::NoTransfer);
        outbox.fail(Failure::EngineDead);
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(outbox.poll_next(&mut context), Poll::Ready(Output::Failed(Failure::NoTransfer))));
    }

    #[test]
    fn what_was_written_before_the_engine_died_is_read_first() {
        let outbox = Outbox::new(true, Arc::default());
        outbox.push(0, "a", Some(1), None, 0, 0);
        outbox.fail(Failure::EngineDead);
        assert_eq!(read(&outbox).map(|delta| delta.text), Some("a".into()));
        let mut context = Context::from_waker(std::task::Waker::noop());
        assert!(matches!(outbox.poll_next(&mut context), Poll::Ready(Output::Failed(Failure::EngineDead))));
    }
}
