//! Credentials in the configuration: `[[key]]` and `[[node_token]]` entries, and the file of keys
//! that is read again while the replica runs.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::path::Path;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use toml::value::Datetime;

use super::errors::{ConfigError, ConfigErrors};
use super::sources::Found;
use super::values::TokenDigest;
use super::{check_alone, read_entry};
use crate::state::worker::WorkerRole;

/// Largest file of keys: some ten thousand keys.
const MAX_KEYS_FILE: u64 = 4 << 20;
/// Longest name of a key or token.
const MAX_ID: usize = 64;

/// A client's API key: an entry of `[[key]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyEntry {
    /// What it is called in logs, metrics and messages.
    pub id: String,
    /// SHA-256 of the secret.
    pub sha256: TokenDigest,
    /// Models it may use, names or beginnings with a `*` behind; all where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Requests a second, at each replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_second: Option<f64>,
    /// Requests that may come at once; a second's worth where left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst: Option<u32>,
    /// Most requests in flight, at each replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_concurrent: Option<u32>,
    /// From when on it is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires: Option<Expiry>,
}

impl KeyEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] =
        &["id", "sha256", "models", "requests_per_second", "burst", "max_concurrent", "expires"];

    /// Requests a second and at once, if they are limited.
    pub fn rate(&self) -> Option<(f64, u32)> {
        let per_second = self.requests_per_second?;
        Some((per_second, self.burst.unwrap_or(per_second.ceil().max(1.0) as u32)))
    }

    /// Says what is wrong with it by itself.
    pub fn check(&self) -> Result<(), String> {
        check_id(&self.id)?;
        if self.models.as_ref().is_some_and(Vec::is_empty) {
            return Err("models is empty: leave it out for all models, or name some".to_owned());
        }
        for model in self.models.iter().flatten() {
            let name = model.strip_suffix('*').unwrap_or(model);
            if model.is_empty() || name.contains('*') {
                return Err(format!(
                    "models: {model:?} must be a name, or the beginning of one with a * behind"
                ));
            }
        }
        if let Some(rate) = self.requests_per_second
            && !(0.001..=1e6).contains(&rate)
        {
            return Err(format!("requests_per_second: {rate} is out of range, allowed are 0.001 to 1000000"));
        }
        if self.burst == Some(0) {
            return Err("burst: must be at least 1".to_owned());
        }
        if self.burst.is_some() && self.requests_per_second.is_none() {
            return Err("burst means nothing without requests_per_second".to_owned());
        }
        if self.max_concurrent == Some(0) {
            return Err("max_concurrent: must be at least 1; to lock a key out take it away".to_owned());
        }
        Ok(())
    }
}

/// A node token bound to networks and roles: an entry of `[[node_token]]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeTokenEntry {
    /// What it is called in messages.
    pub id: String,
    /// SHA-256 of the token.
    pub sha256: TokenDigest,
    /// Networks that it may be used from; all where left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<IpNet>,
    /// Roles that it may register; all where left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub roles: Vec<WorkerRole>,
}

impl NodeTokenEntry {
    /// The names of its fields.
    pub const FIELDS: &[&str] = &["id", "sha256", "networks", "roles"];
}

fn check_id(id: &str) -> Result<(), String> {
    let fits = (1..=MAX_ID).contains(&id.len())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if fits { Ok(()) } else { Err(format!("id: {id:?} must be 1 to {MAX_ID} letters, digits, - _ or .")) }
}

/// A moment, written as RFC 3339 with an offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expiry {
    text: String,
    /// The moment.
    pub at: SystemTime,
}

impl FromStr for Expiry {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} must be a moment with an offset, such as 2027-01-31T12:00:00Z");
        let moment: Datetime = text.parse().map_err(|_| wrong())?;
        let (Some(date), Some(time), Some(offset)) = (moment.date, moment.time, moment.offset) else {
            return Err(wrong());
        };
        let offset_minutes = match offset {
            toml::value::Offset::Z => 0,
            toml::value::Offset::Custom { minutes } => i64::from(minutes),
        };
        let days = days_since_1970(i64::from(date.year), i64::from(date.month), i64::from(date.day));
        let (hour, minute) = (i64::from(time.hour), i64::from(time.minute));
        let minutes = (days * 24 + hour) * 60 + minute - offset_minutes;
        let seconds = minutes * 60 + i64::from(time.second.unwrap_or(0));
        let seconds = u64::try_from(seconds).map_err(|_| format!("{text:?} lies before 1970"))?;
        Ok(Self { text: text.to_owned(), at: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) })
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar, counted in years that begin in March
/// so that the leap day comes last.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    365 * year + leap_days + day_of_year - 719_468
}

impl fmt::Display for Expiry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Expiry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Expiry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bare(Datetime),
            Quoted(String),
        }
        let text = match Written::deserialize(deserializer) {
            Ok(Written::Bare(moment)) => moment.to_string(),
            Ok(Written::Quoted(text)) => text,
            Err(_) => {
                return Err(de::Error::custom("expires must be a moment, such as 2027-01-31T12:00:00Z"));
            }
        };
        text.parse().map_err(de::Error::custom)
    }
}

/// Everything wrong with keys, `name` being what their list is called.
pub(super) fn key_problems<'a>(
    entries: impl IntoIterator<Item = (String, &'a KeyEntry)>,
) -> Vec<ConfigError> {
    let mut problems = Vec::new();
    let mut ids = BTreeMap::new();
    // Keys are found by the first half of the digest's digits; two that begin alike would hide
    // each other, whether or not they are the same.
    let mut digests = BTreeMap::new();
    for (place, entry) in entries {
        if let Err(message) = entry.check() {
            problems.push(ConfigError::about(&place, message));
        }
        if let Some(first) = ids.insert(&entry.id, place.clone()) {
            problems.push(
                ConfigError::about(&place, format!("has the id {} of {first}", entry.id))
                    .fix("give each key an id of its own"),
            );
        }
        let beginning: [u8; 8] = std::array::from_fn(|at| entry.sha256.0[at]);
        if let Some(first) = digests.insert(beginning, place.clone()) {
            problems.push(
                ConfigError::about(&place, format!("has the sha256 of {first}"))
                    .fix("make a secret of its own: everline keys new ID"),
            );
        }
    }
    problems
}

/// Everything wrong with bound node tokens.
pub(super) fn node_token_problems(entries: &[NodeTokenEntry]) -> Vec<ConfigError> {
    let mut problems = Vec::new();
    let mut ids = BTreeMap::new();
    for (at, entry) in entries.iter().enumerate() {
        let place = format!("node_token[{at}]");
        if let Err(message) = check_id(&entry.id) {
            problems.push(ConfigError::about(&place, message));
        }
        if let Some(first) = ids.insert(&entry.id, at) {
            let message = format!("has the id {} of node_token[{first}]", entry.id);
            problems.push(ConfigError::about(&place, message).fix("give each token an id of its own"));
        }
        if entries[..at].iter().any(|other| other.sha256 == entry.sha256) {
            problems.push(ConfigError::about(&place, "has the sha256 of another node token"));
        }
    }
    problems
}

/// Reads `http.keys_file`: `[[key]]` entries and nothing else, none of which is among `given`, the
/// keys of the configuration itself.
pub fn read_keys_file(path: &Path, given: &[KeyEntry]) -> Result<Vec<KeyEntry>, ConfigErrors> {
    let mut text = String::new();
    let read =
        std::fs::File::open(path).and_then(|file| file.take(MAX_KEYS_FILE + 1).read_to_string(&mut text));
    let unreadable = |why: String| {
        let error = ConfigError::about("http.keys_file", format!("cannot read {}: {why}", path.display()));
        ConfigErrors(vec![error.fix("it holds [[key]] entries: everline keys new ID")])
    };
    match read {
        Err(error) => Err(unreadable(error.to_string())),
        Ok(length) if length as u64 > MAX_KEYS_FILE => {
            Err(unreadable(format!("it is larger than {MAX_KEYS_FILE} bytes")))
        }
        Ok(_) => parse_keys(path, &text, given),
    }
}

/// The same for a text already read.
pub fn parse_keys(path: &Path, text: &str, given: &[KeyEntry]) -> Result<Vec<KeyEntry>, ConfigErrors> {
    let mut found = Found::default();
    found.file(path, text);
    let Found { settings, mut errors } = found;
    let mut keys = Vec::new();
    let mut places = BTreeMap::new();
    for setting in settings {
        if !setting.key.starts_with("key[") {
            let error = ConfigError::about(&setting.key, "has no place in a file of keys");
            errors.push(error.fix("write [[key]] entries only").at(&setting.place));
            continue;
        }
        match check_alone(&setting.key, &setting.value).and_then(|()| read_entry(&setting.key, setting.value))
        {
            Ok(key) => keys.push((setting.key.clone(), key)),
            Err(error) => errors.push(error.at(&setting.place)),
        }
        places.insert(setting.key, setting.place);
    }
    let given = given.iter().enumerate().map(|(at, key)| (format!("key[{at}] of the configuration"), key));
    let all = given.chain(keys.iter().map(|(place, key): &(String, KeyEntry)| (place.clone(), key)));
    for mut error in key_problems(all) {
        error.place = error.key.as_ref().and_then(|key| places.get(key)).cloned();
        errors.push(error);
    }
    if errors.is_empty() {
        Ok(keys.into_iter().map(|(_, key)| key).collect())
    } else {
        Err(ConfigErrors(errors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unix(text: &str) -> u64 {
        let expiry: Expiry = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
        expiry.at.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
    }

    #[test]
    fn moments_are_read_in_every_offset() {
        assert_eq!(unix("1970-01-01T00:00:00Z"), 0);
        assert_eq!(unix("2000-02-29T12:00:00Z"), 951_825_600);
        assert_eq!(unix("2000-03-01T00:00:00+01:00"), 951_865_200);
        assert_eq!(unix("2027-01-31T12:00:00-05:30"), 1_801_416_600);
        assert_eq!(unix("2100-03-01T00:00:00Z"), 4_107_542_400);
        assert_eq!(unix("2027-01-31 12:00:00.5Z"), 1_801_396_800);
        for wrong in ["", "2027-01-31", "12:00:00Z", "2027-01-31T12:00:00", "2027-13-01T00:00:00Z", "soon"] {
            assert!(wrong.parse::<Expiry>().is_err(), "{wrong}");
        }
        assert!("1969-12-31T23:59:59Z".parse::<Expiry>().is_err());
    }

    fn parse(text: &str) -> Result<Vec<KeyEntry>, String> {
        parse_keys(Path::new("keys.toml"), text, &[]).map_err(|errors| errors.to_string())
    }

    fn entry(id: &str, rest: &str) -> String {
        format!("[[key]]\nid = \"{id}\"\nsha256 = \"{}\"\n{rest}\n", TokenDigest::of(id))
    }

    #[test]
    fn a_file_of_keys_is_read_whole() {
        let rest = "models = [\"m\", \"llama-*\"]\nrequests_per_second = 5\nburst = 9\nmax_concurrent = 3\n\
                    expires = 2027-01-31T12:00:00Z";
        let keys = parse(
            &(entry("a", rest)
                + &entry("b", "requests_per_second = 0.5\nexpires = \"2027-01-31T12:00:00Z\"")),
        )
        .unwrap();
        assert_eq!((keys.len(), keys[0].rate(), keys[1].rate()), (2, Some((5.0, 9)), Some((0.5, 1))));
        assert_eq!(keys[0].expires.as_ref().map(|e| e.at), keys[1].expires.as_ref().map(|e| e.at));
        assert_eq!(parse(""), Ok(Vec::new()));
    }

    #[test]
    fn what_is_wrong_in_a_file_of_keys_is_told_with_its_line() {
        for (text, says) in [
            ("[http]\nmax_headers = 64\n".to_owned(), "keys.toml:2:15: http.max_headers: has no place"),
            (
                entry("a", "modles = []"),
                "keys.toml:4:1: key[0].modles: unknown key\n    did you mean \"models\"",
            ),
            (entry("a", "models = []"), "models is empty"),
            (entry("a", "models = [\"a*b\"]"), "with a * behind"),
            (entry("a", "requests_per_second = 0"), "out of range"),
            (entry("a", "requests_per_second = nan"), "out of range"),
            (entry("a", "burst = 2"), "means nothing without"),
            (entry("a", "max_concurrent = 0"), "at least 1"),
            (entry("a", "expires = 2027-01-31"), "with an offset"),
            (entry("a b", ""), "letters, digits"),
            (entry("a", "") + &entry("a", ""), "has the id a of key[0]"),
            ("[[key]]\nid = \"a\"\nsha256 = \"12\"\n".to_owned(), "64 hexadecimal digits"),
            ("[[key]]\nid = \"a\"\n".to_owned(), "sha256"),
            ("[[key]\n".to_owned(), "not valid TOML"),
        ] {
            let error = parse(&text).unwrap_err();
            assert!(error.contains(says), "{error}\nlacks {says}");
            assert!(error.contains("keys.toml:"), "{error}");
        }
        let given = parse(&entry("a", "")).unwrap();
        let twice = parse_keys(Path::new("keys.toml"), &entry("a", ""), &given).unwrap_err().to_string();
        assert!(twice.contains("of the configuration"), "{twice}");
    }
}
