//! Connections to the cluster: kept ones for first requests, a new one for every resumption, so
//! that a balancer may choose another replica for it.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, Request, Response, Uri, header};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};

use super::Settings;

/// An error inside a body.
pub(super) type BoxError = Box<dyn StdError + Send + Sync>;
/// Any body.
pub(super) type AnyBody = UnsyncBoxBody<Bytes, BoxError>;

/// Idle connections kept for an address.
const MAX_IDLE: usize = 64;
/// How long they are kept: less than servers do, so that a request seldom meets one just closing.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Where the cluster, or one of its replicas, is: `http://host:port` or `https://host:port`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    scheme: Scheme,
    authority: Authority,
}

/// A text that is no [`Address`].
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no address of a cluster; write it like http://127.0.0.1:8080, without a path")]
pub struct AddressError(String);

/// Whether it names a host, and a port from 1 to 65535 or none.
fn is_place(authority: &Authority) -> bool {
    let host = authority.host();
    let is_host = !host.is_empty()
        && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%[]:".contains(&byte));
    is_host
        && match authority.port_u16() {
            Some(port) => port > 0,
            // Neither a credential nor a port that is none.
            None => authority.as_str() == host,
        }
        && !authority.as_str().contains('@')
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let refused = || AddressError(text.to_owned());
        let with_scheme = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let parts = with_scheme.parse::<Uri>().map_err(|_| refused())?.into_parts();
        // What is behind a # is left out without a word.
        let is_bare = parts.path_and_query.is_none_or(|path| path == "/") && !text.contains('#');
        // A single word is rather a mistake than a host: without a scheme there must be a port.
        let is_said = |authority: &Authority| text.contains("://") || authority.port().is_some();
        match (parts.scheme, parts.authority) {
            (Some(scheme), Some(authority))
                if is_bare
                    && (scheme == Scheme::HTTP || scheme == Scheme::HTTPS)
                    && is_place(&authority)
                    && is_said(&authority) =>
            {
                Ok(Self { scheme, authority })
            }
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

impl Address {
    /// A path at this address.
    fn uri(&self, path: &PathAndQuery) -> Result<Uri, http::Error> {
        let parts = Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone());
        parts.path_and_query(path.clone()).build()
    }
}

/// How a request failed before the head of its answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    /// Nobody was connected to; nothing was sent.
    #[error("cannot connect to {address}: {why}")]
    Unsent {
        /// Where to.
        address: Address,
        /// Why.
        why: String,
    },
    /// The connection broke or was silent; the request may have been received.
    #[error("{address} did not answer: {why}")]
    Broken {
        /// Who.
        address: Address,
        /// Why.
        why: String,
    },
}

/// The clients, one for each way of connecting.
#[derive(Debug)]
pub(super) struct Upstream {
    addresses: Vec<Address>,
    pooled: Client<HttpsConnector<HttpConnector>, AnyBody>,
    fresh: Client<HttpsConnector<HttpConnector>, AnyBody>,
}

/// One request on its way.
#[derive(Debug)]
pub(super) struct Call<'a> {
    /// Whose turn it is.
    pub(super) turn: usize,
    /// What is asked for.
    pub(super) path: &'a PathAndQuery,
    /// On a connection of its own.
    pub(super) fresh: bool,
    /// Longest time to the head of the answer.
    pub(super) head_timeout: Duration,
}

impl Upstream {
    pub(super) fn new(settings: &Settings) -> Self {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(settings.connect_timeout));
        tcp.set_nodelay(true);
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(settings.tls.clone())
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = |idle: usize| {
            Client::builder(TokioExecutor::new())
                .pool_max_idle_per_host(idle)
                .pool_idle_timeout(IDLE_TIMEOUT)
                .pool_timer(TokioTimer::new())
                .timer(TokioTimer::new())
                .http1_max_buf_size(settings.max_head.max(8192))
                .build(https.clone())
        };
        Self { addresses: settings.upstreams.clone(), pooled: client(MAX_IDLE), fresh: client(0) }
    }

    /// Whose turn `turn` is.
    pub(super) fn address(&self, turn: usize) -> &Address {
        &self.addresses[turn % self.addresses.len()]
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(
        &self,
        call: Call<'_>,
        method: http::Method,
        headers: HeaderMap,
        body: AnyBody,
    ) -> Result<Response<Incoming>, SendError> {
        let address = self.address(call.turn);
        let unsent = |why: String| SendError::Unsent { address: address.clone(), why };
        let broken = |why: String| SendError::Broken { address: address.clone(), why };
        let mut request = Request::new(body);
        *request.method_mut() = method;
        *request.uri_mut() = address.uri(call.path).map_err(|e| unsent(e.to_string()))?;
        *request.headers_mut() = headers;
        // The client names the shim; each address has a name of its own.
        request.headers_mut().remove(header::HOST);
        let client = if call.fresh { &self.fresh } else { &self.pooled };
        match tokio::time::timeout(call.head_timeout, client.request(request)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) if error.is_connect() => Err(unsent(reason(&error))),
            Ok(Err(error)) => Err(broken(reason(&error))),
            Err(_) => Err(broken(format!("silent for {:?}", call.head_timeout))),
        }
    }
}

/// What lies at the bottom of an error.
pub(super) fn reason(error: &(dyn StdError + 'static)) -> String {
    if let Some(tls) = crate::tls::cause(error) {
        return format!("{tls} (an authority of your own is named with --ca)");
    }
    let mut last = error;
    while let Some(inner) = last.source() {
        if let Some(io) = inner.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::ConnectionRefused
        {
            return "connection refused".to_owned();
        }
        last = inner;
    }
    last.to_string()
}
