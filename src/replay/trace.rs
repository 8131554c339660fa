//! Traces in Mooncake's format: one JSON object a line, with when a request came, how long its
//! prompt and its output are, and which blocks the prompt is made of.

use std::io::BufRead;

use serde::{Deserialize, Serialize};

use crate::kv::hash::{LocalHash, SequenceHash, sequence_hashes};

/// One line.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Line {
    /// When it came, in ms.
    pub timestamp: f64,
    /// Tokens of the prompt.
    pub input_length: u32,
    /// Tokens of the output.
    pub output_length: u32,
    /// One id a block of the prompt, the last one for what may be a part of a block. Equal ids mean
    /// equal prefixes.
    pub hash_ids: Vec<u64>,
}

/// One request to be replayed.
#[derive(Clone, PartialEq, Debug)]
pub struct Request {
    /// When it comes, in seconds after the first.
    pub at: f64,
    /// Tokens of the prompt, at least 1.
    pub input: u32,
    /// Tokens of the output, at least 1.
    pub output: u32,
    /// The ids of its blocks, as in the trace.
    pub ids: Vec<u64>,
    /// The prompt's full blocks.
    pub hashes: Vec<SequenceHash>,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Reading failed.
    #[error("cannot read the trace: {0}")]
    Io(#[from] std::io::Error),
    /// A line is not what it should be.
    #[error("line {number} of the trace: {why}")]
    Line {
        /// Counted from 1.
        number: usize,
        /// What is wrong with it.
        why: String,
    },
    /// There is no request in it.
    #[error("the trace has no requests")]
    Empty,
}

/// Longest accepted line, in bytes: a prompt of some 800,000 blocks.
const MAX_LINE: u64 = 8 << 20;
/// Longest prompt and output, in tokens.
const MAX_TOKENS: u32 = 1 << 24;

/// Reads a trace, at most `limit` requests of it after leaving out `skip`. Blank lines are nothing.
pub fn read(
    mut from: impl BufRead,
    block_size: u32,
    skip: usize,
    limit: usize,
) -> Result<Vec<Request>, TraceError> {
    let mut lines = Vec::new();
    let (mut number, mut skipped) = (0, 0);
    let mut text = String::new();
    while lines.len() < limit {
        text.clear();
        number += 1;
        let wrong = |why: String| TraceError::Line { number, why };
        // `take` is by value: of the reader's reference, not of the reader.
        let got = std::io::Read::take(&mut from, MAX_LINE + 1).read_line(&mut text);
        let got = got.map_err(|e| match e.kind() {
            std::io::ErrorKind::InvalidData => wrong("it is not UTF-8".to_owned()),
            _ => TraceError::Io(e),
        })?;
        if got == 0 {
            break;
        }
        if got as u64 > MAX_LINE {
            return Err(wrong(format!("it is longer than {MAX_LINE} bytes")));
        }
        if text.trim().is_empty() {
            continue;
        }
        let line: Line = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        check(&line, block_size).map_err(wrong)?;
        if skipped < skip {
            skipped += 1;
            continue;
        }
        lines.push(line);
    }
    if lines.is_empty() {
        return Err(TraceError::Empty);
    }
    Ok(requests(lines, block_size))
}

fn check(line: &Line, block_size: u32) -> Result<(), String> {
    if !line.timestamp.is_finite() || !(0.0..=1e15).contains(&line.timestamp) {
        return Err(format!("timestamp {} is no time in ms", line.timestamp));
    }
    for (name, tokens) in [("input_length", line.input_length), ("output_length", line.output_length)] {
        if tokens > MAX_TOKENS {
            return Err(format!("{name} {tokens} is above {MAX_TOKENS}"));
        }
    }
    let blocks = line.input_length.max(1).div_ceil(block_size) as usize;
    if line.hash_ids.len() != blocks {
        return Err(format!(
            "{} hash_ids for {} tokens, where blocks of {block_size} tokens make {blocks}; is --block-size right?",
            line.hash_ids.len(),
            line.input_length
        ));
    }
    Ok(())
}

/// Makes requests of lines. Timestamps of a coarse grid are spread evenly over their slot, which is
/// the smallest distance of two different ones.
pub fn requests(mut lines: Vec<Line>, block_size: u32) -> Vec<Request> {
    lines.sort_by(|a, b| a.timestamp.total_cmp(&b.timestamp));
    let slot = lines
        .windows(2)
        .map(|pair| pair[1].timestamp - pair[0].timestamp)
        .filter(|gap| *gap > 0.0)
        .fold(f64::INFINITY, f64::min);
    let slot = if slot.is_finite() { slot } else { 0.0 };
    let start = lines.first().map_or(0.0, |line| line.timestamp);
    let mut made = Vec::with_capacity(lines.len());
    for group in lines.chunk_by(|a, b| a.timestamp == b.timestamp) {
        for (nth, line) in group.iter().enumerate() {
            let late = slot * nth as f64 / group.len() as f64;
            let full = (line.input_length / block_size) as usize;
            let locals: Vec<LocalHash> = line.hash_ids.iter().take(full).map(|id| LocalHash(*id)).collect();
            made.push(Request {
                at: (line.timestamp - start + late) / 1000.0,
                input: line.input_length.max(1),
                output: line.output_length.max(1),
                ids: line.hash_ids.clone(),
                hashes: sequence_hashes(&locals),
            });
        }
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<Request>, TraceError> {
        read(text.as_bytes(), 4, 0, usize::MAX)
    }

    #[test]
    fn arrivals_of_one_slot_are_spread_over_it() {
        let line = |at: u32| {
            format!(r#"{{"timestamp": {at}, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}}"#)
        };
        let text = [line(9000), line(9000), line(9000), line(12000), line(18000)].join("\n\n");
        let at: Vec<f64> = parsed(&text).unwrap().iter().map(|r| r.at).collect();
        assert_eq!(at, [0.0, 1.0, 2.0, 3.0, 9.0]);
    }

    #[test]
    fn only_full_blocks_are_hashed_and_equal_beginnings_hash_alike() {
        let text = r#"{"timestamp":0,"input_length":9,"output_length":0,"hash_ids":[1,2,3]}
            {"timestamp":0,"input_length":8,"output_length":2,"hash_ids":[1,2]}"#;
        let made = parsed(text).unwrap();
        assert_eq!((made[0].hashes.len(), made[0].output), (2, 1));
        assert_eq!(made[0].hashes, made[1].hashes);
    }

    #[test]
    fn a_bad_line_is_named_by_its_number_and_fault() {
        let good = r#"{"timestamp":0,"input_length":4,"output_length":1,"hash_ids":[1]}"#;
        for (bad, fault) in [
            ("{", "EOF"),
            (r#"{"timestamp":0}"#, "missing field `input_length`"),
            (r#"{"timestamp":0,"input_length":9,"output_length":1,"hash_ids":[1]}"#, "--block-size"),
            (r#"{"timestamp":-1,"input_length":4,"output_length":1,"hash_ids":[1]}"#, "timestamp"),
            (r#"{"timestamp":0,"input_length":4,"output_length":99999999,"hash_ids":[1]}"#, "output_length"),
        ] {
            let error = parsed(&format!("{good}\n\n{bad}\n")).unwrap_err().to_string();
            assert!(error.contains("line 3") && error.contains(fault), "{error}");
        }
        assert!(matches!(parsed("\n \n").unwrap_err(), TraceError::Empty));
    }

    #[test]
    fn a_part_of_a_trace_can_be_taken() {
        let text: String = (1..=9)
            .map(|n| {
                format!("{{\"timestamp\":{n},\"input_length\":4,\"output_length\":1,\"hash_ids\":[{n}]}}\n")
            })
            .collect();
        let part = read(text.as_bytes(), 4, 2, 3).unwrap();
        let ids: Vec<u64> = part.iter().map(|r| r.ids[0]).collect();
        assert_eq!((ids, part[0].at), (vec![3, 4, 5], 0.0));
    }
}
