//! What a client asked, as far as continuing it goes, and the body that is sent in its place.

use bytes::Bytes;

use super::body::{Edits, Members};
use super::json;
use crate::state::worker::EngineKind;

/// The dialect of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum StreamRoute {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Completions,
    /// `/v1/messages`.
    Messages,
    /// `/v1/responses`.
    Responses,
    /// Anything else that answers with events.
    Other,
}

/// What is done about presence and frequency penalties, which count output tokens only and so
/// begin anew in a continuation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Penalties {
    /// Continue; the text may differ from what would have come.
    #[default]
    Continue,
    /// Do not continue.
    Fail,
}

/// What the operator says of continuing.
#[derive(Clone, Debug)]
pub struct Options {
    /// A request with a seed is not continued, because a continuation draws other numbers.
    pub strict_seed: bool,
    /// About presence and frequency penalties.
    pub penalties: Penalties,
    /// Most engines in a row that may be lost without getting on with a choice by some tokens; 0 has
    /// nothing continued. The loss of whoever drives the stream is not counted.
    pub max_continuations: u32,
    /// Most generated token ids that are kept for a stream, over all its choices (4 bytes each);
    /// with more it runs on but is not continued any more.
    pub max_kept_tokens: usize,
    /// What opens and closes the model's reasoning in its raw text.
    pub reasoning: (String, String),
    /// The token that closes the model's reasoning, if known. Without it a stream is not continued
    /// whose last event had several tokens of reasoning, or one that the engine kept back: whether
    /// the reasoning ended with them cannot be told.
    pub reasoning_end: Option<u32>,
    /// What opens a tool call in the model's raw text.
    pub tool_markers: Vec<String>,
    /// The model's context in tokens, if known: how much may be generated where the client gave
    /// no bound.
    pub context: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        let markers = [
            "<tool_call>",
            "<tool_calls>",
            "<|tool_call|>",
            "<|tool_call>",
            "[TOOL_CALLS]",
            "<|python_tag|>",
            "<function=",
            "<function_call",
            "<minimax:tool_call>",
            "<|tool_calls_section_begin|>",
            "<\u{ff5c}tool\u{2581}calls\u{2581}begin\u{ff5c}>",
            "<\u{ff5c}DSML\u{ff5c}",
        ];
        Self {
            strict_seed: false,
            penalties: Penalties::Continue,
            max_continuations: 3,
            max_kept_tokens: 1 << 18,
            reasoning: ("<think>".to_owned(), "</think>".to_owned()),
            reasoning_end: None,
            tool_markers: markers.map(str::to_owned).to_vec(),
            context: None,
        }
    }
}

/// Whether a stream survives its engine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Resumable {
    /// It is continued behind the last token whose text was seen.
    Continue {
        /// Why the text may differ from what the same engine would have said; `None` is exact.
        inexact: Option<&'static str>,
    },
    /// It is begun again, while the client has seen nothing of it. With the reason.
    Replay(&'static str),
}

/// Why a body has no plan.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    /// The body is not a JSON object.
    #[error("the body is not a JSON object: {0}")]
    NotAnObject(String),
}

/// What a client asked, read once.
#[derive(Clone, Debug)]
pub struct Plan {
    pub(super) route: StreamRoute,
    pub(super) body: Bytes,
    pub(super) members: Members,
    pub(super) resumable: Resumable,
    pub(super) options: Options,
    /// How many choices the client gets.
    pub(super) choices: u32,
    /// How many prompts the request has; choices are numbered prompt by prompt.
    pub(super) prompts: u32,
    /// Strings that end the text.
    pub(super) stops: Vec<String>,
    /// The client wants to see the string that ended the text.
    pub(super) shows_stop: bool,
    pub(super) stop_ids: Vec<u32>,
    /// Special tokens have text.
    pub(super) shows_special: bool,
    pub(super) min_tokens: u64,
    /// `None`: as much as the context holds.
    pub(super) max_tokens: Option<u64>,
    /// Log probabilities; for chats with how many alternatives.
    pub(super) logprobs: bool,
    pub(super) top_logprobs: usize,
    pub(super) usage: bool,
    pub(super) running_usage: bool,
    pub(super) token_ids: bool,
    pub(super) echo: bool,
    pub(super) tools: bool,
    /// The prompt came as token ids, which may end inside a character.
    pub(super) prompt_of_ids: bool,
}

/// Most choices of a request that is continued; more is replayed only.
const MAX_CHOICES: u64 = 128;

impl Plan {
    /// Reads the client's body. A body that is no JSON object is an error for the routes that
    /// are read ([`StreamRoute::Chat`] and [`StreamRoute::Completions`]); the engine would refuse it.
    pub fn new(route: StreamRoute, body: &Bytes, options: &Options) -> Result<Self, PlanError> {
        let read = matches!(route, StreamRoute::Chat | StreamRoute::Completions);
        let members = if read {
            serde_json::from_slice::<serde::de::IgnoredAny>(body)
                .map_err(|error| PlanError::NotAnObject(error.to_string()))?;
            Members::read(body, 0)
                .ok_or_else(|| PlanError::NotAnObject("it begins with something else".to_owned()))?
        } else {
            Members::default()
        };
        let chat = route == StreamRoute::Chat;
        let stream_options = members
            .raw(body, "stream_options")
            .and_then(|raw| Some((raw, Members::read(raw, 0)?)))
            .unwrap_or((b"{}", Members::default()));
        let usage = stream_options.1.is_true(stream_options.0, "include_usage");
        let stops = members.raw(body, "stop").map(stop_strings).unwrap_or_default();
        let logprobs = match chat {
            true => members.is_true(body, "logprobs"),
            false => members.raw(body, "logprobs").is_some_and(|raw| raw != b"false"),
        };
        let prompts = if chat { 1 } else { prompts(members.raw(body, "prompt")) };
        let prompt_of_ids = !chat
            && members.raw(body, "prompt").is_some_and(|raw| {
                let inner = raw.iter().find(|byte| !byte.is_ascii_whitespace() && **byte != b'[');
                raw.starts_with(b"[") && inner.is_some_and(u8::is_ascii_digit)
            });
        let choices = members.count(body, "n").unwrap_or(1).saturating_mul(prompts);
        let most = members.count(body, "max_tokens");
        let max_tokens = match chat {
            true => members.count(body, "max_completion_tokens").or(most),
            // What engines take for this route when nothing is said.
            false => Some(most.unwrap_or(16)),
        };
        let mut stop_ids = Vec::new();
        if let Some(raw) = members.raw(body, "stop_token_ids") {
            json::ids(raw, &mut stop_ids).unwrap_or_else(|| stop_ids.clear());
        }
        let choice = members.raw(body, "tool_choice");
        let tools = chat && members.is_set(body, "tools") && choice != Some(b"\"none\"");
        let mut plan = Self {
            route,
            body: body.clone(),
            resumable: Resumable::Replay("its events are not read"),
            options: options.clone(),
            prompts: u32::try_from(prompts).unwrap_or(u32::MAX),
            choices: u32::try_from(choices).unwrap_or(u32::MAX),
            shows_stop: members.is_true(body, "include_stop_str_in_output"),
            stop_ids,
            shows_special: members.raw(body, "skip_special_tokens") == Some(b"false"),
            min_tokens: members.count(body, "min_tokens").unwrap_or(0),
            max_tokens,
            logprobs,
            top_logprobs: members.count(body, "top_logprobs").unwrap_or(0) as usize,
            usage,
            running_usage: usage && stream_options.1.is_true(stream_options.0, "continuous_usage_stats"),
            token_ids: members.is_true(body, "return_token_ids"),
            echo: members.is_true(body, "echo"),
            tools,
            prompt_of_ids,
            stops,
            members,
        };
        if read {
            plan.resumable = plan.judge();
        }
        Ok(plan)
    }

    /// The hazards, in the order in which a person would name them.
    fn judge(&self) -> Resumable {
        let (members, body) = (&self.members, &self.body[..]);
        let chat = self.route == StreamRoute::Chat;
        let set = |key: &str| members.is_set(body, key);
        if !members.is_true(body, "stream") {
            return Resumable::Replay("it is not a stream");
        }
        let forbidden = [
            ("suffix", "suffix has no continuation"),
            ("use_beam_search", "beam search has no continuation"),
            ("prompt_logprobs", "prompt_logprobs are part of the first answer only"),
            ("prompt_embeds", "a prompt of embeddings has no token ids"),
            ("structured_outputs", "constrained output begins anew in a continuation"),
            ("guided_json", "constrained output begins anew in a continuation"),
            ("guided_regex", "constrained output begins anew in a continuation"),
            ("guided_choice", "constrained output begins anew in a continuation"),
            ("guided_grammar", "constrained output begins anew in a continuation"),
            ("structural_tag", "constrained output begins anew in a continuation"),
            ("regex", "constrained output begins anew in a continuation"),
            ("ebnf", "constrained output begins anew in a continuation"),
            ("json_schema", "constrained output begins anew in a continuation"),
            ("functions", "functions are called by the first engine only"),
            ("logits_processors", "logits_processors have a state of their own"),
            ("custom_logit_processor", "logits processors have a state of their own"),
            ("thinking_token_budget", "a budget of thinking begins anew in a continuation"),
            ("return_hidden_states", "hidden states are part of the first answer only"),
        ];
        if let Some((_, why)) = forbidden.iter().find(|(key, _)| set(key)) {
            return Resumable::Replay(why);
        }
        if members.count(body, "best_of").is_some_and(|best| best > 1) {
            return Resumable::Replay("best_of has no continuation");
        }
        if let Some(format) = members.raw(body, "response_format") {
            let kind = Members::read(format, 0);
            if kind.is_none_or(|kind| kind.raw(format, "type") != Some(b"\"text\"")) {
                return Resumable::Replay("constrained output begins anew in a continuation");
            }
        }
        if self.tools && !matches!(members.raw(body, "tool_choice"), None | Some(b"\"auto\"")) {
            return Resumable::Replay("a required tool call is constrained output");
        }
        if chat && members.raw(body, "messages").is_some_and(has_media) {
            return Resumable::Replay("images, audio and video are not in the token ids");
        }
        if u64::from(self.choices) > MAX_CHOICES || self.choices == 0 {
            return Resumable::Replay("it has too many choices");
        }
        let top = members.raw(body, "top_logprobs");
        if chat && self.logprobs && top.is_some_and(|_| members.count(body, "top_logprobs").is_none()) {
            return Resumable::Replay("all log probabilities at once have another shape");
        }
        let not_zero = |key: &str| members.number(body, key).is_some_and(|number| number != 0.0);
        let penalties = not_zero("presence_penalty") || not_zero("frequency_penalty");
        if penalties && self.options.penalties == Penalties::Fail {
            return Resumable::Replay("penalties on output begin anew in a continuation");
        }
        let seed = self.is_seeded();
        if seed && self.options.strict_seed {
            return Resumable::Replay("a continuation draws other numbers than the seed asks for");
        }
        let inexact = match (seed, penalties) {
            (true, _) => Some("a continuation draws other numbers than the seed asks for"),
            (_, true) => Some("penalties on output begin anew in a continuation"),
            _ => None,
        };
        Resumable::Continue { inexact }
    }

    /// Whether a seed decides anything: greedy choices draw no numbers.
    fn is_seeded(&self) -> bool {
        self.members.raw(&self.body, "seed").is_some()
            && self.members.number(&self.body, "temperature") != Some(0.0)
    }

    /// Whether the stream survives its engine.
    pub fn resumable(&self) -> Resumable {
        self.resumable
    }

    /// The dialect.
    pub fn route(&self) -> StreamRoute {
        self.route
    }

    /// Whether it is continued if need be.
    pub(super) fn continues(&self) -> bool {
        matches!(self.resumable, Resumable::Continue { .. })
    }

    /// The router asks for the stop string's text, which the client does not get.
    pub(super) fn hides_stop(&self) -> bool {
        self.continues() && !self.stops.is_empty() && !self.shows_stop
    }

    /// Whether the client is told more of a token than its text. Tokens without text are told with the
    /// next text then.
    pub(super) fn shows_more(&self) -> bool {
        self.token_ids || self.logprobs || self.running_usage
    }

    /// Whether stop strings are looked for here, because they may lie across a cut.
    pub(super) fn searches(&self) -> bool {
        !self.stops.is_empty()
    }

    /// Whether the token that ended the generation has text: it is one of the client's, or its
    /// special tokens are to be seen.
    pub(super) fn shows_stop_token(&self, stop: Option<&[u8]>) -> bool {
        let id = stop.and_then(json::number);
        self.shows_special || id.is_some_and(|id| self.stop_ids.contains(&id))
    }

    /// What is sent to an engine for the first attempt and for a replay: the client's body with
    /// what is needed to continue it, byte by byte the client's otherwise. Engines of another
    /// kind than vLLM and SGLang get the client's body: they may refuse what they do not know.
    pub fn first_body(&self, engine: EngineKind) -> Bytes {
        if !self.continues() || engine == EngineKind::OpenaiCompatible {
            return self.body.clone();
        }
        let (members, body) = (&self.members, &self.body[..]);
        let mut edits = Edits::default();
        edits.set(body, members, "return_token_ids", b"true");
        if self.hides_stop() {
            let key = match engine {
                EngineKind::Sglang => "no_stop_trim",
                _ => "include_stop_str_in_output",
            };
            edits.set(body, members, key, b"true");
        }
        match members.raw(body, "stream_options") {
            None => edits.set(body, members, "stream_options", br#"{"include_usage":true}"#),
            Some(raw) => {
                if let Some(nested) = Members::read(raw, 0) {
                    let mut inner = Edits::default();
                    inner.set(raw, &nested, "include_usage", b"true");
                    let value = inner.apply(&Bytes::copy_from_slice(raw));
                    edits.set(body, members, "stream_options", &value);
                }
            }
        }
        edits.apply(&self.body)
    }
}

/// `stop` as a list; empty strings stop nothing.
fn stop_strings(raw: &[u8]) -> Vec<String> {
    let list = match serde_json::from_slice::<String>(raw) {
        Ok(one) => vec![one],
        Err(_) => serde_json::from_slice::<Vec<String>>(raw).unwrap_or_default(),
    };
    list.into_iter().filter(|stop| !stop.is_empty()).collect()
}

/// How many prompts a `prompt` is: text or ids are one, a list of these as many as it has.
fn prompts(raw: Option<&[u8]>) -> u64 {
    let Some(raw) = raw else { return 1 };
    let mut count = 0;
    let mut nested = false;
    json::array(raw, 0, |at| {
        count += 1;
        nested |= matches!(raw.get(at), Some(b'[' | b'"'));
        json::skip_value(raw, at)
    });
    if nested { count } else { 1 }
}

/// Whether a chat has parts that are not text.
fn has_media(messages: &[u8]) -> bool {
    let mut media = false;
    json::array(messages, 0, |at| {
        let end = json::skip_value(messages, at)?;
        let message = &messages[at..end];
        let content = Members::read(message, 0).and_then(|members| members.raw(message, "content"));
        if let Some(parts) = content.filter(|content| content.first() == Some(&b'[')) {
            json::array(parts, 0, |at| {
                let end = json::skip_value(parts, at)?;
                let part = &parts[at..end];
                let text = Members::read(part, 0).is_some_and(|members| {
                    let kind = members.raw(part, "type").unwrap_or(b"\"text\"");
                    matches!(kind, b"\"text\"" | b"\"refusal\"" | b"\"thinking\"" | b"\"input_text\"")
                });
                media |= !text && part.first() == Some(&b'{');
                Some(end)
            });
        }
        Some(end)
    });
    media
}
