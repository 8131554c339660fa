//! The rules that a whole configuration must keep.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::Role;
use super::access;
use super::errors::ConfigError;
use super::keys;
use super::names;
use super::schema::Config;
use super::values::{check_host_port, check_name};
use crate::state::worker::WorkerSource;

/// Everything wrong with `config` for a process of this role; each error names the key to change.
pub(super) fn problems(config: &Config, role: Role) -> Vec<ConfigError> {
    let mut problems = ranges(config);
    if role == Role::Agent {
        return problems;
    }
    identity(config, &mut problems);
    listeners(config, role, &mut problems);
    certificates(config, &mut problems);
    match role {
        Role::Replica => cluster(config, &mut problems),
        Role::Edge => replicas(config, &mut problems),
        Role::Agent => {}
    }
    workers(config, &mut problems);
    ksana(config, role, &mut problems);
    names::check(config, role, &mut problems);
    headers(config, &mut problems);
    origins(config, &mut problems);
    let keys = config.key.iter().enumerate().map(|(at, key)| (format!("key[{at}]"), key));
    problems.extend(access::key_problems(keys));
    problems.extend(access::node_token_problems(&config.node_token));
    problems
}

fn ranges(config: &Config) -> Vec<ConfigError> {
    let Ok(table) = toml::Table::try_from(config) else {
        return vec![ConfigError::about("config", "a number does not fit into 63 bits")];
    };
    keys::all()
        .filter_map(|key| {
            let value = table.get(key.section)?.get(key.name)?;
            key.kind.check(value).err().map(|message| ConfigError::about(&key.dotted(), message))
        })
        .collect()
}

fn identity(config: &Config, problems: &mut Vec<ConfigError>) {
    if let Err(message) = check_name(&config.replica.name) {
        problems.push(ConfigError::about("replica.name", message));
    }
    if config.replica.data_dir.as_os_str().is_empty() {
        problems.push(ConfigError::about("replica.data_dir", "must not be empty"));
    }
}

fn listeners(config: &Config, role: Role, problems: &mut Vec<ConfigError>) {
    let planes = || planes(config).into_iter().filter(move |plane| role.has(plane.section));
    for plane in planes() {
        let Plane { section, listen, advertise, .. } = plane;
        let key = format!("{section}.listen");
        let missing = plane.missing();
        if !listen.ip().is_loopback() && !config.http.insecure && !missing.is_empty() {
            let lacks: Vec<&str> = missing.iter().map(|missing| missing.what).collect();
            let mut remedies: Vec<&str> = missing.iter().map(|missing| missing.remedy).collect();
            remedies.dedup();
            problems.push(
                ConfigError::about(
                    &key,
                    format!(
                        "{listen} can be reached from other machines without {}: {}",
                        lacks.join(" and without "),
                        plane.danger
                    ),
                )
                .fix(format!(
                    "{}; or listen on 127.0.0.1; or, on a network you trust, write http.insecure = true",
                    remedies.join(" and ")
                )),
            );
        }
        let known_otherwise =
            section == "peer" && config.cluster.peers.iter().any(|p| p.name == config.replica.name);
        let is_told = role == Role::Replica;
        if is_told && listen.ip().is_unspecified() && advertise.is_none() && !known_otherwise {
            problems.push(
                ConfigError::about(&key, format!("{listen} is no address that others could connect to"))
                    .fix(format!("say how others reach it: {section}.advertise = \"host:port\"")),
            );
        }
        if let Some(Err(message)) = advertise.as_deref().map(check_host_port) {
            problems.push(ConfigError::about(&format!("{section}.advertise"), message));
        }
    }
    let mut taken: BTreeMap<SocketAddr, &str> = BTreeMap::new();
    for Plane { section, listen, .. } in planes().filter(|p| p.listen.port() != 0) {
        if let Some(other) = taken.insert(listen, section) {
            problems.push(
                ConfigError::about(&format!("{section}.listen"), format!("{listen} is also {other}.listen"))
                    .fix("give each listener a port of its own"),
            );
        }
    }
    if role == Role::Replica && !config.http.listen.ip().is_loopback() && !config.wants_node_tokens() {
        problems.push(
            ConfigError::about("nodes.token_sha256", "is empty while workers can register from other machines at http.listen: anybody could register a worker and be sent prompts")
                .fix("put a token into a file and name it: nodes.token_file = \"/etc/everline/node-tokens\""),
        );
    }
}

/// Longest name of KsanaLLM's cluster.
const KSANA_NAME: usize = 128;

fn ksana(config: &Config, role: Role, problems: &mut Vec<ConfigError>) {
    if !(1..=KSANA_NAME).contains(&config.ksana.cluster_name.len()) {
        let message = format!("must be 1 to {KSANA_NAME} bytes long");
        problems.push(ConfigError::about("ksana.cluster_name", message));
    }
    if config.ksana.enabled && role == Role::Edge {
        problems.push(
            ConfigError::about("ksana.enabled", "is for replicas: an edge does not serve KsanaLLM")
                .fix("send KsanaLLM's engines and clients to the replicas"),
        );
    }
}

impl Role {
    /// Whether processes of this role have this listener.
    fn has(self, section: &str) -> bool {
        self == Role::Replica || section != "peer"
    }
}

/// Where an edge finds replicas.
fn replicas(config: &Config, problems: &mut Vec<ConfigError>) {
    let cluster = &config.cluster;
    if cluster.peers.is_empty() && cluster.join.is_empty() {
        problems.push(
            ConfigError::about("cluster.join", "is empty, and so is cluster.peers: an edge has to know where replicas are")
                .fix("name peer listeners of some: --replicas 10.0.0.1:8082,10.0.0.2:8082, or cluster.join in the file"),
        );
    }
    for address in &cluster.join {
        if let Err(message) = check_host_port(address) {
            problems.push(ConfigError::about("cluster.join", message));
        }
    }
}

/// A listener, and what it has to protect itself.
struct Plane<'a> {
    section: &'static str,
    listen: SocketAddr,
    advertise: &'a Option<String>,
    /// Whether it speaks TLS; between replicas, on both sides.
    encrypts: bool,
    /// Whether it knows who speaks to it.
    authenticates: bool,
    /// How to make it so.
    remedies: [&'static str; 2],
    /// What could happen otherwise.
    danger: &'static str,
}

/// Something a listener lacks.
struct Missing {
    what: &'static str,
    remedy: &'static str,
}

impl Plane<'_> {
    fn missing(&self) -> Vec<Missing> {
        let [tls, auth] = self.remedies;
        [(self.encrypts, "TLS", tls), (self.authenticates, "authentication", auth)]
            .into_iter()
            .filter(|(there, ..)| !there)
            .map(|(_, what, remedy)| Missing { what, remedy })
            .collect()
    }
}

fn planes(config: &Config) -> [Plane<'_>; 3] {
    // One thing does both there.
    let mutual = config.peer.tls().is_some();
    [
        Plane {
            section: "http",
            listen: config.http.listen,
            advertise: &config.http.advertise,
            encrypts: config.http.tls().is_some(),
            // Nodes share this listener; their tokens have a rule of their own.
            authenticates: config.wants_client_keys(),
            remedies: [
                "set http.tls_cert and http.tls_key",
                "give clients keys (`everline keys new NAME` shows how)",
            ],
            danger: "anybody could send prompts or read those of others",
        },
        Plane {
            section: "admin",
            listen: config.admin.listen,
            advertise: &config.admin.advertise,
            encrypts: config.admin.tls().is_some(),
            authenticates: config.wants_admin_tokens(),
            remedies: [
                "set admin.tls_cert and admin.tls_key",
                "put a token into a file and name it in admin.token_file",
            ],
            danger: "anybody could add and remove workers and members",
        },
        Plane {
            section: "peer",
            listen: config.peer.listen,
            advertise: &config.peer.advertise,
            encrypts: mutual,
            authenticates: mutual,
            remedies: ["set peer.tls_ca, peer.tls_cert and peer.tls_key"; 2],
            danger: "anybody could speak as a replica",
        },
    ]
}

/// Keys that only make sense together.
fn certificates(config: &Config, problems: &mut Vec<ConfigError>) {
    let (http, admin, peer) = (&config.http, &config.admin, &config.peer);
    let sets: [&[(&str, bool)]; 3] = [
        &[("http.tls_cert", http.tls_cert.is_some()), ("http.tls_key", http.tls_key.is_some())],
        &[("admin.tls_cert", admin.tls_cert.is_some()), ("admin.tls_key", admin.tls_key.is_some())],
        &[
            ("peer.tls_ca", peer.tls_ca.is_some()),
            ("peer.tls_cert", peer.tls_cert.is_some()),
            ("peer.tls_key", peer.tls_key.is_some()),
        ],
    ];
    for set in sets {
        let given: Vec<&str> = set.iter().filter(|(_, given)| *given).map(|(key, _)| *key).collect();
        let missing: Vec<&str> = set.iter().filter(|(_, given)| !given).map(|(key, _)| *key).collect();
        if let (Some(first), false) = (given.first(), missing.is_empty()) {
            problems.push(
                ConfigError::about(first, format!("is given without {}", missing.join(" and ")))
                    .fix(format!("set {}, or take {} out", missing.join(" and "), given.join(" and "))),
            );
        }
    }
}

fn cluster(config: &Config, problems: &mut Vec<ConfigError>) {
    let cluster = &config.cluster;
    if cluster.election_max_ms < 2 * cluster.election_min_ms {
        problems.push(
            ConfigError::about(
                "cluster.election_max_ms",
                format!(
                    "{} is less than twice election_min_ms ({})",
                    cluster.election_max_ms, cluster.election_min_ms
                ),
            )
            .fix(format!("set it to at least {}", 2 * cluster.election_min_ms)),
        );
    }
    // A follower calls an election after `election_max_ms` (the leader's lease) and then its own
    // timeout of silence: at the defaults four heartbeats must be lost in a row.
    if cluster.heartbeat_ms >= cluster.election_min_ms {
        problems.push(
            ConfigError::about(
                "cluster.heartbeat_ms",
                format!("{} is not less than election_min_ms ({}): a late heartbeat would cost the leader its place", cluster.heartbeat_ms, cluster.election_min_ms),
            )
            .fix(format!("set election_min_ms to more than {}", cluster.heartbeat_ms)),
        );
    }
    if cluster.batch_bytes > cluster.wal_segment_bytes / 4 {
        problems.push(
            ConfigError::about(
                "cluster.batch_bytes",
                format!(
                    "{} is more than a quarter of wal_segment_bytes ({}): an entry might not fit into the log",
                    cluster.batch_bytes, cluster.wal_segment_bytes
                ),
            )
            .fix(format!("set it to at most {}", cluster.wal_segment_bytes / 4)),
        );
    }
    let mut names = BTreeSet::new();
    let mut addresses = BTreeSet::new();
    for peer in &cluster.peers {
        if !names.insert(&peer.name) {
            problems.push(ConfigError::about("cluster.peers", format!("{} is named twice", peer.name)));
        }
        if !addresses.insert(&peer.address) {
            problems.push(ConfigError::about("cluster.peers", format!("{} is given twice", peer.address)));
        }
    }
    if !cluster.peers.is_empty() && !names.contains(&config.replica.name) {
        let listed: Vec<&str> = cluster.peers.iter().map(|p| p.name.as_str()).collect();
        problems.push(
            ConfigError::about(
                "cluster.peers",
                format!("{} is not among them ({})", config.replica.name, listed.join(", ")),
            )
            .fix("set replica.name to one of them, or use cluster.join to come to an existing cluster"),
        );
    }
    if !cluster.peers.is_empty() && !cluster.join.is_empty() {
        problems.push(
            ConfigError::about("cluster.join", "is given together with cluster.peers")
                .fix("peers founds a new cluster, join comes to an existing one: keep one of them"),
        );
    }
    for address in &cluster.join {
        if let Err(message) = check_host_port(address) {
            problems.push(ConfigError::about("cluster.join", message));
        }
    }
}

fn origins(config: &Config, problems: &mut Vec<ConfigError>) {
    let key = "http.cors_origins";
    let origins = &config.http.cors_origins;
    for origin in origins {
        if origin == "*" {
            if origins.len() > 1 {
                let message = "* lets in all origins, and stands beside others";
                problems.push(ConfigError::about(key, message).fix("keep * alone, or the others"));
            }
        } else if !is_origin(origin) {
            let message = format!("{origin:?} is no origin as browsers send it");
            let fix = "write scheme and host in small letters, without a path and without the scheme's usual \
                       port, such as https://chat.example or http://localhost:3000";
            problems.push(ConfigError::about(key, message).fix(fix));
        }
    }
}

/// Whether a text is an origin as browsers send it.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return false };
    let small = text.bytes().all(|byte| byte.is_ascii_graphic() && !byte.is_ascii_uppercase());
    let usual = (scheme == "http" && host.ends_with(":80")) || (scheme == "https" && host.ends_with(":443"));
    small && !scheme.is_empty() && !host.is_empty() && !host.contains(['/', '?', '#', '@', '*']) && !usual
}

fn headers(config: &Config, problems: &mut Vec<ConfigError>) {
    let proxy = &config.proxy;
    for (key, names) in
        [("proxy.headers_forward", &proxy.headers_forward), ("proxy.headers_drop", &proxy.headers_drop)]
    {
        for name in names {
            if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
                problems.push(ConfigError::about(key, format!("{name:?} is not the name of a header")));
            }
        }
    }
}

fn workers(config: &Config, problems: &mut Vec<ConfigError>) {
    let mut ids = BTreeMap::new();
    for (at, worker) in config.worker.iter().enumerate() {
        let key = format!("worker[{at}]");
        match worker.to_spec(WorkerSource::Config) {
            Err(message) => problems.push(ConfigError::about(&key, message)),
            Ok(spec) => {
                if let Some(first) = ids.insert(spec.id.clone(), at) {
                    problems.push(
                        ConfigError::about(&key, format!("has the id {} of worker[{first}]", spec.id))
                            .fix("give each worker an id of its own"),
                    );
                }
            }
        }
    }
}
