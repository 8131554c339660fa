//! The links of one process to others, opened when they are needed: one to each for what is held here and
//! for what nobody waits for, and one to each from each thread that serves clients.
//!
//! A thread that serves clients drives its own links. What comes on one of them for a client is written to
//! that client by the thread that read it; from a link of another thread, each event would wake two.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::copy::Copy;
use super::counts::Counts;
use super::directory::Address;
use super::hub::Relays;
use super::link::caller::{Link, Lost};
use crate::cluster::peer::dial::Dialer;
use crate::cluster::peer::purpose::Purpose;
use crate::state::streams::Holder;

/// How long a peer that could not be reached is left alone.
const AWAY: Duration = Duration::from_millis(500);
/// After how long without a stream a thread's own link is closed.
const IDLE: Duration = Duration::from_secs(60);
/// Processes that are remembered; then those without a link are forgotten.
const MOST: usize = 4096;

thread_local! {
    static OWN_LINKS: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Gives this thread, on which a runtime of one thread is about to run, links of its own.
pub fn drive_links_here() {
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    OWN_LINKS.set(Some(THREADS.fetch_add(1, Ordering::Relaxed)));
}

type Place = Arc<tokio::sync::Mutex<Slot>>;

/// See the module.
pub(super) struct Links {
    dialer: Dialer,
    /// By address and the name that has to be shown there: addresses change hands.
    slots: Mutex<HashMap<Address, Place>>,
}

/// The links to one process, and since when it could not be reached. They are opened one after the other:
/// threads that want theirs at the same moment are no crowd at the other end, and learn of each other that
/// there is nobody.
#[derive(Default)]
struct Slot {
    /// By the thread whose they are, if they are one's own.
    links: HashMap<Option<usize>, Arc<Link>>,
    failed: Option<Instant>,
}

impl Slot {
    fn open(&self) -> usize {
        self.links.values().filter(|link| link.is_open()).count()
    }
}

impl Links {
    pub(super) fn new(dialer: Dialer) -> Self {
        Self { dialer, slots: Mutex::default() }
    }

    fn slot(&self, place: Address) -> Place {
        let mut slots = self.slots.lock();
        if slots.len() >= MOST && !slots.contains_key(&place) {
            // One that is being opened is locked.
            slots.retain(|_, slot| slot.try_lock().map_or(true, |slot| slot.open() > 0));
        }
        Arc::clone(slots.entry(place).or_default())
    }

    /// Links that work. One that is just being opened does not count.
    fn open(&self) -> usize {
        let slots: Vec<Place> = self.slots.lock().values().cloned().collect();
        slots.iter().map(|slot| slot.try_lock().map_or(0, |slot| slot.open())).sum()
    }
}

impl Relays {
    /// Where what this thread begins goes on without it, beside its links.
    pub(super) fn home(&self) -> Handle {
        match OWN_LINKS.get() {
            Some(_) => Handle::current(),
            None => self.runtime.clone(),
        }
    }

    /// Links to other processes that work.
    pub fn open_links(&self) -> usize {
        self.links.open()
    }

    /// The link to a process, opened if need be; this thread's own, if it is to have some.
    pub(super) async fn link(&self, address: &str, name: Option<&str>) -> Option<Arc<Link>> {
        let thread = OWN_LINKS.get();
        let slot = self.links.slot((address.to_owned(), name.map(str::to_owned)));
        let mut slot = slot.lock().await;
        if let Some(link) = slot.links.get(&thread).filter(|link| link.is_wanted()) {
            return Some(Arc::clone(link));
        }
        if slot.failed.is_some_and(|failed| failed.elapsed() < AWAY) {
            return None;
        }
        let this = self.this.clone();
        let on_lost = Arc::new(move |copy: Arc<Copy>, lost: Lost| {
            if let Some(this) = this.upgrade() {
                this.source_lost(&copy, lost);
            }
        });
        // In a task of its own, and so the connection itself: the link must outlive who asked for it.
        let (dialer, address, name) =
            (self.links.dialer.clone(), address.to_owned(), name.map(str::to_owned));
        let (cluster, silence) = (self.view().cluster.clone(), self.options.silence);
        // Without a client no thread keeps one.
        let idle = thread.map(|_| IDLE);
        let opening = self.home().spawn(async move {
            let channel = dialer.channel(&address, name.as_deref(), Purpose::Streams)?;
            Link::open(channel, &cluster, (silence, idle), on_lost).await.inspect_err(|error| {
                tracing::debug!(address, %error, "no stream link");
            })
        });
        let opened = opening.await.unwrap_or_else(|_| Err("stopping".to_owned()));
        match opened {
            Ok(link) => {
                Counts::add(&self.counts.links_opened);
                slot.links.retain(|_, link| link.is_open());
                slot.links.insert(thread, Arc::clone(&link));
                slot.failed = None;
                Some(link)
            }
            Err(_) => {
                Counts::add(&self.counts.links_failed);
                slot.failed = Some(Instant::now());
                None
            }
        }
    }

    /// The link to a holder.
    pub(super) async fn link_to(&self, holder: Holder) -> Option<Arc<Link>> {
        let (address, name) = self.address_of(holder).await?;
        self.link(&address, name.as_deref()).await
    }

    /// Where a holder is, as far as is known, and the name that it has to show there.
    pub(super) async fn address_of(&self, holder: Holder) -> Option<Address> {
        match holder {
            Holder::Replica(id) => {
                let view = self.view();
                let peer = view.peers.iter().find(|peer| peer.id == id)?;
                Some((peer.address.clone(), Some(peer.name.clone())))
            }
            Holder::Agent(_) => self.directory.address(holder).await,
        }
    }
}
