//! `everline balancer`

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use super::client::block_on;
use super::output::{Failure, Out};
use crate::balancer::{Balancer, Settings};

/// Run the TCP balancer that the demo puts in front of its replicas
///
/// Round robin over the backends that accept connections and answer 200 to the check. In
/// production use the balancer you have.
///
/// Example:
///   everline balancer --listen 127.0.0.1:8080 --backend 127.0.0.1:9001 --backend 127.0.0.1:9002
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:8080")]
    listen: SocketAddr,
    /// Where connections go; may be given more than once
    #[arg(long, value_name = "IP:PORT", required = true, value_delimiter = ',')]
    backend: Vec<SocketAddr>,
    /// Milliseconds between two health checks of a backend
    #[arg(long, value_name = "MS", default_value_t = 250, value_parser = clap::value_parser!(u64).range(10..=60_000))]
    check_interval_ms: u64,
    /// What a check asks each backend for, by HTTP; empty: that it accepts is enough
    #[arg(long, value_name = "PATH", default_value = "/readyz")]
    check_path: String,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        block_on(async {
            let listener = TcpListener::bind(self.listen)
                .await
                .map_err(|e| Failure::Failed(format!("cannot listen on {}: {e}", self.listen)))?;
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            out.line(&format!("balancer listening on {}", listener.local_addr()?))?;
            let settings = Settings {
                backends: self.backend,
                check_interval: Duration::from_millis(self.check_interval_ms),
                check_path: Some(self.check_path).filter(|path| !path.is_empty()),
                ..Settings::default()
            };
            let stop = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            Balancer::new(settings).run(listener, stop).await;
            Ok(())
        })
    }
}
