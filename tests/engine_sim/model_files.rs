//! The files of the simulated model, against the engine's own tokenizer and template.

use std::sync::OnceLock;
use std::time::SystemTime;

use bytes::Bytes;
use everline::engines::sim::model_files;
use everline::engines::sim::tokenizer::{BOS, encode};
use everline::tokens::{Ask, Form, Mode, ModelOptions, Options, Tokenizers};
use proptest::prelude::*;
use serde_json::json;
use tokenizers::Tokenizer;

use crate::support::{post, quick, start};

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let bytes = serde_json::to_vec(&model_files::tokenizer_json()).unwrap();
        Tokenizer::from_bytes(bytes).unwrap()
    })
}

fn ids(text: &str, special: bool) -> Vec<u32> {
    tokenizer().encode_fast(text, special).unwrap().get_ids().to_vec()
}

#[test]
fn texts_with_every_rule_in_them_have_the_engines_ids() {
    for text in [
        "the cat of thex  thethe  a ab abc abcd",
        "7 42 123 1234 12345x",
        "THE Quick\n\nbrown\tfox, é日😀 <0x41>",
        "<|im_start|>user\nhi<|im_end|>\n<s><unk><|im_end",
        "",
    ] {
        assert_eq!(ids(text, false), encode(text), "{text:?}");
        assert_eq!(ids(text, true), [vec![BOS], encode(text)].concat(), "{text:?}");
    }
}

proptest! {
    #[test]
    fn any_text_has_the_engines_ids(text in "\\PC{0,40}|[a-z0-9 \\n<>|_é日😀]{0,60}|( ?(the|of|and|x|zq|7|<s>)){0,20}") {
        prop_assert_eq!(ids(&text, false), encode(&text));
    }
}

#[tokio::test]
async fn from_the_folder_prompts_are_made_as_the_engine_makes_them() {
    let folder = tempfile::tempdir().unwrap();
    let directory = folder.path().join("model");
    model_files::write(&directory).unwrap();
    let model = ModelOptions {
        name: "tiny".into(),
        mode: Mode::Tokenizer,
        directory: Some(directory),
        ..ModelOptions::default()
    };
    let tokenizers = Tokenizers::load(vec![model], &Options::default(), None).unwrap();
    let sim = start(quick()).await;
    let talk = json!([
        {"role": "system", "content": "you are the cat of 42"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "Two <s>"}]},
        {"role": "assistant", "content": "and thex"},
        {"role": "user", "content": "é日 7"},
    ]);
    let chat = "/v1/chat/completions";
    for (path, mut body) in [
        (chat, json!({"messages": talk})),
        (chat, json!({"messages": talk, "add_generation_prompt": false})),
        (chat, json!({"messages": talk, "add_generation_prompt": false, "continue_final_message": true})),
        ("/v1/completions", json!({"prompt": "the cat of thex <|im_end|>"})),
        ("/v1/completions", json!({"prompt": [300, 301, 302]})),
    ] {
        let more = json!({"model": "tiny", "max_tokens": 1, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let reply = post(sim.address(), path, body.clone()).await.json();
        let told = reply.get("prompt_token_ids").unwrap_or(&reply["choices"][0]["prompt_token_ids"]);
        let told: Vec<u32> = serde_json::from_value(told.clone()).unwrap_or_else(|e| panic!("{e}: {reply}"));
        let bytes = Bytes::from(body.to_string());
        let form = Form::of_path(path).unwrap();
        let ask =
            Ask { model: "tiny", lora: None, form, body: &bytes, lifted: None, now: SystemTime::UNIX_EPOCH };
        let prompt = tokenizers.prompt(ask).await;
        assert_eq!(prompt.ids().map(|ids| ids.to_vec()), Some(told), "{body}");
    }
}
