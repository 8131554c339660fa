//! Log probabilities of the prompt on SGLang's own route: the prefill worker knows them, the decode
//! worker answers, so they are put into its answer.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde_json::value::RawValue;

use super::Members;

/// Longest line of a stream that is looked at; longer ones pass as they are.
const MOST_LINE: usize = 16 << 20;

/// Where SGLang says them.
const META: &str = "meta_info";
const INPUT: &str = "input_token_logprobs";

/// Whether a request for this path asks for them.
pub fn are_asked_for(path: &str, body: &Members<'_>) -> bool {
    let asked = body.get("return_logprob");
    path == "/generate" && asked.is_some_and(|asked| asked.contains("true"))
}

/// Of each sequence, what the prefill worker said of its prompt: the inside of a JSON list.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct OfPrompt(BTreeMap<u64, String>);

impl OfPrompt {
    /// Reads a prefill worker's answer, in one piece or in events.
    pub fn read(answer: &[u8]) -> Self {
        let mut found = Self::default();
        match serde_json::from_slice::<&RawValue>(answer) {
            Ok(answer) => found.take(answer.get()),
            Err(_) => {
                for line in answer.split(|byte| *byte == b'\n') {
                    if let Some(event) = data_of(line) {
                        found.take(event);
                    }
                }
            }
        }
        found
    }

    fn take(&mut self, json: &str) {
        for (at, item) in items(json).into_iter().enumerate() {
            let Some(members) = Members::parse(item.as_bytes()) else { continue };
            let inside = members.get(META).and_then(|meta| {
                let meta = Members::parse(meta.as_bytes())?;
                Some(inside(meta.get(INPUT)?)?.to_owned())
            });
            if let Some(inside) = inside {
                // The first event has them all.
                self.0.entry(members.number("index").unwrap_or(at as u64)).or_insert(inside);
            }
        }
    }

    /// The decode worker's answer in one piece, with them before its own.
    pub fn with(&self, answer: &[u8]) -> Option<Bytes> {
        Some(self.merged(std::str::from_utf8(answer).ok()?.trim())?.into())
    }

    fn merged(&self, json: &str) -> Option<String> {
        if !json.starts_with('[') {
            return self.merged_one(json, 0);
        }
        let merged: Vec<String> = items(json)
            .into_iter()
            .enumerate()
            .map(|(at, item)| self.merged_one(item, at as u64).unwrap_or_else(|| item.to_owned()))
            .collect();
        Some(format!("[{}]", merged.join(",")))
    }

    fn merged_one(&self, json: &str, at: u64) -> Option<String> {
        let mut members = Members::parse(json.as_bytes())?;
        let of_prompt = self.0.get(&members.number("index").unwrap_or(at))?;
        let mut meta = Members::parse(members.get(META)?.as_bytes())?;
        let own = inside(meta.get(INPUT).unwrap_or("[]"))?;
        let comma = if of_prompt.is_empty() || own.is_empty() { "" } else { "," };
        let both = format!("[{of_prompt}{comma}{own}]");
        meta.set(INPUT, both);
        let meta = String::from_utf8(meta.to_bytes().to_vec()).ok()?;
        members.set(META, meta);
        String::from_utf8(members.to_bytes().to_vec()).ok()
    }
}

/// What is between the brackets of a list.
fn inside(json: &str) -> Option<&str> {
    Some(json.strip_prefix('[')?.strip_suffix(']')?.trim())
}

/// A list's items, or the only one.
fn items(json: &str) -> Vec<&str> {
    if json.starts_with('[') {
        let items: Vec<&RawValue> = serde_json::from_str(json).unwrap_or_default();
        return items.into_iter().map(RawValue::get).collect();
    }
    vec![json]
}

/// The JSON in a line of an event stream.
fn data_of(line: &[u8]) -> Option<&str> {
    let data = line.strip_prefix(b"data:")?.trim_ascii();
    std::str::from_utf8(data).ok().filter(|data| data.starts_with(['{', '[']) && *data != "[DONE]")
}

/// A decode worker's events, with them before its own in each.
#[derive(Debug)]
pub struct InEvents {
    of_prompt: OfPrompt,
    /// A line whose end has not come.
    line: Vec<u8>,
}

impl InEvents {
    /// With these.
    pub fn new(of_prompt: OfPrompt) -> Self {
        Self { of_prompt, line: Vec::new() }
    }

    /// Takes a piece; what can be passed on.
    pub fn push(&mut self, piece: &[u8]) -> Bytes {
        let mut out = Vec::with_capacity(piece.len());
        for part in piece.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if part.ends_with(b"\n") || self.line.len() > MOST_LINE {
                self.flush(&mut out);
            }
        }
        out.into()
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> Bytes {
        let mut out = Vec::new();
        self.flush(&mut out);
        out.into()
    }

    fn flush(&mut self, out: &mut Vec<u8>) {
        match data_of(&self.line).and_then(|data| self.of_prompt.merged(data)) {
            Some(merged) => {
                out.extend_from_slice(b"data: ");
                out.extend_from_slice(merged.as_bytes());
                out.push(b'\n');
            }
            None => out.extend_from_slice(&self.line),
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PREFILL: &str =
        r#"{"text":"x","meta_info":{"id":"a","input_token_logprobs":[[null,1,null],[-0.50,2,null]]}}"#;
    const DECODE: &str = r#"{"text":"xyz","meta_info":{"id":"a","input_token_logprobs":[[-1.5,3,null]],"n":12345678901234567890123}}"#;
    const BOTH: &str = r#"{"text":"xyz","meta_info":{"id":"a","n":12345678901234567890123,"input_token_logprobs":[[null,1,null],[-0.50,2,null],[-1.5,3,null]]}}"#;

    #[test]
    fn they_come_before_the_decodes_own() {
        let of_prompt = OfPrompt::read(PREFILL.as_bytes());
        assert_eq!(of_prompt.with(DECODE.as_bytes()).unwrap(), BOTH);
        let without = r#"{"meta_info":{}}"#;
        let wanted = r#"{"meta_info":{"input_token_logprobs":[[null,1,null],[-0.50,2,null]]}}"#;
        assert_eq!(of_prompt.with(without.as_bytes()).unwrap(), wanted);
        assert_eq!(of_prompt.with(b"oops"), None);
        assert_eq!(OfPrompt::read(b"oops").with(DECODE.as_bytes()), None);
    }

    #[test]
    fn each_of_several_gets_its_own() {
        let one = |logprob: &str| format!(r#"{{"meta_info":{{"input_token_logprobs":[{logprob}]}}}}"#);
        let prefill = format!("[{},{}]", one("1"), one("2"));
        let decode = format!("[{},{}]", one("3"), one(""));
        let both = OfPrompt::read(prefill.as_bytes()).with(decode.as_bytes()).unwrap();
        assert_eq!(both, format!("[{},{}]", one("1,3"), one("2")));
    }

    #[test]
    fn in_events_they_come_in_each_however_the_pieces_are_cut() {
        let prefill = format!(
            "data: {PREFILL}\n\ndata: {{\"meta_info\":{{\"input_token_logprobs\":[9]}}}}\n\ndata: [DONE]\n\n"
        );
        let of_prompt = OfPrompt::read(prefill.as_bytes());
        let decode = format!(": hello\n\ndata: {DECODE}\n\ndata: [DONE]\n\n");
        let wanted = format!(": hello\n\ndata: {BOTH}\n\ndata: [DONE]\n\n");
        for step in [1, 7, 1000] {
            let mut events = InEvents::new(of_prompt.clone());
            let mut out: Vec<u8> =
                decode.as_bytes().chunks(step).flat_map(|p| events.push(p).to_vec()).collect();
            out.extend_from_slice(&events.finish());
            assert_eq!(String::from_utf8(out).unwrap(), wanted, "{step}");
        }
    }

    #[test]
    fn only_sglangs_own_route_has_them() {
        let asks = |path: &str, body: &str| are_asked_for(path, &Members::parse(body.as_bytes()).unwrap());
        assert!(
            asks("/generate", r#"{"return_logprob":true}"#)
                && asks("/generate", r#"{"return_logprob":[false,true]}"#)
        );
        assert!(!asks("/generate", r#"{"return_logprob":false}"#) && !asks("/generate", "{}"));
        assert!(!asks("/v1/completions", r#"{"return_logprob":true}"#));
    }
}
