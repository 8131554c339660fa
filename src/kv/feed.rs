//! What comes next in one rank's feed: in order, missing, said twice, or from an engine that has
//! begun anew.
//!
//! A state machine without clock or sockets. In go messages, the answers to replays, and word of
//! the connection; out come [`Action`]s. Its position is two numbers, the last sequence number that
//! was applied and a fingerprint of that message, and it can be started from them anywhere: that
//! is how a feed moves to another replica.
//!
//! ```text
//!            connected, gap, number went back, quiet
//!   Live ────────────────────────────────────────────▶ Replaying, from the last message applied
//!    ▲                                                   │ first answer is that message ─▶ goes on behind it
//!    │ end marker, nothing missing                       │ the same number, another print ┐ the engine began
//!    │                                                   │ no answer at all               ┘ anew: clear, from 0
//!    └───────────────────────────────────────────────────┤ the first answer is a later one: clear, recovering
//!                                                        └ a hole, or no end: from the last again
//! ```
//!
//! **Why the last message is asked for again.** An engine that restarted starts counting at 0 and
//! says nothing about it. Nobody may have listened while it restarted, and it may since have
//! come as far as the old one, or further: its numbers alone look like a gap, or like nothing at all.
//! A batch carries the time it was made, so that its fingerprint tells the two apart.
//!
//! **Invariant:** between two [`Action::Clear`]s the numbers of [`Action::Apply`] go up by one.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::event::Decoded;
use super::types::KvOp;

/// Live messages that are kept while a replay runs. Beyond it [`Feed::has_room`] says no, and the
/// engine's own queue has to keep them.
pub const MOST_HELD: usize = 4096;

/// Bytes of such messages.
pub const MOST_HELD_BYTES: usize = 16 << 20;

/// Replays in a row without an end or anything new, before the feed goes on without.
pub const MOST_FAILURES: u32 = 4;

/// Replays in a row that leave the same hole, before it is taken for one that nobody can fill.
const MOST_FRUITLESS: u32 = 2;

/// How far a rank's feed was applied. Whoever continues the feed starts from here.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Cursor {
    /// Number and fingerprint of the last message applied since the rank was last void.
    pub last: Option<(u64, u64)>,
    /// How many blocks still have to be stored until what is known of the rank counts as whole:
    /// 0 for a whole one, [`Cursor::UNKNOWN`] if only a clear by the engine can say so.
    pub owing: u64,
}

impl Cursor {
    /// For [`Cursor::owing`]: there is no telling.
    pub const UNKNOWN: u64 = u64::MAX;

    /// Whether the rank's blocks are known only in part.
    pub fn recovering(&self) -> bool {
        self.owing > 0
    }

    /// After a clear: nothing is known, which is all there is if `whole`; or else `capacity`
    /// blocks have to be stored before what was there before must be gone.
    pub fn cleared(whole: bool, capacity: Option<u64>) -> Self {
        let owing = if whole { 0 } else { capacity.unwrap_or(Self::UNKNOWN).max(1) };
        Self { last: None, owing }
    }

    /// After a message was applied.
    #[must_use]
    pub fn after(self, seq: u64, print: u64, decoded: &Decoded) -> Self {
        let owing = match self.owing {
            _ if decoded.ops.contains(&KvOp::Clear) => 0,
            Self::UNKNOWN => Self::UNKNOWN,
            owing => owing.saturating_sub(decoded.stored),
        };
        Self { last: Some((seq, print)), owing }
    }
}

/// One message of a feed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message<B> {
    /// Its number.
    pub seq: u64,
    /// Fingerprint of its content.
    pub print: u64,
    /// What it takes to keep it, in bytes.
    pub size: usize,
    /// Its content.
    pub body: B,
}

/// What is to be done, in this order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action<B> {
    /// The next message.
    Apply(Message<B>),
    /// All that was applied is void. `whole` if the engine has begun anew and will be told from
    /// its beginning; otherwise blocks exist that nobody told of.
    Clear {
        /// Whether nothing is missing.
        whole: bool,
    },
    /// Ask the engine for its messages from this number on. Earlier questions are void.
    Replay {
        /// The first one wanted.
        from: u64,
    },
}

/// What happened to a feed, for metrics.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FeedStats {
    /// Messages applied.
    pub applied: u64,
    /// Messages that were known already.
    pub duplicates: u64,
    /// Times numbers were missing.
    pub gaps: u64,
    /// Times the engine had begun anew.
    pub restarts: u64,
    /// Times messages were lost for good.
    pub losses: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Replays that broke off or never ended.
    pub failed_replays: u64,
    /// Live messages that belong to no run of the engine that it still knows of, or for which
    /// there was no room.
    pub strays: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Not connected.
    Away,
    /// Taking live messages. `joining`: the next is the first since connecting, and no replay
    /// could tell whether it continues what was applied.
    Live { joining: bool },
    /// Waiting for the answers of a replay.
    Replaying {
        /// The first answer must be the last message applied.
        verify: bool,
        /// An answer was of use.
        any: bool,
    },
}

/// The state machine of one rank's feed.
#[derive(Debug)]
pub struct Feed<B> {
    last: Option<(u64, u64)>,
    phase: Phase,
    /// Whether the engine has a replay socket.
    can_replay: bool,
    /// Whether it is worth asking; false after it failed too often, until the next connection.
    replays: bool,
    held: VecDeque<Message<B>>,
    held_bytes: usize,
    /// Number of the last live message since the connection was made.
    high: Option<u64>,
    failures: u32,
    fruitless: u32,
    stats: FeedStats,
}

impl<B> Feed<B> {
    /// Continues from `cursor`. `can_replay`: the engine has a replay socket.
    pub fn new(cursor: Cursor, can_replay: bool) -> Self {
        Self {
            last: cursor.last,
            phase: Phase::Away,
            can_replay,
            replays: can_replay,
            held: VecDeque::new(),
            held_bytes: 0,
            high: None,
            failures: 0,
            fruitless: 0,
            stats: FeedStats::default(),
        }
    }

    /// What happened so far.
    pub fn stats(&self) -> FeedStats {
        self.stats
    }

    /// Whether another live message can be taken in now.
    pub fn has_room(&self) -> bool {
        self.held.len() < MOST_HELD && self.held_bytes < MOST_HELD_BYTES
    }

    /// Whether answers of a replay are awaited.
    pub fn is_replaying(&self) -> bool {
        matches!(self.phase, Phase::Replaying { .. })
    }

    /// The subscription stands; live messages from now on are of this connection.
    pub fn connected(&mut self, out: &mut Vec<Action<B>>) {
        self.away();
        self.replays = self.can_replay;
        self.check(out);
    }

    /// The connection is gone. An engine may begin anew before the next one.
    pub fn away(&mut self) {
        self.held.clear();
        self.held_bytes = 0;
        self.high = None;
        self.failures = 0;
        self.fruitless = 0;
        self.phase = Phase::Away;
    }

    /// Somebody else has continued the feed; goes on behind that.
    pub fn moved(&mut self, cursor: Cursor, out: &mut Vec<Action<B>>) {
        self.last = cursor.last;
        if self.phase == Phase::Away {
            return;
        }
        self.high = None;
        if self.replays {
            self.ask(out);
        } else {
            // The connection is the same: what comes with a lower number is what they had already.
            self.phase = Phase::Live { joining: false };
            self.drain(out);
        }
    }

    /// Nothing has come for a while. Whether nothing was said, a replay can tell: the last
    /// message of a burst is the one whose loss nobody notices.
    pub fn quiet(&mut self, out: &mut Vec<Action<B>>) {
        if self.can_replay && matches!(self.phase, Phase::Live { .. }) {
            self.replays = true;
            self.check(out);
        }
    }

    /// A live message.
    pub fn live(&mut self, message: Message<B>, out: &mut Vec<Action<B>>) {
        match self.phase {
            Phase::Away => self.stats.strays += 1,
            Phase::Replaying { .. } if self.has_room() => self.hold(message),
            // Who does not ask for room first makes a gap, which heals.
            Phase::Replaying { .. } => self.stats.strays += 1,
            Phase::Live { joining } => self.take(message, joining, out),
        }
    }

    /// An answer of the replay that was asked for last.
    pub fn replayed(&mut self, message: Message<B>, out: &mut Vec<Action<B>>) {
        let Phase::Replaying { verify, any } = self.phase else { return };
        if let (true, Some((seq, print))) = (verify, self.last) {
            if message.seq < seq {
                return;
            }
            if message.seq > seq {
                self.lose(out);
            } else if message.print == print {
                self.phase = Phase::Replaying { verify: false, any: true };
                return;
            } else {
                self.restart(out);
                if seq > 0 {
                    return self.ask(out);
                }
            }
            self.phase = Phase::Replaying { verify: false, any: true };
            return self.apply(message, out);
        }
        let expected = self.expected();
        if message.seq < expected {
            return;
        }
        if message.seq > expected {
            if any && self.fruitless < MOST_FRUITLESS {
                // Dropped on the way; what is behind the hole is asked for with it.
                self.fruitless += 1;
                return self.ask(out);
            }
            self.lose(out);
        }
        self.phase = Phase::Replaying { verify: false, any: true };
        self.apply(message, out);
    }

    /// The end marker of the replay that was asked for last.
    pub fn replay_ended(&mut self, out: &mut Vec<Action<B>>) {
        let Phase::Replaying { verify, .. } = self.phase else { return };
        self.failures = 0;
        if verify {
            // The engine keeps at least its last message: it is not the one that sent ours.
            self.restart(out);
            return self.ask(out);
        }
        self.phase = Phase::Live { joining: false };
        self.drain(out);
    }

    /// The replay that was asked for last broke off, or its end did not come.
    pub fn replay_failed(&mut self, out: &mut Vec<Action<B>>) {
        if !self.is_replaying() {
            return;
        }
        self.stats.failed_replays += 1;
        self.failures += 1;
        if self.failures < MOST_FAILURES {
            return self.ask(out);
        }
        self.failures = 0;
        self.replays = false;
        self.phase = Phase::Live { joining: true };
        self.drain(out);
    }

    fn expected(&self) -> u64 {
        self.last.map_or(0, |(seq, _)| seq.saturating_add(1))
    }

    /// Makes sure that what was applied is of this engine, and gets what is missing.
    fn check(&mut self, out: &mut Vec<Action<B>>) {
        if self.replays {
            self.ask(out);
        } else {
            self.phase = Phase::Live { joining: true };
        }
    }

    fn ask(&mut self, out: &mut Vec<Action<B>>) {
        self.stats.replays += 1;
        self.phase = Phase::Replaying { verify: self.last.is_some(), any: false };
        out.push(Action::Replay { from: self.last.map_or(0, |(seq, _)| seq) });
    }

    fn hold(&mut self, message: Message<B>) {
        self.held_bytes += message.size;
        self.held.push_back(message);
    }

    /// Takes in what came during the replay.
    fn drain(&mut self, out: &mut Vec<Action<B>>) {
        while let Phase::Live { joining } = self.phase {
            let Some(message) = self.held.pop_front() else { return };
            self.held_bytes -= message.size;
            if self.replays && message.seq > self.expected() {
                // It came before the replay ended, so the replay should have led up to it.
                self.fruitless += 1;
                if self.fruitless > MOST_FRUITLESS {
                    self.stats.strays += 1;
                    continue;
                }
            }
            self.take(message, joining, out);
        }
    }

    fn take(&mut self, message: Message<B>, joining: bool, out: &mut Vec<Action<B>>) {
        let (seq, expected) = (message.seq, self.expected());
        let backwards = self.high.is_some_and(|high| seq <= high);
        // That the numbers fit proves nothing if nobody vouches for the engine being the same.
        let vouched = !joining || !self.can_replay || self.last.is_none();
        if seq == expected && vouched {
            // In order.
        } else if self.replays && (seq >= expected || backwards) {
            self.stats.gaps += u64::from(seq > expected);
            self.high = None;
            self.held_bytes += message.size;
            self.held.push_front(message);
            return self.ask(out);
        } else if self.last == Some((seq, message.print)) || (seq < expected && !backwards && !joining) {
            // A replay brought it already.
            self.stats.duplicates += 1;
            self.high = Some(seq);
            return;
        } else if seq == 0 {
            self.restart(out);
        } else {
            self.stats.gaps += u64::from(seq > expected);
            self.lose(out);
        }
        self.high = Some(seq);
        self.phase = Phase::Live { joining: false };
        self.apply(message, out);
    }

    fn apply(&mut self, message: Message<B>, out: &mut Vec<Action<B>>) {
        self.last = Some((message.seq, message.print));
        self.failures = 0;
        self.fruitless = 0;
        self.stats.applied += 1;
        out.push(Action::Apply(message));
    }

    fn restart(&mut self, out: &mut Vec<Action<B>>) {
        self.stats.restarts += 1;
        self.last = None;
        out.push(Action::Clear { whole: true });
    }

    fn lose(&mut self, out: &mut Vec<Action<B>>) {
        self.stats.losses += 1;
        self.last = None;
        out.push(Action::Clear { whole: false });
    }
}

#[cfg(test)]
mod tests;
