//! An attempt at two workers that share a request: what [`crate::disagg`] says is sent to each, and what
//! comes back is told apart into answers and failures.
//!
//! Nothing is passed on before the decode worker has begun to answer, so that until then everything can
//! be tried again: always with a new prefill, because what one was handed over for is used up. Dropping
//! the future closes both connections, which ends the request at both engines.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING};
use http::response::Parts;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout_at};

use super::plan::Pair;
use super::{Answered, Attempts, Failure, Foretold};
use crate::disagg::at_once::{self, Legs};
use crate::disagg::logprobs::{InEvents, OfPrompt, are_asked_for};
use crate::disagg::turns::{Expired, Prefilled, Prefilling, is_complete};
use crate::disagg::{Members, answer};
use crate::http::errors::{ApiError, Code};
use crate::http::headers::new_request_id;
use crate::http::metrics::{Leg, LegEnd, Retry};
use crate::http::queue::Held;
use crate::http::upstream::{Drain, PairBody, SendError, Slot, UpstreamBody};
use crate::routing::select::Selection;
use crate::routing::view::WorkerView;
use crate::state::worker::Connector;

/// Largest answer of a prefill worker that is read: the ids and log probabilities of a long prompt.
const MOST_ANSWER: usize = 64 << 20;

/// How much of a decode worker's events is read to see whether the first one is an error.
const MOST_LEAD: usize = 64 << 10;

/// What became of an attempt.
pub(super) enum Shared {
    /// Somebody else was booked first: to be chosen anew.
    Again,
    /// An answer for the client.
    Answered(Box<Answered>),
    /// An engine's error, for the client if nobody does better.
    Refused(Box<Answered>),
    /// No answer. It is noted why.
    Failed,
    /// No answer, and none may be asked for elsewhere.
    Over(ApiError),
}

/// An answer, and which of the two gave it.
struct Got {
    response: Response<UpstreamBody>,
    slot: Arc<Slot>,
    by: Leg,
}

/// Why there is none.
enum Trouble {
    /// One of the two was not reached, or broke off.
    Lost(Leg, Failure),
    /// The prefill worker answered an error of its own.
    Refused(StatusCode),
    /// The prefill worker's answer is of no use.
    Unusable(String),
    /// What was handed over waited for too long.
    Expired(Expired),
    /// The decode worker has not got what was handed over; no telling whose fault it is.
    Handoff(String),
}

impl From<SendError> for Failure {
    fn from(why: SendError) -> Self {
        Failure::Failed(why)
    }
}

impl Attempts<'_> {
    /// Books the request at both, sends it, and waits until the answer begins.
    pub(super) async fn share(&mut self, pair: Pair) -> Shared {
        let trace = self.trace(&pair.decode, Some(&pair.prefill));
        let Some(mut at_prefill) = self.book(&pair.prefill).await else { return Shared::Again };
        let Some(mut at_decode) = self.book(&pair.decode).await else { return Shared::Again };
        let (front, placing) = (&self.shard.front, &self.asked.placing);
        placing.sent_to(front, &pair.prefill, &mut at_prefill);
        placing.sent_to(front, &pair.decode, &mut at_decode);
        let cached = placing.cached_tokens(&pair.prefill);
        if let Some(cached) = cached {
            self.tracked.placed(placing.prompt_tokens, cached);
        }
        if let Some(model) = &self.asked.model {
            self.tracked.set_model(model);
        }
        self.tracked.set_prefill_worker(Some(pair.prefill.worker.id().clone()));
        self.tracked.sent_upstream();
        let mut at_prefill = Some(at_prefill);
        let got = match pair.prefill.worker.record.spec.connector() {
            Connector::Sglang | Connector::Mooncake => self.at_once(&pair, &mut at_prefill).await,
            _ => self.in_turn(&pair, &mut at_prefill).await,
        };
        let Got { response, slot, by } = match got {
            Ok(got) => got,
            Err(trouble) => {
                // Before a pause: nothing runs at either any more.
                drop((at_prefill, at_decode));
                return self.note_trouble(&pair, trouble);
            }
        };
        self.shard.awake.stir();
        let status = response.status();
        let (by_whom, booking, prefill) = match by {
            Leg::Prefill => {
                self.tracked.set_prefill_worker(None);
                (&pair.prefill, at_prefill.unwrap_or(at_decode), None)
            }
            Leg::Decode => {
                let id = HeaderValue::from_str(pair.prefill.worker.id().as_str());
                (&pair.decode, at_decode, Some(id.unwrap_or(HeaderValue::from_static("unprintable"))))
            }
        };
        let worker = Arc::clone(&by_whom.worker);
        let foretold = Foretold { cached, trace, prefill };
        self.note_answer(&worker, status);
        let answered = Box::new(Answered { response, booking, worker, rank: by_whom.rank, slot, foretold });
        if !status.is_server_error() {
            return Shared::Answered(answered);
        }
        self.suspect(&pair);
        self.failures.push(format!("{}: answered {status}", answered.worker.id()));
        Shared::Refused(answered)
    }

    /// The prefill first, then the decode with what the prefill's answer says.
    async fn in_turn(&self, pair: &Pair, booking: &mut Option<Held>) -> Result<Got, Trouble> {
        let (prefill, decode) = (&pair.prefill, &pair.decode);
        let address = |of: &'_ Selection| of.worker.record.spec.transfer.side_channel.clone();
        let addresses = address(prefill).zip(address(decode));
        let addresses = addresses.as_ref().map(|(prefill, decode)| (prefill.as_str(), decode.as_str()));
        let connector = prefill.worker.record.spec.connector();
        let prefilling = Prefilling::new(connector, self.members()?, new_id(), addresses);
        let request_id = prefilling.request_id().and_then(|id| HeaderValue::from_str(id).ok());
        let leg = self.outgoing.leg(prefilling.body(), request_id.as_ref());
        let began = Instant::now();
        let sent = self.send(&prefill.worker, prefill.rank, &leg).await;
        let (response, slot) = sent.map_err(|why| Trouble::Lost(Leg::Prefill, why))?;
        let since = Instant::now();
        let (head, body) = response.into_parts();
        if is_for_client(head.status)? {
            return Ok(Got { response: Response::from_parts(head, body), slot, by: Leg::Prefill });
        }
        let answer = self.read(body).await.map_err(|why| Trouble::Lost(Leg::Prefill, why))?;
        note_well(&prefill.worker);
        match prefilling.answered(&answer) {
            Err(why) => Err(Trouble::Unusable(why.to_string())),
            Ok(Prefilled::Complete) => {
                self.count(Leg::Prefill, LegEnd::Complete, began);
                Ok(Got { response: self.complete(head, answer)?, slot, by: Leg::Prefill })
            }
            Ok(Prefilled::HandedOver(handoff)) => {
                self.count(Leg::Prefill, LegEnd::Ok, began);
                // Its blocks wait for the other one, but nothing is left to compute.
                *booking = None;
                let age = self.shard.front.config.pd.handoff_age;
                let body = handoff.spend(since.elapsed(), age).map_err(Trouble::Expired)?;
                let leg = self.outgoing.leg(body, request_id.as_ref());
                let began = Instant::now();
                let sent = self.send(&decode.worker, decode.rank, &leg).await;
                let (response, slot) = sent.map_err(|why| Trouble::Lost(Leg::Decode, why))?;
                let response = self.begun(response).await?;
                self.count_decode(response.status(), began);
                Ok(Got { response, slot, by: Leg::Decode })
            }
        }
    }

    /// Both at the same time.
    async fn at_once(&self, pair: &Pair, booking: &mut Option<Held>) -> Result<Got, Trouble> {
        let (prefill, decode) = (&pair.prefill, &pair.decode);
        let members = self.members()?;
        let merges = are_asked_for(self.outgoing.path(), &members);
        let is_mooncake = prefill.worker.record.spec.connector() == Connector::Mooncake;
        let legs = self.legs_at_once(prefill, members).await?;
        let (to_prefill, to_decode) =
            (self.outgoing.leg(legs.prefill, None), self.outgoing.leg(legs.decode, None));
        let began = Instant::now();
        let mut prefilling = pin!(self.send(&prefill.worker, prefill.rank, &to_prefill));
        let mut decoding = pin!(async {
            let sent = self.send(&decode.worker, decode.rank, &to_decode).await;
            let (response, slot) = sent.map_err(|why| Trouble::Lost(Leg::Decode, why))?;
            Ok::<_, Trouble>((self.begun(response).await?, slot))
        });
        let (mut head, mut drain, mut prefilled, mut decoded) = (None, None::<Drain>, None, None);
        let until = self.until();
        while head.is_none() || decoded.is_none() || (merges && prefilled.is_none()) {
            tokio::select! {
                biased;
                sent = &mut prefilling, if head.is_none() => {
                    let (response, slot) = sent.map_err(|why| Trouble::Lost(Leg::Prefill, why))?;
                    let (parts, body) = response.into_parts();
                    if is_for_client(parts.status)? {
                        let response = Response::from_parts(parts, body);
                        return Ok(Got { response, slot, by: Leg::Prefill });
                    }
                    note_well(&prefill.worker);
                    let keep = (merges || is_mooncake).then_some(MOST_ANSWER);
                    // Booked until the end of its answer.
                    drain = booking.take().map(|booking| Drain::new(body, booking, keep));
                    head = Some((parts, slot));
                }
                end = poll_fn(|cx| drain.as_mut().map_or(Poll::Pending, |drain| drain.poll_end(cx))),
                    if drain.is_some() =>
                {
                    drain = None;
                    let answer = match end {
                        Ok(answer) => answer,
                        // It has done its part.
                        Err(_) if decoded.is_some() => Vec::new(),
                        Err(_) => return Err(Trouble::Lost(Leg::Prefill, SendError::Closed.into())),
                    };
                    if is_mooncake && !answer.is_empty() && is_complete(&answer).map_err(|why| Trouble::Unusable(why.to_string()))?
                        && let Some((parts, slot)) = head.take()
                    {
                        // Nothing was handed over: the decode worker would wait for it.
                        self.count(Leg::Prefill, LegEnd::Complete, began);
                        return Ok(Got { response: self.complete(parts, answer.into())?, slot, by: Leg::Prefill });
                    }
                    self.count(Leg::Prefill, LegEnd::Ok, began);
                    prefilled = Some(answer);
                }
                sent = &mut decoding, if decoded.is_none() => {
                    let (response, slot) = sent?;
                    self.count_decode(response.status(), began);
                    if !response.status().is_success() {
                        return Ok(Got { response, slot, by: Leg::Decode });
                    }
                    decoded = Some((response, slot));
                }
                () = tokio::time::sleep_until(until) => {
                    let late = if head.is_none() || decoded.is_some() { Leg::Prefill } else { Leg::Decode };
                    return Err(Trouble::Lost(late, Failure::Timeout(out_of_time())));
                }
            }
        }
        // All are there now.
        let Some((response, slot)) = decoded else {
            return Err(Trouble::Handoff("nobody answered".to_owned()));
        };
        if drain.is_some() {
            // The decode has begun, so the prefill has done its part; what is left of its answer is drained.
            self.count(Leg::Prefill, LegEnd::Ok, began);
        }
        let of_prompt = merges.then(|| OfPrompt::read(&prefilled.unwrap_or_default()));
        let response = self.beside(response, drain, of_prompt).await?;
        Ok(Got { response, slot, by: Leg::Decode })
    }

    async fn legs_at_once(&self, prefill: &Selection, members: Members<'_>) -> Result<Legs, Trouble> {
        let worker = &prefill.worker;
        let (host, port) = worker.record.spec.bootstrap();
        if worker.record.spec.connector() == Connector::Mooncake {
            let limit = self.shard.front.config.nodes.probe_timeout;
            let found =
                self.shard.front.bootstraps.engine(&self.shard.pool, worker, prefill.rank, limit).await;
            let (engine, url) = found.map_err(Trouble::Unusable)?;
            return Ok(at_once::mooncake(&members, &new_id(), &engine, &url));
        }
        let Some(shape) = self.splits.of(self.outgoing.path(), self.outgoing.body()) else {
            return Err(Trouble::Handoff("it cannot be split".to_owned()));
        };
        let rank = (worker.dp_ranks() > 1).then_some(prefill.rank);
        Ok(at_once::sglang(members, &shape, (host, port), rank, rand::random::<u64>))
    }

    /// The decode worker's answer, with the prefill worker's beside it, or in it.
    async fn beside(
        &self,
        response: Response<UpstreamBody>,
        drain: Option<Drain>,
        of_prompt: Option<OfPrompt>,
    ) -> Result<Response<UpstreamBody>, Trouble> {
        let (mut head, body) = response.into_parts();
        let body = match of_prompt {
            None => PairBody::begin(None, body, drain, None),
            Some(of_prompt) if is_events(&head.headers) => {
                head.headers.remove(CONTENT_LENGTH);
                PairBody::begin(None, body, drain, Some(InEvents::new(of_prompt)))
            }
            Some(of_prompt) => {
                let answer = self.read(body).await.map_err(|why| Trouble::Lost(Leg::Decode, why))?;
                let answer = of_prompt.with(&answer).unwrap_or(answer);
                head.headers.insert(CONTENT_LENGTH, answer.len().into());
                head.headers.remove(TRANSFER_ENCODING);
                UpstreamBody::Whole(Some(answer))
            }
        };
        Ok(Response::from_parts(head, body))
    }

    /// An answer that has begun in earnest. Engines that cannot get what was handed over say so in an
    /// event, under a status that promised an answer.
    async fn begun(&self, response: Response<UpstreamBody>) -> Result<Response<UpstreamBody>, Trouble> {
        if !response.status().is_success() || !is_events(response.headers()) {
            return Ok(response);
        }
        let (head, mut body) = response.into_parts();
        let mut lead = Vec::new();
        let until = self.until();
        while first_data(&lead).is_none() && lead.len() < MOST_LEAD {
            let frame = timeout_at(until, body.frame()).await;
            let frame = frame.map_err(|_| Trouble::Lost(Leg::Decode, Failure::Timeout(out_of_time())))?;
            let Some(Ok(frame)) = frame else {
                return Err(Trouble::Lost(Leg::Decode, SendError::Closed.into()));
            };
            lead.extend_from_slice(frame.data_ref().map(Bytes::as_ref).unwrap_or_default());
        }
        if let Some(text) = first_data(&lead).and_then(error_of) {
            return Err(Trouble::Handoff(text));
        }
        let body = PairBody::begin(Some(lead.into()), body, None, None);
        Ok(Response::from_parts(head, body))
    }

    /// The prefill worker's answer as the client's.
    fn complete(&self, mut head: Parts, answer: Bytes) -> Result<Response<UpstreamBody>, Trouble> {
        let body = if self.asked.stream {
            let options = Members::parse(self.outgoing.body()).and_then(|members| {
                let options = members.get("stream_options")?.to_owned();
                Some(Members::parse(options.as_bytes())?.is_true("include_usage"))
            });
            let events = answer::as_events(&answer, options.unwrap_or(false));
            let events = events.ok_or_else(|| Trouble::Unusable("its answer cannot be read".to_owned()))?;
            let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
            head.headers.insert(CONTENT_TYPE, kind);
            head.headers.remove(CONTENT_LENGTH);
            events
        } else {
            let answer = answer::whole(answer);
            head.headers.insert(CONTENT_LENGTH, answer.len().into());
            answer
        };
        head.headers.remove(TRANSFER_ENCODING);
        Ok(Response::from_parts(head, UpstreamBody::Whole(Some(body))))
    }

    fn members(&self) -> Result<Members<'_>, Trouble> {
        // It was an object when it was looked at.
        Members::parse(self.outgoing.body())
            .ok_or_else(|| Trouble::Handoff("the body is no object".to_owned()))
    }

    fn until(&self) -> Instant {
        self.deadline.min(Instant::now() + self.shard.front.config.proxy.first_byte_timeout)
    }

    /// Reads an answer to its end.
    async fn read(&self, mut body: UpstreamBody) -> Result<Bytes, Failure> {
        let until = self.until();
        let mut answer = Vec::new();
        loop {
            let frame = timeout_at(until, body.frame()).await;
            match frame.map_err(|_| Failure::Timeout(out_of_time()))? {
                None => return Ok(answer.into()),
                Some(Err(_)) => return Err(SendError::Closed.into()),
                Some(Ok(frame)) => {
                    let data = frame.data_ref().map(Bytes::as_ref).unwrap_or_default();
                    if answer.len() + data.len() > MOST_ANSWER {
                        return Err(SendError::Garbage("its answer is too long".to_owned()).into());
                    }
                    answer.extend_from_slice(data);
                }
            }
        }
    }

    fn note_trouble(&mut self, pair: &Pair, trouble: Trouble) -> Shared {
        let worker = |leg| match leg {
            Leg::Prefill => &pair.prefill.worker,
            Leg::Decode => &pair.decode.worker,
        };
        let prefill = worker(Leg::Prefill);
        self.shard.front.bootstraps.forget(prefill);
        let (leg, end) = match &trouble {
            Trouble::Lost(leg, _) => (*leg, LegEnd::Failed),
            Trouble::Refused(_) => (Leg::Prefill, LegEnd::Refused),
            Trouble::Unusable(_) => (Leg::Prefill, LegEnd::Failed),
            Trouble::Expired(_) => (Leg::Decode, LegEnd::Expired),
            Trouble::Handoff(_) => (Leg::Decode, LegEnd::Refused),
        };
        self.shard.front.metrics.leg(leg, end, std::time::Duration::ZERO);
        match trouble {
            Trouble::Lost(leg, Failure::Timeout(error)) => {
                self.breaker_failed(worker(leg));
                return Shared::Over(error);
            }
            Trouble::Lost(leg, Failure::Failed(why)) => self.note_failure(worker(leg), &why),
            Trouble::Refused(status) => {
                self.blame(prefill, format!("answered the prefill with {status}"));
                self.breaker_failed(prefill);
            }
            Trouble::Unusable(why) => self.blame(prefill, why),
            Trouble::Expired(why) => {
                self.trouble = Retry::Handoff;
                self.failures.push(format!("{}: {why}", prefill.id()));
            }
            Trouble::Handoff(why) => {
                self.note_reached(worker(Leg::Decode));
                self.suspect(pair);
                let (decode, prefill) = (worker(Leg::Decode).id(), prefill.id());
                self.failures.push(format!("{decode}: did not get what {prefill} prefilled ({why})"));
            }
        }
        Shared::Failed
    }

    fn blame(&mut self, worker: &WorkerView, why: String) {
        self.trouble = Retry::Handoff;
        self.note_reached(worker);
        self.tried.push(worker.id().clone());
        self.failures.push(format!("{}: {why}", worker.id()));
    }

    /// Either may be at fault: others are to be preferred, and these are not to be tried a third time.
    fn suspect(&mut self, pair: &Pair) {
        self.trouble = Retry::Handoff;
        self.tried.extend(self.suspects.note(pair));
    }

    fn count(&self, leg: Leg, end: LegEnd, began: Instant) {
        self.shard.front.metrics.leg(leg, end, began.elapsed());
    }

    fn count_decode(&self, status: StatusCode, began: Instant) {
        let end = if status.is_success() { LegEnd::Ok } else { LegEnd::Refused };
        self.count(Leg::Decode, end, began);
    }
}

/// Whether a prefill worker's answer is the client's because the request is at fault. A fault of the
/// worker's own is a reason to ask another one.
fn is_for_client(status: StatusCode) -> Result<bool, Trouble> {
    if status.is_server_error() { Err(Trouble::Refused(status)) } else { Ok(!status.is_success()) }
}

fn note_well(worker: &WorkerView) {
    worker.live.unreachable.store(false, std::sync::atomic::Ordering::Relaxed);
    worker.live.breaker.succeeded();
}

/// 32 hexadecimal digits, as engines expect an id to end.
fn new_id() -> String {
    new_request_id().to_str().unwrap_or_default().to_owned()
}

fn out_of_time() -> ApiError {
    ApiError::new(Code::UpstreamTimeout, "a worker did not begin to answer within the time allowed")
}

fn is_events(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    kind.starts_with(b"text/event-stream") && !headers.contains_key(CONTENT_ENCODING)
}

/// The first whole `data` line of events.
fn first_data(lead: &[u8]) -> Option<&[u8]> {
    let whole = &lead[..lead.iter().rposition(|byte| *byte == b'\n')?];
    whole.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"data:")).map(<[u8]>::trim_ascii)
}

/// What an event says that is an error, cut short.
fn error_of(data: &[u8]) -> Option<String> {
    const MOST: usize = 200;
    let members = Members::parse(data)?;
    let error = members.get("error")?;
    let message = Members::parse(error.as_bytes()).and_then(|error| {
        let message = error.get("message")?;
        serde_json::from_str::<String>(message).ok()
    });
    let text = message.unwrap_or_else(|| error.to_owned());
    Some(text.chars().take(MOST).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_in_the_first_event_is_seen_behind_comments_and_not_before_its_end() {
        let error = b": hello\n\ndata: {\"error\":{\"message\":\"no blocks\",\"code\":500}}\n\n";
        let end = error.len() - 2;
        assert_eq!(first_data(&error[..end - 1]), None);
        assert_eq!(first_data(error).and_then(error_of).as_deref(), Some("no blocks"));
        assert_eq!(error_of(br#"{"error":"plain"}"#).as_deref(), Some("\"plain\""));
        let output = b"data: {\"choices\":[{\"text\":\"error\"}]}\n\ndata: {\"error\":{}}\n\n";
        assert_eq!(first_data(output).and_then(error_of), None);
        assert_eq!(first_data(b"data: [DONE]\n").and_then(error_of), None);
    }
}
