//! A request to a route that is answered here, and who answers it.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Method};
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use super::auth::NodeGrant;
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::keys::Caller;
use super::register::read_json;
use super::routes::{Listener, MaxBody, Route, parameter_of, percent_decoded};
use super::streams::operators;
use super::{admin, explain, health, ksana, models, nodes, openapi};
use crate::ids::WorkerId;

/// A request whose route was found and whose credentials are good.
pub(super) struct Call {
    pub(super) shard: Arc<Shard>,
    pub(super) listener: Listener,
    pub(super) route: Route,
    pub(super) head: http::request::Parts,
    pub(super) body: Incoming,
    pub(super) caller: Caller,
    pub(super) node: NodeGrant,
    /// It showed a capability for the stream that it asks for, and no key.
    pub(super) by_capability: bool,
}

impl Call {
    /// The query, without its question mark.
    pub(super) fn query(&self) -> Option<&str> {
        self.head.uri.query()
    }

    /// The method, with HEAD as the GET it stands for.
    pub(super) fn method(&self) -> &Method {
        if self.head.method == Method::HEAD { &Method::GET } else { &self.head.method }
    }

    /// What the path has in place of the route's parameter, decoded.
    pub(super) fn parameter(&self) -> Option<String> {
        percent_decoded(parameter_of(self.route.path(), self.head.uri.path())?)
    }

    /// The worker that the path names.
    pub(super) fn worker_id(&self) -> Result<WorkerId, ApiError> {
        let invalid = |why: String| ApiError::new(Code::InvalidValue, why).param("id");
        let id = self
            .parameter()
            .ok_or_else(|| invalid("the worker id in the path is not valid text".to_owned()))?;
        WorkerId::parse(&id).map_err(invalid)
    }

    /// The JSON body, as large as the route table allows.
    pub(super) async fn json<T: DeserializeOwned>(self) -> Result<T, ApiError> {
        let max = match self.route.entry().map(|entry| entry.max_body) {
            Some(MaxBody::Bytes(bytes)) => bytes,
            Some(MaxBody::Configured) => self.shard.front.config.proxy.body.max_bytes,
            Some(MaxBody::None) | None => 0,
        };
        read_json(self.body, max).await
    }

    /// Answers it.
    pub(super) async fn answer(self) -> Response {
        let answered = match self.route {
            Route::Models => Ok(self.list_models()),
            Route::Model => self.show_model(),
            Route::Nodes | Route::Node | Route::Heartbeat => nodes::answer(self).await,
            Route::AdminStatus
            | Route::AdminWorkers
            | Route::AdminWorker
            | Route::AdminDrain
            | Route::AdminStop
            | Route::AdminMembers
            | Route::AdminIndex
            | Route::AdminNames
            | Route::AdminKeys => admin::answer(self).await,
            Route::AdminKsana | Route::AdminKsanaNode => ksana::admin::answer(self).await,
            Route::AdminExplain => explain::answer(self).await,
            Route::AdminStreams | Route::AdminStream | Route::AdminStreamCancel => {
                operators::answer(self).await
            }
            Route::Livez => Ok(health::livez().await.into_response()),
            Route::Readyz => {
                let query = RawQuery(self.query().map(str::to_owned));
                Ok(health::readyz(State(self.shard), query).await)
            }
            Route::Metrics => Ok(health::metrics(State(self.shard)).await),
            Route::OpenApi => Ok(self.describe()),
            Route::ChatCompletions
            | Route::Completions
            | Route::Embeddings
            | Route::Responses
            | Route::Messages
            | Route::Rerank
            | Route::Score
            | Route::Tokenize
            | Route::Detokenize
            | Route::Streams
            | Route::Stream
            | Route::StreamCancel
            | Route::StreamToken
            | Route::Response
            | Route::ResponseCancel
            | Route::Generate
            | Route::PassThrough
            | Route::KsanaRegister
            | Route::KsanaHeartbeat
            | Route::KsanaCommId
            | Route::KsanaGenerate
            | Route::KsanaV1
            | Route::KsanaV2
            | Route::KsanaDocs
            | Route::KsanaRedoc
            | Route::Unknown => Err(misrouted(self.route)),
        };
        answered.unwrap_or_else(IntoResponse::into_response)
    }

    fn list_models(&self) -> Response {
        let view = self.shard.front.control.registry();
        Json(models::list(&view, |model| self.caller.may_use(model))).into_response()
    }

    fn show_model(&self) -> Result<Response, ApiError> {
        let invalid = || ApiError::new(Code::InvalidValue, "the model in the path is not valid text");
        let name = self.parameter().ok_or_else(|| invalid().param("model"))?;
        // Who may not use it does not learn whether it is there.
        self.caller.check_model(Some(&name))?;
        let found = models::show(&self.shard.front.control.registry(), &name);
        found.map(|model| Json(model).into_response()).ok_or_else(|| {
            let text =
                "no worker that can take requests serves this model; GET /v1/models lists what is served";
            ApiError::new(Code::ModelNotFound, text).param("model")
        })
    }

    fn describe(&self) -> Response {
        let config = &self.shard.front.config;
        let document = openapi::document(self.listener, config.metrics_on_client, config.edge.is_some());
        let json = HeaderValue::from_static("application/json");
        ([(CONTENT_TYPE, json)], document.to_string()).into_response()
    }
}

/// The table and the dispatch disagree.
pub(super) fn misrouted(route: Route) -> ApiError {
    ApiError::new(Code::Internal, format!("nobody answers {} here", route.path()))
}
