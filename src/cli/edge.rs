//! `everline edge`

use super::output::Failure;
use super::serve::Common;
use crate::config::{Config, Role, variables};

/// Run an edge: a stateless process that takes clients' requests
///
/// Streams are held by replicas and outlive edges as well as replicas; everything else is passed on
/// to a replica. An edge keeps nothing on disk and has no vote, so that as many can run as clients
/// need. It reads the configuration of a replica, of which it uses what is about clients:
/// cluster.peers or cluster.join say where replicas are, the certificate of [peer] shows them that it
/// belongs to the cluster. SIGTERM drains it.
///
/// Examples:
///   everline edge --replicas 127.0.0.1:8082 --http 127.0.0.1:8090 --admin 127.0.0.1:8091
///   everline edge --config everline.toml --name edge-1
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    common: Common,
    /// Name of this edge, in Everline-Replica and in its certificate (replica.name) [default: edge]
    #[arg(long)]
    name: Option<String>,
    /// Peer listeners of some replicas, which name the others (cluster.join)
    #[arg(long, value_name = "HOST:PORT,...")]
    replicas: Option<String>,
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let named = [("--name", "replica.name", &self.name), ("--replicas", "cluster.join", &self.replicas)];
        let overrides = self.common.overrides(&named)?;
        let file = self.common.config.as_deref();
        let loaded = Config::load_as(Role::Edge, file, &mut variables(), &overrides)?;
        Ok(crate::serve::edge::run(&loaded.config)?)
    }
}
