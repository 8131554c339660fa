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

/// What a body is. Headers that two readers could read in two ways say nothing.
pub(super) fn content(headers: &HeaderMap) -> Content {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let Some(value) = values.next() else { return Content::Json };
    if values.next().is_some() {
        return Content::Other;
    }
    let mut parts = value.to_str().unwrap_or_default().split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    if essence.eq_ignore_ascii_case("application/json") {
        return Content::Json;
    }
    let mut boundaries = parts
        .filter_map(|parameter| parameter.split_once('='))
        .filter(|(name, _)| name.trim().to_ascii_lowercase().starts_with("boundary"));
    match (boundaries.next(), boundaries.next()) {
        (Some((name, boundary)), None)
            if essence.eq_ignore_ascii_case("multipart/form-data")
                && name.eq_ignore_ascii_case("boundary") =>
        {
            unquoted(boundary).map_or(Content::Other, |boundary| Content::Form(boundary.to_owned()))
        }
        _ => Content::Other,
    }
}

/// A parameter's value without its quotes; `None` if quotes or backslashes are anywhere else.
fn unquoted(value: &str) -> Option<&str> {
    let inner = match value.strip_prefix('"') {
        Some(rest) => rest.strip_suffix('"')?,
        None => value,
    };
    (!inner.is_empty() && !inner.contains(['"', '\\'])).then_some(inner)
}

/// The value of the one part called `model` (RFC 7578); `None` if there is none to be seen, or if
/// another reader could see another one: keys that are for some models only are held to this.
pub(super) fn model_in_form<'a>(boundary: &str, body: &'a [u8]) -> Option<&'a str> {
    let delimiter = format!("\r\n--{boundary}");
    // The first delimiter has no line before it.
    let mut rest = body.strip_prefix(&delimiter.as_bytes()[2..])?;
    let mut model = None;
    while let Some(part) = rest.strip_prefix(b"\r\n") {
        let head_end = memchr::memmem::find(part, b"\r\n\r\n")?;
        let content = &part[head_end + 4..];
        let end = memchr::memmem::find(content, delimiter.as_bytes())?;
        if part_name(&part[..head_end])?.eq_ignore_ascii_case("model") {
            let name = std::str::from_utf8(&content[..end]).ok()?;
            let first = model.replace(name).is_none();
            if !first || name.trim() != name || !(1..=MAX_NAME).contains(&name.len()) {
                return None;
            }
        }
        rest = &content[end + delimiter.len()..];
    }
    // Whatever comes after the end might be read on by somebody.
    if matches!(rest, b"--" | b"--\r\n") { model } else { None }
}

/// What a part is called; `None` if its head is not of the plain kind that clients write.
fn part_name(head: &[u8]) -> Option<&str> {
    let head = std::str::from_utf8(head).ok()?;
    let mut found = None;
    for line in head.split("\r\n") {
        let (name, value) = line.split_once(':')?;
        if line.contains(['\r', '\n', '\0']) || value.contains('\\') {
            return None;
        }
        match name.to_ascii_lowercase().as_str() {
            "content-disposition" if found.is_none() => found = Some(disposition_name(value)?),
            "content-type" | "content-length" => {}
            // The same header twice, a folded line, an encoding of the content.
            _ => return None,
        }
    }
    found
}

fn disposition_name(value: &str) -> Option<&str> {
    let mut parameters = value.split(';').map(str::trim);
    if parameters.next()? != "form-data" {
        return None;
    }
    let mut found = None;
    for parameter in parameters {
        let (name, value) = parameter.split_once('=')?;
        // A semicolon inside quotes leaves halves that are not quoted well.
        match name {
            "name" if found.is_none() => found = Some(unquoted(value)?),
            "filename" if value == "\"\"" => {}
            "filename" | "filename*" => drop(unquoted(value)?),
            _ => return None,
        }
    }
    found
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
        for other in [
            "text/plain",
            "multipart/form-data",
            "multipart/mixed; boundary=x",
            "",
            "multipart/form-data; boundary=x; boundary=y",
            "multipart/form-data; boundary=x; boundary*=y",
            "multipart/form-data; boundary=\"x;y\"",
            "multipart/form-data; boundary=\"x\\y\"",
            "multipart/form-data; boundary=",
        ] {
            assert_eq!(content_of(other), Content::Other, "{other}");
        }
        let mut twice = HeaderMap::new();
        twice.append(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        twice.append(CONTENT_TYPE, HeaderValue::from_static("multipart/form-data; boundary=x"));
        assert_eq!(content(&twice), Content::Other);
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

    #[test]
    fn a_form_that_two_readers_could_read_in_two_ways_names_no_model() {
        let part = |head: &str, content: &str| format!("--x\r\n{head}\r\n\r\n{content}\r\n");
        let model = |content: &str| part("Content-Disposition: form-data; name=\"model\"", content);
        let file = part(
            "Content-Disposition: form-data; name=\"file\"; filename=\"\"; filename*=utf-8''a\r\nContent-Type: audio/wav",
            "RIFF",
        );
        let good = format!("{file}{}--x--\r\n", model("m"));
        assert_eq!(model_in_form("x", good.as_bytes()), Some("m"));
        for other in [
            "Content-Disposition: form-data; name=\"model\"",
            "Content-Disposition: form-data; name=\"Model\"",
            "Content-Disposition: form-data; name*=utf-8''model",
            "Content-Disposition: form-data; name=\"x\"; name=\"model\"",
            "Content-Disposition: form-data; name=\"x\"; NAME=\"model\"",
            "Content-Disposition: form-data; filename=\"a;b\"; name=\"x\"",
            "Content-Disposition: form-data; name=\"mod\\el\"",
            "Content-Disposition: form-data;\r\n name=\"model\"",
            "Content-Disposition: form-data; name=\"x\"\r\nContent-Disposition: form-data; name=\"model\"",
            "Content-Disposition: form-data; name=\"x\"\r\nContent-Transfer-Encoding: base64",
            "Content-Disposition: form-data; name=\"x\"\nX: y",
            "Content-Disposition: attachment; name=\"x\"",
            "Content-Type: text/plain",
        ] {
            for body in [
                format!("{}{}--x--\r\n", model("m"), part(other, "n")),
                format!("{}{}--x--\r\n", part(other, "n"), model("m")),
            ] {
                assert_eq!(model_in_form("x", body.as_bytes()), None, "{body}");
            }
        }
        for end in ["", "--x", "--x \r\n--x--", "--x--\r\n--x\r\n", "--x-- "] {
            assert_eq!(model_in_form("x", format!("{}{end}", model("m")).as_bytes()), None, "{end}");
        }
        assert_eq!(model_in_form("x", format!("preamble\r\n{good}").as_bytes()), None);
        assert_eq!(model_in_form("x", format!("{}--x--", model(" m")).as_bytes()), None);
    }
}
