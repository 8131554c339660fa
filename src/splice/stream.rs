//! One stream over all its attempts: its state, and how what is handed out is written down.
//!
//! What becomes of an event is in `own` for legs that speak the client's dialect (the first
//! attempt and replays) and in `continued` for those that go on behind a cut; what becomes of lost
//! legs is in `recover`.

use std::sync::Arc;

use bytes::Bytes;

use super::choice::{Channel, Choice, End};
use super::journal::{self, Op, Reader};
use super::plan::{Plan, StreamRoute};
use super::render::{self, Head};
use super::sse::Event;

/// One request to an engine on behalf of a stream. The first attempt and every replay carry all
/// choices; a continuation has a leg for each choice that is not finished.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LegId(pub u32);

impl LegId {
    /// The first attempt.
    pub const FIRST: LegId = LegId(0);
}

/// An event for the client.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Out {
    /// `data: …\n`, with `event: …\n` before it where the engine named it. The `id:` line and
    /// the blank line are the caller's.
    pub lines: Bytes,
    /// What another process needs to rebuild the state up to and including this event; may be
    /// empty. Entries only mean something in order, from the first one on.
    pub journal: Bytes,
    /// The last event of the stream.
    pub terminal: bool,
    /// Generated tokens that the client learns of by this event.
    pub tokens: u32,
}

/// What an event meant for its leg.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Progress {
    /// The leg runs on.
    Going,
    /// The leg has given all it had to; its connection may be closed at once. Others run on.
    LegDone,
    /// The stream is over and its terminal event was handed out. All legs may be closed.
    Done,
    /// The leg is lost. Nothing of the event was handed out. Ask [`Splice::recover`].
    Failed(Failure),
}

/// How a leg was lost.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Failure {
    /// The engine sent an error event.
    #[error("the engine sent an error: {0}")]
    Error(String),
    /// The engine gave up the generation (`finish_reason` abort or error).
    #[error("the engine ended the generation with finish_reason {0}")]
    Aborted(String),
    /// The connection ended before the stream did.
    #[error("the engine's stream ended early")]
    Truncated,
    /// What came is not what the route sends.
    #[error("the engine sent an event that makes no sense: {0}")]
    Malformed(&'static str),
    /// What came cannot be told apart exactly; it is asked for again.
    #[error("{0}")]
    Ambiguous(&'static str),
}

/// What to do about lost legs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// Send [`Plan::first_body`] again, to the client's own path, as this leg.
    Replay(LegId),
    /// Send each of these. Empty if no leg is lost.
    Continue(Vec<Leg>),
    /// Nothing is left to generate: the end was handed out.
    Finish,
    /// The stream cannot go on. The caller ends it in its dialect.
    Lost(Lost),
}

/// One continuation request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Leg {
    /// What to call it in [`Splice::push`].
    pub id: LegId,
    /// The client's choice that it continues.
    pub choice: u32,
    /// Where to send it.
    pub path: &'static str,
    /// What to send, JSON.
    pub body: Bytes,
    /// Length of the prompt with what was generated so far, in tokens.
    pub prompt_tokens: usize,
}

/// Why a stream cannot go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Lost {
    /// Something in the request forbids it, and the client has seen output.
    #[error("the stream cannot be continued: {0}")]
    NotResumable(&'static str),
    /// Something in the answer forbids it.
    #[error("the stream cannot be continued any more: {0}")]
    NotAnyMore(&'static str),
    /// Engine after engine was lost.
    #[error("one engine after the other was lost that went on with it")]
    Attempts,
}

/// Why a journal does not rebuild a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum JournalError {
    /// Written by a version that this one does not know.
    #[error("the journal has version {0}, this is version {version}", version = journal::VERSION)]
    Version(u8),
    /// Bytes that no version writes.
    #[error("the journal is damaged")]
    Damaged,
}

/// Tokens of a stream, as its client is billed for them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// Of the prompt, as the first attempt counted them.
    pub prompt_tokens: u64,
    /// Generated, over all choices and attempts.
    pub completion_tokens: u64,
    /// Of the prompt, found in the first attempt's cache, where it said so.
    pub cached_tokens: Option<u64>,
}

/// Why a stream is not continued any more; goes into the journal as a number.
pub(super) const BROKEN: [&str; 9] = [
    "the engine does not tell token ids",
    "it has more tokens than are kept",
    "a tool call has begun",
    "its content may be a tool call",
    "the engine sent log probabilities of an unknown shape",
    "the prompt's token ids are not known",
    "the echo of a choice was not seen",
    "whether its reasoning has ended cannot be told",
    "whether a tool call has begun cannot be told",
];
pub(super) const NO_IDS: u8 = 0;
pub(super) const TOO_MANY: u8 = 1;
pub(super) const TOOL: u8 = 2;
pub(super) const MAYBE_TOOL: u8 = 3;
pub(super) const LOGPROBS: u8 = 4;
pub(super) const REASONS: u8 = 7;

/// One stream's state over all its attempts.
#[derive(Debug)]
pub struct Splice {
    pub(super) plan: Arc<Plan>,
    pub(super) chat: bool,
    pub(super) choices: Vec<Choice>,
    /// The prompts' ids, as engines told them.
    pub(super) prompts: Vec<Option<Arc<[u32]>>>,
    pub(super) head: Option<Arc<Head>>,
    pub(super) fingerprint: Option<Vec<u8>>,
    /// As the first attempt counted.
    pub(super) prompt_tokens: Option<u64>,
    pub(super) cached_tokens: Option<u64>,
    /// The name under which the model's reasoning comes, once seen.
    pub(super) reasoning: Channel,
    /// The leg that speaks the client's dialect.
    pub(super) own: Option<LegId>,
    /// Legs so far.
    pub(super) legs: u32,
    /// Engines in a row that were lost before any choice said something.
    pub(super) setbacks: u32,
    pub(super) broken: Option<u8>,
    /// The last choice's last event, which waits for the fingerprint that comes behind it.
    pub(super) last: Option<(u32, Vec<u8>)>,
    pub(super) usage_sent: bool,
    pub(super) done: bool,
    pub(super) delivered: bool,
    /// What of the stream itself is not in the journal.
    pub(super) unwritten: Unwritten,
    /// Ids kept, over all choices.
    pub(super) kept: usize,
}

/// What changed of a stream itself since the last entry.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    pub(super) versioned: bool,
    pub(super) head: bool,
    pub(super) fingerprint: bool,
    pub(super) prompts: bool,
    pub(super) prompt_tokens: bool,
    pub(super) setbacks: bool,
    pub(super) broken: bool,
    pub(super) any: bool,
}

impl Splice {
    /// Before the first attempt; its leg is [`LegId::FIRST`].
    pub fn new(plan: Arc<Plan>) -> Self {
        let chat = plan.route == StreamRoute::Chat;
        Self {
            chat,
            choices: Vec::new(),
            prompts: Vec::new(),
            head: None,
            fingerprint: None,
            prompt_tokens: None,
            cached_tokens: None,
            reasoning: Channel::Unset,
            own: Some(LegId::FIRST),
            legs: 1,
            setbacks: 0,
            broken: None,
            last: None,
            usage_sent: false,
            done: false,
            delivered: false,
            unwritten: Unwritten::default(),
            kept: 0,
            plan,
        }
    }

    /// What a second process continues with: the journal entries of the events that were
    /// delivered, in order. No leg is alive in it; [`Splice::recover`] says how to go on.
    pub fn restore<'a>(
        plan: Arc<Plan>,
        journal: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Self, JournalError> {
        let mut splice = Self::new(plan);
        splice.own = None;
        for entry in journal {
            splice.delivered = true;
            let mut reader = Reader::new(entry);
            if !entry.is_empty() && !splice.unwritten.versioned {
                reader.version()?;
                splice.unwritten.versioned = true;
            }
            while let Some(op) = reader.next()? {
                splice.apply(op)?;
            }
        }
        Ok(splice)
    }

    fn known(&mut self, index: u32) -> Result<&mut Choice, JournalError> {
        self.choice(index).ok_or(JournalError::Damaged)
    }

    fn apply(&mut self, op: Op<'_>) -> Result<(), JournalError> {
        match op {
            Op::Token(id) => self.known(0)?.restore_ids(&[id]),
            Op::Tokens(index, ids) => self.known(index)?.restore_ids(&ids),
            Op::Uncounted(index, count) => self.known(index)?.restore_uncounted(count),
            Op::Held(index, held) => held.clone_into(&mut self.known(index)?.held),
            Op::Channel(index, channel) => {
                let channel = *Channel::ALL.get(usize::from(channel)).ok_or(JournalError::Damaged)?;
                self.known(index)?.channel = channel;
                if channel.reasons() {
                    self.reasoning = channel;
                }
            }
            Op::Offset(index, next, by_text) => self.known(index)?.restore_offset(next, by_text),
            Op::Opening(index, first) => self.known(index)?.opening = Some(first),
            Op::Guard(index, guard) => self.known(index)?.restore_guard(guard),
            Op::Role(index) => self.known(index)?.role = true,
            Op::Ending(index, reason, stop) => {
                let choice = self.known(index)?;
                choice.ending = Some(End { reason: reason.to_vec(), stop: stop.to_vec() });
            }
            Op::Finished(index) => {
                let choice = self.known(index)?;
                choice.finish();
                choice.dirty.finished = false;
                choice.spoke = true;
            }
            Op::Head(id, created, model, sglang) => {
                let (id, created, model) = (id.to_vec(), created.to_vec(), model.to_vec());
                self.head = Some(Arc::new(Head { id, created, model, sglang }));
            }
            Op::Fingerprint(value) => self.fingerprint = Some(value.to_vec()),
            Op::Prompt(index, ids) => self.put_prompt(index as usize, ids),
            Op::PromptTokens(prompt, cached) => {
                self.prompt_tokens = Some(prompt);
                self.cached_tokens = cached.checked_sub(1);
            }
            Op::Setbacks(count) => self.setbacks = count,
            Op::Broken(why) => {
                self.broken = Some(why).filter(|why| usize::from(*why) < BROKEN.len());
            }
            Op::UsageSent => self.usage_sent = true,
            Op::Done => self.done = true,
            Op::Passed => {}
            Op::SetBack(index, count) => self.known(index)?.restore_setbacks(count),
            Op::Guessed(index) => self.known(index)?.guessed = true,
            Op::Blanks(index, count) => self.known(index)?.restore_blanks(count),
        }
        Ok(())
    }

    /// Takes an event of a leg. Events of legs that are over are ignored.
    pub fn push(&mut self, leg: LegId, event: &Event, out: &mut Vec<Out>) -> Progress {
        if self.done {
            return Progress::Done;
        }
        let progress = match self.plan.route {
            StreamRoute::Chat | StreamRoute::Completions if self.own == Some(leg) => {
                self.push_own(leg, event, out)
            }
            StreamRoute::Chat | StreamRoute::Completions => {
                match self.choices.iter().position(|choice| choice.leg == Some(leg)) {
                    Some(choice) => self.push_continued(choice, event, out),
                    None => Progress::LegDone,
                }
            }
            _ if self.own == Some(leg) => self.pass(event, out),
            _ => Progress::LegDone,
        };
        if matches!(progress, Progress::Failed(_)) {
            self.drop_leg(leg);
        }
        progress
    }

    /// The leg's connection is over, or it was refused. For [`StreamRoute::Other`], whose end
    /// nothing marks, this is the end of a stream that had events: whether the body was whole is
    /// the caller's to know.
    pub fn leg_ended(&mut self, leg: LegId, _out: &mut Vec<Out>) -> Progress {
        if self.done {
            return Progress::Done;
        }
        if !self.drop_leg(leg) {
            return Progress::LegDone;
        }
        if self.plan.route == StreamRoute::Other && self.delivered {
            self.done = true;
            return Progress::Done;
        }
        Progress::Failed(Failure::Truncated)
    }

    fn drop_leg(&mut self, leg: LegId) -> bool {
        if self.own == Some(leg) {
            self.own = None;
            self.set_back(None);
            return true;
        }
        let Some(at) = self.choices.iter().position(|choice| choice.leg == Some(leg)) else { return false };
        self.choices[at].leg = None;
        self.set_back(Some(at));
        true
    }

    /// The state of a choice; `None` if the request has no such one.
    pub(super) fn choice(&mut self, index: u32) -> Option<&mut Choice> {
        let index = (index < self.plan.choices.min(MAX_STATES)).then_some(index as usize)?;
        if self.choices.len() <= index {
            self.choices.resize_with(index + 1, Choice::default);
        }
        self.choices.get_mut(index)
    }

    /// Which of the request's prompts a choice belongs to.
    pub(super) fn prompt_of(&self, choice: usize) -> usize {
        let choices_each = (self.plan.choices / self.plan.prompts.max(1)).max(1);
        choice / choices_each as usize
    }

    pub(super) fn put_prompt(&mut self, prompt: usize, ids: Vec<u32>) {
        if prompt < MAX_STATES as usize {
            if self.prompts.len() <= prompt {
                self.prompts.resize(prompt + 1, None);
            }
            self.prompts[prompt] = Some(ids.into());
        }
    }

    /// Whether every choice the client asked for has its end.
    pub(super) fn all_finished(&self) -> bool {
        let enough = match self.plan.continues() {
            true => self.choices.len() == self.plan.choices as usize,
            false => !self.choices.is_empty(),
        };
        enough && self.choices.iter().all(|choice| choice.finished)
    }

    pub(super) fn break_off(&mut self, why: u8) {
        if self.broken.is_none() {
            self.broken = Some(why);
            self.unwritten.broken = true;
            self.unwritten.any = true;
        }
    }

    /// Counts ids that were added to a choice. With too many, none are kept any more.
    pub(super) fn count_kept(&mut self, added: usize) {
        self.kept += added;
        if self.kept > self.plan.options.max_kept_tokens {
            self.break_off(TOO_MANY);
        }
    }

    pub(super) fn write_version(&mut self, entry: &mut Vec<u8>) {
        if !self.unwritten.versioned {
            self.unwritten.versioned = true;
            entry.push(journal::VERSION);
        }
    }

    /// Writes down what is not written, of the stream and of a choice.
    fn write(&mut self, choice: Option<u32>, entry: &mut Vec<u8>) {
        let begin = entry.len();
        entry.extend((!self.unwritten.versioned).then_some(journal::VERSION));
        let from = entry.len();
        if self.unwritten.any {
            let versioned = self.unwritten.versioned;
            let all_written = Unwritten { versioned, ..Unwritten::default() };
            let unwritten = std::mem::replace(&mut self.unwritten, all_written);
            if unwritten.head
                && let Some(head) = &self.head
            {
                Op::Head(&head.id, &head.created, &head.model, head.sglang).write(entry);
            }
            if unwritten.prompts {
                for (at, ids) in self.prompts.iter().enumerate() {
                    if let Some(ids) = ids {
                        Op::Prompt(at as u32, ids.to_vec()).write(entry);
                    }
                }
            }
            if unwritten.fingerprint
                && let Some(value) = &self.fingerprint
            {
                Op::Fingerprint(value).write(entry);
            }
            if unwritten.prompt_tokens
                && let Some(tokens) = self.prompt_tokens
            {
                Op::PromptTokens(tokens, self.cached_tokens.map_or(0, |cached| cached + 1)).write(entry);
            }
            if unwritten.setbacks {
                Op::Setbacks(self.setbacks).write(entry);
            }
            if unwritten.broken
                && let Some(why) = self.broken
            {
                Op::Broken(why).write(entry);
            }
        }
        if let Some(index) = choice {
            let offsets = self.plan.logprobs && !self.chat;
            self.choices[index as usize].journal(index, offsets, entry);
        }
        match entry.len() == from {
            true => entry.truncate(begin),
            false => self.unwritten.versioned = true,
        }
    }

    /// Hands out an event that is about a choice, or about none.
    pub(super) fn emit(&mut self, choice: Option<u32>, mut line: Vec<u8>, out: &mut Vec<Out>) {
        let length = line.len();
        self.write(choice, &mut line);
        let (lines, journal) = render::split(line, length);
        self.hand(choice, lines, journal, out);
    }

    /// Hands out an event as it came.
    pub(super) fn emit_lines(&mut self, choice: Option<u32>, lines: Bytes, out: &mut Vec<Out>) {
        let mut journal = Vec::new();
        self.write(choice, &mut journal);
        self.hand(choice, lines, journal.into(), out);
    }

    fn hand(&mut self, choice: Option<u32>, lines: Bytes, journal: Bytes, out: &mut Vec<Out>) {
        let choice = choice.map(|index| &mut self.choices[index as usize]);
        let forget = self.broken == Some(TOO_MANY);
        let tokens = choice.map_or(0, |choice| {
            let tokens = choice.tell();
            if forget {
                choice.forget_ids();
            }
            tokens
        });
        self.delivered = true;
        out.push(Out { lines, journal, terminal: false, tokens });
    }

    /// Hands out what waits for the fingerprint.
    pub(super) fn flush_last(&mut self, out: &mut Vec<Out>) {
        if let Some((choice, mut line)) = self.last.take() {
            if let Some(value) = &self.fingerprint {
                // The line ends with the closing brace and LF.
                line.truncate(line.len() - 2);
                line.extend_from_slice(b",\"system_fingerprint\":");
                line.extend_from_slice(value);
                line.extend_from_slice(b"}\n");
            }
            self.emit(Some(choice), line, out);
        }
    }

    /// Hands out the end: usage if the client wants it and has not got it, and the terminal event.
    pub(super) fn finish(&mut self, out: &mut Vec<Out>) {
        self.flush_last(out);
        if self.plan.usage
            && !self.usage_sent
            && self.plan.continues()
            && let Some(head) = &self.head
        {
            let line = render::usage(head, self.chat, self.usage(), self.fingerprint.as_deref());
            self.emit_usage(line, out);
        }
        let mut line = b"data: [DONE]\n".to_vec();
        let length = line.len();
        self.write(None, &mut line);
        self.write_version(&mut line);
        Op::Done.write(&mut line);
        let (lines, journal) = render::split(line, length);
        self.done = true;
        self.delivered = true;
        out.push(Out { lines, journal, terminal: true, tokens: 0 });
    }

    pub(super) fn emit_usage(&mut self, mut line: Vec<u8>, out: &mut Vec<Out>) {
        let length = line.len();
        self.usage_sent = true;
        self.write(None, &mut line);
        self.write_version(&mut line);
        Op::UsageSent.write(&mut line);
        let (lines, journal) = render::split(line, length);
        self.hand(None, lines, journal, out);
    }

    /// What the client asked.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// Whether anything was handed out.
    pub fn delivered(&self) -> bool {
        self.delivered
    }

    /// Whether the terminal event was handed out.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// Tokens so far. Prompt tokens are zero until an engine has said them.
    pub fn usage(&self) -> Usage {
        let known = self.prompts.iter().flatten().map(|ids| ids.len() as u64).sum();
        Usage {
            prompt_tokens: self.prompt_tokens.unwrap_or(known),
            completion_tokens: self.choices.iter().map(Choice::total).sum(),
            cached_tokens: self.cached_tokens,
        }
    }

    /// Tokens generated so far, over all choices and attempts.
    pub fn generated_tokens(&self) -> u64 {
        self.usage().completion_tokens
    }

    /// The (first) prompt's token ids, once an engine has said them.
    pub fn prompt_ids(&self) -> &[u32] {
        self.prompts.first().and_then(Option::as_deref).unwrap_or_default()
    }

    /// Token ids generated so far for the first choice; empty if there are more than are kept.
    pub fn first_choice_ids(&self) -> &[u32] {
        match self.choices.first() {
            Some(choice) if choice.uncounted == 0 => &choice.ids,
            _ => &[],
        }
    }
}

/// Most choices whose state is kept, whatever the request says.
const MAX_STATES: u32 = 4096;
