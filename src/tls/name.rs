//! Whose a certificate is: the member and cluster it names, as a URI among its alternative names,
//! `everline://CLUSTER/MEMBER`.

use std::fmt;

use rustls::pki_types::CertificateDer;

/// Before the cluster's name.
const SCHEME: &str = "everline://";
/// Longest name of a cluster or a member; the same rule as for replicas in the configuration.
const MAX_NAME: usize = 63;

/// A member of a cluster, as a certificate names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberName {
    /// The cluster's name, chosen when its authority was made.
    pub cluster: String,
    /// The replica's name.
    pub member: String,
}

/// Whether `name` can be part of a URI as it is: 1 to 63 letters, digits, `-`, `_` or `.`.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.cluster, self.member)
    }
}

/// The URI by which an authority says for which cluster it was made.
pub fn cluster_uri(cluster: &str) -> String {
    format!("{SCHEME}{cluster}")
}

impl MemberName {
    fn parse(uri: &str) -> Option<Self> {
        let (cluster, member) = uri.strip_prefix(SCHEME)?.split_once('/')?;
        (is_name(cluster) && is_name(member))
            .then(|| Self { cluster: cluster.to_owned(), member: member.to_owned() })
    }

    /// The one member that a certificate names. Says nothing about who signed it.
    ///
    /// A certificate that names two members is nobody's: whoever may be one must not become
    /// another by choosing.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let mut names = uris(certificate)?.into_iter().filter(|uri| uri.starts_with(SCHEME));
        match (names.next(), names.next()) {
            (Some(uri), None) => {
                Self::parse(&uri).ok_or_else(|| format!("{uri:?} is not everline://CLUSTER/MEMBER"))
            }
            (None, _) => Err("the certificate names no member (no everline:// name in it)".to_owned()),
            (Some(_), Some(_)) => Err("the certificate names more than one member".to_owned()),
        }
    }
}

/// For which cluster an authority says that it was made.
pub fn cluster_of_authority(certificate: &CertificateDer<'_>) -> Option<String> {
    let uris = uris(certificate).ok()?;
    let cluster = uris.iter().find_map(|uri| uri.strip_prefix(SCHEME))?;
    is_name(cluster).then(|| cluster.to_owned())
}

fn uris(certificate: &CertificateDer<'_>) -> Result<Vec<String>, String> {
    let parsed = webpki::EndEntityCert::try_from(certificate)
        .map_err(|e| format!("the certificate cannot be read ({e})"))?;
    Ok(parsed.valid_uri_names().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_cluster_and_a_member_and_nothing_else() {
        let name = MemberName { cluster: "prod".to_owned(), member: "r-1.a_b".to_owned() };
        assert_eq!(MemberName::parse(&name.to_string()), Some(name));
        for wrong in [
            "everline://prod",
            "everline://prod/",
            "everline:///r1",
            "everline://prod/r1/r2",
            "everline://prod/r1?x",
            "everline://pr od/r1",
            "https://prod/r1",
            "EVERLINE://prod/r1",
        ] {
            assert_eq!(MemberName::parse(wrong), None, "{wrong}");
        }
    }
}
