//! Keeps the engine registered: as long as it is well, some replica hears of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::events::Events;
use super::load;
use super::replicas::Replicas;
use crate::admin_types::{EndedStream, HeartbeatRequest, RegisterRequest, RegisteredReply, RunningOnRank};
use crate::relay::alone::Alone;
use crate::relay::hub::Relays;

/// Pause after something that did not work, and between heartbeats where no replica says.
const PAUSE: Duration = Duration::from_millis(1000);
/// How long a replica may take to register the engine, which it asks about itself.
const REGISTERING: Duration = Duration::from_secs(10);
/// How long a replica may take to take note of a heartbeat: the next one is asked in time.
const HEARTBEAT: Duration = Duration::from_millis(1000);
/// How often it is looked whether streams have lost the replica that had them booked.
const LOOK: Duration = Duration::from_millis(100);
/// An engine that was not well so often in a row may be another one when it is.
const MISSES: u32 = 3;

/// See the module.
pub(super) struct Registrar {
    pub(super) replicas: Replicas,
    pub(super) engine: Engine,
    pub(super) events: Option<Events>,
    /// What is registered.
    pub(super) wanted: RegisterRequest,
    pub(super) directory: Arc<Alone>,
    pub(super) relays: Arc<Relays>,
    /// The only cluster to belong to.
    pub(super) pinned: Option<String>,
}

/// What a heartbeat is answered with.
#[derive(Deserialize)]
struct Heard {
    interval_ms: u64,
}

/// What was wrong last, so that it is said once.
#[derive(Default)]
struct Said(String);

impl Said {
    fn warn(&mut self, what: &'static str, why: String) {
        if self.0 != why {
            tracing::warn!(why, "{what}");
            self.0 = why;
        }
    }

    fn well(&mut self) {
        self.0.clear();
    }
}

impl Registrar {
    /// Until `stop`.
    pub(super) async fn run(&mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.keep() => {}
        }
    }

    async fn keep(&mut self) {
        let (mut said, mut misses, mut registered) = (Said::default(), MISSES, false);
        loop {
            if let Err(why) = self.engine.is_well().await {
                misses = misses.saturating_add(1);
                said.warn("the engine is not well: it gets no heartbeats", why);
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            if misses >= MISSES {
                registered = false;
            }
            misses = 0;
            let running = load::running(&self.relays, self.engine.block_size());
            let went = match registered {
                true => self.heartbeat(&running).await,
                // What runs is told next.
                false => {
                    self.register().await.map(|pause| Some(if running.is_empty() { pause } else { LOOK }))
                }
            };
            let pause = match went {
                Ok(Some(pause)) => {
                    said.well();
                    registered = true;
                    pause
                }
                Ok(None) => {
                    // All replicas have forgotten it, or a new cluster has never known it.
                    registered = false;
                    continue;
                }
                Err(why) => {
                    said.warn("no replica hears of the engine", why);
                    PAUSE
                }
            };
            self.wait(pause, &running).await;
        }
    }

    /// Waits for the next heartbeat: not long when there are other streams to tell of than `told`.
    async fn wait(&self, pause: Duration, told: &[RunningOnRank]) {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            tokio::time::sleep(LOOK.min(until.saturating_duration_since(Instant::now()))).await;
            let running = load::running(&self.relays, self.engine.block_size());
            if load::requests(&running) != load::requests(told) {
                return;
            }
        }
    }

    fn path(&self) -> String {
        let id = self.wanted.id.as_deref().unwrap_or_default();
        // Ids have nothing in them that a path could not.
        format!("/v1/nodes/{id}")
    }

    /// `None` if the replicas do not know the engine.
    async fn heartbeat(&self, running: &[RunningOnRank]) -> Result<Option<Duration>, String> {
        let path = format!("{}/heartbeat", self.path());
        let unread = self.relays.unread_ends();
        let ended = unread.iter().map(|end| EndedStream {
            id: end.id.to_string(),
            attempt: end.attempt,
            how: end.how.into(),
            keep_ms: end.keep_ms,
        });
        let said = HeartbeatRequest { running: running.to_vec(), ended: ended.collect() };
        let body: Bytes = serde_json::to_vec(&said).map_err(|error| error.to_string())?.into();
        let reply = self.replicas.ask(&Method::POST, &path, &body, HEARTBEAT).await?;
        if reply.status == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !reply.status.is_success() {
            return Err(reply.complaint());
        }
        self.relays.ends_were_told(&unread);
        let heard = serde_json::from_slice::<Heard>(&reply.body);
        Ok(Some(heard.map_or(PAUSE, |heard| Duration::from_millis(heard.interval_ms))))
    }

    async fn register(&mut self) -> Result<Duration, String> {
        self.engine.learn().await?;
        let mut wanted = self.wanted.clone();
        if let Some(events) = &mut self.events {
            let sources = self.engine.events().await?;
            if !sources.is_empty() {
                wanted.labels.extend(events.forward(sources).await?);
            }
        }
        let body: Bytes = serde_json::to_vec(&wanted).map_err(|error| error.to_string())?.into();
        let reply = self.replicas.ask(&Method::POST, "/v1/nodes", &body, REGISTERING).await?;
        if !reply.status.is_success() {
            return Err(reply.complaint());
        }
        let registered: RegisteredReply =
            serde_json::from_slice(&reply.body).map_err(|error| format!("{}: {error}", reply.by))?;
        let cluster = registered.cluster.unwrap_or_default();
        match &self.pinned {
            Some(pinned) if *pinned != cluster => {
                return Err(format!(
                    "{} is of the cluster {cluster:?}, not of {pinned} (--cluster)",
                    reply.by
                ));
            }
            Some(_) => {}
            None => {
                self.directory.set_cluster(&cluster);
                self.relays.look();
            }
        }
        tracing::info!(by = reply.by, cluster, "{}", registered.message);
        Ok(registered.interval_ms.map_or(PAUSE, Duration::from_millis))
    }

    /// Takes the engine out of the registry.
    pub(super) async fn unregister(&self) {
        match self.replicas.ask(&Method::DELETE, &self.path(), &Bytes::new(), HEARTBEAT).await {
            Ok(reply) if reply.status.is_success() => tracing::info!("the engine is unregistered"),
            Ok(reply) => tracing::warn!(why = reply.complaint(), "the engine is not unregistered"),
            Err(why) => tracing::warn!(why, "the engine is not unregistered"),
        }
    }
}
