//! TLS: certificates from files that may change under a running replica, mutual TLS between
//! replicas, TLS on the listeners, and issuing certificates.
//!
//! [`reload`] keeps what was made of a set of files current. [`peer`] decides who may speak on the
//! links between replicas, by the [`name`] in a certificate; [`listener`] is the servers' side for
//! clients and operators. [`issue`] makes a certificate authority and certificates. The only
//! cryptography is rustls with ring.

pub mod files;
pub mod issue;
pub mod listener;
pub mod name;
pub mod peer;
pub mod reload;
#[cfg(test)]
pub(crate) mod testing;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, RootCertStore};

/// What is wrong with a certificate, a key or a file of them. Each names the file.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read {}: {why}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// Others than its owner could read a private key.
    #[error("{} is a private key that others can read (mode {mode:03o}); run: chmod 600 {}", path.display(), path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The file does not hold what it should.
    #[error("{}: {why}", path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl TlsError {
    pub(crate) fn content(path: &Path, why: impl ToString) -> Self {
        Self::Content { path: path.to_owned(), why: why.to_string() }
    }
}

/// The one source of cryptography.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// How this program speaks TLS as a client: to certificates of the authorities in `ca` and to no
/// others, or, without `ca`, to those of Mozilla's list.
///
/// That list is compiled in, so that it is the same on every machine, is there in a container
/// without any files, and nothing but the configuration decides whom we trust. An authority of
/// one's own is always given as a file.
pub fn client_config(ca: Option<&Path>) -> Result<ClientConfig, TlsError> {
    let roots = match ca {
        Some(path) => files::roots(path, &files::read(path)?)?,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        // ring has suites of both versions; this cannot happen with it.
        .map_err(|e| TlsError::content(ca.unwrap_or(Path::new("rustls")), e))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

/// The TLS error at the bottom of an error, if there is one: it is often wrapped in I/O errors.
pub fn cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls);
    }
    match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
        Some(inner) => cause(inner),
        None => cause(error.source()?),
    }
}
