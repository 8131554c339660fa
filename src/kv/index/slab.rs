//! Where the nodes live: what look-ups read, each node behind a lock of its own.
//!
//! **Invariant**: whoever holds a node's lock and goes on to a child takes the child's lock before
//! letting go, always downwards. The one writer unlinks a node under the lock of its parent before
//! it takes the node to pieces. So a number found in a node under its lock leads to the node that
//! was meant, though numbers are used again; and as all go downwards, nobody waits in a circle.

use std::sync::OnceLock;

use parking_lot::RwLock;

use super::body::Body;

/// Where prompts begin: a node without blocks. Never freed.
pub(super) const ROOT: u32 = 0;

/// Nodes made at once. Small, so that making them holds nobody up.
const SEGMENT: usize = 1024;

/// Segments at most: 16.7 million nodes. The bound in bytes is clamped so that they suffice.
const SEGMENTS: usize = 1 << 14;

/// How many nodes there is room for.
pub(super) const MOST_NODES: usize = SEGMENT * SEGMENTS;

/// Nodes that are made when the first of them is needed.
type Segment = OnceLock<Box<[RwLock<Body>]>>;

/// All nodes, by number. Never moves and never shrinks.
pub(super) struct Slab {
    segments: Box<[Segment]>,
}

impl Slab {
    pub(super) fn new() -> Self {
        Self { segments: (0..SEGMENTS).map(|_| OnceLock::new()).collect() }
    }

    pub(super) fn get(&self, node: u32) -> &RwLock<Body> {
        let segment = self.segments[node as usize / SEGMENT]
            .get_or_init(|| (0..SEGMENT).map(|_| RwLock::new(Body::default())).collect());
        &segment[node as usize % SEGMENT]
    }
}
