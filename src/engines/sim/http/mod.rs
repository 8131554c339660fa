//! Routes of the simulated engine, in vLLM's dialect.

mod anthropic;
pub mod error;
mod gathered;
mod logprobs;
mod metrics;
mod models;
mod reply;
pub mod request;
mod responses;
mod scoring;
pub mod shape;
mod simulator;
pub mod stream;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{Method, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use self::anthropic::Messages;
use self::error::ApiError;
use self::request::{Request, Route};
use self::responses::Responses;
use self::shape::Shaper;
use self::stream::{Dialect, EventStream, ReplyBody, ResetFlag, Running};
use super::engine::{Engine, Refusal, unix_time};
use super::faults::Health;
use super::options::EngineSimArgs;

/// Longest accepted request body.
const MAX_BODY: usize = 64 << 20;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// A reply before its common headers are put on.
pub(crate) struct Reply {
    status: StatusCode,
    content_type: Option<&'static str>,
    body: ReplyBody,
    allow: Option<&'static str>,
}

impl Reply {
    fn new(status: StatusCode, content_type: Option<&'static str>, body: impl Into<Bytes>) -> Self {
        Self { status, content_type, body: ReplyBody::Full(Some(body.into())), allow: None }
    }

    fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self::new(status, Some("application/json"), body)
    }

    fn ok(value: &impl serde::Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::json(StatusCode::OK, body),
            Err(error) => {
                Self::error(&ApiError::with_status(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
            }
        }
    }

    fn empty(status: StatusCode) -> Self {
        Self::new(status, None, Bytes::new())
    }

    fn error(error: &ApiError) -> Self {
        Self::json(error.status, error.body())
    }

    fn events(stream: EventStream) -> Self {
        Self {
            status: StatusCode::OK,
            content_type: Some("text/event-stream; charset=utf-8"),
            body: ReplyBody::Events(Box::new(stream)),
            allow: None,
        }
    }
}

/// The routes and the one method of each; `/ping` takes two.
const ROUTES: &[(&str, &str)] = &[
    ("/v1/chat/completions", "POST"),
    ("/v1/completions", "POST"),
    ("/v1/responses", "POST"),
    ("/v1/messages", "POST"),
    ("/v1/embeddings", "POST"),
    ("/v1/rerank", "POST"),
    ("/rerank", "POST"),
    ("/v1/score", "POST"),
    ("/score", "POST"),
    ("/v1/models", "GET"),
    ("/tokenize", "POST"),
    ("/detokenize", "POST"),
    ("/health", "GET"),
    ("/ping", "GET, POST"),
    ("/version", "GET"),
    ("/load", "GET"),
    ("/metrics", "GET"),
    ("/kv_event_sources", "GET"),
    ("/server_info", "GET"),
    ("/reset_prefix_cache", "POST"),
    ("/inference/v1/abort_requests", "POST"),
    ("/sim/faults", "GET, POST"),
    ("/sim/stats", "GET"),
];

/// Answers one request. The error cuts the connection.
pub async fn serve(
    engine: Arc<Engine>,
    reset: ResetFlag,
    request: http::Request<Incoming>,
) -> io::Result<Response<ReplyBody>> {
    let (parts, body) = request.into_parts();
    let client_id = parts.headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok()).map(ToOwned::to_owned);
    let path = parts.uri.path();
    let reply = match ROUTES.iter().find(|(route, _)| *route == path) {
        None => Reply::json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#),
        Some((_, methods)) if !methods.split(", ").any(|method| method == parts.method.as_str()) => {
            let reply = Reply::json(StatusCode::METHOD_NOT_ALLOWED, r#"{"detail":"Method Not Allowed"}"#);
            Reply { allow: Some(methods), ..reply }
        }
        Some(_) => match read_body(body).await {
            Ok(body) => dispatch(&engine, &reset, &parts.method, path, &body, client_id.as_deref()).await?,
            Err(error) => Reply::error(&error),
        },
    };
    Ok(with_headers(reply, client_id))
}

async fn read_body(body: Incoming) -> Result<Bytes, ApiError> {
    match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(ApiError::with_status(StatusCode::PAYLOAD_TOO_LARGE, "Request body too large"))
        }
        Err(error) => Err(ApiError::bad_request(error.to_string(), None)),
    }
}

async fn dispatch(
    engine: &Arc<Engine>,
    reset: &ResetFlag,
    method: &Method,
    path: &str,
    body: &[u8],
    client_id: Option<&str>,
) -> io::Result<Reply> {
    Ok(match path {
        "/v1/chat/completions" => generate(engine, reset, Asked::Chat, body, client_id).await?,
        "/v1/completions" => generate(engine, reset, Asked::Completions, body, client_id).await?,
        "/v1/responses" => generate(engine, reset, Asked::Responses, body, client_id).await?,
        "/v1/messages" => generate(engine, reset, Asked::Messages, body, client_id).await?,
        "/v1/embeddings" | "/v1/rerank" | "/rerank" | "/v1/score" | "/score" => {
            match (inference_fault(engine, reset)?, path) {
                (Some(reply), _) => reply,
                (None, "/v1/embeddings") => models::embeddings(engine, body, client_id),
                (None, "/v1/score" | "/score") => scoring::score(engine, body, client_id),
                (None, _) => scoring::rerank(engine, body, client_id),
            }
        }
        "/v1/models" => models::list(engine),
        "/tokenize" => models::tokenize(engine, body),
        "/detokenize" => models::detokenize(engine, body),
        "/health" | "/ping" => health(engine).await,
        "/version" => Reply::json(StatusCode::OK, format!(r#"{{"version":"{}"}}"#, shape::VERSION)),
        "/load" => {
            Reply::json(StatusCode::OK, format!(r#"{{"server_load":{}}}"#, engine.stats.server_load.get()))
        }
        "/metrics" => {
            let text = metrics::render(engine);
            Reply::new(StatusCode::OK, Some("text/plain; version=1.0.0; charset=utf-8"), text)
        }
        "/reset_prefix_cache" => {
            let success = engine.reset_prefix_cache().await;
            Reply::json(StatusCode::OK, format!(r#"{{"success":{success}}}"#))
        }
        "/kv_event_sources" => models::kv_event_sources(engine),
        "/server_info" => models::server_info(engine),
        "/inference/v1/abort_requests" => simulator::abort_requests(engine, body),
        "/sim/stats" => simulator::stats(engine),
        _ if *method == Method::POST => simulator::set_faults(engine, body),
        _ => Reply::ok(&engine.faults()),
    })
}

async fn health(engine: &Engine) -> Reply {
    let faults = engine.faults();
    if faults.engine_dead || faults.health == Health::Fail {
        return Reply::empty(StatusCode::SERVICE_UNAVAILABLE);
    }
    if faults.health == Health::Hang {
        std::future::pending::<()>().await;
    }
    Reply::empty(StatusCode::OK)
}

/// What the fault switches make of an inference request, if anything.
fn inference_fault(engine: &Engine, reset: &ResetFlag) -> io::Result<Option<Reply>> {
    let faults = engine.faults();
    if faults.reset {
        return Err(stream::reset_connection(reset));
    }
    let status = faults.error_status.and_then(|status| StatusCode::from_u16(status).ok());
    Ok(status.map(|status| {
        Reply::error(&ApiError::with_status(status, status.canonical_reason().unwrap_or("Unknown error")))
    }))
}

/// The routes that generate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Chat,
    Completions,
    Responses,
    Messages,
}

impl Asked {
    fn prefix(self) -> &'static str {
        match self {
            Asked::Completions => "cmpl",
            Asked::Responses => "resp",
            Asked::Chat | Asked::Messages => "chatcmpl",
        }
    }

    /// An error as this route words it.
    fn error(self, error: &ApiError) -> Reply {
        match self {
            Asked::Messages => Reply::json(error.status, anthropic::error_body(error)),
            _ => Reply::error(error),
        }
    }

    fn parse(self, body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
        match self {
            Asked::Chat => Request::from_value(Route::Chat, body, args),
            Asked::Completions => Request::from_value(Route::Completions, body, args),
            Asked::Responses => responses::parse(body, args),
            Asked::Messages => anthropic::parse(body, args),
        }
    }

    fn dialect(self, request: Request, body: &Value, id: String, args: &EngineSimArgs) -> Box<dyn Dialect> {
        let now = unix_time().as_secs();
        match self {
            Asked::Chat | Asked::Completions => Box::new(Shaper::new(request, id, now)),
            Asked::Responses => Box::new(Responses::new(&request, body, now, args)),
            Asked::Messages => Box::new(Messages::new(&request, &id)),
        }
    }
}

async fn generate(
    engine: &Arc<Engine>,
    reset: &ResetFlag,
    asked: Asked,
    body: &[u8],
    client_id: Option<&str>,
) -> io::Result<Reply> {
    if let Some(reply) = inference_fault(engine, reset)? {
        return Ok(reply);
    }
    let read = request::object(body).and_then(|body| Ok((asked.parse(&body, &engine.args)?, body)));
    let (request, body) = match read {
        Ok(read) => read,
        Err(error) => return Ok(asked.error(&error)),
    };
    let id = client_id.map_or_else(|| format!("{:016x}", random()), ToOwned::to_owned);
    let id = format!("{}-{id}", asked.prefix());
    let outbox = engine.outbox();
    let submissions = request.submissions(&id, &engine.args, &outbox);
    let stream = request.stream;
    let mut dialect = asked.dialect(request, &body, id, &engine.args);
    if let Err(Refusal::QueueFull) = engine.submit(submissions) {
        return Ok(asked.error(&request::queue_full()));
    }
    let running = Running::new(engine.clone(), outbox);
    if stream {
        return Ok(Reply::events(EventStream::new(running, dialect, reset.clone())));
    }
    if let Err(error) = running.collect(dialect.as_mut(), reset).await? {
        return Ok(asked.error(&error));
    }
    let mut body = dialect.reply();
    if engine.faults().garbage {
        body.truncate(body.len() / 2);
    }
    Ok(Reply::json(StatusCode::OK, body))
}

/// Puts the headers on that every reply of vLLM has, in its order.
fn with_headers(reply: Reply, client_id: Option<String>) -> Response<ReplyBody> {
    let mut response = Response::new(reply.body);
    *response.status_mut() = reply.status;
    let length = match response.body() {
        ReplyBody::Full(bytes) => Some(bytes.as_ref().map_or(0, Bytes::len)),
        ReplyBody::Events(_) => None,
    };
    let id = client_id.unwrap_or_else(|| format!("{:016x}{:016x}", random(), random()));
    let headers = response.headers_mut();
    if let Ok(date) = HeaderValue::from_str(&http_date(unix_time().as_secs())) {
        headers.insert(header::DATE, date);
    }
    headers.insert(header::SERVER, HeaderValue::from_static("uvicorn"));
    if let Some(allow) = reply.allow {
        headers.insert(header::ALLOW, HeaderValue::from_static(allow));
    }
    if let Some(length) = length {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    if let Some(content_type) = reply.content_type {
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    }
    headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    if let Ok(id) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID, id);
    }
    response
}

fn random() -> u64 {
    rand::random()
}

/// A point in time as HTTP wants it; the calendar is computed, no table of any kind is needed.
fn http_date(seconds: u64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Jan", "Feb"];
    let days = seconds / 86_400;
    // Days since 1 March of year 0; years begin in March so that the leap day is the last one.
    let since = days + 719_468;
    let (era, day_of_era) = (since / 146_097, since % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let year = era * 400 + year_of_era + u64::from(month >= 10);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (weekday, month) = (DAYS[(days % 7) as usize], MONTHS[month as usize]);
    format!("{weekday}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT")
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(super::http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(super::http_date(1_709_210_096), "Thu, 29 Feb 2024 12:34:56 GMT");
        assert_eq!(super::http_date(1_795_227_701), "Sat, 21 Nov 2026 02:21:41 GMT");
    }
}
