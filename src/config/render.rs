//! Writes configurations: the commented default file, an effective one with origins, and the
//! reference page.

use std::fmt::Write as _;

use toml::{Table, Value};

use super::keys::{KeyDoc, SectionDoc};
use super::schema::{Config, SECTIONS};
use super::{ENV_PREFIX, Loaded};

/// Writing into a `String` cannot fail; the result is dropped on that ground.
macro_rules! line {
    ($out:expr, $($text:tt)*) => {{ let _ = writeln!($out, $($text)*); }};
}

const WORKER_EXAMPLE: &str = r#"# Workers registered at start; repeat the block for each. Everything but `url` may be left out.
# [[worker]]
# url = "http://127.0.0.1:8000"     # scheme://host:port, nothing behind it
# id = "gpu-1"                      # default: host:port of the url
# engine = "vllm"                   # vllm, sglang or openai-compatible
# models = ["llama-3"]              # default: what the engine's /v1/models lists
# role = "prefill"                  # aggregated (default), prefill or decode
# connector = "nixl"                # of prefill and decode: nixl, mooncake, p2p-nccl, moriio, shared, sglang
# bootstrap_host = "10.0.0.8"       # of prefill (sglang, mooncake); default: host of the url
# bootstrap_port = 8998             # ... and its port
# side_channel = "10.0.0.8:21001"   # the engine's zmq_address (p2p-nccl, moriio)
# dp_ranks = 1                      # data-parallel ranks, 1 to 1024; default: what the engine says
# block_size = 16                   # tokens in a KV block; default: what the engine says
# capacity_blocks = 10000           # KV blocks the engine can hold
# labels = { zone = "a" }           # free-form pairs for filters
# weight = 100                      # relative share of traffic, 1 to 1000
# probe = true                      # ask the engine for health and models first
"#;

const KEY_EXAMPLE: &str = r#"# API keys of clients; without any, and without http.keys_file, everybody may send requests.
# `everline keys new ID` makes one. Limits are per replica: of three replicas behind a balancer
# each lets this much through, so give each a third.
# [[key]]
# id = "team-a"                     # name in logs, metrics and messages
# sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of the secret
# models = ["llama-3", "qwen-*"]    # default: all; a * at the end stands for anything
# requests_per_second = 10          # default: no limit; 0.001 to 1000000
# burst = 20                        # requests at once; default: a second's worth
# max_concurrent = 50               # requests in flight; default: no limit
# expires = 2099-12-31T00:00:00Z    # default: never
"#;

const NODE_TOKEN_EXAMPLE: &str = r#"# Node tokens bound to networks and roles, besides those of nodes.token_sha256.
# [[node_token]]
# id = "decoders"                   # name in messages
# sha256 = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # of the token
# networks = ["10.0.0.0/8"]         # where connections must come from; default: anywhere
# roles = ["decode"]                # what may be registered; default: anything
"#;

const MODEL_EXAMPLE: &str = r#"# How the prompts of a model become token ids; kv.default_mode holds for the others.
# [[model]]
# name = "llama-3"                  # in requests; adapters go by their base model
# mode = "tokenizer"                # tokenizer (default with a directory), engine (default without) or text
# directory = "/models/llama-3"     # tokenizer.json, tokenizer_config.json, chat template
# chat_template = "/models/own.jinja"  # in place of the directory's
# content_format = "string"         # string or openai; default: found out from the template
# dialect = "vllm"                  # vllm or sglang; default: that of the engines that serve it
# template_kwargs = { enable_thinking = false }  # that the engine sets unless a request does; default: none
# exclude_tools_when_none = false   # whether the engine leaves tools out for tool_choice = "none"
# reasoning = ["<think>", "</think>"]  # what opens and closes reasoning in the raw text
# reasoning_end = 128799            # id of the token that closes it
# tool_markers = ["<call>"]         # what opens a tool call in the raw text; default: the usual ones
"#;

const NAME_EXAMPLE: &str = r#"# Names for name_service.provider = "static"; entries with the same name add up.
# [[name]]
# name = "prefill-service"
# addresses = ["10.0.0.7:8088", "10.0.0.8:8088"]
# weight = 100                      # share of each of these, 1 to 10000
"#;

const DISCOVER_EXAMPLE: &str = r#"# Names whose endpoints become workers, and cease to be. Everything but `name` may be left out.
# [[discover]]
# name = "prod/vllm:http"           # as name_service.provider wants it; in Kubernetes [namespace/]service[:port]
# https = false                     # speak TLS to them
# engine = "vllm"                   # default: what each engine says
# models = ["llama-3"]              # default: what each engine's /v1/models lists
# role = "aggregated"               # aggregated, prefill or decode
# connector = "nixl"                # of prefill and decode; default: as the engine ordinarily does
# bootstrap_port = 8998             # of prefill (sglang, mooncake)
# dp_ranks = 1                      # default: what each engine says
# labels = { zone = "a" }           # free-form pairs for filters
# weight = 100                      # default: the name service's
# http2 = false
# max_requests = 256                # requests each should have at once
"#;

/// The lists of entries: name, what it is about, an example behind comment signs.
const EXAMPLES: [(&str, &str, &str); 6] = [
    ("worker", "Workers registered at start; repeat the block for each.", WORKER_EXAMPLE),
    (
        "key",
        "API keys of clients; repeat the block for each. Those of `http.keys_file` come on top. Without any, and \
         without that file, everybody who reaches the listener may send requests. `everline keys new ID` makes one. \
         Limits are per replica: of three replicas behind a balancer each lets this much through, so give each a \
         third. A key that is taken away is refused from the next request on; requests in flight end as they would \
         have.",
        KEY_EXAMPLE,
    ),
    (
        "node_token",
        "Node tokens bound to networks and roles, besides those of `nodes.token_sha256`; repeat the block for each. \
         `networks` is compared with the address the connection comes from: behind a balancer that is the \
         balancer's.",
        NODE_TOKEN_EXAMPLE,
    ),
    (
        "model",
        "How the prompts of a model become token ids, and its streams are continued; repeat the block for each. \
         [Tokenisation](../explanation/tokenisation.md) says what follows from it.",
        MODEL_EXAMPLE,
    ),
    (
        "name",
        "Names for `name_service.provider = \"static\"`; repeat the block for each, entries with the same name add up.",
        NAME_EXAMPLE,
    ),
    (
        "discover",
        "Names whose endpoints become workers, and cease to be when they are gone; repeat the block for each. \
         [How to](../how-to/find-workers-by-name.md).",
        DISCOVER_EXAMPLE,
    ),
];

/// A complete file with every key at its default and explained.
pub fn default_toml() -> String {
    let defaults = table_of(&Config::default());
    let mut out = String::from(
        "# Everline's configuration with every key at its default.\n\
         # Precedence: this file < environment EVERLINE_<SECTION>__<KEY> < flags (--set section.key=value).\n",
    );
    for section in SECTIONS {
        line!(out, "\n# {}\n[{}]", section.doc.trim(), section.name);
        for key in section.keys {
            line!(out, "# {} ({})", key.doc.trim(), key.kind.describe());
            match value_of(&defaults, key) {
                Some(value) => line!(out, "{} = {value}", key.name),
                None => line!(out, "# {} =", key.name),
            };
        }
    }
    for (_, _, example) in EXAMPLES {
        out.push('\n');
        out.push_str(example);
    }
    out
}

/// The effective configuration as a file; with `origins`, each value says where it is from.
pub fn to_toml_with_origins(loaded: &Loaded, origins: bool) -> String {
    let table = table_of(&loaded.config);
    let mut out = String::new();
    for section in SECTIONS {
        line!(out, "{}[{}]", if out.is_empty() { "" } else { "\n" }, section.name);
        for key in section.keys {
            let Some(value) = value_of(&table, key) else { continue };
            let setting = format!("{} = {value}", key.name);
            match loaded.origins.get(&key.dotted()).filter(|_| origins) {
                Some(origin) => line!(out, "{setting:<44}  # {origin}"),
                None => line!(out, "{setting}"),
            };
        }
    }
    for (list, _, _) in EXAMPLES {
        for (at, entry) in table.get(list).and_then(Value::as_array).into_iter().flatten().enumerate() {
            let origin = loaded.origins.get(&format!("{list}[{at}]")).filter(|_| origins);
            let note = origin.map(|origin| format!("  # {origin}")).unwrap_or_default();
            line!(out, "\n[[{list}]]{note}");
            for (name, value) in entry.as_table().into_iter().flatten() {
                line!(out, "{name} = {value}");
            }
        }
    }
    out
}

/// `docs/reference/configuration.md`
pub fn reference_markdown() -> String {
    let defaults = table_of(&Config::default());
    let mut out = String::from(
        "# Configuration\n\n\
         <!-- Generated from src/config/schema.rs: EVERLINE_REGENERATE_DOCS=1 cargo test docs_are_up_to_date -->\n\n\
         One TOML file (`everline serve --config FILE`). The environment overrides the file, flags override the \
         environment:\n\n\
         | source | example |\n|---|---|\n\
         | file | `[http]`, `listen = \"127.0.0.1:9000\"` |\n\
         | environment | `EVERLINE_HTTP__LISTEN=127.0.0.1:9000`; lists comma separated or as TOML |\n\
         | flag | `--http 127.0.0.1:9000`, or for any key `--set http.listen=127.0.0.1:9000` |\n\n\
         `RUST_LOG` sets `log.filter` unless `EVERLINE_LOG__FILTER` is there. Unknown keys are errors. \
         `everline config check` reports everything that is wrong with its place, `everline config print --origins` \
         shows where each value comes from, `everline config default` prints a commented file to start from.\n",
    );
    for section in SECTIONS {
        reference_section(&mut out, section, &defaults);
    }
    for (list, about, example) in EXAMPLES {
        line!(out, "\n## `[[{list}]]`\n\n{about}\n\n```toml");
        for text in example.lines().skip_while(|text| !text.starts_with("# [[")) {
            line!(out, "{}", text.trim_start_matches("# "));
        }
        line!(out, "```");
    }
    out
}

fn reference_section(out: &mut String, section: &SectionDoc, defaults: &Table) {
    line!(out, "\n## `[{}]`\n\n{}\n", section.name, section.doc.trim());
    line!(out, "| key | default | takes | what it does |\n|---|---|---|---|");
    for key in section.keys {
        let default = value_of(defaults, key).map(|value| format!("`{value}`")).unwrap_or_default();
        line!(out, "| `{}` | {default} | {} | {} |", key.name, key.kind.describe(), key.doc.trim());
    }
    let example = section.keys[0].name.to_ascii_uppercase();
    line!(out, "\nEnvironment: `{ENV_PREFIX}{}__{example}` and so on.", section.name.to_ascii_uppercase());
}

fn value_of<'a>(table: &'a Table, key: &KeyDoc) -> Option<&'a Value> {
    table.get(key.section)?.get(key.name)
}

fn table_of(config: &Config) -> Table {
    // Only a number above 2^63 or a path that is not Unicode cannot be written as TOML.
    Table::try_from(config).unwrap_or_default()
}
