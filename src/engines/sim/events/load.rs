//! SGLang's load socket: how much there is to do, when that changes and every second.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use rmp::encode::{ByteBuf, write_array_len, write_str, write_uint};
use tokio_util::task::AbortOnDropHandle;

use crate::engines::sim::engine::Engine;
use crate::zmtp::{Endpoint, Publisher};

/// How often is looked whether it changed.
const LOOK: Duration = Duration::from_millis(50);

/// How many looks without a change until it is said all the same: a second.
const PATIENCE: u32 = 20;

/// Messages that wait for a subscriber; an older load is worth nothing.
const QUEUE: usize = 16;

/// Publishes an engine's load until it is dropped.
pub struct LoadPublisher {
    endpoint: Endpoint,
    _task: AbortOnDropHandle<()>,
}

impl LoadPublisher {
    /// Listens at `--load-publish-endpoint`; nothing without that flag.
    pub async fn start(engine: &Arc<Engine>, host: IpAddr) -> anyhow::Result<Option<Self>> {
        let Some(endpoint) = engine.args.load_publish_endpoint.clone() else { return Ok(None) };
        let endpoint = super::of_rank(&endpoint, engine.rank)?.at_host(&host.to_string());
        let publisher = Publisher::bind(&endpoint, QUEUE)
            .await
            .with_context(|| format!("engine-sim cannot publish its load at {endpoint}"))?;
        let endpoint = publisher.endpoint().clone();
        let engine = Arc::downgrade(engine);
        let task = tokio::spawn(async move {
            let (mut sequence, mut said, mut looks) = (0_u64, None, 0);
            let mut ticks = tokio::time::interval(LOOK);
            loop {
                ticks.tick().await;
                let Some(engine) = engine.upgrade() else { return };
                let now = load(&engine);
                looks += 1;
                if said == Some(now) && looks < PATIENCE {
                    continue;
                }
                (said, looks) = (Some(now), 0);
                let number = Bytes::copy_from_slice(&sequence.to_be_bytes());
                publisher.send(vec![Bytes::from_static(b"load"), number, encode(&now)]);
                sequence += 1;
            }
        });
        Ok(Some(Self { endpoint, _task: AbortOnDropHandle::new(task) }))
    }

    /// Where it listens, with the port it got.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }
}

/// The fields of a `LoadStat` in their order; what is not simulated is 0.
fn load(engine: &Engine) -> [u64; 10] {
    let (stats, args) = (&engine.stats, &engine.args);
    let capacity = u64::from(args.blocks) * u64::from(args.block_size);
    let used = capacity * stats.kv_usage_ppm.get() / 1_000_000;
    let running = u64::from(args.max_running);
    [stats.running.get(), stats.waiting.get(), used, capacity, engine.rank.into(), 0, used, running, 0, 0]
}

fn encode(load: &[u64; 10]) -> Bytes {
    let mut out = ByteBuf::new();
    // Writing into memory does not fail.
    let _ = write_array_len(&mut out, 1 + load.len() as u32);
    let _ = write_str(&mut out, "LoadStat");
    for number in load {
        let _ = write_uint(&mut out, *number);
    }
    Bytes::from(out.into_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::event::LoadStat;

    #[test]
    fn a_load_is_written_as_recorded() {
        let recorded = [3, 1, 4096, 100_000, 0, 512, 6000, 256, 123_456, 789_000];
        let hex: String = encode(&recorded).iter().map(|byte| format!("{byte:02x}")).collect();
        let golden = "9ba84c6f6164537461740301cd1000ce000186a000cd0200cd1770cd0100ce0001e240ce000c0a08";
        assert_eq!(hex, golden);
        let stat = LoadStat::decode(&encode(&recorded)).unwrap();
        assert_eq!((stat.running, stat.waiting, stat.tokens, stat.rank), (3, 1, 4096, Some(0)));
    }
}
