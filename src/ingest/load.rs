//! SGLang's load socket: the newest word of one rank's load.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::live::{Live, LiveEvent};
use crate::kv::event::LoadStat;
use crate::zmtp::{Endpoint, Limits, Resolve};

/// Longest message about load, many times what there is to say.
const LIMITS: Limits = Limits { bytes: 64 << 10, parts: 4 };

/// The topic engines use.
pub const LOAD_TOPIC: &str = "load";

/// Listens to a rank's load. Dropping it ends it.
pub struct LoadFeed {
    newest: watch::Receiver<Option<LoadStat>>,
    _task: AbortOnDropHandle<()>,
}

impl LoadFeed {
    /// Connects to the load socket at `endpoint`, again whenever the connection ends.
    pub fn spawn(endpoint: Endpoint, topic: &str, resolve: Arc<dyn Resolve>) -> Self {
        let (sender, newest) = watch::channel(None);
        let mut live = Live::connect(endpoint, topic.to_owned(), resolve, LIMITS);
        let task = tokio::spawn(async move {
            loop {
                match live.next().await {
                    LiveEvent::Message(parts) => {
                        if let Some(stat) = parts.last().and_then(|payload| LoadStat::decode(payload).ok()) {
                            sender.send_replace(Some(stat));
                        }
                    }
                    // What an engine said before it went away is true no more.
                    LiveEvent::Gone(_) => {
                        sender.send_replace(None);
                    }
                    LiveEvent::Connected => {}
                    LiveEvent::Over => return,
                }
            }
        });
        Self { newest, _task: AbortOnDropHandle::new(task) }
    }

    /// What the rank said last; nothing while it is not connected.
    pub fn newest(&self) -> Option<LoadStat> {
        *self.newest.borrow()
    }

    /// Waits until it says something else.
    pub async fn changed(&mut self) -> Option<LoadStat> {
        // The task lives as long as this does.
        let _ = self.newest.changed().await;
        *self.newest.borrow_and_update()
    }
}
