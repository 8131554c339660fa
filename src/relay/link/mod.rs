//! Links between processes: one bidirectional gRPC stream for each direction of a pair, on it a
//! channel for each stream, with a window of its own.

pub mod caller;
pub mod feeder;
pub mod outbox;
pub mod server;
mod signs;

use bytes::Bytes;

use super::attempts::Had;
use super::line::{Line, Turn};
use super::log::Event;
use crate::state::streams::StreamEnd;

/// The generated protocol.
#[allow(missing_docs, unreachable_pub, clippy::all)]
pub mod proto {
    tonic::include_proto!("everline.relay.v1");
}

/// Bytes of events that may be on their way in one channel.
pub const WINDOW: usize = 256 << 10;
/// Largest message: a request's body and what was generated so far.
pub const MAX_MESSAGE: usize = 64 << 20;
/// After what silence a sign of life is sent.
pub const PING_EVERY: std::time::Duration = std::time::Duration::from_millis(250);

/// Metadata: the cluster's id.
pub const CLUSTER: &str = "everline-cluster";

/// How a stream is cancelled that others may listen to.
const UNLESS_WATCHED: u32 = 2;

/// Why a stream cannot be had from somebody.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Why {
    /// There is no such stream.
    NoSuchStream = 1,
    /// What is asked for was forgotten.
    Behind = 2,
    /// It takes no more, or is leaving.
    Busy = 3,
    /// It does not understand.
    NotUnderstood = 4,
    /// Somebody else has taken the stream over.
    Overtaken = 5,
}

impl Why {
    fn from_wire(number: u32) -> Self {
        match number {
            1 => Why::NoSuchStream,
            2 => Why::Behind,
            3 => Why::Busy,
            5 => Why::Overtaken,
            _ => Why::NotUnderstood,
        }
    }
}

/// How a stream has ended, in a number.
fn end_to_wire(ended: Option<StreamEnd>) -> u32 {
    match ended {
        None => 0,
        Some(StreamEnd::Complete) => 1,
        Some(StreamEnd::Cancelled) => 2,
        Some(StreamEnd::Failed) => 3,
    }
}

/// The same, read. A number of a later version is an end, and none of the good ones.
pub(super) fn end_from_wire(ended: u32) -> Option<StreamEnd> {
    match ended {
        0 => None,
        1 => Some(StreamEnd::Complete),
        2 => Some(StreamEnd::Cancelled),
        _ => Some(StreamEnd::Failed),
    }
}

fn frame(channel: u64, what: proto::frame::What) -> proto::Frame {
    proto::Frame { channel, what: Some(what) }
}

fn to_wire(event: Event) -> proto::Event {
    proto::Event { lines: event.lines, journal: event.journal, terminal: event.terminal }
}

fn from_wire(event: proto::Event) -> Event {
    Event { lines: event.lines, journal: event.journal, terminal: event.terminal }
}

fn line_to_wire(line: &Line) -> proto::Line {
    let turns = line.turns().iter();
    let turns = turns.map(|turn| proto::Turn { attempt: turn.attempt, base: turn.base }).collect();
    proto::Line { turns, idle: line.idle() }
}

/// No line is that of the first attempt; `None` is what nobody writes.
pub(super) fn line_from_wire(line: Option<proto::Line>) -> Option<Line> {
    let line = line.unwrap_or_default();
    let turns = line.turns.into_iter().map(|turn| Turn { attempt: turn.attempt, base: turn.base });
    Line::of(turns.collect(), line.idle)
}

/// What one process gives another to go on from.
#[derive(Debug, Default)]
pub struct Past {
    /// The answer's head, encoded; empty while there is none.
    pub head: Bytes,
    /// The events.
    pub had: Had,
}

impl Past {
    fn into_wire(self, attempt: u32) -> proto::Past {
        let Had { first, journal, events, line } = self.had;
        let events = events.into_iter().map(to_wire).collect();
        let line = Some(line_to_wire(&line));
        let events = Some(proto::Events { first, events, attempt, line });
        proto::Past { head: self.head, first, journal, events }
    }

    /// `None` of what nobody writes.
    fn from_wire(past: proto::Past) -> Option<Self> {
        let said = past.events.unwrap_or_default();
        let line = line_from_wire(said.line)?;
        let events = said.events.into_iter().map(from_wire).collect();
        let had = Had { first: past.first, journal: past.journal, events, line };
        Some(Self { head: past.head, had })
    }
}
