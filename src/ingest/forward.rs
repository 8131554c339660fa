//! An engine's feed again at another address: the same frames with the same numbers, and what it can
//! say again asked of the engine itself. For engines whose sockets others cannot reach.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::discover::RankSource;
use super::live::{Live, LiveEvent};
use super::replay::{SILENCE, is_end};
use crate::zmtp::{
    AnyAddress, Endpoint, Limits, Link, Publisher, PublisherStats, Router, SocketType, ZmtpError,
};

/// Messages that wait for a subscriber; what comes then is dropped, and asked for again by whoever
/// misses it.
const WAITING: usize = 4096;

/// Longest question to a replay socket.
const QUESTION: Limits = Limits { bytes: 64 << 10, parts: 8 };

/// Longest silence of the engine within an answer. Whoever asked has given up before.
const PATIENCE: Duration = SILENCE.saturating_mul(2);

/// One rank's feed at another address. Dropping it ends it.
pub struct Forwarder {
    publisher: Arc<Publisher>,
    replay: Option<Router>,
    _task: AbortOnDropHandle<()>,
}

impl Forwarder {
    /// Listens at `live`, and at `replay` if the engine has such a socket, for those who want to hear
    /// of `source`.
    pub async fn start(source: &RankSource, live: &Endpoint, replay: &Endpoint) -> Result<Self, ZmtpError> {
        let publisher = Arc::new(Publisher::bind(live, WAITING).await?);
        let replay = match source.replay.clone() {
            None => None,
            Some(engine) => {
                Some(Router::bind(replay, QUESTION, move |link| pass(link, engine.clone())).await?)
            }
        };
        let (endpoint, topic) = (source.endpoint.clone(), source.topic.clone());
        let live = Live::connect(endpoint, topic, Arc::new(AnyAddress), Limits::default());
        let task = AbortOnDropHandle::new(tokio::spawn(forward(live, Arc::clone(&publisher))));
        Ok(Self { publisher, replay, _task: task })
    }

    /// Where messages are to be had.
    pub fn endpoint(&self) -> &Endpoint {
        self.publisher.endpoint()
    }

    /// Where they are to be had again.
    pub fn replay_endpoint(&self) -> Option<&Endpoint> {
        self.replay.as_ref().map(Router::endpoint)
    }

    /// Who hears them, and what was dropped.
    pub fn stats(&self) -> PublisherStats {
        self.publisher.stats()
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.publisher.close();
    }
}

async fn forward(mut live: Live, publisher: Arc<Publisher>) {
    loop {
        match live.next().await {
            LiveEvent::Connected => tracing::info!("the engine's KV events are forwarded"),
            LiveEvent::Message(parts) => publisher.send(parts),
            LiveEvent::Gone(why) => {
                tracing::debug!(why, "no KV events from the engine");
                // As the engine's end would: its numbers may begin anew.
                publisher.cut();
            }
            LiveEvent::Over => return,
        }
    }
}

/// Passes questions on to the engine, and its answers back, as they are.
async fn pass(mut link: Link, engine: Endpoint) -> Result<(), ZmtpError> {
    loop {
        let question = link.recv().await?;
        let mut asked = Link::connect(&engine, SocketType::Dealer, Limits::default(), &AnyAddress).await?;
        asked.send(&question).await?;
        loop {
            let answer = timeout(PATIENCE, asked.recv()).await.unwrap_or(Err(ZmtpError::Closed))?;
            link.send(&answer).await?;
            if is_end(&answer) {
                break;
            }
        }
    }
}
