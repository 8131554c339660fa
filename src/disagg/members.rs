//! A JSON object whose members can be replaced while all others stay as they were written.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// An object, member by member, in their order.
#[derive(Clone, Debug)]
pub struct Members<'a>(Vec<(String, Cow<'a, str>)>);

impl<'a> Members<'a> {
    /// Reads a body; `None` if it is no object.
    pub fn parse(body: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(body).ok()
    }

    /// A member as it is written, the last one of that name. `null` is no value.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().rev().find(|(is, _)| is == name);
        found.map(|(_, value)| value.as_ref()).filter(|value| *value != "null")
    }

    /// Whether a member is `true`.
    pub fn is_true(&self, name: &str) -> bool {
        self.get(name) == Some("true")
    }

    /// A member that is a number without a fraction.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.get(name)?.parse().ok()
    }

    /// Puts a member at the end, in place of those of that name. `json` must be a value.
    pub fn set(&mut self, name: &str, json: impl Into<String>) {
        self.remove(name);
        self.0.push((name.to_owned(), Cow::Owned(json.into())));
    }

    /// The same, if there is such a member already.
    pub fn replace(&mut self, name: &str, json: impl Into<String>) {
        if self.0.iter().any(|(is, _)| is == name) {
            self.set(name, json);
        }
    }

    /// Takes a member out.
    pub fn remove(&mut self, name: &str) {
        self.0.retain(|(is, _)| is != name);
    }

    /// As JSON.
    pub fn to_bytes(&self) -> Bytes {
        let length: usize = self.0.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        let mut out = Vec::with_capacity(length + 2);
        for (name, value) in &self.0 {
            out.push(if out.is_empty() { b'{' } else { b',' });
            // A name can always be written, and memory is the only writer.
            out.extend_from_slice(serde_json::to_string(name).unwrap_or_default().as_bytes());
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        if out.is_empty() {
            out.push(b'{');
        }
        out.push(b'}');
        out.into()
    }
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &'de RawValue>()? {
                    members.push((name, Cow::Borrowed(value.get())));
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_touched_stays_to_the_last_digit() {
        let body = br#" { "a\"b" : 1.50e0, "n":12345678901234567890123, "x": null, "n2" : [1, 2] } "#;
        let mut members = Members::parse(body).unwrap();
        assert_eq!((members.get("n"), members.get("x")), (Some("12345678901234567890123"), None));
        members.set("x", "7");
        members.replace("absent", "1");
        assert_eq!(members.to_bytes(), r#"{"a\"b":1.50e0,"n":12345678901234567890123,"n2":[1, 2],"x":7}"#);
        members.remove("n2");
        assert!(!String::from_utf8_lossy(&members.to_bytes()).contains("n2"));
        assert_eq!(Members::parse(b"{}").unwrap().to_bytes(), "{}");
    }

    #[test]
    fn of_equal_names_the_last_counts_and_one_is_left() {
        let mut members = Members::parse(br#"{"stream":true,"stream":false}"#).unwrap();
        assert_eq!(members.get("stream"), Some("false"));
        members.set("stream", "true");
        assert_eq!(members.to_bytes(), r#"{"stream":true}"#);
    }

    #[test]
    fn other_things_than_objects_are_none() {
        for other in ["", "[1]", "{", "{}x", "7", "{\"a\"}"] {
            assert!(Members::parse(other.as_bytes()).is_none(), "{other}");
        }
    }
}
