//! Prefill on one engine and decode on another: what vLLM, SGLang and KsanaLLM do for it, between simulated engines.
//!
//! [`options`] (which protocol), [`nixl`] and [`mooncake`] (vLLM: what the router is told, and how blocks are read or given), `rooms` (where
//! SGLang's and KsanaLLM's engines meet), [`bootstrap`] (SGLang's server for that), `side` (the socket between
//! engines), [`desk`] (what runs beside an engine's task for it). What waits and what is kept is the scheduler's
//! ([`Handover`](super::scheduler::Handover)).
//!
//! KV travels between processes as what it is worth, a number for each block, over real sockets.

pub mod bootstrap;
pub(super) mod call;
pub mod desk;
pub mod mooncake;
pub mod nixl;
pub mod options;
mod rooms;
pub(super) mod side;

use std::time::Duration;

use parking_lot::RwLock;
use serde::Serialize;
use std::sync::Arc;

pub use desk::Desk;
pub use options::{PdArgs, Protocol, Role};

/// Who moves the blocks between vLLM's engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The decode engine reads them.
    Pull,
    /// The prefill engine writes them, once the decode engine has said where.
    Push,
}

/// Where the KV of a prompt is.
#[derive(Debug)]
pub enum Source {
    /// Kept by a vLLM engine.
    Nixl(nixl::Remote),
    /// With a vLLM engine that writes it here.
    Pushed(nixl::Pusher),
    /// With a vLLM engine that was told the same transfer, by Mooncake's connector.
    Mooncake(mooncake::Transfer),
    /// With an SGLang engine that was told the same room.
    Room {
        /// That engine's bootstrap server.
        bootstrap: String,
        /// The room.
        room: u64,
        /// The request's id, for messages.
        rid: String,
    },
    /// With a KsanaLLM engine that was told the same number.
    Comm {
        /// The group that both are in, by its key.
        group: String,
        /// The number.
        id: i32,
    },
}

/// The name that an engine process goes by, another one with each life.
#[derive(Clone, Debug)]
pub struct Identity(Arc<RwLock<String>>);

impl Identity {
    /// A new one.
    pub fn new() -> Self {
        Self(Arc::new(RwLock::new(uuid())))
    }

    /// What it is now.
    pub fn get(&self) -> String {
        self.0.read().clone()
    }

    fn change(&self) {
        *self.0.write() = uuid();
    }
}

impl Default for Identity {
    fn default() -> Self {
        Self::new()
    }
}

/// Who keeps blocks for others, and for how long.
#[derive(Debug)]
pub struct Lender {
    /// The engine's name.
    pub identity: Identity,
    /// Where its side channel is.
    pub host: String,
    /// Where its side channel is.
    pub port: u16,
    /// How long blocks are kept unless somebody says that they are still wanted.
    pub lease: Duration,
}

impl Lender {
    /// What the router is told of blocks that are kept, for the decode engine.
    pub fn params(&self, mode: Mode, id: &str, blocks: &[u32], computed: usize, cached: usize) -> Told {
        Told {
            do_remote_prefill: true,
            do_remote_decode: false,
            // vLLM's first block is one that nobody gets.
            remote_block_ids: [blocks.iter().map(|block| block + 1).collect()],
            remote_engine_id: self.identity.get(),
            remote_request_id: id.to_owned(),
            remote_host: self.host.clone(),
            remote_port: self.port,
            tp_size: 1,
            dcp_size: (mode == Mode::Pull).then_some(1),
            pp_size: 1,
            remote_num_tokens: computed,
            remote_blocks_expiry_time: (mode == Mode::Pull).then_some(()),
            transfer_mode: mode,
            remote_prefill_cached_tokens: cached,
        }
    }

    /// The engine process begins anew, under another name.
    pub fn begin_anew(&mut self) {
        self.identity.change();
    }
}

/// vLLM's `kv_transfer_params` of a prompt that was computed, in its order; the router passes them on as they are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Told {
    do_remote_prefill: bool,
    do_remote_decode: bool,
    remote_block_ids: [Vec<u32>; 1],
    remote_engine_id: String,
    remote_request_id: String,
    remote_host: String,
    remote_port: u16,
    tp_size: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    dcp_size: Option<u32>,
    pp_size: u32,
    remote_num_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    remote_blocks_expiry_time: Option<()>,
    transfer_mode: Mode,
    remote_prefill_cached_tokens: usize,
}

/// A random UUID, version 4.
fn uuid() -> String {
    let bits = rand::random::<u128>() & !(0xf << 76) | 4 << 76;
    let bits = bits & !(0b11 << 62) | 0b10 << 62;
    let hex = format!("{bits:032x}");
    [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_of_engines_are_uuids() {
        let uuid = super::uuid();
        let lengths: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12]);
        assert_eq!(uuid.as_bytes()[14], b'4');
        assert!(matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{uuid}");
    }
}
