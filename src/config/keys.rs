//! What is known about each key: its documentation, kind and range, and how a text becomes a
//! value of that kind.

use toml::Value;

use super::access::{KeyEntry, NodeTokenEntry};
use super::errors::ConfigError;
use super::models::ModelEntry;
use super::names::{DiscoverEntry, NameEntry};
use super::read_entry;
use super::schema::SECTIONS;
use crate::admin_types::RegisterRequest;

/// One section of the file.
#[derive(Debug)]
pub struct SectionDoc {
    /// Name between the brackets.
    pub name: &'static str,
    /// What it is about.
    pub doc: &'static str,
    /// Its keys.
    pub keys: &'static [KeyDoc],
}

/// One key.
#[derive(Debug)]
pub struct KeyDoc {
    /// The section it belongs to.
    pub section: &'static str,
    /// Its name within the section.
    pub name: &'static str,
    /// What it does.
    pub doc: &'static str,
    /// What it takes.
    pub kind: Kind,
}

/// What a key takes.
#[derive(Debug)]
pub enum Kind {
    /// Any text.
    Text,
    /// `ip:port` to listen on.
    Address,
    /// `host:port` to connect to.
    HostPort,
    /// A path.
    Path,
    /// `true` or `false`.
    Bool,
    /// A whole number.
    Integer {
        /// What is counted.
        unit: &'static str,
        /// Smallest accepted.
        min: u64,
        /// Largest accepted.
        max: u64,
    },
    /// A list of texts of this form.
    List(&'static str),
    /// One of these texts.
    Choice(&'static [&'static str]),
}

impl Kind {
    /// A whole number of `unit` between `min` and `max`.
    pub const fn int(unit: &'static str, min: u64, max: u64) -> Self {
        Kind::Integer { unit, min, max }
    }

    /// What is accepted, for people.
    pub fn describe(&self) -> String {
        match self {
            Kind::Text => "text".to_owned(),
            Kind::Address => "ip:port".to_owned(),
            Kind::HostPort => "host:port".to_owned(),
            Kind::Path => "path".to_owned(),
            Kind::Bool => "true or false".to_owned(),
            Kind::Integer { unit, min, max } => format!("{min} to {max} {unit}"),
            Kind::List(element) => format!("list of {element}"),
            Kind::Choice(names) => names.join(", "),
        }
    }

    fn toml_type(&self) -> &'static str {
        match self {
            Kind::Bool => "boolean",
            Kind::Integer { .. } => "integer",
            Kind::List(_) => "array",
            _ => "string",
        }
    }

    /// Says what is wrong with the type or range of `value`, if anything. The form of texts is
    /// left to the types themselves.
    pub(super) fn check(&self, value: &Value) -> Result<(), String> {
        if value.type_str() != self.toml_type() {
            return Err(format!(
                "expected {} ({}), this is {}",
                match self.toml_type() {
                    "integer" => "a whole number",
                    "boolean" => "a truth value",
                    "array" => "a list",
                    _ => "a text in quotes",
                },
                self.describe(),
                shown(value)
            ));
        }
        match (self, value) {
            (Kind::Integer { min, max, .. }, Value::Integer(number)) => {
                let fits = u64::try_from(*number).is_ok_and(|n| (*min..=*max).contains(&n));
                if fits {
                    Ok(())
                } else {
                    Err(format!("{number} is out of range, allowed are {}", self.describe()))
                }
            }
            (Kind::Choice(names), Value::String(text)) if !names.contains(&text.as_str()) => {
                Err(format!("{text:?} is not one of {}", self.describe()))
            }
            _ => Ok(()),
        }
    }

    /// Reads a text from the environment or a flag as a value of this kind.
    pub(super) fn parse(&self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        match self {
            Kind::Bool => match text.to_ascii_lowercase().as_str() {
                "true" | "1" | "yes" | "on" => Ok(Value::Boolean(true)),
                "false" | "0" | "no" | "off" => Ok(Value::Boolean(false)),
                _ => Err(format!("{text:?} is neither true nor false")),
            },
            Kind::Integer { .. } => text
                .replace('_', "")
                .parse()
                .map(Value::Integer)
                .map_err(|_| format!("{text:?} is not a whole number ({})", self.describe())),
            Kind::List(_) if text.starts_with('[') => parse_toml(text),
            Kind::List(_) => {
                let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
                Ok(Value::Array(parts.map(|part| Value::String(part.to_owned())).collect()))
            }
            _ => Ok(Value::String(text.to_owned())),
        }
    }
}

/// Reads one TOML value.
pub(super) fn parse_toml(text: &str) -> Result<Value, String> {
    use serde::Deserialize as _;
    let parsed = toml::de::ValueDeserializer::parse(text).and_then(Value::deserialize);
    parsed.map_err(|e| format!("not a TOML value: {}", e.message()))
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((cut, _)) => format!("{}... ({})", &text[..cut], value.type_str()),
        None => format!("{text} ({})", value.type_str()),
    }
}

impl KeyDoc {
    /// `section.name`
    pub fn dotted(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }
}

/// All keys of all sections.
pub fn all() -> impl Iterator<Item = &'static KeyDoc> {
    SECTIONS.iter().flat_map(|section| section.keys)
}

/// Finds a key by its dotted name.
pub fn find(dotted: &str) -> Option<&'static KeyDoc> {
    let (section, name) = dotted.split_once('.')?;
    SECTIONS.iter().find(|s| s.name == section)?.keys.iter().find(|k| k.name == name)
}

/// A list of entries, written `[[name]]`.
#[derive(Debug)]
pub(super) struct List {
    pub(super) name: &'static str,
    /// Keys of an entry.
    pub(super) fields: &'static [&'static str],
    /// What to write, for those who write it otherwise.
    pub(super) example: &'static str,
    /// Tries an entry by itself.
    pub(super) check: fn(&str, Value) -> Result<(), ConfigError>,
}

/// Every list.
pub(super) static LISTS: &[List] = &[
    List {
        name: "worker",
        fields: RegisterRequest::FIELDS,
        example: r#"such as [{ url = "http://127.0.0.1:8000" }]"#,
        check: |key, value| read_entry::<RegisterRequest>(key, value).map(drop),
    },
    List {
        name: "key",
        fields: KeyEntry::FIELDS,
        example: r#"such as [{ id = "team-a", sha256 = "..." }]"#,
        check: |key, value| read_entry::<KeyEntry>(key, value).map(drop),
    },
    List {
        name: "node_token",
        fields: NodeTokenEntry::FIELDS,
        example: r#"such as [{ id = "gpus", sha256 = "...", networks = ["10.0.0.0/8"] }]"#,
        check: |key, value| read_entry::<NodeTokenEntry>(key, value).map(drop),
    },
    List {
        name: "model",
        fields: ModelEntry::FIELDS,
        example: r#"such as [{ name = "llama", directory = "/models/llama" }]"#,
        check: |key, value| read_entry::<ModelEntry>(key, value).map(drop),
    },
    List {
        name: "name",
        fields: NameEntry::FIELDS,
        example: r#"such as [{ name = "prefill-service", addresses = ["10.0.0.7:8088"] }]"#,
        check: |key, value| {
            let entry = read_entry::<NameEntry>(key, value)?;
            entry.check().map_err(|why| ConfigError::about(key, why))
        },
    },
    List {
        name: "discover",
        fields: DiscoverEntry::FIELDS,
        example: r#"such as [{ name = "vllm" }]"#,
        check: |key, value| read_entry::<DiscoverEntry>(key, value).map(drop),
    },
];

/// The list that `key`, such as `worker[0]`, is an entry of.
pub(super) fn list_of(key: &str) -> Option<&'static List> {
    let (name, _) = key.split_once('[')?;
    LISTS.iter().find(|list| list.name == name)
}

/// The candidate that `typed` was most likely meant to be, if one is near enough.
pub fn suggest<'a>(typed: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let typed = typed.to_ascii_lowercase().replace('-', "_");
    let near = |candidate: &&str| {
        let distance = edit_distance(&typed, candidate);
        (distance <= 1 + candidate.len() / 4).then_some(distance)
    };
    candidates
        .into_iter()
        .filter_map(|candidate| near(&candidate).map(|distance| (distance, candidate)))
        .min()
        .map(|(_, candidate)| candidate)
}

/// Least number of inserted, removed, replaced or swapped neighbouring characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut rows: Vec<Vec<usize>> = vec![(0..=b.len()).collect()];
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = rows[i - 1][j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut best = replaced.min(rows[i - 1][j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            row.push(best);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_of_the_finger_is_recognised() {
        assert_eq!(suggest("listne", ["listen", "advertise"]), Some("listen"));
        assert_eq!(suggest("max-headers", ["max_headers", "max_header_bytes"]), Some("max_headers"));
        assert_eq!(suggest("banana", ["listen", "advertise"]), None);
    }

    #[test]
    fn lists_come_comma_separated_or_as_toml() {
        let list = Kind::List("x");
        assert_eq!(list.parse("a, b,"), list.parse(r#"["a", "b"]"#));
        assert_eq!(list.parse(""), Ok(Value::Array(Vec::new())));
    }

    #[test]
    fn every_key_has_one_sentence_or_more() {
        for key in all() {
            let doc = key.doc.trim();
            assert!(doc.ends_with('.'), "{}: {doc:?}", key.dotted());
        }
    }
}
