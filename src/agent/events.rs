//! The engine's KV events at addresses of the agent's own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::ingest::discover::RankSource;
use crate::ingest::forward::Forwarder;
use crate::serve::sources::{EVENTS, FIRST, REPLAY, TOPIC};
use crate::zmtp::Endpoint;

/// Tries to get an address that the last life of the same forwarder may still have.
const TRIES: u32 = 40;
const PAUSE: Duration = Duration::from_millis(50);

/// Forwards what the engine tells.
pub(super) struct Events {
    /// Where sockets are opened.
    ip: IpAddr,
    /// Under what name replicas reach them.
    host: String,
    /// The first rank's; the others' count up from here, then the replay sockets'. 0 takes free ones.
    port: u16,
    of: Vec<RankSource>,
    forwarders: Vec<Forwarder>,
}

impl Events {
    pub(super) fn new(ip: IpAddr, host: &str, port: u16) -> Self {
        Self { ip, host: host.to_owned(), port, of: Vec::new(), forwarders: Vec::new() }
    }

    /// Forwards these from now on; the labels say where.
    pub(super) async fn forward(
        &mut self,
        sources: Vec<RankSource>,
    ) -> Result<BTreeMap<String, String>, String> {
        if sources.iter().any(|source| !source.listens) {
            let text = "the engine connects to somebody with its KV events, so they cannot be forwarded; have it \
                        listen (an endpoint with *), or leave --kv-port out";
            return Err(text.to_owned());
        }
        if sources != self.of || self.forwarders.is_empty() {
            self.forwarders.clear();
            self.of.clear();
            let count = u16::try_from(sources.len()).map_err(|_| "too many ranks".to_owned())?;
            if self.port == 0 && count > 1 {
                return Err(format!(
                    "the engine has {count} data-parallel ranks, whose ports count up: give --kv-port, the first of \
                     {} free ones",
                    2 * u32::from(count)
                ));
            }
            for (n, source) in (0..).zip(&sources) {
                let (live, replay) = (self.at(n)?, self.at(n.saturating_add(count))?);
                self.forwarders.push(start(source, &live, &replay).await?);
            }
            self.of = sources;
        }
        Ok(self.labels())
    }

    fn at(&self, n: u16) -> Result<Endpoint, String> {
        let port = match self.port {
            0 => 0,
            first => first.checked_add(n).ok_or("--kv-port is too high for that many ranks")?,
        };
        Ok(Endpoint::Tcp { host: self.ip.to_string(), port })
    }

    fn labels(&self) -> BTreeMap<String, String> {
        let mut labels = BTreeMap::new();
        let (Some(first), Some(source)) = (self.forwarders.first(), self.of.first()) else { return labels };
        let mut put = |label: &str, endpoint: &Endpoint| {
            if let Endpoint::Tcp { port, .. } = endpoint {
                let reached = Endpoint::Tcp { host: self.host.clone(), port: *port };
                labels.insert(label.to_owned(), reached.to_string());
            }
        };
        put(EVENTS, first.endpoint());
        if let Some(replay) = first.replay_endpoint() {
            put(REPLAY, replay);
        }
        if !source.topic.is_empty() {
            labels.insert(TOPIC.to_owned(), source.topic.clone());
        }
        if source.rank > 0 {
            labels.insert(FIRST.to_owned(), source.rank.to_string());
        }
        labels
    }
}

async fn start(source: &RankSource, live: &Endpoint, replay: &Endpoint) -> Result<Forwarder, String> {
    let mut tries = 0;
    loop {
        match Forwarder::start(source, live, replay).await {
            Ok(forwarder) => return Ok(forwarder),
            Err(error) => {
                tries += 1;
                if tries == TRIES {
                    return Err(format!("cannot listen on {live} or {replay} (--kv-port): {error}"));
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}
