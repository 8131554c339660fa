//! A PUB socket: everything to everybody who subscribed, and nobody waits for the slowest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::endpoint::Listener;
use super::{AnyAddress, Endpoint, Limits, Link, Parts, SocketType, ZmtpError};

/// Pause before connecting again, and after a failed accept.
const PAUSE: Duration = Duration::from_millis(100);

/// Topics of one subscriber.
const MAX_TOPICS: usize = 64;

/// Subscribers at once; the next one is closed.
const MAX_SUBSCRIBERS: usize = 256;

/// What became of messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PublisherStats {
    /// Queued for a subscriber, each counted.
    pub queued: u64,
    /// Dropped because a subscriber's queue was full.
    pub dropped: u64,
    /// Subscribers now.
    pub subscribers: usize,
}

struct Subscriber {
    topics: Arc<RwLock<Vec<Bytes>>>,
    queue: mpsc::Sender<Arc<Parts>>,
}

#[derive(Default)]
struct Shared {
    subscribers: Mutex<Vec<Subscriber>>,
    queued: AtomicU64,
    dropped: AtomicU64,
    /// Replaced to cut all connections.
    cut: Mutex<CancellationToken>,
}

/// A PUB socket. Dropping it closes everything.
pub struct Publisher {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    closing: CancellationToken,
    tasks: TaskTracker,
}

impl Publisher {
    /// Listens on `endpoint`; `hwm` messages wait for a subscriber, what comes then is dropped.
    pub async fn bind(endpoint: &Endpoint, hwm: usize) -> Result<Self, ZmtpError> {
        let listener = Listener::bind(endpoint).await?;
        let publisher = Self::new(listener.endpoint().clone());
        let (shared, tasks) = (publisher.shared.clone(), publisher.tasks.clone());
        let closing = publisher.closing.clone();
        publisher.tasks.spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = Link::accept(&listener) => accepted,
                    () = closing.cancelled() => return,
                };
                match accepted {
                    Ok(incoming) => {
                        let (shared, closing) = (shared.clone(), closing.clone());
                        tasks.spawn(async move {
                            let serve = async {
                                serve(&shared, incoming.shake(SocketType::Pub, Limits::default()).await?, hwm)
                                    .await
                            };
                            let ended = tokio::select! {
                                ended = serve => ended,
                                () = closing.cancelled() => return,
                            };
                            if let Err(error) = ended {
                                tracing::debug!(%error, "a subscriber left");
                            }
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a publisher could not accept a connection");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        });
        Ok(publisher)
    }

    /// Connects to a SUB that listens on `endpoint`, again and again.
    pub fn connect(endpoint: &Endpoint, hwm: usize) -> Self {
        let publisher = Self::new(endpoint.clone());
        let (shared, endpoint) = (publisher.shared.clone(), endpoint.clone());
        let closing = publisher.closing.clone();
        publisher.tasks.spawn(async move {
            let connecting = async {
                loop {
                    let limits = Limits::default();
                    let link = Link::connect(&endpoint, SocketType::Pub, limits, &AnyAddress).await;
                    let ended = match link {
                        Ok(link) => serve(&shared, link, hwm).await,
                        Err(error) => Err(error),
                    };
                    if let Err(error) = ended {
                        tracing::debug!(%error, %endpoint, "no subscriber");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            };
            tokio::select! {
                () = connecting => {}
                () = closing.cancelled() => {}
            }
        });
        publisher
    }

    fn new(endpoint: Endpoint) -> Self {
        let (shared, closing, tasks) = Default::default();
        Self { shared, endpoint, closing, tasks }
    }

    /// Where it listens, with the port it got; or where it connects to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Queues a message for everybody who subscribed to its topic, the first part.
    pub fn send(&self, message: Parts) {
        let message = Arc::new(message);
        let topic = message.first().cloned().unwrap_or_default();
        for subscriber in self.shared.subscribers.lock().iter() {
            if !subscriber.topics.read().iter().any(|prefix| topic.starts_with(prefix)) {
                continue;
            }
            let counter = match subscriber.queue.try_send(message.clone()) {
                Ok(()) => &self.shared.queued,
                Err(_) => &self.shared.dropped,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Cuts all connections, as the end of its process would.
    pub fn cut(&self) {
        std::mem::take(&mut *self.shared.cut.lock()).cancel();
    }

    /// Stops listening and ends all connections.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// What became of messages so far.
    pub fn stats(&self) -> PublisherStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let subscribers = self.shared.subscribers.lock();
        let subscribed = subscribers.iter().filter(|s| !s.topics.read().is_empty()).count();
        PublisherStats {
            queued: of(&self.shared.queued),
            dropped: of(&self.shared.dropped),
            subscribers: subscribed,
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.closing.cancel();
    }
}

/// Writes one subscriber's queue to it until it leaves.
async fn serve(shared: &Shared, mut link: Link, hwm: usize) -> Result<(), ZmtpError> {
    let (queue, mut messages) = mpsc::channel(hwm.max(1));
    let topics: Arc<RwLock<Vec<Bytes>>> = Arc::default();
    let cut = shared.cut.lock().clone();
    {
        let mut subscribers = shared.subscribers.lock();
        subscribers.retain(|subscriber| !subscriber.queue.is_closed());
        if subscribers.len() >= MAX_SUBSCRIBERS {
            return Err(ZmtpError::Refused(format!("there are {MAX_SUBSCRIBERS} subscribers already")));
        }
        subscribers.push(Subscriber { topics: topics.clone(), queue });
    }
    let working = async {
        loop {
            tokio::select! {
                biased;
                said = link.recv() => {
                    let said = said?;
                    let Some((verb, topic)) = said.first().and_then(|part| part.split_first()) else { continue };
                    let mut topics = topics.write();
                    match verb {
                        1 if topics.len() < MAX_TOPICS => topics.push(Bytes::copy_from_slice(topic)),
                        0 => {
                            if let Some(at) = topics.iter().position(|t| t == topic) {
                                topics.swap_remove(at);
                            }
                        }
                        _ => {}
                    }
                }
                Some(message) = messages.recv() => link.send(&message).await?,
            }
        }
    };
    let ended = tokio::select! {
        ended = working => ended,
        () = cut.cancelled() => Err(ZmtpError::Closed),
    };
    drop(messages);
    shared.subscribers.lock().retain(|subscriber| !subscriber.queue.is_closed());
    ended
}
