//! `everline serve`, and the configuration flags it shares with `everline config`.

use std::path::PathBuf;

use super::output::Failure;
use crate::config::{Config, ConfigError, ConfigErrors, Loaded, Override, Role, variables};

/// Run a replica
///
/// Configuration comes from one TOML file, overridden by EVERLINE_<SECTION>__<KEY> in the
/// environment, overridden by flags. SIGTERM drains the replica and hands its leadership over
/// before it stops.
///
/// Examples:
///   everline serve                                   a cluster of one on 127.0.0.1:8080
///   everline serve --config everline.toml
///   everline serve --ksana-config config.ini         in the place of KsanaLLM's router, on port 9080
///   everline serve --name r2 --peers r1=10.0.0.1:8082,r2=10.0.0.2:8082,r3=10.0.0.3:8082 \
///                  --peer 10.0.0.2:8082 --set http.insecure=true
///   everline serve --name r4 --join 10.0.0.1:8082    come to an existing cluster
///   EVERLINE_PROXY__RETRIES=3 everline serve
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(flatten)]
    sources: Sources,
}

/// Where the configuration comes from, of whoever serves clients.
#[derive(clap::Args, Debug)]
pub(super) struct Common {
    /// Configuration file
    #[arg(long, short, env = "EVERLINE_CONFIG", hide_env_values = true, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,
    /// Client listener (http.listen)
    #[arg(long, value_name = "IP:PORT")]
    http: Option<String>,
    /// Listener for operators, health checks and metrics (admin.listen)
    #[arg(long, value_name = "IP:PORT")]
    admin: Option<String>,
    /// File of API keys, followed while it changes (http.keys_file)
    #[arg(long, value_name = "FILE")]
    keys_file: Option<String>,
    /// Form of log lines: auto, pretty or json (log.format)
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// What is logged, such as info or everline=debug (log.filter)
    #[arg(long, value_name = "FILTER")]
    log_filter: Option<String>,
    /// Set any key; may be given more than once
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

impl Common {
    /// What these flags say, and `own` ones: flag, key and value.
    pub(super) fn overrides(
        &self,
        own: &[(&str, &str, &Option<String>)],
    ) -> Result<Vec<Override>, ConfigErrors> {
        let common = [
            ("--http", "http.listen", &self.http),
            ("--admin", "admin.listen", &self.admin),
            ("--keys-file", "http.keys_file", &self.keys_file),
            ("--log-format", "log.format", &self.log_format),
            ("--log-filter", "log.filter", &self.log_filter),
        ];
        overrides(&[own, &common].concat(), &self.set)
    }
}

/// Where a replica's configuration comes from.
#[derive(clap::Args, Debug)]
pub(crate) struct Sources {
    #[command(flatten)]
    common: Common,
    /// Name of this replica (replica.name)
    #[arg(long)]
    name: Option<String>,
    /// Folder for the log, checkpoints and identity (replica.data_dir)
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// Peer listener (peer.listen)
    #[arg(long, value_name = "IP:PORT")]
    peer: Option<String>,
    /// Founding members, the same list on each of them (cluster.peers)
    #[arg(long, value_name = "NAME=HOST:PORT,...")]
    peers: Option<String>,
    /// Peer addresses of a cluster to join (cluster.join)
    #[arg(long, value_name = "HOST:PORT,...")]
    join: Option<String>,
    /// File with accepted node tokens, one a line (nodes.token_file)
    #[arg(long, value_name = "FILE")]
    node_token_file: Option<String>,
    /// File with accepted admin tokens, one a line (admin.token_file)
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<String>,
    /// Configuration file of KsanaLLM's router, taken as it is; all other sources count more
    #[arg(long, value_name = "FILE")]
    ksana_config: Option<PathBuf>,
}

impl Sources {
    /// Reads and checks the configuration.
    pub(crate) fn load(&self) -> Result<Loaded, Failure> {
        let (ksana, file) = (self.ksana_config.as_deref(), self.common.config.as_deref());
        Ok(Config::load_beside(Role::Replica, ksana, file, &mut variables(), &self.overrides()?)?)
    }

    fn overrides(&self) -> Result<Vec<Override>, ConfigErrors> {
        let named = [
            ("--name", "replica.name", &self.name),
            ("--data-dir", "replica.data_dir", &self.data_dir),
            ("--peer", "peer.listen", &self.peer),
            ("--peers", "cluster.peers", &self.peers),
            ("--join", "cluster.join", &self.join),
            ("--node-token-file", "nodes.token_file", &self.node_token_file),
            ("--admin-token-file", "admin.token_file", &self.admin_token_file),
        ];
        self.common.overrides(&named)
    }
}

/// What flags say, and `--set`.
pub(super) fn overrides(
    named: &[(&str, &str, &Option<String>)],
    set: &[String],
) -> Result<Vec<Override>, ConfigErrors> {
    let mut overrides = Vec::new();
    let mut errors = Vec::new();
    for (flag, key, value) in named {
        if let Some(value) = value {
            let (key, flag) = ((*key).to_owned(), (*flag).to_owned());
            overrides.push(Override { key, value: value.clone(), flag });
        }
    }
    for setting in set {
        match setting.split_once('=') {
            Some((key, value)) => overrides.push(Override {
                key: key.trim().to_owned(),
                value: value.to_owned(),
                flag: "--set".to_owned(),
            }),
            None => errors.push(
                ConfigError::about(setting, "is not section.key=value")
                    .fix("such as --set http.listen=127.0.0.1:9000"),
            ),
        }
    }
    if errors.is_empty() { Ok(overrides) } else { Err(ConfigErrors(errors)) }
}

impl Args {
    pub(crate) fn run(self) -> Result<(), Failure> {
        Ok(crate::serve::run(self.sources.load()?)?)
    }
}
