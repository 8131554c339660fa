//! Waiting for something to become true, never for time to pass.

use std::time::{Duration, Instant};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(10);

/// Looks until `look` says `Ok` and returns that and how long it took; panics with its last
/// complaint after `limit`.
pub async fn until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<T, String>,
) -> (T, Duration) {
    let started = Instant::now();
    loop {
        match look().await {
            Ok(found) => return (found, started.elapsed()),
            Err(why) if started.elapsed() > limit => {
                panic!("waited {} ms for {what}: {why}", limit.as_millis());
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// `Ok` when true, else the complaint.
pub fn check(ok: bool, complaint: impl FnOnce() -> String) -> Result<(), String> {
    if ok { Ok(()) } else { Err(complaint()) }
}
