//! Credentials as they are sent: tokens of nodes and operators, and how a secret is taken out of
//! a request. Only digests are kept, and compared in constant time.

use std::net::IpAddr;
use std::sync::Arc;

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use ipnet::IpNet;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::errors::{ApiError, Code};
use crate::state::worker::{WorkerRecord, WorkerRole};

/// Where Anthropic's clients put their key.
pub(super) static API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Longest secret that is looked at. Ours have about 50 bytes; the bound keeps a head full of
/// secret from costing more than a head.
const MAX_SECRET: usize = 1024;

/// What a request shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shown<'a> {
    /// No credential.
    Nothing,
    /// Something that names no single secret: another scheme, several headers, nothing in them.
    Unclear,
    /// A secret.
    Secret(&'a [u8]),
}

/// The secret of `Authorization: Bearer`, and no other header.
fn bearer(headers: &HeaderMap) -> Shown<'_> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Shown::Nothing };
    let value = value.as_bytes();
    if values.next().is_some() || value.len() < 7 || !value[..7].eq_ignore_ascii_case(b"bearer ") {
        return Shown::Unclear;
    }
    of_bytes(value[7..].trim_ascii())
}

fn of_bytes(secret: &[u8]) -> Shown<'_> {
    if (1..=MAX_SECRET).contains(&secret.len()) { Shown::Secret(secret) } else { Shown::Unclear }
}

/// The secret of `Authorization: Bearer` or `x-api-key`; both only if they agree.
pub(super) fn client_secret(headers: &HeaderMap) -> Shown<'_> {
    let mut keys = headers.get_all(&API_KEY).iter();
    let by_key = match (keys.next(), keys.next()) {
        (None, _) => return bearer(headers),
        (Some(key), None) => of_bytes(key.as_bytes().trim_ascii()),
        (Some(_), Some(_)) => Shown::Unclear,
    };
    match bearer(headers) {
        Shown::Nothing => by_key,
        same if same == by_key => by_key,
        _ => Shown::Unclear,
    }
}

/// SHA-256 of a secret.
pub(super) fn digest_of(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

/// Digest of the bearer token of a request to a route that needs one of this kind.
fn shown_digest(headers: &HeaderMap, what: &str) -> Result<[u8; 32], ApiError> {
    match bearer(headers) {
        Shown::Secret(token) => Ok(digest_of(token)),
        Shown::Nothing | Shown::Unclear => {
            let text = format!("this route needs one header `Authorization: Bearer <{what} token>`");
            Err(ApiError::new(Code::Unauthorized, text))
        }
    }
}

fn unknown_token(what: &str) -> ApiError {
    ApiError::new(Code::Forbidden, format!("no {what} token known here is like this one"))
}

/// SHA-256 digests of accepted tokens.
#[derive(Clone, Default)]
pub struct TokenDigests(Vec<[u8; 32]>);

impl std::fmt::Debug for TokenDigests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TokenDigests({})", self.0.len())
    }
}

impl TokenDigests {
    /// Accepts these.
    pub fn new(digests: Vec<[u8; 32]>) -> Self {
        Self(digests)
    }

    /// Digests tokens; for tests and tools, configuration holds digests.
    pub fn of_tokens<'a>(tokens: impl IntoIterator<Item = &'a str>) -> Self {
        Self(tokens.into_iter().map(|token| digest_of(token.as_bytes())).collect())
    }

    /// No token is configured.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn has(&self, digest: &[u8; 32]) -> bool {
        // All are compared, whether one fits or not.
        self.0.iter().fold(Choice::from(0), |known, d| known | d.ct_eq(digest)).into()
    }

    /// Checks an operator's `Authorization: Bearer <token>`: 401 without one, 403 with one that
    /// is unknown, anybody if no token is configured.
    pub(super) fn check_admin(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        if self.is_empty() {
            return Ok(());
        }
        let digest = shown_digest(headers, "admin")?;
        if self.has(&digest) { Ok(()) } else { Err(unknown_token("admin")) }
    }
}

/// A node token that is good in some networks and for some roles only.
#[derive(Clone, Debug)]
pub struct NodeToken {
    /// What it is called in messages and logs.
    pub id: String,
    /// SHA-256 of the token.
    pub digest: [u8; 32],
    /// Networks that it may be used from; empty for all.
    pub networks: Vec<IpNet>,
    /// Roles that it may register; empty for all.
    pub roles: Vec<WorkerRole>,
}

/// What a request on the node plane may do.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeGrant {
    token: Option<Arc<NodeToken>>,
    /// What the token is called; `None` where none is needed.
    pub(super) owner: Option<String>,
}

impl NodeGrant {
    /// Whether it may speak for a worker. Once the worker is offline anybody with a good token
    /// may have its name.
    pub(super) fn check_owner(&self, worker: &WorkerRecord) -> Result<(), ApiError> {
        if !worker.online || worker.spec.is_owned_by(self.owner.as_deref()) {
            return Ok(());
        }
        let text = format!("worker {} is online and was registered with another node token", worker.spec.id);
        Err(ApiError::new(Code::TokenNotForThis, text).param("id"))
    }

    /// Whether it may register, take back or speak for a worker of this role.
    pub(super) fn check_role(&self, role: WorkerRole) -> Result<(), ApiError> {
        let Some(token) = &self.token else { return Ok(()) };
        if token.roles.is_empty() || token.roles.contains(&role) {
            return Ok(());
        }
        let names: Vec<&str> = token.roles.iter().map(|role| role.name()).collect();
        let (id, names) = (&token.id, names.join(", "));
        let text = format!("the node token {id} is for workers of the roles {names}, not {}", role.name());
        Err(ApiError::new(Code::TokenNotForThis, text).param("role"))
    }
}

/// All node tokens of a replica.
#[derive(Clone, Debug, Default)]
pub(super) struct NodeTokens {
    unbound: TokenDigests,
    bound: Vec<Arc<NodeToken>>,
}

impl NodeTokens {
    pub(super) fn new(unbound: TokenDigests, bound: Vec<NodeToken>) -> Self {
        Self { unbound, bound: bound.into_iter().map(Arc::new).collect() }
    }

    /// Checks a node's `Authorization: Bearer <token>` as [`TokenDigests::check_admin`] does, and
    /// that `peer` lies in the networks of the token.
    pub(super) fn check(&self, headers: &HeaderMap, peer: IpAddr) -> Result<NodeGrant, ApiError> {
        if self.unbound.is_empty() && self.bound.is_empty() {
            return Ok(NodeGrant::default());
        }
        let digest = shown_digest(headers, "node")?;
        let mut found = None;
        for token in &self.bound {
            if token.digest.ct_eq(&digest).into() {
                found = Some(token);
            }
        }
        let Some(token) = found else {
            if !self.unbound.has(&digest) {
                return Err(unknown_token("node"));
            }
            // Such a token has no name; the beginning of its digest tells it from others.
            let [a, b, c, d, ..] = digest;
            let owner = Some(format!("sha256:{a:02x}{b:02x}{c:02x}{d:02x}"));
            return Ok(NodeGrant { token: None, owner });
        };
        let peer = peer.to_canonical();
        if !token.networks.is_empty() && !token.networks.iter().any(|network| network.contains(&peer)) {
            let text = format!("the node token {} may not be used from {peer}", token.id);
            return Err(ApiError::new(Code::TokenNotForThis, text));
        }
        Ok(NodeGrant { token: Some(Arc::clone(token)), owner: Some(token.id.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn one_secret_is_taken_from_either_header_and_doubt_is_refused() {
        let shown = |pairs: &[(&HeaderName, &str)]| match client_secret(&headers(pairs)) {
            Shown::Secret(secret) => String::from_utf8(secret.to_vec()).unwrap(),
            other => format!("{other:?}"),
        };
        assert_eq!(shown(&[]), "Nothing");
        assert_eq!(shown(&[(&AUTHORIZATION, "Bearer s")]), "s");
        assert_eq!(shown(&[(&AUTHORIZATION, "bEARER   s ")]), "s");
        assert_eq!(shown(&[(&API_KEY, " s ")]), "s");
        assert_eq!(shown(&[(&API_KEY, "s"), (&AUTHORIZATION, "Bearer s")]), "s");
        let long = "x".repeat(MAX_SECRET + 1);
        for unclear in [
            &[(&AUTHORIZATION, "Bearer s"), (&AUTHORIZATION, "Bearer s")][..],
            &[(&API_KEY, "s"), (&API_KEY, "s")],
            &[(&API_KEY, "s"), (&AUTHORIZATION, "Bearer t")],
            &[(&API_KEY, "s"), (&AUTHORIZATION, "Basic s")],
            &[(&AUTHORIZATION, "Bearer")],
            &[(&AUTHORIZATION, "Bearer ")],
            &[(&AUTHORIZATION, "Basic czpz")],
            &[(&AUTHORIZATION, "s")],
            &[(&API_KEY, "")],
            &[(&API_KEY, &long)],
        ] {
            assert_eq!(shown(unclear), "Unclear", "{unclear:?}");
        }
    }

    #[test]
    fn a_bound_token_is_good_in_its_networks_and_for_its_roles_only() {
        let token = NodeToken {
            id: "gpus".into(),
            digest: digest_of(b"t"),
            networks: vec!["10.0.0.0/8".parse().unwrap()],
            roles: vec![WorkerRole::Decode],
        };
        let tokens = NodeTokens::new(TokenDigests::of_tokens(["free"]), vec![token]);
        let check = |token: &str, peer: &str| {
            tokens.check(&headers(&[(&AUTHORIZATION, &format!("Bearer {token}"))]), peer.parse().unwrap())
        };
        let code = |result: Result<NodeGrant, ApiError>| result.map(|_| ()).map_err(|error| error.code);
        assert_eq!(code(check("t", "192.168.0.1")), Err(Code::TokenNotForThis));
        assert_eq!(code(check("x", "10.0.0.1")), Err(Code::Forbidden));
        let grant = check("t", "::ffff:10.0.0.1").unwrap();
        assert!(grant.check_role(WorkerRole::Decode).is_ok());
        assert_eq!(grant.check_role(WorkerRole::Prefill).unwrap_err().code, Code::TokenNotForThis);
        assert!(check("free", "8.8.8.8").unwrap().check_role(WorkerRole::Prefill).is_ok());
    }
}
