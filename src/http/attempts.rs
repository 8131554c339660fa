//! One request's attempts at workers, one after the other, until one answers.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::{Response, StatusCode};
use tokio::time::{Instant, sleep, timeout_at};

use super::errors::{ApiError, Code};
use super::front::Shard;
use super::metrics::{Retry, Tracked};
use super::placing::Placing;
use super::queue::Held;
use super::reserving::{Reserving, book};
use super::upstream::{Outgoing, SendError, Slot, UpstreamBody};
use crate::ids::WorkerId;
use crate::routing::book::Reserve;
use crate::routing::select::{NoWorker, Selection};
use crate::routing::view::WorkerView;

/// A worker's answer, to its head.
pub(super) struct Answered {
    /// Head, and a body still to be read.
    pub(super) response: Response<UpstreamBody>,
    /// The request's share of the worker's load.
    pub(super) booking: Held,
    /// Who answers.
    pub(super) worker: Arc<WorkerView>,
    /// Its connections.
    pub(super) slot: Arc<Slot>,
    /// Tokens of the prompt that it has cached, as far as is known.
    pub(super) cached: Option<u32>,
}

/// What selection needs to know of a request.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    /// Model or adapter; `None` if any worker will do.
    pub(super) model: Option<Cow<'a, str>>,
    /// What else routing knows.
    pub(super) placing: Placing,
}

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
    /// What went wrong so far, for the error text; bounded by the number of attempts.
    failures: Vec<String>,
    /// Workers that may have read the request.
    reached: Vec<WorkerId>,
    /// A kept-alive connection has failed already.
    stale: bool,
    retries: u32,
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
            failures: Vec::new(),
            reached: Vec::new(),
            stale: false,
            retries: 0,
            reserving: Reserving::default(),
        }
    }

    pub(super) async fn run(mut self) -> Result<Answered, ApiError> {
        // A 502, 503 or 504 of a worker, kept in case nobody else does better.
        let mut held: Option<Answered> = None;
        loop {
            let selection = match self.choose() {
                Ok(selection) => selection,
                Err(NoWorker::Saturated { .. }) => {
                    let began = Instant::now();
                    let found = Box::pin(self.wait_in_line()).await;
                    self.tracked.waited(began.elapsed());
                    match found {
                        Ok(selection) => selection,
                        Err(error) => return held.ok_or(error),
                    }
                }
                Err(refusal) => return held.ok_or_else(|| self.refuse(&refusal)),
            };
            if self.retries > 0 {
                self.tracked.retrying(self.trouble);
            }
            let Some(booking) = self.book(&selection).await else { continue };
            self.asked.placing.sent_to(&self.shard.front, &selection);
            let cached = self.asked.placing.cached_tokens(&selection);
            if let Some(cached) = cached {
                self.tracked.placed(self.asked.placing.prompt_tokens, cached);
            }
            let Selection { worker, rank, .. } = selection;
            if let Some(model) = &self.asked.model {
                self.tracked.set_model(model);
            }
            self.tracked.sent_upstream();
            match self.send(&worker, rank).await {
                Ok((response, slot)) => {
                    self.shard.awake.stir();
                    self.note_answer(&worker, response.status());
                    let answered = Answered { response, booking, worker, slot, cached };
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
        if self.retries >= proxy.retry.attempts || self.reached_enough() {
            return false;
        }
        self.retries += 1;
        if matches!(self.trouble, Retry::Closed | Retry::Garbage | Retry::Status) {
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

    fn choose(&self) -> Result<Selection, NoWorker> {
        // Who came earlier goes first.
        if self.shard.front.queue.has_line(self.asked.model.as_deref()) {
            return Err(NoWorker::Saturated { workers: 0 });
        }
        self.select()
    }

    fn select(&self) -> Result<Selection, NoWorker> {
        let (front, placing) = (&self.shard.front, &self.asked.placing);
        let began = std::time::Instant::now();
        let selection = placing.choose(front, self.asked.model.as_deref(), &self.tried);
        self.tracked.selected(placing.policy_name(front), began.elapsed());
        selection
    }

    /// Waits for room at a worker, first come, first served.
    async fn wait_in_line(&self) -> Result<Selection, ApiError> {
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
                Ok(selection) => return Ok(selection),
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
    ) -> Result<(Response<UpstreamBody>, Arc<Slot>), Failure> {
        let pool = &self.shard.pool;
        let slot = pool.slot(worker).map_err(|why| Failure::Failed(SendError::Connect(why.to_string())))?;
        let limit = self.shard.front.config.proxy.first_byte_timeout;
        let deadline = self.deadline.min(Instant::now() + limit);
        // An engine with several ranks is told which one was meant.
        let ranked = (worker.dp_ranks() > 1).then(|| self.outgoing.to_rank(rank));
        let outgoing = ranked.as_ref().unwrap_or(self.outgoing);
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
