//! How a stream ends that nobody generates to its end, in its client's dialect.

use std::sync::Arc;

use bytes::Bytes;
use http::Method;
use http::header::CONTENT_LENGTH;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::http::errors::{ApiError, Code};
use crate::http::ksana::held::TARGET;
use crate::http::relay::Ending;
use crate::http::routes::{self, Listener, Route};
use crate::ksana::reply::detail;
use crate::relay::copy::Copy;
use crate::relay::directory::Soon;
use crate::relay::log::Event;
use crate::relay::order::{Framing, Head, Order, Resumable, header_lines};
use crate::relay::{Engines, Failure};
use crate::splice::StreamRoute;

/// What an edge has in place of engines: it holds no stream, and tells its clients when one has
/// failed.
pub struct NoEngines;

impl Engines for NoEngines {
    fn generate(self: Arc<Self>, copy: Arc<Copy>, attempt: u32, _stop: CancellationToken) -> Soon<()> {
        let error = ApiError::new(Code::Internal, "an edge was told to generate; please report this");
        refuse(&copy, attempt, route_of(&copy.order), &error);
        Box::pin(std::future::ready(()))
    }

    fn failure(&self, copy: &Copy, failure: Failure, text: &str) -> Vec<Event> {
        events_of_failure(copy, failure, text)
    }
}

pub(super) fn events_of_failure(copy: &Copy, failure: Failure, text: &str) -> Vec<Event> {
    let route = route_of(&copy.order);
    let code = match failure {
        // Before its head, a client may ask again.
        Failure::Lost if copy.head().is_none() => Code::UpstreamFailed,
        Failure::Lost => Code::StreamLost,
        Failure::Upstream => Code::UpstreamFailed,
        Failure::Cancelled => Code::StreamCancelled,
    };
    failure_events(copy, route, &ApiError::new(code, text.to_owned()))
}

pub(super) fn route_of(order: &Order) -> Route {
    let path = |target: &str| target.split('?').next().unwrap_or_default().to_owned();
    if let Some(target) = order.target.strip_prefix(TARGET) {
        return routes::find(Listener::Ksana, false, &Method::POST, &path(target)).unwrap_or(Route::Unknown);
    }
    let path = &path(&order.target);
    Route::of_stream(path).unwrap_or(Route::Unknown)
}

pub(super) fn dialect_of(route: Route) -> StreamRoute {
    match route {
        Route::ChatCompletions => StreamRoute::Chat,
        Route::Completions => StreamRoute::Completions,
        Route::Messages => StreamRoute::Messages,
        Route::Responses => StreamRoute::Responses,
        _ => StreamRoute::Other,
    }
}

/// The last events of a stream that fails: before its head an error response.
fn failure_events(copy: &Copy, route: Route, error: &ApiError) -> Vec<Event> {
    let terminal = |lines: Bytes| Event { lines, journal: Bytes::new(), terminal: true };
    match copy.head() {
        None => {
            copy.set_head(Arc::new(error_head(route, error)));
            let body = match copy.order.target.starts_with(TARGET) {
                true => detail(&error.message),
                false => error.json_in(route.dialect()),
            };
            vec![terminal(body.into())]
        }
        Some(head) if head.framing == Framing::Frames => vec![terminal(last_frame(error))],
        // Breaks off, visibly.
        Some(head) if head.framing == Framing::Raw => vec![terminal(Bytes::new())],
        Some(_) => {
            let ending = Ending::of(route);
            let mut events: Vec<Event> = ending
                .failure_lines(error)
                .into_iter()
                .map(|lines| Event { lines, journal: Bytes::new(), terminal: false })
                .collect();
            if let Some(last) = events.last_mut() {
                last.terminal = true;
            }
            events
        }
    }
}

/// How a stream of frames ends that has failed.
pub(super) fn last_frame(error: &ApiError) -> Bytes {
    format!("{}\0", detail(&error.message)).into()
}

fn error_head(route: Route, error: &ApiError) -> Head {
    let (parts, _) = error.clone().response_in(route.dialect()).into_parts();
    let mut map = parts.headers;
    map.remove(CONTENT_LENGTH);
    Head {
        status: parts.status.as_u16(),
        headers: header_lines(&map),
        framing: Framing::Raw,
        resumable: Resumable::Replay,
        worker: String::new(),
    }
}

/// The events, each without the empty line at its end, that say an error response which came when its
/// client had been told of events.
pub(super) fn late_error(ending: Ending, status: u16, body: &[u8]) -> Vec<Bytes> {
    let said = serde_json::from_slice::<Value>(body).unwrap_or_default();
    let is_error = match ending {
        Ending::AnthropicError => said["type"] == "error" && said["error"].is_object(),
        Ending::Done | Ending::ErrorEvent => said["error"].is_object(),
    };
    if is_error {
        return ending.failure_lines_of(&said.to_string());
    }
    // Engines that speak another dialect, or none.
    let named = [&said["error"]["message"], &said["error"], &said["message"], &said["detail"]];
    let text = match named.into_iter().find_map(Value::as_str) {
        Some(why) if status >= 400 => format!("the worker answered {status}: {why}"),
        _ if status >= 400 => format!("the worker answered {status}"),
        _ => "the worker answered with something else than events".to_owned(),
    };
    ending.failure_lines(&ApiError::new(Code::UpstreamFailed, text))
}

pub(in crate::http) fn refuse(copy: &Copy, attempt: u32, route: Route, error: &ApiError) {
    for event in failure_events(copy, route, error) {
        copy.append(attempt, event);
    }
}

/// Nobody can go on with it.
pub(in crate::http) fn lost(why: String) -> ApiError {
    ApiError::new(Code::StreamLost, format!("the stream lost its engine: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_response_is_said_in_events_whatever_it_looks_like() {
        let said = |ending, status, body: &str| {
            late_error(ending, status, body.as_bytes())
                .iter()
                .map(|line| String::from_utf8(line.to_vec()).unwrap())
                .collect::<Vec<_>>()
        };
        let ours = "{\n \"error\": {\"code\":\"workers_saturated\",\"message\":\"full\"}}";
        let expected = "data: {\"error\":{\"code\":\"workers_saturated\",\"message\":\"full\"}}\n";
        assert_eq!(said(Ending::Done, 429, ours), [expected, "data: [DONE]\n"]);
        assert_eq!(said(Ending::ErrorEvent, 429, ours), [format!("event: error\n{expected}")]);
        let anthropic = r#"{"error":{"message":"m"},"type":"error"}"#;
        assert_eq!(
            said(Ending::AnthropicError, 400, anthropic),
            [format!("event: error\ndata: {anthropic}\n")]
        );
        for (body, status, text) in [
            (r#"{"object":"error","message":"too long"}"#, 400, "the worker answered 400: too long"),
            (r#"{"detail":"no"}"#, 422, "the worker answered 422: no"),
            (r#"{"error":"no"}"#, 404, "the worker answered 404: no"),
            ("<html>", 502, "the worker answered 502"),
            (r#"{"choices":[]}"#, 200, "the worker answered with something else than events"),
        ] {
            let said = said(Ending::Done, status, body);
            assert!(said[0].contains(&format!("\"message\":\"{text}\"")), "{said:?}");
            assert!(said[0].contains("upstream_failed") && said.len() == 2, "{said:?}");
        }
        let other = said(Ending::AnthropicError, 400, ours);
        assert!(other[0].contains("\"type\":\"error\"") && other[0].contains("400: full"), "{other:?}");
    }
}
