//! Generating a stream: asking engines for it, one after the other where one is lost, and putting
//! what they say into the stream's copy.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Uri};
use http_body_util::BodyExt as _;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::at_agent;
use super::failing::{dialect_of, events_of_failure, lost, refuse, route_of};
use super::legs::{Leg, Legs, Piece};
use super::response;
use crate::http::attempts::{Answered, Asked, Attempts};
use crate::http::errors::{ApiError, Code};
use crate::http::front::Shard;
use crate::http::headers;
use crate::http::ksana::held::{self, TARGET};
use crate::http::metrics::{Outcome, Tracked};
use crate::http::placing::Placing;
use crate::http::proxy::{look_for, tokenised};
use crate::http::routes::Route;
use crate::http::sequel::{Question, Sequel};
use crate::http::upstream::{HeadersToWorker, Outgoing, UpstreamBody};
use crate::http::wishes::Wishes;
use crate::ids::WorkerId;
use crate::relay::copy::Copy;
use crate::relay::counts::Counts;
use crate::relay::directory::Soon;
use crate::relay::hub::Relays;
use crate::relay::log::Event;
use crate::relay::order::{Framing, Head, Resumable, header_lines};
use crate::relay::{Engines, Failure};
use crate::splice::{self, LegId, Next, Out, Plan, Progress, Splice};
use crate::state::streams::StreamEnd;
use crate::state::worker::EngineKind;

/// Tokens after which a worker that was lost may be asked again.
const FORGIVEN: u64 = 16;

/// Generates streams with the workers of the registry.
pub struct Generator {
    shard: Arc<Shard>,
    relays: Arc<Relays>,
    /// The only worker, where a node agent generates.
    beside: Option<WorkerId>,
}

impl Generator {
    /// With connections of its own.
    pub fn new(shard: Arc<Shard>, relays: Arc<Relays>) -> Arc<Self> {
        Arc::new(Self { shard, relays, beside: None })
    }

    /// For the node agent beside this worker's engine: it goes where the client's replica said, and
    /// what the engine cannot finish is left to the replicas.
    pub fn beside(worker: WorkerId, shard: Arc<Shard>, relays: Arc<Relays>) -> Arc<Self> {
        Arc::new(Self { shard, relays, beside: Some(worker) })
    }
}

impl Engines for Generator {
    fn generate(self: Arc<Self>, copy: Arc<Copy>, attempt: u32, _stop: CancellationToken) -> Soon<()> {
        Box::pin(async move {
            if copy.order.target.starts_with(TARGET) {
                let route = route_of(&copy.order);
                return held::generate(&self.shard, &self.relays, &copy, attempt, route).await;
            }
            let Some(generation) = Generation::new(&self, &copy, attempt) else {
                let error = ApiError::new(Code::Internal, "a stream of an unknown route was ordered");
                return refuse(&copy, attempt, Route::Unknown, &error);
            };
            generation.run().await;
        })
    }

    fn failure(&self, copy: &Copy, failure: Failure, text: &str) -> Vec<Event> {
        events_of_failure(copy, failure, text)
    }
}

/// One attempt at a stream.
struct Generation<'a> {
    generator: &'a Generator,
    copy: &'a Arc<Copy>,
    attempt: u32,
    route: Route,
    headers: HeaderMap,
    request_id: HeaderValue,
    method: Method,
    deadline: Instant,
    tracked: Tracked,
    legs: Legs,
    /// How the last leg was lost.
    lost: Option<String>,
    /// Workers that have lost a leg, and how many tokens the stream had then.
    tried: Vec<(WorkerId, u64)>,
    out: Vec<Out>,
    seen_data: bool,
    /// When events were last handed out.
    last_out: std::time::Instant,
    /// A worker was lost since then.
    seam: bool,
    /// What the next event is preceded by: how another engine went on.
    note: Option<&'static [u8]>,
}

/// How an attempt went on.
enum Went {
    On,
    Over,
}

impl<'a> Generation<'a> {
    fn new(generator: &'a Generator, copy: &'a Arc<Copy>, attempt: u32) -> Option<Self> {
        let (front, order) = (&generator.shard.front, &copy.order);
        let route = Some(route_of(order)).filter(|route| *route != Route::Unknown)?;
        let headers = order.header_map();
        let request_id = HeaderValue::from_str(&order.request_id).ok()?;
        let mut tracked = front.metrics.track(route);
        tracked.set_request_id(request_id.clone());
        tracked.begin_span(&Method::POST, route.path(), &headers);
        tracked.set_stream(copy.id, attempt);
        tracked.set_events();
        let deadline = Instant::now() + Duration::from_millis(order.total_ms);
        let idle = front.config.proxy.idle_timeout;
        Some(Self {
            generator,
            copy,
            attempt,
            route,
            headers,
            request_id,
            method: Method::POST,
            deadline,
            tracked,
            legs: Legs::new(idle, deadline),
            lost: None,
            tried: Vec::new(),
            out: Vec::new(),
            seen_data: false,
            last_out: std::time::Instant::now(),
            seam: false,
            note: None,
        })
    }

    async fn run(mut self) {
        if let Err(error) = self.try_run().await {
            if self.may_go_on_elsewhere(&error) {
                tracing::info!(stream = %self.copy.id, why = %error.message, "left to the replicas");
                self.legs.clear();
                self.tracked.finish(Outcome::UpstreamError);
                self.copy.want_to_leave();
                // Whoever takes it over, or is missed for too long, ends this.
                return std::future::pending().await;
            }
            let error = self.in_stream(error);
            self.fail(&error);
        }
    }

    /// Whether replicas may do what the engine here did not.
    fn may_go_on_elsewhere(&self, error: &ApiError) -> bool {
        let for_want_of_the_engine = matches!(
            error.code,
            Code::NoWorkers | Code::NoWorkerAvailable | Code::UpstreamConnectFailed | Code::UpstreamFailed
        );
        let is_raw = self.copy.head().is_some_and(|head| head.framing == Framing::Raw);
        self.generator.beside.is_some() && for_want_of_the_engine && !is_raw
    }

    /// What a client is told whose stream has begun: that it was lost, or else that its workers have
    /// failed and how. Where other workers are wanting, that is not the reason.
    fn in_stream(&self, error: ApiError) -> ApiError {
        let began = self.copy.head().is_some_and(|head| head.framing == Framing::Events);
        match error.code {
            Code::StreamLost | Code::StreamCancelled | Code::UpstreamFailed => error,
            _ if !began => error,
            _ => {
                let text = match &self.lost {
                    Some(lost) => format!("{lost}; and {}", error.message),
                    None => error.message.to_string(),
                };
                ApiError::new(Code::UpstreamFailed, text)
            }
        }
    }

    fn fail(&mut self, error: &ApiError) {
        let code = error.code;
        let outcome = match code {
            Code::NoWorkers | Code::NoWorkerAvailable => Outcome::NoWorker,
            _ => Outcome::of(code.status()),
        };
        let front = &self.generator.shard.front;
        self.tracked.set_status(code.status());
        self.tracked.finish(outcome);
        front.metrics.reject(code.as_str());
        if code.status().is_server_error() {
            self.tracked.note_error(format!("{}: {}", self.route.path(), error.message));
        }
        if code == Code::StreamLost {
            Counts::add(&self.generator.relays.counts.lost);
        }
        self.copy.ended_as(StreamEnd::Failed);
        refuse(self.copy, self.attempt, self.route, error);
    }

    async fn try_run(&mut self) -> Result<(), ApiError> {
        let order = Arc::clone(&self.copy.order);
        let mut asked = look_for(self.route, &self.headers, &order.body, order.key.as_deref()).await?;
        if let Some(worker) = &self.generator.beside {
            if !at_agent::is_for(&self.headers, worker) {
                let text = format!("this is the agent of {worker}, and another one was meant");
                return Err(ApiError::new(Code::NoWorkerAvailable, text));
            }
            asked.placing.wishes = Wishes::pinned(worker.clone(), at_agent::rank(&self.headers));
        }
        tokenised(&self.generator.shard.front, self.route, &mut asked, &order.body).await;
        let dialect = dialect_of(self.route);
        let options = self.splice_options(asked.model.as_deref());
        let plan = Plan::new(dialect, &order.body, &options)
            .map_err(|error| ApiError::new(Code::InvalidJson, error.to_string()))?;
        let plan = Arc::new(plan);
        let begins = self.copy.next() == 0;
        let mut splice = if begins {
            Splice::new(Arc::clone(&plan))
        } else {
            let restored = self.copy.with_journal(|journal| Splice::restore(Arc::clone(&plan), journal));
            match restored {
                Some(Ok(splice)) => splice,
                Some(Err(error)) => return Err(lost(error.to_string())),
                None => return Err(lost("too much of it was forgotten".to_owned())),
            }
        };
        let engine = self.engine(asked.model.as_deref());
        let first_body = plan.first_body(engine);
        if begins {
            if let Went::Over = self.begin(&asked, &plan, &first_body, LegId::FIRST).await? {
                return Ok(());
            }
        } else if let Went::Over = self.go_on(&mut splice, &asked, &plan, &first_body).await? {
            return Ok(());
        }
        loop {
            // Nothing is read that could not be kept.
            self.copy.room().await;
            let (at, piece) = self.legs.next().await;
            let progress = self.take(&mut splice, at, piece);
            self.hand_out();
            match progress {
                Progress::Going => {}
                Progress::LegDone => self.legs.finish(at),
                Progress::Done => {
                    self.legs.clear();
                    self.tracked.finish_with_status();
                    return Ok(());
                }
                Progress::Failed(why) => {
                    let leg = self.legs.remove(at);
                    self.note_loss(leg, &why, splice.generated_tokens());
                    if let Went::Over = self.go_on(&mut splice, &asked, &plan, &first_body).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// What may be continued of the model's answers.
    fn splice_options(&self, model: Option<&str>) -> splice::Options {
        let front = &self.generator.shard.front;
        let view = front.control.registry();
        let workers = model.and_then(|model| view.by_model.get(model)).into_iter().flatten();
        let served = workers.flat_map(|at| &view.workers[*at].record.spec.models);
        let lengths = served.filter(|served| Some(served.name.as_str()) == model).map(|s| s.max_model_len);
        // Any of them may have to go on with it.
        front.config.streams.splice_of(model, lengths.flatten().min())
    }

    /// What the engines are that serve the model: the body is prepared for them.
    fn engine(&self, model: Option<&str>) -> EngineKind {
        let view = self.generator.shard.front.control.registry();
        let first = model.and_then(|model| view.by_model.get(model)?.first().copied());
        first.map(|at| view.workers[at].record.spec.engine).unwrap_or_default()
    }

    fn note_loss(&mut self, leg: Leg, why: &splice::Failure, tokens: u64) {
        let front = &self.generator.shard.front;
        let worker = leg.worker;
        if let splice::Failure::Ambiguous(why) = why {
            // It did nothing wrong: where its pieces happened to end says too little.
            tracing::info!(stream = %self.copy.id, worker = %worker.id(), %why, "a stream asks anew");
            self.lost = Some((*why).to_owned());
            self.tracked.seam("answer");
            self.seam = true;
            return;
        }
        tracing::info!(stream = %self.copy.id, worker = %worker.id(), %why, "a stream lost its engine");
        let lost = format!("worker {}: {why}", worker.id());
        self.tracked.note_error(lost.clone());
        self.lost = Some(lost);
        self.tracked.seam("worker");
        self.seam = true;
        worker.live.breaker.failed(front.now_ms(), &front.config.proxy.breaker);
        self.note_tried(worker.id().clone(), tokens);
    }

    /// Keeps what comes next away from a worker, until the stream has got on.
    fn note_tried(&mut self, worker: WorkerId, tokens: u64) {
        self.tried.retain(|(tried, _)| *tried != worker);
        self.tried.push((worker, tokens));
    }

    /// Takes what came of a leg.
    fn take(&mut self, splice: &mut Splice, at: usize, piece: Piece) -> Progress {
        let leg = self.legs.get(at);
        match piece {
            Piece::Data(data) => {
                let now = std::time::Instant::now();
                if self.seen_data {
                    self.tracked.chunk(now);
                } else {
                    self.seen_data = true;
                    self.tracked.first_byte(now);
                }
                if leg.heard(data).is_err() {
                    let _ = splice.leg_ended(leg.id, &mut self.out);
                    return Progress::Failed(splice::Failure::Malformed("an event is too long"));
                }
                let mut tokens = 0;
                let mut progress = Progress::Going;
                while let Some(event) = leg.parser.next_event() {
                    let before = self.out.len();
                    progress = splice.push(leg.id, &event, &mut self.out);
                    tokens += self.out[before..].iter().map(|out| out.tokens).sum::<u32>();
                    if progress != Progress::Going {
                        break;
                    }
                }
                leg.note_output(tokens);
                progress
            }
            Piece::End | Piece::Broken => splice.leg_ended(leg.id, &mut self.out),
            Piece::Silence => match splice.leg_ended(leg.id, &mut self.out) {
                failed @ Progress::Failed(_) => failed,
                // It said nothing for too long: not an end to be believed.
                _ => Progress::Failed(splice::Failure::Truncated),
            },
        }
    }

    /// Puts what is ready into the copy.
    fn hand_out(&mut self) {
        if self.out.is_empty() {
            return;
        }
        let now = std::time::Instant::now();
        let before = std::mem::replace(&mut self.last_out, now);
        if std::mem::take(&mut self.seam) && self.copy.next() > 0 {
            self.generator.relays.counts.worker_stall.observe_time(now.saturating_duration_since(before));
        }
        let events = self.out.drain(..);
        let (id, in_background, note) = (self.copy.id, self.copy.order.background, &mut self.note);
        let events = events.map(|out| {
            let lines = if in_background { response::named(id, out.lines) } else { out.lines };
            // A part of the event, so that whoever reads it again, anywhere, reads the note as well.
            let lines = match note.take() {
                Some(note) => [note, &lines].concat().into(),
                None => lines,
            };
            Event { lines, journal: out.journal, terminal: out.terminal }
        });
        self.copy.push(self.attempt, self.copy.next(), events);
    }

    /// Asks for what is missing.
    async fn go_on(
        &mut self,
        splice: &mut Splice,
        asked: &Asked<'_>,
        plan: &Plan,
        first_body: &Bytes,
    ) -> Result<Went, ApiError> {
        // One that has been lost long ago may be well again, and may be the only one.
        let tokens = splice.generated_tokens();
        self.tried.retain(|(_, at)| tokens < at + FORGIVEN);
        loop {
            if Instant::now() >= self.deadline {
                return Err(ApiError::new(
                    Code::UpstreamTimeout,
                    "the stream took longer than the total time allowed",
                ));
            }
            let next = splice.recover(&mut self.out);
            self.hand_out();
            match next {
                Next::Finish => {
                    self.legs.clear();
                    self.tracked.finish_with_status();
                    return Ok(Went::Over);
                }
                Next::Lost(why) => return Err(lost(why.to_string())),
                Next::Replay(leg) => return self.begin(asked, plan, first_body, leg).await,
                Next::Continue(legs) => {
                    Counts::add(&self.generator.relays.counts.continued);
                    if !legs.is_empty() {
                        self.note = Some(note_of(plan.resumable()));
                    }
                    let mut all_began = true;
                    for leg in legs {
                        all_began &= self.continue_leg(splice, asked, leg).await?;
                    }
                    if all_began && self.legs.is_empty() {
                        return Err(lost("nothing is left to be asked for".to_owned()));
                    }
                    if all_began {
                        return Ok(Went::On);
                    }
                }
            }
        }
    }

    /// Sends the whole request.
    async fn begin(
        &mut self,
        asked: &Asked<'_>,
        plan: &Plan,
        body: &Bytes,
        leg: LegId,
    ) -> Result<Went, ApiError> {
        let target = self.copy.order.target.clone();
        let answered = self.send(&target, body, asked).await?;
        let Answered { response, booking, worker, rank, foretold, .. } = answered;
        let (mut head, upstream) = response.into_parts();
        self.tracked.set_status(head.status);
        self.tracked.set_worker(worker.id().clone());
        let is_events = head.status.is_success() && is_event_stream(&head.headers);
        head.headers.remove(CONTENT_LENGTH);
        foretold.tell(&worker, &mut head.headers);
        head.headers.insert(
            headers::WORKER,
            HeaderValue::from_str(worker.id().as_str()).unwrap_or(HeaderValue::from_static("unprintable")),
        );
        if self.generator.beside.is_some() {
            // Nothing of the prompt is known here.
            for name in at_agent::FORETOLD {
                let foretold = self.headers.get(&name).cloned();
                head.headers.extend(foretold.map(|value| (name, value)));
            }
        }
        let resumable = match plan.resumable() {
            _ if self.copy.bound() < self.generator.relays.options.stream_bytes => Resumable::Unkept,
            _ if self.generator.beside.is_some() => Resumable::Exact,
            // Such an engine is asked for nothing on our account, so it says no token ids.
            _ if worker.record.spec.engine == EngineKind::OpenaiCompatible => Resumable::Replay,
            splice::Resumable::Continue { .. } => Resumable::Continue,
            splice::Resumable::Replay(_) => Resumable::Replay,
        };
        let head = Head {
            status: head.status.as_u16(),
            headers: header_lines(&head.headers),
            framing: if is_events { Framing::Events } else { Framing::Raw },
            resumable,
            worker: worker.id().to_string(),
        };
        if !is_events {
            self.copy.set_head(Arc::new(head));
            self.pass_on(upstream).await?;
            return Ok(Went::Over);
        }
        self.copy.set_head(Arc::new(head));
        let sequel = asked.model.as_deref().and_then(|model| {
            let (path, placing, worker) = (self.route.path(), &asked.placing, worker.as_ref());
            let question = Question { path, model, body, placing, worker, rank };
            Sequel::of(&self.generator.shard.front, question, true)
        });
        self.legs.add(Leg::new(leg, upstream, booking, worker, asked.placing.prompt_tokens, sequel));
        Ok(Went::On)
    }

    /// Passes an answer on that is no event stream.
    async fn pass_on(&mut self, mut body: UpstreamBody) -> Result<(), ApiError> {
        let idle = self.generator.shard.front.config.proxy.idle_timeout;
        loop {
            self.copy.room().await;
            let until = self.deadline.min(Instant::now() + idle);
            let frame = match tokio::time::timeout_at(until, body.frame()).await {
                Ok(Some(Ok(frame))) => frame,
                Ok(None) => break,
                Ok(Some(Err(_))) | Err(_) => {
                    let text = "the worker broke off in the middle of its answer";
                    return Err(ApiError::new(Code::UpstreamFailed, text));
                }
            };
            if let Ok(lines) = frame.into_data()
                && !lines.is_empty()
            {
                self.tracked.first_byte(std::time::Instant::now());
                self.copy.append(self.attempt, Event { lines, ..Event::default() });
            }
        }
        self.copy.append(self.attempt, Event { terminal: true, ..Event::default() });
        self.tracked.finish_with_status();
        Ok(())
    }

    /// Sends a continuation. False if the worker would not.
    async fn continue_leg(
        &mut self,
        splice: &mut Splice,
        asked: &Asked<'_>,
        leg: splice::Leg,
    ) -> Result<bool, ApiError> {
        let prompt_tokens = u32::try_from(leg.prompt_tokens).unwrap_or(u32::MAX);
        let mut placing = Placing::new(prompt_tokens, asked.placing.max_tokens);
        placing.wishes = asked.placing.wishes.clone();
        let mut continued = Asked {
            model: asked.model.as_deref().map(|model| Cow::Owned(model.to_owned())),
            placing,
            stream: true,
        };
        tokenised(&self.generator.shard.front, Route::Completions, &mut continued, &leg.body).await;
        let answered = self.send(leg.path, &leg.body, &continued).await?;
        let Answered { response, booking, worker, rank, .. } = answered;
        let (head, upstream) = response.into_parts();
        if !head.status.is_success() || !is_event_stream(&head.headers) {
            tracing::info!(stream = %self.copy.id, worker = %worker.id(), status = %head.status, "continuation refused");
            self.note_tried(worker.id().clone(), splice.generated_tokens());
            splice.leg_ended(leg.id, &mut self.out);
            return Ok(false);
        }
        self.tracked.set_worker(worker.id().clone());
        let sequel = continued.model.as_deref().and_then(|model| {
            let (path, placing, worker) = (leg.path, &continued.placing, worker.as_ref());
            let question = Question { path, model, body: &leg.body, placing, worker, rank };
            Sequel::of(&self.generator.shard.front, question, true)
        });
        self.legs.add(Leg::new(leg.id, upstream, booking, worker, prompt_tokens, sequel));
        Ok(true)
    }

    async fn send(&mut self, target: &str, body: &Bytes, asked: &Asked<'_>) -> Result<Answered, ApiError> {
        let shard = &self.generator.shard;
        let mut ours = self.tracked.span_headers();
        if let Some(authorization) = shard.pool.authorization() {
            ours.insert(AUTHORIZATION, authorization.clone());
        }
        let rules = &shard.front.config.proxy.headers;
        let headers = HeadersToWorker { client: &self.headers, request_id: &self.request_id, rules, ours };
        let outgoing = Outgoing::new(&self.method, target, headers, body.clone());
        let attempts = Attempts::new(shard, &outgoing, asked, &mut self.tracked, self.deadline);
        let tried: Vec<WorkerId> = self.tried.iter().map(|(worker, _)| worker.clone()).collect();
        attempts.not_to(&tried).run().await
    }
}

/// How a client is told that another engine goes on.
fn note_of(resumable: splice::Resumable) -> &'static [u8] {
    match resumable {
        splice::Resumable::Continue { inexact: Some(_) } => b": everline continued=inexact\n",
        _ => b": everline continued=exact\n",
    }
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let content_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    content_type.starts_with(b"text/event-stream") && !headers.contains_key(CONTENT_ENCODING)
}

/// Path and query of a request.
pub(super) fn target_of(uri: &Uri, route: Route) -> String {
    uri.path_and_query().map_or(route.path(), |target| target.as_str()).to_owned()
}
