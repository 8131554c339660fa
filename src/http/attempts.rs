//! One request's attempts at workers, or at pairs of them, one after the other, until one answers.

mod pair;
pub(super) mod plan;

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::time::{Instant, sleep, timeout_at};

use self::pair::Shared;
use self::plan::{Plan, Splits, Suspects};
use super::errors::{ApiError, Code};
use super::front::Shard;
use super::headers::{CACHED, OVERLAP_BLOCKS, PREFILL_WORKER, TRACE};
use super::metrics::{Retry, Tracked};
use super::placing::Placing;
use super::queue::{Held, LOOK_AGAIN};
use super::reserving::{Reserving, book};
use super::upstream::{Outgoing, SendError, Slot, UpstreamBody};
use crate::disagg::turns::without_transfer;
use crate::ids::WorkerId;
use crate::routing::book::Reserve;
use crate::routing::select::{NoWorker, Selection};
use crate::routing::view::WorkerView;
use crate::state::worker::WorkerRole;

/// A worker's answer, to its head.
pub(super) struct Answered {
    /// Head, and a body still to be read.
    pub(super) response: Response<UpstreamBody>,
    /// The request's share of the worker's load.
    pub(super) booking: Held,
    /// Who answers.
    pub(super) worker: Arc<WorkerView>,
    /// Which of its ranks was meant.
    pub(super) rank: u32,
    /// Its connections.
    pub(super) slot: Arc<Slot>,
    /// What routing foretells of the answer, and why it goes there.
    pub(super) foretold: Foretold,
}

/// What the answer's head says of the choice.
#[derive(Debug, Default)]
pub(super) struct Foretold {
    /// Tokens of the prompt that the worker has cached, as far as is known.
    pub(super) cached: Option<u32>,
    /// `Everline-Trace`, if it was asked for.
    pub(super) trace: Option<HeaderValue>,
    /// The prefill worker, if another one did that.
    pub(super) prefill: Option<HeaderValue>,
}

impl Foretold {
    /// Adds it to a head.
    pub(super) fn tell(self, worker: &WorkerView, headers: &mut HeaderMap) {
        if let Some(cached) = self.cached {
            headers.insert(CACHED, cached.into());
            headers.insert(OVERLAP_BLOCKS, (cached / worker.block_size()).into());
        }
        if let Some(trace) = self.trace {
            headers.insert(TRACE, trace);
        }
        if let Some(prefill) = self.prefill {
            headers.insert(PREFILL_WORKER, prefill);
        }
    }
}

/// What selection needs to know of a request.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    /// Model or adapter; `None` if any worker will do.
    pub(super) model: Option<Cow<'a, str>>,
    /// What else routing knows.
    pub(super) placing: Placing,
    /// The client wants events.
    pub(super) stream: bool,
}

/// Longest wait of a request that finds no worker for a replica that has just started to know what was
/// committed before.
const JUST_STARTED: Duration = Duration::from_secs(5);
/// Retries after attempts that reached nobody, beside `proxy.retries` others.
const MOST_UNREACHED: u32 = 8;

/// How far one request has come.
pub(super) struct Attempts<'a> {
    shard: &'a Shard,
    outgoing: &'a Outgoing<'a>,
    asked: &'a Asked<'a>,
    tracked: &'a mut Tracked,
    deadline: Instant,
    /// What went wrong last, for the metrics.
    trouble: Retry,
    /// Not to be tried again.
    tried: Vec<WorkerId>,
    /// Of pairs that failed without saying whose fault it was: not while there are others.
    suspects: Suspects,
    /// How the request may be split.
    splits: Splits,
    /// What went wrong so far, for the error text; bounded by the number of attempts.
    failures: Vec<String>,
    /// Workers that may have read the request.
    reached: Vec<WorkerId>,
    /// A kept-alive connection has failed already.
    stale: bool,
    retries: u32,
    /// Retries after attempts that reached nobody.
    unreached: u32,
    /// Bookings that wait for the cluster's word.
    reserving: Reserving,
}

/// Why an attempt brought no answer.
enum Failure {
    /// Another worker may do better.
    Failed(SendError),
    /// The worker may still be at it: not tried elsewhere.
    Timeout(ApiError),
}

impl<'a> Attempts<'a> {
    pub(super) fn new(
        shard: &'a Shard,
        outgoing: &'a Outgoing<'a>,
        asked: &'a Asked<'a>,
        tracked: &'a mut Tracked,
        deadline: Instant,
    ) -> Self {
        Self {
            shard,
            outgoing,
            asked,
            tracked,
            deadline,
            trouble: Retry::Connect,
            tried: Vec::new(),
            suspects: Suspects::default(),
            splits: Splits::default(),
            failures: Vec::new(),
            reached: Vec::new(),
            stale: false,
            retries: 0,
            unreached: 0,
            reserving: Reserving::default(),
        }
    }

    /// Leaves these workers out.
    pub(super) fn not_to(mut self, workers: &[WorkerId]) -> Self {
        self.tried.extend_from_slice(workers);
        self
    }

    /// Chooses a worker and books the request there, for somebody else to send it; with the trace, if
    /// it was asked for. `None` if two workers have to share it.
    pub(super) async fn reserve(
        mut self,
    ) -> Result<Option<(Selection, Held, Option<HeaderValue>)>, ApiError> {
        loop {
            let plan = match self.choose_or_learn().await {
                Ok(plan) => plan,
                Err(NoWorker::Saturated { .. }) => {
                    let began = Instant::now();
                    let found = Box::pin(self.wait_in_line()).await;
                    self.tracked.waited(began.elapsed());
                    found?
                }
                Err(refusal) => return Err(self.refuse(&refusal)),
            };
            let Plan::One(selection) = plan else { return Ok(None) };
            let trace = self.trace(&selection, None);
            if let Some(booking) = self.book(&selection).await {
                return Ok(Some((selection, booking, trace)));
            }
        }
    }

    pub(super) async fn run(mut self) -> Result<Answered, ApiError> {
        // A 502, 503 or 504 of a worker, kept in case nobody else does better.
        let mut held: Option<Answered> = None;
        loop {
            let plan = match self.choose_or_learn().await {
                Ok(plan) => plan,
                Err(NoWorker::Saturated { .. }) => {
                    let began = Instant::now();
                    let found = Box::pin(self.wait_in_line()).await;
                    self.tracked.waited(began.elapsed());
                    match found {
                        Ok(plan) => plan,
                        Err(error) => return held.ok_or(error),
                    }
                }
                Err(refusal) => return held.ok_or_else(|| self.refuse(&refusal)),
            };
            if self.retries > 0 {
                self.tracked.retrying(self.trouble);
            }
            let selection = match plan {
                Plan::One(selection) => selection,
                Plan::Two(pair) => {
                    // Boxed: most workers do whole requests.
                    match Box::pin(self.share(*pair)).await {
                        Shared::Again => continue,
                        Shared::Answered(answered) => return Ok(*answered),
                        Shared::Refused(answered) if held.is_some() || self.reached_enough() => {
                            return Ok(*answered);
                        }
                        Shared::Refused(answered) => held = Some(*answered),
                        Shared::Failed => {}
                        Shared::Over(error) => return Err(error),
                    }
                    if !Box::pin(self.may_go_on()).await {
                        return held.ok_or_else(|| self.give_up());
                    }
                    continue;
                }
            };
            let trace = self.trace(&selection, None);
            let Some(mut booking) = self.book(&selection).await else { continue };
            self.asked.placing.sent_to(&self.shard.front, &selection, &mut booking);
            let cached = self.asked.placing.cached_tokens(&selection);
            if let Some(cached) = cached {
                self.tracked.placed(self.asked.placing.prompt_tokens, cached);
            }
            let Selection { worker, rank, .. } = selection;
            if let Some(model) = &self.asked.model {
                self.tracked.set_model(model);
            }
            self.tracked.sent_upstream();
            let splits = worker.record.spec.role != WorkerRole::Aggregated;
            let alone = splits.then(|| without_transfer(self.outgoing.body())).flatten();
            let alone = alone.map(|body| self.outgoing.leg(body, None));
            match self.send(&worker, rank, alone.as_ref().unwrap_or(self.outgoing)).await {
                Ok((response, slot)) => {
                    self.shard.awake.stir();
                    self.note_answer(&worker, response.status());
                    let foretold = Foretold { cached, trace, prefill: None };
                    let answered = Answered { response, booking, worker, rank, slot, foretold };
                    let last = held.is_some() || self.reached_enough();
                    if last || !is_gateway_trouble(answered.response.status()) {
                        return Ok(answered);
                    }
                    self.tried.push(answered.worker.id().clone());
                    self.trouble = Retry::Status;
                    held = Some(answered);
                }
                Err(Failure::Timeout(error)) => {
                    self.breaker_failed(&worker);
                    return Err(error);
                }
                Err(Failure::Failed(why)) => {
                    // Before the pause: nothing runs at the worker any more.
                    drop(booking);
                    self.note_failure(&worker, &why);
                }
            }
            if !Box::pin(self.may_go_on()).await {
                return held.ok_or_else(|| self.give_up());
            }
        }
    }

    /// Whether another attempt is allowed; pauses before it where the last one cost a worker
    /// something.
    async fn may_go_on(&mut self) -> bool {
        let front = &self.shard.front;
        let proxy = &front.config.proxy;
        // An attempt that reached nobody says nothing of the request: where several engines died at once, the
        // next one may be well.
        let reached_nobody = matches!(self.trouble, Retry::Connect | Retry::Full | Retry::Stale);
        let free = if reached_nobody { MOST_UNREACHED.saturating_sub(self.unreached) } else { 0 };
        let left = proxy.retry.attempts.saturating_sub(self.retries - self.unreached);
        if proxy.retry.attempts == 0 || left.max(free) == 0 || self.reached_enough() {
            return false;
        }
        self.retries += 1;
        if free > 0 {
            self.unreached += 1;
        }
        if matches!(self.trouble, Retry::Closed | Retry::Garbage | Retry::Status | Retry::Handoff) {
            let now = std::time::Instant::now();
            if !front.retry_budget.take(&proxy.retry, front.metrics.requests_taken(), now) {
                self.failures
                    .push("not tried elsewhere, because too many requests are being retried".to_owned());
                return false;
            }
            sleep(proxy.retry.pause_before(self.retries)).await;
        }
        true
    }

    fn choose(&self) -> Result<Plan, NoWorker> {
        // Who came earlier goes first.
        if self.shard.front.queue.has_line(self.asked.model.as_deref()) {
            return Err(NoWorker::Saturated { workers: 0 });
        }
        self.select()
    }

    /// Chooses. A replica that has just started and finds nobody may not know yet who there is: the request
    /// waits then, whatever the balancer in front of it believes of its readiness.
    async fn choose_or_learn(&self) -> Result<Plan, NoWorker> {
        match self.choose() {
            Err(why) if self.tried.is_empty() && !matches!(why, NoWorker::Saturated { .. }) => {
                // Boxed: most requests find somebody.
                Box::pin(self.choose_once_current()).await
            }
            chosen => chosen,
        }
    }

    async fn choose_once_current(&self) -> Result<Plan, NoWorker> {
        let until = self.deadline.min(Instant::now() + JUST_STARTED);
        loop {
            // Looked at first: what is chosen from is no older.
            let status = self.shard.front.control.status();
            let knows_all = status.current || status.down.is_some() || Instant::now() >= until;
            match self.choose() {
                Err(why) if !knows_all && !matches!(why, NoWorker::Saturated { .. }) => {}
                chosen => return chosen,
            }
            sleep(LOOK_AGAIN).await;
        }
    }

    fn trace(&self, selection: &Selection, prefill: Option<&Selection>) -> Option<HeaderValue> {
        let model = self.asked.model.as_deref();
        self.asked.placing.trace(&self.shard.front, model, &self.tried, selection, prefill)
    }

    /// Waits for room at a worker, first come, first served.
    async fn wait_in_line(&self) -> Result<Plan, ApiError> {
        let front = &self.shard.front;
        let options = &front.config.proxy.queue;
        let saturated = |text: String| ApiError::new(Code::WorkersSaturated, text).retry_after(1);
        let Some(place) = front.queue.enter(self.asked.model.as_deref(), options) else {
            return Err(saturated(format!(
                "all workers are saturated and {} requests wait already; try again, or add workers",
                options.most
            )));
        };
        let until = self.deadline.min(Instant::now() + options.patience);
        loop {
            place.wait(until).await;
            match self.select() {
                Ok(plan) => return Ok(plan),
                Err(NoWorker::Saturated { .. }) if Instant::now() < until => {
                    // Somebody who may go where this one has been must not wait for it.
                    if !self.tried.is_empty() {
                        place.pass_on();
                    }
                }
                Err(NoWorker::Saturated { .. }) => {
                    return Err(saturated(format!(
                        "all workers were saturated for {} s; try again, or add workers",
                        options.patience.as_secs_f32()
                    )));
                }
                Err(refusal) => return Err(self.refuse(&refusal)),
            }
        }
    }

    /// Books the request where it was sent; `None` if it has to be chosen anew.
    async fn book(&mut self, selection: &Selection) -> Option<Held> {
        let front = &self.shard.front;
        let placing = &self.asked.placing;
        let booking = match placing.wishes.reserve.unwrap_or(front.config.proxy.reserve) {
            Reserve::Local => book(front, placing, selection),
            // Boxed: most requests do without.
            Reserve::Linearizable => Box::pin(self.reserving.book(front, placing, selection)).await?,
        };
        Some(Held::new(booking, &front.queue))
    }

    async fn send(
        &self,
        worker: &WorkerView,
        rank: u32,
        outgoing: &Outgoing<'_>,
    ) -> Result<(Response<UpstreamBody>, Arc<Slot>), Failure> {
        let pool = &self.shard.pool;
        let slot = pool.slot(worker).map_err(|why| Failure::Failed(SendError::Connect(why.to_string())))?;
        let limit = self.shard.front.config.proxy.first_byte_timeout;
        let deadline = self.deadline.min(Instant::now() + limit);
        // An engine with several ranks is told which one was meant.
        let engine = worker.record.spec.engine;
        let ranked = (worker.dp_ranks() > 1).then(|| outgoing.to_rank(rank, engine));
        let outgoing = ranked.as_ref().unwrap_or(outgoing);
        match timeout_at(deadline, pool.send(&slot, outgoing, self.stale)).await {
            Ok(Ok(response)) => Ok((response, slot)),
            Ok(Err(why)) => Err(Failure::Failed(why)),
            Err(_) => {
                let text = format!("worker {} did not begin to answer within the time allowed", worker.id());
                Err(Failure::Timeout(ApiError::new(Code::UpstreamTimeout, text)))
            }
        }
    }

    fn note_answer(&mut self, worker: &WorkerView, status: StatusCode) {
        self.note_reached(worker);
        if worker.live.unreachable.load(Ordering::Relaxed) {
            worker.live.unreachable.store(false, Ordering::Relaxed);
        }
        if status == StatusCode::INTERNAL_SERVER_ERROR || is_gateway_trouble(status) {
            self.breaker_failed(worker);
        } else {
            worker.live.breaker.succeeded();
        }
    }

    fn note_failure(&mut self, worker: &WorkerView, why: &SendError) {
        self.trouble = match why {
            SendError::Connect(_) | SendError::Forbidden(_) => Retry::Connect,
            SendError::Full => Retry::Full,
            SendError::Stale => Retry::Stale,
            SendError::Closed => Retry::Closed,
            SendError::Garbage(_) => Retry::Garbage,
        };
        match why {
            SendError::Connect(_) => {
                worker.live.unreachable.store(true, Ordering::Relaxed);
                self.tried.push(worker.id().clone());
            }
            SendError::Forbidden(_) | SendError::Full => self.tried.push(worker.id().clone()),
            // The worker itself may be well: it closed an idle connection just then. The next
            // attempt has a fresh connection. But it may also have died of the request.
            SendError::Stale if !self.stale => {
                self.stale = true;
                self.note_reached(worker);
            }
            SendError::Stale | SendError::Closed | SendError::Garbage(_) => {
                self.note_reached(worker);
                self.breaker_failed(worker);
                self.tried.push(worker.id().clone());
            }
        }
        self.failures.push(format!("{}: {why}", worker.id()));
    }

    fn note_reached(&mut self, worker: &WorkerView) {
        if !self.reached.contains(worker.id()) {
            self.reached.push(worker.id().clone());
        }
    }

    /// Whether no further worker may see the request.
    fn reached_enough(&self) -> bool {
        self.reached.len() >= self.shard.front.config.proxy.max_workers_reached as usize
    }

    fn breaker_failed(&self, worker: &WorkerView) {
        let front = &self.shard.front;
        worker.live.breaker.failed(front.now_ms(), &front.config.proxy.breaker);
    }

    fn refuse(&self, why: &NoWorker) -> ApiError {
        if !self.failures.is_empty() {
            return self.give_up();
        }
        refusal(self.asked.model.as_deref(), why)
    }

    fn give_up(&self) -> ApiError {
        let text = format!("every worker tried has failed ({})", self.failures.join("; "));
        let code = if !self.reached.is_empty() { Code::UpstreamFailed } else { Code::UpstreamConnectFailed };
        ApiError::new(code, text).retry_after(1)
    }
}

/// What a client hears when no worker can be chosen.
pub(super) fn refusal(model: Option<&str>, why: &NoWorker) -> ApiError {
    let model = model.map_or("any model".to_owned(), |name| format!("the model {:?}", printable(name)));
    match why {
        NoWorker::RegistryEmpty => ApiError::new(
            Code::NoWorkers,
            "no worker is registered; add one with `everline worker add http://host:port` or POST /v1/nodes",
        )
        .retry_after(5),
        NoWorker::UnknownModel { .. } => {
            ApiError::new(Code::ModelNotFound, format!("no worker serves {model}; {why}")).param("model")
        }
        NoWorker::AllFiltered { .. } | NoWorker::Saturated { .. } => ApiError::new(
            Code::NoWorkerAvailable,
            format!("no worker for {model} can take requests now ({why})"),
        )
        .retry_after(1),
    }
}

fn is_gateway_trouble(status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT)
}

/// A model name short enough for an error.
fn printable(model: &str) -> &str {
    let mut end = model.len().min(128);
    while !model.is_char_boundary(end) {
        end -= 1;
    }
    &model[..end]
}
