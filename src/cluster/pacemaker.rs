//! Heartbeats for both groups in one wake-up, and openraft's own ticking only when it is needed.
//!
//! openraft ticks at 13/64 of the heartbeat interval, per group: some eighty wake-ups a second
//! on a replica with nothing to do, and most of its idle work. A tick does two things: a leader
//! sends heartbeats when they are due, a follower looks whether it is time for an election. The
//! first is done here, for both groups at once. The second cannot be due while the leader is
//! heard: an election needs `election_timeout_max` and then a random timeout of silence, at the
//! defaults 450 ms at least. So a follower's ticks are off while the last append is younger than
//! two heartbeats, and on from then on, well before they could matter.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::machine::Raft;
use crate::ids::Group;

/// When each group last took an append (heartbeats included). Cheap to clone.
#[derive(Clone)]
pub struct Heard {
    since: Instant,
    at_ms: Arc<[AtomicU64; 2]>,
}

/// Before the first append.
const NEVER: u64 = u64::MAX;

impl Default for Heard {
    fn default() -> Self {
        Self { since: Instant::now(), at_ms: Arc::new([AtomicU64::new(NEVER), AtomicU64::new(NEVER)]) }
    }
}

impl Heard {
    fn now_ms(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    /// An append was taken.
    pub fn note(&self, group: Group) {
        self.at_ms[group.index()].store(self.now_ms(), Ordering::Relaxed);
    }

    /// How long ago the last append was taken; `None` before the first. openraft names a leader
    /// until it knows another, however long that one has been dead; this tells.
    pub fn age(&self, group: Group) -> Option<Duration> {
        match self.at_ms[group.index()].load(Ordering::Relaxed) {
            NEVER => None,
            at_ms => Some(Duration::from_millis(self.now_ms().saturating_sub(at_ms))),
        }
    }
}

/// Beats until a group stops.
pub async fn run(rafts: [Raft; 2], heard: Heard, heartbeat: Duration) {
    let mut period = tokio::time::interval(heartbeat);
    // After a stall one beat, not all that were missed.
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut ticking = [true; 2];
    loop {
        period.tick().await;
        for (raft, group) in rafts.iter().zip(Group::ALL) {
            let leads = raft.is_leader();
            if leads && raft.trigger().heartbeat().await.is_err() {
                return;
            }
            let needed = !leads && heard.age(group).is_none_or(|age| age >= heartbeat * 2);
            if needed != ticking[group.index()] {
                raft.runtime_config().tick(needed);
                ticking[group.index()] = needed;
            }
        }
    }
}
