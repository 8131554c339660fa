//! JSON as Python's `json` module reads and writes it: members keep their order and the last of equal
//! names counts, whole numbers have any size, other numbers are doubles in their shortest form, and
//! what is wrong with a text is said in its words, with its position in characters.

use std::fmt::Write as _;

/// Deepest nesting; Python gives up at about a thousand.
const MAX_DEPTH: usize = 900;
/// Most digits of a whole number, as in Python.
const MAX_DIGITS: usize = 4300;

/// A value.
#[derive(Clone, PartialEq, Debug)]
pub enum Json {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A whole number, as its digits.
    Int(String),
    /// Any other number, and `NaN`, `Infinity` and `-Infinity`.
    Float(f64),
    /// A text. Halves of surrogate pairs, which UTF-8 has not, are in [`Json::Broken`].
    Text(String),
    /// A text that cannot be written as UTF-8.
    Broken,
    /// A list.
    List(Vec<Json>),
    /// An object.
    Object(Vec<(String, Json)>),
}

/// Why a text is not JSON.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{message}: char {at}")]
pub struct JsonError {
    /// In Python's words.
    pub message: &'static str,
    /// Where, in characters.
    pub at: usize,
}

/// What cannot be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the value cannot be written as JSON")]
pub struct Unwritable;

impl Json {
    /// Reads a text. A byte order mark in front of it is skipped.
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut reader = Reader { text, at: 0 };
        reader.space();
        let value = reader.value(0)?;
        reader.space();
        match reader.at == text.len() {
            true => Ok(value),
            false => Err(reader.error("Extra data", reader.at)),
        }
    }

    /// Writes it without spaces, non-ASCII characters as they are.
    pub fn write(&self, out: &mut String) -> Result<(), Unwritable> {
        match self {
            Json::Null => out.push_str("null"),
            Json::Bool(true) => out.push_str("true"),
            Json::Bool(false) => out.push_str("false"),
            Json::Int(digits) => out.push_str(digits),
            Json::Float(number) if number.is_finite() => write_float(*number, out),
            Json::Float(_) | Json::Broken => return Err(Unwritable),
            Json::Text(text) => write_text(text, out),
            Json::List(items) => {
                out.push('[');
                for (at, item) in items.iter().enumerate() {
                    if at > 0 {
                        out.push(',');
                    }
                    item.write(out)?;
                }
                out.push(']');
            }
            Json::Object(members) => {
                out.push('{');
                for (at, (name, value)) in members.iter().enumerate() {
                    if at > 0 {
                        out.push(',');
                    }
                    write_text(name, out);
                    out.push(':');
                    value.write(out)?;
                }
                out.push('}');
            }
        }
        Ok(())
    }

    /// The text of [`Json::write`].
    pub fn to_text(&self) -> Result<String, Unwritable> {
        let mut out = String::new();
        self.write(&mut out)?;
        Ok(out)
    }

    /// A member of an object.
    pub fn get(&self, name: &str) -> Option<&Json> {
        match self {
            Json::Object(members) => members.iter().find(|(is, _)| is == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// A whole number.
    pub fn int(number: i64) -> Self {
        Json::Int(number.to_string())
    }

    /// A text.
    pub fn text(text: impl Into<String>) -> Self {
        Json::Text(text.into())
    }

    /// An object.
    pub fn object<const N: usize>(members: [(&str, Json); N]) -> Self {
        Json::Object(members.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }
}

/// `repr` of a float: the shortest digits that read back, with an exponent outside of 1e-4 … 1e16.
fn write_float(number: f64, out: &mut String) {
    // Rust's exponent form has the shortest digits, too.
    let text = format!("{number:e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let _ = write!(out, "{number}");
        if number.fract() == 0.0 {
            out.push_str(".0");
        }
        return;
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    let _ = write!(out, "{mantissa}e{sign}{:02}", exponent.unsigned_abs());
}

fn write_text(text: &str, out: &mut String) {
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
            c if (c as u32) < 0x20 => {
                let _ = write!(out, "\\u{:04x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

struct Reader<'a> {
    text: &'a str,
    /// In bytes.
    at: usize,
}

impl Reader<'_> {
    fn error(&self, message: &'static str, at: usize) -> JsonError {
        JsonError { message, at: self.text[..at].chars().count() }
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: usize) -> Result<Json, JsonError> {
        if depth > MAX_DEPTH {
            return Err(self.error("maximum recursion depth exceeded", self.at));
        }
        match self.peek() {
            Some(b'"') => {
                self.at += 1;
                self.string().map(|text| text.map_or(Json::Broken, Json::Text))
            }
            Some(b'{') => self.object(depth),
            Some(b'[') => self.list(depth),
            _ => self.word().map_or_else(|| self.number(), Ok),
        }
    }

    fn word(&mut self) -> Option<Json> {
        let words = [
            ("null", Json::Null),
            ("true", Json::Bool(true)),
            ("false", Json::Bool(false)),
            ("NaN", Json::Float(f64::NAN)),
            ("Infinity", Json::Float(f64::INFINITY)),
            ("-Infinity", Json::Float(f64::NEG_INFINITY)),
        ];
        let (word, value) = words.into_iter().find(|(word, _)| self.text[self.at..].starts_with(word))?;
        self.at += word.len();
        Some(value)
    }

    fn digits(&mut self) -> usize {
        let from = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - from
    }

    fn number(&mut self) -> Result<Json, JsonError> {
        let from = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else if self.digits() == 0 {
            self.at = from;
            return Err(self.error("Expecting value", from));
        }
        let whole = self.at;
        if self.peek() == Some(b'.') {
            self.at += 1;
            if self.digits() == 0 {
                self.at = whole;
            }
        }
        let before_exponent = self.at;
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            if self.digits() == 0 {
                self.at = before_exponent;
            }
        }
        let text = &self.text[from..self.at];
        if self.at > whole {
            // Digits, a point and an exponent are always a double, if an infinite one.
            return Ok(Json::Float(text.parse().unwrap_or(f64::INFINITY)));
        }
        if text.len() > MAX_DIGITS {
            return Err(self.error("Exceeds the limit for integer string conversion", from));
        }
        Ok(Json::Int(if text == "-0" { "0" } else { text }.to_owned()))
    }

    fn list(&mut self, depth: usize) -> Result<Json, JsonError> {
        let mut items = Vec::new();
        self.at += 1;
        self.space();
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(Json::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            match self.peek() {
                Some(b']') => {
                    self.at += 1;
                    return Ok(Json::List(items));
                }
                Some(b',') => {
                    self.at += 1;
                    self.space();
                }
                _ => return Err(self.error("Expecting ',' delimiter", self.at)),
            }
        }
    }

    fn object(&mut self, depth: usize) -> Result<Json, JsonError> {
        const NAME: &str = "Expecting property name enclosed in double quotes";
        let mut members: Vec<(String, Json)> = Vec::new();
        // Where each name is, so that many members do not take the square of the time.
        let mut places = std::collections::HashMap::new();
        self.at += 1;
        self.space();
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(Json::Object(members));
        }
        loop {
            if self.peek() != Some(b'"') {
                return Err(self.error(NAME, self.at));
            }
            self.at += 1;
            // A name that UTF-8 has not: whatever is done with the whole, it cannot be written.
            let name = self.string()?;
            self.space();
            if self.peek() != Some(b':') {
                return Err(self.error("Expecting ':' delimiter", self.at));
            }
            self.at += 1;
            self.space();
            let value = self.value(depth + 1)?;
            let (name, value) = match name {
                Some(name) => (name, value),
                None => (String::new(), Json::Broken),
            };
            match places.get(&name) {
                Some(&at) => {
                    let place: &mut (String, Json) = &mut members[at];
                    place.1 = value;
                }
                None => {
                    places.insert(name.clone(), members.len());
                    members.push((name, value));
                }
            }
            self.space();
            match self.peek() {
                Some(b'}') => {
                    self.at += 1;
                    return Ok(Json::Object(members));
                }
                Some(b',') => {
                    self.at += 1;
                    self.space();
                }
                _ => return Err(self.error("Expecting ',' delimiter", self.at)),
            }
        }
    }

    /// Behind the opening quote; `None` for a text that UTF-8 has not.
    fn string(&mut self) -> Result<Option<String>, JsonError> {
        let begin = self.at - 1;
        let unterminated = |reader: &Self| reader.error("Unterminated string starting at", begin);
        let mut text = String::new();
        let mut is_whole = true;
        loop {
            let rest = &self.text[self.at..];
            let Some(c) = rest.chars().next() else { return Err(unterminated(self)) };
            match c {
                '"' => {
                    self.at += 1;
                    return Ok(is_whole.then_some(text));
                }
                '\\' => {
                    let escape = rest[1..].chars().next().ok_or_else(|| unterminated(self))?;
                    let plain = match escape {
                        '"' | '\\' | '/' => escape,
                        'b' => '\u{8}',
                        'f' => '\u{c}',
                        'n' => '\n',
                        'r' => '\r',
                        't' => '\t',
                        'u' => {
                            match self.unicode()? {
                                Some(c) => text.push(c),
                                None => is_whole = false,
                            }
                            continue;
                        }
                        _ => return Err(self.error("Invalid \\escape", self.at)),
                    };
                    text.push(plain);
                    self.at += 2;
                }
                c if (c as u32) < 0x20 => return Err(self.error("Invalid control character at", self.at)),
                _ => {
                    let end = rest.find(|c: char| c == '"' || c == '\\' || (c as u32) < 0x20);
                    let plain = &rest[..end.unwrap_or(rest.len())];
                    text.push_str(plain);
                    self.at += plain.len();
                }
            }
        }
    }

    /// At `\u`: the character, two escapes where they are a pair; `None` for half of one.
    fn unicode(&mut self) -> Result<Option<char>, JsonError> {
        let first = self.four_digits()?;
        if !(0xd800..0xdc00).contains(&first) {
            return Ok(char::from_u32(first));
        }
        if !self.text[self.at..].starts_with("\\u") {
            return Ok(None);
        }
        let before = self.at;
        let second = self.four_digits()?;
        if !(0xdc00..0xe000).contains(&second) {
            self.at = before;
            return Ok(None);
        }
        Ok(char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)))
    }

    fn four_digits(&mut self) -> Result<u32, JsonError> {
        let digits = self.text.get(self.at + 2..self.at + 6);
        let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        let number = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let number = number.ok_or_else(|| self.error("Invalid \\uXXXX escape", self.at + 1))?;
        self.at += 6;
        Ok(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(text: &str) -> String {
        Json::parse(text).unwrap().to_text().unwrap()
    }

    #[test]
    fn numbers_texts_and_members_are_written_as_python_writes_them() {
        for (read, written) in [
            (" { \"b\" : 1.10 , \"a\" : 1e3 } ", r#"{"b":1.1,"a":1000.0}"#),
            (r#"{"a":1,"b":2,"a":3}"#, r#"{"a":3,"b":2}"#),
            (
                "[1e16,1e15,123456789012345678,1e-5,0.0001,-0.0,-0,1E22,5e-324]",
                "[1e+16,1000000000000000.0,123456789012345678,1e-05,0.0001,-0.0,0,1e+22,5e-324]",
            ),
            ("99999999999999999999999999999999", "99999999999999999999999999999999"),
            (r#""é😀é \/\u0007\n\u007f""#, "\"é😀é /\\u0007\\n\u{7f}\""),
            ("\u{feff}[true,false,null]", "[true,false,null]"),
            ("[]", "[]"),
            ("{}", "{}"),
        ] {
            assert_eq!(again(read), written);
        }
    }

    #[test]
    fn what_is_no_json_is_said_in_python_s_words() {
        for (text, message, at) in [
            ("{\"a\":", "Expecting value", 5),
            ("{bad", "Expecting property name enclosed in double quotes", 1),
            ("", "Expecting value", 0),
            ("[1 2]", "Expecting ',' delimiter", 3),
            ("{\"é\" 1}", "Expecting ':' delimiter", 5),
            ("1 x", "Extra data", 2),
            ("\"abc", "Unterminated string starting at", 0),
            ("\"a\nb\"", "Invalid control character at", 2),
            ("\"\\x\"", "Invalid \\escape", 1),
            ("\"\\u12g4\"", "Invalid \\uXXXX escape", 2),
            ("-", "Expecting value", 0),
            ("[1,]", "Expecting value", 3),
            ("1.", "Extra data", 1),
        ] {
            assert_eq!(Json::parse(text), Err(JsonError { message, at }), "{text}");
        }
        assert!(Json::parse(&"[".repeat(100_000)).is_err());
    }

    #[test]
    fn what_utf_8_or_json_have_not_is_read_but_not_written() {
        for text in ["NaN", "[-Infinity]", "1e400", r#""\ud800""#, r#"{"\udc00":1}"#] {
            assert_eq!(Json::parse(text).unwrap().to_text(), Err(Unwritable), "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_read_without_harm_and_what_was_written_reads_back(text: String, number: f64) {
            if let Ok(value) = Json::parse(&text) && let Ok(text) = value.to_text() {
                proptest::prop_assert_eq!(Json::parse(&text), Ok(value));
            }
            if number.is_finite() {
                let text = Json::Float(number).to_text().unwrap();
                proptest::prop_assert_eq!(text.parse::<f64>().unwrap(), number);
            }
        }
    }
}
