//! Everline: an LLM-inference router cluster whose output streams outlive its replicas.
//!
//! This page is the map. One rule of direction: a pure core at the bottom, protocols above it,
//! processes on top; nothing names what lies above it. `docs/ARCHITECTURE.md` has the picture
//! and the invariants, `tests/structure.rs` checks them.
//!
//! **The core**, without clock, I/O or async:
//!
//! [`ids`]: the names things go by, as newtypes, so that a replica is never mistaken for a log
//! index.
//!
//! [`codec`]: bytes for the log, the disk and the peers, each with a version. The only module
//! that names bincode.
//!
//! [`kv`]: blocks of the KV cache: their hashes, and what engines say of them.
//!
//! [`state`]: the replicated state machines. Commands in, state and outcomes out, the same on
//! every replica: [`state::control`] is the registry, [`state::cache`] the loads and leases.
//!
//! [`tokens`]: from a request's body to the hashes of its prompt's blocks, as the engine would see
//! them. Pure but for its threads, and for engines that it may ask.
//!
//! [`splice`]: an engine's events to the client's, over all the engines that a stream outlives.
//!
//! [`disagg`]: requests whose prefill one engine does and whose decode another: what each is sent, and
//! what the first one's answer means for the second.
//!
//! [`ksana`]: KsanaLLM's wire: bodies as its reference router reads and writes them, and the framing of
//! its streams.
//!
//! [`routing`]: choosing a worker. Filters, then a policy, over a [`routing::view`] that is read
//! without a lock; [`routing::book`] takes note of what was chosen.
//!
//! [`telemetry`]: histograms without a lock, the process as the kernel sees it, and spans for a
//! collector. Names nothing of ours but [`tls`]; everybody who measures names it.
//!
//! **Consensus**:
//!
//! [`cluster`]: two Raft groups, their write-ahead log and checkpoints, the links between
//! replicas, the batching proposer, forming and joining. Everybody else knows it by
//! [`cluster::api::ControlPlane`]. The only module that names openraft or sled.
//!
//! **The edges**:
//!
//! [`tls`]: certificates from files that may change, mutual TLS between replicas, TLS on the
//! listeners, issuing certificates. The only cryptography is rustls with ring.
//!
//! [`naming`]: name services, which say what endpoints a name stands for: the configuration, Kubernetes or
//! Polaris.
//!
//! [`engines`]: what is known of inference engines: how to ask one about itself
//! ([`engines::probe`]), and how to be one ([`engines::sim`], a simulated vLLM).
//!
//! [`zmtp`]: as much of ZeroMQ's wire protocol as engines' event feeds need, on both sides of it.
//!
//! [`ingest`]: listening to engines. A task for each rank's feed of KV events, which asks again for
//! what it missed and hands on what is in order; what is in order [`kv::feed`] knows.
//!
//! [`relay`]: output streams between processes: who holds one, who has a copy, who goes on.
//!
//! [`http`]: the front: connections and their bounds, the proxy path, the node and admin planes,
//! health and metrics.
//!
//! [`replay`]: traces of requests, replayed against a cluster or in a simulation that routes with
//! [`routing`] itself and compares policies.
//!
//! [`admin_types`]: what the admin plane and the command line say to each other.
//!
//! [`config`]: the configuration, typed and documented, with the origin of every value. The only
//! module that reads the environment.
//!
//! **Processes**:
//!
//! [`serve`]: puts configuration, cluster and front together as a replica, and takes them apart
//! in order.
//!
//! [`agent`]: the node agent beside an engine: registers it, forwards its KV events, and holds its
//! streams, so that they outlive all replicas.
//!
//! [`balancer`]: the TCP balancer that the demo puts in front of its replicas.
//!
//! [`shim`]: a proxy beside a client, under which any client's streams outlive replicas.
//!
//! [`cli`]: the command line, one subcommand a file; [`cli::main`] is the program.

pub mod admin_types;
pub mod agent;
pub mod balancer;
pub mod cli;
pub mod cluster;
pub mod codec;
pub mod config;
pub mod disagg;
pub mod engines;
pub mod http;
pub mod ids;
pub mod ingest;
pub mod ksana;
pub mod kv;
pub mod naming;
pub mod relay;
pub mod replay;
pub mod routing;
pub mod serve;
pub mod shim;
pub mod splice;
pub mod state;
pub mod telemetry;
pub mod tls;
pub mod tokens;
pub mod zmtp;
