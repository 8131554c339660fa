//! HTTP/2 streams that can be given up. hyper does not look at a stream while its client has no room
//! for more of it, so nothing that its body says ends one: what was read for it would stay in memory
//! for as long as the connection does, and a connection may have many.
//!
//! Each stream is a task. Whoever makes its body takes note of that task, and aborts it; what hyper
//! held of the stream is dropped, and h2 resets it.

use std::future::Future;
use std::sync::{Arc, OnceLock};

use hyper::rt::Executor;
use tokio::task::AbortHandle;

tokio::task_local! {
    static THIS: H2Stream;
}

/// Runs hyper's tasks for HTTP/2 streams.
#[derive(Clone, Copy, Debug)]
pub(super) struct Streams;

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        let this = H2Stream::default();
        // Ends with the stream, or its connection.
        let task = tokio::spawn(THIS.scope(this.clone(), stream));
        // Nobody else sets it; and nobody gives a stream up as soon as it has begun.
        let _ = this.0.set(task.abort_handle());
    }
}

/// A stream's task.
#[derive(Clone, Default, Debug)]
pub(super) struct H2Stream(Arc<OnceLock<AbortHandle>>);

impl H2Stream {
    /// The one that this is called for; `None` outside of one.
    pub(super) fn this() -> Option<Self> {
        THIS.try_with(Clone::clone).ok()
    }

    /// Resets it.
    pub(super) fn give_up(&self) {
        if let Some(task) = self.0.get() {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_is_known_within_its_task_and_dropped_when_it_is_given_up() {
        let (tell, told) = tokio::sync::oneshot::channel();
        let (alive, gone) = tokio::sync::oneshot::channel::<()>();
        Streams.execute(async move {
            let _alive = alive;
            assert!(tell.send(H2Stream::this()).is_ok());
            std::future::pending::<()>().await;
        });
        let stream = told.await.unwrap().expect("it is one");
        assert!(H2Stream::this().is_none());
        stream.give_up();
        assert!(gone.await.is_err(), "what it held is dropped");
    }
}
