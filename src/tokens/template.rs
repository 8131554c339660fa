//! Chat templates: Jinja rendered as transformers renders it.
//!
//! The environment is the one of `apply_chat_template`: trimmed blocks, loop controls, Python's
//! methods, `raise_exception`, `strftime_now`, `tojson` with Python's separators and without
//! escapes for HTML. Templates are the operator's, out of the model's directory; those of clients
//! are never run. Even so a rendering is bounded in steps and in bytes.

use std::cell::Cell;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::json::{Json, Style, dumps};

/// Steps of one rendering. A message costs some dozens to some hundreds, so this is enough for
/// a hundred thousand messages, and is spent within seconds.
const MAX_STEPS: u64 = 20_000_000;

/// Bytes of one rendering, twice the longest body of the default configuration.
const MAX_RENDERED: usize = 64 << 20;

/// Stands behind the text that is to be continued while a template runs. The same as in
/// transformers, whose comparison of it with and without the blank decides about blanks.
const CONTINUE: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

thread_local! {
    /// The time that a template running on this thread sees.
    static NOW: Cell<SystemTime> = const { Cell::new(UNIX_EPOCH) };
}

/// A template that compiled.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: String,
}

/// What a template is rendered with.
#[derive(Debug)]
pub struct Variables<'a> {
    /// Messages, as the engine hands them to templates.
    pub messages: &'a [Json],
    /// Tools, if there are any.
    pub tools: Option<&'a [Json]>,
    /// Whether the answer is to be opened.
    pub add_generation_prompt: bool,
    /// Whether the last message is to be left open.
    pub continue_final_message: bool,
    /// Everything else, a later one of the same name winning: special tokens, the client's own.
    pub others: &'a [&'a [(String, Json)]],
    /// What `strftime_now` tells.
    pub now: SystemTime,
}

/// Blocks trimmed on both sides, as transformers has it.
pub(super) fn syntax() -> SyntaxConfig {
    // The delimiters are the default ones, which are valid.
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap_or_default()
}

impl ChatTemplate {
    /// Compiles. The error names line and cause.
    pub fn new(source: &str) -> Result<Self, Error> {
        let source = without_generation_blocks(source);
        let mut env = Environment::new();
        env.set_syntax(syntax());
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(unknown_method_callback);
        env.set_fuel(Some(MAX_STEPS));
        env.add_filter("tojson", tojson);
        env.add_test("sequence", |value: &Value| {
            value.is_undefined()
                || matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
        });
        env.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        env.add_function("strftime_now", strftime_now);
        env.add_template_owned("chat", source.clone())?;
        Ok(Self { env, source })
    }

    /// Its text, as it is run.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders.
    pub fn render(&self, variables: &Variables<'_>) -> Result<String, Error> {
        let mut messages: Vec<Value> = variables.messages.iter().map(Json::to_value).collect();
        let mut continued = None;
        if variables.continue_final_message {
            let last = variables.messages.last();
            let (marked, text) = last.and_then(left_open).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, "the last message has no text to be continued")
            })?;
            messages.pop();
            messages.push(marked.to_value());
            continued = Some(text);
        }
        let mut context = vec![
            ("messages".to_owned(), Value::from_iter(messages)),
            ("documents".to_owned(), Value::from(())),
            (
                "tools".to_owned(),
                variables.tools.map_or_else(|| Value::from(()), |t| t.iter().map(Json::to_value).collect()),
            ),
            ("add_generation_prompt".to_owned(), Value::from(variables.add_generation_prompt)),
        ];
        for (key, value) in variables.others.iter().copied().flatten() {
            context.push((key.clone(), value.to_value()));
        }
        let context = Value::from_pairs(context);

        NOW.set(variables.now);
        let mut out = Bounded(Vec::new());
        self.env.get_template("chat")?.render_captured_to(context, &mut out)?;
        // Everything that minijinja writes is text.
        let mut text = String::from_utf8(out.0).map_err(|error| {
            Error::new(ErrorKind::InvalidOperation, "the template wrote no text").with_source(error)
        })?;
        if let Some(continued) = continued {
            leave_open(&mut text, &continued)?;
        }
        Ok(text)
    }
}

/// The message with the mark behind its text, and that text.
fn left_open(message: &Json) -> Option<(Json, String)> {
    let Json::Object(members) = message else { return None };
    let mut members = members.clone();
    let content = &mut members.iter_mut().find(|(key, _)| key == "content")?.1;
    let text = match content {
        Json::Text(text) => text,
        Json::List(parts) => parts.iter_mut().rev().find_map(|part| match part {
            Json::Object(members) => match members.iter_mut().find(|(key, _)| key == "text") {
                Some((_, Json::Text(text))) => Some(text),
                _ => None,
            },
            _ => None,
        })?,
        _ => return None,
    };
    let before = text.clone();
    text.push_str(CONTINUE);
    Some((Json::Object(members), before))
}

/// Cuts a rendering off where the text that is to be continued ends.
fn leave_open(text: &mut String, continued: &str) -> Result<(), Error> {
    let place = text.rfind(CONTINUE.trim_end());
    let Some(place) = place.filter(|_| text.contains(continued.trim())) else {
        let why = "the template leaves out the message that is to be continued";
        return Err(Error::new(ErrorKind::InvalidOperation, why));
    };
    let kept_blank = text[place..].starts_with(CONTINUE);
    text.truncate(place);
    if !kept_blank {
        text.truncate(text.trim_end().len());
    }
    Ok(())
}

/// `{% generation %}` marks what the assistant said, for training. Nothing of it is rendered, and
/// a scope of its own is what is left.
fn without_generation_blocks(source: &str) -> String {
    if !source.contains("generation") {
        return source.to_owned();
    }
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(length) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[2..length];
        let trimmed = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let instead = match trimmed {
            "generation" => Some("with"),
            "endgeneration" => Some("endwith"),
            _ => None,
        };
        match instead {
            Some(word) => out.push_str(&format!("{{%{}%}}", inner.replacen(trimmed, word, 1))),
            None => out.push_str(&tag[..length + 2]),
        }
        rest = &tag[length + 2..];
    }
    out.push_str(rest);
    out
}

fn tojson(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    // In Python's order: ensure_ascii, indent, separators, sort_keys.
    let argument = |place: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(place) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let mut style = Style { ascii, ..Style::default() };
    if let Some(indent) = argument(1, "indent")? {
        style.indent = Some(match (indent.as_str(), indent.as_usize()) {
            (Some(text), _) => text.to_owned(),
            (None, Some(blanks)) => " ".repeat(blanks.min(64)),
            _ => return Err(Error::new(ErrorKind::InvalidOperation, "indent must be a number or text")),
        });
        ",".clone_into(&mut style.item);
    }
    if let Some(separators) = argument(2, "separators")? {
        style.item = separators.get_item_by_index(0)?.to_string();
        style.key = separators.get_item_by_index(1)?.to_string();
    }
    style.sort = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    Ok(Value::from(dumps(value, &style)?))
}

fn strftime_now(format: &str) -> Result<String, Error> {
    // Engines tell their local time, which on servers is UTC. Where it is not, prompts with the
    // hour in them are other prompts, and are missed.
    let now = jiff::Timestamp::try_from(NOW.get())
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "no such time").with_source(e))?;
    jiff::fmt::strtime::format(format, &now.to_zoned(jiff::tz::TimeZone::UTC))
        .map_err(|e| Error::new(ErrorKind::InvalidOperation, "unknown time format").with_source(e))
}

/// Takes up to [`MAX_RENDERED`] bytes.
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED {
            return Err(io::Error::other("the rendered prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn render(source: &str, messages: &str, continued: bool) -> Result<String, Error> {
        let messages: Vec<Json> = serde_json::from_str(messages).unwrap();
        ChatTemplate::new(source)?.render(&Variables {
            messages: &messages,
            tools: None,
            add_generation_prompt: !continued,
            continue_final_message: continued,
            others: &[],
            now: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        })
    }

    #[test]
    fn a_message_is_left_open_where_it_ends() {
        let keep = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}";
        let trim = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</>{% endfor %}";
        let messages = r#"[{"role":"user","content":"q"},{"role":"assistant","content":"so "}]"#;
        assert_eq!(render(keep, messages, true).unwrap(), "<user>q</><assistant>so ");
        assert_eq!(render(trim, messages, true).unwrap(), "<user>q</><assistant>so");
        let parts = r#"[{"role":"assistant","content":[{"type":"text","text":"a"}]}]"#;
        let source = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}";
        assert_eq!(render(source, parts, true).unwrap(), "[a");
        assert!(render("{{ messages[0].role }}", messages, true).is_err());
        assert!(render(keep, r#"[{"role":"user"}]"#, true).is_err());
    }

    #[test]
    fn the_environment_is_the_one_of_transformers() {
        let one = |source: &str| render(source, "[]", false).unwrap();
        assert_eq!(one("{% if true %}\n  {% generation %}\na{% endgeneration %}\n{% endif %}b"), "ab");
        assert_eq!(one("{{ strftime_now('%d %b %Y') }}"), "14 Nov 2023");
        assert_eq!(one("{{ {'a': [1, 'é<'], 'b': none} | tojson }}"), "{\"a\": [1, \"é<\"], \"b\": null}");
        assert_eq!(one("{{ {'a': 1} | tojson(indent=2) }}"), "{\n  \"a\": 1\n}");
        assert_eq!(
            one("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}"),
            "{\"a\":2,\"b\":1}"
        );
        assert_eq!(one("{{ none }} {{ true }} {{ 1.0 }} {{ missing }}|"), "None True 1.0 |");
        assert_eq!(
            one("{{ tools is none }} {{ documents is defined }} {{ 'x' is sequence }}"),
            "True True True"
        );
        assert_eq!(
            one("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"),
            "01"
        );
        let raised = render("{{ raise_exception('roles must alternate') }}", "[]", false).unwrap_err();
        assert_eq!(raised.detail(), Some("roles must alternate"));
    }

    #[test]
    fn a_template_that_does_not_end_is_stopped() {
        let source = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a + b %}{% endfor %}{% endfor %}";
        assert!(render(source, "[]", false).is_err());
    }
}
