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
    let mut given = GIVEN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    loop {
        let port = rand::rng().random_range(RANGE);
        let address = (Ipv4Addr::LOCALHOST, port).into();
        if !given.contains(&port) && TcpListener::bind(address).is_ok() {
            given.insert(port);
            return address;
        }
    }
}
