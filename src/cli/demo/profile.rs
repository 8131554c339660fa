//! What kind of cluster a demo is: what its engines are told, and how replicas and clients come to them.

use clap::ValueEnum;
use serde_json::json;
use toml::{Table, Value};

use super::plan::{Engine, MODEL};

/// What a demo's engines do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Profile {
    /// Every engine answers by itself.
    #[default]
    Plain,
    /// A KsanaLLM fleet: nodes register with the replicas, which stand in for KsanaLLM's router.
    Ksana,
    /// Prefill and decode engines that speak like vLLM with its NIXL connector.
    VllmPd,
    /// Prefill and decode engines that speak like SGLang.
    SglangPd,
}

/// What an engine is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Everything.
    Whole,
    /// Prompts.
    Prefill,
    /// Text.
    Decode,
}

impl Part {
    /// As flags, configuration and the state file have it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Part::Whole => "aggregated",
            Part::Prefill => "prefill",
            Part::Decode => "decode",
        }
    }
}

impl Profile {
    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Profile::Plain => "plain",
            Profile::Ksana => "ksana",
            Profile::VllmPd => "vllm-pd",
            Profile::SglangPd => "sglang-pd",
        }
    }

    /// Whether requests are split between engines.
    pub(super) fn splits(self) -> bool {
        self != Profile::Plain
    }

    /// What the engine of this number, of so many, is for; the first half computes prompts.
    pub(super) fn part(self, number: u8, engines: u8) -> Part {
        match self.splits() {
            false => Part::Whole,
            true if number <= engines / 2 => Part::Prefill,
            true => Part::Decode,
        }
    }

    /// Whether engines come to the replicas, and therefore after them.
    pub(super) fn engines_register(self) -> bool {
        self == Profile::Ksana
    }

    /// The engine's command line; `router` is where it registers.
    pub(super) fn command(self, engine: &Engine, router: &str) -> Vec<String> {
        let listen = engine.address.to_string();
        let mut args: Vec<String> =
            ["engine-sim", "--listen", &listen, "--model", MODEL].map(str::to_owned).into();
        let mut add = |name: &str, value: &str| args.extend([name.to_owned(), value.to_owned()]);
        let (side, port) = (engine.side.to_string(), engine.side.port().to_string());
        match self {
            Profile::Plain => {}
            Profile::Ksana => {
                add("--pd", "ksana");
                add("--router-addr", router);
                add("--coordinator-addr", &side);
            }
            Profile::VllmPd => {
                add("--pd", "vllm-nixl");
                add("--side-channel-host", "127.0.0.1");
                add("--side-channel-port", &port);
            }
            Profile::SglangPd => {
                add("--pd", "sglang");
                // Decode engines have none, and ask where requests say.
                add("--disaggregation-bootstrap-port", &port);
            }
        }
        if engine.part != Part::Whole {
            add("--role", engine.part.name());
        }
        // KsanaLLM's router knows of no events, and SGLang's decode engines have none.
        if self != Profile::Ksana && (self, engine.part) != (Profile::SglangPd, Part::Decode) {
            let [events, replay] = engine.events.map(|address| format!("tcp://*:{}", address.port()));
            let config =
                json!({"enable_kv_cache_events": true, "endpoint": events, "replay_endpoint": replay});
            add("--kv-events-config", &config.to_string());
        }
        args
    }

    /// The engine as a replica's `[[worker]]`; nothing where it registers itself.
    pub(super) fn worker(self, engine: &Engine) -> Option<Table> {
        if self.engines_register() {
            return None;
        }
        let text = |text: &str| Value::String(text.to_owned());
        let mut worker = Table::from_iter([
            ("id".to_owned(), text(&engine.name)),
            ("url".to_owned(), text(&format!("http://{}", engine.address))),
            ("models".to_owned(), Value::Array(vec![text(MODEL)])),
        ]);
        if engine.part != Part::Whole {
            worker.insert("role".to_owned(), text(engine.part.name()));
        }
        if self == Profile::SglangPd {
            worker.insert("engine".to_owned(), text("sglang"));
            if engine.part == Part::Prefill {
                worker.insert("bootstrap_port".to_owned(), Value::Integer(engine.side.port().into()));
            }
        }
        Some(worker)
    }

    /// Commands that show what is going on.
    pub(super) fn inside(self) -> [String; 2] {
        match self {
            Profile::Ksana => ["ksana pairs".to_owned(), "ksana nodes".to_owned()],
            Profile::Plain | Profile::VllmPd | Profile::SglangPd => {
                ["index stats".to_owned(), format!("explain --model {MODEL} --prompt 'Tell me a story'")]
            }
        }
    }

    /// Sections of a replica's configuration that only this profile has.
    pub(super) fn sections(self) -> Table {
        match self {
            Profile::Ksana => {
                let enabled = Table::from_iter([("enabled".to_owned(), Value::Boolean(true))]);
                Table::from_iter([("ksana".to_owned(), Value::Table(enabled))])
            }
            Profile::Plain | Profile::VllmPd | Profile::SglangPd => Table::new(),
        }
    }
}
