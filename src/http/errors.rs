//! Every error the front answers with: one table of stable codes, one OpenAI-shaped body.

use std::borrow::Cow;

use http::header::{ALLOW, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, Response, StatusCode};
use serde_json::json;

use super::body::FrontBody;
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
    /// For [`Code::MethodNotAllowed`].
    pub allow: Option<&'static str>,
}

impl ApiError {
    /// An error with a message.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), param: None, retry_after: None, close: false, allow: None }
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

    /// The whole response.
    pub fn response(&self) -> Response<FrontBody> {
        let mut response = Response::new(FrontBody::full(self.json()));
        *response.status_mut() = self.code.status();
        self.add_headers(response.headers_mut());
        response
    }

    fn add_headers(&self, headers: &mut http::HeaderMap) {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        if self.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(allow) = self.allow {
            headers.insert(ALLOW, HeaderValue::from_static(allow));
        }
        if self.code == Code::Unauthorized {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
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
