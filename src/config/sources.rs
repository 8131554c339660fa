//! Reads the three sources into a flat list of settings, each with its place.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use toml::Value;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::errors::{ConfigError, Origin, Place};
use super::keys::{self, LISTS, List};
use super::schema::SECTIONS;

/// The prefix of environment variables.
pub const ENV_PREFIX: &str = "EVERLINE_";

/// A value that a flag sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Dotted key.
    pub key: String,
    /// The value as typed.
    pub value: String,
    /// The flag it was typed behind, with dashes.
    pub flag: String,
}

/// A key that some source sets.
pub(super) struct Setting {
    pub(super) key: String,
    pub(super) value: Value,
    pub(super) place: Place,
}

/// Settings and errors, as they are found.
#[derive(Default)]
pub(super) struct Found {
    pub(super) settings: Vec<Setting>,
    pub(super) errors: Vec<ConfigError>,
}

impl Found {
    pub(super) fn set(&mut self, key: String, value: Value, place: Place) {
        self.settings.push(Setting { key, value, place });
    }

    /// Reads a file's text.
    pub(super) fn file(&mut self, path: &Path, text: &str) {
        let source = Source { path: path.to_owned(), text };
        let (root, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            self.errors.extend(errors.iter().map(|error| ConfigError {
                key: None,
                place: Some(source.place(error.span().unwrap_or_default())),
                message: format!("not valid TOML: {}", error.message()),
                remedy: None,
            }));
            return;
        }
        for (name, value) in root.into_inner() {
            let place = source.place(name.span());
            if let Some(list) = LISTS.iter().find(|list| list.name == name.get_ref().as_ref()) {
                self.entries(&source, list, value.into_inner(), &place);
                continue;
            }
            match (name.get_ref().as_ref(), value.into_inner()) {
                (section, DeValue::Table(table)) => self.section(&source, section, table, &place),
                (section, _) if SECTIONS.iter().any(|s| s.name == section) => self.errors.push(
                    ConfigError::about(section, "is a section, not a value")
                        .fix(format!("write [{section}]"))
                        .at(&place),
                ),
                (key, _) => self.errors.push(unknown(key).at(&place)),
            }
        }
    }

    fn section(&mut self, source: &Source<'_>, section: &str, table: DeTable<'_>, place: &Place) {
        if !SECTIONS.iter().any(|s| s.name == section) {
            self.errors.push(unknown_section(section).at(place));
            return;
        }
        for (name, value) in table {
            let place = source.place(name.span());
            let key = format!("{section}.{}", name.get_ref());
            if keys::find(&key).is_none() {
                self.errors.push(unknown(&key).at(&place));
                continue;
            }
            let value_place = source.place(value.span());
            match Value::deserialize(ValueDeserializer::from(value)) {
                Ok(value) => self.set(key, value, Place { column: value_place.column, ..place }),
                Err(e) => self.errors.push(ConfigError::about(&key, e.message()).at(&value_place)),
            }
        }
    }

    fn entries(&mut self, source: &Source<'_>, list: &List, value: DeValue<'_>, place: &Place) {
        let name = list.name;
        let DeValue::Array(entries) = value else {
            let error = ConfigError::about(name, format!("is a list of {name}s"))
                .fix(format!("write [[{name}]], with two brackets"));
            self.errors.push(error.at(place));
            return;
        };
        for (at, entry) in entries.into_iter().enumerate() {
            let key = format!("{name}[{at}]");
            let entry_place = source.place(entry.span());
            if let DeValue::Table(table) = entry.get_ref() {
                let strange: Vec<ConfigError> = table
                    .keys()
                    .filter(|name| !list.fields.contains(&name.get_ref().as_ref()))
                    .map(|name| unknown_in(&key, name.get_ref(), list.fields).at(&source.place(name.span())))
                    .collect();
                if !strange.is_empty() {
                    self.errors.extend(strange);
                    continue;
                }
            }
            match Value::deserialize(ValueDeserializer::from(entry)) {
                Ok(value) => self.set(key, value, entry_place),
                Err(e) => self.errors.push(ConfigError::about(&key, e.message()).at(&entry_place)),
            }
        }
    }

    /// Reads the environment. Variables without `__` are none of ours (orchestrators set
    /// `EVERLINE_PORT` and the like for a service of that name).
    pub(super) fn environment(&mut self, variables: &mut dyn Iterator<Item = (String, String)>) {
        let mut variables: Vec<(String, String)> = variables
            .filter(|(name, _)| name == "RUST_LOG" || name.starts_with(ENV_PREFIX) && name.contains("__"))
            .collect();
        // RUST_LOG first, so that EVERLINE_LOG__FILTER wins.
        variables.sort_by_key(|(name, _)| (name != "RUST_LOG", name.clone()));
        for (name, text) in variables {
            let key = match name.strip_prefix(ENV_PREFIX) {
                Some(rest) => rest.to_ascii_lowercase().replacen("__", ".", 1),
                None => "log.filter".to_owned(),
            };
            let place = Place { origin: Origin::Env { var: name }, column: None };
            self.text(&key, &text, place);
        }
    }

    /// Reads flags.
    pub(super) fn overrides(&mut self, overrides: &[Override]) {
        for Override { key, value, flag } in overrides {
            self.text(key, value, Place { origin: Origin::Flag { flag: flag.clone() }, column: None });
        }
    }

    fn text(&mut self, key: &str, text: &str, place: Place) {
        if let Some(list) = LISTS.iter().find(|list| list.name == key) {
            match keys::parse_toml(text) {
                Ok(Value::Array(entries)) => {
                    let ours = |setting: &Setting| {
                        keys::list_of(&setting.key).is_some_and(|other| other.name == list.name)
                    };
                    self.settings.retain(|setting| !ours(setting));
                    for (at, entry) in entries.into_iter().enumerate() {
                        self.set(format!("{key}[{at}]"), entry, place.clone());
                    }
                }
                Ok(_) => {
                    self.errors.push(ConfigError::about(key, "must be a list").fix(list.example).at(&place))
                }
                Err(message) => self.errors.push(ConfigError::about(key, message).at(&place)),
            }
            return;
        }
        let Some(doc) = keys::find(key) else {
            self.errors.push(unknown(key).at(&place));
            return;
        };
        match doc.kind.parse(text) {
            Ok(value) => self.set(key.to_owned(), value, place),
            Err(message) => self.errors.push(ConfigError::about(key, message).at(&place)),
        }
    }
}

/// An unknown key, with what may have been meant.
fn unknown(key: &str) -> ConfigError {
    let Some((section, name)) = key.split_once('.') else { return unknown_section(key) };
    match SECTIONS.iter().find(|s| s.name == section) {
        None => {
            let error = unknown_section(section);
            ConfigError { key: Some(key.to_owned()), ..error }
        }
        Some(found) => {
            let names: Vec<&str> = found.keys.iter().map(|k| k.name).collect();
            unknown_in(section, name, &names)
        }
    }
}

fn unknown_in(section: &str, name: &str, names: &[&str]) -> ConfigError {
    let error = ConfigError::about(&format!("{section}.{name}"), "unknown key");
    if let Some(near) = keys::suggest(name, names.iter().copied()) {
        return error.fix(format!("did you mean {near:?}?"));
    }
    match keys::all().find(|key| key.name == name) {
        Some(elsewhere) => error.fix(format!("did you mean {:?}?", elsewhere.dotted())),
        None => error.fix(format!("known here: {}", names.join(", "))),
    }
}

fn unknown_section(name: &str) -> ConfigError {
    let sections: Vec<&str> = SECTIONS.iter().map(|s| s.name).chain(LISTS.iter().map(|l| l.name)).collect();
    let error = ConfigError::about(name, "unknown section");
    if let Some(near) = keys::suggest(name, sections.iter().copied()) {
        return error.fix(format!("did you mean {near:?}?"));
    }
    match keys::all().find(|key| key.name == name) {
        Some(key) => error.fix(format!("did you mean {:?}?", key.dotted())),
        None => error.fix(format!("known are: {}", sections.join(", "))),
    }
}

struct Source<'a> {
    path: PathBuf,
    text: &'a str,
}

impl Source<'_> {
    fn place(&self, span: Range<usize>) -> Place {
        let before = self.text.get(..span.start).unwrap_or(self.text);
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Place { origin: Origin::File { path: self.path.clone(), line }, column: Some(column) }
    }
}
