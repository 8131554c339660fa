//! Carries spans to the collector: one HTTP request after the other, on the thread that the
//! OpenTelemetry kit keeps for that, so that no thread that serves clients ever waits for it.

use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use parking_lot::Mutex;
use tokio::runtime::Runtime;

use crate::tls::{TlsError, client_config};

/// Most bytes read of an answer, which says no more than whether spans were taken.
const MOST_ANSWER: usize = 64 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Courier {
    /// Made by the thread that sends, and only driven while a request is under way: one that is
    /// made elsewhere might be dropped where that is forbidden.
    runtime: Mutex<Option<Runtime>>,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    timeout: Duration,
    failing: AtomicBool,
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl Courier {
    /// `ca` is the authority of a collector behind TLS, where that is not of Mozilla's list.
    pub(super) fn new(timeout: Duration, ca: Option<&Path>) -> Result<Self, TlsError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_connect_timeout(Some(timeout));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(client_config(ca)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        // Between two exports nobody would notice that a connection was closed.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Ok(Self { runtime: Mutex::default(), client, timeout, failing: AtomicBool::new(false) })
    }

    fn send(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let mut runtime = self.runtime.lock();
        let runtime = match &mut *runtime {
            Some(runtime) => runtime,
            none => none.insert(tokio::runtime::Builder::new_current_thread().enable_all().build()?),
        };
        runtime.block_on(self.exchange(request))
    }

    async fn exchange(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let whole = async {
            let (head, body) = self.client.request(request.map(Full::new)).await?.into_parts();
            let body = Limited::new(body, MOST_ANSWER).collect().await?.to_bytes();
            Ok(Response::from_parts(head, body))
        };
        match tokio::time::timeout(self.timeout, whole).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer within {} ms", self.timeout.as_millis()).into()),
        }
    }

    /// Says once that nothing arrives, and once that it does again.
    fn note(&self, answer: &Result<Response<Bytes>, HttpError>) {
        let why = match answer {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(answer.status().to_string()),
            Err(error) => Some(chain(&**error)),
        };
        match (self.failing.swap(why.is_some(), Ordering::Relaxed), why) {
            (false, Some(why)) => {
                tracing::warn!(%why, "the trace collector does not take spans; they are lost")
            }
            (true, None) => tracing::info!("the trace collector takes spans again"),
            _ => {}
        }
    }
}

/// An error with what caused it: hyper's own texts do not say.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

impl HttpClient for Courier {
    /// Blocks: it is called on a thread of its own only.
    fn send_bytes<'life0, 'async_trait>(&'life0 self, request: Request<Bytes>) -> Answer<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        let answer = self.send(request);
        self.note(&answer);
        Box::pin(std::future::ready(answer))
    }
}
