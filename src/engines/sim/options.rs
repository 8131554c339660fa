//! What can be set about the simulated engine.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::events::{EventFormat, KvEventsConfig, ReplayLayout};
use super::pd::PdArgs;
use crate::zmtp::Endpoint;

/// What happens to running requests when the engine is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ShutdownMode {
    /// End them with `finish_reason` `abort`, as vLLM does on SIGTERM.
    Abort,
    /// Let them finish, as far as the grace period allows.
    Drain,
    /// Cut their connections.
    Drop,
}

/// Flags of `everline engine-sim`.
#[derive(Args, Clone, Debug)]
pub struct EngineSimArgs {
    /// Address to listen on; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
    /// Model name; repeat for aliases. The first one is used in replies that name none.
    #[arg(long = "model", default_value = "sim-model")]
    pub models: Vec<String>,
    /// Name of a LoRA adapter of the model; repeatable.
    #[arg(long = "lora")]
    pub loras: Vec<String>,
    /// Data-parallel ranks behind the one address. Each has KV blocks, a batch and a queue of its
    /// own, and publishes its events at ports that count up from those given.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub dp: u32,
    /// Tokens in a KV block.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub block_size: u32,
    /// KV blocks of the engine; of each rank.
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub blocks: u32,
    /// KV blocks in the memory of the host, of each rank: what falls out of the engine's is kept there,
    /// the newest first, and brought back for nothing when it is needed. 0 keeps nothing.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=16_777_216))]
    pub host_blocks: u32,

    /// Sequences in a batch; more than this wait.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_running: u32,
    /// Sequences that may wait; more than this are refused with 503.
    #[arg(long, default_value_t = 100_000)]
    pub max_waiting: u32,
    /// Prompt and output tokens of a sequence together; cut to what the KV blocks can hold.
    #[arg(long, default_value_t = 32_768, value_parser = clap::value_parser!(u32).range(2..))]
    pub max_model_len: u32,
    /// Tokens the engine takes into one step (chunked prefill).
    #[arg(long, default_value_t = 8192, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_batched_tokens: u32,
    /// Prompt tokens computed in a second.
    #[arg(long, default_value_t = 12_000.0, value_parser = positive)]
    pub prefill_tokens_per_second: f64,
    /// Milliseconds that a step takes whatever is in it.
    #[arg(long, default_value_t = 8.0, value_parser = not_negative)]
    pub decode_step_ms: f64,
    /// Microseconds that each sequence of the batch adds to a step.
    #[arg(long, default_value_t = 20.0, value_parser = not_negative)]
    pub sequence_step_us: f64,
    /// Time runs this many times faster.
    #[arg(long, default_value_t = 1.0, value_parser = positive)]
    pub speed: f64,
    /// No delays at all.
    #[arg(long)]
    pub instant: bool,
    /// The model's weights, so to speak: engines with equal seeds say equal things.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// One in this many tokens ends the text by itself; 0 means that none does.
    #[arg(long, default_value_t = 0)]
    pub eos_every: u64,
    /// Give every token its own event even if the reader is slow; the real engine merges them.
    #[arg(long)]
    pub no_coalesce: bool,
    /// Answer `/inference/v1/abort_requests`, which is refused with 403 otherwise.
    #[arg(long)]
    pub enable_scale_out: bool,
    /// Publish KV events over ZeroMQ: vLLM's JSON, with enable_kv_cache_events, publisher, endpoint,
    /// replay_endpoint, buffer_steps, hwm, max_queue_size, topic (and SGLang's bind). Port 0 takes a
    /// free one, `*` is the address of --listen.
    #[arg(long, value_name = "JSON", value_parser = KvEventsConfig::parse)]
    pub kv_events_config: Option<KvEventsConfig>,
    /// How KV events are written.
    #[arg(long, value_enum, default_value_t = EventFormat::VllmMap)]
    pub kv_events_format: EventFormat,
    /// Have `/metrics` with `--kv-events-format sglang`, as SGLang has it only with this flag.
    #[arg(long)]
    pub enable_metrics: bool,

    /// Events of `/generate`, which there is with `--kv-events-format sglang`, have what is new; otherwise
    /// all so far.
    #[arg(long)]
    pub incremental_streaming_output: bool,
    /// How the replay socket answers.
    #[arg(long, value_enum, default_value_t = ReplayLayout::Topic)]
    pub kv_replay_layout: ReplayLayout,
    /// Never send one in this many batches of KV events; 0 sends all. They can still be replayed.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub drop_frames_every: u64,
    /// A replay ends without a word after this many batches, as one that was too long for the
    /// socket's queue; 0 sends all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub cut_replays_after: usize,
    /// Publish the load over ZeroMQ, as SGLang does, at this endpoint.
    #[arg(long, value_name = "ENDPOINT", value_parser = endpoint)]
    pub load_publish_endpoint: Option<Endpoint>,
    /// How requests are split with other engines.
    #[command(flatten)]
    pub pd: PdArgs,
    /// What happens to running requests on shutdown.
    #[arg(long, value_enum, default_value_t = ShutdownMode::Abort)]
    pub shutdown: ShutdownMode,
    /// Milliseconds that connections get to end on shutdown.
    #[arg(long, default_value_t = 5000)]
    pub shutdown_grace_ms: u64,
}

impl EngineSimArgs {
    /// The flags' defaults.
    pub fn defaults() -> Self {
        #[derive(clap::Parser)]
        struct Alone {
            #[command(flatten)]
            args: EngineSimArgs,
        }
        <Alone as clap::Parser>::parse_from(["engine-sim"]).args
    }

    /// The longest sequence that the flags allow and the KV blocks can hold.
    pub fn context_length(&self) -> usize {
        let capacity = u64::from(self.blocks) * u64::from(self.block_size);
        usize::try_from(capacity.min(u64::from(self.max_model_len))).unwrap_or(usize::MAX)
    }

    /// How long a step takes; zero with `--instant`.
    pub fn step_time(&self, prefill_tokens: usize, sequences: usize) -> Duration {
        if self.instant {
            return Duration::ZERO;
        }
        let seconds = self.decode_step_ms / 1e3
            + self.sequence_step_us / 1e6 * sequences as f64
            + prefill_tokens as f64 / self.prefill_tokens_per_second;
        Duration::try_from_secs_f64((seconds / self.speed).min(3600.0)).unwrap_or_default()
    }
}

fn endpoint(text: &str) -> Result<Endpoint, String> {
    Endpoint::parse(text).map_err(|error| error.to_string())
}

fn positive(text: &str) -> Result<f64, String> {
    not_negative(text)
        .and_then(|number| if number > 0.0 { Ok(number) } else { Err("must be above 0".into()) })
}

fn not_negative(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number >= 0.0 => Ok(number),
        _ => Err("must be a number, 0 or more".into()),
    }
}
