//! The two listeners, and serving each until told to stop. What each has is in [`super::routes`].

use std::io;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::accept;
use super::front::{Front, Shard};
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
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let announce = async {
        shutdown.cancelled().await;
        if plane == Listener::Client {
            front.draining.cancel();
        }
    };
    let shard = Shard::new(Arc::clone(&front));
    tokio::join!(accept::run(listener, shard, plane, shutdown.clone()), announce);
    Ok(())
}
