//! Every error the front answers with: one table of stable codes, one OpenAI-shaped body.

use std::borrow::Cow;

use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::body::FrontBody;
use super::routes::Dialect;
use crate::cluster::api::ClusterError;

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $status:ident, $kind:literal;)*) => {
        /// A stable error code; what each means and what to do is in `docs/reference/errors.md`.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Code { $($(#[$doc])* $name),* }

        impl Code {
            /// All codes, for the reference and its test.
            pub const ALL: &'static [Code] = &[$(Code::$name),*];

            /// The `code` member of the error object.
            pub fn as_str(self) -> &'static str {
                match self { $(Code::$name => $text),* }
            }

            /// The code that is called this.
            pub fn by_name(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|code| code.as_str() == name)
            }

            /// The HTTP status it is sent with.
            pub fn status(self) -> StatusCode {
                match self { $(Code::$name => StatusCode::$status),* }
            }

            /// The `type` member of the error object.
            pub fn kind(self) -> &'static str {
                match self { $(Code::$name => $kind),* }
            }
        }
    };
}

codes! {
    /// Not exactly one valid Host, or it differs from the request target's authority.
    InvalidHost = "invalid_host", BAD_REQUEST, "invalid_request_error";
    /// Content-Length beside Transfer-Encoding, or bare line feeds: the length is ambiguous.
    AmbiguousFraming = "ambiguous_framing", BAD_REQUEST, "invalid_request_error";
    /// The body is not a JSON object.
    InvalidJson = "invalid_json", BAD_REQUEST, "invalid_request_error";
    /// No `model`, or it is not text.
    MissingModel = "missing_model", BAD_REQUEST, "invalid_request_error";
    /// A member has a value that cannot be.
    InvalidValue = "invalid_value", BAD_REQUEST, "invalid_request_error";
    /// The body ended before its announced length.
    BodyTruncated = "body_truncated", BAD_REQUEST, "invalid_request_error";
    /// Nobody serves the model.
    ModelNotFound = "model_not_found", NOT_FOUND, "not_found_error";
    /// No such route.
    UnknownRoute = "unknown_route", NOT_FOUND, "not_found_error";
    /// The route exists, the method does not.
    MethodNotAllowed = "method_not_allowed", METHOD_NOT_ALLOWED, "invalid_request_error";
    /// The body is larger than allowed.
    BodyTooLarge = "body_too_large", PAYLOAD_TOO_LARGE, "invalid_request_error";
    /// The body did not arrive in time.
    BodyTimeout = "body_timeout", REQUEST_TIMEOUT, "invalid_request_error";
    /// A compressed request body.
    UnsupportedEncoding = "unsupported_encoding", UNSUPPORTED_MEDIA_TYPE, "invalid_request_error";
    /// Credentials are missing.
    Unauthorized = "unauthorized", UNAUTHORIZED, "authentication_error";
    /// Credentials are known not to be good enough.
    Forbidden = "forbidden", FORBIDDEN, "permission_error";
    /// The node token is for other networks or roles.
    TokenNotForThis = "token_not_for_this", FORBIDDEN, "permission_error";
    /// The client plane needs a key and none was sent.
    MissingApiKey = "missing_api_key", UNAUTHORIZED, "authentication_error";
    /// The key is unknown, or the headers name no single one.
    InvalidApiKey = "invalid_api_key", UNAUTHORIZED, "authentication_error";
    /// The key's time is over.
    ExpiredApiKey = "expired_api_key", UNAUTHORIZED, "authentication_error";
    /// The capability for a stream is not good for it, or not any more.
    BadCapability = "bad_capability", UNAUTHORIZED, "authentication_error";
    /// The key may not use the model.
    ModelNotAllowed = "model_not_allowed", FORBIDDEN, "permission_error";
    /// The key sends too many requests a second.
    RateLimitExceeded = "rate_limit_exceeded", TOO_MANY_REQUESTS, "rate_limit_error";
    /// The key has too many requests in flight.
    TooManyInFlight = "too_many_in_flight", TOO_MANY_REQUESTS, "rate_limit_error";
    /// A worker address outside `workers.allow`.
    AddressForbidden = "address_forbidden", FORBIDDEN, "permission_error";
    /// A live worker already has this id at another address.
    WorkerExists = "worker_exists", CONFLICT, "invalid_request_error";
    /// The cluster refused the change.
    Refused = "refused", CONFLICT, "invalid_request_error";
    /// No such worker.
    WorkerNotFound = "worker_not_found", NOT_FOUND, "not_found_error";
    /// A worker did not answer as an engine should when it was registered.
    ProbeFailed = "probe_failed", UNPROCESSABLE_ENTITY, "invalid_request_error";
    /// The registry is empty.
    NoWorkers = "no_workers", SERVICE_UNAVAILABLE, "server_error";
    /// Workers serve the model, none may be chosen now.
    NoWorkerAvailable = "no_worker_available", SERVICE_UNAVAILABLE, "server_error";
    /// All workers have as many requests as they should, and too many wait already.
    WorkersSaturated = "workers_saturated", TOO_MANY_REQUESTS, "rate_limit_error";
    /// No worker could be connected to.
    UpstreamConnectFailed = "upstream_connect_failed", BAD_GATEWAY, "server_error";
    /// A worker broke off or answered nonsense.
    UpstreamFailed = "upstream_failed", BAD_GATEWAY, "server_error";
    /// A worker did not answer in time.
    UpstreamTimeout = "upstream_timeout", GATEWAY_TIMEOUT, "server_error";
    /// No quorum of replicas, so the registry cannot be changed.
    ClusterUnavailable = "cluster_unavailable", SERVICE_UNAVAILABLE, "server_error";
    /// This replica does not take part in the cluster.
    ReplicaDown = "replica_down", SERVICE_UNAVAILABLE, "server_error";
    /// Too many connections.
    TooManyConnections = "too_many_connections", SERVICE_UNAVAILABLE, "server_error";
    /// `Last-Event-ID` or `after` is none of ours.
    BadEventId = "bad_event_id", BAD_REQUEST, "invalid_request_error";
    /// An idempotency key came with another request than the first time.
    IdempotencyKeyReused = "idempotency_key_reused", UNPROCESSABLE_ENTITY, "invalid_request_error";
    /// No such stream, or somebody else's.
    StreamNotFound = "stream_not_found", NOT_FOUND, "not_found_error";
    /// What is asked for of a stream is forgotten.
    StreamExpired = "stream_expired", GONE, "invalid_request_error";
    /// A stream that nobody can go on with.
    StreamLost = "stream_lost", GONE, "server_error";
    /// A stream that was cancelled.
    StreamCancelled = "cancelled", GONE, "invalid_request_error";
    /// An event id of an event that there has not been.
    CursorAhead = "cursor_ahead", PRECONDITION_FAILED, "invalid_request_error";
    /// Too many clients listen to one stream.
    TooManyListeners = "too_many_listeners", TOO_MANY_REQUESTS, "rate_limit_error";
    /// A fault of this program.
    Internal = "internal_error", INTERNAL_SERVER_ERROR, "server_error";
}

/// An error on its way to a client.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{}: {message}", .code.as_str())]
pub struct ApiError {
    /// Which.
    pub code: Code,
    /// What happened, why, and what to do next. Never holds any part of a prompt.
    pub message: Cow<'static, str>,
    /// The member of the request it is about.
    pub param: Option<Cow<'static, str>>,
    /// Seconds after which another attempt makes sense.
    pub retry_after: Option<u32>,
    /// The connection's framing is not to be trusted any more.
    pub close: bool,
    /// Asking again will not help, whatever the status says to a client that does by itself.
    pub is_final: bool,
    /// For [`Code::MethodNotAllowed`].
    pub allow: Option<Cow<'static, str>>,
    /// For [`Code::RateLimitExceeded`].
    pub rate_limit: Option<Box<RateLimit>>,
}

/// What `x-ratelimit-*` headers tell who was too fast; nothing remains then.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RateLimit {
    /// Requests that may come at once.
    pub requests: u32,
    /// Until that many may come again, such as `120ms` or `8.64s`.
    pub reset: String,
}

impl ApiError {
    /// An error with a message.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            message: message.into(),
            param: None,
            retry_after: None,
            close: false,
            is_final: false,
            allow: None,
            rate_limit: None,
        }
    }

    /// Names the member of the request that is at fault.
    pub fn param(mut self, param: impl Into<Cow<'static, str>>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// Adds `Retry-After`.
    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// Closes the connection after the answer.
    pub fn close(mut self) -> Self {
        self.close = true;
        self
    }

    /// Adds `x-should-retry: false`, which OpenAI's clients obey.
    pub fn no_retry(mut self) -> Self {
        self.is_final = true;
        self
    }

    /// For another process, which answers with it.
    pub(super) fn to_wire(&self) -> Vec<u8> {
        let wire = Wire {
            code: self.code.as_str().to_owned(),
            message: self.message.to_string(),
            param: self.param.as_deref().map(str::to_owned),
            retry_after: self.retry_after,
            is_final: self.is_final,
        };
        // Text and numbers can always be written.
        serde_json::to_vec(&wire).unwrap_or_default()
    }

    /// What another process would have answered with. A code of a later version is a failure like any
    /// other.
    pub(super) fn from_wire(bytes: &[u8]) -> Self {
        let Ok(wire) = serde_json::from_slice::<Wire>(bytes) else {
            return Self::new(
                Code::Internal,
                "a replica's refusal cannot be read; is it of another version?",
            );
        };
        Self {
            param: wire.param.map(Cow::Owned),
            retry_after: wire.retry_after,
            is_final: wire.is_final,
            ..Self::new(Code::by_name(&wire.code).unwrap_or(Code::UpstreamFailed), wire.message)
        }
    }

    /// The error object as JSON.
    pub fn json(&self) -> String {
        json!({"error": {
            "message": self.message,
            "type": self.code.kind(),
            "param": self.param,
            "code": self.code.as_str(),
        }})
        .to_string()
    }

    /// The error object as the clients of a route expect it.
    pub(super) fn json_in(&self, dialect: Dialect) -> String {
        match dialect {
            Dialect::OpenAi => self.json(),
            Dialect::Anthropic => json!({"type": "error", "error": {
                "type": anthropic_kind(self.code.status()),
                "message": self.message,
                "code": self.code.as_str(),
            }})
            .to_string(),
        }
    }

    /// The whole response.
    pub fn response(&self) -> Response<FrontBody> {
        self.response_in(Dialect::OpenAi)
    }

    /// The whole response, as the clients of a route expect it.
    pub fn response_in(&self, dialect: Dialect) -> Response<FrontBody> {
        let mut response = Response::new(FrontBody::full(self.json_in(dialect)));
        *response.status_mut() = self.code.status();
        self.add_headers(response.headers_mut());
        response
    }

    pub(super) fn add_headers(&self, headers: &mut http::HeaderMap) {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.is_final {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(allow) = self.allow.as_deref().and_then(|allow| HeaderValue::from_str(allow).ok()) {
            headers.insert(ALLOW, allow);
        }
        if let Some(limit) = &self.rate_limit {
            headers.insert("x-ratelimit-limit-requests", limit.requests.into());
            headers.insert("x-ratelimit-remaining-requests", HeaderValue::from_static("0"));
            if let Ok(reset) = HeaderValue::from_str(&limit.reset) {
                headers.insert("x-ratelimit-reset-requests", reset);
            }
        }
        if self.code.status() == StatusCode::UNAUTHORIZED {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
    }
}

/// An error between processes.
#[derive(Serialize, Deserialize)]
struct Wire {
    code: String,
    message: String,
    param: Option<String>,
    retry_after: Option<u32>,
    is_final: bool,
}

/// The `type` of Anthropic's error object for a status.
fn anthropic_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        400..500 => "invalid_request_error",
        _ => "api_error",
    }
}

impl axum::response::IntoResponse for ApiError {
    fn into_response(self) -> axum::response::Response {
        let mut response = Response::new(axum::body::Body::from(self.json()));
        *response.status_mut() = self.code.status();
        self.add_headers(response.headers_mut());
        response
    }
}

impl From<ClusterError> for ApiError {
    fn from(error: ClusterError) -> Self {
        let text = error.to_string();
        match error {
            ClusterError::Unavailable { .. } => ApiError::new(
                Code::ClusterUnavailable,
                format!("{text}; whether the change is made when there is a quorum again is not known: look before you repeat it, and see `everline status`"),
            )
            .retry_after(1),
            ClusterError::Overloaded { .. } => ApiError::new(Code::ClusterUnavailable, text).retry_after(1),
            ClusterError::Refused(_) => ApiError::new(Code::Refused, text),
            ClusterError::Down(_) => {
                ApiError::new(Code::ReplicaDown, format!("{text}; ask another replica")).retry_after(1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_at_another_process() {
        let error = ApiError::new(Code::ModelNotFound, "no such model").param("model").retry_after(3);
        for error in [error.clone(), error.no_retry()] {
            assert_eq!(ApiError::from_wire(&error.to_wire()), error);
        }
        assert_eq!(ApiError::from_wire(b"?").code, Code::Internal);
    }

    #[test]
    fn anthropic_clients_get_their_own_object() {
        let error = ApiError::new(Code::NoWorkers, "nobody");
        let object: serde_json::Value = serde_json::from_str(&error.json_in(Dialect::Anthropic)).unwrap();
        let inner = json!({"type": "overloaded_error", "message": "nobody", "code": "no_workers"});
        assert_eq!(object, json!({"type": "error", "error": inner}));
        assert_eq!(error.json_in(Dialect::OpenAi), error.json());
        assert_eq!(anthropic_kind(StatusCode::METHOD_NOT_ALLOWED), "invalid_request_error");
    }

    #[test]
    fn every_code_is_in_the_reference_with_its_status() {
        let reference = include_str!("../../docs/reference/errors.md");
        for code in Code::ALL {
            let row = format!("| `{}` | {} |", code.as_str(), code.status().as_u16());
            assert!(reference.contains(&row), "docs/reference/errors.md lacks the row {row}");
        }
        let rows = reference.lines().filter(|line| line.starts_with("| `")).count();
        assert_eq!(rows, Code::ALL.len(), "docs/reference/errors.md lists codes that do not exist");
    }
}
