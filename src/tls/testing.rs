//! A folder of certificates for tests, and a client that shows whichever certificate it likes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::files::{self, Readers, write};
use super::issue::{Authority, CA_CERT, Issued, Subject};
use super::listener::ListenerFiles;
use super::name::MemberName;
use super::peer::{PeerFiles, files_in};

/// An authority of a cluster, with a folder of its certificates.
pub(crate) struct Certs {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) authority: Authority,
    pub(crate) ca: Issued,
    cluster: String,
}

impl Certs {
    pub(crate) fn new(cluster: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (authority, ca) = Authority::new(cluster, 10).unwrap();
        write(&folder.path().join(CA_CERT), &ca.cert, Readers::Everybody).unwrap();
        Self { folder, authority, ca, cluster: cluster.to_owned() }
    }

    pub(crate) fn ca_file(&self) -> PathBuf {
        self.folder.path().join(CA_CERT)
    }

    /// A new certificate of a member of this authority's cluster, or of another one.
    pub(crate) fn of(&self, member: &str, cluster: Option<&str>) -> Issued {
        let name =
            MemberName { cluster: cluster.unwrap_or(&self.cluster).to_owned(), member: member.to_owned() };
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        self.authority.issue(&Subject::Member(name), &names, 5).unwrap()
    }

    /// Writes a new certificate of a member into the folder.
    pub(crate) fn member(&self, member: &str) -> PeerFiles {
        let files = files_in(self.folder.path(), member);
        put(&files, &self.of(member, None));
        files
    }

    /// The same as a server's.
    pub(crate) fn server(&self, name: &str) -> ListenerFiles {
        let PeerFiles { cert, key, .. } = self.member(name);
        ListenerFiles { cert, key }
    }
}

pub(crate) fn put(files: &PeerFiles, issued: &Issued) {
    write(&files.cert, &issued.cert, Readers::Everybody).unwrap();
    write(&files.key, &issued.key, Readers::Owner).unwrap();
}

/// An everyday TLS client, with or without a certificate of its own: knows the authority `ca`.
pub(crate) fn client(ca: &Path, shows: Option<&Issued>, alpn: &[&str]) -> ClientConfig {
    let mut config = super::client_config(Some(ca)).unwrap();
    if let Some(issued) = shows {
        let here = Path::new("here");
        let key =
            files::certified_key((here, issued.cert.as_bytes()), (here, issued.key.as_bytes())).unwrap();
        config.client_auth_cert_resolver = Arc::new(rustls::sign::SingleCertAndKey::from(key));
    }
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

pub(crate) async fn connect(
    config: ClientConfig,
    address: SocketAddr,
) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::IpAddress(address.ip().into());
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

/// The certificate that a server shows.
pub(crate) fn shown(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone()
}

/// A certificate whose time is over.
pub(crate) fn expired(certs: &Certs, member: &str) -> Issued {
    let name = MemberName { cluster: certs.cluster.clone(), member: member.to_owned() };
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(name.to_string().try_into().unwrap()));
    params.extended_key_usages =
        vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = rcgen::date_time_ymd(2020, 1, 1);
    params.not_after = rcgen::date_time_ymd(2021, 1, 1);
    let ca_key = rcgen::KeyPair::from_pem(&certs.ca.key).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&certs.ca.cert, ca_key).unwrap();
    let cert = params.signed_by(&key, &issuer).unwrap();
    Issued { cert: cert.pem(), key: key.serialize_pem() }
}
