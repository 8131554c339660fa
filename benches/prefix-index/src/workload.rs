//! What is stored and asked for.

/// SplitMix-like: hashes without a pattern.
pub fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(b).wrapping_add(0x632B_E59B_D9B4_E019);
    x ^= x >> 30;
    x = x.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^= x >> 27;
    x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn segment(seed: u64, len: usize) -> Vec<u64> {
    (0..len).map(|i| mix(seed, 2 * i as u64)).collect()
}

/// Blocks of one event.
const CHUNK: usize = 32;

/// One event: a worker stores blocks after a parent.
pub struct Event {
    pub worker: u64,
    pub id: u64,
    pub parent: Option<u64>,
    pub locals: Vec<u64>,
    /// The engine's names: here, sequence hashes.
    pub names: Vec<u64>,
}

pub struct Workload {
    pub depth: usize,
    pub blocks: usize,
    pub events: Vec<Event>,
    pub sequences: Vec<Vec<u64>>,
}

impl Workload {
    pub fn new(workers: usize, depth: usize, budget: usize) -> Self {
        let count = (budget / (workers * depth)).max(1);
        let quarter = depth / 4;
        let common = segment(1, quarter);
        let (mut streams, mut sequences) = (Vec::new(), Vec::new());
        for worker in 0..workers as u64 {
            let group = segment(1000 + worker / 8, quarter);
            let (mut stream, mut id) = (Vec::new(), 0);
            for n in 0..count as u64 {
                let own = segment(10_000_000 + worker * 1000 + n, depth - 2 * quarter);
                let locals: Vec<u64> = common.iter().chain(&group).chain(&own).copied().collect();
                let typed: Vec<_> = locals.iter().map(|l| crate::kv::hash::LocalHash(*l)).collect();
                let names: Vec<u64> =
                    crate::kv::hash::sequence_hashes(&typed).into_iter().map(|s| s.0).collect();
                let mut parent = None;
                for from in (0..depth).step_by(CHUNK) {
                    let to = (from + CHUNK).min(depth);
                    let (locals, names) = (locals[from..to].to_vec(), names[from..to].to_vec());
                    let last = names.last().copied();
                    stream.push(Event { worker, id, parent, locals, names });
                    (parent, id) = (last, id + 1);
                }
                sequences.push(locals);
            }
            streams.push(stream.into_iter());
        }
        let mut events = Vec::new();
        loop {
            let before = events.len();
            events.extend(streams.iter_mut().filter_map(Iterator::next));
            if events.len() == before {
                break;
            }
        }
        Self { depth, blocks: workers * count * depth, events, sequences }
    }

    /// Queries: whole sequences, such that share the common quarter, and unknown ones.
    pub fn queries(&self, count: usize) -> [Vec<Vec<u64>>; 3] {
        let (depth, all) = (self.depth, &self.sequences);
        let hit = (0..count).map(|i| all[mix(7, i as u64) as usize % all.len()].clone());
        let other = |seed: u64| move |k: usize| mix(seed, k as u64);
        let partial = (0..count).map(|i| {
            let own = (depth / 4..depth).map(other(i as u64 + 99));
            segment(1, depth / 4).into_iter().chain(own).collect()
        });
        let miss = (0..count).map(|i| (0..depth).map(other(i as u64 + 77_777)).collect());
        [hit.collect(), partial.collect(), miss.collect()]
    }
}
