//! What an engine has generated, picked out of its answer as the answer goes by: token ids where it
//! tells them, else the text. For engines without events, of which only this says what they hold.
//!
//! Of several choices the first one counts. What is collected is a beginning of the output, never
//! something else: where a part is missing that the engine had (reasoning that it shows apart, the
//! words of a tool call, an event that cannot be read), or a bound is reached, nothing is added any
//! more.

use std::borrow::Cow;

use memchr::memchr;
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::native::{Goes, Native};
use super::request::Form;

/// Most token ids that are collected: 128 Ki, as many as routing looks at with blocks of 16.
pub const MOST_IDS: usize = 128 << 10;

/// Most bytes of text that are collected.
pub const MOST_TEXT: usize = 1 << 20;

/// Largest answer in one piece that is looked at; it is kept whole until its end.
pub const MOST_BODY: usize = 4 << 20;

/// Longest line of an event stream that is looked at.
pub(super) const MOST_LINE: usize = 1 << 20;

/// What was generated, as far as it is known.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Said {
    /// Nothing.
    Nothing,
    /// Token ids, but for the last one of all: an engine has no block that ends with it, as it
    /// would be computed with the token after it.
    Ids(Vec<u32>),
    /// Text.
    Text {
        /// It.
        text: String,
        /// Whether the engine went on to the end of it, so that its last token was computed.
        beyond: bool,
    },
}

/// Collects from the bytes of one answer, or from ids directly.
#[derive(Debug)]
pub struct Collector {
    form: Form,
    /// Answers with events; else with one piece of JSON.
    events: bool,
    /// Ids are of no use.
    only_text: bool,
    /// The last line, which has not ended; or the answer so far.
    unread: Vec<u8>,
    said: Said,
    /// Nothing is added any more.
    over: bool,
    /// The engine ended by itself, with a token that is not shown, or with a word to stop at.
    ended: bool,
    /// In place of `said`, of SGLang's own route.
    native: Native,
}

impl Collector {
    /// For an answer to a request of this form; `None` for forms whose answers are not known.
    /// `only_text` for a prompt of which only the text is known.
    pub fn new(form: Form, events: bool, only_text: bool) -> Option<Self> {
        match form {
            Form::Chat | Form::Completions | Form::Responses | Form::Messages => {}
            Form::TokenIds | Form::Generate => {}
            // A KsanaLLM answer is of the decode group, the next prompt is the prefill group's.
            Form::Embeddings | Form::Tokenize | Form::Ksana => return None,
        }
        let (unread, said, native) = (Vec::new(), Said::Nothing, Native::default());
        Some(Self { form, events, only_text, unread, said, over: false, ended: false, native })
    }

    /// Takes note of a piece of the answer.
    pub fn push(&mut self, mut data: &[u8]) {
        if self.over {
            return;
        }
        if !self.events {
            return self.keep(data, MOST_BODY);
        }
        while let Some(end) = memchr(b'\n', data) {
            let line = &data[..end];
            data = &data[end + 1..];
            if self.unread.is_empty() {
                self.line(line);
            } else {
                self.keep(line, MOST_LINE);
                let mut whole = std::mem::take(&mut self.unread);
                self.line(&whole);
                whole.clear();
                self.unread = whole;
            }
            if self.over {
                return;
            }
        }
        self.keep(data, MOST_LINE);
    }

    /// Takes note of generated ids.
    pub fn push_ids(&mut self, new: &[u32]) {
        if self.over || new.is_empty() {
            return;
        }
        match &mut self.said {
            Said::Nothing => self.said = Said::Ids(new[..new.len().min(MOST_IDS)].to_vec()),
            Said::Ids(ids) => {
                let room = MOST_IDS - ids.len();
                ids.extend_from_slice(&new[..new.len().min(room)]);
                if new.len() > room {
                    self.stop();
                }
            }
            // Of what was said before they are not known.
            Said::Text { .. } => {}
        }
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.said == Said::Nothing && self.unread.is_empty() && self.native.is_empty()
    }

    /// Bytes that [`Collector::finish`] has to read.
    pub fn unread(&self) -> usize {
        self.unread.len() + self.native.unread()
    }

    /// The answer has ended, or was broken off by us.
    pub fn finish(mut self) -> Said {
        if !self.events && !self.over {
            let body = std::mem::take(&mut self.unread);
            if self.form == Form::Generate {
                self.native.whole(&body);
                return self.native.finish(self.only_text, false);
            }
            match serde_json::from_slice(&body) {
                Ok(whole) => self.whole(whole),
                Err(_) => return Said::Nothing,
            }
        }
        if self.form == Form::Generate {
            return self.native.finish(self.only_text, self.over);
        }
        match self.said {
            Said::Nothing => Said::Nothing,
            Said::Ids(mut ids) => {
                ids.pop();
                Said::Ids(ids)
            }
            Said::Text { text, .. } => Said::Text { text, beyond: self.over || self.ended },
        }
    }

    fn stop(&mut self) {
        self.over = true;
        self.unread = Vec::new();
    }

    fn keep(&mut self, data: &[u8], most: usize) {
        if self.unread.len() + data.len() > most {
            return self.stop();
        }
        self.unread.extend_from_slice(data);
    }

    fn line(&mut self, line: &[u8]) {
        let Some(data) = line.strip_prefix(b"data:") else { return };
        let data = data.trim_ascii();
        if data.is_empty() || data == b"[DONE]" {
            return;
        }
        if self.form == Form::Generate {
            if self.native.event(data) == Goes::NoFurther {
                self.stop();
            }
            return;
        }
        match serde_json::from_slice(data) {
            Ok(event) => self.event(event),
            Err(_) => self.stop(),
        }
    }

    fn event(&mut self, event: Event<'_>) {
        let kind = event.kind.as_ref().map(|kind| kind.0.as_ref()).unwrap_or_default();
        match (self.form, kind, event.delta) {
            (Form::Responses, "response.output_text.delta", Some(Part::Text(text))) => self.text(&text.0),
            (Form::Responses, "response.completed", _) => self.ended = true,
            // Reasoning, arguments of a call, a refusal.
            (Form::Responses, kind, _) if kind.ends_with(".delta") => self.stop(),
            (Form::Responses, ..) => {}
            (Form::Messages, "content_block_delta", Some(Part::Block(block))) => self.block(&block),
            (Form::Messages, "message_delta", Some(Part::Block(block))) => self.stopped(&block.stop_reason),
            (Form::Messages, ..) => {}
            _ => event.choices.unwrap_or_default().iter().for_each(|choice| self.choice(choice)),
        }
    }

    fn whole(&mut self, whole: Whole<'_>) {
        match self.form {
            Form::Responses => {
                for item in whole.output.unwrap_or_default() {
                    if !item.kind.is("message") {
                        return self.stop();
                    }
                    item.content.unwrap_or_default().iter().for_each(|block| self.block(block));
                }
                self.ended |= whole.status.is("completed");
            }
            Form::Messages => {
                whole.content.unwrap_or_default().iter().for_each(|block| self.block(block));
                self.stopped(&whole.stop_reason);
            }
            _ => whole.choices.unwrap_or_default().iter().for_each(|choice| self.choice(choice)),
        }
    }

    fn choice(&mut self, choice: &Choice<'_>) {
        if self.over || choice.index.unwrap_or(0) != 0 {
            return;
        }
        self.ended |= choice.finish_reason.is("stop");
        let message = choice.delta.as_ref().or(choice.message.as_ref());
        let text = choice.text.as_ref().or(message.and_then(|message| message.content.as_ref()));
        let text = text.map(|text| text.0.as_ref()).unwrap_or_default();
        let ids = choice.token_ids.as_deref().unwrap_or_default();
        if !self.only_text && !matches!(self.said, Said::Text { .. }) {
            if !ids.is_empty() {
                return self.push_ids(ids);
            }
            if matches!(self.said, Said::Ids(_)) {
                // Text may lag behind, but has come with its ids before.
                return;
            }
        }
        if message.is_some_and(Message::says_more) {
            return self.stop();
        }
        self.text(text);
    }

    fn block(&mut self, block: &Block<'_>) {
        let kind = block.kind.as_ref().map(|kind| kind.0.as_ref());
        match (kind, &block.text) {
            (Some("text_delta" | "text" | "output_text"), Some(text)) => self.text(&text.0),
            _ => self.stop(),
        }
    }

    fn stopped(&mut self, reason: &Option<Text<'_>>) {
        self.ended |= reason.is("end_turn") || reason.is("stop_sequence");
    }

    fn text(&mut self, new: &str) {
        if self.over || new.is_empty() {
            return;
        }
        match &mut self.said {
            Said::Text { text, .. } if text.len() + new.len() > MOST_TEXT => self.stop(),
            Said::Text { text, .. } => text.push_str(new),
            Said::Nothing if new.len() > MOST_TEXT => self.stop(),
            Said::Nothing => self.said = Said::Text { text: new.to_owned(), beyond: false },
            Said::Ids(_) => {}
        }
    }
}

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

trait Is {
    fn is(&self, text: &str) -> bool;
}

impl Is for Option<Text<'_>> {
    fn is(&self, text: &str) -> bool {
        self.as_ref().is_some_and(|own| own.0 == text)
    }
}

#[derive(Deserialize)]
struct Event<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Text<'a>>,
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    delta: Option<Part<'a>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Part<'a> {
    Text(#[serde(borrow)] Text<'a>),
    Block(#[serde(borrow)] Block<'a>),
}

#[derive(Deserialize)]
struct Block<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Text<'a>>,
    #[serde(borrow, default)]
    text: Option<Text<'a>>,
    #[serde(borrow, default)]
    stop_reason: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(default)]
    index: Option<u32>,
    #[serde(borrow, default)]
    delta: Option<Message<'a>>,
    #[serde(borrow, default)]
    message: Option<Message<'a>>,
    #[serde(borrow, default)]
    text: Option<Text<'a>>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
    #[serde(borrow, default)]
    finish_reason: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow, default)]
    content: Option<Text<'a>>,
    #[serde(borrow, default)]
    reasoning: Option<Text<'a>>,
    #[serde(borrow, default)]
    reasoning_content: Option<Text<'a>>,
    #[serde(default)]
    tool_calls: Option<Vec<IgnoredAny>>,
    #[serde(default)]
    function_call: Option<IgnoredAny>,
}

impl Message<'_> {
    /// Whether the engine has generated something that is not in the content.
    fn says_more(&self) -> bool {
        let thought = |text: &Option<Text<'_>>| text.as_ref().is_some_and(|text| !text.0.is_empty());
        thought(&self.reasoning)
            || thought(&self.reasoning_content)
            || self.tool_calls.as_ref().is_some_and(|calls| !calls.is_empty())
            || self.function_call.is_some()
    }
}

#[derive(Deserialize)]
struct Whole<'a> {
    #[serde(borrow, default)]
    choices: Option<Vec<Choice<'a>>>,
    #[serde(borrow, default)]
    output: Option<Vec<Item<'a>>>,
    #[serde(borrow, default)]
    content: Option<Vec<Block<'a>>>,
    #[serde(borrow, default)]
    status: Option<Text<'a>>,
    #[serde(borrow, default)]
    stop_reason: Option<Text<'a>>,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(borrow, default, rename = "type")]
    kind: Option<Text<'a>>,
    #[serde(borrow, default)]
    content: Option<Vec<Block<'a>>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(form: Form, events: bool, only_text: bool, answer: &str, step: usize) -> Said {
        let mut collector = Collector::new(form, events, only_text).unwrap();
        answer.as_bytes().chunks(step).for_each(|chunk| collector.push(chunk));
        collector.finish()
    }

    fn text(text: &str, beyond: bool) -> Said {
        Said::Text { text: text.to_owned(), beyond }
    }

    #[test]
    fn events_of_every_route_tell_their_text_however_they_are_cut() {
        let chat = "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
            data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"a\\n\"}},{\"index\":1,\"delta\":{\"content\":\"x\"}}]}\n\n\
            : a comment\n\ndata: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"é\"},\"finish_reason\":\"stop\"}]}\r\n\r\n\
            data: {\"choices\":[],\"usage\":{}}\n\ndata: [DONE]\n\n";
        let completions = "data: {\"choices\":[{\"index\":0,\"text\":\"a\\n\"}]}\n\n\
            data: {\"choices\":[{\"index\":0,\"text\":\"é\",\"finish_reason\":\"stop\",\"token_ids\":null}]}\n\n";
        let responses = "event: response.created\ndata: {\"type\":\"response.created\",\"response\":{}}\n\n\
            data: {\"type\":\"response.output_text.delta\",\"delta\":\"a\\n\"}\n\n\
            data: {\"type\":\"response.output_text.delta\",\"delta\":\"é\"}\n\n\
            data: {\"type\":\"response.output_text.done\",\"text\":\"a\\né\"}\n\n\
            data: {\"type\":\"response.completed\",\"response\":{}}\n\n";
        let messages = "data: {\"type\":\"message_start\",\"message\":{}}\n\n\
            data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"a\\n\"}}\n\n\
            data: {\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"é\"}}\n\n\
            data: {\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\"}}\n\n";
        for (form, stream) in [
            (Form::Chat, chat),
            (Form::Completions, completions),
            (Form::Responses, responses),
            (Form::Messages, messages),
        ] {
            for step in 1..120 {
                assert_eq!(said(form, true, false, stream, step), text("a\né", true), "{form:?} {step}");
            }
        }
    }

    #[test]
    fn whole_answers_of_every_route_tell_their_text() {
        for (form, body, beyond) in [
            (
                Form::Chat,
                r#"{"choices":[{"index":0,"message":{"content":"abc","tool_calls":[]},"finish_reason":"length"}]}"#,
                false,
            ),
            (
                Form::Completions,
                r#"{"choices":[{"index":1,"text":"x"},{"index":0,"text":"abc","finish_reason":"stop"}]}"#,
                true,
            ),
            (
                Form::Responses,
                r#"{"status":"completed","output":[{"type":"message","content":[{"type":"output_text","text":"abc"}]}]}"#,
                true,
            ),
            (
                Form::Messages,
                r#"{"content":[{"type":"text","text":"abc"}],"stop_reason":"max_tokens"}"#,
                false,
            ),
        ] {
            assert_eq!(said(form, false, false, body, 7), text("abc", beyond), "{form:?}");
        }
        assert_eq!(said(Form::Chat, false, false, "{\"choices\":[", 5), Said::Nothing);
        assert_eq!(said(Form::Chat, false, false, "[]", 5), Said::Nothing);
    }

    #[test]
    fn ids_are_taken_where_they_are_told_but_for_the_last_one() {
        let event = |ids: &str, text: &str| {
            format!("data: {{\"choices\":[{{\"index\":0,\"text\":\"{text}\",\"token_ids\":{ids}}}]}}\n\n")
        };
        let stream = event("[1,2]", "") + &event("[3]", "abc") + &event("null", "d") + &event("[4]", "");
        assert_eq!(said(Form::Completions, true, false, &stream, 9), Said::Ids(vec![1, 2, 3]));
        assert_eq!(said(Form::Completions, true, true, &stream, 9), text("abcd", false));
        let whole =
            r#"{"choices":[{"index":0,"message":{"content":"x","reasoning":"y"},"token_ids":[7,8,9]}]}"#;
        assert_eq!(said(Form::Chat, false, false, whole, 100), Said::Ids(vec![7, 8]));
        let mut direct = Collector::new(Form::Chat, true, false).unwrap();
        direct.push_ids(&[5, 6]);
        direct.push_ids(&[7]);
        assert_eq!(direct.finish(), Said::Ids(vec![5, 6]));
        let late = event("null", "ab") + &event("[9]", "c");
        assert_eq!(
            said(Form::Completions, true, false, &late, 9),
            text("abc", false),
            "the first are missing"
        );
    }

    #[test]
    fn what_the_engine_generated_and_does_not_show_as_text_ends_the_collecting() {
        let chat = |delta: &str| format!("data: {{\"choices\":[{{\"index\":0,\"delta\":{delta}}}]}}\n\n");
        let before = chat(r#"{"content":"ab"}"#);
        for hidden in [
            r#"{"reasoning":"hm"}"#,
            r#"{"reasoning_content":"hm","content":"x"}"#,
            r#"{"tool_calls":[{"index":0}]}"#,
            r#"{"function_call":{}}"#,
            r#"{"content":7}"#,
        ] {
            let stream = before.clone() + &chat(hidden) + &chat(r#"{"content":"cd"}"#);
            assert_eq!(said(Form::Chat, true, false, &stream, 11), text("ab", true), "{hidden}");
            let stream = chat(hidden) + &before;
            assert_eq!(said(Form::Chat, true, false, &stream, 11), Said::Nothing, "{hidden}");
        }
        let thinking = r#"{"content":[{"type":"thinking","thinking":"x"},{"type":"text","text":"y"}]}"#;
        assert_eq!(said(Form::Messages, false, false, thinking, 99), Said::Nothing);
        let reasoning = r#"{"output":[{"type":"reasoning","content":null},{"type":"message","content":[]}]}"#;
        assert_eq!(said(Form::Responses, false, false, reasoning, 99), Said::Nothing);
        assert!(Collector::new(Form::Embeddings, false, false).is_none());
    }

    #[test]
    fn sglangs_own_route_is_read_however_it_is_cut() {
        let event = |text: &str, ids: &[u32]| {
            let (ids, count) = (format!("{ids:?}"), ids.len());
            format!(
                "data: {{\"text\":\"{text}\",\"output_ids\":{ids},\"meta_info\":{{\"completion_tokens\":{count}}}}}\n\n"
            )
        };
        let stream =
            event("a", &[5]) + &event("ab", &[5, 6]) + &event("abc", &[5, 6, 7]) + "data: [DONE]\n\n";
        for step in 1..120 {
            assert_eq!(said(Form::Generate, true, false, &stream, step), Said::Ids(vec![5, 6]), "{step}");
            assert_eq!(said(Form::Generate, true, true, &stream, step), text("abc", false), "{step}");
        }
        let body = r#"{"text":"ab","output_ids":[5,6],"meta_info":{"finish_reason":{"type":"stop"}}}"#;
        assert_eq!(said(Form::Generate, false, false, body, 7), Said::Ids(vec![5]));
        assert_eq!(said(Form::Generate, false, true, body, 7), text("ab", true));
        let mut collector = Collector::new(Form::Generate, true, false).unwrap();
        assert!(collector.is_empty());
        collector.push(stream.as_bytes());
        assert!(!collector.is_empty() && collector.unread() > 0, "the last event");
    }

    #[test]
    fn nothing_grows_beyond_its_bound() {
        let mut collector = Collector::new(Form::Chat, true, false).unwrap();
        for _ in 0..3 {
            collector.push_ids(&vec![1; MOST_IDS / 2 + 1]);
        }
        assert_eq!(collector.finish(), Said::Ids(vec![1; MOST_IDS - 1]));

        let mut collector = Collector::new(Form::Chat, true, false).unwrap();
        collector.push(b"data: {\"choices\":[{\"delta\":{\"content\":\"ab\"}}]}\n\ndata: ");
        for _ in 0..20 {
            collector.push(&[b'x'; MOST_LINE / 16]);
        }
        assert_eq!(collector.unread(), 0, "a line without an end");
        assert_eq!(collector.finish(), text("ab", true));

        let mut collector = Collector::new(Form::Chat, false, false).unwrap();
        for _ in 0..5 {
            collector.push(&vec![b' '; MOST_BODY / 4]);
        }
        assert_eq!((collector.unread(), collector.finish()), (0, Said::Nothing));

        let piece = "x".repeat(MOST_LINE / 4);
        let stream = format!("data: {{\"choices\":[{{\"text\":\"{piece}\"}}]}}\n\n").repeat(6);
        assert_eq!(said(Form::Completions, true, false, &stream, 1 << 16), text(&piece.repeat(4), true));
    }
}
