//! A small HTTP client for the admin API: five seconds, one answer, errors a person can act on.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::output::Failure;
use super::urls;
use crate::admin_types::ErrorReply;
use crate::tls::client_config;

/// How long connecting and answering may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer read.
const MAX_BODY: usize = 64 << 20;

/// Where the admin API is.
#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Server {
    /// Admin address of any replica
    #[arg(
        long,
        env = "EVERLINE_SERVER",
        hide_env_values = true,
        value_name = "URL",
        default_value = "http://127.0.0.1:8081"
    )]
    pub(crate) server: String,
    /// File with the admin token, if the replica wants one [default: EVERLINE_ADMIN_TOKEN]
    #[arg(long, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Authority that the certificate of an https server must be of (PEM) [default: Mozilla's list]
    #[arg(long, env = "EVERLINE_CA", hide_env_values = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

/// A question to a server, and how its answer is shown.
#[derive(clap::Args, Debug, Clone)]
pub(crate) struct Listing {
    #[command(flatten)]
    pub(crate) server: Server,
    /// As JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Listing {
    /// What stands there.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.server.client()?.get(path).await
    }
}

impl Server {
    /// A client with the token that was given, if any.
    pub(crate) fn client(&self) -> Result<Client, Failure> {
        let token = match &self.token_file {
            None => crate::config::admin_token(),
            Some(path) => Some(read_token("--token-file", path)?),
        };
        let client = Client::with_ca(&self.server, self.ca.as_deref())?;
        match token {
            None => Ok(client),
            Some(token) => client.with_token(token.trim()),
        }
    }
}

/// The first token in a file of tokens, such as `admin.token_file`.
pub(super) fn read_token(flag: &str, path: &Path) -> Result<String, Failure> {
    let name = path.display();
    let text = std::fs::read_to_string(path)
        .map_err(|e| Failure::Usage(format!("{flag}: cannot read {name}: {e}")))?;
    let mut tokens = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let token = tokens.next().map(str::to_owned);
    token.ok_or_else(|| Failure::Usage(format!("{flag}: {name} has no token in it")))
}

/// A connection pool to one server.
pub(crate) struct Client {
    base: String,
    timeout: Duration,
    /// The value of `Authorization`.
    authorization: Option<HeaderValue>,
    inner: hyper_util::client::legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Client {
    /// A client for `http://host:port` or `https://host:port`; http may be left out.
    pub(crate) fn new(server: &str) -> Result<Self, Failure> {
        Self::with_ca(server, None)
    }

    fn with_ca(server: &str, ca: Option<&Path>) -> Result<Self, Failure> {
        let base = base_of(server)?;
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(TIMEOUT));
        tcp.set_nodelay(true);
        let tls = client_config(ca).map_err(|e| Failure::Usage(format!("--ca: {e}")))?;
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let inner = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build(connector);
        Ok(Self { base, timeout: TIMEOUT, authorization: None, inner })
    }

    /// The same with an admin token.
    fn with_token(mut self, token: &str) -> Result<Self, Failure> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .map_err(|_| Failure::Usage("the admin token has characters that cannot be sent".to_owned()))?;
        value.set_sensitive(true);
        self.authorization = Some(value);
        Ok(self)
    }

    /// A client of another replica of the same cluster, with the same token and authority.
    pub(crate) fn of(&self, server: &str) -> Result<Self, Failure> {
        Ok(Self {
            base: base_of(server)?,
            timeout: self.timeout,
            authorization: self.authorization.clone(),
            inner: self.inner.clone(),
        })
    }

    /// The same with another time limit.
    pub(crate) fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// `GET path`, answered with JSON.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.call(Method::GET, path, None::<&()>).await
    }

    /// A request with an optional JSON body, answered with JSON.
    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Failure> {
        let (status, bytes) = self.raw(method.clone(), path, body).await?;
        if !status.is_success() {
            return Err(Failure::Failed(self.refusal(&method, path, status, &bytes)));
        }
        serde_json::from_slice(&bytes).map_err(|e| {
            let url = format!("{}{path}", self.base);
            Failure::Failed(format!(
                "{url} answered something else than expected ({e}); is it an Everline admin address?"
            ))
        })
    }

    /// A request, answered with whatever there is.
    pub(crate) async fn raw(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let body = match body {
            None => Bytes::new(),
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                serde_json::to_vec(body).map_err(|e| Failure::Failed(e.to_string()))?.into()
            }
        };
        let request = request
            .body(Full::new(body))
            .map_err(|e| Failure::Usage(format!("{}{path} is no URL: {e}", self.base)))?;
        let exchange = async {
            let reply = self.inner.request(request).await.map_err(|e| self.unreachable(&reason(&e)))?;
            let status = reply.status();
            let read = Limited::new(reply.into_body(), MAX_BODY).collect().await;
            let body = read.map_err(|e| self.unreachable(&format!("the answer broke off ({e})")))?;
            Ok((status, body.to_bytes()))
        };
        match tokio::time::timeout(self.timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(self.unreachable(&format!("no answer within {} s", self.timeout.as_secs_f32()))),
        }
    }

    fn unreachable(&self, why: &str) -> Failure {
        Failure::Unreachable(format!(
            "cannot reach {}: {why}; is a replica running there? name another with --server",
            self.base
        ))
    }

    fn refusal(&self, method: &Method, path: &str, status: StatusCode, body: &[u8]) -> String {
        match serde_json::from_slice::<ErrorReply>(body) {
            Ok(reply) => {
                let message = reply.error.message;
                // By the code, because a worker's address may be forbidden, too.
                match reply.error.code.as_deref() {
                    Some("unauthorized") => {
                        format!("{message}; give the admin token with --token-file or EVERLINE_ADMIN_TOKEN")
                    }
                    Some("forbidden") => format!(
                        "{message}; is what --token-file or EVERLINE_ADMIN_TOKEN gives one of the replica's admin.token_file?"
                    ),
                    Some("unknown_route") => {
                        format!("{message}; name the admin address (port 8081 by default) with --server")
                    }
                    _ => message,
                }
            }
            Err(_) => {
                format!("{method} {}{path} answered {status}; is it an Everline admin address?", self.base)
            }
        }
    }
}

/// A server's URL as requests need it.
fn base_of(server: &str) -> Result<String, Failure> {
    urls::base(server).map_err(|why| Failure::Usage(format!("--server {server}: {why}")))
}

fn reason(error: &hyper_util::client::legacy::Error) -> String {
    use rustls::{CertificateError, Error};
    match crate::tls::cause(error) {
        Some(Error::InvalidCertificate(CertificateError::UnknownIssuer)) => {
            return "its certificate is of an authority that is not trusted here (name the authority's file with --ca)"
                .to_owned();
        }
        Some(Error::InvalidMessage(_)) => return "it does not speak TLS (try http://)".to_owned(),
        Some(other) => return other.to_string(),
        None => {}
    }
    let mut cause = error.source();
    let mut last = error.to_string();
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>()
            && io.kind() == io::ErrorKind::ConnectionRefused
        {
            return "connection refused".to_owned();
        }
        if inner.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
            return "it does not answer in HTTP (if it speaks TLS, try https://)".to_owned();
        }
        last = inner.to_string();
        cause = inner.source();
    }
    last
}

/// Percent-encodes a path segment.
pub(crate) fn segment(text: &str) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~:".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
        out
    })
}

/// Runs a future on a runtime of this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(future)
}
