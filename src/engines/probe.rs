//! Reading what an engine says about itself: `/v1/models` and `/metrics`. Tolerant: an engine
//! that says less, or more, is no error. No I/O here.

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
