//! `everline shim`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::output::{Failure, Out};
use crate::config::LogConfig;
use crate::shim::{Address, Settings, run};
use crate::tls::client_config;

/// Run a local proxy under which any client's streams outlive the replica that carries them
///
/// Point an unmodified client at it instead of at the cluster. Streams that break are asked for
/// again behind the last event, at the next address; the client sees a pause. Everything else
/// passes as it is. It keeps nothing, so run it where the client runs. SIGTERM lets what is in
/// flight end first.
///
/// Examples:
///   everline shim --upstream http://router.internal:8080
///   everline shim --upstream https://r1.internal:8443,https://r2.internal:8443 --ca ca.pem
///   OPENAI_BASE_URL=http://127.0.0.1:9099/v1 python3 my_program.py
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:9099")]
    listen: SocketAddr,
    /// The cluster's balancer or its replicas; several are tried in turn
    #[arg(long, value_name = "URL", required = true, value_delimiter = ',')]
    upstream: Vec<Address>,
    /// Authority that the certificates of https upstreams must be of (PEM) [default: Mozilla's list]
    #[arg(long, env = "EVERLINE_CA", hide_env_values = true, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Listen on an address that other machines reach; whoever does has the shim's reach of the cluster
    #[arg(long)]
    expose: bool,
    /// Seconds that a stream may make no progress while nobody can be reached
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    retry_budget: u64,
    /// Milliseconds of silence after which a stream's connection is dead: more than the heartbeats
    /// that the cluster sends
    #[arg(long, value_name = "MS", default_value_t = 8750, value_parser = clap::value_parser!(u64).range(100..=600_000))]
    stall_timeout_ms: u64,
    /// Largest request body that is kept to be sent again, in MiB
    #[arg(long, value_name = "MIB", default_value_t = 32, value_parser = clap::value_parser!(u64).range(1..=1024))]
    max_body_mib: u64,
    /// Seconds that what is in flight may take to end after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=3600))]
    drain_timeout: u64,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        if !self.listen.ip().is_loopback() && !self.expose {
            return Err(Failure::Usage(format!(
                "--listen {}: other machines reach this address, and the shim asks nobody for credentials of its own; listen on 127.0.0.1, or say --expose",
                self.listen
            )));
        }
        let tls = client_config(self.ca.as_deref()).map_err(|e| Failure::Usage(format!("--ca: {e}")))?;
        crate::serve::start_logging(&LogConfig::default());
        let settings = Settings {
            retry_budget: Duration::from_secs(self.retry_budget),
            stall_timeout: Duration::from_millis(self.stall_timeout_ms),
            max_body: usize::try_from(self.max_body_mib << 20)
                .map_err(|_| Failure::Usage("--max-body-mib: too much for this machine".to_owned()))?,
            drain_timeout: Duration::from_secs(self.drain_timeout),
            ..Settings::new(self.upstream, tls)
        };
        // Two threads: a burst of events of one stream does not hold up the others.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(async {
            let listener = TcpListener::bind(self.listen).await.map_err(|e| {
                Failure::Failed(format!(
                    "cannot listen on {}: {e}; choose another --listen address",
                    self.listen
                ))
            })?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            out.line(&format!("shim listening on http://{}", listener.local_addr()?))?;
            let stop = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            run(settings, listener, stop).await;
            Ok(())
        })
    }
}
