//! Streams that the node agent beside a worker's engine generates. The client's replica chooses the
//! worker, keeps it booked and counts the request: the agent knows of no other worker, nor of what
//! they have to do. Where the client is at an edge, that counts the request, and a replica does the
//! rest ([`super::places`]).

use std::sync::{Arc, OnceLock, Weak};
use std::task::Poll;
use std::time::Instant;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use parking_lot::Mutex;
use tokio::time::Instant as Deadline;

use crate::http::attempts::{Asked, Attempts};
use crate::http::errors::ApiError;
use crate::http::front::Shard;
use crate::http::growth::Growth;
use crate::http::headers::{CACHED, OVERLAP_BLOCKS, TRACE};
use crate::http::keys::Caller;
use crate::http::metrics::{Outcome, Tracked};
use crate::http::proxy::tokenised;
use crate::http::queue::Held;
use crate::http::routes::Route;
use crate::http::sequel::{Question, Sequel};
use crate::http::upstream::{HeadersToWorker, Outgoing};
use crate::ids::WorkerId;
use crate::relay::begin::MOST_ORDERED;
use crate::relay::copy::{Copy, Seat, Sink};
use crate::relay::log::Event;
use crate::relay::order::Order;
use crate::relay::placing::{Place, Share};
use crate::relay::remote::Remote;
use crate::relay::remote::place::{Kept, Placing};
use crate::state::load::LoadDelta;
use crate::state::streams::Holder;

/// In an order: the data-parallel rank that was chosen.
const RANK: HeaderName = HeaderName::from_static("everline-placed-rank");
/// In an order: the worker that was chosen.
const WORKER: HeaderName = HeaderName::from_static("everline-placed-worker");
/// In an order: how long its prompt is, in tokens.
const PROMPT: HeaderName = HeaderName::from_static("everline-placed-prompt");

/// What the client's replica knows, and the agent puts into the answer's head.
pub(super) const FORETOLD: [HeaderName; 3] = [CACHED, OVERLAP_BLOCKS, TRACE];

fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u32> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// The rank that an order names.
pub(super) fn rank(headers: &HeaderMap) -> Option<u32> {
    number(headers, &RANK)
}

/// Whether an order is for this worker's agent. Addresses change hands.
pub(super) fn is_for(headers: &HeaderMap, worker: &WorkerId) -> bool {
    headers.get(WORKER).is_none_or(|meant| meant.as_bytes() == worker.as_str().as_bytes())
}

/// What a stream takes of its engine, as its agent sees it: the rank, and what is booked there.
pub fn takes(order: &Order, events: u64, block_size: u32) -> (u32, LoadDelta) {
    let headers = order.header_map();
    let prompt = u64::from(number(&headers, &PROMPT).unwrap_or_default());
    let cached = u64::from(number(&headers, &CACHED).unwrap_or_default());
    let prefill = if events == 0 { prompt.saturating_sub(cached).max(prompt.min(1)) } else { 0 };
    // An event is taken for a token, as everywhere.
    let blocks = prompt.saturating_add(events).div_ceil(block_size.max(1).into());
    let load = LoadDelta {
        requests: 1,
        prefill_tokens: i64::try_from(prefill).unwrap_or(i64::MAX),
        decode_blocks: i64::try_from(blocks).unwrap_or(i64::MAX),
    };
    (rank(&headers).unwrap_or_default(), load)
}

/// Where a stream is booked.
enum Hold {
    /// By this replica.
    Here(Held),
    /// By another one, for this edge.
    There(Kept),
}

impl Hold {
    fn began(&mut self) {
        match self {
            Hold::Here(booking) => booking.prefill_done(),
            Hold::There(kept) => kept.began(),
        }
    }

    fn grew(&mut self, blocks: u32) {
        match self {
            Hold::Here(booking) => booking.grow(blocks),
            Hold::There(kept) => kept.grew(blocks),
        }
    }

    fn heard(&mut self) {
        if let Hold::Here(booking) = self {
            booking.heard();
        }
    }
}

/// Who learns what the answer adds to the engine's cache, if nobody else tells.
enum Learns {
    Nobody,
    Here(Sequel),
    /// The replica that has the stream booked.
    There,
}

/// A stream that an agent shall generate.
pub(super) struct Placed {
    /// Which agent.
    pub(super) holder: Holder,
    booking: Hold,
    tracked: Tracked,
    growth: Growth,
    learns: Learns,
}

/// Chooses the worker for a stream, and books it there; `None` if that has no agent: then whoever
/// holds the stream chooses.
pub(super) async fn place(
    shard: &Shard,
    route: Route,
    order: &mut Order,
    mut asked: Asked<'_>,
    request_id: &HeaderValue,
    caller: &Caller,
) -> Result<Option<Placed>, ApiError> {
    let front = &shard.front;
    let remote = front.config.edge.as_ref();
    let has_agents = match remote {
        Some(remote) => remote.has_agents() && order.body.len() <= MOST_ORDERED,
        None => front.control.registry().has_agents,
    };
    if !has_agents {
        return Ok(None);
    }
    let headers = order.header_map();
    let mut tracked = front.metrics.track(route);
    tracked.set_request_id(request_id.clone());
    tracked.begin_span(&Method::POST, route.path(), &headers);
    tracked.set_caller(caller.clone());
    let placed = match remote {
        Some(remote) => by_replica(remote, order).await,
        None => choose(shard, route, order, &mut asked, request_id, &mut tracked).await.map(|chosen| {
            let Chosen { place, booking, sequel } = chosen?;
            let learns = sequel.map_or(Learns::Nobody, Learns::Here);
            Some(Found { place, booking: Hold::Here(booking), learns })
        }),
    };
    let Found { place, booking, learns } = match placed {
        Ok(Some(placed)) => placed,
        Ok(None) => {
            tracked.pass_to_stream();
            return Ok(None);
        }
        Err(error) => {
            // Counted by whoever answers with it.
            tracked.pass_to_stream();
            return Err(error);
        }
    };
    if let Some(cached) = place.cached {
        tracked.placed(place.prompt_tokens, cached);
    }
    foretell(order, &place);
    if let Some(model) = &asked.model {
        tracked.set_model(model);
    }
    if let Ok(worker) = WorkerId::parse(&place.id) {
        tracked.set_worker(worker);
    }
    tracked.set_events();
    tracked.sent_upstream();
    let growth = Growth::new(place.prompt_tokens, place.block_size);
    Ok(Some(Placed { holder: place.holder(), booking, tracked, growth, learns }))
}

struct Found {
    place: Place,
    booking: Hold,
    learns: Learns,
}

/// At an edge: a replica chooses.
async fn by_replica(remote: &Arc<Remote>, order: &Order) -> Result<Option<Found>, ApiError> {
    match remote.place(order).await {
        Placing::At(place, kept) => {
            let learns = if place.wants_text { Learns::There } else { Learns::Nobody };
            Ok(Some(Found { place, booking: Hold::There(kept), learns }))
        }
        Placing::Elsewhere => Ok(None),
        Placing::Refused(error) => Err(ApiError::from_wire(&error)),
    }
}

/// A place that was chosen here.
pub(super) struct Chosen {
    pub(super) place: Place,
    pub(super) booking: Held,
    /// Wants to read the answer.
    pub(super) sequel: Option<Sequel>,
}

/// Chooses by this replica's own view, and books; everybody is told where the prompt goes.
pub(super) async fn choose(
    shard: &Shard,
    route: Route,
    order: &Order,
    asked: &mut Asked<'_>,
    request_id: &HeaderValue,
    tracked: &mut Tracked,
) -> Result<Option<Chosen>, ApiError> {
    let front = &shard.front;
    tokenised(front, route, asked, &order.body).await;
    let headers = order.header_map();
    let deadline = Deadline::now() + std::time::Duration::from_millis(order.total_ms);
    let reserved = {
        // Nothing is sent from here.
        let rules = &front.config.proxy.headers;
        let to_worker = HeadersToWorker { client: &headers, request_id, rules, ours: HeaderMap::new() };
        let outgoing = Outgoing::new(&Method::POST, &order.target, to_worker, order.body.clone());
        Attempts::new(shard, &outgoing, asked, tracked, deadline).reserve().await?
    };
    // Two workers that share it have no agent in common.
    let Some((selection, mut booking, trace)) = reserved else { return Ok(None) };
    let (worker, rank, placing) = (&selection.worker, selection.rank, &asked.placing);
    let Some(agent) = worker.record.spec.agent() else { return Ok(None) };
    placing.sent_to(front, &selection, &mut booking);
    let sequel = asked.model.as_deref().and_then(|model| {
        let question = Question { path: route.path(), model, body: &order.body, placing, worker, rank };
        Sequel::of(front, question, true)
    });
    let (prefill_tokens, decode_blocks) = selection.to_book(placing.prompt_tokens);
    let place = Place {
        worker: worker.record.ix,
        id: worker.id().to_string(),
        agent,
        rank,
        block_size: worker.block_size(),
        prompt_tokens: placing.prompt_tokens,
        cached: placing.cached_tokens(&selection),
        share: Share { prefill_tokens, decode_blocks },
        wants_text: sequel.is_some(),
        trace: trace.and_then(|trace| trace.to_str().ok().map(str::to_owned)),
    };
    Ok(Some(Chosen { place, booking, sequel }))
}

/// Tells the agent what was chosen, and what it cannot know.
fn foretell(order: &mut Order, place: &Place) {
    let number = |number: u32| number.to_string();
    let ours = [
        (WORKER, Some(place.id.clone())),
        (RANK, Some(number(place.rank))),
        (PROMPT, Some(number(place.prompt_tokens))),
        (CACHED, place.cached.map(number)),
        (OVERLAP_BLOCKS, place.cached.map(|cached| number(cached / place.block_size.max(1)))),
        (TRACE, place.trace.clone()),
    ];
    // The client has no say in these.
    order.headers.retain(|(name, _)| ours.iter().all(|(ours, _)| ours.as_str() != name));
    for (name, value) in ours {
        order.headers.extend(value.map(|value| (name.as_str().to_owned(), value.into())));
    }
}

impl Placed {
    /// Reads along with the stream, for as long as the agent generates it.
    pub(super) fn follow(self, copy: &Arc<Copy>) {
        copy.set_booked_here(true);
        let along = Along { copy: Arc::downgrade(copy), seat: OnceLock::new(), state: Mutex::default() };
        let along = Arc::new(along);
        *along.state.lock() = Some(State { placed: self, began: false });
        // What there is already may have been forgotten only if it was too much to keep.
        match copy.seat(0, None, Some(Arc::clone(&along) as Arc<dyn Sink>), false) {
            Ok(seat) => {
                // Nobody else sets it.
                let _ = along.seat.set(seat);
                along.ready();
            }
            Err(_) => {
                copy.set_booked_here(false);
                along.over(Outcome::UpstreamError);
            }
        }
    }
}

/// In which attempt a stream is that an agent generates.
const AGENTS: u32 = 1;

struct State {
    placed: Placed,
    began: bool,
}

/// Frees what is booked when the stream is over, or somebody else goes on with it.
struct Along {
    copy: Weak<Copy>,
    seat: OnceLock<Seat>,
    state: Mutex<Option<State>>,
}

impl Along {
    /// Ends with that.
    fn over(&self, outcome: Outcome) {
        if let Some(mut state) = self.state.lock().take() {
            state.placed.tracked.finish(outcome);
        }
    }

    fn leave(&self, copy: &Copy, seat: Seat, end: impl FnOnce(State)) {
        let state = self.state.lock().take();
        if let Some(state) = state {
            end(state);
        }
        copy.set_booked_here(false);
        copy.leave(seat);
    }
}

impl State {
    fn finish(mut self) {
        self.placed.tracked.finish_with_status();
        match (self.placed.learns, self.placed.booking) {
            (Learns::Here(sequel), _) => sequel.finish(),
            (_, Hold::There(kept)) => kept.ended(),
            (Learns::There | Learns::Nobody, Hold::Here(_)) => {}
        }
    }

    fn take(&mut self, copy: &Copy, events: &[Event]) {
        let now = Instant::now();
        if std::mem::replace(&mut self.began, true) {
            self.placed.tracked.chunk(now);
        } else {
            if let Some(status) = copy.head().and_then(|head| StatusCode::from_u16(head.status).ok()) {
                self.placed.tracked.set_status(status);
            }
            self.placed.tracked.first_byte(now);
            self.placed.booking.began();
        }
        let mut blocks = 0;
        for event in events {
            // What ends an event was left out.
            for piece in [&event.lines, &b"\n"[..]] {
                blocks += self.placed.growth.push(piece);
                match (&mut self.placed.learns, &mut self.placed.booking) {
                    (Learns::Here(sequel), _) => sequel.push(piece),
                    (Learns::There, Hold::There(kept)) => kept.said(piece),
                    (Learns::There | Learns::Nobody, _) => {}
                }
            }
        }
        if blocks > 0 {
            self.placed.booking.grew(blocks);
        }
        self.placed.booking.heard();
    }
}

impl Sink for Along {
    fn ready(&self) {
        let (Some(copy), Some(seat)) = (self.copy.upgrade(), self.seat.get().copied()) else { return };
        loop {
            if copy.attempt() > AGENTS {
                // Booked and counted anew by whoever goes on.
                return self.leave(&copy, seat, |mut state| {
                    state.placed.tracked.pass_to_stream();
                });
            }
            match copy.read(seat, usize::MAX, None) {
                Poll::Pending => return,
                Poll::Ready(Ok(read)) => {
                    if let Some(state) = self.state.lock().as_mut() {
                        state.take(&copy, &read.events);
                    }
                    if read.events.last().is_some_and(|event| event.terminal) {
                        return self.leave(&copy, seat, State::finish);
                    }
                }
                Poll::Ready(Err(_)) => {
                    return self
                        .leave(&copy, seat, |mut state| state.placed.tracked.finish(Outcome::Canceled));
                }
            }
        }
    }
}
