//! Configuration: typed, documented, with the origin of every value.
//!
//! One TOML file, overridden by `EVERLINE_<SECTION>__<KEY>` in the environment, overridden by
//! flags. Errors are collected, not just the first reported, and each names its place and a
//! remedy. This module and `main` are the only places that read the environment.

mod access;
mod certificates;
mod environment;
mod errors;
mod keys;
mod ksana_ini;
mod models;
mod names;
mod render;
mod schema;
mod sources;
#[cfg(test)]
mod tests;
mod validate;
mod values;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize as _;
use toml::{Table, Value};

pub use access::{Expiry, KeyEntry, NodeTokenEntry, parse_keys, read_keys_file};
pub use certificates::Certificates;
pub use environment::{admin_token, kubernetes_api, no_color, node_token, temporary_folder, variables};
pub use errors::{ConfigError, ConfigErrors, Origin, Place};
pub use keys::{KeyDoc, Kind, SectionDoc, all as all_keys, find as find_key, suggest};
pub use models::{ContentForm, ModelEntry, PromptDialect, PromptMode};
pub use names::{DiscoverEntry, NameEntry, NameProvider};
pub use render::{default_toml, reference_markdown, to_toml_with_origins};
pub use schema::{
    AdminConfig, ClusterConfig, Config, HttpConfig, KsanaConfig, LogConfig, NameServiceConfig, NodesConfig,
    PeerConfig, ProxyConfig, ReplicaConfig, SECTIONS, StreamsConfig, WorkersConfig,
};
pub use sources::{ENV_PREFIX, Override};
pub use values::{
    AccessLog, Durability, KsanaCompat, LogFormat, PeerSeed, Penalties, Policy, Reserve, TokenDigest,
    check_host_port, check_name,
};

use sources::Found;

/// What a process is that reads a configuration.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// A replica.
    Replica,
    /// An edge: clients' requests come in, nothing is kept.
    Edge,
    /// A node agent: streams are held beside an engine. What is about listeners, the cluster and
    /// certificates is not for it.
    Agent,
}

/// The name of an edge that is given none.
const EDGE_NAME: &str = "edge";

/// A configuration that is whole and valid, and where its values come from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Dotted key to origin, for every key; `[[worker]]` entries as `worker[0]` and on, other lists alike.
    pub origins: BTreeMap<String, Origin>,
    /// What of the configuration has no effect, for the operator.
    pub notes: Vec<String>,
}

impl Config {
    /// Reads `file`, then the environment, then flags, each over the one before, and checks the
    /// result.
    pub fn load(
        file: Option<&Path>,
        env: &mut dyn Iterator<Item = (String, String)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigErrors> {
        Self::load_as(Role::Replica, file, env, overrides)
    }

    /// The same for a process of another role.
    pub fn load_as(
        role: Role,
        file: Option<&Path>,
        env: &mut dyn Iterator<Item = (String, String)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigErrors> {
        Self::load_beside(role, None, file, env, overrides)
    }

    /// The same with a `config.ini` of KsanaLLM's router below all of that.
    pub fn load_beside(
        role: Role,
        ksana: Option<&Path>,
        file: Option<&Path>,
        env: &mut dyn Iterator<Item = (String, String)>,
        overrides: &[Override],
    ) -> Result<Loaded, ConfigErrors> {
        let mut found = Found::default();
        let notes = ksana.map(|path| ksana_ini::read(path, &mut found)).unwrap_or_default();
        if let Some(path) = file {
            match std::fs::read_to_string(path) {
                Ok(text) => found.file(path, &text),
                Err(e) => found.errors.push(ConfigError {
                    key: None,
                    place: None,
                    message: format!("cannot read {}: {e}", path.display()),
                    remedy: Some(
                        "`everline config default > everline.toml` writes one to start from".to_owned(),
                    ),
                }),
            }
        }
        found.environment(env);
        found.overrides(overrides);
        assemble(found, role).map(|loaded| Loaded { notes, ..loaded })
    }

    /// Checks ranges and the rules between keys.
    pub fn validate(&self) -> Result<(), ConfigErrors> {
        match validate::problems(self, Role::Replica) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(ConfigErrors(problems)),
        }
    }
}

fn assemble(found: Found, role: Role) -> Result<Loaded, ConfigErrors> {
    let Found { settings, mut errors } = found;
    let mut table = Table::new();
    let mut lists: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    let mut places: BTreeMap<String, Place> = BTreeMap::new();
    for setting in settings {
        if let Err(error) = check_alone(&setting.key, &setting.value) {
            errors.push(error.at(&setting.place));
            continue;
        }
        match (keys::list_of(&setting.key), setting.key.split_once('.')) {
            (Some(list), _) => lists.entry(list.name).or_default().push(setting.value),
            (None, Some((section, name))) => {
                let section = table.entry(section).or_insert_with(|| Table::new().into());
                if let Value::Table(section) = section {
                    section.insert(name.to_owned(), setting.value);
                }
            }
            (None, None) => {}
        }
        places.insert(setting.key, setting.place);
    }
    for (name, entries) in lists {
        table.insert(name.to_owned(), entries.into());
    }
    let mut config = match Config::deserialize(Value::Table(table)) {
        Ok(config) => config,
        Err(e) => {
            errors.push(ConfigError::about("config", e.message()));
            return Err(ConfigErrors(errors));
        }
    };
    if role == Role::Edge && !places.contains_key("replica.name") {
        config.replica.name = EDGE_NAME.to_owned();
    }
    // An agent has nobody's files.
    let has_files = role != Role::Agent;
    if has_files {
        errors.extend(read_tokens(&mut config));
        if let Some(path) = &config.http.keys_file
            && let Err(wrong) = read_keys_file(path, &config.key)
        {
            errors.extend(wrong.0);
        }
    }
    // A value that was refused above stands at its default here: rules between keys would
    // speak about something nobody wrote, so they wait until every value is right.
    if errors.is_empty() {
        errors = validate::problems(&config, role);
    }
    // Only of a configuration that makes sense otherwise: certificates are of a name.
    if errors.is_empty() && has_files {
        errors = Certificates::open(&config).err().unwrap_or_default();
    }
    if errors.is_empty() {
        return Ok(Loaded { origins: origins(&config, &places), config, notes: Vec::new() });
    }
    for error in &mut errors {
        if error.place.is_none() {
            error.place = error.key.as_ref().and_then(|key| places.get(key)).cloned();
        }
    }
    Err(ConfigErrors(errors))
}

/// Reads one entry of a list.
fn read_entry<T: serde::de::DeserializeOwned>(key: &str, value: Value) -> Result<T, ConfigError> {
    T::deserialize(value).map_err(|e| ConfigError::about(key, e.message()))
}

/// Tries one value by itself, so that an error can name its place.
fn check_alone(key: &str, value: &Value) -> Result<(), ConfigError> {
    if let Some(list) = keys::list_of(key) {
        return (list.check)(key, value.clone());
    }
    let Some(doc) = keys::find(key) else { return Ok(()) };
    doc.kind.check(value).map_err(|message| ConfigError::about(key, message))?;
    let section = Table::from_iter([(doc.name.to_owned(), value.clone())]);
    let whole = Table::from_iter([(doc.section.to_owned(), Value::Table(section))]);
    Config::deserialize(Value::Table(whole)).map(|_| ()).map_err(|e| {
        let error = ConfigError::about(key, e.message());
        match doc.kind {
            Kind::Address => error.fix("write an address and a port, such as \"127.0.0.1:8080\""),
            Kind::List("CIDR network") => error.fix("write networks, such as [\"10.0.0.0/8\", \"::1/128\"]"),
            _ => error,
        }
    })
}

/// Adds the digests of `nodes.token_file` and `admin.token_file`.
fn read_tokens(config: &mut Config) -> Vec<ConfigError> {
    let Config { nodes, admin, .. } = config;
    [
        ("nodes.token_file", &nodes.token_file, &mut nodes.token_sha256),
        ("admin.token_file", &admin.token_file, &mut admin.token_sha256),
    ]
    .into_iter()
    .filter_map(|(key, path, digests)| add_tokens(key, path.as_deref()?, digests).err())
    .collect()
}

fn add_tokens(key: &str, path: &Path, known: &mut Vec<TokenDigest>) -> Result<(), ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| ConfigError::about(key, format!("cannot read {}: {e}", path.display())))?;
    let tokens = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let digests: Vec<TokenDigest> = tokens.map(TokenDigest::of).collect();
    if digests.is_empty() {
        let message = format!("{} has no token in it", path.display());
        return Err(ConfigError::about(key, message).fix("write one token a line: openssl rand -hex 32"));
    }
    for digest in digests {
        if !known.contains(&digest) {
            known.push(digest);
        }
    }
    Ok(())
}

fn origins(config: &Config, places: &BTreeMap<String, Place>) -> BTreeMap<String, Origin> {
    let lengths = [
        ("worker", config.worker.len()),
        ("key", config.key.len()),
        ("node_token", config.node_token.len()),
        ("model", config.model.len()),
        ("name", config.name.len()),
        ("discover", config.discover.len()),
    ];
    let entries =
        lengths.into_iter().flat_map(|(name, length)| (0..length).map(move |at| format!("{name}[{at}]")));
    let keys = keys::all().map(KeyDoc::dotted).chain(entries);
    keys.map(|key| {
        let origin = places.get(&key).map_or(Origin::Default, |place| place.origin.clone());
        (key, origin)
    })
    .collect()
}
