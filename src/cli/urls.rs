//! Addresses on the command line: read at once, so that a mistake is told as one and not as a place
//! that nobody answers at.

use http::uri::PathAndQuery;

use crate::config::check_host_port;
use crate::shim::Address;
use crate::zmtp::Endpoint;

/// `http://host:port`, perhaps with a path that requests' paths are put behind; `http://` may be left
/// out where a port is named. Without a slash at its end.
pub(super) fn base(text: &str) -> Result<String, String> {
    let after = text.find("://").map_or(0, |at| at + 3);
    let end = text[after..].find('/').map_or(text.len(), |at| after + at);
    let (place, path) = text.split_at(end);
    let path = path.trim_end_matches('/');
    let is_path = path.is_empty() || path.parse::<PathAndQuery>().is_ok_and(|path| path.query().is_none());
    match place.parse::<Address>() {
        Ok(address) if is_path => Ok(format!("{address}{path}")),
        _ => Err("it is no http:// or https:// address; write it like http://127.0.0.1:8080".to_owned()),
    }
}

/// An engine's `http://host:port`, with nothing behind it.
pub(super) fn engine(text: &str) -> Result<String, String> {
    match text.trim_end_matches('/').parse::<Address>() {
        Ok(address) if text.contains("://") => Ok(address.to_string()),
        _ => {
            Err("it is no address of an engine; write it like http://127.0.0.1:8000, without a path"
                .to_owned())
        }
    }
}

/// `host:port`.
pub(super) fn host_port(text: &str) -> Result<String, String> {
    check_host_port(text).map(|()| text.to_owned())
}

/// `tcp://host:port` or `ipc://path`.
pub(super) fn events(text: &str) -> Result<String, String> {
    Endpoint::parse(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_address_is_told_so_and_what_is_one_is_kept() {
        for (text, kept) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("router:8080", "http://router:8080"),
            ("http://router", "http://router"),
            ("https://[::1]:8443/", "https://[::1]:8443"),
            ("http://gate.example/everline/", "http://gate.example/everline"),
        ] {
            assert_eq!(base(text).as_deref(), Ok(kept));
        }
        let nonsense = [
            "",
            "nonsense",
            "http://",
            "http://:80",
            "router:",
            "router:0",
            "router:99999",
            "router:x",
            "http://router:99999",
            "ftp://router:21",
            "http://u@router:80",
            "http://a b:80",
            "http://a,b:80",
            "https:/router:80",
            "http://router:80/?x=1",
            "router:80?x",
            "http://[::1",
            "http://router:80#x",
        ];
        for text in nonsense {
            assert!(base(text).is_err_and(|why| why.contains("http://127.0.0.1:8080")), "{text}");
        }
        assert_eq!(engine("http://h:1/").as_deref(), Ok("http://h:1"));
        for text in ["h:1", "nonsense", "http://h:1/v1", "http://h:99999", "tcp://h:1"] {
            assert!(engine(text).is_err_and(|why| why.contains("http://127.0.0.1:8000")), "{text}");
        }
        assert!(host_port("h:1").is_ok() && host_port("h").is_err() && host_port("http://h:1").is_err());
        assert!(events("tcp://h:1").is_ok() && events("ipc:///x").is_ok() && events("h:1").is_err());
    }
}
