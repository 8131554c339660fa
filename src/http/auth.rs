//! Bearer tokens: only digests are kept, and compared in constant time.

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::errors::{ApiError, Code};

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
        Self(tokens.into_iter().map(|token| Sha256::digest(token).into()).collect())
    }

    /// No token is configured: everybody may.
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Checks `Authorization: Bearer <token>`: 401 without one, 403 with one that is unknown.
    /// `what` names the kind of token for the message.
    pub fn check(&self, headers: &HeaderMap, what: &str) -> Result<(), ApiError> {
        if self.is_open() {
            return Ok(());
        }
        let Some(token) = bearer(headers) else {
            let text = format!("this route needs `Authorization: Bearer <{what} token>`");
            return Err(ApiError::new(Code::Unauthorized, text));
        };
        let digest: [u8; 32] = Sha256::digest(token).into();
        let known = self.0.iter().fold(Choice::from(0), |known, d| known | d.ct_eq(&digest));
        if bool::from(known) {
            return Ok(());
        }
        Err(ApiError::new(Code::Forbidden, format!("this is not a {what} token known here")))
    }
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next()?.as_bytes();
    if values.next().is_some() || value.len() < 7 || !value[..7].eq_ignore_ascii_case(b"bearer ") {
        return None;
    }
    Some(value[7..].trim_ascii()).filter(|token| !token.is_empty())
}
