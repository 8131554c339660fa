//! KsanaLLM's `config.ini`, as its reference router reads it, taken as settings of ours.

use std::path::Path;

use toml::Value;

use super::errors::{ConfigError, Origin, Place};
use super::sources::Found;

/// The port of the reference router.
const LISTEN: &str = "127.0.0.1:9080";

/// What a file says, below everything else that is configured: errors and notes for the operator beside
/// the settings.
pub(super) fn read(path: &Path, found: &mut Found) -> Vec<String> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) => {
            let message = format!("cannot read {}: {e}", path.display());
            found.errors.push(
                ConfigError::about("ksana-config", message).fix("name the reference router's config.ini"),
            );
            return Vec::new();
        }
    };
    let place = |line: usize| Place { origin: Origin::File { path: path.to_owned(), line }, column: None };
    // That there is one says that KsanaLLM is served.
    found.set("ksana.enabled".to_owned(), Value::Boolean(true), place(1));
    found.set("http.listen".to_owned(), Value::String(LISTEN.to_owned()), place(1));
    let mut notes = Vec::new();
    for Entry { section, key, value, line } in entries(&text) {
        let note = |text: String| format!("{}:{line}: {text}", path.display());
        match (section.as_str(), key.as_str()) {
            ("general", "cluster_name") => {
                found.set("ksana.cluster_name".to_owned(), Value::String(value), place(line));
            }
            ("general", "heartbeat_timeout_seconds") => match value.parse::<i64>() {
                Ok(seconds) => {
                    found.set("ksana.heartbeat_timeout_s".to_owned(), Value::Integer(seconds), place(line));
                }
                Err(_) => {
                    let message = format!("{value:?} is not a whole number of seconds");
                    found.errors.push(ConfigError::about("heartbeat_timeout_seconds", message).at(&place(line)));
                }
            },
            ("general", "log_level") => {
                let level = match value.to_ascii_lowercase().as_str() {
                    "warning" | "warn" => "warn",
                    "error" | "critical" | "fatal" => "error",
                    "debug" => "debug",
                    _ => "info",
                };
                found.set("log.filter".to_owned(), Value::String(level.to_owned()), place(line));
            }
            ("general", "log_dir") => {
                notes.push(note(format!("log_dir = {value} is not used: logs go to standard error")));
            }
            ("database", "storage_mode") => notes.push(note(format!(
                "storage_mode = {value} is not used: the replicas keep the tables themselves, in memory, in their logs \
                 and with sled in replica.data_dir"
            ))),
            ("name_service", "name_service_provider") => match value.rsplit('.').next().unwrap_or_default() {
                "auto_provider" => {}
                "polaris_provider" => {
                    let provider = Value::String("polaris".to_owned());
                    found.set("name_service.provider".to_owned(), provider, place(line));
                }
                _ => notes.push(note(format!(
                    "name_service_provider = {value} is not known: pairs are found in the replicated registry; \
                     name_service.provider says what else there is"
                ))),
            },
            ("name_service", key @ ("namespace" | "prefill_service" | "decode_service")) => {
                found.set(format!("name_service.{key}"), Value::String(value), place(line));
            }
            // What belongs to those, and what the reference does not know either.
            _ => {}
        }
    }
    notes
}

struct Entry {
    section: String,
    key: String,
    value: String,
    line: usize,
}

/// Sections, keys and values as Python's `configparser` takes them apart: names of keys in lower case,
/// `=` or `:`, comments on lines of their own, `%%` for a percent sign.
fn entries(text: &str) -> Vec<Entry> {
    let mut section = String::new();
    let mut entries: Vec<Entry> = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.is_empty() || trimmed.starts_with(['#', ';']) {
            continue;
        }
        if let Some(name) = trimmed.strip_prefix('[').and_then(|rest| rest.split(']').next()) {
            section = name.to_owned();
            continue;
        }
        // A line that is set in goes on with the value above it; no key of ours has such a value.
        if line.starts_with([' ', '\t']) && entries.last().is_some_and(|last| last.section == section) {
            continue;
        }
        let Some((key, value)) = trimmed.split_once(['=', ':']) else { continue };
        entries.push(Entry {
            section: section.clone(),
            key: key.trim().to_ascii_lowercase(),
            value: value.trim().replace("%%", "%"),
            line: at + 1,
        });
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Override, Role};
    use super::*;

    const SHIPPED: &str = "[general]\nlog_level = INFO\nlog_dir = ./log\ncluster_name = default_cluster\n\
        heartbeat_timeout_seconds = 60\n\n[database]\nstorage_mode = sqlite\nsqlite_path = ./sqlite/simple_router.db\n\
        host = localhost\nport = 3306\n\n[name_service]\nname_service_provider = name_service.auto_provider\n\
        namespace = Production\n";

    fn load(
        text: &str,
        file: &str,
        flags: &[(&str, &str)],
    ) -> Result<super::super::Loaded, super::super::ConfigErrors> {
        let folder = tempfile::tempdir().unwrap();
        let (ini, toml) = (folder.path().join("config.ini"), folder.path().join("everline.toml"));
        std::fs::write(&ini, text).unwrap();
        std::fs::write(&toml, file).unwrap();
        let overrides: Vec<Override> = flags
            .iter()
            .map(|(key, value)| Override { key: (*key).into(), value: (*value).into(), flag: "--set".into() })
            .collect();
        Config::load_beside(Role::Replica, Some(&ini), Some(&toml), &mut std::iter::empty(), &overrides)
    }

    #[test]
    fn the_shipped_file_is_taken_as_it_is() {
        let loaded = load(SHIPPED, "", &[]).unwrap();
        let config = &loaded.config;
        assert!(config.ksana.enabled);
        assert_eq!(config.http.listen.to_string(), LISTEN);
        assert_eq!(
            (config.ksana.cluster_name.as_str(), config.ksana.heartbeat_timeout_s),
            ("default_cluster", 60)
        );
        assert_eq!(loaded.notes.len(), 2, "{:?}", loaded.notes);
        assert!(
            loaded.notes[1].contains("config.ini:8: storage_mode = sqlite is not used"),
            "{:?}",
            loaded.notes
        );
    }

    #[test]
    fn whatever_else_is_configured_counts_more() {
        let ini = "; as python reads it\n[general]\nCluster_Name: mine\nheartbeat_timeout_seconds=5\nlog_level=WARNING\n";
        let loaded =
            load(ini, "[ksana]\nheartbeat_timeout_s = 7\n", &[("http.listen", "127.0.0.1:1")]).unwrap();
        let config = &loaded.config;
        assert_eq!((config.ksana.cluster_name.as_str(), config.ksana.heartbeat_timeout_s), ("mine", 7));
        assert_eq!((config.http.listen.port(), config.log.filter.as_str()), (1, "warn"));
    }

    #[test]
    fn its_name_service_is_taken_and_one_that_is_not_known_is_said() {
        let ini = "[name_service]\nname_service_provider = simple_router.name_service.polaris_provider\n\
            namespace = Test\nprefill_service = p\ndecode_service = d\n";
        let loaded = load(ini, "", &[]).unwrap();
        let service = &loaded.config.name_service;
        assert_eq!(
            (service.provider, service.namespace.as_deref()),
            (super::super::NameProvider::Polaris, Some("Test"))
        );
        assert_eq!((service.prefill_service.as_str(), service.decode_service.as_str()), ("p", "d"));
        assert_eq!(loaded.config.followed_names(), ["d", "p"]);
        assert_eq!(loaded.notes, [""; 0]);
        let other = load("[name_service]\nname_service_provider = mine.provider\n", "", &[]).unwrap();
        assert!(
            other.notes[0].contains("config.ini:2: name_service_provider = mine.provider"),
            "{:?}",
            other.notes
        );
    }

    #[test]
    fn what_cannot_be_is_said_with_its_line() {
        for (text, part) in [
            ("[general]\nheartbeat_timeout_seconds = soon\n", "config.ini:2"),
            ("[general]\nheartbeat_timeout_seconds = 0\n", "config.ini:2"),
            ("[general]\n\ncluster_name =\n", "config.ini:3"),
        ] {
            let errors = load(text, "", &[]).unwrap_err().0;
            assert_eq!(errors.len(), 1, "{errors:?}");
            assert!(errors[0].to_string().contains(part), "{}", errors[0]);
        }
        let missing = Path::new("/nowhere/config.ini");
        let none = Config::load_beside(Role::Replica, Some(missing), None, &mut std::iter::empty(), &[]);
        assert!(none.unwrap_err().0[0].to_string().contains("/nowhere/config.ini"));
    }
}
