//! One look at the log for all who ask at the same time, and not too many of them: asking for
//! streams that do not exist costs the cluster next to nothing, however often it is done.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::cluster::api::ClusterError;

/// Least time between the beginnings of two looks: at most 500 a second for a replica. One that
/// comes alone waits for nothing.
const PACE: Duration = Duration::from_millis(2);

/// See the module.
#[derive(Default)]
pub(super) struct Together {
    /// Looks that were begun.
    begun: AtomicU64,
    turn: tokio::sync::Mutex<Option<Last>>,
}

/// The last look that came to an end.
struct Last {
    number: u64,
    began: Instant,
    outcome: Result<(), ClusterError>,
}

impl Together {
    /// Waits for a look that began after this call; makes one if nobody else does. Who waits when one
    /// begins has its outcome, whatever that is.
    pub(super) async fn pass<F>(&self, look: impl FnOnce() -> F) -> Result<(), ClusterError>
    where
        F: Future<Output = Result<(), ClusterError>>,
    {
        let before = self.begun.load(Ordering::Acquire);
        let mut turn = self.turn.lock().await;
        if let Some(last) = turn.as_ref() {
            if last.number > before {
                return last.outcome.clone();
            }
            sleep_until(last.began + PACE).await;
        }
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let began = Instant::now();
        let outcome = look().await;
        *turn = Some(Last { number, began, outcome: outcome.clone() });
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    /// As many calls as there are permits to come; counts its calls.
    async fn ask(together: &Together, looks: &AtomicUsize) -> Result<(), ClusterError> {
        together
            .pass(|| async {
                looks.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(10)).await;
                Ok(())
            })
            .await
    }

    #[tokio::test]
    async fn twenty_thousand_who_ask_at_once_cost_two_looks() {
        let (together, looks) = (Arc::<Together>::default(), Arc::<AtomicUsize>::default());
        let first = {
            let (together, looks) = (Arc::clone(&together), Arc::clone(&looks));
            tokio::spawn(async move { ask(&together, &looks).await })
        };
        tokio::task::yield_now().await;
        // All of these come while the first one looks: what it sees may be too old for them.
        let rest = (0..20_000).map(|_| ask(&together, &looks));
        let all = futures_util::future::join_all(rest).await;
        assert!(first.await.unwrap().is_ok() && all.into_iter().all(|answer| answer.is_ok()));
        assert_eq!(looks.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn one_after_the_other_they_are_made_to_wait_and_each_gets_a_look_of_its_own() {
        let (together, looks) = (Together::default(), AtomicUsize::new(0));
        let began = Instant::now();
        for _ in 0..100 {
            let look = || async {
                looks.fetch_add(1, Ordering::Relaxed);
                Ok(())
            };
            together.pass(look).await.unwrap();
        }
        assert_eq!(looks.load(Ordering::Relaxed), 100, "what is asked later must be looked at later");
        assert!(began.elapsed() >= PACE * 99);
    }

    #[tokio::test]
    async fn a_failure_is_shared_and_not_waited_for_again_by_each() {
        let together = Arc::<Together>::default();
        let began = Instant::now();
        let down = || async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(ClusterError::Down("x".to_owned()))
        };
        let all = futures_util::future::join_all((0..100).map(|_| together.pass(down))).await;
        assert!(all.into_iter().all(|answer| answer.is_err()));
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}
