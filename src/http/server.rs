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
    serve(listener, front, Listener::Client, shutdown).await
}

/// Serves operators on `listener` until `shutdown`.
pub async fn serve_admin(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    serve(listener, front, Listener::Admin, shutdown).await
}

async fn serve(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    plane: Listener,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let announce = async {
        shutdown.cancelled().await;
        if plane == Listener::Client {
            front.draining.cancel();
        }
    };
    // Operators are few: they get no threads of their own.
    let threads = if plane == Listener::Client { front.config.accept.threads } else { 0 };
    let (ended, ()) =
        tokio::join!(accept::run(listener, Arc::clone(&front), plane, threads, shutdown.clone()), announce);
    ended
}
