//! The model of a request that is passed through without being understood: named in a JSON body
//! or in a form, as the audio routes have it, or not at all.

use std::borrow::Cow;

use http::HeaderMap;
use http::header::CONTENT_TYPE;

use super::peek::peek;

/// Longest model name taken from a form.
const MAX_NAME: usize = 512;

/// The model named in a body; `None` where there is none to be seen, and any worker will do.
pub(super) fn model<'a>(headers: &HeaderMap, body: &'a [u8]) -> Option<Cow<'a, str>> {
    let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let essence = content_type.split(';').next()?.trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return peek(body).ok().map(|peek| peek.model);
    }
    if essence.eq_ignore_ascii_case("multipart/form-data") {
        return in_form(content_type, body).map(Cow::Borrowed);
    }
    None
}

/// The value of the part called `model` (RFC 7578).
fn in_form<'a>(content_type: &str, body: &'a [u8]) -> Option<&'a str> {
    let parameters = content_type.split(';').skip(1).map(str::trim);
    let boundary = parameters
        .filter_map(|parameter| parameter.split_once('='))
        .find(|(name, _)| name.eq_ignore_ascii_case("boundary"))?
        .1
        .trim_matches('"');
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

    fn model_of(content_type: &'static str, body: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        model(&headers, body.as_bytes()).map(Cow::into_owned)
    }

    #[test]
    fn the_model_is_found_in_json_and_in_forms() {
        assert_eq!(model_of("application/json; charset=utf-8", r#"{"model":"m"}"#).as_deref(), Some("m"));
        let form = "--x\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a.wav\"\r\n\r\nname=\"model\"\r\n\r\nno\
                    \r\n--x\r\ncontent-disposition: form-data; name=\"model\"\r\n\r\nwhisper\r\n--x--\r\n";
        assert_eq!(model_of("multipart/form-data; boundary=x", form).as_deref(), Some("whisper"));
        assert_eq!(model_of("multipart/form-data; Boundary=\"x\"", form).as_deref(), Some("whisper"));
    }

    #[test]
    fn what_is_not_understood_names_no_model() {
        for (content_type, body) in [
            ("application/json", "{"),
            ("application/json", "[]"),
            ("text/plain", "model=m"),
            ("multipart/form-data", "--x\r\n"),
            ("multipart/form-data; boundary=x", ""),
            (
                "multipart/form-data; boundary=x",
                "--x\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n",
            ),
            ("multipart/form-data; boundary=x", "--x\r\nA: b\r\n\r\nm\r\n--x--"),
        ] {
            assert_eq!(model_of(content_type, body), None, "{body}");
        }
    }
}
