//! What pydantic makes of a body: members taken out with its lenient conversions, and what is wrong
//! told as its list of errors.

use super::json::Json;

/// Where the words of an error are explained, as old versions of FastAPI say with each.
const URL: &str = "https://errors.pydantic.dev/2.14/v/";

/// What is wrong with a body: the elements of `detail`.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Wrong(Vec<Json>);

impl Wrong {
    /// Whether nothing is.
    pub fn is_nothing(&self) -> bool {
        self.0.is_empty()
    }

    /// `{"detail":[…]}`; an input that cannot be written is left out.
    pub fn body(&self) -> String {
        let errors: Vec<String> = self
            .0
            .iter()
            .map(|error| match error.to_text() {
                Ok(text) => text,
                Err(_) => without_input(error).to_text().unwrap_or_default(),
            })
            .collect();
        format!("{{\"detail\":[{}]}}", errors.join(","))
    }

    fn add(&mut self, kind: &str, loc: &[Json], msg: &str, input: &Json, ctx: Option<Json>) {
        let mut members = vec![
            ("type".to_owned(), Json::text(kind)),
            ("loc".to_owned(), Json::List(loc.to_vec())),
            ("msg".to_owned(), Json::text(msg)),
            ("input".to_owned(), input.clone()),
        ];
        members.extend(ctx.map(|ctx| ("ctx".to_owned(), ctx)));
        members.push(("url".to_owned(), Json::Text(format!("{URL}{kind}"))));
        self.0.push(Json::Object(members));
    }
}

fn without_input(error: &Json) -> Json {
    match error {
        Json::Object(members) => {
            Json::Object(members.iter().filter(|(name, _)| name != "input").cloned().collect())
        }
        other => other.clone(),
    }
}

/// A body, by its content type: FastAPI reads JSON where none is named.
pub fn body(content_type: Option<&str>, bytes: &[u8]) -> Result<Json, Wrong> {
    let loc = [Json::text("body")];
    let mut wrong = Wrong::default();
    if bytes.is_empty() {
        wrong.add("missing", &loc, "Field required", &Json::Null, None);
        return Err(wrong);
    }
    let essence =
        content_type.map(|text| text.split(';').next().unwrap_or_default().trim().to_ascii_lowercase());
    let is_json = essence.as_deref().is_none_or(|essence| {
        essence
            .strip_prefix("application/")
            .is_some_and(|subtype| subtype == "json" || subtype.ends_with("+json"))
    });
    let text = String::from_utf8_lossy(bytes);
    if !is_json {
        return Ok(Json::Text(text.into_owned()));
    }
    Json::parse(&text).map_err(|error| {
        let ctx = Json::object([("error", Json::text(error.message))]);
        let loc = Json::List(vec![Json::text("body"), Json::int(error.at as i64)]);
        let members = [
            ("type", Json::text("json_invalid")),
            ("loc", loc),
            ("msg", Json::text("JSON decode error")),
            ("input", Json::object([])),
            ("ctx", ctx),
        ];
        Wrong(vec![Json::object(members)])
    })
}

/// An object whose members are taken out.
pub struct Fields<'a> {
    object: &'a Json,
    loc: Vec<Json>,
    /// What was wrong so far.
    pub wrong: Wrong,
}

impl<'a> Fields<'a> {
    /// Of a whole body.
    pub fn of(body: &'a Json) -> Result<Self, Wrong> {
        let mut fields = Fields { object: body, loc: vec![Json::text("body")], wrong: Wrong::default() };
        match fields.check_object() {
            true => Ok(fields),
            false => Err(fields.wrong),
        }
    }

    fn check_object(&mut self) -> bool {
        let is_object = matches!(self.object, Json::Object(_));
        if !is_object {
            let msg = "Input should be a valid dictionary or object to extract fields from";
            self.wrong.add("model_attributes_type", &self.loc, msg, self.object, None);
        }
        is_object
    }

    fn at(&self, name: &str) -> Vec<Json> {
        self.loc.iter().cloned().chain([Json::text(name)]).collect()
    }

    fn refuse(&mut self, name: &str, kind: &str, msg: &str, input: &Json, ctx: Option<Json>) {
        let loc = self.at(name);
        self.wrong.add(kind, &loc, msg, input, ctx);
    }

    /// A member that must be there.
    fn required(&mut self, name: &str) -> Option<&'a Json> {
        let found = self.object.get(name);
        if found.is_none() {
            let object = self.object;
            self.refuse(name, "missing", "Field required", object, None);
        }
        found
    }

    fn as_text(&mut self, name: &str, value: &Json) -> Option<String> {
        match value {
            Json::Text(text) => Some(text.clone()),
            Json::Broken => {
                let msg = "Input should be a valid string, unable to parse raw data as a unicode string";
                self.refuse(name, "string_unicode", msg, value, None);
                None
            }
            _ => {
                self.refuse(name, "string_type", "Input should be a valid string", value, None);
                None
            }
        }
    }

    /// A text that must be there; empty if it is not, which is noted.
    pub fn text(&mut self, name: &str) -> String {
        self.required(name).and_then(|value| self.as_text(name, value)).unwrap_or_default()
    }

    /// A text that must be there and pass a check, whose message it gets otherwise.
    pub fn checked_text(&mut self, name: &str, good: impl Fn(&str) -> bool, message: &str) -> String {
        let before = self.wrong.0.len();
        let text = self.text(name);
        if self.wrong.0.len() == before && !good(&text) {
            let ctx = Json::object([("error", Json::object([]))]);
            self.refuse(
                name,
                "value_error",
                &format!("Value error, {message}"),
                &Json::text(&text),
                Some(ctx),
            );
        }
        text
    }

    /// A text that may be left out or null.
    pub fn optional_text(&mut self, name: &str) -> Option<String> {
        match self.object.get(name) {
            None | Some(Json::Null) => None,
            Some(value) => self.as_text(name, value),
        }
    }

    /// A whole number, or what reads as one.
    fn as_int(&mut self, name: &str, value: &Json) -> Option<i64> {
        const TYPE: &str = "Input should be a valid integer";
        match value {
            Json::Int(digits) => Some(saturated(digits)),
            Json::Bool(flag) => Some(i64::from(*flag)),
            Json::Float(number) if number.is_finite() && number.fract() == 0.0 => Some(*number as i64),
            Json::Float(number) => {
                let (kind, msg) = match number.is_finite() {
                    true => (
                        "int_from_float",
                        "Input should be a valid integer, got a number with a fractional part",
                    ),
                    false => ("finite_number", "Input should be a finite number"),
                };
                self.refuse(name, kind, msg, value, None);
                None
            }
            Json::Text(text) => {
                let number = whole(text);
                if number.is_none() {
                    let msg = "Input should be a valid integer, unable to parse string as an integer";
                    self.refuse(name, "int_parsing", msg, value, None);
                }
                number
            }
            _ => {
                self.refuse(name, "int_type", TYPE, value, None);
                None
            }
        }
    }

    /// A number that must be there and not below zero.
    pub fn natural(&mut self, name: &str) -> i64 {
        let Some(value) = self.required(name) else { return 0 };
        let Some(number) = self.as_int(name, value) else { return 0 };
        if number < 0 {
            let ctx = Json::object([("ge", Json::int(0))]);
            let msg = "Input should be greater than or equal to 0";
            self.refuse(name, "greater_than_equal", msg, value, Some(ctx));
        }
        number
    }

    /// A number above zero that may be left out or null.
    pub fn optional_positive(&mut self, name: &str) -> Option<i64> {
        let value = self.object.get(name).filter(|value| **value != Json::Null)?;
        let number = self.as_int(name, value)?;
        if number <= 0 {
            let ctx = Json::object([("gt", Json::int(0))]);
            self.refuse(name, "greater_than", "Input should be greater than 0", value, Some(ctx));
        }
        Some(number)
    }

    /// A number that must be there.
    pub fn int(&mut self, name: &str) -> i64 {
        self.required(name).and_then(|value| self.as_int(name, value)).unwrap_or(0)
    }

    /// A list of objects that may be left out or null: how many there are, each shown to `each`.
    pub fn optional_objects(&mut self, name: &str, each: impl Fn(&mut Fields<'a>)) -> usize {
        let items = match self.object.get(name) {
            None | Some(Json::Null) => return 0,
            Some(Json::List(items)) => items,
            Some(other) => {
                self.refuse(name, "list_type", "Input should be a valid list", other, None);
                return 0;
            }
        };
        for (at, item) in items.iter().enumerate() {
            let mut loc = self.at(name);
            loc.push(Json::int(at as i64));
            let mut fields = Fields { object: item, loc, wrong: std::mem::take(&mut self.wrong) };
            if fields.check_object() {
                each(&mut fields);
            }
            self.wrong = fields.wrong;
        }
        items.len()
    }
}

fn saturated(digits: &str) -> i64 {
    digits.parse().unwrap_or(if digits.starts_with('-') { i64::MIN } else { i64::MAX })
}

/// A text that pydantic takes for a whole number: digits with a sign, single underscores between them,
/// spaces around it, and zeros behind a point.
fn whole(text: &str) -> Option<i64> {
    let text = text.trim();
    let text = match text.split_once('.') {
        Some((whole, zeros)) if zeros.bytes().all(|byte| byte == b'0') => whole,
        Some(_) => return None,
        None => text,
    };
    python_int(text)
}

/// What Python's `int()` makes of a text; too large ones are as large as can be.
pub fn python_int(text: &str) -> Option<i64> {
    let text = text.trim();
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let is_number = !digits.is_empty()
        && digits.split('_').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    is_number.then(|| saturated(&format!("{sign}{}", digits.replace('_', ""))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_leniently_as_the_reference_does() {
        for (text, number) in [
            ("8_0", Some(80)),
            (" 80 ", Some(80)),
            ("+80", Some(80)),
            ("-80", Some(-80)),
            ("8__0", None),
            ("_80", None),
            ("abc", None),
            ("", None),
            ("99999999999999999999", Some(i64::MAX)),
        ] {
            assert_eq!(python_int(text), number, "{text}");
        }
        assert_eq!((whole("1.0"), whole("1.5"), whole("1.")), (Some(1), None, Some(1)));
    }

    #[test]
    fn each_error_is_told_with_its_place() {
        let body = Json::parse(r#"{"n":"a","l":[{"i":1.5},7],"t":[],"z":-1,"p":0}"#).unwrap();
        let mut fields = Fields::of(&body).unwrap();
        fields.int("n");
        fields.optional_objects("l", |item| {
            item.int("i");
            item.text("s");
        });
        fields.optional_text("t");
        fields.natural("z");
        fields.optional_positive("p");
        fields.optional_objects("n", |_| {});
        let told = fields.wrong.body();
        for part in [
            r#""type":"int_parsing","loc":["body","n"]"#,
            r#""type":"int_from_float","loc":["body","l",0,"i"]"#,
            r#""type":"missing","loc":["body","l",0,"s"]"#,
            r#""type":"model_attributes_type","loc":["body","l",1]"#,
            r#""type":"string_type","loc":["body","t"]"#,
            r#""type":"greater_than_equal","loc":["body","z"]"#,
            r#""type":"greater_than","loc":["body","p"]"#,
            r#""type":"list_type","loc":["body","n"]"#,
        ] {
            assert!(told.contains(part), "{part} in {told}");
        }
    }

    #[test]
    fn a_body_that_is_not_called_json_is_a_text() {
        assert_eq!(body(Some("text/plain"), b"{}"), Ok(Json::text("{}")));
        for json in
            [None, Some("application/json"), Some("Application/JSON; charset=x"), Some("application/a+json")]
        {
            assert_eq!(body(json, b"{}"), Ok(Json::object([])), "{json:?}");
        }
        let unwritable = body(None, br#"{"a":NaN}"#).unwrap();
        let mut fields = Fields::of(&unwritable).unwrap();
        fields.text("a");
        assert!(!fields.wrong.body().contains("NaN"));
    }
}
