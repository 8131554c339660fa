//! Bytes of KV events, as the engines' own encoders write them.

use std::sync::Arc;

use rmp::encode::{
    ByteBuf, write_array_len, write_f64, write_map_len, write_nil, write_sint, write_str, write_uint,
};

use super::EventFormat;
use crate::engines::sim::engine::KvEventBatch;
use crate::engines::sim::kv::{KvEvent, Medium};

/// Writes into memory, where nothing fails.
struct Writer(ByteBuf);

impl Writer {
    fn nil(&mut self) {
        let Ok(()) = write_nil(&mut self.0);
    }

    fn text(&mut self, text: &str) {
        write_str(&mut self.0, text).unwrap_or_default();
    }

    fn optional(&mut self, text: Option<&str>) {
        match text {
            Some(text) => self.text(text),
            None => self.nil(),
        }
    }

    fn number(&mut self, number: u64) {
        let _ = write_uint(&mut self.0, number);
    }

    fn list(&mut self, length: usize) {
        // No list of an engine has 2³² entries.
        let _ = write_array_len(&mut self.0, length as u32);
    }

    fn map(&mut self, length: usize) {
        let _ = write_map_len(&mut self.0, length as u32);
    }

    fn hash(&mut self, hash: u64, format: EventFormat) {
        if format == EventFormat::Sglang {
            let _ = write_sint(&mut self.0, hash as i64);
        } else {
            self.number(hash);
        }
    }

    fn hashes(&mut self, hashes: &[u64], format: EventFormat) {
        self.list(hashes.len());
        hashes.iter().for_each(|hash| self.hash(*hash, format));
    }

    fn parent(&mut self, parent: Option<u64>, format: EventFormat) {
        match parent {
            Some(hash) => self.hash(hash, format),
            None => self.nil(),
        }
    }

    fn tokens(&mut self, tokens: &[u32]) {
        self.list(tokens.len());
        tokens.iter().for_each(|token| self.number(u64::from(*token)));
    }

    fn extra_keys(&mut self, keys: &[Option<Vec<Arc<str>>>]) {
        self.list(keys.len());
        for keys in keys {
            match keys {
                None => self.nil(),
                Some(keys) => {
                    self.list(keys.len());
                    keys.iter().for_each(|key| self.text(key));
                }
            }
        }
    }
}

/// What each engine calls it.
fn name(medium: Medium, format: EventFormat) -> &'static str {
    match (medium, format) {
        (Medium::Gpu, _) => "GPU",
        (Medium::Host, EventFormat::VllmMap | EventFormat::VllmArray) => "CPU",
        (Medium::Host, EventFormat::Sglang) => "CPU_PINNED",
    }
}

/// The payload of a batch of a rank.
pub(super) fn batch(batch: &KvEventBatch, rank: u32, format: EventFormat) -> Vec<u8> {
    let mut out = Writer(ByteBuf::new());
    out.list(3);
    let _ = write_f64(&mut out.0, batch.timestamp);
    out.list(batch.events.len());
    batch.events.iter().for_each(|event| write_event(&mut out, event, format));
    out.number(rank.into());
    out.0.into_vec()
}

fn write_event(out: &mut Writer, event: &KvEvent, format: EventFormat) {
    match (event, format) {
        (KvEvent::Stored { medium: Medium::Host, .. }, EventFormat::VllmMap | EventFormat::VllmArray) => {
            stored_on_host(out, event, format);
        }
        (KvEvent::Stored { .. }, EventFormat::VllmMap) => stored_vllm(out, event),
        (KvEvent::Stored { .. }, EventFormat::VllmArray) => stored_array(out, event),
        (KvEvent::Stored { .. }, EventFormat::Sglang) => stored_sglang(out, event),
        (KvEvent::Removed { block_hashes, medium }, EventFormat::VllmArray) => {
            out.list(4);
            out.text("BlockRemoved");
            out.hashes(block_hashes, format);
            out.text(name(*medium, format));
            out.number(0);
        }
        (KvEvent::Removed { block_hashes, medium }, _) => {
            let vllm = format == EventFormat::VllmMap && *medium == Medium::Gpu;
            out.map(if vllm { 4 } else { 3 });
            out.text("type");
            out.text("BlockRemoved");
            out.text("block_hashes");
            out.hashes(block_hashes, format);
            out.text("medium");
            out.text(name(*medium, format));
            if vllm {
                out.text("group_idx");
                out.number(0);
            }
        }
        (KvEvent::Cleared, EventFormat::VllmArray) => {
            out.list(1);
            out.text("AllBlocksCleared");
        }
        (KvEvent::Cleared, _) => {
            out.map(1);
            out.text("type");
            out.text("AllBlocksCleared");
        }
    }
}

/// What all maps begin with.
fn stored_head(out: &mut Writer, event: &KvEvent, format: EventFormat) {
    let KvEvent::Stored { block_hashes, parent_block_hash, token_ids, block_size, medium, .. } = event else {
        return;
    };
    out.text("type");
    out.text("BlockStored");
    out.text("block_hashes");
    out.hashes(block_hashes, format);
    out.text("parent_block_hash");
    out.parent(*parent_block_hash, format);
    out.text("token_ids");
    out.tokens(token_ids);
    out.text("block_size");
    out.number(*block_size as u64);
    out.text("lora_id");
    out.nil();
    out.text("medium");
    out.text(name(*medium, format));
}

/// vLLM's offloading names the blocks and no more: without parent, ids or groups.
fn stored_on_host(out: &mut Writer, event: &KvEvent, format: EventFormat) {
    let KvEvent::Stored { block_hashes, block_size, lora_name, .. } = event else { return };
    if format == EventFormat::VllmArray {
        out.list(12);
        out.text("BlockStored");
        out.hashes(block_hashes, format);
        out.nil();
        out.tokens(&[]);
        out.number(*block_size as u64);
        out.nil();
        out.text("CPU");
        out.optional(lora_name.as_deref());
        (0..4).for_each(|_| out.nil());
        return;
    }
    let bare = KvEvent::Stored {
        block_hashes: block_hashes.clone(),
        parent_block_hash: None,
        token_ids: Vec::new(),
        block_size: *block_size,
        lora_name: None,
        cache_salt: None,
        extra_keys: Vec::new(),
        medium: Medium::Host,
    };
    out.map(8);
    stored_head(out, &bare, format);
    out.text("lora_name");
    out.optional(lora_name.as_deref());
}

fn stored_vllm(out: &mut Writer, event: &KvEvent) {
    let KvEvent::Stored { lora_name, extra_keys, .. } = event else { return };
    out.map(11);
    stored_head(out, event, EventFormat::VllmMap);
    out.text("lora_name");
    out.optional(lora_name.as_deref());
    out.text("extra_keys");
    out.extra_keys(extra_keys);
    out.text("group_idx");
    out.number(0);
    out.text("kv_cache_spec_kind");
    out.text("full_attention");
}

fn stored_array(out: &mut Writer, event: &KvEvent) {
    let KvEvent::Stored {
        block_hashes, parent_block_hash, token_ids, block_size, lora_name, extra_keys, ..
    } = event
    else {
        return;
    };
    out.list(12);
    out.text("BlockStored");
    out.hashes(block_hashes, EventFormat::VllmArray);
    out.parent(*parent_block_hash, EventFormat::VllmArray);
    out.tokens(token_ids);
    out.number(*block_size as u64);
    out.nil();
    out.text("GPU");
    out.optional(lora_name.as_deref());
    out.extra_keys(extra_keys);
    out.number(0);
    out.text("full_attention");
    out.nil();
}

fn stored_sglang(out: &mut Writer, event: &KvEvent) {
    let KvEvent::Stored { lora_name, cache_salt, .. } = event else { return };
    out.map(7 + usize::from(cache_salt.is_some()) + usize::from(lora_name.is_some()));
    stored_head(out, event, EventFormat::Sglang);
    for (name, value) in [("cache_salt", cache_salt), ("lora_name", lora_name)] {
        if let Some(value) = value {
            out.text(name);
            out.text(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const REAL: &str = include_str!("../../../../tests/golden/kv-events/frames_real_vllm.jsonl");
    const FRAMES: &str = include_str!("../../../../tests/golden/kv-events/frames.jsonl");

    fn events(decoded: &Value) -> Vec<KvEvent> {
        let hashes = |event: &Value| {
            let hashes = event["block_hashes"].as_array().unwrap().iter();
            hashes.map(|hash| hash.as_u64().unwrap_or_else(|| hash.as_i64().unwrap() as u64)).collect()
        };
        let text = |value: &Value| value.as_str().map(Arc::from);
        let of = |event: &Value| match event["type"].as_str().unwrap() {
            "AllBlocksCleared" => KvEvent::Cleared,
            "BlockRemoved" => KvEvent::Removed { block_hashes: hashes(event), medium: Medium::Gpu },
            _ => KvEvent::Stored {
                block_hashes: hashes(event),
                parent_block_hash: event["parent_block_hash"]
                    .as_u64()
                    .or_else(|| event["parent_block_hash"].as_i64().map(|hash| hash as u64)),
                token_ids: event["token_ids"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|t| t.as_u64().unwrap() as u32)
                    .collect(),
                block_size: event["block_size"].as_u64().unwrap() as usize,
                lora_name: text(&event["lora_name"]),
                cache_salt: text(&event["cache_salt"]),
                extra_keys: event["extra_keys"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|keys| {
                        keys.as_array().map(|keys| keys.iter().map(|key| text(key).unwrap()).collect())
                    })
                    .collect(),
                medium: if event["medium"] == "GPU" { Medium::Gpu } else { Medium::Host },
            },
        };
        decoded[1].as_array().unwrap().iter().map(of).collect()
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The payload of a recorded batch, from its decoding; the time from its bytes, to the last bit.
    fn written(record: &Value, format: EventFormat) -> String {
        let bits = &record["frames_hex"][2].as_str().unwrap()[4..20];
        let timestamp = f64::from_bits(u64::from_str_radix(bits, 16).unwrap());
        hex(&batch(&KvEventBatch { sequence: 0, timestamp, events: events(&record["decoded"]) }, 0, format))
    }

    #[test]
    fn what_a_running_engine_wrote_is_written_byte_by_byte() {
        let mut compared = 0;
        for line in REAL.lines() {
            let record: Value = serde_json::from_str(line).unwrap();
            let written = written(&record, EventFormat::VllmMap);
            assert_eq!(written, record["frames_hex"][2].as_str().unwrap());
            compared += 1;
        }
        assert_eq!(compared, 71);
    }

    #[test]
    fn sglangs_frames_are_written_byte_by_byte() {
        let mut compared = 0;
        for line in FRAMES.lines() {
            let record: Value = serde_json::from_str(line).unwrap();
            // Those with a tier, a session or a rank are of things that are not simulated.
            let simulated = ["stored_neg_i64_root", "removed"].map(Value::from);
            if record["version"] == "0.5.23" && simulated.contains(&record["case"]) {
                let written = written(&record, EventFormat::Sglang);
                assert_eq!(written, record["frames_hex"][2].as_str().unwrap());
                compared += 1;
            }
        }
        assert_eq!(compared, 2);
    }

    #[test]
    fn lists_have_the_fields_of_the_last_version_that_wrote_them() {
        let decoded = |bytes: &[u8]| {
            let mut reader = crate::kv::msgpack::Reader::new(bytes);
            (reader.skip().unwrap().len(), bytes.len())
        };
        let event = KvEvent::Stored {
            block_hashes: vec![2],
            parent_block_hash: None,
            token_ids: vec![1, 2, 3, 4],
            block_size: 4,
            lora_name: None,
            cache_salt: Some("s".into()),
            extra_keys: vec![Some(vec!["s".into()])],
            medium: Medium::Gpu,
        };
        let removed = KvEvent::Removed { block_hashes: vec![1], medium: Medium::Gpu };
        let events = vec![removed, event, KvEvent::Cleared];
        let bytes = batch(&KvEventBatch { sequence: 7, timestamp: 1.0, events }, 0, EventFormat::VllmArray);
        let (read, all) = decoded(&bytes);
        assert_eq!(read, all);
        // The recorded list of 0.23.0, with this block's extra keys and group instead of none.
        let recorded = "9cab426c6f636b53746f7265649102c0940102030404c0a3475055c091";
        assert!(hex(&bytes).contains(recorded), "{}", hex(&bytes));
        assert!(hex(&bytes).contains("94ac426c6f636b52656d6f7665649101a347505500"));
        assert!(hex(&bytes).contains("91b0416c6c426c6f636b73436c6561726564"));
    }

    #[test]
    fn blocks_on_the_host_are_told_in_each_engines_words_and_understood() {
        use crate::kv::event::{Decoder, Format};
        use crate::kv::types::{EngineHash, KvOp, Tier};
        let stored = |hash, medium| KvEvent::Stored {
            block_hashes: vec![hash],
            parent_block_hash: None,
            token_ids: vec![1, 2, 3, 4],
            block_size: 4,
            lora_name: None,
            cache_salt: None,
            extra_keys: vec![None],
            medium,
        };
        let removed = |hash, medium| KvEvent::Removed { block_hashes: vec![hash], medium };
        let events = vec![
            stored(5, Medium::Gpu),
            stored(5, Medium::Host),
            removed(5, Medium::Gpu),
            removed(5, Medium::Host),
        ];
        let written = KvEventBatch { sequence: 0, timestamp: 1.0, events };
        for (format, name) in [
            (EventFormat::VllmMap, "a3435055"),
            (EventFormat::VllmArray, "a3435055"),
            (EventFormat::Sglang, "aa4350555f50494e4e4544"),
        ] {
            let bytes = batch(&written, 0, format);
            assert!(hex(&bytes).contains(name), "{format:?}");
            let mut decoder = Decoder::new(Format { block_size: 4, group: 0 });
            let ops = decoder.decode(&bytes, &|_| Some(crate::kv::hash::Seed::default())).unwrap().ops;
            let [KvOp::Store { tier: Tier::Gpu, .. }, on_host, first, second] = &ops[..] else {
                panic!("{format:?}: {ops:?}");
            };
            // SGLang says the ids again; vLLM names what is known.
            assert!(
                matches!(on_host, KvOp::Store { tier: Tier::Host, .. } | KvOp::Copy { tier: Tier::Host, .. }),
                "{format:?}: {on_host:?}"
            );
            let blocks = vec![EngineHash(5)];
            assert_eq!(first, &KvOp::Remove { tier: Tier::Gpu, blocks: blocks.clone() });
            assert_eq!(second, &KvOp::Remove { tier: Tier::Host, blocks });
        }
    }
}
