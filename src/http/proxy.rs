//! The proxy path: body in, worker chosen, bytes forwarded untouched, answer relayed.

use std::borrow::Cow;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, EXPECT};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::attempts::{Answered, Asked, Attempts};
use super::body::{FrontBody, collect, discard};
use super::edge::pass_on;
use super::errors::{ApiError, Code};
use super::front::{Front, Shard};
use super::growth::Growth;
use super::headers::{self, REPLICA, REQUEST_ID, WORKER};
use super::keys::Caller;
use super::metrics::{Outcome, Tracked};
use super::passthrough::{self, Content};
use super::peek::{Peek, peek, peek_around};
use super::placing::Placing;
use super::relay::{Ending, Relay, RelayLimits};
use super::routes::Route;
use super::sequel::{Question, Sequel};
use super::streams::background;
use super::streams::create::{Asking, stream_out};
use super::upstream::{HeadersToWorker, Outgoing};
use super::wishes::Wishes;
use crate::tokens::{Form, lift};

/// Bodies above this are read by the JSON parser away from the thread's other connections.
const LARGE_BODY: usize = 1 << 20;

/// Serves one proxied request. Dropping the future, as hyper does when the client goes away,
/// frees the booking and closes the connection to the worker.
pub(super) async fn forward(shard: &Shard, route: Route, request: Request<Incoming>) -> Response<FrontBody> {
    let mut tracked = shard.front.metrics.track(route);
    let request_id = headers::request_id(request.headers());
    tracked.set_request_id(request_id.clone());
    tracked.begin_span(request.method(), request.uri().path(), request.headers());
    tracked.set_caller(Caller::of(request.extensions()));
    let mut response = match try_forward(shard, tracked, request, &request_id).await {
        Ok(response) => response,
        Err(failed) => failed.into_response(shard),
    };
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, request_id);
    headers.insert(REPLICA, shard.front.replica_header());
    response
}

/// A request that ends with an error of ours.
pub(super) struct Failed {
    pub(super) error: ApiError,
    pub(super) tracked: Tracked,
}

impl Failed {
    fn into_response(mut self, shard: &Shard) -> Response<FrontBody> {
        let code = self.error.code;
        let outcome = match code {
            Code::NoWorkers | Code::NoWorkerAvailable => Outcome::NoWorker,
            _ => Outcome::of(code.status()),
        };
        self.tracked.set_status(code.status());
        self.tracked.finish(outcome);
        shard.front.metrics.reject(code.as_str());
        if code.status().is_server_error() {
            self.tracked.note_error(format!("{}: {}", self.tracked.route().path(), self.error.message));
        }
        self.error.response_in(self.tracked.route().dialect())
    }
}

async fn try_forward(
    shard: &Shard,
    mut tracked: Tracked,
    request: Request<Incoming>,
    request_id: &HeaderValue,
) -> Result<Response<FrontBody>, Failed> {
    let options = &shard.front.config.proxy;
    let deadline = Instant::now() + options.total_timeout;
    let (head, mut body) = request.into_parts();
    if head.headers.get_all(CONTENT_ENCODING).iter().any(|encoding| encoding != "identity") {
        let text = "compressed request bodies are not accepted; send the body without Content-Encoding";
        let error = ApiError::new(Code::UnsupportedEncoding, text).close();
        return Err(Failed { error, tracked });
    }
    let body = match collect(&mut body, &options.body).await {
        Ok(body) => body,
        Err(error) => {
            // Who expects a 100 has not sent the body yet, and reading would ask for it.
            if error.code == Code::BodyTooLarge && !head.headers.contains_key(EXPECT) {
                Box::pin(discard(&mut body, &options.body)).await;
            }
            return Err(Failed { error, tracked });
        }
    };
    tracked.body_read();
    let caller = Caller::of(&head.extensions);
    let asked = match look_at(tracked.route(), &head.headers, &body, &caller).await {
        Ok(asked) => asked,
        Err(error) => return Err(Failed { error, tracked }),
    };
    let background = match background::wanted(tracked.route(), &body) {
        Ok(background) => background,
        Err(error) => return Err(Failed { error, tracked }),
    };
    if let Some(relays) = shard.front.streams.get()
        && (asked.stream || background.is_some())
        && Route::of_stream(tracked.route().path()).is_some()
    {
        // Counted where it is generated.
        let (route, trace) = tracked.pass_to_stream();
        let (caller, head, body, listens) = (&caller, &head, &body, asked.stream);
        let asking = Asking { route, head, body, asked, request_id, caller, background, trace };
        let streamed = async {
            match listens {
                true => stream_out(shard, relays, asking).await,
                false => background::begin(shard, relays, asking).await,
            }
        };
        return match Box::pin(streamed).await {
            Ok(response) => Ok(response),
            Err(error) => Err(Failed { error, tracked: shard.front.metrics.track(route) }),
        };
    }
    if let Some(remote) = &shard.front.config.edge {
        // Boxed: most processes are no edges.
        let passed = pass_on(shard, remote, &head, &body, tracked, request_id, deadline);
        return Box::pin(passed).await;
    }
    let mut asked = asked;
    tokenised(&shard.front, tracked.route(), &mut asked, &body).await;
    let target = head.uri.path_and_query().map_or(tracked.route().path(), PathAndQuery::as_str);
    let mut ours = tracked.span_headers();
    if let Some(authorization) = shard.pool.authorization() {
        ours.insert(AUTHORIZATION, authorization.clone());
    }
    let headers = HeadersToWorker { client: &head.headers, request_id, rules: &options.headers, ours };
    let outgoing = Outgoing::new(&head.method, target, headers, body.clone());
    match Attempts::new(shard, &outgoing, &asked, &mut tracked, deadline).run().await {
        Ok(answered) => Ok(relayed(shard, answered, &asked, &body, tracked, deadline)),
        Err(error) => Err(Failed { error, tracked }),
    }
}

/// What the client wants: of whom, with what prompt, and where it may go.
pub(super) async fn look_at<'a>(
    route: Route,
    headers: &HeaderMap,
    body: &'a Bytes,
    caller: &Caller,
) -> Result<Asked<'a>, ApiError> {
    let mut asked = look_into(route, headers, body).await?;
    caller.check_model(asked.model.as_deref())?;
    asked.placing.wishes.read(headers, caller.key_id())?;
    Ok(asked)
}

/// The same of a request that another process admitted, with the key of this name.
pub(super) async fn look_for<'a>(
    route: Route,
    headers: &HeaderMap,
    body: &'a Bytes,
    key: Option<&str>,
) -> Result<Asked<'a>, ApiError> {
    let mut asked = look_into(route, headers, body).await?;
    asked.placing.wishes.read(headers, key)?;
    Ok(asked)
}

/// Finds out what engines will make of the prompt.
pub(super) async fn tokenised(front: &Front, route: Route, asked: &mut Asked<'_>, body: &Bytes) {
    if route == Route::Generate && asked.model.is_none() {
        // Its clients name no model. Where only one is served, they mean that one.
        asked.model = front.control.registry().only_model().map(|name| Cow::Owned(name.to_owned()));
    }
    if let Some(model) = &asked.model {
        // Boxed: most of it is for prompts that are tokenised elsewhere.
        Box::pin(asked.placing.look_at_prompt(front, route.path(), model, body)).await;
    }
}

/// What routing needs to know. Where a route does without a model, a body that names none, or is
/// none of our business, may go to any worker.
async fn look_into<'a>(route: Route, headers: &HeaderMap, body: &'a Bytes) -> Result<Asked<'a>, ApiError> {
    if route.needs_model() {
        return read(route, body).await;
    }
    let any = Asked { model: None, placing: Placing::default(), stream: false };
    let content = match route {
        // Nothing else is ever sent there, whatever it is called.
        Route::Generate => Content::Json,
        _ => passthrough::content(headers),
    };
    match content {
        _ if body.is_empty() => Ok(any),
        Content::Json => match read(route, body).await {
            // What is meant for us is for us to understand.
            Err(error) if error.code == Code::InvalidValue => Err(error),
            read => Ok(read.unwrap_or(any)),
        },
        Content::Form(boundary) => {
            let model = passthrough::model_in_form(&boundary, body).map(Cow::Borrowed);
            Ok(Asked { model, ..any })
        }
        Content::Other => Ok(any),
    }
}

/// Reads a JSON body; a large one on a thread where that holds nobody up.
async fn read(route: Route, body: &Bytes) -> Result<Asked<'_>, ApiError> {
    if let Some(asked) = ask_around(route, body) {
        return asked;
    }
    if body.len() <= LARGE_BODY {
        return ask(body);
    }
    let shared = body.clone();
    let read = tokio::task::spawn_blocking(move || {
        let asked = ask(&shared)?;
        let model = asked.model.map(|model| Cow::Owned(model.into_owned()));
        Ok(Asked { model, ..asked })
    });
    read.await.unwrap_or_else(|_| {
        Err(ApiError::new(Code::Internal, "reading the body failed inside the router; please report this"))
    })
}

/// A body with a long prompt of token ids, which are read once; `None` if it has none.
fn ask_around(route: Route, body: &[u8]) -> Option<Result<Asked<'static>, ApiError>> {
    let lifted = lift(Form::of_path(route.path())?, body)?;
    let Asked { model, mut placing, stream } = match asked(peek_around(&lifted)?) {
        Ok(asked) => asked,
        Err(error) => return Some(Err(error)),
    };
    let model = model.map(|model| Cow::Owned(model.into_owned()));
    placing.lifted = Some(lifted);
    Some(Ok(Asked { model, placing, stream }))
}

fn ask(body: &[u8]) -> Result<Asked<'_>, ApiError> {
    asked(peek(body)?)
}

fn asked(peek: Peek<'_>) -> Result<Asked<'_>, ApiError> {
    let mut placing = Placing::new(peek.prompt_tokens, peek.max_tokens);
    if let Some(text) = peek.everline {
        placing.wishes = Wishes::of_body(text)?;
    }
    Ok(Asked { model: Some(peek.model), placing, stream: peek.stream })
}

fn relayed(
    shard: &Shard,
    answered: Answered,
    asked: &Asked<'_>,
    body_of_request: &Bytes,
    mut tracked: Tracked,
    deadline: Instant,
) -> Response<FrontBody> {
    let Answered { response, booking, worker, rank, slot, foretold } = answered;
    let (mut head, body) = response.into_parts();
    tracked.set_status(head.status);
    tracked.set_worker(worker.id().clone());
    let content_type = head.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let ending = Ending::of(tracked.route());
    let events = content_type.starts_with(b"text/event-stream")
        && (ending == Ending::Done || !head.headers.contains_key(CONTENT_LENGTH))
        && head.status.is_success()
        && !head.headers.contains_key(CONTENT_ENCODING);
    if events {
        tracked.set_events();
        // The ending may have to differ from what the worker announced.
        head.headers.remove(CONTENT_LENGTH);
    }
    head.headers.insert(WORKER, slot.id().clone());
    foretold.tell(&worker, &mut head.headers);
    let ending = events.then_some(ending);
    let growth = events.then(|| Growth::new(asked.placing.prompt_tokens, worker.block_size()));
    let readable = head.status.is_success() && !head.headers.contains_key(CONTENT_ENCODING);
    let sequel = asked.model.as_deref().filter(|_| readable).and_then(|model| {
        let (path, placing, worker) = (tracked.route().path(), &asked.placing, worker.as_ref());
        let question = Question { path, model, body: body_of_request, placing, worker, rank };
        Sequel::of(&shard.front, question, events)
    });
    let idle = shard.front.config.proxy.idle_timeout;
    let limits = RelayLimits { idle, deadline, ending, growth, sequel };
    let relay = Relay::new(body, Some(booking), tracked, limits);
    let mut response = Response::new(FrontBody::relay(relay));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}
