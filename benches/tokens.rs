//! What tokenising costs: `cargo bench --bench tokens [DIRECTORY]`, with the directory of a model
//! (the small one of the tests otherwise). Prints figures; compares nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use bytes::Bytes;
use everline::http::{peek, peek_around};
use everline::tokens::{Ask, Form, Lifted, Mode, ModelOptions, Options, Prompt, Tokenizers, lift};

/// Repetitions of each figure, whose median is told.
const ROUNDS: usize = 41;

fn load(directory: &Path, options: &Options) -> anyhow::Result<Tokenizers> {
    let model = ModelOptions {
        name: "m".to_owned(),
        mode: Mode::Tokenizer,
        directory: Some(directory.to_owned()),
        ..ModelOptions::default()
    };
    Ok(Tokenizers::load(vec![model], options, None)?)
}

/// A conversation of this many turns, as a body.
fn body(turns: usize) -> Bytes {
    let words = include_str!("../docs/explanation/proxy-path.md");
    let words: Vec<&str> = words.split_whitespace().filter(|word| !word.contains(['"', '\\'])).collect();
    let messages: Vec<String> = (0..turns)
        .map(|turn| {
            let role = if turn % 2 == 0 { "user" } else { "assistant" };
            let text: Vec<&str> = words.iter().cycle().skip(turn * 37).take(80).copied().collect();
            format!(r#"{{"role":"{role}","content":"{turn} {}"}}"#, text.join(" "))
        })
        .collect();
    format!(r#"{{"model":"m","messages":[{}]}}"#, messages.join(",")).into()
}

fn main() -> anyhow::Result<()> {
    let given = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let tiny = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer/tiny");
    let directory = given.map_or(tiny, PathBuf::from);
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let ask = |tokenizers: &Tokenizers, body: &Bytes| -> Prompt {
        let ask = Ask { model: "m", lora: None, form: Form::Chat, body, lifted: None, now: UNIX_EPOCH };
        runtime.block_on(tokenizers.prompt(ask))
    };
    let median = |mut round: Box<dyn FnMut(usize) -> Duration + '_>| {
        let mut times: Vec<Duration> = (0..ROUNDS).map(&mut round).collect();
        times.sort();
        times[ROUNDS / 2]
    };
    let here = Options { inline_bytes: usize::MAX, ..Options::default() };
    let begun = Instant::now();
    let cold = load(&directory, &Options { cache_bytes: 0, ..here.clone() })?;
    println!("{:<46} {:>10.1?}", "load", begun.elapsed());

    let turns = (2..).find(|turns| ask(&cold, &body(*turns)).tokens() >= 4000).unwrap_or(2);
    for turns in [1, 4, turns, 4 * turns] {
        let bytes = body(turns);
        let prompt = ask(&cold, &bytes);
        let what = format!("{} tokens, {} bytes", prompt.tokens(), bytes.len());
        let time = median(Box::new(|_| {
            let begun = Instant::now();
            std::hint::black_box(ask(&cold, &bytes));
            begun.elapsed()
        }));
        println!("{:<46} {time:>10.1?}", format!("{what}: without cache"));
        let warm = load(&directory, &here)?;
        let time = median(Box::new(|round| {
            // Each round is a conversation's next turn.
            let bytes = body(turns + round);
            let begun = Instant::now();
            std::hint::black_box(ask(&warm, &bytes));
            begun.elapsed()
        }));
        println!("{:<46} {time:>10.1?}", format!("{what}: next turn, with cache"));
        let time = median(Box::new(|_| {
            let begun = Instant::now();
            std::hint::black_box(prompt.key(16));
            begun.elapsed()
        }));
        println!("{:<46} {time:>10.1?}", format!("{what}: hashes"));
    }
    let bytes = body(1);
    for (what, inline_bytes) in [("here", usize::MAX), ("on another thread", 0)] {
        let tokenizers = load(&directory, &Options { inline_bytes, ..Options::default() })?;
        let time = median(Box::new(|_| {
            let begun = Instant::now();
            std::hint::black_box(ask(&tokenizers, &bytes));
            begun.elapsed()
        }));
        println!("{:<46} {time:>10.1?}", format!("{} bytes, {what}", bytes.len()));
    }
    ids(&runtime, &load(&directory, &here)?);
    Ok(())
}

/// A prompt of 4,000 token ids, from the body to the hashes of its blocks: read as any body, all on
/// one thread, and with the ids lifted out first.
fn ids(runtime: &tokio::runtime::Runtime, tokenizers: &Tokenizers) {
    let ids: Vec<String> =
        (0..4000_u32).map(|n| (n.wrapping_mul(2_654_435_761) % 150_000).to_string()).collect();
    let body = Bytes::from(format!(r#"{{"model":"m","max_tokens":64,"prompt":[{}]}}"#, ids.join(",")));
    let prompt = |lifted: Option<&Lifted>| {
        let form = Form::Completions;
        let ask = Ask { model: "m", lora: None, form, body: &body, lifted, now: UNIX_EPOCH };
        runtime.block_on(tokenizers.prompt(ask)).key(16)
    };
    let as_any = || {
        std::hint::black_box(peek(&body).is_ok());
        std::hint::black_box(prompt(None));
    };
    let lifted = || {
        if let Some(lifted) = lift(Form::Completions, &body) {
            std::hint::black_box(peek_around(&lifted).is_some());
            std::hint::black_box(prompt(Some(&lifted)));
        }
    };
    for (what, work) in [("as any body", &as_any as &dyn Fn()), ("lifted", &lifted)] {
        let mut times: Vec<Duration> = (0..50 * ROUNDS)
            .map(|_| {
                let begun = Instant::now();
                work();
                begun.elapsed()
            })
            .collect();
        times.sort();
        let time = times[times.len() / 2];
        println!("{:<46} {time:>10.1?}", format!("4000 ids, {} bytes, {what}", body.len()));
    }
}
