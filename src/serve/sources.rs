//! Where an engine's KV events are to be had: what its labels say, or what it says when asked.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::engines::probe::{EngineFacts, FACTS};
use crate::http::{Allowed, Shard, ask_worker};
use crate::ingest::discover::{self, RankSource, Sources};
use crate::routing::view::WorkerView;
use crate::state::worker::EngineKind;
use crate::zmtp::{Endpoint, Resolve, Resolved};

/// How long an engine may take to say it.
const LIMIT: Duration = Duration::from_secs(2);

/// Labels of a worker that say it in place of the engine: endpoint of rank 0, of its replay
/// socket, and the topic. Engines before vLLM 0.31 and SGLang 0.5.14 cannot be asked.
pub const EVENTS: &str = "kv-events";
/// See [`EVENTS`].
pub const REPLAY: &str = "kv-replay";
/// See [`EVENTS`].
pub const TOPIC: &str = "kv-topic";
/// See [`EVENTS`]: the number by which the engine calls its first rank, where that is not 0, because it
/// is a part of a larger one. Its sockets count up from the endpoint that is named all the same.
pub const FIRST: &str = "kv-first-rank";

/// In place of an endpoint: the engine connects to `kv.listen` of any replica, and is known by its
/// topic.
const HUB: &str = "hub";

/// In place of an endpoint: the engine has no events, and is asked about nothing.
const NONE: &str = "none";

/// Whether the engine is to be left alone.
pub fn is_off(worker: &WorkerView) -> bool {
    worker.record.spec.labels.get(EVENTS).is_some_and(|said| said == NONE)
}

/// Whether the engine connects to us.
pub fn connects(worker: &WorkerView) -> bool {
    worker.record.spec.labels.get(EVENTS).is_some_and(|endpoint| endpoint == HUB)
}

/// How an engine that connects to us is known; of rank 0, the others differ in the number only.
pub fn by_hub(worker: &WorkerView) -> Option<RankSource> {
    let labels = &worker.record.spec.labels;
    let topic = labels.get(TOPIC).filter(|topic| !topic.is_empty())?;
    let replay = labels.get(REPLAY).and_then(|text| Endpoint::parse(text).ok());
    let endpoint = Endpoint::Tcp { host: "*".to_owned(), port: 0 };
    Some(RankSource { rank: 0, endpoint, listens: false, replay, topic: topic.clone(), load: None })
}

/// What is known of an engine's events.
pub enum Found {
    /// They are here.
    Sources(Sources),
    /// It has none.
    Nothing,
    /// It did not answer.
    Silence,
}

/// Reads a worker's labels, or asks its engine.
pub async fn of(shard: &Shard, worker: &WorkerView) -> Found {
    let labels = &worker.record.spec.labels;
    if let Some(endpoint) = labels.get(EVENTS) {
        if endpoint == NONE {
            return Found::Nothing;
        }
        let label = |name: &str| labels.get(name).map(String::as_str).filter(|text| !text.is_empty());
        let named = Named { endpoint, replay: label(REPLAY), topic: label(TOPIC), first: label(FIRST) };
        return match named.of(worker.dp_ranks()) {
            Ok(sources) => Found::Sources(sources),
            Err(why) => {
                tracing::warn!(worker = %worker.id(), why, "label {EVENTS}, {REPLAY} or {FIRST} cannot be used");
                Found::Nothing
            }
        };
    }
    ask(shard, worker).await
}

/// Asks a worker's engine.
pub async fn ask(shard: &Shard, worker: &WorkerView) -> Found {
    let host = host_of(&worker.record.spec.url);
    let asked: &[(&str, Reader)] = match worker.record.spec.engine {
        EngineKind::Sglang => &[("/server_info", discover::sglang)],
        _ => &[("/kv_event_sources", discover::vllm), ("/server_info", discover::sglang)],
    };
    let mut answered = false;
    for (path, read) in asked {
        match ask_worker(shard, worker, path, LIMIT).await {
            Ok(Some(body)) => match read(&body, host) {
                Ok(sources) if !sources.ranks.is_empty() => return Found::Sources(sources),
                Ok(_) => answered = true,
                Err(why) => {
                    tracing::debug!(worker = %worker.id(), path, why, "unreadable");
                    answered = true;
                }
            },
            Ok(None) => answered = true,
            Err(why) => tracing::debug!(worker = %worker.id(), path, why, "not asked"),
        }
    }
    if answered { Found::Nothing } else { Found::Silence }
}

/// What a worker's engine says of itself, apart from its models; it need not say anything.
pub async fn facts(shard: &Shard, worker: &WorkerView) -> EngineFacts {
    let ask = |path| async move { ask_worker(shard, worker, path, LIMIT).await.ok().flatten() };
    let mut answers = futures_util::future::join_all(FACTS.map(ask)).await.into_iter();
    EngineFacts::read(&FACTS.map(|_| answers.next().flatten()))
}

type Reader = fn(&[u8], &str) -> Result<Sources, String>;

/// What labels say, or options in their place.
pub struct Named<'a> {
    /// [`EVENTS`].
    pub endpoint: &'a str,
    /// [`REPLAY`].
    pub replay: Option<&'a str>,
    /// [`TOPIC`].
    pub topic: Option<&'a str>,
    /// [`FIRST`].
    pub first: Option<&'a str>,
}

impl Named<'_> {
    /// The sources of so many ranks.
    pub fn of(&self, ranks: u32) -> Result<Sources, String> {
        let read = |text: &str| Endpoint::parse(text).map_err(|error| error.to_string());
        let (endpoint, replay) = (read(self.endpoint)?, self.replay.map(read).transpose()?);
        let first = match self.first {
            Some(first) => first.parse::<u32>().map_err(|_| format!("{first:?} is no rank"))?,
            None => 0,
        };
        let beyond = |rank: u32| format!("rank {rank} would be beyond port 65535");
        let ranks = (0..ranks).map(|rank| {
            Ok(RankSource {
                rank: first.checked_add(rank).ok_or("a rank has a number below 2^32")?,
                endpoint: endpoint.of_rank(rank).ok_or_else(|| beyond(rank))?,
                listens: true,
                replay: match &replay {
                    Some(replay) => Some(replay.of_rank(rank).ok_or_else(|| beyond(rank))?),
                    None => None,
                },
                topic: self.topic.unwrap_or_default().to_owned(),
                load: None,
            })
        });
        Ok(Sources { ranks: ranks.collect::<Result<_, String>>()?, block_size: None })
    }
}

/// The host of a worker's URL, without brackets.
fn host_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = rest.rsplit_once(':').map_or(rest, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// `workers.allow` for the sockets that engines name: an engine could name any.
pub struct OnlyAllowed {
    allow: Arc<Allowed>,
    /// Files are on this machine, and so must the engine be that names them.
    is_local: bool,
}

impl OnlyAllowed {
    /// For the engine at `url`.
    pub fn new(allow: Arc<Allowed>, url: &str) -> Self {
        let host = host_of(url);
        let is_local = host.parse::<IpAddr>().map_or(host == "localhost", |ip| ip.is_loopback());
        Self { allow, is_local }
    }
}

impl Resolve for OnlyAllowed {
    fn addresses(&self, host: &str, port: u16) -> Resolved {
        let (allow, host) = (Arc::clone(&self.allow), host.to_owned());
        Box::pin(async move { allow.resolve(&host, port).await })
    }

    fn path(&self, path: &Path) -> std::io::Result<()> {
        if self.is_local {
            return Ok(());
        }
        let text = format!("{} is on this machine, and the engine is not", path.display());
        Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_name_the_first_ranks_sockets_and_the_others_follow() {
        let named = |endpoint, first| Named {
            endpoint,
            replay: Some("tcp://10.0.0.1:6557"),
            topic: Some("kv"),
            first,
        };
        let sources = named("tcp://10.0.0.1:5557", None).of(2).unwrap();
        let second = &sources.ranks[1];
        assert_eq!(second.endpoint, Endpoint::parse("tcp://10.0.0.1:5558").unwrap());
        assert_eq!(second.replay, Some(Endpoint::parse("tcp://10.0.0.1:6558").unwrap()));
        assert_eq!((second.topic.as_str(), second.listens), ("kv", true));
        assert!(named("udp://x:1", None).of(1).is_err());
        assert!(named("tcp://x:65535", None).of(2).is_err());
        // A part of a larger engine, forwarded from elsewhere.
        let part = named("tcp://10.0.0.1:5557", Some("4")).of(2).unwrap();
        let second = part.of_rank(1, 2).unwrap();
        assert_eq!((second.rank, &second.endpoint), (5, &sources.ranks[1].endpoint));
        assert!(named("tcp://x:1", Some("-1")).of(1).is_err());
        assert!(named("tcp://x:1", Some("4294967295")).of(2).is_err());
    }

    #[test]
    fn a_file_is_used_only_if_the_engine_is_on_this_machine() {
        let path = Path::new("/run/kv.ipc");
        for (url, local) in [
            ("http://127.0.0.1:8000", true),
            ("http://[::1]:8000", true),
            ("http://localhost:8000", true),
            ("http://10.0.0.7:8000", false),
            ("http://engine:8000", false),
        ] {
            assert_eq!(OnlyAllowed::new(Arc::default(), url).path(path).is_ok(), local, "{url}");
        }
    }
}
