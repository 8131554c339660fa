//! Which addresses a worker may have. Asked at registration and again, with the address just
//! resolved, at every connect: a name that later points elsewhere gains nothing.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

/// The networks of `workers.allow`.
#[derive(Clone, Debug)]
pub struct Allowed {
    networks: Vec<IpNet>,
}

/// Why an address or URL may not be used for a worker.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Forbidden {
    /// Link-local, cloud metadata, multicast and their like; no configuration allows them.
    #[error("{0} is never allowed for a worker (link-local, metadata, multicast or unspecified)")]
    Never(IpAddr),
    /// Not in the configured networks.
    #[error("{0} is outside workers.allow; add its network there if it is meant to be a worker")]
    Outside(IpAddr),
}

impl Default for Allowed {
    /// Loopback and the private networks of RFC 1918 and RFC 4193.
    fn default() -> Self {
        let private = ["127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"];
        Self { networks: private.iter().filter_map(|net| net.parse().ok()).collect() }
    }
}

impl Allowed {
    /// Allows these networks and nothing else.
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self { networks }
    }

    /// Checks one address. IPv4 in IPv6 clothing counts as IPv4.
    pub fn check(&self, address: IpAddr) -> Result<(), Forbidden> {
        let plain = embedded_v4(address).map_or(address, IpAddr::V4);
        if is_never_allowed(plain) || is_never_allowed(address) {
            return Err(Forbidden::Never(plain));
        }
        if self.networks.iter().any(|net| net.contains(&plain)) {
            return Ok(());
        }
        Err(Forbidden::Outside(plain))
    }

    /// Resolves `host` and keeps what may be connected to. Fails with the first refusal when
    /// nothing is left.
    pub async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let mut allowed = Vec::new();
        let mut refused = None;
        for address in tokio::net::lookup_host((bare, port)).await? {
            match self.check(address.ip()) {
                Ok(()) => allowed.push(address),
                Err(why) => refused = Some(why),
            }
        }
        match refused {
            Some(why) if allowed.is_empty() => Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
            _ if allowed.is_empty() => {
                Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"))
            }
            _ => Ok(allowed),
        }
    }
}

/// The IPv4 address inside a mapped, compatible, NAT64 or 6to4 IPv6 address.
fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return None };
    let s = v6.segments();
    let last = Ipv4Addr::from((u32::from(s[6]) << 16) | u32::from(s[7]));
    match s {
        [0, 0, 0, 0, 0, 0xffff, ..] => Some(last),
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => Some(last),
        [0x2002, high, low, ..] => Some(Ipv4Addr::from((u32::from(high) << 16) | u32::from(low))),
        _ => None,
    }
}

/// Metadata services that do not lie in a link-local network: AWS over IPv6, Alibaba, Oracle.
const METADATA: [IpAddr; 3] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

fn is_never_allowed(address: IpAddr) -> bool {
    if METADATA.contains(&address) || address.is_unspecified() || address.is_multicast() {
        return true;
    }
    match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast() || v4.octets()[0] == 0,
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn link_local_and_metadata_are_refused_even_when_everything_is_allowed() {
        let everything = Allowed::new(vec!["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()]);
        for never in [
            "169.254.169.254",
            "169.254.0.1",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "fe80::1",
            "febf::1",
            "fd00:ec2::254",
            "100.100.100.200",
            "::ffff:100.100.100.200",
            "192.0.0.192",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            let address: IpAddr = never.parse().unwrap();
            assert!(matches!(everything.check(address), Err(Forbidden::Never(_))), "{never}");
        }
        assert!(everything.check("8.8.8.8".parse().unwrap()).is_ok());
    }

    #[test]
    fn by_default_loopback_and_private_networks_are_allowed() {
        let allowed = Allowed::default();
        for good in
            ["127.0.0.1", "10.1.2.3", "172.31.0.1", "192.168.1.1", "::1", "fd12::1", "::ffff:10.0.0.1"]
        {
            assert!(allowed.check(good.parse().unwrap()).is_ok(), "{good}");
        }
        for bad in ["8.8.8.8", "172.32.0.1", "2001:db8::1", "::ffff:8.8.8.8"] {
            assert!(matches!(allowed.check(bad.parse().unwrap()), Err(Forbidden::Outside(_))), "{bad}");
        }
    }

    #[tokio::test]
    async fn odd_spellings_resolve_to_what_they_are() {
        let only_ten = Allowed::new(vec!["10.0.0.0/8".parse().unwrap()]);
        for odd in ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"] {
            let refusal = only_ten.resolve(odd, 80).await.unwrap_err();
            assert_ne!(refusal.to_string(), "", "{odd}");
        }
        assert_eq!(only_ten.resolve("10.0.0.1", 80).await.unwrap().len(), 1);
    }
}
