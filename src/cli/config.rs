//! `everline config`

use serde_json::json;

use super::output::{Failure, Out};
use super::serve::Sources;
use crate::config::{Config, default_toml, to_toml_with_origins};

/// Print, check and explain the configuration
///
/// Examples:
///   everline config default > everline.toml
///   everline config check --config everline.toml
///   everline config print --origins --set http.listen=127.0.0.1:9000
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Print the configuration that `serve` would run with
    Print {
        #[command(flatten)]
        sources: Box<Sources>,
        /// As JSON
        #[arg(long)]
        json: bool,
        /// With the place each value comes from
        #[arg(long)]
        origins: bool,
    },
    /// Report everything that is wrong; exit code 2 if anything is
    Check {
        #[command(flatten)]
        sources: Box<Sources>,
    },
    /// Print a commented file with every key at its default
    Default,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        match self.command {
            Command::Print { sources, json: true, origins: false } => out.json(&sources.load()?.config),
            Command::Print { sources, json: true, origins: true } => {
                let loaded = sources.load()?;
                out.json(&json!({ "config": loaded.config, "origins": loaded.origins }))
            }
            Command::Print { sources, json: false, origins } => {
                out.write(&to_toml_with_origins(&sources.load()?, origins))
            }
            Command::Check { sources } => {
                let loaded = sources.load()?;
                let config = &loaded.config;
                out.line(&format!(
                    "ok: replica {}, clients at {}, admin at {}, {}, {}",
                    config.replica.name,
                    config.http_url(),
                    config.admin_url(),
                    membership(config),
                    counted(config.worker.len(), "configured worker")
                ))
            }
            Command::Default => out.write(&default_toml()),
        }
    }
}

/// How the replica comes to its cluster, in a few words.
fn membership(config: &Config) -> String {
    match (config.cluster.peers.len(), config.cluster.join.as_slice()) {
        (0, []) => "a cluster of one".to_owned(),
        (0, addresses) => format!("joins the cluster at {}", addresses.join(", ")),
        (n, _) => counted(n, "founding member"),
    }
}

fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}
