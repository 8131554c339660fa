//! `everline keys`

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Read as _};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRng as _;
use rand::rngs::SysRng;

use super::client::{Listing, block_on};
use super::output::{Failure, Out};
use super::table::{duration, render};
use crate::admin_types::{KeyStatus, KeysReply};
use crate::config::{Expiry, KeyEntry, TokenDigest};

/// Longest secret read from standard input.
const MAX_SECRET: u64 = 4096;

/// Make and list API keys of clients
///
/// Examples:
///   everline keys new team-a                                prints the secret once, and what to configure
///   everline keys new team-b --models 'llama-*' --rps 10
///   printf %s "$SECRET" | everline keys hash
///   everline keys list
#[derive(clap::Args, Debug)]
#[command(verbatim_doc_comment)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make a key: prints its secret, which is kept nowhere, and the entry for the configuration
    New(Box<New>),
    /// Read a secret from standard input and print its SHA-256 digest
    Hash,
    /// List the keys in force at a replica, and what they have used
    List {
        #[command(flatten)]
        listing: Listing,
    },
}

#[derive(clap::Args, Debug)]
struct New {
    /// What the key is called in logs, metrics and messages
    id: String,
    /// Models it may use, comma separated; a * at the end stands for anything [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    models: Vec<String>,
    /// Requests a second, at each replica [default: no limit]
    #[arg(long, value_name = "N")]
    rps: Option<f64>,
    /// Requests that may come at once [default: a second's worth]
    #[arg(long, value_name = "N", requires = "rps")]
    burst: Option<u32>,
    /// Most requests in flight, at each replica [default: no limit]
    #[arg(long, value_name = "N")]
    max_concurrent: Option<u32>,
    /// From when on it is refused, such as 2099-12-31T00:00:00Z [default: never]
    #[arg(long, value_name = "MOMENT")]
    expires: Option<Expiry>,
}

impl Args {
    pub(crate) fn run(self, out: &mut Out) -> Result<(), Failure> {
        match self.command {
            Command::New(new) => {
                let (secret, entry) = new.make()?;
                out.write(&made(&secret, &entry))
            }
            Command::Hash => out.line(&TokenDigest::of(&read_secret()?).to_string()),
            Command::List { listing } => block_on(async {
                let reply: KeysReply = listing.get("/v1/admin/keys").await?;
                match (listing.json, reply.required) {
                    (true, _) => out.json(&reply),
                    (false, false) => {
                        out.line("clients need no key here; make the first one: everline keys new ID")
                    }
                    (false, true) => out.line(&table(&reply.keys, out)),
                }
            }),
        }
    }
}

impl New {
    fn make(self) -> Result<(String, KeyEntry), Failure> {
        let mut bytes = [0; 32];
        SysRng
            .try_fill_bytes(&mut bytes)
            .map_err(|e| Failure::Failed(format!("the operating system gives no random bytes: {e}")))?;
        let secret = format!("ev_{}_{}", self.id, URL_SAFE_NO_PAD.encode(bytes));
        let entry = KeyEntry {
            sha256: TokenDigest::of(&secret),
            id: self.id,
            models: Some(self.models).filter(|models| !models.is_empty()),
            requests_per_second: self.rps,
            burst: self.burst,
            max_concurrent: self.max_concurrent,
            expires: self.expires,
        };
        entry.check().map_err(Failure::Usage)?;
        Ok((secret, entry))
    }
}

/// What is printed for a new key. The secret is on a line of its own, all others are TOML, so
/// that the output without that line can go into the file of keys.
fn made(secret: &str, entry: &KeyEntry) -> String {
    let fields = toml::Table::try_from(entry).unwrap_or_default();
    // In the order of the documentation, not of the alphabet.
    let fields = KeyEntry::FIELDS.iter().filter_map(|name| Some((name, fields.get(*name)?)));
    let mut text = format!(
        "# The secret, for the client. It is shown this once and kept nowhere:\n\n{secret}\n\n\
         # For http.keys_file, or the configuration of every replica:\n\n[[key]]\n"
    );
    for (name, value) in fields {
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{name} = {value}");
    }
    text
}

fn read_secret() -> Result<String, Failure> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        eprintln!("type the secret, then Enter and Ctrl-D");
    }
    let mut text = String::new();
    stdin
        .lock()
        .take(MAX_SECRET + 1)
        .read_to_string(&mut text)
        .map_err(|e| Failure::Usage(format!("the secret cannot be read from standard input: {e}")))?;
    let secret = text.trim();
    if secret.is_empty() || text.len() as u64 > MAX_SECRET || secret.contains(char::is_whitespace) {
        let text =
            format!("expected one secret on standard input, without spaces, at most {MAX_SECRET} bytes");
        return Err(Failure::Usage(text));
    }
    Ok(secret.to_owned())
}

fn table(keys: &[KeyStatus], out: &Out) -> String {
    if keys.is_empty() {
        return "no key is in force: nobody gets in; make one: everline keys new ID".to_owned();
    }
    let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
    let now = now.map_or(0, |now| now.as_secs());
    let row = |key: &KeyStatus| {
        let expires = match key.expires_unix_s {
            None => "never".to_owned(),
            Some(_) if key.expired => "expired".to_owned(),
            Some(at) => format!("in {}", duration(at.saturating_sub(now) * 1000)),
        };
        vec![
            key.id.clone(),
            key.models.as_ref().map_or("all".to_owned(), |models| models.join(", ")),
            expires,
            key.in_flight.to_string(),
            key.admitted.to_string(),
            key.limited.to_string(),
        ]
    };
    let rows = keys.iter().map(row).collect();
    render(&["KEY", "MODELS", "EXPIRES", ">IN FLIGHT", ">LET IN", ">LIMITED"], rows, out.paint())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::parse_keys;

    fn new(id: &str) -> New {
        New { id: id.into(), models: Vec::new(), rps: None, burst: None, max_concurrent: None, expires: None }
    }

    #[test]
    fn what_is_printed_can_be_pasted_and_fits_the_secret() {
        let wanted = New {
            models: vec!["a".into(), "b*".into()],
            rps: Some(2.5),
            expires: "2099-12-31T00:00:00Z".parse().ok(),
            ..new("team-a")
        };
        let (secret, entry) = wanted.make().unwrap();
        let printed = made(&secret, &entry);
        let pasted: Vec<&str> = printed.lines().filter(|line| *line != secret).collect();
        let read = parse_keys(Path::new("keys.toml"), &pasted.join("\n"), &[]).unwrap();
        assert_eq!(read, [entry]);
        assert_eq!(read[0].sha256, TokenDigest::of(&secret));
        assert_eq!(read[0].rate(), Some((2.5, 3)));
    }

    #[test]
    fn secrets_are_long_recognisable_and_never_the_same() {
        let (one, _) = new("a.b_c").make().unwrap();
        let (two, _) = new("a.b_c").make().unwrap();
        let random = one.strip_prefix("ev_a.b_c_").unwrap();
        assert_eq!(random.len(), 43);
        assert!(random.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)), "{random}");
        assert_ne!(one, two);
        assert!(matches!(new("a b").make(), Err(Failure::Usage(_))));
    }
}
