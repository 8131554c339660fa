//! Replaying against a cluster: requests come as in the trace, in compressed time, and what comes
//! back is timed.
//!
//! At most `concurrency` requests are under way; further ones wait, and are counted as late. Each
//! has a time limit. Nothing of the answers is kept but the times and counts.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::json;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::prompt;
use super::sse::Reader;
use super::stats::{Done, Run, Spread};
use super::trace::Request;

/// How a trace is sent.
#[derive(Clone)]
pub struct Options {
    /// `http://host:port` of the cluster.
    pub url: String,
    /// The model asked for.
    pub model: String,
    /// The policy asked for, if it is not the cluster's.
    pub policy: Option<String>,
    /// An API key, if the cluster wants one.
    pub key: Option<String>,
    /// Certificates that are trusted for https.
    pub tls: rustls::ClientConfig,
    /// Arrivals come so many times as fast.
    pub speed: f64,
    /// Most requests under way.
    pub concurrency: usize,
    /// Longest time for one request.
    pub timeout: Duration,
    /// Tokens in a block of the trace.
    pub block_size: u32,
    /// Tokens that a block of the trace is made into.
    pub tokens_per_block: u32,
    /// Longest output asked for.
    pub max_output: u32,
    /// Send token ids below this to `/v1/completions`, instead of words to
    /// `/v1/chat/completions`.
    pub vocabulary: Option<u32>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Times and counts.
    pub run: Run,
    /// Requests that were sent later than they should have been, because too many were under way.
    pub late: usize,
    /// Why requests failed, how often; at most [`Outcome::MOST_REASONS`] different ones.
    pub failures: BTreeMap<String, usize>,
    /// Whether any answer said how much of its prompt was cached.
    pub cached_known: bool,
}

impl Outcome {
    /// Most different reasons that are told apart.
    pub const MOST_REASONS: usize = 16;
}

/// Most bytes read of an answer that is an error.
const MAX_ERROR: usize = 64 << 10;
/// Longest reason kept, in characters.
const MAX_REASON: usize = 200;
/// Longest time to connect.
const CONNECT: Duration = Duration::from_secs(5);
/// A request that is sent this much after its time is late.
const LATE: Duration = Duration::from_millis(20);
/// The header of requests that names a policy.
const POLICY: &str = "everline-policy";
/// The header of answers that names the worker.
const WORKER: &str = "everline-worker";

struct Answer {
    request: usize,
    done: Done,
    cached_known: bool,
    worker: Option<String>,
    /// When it ended, in seconds.
    ended: f64,
    failure: Option<String>,
}

struct Sender {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    options: Options,
    authorization: Option<HeaderValue>,
    start: Instant,
}

/// Replays a trace to its end.
pub async fn replay(requests: &[Request], options: Options) -> Result<Outcome, String> {
    let authorization = options.key.as_ref().map(|key| HeaderValue::from_str(&format!("Bearer {key}")));
    let authorization =
        authorization.transpose().map_err(|_| "the API key has characters that cannot be sent")?;
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_nodelay(true);
    let tls = HttpsConnectorBuilder::new().with_tls_config(options.tls.clone());
    let connector = tls.https_or_http().enable_http1().wrap_connector(tcp);
    let client = Client::builder(TokioExecutor::new()).build(connector);
    let (concurrency, speed) = (options.concurrency, options.speed);
    let sender = Arc::new(Sender { client, options, authorization, start: Instant::now() });
    let places = Arc::new(Semaphore::new(concurrency));
    let mut outcome = Outcome::default();
    // Bounded by the places: a request is spawned only once it has one.
    let mut running = JoinSet::new();
    let mut answers = Vec::with_capacity(requests.len());
    for (at, request) in requests.iter().enumerate() {
        let due = sender.start + Duration::from_secs_f64(request.at / speed);
        sleep_until(due).await;
        let Ok(place) = places.clone().acquire_owned().await else { break };
        outcome.late += usize::from(due.elapsed() > LATE);
        let (sender, request) = (sender.clone(), request.clone());
        running.spawn(async move {
            let answer = sender.send(at, &request).await;
            drop(place);
            answer
        });
        while let Some(Ok(answer)) = running.try_join_next() {
            answers.push(answer);
        }
    }
    while let Some(joined) = running.join_next().await {
        answers.extend(joined.ok());
    }
    answers.sort_by_key(|answer| answer.request);
    outcome.run.seconds = answers.iter().map(|a| a.ended).fold(0.0, f64::max);
    outcome.run.spread = spread(&answers);
    for answer in answers {
        outcome.cached_known |= answer.cached_known;
        outcome.run.requests.push(answer.done);
        let Some(why) = answer.failure else { continue };
        let known = outcome.failures.len() < Outcome::MOST_REASONS || outcome.failures.contains_key(&why);
        *outcome.failures.entry(if known { why } else { "others".to_owned() }).or_default() += 1;
    }
    Ok(outcome)
}

/// How evenly requests were spread over the workers that answered, looked at a hundred times.
fn spread(answers: &[Answer]) -> Vec<Spread> {
    const LOOKS: usize = 100;
    let mut workers: Vec<&str> = answers.iter().filter_map(|a| a.worker.as_deref()).collect();
    workers.sort_unstable();
    workers.dedup();
    let end = answers.iter().map(|a| a.ended).fold(0.0, f64::max);
    let look = |nth: usize| {
        let at = end * (nth as f64 + 0.5) / LOOKS as f64;
        let mut queues = vec![0_u32; workers.len()];
        for answer in answers.iter().filter(|a| a.done.at <= at && at < a.ended) {
            let worker = answer.worker.as_deref().and_then(|w| workers.binary_search(&w).ok());
            queues[worker?] += 1;
        }
        let total: u32 = queues.iter().sum();
        let most = queues.iter().copied().max().filter(|_| total > 0)?;
        Some(Spread { at, most_to_mean: f64::from(most) * queues.len() as f64 / f64::from(total) })
    };
    (0..LOOKS).filter_map(look).collect()
}

impl Sender {
    async fn send(&self, at: usize, request: &Request) -> Answer {
        let began = self.now();
        let mut answer = Answer {
            request: at,
            done: Done { at: began, prompt: request.input, ..Done::default() },
            cached_known: false,
            worker: None,
            ended: began,
            failure: None,
        };
        let exchange = self.exchange(request, &mut answer);
        let result = match timeout(self.options.timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(format!("not done within {} s", self.options.timeout.as_secs_f32())),
        };
        if let Err(why) = result {
            answer.done.ttft = None;
            answer.done.itl = None;
            answer.failure = Some(why.chars().take(MAX_REASON).collect());
        }
        answer.ended = self.now();
        answer
    }

    fn now(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    fn body(&self, request: &Request) -> (&'static str, Vec<u8>) {
        let options = &self.options;
        let (block, tokens) = (options.block_size, options.tokens_per_block);
        let mut body = json!({
            "model": options.model,
            "max_tokens": request.output.min(options.max_output),
            "temperature": 0,
            "ignore_eos": true,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let path = match options.vocabulary {
            Some(vocabulary) => {
                body["prompt"] = prompt::token_ids(request, block, tokens, vocabulary).into();
                "/v1/completions"
            }
            None => {
                body["messages"] = json!([{"role": "user", "content": prompt::text(request, block, tokens)}]);
                "/v1/chat/completions"
            }
        };
        (path, body.to_string().into_bytes())
    }

    async fn exchange(&self, request: &Request, answer: &mut Answer) -> Result<(), String> {
        let (path, body) = self.body(request);
        let mut asked = http::Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", self.options.url))
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(authorization) = &self.authorization {
            asked = asked.header(header::AUTHORIZATION, authorization);
        }
        if let Some(policy) = &self.options.policy {
            asked = asked.header(POLICY, policy);
        }
        let asked = asked.body(Full::new(body.into())).map_err(|e| e.to_string())?;
        let sent = self.now();
        let response = self.client.request(asked).await.map_err(|e| match e.source() {
            Some(cause) => format!("cannot reach {}: {cause}", self.options.url),
            None => format!("cannot reach {}: {e}", self.options.url),
        })?;
        let (head, mut body) = response.into_parts();
        let worker = head.headers.get(WORKER).and_then(|name| name.to_str().ok());
        answer.worker = worker.map(str::to_owned);
        if !head.status.is_success() {
            let text =
                Limited::new(body, MAX_ERROR).collect().await.map(|b| b.to_bytes()).unwrap_or_default();
            return Err(refusal(head.status, &text));
        }
        let mut reader = Reader::default();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| format!("the stream broke off: {e}"))?;
            if let Some(data) = frame.data_ref() {
                reader.take(data, self.now())?;
            }
        }
        reader.end()?;
        let done = &mut answer.done;
        done.ttft = reader.first.map(|first| first - sent);
        let gaps = reader.tokens().saturating_sub(1);
        done.itl = reader.first.filter(|_| gaps > 0).map(|first| (reader.last - first) / f64::from(gaps));
        if let Some(usage) = reader.usage {
            done.prompt = usage.prompt_tokens;
            let cached = usage.prompt_tokens_details.and_then(|details| details.cached_tokens);
            answer.cached_known = cached.is_some();
            done.cached = cached.unwrap_or(0);
        }
        Ok(())
    }
}

/// What an answer that is no stream says.
fn refusal(status: http::StatusCode, body: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    let code = parsed.as_ref().and_then(|body| body.pointer("/error/code")?.as_str());
    let message = parsed.as_ref().and_then(|body| body.pointer("/error/message")?.as_str());
    match (code, message) {
        // By its code, because messages name requests and would all be different.
        (Some(code), _) => format!("{} {code}", status.as_u16()),
        (None, Some(message)) => format!("{} {message}", status.as_u16()),
        (None, None) => status.to_string(),
    }
}
