//! One streaming request, over all the connections that it takes.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::Incoming;
use tokio::time::{sleep, timeout};

use super::Shared;
use super::forward::{Pieces, answer, fed, full};
use super::request::{
    Answer, Route, Trouble, cancel_headers, first_headers, judge, resume_headers, stream_of,
    without_hop_by_hop,
};
use super::resume::{Events, Patience};
use super::upstream::{AnyBody, Call, SendError, reason};

/// How long the end of a body may take after the event that closes the stream.
const AFTER_END: Duration = Duration::from_secs(1);
/// How long telling the cluster that the client has left may take, at each address.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(1);
/// Most of a refusal that is read for its message.
const MAX_REFUSAL: usize = 64 << 10;

/// How a stream ended.
enum End {
    /// With the event that closes it.
    Whole,
    /// The client has left, or takes nothing.
    Left,
    /// In a way that the client is told of.
    Broken(Trouble),
    /// With the shim.
    Stopped,
}

/// One request and what was handed on of its stream.
pub(super) struct Exchange {
    shared: Arc<Shared>,
    route: Route,
    path: PathAndQuery,
    /// What the first request was sent with.
    headers: HeaderMap,
    content: Bytes,
    events: Events,
    patience: Patience,
    turn: usize,
}

impl Exchange {
    pub(super) fn new(
        shared: &Arc<Shared>,
        route: Route,
        path: PathAndQuery,
        client: &HeaderMap,
        content: Bytes,
    ) -> Self {
        Self {
            events: Events::new(route.dialect),
            patience: Patience::new(shared.settings.retry_budget),
            turn: shared.turn.load(Ordering::Relaxed),
            shared: Arc::clone(shared),
            route,
            path,
            headers: first_headers(client),
            content,
        }
    }

    /// Sends the request until there is an answer. One that died without is sent again with the
    /// same key, so that nothing is generated twice.
    pub(super) async fn begin(mut self) -> Result<Response<AnyBody>, Trouble> {
        let settings = &self.shared.settings;
        let mut connecting = Patience::new(settings.connect_budget);
        let mut died = false;
        loop {
            let call =
                Call { turn: self.turn, path: &self.path, fresh: died, head_timeout: settings.head_timeout };
            let body = full(self.content.clone());
            let sent = self.shared.upstream.send(call, Method::POST, self.headers.clone(), body).await;
            died |= matches!(sent, Err(SendError::Broken { .. }));
            let patience = if died { &mut self.patience } else { &mut connecting };
            let pause = match &sent {
                Ok(response) if !died || judge(response) != Answer::Passing => None,
                _ => patience.next_pause(Instant::now(), rand::random()),
            };
            match (sent, pause) {
                (_, Some(pause)) => {
                    self.turn = self.turn.wrapping_add(1);
                    sleep(pause).await;
                }
                (Ok(response), None) => return Ok(self.answered(response)),
                (Err(error), None) => return Err(Trouble::new("upstream_connect_failed", error.to_string())),
            }
        }
    }

    fn answered(mut self, response: Response<Incoming>) -> Response<AnyBody> {
        self.shared.turn.store(self.turn, Ordering::Relaxed);
        if judge(&response) != Answer::Events {
            return answer(&self.shared, response);
        }
        if let Some(stream) = stream_of(&response) {
            self.events.belong_to(&stream);
        }
        let resumable = self.events.stream().is_some();
        let (mut parts, body) = response.into_parts();
        parts.headers = without_hop_by_hop(&parts.headers);
        let (pieces, fed) = fed();
        let tasks = self.shared.tasks.clone();
        tasks.spawn(Box::pin(self.run(body, pieces, resumable)));
        Response::from_parts(parts, fed)
    }

    async fn run(mut self, body: Incoming, pieces: Pieces, resumable: bool) {
        let end = self.relay(body, &pieces, resumable).await;
        let stream = self.events.stream().unwrap_or("without an id").to_owned();
        let trouble = match end {
            End::Whole => return,
            End::Left => {
                self.cancel().await;
                return;
            }
            End::Broken(trouble) => {
                tracing::warn!(stream, code = trouble.code, why = trouble.message, "a stream is lost");
                trouble
            }
            End::Stopped => Trouble::new("shim_stopped", "the shim between you and the cluster was stopped"),
        };
        let told = trouble.events(self.route.dialect, self.events.next_number());
        let _ = timeout(AFTER_END, pieces.send(Ok(Frame::data(told.into())))).await;
        drop(pieces);
        if trouble.code == "shim_stopped" {
            self.cancel().await;
        }
    }

    async fn relay(&mut self, mut body: Incoming, pieces: &Pieces, resumable: bool) -> End {
        let cut = self.shared.cut.clone();
        let (stall, idle) = (self.shared.settings.stall_timeout, self.shared.settings.idle_timeout);
        loop {
            let longest = match (self.events.ended(), resumable) {
                (true, _) => AFTER_END,
                (false, true) => stall,
                (false, false) => idle,
            };
            let read = tokio::select! {
                biased;
                () = pieces.closed() => return End::Left,
                () = cut.cancelled() => return End::Stopped,
                read = timeout(longest, body.frame()) => read,
            };
            let why = match read {
                Ok(Some(Ok(frame))) => {
                    // Trailers say nothing about a stream.
                    let whole = frame.into_data().map(|data| self.take(&data)).unwrap_or_default();
                    if !whole.is_empty()
                        && !matches!(timeout(idle, pieces.send(Ok(Frame::data(whole)))).await, Ok(Ok(())))
                    {
                        return End::Left;
                    }
                    match self.events.fault() {
                        None => continue,
                        Some(fault) => fault.to_string(),
                    }
                }
                Ok(Some(Err(error))) => reason(&error),
                Ok(None) => "the body ended before its stream did".to_owned(),
                Err(_) => format!("silent for {longest:?}"),
            };
            if self.events.ended() {
                return End::Whole;
            }
            if !resumable || self.events.unnumbered() {
                let message = format!("the stream broke and cannot be resumed: {why}");
                return End::Broken(Trouble::new("stream_lost", message));
            }
            // The connection is closed before there is another.
            drop(body);
            let resumed = tokio::select! {
                biased;
                () = pieces.closed() => return End::Left,
                () = cut.cancelled() => return End::Stopped,
                resumed = self.resume(why) => resumed,
            };
            match resumed {
                Ok(next) => body = next,
                Err(trouble) => return End::Broken(trouble),
            }
        }
    }

    /// Takes what was read and returns what may be handed on.
    fn take(&mut self, data: &[u8]) -> Bytes {
        self.patience.heard(Instant::now());
        let before = self.events.count();
        let whole = self.events.feed(data);
        if self.events.count() > before {
            self.patience.progressed();
        }
        whole
    }

    /// Asks for what comes after the last event until somebody has it, or nobody ever will.
    async fn resume(&mut self, mut why: String) -> Result<Incoming, Trouble> {
        let lost = |e: http::Error| Trouble::new("stream_lost", e.to_string());
        let path = self.route.stream_path(self.events.stream().unwrap_or_default(), "").map_err(lost)?;
        let broke = Instant::now();
        let mut attempts = 0_u32;
        loop {
            let Some(pause) = self.patience.next_pause(Instant::now(), rand::random()) else {
                let budget = self.shared.settings.retry_budget;
                let message = format!("the stream made no progress within {budget:?}; at last: {why}");
                return Err(Trouble::new("stream_lost", message));
            };
            sleep(pause).await;
            attempts += 1;
            self.turn = self.turn.wrapping_add(1);
            let head_timeout = self.shared.settings.resume_head_timeout;
            let call = Call { turn: self.turn, path: &path, fresh: true, head_timeout };
            let headers = resume_headers(&self.headers, self.events.last_event_id());
            let response = match self.shared.upstream.send(call, Method::GET, headers, full("")).await {
                Ok(response) => response,
                Err(error) => {
                    why = error.to_string();
                    continue;
                }
            };
            let status = response.status();
            match judge(&response) {
                Answer::Events => {
                    self.shared.turn.store(self.turn, Ordering::Relaxed);
                    self.events.reconnected();
                    let (stream, after) = (self.events.stream(), self.events.last_event_id());
                    let upstream = self.shared.upstream.address(self.turn);
                    let ms = broke.elapsed().as_millis() as u64;
                    tracing::info!(stream, after, attempts, %upstream, ms, why, "a stream goes on");
                    return Ok(response.into_body());
                }
                Answer::Passing => {
                    why = format!("{} answered {status}", self.shared.upstream.address(self.turn))
                }
                Answer::Final if status == StatusCode::NO_CONTENT => {
                    let message = "the stream ended without the event that closes it";
                    return Err(Trouble::new("stream_lost", message));
                }
                Answer::Final => {
                    let body = Limited::new(response.into_body(), MAX_REFUSAL).collect();
                    let body = timeout(head_timeout, body).await;
                    let said =
                        body.ok().and_then(Result::ok).and_then(|body| Trouble::said_by(&body.to_bytes()));
                    let unsaid = || Trouble::new("stream_lost", format!("the cluster answered {status}"));
                    return Err(said.unwrap_or_else(unsaid));
                }
            }
        }
    }

    /// Tells the cluster that nobody reads this any more. Without it, it goes on generating for a
    /// while, in case somebody comes back.
    async fn cancel(&mut self) {
        let Some(stream) = self.events.stream().filter(|_| !self.events.ended()) else { return };
        let Ok(path) = self.route.stream_path(stream, "/cancel") else { return };
        for turn in [self.turn, self.turn.wrapping_add(1)] {
            let call = Call { turn, path: &path, fresh: true, head_timeout: CANCEL_TIMEOUT };
            let headers = cancel_headers(&self.headers);
            match self.shared.upstream.send(call, Method::POST, headers, full("")).await {
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(stream, %error, "a stream that was left could not be cancelled")
                }
            }
        }
    }
}
