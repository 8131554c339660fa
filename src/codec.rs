//! Bytes for the log, the disk and the peers: the only place that names bincode.
//!
//! Every encoding starts with one version byte. A reader refuses a version it does not know,
//! trailing bytes, and lengths beyond the input, with an error that says which.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Version of every encoding made by this build.
pub const VERSION: u8 = 1;

/// Largest single value decoded, in bytes: above any frame that is sent (64 MiB), far below
/// what a forged length could ask for.
const LIMIT: usize = 64 << 20;

/// Why bytes could not be read.
#[derive(thiserror::Error, Debug, Clone, PartialEq, Eq)]
pub enum CodecError {
    /// Nothing there.
    #[error("empty input")]
    Empty,
    /// Written by a version of Everline that this one does not know.
    #[error("encoding version {0} is not known to this build (it knows {VERSION}); upgrade this replica")]
    Version(u8),
    /// Not what was expected.
    #[error("malformed: {0}")]
    Malformed(String),
}

/// Encodes a value. Infallible: the types encoded have no maps with unencodable keys and
/// memory is the only writer.
pub fn encode(value: &(impl Serialize + ?Sized)) -> Vec<u8> {
    let mut out = vec![VERSION];
    encode_onto(value, &mut out);
    out
}

fn encode_onto(value: &(impl Serialize + ?Sized), out: &mut Vec<u8>) {
    // Invariant: bincode fails only on a failing writer or on `#[serde(flatten)]`-like shapes of
    // unknown length; neither occurs in a type of this crate (tested for each by round trips).
    if let Err(error) = bincode::serde::encode_into_std_write(value, out, bincode::config::standard()) {
        unreachable!("a replicated type cannot be encoded: {error}");
    }
}

/// Builds the encoding of a `Vec<T>` piece by piece: what `encode(&vec)` gives, without the vec.
#[derive(Debug, Default)]
pub struct ListEncoder {
    count: u64,
    items: Vec<u8>,
}

impl ListEncoder {
    /// Adds an item.
    pub fn push(&mut self, item: &impl Serialize) {
        encode_onto(item, &mut self.items);
        self.count += 1;
    }

    /// Items so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes so far, without the head.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The encoded list; the encoder is empty again.
    pub fn finish(&mut self) -> Vec<u8> {
        let mut out = vec![VERSION];
        encode_onto(&self.count, &mut out);
        out.append(&mut self.items);
        self.count = 0;
        out
    }
}

/// Decodes a value; all bytes must be used up.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (version, rest) = bytes.split_first().ok_or(CodecError::Empty)?;
    if *version != VERSION {
        return Err(CodecError::Version(*version));
    }
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, used) =
        bincode::serde::decode_from_slice(rest, config).map_err(|e| CodecError::Malformed(e.to_string()))?;
    if used != rest.len() {
        return Err(CodecError::Malformed(format!("{} bytes too many", rest.len() - used)));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_it_did_not_write() {
        let bytes = encode(&(7u64, "seven"));
        assert_eq!(decode::<(u64, String)>(&bytes), Ok((7, "seven".to_owned())));
        assert_eq!(decode::<(u64, String)>(&[]), Err(CodecError::Empty));
        let mut newer = bytes.clone();
        newer[0] = VERSION + 1;
        assert_eq!(decode::<(u64, String)>(&newer), Err(CodecError::Version(VERSION + 1)));
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(decode::<(u64, String)>(&longer), Err(CodecError::Malformed(_))));
        assert!(matches!(decode::<(u64, String)>(&bytes[..3]), Err(CodecError::Malformed(_))));
        let mut list = ListEncoder::default();
        list.push(&7u64);
        list.push(&300u64);
        assert_eq!(list.finish(), encode(&vec![7u64, 300]));
        // A length that claims more than there is must not allocate it.
        assert!(decode::<Vec<u64>>(&[VERSION, 253, 255, 255, 255, 255, 255, 255, 255, 127]).is_err());
    }
}
