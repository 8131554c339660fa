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

use super::types::Raft;

/// When each group last took an append (heartbeats included). Cheap to clone.
#[derive(Clone)]
pub struct Heard {
    since: Instant,
    at_ms: Arc<[AtomicU64; 2]>,
}

impl Default for Heard {
    fn default() -> Self {
        Self { since: Instant::now(), at_ms: Arc::default() }
    }
}

impl Heard {
    fn now_ms(&self) -> u64 {
        self.since.elapsed().as_millis() as u64
    }

    /// An append was taken.
    pub fn note(&self, group: crate::ids::Group) {
        self.at_ms[group.index()].store(self.now_ms(), Ordering::Relaxed);
    }

    fn age(&self, group: usize) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.at_ms[group].load(Ordering::Relaxed)))
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
        for (group, raft) in rafts.iter().enumerate() {
            let leads = raft.is_leader();
            if leads && raft.trigger().heartbeat().await.is_err() {
                return;
            }
            let needed = !leads && heard.age(group) >= heartbeat * 2;
            if needed != ticking[group] {
                raft.runtime_config().tick(needed);
                ticking[group] = needed;
            }
        }
    }
}
