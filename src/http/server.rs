//! The planes: which routes each listener has, and serving them until told to stop.

use std::io;
use std::sync::Arc;

use axum::routing::{any, get};
use axum::{Json, Router};
use http::Method;
use tokio_util::sync::CancellationToken;

use super::errors::{ApiError, Code};
use super::front::{Front, Shard};
use super::metrics::Route;
use super::{accept, admin, health, models, nodes};

/// Serves clients and nodes on `listener` until `shutdown`, then for the grace time what is in
/// flight.
pub async fn serve_client(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let announce = async {
        shutdown.cancelled().await;
        front.draining.cancel();
    };
    let threads = front.config.accept.threads;
    let (ended, ()) = tokio::join!(
        accept::run(listener, Arc::clone(&front), ClientPlane, threads, shutdown.clone()),
        announce
    );
    ended
}

/// Serves operators on `listener` until `shutdown`.
pub async fn serve_admin(
    listener: std::net::TcpListener,
    front: Arc<Front>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    accept::run(listener, front, AdminPlane, 0, shutdown).await
}

/// Routes of clients and nodes.
#[derive(Clone)]
struct ClientPlane;

impl accept::Serving for ClientPlane {
    fn router(&self, shard: &Arc<Shard>) -> Router {
        client_router(shard)
    }

    fn proxies(&self) -> bool {
        true
    }
}

/// Routes of operators.
#[derive(Clone)]
struct AdminPlane;

impl accept::Serving for AdminPlane {
    fn router(&self, shard: &Arc<Shard>) -> Router {
        finish(admin::router(shard).route("/metrics", get(health::metrics)), shard)
    }

    fn proxies(&self) -> bool {
        false
    }
}

fn client_router(shard: &Arc<Shard>) -> Router {
    let router = nodes::router(shard).route("/v1/models", get(list_models));
    // A POST to these never gets here: the proxy path takes it before the router.
    let router = [Route::ChatCompletions, Route::Completions, Route::Embeddings]
        .into_iter()
        .fold(router, |router, proxied| router.route(proxied.path(), any(only_post)));
    let router = if shard.front.config.metrics_on_client {
        router.route("/metrics", get(health::metrics))
    } else {
        router
    };
    finish(router, shard)
}

/// What every plane has: health routes and errors in one shape.
fn finish(router: Router<Arc<Shard>>, shard: &Arc<Shard>) -> Router {
    router
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .fallback(unknown_route)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(Arc::clone(shard))
}

async fn list_models(
    axum::extract::State(shard): axum::extract::State<Arc<Shard>>,
) -> Json<serde_json::Value> {
    Json(models::list(&shard.front.control.registry()))
}

async fn unknown_route() -> ApiError {
    let text = "there is no such route on this listener; clients use /v1/chat/completions, /v1/completions, \
                /v1/embeddings and /v1/models, operators the admin listener";
    ApiError::new(Code::UnknownRoute, text)
}

async fn only_post(method: Method) -> ApiError {
    ApiError { allow: Some("POST"), ..method_not_allowed(method).await }
}

async fn method_not_allowed(method: Method) -> ApiError {
    let method = if method.as_str().len() > 16 { "that method" } else { method.as_str() };
    ApiError::new(Code::MethodNotAllowed, format!("this route does not serve {method}"))
}
