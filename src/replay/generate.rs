//! Made-up traces of kinds of traffic that recorded ones lack, the same for equal seeds.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::trace::Line;

/// A kind of traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Agents with long shared instructions that call tools: prompts grow by each result, turns
    /// follow one another within seconds.
    Agents,
    /// Questions about documents, of which few are asked about often.
    Rag,
    /// Conversations of small turns with pauses for thought.
    Chat,
    /// Prompts that have nothing in common.
    Uniform,
    /// Batches of prompts with the same examples in front, all at once, among others without.
    Bursts,
}

impl Kind {
    /// All, with the names they go by.
    pub const ALL: [(&'static str, Self); 5] = [
        ("agents", Self::Agents),
        ("rag", Self::Rag),
        ("chat", Self::Chat),
        ("uniform", Self::Uniform),
        ("bursts", Self::Bursts),
    ];

    /// The kind of that name; the error lists those that are known.
    pub fn parse(name: &str) -> Result<Self, String> {
        let found = Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, kind)| *kind);
        let names = || Self::ALL.map(|(name, _)| name).join(", ");
        found.ok_or_else(|| format!("unknown kind of trace {name:?}; known are {}", names()))
    }
}

/// A piece of text that prompts may share: its name and its length in tokens.
type Piece = (u64, u32);

/// Tokens of the prompt that `pieces` make.
fn length(pieces: &[Piece]) -> u32 {
    pieces.iter().map(|(_, tokens)| tokens).sum()
}

/// One id a block, the same for equal beginnings. Cut to 52 bits, so that JavaScript can read them.
fn ids(pieces: &[Piece], block_size: u32) -> Vec<u64> {
    let mut ids = Vec::new();
    let (mut id, mut room) = (0, block_size);
    for (name, tokens) in pieces {
        let (mut from, mut left) = (0, *tokens);
        while left > 0 {
            let part = left.min(room);
            let what = [name.to_le_bytes(), u64::from(from).to_le_bytes(), u64::from(part).to_le_bytes()];
            id = xxh3_64_with_seed(what.as_flattened(), id);
            (from, left, room) = (from + part, left - part, room - part);
            if room == 0 {
                ids.push(id >> 12);
                room = block_size;
            }
        }
    }
    if room < block_size {
        ids.push(id >> 12);
    }
    ids
}

struct Maker {
    rng: StdRng,
    lines: Vec<Line>,
    block_size: u32,
    names: u64,
}

impl Maker {
    /// A piece that nobody had before.
    fn piece(&mut self, tokens: std::ops::Range<u32>) -> Piece {
        self.names += 1;
        (self.names, self.rng.random_range(tokens))
    }

    /// A pause with this mean, in ms, as of independent arrivals.
    fn pause(&mut self, mean: f64) -> f64 {
        let uniform: f64 = self.rng.random_range(f64::EPSILON..1.0);
        -mean * uniform.ln()
    }

    fn ask(&mut self, at: f64, pieces: &[Piece], output: u32) {
        self.lines.push(Line {
            // Whole microseconds: what is written is read again as it was.
            timestamp: (at * 1000.0).round() / 1000.0,
            input_length: length(pieces),
            output_length: output,
            hash_ids: ids(pieces, self.block_size),
        });
    }

    /// Turns that grow by what was put out and what comes in between.
    fn conversation(
        &mut self,
        mut at: f64,
        first: Vec<Piece>,
        turns: u32,
        between: std::ops::Range<u32>,
        output: std::ops::Range<u32>,
        pause: f64,
    ) {
        let mut pieces = first;
        for _ in 0..turns {
            pieces.push(self.piece(between.clone()));
            let answer = self.piece(output.clone());
            self.ask(at, &pieces, answer.1);
            pieces.push(answer);
            // The answer takes a while, too.
            at += 1000.0 + f64::from(answer.1) * 20.0 + self.pause(pause);
        }
    }
}

/// Makes `requests` requests.
pub fn generate(kind: Kind, requests: usize, block_size: u32, seed: u64) -> Vec<Line> {
    let rng = StdRng::seed_from_u64(seed);
    let mut maker = Maker { rng, lines: Vec::with_capacity(requests), block_size, names: 0 };
    let mut at = 0.0;
    match kind {
        Kind::Agents => {
            let instructions: Vec<Piece> = (0..6).map(|_| maker.piece(4000..12_000)).collect();
            while maker.lines.len() < requests {
                at += maker.pause(4500.0);
                let shared = instructions[maker.rng.random_range(0..instructions.len())];
                let turns = maker.rng.random_range(5..30);
                maker.conversation(at, vec![shared], turns, 200..3000, 50..300, 3000.0);
            }
        }
        Kind::Rag => {
            let system = maker.piece(600..601);
            let documents: Vec<Piece> = (0..3000).map(|_| maker.piece(3000..16_000)).collect();
            // The n-th document is asked about in proportion to 1/n.
            let shares: Vec<f64> = (1..=documents.len())
                .scan(0.0, |sum, n| {
                    *sum += 1.0 / n as f64;
                    Some(*sum)
                })
                .collect();
            let all = shares.last().copied().unwrap_or(1.0);
            while maker.lines.len() < requests {
                at += maker.pause(130.0);
                let ticket = maker.rng.random_range(0.0..all);
                let document =
                    documents[shares.partition_point(|sum| *sum <= ticket).min(documents.len() - 1)];
                let question = maker.piece(30..300);
                let output = maker.rng.random_range(50..400);
                maker.ask(at, &[system, document, question], output);
            }
        }
        Kind::Chat => {
            let systems: Vec<Piece> = (0..20).map(|_| maker.piece(100..1500)).collect();
            while maker.lines.len() < requests {
                at += maker.pause(180.0);
                let system = systems[maker.rng.random_range(0..systems.len())];
                let turns = maker.rng.random_range(1..15);
                maker.conversation(at, vec![system], turns, 20..300, 50..600, 20_000.0);
            }
        }
        Kind::Uniform => {
            while maker.lines.len() < requests {
                at += maker.pause(90.0);
                let exponent: f64 = maker.rng.random_range(5.0..10.0);
                let tokens = exponent.exp() as u32;
                let prompt = maker.piece(tokens..tokens + 1);
                let output = maker.rng.random_range(10..500);
                maker.ask(at, &[prompt], output);
            }
        }
        Kind::Bursts => {
            while maker.lines.len() < requests {
                at += maker.pause(8000.0);
                let examples = maker.piece(3000..9000);
                for _ in 0..maker.rng.random_range(10..60) {
                    let (late, output) = (maker.pause(500.0), maker.rng.random_range(5..80));
                    let question = maker.piece(50..600);
                    maker.ask(at + late, &[examples, question], output);
                }
                for _ in 0..25 {
                    let late = maker.pause(4000.0);
                    let (prompt, output) = (maker.piece(500..4000), maker.rng.random_range(50..600));
                    maker.ask(at + late, &[prompt], output);
                }
            }
        }
    }
    maker.lines.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    maker.lines.truncate(requests);
    maker.lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replay::trace;

    #[test]
    fn equal_seeds_make_equal_traces_that_can_be_read() {
        for (name, kind) in Kind::ALL {
            assert_eq!(Kind::parse(name), Ok(kind));
            let lines = generate(kind, 300, 64, 7);
            assert_eq!(lines, generate(kind, 300, 64, 7), "{name}");
            assert_ne!(lines, generate(kind, 300, 64, 8), "{name}");
            let text: String = lines.iter().map(|l| serde_json::to_string(l).unwrap() + "\n").collect();
            let read = trace::read(text.as_bytes(), 64, 0, usize::MAX).unwrap();
            assert_eq!(read.len(), 300, "{name}");
            assert!(read.is_sorted_by(|a, b| a.at <= b.at), "{name}");
        }
        assert!(Kind::parse("x").unwrap_err().contains("agents, rag"));
    }

    #[test]
    fn ids_are_equal_exactly_as_far_as_the_pieces_are() {
        let (a, b) = (ids(&[(1, 10), (2, 7)], 4), ids(&[(1, 10), (3, 7)], 4));
        assert_eq!((a.len(), &a[..2]), (5, &b[..2]));
        assert!(a[2] != b[2] && a[3] != b[3]);
        assert_eq!(ids(&[(1, 10)], 4)[..2], a[..2]);
    }

    #[test]
    fn uniform_prompts_share_nothing_and_the_others_do() {
        for (name, kind) in Kind::ALL {
            let mut seen = std::collections::HashSet::new();
            let again = generate(kind, 500, 64, 1)
                .iter()
                .filter(|line| line.hash_ids.first().is_some_and(|id| !seen.insert(*id)))
                .count();
            assert_eq!(again > 100, kind != Kind::Uniform, "{name}: {again}");
        }
    }
}
