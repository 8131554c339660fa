//! One listener that engines connect to, for those whose event endpoint is an address of ours.
//!
//! Who connects is known by what it sends: a [`Claim`] names the topic, and the DP rank if several
//! share it.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::kv::event;
use crate::zmtp::{Endpoint, Limits, Link, Listener, Parts, SocketType, ZmtpError};

/// Messages between a connection and its feed; then the connection is not read.
const QUEUE: usize = 256;

/// Engines connected at once; the next one is closed.
const MAX_CONNECTIONS: usize = 4096;

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a feed wants of what comes in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The topic, and no longer one: who begins alike is somebody else.
    pub topic: String,
    /// Only batches of this DP rank.
    pub rank: Option<u32>,
}

impl Claim {
    fn fits(&self, topic: &[u8], rank: Option<u32>) -> bool {
        topic == self.topic.as_bytes() && (self.rank.is_none() || self.rank == rank)
    }
}

/// What a claimed connection does.
pub(super) enum HubEvent {
    /// It is there; messages from now on are of it.
    Connected,
    /// It said something.
    Message(Parts),
    /// It ended.
    Gone,
}

struct Claimed {
    id: u64,
    claim: Claim,
    /// The connection that has it: the newest one that sent something for it.
    connection: u64,
    events: mpsc::Sender<HubEvent>,
}

#[derive(Default)]
struct Shared {
    claims: Mutex<Vec<Claimed>>,
    next: AtomicU64,
    connections: AtomicU64,
    unclaimed: AtomicU64,
}

/// Says whose connections are taken.
pub type Admits = Arc<dyn Fn(IpAddr) -> bool + Send + Sync>;

/// The listener.
pub struct Hub {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    closing: CancellationToken,
}

/// The messages of one claim. Dropping it gives the claim up.
pub struct HubFeed {
    shared: Arc<Shared>,
    id: u64,
    events: mpsc::Receiver<HubEvent>,
}

impl HubFeed {
    /// Whether somebody is connected who has said something for this claim.
    pub fn is_connected(&self) -> bool {
        let claims = self.shared.claims.lock();
        claims.iter().any(|claimed| claimed.id == self.id && claimed.connection != 0)
    }

    pub(super) async fn next(&mut self) -> Option<HubEvent> {
        self.events.recv().await
    }
}

impl Drop for HubFeed {
    fn drop(&mut self) {
        self.shared.claims.lock().retain(|claimed| claimed.id != self.id);
    }
}

impl Hub {
    /// Listens; connections that `admits` refuses are closed. Dropping the hub closes everything.
    pub async fn bind(endpoint: &Endpoint, limits: Limits, admits: Admits) -> Result<Self, ZmtpError> {
        let listener = Listener::bind(endpoint).await?;
        let endpoint = listener.endpoint().clone();
        let (shared, closing) = (Arc::<Shared>::default(), CancellationToken::new());
        tokio::spawn(accept(listener, shared.clone(), limits, admits, closing.clone()));
        Ok(Self { shared, endpoint, closing })
    }

    /// Where it listens, with the port it got.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Takes what fits `claim`; `None` if an equal one is taken.
    pub fn claim(&self, claim: Claim) -> Option<HubFeed> {
        let (sender, events) = mpsc::channel(QUEUE);
        let mut claims = self.shared.claims.lock();
        if claims.iter().any(|claimed| claimed.claim == claim) {
            return None;
        }
        let id = self.shared.next.fetch_add(1, Ordering::Relaxed) + 1;
        claims.push(Claimed { id, claim, connection: 0, events: sender });
        Some(HubFeed { shared: self.shared.clone(), id, events })
    }

    /// Messages so far that nobody claimed, or that are no batches of events.
    pub fn unclaimed(&self) -> u64 {
        self.shared.unclaimed.load(Ordering::Relaxed)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.closing.cancel();
        // Feeds learn that nothing will come any more.
        self.shared.claims.lock().clear();
    }
}

async fn accept(
    listener: Listener,
    shared: Arc<Shared>,
    limits: Limits,
    admits: Admits,
    closing: CancellationToken,
) {
    loop {
        let accepted = tokio::select! {
            accepted = Link::accept(&listener) => accepted,
            () = closing.cancelled() => return,
        };
        let incoming = match accepted {
            Ok(incoming) => incoming,
            Err(error) => {
                tracing::warn!(%error, "the listener for KV events could not accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Some(peer) = incoming.peer().filter(|peer| !admits(*peer)) {
            tracing::debug!(%peer, "refused on the listener for KV events");
            continue;
        }
        if shared.connections.load(Ordering::Relaxed) >= MAX_CONNECTIONS as u64 {
            tracing::warn!(most = MAX_CONNECTIONS, "too many engines on the listener for KV events");
            continue;
        }
        shared.connections.fetch_add(1, Ordering::Relaxed);
        let (shared, closing) = (shared.clone(), closing.clone());
        tokio::spawn(async move {
            let id = shared.next.fetch_add(1, Ordering::Relaxed) + 1;
            let serving = async {
                let mut link = incoming.shake(SocketType::Sub, limits).await?;
                // Who sends what is told by the topics, so all of them are wanted.
                link.subscribe("").await?;
                serve(&shared, &mut link, id).await
            };
            let ended: Result<(), ZmtpError> = tokio::select! {
                ended = serving => ended,
                () = closing.cancelled() => Ok(()),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "an engine left the listener for KV events");
            }
            leave(&shared, id).await;
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn serve(shared: &Shared, link: &mut Link, id: u64) -> Result<(), ZmtpError> {
    // The claims whose connection this was once; a newer one may have taken over.
    let mut had: Vec<u64> = Vec::new();
    loop {
        let parts = link.recv().await?;
        let [topic, .., payload] = parts.as_slice() else {
            shared.unclaimed.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        // Noise must not take a feed over.
        let Ok(rank) = event::skim(payload) else {
            shared.unclaimed.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        let found = {
            let mut claims = shared.claims.lock();
            let fitting = claims.iter_mut().filter(|claimed| claimed.claim.fits(topic, rank));
            fitting.max_by_key(|claimed| claimed.claim.rank).and_then(|claimed| {
                let newcomer = !had.contains(&claimed.id);
                if newcomer {
                    had.push(claimed.id);
                    claimed.connection = id;
                }
                (claimed.connection == id).then(|| (claimed.events.clone(), newcomer))
            })
        };
        let Some((events, newcomer)) = found else {
            shared.unclaimed.fetch_add(1, Ordering::Relaxed);
            continue;
        };
        // A feed that was dropped in between gave its claim up.
        if newcomer && events.send(HubEvent::Connected).await.is_err() {
            continue;
        }
        let _ = events.send(HubEvent::Message(parts)).await;
    }
}

/// Tells the feeds whose connection this was.
async fn leave(shared: &Shared, id: u64) {
    let left: Vec<_> = {
        let mut claims = shared.claims.lock();
        let ours = claims.iter_mut().filter(|claimed| claimed.connection == id);
        ours.map(|claimed| {
            claimed.connection = 0;
            claimed.events.clone()
        })
        .collect()
    };
    for events in left {
        // The feed may be gone, too.
        let _ = events.send(HubEvent::Gone).await;
    }
}
