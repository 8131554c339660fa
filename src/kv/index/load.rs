//! Records back to an index. Nothing is believed: what is inconsistent is an error, and nothing is
//! reserved that the records do not hold.

use super::bits::Bits;
use super::body::{Body, Part, TIERS};
use super::dump::{ALIASES, HEAD, MAIN, NAMES, NODES, PREDICTED, PREFIX, VERSION};
use super::names::{Given, MOST_ALIASES};
use super::predict::Predicted;
use super::ranks::RankSet;
use super::slab::{MOST_NODES, ROOT, Slab};
use super::tree::{ALL_TIERS, MOST_BLOCKS, Meta, Place, Source, Tree, Writer};
use super::{LoadError, MOST_RANKS, Records};
use crate::kv::hash::{LocalHash, Seed, chained};
use crate::kv::types::{EngineHash, RankIx, Tier};

type Loaded<T> = Result<T, LoadError>;

/// Takes numbers from a record.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Loaded<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(LoadError("it ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Loaded<[u8; N]> {
        self.take(N)?.try_into().map_err(|_| LoadError("it ends too early"))
    }

    fn u32(&mut self) -> Loaded<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Loaded<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn u32s(&mut self) -> Loaded<Vec<u32>> {
        let len = self.u32()? as usize;
        let bytes = self.take(len.checked_mul(4).ok_or(LoadError("it ends too early"))?)?;
        Ok(bytes.as_chunks().0.iter().map(|n| u32::from_le_bytes(*n)).collect())
    }

    fn u64s(&mut self) -> Loaded<Vec<u64>> {
        let len = self.u32()? as usize;
        let bytes = self.take(len.checked_mul(8).ok_or(LoadError("it ends too early"))?)?;
        Ok(bytes.as_chunks().0.iter().map(|n| u64::from_le_bytes(*n)).collect())
    }

    fn rank(&mut self) -> Loaded<u32> {
        let rank = self.u32()?;
        if rank < MOST_RANKS { Ok(rank) } else { Err(LoadError("a rank is out of range")) }
    }
}

/// The head's numbers.
struct Head {
    clock: u64,
    digest: u64,
    evicted: u64,
    orphans: u64,
    refused: u64,
    nodes: u64,
    blocks: u64,
}

fn head(bytes: &[u8]) -> Loaded<Head> {
    let mut cursor = Cursor(bytes);
    if cursor.array::<1>()? != [VERSION] {
        return Err(LoadError("its version is unknown"));
    }
    let head = Head {
        clock: cursor.u64()?,
        digest: cursor.u64()?,
        evicted: cursor.u64()?,
        orphans: cursor.u64()?,
        refused: cursor.u64()?,
        nodes: cursor.u64()?,
        blocks: cursor.u64()?,
    };
    if head.nodes >= MOST_NODES as u64 || head.blocks > u64::from(u32::MAX) {
        return Err(LoadError("it is too large"));
    }
    Ok(head)
}

pub(super) fn load(records: &Records) -> Loaded<(Tree, Slab)> {
    let mut sorted: Vec<(&[u8], &[u8])> = records.iter().map(|(k, v)| (k.as_slice(), v.as_slice())).collect();
    sorted.sort_unstable();
    let section = |kind: u8| sorted.iter().filter(move |(key, _)| key.starts_with(&[PREFIX, kind]));
    let known = [HEAD, NODES, NAMES].map(|kind| section(kind).count());
    if known.iter().sum::<usize>() != records.len() || known[0] != 1 {
        return Err(LoadError("records are missing or foreign"));
    }
    for (kind, count) in [HEAD, NODES, NAMES].into_iter().zip(known) {
        let numbered = section(kind).zip(0u32..).all(|((key, _), n)| key[2..] == n.to_be_bytes());
        if !numbered || count > u32::MAX as usize {
            return Err(LoadError("records are missing or foreign"));
        }
    }
    let head = head(section(HEAD).next().ok_or(LoadError("it has no head"))?.1)?;

    let slab = Slab::new();
    let mut tree = Tree { metas: vec![Meta { alive: true, ..Meta::default() }], ..Tree::default() };
    tree.clock = head.clock;
    tree.counters.evicted = head.evicted;
    tree.counters.orphans = head.orphans;
    tree.counters.refused = head.refused;
    for (_, bytes) in section(NODES) {
        let mut cursor = Cursor(bytes);
        while !cursor.0.is_empty() {
            if tree.metas.len() as u64 > head.nodes {
                return Err(LoadError("it has more nodes than it says"));
            }
            let (meta, body) = node(&mut cursor, &mut tree)?;
            *slab.get(tree.metas.len() as u32).write() = body;
            tree.metas.push(meta);
        }
    }
    if tree.counters.nodes != head.nodes || tree.counters.blocks != head.blocks {
        return Err(LoadError("nodes are missing"));
    }
    link(&mut tree, &slab)?;
    let mut writer = Writer { slab: &slab, tree: &mut tree, limit: u64::MAX };
    for (_, bytes) in section(NAMES) {
        let mut cursor = Cursor(bytes);
        while !cursor.0.is_empty() {
            writer.load_names(&mut cursor)?;
        }
    }
    writer.load_holders()?;
    if tree.digest != head.digest {
        return Err(LoadError("its digest is another"));
    }
    Ok((tree, slab))
}

fn node(cursor: &mut Cursor<'_>, tree: &mut Tree) -> Loaded<(Meta, Body)> {
    let number = tree.metas.len() as u32;
    let (parent, seed, stamp) = (cursor.u32()?, Seed(cursor.u64()?), cursor.u64()?);
    let locals: Vec<LocalHash> = cursor.u64s()?.into_iter().map(LocalHash).collect();
    let len = locals.len();
    if len == 0 || len > MOST_BLOCKS || stamp > tree.clock || tree.places.len() + len > u32::MAX as usize {
        return Err(LoadError("a node cannot be"));
    }
    let mut full = RankSet::default();
    for rank in cursor.u32s()? {
        if rank >= MOST_RANKS || !full.insert(rank) {
            return Err(LoadError("a rank is out of range or there twice"));
        }
    }
    let mut parts: Vec<Part> = Vec::new();
    for _ in 0..cursor.u32()? {
        let mut part = Part::new(cursor.rank()?);
        for tier in &mut part.tiers {
            *tier = Bits::checked(cursor.u64s()?, len).ok_or(LoadError("bits cannot be"))?;
        }
        let known = full.contains(part.rank);
        let misplaced = if known { !part.tiers[0].is_empty() } else { part.tiers[0].count() == len };
        let ordered = parts.last().is_none_or(|before| before.rank < part.rank);
        if part.is_empty() || misplaced || !ordered {
            return Err(LoadError("a part cannot be"));
        }
        parts.push(part);
    }
    let mut predicted: Vec<Predicted> = Vec::new();
    for _ in 0..cursor.u32()? {
        let next = Predicted { rank: cursor.rank()?, children: 0, stamp: cursor.u64()? };
        let whole = full.contains(next.rank) && parts.iter().all(|part| part.rank != next.rank);
        let ordered = predicted.last().is_none_or(|before| before.rank < next.rank);
        if !whole || !ordered || next.stamp > tree.clock {
            return Err(LoadError("a prediction cannot be"));
        }
        predicted.push(next);
    }
    let first = tree.places.len() as u32;
    let ids = (first..first + len as u32).collect();
    tree.places.resize(first as usize + len, Place { node: number, depth: 0 });
    tree.counters.nodes += 1;
    tree.counters.blocks += len as u64;
    tree.predictions += predicted.len() as u64;
    let meta = Meta { alive: true, parent, seed, stamp, ids, predicted, ..Meta::default() };
    let body = Body { locals, full, parts, ..Body::default() };
    tree.parts += body.parts.len() as u64;
    tree.words += body.words() as u64;
    Ok((meta, body))
}

/// Children, depths, sums and places, from the root down.
fn link(tree: &mut Tree, slab: &Slab) -> Loaded<()> {
    for node in 1..tree.metas.len() as u32 {
        let parent = tree.metas[node as usize].parent;
        if parent as usize >= tree.metas.len() || parent == node {
            return Err(LoadError("a node has no parent"));
        }
        let first = slab.get(node).read().locals[0];
        let children = &mut slab.get(parent).write().children;
        if children.get(first).is_some() {
            return Err(LoadError("two nodes are the same"));
        }
        children.set(first, node);
    }
    let mut open = vec![ROOT];
    let mut reached = 0;
    while let Some(node) = open.pop() {
        reached += 1;
        let body = slab.get(node).read();
        open.extend(body.children.iter());
        if node == ROOT {
            continue;
        }
        let parent = &tree.metas[tree.metas[node as usize].parent as usize];
        let depth = parent.depth.checked_add(parent.ids.len() as u32).ok_or(LoadError("it is too deep"))?;
        let mut before = parent.ids.len().checked_sub(1).map(|last| parent.sequence(last));
        let meta = &mut tree.metas[node as usize];
        meta.depth = depth;
        let (mut sum, mut place) = (0u64, Place { node, depth });
        meta.sums.reserve_exact(meta.ids.len());
        for (local, block) in body.locals.iter().zip(&meta.ids) {
            let sequence = chained(before, *local);
            before = Some(sequence);
            sum = sum.wrapping_add(sequence.0);
            meta.sums.push(sum);
            tree.places[*block as usize] = place;
            place.depth = place.depth.checked_add(1).ok_or(LoadError("it is too deep"))?;
        }
        let held = !body.full.is_empty() || body.parts.iter().any(|part| part.end() == body.locals.len());
        if body.children.is_empty() && !held {
            return Err(LoadError("a last block is held by nobody"));
        }
    }
    // What is not reached from the root goes in a circle.
    if reached != tree.metas.len() { Err(LoadError("nodes go in a circle")) } else { Ok(()) }
}

impl Writer<'_> {
    fn load_names(&mut self, cursor: &mut Cursor<'_>) -> Loaded<()> {
        let rank = RankIx(cursor.rank()?);
        let [kind] = cursor.array()?;
        let (names, blocks) = (cursor.u64s()?, cursor.u32s()?);
        let source = match kind {
            MAIN | ALIASES => Source::Events,
            PREDICTED => Source::Predictions,
            _ => return Err(LoadError("names of an unknown kind")),
        };
        let state = self.rank(rank);
        if state.source != Source::None && (state.source != source || source == Source::Predictions)
            || names.len() != blocks.len()
            || source == Source::Predictions && !names.is_empty()
        {
            return Err(LoadError("names cannot be"));
        }
        state.source = source;
        state.names_mut().reserve(if kind == MAIN { names.len() } else { 0 });
        for (name, block) in names.into_iter().zip(blocks) {
            if block as usize >= self.tree.places.len() {
                return Err(LoadError("a name is of no block"));
            }
            let (node, at) = self.place(block);
            let held = self.body(node).holds(rank.0, at);
            let expected = if kind == MAIN { Given::Main } else { Given::Alias };
            let known = self.rank(rank).names_mut();
            let (given, other) = known.give(EngineHash(name), block, kind == ALIASES);
            if !held || given != expected || other.is_some() || known.aliases() > MOST_ALIASES {
                return Err(LoadError("a name cannot be"));
            }
        }
        self.tree.aliases += if kind == ALIASES { 1 } else { 0 };
        Ok(())
    }

    /// Sums, digest and leaves, from who holds what.
    fn load_holders(&mut self) -> Loaded<()> {
        for node in 1..self.tree.metas.len() as u32 {
            let body = self.body(node);
            let len = body.locals.len();
            for rank in body.ranks() {
                let state = self.rank(RankIx(rank));
                if state.source == Source::None {
                    return Err(LoadError("a rank holds blocks without a name"));
                }
                self.count_loaded(rank, node, &body, len);
            }
        }
        for node in 1..self.tree.metas.len() {
            for at in 0..self.tree.metas[node].predicted.len() {
                let (parent, p) = (self.tree.metas[node].parent, self.tree.metas[node].predicted[at]);
                if self.tree.ranks[p.rank as usize].source != Source::Predictions {
                    return Err(LoadError("a prediction cannot be"));
                }
                let above = &mut self.tree.metas[parent as usize].predicted;
                match above.binary_search_by_key(&p.rank, |p| p.rank) {
                    Ok(above_at) => above[above_at].children += 1,
                    Err(_) if parent == ROOT => {}
                    Err(_) => return Err(LoadError("a prediction cannot be")),
                }
            }
        }
        let mut predicted = vec![0u64; self.tree.ranks.len()];
        for node in 1..self.tree.metas.len() {
            let meta = &self.tree.metas[node];
            for p in &meta.predicted {
                predicted[p.rank as usize] += meta.ids.len() as u64;
                let leaves = &mut self.tree.ranks[p.rank as usize].leaves;
                if p.children == 0 && leaves.insert(p.stamp, node as u32).is_some() {
                    return Err(LoadError("two leaves were used at once"));
                }
            }
        }
        let tree = &mut *self.tree;
        let mut seen = vec![0u64; tree.places.len().div_ceil(64)];
        for (state, predicted) in tree.ranks.iter().zip(predicted) {
            let expected = match state.source {
                Source::Events => state.names.len() as u64,
                _ => predicted,
            };
            if state.held != expected {
                return Err(LoadError("a rank holds other blocks than it has names or predictions of"));
            }
            for (_, block) in state.names.iter() {
                let (word, bit) = (&mut seen[block as usize / 64], 1 << (block % 64));
                if *word & bit != 0 {
                    return Err(LoadError("a block has two main names"));
                }
                *word |= bit;
            }
            state.names.iter().for_each(|(_, block)| seen[block as usize / 64] = 0);
        }
        Ok(())
    }

    fn count_loaded(&mut self, rank: u32, node: u32, body: &Body, len: usize) {
        let (full, part) = (body.full.contains(rank), body.part(rank));
        let mut any = Bits::default();
        for tier in ALL_TIERS {
            let whole = full && tier == Tier::Gpu;
            let bits = match part {
                _ if whole => Bits::ones(len),
                Some(part) => part.tiers[tier as usize].clone(),
                None => continue,
            };
            let sum = self.sum_of(node, &bits, len);
            self.count(rank, tier as usize, bits.count() as i64, sum);
            any.append(&bits, 0);
        }
        self.count_held(rank, any.count() as i64);
    }
}

const _: () = assert!(TIERS == ALL_TIERS.len());
