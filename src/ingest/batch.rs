//! Gathering messages into batches, until the sink is ready for the next.

use crate::kv::event::Decoded;
use crate::kv::feed::Cursor;
use crate::kv::types::KvOp;

/// Blocks in a batch, beyond which it is delivered before anything else is read. One message may
/// bring more.
pub const MOST_BLOCKS: u64 = 8192;

/// Messages in a batch.
pub const MOST_MESSAGES: u64 = 1024;

/// Operations of one rank that belong together: applied all or none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FeedBatch {
    /// The cursor that this continues.
    pub after: Cursor,
    /// The cursor behind it.
    pub cursor: Cursor,
    /// What happened, in order. A [`KvOp::Clear`] stands first if what was known became void.
    pub ops: Vec<KvOp>,
    /// How many messages of the engine these are.
    pub messages: u64,
}

/// A batch in the making.
#[derive(Debug)]
pub(super) struct Gathering {
    batch: FeedBatch,
    blocks: u64,
    /// Blocks that the rank can hold.
    capacity: Option<u64>,
}

impl Gathering {
    pub(super) fn new(cursor: Cursor, capacity: Option<u64>) -> Self {
        let mut batch = FeedBatch { after: cursor, cursor, ops: Vec::new(), messages: 0 };
        if let (Cursor::UNKNOWN, Some(capacity)) = (cursor.owing, capacity) {
            // Whoever cleared the rank did not know how much it holds.
            batch.cursor.owing = capacity.max(1);
        }
        Self { batch, blocks: 0, capacity }
    }

    /// All before is void.
    pub(super) fn clear(&mut self, whole: bool) {
        self.batch.ops = vec![KvOp::Clear];
        self.batch.cursor = Cursor::cleared(whole, self.capacity);
        self.blocks = 1;
    }

    /// The next message.
    pub(super) fn add(&mut self, seq: u64, print: u64, decoded: Decoded) {
        self.batch.cursor = self.batch.cursor.after(seq, print, &decoded);
        self.batch.messages += 1;
        self.blocks += decoded.ops.iter().map(blocks).sum::<u64>();
        self.batch.ops.extend(decoded.ops);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.batch.after == self.batch.cursor && self.batch.ops.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.blocks >= MOST_BLOCKS || self.batch.messages >= MOST_MESSAGES
    }

    /// Takes the batch out; the next one continues it.
    pub(super) fn take(&mut self) -> FeedBatch {
        let next = Self::new(self.batch.cursor, self.capacity);
        std::mem::replace(self, next).batch
    }
}

fn blocks(op: &KvOp) -> u64 {
    let count = match op {
        KvOp::Store { blocks, .. } => blocks.len(),
        KvOp::Copy { blocks, .. } | KvOp::Remove { blocks, .. } => blocks.len(),
        KvOp::Clear => 1,
    };
    count as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::types::{EngineHash, Tier};

    fn removed(count: u64) -> Decoded {
        let blocks = (0..count).map(EngineHash).collect();
        Decoded { ops: vec![KvOp::Remove { tier: Tier::Gpu, blocks }], ..Decoded::default() }
    }

    #[test]
    fn batches_follow_each_other_without_a_gap_and_know_when_they_are_full() {
        let mut gathering = Gathering::new(Cursor::default(), None);
        assert!(gathering.is_empty());
        gathering.add(0, 7, removed(MOST_BLOCKS - 1));
        assert!(!gathering.is_full() && !gathering.is_empty());
        gathering.add(1, 8, removed(1));
        assert!(gathering.is_full());
        let first = gathering.take();
        assert_eq!((first.after, first.cursor.last, first.messages), (Cursor::default(), Some((1, 8)), 2));
        // A message without blocks moves the cursor all the same.
        gathering.add(2, 9, Decoded::default());
        assert!(!gathering.is_empty());
        let second = gathering.take();
        assert_eq!((second.after, second.ops.len()), (first.cursor, 0));
    }

    #[test]
    fn a_rank_that_was_cleared_without_its_capacity_is_whole_again_when_that_is_known_and_stored() {
        let lost = Cursor { last: Some((3, 3)), owing: Cursor::UNKNOWN };
        assert!(Gathering::new(lost, None).is_empty());
        let mut gathering = Gathering::new(lost, Some(2));
        assert_eq!(gathering.batch.after, lost);
        for seq in 4..6 {
            assert!(gathering.batch.cursor.recovering());
            gathering.add(seq, 1, Decoded { stored: 1, ..Decoded::default() });
        }
        assert!(!gathering.batch.cursor.recovering());
    }

    #[test]
    fn a_clear_makes_what_was_gathered_void() {
        let mut gathering = Gathering::new(Cursor { last: Some((9, 9)), owing: 0 }, Some(100));
        gathering.add(10, 1, removed(5));
        gathering.clear(false);
        gathering.add(30, 2, Decoded::default());
        let batch = gathering.take();
        assert_eq!(batch.ops, [KvOp::Clear]);
        assert_eq!(batch.after.last, Some((9, 9)));
        assert_eq!(batch.cursor, Cursor { last: Some((30, 2)), owing: 100 });
    }
}
