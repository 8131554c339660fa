//! The HTTP client of the name services: bounded in time and size, no redirects, one set of authorities.

use std::error::Error as _;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as Pooled;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use crate::tls::{TlsError, client_config};

/// Longest time to connect.
const CONNECT: Duration = Duration::from_secs(3);
/// A connection on which nothing comes is asked whether it is there after this time.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// Why a name service did not say what was asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Trouble {
    /// It cannot be reached, or broke off.
    #[error("{0}")]
    Away(String),
    /// It answers, and refuses.
    #[error("{0}")]
    Refused(String),
    /// It answers with something else than it should.
    #[error("{0}")]
    Garbage(String),
    /// What it knows begins later than what was asked for: everything is to be asked anew. Not a fault.
    #[error("what has changed is not known any more")]
    Gone,
}

/// A client for one service.
#[derive(Debug)]
pub(super) struct Client {
    inner: Pooled<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Client {
    /// With the authorities of this file, or Mozilla's. Reads it.
    pub(super) fn new(ca: Option<&Path>) -> Result<Self, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(CONNECT));
        tcp.set_keepalive(Some(KEEP_ALIVE));
        tcp.set_nodelay(true);
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(client_config(ca)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        Ok(Self { inner: Pooled::builder(TokioExecutor::new()).build(connector) })
    }

    /// Sends a request and waits for the answer's head.
    pub(super) async fn begin(
        &self,
        request: Request<Full<Bytes>>,
        limit: Duration,
    ) -> Result<Response<Incoming>, Trouble> {
        let to = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        match tokio::time::timeout(limit, self.inner.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Trouble::Away(format!("cannot reach {to}: {}", cause(&error)))),
            Err(_) => Err(Trouble::Away(format!("{to} did not answer within {} s", limit.as_secs()))),
        }
    }

    /// The whole answer, all of it within `limit`.
    pub(super) async fn whole(
        &self,
        request: Request<Full<Bytes>>,
        most: usize,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), Trouble> {
        let to = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let exchange = async {
            let response = self.begin(request, limit).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), most).collect().await;
            let body =
                body.map_err(|error| Trouble::Away(format!("the answer of {to} broke off: {error}")))?;
            Ok((status, body.to_bytes()))
        };
        let late = Err(Trouble::Away(format!("{to} did not answer within {} s", limit.as_secs())));
        tokio::time::timeout(limit, exchange).await.unwrap_or(late)
    }
}

/// What is at the bottom of an error.
fn cause(error: &hyper_util::client::legacy::Error) -> String {
    if let Some(tls) = crate::tls::cause(error) {
        return tls.to_string();
    }
    let mut last = error.to_string();
    let mut next = error.source();
    while let Some(inner) = next {
        last = inner.to_string();
        next = inner.source();
    }
    last
}

/// The beginning of a text from outside, for a message.
pub(super) fn shown(text: &str) -> String {
    const MOST: usize = 200;
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST).collect();
    line.trim().to_owned()
}
