//! Against the real thing: bodies that a running vLLM was sent, and the token ids it told.

mod answers;
mod bodies;
mod pieces;
mod templates;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::*;
use crate::kv::hash::local_hashes;

fn golden(part: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(part)
}

fn tiny(options: Options, engines: Option<Arc<dyn Engines>>) -> Tokenizers {
    let model = |name: &str, mode| ModelOptions {
        name: name.to_owned(),
        mode,
        directory: Some(golden("tokenizer/tiny")),
        ..ModelOptions::default()
    };
    let models = vec![model("tiny", Mode::Tokenizer), model("asked", Mode::Engine)];
    Tokenizers::load(models, &options, engines).unwrap()
}

async fn ask(tokenizers: &Tokenizers, model: &str, path: &str, body: &str) -> Prompt {
    let body = Bytes::from(body.to_owned());
    let form = Form::of_path(path).unwrap();
    tokenizers.prompt(Ask { model, lora: None, form, body: &body, lifted: None, now: UNIX_EPOCH }).await
}

/// Path and body of a recorded request, and the token ids of its prompt.
fn recorded(name: &str) -> (String, Json, Vec<u32>) {
    let read = |ending: &str| -> Json {
        let path = golden("http").join(format!("{name}.{ending}"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        serde_json::from_str(&text).unwrap()
    };
    let (request, answer) = (read("req.json"), read("body.json"));
    let answer = if let Json::List(items) = &answer { items[0].clone() } else { answer };
    let told = ["tokens", "token_ids", "prompt_token_ids"].into_iter().find_map(|key| answer.list(key));
    let told = told.or_else(|| answer.list("choices")?[0].list("prompt_token_ids")).unwrap();
    let ids = told.iter().map(|id| serde_json::to_string(id).unwrap().parse().unwrap()).collect();
    (request.text("path").unwrap().to_owned(), request.get("body").unwrap().clone(), ids)
}

#[tokio::test]
async fn token_ids_are_those_of_a_running_vllm() {
    let names = [
        "vllm_tokenize_chat",
        "vllm_tokenize_prompt",
        "vllm_chat_render",
        "vllm_completions_render",
        "vllm_chat_nonstream",
        "vllm_chat_continue_final",
        "vllm_completions_nonstream_tokens",
    ];
    // Once on this thread, once on another.
    for inline_bytes in [1 << 20, 0] {
        let tokenizers = tiny(Options { inline_bytes, ..Options::default() }, None);
        for name in names {
            let (path, body, ids) = recorded(name);
            let prompt = ask(&tokenizers, "tiny", &path, &serde_json::to_string(&body).unwrap()).await;
            assert_eq!(prompt.ids().map(|ids| ids.to_vec()), Some(ids), "{name}");
            assert!(prompt.is_exact());
        }
    }
}
