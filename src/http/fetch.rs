//! Small requests of our own to workers: health, models, metrics. Bounded in time and size.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::Full;
use tokio::time::timeout;

use super::body::{BodyLimits, collect};
use super::upstream::{Pool, SendError};

/// Largest answer read: metrics of an engine with many ranks run to hundreds of KiB.
const MAX_ANSWER: usize = 4 << 20;

/// Why a fetch brought nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum FetchError {
    /// No connection could be made: nobody is there.
    #[error("{0}")]
    Connect(String),
    /// No answer in time.
    #[error("no answer within {} ms", .0.as_millis())]
    Timeout(Duration),
    /// An answer, but not a good one.
    #[error("{0}")]
    Bad(String),
}

/// `GET url + path`; an answer other than 2xx is an error. Redirects are not followed.
pub(super) async fn get(pool: &Pool, url: &str, path: &str, limit: Duration) -> Result<Bytes, FetchError> {
    let fetched = timeout(limit, async {
        let uri: Uri =
            format!("{url}{path}").parse().map_err(|_| FetchError::Bad("not a valid url".into()))?;
        let mut request = Request::new(Full::new(Bytes::new()));
        *request.uri_mut() = uri;
        let mut answer = pool.send(request.clone()).await;
        if matches!(answer, Err(SendError::Stale)) {
            answer = pool.send(request).await;
        }
        let response = answer.map_err(|error| match error {
            SendError::Connect(why) => FetchError::Connect(why),
            other => FetchError::Bad(other.to_string()),
        })?;
        let status: StatusCode = response.status();
        if !status.is_success() {
            return Err(FetchError::Bad(format!("answered {status}")));
        }
        let limits = BodyLimits::of(MAX_ANSWER);
        collect(response.into_body(), &limits).await.map_err(|error| FetchError::Bad(error.message.into()))
    });
    fetched.await.unwrap_or(Err(FetchError::Timeout(limit)))
}
