//! What happened to streams since the start.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::telemetry::histogram::{FIRST_TOKEN, Histogram};

/// What became of a client that came back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resumed {
    /// It reads on.
    Ok,
    /// It has read all there is.
    Over,
    /// It names an event that there has not been.
    Ahead,
    /// What it wants was forgotten.
    Expired,
    /// The stream was lost.
    Lost,
    /// Too many clients listen.
    TooMany,
    /// There is no such stream, or it is somebody else's.
    NotFound,
    /// Nobody knows at the moment.
    Unavailable,
}

impl Resumed {
    /// All of them, in the order of their declaration.
    pub const ALL: [Resumed; 8] = [
        Resumed::Ok,
        Resumed::Over,
        Resumed::Ahead,
        Resumed::Expired,
        Resumed::Lost,
        Resumed::TooMany,
        Resumed::NotFound,
        Resumed::Unavailable,
    ];

    /// The name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Resumed::Ok => "ok",
            Resumed::Over => "over",
            Resumed::Ahead => "ahead",
            Resumed::Expired => "expired",
            Resumed::Lost => "lost",
            Resumed::TooMany => "too_many",
            Resumed::NotFound => "not_found",
            Resumed::Unavailable => "unavailable",
        }
    }
}

/// Counters; all only go up.
pub struct Counts {
    /// Streams begun here as holder.
    pub held: AtomicU64,
    /// Streams begun here for a client.
    pub opened: AtomicU64,
    /// Clients that came back to a stream, by what became of that.
    pub resumed: [AtomicU64; Resumed::ALL.len()],
    /// Streams that this process had somebody go on with.
    pub taken_over: AtomicU64,
    /// Streams that this process went on with: from another's attempt, or from a lost engine.
    pub continued: AtomicU64,
    /// Streams that ended because nobody could go on with them.
    pub lost: AtomicU64,
    /// Streams that were cancelled because no client came back.
    pub orphaned: AtomicU64,
    /// Streams that were cancelled by their client.
    pub cancelled: AtomicU64,
    /// Streams forgotten before their time, for want of memory.
    pub evicted: AtomicU64,
    /// From the loss of a holder to the order to the next.
    pub takeover_time: Histogram,
    /// From asking for a stream to having it.
    pub resume_time: Histogram,
    /// Longest pause of a client's events where another holder went on.
    pub holder_stall: Histogram,
    /// The same where the holder had another engine go on.
    pub worker_stall: Histogram,
    /// Links to other processes that were opened.
    pub links_opened: AtomicU64,
    /// Links that could not be.
    pub links_failed: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            held: AtomicU64::default(),
            opened: AtomicU64::default(),
            resumed: Default::default(),
            taken_over: AtomicU64::default(),
            continued: AtomicU64::default(),
            lost: AtomicU64::default(),
            orphaned: AtomicU64::default(),
            cancelled: AtomicU64::default(),
            evicted: AtomicU64::default(),
            takeover_time: Histogram::new(&FIRST_TOKEN),
            resume_time: Histogram::new(&FIRST_TOKEN),
            holder_stall: Histogram::new(&FIRST_TOKEN),
            worker_stall: Histogram::new(&FIRST_TOKEN),
            links_opened: AtomicU64::default(),
            links_failed: AtomicU64::default(),
        }
    }
}

impl Counts {
    /// A client came back.
    pub fn resumed(&self, became: Resumed) {
        Self::add(&self.resumed[became as usize]);
    }

    /// Adds one.
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
