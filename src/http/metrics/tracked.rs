//! One request being measured. All of it together costs well under a microsecond: array
//! look-ups and additions to atomics, and for a stream two additions to memory of its own a
//! piece.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::models::ModelCounts;
use super::{Metrics, Outcome, Retry, Route};
use crate::http::keys::Caller;
use crate::ids::{StreamId, WorkerId};
use crate::telemetry::histogram::{BETWEEN_TOKENS, Local};
use crate::telemetry::trace::RequestSpan;

/// How often a stream merges what it has gathered.
const MERGE_EVERY: Duration = Duration::from_secs(1);

/// Longest path in a span, in characters.
const MOST_PATH: usize = 256;

/// What is asked of a model by a route, in the words of OpenTelemetry.
fn operation(route: Route) -> Option<&'static str> {
    match route {
        Route::ChatCompletions | Route::Messages | Route::Responses => Some("chat"),
        Route::Completions => Some("text_completion"),
        Route::Embeddings => Some("embeddings"),
        _ => None,
    }
}

/// A request being measured; counted once, as canceled if nobody said otherwise before the drop.
///
/// In the order of a request: [`Tracked::begin_span`], [`Tracked::body_read`], [`Tracked::span_headers`],
/// [`Tracked::selected`], [`Tracked::placed`], [`Tracked::set_model`], [`Tracked::sent_upstream`], [`Tracked::retrying`], [`Tracked::set_status`],
/// [`Tracked::set_events`], [`Tracked::first_byte`], [`Tracked::chunk`], [`Tracked::finish`].
#[derive(Debug)]
pub struct Tracked {
    metrics: Arc<Metrics>,
    route: Route,
    started: Instant,
    read: Instant,
    sent: bool,
    status: http::StatusCode,
    first_byte: Option<Duration>,
    retries: u32,
    model: Option<Arc<ModelCounts>>,
    stream: Option<Box<Stream>>,
    span: Option<Box<RequestSpan>>,
    request_id: Option<http::HeaderValue>,
    worker: Option<WorkerId>,
    prefill_worker: Option<WorkerId>,
    caller: Caller,
    finished: bool,
}

/// What an event stream has besides.
#[derive(Debug)]
struct Stream {
    local: Local,
    last: Option<Instant>,
    merged: Instant,
}

impl Tracked {
    pub(super) fn new(metrics: Arc<Metrics>, route: Route) -> Self {
        metrics.counts.begun(route);
        let started = Instant::now();
        Self {
            metrics,
            route,
            started,
            read: started,
            sent: false,
            status: http::StatusCode::OK,
            first_byte: None,
            retries: 0,
            model: None,
            stream: None,
            span: None,
            request_id: None,
            worker: None,
            prefill_worker: None,
            caller: Caller::default(),
            finished: false,
        }
    }

    /// Which route.
    pub fn route(&self) -> Route {
        self.route
    }

    /// Begins the request's span, if there are traces, below the one that the client named.
    pub fn begin_span(&mut self, method: &http::Method, path: &str, client: &http::HeaderMap) {
        let Some(tracing) = &self.metrics.tracing else { return };
        let template = self.route.path();
        let mut span = tracing.request(format!("{method} {template}"), client);
        if span.is_recording() {
            span.set("http.request.method", method.to_string());
            span.set("http.route", template);
            span.set("url.path", path.chars().take(MOST_PATH).collect::<String>());
            if let Some(operation) = operation(self.route) {
                span.set("gen_ai.operation.name", operation);
            }
        }
        self.span = Some(Box::new(span));
    }

    /// What is measured is an attempt at a stream.
    pub(in crate::http) fn set_stream(&mut self, id: StreamId, attempt: u32) {
        let Some(span) = &mut self.span else { return };
        span.set("everline.stream", id.to_string());
        span.set("everline.attempt", i64::from(attempt));
        if attempt > 1 {
            self.seam("holder");
        }
    }

    /// The stream goes on elsewhere, because what it had is lost: a `holder` or a `worker`.
    pub(in crate::http) fn seam(&mut self, lost: &'static str) {
        if let Some(span) = &mut self.span {
            span.event("takeover", "everline.lost", lost);
        }
    }

    /// Headers that name the span as the parent, in place of the client's. None without traces:
    /// the client's own stay as they are.
    pub fn span_headers(&self) -> http::HeaderMap {
        self.span.as_ref().map(|span| span.headers()).unwrap_or_default()
    }

    /// The whole request is here: from now on time is the router's own.
    pub fn body_read(&mut self) {
        self.read = Instant::now();
    }

    /// The model asked for. Only for one that a worker was found for: others have no label.
    pub fn set_model(&mut self, name: &str) {
        if self.model.is_none() {
            self.model = Some(self.metrics.counts.models.get(name));
            if let Some(span) = &mut self.span {
                span.set("gen_ai.request.model", name.to_owned());
            }
        }
    }

    /// Has stood in line for a worker so long, which is not the router's own time.
    pub fn waited(&mut self, time: Duration) {
        self.read += time;
        self.metrics.counts.waited(time);
    }

    /// A policy was asked for a worker; that took so long.
    pub fn selected(&self, policy: &str, after: Duration) {
        self.metrics.counts.choices.made(policy, after);
    }

    /// The prompt, whose length is known, goes to a worker that has so much of it. Of the first
    /// attempt only.
    pub fn placed(&self, prompt_tokens: u32, cached: u32) {
        if !self.sent {
            self.metrics.counts.choices.placed(prompt_tokens, cached);
        }
    }

    /// About to be sent to a worker. The first time ends the router's own time.
    pub fn sent_upstream(&mut self) {
        if !std::mem::replace(&mut self.sent, true) {
            // Had it stood in line twice, `read` might lie a moment ahead.
            let own = Instant::now().saturating_duration_since(self.read);
            self.metrics.counts.sent(self.route, own);
        }
    }

    /// About to be tried again, for this reason.
    pub fn retrying(&mut self, why: Retry) {
        self.retries += 1;
        self.metrics.counts.retried(why);
        if let Some(span) = &mut self.span {
            span.event("retry", "everline.retry.reason", why.as_str());
        }
    }

    /// The status that was passed on.
    pub fn set_status(&mut self, status: http::StatusCode) {
        self.status = status;
    }

    /// How the request is called in the log.
    pub(in crate::http) fn set_request_id(&mut self, id: http::HeaderValue) {
        self.request_id = Some(id);
    }

    /// Whose key the request came with.
    pub(in crate::http) fn set_caller(&mut self, caller: Caller) {
        self.caller = caller;
    }

    /// The worker that answers.
    pub(in crate::http) fn set_worker(&mut self, id: WorkerId) {
        self.worker = Some(id);
    }

    /// The worker that does the prefill for the one that answers.
    pub(in crate::http) fn set_prefill_worker(&mut self, id: Option<WorkerId>) {
        self.prefill_worker = id;
    }

    /// The answer is an event stream: its pieces are tokens.
    pub fn set_events(&mut self) {
        let local = Local::new(&BETWEEN_TOKENS);
        self.stream = Some(Box::new(Stream { local, last: None, merged: Instant::now() }));
    }

    /// The first body byte arrived from a worker and is handed on, at this moment.
    pub fn first_byte(&mut self, at: Instant) {
        let elapsed = at.saturating_duration_since(self.started);
        self.first_byte = Some(elapsed);
        self.metrics.counts.first_byte(self.route, elapsed);
        if let Some(stream) = &mut self.stream {
            stream.last = Some(at);
            if let Some(model) = &self.model {
                model.first_token.observe_time(elapsed);
            }
        }
    }

    /// Another piece of an event stream arrived, at this moment. Touches nothing shared but
    /// once a second.
    pub fn chunk(&mut self, at: Instant) {
        let Some(stream) = &mut self.stream else { return };
        if let Some(last) = stream.last.replace(at) {
            stream.local.observe_time(at.saturating_duration_since(last));
        }
        if at.saturating_duration_since(stream.merged) >= MERGE_EVERY {
            stream.merged = at;
            if let Some(model) = &self.model {
                model.between_tokens.merge(&mut stream.local);
            }
        }
    }

    /// The request goes on as a stream, and is counted again where that is generated: nothing is
    /// counted here. The headers name what was measured so far as the parent of that.
    pub(in crate::http) fn pass_to_stream(&mut self) -> (Route, http::HeaderMap) {
        if !std::mem::replace(&mut self.finished, true) {
            self.metrics.counts.withdrawn(self.route);
        }
        let mut span = self.span.take();
        if let Some(span) = &mut span {
            span.set("everline.outcome", "stream");
        }
        (self.route, span.map(|span| span.headers()).unwrap_or_default())
    }

    /// Ended, as well as its status says.
    pub fn finish_with_status(&mut self) {
        let outcome = match Outcome::of(self.status) {
            Outcome::ServerError => Outcome::UpstreamError,
            other => other,
        };
        self.finish(outcome);
    }

    /// Ended. Only the first call counts.
    pub fn finish(&mut self, outcome: Outcome) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let elapsed = self.started.elapsed();
        self.metrics.counts.ended(self.route, outcome, elapsed);
        if let Some(model) = &self.model {
            model.requests[outcome as usize].fetch_add(1, Ordering::Relaxed);
            if let Some(stream) = &mut self.stream {
                model.between_tokens.merge(&mut stream.local);
            }
        }
        self.log(outcome, elapsed);
        self.end_span(outcome);
    }

    fn end_span(&mut self, outcome: Outcome) {
        let Some(mut span) = self.span.take().filter(|span| span.is_recording()) else { return };
        if outcome != Outcome::Canceled || self.first_byte.is_some() {
            span.set("http.response.status_code", i64::from(self.status.as_u16()));
        }
        span.set("everline.outcome", outcome.as_str());
        span.set("everline.retries", i64::from(self.retries));
        if let Some(worker) = &self.worker {
            span.set("everline.worker", worker.as_str().to_owned());
        }
        if let Some(worker) = &self.prefill_worker {
            span.set("everline.prefill_worker", worker.as_str().to_owned());
        }
        if let Some(id) = self.request_id.as_ref().and_then(|id| id.to_str().ok()) {
            span.set("everline.request_id", id.to_owned());
        }
        if let Some(after) = self.first_byte {
            let name = if self.stream.is_some() { "everline.ttft_ms" } else { "everline.first_byte_ms" };
            span.set(name, after.as_secs_f64() * 1000.0);
        }
        // A client's own fault and its leaving are no errors of a server's span.
        if !matches!(outcome, Outcome::Ok | Outcome::ClientError | Outcome::Canceled) {
            span.failed(outcome.as_str());
        }
    }

    /// A line without anything of the content, for those that get one; at debug level for what
    /// is not a client's.
    fn log(&self, outcome: Outcome, elapsed: Duration) {
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    target: "everline::access",
                    route = self.route.path(),
                    outcome = outcome.as_str(),
                    status = self.status.as_u16(),
                    request_id = self.request_id.as_ref().and_then(|id| id.to_str().ok()),
                    key = self.caller.key_id(),
                    worker = self.worker.as_ref().map(WorkerId::as_str),
                    prefill_worker = self.prefill_worker.as_ref().map(WorkerId::as_str),
                    model = self.model.as_ref().map(|model| model.name.as_str()),
                    retries = self.retries,
                    first_byte_ms = self.first_byte.map(|t| t.as_millis() as u64),
                    ms = elapsed.as_millis() as u64,
                )
            };
        }
        if !self.route.is_proxied() {
            line!(debug);
            return;
        }
        let Some(left_out) = self.metrics.access.wants(outcome, self.first_byte.unwrap_or(elapsed)) else {
            return;
        };
        if left_out > 0 {
            tracing::warn!(target: "everline::access", left_out, "requests were not logged, there were too many");
        }
        line!(info);
    }

    /// Remembers an error for the status page.
    pub fn note_error(&self, what: String) {
        self.metrics.recent.push(what);
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.finish(Outcome::Canceled);
    }
}
