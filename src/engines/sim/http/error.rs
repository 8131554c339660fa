//! Error replies, worded as vLLM words them.

use http::StatusCode;
use serde::Serialize;
use serde_json::Value;

use crate::engines::sim::outbox::Failure;

/// What an inference route answers instead of a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status and `code` of the body.
    pub status: StatusCode,
    /// `type` of the body.
    pub kind: &'static str,
    /// Human-readable text.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// Whether SGLang says it.
    words: Words,
}

/// Whose words an error is in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Words {
    #[default]
    Vllm,
    Sglang,
    Ksana,
}

/// What vLLM says once its engine process is gone.
const ENGINE_DEAD: &str = "EngineCore encountered an issue. See stack trace (above) for the root cause.";

impl ApiError {
    /// 400 with vLLM's ordinary type.
    pub fn bad_request(message: impl Into<String>, param: Option<&str>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "BadRequestError",
            message: message.into(),
            param: param.map(Into::into),
            words: Words::Vllm,
        }
    }

    /// 500: the engine process is gone.
    pub fn engine_dead() -> Self {
        Self::with_status(StatusCode::INTERNAL_SERVER_ERROR, ENGINE_DEAD)
    }

    /// What a request that came to nothing ends with.
    pub fn failure(failure: &Failure) -> Self {
        let internal = StatusCode::INTERNAL_SERVER_ERROR;
        match failure {
            Failure::EngineDead => Self::engine_dead(),
            Failure::NoTransfer => Self::with_status(internal, "Internal server error"),
            Failure::Aborted { status, message } => {
                Self::with_status(StatusCode::from_u16(*status).unwrap_or(internal), message.clone())
                    .of_sglang()
            }
        }
    }

    /// Any status, with a type that goes with it.
    pub fn with_status(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status.as_u16() {
            400 => "BadRequestError",
            401 => "AuthenticationError",
            403 => "PermissionDeniedError",
            404 => "NotFoundError",
            429 => "RateLimitError",
            503 => "ServiceUnavailableError",
            500.. => "InternalServerError",
            _ => "BadRequestError",
        };
        Self { status, kind, message: message.into(), param: None, words: Words::Vllm }
    }

    /// 404: no such model or adapter.
    pub fn unknown_model(name: &str, aliases: &[String]) -> Self {
        let message = format!("The model `{name}` does not exist. Valid aliases: {}.", aliases.join(", "));
        Self { param: Some("model".into()), ..Self::with_status(StatusCode::NOT_FOUND, message) }
    }

    /// 400: a field is not what the schema wants. `kind` and `message` are pydantic's.
    pub fn schema(kind: &str, location: &str, message: &str, input: &str, context: Option<&str>) -> Self {
        let context = context.map(|error| format!(", 'ctx': {{'error': {error}}}")).unwrap_or_default();
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "Bad Request",
            message: format!(
                "1 validation error:\n  {{'type': '{kind}', 'loc': '{location}', 'msg': '{message}', 'input': {input}{context}}}"
            ),
            param: Some(location.to_owned()),
            words: Words::Vllm,
        }
    }

    /// 400: a field of the body has the wrong type or value.
    pub fn field(kind: &str, field: &str, message: &str, input: &Value) -> Self {
        Self::schema(kind, &format!("body.{field}"), message, &python_repr(input), None)
    }

    /// 400: a field of the body is absent.
    pub fn missing(field: &str, body: &Value) -> Self {
        Self::field("missing", field, "Field required", body)
    }

    /// 400: the body is no JSON.
    pub fn not_json(body: &[u8], error: &serde_json::Error) -> Self {
        let line_start: usize = body
            .split_inclusive(|byte| *byte == b'\n')
            .take(error.line().saturating_sub(1))
            .map(<[u8]>::len)
            .sum();
        let column = if error.is_eof() { error.column() } else { error.column().saturating_sub(1) };
        let location = format!("body.{}", line_start + column);
        let cause = if error.is_eof() { "'Expecting value'" } else { "\"Expecting ',' delimiter\"" };
        Self::schema("json_invalid", &location, "JSON decode error", "'<dict of 0 items>'", Some(cause))
    }

    /// The same in SGLang's words.
    pub fn of_sglang(self) -> Self {
        Self { words: Words::Sglang, ..self }
    }

    /// The same in KsanaLLM's words.
    pub fn of_ksana(self) -> Self {
        Self { words: Words::Ksana, ..self }
    }

    /// Whether it is in SGLang's words.
    pub fn is_sglang(&self) -> bool {
        self.words == Words::Sglang
    }

    /// SGLang's object: alone as a reply, within `error` as an event.
    fn sglang(&self, kind: &str) -> Vec<u8> {
        #[derive(Serialize)]
        struct Error<'a> {
            object: &'a str,
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let param = self.param.as_deref();
        let code = self.status.as_u16();
        let error = Error { object: "error", message: &self.message, r#type: kind, param, code };
        serde_json::to_vec(&error).unwrap_or_default()
    }

    /// The body of a reply: compact.
    pub fn body(&self) -> Vec<u8> {
        if self.words == Words::Ksana {
            return serde_json::json!({"detail": self.message}).to_string().into_bytes();
        }
        if self.is_sglang() {
            let code = self.status.as_str();
            return self.sglang(if self.status.is_server_error() { code } else { self.kind });
        }
        #[derive(Serialize)]
        struct Outer<'a> {
            error: Inner<'a>,
        }
        #[derive(Serialize)]
        struct Inner<'a> {
            message: &'a str,
            r#type: &'a str,
            param: Option<&'a str>,
            code: u16,
        }
        let inner = Inner {
            message: &self.message,
            r#type: self.kind,
            param: self.param.as_deref(),
            code: self.status.as_u16(),
        };
        serde_json::to_vec(&Outer { error: inner }).unwrap_or_default()
    }

    /// The event of a stream: with the blanks that Python's `json.dumps` leaves.
    pub fn event(&self) -> String {
        if self.is_sglang() {
            // As Python names statuses.
            let name = self.status.canonical_reason().unwrap_or("Error").to_uppercase().replace(' ', "_");
            let error = String::from_utf8_lossy(&self.sglang(&name)).into_owned();
            return format!("data: {{\"error\": {error}}}\n\n");
        }
        let text = |text: &str| Value::from(text).to_string();
        let param = self.param.as_deref().map_or_else(|| "null".to_owned(), text);
        format!(
            "data: {{\"error\": {{\"message\": {}, \"type\": {}, \"param\": {param}, \"code\": {}}}}}\n\n",
            text(&self.message),
            text(self.kind),
            self.status.as_u16(),
        )
    }
}

/// A value as the server's log-friendly Python representation.
fn python_repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'")),
        Value::Array(items) => format!("'<list of {} items>'", items.len()),
        Value::Object(fields) => format!("'<dict of {} items>'", fields.len()),
    }
}
