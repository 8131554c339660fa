//! Which addresses a worker may have. Asked at registration and again, with the address just
//! resolved, at every connect: a name that later points elsewhere gains nothing.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use ipnet::IpNet;

/// Most addresses of one name that are looked at; a name with more has something wrong with it,
/// and each might cost a connect timeout.
const MAX_ADDRESSES: usize = 16;

/// The addresses of a name.
pub type Resolved = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Turns names into addresses; what they become is checked here, whoever says it.
pub trait Resolve: fmt::Debug + Send + Sync {
    /// The addresses of `host`, each with `port`.
    fn addresses(&self, host: &str, port: u16) -> Resolved;
}

/// The operating system's resolver.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn addresses(&self, host: &str, port: u16) -> Resolved {
        let host = host.to_owned();
        Box::pin(async move {
            let found = tokio::net::lookup_host((host.as_str(), port)).await?;
            Ok(found.take(MAX_ADDRESSES).collect())
        })
    }
}

/// The networks of `workers.allow`.
#[derive(Clone, Debug)]
pub struct Allowed {
    networks: Vec<IpNet>,
    resolver: Arc<dyn Resolve>,
}

/// Why an address or URL may not be used for a worker.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Forbidden {
    /// Multicast, broadcast, unspecified: no configuration allows them.
    #[error("{0} is never allowed for a worker (it is unspecified, broadcast or multicast)")]
    Never(IpAddr),
    /// Link-local or a cloud's metadata service: no network allows them, only the address itself.
    #[error(
        "{0} is link-local or a cloud's metadata service, which no network in workers.allow allows; \
         if a worker really is there, add exactly this address to workers.allow"
    )]
    Metadata(IpAddr),
    /// Not in the configured networks.
    #[error("{0} is outside workers.allow; add its network there if it is meant to be a worker")]
    Outside(IpAddr),
}

impl Default for Allowed {
    /// Loopback and the private networks of RFC 1918 and RFC 4193.
    fn default() -> Self {
        let private = ["127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"];
        Self::new(private.iter().filter_map(|net| net.parse().ok()).collect())
    }
}

impl Allowed {
    /// Allows these networks and nothing else.
    pub fn new(networks: Vec<IpNet>) -> Self {
        Self { networks, resolver: Arc::new(SystemResolver) }
    }

    /// Asks another resolver for the addresses of names.
    pub fn with_resolver(self, resolver: Arc<dyn Resolve>) -> Self {
        Self { resolver, ..self }
    }

    /// Checks one address. IPv4 in IPv6 clothing counts as IPv4, and as what it is dressed in.
    pub fn check(&self, address: IpAddr) -> Result<(), Forbidden> {
        let plain = embedded_v4(address).map_or(address, IpAddr::V4);
        for shape in [plain, address] {
            if is_nobody(shape) {
                return Err(Forbidden::Never(plain));
            }
            // A wide network is a convenience, and nobody who writes 0.0.0.0/0 means these; who
            // writes the address itself does.
            if is_sensitive(shape) && !self.lists_exactly(plain) {
                return Err(Forbidden::Metadata(plain));
            }
        }
        if self.networks.iter().any(|net| net.contains(&plain)) {
            return Ok(());
        }
        Err(Forbidden::Outside(plain))
    }

    fn lists_exactly(&self, address: IpAddr) -> bool {
        self.networks.iter().any(|net| net.prefix_len() == net.max_prefix_len() && net.addr() == address)
    }

    /// Resolves `host` and keeps what may be connected to. Fails with the first refusal when
    /// nothing is left.
    pub async fn resolve(&self, host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        let mut allowed = Vec::new();
        let mut refused = None;
        for address in self.resolver.addresses(bare, port).await? {
            match self.check(address.ip()) {
                Ok(()) => allowed.push(address),
                Err(why) => refused = refused.or(Some(why)),
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

/// The IPv4 address inside an IPv6 address of the kinds that a host, a router or a NAT on the
/// way may unwrap: mapped, compatible, translated, NAT64, 6to4, Teredo, ISATAP.
fn embedded_v4(address: IpAddr) -> Option<Ipv4Addr> {
    let IpAddr::V6(v6) = address else { return None };
    let s = v6.segments();
    let join = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    let last = join(s[6], s[7]);
    match s {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0, 0, 0, 0, 0xffff, 0, ..] => Some(last),
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => None,
        [0, 0, 0, 0, 0, 0, ..] | [0x64, 0xff9b, 0 | 1, ..] => Some(last),
        [0x2002, high, low, ..] => Some(join(high, low)),
        // Teredo writes the client's address with every bit turned over.
        [0x2001, 0, _, _, _, _, high, low] => Some(join(!high, !low)),
        [_, _, _, _, 0 | 0x200, 0x5efe, ..] => Some(last),
        _ => None,
    }
}

/// Addresses at which clouds hand out credentials, outside link-local networks: AWS over IPv6,
/// Alibaba, Oracle, Azure's host, and OpenStack over IPv6 (which is link-local, too).
const METADATA: [IpAddr; 5] = [
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe)),
];

/// No worker can have it: connecting there reaches this machine, everybody or nobody.
fn is_nobody(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0);
    address.is_unspecified() || address.is_multicast() || broadcast
}

/// A worker could have it, but a forged registration is likelier.
fn is_sensitive(address: IpAddr) -> bool {
    METADATA.contains(&address)
        || match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowing(networks: &[&str]) -> Allowed {
        Allowed::new(networks.iter().map(|net| net.parse().unwrap()).collect())
    }

    #[test]
    fn link_local_and_metadata_are_refused_even_when_everything_is_allowed() {
        let everything = allowing(&["0.0.0.0/0", "::/0"]);
        for never in [
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "::ffff:224.0.0.1",
            "64:ff9b::e000:1",
            "ff02::1",
            "255.255.255.255",
        ] {
            let address: IpAddr = never.parse().unwrap();
            assert!(matches!(everything.check(address), Err(Forbidden::Never(_))), "{never}");
        }
        for metadata in [
            "169.254.169.254",
            "169.254.0.1",
            "169.254.170.2",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
            "2001:0:4136:e378:8000:63bf:5601:5601",
            "2001:db8::200:5efe:a9fe:a9fe",
            "2001:db8::5efe:a9fe:a9fe",
            "fe80::1",
            "febf::1",
            "fe80::a9fe:a9fe",
            "fd00:ec2::254",
            "100.100.100.200",
            "::ffff:100.100.100.200",
            "192.0.0.192",
            "168.63.129.16",
        ] {
            let address: IpAddr = metadata.parse().unwrap();
            assert!(matches!(everything.check(address), Err(Forbidden::Metadata(_))), "{metadata}");
        }
        assert!(everything.check("8.8.8.8".parse().unwrap()).is_ok());
        assert!(everything.check("100.100.100.201".parse().unwrap()).is_ok());
    }

    #[test]
    fn an_address_that_is_listed_by_itself_is_allowed_unless_nobody_can_have_it() {
        for address in ["169.254.169.254", "100.100.100.200", "fe80::7", "fd00:ec2::254"] {
            let parsed: IpAddr = address.parse().unwrap();
            let bits = if parsed.is_ipv4() { 32 } else { 128 };
            assert!(allowing(&[&format!("{address}/{bits}")]).check(parsed).is_ok(), "{address}");
            // The network around it is not the address itself.
            let around = format!("{address}/{}", bits - 1);
            assert!(matches!(allowing(&[&around]).check(parsed), Err(Forbidden::Metadata(_))), "{around}");
        }
        for nobody in ["0.0.0.0/32", "255.255.255.255/32", "224.0.0.1/32", "::/128", "ff02::1/128"] {
            let address = nobody.split('/').next().unwrap().parse().unwrap();
            assert!(matches!(allowing(&[nobody]).check(address), Err(Forbidden::Never(_))), "{nobody}");
        }
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
        let only_ten = allowing(&["10.0.0.0/8"]);
        for odd in ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"] {
            let refusal = only_ten.resolve(odd, 80).await.unwrap_err();
            assert_eq!(refusal.kind(), io::ErrorKind::PermissionDenied, "{odd}: {refusal}");
        }
        assert_eq!(only_ten.resolve("10.0.0.1", 80).await.unwrap().len(), 1);
    }

    /// Says the same of every name.
    #[derive(Debug)]
    struct Always(&'static [&'static str]);

    impl Resolve for Always {
        fn addresses(&self, _: &str, port: u16) -> Resolved {
            let all = self.0.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).collect();
            Box::pin(std::future::ready(Ok(all)))
        }
    }

    #[tokio::test]
    async fn of_a_names_addresses_only_the_allowed_ones_are_connected_to() {
        let says =
            |all: &'static [&'static str]| allowing(&["10.0.0.0/8"]).with_resolver(Arc::new(Always(all)));
        let mixed = says(&["169.254.169.254", "10.0.0.1", "8.8.8.8", "::ffff:10.0.0.2"]);
        let kept = mixed.resolve("engines.example", 80).await.unwrap();
        assert_eq!(kept, ["10.0.0.1:80".parse().unwrap(), "[::ffff:10.0.0.2]:80".parse().unwrap()]);
        // The first refusal is told.
        let refusal = says(&["169.254.169.254", "8.8.8.8"]).resolve("m.example", 80).await.unwrap_err();
        assert_eq!(refusal.kind(), io::ErrorKind::PermissionDenied);
        assert!(refusal.to_string().contains("169.254.169.254"), "{refusal}");
        assert_eq!(says(&[]).resolve("x", 80).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
