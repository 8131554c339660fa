//! Node ids that say what they are of, so that any replica can bring a node back from its heartbeat
//! alone, even after all state was lost.
//!
//! A node whose two addresses are IPv4 and whose numbers are small, which is nearly every one, gets
//! 32 lowercase hexadecimal digits, the shape that the reference router's ids have: both addresses, the
//! numbers and a checksum. [`pack`] has the places. Digit 12 is never `4`, which it always is in a random UUID, so
//! that an id which another router gave out is never taken for one of these. Any other node gets the
//! long form: a prefix and its description in hexadecimal.

use core::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::fmt::Write as _;

use super::{NodeSpec, Role};

/// The digit at which random UUIDs have their version.
const MARKER_AT: usize = 12;
/// Ours there.
const MARKER: u8 = 0xe;
/// What the long form begins with: no digit of a UUID.
const LONG: &str = "ev";

/// The id of a node. The cluster it belongs to is not in it: a replica knows one cluster only.
pub fn node_id(spec: &NodeSpec) -> String {
    pack(spec).unwrap_or_else(|| long(spec))
}

/// What an id describes, as a node of `cluster`; `None` for an id of other origin.
pub fn describe(id: &str, cluster: &str) -> Option<NodeSpec> {
    let spec = match id.strip_prefix(LONG) {
        Some(rest) => unlong(rest, cluster)?,
        None => unpack(id, cluster)?,
    };
    // Only what would be written so: nothing has two ids.
    (node_id(&spec) == id && spec.check().is_ok()).then_some(spec)
}

/// `a.b.c.d:port`, written as it is always written.
fn v4(text: &str) -> Option<SocketAddrV4> {
    let address: SocketAddrV4 = text.parse().ok()?;
    (address.to_string() == text).then_some(address)
}

/// Both addresses (96 bits), role 1, rank 7, world size 10, devices 4, checksum 6, and the marker 4.
fn pack(spec: &NodeSpec) -> Option<String> {
    let (inference, coordinator) = (v4(&spec.inference_addr)?, v4(&spec.coordinator_addr)?);
    let devices = spec.devices.checked_sub(1)?;
    if spec.rank >= 1 << 7 || spec.world_size >= 1 << 10 || devices >= 1 << 4 {
        return None;
    }
    let push = |bits: u128, value: u128, width: u32| bits << width | value;
    let mut bits = 0;
    for address in [inference, coordinator] {
        bits = push(bits, address.ip().to_bits().into(), 32);
        bits = push(bits, address.port().into(), 16);
    }
    bits = push(bits, u128::from(spec.role == Role::Decode), 1);
    bits = push(bits, spec.rank.into(), 7);
    bits = push(bits, spec.world_size.into(), 10);
    bits = push(bits, devices.into(), 4);
    bits = push(bits, checksum(bits), 6);
    // 124 bits so far: the marker goes between the 12 digits in front and the 19 behind.
    let front = bits >> (19 * 4);
    let behind = bits & ((1 << (19 * 4)) - 1);
    Some(format!("{front:012x}{MARKER:x}{behind:019x}"))
}

fn unpack(id: &str, cluster: &str) -> Option<NodeSpec> {
    let lower_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    if id.len() != 32 || !id.bytes().all(|byte| lower_hex(&byte)) {
        return None;
    }
    let digits = |text: &str| u128::from_str_radix(text, 16).ok();
    if digits(&id[MARKER_AT..=MARKER_AT])? != u128::from(MARKER) {
        return None;
    }
    let mut bits = digits(&id[..MARKER_AT])? << (19 * 4) | digits(&id[MARKER_AT + 1..])?;
    let mut pull = |width: u32| {
        let value = bits & ((1 << width) - 1);
        bits >>= width;
        value
    };
    // The checksum is found wrong when the id is written again.
    pull(6);
    let devices = pull(4) as u32 + 1;
    let world_size = pull(10) as u32;
    let rank = pull(7) as u32;
    let role = if pull(1) == 1 { Role::Decode } else { Role::Prefill };
    let mut address = || {
        let port = pull(16) as u16;
        let ip = Ipv4Addr::from_bits(pull(32) as u32);
        SocketAddrV4::new(ip, port).to_string()
    };
    let coordinator_addr = address();
    let inference_addr = address();
    let cluster = cluster.to_owned();
    Some(NodeSpec { cluster, inference_addr, coordinator_addr, role, rank, world_size, devices })
}

fn checksum(bits: u128) -> u128 {
    u128::from(xxhash_rust::xxh3::xxh3_64(&bits.to_be_bytes()) & 0x3f)
}

/// Role, numbers and addresses as text, with a checksum, in hexadecimal.
fn long(spec: &NodeSpec) -> String {
    let role = if spec.role == Role::Decode { 'd' } else { 'p' };
    let text = format!(
        "{role},{},{},{},{},{}",
        spec.rank, spec.world_size, spec.devices, spec.coordinator_addr, spec.inference_addr
    );
    let sum = xxhash_rust::xxh3::xxh3_64(text.as_bytes()) as u32;
    let mut id = format!("{LONG}{sum:08x}");
    for byte in text.bytes() {
        let _ = write!(id, "{byte:02x}");
    }
    id
}

fn unlong(digits: &str, cluster: &str) -> Option<NodeSpec> {
    let text = digits.get(8..)?;
    if text.len() % 2 != 0 || text.len() > 4096 || !text.is_ascii() {
        return None;
    }
    let bytes: Option<Vec<u8>> =
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect();
    let text = String::from_utf8(bytes?).ok()?;
    let mut parts = text.splitn(6, ',');
    let role = match parts.next()? {
        "d" => Role::Decode,
        "p" => Role::Prefill,
        _ => return None,
    };
    let rank = parts.next()?.parse().ok()?;
    let world_size = parts.next()?.parse().ok()?;
    let devices = parts.next()?.parse().ok()?;
    let coordinator_addr = parts.next()?.to_owned();
    // As registration has it: an address that names a host.
    let host = coordinator_addr.rsplit_once(':')?.0;
    host.split('%').next()?.parse::<IpAddr>().ok()?;
    let inference_addr = parts.next()?.to_owned();
    let cluster = cluster.to_owned();
    Some(NodeSpec { cluster, inference_addr, coordinator_addr, role, rank, world_size, devices })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(inference: &str, coordinator: &str, numbers: (u32, u32, u32)) -> NodeSpec {
        NodeSpec {
            cluster: "c".into(),
            inference_addr: inference.into(),
            coordinator_addr: coordinator.into(),
            role: Role::Decode,
            rank: numbers.0,
            world_size: numbers.1,
            devices: numbers.2,
        }
    }

    #[test]
    fn an_ordinary_node_has_an_id_that_looks_like_the_reference_s() {
        let node = spec("10.1.2.3:8088", "10.1.2.3:20000", (1, 4, 2));
        let id = node_id(&node);
        assert!(id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase()));
        assert_eq!(describe(&id, "c"), Some(node));
    }

    #[test]
    fn whatever_does_not_fit_is_described_at_length() {
        for (inference, coordinator, numbers) in [
            ("host.example:80", "10.0.0.1:1", (0, 1, 1)),
            ("http://h/x:abc", "127.0.0.1:1", (0, 1, 1)),
            ("127.0.0.1:5", "::1:99", (0, 1, 1)),
            ("127.0.0.1:5", "127.0.0.1:8_0", (0, 1, 1)),
            ("127.0.0.1:5", "127.0.0.1:80", (200, 5000, 17)),
            ("a,b:1", "127.0.0.1:80", (0, 1, 1)),
        ] {
            let node = spec(inference, coordinator, numbers);
            let id = node_id(&node);
            assert!(id.len() != 32 && id.bytes().all(|b| b.is_ascii_alphanumeric()), "{id}");
            assert_eq!(describe(&id, "c"), Some(node));
        }
    }

    #[test]
    fn ids_of_other_origin_describe_nothing() {
        let good = node_id(&spec("10.1.2.3:8088", "10.1.2.3:20000", (1, 4, 2)));
        let mut changed = good.clone().into_bytes();
        changed[31] = if changed[31] == b'0' { b'1' } else { b'0' };
        let changed = String::from_utf8(changed).unwrap();
        for id in
            ["", "nope", "my-node-1", &good[..31], &good.to_uppercase(), &changed, "ev", "ev00000000", "evé"]
        {
            assert_eq!(describe(id, "c"), None, "{id}");
        }
    }

    proptest! {
        #[test]
        fn every_node_is_found_in_its_id(
            ips: (u32, u32), ports: (u16, u16), decode: bool,
            rank in 0_u32..300, world_size in 1_u32..3000, devices in 1_u32..40,
        ) {
            let address = |ip: u32, port| SocketAddrV4::new(Ipv4Addr::from_bits(ip), port).to_string();
            let node = NodeSpec {
                role: if decode { Role::Decode } else { Role::Prefill },
                ..spec(&address(ips.0, ports.0), &address(ips.1, ports.1), (rank, world_size, devices))
            };
            prop_assume!(node.check().is_ok());
            prop_assert_eq!(describe(&node_id(&node), "c"), Some(node));
        }

        #[test]
        fn a_random_uuid_describes_nothing(random: u128) {
            let version = random & !(0xf << 76) | 0x4 << 76;
            prop_assert_eq!(describe(&format!("{version:032x}"), "c"), None);
        }

        #[test]
        fn any_text_is_read_without_harm(text: String) {
            prop_assert_eq!(describe(&text, "c"), None);
            describe(&format!("ev{text}"), "c");
        }
    }
}
