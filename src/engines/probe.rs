//! Reading what an engine says about itself: `/v1/models`, `/metrics`, vLLM's `/kv_event_sources`, and SGLang's
//! `/server_info` and `/v1/loads`. Tolerant: an engine that says less, or more, is no error. No I/O here.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use crate::state::worker::{EngineKind, ServedModel, WorkerSpec};

/// What an engine told about itself.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EngineFacts {
    /// Models and adapters served.
    pub models: Vec<ServedModel>,
    /// Tokens in a KV block.
    pub block_size: Option<u32>,
    /// KV blocks it can hold, over all ranks.
    pub capacity_blocks: Option<u64>,
    /// Its data-parallel ranks.
    pub dp_ranks: Option<u32>,
    /// The dialect, where the metrics give it away.
    pub engine: Option<EngineKind>,
}

/// Where engines say what they are, beside their models. No engine has all of it: vLLM has the first and
/// the last, SGLang the first only if it was told to (`--enable-metrics`) and the second always.
pub const FACTS: [&str; 3] = ["/metrics", "/server_info", "/kv_event_sources"];

impl EngineFacts {
    /// From the answers to [`FACTS`], as far as there are any. What SGLang says in `/server_info` goes
    /// before its metrics: it is the size of blocks that its events have.
    pub fn read(answers: &[Option<impl AsRef<[u8]>>; FACTS.len()]) -> Self {
        let [metrics, info, sources] = answers.each_ref().map(|answer| answer.as_ref().map(AsRef::as_ref));
        let counted = metrics.map(|text| parse_metrics(&String::from_utf8_lossy(text))).unwrap_or_default();
        let told = info.map(parse_server_info).unwrap_or_default();
        Self {
            models: Vec::new(),
            block_size: told.block_size.or(counted.block_size),
            capacity_blocks: told.capacity_blocks.or(counted.capacity_blocks),
            dp_ranks: sources.and_then(count_sources).or(told.dp_ranks).or(counted.dp_ranks),
            engine: told.engine.or(counted.engine),
        }
    }
}

/// Reads SGLang's `/server_info`. Something else says nothing: vLLM has a route of that name too.
pub fn parse_server_info(body: &[u8]) -> EngineFacts {
    let Ok(info) = serde_json::from_slice::<Value>(body) else { return EngineFacts::default() };
    let number = |value: &Value| value.as_u64().filter(|number| *number > 0);
    let small = |value: &Value| number(value).and_then(|number| u32::try_from(number).ok());
    let (page, events) = (small(&info["page_size"]), &info["kv_events"]);
    if page.is_none() && !events.is_object() {
        return EngineFacts::default();
    }
    let block_size = small(&events["block_size"]).or(page);
    let dp_ranks = small(&events["dp_size"])
        .or_else(|| small(&info["dp_size"]))
        .filter(|ranks| *ranks <= WorkerSpec::MAX_RANKS);
    // Each rank has so many.
    let tokens = number(&info["max_total_num_tokens"]);
    let blocks = tokens.zip(block_size).map(|(tokens, block_size)| tokens / u64::from(block_size));
    EngineFacts {
        models: Vec::new(),
        block_size,
        capacity_blocks: blocks
            .map(|blocks| blocks.saturating_mul(dp_ranks.unwrap_or(1).into()))
            .filter(|blocks| *blocks > 0),
        dp_ranks,
        engine: Some(EngineKind::Sglang),
    }
}

/// How many ranks vLLM's `/kv_event_sources` names.
fn count_sources(body: &[u8]) -> Option<u32> {
    let count = match serde_json::from_slice::<Value>(body).ok()? {
        Value::Object(ranks) if ranks.keys().all(|rank| rank.parse::<u32>().is_ok()) => ranks.len(),
        Value::Array(ranks) => ranks.len(),
        _ => return None,
    };
    u32::try_from(count).ok().filter(|count| (1..=WorkerSpec::MAX_RANKS).contains(count))
}

#[derive(Deserialize)]
struct ModelList {
    data: Vec<ModelEntry>,
}

#[derive(Deserialize)]
struct ModelEntry {
    id: String,
    #[serde(default)]
    parent: Option<String>,
    #[serde(default)]
    max_model_len: Option<u64>,
}

/// Reads an OpenAI model list. At most [`WorkerSpec::MAX_MODELS`] are kept.
pub fn parse_models(body: &[u8]) -> Result<Vec<ServedModel>, String> {
    let list: ModelList = serde_json::from_slice(body).map_err(|error| {
        format!("not an OpenAI model list (line {}, column {})", error.line(), error.column())
    })?;
    let models = list.data.into_iter().filter(|entry| !entry.id.is_empty());
    Ok(models
        .take(WorkerSpec::MAX_MODELS)
        .map(|entry| ServedModel {
            name: entry.id,
            lora_of: entry.parent,
            max_model_len: entry.max_model_len.and_then(|length| u32::try_from(length).ok()),
        })
        .collect())
}

/// Reads block size and capacity from metrics in Prometheus text. vLLM says both in
/// `vllm:cache_config_info`, one line for each rank; SGLang in `sglang:page_size` and
/// `sglang:max_total_num_tokens`.
pub fn parse_metrics(text: &str) -> EngineFacts {
    let mut facts = EngineFacts::default();
    // By data-parallel rank.
    let mut sglang_tokens = BTreeMap::<&str, f64>::new();
    let mut ranks = BTreeSet::new();
    for line in text.lines() {
        if let Some(labels) = line.strip_prefix("vllm:cache_config_info{") {
            let number = |name: &str| label(labels, name).and_then(|value| value.parse::<u64>().ok());
            let block_size = number("block_size").and_then(|size| u32::try_from(size).ok());
            facts.block_size = facts.block_size.or(block_size.filter(|size| *size > 0));
            ranks.extend(label(labels, "engine"));
            if let Some(blocks) = number("num_gpu_blocks").filter(|blocks| *blocks > 0) {
                facts.capacity_blocks = Some(facts.capacity_blocks.unwrap_or(0) + blocks);
            }
        }
        if line.starts_with("vllm:") {
            facts.engine = Some(EngineKind::Vllm);
        } else if line.starts_with("sglang:") {
            facts.engine = Some(EngineKind::Sglang);
            let page = sample(line, "sglang:page_size").filter(|page| *page >= 1.0);
            facts.block_size = facts.block_size.or(page.map(|page| page as u32));
            let tokens = sample(line, "sglang:max_total_num_tokens").filter(|tokens| tokens.is_finite());
            if let Some(tokens) = tokens.filter(|_| sglang_tokens.len() < MOST_RANKS) {
                let rank = label(line, "dp_rank").unwrap_or_default();
                sglang_tokens.insert(rank, tokens);
                ranks.extend(label(line, "dp_rank"));
            }
        }
    }
    if let (Some(page), None) = (facts.block_size, facts.capacity_blocks) {
        let blocks = sglang_tokens.values().map(|tokens| (tokens / f64::from(page)) as u64).sum();
        facts.capacity_blocks = Some(blocks).filter(|blocks| *blocks > 0);
    }
    facts.dp_ranks =
        u32::try_from(ranks.len()).ok().filter(|ranks| (1..=WorkerSpec::MAX_RANKS).contains(ranks));
    facts
}

/// What an engine says of its work, over all ranks or on one.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct RankLoad {
    /// Requests running and waiting.
    pub requests: u64,
    /// Share of the rank's blocks that running requests hold; over all, the shares of the ranks that
    /// say so, summed.
    pub kv_usage: Option<f64>,
}

/// What an engine says of its work.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct EngineLoad {
    /// Over all ranks.
    pub whole: RankLoad,
    /// On each rank that it tells apart, by the number it gives it.
    ranks: BTreeMap<u32, RankLoad>,
    /// Something was said of no rank in particular.
    undivided: bool,
}

impl EngineLoad {
    /// Adds what a rank says, or the engine without naming a rank.
    pub fn add(&mut self, rank: Option<u32>, load: RankLoad) {
        self.whole.requests = self.whole.requests.saturating_add(load.requests);
        if let Some(usage) = load.kv_usage {
            self.whole.kv_usage = Some(self.whole.kv_usage.unwrap_or_default() + usage);
        }
        match rank {
            Some(rank) => self.undivided |= self.ranks.insert(rank, load).is_some(),
            None => self.undivided = true,
        }
    }

    /// What it says on each of the `ranks` ranks that its worker has; `None` if it does not tell them
    /// apart, or tells of more or fewer, or has only one. The numbers of an engine that is a part of
    /// a larger one begin elsewhere than at 0: the lowest is the worker's rank 0.
    pub fn by_rank(&self, ranks: u32) -> Option<Vec<RankLoad>> {
        let (first, last) = self.ranks.keys().next().zip(self.ranks.keys().next_back())?;
        let told = self.ranks.len() == ranks as usize && u64::from(last - first) + 1 == u64::from(ranks);
        (told && ranks > 1 && !self.undivided).then(|| self.ranks.values().copied().collect())
    }
}

/// Metrics with requests, of engines that we know.
const REQUESTS: [&str; 4] = [
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "sglang:num_running_reqs",
    "sglang:num_queue_reqs",
];

/// Metrics with the share of blocks in use; the second one is vLLM's until 0.11.
const USAGE: [&str; 3] = ["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"];

/// Most ranks of an engine that are told apart.
const MOST_RANKS: usize = WorkerSpec::MAX_RANKS as usize;

/// Reads from metrics in Prometheus text what the engine has to do; `None` if it does not say.
/// Several lines of a rank (tensor-parallel parts of it, say) tell the same: the largest counts.
pub fn parse_load(text: &str) -> Option<EngineLoad> {
    // By data-parallel rank: requests by metric, and usage.
    let mut ranks: BTreeMap<&str, ([f64; REQUESTS.len()], Option<f64>)> = BTreeMap::new();
    let mut says = false;
    for line in text.lines() {
        if !line.starts_with("vllm:") && !line.starts_with("sglang:") {
            continue;
        }
        let find =
            |names: &[&str]| names.iter().enumerate().find_map(|(at, name)| Some((at, sample(line, name)?)));
        let (requests, usage) = (find(&REQUESTS), find(&USAGE));
        let Some((at, value)) = requests.or(usage).filter(|(_, value)| value.is_finite()) else { continue };
        let rank = label(line, "engine").or_else(|| label(line, "dp_rank")).unwrap_or_default();
        if ranks.len() >= MOST_RANKS && !ranks.contains_key(rank) {
            continue;
        }
        let rank = ranks.entry(rank).or_default();
        if requests.is_some() {
            says = true;
            rank.0[at] = rank.0[at].max(value);
        } else {
            rank.1 = Some(rank.1.unwrap_or_default().max(value.clamp(0.0, 1.0)));
        }
    }
    says.then(|| {
        let mut load = EngineLoad::default();
        for (label, (requests, kv_usage)) in ranks {
            let requests = requests.iter().sum::<f64>() as u64;
            load.add(label.parse().ok(), RankLoad { requests, kv_usage });
        }
        load
    })
}

#[derive(Deserialize)]
struct Loads {
    loads: Vec<Load>,
}

#[derive(Deserialize)]
struct Load {
    #[serde(default)]
    dp_rank: Option<u32>,
    num_running_reqs: u64,
    #[serde(default)]
    num_waiting_reqs: u64,
    #[serde(default)]
    token_usage: Option<f64>,
}

/// Reads SGLang's `/v1/loads`, which has an entry for each data-parallel rank; `None` if it is
/// something else. Ranks beyond [`WorkerSpec::MAX_RANKS`] are not looked at.
pub fn parse_loads(body: &[u8]) -> Option<EngineLoad> {
    let told: Loads = serde_json::from_slice(body).ok()?;
    let mut load = EngineLoad::default();
    for rank in told.loads.iter().take(MOST_RANKS) {
        let requests = rank.num_running_reqs.saturating_add(rank.num_waiting_reqs);
        load.add(rank.dp_rank, RankLoad { requests, kv_usage: rank.token_usage.map(|n| n.clamp(0.0, 1.0)) });
    }
    (!told.loads.is_empty()).then_some(load)
}

/// What tells one process of an engine from the next.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct EngineLife {
    /// When the process began, milliseconds since 1970. vLLM says so.
    pub started_ms: Option<u64>,
    /// Prompt tokens that it has read so far, over all ranks: less than before, and it has begun
    /// anew.
    pub prompt_tokens: Option<f64>,
}

/// Reads from metrics in Prometheus text which process it is.
pub fn parse_life(text: &str) -> EngineLife {
    let mut life = EngineLife::default();
    for line in text.lines() {
        if let Some(seconds) = sample(line, "process_start_time_seconds").filter(|seconds| *seconds > 0.0) {
            life.started_ms = Some((seconds * 1000.0).round() as u64);
        }
        let tokens = ["vllm:prompt_tokens_total", "sglang:prompt_tokens_total"];
        if let Some(tokens) = tokens.iter().find_map(|name| sample(line, name)).filter(|n| n.is_finite()) {
            life.prompt_tokens = Some(life.prompt_tokens.unwrap_or_default() + tokens);
        }
    }
    life
}

/// The value of a sample line of this metric, whatever its labels.
fn sample(line: &str, metric: &str) -> Option<f64> {
    let rest = line.strip_prefix(metric)?;
    let values = match rest.strip_prefix('{') {
        Some(labelled) => labelled.rsplit_once('}')?.1,
        None if rest.starts_with([' ', '\t']) => rest,
        None => return None,
    };
    values.split_whitespace().next()?.parse().ok()
}

/// The value of a label; escapes do not occur in the numbers looked for.
fn label<'a>(labels: &'a str, name: &str) -> Option<&'a str> {
    let mut rest = labels;
    loop {
        let at = rest.find(name)?;
        let is_whole_name = at == 0 || matches!(rest.as_bytes()[at - 1], b',' | b' ' | b'{');
        let after = &rest[at + name.len()..];
        match after.strip_prefix("=\"") {
            Some(value) if is_whole_name => return value.split('"').next(),
            _ => rest = after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllm_metrics_give_block_size_and_the_capacity_of_all_ranks() {
        let text = "# HELP vllm:cache_config_info Information\n# TYPE vllm:cache_config_info gauge\n\
            vllm:cache_config_info{block_size=\"32\",cache_dtype=\"auto\",engine=\"0\",hash_block_size=\"None\",\
            kv_cache_size_tokens=\"8192\",num_gpu_blocks=\"256\",num_gpu_blocks_override=\"256\"} 1.0\n\
            vllm:cache_config_info{block_size=\"32\",engine=\"1\",num_gpu_blocks=\"256\"} 1.0\n";
        let facts = parse_metrics(text);
        assert_eq!((facts.block_size, facts.capacity_blocks), (Some(32), Some(512)));
        assert_eq!(facts.engine, Some(EngineKind::Vllm));
    }

    #[test]
    fn sglang_without_metrics_says_what_it_is_in_its_server_info() {
        let info = br#"{"model_path":"m","page_size":32,"dp_size":2,"max_total_num_tokens":6400,
            "kv_events":{"publisher":"zmq","block_size":64,"dp_size":2}}"#;
        let facts = EngineFacts::read(&[None, Some(&info[..]), None]);
        assert_eq!((facts.block_size, facts.capacity_blocks), (Some(64), Some(200)));
        assert_eq!((facts.dp_ranks, facts.engine), (Some(2), Some(EngineKind::Sglang)));
        let without_events = parse_server_info(br#"{"page_size":16,"max_total_num_tokens":1600}"#);
        assert_eq!((without_events.block_size, without_events.capacity_blocks), (Some(16), Some(100)));
        // Metrics say what the other does not.
        let page = &b"sglang:max_total_num_tokens{dp_rank=\"0\"} 640.0\n"[..];
        let short = EngineFacts::read(&[Some(page), Some(br#"{"page_size":64}"#), None]);
        assert_eq!(short.block_size, Some(64));
        for other in [&b"{}"[..], b"Not Found", br#"{"vllm_config":"x"}"#, br#"{"page_size":"x"}"#] {
            assert_eq!(parse_server_info(other), EngineFacts::default());
        }
    }

    #[test]
    fn ranks_are_counted_wherever_an_engine_names_them() {
        let sources = br#"{"0":{"endpoint":"x"},"1":{},"2":{},"3":{}}"#;
        let none = None::<&[u8]>;
        assert_eq!(EngineFacts::read(&[none, None, Some(sources)]).dp_ranks, Some(4));
        let list = br#"[{"data_parallel_rank":3}]"#;
        assert_eq!(EngineFacts::read(&[none, None, Some(list)]).dp_ranks, Some(1));
        let page = "vllm:cache_config_info{engine=\"4\",num_gpu_blocks=\"8\"} 1\nvllm:cache_config_info{engine=\"5\"} 1\n";
        assert_eq!(parse_metrics(page).dp_ranks, Some(2));
        for nothing in [&b"{}"[..], b"[]", br#"{"detail":"Not Found"}"#, b"x"] {
            assert_eq!(EngineFacts::read(&[none, None, Some(nothing)]).dp_ranks, None);
        }
        let sglang = "sglang:page_size 16\nsglang:max_total_num_tokens{dp_rank=\"0\",tp_rank=\"0\"} 160\n\
            sglang:max_total_num_tokens{dp_rank=\"0\",tp_rank=\"1\"} 160\nsglang:max_total_num_tokens{dp_rank=\"1\"} 320\n";
        let facts = parse_metrics(sglang);
        assert_eq!((facts.dp_ranks, facts.capacity_blocks), (Some(2), Some(30)));
    }

    #[test]
    fn labels_are_found_by_their_whole_name_only() {
        let line =
            "vllm:cache_config_info{hash_block_size=\"7\",num_gpu_blocks=\"None\",block_size=\"16\"} 1";
        let facts = parse_metrics(line);
        assert_eq!((facts.block_size, facts.capacity_blocks), (Some(16), None));
    }

    #[test]
    fn sglang_metrics_give_pages() {
        let text =
            "sglang:page_size{model_name=\"m\"} 16.0\nsglang:max_total_num_tokens{model_name=\"m\"} 1600.0\n";
        let facts = parse_metrics(text);
        assert_eq!((facts.block_size, facts.capacity_blocks), (Some(16), Some(100)));
        assert_eq!(facts.engine, Some(EngineKind::Sglang));
    }

    #[test]
    fn the_load_of_all_ranks_is_summed_whatever_the_order_of_labels() {
        let vllm = "# TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 16.0\n\
            vllm:num_requests_running{model_name=\"m\",engine=\"1\"} 4.0\n\
            vllm:num_requests_waiting{engine=\"0\",model_name=\"m\"} 9.0\n\
            vllm:num_requests_waiting_by_reason{engine=\"0\",model_name=\"m\",reason=\"capacity\"} 9.0\n\
            vllm:kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.5\n\
            vllm:kv_cache_usage_perc{engine=\"1\",model_name=\"m\"} 0.25\n";
        let load = parse_load(vllm).unwrap();
        assert_eq!(load.whole, RankLoad { requests: 29, kv_usage: Some(0.75) });
        let rank = |requests, kv_usage| RankLoad { requests, kv_usage };
        assert_eq!(load.by_rank(2), Some(vec![rank(25, Some(0.5)), rank(4, Some(0.25))]));
        let sglang = "sglang:num_running_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"0\"} 3.0\n\
            sglang:num_running_reqs{model_name=\"m\",tp_rank=\"1\",dp_rank=\"0\"} 3.0\n\
            sglang:num_running_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"1\"} 2.0\n\
            sglang:num_queue_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"1\"} 1.0\n";
        let load = parse_load(sglang).unwrap();
        assert_eq!(load.whole, rank(6, None));
        assert_eq!(load.by_rank(2), Some(vec![rank(3, None), rank(3, None)]));
        for nothing in ["", "vllm:num_requests_running{} NaN\n", "vllm:kv_cache_usage_perc 0.5\n", "x 1\n"] {
            assert_eq!(parse_load(nothing), None, "{nothing}");
        }
    }

    #[test]
    fn sglang_tells_the_load_of_each_rank_without_metrics_too() {
        let body = br#"{"timestamp":"x","version":"0.5.23","num_accelerators":2,"loads":[
            {"dp_rank":1,"num_running_reqs":2,"num_waiting_reqs":1,"num_used_tokens":9,"token_usage":0.25},
            {"dp_rank":0,"num_running_reqs":3,"num_waiting_reqs":0,"token_usage":0.5,"gen_throughput":1.5}]}"#;
        let load = parse_loads(body).unwrap();
        assert_eq!(load.whole, RankLoad { requests: 6, kv_usage: Some(0.75) });
        let requests = |rank: &RankLoad| rank.requests;
        assert_eq!(load.by_rank(2).unwrap().iter().map(requests).collect::<Vec<_>>(), [3, 3]);
        for nothing in ["", "{}", r#"{"loads":[]}"#, r#"{"loads":[{}]}"#, r#"{"loads":7}"#] {
            assert_eq!(parse_loads(nothing.as_bytes()), None, "{nothing}");
        }
    }

    #[test]
    fn ranks_are_told_apart_if_the_engine_names_as_many_in_a_row_as_the_worker_has() {
        let page = |labels: &[&str]| {
            let line = |(at, label): (usize, &&str)| {
                format!("vllm:num_requests_running{{{label}model_name=\"m\"}} {}.0\n", at + 1)
            };
            parse_load(&labels.iter().enumerate().map(line).collect::<String>()).unwrap()
        };
        let requests = |load: &EngineLoad, ranks| {
            Some(load.by_rank(ranks)?.iter().map(|rank| rank.requests).collect::<Vec<_>>())
        };
        let three = page(&["engine=\"10\",", "engine=\"9\",", "engine=\"8\","]);
        assert_eq!(requests(&three, 3), Some(vec![3, 2, 1]), "by number, from the lowest");
        for other in [0, 1, 2, 4] {
            assert_eq!(requests(&three, other), None, "{other}");
        }
        assert_eq!(three.whole.requests, 6);
        for labels in [
            // One is missing, one has no number, one is of no rank.
            ["engine=\"0\",", "engine=\"2\","],
            ["engine=\"0\",", "engine=\"one\","],
            ["engine=\"0\",", ""],
        ] {
            let load = page(&labels);
            assert_eq!((load.whole.requests, requests(&load, 2)), (3, None), "{labels:?}");
        }
        let mut twice = page(&["engine=\"0\",", "engine=\"1\","]);
        twice.add(Some(1), RankLoad::default());
        assert_eq!(requests(&twice, 2), None);
        assert_eq!(requests(&page(&["engine=\"0\","]), 1), None, "the one rank is the whole");
    }

    #[test]
    fn the_start_of_the_process_and_what_it_has_read_tell_one_life_from_the_next() {
        let page = include_str!("../../tests/golden/http/vllm_metrics_idle.txt");
        let life = EngineLife { started_ms: Some(1_795_227_260_080), prompt_tokens: Some(0.0) };
        assert_eq!(parse_life(page), life);
        let sglang =
            "sglang:prompt_tokens_total{dp_rank=\"0\"} 5.0\nsglang:prompt_tokens_total{dp_rank=\"1\"} 2.0\n";
        assert_eq!(parse_life(sglang), EngineLife { started_ms: None, prompt_tokens: Some(7.0) });
        assert_eq!(parse_life("process_start_time_seconds NaN\n"), EngineLife::default());
    }

    #[test]
    fn anything_else_is_no_error() {
        for text in [
            "",
            "\n\n",
            "vllm:cache_config_info{",
            "vllm:cache_config_info{block_size=\"",
            "sglang:page_size{} x",
        ] {
            let facts = parse_metrics(text);
            assert_eq!((facts.block_size, facts.capacity_blocks), (None, None), "{text}");
        }
    }

    #[test]
    fn model_lists_keep_adapters_and_contexts() {
        let body = br#"{"object":"list","data":[{"id":"m","object":"model","max_model_len":2048,"root":"x","parent":null},
            {"id":"lora","parent":"m"},{"id":""}]}"#;
        let models = parse_models(body).unwrap();
        assert_eq!(models.len(), 2);
        assert_eq!((models[0].name.as_str(), models[0].max_model_len), ("m", Some(2048)));
        assert_eq!(models[1].lora_of.as_deref(), Some("m"));
        assert!(parse_models(b"{\"detail\":\"Not Found\"}").is_err());
    }
}
