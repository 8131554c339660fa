//! Requests of clients that can come back: held by another replica than the client's, as any output
//! stream is ([`crate::relay`]), frame by frame or event by event. Whoever has read some of it reads on
//! from any replica. An engine cannot be asked to go on with what another one began, so that a stream
//! whose holder dies ends with an error, if anything was read of it, and is begun again otherwise.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Response};
use tokio::time::Instant;

use super::fixed::{self, Begun, Ending};
use super::legs::Sending;
use super::stream::Next;
use crate::http::attempts;
use crate::http::body::FrontBody;
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::keys::Caller;
use crate::http::metrics::Outcome;
use crate::http::placing::Placing;
use crate::http::routes::Route;
use crate::http::streams::create::{self, Asking};
use crate::http::streams::failing::{lost, refuse};
use crate::ksana::merge::{DONE, Frames};
use crate::relay::copy::Copy;
use crate::relay::hub::Relays;
use crate::relay::log::Event;
use crate::relay::order::{Framing, Head, Resumable, header_lines};
use crate::splice::sse::Parser;
use crate::state::streams::StreamEnd;

/// What the target of an order begins with that is for a pair: no path does.
pub(in crate::http) const TARGET: &str = "ksana:";

/// Largest frame or event.
const MOST_PIECE: usize = 8 << 20;

/// A request as it was admitted.
pub(super) struct Asked<'a> {
    pub(super) route: Route,
    pub(super) head: &'a Parts,
    pub(super) body: &'a Bytes,
    pub(super) request_id: &'a HeaderValue,
    pub(super) caller: &'a Caller,
    /// Headers that make what is measured of the stream a part of what the client measures.
    pub(super) trace: HeaderMap,
}

/// Serves a request.
pub(super) async fn stream_out(
    shard: &Shard,
    relays: &Arc<Relays>,
    asked: Asked<'_>,
) -> Result<Response<FrontBody>, ApiError> {
    let Asked { route, head, body, request_id, caller, trace } = asked;
    let asked = attempts::Asked { model: None, placing: Placing::default(), stream: true };
    let asking = Asking { route, head, body, asked, request_id, caller, background: None, trace };
    create::stream_out(shard, relays, asking).await
}

/// Generates a stream that is for a pair, to its terminal event. Dropping the future closes both legs.
pub(in crate::http) async fn generate(
    shard: &Arc<Shard>,
    relays: &Relays,
    copy: &Arc<Copy>,
    attempt: u32,
    route: Route,
) {
    let (front, order) = (&shard.front, &copy.order);
    let Some(ksana) = &front.ksana else {
        let error = ApiError::new(Code::ReplicaDown, "KsanaLLM is not served at this replica");
        return refuse(copy, attempt, route, &error);
    };
    if copy.next() > 0 {
        copy.ended_as(StreamEnd::Failed);
        let why = lost("the replica that had it is gone, and another pair cannot go on with it".to_owned());
        return refuse(copy, attempt, route, &why);
    }
    let mut tracked = front.metrics.track(route);
    let request_id =
        HeaderValue::from_str(&order.request_id).unwrap_or(HeaderValue::from_static("unprintable"));
    tracked.set_request_id(request_id.clone());
    tracked.set_stream(copy.id, attempt);
    let deadline = Instant::now() + Duration::from_millis(order.total_ms);
    let target = order.target.strip_prefix(TARGET).unwrap_or_default();
    let sending = Sending {
        strict: false,
        target: target.to_owned(),
        client: order.header_map(),
        request_id,
        // They do not travel between replicas.
        passes_credentials: false,
        body: order.body.clone(),
        head_limit: front.config.proxy.first_byte_timeout,
    };
    let is_generate = route == Route::KsanaGenerate;
    let mut begun = match fixed::begin(shard, ksana, sending, is_generate, &mut tracked, deadline).await {
        Ok(begun) => begun,
        Err(refusal) => {
            let (status, headers, body) = refusal.into_parts();
            tracked.set_status(status);
            tracked.finish(Outcome::of(status));
            copy.set_head(Arc::new(Head {
                status: status.as_u16(),
                headers: header_lines(&headers),
                framing: Framing::Raw,
                resumable: Resumable::Replay,
                worker: String::new(),
            }));
            copy.ended_as(StreamEnd::Failed);
            copy.append(attempt, Event { lines: body, terminal: true, ..Event::default() });
            return;
        }
    };
    tracked.set_status(begun.status);
    copy.set_head(Arc::new(head_of(&mut begun, copy, relays)));
    let mut cutter = Cutter::of(begun.ending);
    let failed = loop {
        // Nothing is read that could not be kept.
        copy.room().await;
        let events = match begun.next(deadline).await {
            Next::Bytes(bytes) => {
                tracked.first_byte(std::time::Instant::now());
                match cutter.push(bytes) {
                    Ok(events) => events,
                    Err(why) => break why,
                }
            }
            Next::End => {
                copy.push(attempt, copy.next(), cutter.end());
                return tracked.finish_with_status();
            }
            Next::Lost(why) => break why,
        };
        copy.push(attempt, copy.next(), events);
    };
    tracked.note_error(format!("{}: {failed}", route.path()));
    tracked.finish(Outcome::UpstreamError);
    copy.ended_as(StreamEnd::Failed);
    refuse(copy, attempt, route, &ApiError::new(Code::UpstreamFailed, failed));
}

fn head_of(begun: &mut Begun, copy: &Copy, relays: &Relays) -> Head {
    let mut headers = std::mem::take(&mut begun.headers);
    headers.remove(CONTENT_LENGTH);
    Head {
        status: begun.status.as_u16(),
        headers: header_lines(&headers),
        framing: match begun.ending {
            Ending::Frames => Framing::Frames,
            Ending::Events => Framing::Events,
            Ending::Plain => Framing::Raw,
        },
        resumable: match copy.bound() < relays.options.stream_bytes {
            true => Resumable::Unkept,
            false => Resumable::Replay,
        },
        worker: String::new(),
    }
}

/// Cuts an answer where it can be read on from.
enum Cutter {
    Frames(Frames),
    Events(Parser, bool),
    Plain,
}

impl Cutter {
    fn of(ending: Ending) -> Self {
        match ending {
            Ending::Frames => Self::Frames(Frames::new(MOST_PIECE)),
            Ending::Events => Self::Events(Parser::new(MOST_PIECE), false),
            Ending::Plain => Self::Plain,
        }
    }

    fn push(&mut self, bytes: Bytes) -> Result<Vec<Event>, String> {
        let event = |lines: Bytes| Event { lines, ..Event::default() };
        match self {
            Self::Frames(frames) => match frames.push(&bytes) {
                Some(whole) => Ok(whole.into_iter().map(|frame| event(frame.into())).collect()),
                None => Err(format!("a frame is longer than {MOST_PIECE} bytes")),
            },
            Self::Events(parser, is_done) => {
                parser.push(bytes).map_err(|why| why.to_string())?;
                let mut events = Vec::new();
                while let Some(next) = parser.next_event() {
                    let terminal = &next.data[..] == b"[DONE]";
                    *is_done |= terminal;
                    events.push(Event { lines: next.lines, terminal, ..Event::default() });
                }
                Ok(events)
            }
            Self::Plain => Ok(vec![event(bytes)]),
        }
    }

    /// The last events.
    fn end(self) -> Vec<Event> {
        let terminal = |lines: &'static [u8]| Event {
            lines: Bytes::from_static(lines),
            terminal: true,
            ..Event::default()
        };
        match self {
            Self::Frames(frames) => {
                let rest = frames.end().map(|rest| Event { lines: rest.into(), ..Event::default() });
                rest.into_iter().chain([terminal(DONE)]).collect()
            }
            Self::Events(_, true) => Vec::new(),
            // Its route has another end, or none: where it is must show.
            Self::Events(_, false) => vec![terminal(b"data: [DONE]\n")],
            Self::Plain => vec![terminal(b"")],
        }
    }
}
