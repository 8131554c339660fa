//! JSON as chat templates need it: members keep their order, and printing is Python's.
//!
//! `serde_json::Value` sorts members, and a template that prints a tool's schema would print
//! another one than the engine does.

use std::fmt::{self, Write as _};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, SerializeSeq, Serializer};

/// A JSON value whose members keep their order. Of equal members the last one counts, in the
/// place of the first, as in Python.
#[derive(Clone, PartialEq, Debug, Default)]
pub enum Json {
    /// `null`.
    #[default]
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// Any number.
    Number(serde_json::Number),
    /// Text.
    Text(String),
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// A member of an object, if it is there and not `null`.
    pub fn get(&self, key: &str) -> Option<&Json> {
        let Json::Object(members) = self else { return None };
        members.iter().find(|(name, _)| name == key).map(|(_, value)| value).filter(|v| !v.is_null())
    }

    /// A member that is text.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// A member that is a list.
    pub fn list(&self, key: &str) -> Option<&[Json]> {
        match self.get(key)? {
            Json::List(items) => Some(items),
            _ => None,
        }
    }

    /// Text itself.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Json::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Whether it is `null`.
    pub fn is_null(&self) -> bool {
        matches!(self, Json::Null)
    }

    /// An object of these members.
    pub fn object<K: Into<String>>(members: impl IntoIterator<Item = (K, Json)>) -> Json {
        Json::Object(members.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// As templates take it.
    pub fn to_value(&self) -> Value {
        match self {
            Json::Null => Value::from(()),
            Json::Bool(yes) => Value::from(*yes),
            Json::Number(number) => match (number.as_i64(), number.as_u64()) {
                (Some(n), _) => Value::from(n),
                (None, Some(n)) => Value::from(n),
                (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::Text(text) => Value::from(text.as_str()),
            Json::List(items) => items.iter().map(Json::to_value).collect(),
            Json::Object(members) => {
                Value::from_pairs(members.iter().map(|(key, value)| (key.as_str(), value.to_value())))
            }
        }
    }
}

impl From<&str> for Json {
    fn from(text: &str) -> Json {
        Json::Text(text.to_owned())
    }
}

impl From<String> for Json {
    fn from(text: String) -> Json {
        Json::Text(text)
    }
}

impl From<bool> for Json {
    fn from(yes: bool) -> Json {
        Json::Bool(yes)
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Json::Null => serializer.serialize_unit(),
            Json::Bool(yes) => serializer.serialize_bool(*yes),
            Json::Number(number) => number.serialize(serializer),
            Json::Text(text) => serializer.serialize_str(text),
            Json::List(items) => {
                let mut seq = serializer.serialize_seq(Some(items.len()))?;
                items.iter().try_for_each(|item| seq.serialize_element(item))?;
                seq.end()
            }
            Json::Object(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                members.iter().try_for_each(|(key, value)| map.serialize_entry(key, value))?;
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, yes: bool) -> Result<Json, E> {
        Ok(Json::Bool(yes))
    }

    fn visit_i64<E>(self, n: i64) -> Result<Json, E> {
        Ok(Json::Number(n.into()))
    }

    fn visit_u64<E>(self, n: u64) -> Result<Json, E> {
        Ok(Json::Number(n.into()))
    }

    fn visit_f64<E>(self, n: f64) -> Result<Json, E> {
        Ok(serde_json::Number::from_f64(n).map_or(Json::Null, Json::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json, E> {
        Ok(Json::Text(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Json, E> {
        Ok(Json::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let mut members: Vec<(String, Json)> = Vec::new();
        // Objects are small nearly always; a large one must not cost the square of its size.
        let mut places: Option<std::collections::HashMap<String, usize>> = None;
        while let Some((key, value)) = map.next_entry::<String, Json>()? {
            if members.len() == 32 && places.is_none() {
                places = Some(members.iter().enumerate().map(|(at, (key, _))| (key.clone(), at)).collect());
            }
            let place = match &places {
                Some(places) => places.get(&key).copied(),
                None => members.iter().position(|(name, _)| *name == key),
            };
            match place {
                Some(at) => members[at].1 = value,
                None => {
                    if let Some(places) = &mut places {
                        places.insert(key.clone(), members.len());
                    }
                    members.push((key, value));
                }
            }
        }
        Ok(Json::Object(members))
    }
}

/// How `json.dumps` was asked to print.
#[derive(Clone, Debug)]
pub struct Style {
    /// Line breaks, and this before each level.
    pub indent: Option<String>,
    /// Between items.
    pub item: String,
    /// Between key and value.
    pub key: String,
    /// Everything beyond ASCII as `\u…`.
    pub ascii: bool,
    /// Members by name.
    pub sort: bool,
}

impl Default for Style {
    /// As transformers print in templates: Python's separators, text as it is.
    fn default() -> Self {
        Self { indent: None, item: ", ".to_owned(), key: ": ".to_owned(), ascii: false, sort: false }
    }
}

/// Deepest value that is printed; bodies are never deeper than a fraction of it.
const MAX_DEPTH: usize = 256;

/// What Python's `json.dumps` prints.
pub fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    dump(value, style, 0, &mut out)?;
    Ok(out)
}

fn dump(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(Error::new(ErrorKind::InvalidOperation, "too deep for JSON"));
    }
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number if value.is_integer() => {
            let _ = write!(out, "{value}");
        }
        ValueKind::Number => out.push_str(&python_float(f64::try_from(value.clone())?)),
        ValueKind::String => quote(value.as_str().unwrap_or_default(), style.ascii, out),
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort {
                keys.sort();
            }
            let entries = keys.into_iter().map(|key| {
                let member = value.get_item(&key)?;
                let name = match key.kind() {
                    ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                    ValueKind::None => "null".to_owned(),
                    ValueKind::Bool => key.is_true().to_string(),
                    _ => key.to_string(),
                };
                Ok((Some(name), member))
            });
            bracket(entries, ('{', '}'), style, depth, out)?;
        }
        ValueKind::Seq | ValueKind::Iterable => {
            bracket(value.try_iter()?.map(|item| Ok((None, item))), ('[', ']'), style, depth, out)?;
        }
        kind => {
            let text = format!("object of type {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, text));
        }
    }
    Ok(())
}

fn bracket(
    entries: impl Iterator<Item = Result<(Option<String>, Value), Error>>,
    (open, close): (char, char),
    style: &Style,
    depth: usize,
    out: &mut String,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    out.push(open);
    let mut any = false;
    for entry in entries {
        let (name, value) = entry?;
        if any {
            out.push_str(&style.item);
        }
        any = true;
        line(out, depth + 1);
        if let Some(name) = name {
            quote(&name, style.ascii, out);
            out.push_str(&style.key);
        }
        dump(&value, style, depth + 1, out)?;
    }
    if any {
        line(out, depth);
    }
    out.push(close);
    Ok(())
}

fn quote(text: &str, ascii: bool, out: &mut String) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || (ascii && !c.is_ascii()) || (ascii && c == '\u{7f}') => {
                if c == '\u{7f}' {
                    out.push(c);
                    continue;
                }
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `repr` of a Python float: shortest digits, an exponent below 1e-4 and from 1e16 on.
pub fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let size = number.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{number:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    if number.fract() == 0.0 { format!("{number:.1}") } else { format!("{number}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str, style: &Style) -> String {
        let json: Json = serde_json::from_str(text).unwrap();
        dumps(&json.to_value(), style).unwrap()
    }

    #[test]
    fn members_keep_their_order_and_of_equal_ones_the_last_counts() {
        let json: Json = serde_json::from_str(r#"{"z":1,"a":{"y":[],"b":null},"z":2}"#).unwrap();
        assert_eq!(serde_json::to_string(&json).unwrap(), r#"{"z":2,"a":{"y":[],"b":null}}"#);
        let many: Vec<String> = (0..100).rev().map(|n| format!("\"k{n}\":{n}")).collect();
        let text = format!("{{{},\"k99\":-1}}", many.join(","));
        let json: Json = serde_json::from_str(&text).unwrap();
        let Json::Object(members) = &json else { panic!("an object") };
        assert_eq!(members.len(), 100);
        assert_eq!(members[0], ("k99".to_owned(), Json::Number((-1).into())));
    }

    #[test]
    fn values_are_printed_as_python_prints_them() {
        let text = r#"{"b":[1,2.0,1e-7,1e22,true,null],"ä":"<\u0001\n\"é😀>","e":{},"l":[]}"#;
        assert_eq!(
            printed(text, &Style::default()),
            "{\"b\": [1, 2.0, 1e-07, 1e+22, true, null], \"ä\": \"<\\u0001\\n\\\"é😀>\", \"e\": {}, \"l\": []}"
        );
        let ascii = Style { ascii: true, sort: true, ..Style::default() };
        assert_eq!(printed(r#"{"b":"é😀","a":1}"#, &ascii), r#"{"a": 1, "b": "\u00e9\ud83d\ude00"}"#);
        let lines = Style { indent: Some("  ".to_owned()), item: ",".to_owned(), ..Style::default() };
        assert_eq!(printed(r#"{"a":[1,{}]}"#, &lines), "{\n  \"a\": [\n    1,\n    {}\n  ]\n}");
    }
}
