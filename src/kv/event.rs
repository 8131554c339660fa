//! Decoding what engines publish of their KV cache: MessagePack in, [`KvOp`]s out.
//!
//! vLLM and SGLang send batches `[time, [event…], rank]`, with events as lists (older) or as maps
//! (newer) whose fields grew over the years. All of it is read: fields that are missing have
//! their default, fields that are not known are passed over. What cannot be used is skipped and
//! counted by reason, event by event; only a batch that is no batch at all is an error.
//!
//! **Invariant:** no input panics or makes it allocate more than a small multiple of its length.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64;

use super::hash::{LocalHash, Seed, local_hash};
use super::msgpack::{Reader, Unreadable, Value};
use super::types::{EngineHash, KvOp, Tier};

/// What of a feed is followed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Format {
    /// Tokens in a block; entries of any other size are pieces of blocks and skipped.
    pub block_size: u32,
    /// Which group of a hybrid model's caches; an event without a group is of any.
    pub group: u64,
}

/// How many events were not used, and why.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Skipped {
    /// Of a type that is not known.
    pub unknown: u64,
    /// Pieces of blocks, or of an engine with another block size than configured.
    pub block_size: u64,
    /// Of another group of caches.
    pub group: u64,
    /// Tokens in pairs (speculative decoding with EAGLE).
    pub pairs: u64,
    /// Lacking a field, or with one that makes no sense.
    pub malformed: u64,
}

impl Skipped {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.unknown + self.block_size + self.group + self.pairs + self.malformed
    }

    /// Adds another batch's.
    pub fn add(&mut self, other: &Self) {
        self.unknown += other.unknown;
        self.block_size += other.block_size;
        self.group += other.group;
        self.pairs += other.pairs;
        self.malformed += other.malformed;
    }
}

/// One decoded batch.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Decoded {
    /// What happened, in order.
    pub ops: Vec<KvOp>,
    /// The DP rank that the batch says it is of.
    pub rank: Option<u32>,
    /// What was left out.
    pub skipped: Skipped,
    /// Events in the batch, used or not.
    pub events: u64,
    /// Blocks stored or copied.
    pub stored: u64,
}

/// Reads a batch without making anything of it: is it one, and of which DP rank?
pub fn skim(payload: &[u8]) -> Result<Option<u32>, Unreadable> {
    let mut reader = Reader::new(payload);
    let parts = batch_head(&mut reader)?;
    reader.skip()?;
    let rank = if parts > 2 { rank(reader.value()?) } else { None };
    Ok(rank)
}

/// Passes the time and returns how many parts the batch has, with its events next.
fn batch_head(reader: &mut Reader<'_>) -> Result<usize, Unreadable> {
    let parts = reader.list()?;
    if parts < 2 {
        return Err(Unreadable::Type);
    }
    match reader.value()? {
        Value::Float(_) | Value::Int { .. } => {}
        _ => return Err(Unreadable::Type),
    }
    let mut ahead = *reader;
    ahead.list()?;
    Ok(parts)
}

fn rank(value: Value<'_>) -> Option<u32> {
    match value {
        Value::Int { bits, negative: false } => u32::try_from(bits).ok(),
        _ => None,
    }
}

/// Where a medium's name puts a block. Unknown media are slower ones.
fn tier(medium: Option<&[u8]>) -> Tier {
    match medium {
        None => Tier::Gpu,
        Some(name) if name.eq_ignore_ascii_case(b"GPU") || name.is_empty() => Tier::Gpu,
        Some(name) if name.get(..3).is_some_and(|start| start.eq_ignore_ascii_case(b"CPU")) => Tier::Host,
        Some(_) => Tier::Disk,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Stored,
    Removed,
    Cleared,
    Unknown,
}

/// Fields that are looked at, as places in [`Fields`].
#[derive(Clone, Copy)]
enum Field {
    Hashes,
    Parent,
    Tokens,
    BlockSize,
    LoraId,
    Medium,
    LoraName,
    ExtraKeys,
    Group,
    Salt,
}

const FIELDS: usize = 10;

/// Fields of a stored event that is a list, in the order of their places.
const STORED: [Field; 9] = [
    Field::Hashes,
    Field::Parent,
    Field::Tokens,
    Field::BlockSize,
    Field::LoraId,
    Field::Medium,
    Field::LoraName,
    Field::ExtraKeys,
    Field::Group,
];

/// The same for a removed event.
const REMOVED: [Field; 3] = [Field::Hashes, Field::Medium, Field::Group];

fn field(name: &[u8]) -> Option<Field> {
    Some(match name {
        b"block_hashes" => Field::Hashes,
        b"parent_block_hash" => Field::Parent,
        b"token_ids" => Field::Tokens,
        b"block_size" => Field::BlockSize,
        b"lora_id" => Field::LoraId,
        b"medium" => Field::Medium,
        b"lora_name" => Field::LoraName,
        b"extra_keys" => Field::ExtraKeys,
        b"group_idx" => Field::Group,
        b"cache_salt" => Field::Salt,
        _ => return None,
    })
}

fn kind(name: &[u8]) -> Kind {
    match name {
        b"BlockStored" => Kind::Stored,
        b"BlockRemoved" => Kind::Removed,
        b"AllBlocksCleared" => Kind::Cleared,
        _ => Kind::Unknown,
    }
}

/// Where each field of one event begins; nothing for a field that is absent or nil.
struct Fields<'a> {
    at: [Option<Reader<'a>>; FIELDS],
    tokens: Tokens,
}

/// What the field of tokens had.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tokens {
    /// Nothing; it is not there.
    Absent,
    /// Tokens, which are in [`Decoder::tokens`].
    Read,
    /// Pairs of tokens.
    Pairs,
}

/// An event that cannot be used.
struct Malformed;

impl From<Unreadable> for Malformed {
    fn from(_: Unreadable) -> Self {
        Self
    }
}

impl<'a> Fields<'a> {
    fn get(&self, field: Field) -> Option<Reader<'a>> {
        self.at[field as usize]
    }

    fn text(&self, field: Field) -> Result<Option<&'a [u8]>, Malformed> {
        match self.get(field).map(|mut reader| reader.value()).transpose()? {
            None => Ok(None),
            Some(Value::Text(text) | Value::Bytes(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(_) => Err(Malformed),
        }
    }

    fn number(&self, field: Field) -> Result<Option<u64>, Malformed> {
        match self.get(field).map(|mut reader| reader.value()).transpose()? {
            None => Ok(None),
            Some(Value::Int { bits, .. }) => Ok(Some(bits)),
            Some(_) => Err(Malformed),
        }
    }

    fn parent(&self) -> Result<Option<EngineHash>, Malformed> {
        self.get(Field::Parent).map(|mut reader| engine_hash(reader.value()?)).transpose()
    }

    fn hashes(&self) -> Result<Vec<EngineHash>, Malformed> {
        let mut reader = self.get(Field::Hashes).ok_or(Malformed)?;
        let count = reader.list()?;
        (0..count).map(|_| engine_hash(reader.value()?)).collect()
    }
}

fn engine_hash(value: Value<'_>) -> Result<EngineHash, Malformed> {
    match value {
        Value::Int { bits, .. } => Ok(EngineHash(bits)),
        Value::Bytes(bytes) | Value::Text(bytes) => Ok(EngineHash(xxh3_64(bytes))),
        _ => Err(Malformed),
    }
}

/// Decodes one rank's batches, one after the other.
///
/// A chain's salt is told at its first block only. Who applies the operations knows what a block
/// was stored with; until it has applied them, the decoder remembers.
#[derive(Debug)]
pub struct Decoder {
    format: Format,
    /// Blocks with a seed that their own event did not tell in full, of operations that were
    /// handed out since [`Decoder::settled`].
    recent: BTreeMap<EngineHash, Seed>,
    tokens: Vec<u32>,
}

impl Decoder {
    /// For a feed of this format.
    pub fn new(format: Format) -> Self {
        Self { format, recent: BTreeMap::new(), tokens: Vec::new() }
    }

    /// Everything that was decoded is applied: look-ups find it from now on.
    pub fn settled(&mut self) {
        self.recent.clear();
    }

    /// Reads a batch. `seed_of` tells with which seed a block was stored; `None` stands for
    /// a block that is unknown or has nothing but its adapter in its seed.
    pub fn decode(
        &mut self,
        payload: &[u8],
        seed_of: &dyn Fn(EngineHash) -> Option<Seed>,
    ) -> Result<Decoded, Unreadable> {
        let mut reader = Reader::new(payload);
        let parts = batch_head(&mut reader)?;
        let mut decoded = Decoded::default();
        for _ in 0..reader.list()? {
            decoded.events += 1;
            let start = reader;
            if let Err(Malformed) = self.event(&mut reader, seed_of, &mut decoded) {
                // Wherever it was left: the next one begins behind the whole of it.
                reader = start;
                reader.skip()?;
                decoded.skipped.malformed += 1;
            }
        }
        decoded.rank = if parts > 2 { rank(reader.value()?) } else { None };
        Ok(decoded)
    }

    fn event(
        &mut self,
        reader: &mut Reader<'_>,
        seed_of: &dyn Fn(EngineHash) -> Option<Seed>,
        decoded: &mut Decoded,
    ) -> Result<(), Malformed> {
        let mut fields = Fields { at: [None; FIELDS], tokens: Tokens::Absent };
        let mut said = None;
        match reader.value()? {
            Value::List(count) => {
                let Some(places) = count.checked_sub(1) else { return Err(Malformed) };
                let Value::Text(name) = reader.value()? else { return Err(Malformed) };
                let found = kind(name);
                let order: &[Field] = match found {
                    Kind::Stored => &STORED,
                    Kind::Removed => &REMOVED,
                    Kind::Cleared | Kind::Unknown => &[],
                };
                for place in 0..places {
                    self.keep(&mut fields, order.get(place).copied(), reader)?;
                }
                said = Some(found);
            }
            Value::Map(count) => {
                for _ in 0..count {
                    let Value::Text(name) = reader.value()? else { return Err(Malformed) };
                    if name == b"type" {
                        let Value::Text(name) = reader.value()? else { return Err(Malformed) };
                        said = Some(kind(name));
                    } else {
                        self.keep(&mut fields, field(name), reader)?;
                    }
                }
            }
            _ => return Err(Malformed),
        }
        match said.ok_or(Malformed)? {
            Kind::Unknown => decoded.skipped.unknown += 1,
            Kind::Cleared => {
                self.recent.clear();
                decoded.ops.push(KvOp::Clear);
            }
            kind => {
                if fields.number(Field::Group)?.is_some_and(|group| group != self.format.group) {
                    decoded.skipped.group += 1;
                } else if kind == Kind::Removed {
                    let tier = tier(fields.text(Field::Medium)?);
                    push_removed(&mut decoded.ops, tier, fields.hashes()?);
                } else {
                    self.stored(&fields, seed_of, decoded)?;
                }
            }
        }
        Ok(())
    }

    /// Notes where a field is, and passes it. Tokens are most of an event: they are read at once.
    fn keep<'a>(
        &mut self,
        fields: &mut Fields<'a>,
        field: Option<Field>,
        reader: &mut Reader<'a>,
    ) -> Result<(), Malformed> {
        let here = *reader;
        if matches!(field, Some(Field::Tokens)) {
            let count = reader.list()?;
            let mut ahead = *reader;
            if count > 0 && matches!(ahead.value()?, Value::List(_)) {
                *reader = here;
                reader.skip()?;
                fields.tokens = Tokens::Pairs;
                return Ok(());
            }
            self.tokens.clear();
            reader.numbers(count, &mut self.tokens)?;
            fields.tokens = Tokens::Read;
            return Ok(());
        }
        let bytes = reader.skip()?;
        // A nil field is as good as an absent one.
        if let Some(field) = field.filter(|_| bytes != [0xc0]) {
            fields.at[field as usize] = Some(here);
        }
        Ok(())
    }

    fn stored(
        &mut self,
        fields: &Fields<'_>,
        seed_of: &dyn Fn(EngineHash) -> Option<Seed>,
        decoded: &mut Decoded,
    ) -> Result<(), Malformed> {
        let hashes = fields.hashes()?;
        let tier = tier(fields.text(Field::Medium)?);
        match fields.tokens {
            Tokens::Absent => return Err(Malformed),
            Tokens::Pairs => {
                decoded.skipped.pairs += 1;
                return Ok(());
            }
            Tokens::Read => {}
        }
        if self.tokens.is_empty() {
            // An offload that says only which blocks moved.
            decoded.stored += hashes.len() as u64;
            if !hashes.is_empty() {
                decoded.ops.push(KvOp::Copy { tier, blocks: hashes });
            }
            return Ok(());
        }
        if fields.number(Field::BlockSize)? != Some(u64::from(self.format.block_size)) {
            decoded.skipped.block_size += 1;
            return Ok(());
        }
        let size = self.format.block_size as usize;
        if hashes.len().checked_mul(size) != Some(self.tokens.len()) {
            return Err(Malformed);
        }
        let parent = fields.parent()?;
        let lora = fields.text(Field::LoraName)?;
        let mut keys = ExtraKeys::read(fields, hashes.len(), lora, parent.is_none())?;
        let (seed, told) = self.seed(fields, lora, keys.salt, parent, seed_of)?;
        let mut blocks: Vec<(LocalHash, EngineHash)> = Vec::with_capacity(hashes.len());
        for (place, (hash, tokens)) in hashes.into_iter().zip(self.tokens.chunks_exact(size)).enumerate() {
            let own = keys.fold(place, seed);
            blocks.push((local_hash(tokens, own), hash));
            if !told {
                self.recent.insert(hash, seed);
            }
        }
        decoded.stored += blocks.len() as u64;
        push_stored(&mut decoded.ops, parent, tier, seed, blocks);
        Ok(())
    }

    /// The seed of an event's blocks, and whether any event without a salt would give the same.
    fn seed(
        &self,
        fields: &Fields<'_>,
        lora: Option<&[u8]>,
        first_salt: Option<&[u8]>,
        parent: Option<EngineHash>,
        seed_of: &dyn Fn(EngineHash) -> Option<Seed>,
    ) -> Result<(Seed, bool), Malformed> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let lora = lora.map(text);
        let with = |salt: Option<&str>| -> Result<Seed, Malformed> {
            let seed = Seed::new(lora.as_deref(), salt);
            // Before adapters were named they had numbers, which no request knows.
            Ok(match (&lora, fields.number(Field::LoraId)?) {
                (None, Some(id)) => seed.with(&id.to_le_bytes()),
                _ => seed,
            })
        };
        let plain = with(None)?;
        let salt = fields.text(Field::Salt)?.or(first_salt).map(text);
        if let Some(salt) = salt {
            return Ok((with(Some(&salt))?, false));
        }
        let inherited =
            parent.and_then(|parent| self.recent.get(&parent).copied().or_else(|| seed_of(parent)));
        let seed = inherited.unwrap_or(plain);
        Ok((seed, seed == plain))
    }
}

/// What else went into the hashes of an event's blocks.
struct ExtraKeys<'a> {
    /// The salt, if these begin a chain that has one.
    salt: Option<&'a [u8]>,
    lists: Option<Reader<'a>>,
    lora: Option<&'a [u8]>,
    /// How many blocks the lists are for; more are not looked at.
    count: usize,
    begins: bool,
}

impl<'a> ExtraKeys<'a> {
    fn read(
        fields: &Fields<'a>,
        blocks: usize,
        lora: Option<&'a [u8]>,
        begins: bool,
    ) -> Result<Self, Malformed> {
        let none = Self { salt: None, lists: None, lora, count: 0, begins };
        let Some(mut lists) = fields.get(Field::ExtraKeys) else { return Ok(none) };
        let count = lists.list()?.min(blocks);
        let mut salt = None;
        if begins && count > 0 {
            let mut first = lists;
            salt = items(&mut first, lora, true)?.0;
        }
        Ok(Self { salt, lists: Some(lists), count, ..none })
    }

    /// The seed of the block at `place`; places are asked for in order, each once.
    fn fold(&mut self, place: usize, seed: Seed) -> Seed {
        let Some(lists) = self.lists.as_mut().filter(|_| place < self.count) else { return seed };
        match items(lists, self.lora, self.begins && place == 0) {
            Ok((_, folded)) => folded.iter().fold(seed, |seed, raw| seed.with(raw)),
            Err(Malformed) => {
                // It was skipped over before, so that only a list that is none gets here.
                self.lists = None;
                seed
            }
        }
    }
}

/// The salt, and the raw bytes of everything else.
type Keys<'a> = (Option<&'a [u8]>, Vec<&'a [u8]>);

/// Reads one block's keys: the salt, if one is looked for, and everything that is neither it nor
/// the adapter's name, as raw bytes.
fn items<'a>(reader: &mut Reader<'a>, lora: Option<&[u8]>, salted: bool) -> Result<Keys<'a>, Malformed> {
    let (mut salt, mut rest) = (None, Vec::new());
    let mut lora = lora;
    let count = match reader.value()? {
        Value::Nil => 0,
        Value::List(count) => count,
        _ => return Err(Malformed),
    };
    for _ in 0..count {
        let mut ahead = *reader;
        let raw = reader.skip()?;
        match ahead.value()? {
            Value::Text(text) if lora == Some(text) => lora = None,
            Value::Text(text) if salted && salt.is_none() => {
                salt = Some(text).filter(|text| !text.is_empty())
            }
            Value::Nil => {}
            _ => rest.push(raw),
        }
    }
    Ok((salt, rest))
}

/// Adds blocks, to the operation before if they continue it.
fn push_stored(
    ops: &mut Vec<KvOp>,
    parent: Option<EngineHash>,
    tier: Tier,
    seed: Seed,
    mut blocks: Vec<(LocalHash, EngineHash)>,
) {
    if let Some(KvOp::Store { tier: t, seed: s, blocks: before, .. }) = ops.last_mut()
        && parent.is_some()
        && parent == before.last().map(|(_, hash)| *hash)
        && (*t, *s) == (tier, seed)
    {
        before.append(&mut blocks);
    } else {
        ops.push(KvOp::Store { parent, tier, seed, blocks });
    }
}

/// Adds blocks, to the operation before if it is of the same kind: vLLM says each in an event.
fn push_removed(ops: &mut Vec<KvOp>, tier: Tier, mut hashes: Vec<EngineHash>) {
    match ops.last_mut() {
        Some(KvOp::Remove { tier: t, blocks }) if *t == tier => blocks.append(&mut hashes),
        _ => ops.push(KvOp::Remove { tier, blocks: hashes }),
    }
}

/// The load of one rank as SGLang publishes it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LoadStat {
    /// Requests in the batch.
    pub running: u64,
    /// Requests that wait.
    pub waiting: u64,
    /// Tokens in use.
    pub tokens: u64,
    /// Tokens there is room for.
    pub max_tokens: u64,
    /// The DP rank.
    pub rank: Option<u32>,
    /// Tokens of waiting requests that are not cached, where it says so.
    pub waiting_uncached_tokens: Option<u64>,
}

impl LoadStat {
    /// Reads the payload of a message with the topic `load`. Newer fields are passed over, the
    /// first six have been there from the beginning.
    pub fn decode(payload: &[u8]) -> Result<Self, Unreadable> {
        let mut reader = Reader::new(payload);
        let parts = reader.list()?;
        if parts < 5 || reader.value()? != Value::Text(b"LoadStat") {
            return Err(Unreadable::Type);
        }
        let mut number = || match reader.value()? {
            Value::Int { bits, negative: false } => Ok(bits),
            _ => Err(Unreadable::Type),
        };
        let (running, waiting, tokens, max_tokens) = (number()?, number()?, number()?, number()?);
        let rank = if parts > 5 { rank(reader.value()?) } else { None };
        let waiting_uncached_tokens = match (parts > 6).then(|| reader.value()).transpose()? {
            Some(Value::Int { bits, negative: false }) => Some(bits),
            _ => None,
        };
        Ok(Self { running, waiting, tokens, max_tokens, rank, waiting_uncached_tokens })
    }
}

#[cfg(test)]
mod tests;
