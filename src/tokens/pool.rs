//! The threads that tokenise, apart from those that move bytes.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use parking_lot::Mutex;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce() + Send>;

/// A fixed number of threads behind a queue of a fixed length. They end when the pool is dropped,
/// after what is queued.
#[derive(Debug)]
pub struct Pool {
    queue: Option<SyncSender<Job>>,
    refused: AtomicU64,
}

impl Pool {
    /// `threads` threads, at least one, and a queue of `waiting` jobs.
    pub fn new(threads: usize, waiting: usize) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel::<Job>(waiting);
        let jobs = Arc::new(Mutex::new(jobs));
        for number in 0..threads.max(1) {
            let jobs = Arc::clone(&jobs);
            thread::Builder::new().name(format!("tokens-{number}")).spawn(move || work(&jobs))?;
        }
        Ok(Self { queue: Some(queue), refused: AtomicU64::new(0) })
    }

    /// Has `job` done by one of the threads. `None` at once if the queue is full, and later if
    /// the job panicked.
    pub async fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (done, result) = oneshot::channel();
        let job = Box::new(move || {
            // Nobody waits any more for a request that was given up.
            if !done.is_closed() {
                let _ = done.send(job());
            }
        });
        if self.queue.as_ref()?.try_send(job).is_err() {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        result.await.ok()
    }

    /// Jobs that found the queue full.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        // The lock is held while waiting: one thread waits for a job, the others for it.
        let job = jobs.lock().recv();
        let Ok(job) = job else { return };
        // A tokenizer that panics over a text costs that request its prefix, not the thread.
        let _ = catch_unwind(AssertUnwindSafe(job));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_queue_refuses_at_once_and_a_panic_ends_one_job_only() {
        let pool = Arc::new(Pool::new(1, 1).unwrap());
        let (release, gate) = std::sync::mpsc::channel::<()>();
        let (started, running) = oneshot::channel();
        let first = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move {
                pool.run(move || {
                    let _ = started.send(());
                    let _ = gate.recv();
                    1
                })
                .await
            }
        });
        running.await.unwrap();
        let mut second = Box::pin(pool.run(|| 2));
        assert!(futures_util::poll!(&mut second).is_pending());
        assert_eq!(pool.run(|| 3).await, None);
        assert_eq!(pool.refused(), 1);
        release.send(()).unwrap();
        assert_eq!(first.await.unwrap(), Some(1));
        assert_eq!(second.await, Some(2));
        assert_eq!(pool.run(|| -> u32 { panic!("on purpose") }).await, None);
        assert_eq!(pool.run(|| 4).await, Some(4));
    }
}
