//! A JSON object of which a few members are replaced while all others stay byte for byte as they are.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

/// The members of an object, in order.
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, Cow<'a, str>)>);

#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut members = Vec::new();
                while let Some((Key(name), value)) = map.next_entry::<Key<'de>, &'de RawValue>()? {
                    members.push((name, Cow::Borrowed(value.get())));
                }
                Ok(Fields(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

impl<'a> Fields<'a> {
    /// Reads an object; `None` for anything else.
    pub(super) fn read(text: &'a [u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }

    /// A member as it is written.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(is, _)| is == name).map(|(_, value)| value.as_ref())
    }

    /// Replaces a member, or adds it; `value` is JSON.
    pub(super) fn set(&mut self, name: &'static str, value: String) {
        self.remove_all_but_first(name);
        match self.0.iter_mut().find(|(is, _)| is == name) {
            Some((_, is)) => *is = Cow::Owned(value),
            None => self.0.push((Cow::Borrowed(name), Cow::Owned(value))),
        }
    }

    /// Takes a member away.
    pub(super) fn remove(&mut self, name: &str) {
        self.0.retain(|(is, _)| is != name);
    }

    fn remove_all_but_first(&mut self, name: &str) {
        let mut seen = false;
        self.0.retain(|(is, _)| is != name || !std::mem::replace(&mut seen, true));
    }

    /// The object.
    pub(super) fn write(&self) -> String {
        let size: usize = self.0.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
        let mut text = String::with_capacity(size + 2);
        text.push('{');
        for (at, (name, value)) in self.0.iter().enumerate() {
            if at > 0 {
                text.push(',');
            }
            text.push_str(&serde_json::Value::from(name.as_ref()).to_string());
            text.push(':');
            text.push_str(value);
        }
        text.push('}');
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_replaced_stays_as_it_is_written() {
        let text = br#"{"a\n": 1.50, "stream":false,"b":{"z": [1e400 ,2]},"stream":null}"#;
        let mut fields = Fields::read(text).unwrap();
        assert_eq!((fields.get("stream"), fields.get("a\n")), (Some("false"), Some("1.50")));
        fields.set("stream", "true".to_owned());
        fields.set("new", "0".to_owned());
        assert_eq!(fields.write(), r#"{"a\n":1.50,"stream":true,"b":{"z": [1e400 ,2]},"new":0}"#);
        fields.remove("b");
        assert_eq!(fields.write(), r#"{"a\n":1.50,"stream":true,"new":0}"#);
        assert!(Fields::read(b"[1]").is_none() && Fields::read(b"{").is_none());
    }
}
