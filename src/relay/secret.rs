//! What makes stream ids hard to guess and gives a stream to one principal only.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
use rand::Rng as _;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::ids::StreamId;

/// Longest idempotency key, bytes.
pub const MOST_KEY: usize = 255;
/// Longest life of a capability, seconds.
pub const MOST_CAPABILITY_S: u64 = 600;

/// An id nobody has.
pub fn random_id() -> StreamId {
    let mut bits = [0; 17];
    rand::rng().fill_bytes(&mut bits);
    StreamId::from_bits(bits)
}

/// Random bytes for [`crate::state::command::CacheCommand::StreamSecret`].
pub fn random_secret() -> [u8; 32] {
    let mut secret = [0; 32];
    rand::rng().fill_bytes(&mut secret);
    secret
}

fn mac(secret: &[u8; 32], purpose: &str, parts: &[&[u8]]) -> [u8; 32] {
    // Invariant: HMAC takes keys of any length.
    let mut mac = match Hmac::<Sha256>::new_from_slice(secret) {
        Ok(mac) => mac,
        Err(_) => unreachable!("HMAC takes keys of any length"),
    };
    mac.update(purpose.as_bytes());
    for part in parts {
        mac.update(&[0]);
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

/// The id of the stream that a principal asks for under an idempotency key: the same on every
/// replica.
pub fn derived_id(secret: &[u8; 32], principal: &[u8; 16], key: &str) -> StreamId {
    let digest = mac(secret, "stream", &[principal, key.as_bytes()]);
    let mut bits = [0; 17];
    bits.copy_from_slice(&digest[..17]);
    StreamId::from_bits(bits)
}

/// Whose a stream is: of an API key by its name, or of anybody where no keys are asked for.
pub fn principal(key: Option<&str>) -> [u8; 16] {
    let mut digest = Sha256::new();
    digest.update([u8::from(key.is_some())]);
    digest.update(key.unwrap_or_default());
    shortened(digest)
}

/// What was asked.
pub fn request_digest(path: &str, body: &[u8]) -> [u8; 16] {
    let mut digest = Sha256::new();
    digest.update(path);
    digest.update([0]);
    digest.update(body);
    shortened(digest)
}

fn shortened(digest: Sha256) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&digest.finalize()[..16]);
    short
}

/// Whether two digests are the same, in the same time whichever they are.
pub fn same(one: &[u8; 16], other: &[u8; 16]) -> bool {
    one.ct_eq(other).into()
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// A capability to read one stream, until some seconds from now: for clients that cannot send
/// headers.
pub fn capability(secret: &[u8; 32], id: StreamId, seconds: u64) -> String {
    let expires = now_s() + seconds.min(MOST_CAPABILITY_S);
    let digest = mac(secret, "capability", &[id.chars(), &expires.to_be_bytes()]);
    format!("{expires:x}.{}", URL_SAFE_NO_PAD.encode(&digest[..24]))
}

/// Whether a capability is good for a stream, now.
pub fn capability_is_good(secret: &[u8; 32], id: StreamId, text: &str) -> bool {
    let Some((expires, digest)) = text.split_once('.') else { return false };
    let (Ok(expires), Ok(digest)) = (u64::from_str_radix(expires, 16), URL_SAFE_NO_PAD.decode(digest)) else {
        return false;
    };
    let good = mac(secret, "capability", &[id.chars(), &expires.to_be_bytes()]);
    bool::from(good[..24].ct_eq(&digest)) && now_s() <= expires
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capability_is_good_for_its_stream_and_its_time() {
        let (secret, id, other) = ([7; 32], StreamId::from_bits([1; 17]), StreamId::from_bits([2; 17]));
        let text = capability(&secret, id, 60);
        assert!(capability_is_good(&secret, id, &text));
        assert!(!capability_is_good(&secret, other, &text) && !capability_is_good(&[8; 32], id, &text));
        let (expires, digest) = text.split_once('.').unwrap();
        let later = u64::from_str_radix(expires, 16).unwrap() + 1;
        assert!(!capability_is_good(&secret, id, &format!("{later:x}.{digest}")), "its end is signed too");
        let past = {
            let expires = now_s() - 1;
            let digest = mac(&secret, "capability", &[id.chars(), &expires.to_be_bytes()]);
            format!("{expires:x}.{}", URL_SAFE_NO_PAD.encode(&digest[..24]))
        };
        assert!(!capability_is_good(&secret, id, &past));
        for bad in ["", ".", "x.y", "ffffffff", "ffffffffffffffffff.AAAA"] {
            assert!(!capability_is_good(&secret, id, bad), "{bad}");
        }
    }

    #[test]
    fn an_id_is_derived_from_principal_and_key_and_nothing_runs_together() {
        let secret = [7; 32];
        let id = derived_id(&secret, &principal(Some("a")), "k");
        assert_eq!(id, derived_id(&secret, &principal(Some("a")), "k"));
        assert_ne!(id, derived_id(&secret, &principal(Some("b")), "k"));
        assert_ne!(id, derived_id(&secret, &principal(Some("a")), "l"));
        assert_ne!(principal(None), principal(Some("")));
        assert_ne!(request_digest("/a", b"b"), request_digest("/ab", b""));
    }
}
