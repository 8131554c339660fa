//! Ports that stay free while their owner is dead.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::Mutex;

use rand::RngExt as _;

/// Below the kernel's ephemeral range: an outgoing connection of somebody else cannot take the
/// port of a killed replica before it is started again.
const RANGE: std::ops::Range<u16> = 11_000..32_000;

static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A loopback address that nobody listens on and that is given out only once.
pub fn free_address() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, free_ports(1)).into()
}

/// The first of so many ports in a row, all of them as [`free_address`]'s.
pub fn free_ports(many: u16) -> u16 {
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    loop {
        let first = rand::rng().random_range(RANGE);
        let mut all = first..first + many;
        if all.all(|port| !given.contains(&port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()) {
            given.extend(first..first + many);
            return first;
        }
    }
}
