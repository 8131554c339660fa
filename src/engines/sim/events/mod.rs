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

use anyhow::Context;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

pub use config::{EventFormat, KvEventsConfig, ReplayLayout};
pub use load::LoadPublisher;

use super::engine::Engine;
use super::engine::KvEventBatch;
use crate::zmtp::{Endpoint, Limits, Link, Publisher, PublisherStats, Router, ZmtpError};

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
    rank: u32,
    ranks: u32,
    drop_every: u64,
    publisher: Publisher,
    replay: Option<Router>,
    kept: Arc<Kept>,
    load: Option<Endpoint>,
    published: AtomicU64,
}

impl KvPublisher {
    /// Opens the sockets that the flags ask for; nothing if they ask for none. `host` stands in
    /// for a wildcard; `load` is where the load is published.
    pub async fn start(
        engine: &Engine,
        host: IpAddr,
        load: Option<Endpoint>,
    ) -> anyhow::Result<Option<Self>> {
        let args = &engine.args;
        let Some(config) = args.kv_events_config.clone().filter(KvEventsConfig::publishes) else {
            return Ok(None);
        };
        let base = Endpoint::parse(&config.endpoint)?;
        let told_by_base = args.kv_events_format == EventFormat::Sglang && args.dp > 1;
        anyhow::ensure!(
            !told_by_base || !matches!(base, Endpoint::Tcp { port: 0, .. }),
            "SGLang tells the first rank's port only, from which the others count up; with --dp {} name one in \
             --kv-events-config in place of port 0",
            args.dp
        );
        let endpoint = of_rank(&base, engine.rank)?;
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
        let replay = match &config.replay_endpoint {
            None => None,
            Some(text) => {
                let endpoint = of_rank(&Endpoint::parse(text)?, engine.rank)?.at_host(&host.to_string());
                let asked = Arc::clone(&kept);
                let router = Router::bind(&endpoint, QUESTION, move |link| until_cut(link, asked.clone()));
                let bound = router.await;
                Some(bound.with_context(|| format!("engine-sim cannot replay KV events at {endpoint}"))?)
            }
        };
        Ok(Some(Self {
            format: args.kv_events_format,
            block_size: args.block_size,
            rank: engine.rank,
            ranks: args.dp,
            drop_every: args.drop_frames_every,
            load,
            published: AtomicU64::new(0),
            config,
            publisher,
            replay,
            kept,
        }))
    }

    /// Where events are published, with the port that was found.
    pub fn endpoint(&self) -> &Endpoint {
        self.publisher.endpoint()
    }

    /// Where they are replayed.
    pub fn replay_endpoint(&self) -> Option<&Endpoint> {
        self.replay.as_ref().map(Router::endpoint)
    }

    /// Subscribers and what was dropped.
    pub fn stats(&self) -> PublisherStats {
        self.publisher.stats()
    }

    /// Publishes the events of one step.
    pub fn publish(&self, batch: &KvEventBatch) {
        let payload = Bytes::from(encode::batch(batch, self.rank, self.format));
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
        if let Some(replay) = &self.replay {
            replay.close();
        }
        self.publisher.close();
    }

    /// The rank's entry in vLLM's `/kv_event_sources`.
    pub fn sources(&self) -> serde_json::Value {
        let config = &self.config;
        serde_json::json!({self.rank.to_string(): {
            "enable_kv_cache_events": config.enable_kv_cache_events,
            "publisher": "zmq",
            "endpoint": self.publisher.endpoint().to_string(),
            "replay_endpoint": self.replay_endpoint().map(ToString::to_string),
            "buffer_steps": config.buffer_steps,
            "hwm": config.hwm,
            "max_queue_size": config.max_queue_size,
            "topic": config.topic,
        }})
    }

    /// What SGLang's `/server_info` says of rank 0, from whose ports those of the others count up;
    /// nothing for sockets that have no port.
    pub fn server_info(&self) -> Option<serde_json::Value> {
        let Endpoint::Tcp { port, .. } = self.publisher.endpoint() else { return None };
        // As it was told: who reads it knows by `*` that the engine listens, and for where it stands.
        let Ok(Endpoint::Tcp { host, .. }) = Endpoint::parse(&self.config.endpoint) else { return None };
        let mut info = serde_json::json!({
            "publisher": "zmq",
            "endpoint_host": host,
            "endpoint_port_base": port,
            "topic": self.config.topic,
            "block_size": self.block_size,
            "dp_size": self.ranks,
        });
        if let Some(bind) = self.config.bind {
            info["bind"] = bind.into();
        }
        if let Some(Endpoint::Tcp { port, .. }) = self.replay_endpoint() {
            info["replay_endpoint_port_base"] = (*port).into();
        }
        if let Some(Endpoint::Tcp { port, .. }) = &self.load {
            info["load_endpoint_port_base"] = (*port).into();
            info["load_topic"] = "load".into();
        }
        Some(info)
    }
}

/// Where a rank has what rank 0 has at `endpoint`. A port that is to be found is found for each.
fn of_rank(endpoint: &Endpoint, rank: u32) -> anyhow::Result<Endpoint> {
    match endpoint {
        Endpoint::Tcp { port: 0, .. } => Ok(endpoint.clone()),
        _ => endpoint.of_rank(rank).with_context(|| {
            format!(
                "{endpoint} has no place for rank {rank}; give a tcp:// endpoint with room above its port"
            )
        }),
    }
}

impl Drop for KvPublisher {
    fn drop(&mut self) {
        self.close();
    }
}

async fn until_cut(link: Link, kept: Arc<Kept>) -> Result<(), ZmtpError> {
    let cut = kept.cut.lock().clone();
    tokio::select! {
        ended = answer(link, &kept) => ended,
        () = cut.cancelled() => Ok(()),
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
