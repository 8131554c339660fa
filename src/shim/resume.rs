//! From the bytes of a body to whole events, over all the connections that a stream takes; and how
//! long it is tried to go on. Pure: bytes and times are handed in.
//!
//! What is handed on ends between two events, always, so that a connection may break anywhere and
//! the next one goes on behind the last whole event.
//!
//! **Invariant:** of the events of a stream, what was handed on is a prefix. One that was handed on
//! already is dropped, one that is missing is a [`Fault`], and nothing behind it is handed on.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use memchr::memchr;

/// Largest event held back until it is whole: what a replica keeps of a whole stream.
pub(super) const MAX_EVENT_BYTES: usize = 8 << 20;

/// What a route speaks: which events close its streams, and what its errors look like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Dialect {
    /// `/v1/chat/completions` and `/v1/completions`.
    OpenAi,
    /// `/v1/responses`.
    Responses,
    /// `/v1/messages`.
    Anthropic,
}

impl Dialect {
    /// Whether an event of this name closes a stream. `data: [DONE]` does everywhere.
    fn closes(self, name: &str) -> bool {
        match self {
            Dialect::OpenAi => false,
            Dialect::Responses => {
                matches!(name, "response.completed" | "response.incomplete" | "response.failed" | "error")
            }
            Dialect::Anthropic => matches!(name, "message_stop" | "error"),
        }
    }
}

/// What is wrong with a connection. Everything before it was handed on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum Fault {
    /// Not `<stream>.<number>`.
    #[error("an event has the id {0:?}, which is none of Everline's")]
    StrangeId(String),
    /// The id is of another stream.
    #[error("an event of {0} came in another stream")]
    ForeignEvent(String),
    /// Events are missing.
    #[error("event {came} came where {expected} was expected")]
    Gap {
        /// The number that came.
        came: u64,
        /// The number that would have been next.
        expected: u64,
    },
    /// It would not end.
    #[error("an event is larger than {MAX_EVENT_BYTES} bytes")]
    TooLarge,
}

/// The last event that was handed on.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Last {
    id: String,
    number: u64,
}

/// The block that is being read: what of its lines matters.
#[derive(Default, Debug)]
struct Block {
    id: Option<String>,
    name: String,
    data: Vec<u8>,
    has_data: bool,
}

/// The events of one stream.
#[derive(Debug)]
pub(super) struct Events {
    dialect: Dialect,
    buffer: BytesMut,
    /// Where the first line begins that was not looked at yet.
    line: usize,
    /// How far was looked for the end of that line.
    scanned: usize,
    block: Block,
    stream: Option<String>,
    last: Option<Last>,
    count: u64,
    ended: bool,
    unnumbered: bool,
    fault: Option<Fault>,
}

impl Events {
    /// Those of a stream that has not begun.
    pub(super) fn new(dialect: Dialect) -> Self {
        Self {
            dialect,
            buffer: BytesMut::new(),
            line: 0,
            scanned: 0,
            block: Block::default(),
            stream: None,
            last: None,
            count: 0,
            ended: false,
            unnumbered: false,
            fault: None,
        }
    }

    /// Names the stream, as the head of the first answer does.
    pub(super) fn belong_to(&mut self, stream: &str) {
        self.stream = Some(stream.to_owned());
    }

    /// The stream's id, when it is known.
    pub(super) fn stream(&self) -> Option<&str> {
        self.stream.as_deref()
    }

    /// The id of the last event that was handed on, which is where the next connection goes on.
    pub(super) fn last_event_id(&self) -> Option<&str> {
        self.last.as_ref().map(|last| last.id.as_str())
    }

    /// The number that the next event has.
    pub(super) fn next_number(&self) -> u64 {
        self.last.as_ref().map_or(0, |last| last.number + 1)
    }

    /// How many events were handed on.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    /// Whether the event that closes the stream was handed on.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Whether an event without a number was handed on: nobody can say where to go on.
    pub(super) fn unnumbered(&self) -> bool {
        self.unnumbered
    }

    /// What is wrong with this connection.
    pub(super) fn fault(&self) -> Option<&Fault> {
        self.fault.as_ref()
    }

    /// Forgets the unfinished event of a connection that broke.
    pub(super) fn reconnected(&mut self) {
        self.buffer.clear();
        (self.line, self.scanned) = (0, 0);
        self.block = Block::default();
        self.fault = None;
    }

    /// Takes what was read and returns what may be handed on.
    pub(super) fn feed(&mut self, chunk: &[u8]) -> Bytes {
        if self.fault.is_some() {
            return Bytes::new();
        }
        self.buffer.extend_from_slice(chunk);
        let mut block = 0;
        // Ranges to hand on; one, unless something between was dropped.
        let mut kept: Vec<(usize, usize)> = Vec::new();
        let mut keep = |from: usize, to: usize| match kept.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => kept.push((from, to)),
        };
        while self.fault.is_none() {
            let from = self.line.max(self.scanned);
            let Some(found) = memchr(b'\n', &self.buffer[from..]) else {
                self.scanned = self.buffer.len();
                break;
            };
            let (start, end) = (self.line, from + found);
            self.line = end + 1;
            let line = without_returns(&self.buffer[start..end]);
            let is_first = start == block;
            if line.is_empty() {
                // A blank line that closes nothing is dropped: it would make some clients parse
                // an event without data.
                let whole = std::mem::take(&mut self.block);
                if !is_first && self.take_event(whole) {
                    keep(block, self.line);
                }
                block = self.line;
            } else if is_first && line[0] == b':' {
                // A heartbeat or a note between two events.
                keep(block, self.line);
                block = self.line;
            } else {
                self.block.field(line);
            }
        }
        let rest = self.buffer.split_off(block);
        let done = std::mem::replace(&mut self.buffer, rest).freeze();
        self.line -= block;
        self.scanned = self.scanned.saturating_sub(block);
        if self.buffer.len() > MAX_EVENT_BYTES && self.fault.is_none() {
            self.fault = Some(Fault::TooLarge);
        }
        match kept.as_slice() {
            [] => Bytes::new(),
            [(from, to)] => done.slice(from..to),
            several => several.iter().flat_map(|&(from, to)| done[from..to].iter().copied()).collect(),
        }
    }

    /// Whether the event that just became whole is to be handed on.
    fn take_event(&mut self, block: Block) -> bool {
        match &block.id {
            None => self.unnumbered |= block.has_data,
            Some(id) => match self.number_of(id) {
                Ok(number) if number == self.next_number() => {
                    self.last = Some(Last { id: id.clone(), number });
                }
                Ok(_) => return false,
                Err(fault) => {
                    self.fault = Some(fault);
                    return false;
                }
            },
        }
        self.count += 1;
        self.ended |= block.is_closing(self.dialect);
        true
    }

    /// The number in an id of this stream; one beyond the next is a fault.
    fn number_of(&mut self, id: &str) -> Result<u64, Fault> {
        let parts = id.split_once('.').filter(|(stream, _)| !stream.is_empty());
        // Behind the number may be which attempt said it.
        let parts = parts.and_then(|(stream, rest)| {
            let (number, attempt) = rest.split_once('.').unwrap_or((rest, "1"));
            attempt.parse::<u32>().ok()?;
            Some((stream, number.parse::<u64>().ok()?))
        });
        let Some((stream, came)) = parts else { return Err(Fault::StrangeId(id.to_owned())) };
        if self.stream.get_or_insert_with(|| stream.to_owned()) != stream {
            return Err(Fault::ForeignEvent(stream.to_owned()));
        }
        let expected = self.next_number();
        if came > expected { Err(Fault::Gap { came, expected }) } else { Ok(came) }
    }
}

impl Block {
    fn field(&mut self, line: &[u8]) {
        let colon = memchr(b':', line).unwrap_or(line.len());
        let value = line.get(colon + 1..).unwrap_or_default();
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match &line[..colon] {
            b"data" => {
                if self.has_data {
                    self.data.push(b'\n');
                }
                self.data.extend_from_slice(value);
                self.has_data = true;
            }
            b"id" => self.id = Some(String::from_utf8_lossy(value).into_owned()),
            b"event" => self.name = String::from_utf8_lossy(value).into_owned(),
            _ => {}
        }
    }

    fn is_closing(&self, dialect: Dialect) -> bool {
        #[derive(serde::Deserialize)]
        struct Typed<'a> {
            #[serde(borrow, rename = "type")]
            kind: std::borrow::Cow<'a, str>,
        }
        if self.data.trim_ascii() == b"[DONE]" {
            return true;
        }
        if dialect == Dialect::OpenAi {
            return false;
        }
        if !self.name.is_empty() {
            return dialect.closes(&self.name);
        }
        serde_json::from_slice::<Typed<'_>>(&self.data).is_ok_and(|typed| dialect.closes(&typed.kind))
    }
}

fn without_returns(mut line: &[u8]) -> &[u8] {
    while let [before @ .., b'\r'] = line {
        line = before;
    }
    line
}

/// How long it has been tried to reach somebody, and how long to wait before the next attempt.
#[derive(Debug)]
pub(super) struct Patience {
    budget: Duration,
    attempt: u32,
    /// Of the budget.
    spent: Duration,
    /// Since when nothing has come.
    since: Option<Instant>,
}

/// Pause before the third attempt; doubled for each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// Longest pause: short enough that a cluster that is back is found at once.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

impl Patience {
    /// Nothing has failed yet.
    pub(super) fn new(budget: Duration) -> Self {
        Self { budget, attempt: 0, spent: Duration::ZERO, since: None }
    }

    /// Bytes came: the outage is over for now.
    pub(super) fn heard(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.spent += now.saturating_duration_since(since);
        }
    }

    /// An event came: everything before is forgotten.
    pub(super) fn progressed(&mut self) {
        *self = Self::new(self.budget);
    }

    /// Something failed: how long to wait, the first time not at all; none if it is enough.
    /// `jitter` is a random number from 0 to 1.
    pub(super) fn next_pause(&mut self, now: Instant, jitter: f64) -> Option<Duration> {
        let since = *self.since.get_or_insert(now);
        let gone = self.spent + now.saturating_duration_since(since);
        let left = self.budget.checked_sub(gone).filter(|left| !left.is_zero())?;
        self.attempt += 1;
        if self.attempt == 1 {
            return Some(Duration::ZERO);
        }
        let doubled = BACKOFF_MIN.saturating_mul(1 << (self.attempt - 2).min(16)).min(BACKOFF_MAX);
        Some(doubled.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0).min(left))
    }
}

#[cfg(test)]
mod tests;
