//! Where a prefill engine and a decode engine meet that were told the same number: SGLang's rooms, and
//! KsanaLLM's request ids.
//!
//! Either may come first. **Invariant:** of each room there is one decode engine at most; what comes after
//! the first is not heard.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::time::Instant;

/// What the decode engine is told in the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Told {
    /// The KV of each block.
    Kv {
        /// What it is worth.
        contents: Vec<u64>,
        /// How many ids were in the cache of the prefill engine.
        cached: usize,
    },
    /// It will not come.
    Gone,
}

#[derive(Default)]
struct Room {
    /// Requests of the prefill engine that have not begun.
    waiting: Vec<u64>,
    /// Whether the decode engine was there.
    joined: bool,
    asker: Option<oneshot::Sender<Told>>,
    /// What came before the decode engine did.
    ready: Option<Told>,
}

/// A request that nobody met in time.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Missed {
    pub(super) ticket: u64,
    pub(super) key: Arc<str>,
    pub(super) rid: String,
}

/// All rooms of a prefill engine. Bound: one for each request it has, and for each connection to it.
#[derive(Default)]
pub(super) struct Rooms {
    rooms: Mutex<HashMap<Arc<str>, Room>>,
    /// By deadline: all of them wait equally long.
    deadlines: Mutex<VecDeque<(Instant, Missed)>>,
}

impl Rooms {
    /// A request of the prefill engine waits for the decode engine, until `deadline`; true if that is there.
    pub(super) fn arrive(&self, key: &Arc<str>, ticket: u64, rid: &str, deadline: Instant) -> bool {
        let mut rooms = self.rooms.lock();
        let room = rooms.entry(Arc::clone(key)).or_default();
        if room.joined {
            return true;
        }
        room.waiting.push(ticket);
        let missed = Missed { ticket, key: Arc::clone(key), rid: rid.to_owned() };
        self.deadlines.lock().push_back((deadline, missed));
        false
    }

    /// The decode engine is there: what it will be told by, and the requests that may begin. `None` if one
    /// was there already.
    pub(super) fn ask(&self, key: &str) -> Option<(oneshot::Receiver<Told>, Vec<u64>)> {
        let mut rooms = self.rooms.lock();
        let room = rooms.entry(key.into()).or_default();
        if room.joined {
            return None;
        }
        room.joined = true;
        let (sender, receiver) = oneshot::channel();
        match room.ready.take() {
            // The receiver is here.
            Some(told) => drop(sender.send(told)),
            None => room.asker = Some(sender),
        }
        Some((receiver, std::mem::take(&mut room.waiting)))
    }

    /// What the decode engine is to be told; false if it is not there (any more).
    pub(super) fn ready(&self, key: &str, told: Told, keep: bool) -> bool {
        let mut rooms = self.rooms.lock();
        if let Some(asker) = rooms.get_mut(key).and_then(|room| room.asker.take()) {
            return asker.send(told).is_ok();
        }
        if keep {
            // The newest counts, where an id is there twice.
            rooms.entry(key.into()).or_default().ready = Some(told);
        }
        keep
    }

    /// Nobody is to meet there any more: the decode engine, if it is there, is told so. What has not begun
    /// is returned.
    pub(super) fn close(&self, key: &str) -> Vec<u64> {
        let Some(mut room) = self.rooms.lock().remove(key) else { return Vec::new() };
        if let Some(asker) = room.asker.take() {
            // It may have gone.
            let _ = asker.send(Told::Gone);
        }
        room.waiting
    }

    /// What has waited for too long; it is not waited for any more.
    pub(super) fn missed(&self, now: Instant) -> Vec<Missed> {
        let mut deadlines = self.deadlines.lock();
        let mut late = Vec::new();
        while deadlines.front().is_some_and(|(deadline, _)| *deadline <= now) {
            late.extend(deadlines.pop_front().map(|(_, missed)| missed));
        }
        drop(deadlines);
        let mut rooms = self.rooms.lock();
        late.retain(|missed| {
            let Some(room) = rooms.get_mut(&missed.key) else { return false };
            let before = room.waiting.len();
            room.waiting.retain(|ticket| *ticket != missed.ticket);
            let was_waiting = room.waiting.len() < before;
            if was_waiting && room.waiting.is_empty() && !room.joined {
                rooms.remove(&missed.key);
            }
            was_waiting
        });
        late
    }

    /// When to look again for what has waited for too long.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.lock().front().map(|(deadline, _)| *deadline)
    }
}

/// A number of seconds as Python writes `{:.1f}`.
pub(super) fn seconds(time: Duration) -> String {
    format!("{:.1}s", time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kv() -> Told {
        Told::Kv { contents: vec![1, 2], cached: 0 }
    }

    #[tokio::test]
    async fn whoever_comes_first_is_waited_for() {
        let rooms = Rooms::default();
        let later = Instant::now() + Duration::from_secs(60);
        let key: Arc<str> = "7".into();
        assert!(!rooms.arrive(&key, 1, "r", later));
        let (told, waiting) = rooms.ask("7").unwrap();
        assert_eq!(waiting, [1]);
        assert!(rooms.ready("7", kv(), false));
        assert_eq!(told.await.unwrap(), kv());
        // The other way round.
        let key: Arc<str> = "8".into();
        let (told, waiting) = rooms.ask("8").unwrap();
        assert!(waiting.is_empty() && rooms.arrive(&key, 2, "r", later));
        assert!(rooms.close("8").is_empty());
        assert_eq!(told.await.unwrap(), Told::Gone);
        // What is ready early is kept, where that is wanted.
        assert!(!rooms.ready("9", kv(), false) && rooms.ready("9", kv(), true));
        assert_eq!(rooms.ask("9").unwrap().0.await.unwrap(), kv());
    }

    #[tokio::test]
    async fn a_second_decode_engine_is_not_heard_and_a_room_can_be_used_again_once_it_is_closed() {
        let rooms = Rooms::default();
        let first = rooms.ask("7").unwrap();
        assert!(rooms.ask("7").is_none());
        drop(first);
        rooms.close("7");
        assert!(rooms.ask("7").is_some());
    }

    #[tokio::test]
    async fn what_nobody_meets_is_missed_once() {
        let rooms = Rooms::default();
        let now = Instant::now();
        let (key, other): (Arc<str>, Arc<str>) = ("7".into(), "8".into());
        rooms.arrive(&key, 1, "r", now);
        rooms.arrive(&other, 2, "s", now);
        let _asked = rooms.ask("8").unwrap();
        assert_eq!(rooms.next_deadline(), Some(now));
        let missed = rooms.missed(now);
        assert_eq!(missed, [Missed { ticket: 1, key, rid: "r".into() }]);
        assert!(rooms.missed(now).is_empty() && rooms.next_deadline().is_none());
        assert_eq!(rooms.rooms.lock().len(), 1);
    }
}
