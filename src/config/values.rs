//! Values with a form of their own: founding members, token digests, policies, log formats.

pub use crate::routing::book::Reserve;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::{Digest as _, Sha256};

/// A founding member, written `name=host:port`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerSeed {
    /// The replica's name.
    pub name: String,
    /// `host:port` of its peer listener.
    pub address: String,
}

impl FromStr for PeerSeed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} must be name=host:port, such as r1=10.0.0.1:8082"))?;
        check_name(name)?;
        check_host_port(address)?;
        Ok(Self { name: name.to_owned(), address: address.to_owned() })
    }
}

impl fmt::Display for PeerSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.address)
    }
}

/// Checks a replica's name.
pub fn check_name(name: &str) -> Result<(), String> {
    let fits = (1..=63).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if fits {
        Ok(())
    } else {
        Err(format!("replica name {name:?} must be 1 to 63 letters, digits, - _ or ."))
    }
}

/// Checks the form `host:port`; IPv6 addresses in brackets.
pub fn check_host_port(text: &str) -> Result<(), String> {
    let fits = text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let host_fits = !host.is_empty()
            && (bracketed || !host.contains(':'))
            && !host.contains(['/', '@', ' ', '?', '#', '=']);
        host_fits && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if fits { Ok(()) } else { Err(format!("{text:?} must be host:port with a port from 1 to 65535")) }
}

impl Serialize for PeerSeed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerSeed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// SHA-256 of a token; the token itself is never kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenDigest(pub [u8; 32]);

impl TokenDigest {
    /// The digest of a token in clear text.
    pub fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }
}

impl fmt::Display for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenDigest({self})")
    }
}

impl FromStr for TokenDigest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "a token digest must be 64 hexadecimal digits (printf %s TOKEN | sha256sum)".to_owned();
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Self(bytes))
    }
}

impl Serialize for TokenDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Where output streams are generated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// At another replica than the client's.
    #[default]
    Peer,
    /// At the same.
    Local,
}

impl Durability {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["peer", "local"];
}

/// How KsanaLLM's router is stood in for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KsanaCompat {
    /// Without its faults.
    #[default]
    Fixed,
    /// With them.
    Strict,
}

impl KsanaCompat {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["fixed", "strict"];
}

/// What becomes of streams with penalties.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Penalties {
    /// They are continued.
    #[default]
    Continue,
    /// They are not.
    Fail,
}

impl Penalties {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["continue", "fail"];
}

/// How a worker is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// The least of what waits, what is not cached and what runs.
    #[default]
    KvCost,
    /// The longest cached prefix while balanced, the shortest queue otherwise.
    CacheAware,
    /// Equal beginnings to the same worker, within a bound on its load.
    PrefixHash,
    /// Equal sessions to the same worker.
    ConsistentHash,
    /// The least load per weight, cluster-wide.
    LeastLoaded,
    /// The less loaded of two chosen at random.
    PowerOfTwo,
    /// One after the other.
    RoundRobin,
    /// Any, by weight.
    Random,
}

impl Policy {
    /// Their names in the file.
    pub const NAMES: &[&str] = &crate::routing::policy::POLICY_NAMES;

    /// Its name in the file, and as [`crate::routing::policy`] knows it.
    pub fn name(self) -> &'static str {
        match self {
            Policy::KvCost => "kv_cost",
            Policy::CacheAware => "cache_aware",
            Policy::PrefixHash => "prefix_hash",
            Policy::ConsistentHash => "consistent_hash",
            Policy::LeastLoaded => "least_loaded",
            Policy::PowerOfTwo => "power_of_two",
            Policy::RoundRobin => "round_robin",
            Policy::Random => "random",
        }
    }
}

/// Form of log lines.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Pretty on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["auto", "pretty", "json"];
}

/// Which requests are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// Every one.
    All,
    /// Those that did not end well, and slow ones.
    #[default]
    Errors,
    /// None.
    Off,
}

impl AccessLog {
    /// Their names in the file.
    pub const NAMES: &[&str] = &["all", "errors", "off"];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_name_and_an_address() {
        assert_eq!("r1=[::1]:80".parse::<PeerSeed>().map(|p| p.address), Ok("[::1]:80".to_owned()));
        for wrong in ["r1", "=a:1", "r1=a", "r1=a:0", "r1=::1:80", "r1=http://a:1", "r 1=a:1"] {
            assert!(wrong.parse::<PeerSeed>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_digest_survives_the_way_through_text() {
        let digest = TokenDigest::of("secret");
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert!("zz".repeat(32).parse::<TokenDigest>().is_err());
        assert!("+1".repeat(32).parse::<TokenDigest>().is_err(), "from_str_radix alone would accept a sign");
    }
}
