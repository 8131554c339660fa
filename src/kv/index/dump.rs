//! An index as records.
//!
//! ```text
//! key     'x' section:u8 number:u32be
//! head    version:u8 clock digest evicted orphans refused nodes blocks (u64 each)
//! nodes   (parent:u32 seed:u64 stamp:u64 locals:[u64] full:[u32] parts:u32 part* predicted:u32 (rank:u32 stamp:u64)*)*
//! part    rank:u32 ([u64] × tiers)
//! names   (rank:u32 kind:u8 names:[u64] blocks:[u32])*
//! ```
//!
//! A list is its length as u32 and then its numbers; all little-endian but for keys. Nodes are
//! numbered from 1 in the order in which they are written, 0 is the root; blocks likewise from 0.
//! Sums, sequence hashes, places and the digest are reckoned again when loading, so what was
//! damaged is noticed by the digest.

use std::sync::Arc;

use super::Records;
use super::body::Body;
use super::names::Names;
use super::slab::{ROOT, Slab};
use super::tree::{Meta, Source, Tree};

/// The first byte of the head.
pub(super) const VERSION: u8 = 1;

/// What keys begin with.
pub(super) const PREFIX: u8 = b'x';

/// Kinds of records.
pub(super) const HEAD: u8 = 0;
pub(super) const NODES: u8 = 1;
pub(super) const NAMES: u8 = 2;

/// Kinds of lists of names.
pub(super) const MAIN: u8 = 0;
pub(super) const ALIASES: u8 = 1;
/// No names: says that the rank is predicted.
pub(super) const PREDICTED: u8 = 2;

/// A record is closed when it is as long as this.
const RECORD: usize = 256 << 10;

/// Names in one list: so that no record is much longer.
const NAMES_AT_ONCE: usize = 4096;

/// Records of one section, filled one after the other.
struct Section {
    kind: u8,
    records: Records,
    open: Vec<u8>,
}

impl Section {
    fn new(kind: u8) -> Self {
        Self { kind, records: Records::new(), open: Vec::new() }
    }

    /// After each item: closes the record if it is long enough.
    fn item(&mut self) {
        if self.open.len() >= RECORD {
            self.close();
        }
        if self.open.capacity() == 0 {
            self.open.reserve(RECORD + RECORD / 4);
        }
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            let mut key = vec![PREFIX, self.kind];
            key.extend_from_slice(&(self.records.len() as u32).to_be_bytes());
            self.records.push((key, std::mem::take(&mut self.open)));
        }
    }

    fn u32(&mut self, number: u32) {
        self.open.extend_from_slice(&number.to_le_bytes());
    }

    fn u64(&mut self, number: u64) {
        self.open.extend_from_slice(&number.to_le_bytes());
    }

    fn u64s(&mut self, numbers: impl ExactSizeIterator<Item = u64>) {
        self.u32(numbers.len() as u32);
        let from = self.open.len();
        self.open.resize(from + numbers.len() * 8, 0);
        let places = self.open[from..].as_chunks_mut().0;
        places.iter_mut().zip(numbers).for_each(|(to, number)| *to = number.to_le_bytes());
    }

    fn u32s(&mut self, numbers: &[u32]) {
        self.u32(numbers.len() as u32);
        let from = self.open.len();
        self.open.resize(from + numbers.len() * 4, 0);
        let places = self.open[from..].as_chunks_mut().0;
        places.iter_mut().zip(numbers).for_each(|(to, number)| *to = number.to_le_bytes());
    }

    fn node(&mut self, parent: u32, meta: &Meta, body: &Body) {
        self.u32(parent);
        self.u64(meta.seed.0);
        self.u64(meta.stamp);
        self.u64s(body.locals.iter().map(|local| local.0));
        self.u32(body.full.len() as u32);
        body.full.iter().for_each(|rank| self.u32(rank));
        self.u32(body.parts.len() as u32);
        for part in &body.parts {
            self.u32(part.rank);
            for tier in &part.tiers {
                self.u64s(tier.words().iter().copied());
            }
        }
        self.u32(meta.predicted.len() as u32);
        for predicted in &meta.predicted {
            self.u32(predicted.rank);
            self.u64(predicted.stamp);
        }
        self.item();
    }

    fn names(&mut self, rank: u32, kind: u8, names: &[u64], blocks: &[u32]) {
        self.u32(rank);
        self.open.push(kind);
        self.u64s(names.iter().copied());
        self.u32s(blocks);
        self.item();
    }
}

/// An index as it was at one moment, to be written out while it goes on.
///
/// Nodes are copied when it is made. Tables of names are shared: a rank's is copied when that
/// rank's names change for the first time while this lives.
pub struct Frozen {
    /// The head and the nodes.
    records: Records,
    /// By number of block: which one it is in the records.
    blocks: Vec<u32>,
    ranks: Vec<(Source, Arc<Names>)>,
}

pub(super) fn freeze(tree: &Tree, slab: &Slab) -> Frozen {
    let mut numbers = vec![0u32; tree.metas.len()];
    let mut blocks = vec![0u32; tree.places.len()];
    let (mut nodes_written, mut blocks_written) = (0, 0);
    for (meta, number) in tree.metas.iter().zip(&mut numbers).skip(1).filter(|(meta, _)| meta.alive) {
        nodes_written += 1;
        *number = nodes_written;
        for block in &meta.ids {
            blocks[*block as usize] = blocks_written;
            blocks_written += 1;
        }
    }
    let mut head = Section::new(HEAD);
    head.open.push(VERSION);
    let counters = &tree.counters;
    for number in [
        tree.clock,
        tree.digest,
        counters.evicted,
        counters.orphans,
        counters.refused,
        counters.nodes,
        counters.blocks,
    ] {
        head.u64(number);
    }
    head.close();
    let mut nodes = Section::new(NODES);
    for (node, meta) in tree.metas.iter().enumerate().skip(ROOT as usize + 1).filter(|(_, meta)| meta.alive) {
        nodes.node(numbers[meta.parent as usize], meta, &slab.get(node as u32).read());
    }
    nodes.close();
    let mut records = head.records;
    records.append(&mut nodes.records);
    let ranks = tree.ranks.iter().map(|state| (state.source, Arc::clone(&state.names))).collect();
    Frozen { records, blocks, ranks }
}

impl Frozen {
    /// Everything, as records of about 256 KiB.
    pub fn records(mut self) -> Records {
        let mut names = Section::new(NAMES);
        for (rank, (source, known)) in self.ranks.iter().enumerate() {
            self.write_names(rank as u32, *source, known, &mut names);
        }
        names.close();
        self.records.append(&mut names.records);
        self.records
    }

    fn write_names(&self, rank: u32, source: Source, known: &Names, section: &mut Section) {
        match source {
            Source::None => {}
            Source::Predictions => section.names(rank, PREDICTED, &[], &[]),
            Source::Events => {
                let (mut names, mut blocks) = (Vec::new(), Vec::new());
                for (name, block) in known.iter() {
                    if names.len() == NAMES_AT_ONCE {
                        section.names(rank, MAIN, &names, &blocks);
                        names.clear();
                        blocks.clear();
                    }
                    names.push(name.0);
                    blocks.push(self.blocks[block as usize]);
                }
                section.names(rank, MAIN, &names, &blocks);
                for (name, block) in known.iter_aliases() {
                    section.names(rank, ALIASES, &[name.0], &[self.blocks[block as usize]]);
                }
            }
        }
    }
}
