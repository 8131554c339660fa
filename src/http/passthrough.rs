//! The model of a request that is passed through without being understood: named in a JSON body
//! or in a form, as the audio routes have it, or not at all.

use http::HeaderMap;
use http::header::CONTENT_TYPE;

/// Longest model name taken from a form.
const MAX_NAME: usize = 512;

/// What a body is, as far as its headers say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// JSON, said or not said to be.
    Json,
    /// A form with this boundary.
    Form(String),
    /// Read by its own rules at the worker: what looks like JSON in it proves nothing.
    Other,
}

/// What a body is.
pub(super) fn content(headers: &HeaderMap) -> Content {
    let Some(value) = headers.get(CONTENT_TYPE) else { return Content::Json };
    let mut parts = value.to_str().unwrap_or_default().split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    if essence.eq_ignore_ascii_case("application/json") {
        return Content::Json;
    }
    let mut parameters = parts.filter_map(|parameter| parameter.split_once('='));
    match parameters.find(|(name, _)| name.eq_ignore_ascii_case("boundary")) {
        Some((_, boundary)) if essence.eq_ignore_ascii_case("multipart/form-data") => {
            Content::Form(boundary.trim_matches('"').to_owned())
        }
        _ => Content::Other,
    }
}

/// The value of the part called `model` (RFC 7578); `None` if there is none to be seen.
pub(super) fn model_in_form<'a>(boundary: &str, body: &'a [u8]) -> Option<&'a str> {
    let delimiter = format!("\r\n--{boundary}");
    // The first delimiter has no line before it.
    let mut rest = body.strip_prefix(&delimiter.as_bytes()[2..])?;
    while let Some(part) = rest.strip_prefix(b"\r\n") {
        let head_end = memchr::memmem::find(part, b"\r\n\r\n")?;
        let content = &part[head_end + 4..];
        let end = memchr::memmem::find(content, delimiter.as_bytes())?;
        if is_called_model(&part[..head_end]) {
            let name = std::str::from_utf8(&content[..end]).ok()?.trim();
            return Some(name).filter(|name| (1..=MAX_NAME).contains(&name.len()));
        }
        rest = &content[end + delimiter.len()..];
    }
    None
}

fn is_called_model(head: &[u8]) -> bool {
    let Ok(head) = std::str::from_utf8(head) else { return false };
    let disposition = head
        .split("\r\n")
        .filter_map(|line| line.split_once(':'))
        .find_map(|(name, value)| name.trim().eq_ignore_ascii_case("content-disposition").then_some(value));
    disposition.is_some_and(|value| {
        value.split(';').map(str::trim).any(|parameter| matches!(parameter, "name=\"model\"" | "name=model"))
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn content_is_told_by_its_type() {
        let content_of = |content_type: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            content(&headers)
        };
        assert_eq!(content(&HeaderMap::new()), Content::Json);
        assert_eq!(content_of("Application/JSON; charset=utf-8"), Content::Json);
        assert_eq!(content_of("multipart/form-data; Boundary=\"x y\""), Content::Form("x y".into()));
        for other in ["text/plain", "multipart/form-data", "multipart/mixed; boundary=x", ""] {
            assert_eq!(content_of(other), Content::Other, "{other}");
        }
    }

    #[test]
    fn the_model_of_a_form_is_found_and_only_there() {
        let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nname=\"model\"\r\n\r\nno\
                    \r\n--x\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--x--\r\n";
        assert_eq!(model_in_form("x", form.as_bytes()), Some("whisper"));
        for body in [
            "",
            "--x\r\n",
            "--x--\r\n",
            "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n",
            "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n\r\n--x--\r\n",
            "--x\r\nA: b\r\n\r\nm\r\n--x--",
            "name=\"model\"\r\n\r\nm\r\n",
        ] {
            assert_eq!(model_in_form("x", body.as_bytes()), None, "{body}");
        }
    }
}
