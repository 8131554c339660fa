//! A ROUTER socket that answers each connection by itself.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::endpoint::Listener;
use super::{Endpoint, Limits, Link, SocketType, ZmtpError};

/// Pause after a failed accept.
const PAUSE: Duration = Duration::from_millis(20);

/// Connections at once; the next one is closed.
const CONNECTIONS: usize = 256;

/// See the module. Dropping it closes everything.
pub struct Router {
    endpoint: Endpoint,
    closing: CancellationToken,
}

impl Router {
    /// Listens on `endpoint`, and has `answer` talk to whoever connects.
    pub async fn bind<F, A>(endpoint: &Endpoint, limits: Limits, answer: F) -> Result<Self, ZmtpError>
    where
        F: Fn(Link) -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), ZmtpError>> + Send + 'static,
    {
        Self::listen(endpoint, limits, CONNECTIONS, |_| true, answer).await
    }

    /// The same; connections that `admits` refuses are closed.
    pub async fn bind_for<F, A>(
        endpoint: &Endpoint,
        limits: Limits,
        admits: impl Fn(IpAddr) -> bool + Send + Sync + 'static,
        answer: F,
    ) -> Result<Self, ZmtpError>
    where
        F: Fn(Link) -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), ZmtpError>> + Send + 'static,
    {
        Self::listen(endpoint, limits, CONNECTIONS, admits, answer).await
    }

    /// The same as [`Router::bind`] for so many connections at once; the next one is closed.
    pub async fn bind_many<F, A>(
        endpoint: &Endpoint,
        limits: Limits,
        connections: usize,
        answer: F,
    ) -> Result<Self, ZmtpError>
    where
        F: Fn(Link) -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), ZmtpError>> + Send + 'static,
    {
        Self::listen(endpoint, limits, connections, |_| true, answer).await
    }

    async fn listen<F, A>(
        endpoint: &Endpoint,
        limits: Limits,
        connections: usize,
        admits: impl Fn(IpAddr) -> bool + Send + Sync + 'static,
        answer: F,
    ) -> Result<Self, ZmtpError>
    where
        F: Fn(Link) -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), ZmtpError>> + Send + 'static,
    {
        let listener = Listener::bind(endpoint).await?;
        let router = Self { endpoint: listener.endpoint().clone(), closing: CancellationToken::new() };
        // Ends with the router.
        let closing = router.closing.clone();
        tokio::spawn(accept(listener, limits, connections, admits, Arc::new(answer), closing));
        Ok(router)
    }

    /// Where it listens, with the port it got.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Stops listening and ends all connections.
    pub fn close(&self) {
        self.closing.cancel();
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.close();
    }
}

async fn accept<F, A>(
    listener: Listener,
    limits: Limits,
    connections: usize,
    admits: impl Fn(IpAddr) -> bool + Send + Sync + 'static,
    answer: Arc<F>,
    closing: CancellationToken,
) where
    F: Fn(Link) -> A + Send + Sync + 'static,
    A: Future<Output = Result<(), ZmtpError>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(connections));
    loop {
        let accepted = tokio::select! {
            accepted = Link::accept(&listener) => accepted,
            () = closing.cancelled() => return,
        };
        let Ok(incoming) = accepted else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        if incoming.peer().is_some_and(|peer| !admits(peer)) {
            tracing::debug!(peer = ?incoming.peer(), "not a network of workers");
            continue;
        }
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::debug!("too many clients");
            continue;
        };
        let (answer, closing) = (Arc::clone(&answer), closing.clone());
        tokio::spawn(async move {
            let answering = async { answer(incoming.shake(SocketType::Router, limits).await?).await };
            let ended = tokio::select! {
                ended = answering => ended,
                () = closing.cancelled() => return,
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "a client left");
            }
            drop(place);
        });
    }
}
