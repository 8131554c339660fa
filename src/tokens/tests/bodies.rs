//! Whole requests: fallbacks, bounds, pictures, salts, engines, and bodies out of a hat.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::kv::hash::local_hashes;

#[tokio::test]
async fn a_tool_prompt_has_as_many_tokens_as_vllm_counted() {
    let read = |ending: &str| -> Json {
        let path = golden("http").join(format!("vllm_tools_auto_full.{ending}"));
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    };
    let (request, answer) = (read("req.json"), read("body.json"));
    let counted = answer.get("usage").unwrap().get("prompt_tokens").unwrap().clone();
    let body = serde_json::to_string(request.get("body").unwrap()).unwrap();
    let prompt = ask(&tiny(Options::default(), None), "tiny", "/v1/chat/completions", &body).await;
    assert_eq!(Json::Number(prompt.tokens().into()), counted);
    assert!(prompt.is_exact());
}

#[tokio::test]
async fn every_dialect_of_one_conversation_has_the_same_ids() {
    let tokenizers = tiny(Options::default(), None);
    let chat =
        r#"{"model":"tiny","messages":[{"role":"system","content":"be"},{"role":"user","content":"hi"}]}"#;
    let expected = ask(&tokenizers, "tiny", "/v1/chat/completions", chat).await;
    assert_eq!(expected.source(), Source::Tokenizer);
    let others = [
        (
            "/v1/messages",
            r#"{"system":"be","messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}]}"#,
        ),
        ("/v1/responses", r#"{"instructions":"be","input":"hi"}"#),
        (
            "/v1/responses",
            r#"{"instructions":"be","input":[{"role":"user","content":[{"type":"input_text","text":"hi"}]}]}"#,
        ),
        ("/tokenize", r#"{"messages":[{"role":"system","content":"be"},{"role":"user","content":"hi"}]}"#),
        (
            "/v1/completions",
            r#"{"prompt":"<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}"#,
        ),
        (
            "/generate",
            r#"{"text":"<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}"#,
        ),
    ];
    for (path, body) in others {
        assert_eq!(ask(&tokenizers, "tiny", path, body).await.ids(), expected.ids(), "{path} {body}");
    }
    let told = tokenizers.figures().models;
    assert_eq!(told.iter().map(|m| m.model.as_str()).collect::<Vec<_>>(), ["asked", "tiny", ""]);
    assert_eq!(told[1].sources[Source::Tokenizer as usize], 7);
    assert_eq!(told[1].failures, 0);
}

#[tokio::test]
async fn a_picture_ends_what_is_certain() {
    let tokenizers = tiny(Options::default(), None);
    let long = "many words ".repeat(40);
    let chat = |last: &str| {
        format!(
            r#"{{"messages":[{{"role":"system","content":"{long}"}},{{"role":"user","content":[{{"type":"text","text":"look"}},{last}]}}]}}"#
        )
    };
    let with = ask(
        &tokenizers,
        "tiny",
        "/v1/chat/completions",
        &chat(r#"{"type":"image_url","image_url":{"url":"x"}}"#),
    )
    .await;
    let without =
        ask(&tokenizers, "tiny", "/v1/chat/completions", &chat(r#"{"type":"text","text":"!"}"#)).await;
    let (with, without) = (with.key(16), without.key(16));
    assert!(!with.exact && without.exact);
    assert!(with.hashes.len() > 3 && with.hashes.len() <= without.hashes.len());
    assert_eq!(with.hashes, without.hashes[..with.hashes.len()]);
    assert!(with.tokens >= 16 * with.hashes.len());
}

#[tokio::test]
async fn salt_and_adapter_keep_blocks_apart() {
    let tokenizers = tiny(Options::default(), None);
    let ids: Vec<u32> = (0..64).collect();
    let body = Bytes::from(
        r#"{"prompt":"#.to_owned() + &serde_json::to_string(&ids).unwrap() + r#","cache_salt":"t1"}"#,
    );
    let ask = Ask {
        model: "tiny",
        lora: Some("ad"),
        form: Form::Completions,
        body: &body,
        lifted: None,
        now: UNIX_EPOCH,
    };
    let prompt = tokenizers.prompt(ask).await;
    assert_eq!(prompt.key(16).hashes, local_hashes(&ids, 16, Seed::new(Some("ad"), Some("t1"))));
    assert_eq!(prompt.source(), Source::Ids);
}

#[tokio::test]
async fn a_conversation_that_the_template_refuses_is_routed_by_its_text() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("tokenizer/tiny/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ raise_exception('no') }}").unwrap();
    let options = ModelOptions {
        name: "m".to_owned(),
        mode: Mode::Tokenizer,
        directory: Some(folder.path().to_owned()),
        ..ModelOptions::default()
    };
    let tokenizers = Tokenizers::load(vec![options], &Options::default(), None).unwrap();
    let long = "x".repeat(200);
    let one = format!(r#"{{"messages":[{{"role":"user","content":"{long}"}}]}}"#);
    let two = format!(
        r#"{{"messages":[{{"role":"user","content":"{long}"}},{{"role":"assistant","content":"y"}}]}}"#
    );
    let one = ask(&tokenizers, "m", "/v1/chat/completions", &one).await;
    let two = ask(&tokenizers, "m", "/v1/chat/completions", &two).await;
    assert_eq!((one.source(), two.source()), (Source::Text, Source::Text));
    assert_eq!(one.key(16).hashes.len(), 3);
    assert_eq!(one.key(16).hashes, two.key(16).hashes[..3]);
    assert_eq!(tokenizers.figures().models[0].failures, 2);
    // A model that nobody configured goes by its text too.
    let other = ask(&tokenizers, "other", "/v1/completions", &format!(r#"{{"prompt":"{long}"}}"#)).await;
    assert_eq!(other.source(), Source::Text);
}

#[test]
fn what_cannot_be_loaded_is_told_with_path_and_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let options = |template: Option<PathBuf>| ModelOptions {
        name: "m".to_owned(),
        mode: Mode::Tokenizer,
        directory: Some(folder.path().to_owned()),
        chat_template: template,
        ..ModelOptions::default()
    };
    let error = |models: Vec<ModelOptions>| {
        Tokenizers::load(models, &Options::default(), None).map(|_| ()).unwrap_err().to_string()
    };
    let missing = error(vec![options(None)]);
    assert!(missing.contains("tokenizer.json") && missing.contains("mode = \"engine\""), "{missing}");
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let invalid = error(vec![options(None)]);
    assert!(invalid.contains("tokenizer.json cannot be used"), "{invalid}");
    std::fs::copy(golden("tokenizer/tiny/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let template = folder.path().join("t.jinja");
    std::fs::write(&template, "a\n{% if %}").unwrap();
    let broken = error(vec![options(Some(template))]);
    assert!(broken.contains("t.jinja") && broken.contains("chat:2"), "{broken}");
    std::fs::write(
        folder.path().join("tokenizer_config.json"),
        r#"{"added_tokens_decoder":{"5":{"content":"<|im_end|>"}}}"#,
    )
    .unwrap();
    let ids = error(vec![options(None)]);
    assert!(ids.contains("<|im_end|> should have the id 5"), "{ids}");
    let text = ModelOptions { name: "m".to_owned(), ..ModelOptions::default() };
    assert!(error(vec![text.clone(), text]).contains("given twice"));
    let no_directory = ModelOptions { mode: Mode::Tokenizer, ..ModelOptions::default() };
    assert!(error(vec![no_directory]).contains("needs `directory`"));
}

#[tokio::test]
async fn named_templates_and_tokens_of_the_configuration_are_used() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(golden("tokenizer/metaspace_first.json"), folder.path().join("tokenizer.json")).unwrap();
    let config = r#"{"bos_token":{"content":"<s>"},"add_bos_token":false,"extra_special_tokens":["<|new|>"],
        "chat_template":[{"name":"default","template":"{{ bos_token }}plain<|new|>"},
                         {"name":"tool_use","template":"{{ tools | length }}tools<|new|>"},
                         {"name":"rag","template":"{% unknown %}"}]}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
    let options = ModelOptions {
        name: "m".to_owned(),
        mode: Mode::Tokenizer,
        directory: Some(folder.path().to_owned()),
        ..ModelOptions::default()
    };
    let tokenizers = Tokenizers::load(vec![options], &Options::default(), None).unwrap();
    let mut reference = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    reference.add_special_tokens([tokenizers::AddedToken::from("<|new|>", true)]).unwrap();
    let ids = |text: &str| Some(reference.encode(text, false).unwrap().get_ids().to_vec());
    let of = |prompt: Prompt| prompt.ids().map(|ids| ids.to_vec());
    let chat = r#"{"messages":[{"role":"user","content":"x"}]}"#;
    assert_eq!(of(ask(&tokenizers, "m", "/v1/chat/completions", chat).await), ids("<s>plain<|new|>"));
    let tools = r#"{"messages":[{"role":"user","content":"x"}],"tools":[{"type":"function","function":{"name":"f"}}]}"#;
    assert_eq!(of(ask(&tokenizers, "m", "/v1/chat/completions", tools).await), ids("1tools<|new|>"));
    // The configuration says that there is no BOS, whatever the tokenizer adds.
    let text = r#"{"prompt":"some words"}"#;
    assert_eq!(of(ask(&tokenizers, "m", "/v1/completions", text).await), ids("some words"));
}

#[tokio::test]
async fn what_is_continued_stands_behind_the_opened_answer_with_sglang() {
    let options = ModelOptions {
        name: "m".to_owned(),
        mode: Mode::Tokenizer,
        directory: Some(golden("tokenizer/tiny")),
        dialect: Some(Dialect::Sglang),
        ..ModelOptions::default()
    };
    let tokenizers = Tokenizers::load(vec![options], &Options::default(), None).unwrap();
    let open = r#"{"messages":[{"role":"user","content":"q"}]}"#;
    let open = ask(&tokenizers, "m", "/v1/chat/completions", open).await;
    let text = r#"{"text":"so far"}"#;
    let text = ask(&tokenizers, "m", "/generate", text).await;
    let continued = r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"so far"}],"continue_final_message":true,"add_generation_prompt":false}"#;
    let continued = ask(&tokenizers, "m", "/v1/chat/completions", continued).await;
    let expected = [open.ids().unwrap().to_vec(), text.ids().unwrap().to_vec()].concat();
    assert_eq!(continued.ids().map(|ids| ids.to_vec()), Some(expected));
}

#[tokio::test]
async fn a_model_that_engines_render_by_code_has_no_template_here() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "chat_template.jinja"] {
        std::fs::copy(golden("tokenizer/tiny").join(file), folder.path().join(file)).unwrap();
    }
    let source_of_chat = async || {
        let options = ModelOptions {
            name: "m".to_owned(),
            mode: Mode::Tokenizer,
            directory: Some(folder.path().to_owned()),
            ..ModelOptions::default()
        };
        let tokenizers = Tokenizers::load(vec![options], &Options::default(), None).unwrap();
        let chat = r#"{"messages":[{"role":"user","content":"x"}]}"#;
        let text = ask(&tokenizers, "m", "/v1/completions", r#"{"prompt":"x"}"#).await;
        assert_eq!(text.source(), Source::Tokenizer);
        ask(&tokenizers, "m", "/v1/chat/completions", chat).await.source()
    };
    assert_eq!(source_of_chat().await, Source::Tokenizer);
    std::fs::write(folder.path().join("config.json"), r#"{"model_type":"gpt_oss"}"#).unwrap();
    assert_eq!(source_of_chat().await, Source::Text);
    std::fs::write(folder.path().join("config.json"), r#"{"model_type":"mistral"}"#).unwrap();
    std::fs::write(folder.path().join("tekken.json"), "{}").unwrap();
    assert_eq!(source_of_chat().await, Source::Text);
}

/// An engine that counts, fails and stalls as told.
struct Engine {
    asked: AtomicUsize,
    /// Whether it has told that nobody tells ids.
    only_text: AtomicBool,
    dialect: Option<Dialect>,
}

impl Engines for Engine {
    fn tokenize<'a>(&'a self, model: &'a str, question: Bytes) -> engine::Answer<'a> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            assert_eq!(model, "asked");
            let question: Json = serde_json::from_slice(&question).unwrap();
            let text = serde_json::to_string(&question).unwrap();
            assert!(text.contains(r#""model":"asked""#), "{text}");
            match text {
                text if text.contains("fail") => Err("down".to_owned()),
                text if text.contains("nobody") => {
                    self.only_text.store(true, Ordering::SeqCst);
                    Err("no such route".to_owned())
                }
                text if text.contains("stall") => std::future::pending().await,
                text if text.contains("babble") => Ok(Bytes::from_static(b"{\"tokens\":\"x\"}")),
                _ => Ok(Bytes::from_static(br#"{"count":2,"tokens":[7,8],"max_model_len":9}"#)),
            }
        })
    }

    fn only_text(&self, _: &str) -> bool {
        self.only_text.load(Ordering::SeqCst)
    }

    fn dialect(&self, _: &str) -> Option<Dialect> {
        self.dialect
    }
}

impl Engine {
    fn of(dialect: Option<Dialect>) -> Arc<Self> {
        Arc::new(Self { asked: AtomicUsize::new(0), only_text: AtomicBool::new(false), dialect })
    }
}

#[tokio::test]
async fn a_model_whose_engines_tell_no_ids_is_routed_by_text() {
    for inline_bytes in [0, 1 << 20] {
        let engine = Engine::of(None);
        let options = Options { inline_bytes, ..Options::default() };
        let tokenizers = tiny(options, Some(Arc::clone(&engine) as _));
        let (chat, opaque) = ("/v1/chat/completions", r#"{"messages":[],"chat_template_kwargs":[]}"#);
        let unknown = ask(&tokenizers, "asked", chat, opaque).await;
        assert_eq!(unknown.source(), Source::Unknown);
        // The request by which it is learnt has its text already, and no further one asks.
        let said = r#"{"messages":[{"role":"user","content":"nobody tells the ids of this"}]}"#;
        let first = ask(&tokenizers, "asked", chat, said).await;
        let again = ask(&tokenizers, "asked", chat, said).await;
        assert_eq!((first.source(), engine.asked.load(Ordering::SeqCst)), (Source::Text, 1));
        assert_eq!((&first, first.key(4).hashes.is_empty()), (&again, false));
        let longer = said.replace("]}", r#",{"role":"assistant","content":"so"}]}"#);
        let longer = ask(&tokenizers, "asked", chat, &longer).await;
        assert!(longer.key(4).hashes.starts_with(&first.key(4).hashes));
        // What is not understood has a beginning too.
        let opaque = ask(&tokenizers, "asked", chat, opaque).await;
        assert_eq!((opaque.source(), opaque.key(4).hashes.len()), (Source::Text, 2));
        // Files here tell ids all the same.
        assert_eq!(ask(&tokenizers, "tiny", chat, said).await.source(), Source::Tokenizer);
    }
}

#[tokio::test]
async fn messages_are_put_as_the_engines_that_serve_the_model_put_them() {
    let parts =
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}]}"#;
    let ids = async |given: Option<Dialect>, serving: Option<Dialect>| {
        let options = ModelOptions {
            name: "m".to_owned(),
            mode: Mode::Tokenizer,
            directory: Some(golden("tokenizer/tiny")),
            dialect: given,
            content_format: Some(ContentFormat::String),
            ..ModelOptions::default()
        };
        let engines = Engine::of(serving);
        let tokenizers = Tokenizers::load(vec![options], &Options::default(), Some(engines)).unwrap();
        let prompt = ask(&tokenizers, "m", "/v1/chat/completions", parts).await;
        prompt.ids().unwrap().to_vec()
    };
    let (vllm, sglang) = (ids(Some(Dialect::Vllm), None).await, ids(Some(Dialect::Sglang), None).await);
    assert_ne!(vllm, sglang);
    assert_eq!(ids(None, None).await, vllm);
    assert_eq!(ids(None, Some(Dialect::Sglang)).await, sglang);
    assert_eq!(ids(Some(Dialect::Vllm), Some(Dialect::Sglang)).await, vllm);
}

#[tokio::test]
async fn engines_are_asked_about_models_that_nobody_configured_by_their_names() {
    for inline_bytes in [0, 1 << 20] {
        let engine = Engine::of(None);
        let options = Options { other: Mode::Engine, inline_bytes, ..Options::default() };
        let tokenizers = Tokenizers::load(Vec::new(), &options, Some(engine)).unwrap();
        for (path, body) in [
            ("/v1/completions", r#"{"prompt":"hello"}"#),
            ("/v1/chat/completions", r#"{"messages":[{"role":"user","content":"hello"}]}"#),
        ] {
            let prompt = ask(&tokenizers, "asked", path, body).await;
            assert_eq!((prompt.source(), prompt.tokens()), (Source::Engine, 2), "{path}");
        }
    }
}

#[tokio::test]
async fn engines_are_asked_once_and_never_for_long() {
    let engine = Engine::of(None);
    let tokenizers = tiny(
        Options {
            ask: AskOptions { concurrency: 1, timeout: Duration::from_millis(50), ..AskOptions::default() },
            inline_bytes: 1 << 20,
            ..Options::default()
        },
        Some(engine.clone()),
    );
    let path = "/v1/chat/completions";
    let chat = |text: &str| {
        format!(r#"{{"messages":[{{"role":"user","content":"{text}"}}],"reasoning_effort":"low"}}"#)
    };
    for _ in 0..3 {
        let prompt = ask(&tokenizers, "asked", path, &chat("hi")).await;
        assert_eq!(prompt.ids().map(|ids| ids.to_vec()), Some(vec![7, 8]));
        assert_eq!((prompt.source(), prompt.is_exact()), (Source::Engine, true));
    }
    assert_eq!(engine.asked.load(Ordering::SeqCst), 1);
    for text in ["fail", "babble", "stall"] {
        let prompt = ask(&tokenizers, "asked", path, &chat(text)).await;
        assert_eq!((prompt.source(), prompt.ids()), (Source::Unknown, None));
        assert!(prompt.tokens() > 5);
    }
    // While one question is open there is no room for another.
    let stalled = chat("stall");
    let open = ask(&tokenizers, "asked", path, &stalled);
    let fresh = chat("fresh");
    let refused = ask(&tokenizers, "asked", path, &fresh);
    let (open, refused) = tokio::join!(open, refused);
    assert_eq!((open.source(), refused.source()), (Source::Unknown, Source::Unknown));
    let figures = tokenizers.figures().asked;
    assert_eq!(figures, AskFigures { remembered: 2, answered: 1, failed: 4, refused: 1 });
}

#[tokio::test]
async fn a_full_queue_leaves_a_prompt_unknown_and_does_not_wait() {
    let tokenizers = tiny(Options { threads: 1, queue: 0, inline_bytes: 0, ..Options::default() }, None);
    let body = format!(r#"{{"prompt":"{}"}}"#, "x y ".repeat(100_000));
    let all = (0..4).map(|_| ask(&tokenizers, "tiny", "/v1/completions", &body));
    let prompts = futures_util::future::join_all(all).await;
    let unknown = prompts.iter().filter(|p| p.source() == Source::Unknown).count() as u64;
    assert!(unknown > 0);
    assert_eq!(tokenizers.figures().refused, unknown);
    assert!(prompts.iter().all(|p| p.tokens() > 10_000));
}

fn json() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        Just("null".to_owned()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<i64>().prop_map(|n| n.to_string()),
        any::<f64>().prop_filter("finite", |n| n.is_finite()).prop_map(|n| n.to_string()),
        "\\PC{0,12}".prop_map(|s| serde_json::to_string(&s).unwrap()),
        prop::sample::select(vec![
            "user",
            "assistant",
            "tool",
            "system",
            "text",
            "function",
            "image_url",
            "message"
        ])
        .prop_map(|s| format!("\"{s}\"")),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        let key = prop::sample::select(vec![
            "messages",
            "role",
            "content",
            "type",
            "text",
            "tool_calls",
            "function",
            "arguments",
            "name",
            "tools",
            "prompt",
            "input",
            "system",
            "id",
            "tool_call_id",
            "chat_template_kwargs",
            "documents",
            "reasoning",
            "continue_final_message",
            "add_generation_prompt",
            "input_ids",
            "instructions",
            "parameters",
            "status",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(|items| format!("[{}]", items.join(","))),
            prop::collection::vec((key, inner), 0..6).prop_map(|members| {
                let members: Vec<String> = members.into_iter().map(|(k, v)| format!("\"{k}\":{v}")).collect();
                format!("{{{}}}", members.join(","))
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_body_makes_a_model_panic(messages in json(), content in json(), rest in json()) {
        use std::sync::LazyLock;
        static ALL: LazyLock<Tokenizers> = LazyLock::new(|| tiny(Options::default(), None));
        let forms = [Form::Chat, Form::Completions, Form::Responses, Form::Messages, Form::Embeddings,
            Form::Tokenize, Form::TokenIds, Form::Generate];
        let bodies = [
            rest.clone(),
            format!(r#"{{"messages":{messages},"tools":{rest},"prompt":{content},"input":{messages},"system":{content}}}"#),
            format!(r#"{{"messages":[{{"role":"user","content":{content}}},{messages}],"input":[{{"role":"user","content":{content}}},{messages}]}}"#),
            format!(r#"{{"messages":[{{"role":"assistant","content":{content},"tool_calls":{rest}}}]}}"#),
        ];
        for body in bodies {
            let body = Bytes::from(body);
            for form in forms {
                for model in ["tiny", "asked", "other"] {
                    let model = ALL.models.get(model).unwrap_or(&ALL.other);
                    let how = How { mode: model.mode(), dialect: Dialect::default() };
                    if let Outcome::Known(prompt) = model.prompt("m", form, &body, None, UNIX_EPOCH, how) {
                        let key = prompt.key(16);
                        prop_assert!(key.hashes.len() * 16 <= key.tokens.max(key.hashes.len() * 16));
                    }
                }
            }
        }
    }
}

#[tokio::test]
async fn ids_lifted_out_of_a_body_are_the_prompt_that_they_were_in_it() {
    let tokenizers = tiny(Options::default(), None);
    let ids = serde_json::to_string(&(0..4000).collect::<Vec<u32>>()).unwrap();
    for (path, body, known) in [
        ("/v1/completions", format!(r#"{{"prompt":{ids},"cache_salt":"s","n":2}}"#), true),
        ("/inference/v1/generate", format!(r#"{{"cache_salt":"s","token_ids":{ids}}}"#), true),
        ("/generate", format!(r#"{{"input_ids":{ids},"text":null}}"#), true),
        ("/v1/completions", format!(r#"{{"prompt":{ids},"truncate_prompt_tokens":9}}"#), false),
        ("/v1/completions", format!(r#"{{"prompt":{ids},"pro\u006dpt":[1]}}"#), false),
        ("/generate", format!(r#"{{"input_ids":{ids},"cache_salt":7}}"#), false),
    ] {
        let form = Form::of_path(path).unwrap();
        let lifted = lift(form, body.as_bytes()).unwrap();
        let body = Bytes::from(body);
        for model in ["tiny", "asked", "unknown"] {
            let ask = Ask { model, lora: Some("a"), form, body: &body, lifted: None, now: UNIX_EPOCH };
            let whole = tokenizers.prompt(ask.clone()).await;
            let around = tokenizers.prompt(Ask { lifted: Some(&lifted), ..ask }).await;
            assert_eq!((&around, around.is_exact()), (&whole, known), "{model} {path}");
        }
    }
}
