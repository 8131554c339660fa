//! Strictness about heads that hyper leaves to its user: exactly one valid Host, one length.

use http::header::HOST;
use http::uri::Authority;
use http::{Request, Version};

use super::errors::{ApiError, Code};
use super::head::Verdict;

/// Refuses a head that two parsers could read in two ways. The connection is closed after.
pub(super) fn check_head<B>(request: &Request<B>, verdict: Verdict) -> Result<(), ApiError> {
    if verdict.two_lengths {
        let text = "Content-Length and Transfer-Encoding must not be sent together; send one of them";
        return Err(ApiError::new(Code::AmbiguousFraming, text).close());
    }
    if verdict.bare_line_feed {
        let text = "lines of a head must end with CR LF, at least one ends with a bare line feed";
        return Err(ApiError::new(Code::AmbiguousFraming, text).close());
    }
    check_host(request).map_err(|text| ApiError::new(Code::InvalidHost, text).close())
}

fn check_host<B>(request: &Request<B>) -> Result<(), &'static str> {
    let target = request.uri().authority();
    if target.is_some_and(|t| t.as_str().contains('@')) {
        return Err("the request target must not hold user information");
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    let Some(host) = hosts.next() else {
        // HTTP/1.0 knows no Host; h2 and h3 have `:authority`. Health checks of load balancers
        // use the former.
        let excused = request.version() <= Version::HTTP_10 || target.is_some();
        return if excused { Ok(()) } else { Err("exactly one Host header is required, there is none") };
    };
    if hosts.next().is_some() {
        return Err("exactly one Host header is required, there are several");
    }
    let text = host.to_str().map_err(|_| "the Host header is not visible ASCII")?;
    let host: Authority = text.parse().map_err(|_| "the Host header is not a valid host:port")?;
    if text.contains('@') || host.host().is_empty() {
        return Err("the Host header is not a valid host:port");
    }
    if text.rsplit_once(':').is_some_and(|(_, port)| !port.ends_with(']') && port.parse::<u16>().is_err()) {
        return Err("the Host header has an invalid port");
    }
    match target {
        Some(target) if !same_authority(target, &host) => {
            Err("the Host header differs from the host of the request target")
        }
        _ => Ok(()),
    }
}

fn same_authority(a: &Authority, b: &Authority) -> bool {
    let port = |authority: &Authority| authority.port_u16().unwrap_or(80);
    a.host().eq_ignore_ascii_case(b.host()) && port(a) == port(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uri: &str, hosts: &[&str]) -> bool {
        let mut request = Request::builder().uri(uri);
        for host in hosts {
            request = request.header(HOST, *host);
        }
        check_head(&request.body(()).unwrap(), Verdict::default()).is_ok()
    }

    #[test]
    fn one_valid_host_and_no_other() {
        for good in ["a", "a:80", "127.0.0.1:8000", "[::1]", "[::1]:8000", "A.example"] {
            assert!(check("/", &[good]), "{good}");
        }
        for bad in ["", "foo?x=/y#", "a/b", "a b", "u@a", "a:99999", "a:x", "a, b", ":80"] {
            assert!(!check("/", &[bad]), "{bad}");
        }
        assert!(!check("/", &[]));
        assert!(!check("/", &["a", "a"]));
    }

    #[test]
    fn an_absolute_target_must_agree_with_the_host() {
        assert!(check("http://a:8000/x", &["A:8000"]));
        assert!(check("http://a/x", &["a:80"]));
        assert!(!check("http://a/x", &["b"]));
        assert!(!check("http://a:1/x", &["a:2"]));
        assert!(!check("http://u@a/x", &["a"]));
    }
}
