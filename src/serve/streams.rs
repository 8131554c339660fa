//! How output streams are kept, from the configuration.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::Context as _;

use crate::config::{Config, Durability, Penalties};
use crate::http::{Rate, StreamOptions};
use crate::{relay, splice};

/// What carries streams between processes and generates those that are held here: links to others and
/// the connections to engines. Half as many threads as processors, since those of connections and of
/// consensus have work of the same moment: with one to a processor each event wakes two of them.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    let threads = std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).max(1));
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(threads).thread_name("streams").enable_all();
    builder.build().context("cannot start the runtime of streams")
}

/// How streams are kept between processes.
pub(crate) fn relay_options(config: &Config) -> relay::Options {
    let streams = &config.streams;
    relay::Options {
        durability: match streams.durability {
            Durability::Peer => relay::Durability::Peer,
            Durability::Local => relay::Durability::Local,
        },
        silence: Duration::from_millis(streams.holder_timeout_ms),
        takeover: Duration::from_millis(streams.takeover_timeout_ms),
        stream_bytes: streams.stream_bytes as usize,
        process_bytes: streams.replica_bytes as usize,
        most_listeners: streams.most_listeners,
    }
}

/// How they are generated and handed out.
pub(crate) fn stream_options(config: &Config) -> StreamOptions {
    let streams = &config.streams;
    let splice = splice::Options {
        strict_seed: streams.strict_seed,
        penalties: match streams.penalties {
            Penalties::Continue => splice::Penalties::Continue,
            Penalties::Fail => splice::Penalties::Fail,
        },
        max_continuations: streams.max_continuations,
        ..splice::Options::default()
    };
    let by_model: HashMap<String, splice::Options> = config
        .model
        .iter()
        .filter(|model| {
            model.reasoning.is_some() || model.reasoning_end.is_some() || model.tool_markers.is_some()
        })
        .map(|model| {
            let mut options = splice.clone();
            if let Some([opens, closes]) = &model.reasoning {
                options.reasoning = (opens.clone(), closes.clone());
            }
            options.reasoning_end = model.reasoning_end;
            if let Some(markers) = &model.tool_markers {
                options.tool_markers.clone_from(markers);
            }
            (model.name.clone(), options)
        })
        .collect();
    StreamOptions {
        splice,
        by_model,
        heartbeat: Duration::from_millis(streams.heartbeat_ms),
        orphan_grace: Duration::from_secs(streams.orphan_grace_s),
        keep: Duration::from_secs(streams.keep_s),
        guesses: Rate::new(streams.guesses_per_s.into(), streams.guesses_burst),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_of_the_configuration_are_those_of_the_code() {
        let config = Config::default();
        assert_eq!(format!("{:?}", relay_options(&config)), format!("{:?}", relay::Options::default()));
        assert_eq!(format!("{:?}", stream_options(&config)), format!("{:?}", StreamOptions::default()));
    }

    #[test]
    fn a_model_has_its_own_markers_and_everything_else_from_the_section() {
        let text = "[streams]\nmax_continuations = 1\n[[model]]\nname = 'm'\nreasoning = ['<a>', '</a>']\n\
                    [[model]]\nname = 'ends'\nreasoning_end = 7\n[[model]]\nname = 'plain'";
        let config: Config = toml::from_str(text).unwrap();
        let options = stream_options(&config);
        let mut named: Vec<_> = options.by_model.keys().collect();
        named.sort();
        assert_eq!(named, ["ends", "m"]);
        assert_eq!(
            (options.by_model["ends"].reasoning_end, options.by_model["m"].reasoning_end),
            (Some(7), None)
        );
        let (own, other) = (options.splice_of(Some("m"), Some(9)), options.splice_of(Some("plain"), None));
        assert_eq!((own.reasoning.1.as_str(), own.max_continuations, own.context), ("</a>", 1, Some(9)));
        assert_eq!((other.reasoning.1.as_str(), other.context), ("</think>", None));
    }
}
