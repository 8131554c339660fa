//! Every recorded frame of every engine version, and bytes that nobody would send.

use std::cell::RefCell;

use proptest::prelude::*;
use serde_json::Value as Json;

use super::*;

const FRAMES: &str = include_str!("../../../tests/golden/kv-events/frames.jsonl");
const REAL: &str = include_str!("../../../tests/golden/kv-events/frames_real_vllm.jsonl");

fn records(text: &str) -> Vec<Json> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn frames(record: &Json) -> Vec<Vec<u8>> {
    record["frames_hex"].as_array().unwrap().iter().map(|frame| hex(frame.as_str().unwrap())).collect()
}

fn decoder(block_size: u32) -> Decoder {
    Decoder::new(Format { block_size, group: 0 })
}

/// The field of a recorded event, by name whatever its form.
fn recorded<'a>(event: &'a Json, name: &str, place: usize) -> &'a Json {
    match event {
        Json::Array(parts) => parts.get(place).unwrap_or(&Json::Null),
        map => &map[name],
    }
}

fn recorded_hash(value: &Json) -> EngineHash {
    match value {
        Json::Number(number) => {
            EngineHash(number.as_u64().unwrap_or_else(|| number.as_i64().unwrap() as u64))
        }
        other => EngineHash(xxh3_64(&hex(other["$hex"].as_str().unwrap()))),
    }
}

fn recorded_hashes(event: &Json) -> Vec<EngineHash> {
    recorded(event, "block_hashes", 1).as_array().unwrap().iter().map(recorded_hash).collect()
}

fn recorded_tier(value: &Json) -> Tier {
    match value.as_str() {
        None | Some("GPU") => Tier::Gpu,
        Some("CPU" | "CPU_PINNED") => Tier::Host,
        Some(_) => Tier::Disk,
    }
}

/// One block or clear at a time, so that it does not matter how operations are gathered.
#[derive(PartialEq, Debug)]
enum Fact {
    Stored(Option<EngineHash>, Tier, LocalHash, EngineHash),
    Removed(Tier, EngineHash),
    Cleared,
}

fn facts(ops: &[KvOp]) -> Vec<Fact> {
    let mut facts = Vec::new();
    for op in ops {
        match op {
            KvOp::Store { parent, tier, blocks, .. } => {
                let mut before = *parent;
                for (local, hash) in blocks {
                    facts.push(Fact::Stored(before, *tier, *local, *hash));
                    before = Some(*hash);
                }
            }
            KvOp::Copy { .. } => panic!("none was recorded"),
            KvOp::Remove { tier, blocks } => {
                facts.extend(blocks.iter().map(|hash| Fact::Removed(*tier, *hash)));
            }
            KvOp::Clear => facts.push(Fact::Cleared),
        }
    }
    facts
}

/// What the recording says happened, reckoned from its JSON in the plainest way.
fn expected(events: &[Json], size: usize, seeds: &BTreeMap<EngineHash, Seed>) -> Vec<Fact> {
    let mut facts = Vec::new();
    for event in events {
        match recorded(event, "type", 0).as_str().unwrap() {
            "AllBlocksCleared" => facts.push(Fact::Cleared),
            "BlockRemoved" => {
                let tier = recorded_tier(recorded(event, "medium", 2));
                facts.extend(recorded_hashes(event).into_iter().map(|hash| Fact::Removed(tier, hash)));
            }
            _ => {
                let tokens: Option<Vec<u32>> = recorded(event, "token_ids", 3)
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|token| token.as_u64().map(|token| token as u32))
                    .collect();
                let same_size = recorded(event, "block_size", 4) == size;
                let Some(tokens) = tokens.filter(|_| same_size) else { continue };
                let parent = recorded(event, "parent_block_hash", 2);
                let mut before = (!parent.is_null()).then(|| recorded_hash(parent));
                let tier = recorded_tier(recorded(event, "medium", 6));
                for (hash, tokens) in recorded_hashes(event).into_iter().zip(tokens.chunks(size)) {
                    let local = local_hash(tokens, seeds.get(&hash).copied().unwrap_or_default());
                    facts.push(Fact::Stored(before, tier, local, hash));
                    before = Some(hash);
                }
            }
        }
    }
    facts
}

fn raw_image() -> Vec<u8> {
    hex("92a7696d676861736802")
}

/// Seeds of the recorded blocks that have one: told by hand, from the recordings' own fields.
fn seeds_of(record: &Json) -> BTreeMap<EngineHash, Seed> {
    let event = &record["decoded"][1][0];
    let text = |name: &str, place| recorded(event, name, place).as_str().map(str::to_owned);
    let mut seeds = BTreeMap::new();
    match record["case"].as_str() {
        Some("stored_lora_mm_salt") => {
            let lora = text("lora_name", 7);
            let base = match &lora {
                Some(lora) => Seed::new(Some(lora), None),
                None => Seed::default().with(&3_u64.to_le_bytes()),
            };
            let keys = recorded(event, "extra_keys", 8);
            // A salt belongs to a chain's first block only; behind a parent it is just a key.
            let first = if keys.is_null() { base } else { base.with(&raw_image()).with(b"\xa6salt-1") };
            seeds.extend([(EngineHash(333), first), (EngineHash(444), base)]);
        }
        Some("stored_child_salt_session_lora") => {
            let salt = event.get("cache_salt").and_then(Json::as_str);
            let lora = event.get("lora_name").and_then(Json::as_str);
            seeds.insert(EngineHash(222), Seed::new(lora, salt));
        }
        _ => {}
    }
    seeds
}

#[test]
fn every_recorded_frame_decodes_as_recorded() {
    let (mut batches, mut loads) = (0, 0);
    for record in records(FRAMES) {
        let frames = frames(&record);
        let payload = frames.last().unwrap();
        let name = format!("{} {} {}", record["engine"], record["version"], record["case"]);
        if record["channel"] == "load" {
            let (stat, said) = (LoadStat::decode(payload).unwrap(), &record["decoded"]);
            assert_eq!(stat.running, said[1].as_u64().unwrap());
            assert_eq!((stat.waiting, stat.tokens), (said[2].as_u64().unwrap(), said[3].as_u64().unwrap()));
            assert_eq!(stat.max_tokens, said[4].as_u64().unwrap());
            assert_eq!(stat.rank.map(u64::from), said[5].as_u64());
            assert_eq!(stat.waiting_uncached_tokens, said.get(6).and_then(Json::as_u64));
            loads += 1;
            continue;
        }
        let Some(said) = record.get("decoded") else {
            // Answers to replays: what a live frame said, or the end marker.
            if !payload.is_empty() {
                decoder(4).decode(payload, &|_| None).unwrap_or_else(|why| panic!("{name}: {why}"));
            }
            continue;
        };
        batches += 1;
        let decoded = decoder(4).decode(payload, &|_| None).unwrap();
        assert_eq!(decoded.rank.map(u64::from), said[2].as_u64(), "{name}");
        let events = said[1].as_array().unwrap();
        assert_eq!(facts(&decoded.ops), expected(events, 4, &seeds_of(&record)), "{name}");
        let skipped = match record["case"].as_str() {
            Some("stored_page1") => Skipped { block_size: 1, ..Skipped::default() },
            Some(case) if case.starts_with("bigram") => Skipped { pairs: 1, ..Skipped::default() },
            _ => Skipped::default(),
        };
        assert_eq!(decoded.skipped, skipped, "{name}");
    }
    assert_eq!((batches, loads), (280, 3));
}

#[test]
fn a_running_engine_decodes_with_salts_inherited_along_the_chain() {
    let mut decoder = decoder(32);
    let known: RefCell<BTreeMap<EngineHash, Seed>> = RefCell::default();
    let mut blocks = 0;
    for (number, record) in records(REAL).iter().enumerate() {
        let frames = frames(record);
        let look_up = |hash: EngineHash| known.borrow().get(&hash).copied();
        let decoded = decoder.decode(&frames[2], &look_up).unwrap();
        assert_eq!(decoded.skipped, Skipped::default());
        let mut seeds = BTreeMap::new();
        for op in &decoded.ops {
            if let KvOp::Store { seed, blocks: stored, .. } = op {
                seeds.extend(stored.iter().map(|(_, hash)| (*hash, *seed)));
                blocks += stored.len();
            }
        }
        let events = record["decoded"][1].as_array().unwrap();
        assert_eq!(facts(&decoded.ops), expected(events, 32, &seeds));
        // Whatever the recording says is salted has the salt, and so have its children; nobody else.
        for event in events.iter().filter(|event| event["type"] == "BlockStored") {
            let salt = event["extra_keys"][0][0].as_str();
            let parent =
                event["parent_block_hash"].is_u64().then(|| recorded_hash(&event["parent_block_hash"]));
            let inherited = parent.and_then(|parent| known.borrow().get(&parent).copied());
            let want = inherited.unwrap_or(Seed::new(None, salt));
            recorded_hashes(event).iter().for_each(|hash| assert_eq!(seeds[hash], want));
            known.borrow_mut().extend(recorded_hashes(event).into_iter().map(|hash| (hash, want)));
        }
        // Applied now and then: before that, the decoder itself has to know.
        if number % 3 == 0 {
            decoder.settled();
        }
    }
    assert!(known.borrow().values().any(|seed| *seed == Seed::new(None, Some("salty"))));
    assert!(blocks > 600, "{blocks}");
}

/// A batch of one event, given as MessagePack.
fn batch(event: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x92, 0xcb, 0, 0, 0, 0, 0, 0, 0, 0, 0x91];
    bytes.extend_from_slice(event);
    bytes
}

fn packed(fields: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = vec![0x80 | fields.len() as u8];
    for (name, value) in fields {
        bytes.push(0xa0 | name.len() as u8);
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend_from_slice(value);
    }
    bytes
}

#[test]
fn odd_events_are_skipped_with_their_reason_and_the_rest_is_used() {
    let mut decoder = decoder(2);
    let mut of = |fields: &[(&str, &[u8])]| {
        let decoded = decoder.decode(&batch(&packed(fields)), &|_| None).unwrap();
        (decoded.ops, decoded.skipped, decoded.rank)
    };
    let stored: &[u8] = b"\xabBlockStored";
    let unknown = of(&[("type", b"\xa8Whatever"), ("x", b"\x93\x01\x02\x03")]);
    assert_eq!(unknown, (vec![], Skipped { unknown: 1, ..Skipped::default() }, None));
    let malformed = Skipped { malformed: 1, ..Skipped::default() };
    assert_eq!(of(&[("block_hashes", b"\x91\x01")]).1, malformed);
    assert_eq!(of(&[("type", stored), ("block_hashes", b"\x91\x01")]).1, malformed);
    let short: &[(&str, &[u8])] = &[
        ("type", stored),
        ("block_hashes", b"\x92\x01\x02"),
        ("token_ids", b"\x93\x01\x02\x03"),
        ("block_size", b"\x02"),
    ];
    assert_eq!(of(short).1, malformed);
    let other_group: &[(&str, &[u8])] =
        &[("type", b"\xacBlockRemoved"), ("block_hashes", b"\x91\x01"), ("group_idx", b"\x01")];
    assert_eq!(of(other_group).1, Skipped { group: 1, ..Skipped::default() });
    // An offload tells the blocks only; the type may come last.
    let copy: &[(&str, &[u8])] =
        &[("block_hashes", b"\x91\x07"), ("token_ids", b"\x90"), ("medium", b"\xa3CPU"), ("type", stored)];
    let ops = vec![KvOp::Copy { tier: Tier::Host, blocks: vec![EngineHash(7)] }];
    assert_eq!(of(copy), (ops, Skipped::default(), None));
}

#[test]
fn pages_of_one_chain_and_removals_are_gathered() {
    let page = |hash: u8, parent: u8| {
        let parent: &[u8] = if parent == 0 { b"\xc0" } else { &[parent] };
        packed(&[
            ("type", b"\xabBlockStored"),
            ("block_hashes", &[0x91, hash]),
            ("parent_block_hash", parent),
            ("token_ids", &[0x91, hash]),
            ("block_size", b"\x01"),
        ])
    };
    let removed = |hash: u8| packed(&[("type", b"\xacBlockRemoved"), ("block_hashes", &[0x91, hash])]);
    let mut bytes = vec![0x92, 0x00, 0x95];
    [page(1, 0), page(2, 1), page(5, 0), removed(2), removed(1)].iter().for_each(|e| bytes.extend(e));
    let decoded = decoder(1).decode(&bytes, &|_| None).unwrap();
    assert_eq!(decoded.ops.len(), 3, "{:?}", decoded.ops);
    assert_eq!((decoded.events, decoded.stored), (5, 3));
}

#[test]
fn what_is_no_batch_is_refused_as_a_whole() {
    for bytes in [&b""[..], b"\xc0", b"\x91\x00", b"\x92\x00\xc0", b"\x92\xa1x\x90", b"\x92\x00\x92\x90"] {
        assert!(decoder(4).decode(bytes, &|_| None).is_err(), "{bytes:?}");
    }
    assert!(LoadStat::decode(b"\x93\xa8LoadStat\x01\x02").is_err());
    assert!(LoadStat::decode(b"\xc0").is_err());
}

proptest! {
    /// Recorded frames with bytes changed, cut or doubled, and plain noise: never a panic, and
    /// never more out than came in.
    #[test]
    fn garbage_never_panics(
        which in 0_usize..283,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        from_noise in any::<bool>(),
    ) {
        thread_local!(static PAYLOADS: Vec<Vec<u8>> = records(FRAMES)
            .iter()
            .filter(|record| record.get("decoded").is_some())
            .map(|record| frames(record).pop().unwrap())
            .collect());
        let mut bytes = if from_noise {
            noise
        } else {
            let mut bytes = PAYLOADS.with(|all| all[which % all.len()].clone());
            for (at, byte) in changes {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if cut.index(3) == 0 {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        };
        for _ in 0..2 {
            let _ = LoadStat::decode(&bytes);
            if let Ok(decoded) = decoder(4).decode(&bytes, &|_| None) {
                prop_assert!(decoded.events <= bytes.len() as u64);
                prop_assert!(decoded.stored <= bytes.len() as u64);
            }
            bytes.extend_from_within(..);
        }
    }
}

/// Prints blocks a second: `cargo test --release --lib -- --ignored --nocapture decoding_speed`.
#[test]
#[ignore = "a measurement"]
fn decoding_speed() {
    let payloads: Vec<_> = records(REAL).iter().map(|record| frames(record).remove(2)).collect();
    let (mut decoder, mut stored, mut bytes) = (decoder(32), 0, 0);
    let start = std::time::Instant::now();
    for _ in 0..200 {
        for payload in &payloads {
            stored += decoder.decode(payload, &|_| None).unwrap().stored;
            bytes += payload.len();
        }
        decoder.settled();
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{:.2e} blocks of 32 tokens/s, {:.0} MB/s",
        stored as f64 / seconds,
        bytes as f64 / seconds / 1e6
    );
}
