//! `--kv-events-config`: what engines take, read as they read it.

use clap::ValueEnum;
use serde::Deserialize;

use crate::zmtp::Endpoint;

/// How events are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EventFormat {
    /// As vLLM has since 0.24: maps.
    VllmMap,
    /// As vLLM had until 0.23: lists.
    VllmArray,
    /// As SGLang has since 0.5.20: maps, with signed hashes.
    Sglang,
}

/// What comes before the number of a replayed batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReplayLayout {
    /// The topic: vLLM since 0.26, SGLang since 0.5.22.
    Topic,
    /// Nothing.
    Plain,
}

/// Where and how KV events are published.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KvEventsConfig {
    /// vLLM publishes nothing without it; SGLang has no such switch.
    pub enable_kv_cache_events: bool,
    /// `zmq`, or `null` for none.
    pub publisher: Option<String>,
    /// Where to publish.
    pub endpoint: String,
    /// SGLang's word on whether to listen there.
    pub bind: Option<bool>,
    /// Where to answer replays.
    pub replay_endpoint: Option<String>,
    /// Batches kept for them.
    pub buffer_steps: usize,
    /// Batches that wait for a subscriber.
    pub hwm: usize,
    /// Accepted and told; batches are written at once here.
    pub max_queue_size: usize,
    /// The topic.
    pub topic: String,
    /// Accepted: `default`.
    pub format: Option<String>,
}

impl Default for KvEventsConfig {
    fn default() -> Self {
        Self {
            enable_kv_cache_events: false,
            publisher: None,
            endpoint: "tcp://*:5557".into(),
            bind: None,
            replay_endpoint: None,
            buffer_steps: 10_000,
            hwm: 100_000,
            max_queue_size: 100_000,
            topic: String::new(),
            format: None,
        }
    }
}

impl KvEventsConfig {
    /// Reads the flag.
    pub fn parse(text: &str) -> Result<Self, String> {
        let config: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        match config.publisher.as_deref() {
            None | Some("zmq" | "null") => {}
            Some(other) => return Err(format!("publisher must be \"zmq\" or \"null\", not {other:?}")),
        }
        for endpoint in [Some(&config.endpoint), config.replay_endpoint.as_ref()].into_iter().flatten() {
            Endpoint::parse(endpoint).map_err(|error| error.to_string())?;
        }
        if config.buffer_steps == 0 || config.hwm == 0 {
            return Err("buffer_steps and hwm must be above 0".into());
        }
        Ok(config)
    }

    /// Whether anything is to be published.
    pub fn publishes(&self) -> bool {
        match self.publisher.as_deref() {
            Some("null") => false,
            Some(_) if self.bind.is_some() => true,
            _ => self.enable_kv_cache_events,
        }
    }

    /// Whether the engine listens at its endpoint, or connects to somebody there.
    pub fn binds(&self, format: EventFormat) -> bool {
        let text = &self.endpoint;
        let wildcard = text.contains('*') || text.contains("::") || text.starts_with("ipc://");
        self.bind.unwrap_or(wildcard || (format == EventFormat::Sglang && text.contains("0.0.0.0")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_is_read_as_engines_read_it() {
        let parse = KvEventsConfig::parse;
        let plain = parse(r#"{"enable_kv_cache_events":true}"#).unwrap();
        assert!(plain.publishes() && plain.binds(EventFormat::VllmMap));
        assert_eq!((plain.endpoint.as_str(), plain.buffer_steps), ("tcp://*:5557", 10_000));
        assert!(!parse("{}").unwrap().publishes());
        let out = parse(r#"{"enable_kv_cache_events":true,"endpoint":"tcp://127.0.0.1:1"}"#).unwrap();
        assert!(!out.binds(EventFormat::VllmMap));
        let any = parse(r#"{"enable_kv_cache_events":true,"endpoint":"tcp://0.0.0.0:1"}"#).unwrap();
        assert!(!any.binds(EventFormat::VllmMap) && any.binds(EventFormat::Sglang));
        let told = parse(r#"{"publisher":"zmq","bind":true,"endpoint":"tcp://127.0.0.1:1"}"#).unwrap();
        assert!(told.publishes() && told.binds(EventFormat::Sglang));
    }

    #[test]
    fn mistakes_in_the_flag_are_named() {
        for (text, says) in [
            ("{", "EOF"),
            (r#"{"endpiont":"x"}"#, "endpiont"),
            (r#"{"endpoint":"inproc://x"}"#, "is no endpoint"),
            (r#"{"publisher":"kafka"}"#, "publisher must be"),
            (r#"{"hwm":0}"#, "above 0"),
        ] {
            let error = KvEventsConfig::parse(text).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
