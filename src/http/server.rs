//! The two listeners, and serving each until told to stop. What each has is in [`super::routes`].

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::accept;
use super::front::Front;
use super::routes::Listener;

/// Serves clients and nodes on `listener` until `shutdown`, then for the grace time what is in
/// flight.
pub async fn serve_client(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let announce = async {
        shutdown.cancelled().await;
        front.draining.cancel();
    };
    let threads = front.config.accept.threads;
    let (ended, ()) = tokio::join!(
        accept::run(listener, Arc::clone(&front), Listener::Client, threads, shutdown.clone()),
        announce
    );
    ended
}

/// Serves operators on `listener` until `shutdown`.
pub async fn serve_admin(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    accept::run(listener, front, Listener::Admin, 0, shutdown).await
}
