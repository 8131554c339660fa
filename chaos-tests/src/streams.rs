//! Clients that read output streams to their end, come back when they are cut off, and check that
//! what they got is what an unhurt run says.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::fleet::MODEL;

/// After what silence a client takes its replica to be dead.
pub const STALL: Duration = Duration::from_millis(2500);
/// How long a client goes on trying to come back without hearing anything new.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(25);

/// What is asked.
#[derive(Clone, Debug)]
pub struct Question {
    /// The route.
    pub path: &'static str,
    /// The body.
    pub body: Value,
}

impl Question {
    /// One of several texts that run to their last token.
    pub fn whole(at: usize, tokens: u32) -> Self {
        let prompt = format!("count the stars over {at}");
        let mut body = json!({"model": MODEL, "max_tokens": tokens, "stream": true});
        let is_chat = at.is_multiple_of(2);
        match is_chat {
            true => body["messages"] = json!([{"role": "user", "content": prompt}]),
            false => body["prompt"] = json!(prompt),
        }
        Self { path: if is_chat { "/v1/chat/completions" } else { "/v1/completions" }, body }
    }

    /// One of a mix of requests: chats and completions, with several choices, text of several
    /// bytes a character, log probabilities, usage. With a stop string that `stop` names.
    pub fn mixed(at: usize, tokens: u32, stop: Option<&str>) -> Self {
        const PROMPTS: [&str; 4] =
            ["why is the sea salt", "tell a story", "count the stars", "naïve café 日本"];
        let prompt = format!("{} ({at})", PROMPTS[at % PROMPTS.len()]);
        let mut body = json!({"model": MODEL, "max_tokens": tokens, "stream": true, "temperature": 0});
        let is_chat = at.is_multiple_of(2);
        match is_chat {
            true => body["messages"] = json!([{"role": "user", "content": prompt}]),
            false => body["prompt"] = json!(prompt),
        }
        if at % 3 == 1 {
            body["stream_options"] = json!({"include_usage": true});
        }
        match at % 5 {
            // Engines refuse several greedy choices; the text does not depend on the temperature here.
            2 => (body["n"], body["temperature"]) = (json!(2), json!(0.7)),
            3 if is_chat => (body["logprobs"], body["top_logprobs"]) = (json!(true), json!(2)),
            3 => body["logprobs"] = json!(2),
            _ => {}
        }
        if let Some(stop) = stop {
            body["stop"] = json!([stop]);
        }
        Self { path: if is_chat { "/v1/chat/completions" } else { "/v1/completions" }, body }
    }
}

/// How a client behaves when it is cut off.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manner {
    /// `GET /v1/streams/{id}` with `Last-Event-ID`, as an EventSource does.
    Get,
    /// The same `POST` again with `Last-Event-ID`, as fetch-event-source does.
    Repost,
    /// Not at all.
    Plain,
}

/// What a stream said, without what differs from run to run.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Said {
    /// By choice: text, log probabilities, and why it ended.
    pub choices: BTreeMap<u64, Choice>,
    /// The usage event.
    pub usage: Option<Value>,
}

/// One choice.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Choice {
    /// All its text.
    pub text: String,
    /// Tokens and log probabilities.
    pub logprobs: Vec<Value>,
    /// Reason and stop.
    pub end: Option<(String, Value)>,
    /// Events that name the role.
    pub roles: u32,
}

/// One client's stream.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// What it said.
    pub said: Said,
    /// Which stream.
    pub id: String,
    /// Events.
    pub events: u64,
    /// What the last one is called.
    pub last_id: String,
    /// How often the client came back.
    pub returns: u32,
    /// How often a replica said that it went on elsewhere.
    pub seams: u32,
    /// Longest pauses between two events: with the connection still there, and with a return.
    pub stall: Duration,
    /// See [`Heard::stall`].
    pub away: Duration,
    /// Replicas that it was connected to.
    pub edges: Vec<String>,
    /// Who generated its beginning; unknown where a replica's answer began before the engine's.
    pub worker: Option<String>,
    /// One for each event.
    pub marks: Vec<Mark>,
    /// One for each time that a replica said that it went on elsewhere, and then did.
    pub pauses: Vec<Pause>,
    done: bool,
    ids: BTreeMap<String, ()>,
}

/// An event, as far as it matters where a stream was cut.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// When it came.
    pub at: Instant,
    /// It goes on, but has no text: its token is a part of a character, or its text is held.
    pub blank: bool,
    /// Tokens that it has log probabilities of.
    pub tokens: usize,
}

/// What a client felt of a seam.
#[derive(Clone, Debug)]
pub struct Pause {
    /// The replica that the client was connected to, if it is known.
    pub edge: Option<String>,
    /// When the event before it came.
    pub from: Instant,
    /// When the event after it came.
    pub until: Instant,
}

/// What a client of another kind heard.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Retold {
    stream: Option<String>,
    edge: Option<String>,
    worker: Option<String>,
    /// Each event's data, or the chunk that an SDK made of it.
    events: Vec<String>,
    /// Their ids; none where the client does not tell them.
    #[serde(default)]
    ids: Vec<String>,
    error: Option<String>,
}

/// How far a client has come.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Which stream.
    pub id: String,
    /// Who generated its beginning; unknown where a replica's answer began before the engine's.
    pub worker: Option<String>,
    /// Events so far.
    pub events: u64,
    /// See [`Mark::blank`], of the last one.
    pub blank: bool,
}

impl Heard {
    /// The longest pause that ended after `since`, and began before `until`: how many events came
    /// before it, and how long it was.
    pub fn pause(&self, since: Instant, until: Option<Instant>) -> Option<(usize, Duration)> {
        let pairs = self.marks.windows(2).enumerate();
        let pairs =
            pairs.filter(|(_, pair)| pair[1].at > since && until.is_none_or(|until| pair[0].at < until));
        pairs.map(|(at, pair)| (at + 1, pair[1].at - pair[0].at)).max_by_key(|(_, pause)| *pause)
    }

    /// What a client of another kind heard, looked at as closely. SDKs keep `[DONE]` to themselves.
    pub fn retold(retold: Retold) -> Result<Self, Broken> {
        let mut heard = Self { id: retold.stream.unwrap_or_default(), ..Self::default() };
        heard.edges.extend(retold.edge);
        heard.worker = retold.worker;
        let mut wrong = None;
        for (at, data) in retold.events.iter().enumerate() {
            let seq = match retold.ids.get(at) {
                None => Ok(heard.events),
                Some(id) => heard.seq_of(id),
            };
            if let Err(why) = seq.and_then(|seq| heard.take(seq, data)) {
                wrong = Some(why);
                break;
            }
        }
        if wrong.is_none() && retold.error.is_none() && retold.ids.is_empty() {
            wrong = heard.take(heard.events, "[DONE]").err();
        }
        let unfinished = || (!heard.done).then(|| "it ended before its stream".to_owned());
        match wrong.or(retold.error).or_else(unfinished) {
            None => Ok(heard),
            Some(why) => Err(Broken { why, heard: Box::new(heard), silent: false }),
        }
    }

    /// The number in an id, which must be of this stream.
    fn seq_of(&self, id: &str) -> Result<u64, String> {
        let seq = id.split_once('.').filter(|(stream, _)| *stream == self.id);
        // Behind the number may be which attempt said it.
        let number = seq.and_then(|(_, rest)| rest.split('.').next()?.parse().ok());
        number.ok_or_else(|| format!("an id that is none: {id:?}"))
    }

    fn progress(&self) -> Progress {
        let blank = self.marks.last().is_some_and(|mark| mark.blank);
        Progress { id: self.id.clone(), worker: self.worker.clone(), events: self.events, blank }
    }

    /// Takes an event in. The error says what must not be.
    fn take(&mut self, seq: u64, data: &str) -> Result<(), String> {
        if seq != self.events {
            return Err(format!("event {seq} after {} events", self.events));
        }
        if self.done {
            return Err(format!("{data} after the end"));
        }
        self.events += 1;
        self.marks.push(Mark { at: Instant::now(), blank: false, tokens: 0 });
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Value = serde_json::from_str(data).map_err(|error| format!("{error} in {data:?}"))?;
        if event.get("error").is_some() {
            return Err(data.to_owned());
        }
        self.ids.insert(event["id"].as_str().unwrap_or_default().to_owned(), ());
        if self.ids.len() > 1 {
            return Err(format!("several ids: {:?}", self.ids));
        }
        if event["usage"].is_object() && self.said.usage.replace(event["usage"].clone()).is_some() {
            return Err("usage twice".to_owned());
        }
        for choice in event["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().ok_or("a choice without index")?;
            let before = self.said.choices.get(&index).map_or(0, |heard| heard.logprobs.len());
            let heard = self.said.choices.entry(index).or_default();
            if heard.end.is_some() {
                return Err(format!("choice {index} goes on after its end"));
            }
            let text = choice["text"].as_str().or(choice["delta"]["content"].as_str());
            heard.text.push_str(text.unwrap_or_default());
            let has_role = choice["delta"]["role"].is_string();
            heard.roles += u32::from(has_role);
            let logprobs = &choice["logprobs"];
            match logprobs["content"].as_array() {
                Some(content) => heard.logprobs.extend(content.iter().map(numbers_alike)),
                None => {
                    let tokens = logprobs["tokens"].as_array().into_iter().flatten();
                    let numbers = logprobs["token_logprobs"].as_array().into_iter().flatten();
                    // Offsets depend on how an engine puts cut characters into events.
                    let pairs = tokens.zip(numbers).map(|(token, number)| json!([token, number]));
                    heard.logprobs.extend(pairs.map(|pair| numbers_alike(&pair)));
                }
            }
            if let Some(reason) = choice["finish_reason"].as_str() {
                heard.end = Some((reason.to_owned(), choice["stop_reason"].clone()));
            }
            if let Some(mark) = self.marks.last_mut() {
                mark.blank = text.is_none_or(str::is_empty) && !has_role && heard.end.is_none();
                mark.tokens += heard.logprobs.len() - before;
            }
        }
        Ok(())
    }
}

/// Languages write the same number in several ways.
fn numbers_alike(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(values) => values.iter().map(numbers_alike).collect(),
        Value::Object(map) => {
            map.iter().map(|(name, value)| (name.clone(), numbers_alike(value))).collect::<Value>()
        }
        other => other.clone(),
    }
}

/// Why a stream was not read to its end.
#[derive(Clone, Debug)]
pub struct Broken {
    /// What happened.
    pub why: String,
    /// How far it came.
    pub heard: Box<Heard>,
    /// It ended without a word: nobody could tell it from a good end, but for the missing `[DONE]`.
    pub silent: bool,
}

type Sender = Client<HttpConnector, Full<Bytes>>;

fn sender() -> Sender {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(Duration::from_secs(1)));
    // Each time a new connection, so that the balancer may choose anew.
    Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector)
}

enum Cut {
    /// The client may come back.
    Off(String),
    /// It is over.
    Over(String),
}

/// Reads the answer to a question to its end.
pub async fn read(base: &str, question: &Question, manner: Manner) -> Result<Heard, Broken> {
    let (stall, progress) = (STALL, watch::Sender::default());
    Reader { base: base.to_owned(), key: None, manner, stall, progress }.read(question).await
}

/// The same with an API key.
pub async fn read_as(key: &str, base: &str, question: &Question, manner: Manner) -> Result<Heard, Broken> {
    let (key, stall, progress) = (Some(key.to_owned()), STALL, watch::Sender::default());
    Reader { base: base.to_owned(), key, manner, stall, progress }.read(question).await
}

/// A client that others look at, or that has its own opinion of what silence means.
#[derive(Clone, Debug)]
pub struct Reader {
    /// Whom it asks.
    pub base: String,
    /// Its API key, where one is wanted.
    pub key: Option<String>,
    /// How it behaves when it is cut off.
    pub manner: Manner,
    /// After what silence it takes its replica to be dead.
    pub stall: Duration,
    /// Where it says how far it has come.
    pub progress: watch::Sender<Progress>,
}

impl Reader {
    /// Reads the answer to a question to its end.
    pub async fn read(&self, question: &Question) -> Result<Heard, Broken> {
        let (base, manner) = (&self.base, self.manner);
        let sender = sender();
        let mut heard = Heard::default();
        let key = format!("{:032x}", rand::random::<u128>());
        let body = Bytes::from(serde_json::to_vec(&question.body).expect("a body can be written"));
        let mut last = Instant::now();
        let mut came_back = false;
        loop {
            let post = || {
                let request = Request::builder().method(Method::POST).uri(format!("{base}{}", question.path));
                let request = request.header("content-type", "application/json");
                if manner == Manner::Plain { request } else { request.header("everline-resume", "1") }
            };
            let last_id = heard.last_id.clone();
            let request = match (heard.events, manner) {
                // A request that died before its answer's head is sent again under the same key.
                (0, Manner::Get | Manner::Repost) => {
                    post().header("idempotency-key", &key).body(Full::new(body.clone()))
                }
                (0, Manner::Plain) => post().body(Full::new(body.clone())),
                (_, Manner::Repost | Manner::Plain) => {
                    post().header("last-event-id", &last_id).body(Full::new(body.clone()))
                }
                (_, Manner::Get) => Request::builder()
                    .uri(format!("{base}/v1/streams/{}", heard.id))
                    .header("last-event-id", &last_id)
                    .body(Full::new(Bytes::new())),
            };
            let mut request = request.expect("a request can be built");
            if let Some(key) = &self.key {
                let bearer = HeaderValue::try_from(format!("Bearer {key}")).expect("keys are ASCII");
                request.headers_mut().insert("authorization", bearer);
            }
            let events = heard.events;
            let cut = match tokio::time::timeout(4 * self.stall, sender.request(request)).await {
                Err(_) => Cut::Off("no answer".to_owned()),
                Ok(Err(error)) => Cut::Off(format!("{error:?}")),
                Ok(Ok(response)) => self.listen(response, &mut heard, &mut last, came_back).await,
            };
            let broken = |why: String, heard: &Heard| {
                let silent = why == "the body ended";
                Err(Broken { why, heard: Box::new(heard.clone()), silent })
            };
            match cut {
                Cut::Over(why) if why.is_empty() => return Ok(heard),
                Cut::Over(why) => return broken(why, &heard),
                Cut::Off(why) if manner == Manner::Plain || last.elapsed() > PATIENCE => {
                    return broken(why, &heard);
                }
                Cut::Off(_) => {
                    heard.returns += u32::from(heard.events > events || !came_back);
                    came_back = true;
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn listen<B>(
        &self,
        response: Response<B>,
        heard: &mut Heard,
        last: &mut Instant,
        came_back: bool,
    ) -> Cut
    where
        B: BodyExt<Data = Bytes> + Unpin,
        B::Error: std::fmt::Debug,
    {
        let (head, mut body) = response.into_parts();
        let header = |name: &str| head.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        if head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS {
            return Cut::Off(head.status.to_string());
        }
        if head.status != StatusCode::OK {
            let text = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
            return Cut::Over(format!("{}: {}", head.status, String::from_utf8_lossy(&text)));
        }
        if let Some(edge) = header("everline-replica") {
            heard.edges.push(edge.to_owned());
        }
        if let Some(worker) = header("everline-worker") {
            heard.worker = Some(worker.to_owned());
        }
        if let Some(id) = header("everline-stream") {
            if heard.id.is_empty() {
                heard.id = id.to_owned();
            } else if heard.id != id {
                return Cut::Over(format!("{id} instead of {}", heard.id));
            }
        }
        let mut rest: Vec<u8> = Vec::new();
        let (mut id, mut data) = (None, None::<String>);
        let (mut returned, mut at_seam) = (came_back, false);
        loop {
            let frame = match tokio::time::timeout(self.stall, body.frame()).await {
                Err(_) => return Cut::Off("silence".to_owned()),
                Ok(None) => return Cut::Off("the body ended".to_owned()),
                Ok(Some(Err(error))) => return Cut::Off(format!("{error:?}")),
                Ok(Some(Ok(frame))) => frame,
            };
            rest.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]).into_owned();
                if line.starts_with(": everline attempt") {
                    heard.seams += 1;
                    at_seam = true;
                } else if let Some(text) = line.strip_prefix("id: ") {
                    match heard.seq_of(text) {
                        Ok(seq) => id = Some((seq, text.to_owned())),
                        Err(why) => return Cut::Over(why),
                    }
                } else if let Some(text) = line.strip_prefix("data: ") {
                    data = Some(text.to_owned());
                } else if line.is_empty() {
                    // An event is whole here, and not before.
                    let Some(data) = data.take() else {
                        return Cut::Over("an event without data".to_owned());
                    };
                    let Some((seq, name)) = id.take() else { return Cut::Over(format!("no id at {data}")) };
                    let (before, pause) = (*last, last.elapsed());
                    *last = Instant::now();
                    if std::mem::take(&mut at_seam) && !returned {
                        let edge = heard.edges.last().cloned();
                        heard.pauses.push(Pause { edge, from: before, until: *last });
                    }
                    let longest =
                        if std::mem::take(&mut returned) { &mut heard.away } else { &mut heard.stall };
                    if heard.events > 0 {
                        *longest = pause.max(*longest);
                    }
                    if let Err(why) = heard.take(seq, &data) {
                        return Cut::Over(why);
                    }
                    heard.last_id = name;
                    self.progress.send_replace(heard.progress());
                    if heard.done {
                        return Cut::Over(String::new());
                    }
                }
            }
        }
    }
}
