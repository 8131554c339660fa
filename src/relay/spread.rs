//! That what is here is somewhere else, too: copies at other replicas die, and who reads the holder's
//! own copy, because there was no other at that moment, makes none. What has ended is wanted as well, by
//! clients that have not read so far.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Durability;
use super::hub::{Entry, ORDER_TIMEOUT, Relays};
use super::link::caller::Wanted;
use crate::ids::ReplicaId;

/// Most streams that another copy is made of at a time.
const AT_ONCE: usize = 256;

impl Relays {
    /// Has copies made of what is held here only, and, where a replica is down, of what has ended and may
    /// be here only. For streams that shall be at one process, and where there is nobody else, nothing is
    /// done.
    pub(super) fn spread(&self, entries: &[Arc<Entry>]) {
        let Some(this) = self.this.upgrade() else { return };
        let view = self.view();
        if self.options.durability == Durability::Local || view.peers.iter().all(|peer| !peer.alive) {
            return;
        }
        let all_alive = view.peers.iter().all(|peer| peer.alive);
        let lives = |id| Some(id) == view.me || view.peers.iter().any(|peer| peer.alive && peer.id == id);
        let last_one = |entry: &Arc<Entry>| !all_alive && view.me.is_some() && entry.is_last_one(lives);
        let alone = entries.iter().filter(|entry| entry.is_alone() || last_one(entry)).take(AT_ONCE);
        for entry in alone.filter(|entry| !entry.spreading.swap(true, Ordering::AcqRel)) {
            let (this, entry) = (Arc::clone(&this), Arc::clone(entry));
            // Ends with the peers that can be asked, each within a time limit.
            self.spawn(async move {
                let ran = !entry.copy.ended();
                let other = this.have_mirrored(&entry).await;
                if let Some(other) = other {
                    tracing::debug!(stream = %entry.copy.id, %other, "copied to another replica");
                }
                if other.is_some() && ran {
                    // Who reads here would be ahead of that copy.
                    entry.copy.send_clients_away();
                }
                if !ran && let Some(second) = other.or(this.view().me) {
                    // What nobody takes stays here: it may be that too much of it is forgotten.
                    entry.second.store(second.0, Ordering::Release);
                }
                entry.spreading.store(false, Ordering::Release);
            });
        }
    }

    /// Has another replica get a copy of what is here, so that somebody can take it over, or read it. Which
    /// one has one now.
    pub(super) async fn have_mirrored(&self, entry: &Entry) -> Option<ReplicaId> {
        let view = self.view();
        let me = view.me?;
        for peer in view.peers.iter().filter(|peer| peer.alive) {
            let Some(link) = self.link(&peer.address, Some(&peer.name)).await else { continue };
            let wanted = Wanted { from: entry.copy.next(), via: me.0, ..Wanted::default() };
            if link.attach(entry.copy.id, wanted, 2 * ORDER_TIMEOUT).await.is_ok() {
                return Some(peer.id);
            }
        }
        None
    }
}

impl Entry {
    /// Whether what is here is all there is but for what is on its way: it is held here, has ended, or
    /// comes from somebody.
    pub(super) fn is_in_touch(&self) -> bool {
        let comes = || self.ticket.lock().as_ref().is_some_and(|(ticket, _)| ticket.is_open());
        self.copy.ended() || self.holding.lock().is_some() || comes()
    }

    /// Whether it has ended, and nobody who lives is known to have it, too.
    fn is_last_one(&self, lives: impl Fn(ReplicaId) -> bool) -> bool {
        !self.local.load(Ordering::Acquire)
            && !self.is_purged()
            && self.copy.ended()
            && !lives(ReplicaId(self.second.load(Ordering::Acquire)))
    }

    /// Whether it runs here, and nobody reads along who should.
    fn is_alone(&self) -> bool {
        !self.local.load(Ordering::Acquire)
            && self.holding.lock().is_some()
            && !self.copy.ended()
            && !self.copy.has_mirror()
    }
}
