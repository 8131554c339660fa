//! Reading what an engine says about itself: `/v1/models` and `/metrics`. Tolerant: an engine
//! that says less, or more, is no error. No I/O here.

use std::collections::BTreeMap;

use serde::Deserialize;

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
    /// The dialect, where the metrics give it away.
    pub engine: Option<EngineKind>,
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
    let mut sglang_tokens = None;
    for line in text.lines() {
        if let Some(labels) = line.strip_prefix("vllm:cache_config_info{") {
            let number = |name: &str| label(labels, name).and_then(|value| value.parse::<u64>().ok());
            let block_size = number("block_size").and_then(|size| u32::try_from(size).ok());
            facts.block_size = facts.block_size.or(block_size.filter(|size| *size > 0));
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
            sglang_tokens = sglang_tokens.or(sample(line, "sglang:max_total_num_tokens"));
        }
    }
    if let (Some(tokens), Some(page), None) = (sglang_tokens, facts.block_size, facts.capacity_blocks) {
        facts.capacity_blocks = Some((tokens / f64::from(page)) as u64).filter(|blocks| *blocks > 0);
    }
    facts
}

/// What an engine says of its work, over all ranks.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct EngineLoad {
    /// Requests running and waiting.
    pub requests: u64,
    /// Shares of their blocks that running requests hold, summed over the ranks that say so.
    pub kv_usage: Option<f64>,
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
const MOST_RANKS: usize = 1024;

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
    let usages: Vec<f64> = ranks.values().filter_map(|(_, usage)| *usage).collect();
    says.then(|| EngineLoad {
        requests: ranks.values().flat_map(|(requests, _)| requests).sum::<f64>() as u64,
        kv_usage: (!usages.is_empty()).then(|| usages.iter().sum()),
    })
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
        assert_eq!(parse_load(vllm), Some(EngineLoad { requests: 29, kv_usage: Some(0.75) }));
        let sglang = "sglang:num_running_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"0\"} 3.0\n\
            sglang:num_running_reqs{model_name=\"m\",tp_rank=\"1\",dp_rank=\"0\"} 3.0\n\
            sglang:num_running_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"1\"} 2.0\n\
            sglang:num_queue_reqs{model_name=\"m\",tp_rank=\"0\",dp_rank=\"1\"} 1.0\n";
        assert_eq!(parse_load(sglang), Some(EngineLoad { requests: 6, kv_usage: None }));
        for nothing in ["", "vllm:num_requests_running{} NaN\n", "vllm:kv_cache_usage_perc 0.5\n", "x 1\n"] {
            assert_eq!(parse_load(nothing), None, "{nothing}");
        }
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
