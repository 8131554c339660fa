//! The writer's side of the tree: nodes and blocks come, go, split and merge.
//!
//! **Invariants**
//! - A node is a run of blocks of one seed; its children follow its last block and differ in their
//!   first. A block is there as long as anyone holds it or anything that follows it: the last
//!   block of a node without children is held.
//! - Numbers of nodes and blocks mean nothing: two replicas may number differently. Whatever is
//!   decided by order is decided by stamps, depths and hashes.
//! - Two nodes in a row, of which the lower is the only child and both are wholly held by the same
//!   ranks, are one (unless predictions, whose nodes end where prompts ended, are among them).

use std::sync::Arc;

use super::Counters;
use super::bits::Bits;
use super::body::{Body, Children, TIERS, common, spread};
use super::names::Names;
use super::predict::{Leaves, Predicted};
use super::slab::{ROOT, Slab};
use crate::kv::hash::{LocalHash, Seed, SequenceHash, chained};
use crate::kv::types::{RankIx, Tier};

/// Blocks of one node at most: bounds how long its lock is held, and a record of the dump.
pub(super) const MOST_BLOCKS: usize = 16_384;

/// Children that a node may have and still be merged into the one above: each must be told.
const MOST_MOVED: usize = 64;

/// All tiers, in their order.
pub(super) const ALL_TIERS: [Tier; TIERS] = [Tier::Gpu, Tier::Host, Tier::Disk];

/// What only the writer knows of a node.
#[derive(Default)]
pub(super) struct Meta {
    pub(super) alive: bool,
    pub(super) parent: u32,
    /// Blocks before the first.
    pub(super) depth: u32,
    pub(super) seed: Seed,
    /// When something was stored here last.
    pub(super) stamp: u64,
    /// Numbers of the blocks.
    pub(super) ids: Vec<u32>,
    /// `sums[i]` is `base` plus the sequence hashes of the blocks up to and with `i`, so that
    /// those of any stretch cost one subtraction.
    pub(super) sums: Vec<u64>,
    pub(super) base: u64,
    /// Ranks whose blocks here are predicted, ordered.
    pub(super) predicted: Vec<Predicted>,
}

impl Meta {
    /// The sum of the sequence hashes of a stretch.
    fn sum(&self, from: usize, to: usize) -> u64 {
        let before = |at: usize| if at == 0 { self.base } else { self.sums[at - 1] };
        before(to).wrapping_sub(before(from))
    }

    /// Of one block.
    pub(super) fn sequence(&self, at: usize) -> SequenceHash {
        SequenceHash(self.sum(at, at + 1))
    }
}

/// Where a block is.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) node: u32,
    /// Blocks before it in the prompt: other than its offset, this survives splits.
    pub(super) depth: u32,
}

/// Who tells of a rank's blocks.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum Source {
    /// Nobody yet.
    #[default]
    None,
    /// Its engine.
    Events,
    /// Our own decisions.
    Predictions,
}

/// What is known of a rank.
#[derive(Default)]
pub(super) struct Rank {
    pub(super) source: Source,
    /// Shared with images that are being written out.
    pub(super) names: Arc<Names>,
    /// By tier: how many blocks, and the sum of their sequence hashes.
    pub(super) tiers: [(u64, u64); TIERS],
    /// Blocks held in any tier.
    pub(super) held: u64,
    pub(super) leaves: Leaves,
}

impl Rank {
    pub(super) fn names_mut(&mut self) -> &mut Names {
        Arc::make_mut(&mut self.names)
    }
}

/// What of a stretch a rank held before something happened.
pub(super) enum Held {
    All,
    None,
    Some(Bits),
}

impl Held {
    pub(super) fn contains(&self, at: usize) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::Some(bits) => bits.contains(at),
        }
    }
}

/// Everything but what look-ups read.
#[derive(Default)]
pub(super) struct Tree {
    pub(super) metas: Vec<Meta>,
    pub(super) free_nodes: Vec<u32>,
    pub(super) places: Vec<Place>,
    pub(super) free_blocks: Vec<u32>,
    pub(super) ranks: Vec<Rank>,
    /// Counts whatever was stored: the time by which the least recent is told.
    pub(super) clock: u64,
    pub(super) digest: u64,
    /// Sums of parts, their words and sets' words, and predictions, for the account.
    pub(super) parts: u64,
    pub(super) words: u64,
    pub(super) predictions: u64,
    pub(super) aliases: u64,
    /// Blocks of ranks that tell by events: each has a name.
    pub(super) named: u64,
    pub(super) counters: Counters,
}

/// One rank's and tier's share of the digest.
pub(super) fn term(rank: u32, tier: usize, (count, sum): (u64, u64)) -> u64 {
    if count == 0 {
        return 0;
    }
    spread(spread(sum.wrapping_add(count)) ^ (u64::from(rank) * TIERS as u64 + tier as u64))
}

/// The tree and its readers' side, for the one who changes it.
pub(super) struct Writer<'a> {
    pub(super) slab: &'a Slab,
    pub(super) tree: &'a mut Tree,
    /// The bound in bytes.
    pub(super) limit: u64,
}

impl<'a> Writer<'a> {
    pub(super) fn body(&self, node: u32) -> parking_lot::RwLockReadGuard<'a, Body> {
        self.slab.get(node).read()
    }

    pub(super) fn meta(&mut self, node: u32) -> &mut Meta {
        &mut self.tree.metas[node as usize]
    }

    /// A rank's state; made if need be.
    pub(super) fn rank(&mut self, rank: RankIx) -> &mut Rank {
        let at = rank.0 as usize;
        if self.tree.ranks.len() <= at {
            self.tree.ranks.resize_with(at + 1, Rank::default);
        }
        &mut self.tree.ranks[at]
    }

    /// A block's node and its offset there.
    pub(super) fn place(&self, block: u32) -> (u32, usize) {
        let place = self.tree.places[block as usize];
        (place.node, (place.depth - self.tree.metas[place.node as usize].depth) as usize)
    }

    /// Keeps a rank's sums and the digest when blocks come to a tier or leave it.
    pub(super) fn count(&mut self, rank: u32, tier: usize, blocks: i64, sum: u64) {
        let tree = &mut *self.tree;
        let share = &mut tree.ranks[rank as usize].tiers[tier];
        tree.digest = tree.digest.wrapping_sub(term(rank, tier, *share));
        *share = (share.0.wrapping_add_signed(blocks), share.1.wrapping_add(sum));
        tree.digest = tree.digest.wrapping_add(term(rank, tier, *share));
    }

    pub(super) fn count_held(&mut self, rank: u32, blocks: i64) {
        let state = &mut self.tree.ranks[rank as usize];
        state.held = state.held.wrapping_add_signed(blocks);
        if state.source == Source::Events {
            self.tree.named = self.tree.named.wrapping_add_signed(blocks);
        }
        self.tree.counters.worker_blocks = self.tree.counters.worker_blocks.wrapping_add_signed(blocks);
    }

    /// Changes a body and keeps the account of its parts and words.
    fn change<T>(&mut self, node: u32, change: impl FnOnce(&mut Body) -> T) -> T {
        let mut body = self.slab.get(node).write();
        let before = (body.parts.len() as u64, body.words() as u64);
        let result = change(&mut body);
        self.tree.parts = self.tree.parts + body.parts.len() as u64 - before.0;
        self.tree.words = self.tree.words + body.words() as u64 - before.1;
        result
    }

    // ---- what a rank holds ----

    /// The rank holds a stretch of a node in `tier`. Says what it held before.
    pub(super) fn hold(&mut self, rank: u32, node: u32, from: usize, to: usize, tier: Tier) -> Held {
        if tier == Tier::Gpu && self.body(node).full.contains(rank) {
            return Held::All;
        }
        let (mut fresh, mut sum, mut unheld) = (0, 0u64, 0);
        let meta = &self.tree.metas[node as usize];
        let held = {
            let mut body = self.slab.get(node).write();
            let before = (body.parts.len() as u64, body.words() as u64);
            let (len, full) = (body.locals.len(), body.full.contains(rank));
            let whole = from == 0 && to == len;
            let held = if !full && whole && tier == Tier::Gpu && body.part(rank).is_none() {
                body.full.insert(rank);
                (fresh, sum, unheld) = (len as i64, meta.sum(0, len), len as i64);
                Held::None
            } else {
                let at = body.part_at(rank);
                let part = &mut body.parts[at];
                let mut held = Bits::default();
                for bit in from..to {
                    if full || part.contains(bit) {
                        held.insert(bit);
                    } else {
                        unheld += 1;
                    }
                    if part.tiers[tier as usize].insert(bit) {
                        fresh += 1;
                        sum = sum.wrapping_add(meta.sum(bit, bit + 1));
                    }
                }
                if tier == Tier::Gpu {
                    body.normalise();
                }
                if full { Held::All } else { Held::Some(held) }
            };
            self.tree.parts = self.tree.parts + body.parts.len() as u64 - before.0;
            self.tree.words = self.tree.words + body.words() as u64 - before.1;
            held
        };
        self.count(rank, tier as usize, fresh, sum);
        self.count_held(rank, unheld);
        held
    }

    /// The rank holds a block in `tier` no more. Whether it holds it nowhere now.
    pub(super) fn let_go(&mut self, rank: u32, block: u32, tier: Tier) -> bool {
        let (node, at) = self.place(block);
        if !self.body(node).holds_in(rank, at, tier) {
            return false;
        }
        let held = self.change(node, |body| {
            let len = body.locals.len();
            let part = body.part_at(rank);
            if tier == Tier::Gpu && body.full.remove(rank) {
                body.parts[part].tiers[0] = Bits::ones(len);
            }
            body.parts[part].tiers[tier as usize].remove(at);
            body.normalise();
            body.holds(rank, at)
        });
        let sum = self.tree.metas[node as usize].sequence(at).0;
        self.count(rank, tier as usize, -1, sum.wrapping_neg());
        if !held {
            self.count_held(rank, -1);
        }
        !held
    }

    /// The rank holds nothing of a node any more. How many blocks that were.
    pub(super) fn leave(&mut self, rank: u32, node: u32) -> u64 {
        let (full, part, len) = self.change(node, |body| {
            let full = body.full.remove(rank);
            let part = body.parts.binary_search_by_key(&rank, |part| part.rank).ok();
            (full, part.map(|at| body.parts.remove(at)), body.locals.len())
        });
        let mut any = if full { Bits::ones(len) } else { Bits::default() };
        for tier in 0..TIERS {
            let bits = match &part {
                _ if full && tier == 0 => Bits::ones(len),
                Some(part) => part.tiers[tier].clone(),
                None => continue,
            };
            any.append(&bits, 0);
            let sum = self.sum_of(node, &bits, len);
            self.count(rank, tier, -(bits.count() as i64), sum.wrapping_neg());
        }
        self.count_held(rank, -(any.count() as i64));
        any.count() as u64
    }

    /// The sum of the sequence hashes of some blocks of a node.
    pub(super) fn sum_of(&self, node: u32, bits: &Bits, len: usize) -> u64 {
        let meta = &self.tree.metas[node as usize];
        if bits.count() == len {
            return meta.sum(0, len);
        }
        (0..len).filter(|at| bits.contains(*at)).fold(0, |sum: u64, at| sum.wrapping_add(meta.sequence(at).0))
    }

    // ---- nodes ----

    /// How far `rest` goes along a node from `at`, and whether that is its end.
    pub(super) fn follow(&self, node: u32, at: usize, rest: &[LocalHash]) -> (usize, bool) {
        let body = self.body(node);
        let shared = common(&body.locals[at..], rest);
        (shared, at + shared == body.locals.len())
    }

    fn new_node(&mut self) -> u32 {
        let tree = &mut *self.tree;
        tree.counters.nodes += 1;
        let node = tree.free_nodes.pop().unwrap_or_else(|| {
            tree.metas.push(Meta::default());
            (tree.metas.len() - 1) as u32
        });
        tree.metas[node as usize].alive = true;
        node
    }

    /// Appends blocks to a node's own lists; who holds them is the caller's to say.
    fn append(&mut self, node: u32, locals: &[LocalHash], body: &mut Body) {
        let tree = &mut *self.tree;
        let parent = tree.metas[node as usize].parent as usize;
        let meta = &tree.metas[node as usize];
        let mut before = match meta.ids.len() {
            0 if parent == ROOT as usize => None,
            0 => Some(tree.metas[parent].sequence(tree.metas[parent].ids.len() - 1)),
            len => Some(meta.sequence(len - 1)),
        };
        let meta = &mut tree.metas[node as usize];
        // A quarter more than needed: chains grow, but most memory is here.
        let room = locals.len().max(if meta.ids.is_empty() { 0 } else { meta.ids.len() / 4 });
        if body.locals.capacity() - body.locals.len() < locals.len() {
            body.locals.reserve_exact(room);
            meta.ids.reserve_exact(room);
            meta.sums.reserve_exact(room);
        }
        body.locals.extend_from_slice(locals);
        let mut sum = meta.sums.last().copied().unwrap_or(meta.base);
        let mut depth = meta.depth + meta.ids.len() as u32;
        for local in locals {
            let sequence = chained(before, *local);
            before = Some(sequence);
            sum = sum.wrapping_add(sequence.0);
            meta.sums.push(sum);
            let place = Place { node, depth };
            depth += 1;
            match tree.free_blocks.pop() {
                Some(block) => {
                    tree.places[block as usize] = place;
                    meta.ids.push(block);
                }
                None => {
                    meta.ids.push(tree.places.len() as u32);
                    tree.places.push(place);
                }
            }
        }
        tree.counters.blocks += locals.len() as u64;
    }

    /// A new node below another, held by nobody yet.
    pub(super) fn grow(&mut self, parent: u32, locals: &[LocalHash], seed: Seed) -> u32 {
        let node = self.new_node();
        let above = &self.tree.metas[parent as usize];
        let (depth, stamp) = (above.depth + above.ids.len() as u32, self.tree.clock);
        *self.meta(node) = Meta { alive: true, parent, depth, seed, stamp, ..Meta::default() };
        // Nobody can come here before it is linked.
        let mut body = self.slab.get(node).write();
        self.append(node, locals, &mut body);
        drop(body);
        self.slab.get(parent).write().children.set(locals[0], node);
        node
    }

    /// Makes a node longer, if only `rank` holds it and nothing else speaks against it. How many
    /// blocks it took; they are held in full.
    pub(super) fn lengthen(&mut self, rank: u32, node: u32, locals: &[LocalHash], seed: Seed) -> usize {
        let meta = &self.tree.metas[node as usize];
        let took = locals.len().min(MOST_BLOCKS.saturating_sub(meta.ids.len()));
        if node == ROOT || meta.seed != seed || !meta.predicted.is_empty() || took == 0 {
            return 0;
        }
        let mut body = self.slab.get(node).write();
        let alone = body.full.is_only(rank) && body.parts.iter().all(|part| part.rank == rank);
        if !alone || !body.children.is_empty() {
            return 0;
        }
        let from = body.locals.len();
        self.append(node, &locals[..took], &mut body);
        drop(body);
        let stamp = self.tree.clock;
        self.meta(node).stamp = stamp;
        let sum = self.tree.metas[node as usize].sum(from, from + took);
        self.count(rank, 0, took as i64, sum);
        self.count_held(rank, took as i64);
        took
    }

    /// Cuts a node before block `at`, which is neither its first nor beyond its end. What comes
    /// before gets a new number, which is returned; the rest keeps its own, and its children.
    pub(super) fn split(&mut self, node: u32, at: usize) -> u32 {
        let upper = self.new_node();
        let meta = &mut self.tree.metas[node as usize];
        let (ids, sums) = (meta.ids.split_off(at), meta.sums.split_off(at));
        let predicted: Vec<Predicted> =
            meta.predicted.iter().map(|p| Predicted { children: 1, ..*p }).collect();
        let above = Meta {
            alive: true,
            parent: meta.parent,
            depth: meta.depth,
            seed: meta.seed,
            stamp: meta.stamp,
            ids: std::mem::replace(&mut meta.ids, ids),
            base: meta.base,
            sums: std::mem::replace(&mut meta.sums, sums),
            predicted,
        };
        meta.base = above.sums.last().copied().unwrap_or(above.base);
        meta.parent = upper;
        meta.depth += at as u32;
        for block in &above.ids {
            self.tree.places[*block as usize].node = upper;
        }
        self.tree.predictions += above.predicted.len() as u64;
        let parent = above.parent;
        *self.meta(upper) = above;

        // Downwards: the parent first, then the node. The new one cannot be reached before.
        let mut parent_body = self.slab.get(parent).write();
        let mut body = self.slab.get(node).write();
        let mut upper_body = self.slab.get(upper).write();
        let before = (body.parts.len() as u64, body.words() as u64);
        let rest = body.locals.split_off(at);
        upper_body.locals = std::mem::replace(&mut body.locals, rest);
        upper_body.locals.shrink_to_fit();
        upper_body.full = body.full.clone();
        upper_body.parts = body.parts.clone();
        for (high, low) in body.parts.iter_mut().zip(&mut upper_body.parts) {
            for tier in 0..TIERS {
                high.tiers[tier] = low.tiers[tier].split_off(at);
            }
        }
        body.normalise();
        upper_body.normalise();
        upper_body.children.set(body.locals[0], node);
        parent_body.children.set(upper_body.locals[0], upper);
        self.tree.parts = self.tree.parts + (body.parts.len() + upper_body.parts.len()) as u64 - before.0;
        self.tree.words = self.tree.words + (body.words() + upper_body.words()) as u64 - before.1;
        drop((parent_body, body, upper_body));
        let meta = self.meta(upper);
        meta.ids.shrink_to_fit();
        meta.sums.shrink_to_fit();
        upper
    }

    /// Takes a node without children out of the tree. Nobody may hold anything of it, but for
    /// names, which are the caller's.
    pub(super) fn unlink(&mut self, node: u32) {
        let parent = self.tree.metas[node as usize].parent;
        // Waits for those who are on their way down: they hold the parent's lock.
        let first = self.body(node).locals[0];
        self.slab.get(parent).write().children.remove(first);
        self.free(node);
    }

    fn free(&mut self, node: u32) {
        self.change(node, |body| *body = Body::default());
        let meta = std::mem::take(self.meta(node));
        self.tree.counters.nodes -= 1;
        self.tree.counters.blocks -= meta.ids.len() as u64;
        self.tree.free_blocks.extend(meta.ids);
        self.tree.free_nodes.push(node);
    }

    /// Restores the invariants at a node that somebody left, and above it.
    pub(super) fn settle(&mut self, mut node: u32) {
        while node != ROOT && self.tree.metas[node as usize].alive {
            let body = self.body(node);
            if !body.children.is_empty() {
                drop(body);
                if self.merge(node) {
                    continue;
                }
                return;
            }
            let len = body.locals.len();
            let held = match body.full.is_empty() {
                true => body.parts.iter().map(super::body::Part::end).max().unwrap_or(0),
                false => len,
            };
            drop(body);
            if held == len {
                return;
            }
            if held > 0 {
                self.shorten(node, held);
                return;
            }
            let parent = self.tree.metas[node as usize].parent;
            self.unlink(node);
            node = parent;
        }
    }

    fn shorten(&mut self, node: u32, len: usize) {
        self.change(node, |body| {
            body.locals.truncate(len);
            body.locals.shrink_to(len + len / 4);
            // Who has all that is left is full now.
            body.normalise();
        });
        let meta = &mut self.tree.metas[node as usize];
        let gone = meta.ids.split_off(len);
        meta.sums.truncate(len);
        meta.sums.shrink_to(len + len / 4);
        self.tree.counters.blocks -= gone.len() as u64;
        self.tree.free_blocks.extend(gone);
    }

    /// Merges the only child into its parent, if they are alike.
    pub(super) fn merge(&mut self, upper: u32) -> bool {
        let lower = {
            let body = self.body(upper);
            if upper == ROOT || body.children.len() != 1 {
                return false;
            }
            let Some(lower) = body.children.iter().next() else { return false };
            let below = self.body(lower);
            let (a, b) = (&self.tree.metas[upper as usize], &self.tree.metas[lower as usize]);
            let alike = body.full == below.full
                && a.seed == b.seed
                && a.predicted.is_empty()
                && b.predicted.is_empty()
                && a.ids.len() + b.ids.len() <= MOST_BLOCKS
                && below.children.len() <= MOST_MOVED;
            if !alike {
                return false;
            }
            lower
        };
        let below = std::mem::take(self.meta(lower));
        for block in &below.ids {
            self.tree.places[*block as usize].node = upper;
        }
        let mut body = self.slab.get(upper).write();
        let mut lower_body = self.slab.get(lower).write();
        let before = (body.parts.len() + lower_body.parts.len(), body.words() + lower_body.words());
        for child in lower_body.children.iter() {
            self.tree.metas[child as usize].parent = upper;
        }
        let at = body.locals.len();
        for part in std::mem::take(&mut lower_body.parts) {
            let to = body.part_at(part.rank);
            for tier in 0..TIERS {
                body.parts[to].tiers[tier].append(&part.tiers[tier], at);
            }
        }
        reserve(&mut body.locals, lower_body.locals.len());
        body.locals.append(&mut lower_body.locals);
        body.children = std::mem::take(&mut lower_body.children);
        *lower_body = Body { children: Children::default(), ..Body::default() };
        body.normalise();
        self.tree.parts = self.tree.parts + body.parts.len() as u64 - before.0 as u64;
        self.tree.words = self.tree.words + body.words() as u64 - before.1 as u64;
        drop((body, lower_body));
        let meta = &mut self.tree.metas[upper as usize];
        let shift = meta.sums.last().copied().unwrap_or(meta.base).wrapping_sub(below.base);
        reserve(&mut meta.ids, below.ids.len());
        reserve(&mut meta.sums, below.sums.len());
        meta.ids.extend(below.ids);
        meta.sums.extend(below.sums.iter().map(|sum| sum.wrapping_add(shift)));
        meta.stamp = meta.stamp.max(below.stamp);
        self.tree.free_nodes.push(lower);
        self.tree.counters.nodes -= 1;
        true
    }

    /// Lets a rank go from all nodes given, each once, and restores the invariants.
    pub(super) fn leave_all(&mut self, rank: u32, mut nodes: Vec<u32>) {
        // In an order that does not depend on the nodes' numbers.
        let metas = &self.tree.metas;
        nodes.sort_by_key(|node| {
            let meta = &metas[*node as usize];
            (meta.depth, meta.sequence(0))
        });
        for node in &nodes {
            self.leave(rank, *node);
        }
        for node in nodes {
            self.settle(node);
        }
    }
}

/// Makes room as [`Writer::append`] does.
fn reserve<T>(list: &mut Vec<T>, more: usize) {
    if list.capacity() - list.len() < more {
        list.reserve_exact(more.max(list.len() / 4));
    }
}
