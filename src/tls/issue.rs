//! Issues certificates: an authority for a cluster, and certificates of its members and of other
//! servers. Makes texts; files are up to the caller.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::name::{MemberName, cluster_of_authority, cluster_uri};

/// Name of the authority's certificate in a folder of certificates.
pub const CA_CERT: &str = "ca.crt";
/// Name of the authority's private key there.
pub const CA_KEY: &str = "ca.key";

const DAY: Duration = Duration::from_secs(86_400);
/// Certificates are valid from a little earlier than now, for machines whose clocks are behind.
const BACKDATED: Duration = Duration::from_secs(3600);

/// A certificate and its private key, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate.
    pub cert: String,
    /// The private key.
    pub key: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("cert", &self.cert).finish_non_exhaustive()
    }
}

/// Whose a certificate is to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Subject {
    /// A replica: may speak on the peer links, as client and server, and serve clients.
    Member(MemberName),
    /// A server of this name that is no member, such as a gateway.
    Server(String),
}

/// A cluster's authority that can sign.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    cluster: Option<String>,
}

impl Authority {
    /// Makes an authority for a cluster. Keys are ECDSA P-256.
    pub fn new(cluster: &str, days: u32) -> Result<(Self, Issued), String> {
        let key = KeyPair::generate().map_err(text)?;
        let mut params = params(&format!("Everline CA of {cluster}"), days)?;
        // One certificate below it and no further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(ia5(cluster_uri(cluster))?)];
        let cert = params.self_signed(&key).map_err(text)?;
        let issued = Issued { cert: cert.pem(), key: key.serialize_pem() };
        Ok((Self { issuer: Issuer::new(params, key), cluster: Some(cluster.to_owned()) }, issued))
    }

    /// An authority from its certificate and key.
    pub fn from_pem(cert: &str, key: &str) -> Result<Self, String> {
        let der = CertificateDer::from_pem_slice(cert.as_bytes())
            .map_err(|_| "the authority's certificate cannot be read".to_owned())?;
        let key = KeyPair::from_pem(key).map_err(|e| format!("the authority's key cannot be read ({e})"))?;
        let cluster = cluster_of_authority(&der);
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(text)?;
        Ok(Self { issuer, cluster })
    }

    /// The cluster it was made for; unknown of an authority that was not made here.
    pub fn cluster(&self) -> Option<&str> {
        self.cluster.as_deref()
    }

    /// Issues a certificate with a new key. `names` are host names and addresses under which the
    /// owner is reached.
    pub fn issue(&self, subject: &Subject, names: &[String], days: u32) -> Result<Issued, String> {
        let key = KeyPair::generate().map_err(text)?;
        let common = match subject {
            Subject::Member(name) => &name.member,
            Subject::Server(name) => name,
        };
        let mut params = params(common, days)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.subject_alt_names = names.iter().map(|name| alternative(name)).collect::<Result<_, _>>()?;
        if let Subject::Member(name) = subject {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
            params.subject_alt_names.insert(0, SanType::URI(ia5(name.to_string())?));
        }
        let cert = params.signed_by(&key, &self.issuer).map_err(text)?;
        Ok(Issued { cert: cert.pem(), key: key.serialize_pem() })
    }
}

fn params(common: &str, days: u32) -> Result<CertificateParams, String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Everline");
    params.distinguished_name.push(DnType::CommonName, common);
    let now = SystemTime::now();
    let end = now.checked_add(DAY * days).ok_or("that is too many days")?;
    params.not_before = now.checked_sub(BACKDATED).unwrap_or(now).into();
    params.not_after = end.into();
    Ok(params)
}

/// An address, or a host name in the form that certificates and clients compare.
fn alternative(name: &str) -> Result<SanType, String> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    let host = name.strip_prefix("*.").unwrap_or(name);
    match rustls::pki_types::DnsName::try_from(host) {
        Ok(_) => Ok(SanType::DnsName(ia5(name.to_ascii_lowercase())?)),
        Err(_) => Err(format!("{name:?} is neither a host name nor an address")),
    }
}

fn ia5(text: String) -> Result<Ia5String, String> {
    Ia5String::try_from(text.as_str())
        .map_err(|_| format!("{text:?} has characters that certificates do not"))
}

fn text(error: rcgen::Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_read_back_issues_for_its_cluster() {
        let (_, ca) = Authority::new("prod", 10).unwrap();
        let again = Authority::from_pem(&ca.cert, &ca.key).unwrap();
        assert_eq!(again.cluster(), Some("prod"));
        let me = MemberName { cluster: "prod".into(), member: "r1".into() };
        let issued = again.issue(&Subject::Member(me.clone()), &["10.0.0.1".into(), "R1.example".into()], 5);
        let der = CertificateDer::from_pem_slice(issued.unwrap().cert.as_bytes()).unwrap();
        assert_eq!(MemberName::of(&der), Ok(me));
        let parsed = webpki::EndEntityCert::try_from(&der).unwrap();
        assert_eq!(parsed.valid_dns_names().collect::<Vec<_>>(), ["r1.example"]);
        let address = rustls::pki_types::ServerName::try_from("10.0.0.1").unwrap();
        parsed.verify_is_valid_for_subject_name(&address).unwrap();
    }

    #[test]
    fn a_server_that_is_no_member_names_none() {
        let (ca, _) = Authority::new("prod", 10).unwrap();
        let issued = ca.issue(&Subject::Server("gw".into()), &["gw".into()], 5).unwrap();
        let der = CertificateDer::from_pem_slice(issued.cert.as_bytes()).unwrap();
        assert!(MemberName::of(&der).unwrap_err().contains("names no member"));
        for wrong in ["a b", "http://x", "everline://prod/r1", "", "-.x"] {
            assert!(ca.issue(&Subject::Server("gw".into()), &[wrong.into()], 5).is_err(), "{wrong}");
        }
    }
}
