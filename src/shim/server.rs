//! Listening: connections and their bounds, what each request is, and the end of it all.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::forward::{Coming, Upload, full, pass};
use super::request::{Route, Trouble, wants_stream, without_hop_by_hop};
use super::resume::Dialect;
use super::stream::Exchange;
use super::upstream::AnyBody;
use super::{Settings, Shared};

/// Pause after an `accept` that failed, which it does when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// After everything was cut off, how long telling clients and the cluster of it may take.
const AFTER_CUT: Duration = Duration::from_secs(3);

/// Serves until `stop` is ready; then what is in flight may end within `drain_timeout`.
pub async fn run(settings: Settings, listener: TcpListener, stop: impl Future<Output = ()>) {
    let shared = Shared::new(settings);
    let closing = CancellationToken::new();
    accept(&shared, &closing, listener, stop).await;
    closing.cancel();
    shared.tasks.close();
    if timeout(shared.settings.drain_timeout, shared.tasks.wait()).await.is_err() {
        tracing::warn!(left = shared.tasks.len(), "what is still in flight is cut off");
        shared.cut.cancel();
        let _ = timeout(AFTER_CUT, shared.tasks.wait()).await;
    }
}

/// Takes connections until `stop` is ready; the listener is closed then.
async fn accept(
    shared: &Arc<Shared>,
    closing: &CancellationToken,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) {
    let slots = Arc::new(Semaphore::new(shared.settings.max_connections));
    tokio::pin!(stop);
    loop {
        let accepted = async {
            // The semaphore is never closed, so that this waits and does not fail.
            let slot = Arc::clone(&slots).acquire_owned().await.ok()?;
            Some((listener.accept().await, slot))
        };
        tokio::select! {
            () = &mut stop => return,
            accepted = accepted => match accepted {
                Some((Ok((stream, _)), slot)) => {
                    let (shared, closing) = (Arc::clone(shared), closing.clone());
                    let tasks = shared.tasks.clone();
                    tasks.spawn(Box::pin(async move {
                        connection(shared, closing, stream).await;
                        drop(slot);
                    }));
                }
                Some((Err(error), _)) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
                None => return,
            },
        }
    }
}

async fn connection(shared: Arc<Shared>, closing: CancellationToken, stream: TcpStream) {
    let _ = stream.set_nodelay(true);
    let cut = shared.cut.clone();
    let settings = &shared.settings;
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(settings.request_head_timeout)
        .max_buf_size(settings.max_head.max(8192));
    let service = {
        let shared = Arc::clone(&shared);
        service_fn(move |request| {
            let shared = Arc::clone(&shared);
            async move { Ok::<_, Infallible>(serve(&shared, request).await) }
        })
    };
    let served = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(served);
    let ended = tokio::select! {
        ended = &mut served => Some(ended),
        () = closing.cancelled() => None,
    };
    if ended.is_some() {
        // What went wrong between a client and us is told by nobody but the client.
        return;
    }
    served.as_mut().graceful_shutdown();
    tokio::select! {
        _ = &mut served => {}
        () = async { cut.cancelled().await; sleep(AFTER_CUT).await } => {}
    }
}

async fn serve(shared: &Arc<Shared>, request: Request<Incoming>) -> Response<AnyBody> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let headers = without_hop_by_hop(&parts.headers);
    let route = Route::of(&parts.method, path.path(), &headers);
    let dialect = route.as_ref().map_or(Dialect::OpenAi, |route| route.dialect);
    let passed = match route {
        None => {
            let upload = Upload::Coming(Coming::new(body, shared.settings.idle_timeout));
            Box::pin(pass(shared, parts.method, &path, headers, upload)).await
        }
        Some(route) => match read(shared, body).await {
            Err((status, trouble)) => return refusal(status, dialect, &trouble),
            Ok(content) if wants_stream(&content) => {
                Box::pin(Exchange::new(shared, route, path.clone(), &headers, content).begin()).await
            }
            Ok(content) => Box::pin(pass(shared, parts.method, &path, headers, Upload::Read(content))).await,
        },
    };
    passed.unwrap_or_else(|trouble| {
        tracing::warn!(path = path.path(), why = trouble.message, "a request failed");
        refusal(StatusCode::BAD_GATEWAY, dialect, &trouble)
    })
}

/// Reads a body that is kept to be sent again.
async fn read(shared: &Arc<Shared>, body: Incoming) -> Result<Bytes, (StatusCode, Trouble)> {
    let Settings { max_body, idle_timeout, .. } = shared.settings;
    let whole = Limited::new(Coming::new(body, idle_timeout), max_body).collect();
    // The body comes from beside us; as a whole it may take as long as a pause within it.
    match timeout(idle_timeout, whole).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            let message =
                format!("the body is larger than {max_body} bytes; raise --max-body-mib of the shim");
            Err((StatusCode::PAYLOAD_TOO_LARGE, Trouble::new("body_too_large", message)))
        }
        Ok(Err(error)) => Err((StatusCode::BAD_REQUEST, Trouble::new("body_truncated", error.to_string()))),
        Err(_) => {
            let message = format!("the body took longer than {idle_timeout:?}");
            Err((StatusCode::REQUEST_TIMEOUT, Trouble::new("body_timeout", message)))
        }
    }
}

fn refusal(status: StatusCode, dialect: Dialect, trouble: &Trouble) -> Response<AnyBody> {
    let mut response = Response::new(full(trouble.body(dialect)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if status != StatusCode::BAD_GATEWAY {
        // What is left of the body is not read.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
