//! Where an engine says that its feeds are: vLLM's `GET /kv_event_sources`, SGLang's
//! `GET /server_info`. Pure: the answers' bytes in, endpoints out.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::zmtp::Endpoint;

/// Ranks of one engine that are looked at.
pub const MOST_RANKS: u32 = 1024;

/// One rank's sockets.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RankSource {
    /// The DP rank.
    pub rank: u32,
    /// Live messages.
    pub endpoint: Endpoint,
    /// Whether the engine listens there; otherwise it connects there, and somebody has to listen.
    pub listens: bool,
    /// Messages again, if it has such a socket.
    pub replay: Option<Endpoint>,
    /// Topic of live messages.
    pub topic: String,
    /// Endpoint and topic of its load, if it publishes that.
    pub load: Option<(Endpoint, String)>,
}

/// All that an engine says of its feeds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sources {
    /// Its ranks, in order.
    pub ranks: Vec<RankSource>,
    /// Tokens in a block, where it says so.
    pub block_size: Option<u32>,
}

impl Sources {
    /// The source of a worker's rank, which is counted from 0, of `ranks` that it is registered with.
    /// An engine that is a part of a larger one numbers its ranks from elsewhere on: where there are as many
    /// in a row as the worker has, the lowest is the worker's first.
    pub fn of_rank(&self, rank: u32, ranks: u32) -> Option<&RankSource> {
        let (first, last) = self.ranks.first().zip(self.ranks.last())?;
        let in_a_row =
            self.ranks.len() == ranks as usize && u64::from(last.rank - first.rank) + 1 == u64::from(ranks);
        let wanted = if in_a_row { first.rank.checked_add(rank)? } else { rank };
        self.ranks.iter().find(|source| source.rank == wanted)
    }
}

#[derive(Deserialize)]
struct VllmSource {
    #[serde(default = "yes")]
    enable_kv_cache_events: bool,
    #[serde(default)]
    publisher: Option<String>,
    endpoint: Option<String>,
    replay_endpoint: Option<String>,
    #[serde(default)]
    topic: Option<String>,
    data_parallel_rank: Option<u32>,
}

fn yes() -> bool {
    true
}

/// Reads vLLM's `/kv_event_sources`: a map from rank to configuration, or a list of them that name their
/// ranks. `host` is where the worker is, for endpoints that stand for all its addresses.
pub fn vllm(body: &[u8], host: &str) -> Result<Sources, String> {
    let value: Value = serde_json::from_slice(body).map_err(|error| format!("no JSON: {error}"))?;
    let entries: Vec<(Option<u32>, Value)> = match value {
        Value::Object(map) => map.into_iter().map(|(rank, entry)| (rank.parse().ok(), entry)).collect(),
        Value::Array(list) => list.into_iter().map(|entry| (None, entry)).collect(),
        _ => return Err("neither a map nor a list of event sources".into()),
    };
    let mut ranks = BTreeMap::new();
    for (key, entry) in entries {
        let source: VllmSource =
            serde_json::from_value(entry).map_err(|error| format!("not an event source: {error}"))?;
        let rank = key.or(source.data_parallel_rank).filter(|rank| *rank < MOST_RANKS);
        let Some(rank) = rank else { return Err("an event source without a usable rank".into()) };
        let Some(endpoint) = source.endpoint else { continue };
        if !source.enable_kv_cache_events || source.publisher.is_some_and(|publisher| publisher != "zmq") {
            continue;
        }
        let read = |text: &str| Endpoint::parse(text).map_err(|error| error.to_string());
        // An engine that listens says the address it found for itself, which looks like one that
        // it connects to. Who made it connect to a router has told the router so.
        let listens = true;
        let endpoint = read(&endpoint)?.at_host(host);
        let replay = source.replay_endpoint.filter(|text| !text.is_empty());
        let replay = replay.map(|text| read(&text)).transpose()?.map(|endpoint| endpoint.at_host(host));
        let topic = source.topic.unwrap_or_default();
        ranks.insert(rank, RankSource { rank, endpoint, listens, replay, topic, load: None });
    }
    Ok(Sources { ranks: ranks.into_values().collect(), block_size: None })
}

#[derive(Deserialize)]
struct SglangInfo {
    kv_events: Option<SglangEvents>,
}

#[derive(Deserialize)]
struct SglangEvents {
    #[serde(default)]
    publisher: Option<String>,
    endpoint_host: String,
    endpoint_port_base: u16,
    #[serde(default)]
    bind: Option<bool>,
    #[serde(default)]
    topic: Option<String>,
    block_size: Option<u32>,
    dp_size: Option<u32>,
    replay_endpoint_port_base: Option<u16>,
    load_endpoint_port_base: Option<u16>,
    load_topic: Option<String>,
}

/// Reads SGLang's `/server_info`; an engine without events has no ranks.
pub fn sglang(body: &[u8], host: &str) -> Result<Sources, String> {
    let info: SglangInfo =
        serde_json::from_slice(body).map_err(|error| format!("not SGLang's server_info: {error}"))?;
    let Some(events) = info.kv_events else { return Ok(Sources::default()) };
    let block_size = events.block_size.filter(|size| *size > 0);
    if events.publisher.is_some_and(|publisher| publisher != "zmq") {
        return Ok(Sources { ranks: Vec::new(), block_size });
    }
    let at = |port: u16, rank: u32| {
        let place = Endpoint::Tcp { host: events.endpoint_host.clone(), port }.at_host(host);
        place.of_rank(rank).ok_or_else(|| format!("rank {rank} would be beyond port 65535"))
    };
    let wildcard = Endpoint::Tcp { host: events.endpoint_host.clone(), port: 1 }.is_wildcard();
    let topic = events.topic.unwrap_or_default();
    let load_topic = events.load_topic.unwrap_or_else(|| super::load::LOAD_TOPIC.to_owned());
    let ranks = (0..events.dp_size.unwrap_or(1).clamp(1, MOST_RANKS)).map(|rank| {
        let optional = |port: Option<u16>| port.map(|port| at(port, rank)).transpose();
        Ok(RankSource {
            rank,
            endpoint: at(events.endpoint_port_base, rank)?,
            listens: events.bind.unwrap_or(wildcard),
            replay: optional(events.replay_endpoint_port_base)?,
            topic: topic.clone(),
            load: optional(events.load_endpoint_port_base)?.map(|endpoint| (endpoint, load_topic.clone())),
        })
    });
    Ok(Sources { ranks: ranks.collect::<Result<_, String>>()?, block_size })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(text: &str) -> Endpoint {
        Endpoint::parse(text).unwrap()
    }

    #[test]
    fn vllm_tells_each_ranks_sockets() {
        let body = br#"{"1":{"enable_kv_cache_events":true,"publisher":"zmq","endpoint":"tcp://10.0.0.3:40001",
            "replay_endpoint":"tcp://*:40011","buffer_steps":10000,"hwm":100000,"max_queue_size":1,"topic":"kv"},
            "0":{"endpoint":"tcp://*:40000","replay_endpoint":null,"topic":""},
            "2":{"enable_kv_cache_events":false,"endpoint":"tcp://*:1"},"3":{"publisher":"null","endpoint":"tcp://*:1"}}"#;
        let ranks = vllm(body, "10.9.9.9").unwrap().ranks;
        assert_eq!(ranks.iter().map(|source| source.rank).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(ranks[0].endpoint, endpoint("tcp://10.9.9.9:40000"));
        assert_eq!((ranks[0].replay.clone(), ranks[0].topic.as_str()), (None, ""));
        assert_eq!(ranks[1].endpoint, endpoint("tcp://10.0.0.3:40001"));
        assert_eq!(ranks[1].replay, Some(endpoint("tcp://10.9.9.9:40011")));
        // The later form: a list.
        let list = br#"[{"data_parallel_rank":4,"endpoint":"tcp://10.0.0.1:5557","replay_endpoint":null,"topic":""}]"#;
        assert_eq!(vllm(list, "h").unwrap().ranks[0].rank, 4);
    }

    #[test]
    fn sglang_tells_ports_to_count_from() {
        let body = br#"{"model_path":"m","kv_events":{"publisher":"zmq","endpoint_host":"*","endpoint_port_base":5557,
            "topic":"","block_size":64,"dp_size":2,"replay_endpoint_port_base":5657,
            "load_endpoint_port_base":5757,"load_topic":"load"}}"#;
        let sources = sglang(body, "10.9.9.9").unwrap();
        assert_eq!((sources.block_size, sources.ranks.len()), (Some(64), 2));
        let second = &sources.ranks[1];
        assert_eq!(second.endpoint, endpoint("tcp://10.9.9.9:5558"));
        assert!(second.listens);
        assert_eq!(second.replay, Some(endpoint("tcp://10.9.9.9:5658")));
        assert_eq!(second.load, Some((endpoint("tcp://10.9.9.9:5758"), "load".into())));
        assert_eq!(sglang(b"{}", "h").unwrap(), Sources::default());
    }

    #[test]
    fn a_part_of_a_larger_engine_numbers_its_ranks_from_elsewhere_on() {
        let told = |ranks: &[u32]| {
            let entries: Vec<String> = ranks
                .iter()
                .map(|rank| format!(r#""{rank}":{{"endpoint":"tcp://*:{}"}}"#, 5557 + rank))
                .collect();
            vllm(format!("{{{}}}", entries.join(",")).as_bytes(), "h").unwrap()
        };
        let number = |sources: &Sources, rank, ranks| Some(sources.of_rank(rank, ranks)?.rank);
        assert_eq!(number(&told(&[3]), 0, 1), Some(3));
        assert_eq!([0, 1, 2].map(|rank| number(&told(&[4, 5]), rank, 2)), [Some(4), Some(5), None]);
        // All of them, or none: by their numbers.
        assert_eq!([0, 1].map(|rank| number(&told(&[0, 1, 2, 3]), rank, 2)), [Some(0), Some(1)]);
        assert_eq!([0, 1].map(|rank| number(&told(&[1, 3]), rank, 2)), [None, Some(1)]);
        assert_eq!(number(&told(&[1]), 0, 2), None);
        assert_eq!(number(&Sources::default(), 0, 1), None);
    }

    #[test]
    fn anything_else_is_an_error_that_says_what() {
        for (body, says) in [
            (&b"Not Found"[..], "no JSON"),
            (b"7", "neither a map nor a list"),
            (br#"{"0":{"endpoint":"inproc://x"}}"#, "is no endpoint"),
            (br#"{"x":{"endpoint":"tcp://*:1"}}"#, "without a usable rank"),
        ] {
            let error = vllm(body, "h").unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let beyond = br#"{"kv_events":{"endpoint_host":"*","endpoint_port_base":65535,"dp_size":2}}"#;
        assert!(sglang(beyond, "h").unwrap_err().contains("65535"));
    }
}
