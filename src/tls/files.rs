//! Reading certificates and keys from PEM files: bounded, and keys only if nobody else can read
//! them; and writing such files.

use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

use super::TlsError;

/// Largest file read: a bundle of several hundred authorities.
const MAX_BYTES: u64 = 1 << 20;
/// Whether a private key of this mode and owner could be read by others than whoever runs this
/// process, or be changed by them.
///
/// A group may read what belongs to root and is read by somebody else: that is how service
/// managers and containers hand a secret to a user who does not own it.
fn is_exposed(mode: u32, owner: u32, me: u32) -> bool {
    let allowed = if owner == 0 && me != 0 { 0o740 } else { 0o700 };
    mode & 0o777 & !allowed != 0
}

/// Reads a file of certificates.
pub fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable =
        |error: std::io::Error| TlsError::Unreadable { path: path.to_owned(), why: error.to_string() };
    read_open(path, File::open(path).map_err(unreadable)?)
}

/// Reads a file with a private key, and refuses one that others can read too.
pub fn read_secret(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable =
        |error: std::io::Error| TlsError::Unreadable { path: path.to_owned(), why: error.to_string() };
    let file = File::open(path).map_err(unreadable)?;
    // Of the open file, so that it is the one that is read.
    let metadata = file.metadata().map_err(unreadable)?;
    let mode = metadata.permissions().mode() & 0o777;
    if is_exposed(mode, metadata.uid(), rustix::process::geteuid().as_raw()) {
        return Err(TlsError::Exposed { path: path.to_owned(), mode });
    }
    read_open(path, file)
}

fn read_open(path: &Path, file: File) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| TlsError::Unreadable { path: path.to_owned(), why: error.to_string() })?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(TlsError::content(path, format!("is larger than {MAX_BYTES} bytes")));
    }
    Ok(bytes)
}

/// Who may read a file that is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Readers {
    /// Its owner only (0600).
    Owner,
    /// Everybody (0644).
    Everybody,
}

/// Writes a file beside the final one, synced, and puts it in its place: whoever reads sees the
/// old or the new one, and never a key with permissions that come later.
pub fn write(path: &Path, text: &str, readers: Readers) -> std::io::Result<()> {
    let mode = match readers {
        Readers::Owner => 0o600,
        Readers::Everybody => 0o644,
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    // What an interrupted writing left behind may have other permissions.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(text.as_bytes())?;
    // Not less than asked for because of the umask.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.sync_all()?;
    fs::rename(&beside, path)
}

/// The certificates in a PEM text, at least one.
pub fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|e| TlsError::content(path, format!("is no PEM file ({e})")))?;
    if found.is_empty() {
        return Err(TlsError::content(path, "has no certificate in it (-----BEGIN CERTIFICATE-----)"));
    }
    Ok(found)
}

/// The authorities in a PEM text.
pub fn roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(|e| TlsError::content(path, e))?;
    }
    Ok(roots)
}

/// A certificate chain and its private key, which must belong together.
pub fn certified_key(cert: (&Path, &[u8]), key: (&Path, &[u8])) -> Result<Arc<CertifiedKey>, TlsError> {
    let chain = certificates(cert.0, cert.1)?;
    let private = PrivateKeyDer::from_pem_slice(key.1)
        .map_err(|_| TlsError::content(key.0, "has no private key in it (-----BEGIN PRIVATE KEY-----)"))?;
    match CertifiedKey::from_der(chain, private, &super::provider()) {
        Ok(both) => Ok(Arc::new(both)),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err(TlsError::content(key.0, format!("is not the key of {}", cert.0.display())))
        }
        Err(other) => Err(TlsError::content(key.0, other)),
    }
}

/// When the first certificate of a chain expires, in seconds since 1970.
pub fn expires(path: &Path, chain: &[CertificateDer<'_>]) -> Result<i64, TlsError> {
    let first = chain.first().ok_or_else(|| TlsError::content(path, "has no certificate in it"))?;
    let (_, parsed) = x509_parser::parse_x509_certificate(first).map_err(|e| TlsError::content(path, e))?;
    Ok(parsed.validity().not_after.timestamp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_for_its_owner_or_handed_over_by_root() {
        let (root, me, other) = (0, 1000, 1001);
        for (mode, owner, reader, exposed) in [
            (0o600, me, me, false),
            (0o400, me, me, false),
            (0o640, me, me, true),
            (0o604, me, me, true),
            (0o620, me, me, true),
            (0o600, root, root, false),
            (0o440, root, root, true),
            (0o440, root, me, false),
            (0o640, root, me, false),
            (0o660, root, me, true),
            (0o444, root, me, true),
            (0o440, other, me, true),
        ] {
            assert_eq!(is_exposed(mode, owner, reader), exposed, "{mode:o} of {owner} read by {reader}");
        }
    }

    #[test]
    fn what_is_written_has_its_permissions_from_the_beginning_and_replaces_the_old() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("k");
        std::fs::write(folder.path().join("k.new"), "left behind, readable by all").unwrap();
        for text in ["first", "second"] {
            write(&path, text, Readers::Owner).unwrap();
            assert_eq!(read_secret(&path).unwrap(), text.as_bytes());
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
