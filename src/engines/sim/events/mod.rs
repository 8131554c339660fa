//! What the simulated engine publishes of its cache: vLLM's and SGLang's ZeroMQ sockets.
//!
//! One batch a step, numbered from 0 when the engine starts; the newest batches are kept for the
//! replay socket. The numbers begin anew when the engine does, and nobody is told.

mod config;
mod encode;
mod load;

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub use config::{EventFormat, KvEventsConfig, ReplayLayout};
pub use load::LoadPublisher;

use super::engine::KvEventBatch;
use super::options::EngineSimArgs;
use crate::zmtp::{Endpoint, Limits, Link, Listener, Publisher, PublisherStats, SocketType, ZmtpError};

/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Longest question to the replay socket.
const QUESTION: Limits = Limits { bytes: 64 << 10, parts: 8 };

/// What the replay socket reads.
struct Kept {
    batches: Mutex<VecDeque<(u64, Bytes)>>,
    topic: Bytes,
    layout: ReplayLayout,
    cut_after: usize,
    /// Replaced when the engine begins anew.
    cut: Mutex<CancellationToken>,
}

/// The sockets of KV events.
pub struct KvPublisher {
    config: KvEventsConfig,
    format: EventFormat,
    block_size: u32,
    drop_every: u64,
    publisher: Publisher,
    replay: Option<Endpoint>,
    kept: Arc<Kept>,
    load: Option<Endpoint>,
    published: AtomicU64,
    closing: CancellationToken,
}

impl KvPublisher {
    /// Opens the sockets that the flags ask for; nothing if they ask for none. `host` stands in
    /// for a wildcard; `load` is where the load is published.
    pub async fn start(
        args: &EngineSimArgs,
        host: IpAddr,
        load: Option<Endpoint>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(config) = args.kv_events_config.clone().filter(KvEventsConfig::publishes) else {
            return Ok(None);
        };
        let endpoint = Endpoint::parse(&config.endpoint)?;
        let binds = config.binds(args.kv_events_format);
        let publisher = if binds {
            let endpoint = endpoint.at_host(&host.to_string());
            let bound = Publisher::bind(&endpoint, config.hwm).await;
            bound.with_context(|| format!("engine-sim cannot publish KV events at {endpoint}"))?
        } else {
            Publisher::connect(&endpoint, config.hwm)
        };
        let kept = Arc::new(Kept {
            batches: Mutex::default(),
            topic: Bytes::from(config.topic.clone()),
            layout: args.kv_replay_layout,
            cut_after: args.cut_replays_after,
            cut: Mutex::default(),
        });
        let closing = CancellationToken::new();
        let replay = match &config.replay_endpoint {
            None => None,
            Some(text) => {
                let endpoint = Endpoint::parse(text)?.at_host(&host.to_string());
                let listener = Listener::bind(&endpoint)
                    .await
                    .with_context(|| format!("engine-sim cannot replay KV events at {endpoint}"))?;
                let endpoint = listener.endpoint().clone();
                tokio::spawn(accept(listener, kept.clone(), closing.clone()));
                Some(endpoint)
            }
        };
        Ok(Some(Self {
            format: args.kv_events_format,
            block_size: args.block_size,
            drop_every: args.drop_frames_every,
            load,
            published: AtomicU64::new(0),
            config,
            publisher,
            replay,
            kept,
            closing,
        }))
    }

    /// Where events are published, with the port that was found.
    pub fn endpoint(&self) -> &Endpoint {
        self.publisher.endpoint()
    }

    /// Where they are replayed.
    pub fn replay_endpoint(&self) -> Option<&Endpoint> {
        self.replay.as_ref()
    }

    /// Subscribers and what was dropped.
    pub fn stats(&self) -> PublisherStats {
        self.publisher.stats()
    }

    /// Publishes the events of one step.
    pub fn publish(&self, batch: &KvEventBatch) {
        let payload = Bytes::from(encode::batch(batch, self.format));
        {
            let mut batches = self.kept.batches.lock();
            batches.push_back((batch.sequence, payload.clone()));
            while batches.len() > self.config.buffer_steps {
                batches.pop_front();
            }
        }
        let number = self.published.fetch_add(1, Ordering::Relaxed) + 1;
        if self.drop_every > 0 && number.is_multiple_of(self.drop_every) {
            return;
        }
        let sequence = Bytes::copy_from_slice(&batch.sequence.to_be_bytes());
        self.publisher.send(vec![self.kept.topic.clone(), sequence, payload]);
    }

    /// The engine begins anew: connections end and nothing is left to replay.
    pub fn restart(&self) {
        self.kept.batches.lock().clear();
        self.publisher.cut();
        std::mem::take(&mut *self.kept.cut.lock()).cancel();
    }

    /// Closes all sockets.
    pub fn close(&self) {
        self.closing.cancel();
        self.publisher.close();
    }

    /// vLLM's `/kv_event_sources`.
    pub fn sources(&self) -> serde_json::Value {
        let config = &self.config;
        serde_json::json!({"0": {
            "enable_kv_cache_events": config.enable_kv_cache_events,
            "publisher": "zmq",
            "endpoint": self.publisher.endpoint().to_string(),
            "replay_endpoint": self.replay.as_ref().map(ToString::to_string),
            "buffer_steps": config.buffer_steps,
            "hwm": config.hwm,
            "max_queue_size": config.max_queue_size,
            "topic": config.topic,
        }})
    }

    /// What SGLang's `/server_info` says of it; nothing for sockets that have no port.
    pub fn server_info(&self) -> Option<serde_json::Value> {
        let Endpoint::Tcp { host, port } = self.publisher.endpoint() else { return None };
        let mut info = serde_json::json!({
            "publisher": "zmq",
            "endpoint_host": host,
            "endpoint_port_base": port,
            "topic": self.config.topic,
            "block_size": self.block_size,
            "dp_size": 1,
        });
        if let Some(Endpoint::Tcp { port, .. }) = &self.replay {
            info["replay_endpoint_port_base"] = (*port).into();
        }
        if let Some(Endpoint::Tcp { port, .. }) = &self.load {
            info["load_endpoint_port_base"] = (*port).into();
            info["load_topic"] = "load".into();
        }
        Some(info)
    }
}

impl Drop for KvPublisher {
    fn drop(&mut self) {
        self.close();
    }
}

async fn accept(listener: Listener, kept: Arc<Kept>, closing: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = Link::accept(&listener) => accepted,
            () = closing.cancelled() => return,
        };
        let Ok(incoming) = accepted else {
            tokio::time::sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let (kept, closing) = (kept.clone(), closing.clone());
        tokio::spawn(async move {
            let cut = kept.cut.lock().clone();
            let answering = async {
                let link = incoming.shake(SocketType::Router, QUESTION).await?;
                answer(link, &kept).await
            };
            let ended = tokio::select! {
                ended = answering => ended,
                () = closing.cancelled() => return,
                () = cut.cancelled() => return,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a replay client left");
            }
        });
    }
}

async fn answer(mut link: Link, kept: &Kept) -> Result<(), ZmtpError> {
    loop {
        let question = link.recv().await?;
        let start = match question.as_slice() {
            [empty, start] if empty.is_empty() => <[u8; 8]>::try_from(start.as_ref()).ok(),
            _ => None,
        };
        let Some(start) = start.map(u64::from_be_bytes) else {
            tracing::warn!(parts = question.len(), "not a question for a replay");
            continue;
        };
        let parts = |topic: Bytes, sequence: u64, payload: Bytes| {
            let sequence = Bytes::copy_from_slice(&sequence.to_be_bytes());
            match kept.layout {
                ReplayLayout::Topic => vec![Bytes::new(), topic, sequence, payload],
                ReplayLayout::Plain => vec![Bytes::new(), sequence, payload],
            }
        };
        let wanted: Vec<(u64, Bytes)> =
            kept.batches.lock().iter().filter(|(sequence, _)| *sequence >= start).cloned().collect();
        let most = if kept.cut_after > 0 { kept.cut_after } else { usize::MAX };
        let whole = wanted.len() <= most;
        for (sequence, payload) in wanted.into_iter().take(most) {
            link.send(&parts(kept.topic.clone(), sequence, payload)).await?;
        }
        if whole {
            link.send(&parts(Bytes::new(), u64::MAX, Bytes::new())).await?;
        }
    }
}
