//! Opens the certificates that a configuration names, so that what is wrong with them is told
//! with the key that names them, before anything listens.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::errors::ConfigError;
use super::schema::Config;
use crate::tls::TlsError;
use crate::tls::listener::{ListenerFiles, ListenerTls};
use crate::tls::peer::PeerTls;

/// The certificates of all listeners, each where it is configured.
#[derive(Clone, Debug, Default)]
pub struct Certificates {
    /// Of the client listener.
    pub http: Option<Arc<ListenerTls>>,
    /// Of the admin listener.
    pub admin: Option<Arc<ListenerTls>>,
    /// Of the links between replicas.
    pub peer: Option<Arc<PeerTls>>,
}

impl Certificates {
    /// Reads and checks them all.
    pub fn open(config: &Config) -> Result<Self, Vec<ConfigError>> {
        let mut errors = Vec::new();
        let handshake = Duration::from_millis(config.http.tls_handshake_timeout_ms);
        let mut listener = |section: &'static str, files: Option<ListenerFiles>| {
            let files = files?;
            let opened = ListenerTls::open(section, &files, handshake);
            let keys = [("tls_cert", &files.cert), ("tls_key", &files.key)];
            opened.map_err(|error| errors.push(about(section, &keys, &error))).ok().map(Arc::new)
        };
        let http = listener("http", config.http.tls());
        let admin = listener("admin", config.admin.tls());
        let peer = config.peer.tls().and_then(|files| {
            let opened = PeerTls::open(&config.replica.name, &files);
            let keys = [("tls_ca", &files.ca), ("tls_cert", &files.cert), ("tls_key", &files.key)];
            opened.map_err(|error| errors.push(about("peer", &keys, &error))).ok().map(Arc::new)
        });
        if errors.is_empty() { Ok(Self { http, admin, peer }) } else { Err(errors) }
    }

    /// When the certificate of each listener expires, in seconds since 1970; as of now, since
    /// they may be replaced.
    pub fn expiries(&self) -> Vec<(&'static str, i64)> {
        let http = self.http.as_ref().map(|tls| ("http", tls.expires()));
        let admin = self.admin.as_ref().map(|tls| ("admin", tls.expires()));
        let peer = self.peer.as_ref().map(|tls| ("peer", tls.expires()));
        [http, admin, peer].into_iter().flatten().collect()
    }
}

/// The error with the key that names the file.
fn about(section: &str, keys: &[(&str, &PathBuf)], error: &TlsError) -> ConfigError {
    let (TlsError::Unreadable { path, .. } | TlsError::Exposed { path, .. } | TlsError::Content { path, .. }) =
        error;
    let key = keys.iter().find(|(_, file)| *file == path).map_or("tls_cert", |(key, _)| key);
    let about = ConfigError::about(&format!("{section}.{key}"), error.to_string());
    match error {
        // The message has the remedy.
        TlsError::Exposed { .. } => about,
        _ => about.fix("`everline certs init` and `everline certs issue` make certificates"),
    }
}
