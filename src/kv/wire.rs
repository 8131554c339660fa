//! Batches of [`KvOp`]s as bytes: what goes through the log.
//!
//! ```text
//! batch   version:u8 op*
//! op      flags:u8 [count:u32] [parent:u64] [seed:u64] [locals:u64 × count] [names:u64 × count]
//! flags   bits 0-1 kind (0 store, 1 copy, 2 remove, 3 clear), 2-3 tier, 4 parent follows, 5 seed follows
//! ```
//!
//! Little-endian throughout; a stored block takes 16 bytes, as its parent is the one before.

use super::hash::{LocalHash, Seed};
use super::types::{EngineHash, KvOp, Tier};

/// The first byte.
const VERSION: u8 = 1;

const STORE: u8 = 0;
const COPY: u8 = 1;
const REMOVE: u8 = 2;
const CLEAR: u8 = 3;
const PARENT: u8 = 1 << 4;
const SEED: u8 = 1 << 5;

/// Why bytes are not a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WireError {
    /// Written by another version.
    #[error("a batch of KV operations in encoding {0}, which this version does not know")]
    Version(u8),
    /// An operation that does not exist.
    #[error("a batch of KV operations with unknown flags {0:#04x}")]
    Flags(u8),
    /// Ends in the middle.
    #[error("a batch of KV operations that ends in the middle of one")]
    Short,
}

/// An operation without its columns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Head {
    /// [`KvOp::Store`].
    Store {
        /// See there.
        parent: Option<EngineHash>,
        /// See there.
        tier: Tier,
        /// See there.
        seed: Seed,
    },
    /// [`KvOp::Copy`].
    Copy {
        /// See there.
        tier: Tier,
    },
    /// [`KvOp::Remove`].
    Remove {
        /// See there.
        tier: Tier,
    },
    /// [`KvOp::Clear`].
    Clear,
}

/// Encodes a batch.
pub fn encode(ops: &[KvOp]) -> Vec<u8> {
    let bytes = |op: &KvOp| match op {
        KvOp::Store { blocks, .. } => 21 + 16 * blocks.len(),
        KvOp::Copy { blocks, .. } | KvOp::Remove { blocks, .. } => 5 + 8 * blocks.len(),
        KvOp::Clear => 1,
    };
    let mut out = Vec::with_capacity(1 + ops.iter().map(bytes).sum::<usize>());
    out.push(VERSION);
    for op in ops {
        encode_op(op, &mut out);
    }
    out
}

fn encode_op(op: &KvOp, out: &mut Vec<u8>) {
    // Longer lists are cut: a batch is far smaller than that anyway.
    let names = |kind: u8, tier: Tier, blocks: &[EngineHash], out: &mut Vec<u8>| {
        for blocks in blocks.chunks(u32::MAX as usize) {
            out.push(kind | (tier as u8) << 2);
            out.extend_from_slice(&(blocks.len() as u32).to_le_bytes());
            blocks.iter().for_each(|name| out.extend_from_slice(&name.0.to_le_bytes()));
        }
    };
    match op {
        KvOp::Clear => out.push(CLEAR),
        KvOp::Copy { tier, blocks } => names(COPY, *tier, blocks, out),
        KvOp::Remove { tier, blocks } => names(REMOVE, *tier, blocks, out),
        KvOp::Store { parent, tier, seed, blocks } => {
            let mut parent = *parent;
            for blocks in blocks.chunks(u32::MAX as usize) {
                let salted = *seed != Seed::default();
                let told = if parent.is_some() { PARENT } else { 0 } | if salted { SEED } else { 0 };
                out.push(STORE | (*tier as u8) << 2 | told);
                out.extend_from_slice(&(blocks.len() as u32).to_le_bytes());
                parent.iter().for_each(|parent| out.extend_from_slice(&parent.0.to_le_bytes()));
                if salted {
                    out.extend_from_slice(&seed.0.to_le_bytes());
                }
                blocks.iter().for_each(|(local, _)| out.extend_from_slice(&local.0.to_le_bytes()));
                blocks.iter().for_each(|(_, name)| out.extend_from_slice(&name.0.to_le_bytes()));
                parent = blocks.last().map(|(_, name)| *name);
            }
        }
    }
}

/// Decodes a batch.
pub fn decode(bytes: &[u8]) -> Result<Vec<KvOp>, WireError> {
    let (mut locals, mut names, mut ops) = (Vec::new(), Vec::new(), Vec::new());
    let mut reader = Reader::new(bytes)?;
    while let Some(head) = reader.next_into(&mut locals, &mut names)? {
        ops.push(match head {
            Head::Store { parent, tier, seed } => {
                let blocks = locals.iter().copied().zip(names.iter().copied()).collect();
                KvOp::Store { parent, tier, seed, blocks }
            }
            Head::Copy { tier } => KvOp::Copy { tier, blocks: names.clone() },
            Head::Remove { tier } => KvOp::Remove { tier, blocks: names.clone() },
            Head::Clear => KvOp::Clear,
        });
    }
    Ok(ops)
}

/// How many blocks a batch speaks of, if it is well formed.
pub fn check(bytes: &[u8]) -> Result<u64, WireError> {
    let mut reader = Reader::new(bytes)?;
    let mut blocks = 0;
    while let Some((_, count, _)) = reader.next_raw()? {
        blocks += count as u64;
    }
    Ok(blocks)
}

/// An operation, how many blocks it has, and their columns.
type Raw<'a> = (Head, usize, &'a [u8]);

/// Operations one by one, from bytes that are only borrowed.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// At the first operation.
    pub fn new(bytes: &'a [u8]) -> Result<Self, WireError> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => Ok(Self { rest }),
            Some((other, _)) => Err(WireError::Version(*other)),
            None => Err(WireError::Short),
        }
    }

    /// The next operation; its columns replace what is in the lists. Nothing is reserved that the
    /// bytes do not hold.
    pub fn next_into(
        &mut self,
        locals: &mut Vec<LocalHash>,
        names: &mut Vec<EngineHash>,
    ) -> Result<Option<Head>, WireError> {
        locals.clear();
        names.clear();
        let Some((head, count, columns)) = self.next_raw()? else { return Ok(None) };
        let numbers = |column: &'a [u8]| column.as_chunks().0.iter().map(|n| u64::from_le_bytes(*n));
        let columns = match head {
            Head::Store { .. } => {
                let (first, second) = columns.split_at(count * 8);
                locals.extend(numbers(first).map(LocalHash));
                second
            }
            _ => columns,
        };
        names.extend(numbers(columns).map(EngineHash));
        Ok(Some(head))
    }

    fn next_raw(&mut self) -> Result<Option<Raw<'a>>, WireError> {
        let Some((&flags, rest)) = self.rest.split_first() else { return Ok(None) };
        self.rest = rest;
        if flags == CLEAR {
            return Ok(Some((Head::Clear, 0, &[])));
        }
        let kind = flags & 3;
        let tier = match flags >> 2 & 3 {
            0 => Tier::Gpu,
            1 => Tier::Host,
            2 => Tier::Disk,
            _ => return Err(WireError::Flags(flags)),
        };
        let allowed = if kind == STORE { 0b11_1111 } else { 0b1111 };
        if flags & !allowed != 0 || kind == CLEAR {
            return Err(WireError::Flags(flags));
        }
        let count = self.take(4)?;
        let count = u32::from_le_bytes(count.try_into().map_err(|_| WireError::Short)?) as usize;
        let parent = if flags & PARENT != 0 { Some(EngineHash(self.number()?)) } else { None };
        let seed = if flags & SEED != 0 { Seed(self.number()?) } else { Seed::default() };
        let (head, width) = match kind {
            STORE => (Head::Store { parent, tier, seed }, 16),
            COPY => (Head::Copy { tier }, 8),
            _ => (Head::Remove { tier }, 8),
        };
        let columns = self.take(count.checked_mul(width).ok_or(WireError::Short)?)?;
        Ok(Some((head, count, columns)))
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(WireError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64, WireError> {
        let bytes = self.take(8)?;
        Ok(u64::from_le_bytes(bytes.try_into().map_err(|_| WireError::Short)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tier() -> impl Strategy<Value = Tier> {
        prop_oneof![Just(Tier::Gpu), Just(Tier::Host), Just(Tier::Disk)]
    }

    fn op() -> impl Strategy<Value = KvOp> {
        let names = || proptest::collection::vec(any::<u64>().prop_map(EngineHash), 0..9);
        let blocks = proptest::collection::vec(any::<(u64, u64)>(), 0..9)
            .prop_map(|list| list.into_iter().map(|(l, n)| (LocalHash(l), EngineHash(n))).collect());
        let seed = prop_oneof![Just(Seed::default()), any::<u64>().prop_map(Seed)];
        prop_oneof![
            (any::<Option<u64>>(), tier(), seed, blocks).prop_map(|(parent, tier, seed, blocks)| {
                KvOp::Store { parent: parent.map(EngineHash), tier, seed, blocks }
            }),
            (tier(), names()).prop_map(|(tier, blocks)| KvOp::Copy { tier, blocks }),
            (tier(), names()).prop_map(|(tier, blocks)| KvOp::Remove { tier, blocks }),
            Just(KvOp::Clear),
        ]
    }

    /// An empty list says nothing, and is not written.
    fn says_nothing(op: &KvOp) -> bool {
        match op {
            KvOp::Store { blocks, .. } => blocks.is_empty(),
            KvOp::Copy { blocks, .. } | KvOp::Remove { blocks, .. } => blocks.is_empty(),
            KvOp::Clear => false,
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(ops in proptest::collection::vec(op(), 0..9)) {
            let bytes = encode(&ops);
            let expected: Vec<KvOp> = ops.into_iter().filter(|op| !says_nothing(op)).collect();
            prop_assert_eq!(decode(&bytes).unwrap(), expected);
            // No beginning of it is a panic, and it is told whenever it ends within an operation.
            for end in 0..bytes.len() {
                prop_assert_eq!(check(&bytes[..end]).is_ok(), decode(&bytes[..end]).is_ok());
            }
        }

        #[test]
        fn garbage_is_an_error_or_something_but_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut versioned = vec![VERSION];
            versioned.extend(&bytes);
            for bytes in [bytes, versioned] {
                prop_assert_eq!(check(&bytes).is_ok(), decode(&bytes).is_ok());
            }
        }
    }

    #[test]
    fn a_stored_block_takes_sixteen_bytes_and_lengths_that_lie_are_refused() {
        let blocks = vec![(LocalHash(1), EngineHash(2)); 100];
        let store = KvOp::Store { parent: None, tier: Tier::Gpu, seed: Seed::default(), blocks };
        assert_eq!(encode(&[store]).len(), 1 + 5 + 1600);
        assert_eq!(decode(&[VERSION, STORE, 255, 255, 255, 255]), Err(WireError::Short));
        assert_eq!(decode(&[VERSION, REMOVE | PARENT]), Err(WireError::Flags(REMOVE | PARENT)));
        assert_eq!(decode(&[VERSION, 0b1100]), Err(WireError::Flags(0b1100)));
        assert_eq!(decode(&[9]), Err(WireError::Version(9)));
    }
}
