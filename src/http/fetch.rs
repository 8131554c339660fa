//! Small requests of our own to workers: health, models, metrics. Bounded in time and size.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::body::{BodyLimits, collect};
use super::upstream::{Endpoint, Pool, SendError};

/// Largest answer read: metrics of an engine with many ranks run to hundreds of KiB.
const MAX_ANSWER: usize = 4 << 20;

/// Why a fetch brought nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection could be made: nobody is there.
    #[error("{0}")]
    Connect(String),
    /// No answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// An answer with another status than 2xx.
    #[error("answered {0}")]
    Refused(http::StatusCode),
    /// An answer, but not a good one.
    #[error("{0}")]
    Bad(String),
}

/// `GET path` of a worker; an answer other than 2xx is an error. Redirects are not followed.
pub(super) async fn get(
    pool: &Pool,
    endpoint: &Endpoint,
    path: &str,
    limit: Duration,
) -> Result<Bytes, FetchError> {
    ask(pool, endpoint, path, None, limit).await
}

/// The same with `POST` and a body of JSON.
pub(super) async fn post(
    pool: &Pool,
    endpoint: &Endpoint,
    path: &str,
    json: Bytes,
    limit: Duration,
) -> Result<Bytes, FetchError> {
    ask(pool, endpoint, path, Some(json), limit).await
}

async fn ask(
    pool: &Pool,
    endpoint: &Endpoint,
    path: &str,
    json: Option<Bytes>,
    limit: Duration,
) -> Result<Bytes, FetchError> {
    let fetched = timeout(limit, async {
        let (status, body) = pool.fetch(endpoint, path, json).await.map_err(|error| match error {
            SendError::Connect(why) => FetchError::Connect(why),
            other => FetchError::Bad(other.to_string()),
        })?;
        if !status.is_success() {
            return Err(FetchError::Refused(status));
        }
        let limits = BodyLimits::of(MAX_ANSWER);
        collect(body, &limits).await.map_err(|error| FetchError::Bad(error.message.into()))
    });
    fetched.await.unwrap_or(Err(FetchError::Timeout(limit)))
}
