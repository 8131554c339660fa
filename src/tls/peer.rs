//! Mutual TLS between replicas: both ends show a certificate of the cluster's authority that
//! names a member of the same cluster.
//!
//! Who connects by name accepts that member only; who is connected to learns the member's name
//! and can hold it against what the caller says. Which cluster it is, a replica takes from its
//! own certificate. TLS 1.3 only, since both ends are ours, and no resumption: every connection
//! shows its certificate.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{Acceptor, NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::net::TcpStream;
use tokio_rustls::server::StartHandshake;
use tokio_rustls::{LazyConfigAcceptor, TlsConnector, TlsStream};

use super::name::MemberName;
use super::reload::{Look, Reloading, Source};
use super::{TlsError, files, provider};

/// What the links speak; says no to a browser that strays here.
pub const ALPN: &[u8] = b"h2";
/// The same, on connections for output streams.
pub const ALPN_STREAMS: &[u8] = b"everline-streams";

/// The files a replica's identity is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerFiles {
    /// Certificates of the cluster's authority; more than one while it is replaced.
    pub ca: PathBuf,
    /// This replica's certificate, with intermediate ones after it.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A replica's side of mutual TLS.
#[derive(Debug)]
pub struct PeerTls {
    material: Arc<Reloading<Material>>,
    me: MemberName,
}

/// What is made of one state of the files.
#[derive(Debug)]
struct Material {
    roots: Arc<RootCertStore>,
    key: Arc<CertifiedKey>,
    server: Arc<ServerConfig>,
    me: MemberName,
    expires: i64,
    provider: Arc<CryptoProvider>,
}

impl PeerTls {
    /// Reads the files, which must make this process the member `name` of some cluster.
    pub fn open(name: &str, files: &PeerFiles) -> Result<Self, TlsError> {
        let sources =
            vec![Source::public(&files.ca), Source::public(&files.cert), Source::secret(&files.key)];
        let (name, paths) = (name.to_owned(), files.clone());
        // Once known, the cluster stays: a replica does not change sides by a change of files.
        let cluster = std::sync::OnceLock::new();
        let make = move |contents: &[Vec<u8>]| {
            let material = Material::new(&paths, contents, &name)?;
            if *cluster.get_or_init(|| material.me.cluster.clone()) != material.me.cluster {
                let why = format!("is of another cluster than this replica's ({})", material.me.cluster);
                return Err(TlsError::content(&paths.cert, why));
            }
            Ok(material)
        };
        let material = Arc::new(Reloading::open("peer", sources, make)?);
        let me = material.get().me.clone();
        Ok(Self { material, me })
    }

    /// Who this replica is.
    pub fn me(&self) -> &MemberName {
        &self.me
    }

    /// When this replica's certificate expires, in seconds since 1970.
    pub fn expires(&self) -> i64 {
        self.material.get().expires
    }

    /// Keeps the certificates current; drop the future to stop.
    pub async fn watch(&self) {
        Arc::clone(&self.material).watch().await;
    }

    /// Looks at the files once.
    pub fn look(&self) -> Look {
        self.material.look()
    }

    /// Shows our certificate to whoever listens there and wants to see that of `member`, or of any
    /// member of this cluster; to speak `alpn` with it.
    pub async fn connect(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        member: Option<&str>,
        alpn: &[u8],
    ) -> io::Result<TlsStream<TcpStream>> {
        let config = self.material.get().client(member.map(str::to_owned), alpn);
        let config = config.map_err(io::Error::other)?;
        // An address sends no name: ours are not for others to read.
        let name = ServerName::IpAddress(address.ip().into());
        Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await?.into())
    }

    /// Hears the first words of somebody who has connected, and whether it wants to speak of streams.
    pub async fn hear(stream: TcpStream) -> io::Result<(StartHandshake<TcpStream>, bool)> {
        let begun = LazyConfigAcceptor::new(Acceptor::default(), stream).await?;
        // Of several it gets this one: it is the first of ours.
        let streams = begun.client_hello().alpn().is_some_and(|mut all| all.any(|one| one == ALPN_STREAMS));
        Ok((begun, streams))
    }

    /// Answers somebody who was heard, and says which member of this cluster it is.
    pub async fn accept(
        &self,
        begun: StartHandshake<TcpStream>,
    ) -> io::Result<(TlsStream<TcpStream>, MemberName)> {
        let stream = begun.into_stream(Arc::clone(&self.material.get().server)).await?;
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let name = shown.ok_or("no certificate".to_owned()).and_then(MemberName::of);
        // The verifier has seen it and agreed; there is no way here without one.
        let name = name.map_err(|why| io::Error::new(io::ErrorKind::PermissionDenied, why))?;
        Ok((stream.into(), name))
    }
}

impl Material {
    fn new(paths: &PeerFiles, contents: &[Vec<u8>], name: &str) -> Result<Self, TlsError> {
        let [ca, cert, key] = contents else {
            return Err(TlsError::content(&paths.cert, "three files are needed"));
        };
        let roots = Arc::new(files::roots(&paths.ca, ca)?);
        let key = files::certified_key((&paths.cert, cert), (&paths.key, key))?;
        let wrong = |why: String| TlsError::content(&paths.cert, why);
        let end_entity = &key.cert[0];
        let me = MemberName::of(end_entity).map_err(wrong)?;
        if me.member != name {
            return Err(wrong(format!("is the certificate of {}, but this process is {name}", me.member)));
        }
        let provider = provider();
        let verifier = Verifier::new(&roots, &me.cluster, None, &provider).map_err(wrong)?;
        // Others will judge our own certificate by the same rules: better to know it now.
        verifier.own(&key.cert).map_err(|e| wrong(explain_tls(&e)))?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(e.to_string()))?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&key))));
        server.alpn_protocols = vec![ALPN_STREAMS.to_vec(), ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        let expires = files::expires(&paths.cert, &key.cert)?;
        Ok(Self { roots, key, server: Arc::new(server), me, expires, provider })
    }

    fn client(&self, member: Option<String>, alpn: &[u8]) -> Result<ClientConfig, rustls::Error> {
        let verifier = Verifier::new(&self.roots, &self.me.cluster, member, &self.provider)
            .map_err(rustls::Error::General)?;
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&self.key))));
        config.alpn_protocols = vec![alpn.to_vec()];
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(config)
    }
}

/// Accepts certificates of the cluster's authority that name a member of the cluster, on either
/// end of a connection. Chain, validity, purpose and signatures are judged by webpki.
#[derive(Debug)]
struct Verifier {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    cluster: String,
    /// Only this one.
    member: Option<String>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(
        roots: &Arc<RootCertStore>,
        cluster: &str,
        member: Option<String>,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider)).build();
        Ok(Self {
            roots: Arc::clone(roots),
            clients: clients.map_err(|e| e.to_string())?,
            cluster: cluster.to_owned(),
            member,
            provider: Arc::clone(provider),
        })
    }

    fn judge_name(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let refuse = |why: String| -> rustls::Error {
            CertificateError::Other(OtherError(Arc::new(WrongMember(why)))).into()
        };
        let name = MemberName::of(certificate).map_err(refuse)?;
        if name.cluster != self.cluster {
            return Err(refuse(format!(
                "the certificate is of cluster {}, not of {}",
                name.cluster, self.cluster
            )));
        }
        match &self.member {
            Some(member) if *member != name.member => {
                Err(refuse(format!("the certificate is of {}, not of {member}", name.member)))
            }
            _ => Ok(()),
        }
    }

    /// Judges our own chain as others will, in both of its roles.
    fn own(&self, chain: &[CertificateDer<'_>]) -> Result<(), rustls::Error> {
        let Some((first, rest)) = chain.split_first() else { return Ok(()) };
        let anybody = ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into());
        self.verify_server_cert(first, rest, &anybody, &[], UnixTime::now())?;
        self.verify_client_cert(first, rest, UnixTime::now())?;
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, &self.roots, intermediates, now, algorithms)?;
        self.judge_name(end_entity)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.clients.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.clients.verify_client_cert(end_entity, intermediates, now)?;
        self.judge_name(end_entity)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.clients.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.clients.supported_verify_schemes()
    }
}

/// A certificate that is good, but somebody else's.
#[derive(thiserror::Error, Debug)]
#[error("{0}")]
struct WrongMember(String);

/// What an error of a handshake says, in words.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    super::cause(error).map_or_else(|| error.to_string(), explain_tls)
}

fn explain_tls(error: &rustls::Error) -> String {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => why.to_string(),
        // An authority of the same name, as `everline certs` makes them all, shows by its signature.
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "the certificate is not of the cluster's authority".to_owned(),
        rustls::Error::InvalidMessage(_) => "that is not TLS".to_owned(),
        other => other.to_string(),
    }
}

/// Where a replica's certificates lie in the folder that `everline certs init` fills.
pub fn files_in(folder: &Path, name: &str) -> PeerFiles {
    PeerFiles {
        ca: folder.join(super::issue::CA_CERT),
        cert: folder.join(format!("{name}.crt")),
        key: folder.join(format!("{name}.key")),
    }
}
