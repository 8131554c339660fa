//! What can be set about a node of a KsanaLLM fleet.

use std::net::SocketAddr;
use std::time::Duration;

use clap::Args;

/// Flags that only matter with `--pd ksana`; named as in KsanaLLM's `setting.connector`.
#[derive(Args, Clone, Debug)]
pub struct KsanaArgs {
    /// The router that a KsanaLLM node registers with: host:port, or a URL.
    #[arg(long, value_name = "ADDRESS")]
    pub router_addr: Option<String>,
    /// Name of its cluster; empty for the router's.
    #[arg(long, value_name = "NAME", default_value = "")]
    pub cluster_name: String,
    /// Address of the HTTP listener of its group's first node, which is the group's name [default: its own].
    #[arg(long, value_name = "HOST:PORT")]
    pub inference_addr: Option<String>,
    /// Where other nodes reach it; port 0 takes a free one [default: a free port beside its own].
    #[arg(long, value_name = "IP:PORT")]
    pub coordinator_addr: Option<SocketAddr>,
    /// Which node of its group it is; only the first answers requests.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub node_rank: u32,
    /// Devices of this node.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub devices: u32,
    /// Devices of all nodes of its group together [default: those of this one].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub world_size: Option<u32>,
    /// Milliseconds between two heartbeats.
    #[arg(long, value_name = "MS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(10..))]
    pub heartbeat_interval_ms: u64,
}

impl KsanaArgs {
    /// Devices of the whole group.
    pub fn world(&self) -> u32 {
        self.world_size.unwrap_or(self.devices)
    }

    /// Time between two heartbeats.
    pub fn heartbeat_interval(&self) -> Duration {
        Duration::from_millis(self.heartbeat_interval_ms)
    }

    /// The router as `host:port`.
    pub fn router(&self) -> Option<&str> {
        let address = self.router_addr.as_deref()?;
        Some(address.strip_prefix("http://").unwrap_or(address).trim_end_matches('/'))
    }
}
