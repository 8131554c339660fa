//! Routes of the simulated engine, in vLLM's dialect, and SGLang's own one.

mod anthropic;
pub mod error;
mod gathered;
mod ksana;
mod logprobs;
mod metrics;
mod models;
mod native;
mod reply;
pub mod request;
mod responses;
mod rids;
mod scoring;
mod sglang;
pub mod shape;
mod simulator;
mod split;
pub mod stream;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Response, StatusCode};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use self::anthropic::Messages;
use self::error::ApiError;
use self::ksana::{Generated, Joined};
use self::native::Native;
use self::request::{Request, Route};
use self::responses::Responses;
use self::rids::Rids;
use self::shape::Shaper;
use self::stream::{Dialect, EventStream, ReplyBody, ResetFlag, Running};
use super::engine::{Engine, Refusal, unix_time};
use super::events::EventFormat;
use super::faults::Health;
use super::options::EngineSimArgs;
use super::pd::Protocol;
use super::ranks::Ranks;

/// Longest accepted request body.
const MAX_BODY: usize = 64 << 20;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

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

    fn with_status(self, status: StatusCode) -> Self {
        Self { status, ..self }
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
    ("/generate", "POST"),
    ("/models", "GET"),
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
    ("/v1/loads", "GET"),
    ("/reset_prefix_cache", "POST"),
    ("/inference/v1/abort_requests", "POST"),
    ("/sim/faults", "GET, POST"),
    ("/sim/stats", "GET"),
];

/// What a request's head says beside its path.
#[derive(Clone, Copy)]
struct Named<'a> {
    /// `X-Request-Id`.
    id: Option<&'a str>,
    /// `X-data-parallel-rank`; what is no number is none.
    rank: Option<i64>,
    /// All of it.
    headers: &'a HeaderMap,
}

/// Answers one request. The error cuts the connection.
pub async fn serve(
    ranks: Arc<Ranks>,
    reset: ResetFlag,
    request: http::Request<Incoming>,
) -> io::Result<Response<ReplyBody>> {
    let (parts, body) = request.into_parts();
    let client_id = parts.headers.get(&REQUEST_ID).and_then(|id| id.to_str().ok()).map(ToOwned::to_owned);
    let rank = parts.headers.get(&RANK).and_then(|rank| rank.to_str().ok()?.trim().parse().ok());
    let named = Named { id: client_id.as_deref(), rank, headers: &parts.headers };
    let path = parts.uri.path();
    let reply = match ROUTES.iter().find(|(route, _)| *route == path) {
        None => not_found(),
        Some((_, methods)) if !methods.split(", ").any(|method| method == parts.method.as_str()) => {
            let reply = Reply::json(StatusCode::METHOD_NOT_ALLOWED, r#"{"detail":"Method Not Allowed"}"#);
            Reply { allow: Some(methods), ..reply }
        }
        Some(_) => match read_body(body).await {
            Ok(body) => dispatch(&ranks, &reset, &parts.method, path, &body, named).await?,
            Err(error) => Reply::error(&error),
        },
    };
    let mut response = with_headers(reply, client_id);
    if is_ksana(ranks.first()) {
        // Of vLLM's own making.
        response.headers_mut().remove(header::VARY);
        response.headers_mut().remove(REQUEST_ID);
    }
    Ok(response)
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
    ranks: &Ranks,
    reset: &ResetFlag,
    method: &Method,
    path: &str,
    body: &[u8],
    named: Named<'_>,
) -> io::Result<Reply> {
    let (engine, client_id) = (ranks.first(), named.id);
    Ok(match path {
        "/v1/chat/completions" => generate(ranks, reset, Asked::Chat, body, named).await?,
        "/v1/completions" => generate(ranks, reset, Asked::Completions, body, named).await?,
        "/v1/responses" => generate(ranks, reset, Asked::Responses, body, named).await?,
        "/v1/messages" => generate(ranks, reset, Asked::Messages, body, named).await?,
        _ if is_ksana(engine) && !ksana_has(engine, path) => not_found(),
        "/generate" if is_ksana(engine) => generate(ranks, reset, Asked::Frames, body, named).await?,
        "/health" if is_ksana(engine) => match health(engine).await {
            healthy if healthy.status == StatusCode::OK => {
                Reply::json(healthy.status, r#"{"status":"healthy"}"#)
            }
            ill => ill,
        },
        "/models" if !is_ksana(engine) => not_found(),
        // vLLM has no such routes.
        "/generate" | "/server_info" | "/v1/loads" if !sglang::is_spoken(engine) => not_found(),
        "/metrics" if sglang::is_spoken(engine) && !engine.args.enable_metrics => not_found(),
        "/generate" => generate(ranks, reset, Asked::Native, body, named).await?,
        "/v1/embeddings" | "/v1/rerank" | "/rerank" | "/v1/score" | "/score" => {
            match (inference_fault(engine, reset)?, path) {
                (Some(reply), _) => reply,
                (None, "/v1/embeddings") => models::embeddings(engine, body, client_id),
                (None, "/v1/score" | "/score") => scoring::score(engine, body, client_id),
                (None, _) => scoring::rerank(engine, body, client_id),
            }
        }
        "/v1/models" | "/models" => models::list(engine),
        "/tokenize" => models::tokenize(engine, body),
        "/detokenize" => models::detokenize(engine, body),
        "/health" | "/ping" => health(engine).await,
        "/version" => Reply::json(StatusCode::OK, format!(r#"{{"version":"{}"}}"#, shape::VERSION)),
        "/load" => {
            let load: u64 = ranks.iter().map(|engine| engine.stats.server_load.get()).sum();
            Reply::json(StatusCode::OK, format!(r#"{{"server_load":{load}}}"#))
        }
        "/metrics" if sglang::is_spoken(engine) => sglang::metrics(ranks),
        "/metrics" => metrics::render(ranks),
        "/reset_prefix_cache" => {
            let success = ranks.reset_prefix_caches().await;
            Reply::json(StatusCode::OK, format!(r#"{{"success":{success}}}"#))
        }
        "/kv_event_sources" => models::kv_event_sources(ranks),
        "/server_info" => sglang::server_info(ranks),
        "/v1/loads" => sglang::loads(ranks),
        "/inference/v1/abort_requests" => simulator::abort_requests(ranks, body),
        "/sim/stats" => simulator::stats(ranks),
        _ if *method == Method::POST => simulator::set_faults(ranks, body),
        _ => Reply::ok(&engine.faults()),
    })
}

fn not_found() -> Reply {
    Reply::json(StatusCode::NOT_FOUND, r#"{"detail":"Not Found"}"#)
}

/// Whether the engine is a node of a KsanaLLM fleet.
fn is_ksana(engine: &Engine) -> bool {
    engine.args.pd.protocol == Some(Protocol::Ksana)
}

/// Whether a KsanaLLM engine has this route; of a group's nodes only the first has any.
fn ksana_has(engine: &Engine, path: &str) -> bool {
    let routes =
        ["/generate", "/health", "/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"];
    path.starts_with("/sim/") || engine.args.pd.ksana.node_rank == 0 && routes.contains(&path)
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
    Native,
    /// KsanaLLM's own.
    Frames,
}

impl Asked {
    fn prefix(self) -> &'static str {
        match self {
            Asked::Completions => "cmpl",
            Asked::Responses => "resp",
            Asked::Chat | Asked::Messages => "chatcmpl",
            Asked::Native | Asked::Frames => "generate",
        }
    }

    /// An error as this route words it.
    fn error(self, error: &ApiError) -> Reply {
        match self {
            Asked::Messages => Reply::json(error.status, anthropic::error_body(error)),
            // SGLang's own route has less to say of what is wrong with a request.
            Asked::Native if error.is_sglang() && error.status.is_client_error() => {
                Reply::ok(&serde_json::json!({"error": {"message": error.message}})).with_status(error.status)
            }
            _ => Reply::error(error),
        }
    }

    fn parse(self, body: &Value, args: &EngineSimArgs) -> Result<Request, ApiError> {
        match self {
            Asked::Chat => Request::from_value(Route::Chat, body, args),
            Asked::Completions => Request::from_value(Route::Completions, body, args),
            Asked::Responses => responses::parse(body, args),
            Asked::Messages => anthropic::parse(body, args),
            Asked::Native => native::parse(body, args),
            Asked::Frames => ksana::parse(body, args),
        }
    }

    /// The rank that a request names. vLLM reads the header; SGLang reads it too, but not on its own
    /// route, and the body, but not on Anthropic's; responses by the body alone (as 0.5.19 was measured by
    /// others, and what was added since).
    fn rank(self, body: &Value, named: Named<'_>, args: &EngineSimArgs) -> Option<i64> {
        if args.kv_events_format != EventFormat::Sglang {
            return named.rank;
        }
        let in_body =
            || ["routed_dp_rank", "data_parallel_rank"].iter().find_map(|name| body[*name].as_i64());
        match self {
            Asked::Native => in_body(),
            Asked::Messages => named.rank,
            Asked::Chat | Asked::Completions => named.rank.or_else(in_body),
            Asked::Responses => in_body(),
            Asked::Frames => None,
        }
    }

    fn dialect(self, request: Request, body: &Value, id: String, args: &EngineSimArgs) -> Box<dyn Dialect> {
        let now = unix_time().as_secs();
        match self {
            Asked::Chat | Asked::Completions => Box::new(Shaper::new(request, id, now)),
            Asked::Responses => Box::new(Responses::new(&request, body, now, args)),
            Asked::Messages => Box::new(Messages::new(&request, &id)),
            Asked::Native => Box::new(Native::new(&request, body, &id, args)),
            Asked::Frames => Box::new(Generated::new(&request)),
        }
    }
}

async fn generate(
    ranks: &Ranks,
    reset: &ResetFlag,
    asked: Asked,
    body: &[u8],
    named: Named<'_>,
) -> io::Result<Reply> {
    let engine = ranks.first();
    if let Some(reply) = inference_fault(engine, reset)? {
        return Ok(reply);
    }
    let read = request::object(body).and_then(|body| Ok((asked.parse(&body, &engine.args)?, body)));
    let in_words = |error: ApiError| match engine.args.pd.protocol {
        Some(Protocol::Sglang) => error.of_sglang(),
        Some(Protocol::Ksana) => error.of_ksana(),
        _ => error,
    };
    let (mut request, body) = match read {
        Ok(read) => read,
        Err(error) => return Ok(asked.error(&in_words(error))),
    };
    if is_ksana(engine) {
        match Joined::read(named.headers) {
            Ok(joined) => request.split_by(joined.split(&engine.args)),
            Err(error) => return Ok(asked.error(&error)),
        }
    }
    // SGLang's ranks are those that the room says, unless the request does.
    let rank = asked.rank(&body, named, &engine.args).or_else(|| request.rank_of_room(&engine.args));
    let rids = Rids::of(&body, engine);
    let rids = match rids {
        Ok(rids) => rids,
        Err(error) => return Ok(asked.error(&error)),
    };
    let engine = match ranks.choose(rank) {
        Ok(engine) => engine,
        Err(message) => return Ok(asked.error(&in_words(ApiError::bad_request(message, None)))),
    };
    let id = named.id.map_or_else(|| format!("{:016x}", random()), ToOwned::to_owned);
    let id = format!("{}-{id}", asked.prefix());
    let outbox = engine.outbox();
    let submissions = request.submissions(&id, &engine.args, &outbox);
    let stream = request.stream;
    let mut dialect = asked.dialect(request, &body, id, &engine.args);
    if let Err(Refusal::QueueFull) = engine.submit(submissions) {
        return Ok(asked.error(&request::queue_full()));
    }
    let running = Running::new(engine.clone(), outbox, rids);
    if stream {
        let reply = Reply::events(EventStream::new(running, dialect, reset.clone()));
        // Frames go out without a word on what they are.
        return Ok(if asked == Asked::Frames { Reply { content_type: None, ..reply } } else { reply });
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
