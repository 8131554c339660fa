//! A worker's URL, taken apart once.

use std::fmt;

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};

/// Where a worker listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::http) struct Endpoint {
    /// Whether to speak TLS.
    pub(super) tls: bool,
    /// Name or address, an IPv6 address without its brackets.
    pub(super) host: String,
    /// 1 to 65535.
    pub(super) port: u16,
    /// `host:port` as the URL has it, for the Host header and `:authority`.
    pub(super) authority: Authority,
    /// Whether to speak HTTP/2 with prior knowledge (or by ALPN over TLS).
    pub(super) http2: bool,
}

/// Why a URL is no worker's address.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(in crate::http) enum EndpointError {
    /// Not a URL, or more than scheme, host and port.
    #[error("`url` must be http://host:port or https://host:port, with nothing behind it")]
    Form,
    /// Another scheme.
    #[error("`url` must start with http:// or https://")]
    Scheme,
    /// `user:password@`.
    #[error("`url` must not hold a user or password")]
    UserInfo,
    /// A port that cannot be.
    #[error("`url` has an invalid port")]
    Port,
}

impl Endpoint {
    /// Reads `http://host:port`; the port may be left out.
    pub(in crate::http) fn parse(url: &str, http2: bool) -> Result<Self, EndpointError> {
        let uri: Uri = url.parse().map_err(|_| EndpointError::Form)?;
        let tls = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => false,
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(_) => return Err(EndpointError::Scheme),
            None => return Err(EndpointError::Form),
        };
        if uri.path_and_query().map_or("/", PathAndQuery::as_str) != "/" || url.contains(['#', '?']) {
            return Err(EndpointError::Form);
        }
        let authority = uri.authority().ok_or(EndpointError::Form)?.clone();
        if authority.as_str().contains('@') {
            return Err(EndpointError::UserInfo);
        }
        let port = match authority.port_u16() {
            Some(0) => return Err(EndpointError::Port),
            Some(port) => port,
            None if authority.as_str() != authority.host() => return Err(EndpointError::Port),
            None if tls => 443,
            None => 80,
        };
        let host = authority.host();
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(EndpointError::Form);
        }
        let host = host.to_owned();
        Ok(Self { tls, host, port, authority, http2 })
    }

    /// Name or address, an IPv6 address without its brackets.
    pub(in crate::http) fn host(&self) -> &str {
        &self.host
    }

    /// 1 to 65535.
    pub(in crate::http) fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}", self.authority)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_and_port_are_taken_apart_and_anything_else_refused() {
        let parse = |url| Endpoint::parse(url, false);
        let plain = parse("http://a.example:8000").unwrap();
        assert_eq!((plain.host.as_str(), plain.port, plain.tls), ("a.example", 8000, false));
        let v6 = parse("https://[::1]").unwrap();
        assert_eq!((v6.host.as_str(), v6.port, v6.tls), ("::1", 443, true));
        assert_eq!(v6.to_string(), "https://[::1]");
        for (bad, why) in [
            ("a:80", EndpointError::Form),
            ("ftp://a", EndpointError::Scheme),
            ("http://u@a", EndpointError::UserInfo),
            ("http://u:p@a:1", EndpointError::UserInfo),
            ("http://a:0", EndpointError::Port),
            ("http://a:65536", EndpointError::Port),
            ("http://a:", EndpointError::Port),
            ("http://a/x", EndpointError::Form),
            ("http://a?x", EndpointError::Form),
            ("http://a#x", EndpointError::Form),
            ("http://", EndpointError::Form),
            ("http:///x", EndpointError::Form),
            ("", EndpointError::Form),
        ] {
            assert_eq!(parse(bad).unwrap_err(), why, "{bad}");
        }
    }
}
