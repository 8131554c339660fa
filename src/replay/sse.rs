//! What a stream of server-sent events of the OpenAI dialect says about its timing and its end.

use bytes::Bytes;
use serde::Deserialize;

use crate::splice::sse::Parser;

/// Longest event that is read.
const MAX_EVENT: usize = 1 << 20;

/// The counts at a stream's end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: u32,
    #[serde(default)]
    pub(super) completion_tokens: u32,
    #[serde(default)]
    pub(super) prompt_tokens_details: Option<Details>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
pub(super) struct Details {
    #[serde(default)]
    pub(super) cached_tokens: Option<u32>,
}

#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    #[serde(default)]
    usage: Option<Usage>,
    #[serde(default)]
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    delta: Option<Delta>,
    #[serde(default)]
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct Delta {
    #[serde(default)]
    content: Option<String>,
    #[serde(default)]
    reasoning_content: Option<String>,
}

/// Reads a stream piece by piece.
#[derive(Debug)]
pub(super) struct Reader {
    parser: Parser,
    /// When the first and the last chunk with output came, in seconds.
    pub(super) first: Option<f64>,
    pub(super) last: f64,
    chunks: u32,
    pub(super) usage: Option<Usage>,
    finished: bool,
    done: bool,
}

impl Default for Reader {
    fn default() -> Self {
        let parser = Parser::new(MAX_EVENT);
        Self { parser, first: None, last: 0.0, chunks: 0, usage: None, finished: false, done: false }
    }
}

impl Reader {
    /// Takes what came at `now`; an error ends the stream.
    pub(super) fn take(&mut self, bytes: &[u8], now: f64) -> Result<(), String> {
        self.parser.push(Bytes::copy_from_slice(bytes)).map_err(|error| error.to_string())?;
        while let Some(event) = self.parser.next_event() {
            self.event(&event.data, now)?;
        }
        Ok(())
    }

    fn event(&mut self, data: &[u8], now: f64) -> Result<(), String> {
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|e| format!("an event is no JSON: {e}"))?;
        if let Some(error) = chunk.error {
            return Err(error.get("message").and_then(|m| m.as_str()).unwrap_or("an error event").to_owned());
        }
        let said = |text: &Option<String>| text.as_deref().is_some_and(|t| !t.is_empty());
        for choice in &chunk.choices {
            let delta = choice.delta.as_ref();
            if said(&choice.text) || delta.is_some_and(|d| said(&d.content) || said(&d.reasoning_content)) {
                self.first.get_or_insert(now);
                self.last = now;
                self.chunks += 1;
            }
            self.finished |= choice.finish_reason.is_some();
        }
        self.usage = chunk.usage.or(self.usage);
        Ok(())
    }

    /// Whether the stream was whole; the error says what is missing.
    pub(super) fn end(&self) -> Result<(), String> {
        match (self.done, self.finished, self.first) {
            (false, false, _) => Err("the stream broke off".to_owned()),
            (_, _, None) => Err("the stream has no output".to_owned()),
            _ => Ok(()),
        }
    }

    /// Output tokens: as counted by the engine, else as many as there were chunks.
    pub(super) fn tokens(&self) -> u32 {
        self.usage.map(|usage| usage.completion_tokens).filter(|tokens| *tokens > 0).unwrap_or(self.chunks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\r\n\r\n: beat\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"b\"},\"finish_reason\":\"stop\"}]}\n\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":2,\
        \"prompt_tokens_details\":{\"cached_tokens\":8}}}\n\ndata: [DONE]\n\n";

    #[test]
    fn a_stream_in_pieces_of_any_size_reads_the_same() {
        for size in [1, 7, STREAM.len()] {
            let mut reader = Reader::default();
            for (at, piece) in STREAM.as_bytes().chunks(size).enumerate() {
                reader.take(piece, at as f64).unwrap();
            }
            reader.end().unwrap();
            assert!(reader.first.is_some_and(|first| first <= reader.last));
            let usage = reader.usage.unwrap();
            assert_eq!((usage.prompt_tokens, reader.tokens()), (9, 2));
            assert_eq!(usage.prompt_tokens_details.unwrap().cached_tokens, Some(8));
        }
    }

    #[test]
    fn broken_streams_and_errors_in_them_are_errors() {
        let mut reader = Reader::default();
        reader.take(STREAM.split_once("b\\\"").map_or(&STREAM[..120], |s| s.0).as_bytes(), 0.0).unwrap();
        assert_eq!(reader.end(), Err("the stream broke off".to_owned()));
        let error = b"data: {\"error\":{\"message\":\"worker lost\"}}\n\n";
        assert_eq!(Reader::default().take(error, 0.0), Err("worker lost".to_owned()));
        assert!(Reader::default().take(b"data: {\n\n", 0.0).is_err());
        assert!(Reader::default().take(&vec![b'x'; MAX_EVENT + 1], 0.0).is_err());
        let mut text = Reader::default();
        text.take(b"data: {\"choices\":[{\"text\":\"x\"}]}\n\ndata: [DONE]\n\n", 1.0).unwrap();
        assert_eq!((text.end(), text.tokens(), text.first), (Ok(()), 1, Some(1.0)));
    }
}
