//! The shape of the configuration: one declaration gives the types, the defaults and the
//! reference documentation.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::access::{KeyEntry, NodeTokenEntry};
use super::keys::{KeyDoc, Kind, SectionDoc};
use super::models::{ModelEntry, PromptMode};
use super::names::{DiscoverEntry, NameEntry, NameProvider};
use super::values::{
    AccessLog, Durability, KsanaCompat, LogFormat, PeerSeed, Penalties, Policy, Reserve, TokenDigest,
};
use crate::admin_types::RegisterRequest;
use crate::tls::listener::ListenerFiles;
use crate::tls::peer::PeerFiles;

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn loopback_networks() -> Vec<IpNet> {
    let v4 = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
    let v6 = ipnet::Ipv6Net::new_assert(std::net::Ipv6Addr::LOCALHOST, 128);
    vec![v4.into(), v6.into()]
}

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;
const HOUR_MS: u64 = 3_600_000;

/// Declares the sections: each becomes a struct with serde, `Default` and an entry in
/// [`SECTIONS`]. The first text of a field is its documentation everywhere.
macro_rules! sections {
    ($(
        $(#[doc = $about:literal])+
        $section:literal => $Name:ident {
            $( $(#[doc = $doc:literal])+ $field:ident: $ty:ty = $default:expr, $kind:expr; )*
        }
    )*) => {
        $(
            $(#[doc = $about])+
            #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
            #[serde(deny_unknown_fields, default)]
            pub struct $Name {
                $(
                    $(#[doc = $doc])+
                    #[doc = ""]
                    #[doc = concat!("Default: `", stringify!($default), "`. Takes: `", stringify!($kind), "`.")]
                    pub $field: $ty,
                )*
            }

            impl Default for $Name {
                fn default() -> Self {
                    Self { $( $field: $default, )* }
                }
            }
        )*

        /// Every section with its keys, in the order they are documented in.
        pub static SECTIONS: &[SectionDoc] = &[ $(
            SectionDoc {
                name: $section,
                doc: concat!($($about),+),
                keys: &[ $(
                    KeyDoc { section: $section, name: stringify!($field), doc: concat!($($doc),+), kind: $kind },
                )* ],
            },
        )* ];
    };
}

sections! {
    /// Who this replica is and where it keeps its data.
    "replica" => ReplicaConfig {
        /// Name of this replica: unique in the cluster, 1 to 63 letters, digits, `-`, `_` or `.`.
        name: String = "r1".to_owned(), Kind::Text;
        /// Folder for the log, checkpoints and identity. One replica only; it is locked while in use.
        data_dir: PathBuf = PathBuf::from("./everline-data"), Kind::Path;
    }

    /// The client listener: OpenAI routes, node registration, streams.
    "http" => HttpConfig {
        /// Address of the client listener.
        listen: SocketAddr = loopback(8080), Kind::Address;
        /// `host:port` under which clients and other replicas reach it, where that is not `listen`.
        advertise: Option<String> = None, Kind::HostPort;
        /// Largest request body.
        max_body_bytes: u64 = 32 * MIB, Kind::int("bytes", KIB, 4 * GIB);
        /// A request's head must be complete within this time after its first byte.
        header_timeout_ms: u64 = 10_000, Kind::int("ms", 1, HOUR_MS);
        /// A new connection must send its first byte within this time.
        first_byte_timeout_ms: u64 = 10_000, Kind::int("ms", 1, HOUR_MS);
        /// A kept-alive connection is closed after this time without a request.
        idle_timeout_ms: u64 = 75_000, Kind::int("ms", 1, 24 * HOUR_MS);
        /// Most header fields of one request.
        max_headers: u32 = 64, Kind::int("fields", 8, 1024);
        /// Largest request head.
        max_header_bytes: u32 = 65_536, Kind::int("bytes", 8 * KIB, 16 * MIB);
        /// Most connections at once; further ones are answered 503 and closed.
        max_connections: u32 = 10_000, Kind::int("connections", 1, 1_000_000);
        /// Most connections at once from one address, or from one IPv6 network of 64 bits; 0 means
        /// no limit.
        max_connections_per_ip: u32 = 0, Kind::int("connections", 0, 1_000_000);
        /// File of `[[key]]` entries, read again within a second when it changes: to give and revoke keys without a restart. Replace it in one step (write another, `mv` it over). While it is broken or away the last good keys stay in force. With this set a key is needed even while the file names none.
        keys_file: Option<PathBuf> = None, Kind::Path;
        /// Certificate of the client listener (PEM, intermediate ones after it); with `tls_key` it speaks TLS. Read again when it changes.
        tls_cert: Option<PathBuf> = None, Kind::Path;
        /// Private key of `tls_cert` (PEM), readable by its owner only.
        tls_key: Option<PathBuf> = None, Kind::Path;
        /// A TLS handshake on the client or admin listener must be done within this time, which counts towards `first_byte_timeout_ms`.
        tls_handshake_timeout_ms: u64 = 10_000, Kind::int("ms", 1, HOUR_MS);
        /// After SIGTERM running requests may take this long before they are cut.
        shutdown_grace_ms: u64 = 30_000, Kind::int("ms", 0, HOUR_MS);
        /// After SIGTERM `/readyz` says 503 for this long before the listener closes, so that a load balancer stops sending requests first: a little more than its check interval times its failures. SIGINT does not wait.
        drain_settle_ms: u64 = 5_000, Kind::int("ms", 0, HOUR_MS);
        /// Threads that serve connections, each with its own connections to workers; 0 means as many as there are processors.
        threads: u32 = 0, Kind::int("threads", 0, 1024);
        /// While requests and answers follow each other on a thread within this time, it looks for the next instead of sleeping, which spares each of them the 10 to 30 µs of waking a processor; 0 always sleeps. At the pace of a model's answers it sleeps in any case.
        poll_us: u32 = 60, Kind::int("µs", 0, 1_000);
        /// A request body must be complete within this time ...
        body_timeout_ms: u64 = 60_000, Kind::int("ms", 1, HOUR_MS);
        /// ... and after its first 10 s no slower than this.
        body_min_bytes_per_s: u32 = 1_024, Kind::int("bytes/s", 1, GIB);
        /// A client that takes none of its answer for this long is cut off.
        write_stall_timeout_ms: u64 = 30_000, Kind::int("ms", 1, HOUR_MS);
        /// Most concurrent HTTP/2 streams of one connection.
        max_h2_streams: u32 = 128, Kind::int("streams", 1, 65_536);
        /// Origins whose pages browsers let send requests to the client routes, such as `https://chat.example`; or `*` alone, all of them, but then without cookies. An API key counts as no cookie: who opens this lets pages use keys that they have.
        cors_origins: Vec<String> = Vec::new(), Kind::List("origin");
        /// Allow listeners that other machines can reach although they lack authentication or TLS.
        insecure: bool = false, Kind::Bool;
    }

    /// The admin listener: status, workers, members, metrics, health.
    "admin" => AdminConfig {
        /// Address of the admin listener.
        listen: SocketAddr = loopback(8081), Kind::Address;
        /// `host:port` under which operators reach it, where that is not `listen`.
        advertise: Option<String> = None, Kind::HostPort;
        /// SHA-256 digests (hexadecimal) of accepted admin tokens. Empty: anybody who reaches the listener. `/metrics` needs a token too, unless the listener is on loopback.
        token_sha256: Vec<TokenDigest> = Vec::new(), Kind::List("64 hex digits");
        /// File with accepted admin tokens in clear text, one a line; read at start and added to `token_sha256`.
        token_file: Option<PathBuf> = None, Kind::Path;
        /// Certificate of the admin listener (PEM, intermediate ones after it); with `tls_key` it speaks TLS. Read again when it changes.
        tls_cert: Option<PathBuf> = None, Kind::Path;
        /// Private key of `tls_cert` (PEM), readable by its owner only.
        tls_key: Option<PathBuf> = None, Kind::Path;
    }

    /// The peer listener: Raft and everything else between replicas.
    "peer" => PeerConfig {
        /// Address of the peer listener.
        listen: SocketAddr = loopback(8082), Kind::Address;
        /// `host:port` under which other replicas reach it, where that is not `listen`.
        advertise: Option<String> = None, Kind::HostPort;
        /// Certificates of the authority that the replicas' certificates are of (PEM). With `tls_cert` and `tls_key`, replicas show each other certificates; all of a cluster do or none does. Read again when it changes.
        tls_ca: Option<PathBuf> = None, Kind::Path;
        /// This replica's certificate (PEM), which names it as `everline://CLUSTER/NAME`; `everline certs init` makes one. Read again when it changes.
        tls_cert: Option<PathBuf> = None, Kind::Path;
        /// Private key of `tls_cert` (PEM), readable by its owner only.
        tls_key: Option<PathBuf> = None, Kind::Path;
    }

    /// The cluster: who is in it, and the rhythm of consensus.
    "cluster" => ClusterConfig {
        /// Founding members as `name=host:port` of their peer listeners, the same list on each of them. Empty: a cluster of one.
        peers: Vec<PeerSeed> = Vec::new(), Kind::List("name=host:port");
        /// Peer addresses (`host:port`) of an existing cluster to join as a learner, instead of founding one.
        join: Vec<String> = Vec::new(), Kind::List("host:port");
        /// Make a learner a voter once it has caught up.
        auto_promote: bool = true, Kind::Bool;
        /// Time between a leader's heartbeats. Less than `election_min_ms`.
        heartbeat_ms: u64 = 125, Kind::int("ms", 5, 60_000);
        /// A follower calls an election when it has heard no leader for `election_max_ms` (the leader's lease) and then a random time of at least this.
        election_min_ms: u64 = 150, Kind::int("ms", 20, 120_000);
        /// ... and at most this. At least twice `election_min_ms`, or elections collide.
        election_max_ms: u64 = 300, Kind::int("ms", 40, 240_000);
        /// What a replica has booked is released after it was silent for this long.
        lease_ms: u64 = 750, Kind::int("ms", 100, 600_000);
        /// A change that finds no quorum fails after this time.
        propose_timeout_ms: u64 = 3_000, Kind::int("ms", 100, 600_000);
        /// Changes are gathered for at most this long before they are proposed as one.
        batch_window_us: u64 = 2_000, Kind::int("us", 0, 1_000_000);
        /// Loads alone are proposed at most once in this time: shorter is fresher, longer saves disk syncs on every replica.
        load_window_us: u64 = 4_000, Kind::int("us", 0, 1_000_000);
        /// ... or until they fill this much. At most a quarter of `wal_segment_bytes`.
        batch_bytes: u64 = 65_536, Kind::int("bytes", KIB, 4 * MIB);
        /// Most bytes of proposals that wait for a leader; more are refused.
        queue_bytes: u64 = 8 * MIB, Kind::int("bytes", 64 * KIB, 4 * GIB);
        /// Write a checkpoint after this much log.
        checkpoint_log_bytes: u64 = 64 * MIB, Kind::int("bytes", 64 * KIB, 64 * GIB);
        /// ... or after this time, if anything changed.
        checkpoint_interval_s: u64 = 60, Kind::int("s", 1, 86_400);
        /// Size of one pre-allocated segment of the write-ahead log. An entry takes half of it at most.
        wal_segment_bytes: u64 = 16 * MIB, Kind::int("bytes", MIB, GIB);
        /// Replicas compare digests of their state after each so many log entries; 0 turns that off.
        digest_every: u64 = 256, Kind::int("entries", 0, 1_000_000_000);
    }

    /// What is of edges only (`everline edge`).
    "edge" => EdgeConfig {
        /// Authorities that certificates of the replicas' client listeners must be of (PEM), where those speak TLS; without it, Mozilla's list.
        tls_ca: Option<PathBuf> = None, Kind::Path;
    }

    /// How workers are admitted and watched.
    "workers" => WorkersConfig {
        /// Networks a worker's address must lie in before a prompt is sent there. Link-local addresses and the clouds' metadata services are in no network: they count only where the address itself is listed (`/32`, `/128`). Multicast, broadcast and unspecified addresses never count.
        allow: Vec<IpNet> = loopback_networks(), Kind::List("CIDR network");
        /// Authorities that certificates of `https://` workers must be of (PEM); without it, Mozilla's list.
        tls_ca: Option<PathBuf> = None, Kind::Path;
        /// File with the API key that the engines want (vLLM's `--api-key`), sent to all workers as `Authorization: Bearer`; read at start.
        api_key_file: Option<PathBuf> = None, Kind::Path;
        /// A worker is offline after this time without a sign of life.
        timeout_ms: u64 = 5_000, Kind::int("ms", 500, HOUR_MS);
        /// Time between two health probes of a worker that sends no heartbeats.
        probe_interval_ms: u64 = 1_000, Kind::int("ms", 10, HOUR_MS);
        /// A health probe fails after this time.
        probe_timeout_ms: u64 = 1_000, Kind::int("ms", 10, HOUR_MS);
    }

    /// Credentials of engines and agents that register themselves.
    "nodes" => NodesConfig {
        /// SHA-256 digests (hexadecimal) of accepted node tokens. Empty, and no `[[node_token]]`: anybody, which is only allowed on loopback.
        token_sha256: Vec<TokenDigest> = Vec::new(), Kind::List("64 hex digits");
        /// File with accepted node tokens in clear text, one a line; read at start and added to `token_sha256`.
        token_file: Option<PathBuf> = None, Kind::Path;
    }

    /// How requests are routed and forwarded.
    "proxy" => ProxyConfig {
        /// How a worker is chosen among those that serve the model.
        policy: Policy = Policy::KvCost, Kind::Choice(Policy::NAMES);
        /// Connecting to a worker fails after this time.
        connect_timeout_ms: u64 = 1_000, Kind::int("ms", 1, 600_000);
        /// A worker must send the first byte of its answer within this time.
        first_byte_timeout_ms: u64 = 600_000, Kind::int("ms", 1, 24 * HOUR_MS);
        /// Longest silence between two bytes of an answer.
        idle_timeout_ms: u64 = 300_000, Kind::int("ms", 1, 24 * HOUR_MS);
        /// Longest time for a whole request.
        total_timeout_ms: u64 = 1_800_000, Kind::int("ms", 1, 168 * HOUR_MS);
        /// Further attempts when a worker fails before its first byte, beside 8 where none could be reached. Two workers see a request at most.
        retries: u32 = 2, Kind::int("attempts", 0, 16);
        /// Retries for 100 requests, beside one a second, so that they cannot multiply a load that is already too much. Attempts that could not connect do not count.
        retry_budget_percent: u32 = 20, Kind::int("percent", 0, 1000);
        /// Longest (random) pause before the first retry of a request that a worker has seen; doubles with each further one.
        retry_pause_ms: u64 = 25, Kind::int("ms", 0, 60_000);
        /// Failures in a row after which a worker is left alone for a while; 0 means never.
        breaker_failures: u32 = 5, Kind::int("failures", 0, 1_000_000);
        /// How long it is left alone the first time. Then one request tries it; when that fails, the time doubles ...
        breaker_open_ms: u64 = 1_000, Kind::int("ms", 1, HOUR_MS);
        /// ... up to this.
        breaker_max_open_ms: u64 = 30_000, Kind::int("ms", 1, HOUR_MS);
        /// Requests a worker should have at once, over the whole cluster, where its registration does not say (`max_requests`). More wait.
        max_requests_per_worker: u32 = 8_192, Kind::int("requests", 1, 1_000_000);
        /// How a request is booked: `local`, at once, so that replicas may choose the same worker in the few milliseconds until they hear of each other; `linearizable`, through the log before it is sent, so that they never do. That costs each request some milliseconds. Requests can ask for either with `Everline-Reserve`.
        reserve: Reserve = Reserve::Local, Kind::Choice(Reserve::NAMES);
        /// A worker with more prompt tokens waiting for their prefill than this is left out while others have fewer; 0 means never.
        overload_prefill_tokens: u64 = 0, Kind::int("tokens", 0, 1_000_000_000_000);
        /// A worker of whose KV blocks running requests hold more than this is left out while others are below; 0 means never. Known only of workers that say how many blocks they have.
        overload_kv_percent: u32 = 0, Kind::int("percent", 0, 100);
        /// Most requests that wait at this replica because all workers have as many as they should; further ones get 429.
        queue_max: u32 = 1_024, Kind::int("requests", 0, 1_000_000);
        /// A waiting request gets 429 after this time.
        queue_timeout_ms: u64 = 30_000, Kind::int("ms", 0, HOUR_MS);
        /// Idle connections to each worker that each thread keeps open.
        pool_idle_per_worker: u32 = 256, Kind::int("connections", 0, 65_536);
        /// ... for at most this long. Less than the engine's own keep-alive (uvicorn: 5 s).
        pool_idle_timeout_ms: u64 = 4_000, Kind::int("ms", 1, HOUR_MS);
        /// Largest response head of a worker.
        max_response_header_bytes: u32 = 65_536, Kind::int("bytes", 1024, 16 * MIB);
        /// Request headers that pass to workers although they would stay here, such as `authorization` or `cookie`.
        headers_forward: Vec<String> = Vec::new(), Kind::List("header name");
        /// Request headers that stay here although they would pass.
        headers_drop: Vec<String> = Vec::new(), Kind::List("header name");
    }

    /// Knowing which worker has cached what.
    "kv" => KvConfig {
        /// Where the token ids of a prompt come from if its model has no `[[model]]` entry: `engine` asks one that serves it (`POST /tokenize`; answers are kept), `text` compares pieces of text, which meet only what this cluster has sent itself and never an engine's events.
        default_mode: PromptMode = PromptMode::Engine, Kind::Choice(PromptMode::WITHOUT_FILES);
        /// Time between two looks at an engine's own figures (SGLang's load sockets, or `/metrics`, or SGLang's `/v1/loads`). Where it, or one of its data-parallel ranks, has more to do than the cluster gave it, three times in a row, or less five times, its load is corrected. One replica looks at each engine. 0 never looks.
        scrape_ms: u64 = 2_000, Kind::int("ms", 0, HOUR_MS);
        /// `tcp://host:port` where engines connect that are told to publish their KV events to a router (vLLM: an endpoint without `*`). Their workers have the labels `kv-events=hub` and `kv-topic=...`. There is no authentication: loopback, or a network you trust and `http.insecure = true`.
        listen: Option<String> = None, Kind::Text;
        /// Threads that tokenise prompts.
        tokenize_threads: u32 = 2, Kind::int("threads", 1, 256);
        /// Requests that wait for one of them; further ones are routed without knowing their prefix.
        tokenize_queue: u32 = 256, Kind::int("requests", 1, 65_536);
        /// Bodies up to this size are tokenised where they arrive, because a hop to another thread would take longer.
        tokenize_inline_bytes: u32 = 2_048, Kind::int("bytes", 0, MIB);
        /// Memory for pieces of prompts that were tokenised before.
        tokenize_cache_bytes: u64 = 256 * MIB, Kind::int("bytes", 0, 64 * GIB);
        /// Memory for the index of who has which blocks, on each replica; about 60 bytes a block that one rank holds, 30 for each further rank. Of what does not fit, the ends of the prefixes stored longest ago are forgotten. The replicas must forget the same: the leader's value holds for all.
        index_bytes: u64 = 512 * MIB, Kind::int("bytes", MIB, 3 * GIB);
    }

    /// Output streams that outlive their replica.
    "streams" => StreamsConfig {
        /// Where a stream is generated: `peer`, at another replica than the one that has the client, so that the death of either loses nothing; or `local`, at the same. Requests can ask for either with `Everline-Durability`.
        durability: Durability = Durability::Peer, Kind::Choice(Durability::NAMES);
        /// A replica that generates a stream and sends nothing for this long, not even a sign of life (every 250 ms), is taken to be dead.
        holder_timeout_ms: u64 = 1_000, Kind::int("ms", 500, 600_000);
        /// How long a stream may wait for somebody to go on with it; then it ends with `stream_lost`.
        takeover_timeout_ms: u64 = 15_000, Kind::int("ms", 100, HOUR_MS);
        /// A client that can come back may stay away for this long; then its stream is cancelled. Requests can say otherwise with `Everline-Orphan`.
        orphan_grace_s: u64 = 30, Kind::int("s", 0, 3_600);
        /// How long a stream can be read after its end.
        keep_s: u64 = 300, Kind::int("s", 0, 3_600);
        /// Most bytes of events of one stream that are kept for clients that come back, at each process that has it.
        stream_bytes: u64 = 8 * MIB, Kind::int("bytes", 64 * KIB, 32 * MIB);
        /// Memory for streams at one replica, edge or agent. When it is full, those that ended longest ago are forgotten, and new ones keep little.
        replica_bytes: u64 = 512 * MIB, Kind::int("bytes", MIB, 256 * GIB);
        /// After what silence a client gets a comment as a sign of life.
        heartbeat_ms: u64 = 5_000, Kind::int("ms", 100, HOUR_MS);
        /// Most clients that listen to one stream at one replica.
        most_listeners: u32 = 8, Kind::int("clients", 1, 1_000);
        /// Most engines in a row that may be lost with a stream before one of them gets on with it, by 16 tokens; then it ends with `stream_lost`. The loss of a replica, or its restart, is not counted. 0: streams do not go on at other engines.
        max_continuations: u32 = 3, Kind::int("times", 0, 100);
        /// Do not go on with a request that has a `seed`: what comes then is drawn from other numbers.
        strict_seed: bool = false, Kind::Bool;
        /// What is done with a request that has presence or frequency penalties, which begin anew where another engine goes on: `continue`, or `fail`.
        penalties: Penalties = Penalties::Continue, Kind::Choice(Penalties::NAMES);
        /// How often each API key may ask for streams that it did not begin; all without a key count as one.
        guesses_per_s: u32 = 10, Kind::int("requests/s", 1, 1_000_000);
        /// ... and how often at once.
        guesses_burst: u32 = 100, Kind::int("requests", 1, 1_000_000);
    }

    /// Requests whose prefill one worker does and whose decode another.
    "pd" => PdConfig {
        /// A prompt of which no more tokens than this have to be computed at an aggregated worker, or at a decode worker whose engine can, is done there by that one worker. 0: every request that can be split is split.
        bypass_tokens: u32 = 0, Kind::int("tokens", 0, 10_000_000);
        /// What a prefill worker holds ready is not asked for any more after this time; the prefill is done anew. Less than the engines keep it (vLLM: 30 s): afterwards they answer with wrong text.
        handoff_ms: u64 = 25_000, Kind::int("ms", 1, HOUR_MS);
        /// `tcp://host:port` where engines with P2pNccl or MoRI-IO say every few seconds that they are there (their `proxy_ip` and `proxy_port` or `proxy_ping_port`); they become workers. There is no authentication: loopback, or a network you trust and `http.insecure = true`.
        listen: Option<String> = None, Kind::Text;
    }

    /// KsanaLLM's fleets of prefill and decode nodes, in the place of its own router.
    "ksana" => KsanaConfig {
        /// The client listener is KsanaLLM's: its management routes (`/RegisterNode`, `/Heartbeat`, `/RegisterCommId`) and its proxy (`/generate`, `/v1/*`, `/v2/*`) to pairs of a prefill and a decode group. The OpenAI routes, streams and workers of Everline's own are not served there then.
        enabled: bool = false, Kind::Bool;
        /// `fixed`, the wire of KsanaLLM's router without its faults; or `strict`, as that router does it byte for byte, for a fleet that depends on them. The same on all replicas.
        compat: KsanaCompat = KsanaCompat::Fixed, Kind::Choice(KsanaCompat::NAMES);
        /// The cluster that nodes must be of; those that name none are.
        cluster_name: String = "default_cluster".to_owned(), Kind::Text;
        /// A node is offline after this time without a heartbeat.
        heartbeat_timeout_s: u64 = 60, Kind::int("s", 1, 86_400);
        /// In fixed mode a node that has been silent for this long is forgotten.
        forget_after_s: u64 = 86_400, Kind::int("s", 60, 31_536_000);
    }

    /// Who says what endpoints a name stands for: of KsanaLLM's prefill and decode groups, and of `[[discover]]`.
    "name_service" => NameServiceConfig {
        /// `auto`: KsanaLLM's pairs are those of the replicated registry, and no names are looked up. `static`: `[[name]]`. `kubernetes`: the EndpointSlices of services. `polaris`: Polaris by its HTTP interface.
        provider: NameProvider = NameProvider::Auto, Kind::Choice(NameProvider::NAMES);
        /// Namespace of names that have none of their own (`namespace/name`). Where left out: in Kubernetes that of this pod, in Polaris `Production`.
        namespace: Option<String> = None, Kind::Text;
        /// The name of KsanaLLM's prefill groups. In Kubernetes `[namespace/]service[:port]`, where the port is the name or number of one and may be left out if there is one only.
        prefill_service: String = "prefill-service".to_owned(), Kind::Text;
        /// The name of KsanaLLM's decode groups.
        decode_service: String = "decode-service".to_owned(), Kind::Text;
        /// How long an answer counts after the service last said that it is so. While the service is away, the last answer holds for this time; then it is as if nothing were known.
        max_age_s: u64 = 3_600, Kind::int("s", 120, 31_536_000);
        /// Time between two questions to Polaris. Kubernetes tells of changes itself.
        refresh_ms: u64 = 2_000, Kind::int("ms", 100, HOUR_MS);
        /// `https://host:port` of Kubernetes' API server. Where left out: that of the cluster this process runs in.
        kubernetes_api: Option<String> = None, Kind::Text;
        /// Authority of its certificate (PEM), read again whenever everything is listed.
        kubernetes_ca: PathBuf = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt".into(), Kind::Path;
        /// File with the token shown to it, read again for each request. Empty: none is shown.
        kubernetes_token_file: PathBuf = "/var/run/secrets/kubernetes.io/serviceaccount/token".into(), Kind::Path;
        /// `http://host:port` of Polaris' servers (their HTTP port); one that does not answer is passed over.
        polaris_servers: Vec<String> = vec!["http://127.0.0.1:8090".to_owned()], Kind::List("http://host:port");
        /// Authority of their certificates (PEM), where they speak https; without it, Mozilla's list.
        polaris_ca: Option<PathBuf> = None, Kind::Path;
        /// File with the access token, where Polaris wants one; read again for each question.
        polaris_token_file: Option<PathBuf> = None, Kind::Path;
        /// `http://host:port` of the push gateway of Polaris' monitoring, which gets the results of calls every 10 s as Polaris' own clients report them. Where left out: they are not reported.
        polaris_push_gateway: Option<String> = None, Kind::Text;
    }

    /// Log output.
    "log" => LogConfig {
        /// Form of log lines; `auto` is pretty on a terminal and json elsewhere.
        format: LogFormat = LogFormat::Auto, Kind::Choice(LogFormat::NAMES);
        /// What is logged: a level, or `module=level` pairs separated by commas, as in RUST_LOG.
        filter: String = "info".to_owned(), Kind::Text;
        /// Which requests get a line: `all`; `errors`, those that did not end well and slow ones, at most 100 lines a second; or `off`. Never anything of their content.
        access: AccessLog = AccessLog::Errors, Kind::Choice(AccessLog::NAMES);
        /// With `access = "errors"`: a request is slow when its answer begins later than this.
        access_slow_ms: u64 = 10_000, Kind::int("ms", 1, 24 * HOUR_MS);
    }
}

/// The whole configuration of a replica.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[replica]`
    pub replica: ReplicaConfig,
    /// `[http]`
    pub http: HttpConfig,
    /// `[admin]`
    pub admin: AdminConfig,
    /// `[peer]`
    pub peer: PeerConfig,
    /// `[cluster]`
    pub cluster: ClusterConfig,
    /// `[edge]`
    pub edge: EdgeConfig,
    /// `[workers]`
    pub workers: WorkersConfig,
    /// `[nodes]`
    pub nodes: NodesConfig,
    /// `[proxy]`
    pub proxy: ProxyConfig,
    /// `[kv]`
    pub kv: KvConfig,
    /// `[streams]`
    pub streams: StreamsConfig,
    /// `[pd]`
    pub pd: PdConfig,
    /// `[ksana]`
    pub ksana: KsanaConfig,
    /// `[name_service]`
    pub name_service: NameServiceConfig,
    /// `[log]`
    pub log: LogConfig,
    /// `[[worker]]`: workers registered at start, with source `config`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub worker: Vec<RegisterRequest>,
    /// `[[key]]`: API keys of clients. Those of `http.keys_file` come on top.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<KeyEntry>,
    /// `[[node_token]]`: node tokens bound to networks and roles.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub node_token: Vec<NodeTokenEntry>,
    /// `[[model]]`: how prompts of a model become token ids.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub model: Vec<ModelEntry>,
    /// `[[name]]`: names for `name_service.provider = "static"`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub name: Vec<NameEntry>,
    /// `[[discover]]`: names whose endpoints become workers.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub discover: Vec<DiscoverEntry>,
}

impl Config {
    /// Whether clients need an API key.
    pub fn wants_client_keys(&self) -> bool {
        self.http.keys_file.is_some() || !self.key.is_empty()
    }

    /// Whether nodes need a token.
    pub fn wants_node_tokens(&self) -> bool {
        !self.nodes.token_sha256.is_empty() || !self.node_token.is_empty()
    }

    /// Whether operators need a token.
    pub fn wants_admin_tokens(&self) -> bool {
        !self.admin.token_sha256.is_empty()
    }

    /// `host:port` under which other replicas reach this one: what is advertised, else this
    /// replica's own entry in `cluster.peers`, else the listener's address.
    pub fn peer_address(&self) -> String {
        let own = || self.cluster.peers.iter().find(|p| p.name == self.replica.name);
        self.peer
            .advertise
            .clone()
            .or_else(|| own().map(|p| p.address.clone()))
            .unwrap_or_else(|| self.peer.listen.to_string())
    }

    /// `http://host:port` (or https) of the client listener as others know it.
    pub fn http_url(&self) -> String {
        advertised(self.http.advertise.as_deref(), self.http.listen, self.http.tls().is_some())
    }

    /// `http://host:port` (or https) of the admin listener as others know it.
    pub fn admin_url(&self) -> String {
        advertised(self.admin.advertise.as_deref(), self.admin.listen, self.admin.tls().is_some())
    }
}

impl HttpConfig {
    /// The certificate of the client listener, if it has one.
    pub fn tls(&self) -> Option<ListenerFiles> {
        Some(ListenerFiles { cert: self.tls_cert.clone()?, key: self.tls_key.clone()? })
    }
}

impl AdminConfig {
    /// The certificate of the admin listener, if it has one.
    pub fn tls(&self) -> Option<ListenerFiles> {
        Some(ListenerFiles { cert: self.tls_cert.clone()?, key: self.tls_key.clone()? })
    }
}

impl PeerConfig {
    /// The certificates of the links between replicas, if they have any.
    pub fn tls(&self) -> Option<PeerFiles> {
        Some(PeerFiles { ca: self.tls_ca.clone()?, cert: self.tls_cert.clone()?, key: self.tls_key.clone()? })
    }
}

fn advertised(advertise: Option<&str>, listen: SocketAddr, tls: bool) -> String {
    let scheme = if tls { "https" } else { "http" };
    advertise.map_or_else(|| format!("{scheme}://{listen}"), |address| format!("{scheme}://{address}"))
}
