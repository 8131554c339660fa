//! Look-ups: down the tree along a prompt, with all ranks at once.

use std::cell::RefCell;

use super::body::{Body, Run, common};
use super::ranks::ones;
use super::slab::{ROOT, Slab};
use crate::kv::hash::LocalHash;
use crate::kv::types::{Overlap, RankIx};

/// What a look-up needs while it runs; kept by the thread, so that nothing is allocated.
#[derive(Default)]
struct Scratch {
    /// Ranks that hold the first block.
    first: Vec<u64>,
    /// Those that hold every block so far.
    going: Vec<u64>,
    /// Those that hold a node in full.
    full: Vec<u64>,
    /// By rank: where it ended, if it did.
    ended: Vec<u32>,
    /// By rank: blocks that are not on the accelerator. Meaningless unless `slower`.
    host: Vec<u32>,
    disk: Vec<u32>,
    slower: bool,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// See [`super::Index::lookup`].
pub(super) fn lookup(slab: &Slab, locals: &[LocalHash], out: &mut Vec<Overlap>) {
    out.clear();
    let Some(first) = locals.first() else { return };
    SCRATCH.with_borrow_mut(|scratch| {
        let root = slab.get(ROOT).read();
        let Some(child) = root.children.get(*first) else { return };
        let mut body = slab.get(child).read();
        drop(root);
        scratch.begin(&body);
        let mut at = 0;
        loop {
            let shared = common(&body.locals, &locals[at..]);
            let going = scratch.pass(&body, at, shared);
            at += shared;
            if !going || shared < body.locals.len() || at == locals.len() {
                break;
            }
            let Some(child) = body.children.get(locals[at]) else { break };
            // The child's lock is taken before this one is let go: see `slab`.
            let next = slab.get(child).read();
            body = next;
        }
        drop(body);
        scratch.report(at as u32, out);
    });
}

impl Scratch {
    fn begin(&mut self, body: &Body) {
        let last_part = body.parts.last().map_or(0, |part| part.rank as usize / 64 + 1);
        let width = body.full.width().max(last_part);
        self.going.clear();
        self.going.resize(width, 0);
        body.full.add_to(&mut self.going);
        for part in body.parts.iter().filter(|part| part.contains(0)) {
            self.going[part.rank as usize / 64] |= 1 << (part.rank % 64);
        }
        self.first.clone_from(&self.going);
        self.slower = false;
        if self.ended.len() < width * 64 {
            self.ended.resize(width * 64, 0);
            self.host.resize(width * 64, 0);
            self.disk.resize(width * 64, 0);
        }
    }

    /// Goes along `shared` blocks of a node. Whether any rank is left.
    fn pass(&mut self, body: &Body, at: usize, shared: usize) -> bool {
        self.full.clear();
        self.full.resize(self.going.len(), 0);
        body.full.add_to(&mut self.full);
        let mut any = 0;
        for word in 0..self.going.len() {
            let mut others = self.going[word] & !self.full[word];
            while others != 0 {
                let bit = others.trailing_zeros();
                others &= others - 1;
                let rank = word as u32 * 64 + bit;
                let run = body.part(rank).map_or(Run::default(), |part| part.run(shared));
                if run.host > 0 || run.disk > 0 {
                    self.slow(rank as usize, run);
                }
                if (run.blocks as usize) < shared {
                    self.ended[rank as usize] = at as u32 + run.blocks;
                    self.going[word] &= !(1 << bit);
                }
            }
            any |= self.going[word];
        }
        any != 0
    }

    fn slow(&mut self, rank: usize, run: Run) {
        if !self.slower {
            self.slower = true;
            self.host[..self.first.len() * 64].fill(0);
            self.disk[..self.first.len() * 64].fill(0);
        }
        self.host[rank] += run.host;
        self.disk[rank] += run.disk;
    }

    fn report(&self, end: u32, out: &mut Vec<Overlap>) {
        out.extend(ones(&self.first).map(|rank| {
            let at = rank as usize;
            let going = self.going[at / 64] >> (at % 64) & 1 == 1;
            let blocks = if going { end } else { self.ended[at] };
            let (host, disk) = if self.slower { (self.host[at], self.disk[at]) } else { (0, 0) };
            Overlap { rank: RankIx(rank), blocks, gpu: blocks - host - disk, host }
        }));
    }
}
